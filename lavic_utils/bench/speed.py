"""`make bench`: both stages and evaluation, ours beside the direct way, as ratios of one run.

Both must first give the same losses and answers; then they take turns (A B A B ...) on the same
model, data and machine. The direct way is `reference`.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lavic_utils import data, distillation, recommendation, vision
from lavic_utils.bench import reference
from lavic_utils.config import DOMAINS, ROOT
from lavic_utils.provenance import profile_data_hash, provenance, write_json
from lavic_utils.runs import Run

DOMAIN, TOLERANCE = "beauty", 1e-5
FULL = {"count": 240, "rounds": 5, "encoded": 1000}
QUICK = {"count": 20, "rounds": 2, "encoded": 16}
PARTS = {  # in the README's order: its name there, what is counted, the ratio aimed at
    "stage2_training": ("stage 2 training", "dialogues a second", 8),
    "evaluation": ("evaluation", "dialogues a second", 20),
    "stage1_training": ("stage 1 training", "images a second", 1.5),
}


# ---------------------------------------------------------------- measuring
def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[..., object], *arguments) -> float:
    """Seconds of one call; waits for the accelerator before and after."""
    synchronize()
    start = time.perf_counter()
    work(*arguments)
    synchronize()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, lowest and highest of some runs, and the runs, in four digits."""
    short = [float(f"{value:.4g}") for value in values]
    middle = float(f"{statistics.median(short):.4g}")
    return {"median": middle, "low": min(short), "high": max(short), "runs": short}


class Sample:
    """What both sides work on: `count` training examples, test dialogues and stage-1 pictures.

    The reference's steps are all alike, so it works on every third. A method `direct_*` or `our_*`
    is one side's whole work on a fresh base model.
    """

    def __init__(self, run: Run, count: int) -> None:
        self.run, self.model, self.which = run, run.model(), run.profile.candidates
        train, test = run.dialogues(DOMAIN, "train"), run.dialogues(DOMAIN, "test")
        examples = recommendation.training_examples(train, self.which, run.seed)
        random.Random(run.seed).shuffle(examples)
        self.examples, self.dialogues = examples[:count], test[:count]
        self.prompter = run.prompter(run.visual("base"))
        self.pictures = []
        shown = run.pictures("train")[:count]
        titles, pixels = [p.title for p in shown], [run.read_picture(p.path) for p in shown]
        texts = distillation.describe(self.model, run.processor, run.profile, titles, pixels)
        for picture, text in zip(shown, texts, strict=True):
            self.pictures.append(replace(picture, description=text))

    def sides(self, part: str) -> dict[str, tuple[int, Callable[[Any], object]]]:
        """Name of each side of a part: how many units it works through, and its work."""
        if part == "stage1_training":
            count, epochs = len(self.pictures), self.run.profile.distillation.epochs
            ours = {"ours": (count * epochs, self.our_stage1)}
            return {"direct": (len(self.pictures[::3]), self.direct_stage1)} | ours
        if part == "stage2_training":
            ours = {"ours": (len(self.examples), self.our_stage2)}
            return {"direct": (len(self.examples[::3]), self.direct_stage2)} | ours
        count = len(self.dialogues)
        return {
            "direct": (len(self.dialogues[::3]), self.direct_answers),
            "ours": (count, self.our_answers),
            "ours, and candidates scored": (count, self.our_scored_answers),
        }

    def direct_stage1(self, model) -> None:
        reference.train_student(self.run, model, self.pictures[::3])

    def our_stage1(self, model) -> None:
        """All epochs with their checkpoints; one picture to validate on."""
        run, rows = self.run, self.pictures
        with tempfile.TemporaryDirectory() as folder:
            distillation.train_student(
                run.profile, model, run.processor, rows, rows[:1], Path(folder), run.seed
            )

    def direct_stage2(self, model) -> None:
        see = reference.look(self.run, model)
        reference.train_recommender(self.run, model, see, self.examples[::3])

    def our_stage2(self, model) -> None:
        run, rows = self.run, self.examples
        with tempfile.TemporaryDirectory() as folder:
            recommendation.train_recommender(
                run.profile, model, self.prompter, rows, Path(folder), run.seed
            )

    def direct_answers(self, model) -> None:
        see = reference.look(self.run, model)
        for dialogue in self.dialogues[::3]:
            reference.answer(self.run, model, see, dialogue)

    def our_answers(self, model) -> None:
        recommendation.answer(model, self.prompter, self.dialogues, self.which, scored=False)

    def our_scored_answers(self, model) -> None:
        recommendation.answer(model, self.prompter, self.dialogues, self.which, scored=True)


