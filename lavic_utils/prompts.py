"""Prompts as tokens: templates of the profile, visual placeholders, and one stated policy for prompts that are too long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lavic_utils.config import Prompts, UserError

KEEP_DIALOGUE = 48  # tokens of the dialogue's end that are kept before any image is given up


@dataclass(frozen=True)
class Encoded:
    """A prompt ready for `vision.place`: `visual` names the items whose tokens fill the placeholders, in order."""

    ids: list[int]
    visual: tuple[str, ...]
    dropped_dialogue_tokens: int = 0
    dropped_images: int = 0


def encode(tokenizer, text: str, start: bool = False) -> list[int]:
    """Token ids; special start tokens only at the start of a prompt."""
    return tokenizer(text, add_special_tokens=start).input_ids


def dialogue_text(prompts: Prompts, turns: Sequence[tuple[str, str]]) -> str:
    return "".join((prompts.seeker if role == "seeker" else prompts.helper).format(text=text) for role, text in turns)


def describe_prompt(tokenizer, prompts: Prompts, title: str, tokens: int, image: str = "<image>") -> list[int]:
    """Stage 1: the title and an image of `tokens` visual tokens; the description follows."""
    return encode(tokenizer, prompts.describe.format(title=title, image=image * tokens), start=True)


def recommend_prompt(tokenizer, prompts: Prompts, turns: Sequence[tuple[str, str]], candidates: Sequence[str],
                     titles: Mapping[str, str], tokens: Mapping[str, int] | None, max_length: int,
                     image: str = "<image>") -> Encoded:
    """Stage 2: the dialogue, then each candidate's title, visual tokens (`tokens[asin]` of them) and id.

    Too long for `max_length`: the dialogue loses its oldest tokens, down to its last 48; if that is not enough,
    candidates lose their images from the last on (their titles stay); both are counted in the result. The ids, the
    titles and the request to answer are never cut: a prompt that cannot hold them raises UserError with the numbers.
    """
    head, tail = prompts.recommend.split("{dialogue}")
    start, talk = encode(tokenizer, head, start=True), encode(tokenizer, dialogue_text(prompts, turns))
    shown = [asin for asin in candidates if tokens and tokens.get(asin)]
    dropped = 0
    while True:
        lines = "".join(
            prompts.candidate.format(title=titles[a], id=a, image=image * tokens[a]) if a in shown
            else prompts.candidate_without_image.format(title=titles[a], id=a) for a in candidates)
        end = encode(tokenizer, tail.format(candidates=lines))
        room = max_length - len(start) - len(end)
        if room >= min(KEEP_DIALOGUE, len(talk)):
            break
        if not shown:
            raise UserError(f"a prompt needs {len(start) + len(end)} tokens for its candidates' titles and ids alone and "
                            f"leaves no room for the dialogue in max_length {max_length}; raise max_length in the profile")
        shown, dropped = shown[:-1], dropped + 1
    cut = max(0, len(talk) - room)
    return Encoded(start + talk[cut:] + end, tuple(shown), cut, dropped)
