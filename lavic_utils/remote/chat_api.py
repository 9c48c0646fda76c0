"""The proprietary rows: chat models behind an OpenAI-compatible service, under a cap in dollars.

An answer is committed before it counts and never paid for again: a process killed at any moment
loses the requests under way. Each attempt reserves the most it can cost before it is sent: the cap
is passed only where a service suddenly counts more tokens, and by the requests under way at most.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import openai
from PIL import Image
from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from lavic_utils.config import UserError
from lavic_utils.data import FORMATS, open_image
from lavic_utils.hub import Unavailable
from lavic_utils.provenance import key as key_of
from lavic_utils.remote.crawl import Permanent, again, bar, database, direct, one_line, retrying

KEY = "OPENAI_API_KEY"  # the key comes from there alone, and is taken out of all that comes back
OPENAI = "https://api.openai.com/v1"
# https, or this machine (its name is group 1); no user, password or query, which may be secrets
SERVICE = re.compile(
    r"(?:https?://(localhost|127(?:\.\d+){3}|\[::1\])|https://[\w.-]+)(?::\d{1,5})?(?:/[\w.~/-]*)?"
)
OVERFLOW = re.compile(
    r"context.?(length|window|size)|(prompt|input) is too long|reduce the length"
    r"|exceeds? the maximum number of tokens|max_new_tokens` must be",
    re.IGNORECASE,
)
GIVE_UP = 20  # requests in a row that brought nothing: all are wrong, not one dialogue
SCHEMA = """CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT, input_tokens
INTEGER NOT NULL, output_tokens INTEGER NOT NULL, usd REAL NOT NULL, seconds REAL NOT NULL);"""
INSERT = """INSERT OR REPLACE INTO answers (key, text, input_tokens, output_tokens, usd, seconds)
VALUES (?, ?, ?, ?, ?, ?)"""
Messages = list[dict]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ApiModel:
    """Its name at the service, USD a million tokens in and out, the day on which OpenAI stops
    serving it, tokens of an image in low detail (0: it sees none)."""

    served: str
    usd_input: float
    usd_output: float
    until: str
    image_tokens: int = 0

    def usd(self, input_tokens: int, output_tokens: int) -> float:
        return (input_tokens * self.usd_input + output_tokens * self.usd_output) / 1e6


# Dated snapshots. Prices: OpenAI's list of May 2026, as reported in November 2026, no discounts;
# image tokens as documented and as users measured; days from OpenAI's deprecations page of November
# 2026: from then on a row needs another service that serves its model (`base_url`, `served`).
GPT35 = ApiModel("gpt-3.5-turbo-0125", 0.50, 1.50, "2026-10-23")
GPT4O_MINI = ApiModel("gpt-4o-mini-2024-07-18", 0.15, 0.60, "2027-01-14", image_tokens=2833)
GPT4O = ApiModel("gpt-4o-2024-08-06", 2.50, 10.00, "2027-01-14", image_tokens=85)
MODELS = {
    "GPT-3.5-turbo (title)": GPT35,
    "GPT-4o-mini (title)": GPT4O_MINI,
    "GPT-4o (title)": GPT4O,
    "GPT-4o-mini (title+image)": GPT4O_MINI,
    "GPT-4o (title+image)": GPT4O,
}


@dataclass(frozen=True)
class Settings:
    """`max_usd`: what one run may cost at the model's list price, whoever answers; seconds:
    `timeout` without a byte, `backoff`; `served`: another name to ask for."""

    max_usd: float
    base_url: str | None = None
    concurrency: int = 8
    timeout: float = 60.0
    max_tokens: int = 20
    temperature: float = 0.0
    served: str | None = None
    attempts: int = 6
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.max_usd < math.inf:  # nan would unset the cap
            raise UserError(f"max_usd {self.max_usd}: give a number of dollars from 0 on")


@dataclass(frozen=True)
class Reply:
    """`text`, None where there is none and `error` why; `usd`, with attempts that may have been
    paid for. `cached`: nothing was paid in this run; `refused`: too long for the model's context.
    """

    text: str | None
    input_tokens: int
    output_tokens: int = 0
    usd: float = 0.0
    error: str | None = None
    cached: bool = False
    refused: bool = False


def address(settings: Settings) -> tuple[str, bool]:
    """The service's address, and whether it is on this machine. UserError for one that holds a
    secret, or that would carry the key in the clear."""
    given = settings.base_url or OPENAI
    match = SERVICE.fullmatch(given)
    if match is None:
        raise UserError(
            "base_url has to be https://HOST/PATH, or http://127.0.0.1:PORT/PATH on this machine, "
            f"with no user, password or query in it; the key belongs in {KEY}"
        )
    return given.rstrip("/"), match[1] is not None


def visible(text: str) -> str:
    """A text without its reasoning, also where that is cut or only its end is marked."""
    text = re.sub(r"<think(ing)?>.*?(</think(ing)?>|\Z)", "", text, flags=re.DOTALL)
    return re.split(r"</think(?:ing)?>", text)[-1].strip()


class Endpoint:
    """A model at a service, and what it has cost. Unavailable where a key is needed and not there,
    UserError for one that cannot be a key."""

    def __init__(self, model: ApiModel, settings: Settings) -> None:
        self.model, self.settings, self.lock = model, settings, Lock()
        self.served = settings.served or model.served
        self.spent = 0.0  # dollars at most: a request under way counts all that it can cost
        self.ahead = 0.0  # dollars at most of requests not yet sent
        self.dearer = 1.0  # how many times as much as reckoned an answer has cost
        self.stopped = False  # no attempt is sent any more
        self.key = os.environ.get(KEY, "").strip()
        where, here = address(settings)
        if not self.key and not here:
            raise Unavailable(
                f"needs a key in the environment variable {KEY}, which is not set; or name a "
                "service on this machine as base_url"
            )
        if not re.fullmatch(r"[\w.~+/=-]*", self.key, re.ASCII):  # RFC 6750
            raise UserError(f"{KEY} holds characters that no key has; set it again")
        self.client = openai.OpenAI(
            api_key=self.key or "none",
            base_url=where,
            timeout=settings.timeout,
            max_retries=0,  # those of `ask` reserve what they can cost
            http_client=openai.DefaultHttpxClient(mounts=direct([where]), follow_redirects=False),
        )

    def scrub(self, text: str) -> str:
        """The text without the key. A dummy of a few letters is no secret: answers may hold it."""
        if len(self.key) >= 8:
            text = re.sub(re.escape(self.key), "[key]", text, flags=re.IGNORECASE)
        return text.encode("utf-8", "replace").decode()

    def ask(self, messages: Messages, tokens: int) -> Reply:
        """Ask until there is a reply. Permanent where this attempt or all that is ahead could pass
        the cap, and where no request can succeed. One without an answer may have been paid for."""
        most, lost = self.model.usd(tokens, self.settings.max_tokens), 0.0
        with self.lock:
            self.ahead -= most

        @retrying(self.settings.attempts, self.settings.backoff)
        def attempt() -> Reply:
            nonlocal lost
            with self.lock:  # counted as paid before it is sent
                need, cap = most * self.dearer, self.settings.max_usd
                worst = self.spent + need + self.ahead * self.dearer
                if self.stopped or worst > cap + 1e-9:
                    raise Permanent(
                        f"asking {self.served} may cost {worst:.6f} USD ({self.spent:.6f} spent so "
                        f"far), more than max_usd {cap:g}: raise it or ask fewer"
                    )
                self.spent += need
            try:
                reply = self._once(messages, tokens)
            except TimeoutError:
                lost += need
                raise
            except (Permanent, openai.APIStatusError):
                with self.lock:
                    self.spent -= need
                raise
            with self.lock:
                self.spent += reply.usd - need
                self.dearer = max(self.dearer, reply.usd / most)
            return replace(reply, usd=reply.usd + lost)

        return attempt()

    def _once(self, messages: Messages, tokens: int) -> Reply:
        """One attempt. TimeoutError and APIStatusError: asking again may help. A request that is
        refused for what it holds is a reply without text."""
        try:
            got = self.client.chat.completions.with_raw_response.create(
                model=self.served,
                messages=messages,
                temperature=self.settings.temperature,
                max_tokens=self.settings.max_tokens,
            )
            return self._read(got.http_response.content, tokens)
        except openai.APIConnectionError as error:
            raise TimeoutError(f"no answer from the service ({type(error).__name__})") from None
        except openai.APIStatusError as error:
            code, body = error.status_code, error.body
            said = body.get("message") if isinstance(body, dict) else body
            said = self.scrub(" ".join(f"{said or error.message} {error.code or ''}".split())[:300])
            if code in (400, 413, 422):
                refused = OVERFLOW.search(said) is not None
                return Reply(None, tokens, error=f"HTTP {code}: {said}", refused=refused)
            if code in (401, 403):  # their texts like to quote the key, or half of it
                said = f"the service does not take the key in {KEY} for {self.served}"
            elif again(error) and error.code != "insufficient_quota":
                raise
            raise Permanent(f"HTTP {code}: {said}") from None

    def _read(self, body: bytes, tokens: int) -> Reply:
        """What HTTP 200 brought: a text is an answer, cut at max_tokens or not. Without usage it
        counts as the most it can have cost."""
        answer, text, finish = None, "", "no chat answer"
        with suppress(Exception):
            answer = json.loads(body)
            choice = answer["choices"][0]
            finish = choice.get("finish_reason")
            text = visible(choice["message"].get("content") or choice["message"]["refusal"])
        used = [tokens, self.settings.max_tokens]
        with suppress(Exception):
            counts = [answer["usage"][name] for name in ("prompt_tokens", "completion_tokens")]
            used = counts if all(type(n) is int and 0 <= n < 2**40 for n in counts) else used
        if not text:
            error = self.scrub(f"no text ({finish})")[:300]
            return Reply(None, *used, self.model.usd(*used), error)
        return Reply(self.scrub(text), *used, self.model.usd(*used))


def reason(model: ApiModel, settings: Settings) -> str | None:
    """Why a model cannot be asked here and now; None where it can. Where nothing may be spent, as
    in notebooks, nothing is asked, whatever keys the environment holds."""
    if settings.max_usd == 0:
        return (
            "costs money: run `python -m lavic_utils run METHOD --domain DOMAIN` with a key in "
            f"{KEY} or with --base-url, and --max-usd above 0"
        )
    try:
        Endpoint(model, settings)
    except UserError as error:
        return str(error)
    return None


def build_messages(prompt_text: str, images: Sequence[tuple[str, Path]] = ()) -> Messages:
    """One user message: the prompt and, for each candidate whose image can be read, its id and the
    JPEG file's own bytes; of any other kind the first picture, as PNG."""
    parts: list[dict] = [{"type": "text", "text": prompt_text}]
    for name, path in images:
        picture = open_image(path)
        if picture is None:
            continue
        kind, content = "jpeg", path.read_bytes()
        with Image.open(path, formats=FORMATS) as image:
            if image.format != "JPEG":
                held = io.BytesIO()
                picture.save(held, "PNG")
                kind, content = "png", held.getvalue()
        url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        parts.append({"type": "text", "text": f"{name}:"})
        parts.append({"type": "image_url", "image_url": {"url": url, "detail": "low"}})
    return [{"role": "user", "content": parts if len(parts) > 1 else prompt_text}]


