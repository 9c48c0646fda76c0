"""`python -m lavic_utils doctor`: what this machine can run, what is there, and the one command to run next.

torch is imported only where there is a GPU. Nothing printed names the machine, its user or a folder.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

from packaging.utils import canonicalize_name

from lavic_utils.config import (
    PACKAGE,
    ROOT,
    Profile,
    UserError,
    load_profile,
    real_data_dir,
    replications_dir,
    results_dir,
)
from lavic_utils.hub import HubModel
from lavic_utils.provenance import code_of, key, world_dir
from lavic_utils.repro import environment as packaging
from lavic_utils.repro.machine import Facts, cpu, gpus, memory, network

MINI_GIB = 2.0  # the mini run's measured peak is below it
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
RUN, TABLE = (
    "python -m lavic_utils run LaViC --domain beauty --profile ",
    "python -m lavic_utils table open_source",
)


def packages(root: Path = ROOT) -> Facts:
    """Installed versions against requirements.lock: `missing` of what pyproject.toml needs, `different`: {name: [here, lock]}."""
    if not (root / "requirements.lock").is_file():
        raise UserError(
            "requirements.lock is not there; run doctor from a checkout of the repository"
        )
    pins = packaging.read_lock((root / "requirements.lock").read_text(encoding="utf-8"))
    table = {**packaging.project(root), "optional-dependencies": {}}
    needed = {canonicalize_name(requirement.name) for requirement in packaging.requirements(table)}
    here = {
        canonicalize_name(one.metadata["Name"]): one.version.split("+")[0]
        for one in metadata.distributions()
        if one.metadata["Name"]
    }
    return {
        "locked": len(pins),
        "missing": sorted(needed - set(here)),
        "bitsandbytes": "bitsandbytes" in here,
        "different": {
            name: [here[name], pin] for name, pin in pins.items() if here.get(name, pin) != pin
        },
    }


def published() -> Facts:
    """What is there of the published data, by name and number (`data verify` reads contents), and of the replications."""
    from lavic_utils.remote.download import CATALOGUE, FILES, data_dir

    root, answers = data_dir(), replications_dir()
    return {
        "set": real_data_dir() is not None,
        "files": sum((root / name).is_file() for name in FILES),
        "of": len(FILES),
        "catalogue": (root / CATALOGUE).is_file(),
        "images": sum(1 for _ in root.glob("*_images/*.jpg")),
        "replications": answers and len(list(answers.rglob("*.jsonl"))),
    }


def obstacle(profile: Profile, found: Facts) -> str | None:
    """Why a profile cannot run on a machine of these facts; None where it can."""
    free, cards = found["memory"]["usable"], found["gpus"]
    if profile.world:
        return (
            None if free >= MINI_GIB else f"needs {MINI_GIB:g} GiB of memory, {free:g} can be had"
        )
    if not cards:
        return "needs an NVIDIA GPU"
    import torch

    from lavic_utils.bench.plan import Card, refuse

    if not torch.cuda.is_available():
        return "the installed torch cannot use the GPU (a build for CPUs, or an old driver)"
    try:
        refuse(profile, Card(cards[0]["name"], cards[0]["gib"], 0, 0))
    except UserError as error:
        return str(error)
    missing = profile.quantize_4bit and not found["packages"]["bitsandbytes"]
    return "needs bitsandbytes: python -m pip install -e '.[gpu]'" if missing else None


def state(profile: Profile, found: Facts) -> Facts:
    """Of a profile: its `obstacle`, whether its `world` is drawn (None: it has none), the command that downloads its `model`
    (None: it is here), and its trained stages: how many, and how many of this code and these settings."""
    now = key(code=code_of("report"), settings=profile.model_dump(mode="json"))
    stages = [
        p
        for stage in ("stage1", "stage2/*/*")
        for p in results_dir(profile).glob(f"seed*/{stage}/result.json")
    ]
    hub = HubModel(profile.model, profile.revision, profile.download_gb)
    return {
        "obstacle": obstacle(profile, found),
        "trained": len(stages),
        "current": sum(f'"{now}"' in path.read_text(encoding="utf-8") for path in stages),
        "world": (world_dir(profile) / "mini_facts.json").is_file() if profile.world else None,
        "model": None if Path(profile.model_path).is_dir() or hub.cached() else hub.command,
    }


def facts(ask_network: bool = True) -> Facts:
    """Everything `show` prints, JSON-able. Where packages are missing, profiles and data are left out."""
    found: Facts = {
        "python": platform.python_version(),
        "packages": packages(),
        "cpu": cpu(),
        "memory": memory(),
        "gpus": gpus(),
        "disk_free_gb": round(shutil.disk_usage(ROOT).free / 1e9, 1),
        "network": network(ask_network),
        "browser": next((name for name in BROWSERS if shutil.which(name)), None),
        "data": {},
        "profiles": {},
    }
    if not found["packages"]["missing"]:
        found["data"] = published()
        names = sorted(path.stem for path in (PACKAGE / "profiles").glob("*.yaml"))
        found["profiles"] = {name: state(load_profile(name), found) for name in names}
    return {**found, "next": dict(zip(("command", "why"), next_command(found), strict=True))}


def next_command(found: Facts) -> tuple[str, str]:
    """The one command to run next, and why: first the mini run, then what a GPU makes possible, then trying it."""
    if found["packages"]["missing"]:
        return "python -m pip install -r requirements.lock", "packages are missing"
    profiles, data = found["profiles"], found["data"]
    if profiles["mini"]["obstacle"]:
        return TABLE, "too little memory for a run; this prints the committed results"
    if not profiles["mini"]["current"]:
        return (
            "python -m lavic_utils reproduce",
            "nothing trained here is of this code; the mini run takes minutes",
        )
    name = next((name for name in ("paper", "t4") if profiles[name]["obstacle"] is None), None)
    if name is None:
        return "make demo", "the mini run is done, and no profile of the 7B model can run here"
    big = profiles[name]
    steps = [
        (
            data["files"] < data["of"],
            "python -m lavic_utils data fetch",
            "the published files are missing",
            True,
        ),
        (
            not data["set"],
            'export LAVIC_DATA="$PWD/data/reddit-amazon"',
            "LAVIC_DATA does not name the data yet",
            False,
        ),
        (
            not data["images"],
            "python -m lavic_utils data crawl",
            "the product images are missing",
            True,
        ),
        (big["model"], big["model"], "its model is missing", True),
        (not big["current"], RUN + name, "data and model are there", False),
        (True, f"{TABLE} --profile {name}", "it is trained", False),
    ]
    _, command, why, online = next(step for step in steps if step[0])
    if online and found["network"] not in ("the hub is found", "not asked"):
        return "make demo", f"profile {name} can run, but {why} and there is no network"
    return command, f"profile {name} can run; {why}"


def _packages_row(pack: Facts) -> str:
    if pack["missing"]:
        return f"missing: {', '.join(pack['missing'])}"
    if not pack["different"]:
        return f"none differs from requirements.lock ({pack['locked']})"
    shown = [f"{name} {here} (lock: {pin})" for name, (here, pin) in pack["different"].items()]
    return f"{len(shown)} differ from requirements.lock: {', '.join(shown[:5])}{', ...' if len(shown) > 5 else ''}"


def _profile_row(one: Facts) -> str:
    parts = [f"cannot run: {one['obstacle']}" if one["obstacle"] else "can run"]
    parts += ["world not drawn yet"] if one["world"] is False else []
    parts += ["its model is not here"] if one["model"] else []
    return "; ".join([*parts, f"{one['trained']} trained stages, {one['current']} of this code"])


def rows(found: Facts) -> list[tuple[str, str]]:
    """The facts in words: (what, finding)."""
    cores, gib, data = found["cpu"], found["memory"], found["data"]
    limit = f"; the container's limit is {gib['limit']:g}" if gib["limit"] else ""
    cards = [
        f"{g['name']}, {g['gib']:g} GiB, compute capability {g['compute']:g}: {'bfloat16' if g['bf16'] else 'float16'}"
        for g in found["gpus"]
    ]
    features = " ".join(cores["features"]) or "no known vector feature"
    told = [
        ("Python", found["python"]),
        ("packages", _packages_row(found["packages"])),
        (
            "processor",
            f"{cores['name']}, {cores['usable']:g} of {cores['cores']} cores, {features}",
        ),
        ("memory", f"{gib['free']:g} of {gib['total']:g} GiB free{limit}"),
        *(("GPU", card) for card in cards or ["no NVIDIA GPU"]),
        ("disk", f"{found['disk_free_gb']:g} GB free"),
        ("network", found["network"]),
        ("browser", found["browser"] or "no Chromium (only the browser tests need it)"),
    ]
    if data:
        parts = [
            *([] if data["set"] else ["LAVIC_DATA is not set"]),
            f"{data['files']} of {data['of']} files",
            f"{data['images']:,} images",
            "catalogue" if data["catalogue"] else "no catalogue",
        ]
        told += [
            ("published data", ", ".join(parts)),
            (
                "replications",
                "LAVIC_REPLICATIONS is not set"
                if data["replications"] is None
                else f"{data['replications']} of 9 files",
            ),
        ]
    return told + [
        (f"profile {name}", _profile_row(one)) for name, one in found["profiles"].items()
    ]


def show(found: Facts, as_json: bool = False) -> None:
    """The facts as a table, then the command to run next; or all as one JSON object."""
    if as_json:
        print(json.dumps(found, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table.grid("", "", padding=(0, 2))
    for row in rows(found):
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False).print(table)
    print(f"\nnext: {found['next']['command']}\n({found['next']['why']})")
