"""Keeping results: a stage is made once, under a key of what it reads, and never deleted.

Where a stage's code or a library has changed since, what took less than QUICK seconds is made
again, so that an edit is seen; what took longer is kept, and one line says what changed. A result
that is made again moves the old one aside, and checkpoints stay until their stage is done.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lavic_utils.callbacks import Pace
from lavic_utils.data import open_image
from lavic_utils.provenance import (
    code_of,
    file_hash,
    file_mark,
    folder_hash,
    kept,
    key,
    locked,
    versions,
    write_card,
    write_kept,
    write_text,
)
from lavic_utils.vision import batched

QUICK = 600  # seconds: a stage that took less is made again when its code has changed
SCANNED = 1000  # image files looked at before that is kept
RESULT = "result.json"
BEGUN = "begun.json"  # in the folder of a stage under way: whose checkpoints stand there


def made_once(
    folder: Path,
    wanted: str,
    module: str,
    make: Callable[[], dict],
    about: Callable[[], dict],
    process: tuple[int, int],
    force: bool,
    together: bool,
) -> dict:
    """What `folder/result.json` holds: `result`, that of `make`, and what stands beside it.
    `wanted`: the key of all it reads; `module`: where its code is; `about`: its provenance;
    `process`: (rank, their number); `force`: make it whatever is kept. Of several processes the
    first makes it, or (`together`) all do, and the first one's is everybody's."""
    rank, processes = process
    made_by = {"code": code_of(module), "versions": versions()}
    wants = {"key": wanted, "processes": processes, "made_by": made_by}
    found = None if force else look(folder, wants)
    if found is None and rank == 0:
        with locked(folder):
            if processes == 1 and not force:  # another process may have made it meanwhile
                found = look(folder, wants)
            if found is None:
                started = begin(folder, wants)
                finish(folder, wants, started, make(), about)
    elif found is None and together:
        make()
    while (found := found or look(folder, wants)) is None:
        time.sleep(0.2)  # no barrier: describing images may take longer than one waits
    return found


def look(folder: Path, wants: Mapping) -> dict | None:
    """A stage's file, if it is of this key and need not be made again for a change of code."""
    found, made_by = kept(folder / RESULT), wants["made_by"]
    if found is None or found["key"] != wants["key"]:
        return None
    if found["made_by"] == made_by:
        return found
    if found["seconds"] < QUICK:
        return None
    old = found["made_by"]["code"] | found["made_by"]["versions"]
    new = made_by["code"] | made_by["versions"]
    changed = ", ".join(sorted(name for name in old | new if old.get(name) != new.get(name)))
    why = f"though {changed} changed since; `run --force` makes it again"
    print(f"{folder.name}: kept ({found['seconds'] / 3600:.1f} h of work), {why}")
    return found


def begin(folder: Path, wants: Mapping) -> float:
    """Before a stage is made: what stands in its folder goes on if it is the same stage under way,
    and is moved aside, never deleted, if it is anything else. Returns when the stage was begun."""
    if found := kept(folder / BEGUN):
        places = [folder, *folder.glob("checkpoints"), *folder.glob("checkpoints/*")]
        worked = max(place.stat().st_mtime for place in places) - found["started"]
        same = all(found[name] == wants[name] for name in ("key", "processes"))
        if same and (worked >= QUICK or found["made_by"] == wants["made_by"]):
            return found["started"]
    if folder.is_dir() and any(folder.iterdir()):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.replaced-{number}")).exists():
            number += 1
        folder.rename(aside)
    started = time.time()
    write_kept(folder / BEGUN, {**wants, "started": started})
    return started


def finish(folder: Path, wants: Mapping, started: float, result: Mapping, about: Callable) -> None:
    """Keep a stage's result, with the hashes of its adapter; its checkpoints go."""
    files = {f"adapter/{name}": content for name, content in folder_hash(folder / "adapter")}
    record = {"key": wants["key"], "seconds": round(time.time() - started, 1)}
    record |= {"made_by": wants["made_by"], "provenance": about(), "files": files, "result": result}
    write_kept(folder / RESULT, record)
    write_card(folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / BEGUN).unlink(missing_ok=True)


class Written:
    """Texts kept in a file as they are written, a line each with its hash: a killed run goes on
    behind them, and from a damaged line on they are written again."""

    def __init__(self, path: Path) -> None:
        self.path, self.texts = path, []
        if path.is_file():
            whole = path.read_bytes().rpartition(b"\n")[0].splitlines()  # a kill may cut the last
            for number, line in enumerate(whole, 1):
                text = self._text(line)
                if text is None:
                    print(
                        f"{path.name}: damaged from line {number} on, so written again", flush=True
                    )
                    break
                self.texts.append(text)
        write_text(path, "".join(map(self._line, self.texts)))

    @staticmethod
    def _line(text: str) -> str:
        return json.dumps([text, key(text=text)]) + "\n"

    @staticmethod
    def _text(line: bytes) -> str | None:
        try:
            text, check = json.loads(line)
            return text if check == key(text=text) else None
        except (ValueError, TypeError):
            return None

    def add(self, texts: Sequence[str]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(map(self._line, texts)))
        self.texts += texts


class Images:
    """Which image files can be read, and their hashes, kept in `file`: an image is looked at again
    only where its `file_mark` has changed, or the code that opens it."""

    def __init__(self, file: Path) -> None:
        self.file, self.code, old = file, code_of("data"), kept(file)
        # "folder/name" -> [mark, sha256 or None]
        self.known: dict[str, list] = old["images"] if old and old["code"] == self.code else {}

    def hashes(self, paths: Iterable[Path]) -> dict[Path, str | None]:
        """sha256 of each file; None for one that is missing, or that `open_image` cannot read."""
        found: dict[Path, str | None] = dict.fromkeys(paths)
        names: dict[Path, str] = {}  # of the files that are there
        new: dict[Path, list[int]] = {}  # those to look at -> mark
        for path in found:
            if path.is_file():
                names[path], mark = f"{path.parent.name}/{path.name}", [*file_mark(path)]
                if self.known.get(names[path], [None])[0] != mark:
                    new[path] = mark

        def content(path: Path) -> str | None:
            return file_hash(path) if open_image(path) is not None else None

        pace, done = Pace("images looked at", len(new)), 0
        for some in batched(list(new), SCANNED):
            with ThreadPoolExecutor() as pool:
                for path, seen in zip(some, pool.map(content, some), strict=True):
                    self.known[names[path]] = [new[path], seen]
            write_kept(self.file, {"code": self.code, "images": self.known})
            pace.at(done := done + len(some))
        return found | {path: self.known[name][1] for path, name in names.items()}
