"""`reproduce`: papermill over the notebooks in order, each run again only where something changed.

What a notebook depends on is its key: its cells, the parameters, the package, the libraries, the
data, and the cells of the notebooks before it. `results/<profile>/seed<seed>/run.json` keeps keys.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lavic_utils import config
from lavic_utils import provenance as origin
from lavic_utils.data import profile_data_hash
from lavic_utils.hub import HubModel
from lavic_utils.repro import notebooks as nbs

INDEX = "index.json"  # file below the results -> its content when a notebook last left it
# Kinds and names of files that may change after they are made.
UNTOLD = {".log", ".lock", ".sqlite", "run.json", INDEX, "README.md"}


def tree_hash(folder: Path | None) -> str:
    """16 hex over names, sizes and times of the JSON files and pictures below a folder; 'unset' or
    'absent' where there is none."""
    if folder is None or not folder.is_dir():
        return "unset" if folder is None else "absent"
    files = []
    for path in sorted(p for kind in ("*.json*", "*.jpg") for p in folder.rglob(kind)):
        about = path.stat()
        files.append((path.relative_to(folder).as_posix(), about.st_size, about.st_mtime_ns))
    return origin.key(files=files)


@dataclass
class Job:
    """One notebook with one seed. `record`: how its last run went, as run.json has it."""

    path: Path
    out: Path  # executed copy
    parameters: dict[str, Any]
    trains: bool
    seconds: float  # expected
    key: str
    record: dict[str, Any]
    world: str = ""  # what stands in the mini world's folder now

    @property
    def name(self) -> str:
        return f"{self.path.stem} (seed {self.parameters['seed']})"

    def unchanged(self, results: Path) -> bool:
        """Executed well with this key, and everything that it made then is as it was left: a file
        of the content noted in index.json, or a newer one that `provenance.kept` takes."""
        now = {"status": "ok", "key": self.key, "world": self.world}
        if any(self.record.get(name) != value for name, value in now.items()):
            return False
        own, seed = origin.newest(results / "metrics.json"), self.parameters["seed"]
        if len(_rows(own, {seed})) < self.record.get("rows", 0):  # a newer file without them
            print(f"{self.name}: rows that it made are not in {own.name} any more", flush=True)
            return False
        noted = origin.kept(results / INDEX) or {}
        for name in self.record["made"]:
            path = results / name
            left = origin.file_hash(path) == noted.get(name, "")
            if not left and not (path.suffix == ".json" and origin.kept(path)):
                print(f"{self.name}: {name} is not as it was left", flush=True)
                return False
        return True


def read_run(folder: Path) -> dict[str, Any]:
    """The notebooks of one seed's run.json; empty where there is none or it is damaged."""
    return (origin.kept(folder / "run.json") or {}).get("notebooks", {})


def plan(profile: config.Profile, given: list[dict], only: Sequence[str] = ()) -> list[Job]:
    """The jobs in order, for the parameters `given` for each seed.

    The first seed comes last: its tables then show every seed.
    """
    chosen, jobs = nbs.find_notebooks(only), []
    books = {path: nbs.read_notebook(path) for path in nbs.find_notebooks()}
    data = [tree_hash(config.real_data_dir()), tree_hash(config.replications_dir())]
    common = [nbs.code_stamp(), profile.model_dump(mode="json"), origin.versions(), data]
    for wanted in [*given[1:], given[0]]:
        out = config.results_dir(profile) / f"seed{wanted['seed']}"
        records, earlier = read_run(out), []
        world = tree_hash(origin.world_dir(profile, wanted["seed"]))
        for path, nb in books.items():
            about, record = nb.metadata.get("lavic", {}), records.get(path.stem, {})
            trains = bool(about.get("per_seed"))
            if wanted is not given[0] and not trains:
                continue
            own = {name: wanted[name] for name in wanted if nbs.has_parameter(nb, name)}
            key = origin.key(cells=nbs.source_hash(nb), earlier=earlier, given=own, common=common)
            earlier = [*earlier, nbs.source_hash(nb, code_only=True)]
            made = any(name.endswith("result.json") for name in record.get("made", ()))
            seconds = 60 * about.get("minutes", 1)
            if record and (made or not trains):  # a run that read kept results says nothing
                seconds = record["seconds"]
            if path in chosen:
                place = out / path.name
                jobs.append(Job(path, place, own, trains, seconds, key, record, world))
    return jobs


