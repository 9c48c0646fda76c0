"""Figures of notebook 05: paired differences, negative controls, and what goes beyond the paper."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd

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


def frontier_figure(rows: pd.DataFrame):
    """HR@1 and the share of descriptions with all looks right, by visual tokens for each image.

    `rows`: those of `mini.beyond`; means over domains and seeds, small dots the single ones.
    """
    measured = {"hit_ratio_conversations": "HR@1 over conversations", "accuracy": "looks described"}
    fig, axes = plt.subplots(1, 2, figsize=(6.5, 2.8))
    for axis, (value, label) in zip(axes, measured.items(), strict=True):
        shown = rows[rows["tokens"].notna() & rows[value].notna()]
        for method, part in shown.groupby("method"):
            colour, x, y = style.method_colour(method), part["tokens"].mean(), part[value].mean()
            axis.plot(part["tokens"], part[value], ".", ms=3, alpha=0.4, color=colour)
            axis.plot(x, y, "o", ms=6, color=colour)
            name = method.removeprefix("LaViC").strip(", ") or "LaViC"
            style.note(axis, name, x, y, right=6, va="center")
        axis.set(xlabel="visual tokens per image", ylabel=label, ylim=(0, 1.02))
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(right=8 * shown["tokens"].max())
    fig.tight_layout(w_pad=1)
    return fig


def lists_figure(rows: pd.DataFrame):
    """HR@1 by the candidates of a list, a line for each method: means over domains and seeds, with
    the pictures of a prompt that did not fit the window. `rows`: those of `mini.beyond`."""
    fig, axis = plt.subplots(figsize=(6.5, 2.6))
    ends = {}
    for method, part in rows.groupby("of"):
        means = part.groupby("candidates")[["hit_ratio_conversations", "dropped_images"]].mean()
        heights, colour = means["hit_ratio_conversations"], style.method_colour(method)
        axis.plot(part["candidates"], part["hit_ratio_conversations"], ".", ms=3, color=colour)
        axis.plot(heights.index, heights, "o-", ms=5, color=colour)
        for count, row in means.iterrows():
            if row["dropped_images"] >= 0.05:
                text = f"{row['dropped_images']:.1f} pictures dropped"
                style.note(axis, text, count, row.iloc[0], up=7, ha="center")
        ends[method] = (heights.iloc[-1], colour)
    axis.set(xlabel="candidates", ylabel="HR@1 over conversations", ylim=(0, 1))
    axis.set_xticks(sorted(rows["candidates"].dropna().unique()))
    style.end_labels(axis, rows["candidates"].max(), ends)
    fig.tight_layout()
    return fig
