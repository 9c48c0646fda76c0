"""Stage 2, recommendation fine-tuning (paper, section 4.2), and inference with three readings of an answer.

The vision side is as stage 1 left it and frozen, so every item's visual tokens are constants computed once
(`store.py`); LoRA trains the language model to answer a dialogue and ten candidates with one id.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from lavic_utils import training, vision
from lavic_utils.config import Profile
from lavic_utils.data import Dialogue
from lavic_utils.distillation import IGNORE, pad_left, target_loss
from lavic_utils.evaluation import parse_answer
from lavic_utils.prompts import Encoded, encode, recommend_prompt

LANGUAGE_LINEAR = (r"(base_model\.model\.)?(llava\.)?model\.language_model\.layers\.\d+\."
                   r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")


@dataclass(frozen=True)
class Example:
    """One training example: a dialogue, its (copied) candidate list with the truth inside, and the truth."""

    dialogue: Dialogue
    candidates: tuple[str, ...]
    target: str


@dataclass
class Answer:
    """What a method said to one dialogue, read three ways.

    `log_likelihoods`: mean over an id's tokens, which ranks ids of different lengths fairly; `probabilities`: of whole
    ids, among the ten. Both follow the order of `candidates`, in which they were shown. `refused`: the tokens a prompt
    would have needed that was not asked, since it does not fit: a miss, and an invalid answer.
    """

    response: str
    recommended: str | None = None
    candidates: tuple[str, ...] = ()
    constrained: str = ""
    scored: str = ""
    log_likelihoods: list[float] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    new_tokens: int = 0
    dropped_dialogue_tokens: int = 0
    dropped_images: int = 0
    refused: int = 0
    usd: float = 0.0


def training_examples(dialogues: Sequence[Dialogue], which: str, seed: int) -> list[Example]:
    """One example for each distinct ground-truth item; where the list lacks it, it replaces a random candidate of a
    copy (the dialogue's own list is never changed)."""
    rng, examples = random.Random(f"insert-{seed}"), []
    for dialogue in dialogues:
        for truth in dict.fromkeys(dialogue.gt_items):
            candidates = list(getattr(dialogue, which))
            if truth not in candidates:
                candidates[rng.randrange(len(candidates))] = truth
            examples.append(Example(dialogue, tuple(candidates), truth))
    return examples


class Prompter:
    """Dialogues to encoded prompts, with the items' visual tokens (none for a method without images). With `window`, a
    prompt that does not fit this many tokens with all its images is refused, instead of shortened to the profile's."""

    def __init__(self, tokenizer, profile: Profile, titles: Mapping[str, str], visual: Mapping[str, Tensor] | None,
                 window: int | None = None):
        self.tokenizer, self.profile, self.titles = tokenizer, profile, titles
        self.visual: Mapping[str, Tensor] = {} if visual is None else visual
        self.lengths = vision.lengths(self.visual)
        self.room = (window or profile.recommendation.max_length) - profile.recommendation.max_new_tokens
        self.overflow: Literal["shorten", "refuse"] = "refuse" if window else "shorten"
        self.cut = {"prompts": 0, "dialogue_tokens": 0, "images": 0}  # what training prompts lost for being too long

    def prompt(self, dialogue: Dialogue, candidates: Sequence[str]) -> Encoded:
        return recommend_prompt(self.tokenizer, self.profile.prompts, dialogue.turns, candidates, self.titles,
                                self.lengths, self.room, overflow=self.overflow)

    def answer(self, asin: str) -> list[int]:
        """The target: the id and the end of the sequence."""
        return [*encode(self.tokenizer, self.profile.prompts.answer.format(id=asin)), self.tokenizer.eos_token_id]

    def row(self, example: Example) -> dict:
        """Prompt and target of one training example; the loss sees the target alone."""
        prompt, target = self.prompt(example.dialogue, example.candidates), self.answer(example.target)
        lost = prompt.dropped_dialogue_tokens, prompt.dropped_images
        for name, count in zip(self.cut, (any(lost), *lost), strict=True):
            self.cut[name] += count
        return {"input_ids": prompt.ids + target, "labels": [IGNORE] * len(prompt.ids) + target,
                "visual": prompt.visual}

    def tokens(self, prompts: Sequence[Encoded]) -> list[Tensor]:
        return [self.visual[asin] for prompt in prompts for asin in prompt.visual]


class Recommender(training.Stage):
    """Stage 2 (paper, section 4.2): the loss of the right id, given the dialogue and ten candidates with their [CLS] tokens."""

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, visual: list[Tensor]) -> dict[str, Tensor]:
        """A batch of `collator`: ids, labels and mask (batch, length); `visual`: (tokens, hidden size) of each item shown."""
        embeds = vision.place(self.llava, input_ids, visual)
        return {"loss": target_loss(self.llava, embeds, attention_mask, labels)}  # -log p(id | dialogue, candidates), by token


