"""Figures of notebook 05: paired differences, negative controls, and what goes beyond the paper."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd

from lavic_utils import methods
from lavic_utils.config import DOMAINS
from lavic_utils.figures import panels, style


def forest_figure(differences: pd.DataFrame):
    """Paired differences with their 95 % intervals, a row for each comparison, by the other method.

    `differences`: columns domain, "LaViC minus", difference, low, high.
    """
    groups = differences.groupby("LaViC minus", sort=False)
    rows = len(differences) + len(groups)
    fig, axis = plt.subplots(figsize=(6.5, 0.24 * rows + 0.7))
    y, names = 0, {}
    for other, part in groups:
        colour, names[y] = style.method_colour(other), f"LaViC minus {other}"
        for row in part.to_dict("records"):
            y += 1
            names[y] = row["domain"]
            style.interval(axis, y, row["low"], row["difference"], row["high"], colour)
        y += 1
    axis.axvline(0, color=style.INK, lw=1)
    axis.set(ylim=(rows - 0.4, -0.6), xlabel="difference of HR@1 on the same dialogues")
    axis.set_yticks(list(names), names.values())
    axis.tick_params(axis="y", length=0)
    fig.tight_layout()
    return fig


def controls_figure(scores: pd.DataFrame, without: Mapping[str, float]):
    """HR@1 as trained and under negative controls, with 95 % intervals, one panel for each domain.

    `scores`: columns domain, control, HR@1, low, high, as trained first; `without`: domain -> HR@1
    of LaViC w/o images, a dashed line.
    """
    names = list(scores["control"].unique())
    fig, axes = panels(names)
    for axis, domain in zip(axes, DOMAINS, strict=True):
        rows = scores[scores["domain"] == domain].set_index("control").loc[names]
        for y, row in enumerate(rows.to_dict("records")):
            colour = style.GRAY if y else style.method_colour("LaViC")
            style.interval(axis, y, row["low"], row["HR@1"], row["high"], colour)
        colour, x = style.method_colour("LaViC w/o images"), without[domain]
        axis.axvline(x, color=colour, ls="--", lw=1, zorder=0)
        look = {"right": 4, "va": "center", "color": colour}
        style.note(axis, "w/o images", x, len(names) - 0.4, **look)
        axis.set(title=domain, xlim=(0, 1.1), ylim=(len(names) - 0.1, -0.6))
        axis.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
    axes[1].set_xlabel("HR@1 over conversations (lines: 95 %)")
    fig.tight_layout()
    return fig


def frontier_figure(means: pd.DataFrame):
    """HR@1 and the share of descriptions with all looks right, a row for each variant, fewest
    visual tokens at the bottom. `means`: of `mini.beyond`'s rows, by method, in that order."""
    measured = {"hit_ratio_conversations": "HR@1 over conversations", "accuracy": "all looks right"}
    fig, axes = plt.subplots(1, 2, figsize=(6.5, 2.7), sharey=True)
    for axis, (name, label) in zip(axes, measured.items(), strict=True):
        for y, (method, value) in enumerate(means[name].items()):
            said = "" if pd.isna(value) else f"{value:.3f}".replace("0.", ".")
            axis.plot(value, y, "o", color=style.method_colour(method), clip_on=False)
            style.note(axis, said, 0 if pd.isna(value) else value, y, right=6, va="center")
        axis.set(xlim=(0, 1.2), title=label)
        axis.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
    rows = zip(means.index, means["tokens"], strict=True)
    short = methods.RAW.replace("LaViC ", "")
    names = [f"{method.replace(methods.RAW, short)}: {count:.1f}" for method, count in rows]
    axes[0].set_yticks(range(len(names)), names)
    fig.tight_layout(w_pad=1.5)
    return fig


def lists_figure(rows: pd.DataFrame):
    """HR@1 by the candidates of a list, a line for each method: means over domains and seeds, with
    the pictures of a prompt that did not fit the window. `rows`: those of `mini.beyond`."""
    fig, axis = plt.subplots(figsize=(6.5, 2.6))
    ends = {}
    for method, part in rows.groupby("of"):
        means, colour = (
            part.groupby("candidates").mean(numeric_only=True),
            style.method_colour(method),
        )
        heights = means["hit_ratio_conversations"]
        axis.plot(part["candidates"], part["hit_ratio_conversations"], ".", ms=3, color=colour)
        axis.plot(heights.index, heights, "o-", ms=5, color=colour)
        ends[method] = (heights.iloc[-1], colour)
    names = []
    for count, lost in rows.groupby("candidates")["dropped_images"].max().items():
        names.append(f"{count:.0f}" + (f"\n({lost:.0f} do not fit)" if lost >= 0.5 else ""))
    axis.set(xlabel="candidates (and pictures that do not fit)", ylim=(0, 1))
    axis.set(ylabel="HR@1 over conversations")
    axis.set_xticks(sorted(rows["candidates"].unique()), names)
    style.end_labels(axis, rows["candidates"].max(), ends)
    fig.tight_layout()
    return fig
