"""Figures of the notebooks in one style: data in, figure out, saved with tier and provenance."""

from __future__ import annotations

import os
import textwrap
from base64 import b64encode
from collections.abc import Collection, Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image

from lavic_utils import data
from lavic_utils.config import DOMAINS, ROOT, Profile, results_dir
from lavic_utils.evaluation import summary_by_seed
from lavic_utils.figures import style
from lavic_utils.provenance import save_figure
from lavic_utils.report import losses, published_rows

if TYPE_CHECKING:
    from lavic_utils.experiment import Experiment

style.use()


def figures_dir(profile: Profile) -> Path:
    """`results/<profile>/figures/`; the committed `figures/` only while `notebooks execute` says so
    by LAVIC_COMMIT, so that a run of your own changes none of them."""
    committed = os.environ.get("LAVIC_COMMIT") == "1"
    return (ROOT if committed else results_dir(profile)) / "figures"


class Kept:
    """A saved figure as a notebook shows it: the picture, or its alternative text without one."""

    def __init__(self, png: bytes, alt: str) -> None:
        self.png, self.alt = png, alt

    def __repr__(self) -> str:
        return self.alt

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return {"image/png": b64encode(self.png).decode(), "text/plain": self.alt}


def save(fig, name: str, profile: Profile, provenance: Mapping, alt: str) -> Kept:
    """Save a figure as figures/<name>.png and return it for display.

    Its `provenance` (with the evidence tier as "tier") and its alternative text, one sentence that
    says what is seen, are stored in the file.
    """
    path = figures_dir(profile) / f"{name}.png"
    save_figure(fig, path, provenance["tier"], {**provenance, "alt": alt})
    return shown(fig, alt)


def shown(fig, alt: str) -> Kept:
    """A figure for display alone."""
    png = BytesIO()
    fig.savefig(png, format="png", dpi=110, bbox_inches="tight")
    plt.close(fig)
    return Kept(png.getvalue(), alt)


def keep(fig, name: str, run: Experiment, tier="", seeds: Sequence[int] = (), alt="") -> Kept:
    """`save` a figure of a run: with its tier, or `tier`, and its seed, or all `seeds` it shows."""
    about = run.stamp()
    about |= {"tier": tier or about["tier"]} | ({"seeds": seeds} if seeds else {})
    return save(fig, name, run.profile, about, alt)


def _short(title: str, width: int) -> str:
    """A title in at most three lines of `width` characters."""
    return "\n".join(textwrap.wrap(title, width)[:3])


def _picture(axis, image: Image.Image | None, label: str, framed: bool = False) -> None:
    """An item's picture over its label; a right answer is framed."""
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(label, fontsize=7)
    if image is None:
        look = {"ha": "center", "va": "center", "fontsize": 7, "transform": axis.transAxes}
        axis.text(0.5, 0.5, "no image", **look)
    else:
        axis.imshow(image)
    for spine in axis.spines.values():
        spine.set(visible=framed, color=style.BLUE, linewidth=3)


def _image(run: Experiment, asin: str) -> Image.Image | None:
    return data.open_image(data.image_file(run.root, asin))


def gallery(run: Experiment, asins: Sequence[str], labels: Sequence[str]):
    """Item images in a row, each over its label."""
    fig, axes = plt.subplots(1, len(asins), figsize=(1.15 * len(asins), 1.6))
    for axis, asin, label in zip(axes, asins, labels, strict=True):
        _picture(axis, _image(run, asin), label)
    return fig


def task_figure(run: Experiment, dialogue: data.Dialogue):
    """The task: a dialogue, ten candidates with id, title and picture; the ground truth framed."""
    grid = {"hspace": 0.5, "width_ratios": [2.3, 1, 1, 1, 1, 1]}
    fig, axes = plt.subplots(2, 6, figsize=(8.6, 4.4), gridspec_kw=grid)
    for axis, asin in zip(axes[:, 1:].flat, dialogue.candidates_st, strict=True):
        axis.set_anchor("S")  # pictures of all shapes stand on one line
        label = f"{_short(run.titles[asin], 16)}\n{asin}"
        _picture(axis, _image(run, asin), label, asin in dialogue.gt_items)
    for axis in axes[:, 0]:
        axis.axis("off")
    text = "\n".join(textwrap.fill(f"{who}: {said}", 32) for who, said in dialogue.turns)
    axes[0, 0].text(-0.1, 1, text, va="top", fontsize=8.5, transform=axes[0, 0].transAxes)
    return fig


