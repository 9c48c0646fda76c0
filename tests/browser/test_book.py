"""The built site (make book): every page whole and readable, from a file system and under a
sub-path, in a real browser.

Each check is a function that returns what is wrong, and is itself tested on a page that is wrong in
that way."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import unavailable

SITE = Path(__file__).resolve().parents[2] / "docs" / "_build" / "html"

HEADINGS = """() => {
  const all = [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")];
  const seen = all.filter((h) => h.checkVisibility());
  const levels = seen.map((h) => Number(h.tagName[1]));
  const skips = seen.filter((h, i) => i && levels[i] > levels[i - 1] + 1);
  const wrong = skips.map((h) => `skips a level: ${h.outerHTML}`);
  const tops = levels.filter((level) => level === 1).length;
  if (tops === 1 && levels[0] === 1) return wrong;
  return [...wrong, `${tops} h1, first heading h${levels[0]}`];
}"""

# WCAG 2 contrast of every text that can be seen, against what lies behind it: 4.5, or 3 for large
# text.
CONTRAST = """() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const pixel = canvas.getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const rgba = (colour) => {
    if (!known.has(colour)) {
      pixel.clearRect(0, 0, 1, 1);
      pixel.fillStyle = colour;
      pixel.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = pixel.getImageData(0, 0, 1, 1).data;
      known.set(colour, [r, g, b, a / 255]);
    }
    return known.get(colour);
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((c, i) => c * a + below[i] * (1 - a));
  const grounds = new Map();
  const ground = (element) => {
    const dark = document.documentElement.dataset.theme === "dark";
    if (!element) return dark ? [0, 0, 0] : [255, 255, 255];
    if (!grounds.has(element)) {
      const own = rgba(getComputedStyle(element).backgroundColor);
      grounds.set(element, over(own, ground(element.parentElement)));
    }
    return grounds.get(element);
  };
  const light = (colour) => {
    const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = colour.map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const bad = new Map();
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    const how = { opacityProperty: true, visibilityProperty: true };
    if (!texts.currentNode.data.trim() || !element.checkVisibility(how)) continue;
    const style = getComputedStyle(element);
    const behind = ground(element);
    const [a, b] = [light(over(rgba(style.color), behind)), light(behind)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const size = parseFloat(style.fontSize);
    const least = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
    const text = element.textContent.trim().slice(0, 30);
    const what = `${element.tagName} .${element.className} ${style.color}`;
    if (ratio < least) bad.set(what, `${ratio.toFixed(2)} "${text}"`);
  }
  return [...bad].map(([what, how]) => `${what}: ${how}`);
}"""

OVERFLOW = """() => {
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  return wide > 0 ? [`the page scrolls sideways by ${wide} pixels`] : [];
}"""

NAMES = """() => [...document.querySelectorAll("a[href], button, select, input:not([type=hidden])")]
  .filter((e) => e.checkVisibility() && !(e.textContent.trim() || e.ariaLabel || e.title
    || e.placeholder || e.labels?.length || e.querySelector("img[alt]:not([alt=''])")))
  .map((e) => `nothing says what this is: ${e.outerHTML.slice(0, 120)}`)"""

# Unfolds all that is folded and stills every movement, so that what a reader may come to see is
# judged.
UNFOLD = """() => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
  const still = document.createElement("style");
  still.textContent = "* { transition: none !important; }";
  document.head.append(still);
}"""


class Source(HTMLParser):
    """What a page holds: its ids, what it refers to, pictures without alternative text, and its
    language."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.mute: list[str] = []
        self.lang = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        self.links += [found[name] for name in ("href", "src") if found.get(name)]
        if tag == "img" and not found.get("alt", "").strip():
            self.mute.append(found.get("src", "")[:80])
        if tag == "html":
            self.lang = found.get("lang", "")


def sources(folder: Path) -> dict[Path, Source]:
    return {p: Source(p.read_text(encoding="utf-8")) for p in sorted(folder.rglob("*.html"))}


def broken_links(folder: Path) -> list[str]:
    """Links within the folder's pages that lead to no file or no anchor, or by an absolute path,
    which holds nowhere else."""
    pages = sources(folder)
    wrong = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = (
                target.is_file()
                and target.is_relative_to(folder)
                and not parts.path.startswith("/")
            )
            anchor = unquote(parts.fragment)
            if not there or (anchor and target in pages and anchor not in pages[target].ids):
                wrong.append(f"{path.relative_to(folder)}: {link}")
    return wrong


def mute_pictures(folder: Path) -> list[str]:
    """Pictures without alternative text."""
    return [
        f"{p.relative_to(folder)}: {src}"
        for p, page in sources(folder).items()
        for src in page.mute
    ]


def without_language(folder: Path) -> list[str]:
    """Pages that do not say which language they are in."""
    return [str(p.relative_to(folder)) for p, page in sources(folder).items() if not page.lang]


@pytest.fixture(scope="module")
def site() -> Path:
    if not (SITE / "index.html").is_file():
        unavailable("the site is not built: make book")
    return SITE


@pytest.fixture(scope="module")
def names(site: Path) -> list[str]:
    return sorted(
        p.relative_to(site).as_posix() for p in site.rglob("*.html") if "_static" not in p.parts
    )


@pytest.fixture(scope="module")
def address(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The site on a local server, two folders below its root."""
    root = tmp_path_factory.mktemp("server")
    (root / "some").mkdir()
    (root / "some" / "where").symlink_to(site, target_is_directory=True)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *about) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/some/where"
        server.shutdown()


def on_every_page(
    page, errors: list[str], base: str, names: list[str], look: Callable[[], list[str]]
) -> list[str]:
    """Open each page; returns its errors, its requests outside `base`, and what `look` finds in
    it."""
    wrong: list[str] = []
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    for name in names:
        page.goto(f"{base}/{name}", wait_until="load")
        strangers = [f"asks for {url}" for url in requested if not url.startswith((base, "data:"))]
        wrong += [f"{name}: {what}" for what in [*errors, *strangers, *look()]]
        errors.clear()
        requested.clear()
    return wrong


def test_links_pictures_and_language(site: Path) -> None:
    assert broken_links(site) == []
    assert mute_pictures(site) == []
    assert without_language(site) == []


def test_the_checks_of_the_source_see_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<html><p id="x"><a href="b.html#y">1</a><a href="c.html">2</a><a href="/a.html">3</a>'
        '<a href="#x">fine</a><img src="b.html"><img src="b.html" alt="fine">',
        encoding="utf-8",
    )
    (tmp_path / "b.html").write_text(
        '<html lang="en"><a href="a.html#x">fine</a>', encoding="utf-8"
    )
    assert broken_links(tmp_path) == ["a.html: b.html#y", "a.html: c.html", "a.html: /a.html"]
    assert mute_pictures(tmp_path) == ["a.html: b.html"]
    assert without_language(tmp_path) == ["a.html"]


def test_every_page_from_the_file_system(
    page, errors: list[str], site: Path, names: list[str]
) -> None:
    """No error, no request beyond the site; headings in order, controls named, contrast in both
    modes, narrow screens."""
    assert len(names) > 20

    def look() -> list[str]:
        page.evaluate(UNFOLD)
        wrong = page.evaluate(HEADINGS) + page.evaluate(NAMES)
        grounds = set()
        for theme in ("light", "dark"):
            page.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
            wrong += [f"{theme}: {what}" for what in page.evaluate(CONTRAST)]
            grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(grounds) == 2, "the page does not change with the mode"
        page.set_viewport_size({"width": 390, "height": 844})
        wrong += page.evaluate(OVERFLOW)
        page.set_viewport_size({"width": 1280, "height": 900})
        return wrong

    wrong = on_every_page(page, errors, site.as_uri(), names, look)
    assert not wrong, "\n".join(wrong)


def test_every_page_under_a_sub_path(
    page, errors: list[str], address: str, names: list[str]
) -> None:
    wrong = on_every_page(page, errors, address, names, lambda: [])
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("check", "bad", "good"), [
    (HEADINGS, "<h1>a</h1><h3>b</h3>", "<h1>a</h1><h2>b</h2><h3>c</h3><h2>d</h2>"),
    (HEADINGS, "<h1>a</h1><h1>b</h1>", "<h1>a</h1><h1 hidden>b</h1>"),
    (HEADINGS, "<h2>a</h2>", "<h1>a</h1>"),
    (CONTRAST, '<p style="color: #888">grey</p>', '<p style="color: #666">grey</p>'),
    (CONTRAST, '<div style="background: #333"><p>black on dark</p></div>',
     '<div style="background: #333"><p style="color: white">white</p></div>'),
    (CONTRAST, '<p style="color: #0008">half seen</p>',
     '<p style="color: #888; font-size: 24px">large</p>'),
    (OVERFLOW, '<div style="width: 3000px">wide</div>',
     '<div style="overflow-x: auto"><div style="width: 3000px">wide</div></div>'),
    (NAMES, '<button><i></i></button>', '<button aria-label="close"><i></i></button>'),
    (NAMES, "<input>", "<label>words <input></label>"),
])  # fmt: skip
def test_the_checks_in_the_page_see_what_is_wrong(page, check: str, bad: str, good: str) -> None:
    page.set_content(bad)
    assert page.evaluate(check)
    page.set_content(good)
    assert page.evaluate(check) == []


def test_a_page_that_fails_is_noticed(page, errors: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        '<script>oops()</script><img src="http://127.0.0.1:9/x.png">', encoding="utf-8"
    )
    found = " ".join(
        on_every_page(page, errors, tmp_path.as_uri(), ["bad.html"], lambda: ["looked"])
    )
    assert (
        "oops is not defined" in found
        and "asks for http://127.0.0.1:9/x.png" in found
        and "looked" in found
    )


def test_the_ledger_sorts_and_filters_by_keyboard(page, errors: list[str], site: Path) -> None:
    page.goto(f"{site.as_uri()}/docs/claims.html")
    table = page.locator("table.sortable").first
    rows = table.locator("tbody tr")
    total = rows.count()
    assert total > 100
    published = [h.strip(" ↕") for h in table.locator("thead th").all_inner_texts()].index(
        "published"
    )

    def column() -> list[float]:
        shown = table.locator(f"tbody tr td:nth-child({published + 1})").all_inner_texts()
        return [float(v) if v != "–" else float("nan") for v in shown]

    head = table.locator("thead th").nth(published)
    assert head.get_attribute("aria-sort") is None
    for sense, ascending in (("ascending", True), ("descending", False)):
        head.get_by_role("button").focus()
        page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == sense
        numbers = [v for v in column() if v == v]
        assert (
            numbers == sorted(numbers, reverse=not ascending)
            and column()[: len(numbers)] == numbers
        )  # empty ones last
    form = page.locator("form.filters").first
    form.get_by_label("domain").select_option("beauty")
    assert rows.locator("visible=true").count() == total // 3
    form.get_by_label("words").fill("w/o images")
    shown = rows.locator("visible=true").all_inner_texts()
    assert shown and all("beauty" in text and "w/o images" in text for text in shown)
    assert form.locator("output").inner_text() == f"{len(shown)} of {total} rows"
    assert errors == []


def test_search_finds_from_the_file_system(page, errors: list[str], site: Path) -> None:
    page.goto(f"{site.as_uri()}/search.html?q=perplexity")
    page.locator("#search-results li a").first.wait_for(timeout=10_000)
    assert "glossary" in " ".join(
        a.get_attribute("href") for a in page.locator("#search-results li a").all()
    )
    page.goto(f"{site.as_uri()}/search.html?q=qqqqzzzz")
    page.get_by_text("did not match any documents").wait_for(timeout=10_000)
    assert errors == []


def test_equations_are_drawn_without_a_script(page, site: Path) -> None:
    page.goto(f"{site.as_uri()}/notebooks/04_evaluation.html")
    box = page.locator(".equation math").first.bounding_box()
    assert box["width"] > 100 and box["height"] > 20
    assert "\\frac" not in page.locator("article").inner_text()


def test_answers_and_solutions_are_folded(page, site: Path) -> None:
    """A reader meets the question first; every folded cell is there, once opened."""
    for path in sorted((site.parents[2] / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        hidden = [
            c
            for c in cells
            if {"hide-cell", "hide-input"} & set(c["metadata"].get("tags", []))
            and "colab.py" not in "".join(c["source"])
        ]  # Colab's cell is not in the site
        page.goto(f"{site.as_uri()}/notebooks/{path.stem}.html")
        assert page.locator("article details[open]").count() == 0
        folded = page.locator("article details.hide")
        assert folded.count() == len(hidden)
        for fold, cell in zip(folded.all(), hidden, strict=True):
            assert not fold.locator("pre").first.is_visible()
            assert ("solution" in fold.locator("summary").inner_text()) == (
                "solution" in cell["metadata"]["tags"]
            )
            fold.locator("summary").click()
            assert (
                fold.locator("pre").first.inner_text().splitlines()[0]
                == "".join(cell["source"]).splitlines()[0]
            )


def test_the_ledger_fits_a_laptop(page, site: Path) -> None:
    # 1,400 wide, less what the scroll bars of page and box take; headless Chromium hides them
    page.set_viewport_size({"width": 1400 - 2 * 15, "height": 900})
    page.goto(f"{site.as_uri()}/docs/claims.html")
    for box in page.locator(".ledger").all():
        assert box.evaluate("box => box.scrollWidth - box.clientWidth") <= 0
    assert page.locator(".ledger small").first.is_visible()  # why a cell has its status


def test_pictures_can_be_read_on_a_phone(page, site: Path) -> None:
    """They keep their size and scroll in a box of their own, by keyboard too."""
    page.set_viewport_size({"width": 390, "height": 844})
    for name in ("index", "notebooks/00_start_here", "docs/gallery"):
        page.goto(f"{site.as_uri()}/{name}.html")
        pictures = page.locator(".bd-article :is(p, figure.kept a) > img")
        assert pictures.count() and all(
            picture.evaluate("""one => one.getBoundingClientRect().width > 600
                && one.parentElement.scrollWidth > one.parentElement.clientWidth
                && (one.parentElement.tabIndex == 0)""")
            for picture in pictures.all()
        ), name
        assert page.evaluate(OVERFLOW) == []


def test_a_notebook_page_offers_the_notebook(page, site: Path) -> None:
    page.goto(f"{site.as_uri()}/notebooks/02_self_distillation.html")
    link = page.get_by_role("link", name="Download this notebook")
    path = site / "notebooks" / link.get_attribute("href")
    given = json.loads(path.read_text(encoding="utf-8"))
    assert given["nbformat"] == 4 and any(cell.get("outputs") for cell in given["cells"])


def test_the_handout_is_one_page_of_paper(page, site: Path) -> None:
    page.goto(f"{site.as_uri()}/docs/handout.html")
    assert page.pdf(format="A4").count(b"/Type /Page\n") == 1
    page.goto(f"{site.as_uri()}/docs/teaching.html")  # negative control
    assert page.pdf(format="A4").count(b"/Type /Page\n") > 1


def test_slides_need_no_network_and_show_their_pictures(page, errors: list[str]) -> None:
    slides = SITE.parent / "slides"
    if not (slides / "index.html").is_file():
        unavailable("the slides are not made: make slides")
    wrong = on_every_page(page, errors, slides.as_uri(), ["index.html"], lambda: [])
    assert not wrong, "\n".join(wrong)
    assert page.locator(".slides section h2").count() > 20
    page.wait_for_selector(".reveal.ready")
    hidden = page.evaluate("""() => [...Array(Reveal.getTotalSlides()).keys()].flatMap(k => {
        const top = Reveal.getSlides()[k];
        const at = Reveal.getIndices(top);
        Reveal.slide(at.h, at.v);
        return [...top.querySelectorAll('img')].filter(one => !one.alt || one.width < 200);
    }).length""")
    assert hidden == 0
    cut = page.evaluate("""() => [...Array(Reveal.getTotalSlides()).keys()].flatMap(k => {
        const top = Reveal.getSlides()[k];
        const at = Reveal.getIndices(top);
        Reveal.slide(at.h, at.v);
        const all = [...top.querySelectorAll('p, table, pre, pre code')];
        return all.filter(one => one.scrollWidth > 1280
            || (one.tagName == 'CODE' && one.scrollHeight > one.clientHeight + 2)
            || one.offsetTop + one.offsetHeight > 720).map(one => one.innerText.slice(0, 60));
    })""")
    assert cut == []
    assert page.locator(".slides table").count() >= 5
