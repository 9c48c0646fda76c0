"""The form of the committed notebooks: short cells, no bars, no paths, pictures with words."""

from __future__ import annotations

import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_output

from lavic_utils.repro.notebooks import WIDGET, find_notebooks, read_notebook

MAX_LINES = 25
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
    lines = len(cell.source.splitlines())
    if cell.cell_type == "code" and lines > MAX_LINES:
        problems.append(f"has {lines} lines, more than {MAX_LINES}")
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
        ({"source": "\n".join("1" * 26)}, "26 lines"),
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