def case_figure(
    run: Experiment,
    dialogue: data.Dialogue,
    answers: Mapping[str, Mapping],
    before: Mapping[str, Mapping] | None = None,
    images: Mapping[str, Image.Image | None] | None = None,
    changed: Collection[str] = (),
):
    """A case: the ten candidates' pictures and each method's probability of every candidate.

    `answers`: method -> a row of its answers (`recommended`, `probabilities`). A case that was
    changed also has the answers `before` (dotted), the `images` it shows and the `changed` items.
    """
    names = getattr(dialogue, run.profile.candidates)
    size, rows = (8.8, 2.2 + 0.75 * len(answers)), len(answers) + 1
    grid = {"hspace": 0.75, "height_ratios": [2.3, *[0.7] * len(answers)]}
    fig, axes = plt.subplots(rows, len(names), figsize=size, gridspec_kw=grid)
    for axis, asin in zip(axes[0], names, strict=True):
        axis.set_anchor("S")  # tall and wide pictures stand on one line, their titles below it
        image = images[asin] if images else _image(run, asin)
        _picture(axis, image, _short(run.titles[asin], 11), asin in dialogue.gt_items)
        if asin in changed:
            axis.set_title("changed", fontsize=7)
    for row, (method, answer) in zip(axes[1:], answers.items(), strict=True):
        for i, (axis, weight) in enumerate(zip(row, answer["probabilities"], strict=True)):
            chosen = answer["recommended"] == names[i]
            axis.bar([0], [weight], color=style.method_colour(method) if chosen else style.PALE)
            axis.set(ylim=(0, 1.3), xlim=(-0.6, 0.6), xticks=[], yticks=[], facecolor="none")
            axis.text(0, weight + 0.05, f"{weight:.2f}", ha="center", fontsize=7.5)
            if before:
                axis.axhline(before[method]["probabilities"][i], color=style.INK, lw=1, ls=":")
        label = method.removeprefix("LaViC ")
        label += "" if answer["recommended"] in names else "\n(invalid)"
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    return fig


def token_budget(models: Mapping[str, tuple[int, int, int]]):
    """Visual tokens of ten candidates against the context window, a panel a model.

    `models`: title -> (entire tokens of ten images, their [CLS] tokens, tokens of the window).
    """
    fig, axes = plt.subplots(1, len(models), figsize=(8, 2))
    for axis, (title, (entire, cls, window)) in zip(axes, models.items(), strict=True):
        colours = [style.VERMILLION, style.PURPLE]
        axis.barh(["[CLS] tokens", "entire tokens"], [cls, entire], color=colours)
        for y, value in enumerate((cls, entire)):
            axis.text(value, y, f" {value:,}", va="center")
        axis.axvline(window, color="k", ls="--", lw=1)
        label = f"tokens for 10 candidates (window {window:,}, dashed)"
        axis.set(title=title, xlabel=label, xscale="log", xlim=(10, entire * 4))
    fig.tight_layout()
    return fig


def framework_figure(shapes: Mapping[str, str]):
    """The two stages with this model's real tensor shapes (`shapes`: box name -> shape line)."""
    fig, axis = plt.subplots(figsize=(9.5, 3.6))
    axis.set(xlim=(0, 10), ylim=(-0.4, 4))
    axis.axis("off")
    given, train, frozen = "#fff6df", "#f6d6d9", "#e6e9ed"
    stage1 = [
        (0.1, given, "tiles", "image tiles"),
        (2.0, train, "tower", "vision tower"),
        (3.9, given, "cls", "[CLS] of each tile"),
        (5.8, train, "projector", "projector"),
        (7.9, frozen, "describe", "language model\n(frozen): description"),
    ]
    stage2 = [
        (0.1, given, "prompt", "dialogue, titles, ids"),
        (3.9, given, "stored", "stored [CLS] tokens\nof ten candidates"),
        (7.9, train, "recommend", "language model\n(LoRA): one id"),
    ]
    for y, boxes in ((2.4, stage1), (0.5, stage2)):
        for x, colour, name, words in boxes:
            axis.add_patch(plt.Rectangle((x, y), 1.75, 1.0, facecolor=colour, edgecolor="0.4"))
            look = {"ha": "center", "va": "center"}
            axis.text(x + 0.87, y + 0.62, words, fontsize=8, **look)
            axis.text(x + 0.87, y + 0.16, shapes.get(name, ""), fontsize=6.5, color="0.3", **look)
    straight = {"arrowstyle": "->", "color": "0.4"}
    for left, right in pairwise(stage1):
        axis.annotate("", (right[0], 2.9), (left[0] + 1.75, 2.9), arrowprops=straight, zorder=0)
    axis.annotate("", (5.2, 1.5), (6.6, 2.4), arrowprops=straight, zorder=0)
    axis.annotate("", (7.9, 1.0), (5.65, 1.0), arrowprops=straight, zorder=0)
    below = straight | {"connectionstyle": "arc3,rad=0.12"}  # not through the stored tokens
    axis.annotate("", (8.4, 0.5), (1.3, 0.5), arrowprops=below, zorder=0)
    axis.text(0.1, 3.6, "Stage 1: visual knowledge self-distillation", weight="bold")
    axis.text(0.1, 1.7, "Stage 2: recommendation fine-tuning", weight="bold")
    axis.text(9.65, 3.6, "red: trained with LoRA; grey: frozen", ha="right", fontsize=7)
    return fig


