"""The committed notebooks: executed in place, stamped with what they were made of, and checked."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavic_utils.config import PACKAGE, ROOT, UserError
from lavic_utils.provenance import key, write_text

NOTEBOOKS = ROOT / "notebooks"
SOLUTION = "solution"  # tag of the folded, tested solution of an exercise
WIDGET = "application/vnd.jupyter.widget-view+json"
READ = {".py", ".yaml", ".json", ".csv", ".safetensors"}
UNREAD = {"repro", "bench", "__main__.py"}  # parts of the package that no notebook reads
KERNEL_ENV = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "JUPYTER_PREFER_ENV_PATH": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}
KERNEL: dict[str, Any] = {  # how papermill runs every notebook
    "kernel_name": "python3",
    "language": "python",
    "progress_bar": False,
    "extra_arguments": ["--Application.log_level=50"],  # the kernel's own log, not what cells print
}


def set_kernel_environment() -> None:
    """Offline, quiet, deterministic: the environment that kernels inherit.

    LAVIC_* folders become absolute, since kernels work in the folder of the notebooks.
    """
    os.environ.update(KERNEL_ENV)
    os.environ.pop("JUPYTER_PATH", None)  # somebody else's `python3`: the kernel is this Python
    for name in ("LAVIC_DATA", "LAVIC_REPLICATIONS", "LAVIC_RESULTS", "LAVIC_WORLD"):
        if os.environ.get(name):
            os.environ[name] = str(Path(os.environ[name]).resolve())
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))


def find_notebooks(numbers: Sequence[str] = ()) -> list[Path]:
    """NN_*.ipynb in order, or those of some numbers ('03', '3', '03_name'). UserError if absent."""
    found = {path.stem: path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    if not found:
        raise UserError(f"no notebooks NN_*.ipynb in {NOTEBOOKS}; run from a checkout")
    chosen = set()
    for number in numbers:
        wanted = number.removesuffix(".ipynb")
        match = {stem for stem in found if wanted in (stem, stem[:2], stem[:2].removeprefix("0"))}
        if not match:
            raise UserError(f"no notebook {number!r}; there are {', '.join(found)}")
        chosen |= match
    return [path for stem, path in found.items() if stem in chosen or not numbers]


def read_notebook(path: Path) -> Any:
    """The nbformat 4 node. UserError for a file that is not a notebook."""
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except (ValueError, AttributeError, KeyError, nbformat.ValidationError):
        raise UserError(f"{path}: not a readable notebook; restore or correct it") from None


def tags(cell: Any) -> list[str]:
    return list(cell.metadata.get("tags", []))


def has_parameter(nb: Any, name: str) -> bool:
    """Whether the cell tagged `parameters` sets a name."""
    given = "\n".join(cell.source for cell in nb.cells if "parameters" in tags(cell))
    return bool(re.search(rf"^{name}\b", given, re.M))


def source_hash(nb: Any, code_only: bool = False) -> str:
    """Hash of the cells' kinds, sources and tags (not of outputs, ids or counts)."""
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "code" or not code_only:
            cells.append((cell.cell_type, cell.source.replace("\r\n", "\n"), sorted(tags(cell))))
    return key(cells=cells)


def code_stamp(package: Path = PACKAGE) -> dict[str, str]:
    """Part of the package -> hash of its files, for every part whose code can change a notebook.

    A part is a file of the core or a room; profiles and the mini model's weights are parts too.
    """
    digests: dict[str, Any] = {}
    for path in sorted(package.rglob("*.*")):
        name = path.relative_to(package)
        if name.parts[0] in UNREAD or path.suffix not in READ:
            continue
        content = path.read_bytes()
        if path.suffix != ".safetensors":
            content = content.replace(b"\r\n", b"\n")
        digest = digests.setdefault(name.parts[0], hashlib.sha256())
        digest.update(f"{name.as_posix()}\0{len(content)}\0".encode() + content)
    return {part: digest.hexdigest()[:12] for part, digest in digests.items()}


