"""The rendered mini world: format, balance, determinism, and what can be reached in it."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavic_utils.config import DOMAINS, UserError, World
from lavic_utils.data import data_hash
from lavic_utils.mini import words as wording
from lavic_utils.mini import world
from lavic_utils.mini.accuracy import attribute_accuracy
from lavic_utils.mini.drawing import draw_product

TINY = World(
    image_side=48,
    train_shards=1,
    shard_items=64,
    stage1_valid_items=12,
    train_dialogues=40,
    valid_dialogues=10,
    test_dialogues=60,
    p_extra_image=0.2,
    missing_images=3,
    corrupt_images=4,
)
VISUAL = {word for values in wording.ATTRIBUTES.values() for word in values}


def digest(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def rows_of(root: Path, domain: str, split: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (root / DOMAINS[domain] / f"{split}.jsonl").read_text().split("\n")
        if line
    ]


def opens(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError):
        return False
    return True


def embed_words(texts: list[str]) -> np.ndarray:
    """In place of the sentence encoder, which costs seconds: words hashed to 256 places."""
    vectors = np.full((len(texts), 256), 1e-3)
    for row, text in enumerate(texts):
        for word in re.findall(r"\w+", text):
            vectors[row, hashlib.sha256(word.encode()).digest()[0]] += 1
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module", autouse=True)
def quick_encoder() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "sbert_embed", embed_words)
        yield


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.make_world(tmp_path_factory.mktemp("world") / "mini", TINY)


def read_facts(root: Path) -> dict:
    return json.loads((root / world.FACTS).read_text())


def satisfies(*given, **how) -> bool:
    return all(world.wishes_met(*given, **how))


@pytest.fixture(scope="module")
def facts(mini: Path) -> dict:
    return read_facts(mini)


def test_same_seed_same_bytes_and_another_seed_other_bytes(mini: Path, tmp_path: Path) -> None:
    first = digest(mini)
    assert digest(world.make_world(tmp_path / "again", TINY)) == first
    other = digest(world.make_world(tmp_path / "other", TINY.model_copy(update={"seed": 8})))
    same = [name for name in first if name in other and first[name] == other[name]]
    assert same == []


def test_finished_world_is_reused_and_other_data_is_never_replaced(
    mini: Path, tmp_path: Path
) -> None:
    stamp = (mini / world.FACTS).stat().st_mtime_ns
    assert world.make_world(mini, TINY) == mini and (mini / world.FACTS).stat().st_mtime_ns == stamp
    assert world.world_key(TINY) != world.world_key(TINY.model_copy(update={"image_side": 50}))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="choose an empty folder"):
        world.make_world(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_key_reads_settings_and_the_files_that_draw_and_write(monkeypatch) -> None:
    key, read = world.world_key(TINY), []
    monkeypatch.setattr(world.Path, "read_text", lambda path, **_: read.append(path.name) or "")
    assert world.world_key(TINY) != key  # other sources
    assert read == ["words.yaml", "words.py", "drawing.py", "world.py"]


@pytest.mark.parametrize("damage", ["cut", "removed", "picture", "facts"])
def test_a_damaged_world_is_made_again_and_said(tmp_path: Path, damage: str, capsys) -> None:
    root = world.make_world(tmp_path / "mini", TINY)
    before = data_hash(root)
    picture = next((root / "train_images").iterdir())
    path = {
        "cut": root / "amazon_home" / "test.jsonl",
        "removed": root / "item2meta_valid.jsonl",
        "picture": picture,
        "facts": root / world.FACTS,
    }[damage]
    whole = path.read_bytes()
    path.unlink() if damage == "removed" else path.write_bytes(whole[:300])
    world.make_world(root, TINY)
    assert path.read_bytes() == whole and data_hash(root) == before
    assert "damaged" in capsys.readouterr().out
    stamp = path.stat().st_ino
    world.make_world(root, TINY)
    assert path.stat().st_ino == stamp  # negative control: a whole one is left alone


def test_a_stale_key_remakes_the_world_and_leaves_the_data_hash(tmp_path: Path) -> None:
    root = world.make_world(tmp_path / "mini", TINY)
    before = data_hash(root)
    (root / world.KEY).write_text("of other code")
    image = next((root / "train_images").iterdir())
    image.unlink()
    world.make_world(root, TINY)
    assert image.is_file() and world.stands(root, TINY)
    assert data_hash(root) == before


def test_failure_leaves_the_old_world_and_no_scraps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "mini"
    root.mkdir()
    (root / world.FACTS).write_text('{"items": "old"}')

    def broken(*_: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(world, "_fill", broken)
    with pytest.raises(RuntimeError):
        world.make_world(root, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["mini"]
    assert read_facts(root) == {"items": "old"}


def test_rows_have_the_published_format(mini: Path, facts: dict) -> None:
    catalogue = json.loads((mini / "item2meta_train.json").read_text())
    for domain in DOMAINS:
        for split, count in (("train", 40), ("valid", 10), ("test", 60)):
            rows = rows_of(mini, domain, split)
            assert len(rows) == count == len(facts["dialogues"][f"{domain}/{split}"])
            for row in rows:
                assert (
                    1 <= len(re.findall(r"<(submission|comment)>[^<]+</\1>\n", row["context"])) <= 6
                )
                for field in ("candidates_st", "candidates_gpt_large"):
                    assert len(set(row[field])) == 10 and set(row[field]) <= set(catalogue)
                assert set(row["gt_items"]) <= set(catalogue) and row["gt"]
    ids = list(facts["items"])
    assert len(set(ids)) == len(ids) == 3 * (3 * 64 + 12)
    assert all(re.fullmatch(r"B0[A-Z0-9]{8}", asin) for asin in ids)


def test_splits_share_no_item_and_pools_are_balanced(mini: Path, facts: dict) -> None:
    used = {
        split: {
            asin
            for row in rows_of(mini, "home", split)
            for asin in row["gt_items"] + row["candidates_st"]
        }
        for split in ("train", "valid", "test")
    }
    assert not (
        used["train"] & used["test"]
        or used["valid"] & used["test"]
        or used["train"] & used["valid"]
    )
    pools = world.make_items(TINY)
    for name, pool in pools.items():  # whole looks of validation and test items: never trained on
        kept = {wording.held_out(item) for item in pool.values()}
        assert kept == {"train" not in name}, name
    pool = pools["home/test"]
    assert used["test"] <= set(pool)
    assert set(Counter((item["kind"], item["feature"]) for item in pool.values()).values()) == {1}


def test_every_wish_is_said_and_the_target_meets_it(mini: Path, facts: dict) -> None:
    for domain in DOMAINS:
        for row, truth in zip(
            rows_of(mini, domain, "test"), facts["dialogues"][f"{domain}/test"], strict=True
        ):
            asked = [
                truth["kind"],
                *truth["wanted"].values(),
                *filter(None, (truth["feature"], truth["brand"])),
            ]
            words = set(re.findall(r"[A-Za-z]+", row["context"]))
            assert set(asked) <= words
            assert words & VISUAL == set(
                truth["wanted"].values()
            )  # and no look that was not asked for
            assert all(satisfies(facts["items"][asin], truth) for asin in row["gt_items"])


def test_satisfies_rejects_an_item_that_misses_one_wish() -> None:
    item = {
        "kind": "mug",
        "feature": "rustic",
        "brand": "Tivoli",
        "colour": "red",
        "pattern": "plain",
    }
    truth = {"kind": "mug", "feature": "rustic", "brand": None, "wanted": {"colour": "red"}}
    assert satisfies(item, truth)
    assert not satisfies(item | {"colour": "blue"}, truth)
    assert satisfies(item | {"colour": "blue"}, truth, looks=False)
    assert not satisfies(item | {"feature": "modern"}, truth, looks=False)


def test_looks_show_in_no_text_of_the_catalogue(mini: Path, facts: dict) -> None:
    text = (mini / "item2meta_train.json").read_text() + (
        mini / "item2meta_valid.jsonl"
    ).read_text()
    assert not VISUAL & set(re.findall(r"[a-z]+", text))
    item = next(iter(facts["items"].values()))
    said = set(re.findall(r"[a-z]+", wording.description(item)))
    assert len(VISUAL & said) == 4  # the same check finds looks where there are some


def test_new_wordings_only_in_test(mini: Path, facts: dict) -> None:
    share = {
        split: np.mean(
            [t["new_wording"] for d in DOMAINS for t in facts["dialogues"][f"{d}/{split}"]]
        )
        for split in ("train", "valid", "test")
    }
    assert share["train"] == share["valid"] == 0 and 0.15 < share["test"] < 0.45
    marks = [text.split("{")[0] for text in wording.OPENINGS["new"]]
    for split, found in (("train", False), ("test", True)):
        text = "".join(row["context"] for domain in DOMAINS for row in rows_of(mini, domain, split))
        assert any(mark in text for mark in marks if len(mark) > 20) is found


def test_images_open_unless_listed(mini: Path, facts: dict) -> None:
    links = [
        Path(image["large"]).name
        for item in json.loads((mini / "item2meta_train.json").read_text()).values()
        for image in item["images"]
    ]
    unreadable = {name for name in links if not opens(mini / "train_images" / name)}
    assert unreadable == set(facts["missing"]) | set(facts["corrupt"])
    assert len(facts["missing"]) == 3 and len(facts["corrupt"]) == 4
    assert not any((mini / "train_images" / name).exists() for name in facts["missing"])
    assert all((mini / "train_images" / name).exists() for name in facts["corrupt"])
    stage1 = [
        json.loads(line)
        for line in (mini / "item2meta_valid.jsonl").read_text().split("\n")
        if line
    ]
    assert stage1 and all(opens(mini / "valid_images" / row["image_name"]) for row in stage1)


def test_oracles_are_ordered_and_notice_wrong_truths(mini: Path, tmp_path: Path) -> None:
    rows = world.oracles(mini)
    mean = {
        name: np.mean([row[name] for row in rows])
        for name in ("chance", "text", "vision", "recall")
    }
    assert mean["chance"] < mean["text"] <= mean["vision"] <= mean["recall"]
    copy = tmp_path / "wrong"
    for domain, folder in DOMAINS.items():
        lines = rows_of(mini, domain, "test")
        (copy / folder).mkdir(parents=True)
        shifted = [line | {"gt_items": lines[i - 1]["gt_items"]} for i, line in enumerate(lines)]
        (copy / folder / "test.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in shifted)
        )
    (copy / world.FACTS).write_text((mini / world.FACTS).read_text())
    assert np.mean([row["vision"] for row in world.oracles(copy)]) < 0.5 * mean["vision"]


def test_the_mini_tokenizer_knows_every_word(mini: Path) -> None:
    from lavic_utils.mini import model as minimodel

    tokenizer = minimodel.build_tokenizer()
    rows = [
        row
        for domain in DOMAINS
        for split in ("train", "test")
        for row in rows_of(mini, domain, split)
    ]
    texts = {
        re.sub(r"<[^>]+>", "", row["context"]) + f"{row['gt']} {row['candidates_st'][0]}"
        for row in rows
    }
    assert not any(tokenizer.unk_token_id in tokenizer(text)["input_ids"] for text in texts)
    assert tokenizer.unk_token_id in tokenizer("a zeppelin")["input_ids"]


@pytest.mark.parametrize(
    ("text", "fixed"),
    [
        ("a insulated hat", "an insulated hat"),
        ("a rustic mug", "a rustic mug"),
        ("a good good mug", "a good mug"),
        ("plaza insulated", "plaza insulated"),
    ],
)
def test_polish(text: str, fixed: str) -> None:
    assert world.polish(text) == fixed


def test_drawings_differ_by_each_attribute_and_only_by_the_seed_otherwise() -> None:
    looks = {"shape": "boxy", "colour": "blue", "pattern": "dotted", "accent": "lime"}

    def drawn(facts: dict[str, str]) -> np.ndarray:
        return np.asarray(draw_product(facts, (96, 72), random.Random(3)), dtype=int)

    for kind in wording.PARTS:
        base = looks | {"kind": kind}
        picture = drawn(base)
        assert picture.shape == (72, 96, 3) and np.array_equal(picture, drawn(base))
        for name, values in wording.ATTRIBUTES.items():
            for value in set(values) - {base[name]}:
                changed = np.abs(drawn(base | {name: value}) - picture).max(axis=2) > 40
                # least: toes of shoes, round against boxy
                assert changed.mean() > 0.015, (kind, name, value)


@pytest.mark.parametrize(
    "wrong", [{"kind": "boat"}, {"colour": "white"}, {"accent": "red"}, {"pattern": "zigzag"}]
)
def test_unknown_words_are_refused(wrong: dict[str, str]) -> None:
    good = {"kind": "mug", "shape": "round", "colour": "red", "pattern": "plain", "accent": "white"}
    with pytest.raises(ValueError, match="is not one of"):
        draw_product(good | wrong, (48, 48), random.Random(0))


def test_attribute_accuracy_counts_the_first_word_of_each_kind() -> None:
    facts = [{"colour": "red", "pattern": "plain", "shape": "round", "accent": "white"}]
    right = attribute_accuracy(["red and plain, round, with a white lid."], facts)
    wrong = attribute_accuracy(["blue and plain, boxy, with a white lid."], facts)
    hedged = attribute_accuracy(["blue or red and plain, round, with a white lid."], facts)
    assert right == {"colour": 1, "pattern": 1, "shape": 1, "accent": 1, "all": 1}
    assert wrong == {"colour": 0, "pattern": 1, "shape": 0, "accent": 1, "all": 0}
    assert hedged["colour"] == 0 and hedged["all"] == 1
    with pytest.raises(ValueError, match="zip"):
        attribute_accuracy(["red"], facts * 2)
