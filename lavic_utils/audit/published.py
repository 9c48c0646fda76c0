"""The audit: what the published figures can mean, how sure they are, and what other answers say. Notebook 07 shows it.

Sources: `published.json`, the published test splits (LAVIC_DATA), a third party's answers of 7B models
(LAVIC_REPLICATIONS) and the mini run's `metrics.json`. HR@1 and VR are shares (0 to 1). Nothing here trains or answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import binomtest, norm

from lavic_utils.audit import answer_files as an
from lavic_utils.config import DOMAINS, PACKAGE
from lavic_utils.data import read_dialogues
from lavic_utils.evaluation import VARIANTS, wilson

HALF = Fraction(1, 20_000)  # half a unit of the fourth digit: what rounding may hide
READINGS = ("pairs", "distinct", "conversations", "row mean")
BEYOND, WITHIN = "beyond chance in every pairing", "within chance in every pairing"
DEPENDS = "depends on unpublished answers"
LISTS_ONLY = (
    "generative",
    "ablation",
    "proprietary",
    "proposed",
)  # these choose among the ten candidates; retrieval does not


GROUP8, CAVIL = "yousef-moustafa/ds8008-group8-lavic", "Kyro-Ma/CaViL"
# Who, setting in their words, domain, HR@1, VR: what others report of their own reruns, one run each, measured by nobody here.
REPORTED = (
    (GROUP8, "1 image an item", "home", 0.1662, 0.9651),
    (GROUP8, "2 images", "home", 0.2469, 0.9973),
    (GROUP8, "all images", "home", 0.2443, 0.9919),
    (CAVIL, "their routed adapters", "beauty", 0.1000, 0.9909),
    (CAVIL, "their routed adapters", "fashion", 0.1072, 0.9915),
    (CAVIL, "their routed adapters", "home", 0.1990, 1.0),
)

BATCH_MEAN = 0.2510  # what GROUP8's run with all images logs as its mean over batches


# ---------------------------------------------------------------- the published cells and the test splits
def published_cells() -> pd.DataFrame:
    """method, family, inputs, tables, domain, metric (hr@1, vr), value (NaN: not in the paper)."""
    rows = json.loads((PACKAGE / "published.json").read_text(encoding="utf-8"))["rows"]
    return pd.DataFrame([{"method": r["method"], "family": r["family"], "tables": tuple(r["table"]), "domain": domain,
                          "metric": metric, "value": r["results"][domain][metric]}
                         for r in rows for domain in DOMAINS for metric in ("hr@1", "vr")])  # fmt: skip


@dataclass(frozen=True)
class Split:
    """Sizes of a test split: `pairs` ground-truth items with repeats, `distinct` without; `best_*` what somebody who
    always names the best of `candidates_st` would score; `truths`: number of times each id stands, by conversation."""

    conversations: int
    pairs: int
    distinct: int
    best_pairs: int
    best_conversations: int
    truths: tuple[tuple[int, ...], ...]

    def size(self, reading: str) -> int:
        return self.conversations if reading == "row mean" else getattr(self, reading)


def read_splits(root: Path | str) -> dict[str, Split]:
    """The three published test splits. UserError where a file is missing or bad."""
    found = {}
    for domain in DOMAINS:
        rows = read_dialogues(root, domain, "test")
        best = [max(map(row.gt_items.count, row.candidates_st)) for row in rows]
        truths = tuple(
            tuple(row.gt_items.count(one) for one in sorted(set(row.gt_items))) for row in rows
        )
        found[domain] = Split(
            len(rows),
            sum(map(sum, truths)),
            sum(map(len, truths)),
            sum(best),
            sum(b > 0 for b in best),
            truths,
        )
    return found


# ---------------------------------------------------------------- which counts give a printed value
def counts(value: float, n: int) -> list[int]:
    """All k of 0..n with k/n within half a unit of the fourth digit of the printed value (both ends allowed)."""
    printed = Fraction(str(value))
    low, high = math.ceil((printed - HALF) * n), math.floor((printed + HALF) * n)
    return list(range(max(low, 0), min(high, n) + 1))


@cache
def row_sums(truths: tuple[tuple[int, ...], ...]) -> tuple[int, int]:
    """(unit, bits): which sums over conversations of hits / items any answers can give. Bit s set: s / unit is possible.

    Each conversation adds 0 or m / |G|, m the times the named id stands among its |G| items. All sums are enumerated: the
    bits are shifted by each possible addition and joined.
    """
    unit, bits = math.lcm(*(sum(times) for times in truths)), 1
    for times in truths:
        joined = bits
        for m in set(times):
            joined |= bits << (m * unit // sum(times))
        bits = joined
    return unit, bits


def fits(value: float, split: Split, reading: str) -> bool:
    """Can answers to this split, counted so, print this value? Exact, by enumeration."""
    if reading != "row mean":
        return bool(counts(value, split.size(reading)))
    unit, bits = row_sums(split.truths)
    scale = split.conversations * unit
    low, high = (
        math.ceil((Fraction(str(value)) - HALF) * scale),
        math.floor((Fraction(str(value)) + HALF) * scale),
    )
    return bool(bits >> max(low, 0) & ((1 << (high - max(low, 0) + 1)) - 1))


@cache
def chance(split: Split, reading: str, highest: int) -> float:
    """Share of the four-digit values 1..highest (in units of .0001) that fit: how often a reading fits for no reason."""
    return sum(fits(i / 10_000, split, reading) for i in range(1, highest + 1)) / highest


def readings(cells: pd.DataFrame, splits: Mapping[str, Split]) -> pd.DataFrame:
    """The cells with a value, with one column a reading (does it fit?), the counts, and the rounding interval.

    `reading` names all that fit, "none" where no count over this test split does: then the figure is a mean of another
    kind (over batches of several rows, say), or was computed on other rows, or is misprinted; which, its digits do not say.
    """
    kept = cells.dropna(subset="value").copy()
    for reading in READINGS:
        kept[reading] = [
            fits(v, splits[d], reading) for v, d in zip(kept["value"], kept["domain"], strict=True)
        ]
        if reading != "row mean":
            kept[f"{reading} k"] = [
                " ".join(map(str, counts(v, splits[d].size(reading))))
                for v, d in zip(kept["value"], kept["domain"], strict=True)
            ]
    kept["reading"] = [
        ", ".join(r for r in READINGS if row[r]) or "none" for _, row in kept.iterrows()
    ]
    kept["from"], kept["to"] = (
        (kept["value"] - float(HALF)).clip(lower=0),
        (kept["value"] + float(HALF)).clip(upper=1),
    )
    return kept


def reading_evidence(
    found: pd.DataFrame, splits: Mapping[str, Split], metric: str = "hr@1"
) -> pd.DataFrame:
    """For each domain, kind of method and reading: cells above zero, how many fit, how many would by chance, one-sided p."""
    rows, part = [], found[(found["metric"] == metric) & (found["value"] > 0)]
    for (domain, retrieval), cells in part.groupby(
        ["domain", part["family"] == "retrieval"], sort=False
    ):
        for reading in READINGS:
            share = chance(
                splits[domain],
                reading,
                round(float(part[part["domain"] == domain]["value"].max()) * 10_000),
            )
            fit, n = int(cells[reading].sum()), len(cells)
            rows.append({"domain": domain, "methods": "retrieval" if retrieval else "choosing", "reading": reading, "cells": n,
                         "fit": fit, "expected by chance": share * n,
                         "p": float(binomtest(fit, n, share, alternative="greater").pvalue)})  # fmt: skip
    return pd.DataFrame(rows)


# ---------------------------------------------------------------- improvements, ceilings, intervals
def improvements(cells: pd.DataFrame) -> pd.DataFrame:
    """LaViC over the best other open-source row: recomputed (%), the range that rounding allows, and what is printed."""
    printed = json.loads((PACKAGE / "published.json").read_text(encoding="utf-8"))[
        "improvement_over_best_open_source"
    ]
    rows, half = [], float(HALF)
    for domain in DOMAINS:
        table = cells[(cells["metric"] == "hr@1") & (cells["domain"] == domain)].set_index("method")
        values = table[["open_source" in t for t in table["tables"]]]["value"]
        best, mine = values.drop("LaViC").idxmax(), values["LaViC"]
        low, high = (mine - half) / (values[best] + half), (mine + half) / (values[best] - half)
        said = float(printed[domain].strip("+%"))
        rows.append(
            {
                "domain": domain,
                "against": best,
                "recomputed %": 100 * (mine / values[best] - 1),
                "from %": 100 * (low - 1),
                "to %": 100 * (high - 1),
                "printed %": said,
                "agrees": low - 0.0005 <= 1 + said / 100 <= high + 0.0005,
            }
        )
    return pd.DataFrame(rows)


def sampling(cells: pd.DataFrame, splits: Mapping[str, Split]) -> pd.DataFrame:
    """The cells with `n`, 95 % Wilson `low` and `high`, `ceiling` and `of ceiling` (methods that choose; HR@1 only).

    n is the number of conversations, also for HR@1 over items: the items of one conversation share one answer, so they
    are no independent trials. The count is value x n, rounded. The ceiling is over items, as most figures are, and of
    answers that name a candidate: an id copied from the dialogue can hit outside of the list too (rare; `hits_outside`).
    """
    kept = cells.dropna(subset="value").copy()
    kept["n"] = [splits[d].conversations for d in kept["domain"]]
    bounds = [wilson(round(v * n), n) for v, n in zip(kept["value"], kept["n"], strict=True)]
    kept["low"], kept["high"] = ([b[i] for b in bounds] for i in (0, 1))
    chooses = kept["family"].isin(LISTS_ONLY) & (kept["metric"] == "hr@1")
    kept["ceiling"] = pd.Series(
        [splits[d].best_pairs / splits[d].pairs for d in kept["domain"]], kept.index
    ).where(chooses)
    kept["of ceiling"] = kept["value"] / kept["ceiling"]
    return kept


# ---------------------------------------------------------------- which published differences the test size supports
def paired_bounds(a: int, b: int, n: int) -> tuple[float, float]:
    """Smallest and largest p of McNemar's exact test for two methods with a and b hits, both among the same n rows.

    The difference fixes only_a - only_b = a - b; how many rows both hit is not known, so every overlap is tried.
    """
    overlaps = range(max(0, a + b - n), min(a, b) + 1)
    every = [an.mcnemar(a - both, b - both) for both in overlaps]
    return min(every), max(every)


def comparisons(cells: pd.DataFrame, splits: Mapping[str, Split]) -> pd.DataFrame:
    """LaViC against every other published row, by domain: difference of HR@1, its 95 % interval and p if the two had been
    tested on independent samples, the least and greatest p of the paired test, and a verdict at the 5 % level.

    Hits are value x conversations and, since the denominator is not always known, also value x items; the bounds span
    both. The verdict holds for all pairings, none, or depends on answers that are not published. It speaks of new test
    dialogues only, never of another training run, and is not corrected for the number of comparisons.
    """
    table, rows = cells[cells["metric"] == "hr@1"].dropna(subset="value"), []
    for domain, split in splits.items():
        part = table[table["domain"] == domain].set_index("method")
        mine = part.loc["LaViC", "value"]
        for method, row in part.drop("LaViC").iterrows():
            n, other = split.conversations, row["value"]
            error = math.sqrt((mine * (1 - mine) + other * (1 - other)) / n)
            bounds = [
                paired_bounds(round(mine * size), round(other * size), n)
                for size in (n, split.pairs)
            ]
            least, most = min(b[0] for b in bounds), max(b[1] for b in bounds)
            verdict = BEYOND if most < 0.05 else WITHIN if least >= 0.05 else DEPENDS
            rows.append(
                {
                    "domain": domain,
                    "against": method,
                    "difference": mine - other,
                    "low": mine - other - 1.96 * error,
                    "high": mine - other + 1.96 * error,
                    "p independent": float(2 * norm.sf(abs(mine - other) / error)),
                    "p paired, least": least,
                    "p paired, greatest": most,
                    "verdict": verdict,
                }
            )
    return pd.DataFrame(rows)


# ---------------------------------------------------------------- replication answers, and what others report
def reported(cells: pd.DataFrame, splits: Mapping[str, Split]) -> pd.DataFrame:
    """REPORTED with the readings that fit, 95 % Wilson `low` and `high` over conversations, LaViC's published HR@1, and p if
    the two had been tested on independent samples. Other settings than the paper's: a gap is no refutation."""
    paper = cells[(cells["metric"] == "hr@1") & (cells["method"] == "LaViC")].set_index("domain")[
        "value"
    ]
    rows = []
    for who, setting, domain, hits, valid in REPORTED:
        split, published = splits[domain], paper[domain]
        low, high = wilson(round(hits * split.conversations), split.conversations)
        error = math.sqrt((hits * (1 - hits) + published * (1 - published)) / split.conversations)
        rows.append(
            {
                "who": who,
                "setting": setting,
                "domain": domain,
                "hr@1": hits,
                "low": low,
                "high": high,
                "hr@1 reading": ", ".join(r for r in READINGS if fits(hits, split, r)) or "none",
                "vr": valid,
                "vr reading": ", ".join(r for r in READINGS[:3] if fits(valid, split, r)) or "none",
                "LaViC, published": published,
                "p independent": float(2 * norm.sf(abs(hits - published) / error)),
            }
        )
    return pd.DataFrame(rows)


