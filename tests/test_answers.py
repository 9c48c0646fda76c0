"""Scoring anybody's answers: hand-made files with known figures, and the replications' answers."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from lavic_utils import evaluation as ev
from lavic_utils.__main__ import main
from lavic_utils.audit import answer_files as an
from lavic_utils.config import DOMAINS, UserError, replications_dir

replicated = pytest.mark.skipif(
    replications_dir() is None,
    reason="set LAVIC_REPLICATIONS to the folder LaViC/data of Lottotpk/graphRAG_multimodal",
)
TEN = [f"B0TEST{i:04d}" for i in range(10)]
OTHER = "B0ELSE0001"
quick = settings(database=None, derandomize=True, deadline=None, max_examples=60)


def row(
    recommended: str | None, gt: list[str], context: str = "c", **more: object
) -> dict[str, object]:
    said = recommended if recommended is not None else "I do not know"
    return {
        "context": context,
        "gt_items": gt,
        "candidates_st": TEN,
        "recommended_st": recommended,
        "response_st": said,
        **more,
    }


def made(
    context: str, gt: list[str], recommended: str | None, response: str | None = None
) -> an.Answer:
    fields = {"context": context, "gt_items": tuple(gt), "candidates": tuple(TEN)}
    return an.Answer(**fields, recommended=recommended, response=response)


def replace(answer: an.Answer, **changed: object) -> an.Answer:
    return answer.model_copy(update=changed)


def hit(answer: an.Answer) -> bool:
    return answer.recommended in answer.gt_items


def plain(rows: list[an.Answer]) -> ev.Score:
    truths, candidates = [row.gt_items for row in rows], [row.candidates for row in rows]
    return ev.score([row.recommended for row in rows], truths, candidates)


def write(path: Path, *rows: object) -> Path:
    path.write_bytes(b"".join(json.dumps(one, ensure_ascii=False).encode() + b"\n" for one in rows))
    return path


# One repeated truth that is hit, one of two truths hit, a valid miss, an invented id, no id, a
# truth not in the list.
KNOWN = [
    row(TEN[0], [TEN[0], TEN[0]], "1"),
    row(TEN[1], [TEN[1], OTHER], "2"),
    row(TEN[2], [TEN[3]], "3"),
    row("B0WRONG001", [TEN[4]], "4"),
    row(None, [TEN[5]], "5"),
    row(TEN[6], [OTHER], "6\u2028\u0085x"),
]
OUTSIDE = row(OTHER, [OTHER], "7")  # right, and no candidate


def test_known_figures(tmp_path: Path) -> None:
    found = an.evaluate(an.read_answers(write(tmp_path / "a.jsonl", *KNOWN)))
    expected = {
        "rows": 6,
        "pairs": 8,
        "hits": 3,
        "valid": 4,
        "unparsed": 1,
        "hit_ratio_pairs": 3 / 8,
        "hit_ratio_conversations": 2 / 6,
        "hit_ratio_mean": 1.5 / 6,
        "validity_ratio": 4 / 6,
        "ceiling_pairs": 6 / 8,
        "ceiling_conversations": 5 / 6,
        "of_ceiling": 2 / 5,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert all(low <= found[name] <= high for name, (low, high) in found["ci95"].items())
    outside = an.evaluate(an.read_answers(write(tmp_path / "b.jsonl", *KNOWN, OUTSIDE)))
    assert (found["hits_outside"], outside["hits_outside"], outside["hits"], outside["valid"]) == (
        0,
        1,
        4,
        4,
    )
    twice = an.evaluate(an.read_answers(write(tmp_path / "c.jsonl", *KNOWN, KNOWN[0])))
    assert (found["repeated"], twice["repeated"], twice["rows"], twice["hits"]) == (0, 1, 7, 5)
    # negative controls: the repeated truth makes a difference, and so does every row left out
    assert ev.score([r["recommended_st"] for r in KNOWN], [r["gt_items"] for r in KNOWN]).hits == 2
    rows = an.read_answers(tmp_path / "a.jsonl")
    assert all(an.evaluate(rows[:i] + rows[i + 1 :])["hit_ratio_pairs"] != 3 / 8 for i in range(6))


def test_intervals_hold_the_truth_and_never_pretend_certainty() -> None:
    rng, covered, halves = random.Random(0), 0, 0
    base = made("c", [TEN[0]], TEN[1])
    right = made("c", [TEN[0]], TEN[0])
    for seed in range(100):
        rows = [right if rng.random() < 0.2 else base for _ in range(150)]
        low, high = an.evaluate(rows, seed)["ci95"]["hit_ratio_pairs"]
        covered += low <= 0.2 <= high
        halves += (3 * low + high) / 4 <= 0.2 <= (low + 3 * high) / 4
    assert covered >= 89 and halves <= 84  # half the width does not hold it (negative control)
    whole, none = an.evaluate([right] * 50), an.evaluate([base] * 50)
    assert whole["ci95"]["of_ceiling"] == pytest.approx([0.9287, 1.0], abs=1e-3)
    assert none["ci95"]["hit_ratio_pairs"] == pytest.approx([0.0, 0.0713], abs=1e-3)
    hopeless = an.evaluate([made("c", [OTHER], TEN[1])] * 5)
    assert hopeless["of_ceiling"] is None and hopeless["ci95"]["of_ceiling"] is None
    with pytest.raises(ValueError):
        an.evaluate([])


@quick
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*TEN, OTHER, None]),
            st.lists(st.sampled_from([*TEN, OTHER]), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_what_must_hold_of_any_answers(given: list[tuple[str | None, list[str]]]) -> None:
    rows = [made(str(i), gt, answer) for i, (answer, gt) in enumerate(given)]
    found = an.evaluate(rows)
    once = plain(rows)
    assert (found["rows"], found["valid"]) == (once.conversations, once.valid)
    assert found["hit_ratio_conversations"] == pytest.approx(once.hit_ratio_conversations)
    if not any(len(set(r.gt_items)) < len(r.gt_items) for r in rows):
        assert (found["pairs"], found["hits"]) == (once.pairs, once.hits)
    assert found["hit_ratio_mean"] <= found["hit_ratio_conversations"] + 1e-12
    best = [replace(r, recommended=max(TEN, key=r.gt_items.count)) for r in rows]
    assert an.evaluate(best)["hit_ratio_pairs"] == pytest.approx(found["ceiling_pairs"])
    assert an.compare(rows, rows)["difference"] == 0


def test_the_generous_reading_differs_where_it_should() -> None:
    text = f"B0WRONG001, or {TEN[1]}"
    assert ev.parse_answer(text, TEN) == "B0WRONG001"  # an invented id that comes first stays it
    assert an.any_candidate(text, TEN) == TEN[1]
    assert an.any_candidate(f"{TEN[3]}, {TEN[1]}", TEN) == TEN[3]
    assert an.any_candidate("B0WRONG001", TEN) is None
    assert an.any_candidate("xitem17", ["item17", "item1"]) == "item17"


def test_reparse_says_what_it_changes(tmp_path: Path) -> None:
    rows = an.read_answers(
        write(tmp_path / "a.jsonl", row(None, [TEN[0]], "1", response_st=TEN[0] + "W0"), *KNOWN[1:])
    )
    again = an.reparse(rows)
    assert (an.evaluate(rows)["hits"], an.evaluate(again)["hits"]) == (1, 2)
    found = an.changes(rows, again)
    assert found == {"changed": 1, "ran_on": 1, "unexpected_form": 0, "other": 0}
    assert an.changes(rows, rows)["changed"] == 0
    odd = [
        replace(rows[0], context=said, response=said)
        for said in (f"_{TEN[0]}", f"{TEN[0]}, no, {TEN[1]}")
    ]
    for form in ("0123456789", "item17"):
        odd.append(replace(odd[0], candidates=(form, *TEN[1:]), response=form))
    found = an.changes(odd, an.reparse(odd))
    assert found == {"changed": 4, "ran_on": 0, "unexpected_form": 2, "other": 2}
    with pytest.raises(UserError, match="answers, line 2: no raw answer"):
        an.reparse([rows[0], replace(rows[1], response=None)])


def test_compare_known(tmp_path: Path) -> None:
    """8 conversations that A alone gets right, 2 B alone, 10 both, 5 neither, 1 more each."""
    kinds = ["a"] * 8 + ["b"] * 2 + ["ab"] * 10 + [""] * 5
    made = {
        who: [
            row(TEN[0] if who in kind else TEN[1], [TEN[0]], str(i)) for i, kind in enumerate(kinds)
        ]
        for who in "ab"
    }
    shuffled = random.Random(1).sample(made["b"], len(kinds))
    a = an.read_answers(write(tmp_path / "a.jsonl", *made["a"], row(TEN[0], [TEN[0]], "only here")))
    b = an.read_answers(write(tmp_path / "b.jsonl", *shuffled, row(TEN[0], [TEN[3]], "1")))
    found = an.compare(a, b)
    assert {
        k: found[k]
        for k in ("matched", "unmatched_a", "unmatched_b", "other_candidates", "only_a", "only_b")
    } == {
        "matched": 25,
        "unmatched_a": 1,
        "unmatched_b": 1,
        "other_candidates": 0,
        "only_a": 8,
        "only_b": 2,
    }
    assert found["difference"] == pytest.approx(6 / 25) and found["p_value"] == pytest.approx(
        binomtest(8, 10).pvalue
    )
    assert found["ci95"][0] < 6 / 25 < found["ci95"][1]
    back = an.compare(b, a)
    assert back["difference"] == pytest.approx(-6 / 25) and back["p_value"] == found["p_value"]
    # negative control: by position instead of by context the pairs are torn
    by_position = zip(a, b, strict=True)
    assert sum(hit(x) and not hit(y) for x, y in by_position) != 8
    other = [replace(r, candidates=(*TEN[:9], OTHER)) for r in b]
    assert an.compare(a, other)["other_candidates"] == 25
    swapped = [replace(r, gt_items=(OTHER, TEN[0])) for r in a]  # truths are a set
    assert len(an.match(swapped, [replace(r, gt_items=(TEN[0], OTHER)) for r in b])) == 25
    assert not an.match(swapped, [replace(r, gt_items=(TEN[0],)) for r in b])
    with pytest.raises(UserError, match="no row in common"):
        an.compare(a, [replace(r, context="x") for r in b])


def test_equal_rows_are_matched_one_to_one() -> None:
    same = made("c", [TEN[0]], TEN[0])
    assert len(an.match([same, same], [same, same, same])) == 2
    assert an.compare([same, same], [same])["unmatched_a"] == 1


def test_the_answer_s_field_is_found(tmp_path: Path) -> None:
    new = {"recommended_new": TEN[1], "candidates_new": [*TEN[1:], OTHER]}
    two = write(tmp_path / "two.jsonl", {**row(TEN[0], [TEN[0]]), **new})
    with pytest.raises(UserError, match="line 1: .*: recommended_st, recommended_new; exactly one"):
        an.read_answers(two)
    one = write(tmp_path / "one.jsonl", {"context": "c", "gt_items": [TEN[0]], **new})
    (found,) = an.read_answers(one)
    assert (found.recommended, found.candidates) == (TEN[1], (*TEN[1:], OTHER))
    assert found.response is None
    silent = write(tmp_path / "silent.jsonl", {**row(TEN[0], [TEN[0]]), "recommended_st": ""})
    assert an.read_answers(silent)[0].recommended is None


GOOD = KNOWN[0]
BAD = {
    "not JSON": (b"{", [], "line 1: field (before the first): not valid"),
    "empty": (b"", [], "empty"),
    "blank line": (b"\n", [], "line 1"),
    "not UTF-8": (b'{"context": "\xff"}', [], "not valid UTF-8"),
    "an array": (b"[]\n", [], "line 1: field (all): a JSON object"),
    "no answer field": (
        {k: v for k, v in GOOD.items() if k != "recommended_st"},
        [],
        "line 1: fields recommended_<key>: none",
    ),
    "no candidates": (
        {k: v for k, v in GOOD.items() if k != "candidates_st"},
        [],
        "line 1: field candidates_st: Field required",
    ),
    "a space after the id": (
        {**GOOD, "recommended_st": TEN[0] + " "},
        [],
        "line 1: field recommended_st: String should match",
    ),
    "None": ({**GOOD, "recommended_st": "None"}, [], "field (all): recommended 'None' is neither"),
    "truths in lower case": (
        {**GOOD, "gt_items": [one.lower() for one in GOOD["candidates_st"][:1]]},
        [],
        "case of letters alone",
    ),
    "lower case": ({**GOOD, "recommended_st": "b0test0000"}, [], "10 capitals and digits"),
    "a title": ({**GOOD, "recommended_st": "mug"}, [], "null stands for an answer without an id"),
    "nine": ({**GOOD, "candidates_st": TEN[:9]}, [], "candidates_st: 10 different candidates"),
    "eleven": ({**GOOD, "candidates_st": [*TEN, OTHER]}, [], "found 11 different in 11"),
    "repeated": ({**GOOD, "candidates_st": [*TEN[:9], TEN[0]]}, [], "found 9 different in 10"),
    "a number": ({**GOOD, "recommended_st": 7}, [], "line 1: field recommended_st"),
    "text for a list": ({**GOOD, "candidates_st": TEN[0]}, [], "field candidates_st"),
    "no ground truth": ({**GOOD, "gt_items": []}, [], "field gt_items"),
    "no context": ({**GOOD, "context": None}, [], "context"),
    "no raw answer": ({**GOOD, "response_st": None}, ["--reparse"], "line 1: no raw answer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line_and_exit_code_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, options, message = BAD[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        content if isinstance(content, bytes) else json.dumps(content).encode() + b"\n"
    )
    assert main(["evaluate", str(path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "bad.jsonl" in error and len(error.strip().splitlines()) == 1
    write(path, GOOD)  # negative control: the sound file passes
    assert main(["evaluate", str(path)]) == 0


def test_a_later_bad_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, {**GOOD, "recommended_st": ["x"]})
    assert main(["evaluate", str(path), "--json"]) == 2
    assert "line 2: field recommended_st" in capsys.readouterr().err


def test_the_command_prints_json_and_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write(tmp_path / "a.jsonl", *KNOWN), write(tmp_path / "b.jsonl", *KNOWN[:5])
    assert main(["evaluate", str(a), "--against", str(b), "--reparse", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["rows"] == 6
        and found["against"]["unmatched_a"] == 1
        and found["parsing"]["changed"] == 0
        and found["parsing"]["hits_before"] == found["hits"]
    )
    assert main(["evaluate", str(a), "--against", str(b)]) == 0
    out = capsys.readouterr().out
    assert "hit_ratio_pairs" in out and "0.3750" in out and re.search(r"unmatched_a +1\n", out)
    assert "Neither file leads: first less second [+0.0000, +0.0000], p 1 (McNemar)" in out
    worse = [
        {**one, "recommended_st": "B0WRONG001", "gt_items": one["gt_items"][::-1]} for one in KNOWN
    ]
    other = write(tmp_path / "c.jsonl", *worse)
    assert main(["evaluate", str(a), "--against", str(other)]) == 0
    out = capsys.readouterr().out
    assert "The first file leads by 0.3333 of the shared rows, which may be chance" in out
    assert main(["evaluate", str(other), "--against", str(a), "--reparse"]) == 0
    out += capsys.readouterr().out
    assert len(re.findall(r"^matched +6\n", out, re.M)) == 2  # truths are a set
    assert "Read again, 5 of 6 answers name another id" in out
    assert not re.search(r"\d\.\d{5}|[{}]", out)  # no dictionary, no sixteen digits
    assert (
        main(["evaluate", str(tmp_path / "none.jsonl")]) == 2
        and "no such file" in capsys.readouterr().err
    )


@replicated
@pytest.mark.parametrize("domain", DOMAINS)
def test_real_answers_as_the_third_party_counts_them(domain: str) -> None:
    """Counted with plain loops over the published fields, as the third party does."""
    for end in an.VARIANTS.values():
        path = replications_dir() / DOMAINS[domain] / f"test_results_candidates{end}.jsonl"
        raw = [json.loads(line) for line in path.read_bytes().decode().split("\n") if line]
        hits = sum(g == r["recommended_st"] for r in raw for g in r["gt_items"])
        rows = an.read_answers(path)
        found = an.evaluate(rows)
        assert (found["hits"], found["pairs"]) == (hits, sum(len(r["gt_items"]) for r in raw))
        assert found["valid"] == sum(r["recommended_st"] in r["candidates_st"] for r in raw)
        assert found["unparsed"] == sum(r["recommended_st"] is None for r in raw)
        mean = sum(
            r["gt_items"].count(r["recommended_st"]) / len(r["gt_items"]) for r in raw
        ) / len(raw)
        assert found["hit_ratio_mean"] == pytest.approx(mean)
        pattern = re.compile(
            r"\bB[A-Z0-9]{9}\b"
        )  # the third party's own reading: the field is what it makes of the answers
        assert [m.group() if (m := pattern.search(r.response)) else None for r in rows] == [
            r.recommended for r in rows
        ]
        again = an.reparse(rows)
        assert all(
            y.recommended == x.recommended
            for x, y in zip(rows, again, strict=True)
            if x.recommended in x.candidates
        )
        torn = [
            replace(x, recommended=y.recommended)
            for x, y in zip(rows, again[1:] + again[:1], strict=True)
        ]
        assert an.evaluate(torn)["validity_ratio"] < 0.15  # negative control: another row's answer


def test_replications_are_all_there_or_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="st2.jsonl: no such file; set LAVIC_REPLICATIONS"):
        an.read_replications(tmp_path)
    for name in DOMAINS.values():
        (tmp_path / name).mkdir()
        for end in an.VARIANTS.values():
            write(tmp_path / name / f"test_results_candidates{end}.jsonl", *KNOWN)
    found = an.read_replications(tmp_path)
    assert len(found) == 9 and found["home", "title"] == found["beauty", "image"]
    write(tmp_path / DOMAINS["home"] / "test_results_candidates_st2.jsonl", {**GOOD, "context": 1})
    with pytest.raises(UserError, match="st2.jsonl, line 1: field context"):
        an.read_replications(tmp_path)


@replicated
def test_real_answers_read_again() -> None:
    runs = an.read_replications(replications_dir())
    scores = {key: plain(an.reparse(rows)) for key, rows in runs.items()}
    assert {key: (s.conversations, s.pairs, s.hits, s.valid) for key, s in scores.items()} == {
        ("beauty", "title+image"): (767, 854, 73, 746),
        ("beauty", "title"): (767, 854, 69, 749),
        ("beauty", "image"): (767, 854, 23, 753),
        ("fashion", "title+image"): (802, 934, 94, 757),
        ("fashion", "title"): (802, 934, 93, 774),
        ("fashion", "image"): (802, 934, 33, 787),
        ("home", "title+image"): (370, 392, 98, 367),
        ("home", "title"): (370, 392, 104, 369),
        ("home", "image"): (370, 392, 23, 367),
    }
    for key, rows in runs.items():
        for row, again in zip(rows, an.reparse(rows), strict=True):
            assert again.recommended == ev.parse_answer(row.response)  # candidates change nothing
            assert row.recommended in (None, again.recommended)  # the one pattern only loses ids
        assert plain(rows).valid <= scores[key].valid
