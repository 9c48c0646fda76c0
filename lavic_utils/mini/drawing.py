"""Draws the products of the mini world: a body in colour and pattern, one part in an accent colour.

Geometry lives in a square of 100 x 100 units (y points down), mapped to the canvas with a small
random shift, scale and rotation. All chance comes from the `random.Random` given.
"""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw

from lavic_utils.mini.words import ATTRIBUTES, PARTS

Point = tuple[float, float]
Polygon = list[Point]
RGB = tuple[int, ...]

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
# Light colours take a darker pattern, the others a lighter one.
DARK_TINTS: dict[str, RGB] = {"yellow": (214, 160, 0), "pink": (204, 92, 142)}
BACKGROUNDS: tuple[RGB, ...] = ((226, 214, 194), (204, 212, 224))
OUTLINE: RGB = (44, 40, 42)
MARGIN = 0.93  # share of the canvas used
MAX_STRETCH = 1.5  # most that one axis is scaled against the other
PERIOD = 20.0  # of stripes and checks, in units: a fifth of the side


# ---- forms, as lists of points in units
def path(*numbers: float) -> Polygon:
    """Points from x, y, x, y, ..."""
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def box(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    return path(x0, y0, x1, y0, x1, y1, x0, y1)


def ellipse(x0: float, y0: float, x1: float, y1: float, start=0.0, end=360.0, steps=28) -> Polygon:
    """Points on the ellipse inside a box, `start` to `end` in degrees (0 right, 90 down)."""
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
    """A body inside a box: round, boxy, or tapered to `top` of its width."""
    if shape == "round":
        return ellipse(x0, y0, x1, y1)
    inset = (x1 - x0) * (1 - top) / 2 if shape == "tapered" else 0
    return path(x0 + inset, y0, x1 - inset, y0, x1, y1, x0, y1)


def sketch(kind: str, shape: str) -> tuple[list[Polygon], list[Polygon], list[Polygon]]:
    """(accent part behind the body, body, accent part in front of it) of a product."""
    # `one_of[shape]` below: what a kind draws for each of the three shapes
    match kind:
        case "perfume":
            return [box(43, 26, 57, 50)], [form(shape, 10, 36, 90, 98)], [box(30, 2, 70, 30)]
        case "lipstick":
            one_of = {
                "round": [(24, 62), *ellipse(24, 4, 76, 66, 180, 360), (76, 62)],
                "boxy": box(24, 10, 76, 62),
                "tapered": path(24, 62, 24, 48, 66, 3, 76, 3, 76, 62),
            }
            return [], [one_of[shape]], [box(16, 60, 84, 98)]
        case "jar":
            return [], [form(shape, 3, 32, 97, 96, 0.62)], [box(14, 14, 86, 38)]
        case "dispenser":
            pump = path(8, 3, 66, 3, 66, 21, 62, 21, 62, 42, 42, 42, 42, 21, 22, 21, 22, 30, 8, 30)
            return [pump], [form(shape, 20, 36, 84, 98, 0.36)], []
        case "handbag":
            return [ring(18, 2, 82, 96, 12, 180, 360)], [form(shape, 4, 42, 96, 97, 0.5)], []
        case "shoe":
            one_of = {
                "round": [(52, 46), *ellipse(48, 42, 98, 98, 270, 360)],
                "boxy": path(50, 42, 96, 42, 96, 82),
                "tapered": path(50, 52, 99, 80, 99, 82),
            }
            body = path(6, 82, 6, 20, 14, 14, 44, 20) + one_of[shape] + path(96, 82)
            return [], [body], [path(3, 78, 99, 78, 99, 91, 44, 91, 40, 97, 3, 97)]
        case "hat":
            one_of = {
                "round": [(18, 80), *ellipse(18, 8, 82, 110, 180, 360), (82, 80)],
                "boxy": box(18, 8, 82, 80),
                "tapered": path(18, 80, 46, 3, 54, 3, 82, 80),
            }
            inset = {"round": 1.5, "boxy": 0, "tapered": 9}[shape]
            band = path(18 + inset, 56, 82 - inset, 56, 82, 79, 18, 79)
            return [], [one_of[shape], ellipse(1, 74, 99, 96)], [band]
        case "dress":
            one_of = {
                "round": ellipse(6, 42, 94, 98),
                "boxy": box(24, 48, 76, 98),
                "tapered": path(30, 48, 70, 48, 94, 98, 6, 98),
            }
            bodice = path(26, 3, 36, 3, 40, 14, 60, 14, 64, 3, 74, 3, 72, 36, 28, 36)
            return [], [bodice, one_of[shape]], [box(24, 34, 76, 55)]
        case "mug":
            one_of = {
                "round": ellipse(2, 12, 76, 98),
                "boxy": box(4, 14, 70, 96),
                "tapered": form("tapered", 2, 14, 78, 96, 0.5),
            }
            left = {"round": 44, "boxy": 40, "tapered": 38}[shape]
            return [ring(left, 26, 99, 84, 15, -110, 110)], [one_of[shape]], []
        case "lamp":
            stand = path(43, 50, 57, 50, 57, 82, 82, 86, 82, 98, 18, 98, 18, 86, 43, 82)
            return [stand], [form(shape, 8, 2, 92, 60)], []
        case "cushion":
            trapezoid = path(30, 5, 70, 5, 3, 94, 97, 94)
            one_of = {  # trim, inside, corners that carry a tassel
                "round": (ellipse(3, 3, 97, 97), ellipse(14, 14, 86, 86), []),
                "boxy": (box(5, 5, 95, 95), box(16, 16, 84, 84), box(5, 5, 95, 95)),
                "tapered": (
                    form(shape, 2, 5, 98, 95, 0.4),
                    form(shape, 15, 16, 85, 85, 0.4),
                    trapezoid,
                ),
            }
            trim, inside, corners = one_of[shape]
            tassels = [ellipse(x - 6, y - 6, x + 6, y + 6, steps=10) for x, y in corners]
            return [*tassels, trim], [inside], []
        case "chair":
            legs = [box(14, 66, 28, 98), box(72, 66, 86, 98), box(28, 78, 72, 88)]
            posts = [box(28, 40, 36, 60), box(64, 40, 72, 60)]
            return legs + posts, [form(shape, 14, 2, 86, 50), box(8, 56, 92, 72)], []
    raise ValueError(f"no sketch of {kind!r}")


# Thin dark lines that help to recognise a kind; never an attribute.
DETAILS: dict[str, list[Polygon]] = {
    "perfume": [path(36, 8, 36, 24), path(64, 8, 64, 24)],
    "lipstick": [path(16, 72, 84, 72)],
    "jar": [path(x, 18, x, 34) for x in (26, 38, 50, 62, 74)],
    "dispenser": [path(40, 3, 66, 3)],
    "handbag": [box(44, 56, 56, 66) + path(44, 56)],
    "shoe": [path(34, 30, 46, 25), path(36, 38, 50, 33), path(39, 46, 52, 41)],
    "dress": [path(46, 38, 54, 51), path(54, 38, 46, 51)],
    "cushion": [ellipse(46, 46, 54, 54, steps=10)]
    + [path(50, 50, x, y) for x, y in ((38, 38), (62, 62), (38, 62), (62, 38))],
}


def pattern_polygons(pattern: str, rng: random.Random) -> list[Polygon]:
    """What lies over the main colour, beyond the square on all sides."""
    offset, vertical = rng.uniform(0, PERIOD / 2), rng.random() < 0.5
    if pattern == "striped":
        starts = [offset + PERIOD * i for i in range(-2, 7)]
        bars = [box(-20, y, 120, y + 0.45 * PERIOD) for y in starts]
        return [[(y, x) for x, y in bar] for bar in bars] if vertical else bars
    if pattern == "dotted":
        step, radius = 0.8 * PERIOD, 0.23 * PERIOD
        dots = []
        for i in range(-1, 7):
            for j in range(-1, 7):
                x, y = offset + step * (i + (j % 2) / 2), offset + step * j
                dots.append(ellipse(x - radius, y - radius, x + radius, y + radius, steps=9))
        return dots
    if pattern == "checked":
        cell, cells = 0.55 * PERIOD, []
        for i in range(-2, 11):
            for j in range(-2, 11):
                if (i + j) % 2:
                    x, y = offset + cell * i, offset + cell * j
                    cells.append(box(x, y, x + cell, y + cell))
        return cells
    return []  # plain


# ---- on the canvas
class Placement:
    """Maps units to pixels: scaled (one axis at most MAX_STRETCH of the other), turned, shifted."""

    def __init__(self, size: tuple[int, int], rng: random.Random) -> None:
        width, height = size
        side = MAX_STRETCH * min(width, height)
        zoom, angle = MARGIN * rng.uniform(0.92, 1.02) / 100, math.radians(rng.uniform(-6, 6))
        self.sx, self.sy = zoom * min(width, side), zoom * min(height, side)
        self.cx = width * (0.5 + rng.uniform(-0.03, 0.03))
        self.cy = height * (0.5 + rng.uniform(-0.03, 0.03))
        self.cos, self.sin = math.cos(angle), math.sin(angle)

    def __call__(self, points: Polygon) -> Polygon:
        pixels = []
        for x, y in points:
            along = self.cos * (x - 50) - self.sin * (y - 50)
            down = self.sin * (x - 50) + self.cos * (y - 50)
            pixels.append((self.cx + self.sx * along, self.cy + self.sy * down))
        return pixels


def _jitter(colour: RGB, rng: random.Random, amount: int) -> RGB:
    return tuple(min(255, max(0, value + rng.randint(-amount, amount))) for value in colour)


def _lighter(colour: RGB) -> RGB:
    return tuple(round(0.32 * value + 0.68 * 255) for value in colour)


def draw_product(facts: dict[str, str], size: tuple[int, int], rng: random.Random) -> Image.Image:
    """An RGB picture of an item with these facts (kind and looks); `size`: (width, height), pixels.
    ValueError for a word that `words` does not hold."""
    for name, known in {"kind": tuple(PARTS), **ATTRIBUTES}.items():
        if facts[name] not in known:
            raise ValueError(f"{name} {facts[name]!r} is not one of {', '.join(known)}")
    colour, accent = facts["colour"], facts["accent"]
    behind, body, front = sketch(facts["kind"], facts["shape"])
    place = Placement(size, rng)
    main_rgb, accent_rgb = _jitter(MAIN[colour], rng, 8), _jitter(ACCENT[accent], rng, 5)
    image = Image.new("RGB", size, _jitter(rng.choice(BACKGROUNDS), rng, 6))
    cloth, mask = Image.new("RGB", size, main_rgb), Image.new("L", size, 0)
    pen, cloth_pen, mask_pen = ImageDraw.Draw(image), ImageDraw.Draw(cloth), ImageDraw.Draw(mask)
    line = max(1, round(min(size) / 100))  # pixels
    for polygon in behind:
        pen.polygon(place(polygon), fill=accent_rgb, outline=OUTLINE, width=line)
    for polygon in pattern_polygons(facts["pattern"], rng):
        cloth_pen.polygon(place(polygon), fill=DARK_TINTS.get(colour, _lighter(main_rgb)))
    for polygon in body:
        mask_pen.polygon(place(polygon), fill=255)
    image.paste(cloth, mask=mask)
    for polygon in body:
        pen.polygon(place(polygon), outline=OUTLINE, width=line)
    for polygon in front:
        pen.polygon(place(polygon), fill=accent_rgb, outline=OUTLINE, width=line)
    for points in DETAILS.get(facts["kind"], []):
        pen.line(place(points), fill=OUTLINE, width=line)
    return image
