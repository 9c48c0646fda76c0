"""The pretend card itself, and what it finds. Run by tests/test_devices.py in a process of its own:
a device that torch has once been told of stays."""

from __future__ import annotations

import inspect
import random
from pathlib import Path

import numpy as np
import pretend_card
import pytest
import torch
from PIL import Image
from test_stages import IDS, TITLES, dialogue
from torch import nn

from lavic_utils import distillation, loading, vision
from lavic_utils import recommendation as rec
from lavic_utils.config import load_profile

SHORT = {"max_new_tokens": 2, "warmup_steps": 0, "epochs": 1, "gradient_accumulation": 1}
PROFILE = load_profile("mini")
PROFILE = PROFILE.model_copy(
    update={
        stage: getattr(PROFILE, stage).model_copy(update=SHORT)
        for stage in ("distillation", "recommendation")
    }
)
CARD, F = pretend_card.CARD, nn.functional
MIXED = "Expected all tensors to be on the same device"


def on_card(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(CARD)


# ---------------------------------------------------------------- the card
@pytest.mark.parametrize(
    "mixing",
    [
        lambda: on_card(3) + torch.randn(3),
        lambda: on_card(2, 3) @ torch.randn(3, 2),
        lambda: torch.cat([on_card(3), torch.randn(3)]),
        lambda: F.embedding(torch.tensor([1]), on_card(3, 2)),
        lambda: F.linear(torch.randn(2, 3), on_card(4, 3)),
        lambda: on_card(3).masked_fill(torch.ones(3).bool(), 0),
        lambda: torch.randn(5)[torch.tensor([1]).to(CARD)],
        lambda: on_card(5).index_put_((torch.tensor([1]),), torch.randn(1)),
        lambda: F.cross_entropy(on_card(2, 3), torch.tensor([0, 1])),
    ],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_tensors_of_both_devices_do_not_meet(mixing, mode):
    with mode(), pytest.raises(RuntimeError, match=MIXED):
        mixing()


def test_models_go_there():
    assert loading.device() == CARD  # by sitecustomize.py alone


def test_what_a_real_card_allows_is_allowed():
    there = on_card(4, 3)
    assert (there * torch.tensor(2.0)).device == there[torch.tensor([1, 2])].device == CARD
    there[torch.tensor([0])] = 0.0
    assert there[0].tolist() == [0, 0, 0] and there.cpu().device.type == "cpu"
    assert torch.zeros(4, 3).copy_(there).equal(there.cpu()) and f"{there[0, 0]:.1f}" == "0.0"
    for made in (torch.zeros(2, device=CARD), torch.arange(2, device=CARD), there.new_ones(2)):
        assert made.device == CARD and made.shape == (2,)
    assert torch.tensor([1, 2], device=CARD).tolist() == [1, 2]


def test_it_is_read_by_way_of_the_processor():
    for read in (np.asarray, lambda one: one.numpy(), torch.from_numpy):
        with pytest.raises((RuntimeError, TypeError)):
            read(on_card(3))
    assert on_card(3).cpu().numpy().shape == (3,)


def test_training_there_is_training_here():
    """To the bit: with weights, gradients, a fused optimiser, and what is saved of them."""
    states = []
    for device in ("cpu", CARD):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2)).to(device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
        for seen in torch.randn(3, 5, 4):
            loss = F.cross_entropy(net(seen.to(device)), torch.tensor([0, 1, 1, 0, 1]).to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert {p.device.type for p in net.parameters()} == {torch.device(device).type}
        with torch.inference_mode(device == CARD):  # a model may come back in either mode
            states.append(net.cpu().state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# ---------------------------------------------------------------- the package on it
class Work:
    """What the package does with a model, each part a method of no argument."""

    def __init__(self, model, processor, folder: Path) -> None:
        self.model, self.processor, self.folder = model, processor, folder
        rng, self.pictures = random.Random(0), []
        for asin, size in zip(IDS, ((96, 96), (96, 48)), strict=False):
            noise = bytes(rng.randrange(256) for _ in range(3 * size[0] * size[1]))
            path = folder / f"{asin}.png"
            Image.frombytes("RGB", size, noise).save(path)
            self.pictures.append(distillation.Picture(asin, TITLES[asin], path, "a red jar"))
        visual = {a: torch.full((3, 128), i / 12) for i, a in enumerate(IDS)}
        self.prompter = rec.Prompter(processor.tokenizer, PROFILE, TITLES, visual)
        self.dialogues = [dialogue(), dialogue(text="a jar")]

    def encode(self) -> list:
        paths = [one.path for one in self.pictures]
        made = [vision.file_encoder(self.model, self.processor, how) for how in KINDS]
        lazy = vision.lazy_full_tokens(lambda: self.model, self.processor, dict(enumerate(paths)))
        return [tokens.tolist() for one in made for tokens in one(paths)] + [lazy[0].tolist()]

    def describe(self) -> list:
        read = distillation.Pictures(self.processor, keep=False)
        titles, pixels = zip(*((p.title, read(p.path)) for p in self.pictures), strict=True)
        how = self.model, self.processor, PROFILE, titles, pixels
        return [distillation.describe(*how), distillation.describe(*how, vision.cls_tokens)]

    def answer(self) -> list:
        found = rec.generate_answers(self.model, self.prompter, self.dialogues, "candidates_st")
        return [(one.response, one.constrained, one.log_likelihoods) for one in found]

    def distil(self) -> list:
        rows, where = self.pictures, self.folder / "stage1"
        distillation.distil(PROFILE, self.model, self.processor, rows, rows, where, seed=0)
        return sorted(path.name for path in (where / "adapter").iterdir())

    def tune(self) -> list:
        examples = [rec.Example(one, IDS[:10], IDS[0]) for one in self.dialogues]
        where = self.folder / "stage2"
        rec.fine_tune(PROFILE, self.model, self.prompter, examples, where, seed=0)
        return sorted(path.name for path in (where / "adapter").iterdir())


KINDS = tuple(vision.TOKENS.values())


@pytest.fixture
def work(model, processor, tmp_path):
    return Work(model, processor, tmp_path)


@pytest.mark.parametrize("part", [Work.encode, Work.describe, Work.answer])
def test_numbers_there_are_those_here(work, part):
    here = part(work)
    work.model.to(CARD)
    assert work.model.device == CARD and part(work) == here


@pytest.mark.parametrize("part", [Work.distil, Work.tune])
def test_both_stages_train_there(work, part):
    work.model.to(CARD)
    assert "adapter_model.safetensors" in part(work)
    assert {p.device for p in work.model.parameters()} == {CARD}


# What a real card would stop at: in a function, these words for those, and what then fails.
SLIPS = [
    (vision.real_tiles, "model.device, model.dtype", "model.dtype", Work.encode),
    (vision.full_tokens, "model.device, model.dtype", "model.dtype", Work.encode),
    (vision.lazy_full_tokens, "looks.device, looks.dtype", "looks.dtype", Work.encode),
    (vision.place, "embeds.device, embeds.dtype", "embeds.dtype", Work.answer),
    (distillation.describe, "0).to(model.device)", "0)", Work.describe),
    (rec._answer_batch, "0).to(model.device)", "0)", Work.answer),
    (rec.read, "found[i, :n].cpu()", "found[i, :n]", Work.answer),
]


@pytest.mark.parametrize(("function", "words", "slip", "part"), SLIPS)
def test_a_tensor_left_behind_is_found(work, monkeypatch, function, words, slip, part):
    inner = inspect.unwrap(function)
    source, space = inspect.getsource(inner), dict(inner.__globals__)
    assert source.count(words) == 1
    exec(source.replace(words, slip), space)
    monkeypatch.setattr(inner, "__code__", inspect.unwrap(space[inner.__name__]).__code__)
    part(work)  # unnoticed on the processor
    work.model.to(CARD)
    with pytest.raises(RuntimeError, match=MIXED):
        part(work)
