"""The product images: many at once, politely, resumable at any point; only what decodes counts.

An image is streamed to a temporary file, decoded whole, put in its place, and only then is its row
in the manifest committed. What all requests of this room share (proxies, retries, the SQLite file,
the bar) is here too.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, ProgressColumn, TimeRemainingColumn
from tenacity import RetryCallState, retry, retry_if_exception, stop_after_attempt
from tenacity import wait_random_exponential as jitter

from lavic_utils.config import UserError
from lavic_utils.data import FORMATS, MIN_SIDE, open_image, read_catalogue, read_stage1_valid
from lavic_utils.hub import check_proxies

MANIFEST = "images.sqlite"
SCHEMA = """PRAGMA synchronous=NORMAL; CREATE TABLE IF NOT EXISTS images
(name TEXT PRIMARY KEY, url TEXT NOT NULL, status TEXT NOT NULL, error TEXT);"""
MAX_PIXELS = 64_000_000
MAX_REDIRECTS = 5
GIVE_UP = 50  # images in a row that no answer came for: the network or the server is down
LONGEST_WAIT = 60.0  # seconds, whatever Retry-After says
HEADERS = {"User-Agent": "lavic-companion", "Accept-Encoding": "identity"}  # bytes as stored


class Permanent(Exception):
    """Asking again would give the same."""


# ---------------------------------------------------------------- what all requests share
def status_code(error: BaseException) -> int:
    """That of the answer (of httpx or openai); 0 for any other error."""
    return error.response.status_code if hasattr(error, "response") else 0


def one_line(error: BaseException) -> str:
    """What went wrong, short."""
    if code := status_code(error):
        return f"HTTP {code}"
    return " ".join(str(error).split())[:200] or type(error).__name__


def again(error: BaseException) -> bool:
    """May asking again help? After no answer, and after HTTP 408, 409, 425, 429 and 5xx."""
    code = status_code(error)
    no_answer = isinstance(error, (httpx.TransportError, TimeoutError))
    return no_answer or code in (408, 409, 425, 429) or code >= 500


def retrying(attempts: int, backoff: float):
    """Decorator: call again where that may help, after exponential waits with jitter (seconds),
    never shorter than the server's Retry-After (at most LONGEST_WAIT)."""

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception()
        asked = error.response.headers.get("retry-after", "") if status_code(error) else ""
        least = float(asked) if asked.isdecimal() else 0.0
        return max(jitter(backoff, LONGEST_WAIT)(state), min(least, LONGEST_WAIT))

    stop = stop_after_attempt(attempts)
    return retry(retry=retry_if_exception(again), stop=stop, wait=wait, reraise=True)


