"""`make bench`: both stages and evaluation, ours beside the released loop, as ratios of one run.

Both must first give the same losses and answers; then they take turns (A B A B ...) on the same
model, data and machine. The released loop ("direct") is `reference`: its steps are alike, so it
does every third. And what another busy process costs our own training (`busy_machine`).
"""

from __future__ import annotations

import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from lavic_utils import data, distillation, recommendation, vision
from lavic_utils.bench import reference
from lavic_utils.config import DOMAINS, ROOT
from lavic_utils.experiment import Experiment
from lavic_utils.provenance import provenance, save_figure, write_json

DOMAIN, TOLERANCE, EQUAL = "beauty", 1e-5, 8  # EQUAL: dialogues whose answers are compared
FULL = {"count": 240, "rounds": 5, "encoded": 1000}
QUICK = {"count": 20, "rounds": 2, "encoded": 16}
PARTS = {  # name in the README, what is counted, the ratio aimed at
    "stage2_training": ("stage 2 training", "dialogues a second", 5),
    "evaluation": ("evaluation", "dialogues a second", 10),
    "stage1_training": ("stage 1 training", "images a second", 2),
}
BUSY = 1.5  # the most that a busy process beside it may cost: seconds with one to seconds without


class Sample:
    """What is measured: `count` training examples, test dialogues and stage-1 pictures."""

    def __init__(self, run: Experiment, count: int) -> None:
        self.run, self.model, self.which = run, run.model(), run.profile.candidates
        train, test = run.dialogues(DOMAIN, "train"), run.dialogues(DOMAIN, "test")
        examples = recommendation.training_examples(train, self.which, run.seed)
        random.Random(run.seed).shuffle(examples)
        self.examples, self.dialogues = examples[:count], test[:count]
        self.pictures = run.taught("train")[:count]
        self.prompter = run.prompter(run.visual("base"))


