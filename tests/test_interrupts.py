"""kill -9 at random moments of both stages and of `run`: what comes out in the end is what an
undisturbed run gives, bit by bit.

`LAVIC_KILLS=10 python -m pytest tests/test_interrupts.py --timeout 0` kills each ten times instead
of twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import TrainerState

from lavic_utils import callbacks, experiment, keeping
from lavic_utils.__main__ import main
from lavic_utils.config import World, load_profile
from lavic_utils.mini.world import make_world

KILLS = int(os.environ.get("LAVIC_KILLS", "2"))
SMALL = World(
    image_side=48,
    train_shards=1,
    shard_items=64,
    stage1_valid_items=12,
    train_dialogues=16,
    valid_dialogues=5,
    test_dialogues=8,
    p_extra_image=0.0,
    missing_images=2,
    corrupt_images=2,
)
STAGE1 = {
    "epochs": 2,
    "batch_size": 3,
    "warmup_steps": 2,
    "save_minutes": 1e-6,
}  # 12 steps an epoch, a log every 10 and where one ends: 4 checkpoints
STAGE2 = {
    "epochs": 2,
    "batch_size": 4,
    "warmup_steps": 2,
    "save_minutes": 1e-6,
    "lora": {"r": 8, "alpha": 32, "dropout": 0.1},
}
FORK = multiprocessing.get_context(
    "forkserver"
)  # a fresh process in no time: the libraries are imported once
FORK.set_forkserver_preload(["lavic_utils.__main__"])


# ---------------------------------------------------------------- what runs in a process of its own
def go(what: str, place: Path, results: Path, dies_at_save: int = 0) -> None:
    """One stage or `run`; with `dies_at_save` it kills itself with that checkpoint half-written."""
    (place / "began").touch()
    os.environ["LAVIC_RESULTS"] = str(results)
    torch.set_num_threads(1)
    pictures, save, saves = experiment.Experiment.pictures, TrainerState.save_to_json, []
    experiment.Experiment.pictures = lambda self, split: pictures(self, split)[:36]

    def half(self, path: str) -> None:
        saves.append(path)
        save(self, path)
        if len(saves) == dies_at_save:
            Path(path).write_text(Path(path).read_text()[:200])
            os.kill(os.getpid(), signal.SIGKILL)

    TrainerState.save_to_json = half
    profile, data = place / "small.yaml", place / "world"
    if what == "run":
        code = main(
            ["run", "LaViC", "--domain", "beauty", "--profile", str(profile), "--data", str(data)]
        )
        assert code == 0
    else:
        run = experiment.Experiment(str(profile), None, data)
        run.distil() if what == "distil" else run.tune("LaViC", "beauty")


def start(*arguments) -> multiprocessing.Process:
    process = FORK.Process(target=go, args=arguments)
    process.start()
    return process


def finish(*arguments) -> None:
    process = start(*arguments)
    process.join()
    assert process.exitcode == 0


# ---------------------------------------------------------------- what is compared
def outcome(results: Path) -> dict[str, object]:
    """Everything a run leaves, but for seconds and memory; nothing of a checkpoint is left."""
    assert not [p for p in results.rglob("*") if p.name in ("checkpoints", keeping.BEGUN)]
    found: dict[str, object] = {
        str(p.relative_to(results)): p.read_bytes() for p in results.rglob("*.jsonl")
    }
    found |= {str(p.relative_to(results)): p.read_bytes() for p in results.rglob("*.safetensors")}
    for path in results.rglob("result.json"):
        result = json.loads(path.read_text())["result"]
        found[str(path.relative_to(results))] = {k: v for k, v in result.items() if k != "cost"}
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interrupts")
    make_world(folder / "world", SMALL)
    profile = load_profile("mini").model_dump(mode="json")
    profile["name"] = "small"
    profile["distillation"] |= STAGE1
    profile["recommendation"] |= STAGE2
    (folder / "small.yaml").write_text(yaml.safe_dump(profile))
    return folder


@pytest.fixture(scope="module")
def whole(place) -> tuple[Path, dict[str, float]]:
    """The results of an undisturbed `run`, and how long it and its two stages took."""
    results = place / "whole"
    finish("run", place, results)
    end = {p.parent.name: p.stat().st_mtime for p in results.rglob("result.json")}
    return results, {
        "distil": end["stage1"] - end["teacher"],
        "tune": end["beauty"] - end["stage1"],
        "run": max(end.values()) - (place / "began").stat().st_mtime,
    }


def copy_of(whole: Path, what: str, to: Path) -> Path:
    """The state before a stage: what earlier stages left."""
    earlier = {"run": (), "distil": ("teacher",), "tune": ("teacher", "stage1", "tokens")}[what]
    shutil.rmtree(to, ignore_errors=True)
    for name in earlier:
        folder = next(p for p in whole.rglob(name) if p.is_dir())
        shutil.copytree(folder, to / folder.relative_to(whole))
    return to


def same(got: dict, wanted: dict) -> bool:
    """All that a stage made (a `run` makes everything) is as in the undisturbed run."""
    assert got and set(got) <= set(wanted)
    return all(got[name] == wanted[name] for name in got)


# ---------------------------------------------------------------- random moments
@pytest.mark.parametrize("what", ["distil", "tune", "run"])
def test_killed_at_random_moments_it_ends_as_if_undisturbed(place, whole, what, tmp_path):
    rng, wanted = random.Random(f"kills of {what}"), outcome(whole[0])
    results, kills, finished, left = copy_of(whole[0], what, tmp_path / what), 0, 0, 1.0
    while kills < KILLS:
        process, moment = start(what, place, results), rng.uniform(0, left)
        process.join(moment * whole[1][what])
        if process.is_alive():
            process.kill()
            process.join()
            kills, left = kills + 1, left - moment
            if left > 0.2 or kills == KILLS:
                continue
            finish(what, place, results)
        assert process.exitcode in (0, -signal.SIGKILL) and same(outcome(results), wanted)
        copy_of(whole[0], what, results)  # and anew
        finished, left = finished + 1, 1.0
        assert finished < 2 * KILLS + 5
    finish(what, place, results)
    assert same(outcome(results), wanted)


# ---------------------------------------------------------------- chosen moments, and controls
def forget_random_state(checkpoint: Path) -> None:
    (checkpoint / "rng_state.pth").unlink()
    (checkpoint / callbacks.HASHES).unlink()  # by which it would be found damaged


@pytest.mark.parametrize("what", ["distil", "tune"])
def test_a_half_written_checkpoint_is_not_continued_from(place, whole, what, tmp_path):
    wanted, killed = outcome(whole[0]), copy_of(whole[0], what, tmp_path / "killed")
    process = start(what, place, killed, 2)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    checkpoints = {int(p.name.split("-")[1]): p for p in killed.rglob("checkpoint-*")}
    older, broken = min(checkpoints), max(checkpoints)
    assert older < broken and (checkpoints[broken] / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError):
        json.loads((checkpoints[broken] / "trainer_state.json").read_text())

    def resumed(name: str, spoil=lambda checkpoint: None) -> dict:
        copy = shutil.copytree(killed, tmp_path / name)
        spoil(next(copy.rglob(f"checkpoint-{older}")))
        finish(what, place, copy)
        return outcome(copy)

    assert same(resumed("again"), wanted)
    folder = str(next(p.parent for p in killed.rglob("checkpoints")).relative_to(killed))
    adapter, log = f"{folder}/adapter/adapter_model.safetensors", f"{folder}/result.json"
    control = resumed("spoiled", forget_random_state)
    assert control[adapter] != wanted[adapter] and control[log] != wanted[log]


def test_checkpoints_of_another_key_or_number_of_processes_are_moved_aside(
    place, monkeypatch, tmp_path
):
    monkeypatch.setenv("LAVIC_RESULTS", str(tmp_path))
    run = experiment.Experiment(str(place / "small.yaml"), None, place / "world")
    folder, seen = tmp_path / "stage", []

    def killed() -> dict:
        seen.append(sorted(p.name for p in (folder / "checkpoints").glob("*")))
        (folder / "checkpoints" / f"checkpoint-{len(seen)}").mkdir(parents=True)
        raise KeyboardInterrupt

    def stage(make, name: str) -> dict:
        return run.stage(name, folder, "training", {}, make)

    for name in ("x", "x", "y", "y"):
        with pytest.raises(KeyboardInterrupt):
            stage(killed, name)
    run.processes = 2
    with pytest.raises(KeyboardInterrupt):
        stage(killed, "y")
    assert seen == [[], ["checkpoint-1"], [], ["checkpoint-3"], []]
    aside = sorted(p.name for p in tmp_path.glob("stage.replaced-*/checkpoints/*"))
    assert aside == [f"checkpoint-{k}" for k in (1, 2, 3, 4)]  # nothing was deleted
    assert stage(lambda: {"n": 1}, "y") == {"n": 1}
    assert [p.name for p in folder.iterdir()] == ["result.json"]


def test_descriptions_are_kept_as_they_are_written(place, monkeypatch, tmp_path):
    """Killed after three batches, the teacher goes on with the fourth; half a line is no text."""
    monkeypatch.setenv("LAVIC_RESULTS", str(tmp_path))
    described, begun = [], []

    def describe(model, processor, profile, titles, pictures, how) -> list[str]:
        if len(described) == 3 and not begun:
            begun.append(next(tmp_path.rglob("descriptions.jsonl")))
            raise KeyboardInterrupt
        described.append(len(titles))
        return [f"{title}, {len(described)}\n\u2028" for title in titles]

    monkeypatch.setattr(experiment.distillation, "describe", describe)
    monkeypatch.setattr(experiment.Experiment, "model", lambda self: None)

    def teach() -> dict:
        run = experiment.Experiment(str(place / "small.yaml"), None, place / "world")
        size = run.profile.distillation.model_copy(update={"teacher_batch_size": 10})
        run.profile = run.profile.model_copy(update={"distillation": size})
        return run.teach()

    with pytest.raises(KeyboardInterrupt):
        teach()
    with open(begun[0], "a") as file:
        file.write('"half a')
    found = teach()
    said = found["train"] + found["valid"]
    assert sum(described) == len(said) > 40 and described[:4] == [10] * 4
    assert [int(text.rsplit(", ", 1)[1]) for text in said] == sorted(
        i // 10 + 1 for i in range(len(said))
    )
    assert not begun[0].exists() and teach() == found


def test_only_checkpoints_with_a_whole_state_are_kept(tmp_path):
    for name, text in (
        ("checkpoint-1", '{"epoch": 1}'),
        ("checkpoint-2", '{"epoch"'),
        ("checkpoint-3", None),
    ):
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "trainer_state.json").write_text(text)
    callbacks.remove_broken(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    callbacks.remove_broken(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["cut", "zeroed", "empty", "gone"])
def test_a_checkpoint_damaged_since_and_those_after_it_are_not_gone_on_from(
    tmp_path, damage, capsys
):
    saves = callbacks.Saves(None, None)
    for step in (2, 4, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        (folder / "optimizer.pt").write_bytes(bytes(range(200)))
        state = SimpleNamespace(global_step=step, is_world_process_zero=True)
        saves.on_save(SimpleNamespace(output_dir=str(tmp_path)), state, None)
    callbacks.remove_broken(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3  # negative control
    file = tmp_path / "checkpoint-4" / "optimizer.pt"
    content = {"cut": bytes(range(20)), "zeroed": bytes(200), "empty": b""}.get(damage)
    file.unlink() if content is None else file.write_bytes(content)
    callbacks.remove_broken(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    assert "damaged" in capsys.readouterr().out


def test_damaged_descriptions_are_written_again_from_there_on(tmp_path, capsys):
    path = tmp_path / "descriptions.jsonl"
    keeping.Written(path).add(["one", "two", "three"])
    assert keeping.Written(path).texts == ["one", "two", "three"]  # negative control
    for old, new in (("two", "2wo"), ('["two"', '["two'), ("[", "{")):
        keeping.Written(path)
        whole = path.read_text()
        lines = whole.split("\n")
        lines[1] = lines[1].replace(old, new)
        path.write_text("\n".join(lines))
        assert keeping.Written(path).texts == ["one"]
        assert "damaged from line 2 on" in capsys.readouterr().out
        path.write_text(whole)
