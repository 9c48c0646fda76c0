"""`bench gpu`: seconds and peak memory of a profile's true model, with random weights, on a card.

On a machine with a card and 16 GB of main memory (t4 also: pip install -r requirements-gpu.lock):

    for p in paper t4; do CUDA_VISIBLE_DEVICES=0 python -m lavic_utils bench gpu --profile $p; done

Nothing is downloaded and nothing is learnt. Training goes through the stages' own trainers, answers
through `recommendation.read`. Each peak stands beside what `memory` foresees.
"""

from __future__ import annotations

import copy
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers import LlavaNextForConditionalGeneration, TrainerCallback

from lavic_utils import loading, training, vision
from lavic_utils.bench.memory import GIB, SCORED, TITLE, full_tokens, memories, skeleton
from lavic_utils.bench.plan import ASSUMED
from lavic_utils.bench.speed import result_file, spread, synchronize, timed
from lavic_utils.config import PACKAGE, Profile, UserError, load_profile
from lavic_utils.distillation import VISION_LINEAR, Student
from lavic_utils.provenance import provenance, write_json
from lavic_utils.recommendation import LANGUAGE_LINEAR, Recommender, read
from lavic_utils.training import IGNORE

WARM, REPEATS = 2, 5
CANDIDATES, TILES, PAD = 10, 5, 0  # tiles of a square image
ONE, TWO, ANSWERS = "distillation", "recommendation", "inference"


# ---------------------------------------------------------------- what is measured
class Case(NamedTuple):
    """One measurement: its stage, and of a row the tokens, how many are visual, how many scored."""

    name: str
    stage: str
    tokens: int
    visual: int
    target: int
    checkpointing: bool = False


