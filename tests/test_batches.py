"""Batches of mixed lengths, padded on either side, are the mean of their rows: losses, and gradients of the adapters.
Nothing is packed: a row is one prompt and its target. At inference the shared prompt cache gives the plain forward's scores."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from PIL import Image

from lavic_utils import distillation as dist
from lavic_utils import recommendation as rec
from lavic_utils import vision
from lavic_utils import wording as w
from lavic_utils.config import UserError, load_profile
from lavic_utils.data import Dialogue

PROFILE = load_profile("mini")
IDS = tuple(f"B0{a}{b}" for a, b in zip(w.ID_CHUNKS[:12], w.ID_CHUNKS[40:52], strict=True))
TEXTS = ("a jar", "i want a red jar, it should be vegan, please help me to choose.", "hello, i need help to find a jar.")
CLOSE = 1e-5


@pytest.fixture(scope="module")
def prompter(processor):
    generator = torch.Generator().manual_seed(0)
    visual = {a: torch.randn(5 if i % 2 else 3, 128, generator=generator) for i, a in enumerate(IDS)}
    return rec.Prompter(processor.tokenizer, PROFILE, dict.fromkeys(IDS, "Velora travel jar"), visual)


def dialogue(text: str) -> Dialogue:
    return Dialogue(domain="beauty", split="train", line=1, context=f"<submission>{text}</submission>\n", context_items=(),
                    gt="this one", gt_items=(IDS[0],), candidates_st=IDS[:10], candidates_gpt_large=IDS[:10])


def adapted(model, target: str):
    """The model with an adapter whose A and B both have gradients: B is not zero."""
    torch.manual_seed(0)
    stage = (dist.Student if target == dist.VISION_LINEAR else rec.Recommender)(model)
    tuned = get_peft_model(stage, dist.lora_config(PROFILE.recommendation.lora, target)).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return tuned


def right(batch: dict) -> dict:
    """The same batch, padded on the right."""
    gaps = (batch["attention_mask"] == 0).sum(1).tolist()
    turned = {name: torch.stack([row.roll(-gap) for row, gap in zip(batch[name], gaps, strict=True)])
              for name in ("input_ids", "labels", "attention_mask")}
    return batch | turned


def loss_and_gradients(tuned, batches: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss of batches of equal size, and its gradients."""
    tuned.zero_grad()
    total = 0.0
    for batch in batches:
        loss = tuned(**batch)["loss"] / len(batches)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in tuned.named_parameters() if p.grad is not None}


def far(one, other) -> float:
    """Largest difference of two losses and their gradients."""
    assert one[1].keys() == other[1].keys()
    return max(abs(one[0] - other[0]), *(float((g - other[1][name]).abs().max()) for name, g in one[1].items()))


def stage_one(model, processor, prompter, folder):
    rng, rows = random.Random(0), []
    for i, (size, text) in enumerate([((96, 96), "red and plain"), ((96, 48), "blue, dotted, round, with a white lid."),
                                      ((40, 90), "plain")]):
        path = folder / f"{i}.png"
        Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).save(path)
        rows.append(dist.Picture(IDS[i], "Velora jar" + " travel" * i, path, text))
    return dist.StudentCollator(model, processor, PROFILE, dist.Pictures(processor, True)), rows


def stage_two(model, processor, prompter, folder):
    return rec.collator(prompter), [prompter.row(rec.Example(dialogue(text), IDS[i:i + 10], IDS[2 * i]))
                                    for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize(("target", "stage"), [(dist.VISION_LINEAR, stage_one), (rec.LANGUAGE_LINEAR, stage_two)])
def test_a_batch_has_the_loss_and_gradients_of_its_rows_one_by_one(model, processor, prompter, tmp_path, target, stage):
    collate, rows = stage(model, processor, prompter, tmp_path)
    batch, tuned = collate(rows), adapted(model, target)
    assert len(set(batch["attention_mask"].sum(1).tolist())) == 3  # mixed lengths
    single = loss_and_gradients(tuned, [collate([row]) for row in rows])
    assert all(g.abs().max() > 10 * CLOSE for g in single[1].values()) and len(single[1]) == len(dist.trainable_names(tuned))
    assert far(loss_and_gradients(tuned, [batch]), single) <= CLOSE
    assert far(loss_and_gradients(tuned, [right(batch)]), single) <= CLOSE
    seen = batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}  # negative control: padding is read
    assert far(loss_and_gradients(tuned, [seen]), single) > 10 * CLOSE


