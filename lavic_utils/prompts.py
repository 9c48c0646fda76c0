"""Prompts as tokens: templates of the profile, visual placeholders, and one stated policy for prompts that are too long."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lavic_utils.config import Prompts, UserError

KEEP_WORDS = 32  # of the dialogue's end, kept before any image is given up
Turns = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Encoded:
    """A prompt ready for `vision.place`: `visual` names the items whose tokens fill the placeholders, in order.
    `refused`: the tokens it would need, where it does not fit and is not to be asked (`ids` is empty then)."""

    ids: list[int]
    visual: tuple[str, ...]
    dropped_dialogue_tokens: int = 0
    dropped_images: int = 0
    refused: int = 0


def encode(tokenizer, text: str, start: bool = False) -> list[int]:
    """Token ids; special start tokens only at the start of a prompt."""
    return tokenizer(text, add_special_tokens=start).input_ids


def dialogue_text(prompts: Prompts, turns: Turns) -> str:
    return "".join(
        (prompts.seeker if role == "seeker" else prompts.helper).format(text=text)
        for role, text in turns
    )


def recommend_message(
    prompts: Prompts,
    turns: Turns,
    candidates: Sequence[str],
    titles: Mapping[str, str],
    shown: Sequence[str] = (),
    image: str = "",
) -> str:
    """What a model is asked in stage 2, without its chat form: the dialogue, then title, `image` (for the items `shown`)
    and id of each candidate, and the request to answer with one id."""
    lines = "".join(
        prompts.candidate.format(title=titles[a], id=a, image=image)
        if a in shown
        else prompts.candidate_without_image.format(title=titles[a], id=a)
        for a in candidates
    )
    return prompts.recommend.format(dialogue=dialogue_text(prompts, turns), candidates=lines)


def describe_prompt(
    tokenizer, prompts: Prompts, title: str, tokens: int, image: str = "<image>"
) -> list[int]:
    """Stage 1: the title and an image of `tokens` visual tokens; the description follows."""
    return encode(
        tokenizer,
        prompts.chat.format(message=prompts.describe.format(title=title, image=image * tokens)),
        start=True,
    )


def shortened(turns: Turns, step: int) -> Turns:
    """The dialogue after `step` cuts: its comments leave one by one, the oldest first (the seeker's turns and the last turn
    stay), then what is left loses its oldest words one by one."""
    gone = [i for i, (role, _) in enumerate(turns[:-1]) if role != "seeker"]
    kept = [turn for i, turn in enumerate(turns) if i not in gone[:step]]
    cut = step - len(gone)
    while cut > 0:
        (role, text), *rest = kept
        words = text.split()
        kept = [(role, " ".join(words[cut:])), *rest] if cut < len(words) else rest
        cut -= len(words)
    return kept


def _steps(turns: Turns) -> int:
    """How many cuts `shortened` may make: KEEP_WORDS words stay."""
    comments = sum(role != "seeker" for role, _ in turns[:-1])
    words = sum(
        len(text.split())
        for i, (role, text) in enumerate(turns)
        if role == "seeker" or i == len(turns) - 1
    )
    return comments + max(0, words - KEEP_WORDS)


def recommend_prompt(
    tokenizer,
    prompts: Prompts,
    turns: Turns,
    candidates: Sequence[str],
    titles: Mapping[str, str],
    tokens: Mapping[str, int] | None,
    max_length: int,
    image: str = "<image>",
    overflow: Literal["shorten", "refuse"] = "shorten",
) -> Encoded:
    """Stage 2: the dialogue, then each candidate's title, visual tokens (`tokens[asin]` of them) and id.

    Too long for `max_length`: the dialogue is `shortened`, no more than it must be, down to its last KEEP_WORDS words; if
    that is not enough, candidates lose their images from the last on (their titles stay), or with overflow "refuse" the
    prompt is refused; all is counted in the result. The ids, the titles and the request to answer are never cut: a
    prompt that cannot hold them raises UserError with the numbers.
    """
    slot = tokenizer.convert_tokens_to_ids(image) if tokens else None
    shown = [asin for asin in candidates if tokens and tokens.get(asin)]

    def length(step: int) -> int:
        return len(ids(step)) + sum(tokens[a] - 1 for a in shown) if tokens else len(ids(step))

    def ids(step: int) -> list[int]:
        message = recommend_message(
            prompts, shortened(turns, step), candidates, titles, shown, image
        )
        return encode(tokenizer, prompts.chat.format(message=message), start=True)

    most, every = _steps(turns), len(shown)
    while (least := length(most)) > max_length and shown:
        if overflow == "refuse":
            return Encoded([], (), refused=length(0))
        shown.pop()
    if least > max_length:
        raise UserError(
            f"a prompt needs {least} tokens for its candidates' titles and ids and the last {KEEP_WORDS} words of "
            f"the dialogue, more than max_length {max_length}; raise max_length in the profile"
        )
    step = bisect_left(range(most), True, key=lambda step: length(step) <= max_length)
    counts = iter([tokens[a] for a in shown] if tokens else ())
    filled = [token for t in ids(step) for token in ([t] * next(counts) if t == slot else [t])]
    talk = [
        len(encode(tokenizer, dialogue_text(prompts, some)))
        for some in (turns, shortened(turns, step))
    ]
    return Encoded(filled, tuple(shown), talk[0] - talk[1] if step else 0, every - len(shown))
