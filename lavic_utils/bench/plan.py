"""Before a 7B model is fetched: what a profile needs (memory, tokens, disk) and how long it takes.

Memory follows from shapes (`memory`). Hours are arithmetic over assumed speeds (`CARDS`), not
measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pandas as pd
import torch
from psutil import virtual_memory

from lavic_utils import methods
from lavic_utils.bench import memory
from lavic_utils.bench.memory import RESERVE, count, memories, number_bytes, skeleton, trainables
from lavic_utils.config import DOMAINS, Profile, UserError
from lavic_utils.experiment import Experiment
from lavic_utils.loading import four_bits, free, source, stand_in
from lavic_utils.methods import ENTIRE, LONG


class Card(NamedTuple):
    """Memory a process can have, and speeds assumed to be reached: a share of the makers' figures
    for half precision (T4 65, A100 312, H100 989 TFLOP/s; 320, 1,555, 3,350 GB/s): 30, 40 and 35 %
    of the first, 60 % of the second."""

    name: str
    gib: float
    tflops: float
    gb_s: float


CARDS = {
    "t4": Card("T4, 16 GB", 14.6, 19.5, 190),
    "a100": Card("A100, 40 GB", 39.4, 125, 930),
    "h100": Card("H100, 80 GB", 79.1, 346, 2000),
}
CANDIDATES, TILES = 10, 5


class Work(NamedTuple):
    """What is to be done: images and items of stage 1, training examples, tokens of their mean
    prompt, dialogues to answer, mean tokens of a description."""

    source: str
    images: int
    items: int
    examples: int
    prompt: float
    test: int
    described: float


# The published data. Images: one replication's count (Linhao0301/LaViC_Pratice). Items: the paper's
# Table 1. The rest was counted in the published valid and test files, in Mistral's tokens; examples
# are eight times those of one split (8:1:1).
ASSUMED = Work(
    "the published data: one replication's 81,000 images, the paper's items, and counts of the "
    "valid and test files",
    images=81_000,
    items=15_226,
    examples=17_564,
    prompt=890,
    test=1_970,
    described=115,
)
# Seconds that a pass takes at least, training or answering: the host starts its kernels one by one.
# Measured on an H200 with random weights (results/bench/nvidia-h200-paper-gpu.json): steps of 2 and
# 3 passes took 0.31 and 0.55 s whatever their length up to 2,048 tokens, a batch of answers 1.1 s
# for about 15 passes. Other hosts differ.
LEAST = {"train": 0.16, "answer": 0.07}


def refuse(
    profile: Profile,
    card: Card,
    stages: Sequence[str] = memory.STAGES,
    longest: int | None = None,
) -> None:
    """UserError, one line with the numbers, where one of the stages does not fit the card. Answers
    are judged by prompts of at most `longest` tokens (None: the profile's `max_length`)."""
    for stage, parts in memories(profile, longest=longest).items():
        total = parts.pop("total")
        if stage in stages and total + RESERVE > card.gib:
            most = ", ".join(f"{name} {gib:.1f}" for name, gib in parts.items() if gib >= 0.1)
            asked = f" for a prompt of {longest:,} tokens" if longest else ""
            raise UserError(
                f"profile {profile.name} does not fit {card.gib:g} GiB ({card.name}): "
                f"{stage} needs {total:.1f} GiB{asked} ({most}) and {RESERVE:g} in reserve; use "
                "smaller batches, profile t4 or a larger card"
            )


def present() -> Card | None:
    """This machine's card, with the speeds of the known card of that name (of a T4 otherwise)."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    known = next((card for key, card in CARDS.items() if key in found.name.lower()), CARDS["t4"])
    return known._replace(name=found.name, gib=round(found.total_memory / memory.GIB, 1))


def refuse_here(profile: Profile, stages: Sequence[str]) -> None:
    """`refuse` for some stages and this machine's card (none: its main memory), before anything is
    downloaded or loaded. UserError too where 4 bits are asked for and cannot be had here."""
    if profile.quantize_4bit:
        four_bits(profile)
    if profile.model_path not in memory.CONFIGS:
        source(profile)  # its shapes stand in its files
    if stand_in(profile):
        return  # a tenth of the size or less: the model's own shapes say nothing of it
    main = Card("main memory; no card is here", round(virtual_memory().total / memory.GIB, 1), 0, 0)
    refuse(profile, present() or main, stages)


def refuse_now(profile: Profile, stage: str, tokens: Callable[[], int] | None = None) -> None:
    """`refuse` for a stage that begins, by what of the card is free now: models that are still in
    use there, and other programs, count. `tokens`: counts the longest prompt to be answered."""
    card = present()
    if card and not stand_in(profile):
        free()
        other, _ = torch.cuda.mem_get_info()
        left = other + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        left = round(left / memory.GIB, 1)
        name = f"what is free of the {card.gib:g} of {card.name}"
        card = card._replace(name=name, gib=left) if left + RESERVE < card.gib else card
        refuse(profile, card, (stage,), tokens() if tokens else None)


def work(profile: Profile) -> Work:
    """ASSUMED, with the profile's own images an item."""
    most = profile.distillation.images_per_item or ASSUMED.images
    return ASSUMED._replace(images=min(ASSUMED.images, most * ASSUMED.items))


def pass_seconds(
    profile: Profile,
    card: Card,
    seen: float,
    read: float,
    kind: str = "answer",
    length: float = 0,
) -> float:
    """Seconds of a pass of one batch: `seen` tokens through the vision side, `read` through the
    language model, in rows of `length`. 2 FLOP a parameter and token, and the language model's
    attention, causal. At least the time to read the weights, and `LEAST`; 4-bit weights are
    unpacked, written and read first."""
    n, half = count(skeleton(profile.model_path)), number_bytes(profile)
    text = skeleton(profile.model_path).config.text_config
    attention = 2 * text.num_hidden_layers * text.hidden_size * length * read
    compute = 2 * (n.vision * seen + n.quantisable * read) + attention
    compute /= card.tflops * 1e12
    weights = n.vision * (seen > 0) + n.quantisable * (read > 0)
    unpacked = 4.56 * n.quantisable * (profile.quantize_4bit and read > 0)
    seconds = max(compute, half * weights / (card.gb_s * 1e9)) + unpacked / (card.gb_s * 1e9)
    return max(seconds, LEAST[kind])


def write_seconds(profile: Profile, card: Card, rows: int, tokens: float, length: float) -> float:
    """Seconds to write so many tokens one by one: weights and cache are read for each."""
    config, half = skeleton(profile.model_path).config, number_bytes(profile)
    cache = memory.cache_bytes(config.text_config, half, rows * length)
    return tokens * (pass_seconds(profile, card, 0, rows) + cache / (card.gb_s * 1e9))


def hours(profile: Profile, todo: Work, card: Card) -> dict[str, float]:
    """Expected hours by stage, all domains. A training step is two passes (back through frozen
    weights to activations), three with checkpointing. Decoding images is assumed to keep up."""
    config, one = skeleton(profile.model_path).config, profile.distillation
    tiles, full = memory.patches(config), memory.full_tokens(config)
    title, seconds = memory.TITLE / 2, {}

    rows = one.teacher_batch_size
    batch = pass_seconds(profile, card, rows * tiles, rows * (full + title))
    batch += write_seconds(profile, card, rows, todo.described, full + title)
    seconds["teacher"] = todo.images / rows * batch * (one.descriptions == "write")

    rows, passes = one.batch_size, 2 + one.gradient_checkpointing
    length = title + todo.described
    batch = passes * pass_seconds(profile, card, rows * tiles, rows * length, "train")
    seconds["distillation"] = one.epochs * todo.images / rows * batch

    seconds["encoding items"] = todo.items / 64 * pass_seconds(profile, card, 64 * tiles, 0)
    return {k: value / 3600 for k, value in seconds.items()} | stage_two(profile, todo, card)


def stage_two(profile: Profile, todo: Work, card: Card, images: int = 0) -> dict[str, float]:
    """Hours of stage 2 and its answers; `images`: how many are encoded anew for each prompt."""
    two, seen = profile.recommendation, images * memory.patches(skeleton(profile.model_path).config)
    rows, passes, length = two.batch_size, 2 + two.gradient_checkpointing, todo.prompt
    batch = passes * pass_seconds(profile, card, 0, rows * length, "train", length)
    batch += pass_seconds(profile, card, rows * seen, 0) * (seen > 0)
    found = {"recommendation": two.epochs * todo.examples / rows * batch / 3600}

    rows = two.at_once(round(length))
    batch = pass_seconds(profile, card, rows * seen, rows * (length + memory.SCORED), length=length)
    batch += write_seconds(profile, card, rows, 12, length)
    return found | {"inference": todo.test / rows * batch / 3600}


def trained(profile: Profile, todo: Work, card: Card) -> dict[str, float]:
    """Hours of all that `reproduce` trains, a method each, its answers included; LaViC's are with
    stage 1. The ablation with entire tokens is left out where it does not fit the card."""
    found, shown = {"LaViC": sum(hours(profile, todo, card).values())}, CANDIDATES * TILES
    blind = todo._replace(prompt=todo.prompt - shown)
    found["LaViC w/o images"] = sum(stage_two(profile, blind, card).values())
    found["LaViC w/o self-distillation"] = sum(stage_two(profile, todo, card).values())
    needs = memories(profile)
    if max(needs[stage]["total"] for stage in LONG) + RESERVE <= card.gib:
        whole = profile.arm(ENTIRE)
        full = CANDIDATES * memory.full_tokens(skeleton(profile.model_path).config)
        prompt = min(blind.prompt + full, whole.recommendation.max_length)
        more = todo._replace(prompt=prompt)
        found["Entire tokens"] = sum(stage_two(whole, more, card, CANDIDATES).values())
    return found


def disk_gb(profile: Profile, todo: Work) -> dict[str, float]:
    """What lies on the disk, in GB. An image: 60 kB, 500 pixels wide as the shop serves it
    (assumed). Items' vectors are float32; an adapter is kept with the optimizer's states in its
    checkpoints (two of stage 1)."""
    config, sizes = skeleton(profile.model_path).config, trainables(profile)
    adapters = 3 * 12 * sizes["distillation"] + len(DOMAINS) * 3 * 16 * sizes["recommendation"]
    parts = {
        "model": profile.download_gb * 1e9,
        "images": 60e3 * todo.images,
        "vectors": 2 * todo.items * 5 * config.text_config.hidden_size * 4,
        "adapters and checkpoints": adapters,
    }
    return {name: round(value / 1e9, 2) for name, value in parts.items()}


def plan(profile: Profile, gpu: str | None = None) -> str:
    """What a profile needs, in words and tables. UserError where it does not fit the card asked
    about, and for the mini run: it fits everywhere."""
    if profile.world:
        raise UserError(f"profile {profile.name}: minutes on any machine; plan t4 or paper")
    if gpu is not None and gpu.lower() not in CARDS:
        raise UserError(f"--gpu {gpu}: use one of {', '.join(CARDS)}")
    card = CARDS[gpu.lower()] if gpu else present()
    if card:
        refuse(profile, card)
        if not any(key in card.name.lower() for key in CARDS):
            card = card._replace(name=f"{card.name}, its speeds unknown: hours are a T4's")
    todo, needs, fits, alone, spent = work(profile), memories(profile), [], {}, {}
    peak = max(needs[stage]["total"] for stage in memory.STAGES if stage in needs) + RESERVE
    for c in [card] if card else CARDS.values():
        fits.append(f"{c.name} {'yes' if peak <= c.gib else 'NO'}")
        if peak <= c.gib:
            alone[c.name], spent[c.name] = hours(profile, todo, c), trained(profile, todo, c)

    def table(frame: pd.DataFrame) -> str:
        return frame.to_string(float_format="{:.2f}".format, na_rep="-")

    disk = disk_gb(profile, todo)
    parts = ", ".join(f"{name} {size:g}" for name, size in disk.items())
    sizes = ", ".join(f"{stage} {size:,}" for stage, size in trainables(profile).items())
    return (
        f"{profile.name}: {profile.model} {(profile.revision or '')[:12]}\n"
        f"parameters {count(skeleton(profile.model_path)).all:,}; trained: {sizes}\n"
        f"download {profile.download_gb:g} GB; disk {sum(disk.values()):.1f} GB ({parts})\n"
        f"work: {todo.images:,} images of stage 1, {todo.items:,} items, {todo.examples:,} "
        f"training examples of {todo.prompt:.0f} tokens, {todo.test:,} test dialogues\n"
        f"  [{todo.source}]\n"
        f"\npeak memory, GiB (and {RESERVE:g} in reserve); fits: {', '.join(fits)}\n"
        f"{table(pd.DataFrame(needs).T)}\n\n"
        f"expected hours of LaViC alone, all domains (speeds assumed, not measured)\n"
        f"{table(pd.DataFrame(alone))}\n\n"
        f"and of all that `reproduce` trains, with its answers (-: does not fit the card)\n"
        f"{table(pd.DataFrame(spent))}"
    )


def foreseen(run: Experiment, method: str, domain: str, split: str, limit: int | None) -> str:
    """What `run` would download, train, ask and cost, in words."""
    chosen, dialogues = methods.find(method), run.dialogues(domain, split)[:limit]
    said = f"{chosen.name}, {domain}/{split}: {len(dialogues)} dialogues; "
    said += chosen.reason(run) or "all that it reads is here"
    if chosen.family == "proprietary":
        return f"{said}\nto ask: {chosen.ask(run, dialogues, dry_run=True)}"
    if isinstance(chosen, methods.Trained):
        folders = [run.folder / "stage1"] if chosen.tokens == "distilled" else []
        folders.append(run.tuned_folder(chosen.name, domain))
        left = [str(one) for one in folders if not (one / "result.json").is_file()]
        said += f"\nto train: {', '.join(left) or 'nothing, if what is kept is of these inputs'}"
        if not run.profile.world:
            said += f"\nhours and memory: python -m lavic_utils plan --profile {run.profile.name}"
    return said
