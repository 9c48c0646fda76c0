"""Prompts as tokens: the profile's templates, visual placeholders, one policy for long prompts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lavic_utils.config import Prompts, UserError

KEEP_WORDS = 32  # of the dialogue's end, kept before any image is given up
IMAGE = "<image>"  # the token that stands where an image's visual tokens come
Turns = Sequence[tuple[str, str]]  # (role, text)
Items = Sequence["Candidate"]


class Candidate(NamedTuple):
    """An item to choose from; `tokens`: its visual tokens, 0 for one shown by its title alone."""

    id: str
    title: str
    tokens: int = 0


@dataclass(frozen=True)
class Encoded:
    """A prompt for `vision.place`: `visual` names the items whose tokens fill its placeholders, in
    order. `refused`: the tokens it would need, where it is too long (no `ids` then)."""

    ids: list[int]
    visual: tuple[str, ...]
    dropped_dialogue_tokens: int = 0
    dropped_images: int = 0
    refused: int = 0


def encode(tokenizer, text: str, start: bool = False) -> list[int]:
    """Token ids; special start tokens only at the start of a prompt."""
    return tokenizer(text, add_special_tokens=start).input_ids


def plain(tokenizer, text: str) -> str:
    """What somebody wrote, as text: a special token's name in it ("</s>", IMAGE) gets a blank after
    its first character, so that no control token comes of it."""
    for name in filter(str.strip, tokenizer.get_added_vocab()):  # the mini model has "\n" there
        text = text.replace(name, f"{name[0]} {name[1:]}")
    return text


def dialogue_text(prompts: Prompts, turns: Turns) -> str:
    forms = {"seeker": prompts.seeker, "helper": prompts.helper}
    return "".join(forms[role].format(text=text) for role, text in turns)


def recommend_message(prompts: Prompts, turns: Turns, items: Items, image: str = "") -> str:
    """What a model is asked in stage 2, without its chat form: the dialogue, each candidate's
    title, `image` (where it has visual tokens) and id, and the request for one id."""
    lines = ""
    for one in items:
        form = prompts.candidate if one.tokens else prompts.candidate_without_image
        lines += form.format(title=one.title, id=one.id, image=image)
    return prompts.recommend.format(dialogue=dialogue_text(prompts, turns), candidates=lines)


def describe_prompt(tokenizer, prompts: Prompts, title: str, tokens: int) -> list[int]:
    """Stage 1 (paper, section 4.1): the title and an image; the description follows."""
    message = prompts.describe.format(title=plain(tokenizer, title), image=IMAGE * tokens)
    return encode(tokenizer, prompts.chat.format(message=message), start=True)


def shortened(turns: Turns, step: int) -> Turns:
    """The dialogue after `step` cuts: its comments leave one by one, the oldest first (the seeker's
    turns and the last turn stay), then what is left loses its oldest words one by one."""
    gone = [i for i, (role, _) in enumerate(turns[:-1]) if role != "seeker"]
    kept = [turn for i, turn in enumerate(turns) if i not in gone[:step]]
    cut = step - len(gone)
    while cut > 0:
        (role, text), *rest = kept
        words = text.split()
        kept = [(role, " ".join(words[cut:])), *rest] if cut < len(words) else rest
        cut -= len(words)
    return kept


def _ids(tokenizer, prompts: Prompts, turns: Turns, items: Items) -> list[int]:
    """A whole prompt's token ids, an image's placeholder as often as it has visual tokens."""
    message = recommend_message(prompts, turns, items, IMAGE)
    text = encode(tokenizer, prompts.chat.format(message=message), start=True)
    counts = [one.tokens for one in items if one.tokens]
    if not counts:
        return text
    ids, slot = [], tokenizer.convert_tokens_to_ids(IMAGE)
    if text.count(slot) != len(counts):
        raise UserError(f"a template of the profile holds {IMAGE}: write {{image}} in its place")
    for token in text:
        ids += [token] * (counts.pop(0) if token == slot else 1)
    return ids


def recommend_prompt(
    tokenizer, prompts: Prompts, turns: Turns, items: Items, max_length: int, refuse: bool = False
) -> Encoded:
    """Stage 2 (paper, section 4.2): dialogue, then each candidate's title, visual tokens and id.

    Over `max_length` tokens: first the dialogue is `shortened`, no more than it must be, down to
    its last KEEP_WORDS words; then candidates lose their images, the last first, or (`refuse`) the
    prompt is refused: all counted in the result. UserError where even that is too long.
    """
    turns = [(role, plain(tokenizer, text)) for role, text in turns]
    items = [one._replace(title=plain(tokenizer, one.title)) for one in items]
    whole = _ids(tokenizer, prompts, turns, items)
    with_image = [one.id for one in items if one.tokens]
    if len(whole) <= max_length:
        return Encoded(whole, tuple(with_image))
    comments = sum(role != "seeker" for role, _ in turns[:-1])
    words = sum(len(text.split()) for _, text in shortened(turns, comments))
    most = comments + max(0, words - KEEP_WORDS)  # cuts that `shortened` may make
    kept, shown = list(items), list(with_image)
    while (least := len(_ids(tokenizer, prompts, shortened(turns, most), kept))) > max_length:
        if not shown:
            raise UserError(
                f"a prompt needs {least} tokens for its candidates' titles and ids and the last "
                f"{KEEP_WORDS} words of the dialogue, more than max_length {max_length}: raise it"
            )
        if refuse:
            return Encoded([], (), refused=len(whole))
        shown.pop()
        kept = [one if one.id in shown else one._replace(tokens=0) for one in items]

    def fits(cuts: int) -> bool:
        return len(_ids(tokenizer, prompts, shortened(turns, cuts), kept)) <= max_length

    left = shortened(turns, bisect_left(range(most), True, key=fits))
    talk = [len(encode(tokenizer, dialogue_text(prompts, some))) for some in (turns, left)]
    ids, images = _ids(tokenizer, prompts, left, kept), len(with_image) - len(shown)
    return Encoded(ids, tuple(shown), talk[0] - talk[1], images)
