"""Command line: `python -m lavic_utils COMMAND`. Bad input: one line on stderr, exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
except ModuleNotFoundError:  # the one place where nothing can be said with a UserError
    print(
        "error: packages are missing here; run make install, or python -m pip install -r requirements.lock",
        file=sys.stderr,
    )
    sys.exit(2)

from lavic_utils.commands import DataOption, bench, data, demo

app = typer.Typer(
    help="LaViC companion: the paper's two stages, tables and figures, from the command line.",
    pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True,
)  # fmt: skip
notebooks = typer.Typer(
    help="The committed notebooks: execute in place, or check.", no_args_is_help=True
)
app.add_typer(notebooks, name="notebooks")
app.add_typer(data, name="data")
app.add_typer(bench, name="bench")
app.command()(demo)
ProfileOption = Annotated[
    str, typer.Option("--profile", help="Name of a profile, or a path to a YAML file.")
]
FolderOption = Annotated[
    Path | None, typer.Option("--notebooks", help="Folder of the notebooks.", hidden=True)
]
RealOption = Annotated[
    Path | None, typer.Option("--data", help="Folder of the published data. Default: LAVIC_DATA.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on stdout instead of a table.")]
CheckOption = Annotated[
    bool, typer.Option("--check", help="Write nothing; exit 1 where a file is not up to date.")
]


def _report(problems: list[str]) -> None:
    for problem in problems:
        print(problem, file=sys.stderr)
    raise typer.Exit(1 if problems else 0)


@app.command()
def reproduce(
    profile: ProfileOption = "mini",
    seeds: Annotated[int, typer.Option(help="Number of seeds: the profile's, +1, ...")] = 1,
    only: Annotated[
        list[str] | None, typer.Option(help="Run this notebook alone, e.g. 03. Repeatable.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run notebooks that are up to date too.")
    ] = False,
    real: RealOption = None,
    extended: Annotated[
        bool, typer.Option("--extended", help="Also train what goes beyond the paper (minutes).")
    ] = False,
    folder: FolderOption = None,
) -> None:
    """Execute the notebooks in order; what has not changed is not run again."""
    from lavic_utils.config import use_data
    from lavic_utils.repro.driver import reproduce as run
    from lavic_utils.repro.notebooks import NOTEBOOKS

    use_data(real)
    raise typer.Exit(run(profile, seeds, only or [], force, folder or NOTEBOOKS, extended))


@app.command()
def methods(profile: ProfileOption = "mini", as_json: JsonOption = False) -> None:
    """List the 19 methods of the paper's tables: what each needs, and whether it can run here."""
    import json

    from lavic_utils.methods import listing
    from lavic_utils.runs import Run

    rows = listing(Run(profile))
    columns = ("name", "family", "inputs", "runnable", "needs")
    print(json.dumps(rows, indent=1)) if as_json else _print_rows(rows, columns, "reason")


@app.command()
def run(
    method: Annotated[
        str,
        typer.Argument(help="A name of `methods`, in any case, or its slug (lavic_w_o_images)."),
    ],
    domain: Annotated[str, typer.Option(help="beauty, fashion or home.")],
    profile: ProfileOption = "mini",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many dialogues.")
    ] = None,
    split: Annotated[str, typer.Option(help="test or valid.")] = "test",
    seed: Annotated[int | None, typer.Option(help="Default: the profile's.")] = None,
    order: Annotated[
        int, typer.Option(min=0, help="0: candidates as in the file; 1, 2, ...: seeded shuffles.")
    ] = 0,
    lists: Annotated[
        str | None, typer.Option(help="Candidates: the first ten of this retrieval method.")
    ] = None,
    data_folder: DataOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Default: results/<profile>/answers/<method>_<domain>.jsonl."),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible service, for the proprietary rows.")
    ] = None,
    served: Annotated[str | None, typer.Option(help="The model's name at that service.")] = None,
    max_usd: Annotated[
        float, typer.Option(min=0, help="Never spend more than this on one run.")
    ] = 1.0,
) -> None:
    """Answer a split with one method; writes an answers file that `evaluate` reads."""
    from lavic_utils.methods import find
    from lavic_utils.remote.chat_api import Settings
    from lavic_utils.runs import Run, run_method

    asked = Run(
        profile,
        seed,
        data_folder,
        Settings(base_url=base_url, served=served, max_usd=max_usd),
        lists,
    )
    said = run_method(asked, method, domain, split, order, limit, out)
    if (
        said and split == "test" and not (limit or order or data_folder or lists)
    ):  # what the paper's tables ask
        from lavic_utils.report import metrics_path, record

        record(asked, [find(method).name], [domain])
        said += f"\nits row stands in {metrics_path(asked)}"
    if said:  # of several processes one writes
        print(said)


@app.command()
def table(
    name: Annotated[str, typer.Argument(help="open_source, proprietary or ablation.")],
    profile: ProfileOption = "mini",
    as_json: JsonOption = False,
) -> None:
    """Print one of the paper's tables beside ours: intervals, evidence tier, and why a cell is empty."""
    import json

    from lavic_utils.report import table_rows
    from lavic_utils.runs import Run

    rows = table_rows(Run(profile), name)
    print(json.dumps(rows, indent=1)) if as_json else _print_rows(rows, tuple(rows[0])[:-1], "note")


