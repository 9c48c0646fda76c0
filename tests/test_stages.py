"""Stages 1 and 2 on a random tiny model: equality with hand-written forwards, and each defect of
the released scripts shown on the defective way beside ours."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import mistral_common
import pytest
import torch
import torch.nn.functional as F
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from peft import get_peft_model
from PIL import Image
from stand_ins import trainable_names

from lavic_utils import distillation as dist
from lavic_utils import prompts, training, vision
from lavic_utils import recommendation as rec
from lavic_utils.config import UserError, load_profile
from lavic_utils.data import Dialogue
from lavic_utils.evaluation import parse_answer
from lavic_utils.methods import ENTIRE
from lavic_utils.mini import words as w

PROFILE = load_profile("mini")
IDS = tuple(f"B0{a}{b}" for a, b in zip(w.ID_CHUNKS[:12], w.ID_CHUNKS[40:52], strict=True))
TITLES = dict.fromkeys(IDS, "Velora travel jar")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = random.Random(seed)
    return Image.frombytes(
        "RGB", (width, height), bytes(rng.randrange(256) for _ in range(3 * width * height))
    )


def dialogue(truths=(IDS[0],), candidates=IDS[:10], text="i want a red jar") -> Dialogue:
    return Dialogue(
        domain="beauty",
        split="train",
        line=1,
        context=f"<submission>{text}</submission>\n",
        context_items=(),
        gt="this one",
        gt_items=truths,
        candidates_st=candidates,
        candidates_gpt_large=candidates,
    )


@pytest.fixture(scope="module")
def visual():
    generator = torch.Generator().manual_seed(0)
    return {a: torch.randn(5 if i % 2 else 3, 128, generator=generator) for i, a in enumerate(IDS)}


@pytest.fixture
def prompter(processor, visual):
    return rec.Prompter(processor.tokenizer, PROFILE, TITLES, visual)


# ---------------------------------------------------------------- visual tokens
def test_tiles_follow_the_aspect_ratio(processor, model):
    values, sizes = vision.pixels(processor, [picture(96, 96), picture(96, 48), picture(48, 96)])
    tokens = vision.cls_tokens(model, values, sizes)
    assert [len(t) for t in tokens] == [5, 3, 3]
    # The defective way takes five tiles of everything: two are zero padding with a made-up [CLS].
    assert values[1, 3:].abs().sum() == 0 and len(values[1]) == 5


def test_tiles_made_at_once_have_the_librarys_pixels(processor):
    images = [picture(96, 96), picture(200, 120), picture(31, 77)]
    values, sizes = vision.pixels(processor, images)
    own = processor.image_processor(images, return_tensors="pt")
    assert torch.equal(sizes, own["image_sizes"]) and values.dtype == own["pixel_values"].dtype
    assert torch.allclose(values, own["pixel_values"], rtol=0, atol=1e-6)
    assert not torch.allclose(values[0], values[1], atol=1e-2)  # they are pictures


def test_cls_tokens_equal_a_hand_written_forward(processor, model):
    values, sizes = vision.pixels(processor, [picture(96, 96), picture(96, 48)])
    ours = vision.cls_tokens(model, values, sizes)
    for image, count, got in zip(values, (5, 3), ours, strict=True):
        for tile in range(count):
            hidden = model.model.vision_tower(
                image[tile : tile + 1], output_hidden_states=True
            ).hidden_states[-1]
            assert torch.allclose(
                got[tile], model.model.multi_modal_projector(hidden[:, 0])[0], atol=1e-5
            )
    earlier = model.model.vision_tower(values[0], output_hidden_states=True).hidden_states[-2][:, 0]
    assert not torch.allclose(ours[0], model.model.multi_modal_projector(earlier), atol=1e-3)


def test_placing_full_tokens_equals_the_models_own_forward(processor, model):
    values, sizes = vision.pixels(processor, [picture(96, 96)])
    full = vision.full_tokens(model, values, sizes)
    ids = torch.tensor(
        [prompts.describe_prompt(processor.tokenizer, PROFILE.prompts, "Velora jar", len(full[0]))]
    )
    own = model(input_ids=ids, pixel_values=values, image_sizes=sizes).logits
    ours = model(inputs_embeds=vision.place(model, ids, full, 0)).logits
    assert torch.allclose(own, ours, atol=1e-4)
    swapped = vision.place(model, ids, [full[0].flip(0)], 0)
    assert not torch.allclose(own, model(inputs_embeds=swapped).logits, atol=1e-3)


def test_placing_refuses_a_wrong_number_of_tokens(model, prompter, visual):
    prompt = prompter.prompt(dialogue(), IDS[:10])
    with pytest.raises(ValueError, match="placeholders"):
        vision.place(model, torch.tensor([prompt.ids]), prompter.tokens([prompt])[:-1], 0)


def test_tokens_are_the_same_in_any_batch(processor, model):
    images = {"a": picture(96, 96, 1), "b": picture(96, 48, 2), "d": picture(72, 96, 3)}
    together = vision.encode(model, list(images), *vision.pixels(processor, list(images.values())))
    alone = {
        k: vision.encode(model, [k], *vision.pixels(processor, [i]))[k] for k, i in images.items()
    }
    assert all(torch.allclose(together[k], alone[k], atol=1e-5) for k in images)
    assert not torch.allclose(together["a"], together["d"], atol=1e-3)


# ---------------------------------------------------------------- losses
def batch_of(prompter, examples):
    return prompter.collate([prompter.row(e) for e in examples])


def loss_of(model, batch):
    return rec.Recommender(model)(**batch)["loss"]


def examples(count=3):
    texts = [
        "i want a red jar",
        "hello, i need help to find a jar. it must be vegan.",
        "a jar",
        "please",
    ]
    return [rec.Example(dialogue(text=texts[i]), IDS[i : i + 10], IDS[i]) for i in range(count)]


def test_loss_equals_a_hand_written_forward(model, prompter, processor):
    example = examples(1)[0]
    row = prompter.row(example)
    embeds = model.get_input_embeddings()(torch.tensor([row["input_ids"]]))
    spots = [i for i, token in enumerate(row["input_ids"]) if token == model.config.image_token_id]
    for spot, vector in zip(
        spots, torch.cat([prompter.visual[a] for a in row["visual"]]), strict=True
    ):
        embeds[0, spot] = vector
    logits = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)[0]
    target = prompter.target_ids(example.target)
    expected = F.cross_entropy(logits[-len(target) - 1 : -1], torch.tensor(target))
    assert torch.allclose(loss_of(model, batch_of(prompter, [example])), expected, atol=1e-5)


def test_loss_of_a_batch_is_the_mean_over_single_rows(model, prompter):
    rows = examples(3)
    single = torch.stack([loss_of(model, batch_of(prompter, [e])) for e in rows])
    assert torch.allclose(loss_of(model, batch_of(prompter, rows)), single.mean(), atol=1e-4)
    # Negative control: hiding part of a target, as a mask from padded lengths does, changes it.
    wrong = batch_of(prompter, rows)
    wrong["labels"][0, -2:] = dist.IGNORE
    assert not torch.allclose(loss_of(model, wrong), single.mean(), atol=1e-4)


def test_a_row_without_target_is_an_error_not_a_nan():
    with pytest.raises(ValueError, match="no target"):
        training.mean_row_loss(torch.zeros(1, 3, 7), torch.full((1, 2), dist.IGNORE))


@pytest.mark.parametrize("target", [dist.VISION_LINEAR, rec.LANGUAGE_LINEAR])
def test_lora_with_b_zero_equals_the_base(model, prompter, target):
    batch = batch_of(prompter, examples(2))
    base = loss_of(model, batch)
    tuned = get_peft_model(
        rec.Recommender(model), training.lora_config(PROFILE.distillation.lora, target)
    ).eval()
    assert torch.allclose(tuned(**batch)["loss"], base, atol=1e-6)
    if target == rec.LANGUAGE_LINEAR:  # negative control: with another B the loss moves
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.05)
        assert not torch.allclose(tuned(**batch)["loss"], base, atol=1e-4)


def test_each_stage_trains_its_own_side_only(model):
    stage1 = trainable_names(
        get_peft_model(model, training.lora_config(PROFILE.distillation.lora, dist.VISION_LINEAR))
    )
    assert {n.split(".")[3] for n in stage1} == {"vision_tower", "multi_modal_projector"}
    assert len(stage1) == 2 * (4 * 6 + 2)


def test_stage_two_trains_every_linear_layer_of_the_language_model(model):
    names = trainable_names(
        get_peft_model(
            model, training.lora_config(PROFILE.recommendation.lora, rec.LANGUAGE_LINEAR)
        )
    )
    assert len(names) == 2 * 6 * 7 and all(".language_model.layers." in n for n in names)


# ------------------------------------------------------ stage 2: examples, prompts, answers
def test_truth_is_inserted_into_a_copy():
    row = dialogue(truths=(IDS[11], IDS[0], IDS[11]))
    made = rec.training_examples([row], "candidates_st", seed=3)
    assert [e.target for e in made] == [IDS[11], IDS[0]]  # one for each distinct truth
    assert all(e.target in e.candidates and len(e.candidates) == 10 for e in made)
    assert row.candidates_st == IDS[:10]
    # A list changed in place would hold its first truth already when it is read a second time.
    assert (
        made == rec.training_examples([row], "candidates_st", seed=3)
        and IDS[11] not in row.candidates_st
    )


def test_target_ends_with_end_of_sequence(prompter, processor):
    target = prompter.target_ids(IDS[0])
    assert target[-1] == processor.tokenizer.eos_token_id
    assert processor.tokenizer.decode(target, skip_special_tokens=True).strip() == IDS[0]
    row = prompter.row(examples(1)[0])
    assert [t for t in row["labels"] if t != dist.IGNORE] == target


def test_long_dialogue_loses_its_oldest_words_and_says_so(prompter, processor):
    long = dialogue(text="red " * 900 + "striped mug")
    prompt = prompter.prompt(long, IDS[:10])
    text = processor.tokenizer.decode(prompt.ids)
    assert len(prompt.ids) <= prompter.room and prompt.dropped_dialogue_tokens > 0
    assert "striped mug" in text and all(a in text for a in IDS[:10]) and text.endswith("Answer:")
    # The defective way cuts the end: target, request and candidates vanish.
    whole = [
        *prompts.encode(processor.tokenizer, prompts.dialogue_text(PROFILE.prompts, long.turns)),
        *prompt.ids,
    ]
    assert IDS[9] not in processor.tokenizer.decode(whole[: prompter.room])


def test_entire_tokens_overflow_is_counted(processor, visual):
    full = {a: torch.zeros(88, 128) for a in IDS}
    prompter = rec.Prompter(processor.tokenizer, PROFILE, TITLES, full)
    prompt = prompter.prompt(dialogue(), IDS[:10])
    assert 0 < prompt.dropped_images < 10 and len(prompt.visual) == 10 - prompt.dropped_images
    assert len(prompt.ids) <= prompter.room
    tiny = PROFILE.model_copy(
        update={"recommendation": PROFILE.recommendation.model_copy(update={"max_length": 60})}
    )
    with pytest.raises(UserError, match="max_length 50"):
        rec.Prompter(processor.tokenizer, tiny, TITLES, full).prompt(dialogue(), IDS[:10])


def test_cached_scores_equal_uncached_ones(model, prompter):
    rows = [
        dialogue(text="i want a red jar"),
        dialogue(text="hello all, a vegan jar please, i am new here."),
    ]
    got = rec.generate_answers(model, prompter, rows, "candidates_st")
    for row, answer in zip(rows, got, strict=True):
        for name, value in zip(row.candidates_st, answer.log_likelihoods, strict=True):
            batch = batch_of(prompter, [rec.Example(row, row.candidates_st, name)])
            assert value == pytest.approx(
                -float(loss_of(model, batch)), abs=5e-4
            )  # mean over the id's tokens
        assert (
            sum(answer.probabilities) == pytest.approx(1, abs=1e-3)
            and answer.scored in row.candidates_st
        )
    other = rec.generate_answers(
        model,
        rec.Prompter(
            prompter.tokenizer, PROFILE, TITLES, {a: -v for a, v in prompter.visual.items()}
        ),
        rows,
        "candidates_st",
    )
    assert other[0].log_likelihoods != got[0].log_likelihoods


def test_generation_does_not_depend_on_the_batch(model, prompter):
    rows = [
        dialogue(text=t)
        for t in ("a jar", "i want a red jar, it should be vegan, please help me to choose.", "hi")
    ]
    together = rec.generate_answers(model, prompter, rows, "candidates_st")
    alone = [rec.generate_answers(model, prompter, [row], "candidates_st")[0] for row in rows]
    assert [a.response for a in together] == [a.response for a in alone]
    assert [a.scored for a in together] == [a.scored for a in alone]


def test_constrained_choice_walks_token_by_token():
    targets = [[1, 2, 9], [1, 3, 9], [4, 5, 9]]
    table = torch.log(torch.tensor([[0.6, 0.1, 1.0], [0.6, 0.2, 1.0], [0.4, 0.9, 1.0]]))
    assert rec.constrained_choice(table, targets) == 1  # 1 beats 4 first, then 3 beats 2
    assert (
        max(range(3), key=lambda i: float(table[i].sum())) == 2
    )  # scoring whole ids chooses another


def test_answers_past_the_id_still_count():
    assert parse_answer(IDS[0] + "9W") == IDS[0]


# ---------------------------------------------------------------- stage 1
def test_student_batch_is_described_by_the_real_tile_counts(processor, model, tmp_path):
    rows = []
    for name, size in (("a", (96, 96)), ("b", (96, 48))):
        picture(*size).save(tmp_path / f"{name}.png")
        rows.append(
            dist.Picture(
                name,
                "Velora jar",
                tmp_path / f"{name}.png",
                "red and plain, round, with a white lid.",
            )
        )
    batch = dist.StudentCollator(model, processor, PROFILE, dist.Pictures(processor, True))(rows)
    slots = (batch["input_ids"] == model.config.image_token_id).sum(1).tolist()
    assert slots == [5, 3]
    assert dist.Student(model)(**batch)["loss"].isfinite()


class Mistral:
    """The tokenizer of LLaVA-v1.6's language model, as `prompts.encode` calls it."""

    def __init__(self) -> None:
        folder = Path(mistral_common.__file__).parent / "data"
        self.spoken = SentencePieceTokenizer(str(folder / "tokenizer.model.v1"))
        self.eos_token_id, self.pad_token_id = self.spoken.eos_id, 0

    def get_added_vocab(self) -> dict[str, int]:
        return {prompts.IMAGE: 32000}

    def convert_tokens_to_ids(self, token: str) -> int:
        return 32000 if token == prompts.IMAGE else -1

    def __call__(self, text: str, add_special_tokens: bool = False):
        first, *rest = text.split(prompts.IMAGE)
        ids = self.spoken.encode(first, bos=add_special_tokens, eos=False)
        for part in rest:
            ids += [32000, *self.spoken.encode(part, bos=False, eos=False)]
        return SimpleNamespace(input_ids=ids)

    def whole(self, text: str) -> list[int]:
        return self.spoken.encode(text, bos=True, eos=False)


