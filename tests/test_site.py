"""docs/build.py and docs/pages.py: staging of the site, not built here (tests/browser/test_book.py
looks at the built one)."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import build
import pages
import pytest
from PIL import Image, PngImagePlugin

ROOT = Path(__file__).resolve().parents[1]

SITE = {
    "index.md",
    "docs/glossary.md",
    "docs/claims.md",
    "notebooks/01_a.ipynb",
    "notebooks/02.ipynb",
    "docs/api/lavic_utils/lavic_utils.data.md",
    "docs/api/lavic_utils/lavic_utils.mini.world.md",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (
        "README.md",
        "docs/glossary.md",
        "notebooks/01_a.ipynb",
        "results/claims.md",
        "lavic_utils/data.py",
        "lavic_utils/mini/world.py",
        "figures/a.png",
        ".ci/run",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(("page", "text", "expected"), [
    ("README.md", "[n](notebooks/01_a.ipynb)", "[n](notebooks/01_a.ipynb)"),
    ("README.md", "[c](results/claims.md#x)", "[c](docs/claims.md#x)"),
    ("README.md", "[`code`](lavic_utils/data.py)",
     "[`code`](docs/api/lavic_utils/lavic_utils.data.md)"),
    ("docs/api.md", "[`w`](../lavic_utils/mini/world.py)",
     "[`w`](api/lavic_utils/lavic_utils.mini.world.md)"),
    ("README.md", "[what CI runs](.ci/run)", "what CI runs"),
    ("README.md", "![A picture](figures/a.png)", "![A picture](figures/a.png)"),
    ("README.md", "[paper](https://example.org/a#b) and [below](#here)",
     "[paper](https://example.org/a#b) and [below](#here)"),
    ("notebooks/01_a.ipynb", "[hr](../docs/glossary.md#hr-at-1)",
     "[hr](../docs/glossary.md#hr-at-1)"),
    ("notebooks/01_a.ipynb", "[x](#What-is-a-tile?) [y](02.ipynb#Why%3F)",
     "[x](#what-is-a-tile) [y](02.ipynb#why)"),
    ("notebooks/01_a.ipynb", "[front](../README.md)", "[front](../index.md)"),
    ("notebooks/01_a.ipynb", "[CLS], [[CLS] token](../docs/glossary.md)",
     "[CLS], [[CLS] token](../docs/glossary.md)"),
    ("docs/glossary.md", "[`data`](../lavic_utils/data.py)",
     "[`data`](api/lavic_utils/lavic_utils.data.md)"),
    ("README.md", "`[a](none.md)` and\n```\n[b](none.md)\n```",
     "`[a](none.md)` and\n```\n[b](none.md)\n```"),
])  # fmt: skip
def test_links_hold_in_the_site(root: Path, page: str, text: str, expected: str) -> None:
    problems = build.Problems()
    assert build.rewrite(text, page, root, SITE, problems) == expected
    assert problems == []


def test_what_is_broken_is_named(root: Path) -> None:
    problems = build.Problems()
    build.rewrite("[a](none.md) ![](figures/a.png)", "README.md", root, SITE, problems)
    assert problems == [
        "README.md: link to none.md, which does not exist",
        "README.md: picture figures/a.png has no alternative text",
    ]


def png() -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (2, 2)).save(made, "PNG")
    return made.getvalue()


def shown(data: dict) -> dict:
    return {"output_type": "display_data", "metadata": {}, "data": data}


def picture(text: str) -> dict:
    return shown({"image/png": base64.b64encode(png()).decode(), "text/plain": [text]})


def test_a_notebook_picture_carries_its_text(root: Path) -> None:
    widget = shown({"application/vnd.jupyter.widget-view+json": {}, "text/plain": "VBox()"})
    cell = {
        "cell_type": "code",
        "metadata": {},
        "id": "a",
        "execution_count": 1,
        "source": ['figures.keep(fig, "bars", run)'],
        "outputs": [picture("Bars [95 %] of a_b"), picture("<Figure size 1x1>"), widget],
    }
    book = {
        "cells": [{"cell_type": "markdown", "metadata": {}, "id": "b", "source": "# T"}, cell],
        "metadata": {"widgets": {}},
    }
    (root / "notebooks" / "01_a.ipynb").write_text(json.dumps(book), encoding="utf-8")
    problems, out = build.Problems(), root / "out.ipynb"
    build.stage_notebook(
        root / "notebooks" / "01_a.ipynb", "notebooks/01_a.ipynb", out, root, SITE, problems
    )
    assert problems == [
        "notebooks/01_a.ipynb, cell 1: a picture has no alternative text "
        "(figures.keep(..., alt=...))"
    ]
    staged = json.loads(out.read_text(encoding="utf-8"))
    assert [c["cell_type"] for c in staged["cells"]] == ["markdown", "markdown", "code"]
    assert pages.cell_target(1) in staged["cells"][1]["source"]
    texts = [
        o["data"]["text/markdown"] for o in staged["cells"][2]["outputs"]
    ]  # the widget is gone
    name = re.fullmatch(r"!\[Bars \\\[95 %\\\] of a\\_b\]\((out-\w{8}\.png)\)", texts[0])[1]
    assert len(texts) == 2
    assert (root / name).read_bytes() == png()


def code(source: str) -> dict:
    return {"cell_type": "code", "source": source}


def test_which_cell_makes_a_figure() -> None:
    books = {
        "01_a": {
            "cells": [
                {"cell_type": "markdown", "source": "# T\n## How long?"},
                code('keep(fig, "data/lengths", run)'),
                {"cell_type": "markdown", "source": "### Cases"},
                code('keep(fig, f"{name}_dialogue", run)'),
                code('show("case_failure")'),
            ]
        },
        "07_b": {
            "cells": [
                code('keep(draw("ceilings"), "other", run)'),
                code('keep(fig, "ceilings", "published")'),
            ]
        },
    }
    assert pages.maker("data/lengths", books) == ("01_a", 1, "How long?")
    assert pages.maker("audit/ceilings", books) == (
        "07_b",
        1,
        "",
    )  # the cell that keeps it, not the one that names it
    assert pages.maker("case_failure_dialogue", books) == ("01_a", 4, "Cases")
    assert pages.maker("nowhere", books) is None


def test_gallery_shows_what_the_file_says(root: Path) -> None:
    about = PngImagePlugin.PngInfo()
    about.add_text(
        "Comment",
        json.dumps(
            {
                "tier": "mini run",
                "profile": "mini",
                "seeds": [42, 43],
                "data_hash": "d1",
                "code_hash": "c1",
                "versions": {"torch": "9"},
                "alt": 'Bars of "a" < b',
                "time": "2026-01-02T03",
            }
        ),
    )
    for name, info in (("bars", about), ("mute", None), ("lost", about)):
        Image.new("RGB", (2, 2)).save(root / "figures" / f"{name}.png", pnginfo=info)
    book = {
        "cells": [
            {"cell_type": "markdown", "source": "# 01 · A"},
            code('keep(fig, "bars", run); keep(fig, "mute", run)'),
        ]
    }
    (root / "notebooks" / "01_a.ipynb").write_text(json.dumps(book), encoding="utf-8")
    problems: list[str] = []
    page = pages.gallery(
        root,
        {f"figures/{n}.png": root / "figures" / f"{n}.png" for n in ("bars", "lost", "mute")},
        problems,
    )
    for part in (
        "### bars",
        'width="2" height="2"',
        'alt="Bars of &quot;a&quot; &lt; b"',
        "mini run",
        "seeds 42, 43",
        "d1",
        "c1",
        "torch 9",
        "2026-01-02",
        "../notebooks/01_a.html#code-1",
    ):
        assert part in page
    assert problems == [
        "figures/lost.png: no notebook cell names it",
        "figures/mute.png: no alternative text stored (01_a: alt=...)",
    ]


def test_ledger_holds_every_claim() -> None:
    found = json.loads((ROOT / "results" / "claims.json").read_text(encoding="utf-8"))
    page = pages.claims(found)
    assert page.count("<tr>") == len(found["rows"]) + len(found["comparisons"]) + 2
    first = next(row for row in found["rows"] if row["published"])
    assert f'data-key="{first["published"]}">{first["published"]:.4f}</td>' in page


def test_the_api_page_leads_to_every_module_of_the_map(tmp_path: Path) -> None:
    block = "| [`data`](lavic_utils/data.py) | rows |\n| [`w`](lavic_utils/mini/w.py) | x |\n"
    text = f"a\n<!-- modules: begin -->\n{block}<!-- modules: end -->\n[b](lavic_utils/b.py)"
    (tmp_path / "CONTRIBUTING.md").write_text(text, encoding="utf-8")
    assert pages.modules(tmp_path) == ["data", "mini.w"]
    assert pages.api(tmp_path).endswith(f"\n\n{block}")


def test_glossary_anchors_that_pages_link_to() -> None:
    terms = re.findall(
        r"^### (.+)$", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.M
    )
    anchors = {re.sub(r"[^\w -]", "", term.lower()).replace(" ", "-") for term in terms}
    assert {
        "candidates",
        "cls-token",
        "hr-at-1",
        "validity-ratio",
        "evidence-tier",
    } <= anchors and len(anchors) == len(terms)
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb")]:
        linked = set(re.findall(r"glossary\.md#([\w-]+)", path.read_text(encoding="utf-8")))
        assert linked <= anchors, f"{path.name}: {sorted(linked - anchors)}"


def notebook() -> dict:
    def markdown(text: str) -> dict:
        return {"cell_type": "markdown", "metadata": {}, "id": "m", "source": text}

    def run(text: str, *outputs: dict, tags: tuple[str, ...] = ()) -> dict:
        about = {"execution_count": 1, "metadata": {"tags": list(tags)}, "id": "c"}
        return {"cell_type": "code", **about, "source": text, "outputs": list(outputs)}

    asked = "**Predict:** more of [[CLS] tokens](x.md#y)?"
    told = "<details><summary>Answer, after you have guessed</summary>\n\nSome.\n\n</details>"
    folded = "<details><summary>Discussion</summary>secret two</details>\n\n### Exercise 2"
    cells = [
        markdown("# 01 · A\n\nAt any resolution. Try it. It has a Solution that runs. Open it."),
        markdown(f"## Why?\n\n{asked}\n\n{told}\n\n## How?\n\nSo."),
        run("draw()", picture("Bars")),
        markdown("### Between?\n\n#### And"),
        run("count()", printed("of two"), shown({"text/html": "<table>small</table>"})),
        run("list()", shown({"text/html": "<table>" + "<tr>" * 30 + "large</table>"})),
        markdown("## Last?"),
        run("print()", printed("a line\n" * 30)),
        run("secret one", tags=("solution",)),
        markdown(folded),
        run("last()"),
    ]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


@pytest.mark.parametrize("solutions", [True, False])
def test_a_book_without_solutions_has_none_anywhere(root: Path, solutions: bool) -> None:
    path = root / "notebooks" / "01_a.ipynb"
    path.write_text(json.dumps(notebook()), encoding="utf-8")
    out, extra = root / "out.ipynb", root / "extra"
    where = (path, "notebooks/01_a.ipynb", out, root, SITE, build.Problems())
    build.stage_notebook(*where, extra, solutions)
    for file in (out, extra / "notebooks" / "01_a.ipynb"):
        text = file.read_text(encoding="utf-8")
        assert ("secret one" in text) == ("secret two" in text) == solutions
        assert ("It has a Solution that runs. Open it." in text) == solutions
        assert "At any resolution. Try it." in text
        assert "Answer, after you" in text and "Exercise 2" in text and "last()" in text
    assert 'id=\\"code-5\\"' in out.read_text(encoding="utf-8")  # cells keep their number
    assert "code-5" not in (extra / "notebooks" / "01_a.ipynb").read_text(encoding="utf-8")


def staged(folder: Path, solutions: bool) -> dict[str, str]:
    """The real book's source: its text files, and the prose of its notebooks."""
    assert build.stage(ROOT, folder, solutions) == []
    found = {}
    for path in folder.rglob("*.*"):
        name = path.relative_to(folder).as_posix()
        if path.suffix in (".md", ".yml"):
            found[name] = path.read_text(encoding="utf-8")
        elif path.suffix == ".ipynb":
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            prose = [cell for cell in cells if cell["cell_type"] == "markdown"]
            found[name] = "\n\n".join("".join(cell["source"]) for cell in prose)
    return found


