"""Draws the products of the mini world: a body in the main colour and pattern, and one part in the accent colour.

Geometry lives in a square of 100 x 100 units (y points down), mapped to the canvas with a small random shift, scale and
rotation. Everything random comes from the `random.Random` given, so that the same state draws the same pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw

from lavic_utils.mini.words import ATTRIBUTES, PARTS

Point = tuple[float, float]
Polygon = list[Point]
RGB = tuple[int, int, int]
Parts = tuple[
    list[Polygon], list[Polygon], list[Polygon]
]  # accent behind the body, body, accent in front

MAIN: dict[str, RGB] = {
    "red": (206, 24, 32),
    "orange": (246, 128, 14),
    "yellow": (250, 218, 40),
    "green": (30, 138, 58),
    "blue": (32, 78, 208),
    "purple": (116, 44, 164),
    "pink": (248, 150, 192),
    "brown": (112, 66, 34),
}
ACCENT: dict[str, RGB] = {
    "black": (22, 22, 26),
    "white": (253, 253, 253),
    "gray": (128, 130, 134),
    "turquoise": (40, 206, 204),
    "lime": (160, 236, 30),
    "magenta": (232, 16, 150),
}
DARK_TINTS = {
    "yellow": (214, 160, 0),
    "pink": (204, 92, 142),
}  # light colours take a darker pattern, others a lighter
BACKGROUNDS: tuple[RGB, ...] = ((226, 214, 194), (204, 212, 224))
OUTLINE: RGB = (44, 40, 42)
MARGIN, MAX_STRETCH = (
    0.93,
    1.5,
)  # share of the canvas used; most that one axis is scaled against the other
PERIOD = 20.0  # of stripes and checks, in units: a fifth of the side


def box(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def ellipse(
    x0: float, y0: float, x1: float, y1: float, start: float = 0, end: float = 360, steps: int = 28
) -> Polygon:
    """Points on the ellipse inside a box, from `start` to `end` degrees (0 is right, 90 is down)."""
    cx, cy, rx, ry = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
    angles = [math.radians(start + (end - start) * i / (steps - 1)) for i in range(steps)]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def ring(
    x0: float, y0: float, x1: float, y1: float, width: float, start: float, end: float
) -> Polygon:
    """A thick arc: the outer edge along the box, the inner edge `width` units further in."""
    inner = ellipse(x0 + width, y0 + width, x1 - width, y1 - width, end, start)
    return ellipse(x0, y0, x1, y1, start, end) + inner


def form(shape: str, x0: float, y0: float, x1: float, y1: float, top: float = 0.28) -> Polygon:
    """Round: an ellipse. Boxy: a rectangle. Tapered: a cone whose top is `top` of its foot."""
    if shape == "round":
        return ellipse(x0, y0, x1, y1)
    if shape == "boxy":
        return box(x0, y0, x1, y1)
    inset = (x1 - x0) * (1 - top) / 2
    return [(x0 + inset, y0), (x1 - inset, y0), (x1, y1), (x0, y1)]


def perfume(shape: str) -> Parts:
    return [box(43, 26, 57, 50)], [form(shape, 10, 36, 90, 98)], [form("boxy", 30, 2, 70, 30)]


def lipstick(shape: str) -> Parts:
    tips: dict[str, Polygon] = {
        "round": [(24, 62), *ellipse(24, 4, 76, 66, 180, 360), (76, 62)],
        "boxy": box(24, 10, 76, 62),
        "tapered": [(24, 62), (24, 48), (66, 3), (76, 3), (76, 62)],
    }
    return [], [tips[shape]], [box(16, 60, 84, 98)]


def jar(shape: str) -> Parts:
    return [], [form(shape, 3, 32, 97, 96, 0.62)], [box(14, 14, 86, 38)]


def dispenser(shape: str) -> Parts:
    pump = [
        (8, 3),
        (66, 3),
        (66, 21),
        (62, 21),
        (62, 42),
        (42, 42),
        (42, 21),
        (22, 21),
        (22, 30),
        (8, 30),
    ]
    return [pump], [form(shape, 20, 36, 84, 98, 0.36)], []


def handbag(shape: str) -> Parts:
    return [ring(18, 2, 82, 96, 12, 180, 360)], [form(shape, 4, 42, 96, 97, 0.5)], []


def shoe(shape: str) -> Parts:
    heel: Polygon = [(6, 82), (6, 20), (14, 14), (44, 20)]
    toes: dict[str, Polygon] = {
        "round": [(52, 46), *ellipse(48, 42, 98, 98, 270, 360)],
        "boxy": [(50, 42), (96, 42), (96, 82)],
        "tapered": [(50, 52), (99, 80), (99, 82)],
    }
    sole: Polygon = [(3, 78), (99, 78), (99, 91), (44, 91), (40, 97), (3, 97)]
    return [], [heel + toes[shape] + [(96, 82)]], [sole]


def hat(shape: str) -> Parts:
    crowns: dict[str, Polygon] = {
        "round": [(18, 80), *ellipse(18, 8, 82, 110, 180, 360), (82, 80)],
        "boxy": box(18, 8, 82, 80),
        "tapered": [(18, 80), (46, 3), (54, 3), (82, 80)],
    }
    inset = {"round": 1.5, "boxy": 0, "tapered": 9}[shape]
    band: Polygon = [(18 + inset, 56), (82 - inset, 56), (82, 79), (18, 79)]
    return [], [crowns[shape], ellipse(1, 74, 99, 96)], [band]


def dress(shape: str) -> Parts:
    top: Polygon = [(26, 3), (36, 3), (40, 14), (60, 14), (64, 3), (74, 3), (72, 36), (28, 36)]
    skirts: dict[str, Polygon] = {
        "round": ellipse(6, 42, 94, 98),
        "boxy": box(24, 48, 76, 98),
        "tapered": [(30, 48), (70, 48), (94, 98), (6, 98)],
    }
    return [], [top, skirts[shape]], [box(24, 34, 76, 55)]


def mug(shape: str) -> Parts:
    body = {
        "round": ellipse(2, 12, 76, 98),
        "boxy": box(4, 14, 70, 96),
        "tapered": form("tapered", 2, 14, 78, 96, 0.5),
    }
    left = {"round": 44, "boxy": 40, "tapered": 38}[shape]
    return [ring(left, 26, 99, 84, 15, -110, 110)], [body[shape]], []


def lamp(shape: str) -> Parts:
    stand: Polygon = [
        (43, 50),
        (57, 50),
        (57, 82),
        (82, 86),
        (82, 98),
        (18, 98),
        (18, 86),
        (43, 82),
    ]
    return [stand], [form(shape, 8, 2, 92, 60)], []


def cushion(shape: str) -> Parts:
    outer = {
        "round": ellipse(3, 3, 97, 97),
        "boxy": box(5, 5, 95, 95),
        "tapered": form("tapered", 2, 5, 98, 95, 0.4),
    }
    inner = {
        "round": ellipse(14, 14, 86, 86),
        "boxy": box(16, 16, 84, 84),
        "tapered": form("tapered", 15, 16, 85, 85, 0.4),
    }
    tassels = {
        "round": [],
        "boxy": [(5, 5), (95, 5), (5, 95), (95, 95)],
        "tapered": [(30, 5), (70, 5), (3, 94), (97, 94)],
    }
    knots = [ellipse(x - 6, y - 6, x + 6, y + 6, steps=10) for x, y in tassels[shape]]
    return [*knots, outer[shape]], [inner[shape]], []


def chair(shape: str) -> Parts:
    legs: list[Polygon] = [box(14, 66, 28, 98), box(72, 66, 86, 98), box(28, 78, 72, 88)]
    posts: list[Polygon] = [box(28, 40, 36, 60), box(64, 40, 72, 60)]
    return [*legs, *posts], [form(shape, 14, 2, 86, 50), box(8, 56, 92, 72)], []


SKETCHES: dict[str, Callable[[str], Parts]] = {
    sketch.__name__: sketch
    for sketch in (
        perfume,
        lipstick,
        jar,
        dispenser,
        handbag,
        shoe,
        hat,
        dress,
        mug,
        lamp,
        cushion,
        chair,
    )
}
# Thin dark lines that help to recognise a kind; never an attribute.
DETAILS: dict[str, list[Polygon]] = {
    "perfume": [[(36, 8), (36, 24)], [(64, 8), (64, 24)]],
    "lipstick": [[(16, 72), (84, 72)]],
    "jar": [[(x, 18), (x, 34)] for x in (26, 38, 50, 62, 74)],
    "dispenser": [[(40, 3), (66, 3)]],
    "handbag": [box(44, 56, 56, 66) + [(44, 56)]],
    "shoe": [[(34, 30), (46, 25)], [(36, 38), (50, 33)], [(39, 46), (52, 41)]],
    "dress": [[(46, 38), (54, 51)], [(54, 38), (46, 51)]],
    "cushion": [
        ellipse(46, 46, 54, 54, steps=10),
        [(50, 50), (38, 38)],
        [(50, 50), (62, 62)],
        [(50, 50), (38, 62)],
        [(50, 50), (62, 38)],
    ],
}


class Placement:
    """Maps units to pixels: scaled to the canvas (stretched at most MAX_STRETCH), turned and shifted a little."""

    def __init__(self, size: tuple[int, int], rng: random.Random) -> None:
        width, height = size
        side = MAX_STRETCH * min(width, height)
        zoom, angle = MARGIN * rng.uniform(0.92, 1.02) / 100, math.radians(rng.uniform(-6, 6))
        self.sx, self.sy = zoom * min(width, side), zoom * min(height, side)
        self.cx, self.cy = (
            width * (0.5 + rng.uniform(-0.03, 0.03)),
            height * (0.5 + rng.uniform(-0.03, 0.03)),
        )
        self.cos, self.sin = math.cos(angle), math.sin(angle)

    def __call__(self, points: Sequence[Point]) -> Polygon:
        cos, sin = self.cos, self.sin
        turned = (
            (cos * (x - 50) - sin * (y - 50), sin * (x - 50) + cos * (y - 50)) for x, y in points
        )
        return [(self.cx + self.sx * x, self.cy + self.sy * y) for x, y in turned]


def stripes(vertical: bool, offset: float) -> list[Polygon]:
    bars = [
        box(-20, at, 120, at + 0.45 * PERIOD) for at in (offset + PERIOD * i for i in range(-2, 7))
    ]
    return [[(y, x) for x, y in bar] for bar in bars] if vertical else bars


def dots(offset: float) -> list[Polygon]:
    step, radius = 0.8 * PERIOD, 0.23 * PERIOD
    centres = [
        (offset + step * (i + (j % 2) / 2), offset + step * j)
        for i in range(-1, 7)
        for j in range(-1, 7)
    ]
    return [ellipse(x - radius, y - radius, x + radius, y + radius, steps=9) for x, y in centres]


def checks(offset: float) -> list[Polygon]:
    cell, spots = 0.55 * PERIOD, range(-2, 11)
    corners = [(offset + cell * i, offset + cell * j) for i in spots for j in spots if (i + j) % 2]
    return [box(x, y, x + cell, y + cell) for x, y in corners]


def _pattern(pattern: str, rng: random.Random) -> list[Polygon]:
    offset, vertical = rng.uniform(0, PERIOD / 2), rng.random() < 0.5
    if pattern == "plain":
        return []
    return {
        "striped": lambda: stripes(vertical, offset),
        "dotted": lambda: dots(offset),
        "checked": lambda: checks(offset),
    }[pattern]()


def _jitter(colour: RGB, rng: random.Random, amount: int = 8) -> RGB:
    red, green, blue = (min(255, max(0, value + rng.randint(-amount, amount))) for value in colour)
    return red, green, blue


def _tint(name: str, colour: RGB) -> RGB:
    if name in DARK_TINTS:
        return DARK_TINTS[name]
    red, green, blue = (round(0.32 * value + 0.68 * 255) for value in colour)
    return red, green, blue


def draw_product(
    kind: str,
    shape: str,
    colour: str,
    pattern: str,
    accent: str,
    size: tuple[int, int],
    rng: random.Random,
) -> Image.Image:
    """An RGB picture of `size` = (width, height) pixels. ValueError for a word that is not in `wording`."""
    for name, value in (
        ("shape", shape),
        ("colour", colour),
        ("pattern", pattern),
        ("accent", accent),
    ):
        if value not in ATTRIBUTES[name]:
            raise ValueError(f"{name} {value!r} is not one of {', '.join(ATTRIBUTES[name])}")
    if kind not in PARTS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(PARTS)}")
    place = Placement(size, rng)
    main, accent_rgb = _jitter(MAIN[colour], rng), _jitter(ACCENT[accent], rng, 5)
    line = max(1, round(min(size) / 100))
    image = Image.new("RGB", size, _jitter(rng.choice(BACKGROUNDS), rng, 6))
    pen = ImageDraw.Draw(image)
    behind, body, front = ([place(polygon) for polygon in group] for group in SKETCHES[kind](shape))
    for polygon in behind:
        pen.polygon(polygon, fill=accent_rgb, outline=OUTLINE, width=line)
    filling, mask = Image.new("RGB", size, main), Image.new("L", size, 0)
    fill_pen, mask_pen = ImageDraw.Draw(filling), ImageDraw.Draw(mask)
    for polygon in _pattern(pattern, rng):
        fill_pen.polygon(place(polygon), fill=_tint(colour, main))
    for polygon in body:
        mask_pen.polygon(polygon, fill=255)
    image.paste(filling, mask=mask)
    for polygon in body:
        pen.polygon(polygon, outline=OUTLINE, width=line)
    for polygon in front:
        pen.polygon(polygon, fill=accent_rgb, outline=OUTLINE, width=line)
    for points in DETAILS.get(kind, []):
        pen.line(place(points), fill=OUTLINE, width=line)
    return image