def test_targets_are_spelled_as_the_model_would_write_them():
    """The tokens that follow the prompt where prompt and target are one text; the released scripts
    put a space before, which becomes a token of its own."""
    tokenizer, profile = Mistral(), load_profile("paper")
    said = "The jar is red, with a white lid."
    model = SimpleNamespace(config=SimpleNamespace(image_grid_pinpoints=[], vision_config=None))
    collate = dist.StudentCollator(model, SimpleNamespace(tokenizer=tokenizer), profile, None)
    prompt, target = collate.tokens(dist.Picture("A", "Velora jar", Path("A_0.jpg"), said), 5)
    assert target[-1] == tokenizer.eos_token_id and prompt.count(32000) == 5
    assert target[:-1] == tokenizer.whole(f"[/INST] {said}")[-len(target) + 1 :]
    assert tokenizer.spoken.decode(target) == said
    lone = tokenizer(" " + said).input_ids
    assert lone[1:] == target[:-1] and tokenizer.spoken.id_to_piece(lone[0]) == "▁"
    answer = rec.Prompter(tokenizer, profile, TITLES, None).target_ids(IDS[0])
    assert answer[:-1] == tokenizer.whole(f"[/INST] {IDS[0]}")[-len(answer) + 1 :]


@pytest.mark.parametrize("name", ["paper", "t4"])
def test_entire_tokens_of_a_7b_profile_keep_every_image(name):
    """All ten images of 2,928 tokens, whatever the dialogue: it alone is shortened."""
    profile, full = load_profile(name), dict.fromkeys(IDS, torch.zeros(2928, 1))
    rows = [dialogue(text="a jar"), dialogue(text="red " * 5000 + "striped mug")]
    for settings, some in ((profile.arm(ENTIRE), False), (profile, True)):
        prompter = rec.Prompter(Mistral(), settings, TITLES, full)
        found = [prompter.prompt(row, row.candidates_st) for row in rows]
        limit = settings.recommendation.max_length - settings.recommendation.max_new_tokens
        assert all(len(one.ids) <= limit for one in found)
        assert all((one.dropped_images > 0) is some for one in found)  # and a control
    assert profile.arm(ENTIRE).recommendation.at_once(32768) == 1
