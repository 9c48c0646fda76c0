"""`make bench`: equality before speed, and what each figure stands for. No clock is judged."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import readme
import torch
import yaml
from PIL import Image

from lavic_utils import data, vision
from lavic_utils.__main__ import main
from lavic_utils.bench import reference, speed
from lavic_utils.config import PACKAGE, ROOT
from lavic_utils.experiment import Experiment

REAL = data.open_image


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> str:
    """The mini profile with a very small world, its folders in a temporary place."""
    folder, patch = tmp_path_factory.mktemp("bench"), pytest.MonkeyPatch()
    settings = yaml.safe_load((PACKAGE / "profiles" / "mini.yaml").read_text(encoding="utf-8"))
    settings["world"] |= {
        "train_shards": 1,
        "shard_items": 64,
        "stage1_valid_items": 10,
        "train_dialogues": 12,
        "valid_dialogues": 3,
        "test_dialogues": 12,
    }
    settings["name"], settings["recommendation"]["batch_size"] = "small", 2
    (folder / "small.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    patch.setenv("LAVIC_RESULTS", str(folder / "results"))
    patch.setenv("LAVIC_WORLD", str(folder / "data"))
    yield str(folder / "small.yaml")
    patch.undo()


@pytest.fixture(scope="module")
def sample(profile) -> speed.Sample:
    made = speed.Sample(Experiment(profile).prepare(), count=9)
    assert len(made.pictures) == len(made.examples) == len(made.dialogues) == 9
    return made


def turned(path: Path) -> Image.Image | None:
    """Another item's image: the next file of the folder that can be read."""
    files = sorted(path.parent.glob("*_0.jpg"))
    return REAL(files[(files.index(path) + 1) % len(files)]) if path in files else None


# ---------------------------------------------------------------- equality
def test_the_direct_way_gives_the_same_losses_and_answers(sample):
    found = speed.equal(sample)
    assert found["equal_answers"] == 8 and set(found["losses"]) == {"stage 1", "stage 2"}


def test_swapped_images_stop_the_bench(sample, monkeypatch):
    monkeypatch.setattr(data, "open_image", turned)
    with pytest.raises(RuntimeError, match=r"stage 2: .*losses differ, nothing was measured"):
        speed.equal(sample)
    monkeypatch.setattr(speed, "TOLERANCE", 1e9)  # the answers alone notice it too
    with pytest.raises(RuntimeError, match=r"answers differ.*nothing was measured"):
        speed.equal(sample)


def test_a_swapped_image_stops_stage_1(sample, monkeypatch):
    pictures = sample.pictures
    wrong = [replace(pictures[0], path=pictures[1].path)]
    real = reference.description_loss
    swapped = lambda run, model, rows: real(run, model, wrong)  # noqa: E731
    monkeypatch.setattr(reference, "description_loss", swapped)
    with pytest.raises(RuntimeError, match=r"stage 1: .*losses differ, nothing was measured"):
        speed.equal(sample)


def test_the_direct_way_encodes_the_padding_and_ours_does_not(sample):
    seen = []
    hook = sample.model.model.vision_tower.embeddings.register_forward_pre_hook(
        lambda module, args: seen.append(len(args[0]))
    )
    wide = Image.effect_noise((144, 72), 50).convert("RGB")
    plain = reference.cls_of_five(sample.model, sample.run.processor, [wide])
    ours = vision.cls_tokens(sample.model, *vision.pixels(sample.run.processor, [wide]))
    hook.remove()
    assert seen == [5, 3] and len(plain[0]) == len(ours[0]) == 3
    assert torch.allclose(plain[0], ours[0], atol=1e-5)
    assert not torch.allclose(plain[0].flip(0), ours[0], atol=1e-3)


def test_direct_training_moves_the_right_side_alone(sample):
    run, one, two = sample.run, sample.run.model(), sample.run.model()
    reference.distil(run, one, sample.pictures[:2])
    reference.fine_tune(run, two, sample.examples[:1])
    for model, side, other in (
        (one, "vision_tower", "language_model"),
        (two, "language_model", "vision_tower"),
    ):
        named = [(name, p) for name, p in model.named_parameters() if "lora_B" in name]
        moved = {name for name, p in named if p.any()}
        assert any(side in name for name in moved) and not any(other in name for name in moved)


# ---------------------------------------------------------------- measuring
def test_sides_are_run_in_turn_and_compared_round_by_round(monkeypatch):
    seconds, order = iter([4, 1, 9, 1, 6, 3]), []
    monkeypatch.setattr(speed, "timed", lambda work, model: (work(model), next(seconds))[1])
    run = SimpleNamespace(model=iter("abcdef").__next__)
    sides = {
        "direct": (2, lambda model: order.append(f"direct, {model}")),
        "ours": (4, lambda model: order.append(f"ours, {model}")),
    }
    found = speed.compare(run, 3, sides)
    assert [step[:-3] for step in order] == ["direct", "ours"] * 3
    assert [step[-1] for step in order] == list("abcdef")  # a model of its own each time
    assert found["ratio"] == {"median": 8, "low": 4, "high": 18, "runs": [8, 18, 4]}
    assert found["a_second"]["ours"]["median"] == 4
    assert found["a_second"]["direct"]["low"] == pytest.approx(2 / 9, abs=1e-4)


