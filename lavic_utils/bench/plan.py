"""Before a 7B model is fetched: what a profile needs (memory, tokens, disk) and how long it takes.

Memory follows from shapes (`memory`). Hours are arithmetic over assumed speeds (`CARDS`), not
measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lavic_utils import methods
from lavic_utils.bench import memory
from lavic_utils.bench.memory import RESERVE, count, memories, number_bytes, skeleton, trainables
from lavic_utils.config import DOMAINS, Profile, UserError
from lavic_utils.experiment import Experiment
from lavic_utils.vision import source


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
# One replication, domain Home, one A100 (yousef-moustafa/ds8008-group8-lavic), by images an item.
LEVERS = {
    "1 image an item": ".1662/.9651 against .2443/.9919 with all images (one replication, Home)",
    "2 images an item": ".2469/.9973 against .2443/.9919 with all images (one replication, Home)",
}


def refuse(profile: Profile, card: Card, stages: Sequence[str] = memory.STAGES) -> None:
    """UserError, one line with the numbers, where one of the stages does not fit the card."""
    for stage, parts in memories(profile).items():
        total = parts.pop("total")
        if stage in stages and total + RESERVE > card.gib:
            most = ", ".join(f"{name} {gib:.1f}" for name, gib in parts.items() if gib >= 0.1)
            raise UserError(
                f"profile {profile.name} does not fit a card of {card.gib:g} GiB ({card.name}): "
                f"{stage} needs {total:.1f} GiB ({most}) and {RESERVE:g} in reserve; use smaller "
                "batches or profile t4"
            )


def present() -> Card | None:
    """This machine's card, with the speeds of the known card of that name (of a T4 otherwise)."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    known = CARDS["t4"]
    for key, card in CARDS.items():
        if key in found.name.lower():
            known = card
    return known._replace(name=found.name, gib=round(found.total_memory / memory.GIB, 1))


def refuse_here(profile: Profile, stage: str) -> None:
    """`refuse` for a stage about to begin and this machine's card, before anything is loaded."""
    card = present()
    if card:
        source(profile)  # says so first where there is no such model
        refuse(profile, card, (stage,))


def work(profile: Profile) -> Work:
    """What is to be done: by the mini world's sizes, or ASSUMED; with the profile's own images."""
    found, world, images = ASSUMED, profile.world, profile.distillation.images_per_item
    if world:
        items = len(DOMAINS) * world.train_shards * world.shard_items
        found = Work(
            "the rendered world's sizes; prompts at the longest",
            round(items * (1 + world.p_extra_image)),
            items,
            len(DOMAINS) * world.train_dialogues,
            profile.recommendation.max_length,
            len(DOMAINS) * world.test_dialogues,
            profile.distillation.max_new_tokens,
        )
    return found._replace(images=min(found.images, (images or found.images) * found.items))


def pass_seconds(
    profile: Profile, card: Card, seen: float, read: float, kind: str = "answer"
) -> float:
    """Seconds of a pass of one batch: `seen` tokens through the vision side, `read` through the
    language model. 2 FLOP a parameter and token; attention's own products are left out (under 5 %).
    At least the time to read the weights, and `LEAST`; 4-bit weights are unpacked, written and read
    first."""
    n, half = count(skeleton(profile.model_path)), number_bytes(profile)
    compute = 2 * (n.vision * seen + n.quantisable * read) / (card.tflops * 1e12)
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
    config = skeleton(profile.model_path).config
    one, two = profile.distillation, profile.recommendation
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

    rows, passes = two.batch_size, 2 + two.gradient_checkpointing
    batch = passes * pass_seconds(profile, card, 0, rows * todo.prompt, "train")
    seconds["recommendation"] = two.epochs * todo.examples / rows * batch

    rows = two.eval_batch_size
    batch = pass_seconds(profile, card, 0, rows * (todo.prompt + memory.SCORED))
    batch += write_seconds(profile, card, rows, 12, todo.prompt)
    seconds["inference"] = todo.test / rows * batch
    return {stage: value / 3600 for stage, value in seconds.items()}


