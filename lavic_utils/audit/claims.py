"""The table of claims: one row for every published cell, with what stands for or against it.

Files: results/claims.json and claims.md. A mini run is never evidence about a published figure, and
the third party's answers come from another setting: `status` says so in every row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from lavic_utils.audit import published
from lavic_utils.audit.answer_files import evaluate, read_replications
from lavic_utils.config import DOMAINS, PACKAGE, ROOT, UserError
from lavic_utils.evaluation import wilson
from lavic_utils.methods import find
from lavic_utils.provenance import write_json, write_text
from lavic_utils.ranking import holm
from lavic_utils.report import read_metrics, summary_by_seed

# Published method -> what a third party's model saw that got the same inputs
BESIDE = {"LaViC": "title+image", "LaViC w/o images": "title"}
ABSENT = "absent in the paper"
MINI = "mini run only: not comparable with the paper"
REHEARSAL = "rehearsal only: random weights, no evidence"
WHY_MINI = "tiny model, rendered catalogue: shows how the method behaves there, nothing about the "
WHY_MINI += "published figure"
WHY_REHEARSAL = "narrow stand-in of the model: shows that the commands run, nothing else"
WHY_FULL = "this code's run of the 7B model on the published data"
WHY_OTHER = "4-bit weights, stage 1 with one view an image, one run, some rows missing: not the "
WHY_OTHER += "published run"
# None: not in the paper; no ceiling: VR, retrieval
PAPER = ("published", "reading", "counts", "n", "low", "high", "ceiling")
SHOWN = ("published", "95 % by test size", "counts that print it", "ceiling", "ours")
Figures = dict[tuple[str, str, str], dict[str, Any]]  # (method, domain, metric) -> `_figure`


def _figure(
    tier: str, value: float, n: int, bounds: Sequence[float], worlds: int = 1
) -> dict[str, Any]:
    low, high = (round(bound, 4) for bound in bounds)
    found = {"tier": tier, "value": round(float(value), 4), "n": n, "worlds": worlds}
    return found | {"low": low, "high": high}


def measured(metrics: Mapping[str, Any]) -> Figures:
    """Means over seeds of a profile's runs, their 95 % intervals over dialogues. n: the test
    dialogues of all worlds, where each seed has one of its own, else those that all answer."""
    tier, found = metrics["provenance"]["tier"], {}
    seen: dict[tuple[str, str], set] = {}
    for one in metrics["rows"]:
        seen.setdefault((one["method"], one["domain"]), set()).add(one.get("world"))
    for row in summary_by_seed(metrics["rows"]).to_dict("records"):
        key, vr = (row["method"], row["domain"]), row["validity_ratio"]
        worlds = row["seeds"] if len(seen[key]) == row["seeds"] else 1
        n = worlds * row["conversations"]
        found[*key, "hr@1"] = _figure(tier, row["mean"], n, (row["low"], row["high"]), worlds)
        if not pd.isna(vr):
            found[*key, "vr"] = _figure(tier, vr, n, wilson(round(vr * n), n), worlds)
    return found


def replication_figures(runs: published.Runs) -> Figures:
    """The third party's answers as it read them, over conversations like all figures of ours."""
    found = {}
    for method, saw in BESIDE.items():
        for domain in DOMAINS:
            score = evaluate(runs[domain, saw])
            for metric, key in (("hr@1", "hit_ratio_conversations"), ("vr", "validity_ratio")):
                figure = (score[key], score["rows"], score["ci95"][key])
                found[method, domain, metric] = _figure("replication answers", *figure)
    return found


