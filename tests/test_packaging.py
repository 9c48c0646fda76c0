"""Staleness: lock, environment.yml, README and committed notebooks are what the sources make."""

from __future__ import annotations

import pytest
from packaging.utils import canonicalize_name

from lavic_utils.config import ROOT, UserError
from lavic_utils.repro import environment as packaging
from lavic_utils.repro import notebooks

TABLE = packaging.project()
PINS = packaging.read_lock((ROOT / "requirements.lock").read_text(encoding="utf-8"))


def test_lock_and_environment_are_up_to_date():
    assert packaging.check_environment() == []


def test_each_fault_of_the_lock_is_found():
    names = {canonicalize_name(r.name) for r in packaging.requirements(TABLE)}
    assert {"torch", "papermill", "pytest"} <= names <= set(PINS)
    without = {
        name: version for name, version in PINS.items() if name not in {"papermill", "nbclient"}
    }
    problems = packaging.lock_problems(TABLE, without)
    assert any("papermill (needed by pyproject.toml)" in p for p in problems)
    assert any("nbclient (needed by" in p for p in problems)
    assert (
        "transformers==4.0.0 is not"
        in packaging.lock_problems(TABLE, {**PINS, "transformers": "4.0.0"})[0]
    )


@pytest.mark.parametrize(
    "line", ["torch>=2", "torch==2.13.0+cpu", "x @ file:///a/x.whl", "-e .", "torch"]
)
def test_lock_takes_exact_public_pins_only(line):
    with pytest.raises(UserError, match="requirements.lock line 2"):
        packaging.read_lock(f"a==1\n{line}\n")


def test_lock_text_drops_local_labels_and_the_project_itself():
    text = packaging.lock_text(
        [("torch", "2.13.0+cpu"), ("lavic-companion", "0.1.0"), ("Bm25s", "1"), ("pip", "1")]
    )
    assert text == packaging.HEAD + "bm25s==1\ntorch==2.13.0\n"


def test_stale_environment_file_is_found(tmp_path):
    for name in ("pyproject.toml", "requirements.lock"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    assert packaging.check_environment(tmp_path) == [
        "environment.yml: not up to date; run `python -m lavic_utils environment`"
    ]
    packaging.write_environment(tmp_path)
    assert packaging.check_environment(tmp_path) == []


def test_committed_notebooks_are_executed_and_current():
    assert notebooks.check() == []


def test_readme_tables_are_current():
    from lavic_utils.repro.readme import update_readme

    assert update_readme(check=True) == []
