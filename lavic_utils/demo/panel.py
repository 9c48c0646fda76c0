"""Trying a trained run: a request, its ten candidates, three methods' answers, changed pictures.

Plain data: the page (`page`) and the widget of notebook 06 (`widget`) show it.
"""

from __future__ import annotations

import functools
import io
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from lavic_utils import data, figures, loading, methods, retrieval, training, vision
from lavic_utils.config import DOMAINS, UserError
from lavic_utils.distillation import describe
from lavic_utils.prompts import encode
from lavic_utils.recommendation import Answer, generate_answers

if TYPE_CHECKING:
    from lavic_utils.experiment import Experiment

METHODS = {  # and the [CLS] vectors that each sees
    "LaViC": "distilled",
    "LaViC w/o images": None,
    "LaViC w/o self-distillation": "base",
}
STUDENT = "default"  # the stage-1 adapter's name in the one model that holds all adapters
MAX_WORDS = 200


@dataclass(frozen=True)
class Case:
    """A request with its ten candidates, and what was changed.

    `shows`: item -> the picture it shows instead of its own (another item's id, or PNG bytes);
    `hidden`: item -> tiles whose [CLS] vector is taken out (0: the whole image, then the crops);
    `notes`: lines that whoever asked should read; `unknown`: words of the request that the model
    cannot read, so that its answer is a guess and no likelihood is shown.
    """

    dialogue: data.Dialogue
    candidates: tuple[str, ...]
    notes: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    shows: Mapping[str, str | bytes] = field(default_factory=dict)
    hidden: Mapping[str, frozenset[int]] = field(default_factory=dict)

    def picture(self, asin: str) -> str | bytes:
        return self.shows.get(asin, asin)

    def changed(self, asin: str) -> bool:
        return self.picture(asin) != asin or bool(self.hidden.get(asin))

    def altered(self) -> list[str]:
        return [asin for asin in self.candidates if self.changed(asin)]

    def swap(self, one: str, other: str) -> Case:
        """The same with the pictures of two candidates exchanged; titles and ids stay."""
        if not {one, other} <= set(self.candidates):
            raise UserError(f"two of the ten candidates swap pictures, not {one!r} and {other!r}")
        shows = {**self.shows, one: self.picture(other), other: self.picture(one)}
        return replace(self, shows=shows)

    def hide(self, asin: str, tiles: Iterable[int]) -> Case:
        return replace(self, hidden={**self.hidden, asin: frozenset(tiles)})

    def show(self, asin: str, png: bytes) -> Case:
        return replace(self, shows={**self.shows, asin: png})

    def reset(self) -> Case:
        return replace(self, shows={}, hidden={})


