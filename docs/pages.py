"""The generated pages: gallery, claims ledger, list of modules, slides. Text in, text out."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

from PIL import Image

# So that an alternative text stays text within Markdown.
ESCAPES = str.maketrans({c: f"\\{c}" for c in "[]*_`$<>\\"})


def api(root: Path) -> str:
    """The page that leads to each module's own: CONTRIBUTING's map, as `readme` wrote it.

    Its links are as in CONTRIBUTING.md, to files of the package.
    """
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = text.partition("<!-- modules: begin -->\n")[2].partition("<!-- modules: end -->")[0]
    head = "# API by module\n\nFrom the docstrings. A notebook shows each stage at work.\n\n"
    return head + block


def modules(root: Path) -> list[str]:
    """The package's modules as that page names them, e.g. `vision` and `mini.world`, in its
    order."""
    found = re.findall(r"\]\(lavic_utils/([\w/]+)\.py\)", api(root))
    return [name.replace("/", ".") for name in found if name != "__main__"]


def cell_target(number: int) -> str:
    """The anchor above code cell `number` (its index in the notebook, markdown cells counted)."""
    return f"code-{number}"


def kept(source: str) -> set[str]:
    """The words that a cell hands to a function called keep, as they stand."""
    try:
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    except SyntaxError:  # a cell with a magic command
        return set()
    found: set[str] = set()
    for call in calls:
        if getattr(call.func, "attr", getattr(call.func, "id", "")) == "keep":
            found |= {arg.value for arg in call.args if isinstance(arg, ast.Constant)}
    return found


def maker(name: str, notebooks: Mapping[str, Mapping[str, Any]]) -> tuple[str, int, str] | None:
    """Which cell keeps the figure figures/<name>.png: (notebook, cell index, the section heading
    above it), or None.

    The cell names it in quotes, in full or without its folder; where a cell composes names
    (`f"{name}_dialogue"`), the longest quoted word that the name starts with counts. A cell that
    hands the word to a `keep` goes before others."""
    best: tuple[tuple[int, bool], tuple[str, int, str]] | None = None
    for notebook, book in notebooks.items():
        section = ""
        for number, cell in enumerate(book["cells"]):
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                section = (re.findall(r"^##+ (.+)$", source, re.M) or [section])[-1]
                continue
            names = kept(source)
            for word in re.findall(r'"([\w/]+)"', source):
                if name == word or name.endswith(f"/{word}") or name.startswith(f"{word}_"):
                    rank = len(word), word in names
                    if best is None or rank > best[0]:
                        best = rank, (notebook, number, section)
    return best[1] if best else None


def about(path: Path) -> dict[str, Any]:
    """What `provenance.save_figure` stored in the file; empty where it stored nothing."""
    with Image.open(path) as image:
        return json.loads(image.info.get("Comment", "{}"))


def _entry(path: Path, name: str, known: Mapping[str, Any], alt: str, origin: str) -> str:
    """One figure of the gallery: heading, picture, caption and where it comes from.

    With its size written down, it has its place before it is loaded."""
    with Image.open(path) as image:
        width, height = image.size
    seeds = known.get("seeds") or [known.get("seed")]
    versions = ", ".join(f"{k} {v}" for k, v in known.get("versions", {}).items() if v)
    seed = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    rows = {
        "Tier": f'<span class="tier">{escape(str(known.get("tier", "unknown")))}</span>',
        "Cell": origin,
        "Data": f"profile {known.get('profile')}, {seed}, "
        f"data <code>{known.get('data_hash')}</code>",
        "Code": f"content hash <code>{known.get('code_hash')}</code>; {escape(versions)}",
        "Made": str(known.get("time", ""))[:10],
    }
    facts = "".join(f"<dt>{term}</dt><dd>{value}</dd>" for term, value in rows.items())
    title = re.sub(r"^figures/|\.png$", "", name).replace("_", " ")
    return (
        f'### {title}\n\n<figure class="kept"><a href="../{name}"><img src="../{name}" '
        f'alt="{escape(alt, quote=True)}" width="{width}" height="{height}" loading="lazy"></a>'
        f"<figcaption>{escape(alt)}<dl>{facts}</dl></figcaption></figure>\n"
    )


def gallery(root: Path, figures: Mapping[str, Path], problems: list[str]) -> str:
    """Every figure with its tier, the cell that makes it, the data and code it came from, and its
    alternative text."""
    books, titles = {}, {}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        books[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        first = "".join(books[path.stem]["cells"][0]["source"])
        titles[path.stem] = first.splitlines()[0].lstrip("# ")
    groups: dict[str, list[str]] = {n: [] for n in titles}
    for name, path in figures.items():
        known = about(path)
        alt = known.get("alt", "")
        found = maker(name.removeprefix("figures/").removesuffix(".png"), books)
        if found is None:
            problems.append(f"{name}: no notebook cell names it")
            continue
        notebook, number, section = found
        if not alt:
            problems.append(f"{name}: no alternative text stored ({notebook}: alt=...)")
        below = f", below “{escape(section.replace('`', ''))}”" if section else ""
        place = f"../notebooks/{notebook}.html#{cell_target(number)}"
        origin = f'<a href="{place}">notebook {notebook[:2]}{below}</a>'
        groups[notebook].append(_entry(path, name, known, alt, origin))
    words = "Each figure with the evidence tier that its numbers have, the notebook cell that "
    words += "draws it, and the data and code it came from, as stored in the file itself. "
    parts = ["# Figure gallery", "", f"{words}A click opens it.", ""]
    for key, made in groups.items():
        parts += [f"## {titles[key]}", "", *made] if made else []
    return "\n".join(parts)


def table(
    label: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str | tuple[str, str]]],
    filters: Sequence[str] = (),
) -> str:
    """An HTML table that book.js makes sortable and, by the columns in `filters`, filterable. A
    cell is HTML, or (HTML, the key it sorts by)."""

    def cell(value: str | tuple[str, str]) -> str:
        if isinstance(value, str):
            return f"<td>{value}</td>"
        return f'<td data-key="{escape(value[1], quote=True)}">{value[0]}</td>'

    head = ""
    for name in heads:
        head += f'<th scope="col"{" data-filter" if name in filters else ""}>{escape(name)}</th>'
    body = "\n".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    return (
        f'<div class="ledger" role="region" aria-label="{escape(label, quote=True)}" tabindex="0">'
        '<table class="sortable">'
        f"<caption>{escape(label)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table></div>\n"
    )


def number(value: float | None, digits: int = 4) -> tuple[str, str]:
    """A figure as shown and sorted; nothing sorts last."""
    return ("–", "") if value is None else (f"{value:.{digits}f}", str(value))


def _claim(row: Mapping[str, Any]) -> list[str | tuple[str, str]]:
    counts = "<br>".join(
        f"{k}/{escape(name)}" for name, k in (row["counts"] or {}).items()
    ) or escape(row["reading"] or "–")
    ours = "<br>".join(
        f'<span class="tier">{escape(o["tier"])}</span> {o["value"]:.4f} '
        f"[{o['low']:.3f},&nbsp;{o['high']:.3f}], n&nbsp;{o['n']}"
        for o in row["ours"]
    )
    interval = "–" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
    return [
        escape(row["method"]),
        row["domain"],
        {"hr@1": "HR@1", "vr": "VR"}[row["metric"]],
        number(row["published"]),
        (interval, "" if row["low"] is None else str(row["low"])),
        counts,
        number(row["ceiling"]),
        (ours or "–", str(row["ours"][0]["value"]) if row["ours"] else ""),
        (f"{escape(row['status'])}<small>{escape(row['reason'])}</small>", row["status"]),
    ]


def _difference(row: Mapping[str, Any]) -> list[str | tuple[str, str]]:
    least, greatest = row["p paired, least"], row["p paired, greatest"]
    return [
        escape(row["against"]),
        row["domain"],
        number(row["difference"]),
        (f"{row['low']:+.3f} to {row['high']:+.3f}", str(row["low"])),
        (f"{least:.2g}", str(least)),
        (f"{greatest:.2g}", str(greatest)),
        escape(row["verdict"]),
    ]


def claims(found: Mapping[str, Any]) -> str:
    """The claims ledger: results/claims.json as sortable, filterable tables."""
    sizes = "\n".join(
        f"- {d}: {s['conversations']} conversations, {s['pairs']} ground-truth items, "
        f"{s['distinct']} distinct"
        for d, s in found["splits"].items()
    )
    cells = table(
        "Every published cell",
        (
            "method",
            "domain",
            "metric",
            "published",
            "95 % by test size",
            "counts that print it",
            "ceiling",
            "ours",
            "status",
        ),
        map(_claim, found["rows"]),
        ("method", "domain", "metric", "status"),
    )
    pairs = table(
        "LaViC's lead over each method, judged by test size alone",
        (
            "against",
            "domain",
            "difference",
            "95 %",
            "p, least paired",
            "p, greatest paired",
            "verdict",
        ),
        map(_difference, found["comparisons"]),
        ("against", "domain", "verdict"),
    )
    return f"""---
