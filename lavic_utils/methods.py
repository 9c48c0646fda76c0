"""The 19 methods of the paper's tables as one registry, each asked the same.

A new method is one class with `answer` and one entry in METHODS: `run`, `table`, `evaluate` and the
notebooks then know it. `run` is an `experiment.Experiment` everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from lavic_utils import loading, prompts, recommendation, retrieval, vision
from lavic_utils.config import Profile, UserError, results_dir
from lavic_utils.data import Dialogue, image_file
from lavic_utils.evaluation import parse_answer
from lavic_utils.hub import HubModel, Unavailable
from lavic_utils.provenance import folder_hash
from lavic_utils.recommendation import Answer

if TYPE_CHECKING:
    from lavic_utils.experiment import Experiment

TITLE, BOTH = "item title", "item title and image"
ENTIRE, LONG = "Entire tokens (5x577)", ("entire tokens, training", "entire tokens, answers")
Control = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Method:
    """A row of a table. `hub`: the model it needs that is not the profile's. `chooses`: it picks
    one of the ten candidates; False: it ranks the domain's whole catalogue. `stages`: those of
    `bench.memory` that must fit a card."""

    name: str
    inputs: str = TITLE
    family: str = "generative"
    hub: HubModel | None = None
    chooses: ClassVar[bool] = True
    stages: ClassVar[tuple[str, ...]] = ()

    @property
    def full(self) -> str | None:
        """The visual tokens of a model that comes as it is: all of an image, or none."""
        return "full" if self.inputs == BOTH else None

    def row(self, run: Experiment) -> dict[str, str]:
        """What its row in a table says beside the figures: the name it stands under, `method`."""
        return {"method": self.name}

    def check(self, run: Experiment) -> None:
        """UserError where it cannot run here and now: why, and the command that helps."""
        from lavic_utils.bench.plan import refuse_here

        folder = run.profile.models.get(self.name)
        if self.hub and run.profile.world and not folder:
            why = "the mini world asks no model of the hub. For another profile"
            raise Unavailable(f"needs {self.hub}; {why}: {self.hub.command}")
        if self.stages:
            refuse_here(run.profile, self.stages)  # before a download is asked for
        if self.hub:
            self.hub.source(folder)

    def reason(self, run: Experiment) -> str | None:
        """What `check` says; None where the method can run."""
        try:
            self.check(run)
        except UserError as error:
            return str(error)
        return None

    def reads(self, run: Experiment, domain: str, split: str) -> object:
        """What decides its answers beyond what `Experiment.asked` holds (JSON-able)."""
        return None

    def prepare(self, run: Experiment, domain: str, split: str) -> None:
        """Train or encode what `answer` reads, so that answering is timed alone."""

    def answer(
        self,
        run: Experiment,
        domain: str,
        split: str,
        dialogues: Sequence[Dialogue],
        control: Control | None = None,
    ) -> list[Answer]:
        """One Answer a dialogue. `control` changes the visual tokens (a negative control)."""
        raise NotImplementedError


class Retrieval(Method):
    """BM25 or a sentence encoder over the domain's catalogue by title; the first is the answer."""

    chooses: ClassVar[bool] = False

    def reads(self, run, domain, split):
        folder = run.profile.models.get(self.name)
        return [str(self.hub), folder and folder_hash(folder), run.domain_catalogue(domain)]

    def order(self, run: Experiment, domain: str, dialogues: Sequence[Dialogue]) -> np.ndarray:
        """Indices of the domain's catalogue, best first: int array (dialogues, items)."""
        queries = [" ".join(text for _, text in d.turns) for d in dialogues]
        titles, folder = run.domain_catalogue(domain)[1], run.profile.models.get(self.name)
        return retrieval.rank(self.name, queries, titles, folder)

    def answer(self, run, domain, split, dialogues, control=None):
        asins, _ = run.domain_catalogue(domain)
        answers = []
        for best_first in self.order(run, domain, dialogues):
            ten = tuple(asins[int(i)] for i in best_first[:10])
            answers.append(Answer("", ten[0], ten))
        return answers


class Base(Method):
    """The profile's own LLaVA-v1.6 as it comes. With images, a prompt that does not fit its context
    is refused."""

    @property
    def stages(self):
        return LONG[1:] if self.full else ("inference",)

    def check(self, run):
        super().check(run)
        loading.source(run.profile)

    def reads(self, run, domain, split):
        return [run.base(), run.visual_reads(self.full, split)]

    def answer(self, run, domain, split, dialogues, control=None):
        visual, which = run.visual(self.full, (split,), lambda: model), run.profile.candidates
        window = loading.context_window(loading.load_config(run.profile)) if self.full else None
        prompter = run.prompter(visual, window)
        run.need_room("inference", lambda: prompter.longest(dialogues, which))
        model = run.model()
        return recommendation.generate_answers(model, prompter, dialogues, which)


