"""Before a 7B model is fetched: what a profile needs (parameters, memory, tokens, download, disk) and how long it takes.

Memory follows from shapes (`memory`). Hours are arithmetic over assumed speeds (`CARDS`), not measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from . import data
from .config import DOMAINS, Profile, UserError, real_data_dir
from .memory import GIB, RESERVE, SCORED, STAGES, TITLE, cache_bytes, count, full_tokens, memories, patches, skeleton, trainables
from .vision import source


class Card(NamedTuple):
    """Memory a process can have, and speeds assumed to be reached: a share of the makers' figures for half precision
    (T4 65, A100 312, H100 989 TFLOP/s; 320, 1,555, 3,350 GB/s): 30, 40 and 35 % of the first, 60 % of the second."""

    name: str
    gib: float
    tflops: float
    gb_s: float


CARDS = {"t4": Card("T4, 16 GB", 14.6, 19.5, 190), "a100": Card("A100, 40 GB", 39.4, 125, 930),
         "h100": Card("H100, 80 GB", 79.1, 346, 2000)}


class Work(NamedTuple):
    """What is to be done: images and items of stage 1, training examples, their mean prompt, dialogues to answer."""

    source: str
    images: int
    items: int
    examples: int
    prompt: float
    test: int
    described: float  # mean tokens of a description


# Seconds that a pass takes at least, training or answering: the host starts its kernels one by one. Measured on an H200 with
# random weights (results/bench/nvidia-h200-paper-gpu.json): steps of 2 and 3 passes took 0.31 and 0.55 s whatever their length
# up to 2,048 tokens, a batch of answers 1.1 s for about 15 passes. Other hosts differ.
LEAST = {"train": 0.16, "answer": 0.07}

# Where the data is not there. Images: one replication's count (Linhao0301/LaViC_Pratice). The rest was counted in the
# published valid and test files: items are a lower bound, examples eight times those of one split (8:1:1).
ASSUMED = Work("assumed (LAVIC_DATA is not set): counts of the published valid and test files, one replication's 81,000 images",
               81_000, 11_250, 17_564, 890, 1_970, 115)
# One replication, domain Home, one A100 (yousef-moustafa/ds8008-group8-lavic), HR@1 / VR by images an item.
LEVERS = {"1 image an item": ".1662/.9651 against .2443/.9919 with all images (one replication, Home)",
          "2 images an item": ".2469/.9973 against .2443/.9919 with all images (one replication, Home)",
          "1 epoch of stage 1": "no replication says", "half the training dialogues": "no replication says"}


def refuse(profile: Profile, card: Card, stages: Sequence[str] = STAGES) -> None:
    """UserError, one line with the numbers, where one of the stages does not fit the card."""
    for stage, parts in memories(profile).items():
        if stage in stages and parts["total"] + RESERVE > card.gib:
            most = ", ".join(f"{name} {value:.1f}" for name, value in parts.items() if value >= 0.1 and name != "total")
            raise UserError(f"profile {profile.name} does not fit a card of {card.gib:g} GiB ({card.name}): {stage} needs "
                            f"{parts['total']:.1f} GiB ({most}) and {RESERVE:g} in reserve; use smaller batches or profile t4")


def present() -> Card | None:
    """The card of this machine, with the speeds of the known card whose name is in its name (of a T4 otherwise)."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    known = next((card for key, card in CARDS.items() if key in found.name.lower()), CARDS["t4"])
    return known._replace(name=found.name, gib=round(found.total_memory / GIB, 1))


def refuse_here(profile: Profile, stage: str) -> None:
    """`refuse` for a stage about to begin and the card of this machine, if there is one: before anything is loaded."""
    if card := present():
        source(profile)  # says so first where there is no such model
        refuse(profile, card, (stage,))