def test_the_real_book_without_solutions_has_none_and_promises_none(tmp_path: Path) -> None:
    with_all, without = (staged(tmp_path / str(given), given) for given in (True, False))
    assert set(with_all) - set(without) == {"docs/teacher.md", "docs/teaching.md"}
    assert "answers to expect" in with_all["docs/teaching.md"]
    promised = [n for n, text in with_all.items() if re.search(r"\b[Ss]olutions?\b", text)]
    assert {Path(name).stem[:2] for name in promised} >= {"00", "03", "06"}
    for name, text in without.items():
        assert not re.search("answers to expect|What to grade", text), name
        if not name.startswith("_extra/"):  # what a reader downloads has the repository's links
            assert not re.search(r"docs/teach|\(teach\w+\.md", text), name
        if name.endswith(".ipynb"):
            assert not re.search(r"\bsolutions?\b|They run with the notebook", text, re.I), name
            exercises = re.findall(r"^### Exercise.*\n\n(.*)", text, re.M)
            assert len(exercises) >= 4 and all(len(one) > 40 for one in exercises), name


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("", ["Download this notebook", "Binder and Colab"]),
        ("https://example.org/a/b.git", ["Download this notebook", "Source", "Binder"]),
        ("/home/me/checkout", ["Download this notebook", "Binder and Colab"]),
    ],
)
def test_the_doors_of_a_notebook_page(root, monkeypatch, address: str, expected: list[str]) -> None:
    monkeypatch.setenv("LAVIC_REPOSITORY", address)
    line = build.doors("01_a.ipynb", build.repository(root))
    assert re.findall(r">([^<]+)</a>", line) == expected and "/home" not in line
    if address.startswith("https"):
        assert 'href="https://example.org/a/b/blob/HEAD/notebooks/01_a.ipynb"' in line
        assert "/v2/git/https%3A%2F%2Fexample.org%2Fa%2Fb/HEAD?labpath=notebooks/01_a" in line


