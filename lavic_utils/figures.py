"""Figures of the notebooks, in one style (`style`), each saved with its evidence tier and provenance. Computes nothing."""

from __future__ import annotations

import textwrap
from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from lavic_utils import data, style
from lavic_utils.config import DOMAINS, figures_dir
from lavic_utils.evaluation import summary_by_seed
from lavic_utils.experiment import Experiment
from lavic_utils.provenance import save_figure
from lavic_utils.report import published, published_rows

style.use()


class Kept:
    """A saved figure as a notebook shows it: the picture, and its alternative text where pictures cannot be seen."""

    def __init__(self, png: bytes, alt: str) -> None:
        self.png, self.alt = png, alt

    def __repr__(self) -> str:
        return self.alt

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return {"image/png": b64encode(self.png).decode(), "text/plain": self.alt}


def keep(
    fig,
    name: str,
    run: Experiment,
    tier: str | None = None,
    seeds: Sequence[int] | None = None,
    alt: str = "",
) -> Kept:
    """Save a figure as figures/<name>.png with its tier, provenance (`seeds`: where it shows more than this run's) and
    alternative text (one sentence that says what is seen), and return it for display."""
    about = run.stamp() | ({"seeds": seeds} if seeds else {}) | {"alt": alt}
    save_figure(fig, figures_dir(run.profile) / f"{name}.png", tier or run.profile.tier, about)
    shown = BytesIO()
    fig.savefig(shown, format="png", dpi=110, bbox_inches="tight")
    plt.close(fig)
    return Kept(shown.getvalue(), alt)


def _short(title: str, width: int) -> str:
    """A title in at most three lines of `width` characters."""
    return "\n".join(textwrap.wrap(title, width)[:3])


def gallery(
    run: Experiment,
    asins: Sequence[str],
    labels: Sequence[str] = (),
    highlight: Sequence[str] = (),
    axes=None,
):
    """Item images in a row, the highlighted ones framed."""
    if axes is None:
        fig, axes = plt.subplots(1, len(asins), figsize=(1.15 * len(asins), 1.6))
    for i, (axis, asin) in enumerate(zip(np.atleast_1d(axes), asins, strict=True)):
        image = data.open_image(data.image_file(run.root, asin))
        axis.set(xticks=[], yticks=[])
        if image is None:
            axis.text(
                0.5, 0.5, "no image", ha="center", va="center", transform=axis.transAxes, fontsize=7
            )
        else:
            axis.imshow(image)
        for spine in axis.spines.values():
            spine.set(visible=asin in highlight, color=style.BLUE, linewidth=3)
        if labels:
            axis.set_xlabel(labels[i], fontsize=7)
    return np.atleast_1d(axes)[0].figure


def task_figure(run: Experiment, dialogue: data.Dialogue):
    """The task: a dialogue, ten candidates with id, title and picture; the ground truth framed."""
    names = dialogue.candidates_st
    fig, axes = plt.subplots(
        2, 6, figsize=(8.6, 4.4), width_ratios=[2.3, 1, 1, 1, 1, 1], gridspec_kw={"hspace": 0.5}
    )
    cells = [axes[r, c] for r in range(2) for c in range(1, 6)]
    for axis in cells:
        axis.set_anchor("S")  # pictures of all shapes stand on one line
    gallery(
        run, names, [f"{_short(run.titles[a], 16)}\n{a}" for a in names], dialogue.gt_items, cells
    )
    for axis in axes[:, 0]:
        axis.axis("off")
    text = "\n".join(textwrap.fill(f"{who}: {said}", 32) for who, said in dialogue.turns)
    axes[0, 0].text(-0.1, 1, text, va="top", fontsize=8.5, transform=axes[0, 0].transAxes)
    return fig


