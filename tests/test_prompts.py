"""Prompts as tokens: one call for a prompt that fits; what a long one loses, and in which order."""

from __future__ import annotations

import pytest

from lavic_utils.config import UserError, load_profile
from lavic_utils.prompts import (
    IMAGE,
    Candidate,
    describe_prompt,
    recommend_message,
    recommend_prompt,
)

PROMPTS = load_profile("mini").prompts
TURNS = [("seeker", "i want a jar " * 15), ("helper", "how big?"), ("seeker", "red please " * 20)]
ITEMS = [Candidate(f"B00000000{i}", "modern lamp", 5 * (i != 2)) for i in range(4)]


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.calls = tokenizer, 0

    def get_added_vocab(self) -> dict[str, int]:
        return self.tokenizer.get_added_vocab()

    def __call__(self, *args, **options):
        self.calls += 1
        return self.tokenizer(*args, **options)

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)


def test_a_prompt_that_fits_is_made_in_one_call(processor):
    tokenizer = Counting(processor.tokenizer)
    whole = recommend_prompt(tokenizer, PROMPTS, TURNS, ITEMS, 1000)
    assert tokenizer.calls == 1
    slot = tokenizer.convert_tokens_to_ids(IMAGE)
    assert whole.ids.count(slot) == 15 and whole.visual == tuple(
        one.id for one in ITEMS if one.tokens
    )
    assert (whole.dropped_dialogue_tokens, whole.dropped_images, whole.refused) == (0, 0, 0)
    message = PROMPTS.chat.format(message=recommend_message(PROMPTS, TURNS, ITEMS, IMAGE * 5))
    assert whole.ids == processor.tokenizer(message).input_ids
    assert recommend_prompt(tokenizer, PROMPTS, TURNS, ITEMS, len(whole.ids)) == whole


def test_a_long_prompt_loses_words_first_then_images_from_the_last_on(processor):
    tokenizer = processor.tokenizer
    whole = recommend_prompt(tokenizer, PROMPTS, TURNS, ITEMS, 1000)
    seen = []
    for room in range(len(whole.ids) - 1, 30, -1):
        try:
            found = recommend_prompt(tokenizer, PROMPTS, TURNS, ITEMS, room)
        except UserError as error:
            assert f"more than max_length {room}" in str(error)
            break
        assert room - 15 < len(found.ids) <= room  # no more is lost than must be
        assert found.visual == whole.visual[: 3 - found.dropped_images]
        seen.append((found.dropped_images, found.dropped_dialogue_tokens))
        refused = recommend_prompt(tokenizer, PROMPTS, TURNS, ITEMS, room, refuse=True)
        assert (refused.refused == len(whole.ids)) == (found.dropped_images > 0)
    assert {images for images, _ in seen} == {0, 1, 2, 3} and seen[0][1] > 0
    assert [images for images, _ in seen] == sorted(images for images, _ in seen)


def test_text_is_text_and_a_templates_own_mark_is_refused(processor):
    tokenizer, odd = processor.tokenizer, f"{IMAGE}a</s> jar <s>{IMAGE} <unk>"
    turns, items = [("seeker", odd)], [one._replace(title=odd) for one in ITEMS]
    control = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids(IMAGE)}
    assert len(control & set(tokenizer(odd).input_ids)) == 4  # negative control: as it stands
    encoded = recommend_prompt(tokenizer, PROMPTS, turns, items, 1000)
    told = describe_prompt(tokenizer, PROMPTS, odd, 2)
    for ids, start in (
        (encoded.ids, 15),
        (told, 2),
    ):  # three items of five visual tokens; one image
        found = [token for token in ids[1:] if token in control - {tokenizer.unk_token_id}]
        assert found == [tokenizer.convert_tokens_to_ids(IMAGE)] * start
    own = PROMPTS.model_copy(update={"candidate": "{title}{image}{id}<image>"})
    with pytest.raises(UserError, match="a template of the profile holds <image>"):
        recommend_prompt(tokenizer, own, TURNS, ITEMS, 1000)
