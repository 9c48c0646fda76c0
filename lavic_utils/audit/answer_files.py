"""Anybody's answer files, as the authors' script writes them: scored, compared, read again.

A line is a test row with `recommended_<key>` (the id read from the answer, or null),
`response_<key>` (the raw answer) and `candidates_<key>`. Where a row repeats a ground-truth id,
`hits` and `pairs` count every occurrence here, as that script does; `evaluation.score` counts it
once.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from lavic_utils import evaluation
from lavic_utils.config import DOMAINS, UserError
from lavic_utils.data import Filled, Id, Row, Ten, check_row, dialogue_file, read_rows
from lavic_utils.methods import find, slug
from lavic_utils.provenance import key, target, write_text
from lavic_utils.report import refused, unanswered

if TYPE_CHECKING:
    from lavic_utils.experiment import Experiment

CODE = re.compile("[A-Z0-9]{10}")  # also of an invented id
# What the model of a replication saw -> end of its files' names
VARIANTS = {"title+image": "_st2", "title": "_st_noimg", "image": "_st_notitle"}


class AnyLine(Row):
    """A line before its answer fields are known."""

    model_config = ConfigDict(extra="allow")


class Answer(Row):
    """One answered test row. `recommended` None: no id was read. `response` None: no raw answer."""

    context: Filled
    gt_items: Annotated[tuple[Id, ...], Field(min_length=1)]
    recommended: Annotated[Id | None, BeforeValidator(lambda value: None if value == "" else value)]
    candidates: Ten
    response: str | None = None

    @model_validator(mode="after")
    def _names_an_id(self) -> Answer:
        """A text that is no id would count as a miss in silence: "None", a title, "b00ho5ee9w"."""
        read = self.recommended
        if read not in (None, *self.candidates, *self.gt_items) and not CODE.fullmatch(read):
            why = "is neither a candidate nor an ASIN (10 capitals and digits)"
            raise ValueError(f"recommended {read!a} {why}; null stands for an answer without an id")
        ids = {*self.candidates, *self.gt_items, *([self.recommended] if self.recommended else ())}
        if len({one.upper() for one in ids}) < len(ids):
            raise ValueError(
                "ids that differ in the case of letters alone; write all as the data do"
            )
        return self


def read_answers(path: Path | str) -> list[Answer]:
    """All rows of an answer file; line 1 decides what <key> is.

    UserError names file, line and field: not JSON, a field missing or of the wrong type (a
    `recommended` that is no id: "B00HO5EE9W "), two of recommended_<key>, no row.
    """
    path = Path(path)
    if not path.is_file() or not path.stat().st_size:
        reason = "the file is empty" if path.is_file() else "no such file"
        raise UserError(f"{path}: {reason}; give a JSONL file of answered test rows")
    rows = [row.model_extra or {} for row in read_rows(path, AnyLine)]
    found = [name for name in rows[0] if name.startswith("recommended_")]
    if len(found) != 1:
        there = f"{path}, line 1: fields recommended_<key>: {', '.join(found) or 'none'}"
        raise UserError(f"{there}; exactly one is expected")
    key = found[0].removeprefix("recommended_")
    fields = {name: f"{name}_{key}" for name in ("candidates", "response")}
    fields["recommended"] = found[0]

    class Line(Answer):  # the same under the names of this file
        model_config = ConfigDict(alias_generator=lambda name: fields.get(name, name))

    lines = [check_row(Line, row, f"{path}, line {i}") for i, row in enumerate(rows, 1)]
    return [Answer(**dict(line)) for line in lines]


def read_replications(folder: Path | str) -> dict[tuple[str, str], list[Answer]]:
    """(domain, what the model saw) -> a third party's answers to the test split, as it read them.

    Source: Lottotpk/graphRAG_multimodal, folder LaViC/data. UserError: a file missing or bad.
    """
    found = {}
    for domain, name in DOMAINS.items():
        for saw, end in VARIANTS.items():
            path = Path(folder) / name / f"test_results_candidates{end}.jsonl"
            if not path.is_file():
                todo = "set LAVIC_REPLICATIONS to LaViC/data of Lottotpk/graphRAG_multimodal"
                raise UserError(f"{path}: no such file; {todo}")
            found[domain, saw] = read_answers(path)
    return found


def evaluate(rows: Sequence[Answer], seed: int = 0) -> dict[str, Any]:
    """Counts, ratios and `ci95` of answered rows (JSON-able); ValueError without rows.

    Of `rows` are `valid` (the answer is a candidate), `unparsed` (no id), `hits_outside` (right,
    though no candidate), `repeated` (says all that an earlier one says; counts all the same).
    `pairs`: ground-truth items, `hits`: those equal to the answer, both with repeats.
    `hit_ratio_mean`: mean over rows of hits / items; `ceiling_*`: of somebody who always names the
    best candidate; `of_ceiling`: None where no list holds a right item. `ci95`: percentiles of
    10,000 bootstrap samples of conversations; where all or none count, Wilson's interval.
    """
    if not rows:
        raise ValueError("no rows to score")
    table = pd.DataFrame({"hits": [row.gt_items.count(row.recommended) for row in rows]})
    table["pairs"] = [len(row.gt_items) for row in rows]
    table["hit"], table["mean"] = table["hits"] > 0, table["hits"] / table["pairs"]
    table["valid"] = [row.recommended in row.candidates for row in rows]
    table["rows"] = 1
    best = [max(row.gt_items.count(one) for one in row.candidates) for row in rows]
    table["ceiling_hits"], table["ceiling"] = best, np.array(best) > 0
    # rows with equal counts are drawn together (multinomial), which is exact
    kinds, often = np.unique(table.astype(float).to_numpy(), axis=0, return_counts=True)
    samples = np.random.default_rng(seed).multinomial(len(rows), often / len(rows), size=10_000)
    sums = pd.DataFrame(np.vstack([table.sum(), samples @ kinds]), columns=table.columns)
    each = {  # what was measured, then the samples
        "hit_ratio_pairs": sums["hits"] / sums["pairs"],
        "hit_ratio_conversations": sums["hit"] / sums["rows"],
        "hit_ratio_mean": sums["mean"] / sums["rows"],
        "validity_ratio": sums["valid"] / sums["rows"],
        "ceiling_pairs": sums["ceiling_hits"] / sums["pairs"],
        "ceiling_conversations": sums["ceiling"] / sums["rows"],
        "of_ceiling": sums["hit"] / sums["ceiling"],
    }
    ratios, ci95 = {}, {}
    for name, found in each.items():
        value, drawn = float(found[0]), found[1:]
        trials = int(table["ceiling"].sum()) if name == "of_ceiling" else len(rows)
        ratios[name] = value if trials else None
        if not trials:
            ci95[name] = None
        elif value in (0, 1):
            ci95[name] = list(evaluation.wilson(int(value * trials), trials))
        else:
            ci95[name] = np.percentile(drawn[np.isfinite(drawn)], (2.5, 97.5)).tolist()
    return {
        "rows": len(rows),
        "pairs": int(table["pairs"].sum()),
        "hits": int(table["hits"].sum()),
        **ratios,
        "valid": int(table["valid"].sum()),
        "unparsed": sum(row.recommended is None for row in rows),
        "hits_outside": int((table["hit"] & ~table["valid"]).sum()),
        "repeated": len(rows) - len(set(rows)),
        "ci95": ci95,
    }


def match(a: Sequence[Answer], b: Sequence[Answer]) -> list[tuple[Answer, Answer]]:
    """Rows of both with the same context and the same ground-truth items (in any order), in the
    order of `a`; of equal rows the k-th with the k-th."""
    waiting = defaultdict(list)
    for row in b:
        waiting[row.context, frozenset(row.gt_items)].append(row)
    pairs = []
    for row in a:
        if same := waiting[row.context, frozenset(row.gt_items)]:
            pairs.append((row, same.pop(0)))
    return pairs


def compare(a: Sequence[Answer], b: Sequence[Answer], seed: int = 0) -> dict[str, Any]:
    """Paired comparison over conversations (JSON-able); UserError where no row matches.

    `only_a`, `only_b`: conversations that one alone answers right; `difference` = a - b of
    hit_ratio_conversations on the `matched` rows, `ci95` by bootstrap, `p_value` of McNemar's exact
    test. `other_candidates`: matched rows in which the two were not given the same candidates, so
    that the difference is not the models' alone.
    """
    pairs = match(a, b)
    if not pairs:
        why = "the two files have no row in common (same context and gt_items)"
        raise UserError(f"{why}; compare answers to one test split")
    a_hits = np.array([row.recommended in row.gt_items for row, _ in pairs])
    b_hits = np.array([row.recommended in row.gt_items for _, row in pairs])
    only_a, only_b = int((a_hits & ~b_hits).sum()), int((b_hits & ~a_hits).sum())
    mean, low, high = evaluation.paired_difference(a_hits, b_hits, seed)
    return {
        "matched": len(pairs),
        "unmatched_a": len(a) - len(pairs),
        "unmatched_b": len(b) - len(pairs),
        "other_candidates": sum(set(x.candidates) != set(y.candidates) for x, y in pairs),
        "only_a": only_a,
        "only_b": only_b,
        "difference": mean,
        "ci95": [low, high],
        "p_value": evaluation.mcnemar(only_a, only_b),
    }


def any_candidate(text: str, candidates: Sequence[str]) -> str | None:
    """The first candidate anywhere in the answer, or None: the reading with the highest VR, to
    measure how much it matters that `evaluation.parse_answer` takes an invented id before it."""
    longest_last = sorted(candidates, key=len)  # of two at one place the longer
    places = {text.find(one): one for one in longest_last if one in text}
    return places[min(places)] if places else None


def reparse(
    rows: Sequence[Answer],
    parser: Callable[[str, Sequence[str]], str | None] = evaluation.parse_answer,
    where: Path | str = "answers",
) -> list[Answer]:
    """The same rows with `recommended` read again from the raw answers. UserError without one."""
    found = []
    for i, row in enumerate(rows, 1):
        if row.response is None:
            why = "no raw answer (field response_<key>); leave --reparse out, or add it"
            raise UserError(f"{where}, line {i}: {why}")
        read = parser(row.response, row.candidates)
        found.append(row.model_copy(update={"recommended": read}))
    return found


def changes(rows: Sequence[Answer], again: Sequence[Answer]) -> dict[str, int]:
    """What `reparse` changes: `changed` answers, and of these `ran_on` (the model wrote on behind
    the id: "B00HO5EE9W0HO"), `unexpected_form` (not B and nine) and `other`."""
    why = dict.fromkeys(("changed", "ran_on", "unexpected_form", "other"), 0)
    for row, other in zip(rows, again, strict=True):
        read = other.recommended
        if read == row.recommended:
            continue
        why["changed"] += 1
        if read and (row.response or "").partition(read)[2][:1].isalnum():
            why["ran_on"] += 1
        elif read and not (len(read) == 10 and read.startswith("B")):
            why["unexpected_form"] += 1
        else:
            why["other"] += 1
    return why


def report(path: Path, against: Path | None, again: bool) -> dict[str, Any]:
    """What `python -m lavic_utils evaluate` prints: `evaluate`; with `again` of the answers read
    again, and as `parsing` what that changes; with `against` a comparison."""
    before = read_answers(path)
    rows = reparse(before, where=path) if again else before
    out = evaluate(rows)
    if again:
        old = evaluate(before)
        out["parsing"] = changes(before, rows)
        out["parsing"] |= {f"{name}_before": old[name] for name in ("hits", "valid", "unparsed")}
    if against:
        other = read_answers(against)
        out["against"] = compare(rows, reparse(other, where=against) if again else other)
    return out


def show(found: dict[str, Any]) -> None:
    """Print a report: a line a figure, ratios with their 95 % intervals; then what reading again
    changed, and who leads, in a sentence and a small table each."""
    for name, value in found.items():
        if isinstance(value, float):
            low, high = found["ci95"][name]
            print(f"{name:24} {value:.4f}  [{low:.4f}, {high:.4f}]")
        elif name not in ("parsing", "against", "ci95"):
            print(f"{name:24} {value}")
    if one := found.get("parsing"):
        counts = ("hits", "valid", "unparsed")
        rows = {name: [one[f"{name}_before"], found[name]] for name in counts}
        print(
            f"\nRead again, {one['changed']} of {found['rows']} answers name another id:", end=" "
        )
        print("{ran_on} ran on behind it, {unexpected_form} of another form.".format(**one))
        print(pd.DataFrame(rows, ["as it was", "read again"]).T.to_string())
    if one := found.get("against"):
        (low, high), lead = one["ci95"], "Neither file leads"
        if gap := one["difference"]:
            sure = "hardly by chance" if one["p_value"] < 0.05 else "which may be chance"
            first = "The first" if gap > 0 else "The second"
            lead = f"{first} file leads by {abs(gap):.4f} of the shared rows, {sure}"
        print(f"\n{lead}: first less second [{low:+.4f}, {high:+.4f}],", end=" ")
        print(f"p {one['p_value']:.2g} (McNemar).")
        names = ("matched", "only_a", "only_b", "other_candidates", "unmatched_a", "unmatched_b")
        print(pd.Series({name: one[name] for name in names}).to_string())


# ------------------------------------------------------------ written
def run_method(
    run: Experiment,
    method: str,
    domain: str,
    split: str = "test",
    order: int = 0,
    limit: int | None = None,
    out: Path | None = None,
) -> str:
    """Answer a split with one method, write the answers file, and say where it is ("" in all but
    the first of several processes). UserError where the method cannot run here.

    The file holds each row as published, with `recommended_<key>`, `response_<key>` and
    `candidates_<key>`; the key is "st" or "gpt_large", or the name of a method that ranks them all.
    """
    chosen, out = find(method), out and target(out)
    dialogue_file("", domain, split)  # says which domains and splits there are
    if why := chosen.reason(run):
        raise UserError(f"{chosen.name}: {why}")
    found = run.answered(chosen.name, domain, split, order=order, limit=limit)
    if run.rank:
        return ""
    label, rows, lines = chosen.row(run)["method"], found["rows"], []
    name = slug(label)
    if label != chosen.name:  # a service's: other names may make the same file name
        name = f"{name[:60]}_{key(label=label)[:6]}"
    suffix = run.profile.candidates.removeprefix("candidates_") if chosen.chooses else name
    for dialogue, answer in zip(run.dialogues(domain, split)[: len(rows)], rows, strict=True):
        row = dialogue.model_dump(exclude={"domain", "split", "line"})
        for field in ("candidates", "recommended", "response"):
            row[f"{field}_{suffix}"] = answer[field]
        lines.append(json.dumps(row) + "\n")
    part = f"_order{order}" if order else ""
    part += f"_first{limit}" if limit else ""
    file = f"{name}_{domain}_{split}{part}_seed{run.seed}.jsonl"
    out = out or run.place / "answers" / file
    write_text(out, "".join(lines))
    lost, cost = unanswered(rows), found["cost"]
    count = len(lines) - refused(rows) - sum(lost.values())
    said = f"{label}, {domain}/{split}: {count} answers in {cost['seconds']:g} s, {refused(rows)} "
    said += "prompts refused as too long"
    said += "".join(f", {count} not answered ({why})" for why, count in lost.items())
    said += f", ${cost['usd']:.4f} by the list price" if cost["usd"] else ""
    return f"{said}\n{out}\nscore them: python -m lavic_utils evaluate {shlex.quote(str(out))}"
