"""What the notebooks show of prompts, targets and differences is what the model is given."""

from __future__ import annotations

import json
import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from PIL import Image

from lavic_utils import figures, recommendation
from lavic_utils.config import ROOT, UserError
from lavic_utils.experiment import Experiment
from lavic_utils.figures import comparisons, paper_map, prompt_anatomy, style
from lavic_utils.provenance import footer


@pytest.fixture(scope="module")
def run():
    return Experiment("mini", 42).prepare()


@pytest.fixture(scope="module")
def example(run):
    dialogue = next(
        d
        for d in run.dialogues("home", "valid")
        if len(d.turns) > 2 and set(d.gt_items) & set(d.candidates_st)
    )
    return recommendation.training_examples([dialogue], "candidates_st", 42)[0]


def test_token_losses_add_up_to_the_training_loss(run, example):
    model, visual = run.model(), {example.candidates[0]: torch.ones(5, 128)}
    prompter = run.prompter(visual)
    losses = prompt_anatomy.token_losses(model, prompter, [example])[0]
    batch = prompter.collate([prompter.row(example)])
    loss = recommendation.Recommender(model)(**batch)["loss"]
    assert sum(losses) / len(losses) == pytest.approx(loss.item(), abs=1e-4)
    assert len(losses) == len(prompter.target_ids(example.target))
    blind = prompt_anatomy.token_losses(model, run.prompter(None), [example])[0]
    assert blind != pytest.approx(losses, abs=1e-4)  # negative control


def test_figures_draw_an_interval_for_every_row():
    rows = [
        {"domain": d, "LaViC minus": m, "difference": 0.1, "low": -0.1, "high": 0.3}
        for m in ("LaViC w/o images", "BM25")
        for d in ("beauty", "fashion", "home")
    ]
    axis = comparisons.forest_figure(pd.DataFrame(rows)).axes[0]
    drawn = [list(line.get_xdata()) for line in axis.lines if len(line.get_xdata()) == 2]
    assert drawn.count([-0.1, 0.3]) == 6
    names = [label.get_text() for label in axis.get_yticklabels()]
    domains = ["beauty", "fashion", "home"]
    assert names == [
        name for m in ("LaViC w/o images", "BM25") for name in (f"LaViC minus {m}", *domains)
    ]


def test_the_frontier_draws_each_value_in_its_own_row():
    values = {"hit_ratio_conversations": [0.3, 0.7], "accuracy": [float("nan"), 0.9]}
    means = pd.DataFrame(values | {"tokens": [0, 1]}, index=["LaViC w/o images", "LaViC"])
    for axis, wanted in zip(comparisons.frontier_figure(means).axes, values.values(), strict=True):
        drawn = {line.get_ydata()[0]: line.get_xdata()[0] for line in axis.lines}
        assert [drawn[y] for y in (0, 1)] == pytest.approx(wanted, nan_ok=True)


def test_a_kept_figure_says_its_tier_provenance_and_what_is_seen(run, results):
    shown = figures.keep(plt.figure(), "plain", run, seeds=[1, 2], alt="Nothing is seen.")
    figures.keep(plt.figure(), "other", run, "published", alt="Nothing either.")
    about = run.stamp() | {"tier": "published"}
    figures.save(plt.figure(), "audit/third", run.profile, about, "Nor here.")

    def stored(name: str) -> dict:
        with Image.open(figures.figures_dir(run.profile) / f"{name}.png") as image:
            return json.loads(image.text["Comment"])

    assert repr(shown) == shown._repr_mimebundle_()["text/plain"] == "Nothing is seen."
    plain = stored("plain")
    assert (plain["tier"], plain["seeds"], plain["alt"]) == ("mini run", [1, 2], repr(shown))
    assert stored("other")["tier"] == stored("audit/third")["tier"] == "published"
    assert "seeds" not in stored("other")  # negative control


def test_what_is_printed_or_counted_bears_no_profile_and_no_seed(run):
    about = run.stamp()
    assert "seed 42" in footer(about) and "profile mini" in footer(about)
    for tier in ("published", "replication answers", "counts of the real files"):
        line = footer(about | {"tier": tier})
        assert "seed" not in line and "profile" not in line


def test_the_map_of_the_paper_names_cells_files_and_their_tiers():
    rows = paper_map.paper_map()
    assert len({what for what, *_ in rows}) == len(rows) >= 12
    for _, _, _, file, tier in rows:
        if file:
            with Image.open(ROOT / file) as image:
                assert json.loads(image.text["Comment"])["tier"] == tier


def test_an_exhibit_that_no_cell_shows_is_named(monkeypatch):
    lost = {"what": "x", "notebook": "00", "figure": "lost", "tier": "published"}
    monkeypatch.setattr(paper_map, "published", lambda: {"exhibits": [lost]})
    with pytest.raises(UserError, match='00_start_here.ipynb: 0 cells hold "lost"'):
        paper_map.paper_map()


