"""Scoring anybody's answers: files as the authors' script writes them, alone, against another file, or read again.

A line is a test row with `recommended_<key>` (the id read from the answer, or null), `response_<key>` (the raw answer) and
`candidates_<key>`. An invalid or missing answer is a miss and stays in every denominator. Where a row repeats a
ground-truth id, `hits` and `pairs` count every occurrence, as the authors' script does; `evaluation.score` counts it once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, create_model
from scipy.stats import binomtest

from lavic_utils.config import UserError
from lavic_utils.data import Filled, Id, Row, check_row, read_rows
from lavic_utils.evaluation import ASIN, USUAL_ID, paired_difference, wilson

DRAWS = 10_000
PREFIX = "recommended_"
COUNTS = ("hits", "pairs", "hit", "mean", "valid", "one", "ceiling_hits", "ceiling")
# ratio -> (numerator, denominator), both sums over rows of the COUNTS
RATIOS = {"hit_ratio_pairs": ("hits", "pairs"), "hit_ratio_conversations": ("hit", "one"), "hit_ratio_mean": ("mean", "one"),
          "validity_ratio": ("valid", "one"), "ceiling_pairs": ("ceiling_hits", "pairs"),
          "ceiling_conversations": ("ceiling", "one"), "of_ceiling": ("hit", "ceiling")}  # fmt: skip


class Raw(Row):
    """A line before its answer fields are known."""

    model_config = ConfigDict(extra="allow")
    line: int


class Fields(Row):
    """What every line must hold, whatever its answer fields are called."""

    line: int
    context: Filled
    gt_items: Annotated[tuple[Id, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Answer:
    """One answered test row. `recommended` None: no id was read. `response` None: the file holds no raw answers."""

    context: str
    gt_items: tuple[str, ...]
    candidates: tuple[str, ...]
    recommended: str | None
    response: str | None

    @property
    def hit(self) -> bool:
        return self.recommended in self.gt_items


def only_field(names: Sequence[str], prefix: str, option: str, where: str) -> str:
    """The one field whose name begins with `prefix`; UserError where there is none or several."""
    found = [name for name in names if name.startswith(prefix)]
    if len(found) == 1:
        return found[0]
    what = (
        f"several fields {prefix}<key>: {', '.join(found)}; choose one"
        if found
        else f"no field {prefix}<key>; name one"
    )
    raise UserError(f"{where}: {what} with {option}")


def read_answers(
    path: Path | str, answer: str | None = None, candidates: str | None = None
) -> list[Answer]:
    """All rows of an answer file; `answer` and `candidates` name the fields where they cannot be found.

    Line 1 decides which fields there are. UserError names file, line and field: not JSON, a field missing or of the wrong
    type, no row.
    """
    path = Path(path)
    if not path.is_file() or not path.stat().st_size:
        reason = "the file is empty" if path.is_file() else "no such file"
        raise UserError(f"{path}: {reason}; give a JSONL file of answered test rows")
    raws = read_rows(path, Raw)
    names, first = list(raws[0].model_extra or ()), f"{path}, line 1"
    if unknown := {answer, candidates} - {None, *names}:
        raise UserError(
            f"{first}: no field {', '.join(sorted(unknown))}; there are {', '.join(names)}"
        )
    chosen = answer or only_field(names, PREFIX, "--answer", first)
    said, same = (chosen.replace(PREFIX, kind, 1) for kind in ("response_", "candidates_"))
    ten = candidates or (
        same
        if same in names and same != chosen
        else only_field(names, "candidates_", "--candidates", first)
    )
    kind = create_model(
        "Line",
        __base__=Fields,
        recommended=(str | None, Field(alias=chosen)),
        candidates=(tuple[Id, ...], Field(alias=ten, min_length=1)),
        response=(str | None, Field(alias=said) if said in names and said != chosen else None),
    )
    rows = [
        check_row(kind, raw.model_extra, f"{path}, line {raw.line}", line=raw.line) for raw in raws
    ]
    return [
        Answer(row.context, row.gt_items, row.candidates, row.recommended or None, row.response)
        for row in rows
    ]


def parse_known(text: str, candidates: Sequence[str]) -> str | None:
    """The first id in a raw answer, read with the candidates known, or None.

    Knowing them serves to recognise an id, never to choose one: a candidate is found in any case ("b00..."), after a label
    ("ASIN:B00..."), with text run on behind it, and whatever its form; anything else that looks like an id counts as one.
    The first of all these decides. Skipping an invalid id for a candidate named later would credit a model for listing
    ids, and would blunt VR, which exists to catch invented ones (`parse_any_candidate` does it, to measure how much).
    """
    return _first(text, candidates, "|" + ASIN.pattern)


def parse_any_candidate(text: str, candidates: Sequence[str]) -> str | None:
    """The first candidate id anywhere in the answer, or None: the reading with the highest VR, for comparison."""
    return _first(text, candidates, "")


def _search(text: str, candidates: Sequence[str], otherwise: str) -> re.Match[str] | None:
    ordered = sorted(
        map(str.upper, candidates), key=len, reverse=True
    )  # of two, one beginning the other, the longer
    return re.search(
        rf"(?<![A-Z0-9])(?:{'|'.join(map(re.escape, ordered))}){otherwise}",
        text,
        re.IGNORECASE | re.ASCII,
    )


def _first(text: str, candidates: Sequence[str], otherwise: str) -> str | None:
    match = _search(text, candidates, otherwise)
    return (
        {one.upper(): one for one in candidates}.get(match.group().upper(), match.group().upper())
        if match
        else None
    )


def _why(text: str, candidates: Sequence[str]) -> str:
    """Why the usual pattern can have missed what `parse_known` reads: text ran on behind the id, or the id's own form."""
    match = _search(text, candidates, "|" + ASIN.pattern)
    if match and text[match.end() : match.end() + 1].isalnum():
        return "ran_on"
    return "unexpected_form" if match and not USUAL_ID.fullmatch(match.group()) else "other"