def run_job(job: Job, profile: config.Profile) -> dict[str, Any]:
    """Run one notebook; its record for run.json: status "ok", or "failed" with `error` lines.

    The cells so far stand in NN_name.failed.ipynb until the last one has run. What exercises claim
    is true of the mini world, and cheap there alone: for real data solutions are only read.
    """
    import nbformat
    import papermill

    nb, start, begun = nbs.read_notebook(job.path), time.time(), [-1]
    for cell in nb.cells:
        if profile.world is None and nbs.SOLUTION in nbs.tags(cell):
            cell.source = "".join(f"# {line}" for line in cell.source.splitlines(True))
    failed, record = job.out.with_suffix(".failed.ipynb"), {"key": job.key, "status": "ok"}
    job.out.parent.mkdir(parents=True, exist_ok=True)
    with open(job.out.with_suffix(".log"), "w", encoding="utf-8") as log:
        logging.getLogger("papermill").handlers = [logging.StreamHandler(log)]
        how = {
            **nbs.KERNEL,
            "progress_bar": {"desc": job.name, "leave": False, "disable": None},  # on a terminal
            "on_cell_start": lambda cell, cell_index: begun.append(cell_index),
            "stdout_file": log,
            "stderr_file": log,
            "cwd": job.path.parent,
        }
        try:
            to = str(failed).replace("{", "{{").replace("}", "}}")  # papermill fills in braces
            nb = papermill.execute_notebook(nb, to, parameters=job.parameters, **how)
        except Exception as error:  # whatever a cell, the kernel or papermill raised
            index = getattr(error, "cell_index", begun[-1])  # a dead kernel: the last one begun
            record = {"status": "failed", "error": _failure(job, nb, index, error)}
            print(*record["error"], sep="\n", file=log)
    seed, results = job.parameters["seed"], config.results_dir(profile)
    about = origin.provenance(profile, seed, profile_data_hash(profile, seed))
    if record["status"] == "ok":
        given = {**job.parameters, "profile": profile.name}  # a path would be this machine's
        nb.metadata["papermill"] = {"parameters": given}
        nb.metadata["lavic"] = {**nb.metadata.get("lavic", {}), "provenance": about}
        origin.write_text(job.out, nbformat.writes(nb) + "\n")
        failed.unlink()
    found = [p for p in results.rglob("*") if p.is_file() and p.suffix not in UNTOLD]
    made = [p for p in found if p.name not in UNTOLD and p.stat().st_mtime >= start]
    left = {path.relative_to(results).as_posix(): origin.file_hash(path) for path in sorted(made)}
    origin.write_kept(results / INDEX, {**(origin.kept(results / INDEX) or {}), **left})
    record |= {
        "seconds": round(time.time() - start, 1),
        "made": list(left),
        "rows": len(_rows(origin.newest(results / "metrics.json"), {seed})),
        "world": tree_hash(origin.world_dir(profile, seed)),  # the first to ask makes it
    }
    records = {**read_run(job.out.parent), job.path.stem: record}
    origin.write_kept(job.out.with_name("run.json"), {"provenance": about, "notebooks": records})
    return record


def _failure(job: Job, source: Any, index: int, error: Exception) -> list[str]:
    """Which cell failed, as the source counts: papermill puts one in after the parameters."""
    after = [i + 1 for i, cell in enumerate(source.cells) if "parameters" in nbs.tags(cell)]
    number = index if index > (after or [0])[0] else index + 1
    place = f"cell {number} of {len(source.cells)} (seed {job.parameters['seed']})"
    return nbs.failure_lines(job.path.stem, place, error)


