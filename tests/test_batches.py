"""Batches of mixed lengths, padded on either side, are the mean of their rows: losses, and the
adapters' gradients. Nothing is packed: a row is one prompt and its target. At inference one forward
gives the plain forward's scores and `generate`'s answers."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from PIL import Image
from stand_ins import trainable_names

from lavic_utils import distillation as dist
from lavic_utils import loading, training, vision
from lavic_utils import recommendation as rec
from lavic_utils.config import UserError, load_profile
from lavic_utils.data import Dialogue
from lavic_utils.mini import words as w

PROFILE = load_profile("mini")
IDS = tuple(f"B0{a}{b}" for a, b in zip(w.ID_CHUNKS[:12], w.ID_CHUNKS[40:52], strict=True))
TEXTS = (
    "a jar",
    "i want a red jar, it should be vegan, please help me to choose.",
    "hello, i need help to find a jar.",
)
CLOSE = 1e-5


@pytest.fixture(scope="module")
def prompter(processor):
    generator = torch.Generator().manual_seed(0)
    visual = {
        a: torch.randn(5 if i % 2 else 3, 128, generator=generator) for i, a in enumerate(IDS)
    }
    titles = {a: f"Velora {f} jar" for a, f in zip(IDS, w.FEATURES["beauty"], strict=False)}
    return rec.Prompter(processor.tokenizer, PROFILE, titles, visual)


def dialogue(text: str) -> Dialogue:
    return Dialogue(
        domain="beauty",
        split="train",
        line=1,
        context=f"<submission>{text}</submission>\n",
        context_items=(),
        gt="this one",
        gt_items=(IDS[0],),
        candidates_st=IDS[:10],
        candidates_gpt_large=IDS[:10],
    )


def adapted(model, target: str):
    """The model with an adapter whose A and B both have gradients: B is not zero."""
    torch.manual_seed(0)
    stage = (dist.Student if target == dist.VISION_LINEAR else rec.Recommender)(model)
    tuned = get_peft_model(stage, training.lora_config(PROFILE.recommendation.lora, target)).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return tuned


def right(batch: dict) -> dict:
    """The same batch, padded on the right."""
    gaps = (batch["attention_mask"] == 0).sum(1).tolist()
    turned = {
        name: torch.stack([row.roll(-gap) for row, gap in zip(batch[name], gaps, strict=True)])
        for name in ("input_ids", "labels", "attention_mask")
    }
    return batch | turned


def loss_and_gradients(tuned, batches: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss of batches of equal size, and its gradients."""
    tuned.zero_grad()
    total = 0.0
    for batch in batches:
        loss = tuned(**batch)["loss"] / len(batches)
        loss.backward()
        total += loss.item()
    return total, {
        name: p.grad.clone() for name, p in tuned.named_parameters() if p.grad is not None
    }


def far(one, other) -> float:
    """Largest difference of two losses and their gradients."""
    assert one[1].keys() == other[1].keys()
    return max(
        abs(one[0] - other[0]),
        *(float((g - other[1][name]).abs().max()) for name, g in one[1].items()),
    )


def stage_one(model, processor, prompter, folder):
    rng, rows = random.Random(0), []
    for i, (size, text) in enumerate(
        [
            ((96, 96), "red and plain"),
            ((96, 48), "blue, dotted, round, with a white lid."),
            ((40, 90), "plain"),
        ]
    ):
        path = folder / f"{i}.png"
        Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).save(path)
        rows.append(dist.Picture(IDS[i], "Velora jar" + " travel" * i, path, text))
    return dist.StudentCollator(model, processor, PROFILE, dist.Pictures(processor, True)), rows


def stage_two(model, processor, prompter, folder):
    return prompter.collate, [
        prompter.row(rec.Example(dialogue(text), IDS[i : i + 10], IDS[2 * i]))
        for i, text in enumerate(TEXTS)
    ]


