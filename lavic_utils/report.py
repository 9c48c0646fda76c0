"""Tables and figures: published beside measured, every one with its evidence tier. Reads results, computes none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from lavic_utils import data  # noqa: E402
from lavic_utils import wording as w  # noqa: E402, F401  (notebooks name the attributes through here)
from lavic_utils.config import DOMAINS, PACKAGE, UserError, figures_dir, results_dir  # noqa: E402
from lavic_utils.evaluation import summary_by_seed  # noqa: E402
from lavic_utils.methods import Trained, find  # noqa: E402
from lavic_utils.provenance import save_figure, upsert_metrics  # noqa: E402
from lavic_utils.ranking import ranking_scores  # noqa: E402
from lavic_utils.runs import Run  # noqa: E402

INK = {"published": "#9aa5b1", "mini run": "#d1495b", "replication answers": "#2e7d6b", "full run": "#30638e"}
NOT_RUN = "not run here"
SHADES = ("#d1495b", "#edae49", "#30638e", "#8d96a3", "#2e7d6b", "#6a4c93")


# ---------------------------------------------------------------- tables
def published() -> dict:
    """The paper's figures (tier: published), as facts."""
    return json.loads((PACKAGE / "published.json").read_text(encoding="utf-8"))


def published_rows(table: str | None = None) -> pd.DataFrame:
    """method, domain, hr@1, vr of one of the paper's tables (open_source, proprietary, ablation) or of all."""
    rows = [{"method": r["method"], "domain": d, "hr@1": v["hr@1"], "vr": v["vr"]}
            for r in published()["rows"] if table is None or table in r["table"] for d, v in r["results"].items()]
    return pd.DataFrame(rows)


def record(run: Run, chosen: Sequence[str], domains: Sequence[str] = tuple(DOMAINS), path: Path | None = None) -> pd.DataFrame:
    """Score methods on test and put their rows into `results/<profile>/metrics.json` (or `path`): beside the required fields the
    readings "constrained" and "scored", MRR and NDCG@10, and how many prompts were refused as too long for the context."""
    rows = []
    for method in chosen:
        for domain in domains:
            answers, row = run.answers(method, domain), run.score(method, domain).row(method, domain, run.seed)
            if isinstance(find(method), Trained):
                row["examples"] = run.tune(method, domain)["examples"]
            row["refused"] = sum(a["refused"] > 0 for a in answers)
            if any(a["log_likelihoods"] for a in answers):
                for reading in ("constrained", "scored"):
                    row[f"hit_ratio_{reading}"] = run.score(method, domain, reading).hit_ratio_conversations
                ranked = ranking_scores(answers, [d.gt_items for d in run.dialogues(domain, "test")])
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
    same = found and all(found["provenance"][name] == now[name] for name in ("numbers_hash", "data_hash"))
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
    ours = summary_by_seed(metrics["rows"]).set_index(["method", "domain"]).to_dict("index") if metrics["rows"] else {}
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
            vr = "" if mine is None or pd.isna(mine["validity_ratio"]) else f" / {mine['validity_ratio']:.3f}"
            vr += f" ({count} refused)" if (count := refused.get((row["method"], domain), 0)) else ""
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
    metrics = read_metrics(path) if path.is_file() else {"provenance": {"tier": run.profile.tier}, "rows": []}
    frame, rows = comparison(metrics, table), []
    for method, line in frame.iterrows():
        why = find(method).reason(run)
        for domain in DOMAINS:
            ours = line[(domain, metrics["provenance"]["tier"])]
            todo = f"python -m lavic_utils run {method!r} --domain DOMAIN --profile {run.profile.name}"
            rows.append({"method": method, "domain": domain, "published": line[(domain, "published")],
                         "ours": "" if ours == NOT_RUN else ours,
                         "tier of ours": "" if ours == NOT_RUN else metrics["provenance"]["tier"],
                         "note": "" if ours != NOT_RUN else why or f"not run yet: {todo}"})
    return rows


