"""What the notebooks show of prompts, targets and differences is what the model is given."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from PIL import Image

from lavic_utils import figures, recommendation
from lavic_utils.experiment import Experiment
from lavic_utils.figures import comparisons, prompt_anatomy


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


def test_each_part_of_a_prompt_decodes_to_its_own_text(run, example):
    with_picture = example.candidates[:4]  # so a candidate without a picture is there too
    prompter = run.prompter({asin: torch.zeros(5, 128) for asin in with_picture})
    ids = prompter.prompt(example.dialogue, example.candidates).ids
    parts = prompt_anatomy.prompt_parts(prompter, example.dialogue, example.candidates)
    assert parts.count("[CLS]") == 5 * 4 and set(parts) == set(prompt_anatomy.PARTS)

    def text(part: str) -> str:
        own = [token for token, kind in zip(ids, parts, strict=True) if kind == part]
        return "".join(prompter.tokenizer.decode(own).split())

    assert text("ids") == "".join(example.candidates)
    assert text("titles") == "".join(run.titles[a] for a in example.candidates).replace(" ", "")
    turns = [f"{who.title()}:{said}" for who, said in example.dialogue.turns]
    assert text("dialogue") == "".join(turns).replace(" ", "")


def test_a_profile_may_write_the_id_before_the_title(run, example):
    """The order of the paper's prompt: the same parts, as many tokens of each."""
    form = {"candidate": "{id}{image} {title}\n", "candidate_without_image": "{id} {title}\n"}
    prompts = run.profile.prompts.model_copy(update=form)
    turned = run.prompter(None)
    turned.profile = run.profile.model_copy(update={"prompts": prompts})
    parts = prompt_anatomy.prompt_parts(turned, example.dialogue, example.candidates)
    plain = prompt_anatomy.prompt_parts(run.prompter(None), example.dialogue, example.candidates)
    assert [p for p in parts if p in ("ids", "titles")][0] == "ids"
    assert [p for p in plain if p in ("ids", "titles")][0] == "titles"
    assert set(parts) == set(plain)
    assert parts.count("titles") == plain.count("titles")
    assert parts.count("dialogue") == plain.count("dialogue")


def test_a_shortened_prompt_is_refused(run, example):
    words = " ".join(["please"] * 600)
    long = example.dialogue.model_copy(update={"context": f"<submission>{words}</submission>"})
    with pytest.raises(ValueError, match=f"line {long.line}: the prompt was shortened"):
        prompt_anatomy.prompt_parts(run.prompter(None), long, example.candidates)


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
        {"domain": d, "LaViC less": m, "difference": 0.1, "low": -0.1, "high": 0.3}
        for m in ("LaViC w/o images", "BM25")
        for d in ("beauty", "fashion", "home")
    ]
    axis = comparisons.forest_figure(pd.DataFrame(rows)).axes[0]
    drawn = [list(line.get_xdata()) for line in axis.lines if len(line.get_xdata()) == 2]
    assert drawn.count([-0.1, 0.3]) == 6
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["beauty", "fashion", "home"] * 2


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