class RecommendationTrainer(training.StageTrainer):
    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.add_callback(training.Reseeded())  # rows are ordered by the global random state

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if hasattr(sampler, "batch_size"):
            sampler.batch_size *= self.args.world_size  # rows alike in length over the step of all processes
        return sampler


def collator(prompter: Prompter):
    def collate(rows: Sequence[dict]) -> dict:
        return {"input_ids": pad_left([row["input_ids"] for row in rows], prompter.tokenizer.pad_token_id),
                "labels": pad_left([row["labels"] for row in rows], IGNORE),
                "attention_mask": pad_left([[1] * len(row["input_ids"]) for row in rows], 0),
                "visual": [prompter.visual[asin] for row in rows for asin in row["visual"]]}
    return collate


def train_recommender(profile: Profile, model, prompter: Prompter, examples: Sequence[Example], folder: Path,
                      seed: int) -> tuple[object, list[dict]]:
    """Fine-tune one domain's adapter, saved as a standard peft folder `folder/adapter`. Returns (the model given, with the
    adapter in it, loss log)."""
    torch.manual_seed(seed)
    stage = profile.recommendation
    tuned = training.add_adapter(Recommender(model), stage.lora, LANGUAGE_LINEAR)
    rows = [prompter.row(example) for example in examples]
    saving = {"save_strategy": "steps", "save_steps": stage.save_steps} if stage.save_steps else {"save_strategy": "no"}
    trainer = RecommendationTrainer(
        model=tuned, processing_class=prompter.tokenizer, train_dataset=rows, data_collator=collator(prompter),
        args=training.training_arguments(folder / "checkpoints", stage, seed, vision.dtype(profile), logging_steps=2,
                                save_total_limit=1, train_sampling_strategy="group_by_length", **saving))
    trainer.fit(folder / "adapter")
    return model.eval(), [{"step": e["step"], "loss": e["loss"]} for e in trainer.state.log_history if "loss" in e]


@torch.inference_mode()
def answer(model, prompter: Prompter, dialogues: Sequence[Dialogue], which: str, scored: bool = True) -> list[Answer]:
    """Greedy answers in the dialogues' order; prompts are batched by length. With `scored`, also the log-likelihood
    of each candidate's id, the id a constrained greedy decoder would write, and the most likely id."""
    lists = [getattr(dialogue, which) for dialogue in dialogues]
    prompts = [prompter.prompt(d, names) for d, names in zip(dialogues, lists, strict=True)]
    answers = {i: Answer("", candidates=lists[i], refused=p.refused) for i, p in enumerate(prompts) if p.refused}
    order = sorted(set(range(len(prompts))) - set(answers), key=lambda i: len(prompts[i].ids))
    for group in vision.batched(order, prompter.profile.recommendation.eval_batch_size):
        found = _answer_batch(model, prompter, [prompts[i] for i in group], [lists[i] for i in group], scored)
        answers |= dict(zip(group, found, strict=True))
    return [answers[i] for i in range(len(prompts))]


def _answer_batch(model, prompter: Prompter, prompts: list[Encoded], candidates: list[Sequence[str]],
                  scored: bool) -> list[Answer]:
    tokenizer, pad = prompter.tokenizer, prompter.tokenizer.pad_token_id
    ids = pad_left([p.ids for p in prompts], pad).to(model.device)
    mask = pad_left([[1] * len(p.ids) for p in prompts], 0).to(model.device)
    read = Read(model, vision.place(model, ids, prompter.tokens(prompts), pad), mask)
    tables = read.score([[prompter.answer(name) for name in names] for names in candidates]) if scored else []
    out = read.greedy(prompter.profile.recommendation.max_new_tokens, tokenizer.eos_token_id)
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    written = (out != tokenizer.eos_token_id).sum(1).tolist()
    answers = [Answer(text.strip(), parse_answer(text), names, prompt_tokens=len(p.ids), new_tokens=new,
                      dropped_dialogue_tokens=p.dropped_dialogue_tokens, dropped_images=p.dropped_images)
               for text, names, p, new in zip(texts, candidates, prompts, written, strict=True)]
    for found, names, table in zip(answers, candidates, tables, strict=False):
        targets = [prompter.answer(name) for name in names]
        totals = table.sum(1)
        means = totals / torch.tensor([len(target) for target in targets])
        found.log_likelihoods = [round(value, 5) for value in means.tolist()]
        found.probabilities = [round(value, 5) for value in totals.softmax(0).tolist()]
        found.scored = names[int(means.argmax())]
        found.constrained = names[constrained_choice(table, targets)]
    return answers


