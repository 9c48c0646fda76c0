"""One request to an OpenAI-compatible endpoint: where it may go, with which key, and what comes back as an answer.

The key comes from OPENAI_API_KEY alone and is taken out of whatever an endpoint sends back.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import openai

from lavic_utils.config import UserError
from lavic_utils.hub import Unavailable
from lavic_utils.remote.crawl import Permanent, Transient, retry_after

KEY = "OPENAI_API_KEY"
OPENAI = "https://api.openai.com/v1"


@dataclass(frozen=True)
class ApiModel:
    """A model to ask for: its name at the endpoint, whether it sees images, USD a million tokens, tokens an image."""

    served: str
    images: bool
    usd_input: float
    usd_output: float
    image_tokens: int = 0  # of an image in low detail, whatever its size
    until: str = ""  # the day on which OpenAI announced to stop serving it

    def usd(self, input_tokens: int, output_tokens: int) -> float:
        return (input_tokens * self.usd_input + output_tokens * self.usd_output) / 1e6


@dataclass(frozen=True)
class Settings:
    """`max_usd`: what one run may cost at the model's list price, whoever answers; `timeout` (one attempt) and `backoff`
    in seconds; `served`: another name to ask the endpoint for. Raises UserError for values that would unset a limit."""

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
        if not (0 <= self.max_usd < math.inf and 0 < self.timeout < math.inf):
            raise UserError(
                f"max_usd {self.max_usd} has to be a number from 0 on, timeout {self.timeout} one above 0"
            )
        if min(self.concurrency, self.max_tokens, self.attempts) < 1:
            raise UserError("concurrency, max_tokens and attempts have to be at least 1")

    @property
    def parameters(self) -> dict[str, float]:
        return {"temperature": self.temperature, "max_tokens": self.max_tokens}


@dataclass(frozen=True)
class Reply:
    """An answer: `text`, None where there is none and `error` why. `cached`: nothing was paid for it in this run; `usd` and
    `seconds` are those of the request that brought it."""

    text: str | None
    input_tokens: int
    output_tokens: int
    usd: float
    seconds: float
    error: str | None
    cached: bool = False

    @property
    def kept(self) -> bool:
        """Goes into the cache: an answer, or nothing that was paid for."""
        return self.text is not None or self.usd > 0


class Lost(Transient):
    """Nobody knows whether the request was answered, and is paid for."""


def address(settings: Settings) -> tuple[str, str | None]:
    """Of the endpoint, and its host, None for this machine. UserError for one that holds a secret, or that would carry the
    key in the clear."""
    given = settings.base_url or OPENAI
    try:
        url = urlsplit(given)
        host = url.hostname or ""
        with suppress(ValueError):
            host = "localhost" if ip_address(host).is_loopback else host
        safe = url.scheme == "https" or url.scheme == "http" and host == "localhost"
        if (
            not (safe and host and url.port != 0)
            or url.username
            or url.password
            or url.query
            or url.fragment
        ):
            raise ValueError
    except ValueError:
        raise UserError(
            "base_url has to be https://HOST/PATH, or http://127.0.0.1:PORT/PATH on this machine, with no user, "
            f"password or query in it; the key belongs in {KEY}"
        ) from None
    return given.rstrip("/"), None if host == "localhost" else host


class Endpoint:
    """Asks for `model`. Unavailable where there is no key and one is needed, UserError for one that cannot be a key."""

    def __init__(self, model: ApiModel, settings: Settings) -> None:
        (where, host), self._secret = address(settings), os.environ.get(KEY, "").strip()
        if not self._secret and host:
            raise Unavailable(
                f"needs a key for {host} in the environment variable {KEY}, which is not set; or name an endpoint "
                "on this machine as base_url"
            )
        if not re.fullmatch(
            r"[\w.~+/=-]*", self._secret, re.ASCII
        ):  # RFC 6750; a library's own error would show others
            raise UserError(f"{KEY} holds characters that no key has; set it again")
        self.model, self.settings, self.served = model, settings, settings.served or model.served
        self.client = openai.AsyncOpenAI(
            api_key=self._secret or "none", base_url=where, timeout=settings.timeout, max_retries=0
        )

    def scrub(self, text: str) -> str:
        """The text without the key. A dummy of a few letters is no secret, and an answer may hold it."""
        return (
            re.sub(re.escape(self._secret), "[key]", text, flags=re.IGNORECASE)
            if len(self._secret) >= 8
            else text
        )

    async def ask(self, messages: list[dict[str, Any]], most_tokens: int) -> Reply:
        """Ask once. Raises Transient where asking again may help, Permanent where no request can succeed; a request that
        is refused for what it holds is a reply without text."""
        start = time.monotonic()
        try:
            async with asyncio.timeout(self.settings.timeout):
                got = await self.client.chat.completions.with_raw_response.create(
                    model=self.served, messages=messages, **self.settings.parameters
                )
            return self.read(got.http_response.content, most_tokens, time.monotonic() - start)
        except (TimeoutError, openai.APIConnectionError) as error:
            raise Lost(f"no answer from the endpoint ({type(error).__name__})") from None
        except openai.APIStatusError as error:
            code, said = error.status_code, " ".join(self.scrub(str(error)).split())[:300]
            if code in (401, 403):  # their texts like to quote the key, or half of it
                raise Permanent(
                    f"HTTP {code}: the endpoint does not take the key in {KEY} for {self.served}"
                ) from None
            if code in (400, 413, 422):
                return Reply(None, 0, 0, 0.0, time.monotonic() - start, said)
            if (code in (408, 409, 425, 429) or code >= 500) and error.code != "insufficient_quota":
                raise Transient(
                    f"HTTP {code}", retry_after(error.response.headers.get("retry-after"))
                ) from None
            raise Permanent(f"model {self.served}: {said}") from None

    def read(self, body: bytes, most_tokens: int, seconds: float) -> Reply:
        """What an answer with status 200 says. A text without usage counts as the most it can have cost."""
        answer, text, why = None, None, "not JSON"
        with suppress(ValueError, RecursionError):
            answer, why = json.loads(body), "no choices"
        with suppress(KeyError, IndexError, TypeError, AttributeError):
            choice = answer["choices"][0]
            why = f"no text (finish reason {choice.get('finish_reason')})"
            text = choice["message"].get("content") or choice["message"].get("refusal")
        if isinstance(text, str) and text.strip():
            text, why = self.scrub(text.encode("utf-8", "replace").decode()), None
        else:
            text, why = None, self.scrub(why)[:300]
        usage = answer.get("usage") if isinstance(answer, dict) else None
        used = (
            [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
            if isinstance(usage, dict)
            else []
        )
        if not used or not all(type(count) is int and 0 <= count < 2**40 for count in used):
            used = [most_tokens, self.settings.max_tokens] if text else [0, 0]
        return Reply(text, *used, self.model.usd(*used), seconds, why)