def seed_table(metrics: Mapping, methods: Sequence[str]) -> pd.DataFrame:
    """HR@1 over conversations by domain: one column a seed, then mean and spread (highest less lowest)."""
    frame = pd.DataFrame(metrics["rows"]).query("method in @methods")
    wide = frame.pivot_table(index=["domain", "method"], columns="seed", values="hit_ratio_conversations")
    seeds = list(wide.columns)
    wide["mean"], wide["spread"] = wide[seeds].mean(axis=1), wide[seeds].max(axis=1) - wide[seeds].min(axis=1)
    order = [(d, m) for d in DOMAINS for m in methods if (d, m) in wide.index]
    return wide.loc[order].round(3)


# ---------------------------------------------------------------- figures
def keep(fig, name: str, run: Run, tier: str | None = None, seeds: Sequence[int] | None = None):
    """Save a figure with its tier and provenance (`seeds`: where it shows more than this run's), and return it."""
    about = run.stamp() | ({"seeds": seeds} if seeds else {})
    save_figure(fig, figures_dir(run.profile) / f"{name}.png", tier or run.profile.tier, about)
    plt.close(fig)
    return fig


def gallery(run: Run, asins: Sequence[str], labels: Sequence[str] = (), highlight: Sequence[str] = (), axes=None):
    """Item images in a row, the highlighted ones framed."""
    if axes is None:
        fig, axes = plt.subplots(1, len(asins), figsize=(1.15 * len(asins), 1.6))
    for i, (axis, asin) in enumerate(zip(np.atleast_1d(axes), asins, strict=True)):
        image = data.open_image(data.image_file(run.root, asin))
        axis.set(xticks=[], yticks=[])
        if image is None:
            axis.text(0.5, 0.5, "no image", ha="center", va="center", transform=axis.transAxes, fontsize=7)
        else:
            axis.imshow(image)
        for spine in axis.spines.values():
            spine.set(visible=asin in highlight, color=INK["full run"], linewidth=3)
        if labels:
            axis.set_xlabel(labels[i], fontsize=6.5)
    return np.atleast_1d(axes)[0].figure


def task_figure(run: Run, dialogue: data.Dialogue):
    """The task: a dialogue, ten candidates with id, title and picture; the ground truth framed."""
    import textwrap

    names = dialogue.candidates_st
    fig, axes = plt.subplots(2, 6, figsize=(10.5, 4), width_ratios=[2.6, 1, 1, 1, 1, 1])
    cells = [axes[r, c] for r in range(2) for c in range(1, 6)]
    gallery(run, names, [f"{run.titles[a]}\n{a}" for a in names], dialogue.gt_items, cells)
    for axis in axes[:, 0]:
        axis.axis("off")
    text = "\n".join(textwrap.fill(f"{who}: {said}", 36) for who, said in dialogue.turns)
    axes[0, 0].text(0, 1, text, va="top", fontsize=8, transform=axes[0, 0].transAxes)
    return fig


def token_budget(run: Run, tokens_full: int, tokens_cls: int):
    """Visual tokens of ten candidates against the context window: the paper's model (published) and this profile's."""
    facts, window = published()["token_facts"], run.profile.recommendation.max_length
    fig, axes = plt.subplots(1, 2, figsize=(8, 2))
    cases = [("paper (published)", 10 * facts["tokens_per_image"], 10 * facts["cls_tokens_per_image"],
              facts["context_window_llava_v1.6"]), (f"{run.profile.name} model (measured)", 10 * tokens_full,
                                                  10 * tokens_cls, window)]
    for axis, (name, full, cls, limit) in zip(axes, cases, strict=True):
        axis.barh(["[CLS] tokens", "entire tokens"], [cls, full], color=[SHADES[0], INK["published"]])
        for y, value in enumerate((cls, full)):
            axis.text(value, y, f" {value:,}", va="center")
        axis.axvline(limit, color="k", ls="--", lw=1)
        axis.set(title=name, xlabel=f"tokens for 10 candidates (window {limit:,}, dashed)", xscale="log", xlim=(10, full * 4))
    fig.tight_layout()
    return fig


