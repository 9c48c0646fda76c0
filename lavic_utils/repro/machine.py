"""What this machine has: processor, memory, NVIDIA GPUs, network. Read without torch; nothing names the machine or its user."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import psutil

from lavic_utils.provenance import processor_name as _processor

GIB = 2**30
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # as /proc/cpuinfo calls them
Facts = dict[str, Any]


def _words(*names: str) -> list[str]:
    """Words of the first of these files that can be read."""
    path = next((Path(name) for name in names if os.access(name, os.R_OK)), None)
    return path.read_text(encoding="ascii", errors="ignore").split() if path else []


def cpu() -> Facts:
    """Processor, vector features, and cores: all, and those that affinity and the container's quota leave to this process."""
    flags, quota = set(_words("/proc/cpuinfo")), _words("/sys/fs/cgroup/cpu.max")
    usable = float(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if len(quota) == 2 and quota[0].isdecimal():
        usable = min(usable, int(quota[0]) / int(quota[1]))
    return {
        "name": _processor(),
        "cores": os.cpu_count(),
        "usable": round(usable, 1),
        "features": [feature for feature in FEATURES if feature in flags],
    }


def memory() -> Facts:
    """GiB: `total`, `free` now, the container's `limit` (None: none), and what a run may use."""
    found, said = (
        psutil.virtual_memory(),
        _words("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    )
    limit = int(said[0]) if said and said[0].isdecimal() and int(said[0]) < found.total else None
    gib = {
        "total": found.total,
        "free": found.available,
        "limit": limit,
        "usable": min(found.available, limit or found.total),
    }
    return {name: value and round(value / GIB, 1) for name, value in gib.items()}


def gpus() -> list[Facts]:
    """NVIDIA GPUs as `nvidia-smi` lists them; empty where it is not there, fails or is not understood."""
    ask = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout
        return [
            {
                "name": name.strip(),
                "gib": round(float(mib) / 1024, 1),
                "compute": float(cap),
                "bf16": float(cap) >= 8,
            }
            for name, mib, cap in csv.reader(said.splitlines())
        ]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def network(ask: bool = True, seconds: float = 2) -> str:
    """Whether the hub's name resolves, asked for at most so many seconds; nothing is sent to the hub itself."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return "offline by setting (HF_HUB_OFFLINE)"
    host, found = (
        os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        .split("//")[-1]
        .split("/")[0]
        .split(":")[0],
        [],
    )

    def resolve() -> None:
        try:
            found.extend(socket.getaddrinfo(host, 443))
        except OSError:
            pass

    if ask:
        thread = threading.Thread(
            target=resolve, daemon=True
        )  # the resolver itself takes no time limit
        thread.start()
        thread.join(seconds)
    return "not asked" if not ask else "the hub is found" if found else "the hub is not found"
