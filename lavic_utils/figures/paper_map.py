"""Where each figure and table of the paper has its twin here: notebook, cell, file, tier."""

from __future__ import annotations

import json

from lavic_utils.config import ROOT, UserError
from lavic_utils.report import published

HEADS = ("in the paper", "notebook", "cell", "file", "tier")


def paper_map() -> list[tuple[str, ...]]:
    """A row of HEADS for each of the `exhibits` in published.json; cells are counted from 0.
    UserError where no cell of the notebook, or more than one, shows it."""
    rows = []
    for one in published()["exhibits"]:
        path = next((ROOT / "notebooks").glob(f"{one['notebook']}_*.ipynb"))
        mark = one.get("cell") or f'"{one["figure"]}",'
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) * ("outputs" in cell) for cell in cells]
        found = [i for i, source in enumerate(code) if mark in source]
        if len(found) != 1:
            raise UserError(f"{path.name}: {len(found)} cells hold {mark}; one is expected")
        file = f"figures/{one['figure']}.png" if "figure" in one else ""
        rows.append((one["what"], path.stem, str(found[0]), file, one["tier"]))
    return rows
