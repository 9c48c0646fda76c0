"""What the likelihood of all ten candidates tells beyond the first: ranking scores, calibration,
agreement of the readings, position bias, and paired tests corrected for their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import chisquare

from lavic_utils.evaluation import paired_difference, sign_flip

Rows = Sequence[Mapping[str, Any]]  # those of `Experiment.answers`
Truths = Sequence[Sequence[str]]
READINGS = ("recommended", "constrained", "scored")


def ranked(row: Mapping[str, Any]) -> list[str]:
    """Candidates by length-normalised log-likelihood, best first; none where the model was not
    asked."""
    order = sorted(range(len(row["log_likelihoods"])), key=lambda i: -row["log_likelihoods"][i])
    return [row["candidates"][i] for i in order]


def ranking_scores(rows: Rows, truths: Truths) -> dict[str, float]:
    """HR@1, 3 and 5, MRR and NDCG@10 over conversations. A truth the list does not hold is never
    found: it stays in every denominator (and in NDCG's ideal, which puts up to ten truths first).
    ValueError: lengths differ, or nothing to score."""
    if len(rows) != len(truths) or not rows:
        raise ValueError(f"{len(rows)} answers, {len(truths)} truths")
    discounts = 1 / np.log2(np.arange(2, 12))  # of places 1 to 10
    within: dict[int, list[bool]] = {1: [], 3: [], 5: []}
    reciprocal, gains = [], []
    for row, truth in zip(rows, truths, strict=True):
        found = [asin in truth for asin in ranked(row)]  # by place: is it a ground-truth item?
        for k in within:
            within[k].append(any(found[:k]))
        reciprocal.append(1 / (found.index(True) + 1) if True in found else 0.0)
        ideal = sum(discounts[: len(set(truth))])
        gains.append(sum(discounts[: len(found)][found[:10]]) / ideal)
    scores = {f"HR@{k}": float(np.mean(within[k])) for k in within}
    return scores | {"MRR": float(np.mean(reciprocal)), "NDCG@10": float(np.mean(gains))}


def calibration(rows: Rows, truths: Truths) -> tuple[pd.DataFrame, float]:
    """How often the likeliest candidate is right, by its probability among the ten, in ten equal
    parts of 0 to 1: (table with n, confidence, accuracy; expected calibration error)."""
    best = []
    for row, truth in zip(rows, truths, strict=True):
        if row["probabilities"]:
            likeliest = int(np.argmax(row["probabilities"]))
            right = row["candidates"][likeliest] in truth
            best.append((row["probabilities"][likeliest], right))
    frame = pd.DataFrame(best, columns=["confidence", "accuracy"]).astype(float)
    frame["bin"] = np.minimum((frame["confidence"] * 10).astype(int), 9)
    groups = frame.groupby("bin")
    table = groups[["confidence", "accuracy"]].mean()
    table.insert(0, "n", groups.size())
    distance = (table["confidence"] - table["accuracy"]).abs()
    return table, float((table["n"] * distance).sum() / table["n"].sum())


def agreement(rows: Rows) -> dict[str, float]:
    """Share of dialogues to which two readings give the same id, for each pair of readings."""
    found = {}
    for a, b in combinations(READINGS, 2):
        found[f"{a} = {b}"] = float(np.mean([row[a] == row[b] for row in rows]))
    return found


def position_bias(rows: Rows) -> tuple[pd.DataFrame, float]:
    """How often each position of the list is answered (valid answers): (table by position with
    `answers` and `share`, p of a chi-square test that all positions are equally likely). Lists
    come in no particular order, so they should be."""
    places = []
    for row in rows:
        if row["recommended"] in row["candidates"]:
            places.append(row["candidates"].index(row["recommended"]))
    counts = np.bincount(places, minlength=10)
    positions = pd.RangeIndex(1, len(counts) + 1, name="position")
    shares = counts / max(1, counts.sum())
    table = pd.DataFrame({"answers": counts, "share": shares}, index=positions)
    return table, float(chisquare(counts).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: p-values that keep the chance of any false finding among all of them below
    the level asked for."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    weighted = p[order] * np.arange(len(p), 0, -1)  # smallest times n, next times n - 1, ...
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(weighted), 1.0)
    return adjusted.tolist()


def paired_tests(
    mine: Mapping[str, list[bool]],
    others: Mapping[tuple[str, str], list[bool]],
    targets: Mapping[str, Sequence[str]],
) -> pd.DataFrame:
    """One method (hits by domain) against others (by (method, domain)) on the same conversations,
    whose `targets` (by domain) are drawn or flipped whole: n, items, only mine, only other,
    difference, its 95 % interval, p of `evaluation.sign_flip`, and p (Holm) over all rows."""
    rows = []
    for (method, domain), theirs in others.items():
        a, b, items = np.array(mine[domain], bool), np.array(theirs, bool), targets[domain]
        row = {"domain": domain, "against": method, "n": len(b), "items": len(set(items))}
        row |= {"only mine": int((a & ~b).sum()), "only other": int((b & ~a).sum())}
        found = paired_difference(a, b, targets=items)
        row |= dict(zip(("difference", "low", "high"), found, strict=True))
        rows.append(row | {"p": sign_flip(a.astype(int) - b.astype(int), items)})
    table = pd.DataFrame(rows)
    return table.assign(**{"p (Holm)": holm(table["p"])}).set_index(["domain", "against"])
