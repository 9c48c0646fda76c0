"""`make gallery`: all plates on one sheet, docs/_build/gallery.png, each over its name and tier."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
WIDE, GAP, COLUMNS = 620, 40, 3


def sheet(files: list[Path]) -> Image.Image:
    """The figures, as wide as each other, in columns that are filled where there is most room."""
    font, columns, ends = ImageFont.load_default(16), [], [GAP] * COLUMNS
    for path in files:
        with Image.open(path) as image:
            tier = json.loads(image.text["Comment"])["tier"]
            small = image.convert("RGB").resize((WIDE, round(image.height * WIDE / image.width)))
        column = ends.index(min(ends))
        columns.append((column, ends[column], small, f"{path.relative_to(ROOT)} ({tier})"))
        ends[column] += small.height + 2 * GAP
    page = Image.new("RGB", (COLUMNS * (WIDE + GAP) + GAP, max(ends)), "#dddddd")
    for column, y, small, words in columns:
        x = GAP + column * (WIDE + GAP)
        page.paste(small, (x, y))
        ImageDraw.Draw(page).text((x, y + small.height + 6), words, "black", font)
    return page


if __name__ == "__main__":
    out = ROOT / "docs" / "_build" / "gallery.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    files = sorted((ROOT / "figures").rglob("*.png"))
    sheet(files).save(out)
    print(f"{len(files)} figures: {out.relative_to(ROOT)}")