@dataclass(frozen=True)
class Open(Method):
    """Another open model of the hub as it comes, in its own `chat` form: a language model (Vicuna)
    reads titles; a LLaVA 1.5 reads titles, or titles and its own full image tokens."""

    chat: str = "{message}"
    stages = Base.stages

    def reads(self, run, domain, split):
        folder = run.profile.models.get(self.name)
        model = folder_hash(folder) if folder else [self.hub.id, self.hub.revision]
        return [model, self.chat, run.profile.dtype, run.visual_reads(self.full, split)]

    def answer(self, run, domain, split, dialogues, control=None):
        chat = run.profile.prompts.model_copy(update={"chat": self.chat})
        profile, which = run.profile.model_copy(update={"prompts": chat}), run.profile.candidates
        run.need_room("inference")
        model, processor = load_open(profile, *self.hub.source(profile.models.get(self.name)))
        visual, window = None, None
        if self.full:
            asins = {asin for dialogue in dialogues for asin in getattr(dialogue, which)}
            paths = {asin: image_file(run.root, asin) for asin in sorted(asins)}
            visual = vision.lazy_full_tokens(lambda: model, processor, run.readable(paths))
            window = loading.context_window(model.config)
        tokenizer = getattr(processor, "tokenizer", processor)
        prompter = recommendation.Prompter(tokenizer, profile, run.titles, visual, window)
        return recommendation.generate_answers(model, prompter, dialogues, which)


def load_open(profile: Profile, source: str, revision: str | None):
    """(model, processor) of a LLaVA 1.5, (model, tokenizer) of a language model; `source` a folder
    or a hub id."""
    here = {"revision": revision, "local_files_only": True}
    config = AutoConfig.from_pretrained(source, **here)
    tokenizer = AutoTokenizer.from_pretrained(source, **here)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if not hasattr(config, "vision_config"):
        return loading.load(AutoModelForCausalLM, profile, source, revision), tokenizer
    processor = LlavaProcessor(
        LlavaImageProcessorPil.from_pretrained(source, **here),
        tokenizer,
        patch_size=config.vision_config.patch_size,
        num_additional_image_tokens=1,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )
    return loading.load(AutoModelForImageTextToText, profile, source, revision), processor


class Proprietary(Method):
    """A model behind an OpenAI-compatible service. `remote.chat_api` keeps each answer for good:
    nothing is paid twice, and nothing at all unless a command says so."""

    def row(self, run):
        return run.api.row(self.name)

    def check(self, run):
        from lavic_utils.remote import chat_api

        chat_api.check(chat_api.MODELS[self.name], run.api or chat_api.Settings(max_usd=0.0))

    def ask(self, run: Experiment, dialogues: Sequence[Dialogue], dry_run: bool = False):
        """A `chat_api.Reply` a dialogue; `dry_run`: what would be asked and its cost, in words."""
        from lavic_utils.remote import chat_api

        def messages(dialogue: Dialogue) -> chat_api.Messages:
            ten = getattr(dialogue, run.profile.candidates)
            items = [prompts.Candidate(asin, run.titles[asin]) for asin in ten]
            text = prompts.recommend_message(run.profile.prompts, dialogue.turns, items)
            shown = ten if self.inputs == BOTH else ()
            return chat_api.build_messages(text, [(a, image_file(run.root, a)) for a in shown])

        requests = [partial(messages, dialogue) for dialogue in dialogues]
        cache = results_dir(run.profile) / "api_answers.sqlite"
        return chat_api.ask_all(requests, chat_api.MODELS[self.name], run.api, cache, dry_run)

    def answer(self, run, domain, split, dialogues, control=None):
        self.check(run)
        answers = []
        for dialogue, reply in zip(dialogues, self.ask(run, dialogues), strict=True):
            text, ten = reply.text or "", getattr(dialogue, run.profile.candidates)
            answer = Answer(text, parse_answer(text, ten), ten, new_tokens=reply.output_tokens)
            answer.usd = 0.0 if reply.cached else reply.usd
            if reply.refused:  # longer than the model's context
                answer.refused = reply.input_tokens
            else:
                answer.prompt_tokens = reply.input_tokens
                answer.unanswered = (reply.error or "").partition(":")[0]
            answers.append(answer)
        return answers


