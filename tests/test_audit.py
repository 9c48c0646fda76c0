"""The audit: enumeration against hand-made splits, committed claims against their sources."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import readme as blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from lavic_utils.__main__ import main
from lavic_utils.audit import answer_files as an
from lavic_utils.audit import claims
from lavic_utils.audit import published as audit
from lavic_utils.config import DOMAINS, ROOT, UserError, real_data_dir, replications_dir
from lavic_utils.evaluation import mcnemar, wilson
from lavic_utils.methods import BEFORE
from lavic_utils.provenance import write_kept

real = pytest.mark.skipif(
    real_data_dir() is None,
    reason="set LAVIC_DATA to a folder with the published Reddit-Amazon files",
)
both = pytest.mark.skipif(
    real_data_dir() is None or replications_dir() is None,
    reason="set LAVIC_DATA and LAVIC_REPLICATIONS (LaViC/data of Lottotpk/graphRAG_multimodal)",
)
SMALL = audit.Split(
    4, 7, 6, 4, 3, ((1,), (2, 1), (1, 1), (1,))
)  # 4 conversations; one repeats an item
quick = settings(database=None, derandomize=True, deadline=None, max_examples=80)


def test_published_cells_are_those_of_the_file() -> None:
    cells = audit.published_cells()
    assert len(cells) == 19 * 3 * 2 and not cells.duplicated(["method", "domain", "metric"]).any()
    assert (
        cells["value"].isna().sum() == 5 * 3 + 4
    )  # VR of five retrieval methods; entire tokens in two domains


@quick
@given(st.integers(1, 1200), st.data())
def test_counts_are_exactly_those_that_print_the_value(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    value = float(f"{k / n:.4f}")
    found = audit.counts(value, n)
    assert k in found and all(
        abs(Fraction(one, n) - Fraction(str(value))) <= audit.HALF for one in found
    )
    assert all(
        abs(Fraction(one, n) - Fraction(str(value))) > audit.HALF
        for one in range(n + 1)
        if one not in found
    )


def test_a_value_that_no_count_prints() -> None:
    assert (
        list(audit.counts(0.0169, 890)) == [15]
        and not audit.counts(0.0169, 859)
        and list(audit.counts(1.0, 3)) == [3]
    )


def test_row_sums_are_all_that_answers_can_give() -> None:
    unit, bits = audit.row_sums(SMALL.truths)
    by_hand = {
        sum(
            Fraction(m, sum(times)) if m else Fraction(0)
            for m, times in zip(named, SMALL.truths, strict=True)
        )
        for named in itertools.product(*([0, *times] for times in SMALL.truths))
    }
    assert {Fraction(s, unit) for s in range(bits.bit_length()) if bits >> s & 1} == by_hand
    values = {f"{float(one / 4):.4f}" for one in by_hand}
    fitting = {
        f"{i / 10_000:.4f}" for i in range(10_001) if audit.fits(i / 10_000, SMALL, "row mean")
    }
    assert (
        values <= fitting
        and len(fitting) <= 2 * len(values)
        and not audit.fits(0.05, SMALL, "row mean")
    )
    assert audit.chance(SMALL, "conversations", 10_000) == pytest.approx(4 / 10_000)


def test_readings_name_what_fits() -> None:
    cells = pd.DataFrame(
        [
            {
                "method": "m",
                "family": "proposed",
                "domain": "home",
                "metric": "hr@1",
                "value": value,
            }
            for value in (0.25, 0.2857, 0.3333, 0.05, np.nan)
        ]
    )
    found = audit.readings(cells, {"home": SMALL})
    assert list(found["reading"]) == [
        "conversations, row mean",
        "pairs",
        "distinct, row mean",
        "none",
    ]
    assert (
        list(found["pairs k"]) == ["", "2", "", ""]
        and (found["to"] - found["from"] < 1.01e-4).all()
    )


@quick
@given(st.integers(1, 25), st.data())
def test_paired_bounds_hold_every_pairing(n: int, data: st.DataObject) -> None:
    a, b = (data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for _ in "ab")
    only_a, only_b = (
        sum(x and not y for x, y in zip(p, q, strict=True)) for p, q in ((a, b), (b, a))
    )
    low, high = audit.paired_bounds(sum(a), sum(b), n)
    assert low - 1e-12 <= mcnemar(only_a, only_b) <= high + 1e-12


def test_comparisons_tell_clear_from_unclear() -> None:
    def verdicts(other: float) -> str:
        cells = pd.DataFrame(
            [
                {"method": m, "family": "proposed", "domain": "home", "metric": "hr@1", "value": v}
                for m, v in (("LaViC", 0.3), ("other", other))
            ]
        )
        return audit.comparisons(cells, {"home": audit.Split(400, 400, 400, 400, 400, ())})[
            "verdict"
        ].item()

    assert (
        verdicts(0.1) == "beyond chance in every pairing"
        and verdicts(0.2975) == "within chance in every pairing"
    )
    assert verdicts(0.25) == "depends on unpublished answers"


def test_needed_gives_the_power_it_promises() -> None:
    """Simulated: with the sample asked for about 80 of 100 tests see the difference, with a quarter
    of it far fewer."""
    n, rng = audit.needed(0.10, 0.04), np.random.default_rng(0)

    def power(size: int) -> float:
        draws = rng.multinomial(size, (0.07, 0.03, 0.9), size=400)
        return float(np.mean([mcnemar(int(a), int(b)) < 0.05 for a, b, _ in draws]))

    assert 0.7 < power(n) < 0.9 and power(n // 4) < 0.5
    for wrong in ((0.1, 0.2), (0.1, 0.0), (1.5, 0.1)):
        with pytest.raises(ValueError):
            audit.needed(*wrong)


@real
def test_real_splits() -> None:
    splits = audit.read_splits(real_data_dir())
    assert {
        d: (s.conversations, s.pairs, s.distinct, s.best_pairs, s.best_conversations)
        for d, s in splits.items()
    } == {
        "beauty": (772, 890, 859, 190, 179),
        "fashion": (826, 998, 961, 201, 189),
        "home": (372, 397, 397, 201, 201),
    }
    found = audit.readings(audit.published_cells(), splits)
    retrieval = found[(found["family"] == "retrieval") & (found["metric"] == "hr@1")]
    assert retrieval["pairs"].all() and len(retrieval) == 15
    # negative control: on a split of another size the same fifteen figures are no counts
    other = {
        d: audit.Split(
            s.conversations, s.pairs - 1, s.distinct, s.best_pairs, s.best_conversations, s.truths
        )
        for d, s in splits.items()
    }
    assert (
        audit.readings(retrieval[["method", "family", "domain", "metric", "value"]], other)[
            "pairs"
        ].sum()
        < 8
    )
    evidence = (
        audit.reading_evidence(found, splits)
        .query("methods == 'retrieval'")
        .set_index(["domain", "reading"])["p"]
    )
    assert all(evidence[d, "pairs"] < 1e-4 and evidence[d, "conversations"] > 0.9 for d in DOMAINS)


@real
def test_what_others_report_counts_items_with_repeats() -> None:
    """The authors' script divides hits by items, valid answers by conversations: so do others."""
    splits = audit.read_splits(real_data_dir())
    found = audit.reported(audit.published_cells(), splits)
    assert len(found) == 6 and found["hr@1 reading"].str.contains("pairs").all()
    assert found["vr reading"].str.contains("conversations").all()
    assert not found["hr@1 reading"].str.contains("conversations").any()
    assert (found[found["domain"] == "home"]["p independent"] < 0.05).all()
    assert (found[found["domain"] != "home"]["p independent"] > 0.05).all()