def _print_rows(rows: list[dict], columns: tuple[str, ...], note: str) -> None:
    """A table of some columns, then each different `note` once, with the methods it is of."""
    from rich.console import Console
    from rich.table import Table

    console, shown = Console(width=None if sys.stdout.isatty() else 160), Table(*columns)
    notes: dict[str, list[str]] = {}
    for row in rows:
        shown.add_row(*("" if row[c] is None else str(row[c]) for c in columns))
        if row[note]:
            notes.setdefault(row[note], []).append(str(row[columns[0]]))
    console.print(shown, markup=False)
    for text, names in notes.items():
        print(f"{', '.join(dict.fromkeys(names))}: {text}")


@notebooks.command("execute")
def notebooks_execute(
    numbers: Annotated[list[str] | None, typer.Argument(help="e.g. 02 03; all by default.")] = None,
    real: RealOption = None,
    folder: FolderOption = None,
) -> None:
    """Execute notebooks in place and stamp them."""
    from lavic_utils.config import use_data
    from lavic_utils.repro.notebooks import NOTEBOOKS, execute

    use_data(real)
    raise typer.Exit(execute(numbers or [], folder or NOTEBOOKS))


@notebooks.command("check")
def notebooks_check(folder: FolderOption = None) -> None:
    """Check that every committed notebook is executed, in order and up to date."""
    from lavic_utils.repro.notebooks import NOTEBOOKS, check

    _report(check(folder or NOTEBOOKS))


@app.command()
def world(profile: ProfileOption = "mini") -> None:
    """Make the rendered world of a profile."""
    from lavic_utils.config import UserError, load_profile
    from lavic_utils.mini.world import make_world
    from lavic_utils.provenance import world_dir

    loaded = load_profile(profile)
    if loaded.world is None:
        raise UserError(
            f"profile {loaded.name!r} has no world section: it uses real data (LAVIC_DATA)"
        )
    print(make_world(world_dir(loaded), loaded.world))


@app.command("mini-model")
def mini_model() -> None:
    """Train the mini vision-language model (hours on 2 cores; resumable)."""
    from lavic_utils.mini.abilities import main as train

    train()


@app.command()
def readme(check: CheckOption = False) -> None:
    """Write the generated tables of README.md."""
    from lavic_utils.repro.readme import update_readme

    stale = update_readme(check=check)
    _report(stale if check else [])


@app.command()
def evaluate(
    answers: Annotated[
        Path,
        typer.Argument(help="JSONL of answered test rows, as the authors' script writes them."),
    ],
    against: Annotated[
        Path | None, typer.Option(help="Answers to compare with, on the rows both hold.")
    ] = None,
    candidates: Annotated[
        str | None, typer.Option(help="Field with the candidates (candidates_<key>).")
    ] = None,
    answer: Annotated[
        str | None, typer.Option(help="Field with the id read (recommended_<key>).")
    ] = None,
    reparse: Annotated[
        bool, typer.Option("--reparse", help="Read the raw answers again; say what that changes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Score answers: HR@1 over items and conversations, VR, ceilings, intervals, a paired test."""
    import json

    from lavic_utils.audit.answer_files import report, show

    found = report(answers, against, candidates, answer, reparse)
    print(json.dumps(found, indent=1)) if as_json else show(found)


@app.command()
def plan(
    profile: ProfileOption = "mini",
    gpu: Annotated[
        str | None,
        typer.Option(help="t4, a100 or h100; default: the card of this machine, else all three."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Memory, tokens, disk and hours a profile needs; exit 2 where it cannot fit the card."""
    import json

    from lavic_utils.bench.plan import plan as make
    from lavic_utils.bench.plan import show
    from lavic_utils.config import load_profile

    found = make(load_profile(profile), gpu)
    print(json.dumps(found, indent=1)) if as_json else show(found)


@app.command()
def doctor(
    network: Annotated[
        bool, typer.Option(help="Ask whether the hub's name resolves (2 s at most).")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine can run, what is there, and the one command to run next."""
    from lavic_utils.repro.doctor import facts, show

    show(facts(network), as_json)


@app.command()
def environment(
    check: CheckOption = False,
    lock: Annotated[bool, typer.Option("--lock", help="Also pin what is installed here.")] = False,
) -> None:
    """Write environment.yml (and with --lock requirements.lock)."""
    from lavic_utils.repro.environment import check_environment, write_environment

    if check:
        _report(check_environment())
    write_environment(lock=lock)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from lavic_utils.config import UserError

    try:
        code = app(args=arguments, prog_name="lavic_utils", standalone_mode=False) or 0
        if code == 130:  # typer has taken the interrupt
            raise KeyboardInterrupt
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("stopped; the same command continues from here", file=sys.stderr)
        return 130
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        print(f"error: {' '.join(error.format_message().split())} (see --help)", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