class Panel:
    """One run, ready to answer: one model that holds every adapter, used by one visitor at a time.

    Trains nothing: see `prepare`. UserError where an adapter is missing or of another model.
    """

    def __init__(self, run: Experiment) -> None:
        self.run, self.domains, self._lock = run, domains(run), threading.RLock()
        self.model = training.load_adapter(run.model(), run.folder / "stage1" / "adapter")
        for method in METHODS:
            for domain in self.domains:
                folder, name = run.tuned_folder(method, domain) / "adapter", _name(method, domain)
                loaded = self.model.load_adapter(str(folder), adapter_name=name)
                if any(f".{name}." in key for key in loaded.missing_keys):
                    raise UserError(f"{folder}: adapter weights are missing; train it again")
        self.model.eval().requires_grad_(False)
        self._cls_vectors = functools.lru_cache(maxsize=2048)(self._encode)

    # ------------------------------------------------------------ what can be asked
    def example(self, domain: str, number: int) -> Case:
        """Test dialogue `number` (from 0) with its own candidates."""
        rows = self.run.dialogues(domain, "test")
        if not 0 <= number < len(rows):
            raise UserError(f"{domain} has test dialogues 0 to {len(rows) - 1}, not {number}")
        return Case(rows[number], getattr(rows[number], self.run.profile.candidates))

    def examples(self, domain: str) -> dict[str, int]:
        """Twelve test dialogues whose list holds a right answer: what is sought -> number."""
        found: dict[str, int] = {}
        for number, dialogue in enumerate(self.run.dialogues(domain, "test")):
            candidates = getattr(dialogue, self.run.profile.candidates)
            if set(dialogue.gt_items) & set(candidates) and len(found) < 12:
                sought = " ".join(text for who, text in dialogue.turns if who == "seeker")
                found[f"{number} · {sought[:90]}"] = number
        return found

    def request(self, domain: str, text: str) -> Case:
        """A typed request, with the ten titles of the domain's catalogue that BM25 ranks first.

        They stand in no particular order, as in the data. UserError for an empty or very long text,
        and where nothing in it can be read or found.
        """
        text = " ".join(re.sub(r"[<>]", " ", text).split())
        count = len(text.split())
        if not 0 < count <= MAX_WORDS or len(text) > 10 * MAX_WORDS:
            why = f"a request of 1 to {MAX_WORDS} words is expected; this one has {count}"
            raise UserError(why)
        text, unknown = spelled(self.run.processor.tokenizer, text)
        asins, titles = self.run.domain_catalogue(domain)
        best = [asins[i] for i in retrieval.bm25_rank([text], titles)[0][:10]]
        ten = tuple(random.Random(f"{self.run.seed}/candidates/0").sample(best, len(best)))
        notes = [f"The ten candidates: what BM25 finds among the {len(asins)} {domain} titles."]
        words = re.compile(r"\w\w+")
        if not set(words.findall(text.lower())) & set(words.findall(" ".join(titles).lower())):
            if unknown:
                kinds = sorted({title.split()[-1] for title in titles})[:6]
                why = f"no {domain} title has a word of it, and the model cannot read"
                raise UserError(f"not asked: {why} {', '.join(unknown)}; try {', '.join(kinds)}")
            notes = [f"The ten candidates are arbitrary: no {domain} title has a word of this."]
        if unknown:
            what = f"The {self.run.profile.name} model cannot read {', '.join(unknown)}"
            then = "so each model only guesses from the rest, and no likelihoods are shown"
            notes.append(f"{what}, {then}.")
        said = {"context": f"<submission>{text}</submission>", "gt": "", "gt_items": ()}
        any_dialogue = self.run.dialogues(domain, "test")[0]
        dialogue = any_dialogue.model_copy(update={**said, self.run.profile.candidates: ten})
        return Case(dialogue, ten, tuple(notes), tuple(unknown))

    # ------------------------------------------------------------ what is seen
    def image(self, picture: str | bytes) -> Image.Image | None:
        """An item's picture, or a given one; None where the item's is missing or corrupt."""
        if isinstance(picture, bytes):
            return Image.open(io.BytesIO(picture), formats=("PNG",)).convert("RGB")
        return data.open_image(data.image_file(self.run.root, picture))

    def _encode(self, picture: str | bytes, kind: str) -> Tensor | None:
        image = self.image(picture)
        if image is None:
            return None
        values, sizes = vision.pixels(self.run.processor, [image])
        with self._lock:
            self.model.set_adapter(STUDENT)
            with self.model.disable_adapter() if kind == "base" else nullcontext():
                return vision.encode(self.model, [0], values, sizes)[0]

    def visual(self, case: Case, kind: str) -> dict[str, Tensor]:
        """The candidates' [CLS] vectors, (tiles left, hidden size) each; an item may have none.

        `kind`: "distilled" (as stage 1 left them) or "base".
        """
        found = {}
        for asin in case.candidates:
            vectors = self._cls_vectors(case.picture(asin), kind)
            count = 0 if vectors is None else len(vectors)
            left = [k for k in range(count) if k not in case.hidden.get(asin, ())]
            if left:
                found[asin] = vectors[left]
        return found

    def tiles(self, case: Case, asin: str) -> list[Image.Image]:
        """The tiles of the item's picture, hidden ones too, as the model is shown them."""
        image = self.image(case.picture(asin))
        if image is None:
            return []
        tiles = figures.tile_pictures(self.run.processor, image)
        return [Image.fromarray((255 * tile).astype("uint8")) for tile in tiles]

    # ------------------------------------------------------------ what is said
    def answer(self, case: Case) -> dict[str, Answer]:
        """What each method answers, and how likely it thought each candidate."""
        found, which = {}, self.run.profile.candidates
        for method, kind in METHODS.items():
            prompter = self.run.prompter(self.visual(case, kind) if kind else None)
            with self._lock:
                self.model.set_adapter(_name(method, case.dialogue.domain))
                found[method] = generate_answers(self.model, prompter, [case.dialogue], which)[0]
        return found

    def describe(self, case: Case, asin: str) -> str:
        """What the student of stage 1 says of the item, from its title and the vectors left.

        "" where none is left: no picture, or every tile hidden.
        """
        vectors, run = self.visual(case, "distilled").get(asin), self.run
        if vectors is None:
            return ""
        pixels = vision.pixels(run.processor, [self.image(case.picture(asin))])
        given = (self.model, run.processor, run.profile, [run.titles[asin]], [pixels])
        with self._lock:
            self.model.set_adapter(STUDENT)
            return describe(*given, lambda *_: [vectors])[0]

    def sentence(self, case: Case, answers: Mapping[str, Answer]) -> str:
        """The answers in words, for whoever cannot see the picture."""
        parts = []
        for method, found in answers.items():
            if found.recommended in case.candidates:
                weight = found.probabilities[case.candidates.index(found.recommended)]
                title = self.run.titles[found.recommended]
                said = f"guesses {title}" if case.unknown else f"chooses {title} ({weight:.2f})"
            else:
                said = f'writes "{found.response[:40]}", which is no candidate\'s id'
            parts.append(f"{method} {said}")
        return "; ".join(parts) + "."

    def figure(self, case: Case) -> figures.Kept:
        """The case as a picture: `figures.case_figure`, beside the answers before its change."""
        changed = case.altered()
        now, before = self.answer(case), self.answer(case.reset()) if changed else {}
        images = {asin: self.image(case.picture(asin)) for asin in case.candidates}
        rows = ({name: vars(answer) for name, answer in some.items()} for some in (now, before))
        fig = figures.case_figure(self.run, case.dialogue, *rows, images, changed)
        words = f"framed: a right answer; {'dotted: before the change; ' if changed else ''}"
        fig.text(0.9, 0.01, words + self.run.profile.tier, ha="right")
        return figures.shown(fig, self.sentence(case, now))