@dataclass(frozen=True)
class Trained(Method):
    """LaViC and its ablations: `tokens` its prompts carry ("distilled" or "base" [CLS], "full", or
    None), whether stage 2 has `tuned` it, and how many [CLS] of an image it keeps (`tiles`; None:
    one a tile). All are trained alike: the same examples, epochs and steps."""

    tokens: str | None = "distilled"
    tuned: bool = True
    tiles: int | None = None

    @property
    def stages(self):  # the last but one trains it
        if self.name == ENTIRE:
            return LONG
        first = ("teacher", "distillation") if (self.tokens or "").startswith("distilled") else ()
        return (*first, "recommendation", "inference")

    def check(self, run):
        super().check(run)
        loading.source(run.profile)
        run.need_training_data()

    def reads(self, run, domain, split):
        self.trained(run, domain)
        adapter = folder_hash(run.tuned_folder(self.name, domain) / "adapter")
        about = run.base(), self.tuned and adapter, self.tiles
        return [*about, run.visual_reads(self.tokens, split)]

    def trained(self, run: Experiment, domain: str) -> dict:
        """What stage 2 did, trained now if it is not yet."""
        return run.tune(self.name, domain) if self.tuned else {"examples": 0, "steps": 0}

    def visual(
        self, run: Experiment, split: str, model: Callable | None = None
    ) -> Mapping[str, Tensor] | None:
        """Visual tokens of a split's items, as its prompts carry them."""
        visual = run.visual(self.tokens, (split,), model)
        if self.tiles is None:
            return visual
        return {asin: tokens[: self.tiles] for asin, tokens in visual.items()}

    def prepare(self, run, domain, split):
        self.trained(run, domain)
        self.visual(run, split)

    def answer(self, run, domain, split, dialogues, control=None):
        visual, which = self.visual(run, split, lambda: model), run.profile.candidates
        shown, profile = control(visual) if control else visual, run.profile.arm(self.name)
        prompter = run.prompter(shown, profile=profile)
        run.need_room(self.stages[-1], lambda: prompter.longest(dialogues, which))
        model = run.tuned(self.name, domain) if self.tuned else run.model()
        return recommendation.generate_answers(model, prompter, dialogues, which)


VICUNA = (  # the form Vicuna v1.5 was trained with
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: {message} ASSISTANT:"
)
LLAVA = "USER: {message} ASSISTANT:"  # llava-1.5's own template
VICUNA_7B = HubModel(
    "lmsys/vicuna-7b-v1.5", "3321f76e3f527bd14065daf69dad9344000a201d", 13.5, safetensors=False
)
LLAVA_15 = HubModel("llava-hf/llava-1.5-7b-hf", "b234b804b114d9e37bb655e11cbbb5f5e971b7a9", 14.1)


RAW = "LaViC w/o self-distillation"
PAPER = (
    Retrieval("BM25", family="retrieval"),
    # SBERT, RoBERTa-Large, SimCSE-Large, BLaIR-Base
    *(Retrieval(n, TITLE, "retrieval", one.model) for n, one in retrieval.ENCODERS.items()),
    Open("Vicuna-v1.5", hub=VICUNA_7B, chat=VICUNA),
    Open("LLaVA-v1.5 (title)", hub=LLAVA_15, chat=LLAVA),
    Base("LLaVA-v1.6 (title)"),
    Open("LLaVA-v1.5 (title+image)", BOTH, hub=LLAVA_15, chat=LLAVA),
    Base("LLaVA-v1.6 (title+image)", BOTH),
    Proprietary("GPT-3.5-turbo (title)", TITLE, "proprietary"),
    Proprietary("GPT-4o-mini (title)", TITLE, "proprietary"),
    Proprietary("GPT-4o (title)", TITLE, "proprietary"),
    Proprietary("GPT-4o-mini (title+image)", BOTH, "proprietary"),
    Proprietary("GPT-4o (title+image)", BOTH, "proprietary"),
    Trained(ENTIRE, BOTH, "ablation", tokens="full"),
    Trained("LaViC w/o images", TITLE, "ablation", tokens=None),
    Trained(RAW, BOTH, "ablation", tokens="base"),
    Trained("LaViC", BOTH, "proposed"),
)
METHODS = {method.name: method for method in PAPER}
# What the paper does not print: the same student and prompts without stage 2.
BEFORE = Trained("LaViC before stage 2", BOTH, "ablation", tuned=False)
# Beyond the paper (`mini.beyond`, `reproduce --extended`): other visual tokens.
BEYOND = (
    Trained("LaViC, one [CLS]", BOTH, "extended", tiles=1),
    Trained("LaViC, mean of patches", BOTH, "extended", tokens="distilled mean"),
    Trained(f"{RAW}, mean of patches", BOTH, "extended", tokens="mean"),
    Trained(f"{RAW}, 4 patches a tile", BOTH, "extended", tokens="pooled"),
)
EXTENDED = {method.name: method for method in BEYOND}


def slug(method: str) -> str:
    """A method's name as a file name."""
    return "".join(c if c.isalnum() else "_" for c in method.lower()).strip("_")


def find(name: str) -> Method:
    """The method of this name, in any case, or of this slug. UserError names those there are."""
    for known, method in {**METHODS, BEFORE.name: BEFORE, **EXTENDED}.items():
        if name == known or slug(name) == slug(known):
            return method
    raise UserError(f"no method {name!r}; there are: {', '.join(METHODS)}")


def listing(run: Experiment) -> list[dict]:
    """The registry as rows: name, family, inputs, runnable, reason (None where runnable)."""
    rows = []
    for method in METHODS.values():
        why = method.reason(run)
        about = {"name": method.name, "family": method.family, "inputs": method.inputs}
        rows.append({**about, "runnable": why is None, "reason": why})
    return rows
