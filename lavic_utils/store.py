"""Visual store: every image file is decoded, tiled and encoded once; its vectors are read memory-mapped after that.

A store is a folder named by the key of all that makes its vectors what they are (`key_of`): model and revision (or the
local checkpoint's content), adapter, processor settings, dtype, kind of tokens, and the code and libraries that encode.
It holds the vectors after the projector, not before: they are what stage 2 and inference read, so nothing is computed at
reading, and vectors before it would be good for no other adapter either: stage 1 trains the tower and the projector both.

On disk: shards of SHARD images, `<key of the images>-<start of the file's sha256>.safetensors`, one tensor (tokens,
hidden size) an image, named by the sha256 of the image file; an image that cannot be decoded has an empty one. `index.json`
says for every shard how many tokens each image has. A shard appears whole or not at all (written beside, then renamed);
the index comes last; a run that was killed keeps its finished shards. Several processes (on one file system) share the work.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lavic_utils.provenance import code_of, key, versions, write_json

log = logging.getLogger(__name__)
GROUP, SHARD = 64, 256  # images encoded at once, and in a file: what a kill can lose
Encode = Callable[
    [Sequence[Path]], list[Tensor | None]
]  # image files -> tokens of each, None where it cannot be decoded
Shards = dict[str, dict[str, int]]  # file name -> image's sha256 -> its tokens


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=8)
def _content(files: tuple[tuple[Path, int, int], ...]) -> list[tuple[str, str]]:
    return [(path.name, sha256(path)) for path, *_ in files]


def content(folder: Path | str) -> list[tuple[str, str]]:
    """(name, sha256) of a folder's files, read once a process while their sizes and times stay (empty where there is none)."""
    files = sorted(p for p in Path(folder).glob("*") if p.is_file())
    return _content(tuple((p, p.stat().st_size, p.stat().st_mtime_ns) for p in files))


def key_of(
    model: str, revision: str | None, adapter: Path | None, processor, dtype: torch.dtype, kind: str
) -> str:
    """Name of the store's folder: `model` is a hub id or a checkpoint's folder, `adapter` a peft folder."""
    return key(
        model=content(model) or [model, revision],
        adapter=content(adapter) if adapter else None,
        dtype=str(dtype),
        processor=json.loads(processor.image_processor.to_json_string()),
        kind=kind,
        code=code_of("vision"),
        versions=versions(("torch", "transformers", "peft", "pillow")),
    )


class Store(Mapping[str, Tensor]):
    """Items' visual tokens, {item id: (tokens, hidden size)} float32, in the order of the items asked for; a shard's file is
    mapped when one of its items is. `sizes`: how many tokens each has; `missing` and `corrupt`: items that have none,
    since there is no image file or it cannot be decoded."""

    def __init__(self, folder: Path, shards: Shards, items: Mapping[str, str | None]) -> None:
        where = {
            image: (file, count)
            for file, counts in shards.items()
            for image, count in counts.items()
        }
        self._at = {item: (where[image][0], image) for item, image in items.items() if image}
        self.missing = [item for item, image in items.items() if not image]
        self.corrupt = [item for item, image in items.items() if image and not where[image][1]]
        self.sizes = {
            item: where[image][1] for item, (_, image) in self._at.items() if where[image][1]
        }
        self.counted = {
            "items": len(items),
            "encoded": len(self.sizes),
            "missing": len(self.missing),
            "corrupt": len(self.corrupt),
        }
        self._file = functools.cache(lambda name: safe_open(folder / name, "pt"))

    def __getitem__(self, item: str) -> Tensor:
        if item not in self.sizes:
            raise KeyError(item)
        file, image = self._at[item]
        return self._file(file).get_tensor(image)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


def open_store(folder: Path, paths: Mapping[str, Path], encoder: Callable[[], Encode]) -> Store:
    """The visual tokens of items (id -> image file); what the store lacks is encoded first (see `fill`)."""
    items = {item: sha256(path) if path.is_file() else None for item, path in paths.items()}
    found = Store(
        folder,
        fill(folder, {image: paths[item] for item, image in items.items() if image}, encoder),
        items,
    )
    log.info("images: %s", found.counted)
    return found


def fill(folder: Path, files: Mapping[str, Path], encoder: Callable[[], Encode]) -> Shards:
    """Shards that hold these images (sha256 -> file): those that are there are verified, what is lacking is encoded.
    `encoder` loads the model: called only where something is to be encoded. Of several processes all must call this where
    something is lacking; what is whole each may read alone."""
    shards = _verified(folder, files.keys())
    known = {image for counts in shards.values() for image in counts}
    lacking = [image for image in files if image not in known]
    if not lacking:
        return shards
    state = PartialState(cpu=not torch.cuda.is_available())
    state.wait_for_everyone()  # everyone has seen what is lacking before anyone changes it
    parts = [lacking[i : i + SHARD] for i in range(0, len(lacking), SHARD)]
    mine = [
        part
        for part in parts[state.process_index :: state.num_processes]
        if _finished(folder, part) is None
    ]
    encode = encoder() if mine else None
    for part in mine:
        _write(folder, part, [files[image] for image in part], encode)
    state.wait_for_everyone()
    shards |= {file.name: _counts(file) for part in parts if (file := _finished(folder, part))}
    if parts and state.is_main_process:
        others = {
            file: counts for file, counts in _index(folder).items() if (folder / file).is_file()
        }
        write_json(folder / "index.json", {"shards": others | shards})
    state.wait_for_everyone()
    return shards


def _index(folder: Path) -> Shards:
    try:
        return json.loads((folder / "index.json").read_text(encoding="utf-8"))["shards"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: damaged (%s); made again", folder / "index.json", error)
        return {}


def _verified(folder: Path, wanted) -> Shards:
    """Shards of the index that hold a wanted image, checked against their files; a damaged one is said and removed."""
    found = {
        file: counts for file, counts in _index(folder).items() if not wanted.isdisjoint(counts)
    }
    for file in [
        file
        for file, counts in found.items()
        if not (_whole(folder / file) and _counts(folder / file) == counts)
    ]:
        log.warning("%s: damaged or not what the index says; made again", folder / file)
        del found[file]
        (folder / file).unlink(missing_ok=True)
    return found


def _whole(path: Path) -> bool:
    """Whether a shard's content is what its name says."""
    return path.is_file() and sha256(path)[:16] == path.stem.partition("-")[2]


def _counts(path: Path) -> dict[str, int] | None:
    try:
        with safe_open(path, "pt") as shard:
            return {image: shard.get_slice(image).get_shape()[0] for image in shard.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError):
        return None


def _finished(folder: Path, part: Sequence[str]) -> Path | None:
    """A whole shard of exactly these images."""
    return next(
        (p for p in sorted(folder.glob(f"{key(images=part)}-*.safetensors")) if _whole(p)), None
    )


def _write(folder: Path, part: Sequence[str], files: Sequence[Path], encode: Encode) -> None:
    tokens = [one for i in range(0, len(files), GROUP) for one in encode(files[i : i + GROUP])]
    folder.mkdir(parents=True, exist_ok=True)
    name = key(images=part)
    temp = folder / f".{name}.{os.getpid()}.tmp"
    save_file(
        {
            image: torch.zeros(0) if one is None else one
            for image, one in zip(part, tokens, strict=True)
        },
        temp,
    )
    os.replace(temp, folder / f"{name}-{sha256(temp)[:16]}.safetensors")
