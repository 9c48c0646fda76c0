"""The 19 methods of the paper's tables as one registry: each answers the same dialogues with the same candidates.

A new method is one class with `answer` and one entry in METHODS; `run`, `table`, `evaluate` and the notebooks then know it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor

from lavic_utils import openmodels, prompts, recommendation, retrieval, vision
from lavic_utils.config import UserError, results_dir
from lavic_utils.data import Dialogue, image_file
from lavic_utils.encoders import ENCODERS
from lavic_utils.evaluation import parse_answer
from lavic_utils.hub import HubModel, fingerprint
from lavic_utils.recommendation import Answer
from lavic_utils.remote import chat_api as endpoint
from lavic_utils.remote import proprietary

if TYPE_CHECKING:
    from lavic_utils.runs import Run

TITLE, BOTH = "item title", "item title and image"
Control = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Method:
    """A row of a table. `chooses`: it picks one of the ten candidates; False: it ranks the domain's whole catalogue."""

    name: str
    inputs: str = TITLE
    family: str = "generative"
    chooses: ClassVar[bool] = True

    def needs(self, run: Run) -> str:
        """What must be there for it to run, in words."""
        return "nothing beyond the installed packages"

    def reason(self, run: Run) -> str | None:
        """Why it cannot run here and now, with the command that helps; None where it can."""
        return None

    def identity(self, run: Run) -> object:
        """What of the method, beyond code, data, profile and seed, can change its answers (JSON-able)."""
        return None

    def prepare(self, run: Run, domain: str, split: str) -> None:
        """Train or encode what `answer` reads, so that the time of answering is the time of answering."""

    def answer(
        self,
        run: Run,
        domain: str,
        split: str,
        dialogues: Sequence[Dialogue],
        control: Control | None = None,
        scored: bool = True,
    ) -> list[Answer]:
        """One Answer a dialogue. `control` changes the visual tokens (a negative control); `scored` asks for the likelihood
        of every candidate too, where the method can tell."""
        raise NotImplementedError


class Retrieval(Method):
    """BM25 or a sentence encoder over the domain's whole catalogue by title; the first is the answer."""

    chooses: ClassVar[bool] = False

    @property
    def hub(self) -> HubModel | None:
        return ENCODERS[self.name].model if self.name in ENCODERS else None

    def needs(self, run):
        return str(self.hub) if self.hub else super().needs(run)

    def reason(self, run):
        return _reason(lambda: self.hub and self.hub.source(run.profile.models.get(self.name)))

    def identity(self, run):
        return [str(self.hub), fingerprint(run.profile.models.get(self.name))]

    def order(self, run: Run, domain: str, dialogues: Sequence[Dialogue]) -> np.ndarray:
        """Indices of the domain's catalogue, best first: int array (dialogues, items)."""
        queries = [" ".join(text for _, text in d.turns) for d in dialogues]
        return retrieval.rank(
            self.name,
            queries,
            run.domain_catalogue(domain)[1],
            folder=run.profile.models.get(self.name),
            cache=results_dir(run.profile) / "embeddings",
        )

    def answer(self, run, domain, split, dialogues, control=None, scored=True):
        asins, _ = run.domain_catalogue(domain)
        order = self.order(run, domain, dialogues)
        return [
            Answer("", asins[int(row[0])], tuple(asins[int(i)] for i in row[:10])) for row in order
        ]


class Base(Method):
    """The profile's own LLaVA-v1.6 as it comes. With images, a prompt that does not fit its context is refused."""

    def needs(self, run):
        return f"the profile's model ({run.profile.model})"

    def reason(self, run):
        return _reason(lambda: vision.source(run.profile))

    def answer(self, run, domain, split, dialogues, control=None, scored=True):
        model, visual, window = run.model(), None, None
        if self.inputs == BOTH:
            visual, window = run.visual("full", (split,)), vision.context_window(model)
        return recommendation.answer(
            model, run.prompter(visual, window), dialogues, run.profile.candidates, scored
        )


@dataclass(frozen=True)
class Open(Method):
    """Another open model of the hub as it comes, in its own `chat` form."""

    hub: HubModel = HubModel("", None, 0)
    chat: str = "{message}"

    def needs(self, run):
        return str(self.hub)

    def reason(self, run):
        return _reason(lambda: self.hub.source(run.profile.models.get(self.name)))

    def identity(self, run):
        return [self.hub.id, self.hub.revision, fingerprint(run.profile.models.get(self.name))]

    def answer(self, run, domain, split, dialogues, control=None, scored=True):
        profile, visual, window = openmodels.with_chat(run.profile, self.chat), None, None
        model, processor = openmodels.load(profile, *self.hub.source(profile.models.get(self.name)))
        if self.inputs == BOTH:
            paths = {
                a: image_file(run.root, a)
                for d in dialogues
                for a in getattr(d, profile.candidates)
            }
            visual = vision.lazy_full_tokens(model, processor, paths)
            window = vision.context_window(model)
        tokenizer = getattr(processor, "tokenizer", processor)
        prompter = recommendation.Prompter(tokenizer, profile, run.titles, visual, window)
        return recommendation.answer(model, prompter, dialogues, profile.candidates, scored)