def read_variants(folder: Path | str) -> dict[tuple[str, str], list[an.Answer]]:
    """(domain, what the model saw) -> answers as the third party read them. UserError for a missing or bad file."""
    return {
        (domain, saw): an.read_answers(Path(folder) / name / f"test_results_candidates{end}.jsonl")
        for domain, name in DOMAINS.items()
        for saw, end in VARIANTS.items()
    }


def pooled(runs: Mapping[tuple[str, str], Sequence[an.Answer]], saw: str) -> list[an.Answer]:
    """The answers of one variant in all domains."""
    return [row for domain in DOMAINS for row in runs[domain, saw]]


def value_of_images(runs: Mapping[tuple[str, str], Sequence[an.Answer]]) -> pd.DataFrame:
    """Titles and images against titles alone, and against images alone: paired, by domain and over all domains."""
    rows = []
    for other in ("title", "image"):
        for domain in (*DOMAINS, "all"):
            a, b = (
                pooled(runs, s) if domain == "all" else runs[domain, s]
                for s in ("title+image", other)
            )
            found = an.compare(a, b)
            low, high = found.pop("ci95")
            rows.append(
                {"domain": domain, "title+image against": other, **found, "low": low, "high": high}
            )
    return pd.DataFrame(rows)


def needed(discordant: float, difference: float, power: float = 0.8) -> int:
    """Conversations a paired test at the 5 % level needs to see `difference` with this power, where the two differ on a
    share `discordant` of them (normal approximation to McNemar's test; Connor 1987)."""
    if not 0 < abs(difference) <= discordant <= 1:
        raise ValueError("0 < |difference| <= discordant <= 1 is expected")
    spread = norm.isf(0.025) * math.sqrt(discordant) + norm.isf(1 - power) * math.sqrt(
        discordant - difference**2
    )
    return math.ceil((spread / difference) ** 2)


def parsing(runs: Mapping[tuple[str, str], Sequence[an.Answer]]) -> pd.DataFrame:
    """What reading alone changes: as published, by `parse_known`, and by the most generous reading, for each file."""
    rows = []
    for (domain, saw), published in runs.items():
        known, any_one = (
            an.reparse(published, how) for how in (an.parse_known, an.parse_any_candidate)
        )
        row: dict[str, Any] = {"domain": domain, "the model saw": saw, "rows": len(published)}
        for name, kind in (
            ("as published", published),
            ("first id", known),
            ("any candidate", any_one),
        ):
            found = an.evaluate(kind)
            row |= {f"{name}: {key}": found[key] for key in ("hits", "valid")}
        found = an.parsing(published, known)
        rows.append(
            row | {key: found[key] for key in ("changed", "ran_on", "unexpected_form", "other")}
        )
    return pd.DataFrame(rows)