# ---------------------------------------------------------------- equality first
def our_loss(sample: Sample, batch: dict[str, Any]) -> Tensor:
    """Our loss of a collated batch, without dropout: stage 2's holds visual tokens, 1's pixels."""
    model, visual = sample.model, batch.get("visual")
    if visual is None:
        values = batch["pixel_values"].to(model.device, model.dtype)
        visual = vision.cls_tokens(model, values, batch["image_sizes"])
    ids, labels, mask = (
        batch[name].to(model.device) for name in ("input_ids", "labels", "attention_mask")
    )
    pad = sample.prompter.tokenizer.pad_token_id
    return distillation.forward_loss(model, ids, labels, mask, visual, pad)[0]


@torch.inference_mode()
def equal(sample: Sample, few: int = 8) -> dict[str, Any]:
    """Losses and answers of both sides. RuntimeError where one differs."""
    run, model, prompter = sample.run, sample.model, sample.prompter
    see, example, picture = reference.look(run, model), sample.examples[0], sample.pictures[:1]
    two = recommendation.collator(prompter)([prompter.row(example)])
    collate = distillation.StudentCollator(model, run.processor, run.profile, run.read_picture)
    pairs = {
        "stage 2": (
            our_loss(sample, two),
            reference.recommendation_loss(run, model, see, example),
        ),
        "stage 1": (
            our_loss(sample, collate(picture)),
            reference.description_loss(run, model, picture),
        ),
    }
    losses = {}
    for stage, (ours, direct) in pairs.items():
        if not math.isclose(ours, direct, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            raise RuntimeError(
                f"{stage}: our loss is {ours:.7f}, the direct way's {direct:.7f}: "
                "nothing was measured"
            )
        losses[stage] = {"ours": float(ours), "direct": float(direct)}
    some, unlike = sample.dialogues[:few], 0
    answers = recommendation.answer(model, prompter, some, sample.which, scored=False)
    for dialogue, ours in zip(some, answers, strict=True):
        unlike += reference.answer(run, model, see, dialogue) != ours.response
    if unlike:
        raise RuntimeError(
            f"{unlike} of {len(some)} answers differ from the direct way's: nothing was measured"
        )
    return {"losses": losses, "tolerance": TOLERANCE, "equal_answers": len(some)}


# ---------------------------------------------------------------- speed
def compare(
    load: Callable[[], Any], sides: Mapping[str, tuple[int, Callable]], rounds: int
) -> dict[str, Any]:
    """Units a second of every side, in turn, each on a model loaded outside the clock.

    `ratio`: that of "ours" to "direct", round by round.
    """
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (units, work) in sides.items():
            speeds[name].append(units / timed(work, load()))
    pairs = zip(speeds["ours"], speeds["direct"], strict=True)
    return {
        "ratio": spread([ours / direct for ours, direct in pairs]),
        "a_second": {name: spread(values) for name, values in speeds.items()},
        "units": {name: units for name, (units, _) in sides.items()},
    }


def encoding(sample: Sample, parts: Mapping[str, dict], most: int, rounds: int) -> dict[str, Any]:
    """What our side does beforehand: items encoded a second, from their files; and what is left of
    the ratios of `parts` with that counted in, over the profile's own number of dialogues."""
    run = sample.run
    encode = vision.file_encoder(sample.model, run.processor)
    names = sorted(set().union(*run.items.values()))[:most]
    speeds = []
    for i in range(rounds):
        files = [data.image_file(run.root, name) for name in names[i::rounds]]
        groups = list(vision.batched(files, 64))
        speeds.append(len(files) / timed(lambda groups=groups: [encode(g) for g in groups]))
    found: dict[str, Any] = {"items_a_second": spread(speeds), "items_encoded": len(names)}
    for part, split in (("stage2_training", "train"), ("evaluation", "test")):
        dialogues = sum(len(run.dialogues(domain, split)) for domain in DOMAINS)
        seconds = len(run.items[split]) / found["items_a_second"]["median"]
        speed = {side: parts[part]["a_second"][side]["median"] for side in ("direct", "ours")}
        ratio = (dialogues / speed["direct"]) / (dialogues / speed["ours"] + seconds)
        found[split] = {"items": len(run.items[split]), "dialogues": dialogues}
        found[split] |= {"ratio_with_encoding": float(f"{ratio:.4g}")}
    return found


def result_file(machine: Mapping[str, Any], quick: bool, ending: str = "") -> Path:
    """`results/bench/MACHINE.json` (quick: `bench-quick/`), named by the card, or by processor and
    cores: no name of a host."""
    text = f"{machine['processor']} {machine['cores']} cores"
    if torch.cuda.is_available():
        text = torch.cuda.get_device_name()
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    results = Path(os.environ.get("LAVIC_RESULTS", ROOT / "results"))
    return results / ("bench-quick" if quick else "bench") / f"{name}{ending}.json"


def bench(quick: bool = False, name: str = "mini") -> Path:
    """Measure everything; the path of the file written."""
    size, run = QUICK if quick else FULL, Run(name)
    sample, rounds = Sample(run, size["count"]), size["rounds"]
    figures: dict[str, Any] = {"equality": equal(sample)}
    for part, (label, unit, goal) in PARTS.items():
        figures[part] = {"unit": unit, "goal": goal}
        figures[part] |= compare(run.model, sample.sides(part), rounds)
        ratio = figures[part]["ratio"]
        said = f"{label}: {ratio['median']} times ({ratio['low']} to {ratio['high']})"
        print(said, file=sys.stderr, flush=True)
    figures["store"] = encoding(sample, figures, size["encoded"], rounds)
    about = provenance(run.profile, run.seed, profile_data_hash(run.profile)) | {
        "quick": quick,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    ratios = {part: figures[part]["ratio"]["median"] for part in PARTS}
    path = result_file(about["machine"], quick)
    write_json(path, {"provenance": about, "ratios": ratios, "figures": figures})
    return path


def speed_block(path: Path) -> str:
    """The README's lines on speed, in Markdown, from a file that `bench` wrote."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    about, figures = found["provenance"], found["figures"]
    lines = ["| | direct way | ours | times (range) | goal |", "| --- | --- | --- | --- | --- |"]
    for part, (label, unit, _) in PARTS.items():
        speed, ratio = figures[part]["a_second"], figures[part]["ratio"]
        sides = f"{speed['direct']['median']:.3g} | {speed['ours']['median']:.3g}"
        times = f"{ratio['median']:.3g} ({ratio['low']:.3g} to {ratio['high']:.3g})"
        lines.append(f"| {label}, {unit} | {sides} | {times} | {figures[part]['goal']} |")
    store, machine, versions = figures["store"], about["machine"], about["versions"]
    where = about["card"] or f"{machine['processor']}, {machine['cores']} cores"
    lines += [
        "",
        f"Encoding an item's image once: {store['items_a_second']['median']:.3g} items a second; "
        f"with that counted in, stage 2 training is {store['train']['ratio_with_encoding']:.3g} "
        f"times and evaluation {store['test']['ratio_with_encoding']:.3g} times as fast.",
        f"Medians of {about['rounds']} interleaved runs with equal losses and answers on both "
        "sides.",
        f"*{about['tier']}, profile {about['profile']}, {where}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}; code {about['code_hash'][:7]}.*",
        "",
    ]
    return "\n".join(lines)
