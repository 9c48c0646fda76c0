"""Tables, published beside measured, each with its evidence tier, and the files behind them.

`metrics.json` holds one row a method, domain and seed, all made by one state of code and data.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lavic_utils.config import DOMAINS, PACKAGE, ROOT, UserError, results_dir
from lavic_utils.evaluation import Score
from lavic_utils.methods import METHODS, Trained, find
from lavic_utils.provenance import kept, locked, newest, write_card, write_kept
from lavic_utils.ranking import paired_tests, ranking_scores

if TYPE_CHECKING:
    from lavic_utils.experiment import Experiment

NOT_RUN = "not run here"
SCORED = ("hit_ratio_constrained", "hit_ratio_scored", "mrr", "ndcg@10")  # None: no likelihoods
ROW_FIELDS = ("method", "domain", "seed", "world", *(f.name for f in fields(Score)), *SCORED)


# ------------------------------------------------------------ published
def published() -> dict:
    """The paper's figures (tier: published), as facts."""
    return json.loads((PACKAGE / "published.json").read_text(encoding="utf-8"))


def published_rows(table: str | None = None) -> pd.DataFrame:
    """method, domain, hr@1, vr of a table (open_source, proprietary, ablation) or of all."""
    rows = []
    for row in published()["rows"]:
        if table is None or table in row["table"]:
            for domain, found in row["results"].items():
                rows.append({"method": row["method"], "domain": domain, **found})
    return pd.DataFrame(rows)


# ------------------------------------------------------------ measured: metrics.json
def metrics_path(run: Experiment) -> Path:
    """The rows of one's own runs, or the committed ones where there are none yet."""
    return newest(results_dir(run.profile) / "metrics.json")


def read_metrics(path: Path) -> dict[str, Any]:
    """What `record` wrote; UserError where there is no such file, or it is damaged."""
    if (found := kept(path)) is None:
        raise UserError(f"{path}: not there, or damaged; run `make reproduce`")
    return found


def read_extended(run: Experiment) -> dict | None:
    """What `reproduce --extended` measured by this very code and data; None otherwise."""
    found = kept(newest(results_dir(run.profile) / "extended.json"))
    return found if found and _same_state(found["provenance"], run.stamp()) else None


def _same_state(one: Mapping, other: Mapping) -> bool:
    """Whether rows of two runs may stand together. Each seed has a mini world of its own, which
    `numbers_hash` knows by its code and settings; other data must be the same."""
    drawn = [about.get("world") is not None for about in (one, other)]
    names = ("numbers_hash",) if all(drawn) else ("numbers_hash", "data_hash")
    return drawn[0] == drawn[1] and all(one.get(name) == other[name] for name in names)


def record(run: Experiment, names: Sequence[str], domains: Iterable[str] = DOMAINS) -> pd.DataFrame:
    """Score methods on test and put their `scored_rows` into `metrics_path`."""
    rows = scored_rows(run, names, domains)
    upsert_metrics(metrics_path(run), rows, run.stamp())
    return pd.DataFrame(rows)


def scored_rows(
    run: Experiment, chosen: Sequence[str], domains: Iterable[str] = DOMAINS
) -> list[dict[str, Any]]:
    """A row a method and domain: ROW_FIELDS, prompts `refused` as too long, those `unanswered` by a
    service, pictures of a prompt that did not fit (a mean), and what a trained method was given."""
    rows = []
    for method in chosen:
        for domain in domains:
            answers, variant = run.answers(method, domain), find(method)
            row = run.score(method, domain).row(method, domain, run.seed) | variant.row(run)
            row |= {"world": run.world and run.world.seed, **dict.fromkeys(SCORED)}
            row["refused"] = refused(answers)
            if lost := unanswered(answers):
                row["unanswered"] = lost
            row["dropped_images"] = sum(a["dropped_images"] for a in answers) / len(answers)
            if isinstance(variant, Trained):
                given = variant.trained(run, domain)
                row |= {"examples": given["examples"], "steps": given["steps"]}
                scores = {"HR@1, test": row["hit_ratio_conversations"], "VR": row["validity_ratio"]}
                write_card(run.tuned_folder(method, domain), **scores)
            if all(a["log_likelihoods"] for a in answers if not a["refused"]):
                for reading in ("constrained", "scored"):
                    found = run.score(method, domain, reading)
                    row[f"hit_ratio_{reading}"] = found.hit_ratio_conversations
                truths = [d.gt_items for d in run.dialogues(domain, "test")]
                ranked = ranking_scores(answers, truths)
                row |= {"mrr": ranked["MRR"], "ndcg@10": ranked["NDCG@10"]}
            rows.append(row)
    return rows