def _status(row: Mapping[str, Any], retrieval: bool, ours: Sequence[Mapping]) -> tuple[str, str]:
    """(status, reason) of one published cell. Both figures have an error of their own, so the
    third party's is compared by a two-sample test."""
    value = row["published"]
    if value is None:
        why = "VR is not defined for retrieval" if retrieval else "out of memory in the paper"
        return ABSENT, why
    for one in ours:
        if one["tier"] in ("full run", "replication answers"):
            p = published.independent(value, one["value"], row["n"], one["n"])[1]
            told = "told apart from" if p < 0.05 else "not told apart from"
            full = one["tier"] == "full run"
            kind, why = ("full run", WHY_FULL) if full else ("another setting", WHY_OTHER)
            return f"{kind}; {told} the published value", f"p = {p:.3f}; {why}"
    if ours:
        mini = any(one["tier"] == "mini run" for one in ours)
        return (MINI, WHY_MINI) if mini else (REHEARSAL, WHY_REHEARSAL)
    return "not measured", "a service or model that this project does not run"


def claim_rows(splits: Mapping[str, published.Split], *figures: Figures) -> list[dict[str, Any]]:
    """One JSON-able row for every published cell, in the order of the paper's tables, absent cells
    included."""
    cells, rows = published.published_cells(), []
    judged = published.sampling(published.readings(cells, splits), splits)
    for index, cell in cells.iterrows():
        key = (cell["method"], cell["domain"], cell["metric"])
        ours = [found[key] for found in figures if key in found]
        row = dict(zip(("method", "domain", "metric"), key, strict=True)) | dict.fromkeys(PAPER)
        if index in judged.index:
            one = judged.loc[index]
            row |= {"published": one["value"], "reading": one["reading"], "n": int(one["n"])}
            fitting = [name for name in published.READINGS[:3] if one[name]]
            row["counts"] = {name: one[f"{name} k"] for name in fitting}
            for name in ("low", "high", "ceiling"):
                row[name] = None if pd.isna(one[name]) else round(one[name], 4)
        status, reason = _status(row, cell["family"] == "retrieval", ours)
        tier = ours[0]["tier"] if ours else None
        rows.append(row | {"ours": ours, "tier": tier, "status": status, "reason": reason})
    return rows


def claims(data: Path, replications: Path, root: Path) -> dict[str, Any]:
    """What claims.json holds: split sizes, rows, LaViC's comparisons, value of images. `root`: the
    folder of results, by profile. UserError for a rehearsal among those that are committed."""
    splits, runs = published.read_splits(data), read_replications(replications)
    figures = [replication_figures(runs)]
    for path in sorted(root.glob("*/metrics.json")):
        metrics = read_metrics(path)
        tier = metrics["provenance"]["tier"]
        if tier == "rehearsal" and root.resolve() == ROOT / "results":
            raise UserError(f"{path}: a rehearsal's figures are no claims; move that folder away")
        figures.insert(0 if tier == "full run" else len(figures), measured(metrics))
    sizes = {domain: asdict(split) for domain, split in splits.items()}
    for split in sizes.values():
        split.pop("truths")
    rows = claim_rows(splits, *figures)
    leads = published.comparisons(published.published_cells(), splits)
    images = published.value_of_images(runs)

    def plain(frame: pd.DataFrame) -> list[dict[str, Any]]:
        rows = frame.to_dict("records")  # to four digits that count: no p becomes 0
        return [
            {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in r.items()}
            for r in rows
        ]

    found = {"splits": sizes, "rows": rows, "comparisons": plain(leads)}
    return found | {"value_of_images": plain(images)}


def _shown(row: Mapping[str, Any]) -> list[str]:
    """A row in words: published, interval, counts, ceiling, ours."""
    paper, ours = ["–"] * 4, []
    if row["published"] is not None:
        counts = "; ".join(f"{k}/{name}" for name, k in row["counts"].items())
        ceiling = "–" if row["ceiling"] is None else f"{row['ceiling']:.4f}"
        interval = f"{row['low']:.4f} to {row['high']:.4f}"
        paper = [f"{row['published']:.4f}", interval, counts or row["reading"], ceiling]
    for one in row["ours"]:
        interval = f"[{one['low']:.4f}, {one['high']:.4f}]"
        n, worlds = one["n"], one["worlds"]
        size = f"n {n}" if worlds == 1 else f"n {n} ({worlds} worlds of {n // worlds})"
        ours.append(f"{one['tier']} {one['value']:.4f} {interval}, {size}")
    return [*paper, "; ".join(ours) or "–"]