def framework_figure(shapes: Mapping[str, str]):
    """The two stages with this model's real tensor shapes (`shapes`: box name -> shape line)."""
    fig, axis = plt.subplots(figsize=(9.5, 3.6))
    axis.set(xlim=(0, 10), ylim=(0, 4))
    axis.axis("off")
    train, frozen = "#f6d6d9", "#e6e9ed"
    boxes = [(0.1, 2.4, "image tiles", "#fff6df", "tiles"), (2.0, 2.4, "vision tower", train, "tower"),
             (3.9, 2.4, "[CLS] of each tile", "#fff6df", "cls"), (5.8, 2.4, "projector", train, "projector"),
             (7.9, 2.4, "language model\n(frozen): description", frozen, "describe"),
             (0.1, 0.5, "dialogue, titles, ids", "#fff6df", "prompt"), (3.9, 0.5, "stored [CLS] tokens\nof ten candidates",
             "#fff6df", "stored"), (7.9, 0.5, "language model\n(LoRA): one id", train, "recommend")]
    for x, y, name, colour, label in boxes:
        axis.add_patch(plt.Rectangle((x, y), 1.75, 1.0, facecolor=colour, edgecolor="0.4"))
        axis.text(x + 0.87, y + 0.62, name, ha="center", va="center", fontsize=8)
        axis.text(x + 0.87, y + 0.16, shapes.get(label, ""), ha="center", va="center", fontsize=6.5, color="0.3")
    for x0, y0, x1, y1 in [(1.85, 2.9, 2, 2.9), (3.75, 2.9, 3.9, 2.9), (5.65, 2.9, 5.8, 2.9), (7.55, 2.9, 7.9, 2.9),
                           (6.6, 2.4, 5.2, 1.5), (1.85, 0.8, 7.9, 0.8), (5.65, 1.0, 7.9, 1.0)]:
        axis.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->", "color": "0.4"}, zorder=0)
    axis.text(0.1, 3.6, "Stage 1: visual knowledge self-distillation", weight="bold")
    axis.text(0.1, 1.7, "Stage 2: recommendation fine-tuning", weight="bold")
    axis.text(9.65, 3.6, "red: trained with LoRA; grey: frozen", ha="right", fontsize=7)
    return fig


def curves(history: Sequence[Mapping]):
    """Stage 1 by epoch: losses, validation perplexity and, where known, attribute accuracies."""
    frame = pd.DataFrame(history).set_index("epoch")
    seen = [c for c in frame if c.startswith("accuracy_")]
    fig, axes = plt.subplots(1, 3 if seen else 2, figsize=(9, 2.4))
    frame[["train_loss", "valid_loss"]].plot(ax=axes[0], marker="o", color=SHADES[:2], ylabel="cross-entropy")
    frame[["valid_perplexity"]].plot(ax=axes[1], marker="o", color=SHADES[2], ylabel="validation perplexity")
    if seen:
        frame[seen].rename(columns=lambda c: c.removeprefix("accuracy_")).plot(ax=axes[2], marker="o", color=SHADES,
                                                                             ylabel="attribute accuracy", ylim=(0, 1.02))
    fig.tight_layout()
    return fig


def loss_figure(logs: Mapping[str, Sequence[Mapping]]):
    """Stage 2 training loss by step, one line a domain."""
    fig, axis = plt.subplots(figsize=(6, 2.4))
    for colour, (domain, log) in zip(SHADES, logs.items(), strict=False):
        axis.plot([e["step"] for e in log], [e["loss"] for e in log], label=domain, color=colour)
    axis.set(xlabel="step", ylabel="cross-entropy of the id")
    axis.legend()
    fig.tight_layout()
    return fig


