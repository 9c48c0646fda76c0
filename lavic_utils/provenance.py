"""Where a result comes from: hashes of code and data, versions, machine, time; atomic writing of files."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from lavic_utils.config import PACKAGE, ROOT, Profile, UserError, real_data_dir

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "sentence-transformers",
    "numpy",
    "pillow",
)
ROW_FIELDS = (
    "method", "domain", "seed", "conversations", "pairs", "hits", "valid",
    "hit_ratio_pairs", "hit_ratio_conversations", "validity_ratio", "ci95",
)  # fmt: skip
# Modules whose code can change a number; the command line, the driver and the drawing of tables and figures cannot.
NUMBERS = (
    "config",
    "mini/words",
    "mini/drawing",
    "mini/world",
    "rows",
    "data",
    "retrieval",
    "encoders",
    "prompts",
    "vision",
    "store",
    "training",
    "distillation",
    "recommendation",
    "openmodels",
    "remote/chat_api",
    "methods",
    "inputs",
    "runs",
    "evaluation",
)
TEXT = {".py", ".yaml", ".yml", ".json", ".jsonl", ".md", ".txt"}


def _plain(value: Any) -> Any:
    """JSON form of numpy scalars and arrays, paths and tuples (for `json.dumps(default=...)`)."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return value.name
    raise TypeError(f"{type(value).__name__} is not JSON-able")


def key(**parts: Any) -> str:
    """Stable 16-hex key of a JSON-able dict: the same parts give the same key in every process and order."""
    text = json.dumps(parts, sort_keys=True, default=_plain, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_hash(package: Path = PACKAGE, only: Sequence[str] | None = None) -> str:
    """12 hex over the package: *.py (or only these modules), profiles/*.yaml and mini_model/* (weights by content);
    line ends normalised."""
    code = package.rglob("*.py") if only is None else [package / f"{name}.py" for name in only]
    weights = (
        p for p in package.glob("mini_model/*") if p.name not in ("README.md", "abilities.json")
    )
    files = [*code, *([] if only else package.glob("profiles/*.yaml")), *weights]
    digest = hashlib.sha256()
    for path in sorted(set(files), key=lambda p: p.relative_to(package).as_posix()):
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
            content = path.read_bytes()
            if path.suffix in TEXT:
                content = content.replace(b"\r\n", b"\n")
            digest.update(
                f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode() + content
            )
    return digest.hexdigest()[:12]


def tree_hash(folder: Path | None) -> str:
    """16 hex over names, sizes and times of the JSON files below a folder; 'unset' or 'absent' where there is none."""
    if folder is None or not folder.is_dir():
        return "unset" if folder is None else "absent"
    files = sorted(p for p in folder.rglob("*.json*") if p.is_file())
    return key(
        files=[
            (p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns)
            for p in files
        ]
    )


def world_dir(profile: Profile) -> Path:
    """Folder of the profile's rendered world: data/<profile>/, or under LAVIC_WORLD if it is set."""
    return Path(os.environ.get("LAVIC_WORLD", ROOT / "data")) / profile.name


def profile_data_hash(profile: Profile) -> str:
    """`data.data_hash` of the profile's data folder; 'none' while that folder does not exist."""
    root = world_dir(profile) if profile.world is not None else real_data_dir()
    if root is None or not root.is_dir():
        return "none"
    from lavic_utils.data import data_hash

    return data_hash(root)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError:
        return None


def versions(names: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Installed versions of the packages that can change a number, None for one that is absent."""
    return {name: _version(name) for name in names}


def provenance(profile: Profile, seed: int, data_hash: str) -> dict[str, Any]:
    """What every file under results/ carries. No host name, no user name, no path."""
    import psutil

    return {
        "profile": profile.name,
        "seed": seed,
        "tier": profile.tier,
        "code_hash": code_hash(),
        "numbers_hash": key(code=code_hash(only=NUMBERS), settings=profile.model_dump(mode="json")),
        "data_hash": data_hash,
        "versions": versions(),
        "python": platform.python_version(),
        "machine": {
            "processor": _processor(),
            "cores": psutil.cpu_count(logical=True),
            "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        },
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@contextmanager
def _temporary(path: Path):
    """A sibling temp path that replaces `path` when the block ends well, and is removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temp
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Atomic write of UTF-8 text with plain line feeds."""
    with _temporary(Path(path)) as temp:
        temp.write_bytes(text.encode("utf-8"))


def write_json(path: Path, obj: Any) -> None:
    """Atomic, deterministic JSON. NaN or infinity raise ValueError."""
    write_text(
        path, json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"
    )


def footer(provenance: Mapping[str, Any]) -> str:
    """One line for figures and tables: tier, profile, seed(s), code."""
    seeds = provenance.get("seeds") or [provenance["seed"]]
    label = "seed" if len(seeds) == 1 else "seeds"
    shown = ", ".join(str(seed) for seed in seeds)
    code = str(provenance["code_hash"])[:7]
    return f"tier: {provenance['tier']} · profile {provenance['profile']} · {label} {shown} · code {code}"


def save_figure(fig: Any, path: Path, tier: str, provenance: Mapping[str, Any]) -> None:
    """Atomic PNG/PDF/SVG of a matplotlib figure, with the tier in a footer line and in the file's metadata."""
    line = footer({**provenance, "tier": tier})
    for old in [text for text in fig.texts if text.get_gid() == "lavic-footer"]:
        old.remove()
    fig.text(0.005, 0.0, line, fontsize=6, color="0.4", ha="left", va="top", gid="lavic-footer")
    path = Path(path)
    kind = path.suffix.lstrip(".") or "png"
    about = {"Title": path.stem, "Description": line} if kind == "png" else {"Title": line}
    if kind == "png":
        about["Comment"] = json.dumps(
            {**provenance, "tier": tier}, default=_plain, ensure_ascii=True
        )
    with _temporary(path) as temp:
        fig.savefig(temp, format=kind, metadata=about, bbox_inches="tight", dpi=150)


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        return {"provenance": dict(old["provenance"]), "rows": list(old["rows"])}
    except FileNotFoundError:
        return {"provenance": {}, "rows": []}
    except (ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not a metrics file ({what}); delete it and run again") from None


def upsert_metrics(
    path: Path, rows: Iterable[Mapping[str, Any]], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Put rows into metrics.json, one for each (method, domain, seed); returns what was written.

    Rows of other keys stay only where the file's numbers_hash and data_hash are the new ones, so one file never mixes
    two states of code or data. A row without one of ROW_FIELDS raises ValueError.
    """
    path, new = Path(path), [dict(row) for row in rows]
    for row in new:
        missing = [field for field in ROW_FIELDS if field not in row]
        if missing:
            raise ValueError(f"metrics row of {row.get('method')!r}: missing {', '.join(missing)}")
    old = _read_metrics(path)
    same = all(
        old["provenance"].get(name) == provenance[name] for name in ("numbers_hash", "data_hash")
    )
    merged = {_row_key(row): row for row in [*(old["rows"] if same else []), *new]}
    ordered = [merged[row_key] for row_key in sorted(merged)]
    seeds = sorted({row["seed"] for row in ordered if row["seed"] is not None})
    out = {"provenance": {**provenance, "seeds": seeds}, "rows": [_ordered(row) for row in ordered]}
    write_json(path, out)
    return out


def _row_key(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return (row["method"], row["domain"], -1 if row["seed"] is None else int(row["seed"]))


def _ordered(row: Mapping[str, Any]) -> dict[str, Any]:
    extra: Sequence[str] = sorted(set(row) - set(ROW_FIELDS))
    return {field: row[field] for field in (*ROW_FIELDS, *extra)}