def token_budget(run: Experiment, tokens_full: int, tokens_cls: int):
    """Visual tokens of ten candidates against the context window: the paper's model (published) and this profile's."""
    facts, window = published()["token_facts"], run.profile.recommendation.max_length
    fig, axes = plt.subplots(1, 2, figsize=(8, 2))
    cases = [
        (
            "paper (published)",
            10 * facts["tokens_per_image"],
            10 * facts["cls_tokens_per_image"],
            facts["context_window_llava_v1.6"],
        ),
        (f"{run.profile.name} model (measured)", 10 * tokens_full, 10 * tokens_cls, window),
    ]
    for axis, (name, full, cls, limit) in zip(axes, cases, strict=True):
        axis.barh(
            ["[CLS] tokens", "entire tokens"], [cls, full], color=[style.VERMILLION, style.PURPLE]
        )
        for y, value in enumerate((cls, full)):
            axis.text(value, y, f" {value:,}", va="center")
        axis.axvline(limit, color="k", ls="--", lw=1)
        axis.set(
            title=name,
            xlabel=f"tokens for 10 candidates (window {limit:,}, dashed)",
            xscale="log",
            xlim=(10, full * 4),
        )
    fig.tight_layout()
    return fig


def framework_figure(shapes: Mapping[str, str]):
    """The two stages with this model's real tensor shapes (`shapes`: box name -> shape line)."""
    fig, axis = plt.subplots(figsize=(9.5, 3.6))
    axis.set(xlim=(0, 10), ylim=(-0.4, 4))
    axis.axis("off")
    train, frozen = "#f6d6d9", "#e6e9ed"
    boxes = [
        (0.1, 2.4, "image tiles", "#fff6df", "tiles"),
        (2.0, 2.4, "vision tower", train, "tower"),
        (3.9, 2.4, "[CLS] of each tile", "#fff6df", "cls"),
        (5.8, 2.4, "projector", train, "projector"),
        (7.9, 2.4, "language model\n(frozen): description", frozen, "describe"),
        (0.1, 0.5, "dialogue, titles, ids", "#fff6df", "prompt"),
        (3.9, 0.5, "stored [CLS] tokens\nof ten candidates", "#fff6df", "stored"),
        (7.9, 0.5, "language model\n(LoRA): one id", train, "recommend"),
    ]
    for x, y, name, colour, label in boxes:
        axis.add_patch(plt.Rectangle((x, y), 1.75, 1.0, facecolor=colour, edgecolor="0.4"))
        axis.text(x + 0.87, y + 0.62, name, ha="center", va="center", fontsize=8)
        axis.text(
            x + 0.87,
            y + 0.16,
            shapes.get(label, ""),
            ha="center",
            va="center",
            fontsize=6.5,
            color="0.3",
        )
    for x0, y0, x1, y1 in [
        (1.85, 2.9, 2, 2.9),
        (3.75, 2.9, 3.9, 2.9),
        (5.65, 2.9, 5.8, 2.9),
        (7.55, 2.9, 7.9, 2.9),
        (6.6, 2.4, 5.2, 1.5),
        (5.65, 1.0, 7.9, 1.0),
    ]:
        axis.annotate(
            "", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->", "color": "0.4"}, zorder=0
        )
    below = {
        "arrowstyle": "->",
        "color": "0.4",
        "connectionstyle": "arc3,rad=0.12",
    }  # past the stored tokens, not through them
    axis.annotate("", (8.4, 0.5), (1.3, 0.5), arrowprops=below, zorder=0)
    axis.text(0.1, 3.6, "Stage 1: visual knowledge self-distillation", weight="bold")
    axis.text(0.1, 1.7, "Stage 2: recommendation fine-tuning", weight="bold")
    axis.text(9.65, 3.6, "red: trained with LoRA; grey: frozen", ha="right", fontsize=7)
    return fig


