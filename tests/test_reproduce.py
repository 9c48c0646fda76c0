"""The runner, on notebooks of a few cells; a kernel starts in two seconds, so tests do much."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lavic_utils import experiment, provenance, report
from lavic_utils.config import Profile, UserError, load_profile
from lavic_utils.provenance import kept, write_kept
from lavic_utils.repro import driver, tuning
from lavic_utils.repro import notebooks as nbs

NOTEBOOKS = nbs.NOTEBOOKS


@pytest.fixture(autouse=True)
def steady_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """One state of the code for a whole test, also while somebody edits it."""
    monkeypatch.setattr(nbs, "code_stamp", lambda: {"core": "steady"})


def save(path: Path, *cells: str, **lavic: object) -> Path:
    """A notebook: a heading, the parameters cell, then one code cell a source."""
    head = new_code_cell("profile = 'none'\nseed = 0")
    head.metadata["tags"] = ["parameters"]
    nb = new_notebook(cells=[new_markdown_cell("# Title"), head, *map(new_code_cell, cells)])
    if lavic:
        nb.metadata["lavic"] = lavic
    path.parent.mkdir(exist_ok=True)
    path.write_text(nbformat.writes(nb), encoding="utf-8")
    return path


def record(results: Path, seed: int = 5) -> dict:
    return json.loads((results / f"seed{seed}" / "run.json").read_text())["notebooks"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the notebooks are."""
    monkeypatch.setattr(nbs, "NOTEBOOKS", tmp_path / "nb")
    return tmp_path / "nb"


def reproduce(profile: Path, seeds=1, only=(), force=False) -> int:
    return driver.reproduce(str(profile), seeds, only, force, extended=False)


def keys(profile: Profile, seed: int = 5) -> list[str]:
    given = [{"profile": "tiny", "seed": seed}]
    return [job.key for job in driver.plan(profile, given)]


def test_order_seeds_skipping_and_what_is_written(folder, tmp_path, tiny_profile, results, capfd):
    made = f"open({str(results / 'made.json')!r}, 'a').write(f'{{seed}};')"
    save(
        folder / "00_a.ipynb",
        made,
        "import os; assert os.environ['HF_HUB_OFFLINE'] == '1'",
        "print('hello')",
    )
    save(folder / "02_b.ipynb", made, per_seed=True, minutes=0.1)
    text = tiny_profile.read_text().replace("model: none", "model: mini_model")
    tiny_profile.write_text(text)  # what trains is refused without its model
    run = partial(reproduce, tiny_profile)
    assert run() == 0
    out = capfd.readouterr().out
    assert "\x1b" not in out and "00_a (seed 5): done" in out and "in all" in out
    assert (results / "made.json").read_text() == "5;5;"
    copy = nbformat.read(results / "seed5" / "00_a.ipynb", 4)
    assert copy.metadata.lavic.provenance.seed == 5 and str(tmp_path) not in json.dumps(
        copy.metadata
    )
    assert "hello" in (results / "seed5" / "00_a.log").read_text()
    assert record(results)["00_a"]["status"] == "ok"

    assert run(seeds=2) == 0  # the first seed is not run again, the second only where per_seed
    out = capfd.readouterr().out
    assert (
        out.count("unchanged, not run again") == 2
        and (results / "made.json").read_text() == "5;5;6;"
    )
    assert (
        not (results / "seed6" / "00_a.ipynb").exists()
        and (results / "seed6" / "02_b.ipynb").exists()
    )

    assert run(only=["2"], force=True) == 0 and (results / "made.json").read_text() == "5;5;6;5;"
    (
        results / "made.json"
    ).unlink()  # negative control: what a notebook made is gone, so it is run again
    assert run() == 0 and (results / "made.json").read_text() == "5;5;"


