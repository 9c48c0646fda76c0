"""Figures of notebook 05: paired differences, negative controls, and what goes beyond the paper."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from lavic_utils.config import DOMAINS
from lavic_utils.evaluation import summary_by_seed
from lavic_utils.figures import spread, style

GROUND = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # of words that a line would cross


def _interval(axis, y: float, row: Mapping, value: str, colour: str, size: float) -> None:
    """A dot with its interval from `low` to `high`."""
    axis.plot([row["low"], row["high"]], [y, y], color=colour, lw=2)
    axis.plot(row[value], y, "o", color=colour, ms=size)


def forest_figure(differences: pd.DataFrame):
    """Paired differences with their 95 % intervals, a row a comparison, in the other's colour.

    `differences`: columns domain, "LaViC less", difference, low, high.
    """
    groups = differences.groupby("LaViC less", sort=False)
    fig, axis = plt.subplots(figsize=(8, 0.27 * (len(differences) + len(groups)) + 0.7))
    y, ticks = 0, {}
    for other, rows in groups:
        colour = style.method_colour(other)
        look = {"color": colour, "weight": "bold", "fontsize": 8.5, "va": "center", "bbox": GROUND}
        axis.text(0, y, f" less {other}", transform=axis.get_yaxis_transform(), **look)
        for row in rows.to_dict("records"):
            y += 1
            _interval(axis, y, row, "difference", colour, 6)
            text = f"{row['difference']:+.2f}"
            style.note(axis, text, row["high"], y, right=5, va="center", fontsize=7.5)
            ticks[y] = row["domain"]
        y += 1
    axis.axvline(0, color=style.INK, lw=1)
    low, high = min(0.0, differences["low"].min()), max(0.0, differences["high"].max())
    width = high - low
    axis.set(ylim=(y - 0.4, -0.6), xlim=(low - 0.3 * width, high + 0.12 * width))
    axis.set_xlabel("HR@1 of LaViC less that of the other")
    axis.set_yticks(list(ticks), ticks.values())
    axis.tick_params(axis="y", length=0)
    fig.tight_layout()
    return fig


def controls_figure(scores: pd.DataFrame, references: Mapping[str, Mapping[str, float]]):
    """HR@1 as trained and under negative controls, with 95 % intervals, one panel a domain.

    `scores`: columns domain, control, HR@1, low, high, as trained first; `references`: name ->
    domain -> HR@1 of a dashed line.
    """
    names = list(scores["control"].unique())
    fig, axes = plt.subplots(1, len(DOMAINS), figsize=(9.5, 2.4), sharey=True, sharex=True)
    for axis, domain in zip(axes, DOMAINS, strict=True):
        rows = scores[scores["domain"] == domain].set_index("control").loc[names]
        for y, row in enumerate(rows.to_dict("records")):
            colour = style.GRAY if y else style.method_colour("LaViC")
            _interval(axis, y, row, "HR@1", colour, 7)
            style.note(axis, f"{row['HR@1']:.2f}", row["HR@1"], y, up=7, ha="center", fontsize=7.5)
        for name, values in references.items():
            look = {"color": style.method_colour(name), "fontsize": 7, "bbox": GROUND}
            axis.axvline(values[domain], color=look["color"], ls="--", lw=1)
            short = name.removeprefix("LaViC ")
            axis.text(values[domain], len(names) - 0.35, short, ha="center", **look)
        ylim = (len(names) - 0.3, -0.6)
        axis.set(title=domain, xlabel="HR@1 over conversations", xlim=(0, None), ylim=ylim)
        axis.set_yticks(range(len(names)), names)
        axis.tick_params(axis="y", length=0)
    fig.tight_layout()
    return fig


def extended_figure(beyond: Mapping, metrics: Mapping):
    """Beyond the paper: HR@1 by training examples, and with one [CLS] an image or one a tile.

    Means over seeds (dots: each seed) with 95 % intervals over dialogues.
    """
    rows = beyond["rows"] + [row for row in metrics["rows"] if row["method"] == "LaViC"]
    frame = pd.DataFrame(rows)
    means = summary_by_seed(rows).set_index(["method", "domain"])
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3), sharey=True)
    ends = {}
    for domain, colour in style.DOMAINS.items():
        part = frame[(frame["domain"] == domain) & (frame["method"] != "LaViC, one [CLS]")]
        sizes = part.groupby("method")["examples"].mean().sort_values()
        line = means.loc[[(method, domain) for method in sizes.index]]
        look = {"color": colour, "marker": "o", "ms": 4, "capsize": 2}
        left.errorbar(sizes, line["mean"], spread(line), **look)
        left.plot(part["examples"], part["hit_ratio_conversations"], ".", color=colour, ms=3)
        ends[domain] = (line["mean"].iloc[-1], colour)
    left.set(xlabel="training examples", ylabel="HR@1 over conversations", xscale="log")
    left.set_ylim(0, 1)
    left.set_xticks([50, 100, 200, 500], [50, 100, 200, 500])
    left.minorticks_off()
    style.end_labels(left, frame["examples"].max(), ends)
    for shift, method, alpha, words in (
        (-0.2, "LaViC, one [CLS]", 0.5, "one [CLS]\nan image"),
        (0.2, "LaViC", 0.9, "one a\ntile"),
    ):
        line = means.loc[[(method, domain) for domain in DOMAINS]]
        places = np.arange(len(DOMAINS)) + shift
        look = {"ecolor": "0.25", "color": style.method_colour(method), "alpha": alpha}
        right.bar(places, line["mean"], 0.38, yerr=spread(line), **look)
        for x in places:
            right.text(x, 0.02, words, ha="center", fontsize=7)
    right.set_xticks(range(len(DOMAINS)), list(DOMAINS))
    fig.tight_layout(w_pad=3)
    return fig