@both
def test_wilson_over_conversations_is_no_narrower_than_the_bootstrap_over_items() -> None:
    """`sampling` puts HR@1 over items on Wilson's interval over conversations: about as wide."""
    for rows in an.read_replications(replications_dir()).values():
        found = an.evaluate(rows)
        low, high = found["ci95"]["hit_ratio_pairs"]
        wide = np.diff(wilson(round(found["hit_ratio_pairs"] * len(rows)), len(rows)))[0]
        naive = np.diff(wilson(found["hits"] * 4, found["pairs"] * 4))[
            0
        ]  # negative control: four times the trials
        assert 0.85 < wide / (high - low) < 1.15 and naive / (high - low) < 0.7


# ---------------------------------------------------------------- the committed claims
STALE = (
    "results/claims.json is stale: set LAVIC_DATA and LAVIC_REPLICATIONS and execute notebook 07"
)


def shown(row: dict) -> tuple:
    return row["method"], row["domain"], row["metric"], row["published"]


def test_committed_claims_hold_every_published_cell_and_the_mini_run() -> None:
    found = claims.read_claims()
    cells = audit.published_cells()
    expected = [
        (c.method, c.domain, c.metric, None if math.isnan(c.value) else c.value)
        for c in cells.itertuples()
    ]
    assert [shown(row) for row in found["rows"]] == expected, STALE
    assert expected != [shown(row) for row in found["rows"][1:]]
    fields = {"method", "domain", "metric", *claims.PAPER, "ours", "tier", "status", "reason"}
    assert (
        all(set(row) == fields and row["status"] and row["reason"] for row in found["rows"])
        and len(found["rows"]) == 114
    )
    assert all(
        row[name] is not None
        for row in found["rows"]
        if row["published"] is not None
        for name in claims.PAPER[:-1]
    )
    assert all(
        set(one) == {"tier", "value", "n", "worlds", "low", "high"}
        for row in found["rows"]
        for one in row["ours"]
    )
    mini = claims.measured(
        json.loads((ROOT / "results/mini/metrics.json").read_text(encoding="utf-8"))
    )
    cells = {(row["method"], row["domain"], row["metric"]) for row in found["rows"]}
    assert {method for method, *_ in set(mini) - cells} <= {BEFORE.name}  # not a row of the paper
    mini = {cell: one for cell, one in mini.items() if cell in cells}
    committed = {
        (r["method"], r["domain"], r["metric"]): one
        for r in found["rows"]
        for one in r["ours"]
        if one["tier"] == "mini run"
    }
    assert committed == {key: value for key, value in mini.items() if key in committed} and len(
        committed
    ) == len(mini), STALE
    assert (ROOT / "results/claims.md").read_text(encoding="utf-8") == claims.markdown(found), STALE
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- claims: begin -->\n")[1]
    assert readme.split("<!-- claims: end -->")[0] == blocks.claims(), "run `make readme`"


