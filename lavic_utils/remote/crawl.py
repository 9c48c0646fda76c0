"""Downloading the product images: many at once, resumable at any point; nothing counts that does not decode.

An image is streamed to a temporary file, decoded whole, put in its place, and only then is its row in the manifest
committed: a process killed at any moment loses at most the images in flight.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
from PIL import Image
from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from lavic_utils.config import UserError
from lavic_utils.data import FORMATS, open_image, read_catalogue, read_stage1_valid

MANIFEST = "images.sqlite"
MAX_PIXELS = 64_000_000
MAX_REDIRECTS = 5
GIVE_UP = 50  # images in a row that no answer came for: the network or the server is down
LONGEST_WAIT = 60.0  # seconds, whatever Retry-After says
HEADERS = {
    "User-Agent": "lavic-companion",
    "Accept-Encoding": "identity",
}  # bytes as stored: sizes and ranges are exact
SCHEMA = """CREATE TABLE IF NOT EXISTS images (name TEXT PRIMARY KEY, url TEXT NOT NULL, status TEXT NOT NULL,
sha256 TEXT, width INTEGER, height INTEGER, bytes INTEGER, error TEXT, attempts INTEGER NOT NULL)"""
UPSERT = """INSERT INTO images VALUES (:name, :url, :status, :sha256, :width, :height, :bytes, :error, :attempts)
ON CONFLICT (name) DO UPDATE SET url = excluded.url, status = excluded.status, sha256 = excluded.sha256,
width = excluded.width, height = excluded.height, bytes = excluded.bytes, error = excluded.error,
attempts = attempts + excluded.attempts"""


class Permanent(Exception):
    """Asking again would give the same."""


class Transient(Exception):
    """Asking again may help; `retry_after`: seconds the server wants us to wait, or None."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


AGAIN = (Transient, httpx.TransportError, TimeoutError)


@dataclass(frozen=True)
class Settings:
    """`backoff`, `timeout` (without a byte) and `total` (one image) in seconds; `max_bytes` of one image."""

    concurrency: int = 32
    attempts: int = 5
    backoff: float = 1.0
    timeout: float = 20.0
    total: float = 120.0
    max_bytes: int = 32 * 2**20


def retry_after(value: str | None) -> float | None:
    """Seconds meant by a Retry-After header, a number or a date (RFC 9110, 10.2.3); None where it says nothing."""
    if value is None or value.isascii() and value.isdigit():
        return float(value) if value else None
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def waiting(backoff: float) -> Callable[[RetryCallState], float]:
    """Seconds to wait before the next attempt: exponential with full jitter, never less than Retry-After (capped)."""
    jitter = wait_random_exponential(multiplier=backoff, max=LONGEST_WAIT)

    def wait(state: RetryCallState) -> float:
        asked = getattr(state.outcome.exception(), "retry_after", None) if state.outcome else None
        return max(jitter(state), min(asked or 0.0, LONGEST_WAIT))

    return wait


def check_status(response: httpx.Response, *good: int) -> None:
    """Transient for 408, 425, 429 and 5xx, Permanent for anything else not `good`."""
    code = response.status_code
    if code in (408, 425, 429) or code >= 500:
        raise Transient(f"HTTP {code}", retry_after(response.headers.get("retry-after")))
    if code not in good:
        raise Permanent(f"HTTP {code}")


def reason(error: BaseException) -> str:
    """One short line of what went wrong."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def bar(*columns: ProgressColumn) -> Progress:
    """Progress on stderr where that is a terminal; elsewhere only errors belong there."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def image_links(root: Path, first_only: bool = False) -> dict[str, str]:
    """File below the data folder -> link ("" where none is given), of the item files present. `first_only` leaves out
    train_images/ASIN_k.jpg with k > 0, which recommendation does not use."""
    links = {}
    if (root / "item2meta_train.json").is_file():
        for item in read_catalogue(root).values():
            links |= {
                f"train_images/{item.asin}_{k}.jpg": link
                for k, link in enumerate(item.images)
                if not (first_only and k)
            }
    if (root / "item2meta_valid.jsonl").is_file():
        links |= {f"valid_images/{row.image_name}": row.link for row in read_stage1_valid(root)}
    return links