def curves(history: Sequence[Mapping]):
    """Stage 1 by epoch: losses, validation perplexity and, where known, attribute accuracies."""
    frame = pd.DataFrame(history).set_index("epoch")
    panels = {
        "cross-entropy": {"train_loss": "training", "valid_loss": "validation"},
        "validation perplexity": {"valid_perplexity": ""},
    }
    seen = {c: c.removeprefix("accuracy_") for c in frame if c.startswith("accuracy_")}
    if seen:
        panels["attribute accuracy"] = seen
    fig, axes = plt.subplots(1, len(panels), figsize=(9.6, 2.6))
    for axis, (label, columns) in zip(axes, panels.items(), strict=True):
        ends = {}
        for colour, (column, name) in zip(style.SHADES, columns.items(), strict=False):
            axis.plot(frame.index, frame[column], "o-", ms=4, color=colour)
            ends[name] = (frame[column].iloc[-1], colour)
        axis.set(xlabel="epoch", ylabel=label, xticks=frame.index)
        if columns is seen:
            axis.set_ylim(0, 1.02)
        style.end_labels(axis, frame.index[-1], ends)
    fig.tight_layout(w_pad=2.5)
    return fig


def loss_figure(logs: Mapping[str, Mapping[str, Sequence[Mapping]]]):
    """Stage 2 training loss, smoothed over the records, against the share of the epoch.

    `logs`: {panel: {line: log}}, a panel a domain and a line a method, or a line a domain.
    """
    width = 2.8 * len(logs) + 0.8
    fig, axes = plt.subplots(1, len(logs), figsize=(width, 2.4), sharey=True, squeeze=False)
    for axis, (panel, lines) in zip(axes[0], logs.items(), strict=True):
        ends = {}
        for name, log in lines.items():
            colour = style.DOMAINS.get(name) or style.method_colour(name)
            frame = pd.DataFrame(log)
            share, smooth = frame.step / frame.step.max(), frame.loss.ewm(3).mean()
            axis.plot(share, frame.loss, color=colour, alpha=0.25, lw=0.8)
            axis.plot(share, smooth, color=colour)
            ends[name] = (smooth.iloc[-1], colour)
        axis.set(title=panel, xlabel="share of the epoch")
    style.end_labels(axes[0, -1], 1.0, ends)
    axes[0, 0].set_ylabel("cross-entropy of the id")
    fig.tight_layout()
    return fig


def course_figure(course: pd.DataFrame):
    """HR@1 on validation from before stage 2 to its end, a line a domain: solid by generating,
    dotted by scoring. `course`: columns domain, step, reading, HR@1."""
    fig, axis = plt.subplots(figsize=(5.5, 2.8))
    ends = {}
    for (domain, reading), part in course.sort_values("step").groupby(["domain", "reading"]):
        colour, free = style.DOMAINS[domain], reading == "recommended"
        axis.plot(part["step"], part["HR@1"], "o-" if free else ":", ms=4, color=colour)
        if free:
            ends[domain] = (part["HR@1"].iloc[-1], colour)
    axis.set(xlabel="optimiser steps of stage 2", ylabel="HR@1 on validation", ylim=(0, 1))
    style.end_labels(axis, course["step"].max(), ends)
    fig.tight_layout()
    return fig


def spread(rows: pd.DataFrame) -> list[pd.Series]:
    """The arms of error bars: from `mean` down to `low`, and up to `high`."""
    return [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]


def bars(metrics: Mapping, methods: Sequence[str], tier: str):
    """HR@1 by domain and method: published above, measured (95 % interval, seeds as dots) below.

    Two axes, never one: a mini figure is no paper figure.
    """
    paper = published_rows().set_index(["method", "domain"])["hr@1"]
    ours = summary_by_seed(metrics["rows"]).set_index(["method", "domain"])
    one_seed = pd.DataFrame(metrics["rows"]).set_index(["method", "domain"]).sort_index()
    colours = [style.method_colour(method) for method in methods]
    fig, axes = plt.subplots(2, 3, figsize=(9, 0.62 * len(methods) + 1.6), sharey=True)
    for top, low, domain in zip(*axes, DOMAINS, strict=True):
        heights = [paper.get((method, domain), np.nan) for method in methods]
        top.barh(methods, heights, color=colours, alpha=0.55, hatch="///", edgecolor="white", lw=0)
        for y, (method, height, colour) in enumerate(zip(methods, heights, colours, strict=True)):
            text = " not reported" if np.isnan(height) else f" {height:.3f}"
            top.text(np.nan_to_num(height), y, text, va="center", fontsize=7)
            if (method, domain) not in ours.index:
                continue
            row = ours.loc[[(method, domain)]]
            mean = row["mean"].item()
            low.barh(method, mean, color=colour, alpha=0.85, xerr=spread(row), ecolor="0.25")
            text = f" {mean:.3f}" + (" †" if method in losses(metrics) else "")
            low.text(row["high"].item(), y, text, va="center", fontsize=7)
            seeds = one_seed.loc[[(method, domain)], "hit_ratio_conversations"]
            low.plot(seeds, [y] * len(seeds), "k.", ms=3)
        top.set(title=domain, xlim=(0, 1.25 * np.nanmax(heights)))
        low.set(xlabel="HR@1 over conversations", xlim=(0, 1))
    axes[0, 0].set_ylabel("published")
    axes[1, 0].set_ylabel(tier)
    axes[0, 0].invert_yaxis()
    fig.tight_layout()
    return fig
