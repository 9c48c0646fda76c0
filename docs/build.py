"""`make book`: stage the repository's pages into one folder and let Jupyter Book make a static site
of them; nothing runs.

The staged files keep their places, so that a link between README, notebooks and docs holds on
GitHub and in the site alike. What Sphinx cannot know is rewritten here: links to files outside the
site, pictures in notebooks without alternative text."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable, Mapping
from itertools import takewhile
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any
from urllib.parse import quote, unquote

import pages
import yaml

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "docs" / "site"
BUILT = ROOT / "docs" / "_build"  # source/: what is staged; html/: the site
# What has another place in the site.
MOVED = {"README.md": "index.md", "results/claims.md": "docs/claims.md"}
# Left out of a book without solutions: what to expect and how to grade stands there.
TEACHERS = {"docs/teacher", "docs/teaching"}
# Code (left alone), or a Markdown link or image: `[text](target)`, `![text](target)`.
CODE_OR_LINK = re.compile(
    r"```.*?```|(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)|`[^`\n]*`", re.S
)


class Problems(list[str]):
    """Everything that would make the site wrong, collected, so that one build names all of it."""


def site_target(
    target: str, page: str, root: Path, pages_of_site: set[str], problems: Problems
) -> str | None:
    """What a link of `page` (path from the root) becomes: a target, or None where it leads out of
    the site and only its text stays. A target that is not in the repository is a problem."""
    if re.match(r"[a-z]+:", target):
        return target
    path, _, anchor = target.partition("#")
    if (path or page).endswith(".ipynb"):  # `#What-is-a-tile?` is `#what-is-a-tile` in the site
        anchor = re.sub(r"[^\w-]", "", unquote(anchor).lower())
    if not path:
        return f"#{anchor}"
    place = normpath(str(PurePosixPath(page).parent / path))
    if not (root / place).exists() and place not in pages_of_site:
        problems.append(f"{page}: link to {target}, which does not exist")
        return None
    place = MOVED.get(place, place)
    if module := re.fullmatch(r"lavic_utils/([\w/]+)\.py", place):
        place = f"docs/api/lavic_utils/lavic_utils.{module[1].replace('/', '.')}.md"
    if place not in pages_of_site and not place.endswith(".png"):
        return None
    way = relpath(place, PurePosixPath(MOVED.get(page, page)).parent)
    return f"{way}#{anchor}" if anchor else way


def rewrite(text: str, page: str, root: Path, pages_of_site: set[str], problems: Problems) -> str:
    """Markdown with its links as `site_target` says; code stays as it is. A picture without
    alternative text is a problem."""

    def one(found: re.Match[str]) -> str:
        image, words, target = found.groups()
        if target is None:
            return found[0]
        if image and not words.strip():
            problems.append(f"{page}: picture {target} has no alternative text")
        kept = site_target(target, page, root, pages_of_site, problems)
        return f"{image}[{words}]({kept})" if kept else words

    return CODE_OR_LINK.sub(one, text)


def stage_output(
    output: dict[str, Any], where: str, keep: Callable[[str], str], problems: Problems
) -> dict[str, Any] | None:
    """A notebook output for the site: a picture becomes Markdown with its alternative text (the
    output's own text, as `figures.Kept` gives it); a live widget, which nothing would drive here,
    is left out."""
    data = output.get("data", {})
    if any("widget" in kind for kind in data):
        return None
    if "image/png" not in data:
        return output
    alt = " ".join("".join(data.get("text/plain", "")).split())
    if not alt or alt.startswith("<"):
        problems.append(f"{where}: a picture has no alternative text (figures.keep(..., alt=...))")
        alt = ""
    name = keep("".join(data["image/png"]))
    picture = {"text/markdown": f"![{alt.translate(pages.ESCAPES)}]({name})"}
    return {"output_type": "display_data", "metadata": {}, "data": picture}


def keeper(folder: Path, stem: str) -> Callable[[str], str]:
    """A function that stores a picture (base64 PNG) in a folder and returns its file's name."""

    def keep(png: str) -> str:
        content = b64decode(png)
        name = f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}.png"
        (folder / name).write_bytes(content)
        return name

    return keep


def repository(root: Path) -> str:
    """The project's address for links: LAVIC_REPOSITORY, or else where git fetches it from, if that
    is a web address; "" where neither is."""
    ask = ["git", "-C", str(root), "remote", "get-url", "origin"]
    said = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
    found = os.environ.get("LAVIC_REPOSITORY") or said
    return found.removesuffix(".git") if re.match(r"https://[^@]+$", found) else ""


