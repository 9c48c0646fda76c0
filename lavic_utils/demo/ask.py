"""A request of one's own, put to a trained LaViC: how likely it finds each candidate."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from lavic_utils import data, recommendation, training, vision
from lavic_utils.config import UserError
from lavic_utils.demo.panel import spelled
from lavic_utils.experiment import Experiment
from lavic_utils.keeping import RESULT
from lavic_utils.prompts import encode
from lavic_utils.provenance import kept

SOME = Field(min_length=1)
TURNS = TypeAdapter(Annotated[list[tuple[Literal["seeker", "helper"], data.Filled]], SOME])
ITEMS = TypeAdapter(Annotated[list[tuple[data.Filled, data.Filled, Any]], SOME])


def recommend(
    dialogue: str | Sequence[tuple[str, str]],
    candidates: Sequence[tuple[str, str, Path | str | Image.Image | None]],
    profile: str = "mini",
    domain: str = "beauty",
) -> list[tuple[str, float]]:
    """How likely the trained LaViC of a profile and domain finds each candidate for a request:
    [(id, probability)], likeliest first.

    `dialogue`: what the seeker says, or [(speaker, text)], a speaker "seeker" or "helper";
    `candidates`: [(id, title, image)], an image a file, a PIL image, or None. UserError where these
    are something else, hold words that the model cannot read, or more than it has room for, or
    (but for the mini world) nothing is trained yet.
    """
    said = [("seeker", dialogue)] if isinstance(dialogue, str) else dialogue
    how = 'dialogue: give a text, or pairs of "seeker" or "helper" and a text'
    turns = _checked(TURNS, said, how)
    items = _checked(ITEMS, candidates, "candidates: give at least one, as (id, title, image)")
    ids = [name for name, _, _ in items]
    if len(set(ids)) < len(ids):
        raise UserError(f"candidates: {len(ids)} with {len(set(ids))} ids; give each its own id")
    pictures = [None if image is None else _picture(name, image) for name, _, image in items]
    run, model = _trained(profile, domain)
    turns = [(who, _words(run, "dialogue", text)) for who, text in turns]
    titles = [_words(run, f"candidate {name}", title) for name, title, _ in items]
    asins = _spellable(run, domain, ids)  # in the candidates' order
    visual: dict[str, Tensor] = {}  # item -> its [CLS] tokens (tiles, hidden size)
    for asin, picture in zip(asins, pictures, strict=True):
        if picture is not None:
            visual |= vision.encode(model, [asin], *vision.pixels(run.processor, [picture]))
    named = dict(zip(asins, titles, strict=True))
    prompter = recommendation.Prompter(run.processor.tokenizer, run.profile, named, visual)
    asked = SimpleNamespace(turns=turns, candidates=asins)
    (answer,) = recommendation.generate_answers(model, prompter, [asked], "candidates")
    if answer.dropped_dialogue_tokens or answer.dropped_images:
        most = run.profile.recommendation.max_length
        lost = f"{answer.dropped_dialogue_tokens} tokens, {answer.dropped_images} pictures"
        raise UserError(f"dialogue: too long by {lost} for the model's {most} tokens; shorten it")
    return sorted(zip(ids, answer.probabilities, strict=True), key=lambda pair: -pair[1])


def _checked(kind: TypeAdapter, value: object, how: str) -> list:
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ", ".join(str(part) for part in first["loc"])
        raise UserError(f"{how} (at {place or 'all'}: {first['msg']})") from None


def _picture(name: str, image: object) -> Image.Image:
    """A candidate's picture in RGB; UserError where it is none that counts."""
    try:
        if isinstance(image, Image.Image):
            picture = data.as_rgb(image) if min(image.size) >= data.MIN_SIDE else None
        else:
            picture = data.open_image(Path(image))
    except (OSError, TypeError):
        picture = None
    if picture is None:
        there = isinstance(image, (str, Path)) and not Path(image).is_file()
        why = "is not there" if there else "is no readable image"
        raise UserError(f"candidate {name}: {str(image)[:200]} {why}; give another or None")
    return picture


def _words(run: Experiment, where: str, text: str) -> str:
    """The text as the model can read it: a tiny model knows few words."""
    text, unknown = spelled(run.processor.tokenizer, text)
    if unknown:
        why = f"the {run.profile.name} model cannot read {', '.join(unknown)}"
        raise UserError(f"{where}: {why}; say it in other words")
    return text


def _spellable(run: Experiment, domain: str, ids: Sequence[str]) -> list[str]:
    """What the candidates are called in the prompt: their own ids, or the catalogue's where the
    model has no tokens for one of them and so could not tell them apart."""
    tokenizer = run.processor.tokenizer
    known = [tokenizer.unk_token_id not in encode(tokenizer, name) for name in ids]
    if all(known) and all(re.fullmatch("[A-Z0-9]{10}", name) for name in ids):
        return list(ids)
    return run.domain_catalogue(domain)[0][: len(ids)]


@functools.lru_cache(maxsize=1)
def _trained(profile: str, domain: str):
    """(Experiment, its model with the adapters of both stages, which are on different layers)."""
    data.dialogue_file("", domain, "test")  # says which domains there are
    run = Experiment(profile)
    tuned = run.tuned_folder("LaViC", domain)
    if run.profile.world:
        run.prepare().tune("LaViC", domain)
    elif not all(kept(place / RESULT) for place in (run.student_folder(), tuned)):
        todo = f"python -m lavic_utils run LaViC --domain {domain} --profile {profile}"
        raise UserError(f"LaViC is not trained for {domain} here: {todo}")
    model = training.load_adapter(run.model(), run.student_folder() / "adapter")
    model.load_adapter(str(tuned / "adapter"), adapter_name="recommendation")
    model.base_model.set_adapter(["default", "recommendation"])
    return run, model.eval().requires_grad_(False)