@both
def test_committed_claims_are_what_the_data_give() -> None:
    fresh = claims.claims(real_data_dir(), replications_dir(), ROOT / "results")
    assert json.loads(json.dumps(fresh)) == claims.read_claims(), STALE
    changed = json.loads(json.dumps(fresh))
    changed["rows"][0]["published"] += 0.0001  # negative control
    assert changed != claims.read_claims()


def test_a_mini_result_never_passes_for_the_papers() -> None:
    rows = claims.read_claims()["rows"]
    only = [
        row for row in rows if row["ours"] and all(one["tier"] == "mini run" for one in row["ours"])
    ]
    assert only and all(row["status"] in (claims.MINI, claims.ABSENT) for row in only)
    tiers = [
        (row["tier"], row["status"]) for row in rows if row["status"].startswith("another setting")
    ]
    assert tiers and all(tier == "replication answers" for tier, _ in tiers)
    cell, one = {"published": 0.1187, "n": 772}, {"tier": "mini run", "value": 0.1187, "n": 767}
    assert claims._status(cell, False, [one])[0] == claims.MINI  # though the two are equal


@pytest.mark.parametrize(
    ("paper", "n", "theirs", "m", "p"),
    [(0.1187, 772, 0.0952, 767, "0.135"), (0.3197, 372, 0.2649, 370, "0.10")],
)
def test_a_published_figure_has_an_error_of_its_own(paper, n, theirs, m, p) -> None:
    """LaViC on Beauty and on Home: outside of the third party's interval, yet not told apart."""
    cell = {"published": paper, "n": n}
    one = {"tier": "replication answers", "value": theirs, "n": m}
    status, reason = claims._status(cell, False, [one])
    assert "not told apart" in status and f"p = {p}" in reason
    status, _ = claims._status(cell, False, [one | {"value": paper / 2}])
    assert "not told apart" not in status and "told apart" in status


def test_readme_says_where_the_lead_depends_on_how_hits_are_counted() -> None:
    """Counted alike, 30 of 30 leads are firm; LaViC over conversations against its rivals over
    items leaves two out, and they carry the headline."""
    said = "\n".join(claims.summary(claims.read_claims()))
    assert "30 of 30 differences" in said and "(30 after Holm" in said and "28 are" in said
    assert "LLaVA-v1.6 (title) on beauty (p = 0.083)" in said
    assert "LLaVA-v1.6 (title) on fashion (p = 0.186)" in said
    assert "beauty (p at most 0.038, 0.23 after Holm's correction); 2 depend on" in said
    assert "0 never" not in said


def test_a_full_run_counts_first_and_a_rehearsal_never(tmp_path, monkeypatch) -> None:
    one = {"tier": "rehearsal", "value": 0.1, "n": 9, "low": 0.0, "high": 1.0}
    mini, full = one | {"tier": "mini run"}, one | {"tier": "full run", "value": 0.9}
    cell = {"published": 0.1, "n": 372}
    assert claims._status(cell, False, [one])[0] == claims.REHEARSAL
    assert claims._status(cell, False, [mini, one])[0] == claims.MINI
    assert "full run; told apart from" in claims._status(cell, False, [full, mini, one])[0]
    for name in ("read_splits", "published_cells"):
        monkeypatch.setattr(claims.published, name, lambda *_: {})
    monkeypatch.setattr(claims, "read_replications", lambda _: {})
    monkeypatch.setattr(claims, "replication_figures", lambda _: {})
    results = tmp_path / "results"
    made = {"provenance": {"tier": "rehearsal"}, "rows": []}
    (results / "paper").mkdir(parents=True)
    write_kept(results / "paper" / "metrics.json", made)
    monkeypatch.setattr(claims, "ROOT", tmp_path)  # as if these were the committed ones
    with pytest.raises(UserError, match="a rehearsal's figures are no claims"):
        claims.claims(tmp_path, tmp_path, results)
    # negative control: the committed results hold no rehearsal
    kept = [p.read_text(encoding="utf-8") for p in ROOT.glob("results/*/metrics.json")]
    assert kept and not any(json.loads(text)["provenance"]["tier"] == "rehearsal" for text in kept)


