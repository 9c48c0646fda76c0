"""The proprietary rows: chat models behind an OpenAI-compatible service, under a cap in dollars.

An answer is committed before it counts and never paid for again: a process killed at any moment
loses the requests under way. The cap: each attempt counts the most it can cost before it is sent,
and goes on counting it where the connection drops, since the service may have answered. A run
passes the cap only if a service counts more tokens than `most_tokens` says, and then by no more
than the requests under way.
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
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from urllib.parse import urlsplit

import openai
from PIL import Image
from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from lavic_utils.config import UserError
from lavic_utils.data import FORMATS, open_image
from lavic_utils.hub import Unavailable
from lavic_utils.provenance import key as key_of
from lavic_utils.remote import crawl
from lavic_utils.remote.crawl import Permanent

KEY = "OPENAI_API_KEY"  # the key comes from there alone, and is taken out of all that comes back
OPENAI = "https://api.openai.com/v1"
# https, or this machine (its name is group 1); no user, password or query, which may be secrets
SERVICE = re.compile(
    r"(?:https?://(localhost|127(?:\.\d+){3}|\[::1\])|https://[a-z\d-]{1,63}(?:\.[a-z\d-]{1,63})*)"
    r"(?::[1-9]\d{0,4})?(?:/[\w.~/-]*)?",
    re.IGNORECASE,
)
OVERFLOW = re.compile(
    r"context.?(length|window|size)|(prompt|input) is too long|reduce the length|too many tokens"
    r"|exceeds? the maximum number of tokens|max_new_tokens` must be|max(imum |_)model.len",
    re.IGNORECASE,
)
THOUGHT = "(?:think(?:ing)?|thought|reasoning|analysis|reflection)"
OPENED = rf"[<[◁]\|?(?:begin_of_|seed:)?{THOUGHT}\|?[>\]▷]"
CLOSED = rf"[<[◁](?:\|?/\|?(?:seed:)?|\|end_of_){THOUGHT}\|?[>\]▷]"
REASONING = re.compile(  # marked, also where it is cut; or all that stands before its end
    rf"{OPENED}.*?(?:{CLOSED}|\Z)|.*{CLOSED}"
    r"|<\|channel\|>.*?(?:<\|channel\|>final<\|message\|>|\Z)"  # gpt-oss
    r"|here(?:'s| is) my thought process:.*?(?:here(?:'s| is) my response:|\Z)",  # Granite
    re.DOTALL | re.IGNORECASE,
)
LONGEST_NAME = 100  # characters of a served model's name
LONGEST_TOKEN = 12  # characters, on average: where fewer tokens were read, the prompt was cut
GAVE_UP = (408, 499, 502, 504, *range(520, 525))  # a gateway did not wait for what it passed on
GIVE_UP = 20  # requests in a row that brought nothing: all are wrong, not one dialogue
SCHEMA = """CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT, input_tokens
INTEGER NOT NULL, output_tokens INTEGER NOT NULL, usd REAL NOT NULL, seconds REAL NOT NULL);"""
INSERT = """INSERT OR REPLACE INTO answers (key, text, input_tokens, output_tokens, usd, seconds)
VALUES (?, ?, ?, ?, ?, ?)"""
Messages = list[dict]
Requests = Sequence[Callable[[], Messages]]  # made when needed: ten pictures each take much memory
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ApiModel:
    """Its name at the service, USD a million tokens in and out, tokens of an image in low detail
    (0: it sees none)."""

    served: str
    usd_input: float
    usd_output: float
    image_tokens: int = 0

    def usd(self, input_tokens: int, output_tokens: int) -> float:
        return (input_tokens * self.usd_input + output_tokens * self.usd_output) / 1e6


# Dated snapshots. Prices: OpenAI's list of May 2026, as reported in November 2026, no discounts;
# image tokens as documented and as users measured. OpenAI's deprecations page of November 2026 has
# it serve GPT-3.5 until 2026-10-23, the others until 2027-01-14: from then on a row needs another
# service that serves its model (`base_url`, `served`).
GPT35 = ApiModel("gpt-3.5-turbo-0125", 0.50, 1.50)
GPT4O_MINI = ApiModel("gpt-4o-mini-2024-07-18", 0.15, 0.60, image_tokens=2833)
GPT4O = ApiModel("gpt-4o-2024-08-06", 2.50, 10.00, image_tokens=85)
MODELS = {
    "GPT-3.5-turbo (title)": GPT35,
    "GPT-4o-mini (title)": GPT4O_MINI,
    "GPT-4o (title)": GPT4O,
    "GPT-4o-mini (title+image)": GPT4O_MINI,
    "GPT-4o (title+image)": GPT4O,
}


@dataclass(frozen=True)
class Settings:
    """`max_usd`: what one run may cost at the list price of the row's model, whoever answers. None:
    a dollar; and a service on this machine or in its private network then costs nothing, while a
    cap that was given counts there too, since a gateway may pass requests on to one that bills.
    `served`: another model to ask for. Seconds: `timeout` without a byte, `backoff`. UserError for
    a cap that is none, or an address that holds a secret or would carry the key in the clear."""

    max_usd: float | None = None
    base_url: str = OPENAI
    concurrency: int = 8
    timeout: float = 60.0
    max_tokens: int = 20
    temperature: float = 0.0
    served: str | None = None
    attempts: int = 6
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.cap < math.inf:  # nan would unset the cap
            raise UserError(f"max_usd {self.max_usd}: give a number of dollars from 0 on")
        port = re.search(r":(\d+)(/|$)", self.base_url)
        if not SERVICE.fullmatch(self.base_url) or (port and int(port[1]) >= 2**16):
            raise UserError(
                "base_url has to be https://HOST/PATH, or http://127.0.0.1:PORT/PATH on this "
                f"machine, with no user, password or query in it; the key belongs in {KEY}"
            )
        if len(self.served or "") > LONGEST_NAME:
            raise UserError(f"served: a model's name has at most {LONGEST_NAME} characters")

    @property
    def cap(self) -> float:
        """Dollars that a run may cost."""
        return 1.0 if self.max_usd is None else self.max_usd

    def row(self, method: str) -> dict[str, str]:
        """What a row of a table says beside its figures. A model or a service that is not the
        paper's stands under a name of its own, `beside` the paper's `method`."""
        model, service = MODELS[method].served, urlsplit(self.base_url.rstrip("/").lower())
        asked = self.served or model
        by = f"{asked} at {service.netloc}{service.path.removesuffix('/v1')}"
        if service == urlsplit(OPENAI) and asked == model:
            return {"method": method, "answered_by": by}
        return {"method": f"{by} {method.partition(' ')[2]}", "answered_by": by, "beside": method}

    def priced(self, model: ApiModel) -> ApiModel:
        """The model with what it costs at this service."""
        if self.max_usd is None and crawl.is_private(urlsplit(self.base_url).hostname or ""):
            return replace(model, usd_input=0.0, usd_output=0.0)
        return model


@dataclass(frozen=True)
class Reply:
    """`text`, None where there is none and `error` why; `usd`, with attempts that may have been
    paid for. `cached`: nothing was paid in this run; `refused`: longer than the model's context."""

    text: str | None
    input_tokens: int
    output_tokens: int = 0
    usd: float = 0.0
    error: str | None = None
    cached: bool = False
    refused: bool = False