html_theme.sidebar_secondary.remove: true
---
# Claims ledger

Every figure of the paper's tables, and what stands for or against it. A click on a column's name
sorts by it; the fields above a table filter it. How each column is computed:
[notebook 07](../notebooks/07_audit.ipynb).

## How to read it

Test splits:

{sizes}

- **published**: printed in the paper; nothing here measured it.
- **95 % by test size**: the interval that a test of this many conversations allows around the
  published figure.
- **counts that print it**: the numbers of hits that, divided by conversations, by ground-truth
  items with repeats (pairs) or by distinct ones, round to the published figure. *Row mean*: no
  count prints it, a mean over conversations can. *None*: that cannot either.
- **ceiling**: HR@1 over items of somebody who always names the best candidate of the list.
- **ours**: what this project scored, with its evidence tier. Replication answers and mini runs
  measure other settings than the paper's.

## The cells

{cells}
## The differences

{pairs}"""


LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\([^()\s]+\)")


ROWS, LINES, WIDTH = 12, 20, 90  # of a table and of printed text, that a slide holds


class Section(NamedTuple):
    """What slides show of a notebook's section, "" and [] where there is none: what to predict, the
    folded answer, tables (HTML), pictures (base64 PNG, alternative text), printed text."""

    title: str
    question: str
    answer: str
    tables: list[str]
    pictures: list[tuple[str, str]]
    printed: str


def sections(book: Mapping[str, Any]) -> list[Section]:
    """A notebook's sections in their order, without solutions."""
    found: list[tuple[str, list[Any]]] = []
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for part in re.split(r"^(?=#+ )", source, flags=re.M):
                if part.startswith("#"):
                    found.append((part.splitlines()[0].lstrip("# "), []))
                if found:
                    found[-1][1].append(part)
        elif found and "solution" not in cell["metadata"].get("tags", []):
            found[-1][1].extend(cell["outputs"])
    return [_section(title, parts) for title, parts in found]


