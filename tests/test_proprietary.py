"""Chat services over real HTTP, against a local one that misbehaves on purpose: what can arrive
does, a failure is no answer, nothing is paid for twice, no cap is passed, the key shows nowhere."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import math
import re
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from server import Handler, Server, serving

from lavic_utils.config import PACKAGE, ROOT, UserError
from lavic_utils.hub import Unavailable
from lavic_utils.remote import chat_api, crawl
from lavic_utils.remote.chat_api import (
    KEY,
    MODELS,
    OPENAI,
    REASONING,
    ApiModel,
    Reply,
    Settings,
    ask_all,
    build_messages,
    check,
    most_tokens,
)

SECRET = "sk-proj-Abc123_x-SECRET/of+tests=="
MINI = MODELS["GPT-4o-mini (title)"]
CUT = {"prompt_tokens": 34, "completion_tokens": 5}


class Chat(Handler):
    """Answers by the first word of the prompt. `times`: how many times as many tokens it counts;
    `usd`: what its answers have cost; `bodies`: what was sent."""

    times, usd, bodies = 1, 0.0, []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        self.prompt = content if isinstance(content, str) else content[0]["text"]
        Chat.bodies.append(body)
        self.behave(self.prompt, self.prompt.split()[0])

    def say(self, body: object, code: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send(content, code, Content_Type="application/json", **headers)

    def answer(self, message: dict | None, finish: str = "stop", times: int = 1) -> None:
        tokens = times * Chat.times * (len(self.prompt) // 4 + 8)
        used = {"prompt_tokens": tokens, "completion_tokens": 6}
        Chat.usd += MINI.usd(*used.values())
        choices = [{"index": 0, "finish_reason": finish, "message": message}] if message else []
        self.say({"id": "x", "choices": choices, "usage": used})

    def fail(self, code: int, why: str = "", **headers: str) -> None:
        said = f"no: {self.headers['Authorization']} {why}"
        self.say({"error": {"message": said, "code": why or None}}, code, **headers)

    def good(self, first: bool) -> None:
        self.answer({"content": f"answer to {self.prompt}"})

    def jump(self, first: bool) -> None:
        self.answer({"content": "B0"}, times=20_000)

    def busy(self, first: bool) -> None:
        self.fail(429, Retry_After="1") if first else self.good(first)

    def broken(self, first: bool) -> None:
        self.fail(500) if first else self.good(first)

    def slow(self, first: bool) -> None:
        time.sleep(2 if first else 0)
        self.good(first)

    def late(self, first: bool) -> None:
        time.sleep(0.3)
        self.good(first)

    def cut(self, first: bool) -> None:
        self.send(b'{"choices": [{"mess', length=500) if first else self.good(first)

    def dropped(self, first: bool) -> None:
        if first:
            Chat.usd += MINI.usd(len(self.prompt) // 4 + 8, 6)  # answered and paid for, but lost
            self.close_connection = True
        else:
            self.good(first)

    def html(self, first: bool) -> None:
        self.say(b"<html>welcome to the hotel</html>")

    def deep(self, first: bool) -> None:
        self.say(b"[" * 100_000)

    def nousage(self, first: bool) -> None:
        self.say({"choices": [{"message": {"content": "B0"}}], "usage": {"prompt_tokens": None}})

    def cutprompt(self, first: bool) -> None:
        self.say({"choices": [{"message": {"content": "B0"}}], "usage": CUT})

    def nochoices(self, first: bool) -> None:
        self.answer(None)

    def null(self, first: bool) -> None:
        self.answer({"content": None})

    def empty(self, first: bool) -> None:
        self.answer({"content": " \n"})

    def filtered(self, first: bool) -> None:
        self.answer({"content": ""}, "content_filter")

    def refused(self, first: bool) -> None:
        self.answer({"content": None, "refusal": "I will not."})

    def surrogate(self, first: bool) -> None:
        self.answer({"content": "B0\ud800"})

    def echo(self, first: bool) -> None:
        self.answer({"content": f"your header is {self.headers['Authorization']}"})

    def thinks(self, first: bool) -> None:
        self.answer({"content": "<think>B000000001 or</think>\nB000000002"})

    def cutthink(self, first: bool) -> None:
        self.answer({"content": "<think>perhaps B000000001"}, "length")

    def cuttext(self, first: bool) -> None:
        self.answer({"content": "I would take"}, "length")

    def bad(self, first: bool) -> None:
        self.fail(400, "content_policy_violation")

    def invalid(self, first: bool) -> None:
        self.fail(422, "'max_tokens' is not supported with this model")

    def toolong(self, first: bool) -> None:
        self.fail(400, "This model's maximum context length is 512 tokens.")

    def moved(self, first: bool) -> None:
        self.send(b"", 307, Location=f"{self.server.address}/elsewhere")

    def unauthorised(self, first: bool) -> None:
        self.fail(401)

    def forbidden(self, first: bool) -> None:
        self.fail(403)

    def gone(self, first: bool) -> None:
        self.fail(404, "model_not_found")

    def broke(self, first: bool) -> None:
        self.fail(429, "insufficient_quota")

    def down(self, first: bool) -> None:
        self.fail(503, "try later")

    def crashes(self, first: bool) -> None:
        self.fail(500, "CUDA out of memory")

    def window(self, first: bool) -> None:
        self.fail(500, "the request exceeds the available context size")

    def decoder(self, first: bool) -> None:
        self.fail(400, "The decoder prompt is longer than the maximum model length of 256.")

    def gateway(self, first: bool) -> None:
        if first:
            Chat.usd += MINI.usd(len(self.prompt) // 4 + 8, 6)  # passed on, answered and paid for
        self.fail(504) if first else self.good(first)

    def provider(self, first: bool) -> None:
        self.say({"error": {"message": "model overloaded", "code": 502}})

    def detail(self, first: bool) -> None:
        self.say({"detail": [{"msg": "extra fields not permitted"}]}, 422)

    def parts(self, first: bool) -> None:
        thought = {"type": "thinking", "thinking": [{"type": "text", "text": "B01"}]}
        self.answer({"content": [thought, {"type": "text", "text": "B02"}]})

    def zero(self, first: bool) -> None:
        none = {"prompt_tokens": 0, "completion_tokens": 0}
        self.say({"choices": [{"message": {"content": "B0"}}], "usage": none})

    def float(self, first: bool) -> None:
        used = {"prompt_tokens": 2e5, "completion_tokens": "6"}
        self.say({"choices": [{"message": {"content": "B0"}}], "usage": used})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv(KEY, SECRET)
    for name, value in {"times": 1, "usd": 0.0, "bodies": []}.items():
        monkeypatch.setattr(Chat, name, value)
    with serving(Chat) as made:
        yield made


def settings(server: Server, **other) -> Settings:
    """With a cap, so that what this machine answers is paid for, as through a gateway."""
    fast = {"concurrency": 4, "timeout": 10.0, "attempts": 4, "backoff": 0.01}
    return Settings(**{"max_usd": 1.0, "base_url": f"{server.address}/v1", **fast, **other})


def asks(*prompts: str) -> list[partial]:
    return [partial(build_messages, prompt) for prompt in prompts]


def numbered(count: int, word: str = "good") -> list[partial]:
    return asks(*(f"{word} {i}" for i in range(count)))


def worst(requests: list[partial]) -> float:
    return sum(MINI.usd(most_tokens(one(), MINI), 20) for one in requests)


def rows(cache: Path) -> list[tuple]:
    base = sqlite3.connect(cache)
    found = base.execute("SELECT * FROM answers").fetchall()
    base.close()
    return found


AGAIN = ("busy", "broken", "slow", "cut", "dropped")
EMPTY = ("nochoices", "null", "empty", "filtered", "html", "deep", "cutthink")
UNANSWERED = (*EMPTY, "bad", "invalid", "toolong")


def test_all_that_can_arrive_does_and_a_second_run_asks_for_no_answer_again(
    server: Server, tmp_path: Path, caplog
):
    cache = tmp_path / "below" / "a.sqlite"
    words = ("good", *AGAIN, "refused", "nousage", "surrogate", "thinks", "cuttext", *UNANSWERED)
    found = ask_all(asks(*words), MINI, settings(server, timeout=1.5), cache)
    replies = dict(zip(words, found, strict=True))
    for word in ("good", *AGAIN):
        assert replies[word].text == f"answer to {word}"
    assert replies["refused"].text == "I will not." and replies["surrogate"].text == "B0?"
    assert replies["thinks"].text == "B000000002" and replies["cuttext"].text == "I would take"
    assert {word for word in words if replies[word].text is None} == set(UNANSWERED)
    assert all((reply.text is None) == bool(reply.error) for reply in found)
    assert [word for word in words if replies[word].refused] == ["toolong"]
    said = {
        "html": "no chat answer",
        "deep": "no chat answer",
        "filtered": "content_filter",
        "cutthink": "length",
        "bad": "HTTP 400: .*content_policy_violation",
        "invalid": "HTTP 422: .*'max_tokens' is not supported",
    }
    for word, text in said.items():
        assert re.search(text, replies[word].error), word
    assert "without an answer, and asked again next time: " in caplog.text
    good = replies["good"]
    assert (good.input_tokens, good.output_tokens, good.usd) == (9, 6, MINI.usd(9, 6))
    assert replies["nousage"].usd == worst(asks("nousage"))
    repeated = {word: times for word, times in server.asked().items() if times != 1}
    assert repeated == dict.fromkeys(AGAIN, 2)
    at = [seconds for seconds, prompt, _ in server.log if prompt == "busy"]
    assert at[1] - at[0] >= 1  # Retry-After was kept; the backoff alone is a hundredth of it

    server.log.clear()
    found = ask_all(asks(*words), MINI, settings(server), cache)
    assert set(server.asked()) == set(UNANSWERED) and len(rows(cache)) == 11
    for word, reply in zip(words, found, strict=True):
        assert word in server.asked() or reply == replace(replies[word], cached=True)
    server.log.clear()
    assert not ask_all(asks("good"), MINI, settings(server), tmp_path / "other.sqlite")[0].cached
    assert server.asked() == {"good": 1}  # negative control: without that cache it is asked


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("bad", "HTTP 400: .*content_policy_violation"),
        ("invalid", "HTTP 422: .*'max_tokens' is not supported"),
        ("toolong", "maximum context length is 512"),
        ("cutthink", "5 x no text .length"),
    ],
)
def test_no_text_from_any_request_is_an_error_with_the_services_words(
    server: Server, tmp_path: Path, word: str, said: str
):
    with pytest.raises(UserError, match=f"none of 5 requests brought an answer; .*{said}"):
        ask_all(numbered(5, word), MINI, settings(server), tmp_path / "a.sqlite")
    assert rows(tmp_path / "a.sqlite") == []
    # negative control: one answer among them, and it is a result
    replies = ask_all([*numbered(5, word), *asks("good")], MINI, settings(server), tmp_path / "a")
    assert [reply.text is None for reply in replies] == [True] * 5 + [False]
    assert [reply.refused for reply in replies] == [word == "toolong"] * 5 + [False]


@pytest.mark.parametrize(
    "said",
    [
        "<think>B01</think> B02",
        "B01 or\n</think>\n\nB02",
        "B02 <think>B01",
        "[THINK]B01[/THINK]B02",
        "<thought>B01\n</thought>B02",
        "◁think▷B01◁/think▷B02",
        "<seed:think>B01</seed:think>B02",
        "<|begin_of_thought|>B01<|end_of_thought|>B02",
        "<|think|>B01</|think|>B02",
        "<analysis>B01</analysis> B02",
        "<|channel|>analysis<|message|>B01<|end|><|start|>assistant<|channel|>final<|message|>B02",
        "Here is my thought process: B01. Here is my response: B02",
        "B02",
    ],
)
def test_reasoning_is_no_answer(said: str):
    assert REASONING.sub("", said).strip() == "B02"
    cut = ("<think>B01\n", "<thinking>B01</thinking>", "<|channel|>analysis<|message|>B01")
    assert {REASONING.sub("", one) for one in cut} == {""}


def test_a_prompt_that_the_service_has_cut_is_refused(server: Server, tmp_path: Path):
    long, cache = [*asks("cutprompt " * 80), *asks("good")], tmp_path / "a.sqlite"
    cut, good = ask_all(long, MINI, settings(server), cache)
    assert cut.text is None and cut.refused and "34 tokens of 800 characters" in cut.error
    assert good.text == "answer to good" and len(rows(cache)) == 1
    (short,) = ask_all(asks("cutprompt"), MINI, settings(server), cache)
    assert short.text == "B0"  # negative control: so many tokens can be all of a short one


def test_many_requests_in_a_row_that_bring_nothing_stop(server: Server, tmp_path: Path):
    with pytest.raises(UserError, match="20 requests in a row brought nothing; 20 x .*400"):
        ask_all(numbered(60, "bad"), MINI, settings(server, concurrency=1), tmp_path / "a.sqlite")
    assert len(server.log) == 20
    # prompts that are too long are those dialogues' own
    with pytest.raises(UserError, match="none of 60"):
        ask_all(numbered(60, "toolong"), MINI, settings(server), tmp_path / "a.sqlite")


@pytest.mark.parametrize(
    ("word", "said", "refused"),
    [
        ("crashes", "HTTP 500: .*CUDA out of memory", False),
        ("window", "HTTP 500: .*context size", True),
        ("decoder", "HTTP 400: .*maximum model length", True),
        ("provider", "no chat answer: .*model overloaded", False),
        ("detail", "HTTP 422: .*extra fields not permitted", False),
    ],
)
def test_one_prompts_failure_is_that_prompts_alone_with_the_services_words(
    server: Server, tmp_path: Path, word: str, said: str, refused: bool
):
    replies = ask_all(asks("good 1", word, "good 2"), MINI, settings(server), tmp_path / "a")
    assert [reply.text is None for reply in replies] == [False, True, False]
    assert re.search(said, replies[1].error) and replies[1].refused == refused


def test_answers_in_parts_and_usage_in_other_forms_are_read(server: Server, tmp_path: Path):
    long = "zero " * 200
    asked = asks("parts", long, "float")
    parts, zero, jumped = ask_all(asked, MINI, settings(server), tmp_path / "a")
    assert (parts.text, zero.text, jumped.text) == ("B02", "B0", "B0")
    assert zero.usd == worst(asks(long))  # a count of nothing is no count
    assert jumped.usd == MINI.usd(200_000, 6)


def test_reasoning_that_an_earlier_version_kept_is_no_answer(server: Server, tmp_path: Path):
    cache = tmp_path / "a.sqlite"
    ask_all(asks("good", "good 2"), MINI, settings(server), cache)
    base = sqlite3.connect(cache)
    base.execute("UPDATE answers SET text = '<think>B01' WHERE text = 'answer to good'")
    base.execute("UPDATE answers SET text = '<think>B01</think>B02' WHERE text LIKE '%2'")
    base.commit()
    base.close()
    again = ask_all(asks("good", "good 2"), MINI, settings(server), cache)
    assert [reply.text for reply in again] == ["answer to good", "B02"]
    assert server.asked() == {"good": 2, "good 2": 1}


def test_reasons_that_differ_in_numbers_alone_are_counted_together(server, tmp_path, caplog):
    long = asks(*("cutprompt " * count for count in (80, 90, 95)), "good")
    ask_all(long, MINI, settings(server), tmp_path / "a")
    assert "3 x prompt cut (34 tokens of" in caplog.text


def test_what_a_gateway_gave_up_waiting_for_may_have_been_paid(server: Server, tmp_path: Path):
    one = worst(asks("gateway 1"))
    replies = ask_all(
        numbered(9, "gateway"), MINI, settings(server, max_usd=20 * one), tmp_path / "b"
    )
    assert Chat.usd <= sum(reply.usd for reply in replies)
    server.log.clear()
    with pytest.raises(UserError, match="max_usd"):
        few = settings(server, max_usd=9.5 * one)
        ask_all(numbered(9, "gateway"), MINI, few, tmp_path / "c")


def test_order_is_kept_equal_requests_are_asked_once_and_the_limit_holds(server, tmp_path: Path):
    server.delay = 0.3
    prompts = [f"good {i % 20}" for i in range(50)]
    replies = ask_all(asks(*prompts), MINI, settings(server), tmp_path / "a.sqlite")
    assert [reply.text for reply in replies] == [f"answer to {prompt}" for prompt in prompts]
    assert len(server.log) == 20 and set(server.asked().values()) == {1}
    # what was paid is the sum of the others
    assert [reply.cached for reply in replies] == [False] * 20 + [True] * 30
    assert server.most == 4
    ask_all(numbered(20, "good x"), MINI, settings(server, concurrency=9), tmp_path / "a.sqlite")
    assert server.most > 4  # negative control: the server would have seen more


def picture(path: Path, colour: str = "red", kind: str = "JPEG") -> Path:
    Image.new("RGB", (20, 20), colour).save(path, kind)
    return path


def test_another_parameter_model_endpoint_or_image_byte_is_another_key(server, tmp_path: Path):
    red, cache, base = picture(tmp_path / "r.jpg"), tmp_path / "a.sqlite", settings(server)

    def asked(model: ApiModel = MINI, path: Path = red, text: str = "good", **other) -> int:
        before = len(server.log)
        request = partial(build_messages, text, [("B01", path)])
        ask_all([request], model, replace(base, **other), cache)
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
        {"base_url": base.base_url.replace("127.0.0.1", "localhost")},
    ]
    assert [asked(**one) for one in other] == [1] * len(other)
    assert [asked(**one) for one in other] == [0] * len(other)
    same = [
        {"timeout": 5.0},
        {"concurrency": 1},
        {"max_usd": 2.0},
        {"base_url": base.base_url + "/"},
    ]
    assert [asked(**one) for one in same] == [0] * 4
    sent = [(body["model"], body["max_tokens"], body["temperature"]) for body in Chat.bodies]
    assert sent[0] == ("gpt-4o-mini-2024-07-18", 20, 0) and sent[4] == ("tuned", 20, 0)


KILLED = """
import sys
from pathlib import Path
from lavic_utils.remote.chat_api import MODELS, Settings, ask_all, build_messages
made = Settings(max_usd=1.0, base_url=sys.argv[1], concurrency=4)
requests = [lambda i=i: build_messages(f"good {i}") for i in range(120)]
ask_all(requests, MODELS["GPT-4o-mini (title)"], made, Path(sys.argv[2]))
print("done")
"""


def test_killed_in_the_middle_it_asks_no_answered_request_again(server: Server, tmp_path: Path):
    cache, server.delay = tmp_path / "a.sqlite", 0.03
    command = [sys.executable, "-c", KILLED, f"{server.address}/v1", str(cache)]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 240  # a busy machine takes long to start Python
    while len(server.log) < 50 and time.monotonic() < end:
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    assert running.wait(10) == -signal.SIGKILL
    time.sleep(0.1)
    before, kept = server.asked(), len(rows(cache))
    # the middle, and all but those under way kept
    assert 50 <= len(before) < 120 and len(before) - 4 <= kept <= len(before)
    server.log.clear()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.stdout == "done\n", done.stderr
    assert len(server.log) == 120 - kept and len(set(server.asked()) | set(before)) == 120
    assert len(set(server.asked()) & set(before)) <= 4 and len(rows(cache)) == 120


def test_answers_of_earlier_versions_are_not_paid_for_again(server: Server, tmp_path: Path):
    cache = tmp_path / "a.sqlite"
    ask_all(asks("good", "good 2"), MINI, settings(server), cache)
    base = sqlite3.connect(cache)  # their table had one more column, and rows without an answer
    base.execute("ALTER TABLE answers ADD COLUMN error TEXT")
    base.execute("UPDATE answers SET text = NULL, error = 'no text' WHERE text = 'answer to good'")
    base.commit()
    base.close()
    ask_all(asks("good", "good 2", "good 3"), MINI, settings(server), cache)
    assert server.asked() == {"good": 2, "good 2": 1, "good 3": 1}


def test_over_the_estimate_nothing_is_asked(server: Server, tmp_path: Path):
    cache, most = tmp_path / "a.sqlite", worst(numbered(30))
    said = "asking gpt-4o-mini-2024-07-18 may cost .* USD, of which 0.000000 are spent; .* max_usd"
    with pytest.raises(UserError, match=said):
        ask_all(numbered(30), MINI, settings(server, max_usd=most * 0.99), cache)
    assert server.log == []
    exact = settings(server, max_usd=most)
    assert len(ask_all(numbered(30), MINI, exact, cache)) == 30  # negative control
    assert Chat.usd < most  # it is an upper bound
    # what is there is free
    assert len(ask_all(numbered(30), MINI, settings(server, max_usd=0), cache)) == 30


def test_a_service_that_counts_more_tokens_passes_no_cap(server: Server, tmp_path: Path):
    cache, Chat.times = tmp_path / "a.sqlite", 50
    limited = settings(server, max_usd=worst(numbered(40)) * 1.5)
    with pytest.raises(UserError, match="may cost .* more than max_usd.*12 of 40 answers are kept"):
        ask_all(numbered(40), MINI, limited, cache)
    assert 0 < Chat.usd <= limited.max_usd and len(server.log) == 12
    enough = settings(server, max_usd=worst(numbered(40)) * 60)
    assert len(ask_all(numbered(40), MINI, enough, cache)) == 40
    assert set(server.asked().values()) == {1}  # the same call went on, nothing twice
    # a sudden jump is over by no more than the requests under way
    Chat.usd, Chat.times = 0.0, 1
    mixed = [*numbered(9, "good y"), *asks("jump"), *numbered(40, "good z")]
    with pytest.raises(UserError, match="more than max_usd"):
        ask_all(mixed, MINI, settings(server, max_usd=worst(mixed) * 1.5), cache)
    assert server.asked()["jump"] == 1 and len(server.log) <= 40 + 9 + 1 + 2 * 4


def test_attempts_that_may_have_been_paid_for_count(server: Server, tmp_path: Path):
    one = worst(asks("dropped 1"))
    said = r"max_usd.* this run has cost at most 0\.0001\d\d USD"
    with pytest.raises(UserError, match=said):  # each attempt is reserved before it is sent
        ask_all(numbered(9, "dropped"), MINI, settings(server, max_usd=9.5 * one), tmp_path / "a")
    assert 0 < len(rows(tmp_path / "a")) < 9 and Chat.usd <= 9.5 * one
    Chat.usd = 0.0
    server.log.clear()
    limited = settings(server, max_usd=20 * one)
    replies = ask_all(numbered(9, "dropped"), MINI, limited, tmp_path / "b")
    assert Chat.usd <= sum(reply.usd for reply in replies) <= limited.max_usd  # reported too
    assert replies[1].usd == pytest.approx(one + MINI.usd(10, 6))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("unauthorised", "HTTP 401.*OPENAI_API_KEY"),
        ("forbidden", "HTTP 403"),
        ("gone", "HTTP 404.*model_not_found"),
        ("broke", "insufficient_quota"),
        ("moved", "HTTP 307: it redirects"),
    ],
)
def test_permanent_errors_stop_at_once_with_one_line(server, tmp_path: Path, word: str, said: str):
    with pytest.raises(UserError, match=rf"{said}.*0 of 9 answers are kept") as caught:
        ask_all(numbered(9, word), MINI, settings(server), tmp_path / "a.sqlite")
    assert len(server.log) == 1 and "\n" not in str(caught.value)


def test_what_is_under_way_when_a_run_stops_still_arrives(server: Server, tmp_path: Path):
    cache, first = tmp_path / "a.sqlite", asks("good", "late 1", "late 2", "late 3", "gone")
    with pytest.raises(UserError, match="404.* 4 of 5 answers are kept"):
        ask_all(first, MINI, settings(server), cache)
    assert len(rows(cache)) == 4
    # another that waits for its next attempt says why the run stopped, not that it was stopped
    waits = asks("good", "busy 1", "late 4", "late 5", "gone 2")
    with pytest.raises(UserError, match="404"):
        ask_all(waits, MINI, settings(server), cache)


def test_a_service_that_is_down_ends_the_run_and_keeps_what_came(server: Server, tmp_path: Path):
    cache = tmp_path / "a.sqlite"
    mixed = [*numbered(3), *asks("down"), *numbered(3, "good x")]
    found = ask_all(mixed, MINI, settings(server), cache)  # it may be that prompt's fault
    assert [reply.text is None for reply in found] == [False] * 3 + [True] + [False] * 3
    assert found[3].error.startswith("HTTP 503: no: ") and "try later" in found[3].error
    assert server.asked()["down"] == 4
    with pytest.raises(UserError, match=r"20 requests in a row .*20 x HTTP 503.* 6 of 66 answers"):
        ask_all([*mixed, *numbered(59, "down")], MINI, settings(server, concurrency=1), cache)
    nobody = settings(server, base_url="http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="no answer from the service"):
        ask_all(numbered(1), MINI, nobody, cache)


def test_the_key_shows_nowhere(server: Server, tmp_path: Path, caplog, capfd, monkeypatch):
    texts = []
    caplog.set_level(logging.DEBUG)
    words = ("unauthorised", "forbidden", "gone", "broke", "down", "bad", "echo", "dropped")
    for word in words:
        cache = tmp_path / f"{word}.sqlite"
        try:
            texts.append(repr(ask_all(asks(word), MINI, settings(server, attempts=2), cache)))
        except UserError as error:
            assert error.__cause__ is error.__context__ is None
            texts += [str(error), traceback.format_exc()]
    # it was sent, and echoed
    assert {headers["Authorization"] for *_, headers in server.log} == {f"Bearer {SECRET}"}
    assert "your header is Bearer [key]" in "".join(texts) and "no: Bearer [key]" in "".join(texts)
    printed = capfd.readouterr()
    texts += [caplog.text, printed.out, printed.err]
    texts += [path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()]
    assert len(caplog.text) > 1000 and len(rows(tmp_path / "echo.sqlite")) == 1
    assert [text for text in texts if SECRET in text or "SECRET" in text] == []
    # negative control: a dummy too short to be one is left alone, so the same search finds it
    monkeypatch.setenv(KEY, "SECRET")
    (echoed,) = ask_all(asks("echo"), MINI, settings(server), tmp_path / "other.sqlite")
    assert "Bearer SECRET" in echoed.text


def test_a_key_is_needed_except_on_this_machine(server: Server, tmp_path: Path, monkeypatch):
    cache = tmp_path / "a.sqlite"
    monkeypatch.delenv(KEY)
    with pytest.raises(Unavailable, match=KEY):
        ask_all(numbered(1), MINI, Settings(max_usd=1), cache)
    (reply,) = ask_all(numbered(1), MINI, settings(server), cache)
    assert reply.text == "answer to good 0"
    assert [headers["Authorization"] for *_, headers in server.log] == ["Bearer none"]
    monkeypatch.setenv(KEY, "two words\u00e9")
    with pytest.raises(UserError, match=f"{KEY} holds") as caught:
        ask_all(numbered(2), MINI, settings(server), cache)
    assert "words" not in str(caught.value)
    monkeypatch.delenv(KEY)
    assert ask_all(numbered(1), MINI, settings(server), cache)[0].cached  # needs no key


def test_where_nothing_may_be_spent_no_key_changes_anything(server: Server, monkeypatch):
    for change in (monkeypatch.delenv, lambda name: monkeypatch.setenv(name, SECRET)):
        with pytest.raises(Unavailable, match="^costs money: run `python -m lavic_utils run "):
            check(MINI, Settings(max_usd=0.0))
        change(KEY)
    check(MINI, Settings(max_usd=1.0))
    monkeypatch.delenv(KEY)
    with pytest.raises(Unavailable, match=KEY):  # negative control
        check(MINI, Settings(max_usd=1.0))
    assert server.log == []


def test_a_service_in_the_house_costs_nothing_unless_a_cap_is_given(
    server: Server, tmp_path: Path, capsys
):
    """Such a service may be a gateway to one that bills."""
    free = settings(server, max_usd=None, served="x")
    check(MINI, free)
    replies = ask_all(numbered(2), MINI, free, tmp_path / "a.sqlite")
    assert [reply.usd for reply in replies] == [0.0, 0.0] and len(server.log) == 2
    assert "at no cost" in capsys.readouterr().err
    with pytest.raises(Unavailable, match="costs money"):
        check(MINI, replace(free, max_usd=0.0))
    capped = replace(free, max_usd=worst(numbered(5)))
    with pytest.raises(UserError, match="more than max_usd"):
        ask_all(numbered(6, "good x"), MINI, capped, tmp_path / "a.sqlite")
    assert len(server.log) == 2
    ask_all(numbered(5), MINI, capped, tmp_path / "a.sqlite")  # two of them are kept
    assert len(server.log) == 5 and 0 < Chat.usd <= capped.max_usd
    assert Settings(base_url=OPENAI).priced(MINI) == MINI  # negative control: a public one


def test_only_the_papers_model_at_its_service_stands_in_the_papers_row():
    title, both = "GPT-4o-mini (title)", "GPT-4o-mini (title+image)"
    own = {"method": both, "answered_by": "gpt-4o-mini-2024-07-18 at api.openai.com"}
    assert Settings(1.0).row(both) == Settings(1.0, served=MINI.served).row(both) == own
    here = Settings(1.0, "http://127.0.0.1:1/v1", served="x").row(title)
    by = "x at 127.0.0.1:1"
    assert here == {"method": f"{by} (title)", "answered_by": by, "beside": title}
    for other in (Settings(1.0, "https://x.org/v1"), Settings(1.0, served="gpt-4o")):
        assert other.row(both)["beside"] == both != other.row(both)["method"]


def test_services_are_told_apart_by_more_than_their_host():
    title = "GPT-4o-mini (title)"
    for same in ("https://api.openai.com/v1/", "https://API.openai.com/v1"):
        assert Settings(base_url=same, served="").row(title) == Settings().row(title)
    rows = {
        Settings(base_url=f"http://127.0.0.1:1/{path}").row(title)["method"]
        for path in ("v1", "a/v1", "b/v1")
    }
    assert len(rows) == 3
    with pytest.raises(UserError, match="served: a model's name has at most 100 characters"):
        Settings(served="x" * 101)


def test_a_dry_run_says_what_asking_would_cost(server: Server, tmp_path: Path, capsys):
    ask_all(numbered(2), MINI, settings(server), tmp_path / "a.sqlite")
    said = f"asking: 2 requests to gpt-4o-mini-2024-07-18 at {server.address}/v1, at most 0.0"
    assert said in capsys.readouterr().err
    requests = numbered(500)
    said = ask_all(requests, MINI, settings(server), tmp_path / "a.sqlite", dry_run=True)
    most = worst(requests[2:])
    assert said.startswith("498 requests to gpt-4o-mini") and "; 2 more are answered" in said
    assert f"/v1, at most {most:.6f} USD by the list price; " in said
    assert len(server.log) == 2


@pytest.mark.parametrize("name", ["HTTP_PROXY", "ALL_PROXY", "http_proxy"])
def test_a_service_on_this_machine_is_asked_without_a_proxy(
    name: str, server: Server, tmp_path: Path, monkeypatch
):
    with serving(Chat) as proxy:
        monkeypatch.setenv(name, proxy.address)
        for host in ("127.0.0.1", "localhost"):
            here = settings(server, base_url=f"http://{host}:{server.server_address[1]}/v1")
            ask_all(asks("good"), MINI, here, tmp_path / host)
        assert len(server.log) == 2 and proxy.log == []
        monkeypatch.setattr(crawl, "direct", lambda addresses: {})
        ask_all(asks("good"), MINI, settings(server), tmp_path / "control")
        assert len(proxy.log) == 1  # negative control: it would have got dialogue and key


@pytest.mark.parametrize("kind", ["socks", "socks5"])
def test_a_proxy_that_cannot_be_used_is_named(kind: str, server: Server, tmp_path, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", f"{kind}://me:secret@127.0.0.1:9")
    with pytest.raises(UserError, match=f"ALL_PROXY names a proxy of kind {kind}://") as caught:
        ask_all(asks("good"), MINI, settings(server), tmp_path / "a.sqlite")
    assert "secret" not in str(caught.value) and server.log == []
    with pytest.raises(UserError, match="ALL_PROXY"):
        check(MINI, settings(server))


@pytest.mark.parametrize(
    "bad",
    [
        "http://example.org/v1",
        "https://me:pass@example.org/v1",
        "https://example.org/v1?key=abcdef",
        "http://localhost.example.org/v1",
        "ftp://127.0.0.1/",
        "localhost:8000",
        "http://127.0.0.1:port/v1",
        "https://",
        "https://api..openai.com/v1",
        f"https://{'a' * 64}.org/v1",
        "https://example.org:99999/v1",
    ],
)
def test_addresses_that_hold_or_would_show_a_secret_are_refused(bad: str):
    with pytest.raises(UserError, match="base_url") as caught:
        Settings(max_usd=1, base_url=bad)
    assert "pass@" not in str(caught.value) and "abcdef" not in str(caught.value)
    here = ("http://[::1]:1/v1", "http://127.0.0.9", "https://localhost/v1")
    for url in (OPENAI, "https://x.org:1/v1/", *here):
        Settings(max_usd=1, base_url=url)
        assert bool(chat_api.SERVICE.fullmatch(url)[1]) == (url in here)


@pytest.mark.parametrize("bad", [math.nan, -1, math.inf])
def test_a_cap_that_is_none_is_refused(bad: float):
    with pytest.raises(UserError, match="max_usd"):
        Settings(max_usd=bad)


def sent(message: dict) -> list[tuple[str, bytes]]:
    """Kind and content of each image of a message."""
    urls = [part["image_url"]["url"] for part in message["content"] if "image_url" in part]
    split = [url.removeprefix("data:").split(";base64,") for url in urls]
    return [(kind, base64.b64decode(text)) for kind, text in split]


def test_messages_hold_the_files_own_bytes_and_only_images_that_can_be_read(tmp_path: Path):
    red, png = picture(tmp_path / "r.jpg"), picture(tmp_path / "p.jpg", kind="PNG")
    (tmp_path / "cut.jpg").write_bytes(red.read_bytes()[:300])
    lost, cut = tmp_path / "none.jpg", tmp_path / "cut.jpg"
    named = [("B01", red), ("B02", lost), ("B03", png), ("B04", cut)]
    (message,) = build_messages("choose", named)
    told = [part.get("text", part["type"]) for part in message["content"]]
    assert message["role"] == "user"
    assert told == ["choose", "B01:", "image_url", "B03:", "image_url"]
    details = [part["image_url"]["detail"] for part in message["content"] if "image_url" in part]
    assert details == ["low", "low"]
    assert sent(message)[0] == ("image/jpeg", red.read_bytes())
    assert sent(message)[1][0] == "image/png"
    plain = [{"role": "user", "content": "choose"}]
    assert build_messages("choose", named[1:2]) == build_messages("choose") == plain
    both, text = most_tokens([message], MINI), most_tokens(plain, MINI)
    assert 2 * 2833 <= both - text <= 2 * 2833 + 10


@pytest.mark.parametrize("kind", ["MPO", "PNG", "GIF", "WEBP"])
def test_pictures_of_other_kinds_are_sent_as_services_take_them(kind, tmp_path: Path):
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.jpg", kind, save_all=True, append_images=frames[1:])
    (message,) = build_messages("choose", [("B01", tmp_path / "x.jpg")])
    ((mime, content),) = sent(message)
    image = Image.open(io.BytesIO(content))
    assert mime == image.get_format_mimetype() == "image/png"
    assert image.size == (30, 20) and not getattr(image, "is_animated", False)
    assert image.convert("RGB").getpixel((5, 5))[0] > 200  # the first picture


def test_it_runs_inside_a_running_loop_as_in_a_notebook(server: Server, tmp_path: Path):
    async def cell() -> list[Reply]:
        return ask_all(numbered(2), MINI, settings(server), tmp_path / "a.sqlite")

    assert [reply.text for reply in asyncio.run(cell())] == ["answer to good 0", "answer to good 1"]


def test_a_cache_in_use_or_unusable_is_said_in_one_line(server: Server, tmp_path: Path):
    with crawl.database(tmp_path / "a.sqlite", chat_api.SCHEMA, ""):
        with pytest.raises(UserError, match="another run uses it"):
            ask_all(numbered(1), MINI, settings(server), tmp_path / "a.sqlite")
    (tmp_path / "text").write_text("not a database" * 99, encoding="utf-8")
    for path in (tmp_path / "text", tmp_path / "text" / "a.sqlite", tmp_path):
        with pytest.raises(UserError, match="make room, or name another file"):
            ask_all(numbered(1), MINI, settings(server), path)
    assert server.log == []


def test_a_full_disk_says_what_was_paid_and_loses_no_answer_kept(full_disk, server, tmp_path):
    cache = tmp_path / "a.sqlite"
    with full_disk(70_000), pytest.raises(UserError, match="disk") as caught:
        ask_all(numbered(40), MINI, settings(server), cache)
    kept, asked = len(rows(cache)), len(server.log)
    assert 0 < kept < asked <= kept + 4 + 1  # those under way are lost
    assert f"; {kept} of 40 answers are kept in " in str(caught.value)
    assert "this run has cost at most 0.0" in str(caught.value) and "same command" in str(
        caught.value
    )
    replies = ask_all(numbered(40), MINI, settings(server), cache)  # with room it goes on
    assert all(reply.text for reply in replies) and len(server.log) == asked + 40 - kept


def test_the_five_published_rows_are_there_with_dated_models():
    rows = json.loads((PACKAGE / "published.json").read_text(encoding="utf-8"))["rows"]
    published = [row for row in rows if row["family"] == "proprietary"]
    assert list(dict.fromkeys(row["method"] for row in published)) == list(MODELS)
    for row in published:
        model = MODELS[row["method"]]
        assert model.served.startswith(row["method"].split(" ")[0].lower() + "-")
        assert model.image_tokens or "image" not in row["inputs"]