def work(profile: Profile, root: Path | None) -> Work:
    """What is to be done: from the mini world's sizes, from the published data in `root`, or as stated in ASSUMED."""
    stage = profile.distillation
    if profile.world:
        world, domains = profile.world, len(DOMAINS)
        items = domains * world.train_shards * world.shard_items
        images = items if stage.images_per_item == 1 else round(items * (1 + world.p_extra_image))
        return Work("the rendered world's sizes; prompts counted at the longest", images, items, domains * world.train_dialogues,
                    profile.recommendation.max_length, domains * world.test_dialogues, stage.max_new_tokens)
    found = ASSUMED
    if root is not None:
        from . import inspection

        splits = inspection.present(root)
        table = inspection.dialogue_table(root, profile.prompts)
        prompts = inspection.prompt_lengths(root, table, profile.prompts)["5 [CLS] an item"]
        pairs = table.groupby("split")["truths"].sum()
        ids = {a for domain, split in splits for d in data.read_dialogues(root, domain, split)
               for a in (*d.candidates_st, *d.gt_items)}
        trained = "train" in pairs
        found = Work("counted in the published files" + ("" if trained else "; the training file is not there: 8 times a split"),
                     ASSUMED.images, len(ids), int(pairs["train"] if trained else 8 * pairs.mean()),
                     float(prompts.clip(upper=profile.recommendation.max_length).mean()),
                     int((table["split"] == "test").sum()),
                     float(inspection.mistral_tokens([r.description for r in data.read_stage1_valid(root)]).mean()))
        if (root / "item2meta_train.json").is_file():
            images = [len(item.images) for item in data.read_catalogue(root).values()]
            return found._replace(images=sum(min(n, stage.images_per_item or n) for n in images), items=len(images))
    if stage.images_per_item:
        found = found._replace(images=min(found.images, stage.images_per_item * found.items))
    return found._replace(source=found.source + "; items without the catalogue are those of the dialogues, a lower bound")


def hours(profile: Profile, todo: Work, card: Card) -> dict[str, float]:
    """Expected hours by stage, all domains: 2 FLOP a parameter and token for a pass; a training step has two passes (back
    through frozen weights to activations), three with checkpointing; attention's own products are left out (under 5 %).

    A pass takes at least the time to read the weights, and `LEAST`; 4-bit weights are unpacked, written and read first. Writing
    token by token is reading weights and cache. Decoding images is assumed to keep up.
    """
    bare = skeleton(profile.model_path)
    config, n, one, two = bare.config, count(bare), profile.distillation, profile.recommendation
    half, tiles = (2 if profile.dtype == "half" else 4), patches(config)

    def passes(number: int, seen: float, read: float, least: float = LEAST["answer"]) -> float:
        """Seconds of that many passes of one batch: tokens through the vision side and through the language model."""
        compute = 2 * (n.vision * seen + n.language * read) / (card.tflops * 1e12)
        traffic = half * (n.vision * (seen > 0) + n.language * (read > 0)) / (card.gb_s * 1e9)
        unpack = 4.56 * n.quantisable / (card.gb_s * 1e9) if profile.quantize_4bit and read else 0
        return number * max(max(compute, traffic) + unpack, least)

    def write(rows: int, tokens: float, length: float) -> float:
        kept = cache_bytes(config.text_config, half, rows * length)
        return tokens * (passes(1, 0, rows) + kept / (card.gb_s * 1e9))

    described, b = TITLE / 2 + todo.described, one.teacher_batch_size
    length = full_tokens(config) + TITLE / 2
    teacher = todo.images / b * (passes(1, b * tiles, b * length) + write(b, todo.described, length))
    teacher *= one.descriptions == "write"  # else they come with the data
    b = one.batch_size
    student = one.epochs * todo.images / b * passes(2 + one.gradient_checkpointing, b * tiles, b * described,
                                                               LEAST["train"])
    b = two.batch_size
    tuned = two.epochs * todo.examples / b * passes(2 + two.gradient_checkpointing, 0, b * todo.prompt, LEAST["train"])
    b = two.eval_batch_size
    answers = todo.test / b * (passes(1, 0, b * (todo.prompt + SCORED)) + write(b, 12, todo.prompt))
    encoded = todo.items / 64 * passes(1, 64 * tiles, 0)
    return {stage: seconds / 3600 for stage, seconds in
            (("teacher", teacher), ("distillation", student), ("encoding items", encoded), ("recommendation", tuned),
             ("inference", answers))}


def levers(profile: Profile, todo: Work, card: Card) -> list[dict]:
    """Cheap ways to be done sooner: hours saved, and what a replication says was lost by it."""
    base, one = hours(profile, todo, card), profile.distillation
    saved = {}
    for images in (1, 2):
        if one.images_per_item is None and images * todo.items < todo.images:
            less = hours(profile, todo._replace(images=images * todo.items), card)
            saved[f"{images} image{'s' if images > 1 else ''} an item"] = sum(base.values()) - sum(less.values())
    if one.epochs > 1:
        saved["1 epoch of stage 1"] = base["distillation"] * (1 - 1 / one.epochs)
    saved["half the training dialogues"] = base["recommendation"] / 2
    return [{"lever": name, "hours saved": round(h, 1), "HR@1/VR": LEVERS[name]} for name, h in saved.items()]


