"""Arms that are trained side by side, with one thread each, are those of one after another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lavic_utils.config import UserError, load_profile
from lavic_utils.experiment import Experiment
from lavic_utils.mini import side_by_side

ARMS, DOMAINS = ("LaViC w/o images", "LaViC w/o self-distillation"), ("home",)


@pytest.fixture(scope="module")
def profile():
    given = load_profile("mini").model_dump(mode="json") | {"name": "small"}
    given["world"] |= {
        "image_side": 48,
        "train_shards": 1,
        "shard_items": 64,
        "stage1_valid_items": 20,
        "train_dialogues": 32,
        "valid_dialogues": 5,
        "test_dialogues": 6,
        "p_extra_image": 0.0,
    }
    return load_profile("mini").model_validate(given)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """`place(name)`: results and world below tmp_path/name."""

    def at(name: str) -> Path:
        monkeypatch.setenv("LAVIC_RESULTS", str(tmp_path / name))
        monkeypatch.setenv("LAVIC_WORLD", str(tmp_path / "world"))
        return tmp_path / name

    return at


def adapters(run: Experiment) -> dict[str, torch.Tensor]:
    found = {}
    for arm in ARMS:
        file = run.tuned_folder(arm, "home") / "adapter" / "adapter_model.safetensors"
        found |= {f"{arm}/{name}": tensor for name, tensor in load_file(file).items()}
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_adapters_and_answers_are_those_of_one_after_another(profile, place, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found, popen = {}, side_by_side.subprocess.Popen
    for how in ("together", "in turn"):
        place(how)
        run = Experiment(profile).prepare()
        if how == "together":
            side_by_side.answer(run, ARMS, DOMAINS)
            monkeypatch.setattr(run, "model", pytest.fail)  # nothing is left to train or to ask
        rows = {arm: run.answers(arm, "home") for arm in ARMS}
        found[how] = adapters(run), rows
        monkeypatch.setattr(side_by_side.subprocess, "Popen", never)
        side_by_side.answer(run, ARMS, DOMAINS)  # all are there: no process
        monkeypatch.setattr(side_by_side.subprocess, "Popen", popen)
    assert same(found["together"][0], found["in turn"][0])
    assert found["together"][1] == found["in turn"][1]
    changed = {name: tensor.roll(1, 0) for name, tensor in found["in turn"][0].items()}
    assert not same(found["together"][0], changed)  # control


def never(*given, **how):
    pytest.fail("a process was started")


def test_where_it_is_left_to_the_caller(profile, place, monkeypatch, tmp_path):
    place("left")
    monkeypatch.setattr(side_by_side.subprocess, "Popen", never)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    side_by_side.answer(Experiment(profile).prepare(), ARMS[:1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for given in ({"force": True}, {"data_folder": tmp_path}):
        side_by_side.answer(Experiment(profile, **given), ARMS[:1])
    side_by_side.answer(Experiment("t4"), ARMS[:1])
    with pytest.raises(pytest.fail.Exception):  # control: two threads and nothing else would start
        side_by_side.answer(Experiment(profile).prepare(), ARMS[:1])


def test_a_failed_arm_is_said_by_the_call_that_needs_it(profile, place, monkeypatch):
    place("failed")
    run = Experiment(profile).prepare()
    run.tuned_folder(ARMS[0], "home").parent.mkdir(parents=True)
    run.tuned_folder(ARMS[0], "home").write_text("no folder")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    side_by_side.answer(run, ARMS[:1], DOMAINS)
    with pytest.raises((UserError, OSError)):
        run.answers(ARMS[0], "home")