def _section(title: str, parts: Sequence[Any]) -> Section:
    text = "".join(part for part in parts if isinstance(part, str))
    made = Section(title, "", "", [], [], "")
    for output in (part for part in parts if not isinstance(part, str)):
        data = {kind: "".join(said) for kind, said in output.get("data", {}).items()}
        table = data.get("text/html", "")
        if "image/png" in data:
            made.pictures.append((data["image/png"], " ".join(data["text/plain"].split())))
        elif "<table" in table and table.count("<tr") <= ROWS:
            made.tables.append(table)
        elif output["output_type"] == "stream":
            made = made._replace(printed=made.printed + "".join(output["text"]))
    question = re.search(r"^\*\*Predict:\*\*.*?(?=\n\n|\Z)", text, re.M | re.S)
    answer = re.search(r"<summary>Answer[^<]*</summary>(.*?)</details>", text, re.S)
    asked, told = question[0] if question else "", answer[1].strip() if answer else ""
    return made._replace(question=LINK.sub(r"\1", asked), answer=LINK.sub(r"\1", told))


def _slides(one: Section, keep: Callable[[str], str]) -> list[str]:
    """A section's slides. Printed text stands where there is neither table nor picture."""
    shown = [text for text in (one.question, one.answer) if text]
    shown += [f"````{{raw}} html\n{table}\n````" for table in one.tables]
    shown += [f"![{alt.translate(ESCAPES)}]({keep(png)})" for png, alt in one.pictures]
    if one.printed and not (one.tables or one.pictures):
        lines = [line for long in one.printed.splitlines() for line in wrap(long, WIDTH) or [""]]
        for start in range(0, len(lines), LINES):
            shown.append("\n".join(("````text", *lines[start : start + LINES], "````")))
    return [f"## {one.title}\n\n{what}\n" for what in shown]


def slides(root: Path, keep: Callable[[str], str], problems: list[str]) -> str:
    """Slides of the 90 minutes: for each row of docs/teaching.md its title, with the text as the
    teacher's notes; for each section of a notebook that the row names (`"A" to "B"`: and all that
    lie between) what to predict, then the answer, tables and pictures. `keep` stores a picture and
    returns its file's name."""
    parts = ["# LaViC in 90 minutes\n\nPress S for the notes, O for all slides.\n"]
    plan = (root / "docs" / "teaching.md").read_text(encoding="utf-8")
    for minutes, what, where in re.findall(r"^\| (\d+–\d+) \| (.*) \| (.*) \|$", plan, re.M):
        named = re.match(r"\*(.+?)\*\s*(.*)", what)
        title, notes = named.groups() if named else (what.partition(":")[0], what)
        notes, head = LINK.sub(r"\1", notes), f"## {title.rstrip('.')}\n\nMinutes {minutes}\n"
        parts.append(f"{head}\n```{{revealjs-notes}}\n{notes}\n```\n")
        if not re.match(r"\d\d, \"", where):
            continue
        path = next((root / "notebooks").glob(f"{where[:2]}_*.ipynb"))
        found = sections(json.loads(path.read_text(encoding="utf-8")))
        places = {one.title: place for place, one in enumerate(found)}
        for first, last in re.findall(r'"([^"]+)"(?: to "([^"]+)")?', where):
            lost = [name for name in (first, last) if name and name not in places]
            for name in lost:
                problems.append(f"docs/teaching.md: notebook {where[:2]} has no section {name!r}")
            if not lost:
                for one in found[places[first] : places[last or first] + 1]:
                    parts += _slides(one, keep)
    return "\n".join(parts)
