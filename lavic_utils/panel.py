"""Trying a trained run: a request, its ten candidates, what LaViC and two of its ablations answer, and what a swapped,
hidden or given picture changes. Plain data: the page (`demo`) and the widget of notebook 06 (`widget`) show it.
"""

from __future__ import annotations

import functools
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import pandas as pd
from PIL import Image
from torch import Tensor

from lavic_utils import data, distillation, methods, recommendation, retrieval, training, vision
from lavic_utils.config import DOMAINS, UserError
from lavic_utils.recommendation import Answer
from lavic_utils.runs import Run

METHODS = {"LaViC": "distilled", "LaViC w/o images": None, "LaViC w/o self-distillation": "base"}  # and what each sees
STUDENT = "default"  # the stage-1 adapter's name in the one model that holds all adapters
MAX_WORDS = 200
MINUTES = 6  # training everything for the mini profile on 2 cores, rounded up


@dataclass(frozen=True)
class Case:
    """A request with its ten candidates, and what was changed. `shows`: item -> the picture it shows instead of its own
    (another item's id, or PNG bytes); `hidden`: item -> tiles whose [CLS] vector is taken out (0: the whole image, then
    the crops). `notes`: lines that whoever asked should read."""

    dialogue: data.Dialogue
    candidates: tuple[str, ...]
    notes: tuple[str, ...] = ()
    shows: Mapping[str, str | bytes] = field(default_factory=dict)
    hidden: Mapping[str, frozenset[int]] = field(default_factory=dict)

    def picture(self, asin: str) -> str | bytes:
        return self.shows.get(asin, asin)

    def swap(self, one: str, other: str) -> Case:
        """The same with the pictures of two items exchanged; title and id stay where they are. UserError for others'."""
        if not {one, other} <= set(self.candidates):
            raise UserError(f"two of the ten candidates are expected to swap pictures, not {one!r} and {other!r}")
        return replace(self, shows={**self.shows, one: self.picture(other), other: self.picture(one)})

    def hide(self, asin: str, tiles: Iterable[int]) -> Case:
        return replace(self, hidden={**self.hidden, asin: frozenset(tiles)})

    def show(self, asin: str, png: bytes) -> Case:
        return replace(self, shows={**self.shows, asin: png})

    def reset(self) -> Case:
        return replace(self, shows={}, hidden={})


