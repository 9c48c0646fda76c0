"""The table of claims: one row for every published cell, with what stands for or against it. Files: results/claims.*.

A mini run is never evidence about a published figure, and the third party's answers come from another setting: `status`
says so in every row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lavic_utils.audit import answer_files as an
from lavic_utils.audit import published as audit
from lavic_utils.config import DOMAINS, ROOT, UserError
from lavic_utils.evaluation import summary_by_seed, wilson
from lavic_utils.provenance import write_json, write_text

BESIDE = {
    "LaViC": "title+image",
    "LaViC w/o images": "title",
}  # published method -> answers of the same inputs
ABSENT = "absent in the paper"
MINI = "mini run only: not comparable with the paper"
REASONS = {
    "not measured": "a service or model that this project does not run",
    MINI: "tiny model, rendered catalogue: shows how the method behaves there, nothing about the published figure",
}
SETTING = "4-bit weights, stage 1 with one view an image, one run, some rows missing: not the published run"
KEYS = {"hr@1": "hit_ratio_pairs", "vr": "validity_ratio"}
PAPER = (
    "published",
    "reading",
    "counts",
    "n",
    "low",
    "high",
    "ceiling",
)  # None: not in the paper; no ceiling: VR, retrieval
Ours = dict[str, Any]


def results_root() -> Path:
    """`results/`, or LAVIC_RESULTS where it is set."""
    return Path(os.environ.get("LAVIC_RESULTS", ROOT / "results"))


def mini_figures(metrics: Mapping[str, Any]) -> dict[tuple[str, str, str], Ours]:
    """(method, domain, metric) -> tier, value (mean over seeds), n (test dialogues), low, high (95 %, over dialogues)."""
    tier, found = metrics["provenance"]["tier"], {}
    for _, row in summary_by_seed(metrics["rows"]).iterrows():
        n = int(row["pooled_conversations"] / row["seeds"])
        found[row["method"], row["domain"], "hr@1"] = _ours(
            tier, row["mean"], n, (row["low"], row["high"])
        )
        if not pd.isna(vr := row["validity_ratio"]):
            found[row["method"], row["domain"], "vr"] = _ours(tier, vr, n, wilson(round(vr * n), n))
    return found


def replication_figures(
    runs: Mapping[tuple[str, str], Sequence[an.Answer]],
) -> dict[tuple[str, str, str], Ours]:
    """(method, domain, metric) -> the third party's answers as it read them; HR@1 over items, repeats counted."""
    found = {}
    for method, saw in BESIDE.items():
        for domain in DOMAINS:
            score = an.evaluate(runs[domain, saw])
            for metric, key in KEYS.items():
                found[method, domain, metric] = _ours(
                    "replication answers", score[key], score["rows"], score["ci95"][key]
                )
    return found


def _ours(tier: str, value: float, n: int, bounds: Sequence[float]) -> Ours:
    return {
        "tier": tier,
        "value": round(float(value), 4),
        "n": n,
        "low": round(bounds[0], 4),
        "high": round(bounds[1], 4),
    }


def _status(published: float | None, retrieval: bool, ours: Sequence[Ours]) -> tuple[str, str]:
    real = next((one for one in ours if one["tier"] == "replication answers"), None)
    if published is None:
        return (
            ABSENT,
            "VR is not defined for retrieval" if retrieval else "out of memory in the paper",
        )
    if real:
        where = "inside" if real["low"] <= published <= real["high"] else "outside"
        return f"another setting; published value {where} its interval", SETTING
    status = MINI if ours else "not measured"
    return status, REASONS[status]


def claim_rows(
    splits: Mapping[str, audit.Split], *figures: Mapping[tuple[str, str, str], Ours]
) -> list[dict[str, Any]]:
    """One JSON-able row for every published cell, in the order of the paper's tables, absent cells included."""
    cells = audit.published_cells()
    read, sure, rows = audit.readings(cells, splits), audit.sampling(cells, splits), []
    for index, cell in cells.iterrows():
        method, domain, metric = cell["method"], cell["domain"], cell["metric"]
        ours = [
            found[method, domain, metric] for found in figures if (method, domain, metric) in found
        ]
        row: dict[str, Any] = {
            "method": method,
            "domain": domain,
            "metric": metric,
            **dict.fromkeys(PAPER),
        }
        if index in read.index:
            counted, sampled = read.loc[index], sure.loc[index]
            row |= {
                "published": cell["value"],
                "reading": counted["reading"],
                "counts": {
                    name: counted[f"{name} k"] for name in audit.READINGS[:3] if counted[name]
                },
                "n": int(sampled["n"]),
                "low": round(sampled["low"], 4),
                "high": round(sampled["high"], 4),
                "ceiling": None if pd.isna(sampled["ceiling"]) else round(sampled["ceiling"], 4),
            }
        status, reason = _status(row["published"], cell["family"] == "retrieval", ours)
        rows.append(
            row
            | {
                "ours": ours,
                "tier": ours[0]["tier"] if ours else None,
                "status": status,
                "reason": reason,
            }
        )
    return rows


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(frame.to_json(orient="records", double_precision=4))