def most_tokens(messages: Messages, model: ApiModel) -> int:
    """Input tokens of a request at most: one for two bytes of text (an English prompt with ids
    takes one for about three), those of its images, and the frame."""
    content, most = messages[0]["content"], 16
    for part in [{"text": content}] if isinstance(content, str) else content:
        if "text" in part:
            most += len(part["text"].encode("utf-8", "replace")) // 2 + 1
        else:
            most += model.image_tokens
    return most


def _ask_new(
    requests: Sequence[Messages],
    todo: dict[str, tuple[int, int]],
    found: dict[str, Reply],
    endpoint: Endpoint,
    base: sqlite3.Connection,
) -> None:
    """Ask for `todo`: replies go to `found`, answers are committed. Once something stops it, what
    is under way still arrives and is kept."""
    fruitless = 0  # requests in a row
    model, answer = endpoint.model, endpoint.settings.max_tokens
    endpoint.ahead = sum(model.usd(tokens, answer) for _, tokens in todo.values())

    def work(key: str) -> None:
        nonlocal fruitless
        if fruitless >= GIVE_UP:
            raise Permanent(f"{fruitless} requests in a row brought nothing")
        index, tokens = todo[key]
        try:
            reply = endpoint.ask(requests[index], tokens)
        except BaseException:
            endpoint.stopped = True
            raise
        with endpoint.lock:
            if reply.text:
                row = key, reply.text, reply.input_tokens, reply.output_tokens, reply.usd, 0.0
                base.execute(INSERT, row)
            found[key] = reply
            fruitless = 0 if reply.text or reply.refused else fruitless + 1

    first, *others = todo
    work(first)  # alone: a wrong key, name or price shows before others are under way
    with ThreadPoolExecutor(endpoint.settings.concurrency) as pool:
        with bar(MofNCompleteColumn(), TimeRemainingColumn()) as progress:
            try:
                list(progress.track(pool.map(work, others), len(others)))
            finally:
                endpoint.stopped = True


