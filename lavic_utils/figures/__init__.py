"""Figures of the notebooks in one style: data in, figure out, saved with tier and provenance."""

from __future__ import annotations

import os
import textwrap
from base64 import b64encode
from collections.abc import Collection, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image

from lavic_utils import data, vision
from lavic_utils.config import DOMAINS, ROOT, Profile, UserError, results_dir
from lavic_utils.evaluation import wilson
from lavic_utils.figures import style
from lavic_utils.mini import world
from lavic_utils.provenance import save_figure
from lavic_utils.report import losses, published, published_rows, summary_by_seed

if TYPE_CHECKING:
    from lavic_utils.experiment import Experiment


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


def save(fig, name: str, profile: Profile, provenance: Mapping, alt: str, title: str = "") -> Kept:
    """Save a figure as figures/<name>.png, under a `title` that says what is seen, and return it.

    Its `provenance` (with the evidence tier as "tier") and its alternative text, one sentence for
    who does not see it, are stored in the file.
    """
    words = title.replace(" %", "\N{NO-BREAK SPACE}%")
    lines = textwrap.fill(words, round(12 * fig.get_figwidth()))  # bold letters of 10 points
    fig.text(0.005, 1.01, lines, va="bottom", fontsize=10, weight="bold")
    path = figures_dir(profile) / f"{name}.png"
    save_figure(fig, path, provenance["tier"], {**provenance, "alt": alt, "title": title})
    return shown(fig, alt)


def shown(fig, alt: str) -> Kept:
    """A figure for display alone."""
    png = BytesIO()
    fig.savefig(png, format="png", dpi=110, bbox_inches="tight")
    plt.close(fig)
    return Kept(png.getvalue(), alt)


def keep(
    fig, name: str, run: Experiment, tier="", seeds: Sequence[int] = (), alt="", title=""
) -> Kept:
    """`save` a figure of a run: with its tier, or `tier`, and its seed, or all `seeds` it shows."""
    about = run.stamp()
    about |= {"tier": tier or about["tier"]} | ({"seeds": seeds} if seeds else {})
    return save(fig, name, run.profile, about, alt, title)


def guide(run: Experiment) -> data.Dialogue:
    """The test dialogue that the notebooks follow: the first, from Fashion on, whose list holds a
    right item with a picture; on the mini world also of more than two turns, with more than three
    candidates whose titles fit the request and one whose looks fit too. UserError: there is none.
    """
    facts, first = run.facts["items"], None
    for domain in ("fashion", "beauty", "home"):
        for dialogue in run.dialogues(domain, "test"):
            names = getattr(dialogue, run.profile.candidates)
            if not any(_image(run, a) for a in names if a in dialogue.gt_items):
                continue
            first = first or dialogue
            if not facts:
                return dialogue
            wish = run.facts["dialogues"][f"{domain}/test"][dialogue.line - 1]
            words, looks = fitting(facts, wish, names)
            if len(dialogue.turns) > 2 and len(words) > 3 and len(looks) == 1:
                return dialogue
    if first is None:
        raise UserError(f"{run.root}: no test dialogue's list holds a right item with a picture")
    return first


