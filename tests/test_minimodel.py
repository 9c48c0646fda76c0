"""The mini model: an ordinary checkpoint that does what its card says, and a recipe that resumes to the same weights."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, LlavaNextForConditionalGeneration

from lavic_utils import vision
from lavic_utils.config import PACKAGE, load_profile
from lavic_utils.evaluation import parse_answer
from lavic_utils.mini import model as minimodel
from lavic_utils.mini import recipe as pretraining
from lavic_utils.mini import words as w

FOLDER = PACKAGE / "mini_model"


@pytest.fixture(scope="module")
def tokenizer():
    return minimodel.build_tokenizer()


def test_ids_are_three_tokens_and_read_back(tokenizer):
    for chunk in w.ID_CHUNKS[:50]:
        asin = f"B0{chunk}{w.ID_CHUNKS[7]}"
        tokens = tokenizer(f" {asin}", add_special_tokens=False).input_ids
        assert len(tokens) == 3 and parse_answer(tokenizer.decode(tokens)) == asin


def test_every_attribute_word_is_known_and_another_is_not(tokenizer):
    for words in (
        *w.ATTRIBUTES.values(),
        w.PARTS,
        w.PARTS.values(),
        *w.FEATURES.values(),
        *w.BRANDS.values(),
    ):
        assert tokenizer.unk_token_id not in tokenizer(" ".join(words)).input_ids
    assert tokenizer.unk_token_id in tokenizer("zeppelin").input_ids


def test_checkpoint_is_an_ordinary_small_llava_next():
    model, info = LlavaNextForConditionalGeneration.from_pretrained(
        FOLDER, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (
        AutoTokenizer.from_pretrained(FOLDER).get_vocab() == minimodel.build_tokenizer().get_vocab()
    )
    assert (
        sum(p.stat().st_size for p in FOLDER.iterdir()) < 20e6
        and model.config.vision_feature_layer == -2
    )
    assert not list(FOLDER.glob("*.bin")) and not list(FOLDER.glob("*.py"))


def test_copies_a_written_choice_and_follows_the_request():
    """Zero-shot by text: with looks written, the answer fits the request; with another problem's request it does not."""
    profile = load_profile("mini")
    model, tokenizer = vision.load_model(profile), vision.load_processor(profile).tokenizer
    encode, rng = pretraining.Encoder(tokenizer).encode, random.Random(1)
    problems = [pretraining.sample_problem(rng, 5, "text") for _ in range(20)]

    def fits(problem, request) -> bool:
        row = pretraining.problem_row(
            replace(problem, request=request), encode, [], random.Random(2), tokenizer
        )
        prompt = torch.tensor(
            [
                [
                    i
                    for i, label in zip(row.ids, row.labels, strict=True)
                    if label == pretraining.IGNORE
                ]
            ]
        )
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False
        )
        said, names = (
            parse_answer(tokenizer.decode(out[0, prompt.shape[1] :])),
            [t.asin for t in problem.candidates],
        )
        return said in names and problem.matches[names.index(said)]

    assert sum(fits(problem, problem.request) for problem in problems) >= 14
    others = problems[1:] + problems[:1]
    assert (
        sum(fits(problem, other.request) for problem, other in zip(problems, others, strict=True))
        <= 10
    )


def test_a_killed_phase_resumes_to_the_same_weights(tmp_path):
    def phase(folder, steps_now):
        torch.manual_seed(0)
        layer = nn.Linear(3, 1)

        def loss(rng, done):
            if rng.random() >= 0 and steps_now and next(counter) >= steps_now:
                raise KeyboardInterrupt
            x = torch.tensor([[rng.random() for _ in range(3)]])
            return {"total": (layer(x) - x.sum()).square().mean()}

        counter = iter(range(10_000))
        try:
            pretraining.train_phase("p", folder, layer, 500, 0.01, loss)
        except KeyboardInterrupt:
            pass
        return layer.weight.detach().clone()

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = phase(tmp_path / "a", 0)
    phase(tmp_path / "b", 300)  # killed at step 300: stored at 250
    resumed = phase(tmp_path / "b", 0)
    assert torch.equal(whole, resumed)


def test_mass_outside_the_candidates_is_a_loss(tokenizer):
    model = minimodel.build_model(minimodel.build_processor(), seed=2)
    rng = random.Random(0)
    rows = [
        pretraining.problem_row(
            pretraining.sample_problem(rng, 5, "title"),
            pretraining.Encoder(tokenizer).encode,
            [],
            rng,
            tokenizer,
        )
        for _ in range(3)
    ]
    batch = pretraining.collate(rows, 0)
    hidden = torch.zeros(*batch["ids"].shape, 128)
    uniform = pretraining.outside_loss(model, batch, hidden)
    mine = [len({r.ids[p] for p in r.id_positions}) for r in rows]
    expected = -torch.tensor([m / len(tokenizer) for m in mine]).log().mean()
    assert torch.allclose(uniform, expected, atol=1e-4)
