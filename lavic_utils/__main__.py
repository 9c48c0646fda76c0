"""The command line, `lavic` or `python -m lavic_utils`: what each command takes and starts.

Bad input ends in one line on stderr and exit code 2. Rooms are imported by the command that asks.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

try:
    from typer import Abort, Argument, Context, Exit, Option, Typer
except ModuleNotFoundError:  # the one place where nothing can be said with a UserError
    checkout = (Path(__file__).parents[1] / "requirements.lock").is_file()
    todo = "run make install, or python -m pip install -r requirements.lock"
    todo = todo if checkout else "install the wheel again, without --no-deps"
    print(f"error: packages are missing here; {todo}", file=sys.stderr)
    sys.exit(2)

from lavic_utils.config import DOMAINS, MOST, PACKAGE, UserError, load_profile, show_progress

app = Typer(no_args_is_help=True, pretty_exceptions_enable=False)
notebooks = Typer(help="The committed notebooks: execute in place, check.", no_args_is_help=True)
data = Typer(help="The published data: fetch, crawl, verify, stats.", no_args_is_help=True)
bench = Typer(help="Speed on this machine beside the released loop, as JSON.")
app.add_typer(notebooks, name="notebooks")
app.add_typer(data, name="data")
app.add_typer(bench, name="bench")


def _known(profile: str) -> str:
    load_profile(profile)  # a wrong one is refused before anything slow is imported
    return profile


def _folder(given: Path | None) -> Path | None:
    if given and not given.is_dir():
        why = "no such folder; give one laid out as the published files"
        raise UserError(f"--data {given}: {why}")
    return given


def _profiles() -> list[str]:
    """For the shell's completion, as the next: what is quick to say, and needs no quotes."""
    return sorted(path.stem for path in (PACKAGE / "profiles").glob("*.yaml"))


def _slugs() -> list[str]:
    rows = json.loads((PACKAGE / "published.json").read_text(encoding="utf-8"))["rows"]
    return [re.sub(r"\W", "_", row["method"].lower()).strip("_") for row in rows]


NAMED: dict = {"help": "A profile's name, or a path to a YAML file.", "autocompletion": _profiles}
Profile = Annotated[str, Option("--profile", callback=_known, **NAMED)]
DOMAIN: dict = {"help": "beauty, fashion or home.", "autocompletion": lambda: list(DOMAINS)}
SLUG = "A name of `methods`, or its slug: lavic_w_o_images."
METHOD: dict = {"help": SLUG, "autocompletion": _slugs}
Seed = Annotated[int | None, Option("--seed", min=0, max=MOST, help="Default: the profile's.")]
Data = Annotated[
    Path | None,
    Option("--data", callback=_folder, help="Folder of the data. Default: LAVIC_DATA."),
]
Json = Annotated[bool, Option("--json", help="JSON on stdout instead of a table.")]
Check = Annotated[bool, Option("--check", help="Write nothing; exit 1 where one is stale.")]


def _version(asked: bool) -> None:
    if asked:
        from lavic_utils.provenance import code_hash, versions

        number = versions(["lavic-companion"])["lavic-companion"] or "not installed"
        print(f"lavic {number}, content hash of the code {code_hash()[:7]}")
        raise Exit


@app.callback()
def _every(version: Annotated[bool, Option("--version", callback=_version)] = False) -> None:
    """LaViC companion: the paper's stages, tables and figures."""


def _report(problems: list[str]) -> None:
    print("".join(f"{problem}\n" for problem in problems), file=sys.stderr, end="")
    raise Exit(1 if problems else 0)


def _print_rows(rows: list[dict], note: str) -> None:
    """A table without its column of notes; then each note once, with the methods it is of."""
    import pandas as pd

    frame = pd.DataFrame(rows)
    print(frame.drop(columns=note).fillna("").to_string(index=False))
    for text, group in frame.groupby(note, sort=False):
        if text:
            print(f"{', '.join(group.iloc[:, 0].unique())}: {text}")


def use_data(folder: Path | None) -> None:
    """Let a folder given on the command line stand for LAVIC_DATA, for child processes too."""
    if folder:
        os.environ["LAVIC_DATA"] = str(folder.resolve())


@app.command()
def reproduce(
    profile: Profile = "mini",
    seeds: Annotated[int, Option(help="Number of seeds: the profile's, +1, ...")] = 1,
    only: Annotated[list[str] | None, Option(help="This notebook alone, e.g. 03.")] = None,
    force: Annotated[bool, Option("--force", help="Also what is up to date.")] = False,
    real: Data = None,
    extended: Annotated[bool, Option("--extended", help="Also beyond the paper.")] = False,
) -> None:
    """Execute the notebooks in order; what has not changed is not run again."""
    from lavic_utils.repro.driver import reproduce as run

    use_data(real)
    raise Exit(run(profile, seeds, only or [], force, extended))


