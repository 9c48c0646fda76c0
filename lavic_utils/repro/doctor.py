"""`doctor`: what this machine can run, what is there, and the one command to run next.

torch is imported only where there is a GPU. Nothing names the machine, its user or a folder.
"""

from __future__ import annotations

import csv
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil
from packaging.utils import canonicalize_name

from lavic_utils import config
from lavic_utils.config import ROOT, Profile, UserError
from lavic_utils.hub import HubModel
from lavic_utils.repro.environment import EXTRAS, installed, read_lock, wanted

GIB, CGROUP = 2**30, Path("/sys/fs/cgroup")
INSTALLED_GB = 2.3  # what requirements.lock takes on the disk with torch's build for CPUs
MINI_GIB = 2.0  # the mini run's measured peak is below it
OLDEST = 7.5  # Turing: CUDA 13, which torch is built with, has left Volta and older out
TABLE = "python -m lavic_utils table open_source"
Facts = dict[str, Any]


def packages(root: Path = ROOT) -> Facts:
    """What is missing of pyproject.toml, and what differs from the lock: {name: [here, lock]}."""
    if not (root / "requirements.lock").is_file():
        raise UserError("requirements.lock is not there; run doctor from a checkout")
    pins, here = read_lock(root / "requirements.lock"), installed()
    needed = {canonicalize_name(one.name) for one in wanted(root, extra="")}
    return {
        "locked": len(pins),
        "missing": sorted(needed - set(here)),
        "bitsandbytes": "bitsandbytes" in here,
        "different": {n: [here[n], pin] for n, pin in pins.items() if here.get(n, pin) != pin},
    }


def memory() -> Facts:
    """GiB: `total`, and what a run may use now: what is free, or a container's limit if less."""
    found = psutil.virtual_memory()
    usable = found.available
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # control groups, version 2 and 1
        path = CGROUP / name
        limit = path.read_text(encoding="ascii").strip() if path.is_file() else ""
        usable = min(usable, int(limit)) if limit.isdecimal() else usable
    return {"total": round(found.total / GIB, 1), "usable": round(usable / GIB, 1)}


def gpus() -> list[Facts]:
    """NVIDIA GPUs as `nvidia-smi` lists them; empty where it is not there or not understood."""
    ask = "nvidia-smi --query-gpu=name,memory.total,compute_cap --format=csv,noheader,nounits"
    found = []
    try:
        said = subprocess.run(ask.split(), capture_output=True, text=True, timeout=10, check=True)
        for name, mib, capability in csv.reader(said.stdout.splitlines(), skipinitialspace=True):
            compute, gib = float(capability), round(float(mib) / 1024, 1)
            half = "bfloat16" if compute >= 8 else "float16"
            found.append({"name": name, "gib": gib, "compute": compute, "half": half})
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
    return found


def published() -> Facts:
    """What is there of the published data, by name and number (`data verify` reads contents)."""
    from lavic_utils.remote.download import FILES, data_dir

    root, answers = data_dir(), config.replications_dir()
    return {
        "set": config.real_data_dir() is not None,
        "files": sum((root / name).is_file() for name in FILES),
        "of": len(FILES),
        "images": sum(1 for _ in root.glob("*_images/*.jpg")),
        "replications": len(list(answers.rglob("*.jsonl"))) if answers else 0,
    }


def obstacle(profile: Profile, found: Facts) -> str | None:
    """Why a profile cannot run on a machine of these facts; None where it can."""
    free, cards = found["memory"]["usable"], found["gpus"]
    if profile.world:
        return f"needs {MINI_GIB:g} GiB, {free:g} can be had" if free < MINI_GIB else None
    if not cards:
        return "needs an NVIDIA GPU"
    if cards[0]["compute"] < OLDEST:
        return f"torch's CUDA 13 runs on compute capability {OLDEST} and newer alone (T4 on)"
    import torch

    from lavic_utils.bench.plan import Card, refuse

    if not torch.cuda.is_available():
        return "the installed torch cannot use the GPU (a build for CPUs, or a driver before 580)"
    try:
        refuse(profile, Card(cards[0]["name"], cards[0]["gib"], 0, 0))
    except UserError as error:
        return str(error)
    missing = profile.quantize_4bit and not found["packages"]["bitsandbytes"]
    return f"needs bitsandbytes: python -m pip install -r {EXTRAS['gpu']}" if missing else None


