"""Tables: published beside measured, every one with its evidence tier. Reads results, computes none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from lavic_utils.config import DOMAINS, PACKAGE, UserError, results_dir
from lavic_utils.evaluation import summary_by_seed
from lavic_utils.methods import Trained, find
from lavic_utils.mini import words as w  # noqa: F401  (notebooks name the attributes through here)
from lavic_utils.provenance import upsert_metrics
from lavic_utils.ranking import ranking_scores
from lavic_utils.runs import Run

NOT_RUN = "not run here"


def published() -> dict:
    """The paper's figures (tier: published), as facts."""
    return json.loads((PACKAGE / "published.json").read_text(encoding="utf-8"))


def published_rows(table: str | None = None) -> pd.DataFrame:
    """method, domain, hr@1, vr of one of the paper's tables (open_source, proprietary, ablation) or of all."""
    rows = [
        {"method": r["method"], "domain": d, "hr@1": v["hr@1"], "vr": v["vr"]}
        for r in published()["rows"]
        if table is None or table in r["table"]
        for d, v in r["results"].items()
    ]
    return pd.DataFrame(rows)


def record(
    run: Run,
    chosen: Sequence[str],
    domains: Sequence[str] = tuple(DOMAINS),
    path: Path | None = None,
) -> pd.DataFrame:
    """Score methods on test and put their rows into `results/<profile>/metrics.json` (or `path`): beside the required fields the
    readings "constrained" and "scored", MRR and NDCG@10, and how many prompts were refused as too long for the context."""
    rows = []
    for method in chosen:
        for domain in domains:
            answers, row = (
                run.answers(method, domain),
                run.score(method, domain).row(method, domain, run.seed),
            )
            if isinstance(find(method), Trained):
                row["examples"] = run.tune(method, domain)["examples"]
            row["refused"] = sum(a["refused"] > 0 for a in answers)
            if any(a["log_likelihoods"] for a in answers):
                for reading in ("constrained", "scored"):
                    row[f"hit_ratio_{reading}"] = run.score(
                        method, domain, reading
                    ).hit_ratio_conversations
                ranked = ranking_scores(
                    answers, [d.gt_items for d in run.dialogues(domain, "test")]
                )
                row |= {"mrr": ranked["MRR"], "ndcg@10": ranked["NDCG@10"]}
            rows.append(row)
    upsert_metrics(path or metrics_path(run), rows, run.stamp())
    return pd.DataFrame(rows)


def metrics_path(run: Run) -> Path:
    return results_dir(run.profile) / "metrics.json"


def extended_path(run: Run) -> Path:
    return results_dir(run.profile) / "extended.json"


def read_extended(run: Run) -> dict | None:
    """What `reproduce --extended` measured, where it was by this very code and data; None otherwise."""
    path, now = extended_path(run), run.stamp()
    found = read_metrics(path) if path.is_file() else None
    same = found and all(
        found["provenance"][name] == now[name] for name in ("numbers_hash", "data_hash")
    )
    return found if same else None


def read_metrics(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path.name} is not in {path.parent.name}/; run `make reproduce` first")
    return json.loads(path.read_text(encoding="utf-8"))


def _measured(value: Mapping) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def comparison(metrics: Mapping, table: str) -> pd.DataFrame:
    """The paper's table beside ours: published HR@1 and VR, measured HR@1 over conversations (mean over seeds) with a
    95 % interval over dialogues, and VR. A method that was not run on this profile says so."""
    ours = (
        summary_by_seed(metrics["rows"]).set_index(["method", "domain"]).to_dict("index")
        if metrics["rows"]
        else {}
    )
    refused = {(r["method"], r["domain"]): r.get("refused", 0) for r in metrics["rows"]}
    tier, lines = metrics["provenance"]["tier"], {}
    for row in published()["rows"]:
        if table not in row["table"]:
            continue
        cells = {}
        for domain, value in row["results"].items():
            paper = "–" if value["hr@1"] is None else f"{value['hr@1']:.4f}"
            paper += "" if value["vr"] is None else f" / {value['vr']:.3f}"
            cells[(domain, "published")] = paper
            mine = ours.get((row["method"], domain))
            vr = (
                ""
                if mine is None or pd.isna(mine["validity_ratio"])
                else f" / {mine['validity_ratio']:.3f}"
            )
            vr += (
                f" ({count} refused)" if (count := refused.get((row["method"], domain), 0)) else ""
            )
            cells[(domain, tier)] = NOT_RUN if mine is None else _measured(mine) + vr
        lines[row["method"]] = cells
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("HR@1 / VR")


def table_rows(run: Run, table: str) -> list[dict[str, str]]:
    """One of the paper's tables for the command line, a row a method and domain: published, ours, ours' evidence tier, and why
    there is nothing of ours. UserError for a table the paper does not have."""
    tables = sorted({name for row in published()["rows"] for name in row["table"]})
    if table not in tables:
        raise UserError(f"no table {table!r} in the paper; there are {', '.join(tables)}")
    path = metrics_path(run)
    metrics = (
        read_metrics(path)
        if path.is_file()
        else {"provenance": {"tier": run.profile.tier}, "rows": []}
    )
    frame, rows = comparison(metrics, table), []
    for method, line in frame.iterrows():
        why = find(method).reason(run)
        for domain in DOMAINS:
            ours = line[(domain, metrics["provenance"]["tier"])]
            todo = (
                f"python -m lavic_utils run {method!r} --domain DOMAIN --profile {run.profile.name}"
            )
            rows.append(
                {
                    "method": method,
                    "domain": domain,
                    "published": line[(domain, "published")],
                    "ours": "" if ours == NOT_RUN else ours,
                    "tier of ours": "" if ours == NOT_RUN else metrics["provenance"]["tier"],
                    "note": "" if ours != NOT_RUN else why or f"not run yet: {todo}",
                }
            )
    return rows


def seed_table(metrics: Mapping, methods: Sequence[str]) -> pd.DataFrame:
    """HR@1 over conversations by domain: one column a seed, then mean and spread (highest less lowest)."""
    frame = pd.DataFrame(metrics["rows"]).query("method in @methods")
    wide = frame.pivot_table(
        index=["domain", "method"], columns="seed", values="hit_ratio_conversations"
    )
    seeds = list(wide.columns)
    wide["mean"], wide["spread"] = (
        wide[seeds].mean(axis=1),
        wide[seeds].max(axis=1) - wide[seeds].min(axis=1),
    )
    order = [(d, m) for d in DOMAINS for m in methods if (d, m) in wide.index]
    return wide.loc[order].round(3)