def _lead(one: Mapping[str, Any]) -> list[str]:
    """A comparison in words: difference, interval, p, verdict."""
    ends = (one["p paired, least"], one["p paired, greatest"])
    p = " to ".join(f"{value:.2g}" if value >= 1e-4 else "< 0.0001" for value in ends)
    interval = f"{one['low']:+.4f} to {one['high']:+.4f}"
    return [f"{one['difference']:+.4f}", interval, p, one["verdict"]]


def markdown(found: Mapping[str, Any]) -> str:
    """claims.json as a page: the summary, LaViC's comparisons, and every published cell."""

    def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
        cells = [heads, ["---"] * len(heads), *rows]
        return ["", *(f"| {' | '.join(row)} |" for row in cells)]

    size = "{}: {conversations} conversations, {pairs} ground-truth items, {distinct} distinct"
    sizes = [size.format(domain, **split) for domain, split in found["splits"].items()]
    leads = [[one["against"], one["domain"], *_lead(one)] for one in found["comparisons"]]
    cells = []
    for row in found["rows"]:
        about = [row["method"], row["domain"], row["metric"]]
        cells.append([*about, *_shown(row), row["status"], row["reason"]])
    lines = [
        "# Every published figure, and what stands for or against it",
        "",
        *summary(found),
        "",
        "One cell from count to verdict: `lavic claims METHOD DOMAIN`.",
        "",
        f"## LaViC's lead, {len(leads)} comparisons",
        "",
        "Differences of published HR@1. *95 %*: as if the two had been tested on independent "
        "samples of the split's size. *p*: the least and the greatest of a paired test, over every "
        "way in which the two methods' hits can overlap, since the answers are not published.",
        *table(["against", "domain", "difference", "95 %", "p, paired", "verdict"], leads),
        "",
        f"## All {len(cells)} cells",
        "",
        f'Test splits: {"; ".join(sizes)}. `k/pairs` counts items with repeats. "row mean": no '
        'count over the split prints the figure, a mean over conversations can; "none": that '
        "cannot either. "
        "Ceiling: HR@1 over items of somebody who always names the best candidate. Replication "
        "answers and mini runs measure other settings than the paper's.",
        *table(["method", "domain", "metric", *SHOWN, "status", "reason"], cells),
    ]
    return "\n".join([*lines, ""])


def explain(found: Mapping[str, Any], method: str, domain: str) -> str:
    """One method and domain from count to verdict, in lines. UserError where the paper has none."""
    name, domain = find(method).name, domain.lower()
    size = found["splits"].get(domain)
    if size is None:
        raise UserError(f"no domain {domain!r}; there are {', '.join(found['splits'])}")
    about = "{conversations} conversations, {pairs} ground-truth items ({distinct} distinct)"
    lines = [f"{name}, {domain}: a test split of {about.format(**size)}"]
    for row in found["rows"]:
        if (row["method"], row["domain"]) == (name, domain):
            lines += ["", {"hr@1": "HR@1", "vr": "VR"}[row["metric"]]]
            lines += [f"  {k}: {v}" for k, v in zip(SHOWN, _shown(row), strict=True) if v != "–"]
            lines += [f"  status: {row['status']} ({row['reason']})"]
    leads = [one for one in found["comparisons"] if one["domain"] == domain]
    leads = [one for one in leads if name in ("LaViC", one["against"])]
    about = "difference of HR@1; 95 % by test size; p, paired; verdict"
    about = about if leads else f"none to judge, the paper prints no HR@1 of {name} there"
    lines += ["", f"LaViC's lead: {about}"]
    lines += [f"  over {one['against']}: {'; '.join(_lead(one))}" for one in leads]
    return "\n".join(lines)


