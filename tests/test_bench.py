"""`make bench`: equality before speed, its structure, and what each figure stands for. No test here depends on a clock."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from lavic_utils import bench, bench_model, data, direct, growth, vision
from lavic_utils.__main__ import main
from lavic_utils.config import PACKAGE, UserError
from lavic_utils.distillation import Student
from lavic_utils.runs import Run


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> str:
    """The mini profile with a very small world, its folders in a temporary place."""
    folder, patch = tmp_path_factory.mktemp("bench"), pytest.MonkeyPatch()
    settings = yaml.safe_load((PACKAGE / "profiles" / "mini.yaml").read_text(encoding="utf-8"))
    settings["world"] |= {"train_shards": 1, "shard_items": 64, "stage1_valid_items": 10, "train_dialogues": 12,
                          "valid_dialogues": 3, "test_dialogues": 12}
    (folder / "small.yaml").write_text(yaml.safe_dump(settings | {"name": "small"}), encoding="utf-8")
    patch.setenv("LAVIC_RESULTS", str(folder / "results"))
    patch.setenv("LAVIC_WORLD", str(folder / "data"))
    yield str(folder / "small.yaml")
    patch.undo()


@pytest.fixture(scope="module")
def measured(profile) -> bench_model.Bench:
    made = bench_model.Bench(Run(profile), count=9, rounds=2)
    assert len(made.rows) == 9
    return made


def turned(path: Path) -> Image.Image | None:
    """Another item's image: the next file of the folder that can be read."""
    files = sorted(path.parent.glob("*_0.jpg"))
    return REAL(files[(files.index(path) + 1) % len(files)]) if path in files else None


REAL = data.open_image


# ---------------------------------------------------------------- equality
def test_the_direct_way_gives_the_same_losses_and_answers(measured):
    found = measured.equal()
    assert found["equal_answers"] == 8 and set(found["losses"]) == {"stage 1", "stage 2"}


def test_swapped_images_stop_the_bench(measured, monkeypatch):
    monkeypatch.setattr(data, "open_image", turned)
    with pytest.raises(RuntimeError, match="stage 2: our loss.*nothing was measured"):
        measured.equal()
    monkeypatch.setattr(math, "isclose", lambda *a, **k: True)  # the answers alone notice it too
    with pytest.raises(RuntimeError, match="answers differ.*nothing was measured"):
        measured.equal()


def test_a_swapped_image_changes_stage_1(measured):
    rows = [measured.rows[0], replace(measured.rows[0], path=measured.rows[1].path)]
    with torch.inference_mode():
        ours = float(Student(measured.model)(**measured.stage1_batch(rows[:1]))["loss"])
        plain, swapped = (float(direct.description_loss(measured.run, measured.model, [row])) for row in rows)
    assert ours == pytest.approx(plain, abs=1e-5) and ours != pytest.approx(swapped, abs=1e-3)


def test_the_direct_way_encodes_the_padding_and_ours_does_not(measured):
    seen = []
    hook = measured.model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    wide = Image.effect_noise((144, 72), 50).convert("RGB")
    plain = direct.cls_of_five(measured.model, measured.run.processor, [wide])
    ours = vision.cls_tokens(measured.model, *vision.pixels(measured.run.processor, [wide]))
    hook.remove()
    assert seen == [5, 3] and len(plain[0]) == len(ours[0]) == 3
    assert torch.allclose(plain[0], ours[0], atol=1e-5) and not torch.allclose(plain[0].flip(0), ours[0], atol=1e-3)


def test_direct_training_moves_the_right_side_alone(measured):
    for train, rows, side, other in (
            (lambda model, rows: direct.train_recommender(measured.run, model, measured.stored, rows), measured.examples[:1],
             "language_model", "vision_tower"),
            (lambda model, rows: direct.train_student(measured.run, model, rows), measured.rows[:2],
             "vision_tower", "language_model")):
        model = measured.run.model()
        train(model, rows)
        moved = {name for name, p in model.named_parameters() if "lora_B" in name and p.abs().sum() > 0}
        assert any(side in name for name in moved) and not any(other in name for name in moved)


# ---------------------------------------------------------------- measuring
def test_sides_are_run_in_turn_and_compared_round_by_round(monkeypatch):
    seconds, order = iter([4, 1, 9, 1, 6, 3]), []
    monkeypatch.setattr(bench_model, "timed", lambda work: (work(), next(seconds))[1])
    found = bench_model.compare({"direct": (2, lambda: lambda: order.append("direct")),
                                 "ours": (4, lambda: lambda: order.append("ours"))}, rounds=3)
    assert order == ["direct", "ours"] * 3
    assert found["ratio"] == {"median": 8, "low": 4, "high": 18, "runs": [8, 18, 4]}
    assert found["a_second"]["ours"]["median"] == 4 and found["a_second"]["direct"]["low"] == pytest.approx(2 / 9, abs=1e-4)


