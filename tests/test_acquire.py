"""Getting the data against a local server that misbehaves on purpose: what can arrive does, nothing corrupt is taken."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from lavic_utils.__main__ import main
from lavic_utils.config import DOMAINS, ROOT, UserError
from lavic_utils.remote import crawl
from lavic_utils.remote import download as acquire

FAST = crawl.Settings(
    concurrency=8, attempts=4, backoff=0.01, timeout=0.5, total=5, max_bytes=2**20
)
TEN = [f"B0TEST{i:04d}" for i in range(10)]


def picture(side: int = 40, kind: str = "JPEG") -> bytes:
    held = io.BytesIO()
    Image.effect_noise((side, side), 50).convert("RGB").save(held, kind)
    return held.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that announces 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def wide() -> bytes:
    """A whole PNG of few bytes with 72 million pixels, which Pillow alone would still decode."""
    held = io.BytesIO()
    Image.new("1", (9000, 8000)).save(held, "PNG")
    return held.getvalue()


GOOD, CUT, WIDE = picture(), picture(120)[:900], wide()
OLD_DATE = format_datetime(datetime.now(UTC) - timedelta(hours=1))


class Server(ThreadingHTTPServer):
    """Answers by the first part of the path; `log` holds (seconds, path, Range) of every request."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.log: list[tuple[float, str, str | None]] = []
        self.files: dict[str, bytes] = {}
        self.delay, self.ranges, self.cuts = 0.0, True, 0
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def asked(self) -> Counter[str]:
        return Counter(path for _, path, _ in self.log)

    def handle_error(self, *about: object) -> None:
        """Clients that hang up (on a body too large, or killed) are what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *about: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.log.append((time.monotonic(), self.path, self.headers["Range"]))
        time.sleep(self.server.delay)
        if self.path in self.server.files:
            return self.file(self.server.files[self.path])
        first = self.server.asked()[self.path] == 1
        getattr(self, self.path.split("/")[1].removesuffix(".jpg"))(first)

    def send(
        self, body: bytes = GOOD, code: int = 200, length: int | None = None, **headers: str
    ) -> None:
        self.send_response(code)
        fields = {
            "Content-Type": "image/jpeg",
            "Content-Length": str(len(body) if length is None else length),
            **headers,
        }
        for name, value in fields.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        if length not in (None, len(body)):
            self.close_connection = True

    def file(self, body: bytes) -> None:
        """A file, with Range if `ranges`; the first `cuts` answers break off half-way."""
        start = (
            int(self.headers["Range"][6:-1]) if self.server.ranges and self.headers["Range"] else 0
        )
        if start >= len(body):
            return self.send(b"", 416)
        more = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        rest = body[start:]
        self.server.cuts -= 1
        self.send(
            rest[: len(rest) // 2] if self.server.cuts >= 0 else rest,
            206 if start else 200,
            len(rest),
            **more,
        )

    def good(self, first: bool) -> None:
        self.send()

    def gone(self, first: bool) -> None:
        self.send(b"no", 404)

    def busy(self, first: bool) -> None:
        self.send(b"", 429, Retry_After="1") if first else self.send()

    def busydate(self, first: bool) -> None:
        self.send(b"", 503, Retry_After=OLD_DATE) if first else self.send()

    def broken(self, first: bool) -> None:
        self.send(b"oh", 500) if first else self.send()

    def down(self, first: bool) -> None:
        self.send(b"", 502)

    def slow(self, first: bool) -> None:
        time.sleep(1.0 if first else 0)
        self.send()

    def cutonce(self, first: bool) -> None:
        self.send(GOOD[:300], length=len(GOOD)) if first else self.send()

    def cutalways(self, first: bool) -> None:
        self.send(GOOD[:300], length=len(GOOD))

    def cutimage(self, first: bool) -> None:
        self.send(CUT)

    def untyped(self, first: bool) -> None:
        self.send(Content_Type="text/plain")

    def png(self, first: bool) -> None:
        self.send(picture(kind="PNG"))

    def html(self, first: bool) -> None:
        self.send(b"<html>robot?</html>")

    def empty(self, first: bool) -> None:
        self.send(b"")

    def eps(self, first: bool) -> None:
        self.send(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")

    def bomb(self, first: bool) -> None:
        self.send(bomb())

    def wide(self, first: bool) -> None:
        self.send(WIDE)

    def huge(self, first: bool) -> None:
        self.send(GOOD, length=200 * 2**20)

    def endless(self, first: bool) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(200):
            self.wfile.write(b"100000\r\n" + b"x" * 2**20 + b"\r\n")

    def moved(self, first: bool) -> None:
        self.send(b"", 302, Location="/good/moved.jpg")

    def tofile(self, first: bool) -> None:
        self.send(b"", 302, Location="file:///etc/hostname")

    def loop(self, first: bool) -> None:
        self.send(b"", 301, Location=self.path)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(
            target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        thread.start()
        yield made
        made.shutdown()


def items(root: Path, links: dict[str, list[str]]) -> Path:
    rows = {
        asin: {"title": "", "images": [{"large": one} for one in every]}
        for asin, every in links.items()
    }
    root.mkdir(exist_ok=True)
    (root / "item2meta_train.json").write_text(json.dumps(rows), encoding="utf-8")
    return root


def rows(root: Path) -> dict[str, sqlite3.Row]:
    base = sqlite3.connect(root / crawl.MANIFEST)
    base.row_factory = sqlite3.Row
    found = {
        Path(row["name"]).stem.split("_")[0]: row for row in base.execute("SELECT * FROM images")
    }
    base.close()
    return found


ARRIVE = ("good", "busy", "busydate", "broken", "slow", "cutonce", "untyped", "png", "moved")
FAIL = (
    "gone",
    "cutimage",
    "html",
    "empty",
    "eps",
    "bomb",
    "wide",
    "huge",
    "endless",
    "tofile",
    "loop",
    "ftp",
    "nonsense",
)
UNREACHED = ("down", "cutalways")


def test_all_that_can_arrive_does_and_nothing_corrupt_is_taken(
    server: Server, tmp_path: Path
) -> None:
    links = {name: [f"{server.address}/{name}/x.jpg"] for name in (*ARRIVE, *FAIL, *UNREACHED)}
    links |= {"ftp": ["ftp://127.0.0.1/x.jpg"], "nonsense": ["http://x:port/x"], "nolink": [""]}
    root = items(tmp_path / "d", links)
    counts = crawl.crawl(root, settings=FAST)
    found = rows(root)
    assert {name for name in found if found[name]["status"] == "ok"} == set(ARRIVE)
    assert {name for name in found if found[name]["status"] == "failed"} == set(FAIL)
    assert {name for name in found if found[name]["status"] == "unreached"} == set(UNREACHED)
    assert counts == {
        "ok": len(ARRIVE),
        "failed": len(FAIL),
        "unreached": len(UNREACHED),
        "no_link": 1,
    }
    assert sorted(p.name for p in (root / "train_images").iterdir()) == sorted(
        f"{name}_0.jpg" for name in ARRIVE
    )
    for name in ARRIVE:  # what the manifest says is what the file is
        content = (root / "train_images" / f"{name}_0.jpg").read_bytes()
        row = found[name]
        assert (row["sha256"], row["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
        assert (row["width"], row["height"], row["error"]) == (40, 40, None)
    assert all(found[name]["error"] for name in (*FAIL, *UNREACHED))
    said = {
        "eps": "not an image",
        "html": "not an image",
        "wide": "pixels",
        "bomb": "Bomb",
        "cutimage": "cut",
        "huge": "bytes",
        "endless": "bytes",
        "tofile": "file:",
        "loop": "redirects",
        "ftp": "ftp:",
        "gone": "404",
    }
    assert {name: text for name, text in said.items() if text not in found[name]["error"]} == {}
    at = [seconds for seconds, path, _ in server.log if path.startswith("/busy/")]
    assert len(at) == 2 and at[1] - at[0] >= 1  # Retry-After was kept
    assert (
        found["down"]["attempts"] == FAST.attempts
        and server.asked()["/loop/x.jpg"] == crawl.MAX_REDIRECTS + 1
    )
    # negative control: Pillow opens the cut image, so a check of its header alone would have taken it
    assert Image.open(io.BytesIO(CUT)).size == (120, 120)

    server.log.clear()
    again = crawl.crawl(root, settings=FAST)
    assert {path.split("/")[1] for path in server.asked()} == set(UNREACHED)
    assert again == {
        "had": len(ARRIVE),
        "failed_before": len(FAIL),
        "unreached": len(UNREACHED),
        "no_link": 1,
    }
    assert rows(root)["down"]["attempts"] == 2 * FAST.attempts
    server.log.clear()
    crawl.crawl(root, retry_failed=True, settings=FAST)
    assert {path.split("/")[1] for path in server.asked()} == {*UNREACHED, *FAIL} - {
        "ftp",
        "nonsense",
    }


def test_a_second_run_asks_only_for_what_is_lost_or_new(server: Server, tmp_path: Path) -> None:
    root = items(
        tmp_path / "d",
        {asin: [f"{server.address}/good/{asin}_{k}" for k in range(2)] for asin in TEN},
    )
    assert crawl.crawl(root, first_only=True, settings=FAST)["ok"] == 10 and len(server.log) == 10
    assert crawl.crawl(root, settings=FAST) == {"had": 10, "ok": 10} and len(server.log) == 20
    assert crawl.crawl(root, settings=FAST) == {"had": 20} and len(server.log) == 20
    (root / "train_images" / f"{TEN[0]}_1.jpg").unlink()
    (root / "train_images" / f"{TEN[1]}_0.jpg").write_bytes(GOOD[:50])
    server.log.clear()
    assert crawl.crawl(root, settings=FAST) == {"had": 18, "ok": 2}
    assert set(server.asked()) == {f"/good/{TEN[0]}_1", f"/good/{TEN[1]}_0"}
    # without a manifest, images that are whole are kept and the others asked for
    (root / crawl.MANIFEST).unlink()
    (root / "train_images" / f"{TEN[2]}_0.jpg").write_bytes(CUT)
    server.log.clear()
    assert crawl.crawl(root, settings=FAST) == {"ok": 20} and set(server.asked()) == {
        f"/good/{TEN[2]}_0"
    }


def command(root: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "lavic_utils",
        "data",
        "crawl",
        "--data",
        str(root),
        "--concurrency",
        "4",
        *more,
    ]


def test_killed_in_the_middle_it_goes_on(server: Server, tmp_path: Path) -> None:
    root = items(
        tmp_path / "d", {f"B0KILL{i:04d}": [f"{server.address}/good/{i}"] for i in range(120)}
    )
    server.delay = 0.03
    running = subprocess.Popen(
        command(root), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 20
    while len(server.log) < 40 and time.monotonic() < end:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    time.sleep(0.1)
    before = server.asked()
    assert 40 <= len(before) < 120  # else it was not the middle
    server.log.clear()
    done = subprocess.run(command(root), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (
        done.returncode == 0 and len(done.stdout.splitlines()) == 1 and "120 there" in done.stdout
    ), done
    asked_again = set(server.asked()) & set(before)
    assert len(asked_again) <= 4 and len(set(server.asked()) | set(before)) == 120
    assert {p.suffix for p in (root / "train_images").iterdir()} == {
        ".jpg"
    }  # no half-written file is left
    assert all(row["status"] == "ok" for row in rows(root).values()) and len(rows(root)) == 120


def test_crawl_refuses_in_one_line(
    server: Server,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(["data", "crawl", "--data", str(tmp_path)]) == 2
    assert "data fetch" in (text := capfd.readouterr().err) and len(text.splitlines()) == 1
    root = items(tmp_path / "d", {asin: [f"{server.address}/down/{asin}"] for asin in TEN})
    monkeypatch.setattr(crawl, "GIVE_UP", 5)
    with pytest.raises(UserError, match="5 images in a row.*HTTP 502"):
        crawl.crawl(root, settings=FAST)
    with crawl.manifest(root), pytest.raises(UserError, match="another crawl"):
        crawl.crawl(root, settings=FAST)
    (root / crawl.MANIFEST).write_bytes(b"not a data base" * 100)
    with pytest.raises(UserError, match="delete it"):
        crawl.crawl(root, settings=FAST)


def test_retry_after_is_read_and_capped() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=50), usegmt=True)
    assert crawl.retry_after("7") == 7 and 45 < (crawl.retry_after(soon) or 0) <= 50
    assert crawl.retry_after(OLD_DATE) == 0
    assert [crawl.retry_after(text) for text in (None, "", "soon", "-1", "Mon, 99 Foo")] == [
        None
    ] * 5

    def waits(error: Exception) -> float:
        state = crawl.RetryCallState(None, None, (), {})  # type: ignore[arg-type]
        state.set_exception((type(error), error, None))
        return crawl.waiting(0.001)(state)

    assert (
        waits(crawl.Transient("", 7.0)) == 7
        and waits(crawl.Transient("", 1e9)) == crawl.LONGEST_WAIT
    )
    assert waits(crawl.Transient("")) < 0.1


CATALOGUE = json.dumps({TEN[0]: {"title": "made up", "images": []}}).encode()


def zipped(*members: tuple[str, bytes]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return held.getvalue()


def publish(server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Made-up files on the server; their git blob ids."""
    monkeypatch.setenv("LAVIC_DATA_URL", server.address)
    contents = {
        "all_beauty/test.jsonl": os.urandom(200_000),
        acquire.ZIP: zipped((acquire.CATALOGUE, CATALOGUE)),
    }
    server.files = {f"/data/{name}": content for name, content in contents.items()}
    return {
        name: hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        for name, body in contents.items()
    }


