"""A real browser for the tests of this folder: the system's Chromium, driven by Playwright, which
downloads none.

Where there is no Chromium, or no Playwright, the tests are skipped with the reason; with
LAVIC_BROWSER=required they fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import NoReturn

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def unavailable(reason: str) -> NoReturn:
    """Skip, or fail where LAVIC_BROWSER=required: CI must not pass because it could not look."""
    if os.environ.get("LAVIC_BROWSER") == "required":
        pytest.fail(f"{reason} (LAVIC_BROWSER=required)", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """One headless Chromium for the whole run (`playwright.sync_api.Browser`)."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        unavailable(
            f"no browser: none of {', '.join(NAMES)} is on the PATH "
            "(Debian: apt-get install chromium)"
        )
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable(
            "no browser: Python's playwright is not installed "
            "(it is in requirements.lock: make install)"
        )
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def errors() -> list[str]:
    """What `page` reports: errors on its console, uncaught exceptions, failed requests. Assert that
    it is empty."""
    return []


def watch(page, errors: list[str]):
    """Append to `errors` whatever goes wrong in the page from now on; returns the page."""
    page.on(
        "console",
        lambda said: errors.append(f"console: {said.text}") if said.type == "error" else None,
    )
    page.on("pageerror", lambda raised: errors.append(f"exception: {raised}"))

    def failed(request) -> None:
        if (
            request.failure != "net::ERR_ABORTED"
        ):  # the test itself left the page before an icon had come
            errors.append(f"request failed: {request.url} ({request.failure})")

    page.on("requestfailed", failed)
    return page


@pytest.fixture
def page(browser, errors: list[str]) -> Iterator:
    """An empty page in a context of its own (no cookies, no cache of other tests), watched by
    `errors`."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield watch(context.new_page(), errors)
    context.close()