def decode(path: Path) -> tuple[int, int]:
    """Width and height in pixels of an image that decodes whole; Permanent for anything else."""
    try:
        with Image.open(path, formats=FORMATS) as header:
            width, height = header.size
    except Exception as error:  # broken files make Pillow raise nearly anything
        raise Permanent(f"not an image ({type(error).__name__})") from None
    if width * height > MAX_PIXELS:
        raise Permanent(f"{width} x {height} pixels are too many")
    if open_image(path) is None:
        raise Permanent("an image that is cut or corrupt")
    return width, height


@contextmanager
def manifest(root: Path) -> Iterator[sqlite3.Connection]:
    """The manifest, held by this process alone, each row committed as it is written."""
    path = root / MANIFEST
    try:
        with closing(sqlite3.connect(path, isolation_level=None, timeout=0.5)) as base:
            base.row_factory = sqlite3.Row
            for line in (
                "PRAGMA locking_mode=EXCLUSIVE",
                "PRAGMA journal_mode=WAL",
                "PRAGMA synchronous=NORMAL",
                SCHEMA,
                "BEGIN IMMEDIATE",
                "COMMIT",
            ):
                base.execute(line)
            yield base
    except sqlite3.Error as error:
        todo = (
            "another crawl runs here; wait for it"
            if "locked" in str(error)
            else "make room, or delete it: images stay"
        )
        raise UserError(f"{path}: cannot be used ({reason(error)}); {todo}") from None


class Crawler:
    """One run over `todo` (file -> link); `counts` holds how many ended with each status."""

    def __init__(self, root: Path, base: sqlite3.Connection, settings: Settings) -> None:
        self.root, self.base, self.settings = root, base, settings
        self.counts, self.unreached = Counter[str](), 0

    async def run(self, todo: dict[str, str], adopt: set[str], step: Callable[[], None]) -> None:
        queue, trusted = iter(todo.items()), httpx.create_ssl_context()

        async def work() -> (
            None
        ):  # a client each: one shared pool looks through all its connections at every request
            async with httpx.AsyncClient(
                verify=trusted, timeout=self.settings.timeout, headers=HEADERS
            ) as client:
                for name, link in queue:
                    self.record(
                        name, link, await self.image(client, self.root / name, link, name in adopt)
                    )
                    step()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.settings.concurrency, len(todo))):
                    group.create_task(work())
        except BaseExceptionGroup as several:  # the first says it; the others were cancelled for it
            raise several.exceptions[0] from None

    def record(self, name: str, link: str, found: dict[str, object]) -> None:
        empty = dict.fromkeys(("sha256", "width", "height", "bytes", "error"))
        self.base.execute(UPSERT, {**empty, "name": name, "url": link, **found})
        self.counts[str(found["status"])] += 1
        self.unreached = self.unreached + 1 if found["status"] == "unreached" else 0
        if self.unreached >= GIVE_UP:
            raise UserError(
                f"{self.unreached} images in a row could not be reached (last: {link}, {found['error']}); "
                "check the network or wait, then run the same command: it goes on from here"
            )

    async def image(
        self, client: httpx.AsyncClient, path: Path, link: str, adopt: bool
    ) -> dict[str, object]:
        """Get one image; what the manifest is to hold of it. `adopt`: a file that is there already may do."""
        part, attempts = path.with_name(f".{path.name}.part"), 0
        try:
            if adopt and (found := await asyncio.to_thread(_adopted, path)):
                return {**found, "status": "ok", "attempts": 0}
            async for attempt in AsyncRetrying(
                stop=stop_after_attempt(self.settings.attempts),
                reraise=True,
                wait=waiting(self.settings.backoff),
                retry=retry_if_exception_type(AGAIN),
            ):
                with attempt:
                    attempts += 1
                    async with asyncio.timeout(self.settings.total):
                        digest, size = await self.download(client, link, part)
            width, height = await asyncio.to_thread(decode, part)
            os.replace(part, path)
            return {
                "status": "ok",
                "attempts": attempts,
                "sha256": digest,
                "bytes": size,
                "width": width,
                "height": height,
            }
        except Permanent as error:
            return {"status": "failed", "attempts": attempts, "error": reason(error)}
        except AGAIN as error:
            return {"status": "unreached", "attempts": attempts, "error": reason(error)}
        finally:
            part.unlink(missing_ok=True)

    async def download(self, client: httpx.AsyncClient, link: str, part: Path) -> tuple[str, int]:
        """Stream the link to `part`: SHA-256 and bytes. Redirects are followed here, so that each target is looked at."""
        for _ in range(MAX_REDIRECTS + 1):
            try:
                address = httpx.URL(link)
            except httpx.InvalidURL:
                raise Permanent("not an address") from None
            if address.scheme not in ("http", "https") or not address.host:
                raise Permanent(f"an address of kind {address.scheme or 'none'}: is refused")
            async with client.stream("GET", address) as response:
                if not response.has_redirect_location:
                    check_status(response, 200)
                    return await self.save(response, part)
                link = str(address.join(response.headers["location"]))
        raise Permanent(f"more than {MAX_REDIRECTS} redirects")

    async def save(self, response: httpx.Response, part: Path) -> tuple[str, int]:
        digest, size, limit = (
            hashlib.sha256(),
            int(response.headers.get("content-length", 0)),
            self.settings.max_bytes,
        )
        if size > limit:
            raise Permanent(f"{size} bytes announced, more than {limit}")
        size = 0
        with part.open("wb") as file:
            async for chunk in response.aiter_raw():
                size += len(chunk)
                if size > limit:
                    raise Permanent(f"more than {limit} bytes")
                digest.update(chunk)
                file.write(chunk)
        return digest.hexdigest(), size