def curves(history: Sequence[Mapping]):
    """Stage 1 by epoch: losses, validation perplexity and, where known, attribute accuracies."""
    frame = pd.DataFrame(history).set_index("epoch")
    seen = [c for c in frame if c.startswith("accuracy_")]
    parts = [
        ("cross-entropy", {"train_loss": "training", "valid_loss": "validation"}),
        ("validation perplexity", {"valid_perplexity": ""}),
        ("attribute accuracy", {c: c.removeprefix("accuracy_") for c in seen}),
    ][: 3 if seen else 2]
    fig, axes = plt.subplots(1, len(parts), figsize=(9.6, 2.6))
    for axis, (label, columns) in zip(axes, parts, strict=True):
        for colour, column in zip(style.SHADES, columns, strict=False):
            axis.plot(frame.index, frame[column], "o-", ms=4, color=colour)
        axis.set(xlabel="epoch", ylabel=label, xticks=frame.index)
        if label.startswith("attribute"):
            axis.set_ylim(0, 1.02)
        colours = dict(zip(columns.values(), style.SHADES, strict=False))
        style.end_labels(
            axis, colours, {n: frame[c].iloc[-1] for c, n in columns.items()}, frame.index[-1]
        )
    fig.tight_layout(w_pad=2.5)
    return fig


def loss_figure(logs: Mapping[str, Mapping[str, Sequence[Mapping]]], smooth: float = 3):
    """Stage 2 training loss (exponentially smoothed over `smooth` records) against the share of the epoch: {panel: {line: log}},
    a panel a domain and a line a method; lines of the panels' own names are domains."""
    fig, axes = plt.subplots(
        1, len(logs), figsize=(2.8 * len(logs) + 0.8, 2.4), sharey=True, squeeze=False
    )
    for axis, (panel, lines) in zip(axes[0], logs.items(), strict=True):
        last, colours = {}, {}
        for name, log in lines.items():
            frame = pd.DataFrame(log)
            loss, colours[name] = (
                frame.loss.ewm(smooth).mean(),
                style.DOMAINS.get(name) or style.method_colour(name),
            )
            axis.plot(
                frame.step / frame.step.max(), frame.loss, color=colours[name], alpha=0.25, lw=0.8
            )
            axis.plot(frame.step / frame.step.max(), loss, color=colours[name])
            last[name] = loss.iloc[-1]
        axis.set(title=panel, xlabel="share of the epoch")
        if axis is axes[0, -1]:
            style.end_labels(axis, colours, last, 1.0)
    axes[0, 0].set_ylabel("cross-entropy of the id")
    fig.tight_layout()
    return fig


def bars(metrics: Mapping, methods: Sequence[str], tier: str):
    """HR@1 by domain and method: the published figures above, the measured ones (95 % interval, seeds as dots) below.
    Two axes, never one: a mini figure is no paper figure."""
    paper = published_rows().set_index(["method", "domain"])["hr@1"]
    ours = summary_by_seed(metrics["rows"]).set_index(["method", "domain"])
    raw, colours = pd.DataFrame(metrics["rows"]), [style.method_colour(m) for m in methods]
    fig, axes = plt.subplots(2, 3, figsize=(9, 0.62 * len(methods) + 1.6), sharey=True)
    for column, domain in enumerate(DOMAINS):
        top, low = axes[0, column], axes[1, column]
        heights = [paper.get((m, domain), np.nan) for m in methods]
        top.barh(methods, heights, color=colours, alpha=0.55, hatch="///", edgecolor="white", lw=0)
        for y, (method, value) in enumerate(zip(methods, heights, strict=True)):
            top.text(
                0 if np.isnan(value) else value,
                y,
                " not reported" if np.isnan(value) else f" {value:.3f}",
                va="center",
                fontsize=7,
            )
            if (method, domain) in ours.index:
                row = ours.loc[(method, domain)]
                mean = row["mean"]
                low.barh(
                    method,
                    mean,
                    color=colours[y],
                    alpha=0.85,
                    xerr=[[mean - row["low"]], [row["high"] - mean]],
                    ecolor="0.25",
                )
                low.text(row["high"], y, f" {mean:.3f}", va="center", fontsize=7)
                seeds = raw.query("method == @method and domain == @domain")[
                    "hit_ratio_conversations"
                ]
                low.plot(seeds, [y] * len(seeds), "k.", ms=3)
        top.set(title=domain, xlim=(0, 1.25 * np.nanmax(heights)))
        low.set(xlabel="HR@1 over conversations", xlim=(0, 1))
    axes[0, 0].set_ylabel("published")
    axes[1, 0].set_ylabel(tier)
    axes[0, 0].invert_yaxis()
    fig.tight_layout()
    return fig