def test_every_plate_has_a_title_and_there_are_at_most_thirty():
    names = set()
    for path in sorted((ROOT / "notebooks").glob("0*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            for call in re.finditer(r"(?<!def )\bkeep\(", source):
                if "outputs" in cell:
                    assert re.search("title|heading", source[call.start() :]), (
                        path.name,
                        source[:80],
                    )
                    names.add(re.search(r'"([\w/]+)"', source[call.start() :]).group(1))
    assert 20 < len(names) <= 30, sorted(names)


def cells():
    """(notebook, kind, source) of every cell."""
    for path in sorted((ROOT / "notebooks").glob("0*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            yield path.stem, cell["cell_type"], "".join(cell["source"])


def test_formulas_have_single_backslashes_and_counts_one_vocabulary():
    for name, kind, source in cells():
        if kind == "markdown":
            assert not re.search(r"\\\\[A-Za-z]", source), (name, source[:80])
        assert not re.search("over pairs|row mean", source) or name.startswith("07"), name


def test_tables_and_sentences_round_alike():
    """345 of 1,200 is .2875: a frame's `round` makes .288 of it and a sentence .287."""
    assert f"{345 / 1200:.3f}" != f"{pd.Series([345 / 1200]).round(3)[0]:.3f}"  # the fault
    shown = {name for name, _, source in cells() if "display.float_format" in source}
    assert len(shown) == 8
    assert not [name for name, _, source in cells() if re.search(r"\.round\(3\)", source)]


def test_prompts_with_drawn_titles_are_an_estimate_and_counts_are_not():
    tiers = {}
    for path in (ROOT / "results" / "data").glob("*.json"):
        tiers[path.stem] = json.loads(path.read_text(encoding="utf-8"))["tier"].partition(":")[0]
    assert tiers.pop("overflow") == "estimate"
    with Image.open(ROOT / "figures" / "data" / "context_pressure.png") as image:
        assert json.loads(image.text["Comment"])["tier"].startswith("estimate")
    assert set(tiers.values()) == {"counts of the real files"}


def shared_columns(page: str) -> list[str]:
    """Heads of the tables that hold a published and a measured figure, or two forms of them."""
    heads = re.findall(r"^\| .* \|(?=\n\| ---)", page, re.MULTILINE)
    return [head for head in heads if "published" in head and "mini run" in head]


def test_readme_keeps_published_and_measured_figures_in_tables_of_their_own():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    block = page.partition("<!-- results: begin -->")[2].partition("<!-- results: end -->")[0]
    published, measured = block.split("**Measured here**")
    assert "0.1187" in published and "0.1187" not in measured
    assert "not asked (" in measured and "| LLaVA-v1.6" not in measured
    assert "[0." in measured and "[0." not in published  # intervals are of what was run here
    assert not shared_columns(page)
    both = "| method | beauty, published | beauty, mini run |\n| --- | --- | --- |\n"
    assert shared_columns(both)  # negative control


def test_a_small_p_value_is_no_zero_in_the_json_beside_a_table():
    compared = 0
    for path in (ROOT / "results" / "audit").glob("*.csv"):
        rows = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
        for said, row in zip(pd.read_csv(path).to_dict("records"), rows, strict=True):
            for name, value in row.items():
                if isinstance(value, float) and not isinstance(said[name], str):
                    assert value == pytest.approx(said[name], rel=1e-4, abs=0), (path.name, name)
                    compared += 0 < value < 1e-10
    assert compared > 3


def test_a_hue_means_a_method():
    greys = {style.GRAY, style.PALE, style.INK}
    hues = {colour for colour in style.METHODS.values()} - greys
    tiers = {colour for _, colour in style.TIERS.values()}
    others = {*style.DOMAINS.values(), *tiers, *style.CAUSES}
    assert len(hues) == len(style.METHODS) and not hues & others


def test_what_texts_say_of_the_extended_run_is_what_it_gave():
    found = json.loads((ROOT / "results" / "mini" / "extended.json").read_text(encoding="utf-8"))
    rows = pd.DataFrame(found["rows"])
    table = rows.groupby("method")["hit_ratio_conversations"].mean()
    apart = rows.pivot(columns="method", index=["domain", "seed"], values="hit_ratio_conversations")
    mean = "LaViC w/o self-distillation, mean of patches"
    assert (apart[mean] > apart["LaViC"]).all() and len(apart) == 9  # every domain, every seed
    others = table[["LaViC, mean of patches", "LaViC, one [CLS]", "LaViC, 20 candidates"]]
    said = [f"{value:.3f}".lstrip("0") for value in (table[mean], table["LaViC"], *others)]
    notebook = (ROOT / "notebooks" / "05_ablations.ipynb").read_text(encoding="utf-8")
    meant = notebook.split("**What it means.** In the committed run")[1].split("## Common")[0]
    assert [one for one in said if one not in meant] == []
    page = (ROOT / "docs" / "reviewer.md").read_text(encoding="utf-8")
    assert f"HR@1 {said[0]} against {said[1]} (three" in page