def runs(run: Experiment, methods: Sequence[str]) -> list[Experiment]:
    """This run and those of other seeds with rows of these methods: what tests take together."""
    wanted = {(method, domain) for method in methods for domain in DOMAINS}
    found: dict[int, set] = {}
    for row in read_metrics(metrics_path(run))["rows"]:
        found.setdefault(row["seed"], set()).add((row["method"], row["domain"]))
    others = [run.of_seed(seed) for seed in found if seed != run.seed and wanted <= found[seed]]
    return [run, *(other.prepare() for other in others if other.folder.is_dir())]


def paired(
    runs: Sequence[Experiment], others: Sequence[str], reading: str = "recommended"
) -> pd.DataFrame:
    """`ranking.paired_tests` of LaViC against others over the test dialogues of all `runs`."""

    def hits(method: str, domain: str) -> list[bool]:
        return [hit for run in runs for hit in run.hits(method, domain, reading)]

    mine = {domain: hits("LaViC", domain) for domain in DOMAINS}
    theirs = {(other, domain): hits(other, domain) for other in others for domain in DOMAINS}
    targets = {d: [target for run in runs for target in run.targets(d)] for d in DOMAINS}
    return paired_tests(mine, theirs, targets)


def refused(answers: Iterable[Mapping]) -> int:
    """How many prompts were not asked, since they do not fit a model's context."""
    return sum(answer["refused"] > 0 for answer in answers)


def unanswered(answers: Iterable[Mapping]) -> dict[str, int]:
    """Why a service gave no answer -> how many times."""
    return dict(Counter(a["unanswered"] for a in answers if a.get("unanswered")))


