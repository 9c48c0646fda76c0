"""Visual store: every image file is encoded once; after that its vectors are read memory-mapped.

A store is a folder named by all that makes its vectors what they are (`key_of`). It holds them in
chunks of at most CHUNK images, `<the chunk's sha256>.safetensors`: a tensor (tokens, hidden size)
an image, named by the image file's sha256, empty where that cannot be decoded. A chunk appears
whole or not at all: a killed run loses one; a damaged one is made again.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lavic_utils import vision
from lavic_utils.data import as_rgb, is_placeholder, open_image
from lavic_utils.provenance import file_hash, folder_hash, key, plain_code, versions, write_bytes

log = logging.getLogger(__name__)
GROUP, CHUNK = 64, 256  # images encoded at once, and in a file
Encode = Callable[[Sequence[Path]], list[Tensor | None]]  # image files -> tokens, None: unreadable
Shards = dict[str, tuple[Path, int]]  # name of a vector -> its file, its tokens
MAKERS = (as_rgb, open_image, vision.pixels, vision.tile_count, vision.real_tiles, vision.last_cls,
          vision.cls_tokens, vision.full_tokens, vision.patch_tokens, vision.encode)  # fmt: skip


def key_of(
    model: str, revision: str | None, adapter: Path | None, processor, dtype: torch.dtype, kind: str
) -> str:
    """Name of the store's folder. `model`: a hub id or a checkpoint's folder; `adapter`: a peft
    folder; `kind`: one of `vision.TOKENS`. What the code's comments say does not count."""
    return key(
        model=folder_hash(model) or [model, revision],
        adapter=folder_hash(adapter) if adapter else None,
        dtype=str(dtype),
        processor=json.loads(processor.image_processor.to_json_string()),
        kind=kind,
        code=[plain_code(inspect.getsource(function)) for function in MAKERS],
        versions=versions(("torch", "transformers", "pillow")),
    )


class Store(vision.Lazy):
    """Items' visual tokens, {item id: (tokens, hidden size)} float32, mapped from their files.
    `missing`, `corrupt`: items that have none, since there is no image file or a placeholder, or it
    cannot be decoded; `counted`: how many there are of each."""

    def __init__(
        self, shards: Shards, items: Mapping[str, str | None], paths: Mapping[str, Path]
    ) -> None:
        images = {item: image for item, image in items.items() if image}
        counts = {item: shards[image][1] for item, image in images.items()}
        bare = [item for item, count in counts.items() if count == 0]
        small = [item for item in bare if is_placeholder(paths[item])]
        self.missing = [item for item in items if item not in images or item in small]
        self.corrupt = [item for item in bare if item not in small]
        mapped = functools.cache(lambda path: safe_open(path, "pt"))

        def read(item: str) -> Tensor:
            return mapped(shards[images[item]][0]).get_tensor(images[item])

        super().__init__({item: count for item, count in counts.items() if count}, read)
        self.counted = {"items": len(items), "encoded": len(self.sizes)}
        self.counted |= {"missing": len(self.missing), "corrupt": len(self.corrupt)}


def open_store(folder: Path, paths: Mapping[str, Path], encoder: Callable[[], Encode]) -> Store:
    """The visual tokens of items (id -> image file). What the store lacks is encoded first:
    `encoder` loads the model. Of several processes all must call this then, and the first encodes.
    """
    items = {item: file_hash(path) for item, path in paths.items()}
    files = {image: paths[item] for item, image in items.items() if image}
    shards = read_shards(folder)
    lacking = [image for image in files if image not in shards]
    if lacking:
        state = PartialState(cpu=not torch.cuda.is_available())
        state.wait_for_everyone()  # everyone has seen what is lacking before anything changes
        encode = encoder() if state.is_main_process else None
        for chunk in vision.batched(lacking, CHUNK):
            if encode:
                tokens: dict[str, Tensor] = {}
                for group in vision.batched(chunk, GROUP):
                    found = encode([files[image] for image in group])
                    for image, vectors in zip(group, found, strict=True):
                        tokens[image] = torch.zeros(0) if vectors is None else vectors
                write_shard(folder, tokens)
            state.wait_for_everyone()  # once a chunk: no wait is long enough to be given up
        shards = read_shards(folder)
    store = Store(shards, items, paths)
    log.info("images: %s", store.counted)
    return store


def read_shards(folder: Path) -> Shards:
    """What a folder's whole chunks hold; a damaged one is said and removed."""
    shards: Shards = {}
    for path in sorted(folder.glob("*.safetensors")):
        if file_hash(path) != path.stem:
            log.warning("%s: damaged; made again", path)
            path.unlink(missing_ok=True)
            continue
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                shards[name] = path, shard.get_slice(name).get_shape()[0]
    return shards


def write_shard(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """One chunk of named vectors."""
    content = save(dict(tensors))
    write_bytes(folder / f"{hashlib.sha256(content).hexdigest()}.safetensors", content)
