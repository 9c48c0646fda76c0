"""What a run shows: the live line with time left, peak memory, and the summary at the end."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavic_utils.config import ROOT

if TYPE_CHECKING:
    from lavic_utils.repro.driver import Job


def shown(path: Path) -> str:
    """A path for messages: relative to the checkout where it is inside."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


class Memory(threading.Thread):
    """Peak resident memory (MB) of the processes this one started, polled a few times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mb, self._stop_event = 0.0, threading.Event()

    def run(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._stop_event.wait(0.25):
            total = 0
            for child in me.children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.Error:
                    continue
            self.peak_mb = max(self.peak_mb, total / 2**20)

    def stop(self) -> float:
        self._stop_event.set()
        self.join(2)
        return round(self.peak_mb)


class Display:
    """Live line on a terminal (notebook, cell, elapsed, time left); plain lines elsewhere."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs, self.current, self.cell, self.began = list(jobs), None, 0, time.monotonic()
        self.start, self.live = time.monotonic(), None

    def __enter__(self) -> Display:
        if sys.stdout.isatty():
            from rich.live import Live

            self.live = Live(get_renderable=self.line, refresh_per_second=2, transient=True)
            self.live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.__exit__(*error)

    def left(self) -> float:
        """Seconds expected until the end."""
        waiting = sum(job.estimate for job in self.jobs)
        now = self.current.estimate - (time.monotonic() - self.began) if self.current else 0.0
        return waiting + max(now, 0.0)

    def line(self) -> str:
        if not self.current:
            return "starting"
        job, left = self.current, self.left()
        elapsed = clock(time.monotonic() - self.start)
        cell = f"cell {self.cell}/{job.cells}" if self.cell else "kernel starts"
        return (
            f"{job.name} · seed {job.seed} · {cell} · {elapsed} elapsed · about {clock(left)} left"
        )

    def say(self, text: str) -> None:
        self.live.console.print(text, highlight=False, markup=False) if self.live else print(
            text, flush=True
        )

    def begin(self, job: Job) -> None:
        self.jobs.remove(job)
        self.current, self.cell, self.began = job, 0, time.monotonic()
        if not self.live:
            self.say(
                f"{job.name} (seed {job.seed}): started, about {clock(self.left())} left in all"
            )


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def summary(jobs: Sequence[Job], results: Path) -> str:
    """Minutes and memory by notebook, HR@1 and VR by method and domain (means over seeds), and where the files are."""
    lines = ["", f"{'notebook':34} {'seed':>5} {'min':>6} {'peak MB':>8}"]
    for job in jobs:
        seconds, peak = job.previous.get("seconds", 0), job.previous.get("peak_mb", 0)
        lines.append(f"{job.name:34} {job.seed:>5} {seconds / 60:6.1f} {peak:8.0f}")
    total = sum(job.previous.get("seconds", 0) for job in jobs)
    lines += [f"{'total':34} {'':>5} {total / 60:6.1f}", *_metric_lines(results / "metrics.json")]
    return "\n".join(
        [*lines, "", f"executed notebooks, figures, tables, metrics.json: {shown(results)}"]
    )


def _metric_lines(path: Path) -> list[str]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError):
        return []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["domain"]), []).append(row)
    lines = ["", f"{'method':40} {'domain':8} {'seeds':>5} {'HR@1':>7} {'VR':>7}"]
    for (method, domain), found in groups.items():
        cells = [_mean(found, column) for column in ("hit_ratio_conversations", "validity_ratio")]
        lines.append(f"{method:40} {domain:8} {len(found):>5} {cells[0]:>7} {cells[1]:>7}")
    return lines


def _mean(rows: Sequence[dict[str, Any]], column: str) -> str:
    values = [row[column] for row in rows if row.get(column) is not None]
    return f"{sum(values) / len(values):.4f}" if values else "-"
