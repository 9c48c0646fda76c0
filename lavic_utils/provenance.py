"""Where a result comes from: hashes of inputs and code, versions, machine, time; atomic files."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import platform
import re
import subprocess
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lavic_utils.config import PACKAGE, ROOT, Profile, UserError

# The libraries that can change a number: recorded beside every result.
PACKAGES = (
    *"torch transformers peft datasets accelerate bitsandbytes".split(),
    *"sentence-transformers numpy pillow".split(),
)


# ------------------------------------------------------------ hashes of inputs
def _plain(value: Any) -> Any:
    """JSON form of numpy scalars and arrays, and of paths (for `json.dumps(default=...)`)."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return value.name
    raise TypeError(f"{type(value).__name__} is not JSON-able")


def key(**parts: Any) -> str:
    """16 hex digits of a JSON-able dict: equal parts give the same key in every process."""
    text = json.dumps(parts, sort_keys=True, default=_plain, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_mark(path: Path) -> tuple[int, ...]:
    """Size, times and inode of a file: another one where its content may be."""
    about = path.stat()
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino


@functools.cache
def _file_hash(path: Path, *mark: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path: Path) -> str | None:
    """sha256 of a file, read once a process while its `file_mark` stays; None for no file."""
    return _file_hash(path, *file_mark(path)) if path.is_file() else None


def folder_hash(folder: Path | str) -> list[tuple[str, str | None]]:
    """(name, sha256) of the files in a folder but for its card (README.md), sorted; empty where
    there is no such folder."""
    files = [p for p in sorted(Path(folder).glob("*")) if p.is_file() and p.name != "README.md"]
    return [(p.name, file_hash(p)) for p in files]


def world_dir(profile: Profile, seed: int) -> Path:
    """Folder of a seed's rendered world: data/<profile>/seed<seed>/, or under LAVIC_WORLD."""
    place = Path(os.environ.get("LAVIC_WORLD") or ROOT / "data")
    return place / profile.name / f"seed{seed}"


# ------------------------------------------------------------ hashes of code
def plain_code(text: str) -> str:
    """Python source without what no result can depend on: comments, docstrings, its layout."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


@functools.cache
def _source_hash(path: Path, changed: int) -> str:
    return hashlib.sha256(plain_code(path.read_text(encoding="utf-8")).encode()).hexdigest()[:16]


def source_hash(path: Path) -> str:
    """16 hex digits of a source file's `plain_code`."""
    return _source_hash(path, path.stat().st_mtime_ns)


def _imported(path: Path) -> Iterator[str]:
    """Modules of the package that a source file imports at its top."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
            inside = node.module.removeprefix(PACKAGE.name).lstrip(".")
            yield inside  # from lavic_utils.data import ...
            for name in node.names:  # from lavic_utils import data
                yield f"{inside}.{name.name}".lstrip(".")


def code_of(module: str) -> dict[str, str]:
    """{module: hash} of a module of the package and of all that it imports from the package, so
    that folders and imports decide what a stage's code is, not a list kept by hand."""
    found: dict[str, str] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        path = PACKAGE / f"{name.replace('.', '/')}.py"
        if name and name not in found and path.is_file():
            found[name] = source_hash(path)
            todo += _imported(path)
    return found


def code_hash(package: Path = PACKAGE) -> str:
    """12 hex over the whole package: its code, its YAML files and the mini model's files."""
    found = {}
    for kind in ("*.py", "*.yaml", "mini_model/*"):
        for path in package.rglob(kind):
            if path.name not in ("README.md", "abilities.json") and path.name[0] != ".":
                content = source_hash(path) if path.suffix == ".py" else file_hash(path)
                found[path.relative_to(package).as_posix()] = content
    return key(files=found)[:12]


# ------------------------------------------------------------ what stands beside every result
def versions(names: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Installed versions, None for a package that is absent."""
    found: dict[str, str | None] = dict.fromkeys(names)
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name).split("+")[0]
    return found


def _processor() -> str:
    if (info := Path("/proc/cpuinfo")).is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _gpus() -> list[str]:
    """Name and driver of each NVIDIA GPU, as `nvidia-smi` says; empty where it is not there."""
    ask = "nvidia-smi --query-gpu=name,driver_version --format=csv,noheader"
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(ask.split(), capture_output=True, text=True, timeout=10, check=True)
        return said.stdout.splitlines()
    return []


def provenance(profile: Profile, seed: int, data_hash: str) -> dict[str, Any]:
    """What every file under results/ carries. No host name, no user name, no path.

    `numbers_hash` is of the settings and of the code that makes, scores and ranks answers (and of
    the mini world): rows of two different ones never stand in one metrics.json. `world`: the seed
    of the mini world, None for other data.
    """
    import psutil

    settings, memory = profile.model_dump(mode="json"), psutil.virtual_memory().total
    code = code_of("report") | code_of("experiment")
    code |= code_of("mini.world") if profile.world else {}
    return {
        "profile": profile.name,
        "seed": seed,
        "tier": profile.tier,
        "code_hash": code_hash(),
        "numbers_hash": key(code=code, settings=settings),
        "data_hash": data_hash,
        "world": profile.world.of(seed).seed if profile.world else None,
        "versions": versions(),
        "python": platform.python_version(),
        "machine": {
            "processor": _processor(),
            "cores": psutil.cpu_count(logical=True),
            "memory_gb": round(memory / 2**30, 1),
            "gpus": _gpus(),
        },
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


# ------------------------------------------------------------ files
def target(path: Path) -> Path:
    """Where a file is to be written, links followed. UserError where that is no file (a folder, a
    device), or its folder cannot be written to."""
    path = Path(os.path.realpath(path))
    if path.is_symlink():
        raise UserError(f"{path}: a link in a circle of links; name another")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: a folder or a device, not a file; name another")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.parent}: cannot be written to; name another folder")
    return path


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A temporary sibling that replaces `path` when the block ends well, and goes when it fails."""
    path = target(path)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temp
        os.replace(temp, path)
    except OSError as error:
        why = f"cannot be written ({error.strerror or error})"
        todo = "make room or name another place, and run the same command again"
        raise UserError(f"{path}: {why}; {todo}") from None
    finally:
        temp.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Atomic write: the file appears whole, or not at all."""
    with _temporary(Path(path)) as temp:
        temp.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Atomic write of UTF-8 text with plain line feeds."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, obj: Any) -> None:
    """Atomic, deterministic JSON. NaN or infinity raise ValueError."""
    text = json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False, default=_plain)
    write_text(path, text + "\n")


def write_kept(path: Path, obj: Mapping[str, Any]) -> None:
    """`write_json` with a hash of all the rest, by which `kept` sees damage."""
    rest = json.loads(json.dumps(obj, allow_nan=False, default=_plain))
    write_json(path, {**rest, "check": key(**rest)})


def kept(path: Path) -> dict[str, Any] | None:
    """What `write_kept` wrote; None where there is no such file, and, with a line that says so,
    where it is damaged, or a file beside it that it names under `files` with its hash."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        beside = found.get("files", {}).items()
        whole = all(file_hash(path.parent / name) == content for name, content in beside)
        if whole and found.pop("check") == key(**found):
            return found
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    print(f"{path.parent.name}/{path.name}: damaged, so not used", flush=True)
    return None


def newest(path: Path) -> Path:
    """Beside a committed metrics.json one's own runs write metrics.own.json, which git ignores:
    the latter where it is there."""
    own = path.with_suffix(".own.json")
    return own if own.is_file() else path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time at a file or folder; whoever has to wait says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{path.name}: another process works on it; waiting", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def footer(provenance: Mapping[str, Any]) -> str:
    """One line for figures and tables: tier and code, and of a run its profile and seed(s)."""
    parts, words = [f"tier: {provenance['tier']}"], provenance["tier"].split()
    if "run" in words or "rehearsal" in words:  # what is printed or counted has no profile
        seeds = provenance.get("seeds") or [provenance["seed"]]
        label = "seeds" if len(seeds) > 1 else "seed"
        parts.append(f"profile {provenance['profile']}")
        parts.append(f"{label} {', '.join(str(seed) for seed in seeds)}")
    return " · ".join([*parts, f"content hash of the code {provenance['code_hash'][:7]}"])


def save_figure(fig: Any, path: Path, tier: str, provenance: Mapping[str, Any]) -> None:
    """Atomic PNG of a figure, its tier in a footer and all of `provenance` in the file."""
    about = {**provenance, "tier": tier}
    line = footer(about)
    for old in [text for text in fig.texts if text.get_gid() == "lavic-footer"]:
        old.remove()
    look = {"fontsize": 9, "color": "0.4", "va": "top", "gid": "lavic-footer"}
    fig.text(0.005, 0.0, textwrap.fill(line, round(14 * fig.get_figwidth())), **look)
    comment = json.dumps(about, default=_plain, ensure_ascii=True)
    metadata = {"Title": path.stem, "Description": line, "Comment": comment}
    with _temporary(path) as temp:
        fig.savefig(temp, format="png", metadata=metadata, bbox_inches="tight", dpi=150)


CARD = """\
---
base_model: {base}
library_name: peft
tags: [lora, lavic]
---
# Adapter of the LaViC companion: {name}

By the LaViC companion, not by the paper's authors. A mini run is no evidence about a 7B model.

| what | value |
| --- | --- |
{rows}"""


def write_card(folder: Path, **scores: object) -> None:
    """README.md of the adapter that a stage left (if it left one), as the hub shows it: base model,
    data, profile, tier, the best epoch's figures, and `scores` on test dialogues where known."""
    config = folder / "adapter" / "adapter_config.json"
    if not config.is_file():
        return
    stored = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    about, found = stored["provenance"], stored["result"]
    log = found.get("history") or found.get("log", [])[-1:]
    best = min(log, key=lambda epoch: epoch.get("valid_loss", 0), default={})
    facts = {name: about[name] for name in ("tier", "profile", "seed", "data_hash")}
    facts["content hash of the code"] = about["code_hash"]
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if v)
    facts |= {"time": about["time"], **best, **scores}
    rows = "".join(f"| {name.replace('_', ' ')} | {value} |\n" for name, value in facts.items())
    parts = folder.parts[-3:] if folder.parts[-3] == "stage2" else folder.parts[-1:]
    name = ", ".join(parts).replace("_w_o_", " without ").replace("lavic", "LaViC")
    name = re.sub("_+", " ", re.sub("^stage", "stage ", name))  # from folders' names to words
    name = f"profile {about['profile']}, seed {about['seed']}, {name}"
    card = CARD.format(base=base, name=name, rows=rows)
    write_text(folder / "adapter" / "README.md", card)
