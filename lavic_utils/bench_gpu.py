"""What a card does with a profile's true model and random weights: seconds and peak memory of steps, answers and encoding.

On a machine with a card (and 16 GB of main memory; for t4 also bitsandbytes: pip install 'lavic-companion[gpu]'):

    export CUDA_VISIBLE_DEVICES=0; for p in paper t4; do python -m lavic_utils bench gpu --profile $p; done

Nothing is downloaded and nothing is learnt. Training goes through the stages' own trainers, answers through
`recommendation.Read`. Each peak stands beside what `memory` foresees. Profile t4 is capped at 15 GB, as a T4 is.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration, TrainerCallback
from transformers.utils import is_bitsandbytes_available

from lavic_utils import training, vision
from lavic_utils.bench import machine_name
from lavic_utils.bench_model import spread, synchronize, timed
from lavic_utils.config import ROOT, Profile, UserError, load_profile
from lavic_utils.distillation import IGNORE, VISION_LINEAR, Student
from lavic_utils.memory import GIB, SCORED, TITLE, count, full_tokens, memories, skeleton
from lavic_utils.plan import ASSUMED
from lavic_utils.provenance import provenance, write_json
from lavic_utils.recommendation import LANGUAGE_LINEAR, Read, Recommender

CAPS = {"t4": 15e9}  # bytes a process may take: 16 GB less what the driver and the context hold
WARM, REPEATS, HALVINGS = 2, 5, 6
ITEMS, CANDIDATES, TILES = 64, 10, 5  # items encoded at once, as `Run.tokens` does; square images
PAD = 0


class Case(NamedTuple):
    """One measurement. `stage`: distillation, recommendation or inference. Per row: tokens, of which visual, of which scored."""

    name: str
    stage: str
    tokens: int
    visual: int
    target: int
    checkpointing: bool = False


def cases(profile: Profile, config) -> list[Case]:
    """Prompts of mean length (`plan.ASSUMED`), which give the time, and the profile's longest, which give the peak."""
    one, two = profile.distillation, profile.recommendation
    described, longest = min(one.max_new_tokens, round(ASSUMED.described)), min(one.max_length, TITLE + one.max_new_tokens)
    mean, cls, entire = min(two.max_length, round(ASSUMED.prompt)), CANDIDATES * TILES, CANDIDATES * full_tokens(config)
    found = [Case("stage 1, mean text", "distillation", TITLE // 2 + described, TILES, described, one.gradient_checkpointing),
             Case("stage 1, longest text", "distillation", longest, TILES, longest - TITLE, one.gradient_checkpointing)]
    for name, tokens, visual in (("[CLS], mean prompt", mean, cls), ("[CLS], longest prompt", two.max_length, cls),
                                 ("entire tokens, mean prompt", mean - cls + entire, entire)):
        for kept in sorted({two.gradient_checkpointing, False}, reverse=True):
            label = f"stage 2, {name}" + (", no checkpointing" if two.gradient_checkpointing and not kept else "")
            found.append(Case(label, "recommendation", tokens, visual, two.max_new_tokens, kept))
    return [*found, Case("answers, mean prompt", "inference", mean, cls, 0),
            Case("answers, longest prompt", "inference", two.max_length, cls, 0)]


def section(profile: Profile, case: Case):
    """The profile's own settings of the case's stage, for prompts of this length."""
    name = "distillation" if case.stage == "distillation" else "recommendation"
    return name, getattr(profile, name).model_copy(
        update={"max_length": case.tokens, "gradient_checkpointing": case.checkpointing})


def predicted(profile: Profile, case: Case) -> float:
    """GiB that `memory` foresees for this case."""
    name, own = section(profile, case)
    return memories(profile.model_copy(update={name: own}), torch.cuda.is_available())[case.stage]["total"]


def random_model(profile: Profile) -> LlavaNextForConditionalGeneration:
    """The profile's architecture as `vision.load` makes it of a checkpoint (dtype, 4 bits, kernels), with random weights."""
    bare = skeleton(profile.model_path)
    dtype = vision.half() if profile.dtype == "half" else torch.float32

    def drawn(name: str, shape: torch.Size) -> Tensor:
        values = torch.randn(shape, dtype=dtype, device=vision.device()).mul_(0.02)
        return (values.add_(1) if "norm" in name and name.endswith("weight") else values).cpu()

    def from_pretrained(_, **options):
        return LlavaNextForConditionalGeneration.from_pretrained(
            None, config=copy.deepcopy(bare.config), state_dict={n: drawn(n, p.shape) for n, p in bare.named_parameters()},
            **options)
    return vision.load(SimpleNamespace(from_pretrained=from_pretrained), profile, "random weights", None)


def prompts(config, rows: int, case: Case) -> dict[str, Any]:
    """A batch as the stages' collators make it, of random ids; stage 1's has pixels, the others' stored visual tokens."""
    image, visual = config.image_token_id, min(case.visual, case.tokens - case.target - 1)
    ids = torch.randint(1, config.text_config.vocab_size - 1, (rows, case.tokens))
    ids[ids == image] += 1
    ids[:, :visual] = image
    labels = ids.clone()
    labels[:, :case.tokens - case.target] = IGNORE
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    if case.stage == "distillation":
        values, sizes = pixels(config, rows)
        return batch | {"pixel_values": values, "image_sizes": sizes}
    return batch | {"visual": [torch.randn(visual, config.text_config.hidden_size) for _ in range(rows)]}


def pixels(config, rows: int) -> tuple[Tensor, Tensor]:
    """Square images of noise, as `vision.pixels` gives them."""
    side = config.vision_config.image_size
    return torch.randn(rows, TILES, 3, side, side), torch.tensor([[2 * side, 2 * side]] * rows)


class Clock(TrainerCallback):
    """Seconds of each step, the accelerator waited for."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **_):
        synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def train(tuned, profile: Profile, case: Case, steps: int) -> list[float]:
    """Seconds of so many steps of the stage's own trainer (forward, backward, clipping, AdamW) on one batch."""
    _, stage = section(profile, case)
    batch, clock = prompts(tuned.config, stage.batch_size, case), Clock()
    tuned.gradient_checkpointing_disable()
    with tempfile.TemporaryDirectory() as folder:
        trainer = training.StageTrainer(
            model=tuned, processing_class=SimpleNamespace(pad_token_id=PAD), callbacks=[clock], data_collator=lambda rows: batch,
            train_dataset=[0] * (stage.batch_size * stage.gradient_accumulation * steps),
            args=training.training_arguments(Path(folder), stage, profile.seed, vision.dtype(profile), max_steps=steps,
                                             save_strategy="no"))
        try:
            trainer.train()
        finally:  # the next trainer finds the model as this one did
            trainer.accelerator.unwrap_model(tuned, keep_fp32_wrapper=False)
            tuned.__dict__.pop("_is_accelerate_prepared", None)  # left there, the next case would train without autocast
            tuned.zero_grad()
    return clock.seconds


@torch.inference_mode()
def answers(tuned, profile: Profile, case: Case, steps: int) -> list[float]:
    """Seconds of so many batches of answers: prompts read, ten ids scored, an answer of full length written."""
    two = profile.recommendation
    batch = prompts(tuned.config, two.eval_batch_size, case)
    placed, mask = batch["input_ids"].to(tuned.device), batch["attention_mask"].to(tuned.device)
    ids = torch.randint(1, tuned.config.text_config.vocab_size - 1, (two.eval_batch_size, CANDIDATES, SCORED // CANDIDATES))

    def work() -> None:
        read = Read(tuned, vision.place(tuned, placed, batch["visual"], PAD), mask)
        read.score(ids.tolist())
        read.greedy(two.max_new_tokens, end=-1)  # never ends early
    return [timed(work) for _ in range(steps)]


def attempt(work: Callable[[], list[float]]) -> tuple[list[float] | None, float | None]:
    """(seconds, peak GiB of tensors on the card); seconds None where memory ran out, peak None without a card."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = work()
    except torch.OutOfMemoryError:
        seconds = None
    if not cuda:
        return seconds, None
    peak = torch.cuda.max_memory_allocated() / GIB
    gc.collect()  # a trainer holds itself in a circle
    torch.cuda.empty_cache()
    return seconds, peak


def measure(tuned, profile: Profile, case: Case) -> dict[str, Any]:
    """One row of the file. Where memory runs out: that, and the longest prompt found to fit by halving."""
    run = answers if case.stage == "inference" else train
    name, own = section(profile, case)
    seconds, peak = attempt(lambda: run(tuned, profile, case, WARM + REPEATS))
    foreseen = predicted(profile, case)
    found = {**case._asdict(), "rows": own.eval_batch_size if case.stage == "inference" else own.batch_size,
             "predicted_gib": foreseen, "measured_gib": None, "ratio": None, "seconds": None, "out_of_memory": None}
    if seconds:
        return found | {"seconds": spread(seconds[WARM:]), "measured_gib": peak and round(peak, 3),
                        "ratio": peak and round(peak / foreseen, 3)}
    fits, fails = case.target + 1, case.tokens
    for _ in range(HALVINGS):
        half = case._replace(tokens=(fits + fails) // 2)
        fits, fails = (half.tokens, fails) if attempt(lambda half=half: run(tuned, profile, half, 1))[0] else (fits, half.tokens)
    longest = fits if fits > case.target + 1 else None
    return found | {"out_of_memory": f"out of memory at {case.tokens} tokens", "longest_that_fits": longest}


def encoding(student) -> dict[str, Any]:
    """Items a second from pixels to stored [CLS] tokens."""
    values, sizes = pixels(student.config, ITEMS)
    names = [str(i) for i in range(ITEMS)]
    seconds, peak = attempt(lambda: [timed(lambda: vision.encode(student, names, values, sizes)) for _ in range(WARM + REPEATS)])
    return {"items_at_once": ITEMS, "measured_gib": peak and round(peak, 3),
            "items_a_second": spread([ITEMS / s for s in seconds[WARM:]]) if seconds else None}


def small(profile: Profile) -> Profile:
    """The profile with the mini model and its lengths, one row at a time: the same code in seconds."""
    mini, update = load_profile("mini"), {}
    for name in ("distillation", "recommendation"):
        checkpointing = getattr(profile, name).gradient_checkpointing
        update[name] = getattr(mini, name).model_copy(
            update={"batch_size": 1, "eval_batch_size": 1, "gradient_checkpointing": checkpointing})
    return profile.model_copy(update={"model": mini.model, **update})


def bench_gpu(name: str = "paper", tiny: bool = False) -> Path:
    """Measure everything; the path of `results/bench/CARD-PROFILE-gpu.json` (tiny: `results/bench-quick/`)."""
    profile, cuda = load_profile(name), torch.cuda.is_available()
    if not (cuda or tiny):
        raise UserError(f"bench gpu --profile {profile.name}: no CUDA card is here; run it on a machine with one (16 GB or more "
                        "for t4, 80 GB for paper), or add --tiny, which tries the same code with the mini model on this machine")
    profile = small(profile) if tiny else profile
    four, cap = "not asked for", CAPS.get(profile.name)
    if profile.quantize_4bit:
        four = "bitsandbytes, NF4"
        if not (cuda and is_bitsandbytes_available()):
            four, cap = "not measured: " + ("bitsandbytes is not installed" if cuda else "needs a CUDA card"), None
            profile = profile.model_copy(update={"quantize_4bit": False})  # and the cap would leave the weights no room
    if cuda and cap:
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / torch.cuda.get_device_properties(0).total_memory))
    torch.manual_seed(profile.seed)
    try:
        model = random_model(profile)
    except torch.OutOfMemoryError:
        raise UserError(f"profile {profile.name}: its weights alone do not fit this card; use a larger card, or profile t4"
                        ) from None
    about = provenance(profile, profile.seed, "none") | {"tier": "random weights", "tiny": tiny}
    found = {"kind": "random weights", "provenance": about, "card": torch.cuda.get_device_name() if cuda else None,
             "cap_gb": cap and cap / 1e9, "four_bits": four, "dtype": str(model.dtype).removeprefix("torch."),
             "parameters": count(skeleton(profile.model_path)).all, "warm_up": WARM, "steps": [], "encoding": None}
    results = Path(os.environ.get("LAVIC_RESULTS", ROOT / "results")) / ("bench-quick" if tiny else "bench")
    path = results / f"{machine_name(about['machine'])}-{profile.name}-gpu.json"

    def steps(tuned, stage: str) -> None:
        for case in (case for case in cases(profile, model.config) if case.stage == stage):
            found["steps"].append(measure(tuned, profile, case))
            write_json(path, found)  # what is measured is kept
    student = training.add_adapter(Student(model), profile.distillation.lora, VISION_LINEAR)
    steps(student, "distillation")
    model.set_attn_implementation("sdpa")  # as a model has it that is loaded to encode or to answer
    found["encoding"] = encoding(model.eval())
    student.unload()
    steps(training.add_adapter(Recommender(model), profile.recommendation.lora, LANGUAGE_LINEAR), "recommendation")
    model.set_attn_implementation("sdpa")
    steps(model.eval(), "inference")
    return path


def gpu_block(path: Path) -> str:
    """The README's lines on a card, in Markdown, from a file that `bench_gpu` wrote."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    about, lines = found["provenance"], []
    for row in found["steps"]:
        s, gib = row["seconds"], row["measured_gib"]
        took = f"{s['median']:.3g} ({s['low']:.3g} to {s['high']:.3g})" if s else (
            f"{row['out_of_memory']}; {row['longest_that_fits'] or 'no length tried'} fits")
        lines.append(f"| {row['name']} | {row['rows']} x {row['tokens']} | {took} | "
                     f"{'–' if gib is None else format(gib, '.1f')} | {row['predicted_gib']:.1f} |")
    cap = f", capped at {found['cap_gb']:g} GB" if found["cap_gb"] else ""
    return "\n".join([
        "| step or batch | rows x tokens | seconds (range) | peak, GiB | foreseen |", "| --- | --- | --- | --- | --- |",
        *lines, "",
        f"*Random weights: speed and memory only. Profile {about['profile']}, {found['card'] or 'no card'}{cap}; 4 bits: "
        f"{found['four_bits']}; torch {about['versions']['torch']}; code {about['code_hash'][:7]}.*", ""])
