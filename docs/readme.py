"""`make readme`: the generated blocks of README.md and CONTRIBUTING.md: figures, claims, maps.

Written from the files under results/ and the modules' first sentences alone, and checked.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

from lavic_utils.config import ROOT, UserError
from lavic_utils.provenance import footer, write_text


def results() -> str:
    """The paper's tables and, apart from them, those of the committed metrics file."""
    from lavic_utils.report import NOT_RUN, comparison, footnote, published

    metrics = json.loads((ROOT / "results" / "mini" / "metrics.json").read_text(encoding="utf-8"))
    tier, names = metrics["provenance"]["tier"], ("open_source", "proprietary", "ablation")
    frames = {name.replace("_", " "): comparison(metrics, name) for name in names}
    lines = ["**Published**: HR@1 / VR on Reddit-Amazon, as the paper prints them.\n"]
    for name, frame in frames.items():
        paper = frame.xs("published", axis=1, level=1)
        if name == "open source":
            paper.loc["*Improvement*"] = published()["improvement_over_best_open_source"]
        lines += [f"*{name}*\n", markdown(["method", *paper], paper.reset_index().values)]
    lines.append(
        "*a.o.m.*: the paper ran out of memory. For LLaVA-v1.5 with images it prints no hit and no "
        "valid answer. Retrieval has no VR.\n"
    )
    about = f"{footer(metrics['provenance'])}. HR@1 over conversations, mean over seeds (worlds) "
    about += "[95 % interval over target items] / VR / HR@1 by likelihood. Other worlds than the "
    about += "paper's: compare orders, never numbers."
    lines.append(f"**Measured here** with the mini model, not with LLaVA-v1.6-7B. *{about}*\n")
    for name in ("open source", "ablation"):
        ours = frames[name].xs(tier, axis=1, level=1)
        absent = ", ".join(ours.index[ours["beauty"] == NOT_RUN])
        ours = ours[ours["beauty"] != NOT_RUN].reset_index()
        ours.iloc[:, 0] = ours.iloc[:, 0].str.replace("LLaVA-v1.6", "mini model, untuned")
        lines += [f"*{name}*\n", markdown(["method", *ours.columns[1:]], ours.values)]
        if absent:
            lines.append(f"Not run here, for want of their checkpoints: {absent}.\n")
    return "\n".join([*lines, footnote(metrics)]) + "\n"


def markdown(heads: list[str], rows) -> str:
    """A Markdown table; `0.1187 / 0.970` holds no-break spaces, so that a phone keeps it whole."""
    cells = [heads, ["---"] * len(heads), *rows]
    text = "".join(f"| {' | '.join(row)} |\n" for row in cells)
    return re.sub(r"(?<=\d) / (?=\d)", "\N{NO-BREAK SPACE}/\N{NO-BREAK SPACE}", text)


def claims() -> str:
    """What the audit finds, in a few lines."""
    from lavic_utils.audit.claims import read_claims, summary

    how = "[notebook 07](notebooks/07_audit.ipynb)"
    where = f"- Every cell and comparison: [results/claims.md](results/claims.md); how: {how}.\n"
    return "\n".join([*summary(read_claims()), where])


def speed() -> str:
    """What `make bench` and `bench gpu` measured, for each machine whose file is committed."""
    found = sorted((ROOT / "results" / "bench").glob("*.json"))
    cards = [path for path in found if path.stem.endswith("-gpu")]
    ours = [path for path in found if not path.stem.endswith(("-gpu", "-rehearsal"))]
    blocks = [speed_block(path) for path in ours] or ["not measured yet\n"]
    return "\n".join(blocks + [gpu_block(path) for path in cards])


def speed_block(path: Path) -> str:
    """A file that `bench` wrote."""
    from lavic_utils.bench.speed import ALT, PARTS

    found = json.loads(Path(path).read_text(encoding="utf-8"))
    about, figures = found["provenance"], found["figures"]
    lines = ["| | released loop | ours | times (range) | goal |", "| --- | --- | --- | --- | --- |"]
    for part, (label, unit, _) in PARTS.items():
        speeds, ratio = figures[part]["a_second"], figures[part]["ratio"]
        sides = f"{speeds['direct']['median']:.3g} | {speeds['ours']['median']:.3g}"
        times = "{median:.3g} ({low:.3g} to {high:.3g})".format(**ratio)
        lines.append(f"| {label}, {unit} | {sides} | {times} | {figures[part]['goal']} |")
    store, machine, versions = figures["store"], about["machine"], about["versions"]
    busy = ""
    if found := figures.get("busy_machine"):
        took = "{median:.3g} times the seconds ({low:.3g} to {high:.3g})".format(**found["ratio"])
        busy = f"Beside a busy process stage 2 training takes {took}; goal: {found['goal']}.\n"
    plate = path.with_suffix(".png")
    shown = f"\n![{ALT}](results/bench/{plate.name})\n" if plate.is_file() else ""
    where = about["card"] or f"{machine['processor']}, {machine['cores']} cores"
    return "\n".join(lines) + (
        f"\n{shown}\nEncoding an item's image once: "
        f"{store['items_a_second']['median']:.3g} items a second; with that counted in, "
        f"stage 2 training is "
        f"{store['train']['ratio_with_encoding']:.3g} times and evaluation "
        f"{store['test']['ratio_with_encoding']:.3g} times as fast.\n{busy}"
        f"Medians of {about['rounds']} interleaved runs (encoding: one run) with equal losses and "
        f"answers on both sides.\n*{about['tier']}, profile {about['profile']}, {where}; "
        f"torch {versions['torch']}, transformers {versions['transformers']}; "
        f"content hash of the code {about['code_hash'][:7]}.*\n"
    )