def test_an_overlong_description_is_refused_never_cut(model, processor, prompter, tmp_path):
    collate, rows = stage_one(model, processor, prompter, tmp_path)
    longest = collate(rows)["input_ids"].shape[1]

    def limited(most: int):
        stage = PROFILE.distillation.model_copy(update={"max_length": most})
        return dist.StudentCollator(model, processor, PROFILE.model_copy(update={"distillation": stage}), collate.pictures)
    assert torch.equal(limited(longest)(rows)["input_ids"], collate(rows)["input_ids"])
    with pytest.raises(UserError, match=rf"1\.png: title, .* take {longest} tokens, more than max_length {longest - 1} "):
        limited(longest - 1)(rows)


# ---------------------------------------------------------------- the shared prompt cache
def read(model, prompter, prompts, extra: int = 0) -> rec.Read:
    """Prompts read in one batch, padded on the left by `extra` more than needed."""
    ids, mask = dist.pad_left([p.ids for p in prompts], 0), dist.pad_left([[1] * len(p.ids) for p in prompts], 0)
    return rec.Read(model, vision.place(model, F.pad(ids, (extra, 0)), prompter.tokens(prompts), 0), F.pad(mask, (extra, 0)))


@torch.inference_mode()
def test_cached_scores_of_mixed_lengths_equal_the_plain_forward(model, prompter):
    prompts = [prompter.prompt(dialogue(text), IDS[:10]) for text in TEXTS]
    targets = [prompter.answer(name) for name in IDS[:10]]
    assert len({len(p.ids) for p in prompts}) == 3
    together = read(model, prompter, prompts).score([targets] * 3)
    for prompt, got in zip(prompts, together, strict=True):
        alone = read(model, prompter, [prompt]).score([targets])[0]
        wider = read(model, prompter, [prompt], extra=7).score([targets])[0]
        rows = [prompt.ids + t + [0] * (max(map(len, targets)) - len(t)) for t in targets]  # padded on the right, no cache
        mask = torch.tensor([[1] * len(prompt.ids + t) + [0] * (len(rows[0]) - len(prompt.ids + t)) for t in targets])
        embeds = vision.place(model, torch.tensor(rows), prompter.tokens([prompt]) * 10, 0)
        logits = model(inputs_embeds=embeds, attention_mask=mask).logits[:, len(prompt.ids) - 1:-1].log_softmax(-1)
        plain = [table[range(len(t)), t] for table, t in zip(logits, targets, strict=True)]
        for i, expected in enumerate(plain):
            for found in (got, alone, wider):
                assert torch.allclose(found[i, :len(expected)], expected, atol=CLOSE)
        assert not torch.allclose(plain[0], plain[1], atol=1e-3)


@torch.inference_mode()
def test_cached_answers_do_not_depend_on_padding_and_the_right_side_is_refused(model, prompter):
    prompts = [prompter.prompt(dialogue(text), IDS[:10]) for text in TEXTS]
    expected = read(model, prompter, prompts).greedy(6, 2)
    assert torch.equal(read(model, prompter, prompts, extra=9).greedy(6, 2), expected)
    for prompt, row in zip(prompts, expected, strict=True):
        alone = read(model, prompter, [prompt]).greedy(6, 2)[0]
        assert row[:len(alone)].tolist() == alone.tolist()
    with pytest.raises(ValueError, match="padded on the left"):
        rec.Read(model, torch.zeros(2, 4, 128), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
