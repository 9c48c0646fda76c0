"""What the figures make of real data's text."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lavic_utils import data, figures
from lavic_utils.config import load_profile
from lavic_utils.figures import schemes

PRICES = "from $30^{ to $40"  # as mathematics it does not even parse


@pytest.fixture
def run(tmp_path):
    ids = [f"B00000000{k}" for k in range(10)]
    row = {"context": f"<submission>{PRICES}, please.</submission>", "context_items": []}
    row |= {"gt": "This one.", "gt_items": ids[:1]}
    row |= {"candidates_st": ids, "candidates_gpt_large": ids}
    dialogue = data.Dialogue(domain="home", split="test", line=1, **row)
    about = {
        "root": tmp_path,
        "profile": load_profile("paper"),
        "titles": dict.fromkeys(ids, PRICES),
    }
    return SimpleNamespace(dialogue=dialogue, **about)


def test_dollar_signs_of_the_data_are_no_mathematics(run):
    answer = {"recommended": "", "probabilities": [0.1] * 10}
    drawn = (
        figures.task_figure(run, run.dialogue),
        figures.case_figure(run, run.dialogue, {"LaViC": answer}),
        schemes.framework_figure(None, [], (2885, 5), PRICES, "B000000000"),
    )
    for fig in drawn:
        assert figures.shown(fig, "alternative text").png
    fig = drawn[0]  # negative control: matplotlib's own way with the same words
    fig.text(0, 0, PRICES)
    with pytest.raises(ValueError):
        figures.shown(fig, "alternative text")
