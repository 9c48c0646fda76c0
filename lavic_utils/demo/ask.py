"""A request of one's own, put to a trained LaViC: how likely it finds each candidate."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from PIL import Image
from torch import Tensor

from lavic_utils import data, recommendation, training, vision
from lavic_utils.config import UserError
from lavic_utils.experiment import Experiment
from lavic_utils.keeping import RESULT
from lavic_utils.provenance import kept


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
    are something else, or (but for the mini world) nothing is trained yet.
    """
    ids = [asin for asin, _, _ in candidates]
    if not ids or len(set(ids)) < len(ids):
        found = f"{len(ids)} candidates with {len(set(ids))} different ids"
        raise UserError(f"candidates: {found}; give at least one, and each its own id")
    turns = [("seeker", dialogue)] if isinstance(dialogue, str) else list(dialogue)
    if not turns or not {speaker for speaker, _ in turns} <= {"seeker", "helper"}:
        raise UserError('dialogue: give a text, or pairs of "seeker" or "helper" and a text')
    pictures: dict[str, Image.Image] = {}
    for asin, _, image in candidates:
        if image is None:
            continue
        try:
            given = isinstance(image, Image.Image)
            picture = data.as_rgb(image) if given else data.open_image(image)
        except OSError:
            picture = None
        if picture is None:
            raise UserError(f"candidate {asin}: {image} is no readable image; give another or None")
        pictures[asin] = picture
    run, model = _trained(profile, domain)
    visual: dict[str, Tensor] = {}  # item -> its [CLS] tokens (tiles, hidden size)
    for asin, picture in pictures.items():
        visual |= vision.encode(model, [asin], *vision.pixels(run.processor, [picture]))
    titles = {asin: title for asin, title, _ in candidates}
    prompter = recommendation.Prompter(run.processor.tokenizer, run.profile, titles, visual)
    asked = SimpleNamespace(turns=turns, candidates=tuple(ids))
    (answer,) = recommendation.generate_answers(model, prompter, [asked], "candidates")
    return sorted(zip(ids, answer.probabilities, strict=True), key=lambda pair: -pair[1])


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
