"""Keeping results: what a stage's key holds, what an edit costs, negative controls, and tables."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import lavic_utils
from lavic_utils import (
    distillation,
    experiment,
    keeping,
    provenance,
    recommendation,
    report,
    training,
    vision,
)
from lavic_utils.config import UserError, World, load_profile
from lavic_utils.data import image_file
from lavic_utils.demo import ask
from lavic_utils.evaluation import score
from lavic_utils.mini.world import make_world

CODE = {"store": "old"}
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setenv("LAVIC_RESULTS", str(tmp_path))
    monkeypatch.setattr(experiment.Experiment, "data_hash", "steady")
    monkeypatch.setattr(experiment.data, "data_hash", lambda root: "steady")
    monkeypatch.setattr(keeping, "code_of", lambda module: dict(CODE))
    monkeypatch.setitem(CODE, "store", "old")
    return experiment.Experiment("mini", 42)


def ended(processes: list) -> list[int]:
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


class Maker:
    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> dict:
        self.made += 1
        return {"n": self.made}


def stage(run, folder, make, **reads) -> int:
    return run.stage("x", folder / "stage", "store", reads, make)["n"]


def test_a_result_is_made_once_and_again_when_something_it_reads_changes(run, tmp_path):
    make = Maker()
    assert stage(run, tmp_path, make, learning_rate=1) == 1
    assert stage(run, tmp_path, make, learning_rate=1) == 1
    assert stage(run, tmp_path, make, learning_rate=2) == 2
    stored = json.loads((tmp_path / "stage" / "result.json").read_text())
    assert {"code_hash", "data_hash", "seed", "versions", "time"} <= set(stored["provenance"])
    assert stored["seconds"] < 60 and stored["made_by"]["code"] == CODE


def test_a_result_that_is_made_again_moves_the_old_one_aside(run, tmp_path):
    make = Maker()
    stage(run, tmp_path, make, learning_rate=1)
    (tmp_path / "stage" / "adapter").mkdir()
    (tmp_path / "stage" / "adapter" / "weights").write_text("hours of work")
    stage(run, tmp_path, make, learning_rate=2)
    stage(run, tmp_path, make, learning_rate=3)
    assert (tmp_path / "stage.replaced-1" / "adapter" / "weights").read_text() == "hours of work"
    assert json.loads((tmp_path / "stage.replaced-2" / "result.json").read_text())["result"] == {
        "n": 2
    }


def test_changed_code_remakes_what_was_quick_and_keeps_what_was_long(
    run, tmp_path, monkeypatch, capsys
):
    make = Maker()
    stage(run, tmp_path, make)
    monkeypatch.setitem(CODE, "store", "new")
    assert stage(run, tmp_path, make) == 2  # seconds of work: the edit is seen
    path = tmp_path / "stage" / "result.json"
    stored = provenance.kept(path)
    provenance.write_kept(path, {**stored, "seconds": 90 * 3600.0})
    assert stage(run, tmp_path, make) == 2 and capsys.readouterr().out == ""  # nothing changed
    monkeypatch.setitem(CODE, "store", "newer")
    assert stage(run, tmp_path, make) == 2  # 90 hours: kept
    said = capsys.readouterr().out
    assert said == (
        "stage: kept (90.0 h of work), though store changed since; `run --force` makes it again\n"
    )
    forced = experiment.Experiment("mini", 42, force=True)
    assert stage(forced, tmp_path, make) == 3 and stage(forced, tmp_path, make) == 3
    assert stage(run, tmp_path, make, learning_rate=2) == 4  # another input is another stage


def test_checkpoints_are_gone_on_from_by_the_same_stage_and_never_deleted(run, tmp_path):
    folder = tmp_path / "stage"

    def killed() -> dict:
        (folder / "checkpoints" / "checkpoint-1").mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stage(run, tmp_path, killed, seed=1)
        assert (folder / "checkpoints" / "checkpoint-1").is_dir()
        assert not (folder / "result.json").exists()
    make = Maker()
    stage(run, tmp_path, make, seed=2)  # another stage begins with none, and takes none away
    assert not (folder / "checkpoints").exists()
    assert (tmp_path / "stage.replaced-1" / "checkpoints" / "checkpoint-1").is_dir()


def test_only_settings_that_can_change_a_result_are_in_its_key():
    profile = load_profile("mini")
    for stage_name, only_speed in (
        ("distillation", ("eval_batch_size", "teacher_batch_size", "keep_pixels", "workers")),
        ("recommendation", ("eval_batch_size", "save_minutes")),
    ):
        settings = getattr(profile, stage_name)
        for name in only_speed:
            changed = settings.model_copy(update={name: 3})
            assert changed.deciding() == settings.deciding()
        for name in ("learning_rate", "batch_size", "max_length"):
            changed = settings.model_copy(update={name: 3})
            assert changed.deciding() != settings.deciding()


def test_comments_and_docstrings_are_no_code_and_a_changed_constant_is():
    code = '"""Doc."""\nX = 1  # one\n\n\ndef f():\n    """Say."""\n    return "# no comment"\n'
    edited = '"""Other."""\n# more\nX = 1\ndef f():\n    """Tell."""\n    return "# no comment"\n'
    assert provenance.plain_code(code) == provenance.plain_code(edited)
    assert "# no comment" in provenance.plain_code(code)
    assert provenance.plain_code(code) != provenance.plain_code(code.replace("X = 1", "X = 2"))


def test_a_stages_code_is_what_it_imports_and_nothing_else():
    found = provenance.code_of("distillation")
    assert {"distillation", "training", "vision", "prompts", "data"} <= set(found)
    assert not {"recommendation", "figures", "report", "experiment"} & set(found)
    assert not any(name.startswith(("remote", "bench", "demo")) for name in found)


def test_a_picture_replaced_or_removed_is_another_input_and_an_unlisted_file_is_not(run, tmp_path):
    folder = tmp_path / "train_images"
    folder.mkdir()
    paths = [folder / f"B00000000{i}_0.jpg" for i in range(3)]
    for shade, path in enumerate(paths):
        Image.new("RGB", (20, 20), (shade, 0, 0)).save(path)
    paths[2].write_bytes(b"no picture")
    first = run.scan(paths)
    assert first[paths[0]] and first[paths[2]] is None
    again = experiment.Experiment("mini", 42)  # another process: the scan is kept
    (folder / "unlisted.jpg").write_bytes(b"x")
    assert again.scan(paths) == first
    Image.new("RGB", (20, 20), (9, 9, 9)).save(paths[0])
    paths[1].unlink()
    changed = run.scan(paths)
    assert changed[paths[0]] not in (None, first[paths[0]]) and changed[paths[1]] is None
    # of the same size and time, as archives with fixed times leave it
    same, old = tmp_path / "new.jpg", paths[0].stat()
    Image.new("RGB", (20, 20), (200, 0, 0)).save(same)
    same.write_bytes(same.read_bytes().ljust(old.st_size + 64, b"\0"))
    paths[0].write_bytes(paths[0].read_bytes().ljust(old.st_size + 64, b"\0"))
    changed, old = run.scan(paths), paths[0].stat()
    same.write_bytes(same.read_bytes()[: old.st_size])
    os.utime(same, ns=(old.st_atime_ns, old.st_mtime_ns))
    same.rename(paths[0])
    assert paths[0].stat().st_size == old.st_size
    assert run.scan(paths)[paths[0]] not in (None, changed[paths[0]])


def test_without_the_mini_world_one_line_says_what_to_do(run, monkeypatch, tmp_path):
    monkeypatch.setenv("LAVIC_WORLD", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="call prepare"):
        _ = experiment.Experiment("mini").root


def test_negative_controls_change_every_item():
    visual = {f"B00000000{i}": torch.full((3, 4), float(i + 1)) for i in range(7)}
    kinds = {a: "lamp" if i % 3 else "shoe" for i, a in enumerate(visual)}
    swapped, empty = experiment.shuffled(visual, kinds), experiment.zeroed(visual)
    assert all(not torch.equal(swapped[a], visual[a]) for a in visual)
    of = {tokens[0, 0].item(): kinds[a] for a, tokens in visual.items()}
    assert all(of[tokens[0, 0].item()] == kinds[a] for a, tokens in swapped.items())
    assert sorted(t[0, 0].item() for t in swapped.values()) == sorted(
        t[0, 0].item() for t in visual.values()
    )
    assert all(t.abs().sum() == 0 and t.shape == (3, 4) for t in empty.values())


def test_a_comparison_says_what_was_not_run():
    found = score(["B000000001"], [["B000000001"]], [["B000000001"]]).row("LaViC", "home", 42)
    metrics = {"provenance": {"tier": "mini run"}, "rows": [found]}
    table = report.comparison(metrics, "ablation")
    assert table.loc["LaViC", ("home", "mini run")].startswith("1.000 [")
    assert table.loc["LaViC", ("beauty", "mini run")] == "not run here"
    assert table.loc["LaViC", ("home", "published")] == "0.3197 / 0.989"
    assert table.loc["Entire tokens (5x577)", ("home", "published")] == "a.o.m."


def test_metrics_replace_keep_and_drop(tmp_path, tiny_profile, monkeypatch, capsys):
    path = tmp_path / "metrics.json"
    about = provenance.provenance(load_profile(str(tiny_profile)), 5, "data")
    row = dict.fromkeys(report.ROW_FIELDS, 1) | {"method": "m", "domain": "home", "seed": 5}
    report.upsert_metrics(path, [row, row | {"domain": "beauty"}], about)
    out = report.upsert_metrics(path, [row | {"seed": 6, "extra": 2}, row | {"hits": 7}], about)
    assert [(r["domain"], r["seed"], r["hits"]) for r in out["rows"]] == [
        ("beauty", 5, 1),
        ("home", 5, 7),
        ("home", 6, 1),
    ]
    assert out["provenance"]["seeds"] == [5, 6]
    out = report.upsert_metrics(path, [row], about | {"numbers_hash": "new"})
    assert len(out["rows"]) == 1  # rows of other code are not mixed with these
    with pytest.raises(KeyError, match="ci95"):
        report.upsert_metrics(path, [{k: v for k, v in row.items() if k != "ci95"}], about)
    assert not path.exists()  # the committed file is written by `notebooks execute` alone
    monkeypatch.setenv("LAVIC_COMMIT", "1")
    out = report.upsert_metrics(path, [row | {"seed": 7}], about | {"numbers_hash": "new"})
    assert report.read_metrics(path) == out == report.read_metrics(report.newest(path))
    report.newest(path).write_text(path.read_text().replace('"hits": 1', '"hits": 9'))
    with pytest.raises(UserError, match="metrics.own.json: not there, or damaged"):
        report.read_metrics(report.newest(path))
    assert len(report.upsert_metrics(path, [row], about)["rows"]) == 1  # the damaged are not kept
    assert "metrics.own.json: damaged, so not used" in capsys.readouterr().out


def test_no_row_is_lost_when_processes_write_at_once(tmp_path):
    path, about = tmp_path / "metrics.json", {"numbers_hash": "n", "data_hash": "d"}
    row = dict.fromkeys(report.ROW_FIELDS, 1) | {"domain": "home"}

    def write(name: str) -> None:
        for seed in range(8):
            report.upsert_metrics(path, [row | {"method": name, "seed": seed}], about)

    each = [FORK.Process(target=write, args=(name,)) for name in "abc"]
    assert ended(each) == [0, 0, 0]
    assert len(report.read_metrics(report.newest(path))["rows"]) == 24


def test_a_stage_is_made_by_one_process_and_the_other_waits_for_it(run, tmp_path, capfd):
    def make() -> dict:
        with open(tmp_path / "made", "a") as file:
            file.write("once\n")
        time.sleep(1)
        return {"n": 1}

    def work() -> None:
        assert stage(run, tmp_path, make) == 1

    assert ended([FORK.Process(target=work) for _ in range(2)]) == [0, 0]
    assert (tmp_path / "made").read_text() == "once\n"
    assert "stage: another process works on it; waiting" in capfd.readouterr().out


@pytest.mark.parametrize("kind", ["cut", "empty", "list", "bytes", "id", "zeroed", "alpha", "gone"])
def test_a_damaged_result_is_said_and_made_again(run, tmp_path, kind, capsys):
    folder, made = tmp_path / "stage", []

    def make() -> dict:
        made.append(1)
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
        (folder / "adapter" / "adapter_config.json").write_text(
            '{"lora_alpha": 32, "base_model_name_or_path": "base"}'
        )
        return {"n": 1, "rows": [{"id": "B000000001"}]}

    for _ in range(2):
        assert stage(run, tmp_path, make) == 1 and made == [1]
    path, adapter = folder / "result.json", folder / "adapter"
    text = path.read_text()
    {
        "cut": lambda: path.write_text(text[:200]),
        "empty": lambda: path.write_text(""),
        "list": lambda: path.write_text("[]"),
        "bytes": lambda: path.write_bytes(b"\xff" + text.encode()),
        "id": lambda: path.write_text(text.replace("B000000001", "B000000002")),
        "zeroed": lambda: (adapter / "adapter_model.safetensors").write_bytes(bytes(7)),
        "alpha": lambda: (adapter / "adapter_config.json").write_text('{"lora_alpha": 64}'),
        "gone": lambda: (adapter / "adapter_model.safetensors").unlink(),
    }[kind]()
    capsys.readouterr()
    again = experiment.Experiment("mini", 42)
    assert stage(again, tmp_path, make) == 1 and made == [1, 1]
    assert "stage/result.json: damaged, so not used\n" in capsys.readouterr().out
    assert (tmp_path / "stage.replaced-1").is_dir()  # nothing is deleted
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"another's")
    with pytest.raises(UserError, match="another process has made this stage anew"):
        again.adapter(folder)


@pytest.mark.parametrize("rank", [("1", "1"), ("abc", "2"), ("0", ""), ("-1", "2")])
def test_a_rank_left_over_in_the_shell_is_one_line(rank, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="unset both"):  # a launch sets more than these two
        experiment.Experiment("mini")
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    assert experiment.Experiment("mini").rank == 1  # negative control
    for name, value in zip(("RANK", "WORLD_SIZE"), rank, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="unset both"):
        experiment.Experiment("mini")


def test_rows_of_other_worlds_stay_and_rows_of_other_data_do_not(tmp_path, tiny_profile):
    path, tiny = tmp_path / "metrics.json", load_profile(str(tiny_profile))
    mini = load_profile("mini")
    row = dict.fromkeys(report.ROW_FIELDS, 1) | {"method": "m", "domain": "home"}
    seeds = {}
    for profile in (tiny, mini):  # real data, then worlds
        for seed, data in ((5, "one"), (6, "other")):
            about = provenance.provenance(profile, seed, data)
            out = report.upsert_metrics(path, [row | {"seed": seed}], about)
        seeds[profile.name] = out["provenance"]["seeds"]
    assert seeds == {"tiny": [6], "mini": [5, 6]}
    mine = provenance.provenance(mini, 5, "one") | {"world": None}  # --data FOLDER
    assert not report._same_state(out["provenance"], mine)


def test_a_seed_changes_world_and_training(run):
    other = run.of_seed(43)
    assert run.profile.world.of(43).seed == run.profile.world.of(42).seed + 1
    places = {provenance.world_dir(run.profile, seed).name for seed in (42, 43)}
    assert places == {"seed42", "seed43"} and other.of_data != run.of_data
    fixed = experiment.Experiment("mini", 43, Path("folder"))  # data of one's own: every seed's
    assert fixed.of_data == fixed.place != fixed.folder


def test_tests_take_the_worlds_of_all_seeds_together_and_the_same_data_once():
    def seed(own: str) -> SimpleNamespace:
        def hits(method, domain, reading):
            return [method == "LaViC" or i % 2 == 0 for i in range(16)]

        targets = [f"{own}{i}" for i in range(16)]
        return SimpleNamespace(hits=hits, targets=lambda domain: targets)

    one = report.paired([seed("a")], ["other"]).loc[("home", "other")]
    two = report.paired([seed("a"), seed("b")], ["other"]).loc[("home", "other")]
    same = report.paired([seed("a"), seed("a")], ["other"]).loc[("home", "other")]
    assert (one["n"], one["items"], one["only mine"], one["p"]) == (16, 16, 8, 2 / 2**8)
    assert (two["n"], two["items"], two["only mine"], two["p"]) == (32, 32, 16, 2 / 2**16)
    assert (same["n"], same["items"], same["p"]) == (32, 16, one["p"])  # nothing was learnt


def test_an_arm_may_have_settings_of_its_own_and_nothing_else(tmp_path):
    text = (lavic_utils.config.PACKAGE / "profiles" / "mini.yaml").read_text(encoding="utf-8")
    text, path = text.partition("\narms:")[0], tmp_path / "own.yaml"  # without mini's own
    path.write_text(text + "\narms:\n  LaViC w/o images: {learning_rate: 0.5}\n")
    profile = load_profile(str(path))
    assert profile.arm("LaViC w/o images").recommendation.learning_rate == 0.5
    assert profile.arm("LaViC") == profile
    for arm, wrong in (
        ("LaViC: {learning_rate: -1}", "LaViC, learning_rate: Input should be greater than 0"),
        ("LaViC: {rate: 1}", "LaViC, rate: Extra inputs are not permitted"),
    ):
        path.write_text(text + f"\narms:\n  {arm}\n")
        with pytest.raises(UserError, match=wrong):
            load_profile(str(path))
    for name, wrong in (("LaVic", "write 'LaViC', not 'LaVic'"), ("Lavik", "no method 'Lavik'")):
        path.write_text(text + f"\narms:\n  {name}: {{learning_rate: 0.5}}\n")
        with pytest.raises(UserError, match=wrong):
            experiment.Experiment(str(path))


def test_what_loses_pictures_bears_a_footnote():
    found = score(["B000000001"], [["B000000001"]], [["B000000001"]]).row("LaViC", "home", 42)
    entire = found | {"method": "Entire tokens (5x577)", "dropped_images": 6.9}
    metrics = {"provenance": {"tier": "mini run"}, "rows": [found, entire]}
    table = report.comparison(metrics, "ablation")["home", "mini run"]
    assert table["Entire tokens (5x577)"].endswith(" †") and "†" not in table["LaViC"]
    assert "† Entire tokens (5x577): ten pictures do not fit" in report.footnote(metrics)
    assert report.footnote({"rows": [found]}) == ""


def test_bad_profiles_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="mini, paper, t4"):
        load_profile("nano")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: tiny", "name: /somewhere", "field name"),
        ("name: tiny", "name: ../../x", "field name"),
        ("tier: mini run", "tier: paper", "field tier"),
        ("seed: 5", "seed: 5\nseed: 6", "seed stands twice"),
        ("seed: 5", f"seed: {10**20}", "field seed"),
        ("seed: 5", "seed: 2020-99-99", "ValueError"),
        ("seed: 5", "seed: !!int abc", "ValueError"),
        ("seed: 5", "seed: !!timestamp abc", "AttributeError"),
        ("seed: 5", "seed: " + "[" * 5000, "RecursionError"),
        ("seed: 5", "seed: 5 \x80", "UnicodeDecodeError"),
        ("model: none", 'model: "a\\0b"', "field model"),
        ("max_length: 32", f"max_length: {10**30}", "field distillation.max_length"),
        ("epochs: 1", "epochs: true", "field distillation.epochs"),
        ("name: tiny", f"name: tiny\nworld: {{image_side: {10**9}}}", "field world.image_side"),
        ("name: tiny", f"name: tiny\nworld: {{missing_images: {10**30}}}", "field world.missing"),
        ("max_length: 32", "max_length: 15", "field distillation.max_length"),
        ("max_new_tokens: 8", "max_new_tokens: 3", "field distillation.max_new_tokens"),
        ("seed: 5", "seed: yes", "field seed"),
        ("learning_rate: 0.1", "learning_rate: on", "field distillation.learning_rate"),
        ("name: tiny", "name: tiny\nworld: {shard_items: 5}", "field world.shard_items"),
        ("name: tiny", "name: tiny\nworld: {missing_images: 300}", "field world.missing"),
        ('answer: "{id}"', 'answer: "\\ud800{id}"', "field prompts.answer"),
        ("seed: 5", 'seed: 5\n"a\\0b": 1', r"field 'a.x00b'"),
        ("learning_rate: 0.1", "learning_rate: .inf", "field distillation.learning_rate"),
        ("learning_rate: 0.1", "learning_rate: .nan", "field distillation.learning_rate"),
        (
            "eval_batch_size: 1}",
            "eval_batch_size: 1, save_minutes: 0}",
            "field recomm.*save_minutes",
        ),
        (
            "training_items_only: true",
            "training_items_only: true, images_per_item: -1",
            "field distill.*images_per_item",
        ),
        (
            "training_items_only: true",
            "training_items_only: true, schedule: nosuch",
            "field distillation.schedule",
        ),
        ('answer: "{id}"', 'answer: "no"', "field prompts.answer: {id} must"),
        ('answer: "{id}"', 'answer: "{id} {nosuch}"', "field prompts.answer"),
        ('answer: "{id}"', 'answer: "{id} {"', "field prompts.answer"),
        ('answer: "{id}"', 'answer: "{id!r}{id}"', "field prompts.answer"),
        ("{id}{title}{image}", "{id}{title}", "field prompts.candidate"),
    ],
)
def test_a_bad_profile_is_refused_by_field_when_it_is_read(old, new, said, tiny_profile):
    assert load_profile(str(tiny_profile)).name == "tiny"
    text = tiny_profile.read_text().replace(old, new, 1)
    tiny_profile.write_bytes(text.replace("\x80", "\udc80").encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=said) as error:
        load_profile(str(tiny_profile))
    assert "\n" not in str(error.value) and str(error.value).endswith("; correct the file")


def test_numbers_as_people_write_them_are_read(tiny_profile):
    text = tiny_profile.read_text()
    for written in ("1e-4", "0.0001", "1.0e-4"):  # the first is a text to YAML
        tiny_profile.write_text(text.replace("learning_rate: 0.1", f"learning_rate: {written}", 1))
        assert load_profile(str(tiny_profile)).distillation.learning_rate == 1e-4


def test_a_profile_of_many_keys_or_bytes_is_refused_at_once(tiny_profile):
    text, start = tiny_profile.read_text(), time.monotonic()
    tiny_profile.write_text(text + "models: {" + ", ".join(f"m{i}: x" for i in range(9000)) + "}")
    with pytest.raises(UserError, match="write|no method"):
        experiment.Experiment(str(tiny_profile))
    tiny_profile.write_text(text + "# " + "x" * 10**6)
    with pytest.raises(UserError, match="over 200000 bytes, so no profile"):
        load_profile(str(tiny_profile))
    assert time.monotonic() - start < 30


# ---------------------------------------------------------------- a request of one's own
TINY = World(
    train_shards=1,
    shard_items=64,
    stage1_valid_items=10,
    train_dialogues=4,
    valid_dialogues=2,
    test_dialogues=6,
    missing_images=0,
    corrupt_images=0,
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """[(id, title, image file)] of a tiny world, and random adapters in place of trained ones."""
    folder, patch = tmp_path_factory.mktemp("shop"), pytest.MonkeyPatch()
    patch.setenv("LAVIC_RESULTS", str(folder / "results"))
    patch.setenv("LAVIC_WORLD", str(folder))
    made = []
    patch.setattr(experiment.Experiment, "tune", lambda *asked: made.append(asked[1:]))
    root = make_world(folder / "mini" / "seed42", TINY)
    patch.setattr(experiment.Experiment, "prepare", lambda run: run)
    run = experiment.Experiment("mini")
    places = {distillation.VISION_LINEAR: run.folder / "stage1"}
    places[recommendation.LANGUAGE_LINEAR] = run.tuned_folder("LaViC", "beauty")
    for seed, (target, place) in enumerate(places.items()):
        torch.manual_seed(seed)
        tuned = training.add_adapter(run.model(), run.profile.recommendation.lora, target)
        for name, weights in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weights, std=0.05)
        training.save_adapter(tuned, place / "adapter")
    asins, titles = run.domain_catalogue("beauty")
    items = [(a, t, image_file(root, a)) for a, t in zip(asins, titles, strict=True)][:10]
    ask._trained.cache_clear()
    yield run, items, made
    patch.undo()
    ask._trained.cache_clear()


def test_a_request_of_ones_own_is_answered_in_one_line(shop):
    _, items, made = shop
    found = lavic_utils.recommend("i want a rustic mug.", items)
    assert sorted(name for name, _ in found) == sorted(name for name, _, _ in items)
    shares = [share for _, share in found]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=1e-3)
    turns = [("seeker", "i want a rustic mug.")]
    opened = [(name, title, Image.open(path)) for name, title, path in items]
    assert lavic_utils.recommend(turns, opened) == found
    assert made == [("LaViC", "beauty")]  # the models are kept between calls
    assert [name for name, _ in lavic_utils.recommend(turns, items[:1])] == [items[0][0]]


def test_a_request_is_answered_by_both_adapters_and_by_the_pictures_shown(shop):
    run, items, _ = shop
    turns = [("seeker", "i want a rustic mug."), ("helper", "red or blue?")]
    found = dict(lavic_utils.recommend(turns, items))
    student = distillation.load_student(run.model(), run.folder / "stage1")
    vectors = vision.file_encoder(student, run.processor)([path for _, _, path in items])
    names = [name for name, _, _ in items]
    visual = dict(zip(names, vectors, strict=True))
    folder = run.tuned_folder("LaViC", "beauty") / "adapter"
    plain = training.load_adapter(run.model(), folder)
    asked = [SimpleNamespace(turns=turns, ten=names)]
    prompter = run.prompter(visual)
    wanted = recommendation.generate_answers(plain, prompter, asked, "ten")[0].probabilities
    assert [found[name] for name in names] == pytest.approx(wanted, abs=1e-4)
    # negative controls: other pictures, none, and other words are other questions
    (a, one, first), (b, two, second), *rest = items
    swapped = dict(lavic_utils.recommend(turns, [(a, one, second), (b, two, first), *rest]))
    blind = dict(lavic_utils.recommend(turns, [(name, title, None) for name, title, _ in items]))
    assert found != swapped != blind and dict(lavic_utils.recommend(turns[:1], items)) != found
    assert dict(lavic_utils.recommend(turns, items)) == found


def test_ids_and_capitals_of_ones_own_are_read_as_the_models(shop):
    run, items, _ = shop
    few = items[:2]
    named = [(f"item{i}", title, path) for i, (_, title, path) in enumerate(few)]
    catalogue = run.domain_catalogue("beauty")[0]
    same = [(asin, title, path) for asin, (_, title, path) in zip(catalogue, few, strict=False)]
    found = dict(lavic_utils.recommend("i want a rustic mug.", named))
    wanted = dict(lavic_utils.recommend("i want a rustic mug.", same))
    assert list(found.values()) == pytest.approx(list(wanted.values()))
    assert found["item0"] == pytest.approx(wanted[catalogue[0]])
    assert found == dict(lavic_utils.recommend("I want a RUSTIC mug.", named))
    (_, one, first), (_, two, second) = few  # negative control: other pictures, other shares
    swapped = dict(
        lavic_utils.recommend(
            "i want a rustic mug.", [("item0", one, second), ("item1", two, first)]
        )
    )
    assert swapped != found


def test_a_request_that_cannot_be_answered_is_one_line(shop, tmp_path, monkeypatch):
    _, items, _ = shop
    for candidates in ([], [items[0], items[0]]):
        with pytest.raises(UserError, match="at least one|each its own id"):
            lavic_utils.recommend("a mug", candidates)
    (tmp_path / "no.jpg").write_bytes(b"no picture")
    whole = items[0][2].read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    for image in (tmp_path / "no.jpg", tmp_path / "half.jpg", Image.open(tmp_path / "half.jpg")):
        with pytest.raises(UserError, match="B000000001: .* is no readable image"):
            lavic_utils.recommend("a mug", [("B000000001", "mug", image)])
    for bad in (None, 3, {"a": 1}, [("a", "b")], [("", "mug", None)], [(1, "mug", None)]):
        with pytest.raises(UserError, match="candidates: give"):
            lavic_utils.recommend("i want a mug.", bad)
    for image in (3, b"bytes", tmp_path / "nowhere.jpg", Image.new("RGB", (1, 1))):
        with pytest.raises(UserError, match="is no readable image|is not there") as caught:
            lavic_utils.recommend("i want a mug.", [("B000000001", "mug", image)])
        assert len(str(caught.value)) < 400
    for dialogue in (None, "", [3], ["hello"], [("seeker", 3)], [("seeker", None)]):
        with pytest.raises(UserError, match="dialogue: give a text"):
            lavic_utils.recommend(dialogue, items)
    for words in ("quantum zorp", "i want a zorp mug."):
        with pytest.raises(UserError, match="dialogue: the .* model cannot read .*zorp"):
            lavic_utils.recommend(words, items)
    with pytest.raises(UserError, match="candidate one: the .* model cannot read Zorp"):
        lavic_utils.recommend("i want a mug.", [("one", "Zorp", None)])
    with pytest.raises(UserError, match="dialogue: too long by"):
        lavic_utils.recommend("i want a mug. " * 200, items)
    for dialogue in ([], [("teacher", "a mug")]):
        with pytest.raises(UserError, match="dialogue: give a text"):
            lavic_utils.recommend(dialogue, items)
    with pytest.raises(UserError, match="no dialogues shoes"):
        lavic_utils.recommend("a mug", items, domain="shoes")
    monkeypatch.setenv("LAVIC_RESULTS", str(tmp_path))
    with pytest.raises(UserError, match="run LaViC --domain home --profile paper"):
        lavic_utils.recommend("a mug", items, "paper", "home")


# ---------------------------------------------------------------- the package's own names
def test_the_packages_help_reads_like_a_page_and_its_names_come_when_asked_for():
    code = "import lavic_utils as lavic; help(lavic)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "LaViC, a companion of the KDD 2025 paper" in done.stdout
    assert 'run = lavic.Experiment("mini").prepare()' in done.stdout
    for name in lavic_utils.__all__:
        assert callable(getattr(lavic_utils, name)) and name in dir(lavic_utils)
    code = "import sys, lavic_utils; assert 'torch' not in sys.modules; lavic_utils.cls_tokens"
    subprocess.run([sys.executable, "-c", code + "; assert 'torch' in sys.modules"], check=True)
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = lavic_utils.train
