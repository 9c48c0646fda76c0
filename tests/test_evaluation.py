"""Scoring: every check has a case in which the wrong thing fails."""

from __future__ import annotations

import ast
import json
import math
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavic_utils import evaluation as ev
from lavic_utils import report
from lavic_utils.config import PACKAGE
from lavic_utils.data import Dialogue

ONE_PATTERN = re.compile(r"\bB[A-Z0-9]{9}\b")  # the authors' way to read an answer
POOL = [f"B0{i:08d}" for i in range(400)]


def world(count: int = 3000, seed: int = 0) -> tuple[list[list[str]], list[list[str]]]:
    """Truths (one item) and candidate lists (10, the truth among them) of made-up conversations."""
    rng = random.Random(seed)
    lists = [rng.sample(POOL, 10) for _ in range(count)]
    return [[rng.choice(ten)] for ten in lists], lists


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B00HO5EE9W", "B00HO5EE9W"),
        ("I would take B00HO5EE9W: a mug, not B00HO5EE9X", "B00HO5EE9W"),
        ("B00HO5EE9W0HO", "B00HO5EE9W"),  # wrote on past the id
        ("https://x.com/dp/B00HO5EE9W/", "B00HO5EE9W"),
        ("0316769487", "0316769487"),
        ("080442957X.", "080442957X"),
        ("AB00HO5EE9W", None),
        ("b00ho5ee9w", None),
        ("B00HO5EE9", None),
        ("", None),
        ("a BREATHABLE hat: B00HO5EE9W", "B00HO5EE9W"),  # a word in capitals is no id
    ],
)
def test_parse_answer(text: str, expected: str | None) -> None:
    assert ev.parse_answer(text) == expected


SHOP = ["item1", "item17", "item1a", "0042", "red"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("item17", "item17"),
        ("I would take item1.", "item1"),
        ("item17, not item1", "item17"),
        ("item1, not item17", "item1"),
        ("item1a", "item1a"),  # the longer of two candidates, one beginning the other
        ("item17W0HO", "item17"),  # wrote on past the id
        ("_item17_", "item17"),
        ("item170", None),  # another id, of no candidate
        ("redder, 00421, xitem17, Item17", None),
        ("ID: 0042", "0042"),
        ("B00HO5EE9W, or item17", "B00HO5EE9W"),  # an invented id that comes first stays the answer
        ("item17, or B00HO5EE9W", "item17"),
    ],
)
def test_candidates_of_any_form_are_read(text: str, expected: str | None) -> None:
    assert ev.parse_answer(text, SHOP) == expected
    assert ev.parse_answer(text) in (None, "B00HO5EE9W")  # negative control: without the candidates


def test_a_catalogue_of_one_s_own_is_not_scored_zero() -> None:
    lists = [[f"item{10 * row + k}" for k in range(10)] for row in range(30)]
    truths = [[ten[row % 10]] for row, ten in enumerate(lists)]
    texts = [f"Answer: {truth[0]}" for truth in truths]
    read = [ev.parse_answer(text, ten) for text, ten in zip(texts, lists, strict=True)]
    found = ev.score(read, truths, lists)
    assert (found.hits, found.valid) == (30, 30)
    torn = [ev.parse_answer(text, ten) for text, ten in zip(texts[1:], lists, strict=False)]
    assert ev.score(torn, truths[1:], lists[:-1]).valid == 0  # negative control: other lists


@settings(database=None, derandomize=True, deadline=None)
@given(st.text(alphabet="B0X9 a-", max_size=40), st.lists(st.sampled_from(POOL), max_size=10))
def test_candidates_change_nothing_for_ids_of_asin_form(text: str, ten: list[str]) -> None:
    for one in (text, f"{text}{POOL[0]}{text}"):
        assert ev.parse_answer(one, ten) == ev.parse_answer(one)


def calls_without_candidates(code: str) -> int:
    """How many calls of `parse_answer` in this source name no candidates."""
    found = 0
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("parse_answer"):
            found += len(node.args) + len(node.keywords) < 2
    return found


def test_every_method_reads_its_answers_against_the_candidates() -> None:
    code = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    callers = [path for path in code if "parse_answer(" in code[path] and "mini" not in path.parts]
    assert len(callers) >= 3  # with the definition
    assert not any(calls_without_candidates(code[path]) for path in callers)
    assert calls_without_candidates("evaluation.parse_answer(text)") == 1  # negative control


def test_the_one_pattern_way_loses_what_parse_answer_reads() -> None:
    assert ONE_PATTERN.search("B00HO5EE9W0HO") is None and ONE_PATTERN.search("0316769487") is None
    truths, lists = world(200)
    texts = [truth[0] + "W0" for truth in truths]
    old = [m.group() if (m := ONE_PATTERN.search(text)) else None for text in texts]
    assert ev.score(old, truths, lists).hits == 0
    assert ev.score([ev.parse_answer(text) for text in texts], truths, lists).hits == 200


@settings(database=None, derandomize=True, deadline=None)
@given(st.text(max_size=40))
def test_parse_answer_takes_any_text(text: str) -> None:
    found = ev.parse_answer(text)
    assert found is None or (found in text and re.fullmatch(r"B[A-Z0-9]{9}|[0-9]{9}[0-9X]", found))