class Read:
    """Prompts read once (all but their last token): greedy answers and scores of given ids share that cache.

    A fully cached prefix goes silently wrong in some versions, so one token stays uncached; equality with the plain
    forward and with `generate` is tested.
    """

    def __init__(self, model, embeds: Tensor, mask: Tensor) -> None:
        if not mask[:, -1].all():
            raise ValueError("prompts to be read must be padded on the left: an answer goes on from the last column")
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.language = getattr(core.model, "language_model", core.model)  # a plain language model has no other inside
        self.head, self.table = core.lm_head, core.get_input_embeddings()
        self.mask, self.last, self.length = mask, embeds[:, -1:], embeds.shape[1] - 1
        self.position = mask.sum(1, keepdim=True) - 1  # of the last prompt token
        self.cache = DynamicCache()
        self.language(inputs_embeds=embeds[:, :-1], attention_mask=mask[:, :-1],
                      position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, :-1], past_key_values=self.cache, use_cache=True)

    def _logits(self, embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        out = self.language(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=self.cache,
                            use_cache=True)
        return self.head(out.last_hidden_state)

    def greedy(self, most: int, end: int) -> Tensor:
        """Token ids (rows, at most `most`), the end token repeated after it."""
        found, embeds, mask = [], self.last, self.mask
        done = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        for step in range(most):
            token = self._logits(embeds, mask, self.position + step)[:, -1].argmax(-1).masked_fill(done, end)
            found.append(token)
            done |= token == end
            if done.all():
                break
            embeds, mask = self.table(token)[:, None].to(self.last.dtype), F.pad(mask, (0, 1), value=1)
        self.cache.crop(self.length - self.cache.get_seq_length())  # back to the prompt
        return torch.stack(found, 1)

    def score(self, targets: list[list[list[int]]]) -> list[Tensor]:
        """Per prompt a (candidates, tokens) table of token log-likelihoods. All candidates stand in one row, side by
        side: each sees the prompt and itself."""
        rows, width = len(targets), max(len(group) for group in targets)
        longest = max(len(t) for group in targets for t in group)
        filled = [[t + [IGNORE] * (longest - len(t)) for t in group + group[:1] * (width - len(group))] for group in targets]
        table = torch.tensor(filled, device=self.mask.device)  # (rows, width, longest)
        inputs = table[:, :, :-1].clamp(min=0).flatten(1)
        embeds = torch.cat([self.last, self.table(inputs).to(self.last.dtype)], 1)
        steps = torch.arange(1, longest, device=self.mask.device).repeat(width)
        positions = self.position + F.pad(steps, (1, 0))
        own = torch.ones(longest - 1, longest - 1, device=self.mask.device).tril()
        block = F.pad(torch.block_diag(*[own] * width), (1, 0, 1, 0), value=0.0)
        block[:, 0] = 1.0  # everybody sees the prompt's last token
        seen = torch.cat([self.mask[:, None, :-1].expand(-1, block.shape[0], -1).float(), block.expand(rows, -1, -1)], -1)
        hidden = (1.0 - seen[:, None]).to(self.last.dtype) * torch.finfo(self.last.dtype).min
        scores = F.log_softmax(self._logits(embeds, hidden, positions).float(), -1)
        self.cache.crop(self.length - self.cache.get_seq_length())  # back to the prompt
        first = scores[:, :1].expand(-1, width, -1)[:, :, None]
        later = scores[:, 1:].unflatten(1, (width, longest - 1))
        found = torch.cat([first, later], 2).gather(-1, table.clamp(min=0)[..., None])[..., 0].masked_fill(table == IGNORE, 0)
        return [found[i, :len(group)].cpu() for i, group in enumerate(targets)]


def constrained_choice(table: Tensor, targets: Sequence[Sequence[int]]) -> int:
    """The candidate that greedy decoding over the candidates' ids alone would write, token by token."""
    alive = list(range(len(targets)))
    for position in range(table.shape[1]):
        alive = [i for i in alive if position < len(targets[i])] or alive[:1]
        best = max(alive, key=lambda i: float(table[i, position]))
        alive = [i for i in alive if targets[i][:position + 1] == targets[best][:position + 1]]
    return alive[0]
