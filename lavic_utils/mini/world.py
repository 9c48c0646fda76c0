"""The rendered mini world: a small data set in the format of Reddit-Amazon, made from a seed.

Each domain has one pool of items for each training shard, one for valid and one for test; a
dialogue and its candidates stay inside one pool. Titles say only brand, feature and kind; the looks
show only in the images. `candidates_st`: the ten titles of the pool nearest to what can be searched
by text, the opening and the brand wish (sentence embeddings). `candidates_gpt_large`: the ten best
of BM25 for the whole dialogue, in place of the second published list. Both are shuffled.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lavic_utils.config import DOMAINS, UserError, World
from lavic_utils.data import SPLITS, read_dialogues
from lavic_utils.mini import words
from lavic_utils.mini.drawing import draw_product
from lavic_utils.provenance import file_hash, kept, write_json, write_kept, write_text
from lavic_utils.retrieval import bm25_rank, cosine_rank, sbert_embed

FACTS = "mini_facts.json"  # what is true of every item and dialogue
KEY = "mini_key.txt"  # no .json: an edit that changes the key but no file leaves `data_hash` alone
SOURCES = ("words.yaml", "words.py", "drawing.py", "world.py")
ASPECTS = ((1.0, 1.0), (1.0, 0.5), (0.5, 1.0), (1.0, 0.75))  # an image's width and height, in sides
ASPECT_WEIGHTS = (0.6, 0.14, 0.13, 0.13)
TURN_WEIGHTS = (0.30, 0.15, 0.25, 0.10, 0.12, 0.08)  # of dialogues with 1 to 6 turns
P_TWO_WISHES = 0.4  # chance that several visual wishes are said in two sentences
P_ASK_BACK = 0.8  # chance that a helper asks for more where the seeker still has a turn
P_WANDER = 0.25  # chance that a seeker's turn also says something that does not matter
NO_FEATURE = "good"  # said in place of a feature that the seeker does not name
BRAND_WISH = "i like {brand}."

Facts = dict[str, str]
Pools = dict[str, dict[str, Facts]]  # "home/test" -> ASIN -> facts of the item


@dataclass(frozen=True)
class Talk:
    """A row of the data set, the facts behind it, its text query, and the pool of its items."""

    row: dict[str, Any]
    truth: dict[str, Any]  # wanted (looks), kind, feature and brand (None: not said), new_wording
    query: str
    pool: dict[str, Facts]


def polish(text: str) -> str:
    """Repair what filling a template can break: "a insulated" and "good good"."""
    text = text.replace(f"{NO_FEATURE} {NO_FEATURE}", NO_FEATURE)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


# ---- items and images
def _pool(rng: random.Random, domain: str, count: int, held_out: bool) -> list[Facts]:
    """Items with every (kind, feature) equally often, in random order; all else is uniform, among
    the looks held out from all training or among the others."""
    pairs = [(kind, feature) for kind in words.KINDS[domain] for feature in words.FEATURES[domain]]
    chosen, items = [], []
    while len(chosen) < count:
        chosen += rng.sample(pairs, len(pairs))
    for kind, feature in chosen[:count]:
        looks = dict.fromkeys(words.ATTRIBUTES, "")
        while not all(looks.values()) or words.held_out(looks) != held_out:
            looks = {name: rng.choice(values) for name, values in words.ATTRIBUTES.items()}
        brand = rng.choice(words.BRANDS[domain])
        items.append({"domain": domain, "kind": kind, "brand": brand, "feature": feature, **looks})
    rng.shuffle(items)
    return items


def make_items(world: World) -> Pools:
    """The pools "beauty/train0", ..., "beauty/valid", "beauty/test", "beauty/stage1" and so on."""
    pools: dict[str, list[Facts]] = {}
    for domain in DOMAINS:
        shards = [f"train{shard}" for shard in range(world.train_shards)]
        for name in [*shards, "valid", "test", "stage1"]:  # stage1: items of no dialogue
            count = world.stage1_valid_items if name == "stage1" else world.shard_items
            rng = random.Random(f"{world.seed}/items/{domain}/{name}")
            held_out = not name.startswith("train")
            pools[f"{domain}/{name}"] = _pool(rng, domain, count, held_out)
    chunks, size = words.ID_CHUNKS, len(words.ID_CHUNKS)
    total = sum(len(pool) for pool in pools.values())
    codes = iter(random.Random(f"{world.seed}/ids").sample(range(size * size), total))
    found: Pools = {key: {} for key in pools}
    for key, pool in pools.items():
        for facts in pool:
            code = next(codes)
            found[key][f"B0{chunks[code // size]}{chunks[code % size]}"] = facts
    return found


def image_names(world: World, asins: Iterable[str]) -> dict[str, list[str]]:
    """ASIN -> names of its image files, one to three."""
    rng, names = random.Random(f"{world.seed}/counts"), {}
    for asin in asins:
        count = 1 + sum(rng.random() < world.p_extra_image for _ in range(2))
        names[asin] = [f"{asin}_{k}.jpg" for k in range(count)]
    return names


def _spoiled(world: World, pools: Pools, images: dict[str, list[str]]) -> tuple[list, list]:
    """File names that are (missing, corrupt): half from test pools, half from training pools."""
    rng = random.Random(f"{world.seed}/spoiled")
    names: dict[str, list[str]] = {"test": [], "train": []}
    for key, pool in pools.items():
        for split in names:
            if f"/{split}" in key:
                names[split] += [name for asin in pool for name in images[asin]]
    wanted = world.missing_images + world.corrupt_images
    chosen = rng.sample(names["test"], min(wanted // 2, len(names["test"])))
    chosen += rng.sample(names["train"], wanted - len(chosen))
    rng.shuffle(chosen)
    return sorted(chosen[: world.missing_images]), sorted(chosen[world.missing_images :])


def _write_image(path: Path, facts: Facts, world: World, corrupt: bool) -> None:
    rng = random.Random(f"{world.seed}/image/{path.name}")
    across, down = rng.choices(ASPECTS, ASPECT_WEIGHTS)[0]
    size = (round(world.image_side * across), round(world.image_side * down))
    draw_product(facts, size, rng).save(path, "JPEG", quality=88)
    if corrupt:  # cut short, or not an image at all
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 3] if rng.random() < 0.5 else rng.randbytes(300))


# ---- dialogues
def _look_wishes(rng: random.Random, truth: dict[str, Any]) -> list[str]:
    """One sentence with all visual wishes, or two sentences that share them."""
    names = list(truth["wanted"])
    groups = [names]
    if len(names) > 1 and rng.random() < P_TWO_WISHES:
        rng.shuffle(names)
        cut = rng.randint(1, len(names) - 1)
        groups = [names[:cut], names[cut:]]
    style, sentences = "new" if truth["new_wording"] else "seen", []
    for group, template in zip(groups, rng.sample(words.LOOKS[style], len(groups)), strict=True):
        wanted = {name: truth["wanted"][name] for name in group}
        phrase = words.looks_phrase(wanted, words.PARTS[truth["kind"]])
        sentences.append(template.format(looks=phrase))
    return sentences


def _tagged(rng: random.Random, seeker: list[list[str]], turns: int) -> str:
    """The seeker's sentences in every other turn; in between, helpers ask back or wander."""
    lines = []
    for turn in range(turns):
        if turn % 2:
            asks = turn + 1 < turns and rng.random() < P_ASK_BACK
            said = rng.choice(words.ASK_BACK if asks else words.WANDER)
            lines.append(f"<comment>{said}</comment>\n")
        else:
            sentences = list(seeker[turn // 2])
            if not sentences or rng.random() < P_WANDER:
                sentences.append(rng.choice(words.SEEKER_WANDER))
            lines.append(f"<submission>{polish(' '.join(sentences))}</submission>\n")
    return "".join(lines)


def write_context(rng: random.Random, truth: dict[str, Any]) -> tuple[str, str]:
    """(dialogue with turn tags, the part of it that titles can answer) for one request."""
    turns = rng.choices(range(1, 7), TURN_WEIGHTS)[0]
    seeker: list[list[str]] = [[] for _ in range((turns + 1) // 2)]  # sentences of each turn
    opening = rng.choice(words.OPENINGS["new" if truth["new_wording"] else "seen"])
    asked = [opening.format(kind=truth["kind"], feature=truth["feature"] or NO_FEATURE)]
    seeker[0].append(asked[0])
    if truth["brand"]:
        asked.append(BRAND_WISH.format(brand=truth["brand"]))
        rng.choice(seeker).append(asked[1])
    wishes = _look_wishes(rng, truth)
    slots = sorted(rng.choices(range(len(seeker)), k=len(wishes)))
    for slot, wish in zip(slots, wishes, strict=True):
        seeker[slot].append(wish)
    return _tagged(rng, seeker, turns), polish(" ".join(asked))


def wishes_met(facts: Facts, truth: dict[str, Any], looks: bool = True) -> list[bool]:
    """For each wish of a request, whether an item meets it: kind, feature, brand; then, with
    `looks`, the visual ones."""
    asked = {name: truth[name] for name in ("kind", "feature", "brand") if truth[name]}
    if looks:
        asked |= truth["wanted"]
    return [facts[name] == value for name, value in asked.items()]


def _dialogue(rng: random.Random, world: World, pool: dict[str, Facts], p_new: float) -> Talk:
    target = rng.choice(list(pool))
    facts = pool[target]
    count = rng.choices((1, 2, 3), world.p_properties)[0]
    names = rng.sample(list(words.ATTRIBUTES), count)
    truth = {
        "wanted": {name: facts[name] for name in words.ATTRIBUTES if name in names},
        "kind": facts["kind"],
        "feature": facts["feature"] if rng.random() < world.p_feature_mentioned else None,
        "brand": facts["brand"] if rng.random() < world.p_brand_mentioned else None,
        "new_wording": rng.random() < p_new,
    }
    truths = [target]
    if rng.random() < world.p_several_truths:
        truths += [asin for asin in pool if asin != target and all(wishes_met(pool[asin], truth))]
    context, query = write_context(rng, truth)
    answer = rng.choice(words.ANSWERS).format(title=words.title(facts))
    row = {"context": context, "context_items": [], "gt": answer, "gt_items": truths}
    return Talk(row, truth, query, pool)


def make_dialogues(world: World, pools: Pools, domain: str, split: str) -> list[Talk]:
    """A split's dialogues, without candidates; those for training take the shards in turn."""
    rng = random.Random(f"{world.seed}/dialogues/{domain}/{split}")
    shards = [f"train{i}" for i in range(world.train_shards)] if split == "train" else [split]
    mine = [pools[f"{domain}/{shard}"] for shard in shards]
    p_new = world.p_new_wording if split == "test" else 0.0
    count = getattr(world, f"{split}_dialogues")
    return [_dialogue(rng, world, mine[i % len(mine)], p_new) for i in range(count)]


def add_candidates(rng: random.Random, talks: list[Talk]) -> None:
    """Give every row its two candidate lists; all texts are embedded at once."""
    pools = {id(talk.pool): talk.pool for talk in talks}
    texts = [talk.query for talk in talks]
    for pool in pools.values():
        texts += [words.title(facts) for facts in pool.values()]
    vectors = dict(zip(texts, sbert_embed(texts), strict=True))
    for key, pool in pools.items():
        asins, titles = list(pool), [words.title(facts) for facts in pool.values()]
        mine = [talk for talk in talks if id(talk.pool) == key]
        queries = np.stack([vectors[talk.query] for talk in mine])
        near = cosine_rank(queries, np.stack([vectors[title] for title in titles]))
        tags = re.compile(r"\s*</?(?:submission|comment)>\s*")
        contexts = [tags.sub(" ", talk.row["context"]).strip() for talk in mine]
        alike = bm25_rank(contexts, titles)
        for field, ranking in (("candidates_st", near), ("candidates_gpt_large", alike)):
            for talk, best in zip(mine, ranking[:, :10], strict=True):
                names = sorted(asins[i] for i in best)  # near-ties may swap on another machine
                talk.row[field] = rng.sample(names, 10)


# ---- files
LINK = "https://example.com/"


def _write_lines(path: Path, rows: Iterable[Any]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _fill(root: Path, world: World) -> None:
    pools = make_items(world)
    items = {asin: facts for pool in pools.values() for asin, facts in pool.items()}
    images = image_names(world, items)
    missing, corrupt = _spoiled(world, pools, images)
    catalogue, stage1 = {}, []
    for key, pool in pools.items():
        held_back = key.endswith("/stage1")
        folder = root / ("valid_images" if held_back else "train_images")
        folder.mkdir(exist_ok=True)
        for asin, facts in pool.items():
            title = words.title(facts)
            for name in images[asin]:
                if name not in missing:
                    _write_image(folder / name, facts, world, name in corrupt)
                if held_back:
                    row = {"title": title, "image_name": name, "image": LINK + name}
                    stage1.append({**row, "image_description_llava_cleaned": ""})
            if not held_back:
                catalogue[asin] = {
                    "title": title,
                    "categories": [DOMAINS[facts["domain"]], facts["kind"]],
                    "features": [facts["feature"]],
                    "description": [],
                    "images": [{"large": LINK + name} for name in images[asin]],
                    "image_descriptions_llava_cleaned": {},
                }
    write_json(root / "item2meta_train.json", catalogue)
    _write_lines(root / "item2meta_valid.jsonl", stage1)
    talks = {(d, s): make_dialogues(world, pools, d, s) for d in DOMAINS for s in SPLITS}
    every = [talk for some in talks.values() for talk in some]
    add_candidates(random.Random(f"{world.seed}/candidates"), every)
    truths = {}
    for (domain, split), some in talks.items():
        _write_lines(root / DOMAINS[domain] / f"{split}.jsonl", [talk.row for talk in some])
        truths[f"{domain}/{split}"] = [talk.truth for talk in some]
    facts = {"items": items, "dialogues": truths, "missing": missing, "corrupt": corrupt}
    write_json(root / FACTS, facts)


def world_key(world: World) -> str:
    """16 hex digits over the settings and the source files that draw and write the world."""
    digest = hashlib.sha256(world.model_dump_json().encode())
    for name in SOURCES:
        digest.update((Path(__file__).parent / name).read_text(encoding="utf-8").encode())
    return digest.hexdigest()[:16]


def stands(root: Path, world: World) -> bool:
    """Is this very world in the folder, with every file as it was written?"""
    found = kept(root / KEY)
    return found is not None and found["key"] == world_key(world)


def make_world(root: Path | str, world: World) -> Path:
    """Write the world to `root` unless it stands there; returns `root`. Replaces no other data."""
    root = Path(root)
    if stands(root, world):
        return root
    ours = any((root / name).is_file() for name in (KEY, FACTS))
    if not ours and (root.is_file() or root.is_dir() and any(root.iterdir())):
        raise UserError(f"{root}: holds other files; choose an empty folder for the mini world")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        fresh, old = Path(scratch) / "new", Path(scratch) / "old"
        fresh.mkdir()
        _fill(fresh, world)
        names = [path.relative_to(fresh).as_posix() for path in fresh.rglob("*") if path.is_file()]
        files = {name: file_hash(fresh / name) for name in sorted(names)}
        write_kept(fresh / KEY, {"key": world_key(world), "files": files})
        if root.exists():
            root.replace(old)
        fresh.replace(root)
        shutil.rmtree(old, ignore_errors=True)
    return root


# ---- what can be reached
def _expected_hit(row: Any, truth: dict[str, Any], items: dict[str, Facts], looks: bool) -> float:
    """Chance that a uniform choice among the candidates that meet most wishes is a true item."""
    met = {asin: sum(wishes_met(items[asin], truth, looks)) for asin in row.candidates_st}
    best = [asin for asin, count in met.items() if count == max(met.values())]
    return float(np.mean([asin in row.gt_items for asin in best]))


def oracles(root: Path | str) -> list[dict[str, Any]]:
    """Per domain, over test conversations: recall of both candidate lists, and the expected HR@1
    of chance, of a reader that knows all that was asked in words (`text`), and of one that also
    sees the looks (`vision`)."""
    facts, rows = json.loads((Path(root) / FACTS).read_text(encoding="utf-8")), []
    for domain in DOMAINS:
        dialogues = read_dialogues(root, domain, "test")
        shares = []  # of each dialogue
        for row, truth in zip(dialogues, facts["dialogues"][f"{domain}/test"], strict=True):
            found = set(row.gt_items) & set(row.candidates_st)
            share = {
                "recall": bool(found),
                "recall_gpt_large": bool(set(row.gt_items) & set(row.candidates_gpt_large)),
                "chance": len(found) / 10,
                "text": _expected_hit(row, truth, facts["items"], looks=False),
                "vision": _expected_hit(row, truth, facts["items"], looks=True),
            }
            shares.append(share)
        means = {name: float(np.mean([share[name] for share in shares])) for name in shares[0]}
        rows.append({"domain": domain, "conversations": len(shares), **means})
    return rows
