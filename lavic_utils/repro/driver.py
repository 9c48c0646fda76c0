"""`python -m lavic_utils reproduce`: papermill over the notebooks, in order, once for what has not changed."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavic_utils.config import (
    Profile,
    UserError,
    load_profile,
    real_data_dir,
    replications_dir,
    results_dir,
)
from lavic_utils.provenance import (
    code_hash,
    key,
    profile_data_hash,
    provenance,
    tree_hash,
    versions,
    write_json,
    write_text,
)
from lavic_utils.repro import notebooks as nbs
from lavic_utils.repro.progress import Display, Memory, clock, shown, summary

SCRATCH = ("checkpoint-", ".")  # names of files and folders that a later run need not find again


@dataclass
class Job:
    """One notebook with one seed. `previous` is its record in run.json, `key` what it depends on."""

    path: Path
    seed: int
    out: Path  # executed copy
    key: str
    minutes: float
    cells: int
    injected: int  # index of the cell papermill puts in, in the executed copy
    more: dict[str, Any] = field(default_factory=dict)  # parameters beyond profile and seed
    previous: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.stem

    def number(self, index: int) -> int:
        """1-based number in the notebook's source of the cell at an index of the executed copy."""
        return index + 1 - int(index > self.injected)

    @property
    def estimate(self) -> float:
        """Seconds it is expected to take."""
        return float(self.previous.get("seconds") or self.minutes * 60)

    def unchanged(self, results: Path) -> bool:
        """Executed well with this key, and everything it made then is still there."""
        ok = (
            self.previous.get("status") == "ok"
            and self.previous.get("key") == self.key
            and self.out.is_file()
        )
        return ok and all((results / made).exists() for made in self.previous.get("made", []))


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of one seed; empty where there is none or it is damaged (then everything is run again)."""
    try:
        return dict(json.loads((folder / "run.json").read_text(encoding="utf-8"))["notebooks"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def plan(
    profile: Profile,
    name: str,
    seeds: Sequence[int],
    folder: Path,
    only: Sequence[str] = (),
    extended: bool = False,
) -> list[Job]:
    """The jobs in order. A job's key covers its cells, parameters, package, versions, data, and the earlier notebooks' code."""
    chosen, everything, jobs = nbs.find_notebooks(folder, only), nbs.find_notebooks(folder), []
    common = {
        "code": code_hash(),
        "profile": profile.model_dump(mode="json"),
        "versions": versions(),
        "data": {"real": tree_hash(real_data_dir()), "replications": tree_hash(replications_dir())},
    }
    sources = {path: nbs.read_notebook(path) for path in everything}
    for seed in [*seeds[1:], seeds[0]]:  # the first seed last: its tables then show every seed
        earlier: list[str] = []
        out = results_dir(profile) / f"seed{seed}"
        records = read_run(out)
        for path in everything:
            nb, about = sources[path], sources[path].metadata.get("lavic", {})
            if seed != seeds[0] and not about.get("per_seed"):
                continue
            more = {"extended": True} if extended and nbs.has_parameter(nb, "extended") else {}
            job_key = key(
                source=nbs.source_hash(nb),
                inputs=earlier,
                profile_name=name,
                seed=seed,
                common=common,
                **more,
            )
            earlier = [*earlier, nbs.source_hash(nb, code_only=True)]
            if path in chosen:
                minutes = float(about.get("minutes", 1))
                record = records.get(path.stem, {})
                jobs.append(
                    Job(
                        path,
                        seed,
                        out / path.name,
                        job_key,
                        minutes,
                        len(nb.cells),
                        nbs.injected_place(nb),
                        more,
                        record,
                    )
                )
    return jobs


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Refuse two runs at once in one results folder. The lock goes with the process, however it ends."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="ascii") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another run is working in {shown(folder)}; wait for its end, or stop it"
            ) from None
        for pattern in (
            "**/.*.tmp",
            "seed*/.*.partial.ipynb",
        ):  # what a killed run left half written
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)
        yield


def _files(results: Path) -> dict[str, int]:
    """Relative name -> modification time of the files stages make in a results folder."""
    found = {}
    for path in results.rglob("*"):
        parts = path.relative_to(results).parts
        ours = len(parts) == 2 and (path.suffix in {".ipynb", ".log"} or path.name == "run.json")
        if path.is_file() and not ours and not any(part.startswith(SCRATCH) for part in parts):
            found["/".join(parts)] = path.stat().st_mtime_ns
    return found


def execute(job: Job, parameters: dict[str, Any], log: Any, on_cell: Any) -> Path:
    """papermill over one notebook into a hidden file beside the copy; returns that file. Raises what papermill does."""
    import papermill

    partial = job.out.with_name(f".{job.name}.partial.ipynb")
    partial.parent.mkdir(parents=True, exist_ok=True)
    handler, logger = logging.StreamHandler(log), logging.getLogger("papermill")
    logger.propagate, logger.handlers = False, [handler]
    papermill.execute_notebook(
        _source(job, parameters["profile"], partial),
        partial,
        parameters=parameters,
        stdout_file=log,
        stderr_file=log,
        on_cell_start=on_cell,
        cwd=job.path.parent,
        **nbs.KERNEL,
    )
    return partial


def _source(job: Job, profile: str, partial: Path) -> Path:
    """The notebook to run. What exercises claim is true of the mini world, and cheap there alone: for any other profile a copy
    (where `partial` will stand) whose solutions are only read."""
    import nbformat

    if load_profile(profile).world is not None:
        return job.path
    nb = nbs.read_notebook(job.path)
    for cell in nb.cells:
        if nbs.SOLUTION in nbs.tags(cell):
            cell.source = "".join(f"# {line}" for line in cell.source.splitlines(True))
    nbformat.write(nb, partial)
    return partial


def finish(job: Job, partial: Path, about: dict[str, Any]) -> None:
    """Atomically turn the partial notebook into the executed copy, with provenance and without this machine's paths."""
    import nbformat

    nb = nbs.read_notebook(partial)
    paths = {"input_path": job.path.name, "output_path": job.out.name}
    parameters = {"profile": about["profile"], "seed": job.seed, **job.more}
    nb.metadata["papermill"] = {
        **nb.metadata.get("papermill", {}),
        **paths,
        "parameters": parameters,
    }
    nb.metadata["lavic"] = {**nb.metadata.get("lavic", {}), "provenance": about}
    write_text(job.out, nbformat.writes(nb) + "\n")
    partial.unlink()


