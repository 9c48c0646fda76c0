"""Two processes of `accelerate launch` on the CPU (DDP) train as one does with the same global
batch, and write once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent


def work(place: Path, results: Path, batch: int, what: str) -> None:
    """What each process does: both stages and the answers; then its own copy of each adapter, and
    what it was told."""
    from peft import get_peft_model_state_dict

    from lavic_utils import experiment, training
    from lavic_utils.audit import answer_files
    from lavic_utils.config import World, load_profile

    os.environ |= {"LAVIC_RESULTS": str(results), "LAVIC_WORLD": str(place)}
    torch.set_num_threads(1)
    world = World(
        image_side=48,
        train_shards=1,
        shard_items=64,
        stage1_valid_items=20,
        train_dialogues=32,
        valid_dialogues=5,
        test_dialogues=6,
        p_extra_image=0.0,
        missing_images=2,
        corrupt_images=2,
    )
    lora, profile = (
        {"r": 8, "alpha": 32, "dropout": 0.0},
        load_profile("mini").model_dump(mode="json"),
    )
    profile |= {"name": "small", "world": world.model_dump(mode="json")}
    profile["distillation"] |= {
        "lora": lora,
        "epochs": 2,
        "batch_size": batch,
        "eval_batch_size": 8,
        "warmup_steps": 2,
    }
    profile["recommendation"] |= {
        "lora": lora,
        "epochs": 2,
        "batch_size": batch,
        "warmup_steps": 2,
        "save_minutes": 1e-6,
    }
    pictures, fit, rank = (
        experiment.Experiment.pictures,
        training.StageTrainer.fit,
        os.environ.get("RANK", "0"),
    )
    experiment.Experiment.pictures = lambda self, split: pictures(self, split)[
        : 80 if split == "train" else 16
    ]

    def watched(self, folder: Path) -> None:
        fit(self, folder)
        tensors = {k: v.contiguous() for k, v in get_peft_model_state_dict(self.model).items()}
        name = type(self.model.get_base_model()).__name__
        save_file(
            {k.replace(".llava.", "."): v for k, v in tensors.items()},
            results / f"{name}-{rank}.safetensors",
        )

    training.StageTrainer.fit = watched
    results.mkdir(exist_ok=True)
    run = experiment.Experiment(load_profile("mini").model_validate(profile)).prepare()
    told = {"said": bool(answer_files.run_method(run, "LaViC", "beauty"))} if what == "run" else {}
    told |= {
        "history": run.distil()["history"],
        "log": run.tune("LaViC", "beauty")["log"] if what != "distil" else [],
    }
    (results / f"told-{rank}.json").write_text(json.dumps(told))


def launched(place: Path, name: str, what: str, batch: int, processes: int) -> Path:
    """The results of the work above, by `accelerate launch` where there are several processes."""
    start, file = [sys.executable], ROOT / "lavic_utils/profiles/accelerate" / "ddp.yaml"
    if processes > 1:
        start += [
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(file),
            "--num_processes",
            str(processes),
            "--main_process_port",
            "0",
        ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(
        [*start, __file__, str(place), str(place / name), str(batch), what],
        env=environment,
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return place / name


def losses(results: Path, rank: int = 0) -> torch.Tensor:
    told = json.loads((results / f"told-{rank}.json").read_text())
    return torch.tensor(
        [row[k] for row in told["history"] for k in ("train_loss", "valid_loss")]
        + [row["loss"] for row in told["log"]]
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def two(place) -> Path:
    return launched(place, "two", "run", 4, 2)


def test_two_processes_train_as_one_with_their_batch(place, two):
    """Losses of both stages equal to 5e-4: float32 sums in another order, which Adam divides by
    their size (4e-5 where this was written)."""
    one, other = launched(place, "one", "tune", 8, 1), launched(place, "other", "distil", 4, 1)
    assert len(losses(one)) == len(losses(two)) == 8
    assert (losses(one) - losses(two)).abs().max() < 5e-4
    assert (
        losses(one)[:4] - losses(other)
    ).abs().max() > 1e-2  # control: half the batch is another training


def test_every_process_ends_with_the_same_adapter_and_one_writes(two):
    for stage, file in (
        ("Student", "stage1/adapter"),
        ("Recommender", "stage2/lavic/beauty/adapter"),
    ):
        first, second = (load_file(two / f"{stage}-{rank}.safetensors") for rank in (0, 1))
        written = load_file(next(two.rglob(f"{file}/adapter_model.safetensors")))
        assert len(first) > 10 and all(p.any() for name, p in first.items() if "lora_B" in name)
        assert all(
            torch.equal(first[name], second[name]) and torch.equal(first[name], written[name])
            for name in first
        )
    told = [json.loads((two / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    assert [t.pop("said") for t in told] == [True, False] and told[0] == told[1]
    stamps = [json.loads(p.read_text())["provenance"] for p in two.rglob("result.json")]
    assert len(stamps) == 4 and all(stamp["processes"] == 2 for stamp in stamps)
    assert not list(two.rglob("checkpoints")) and len(list(two.rglob("*.jsonl"))) == 1


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
