"""LaViC, a companion of the KDD 2025 paper: adapting large vision-language models to
visually-aware conversational recommendation.

    import lavic_utils as lavic

    run = lavic.Experiment("mini").prepare()  # what one profile and seed reads, and its results
    run.distil()                              # stage 1: [CLS] tokens that the language model reads
    run.tune("LaViC", "beauty")               # stage 2: answer a dialogue with one candidate's id
    run.score("LaViC", "beauty")              # HR@1 and VR on the test dialogues

The same, step by step and without anything kept: `cls_tokens`, `full_tokens`, `describe`, `distil`
(stage 1), `fine_tune` (stage 2), `score`, `comparison` (the paper's tables beside ours). For a
request of your own: `recommend(dialogue, candidates)`.

The package reads from top to bottom, each file importing only files before it: config, provenance,
hub, loading, data, vision, store, prompts, callbacks, training, distillation, recommendation,
evaluation, retrieval, ranking, methods, keeping, experiment, report. Rooms beside it hold what is
not the method: mini (a rendered world and its model), audit (files, answers, published figures),
remote (what comes over a network), bench (measuring), figures (plots), demo (a page, and requests
of your own), repro (to run it all again).
"""

import importlib.util
import os
import sys

# OpenMP's threads spin while they wait for one another. Where another process is busy that makes a
# step ten times as long: there they sleep, which on an idle machine would cost a third. Chosen anew
# for each process, before torch comes; results do not depend on it.
_IDLE, _BUSY = "10000", "1"
_ours = os.environ.get("GOMP_SPINCOUNT", _IDLE) in (_IDLE, _BUSY)  # or another's: not the user's
_ours &= "OMP_WAIT_POLICY" not in os.environ and "torch" not in sys.modules
if _ours and importlib.util.find_spec("psutil"):  # without packages the command line says so
    psutil = importlib.import_module("psutil")
    _cores = psutil.cpu_percent(0.2) / 100 * psutil.cpu_count()  # that work now; we sleep meanwhile
    os.environ["GOMP_SPINCOUNT"] = _BUSY if _cores > 0.5 else _IDLE

_PLACES = {
    "load_profile": "config",
    "UserError": "config",
    "cls_tokens": "vision",
    "full_tokens": "vision",
    "describe": "distillation",
    "distil": "distillation",
    "fine_tune": "recommendation",
    "score": "evaluation",
    "Experiment": "experiment",
    "recommend": "demo.ask",
    "comparison": "report",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> object:
    """Names are imported when they are asked for: the command line starts without torch."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
