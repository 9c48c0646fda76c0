"""The proprietary rows: chat models asked over an OpenAI-compatible endpoint, and never a second bill for one answer.

An answer is committed to the cache before it counts, so a process killed at any moment loses at most the requests in
flight. Nothing is asked while the estimate is over the cap, and a run stops where its next request could pass it.
"""

from __future__ import annotations

import asyncio
import base64
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import astuple, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, stop_when_event_set

from lavic_utils.audit.inspection import mistral_tokens
from lavic_utils.config import UserError
from lavic_utils.data import FORMATS, open_image
from lavic_utils.provenance import key as key_of
from lavic_utils.remote.chat_api import ApiModel, Endpoint, Lost, Reply, Settings, address
from lavic_utils.remote.crawl import Permanent, Transient, reason, waiting

# Dated snapshots, so that nobody can change what answers. Prices: OpenAI's list of May 2026, as reported in November 2026
# without its discounts. Tokens of an image in low detail: as documented and as users measured them; gpt-4o-mini takes 33 times
# as many as gpt-4o, and so twice the dollars. OpenAI's deprecations page (November 2026) gives 2026-10-23 as the day on which
# gpt-3.5-turbo-0125 is shut down, 2027-01-14 for the other two: from then on a row needs an endpoint that still serves its
# model (`base_url`, `served`).
_GPT35 = ApiModel(
    "gpt-3.5-turbo-0125", images=False, usd_input=0.50, usd_output=1.50, until="2026-10-23"
)
_GPT4O_MINI = ApiModel(
    "gpt-4o-mini-2024-07-18",
    images=True,
    usd_input=0.15,
    usd_output=0.60,
    image_tokens=2833,
    until="2027-01-14",
)
_GPT4O = ApiModel(
    "gpt-4o-2024-08-06",
    images=True,
    usd_input=2.50,
    usd_output=10.00,
    image_tokens=85,
    until="2027-01-14",
)
MODELS = {
    "GPT-3.5-turbo (title)": _GPT35,
    "GPT-4o-mini (title)": _GPT4O_MINI,
    "GPT-4o (title)": _GPT4O,
    "GPT-4o-mini (title+image)": _GPT4O_MINI,
    "GPT-4o (title+image)": _GPT4O,
}
MAX_IMAGE = 20 * 2**20  # bytes of one image file; endpoints refuse larger ones
GIVE_UP = 20  # requests in a row that brought nothing: the endpoint or all requests are wrong, not one dialogue
FRAME = 16  # tokens a message beyond its text (role, separators): more than any chat format adds
SCHEMA = """CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT, input_tokens INTEGER NOT NULL,
output_tokens INTEGER NOT NULL, usd REAL NOT NULL, seconds REAL NOT NULL, error TEXT)"""


