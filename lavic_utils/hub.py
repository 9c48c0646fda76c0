"""Models from the hub: id, pinned revision and size in one place, and whether one can be had here and now."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from lavic_utils.config import PACKAGE, UserError


class Unavailable(UserError):
    """A model or service that cannot be had here: names it, its size, and the command that would help."""


@dataclass(frozen=True)
class HubModel:
    """A checkpoint on the hub. `revision`: a commit, so that nobody can change what is loaded (None: not known when this
    was written, the newest is taken and the answers say which); `gigabytes`: what the download takes."""

    id: str
    revision: str | None
    gigabytes: float
    safetensors: bool = (
        True  # the weights are there in this format; its other formats are not needed then
    )

    def __str__(self) -> str:
        return f"{self.id} ({self.gigabytes:g} GB)"

    @property
    def command(self) -> str:
        other = ["*.h5", "*.msgpack", "*.onnx", *(["*.bin"] if self.safetensors else [])]
        return " ".join(
            [
                f"hf download {self.id}",
                *([f"--revision {self.revision}"] if self.revision else []),
                *(f"--exclude '{pattern}'" for pattern in other),
            ]
        )

    def source(self, folder: str | None = None) -> tuple[str, str | None]:
        """(path or id, revision) for `from_pretrained`: the folder given, the local cache, or the hub where it answers.
        Raises Unavailable otherwise, UserError for a folder that holds no checkpoint."""
        if folder:
            if not (Path(folder) / "config.json").is_file():
                raise UserError(
                    f"{folder}: no config.json in it, so no checkpoint of {self.id}; correct the profile's `models`"
                )
            return folder, None
        if self.cached() or _hub_answers():
            return self.id, self.revision
        raise Unavailable(
            f"needs {self}, which is not in the local cache, and the hub does not "
            f"answer; with a network: {self.command}"
        )

    def cached(self) -> bool:
        from huggingface_hub import try_to_load_from_cache

        return isinstance(
            try_to_load_from_cache(self.id, "config.json", revision=self.revision), str
        )


def fingerprint(folder: str | None) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of a local checkpoint, for keys of what was made with it; empty for the hub's (id
    and revision say all) and for the packaged one (the code's hash holds it)."""
    path = Path(folder or "")
    if not folder or not path.is_dir() or path.resolve().is_relative_to(PACKAGE):
        return []
    return sorted(
        (f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in path.iterdir() if f.is_file()
    )


@functools.cache
def _hub_answers() -> bool:
    """Asked once a process, for at most three seconds; never where HF_HUB_OFFLINE is set."""
    import httpx
    from huggingface_hub import constants

    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    try:
        return httpx.head(constants.ENDPOINT, timeout=3, follow_redirects=True).status_code < 500
    except httpx.HTTPError:
        return False