def fitting(facts: Mapping, wish: Mapping, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Candidates of a mini dialogue whose titles fit its words, and those whose looks fit too."""
    words = [a for a in names if all(world.wishes_met(facts[a], wish, looks=False))]
    return words, [a for a in words if all(world.wishes_met(facts[a], wish))]


def _short(title: str, width: int) -> str:
    """A title in at most three lines of `width` characters."""
    return "\n".join(textwrap.wrap(title, width, break_long_words=False)[:3])


def _picture(axis, image: Image.Image | None, label: str, framed=False) -> None:
    """An item's picture over its label; a right answer is framed."""
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(label, parse_math=False)  # a title may hold dollar signs
    if image is None:
        axis.text(0.5, 0.5, "no image", ha="center", va="center", transform=axis.transAxes)
    else:
        axis.imshow(image)
    for spine in axis.spines.values():
        spine.set(visible=framed, color=style.INK, linewidth=2.5)


def _image(run: Experiment, asin: str) -> Image.Image | None:
    return data.open_image(data.image_file(run.root, asin))


def tile_pictures(processor, image: Image.Image) -> list[np.ndarray]:
    """The tiles of an image as the vision tower gets them, in true colours: (side, side, 3)."""
    tiles = vision.pixels(processor, [image])[0][0].permute(0, 2, 3, 1).numpy()
    about = processor.image_processor
    return list(np.clip(tiles * about.image_std + about.image_mean, 0, 1))


def gallery(pictures: Sequence, labels: Sequence[str], columns: int):
    """Pictures over their labels, so many in a row."""
    rows = -(-len(pictures) // columns)
    size = (6.5, rows * (6.5 / columns + 0.3))
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    fig.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.4 / size[1], hspace=0.3)
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, label in zip(axes.flat, pictures, labels, strict=False):
        axis.axis("on")
        _picture(axis, picture, label)
    return fig


def _under_dialogue(dialogue: data.Dialogue, inches: float, *grid: int, **how) -> tuple:
    """A figure with the dialogue's turns above a grid of axes of so many `inches`."""
    lines = [row for who, said in dialogue.turns for row in textwrap.wrap(f"{who}: {said}", 100)]
    top = 0.15 * len(lines) + 0.2
    height = inches + top
    how |= {"left": 0.01, "right": 0.99, "top": 1 - top / height}
    fig, axes = plt.subplots(*grid, figsize=(6.5, height), gridspec_kw=how)
    fig.text(0.005, 1 - 0.05 / height, "\n".join(lines), va="top", parse_math=False)
    return fig, axes


def task_figure(run: Experiment, dialogue: data.Dialogue):
    """The task: a dialogue, ten candidates with id, title and picture; the ground truth framed."""
    fig, axes = _under_dialogue(dialogue, 3.6, 2, 5, hspace=0.55, bottom=0.17)
    for axis, asin in zip(axes.flat, getattr(dialogue, run.profile.candidates), strict=True):
        axis.set_anchor("S")  # pictures of all shapes stand on one line
        label = f"{_short(run.titles[asin], 17)}\n{asin}"
        _picture(axis, _image(run, asin), label, asin in dialogue.gt_items)
    return fig


def case_figure(
    run: Experiment,
    dialogue: data.Dialogue,
    answers: Mapping[str, Mapping],
    before: Mapping[str, Mapping] | None = None,
    images: Mapping[str, Image.Image | None] | None = None,
    changed: Collection[str] = (),
):
    """A case: the request, the ten candidates' pictures, and each method's probability of every
    candidate, in the method's colour where it was the answer.

    `answers`: method -> a row of its answers (`recommended`, `probabilities`). A case that was
    changed also has the answers `before` (dotted), the `images` it shows and the `changed` items.
    """
    names = getattr(dialogue, run.profile.candidates)
    ratios = [0.6, 0.6, *[0.4] * len(answers)]  # pictures, their titles, a row for each method
    grid = {"hspace": 0.7, "wspace": 0.08, "bottom": 0.03, "height_ratios": ratios}
    inches = 1.5 + 0.85 * len(answers)
    fig, axes = _under_dialogue(dialogue, inches, len(ratios), len(names), **grid)
    for axis in axes[1]:
        axis.axis("off")
    titles = [_short(run.titles[asin], 15) for asin in names]
    down = 1 + max(title.count("\n") for title in titles)
    for i, (axis, asin) in enumerate(zip(axes[0], names, strict=True)):
        axis.set_anchor("S")  # tall and wide pictures stand on one line
        image = images[asin] if images else _image(run, asin)
        label = "\n" * down * (i % 2) + titles[i]  # every other title one storey lower
        _picture(axis, image, label, asin in dialogue.gt_items)
        if asin in changed:
            axis.set_title("changed")
    for row, (method, answer) in zip(axes[2:], answers.items(), strict=True):
        for i, (axis, weight) in enumerate(zip(row, answer["probabilities"], strict=True)):
            chosen = answer["recommended"] == names[i]
            axis.bar([0], [weight], color=style.method_colour(method) if chosen else style.PALE)
            axis.set(ylim=(0, 1.3), xlim=(-0.6, 0.6), xticks=[], yticks=[], facecolor="none")
            axis.spines["left"].set_visible(False)
            if chosen or weight >= 0.005:
                style.note(axis, f"{weight:.2f}", 0, weight, up=2, ha="center")
            if before:
                axis.axhline(before[method]["probabilities"][i], color=style.INK, lw=1, ls=":")
        said = "" if answer["recommended"] in names else ": its answer names no candidate"
        look = {"color": style.method_colour(method), "transform": row[0].transAxes}
        row[0].text(0, 1.2, method + said, **look)
    return fig


def published_figure(methods: Sequence[str]):
    """Published HR@1 by domain, with 95 % Wilson intervals over the test conversations; a cell that
    is empty in the paper says why."""
    cells = published_rows().set_index(["method", "domain"])["hr@1"]
    fig, axes = panels(methods)
    for axis, domain in zip(axes, DOMAINS, strict=True):
        n = published()["test_conversations"][domain]
        for y, method in enumerate(methods):
            if np.isnan(value := cells[method, domain]):
                axis.text(0.005, y, "out of memory", va="center", color=style.GRAY)
            else:
                low, high = wilson(round(value * n), n)
                style.interval(axis, y, low, value, high, style.method_colour(method))
        axis.set(title=f"{domain}, n = {n}", xlim=(-0.01, 0.52))
        axis.set_xticks([0, 0.2, 0.4], ["0", ".2", ".4"])
    axes[1].set_xlabel("HR@1 (lines: 95 %; n: test conversations)")
    fig.tight_layout(w_pad=0.5)
    return fig


def measured_figure(metrics: Mapping, methods: Sequence[str]):
    """HR@1 of a run by domain: the mean over seeds with its 95 % interval, each seed as a dot."""
    rows = pd.DataFrame(metrics["rows"]).set_index(["method", "domain"]).sort_index()
    means = summary_by_seed(metrics["rows"]).set_index(["method", "domain"])
    fig, axes = panels(methods)
    for axis, domain in zip(axes, DOMAINS, strict=True):
        for y, method in enumerate(methods):
            row, seeds = means.loc[(method, domain)], rows.loc[[(method, domain)]]
            if "refused" in seeds and (seeds["refused"] >= seeds["conversations"]).all():
                axis.text(0.02, y, "not asked", va="center", color=style.GRAY)
                continue
            colour = style.method_colour(method)
            mark = " †" if method in losses(metrics) else ""
            style.interval(axis, y, row["low"], row["mean"], row["high"], colour, mark)
            dots = seeds["hit_ratio_conversations"]
            axis.plot(dots, [y + 0.28] * len(dots), ".", color=style.INK, ms=4)
        n = int(rows.xs(domain, level="domain")["conversations"].max())
        axis.set(title=f"{domain}, n = {n}", xlim=(0, 1.1))
        axis.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
    dropped = "; †: pictures dropped" if set(methods) & set(losses(metrics)) else ""
    axes[1].set_xlabel(f"HR@1 over conversations (dots: seeds, n dialogues each{dropped})")
    fig.tight_layout(w_pad=0.5)
    return fig


def course_figure(course: pd.DataFrame):
    """HR@1 on validation from before stage 2 to its end, a line for each domain: solid by
    generating, dotted by scoring. `course`: columns domain, step, reading, HR@1."""
    fig, axis = plt.subplots(figsize=(6.5, 2.6))
    ends = {}
    for (domain, reading), part in course.sort_values("step").groupby(["domain", "reading"]):
        colour, free = style.DOMAINS[domain], reading == "recommended"
        axis.plot(part["step"], part["HR@1"], "o-" if free else ":", ms=4, color=colour)
        if free:
            ends[domain] = (part["HR@1"].iloc[-1], colour)
    axis.set(ylabel="HR@1 on validation", ylim=(0, 1))
    axis.set_xlabel("optimiser steps of stage 2 (solid: by generating; dotted: by scoring)")
    style.end_labels(axis, course["step"].max(), ends)
    fig.tight_layout()
    return fig


def panels(rows: Sequence[str]):
    """Three panels, a domain each, with these rows and the same axes."""
    size = (6.5, 0.3 * len(rows) + 0.9)
    fig, axes = plt.subplots(1, 3, figsize=size, sharex=True, sharey=True)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    axes[0].set_yticks(range(len(rows)), rows)
    for axis in axes:
        axis.tick_params(axis="y", length=0)
    return fig, axes
