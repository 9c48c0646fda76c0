"""One look for every figure: a hue means a method, everywhere; domains, tiers and causes are greys
and browns, told apart by their places and labels.

Readable by the colour-blind (Okabe and Ito's palette), in print (lightness differs too) and on a
dark page (figures keep their own white ground).
"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib

VERMILLION, BLUE, GREEN = "#D55E00", "#0072B2", "#009E73"
ORANGE, SKY, PURPLE = "#E69F00", "#56B4E9", "#CC79A7"
GRAY, PALE, INK = "#7A828C", "#C4CAD1", "#22262B"
METHODS = {
    "LaViC": VERMILLION,
    "LaViC w/o images": BLUE,
    "LaViC w/o self-distillation": SKY,
    "LaViC before stage 2": "#8C510A",
    "Entire tokens (5x577)": PURPLE,
    "LLaVA-v1.6 (title)": GREEN,
    "LLaVA-v1.6 (title+image)": "#66C2A4",
    "BM25": ORANGE,
    "SBERT": "#3D348B",
}
CAUSES = ("#8A7F6A", "#C9BE9F")  # of misses, where neither methods nor domains are meant
DOMAINS = {"beauty": INK, "fashion": "#6E6E6E", "home": "#A3A3A3"}
TIERS = {"published": ("d", GRAY), "replication answers": ("o", INK)}  # marks, where two meet
GROUND = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # where a line passes behind words
matplotlib.rcParams.update(
    {
        "figure.dpi": 90,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "axes.titlesize": 9,
        "legend.fontsize": 9,
        "savefig.pad_inches": 0.02,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": "#555555",
        "legend.frameon": False,
    }
)


def method_colour(name: str) -> str:
    """The colour of a method; a variant ("LaViC, 64 examples") has its base method's; else gray."""
    return METHODS.get(name) or METHODS.get(name.split(",")[0], GRAY)


def interval(
    axis,
    y: float,
    low: float,
    value: float,
    high: float,
    colour: str,
    mark: str = "",
    at: float | None = None,
) -> None:
    """A dot with its interval from `low` to `high`, and its value beside it (or from `at` on)."""
    axis.plot([low, high], [y, y], color=colour, lw=2)
    axis.plot(value, y, "o", color=colour, ms=5, clip_on=False)
    said = f"{value:.3f}".replace("0.", ".") + mark
    note(axis, said, high if at is None else at, y, right=5, va="center", bbox=GROUND)


def note(axis, text: str, x: float, y: float, right: float = 0, up: float = 0, **look) -> None:
    """Write `text` beside a place in data units: so many points to the right of it and above."""
    axis.annotate(text, (x, y), xytext=(right, up), textcoords="offset points", **look)


def end_labels(axis, x: float, ends: Mapping[str, tuple[float, str]]) -> None:
    """Names at the ends of lines instead of a legend, kept apart vertically.

    `ends`: name -> (height of its line at `x`, colour), in data units.
    """
    low, high = axis.get_ylim()
    free = low  # the lowest height that is not taken yet
    for name, (height, colour) in sorted(ends.items(), key=lambda end: end[1][0]):
        y = max(height, free)
        look = {"color": colour, "va": "center", "annotation_clip": False}
        note(axis, name, x, y, right=6, **look)
        free = y + 0.09 * (high - low)