def build_messages(
    prompt_text: str, images: Sequence[tuple[str, Path]] = ()
) -> list[dict[str, Any]]:
    """One user message: the prompt and, for each candidate whose image can be read, its id and the file's own bytes.
    Raises UserError for an image of more than MAX_IMAGE bytes."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": prompt_text}]
    for name, path in images:
        if open_image(path) is None:
            continue
        if path.stat().st_size > MAX_IMAGE:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes, more than the {MAX_IMAGE} that are sent; make it smaller"
            )
        with Image.open(path, formats=FORMATS) as image:
            kind = image.get_format_mimetype()
        content = base64.b64encode(path.read_bytes()).decode()
        parts += [
            {"type": "text", "text": f"{name}:"},
            {
                "type": "image_url",
                "image_url": {"url": f"data:{kind};base64,{content}", "detail": "low"},
            },
        ]
    return [{"role": "user", "content": parts if len(parts) > 1 else prompt_text}]


def _most_tokens(messages: Sequence[dict[str, Any]], model: ApiModel) -> int:
    """Input tokens at most. Text is counted in Mistral's tokens, which are there offline: OpenAI's two vocabularies need at
    most 0.91 times as many on each of the 1,970 published test dialogues; a third of the characters is often too few."""
    texts, images = [], 0
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts += [part["text"] for part in parts if part["type"] == "text"]
        images += sum(part["type"] == "image_url" for part in parts)
    if images and not model.images:
        raise UserError(
            f"{model.served} takes no images, and a request holds {images}; ask a model that does"
        )
    return int(mistral_tokens(texts).sum()) + images * model.image_tokens + FRAME * len(messages)


@contextmanager
def _answers(path: Path) -> Iterator[sqlite3.Connection]:
    """The cache, held by this process alone; a row is on the disk when its statement returns."""
    with suppress(OSError):  # SQLite says what is wrong with the folder
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(path, isolation_level=None, timeout=0.5)) as base:
            for line in (
                "PRAGMA locking_mode=EXCLUSIVE",
                "PRAGMA journal_mode=WAL",
                "PRAGMA synchronous=FULL",
                SCHEMA,
                "BEGIN IMMEDIATE",
                "COMMIT",
            ):
                base.execute(line)
            yield base
    except sqlite3.Error as error:
        todo = (
            "another run uses it; wait for it"
            if "locked" in str(error)
            else "make room, or name another file"
        )
        raise UserError(f"{path}: answers cannot be kept there ({reason(error)}); {todo}") from None


@dataclass(frozen=True)
class _Plan:
    """`keys` of the requests, `found` answers by key, and `todo`: key -> (index of a request, its input tokens at most)."""

    keys: list[str]
    found: dict[str, Reply]
    todo: dict[str, tuple[int, int]]

    def sums(self, model: ApiModel, settings: Settings) -> dict[str, Any]:
        tokens = sum(tokens for _, tokens in self.todo.values())
        return {
            "requests": len(self.keys),
            "cached": sum(key in self.found for key in self.keys),
            "input_tokens": tokens,
            "usd": model.usd(tokens, settings.max_tokens * len(self.todo)),
        }


def _plan(
    requests: Sequence[list[dict]],
    model: ApiModel,
    settings: Settings,
    base: sqlite3.Connection | None,
) -> _Plan:
    asked = {
        "endpoint": address(settings)[0],
        "model": settings.served or model.served,
        **settings.parameters,
    }
    plan = _Plan([], {}, {})
    for index, messages in enumerate(requests):
        plan.keys.append(
            key := key_of(messages=messages, **asked)
        )  # images are in the messages, with all their bytes
        if key in plan.found or key in plan.todo:
            continue
        row = (
            base.execute("SELECT * FROM answers WHERE key = ?", (key,)).fetchone() if base else None
        )
        if row:
            plan.found[key] = Reply(*row[1:], cached=True)
        else:
            plan.todo[key] = index, _most_tokens(messages, model)
    return plan


def estimate(
    requests: Sequence[list[dict]], model: ApiModel, settings: Settings, cache: Path
) -> dict[str, Any]:
    """`requests`, `cached` (those whose answer is there), and `input_tokens` and `usd` at most of all that is to be asked."""
    with _answers(cache) if cache.is_file() else nullcontext() as base:
        return _plan(requests, model, settings, base).sums(model, settings)


class _Run:
    """Asks for what is to be asked. Once something stops it (`line`), what is in flight still arrives and is kept."""

    def __init__(
        self, endpoint: Endpoint, base: sqlite3.Connection, found: dict[str, Reply]
    ) -> None:
        self.endpoint, self.settings, self.base, self.found = (
            endpoint,
            endpoint.settings,
            base,
            found,
        )
        self.spent, self.reserved, self.dearer, self.nothing = 0.0, 0.0, 1.0, 0
        self.halted, self.line = asyncio.Event(), ""

    def halt(self, line: str) -> None:
        self.line = self.line or line
        self.halted.set()

    async def ask(self, key: str, messages: list[dict], tokens: int) -> None:
        """Ask until there is a reply, commit it, count it. Halts instead where that is impossible or could pass the cap."""
        most = self.endpoint.model.usd(tokens, self.settings.max_tokens)
        need = most * self.dearer
        if self.spent + self.reserved + need > self.settings.max_usd + 1e-9:
            return self.halt(
                f"the next request could pass max_usd {self.settings.max_usd:g}: {self.spent:.6f} USD spent in "
                f"this run, {self.reserved:.6f} in flight, {need:.6f} for the next"
            )
        self.reserved += need
        try:
            reply = await self.retrying(messages, tokens, need)
        except (Transient, Permanent) as error:
            return self.halt(str(error))
        finally:
            self.reserved -= need
        if reply.kept:
            self.base.execute(
                "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", (key, *astuple(reply)[:-1])
            )
        self.found[key] = reply
        self.spent += reply.usd if reply.kept else need
        if reply.usd > most:  # the endpoint counts more than we do: reserve more from now on
            self.dearer = max(self.dearer, reply.usd / most)
        self.nothing = 0 if reply.kept else self.nothing + 1
        if self.nothing >= GIVE_UP:
            self.halt(f"{self.nothing} requests in a row brought nothing (last: {reply.error})")

    async def retrying(self, messages: list[dict], tokens: int, need: float) -> Reply:
        async for attempt in AsyncRetrying(
            stop=stop_after_attempt(self.settings.attempts) | stop_when_event_set(self.halted),
            reraise=True,
            wait=waiting(self.settings.backoff),
            sleep=self.rest,
            retry=retry_if_exception_type(Transient),
        ):
            with attempt:
                try:
                    return await self.endpoint.ask(messages, tokens)
                except Lost:
                    self.spent += need
                    raise

    async def rest(self, seconds: float) -> None:
        """Wait, unless the run is stopped meanwhile."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.halted.wait(), seconds)