@pytest.mark.parametrize(
    ("target", "stage"), [(dist.VISION_LINEAR, stage_one), (rec.LANGUAGE_LINEAR, stage_two)]
)
def test_a_batch_has_the_loss_and_gradients_of_its_rows_one_by_one(
    model, processor, prompter, tmp_path, target, stage
):
    collate, rows = stage(model, processor, prompter, tmp_path)
    batch, tuned = collate(rows), adapted(model, target)
    assert len(set(batch["attention_mask"].sum(1).tolist())) == 3  # mixed lengths
    single = loss_and_gradients(tuned, [collate([row]) for row in rows])
    assert all(g.abs().max() > 10 * CLOSE for g in single[1].values()) and len(single[1]) == len(
        trainable_names(tuned)
    )
    assert far(loss_and_gradients(tuned, [batch]), single) <= CLOSE
    assert far(loss_and_gradients(tuned, [right(batch)]), single) <= CLOSE
    seen = batch | {
        "attention_mask": torch.ones_like(batch["attention_mask"])
    }  # negative control: padding is read
    assert far(loss_and_gradients(tuned, [seen]), single) > 10 * CLOSE


def test_an_overlong_description_is_refused_never_cut(model, processor, prompter, tmp_path):
    collate, rows = stage_one(model, processor, prompter, tmp_path)
    longest = collate(rows)["input_ids"].shape[1]

    def limited(most: int):
        stage = PROFILE.distillation.model_copy(update={"max_length": most})
        return dist.StudentCollator(
            model, processor, PROFILE.model_copy(update={"distillation": stage}), collate.pictures
        )

    assert torch.equal(limited(longest)(rows)["input_ids"], collate(rows)["input_ids"])
    with pytest.raises(
        UserError,
        match=rf"1\.png: title, .* take {longest} tokens, more than max_length {longest - 1} ",
    ):
        limited(longest - 1)(rows)


