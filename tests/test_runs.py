"""Keeping results, negative controls, and tables that say where a figure comes from."""

from __future__ import annotations

import json

import pytest
import torch

from lavic_utils import report, runs
from lavic_utils.config import UserError, load_profile
from lavic_utils.evaluation import score


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setenv("LAVIC_RESULTS", str(tmp_path))
    monkeypatch.setattr(runs.Run, "data_hash", "steady")
    return runs.Run("mini", 42)


def test_a_result_is_made_once_and_again_when_anything_that_can_change_it_changes(run, tmp_path):
    calls = []

    def make() -> dict:
        calls.append(1)
        return {"n": len(calls)}

    assert (
        run.kept(tmp_path / "a", make, stage="x")
        == run.kept(tmp_path / "a", make, stage="x")
        == {"n": 1}
    )
    other_seed = runs.Run("mini", 43)
    other_seed.__dict__["data_hash"] = "steady"
    assert other_seed.kept(tmp_path / "a", make, stage="x") == {"n": 2}
    assert run.kept(tmp_path / "a", make, stage="y") == {"n": 3}
    stored = json.loads((tmp_path / "a" / "result.json").read_text())
    assert {"code_hash", "data_hash", "seed", "versions", "machine", "time"} <= set(
        stored["provenance"]
    )


def test_a_killed_stage_leaves_nothing_that_counts(run, tmp_path):
    def killed() -> dict:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.kept(tmp_path / "a", killed, stage="x")
    assert not (tmp_path / "a" / "result.json").exists()
    assert run.kept(tmp_path / "a", lambda: {"n": 1}, stage="x") == {"n": 1}


def test_negative_controls_change_every_item():
    visual = {f"B00000000{i}": torch.full((3, 4), float(i + 1)) for i in range(7)}
    swapped, empty = runs.shuffled(visual), runs.zeroed(visual)
    assert all(not torch.equal(swapped[a], visual[a]) for a in visual)
    assert sorted(t[0, 0].item() for t in swapped.values()) == sorted(
        t[0, 0].item() for t in visual.values()
    )
    assert all(t.abs().sum() == 0 and t.shape == (3, 4) for t in empty.values())


def test_a_comparison_says_what_was_not_run():
    found = score(["B000000001"], [["B000000001"]], [["B000000001"]]).row("LaViC", "home", 42)
    metrics = {"provenance": {"tier": "mini run"}, "rows": [found]}
    table = report.comparison(metrics, "ablation")
    assert table.loc["LaViC", ("home", "mini run")].startswith("1.000 [")
    assert table.loc["LaViC", ("beauty", "mini run")] == "not run here"
    assert table.loc["LaViC", ("home", "published")] == "0.3197 / 0.989"
    assert table.loc["Entire tokens (5x577)", ("home", "published")] == "–"


def test_bad_profiles_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="mini, paper, t4"):
        load_profile("nano")
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: x\ntier: paper\n")
    with pytest.raises(UserError, match="field tier"):
        load_profile(str(bad))