def bar(*columns: ProgressColumn) -> Progress:
    """Progress on stderr where that is a terminal; elsewhere only errors belong there."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@cache
def is_private(host: str) -> bool:
    """Does a host lead to this machine or into a private network? Its name is looked up."""
    with suppress(OSError, ValueError):  # no such name
        found = socket.getaddrinfo(host, None)
        return any(not ip_address(address[0]).is_global for *_, address in found)
    return False


def data_server() -> str:
    """The address that the user named in LAVIC_DATA_URL ("" where there is none): a mirror of the
    files, or his own server of images."""
    return os.environ.get("LAVIC_DATA_URL", "").strip().rstrip("/")


def guard(request: httpx.Request) -> None:
    """Before every request, redirected ones too: Permanent where there is no host to ask, and where
    it is a private one that the user did not name himself (`data_server`)."""
    url = request.url
    if url.scheme not in ("http", "https") or not url.host or not 0 < (url.port or 80) < 2**16:
        raise Permanent(f"{url.scheme}: with this host and port is no address on the web")
    with suppress(ValueError):  # LAVIC_DATA_URL is no address
        if url.host == urlsplit(data_server()).hostname:
            return
    if is_private(url.host):
        why = "a private address, which is refused unless LAVIC_DATA_URL names its host"
        raise Permanent(f"{url.host}: {why}")


def direct(address: str) -> dict[str, None]:
    """`mounts` of an HTTP client: the host of this address, if private, is asked without a proxy.
    UserError for a proxy that cannot be used."""
    check_proxies()
    with suppress(ValueError):  # not an address
        host = urlsplit(address).hostname or ""
        if is_private(host):
            return {f"all://[{host}]" if ":" in host else f"all://{host}": None}
    return {}


@contextmanager
def database(path: Path, schema: str, advice: str) -> Iterator[sqlite3.Connection]:
    """A SQLite file held by this process alone; a row is committed when its statement returns.
    UserError, with this advice, where it cannot be used."""
    with suppress(OSError):  # SQLite says what is wrong with the folder
        path.parent.mkdir(parents=True, exist_ok=True)
    options = {"isolation_level": None, "timeout": 0.5, "check_same_thread": False}
    try:
        with closing(sqlite3.connect(path, **options)) as base:
            how = "PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL; "
            base.executescript(f"{how}{schema}BEGIN IMMEDIATE; COMMIT;")
            yield base
    except sqlite3.Error as error:
        todo = "another run uses it; wait for it" if "locked" in str(error) else advice
        raise UserError(f"{path}: cannot be used ({one_line(error)}); {todo}") from None


# ---------------------------------------------------------------- images
@dataclass(frozen=True)
class Settings:
    """Seconds: `backoff`, `timeout` without a byte, `total` for one image, of `max_bytes`."""

    concurrency: int = 32
    attempts: int = 5
    backoff: float = 1.0
    timeout: float = 20.0
    total: float = 120.0
    max_bytes: int = 32 * 2**20


def image_links(root: Path, first_only: bool = False) -> dict[str, str]:
    """File below the data folder -> link ("" where none is given), of the item files present.
    `first_only`: of train_images only ASIN_0.jpg, all that recommendation uses."""
    links = {}
    if (root / "item2meta_train.json").is_file():
        for item in read_catalogue(root).values():
            for k, link in enumerate(item.images[:1] if first_only else item.images):
                links[f"train_images/{item.asin}_{k}.jpg"] = link
    if (root / "item2meta_valid.jsonl").is_file():
        links |= {f"valid_images/{row.image_name}": row.link for row in read_stage1_valid(root)}
    return links


def image_fault(path: Path) -> str | None:
    """Why a file is no image that counts: absent, of another kind, huge, cut; None if it is one."""
    try:
        with Image.open(path, formats=FORMATS) as header:
            width, height = header.size
    except Exception as error:  # broken files make Pillow raise nearly anything
        return f"not an image ({type(error).__name__})"
    if width * height > MAX_PIXELS:
        return f"{width} x {height} pixels are too many"
    if min(width, height) < MIN_SIDE:
        return f"{width} x {height} pixels: a shop's placeholder"
    return "an image that is cut or corrupt" if open_image(path) is None else None


async def _download(client: httpx.AsyncClient, link: str, part: Path, settings: Settings) -> None:
    """Stream a link to `part`."""
    async with asyncio.timeout(settings.total), client.stream("GET", link) as response:
        response.raise_for_status()
        with part.open("wb") as file:
            async for chunk in response.aiter_raw():
                file.write(chunk)
                if file.tell() > settings.max_bytes:
                    raise Permanent(f"more than {settings.max_bytes} bytes")


async def _image(
    client: httpx.AsyncClient, path: Path, link: str, settings: Settings
) -> tuple[str, str | None]:
    """Get one image; its status (`ok`, `failed` for good, `unreached`) and what went wrong."""
    part = path.with_name(f".{path.name}.part")
    download = retrying(settings.attempts, settings.backoff)(_download)
    try:
        await download(client, link, part, settings)
        if fault := await asyncio.to_thread(image_fault, part):
            return "failed", fault
        os.replace(part, path)
        return "ok", None
    except Exception as error:  # a bad link can raise nearly anything, and ends no crawl
        if isinstance(error, OSError) and not again(error):
            raise  # the disk's: the next image would fail alike
        return "unreached" if again(error) else "failed", one_line(error)
    finally:
        part.unlink(missing_ok=True)


async def _crawl(
    root: Path, base: sqlite3.Connection, todo: dict[str, str], settings: Settings
) -> Counter[str]:
    """Get all of `todo` (file -> link), record each, and count them by status."""
    counts, queue, unreached = Counter[str](), iter(todo.items()), 0

    async def check(request: httpx.Request) -> None:
        await asyncio.to_thread(guard, request)  # a host's name is looked up

    options = {"headers": HEADERS, "timeout": settings.timeout, "mounts": direct(data_server())}
    options |= {"follow_redirects": True, "max_redirects": MAX_REDIRECTS}
    options |= {"event_hooks": {"request": [check]}, "verify": httpx.create_ssl_context()}

    async def work() -> None:
        nonlocal unreached
        # a client each: one shared pool looks through all its connections at every request
        async with httpx.AsyncClient(**options) as client:
            for name, link in queue:
                status, error = await _image(client, root / name, link, settings)
                row = name, link, status, error
                base.execute("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?)", row)
                counts[status] += 1
                progress.advance(task)
                unreached = unreached + 1 if status == "unreached" else 0
                if unreached >= GIVE_UP:
                    raise UserError(
                        f"{unreached} images in a row were not reached (last: {link}, {error}); "
                        "check the network or wait, then run the same command: it goes on"
                    )

    with bar(MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=len(todo))
        await asyncio.gather(*(work() for _ in range(min(settings.concurrency, len(todo)))))
    return counts


def crawl(root: Path, first_only: bool = False, settings: Settings | None = None) -> Counter[str]:
    """Get every image that is not there yet (a file is never replaced: `verify` names bad ones).
    Counts: `ok`, `failed` and `unreached` of this run, `had` before it, `failed_before` (not asked
    for again while the manifest says so), `no_link`. UserError: no item file, folder not writable,
    no network."""
    every, todo, before = image_links(root, first_only), {}, Counter[str]()
    if not every:
        raise UserError(f"{root}: no item files; run `python -m lavic_utils data fetch`")
    try:
        for name in ("train_images", "valid_images"):
            (root / name).mkdir(exist_ok=True)
        with database(root / MANIFEST, SCHEMA, "make room, or delete it: images stay") as base:
            known = dict(base.execute("SELECT name, status || ' ' || url FROM images"))
            for name, link in every.items():
                link = link.encode("utf-8", "replace").decode()  # no lone surrogate can be stored
                if (root / name).is_file():
                    before["had"] += 1
                elif not link:
                    before["no_link"] += 1
                elif known.get(name) == f"failed {link}":
                    before["failed_before"] += 1
                else:
                    todo[name] = link
            # those that no answer came for stand last: they keep nothing else from being tried
            order = sorted(todo, key=lambda name: known.get(name) == f"unreached {todo[name]}")
            todo = {name: todo[name] for name in order}
            return before + asyncio.run(_crawl(root, base, todo, settings or Settings()))
    except OSError as error:
        raise UserError(
            f"{root}: cannot be written ({one_line(error)}); make room or choose another folder"
        ) from None


def summary(counts: Counter[str]) -> str:
    """The one line at the end of a crawl."""
    return (
        f"images: {counts['had'] + counts['ok']} there ({counts['ok']} new), "
        f"{counts['failed'] + counts['failed_before']} cannot be had ({counts['failed']} new; "
        f"{MANIFEST} says why; without it they are asked for again), "
        f"{counts['unreached']} not reached (asked again next time), "
        f"{counts['no_link']} without a link"
    )