class Proprietary(Method):
    """A model behind an OpenAI-compatible service. Answers are kept for good: nothing is paid twice."""

    def needs(self, run):
        model = proprietary.MODELS[self.name]
        return (
            f"{model.served} (at OpenAI until {model.until}) or another at an OpenAI-compatible service: key in "
            f"{endpoint.KEY}, or --base-url and --served"
        )

    def reason(self, run):
        return _reason(lambda: endpoint.Endpoint(proprietary.MODELS[self.name], run.api))

    def identity(self, run):
        return str(run.api)

    def answer(self, run, domain, split, dialogues, control=None, scored=True):
        replies = proprietary.ask_all(
            Requests(run, dialogues, self.inputs == BOTH),
            proprietary.MODELS[self.name],
            run.api,
            results_dir(run.profile) / "api_answers.sqlite",
        )
        return [
            Answer(
                r.text or "",
                parse_answer(r.text or "", getattr(d, run.profile.candidates)),
                getattr(d, run.profile.candidates),
                prompt_tokens=r.input_tokens,
                new_tokens=r.output_tokens,
                usd=0.0 if r.cached else r.usd,
            )
            for d, r in zip(dialogues, replies, strict=True)
        ]


class Requests(Sequence):
    """Chat messages of dialogues, made when they are read: ten pictures each are too much to hold for all."""

    def __init__(self, run: Run, dialogues: Sequence[Dialogue], images: bool) -> None:
        self.run, self.dialogues, self.images = run, dialogues, images

    def __len__(self) -> int:
        return len(self.dialogues)

    def __getitem__(self, i: int) -> list[dict]:
        names = getattr(self.dialogues[i], self.run.profile.candidates)
        text = prompts.recommend_message(
            self.run.profile.prompts, self.dialogues[i].turns, names, self.run.titles
        )
        return proprietary.build_messages(
            text, [(a, image_file(self.run.root, a)) for a in names] if self.images else []
        )


@dataclass(frozen=True)
class Trained(Method):
    """LaViC and its ablations: `tokens` its prompts carry ("distilled" or "base" [CLS], "full", or None), the share of the
    training `examples` it sees, and how many [CLS] of an image it keeps (None: one a tile)."""

    tokens: str | None = "distilled"
    examples: float = 1.0
    tiles: int | None = None

    def needs(self, run):
        return f"the profile's model ({run.profile.model}), the train split and the images"

    def reason(self, run):
        return _reason(lambda: (vision.source(run.profile), run.need_training_data()))

    def visual(self, run: Run, split: str) -> Mapping[str, Tensor] | None:
        """Visual tokens of a split's items, as its prompts carry them."""
        tokens = run.visual(self.tokens, (split,))
        return (
            tokens if self.tiles is None else {asin: t[: self.tiles] for asin, t in tokens.items()}
        )

    def prepare(self, run, domain, split):
        run.tune(self.name, domain)
        self.visual(run, split)

    def answer(self, run, domain, split, dialogues, control=None, scored=True):
        visual = self.visual(run, split)
        prompter = run.prompter(control(visual) if control else visual)
        return recommendation.answer(
            run.tuned(self.name, domain), prompter, dialogues, run.profile.candidates, scored
        )


def _reason(find: Callable[[], object]) -> str | None:
    try:
        find()
    except UserError as error:
        return str(error)
    return None


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. USER: {message} ASSISTANT:"
)  # the form Vicuna v1.5 was trained with
LLAVA = "USER: {message} ASSISTANT:"  # llava-1.5's own template
VICUNA_7B = HubModel(
    "lmsys/vicuna-7b-v1.5", "3321f76e3f527bd14065daf69dad9344000a201d", 13.5, safetensors=False
)
LLAVA_15 = HubModel("llava-hf/llava-1.5-7b-hf", "b234b804b114d9e37bb655e11cbbb5f5e971b7a9", 14.1)


def _registry(*methods: Method) -> dict[str, Method]:
    return {method.name: method for method in methods}


METHODS = _registry(
    *(Retrieval(name, family="retrieval") for name in ("BM25", *ENCODERS)),
    Open("Vicuna-v1.5", hub=VICUNA_7B, chat=VICUNA),
    Open("LLaVA-v1.5 (title)", hub=LLAVA_15, chat=LLAVA),
    Base("LLaVA-v1.6 (title)"),
    Open("LLaVA-v1.5 (title+image)", BOTH, hub=LLAVA_15, chat=LLAVA),
    Base("LLaVA-v1.6 (title+image)", BOTH),
    *(
        Proprietary(name, BOTH if "image" in name else TITLE, "proprietary")
        for name in proprietary.MODELS
    ),
    Trained("Entire tokens (5x577)", BOTH, "ablation", "full", examples=0.15),
    Trained("LaViC w/o images", TITLE, "ablation", None),
    Trained("LaViC w/o self-distillation", BOTH, "ablation", "base"),
    Trained("LaViC", BOTH, "proposed"),
)
# Beyond the paper (notebook 05, `reproduce --extended`): what one [CLS] an image, and fewer dialogues, would give.
EXTENDED = _registry(
    Trained("LaViC, one [CLS]", BOTH, "extended", tiles=1),
    *(
        Trained(f"LaViC, {share:.0%} of the examples", BOTH, "extended", examples=share)
        for share in (0.1, 0.25, 0.5)
    ),
)


def slug(method: str) -> str:
    """A method's name as a file name."""
    return "".join(c if c.isalnum() else "_" for c in method.lower()).strip("_")


def find(name: str) -> Method:
    """The method of this name, in any case, or of this slug. UserError names those there are."""
    for known, method in {**METHODS, **EXTENDED}.items():
        if name == known or slug(name) == slug(known):
            return method
    raise UserError(f"no method {name!r}; there are: {', '.join(METHODS)}")


def listing(run: Run) -> list[dict]:
    """The registry as rows: name, family, inputs, needs, runnable, reason (None where runnable)."""
    rows = [(method, method.reason(run)) for method in METHODS.values()]
    return [
        {
            "name": m.name,
            "family": m.family,
            "inputs": m.inputs,
            "needs": m.needs(run),
            "runnable": why is None,
            "reason": why,
        }
        for m, why in rows
    ]
