"""`make bench`: every speed of this project beside the direct way, in one file a machine and one figure.

Here also: the image download against a local server that answers 100 ms late, as a distant one would.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from lavic_utils.config import ROOT, UserError, load_profile, results_dir
from lavic_utils.data import profile_data_hash
from lavic_utils.provenance import provenance, save_figure, write_json
from lavic_utils.remote.crawl import Settings, crawl

LATENCY = 0.1  # seconds
RATIOS = {
    "stage2_training": "stage 2 training",
    "evaluation": "evaluation",
    "stage1_training": "stage 1 training",
    "crawl": "image download",
}
PARTS = (*RATIOS, "store", "work", "growth", "reproduce")
FULL = {
    "count": 240,
    "rounds": 5,
    "crawl": (20, 600),
    "encoded": 1000,
    "candidates": (10, 20, 50, 100),
    "words": (50, 200, 800, 3200),
    "catalogues": (1_000, 10_000, 100_000),
}
QUICK = {
    "count": 6,
    "rounds": 2,
    "crawl": (2, 32),
    "encoded": 16,
    "candidates": (10, 20),
    "words": (50, 200),
    "catalogues": (100, 1_000),
}


def _picture() -> bytes:
    held = io.BytesIO()
    Image.effect_noise((500, 500), 8).convert("RGB").save(
        held, "JPEG"
    )  # about 40 kB, as product images have
    return held.getvalue()


@contextmanager
def late_server(body: bytes, latency: float = LATENCY) -> Iterator[str]:
    """Address of an HTTP/1.1 server in a thread that answers every request with `body` after `latency` seconds."""
    answer = (
        b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(body)
        + body
    )

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(latency)
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(serve, "127.0.0.1", 0, backlog=512)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def _seconds(address: str, images: int, concurrency: int) -> float:
    """Wall time of one whole crawl (asking, decoding, manifest) into an empty folder; all images must arrive."""
    with tempfile.TemporaryDirectory() as folder:
        items = {
            f"B0BENCH{i:04d}": {"title": "", "images": [{"large": f"{address}/{i}.jpg"}]}
            for i in range(images)
        }
        (Path(folder) / "item2meta_train.json").write_text(json.dumps(items), encoding="utf-8")
        start = time.perf_counter()
        counts = crawl(Path(folder), settings=Settings(concurrency=concurrency))
        seconds = time.perf_counter() - start
    if counts["ok"] != images:
        raise RuntimeError(f"only {counts['ok']} of {images} images arrived: nothing was measured")
    return seconds


def crawl_speed(one: int = 30, many: int = 600, concurrency: int = 32) -> dict[str, Any]:
    """Images a second with one request at a time and with `concurrency`, by the same code in one run, and their ratio."""
    body = _picture()
    with late_server(body) as address:
        slow, fast = one / _seconds(address, one, 1), many / _seconds(address, many, concurrency)
    return {
        "latency_ms": round(1000 * LATENCY),
        "bytes_per_image": len(body),
        "concurrency": concurrency,
        "one_at_a_time": {"images": one, "per_second": round(slow, 2)},
        "concurrent": {"images": many, "per_second": round(fast, 2)},
        "ratio": round(fast / slow, 2),
    }


# ---------------------------------------------------------------- all parts
def downloads(one: int, many: int, rounds: int) -> dict[str, Any]:
    """`crawl_speed` in the shape of the other ratios: one image at a time beside many at once, in turn."""
    from lavic_utils.bench.stages import spread

    found = [crawl_speed(one, many) for _ in range(rounds)]
    sides = {"direct": "one_at_a_time", "ours": "concurrent"}
    return {
        "unit": "images a second",
        "latency_ms": round(1000 * LATENCY),
        "ratio": spread([f["ratio"] for f in found]),
        "a_second": {
            side: spread([f[name]["per_second"] for f in found]) for side, name in sides.items()
        },
        "units": {side: found[0][name]["images"] for side, name in sides.items()},
    }


def reproduced(name: str) -> dict[str, Any] | None:
    """Seconds of `make reproduce` by notebook, from its record, and of the same command once everything is up to date
    (None where something is not). None where nothing was run here."""
    from lavic_utils.repro import notebooks
    from lavic_utils.repro.driver import plan, read_run

    profile = load_profile(name)
    records = read_run(results_dir(profile) / f"seed{profile.seed}")
    if not records:
        return None
    seconds, again = {stem: record["seconds"] for stem, record in records.items()}, None
    jobs = plan(profile, name, [profile.seed], notebooks.NOTEBOOKS)
    if all(job.unchanged(results_dir(profile)) for job in jobs):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "lavic_utils", "reproduce", "--profile", name],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        again = round(time.perf_counter() - start, 1)
    return {
        "seconds": seconds,
        "total_seconds": round(sum(seconds.values()), 1),
        "up_to_date_seconds": again,
    }


def machine_name(machine: Mapping[str, Any]) -> str:
    """Processor and cores, or the card: a file name that names no host."""
    import torch

    text = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{machine['processor']} {machine['cores']} cores"
    )
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def bench(
    quick: bool = False, only: str | None = None, name: str = "mini"
) -> Path | dict[str, Any]:
    """Measure everything; the path of `results/bench/MACHINE.json` (quick: `results/bench-quick/`), its figure beside.

    With `only`, that part alone, written nowhere: a file never mixes two states of the code.
    """
    if only is not None and only not in PARTS:
        raise UserError(f"--only {only}: no such part; use one of {', '.join(PARTS)}")
    import torch

    from lavic_utils.bench.growth import growth
    from lavic_utils.bench.stages import Bench
    from lavic_utils.experiment import Experiment

    size, run = QUICK if quick else FULL, Experiment(name).prepare()
    measured, wanted = Bench(run, size["count"], size["rounds"]), [only] if only else PARTS
    figures: dict[str, Any] = {"equality": measured.equal()}
    work = {
        **{part: getattr(measured, part) for part in RATIOS if part != "crawl"},
        "crawl": lambda: downloads(*size["crawl"], size["rounds"]),
        "store": lambda: measured.store(figures, size["encoded"]),
        "work": measured.work,
        "growth": lambda: growth(measured, size["candidates"], size["words"], size["catalogues"]),
        "reproduce": lambda: reproduced(name),
    }
    for part in wanted:
        figures[part] = work[part]()
        ratio = (figures[part] or {}).get("ratio")
        print(
            f"{part}: {ratio['median']} times ({ratio['low']} to {ratio['high']})"
            if ratio
            else f"{part}: measured",
            file=sys.stderr,
            flush=True,
        )
    about = provenance(run.profile, run.seed, profile_data_hash(run.profile)) | {
        "quick": quick,
        "rounds": size["rounds"],
        "threads": torch.get_num_threads(),
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    found = {
        "provenance": about,
        "ratios": {part: figures[part]["ratio"]["median"] for part in RATIOS if part in figures},
        "figures": figures,
    }
    if only:
        return found
    for part in set(RATIOS) & set(
        figures["work"]
    ):  # what would be left to gain in float32 with the same arithmetic
        share = figures["work"][part]["share"]["float32"]
        figures[part]["ratio_at_full_rate"] = float(
            f"{figures[part]['ratio']['median'] / share:.4g}"
        )
    results = Path(os.environ.get("LAVIC_RESULTS", ROOT / "results"))
    path = (
        results / ("bench-quick" if quick else "bench") / f"{machine_name(about['machine'])}.json"
    )
    write_json(path, found)
    draw(found, path.with_suffix(".png"))
    return path


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Ratios with their goals; time and memory against candidates; the store against the catalogue's size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from lavic_utils.figures import style

    style.use()
    figures, growth = found["figures"], found["figures"]["growth"]
    fig, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    ratios = [figures[part]["ratio"] for part in RATIOS]
    medians = [ratio["median"] for ratio in ratios]
    a.barh(
        list(RATIOS.values()),
        medians,
        color=style.BLUE,
        xerr=[
            [m - r["low"] for m, r in zip(medians, ratios, strict=True)],
            [r["high"] - m for m, r in zip(medians, ratios, strict=True)],
        ],
    )
    goals = [
        (row, figures[part]["goal"]) for row, part in enumerate(RATIOS) if "goal" in figures[part]
    ]
    a.scatter(
        [goal for _, goal in goals],
        [row for row, _ in goals],
        marker="|",
        s=300,
        color="black",
        label="goal",
        zorder=3,
    )
    a.axvline(1, color="0.6", linewidth=0.8)
    a.invert_yaxis()
    a.set(title="Ours over the direct way (median, range of runs)", xlabel="times", xscale="log")
    a.legend()
    for name, label in (("candidates_cls", "[CLS] tokens"), ("candidates_entire", "entire tokens")):
        across = [row["candidates"] for row in growth[name]]
        b.plot(
            across,
            [row["training_seconds"]["median"] for row in growth[name]],
            "o-",
            label=f"{label}, training step",
        )
        b.plot(
            across,
            [row["answer_seconds"]["median"] for row in growth[name]],
            "s--",
            label=f"{label}, answer",
        )
        c.plot(across, [row["training_peak_mib"] for row in growth[name]], "o-", label=label)
    b.set(title="Seconds a dialogue", xlabel="candidates", xscale="log", yscale="log")
    c.set(
        title="Peak memory of a training step (MiB)",
        xlabel="candidates",
        xscale="log",
        yscale="log",
    )
    for name, label in (
        ("load_seconds", "load whole"),
        ("open_seconds", "open"),
        ("lookup_ten_seconds", "look up ten items"),
    ):
        d.plot(
            [row["items"] for row in growth["catalogue"]],
            [row[name]["median"] for row in growth["catalogue"]],
            "o-",
            label=label,
        )
    d.set(
        title="Store of [CLS] vectors (seconds)",
        xlabel="items in the catalogue",
        xscale="log",
        yscale="log",
    )
    for axes in (b, c, d):
        axes.legend(fontsize=7)
    times = ", ".join(f"{name} {m:.1f}" for name, m in zip(RATIOS.values(), medians, strict=True))
    alt = f"Times as fast as the direct way: {times}; and how time, memory and the store grow with candidates and catalogue."
    save_figure(fig, path, found["provenance"]["tier"], found["provenance"] | {"alt": alt})
    plt.close(fig)


def speed_block(path: Path) -> str:
    """The README's lines on speed, in Markdown, from a file that `bench` wrote."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    about, figures, lines = found["provenance"], found["figures"], []
    for part, label in RATIOS.items():
        figure = figures[part]
        ratio, goal = figure["ratio"], f"{figure['goal']}" if "goal" in figure else "–"
        sides = " | ".join(
            f"{figure['a_second'][side]['median']:.3g}" for side in ("direct", "ours")
        )
        lines.append(
            f"| {label}, {figure['unit']} | {sides} | {ratio['median']:.3g} ({ratio['low']:.3g} to "
            f"{ratio['high']:.3g}) | {goal} |"
        )
    machine, store, versions = about["machine"], figures["store"], about["versions"]
    where = about["card"] or f"{machine['processor']}, {machine['cores']} cores"
    paid = store["test"]["break_even_dialogues"]
    return "\n".join(
        [
            "| | direct way | ours | times (range) | goal |",
            "| --- | --- | --- | --- | --- |",
            *lines,
            "",
            f"Encoding an item's image once: {store['items_a_second']['median']:.3g} items a second; with that counted in, "
            f"stage 2 training is {store['train']['ratio_with_encoding']:.3g} times and evaluation "
            f"{store['test']['ratio_with_encoding']:.3g} times as fast"
            + (f"; it has paid for itself after {paid} dialogues of evaluation." if paid else "."),
            "Were ours to run at this machine's full float32 matrix-product rate, the ratios would be "
            + ", ".join(f"{figures[part]['ratio_at_full_rate']:.3g}" for part in list(RATIOS)[:3])
            + " in the order above.",
            f"Medians of {about['rounds']} interleaved runs with equal losses and answers on both sides; download: server with "
            f"{figures['crawl']['latency_ms']} ms latency.",
            f"*{about['tier']}, profile {about['profile']}, {where}; torch {versions['torch']}, transformers "
            f"{versions['transformers']}; code {about['code_hash'][:7]}.*",
            "",
        ]
    )
