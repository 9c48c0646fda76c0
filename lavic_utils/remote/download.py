"""The published data: fetch the authors' files, verify what is there, and say what a gap touches.

Files come from the authors' repository at one commit; each is checked against its git blob id, so
no mirror or broken transfer can slip in other data.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import httpx
from rich.progress import DownloadColumn, MofNCompleteColumn, Progress, TextColumn

from lavic_utils.config import DOMAINS, ROOT, UserError, real_data_dir
from lavic_utils.data import (
    SPLITS,
    Dialogue,
    dialogue_file,
    image_file,
    is_placeholder,
    read_dialogues,
)
from lavic_utils.provenance import write_text
from lavic_utils.remote import crawl

COMMIT = "740db227dbb3e1e119912d1971f6c611e37349b1"
ADDRESS = f"https://raw.githubusercontent.com/jeon185/LaViC/{COMMIT}"
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
    begun = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: begun).hexdigest()


def _catalogue(root: Path) -> bytes:
    """The catalogue in its (verified) archive."""
    with zipfile.ZipFile(root / ZIP) as archive:
        return archive.read(next(n for n in archive.namelist() if Path(n).name == CATALOGUE))


def file_states(root: Path, files: Mapping[str, str] = FILES) -> dict[str, str]:
    """File -> `ok`, `missing` or `wrong`, by blob id; the catalogue against its zip (`unchecked`
    where that is not the published one)."""
    states = {}
    for name, blob in files.items():
        there = (root / name).is_file()
        states[name] = ("ok" if blob_id(root / name) == blob else "wrong") if there else "missing"
    path = root / CATALOGUE
    states[CATALOGUE] = "unchecked" if path.is_file() else "missing"
    if path.is_file() and states.get(ZIP) == "ok":
        states[CATALOGUE] = "ok" if path.read_bytes() == _catalogue(root) else "wrong"
    return states


def _download(
    client: httpx.Client, address: str, target: Path, blob: str, progress: Progress
) -> None:
    """Put the verified file at `target`. A hidden .part holds what came, and another call asks for
    what it lacks (a server that ignores Range sends everything); what is not the published file is
    removed."""
    part = target.with_name(f".{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.is_file() else 0
    asked = {"Range": f"bytes={have}-"} if have else {}
    with client.stream("GET", address, headers=asked) as response:
        if not (have and response.status_code == 416):  # else nothing comes after what is there
            response.raise_for_status()
            task = progress.add_task(target.name)
            with part.open("ab" if response.status_code == 206 else "wb") as file:
                for chunk in response.iter_raw():
                    file.write(chunk)
                    progress.update(task, completed=file.tell())
    if blob_id(part) != blob:
        part.unlink()
        raise crawl.Permanent("what came is not the published file, by git blob id: removed")
    os.replace(part, target)


def fetch(root: Path, files: Mapping[str, str] = FILES, backoff: float = 1.0) -> str:
    """Download what is missing and unzip the catalogue; what was done, in one line.

    UserError names all that is wrong. A file that is there and is not the published one is never
    overwritten: it may be the user's own. LAVIC_DATA_URL names a mirror of the repository's root;
    the blob ids hold for it too.
    """
    base, wrong = crawl.data_server() or ADDRESS, []
    options = {"headers": crawl.HEADERS, "timeout": 20, "follow_redirects": True}
    options |= {"mounts": crawl.direct(base), "event_hooks": {"request": [crawl.guard]}}
    download = crawl.retrying(5, backoff)(_download)
    bar = crawl.bar(TextColumn("{task.description}"), DownloadColumn())
    try:
        missing = [name for name in files if not (root / name).is_file()]
        with httpx.Client(**options) as client, bar as progress:
            for name in missing:
                try:
                    download(client, f"{base}/data/{name}", root / name, files[name], progress)
                except (crawl.Permanent, httpx.HTTPError, httpx.InvalidURL) as error:
                    wrong.append(f"{base}/data/{name}: {crawl.one_line(error)}")
                    if crawl.again(error):
                        wrong.append("check the network")
                        break
        states = file_states(root, files)
        if states[CATALOGUE] == "missing" and states.get(ZIP) == "ok":
            write_text(root / CATALOGUE, _catalogue(root).decode())
            states[CATALOGUE] = "ok"
    except OSError as error:
        why = crawl.one_line(error)
        raise UserError(f"{root}: cannot be used ({why}); make room, or change it") from None
    for name, state in states.items():
        if state == "wrong":
            wrong.append(f"{root / name} is not the published file: move it away")
    if wrong:
        left = ", ".join(name for name, state in states.items() if state == "missing")
        wrong.append(f"still missing: {left or 'none'}")
        raise UserError("; ".join(wrong) + "; then run the same command: it goes on from here")
    return f"{root}: all {len(files)} published files are there and verified ({len(missing)} new)"


def verify(root: Path) -> tuple[list[str], bool]:
    """Report as lines, and whether all that is there is right (what is missing is no error): files,
    images, and by split how many candidates (of candidates_st) lack a readable first image. A file
    that cannot be read is reported and left out of the counts."""

    def image_state(path: Path) -> str:
        if not path.is_file() or is_placeholder(path):
            return "missing"
        return "corrupt" if crawl.image_fault(path) else "ok"

    lines = [f"{state:9} {name}" for name, state in file_states(root).items()]
    dialogues: dict[tuple[str, str], list[Dialogue]] = {}
    links: dict[str, str] = {}
    for domain, split in product(DOMAINS, SPLITS):
        try:
            if dialogue_file(root, domain, split).is_file():
                dialogues[domain, split] = read_dialogues(root, domain, split)
        except UserError as error:
            lines.append(f"wrong     {error}")
    try:
        links = crawl.image_links(root)
    except UserError as error:
        lines.append(f"wrong     {error}")
    linked = [root / name for name, link in links.items() if link]
    listed = {a for found in dialogues.values() for d in found for a in d.candidates_st}
    paths = list(dict.fromkeys([*linked, *(image_file(root, asin) for asin in listed)]))
    with ThreadPoolExecutor() as pool, crawl.bar(MofNCompleteColumn()) as progress:
        decoded = progress.track(pool.map(image_state, paths), len(paths))
        states = dict(zip(paths, decoded, strict=True))
    for folder in ("train_images", "valid_images"):
        count = Counter(states[path] for path in linked if path.parent.name == folder)
        told = ", ".join(f"{count[state]} {state}" for state in ("ok", "missing", "corrupt"))
        lines.append(f"{folder}: {told}")
    for path in paths:
        if states[path] == "corrupt":
            name = path.relative_to(root).as_posix()
            lines.append(f"corrupt   {name}: delete it and run `data crawl`")
    bare = {asin for asin in listed if states[image_file(root, asin)] != "ok"}
    for (domain, split), found in dialogues.items():
        without = [len(bare.intersection(d.candidates_st)) for d in found]  # of ten, a dialogue
        count, of, touched = sum(without), 10 * len(found), sum(n > 0 for n in without)
        lines.append(
            f"{domain} {split}: {count} of {of} candidates ({count / of:.4f}) have no readable "
            f"first image, in {touched} of {len(found)} dialogues"
        )
    return lines, not any(line.startswith(("wrong", "corrupt")) for line in lines)