IDLE, BUSY = "10000", "1"


@pytest.mark.parametrize(
    ("percent", "given", "expected"),
    [
        (5, {}, IDLE),
        (60, {}, BUSY),
        (5, {"GOMP_SPINCOUNT": BUSY}, IDLE),  # another process's choice, at another time
        (60, {"GOMP_SPINCOUNT": IDLE}, BUSY),
        (60, {"GOMP_SPINCOUNT": "7"}, "7"),
        (60, {"OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_threads_sleep_where_the_machine_is_busy_unless_the_user_says_how(percent, given, expected):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "OMP_"))} | given
    code = f"import os, sys, psutil; psutil.cpu_percent = lambda seconds: {percent}\n"
    code += "psutil.cpu_count = lambda: 2\nimport lavic_utils\n"
    code += "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [expected, "False"]  # before torch, or it would be too late


def test_the_busy_process_is_there_for_half_of_the_turns_and_ends(monkeypatch):
    started, there = [], []
    real = subprocess.Popen

    def popen(command):
        started.append((command[-1], real(command)))
        return started[-1][1]

    def run(command, **how):
        assert command[1:] == ["-m", "lavic_utils.bench.speed", "mini", "240"]
        there.append(started[-1][0] != "" and started[-1][1].poll() is None)
        if len(there) == 4:
            raise RuntimeError("the work failed")
        return SimpleNamespace(stdout=f"a line of a library\n{len(there)}.0\n")

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(subprocess, "run", run)
    found = speed.busy_machine("mini", 240, 1)
    assert there == [False, True] and found["ratio"]["median"] == 2
    assert found["seconds"]["alone"]["runs"] == [1] and found["seconds"]["busy"]["runs"] == [2]
    with pytest.raises(RuntimeError, match="the work failed"):
        speed.busy_machine("mini", 240, 1)
    assert len(started) == 4 and all(process.poll() is not None for _, process in started)


# ---------------------------------------------------------------- the whole
def test_the_file_holds_what_the_readme_needs(profile, capsys, monkeypatch):
    monkeypatch.setitem(speed.QUICK, "count", 5)
    path = speed.bench(quick=True, name=profile)
    text = path.read_text(encoding="utf-8")
    found = json.loads(text)
    about, figures = found["provenance"], found["figures"]
    assert path.parent.name == "bench-quick" and "stage 2 training: " in capsys.readouterr().err
    parts = {"stage2_training", "evaluation", "stage1_training"}
    assert set(found["ratios"]) == {*parts, "busy_machine"}
    assert set(figures) == {"equality", "store", *found["ratios"]}
    for part, ratio in found["ratios"].items():
        spread = figures[part]["ratio"]
        assert spread["low"] <= spread["median"] == ratio <= spread["high"]
    for part in parts:
        for side in figures[part]["a_second"].values():
            assert len(side["runs"]) == about["rounds"]
    assert {"code_hash", "versions", "machine", "tier", "threads", "card"} <= set(about)
    assert f'"{platform.node()}"' not in text
    assert path == speed.result_file(about["machine"], quick=True)
    plate = path.with_suffix(".png")
    assert json.loads(Image.open(plate).text["Comment"])["tier"] == "mini run"
    block = readme.speed_block(path)
    assert f"](results/bench/{plate.name})" in block
    plate.unlink()  # without its figure the README shows none
    assert readme.speed_block(path) == re.sub(r"!\[.*\n\n", "", block)
    direct = figures["evaluation"]["a_second"]["direct"]["median"]
    assert f"| evaluation, dialogues a second | {direct:.3g} |" in block and "| 10 |" in block
    assert "Beside a busy process stage 2 training takes " in block
    assert "*mini run, profile small, " in block
    assert f"torch {torch.__version__.split('+')[0]}" in block


def test_counting_the_encoding_in_lowers_a_ratio(sample):
    speeds = {"direct": {"median": 1.0}, "ours": {"median": 4.0}}
    parts = {name: {"a_second": speeds} for name in ("stage2_training", "evaluation")}
    found = speed.encoding(sample, parts, most=16)
    for split in ("train", "test"):
        rows, items = found[split]["dialogues"], found[split]["items"]
        seconds = items / found["items_a_second"]["median"]
        expected = rows / (rows / 4 + seconds)
        assert found[split]["ratio_with_encoding"] == pytest.approx(expected, rel=1e-3)
        assert 0 < expected < 4 and rows == 3 * 12


def test_the_committed_files_are_read():
    paths = list((ROOT / "results" / "bench").glob("*-cores.json"))
    assert paths
    for path in paths:
        ratios = json.loads(path.read_text(encoding="utf-8"))["ratios"]
        assert all(f"| {ratios[part]:.3g} (" in readme.speed_block(path) for part in speed.PARTS)


def test_the_command_line(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(speed, "bench", lambda quick: calls.append(quick) or Path("x.json"))
    assert main(["bench", "--quick"]) == 0 and main(["bench"]) == 0
    assert calls == [True, False] and capsys.readouterr().out == "x.json\nx.json\n"