@app.command()
def methods(profile: Profile = "mini") -> None:
    """List the 19 methods of the paper's tables, and whether each can run here."""
    from lavic_utils.experiment import Experiment
    from lavic_utils.methods import listing

    _print_rows(listing(Experiment(profile)), "reason")


@app.command()
def run(
    method: Annotated[str, Argument(**METHOD)],
    domain: Annotated[str, Option(**DOMAIN)],
    profile: Profile = "mini",
    limit: Annotated[int | None, Option(min=1, help="Only the first so many dialogues.")] = None,
    split: Annotated[Literal["test", "valid"], Option(help="What is answered.")] = "test",
    seed: Seed = None,
    order: Annotated[int, Option(min=0, help="1, 2, ...: candidates shuffled, seeded.")] = 0,
    data_folder: Data = None,
    out: Annotated[Path | None, Option(help="Default: results/<profile>/answers/...")] = None,
    force: Annotated[bool, Option("--force", help="Make its kept stages again, too.")] = False,
    base_url: Annotated[str | None, Option(help="An OpenAI-compatible service.")] = None,
    served: Annotated[str | None, Option(help="The model's name at that service.")] = None,
    max_usd: Annotated[float | None, Option(min=0, help="Spend no more. Default: 1.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Only say what it takes and costs.")] = False,
) -> None:
    """Answer a split with one method; writes an answers file that `evaluate` reads."""
    from lavic_utils.audit.answer_files import run_method
    from lavic_utils.bench.plan import foreseen
    from lavic_utils.experiment import Experiment
    from lavic_utils.methods import find
    from lavic_utils.remote.chat_api import OPENAI, Settings
    from lavic_utils.report import metrics_path, record

    settings = Settings(base_url=base_url or OPENAI, served=served, max_usd=max_usd)
    chosen = find(method)
    _refuse(profile, chosen.name)
    asked = Experiment(profile, seed, data_folder, settings, force).prepare()
    if dry_run:
        return print(foreseen(asked, method, domain, split, limit))
    said = run_method(asked, method, domain, split, order, limit, out)
    if not said:  # of several processes one writes
        return
    print(said, flush=True)
    if split == "test" and not (limit or order or data_folder):  # those of the tables
        record(asked, [chosen.name], [domain])
        print(f"its row stands in {metrics_path(asked)}")


def _refuse(profile: str, method: str) -> None:
    """UserError before anything is loaded where a stage of the method does not fit here."""
    from lavic_utils.bench.plan import refuse_here
    from lavic_utils.methods import find

    if stages := find(method).stages:
        refuse_here(load_profile(profile), stages)


@app.command()
def table(
    name: Annotated[str, Argument(help="open_source, proprietary or ablation.")],
    profile: Profile = "mini",
    as_json: Json = False,
) -> None:
    """Print one of the paper's tables beside ours, and why a cell is empty."""
    from lavic_utils.experiment import Experiment
    from lavic_utils.report import metrics_path, table_rows

    run = Experiment(profile)
    rows = table_rows(run, name)
    if as_json:
        return print(json.dumps(rows, indent=1))
    _print_rows(rows, "note")
    own = metrics_path(run)
    if own.with_name("metrics.json").is_file() and own.name != "metrics.json":
        print(f"ours: rows of your own runs alone; move {own} away to see the committed ones")


@notebooks.command("execute")
def notebooks_execute(
    numbers: Annotated[list[str] | None, Argument(help="e.g. 02 03; all by default.")] = None,
    real: Data = None,
) -> None:
    """Execute notebooks in place and stamp them."""
    from lavic_utils.repro.notebooks import execute

    use_data(real)
    raise Exit(execute(numbers or []))


@notebooks.command("check")
def notebooks_check() -> None:
    """Check that every committed notebook is executed and up to date."""
    from lavic_utils.repro.notebooks import check

    _report(check())


@app.command()
def tune(profile: Profile = "mini") -> None:
    """Search each arm's learning rate on validation; writes results/<profile>/tuning.json."""
    from lavic_utils.repro.tuning import tune as search

    print(*search(load_profile(profile)), sep="\n")


@app.command("mini-model")
def mini_model() -> None:
    """Train the mini vision-language model (over an hour on 2 cores; resumable)."""
    from lavic_utils.mini.abilities import main as train

    train()


@app.command()
def evaluate(
    answers: Annotated[Path, Argument(help="JSONL of answered rows, as the authors' script's.")],
    against: Annotated[Path | None, Option(help="Answers to compare with, on shared rows.")] = None,
    reparse: Annotated[bool, Option("--reparse", help="Read the raw answers again.")] = False,
    as_json: Json = False,
) -> None:
    """Score answers: HR@1 over items and conversations, VR, ceilings, intervals, a paired test."""
    from lavic_utils.audit.answer_files import report, show

    found = report(answers, against, reparse)
    print(json.dumps(found, indent=1)) if as_json else show(found)


