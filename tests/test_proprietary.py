"""Proprietary models over real HTTP, against a local endpoint that misbehaves on purpose: what can arrive does, nothing that
was paid for is asked twice, no cap is passed, and the key shows nowhere."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from lavic_utils.config import PACKAGE, ROOT, UserError
from lavic_utils.hub import Unavailable
from lavic_utils.remote import proprietary
from lavic_utils.remote.chat_api import OPENAI, address
from lavic_utils.remote.proprietary import (
    MODELS,
    ApiModel,
    Reply,
    Settings,
    ask_all,
    build_messages,
    estimate,
)

SECRET = "sk-proj-Abc123_x-SECRET/of+tests=="
MINI = MODELS["GPT-4o-mini (title)"]


class Server(ThreadingHTTPServer):
    """Answers by the first word of the prompt; `log` holds (seconds, prompt) of every request, `most` how many were there
    at the same time, `usd` what its answers cost by their usage."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.log: list[tuple[float, str]] = []
        self.keys: list[str | None] = []
        self.bodies: list[dict] = []
        self.delay, self.times, self.usd = 0.0, 1, 0.0
        self.now, self.most, self.lock = 0, 0, threading.Lock()
        self.address = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def asked(self) -> Counter[str]:
        return Counter(prompt for _, prompt in self.log)

    def handle_error(self, *about: object) -> None:
        """Clients that hang up (killed, or out of patience) are what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *about: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        self.prompt = content if isinstance(content, str) else content[0]["text"]
        with self.server.lock:
            self.server.log.append((time.monotonic(), self.prompt))
            self.server.keys.append(self.headers["Authorization"])
            self.server.bodies.append(body)
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
            first = self.server.asked()[self.prompt] == 1
        try:
            time.sleep(self.server.delay)
            getattr(self, self.prompt.split()[0])(first)
        finally:
            with self.server.lock:
                self.server.now -= 1

    def send(
        self, body: object, code: int = 200, length: int | None = None, **headers: str
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        with self.server.lock:  # before the client can see the answer
            self.server.now -= 1
        try:
            self.send_response(code)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = length is not None
        finally:
            with self.server.lock:
                self.server.now += 1

    def answer(self, message: dict | None, finish: str = "stop", usage: bool = True) -> None:
        used = {
            "prompt_tokens": self.server.times * (len(self.prompt) // 4 + 8),
            "completion_tokens": 6,
        }
        if usage:
            self.server.usd += MINI.usd(*used.values())
        choices = (
            []
            if message is None
            else [
                {"index": 0, "finish_reason": finish, "message": {"role": "assistant", **message}}
            ]
        )
        self.send(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 1,
                "model": "m",
                "choices": choices,
                **({"usage": used} if usage else {}),
            }
        )

    def good(self, first: bool) -> None:
        self.answer({"content": f"answer to {self.prompt}"})

    def fail(self, code: int, more: str = "", **headers: str) -> None:
        self.send(
            {
                "error": {
                    "message": f"no: {self.headers['Authorization']} {more}",
                    "code": more or None,
                }
            },
            code,
            **headers,
        )

    def busy(self, first: bool) -> None:
        self.fail(429, Retry_After="1") if first else self.good(first)

    def broken(self, first: bool) -> None:
        self.fail(500) if first else self.good(first)

    def slow(self, first: bool) -> None:
        time.sleep(2 if first else 0)
        self.good(first)

    def drip(self, first: bool) -> None:
        """A byte now and then: no read takes long, and the answer never ends."""
        if not first:
            return self.good(first)
        self.send(b"{", length=500)
        for _ in range(40):
            time.sleep(0.2)
            self.wfile.write(b" ")

    def late(self, first: bool) -> None:
        time.sleep(0.3)
        self.good(first)

    def cut(self, first: bool) -> None:
        self.send(b'{"choices": [{"mess', length=500) if first else self.good(first)

    def dropped(self, first: bool) -> None:
        if first:
            self.close_connection = True
        else:
            self.good(first)

    def badzip(self, first: bool) -> None:
        self.send(b"not gzip", Content_Encoding="gzip") if first else self.good(first)

    def html(self, first: bool) -> None:
        self.send(b"<html>welcome to the hotel</html>")

    def halfjson(self, first: bool) -> None:
        self.send(b'{"choices": [{"message"')

    def nousage(self, first: bool) -> None:
        self.answer({"content": "B0"}, usage=False)

    def nothing(self, first: bool) -> None:
        self.answer(None, usage=False)

    def weird(self, first: bool) -> None:
        self.send(b"[" * 100_000)

    def nochoices(self, first: bool) -> None:
        self.answer(None)

    def null(self, first: bool) -> None:
        self.answer({"content": None})

    def empty(self, first: bool) -> None:
        self.answer({"content": " \n"}, "length")

    def filtered(self, first: bool) -> None:
        self.answer({"content": ""}, "content_filter")

    def refused(self, first: bool) -> None:
        self.answer({"content": None, "refusal": "I will not."})

    def surrogate(self, first: bool) -> None:
        self.answer({"content": "B0\ud800"})

    def echo(self, first: bool) -> None:
        self.answer({"content": f"your header is {self.headers['Authorization']}"})

    def bad(self, first: bool) -> None:
        self.fail(400, "content_policy_violation")

    def unauthorised(self, first: bool) -> None:
        self.fail(401)

    def forbidden(self, first: bool) -> None:
        self.fail(403)

    def gone(self, first: bool) -> None:
        self.fail(404, "model_not_found")

    def broke(self, first: bool) -> None:
        self.fail(429, "insufficient_quota")

    def down(self, first: bool) -> None:
        self.fail(503)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with Server() as made:
        threading.Thread(
            target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        yield made
        made.shutdown()


def settings(server: Server, **other) -> Settings:
    return Settings(
        **{
            "max_usd": 1.0,
            "base_url": server.address,
            "concurrency": 4,
            "timeout": 10.0,
            "attempts": 4,
            "backoff": 0.01,
            **other,
        }
    )


def asks(*prompts: str) -> list[list[dict]]:
    return [build_messages(prompt) for prompt in prompts]


def numbered(count: int, word: str = "good") -> list[list[dict]]:
    return asks(*(f"{word} {i}" for i in range(count)))


def rows(cache: Path) -> list[tuple]:
    base = sqlite3.connect(cache)
    found = base.execute("SELECT * FROM answers").fetchall()
    base.close()
    return found


ARRIVE = ("busy", "broken", "slow", "drip", "cut", "dropped", "badzip")
PAID_WITHOUT_TEXT = ("nochoices", "null", "empty", "filtered")
UNPAID = ("html", "halfjson", "nothing", "weird", "bad")


def test_all_that_can_arrive_does_and_a_second_run_asks_for_nothing(
    server: Server, tmp_path: Path
) -> None:
    cache = tmp_path / "below" / "a.sqlite"
    words = ("good", *ARRIVE, *PAID_WITHOUT_TEXT, "refused", "nousage", "surrogate", *UNPAID)
    seen: list[tuple[int, int]] = []
    limited = settings(server, timeout=1.5)
    replies = dict(
        zip(
            words,
            ask_all(asks(*words), MINI, limited, cache, lambda *at: seen.append(at)),
            strict=True,
        )
    )
    assert [replies[word].text for word in ("good", *ARRIVE)] == [
        f"answer to {word}" for word in ("good", *ARRIVE)
    ]
    assert replies["refused"].text == "I will not." and replies["surrogate"].text == "B0?"
    assert {word for word in words if replies[word].text is None} == {*PAID_WITHOUT_TEXT, *UNPAID}
    assert all(
        (reply.text is None) == bool(reply.error) and not reply.cached for reply in replies.values()
    )
    said = {
        "nochoices": "no choices",
        "filtered": "content_filter",
        "empty": "length",
        "html": "not JSON",
        "weird": "not JSON",
        "bad": "content_policy_violation",
    }
    assert {word: text for word, text in said.items() if text not in replies[word].error} == {}
    good = replies["good"]
    assert (good.input_tokens, good.output_tokens, good.usd) == (
        9,
        6,
        MINI.usd(9, 6),
    ) and 0 < good.seconds < 1
    assert (
        replies["nousage"].usd
        == estimate(asks("nousage"), MINI, settings(server), tmp_path / "none")["usd"]
    )
    assert seen[-1] == (len(words), len(words))
    assert {
        word: times for word, times in server.asked().items() if times != 1 + (word in ARRIVE)
    } == {}
    at = [seconds for seconds, prompt in server.log if prompt == "busy"]
    assert at[1] - at[0] >= 1  # Retry-After was kept; the backoff alone is a hundredth of it
    at = [seconds for seconds, prompt in server.log if prompt == "drip"]
    assert (
        at[1] - at[0] < 5
    )  # the time-out is of the whole attempt; left alone it drips for 8 seconds
    assert len(rows(cache)) == len(words) - len(UNPAID)

    server.log.clear()
    again = dict(zip(words, ask_all(asks(*words), MINI, settings(server), cache), strict=True))
    assert set(server.asked()) == set(UNPAID)
    assert all(
        again[word] == replace(replies[word], cached=True) for word in words if word not in UNPAID
    )
    server.log.clear()
    assert (
        ask_all(asks("good"), MINI, settings(server), tmp_path / "other.sqlite")[0].cached is False
    )
    assert server.asked() == {"good": 1}  # negative control: without that cache it is asked


def test_order_is_kept_equal_requests_are_asked_once_and_the_limit_holds(
    server: Server, tmp_path: Path
) -> None:
    server.delay = 0.02
    prompts = [f"good {i % 20}" for i in range(50)]
    replies = ask_all(asks(*prompts), MINI, settings(server), tmp_path / "a.sqlite")
    assert [reply.text for reply in replies] == [f"answer to {prompt}" for prompt in prompts]
    assert len(server.log) == 20 and set(server.asked().values()) == {1}
    assert [reply.cached for reply in replies] == [False] * 20 + [
        True
    ] * 30  # what was paid is the sum of the others
    assert server.most == 4
    ask_all(numbered(20, "good x"), MINI, settings(server, concurrency=9), tmp_path / "a.sqlite")
    assert server.most == 9  # negative control: the server would have seen more


def picture(path: Path, colour: str = "red", kind: str = "JPEG") -> Path:
    Image.new("RGB", (20, 20), colour).save(path, kind)
    return path


def test_another_parameter_model_endpoint_or_image_byte_is_another_key(
    server: Server, tmp_path: Path
) -> None:
    red, cache, base = picture(tmp_path / "r.jpg"), tmp_path / "a.sqlite", settings(server)

    def asked(model: ApiModel = MINI, path: Path = red, text: str = "good", **other) -> int:
        before = len(server.log)
        ask_all([build_messages(text, [("B01", path)])], model, replace(base, **other), cache)
        return len(server.log) - before

    assert asked() == 1 and asked() == 0
    assert asked(path=picture(tmp_path / "same.jpg")) == 0  # the bytes count, not the name
    changed = tmp_path / "c.jpg"
    changed.write_bytes(red.read_bytes() + b"\0")
    other = [
        {"path": changed},
        {"max_tokens": 21},
        {"temperature": 0.5},
        {"served": "tuned"},
        {"text": "good 2"},
        {"model": MODELS["GPT-4o (title+image)"]},
        {"base_url": server.address.replace("127.0.0.1", "localhost")},
    ]
    assert [asked(**one) for one in other] == [1] * len(other)
    assert [asked(**one) for one in other] == [0] * len(other)
    same = [
        {"timeout": 5.0},
        {"concurrency": 1},
        {"max_usd": 2.0},
        {"base_url": server.address + "/"},
    ]
    assert [asked(**one) for one in same] == [0] * 4
    assert (
        server.bodies[0]["model"] == "gpt-4o-mini-2024-07-18"
        and server.bodies[0]["max_tokens"] == 20
    )
    assert server.bodies[0]["temperature"] == 0 and server.bodies[4]["model"] == "tuned"


KILLED = """
import sys
from pathlib import Path
from lavic_utils.remote.proprietary import MODELS, Settings, ask_all, build_messages
made = Settings(max_usd=1.0, base_url=sys.argv[1], concurrency=4)
ask_all([build_messages(f"good {i}") for i in range(120)], MODELS["GPT-4o-mini (title)"], made, Path(sys.argv[2]))
print("done")
"""


def test_killed_in_the_middle_it_asks_no_answered_request_again(
    server: Server, tmp_path: Path
) -> None:
    cache, server.delay = tmp_path / "a.sqlite", 0.03
    command = [sys.executable, "-c", KILLED, server.address, str(cache)]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 40
    while len(server.log) < 50 and time.monotonic() < end:
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    assert running.wait(10) == -signal.SIGKILL
    time.sleep(0.1)
    before, kept = server.asked(), len(rows(cache))
    assert 50 <= len(before) < 120 and len(before) - 4 <= kept <= len(
        before
    )  # the middle, and all but those in flight kept
    server.log.clear()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "done\n", done.stderr
    assert len(server.log) == 120 - kept and len(set(server.asked()) | set(before)) == 120
    assert len(set(server.asked()) & set(before)) <= 4 and len(rows(cache)) == 120


def test_over_the_estimate_nothing_is_asked(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "a.sqlite"
    sums = estimate(numbered(30) + numbered(5), MINI, settings(server), cache)
    assert sums["requests"] == 35 and sums["cached"] == 0 and not cache.exists()
    assert sums["usd"] == MINI.usd(sums["input_tokens"], 30 * 20)
    with pytest.raises(
        UserError, match=r"30 requests to gpt-4o-mini-2024-07-18 may cost .* nothing was asked"
    ):
        ask_all(numbered(30), MINI, settings(server, max_usd=sums["usd"] * 0.99), cache)
    assert server.log == []
    assert (
        len(ask_all(numbered(30), MINI, settings(server, max_usd=sums["usd"]), cache)) == 30
    )  # negative control
    assert server.usd < sums["usd"]  # it is an upper bound
    left = estimate(numbered(35), MINI, settings(server), cache)
    assert left["cached"] == 30 and left["usd"] < sums["usd"] / 5
    assert (
        len(ask_all(numbered(30), MINI, settings(server, max_usd=0), cache)) == 30
    )  # what is there is free


def test_no_cap_is_passed_by_an_endpoint_that_counts_more_than_expected(
    server: Server, tmp_path: Path
) -> None:
    cache, server.times = tmp_path / "a.sqlite", 50
    limited = settings(
        server,
        max_usd=estimate(numbered(40), MINI, settings(server), tmp_path / "none")["usd"] * 1.5,
    )
    kept, runs = 0, 0
    while kept < 40 and runs < 40:
        runs += 1
        server.usd = 0.0
        try:
            assert len(ask_all(numbered(40), MINI, limited, cache)) == 40
        except UserError as error:
            assert "max_usd" in str(error) and f"{len(rows(cache))} of 40 answers are kept" in str(
                error
            )
        assert 0 < server.usd <= limited.max_usd
        kept = len(rows(cache))
    assert (
        3 <= runs < 40 and kept == 40 and set(server.asked().values()) == {1}
    )  # the same call went on, nothing twice


def test_attempts_that_may_have_been_paid_count(server: Server, tmp_path: Path) -> None:
    one = estimate(asks("slow"), MINI, settings(server), tmp_path / "none")["usd"]
    with pytest.raises(UserError, match="max_usd"):
        ask_all(
            asks("slow", "good"),
            MINI,
            settings(server, max_usd=2.2 * one, timeout=1.5),
            tmp_path / "a.sqlite",
        )
    assert server.asked() == {"slow": 2}
    enough = settings(server, max_usd=3.3 * one, timeout=1.5)
    assert len(ask_all(asks("slow 2", "good"), MINI, enough, tmp_path / "a.sqlite")) == 2


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("unauthorised", "HTTP 401.*OPENAI_API_KEY"),
        ("forbidden", "HTTP 403"),
        ("gone", "404.*model_not_found"),
        ("broke", "insufficient_quota"),
    ],
)
def test_permanent_errors_stop_at_once_with_one_line(
    server: Server, tmp_path: Path, word: str, said: str
) -> None:
    with pytest.raises(UserError, match=rf"{said}.*0 of 9 answers are kept") as caught:
        ask_all(numbered(9, word), MINI, settings(server), tmp_path / "a.sqlite")
    assert len(server.log) == 1 and "\n" not in str(caught.value)


def test_what_is_in_flight_when_a_run_stops_still_arrives(server: Server, tmp_path: Path) -> None:
    cache, first = tmp_path / "a.sqlite", asks("good", "gone", "late 1", "late 2", "late 3")
    with pytest.raises(UserError, match="404 .* 4 of 20 answers are kept"):
        ask_all([*first, *numbered(15)], MINI, settings(server), cache)
    assert (
        set(server.asked()) == {"good", "gone", "late 1", "late 2", "late 3"}
        and len(rows(cache)) == 4
    )


def test_an_endpoint_that_is_down_ends_the_run_and_keeps_what_came(
    server: Server, tmp_path: Path
) -> None:
    cache = tmp_path / "a.sqlite"
    with pytest.raises(UserError, match=r"HTTP 503; [3-6] of 7 answers are kept .* goes on"):
        ask_all(
            [*numbered(3), *asks("down"), *numbered(3, "good x")], MINI, settings(server), cache
        )
    assert server.asked()["down"] == 4
    nobody = settings(server, base_url="http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="no answer from the endpoint"):
        ask_all(numbered(1), MINI, nobody, cache)


def test_one_bad_request_is_recorded_and_many_in_a_row_stop(server: Server, tmp_path: Path) -> None:
    replies = ask_all([*asks("bad"), *numbered(3)], MINI, settings(server), tmp_path / "a.sqlite")
    assert "400" in replies[0].error and [reply.error for reply in replies[1:]] == [None] * 3
    with pytest.raises(UserError, match="20 requests in a row brought nothing .*400"):
        ask_all(numbered(60, "bad"), MINI, settings(server), tmp_path / "a.sqlite")
    assert 20 <= server.asked().total() - 4 <= 23


def test_the_key_shows_nowhere(
    server: Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = []
    with caplog.at_level(logging.DEBUG):
        for word in (
            "unauthorised",
            "forbidden",
            "gone",
            "broke",
            "down",
            "bad",
            "echo",
            "dropped",
        ):
            try:
                texts.append(
                    repr(
                        ask_all(
                            asks(word),
                            MINI,
                            settings(server, attempts=2),
                            tmp_path / f"{word}.sqlite",
                        )
                    )
                )
            except UserError as error:
                assert error.__cause__ is error.__context__ is None
                texts += [str(error), traceback.format_exc()]
    assert set(server.keys) == {f"Bearer {SECRET}"}  # it was sent, and echoed
    assert "your header is Bearer [key]" in "".join(texts) and "no: Bearer [key]" in "".join(texts)
    printed = capfd.readouterr()
    texts += [
        caplog.text,
        printed.out,
        printed.err,
        *(path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()),
    ]
    assert len(caplog.text) > 1000 and len(rows(tmp_path / "echo.sqlite")) == 1
    assert [text for text in texts if SECRET in text or "SECRET" in text] == []
    # negative control: a dummy too short to be one is left alone, so the same search finds it
    monkeypatch.setenv("OPENAI_API_KEY", "SECRET")
    assert (
        "Bearer SECRET"
        in ask_all(asks("echo"), MINI, settings(server), tmp_path / "other.sqlite")[0].text
    )


def test_a_key_is_needed_except_on_this_machine(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(Unavailable, match="OPENAI_API_KEY"):
        ask_all(numbered(1), MINI, Settings(max_usd=1), tmp_path / "a.sqlite")
    assert (
        ask_all(numbered(1), MINI, settings(server), tmp_path / "a.sqlite")[0].text
        == "answer to good 0"
    )
    assert server.keys == ["Bearer none"]
    monkeypatch.setenv("OPENAI_API_KEY", "two words\u00e9")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds") as caught:
        ask_all(numbered(2), MINI, settings(server), tmp_path / "a.sqlite")
    assert "words" not in str(caught.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert ask_all(
        numbered(1), MINI, replace(settings(server), served=None), tmp_path / "a.sqlite"
    )[0].cached  # needs no key


@pytest.mark.parametrize(
    "bad",
    [
        "http://example.org/v1",
        "https://me:pass@example.org/v1",
        "https://example.org/v1?key=abcdef",
        "ftp://127.0.0.1/",
        "localhost:8000",
        "http://127.0.0.1:port/v1",
        "https://",
    ],
)
def test_addresses_that_hold_or_would_show_a_secret_are_refused(bad: str) -> None:
    with pytest.raises(UserError, match="base_url") as caught:
        address(Settings(max_usd=1, base_url=bad))
    assert "pass@" not in str(caught.value) and "abcdef" not in str(caught.value)
    assert address(Settings(max_usd=1)) == (OPENAI, "api.openai.com")
    assert [
        address(Settings(max_usd=1, base_url=u))[1]
        for u in ("http://[::1]:1/v1", "http://127.0.0.9", "https://x.org/v1/")
    ] == [None, None, "x.org"]


@pytest.mark.parametrize(
    "bad",
    [
        {"max_usd": math.nan},
        {"max_usd": -1},
        {"max_usd": math.inf},
        {"concurrency": 0},
        {"timeout": 0},
        {"max_tokens": 0},
    ],
)
def test_settings_that_would_unset_a_limit_are_refused(bad: dict) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        Settings(**{"max_usd": 1, **bad})


def test_messages_hold_the_files_own_bytes_and_only_images_that_can_be_read(
    tmp_path: Path, monkeypatch
) -> None:
    red, png = picture(tmp_path / "r.jpg"), picture(tmp_path / "p.jpg", kind="PNG")
    (tmp_path / "cut.jpg").write_bytes(red.read_bytes()[:300])
    named = [
        ("B01", red),
        ("B02", tmp_path / "none.jpg"),
        ("B03", png),
        ("B04", tmp_path / "cut.jpg"),
    ]
    (message,) = build_messages("choose", named)
    kinds = [part["type"] for part in message["content"]]
    assert message["role"] == "user" and kinds == ["text", "text", "image_url", "text", "image_url"]
    assert [part["text"] for part in message["content"] if part["type"] == "text"] == [
        "choose",
        "B01:",
        "B03:",
    ]
    urls = [part["image_url"] for part in message["content"] if part["type"] == "image_url"]
    assert [url["detail"] for url in urls] == ["low", "low"] and urls[1]["url"].startswith(
        "data:image/png;base64,"
    )
    head, sent = urls[0]["url"].split(",")
    assert head == "data:image/jpeg;base64" and base64.b64decode(sent) == red.read_bytes()
    assert (
        build_messages("choose", named[1:2])
        == build_messages("choose")
        == [{"role": "user", "content": "choose"}]
    )
    text = estimate(
        [build_messages("choose B01: B03:")], MINI, Settings(max_usd=1), tmp_path / "none"
    )["input_tokens"]
    both = estimate([[message]], MINI, Settings(max_usd=1), tmp_path / "none")["input_tokens"]
    assert 2 * 2833 - 5 <= both - text <= 2 * 2833 + 5
    with pytest.raises(UserError, match="gpt-3.5-turbo-0125 takes no images"):
        estimate(
            [[message]], MODELS["GPT-3.5-turbo (title)"], Settings(max_usd=1), tmp_path / "none"
        )
    monkeypatch.setattr(proprietary, "MAX_IMAGE", 100)
    with pytest.raises(UserError, match=r"r\.jpg: \d+ bytes"):
        build_messages("choose", named)


def test_it_runs_inside_a_running_loop_as_in_a_notebook(server: Server, tmp_path: Path) -> None:
    async def cell() -> list[Reply]:
        return ask_all(numbered(2), MINI, settings(server), tmp_path / "a.sqlite")

    assert [reply.text for reply in asyncio.run(cell())] == ["answer to good 0", "answer to good 1"]


def test_a_cache_in_use_or_unusable_is_said_in_one_line(server: Server, tmp_path: Path) -> None:
    with (
        proprietary._answers(tmp_path / "a.sqlite"),
        pytest.raises(UserError, match="another run uses it"),
    ):
        ask_all(numbered(1), MINI, settings(server), tmp_path / "a.sqlite")
    (tmp_path / "text").write_text(
        "not a database, and more than a header's worth of text" * 9, encoding="utf-8"
    )
    for path in (tmp_path / "text", tmp_path / "text" / "a.sqlite", tmp_path):
        with pytest.raises(UserError, match="answers cannot be kept there"):
            ask_all(numbered(1), MINI, settings(server), path)
    assert server.log == []


def test_the_five_published_rows_are_there_with_dated_models() -> None:
    rows = json.loads((PACKAGE / "published.json").read_text(encoding="utf-8"))["rows"]
    published = {
        row["method"]: "image" in row["inputs"] for row in rows if row["family"] == "proprietary"
    }
    assert list(published) == list(MODELS)
    for name, images in published.items():
        assert (
            MODELS[name]
            .served.removesuffix("-2024-08-06")
            .removesuffix("-2024-07-18")
            .removesuffix("-0125")
            == name.split(" ")[0].lower()
        )
        assert (MODELS[name].images and MODELS[name].image_tokens > 0) or not images
