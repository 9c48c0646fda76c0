"""Drawn plates: the legend of all figures, both stages with their teacher, what stage 2 reads, how
the data was made."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from lavic_utils.figures import style

GIVEN, TRAINED, FROZEN = "white", "#f6d6d9", "#e6e9ed"
TOKEN = style.METHODS["LaViC"]


class Sheet:
    """A page measured in inches, 6.5 wide, on which boxes, arrows and pictures are put."""

    def __init__(self, height: float) -> None:
        self.fig = plt.figure(figsize=(6.5, height))
        self.axis = self.fig.add_axes((0, 0, 1, 1))
        self.axis.set(xlim=(-0.02, 6.52), ylim=(-0.02, height))  # whole outlines
        self.axis.axis("off")

    def text(self, x: float, y: float, words: str, **look) -> None:
        self.axis.text(x, y, words, **{"va": "center", "parse_math": False, **look})

    def box(self, x: float, y: float, wide: float, high: float, words: str, ground: str) -> None:
        look = {"boxstyle": "round,pad=0,rounding_size=0.06", "ec": style.GRAY, "fc": ground}
        self.axis.add_patch(FancyBboxPatch((x, y), wide, high, **look))
        self.text(x + wide / 2, y + high / 2, words, ha="center")

    def arrow(self, start: Sequence[float], end: Sequence[float], **look) -> None:
        look = {"arrowstyle": "->", "color": style.GRAY, "lw": 1.2, **look}
        self.axis.annotate("", end, start, arrowprops=look)

    def picture(self, x: float, y: float, side: float, image: Image.Image | None) -> None:
        if image is not None:
            inset = self.axis.inset_axes((x, y, side, side), transform=self.axis.transData)
            inset.imshow(image)
            inset.axis("off")

    def tokens(self, x: float, y: float, count: int, side: float, across: int, colour: str) -> None:
        """`count` visual tokens as squares, row by row down from y."""
        for i in range(count):
            at = (x + i % across * side * 1.3, y - i // across * side * 1.3)
            self.axis.add_patch(plt.Rectangle(at, side, side, fc=colour, lw=0))


def legend_figure():
    """The legend of the whole project: what each colour and mark means, in every figure."""
    domains = {name: ("-", colour) for name, colour in style.DOMAINS.items()}
    columns = {
        "Hues: methods": {name: ("o", colour) for name, colour in style.METHODS.items()}
        | {"any other method": ("o", style.GRAY)},
        "Greys: domains on one axis": domains
        | {"solid: by generating": ("-", style.INK), "dotted: by scoring": (":", style.INK)}
        | {f"tier: {name}": look for name, look in style.TIERS.items()},
        "Marks": {
            "value, 95 % interval": ("o-", style.METHODS["LaViC"]),
            "one seed": (".", style.INK),
            "one [CLS] token": ("s", TOKEN),
            "trained with LoRA": ("s", TRAINED),
            "frozen": ("s", FROZEN),
        },
    }
    sheet = Sheet(2.3)
    for x, (heading, rows) in zip((0, 2.25, 4.75), columns.items(), strict=True):
        sheet.text(x, 2.15, heading, weight="bold")
        for i, (words, (mark, colour)) in enumerate(rows.items()):
            y = 1.9 - 0.2 * i
            across = [x, x + 0.1, x + 0.2]  # a line through all, a marker in the middle
            sheet.axis.plot(across, [y] * 3, mark, color=colour, lw=2, markevery=[1])
            sheet.text(x + 0.35, y, words)
    return sheet.fig


def framework_figure(
    image: Image.Image | None,
    ten: Sequence[Image.Image | None],
    tokens: tuple[int, int],
    says: str,
    answer: str,
):
    """Both stages. `image` is an item, `ten` the candidates' pictures, `tokens` an image's full
    and [CLS] tokens, `says` the teacher's description, `answer` the right id."""
    sheet, (full, cls) = Sheet(4.5), tokens
    sheet.text(0, 4.35, "Stage 1: the model teaches itself to read five vectors", weight="bold")
    sheet.picture(0, 2.8, 0.8, image)
    rows = (
        (3.45, "teacher", FROZEN, "tower and\nprojector", full, f"writes\n“{says}”"),
        (2.3, "student", TRAINED, "tower and\nprojector", cls, "learns to write the\nsame words"),
    )
    for y, who, ground, parts, count, words in rows:
        colour = style.METHODS["Entire tokens (5x577)"] if who == "teacher" else TOKEN
        sheet.arrow((0.8, 3.2), (1.05, y + 0.3))
        sheet.box(1.05, y, 0.95, 0.6, parts, ground)
        sheet.text(1.05, y + 0.7, who, color=colour)
        sheet.arrow((2.0, y + 0.3), (2.3, y + 0.3))
        many = who == "teacher"
        sheet.tokens(2.4, y + 0.5, 60 if many else cls, 0.05 if many else 0.09, 10, colour)
        name = "tokens" if many else "[CLS]"
        sheet.text(2.35, y - 0.02 if many else y + 0.28, f"{count:,} {name}")
        sheet.arrow((3.2, y + 0.3), (3.5, y + 0.3))
        sheet.box(3.5, y, 1.0, 0.6, "language\nmodel", FROZEN)
        sheet.arrow((4.5, y + 0.3), (4.75, y + 0.3))
        sheet.text(4.8, y + 0.3, textwrap.fill(words, 26) if many else words)
    sheet.arrow((5.4, 3.3), (5.4, 2.85), color=TOKEN)
    sheet.text(5.5, 3.06, "cross-entropy", color=TOKEN)
    sheet.arrow((4.8, 2.22), (1.5, 2.28), color=TOKEN, ls="--", connectionstyle="arc3,rad=-0.08")
    sheet.text(3.1, 1.95, "gradient", color=TOKEN, ha="center")
    sheet.text(0, 1.62, "Stage 2: it learns to choose with them", weight="bold")
    sheet.box(0, 0.55, 1.2, 0.75, "dialogue", GIVEN)
    for i, one in enumerate(ten):
        sheet.picture(1.4 + i % 5 * 0.36, 0.95 - i // 5 * 0.42, 0.34, one)
    sheet.text(1.4, 0.38, f"10 × {{id, title, {cls} stored [CLS]}}")
    sheet.arrow((1.2, 0.93), (1.38, 0.93))
    sheet.arrow((3.22, 0.93), (3.5, 0.93))
    sheet.box(3.5, 0.6, 1.0, 0.65, "language\nmodel", TRAINED)
    sheet.arrow((4.5, 0.93), (4.75, 0.93))
    sheet.text(4.8, 0.93, f"writes one id:\n{answer}")
    for x, ground, words in ((0, TRAINED, "trained with LoRA"), (1.6, FROZEN, "frozen")):
        sheet.box(x, 0.04, 0.2, 0.14, "", ground)
        sheet.text(x + 0.26, 0.11, words)
    return sheet.fig


def stage2_figure(
    turns: Sequence[str],
    items: Sequence[tuple[Image.Image | None, str, int, str]],
    target: Sequence[str],
):
    """What stage 2 reads and is graded on. `turns` are the dialogue's lines, `items` the ten
    candidates (picture, title, number of [CLS] tokens, id), `target` the tokens of the right id."""
    lines = [line for turn in turns for line in textwrap.wrap(turn, 50)]
    height = 0.21 * (len(lines) + len(items)) + 1.05
    sheet, y = Sheet(height), height - 0.12
    sheet.text(0, y, "The model reads", weight="bold")
    sheet.text(4.0, y, "and is graded on", weight="bold")
    for line in lines:
        y -= 0.21
        sheet.text(0, y, line)
    y -= 0.08
    for image, title, count, asin in items:
        y -= 0.21
        sheet.picture(0, y - 0.1, 0.2, image)
        sheet.text(0.27, y, title)
        sheet.tokens(2.3, y - 0.035, count, 0.08, 5, TOKEN)
        sheet.text(2.9, y, asin)
    y -= 0.3
    sheet.text(0, y, "Left of the line every token has the label −100: read, never graded.")
    sheet.axis.plot([3.85, 3.85], [y + 0.2, height], color=style.GRAY, lw=1)
    middle = y + 0.55 * (height - y)
    layers = (("embeddings, head", FROZEN), ("every linear layer:\nW frozen + LoRA", TRAINED))
    for i, (words, ground) in enumerate(layers):
        sheet.box(4.0, middle - 0.45 + 0.5 * i, 1.35, 0.45, words, ground)
    sheet.arrow((5.35, middle + 0.05), (5.6, middle + 0.05))
    for i, token in enumerate(target):
        sheet.text(5.67, middle + 0.4 - 0.22 * i, token, weight="bold")
    sheet.tokens(0, y - 0.3, 1, 0.08, 1, TOKEN)
    sheet.text(
        0.14, y - 0.26, "one [CLS] token, made in stage 1 and stored: all that is left of a tile"
    )
    return sheet.fig


def dataset_figure(conversations: Mapping[str, int]):
    """How Reddit-Amazon was made, from threads to rows; `conversations`: domain -> how many."""
    sheet = Sheet(3.1)
    sheet.box(0, 2.3, 1.75, 0.75, "Reddit thread:\npost and comments", GIVEN)
    sheet.box(0, 1.25, 1.75, 0.75, "Amazon catalogue:\nid, title, images", GIVEN)
    sheet.box(2.3, 2.68, 1.75, 0.38, "turns before it", GIVEN)
    sheet.box(2.3, 2.1, 1.75, 0.48, "a comment that names\na product", GIVEN)
    sheet.box(2.3, 1.5, 1.75, 0.42, "product ids", GIVEN)
    sheet.box(2.3, 0.9, 1.75, 0.48, "search by title,\ntwo text encoders", GIVEN)
    sheet.arrow((1.75, 2.75), (2.3, 2.87))
    sheet.arrow((1.75, 2.6), (2.3, 2.34))
    sheet.arrow((3.17, 2.1), (3.17, 1.92))
    sheet.arrow((1.75, 1.7), (2.3, 1.7))
    sheet.text(3.25, 2.01, "matched", color=style.GRAY)
    sheet.arrow((1.75, 1.5), (2.3, 1.2))
    sheet.text(4.65, 2.98, "one row of the data", weight="bold")
    fields = (("context", 2.78), ("gt", 2.34), ("gt_items", 1.7), ("candidates_st", 1.24))
    for name, y in (*fields, ("candidates_gpt_large", 1.0)):
        sheet.arrow((4.05, y + 0.02 if y > 1.1 else 1.1), (4.6, y))
        sheet.text(4.65, y, name, family="monospace")
    total, x = sum(conversations.values()), 0.0
    sheet.text(0, 0.62, "Conversations by domain, each split 8 : 1 : 1 into train, valid and test")
    for domain, count in conversations.items():
        wide = 6.5 * count / total
        sheet.box(x, 0.05, wide - 0.05, 0.4, f"{domain}: {count:,}", FROZEN)
        x += wide
    return sheet.fig
