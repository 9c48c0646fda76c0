"""Getting the data from a local server that misbehaves on purpose: what can arrive does, nothing
corrupt is taken."""

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
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from server import Handler, Server, serving

from lavic_utils import hub
from lavic_utils.__main__ import main
from lavic_utils.audit import inspection
from lavic_utils.config import DOMAINS, ROOT, UserError
from lavic_utils.remote import crawl, download

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
    chunks = (b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    chunks += (b"IDAT", zlib.compress(b"\0" * 100), b"IEND", b"")
    made = b"\x89PNG\r\n\x1a\n"
    for kind, body in zip(chunks[::2], chunks[1::2], strict=True):
        check = struct.pack(">I", zlib.crc32(kind + body))
        made += struct.pack(">I", len(body)) + kind + body + check
    return made


def wide() -> bytes:
    """A whole PNG of few bytes with 72 million pixels, which Pillow alone would still decode."""
    held = io.BytesIO()
    Image.new("1", (9000, 8000)).save(held, "PNG")
    return held.getvalue()


GOOD, CUT, WIDE, PNG = picture(), picture(120)[:900], wide(), picture(kind="PNG")


class Shop(Handler):
    """Answers by the first part of the path, or with one of `files`: with Range if `ranges`, the
    first `cuts` answers broken off half-way."""

    files: dict[str, bytes] = {}
    ranges, cuts = True, 0

    def do_GET(self) -> None:
        file = self.path in self.files
        self.behave(self.path, "file" if file else self.path.split("/")[1])

    def file(self, first: bool) -> None:
        body, asked = self.files[self.path], self.headers["Range"]
        start = int(asked[6:-1]) if Shop.ranges and asked else 0
        if start >= len(body):
            return self.send(b"", 416)
        rest = body[start:]
        Shop.cuts -= 1
        sent = rest[: len(rest) // 2] if Shop.cuts >= 0 else rest
        self.send(sent, 206 if start else 200, len(rest))

    def good(self, first: bool) -> None:
        self.send(GOOD)

    def data(self, first: bool) -> None:
        self.send(b"no", 404)

    gone = data

    def busy(self, first: bool) -> None:
        self.send(b"", 429, Retry_After="1") if first else self.send(GOOD)

    def broken(self, first: bool) -> None:
        self.send(b"oh", 500) if first else self.send(GOOD)

    def down(self, first: bool) -> None:
        self.send(b"", 502)

    def slow(self, first: bool) -> None:
        time.sleep(1.0 if first else 0)
        self.send(GOOD)

    def cutonce(self, first: bool) -> None:
        self.send(GOOD[:300], length=len(GOOD)) if first else self.send(GOOD)

    def cutalways(self, first: bool) -> None:
        self.send(GOOD[:300], length=len(GOOD))

    def cutimage(self, first: bool) -> None:
        self.send(CUT)

    def png(self, first: bool) -> None:
        self.send(PNG, Content_Type="text/plain")

    def html(self, first: bool) -> None:
        self.send(b"<html>robot?</html>")

    def empty(self, first: bool) -> None:
        self.send()

    def eps(self, first: bool) -> None:
        self.send(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")

    def bomb(self, first: bool) -> None:
        self.send(bomb())

    def wide(self, first: bool) -> None:
        self.send(WIDE)

    def pixel(self, first: bool) -> None:
        self.send(picture(1))

    def endless(self, first: bool) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(200):
            self.wfile.write(b"100000\r\n" + b"x" * 2**20 + b"\r\n")

    def moved(self, first: bool) -> None:
        self.send(b"", 302, Location="/good/moved.jpg")

    def inside(self, first: bool) -> None:
        self.send(b"", 302, Location=f"{self.server.address}/good/x")

    def mirror(self, first: bool) -> None:
        path = self.path.removeprefix("/mirror")
        self.send(b"", 302, Location=f"{self.server.address}{path}")

    def tofile(self, first: bool) -> None:
        self.send(b"", 302, Location="file:///etc/hostname")

    def tobad(self, first: bool) -> None:
        self.send(b"", 302, Location="http://[::1/")

    def loop(self, first: bool) -> None:
        self.send(b"", 301, Location=self.path)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name, value in {"files": {}, "ranges": True, "cuts": 0}.items():
        monkeypatch.setattr(Shop, name, value)
    with serving(Shop) as made:
        monkeypatch.setenv("LAVIC_DATA_URL", made.address)  # the user's own server
        yield made


def items(root: Path, links: dict[str, list[str]]) -> Path:
    rows = {a: {"title": "", "images": [{"large": x} for x in links[a]]} for a in links}
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


ARRIVE = ("good", "busy", "broken", "slow", "cutonce", "png", "moved")
SAID = {  # of what cannot be had
    "eps": "not an image",
    "html": "not an image",
    "empty": "not an image",
    "wide": "pixels",
    "bomb": "Bomb",
    "pixel": "1 x 1 pixels: a shop's placeholder",
    "cutimage": "cut",
    "endless": "bytes",
    "tofile": "file:",
    "loop": "redirects",
    "gone": "404",
}
BAD = {  # links that no request is made for
    "ftp": "ftp://127.0.0.1/x.jpg",
    "nonsense": "http://x:port/x",
    "bigport": "http://127.0.0.1:99999/x",
    "negative": "http://127.0.0.1:-1/x",
    "bracket": "http://[::1/x",
    "nohost": "http:///x",
}
UNREACHED = ("down", "cutalways", "tobad")


def test_all_that_can_arrive_does_and_nothing_corrupt_is_taken(server: Server, tmp_path: Path):
    links = {name: [f"{server.address}/{name}/x.jpg"] for name in (*ARRIVE, *SAID, *UNREACHED)}
    links |= {name: [link] for name, link in BAD.items()} | {"nolink": [""]}
    root, failed = items(tmp_path / "d", links), len(SAID) + len(BAD)
    counts = crawl.crawl(root, settings=FAST)
    found = rows(root)
    status = {name: row["status"] for name, row in found.items()}
    assert status == {
        **dict.fromkeys(ARRIVE, "ok"),
        **dict.fromkeys((*SAID, *BAD), "failed"),
        **dict.fromkeys(UNREACHED, "unreached"),
    }
    assert counts == {"ok": len(ARRIVE), "failed": failed, "unreached": 3, "no_link": 1}
    here = [path.name for path in (root / "train_images").iterdir()]
    assert sorted(here) == sorted(f"{name}_0.jpg" for name in ARRIVE)
    assert all((row["error"] is None) == (row["status"] == "ok") for row in found.values())
    assert {name: text for name, text in SAID.items() if text not in found[name]["error"]} == {}
    at = [seconds for seconds, path, _ in server.log if path.startswith("/busy/")]
    assert len(at) == 2 and at[1] - at[0] >= 1  # Retry-After was kept
    asked = server.asked()
    assert asked["/down/x.jpg"] == FAST.attempts
    assert asked["/loop/x.jpg"] == crawl.MAX_REDIRECTS + 1
    # negative control: Pillow opens the cut image, so a check of its header would have taken it
    assert Image.open(io.BytesIO(CUT)).size == (120, 120)

    server.log.clear()
    again = crawl.crawl(root, settings=FAST)
    assert {path.split("/")[1] for path in server.asked()} == set(UNREACHED)
    assert again == {"had": len(ARRIVE), "failed_before": failed, "unreached": 3, "no_link": 1}
    server.log.clear()
    (root / crawl.MANIFEST).unlink()
    crawl.crawl(root, settings=FAST)
    assert {path.split("/")[1] for path in server.asked()} == {*UNREACHED, *SAID}


def test_a_lone_surrogate_in_a_link_is_one_failed_row(server: Server, tmp_path: Path):
    links = {"A": [f"{server.address}/gone/\ud800"], "B": [f"{server.address}/good"]}
    root = items(tmp_path / "d", links)
    assert crawl.crawl(root, settings=FAST) == {"ok": 1, "failed": 1}
    assert crawl.crawl(root, settings=FAST) == {"had": 1, "failed_before": 1}


def test_links_that_no_answer_comes_for_keep_no_other_from_being_tried(
    server: Server, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(crawl, "GIVE_UP", 5)
    links = {f"A{i}": [f"{server.address}/down/{i}"] for i in range(5)}
    root = items(tmp_path / "d", {**links, "B": [f"{server.address}/good"]})
    one = replace(FAST, concurrency=1, attempts=1)
    for images in (0, 1):  # as many are there after the first run, and after the second
        with pytest.raises(UserError, match="5 images in a row"):
            crawl.crawl(root, settings=one)
        assert len(list((root / "train_images").iterdir())) == images


def test_no_redirect_leads_from_a_public_host_inside(server: Server, tmp_path: Path, monkeypatch):
    inside = crawl.is_private
    assert inside("127.0.0.1") and inside("169.254.169.254") and inside("10.1.2.3")
    assert inside("localhost") and inside("::1") and not inside("8.8.8.8") and not inside("x..y")
    link = f"http://localhost:{server.server_address[1]}/inside/x"
    root = items(tmp_path / "d", {"A": [link]})
    monkeypatch.setattr(crawl, "is_private", lambda host: host != "localhost" and inside(host))
    monkeypatch.setenv("LAVIC_DATA_URL", "https://example.org")
    assert crawl.crawl(root, settings=FAST) == {"failed": 1}
    assert "127.0.0.1: a private address" in rows(root)["A"]["error"]
    assert list(server.asked()) == ["/inside/x"]
    # negative control: to the host that the user named, the same redirect is followed
    monkeypatch.setenv("LAVIC_DATA_URL", server.address)
    (root / crawl.MANIFEST).unlink()
    assert crawl.crawl(root, settings=FAST) == {"ok": 1}


@pytest.mark.parametrize("given", ["", "http://10.1.2.3", "http://[::1", "https://example.org"])
def test_no_link_of_the_data_leads_inside(given: str, server, tmp_path: Path, monkeypatch):
    port = server.server_address[1]
    hosts = {"A": "127.0.0.1", "B": "localhost", "C": "127.1", "D": "[::ffff:127.0.0.1]"}
    links = {name: [f"http://{host}:{port}/good/x"] for name, host in hosts.items()}
    root = items(tmp_path / "d", {**links, "E": ["http://169.254.169.254/latest"]})
    monkeypatch.setenv("LAVIC_DATA_URL", given)
    assert crawl.crawl(root, settings=FAST) == {"failed": 5} and server.log == []
    assert all("a private address" in row["error"] for row in rows(root).values())
    monkeypatch.setenv("LAVIC_DATA_URL", f"{server.address}/")  # negative control, for one alone
    (root / crawl.MANIFEST).unlink()
    assert crawl.crawl(root, settings=FAST) == {"ok": 1, "failed": 4}


def test_no_mirror_of_the_files_leads_inside(server: Server, tmp_path: Path, monkeypatch):
    inside, files = crawl.is_private, {NAME: hashlib.sha1(b"blob 1\0x").hexdigest()}
    Shop.files = {f"/data/{NAME}": b"x"}
    monkeypatch.setenv("LAVIC_DATA_URL", f"http://localhost:{server.server_address[1]}/mirror")
    monkeypatch.setattr(crawl, "is_private", lambda host: host != "localhost" and inside(host))
    with pytest.raises(UserError, match="private address"):
        download.fetch(tmp_path, files, 0.01)
    monkeypatch.setenv("LAVIC_DATA_URL", f"{server.address}/mirror")
    assert "1 new" in download.fetch(tmp_path, files, 0.01)  # negative control


def test_a_second_run_asks_only_for_what_is_lost_or_new(server: Server, tmp_path: Path):
    links = {asin: [f"{server.address}/good/{asin}_{k}" for k in range(2)] for asin in TEN}
    root = items(tmp_path / "d", links)
    assert crawl.crawl(root, first_only=True, settings=FAST)["ok"] == 10 and len(server.log) == 10
    assert crawl.crawl(root, settings=FAST) == {"had": 10, "ok": 10} and len(server.log) == 20
    assert crawl.crawl(root, settings=FAST) == {"had": 20} and len(server.log) == 20
    (root / "train_images" / f"{TEN[0]}_1.jpg").unlink()
    (root / crawl.MANIFEST).unlink()  # without a manifest, images are kept
    server.log.clear()
    assert crawl.crawl(root, settings=FAST) == {"had": 19, "ok": 1}
    assert set(server.asked()) == {f"/good/{TEN[0]}_1"}
    # another link for what cannot be had is asked for
    for word, found in (("gone", "failed"), ("gone", "failed_before"), ("good", "ok")):
        items(root, {"B0": [f"{server.address}/{word}/x"]})
        assert crawl.crawl(root, settings=FAST) == {found: 1}


def test_killed_in_the_middle_it_goes_on(server: Server, tmp_path: Path):
    links = {f"B0KILL{i:04d}": [f"{server.address}/good/{i}"] for i in range(120)}
    root, server.delay = items(tmp_path / "d", links), 0.03
    command = [sys.executable, "-m", "lavic_utils", "data", "crawl", "--data", str(root)]
    command += ["--concurrency", "4"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = subprocess.Popen(command, cwd=ROOT, **quiet)
    end = time.monotonic() + 40
    while len(server.log) < 40 and time.monotonic() < end:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    time.sleep(0.1)
    before = server.asked()
    assert 40 <= len(before) < 120  # else it was not the middle
    assert server.most == 4  # many at once, never more than wanted
    server.log.clear()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done
    assert len(done.stdout.splitlines()) == 1 and "120 there" in done.stdout
    assert len(set(server.asked()) & set(before)) <= 4
    assert len(set(server.asked()) | set(before)) == 120
    # no half-written file is left
    assert {path.suffix for path in (root / "train_images").iterdir()} == {".jpg"}
    assert [row["status"] for row in rows(root).values()] == ["ok"] * 120


def test_crawl_refuses_in_one_line(server: Server, tmp_path: Path, capfd, monkeypatch):
    assert main(["data", "crawl", "--data", str(tmp_path)]) == 2
    assert "data fetch" in (text := capfd.readouterr().err) and len(text.splitlines()) == 1
    root = items(tmp_path / "d", {asin: [f"{server.address}/down/{asin}"] for asin in TEN})
    monkeypatch.setattr(crawl, "GIVE_UP", 5)
    with pytest.raises(UserError, match="5 images in a row.*HTTP 502"):
        crawl.crawl(root, settings=FAST)
    with crawl.database(root / crawl.MANIFEST, crawl.SCHEMA, ""):
        with pytest.raises(UserError, match="another run"):
            crawl.crawl(root, settings=FAST)
    (root / crawl.MANIFEST).write_bytes(b"not a data base" * 100)
    with pytest.raises(UserError, match="delete it"):
        crawl.crawl(root, settings=FAST)


@pytest.mark.parametrize("kind", ["socks", "socks5", "SOCKS5H", "gopher"])
def test_a_proxy_that_cannot_be_used_is_named(
    kind: str, server: Server, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    root = items(tmp_path / "d", {"A": [f"{server.address}/good/x"]})
    monkeypatch.setenv("ALL_PROXY", f"{kind}://me:secret@127.0.0.1:9")
    monkeypatch.setenv("LAVIC_DATA_URL", server.address)
    for command in (["data", "crawl", "--data", str(root)], ["data", "fetch", "--to", str(root)]):
        assert main(command) == 2
        text = capfd.readouterr().err
        assert "ALL_PROXY" in text and "secret" not in text and len(text.splitlines()) == 1
    for bad in ("http://h:abc", "http://[::1", "http://", "h\x01:1", "h:0"):
        monkeypatch.setenv("ALL_PROXY", bad)
        with pytest.raises(UserError, match="ALL_PROXY is no address of a proxy"):
            hub.check_proxies()
    for good in ("127.0.0.1:9", "http://[::1]:9", " "):
        monkeypatch.setenv("ALL_PROXY", good)
        hub.check_proxies()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="SSL_CERT_FILE: there is no .*nowhere"):
        hub.check_proxies()
    monkeypatch.setenv("SSL_CERT_FILE", __file__)
    hub.check_proxies()
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setenv("ALL_PROXY", "127.0.0.1:9")  # negative control: this machine needs none
    assert crawl.crawl(root, settings=FAST) == {"ok": 1}


def zipped(*members: tuple[str, bytes]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return held.getvalue()


CATALOGUE = json.dumps({TEN[0]: {"title": "made up", "images": []}}).encode()
NAME = "all_beauty/test.jsonl"


@pytest.fixture
def files(server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Made-up files on the server, behind a proxy that leads nowhere; their git blob ids."""
    monkeypatch.setenv("LAVIC_DATA_URL", server.address)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    archive = zipped((f"__MACOSX/._{download.CATALOGUE}", b""), (download.CATALOGUE, CATALOGUE))
    contents = {NAME: os.urandom(200_000), download.ZIP: archive}
    Shop.files = {f"/data/{name}": content for name, content in contents.items()}
    return {
        name: hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        for name, body in contents.items()
    }


def test_fetch_verifies_unzips_and_asks_once(server: Server, files, tmp_path: Path):
    root = tmp_path / "d"
    assert "2 new" in download.fetch(root, files, 0.01)
    for path, content in Shop.files.items():
        assert (root / path.removeprefix("/data/")).read_bytes() == content
    assert (root / download.CATALOGUE).read_bytes() == CATALOGUE
    expected = ["all_beauty", download.CATALOGUE, download.ZIP]
    assert sorted(path.name for path in root.iterdir()) == expected
    assert set(download.file_states(root, files).values()) == {"ok"}
    assert "0 new" in download.fetch(root, files, 0.01) and len(server.log) == 2
    # a file of the user's is not overwritten, and is named
    for name in (NAME, download.CATALOGUE):
        old = (root / name).read_bytes()
        (root / name).write_bytes(b"mine")
        with pytest.raises(UserError, match=f"{name} is not the published file: move it away"):
            download.fetch(root, files, 0.01)
        assert (root / name).read_bytes() == b"mine"
        (root / name).write_bytes(old)


@pytest.mark.parametrize("ranges", [True, False])
def test_fetch_goes_on_after_a_cut(ranges: bool, server: Server, files, tmp_path: Path):
    files = {NAME: files[NAME]}
    Shop.ranges, Shop.cuts = ranges, 6  # five attempts of the first run, one of the second
    with pytest.raises(UserError, match=f"check the network; still missing: {NAME}"):
        download.fetch(tmp_path, files, 0.01)
    part = tmp_path / "all_beauty" / ".test.jsonl.part"
    assert part.stat().st_size > 0 and not (tmp_path / NAME).exists()
    assert len(server.log) == 5
    download.fetch(tmp_path, files, 0.01)
    assert (tmp_path / NAME).read_bytes() == Shop.files[f"/data/{NAME}"] and not part.exists()
    starts = [int(headers["Range"][6:-1]) for _, _, headers in server.log if "Range" in headers]
    assert len(starts) == len(server.log) - 1 == 6
    # negative control: without Range nothing is gained by a cut
    assert (starts == sorted(set(starts))) is ranges


def test_a_full_disk_is_one_line_and_what_came_is_kept(full_disk, server, files, tmp_path: Path):
    files, root = {NAME: files[NAME]}, items(tmp_path / "d", {"A": [f"{server.address}/good/x"]})
    with full_disk(150_000), pytest.raises(UserError, match="File too large.*; make room"):
        download.fetch(tmp_path, files, 0.01)
    assert (tmp_path / "all_beauty" / ".test.jsonl.part").stat().st_size == 150_000
    with full_disk(100), pytest.raises(UserError, match="cannot be (used|written).*; make room"):
        crawl.crawl(root, settings=FAST)
    assert "1 new" in download.fetch(tmp_path, files, 0.01)  # negative control: with room
    assert server.log[-1][2]["Range"] == "bytes=150000-"
    assert crawl.crawl(root, settings=FAST) == {"ok": 1}


def test_fetch_takes_a_part_that_is_complete(server: Server, files, tmp_path: Path):
    (tmp_path / "all_beauty").mkdir()  # as a kill between last byte and renaming leaves
    (tmp_path / "all_beauty" / ".test.jsonl.part").write_bytes(Shop.files[f"/data/{NAME}"])
    download.fetch(tmp_path, {NAME: files[NAME]}, 0.01)
    assert (tmp_path / NAME).is_file()
    assert [headers["Range"] for _, _, headers in server.log] == ["bytes=200000-"]  # answered 416


def test_fetch_refuses_what_is_not_published(server, files, tmp_path: Path, monkeypatch, capfd):
    Shop.files[f"/data/{NAME}"] = Shop.files[f"/data/{NAME}"][:-1] + b"?"
    with pytest.raises(UserError, match="not the published file.*again|same command"):
        download.fetch(tmp_path, files, 0.01)
    assert not list((tmp_path / "all_beauty").iterdir())
    assert (tmp_path / download.CATALOGUE).is_file()
    # a whole command: one wrong file, the others unknown
    Shop.files = {"/data/item2meta_valid.jsonl": b"{}"}
    assert main(["data", "fetch", "--to", str(tmp_path / "new")]) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1 and error.count("HTTP 404") == 10
    assert "item2meta_valid.jsonl: what came" in error
    monkeypatch.setenv("LAVIC_DATA_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="check the network; still missing.*home/test.jsonl"):
        download.fetch(tmp_path / "none", backoff=0.01)
    assert not [path for path in (tmp_path / "none").rglob("*") if path.is_file()]


ROW = {
    "context": "<submission>a mug</submission>",
    "context_items": [],
    "gt": "this",
    "gt_items": [TEN[3]],
    "candidates_st": TEN,
    "candidates_gpt_large": TEN,
}
OTHER = {**ROW, "candidates_st": [f"B0OTHER{i:03d}" for i in range(10)]}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A data folder with one dialogue file of two rows, and images but for two candidates."""
    path = tmp_path / DOMAINS["home"] / "test.jsonl"
    path.parent.mkdir()
    path.write_text(f"{json.dumps(ROW)}\n{json.dumps(OTHER)}\n", encoding="utf-8")
    (tmp_path / "train_images").mkdir()
    for asin in [*TEN[:8], *OTHER["candidates_st"]]:
        (tmp_path / "train_images" / f"{asin}_0.jpg").write_bytes(GOOD)
    return tmp_path


def test_verify_of_partial_data(home: Path, capfd: pytest.CaptureFixture[str]):
    lines, right = download.verify(home)
    # made up: not the published file
    assert not right and f"wrong     {DOMAINS['home']}/test.jsonl" in lines
    assert lines[-1].startswith("home test: 2 of 20 candidates (0.1000)")
    assert lines[-1].endswith("in 1 of 2 dialogues")
    (home / "train_images" / f"{TEN[0]}_0.jpg").write_bytes(CUT)
    lines, _ = download.verify(home)
    assert lines[-1].startswith("home test: 3 of 20 candidates (0.1500)")
    assert any(line.startswith(f"corrupt   train_images/{TEN[0]}_0.jpg") for line in lines)
    (home / DOMAINS["home"] / "test.jsonl").write_text("{\n", encoding="utf-8")
    assert main(["data", "verify", "--data", str(home)]) == 1
    assert "line 1" in capfd.readouterr().out


def test_stats_of_partial_data(home: Path, capfd: pytest.CaptureFixture[str]):
    path = home / DOMAINS["home"] / "test.jsonl"
    (found,) = inspection.real_data_summary(home)
    asked = [found[name] for name in ("domain", "split", "conversations", "recall_st")]
    assert asked == ["home", "test", 2, 0.5]
    table = inspection.table_1(home).set_index("domain").loc["home"]
    names = ("conversations_published", "conversations_here", "turns_here", "items_here")
    assert [table[name] for name in names] == [3701, 2, 2, 20]
    assert pd.isna(table["images_here"]) and table["splits_here"] == "test"
    assert table["splits_absent"] == "train, valid"
    assert main(["data", "stats", "--data", str(home)]) == 0
    text = capfd.readouterr().out
    assert "recall_st" in text and "no catalogue" in text
    items(home, {TEN[0]: ["a", "b"], TEN[1]: ["c"], "B0UNUSED01": ["d"]})
    assert inspection.table_1(home)["images_here"][2] == 3
    bad = json.dumps(OTHER | {"gt_items": []})
    path.write_text(f"{json.dumps(ROW)}\n{bad}\n", encoding="utf-8")
    assert main(["data", "stats", "--data", str(home)]) == 2
    assert "line 2: field gt_items" in capfd.readouterr().err
    assert main(["data", "stats", "--data", str(home / "none")]) == 2