def reproduce(name: str, seeds: int, only: Sequence[str], force: bool, extended: bool) -> int:
    """Run all that is not up to date; exit code 0, or 1 after the first failing cell.

    UserError for bad input, for a second run in the same folder, and where training does not fit.
    """
    if seeds < 1:
        raise config.UserError(f"--seeds {seeds}: must be 1 or more")
    profile = config.load_profile(name)
    model = HubModel(profile.model, profile.revision, profile.download_gb)
    if model.stand_in(profile.model_path):
        profile = profile.model_copy(update={"tier": "rehearsal"})
    name = str(Path(name).resolve()) if name.endswith((".yaml", ".yml")) else name
    nbs.set_kernel_environment()
    results = config.results_dir(profile)
    results.mkdir(parents=True, exist_ok=True)
    given = [{"profile": name, "seed": profile.seed + i} for i in range(seeds)]
    if extended:
        given = [{**one, "extended": True} for one in given]
    try:
        with FileLock(results / ".lock", timeout=0):  # goes with the process, however it ends
            return _run_all(plan(profile, given, only), profile, force)
    except Timeout:
        where = relpath(results)
        raise config.UserError(f"another run is working in {where}; wait, or stop it") from None


def _run_all(jobs: list[Job], profile: config.Profile, force: bool) -> int:
    results = config.results_dir(profile)
    todo = [job for job in jobs if force or not job.unchanged(results)]
    if any(job.trains for job in todo):
        from lavic_utils.bench.memory import STAGES
        from lavic_utils.bench.plan import refuse_here
        from lavic_utils.loading import source

        refuse_here(profile, STAGES)
        source(profile)
    left = sum(job.seconds for job in todo) / 60
    for job in jobs:
        if job not in todo:
            print(f"{job.name}: unchanged, not run again", flush=True)
            continue
        print(f"{job.name}: started, about {left:.1f} minutes left in all", flush=True)
        left -= job.seconds / 60
        job.record = run_job(job, profile)
        if job.record["status"] != "ok":
            failed = relpath(job.out.with_suffix(".failed.ipynb"))
            print(*job.record["error"], sep="\n")
            print(f"the cells so far: {failed}; the same command continues from here")
            return 1
        print(f"{job.name}: done in {job.record['seconds'] / 60:.1f} minutes", flush=True)
    summary(jobs, results)
    return 0


def summary(jobs: Sequence[Job], results: Path) -> None:
    """Print minutes by notebook, HR@1 and VR of this run's seeds (means), where files are, and how
    this run compares with the committed one."""
    import pandas as pd

    print()
    for job in jobs:
        print(f"{job.name:44} {job.record['seconds'] / 60:5.1f} min")
    minutes = sum(job.record["seconds"] for job in jobs) / 60
    print(f"{'in all':44} {minutes:5.1f} min\n")
    path = origin.newest(results / "metrics.json")
    where = f"executed notebooks, figures, tables, {path.name}: {relpath(results)}"
    seeds = {job.parameters["seed"] for job in jobs}
    rows = _rows(path, seeds)
    if rows:
        frame = pd.DataFrame(rows).assign(seeds=1)
        how = {"seeds": "sum", "hit_ratio_conversations": "mean", "validity_ratio": "mean"}
        means = frame.groupby(["method", "domain"], as_index=False).agg(how)
        print(means.to_string(index=False, float_format="{:.4f}".format, na_rep="-"), end="\n\n")
    print(where)
    committed = config.ROOT / "results" / results.name / "metrics.json"
    print(compared(rows, _rows(committed, seeds)))


def _rows(path: Path, seeds: set[int]) -> list[dict]:
    """The rows of some seeds in a metrics file, none where there is no file."""
    return [row for row in (origin.kept(path) or {"rows": []})["rows"] if row["seed"] in seeds]


def compared(mine: Sequence[dict], ours: Sequence[dict]) -> str:
    """One line: how many rows of a run equal the committed ones of the same seeds, and by how much
    the others' HR@1 differs."""
    measured = ("conversations", "pairs", "hits", "valid", "hit_ratio_scored")
    known = {(row["method"], row["domain"], row["seed"]): row for row in ours}
    both = [(row, known.get((row["method"], row["domain"], row["seed"]))) for row in mine]
    both = [(row, other) for row, other in both if other]
    if not both:
        return "no committed run of the same seed to compare with"
    apart = []
    for row, other in both:
        if any(row.get(name) != other.get(name) for name in measured):
            by = row["hit_ratio_conversations"] - other["hit_ratio_conversations"]
            apart.append(f"{row['method']}, {row['domain']}, seed {row['seed']}: HR@1 {by:+.4f}")
    said = f"{len(both) - len(apart)} of {len(both)} rows equal the committed run"
    return "; ".join([said, *apart])
