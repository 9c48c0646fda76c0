"""What the lessons show of prompts and targets is what the model is given."""

from __future__ import annotations

import pandas as pd
import pytest

from lavic_utils import lessons, recommendation
from lavic_utils.runs import Run


@pytest.fixture(scope="module")
def run():
    return Run("mini", 42)


@pytest.fixture(scope="module")
def example(run):
    dialogue = next(d for d in run.dialogues("home", "valid") if len(d.turns) > 2 and set(d.gt_items) & set(d.candidates_st))
    return recommendation.training_examples([dialogue], "candidates_st", 42)[0]


def test_each_part_of_a_prompt_decodes_to_its_own_text(run, example):
    import torch

    lengths = {a: 5 for a in example.candidates[:4]}  # so a candidate without a picture is there too
    prompter = run.prompter({a: torch.zeros(n, 128) for a, n in lengths.items()})
    ids, parts = prompter.prompt(example.dialogue, example.candidates).ids, lessons.prompt_parts(prompter, *_two(example))
    assert parts.count("[CLS]") == sum(lengths.values()) and set(parts) == set(lessons.PARTS)
    text = {part: "".join(prompter.tokenizer.decode([i for i, p in zip(ids, parts, strict=True) if p == part]).split())
            for part in lessons.PARTS}
    assert text["ids"] == "".join(example.candidates)
    assert text["titles"] == "".join(run.titles[a] for a in example.candidates).replace(" ", "")
    assert text["dialogue"] == "".join(f"{who.title()}:{said}".replace(" ", "") for who, said in example.dialogue.turns)


def _two(example):
    return example.dialogue, example.candidates


def test_a_shortened_prompt_is_refused(run, example):
    words = " ".join(["please"] * 600)
    long = example.dialogue.model_copy(update={"context": f"<submission>{words}</submission>"})
    with pytest.raises(ValueError, match=f"line {long.line}: the prompt was shortened"):
        lessons.prompt_parts(run.prompter(None), long, example.candidates)


def test_token_losses_add_up_to_the_training_loss(run, example):
    from lavic_utils.recommendation import Recommender, collator

    model, prompter = run.model(), run.prompter(None)
    losses, row = lessons.token_losses(model, prompter, [example])[0], prompter.row(example)
    loss = Recommender(model)(**collator(prompter)([row]))["loss"]
    assert sum(losses) / len(losses) == pytest.approx(loss.item(), abs=1e-4)
    assert len(losses) == len(prompter.answer(example.target))


def test_figures_draw_an_interval_for_every_row():
    rows = [{"domain": d, "LaViC less": m, "difference": 0.1, "low": -0.1, "high": 0.3} for m in ("LaViC w/o images", "BM25")
            for d in ("beauty", "fashion", "home")]
    axis = lessons.forest_figure(pd.DataFrame(rows)).axes[0]
    assert sum(len(line.get_xdata()) == 2 and list(line.get_xdata()) == [-0.1, 0.3] for line in axis.lines) == 6
    assert [label.get_text() for label in axis.get_yticklabels()] == ["beauty", "fashion", "home"] * 2
