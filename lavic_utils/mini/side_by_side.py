"""Several arms at once where there is no card: each in a process of its own, with one thread.

The mini model's steps are so small that two threads do them in two thirds of one thread's time,
not in half of it; two processes of one thread each lose nothing. Stage 2 and the answers do not
depend on the number of threads, to the bit; [CLS] do, in the sixth digit, so all visual tokens are
made here first.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from lavic_utils import methods
from lavic_utils.config import DOMAINS
from lavic_utils.data import SPLITS
from lavic_utils.experiment import Experiment
from lavic_utils.keeping import RESULT
from lavic_utils.provenance import write_json

MOST = 4  # processes, of some 1.2 GB each
ARM = """import sys; from lavic_utils.experiment import Experiment
Experiment(sys.argv[1], int(sys.argv[2])).prepare().answers(*sys.argv[3:])"""


def answer(run: Experiment, names: Iterable[str], domains: Iterable[str] = DOMAINS) -> None:
    """Train these methods and let them answer the test dialogues, as `run.answers` would, which
    then finds them kept. It is left to the caller on a card or a single core, at 7B, with data of
    one's own, where all is to be made anew, and where an arm fails here."""
    workers = min(MOST, torch.get_num_threads())
    alone = run.data_folder or run.force or run.processes > 1 or torch.cuda.is_available()
    if alone or not run.profile.world or workers < 2:
        return
    arms = [arm for arm in itertools.product(names, domains) if not _kept(run, *arm)]
    for name, split in itertools.product({name for name, _ in arms}, SPLITS):
        methods.find(name).visual(run, split)
    one_thread, running = {**os.environ, "OMP_NUM_THREADS": "1"}, []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile.yaml"  # JSON is YAML, too
        write_json(profile, run.profile.model_dump(mode="json"))
        command = [sys.executable, "-c", ARM, str(profile), str(run.seed)]
        try:
            while arms or running:
                if arms and len(running) < workers:
                    one = [*command, *arms.pop(0)]
                    running.append(subprocess.Popen(one, env=one_thread, **quiet))
                running = [process for process in running if process.poll() is None]
                time.sleep(0.1)
        finally:
            for process in running:  # interrupted: what they have kept so far stays
                process.terminate()


def _kept(run: Experiment, name: str, domain: str) -> bool:
    return (run.tuned_folder(name, domain) / RESULT).is_file()