def bars(metrics: Mapping, methods: Sequence[str], tier: str):
    """HR@1 by domain and method: the published figures above, the measured ones (95 % interval, seeds as dots) below.
    Two axes, never one: a mini figure is no paper figure."""
    paper = published_rows().set_index(["method", "domain"])["hr@1"]
    ours = summary_by_seed(metrics["rows"]).set_index(["method", "domain"])
    raw = pd.DataFrame(metrics["rows"])
    fig, axes = plt.subplots(2, 3, figsize=(10.5, 0.62 * len(methods) + 1.6), sharey=True)
    for column, domain in enumerate(DOMAINS):
        top, low = axes[0, column], axes[1, column]
        top.barh(methods, [paper.get((m, domain), np.nan) for m in methods], color=INK["published"])
        for y, method in enumerate(methods):
            if (method, domain) in ours.index:
                row = ours.loc[(method, domain)]
                mean = row["mean"]
                low.barh(method, mean, color=INK[tier], alpha=0.75,
                         xerr=[[mean - row["low"]], [row["high"] - mean]], ecolor="0.25")
                seeds = raw.query("method == @method and domain == @domain")["hit_ratio_conversations"]
                low.plot(seeds, [y] * len(seeds), "k.", ms=3)
        top.set(title=domain)
        low.set(xlabel="HR@1 over conversations")
    axes[0, 0].set_ylabel("published")
    axes[1, 0].set_ylabel(tier)
    axes[0, 0].invert_yaxis()
    fig.tight_layout()
    return fig


def extended_figure(beyond: Mapping, metrics: Mapping):
    """Beyond the paper: HR@1 by the number of training examples, and with one [CLS] an image beside one a tile; means over
    seeds (dots: each seed) with 95 % intervals over dialogues."""
    frame = pd.DataFrame(beyond["rows"] + [row for row in metrics["rows"] if row["method"] == "LaViC"])
    means = summary_by_seed(frame.to_dict("records")).set_index(["method", "domain"])
    fig, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True)
    for colour, domain in zip(SHADES, DOMAINS, strict=False):
        part = frame[(frame["domain"] == domain) & (frame["method"] != "LaViC, one [CLS]")]
        sizes = part.groupby("method")["examples"].mean().sort_values()
        line = means.loc[[(m, domain) for m in sizes.index]]
        axes[0].errorbar(sizes, line["mean"], [line["mean"] - line["low"], line["high"] - line["mean"]], label=domain,
                         color=colour, marker="o", ms=4, capsize=2)
        axes[0].plot(part["examples"], part["hit_ratio_conversations"], ".", color=colour, ms=3)
    axes[0].set(xlabel="training examples", ylabel="HR@1 over conversations", xscale="log")
    axes[0].legend(fontsize=7)
    for shift, colour, method in ((-0.2, SHADES[3], "LaViC, one [CLS]"), (0.2, SHADES[0], "LaViC")):
        line, x = means.loc[[(method, d) for d in DOMAINS]], np.arange(len(DOMAINS)) + shift
        axes[1].bar(x, line["mean"], 0.38, yerr=[line["mean"] - line["low"], line["high"] - line["mean"]], color=colour,
                    label=method if "one" in method else "LaViC, one a tile")
    axes[1].set_xticks(range(len(DOMAINS)), list(DOMAINS))
    axes[1].legend(fontsize=7)
    fig.tight_layout()
    return fig


def case_figure(run: Run, dialogue: data.Dialogue, answers: Mapping[str, Mapping]):
    """A case: the ten candidate images and, for each method, the share of likelihood it gives every candidate."""
    names = dialogue.candidates_st
    fig, axes = plt.subplots(len(answers) + 1, len(names), figsize=(10.5, 1.5 + 0.75 * len(answers)),
                             height_ratios=[1.6, *[0.7] * len(answers)])
    gallery(run, names, [run.titles[a].replace(" ", "\n", 1) for a in names], dialogue.gt_items, axes[0])
    for row, (method, answer) in enumerate(answers.items(), start=1):
        for column, (axis, weight) in enumerate(zip(axes[row], answer["probabilities"], strict=True)):
            chosen = answer["recommended"] == names[column]
            axis.bar([0], [weight], color=SHADES[0] if chosen else INK["published"])
            axis.set(ylim=(0, 1.3), xlim=(-0.6, 0.6), xticks=[], yticks=[])
            axis.text(0, weight + 0.05, f"{weight:.2f}", ha="center", fontsize=6.5)
        label = method.removeprefix("LaViC ") + ("" if answer["recommended"] in names else "\n(invalid)")
        axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7.5)
    return fig
