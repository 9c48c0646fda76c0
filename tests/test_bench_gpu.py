"""`bench gpu` on the mini configuration, without a card and without a clock: its file, its batches,
what runs out of memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import readme
import torch
from test_plan import Peak

from lavic_utils import recommendation as rec
from lavic_utils import training
from lavic_utils.__main__ import main
from lavic_utils.bench import card as bench_gpu
from lavic_utils.bench import memory
from lavic_utils.config import load_profile

PAPER, T4 = load_profile("paper"), load_profile("t4")


def small(profile):
    """The profile with the mini model and its lengths, one row at a time."""
    mini, update = load_profile("mini"), {}
    for name in (bench_gpu.ONE, bench_gpu.TWO):
        changed = {"batch_size": 1, "eval_batch_size": 1}
        changed["gradient_checkpointing"] = getattr(profile, name).gradient_checkpointing
        update[name] = getattr(mini, name).model_copy(update=changed)
    return profile.model_copy(update={"model": mini.model, "quantize_4bit": False, **update})


SMALL = small(PAPER)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in (("WARM", 0), ("REPEATS", 1)):
        monkeypatch.setattr(bench_gpu, name, value)


@pytest.fixture
def true_size():
    """The 7B model's configuration."""
    return memory.skeleton(PAPER.model_path).config


@pytest.fixture(scope="module")
def model():
    return bench_gpu.random_model(SMALL)


@pytest.fixture(scope="module")
def tuned(model):
    stage = rec.Recommender(model)
    return training.add_adapter(stage, SMALL.recommendation.lora, rec.LANGUAGE_LINEAR)


def named(profile, config, name: str) -> bench_gpu.Case:
    return next(case for case in bench_gpu.cases(profile, config) if case.name == name)


# ---------------------------------------------------------------- the file
@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAVIC_RESULTS", str(tmp_path_factory.mktemp("gpu")))
        patch.setattr(torch.cuda, "is_available", lambda: False)
        for name, value in (("WARM", 0), ("REPEATS", 1)):
            patch.setattr(bench_gpu, name, value)
        every = bench_gpu.cases
        patch.setattr(bench_gpu, "cases", lambda *a: every(*a)[::2])  # some of each stage
        return bench_gpu.measure_all(small(T4))


def test_the_file_says_what_it_is_and_has_every_row(written):
    found = json.loads(written.read_text(encoding="utf-8"))
    about = found["provenance"]
    assert about["tier"] == "random weights" and written.parent.name == "bench"
    assert written.name.endswith("-cores-t4-gpu.json")
    assert found["card"] is None and found["four_bits"] == "not asked for"
    assert [row["stage"] for row in found["steps"]] == ["distillation", *["recommendation"] * 3] + [
        "inference"
    ]
    for row in found["steps"]:
        assert row["predicted_gib"] > 0 and len(row["seconds"]["runs"]) == 1
        assert row["measured_gib"] is None  # no card