# ---------------------------------------------------------------- equality first
@torch.inference_mode()
def equal(sample: Sample) -> dict[str, Any]:
    """Losses and answers of both sides. RuntimeError where one differs."""
    run, model, prompter = sample.run, sample.model, sample.prompter
    example, picture = sample.examples[0], sample.pictures[:1]
    collate = distillation.StudentCollator(model, run.processor, run.profile, run.read_picture)
    one, two = distillation.Student(model), recommendation.Recommender(model)
    ours = two(**prompter.collate([prompter.row(example)])), one(**collate(picture))
    direct = (
        reference.recommendation_loss(run, model, example),
        reference.description_loss(run, model, picture),
    )
    losses = {}
    for stage, own, theirs in zip(("stage 2", "stage 1"), ours, direct, strict=True):
        losses[stage] = {"ours": float(own["loss"]), "direct": float(theirs)}
        if not math.isclose(*losses[stage].values(), rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            raise RuntimeError(f"{stage}: {losses[stage]}: losses differ, nothing was measured")
    some = sample.dialogues[:EQUAL]
    answers = recommendation.generate_answers(model, prompter, some, sample.which)
    pairs = zip(answers, reference.answers(run, model, some), strict=True)
    if unlike := sum(answer.response != text for answer, text in pairs):
        raise RuntimeError(f"{unlike} of {EQUAL} answers differ, nothing was measured")
    return {"losses": losses, "tolerance": TOLERANCE, "equal_answers": len(some)}


# ---------------------------------------------------------------- speed
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


Sides = dict[str, tuple[int, Callable[[Any], None]]]  # a side's rows, and its work on a model


def sides(sample: Sample) -> dict[str, Sides]:
    """Both sides of each part. Ours: stage 1 with its one reading of the images and checkpoints;
    stage 2 and three readings of answers from stored visual tokens, see `encoding`."""
    run, profile, seed, prompter = sample.run, sample.run.profile, sample.run.seed, sample.prompter

    def distil(model, rows: Sequence) -> None:
        with tempfile.TemporaryDirectory() as folder:
            few, read, place = rows[:1], run.processor, Path(folder)
            distillation.distil(profile, model, read, rows, few, place, seed)

    def tune(model, rows: Sequence) -> None:
        with tempfile.TemporaryDirectory() as folder:
            recommendation.fine_tune(profile, model, prompter, rows, Path(folder), seed)

    def answer(model, rows: Sequence) -> None:
        recommendation.generate_answers(model, prompter, rows, sample.which)

    def part(rows: Sequence, ours: Callable, direct: Callable, times: int = 1) -> Sides:
        third = rows[::3]
        return {
            "direct": (len(third), lambda model: direct(run, model, third)),
            "ours": (times * len(rows), lambda model: ours(model, rows)),
        }

    epochs = profile.distillation.epochs
    return {
        "stage2_training": part(sample.examples, tune, reference.fine_tune),
        "evaluation": part(sample.dialogues, answer, reference.answers),
        "stage1_training": part(sample.pictures, distil, reference.distil, epochs),
    }


def compare(run: Experiment, rounds: int, sides: Sides) -> dict[str, Any]:
    """Each side's rows a second (its rows, its work), in turn, on models loaded outside the clock;
    `ratio`: that of "ours" to "direct", round by round."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (rows, work) in sides.items():
            speeds[name].append(rows / timed(work, run.model()))
    pairs = zip(speeds["ours"], speeds["direct"], strict=True)
    return {
        "ratio": spread([ours / direct for ours, direct in pairs]),
        "a_second": {name: spread(values) for name, values in speeds.items()},
        "units": {name: rows for name, (rows, _) in sides.items()},
    }


def busy_machine(name: str, count: int, rounds: int) -> dict[str, Any]:
    """Seconds of stage 2 on `count` examples, in a process of its own as a notebook has one, alone
    and beside a process that never rests, in turn; their ratio."""
    training = [sys.executable, "-m", "lavic_utils.bench.speed", name, str(count)]
    seconds: dict[str, list[float]] = {"alone": [], "busy": []}
    for _ in range(rounds):
        for how, found in seconds.items():
            never = ["-c", "while True: pass"] if how == "busy" else ["-c", ""]
            other = subprocess.Popen([sys.executable, *never])
            try:
                done = subprocess.run(training, stdout=subprocess.PIPE, text=True, check=True)
            finally:
                other.kill()
                other.wait()
            found.append(float(done.stdout.split()[-1]))
    pairs = zip(seconds["busy"], seconds["alone"], strict=True)
    found = {"goal": BUSY, "ratio": spread([busy / alone for busy, alone in pairs])}
    return found | {"seconds": {how: spread(values) for how, values in seconds.items()}}


def encoding(sample: Sample, figures: dict[str, Any], most: int) -> dict[str, Any]:
    """What ours does beforehand: items encoded a second, from their files; and what is left of the
    ratios with that counted in, over the profile's own number of dialogues."""
    run = sample.run
    encode = vision.file_encoder(sample.model, run.processor)
    names = sorted(set().union(*run.items.values()))[:most]
    groups = list(vision.batched([data.image_file(run.root, name) for name in names], 64))
    rate = len(names) / timed(lambda: [encode(group) for group in groups])
    found: dict[str, Any] = {"items_a_second": spread([rate]), "items_encoded": len(names)}
    for part, split in (("stage2_training", "train"), ("evaluation", "test")):
        dialogues = sum(len(run.dialogues(domain, split)) for domain in DOMAINS)
        speeds = figures[part]["a_second"]
        direct, ours = (dialogues / speeds[side]["median"] for side in ("direct", "ours"))
        ratio = direct / (ours + len(run.items[split]) / rate)
        found[split] = {"items": len(run.items[split]), "dialogues": dialogues}
        found[split]["ratio_with_encoding"] = float(f"{ratio:.4g}")
    return found


# ---------------------------------------------------------------- the file
def result_file(machine: dict[str, Any], quick: bool, ending: str = "") -> Path:
    """`results/bench/MACHINE.json` (quick: `bench-quick/`), named by the card, or by processor and
    cores: no name of a host."""
    text = f"{machine['processor']} {machine['cores']} cores"
    if torch.cuda.is_available():
        text = torch.cuda.get_device_name()
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    results = Path(os.environ.get("LAVIC_RESULTS", ROOT / "results"))
    return results / ("bench-quick" if quick else "bench") / f"{name}{ending}.json"


def bench(quick: bool = False, name: str = "mini") -> Path:
    """Measure everything; the path of the file written. Its figure lies beside it."""
    size, run = QUICK if quick else FULL, Experiment(name).prepare()
    sample, figures = Sample(run, size["count"]), {}
    figures["equality"] = equal(sample)
    both = sides(sample)
    for part, (label, unit, goal) in PARTS.items():
        figures[part] = {"unit": unit, "goal": goal} | compare(run, size["rounds"], both[part])
        times = "{median} times ({low} to {high})".format(**figures[part]["ratio"])
        print(f"{label}: {times}", file=sys.stderr, flush=True)
    figures["busy_machine"] = busy_machine(name, size["count"], size["rounds"])
    figures["store"] = encoding(sample, figures, size["encoded"])
    about = provenance(run.profile, run.seed, run.data_hash)
    about |= {"quick": quick, "rounds": size["rounds"], "threads": torch.get_num_threads()}
    about["card"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    ratios = {part: figures[part]["ratio"]["median"] for part in (*PARTS, "busy_machine")}
    path = result_file(about["machine"], quick)
    write_json(path, {"provenance": about, "ratios": ratios, "figures": figures})
    save_figure(drawn(figures), path.with_suffix(".png"), about["tier"], about)
    return path


ALT = (
    "Times as fast as the released loop: each round a dot, the median a line, the goal a triangle."
)


def drawn(figures: dict[str, Any]) -> Figure:
    """The ratios of every round, their medians, and the goals."""
    figure = Figure((6.5, 2.2), layout="constrained")
    axis = figure.add_subplot(title=ALT.partition(":")[0], xscale="log")
    for row, part in enumerate(PARTS):
        ratio = figures[part]["ratio"]
        axis.plot(ratio["runs"], [row] * len(ratio["runs"]), "o", color="#0072B2", alpha=0.6)
        axis.plot(ratio["median"], row, "|", color="black", markersize=18)
        axis.plot(figures[part]["goal"], row, "^", color="#D55E00")
    axis.set_yticks(range(len(PARTS)), [label for label, _, _ in PARTS.values()])
    axis.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"], minor=False)
    axis.minorticks_off()
    axis.set_xlabel("a dot: one round; the line: their median; the triangle: the goal")
    axis.margins(y=0.3)
    return figure


if __name__ == "__main__":  # one training, for `busy_machine`
    few = Sample(Experiment(sys.argv[1]).prepare(), int(sys.argv[2]))
    print(timed(sides(few)["stage2_training"]["ours"][1], few.run.model()))