def reparse(
    rows: Sequence[Answer],
    parser: Callable[[str, Sequence[str]], str | None] = parse_known,
    where: Path | str = "answers",
) -> list[Answer]:
    """The same rows with `recommended` read again from the raw answers. UserError where one has none."""
    if missing := next((i for i, row in enumerate(rows, 1) if row.response is None), None):
        raise UserError(
            f"{where}, line {missing}: no raw answer (field response_<key>); leave --reparse out, or add it"
        )
    return [replace(row, recommended=parser(row.response or "", row.candidates)) for row in rows]


def _counts(row: Answer) -> tuple[float, ...]:
    times = row.gt_items.count(row.recommended) if row.recommended else 0
    best = max(row.gt_items.count(one) for one in row.candidates)
    total = len(row.gt_items)
    return (
        times,
        total,
        times > 0,
        times / total,
        row.recommended in row.candidates,
        1,
        best,
        best > 0,
    )


def _intervals(table: np.ndarray, seed: int) -> dict[str, list[float] | None]:
    """95 % percentiles of each ratio over DRAWS bootstrap samples of conversations. Rows with equal counts are drawn
    together (multinomial), which is exact. All or none counted: the bootstrap sees no spread there, so Wilson's interval."""
    kinds, times = np.unique(table, axis=0, return_counts=True)
    draws = (
        np.random.default_rng(seed).multinomial(len(table), times / len(table), size=DRAWS) @ kinds
    )
    found: dict[str, list[float] | None] = {}
    for name, (top, bottom) in RATIOS.items():
        above, below = (draws[:, COUNTS.index(column)] for column in (top, bottom))
        whole, part = (table[:, COUNTS.index(column)].sum() for column in (bottom, top))
        if not whole:
            found[name] = None
        elif part in (0, whole):
            trials = int(whole if bottom == "ceiling" else len(table))
            found[name] = list(wilson(trials if part else 0, trials))
        else:
            ratio = above[below > 0] / below[below > 0]
            found[name] = [float(bound) for bound in np.percentile(ratio, (2.5, 97.5))]
    return found


def evaluate(rows: Sequence[Answer], seed: int = 0) -> dict[str, Any]:
    """Counts, ratios and `ci95` of answered rows (JSON-able); ValueError without rows.

    `rows`, `valid` (answer is a candidate), `unparsed` (no id), `hits_outside` (right, though no candidate): conversations.
    `repeated`: rows that say what an earlier one says in all that is read; they count, as in the authors' script.
    `pairs`: ground-truth items, `hits`: those equal to the answer, with repeats.
    `hit_ratio_pairs` = hits / pairs; `hit_ratio_conversations`: share of rows whose answer is a ground-truth item;
    `hit_ratio_mean`: mean over rows of hits / items (a mean over batches of one).
    `ceiling_*`: the same ratios of somebody who always names the best candidate; `of_ceiling` =
    hit_ratio_conversations / ceiling_conversations (None where no row's candidates hold a ground-truth item).
    """
    if not rows:
        raise ValueError("no answer to score")
    table = np.array([_counts(row) for row in rows], dtype=float)
    total = dict(zip(COUNTS, table.sum(axis=0), strict=True))
    ratios = {
        name: float(total[a] / total[b]) if total[b] else None for name, (a, b) in RATIOS.items()
    }
    return {
        "rows": len(rows),
        "pairs": int(total["pairs"]),
        "hits": int(total["hits"]),
        **ratios,
        "valid": int(total["valid"]),
        "unparsed": sum(row.recommended is None for row in rows),
        "hits_outside": sum(row.hit and row.recommended not in row.candidates for row in rows),
        "repeated": len(rows) - len(set(rows)),
        "ci95": _intervals(table, seed),
    }