def cases(profile: Profile, config) -> list[Case]:
    """Prompts of mean length (`plan.ASSUMED`), for the time; the longest, for the peak memory."""
    one, two = profile.distillation, profile.recommendation
    described = min(one.max_new_tokens, round(ASSUMED.described))
    longest = min(one.max_length, TITLE + one.max_new_tokens)
    mean = min(two.max_length, round(ASSUMED.prompt))
    cls, entire = CANDIDATES * TILES, CANDIDATES * full_tokens(config)
    kept = one.gradient_checkpointing
    found = [
        Case("stage 1, mean text", ONE, TITLE // 2 + described, TILES, described, kept),
        Case("stage 1, longest text", ONE, longest, TILES, longest - TITLE, kept),
    ]
    for name, tokens, visual in (
        ("[CLS], mean prompt", mean, cls),
        ("[CLS], longest prompt", two.max_length, cls),
        ("entire tokens, mean prompt", mean - cls + entire, entire),
    ):
        row = Case(f"stage 2, {name}", TWO, tokens, visual, two.max_new_tokens)
        if two.gradient_checkpointing:
            found.append(row._replace(checkpointing=True))
            row = row._replace(name=f"{row.name}, no checkpointing")
        found.append(row)
    found.append(Case("answers, mean prompt", ANSWERS, mean, cls, 0))
    found.append(Case("answers, longest prompt", ANSWERS, two.max_length, cls, 0))
    return found


def settled(profile: Profile, case: Case) -> Profile:
    """The profile, its stage's settings for prompts of this length."""
    name = ONE if case.stage == ONE else TWO
    changed = {"max_length": case.tokens, "gradient_checkpointing": case.checkpointing}
    return profile.model_copy(update={name: getattr(profile, name).model_copy(update=changed)})


def predicted(profile: Profile, case: Case) -> float:
    """GiB that `memory` foresees for this case."""
    cuda = torch.cuda.is_available()
    return memories(settled(profile, case), cuda)[case.stage]["total"]


# ---------------------------------------------------------------- model and inputs
def random_model(profile: Profile) -> LlavaNextForConditionalGeneration:
    """What `loading.load` makes of the profile's checkpoint (dtype, 4 bits), its weights random."""
    bare, dtype = skeleton(profile.model_path), loading.dtype(profile)
    weights = {}
    for name, parameter in bare.named_parameters():
        values = torch.randn(parameter.shape, dtype=dtype, device=loading.device()).mul_(0.02)
        if "norm" in name and name.endswith("weight"):
            values.add_(1)
        weights[name] = values.cpu()
    given = {"config": copy.deepcopy(bare.config), "state_dict": weights}
    load = partial(LlavaNextForConditionalGeneration.from_pretrained, **given)
    kind = SimpleNamespace(from_pretrained=lambda _, **options: load(None, **options))
    return loading.load(kind, profile, str(PACKAGE), None)  # any folder: nothing is read there


def prompts(config, rows: int, case: Case) -> dict[str, Any]:
    """A batch as the stages' collators make it, of random ids; stage 1's has pixels (square images
    of noise, as `vision.pixels` gives them), the others' stored visual tokens."""
    text, image = config.text_config, config.image_token_id
    visual = min(case.visual, case.tokens - case.target - 1)
    ids = torch.randint(1, text.vocab_size - 1, (rows, case.tokens))
    ids[ids == image] += 1
    ids[:, :visual] = image
    labels = ids.clone()
    labels[:, : case.tokens - case.target] = IGNORE
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    if case.stage == ONE:
        side = config.vision_config.image_size
        batch["pixel_values"] = torch.randn(rows, TILES, 3, side, side)
        batch["image_sizes"] = torch.tensor([[2 * side, 2 * side]] * rows)
    else:
        batch["visual"] = [torch.randn(visual, text.hidden_size) for _ in range(rows)]
    return batch


# ---------------------------------------------------------------- measuring
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
    """Seconds of so many steps of the stage's own trainer (forward, backward, clipping, AdamW)."""
    stage, clock = getattr(settled(profile, case), case.stage), Clock()
    batch = prompts(tuned.config, stage.batch_size, case)
    tuned.gradient_checkpointing_disable()
    with tempfile.TemporaryDirectory() as folder:
        trainer = training.StageTrainer(
            model=tuned,
            processing_class=SimpleNamespace(pad_token_id=PAD),
            callbacks=[clock],
            data_collator=lambda rows: batch,
            train_dataset=[0] * (stage.batch_size * stage.gradient_accumulation * steps),
            args=training.training_arguments(
                Path(folder),
                stage,
                profile.seed,
                loading.dtype(profile),
                max_steps=steps,
                save_strategy="no",
            ),
        )
        try:
            trainer.train()
        finally:
            trainer.release()  # the next trainer finds the model as this one did
    return clock.seconds


@torch.inference_mode()
def answers(tuned, profile: Profile, case: Case, steps: int) -> list[float]:
    """Seconds of so many batches at their worst: ten ids read, and then whole answers written."""
    two, text = profile.recommendation, tuned.config.text_config
    batch = prompts(tuned.config, two.eval_batch_size, case)
    placed, mask = batch["input_ids"].to(tuned.device), batch["attention_mask"].to(tuned.device)
    shape = (two.eval_batch_size, CANDIDATES, SCORED // CANDIDATES)
    ids = torch.randint(1, text.vocab_size - 1, shape).tolist()
    length = dict.fromkeys(("min_new_tokens", "max_new_tokens"), two.max_new_tokens)

    def work() -> None:
        embeds = vision.place(tuned, placed, batch["visual"], PAD)
        read(tuned, embeds, mask, ids)
        tuned.generate(inputs_embeds=embeds, attention_mask=mask, pad_token_id=PAD, **length)

    return [timed(work) for _ in range(steps)]


def measure(tuned, profile: Profile, case: Case) -> dict[str, Any]:
    """A row of the file: seconds of all steps after the first WARM, as `spread` (none where memory
    ran out), and the peak GiB of the card's tensors (none without a card)."""
    if case.stage == ANSWERS:
        run, rows = answers, profile.recommendation.eval_batch_size
    else:
        run, rows = train, getattr(profile, case.stage).batch_size
    found = {**case._asdict(), "rows": rows, "predicted_gib": predicted(profile, case)}
    found |= {"seconds": None, "measured_gib": None}
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        found["seconds"] = spread(run(tuned, profile, case, WARM + REPEATS)[WARM:])
        if cuda:
            found["measured_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
    except torch.OutOfMemoryError:
        pass
    loading.free()  # a trainer holds itself in a circle
    return found


# ---------------------------------------------------------------- the file
def bench_gpu(name: str) -> Path:
    """`measure_all` of a profile by its name. UserError where no card is here."""
    if not torch.cuda.is_available():
        raise UserError(
            f"bench gpu --profile {name}: no CUDA card is here; run it on a machine with one (of "
            "16 GB or more for t4, of 80 GB for paper)"
        )
    return measure_all(load_profile(name))


def measure_all(profile: Profile) -> Path:
    """Measure everything; the path of `results/bench/CARD-PROFILE-gpu.json`."""
    torch.manual_seed(profile.seed)
    try:
        model = random_model(profile)
    except torch.OutOfMemoryError:
        raise UserError(
            f"profile {profile.name}: its weights alone do not fit this card; use a larger card, "
            "or profile t4"
        ) from None
    about = provenance(profile, profile.seed, "none") | {"tier": "random weights"}
    path = result_file(about["machine"], quick=False, ending=f"-{profile.name}-gpu")
    found = {
        "provenance": about,
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "four_bits": "bitsandbytes, NF4" if profile.quantize_4bit else "not asked for",
        "steps": [],
    }

    def measure_stage(tuned, stage: str) -> None:
        for case in cases(profile, model.config):
            if case.stage == stage:
                found["steps"].append(measure(tuned, profile, case))
                write_json(path, found)  # what is measured is kept

    student = training.add_adapter(Student(model), profile.distillation.lora, VISION_LINEAR)
    measure_stage(student, ONE)
    model.set_attn_implementation("sdpa")  # as `loading.load` asks for it
    student.unload()
    tuned = training.add_adapter(Recommender(model), profile.recommendation.lora, LANGUAGE_LINEAR)
    measure_stage(tuned, TWO)
    measure_stage(model.eval(), ANSWERS)
    return path