def run_job(job: Job, profile: Profile, name: str, display: Display) -> dict[str, Any]:
    """Run one notebook; returns its record for run.json (status 'ok', or 'failed' with `error` lines)."""
    results, partial = results_dir(profile), job.out.with_name(f".{job.name}.partial.ipynb")
    failed, log_path = job.out.with_suffix(".failed.ipynb"), job.out.with_suffix(".log")
    job.out.parent.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)
    memory, before, start = Memory(), _files(results), time.monotonic()
    memory.start()
    record: dict[str, Any] = {"key": job.key, "status": "ok", "cells": job.cells}

    def on_cell(cell: Any, cell_index: int) -> None:
        display.cell = job.number(cell_index)

    with open(log_path, "w", encoding="utf-8") as log:
        log.write(json.dumps(provenance(profile, job.seed, profile_data_hash(profile))) + "\n")
        try:
            execute(job, {"profile": name, "seed": job.seed, **job.more}, log, on_cell)
        except Exception as error:  # whatever a cell, the kernel or papermill raised
            record |= {"status": "failed", "error": _failure(job, error, display.cell)}
            log.write("\n".join(record["error"]) + "\n")
    record |= {"seconds": round(time.monotonic() - start, 1), "peak_mb": memory.stop()}
    record["made"] = sorted(
        path for path, stamp in _files(results).items() if before.get(path) != stamp
    )
    if record["status"] == "ok":
        finish(job, partial, provenance(profile, job.seed, profile_data_hash(profile)))
        failed.unlink(missing_ok=True)
    elif partial.is_file():
        os.replace(partial, failed)
    return record


def _failure(job: Job, error: BaseException, last: int) -> list[str]:
    """Two or three lines: notebook and cell (numbered as in the notebook's source), error name, message."""
    index = getattr(error, "cell_index", None)  # a dead kernel has none: the last cell begun
    number = last if index is None else job.number(index)
    place = f"cell {number} of {job.cells}" if number > 0 else "starting it"
    return nbs.failure_lines(job.name, f"{place} (seed {job.seed})", error)


def save_record(job: Job, record: dict[str, Any], profile: Profile) -> None:
    folder = job.out.parent
    records = {**read_run(folder), job.name: record}
    about = provenance(profile, job.seed, profile_data_hash(profile))
    write_json(
        folder / "run.json", {"provenance": about, "notebooks": dict(sorted(records.items()))}
    )


def reproduce(
    name: str = "mini",
    seeds: int = 1,
    only: Sequence[str] = (),
    force: bool = False,
    folder: Path = nbs.NOTEBOOKS,
    extended: bool = False,
) -> int:
    """Run all that is not up to date; exit code 0, or 1 after the first failing cell. UserError for bad input."""
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: must be 1 or more")
    profile = load_profile(name)
    name = str(Path(name).resolve()) if name.endswith((".yaml", ".yml")) else name
    nbs.set_kernel_environment()
    results = results_dir(profile)
    with lock(results):
        jobs = plan(profile, name, [profile.seed + i for i in range(seeds)], folder, only, extended)
        todo = [job for job in jobs if force or not job.unchanged(results)]
        with Display(todo) as display:
            for job in jobs:
                if job not in todo:
                    display.say(f"{job.name} (seed {job.seed}): unchanged, not run again")
                    continue
                display.begin(job)
                record = run_job(job, profile, name, display)
                save_record(job, record, profile)
                if record["status"] != "ok":
                    failed = shown(job.out.with_suffix(".failed.ipynb"))
                    lines = [
                        *record["error"],
                        f"the cells so far: {failed}; the same command continues from here",
                    ]
                    display.say("\n".join(lines))
                    return 1
                job.previous = record
                taken, peak = clock(record["seconds"]), record["peak_mb"]
                display.say(
                    f"{job.name} (seed {job.seed}): done in {taken} min, peak {peak:.0f} MB"
                )
        print(summary(jobs, results))
    return 0