def texts(messages: Messages) -> list[str]:
    """Its prompt, and the id before each image."""
    content = messages[0]["content"]
    return [content] if isinstance(content, str) else [p["text"] for p in content if "text" in p]


def most_tokens(messages: Messages, model: ApiModel) -> int:
    """Input tokens of a request at most: one for two bytes of text (an English prompt with ids
    takes one for about three), those of its images, and the frame."""
    said, content = texts(messages), messages[0]["content"]
    images = 0 if isinstance(content, str) else len(content) - len(said)
    text = sum(len(one.encode("utf-8", "replace")) // 2 + 1 for one in said)
    return 16 + text + images * model.image_tokens


class Endpoint:
    """A model at a service, and what it has cost. Unavailable where a key is needed and not there,
    UserError for one that cannot be a key."""

    def __init__(self, model: ApiModel, settings: Settings) -> None:
        self.model, self.settings, self.lock = settings.priced(model), settings, Lock()
        self.served = settings.served or model.served
        self.spent = 0.0  # dollars at most: a request under way counts all that it can cost
        self.dearer = 1.0  # how many times as much as reckoned an answer has cost
        self.stopped: BaseException | None = None  # why no attempt is sent any more
        self.key = os.environ.get(KEY, "").strip()
        if not self.key and not SERVICE.fullmatch(settings.base_url)[1]:
            raise Unavailable(
                f"needs a key in the environment variable {KEY}, which is not set; or name a "
                "service on this machine as base_url"
            )
        if not re.fullmatch(r"[\w.~+/=-]*", self.key, re.ASCII):  # RFC 6750
            raise UserError(f"{KEY} holds characters that no key has; set it again")
        self.client = openai.OpenAI(
            api_key=self.key or "none",
            base_url=settings.base_url,
            timeout=settings.timeout,
            max_retries=0,  # those of `ask` reserve what they can cost
            http_client=openai.DefaultHttpxClient(
                mounts=crawl.direct(settings.base_url), follow_redirects=False
            ),
        )

    def check(self, most: float) -> None:
        """Permanent where so many dollars more could pass the cap."""
        if self.spent + most > self.settings.cap + 1e-9:
            raise Permanent(
                f"asking {self.served} may cost {self.spent + most:.6f} USD, of which "
                f"{self.spent:.6f} are spent; that is more than max_usd "
                f"{self.settings.cap:g}: raise it, or ask fewer with --limit"
            )

    def scrub(self, text: str) -> str:
        """The text without the key. A dummy of a few letters is no secret: answers may hold it."""
        if len(self.key) >= 8:
            text = re.sub(re.escape(self.key), "[key]", text, flags=re.IGNORECASE)
        return text.encode("utf-8", "replace").decode()

    def ask(self, messages: Messages, tokens: int) -> Reply:
        """Ask until there is a reply. Permanent where this attempt could pass the cap, and where no
        request can succeed."""
        most, lost = self.model.usd(tokens, self.settings.max_tokens), 0.0

        @crawl.retrying(self.settings.attempts, self.settings.backoff)
        def attempt() -> Reply:
            nonlocal lost
            with self.lock:  # counted as paid before it is sent
                need = most * self.dearer
                if self.stopped:
                    raise self.stopped
                self.check(need)
                self.spent += need
            try:
                reply = self._once(messages, tokens)
            except (Permanent, TimeoutError, openai.APIStatusError) as error:
                gave_up = crawl.status_code(error) in GAVE_UP
                if gave_up or isinstance(error, TimeoutError):
                    lost += need  # the model may have answered
                else:
                    with self.lock:
                        self.spent -= need
                raise
            with self.lock:
                self.spent += reply.usd - need
                self.dearer = max(self.dearer, reply.usd / (most or 1))
            return reply

        try:
            reply = attempt()
        except openai.APIStatusError as error:
            if error.status_code < 500:
                raise Permanent(self.words(error)) from None
            reply = self.refusal(error, tokens)  # this prompt's fault, for all that is known
        return replace(reply, usd=reply.usd + lost)

    def words(self, error: openai.APIStatusError) -> str:
        """What the service said, short, without the key."""
        body = error.body
        said = (body.get("message") or body.get("detail")) if isinstance(body, dict) else body
        said = " ".join(f"{said or body or error.message} {error.code or ''}".split())
        return f"HTTP {error.status_code}: {self.scrub(said[:300])}"

    def refusal(self, error: openai.APIStatusError, tokens: int) -> Reply:
        """The reply to a request that is refused for what it holds."""
        why = self.words(error)
        return Reply(None, tokens, error=why, refused=OVERFLOW.search(why) is not None)

    def _once(self, messages: Messages, tokens: int) -> Reply:
        """One attempt. TimeoutError and APIStatusError: asking again may help."""
        try:
            got = self.client.chat.completions.with_raw_response.create(
                model=self.served,
                messages=messages,
                temperature=self.settings.temperature,
                max_tokens=self.settings.max_tokens,
            )
            return self._read(got.http_response.content, messages, tokens)
        except openai.APIConnectionError as error:
            raise TimeoutError(f"no answer from the service ({type(error).__name__})") from None
        except openai.APIStatusError as error:
            code, said = error.status_code, self.words(error)
            if code in (400, 413, 422):
                return self.refusal(error, tokens)
            if code < 400:
                said = "it redirects, which is not followed: give the address it means as base_url"
            elif code in (401, 403):  # their texts like to quote the key, or half of it
                said = f"the service does not take the key in {KEY} for {self.served}"
            elif crawl.again(error) and error.code != "insufficient_quota":
                raise
            raise Permanent(said if said.startswith("HTTP") else f"HTTP {code}: {said}") from None

    def _read(self, body: bytes, messages: Messages, tokens: int) -> Reply:
        """What HTTP 200 brought: a text is an answer, cut at max_tokens or not, if all of the
        prompt was read. Without usage it counts as the most it can have cost."""
        answer, text = None, ""
        finish = f"no chat answer: {' '.join(body[:300].decode(errors='replace').split())}"
        with suppress(Exception):
            answer = json.loads(body)
            choice = answer["choices"][0]
            finish = choice.get("finish_reason")
            said = choice["message"].get("content") or choice["message"]["refusal"]
            if isinstance(said, list):  # in parts; those of its reasoning are of another type
                said = "".join(part["text"] for part in said if part["type"] == "text")
            text = answer_of(said)
        used = [tokens, self.settings.max_tokens]
        with suppress(Exception):
            counts = [answer["usage"][name] for name in ("prompt_tokens", "completion_tokens")]
            counts = [int(float(n)) for n in counts]  # also 2e5 and "200000"
            used = counts if 0 < counts[0] < 2**40 and 0 <= counts[1] < 2**40 else used
        usd, size = self.model.usd(*used), sum(map(len, texts(messages)))
        if not text:
            return Reply(None, *used, usd, self.scrub(f"no text ({finish})")[:300])
        if used[0] * LONGEST_TOKEN < size:
            why = f"prompt cut ({used[0]} tokens of {size} characters): raise the model's context"
            return Reply(None, *used, usd, why, refused=True)
        return Reply(self.scrub(text), *used, usd)


def answer_of(text: str) -> str:
    """A text without its reasoning; empty where that never ended."""
    return REASONING.sub("", text).strip()


def check(model: ApiModel, settings: Settings) -> None:
    """Unavailable where a model cannot be asked here and now. Where nothing may be spent, as in
    notebooks, nothing that costs is asked, whatever keys the environment holds."""
    if settings.cap == 0:
        raise Unavailable(
            "costs money: run `python -m lavic_utils run METHOD --domain DOMAIN` with a key in "
            f"{KEY} or with --base-url, and --max-usd above 0"
        )
    Endpoint(model, settings)


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


def _ask_new(
    requests: Requests,
    todo: dict[str, tuple[int, int]],
    found: dict[str, Reply],
    endpoint: Endpoint,
    base: sqlite3.Connection,
) -> None:
    """Ask for `todo`: replies go to `found`, answers committed, those under way at a stop too."""
    fruitless = 0  # requests in a row

    def work(key: str) -> None:
        nonlocal fruitless
        if fruitless >= GIVE_UP:
            raise Permanent(f"{fruitless} requests in a row brought nothing")
        index, tokens = todo[key]
        try:
            reply = endpoint.ask(requests[index](), tokens)
            with endpoint.lock:
                if reply.text:
                    row = key, reply.text, reply.input_tokens, reply.output_tokens, reply.usd, 0.0
                    base.execute(INSERT, row)
                found[key] = reply
                fruitless = 0 if reply.text or reply.refused else fruitless + 1
        except BaseException as error:  # of a full disk, too: nothing more is asked and paid
            endpoint.stopped = error
            raise

    first, *others = todo
    work(first)  # alone: a wrong key, name or price shows before others are under way
    with ThreadPoolExecutor(endpoint.settings.concurrency) as pool:
        with crawl.bar(MofNCompleteColumn(), TimeRemainingColumn()) as progress:
            try:
                list(progress.track(pool.map(work, others), len(others)))
            except BaseException as error:  # an interrupt too: nothing waits for its next attempt
                endpoint.stopped = error
                raise


def ask_all(
    requests: Requests, model: ApiModel, settings: Settings, cache: Path, dry_run: bool = False
) -> list[Reply] | str:
    """A reply to each request, in order; equal ones are asked once, and those whose answer the
    file `cache` holds not at all. `dry_run`: only what would be asked and its cost, in words.

    UserError where asking could pass the cap, where no request brought an answer, and where none
    can succeed: what was answered is kept. What brought no answer is logged by reason, and asked
    again by the next call."""
    asked = {"endpoint": settings.base_url.rstrip("/"), "model": settings.served or model.served}
    asked |= {"temperature": settings.temperature, "max_tokens": settings.max_tokens}
    price, most, problem, paid = settings.priced(model), 0.0, "", ""
    keys: list[str] = []
    found: dict[str, Reply] = {}
    todo: dict[str, tuple[int, int]] = {}  # key -> (index of a request, its input tokens at most)
    with crawl.database(cache, SCHEMA, "make room, or name another file") as base:
        for index, request in enumerate(requests):
            messages = request()
            key = key_of(messages=messages, **asked)  # of all that is sent, images too
            keys.append(key)
            row = base.execute("SELECT * FROM answers WHERE key = ?", (key,)).fetchone()
            if row and (text := answer_of(row[1] or "")):
                found[key] = Reply(text, *row[2:5], cached=True)
            elif key not in todo:
                todo[key] = index, most_tokens(messages, model)
                most += price.usd(todo[key][1], settings.max_tokens)
        cost = f"at most {most:.6f} USD by the list price"
        if not price.usd_input:
            cost = "at no cost, as the service is your own (--max-usd would count it)"
        said = f"{len(todo)} requests to {asked['model']} at {asked['endpoint']}, {cost}"
        if dry_run:
            return f"{said}; {len(found)} more are answered already"
        if todo:
            print(f"asking: {said}", file=sys.stderr)
            endpoint = Endpoint(model, settings)
            try:
                endpoint.check(most)
                _ask_new(requests, todo, found, endpoint, base)
            except (Permanent, TimeoutError, sqlite3.Error) as error:
                problem = crawl.one_line(error)
            paid = f"this run has cost at most {endpoint.spent:.6f} USD, " if endpoint.spent else ""
    kept = sum(key in found and found[key].text is not None for key in keys)
    if keys and not kept and not problem:
        problem = f"none of {len(keys)} requests brought an answer"
    reasons: dict[str, list[str]] = {}  # alike but for numbers, such as a request's own
    for why in (reply.error for reply in found.values() if reply.error):
        reasons.setdefault(why[:9] + re.sub(r"\w*\d\w*", "", why[9:]), []).append(why)
    often = sorted(reasons.values(), key=len, reverse=True)[:3]
    unanswered = "".join(f"{len(same)} x {same[0]}; " for same in often)
    if problem:
        raise UserError(
            f"{problem}; {unanswered}{kept} of {len(keys)} answers are kept in {cache}, {paid}and "
            "the same command goes on from there"
        )
    if unanswered:
        log.warning("without an answer, and asked again next time: %s", unanswered.rstrip("; "))
    replies = []
    for key in keys:
        replies.append(found[key])
        found[key] = replace(found[key], cached=True)  # an equal request was asked once
    return replies
