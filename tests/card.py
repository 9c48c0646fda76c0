"""LaViC and the first notebooks on a machine's card (or its processor): a rehearsal without the 7B
weights. Not run by pytest.

    python tests/card.py rehearsal OUT.json   # both stages and answers of a stand-in checkpoint
    python tests/card.py notebooks OUT.json   # the code cells of notebooks 00 to 02, mini profile

Model and data are those of `stand_ins`. The profiles are `paper` and `t4` as they are, but for the
model's path and two epochs of stage 1. In float32, and without dropout, whose masks differ from one
device to another, the card is held against the processor."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = (
    "paper, half, card",
    "paper, float32, card",
    "paper, float32, processor",
    "t4, 4 bits, card",
)
NEEDS_SBERT = "world.make_world("  # its weights (90 MB) may not be there


# ---------------------------------------------------------------- one training and its answers
def rehearse(kind: str, place: Path) -> dict:
    """Stage 1, stage 2 and the answers to the test split, as `run LaViC --domain beauty` makes
    them."""
    import torch

    from lavic_utils import experiment, loading
    from lavic_utils.config import load_profile

    os.environ["LAVIC_RESULTS"] = str(place / f"results {kind}")
    name, precision, device = kind.split(", ")
    profile = load_profile(name)
    profile = profile.model_copy(
        update={
            "model": str(place / "model"),
            "revision": None,
            "distillation": profile.distillation.model_copy(update={"epochs": 2}),
        }
    )
    if precision == "float32":
        stages = {stage: getattr(profile, stage) for stage in ("distillation", "recommendation")}
        dry = {
            stage: s.model_copy(update={"lora": s.lora.model_copy(update={"dropout": 0.0})})
            for stage, s in stages.items()
        }
        profile = profile.model_copy(update={"dtype": "float32", **dry})
    if device == "processor" or not torch.cuda.is_available():
        profile = profile.model_copy(update={"quantize_4bit": False})
        torch.cuda.is_available = lambda: False
    run, start = (
        experiment.Experiment(profile, data_folder=place / "data").prepare(),
        time.monotonic(),
    )
    seconds = {}
    history = run.distil()["history"]
    seconds["stage 1"] = time.monotonic() - start
    log = run.tune("LaViC", "beauty")["log"]
    seconds["stage 2"] = time.monotonic() - start - seconds["stage 1"]
    rows = run.answers("LaViC", "beauty")
    seconds["answers"] = time.monotonic() - start - sum(seconds.values())
    return {
        "kind": kind,
        "device": str(loading.device()),
        "dtype": str(loading.dtype(profile)).removeprefix("torch."),
        "four_bits": profile.quantize_4bit,
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
        "stage 1": [[e["train_loss"], e["valid_loss"]] for e in history],
        "stage 2": [e["loss"] for e in log],
        "answers": [[r["response"], r["scored"], r["constrained"]] for r in rows],
        "log_likelihoods": [r["log_likelihoods"] for r in rows],
    }


def furthest(one, other) -> float:
    """Largest difference of two nested lists of numbers."""
    if isinstance(one, list):
        return max(furthest(a, b) for a, b in zip(one, other, strict=True))
    return abs(one - other)


def compared(card: dict, processor: dict) -> dict:
    """Float32 on the card against float32 on the processor."""
    pairs = list(zip(card["answers"], processor["answers"], strict=True))
    return {
        "stage 1 losses, largest difference": furthest(card["stage 1"], processor["stage 1"]),
        "stage 2 losses, largest difference": furthest(card["stage 2"], processor["stage 2"]),
        "log-likelihoods, largest difference": furthest(
            card["log_likelihoods"], processor["log_likelihoods"]
        ),
        "equal answers": sum(a[0] == b[0] for a, b in pairs),
        "equal choices by likelihood": sum(a[1] == b[1] for a, b in pairs),
        "of": len(pairs),
    }


def rehearsal(out: Path) -> dict:
    """Every kind in a process of its own, side by side; the file is written anew as each is
    done."""
    import stand_ins

    place = out.parent / "rehearsal"
    stand_ins.llava_next(place / "model")
    stand_ins.data_folder(place / "data")
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    }
    found, at_work = {"provenance": about(), "kinds": {}}, {}
    for kind in KINDS:
        log = (place / f"{kind}.log").open("w")
        command = [sys.executable, __file__, "one", str(place), kind]
        at_work[kind] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    while at_work:
        time.sleep(0.5)
        for kind in [k for k, process in at_work.items() if process.poll() is not None]:
            at_work.pop(kind)
            file = place / f"{kind}.json"
            found["kinds"][kind] = (
                json.loads(file.read_text())
                if file.is_file()
                else {"failed": (place / f"{kind}.log").read_text()[-3000:]}
            )
            both = [found["kinds"].get(k, {}) for k in KINDS[1:3]]
            if all("answers" in one for one in both):
                found["float32, card against processor"] = compared(*both)
            out.write_text(json.dumps(found, indent=1) + "\n")
    return {kind: one.get("failed", one.get("seconds")) for kind, one in found["kinds"].items()} | {
        k: v for k, v in found.items() if k.startswith("float32")
    }


# ---------------------------------------------------------------- notebooks
def notebooks(out: Path) -> dict:
    """The code cells of notebooks 00 to 02, each notebook in one namespace; a cell that fails is
    written down."""
    import matplotlib

    matplotlib.use("Agg")
    os.environ.setdefault("LAVIC_RESULTS", str(out.parent / "notebooks"))
    sbert, found = os.environ.get("LAVIC_NO_SBERT") != "1", {"provenance": about(), "notebooks": {}}
    for path in sorted((ROOT / "notebooks").glob("0[0-2]_*.ipynb")):
        start, space, failed, skipped, done = (
            time.monotonic(),
            {"__name__": "__main__", "display": lambda *_: None},
            [],
            [],
            0,
        )
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"], 1):
            text = re.sub(r"^(\s*)[!%].*$", r"\1pass", "".join(cell["source"]), flags=re.M)
            if cell["cell_type"] != "code":
                continue
            if NEEDS_SBERT in text and not sbert:
                skipped.append(number)
                continue
            try:
                exec(compile(text, f"{path.stem}, cell {number}", "exec"), space)
                done += 1
            except Exception:
                failed.append({"cell": number, "error": traceback.format_exc()[-1500:]})
            found["notebooks"][path.stem] = {
                "cells": done,
                "failed": failed,
                "skipped (SBERT's weights)": skipped,
                "seconds": round(time.monotonic() - start, 1),
            }
            out.write_text(json.dumps(found, indent=1) + "\n")
    return {
        name: one | {"failed": [f["cell"] for f in one["failed"]]}
        for name, one in found["notebooks"].items()
    }


def about() -> dict:
    """Card, driver, versions, code, date."""
    import torch

    from lavic_utils.config import load_profile
    from lavic_utils.provenance import provenance

    found = provenance(load_profile("paper"), 42, "none")  # card and driver are in its `machine`
    torches = {"torch": torch.__version__, "cuda": torch.version.cuda}
    return found | {"tier": "rehearsal", **torches}


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    what, where, *more = sys.argv[1:]
    if what == "one":
        result = rehearse(more[0], Path(where))
        (Path(where) / f"{more[0]}.json").write_text(json.dumps(result))
    else:
        print(
            json.dumps(
                {"rehearsal": rehearsal, "notebooks": notebooks}[what](Path(where).resolve()),
                indent=1,
            )
        )