def _strip(nb: Any, clear_outputs: bool = False) -> Any:
    """Remove what changes from run to run (timings, versions, ids), so that equal is equal."""
    kept = {"lavic": nb.metadata["lavic"]} if "lavic" in nb.metadata else {}
    nb.metadata = type(nb.metadata)(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
        **kept,
    )
    for index, cell in enumerate(nb.cells):
        cell.id = f"cell-{index:02d}"
        for noise in ("papermill", "execution", "collapsed", "scrolled"):
            cell.metadata.pop(noise, None)
        if not tags(cell):
            cell.metadata.pop("tags", None)
        if cell.cell_type == "code" and clear_outputs:
            cell.outputs, cell.execution_count = [], None
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data.pop(WIDGET, None)  # dead without its kernel: its picture stays
    nb.nbformat, nb.nbformat_minor = 4, 5
    return nb


def stale(nb: Any, now: dict[str, str]) -> str | None:
    """What changed after the notebook was executed and stamped; None where nothing did.

    `now`: the package's `code_stamp`.
    """
    stamp = nb.metadata.get("lavic", {})
    then = stamp.get("code", {})
    changed = sorted(part for part in {**then, **now} if then.get(part) != now.get(part))
    if stamp.get("source_hash") != source_hash(nb):
        changed.append("its cells")
    elif stamp.get("cells_hash") != key(cells=nb.cells):
        changed.append("its outputs")
    if not then:
        return "never executed and stamped"
    return f"{', '.join(changed)} changed after it was executed" if changed else None


def check_notebook(path: Path, now: dict[str, str]) -> list[str]:
    """What is wrong with a committed notebook, one line each; empty when it is in order."""
    nb, problems = read_notebook(path), []
    if changed := stale(nb, now):
        again = f"python -m lavic_utils notebooks execute {path.stem[:2]}"
        problems.append(f"{path.name}: stale ({changed}); run `{again}`")
    if not has_parameter(nb, "profile"):
        problems.append(f"{path.name}: no cell tagged `parameters` that sets profile")
    return problems


def check() -> list[str]:
    """Problems of all committed notebooks."""
    now = code_stamp()
    return [problem for path in find_notebooks() for problem in check_notebook(path, now)]


def failure_lines(name: str, position: str, error: BaseException) -> list[str]:
    """A failing cell in at most three lines: notebook, cell, error name and message."""
    kind = getattr(error, "ename", type(error).__name__)
    message = str(getattr(error, "evalue", error)).strip() or "(no message)"
    first, *rest = [re.sub(r"\x1b\[[0-9;]*m", "", line)[:200] for line in message.splitlines()[:2]]
    return [f"{name}: {position} failed", f"{kind}: {first}", *rest]


def execute(numbers: Sequence[str] = ()) -> int:
    """Execute notebooks in place through papermill, and stamp them; prints a line each.

    Exit code 1 at the first failing cell, which leaves the file as it was.
    """
    import nbformat
    import papermill

    set_kernel_environment()
    os.environ["LAVIC_COMMIT"] = "1"
    for path in find_notebooks(numbers):
        code, start = code_stamp(), time.monotonic()
        nb = _strip(read_notebook(path), clear_outputs=True)
        try:
            nb = _strip(papermill.execute_notebook(nb, None, cwd=path.parent, **KERNEL))
        except papermill.PapermillExecutionError as error:
            lines = failure_lines(path.stem, f"cell {error.cell_index + 1}", error)
            print(*lines, sep="\n", file=sys.stderr)
            return 1
        nb = nbformat.reads(nbformat.writes(nb), as_version=4)  # as it will be read
        said = nb.metadata.get("lavic", {})
        nb.metadata["lavic"] = {
            **{name: said[name] for name in ("minutes", "per_seed") if name in said},
            "code": code,
            "source_hash": source_hash(nb),
            "cells_hash": key(cells=nb.cells),
        }
        write_text(path, nbformat.writes(nb) + "\n")
        print(f"{path.stem}: executed in {time.monotonic() - start:.0f} s", flush=True)
    return 0