def ask_all(
    requests: Sequence[Messages], model: ApiModel, settings: Settings, cache: Path
) -> list[Reply]:
    """A reply to each request, in order; equal ones are asked once, and those whose answer the
    file `cache` holds not at all. `requests` may make its items when they are read.

    UserError where asking could pass the cap, where no request brought an answer, and where none
    can succeed: what was answered is kept. What brought no answer is logged by reason, and asked
    again by the next call."""
    asked = {"endpoint": address(settings)[0], "model": settings.served or model.served}
    asked |= {"temperature": settings.temperature, "max_tokens": settings.max_tokens}
    keys: list[str] = []
    found: dict[str, Reply] = {}
    todo: dict[str, tuple[int, int]] = {}  # key -> (index of a request, its input tokens at most)
    problem = ""
    with database(cache, SCHEMA, "make room, or name another file") as base:
        for index, messages in enumerate(requests):
            key = key_of(messages=messages, **asked)  # of all that is sent, images too
            keys.append(key)
            row = base.execute("SELECT * FROM answers WHERE key = ?", (key,)).fetchone()
            if row and row[1]:
                found[key] = Reply(*row[1:5], cached=True)
            else:
                todo[key] = index, most_tokens(messages, model)
        if todo:
            try:
                _ask_new(requests, todo, found, Endpoint(model, settings), base)
            except (Permanent, TimeoutError, openai.APIStatusError) as error:
                problem = one_line(error)
    kept = sum(key in found and found[key].text is not None for key in keys)
    if keys and not kept and not problem:
        problem = f"none of {len(keys)} requests brought an answer"
    reasons = Counter(reply.error for reply in found.values() if reply.error)
    unanswered = "".join(f"{count} x {why}; " for why, count in reasons.most_common(3))
    if problem:
        raise UserError(
            f"{problem}; {unanswered}{kept} of {len(keys)} answers are kept in {cache}, and the "
            "same command goes on from there"
        )
    if unanswered:
        log.warning("without an answer, and asked again next time: %s", unanswered.rstrip("; "))
    replies = []
    for key in keys:
        replies.append(found[key])
        found[key] = replace(found[key], cached=True)  # an equal request was asked once
    return replies