def extended_figure(beyond: Mapping, metrics: Mapping):
    """Beyond the paper: HR@1 by the number of training examples, and with one [CLS] an image beside one a tile; means over
    seeds (dots: each seed) with 95 % intervals over dialogues."""
    frame = pd.DataFrame(
        beyond["rows"] + [row for row in metrics["rows"] if row["method"] == "LaViC"]
    )
    means = summary_by_seed(frame.to_dict("records")).set_index(["method", "domain"])
    fig, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True)
    ends = {}
    for domain in DOMAINS:
        part = frame[(frame["domain"] == domain) & (frame["method"] != "LaViC, one [CLS]")]
        sizes = part.groupby("method")["examples"].mean().sort_values()
        line = means.loc[[(m, domain) for m in sizes.index]]
        axes[0].errorbar(
            sizes,
            line["mean"],
            [line["mean"] - line["low"], line["high"] - line["mean"]],
            color=style.DOMAINS[domain],
            marker="o",
            ms=4,
            capsize=2,
        )
        axes[0].plot(
            part["examples"],
            part["hit_ratio_conversations"],
            ".",
            color=style.DOMAINS[domain],
            ms=3,
        )
        ends[domain] = line["mean"].iloc[-1]
    axes[0].set(
        xlabel="training examples", ylabel="HR@1 over conversations", xscale="log", ylim=(0, 1)
    )
    axes[0].set_xticks(shown := [50, 100, 200, 500], shown)
    axes[0].minorticks_off()
    style.end_labels(axes[0], style.DOMAINS, ends, frame["examples"].max())
    for shift, method, alpha in ((-0.2, "LaViC, one [CLS]", 0.5), (0.2, "LaViC", 0.9)):
        line, x = means.loc[[(method, d) for d in DOMAINS]], np.arange(len(DOMAINS)) + shift
        axes[1].bar(
            x,
            line["mean"],
            0.38,
            yerr=[line["mean"] - line["low"], line["high"] - line["mean"]],
            ecolor="0.25",
            color=style.method_colour(method),
            alpha=alpha,
        )
        for at in x:
            axes[1].text(
                at,
                0.02,
                "one [CLS]\nan image" if "one" in method else "one a\ntile",
                ha="center",
                fontsize=7,
            )
    axes[1].set_xticks(range(len(DOMAINS)), list(DOMAINS))
    fig.tight_layout(w_pad=3)
    return fig


def case_figure(run: Experiment, dialogue: data.Dialogue, answers: Mapping[str, Mapping]):
    """A case: the ten candidate images and, for each method, the share of likelihood it gives every candidate."""
    names = dialogue.candidates_st
    fig, axes = plt.subplots(
        len(answers) + 1,
        len(names),
        figsize=(8.8, 2.2 + 0.75 * len(answers)),
        height_ratios=[2.3, *[0.7] * len(answers)],
        gridspec_kw={"hspace": 0.75},
    )
    for axis in axes[0]:
        axis.set_anchor("S")  # tall and wide pictures stand on one line, their titles below it
    gallery(run, names, [_short(run.titles[a], 11) for a in names], dialogue.gt_items, axes[0])
    for row, (method, answer) in enumerate(answers.items(), start=1):
        for column, (axis, weight) in enumerate(
            zip(axes[row], answer["probabilities"], strict=True)
        ):
            chosen = answer["recommended"] == names[column]
            axis.bar([0], [weight], color=style.method_colour(method) if chosen else style.PALE)
            axis.set(ylim=(0, 1.3), xlim=(-0.6, 0.6), xticks=[], yticks=[], facecolor="none")
            axis.text(0, weight + 0.05, f"{weight:.2f}", ha="center", fontsize=7.5)
        label = method.removeprefix("LaViC ") + (
            "" if answer["recommended"] in names else "\n(invalid)"
        )
        axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    return fig
