"""Committed notebooks: execute them in place, stamp them with the code they were executed with, and check them."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavic_utils.config import ROOT, UserError, load_profile
from lavic_utils.provenance import code_hash, key, write_text

NOTEBOOKS = ROOT / "notebooks"
MAX_LINES = 20
INJECTED = "injected-parameters"
SOLUTION = "solution"  # tag of the folded, tested solution of an exercise
WIDGET = "application/vnd.jupyter.widget-view+json"
ABSOLUTE = re.compile(
    r"(?<![\w.:/+=~-])(/(home|root|tmp|usr|work|Users|opt|mnt|var|private|srv)/\w|[A-Z]:\\\w)"
)
BAR = re.compile(r"\r[^\n]|\d+it/s|s/it\]|\d+%\|")
KERNEL_ENV = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "PYTHONHASHSEED": "0",
    "JUPYTER_PREFER_ENV_PATH": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}
KERNEL: dict[str, Any] = {  # how papermill runs every notebook
    "kernel_name": "python3",
    "language": "python",
    "progress_bar": False,
    "start_timeout": 120,
    "store_widget_state": False,
    "extra_arguments": [
        "--Application.log_level=50"
    ],  # the kernel application's own log, not what cells print
}


def set_kernel_environment() -> None:
    """Offline, quiet, deterministic: the environment kernels inherit. LAVIC_* folders become absolute paths,
    since kernels work in the folder of the notebooks."""
    os.environ.update(KERNEL_ENV)
    for name in ("LAVIC_DATA", "LAVIC_REPLICATIONS", "LAVIC_RESULTS", "LAVIC_WORLD"):
        if os.environ.get(name):
            os.environ[name] = str(Path(os.environ[name]).resolve())
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))


def find_notebooks(folder: Path = NOTEBOOKS, numbers: Sequence[str] = ()) -> list[Path]:
    """NN_*.ipynb in order; with numbers ('03', '3' or '03_name') those alone. UserError for one that is not there."""
    found = sorted(p for p in folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise UserError(
            f"no notebooks NN_*.ipynb in {folder}; run from a checkout of the repository"
        )
    chosen = []
    for number in numbers:
        wanted = number.removesuffix(".ipynb")
        match = [
            p
            for p in found
            if p.stem == wanted or (wanted.isdecimal() and int(p.stem[:2]) == int(wanted))
        ]
        if not match:
            raise UserError(f"no notebook {number!r}; there are {', '.join(p.stem for p in found)}")
        chosen += match
    return sorted(set(chosen)) if numbers else found


def read_notebook(path: Path) -> Any:
    """The nbformat 4 node. UserError for a file that is not a notebook."""
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises many kinds
        raise UserError(
            f"{path}: not a readable notebook ({type(error).__name__}); restore or correct it"
        ) from None


def tags(cell: Any) -> list[str]:
    return list(cell.metadata.get("tags", []))


def injected_place(nb: Any) -> int:
    """Where papermill puts the cell with parameters: after the cell tagged `parameters`, else first (0)."""
    return next((i for i, cell in enumerate(nb.cells) if "parameters" in tags(cell)), -1) + 1


def source_hash(nb: Any, code_only: bool = False) -> str:
    """Hash of the cells' kinds, sources and tags (not of outputs, ids, counts, or cells papermill injected)."""
    cells = [
        c for c in nb.cells if INJECTED not in tags(c) and (c.cell_type == "code" or not code_only)
    ]
    return key(
        cells=[(c.cell_type, c.source.replace("\r\n", "\n"), sorted(tags(c))) for c in cells]
    )


def has_parameter(nb: Any, name: str) -> bool:
    return any(
        "parameters" in tags(cell) and re.search(rf"^{name}\b", cell.source, re.M)
        for cell in nb.cells
    )


def _parameter(nb: Any, name: str, default: str) -> str:
    for cell in nb.cells:
        if "parameters" in tags(cell):
            match = re.search(rf"^{name}\b[^=\n]*=\s*[\"']?([^\"'\s#]+)", cell.source, re.M)
            return match.group(1) if match else default
    return default