def gpu_block(path: Path) -> str:
    """A file that `bench gpu` wrote."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    about = found["provenance"]
    lines = ["| step or batch | rows x tokens | seconds (range) | peak, GiB | foreseen |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for row in found["steps"]:
        took = "out of memory"
        if row["seconds"]:
            took = "{median:.3g} ({low:.3g} to {high:.3g})".format(**row["seconds"])
        peak = "–" if row["measured_gib"] is None else f"{row['measured_gib']:.1f}"
        size = f"{row['rows']} x {row['tokens']}"
        lines.append(f"| {row['name']} | {size} | {took} | {peak} | {row['predicted_gib']:.1f} |")
    return "\n".join(lines) + (
        f"\n\n*Random weights: speed and memory only. Profile {about['profile']}, "
        f"{found['card'] or 'no card'}; 4 bits: {found['four_bits']}; "
        f"torch {about['versions']['torch']}; content hash of the code {about['code_hash'][:7]}.*\n"
    )


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line and without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"(?<=\.)\s|\n\n", text + "\n\n")[0]
    return " ".join(sentence.split()).removesuffix(".")


def parts(root: Path) -> dict[str, list[Path]]:
    """The package as it is read: part -> its modules. The core ("") comes first, in the order of
    the import contract in pyproject.toml, then each room."""
    tools = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    layers = tools["importlinter"]["contracts"][0]["layers"]
    package, found = root / "lavic_utils", {"": []}
    for name in re.findall(r"\w+", " ".join(reversed(layers))):
        if (package / f"{name}.py").is_file():
            found[""].append(package / f"{name}.py")
        elif (package / name).is_dir():
            found[name] = sorted((package / name).glob("[!_]*.py"))
    return found


def rooms() -> str:
    """README's map: a row for the core and for each room."""
    rows = []
    for name, modules in parts(ROOT).items():
        about = first_sentence(ROOT / "lavic_utils" / name / "__init__.py")
        names = ", ".join(f"`{path.stem}`" for path in modules if path.stem != "__main__")
        rows.append((f"`{name}/`" if name else "the core", about, names))
    return markdown(["where", "what", "modules"], rows)


def modules() -> str:
    """CONTRIBUTING's map, and the site's API page: a row for each module."""
    text = ""
    for name, paths in parts(ROOT).items():
        about = first_sentence(ROOT / "lavic_utils" / name / "__init__.py")
        rows = []
        for path in paths:
            place = path.relative_to(ROOT).as_posix()
            rows.append((f"[`{path.stem}`]({place})", first_sentence(path)))
        heading = f"**`{name}/`**: {about}." if name else "**The core**, in the order to read it."
        text += f"{heading}\n\n{markdown(['module', 'what'], rows)}\n"
    return text


def twins() -> str:
    """Where each figure and table of the paper has its twin."""
    from lavic_utils.figures.paper_map import HEADS, paper_map

    rows = []
    for what, notebook, cell, file, tier in paper_map():
        shown = f"[{file.removeprefix('figures/')}]({file})" if file else "a table"
        rows.append((what, f"[{notebook}](notebooks/{notebook}.ipynb)", cell, shown, tier))
    return markdown(list(HEADS), rows)


BLOCKS: dict[str, tuple[Callable[[], str], ...]] = {
    "README.md": (results, claims, speed, twins, rooms),
    "CONTRIBUTING.md": (modules,),
}


def update_readme(check: bool = False) -> list[str]:
    """Rewrite (or, with `check`, only compare) the generated blocks. Returns what is stale."""
    stale = []
    for page, blocks in BLOCKS.items():
        text = fresh = (ROOT / page).read_text(encoding="utf-8")
        for make in blocks:
            begin, end = f"<!-- {make.__name__}: begin -->\n", f"<!-- {make.__name__}: end -->"
            head, found, rest = fresh.partition(begin)
            if not found or end not in rest:
                raise UserError(f"{page}: no lines {begin.strip()} and {end}; put them back")
            fresh = head + begin + make() + end + rest.partition(end)[2]
        if fresh != text and check:
            stale.append(f"{page}: its generated blocks are stale; run `make readme`")
        elif fresh != text:
            write_text(ROOT / page, fresh)
    return stale


if __name__ == "__main__":
    sys.exit("\n".join(update_readme("--check" in sys.argv[1:])) or 0)
