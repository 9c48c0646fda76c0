"""The form of the committed notebooks: short cells, no bars, no paths, pictures with words, and no
name of a function that is gone (nor on a page)."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_output

import lavic_utils
from lavic_utils.config import ROOT
from lavic_utils.repro.notebooks import WIDGET, find_notebooks, read_notebook

MAX_LINES, MAX_PLOT = 12, 25
PLOTS = re.compile(r"\bplt\.|\baxis\.|\bfigures\.|\bschemes\.")
PAGES = [*find_notebooks(), ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
ABSOLUTE = re.compile(
    r"(?<![\w.:/+=~-])(/(home|root|tmp|usr|work|Users|opt|mnt|var|private|srv)/\w|[A-Z]:\\\w)"
)
BAR = re.compile(r"\r[^\n]|\d+it/s|s/it\]|\d+%\|")


def output_problems(output) -> list[str]:
    problems, data = [], output.get("data", {})
    if output.get("name") == "stderr":
        problems.append("holds output on stderr")
    words = str(data.get("text/plain", ""))
    if "image/png" in data and (not words or words.startswith(("<", "Text("))):
        problems.append("shows a picture without alternative text (figures.keep(..., alt=...))")
    texts = [output.get("text", "")]
    texts += [str(value) for kind, value in data.items() if kind.startswith("text/")]
    if WIDGET in data or any(BAR.search(text) for text in texts):
        problems.append("holds a progress bar")
    if found := ABSOLUTE.search("\n".join(texts)):
        problems.append(f"shows an absolute path ({found.group(0)}...)")
    return problems


def cell_problems(cell) -> list[str]:
    problems = ["names an absolute path"] if ABSOLUTE.search(cell.source) else []
    lines = cell.source.splitlines()
    most = MAX_PLOT if PLOTS.search(cell.source) else MAX_LINES
    if cell.cell_type == "code" and len(lines) > most:
        problems.append(f"has {len(lines)} lines, more than {most}")
    if cell.cell_type == "code" and max(map(len, lines), default=0) > 100:
        problems.append("has a line of more than 100 characters")
    for output in cell.get("outputs", []):
        problems += output_problems(output)
    return problems


@pytest.mark.parametrize("path", find_notebooks(), ids=lambda path: path.stem)
def test_committed_notebooks_are_of_the_form(path):
    cells = read_notebook(path).cells
    found = {number: cell_problems(cell) for number, cell in enumerate(cells, 1)}
    assert {number: said for number, said in found.items() if said} == {}


def said(text: str, name: str = "stdout") -> dict:
    return {"outputs": [new_output("stream", name=name, text=text)]}


def shown(**data: str) -> dict:
    kinds = {"png": "image/png", "text": "text/plain", "html": "text/html", "widget": WIDGET}
    return {"outputs": [new_output("display_data", {kinds[k]: v for k, v in data.items()})]}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"source": "\n".join("1" * 13)}, "13 lines, more than 12"),
        ({"source": "\n".join("1" * 12)}, None),
        ({"source": "plt.plot()\n" * 25}, None),
        ({"source": "plt.plot()\n" * 26}, "26 lines, more than 25"),
        ({"source": "1 + " * 25 + "1"}, "100 characters"),
        ({"source": "open('/tmp/x')"}, "names an absolute path"),
        (said("see /home/me/x"), "shows an absolute path"),
        (said("https://a.org/home/x 3/4 a/tmp/x"), None),
        (said("warning", "stderr"), "stderr"),
        (said(" 50%|###  | 1/2 [3it/s]"), "progress bar"),
        (shown(widget="x", text="a bar"), "progress bar"),
        (shown(png="iVBORw0KGgo=", text="<Figure size 640x480 with 1 Axes>"), "alternative text"),
        (shown(png="iVBORw0KGgo=", text=""), "alternative text"),
        (shown(png="iVBORw0KGgo=", text="Ten hats."), None),
        (shown(text="", html="<b>x</b>"), None),
    ],
)
def test_each_fault_of_form_is_found(change, problem):
    cell = nbformat.from_dict({**new_code_cell("1"), **change})
    assert [problem in found for found in cell_problems(cell)] == [True] * (problem is not None)


ENDINGS = {"csv", "json", "jsonl", "log", "md", "png", "py", "sqlite", "toml", "yaml", "yml"}


def modules_of(sources: list[str]) -> dict[str, list[object]]:
    """The package's modules and rooms by short name; what some code imports from them, by its own
    name there, comes first."""
    found: dict[str, list[object]] = {}
    for module in pkgutil.walk_packages(lavic_utils.__path__, "lavic_utils."):
        if not module.name.endswith("__main__"):
            known = found.setdefault(module.name.rpartition(".")[2], [])
            known.append(importlib.import_module(module.name))
    for source in sources:
        code = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith("%"))
        for node in ast.walk(ast.parse(code)) if "import" in code and "!" not in code else ():
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lavic_utils"):
                place = importlib.import_module(node.module)
                for name in node.names:
                    found[name.asname or name.name] = [getattr(place, name.name)]
    return found


def dead_names(text: str, modules: dict[str, list[object]]) -> list[str]:
    """Names in backticks, `module.name` or a call of it, that no such module has."""
    dead = []
    for first, path in re.findall(r"`(\w+)((?:\.\w+)+)(?=[`(])", text):
        names = path.split(".")[1:]
        if first in modules and names[-1] not in ENDINGS:
            if not any(reaches(module, names) for module in modules[first]):
                dead.append(first + path)
    return dead


def reaches(thing: object, names: list[str]) -> bool:
    for name in names:
        if name in getattr(thing, "model_fields", {}) or name in getattr(
            thing, "__dataclass_fields__", {}
        ):
            return True  # a field; what it holds is not followed
        thing = getattr(thing, name, None)
    return thing is not None


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_function_that_a_text_names_exists(path):
    text, sources = path.read_text(encoding="utf-8"), []
    if path.suffix == ".ipynb":
        cells = read_notebook(path).cells
        sources = [cell.source for cell in cells if cell.cell_type == "code"]
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert dead_names(text, modules_of(sources)) == []


def test_a_dead_name_is_found():
    modules = modules_of(["from lavic_utils.audit import published as audit\nx = 1"])
    told = "`evaluation.score`, `evaluation.scores(x)`, `audit.counts`, `audit.improvements`, "
    told += "`claims.md`, `run.score`, `config.Profile.name`, `config.Profile.nam`"
    assert dead_names(told, modules) == [
        "evaluation.scores", "audit.improvements", "config.Profile.nam",
    ]  # fmt: skip


def typed_minutes(path) -> list[float]:
    """A notebook's minutes on `mini`: as its first cell gives them, and the students' page."""
    head = read_notebook(path).cells[0].source
    page = (ROOT / "docs" / "student.md").read_text(encoding="utf-8")
    said = re.findall(r"^\| (?:`mini`|any)[^|]*\| (?:about |under )?(\d+)", head, re.M)
    said += re.findall(rf"^\| {path.stem[:2]} [^|]*\| \d+ \| (\d+) \|", page, re.M)
    return [float(one) for one in said]


def near(typed: float, measured: float) -> bool:
    return abs(typed - measured) <= max(1, measured / 2)


@pytest.mark.parametrize("path", find_notebooks(), ids=lambda path: path.stem)
def test_minutes_on_pages_are_near_those_measured(path):
    typed, measured = typed_minutes(path), read_notebook(path).metadata.lavic.minutes
    assert len(typed) == 2 and all(near(one, measured) for one in typed), (typed, measured)
    assert not near(3 * measured + 2, measured)  # the check can fail
