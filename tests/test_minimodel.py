"""The mini model: an ordinary checkpoint that does what it should, and a recipe that resumes."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, LlavaNextForConditionalGeneration

from lavic_utils import loading, vision
from lavic_utils.config import PACKAGE, load_profile
from lavic_utils.evaluation import parse_answer
from lavic_utils.mini import abilities, recipe
from lavic_utils.mini import model as minimodel
from lavic_utils.mini import words as w
from lavic_utils.provenance import file_hash
from lavic_utils.training import IGNORE

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


# ---------------------------------------------------------------- the recipe
SMALL = tuple(replace(phase, steps=3) for phase in recipe.PHASES)
LEARNT = {
    "tower": {"vision tower"},
    "language": {"language model"},
    "copy": {"language model"},
    "joint": {"language model", "projector"},
    "doubt": {"language model", "projector"},
    "last layer": {"vision tower"},
}


def parts(learner: recipe.Learner) -> dict[str, dict[str, torch.Tensor]]:
    found = {"vision tower": {}, "language model": {}, "projector": {}}
    for name, value in learner.model.named_parameters():
        part = "language model" if "language_model" in name else "projector"
        part = "vision tower" if "vision_tower" in name else part
        found[part][name] = value.detach().clone()
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture(scope="module")
def pool() -> recipe.Pool:
    """A small one of looks that training never shows."""
    return recipe.Pool(minimodel.build_processor(), 120, 999, held_out=True)


@pytest.fixture(scope="module")
def learner(pool) -> recipe.Learner:
    """With the shipped weights, and pictures it never saw."""
    made = recipe.Learner()
    made.model, made.pool = loading.load_model(load_profile("mini")), pool
    return made


@pytest.fixture
def small(pool, monkeypatch) -> None:
    monkeypatch.setattr(recipe, "Pool", lambda *_: pool)
    monkeypatch.setattr(recipe, "TOKENS", 150)
    monkeypatch.setattr(recipe, "PICTURES", 8)


def test_a_pool_keeps_to_its_looks(pool):
    """The recipe's own never shows what is held out; the controls: a pool of the others does."""
    assert all(w.held_out(facts) for facts in pool.facts)
    assert not any(
        w.held_out(facts) for facts in recipe.Pool(minimodel.build_processor(), 60, 0).facts
    )
    values = [pool.labels[:, 1:][:, i].unique().numel() for i in range(4)]
    assert values == [len(v) for v in w.ATTRIBUTES.values()]  # and yet every value occurs


def test_every_phase_runs_trains_its_parts_alone_and_goes_on_where_it_stopped(tmp_path, small):
    """One phase more at a time in one folder: each call goes on where the last one stopped."""
    before = parts(recipe.Learner())
    for number, phase in enumerate(SMALL, 1):
        now = parts(recipe.train(tmp_path / "pieces", SMALL[:number]))
        changed = {part for part in now if not same(before[part], now[part])}
        assert changed == LEARNT[phase.name], phase.name
        before = now
    whole = parts(recipe.train(tmp_path / "whole", SMALL))
    assert all(same(whole[part], before[part]) for part in whole)


def test_a_killed_phase_resumes_to_the_same_weights(tmp_path, small, monkeypatch):
    phases = (replace(SMALL[1], steps=6),)
    whole = parts(recipe.train(tmp_path / "a", phases, keep=2))
    losses = recipe.phase_losses

    def killed(learner, rng, phase, done):
        if done >= 0.8:  # the sixth step; four are kept
            raise KeyboardInterrupt
        return losses(learner, rng, phase, done)

    monkeypatch.setattr(recipe, "phase_losses", killed)
    with pytest.raises(KeyboardInterrupt):
        recipe.train(tmp_path / "b", phases, keep=2)
    monkeypatch.setattr(recipe, "phase_losses", losses)
    kept = torch.load(tmp_path / "b" / "state.pt", weights_only=True)
    assert kept["step"] == 4
    resumed = parts(recipe.train(tmp_path / "b", phases, keep=2))
    assert same(whole["language model"], resumed["language model"])