def write_claims(data: Path, replications: Path) -> dict[str, Any]:
    """Write claims.json and claims.md to `results/` (or LAVIC_RESULTS); returns the former."""
    root = Path(os.environ.get("LAVIC_RESULTS") or ROOT / "results")
    found = claims(data, replications, root)
    write_json(root / "claims.json", found)
    write_text(root / "claims.md", markdown(found))
    return found


def _packed() -> Path | None:
    """The committed claims as a wheel brings them, where the package is of one."""
    with suppress(metadata.PackageNotFoundError):
        for file in metadata.files("lavic-companion") or ():
            if file.name == "claims.json" and ROOT != PACKAGE.parent:
                return Path(file.locate())
    return None


def read_claims(path: Path = ROOT / "results" / "claims.json") -> dict[str, Any]:
    """The committed claims: here, else a wheel's. UserError where there are none."""
    path = path if path.is_file() else _packed() or path
    if not path.is_file():
        todo = "in a checkout, set LAVIC_DATA and LAVIC_REPLICATIONS and run notebook 07"
        raise UserError(f"{path.name} is not in {path.parent.name}/; {todo}")
    return json.loads(path.read_text(encoding="utf-8"))


def summary(found: Mapping[str, Any]) -> list[str]:
    """The claims in a few Markdown lines, from what claims.json holds."""
    cells = published.published_cells()
    hits = [row["counts"] for row in found["rows"] if row["metric"] == "hr@1" and row["published"]]
    pairs, distinct, rows = (sum(k in counts for counts in hits) for k in published.READINGS[:3])
    lines = [
        f"- {len(hits)} published HR@1 above zero: {pairs} can be counts over items with repeats, "
        f"{distinct} over distinct items, {rows} over conversations (some fit several, some by "
        f"chance); {hits.count({})} are no such count over the published test split.",
        "- LaViC's lead, judged by the size of the test alone, not by other training runs:",
    ]
    leads = pd.DataFrame(found["comparisons"])
    kinds = leads["against"].map(cells.drop_duplicates("method").set_index("method")["tables"])
    rivals = leads[["open_source" in tables for tables in kinds]]
    held = sum(p < 0.05 for p in holm(rivals["p paired, greatest"]))
    mixed = rivals[rivals["p mixed"] >= 0.05].to_dict("records")
    left = [f"{one['against']} on {one['domain']} (p = {one['p mixed']:.3f})" for one in mixed]
    lines.append(
        f"  - over the open-source baselines: {(rivals['verdict'] == published.BEYOND).sum()} of "
        f"{len(rivals)} differences are beyond chance however the answers pair ({held} after "
        "Holm's correction), if both numbers are counted alike. If LaViC's counts conversations "
        f"and the other's items, {len(rivals) - len(mixed)} are: not over {' and '.join(left)}, "
        "the rivals behind the paper's headline there."
    )
    own = leads[["ablation" in tables for tables in kinds]]
    own = own.assign(holm=holm(own["p paired, greatest"]))
    for less in ("w/o images", "w/o self-distillation"):
        part = own[own["against"] == f"LaViC {less}"]
        sure = part[part["verdict"] == published.BEYOND].to_dict("records")
        open_ = (part["verdict"] == published.DEPENDS).sum()
        said = [
            f"{one['domain']} (p at most {one['p paired, greatest']:.3f}, {one['holm']:.2f} after "
            "Holm's correction)"
            for one in sure
        ]
        lines.append(
            f"  - over itself {less}: {len(sure)} of {len(part)} differences beyond chance however "
            f"the answers pair{': ' * bool(sure)}{'; '.join(said)}; {open_} depend on unpublished "
            "answers."
        )
    images = {(one["domain"], one["title+image against"]): one for one in found["value_of_images"]}
    pooled = images["all", "title"]
    return [
        *lines,
        f"- A third party's 7B answers ({pooled['matched']} dialogues, another setting): adding "
        f"images to titles changes HR@1 by {pooled['difference']:+.4f} [{pooled['low']:+.4f}, "
        f"{pooled['high']:+.4f}].",
    ]