def test_the_readme_takes_it_without_taking_it_for_a_bench_file(written, tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert readme.speed() == "not measured yet\n"
    folder = tmp_path / "results" / "bench"
    folder.mkdir(parents=True)
    (folder / written.name).write_bytes(written.read_bytes())
    assert (
        "Random weights: speed and memory only. Profile t4" in readme.speed()
        and "| stage 2, [CLS], mean" in readme.speed()
    )
    found = json.loads(written.read_text(encoding="utf-8"))
    found["steps"][0]["seconds"] = None
    (folder / written.name).write_text(json.dumps(found), encoding="utf-8")
    assert "| out of memory | – |" in readme.speed()
    (folder / written.name).rename(
        folder / "other.json"
    )  # under another name it would be read as a bench file
    with pytest.raises(KeyError):
        readme.speed()


def test_without_a_card_it_is_one_clear_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LAVIC_RESULTS", str(tmp_path))
    assert main(["bench", "gpu", "--profile", "t4"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "no CUDA card is here" in said.err and not said.out
    assert not list(tmp_path.iterdir())
    calls = []
    monkeypatch.setattr(bench_gpu, "bench_gpu", lambda name: calls.append(name) or Path("x.json"))
    assert main(["bench", "gpu", "--profile", "t4"]) == 0 and main(["bench", "gpu"]) == 0
    assert calls == ["t4", "paper"]


# ---------------------------------------------------------------- what is measured
def test_cls_keeps_less_than_entire_tokens_and_checkpointing_less_than_none(tuned):
    peaks = {}
    for name in (
        "[CLS], mean prompt",
        "[CLS], mean prompt, no checkpointing",
        "entire tokens, mean prompt",
        "entire tokens, mean prompt, no checkpointing",
    ):
        case = named(SMALL, tuned.config, f"stage 2, {name}")
        with Peak() as peak:
            bench_gpu.train(tuned, SMALL, case, 1)
        peaks[name] = peak.most
    short, plain, entire, all_kept = peaks.values()
    assert short < plain and short < entire < all_kept and 2 * plain < all_kept
    assert not any(
        p.any() for name, p in tuned.named_parameters() if "lora_B" in name
    )  # the warm-up's first rate is 0
    bench_gpu.train(tuned, SMALL, named(SMALL, tuned.config, "stage 2, [CLS], mean prompt"), 2)
    moved = [name for name, p in tuned.named_parameters() if "lora_B" in name and p.any()]
    assert moved and all("language_model" in name for name in moved)  # the steps were real ones
    assert "_is_accelerate_prepared" not in tuned.__dict__  # else no autocast in the next case


def test_a_batch_is_what_the_stage_reads(model):
    case = named(SMALL, model.config, "stage 1, mean text")
    batch = bench_gpu.prompts(model.config, 2, case)
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == 2 * case.visual == 10
    assert ((batch["labels"] != -100).sum(1) == case.target).all() and batch["pixel_values"].shape[
        :2
    ] == (2, 5)
    entire = named(SMALL, model.config, "stage 2, entire tokens, mean prompt")
    cut = bench_gpu.prompts(model.config, 1, entire._replace(tokens=100))  # as halving makes it
    assert (
        len(cut["visual"][0])
        == int((cut["input_ids"] == model.config.image_token_id).sum())
        == 100 - entire.target - 1
    )


# ---------------------------------------------------------------- out of memory
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("simulated"), RuntimeError("a bug")])
def test_want_of_memory_is_a_row_and_another_error_is_not_taken_for_it(monkeypatch, error):
    def train(*_):
        raise error

    monkeypatch.setattr(bench_gpu, "train", train)
    case = bench_gpu.cases(SMALL, memory.skeleton(SMALL.model_path).config)[0]
    if isinstance(error, torch.OutOfMemoryError):
        found = bench_gpu.measure(None, SMALL, case)
        assert found["seconds"] is found["measured_gib"] is None and found["predicted_gib"] > 0
    else:
        with pytest.raises(RuntimeError, match="a bug"):
            bench_gpu.measure(None, SMALL, case)


# ---------------------------------------------------------------- at the true size
@pytest.mark.parametrize("profile", [PAPER, T4], ids=lambda p: p.name)
def test_what_is_foreseen_is_the_plans_own_figure(profile, true_size):
    plan = memory.memories(profile, cuda=False)
    for name, stage in (
        ("stage 1, longest text", "distillation"),
        ("stage 2, [CLS], longest prompt", "recommendation"),
        ("answers, longest prompt", "inference"),
    ):
        assert bench_gpu.predicted(profile, named(profile, true_size, name)) == plan[stage]["total"]
    entire = named(profile, true_size, "stage 2, entire tokens, mean prompt, no checkpointing")
    cls = named(profile, true_size, "stage 2, [CLS], mean prompt, no checkpointing")
    assert (entire.visual, cls.visual, cls.tokens) == (29_280, 50, 890)
    assert (
        bench_gpu.predicted(profile, entire) > 80 > bench_gpu.predicted(profile, cls)
    )  # the paper's out-of-memory row