def test_score_counts() -> None:
    truths = [["a1", "a1", "a2"], ["b1"], ["c1", "c2"], ["d1"]]
    lists = [["a1", "x"], ["b1", "x"], ["x", "y"], ["d1", "x"]]
    found = ev.score(["a1", "x", "c2", None], truths, lists)
    assert (found.conversations, found.pairs, found.hits, found.valid) == (
        4,
        6,
        2,
        2,
    )  # a1 counts once, in both
    assert (found.hit_ratio_pairs, found.hit_ratio_conversations, found.validity_ratio) == (
        2 / 6,
        0.5,
        0.5,
    )
    assert found.ci95[0] == pytest.approx(0.150, abs=5e-4) and found.ci95[1] == pytest.approx(
        0.850, abs=5e-4
    )
    row = found.row("LaViC", "beauty", 1)
    assert row["method"] == "LaViC" and row["ci95"] == list(found.ci95)
    json.dumps(row)
    retrieval = ev.score(["a1", "x", "c2", None], truths, None)
    assert retrieval.validity_ratio is None and retrieval.valid is None and retrieval.hits == 2


def test_score_refuses_what_cannot_be_scored() -> None:
    for answers, truths, lists in (
        (["a"], [["a"], ["b"]], None),
        (["a"], [["a"]], []),
        ([], [], None),
        (["a"], [[]], None),
        (["a"], ["abc"], None),
        (["a"], [["a"]], ["abc"]),
    ):
        with pytest.raises(ValueError):
            ev.score(answers, truths, lists)


def test_right_wrong_random_and_shuffled_answers() -> None:
    truths, lists = world()
    right = [truth[0] for truth in truths]
    perfect, wrong = (
        ev.score(right, truths, lists),
        ev.score(["B0WRONG000"] * len(right), truths, lists),
    )
    assert (perfect.hit_ratio_conversations, perfect.validity_ratio) == (1, 1)
    assert (wrong.hits, wrong.valid, wrong.ci95[0]) == (0, 0, 0)
    assert ev.score([None] * len(right), truths, lists).hit_ratio_pairs == 0
    rng = random.Random(1)
    chance = ev.score([rng.choice(ten) for ten in lists], truths, lists)
    assert chance.ci95[0] < 0.1 < chance.ci95[1] and chance.validity_ratio == 1
    rng.shuffle(
        right
    )  # the same answers at other conversations: 1 in 400 items hits, 10 in 400 are valid
    shuffled = ev.score(right, truths, lists)
    assert (
        shuffled.hit_ratio_conversations < 0.01 and abs(shuffled.validity_ratio - 10 / 400) < 0.015
    )


def test_wilson_covers() -> None:
    """The interval holds the true ratio in about 95 of 100 draws; half its width does not."""
    hits = np.random.default_rng(0).binomial(200, 0.1, size=400)
    bounds = [ev.wilson(h, 200) for h in hits]
    assert 0.92 <= np.mean([low <= 0.1 <= high for low, high in bounds]) <= 0.98
    halves = [((3 * a + b) / 4, (a + 3 * b) / 4) for a, b in bounds]
    assert np.mean([low <= 0.1 <= high for low, high in halves]) < 0.85
    assert ev.wilson(0, 0) == (0.0, 1.0)  # of no trials nothing is known


def test_paired_difference() -> None:
    rng = np.random.default_rng(3)
    a = rng.random(600) < 0.4
    b = a & (rng.random(600) < 0.8)  # b loses a fifth of the hits of a
    mean, low, high = ev.paired_difference(a, b, 0)
    assert mean == pytest.approx(a.mean() - b.mean()) and 0 < low < mean < high
    error = (
        1.96 * (a.astype(int) - b.astype(int)).std() / 600**0.5
    )  # 90 % bounds would be 16 % nearer
    assert (low, high) == pytest.approx((mean - error, mean + error), abs=0.08 * error)
    assert (
        ev.paired_difference(a, b, 0) == (mean, low, high)
        and ev.paired_difference(b, a, 0)[0] == -mean
    )
    _, low_u, high_u = ev.paired_difference(
        a, rng.permutation(b), 0
    )  # negative control: pairs torn apart
    assert high_u - low_u > 1.5 * (high - low)
    assert ev.paired_difference(a, a, 0) == (0, 0, 0)
    for wrong in (([True], [True, False]), ([], []), ([0.5], [1])):
        with pytest.raises(ValueError):
            ev.paired_difference(*wrong)


def test_mcnemar() -> None:
    assert ev.mcnemar(8, 2) == pytest.approx(2 * sum(math.comb(10, k) for k in (0, 1, 2)) / 2**10)
    assert ev.mcnemar(2, 8) == ev.mcnemar(8, 2) and ev.mcnemar(0, 0) == ev.mcnemar(5, 5) == 1