def doors(name: str, address: str) -> str:
    """The line of links below a notebook's title."""
    links = {f'href="{name}" download': "Download this notebook"}
    if address:
        links[f'href="{address}/blob/HEAD/notebooks/{name}"'] = "Source"
        binder = f"https://mybinder.org/v2/git/{quote(address, safe='')}/HEAD?labpath=notebooks/"
        links[f'href="{binder}{name}"'] = "Binder"
    else:
        links['href="../docs/student.html#without-installing-anything"'] = "Binder and Colab"
    return " · ".join(f"<a {target}>{words}</a>" for target, words in links.items())


def of_solutions(text: str) -> str:
    """Markdown without what it says of solutions: of a line of prose, all from the first sentence
    that names one to the line's end."""
    lines = []
    for line in text.split("\n"):
        said = [] if line.startswith(("#", "|")) else re.split(r"(?<=[.:!?]) +", line)
        kept = list(takewhile(lambda s: not re.search(r"\bsolutions?\b", s, re.I), said))
        if len(kept) == len(said):
            lines.append(line)
        elif kept:
            lines.append(" ".join(kept))
    return "\n".join(lines)


def without_solutions(book: dict[str, Any]) -> None:
    """Take the exercises' solutions, their discussions and what is said of them out, in place;
    cells keep their number (an empty one stands where one was)."""
    for cell in book["cells"]:
        if "solution" in cell["metadata"].get("tags", []):
            cell |= {"source": "", "outputs": []}
        elif cell["cell_type"] == "markdown":
            folded = r"<details><summary>Discussion.*?</details>\n*"
            text = re.sub(folded, "", "".join(cell["source"]), flags=re.S)
            cell["source"] = of_solutions(text)


def stage_notebook(
    path: Path,
    page: str,
    out: Path,
    root: Path,
    pages_of_site: set[str],
    problems: Problems,
    extra: Path | None = None,
    solutions: bool = True,
) -> None:
    """Write the notebook for the site: links rewritten, pictures beside it, a target above each
    code cell; into `extra` what a reader can download."""
    book = json.loads(path.read_text(encoding="utf-8"))
    book["metadata"].pop("widgets", None)
    if not solutions:
        without_solutions(book)
    if extra:
        kept = [cell for cell in book["cells"] if cell["source"]]
        (extra / page).parent.mkdir(parents=True, exist_ok=True)
        (extra / page).write_text(json.dumps({**book, "cells": kept}), encoding="utf-8")
        title, _, rest = "".join(book["cells"][0]["source"]).partition("\n")
        book["cells"][0]["source"] = f"{title}\n\n{doors(path.name, repository(root))}\n{rest}"
    cells, keep = [], keeper(out.parent, out.stem)
    for number, cell in enumerate(book["cells"]):
        source = "".join(cell["source"])
        if not source:
            continue  # a solution that is left out
        if cell["cell_type"] == "code" and "lavic_utils/repro/colab.py" in source:
            continue  # the first cell, which does nothing but on Colab
        if cell["cell_type"] == "markdown":
            cell["source"] = rewrite(source, page, root, pages_of_site, problems)
        elif cell["cell_type"] == "code":
            if "solution" in cell["metadata"].get("tags", []):
                show, hide = "Show the solution", "Hide the solution"
                cell["metadata"]["mystnb"] = {"code_prompt_show": show, "code_prompt_hide": hide}
            where = f"{page}, cell {number}"
            staged = [stage_output(o, where, keep, problems) for o in cell["outputs"]]
            cell["outputs"] = [o for o in staged if o is not None]
            target = f'<div id="{pages.cell_target(number)}"></div>'
            above = {"cell_type": "markdown", "id": f"to-{number}", "metadata": {}}
            cells.append({**above, "source": target})
        cells.append(cell)
    book["cells"] = cells
    out.write_text(json.dumps(book), encoding="utf-8")


def table_of_contents(
    root: Path, problems: Problems, solutions: bool = True
) -> tuple[dict[str, Any], set[str]]:
    """site/_toc.yml with the modules' API pages added and missing pages taken out (each a problem),
    and without solutions the teachers'; the site's pages."""
    toc = yaml.safe_load((SITE / "_toc.yml").read_text(encoding="utf-8"))
    made = {"docs/gallery", "docs/claims", "docs/api"}
    found = {"index.md"}
    for part in toc["parts"]:
        chapters = []
        for chapter in part["chapters"]:
            name = chapter["file"]
            if name in TEACHERS and not solutions:
                continue
            file = next((f for f in (f"{name}.md", f"{name}.ipynb") if (root / f).is_file()), None)
            if name not in made and file is None:
                problems.append(f"{name}: in docs/site/_toc.yml, but there is no such page")
                continue
            found.add(f"{name}.md" if name in made else str(file))
            if name == "docs/api":
                sections = {}
                for module in pages.modules(root):
                    sections[module] = f"docs/api/lavic_utils/lavic_utils.{module}"
                chapter["sections"] = [{"file": f, "title": m} for m, f in sections.items()]
                found |= {f"{file}.md" for file in sections.values()}
            chapters.append(chapter)
        part["chapters"] = chapters
    toc["parts"] = [part for part in toc["parts"] if part["chapters"]]
    return toc, found