async def _ask_all(
    requests, model: ApiModel, settings: Settings, cache: Path, on_progress
) -> list[Reply]:
    with _answers(cache) as base:
        plan = _plan(requests, model, settings, base)
        if plan.todo:
            run, sums = (
                _Run(Endpoint(model, settings), base, plan.found),
                plan.sums(model, settings),
            )
            if sums["usd"] > settings.max_usd:
                raise UserError(
                    f"{len(plan.todo)} requests to {run.endpoint.served} may cost {sums['usd']:.6f} USD "
                    f"({sums['input_tokens']} input tokens; {sums['cached']} of {len(plan.keys)} answers are there), "
                    f"more than max_usd {settings.max_usd:g}; nothing was asked: raise it or ask fewer"
                )
            of, queue = len(plan.found) + len(plan.todo), iter(plan.todo.items())

            async def work(most: int | None = None) -> None:
                for key, (index, tokens) in islice(queue, most):
                    if run.line:
                        return
                    await run.ask(key, requests[index], tokens)
                    on_progress(len(plan.found), of)

            async with run.endpoint.client:
                await work(1)  # alone: a wrong key, name or price shows before others are in flight
                await asyncio.gather(*(work() for _ in range(settings.concurrency)))
            if run.line:
                kept = sum(key in plan.found and plan.found[key].kept for key in plan.keys)
                raise UserError(
                    f"{run.line}; {kept} of {len(plan.keys)} answers are kept in {cache}, and the same command goes "
                    "on from there"
                )
    replies = []
    for key in plan.keys:
        replies.append(plan.found[key])
        plan.found[key] = replace(plan.found[key], cached=True)  # an equal request was asked once
    return replies


def ask_all(
    requests: Sequence[list[dict]],
    model: ApiModel,
    settings: Settings,
    cache: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Reply]:
    """A reply to each request, in order; equal ones are asked once, and what the cache holds is not asked at all.

    `requests` may make its items when they are read: a few are held at a time. `on_progress(done, of)` counts different
    requests. Raises UserError where the estimate or the next request passes the cap, where a request gets no answer, and
    for permanent errors: what was answered is kept. Raises Unavailable where the key is missing.
    """
    work = _ask_all(requests, model, settings, cache, on_progress or (lambda done, of: None))
    try:
        looping = bool(asyncio.get_running_loop())
    except RuntimeError:
        looping = False
    # a notebook's kernel runs a loop already, and a thread has but one
    return (
        ThreadPoolExecutor(1).submit(asyncio.run, work).result() if looping else asyncio.run(work)
    )
