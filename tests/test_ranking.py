"""Ranking scores, calibration, position bias and Holm's correction, by hand-computed cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lavic_utils import ranking

TEN = [f"B00000000{i}" for i in range(10)]


def row(best: int, **more) -> dict:
    """An answer that likes candidate `best` most, then the others in list order."""
    scores = [-1.0 - i / 10 for i in range(10)]
    scores[best] = 0.0
    return {
        "candidates": TEN,
        "log_likelihoods": scores,
        "probabilities": np.exp(scores) / np.exp(scores).sum(),
        "recommended": TEN[best],
        "constrained": TEN[best],
        "scored": TEN[best],
        **more,
    }


def test_ranking_scores_by_hand():
    scores = ranking.ranking_scores([row(3), row(0), row(0)], [[TEN[3]], [TEN[2]], ["B111111111"]])
    assert (
        scores["HR@1"] == pytest.approx(1 / 3)
        and scores["HR@3"] == pytest.approx(2 / 3) == scores["HR@5"]
    )
    assert scores["MRR"] == pytest.approx(
        (1 + 1 / 3) / 3
    )  # the third truth is not in the list: 0, but counted
    assert scores["NDCG@10"] == pytest.approx((1 + 1 / math.log2(4)) / 3)
    two = ranking.ranking_scores([row(0)], [[TEN[0], "B111111111"]])[
        "NDCG@10"
    ]  # only one of two truths can be found
    assert two == pytest.approx(1 / (1 + 1 / math.log2(3)))
    silent = {**row(0), "log_likelihoods": []}
    assert ranking.ranking_scores([silent], [[TEN[0]]])["HR@1"] == 0
    with pytest.raises(ValueError, match="1 answers, 2 truths"):
        ranking.ranking_scores([row(0)], [[TEN[0]], [TEN[1]]])


def test_calibration_sees_overconfidence():
    rows = [{**row(0), "probabilities": [0.91] + [0.01] * 9}] * 10
    _, wrong = ranking.calibration(rows, [[TEN[5]]] * 10)
    table, right = ranking.calibration(rows, [[TEN[0]]] * 9 + [[TEN[5]]])
    assert (
        wrong == pytest.approx(0.91)
        and right == pytest.approx(0.01)
        and table["n"].tolist() == [10]
    )


def test_agreement_counts_each_pair_of_readings():
    found = ranking.agreement([row(0), {**row(1), "recommended": None}])
    assert found == {
        "recommended = constrained": 0.5,
        "recommended = scored": 0.5,
        "constrained = scored": 1.0,
    }


def test_position_bias_tells_a_biased_method_from_a_fair_one():
    fair, biased = (
        [row(i % 10) for i in range(200)],
        [row(0 if i % 2 else i % 10) for i in range(200)],
    )
    assert ranking.position_bias(fair)[1] > 0.99 and ranking.position_bias(biased)[1] < 1e-6
    assert ranking.position_bias(biased)[0].loc[1, "share"] > 0.5
    assert (
        ranking.position_bias([{**row(0), "recommended": "B111111111"}] + fair)[0]["answers"].sum()
        == 200
    )


def test_holm_by_hand():
    assert ranking.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert ranking.holm([0.5, 0.9]) == [1.0, 1.0] and ranking.holm([0.02]) == [0.02]


def test_paired_tests_correct_for_their_number():
    mine = {"home": [True] * 12 + [False] * 8}
    others = {("a", "home"): [False] * 20, ("b", "home"): [True] * 12 + [False] * 8}
    table = ranking.paired_tests(mine, others, {"home": [str(i) for i in range(20)]})
    first, second = table.loc[("home", "a")], table.loc[("home", "b")]
    assert (first["only mine"], first["only other"], second["p"]) == (12, 0, 1.0)
    assert first["p (Holm)"] == pytest.approx(2 * first["p"]) and first["p"] == pytest.approx(
        2 * 0.5**12
    )
    pairs = ranking.paired_tests(mine, others, {"home": [str(i // 2) for i in range(20)]})
    found = pairs.loc[("home", "a")]
    assert found["items"] == 10 and found["p"] == pytest.approx(2 * 0.5**6)  # six items, not twelve