def test_intervals_over_items_are_wider_where_dialogues_share_them() -> None:
    """Two dialogues an item that are always answered alike are worth one: wider by a root of 2."""
    rng = np.random.default_rng(1)
    items = np.repeat(np.arange(200), 2)
    hit = np.repeat(rng.random(200) < 0.4, 2)
    low, high = ev.clustered(hit, items)
    apart = ev.clustered(hit, range(400))
    assert high - low == pytest.approx(2**0.5 * (apart[1] - apart[0]), rel=0.08)
    one = ev.clustered(hit[::2], items[::2])  # the same items, each asked once
    assert (low, high) == pytest.approx(one, abs=0.01)
    shuffled = ev.clustered(rng.permutation(hit), items)  # negative control: items tell nothing
    assert shuffled[1] - shuffled[0] == pytest.approx(apart[1] - apart[0], rel=0.12)
    named = [str(item) for item in items]
    truths = [[one] for one in named]
    answers = [one if right else None for one, right in zip(named, hit, strict=True)]
    assert ev.score(answers, truths, None, named).ci95 == (low, high)
    assert ev.score(named, truths, None, named).ci95 == ev.wilson(200, 200)  # not 400 trials
    difference = ev.paired_difference(hit, ~hit, 0, named)
    assert difference[2] - difference[1] > 1.3 * np.diff(ev.paired_difference(hit, ~hit)[1:])[0]


def test_intervals_over_items_cover() -> None:
    """Measured: 240 dialogues about 60 items of unlike difficulty; over dialogues: too sure."""
    rng, covered = np.random.default_rng(2), {"items": 0, "dialogues": 0}
    for _ in range(150):
        items = rng.integers(60, size=240)
        hit = rng.random(240) < rng.choice([0.1, 0.9], size=60)[items]
        for name, targets in (("items", items), ("dialogues", range(240))):
            low, high = ev.clustered(hit, list(targets))
            covered[name] += low <= 0.5 <= high
    assert covered["items"] / 150 > 0.88 and covered["dialogues"] / 150 < 0.85


def test_sign_flip_is_mcnemar_where_no_item_is_asked_twice() -> None:
    signs = [1] * 8 + [-1] * 2 + [0] * 5
    assert ev.sign_flip(signs, range(15)) == pytest.approx(ev.mcnemar(8, 2))
    twice = ev.sign_flip(signs * 2, [*range(15), *range(15)])  # the same items again: no news
    assert twice == pytest.approx(ev.mcnemar(8, 2)) and twice > 5 * ev.mcnemar(16, 4)
    assert ev.sign_flip([1, -1], ["a", "a"]) == 1 == ev.sign_flip([0], ["a"])
    assert ev.sign_flip([2, 2, -1], "abc") == pytest.approx(4 / 8)  # totals +-3 and +-5 of +-1..5


def test_summary_by_seed() -> None:
    truths, lists = world(300)
    rows = []
    for seed, right in enumerate((60, 75, 90)):
        answers = [truth[0] if i < right else None for i, truth in enumerate(truths)]
        rows.append(ev.score(answers, truths, lists).row("LaViC", "home", seed))
        rows.append(ev.score(answers, truths).row("BM25", "home", seed))
    table = report.summary_by_seed(rows).set_index("method")
    line = table.loc["LaViC"]
    assert (line["seeds"], line["conversations"]) == (3, 300)
    assert (line["mean"], line["min"], line["max"]) == pytest.approx((0.25, 0.2, 0.3))
    assert np.isnan(table.loc["BM25", "validity_ratio"])
    assert line["validity_ratio"] == pytest.approx(0.25)
    together = np.mean([np.diff(row["ci95"])[0] for row in rows if row["method"] == "LaViC"])
    assert line["high"] - line["low"] == pytest.approx(together)  # the same dialogues each time
    worlds = [row | {"world": row["seed"], "hit_ratio_scored": 0.5} for row in rows]
    apart = report.summary_by_seed(worlds).set_index("method").loc["LaViC"]
    assert apart["high"] - apart["low"] == pytest.approx(together / 3**0.5, rel=0.01)
    assert apart["hit_ratio_scored"] == 0.5
    for wrong in ([], [rows[0], rows[0]]):
        with pytest.raises(ValueError):
            report.summary_by_seed(wrong)


def dialogue(gt: list[str], ten: list[str]) -> Dialogue:
    return Dialogue(
        domain="beauty",
        split="test",
        line=1,
        context="<submission>x</submission>",
        context_items=(),
        gt="g",
        gt_items=tuple(gt),
        candidates_st=tuple(ten),
        candidates_gpt_large=tuple(POOL[20:30]),
    )


def test_candidate_recall_is_the_ceiling() -> None:
    dialogues = [dialogue([POOL[3], "B0ELSE0000"], POOL[:10]), dialogue([POOL[3]], POOL[10:20])]
    assert ev.candidate_recall(dialogues, "candidates_st") == 0.5
    assert ev.candidate_recall(dialogues, "candidates_gpt_large") == 0
    best = [
        next((c for c in d.candidates_st if c in d.gt_items), d.candidates_st[0]) for d in dialogues
    ]
    assert ev.score(best, [d.gt_items for d in dialogues]).hit_ratio_conversations == 0.5