def printed(text: str) -> dict:
    return {"output_type": "stream", "name": "stdout", "text": [text]}


def slides_of(root: Path, rows: str) -> tuple[str, list[str]]:
    """The slides of a plan with these rows and one notebook, and the problems that were said."""
    (root / "notebooks" / "01_a.ipynb").write_text(json.dumps(notebook()), encoding="utf-8")
    (root / "docs" / "teaching.md").write_text(rows, encoding="utf-8")
    problems: list[str] = []
    return pages.slides(root, lambda png: "a.png", problems), problems


def test_slides_are_made_of_the_plan_and_the_notebooks(root: Path) -> None:
    rows = '| 0–8 | *Begin.* Talk. | 01, "Why?" and "How?" |\n| 8–9 | *End.* Go. | – |\n'
    text, problems = slides_of(root, rows)
    assert problems == []
    assert re.findall("^## (.*)$", text, re.M) == ["Begin", "Why?", "Why?", "How?", "End"]
    assert "**Predict:** more of [CLS] tokens?" in text and "\nSome.\n" in text
    assert (
        "![Bars](a.png)" in text and "secret" not in text and "```{revealjs-notes}\nTalk." in text
    )
    _, problems = slides_of(root, rows.replace("Why?", "When?"))
    assert problems == ["docs/teaching.md: notebook 01 has no section 'When?'"]