def test_key_changes_with_source_inputs_parameters_code_and_data(
    folder, tmp_path, tiny_profile, results, monkeypatch
):
    save(folder / "00_a.ipynb", "1"), save(folder / "01_b.ipynb", "2")
    profile = load_profile(str(tiny_profile))
    first = keys(profile)
    assert keys(profile) == first
    save(folder / "01_b.ipynb", "3")
    assert keys(profile)[0] == first[0] and keys(profile)[1] != first[1]
    save(folder / "01_b.ipynb", "2"), save(folder / "00_a.ipynb", "0")
    assert keys(profile)[0] != first[0] and keys(profile)[1] != first[1]
    save(folder / "00_a.ipynb", "1")
    assert keys(profile) == first
    assert keys(profile, seed=6)[0] != first[0]
    assert keys(profile.model_copy(update={"dtype": "auto"}))[0] != first[0]
    monkeypatch.setenv("LAVIC_DATA", str(folder))
    assert keys(profile)[0] != first[0]
    monkeypatch.delenv("LAVIC_DATA")
    monkeypatch.setattr(nbs, "code_stamp", lambda: {"core": "other"})
    assert keys(profile)[0] != first[0]
    monkeypatch.setattr(nbs, "code_stamp", lambda: {"core": "steady"})
    assert keys(profile) == first
    monkeypatch.setattr(provenance, "versions", lambda: {"pillow": "0.1"})
    assert keys(profile)[0] != first[0]


def test_failing_cell_is_shown_in_few_lines_and_the_next_run_continues(
    folder, tmp_path, tiny_profile, results, capfd
):
    from lavic_utils.__main__ import main

    save(folder / "00_a.ipynb", "1")
    save(folder / "01_b.ipynb", "2", "raise ValueError('wrong\\nshape')", "3")
    arguments = ["reproduce", "--profile", str(tiny_profile)]
    assert main(arguments) == 1
    out, err = capfd.readouterr()
    shown = out[out.index("01_b: cell") :].strip().splitlines()
    assert len(shown) <= 6 and shown[:2] == [
        "01_b: cell 4 of 5 (seed 5) failed",
        "ValueError: wrong",
    ]
    assert "Traceback" not in out + err
    assert (results / "seed5" / "01_b.failed.ipynb").exists() and not (
        results / "seed5" / "01_b.ipynb"
    ).exists()
    save(folder / "01_b.ipynb", "2")
    assert main(arguments) == 0
    out = capfd.readouterr().out
    assert "00_a (seed 5): unchanged" in out and "01_b (seed 5): done" in out
    assert not (results / "seed5" / "01_b.failed.ipynb").exists()