def state(profile: Profile, found: Facts) -> Facts:
    """Its `obstacle`, how many results are `kept`, what downloads its `model` (None: here)."""
    hub = HubModel(profile.model, profile.revision, profile.download_gb)
    here = Path(profile.model_path).is_dir() or hub.cached()
    return {
        "obstacle": obstacle(profile, found),
        "kept": sum(1 for _ in config.results_dir(profile).glob("seed*/**/result.json")),
        "model": None if here else hub.command,
    }


def facts() -> Facts:
    """Everything `show` prints. Where packages are missing, profiles are left out."""
    found: Facts = {
        "packages": packages(),
        "memory": memory(),
        "gpus": gpus(),
        "data": {},
        "profiles": {},
    }
    if not found["packages"]["missing"]:
        found["data"] = published()
        for path in sorted((config.PACKAGE / "profiles").glob("*.yaml")):
            found["profiles"][path.stem] = state(config.load_profile(path.stem), found)
    command, why = next_command(found)
    return {**found, "next": {"command": command, "why": why}}


def next_command(found: Facts) -> tuple[str, str]:
    """The command to run next, and why: the mini run, what a GPU makes possible, trying it."""
    data, profiles = found["data"], found["profiles"]
    if found["packages"]["missing"]:
        return "python -m pip install -r requirements.lock", "packages are missing"
    if profiles["mini"]["obstacle"]:
        return TABLE, "too little memory for a run; this prints the committed results"
    if not profiles["mini"]["kept"]:
        return "python -m lavic_utils reproduce", "nothing is trained here; the mini run: minutes"
    able = [name for name in ("paper", "t4") if profiles[name]["obstacle"] is None]
    if not able:
        return "make demo", "the mini run is done, and no profile of the 7B model can run here"
    name, big = able[0], profiles[able[0]]
    run = f"python -m lavic_utils run LaViC --domain beauty --profile {name}"
    steps = [  # (whether it is due, command, why)
        (data["files"] < data["of"], "python -m lavic_utils data fetch", "files are missing"),
        (not data["set"], 'export LAVIC_DATA="$PWD/data/reddit-amazon"', "LAVIC_DATA is not set"),
        (not data["images"], "python -m lavic_utils data crawl", "product images are missing"),
        (big["model"], big["model"], "its model is missing"),
        (not big["kept"], run, "data and model are there"),
        (True, f"{TABLE} --profile {name}", "it is trained"),
    ]
    _, command, why = next(step for step in steps if step[0])
    return command, f"profile {name} can run; {why}"


def show(found: Facts) -> None:
    """The facts in words, then the command to run next."""
    pack, data, gib = found["packages"], found["data"], found["memory"]
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores")
    print(f"packages: {', '.join(pack['missing']) or 'none'} missing,", end=" ")
    print(f"{len(pack['different'])} of {pack['locked']} differ from requirements.lock")
    for name, (here, pin) in pack["different"].items():
        print(f"  {name} {here} (lock: {pin})")
    print(f"memory: {gib['usable']:g} of {gib['total']:g} GiB can be used")
    free = shutil.disk_usage(ROOT).free / 1e9
    print(f"disk: {free:.1f} GB free; an installation takes {INSTALLED_GB} GB", end=" ")
    print("with torch's build for CPUs, gigabytes more with the one for GPUs")
    for card in found["gpus"]:
        print("GPU: {name}, {gib:g} GiB, compute capability {compute:g}: {half}".format(**card))
    if not found["gpus"]:
        print("GPU: no NVIDIA GPU")
    if data:
        unset = "" if data["set"] else " (LAVIC_DATA is not set)"
        print("published data{}: {files} of {of} files, {images:,} images".format(unset, **data))
        print(f"replications (LAVIC_REPLICATIONS): {data['replications']} files")
    for name, one in found["profiles"].items():
        can = f"cannot run: {one['obstacle']}" if one["obstacle"] else "can run"
        model = "; its model is not here" if one["model"] else ""
        print(f"profile {name}: {can}{model}; {one['kept']} results kept")
    print(f"\nnext: {found['next']['command']}\n({found['next']['why']})")