def test_fetch_verifies_unzips_and_asks_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = publish(server, monkeypatch)
    root = tmp_path / "d"
    assert "2 downloaded" in acquire.fetch(root, files, 0.01)
    for path, content in server.files.items():
        assert (root / path.removeprefix("/data/")).read_bytes() == content
    assert (root / acquire.CATALOGUE).read_bytes() == CATALOGUE
    assert sorted(p.name for p in root.iterdir()) == ["all_beauty", acquire.CATALOGUE, acquire.ZIP]
    assert set(acquire.file_states(root, files).values()) == {"ok"}
    asked = len(server.log)
    assert "0 downloaded" in acquire.fetch(root, files, 0.01) and len(server.log) == asked == 2
    # a file of the user's is not overwritten, and is named
    for name in ("all_beauty/test.jsonl", acquire.CATALOGUE):
        old = (root / name).read_bytes()
        (root / name).write_bytes(b"mine")
        with pytest.raises(UserError, match="move it away"):
            acquire.fetch(root, files, 0.01)
        assert (root / name).read_bytes() == b"mine" and acquire.file_states(root, files)[
            name
        ] == "wrong"
        (root / name).write_bytes(old)


@pytest.mark.parametrize("ranges", [True, False])
def test_fetch_goes_on_after_a_cut(
    ranges: bool, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, name = publish(server, monkeypatch), "all_beauty/test.jsonl"
    server.ranges, server.cuts = ranges, 6  # five attempts of the first run, one of the second
    with pytest.raises(UserError, match=f"still missing: {name}"):
        acquire.fetch(tmp_path, {name: files[name]}, 0.01)
    part = tmp_path / "all_beauty" / ".test.jsonl.part"
    assert part.stat().st_size > 0 and not (tmp_path / name).exists()
    asked = len(server.log)
    acquire.fetch(tmp_path, {name: files[name]}, 0.01)
    assert (tmp_path / name).read_bytes() == server.files[f"/data/{name}"] and not part.exists()
    assert all(not path.name.startswith(".") for path in tmp_path.rglob("*"))
    starts = [int(one[6:-1]) for _, _, one in server.log if one]
    assert len(starts) == len(server.log) - 1 == 6 and asked == 5
    assert (
        starts == sorted(set(starts))
    ) is ranges  # negative control: without Range nothing is gained by a cut


def test_fetch_takes_a_part_that_is_complete(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, name = (
        publish(server, monkeypatch),
        "all_beauty/test.jsonl",
    )  # as a kill between last byte and renaming leaves
    (tmp_path / "all_beauty").mkdir()
    (tmp_path / "all_beauty" / ".test.jsonl.part").write_bytes(server.files[f"/data/{name}"])
    acquire.fetch(tmp_path, {name: files[name]}, 0.01)
    assert (tmp_path / name).is_file() and [one for _, _, one in server.log] == [
        "bytes=200000-"
    ]  # answered 416


def test_fetch_refuses_what_is_not_published(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    files, name = publish(server, monkeypatch), "all_beauty/test.jsonl"
    server.files[f"/data/{name}"] = server.files[f"/data/{name}"][:-1] + b"?"
    with pytest.raises(UserError, match="not the published file.*again"):
        acquire.fetch(tmp_path, files, 0.01)
    assert (
        not list((tmp_path / "all_beauty").iterdir()) and (tmp_path / acquire.CATALOGUE).is_file()
    )
    server.files = {
        "/data/item2meta_valid.jsonl": b"{}"
    }  # a whole command: one wrong file, the others unknown
    monkeypatch.setattr(Handler, "data", Handler.gone, raising=False)
    assert main(["data", "fetch", "--to", str(tmp_path / "new")]) == 2
    error = capfd.readouterr().err
    assert (
        len(error.splitlines()) == 1
        and error.count("HTTP 404") == 10
        and "item2meta_valid.jsonl: what came" in error
    )
    monkeypatch.setenv("LAVIC_DATA_URL", "http://127.0.0.1:9")
    with pytest.raises(
        UserError,
        match="cannot be reached.*still missing.*amazon_home/test.jsonl.*check the network",
    ):
        acquire.fetch(tmp_path / "none", backoff=0.01)
    assert not [p for p in (tmp_path / "none").rglob("*") if p.is_file()]


def lying(limit: int) -> bytes:
    """A zip whose member unzips to more than its directory says."""
    content = bytearray(zipped((acquire.CATALOGUE, b"0" * 50 * limit)))
    at = content.rindex(b"PK\1\2") + 24
    content[at : at + 4] = struct.pack("<I", 10)
    return bytes(content)


EVIL = {
    "up": zipped(("../x", b""), (acquire.CATALOGUE, b"{}")),
    "root": zipped(("/tmp/x", b""), (acquire.CATALOGUE, b"{}")),
    "up with the name": zipped((f"../../{acquire.CATALOGUE}", b"{}")),
    "another": zipped(("x.json", b"{}")),
    "twice": zipped((acquire.CATALOGUE, b"{}"), (f"a/{acquire.CATALOGUE}", b"{}")),
    "bomb": zipped((acquire.CATALOGUE, b"0" * 100_000)),
    "lying bomb": lying(1000),
    "cut": zipped((acquire.CATALOGUE, os.urandom(5000)))[:-100],
    "not a zip": b"PK",
}


@pytest.mark.parametrize("name", EVIL)
def test_bad_archives_write_nothing(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / acquire.ZIP).write_bytes(EVIL[name])
    with pytest.raises(UserError, match="refused"):
        acquire.unzip(folder / acquire.ZIP, folder / acquire.CATALOGUE, limit=1000)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [acquire.ZIP]
    # negative control: the same call takes a good one, also with a Mac's extra member
    (folder / acquire.ZIP).write_bytes(
        zipped((acquire.CATALOGUE, b"{}"), (f"__MACOSX/._{acquire.CATALOGUE}", b""))
    )
    acquire.unzip(folder / acquire.ZIP, folder / acquire.CATALOGUE, limit=1000)
    assert (folder / acquire.CATALOGUE).read_bytes() == b"{}"


def test_verify_and_stats_of_partial_data(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / DOMAINS["home"] / "test.jsonl"
    path.parent.mkdir()
    row = {
        "context": "<submission>a mug</submission>",
        "context_items": [],
        "gt": "this",
        "gt_items": [TEN[3]],
        "candidates_st": TEN,
        "candidates_gpt_large": TEN,
    }
    other = {**row, "candidates_st": [f"B0OTHER{i:03d}" for i in range(10)]}
    path.write_text(f"{json.dumps(row)}\n{json.dumps(other)}\n", encoding="utf-8")
    (tmp_path / "train_images").mkdir()
    for asin in [*TEN[:8], *other["candidates_st"]]:
        (tmp_path / "train_images" / f"{asin}_0.jpg").write_bytes(GOOD)
    lines, right = acquire.verify(tmp_path)
    assert (
        not right and f"wrong     {DOMAINS['home']}/test.jsonl" in lines
    )  # made up: not the published file
    assert lines[-1].splitlines()[-1].split() == ["home", "test", "20", "2", "0.1000", "2", "1"]
    (tmp_path / "train_images" / f"{TEN[0]}_0.jpg").write_bytes(CUT)
    lines, _ = acquire.verify(tmp_path)
    assert lines[-1].splitlines()[-1].split() == ["home", "test", "20", "3", "0.1500", "2", "1"]
    assert any(line.startswith(f"corrupt   train_images/{TEN[0]}_0.jpg") for line in lines)
    assert main(["data", "stats", "--data", str(tmp_path), "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    (found,) = shown["splits"]
    assert (found["domain"], found["split"], found["conversations"], found["recall_st"]) == (
        "home",
        "test",
        2,
        0.5,
    )
    home = {one["domain"]: one for one in shown["table_1"]}["home"]
    assert (home["conversations_published"], home["conversations_here"], home["turns_here"]) == (
        3701,
        2,
        2,
    )
    assert [home[f"{name}_here"] for name in ("items", "images", "splits")] == [20, None, "test"]
    assert home["splits_absent"] == "train, valid"
    assert main(["data", "stats", "--data", str(tmp_path)]) == 0
    assert (
        "recall_st" in (text := capfd.readouterr().out)
        and "no catalogue" in text
        and "set aside" not in text
    )
    items(tmp_path, {TEN[0]: ["a", "b"], TEN[1]: ["c"], "B0UNUSED01": ["d"]})
    assert main(["data", "stats", "--data", str(tmp_path), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["table_1"][2]["images_here"] == 3
    path.write_text(
        f"{json.dumps(row)}\n{json.dumps(other | {'gt_items': []})}\n", encoding="utf-8"
    )
    assert (
        main(["data", "stats", "--data", str(tmp_path)]) == 2
        and "line 2: field gt_items" in capfd.readouterr().err
    )
    assert main(["data", "stats", "--data", str(tmp_path), "--lenient", "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["splits"][0]["conversations"] == 1 and shown["set_aside"]["counts"] == [
        {
            "file": f"{DOMAINS['home']}/test.jsonl",
            "kind": "bad value",
            "field": "gt_items",
            "rows": 1,
        }
    ]
    assert main(["data", "stats", "--data", str(tmp_path), "--lenient"]) == 0
    assert (
        "set aside: 1 rows" in (text := capfd.readouterr().out)
        and "test.jsonl, line 2: field gt_items" in text
    )
    path.write_text("{\n", encoding="utf-8")
    assert (
        main(["data", "stats", "--data", str(tmp_path), "--lenient"]) == 0
    )  # no row is left: reported, no figures
    assert "set aside: 1 rows" in capfd.readouterr().out
    assert main(["data", "verify", "--data", str(tmp_path)]) == 1
    assert "line 1" in capfd.readouterr().out
    assert main(["data", "stats", "--data", str(tmp_path / "none")]) == 2