def claims(data: Path, replications: Path, metrics: Path) -> dict[str, Any]:
    """All that results/claims.json holds: split sizes, rows, LaViC's comparisons and the value of images."""
    splits, runs = audit.read_splits(data), audit.read_variants(replications)
    mini = (
        mini_figures(json.loads(metrics.read_text(encoding="utf-8"))) if metrics.is_file() else {}
    )
    sizes = {
        d: {
            "conversations": s.conversations,
            "pairs": s.pairs,
            "distinct": s.distinct,
            "best_pairs": s.best_pairs,
            "best_conversations": s.best_conversations,
        }
        for d, s in splits.items()
    }
    return {
        "splits": sizes,
        "rows": claim_rows(splits, replication_figures(runs), mini),
        "comparisons": _records(audit.comparisons(audit.published_cells(), splits)),
        "value_of_images": _records(audit.value_of_images(runs)),
    }


def _line(row: Mapping[str, Any]) -> str:
    if row["published"] is None:
        paper = ["–"] * 4
    else:
        counts = "; ".join(f"{k}/{name}" for name, k in row["counts"].items())
        ceiling = "–" if row["ceiling"] is None else f"{row['ceiling']:.4f}"
        paper = [
            f"{row['published']:.4f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            counts or row["reading"],
            ceiling,
        ]
    ours = (
        "; ".join(
            f"{o['tier']} {o['value']:.4f} [{o['low']:.3f}, {o['high']:.3f}], n {o['n']}"
            for o in row["ours"]
        )
        or "–"
    )
    return (
        "| "
        + " | ".join(
            [
                row["method"],
                row["domain"],
                row["metric"],
                *paper,
                ours,
                row["status"],
                row["reason"],
            ]
        )
        + " |"
    )


def markdown(found: Mapping[str, Any]) -> str:
    """The rows of claims.json as a Markdown table."""
    heads = (
        "method",
        "domain",
        "metric",
        "published",
        "95 % by test size",
        "counts that print it",
        "ceiling",
        "ours",
        "status",
        "reason",
    )
    sizes = "; ".join(
        f"{d}: {s['conversations']} conversations, {s['pairs']} ground-truth items, {s['distinct']} distinct"
        for d, s in found["splits"].items()
    )
    return "\n".join(
        [
            "# Every published figure, and what stands for or against it",
            "",
            f'Test splits: {sizes}. `k/pairs` counts items with repeats. "row mean": no count over the split '
            'prints the figure, a mean over conversations can; "none": that cannot either. Ceiling: HR@1 over '
            "items of somebody who always names the best candidate. Replication answers and mini runs measure "
            "other settings than the paper's.",
            "",
            "| " + " | ".join(heads) + " |",
            "| --- " * len(heads) + "|",
            *map(_line, found["rows"]),
            "",
        ]
    )


def write_claims(data: Path, replications: Path) -> dict[str, Any]:
    """Write claims.json and claims.md below `results_root()`; returns what claims.json holds."""
    root = results_root()
    found = claims(data, replications, root / "mini" / "metrics.json")
    write_json(root / "claims.json", found)
    write_text(root / "claims.md", markdown(found))
    return found


def read_claims(path: Path = ROOT / "results" / "claims.json") -> dict[str, Any]:
    """The committed claims. UserError where the file is missing."""
    if not path.is_file():
        raise UserError(
            f"{path.name} is not in {path.parent.name}/; set LAVIC_DATA and LAVIC_REPLICATIONS, run notebook 07"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def claims_summary(found: Mapping[str, Any] | None = None) -> str:
    """A few Markdown lines for the README, from the committed claims alone."""
    found = found or read_claims()
    hits = [r for r in found["rows"] if r["metric"] == "hr@1" and r["published"]]
    readings = {name: sum(name in r["counts"] for r in hits) for name in audit.READINGS[:3]}
    uncounted = sum(not r["counts"] for r in hits)
    open_rows = [
        r
        for r in audit.published_cells().itertuples()
        if "open_source" in r.tables and r.method != "LaViC"
    ]
    groups = {"the open-source baselines": {r.method for r in open_rows}, "w/o images": {"LaViC w/o images"},
              "w/o self-distillation": {"LaViC w/o self-distillation"}}  # fmt: skip
    lines = []
    for name, methods in groups.items():
        part = [c["verdict"] for c in found["comparisons"] if c["against"] in methods]
        lines.append(
            f"  - {name}: of {len(part)} differences {part.count(audit.BEYOND)} are beyond chance however the answers "
            f"pair, {part.count(audit.WITHIN)} never are, {part.count(audit.DEPENDS)} depend on unpublished answers"
        )
    pooled = next(
        r
        for r in found["value_of_images"]
        if r["domain"] == "all" and r["title+image against"] == "title"
    )
    return "\n".join(
        [
            f"- {len(hits)} published HR@1 above zero: {readings['pairs']} are a count of ground-truth items with repeats, "
            f"{readings['distinct']} of distinct ones, {readings['conversations']} of conversations (some fit several, some by "
            f"chance); {uncounted} are no count over the published test split.",
            "- LaViC's lead, judged by test size alone:",
            *lines,
            f"- A third party's 7B answers ({pooled['matched']} dialogues, another setting): adding images to titles changes HR@1 "
            f"by {pooled['difference']:+.4f} [{pooled['low']:+.4f}, {pooled['high']:+.4f}].",
            "- Every cell: [results/claims.md](results/claims.md); how: [notebook 07](notebooks/07_audit.ipynb).",
            "",
        ]
    )
