"""What the published figures can mean, how sure they are, and what others' answers add.

HR@1 and VR are shares (0 to 1); `cells` is `published_cells()`, `splits` `read_splits(data)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import binomtest, norm

from lavic_utils import report
from lavic_utils.audit import answer_files
from lavic_utils.config import DOMAINS
from lavic_utils.data import read_dialogues
from lavic_utils.evaluation import mcnemar, wilson

HALF = Fraction(1, 20_000)  # half a unit of the fourth digit: what rounding may hide
READINGS = ("pairs", "distinct", "conversations", "row mean")
BEYOND, WITHIN = "beyond chance in every pairing", "within chance in every pairing"
DEPENDS = "depends on unpublished answers"
CHOOSERS = ("generative", "ablation", "proprietary", "proposed")  # name one of ten; retrieval ranks
BATCH_MEAN = 0.2510  # what the run with all images (reported_by_others.csv) logs as a batch mean
Runs = Mapping[tuple[str, str], Sequence[answer_files.Answer]]


def published_cells() -> pd.DataFrame:
    """method, family, tables, domain, metric (hr@1, vr), value (NaN: not in the paper)."""
    cells = []
    for row in report.published()["rows"]:
        about = (row["method"], row["family"], tuple(row["table"]))
        for domain, metric in product(DOMAINS, ("hr@1", "vr")):
            cells.append((*about, domain, metric, row["results"][domain][metric]))
    return pd.DataFrame(cells, columns=["method", "family", "tables", "domain", "metric", "value"])


@dataclass(frozen=True)
class Split:
    """Sizes of a test split: `pairs` ground-truth items with repeats, `distinct` without; `best_*`:
    hits of somebody who always names the best candidate; `truths`: by conversation, how many times
    each ground-truth id stands."""

    conversations: int
    pairs: int
    distinct: int
    best_pairs: int
    best_conversations: int
    truths: tuple[tuple[int, ...], ...]


def read_splits(root: Path | str) -> dict[str, Split]:
    """The three published test splits. UserError where a file is missing or bad."""
    found = {}
    for domain in DOMAINS:
        truths, best = [], []
        for row in read_dialogues(root, domain, "test"):
            truths.append(tuple(row.gt_items.count(one) for one in sorted(set(row.gt_items))))
            best.append(max(row.gt_items.count(one) for one in row.candidates_st))
        pairs, distinct = sum(map(sum, truths)), sum(map(len, truths))
        reachable = sum(times > 0 for times in best)
        found[domain] = Split(len(truths), pairs, distinct, sum(best), reachable, tuple(truths))
    return found


def counts(value: float, n: int) -> range:
    """All k of 0..n whose share k/n prints as `value` (both ends of the rounding allowed)."""
    printed = Fraction(str(value))
    low, high = math.ceil((printed - HALF) * n), math.floor((printed + HALF) * n)
    return range(max(low, 0), min(high, n) + 1)


@cache
def row_sums(truths: tuple[tuple[int, ...], ...]) -> tuple[int, int]:
    """(unit, bits): which sums over conversations of hits / items any answers can give. Bit s set:
    s / unit is possible. A conversation adds 0 or m / |G|, m the times the named id stands among
    its |G| items: the bits are shifted by each possible addition and joined."""
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
        return bool(counts(value, getattr(split, reading)))
    unit, bits = row_sums(split.truths)
    sums = counts(value, split.conversations * unit)
    return bool((bits >> sums.start) & ((1 << len(sums)) - 1))


@cache
def chance(split: Split, reading: str, highest: int) -> float:
    """How often a reading fits for no reason: share of the values .0001 to highest x .0001."""
    return sum(fits(i / 10_000, split, reading) for i in range(1, highest + 1)) / highest


def fitting(value: float, split: Split, among: Sequence[str] = READINGS) -> str:
    """The readings that fit, or "none"."""
    return ", ".join(one for one in among if fits(value, split, one)) or "none"


def readings(cells: pd.DataFrame, splits: Mapping[str, Split]) -> pd.DataFrame:
    """The cells with a value, with one column a reading (does it fit?), its counts ("pairs k"), all
    that fit (`reading`; "none": a mean of another kind, other rows or a misprint, which the digits
    do not say), and the rounding interval (`from`, `to`)."""
    kept = cells.dropna(subset="value").copy()
    each = [(value, splits[d]) for value, d in zip(kept["value"], kept["domain"], strict=True)]
    for reading in READINGS:
        kept[reading] = [fits(value, split, reading) for value, split in each]
        if reading != "row mean":
            found = [counts(value, getattr(split, reading)) for value, split in each]
            kept[f"{reading} k"] = [" ".join(map(str, ks)) for ks in found]
    kept["reading"] = [fitting(value, split) for value, split in each]
    kept["from"] = (kept["value"] - float(HALF)).clip(lower=0)
    kept["to"] = (kept["value"] + float(HALF)).clip(upper=1)
    return kept


def reading_evidence(found: pd.DataFrame, splits: Mapping[str, Split]) -> pd.DataFrame:
    """For each domain, kind of method and reading of HR@1 (`found`: of `readings`): cells above
    zero, how many fit, how many would by chance, one-sided p."""
    rows, part = [], found[(found["metric"] == "hr@1") & (found["value"] > 0)]
    highest = part.groupby("domain")["value"].max()
    kinds = part["family"].eq("retrieval").map({True: "retrieval", False: "choosing"})
    for (domain, kind), cells in part.groupby(["domain", kinds], sort=False):
        for reading in READINGS:
            share = chance(splits[domain], reading, round(float(highest[domain]) * 10_000))
            fit, n = int(cells[reading].sum()), len(cells)
            p = float(binomtest(fit, n, share, alternative="greater").pvalue)
            rows.append((domain, kind, reading, n, fit, share * n, p))
    names = ["domain", "methods", "reading", "cells", "fit", "expected by chance", "p"]
    return pd.DataFrame(rows, columns=names)


def sampling(cells: pd.DataFrame, splits: Mapping[str, Split]) -> pd.DataFrame:
    """The cells with `n` (conversations), 95 % Wilson `low` and `high` of round(value x n) hits,
    `ceiling` over items and `of ceiling` (HR@1 of methods that choose).

    n is the same for HR@1 over items: the items of a conversation share one answer, so they are no
    independent trials. An id copied from the dialogue can hit above the ceiling (`hits_outside`).
    """
    kept = cells.dropna(subset="value").copy()
    kept["n"] = [splits[d].conversations for d in kept["domain"]]
    bounds = [wilson(round(v * n), n) for v, n in zip(kept["value"], kept["n"], strict=True)]
    kept["low"], kept["high"] = zip(*bounds, strict=True)
    ceilings = kept["domain"].map({d: s.best_pairs / s.pairs for d, s in splits.items()})
    kept["ceiling"] = ceilings.where(kept["family"].isin(CHOOSERS) & (kept["metric"] == "hr@1"))
    kept["of ceiling"] = kept["value"] / kept["ceiling"]
    return kept


def paired_bounds(a: int, b: int, n: int) -> tuple[float, float]:
    """Smallest and largest p of McNemar's exact test for two methods with a and b hits among the
    same n rows: how many rows both hit is not known, so every overlap is tried."""
    every = [mcnemar(a - both, b - both) for both in range(max(0, a + b - n), min(a, b) + 1)]
    return min(every), max(every)


def independent(a: float, b: float, n: int, m: int | None = None) -> tuple[float, float]:
    """(standard error of a - b, two-sided p) of two ratios, as if of independent samples, of n and
    of m (None: as many)."""
    error = math.sqrt(a * (1 - a) / n + b * (1 - b) / (m or n))
    return error, float(2 * norm.sf(abs(a - b) / error)) if a != b else 1.0


def comparisons(cells: pd.DataFrame, splits: Mapping[str, Split]) -> pd.DataFrame:
    """LaViC against every other published row, by domain: difference of HR@1, its 95 % interval and
    p if the two had been tested on independent samples, least and greatest p of the paired test
    (hits are value x conversations or value x items, whichever the denominator was), the greatest
    if LaViC's counts conversations and the other's items ("p mixed"), and a verdict at the 5 %
    level where both are counted alike, on new test dialogues only, never on another training run,
    and not corrected for the number of comparisons."""
    table, rows = cells[cells["metric"] == "hr@1"].dropna(subset="value"), []
    for domain, split in splits.items():
        values = table[table["domain"] == domain].set_index("method")["value"]
        mine, n = values.pop("LaViC"), split.conversations
        for method, other in values.items():
            error, p = independent(mine, other, n)
            sizes = (n, split.pairs)
            bounds = [paired_bounds(round(mine * s), round(other * s), n) for s in sizes]
            least, most = min(low for low, _ in bounds), max(high for _, high in bounds)
            verdict = BEYOND if most < 0.05 else WITHIN if least >= 0.05 else DEPENDS
            gap, margin = mine - other, 1.96 * error
            interval = (gap, gap - margin, gap + margin)
            mixed = paired_bounds(round(mine * n), round(other * split.pairs), n)[1]
            rows.append((domain, method, *interval, p, least, most, mixed, verdict))
    names = ["domain", "against", "difference", "low", "high", "p independent"]
    names += ["p paired, least", "p paired, greatest", "p mixed", "verdict"]
    return pd.DataFrame(rows, columns=names)


def reported(cells: pd.DataFrame, splits: Mapping[str, Split]) -> pd.DataFrame:
    """What others report of one rerun each, in another setting (reported_by_others.csv, measured
    by nobody here), with the readings that fit, a 95 % Wilson interval over conversations, LaViC's
    HR@1, and p if the two had been tested on independent samples."""
    table, rows = pd.read_csv(Path(__file__).with_name("reported_by_others.csv")), []
    lavic = cells[(cells["metric"] == "hr@1") & (cells["method"] == "LaViC")]
    published = lavic.set_index("domain")["value"]
    for domain, hr, vr in table[["domain", "hr@1", "vr"]].itertuples(index=False):
        split, n = splits[domain], splits[domain].conversations
        bounds = wilson(round(hr * n), n)
        read = (fitting(hr, split), vr, fitting(vr, split, READINGS[:3]))
        p = independent(hr, published[domain], n)[1]
        rows.append((*bounds, *read, published[domain], p))
    names = ["low", "high", "hr@1 reading", "vr", "vr reading", "LaViC, published"]
    judged = pd.DataFrame(rows, columns=[*names, "p independent"])
    return pd.concat([table.drop(columns="vr"), judged], axis=1)


def value_of_images(runs: Runs) -> pd.DataFrame:
    """Titles and images against titles alone and images alone: paired, by domain and over all."""
    rows = []
    for other, domain in product(("title", "image"), (*DOMAINS, "all")):
        which = list(DOMAINS) if domain == "all" else [domain]
        a = [row for one in which for row in runs[one, "title+image"]]
        b = [row for one in which for row in runs[one, other]]
        found = answer_files.compare(a, b)
        low, high = found.pop("ci95")
        about = {"domain": domain, "title+image against": other}
        rows.append({**about, **found, "low": low, "high": high})
    return pd.DataFrame(rows)


def needed(discordant: float, difference: float, power: float = 0.8) -> int:
    """Conversations a paired test at the 5 % level needs to see `difference` with this power, where
    the two differ on a share `discordant` of them (Connor 1987). ValueError: impossible shares."""
    if not 0 < abs(difference) <= discordant <= 1:
        raise ValueError("0 < |difference| <= discordant <= 1 is expected")
    alpha = norm.isf(0.025) * math.sqrt(discordant)
    beta = norm.isf(1 - power) * math.sqrt(discordant - difference**2)
    return math.ceil(((alpha + beta) / difference) ** 2)


def parsing(runs: Runs) -> pd.DataFrame:
    """What reading alone changes: as published, by `parse_answer`, by the most generous reading."""
    rows, ways = [], ("as published", "first id", "any candidate")
    for (domain, saw), answers in runs.items():
        row: dict[str, Any] = {"domain": domain, "the model saw": saw, "rows": len(answers)}
        first = answer_files.reparse(answers)
        generous = answer_files.reparse(answers, answer_files.any_candidate)
        for name, kind in zip(ways, (answers, first, generous), strict=True):
            row[f"{name}: hits"] = sum(one.gt_items.count(one.recommended) for one in kind)
            row[f"{name}: valid"] = sum(one.recommended in one.candidates for one in kind)
        rows.append(row | answer_files.changes(answers, first))
    return pd.DataFrame(rows)
