"""LaViC's two stages and answers against a plain reference of them, example by example, in float32
on the processor, at the true tile sizes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from reference import Lavic
from stand_ins import data_folder, llava_next

from lavic_utils import data, distillation, experiment, recommendation, training
from lavic_utils.config import load_profile


class Watched:
    """Batches and losses of a stage as it trains, and the adapter that it began with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fresh: dict[str, torch.Tensor] = {}
        self.steps: list[tuple[list[tuple[int, ...]], float]] = []  # rows of ids, loss
        add = training.add_adapter

        def adds(*given):
            tuned = add(*given)
            self.fresh.clear()
            self.steps.clear()
            for name, a in tuned.named_parameters():
                if "lora_A" in name:
                    layer = name.removeprefix("base_model.model.llava.")
                    self.fresh[layer.removesuffix(".lora_A.default.weight")] = a.detach().clone()
            return tuned

        monkeypatch.setattr(training, "add_adapter", adds)
        for stage in (distillation.Student, recommendation.Recommender):
            monkeypatch.setattr(stage, "forward", self.watching(stage.forward))

    def watching(self, forward):
        @functools.wraps(forward)  # the Trainer asks for its signature
        def watched(stage, input_ids, labels, attention_mask, *more, **named):
            out = forward(stage, input_ids, labels, attention_mask, *more, **named)
            if stage.training:
                pairs = zip(input_ids, attention_mask, strict=True)
                rows = [tuple(ids[mask == 1].tolist()) for ids, mask in pairs]
                self.steps.append((rows, out["loss"].item()))
            return out

        return watched

    def order(self, known: list[tuple[int, ...]]) -> tuple[list[list[int]], list[float]]:
        """The batches as indices of the reference's own rows: each row must be one of them."""
        return [[known.index(row) for row in rows] for rows, _ in self.steps], self.losses

    @property
    def losses(self) -> list[float]:
        return [loss for _, loss in self.steps]


def dry(profile, folder: Path):
    """The profile in float32, without dropout, whose masks a reference cannot know."""
    lora = profile.distillation.lora.model_copy(update={"dropout": 0.0})
    one = profile.distillation.model_copy(update={"lora": lora, "epochs": 2, "workers": 0})
    two = profile.recommendation.model_copy(update={"lora": lora})
    changed = {"model": str(folder), "revision": None, "dtype": "float32"}
    return profile.model_copy(update={**changed, "distillation": one, "recommendation": two})


def test_both_stages_and_the_answers_are_the_references(results, tmp_path, monkeypatch):
    llava_next(tmp_path / "model")
    data_folder(tmp_path / "data")
    profile = dry(load_profile("paper"), tmp_path / "model")
    watched = Watched(monkeypatch)
    run = experiment.Experiment(profile, data_folder=tmp_path / "data").prepare()
    plain = Lavic(tmp_path / "model", profile.model_dump())

    # Stage 1: the same rows, the same loss at every step, the same epoch kept
    history = run.distil()["history"]
    train, valid = run.taught("train"), run.taught("valid")
    assert len(train) > 12 and {len(plain.cls(data.open_image(p.path))) for p in train} == {3, 5}
    rows = [(data.open_image(p.path), p.title, p.description) for p in train]
    unseen = [(data.open_image(p.path), p.title, p.description) for p in valid]
    known = []
    for image, title, said in rows:
        prompt, target = plain.description(title, len(plain.cls(image)), said)
        known.append(tuple(prompt + target))
    batches, losses = watched.order(known)
    half = len(batches) // 2
    assert sorted(i for batch in batches[:half] for i in batch) == sorted(map(known.index, known))
    found, means = plain.distil(rows, unseen, [batches[:half], batches[half:]], watched.fresh)
    assert found == pytest.approx(losses, abs=1e-5)
    assert means == pytest.approx([one["valid_loss"] for one in history], abs=1e-5)
    assert found != pytest.approx(losses[::-1], abs=1e-5)  # negative control: another order

    # Stage 2: an example a step
    examples = recommendation.training_examples(
        run.dialogues("beauty", "train"), profile.candidates, run.seed
    )
    tune = run.tune("LaViC", "beauty")
    named = {a for e in examples for a in e.candidates}
    named |= {a for d in run.dialogues("beauty", "test") for a in d.candidates_st}
    images = {a: data.open_image(data.image_file(run.root, a)) for a in sorted(named)}
    visual = plain.look({a: image for a, image in images.items() if image is not None})
    assert 0 < len(visual) < len(named)  # some items are shown by their titles alone

    def items(ids) -> list[tuple[str, str]]:
        return [(a, run.titles[a]) for a in ids]

    rows = [(e.dialogue.turns, items(e.candidates), e.target) for e in examples]
    known = []
    for turns, ten, right in rows:
        known.append(tuple(plain.request(turns, ten, visual) + plain.end(right)))
    batches, losses = watched.order(known)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    assert tune["cut"]["prompts"]  # a dialogue too long for the prompt is among them
    found = plain.recommend(rows, visual, batches, watched.fresh)
    assert found == pytest.approx(losses, abs=1e-5)

    # Answers: what it writes, and every candidate's likelihood
    for dialogue, row in zip(
        run.dialogues("beauty", "test"), run.answers("LaViC", "beauty"), strict=True
    ):
        said, means = plain.answer(dialogue.turns, items(dialogue.candidates_st), visual)
        assert said == row["response"]
        assert means == pytest.approx(row["log_likelihoods"], abs=5e-5)
        best = max(range(10), key=means.__getitem__)
        assert dialogue.candidates_st[best] == row["scored"]
