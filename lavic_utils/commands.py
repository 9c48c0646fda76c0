"""The sub-commands `data` and `bench` of the command line, and `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

data = typer.Typer(
    help="The published data: fetch, crawl the images, verify, stats.", no_args_is_help=True
)
bench = typer.Typer(help="Speed on this machine beside the direct way, as JSON.")
DataOption = Annotated[
    Path | None, typer.Option("--data", help="Default: LAVIC_DATA, else data/reddit-amazon.")
]


@data.command("fetch")
def fetch_files(
    to: Annotated[
        Path | None, typer.Option(help="Default: LAVIC_DATA, else data/reddit-amazon.")
    ] = None,
) -> None:
    """Download the authors' files and verify each; goes on where it was broken off."""
    from lavic_utils.remote.download import data_dir, fetch

    folder = data_dir(to)
    print(fetch(folder))
    print(f"next: export LAVIC_DATA='{folder.resolve()}', then python -m lavic_utils data crawl")


@data.command("crawl")
def crawl_images(
    folder: DataOption = None,
    first_only: Annotated[
        bool, typer.Option("--first-only", help="Of train_images only ASIN_0.jpg.")
    ] = False,
    concurrency: Annotated[
        int, typer.Option(min=1, max=256, help="Images asked for at once.")
    ] = 32,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again for what failed for good.")
    ] = False,
) -> None:
    """Download the product images; goes on where it was broken off. Exit 1: some were not reached, run it again."""
    from lavic_utils.remote.crawl import Settings, crawl, summary
    from lavic_utils.remote.download import data_dir

    counts = crawl(data_dir(folder), first_only, retry_failed, Settings(concurrency=concurrency))
    print(summary(counts))
    raise typer.Exit(1 if counts["unreached"] else 0)


@data.command("verify")
def verify_files(folder: DataOption = None) -> None:
    """Say what is there, missing or corrupt and what that touches. Exit 1: a wrong file or a corrupt image."""
    from lavic_utils.remote.download import data_dir, verify

    lines, right = verify(data_dir(folder))
    print("\n".join(lines))
    raise typer.Exit(0 if right else 1)


@data.command("stats")
def stats(
    folder: DataOption = None,
    lenient: Annotated[
        bool,
        typer.Option("--lenient", help="Set bad rows aside and report them; else they stop it."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
) -> None:
    """Table 1 of the paper beside the files here, and counts, lengths and recall of each."""
    import json

    import pandas as pd

    from lavic_utils.audit.inspection import table_1
    from lavic_utils.evaluation import real_data_summary
    from lavic_utils.remote.download import data_dir
    from lavic_utils.rows import set_aside_report

    root, bad = data_dir(folder), [] if lenient else None
    splits = real_data_summary(root, bad)
    table = table_1(root, None if bad is None else [])  # the same rows again: reported once
    if as_json:
        found = {"table_1": json.loads(table.to_json(orient="records")), "splits": splits}
        print(
            json.dumps(
                found if bad is None else {**found, "set_aside": set_aside_report(bad)}, indent=1
            )
        )
        return
    print(table.set_index("domain").T.astype(object).fillna("no catalogue").to_string(), end="\n\n")
    print(pd.DataFrame(splits).to_string(index=False, float_format="{:.4g}".format))
    if bad is not None:
        report = set_aside_report(bad)
        lines = [
            f"{one['rows']:6} {one['file']}: {one['kind']}, field {one['field']}"
            for one in report["counts"]
        ]
        lines += [
            f"{one['file']}, line {one['line']}: field {one['field']}: {one['problem']}"
            for one in bad
        ]
        print(f"\nset aside: {report['rows']} rows", *lines, sep="\n")


@bench.command("gpu")
def bench_card(
    profile: Annotated[
        str, typer.Option("--profile", help="Name of a profile, or a path to a YAML file.")
    ] = "paper",
    tiny: Annotated[
        bool,
        typer.Option("--tiny", help="The mini model, here: does it work? Written to bench-quick."),
    ] = False,
) -> None:
    """Seconds and peak memory on this card of a profile's true model with random weights."""
    from lavic_utils.bench.card import bench_gpu

    print(bench_gpu(profile, tiny))


@bench.callback(invoke_without_command=True)
def bench_all(
    context: typer.Context,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few and small: does it work? Written to bench-quick.")
    ] = False,
) -> None:
    """Both stages and evaluation beside the direct way; writes results/bench/MACHINE.json."""
    from lavic_utils.bench.speed import bench as measure

    if context.invoked_subcommand is None:
        print(measure(quick))


def demo(
    profile: Annotated[
        str, typer.Option("--profile", help="Name of a profile, or a path to a YAML file.")
    ] = "mini",
    folder: Annotated[
        Path | None,
        typer.Option("--data", help="Your own catalogue and dialogues, in the data's layout."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Default: the profile's.")] = None,
    host: Annotated[
        str, typer.Option(help="0.0.0.0: whoever reaches this machine may use the page.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
) -> None:
    """Serve a page to try the trained models: requests, pictures, likelihoods. Trains what is missing, and says so."""
    from lavic_utils.config import UserError
    from lavic_utils.demo.page import serve

    if folder and not folder.is_dir():
        raise UserError(
            f"--data {folder}: no such folder; give one in the layout of the published data"
        )
    serve(profile, seed, folder, host, port)