def disk_gb(profile: Profile, todo: Work) -> dict[str, float]:
    """What lies on the disk, in GB. An image: 60 kB, 500 pixels wide as the shop serves it (assumed). Items' vectors are
    float32; an adapter is kept with the optimizer's states in its checkpoints (two of stage 1)."""
    config, sizes = skeleton(profile.model_path).config, trainables(profile)
    vectors = 2 * todo.items * 5 * config.text_config.hidden_size * 4
    adapters = 3 * 12 * sizes["distillation"] + len(DOMAINS) * 3 * 16 * sizes["recommendation"]
    parts = {"model": profile.download_gb * 1e9, "images": 60e3 * todo.images * (profile.world is None), "vectors": vectors,
             "adapters and checkpoints": adapters}
    return {name: round(value / 1e9, 2) for name, value in parts.items()}


def plan(profile: Profile, gpu: str | None = None) -> dict:
    """Everything `show` prints. Raises UserError where the profile does not fit the card named or present."""
    if gpu is not None and gpu.lower() not in CARDS:
        raise UserError(f"--gpu {gpu}: use one of {', '.join(CARDS)}")
    card = CARDS[gpu.lower()] if gpu else present()
    if card:
        refuse(profile, card)
    todo, needs = work(profile, real_data_dir()), memories(profile)
    cards = {c.name: c for c in ([card] if card else CARDS.values())}
    fits = {name: all(parts["total"] + RESERVE <= c.gib for parts in needs.values()) for name, c in cards.items()}
    able = {name: c for name, c in cards.items() if fits[name]}
    slowest = min(able.values() or cards.values(), key=lambda c: c.tflops)
    return {"profile": profile.name, "model": profile.model, "revision": profile.revision,
            "parameters": count(skeleton(profile.model_path)).all, "trainable": trainables(profile),
            "download_gb": profile.download_gb, "disk_gb": disk_gb(profile, todo), "work": todo._asdict(),
            "tokens": {"stage 1, an epoch": round(todo.images * (TITLE / 2 + todo.described)),
                       "stage 2, an epoch": round(todo.examples * todo.prompt), "inference": round(todo.test * todo.prompt)},
            "memory_gib": needs,
            "fits": fits,
            "hours": {name: {s: round(h, 2) for s, h in hours(profile, todo, c).items()} for name, c in able.items()},
            "levers": {"card": slowest.name, "rows": levers(profile, todo, slowest)}}


def show(found: dict) -> None:
    """The plan as text."""
    import pandas as pd

    print(f"{found['profile']}: {found['model']}" + (f" at {found['revision'][:12]}" if found["revision"] else ""))
    print(f"parameters {found['parameters']:,}; trained: " + ", ".join(f"{k} {v:,}" for k, v in found["trainable"].items()))
    disk, w = found["disk_gb"], found["work"]
    print(f"download {found['download_gb']:g} GB; disk {sum(disk.values()):.1f} GB ("
          + ", ".join(f"{name} {size:g}" for name, size in disk.items()) + ")")
    print(f"work: {w['images']:,} images of stage 1, {w['items']:,} items, {w['examples']:,} training examples of "
          f"{w['prompt']:.0f} tokens, {w['test']:,} test dialogues\n  [{w['source']}]")
    print("tokens: " + ", ".join(f"{k} {v:,}" for k, v in found["tokens"].items()))
    text = {"index": True, "float_format": "{:.2f}".format, "na_rep": "-"}
    print(f"\npeak memory, GiB (and {RESERVE:g} in reserve); fits: "
          + ", ".join(f"{name} {'yes' if ok else 'NO'}" for name, ok in found["fits"].items()))
    print(pd.DataFrame(found["memory_gib"]).T.to_string(**text))
    print("\nexpected hours, all domains (speeds assumed, not measured)")
    print(pd.DataFrame(found["hours"]).to_string(**text))
    print(f"\nlevers, {found['levers']['card']}")
    print(pd.DataFrame(found["levers"]["rows"]).to_string(index=False))
