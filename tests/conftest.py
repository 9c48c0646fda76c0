"""Shared by all tests: offline, no folder of the user's, and a tiny valid profile."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

TINY = """
name: tiny
tier: mini run
model: none
seed: 5
prompts: {describe: "{title}{image}", recommend: "{dialogue}{candidates}", answer: "{id}",
  candidate: "{id}{title}{image}", candidate_without_image: "{id}{title}", seeker: "{text}",
  helper: "{text}"}
distillation: {learning_rate: 0.1, epochs: 1, batch_size: 1, max_length: 32, max_new_tokens: 8,
  training_items_only: true}
recommendation: {learning_rate: 0.1, epochs: 1, batch_size: 1, max_length: 32, max_new_tokens: 8,
  eval_batch_size: 1}
"""


@pytest.fixture(autouse=True)
def own_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the committed figures: `notebooks execute` sets this for its process."""
    monkeypatch.setenv("LAVIC_COMMIT", "0")


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch):
    """What a command sets for its process (whom no proxy serves, how far a stage is said to be)
    is undone after each test."""
    monkeypatch.delenv("no_proxy", raising=False)
    level = logging.getLogger("lavic_utils").level
    yield
    logging.getLogger("lavic_utils").setLevel(level)


@pytest.fixture
def full_disk():
    """`with full_disk(BYTES)`: no file can grow beyond them, as where a disk has no more room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextmanager
    def full(left: int) -> Iterator[None]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return full


@pytest.fixture
def tiny_profile(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return path


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """LAVIC_RESULTS in a temporary folder, real data unset; the folder of the tiny profile's
    results."""
    monkeypatch.setenv("LAVIC_RESULTS", str(tmp_path / "results"))
    for name in ("LAVIC_DATA", "LAVIC_REPLICATIONS", "LAVIC_WORLD"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "results" / "tiny"


@pytest.fixture(scope="module")
def processor():
    """The mini model's own processor."""
    from lavic_utils.mini import model as minimodel

    return minimodel.build_processor()


@pytest.fixture
def model(processor):
    """A model of the mini architecture with random weights."""
    from lavic_utils.mini import model as minimodel

    return minimodel.build_model(processor, seed=1).eval().requires_grad_(False)