def _adopted(path: Path) -> dict[str, object] | None:
    try:
        width, height = decode(path)
    except Permanent:
        return None
    content = path.read_bytes()
    return {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "width": width,
        "height": height,
    }


def _needed(root: Path, row: sqlite3.Row | None, name: str, link: str, retry_failed: bool) -> bool:
    if row is None or row["url"] != link or row["status"] == "unreached":
        return True
    if row["status"] == "failed":
        return retry_failed
    path = root / name
    return not path.is_file() or path.stat().st_size != row["bytes"]


def crawl(
    root: Path,
    first_only: bool = False,
    retry_failed: bool = False,
    settings: Settings | None = None,
) -> Counter[str]:
    """Get every image that is not there yet. Counts: `ok`, `failed` and `unreached` of this run, `had` before it,
    `failed_before` (not asked again), `no_link`. UserError: no item file, folder not writable, no network."""
    every = image_links(root, first_only)
    if not every:
        raise UserError(
            f"{root}: no item2meta_train.json or item2meta_valid.jsonl; run `python -m lavic_utils data fetch`"
        )
    links = {name: link for name, link in every.items() if link}
    try:
        for name in ("train_images", "valid_images"):
            (root / name).mkdir(exist_ok=True)
        with manifest(root) as base:
            rows = {
                row["name"]: row
                for row in base.execute("SELECT name, url, status, bytes FROM images")
            }
            todo = {
                name: link
                for name, link in links.items()
                if _needed(root, rows.get(name), name, link, retry_failed)
            }
            adopt = {name for name in todo if name not in rows and (root / name).is_file()}
            crawler = Crawler(root, base, settings or Settings())
            with bar(TextColumn("images"), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
                task = progress.add_task("", total=len(todo))
                asyncio.run(crawler.run(todo, adopt, lambda: progress.advance(task)))
    except OSError as error:
        raise UserError(
            f"{root}: cannot be written ({reason(error)}); make room or choose another folder"
        ) from None
    before = Counter(rows[name]["status"] for name in links if name not in todo)
    return crawler.counts + Counter(
        had=before["ok"], failed_before=before["failed"], no_link=len(every) - len(links)
    )


def summary(counts: Counter[str]) -> str:
    """The one line at the end of a crawl."""
    return (
        f"images: {counts['had'] + counts['ok']} there ({counts['ok']} new), "
        f"{counts['failed'] + counts['failed_before']} cannot be had ({counts['failed']} new), "
        f"{counts['unreached']} not reached (asked again next time), {counts['no_link']} without a link"
    )
