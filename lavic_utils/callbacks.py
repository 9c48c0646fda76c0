"""What goes on around a long training: checkpoints, progress, looks on the way, and a stop where it
is broken."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from transformers import TrainerCallback

from lavic_utils.config import UserError
from lavic_utils.provenance import folder_hash, kept, write_kept

log = logging.getLogger(__name__)
HASHES = "hashes.json"  # of a checkpoint's files
QUIET = 30  # seconds between two lines on how far a stage is
SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of a training, where `Watched` looks at what is learnt


def remove_broken(folder: Path) -> None:
    """Remove the checkpoints that a kill left half-written, those without a whole
    trainer_state.json, which is written last; those that were damaged since; and all later ones,
    which may name one of them as the best."""
    broken = False
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            broken |= (path / HASHES).is_file() and kept(path / HASHES) is None
        except (OSError, ValueError):
            broken = True
        if broken:
            shutil.rmtree(path)


class Saves(TrainerCallback):
    """A checkpoint every so many `minutes` (None: none), but not at the end of an epoch, which
    counts only once it is validated. It comes with a log, since the Trainer forgets in a resumed
    run what losses it has not logged yet."""

    def __init__(self, minutes: float | None, accelerator) -> None:
        self.minutes, self.accelerator = minutes, accelerator

    def on_train_begin(self, args, state, control, **_):
        self.last = time.monotonic()
        if state.best_global_step:  # the Trainer keeps the path that the first run had
            state.best_model_checkpoint = f"{args.output_dir}/checkpoint-{state.best_global_step}"

    def on_save(self, args, state, control, **_):
        self.last = time.monotonic()
        if state.is_world_process_zero:
            place = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_kept(place / HASHES, {"files": dict(folder_hash(place))})

    def on_step_end(self, args, state, control, **_):
        epoch_ends = state.global_step % max(1, state.max_steps // state.num_train_epochs) == 0
        if self.minutes and control.should_log and not epoch_ends:
            late = time.monotonic() - self.last >= 60 * self.minutes
            late = torch.tensor([late], device=self.accelerator.device)
            control.should_save |= bool(self.accelerator.gather(late).any())  # all save together

    def on_epoch_end(self, args, state, control, **_):
        control.should_log |= control.should_save


class Pace:
    """Says in the log, at most every QUIET seconds, how far a long work is and the time left."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.first = what, total, done
        self.start = self.said = time.monotonic()

    def at(self, done: int, more: str = "") -> None:
        now = time.monotonic()
        if done > self.first and now - self.said >= QUIET:
            left = round((now - self.start) / (done - self.first) * (self.total - done))
            left = timedelta(seconds=left)
            log.info("%s: %s of %s%s, %s left", self.what, done, self.total, more, left)
            self.said = now


class Progress(TrainerCallback):
    """The steps of a stage and of its validations, with the loss, in the log."""

    def __init__(self, place: Path) -> None:
        self.name, self.batches = f"{place.parent.name}/{place.name}", None

    def on_train_begin(self, args, state, control, **_):
        self.steps = Pace(f"{self.name}, steps", state.max_steps, state.global_step)

    def on_log(self, args, state, control, logs, **_):
        if "loss" in logs and state.is_world_process_zero:
            self.steps.at(state.global_step, f", loss {logs['loss']:.4f}")

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **_):
        if self.batches is None:
            self.seen, self.batches = 0, Pace(f"{self.name}, validation", len(eval_dataloader))
        self.seen += 1
        if state.is_world_process_zero:
            self.batches.at(self.seen)

    def on_evaluate(self, *_, **__):
        self.batches = None


class Reseeded(TrainerCallback):
    """Every epoch's random state follows from seed and epoch alone: the same order of rows in a
    resumed run and in every process."""

    def on_epoch_begin(self, args, state, control, **_):
        torch.manual_seed(args.seed + int(state.epoch or 0))


class Finite(TrainerCallback):
    """Stops a run that half precision has broken: a loss that is no number, or steps skipped again
    and again because gradients overflow at every loss scale (one is found within some 16 steps)."""

    def __init__(self, accelerator) -> None:
        self.accelerator, self.skipped = accelerator, 0

    def stop(self, step: int, why: str) -> None:
        raise UserError(
            f"training stopped at step {step}: {why}; lower the learning rate, or use dtype "
            "float32 or a card that computes in bfloat16"
        )

    def on_step_end(self, args, state, control, **_):
        self.skipped += bool(self.accelerator.optimizer_step_was_skipped)
        if self.skipped > 20 + state.global_step // 10:
            self.stop(state.global_step, "float16 gradients overflow")

    def on_log(self, args, state, control, logs, **_):
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0)):
                self.stop(state.global_step, f"{name} is {logs[name]}")


class EachEpoch(TrainerCallback):
    """Adds what `measure` finds of `model` after each epoch to the log."""

    def __init__(self, measure: Callable, model) -> None:
        self.measure, self.model = measure, model

    def on_evaluate(self, args, state, control, **_):
        self.model.eval()
        state.log_history[-1].update(self.measure(self.model))
        self.model.train()


class Watched(TrainerCallback):
    """Puts what `on_step` measures SHARES of the way into the log, which a killed run keeps."""

    def __init__(self, model, on_step: Callable[[], dict[str, float]]) -> None:
        self.model, self.on_step = model, on_step

    def on_step_end(self, args, state, control, **_):
        if state.global_step in [round(share * state.max_steps) for share in SHARES]:
            self.model.eval()
            state.log_history.append({"step": state.global_step, **self.on_step()})
            self.model.train()