def upsert_metrics(
    path: Path, rows: Iterable[Mapping[str, Any]], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Put rows into metrics.own.json (`newest`), one for each (method, domain, seed), and, where
    `notebooks execute` asks (LAVIC_COMMIT), all into metrics.json; returns what was written.

    Other rows stay only where they are of the same code and data, so that one file never mixes two
    states. A row without one of ROW_FIELDS raises KeyError.
    """
    found: dict[tuple, dict] = {}
    path = path.with_name(path.name.replace(".own.", "."))
    with locked(path):
        old = kept(path.with_suffix(".own.json")) or {"provenance": {}, "rows": []}
        same = old["rows"] if _same_state(old["provenance"], provenance) else []
        for row in [*same, *rows]:
            names = (*ROW_FIELDS, *sorted(set(row) - set(ROW_FIELDS)))
            found[row["method"], row["domain"], row["seed"]] = {name: row[name] for name in names}
        seeds = sorted({seed for _, _, seed in found})
        written = [found[place] for place in sorted(found)]
        out = {"provenance": {**provenance, "seeds": seeds}, "rows": written}
        write_kept(path.with_suffix(".own.json"), out)
        if os.environ.get("LAVIC_COMMIT") == "1":
            write_kept(path, out)
    return out


# ------------------------------------------------------------ tables
def summary_by_seed(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One line a method and domain from rows of `Score.row`: seeds, mean, min and max of HR@1 over
    conversations, the mean's 95 % interval (`low`, `high`), means of `hit_ratio_scored` (where rows
    have it), of HR@1 over pairs and of VR, and the conversations of one seed. ValueError: no rows,
    or a method, domain and seed twice.

    Where each seed has a `world` of its own the seeds' errors are independent and the arms of
    `ci95` are added in squares; where seeds answer the same dialogues the mean is no surer than
    one of them, and the arms' mean is taken.
    """
    table = pd.DataFrame([dict(row) for row in rows])
    if table.empty or table.duplicated(["method", "domain", "seed"]).any():
        raise ValueError("no rows" if table.empty else "a method, domain and seed stand twice")
    lines = []
    for (method, domain), part in table.groupby(["method", "domain"], sort=False):
        ratio = part["hit_ratio_conversations"]
        arms = np.abs(np.array(part["ci95"].tolist()) - ratio.to_numpy()[:, None])  # (seeds, 2)
        apart = "world" in part and part["world"].nunique() == len(part)
        down, up = np.linalg.norm(arms, axis=0) / len(part) if apart else arms.mean(0)
        line = {"method": method, "domain": domain, "seeds": len(part)}
        line |= {"mean": ratio.mean(), "min": ratio.min(), "max": ratio.max()}
        line |= {"low": ratio.mean() - down, "high": ratio.mean() + up}
        for name in ("hit_ratio_scored", "hit_ratio_pairs", "validity_ratio"):
            line[name] = pd.to_numeric(part[name]).mean() if name in part else np.nan
        lines.append(line | {"conversations": int(part["conversations"].min())})
    return pd.DataFrame(lines)


def comparison(metrics: Mapping, table: str) -> pd.DataFrame:
    """The paper's table beside ours: published HR@1 and VR, measured HR@1 over conversations (mean
    over seeds) with its 95 % interval, VR, and HR@1 by likelihood. † marks what `footnote`
    explains. What a service answered with another model than the paper's stands in a row below."""
    tier, ours, lines, marked = metrics["provenance"]["tier"], {}, {}, losses(metrics)
    if metrics["rows"]:
        summary = summary_by_seed(metrics["rows"]).set_index(["method", "domain"])
        ours = summary.to_dict("index")
    found = {(r["method"], r["domain"]): r for r in metrics["rows"]}
    for row in published()["rows"]:
        if table not in row["table"]:
            continue
        name = row["method"]
        others = {r["method"] for r in metrics["rows"] if r.get("beside") == name}
        for method in (name, *sorted(others)):
            line = lines[method] = {}
            for domain, value in row["results"].items():
                line[domain, "published"] = _published_cell(value) if method == name else ""
                cell = _measured_cell(ours.get((method, domain)), found.get((method, domain)))
                line[domain, tier] = cell + " †" * (cell != NOT_RUN and method in marked)
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("HR@1 / VR (ours: / scored)")


def _published_cell(value: Mapping) -> str:
    hit_ratio = "a.o.m." if value["hr@1"] is None else f"{value['hr@1']:.4f}"
    return hit_ratio + ("" if value["vr"] is None else f" / {value['vr']:.3f}")


def _measured_cell(found: Mapping | None, row: Mapping | None) -> str:
    if found is None or row is None:
        return NOT_RUN
    if row.get("refused") and not found["validity_ratio"]:
        return f"not asked ({row['refused']} of {row['conversations']} refused)"
    text = f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
    if not pd.isna(found["validity_ratio"]):
        text += f" / {found['validity_ratio']:.3f}"
    if not pd.isna(found["hit_ratio_scored"]):
        text += f" / {found['hit_ratio_scored']:.3f}"
    lost = {"refused": row.get("refused"), "unanswered": sum(row.get("unanswered", {}).values())}
    return text + "".join(f" ({count} {how})" for how, count in lost.items() if count)


def tuning_table(run: Experiment) -> pd.DataFrame | None:
    """The search of `tune` as it is kept, an arm a row and a rate a column: validation HR@1 by
    generating / by scoring, * where it was chosen. None where there is none, or it is damaged."""
    own = results_dir(run.profile) / "tuning.json"
    committed = ROOT / "results" / run.profile.name / "tuning.json"
    if (search := kept(own if own.is_file() else committed)) is None:
        return None
    rows = search["rows"]
    for row in rows:
        row["cell"] = f"{row['hit_ratio']:.3f} / {row['hit_ratio_scored']:.3f}"
        row["cell"] += " *" if row["chosen"] else ""
        row["learning rate"] = row["setting"]["learning_rate"]
    return pd.DataFrame(rows).pivot(index="arm", columns="learning rate", values="cell")


def losses(metrics: Mapping) -> dict[str, float]:
    """Methods whose prompts do not fit their window -> pictures dropped per prompt (at least 1)."""
    found: dict[str, list[float]] = {}
    for row in metrics["rows"]:
        found.setdefault(row["method"], []).append(row.get("dropped_images", 0))
    means = {method: sum(dropped) / len(dropped) for method, dropped in found.items()}
    return {method: mean for method, mean in means.items() if mean >= 1}


def footnote(metrics: Mapping) -> str:
    """What † says of each row that bears it ("" where none does)."""
    lines = []
    for method, dropped in losses(metrics).items():
        lines.append(
            f"† {method}: ten pictures do not fit the window; {dropped:.1f} per prompt are "
            "dropped, the last candidates' first, in training and at the test. The row shows what "
            "that costs, not what full tokens are worth."
        )
    return "\n".join(lines)


def table_rows(run: Experiment, table: str) -> list[dict[str, str]]:
    """One of the paper's tables for the command line, a row a method and domain: published, ours,
    ours' evidence tier, and why there is nothing of ours. UserError for an unknown table."""
    tables = sorted({name for row in published()["rows"] for name in row["table"]})
    if table not in tables:
        raise UserError(f"no table {table!r} in the paper; there are {', '.join(tables)}")
    path, rows = metrics_path(run), []
    nothing = {"provenance": {"tier": run.profile.tier}, "rows": []}
    metrics = read_metrics(path) if path.is_file() else nothing
    tier = metrics["provenance"]["tier"]
    for method, line in comparison(metrics, table).iterrows():
        todo = f"python -m lavic_utils run {method!r} --domain DOMAIN --profile {run.profile.name}"
        known = METHODS.get(method)  # None: another model than the paper's
        todo = (known.reason(run) or f"not run yet: {todo}") if known else ""
        for domain in DOMAINS:
            row = {"method": method, "domain": domain, "published": line[domain, "published"]}
            if line[domain, tier] == NOT_RUN:
                row |= {"ours": "", "tier of ours": "", "note": todo}
            else:
                note = footnote(metrics) if line[domain, tier].endswith("†") else ""
                row |= {"ours": line[domain, tier], "tier of ours": tier, "note": note}
            rows.append(row)
    return rows