# ---------------------------------------------------------------- one forward for three readings
def placed(model, prompter, prompts, extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and mask of prompts, padded on the left by `extra` more than needed."""
    ids = F.pad(dist.pad_left([p.ids for p in prompts], 0), (extra, 0))
    mask = F.pad(dist.pad_left([[1] * len(p.ids) for p in prompts], 0), (extra, 0))
    return vision.place(model, ids, prompter.tokens(prompts), 0), mask


@pytest.fixture(scope="module")
def base():
    """The mini model as it comes: it answers with an id most of the time."""
    return loading.load_model(PROFILE)


@torch.inference_mode()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ids_side_by_side_have_the_scores_of_the_plain_forward(model, prompter, attention):
    model.set_attn_implementation(attention)
    prompts = [prompter.prompt(dialogue(text), IDS[:10]) for text in TEXTS]
    targets = [prompter.target_ids(name) for name in IDS[:10]]
    targets[3] = targets[3][1:]  # one is shorter
    assert len({len(p.ids) for p in prompts}) == 3
    together = rec.read(model, *placed(model, prompter, prompts), [targets, targets[:7], targets])
    wider = rec.read(model, *placed(model, prompter, prompts, extra=7), [targets] * 3)
    for prompt, got, padded in zip(prompts, together, wider, strict=True):
        for i, target in enumerate(targets[: len(got[0])]):
            alone = rec.Encoded(prompt.ids + target, prompt.visual)
            logits = model(inputs_embeds=placed(model, prompter, [alone])[0]).logits[0]
            logits = logits[len(prompt.ids) - 1 : -1].log_softmax(-1)  # (tokens, vocabulary)
            expected = logits[range(len(target)), target]
            for scores, likeliest in (got, padded):
                assert torch.allclose(scores[i, : len(target)], expected, atol=CLOSE)
                assert scores[i, len(target) :].eq(0).all()
                assert likeliest[i, : len(target)].equal(logits.argmax(-1))
        assert not torch.allclose(got[0][0], got[0][1], atol=1e-3)  # ids are not alike
    assert [len(scores) for scores, _ in together] == [10, 7, 10]
    embeds, mask = placed(model, prompter, prompts)
    other = rec.read(model, embeds, mask.flip(0), [targets] * 3)  # negative control: others' masks
    assert not torch.allclose(other[0][0], together[0][0], atol=1e-3)
    with pytest.raises(ValueError, match="padded on the left"):
        rec.read(model, embeds, mask.flip(1), [targets] * 3)


@torch.inference_mode()
@pytest.mark.parametrize("random", [True, False])
def test_answers_are_those_of_generate_one_by_one(model, base, prompter, random, monkeypatch):
    model, end = model if random else base, prompter.tokenizer.eos_token_id
    named = [f"i need a {feature} jar." for feature in w.FEATURES["beauty"][:8]]
    asked = [dialogue(text) for text in (*TEXTS, *named, "a blue jar that travels well.")]
    generate, generated = model.generate, []
    monkeypatch.setattr(
        model,
        "generate",
        lambda **how: (generated.append(len(how["inputs_embeds"])), generate(**how))[1],
    )
    answers = rec.generate_answers(model, prompter, asked, "candidates_st")
    ids = sum(answer.response in IDS for answer in answers)
    assert sum(generated) == len(asked) - ids and (ids == 0 if random else ids > 0)
    for one, answer in zip(asked, answers, strict=True):
        prompt = prompter.prompt(one, one.candidates_st)
        embeds, mask = placed(model, prompter, [prompt])
        how = {"max_new_tokens": PROFILE.recommendation.max_new_tokens, "do_sample": False}
        how |= {"eos_token_id": end, "pad_token_id": end}
        out = generate(inputs_embeds=embeds, attention_mask=mask, **how)[0]
        text = prompter.tokenizer.decode(out, skip_special_tokens=True)
        assert answer.response == text.strip() and answer.new_tokens == int((out != end).sum())
        targets = [prompter.target_ids(name) for name in one.candidates_st]
        ((table, _),) = rec.read(model, embeds, mask, [targets])
        means = [float(row.sum()) / len(t) for row, t in zip(table, targets, strict=True)]
        assert answer.log_likelihoods == pytest.approx(means, abs=2e-5)
        assert answer.scored == one.candidates_st[means.index(max(means))]
        assert answer.constrained == one.candidates_st[rec.constrained_choice(table, targets)]
        assert sum(answer.probabilities) == pytest.approx(1, abs=1e-4)
        assert answer.prompt_tokens == len(prompt.ids)


def test_an_id_is_written_where_each_of_its_tokens_is_the_likeliest():
    targets = [[1, 2, 9], [1, 3, 4, 9]]
    likeliest = torch.tensor([[1, 3, 9, 0], [1, 3, 4, 9]])
    assert rec.greedy_choice(likeliest, targets, 10) == [1, 3, 4, 9]
    assert rec.greedy_choice(likeliest, targets, 2) == [1, 3]  # no room for more
    likeliest[1, 3] = 5  # it goes on after the id, which is something else
    assert rec.greedy_choice(likeliest, targets, 10) == []
    assert rec.greedy_choice(likeliest, targets, 3) == [1, 3, 4]


def test_long_prompts_are_answered_in_smaller_batches():
    """A batch has no more tokens than a full one of `max_length`, unless it is a single prompt."""
    settings = PROFILE.recommendation.model_copy(update={"eval_batch_size": 4, "max_length": 100})
    assert rec.batches([], settings) == []
    lengths = [10] * 3 + [100] * 5 + [133, 134, 200, 201, 5000]
    groups = rec.batches(lengths, settings)
    assert [list(lengths[g.start : g.stop]) for g in groups] == [
        [10, 10, 10, 100],
        [100] * 4,
        [133, 134],
        [200],
        [201],
        [5000],
    ]
    assert [i for g in groups for i in g] == list(range(len(lengths)))
