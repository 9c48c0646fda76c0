"""Models from the hub: id, pinned revision and size in one place, and whether one is here."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from lavic_utils.config import UserError

WORDS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


class Unavailable(UserError):
    """A model or service that is not here: names it, its size, and the command that gets it."""


def check_proxies() -> None:
    """UserError that names the variable of a proxy which no HTTP client here can use."""
    usable = ("http", "https", *(("socks5", "socks5h") if find_spec("socksio") else ()))
    for name, value in os.environ.items():
        if name.lower() not in ("http_proxy", "https_proxy", "all_proxy") or not value.strip():
            continue
        kind = value.partition("://")[0].lower() if "://" in value else "http"
        if kind not in usable:
            raise UserError(
                f"{name} names a proxy of kind {kind}://, which cannot be used here: give it as "
                f"http://HOST:PORT, or unset {name} (for socks5:// install the package socksio)"
            )
        try:
            address = urlsplit(value if "://" in value else f"http://{value}")
            good = address.hostname and address.port != 0 and value.isprintable()
        except ValueError:  # of its port, or of an IPv6 address
            good = False
        if not good:
            why = "is no address of a proxy: give it as http://HOST:PORT, or unset it"
            raise UserError(f"{name} {why}")
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        if (place := os.environ.get(name)) and not Path(place).exists():
            raise UserError(f"{name}: there is no {place}; correct it, or unset it")


def whole(folder: Path) -> bool:
    """Are all weights of a checkpoint, and its tokenizer's words, in its folder? A download that
    broke off has its small files first; without words a tokenizer would be an empty one."""
    if not any((folder / name).is_file() for name in WORDS):
        return False
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return all((folder / shard).is_file() for shard in shards)
        if (folder / name).is_file():
            return True
    return False


@dataclass(frozen=True)
class HubModel:
    """A checkpoint on the hub. `revision`: a commit, so that nobody can change what is loaded;
    `gigabytes`: what the download takes. Nothing here downloads: a command of the user's does."""

    id: str
    revision: str | None
    gigabytes: float
    safetensors: bool = True  # the weights are there in this format: its other formats are left

    def __str__(self) -> str:
        return f"{self.id} ({self.gigabytes:g} GB)"

    @property
    def command(self) -> str:
        left = ["*.h5", "*.msgpack", "*.onnx", *(["*.bin"] if self.safetensors else [])]
        revision = [f"--revision {self.revision}"] if self.revision else []
        return " ".join(["hf download", self.id, *revision, *(f"--exclude '{p}'" for p in left)])

    def source(self, folder: str | None = None) -> tuple[str, str | None]:
        """(path or id, revision) for `from_pretrained`: the folder given, or the local cache.
        Raises Unavailable where it is in neither, UserError for a folder with no checkpoint."""
        if folder:
            if not (Path(folder) / "config.json").is_file():
                why = f"no config.json in it, so no checkpoint of {self.id}"
                raise UserError(f"{folder}: {why}; correct the profile's `model` or `models`")
            return folder, None
        if self.cached():
            return self.id, self.revision
        why = "which is not in the local cache, or not whole; nothing is downloaded unasked"
        raise Unavailable(f"needs {self}, {why}. With a network: {self.command}")

    def cached(self) -> Path | None:
        """Its folder in the local cache; None where it is not there with all its weights."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.id, "config.json", revision=self.revision)
        return Path(found).parent if isinstance(found, str) and whole(Path(found).parent) else None

    def stand_in(self, folder: str) -> bool:
        """Are the weights in `folder` (no folder: in the cache) less than a tenth of this model's?
        Then they are a narrow stand-in's: it rehearses a run, and says nothing of the model."""
        if not self.gigabytes:
            return False
        place = Path(folder) if Path(folder).is_dir() else self.cached()
        files = place.iterdir() if place and whole(place) else ()
        size = sum(one.stat().st_size for one in files if one.suffix in (".safetensors", ".bin"))
        return 0 < size < self.gigabytes * 1e8