class Panel:
    """One run, ready to answer: one model with every adapter (the student's and each method's and domain's), used by one
    visitor at a time. Makes nothing: see `prepare`. Raises UserError where an adapter is missing or of another model."""

    def __init__(self, run: Run) -> None:
        self.run, self.domains, self._lock = run, domains(run), threading.RLock()
        self.model = training.load_adapter(run.model(), run.folder / "stage1" / "adapter")
        for method in METHODS:
            for domain in self.domains:
                folder = run.folder / "stage2" / methods.slug(method) / domain / "adapter"
                found = self.model.load_adapter(str(folder), adapter_name=_name(method, domain))
                if lost := [key for key in found.missing_keys if f".{_name(method, domain)}." in key]:
                    raise UserError(f"{folder}: {len(lost)} adapter weights are missing (first: {lost[0]}); train it again")
        self.model.eval().requires_grad_(False)
        self._vectors = functools.lru_cache(maxsize=2048)(self._encode)

    # ------------------------------------------------------------ what can be asked
    def example(self, domain: str, number: int) -> Case:
        """Test dialogue `number` (from 0) with its own candidate list. UserError where there is none."""
        rows = self.run.dialogues(domain, "test")
        if not 0 <= number < len(rows):
            raise UserError(f"{domain} has test dialogues 0 to {len(rows) - 1}, not {number}")
        return Case(rows[number], getattr(rows[number], self.run.profile.candidates))

    def examples(self, domain: str, count: int = 12) -> dict[str, int]:
        """The first test dialogues whose list holds a right answer: what the seeker says -> number."""
        rows, which = self.run.dialogues(domain, "test"), self.run.profile.candidates
        good = [i for i, d in enumerate(rows) if set(d.gt_items) & set(getattr(d, which))][:count]
        return {f"{i} · {' '.join(text for who, text in rows[i].turns if who == 'seeker')[:90]}": i for i in good}

    def request(self, domain: str, text: str, retriever: str = "BM25") -> Case:
        """A typed request, with the ten titles of the domain's catalogue that `retriever` ranks first, in no particular
        order, as in the data. UserError for an empty or very long one."""
        text, unknown = spelled(self.run.processor.tokenizer, " ".join(re.sub(r"[<>]", " ", text).split()))
        if not text or len(text.split()) > MAX_WORDS or len(text) > 10 * MAX_WORDS:
            raise UserError(f"a request of 1 to {MAX_WORDS} words is expected; this one has {len(text.split())}")
        asins, titles = self.run.domain_catalogue(domain)
        order = retrieval.rank(retriever, [text], titles)
        ten = tuple(retrieval.candidate_lists(order, asins, seed=self.run.seed)[0])
        notes = [f"The ten candidates: what {retriever} finds for the request among the {len(asins)} {domain} titles."]
        words = set(re.findall(r"\w+", " ".join(titles).lower()))
        if retriever == "BM25" and words.isdisjoint(re.findall(r"\w\w+", text.lower())):
            notes = [f"No {domain} title shares a word with the request, so the ten candidates are arbitrary."]
        if unknown:
            notes.append(f"Outside the vocabulary of this {self.run.profile.name} model, which reads each as \"unknown\" and "
                         f"answers from the rest: {', '.join(unknown)}.")
        dialogue = data.Dialogue.model_construct(
            domain=domain, split="typed", line=0, context=f"<submission>{text}</submission>", context_items=(), gt="",
            gt_items=(), **{self.run.profile.candidates: ten})
        return Case(dialogue, ten, tuple(notes))

    # ------------------------------------------------------------ what is seen
    def image(self, picture: str | bytes) -> Image.Image | None:
        """The picture of an item, or a given one; None where the item's is missing or corrupt."""
        if isinstance(picture, bytes):
            return Image.open(io.BytesIO(picture), formats=("PNG",)).convert("RGB")
        return data.open_image(data.image_file(self.run.root, picture))

    def _encode(self, picture: str | bytes, kind: str) -> Tensor | None:
        if (image := self.image(picture)) is None:
            return None
        with self._lock:
            self.model.set_adapter(STUDENT)
            values, sizes = vision.pixels(self.run.processor, [image])
            if kind == "distilled":
                return vision.encode(self.model, [0], values, sizes)[0]
            with self.model.disable_adapter():
                return vision.encode(self.model, [0], values, sizes)[0]

    def tiles(self, case: Case, asin: str) -> list[Image.Image]:
        """The tiles of the item's picture, hidden ones too, as the model is shown them (none without a picture)."""
        if (image := self.image(case.picture(asin))) is None:
            return []
        values, sizes = vision.pixels(self.run.processor, [image])
        real, _ = vision.real_tiles(self.model, values, sizes)
        scaled = (255 * (real - real.min()) / (real.max() - real.min()).clamp(min=1e-6)).byte().cpu().permute(0, 2, 3, 1)
        return [Image.fromarray(tile.numpy()) for tile in scaled]

    def visual(self, case: Case, kind: str) -> dict[str, Tensor]:
        """[CLS] vectors of the candidates as the case shows them: "distilled" or "base", (tiles left, hidden size) each;
        an item that shows nothing is left out."""
        found = {a: self._vectors(case.picture(a), kind) for a in case.candidates}
        kept = {a: v[_left(len(v), case.hidden.get(a, ()))] for a, v in found.items() if v is not None}
        return {a: v for a, v in kept.items() if len(v)}

    # ------------------------------------------------------------ what is said
    def answer(self, case: Case) -> dict[str, Answer]:
        """What each method answers, and how likely it thought each candidate."""
        found = {}
        for method, kind in METHODS.items():
            prompter = self.run.prompter(self.visual(case, kind) if kind else None)
            with self._lock:
                self.model.set_adapter(_name(method, case.dialogue.domain))
                found[method] = recommendation.answer(self.model, prompter, [case.dialogue], self.run.profile.candidates)[0]
        return found

    def describe(self, case: Case, asin: str) -> str:
        """What the student says of the item's picture, from the title and the [CLS] vectors that are left ("" without one)."""
        image, title = self.image(case.picture(asin)), self.run.titles[asin]
        if image is None:
            return ""

        def left(model, values: Tensor, sizes: Tensor) -> list[Tensor]:
            return [v[_left(len(v), case.hidden.get(asin, ()))] for v in vision.cls_tokens(model, values, sizes)]
        with self._lock:
            self.model.set_adapter(STUDENT)
            pictures = [vision.pixels(self.run.processor, [image])]
            return distillation.describe(self.model, self.run.processor, self.run.profile, [title], pictures, left)[0]

    def table(self, case: Case, now: Mapping[str, Answer], before: Mapping[str, Answer] | None = None) -> pd.DataFrame:
        """One row a candidate: title, whose picture it shows, tiles hidden, and each method's likelihood of its id (and
        what it was before)."""
        def shown(asin: str) -> str:
            picture = case.picture(asin)
            return "a given picture" if isinstance(picture, bytes) else "its own" if picture == asin else picture
        frame = pd.DataFrame({"title": [self.run.titles[a] for a in case.candidates],
                              "picture": [shown(a) for a in case.candidates],
                              "tiles hidden": [len(case.hidden.get(a, ())) for a in case.candidates]},
                             index=list(case.candidates))
        for name, answers in (("", now), (", before", before or {})):
            for method, found in answers.items():
                frame[method + name] = found.probabilities
        return frame

    def sentence(self, case: Case, now: Mapping[str, Answer]) -> str:
        """The answers in words, for whoever cannot see the picture."""
        def choice(found: Answer) -> str:
            if found.recommended not in case.candidates:
                return f"writes \"{found.response[:40]}\", which is no candidate's id"
            weight = found.probabilities[case.candidates.index(found.recommended)]
            return f"chooses {self.run.titles[found.recommended]} ({weight:.2f})"
        return "; ".join(f"{method} {choice(found)}" for method, found in now.items()) + "."