def test_shares_of_tasks_make_a_whole():
    for phase in recipe.PHASES:
        assert sum(phase.tasks.values()) == pytest.approx(1)
        assert not {"few", "cls"} & set(phase.tasks)


def test_a_choice_is_consistent(learner):
    rng, encode = random.Random(3), learner.encode
    for task in 8 * ("text", "title", "picture", "tile"):
        row = recipe.choice_row(learner, rng, task, 5)
        said = learner.tokenizer.decode(
            [label for label in row.labels if label != IGNORE], skip_special_tokens=True
        )
        assert row.fits[row.names.index(said.strip())]
        for name, place in zip(row.names, row.chunks, strict=True):
            assert row.ids[place - 1 : place + 2] == encode(" " + name)
        assert len(row.ids) == len(row.labels) == len(row.asked)
        shown = row.ids.count(learner.image)
        full = sum(learner.pool.lengths[i] for i in row.pictures)
        assert shown == (80 if task == "tile" else full)
        last = [row.ids[place] for place in row.known]  # the whole candidate has been read there
        assert last == [row.ids[place] for place in row.chunks] or set(last) == set(encode("\n"))


def test_lengths_of_full_tokens_are_what_the_model_makes(learner):
    rows = list(range(12))
    visual = recipe.picture_tokens(learner, rows, 0)
    assert [len(tokens) for tokens in visual] == learner.pool.lengths[:12]
    assert len(set(learner.pool.lengths[:12])) > 1


@torch.inference_mode()
def test_shipped_weights_do_the_recipes_tasks_and_not_others(learner):
    """It describes from full tokens and not from raw [CLS]; it follows a request, not another's."""
    rng = random.Random(1)
    assert abilities.described(learner, rng, vision.full_tokens)["colour"] > 0.9
    assert abilities.described(learner, rng, vision.cls_tokens)["colour"] < 0.4
    rows = [recipe.choice_row(learner, rng, "text", 5) for _ in range(20)]
    starts = [learner.encode(f"{name}:\n") for name in ("Candidates", "Items", "Products")]

    def fits(rows) -> int:
        texts = abilities.write(learner, rows, [])
        pairs = zip(rows, texts, strict=True)
        return sum(t in row.names and row.fits[row.names.index(t)] for row, t in pairs)

    def cut(row) -> int:
        """Where the candidates' heading begins."""
        return next(i for i in range(len(row.ids)) if row.ids[i : i + len(starts[0])] in starts)

    swapped = []
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        request, rest = other.ids[: cut(other)], row.ids[cut(row) :]
        labels = [IGNORE] * len(request) + row.labels[cut(row) :]
        swapped.append(replace(row, ids=request + rest, labels=labels))
    assert fits(rows) >= 14 and fits(swapped) <= 10


def test_the_card_says_what_was_measured(learner):
    found = {"describe from full tokens": {"colour": 0.5, "all": 0.25}}
    text = abilities.card(learner, found, "0123456789abcdef")
    assert "| from full tokens | 0.500 | 0.250 |" in text and "`0123456789ab`" in text
    assert (
        "*joint* (2,000 steps)" in text
        and f"on {abilities.COUNT} unseen" in text
        and "{" not in text
    )


def test_the_shipped_card_is_of_the_shipped_weights():
    text = (FOLDER / "README.md").read_text()
    assert file_hash(FOLDER / "model.safetensors")[:12] in text
    for phase in recipe.PHASES:
        assert f"*{phase.name}* ({phase.steps:,} steps)" in text
    measured = json.loads((FOLDER / "abilities.json").read_text())
    for shares in measured.values():
        assert " | ".join(f"{share:.3f}" for share in shares.values()) in text