def test_the_page_opens_with_the_summary_and_holds_what_stands_behind_it() -> None:
    found = claims.read_claims()
    page = claims.markdown(found)
    head, leads = page.split("\n## LaViC's lead, 52 comparisons\n")
    assert all(line in head for line in claims.summary(found)) and len(head.splitlines()) < 16
    leads, cells = leads.split("\n## All 114 cells\n")
    for verdict in (audit.BEYOND, audit.WITHIN, audit.DEPENDS):
        said = [one["verdict"] for one in found["comparisons"]].count(verdict)
        assert leads.count(f"| {verdict} |") == said
    assert cells.count("\n| ") == len(found["rows"]) + 2


def test_one_cell_is_explained_from_count_to_verdict(capsys) -> None:
    assert main(["claims", "lavic_w_o_images", "home"]) == 0
    said = capsys.readouterr().out
    row = next(
        one
        for one in claims.read_claims()["rows"]
        if (one["method"], one["domain"], one["metric"]) == ("LaViC w/o images", "home", "hr@1")
    )
    assert f"published: {row['published']:.4f}" in said and f"ceiling: {row['ceiling']:.4f}" in said
    assert all(f"{k}/{name}" in said for name, k in row["counts"].items())
    assert row["status"] in said and said.count("  over ") == 1 and audit.DEPENDS in said
    assert main(["claims", "LaViC", "beauty"]) == 0  # over every other method with a figure there
    assert capsys.readouterr().out.count("  over ") == 18
    for arguments, why in (
        (["LaViC"], "of which domain"),
        (["LaViC", "garden"], "no domain 'garden'"),
        (["nobody", "home"], "nobody"),
        (["", "beauty"], "no method ''"),
        (["LaViC", ""], "of which domain"),
    ):
        assert main(["claims", *arguments]) == 2
        said = capsys.readouterr()
        assert why in said.err and said.err.count("\n") == 1 and not said.out


def test_a_domain_is_read_in_any_case_and_a_lead_that_cannot_be_judged_says_why(capsys) -> None:
    said = []
    for domain in ("beauty", "BEAUTY"):
        assert main(["claims", "bm25", domain]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].count("  over BM25: ") == 1
    assert main(["claims", "Entire tokens (5x577)", "fashion"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("none to judge, the paper prints no HR@1 of Entire tokens (5x577) there")


def test_a_mean_over_worlds_of_their_own_is_as_sure_as_all_their_dialogues(capsys) -> None:
    """n counts them all, and VR's interval is Wilson's over them; seeds that answer the same
    dialogues are no surer than one."""
    metrics = json.loads((ROOT / "results/mini/metrics.json").read_text(encoding="utf-8"))
    vr = claims.measured(metrics)["LaViC", "beauty", "vr"]
    rows = [r for r in metrics["rows"] if (r["method"], r["domain"]) == ("LaViC", "beauty")]
    n = sum(row["conversations"] for row in rows)
    valid = sum(round(row["validity_ratio"] * row["conversations"]) for row in rows)
    assert (vr["n"], vr["worlds"], n) == (1200, 3, 1200)
    assert (vr["low"], vr["high"]) == tuple(round(one, 4) for one in wilson(valid, n))
    same = claims.measured(metrics | {"rows": [row | {"world": None} for row in rows]})
    other = same["LaViC", "beauty", "vr"]
    assert (other["n"], other["worlds"], other["value"]) == (400, 1, vr["value"])
    ratio = (other["high"] - other["low"]) / (vr["high"] - vr["low"])
    assert ratio == pytest.approx(3**0.5, abs=0.02)
    assert main(["claims", "LaViC", "beauty"]) == 0
    said = capsys.readouterr().out
    assert said.count(", n 1200 (3 worlds of 400)") == 2 and ", n 767;" in said


def test_missing_claims_say_what_to_do(tmp_path) -> None:
    with pytest.raises(UserError, match="run notebook 07"):
        claims.read_claims(tmp_path / "claims.json")