def _name(method: str, domain: str) -> str:
    return f"{methods.slug(method)}_{domain}"


def _left(tiles: int, hidden: Iterable[int]) -> list[int]:
    return [k for k in range(tiles) if k not in hidden]


def domains(run: Run) -> list[str]:
    """The domains that have test dialogues here. UserError where none has."""
    found = [d for d in DOMAINS if data.dialogue_file(run.root, d, "test").is_file()]
    if not found:
        raise UserError(f"{run.root}: no test dialogues of any domain; {data.GET_DATA}")
    return found


def prepare(run: Run, say: Callable[[str], None] = print) -> None:
    """Make what `Panel` reads and is not there, and say it: stage 1, then each method and domain. UserError where that
    cannot be made here: no data or no model."""
    def fresh(folder, **what) -> bool:
        path = folder / "result.json"
        return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("key") == run.key(**what)

    wanted = [] if fresh(run.folder / "stage1", stage="distil") else [("stage 1", run.distil)]
    wanted += [(f"{m}, {d}", functools.partial(run.tune, m, d)) for m in METHODS for d in domains(run)
               if not fresh(run.folder / "stage2" / methods.slug(m) / d, stage="tune", method=m, domain=d)]
    if not wanted:
        return
    run.need_training_data()
    vision.source(run.profile)
    takes = f"at most {MINUTES} minutes on 2 cores" if run.profile.world else \
        f"for how long, see python -m lavic_utils plan --profile {run.profile.name}"
    say(f"training what is not there yet, {len(wanted)} of {1 + len(METHODS) * len(domains(run))} parts ({takes}):")
    for what, make in wanted:
        start = time.monotonic()
        make()
        say(f"  {what}: {time.monotonic() - start:.0f} s")


def spelled(tokenizer, text: str) -> tuple[str, list[str]]:
    """The text with words in the case in which the tokenizer knows them, and the words that it does not know in any."""
    def known(word: str) -> bool:
        return tokenizer.unk_token_id not in tokenizer(word, add_special_tokens=False).input_ids

    def mend(word: str) -> str:
        bare = word.strip("()[]\"'*")
        return next((w for one in (word, bare) for w in (one, one.lower(), one.capitalize()) if w and known(w)), word)
    words = [mend(word) for word in text.split()]
    return " ".join(words), list(dict.fromkeys(word.strip(".,:?!;") or word for word in words if not known(word)))
