"""Speed of both stages and of evaluation: ours beside the direct way (`direct`), on the same model, data and machine.

Sides are run in turn (A B A B ...); before the first of them, both must give the same losses and answers.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback

from lavic_utils import data, direct, distillation, recommendation, training, vision
from lavic_utils.config import DOMAINS
from lavic_utils.runs import Run

DOMAIN = "beauty"
TOLERANCE = 1e-5


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call; waits for the accelerator before and after."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict:
    """Median, lowest and highest of some runs, and the runs, in four digits."""
    short = [float(f"{value:.4g}") for value in values]
    return {"median": float(f"{statistics.median(short):.4g}"), "low": min(short), "high": max(short), "runs": short}


def compare(sides: Mapping[str, tuple[int, Callable[[], Callable[[], object]]]], rounds: int) -> dict:
    """Units a second of every side (name -> units, prepare), in turn; `prepare()`, outside the clock, gives the work.

    `ratio`: that of "ours" to "direct", round by round.
    """
    runs: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (units, prepare) in sides.items():
            runs[name].append(units / timed(prepare()))
    return {"ratio": spread([ours / plain for ours, plain in zip(runs["ours"], runs["direct"], strict=True)]),
            "a_second": {name: spread(values) for name, values in runs.items()},
            "units": {name: units for name, (units, _) in sides.items()}}


class Bench:
    """The inputs of all measurements: `count` training examples, test dialogues and stage-1 images of one domain.

    Ours works on all of them; a direct side, whose steps are alike, on every third.
    """

    def __init__(self, run: Run, count: int, rounds: int) -> None:
        self.run, self.rounds, self.which = run, rounds, run.profile.candidates
        self.model = run.model()
        shuffled = recommendation.training_examples(run.dialogues(DOMAIN, "train"), self.which, run.seed)
        random.Random(run.seed).shuffle(shuffled)
        self.examples, self.dialogues = shuffled[:count], run.dialogues(DOMAIN, "test")[:count]
        names = {*(a for e in self.examples for a in e.candidates),
                 *(a for d in self.dialogues for a in getattr(d, self.which))}
        self.visual = self.encode(sorted(names))
        self.prompter, self.count = run.prompter(self.visual), count

    def encode(self, names: Sequence[str]) -> dict[str, Tensor]:
        """[CLS] of the items' first images from their files, as `Run.visual` makes them."""
        found = {}
        for group in vision.batched(names, 64):
            images = {a: data.open_image(data.image_file(self.run.root, a)) for a in group}
            images = {a: image for a, image in images.items() if image is not None}
            if images:
                found |= vision.encode(self.model, list(images), *vision.pixels(self.run.processor, list(images.values())))
        return found

    @cached_property
    def rows(self) -> list[distillation.Picture]:
        """Stage-1 images with the base model's own descriptions."""
        pictures, read = self.run.pictures("train")[:self.count], distillation.Pictures(self.run.processor, keep=False)
        texts = distillation.describe(self.model, self.run.processor, self.run.profile, [p.title for p in pictures],
                                      [read(p.path) for p in pictures])
        return [distillation.Picture(p.asin, p.title, p.path, text) for p, text in zip(pictures, texts, strict=True)]

    def stored(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self.visual[name] for name in names if name in self.visual}

    # ------------------------------------------------------------ equality first
    def equal(self, few: int = 8) -> dict:
        """The direct way and ours on the same inputs, in float32. RuntimeError where a loss or an answer differs."""
        see, losses = direct.look(self.run, self.model), {}
        one, two = distillation.Student(self.model), recommendation.Recommender(self.model)
        pairs = {"stage 2": (lambda: two(**self.stage2_batch(self.examples[:1]))["loss"],
                             lambda: direct.recommendation_loss(self.run, self.model, see, self.examples[0])),
                 "stage 1": (lambda: one(**self.stage1_batch(self.rows[:1]))["loss"],
                             lambda: direct.description_loss(self.run, self.model, self.rows[:1]))}
        for stage, sides in pairs.items():
            with torch.inference_mode():
                ours, plain = (float(side()) for side in sides)
            if not math.isclose(ours, plain, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
                raise RuntimeError(f"{stage}: our loss is {ours:.7f}, the direct way's {plain:.7f}: nothing was measured")
            losses[stage] = {"ours": ours, "direct": plain}
        some = self.dialogues[:few]
        ours = [found.response for found in recommendation.answer(self.model, self.prompter, some, self.which, scored=False)]
        plain = [direct.answer(self.run, self.model, see, d) for d in some]
        if ours != plain:
            unlike = sum(a != b for a, b in zip(ours, plain, strict=True))
            raise RuntimeError(f"{unlike} of {len(some)} answers differ from the direct way's: nothing was measured")
        return {"losses": losses, "tolerance": TOLERANCE, "equal_answers": len(some)}

    # ------------------------------------------------------------ ratios
    def stage2_training(self) -> dict:
        """Dialogues a second; ours is `train_recommender` whole (prompts, trainer, saving the adapter)."""
        run, third = self.run, self.examples[::3]
        stage = run.profile.recommendation.model_copy(update={"warmup_steps": 0})  # one step must learn something too
        profile = run.profile.model_copy(update={"recommendation": stage})

        def plain(see):
            def prepare():
                model = run.model()
                return lambda: direct.train_recommender(run, model, see(model), third)
            return prepare

        def ours():
            model, folder = run.model(), tempfile.TemporaryDirectory()
            return lambda: recommendation.train_recommender(profile, model, self.prompter, self.examples,
                                                            Path(folder.name), run.seed)
        return {"unit": "dialogues a second", "goal": 8} | compare({
            "direct": (len(third), plain(lambda model: direct.look(run, model))),
            "ours": (len(self.examples), ours),
            "direct, but from stored vectors": (len(third), plain(lambda model: self.stored)),
        }, self.rounds)

    def evaluation(self) -> dict:
        """Dialogues a second, greedy answers on both sides; with the ten candidates also scored as a figure beside."""
        run, model, third = self.run, self.model, self.dialogues[::3]

        def plain(see):
            return lambda: lambda: [direct.answer(run, model, see, d) for d in third]

        def ours(scored):
            return lambda: lambda: recommendation.answer(model, self.prompter, self.dialogues, self.which, scored=scored)
        return {"unit": "dialogues a second", "goal": 20, "reading": "generated"} | compare({
            "direct": (len(third), plain(direct.look(run, model))),
            "ours": (len(self.dialogues), ours(False)),
            "ours, and candidates scored": (len(self.dialogues), ours(True)),
            "direct, but from stored vectors": (len(third), plain(self.stored)),
        }, self.rounds)

    def stage1_training(self) -> dict:
        """Images a second; ours over the profile's epochs, its one reading of the images included."""
        run, third, stage = self.run, self.rows[::3], self.run.profile.distillation

        def plain():
            model = run.model()
            return lambda: direct.train_student(run, model, third)

        def ours():
            student, folder = self.student(), tempfile.TemporaryDirectory()
            collate = distillation.StudentCollator(student, run.processor, run.profile,
                                                   distillation.Pictures(run.processor, stage.keep_pixels))
            trainer = training.StageTrainer(
                model=student, processing_class=run.processor.tokenizer, train_dataset=self.rows, data_collator=collate,
                args=training.training_arguments(Path(folder.name), stage, run.seed, vision.dtype(run.profile),
                                                 save_strategy="no"))
            trainer.remove_callback(PrinterCallback)
            return lambda folder=folder: trainer.train()  # the folder lives as long as the work
        return {"unit": "images a second", "goal": 1.5, "epochs": stage.epochs} | compare({
            "direct": (len(third), plain),
            "ours": (len(self.rows) * stage.epochs, ours)}, self.rounds)

    def store(self, parts: Mapping[str, dict], most: int = 1000) -> dict:
        """What encoding all items once costs; what is left of the ratios of `parts` when it is counted in, on the
        profile's own number of dialogues; and after how many dialogues it has paid for itself."""
        names = sorted(set().union(*self.run.items.values()))[:most]
        rate = spread([len(group) / timed(lambda group=group: self.encode(group))
                       for group in (names[i::self.rounds] for i in range(self.rounds))])
        found: dict = {"items_a_second": rate, "items_encoded": len(names)}
        for part, split in (("stage2_training", "train"), ("evaluation", "test")):
            items = len(self.run.items[split])
            dialogues, cost = sum(len(self.run.dialogues(d, split)) for d in DOMAINS), items / rate["median"]
            found[split] = {"items": items, "dialogues": dialogues, "seconds": round(cost, 2)}
            if part in parts:
                plain, ours = (1 / parts[part]["a_second"][side]["median"] for side in ("direct", "ours"))
                found[split] |= {
                    "ratio_with_encoding": float(f"{plain * dialogues / (ours * dialogues + cost):.4g}"),
                    "break_even_dialogues": math.ceil(cost / (plain - ours)) if plain > ours else None}
        return found

    # ------------------------------------------------------------ where the time goes
    def tuned(self):
        lora = self.run.profile.recommendation.lora
        stage = recommendation.Recommender(self.run.model())
        return get_peft_model(stage, training.lora_config(lora, recommendation.LANGUAGE_LINEAR)).train()

    def student(self):
        lora = self.run.profile.distillation.lora
        stage = distillation.Student(self.run.model())
        return get_peft_model(stage, training.lora_config(lora, distillation.VISION_LINEAR)).train()

    def stage2_batch(self, examples) -> dict:
        return self.moved(recommendation.collator(self.prompter)([self.prompter.row(e) for e in examples]))

    def stage1_batch(self, rows) -> dict:
        pictures = distillation.Pictures(self.run.processor, keep=False)
        return self.moved(distillation.StudentCollator(self.model, self.run.processor, self.run.profile, pictures)(rows))

    def moved(self, batch: dict) -> dict:
        return {k: v.to(self.model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def work(self) -> dict:
        """FLOP/s of our training steps and of answering a batch, over the matrix-product rate; where their time goes."""
        profile, rates = self.run.profile, matrix_rates()

        def step(model, stage, batch) -> Callable[[], None]:
            return lambda: direct.steps(model, stage, [lambda: model(**batch)["loss"]])
        two = self.stage2_batch(self.examples[:profile.recommendation.batch_size])
        one = self.stage1_batch(self.rows[:profile.distillation.batch_size])
        some = self.dialogues[:profile.recommendation.eval_batch_size]
        found: dict = {"matrix_product_flop_a_second": rates}
        for name, units, work in (
                ("stage2_training", two, step(self.tuned(), profile.recommendation, two)),
                ("stage1_training", one, step(self.student(), profile.distillation, one)),
                ("evaluation", None, lambda: recommendation.answer(self.model, self.prompter, some, self.which, False))):
            work()
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # others are not all counted
                work()
            seconds, flop = spread([timed(work) for _ in range(max(3, self.rounds))]), counter.get_total_flops()
            rate = flop / seconds["median"]
            found[name] = {"flop": flop, "seconds": seconds, "flop_a_second": float(f"{rate:.4g}"),
                           "share": {kind: round(rate / best, 3) for kind, best in rates.items()},
                           "time_by_operator": operators(work)}
            found[name] |= {"rows": len(some)} if units is None else {
                "rows": len(units["input_ids"]), "tokens_a_row": units["input_ids"].shape[1],
                "padding": round(1 - float(units["attention_mask"].float().mean()), 3)}
        return found


def matrix_rates(side: int | None = None) -> dict[str, float]:
    """FLOP/s of a large matrix product: float32 and, where the processor has it, bfloat16 (median of five)."""
    cuda, device = torch.cuda.is_available(), vision.device()
    has = torch.cuda.get_device_capability()[0] >= 8 if cuda else (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    side, rates = side or (8192 if cuda else 2048), {}
    for dtype in (torch.float32, torch.bfloat16) if has else (torch.float32,):
        a = torch.randn(side, side, device=device).to(dtype)
        seconds = [timed(lambda a=a: a @ a) for _ in range(6)][1:]
        rates[str(dtype).removeprefix("torch.")] = float(f"{2 * side**3 / statistics.median(seconds):.4g}")
    return rates


def profiled(work: Callable[[], object], memory: bool = False):
    """`torch.profiler` around one call."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write lines of its own
    kinds = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * torch.cuda.is_available()]
    with torch.profiler.profile(activities=kinds, profile_memory=memory) as profile:
        work()
        synchronize()
    return profile


def operators(work: Callable[[], object], most: int = 8) -> dict[str, float]:
    """Shares of the time by operator (its own, without what it calls), the dearest first."""
    kind = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    times = {e.key: getattr(e, kind) for e in profiled(work).key_averages()}
    total, first = sum(times.values()) or 1, sorted(times, key=times.get, reverse=True)[:most]
    return {name: round(times[name] / total, 3) for name in first} | {
        "all others": round(1 - sum(times[name] for name in first) / total, 3)}


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes of tensors that a call holds at once beyond those held before it, by torch's count of allocations."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    events = [e for e in profiled(work, memory=True).profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))