def levers(profile: Profile, todo: Work, card: Card) -> list[dict[str, Any]]:
    """Cheap ways to be done sooner: hours saved, and what a replication says was lost by it."""
    base, one, saved = hours(profile, todo, card), profile.distillation, {}
    for images, name in enumerate(LEVERS, start=1):
        fewer = todo._replace(images=images * todo.items)
        if one.images_per_item is None and fewer.images < todo.images:
            less = hours(profile, fewer, card)
            saved[name] = sum(base.values()) - sum(less.values())
    if one.epochs > 1:
        saved["1 epoch of stage 1"] = base["distillation"] * (1 - 1 / one.epochs)
    saved["half the training dialogues"] = base["recommendation"] / 2
    rows = []
    for name, less in saved.items():
        lost = LEVERS.get(name, "no replication says")
        rows.append({"lever": name, "hours saved": round(less, 1), "HR@1/VR": lost})
    return rows


def disk_gb(profile: Profile, todo: Work) -> dict[str, float]:
    """What lies on the disk, in GB. An image: 60 kB, 500 pixels wide as the shop serves it
    (assumed). Items' vectors are float32; an adapter is kept with the optimizer's states in its
    checkpoints (two of stage 1)."""
    config, sizes = skeleton(profile.model_path).config, trainables(profile)
    adapters = 3 * 12 * sizes["distillation"] + len(DOMAINS) * 3 * 16 * sizes["recommendation"]
    parts = {
        "model": profile.download_gb * 1e9,
        "images": 60e3 * todo.images * (profile.world is None),
        "vectors": 2 * todo.items * 5 * config.text_config.hidden_size * 4,
        "adapters and checkpoints": adapters,
    }
    return {name: round(value / 1e9, 2) for name, value in parts.items()}


def plan(profile: Profile, gpu: str | None = None) -> dict[str, Any]:
    """Everything `show` prints. UserError where the profile does not fit the card asked about."""
    if gpu is not None and gpu.lower() not in CARDS:
        raise UserError(f"--gpu {gpu}: use one of {', '.join(CARDS)}")
    card = CARDS[gpu.lower()] if gpu else present()
    if card:
        refuse(profile, card)
    todo, needs = work(profile), memories(profile)
    peak = max(parts["total"] for parts in needs.values()) + RESERVE
    cards = [card] if card else list(CARDS.values())
    able = [c for c in cards if peak <= c.gib]
    slowest = min(able or cards, key=lambda c: c.tflops)
    spent = {}
    for c in able:
        spent[c.name] = {stage: round(h, 2) for stage, h in hours(profile, todo, c).items()}
    return {
        "profile": profile.name,
        "model": profile.model,
        "revision": profile.revision,
        "parameters": count(skeleton(profile.model_path)).all,
        "trainable": trainables(profile),
        "download_gb": profile.download_gb,
        "disk_gb": disk_gb(profile, todo),
        "work": todo._asdict(),
        "memory_gib": needs,
        "fits": {c.name: c in able for c in cards},
        "hours": spent,
        "levers": {"card": slowest.name, "rows": levers(profile, todo, slowest)},
    }


def show(found: dict[str, Any]) -> None:
    """The plan as text."""
    import pandas as pd

    disk, todo, trained = found["disk_gb"], found["work"], found["trainable"]
    parts = ", ".join(f"{name} {size:g}" for name, size in disk.items())
    fits = ", ".join(f"{name} {'yes' if ok else 'NO'}" for name, ok in found["fits"].items())
    text = {"float_format": "{:.2f}".format, "na_rep": "-"}
    print(
        f"{found['profile']}: {found['model']} {(found['revision'] or '')[:12]}\n"
        f"parameters {found['parameters']:,}; trained: "
        + ", ".join(f"{stage} {number:,}" for stage, number in trained.items())
        + f"\ndownload {found['download_gb']:g} GB; disk {sum(disk.values()):.1f} GB ({parts})\n"
        f"work: {todo['images']:,} images of stage 1, {todo['items']:,} items, "
        f"{todo['examples']:,} training examples of {todo['prompt']:.0f} tokens, "
        f"{todo['test']:,} test dialogues\n  [{todo['source']}]\n"
        f"\npeak memory, GiB (and {RESERVE:g} in reserve); fits: {fits}\n"
        + pd.DataFrame(found["memory_gib"]).T.to_string(**text)
        + "\n\nexpected hours, all domains (speeds assumed, not measured)\n"
        + pd.DataFrame(found["hours"]).to_string(**text)
        + f"\n\nlevers, {found['levers']['card']}\n"
        + pd.DataFrame(found["levers"]["rows"]).to_string(index=False)
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
        said += f"\nhours and memory: python -m lavic_utils plan --profile {run.profile.name}"
    return said