def test_peak_memory_is_what_tensors_take():
    x = torch.zeros(2**20)  # 4 MiB

    def chain() -> None:
        y = x + 1
        y = y + 1  # two at once, never three
        y = y + 1
    assert bench_model.peak_bytes(chain) == pytest.approx(2 * 2**22, abs=100)  # and a scalar or two
    assert bench_model.peak_bytes(lambda: [x + 1, x + 1, x + 1]) == pytest.approx(3 * 2**22, abs=100)


def test_entire_tokens_and_more_candidates_take_more_tokens_and_memory(measured):
    some = growth.series(measured, vision.cls_tokens, "candidates", (2, 4))
    entire = growth.series(measured, vision.full_tokens, "candidates", (2, 4))
    for name in ("prompt_tokens", "training_peak_mib"):
        assert some[0][name] < some[1][name] < entire[1][name] and some[0][name] < entire[0][name]
    longer = growth.series(measured, vision.cls_tokens, "words", (20, 60))
    assert 40 <= longer[1]["prompt_tokens"] - longer[0]["prompt_tokens"] <= 60  # a mark is a token of its own


# ---------------------------------------------------------------- the whole
def test_the_file_holds_what_the_readme_needs(profile, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "QUICK", bench.QUICK | {"candidates": (2, 3), "words": (5, 9), "catalogues": (10, 20)})
    path = bench.bench(quick=True, name=profile)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert path.parent.name == "bench-quick" and "stage2_training: " in capsys.readouterr().err
    assert set(found["ratios"]) == {"stage2_training", "evaluation", "stage1_training", "crawl"}
    for part, ratio in found["ratios"].items():
        figure = found["figures"][part]
        assert ratio == figure["ratio"]["median"] and figure["ratio"]["low"] <= ratio <= figure["ratio"]["high"]
        assert all(len(side["runs"]) == found["provenance"]["rounds"] for side in figure["a_second"].values())
    assert set(found["figures"]) == {"equality", *bench.PARTS} and found["figures"]["reproduce"] is None
    assert {"code_hash", "versions", "machine", "tier", "threads", "card"} <= set(found["provenance"])
    work = found["figures"]["work"]
    for stage in ("stage1_training", "stage2_training", "evaluation"):
        full = found["ratios"][stage] / work[stage]["share"]["float32"]
        assert found["figures"][stage]["ratio_at_full_rate"] == pytest.approx(full, rel=1e-3)
        assert work[stage]["flop"] > 1e6 and sum(work[stage]["time_by_operator"].values()) == pytest.approx(1, abs=0.01)
    host = platform.node()
    assert f'"{host}"' not in path.read_text(encoding="utf-8") and path.stem == bench.machine_name(found["provenance"]["machine"])
    with Image.open(path.with_suffix(".png")) as figure:
        assert "tier: mini run" in figure.text["Description"]
    block = bench.speed_block(path)
    assert f"| evaluation, dialogues a second | {found['figures']['evaluation']['a_second']['direct']['median']:.3g} |" in block
    assert "| 20 |" in block and "*mini run, profile small, " in block and f"torch {torch.__version__.split('+')[0]}" in block


def test_the_record_of_a_reproduction_is_taken_over(profile, monkeypatch):
    assert bench.reproduced(profile) is None
    record = {"01_x": {"seconds": 2.5}, "02_y": {"seconds": 4.0}}
    monkeypatch.setattr("lavic_utils.reproduce.read_run", lambda folder: record)
    found = bench.reproduced(profile)
    assert found == {"seconds": {"01_x": 2.5, "02_y": 4.0}, "total_seconds": 6.5, "up_to_date_seconds": None}


def test_the_command_line(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(bench, "bench", lambda quick, only: calls.append((quick, only)) or Path("x.json"))
    monkeypatch.setattr(bench, "crawl_speed", lambda: {"ratio": 30})
    assert main(["bench", "--quick", "--only", "crawl"]) == 0 and main(["bench"]) == 0
    assert calls == [(True, "crawl"), (False, None)]
    assert main(["bench", "crawl"]) == 0 and len(calls) == 2 and '"ratio": 30' in capsys.readouterr().out


def test_an_unknown_part_is_one_clear_line():
    with pytest.raises(UserError, match="--only speed: no such part; use one of stage2_training, evaluation"):
        bench.bench(only="speed")