def test_slides_hold_what_lies_between_two_sections(root: Path) -> None:
    text, problems = slides_of(
        root, '| 0–8 | *Begin.* Talk. | 01, "Why?" and "How?" to "Last?" |\n'
    )
    heads = ["Begin", "Why?", "Why?", "How?", "And", "Last?", "Last?"]
    assert problems == [] and re.findall("^## (.*)$", text, re.M) == heads
    assert "<table>small</table>" in text and "large" not in text and "of two" not in text
    assert text.count("a line") == 30 and "secret" not in text


def test_a_slide_that_names_a_table_is_followed_by_it() -> None:
    text = pages.slides(ROOT, lambda png: "a.png", [])
    made = re.split(r"^## ", text, flags=re.M)
    named = [k for k, one in enumerate(made) if re.search(r"\btable below\b", one)]
    assert len(named) >= 3
    for k in named:
        title = made[k].splitlines()[0]
        assert made[k + 1].startswith(title) and "<table" in made[k + 1], title
    for one in ("How sure?", "Recommending"):
        at = next(k for k, slide in enumerate(made) if slide.startswith(one))
        length = next(k for k, slide in enumerate(made[at + 1 :]) if "\nMinutes " in slide)
        assert length >= 5, one  # what the row shows before the next begins


def test_slides_of_the_real_plan_hold_every_row() -> None:
    problems: list[str] = []
    text = pages.slides(ROOT, lambda png: "a.png", problems)
    plan = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
    minutes = re.findall(r"^\| (\d+–\d+) \|", plan, re.M)
    assert problems == [] and re.findall(r"^Minutes (\S+)$", text, re.M) == minutes
    assert text.count("**Predict:**") >= 5 and text.count("](a.png)") >= 8
