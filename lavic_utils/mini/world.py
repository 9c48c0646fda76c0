"""The rendered mini world: a small data set in the format of Reddit-Amazon, made from a seed.

Each domain has one pool of items for each training shard, one for valid and one for test; a dialogue and its
candidates stay inside one pool. Titles say only brand, feature and kind; the looks show only in the images.
`candidates_st`: the ten titles of the pool nearest to what can be searched by text, the opening and the brand wish
(sentence embeddings; short and often repeated texts, so it is quick). `candidates_gpt_large`: the ten best of BM25 for
the whole dialogue; it stands for the second published list. Both are shuffled.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lavic_utils import config
from lavic_utils.mini import words as wording
from lavic_utils.mini.drawing import draw_product
from lavic_utils.retrieval import bm25_rank, cosine_rank, sbert_embed

FACTS = "mini_facts.json"
ASPECTS = (
    (1.0, 1.0),
    (1.0, 0.5),
    (0.5, 1.0),
    (1.0, 0.75),
)  # width and height of an image, in sides
ASPECT_WEIGHTS = (0.6, 0.14, 0.13, 0.13)
TURN_WEIGHTS = (0.30, 0.15, 0.25, 0.10, 0.12, 0.08)  # of dialogues with 1 to 6 turns
P_WANDER = 0.25  # chance that a seeker's turn also says something that does not matter
NO_FEATURE = "good"  # said in place of a feature that the seeker does not name
BRAND_WISH = "i like {brand}."
SOURCES = ("config.py", "mini/drawing.py", "retrieval.py", "mini/words.py", "mini/world.py")

Facts = dict[str, str]
Row = dict[str, Any]


@dataclass(frozen=True)
class Talk:
    """A row of the data set, the facts behind it, its text query, and the pool of items it is about."""

    row: Row
    truth: Row
    query: str
    pool: dict[str, Facts]


def polish(text: str) -> str:
    """Repair what filling a template can break: "a insulated" and "good good"."""
    text = text.replace(f"{NO_FEATURE} {NO_FEATURE}", NO_FEATURE)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def title_of(facts: Facts) -> str:
    return wording.title(facts["brand"], facts["feature"], facts["kind"])


# ---- items and images
def _ids(rng: random.Random, count: int) -> list[str]:
    chunks, size = wording.ID_CHUNKS, len(wording.ID_CHUNKS)
    return [
        f"B0{chunks[code // size]}{chunks[code % size]}"
        for code in rng.sample(range(size * size), count)
    ]


def _pool(rng: random.Random, domain: str, count: int) -> list[Facts]:
    """`count` items with every (kind, feature) equally often, in random order; all other attributes uniform."""
    pairs = [
        (kind, feature) for kind in wording.KINDS[domain] for feature in wording.FEATURES[domain]
    ]
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count:
        chosen += rng.sample(pairs, len(pairs))
    items = []
    for kind, feature in chosen[:count]:
        looks = {name: rng.choice(values) for name, values in wording.ATTRIBUTES.items()}
        items.append(
            {
                "domain": domain,
                "kind": kind,
                "brand": rng.choice(wording.BRANDS[domain]),
                "feature": feature,
                **looks,
            }
        )
    rng.shuffle(items)
    return items


def make_items(world: config.World) -> dict[str, dict[str, Facts]]:
    """Pool name ("beauty/train0", "beauty/test", "beauty/stage1", ...) -> ASIN -> attributes."""
    pools: dict[str, list[Facts]] = {}
    for domain in config.DOMAINS:
        sizes = {f"train{shard}": world.shard_items for shard in range(world.train_shards)}
        sizes |= {
            "valid": world.shard_items,
            "test": world.shard_items,
            "stage1": world.stage1_valid_items,
        }
        for name, count in sizes.items():
            key = f"{domain}/{name}"
            pools[key] = _pool(random.Random(f"{world.seed}/items/{key}"), domain, count)
    ids = iter(_ids(random.Random(f"{world.seed}/ids"), sum(map(len, pools.values()))))
    return {key: {next(ids): facts for facts in pool} for key, pool in pools.items()}


def image_counts(world: config.World, asins: Iterable[str]) -> dict[str, int]:
    """ASIN -> number of images (1 to 3)."""
    rng = random.Random(f"{world.seed}/counts")
    return {asin: 1 + sum(rng.random() < world.p_extra_image for _ in range(2)) for asin in asins}


def _spoiled(
    world: config.World, items: dict[str, dict[str, Facts]], counts: dict[str, int]
) -> tuple[list, list]:
    """File names that are (missing, corrupt): half of each from test pools, half from training pools."""
    rng = random.Random(f"{world.seed}/spoiled")
    names = {
        split: [
            f"{asin}_{k}.jpg"
            for key, pool in items.items()
            if f"/{split}" in key
            for asin in pool
            for k in range(counts[asin])
        ]
        for split in ("test", "train")
    }
    wanted = world.missing_images + world.corrupt_images
    from_test = rng.sample(names["test"], min(wanted // 2, len(names["test"])))
    chosen = from_test + rng.sample(names["train"], wanted - len(from_test))
    rng.shuffle(chosen)
    return sorted(chosen[: world.missing_images]), sorted(chosen[world.missing_images :])


def _write_image(path: Path, facts: Facts, side: int, seed: str, corrupt: bool) -> None:
    rng = random.Random(seed)
    across, down = rng.choices(ASPECTS, ASPECT_WEIGHTS)[0]
    looks = [facts[name] for name in ("shape", "colour", "pattern", "accent")]
    image = draw_product(facts["kind"], *looks, (round(side * across), round(side * down)), rng)
    image.save(path, "JPEG", quality=88)
    if corrupt:  # cut short, or not an image at all
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 3] if rng.random() < 0.5 else rng.randbytes(300))


# ---- dialogues
def _wanted(rng: random.Random, world: config.World, facts: Facts) -> Facts:
    count = rng.choices((1, 2, 3), world.p_properties)[0]
    names = set(rng.sample(list(wording.ATTRIBUTES), count))
    return {name: facts[name] for name in wording.ATTRIBUTES if name in names}


def _look_wishes(rng: random.Random, wanted: Facts, part: str, style: str) -> list[str]:
    """One sentence with all visual wishes, or two sentences that share them."""
    names, groups = list(wanted), [list(wanted)]
    if len(names) > 1 and rng.random() < 0.4:
        rng.shuffle(names)
        cut = rng.randint(1, len(names) - 1)
        groups = [names[:cut], names[cut:]]
    phrases = [
        wording.looks_phrase({name: wanted[name] for name in group}, part) for group in groups
    ]
    return [
        template.format(looks=phrase)
        for template, phrase in zip(
            rng.sample(wording.LOOKS[style], len(phrases)), phrases, strict=True
        )
    ]


def _turns(rng: random.Random, seeker: list[list[str]], turns: int) -> str:
    """The tagged dialogue: the seeker's sentences in every other turn, helpers that ask back or wander in between."""
    lines = []
    for turn in range(turns):
        if turn % 2:
            asks = turn + 1 < turns and rng.random() < 0.8
            lines.append(
                f"<comment>{rng.choice(wording.ASK_BACK if asks else wording.WANDER)}</comment>\n"
            )
            continue
        said = list(seeker[turn // 2])
        if not said or rng.random() < P_WANDER:
            said.append(rng.choice(wording.SEEKER_WANDER))
        lines.append(f"<submission>{polish(' '.join(said))}</submission>\n")
    return "".join(lines)


def write_context(rng: random.Random, truth: Row) -> tuple[str, str]:
    """(dialogue with turn tags, its part that titles can answer) for one request: `kind`, `feature`, `brand`,
    `wanted` and `new_wording`."""
    style = "new" if truth["new_wording"] else "seen"
    turns = rng.choices(range(1, 7), TURN_WEIGHTS)[0]
    seeker: list[list[str]] = [[] for _ in range((turns + 1) // 2)]
    asked = [
        rng.choice(wording.OPENINGS[style]).format(
            kind=truth["kind"], feature=truth["feature"] or NO_FEATURE
        )
    ]
    seeker[0] += asked
    if truth["brand"]:
        asked.append(BRAND_WISH.format(brand=truth["brand"]))
        rng.choice(seeker).append(asked[-1])
    wishes = _look_wishes(rng, truth["wanted"], wording.PARTS[truth["kind"]], style)
    for slot, wish in zip(
        sorted(rng.choices(range(len(seeker)), k=len(wishes))), wishes, strict=True
    ):
        seeker[slot].append(wish)
    return _turns(rng, seeker, turns), polish(" ".join(asked))


def satisfies(facts: Facts, truth: Row, looks: bool = True) -> bool:
    """Whether an item meets all that was asked: kind, feature, brand and, with `looks`, the visual wishes."""
    asked = {name: truth[name] for name in ("kind", "feature", "brand") if truth[name]}
    return all(
        facts[name] == value for name, value in (asked | (truth["wanted"] if looks else {})).items()
    )


def _dialogue(
    rng: random.Random, world: config.World, pool: dict[str, Facts], new_share: float
) -> Talk:
    target = rng.choice(list(pool))
    facts = pool[target]
    truth: Row = {
        "wanted": _wanted(rng, world, facts),
        "kind": facts["kind"],
        "feature": facts["feature"] if rng.random() < world.p_feature_mentioned else None,
        "brand": facts["brand"] if rng.random() < world.p_brand_mentioned else None,
        "new_wording": rng.random() < new_share,
    }
    others = [asin for asin in pool if asin != target and satisfies(pool[asin], truth)]
    several = rng.random() < world.p_several_truths
    context, query = write_context(rng, truth)
    answer = rng.choice(wording.ANSWERS).format(title=title_of(facts))
    row = {
        "context": context,
        "context_items": [],
        "gt": answer,
        "gt_items": [target, *(others if several else [])],
    }
    return Talk(row, truth, query, pool)


def make_dialogues(
    world: config.World, items: dict[str, dict[str, Facts]], domain: str, split: str
) -> list[Talk]:
    """The dialogues of one split, without candidates; those for training take the shards in turn."""
    rng = random.Random(f"{world.seed}/dialogues/{domain}/{split}")
    shards = [f"train{i}" for i in range(world.train_shards)] if split == "train" else [split]
    pools = [items[f"{domain}/{shard}"] for shard in shards]
    count = {
        "train": world.train_dialogues,
        "valid": world.valid_dialogues,
        "test": world.test_dialogues,
    }[split]
    new_share = world.p_new_wording if split == "test" else 0.0
    return [_dialogue(rng, world, pools[i % len(pools)], new_share) for i in range(count)]


def add_candidates(rng: random.Random, talks: list[Talk]) -> None:
    """Give every row its two candidate lists. All texts are embedded in one go, equal ones once."""
    pools = {id(talk.pool): talk.pool for talk in talks}
    texts = [talk.query for talk in talks] + [
        title_of(facts) for pool in pools.values() for facts in pool.values()
    ]
    vectors = dict(zip(texts, sbert_embed(texts), strict=True))
    for key, pool in pools.items():
        asins, titles = list(pool), [title_of(facts) for facts in pool.values()]
        mine = [talk for talk in talks if id(talk.pool) == key]
        contexts = [
            re.sub(r"\s*</?(?:submission|comment)>\s*", " ", talk.row["context"]).strip()
            for talk in mine
        ]
        near = cosine_rank(
            np.stack([vectors[talk.query] for talk in mine]), np.stack([vectors[t] for t in titles])
        )
        for field, ranking in (
            ("candidates_st", near),
            ("candidates_gpt_large", bm25_rank(contexts, titles)),
        ):
            for talk, best in zip(mine, ranking[:, :10], strict=True):
                talk.row[field] = rng.sample(
                    sorted(asins[i] for i in best), 10
                )  # near-ties may swap on another machine


# ---- files
def _link(name: str) -> str:
    return f"https://example.com/{name}"


def _catalogue_entry(asin: str, facts: Facts, images: int) -> Row:
    return {
        "title": title_of(facts),
        "categories": [config.DOMAINS[facts["domain"]], facts["kind"]],
        "features": [facts["feature"]],
        "description": [],
        "images": [{"large": _link(f"{asin}_{k}.jpg")} for k in range(images)],
        "image_descriptions_llava_cleaned": {},
    }


def _stage1_rows(pool: dict[str, Facts], counts: dict[str, int]) -> list[Row]:
    names = [(asin, f"{asin}_{k}.jpg") for asin in pool for k in range(counts[asin])]
    return [
        {
            "title": title_of(pool[asin]),
            "image_name": name,
            "image": _link(name),
            "image_description_llava_cleaned": "",
        }
        for asin, name in names
    ]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _write_lines(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_images(
    root: Path,
    world: config.World,
    items: dict[str, dict[str, Facts]],
    counts: dict[str, int],
    missing: list[str],
    corrupt: list[str],
) -> None:
    for key, pool in items.items():
        folder = root / ("valid_images" if key.endswith("/stage1") else "train_images")
        folder.mkdir(exist_ok=True)
        for asin, facts in pool.items():
            for name in (f"{asin}_{k}.jpg" for k in range(counts[asin])):
                if name not in missing:
                    _write_image(
                        folder / name,
                        facts,
                        world.image_side,
                        f"{world.seed}/image/{name}",
                        name in corrupt,
                    )


def _fill(root: Path, world: config.World, key: str) -> None:
    items = make_items(world)
    everything = {asin: facts for pool in items.values() for asin, facts in pool.items()}
    held_back = {
        asin: f
        for name, pool in items.items()
        if name.endswith("/stage1")
        for asin, f in pool.items()
    }
    counts = image_counts(world, everything)
    missing, corrupt = _spoiled(world, items, counts)
    _write_images(root, world, items, counts, missing, corrupt)
    catalogue = {
        a: _catalogue_entry(a, f, counts[a]) for a, f in everything.items() if a not in held_back
    }
    _write_json(root / "item2meta_train.json", catalogue)
    _write_lines(root / "item2meta_valid.jsonl", _stage1_rows(held_back, counts))
    talks = {
        (domain, split): make_dialogues(world, items, domain, split)
        for domain in config.DOMAINS
        for split in ("train", "valid", "test")
    }
    add_candidates(
        random.Random(f"{world.seed}/candidates"),
        [talk for some in talks.values() for talk in some],
    )
    for (domain, split), some in talks.items():
        _write_lines(root / config.DOMAINS[domain] / f"{split}.jsonl", [talk.row for talk in some])
    truths = {
        f"{domain}/{split}": [talk.truth for talk in some]
        for (domain, split), some in talks.items()
    }
    facts = {
        "key": key,
        "items": everything,
        "dialogues": truths,
        "missing": missing,
        "corrupt": corrupt,
    }
    _write_json(root / FACTS, facts)


def world_key(world: config.World) -> str:
    """16 hex digits over the settings and the source files that make the world."""
    digest = hashlib.sha256(world.model_dump_json().encode())
    for name in SOURCES:
        digest.update((config.PACKAGE / name).read_bytes())
    return digest.hexdigest()[:16]


def read_facts(root: Path | str) -> Row:
    """The side file of a mini world; UserError where `root` holds none."""
    path = Path(root) / FACTS
    if not path.is_file():
        raise config.UserError(
            f"{path}: not found, so this is no finished mini world; make one with make_world"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def make_world(root: Path | str, world: config.World) -> Path:
    """Write the world to `root` and return it; at once if it is there already. Never overwrites other data."""
    root, key = Path(root), world_key(world)
    if (root / FACTS).is_file() and read_facts(root).get("key") == key:
        return root
    if root.exists() and not (root / FACTS).is_file() and (root.is_file() or any(root.iterdir())):
        raise config.UserError(
            f"{root}: holds other files and no {FACTS}; choose an empty folder for the mini world"
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        fresh, old = Path(scratch) / "new", Path(scratch) / "old"
        fresh.mkdir()
        _fill(fresh, world, key)
        if root.exists():
            os.replace(root, old)
        os.replace(fresh, root)
        shutil.rmtree(old, ignore_errors=True)
    return root


# ---- what can be reached
def _expected_hit(row: Row, truth: Row, items: dict[str, Facts], looks: bool) -> float:
    """Chance that a uniform choice among the candidates that meet most wishes is a ground-truth item."""
    asked = {name: truth[name] for name in ("kind", "feature", "brand") if truth[name]}
    asked |= truth["wanted"] if looks else {}
    met = {
        a: sum(items[a][name] == value for name, value in asked.items())
        for a in row["candidates_st"]
    }
    best = [asin for asin, count in met.items() if count == max(met.values())]
    return float(np.mean([asin in row["gt_items"] for asin in best]))


def oracles(root: Path | str, split: str = "test") -> list[Row]:
    """Per domain, shares of conversations: candidate recall and the expected HR@1 of chance, of a reader that knows all
    that was asked in words (`text`), and of one that also sees the looks (`vision`)."""
    facts, rows = read_facts(root), []
    for domain, folder in config.DOMAINS.items():
        lines = (Path(root) / folder / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
        pairs = list(
            zip(
                map(json.loads, filter(None, lines)),
                facts["dialogues"][f"{domain}/{split}"],
                strict=True,
            )
        )
        found = {
            field: [len(set(row["gt_items"]) & set(row[field])) for row, _ in pairs]
            for field in ("candidates_st", "candidates_gpt_large")
        }
        rows.append(
            {
                "domain": domain,
                "conversations": len(pairs),
                "recall": float(np.mean([n > 0 for n in found["candidates_st"]])),
                "recall_gpt_large": float(np.mean([n > 0 for n in found["candidates_gpt_large"]])),
                "chance": float(np.mean(found["candidates_st"])) / 10,
                "text": float(
                    np.mean(
                        [_expected_hit(row, truth, facts["items"], False) for row, truth in pairs]
                    )
                ),
                "vision": float(
                    np.mean(
                        [_expected_hit(row, truth, facts["items"], True) for row, truth in pairs]
                    )
                ),
            }
        )
    return rows