def stage(root: Path, out: Path, solutions: bool = True) -> Problems:
    """Write the book's source into `out` (made new). Returns what is wrong with it."""
    problems = Problems()
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(SITE, out, ignore=shutil.ignore_patterns("__pycache__"))
    toc, site = table_of_contents(root, problems, solutions)
    (out / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False), encoding="utf-8")
    figures = {p.relative_to(root).as_posix(): p for p in sorted((root / "figures").rglob("*.png"))}
    plates = {p.relative_to(root).as_posix(): p for p in (root / "results/bench").glob("*.png")}
    for name, path in {**figures, **plates}.items():
        for base in (out, out / "_extra"):  # beside the pages for Sphinx, and in the site itself
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, base / name)

    def api() -> str:
        text = pages.api(root).replace("](lavic_utils/", "](../lavic_utils/")
        return rewrite(text, "docs/api.md", root, site, problems)

    made: Mapping[str, Callable[[], str]] = {
        "docs/gallery.md": lambda: pages.gallery(root, figures, problems),
        "docs/claims.md": lambda: pages.claims(
            json.loads((root / "results" / "claims.json").read_text(encoding="utf-8"))
        ),
        "docs/api.md": api,
    }
    for page in sorted(site):
        target = out / page
        target.parent.mkdir(parents=True, exist_ok=True)
        if page in made:
            target.write_text(made[page](), encoding="utf-8")
        elif page.endswith(".ipynb"):
            more = (out / "_extra", solutions)
            stage_notebook(root / page, page, target, root, site, problems, *more)
        elif not page.startswith("docs/api/"):  # those are autodoc2's
            origin = next((o for o, moved in MOVED.items() if moved == page), page)
            text = (root / origin).read_text(encoding="utf-8")
            target.write_text(rewrite(text, origin, root, site, problems), encoding="utf-8")
    return problems


def build_slides(root: Path) -> int:
    """docs/_build/slides: the 90 minutes as reveal.js slides, which need no network. As `main`."""
    source, problems = BUILT / "slides-source", Problems()
    for old in (source, BUILT / "slides"):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(root / "docs" / "slides", source)
    text = pages.slides(root, keeper(source, "slide"), problems)
    (source / "index.md").write_text(text, encoding="utf-8")
    print("".join(f"error: {problem}\n" for problem in problems), file=sys.stderr, end="")
    program = Path(sys.executable).with_name("sphinx-build")
    command = [program, "-q", "-W", "-E", "-b", "revealjs", source, BUILT / "slides"]
    return 2 if problems else subprocess.run([str(part) for part in command]).returncode


def main() -> int:
    """Exit code 0: built; 1: Sphinx failed; 2: something is missing, one line each."""
    parser = argparse.ArgumentParser(description="Build the static site of the companion.")
    for option, about in (
        ("--slides", "the slides instead of the site"),
        ("--no-solutions", "leave the exercises' solutions and the teachers' pages out"),
        ("--draft", "build although alternative texts or pages are missing"),
    ):
        parser.add_argument(option, action="store_true", help=about)
    chosen = parser.parse_args()
    if chosen.slides:
        return build_slides(ROOT)
    problems = stage(ROOT, BUILT / "source", not chosen.no_solutions)
    for problem in problems:
        print(f"{'missing' if chosen.draft else 'error'}: {problem}", file=sys.stderr)
    if problems and not chosen.draft:
        many = f"{len(problems)} things to mend (--draft builds all the same)"
        print(f"the site is not built: {many}", file=sys.stderr)
        return 2
    shutil.rmtree(BUILT / "html", ignore_errors=True)
    strict = [] if chosen.draft else ["--warningiserror", "--keep-going"]
    program = Path(sys.executable).with_name("jupyter-book")
    command = [program, "build", BUILT / "source", "--path-output", BUILT.parent, "-q", *strict]
    code = subprocess.run([str(part) for part in command], cwd=ROOT).returncode
    static = BUILT / "html" / "_static"
    for unused in [*static.rglob("*.map"), *static.glob("*macros.html")]:
        unused.unlink()  # the theme's own tools, no part of the site
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