@app.command()
def claims(
    method: Annotated[str | None, Argument(**METHOD)] = None,
    domain: Annotated[str | None, Argument(**DOMAIN)] = None,
) -> None:
    """What the published figures settle: one cell from count to verdict, or all in a few lines."""
    from lavic_utils.audit.claims import explain, read_claims, summary

    found = read_claims()
    if method is None:
        return print("\n".join(summary(found)))
    if not domain:
        raise UserError(f"claims {method!r}: of which domain? Add beauty, fashion or home")
    print(explain(found, method, domain))


@app.command()
def plan(
    profile: Profile = "paper",
    gpu: Annotated[str | None, Option(help="t4, a100, h100. Default: here, else all.")] = None,
) -> None:
    """Memory, tokens, disk and hours a profile needs; exit 2 where it cannot fit the card."""
    from lavic_utils.bench.plan import plan as make

    print(make(load_profile(profile), gpu))


@app.command()
def doctor() -> None:
    """Say what this machine can run, what is there, and the one command to run next."""
    from lavic_utils.repro.doctor import facts, show

    show(facts())


@app.command()
def environment(check: Check = False) -> None:
    """Write requirements.lock from what is installed here."""
    from lavic_utils.repro import environment as lock

    _report(lock.check()) if check else lock.write_lock()


@data.command("fetch")
def data_fetch(to: Annotated[Path | None, Option(help="Default: LAVIC_DATA.")] = None) -> None:
    """Download the authors' files and verify each; goes on where it was broken off."""
    from lavic_utils.remote.download import data_dir, fetch

    folder = data_dir(to)
    print(fetch(folder))
    print(f"next: export LAVIC_DATA='{folder.resolve()}', then python -m lavic_utils data crawl")


@data.command("crawl")
def data_crawl(
    folder: Data = None,
    first_only: Annotated[bool, Option("--first-only", help="The first image of each.")] = False,
    concurrency: Annotated[int, Option(min=1, max=256, help="Images at once.")] = 32,
) -> None:
    """Download the product images; goes on where it was broken off. Exit 1: some not reached."""
    from lavic_utils.remote.crawl import Settings, crawl, summary
    from lavic_utils.remote.download import data_dir

    counts = crawl(data_dir(folder), first_only, Settings(concurrency=concurrency))
    print(summary(counts))
    raise Exit(1 if counts["unreached"] else 0)


@data.command("verify")
def data_verify(folder: Data = None) -> None:
    """Say what is there, missing or corrupt and what that touches. Exit 1: something is wrong."""
    from lavic_utils.remote.download import data_dir, verify

    lines, right = verify(data_dir(folder))
    print("\n".join(lines))
    raise Exit(0 if right else 1)


@data.command("stats")
def data_stats(folder: Data = None) -> None:
    """Table 1 of the paper beside the files here, and counts, lengths and recall of each."""
    import pandas as pd

    from lavic_utils.audit.inspection import real_data_summary, table_1
    from lavic_utils.remote.download import data_dir

    root = data_dir(folder)
    splits, counts = pd.DataFrame(real_data_summary(root)), table_1(root).set_index("domain").T
    print(counts.astype(object).fillna("no catalogue").to_string(), end="\n\n")
    print(splits.to_string(index=False, float_format="{:.4g}".format))


@bench.callback(invoke_without_command=True)
def bench_all(
    context: Context,
    quick: Annotated[bool, Option("--quick", help="Few and small: does it work?")] = False,
) -> None:
    """Both stages and evaluation beside the released loop; writes results/bench/MACHINE.json."""
    from lavic_utils.bench.speed import bench as measure

    if context.invoked_subcommand is None:
        print(measure(quick))


@bench.command("gpu")
def bench_gpu(profile: Profile = "paper") -> None:
    """Seconds and peak memory on this card of a profile's true model with random weights."""
    from lavic_utils.bench.card import bench_gpu as measure

    print(measure(profile))


@app.command()
def demo(
    profile: Profile = "mini",
    folder: Data = None,
    seed: Seed = None,
    host: Annotated[str, Option(help="0.0.0.0: for whoever reaches this machine.")] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535)] = 7860,
) -> None:
    """Serve a page to try the trained models. Trains what is missing, and says so."""
    from lavic_utils.demo.page import serve

    _refuse(profile, "LaViC")
    serve(profile, seed, folder, host, port)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    show_progress()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # in a shell of ASCII a dash becomes "?"
    try:
        code = app(args=arguments, prog_name="lavic", standalone_mode=False) or 0
        if code == 130:  # typer has taken the interrupt
            raise KeyboardInterrupt
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Abort):
        print("stopped; the same command continues from here", file=sys.stderr)
        return 130
    except Exception as error:
        said = f"{error.format_message()} (see --help)" if hasattr(error, "format_message") else ""
        if getattr(error, "errno", None) or "(os error " in str(error):  # libraries in Rust
            said = f"{error}; free or name another place, and run the same command again"
        if "inline_container" in str(error):  # torch's writer of checkpoints gives no number
            said = "a checkpoint cannot be written whole; make room, and run the same command again"
        if not said:
            raise
        print(f"error: {' '.join(said.split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