def match(a: Sequence[Answer], b: Sequence[Answer]) -> list[tuple[Answer, Answer]]:
    """Rows of both with the same context and ground truth, in the order of `a`; of equal rows the k-th with the k-th."""

    def keyed(rows: Sequence[Answer]) -> dict[tuple, Answer]:
        seen: Counter[tuple] = Counter()
        found = {}
        for row in rows:
            key = (row.context, row.gt_items)
            seen[key] += 1
            found[*key, seen[key]] = row
        return found

    left, right = keyed(a), keyed(b)
    return [(row, right[key]) for key, row in left.items() if key in right]


def compare(a: Sequence[Answer], b: Sequence[Answer], seed: int = 0) -> dict[str, Any]:
    """Paired comparison over conversations (JSON-able); UserError where no row matches.

    `only_a`, `only_b`: conversations that one alone answers right; `difference` = a - b of hit_ratio_conversations on the
    `matched` rows, `ci95` by bootstrap, `p_value` of McNemar's exact test. `other_candidates`: matched rows in which the
    two were not given the same candidates, so that the difference is not the models' alone.
    """
    pairs = match(a, b)
    if not pairs:
        raise UserError(
            "the two files have no row in common (same context and gt_items); compare answers to one test split"
        )
    hits_a, hits_b = [x.hit for x, _ in pairs], [y.hit for _, y in pairs]
    only_a, only_b = (
        sum(x and not y for x, y in zip(p, q, strict=True))
        for p, q in ((hits_a, hits_b), (hits_b, hits_a))
    )
    mean, low, high = paired_difference(hits_a, hits_b, seed)
    return {
        "matched": len(pairs),
        "unmatched_a": len(a) - len(pairs),
        "unmatched_b": len(b) - len(pairs),
        "other_candidates": sum(set(x.candidates) != set(y.candidates) for x, y in pairs),
        "only_a": only_a,
        "only_b": only_b,
        "difference": mean,
        "ci95": [low, high],
        "p_value": mcnemar(only_a, only_b),
    }


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of McNemar's exact test; 1 where the two never differ."""
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def parsing(rows: Sequence[Answer], again: Sequence[Answer], seed: int = 0) -> dict[str, Any]:
    """What reading alone changes: `changed` answers, counts before and after, and the paired comparison (after - before).

    Of the changed: `ran_on` (the model wrote on behind the id: "B00HO5EE9W0HO"), `unexpected_form` (an id in small letters,
    an ISBN, ...) and `other`.
    """
    before, after = evaluate(rows, seed), evaluate(again, seed)
    names = ("hits", "valid", "unparsed", "hit_ratio_conversations", "validity_ratio")
    changed = [x for x, y in zip(rows, again, strict=True) if x.recommended != y.recommended]
    why = Counter(_why(row.response or "", row.candidates) for row in changed)
    return {
        "changed": len(changed),
        **{name: why[name] for name in ("ran_on", "unexpected_form", "other")},
        "before": {name: before[name] for name in names},
        "after": {name: after[name] for name in names},
        "paired": compare(again, rows, seed),
    }


def report(
    path: Path, against: Path | None, candidates: str | None, answer: str | None, again: bool
) -> dict[str, Any]:
    """What `python -m lavic_utils evaluate` prints: `evaluate`, and with the options `against` and `parsing` beside it."""
    rows = read_answers(path, answer, candidates)
    found = reparse(rows, where=path) if again else rows
    out = evaluate(found)
    if again:
        out["parsing"] = parsing(rows, found)
    if against:
        other = read_answers(against, answer, candidates)
        out["against"] = compare(found, reparse(other, where=against) if again else other)
    return out


def show(found: dict[str, Any]) -> None:
    """Print a report as small tables."""
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", "95 % interval")
    for name in ("rows", "pairs", "hits", "valid", "unparsed", "hits_outside", "repeated"):
        table.add_row(name, str(found[name]), "")
    for name, bounds in found["ci95"].items():
        table.add_row(
            name,
            *(
                ("-", "-")
                if bounds is None
                else (f"{found[name]:.4f}", "[{:.4f}, {:.4f}]".format(*bounds))
            ),
        )
    console = Console()
    console.print(table)
    for name in ("parsing", "against"):
        if name in found:
            flat = {k: v for k, v in found[name].items() if k != "paired"} | found[name].get(
                "paired", {}
            )
            console.print(
                f"{name}: " + ", ".join(f"{k} {v}" for k, v in flat.items()),
                markup=False,
                highlight=False,
            )
