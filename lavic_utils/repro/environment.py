"""requirements.lock: written from what is installed, checked against pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lavic_utils.config import ROOT, UserError
from lavic_utils.provenance import write_text

HEAD = "# Written by `make lock` from what is installed; do not edit.\n"
NOT_LOCKED = {"pip", "setuptools", "wheel", "lavic-companion"}
EXTRAS = {"demo": "requirements-demo.lock", "gpu": "requirements-gpu.lock"}  # locks of their own


def wanted(root: Path = ROOT, extra: str = "dev") -> list[Requirement]:
    """What pyproject.toml asks for: its dependencies and those of an extra ("": none)."""
    table = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*table["dependencies"], *table["optional-dependencies"].get(extra, [])]
    return [Requirement(line) for line in lines]


def installed() -> dict[str, str]:
    """Name -> version of every package here, without local labels (torch's +cpu)."""
    found = metadata.distributions()
    return {canonicalize_name(one.metadata["Name"]): one.version.split("+")[0] for one in found}


def read_lock(path: Path) -> dict[str, str]:
    """Name -> version. UserError where it is not there, or a line is no exact public pin."""
    if not path.is_file():
        raise UserError(f"{path.name} is not there; locks are for a checkout: run it in one")
    lines = path.read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    for line in pins:
        if not re.fullmatch(r"[\w.-]+==[\w.!]+", line):
            raise UserError(f"{path.name} line {lines.index(line) + 1}: {line!r}: no name==version")
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in pins}


def write_lock(root: Path = ROOT) -> None:
    """Pin what is installed here, but for what the locks of extras pin."""
    apart = NOT_LOCKED.union(*(read_lock(root / name) for name in EXTRAS.values()))
    pins = sorted((name, version) for name, version in installed().items() if name not in apart)
    lines = "".join(f"{name}=={version}\n" for name, version in pins)
    write_text(root / "requirements.lock", HEAD + lines)


def check(root: Path = ROOT) -> list[str]:
    """What pyproject.toml asks for and the locks do not give, one line each."""
    pins, asked, problems = {}, {}, []
    for extra, lock in {"dev": "requirements.lock", **EXTRAS}.items():
        pins |= read_lock(root / lock)
        asked |= {str(one): one for one in wanted(root, extra)}
    for one in asked.values():
        pin = pins.get(canonicalize_name(one.name))
        if pin is None or not one.specifier.contains(pin, prereleases=True):
            found = f"pins {pin}" if pin else "lacks it"
            problems.append(f"pyproject.toml wants {one}, the lock {found}: `make lock`")
    return problems