def tile_name(tile: int) -> str:
    return f"crop {tile}" if tile else "whole"


def _name(method: str, domain: str) -> str:
    """The name of an adapter of stage 2 in the one model."""
    return f"{methods.slug(method)}_{domain}"


def domains(run: Experiment) -> list[str]:
    """The domains that have test dialogues here. UserError where none has."""
    found = [d for d in DOMAINS if data.dialogue_file(run.root, d, "test").is_file()]
    if not found:
        raise UserError(f"{run.root}: no test dialogues of any domain; {data.GET_DATA}")
    return found


def prepare(run: Experiment, say: Callable[[str], None] = print) -> None:
    """Make what `Panel` reads, stage 1 and each method and domain; what is kept is read back.

    UserError where something is missing and cannot be made here: no data or no model.
    """
    stages = {run.folder / "stage1": run.distil}
    for method in METHODS:
        for domain in domains(run):
            stages[run.tuned_folder(method, domain)] = functools.partial(run.tune, method, domain)
    missing = [folder for folder in stages if not (folder / "result.json").is_file()]
    if missing:
        run.need_training_data()
        loading.source(run.profile)
        plan = f"for how long, see python -m lavic_utils plan --profile {run.profile.name}"
        takes = "at most 6 minutes on 2 cores" if run.profile.world else plan
        say(f"training what is not there yet, {len(missing)} of {len(stages)} parts ({takes}):")
    for folder, make in stages.items():
        start = time.monotonic()
        make()
        seconds = time.monotonic() - start
        if folder in missing or seconds > 1:  # it was there, but out of date
            say(f"  {folder.relative_to(run.folder).as_posix()}: {seconds:.0f} s")


def spelled(tokenizer, text: str) -> tuple[str, list[str]]:
    """The text with words in the case that the tokenizer knows, and the words it does not know."""

    def known(word: str) -> bool:
        return word != "" and tokenizer.unk_token_id not in encode(tokenizer, word)

    words, unknown = [], []
    for word in text.split():
        bare = word.strip("()[]\"'*")
        forms = (word, word.lower(), word.capitalize(), bare, bare.lower(), bare.capitalize())
        right = [form for form in forms if known(form)]
        words.append(right[0] if right else word)
        if not right:
            unknown.append(word.strip(".,:?!;") or word)
    return " ".join(words), list(dict.fromkeys(unknown))