def _strip(nb: Any, clear_outputs: bool = False) -> Any:
    """Remove what changes from run to run (papermill's and nbclient's timings, versions); cell ids made stable."""
    lavic = dict(nb.metadata.get("lavic", {}))
    nb.metadata = type(nb.metadata)(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    if lavic:
        nb.metadata["lavic"] = lavic
    for index, cell in enumerate(nb.cells):
        cell.id = f"cell-{index:02d}"
        for noise in ("papermill", "execution", "collapsed", "scrolled"):
            cell.metadata.pop(noise, None)
        if "tags" in cell.metadata and not cell.metadata["tags"]:
            del cell.metadata["tags"]
        if cell.cell_type == "code" and clear_outputs:
            cell.outputs, cell.execution_count = [], None
        for output in cell.get("outputs", []):
            if "image/png" in output.get(
                "data", {}
            ):  # a widget is dead without its kernel: its picture stays
                output.data.pop(WIDGET, None)
    nb.nbformat, nb.nbformat_minor = 4, 5
    return nb


def execute_in_place(path: Path) -> None:
    """Run a notebook from its source through papermill and write it back, stamped. A failing cell raises papermill's
    PapermillExecutionError and leaves the file as it was."""
    import nbformat
    import papermill

    set_kernel_environment()
    os.environ["LAVIC_COMMIT"] = "1"
    code = code_hash()
    source = _strip(read_notebook(path), clear_outputs=True)
    with tempfile.TemporaryDirectory() as folder:
        plain, done = Path(folder, "in.ipynb"), Path(folder, "out.ipynb")
        plain.write_text(nbformat.writes(source), encoding="utf-8")
        papermill.execute_notebook(plain, done, cwd=path.parent, **KERNEL)
        nb = _strip(read_notebook(done))
    profile = load_profile(_parameter(nb, "profile", "mini"))
    stamp = {
        "code_hash": code,
        "source_hash": source_hash(nb),
        "profile": profile.name,
        "tier": profile.tier,
        "seed": int(_parameter(nb, "seed", str(profile.seed))),
        "real_data": bool(os.environ.get("LAVIC_DATA")),
        "replications": bool(os.environ.get("LAVIC_REPLICATIONS")),
    }
    nb.metadata["lavic"] = {**nb.metadata.get("lavic", {}), **stamp}
    write_text(path, nbformat.writes(nb) + "\n")


def _output_problems(output: Any) -> list[str]:
    problems = []
    if output.output_type == "error":
        problems.append(f"holds an error ({output.ename})")
    if output.output_type == "stream" and output.name == "stderr":
        problems.append("holds output on stderr")
    data = output.get("data", {})
    if (
        "image/png" in data
        and str(data.get("text/plain", "<")).startswith(("<", "Text("))
        or data.get("text/plain") == ""
    ):
        problems.append("shows a picture without alternative text (figures.keep(..., alt=...))")
    texts = [output.get("text", "")] + [
        v for k, v in data.items() if k.startswith("text/") and isinstance(v, str)
    ]
    if any(k.startswith("application/vnd.jupyter.widget") for k in data) or any(
        BAR.search(text) for text in texts
    ):
        problems.append("holds a progress bar")
    if any(match := ABSOLUTE.search(text) for text in texts):
        problems.append(f"shows an absolute path ({match.group(0)}...)")
    return problems


def check_notebook(path: Path, current_code: str | None = None) -> list[str]:
    """What is wrong with a committed notebook, one line each; empty when it is in order."""
    nb = read_notebook(path)
    stamp, problems = nb.metadata.get("lavic", {}), []
    if stamp.get("code_hash") != (current_code or code_hash()):
        problems.append("stale: executed with another state of lavic_utils")
    if stamp.get("source_hash") != source_hash(nb):
        problems.append("stale: cells changed after it was executed")
    if not any("parameters" in tags(cell) for cell in nb.cells):
        problems.append("no cell tagged `parameters`")
    if any(INJECTED in tags(cell) for cell in nb.cells):
        problems.append("holds a cell that papermill injected")
    if nb.metadata.get("kernelspec", {}).get("name") != "python3":
        problems.append("kernel is not python3")
    count, disorder = 0, []
    for number, cell in enumerate(nb.cells, 1):
        found = ["names an absolute path"] if ABSOLUTE.search(cell.source) else []
        if cell.cell_type == "code":
            count += 1
            if cell.execution_count != count:
                disorder.append(str(number))
            if len(cell.source.splitlines()) > MAX_LINES:
                found.append(f"has {len(cell.source.splitlines())} lines, more than {MAX_LINES}")
            for output in cell.outputs:
                found += _output_problems(output)
        problems += [f"cell {number} {what}" for what in dict.fromkeys(found)]
    if disorder:
        problems.append(
            f"not executed in order, from cell {disorder[0]} on ({len(disorder)} cells)"
        )
    return [f"{path.name}: {problem}" for problem in problems]


def check(folder: Path = NOTEBOOKS) -> list[str]:
    """Problems of all committed notebooks."""
    current = code_hash()
    return [problem for path in find_notebooks(folder) for problem in check_notebook(path, current)]


def failure_lines(name: str, position: str, error: BaseException) -> list[str]:
    """A failing cell in at most three lines: notebook, cell, error name and message."""
    ename = getattr(error, "ename", type(error).__name__)
    message = str(getattr(error, "evalue", error)).strip() or "(no message)"
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line)[:200] for line in message.splitlines()[:2]]
    return [f"{name}: {position} failed", f"{ename}: {lines[0]}", *lines[1:]]


def execute(numbers: Sequence[str], folder: Path = NOTEBOOKS) -> int:
    """Execute notebooks in place; prints a line each. Exit code 1 at the first failing cell."""
    import time

    from papermill.exceptions import PapermillExecutionError

    for path in find_notebooks(folder, numbers):
        start = time.monotonic()
        try:
            execute_in_place(path)
        except PapermillExecutionError as error:
            print(
                *failure_lines(path.stem, f"cell {error.cell_index + 1}", error),
                sep="\n",
                file=sys.stderr,
            )
            return 1
        print(f"{path.stem}: executed in {time.monotonic() - start:.0f} s", flush=True)
    return 0
