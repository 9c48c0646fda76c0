"""The published data: fetch the authors' files, verify what is there, and say what a gap touches.

Files come from the authors' repository at one commit; each is checked against its git blob id, so no mirror or broken
transfer can slip in other data.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
import pandas as pd
from rich.progress import (
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TransferSpeedColumn,
)
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from lavic_utils.config import DOMAINS, ROOT, UserError, real_data_dir
from lavic_utils.data import SPLITS, dialogue_file, image_file, read_dialogues
from lavic_utils.remote.crawl import (
    AGAIN,
    HEADERS,
    Permanent,
    Transient,
    bar,
    check_status,
    decode,
    image_links,
    reason,
    waiting,
)

COMMIT = "740db227dbb3e1e119912d1971f6c611e37349b1"
ADDRESS = f"https://raw.githubusercontent.com/jeon185/LaViC/{COMMIT}"
MAX_FILE = 128 * 2**20  # bytes; the host takes no larger file
MAX_JSON = 2 * 2**30  # bytes of the unzipped catalogue
ZIP, CATALOGUE = "item2meta_train.json.zip", "item2meta_train.json"
FILES = {  # below the repository's data/ and below the data folder alike -> git blob id
    "all_beauty/train.jsonl": "f7d14b8b0aa1a7432b256ed990bca2c78171a440",
    "all_beauty/valid.jsonl": "1ee2f562309ad5e278bede071438ce0a2e77a868",
    "all_beauty/test.jsonl": "c3c5d1501df0da0505f1a0508c71a4c3c56dc2eb",
    "amazon_fashion/train.jsonl": "fd34535215f237d619d3cfc8aa524f8a7d4de762",
    "amazon_fashion/valid.jsonl": "9e97a4631091124cb2240670a3f87c37926c6109",
    "amazon_fashion/test.jsonl": "5fb0f482eaf7858d0b773090118b1338e4794cfa",
    "amazon_home/train.jsonl": "17dfbd6a0900de2fcc46c20d8d248e51bd1d966b",
    "amazon_home/valid.jsonl": "62fa0001f51410ff3d8a4448b574b4b4d8fb42f1",
    "amazon_home/test.jsonl": "7080bc79ecdf7b4066bbb9b16f75d72687f2435c",
    ZIP: "f511c3e7af9f98164ec17df326cee526b0466224",
    "item2meta_valid.jsonl": "da6437ef788f0b972f69d6511c65cb8a26529f66",
}


def data_dir(given: Path | None = None) -> Path:
    """The data folder: the one given, else LAVIC_DATA, else data/reddit-amazon of the checkout."""
    return given or real_data_dir() or ROOT / "data" / "reddit-amazon"


def blob_id(path: Path) -> str:
    """Git blob id of a file: SHA-1 over "blob <bytes>", a zero byte and the content."""
    with path.open("rb") as file:
        digest = hashlib.sha1(
            f"blob {os.fstat(file.fileno()).st_size}\0".encode(), usedforsecurity=False
        )
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _stream(client: httpx.Client, address: str, part: Path, progress: Progress) -> None:
    """Fetch what `part` lacks. A server that ignores Range sends everything, and the part is begun again."""
    have = part.stat().st_size if part.is_file() else 0
    with client.stream(
        "GET", address, headers={"Range": f"bytes={have}-"} if have else {}
    ) as response:
        if have and response.status_code == 416:
            return  # nothing after these bytes: complete, or not of this file, which the blob id will tell
        check_status(response, 200, 206)
        goes_on = response.status_code == 206
        if goes_on and not response.headers.get("content-range", "").startswith(f"bytes {have}-"):
            part.unlink(missing_ok=True)
            raise Transient("the server sent another range than asked for")
        size = have if goes_on else 0
        length = response.headers.get("content-length")
        task = progress.add_task(
            part.name[1:-5], completed=size, total=size + int(length) if length else None
        )
        try:
            with part.open("ab" if goes_on else "wb") as file:
                for chunk in response.iter_raw():
                    size += len(chunk)
                    if size > MAX_FILE:
                        raise Permanent(f"more than {MAX_FILE} bytes")
                    file.write(chunk)
                    progress.advance(task, len(chunk))
        finally:
            progress.remove_task(task)


def _download(
    client: httpx.Client, address: str, target: Path, blob: str, backoff: float, progress: Progress
) -> None:
    """Put the verified file at `target`. What came of it stays in a hidden .part, which a later call goes on from."""
    part = target.with_name(f".{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    for attempt in Retrying(
        stop=stop_after_attempt(5),
        wait=waiting(backoff),
        retry=retry_if_exception_type(AGAIN),
        reraise=True,
    ):
        with attempt:
            _stream(client, address, part, progress)
    if not part.is_file() or blob_id(part) != blob:
        part.unlink(missing_ok=True)
        raise Permanent(
            f"what came is not the published file (git blob id is not {blob[:12]}...) and was removed"
        )
    os.replace(part, target)


def fetch(root: Path, files: Mapping[str, str] = FILES, backoff: float = 1.0) -> str:
    """Download what is missing and unzip the catalogue; what was done, in one line. UserError names all that is wrong.

    A file that is there and is not the published one is never overwritten: it may be the user's own. LAVIC_DATA_URL
    names a mirror of the repository's root; the blob ids hold for it too.
    """
    base, done, wrong = os.environ.get("LAVIC_DATA_URL", ADDRESS).rstrip("/"), 0, []
    missing = [name for name in files if not (root / name).is_file()]
    columns = (TextColumn("{task.description}"), DownloadColumn(), TransferSpeedColumn())
    try:
        wrong += [
            f"{root / name} is not the published file: move it away"
            for name, blob in files.items()
            if name not in missing and blob_id(root / name) != blob
        ]
        with (
            httpx.Client(timeout=20, headers=HEADERS, follow_redirects=True) as client,
            bar(*columns) as progress,
        ):
            for name in missing:
                try:
                    _download(
                        client, f"{base}/data/{name}", root / name, files[name], backoff, progress
                    )
                    done += 1
                except Permanent as error:
                    wrong.append(f"{name}: {reason(error)}")
                except (*AGAIN, httpx.HTTPError, httpx.InvalidURL) as error:
                    left = ", ".join(one for one in missing if not (root / one).is_file())
                    raise UserError(
                        "; ".join(
                            [
                                *wrong,
                                f"{base}/data/{name} cannot be reached ({reason(error)}); still "
                                f"missing: {left}; check the network and run the same command: it goes on",
                            ]
                        )
                    ) from None
        if ZIP in files and (root / ZIP).is_file() and not any(ZIP in one for one in wrong):
            unzip(root / ZIP, root / CATALOGUE)
    except OSError as error:
        raise UserError(
            f"{root}: cannot be used ({reason(error)}); make room or choose another folder"
        ) from None
    if wrong:
        raise UserError("; ".join(wrong) + "; then run the same command again")
    return (
        f"{root}: all {len(files)} published files are there and verified ({done} downloaded now)"
    )


def _same(path: Path, member: zipfile.ZipInfo) -> bool:
    """Is the file the one in the archive (size and CRC-32)?"""
    if not path.is_file() or path.stat().st_size != member.file_size:
        return False
    check = 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            check = zlib.crc32(chunk, check)
    return check == member.CRC


def _member(opened: zipfile.ZipFile, name: str, limit: int) -> zipfile.ZipInfo:
    found = []
    for member in opened.infolist():
        path = PurePosixPath(member.filename)
        if (
            path.is_absolute()
            or ".." in path.parts
            or "\\" in member.filename
            or ":" in member.filename
            or stat.S_ISLNK(member.external_attr >> 16)
        ):
            raise zipfile.BadZipFile(f"the name {ascii(member.filename)} in it leads elsewhere")
        if path.name == name and "__MACOSX" not in path.parts:
            found.append(member)
    if len(found) != 1:
        raise zipfile.BadZipFile(f"{name} stands {len(found)} times in it, once is expected")
    if found[0].file_size > limit:
        raise zipfile.BadZipFile(f"{found[0].file_size} bytes unzipped, more than {limit}")
    return found[0]


def unzip(archive: Path, target: Path, limit: int = MAX_JSON) -> None:
    """Write the member that has the target's name to `target` (at most `limit` bytes); nothing else is ever written.
    UserError: a bad archive, or another file stands at `target`."""
    temp = target.with_name(f".{target.name}.part")
    try:
        with zipfile.ZipFile(archive) as opened:
            member = _member(opened, target.name, limit)
            if _same(target, member):
                return
            if target.exists():
                raise UserError(
                    f"{target}: not the one in {archive.name}; move it away and run the same command again"
                )
            with (
                opened.open(member) as source,
                temp.open("wb") as file,
            ):  # reads the announced size at most, checks CRC
                shutil.copyfileobj(source, file, 2**20)
            os.replace(temp, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"{archive}: refused ({reason(error)}); delete it and run the same command again"
        ) from None
    finally:
        temp.unlink(missing_ok=True)


def file_states(root: Path, files: Mapping[str, str] = FILES) -> dict[str, str]:
    """File -> ok, missing or wrong; the catalogue against its zip (unchecked where that is missing)."""
    states = {
        name: "missing"
        if not (root / name).is_file()
        else "ok"
        if blob_id(root / name) == blob
        else "wrong"
        for name, blob in files.items()
    }
    if not (root / CATALOGUE).is_file():
        return {**states, CATALOGUE: "missing"}
    if states.get(ZIP) != "ok":
        return {**states, CATALOGUE: "unchecked"}
    with zipfile.ZipFile(root / ZIP) as opened:
        return {
            **states,
            CATALOGUE: "ok"
            if _same(root / CATALOGUE, _member(opened, CATALOGUE, MAX_JSON))
            else "wrong",
        }


def _readable(path: Path) -> str:
    if not path.is_file():
        return "missing"
    try:
        decode(path)
    except Permanent:
        return "corrupt"
    return "ok"


def image_states(paths: Iterable[Path]) -> dict[Path, str]:
    """Path -> ok, missing or corrupt; every image there is decoded whole."""
    every = list(dict.fromkeys(paths))
    with (
        ThreadPoolExecutor() as pool,
        bar(TextColumn("decoding images"), MofNCompleteColumn()) as progress,
    ):
        return dict(zip(every, progress.track(pool.map(_readable, every), len(every)), strict=True))


def verify(root: Path) -> tuple[list[str], bool]:
    """Report as lines, and whether all that is there is right (what is missing is reported and no error).

    The table: `share` of the candidates (candidates_st, each list's ten counted) without a readable first image, and
    the dialogues with at least one of these. A file that cannot be read is reported and left out of the table.
    """
    files = file_states(root)
    lines = [f"{state:9} {name}" for name, state in files.items()]
    lists, links = {}, {}
    for key in [(domain, split) for domain in DOMAINS for split in SPLITS]:
        try:
            if dialogue_file(root, *key).is_file():
                lists[key] = [dialogue.candidates_st for dialogue in read_dialogues(root, *key)]
        except UserError as error:
            lines.append(f"wrong     {error}")
    try:
        links = image_links(root)
    except UserError as error:
        lines.append(f"wrong     {error}")
    first = {asin: image_file(root, asin) for ten in lists.values() for one in ten for asin in one}
    linked = [root / name for name, link in links.items() if link]
    states = image_states([*linked, *first.values()])
    for folder in ("train_images", "valid_images"):
        count = Counter(states[path] for path in linked if path.parent.name == folder)
        lines.append(
            f"{folder}: {count['ok']} ok, {count['missing']} missing, {count['corrupt']} corrupt"
        )
    bad = [
        path.relative_to(root).as_posix() for path, state in states.items() if state == "corrupt"
    ]
    lines += [f"corrupt   {name}: delete it and run `data crawl`" for name in bad]
    rows = [
        _touched(key, ten, {asin for asin, path in first.items() if states[path] != "ok"})
        for key, ten in lists.items()
    ]
    lines += (
        [pd.DataFrame(rows).to_string(index=False, float_format="{:.4f}".format)] if rows else []
    )
    return lines, not any(line.startswith(("wrong", "corrupt")) for line in lines)


def _touched(key: tuple[str, str], lists: list[tuple[str, ...]], bad: set[str]) -> dict[str, Any]:
    without = [sum(asin in bad for asin in ten) for ten in lists]
    return {
        "domain": key[0],
        "split": key[1],
        "candidates": 10 * len(lists),
        "without_image": sum(without),
        "share": sum(without) / (10 * len(lists)),
        "dialogues": len(lists),
        "touched": sum(map(bool, without)),
    }
