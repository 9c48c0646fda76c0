"""What the likelihood of all ten candidates tells beyond the first: ranking scores, calibration, agreement of the readings,
position bias, and paired tests corrected for their number. Rows are those of `Run.answers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import chisquare

from lavic_utils.audit.answer_files import mcnemar

Rows = Sequence[Mapping[str, Any]]
Truths = Sequence[Sequence[str]]
READINGS = ("recommended", "constrained", "scored")


def ranked(row: Mapping[str, Any]) -> list[str]:
    """Candidates by length-normalised log-likelihood, best first; none where the model was not asked."""
    order = sorted(range(len(row["log_likelihoods"])), key=lambda i: -row["log_likelihoods"][i])
    return [row["candidates"][i] for i in order]


def ranking_scores(rows: Rows, truths: Truths, ks: Sequence[int] = (1, 3, 5)) -> dict[str, float]:
    """HR@k, MRR and NDCG@10 over conversations. A truth the list does not hold is never found: it stays in every denominator
    (and in NDCG's ideal, which puts up to ten truths first). ValueError: lengths differ, or nothing to score."""
    if len(rows) != len(truths) or not rows:
        raise ValueError(f"{len(rows)} answers, {len(truths)} truths")
    found = [
        [asin in truth for asin in ranked(row)] for row, truth in zip(rows, truths, strict=True)
    ]
    gains = 1 / np.log2(np.arange(2, 12))
    scores = {f"HR@{k}": float(np.mean([any(hit[:k]) for hit in found])) for k in ks}
    scores["MRR"] = float(
        np.mean([1 / (hit.index(True) + 1) if True in hit else 0.0 for hit in found])
    )
    scores["NDCG@10"] = float(
        np.mean(
            [
                sum(gains[: len(hit)][hit]) / sum(gains[: len(set(truth))])
                for hit, truth in zip(found, truths, strict=True)
            ]
        )
    )
    return scores


def calibration(rows: Rows, truths: Truths, bins: int = 10) -> tuple[pd.DataFrame, float]:
    """How often the likeliest candidate is right, by the probability it is given among the ten, in `bins` equal parts of 0 to 1:
    (table with n, confidence, accuracy; expected calibration error, their mean distance weighted by n)."""
    best = [
        (
            max(row["probabilities"]),
            row["candidates"][int(np.argmax(row["probabilities"]))] in truth,
        )
        for row, truth in zip(rows, truths, strict=True)
        if row["probabilities"]
    ]
    frame = pd.DataFrame(best, columns=["confidence", "accuracy"]).astype(float)
    frame["bin"] = np.minimum((frame["confidence"] * bins).astype(int), bins - 1)
    table = frame.groupby("bin").agg(
        n=("accuracy", "size"), confidence=("confidence", "mean"), accuracy=("accuracy", "mean")
    )
    error = float(
        (table["n"] * (table["confidence"] - table["accuracy"]).abs()).sum() / table["n"].sum()
    )
    return table, error


def agreement(rows: Rows) -> dict[str, float]:
    """Share of dialogues to which two readings give the same id, for each pair of readings."""
    pairs = [(a, b) for i, a in enumerate(READINGS) for b in READINGS[i + 1 :]]
    return {f"{a} = {b}": float(np.mean([row[a] == row[b] for row in rows])) for a, b in pairs}


def position_bias(rows: Rows) -> tuple[pd.DataFrame, float]:
    """How often each position of the list is answered (valid answers): (table by position with `answers` and `share`, p of a
    chi-square test that all positions are equally likely). Lists come in no particular order, so they should be."""
    places = [
        row["candidates"].index(row["recommended"])
        for row in rows
        if row["recommended"] in row["candidates"]
    ]
    counts = np.bincount(places, minlength=10)
    table = pd.DataFrame(
        {"answers": counts, "share": counts / max(1, counts.sum())},
        index=pd.RangeIndex(1, len(counts) + 1),
    )
    return table.rename_axis("position"), float(chisquare(counts).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: p-values that keep the chance of any false finding among all of them below the level asked for."""
    p, adjusted, largest = np.asarray(p_values, dtype=float), np.empty(len(p_values)), 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted.tolist()


def hits(rows: Rows, truths: Truths) -> list[bool]:
    """Whether each answer is a ground-truth item."""
    return [row["recommended"] in truth for row, truth in zip(rows, truths, strict=True)]


def paired_tests(
    mine: Mapping[str, list[bool]], others: Mapping[tuple[str, str], list[bool]]
) -> pd.DataFrame:
    """McNemar's exact test of one method (hits by domain) against others (by (method, domain)) on the same conversations, with
    Holm's correction over all of them: only_mine, only_other, difference, p, p_holm."""
    rows = []
    for (method, domain), theirs in others.items():
        only = [
            sum(a and not b for a, b in zip(x, y, strict=True))
            for x, y in ((mine[domain], theirs), (theirs, mine[domain]))
        ]
        rows.append(
            {
                "domain": domain,
                "against": method,
                "n": len(theirs),
                "only mine": only[0],
                "only other": only[1],
                "difference": (only[0] - only[1]) / len(theirs),
                "p": mcnemar(*only),
            }
        )
    table = pd.DataFrame(rows)
    return table.assign(**{"p (Holm)": holm(table["p"])}).set_index(["domain", "against"])