def test_killed_run_leaves_no_half_copy_and_lets_go_of_the_lock(
    folder, tmp_path, tiny_profile, results
):
    flag = tmp_path / "started"
    save(folder / "00_a.ipynb", f"open({str(flag)!r}, 'w').close()", "import time; time.sleep(60)")
    code = f"""
from pathlib import Path
from lavic_utils.repro import driver, notebooks
notebooks.NOTEBOOKS = Path({str(folder)!r})
driver.reproduce({str(tiny_profile)!r}, 1, (), False, False)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not flag.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(UserError, match="another run"):
        reproduce(tiny_profile)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (results / "seed5" / "00_a.ipynb").exists()
    save(folder / "00_a.ipynb", "1")
    assert reproduce(tiny_profile) == 0
    assert not list(results.rglob("*.failed.ipynb")) and not list(results.rglob(".*.tmp"))


def test_what_was_damaged_since_is_made_again(folder, tiny_profile, results, capfd):
    figure = f"open({str(results / 'figures.png')!r}, 'w').write('{{}}'.format(seed))"
    (
        save(folder / "00_a.ipynb", "1"),
        save(folder / "01_b.ipynb", figure),
        save(folder / "02_c.ipynb"),
    )
    assert reproduce(tiny_profile) == 0 == reproduce(tiny_profile)
    assert capfd.readouterr().out.count("unchanged, not run again") == 3  # negative control
    (results / "figures.png").write_text("6")
    copy = results / "seed5" / "00_a.ipynb"
    copy.write_text(copy.read_text()[:-9])
    assert reproduce(tiny_profile) == 0
    out = capfd.readouterr().out
    assert "00_a (seed 5): seed5/00_a.ipynb is not as it was left" in out
    assert "01_b (seed 5): figures.png is not as it was left" in out
    assert out.count("unchanged") == 1 and (results / "figures.png").read_text() == "5"


def test_rows_that_are_lost_are_made_again(folder, tiny_profile, results, capfd):
    row = {"seed": 5, "method": "m", "hit_ratio_conversations": 1, "validity_ratio": 1}
    rows = [{**row, "domain": domain} for domain in ("home", "beauty")]
    write = "from lavic_utils.provenance import write_kept; from pathlib import Path; write_kept("
    write += f"Path({str(results / 'metrics.own.json')!r}), {{'rows': {rows!r}}})"
    save(folder / "00_a.ipynb", write)
    assert reproduce(tiny_profile) == 0 == reproduce(tiny_profile)
    assert capfd.readouterr().out.count("unchanged, not run again") == 1  # negative control
    write_kept(results / "metrics.own.json", {"rows": rows[:1]})  # as another `run` leaves it
    assert reproduce(tiny_profile) == 0
    assert "rows that it made are not in metrics.own.json any more" in capfd.readouterr().out
    assert len(kept(results / "metrics.own.json")["rows"]) == 2


def test_a_path_with_braces_and_somebody_elses_kernel(folder, tmp_path, tiny_profile, monkeypatch):
    monkeypatch.setenv("LAVIC_RESULTS", str(tmp_path / "{braces}"))
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    said = {"argv": ["false"], "display_name": "x", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(said))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    save(folder / "00_a.ipynb", f"import sys; assert sys.executable == {sys.executable!r}")
    assert reproduce(tiny_profile) == 0
    assert (tmp_path / "{braces}" / "tiny" / "seed5" / "00_a.ipynb").is_file()


def test_files_go_where_a_link_leads_and_never_onto_a_folder_or_a_device(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    provenance.write_text(tmp_path / "link", "new")
    assert (tmp_path / "file").read_text() == "new" and (tmp_path / "link").is_symlink()
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(UserError, match="a folder or a device, not a file"):
            provenance.write_text(tmp_path / name, "new")
    assert (tmp_path / "fifo").is_fifo()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="a link in a circle of links"):
        provenance.write_text(tmp_path / "loop", "new")


def test_dead_kernel_is_a_failure_not_a_crash(folder, tmp_path, tiny_profile, results, capfd):
    save(folder / "00_a.ipynb", "import os; os._exit(1)")
    assert reproduce(tiny_profile) == 1
    assert "00_a: cell 3 of 3 (seed 5) failed\nDeadKernelError" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "07"], "no notebook '07'; there are 00_a"),
        (["--seeds", "0"], "--seeds 0"),
        (["--seeds", "x"], "--seeds"),
        (["--profile", "nope"], "profile 'nope' not found"),
        (["--nope"], "No such option"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    folder, tmp_path, tiny_profile, results, arguments, message, capsys
):
    from lavic_utils.__main__ import main

    save(folder / "00_a.ipynb", "1")
    given = [
        "reproduce",
        "--profile",
        str(tiny_profile),
        *arguments,
    ]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and len(error.strip().splitlines()) == 1


def test_execute_in_place_then_check_and_each_fault_is_found(
    folder, tmp_path, results, monkeypatch
):
    now = {"core": "steady"}
    path = save(folder / "00_a.ipynb", "seed + 1", "print('x')", per_seed=True, minutes=2)
    assert "never executed" in nbs.check_notebook(path, now)[0]
    assert nbs.execute() == 0
    first = path.read_bytes()
    assert nbs.check() == [] and b"papermill" not in first and b"iopub" not in first
    assert nbs.execute(["0"]) == 0
    assert path.read_bytes() == first  # nothing volatile is kept
    lavic = nbs.read_notebook(path).metadata.lavic
    assert lavic.per_seed is True and lavic.minutes == 2

    later = {"core": "later", "mini": "new"}
    assert "stale (core, mini changed after" in nbs.check_notebook(path, later)[0]

    def broken(change) -> str:
        nb = nbformat.reads(first.decode(), 4)
        change(nb.cells[-1], nb)
        path.write_text(nbformat.writes(nb), encoding="utf-8")
        return " ".join(nbs.check_notebook(path, now))

    said = nbformat.v4.new_output("stream", text="z")
    assert broken(lambda c, nb: None) == ""
    assert "its cells changed" in broken(lambda c, nb: c.update(source="print('y')"))
    assert "its outputs changed" in broken(lambda c, nb: c.update(execution_count=9))
    assert "its outputs changed" in broken(lambda c, nb: c.update(outputs=[said]))
    assert "no cell tagged" in broken(lambda c, nb: nb.cells[1].metadata.pop("tags"))


def test_the_stamp_names_what_changed_and_leaves_out_what_no_notebook_reads(tmp_path, monkeypatch):
    monkeypatch.undo()
    for name in ("vision.py", "mini/world.py", "bench/plan.py", "__main__.py", "profiles/a.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x = 1\n")
    weights = tmp_path / "mini_model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"\r\n")
    first = nbs.code_stamp(tmp_path)
    assert set(first) == {"vision.py", "mini", "profiles", "mini_model"}
    (tmp_path / "vision.py").write_bytes(b"x = 1\r\n")  # line ends alone
    (tmp_path / "bench" / "plan.py").write_bytes(b"x = 2\n")
    assert nbs.code_stamp(tmp_path) == first
    (tmp_path / "mini" / "world.py").write_bytes(b"x = 2\n")
    weights.write_bytes(b"\n")
    changed = nbs.code_stamp(tmp_path)
    assert {part for part in first if changed[part] != first[part]} == {"mini", "mini_model"}
    read = [path.read_text(encoding="utf-8") for path in NOTEBOOKS.glob("*.ipynb")]
    assert len(read) == 8
    unread = r"lavic_utils(\.| import )(repro|bench|__main__)"
    assert not [text for text in read if re.search(unread, text)]


def test_code_hash_sees_content_not_line_ends(tmp_path):
    (tmp_path / "mini_model").mkdir()
    (tmp_path / "a.py").write_bytes(b"x = 1\n")
    (tmp_path / "mini_model" / "w.safetensors").write_bytes(b"\r\n")
    first = provenance.code_hash(tmp_path)
    (tmp_path / "a.py").write_bytes(b"x = 1\r\n")
    assert provenance.code_hash(tmp_path) == first and len(first) == 12
    (tmp_path / "mini_model" / "w.safetensors").write_bytes(b"\n")
    assert provenance.code_hash(tmp_path) != first


def test_files_are_whole_or_as_they_were_and_a_run_ends_with_its_scores(
    tmp_path, tiny_profile, capsys
):
    path = tmp_path / "metrics.json"
    about = provenance.provenance(load_profile(str(tiny_profile)), 5, "data")
    row = dict.fromkeys(report.ROW_FIELDS, 1) | {"method": "m", "domain": "home", "seed": 5}
    out = report.upsert_metrics(path, [row], about)
    with pytest.raises(ValueError, match="JSON compliant|NaN"):
        provenance.write_json(path, {"x": float("nan")})
    assert report.read_metrics(report.newest(path)) == out and not list(tmp_path.glob(".*.tmp"))
    about = {**about, "seeds": [5, 6]}  # another run's rows, of another seed
    report.upsert_metrics(path, [{**row, "seed": 6, "hit_ratio_conversations": 0}], about)
    job = driver.Job(path, path, {"seed": 5}, True, 1, "", {"seconds": 60})
    driver.summary([job], tmp_path)
    said = capsys.readouterr().out
    assert re.search(r"m +home +1 +1\.0000 +1\.0000", said)  # of its own seed alone
    assert said.endswith("no committed run of the same seed to compare with\n")


def test_the_last_line_compares_with_the_committed_rows_of_the_same_seed():
    row = {"method": "m", "domain": "home", "seed": 5, "conversations": 10, "pairs": 12, "hits": 7}
    row |= {"valid": 9, "hit_ratio_scored": 0.7, "hit_ratio_conversations": 0.7}
    ours = [row, row | {"domain": "beauty"}, row | {"seed": 6}]
    assert driver.compared(ours[:2], ours) == "2 of 2 rows equal the committed run"
    other = row | {"hits": 6, "hit_ratio_conversations": 0.6}
    said = "1 of 2 rows equal the committed run; m, home, seed 5: HR@1 -0.1000"
    assert driver.compared([other, ours[1]], ours) == said
    assert driver.compared([row | {"valid": 8}], ours).startswith("0 of 1")
    assert driver.compared([row | {"seed": 7}], ours).startswith("no committed run")


def test_every_arm_is_searched_over_the_same_rates_and_the_best_is_kept(results, monkeypatch):
    """Made-up hits: an arm's best rate is its own; equals, or one conversation less, go to the
    lowest one."""
    best = {"LaViC": 2e-3, "LaViC w/o images": 4e-3}

    def hits(self, method, domain, reading, split):
        arm, rate = method.split(" at ")
        assert self.profile.arm(method).recommendation.learning_rate == float(rate)
        one_more = arm == "Entire tokens (5x577)" and float(rate) == 4e-3
        return [float(rate) == best.get(arm)] * 2 + [one_more, False]

    monkeypatch.setattr(experiment.Experiment, "hits", hits)
    monkeypatch.setattr(experiment.Experiment, "tune", lambda *asked: {"steps": 7})
    monkeypatch.setattr(experiment.Experiment, "prepare", lambda self: self)
    monkeypatch.setattr(experiment.Experiment, "data_hash", "x")
    said = tuning.tune(load_profile("mini"))
    path = results.parent / "mini" / "tuning.json"
    rows = kept(path)["rows"]
    chosen = {row["arm"]: row["setting"]["learning_rate"] for row in rows if row["chosen"]}
    lowest = min(tuning.RATES)
    assert chosen == dict.fromkeys(tuning.ARMS, lowest) | best and len(rows) == 20
    assert {row["steps"] for row in rows} == {7} and rows[0]["conversations"] == 4
    assert "LaViC w/o images: 0.004 is chosen" in "".join(said)
    table = report.tuning_table(experiment.Experiment("mini"))
    assert table.loc["LaViC", 2e-3] == "0.500 / 0.500 *"
    path.write_text(path.read_text().replace('"hit_ratio": 0.5', '"hit_ratio": 0.6'))
    assert report.tuning_table(experiment.Experiment("mini")) is None  # damaged, so not shown


def test_a_run_over_kept_results_says_nothing_about_the_time(folder, tiny_profile, results):
    save(folder / "02_b.ipynb", "1", per_seed=True, minutes=3)
    given, profile = [{"profile": "tiny", "seed": 5}], load_profile(str(tiny_profile))
    place = results / "seed5"
    place.mkdir(parents=True)
    for made, wanted in ((["seed5/x/result.json"], 90), (["metrics.json"], 180)):
        record = {"seconds": 90, "made": made, "key": "", "status": "ok"}
        provenance.write_kept(place / "run.json", {"notebooks": {"02_b": record}})
        assert [job.seconds for job in driver.plan(profile, given)] == [wanted]


def test_provenance_names_no_host_and_no_path(tiny_profile):
    import platform

    text = json.dumps(provenance.provenance(load_profile(str(tiny_profile)), 5, "data"))
    assert platform.node() not in text and "/root" not in text and str(Path.home()) not in text
    assert '"tier": "mini run"' in text and '"torch": "2.' in text and "+cpu" not in text


def test_figure_carries_its_tier_once(tmp_path, tiny_profile):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    about = provenance.provenance(load_profile(str(tiny_profile)), 5, "data")
    figure, _ = plt.subplots()
    for _ in range(2):
        provenance.save_figure(figure, tmp_path / "f.png", "mini run", about)
    assert [t.get_text() for t in figure.texts] == [provenance.footer(about)]
    saved = Image.open(tmp_path / "f.png")
    assert saved.text["Description"].startswith(
        "tier: mini run · profile tiny · seed 5 · content hash of the code "
    )
    assert json.loads(saved.text["Comment"])["data_hash"] == "data"
    plt.close(figure)


def test_data_names_the_folder_of_the_published_files(
    folder, tmp_path, tiny_profile, results, monkeypatch, capfd
):
    from lavic_utils.__main__ import main

    real = tmp_path / "real"
    real.mkdir()
    (real / "item2meta_valid.jsonl").write_text("{}\n", encoding="utf-8")
    save(folder / "00_a.ipynb", f"import os; assert os.environ.get('LAVIC_DATA') == {str(real)!r}")
    arguments = ["reproduce", "--profile", str(tiny_profile)]
    assert (
        main([*arguments, "--data", str(tmp_path / "none")]) == 2
        and "no such folder" in capfd.readouterr().err
    )
    assert main(arguments) == 1  # negative control: without the option the cell fails
    monkeypatch.setenv("LAVIC_DATA", "elsewhere")  # so that it is as before after the test
    assert main([*arguments, "--data", str(real)]) == 0


@pytest.mark.parametrize(("name", "code"), [("mini", 1), ("tiny", 0)])
def test_solutions_run_on_the_mini_world_and_are_only_read_elsewhere(
    folder, name, code, tmp_path, tiny_profile, monkeypatch
):
    monkeypatch.setenv("LAVIC_RESULTS", str(tmp_path))
    path = save(folder / "00_a.ipynb", "kept = 1", "cost = 'hours'\nassert False")
    nb = nbformat.read(path, 4)
    nb.cells[-1].metadata["tags"] = [nbs.SOLUTION, "hide-cell"]
    path.write_text(nbformat.writes(nb), encoding="utf-8")
    assert reproduce(tiny_profile if name == "tiny" else name) == code
    if name == "tiny":
        cells = nbformat.read(tmp_path / "tiny" / "seed5" / path.name, 4).cells
        assert cells[-1].source == "# cost = 'hours'\n# assert False"


def test_training_that_does_not_fit_the_card_is_refused_before_anything_runs(
    folder, tmp_path, tiny_profile, results, monkeypatch
):
    from lavic_utils.__main__ import _refuse
    from lavic_utils.bench import plan

    asked = []

    def refuse(profile: Profile, stages: Sequence[str]) -> None:
        asked.extend(stages)
        if "recommendation" in stages:
            raise UserError("does not fit")

    monkeypatch.setattr(plan, "refuse_here", refuse)
    save(folder / "00_a.ipynb", "1")
    save(folder / "02_b.ipynb", "1", per_seed=True)
    with pytest.raises(UserError, match="does not fit"):
        reproduce(tiny_profile)
    assert not list(results.rglob("*.ipynb"))
    assert reproduce(tiny_profile, only=["0"]) == 0  # control: this one trains nothing
    for method, stages in (
        ("BM25", []),
        ("GPT-4o (title)", []),
        ("LLaVA-v1.6 (title)", ["inference"]),
        ("LLaVA-v1.6 (title+image)", ["entire tokens, answers"]),
        ("Entire tokens (5x577)", ["entire tokens, training", "entire tokens, answers"]),
        ("LaViC w/o images", ["recommendation", "inference"]),
        ("LaViC", ["teacher", "distillation", "recommendation", "inference"]),
    ):
        asked.clear()
        try:
            _refuse(str(tiny_profile), method)
        except UserError:
            assert "LaViC" in method
        assert asked == stages
