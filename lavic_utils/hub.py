"""Models from the hub: id, pinned revision and size in one place, and whether one is here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lavic_utils.config import UserError


class Unavailable(UserError):
    """A model or service that is not here: names it, its size, and the command that gets it."""


def check_proxies() -> None:
    """UserError that names the variable of a proxy which no HTTP client here can use."""
    usable = ("http", "https", *(("socks5", "socks5h") if find_spec("socksio") else ()))
    for name, value in os.environ.items():
        kind = value.partition("://")[0].lower() if "://" in value else "http"
        if name.lower() in ("http_proxy", "https_proxy", "all_proxy") and kind not in usable:
            raise UserError(
                f"{name} names a proxy of kind {kind}://, which cannot be used here: give it as "
                f"http://HOST:PORT, or unset {name} (for socks5:// install the package socksio)"
            )


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
                raise UserError(f"{folder}: {why}; correct the profile's `models`")
            return folder, None
        if self.cached():
            check_proxies()  # the hub is asked whether files that are not here exist
            return self.id, self.revision
        why = "which is not in the local cache; nothing is downloaded unasked"
        raise Unavailable(f"needs {self}, {why}. With a network: {self.command}")

    def cached(self) -> Path | None:
        """Its folder in the local cache; None where it is not there."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.id, "config.json", revision=self.revision)
        return Path(found).parent if isinstance(found, str) else None

    def stand_in(self, folder: str) -> bool:
        """Are the weights in `folder` (no folder: in the cache) less than a tenth of this model's?
        Then they are a narrow stand-in's: it rehearses a run, and says nothing of the model."""
        if not self.gigabytes:
            return False
        place = Path(folder) if Path(folder).is_dir() else self.cached()
        files = place.iterdir() if place else ()
        size = sum(one.stat().st_size for one in files if one.suffix in (".safetensors", ".bin"))
        return 0 < size < self.gigabytes * 1e8
