"""One look for every figure: the same colour for the same method, tier or domain everywhere, readable by the colour-blind
(Okabe and Ito's palette), in print (lightness differs too) and on a dark page (figures keep their own white ground)."""

from __future__ import annotations

import matplotlib
from cycler import cycler

VERMILLION, BLUE, GREEN, ORANGE, SKY, PURPLE = (
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#E69F00",
    "#56B4E9",
    "#CC79A7",
)
GRAY, PALE, INK = "#7A828C", "#C4CAD1", "#22262B"
SHADES = (
    VERMILLION,
    BLUE,
    GREEN,
    ORANGE,
    SKY,
    PURPLE,
)  # where the lines are neither methods nor domains
METHODS = {
    "LaViC": VERMILLION,
    "LaViC w/o images": BLUE,
    "LaViC w/o self-distillation": SKY,
    "Entire tokens (5x577)": PURPLE,
    "LLaVA-v1.6 (title)": GREEN,
    "LLaVA-v1.6 (title+image)": "#66C2A4",
    "BM25": PALE,
    "SBERT": GRAY,
}
DOMAINS = {"beauty": PURPLE, "fashion": ORANGE, "home": GREEN}
TIERS = {
    "published": GRAY,
    "mini run": VERMILLION,
    "replication answers": GREEN,
    "reported by others": ORANGE,
    "full run": BLUE,
}


def method_colour(name: str) -> str:
    """The colour of a method; a variant ("LaViC, 64 examples") has its base method's, an unknown one is gray."""
    return METHODS.get(name) or METHODS.get(name.split(",")[0], GRAY)


def use() -> None:
    """Set matplotlib's defaults: no frame on top and right, readable type, white ground."""
    matplotlib.rcParams.update(
        {
            "figure.dpi": 90,
            "savefig.facecolor": "white",
            "figure.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 9,
            "axes.prop_cycle": cycler(color=SHADES),
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": "#555555",
            "legend.frameon": False,
        }
    )


def end_labels(axis, texts: dict[str, str], values: dict[str, float], x: float) -> None:
    """Names written at the ends of lines in their own colours instead of a legend, kept apart vertically.

    `texts`: name -> colour; `values`: name -> height of its line at `x` (data units).
    """
    low, high = axis.get_ylim()
    gap, last = 0.09 * (high - low), None
    for name in sorted(texts, key=values.__getitem__):
        y = values[name] if last is None else max(values[name], last + gap)
        axis.annotate(
            name,
            (x, y),
            xytext=(6, 0),
            textcoords="offset points",
            color=texts[name],
            va="center",
            fontsize=8,
            annotation_clip=False,
        )
        last = y
