"""Stage 2, recommendation fine-tuning (paper, section 4.2), and inference with three readings.

The vision side stays as stage 1 left it, so every item's visual tokens are constants, computed once
(`store`); LoRA trains the language model to answer a dialogue and ten candidates with one id.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, TrainerCallback

from lavic_utils import training, vision
from lavic_utils.config import Profile
from lavic_utils.data import Dialogue
from lavic_utils.evaluation import parse_answer
from lavic_utils.prompts import Candidate, Encoded, encode, recommend_prompt
from lavic_utils.training import IGNORE, pad_left, target_loss

# Every linear layer of the language model (section 4.2).
LANGUAGE_LINEAR = (
    r"(base_model\.model\.)?(llava\.)?model\.language_model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
)


SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of a training, where `fine_tune` looks at what is learnt


@dataclass(frozen=True)
class Example:
    """One training example: a dialogue, its candidates with the truth inside, and the truth."""

    dialogue: Dialogue
    candidates: tuple[str, ...]
    target: str


@dataclass
class Answer:
    """What a method said to one dialogue, read three ways.

    `recommended`: the id in the text it wrote; `constrained`: the one it would write if it could
    write candidates' ids alone; `scored`: the likeliest. In the order of `candidates`:
    `log_likelihoods`, mean over an id's tokens; `probabilities` of whole ids among the ten.
    `refused`: the tokens of a prompt too long to be asked, `unanswered`: why a service gave no
    answer; either is a miss, and an invalid answer.
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
    unanswered: str = ""
    usd: float = 0.0


def training_examples(dialogues: Sequence[Dialogue], which: str, seed: int) -> list[Example]:
    """One example for each distinct ground-truth item (section 4.2); where the list lacks it, it
    replaces a random candidate of a copy: the dialogue's own list is never changed."""
    rng, examples = random.Random(f"insert-{seed}"), []
    for dialogue in dialogues:
        for truth in dict.fromkeys(dialogue.gt_items):
            candidates = list(getattr(dialogue, which))
            if truth not in candidates:
                candidates[rng.randrange(len(candidates))] = truth
            examples.append(Example(dialogue, tuple(candidates), truth))
    return examples


class Prompter:
    """Dialogues to prompts with the items' `visual` tokens (None: without images), shortened to the
    profile's `max_length`; with a `window`, what does not fit it with all images is refused."""

    def __init__(
        self,
        tokenizer,
        profile: Profile,
        titles: Mapping[str, str],
        visual: Mapping[str, Tensor] | None,
        window: int | None = None,
    ) -> None:
        settings = profile.recommendation
        self.tokenizer, self.profile, self.titles = tokenizer, profile, titles
        self.visual = {} if visual is None else visual
        self.lengths = vision.lengths(self.visual)
        self.room = (window or settings.max_length) - settings.max_new_tokens
        self.refuse = window is not None
        self.cut = {"prompts": 0, "dialogue_tokens": 0, "images": 0}  # lost in training prompts

    def prompt(self, dialogue: Dialogue, candidates: Sequence[str]) -> Encoded:
        items = [Candidate(a, self.titles[a], self.lengths.get(a, 0)) for a in candidates]
        text, turns = self.profile.prompts, dialogue.turns
        return recommend_prompt(self.tokenizer, text, turns, items, self.room, self.refuse)

    def target_ids(self, asin: str) -> list[int]:
        """The target: the id and the end of the sequence."""
        text = self.profile.prompts.answer.format(id=asin)
        return [*encode(self.tokenizer, text), self.tokenizer.eos_token_id]

    def row(self, example: Example) -> dict:
        """Prompt and target of one training example; the loss sees the target alone."""
        prompt = self.prompt(example.dialogue, example.candidates)
        target = self.target_ids(example.target)
        self.cut["prompts"] += bool(prompt.dropped_dialogue_tokens or prompt.dropped_images)
        self.cut["dialogue_tokens"] += prompt.dropped_dialogue_tokens
        self.cut["images"] += prompt.dropped_images
        labels = [IGNORE] * len(prompt.ids) + target
        return {"input_ids": prompt.ids + target, "labels": labels, "visual": prompt.visual}

    def collate(self, rows: Sequence[dict]) -> dict:
        """Results of `row` to a batch for `Recommender.forward`."""
        ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": pad_left(ids, self.tokenizer.pad_token_id),
            "labels": pad_left([row["labels"] for row in rows], IGNORE),
            "attention_mask": pad_left([[1] * len(row) for row in ids], 0),
            "visual": [self.visual[asin] for row in rows for asin in row["visual"]],
        }

    def tokens(self, prompts: Sequence[Encoded]) -> list[Tensor]:
        """Visual tokens in the order of the prompts' placeholders, an item each."""
        return [self.visual[asin] for prompt in prompts for asin in prompt.visual]


class Recommender(training.Stage):
    """The loss of the right id, given the dialogue and ten candidates with their [CLS] tokens."""

    def forward(self, input_ids, labels, attention_mask, visual) -> dict:
        """Tensors of `Prompter.collate`: ids, labels and mask (batch, length); of each item shown
        (tokens, hidden size)."""
        embeds = vision.place(self.llava, input_ids, visual)  # (batch, length, hidden size)
        # -log p(id | dialogue, candidates), mean over its tokens
        return {"loss": target_loss(self.llava, embeds, attention_mask, labels)}


class RecommendationTrainer(training.StageTrainer):
    """Rows alike in length make a step of all processes together."""

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if hasattr(sampler, "batch_size"):
            sampler.batch_size *= self.args.world_size
        return sampler


class Watched(TrainerCallback):
    """Puts what `on_step` measures SHARES of the way into the log, which a killed run keeps."""

    def __init__(self, model, on_step: Callable[[], dict[str, float]]) -> None:
        self.model, self.on_step = model, on_step

    def on_step_end(self, args, state, control, **_):
        if state.global_step in [round(share * state.max_steps) for share in SHARES]:
            self.model.eval()
            state.log_history.append({"step": state.global_step, **self.on_step()})
            self.model.train()


def fine_tune(
    profile: Profile,
    model,
    prompter: Prompter,
    examples: list[Example],
    folder: Path,
    seed: int,
    on_step: Callable[[], dict[str, float]] | None = None,
) -> list[dict]:
    """Fine-tune one domain's adapter, put into `model` and saved as a standard peft folder,
    `folder/adapter`. Returns the log: [{"step", "loss"}], and between them, SHARES of the way, the
    step and what `on_step` measured of `model` as it was then."""
    torch.manual_seed(seed)
    settings = profile.recommendation
    arguments = training.training_arguments(
        folder / "checkpoints",
        settings,
        seed,
        vision.dtype(profile),
        logging_steps=2,
        save_total_limit=1,
        train_sampling_strategy="group_by_length",
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
    )
    trainer = RecommendationTrainer(
        model=training.add_adapter(Recommender(model), settings.lora, LANGUAGE_LINEAR),
        processing_class=prompter.tokenizer,
        train_dataset=[prompter.row(example) for example in examples],
        data_collator=prompter.collate,
        args=arguments,
        # rows are ordered by the global random state
        callbacks=[training.Reseeded(), *([Watched(model, on_step)] if on_step else [])],
    )
    trainer.fit(folder / "adapter")
    model.eval()
    log = trainer.state.log_history
    measured = ("step", "loss", "recommended", "scored")
    entries = [{name: entry[name] for name in measured if name in entry} for entry in log]
    return [entry for entry in entries if len(entry) > 1]


@torch.inference_mode()
def generate_answers(
    model, prompter: Prompter, dialogues: Sequence[Dialogue], which: str, scored: bool = True
) -> list[Answer]:
    """Greedy answers in the dialogues' order; prompts are batched by length. With `scored`, the two
    other readings and every candidate's likelihood too."""
    prompts, answers = [], []
    for dialogue in dialogues:
        ten = getattr(dialogue, which)
        prompts.append(prompter.prompt(dialogue, ten))
        answers.append(Answer("", candidates=ten, refused=prompts[-1].refused))
    asked = [i for i, answer in enumerate(answers) if not answer.refused]
    asked.sort(key=lambda i: len(prompts[i].ids))
    for group in vision.batched(asked, prompter.profile.recommendation.eval_batch_size):
        some = [answers[i] for i in group]
        _answer_batch(model, prompter, [prompts[i] for i in group], some, scored)
    return answers


def _answer_batch(model, prompter: Prompter, prompts: list, answers: list, scored: bool) -> None:
    """Fill in the answers to one batch of prompts."""
    tokenizer, pad = prompter.tokenizer, prompter.tokenizer.pad_token_id
    ids = pad_left([p.ids for p in prompts], pad).to(model.device)
    mask = pad_left([[1] * len(p.ids) for p in prompts], 0).to(model.device)
    read = Read(model, vision.place(model, ids, prompter.tokens(prompts), pad), mask)
    if scored:
        targets = [[prompter.target_ids(a) for a in answer.candidates] for answer in answers]
        for answer, ten, table in zip(answers, targets, read.score(targets), strict=True):
            totals = table.sum(1)
            means = totals / torch.tensor([len(target) for target in ten])
            answer.log_likelihoods = [round(value, 5) for value in means.tolist()]
            answer.probabilities = [round(value, 5) for value in totals.softmax(0).tolist()]
            answer.scored = answer.candidates[int(means.argmax())]
            answer.constrained = answer.candidates[constrained_choice(table, ten)]
    out = read.greedy(prompter.profile.recommendation.max_new_tokens, tokenizer.eos_token_id)
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    written = (out != tokenizer.eos_token_id).sum(1).tolist()
    for answer, text, prompt, new in zip(answers, texts, prompts, written, strict=True):
        answer.response = text.strip()
        answer.recommended = parse_answer(text, answer.candidates)
        answer.prompt_tokens, answer.new_tokens = len(prompt.ids), new
        answer.dropped_dialogue_tokens = prompt.dropped_dialogue_tokens
        answer.dropped_images = prompt.dropped_images


class Read:
    """Prompts read once: greedy answers and scores of given ids share that cache. It lacks the last
    token, since a fully cached prefix goes silently wrong in some versions of transformers."""

    def __init__(self, model, embeds: Tensor, mask: Tensor) -> None:
        """`embeds` (rows, length, hidden size), `mask` (rows, length), padded on the left."""
        if not mask[:, -1].all():
            raise ValueError(
                "an answer follows the last column: prompts must be padded on the left"
            )
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.language = getattr(core.model, "language_model", core.model)  # or a plain one
        self.head, self.table = core.lm_head, core.get_input_embeddings()
        self.mask, self.last, self.length = mask, embeds[:, -1:], embeds.shape[1] - 1
        self.position = mask.sum(1, keepdim=True) - 1  # of the last prompt token
        self.cache = DynamicCache()
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, :-1]
        self._hidden(embeds[:, :-1], mask[:, :-1], positions)

    def _hidden(self, embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """The language model on what the cache does not hold yet: (rows, tokens, hidden size)."""
        where = {"attention_mask": mask, "position_ids": positions, "past_key_values": self.cache}
        return self.language(inputs_embeds=embeds, use_cache=True, **where).last_hidden_state

    def _back_to_the_prompt(self) -> None:
        self.cache.crop(self.length - self.cache.get_seq_length())

    def greedy(self, most: int, end: int) -> Tensor:
        """Token ids (rows, at most `most`), the end token repeated after it."""
        found, embeds, mask = [], self.last, self.mask
        done = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        for step in range(most):
            logits = self.head(self._hidden(embeds, mask, self.position + step))
            token = logits[:, -1].argmax(-1).masked_fill(done, end)  # (rows,)
            found.append(token)
            done |= token == end
            if done.all():
                break
            embeds = self.table(token)[:, None].to(self.last.dtype)
            mask = F.pad(mask, (0, 1), value=1)
        self._back_to_the_prompt()
        return torch.stack(found, 1)

    def score(self, targets: list[list[list[int]]]) -> list[Tensor]:
        """Per prompt a (candidates, tokens) table of token log-likelihoods, 0 after an id's end.
        All candidates stand in one row, side by side: each sees the prompt and itself."""
        width = max(len(group) for group in targets)
        longest = max(len(target) for group in targets for target in group)
        rows = []
        for group in targets:
            same = group + group[:1] * (width - len(group))  # as many candidates in every row
            rows.append([target + [IGNORE] * (longest - len(target)) for target in same])
        table = torch.tensor(rows, device=self.mask.device)  # (rows, width, longest)
        inputs = table[:, :, :-1].clamp(min=0).flatten(1)  # (rows, width * (longest - 1))
        embeds = torch.cat([self.last, self.table(inputs).to(self.last.dtype)], 1)
        steps = torch.arange(1, longest, device=self.mask.device).repeat(width)
        positions = self.position + F.pad(steps, (1, 0))
        hidden = self._hidden(embeds, self._side_by_side(width, longest - 1), positions)
        scores = F.log_softmax(self.head(hidden).float(), -1)
        self._back_to_the_prompt()
        first = scores[:, :1].expand(-1, width, -1)[:, :, None]  # after the prompt's last token
        later = scores[:, 1:].unflatten(1, (width, longest - 1))
        every = torch.cat([first, later], 2)  # (rows, width, longest, vocabulary)
        found = every.gather(-1, table.clamp(min=0)[..., None])[..., 0]
        found = found.masked_fill(table == IGNORE, 0)
        return [found[i, : len(group)].cpu() for i, group in enumerate(targets)]

    def _side_by_side(self, width: int, tokens: int) -> Tensor:
        """Additive mask (rows, 1, queries, keys): `width` candidates of so many `tokens` after the
        prompt's last token; each sees the prompt, that token, and its own tokens so far."""
        own = torch.ones(tokens, tokens, device=self.mask.device).tril()
        block = F.pad(torch.block_diag(*[own] * width), (1, 0, 1, 0), value=0.0)
        block[:, 0] = 1.0  # everybody sees the prompt's last token
        prompt = self.mask[:, None, :-1].expand(-1, len(block), -1).float()
        seen = torch.cat([prompt, block.expand(len(self.mask), -1, -1)], -1)
        return (1.0 - seen[:, None]).to(self.last.dtype) * torch.finfo(self.last.dtype).min


def constrained_choice(table: Tensor, targets: Sequence[Sequence[int]]) -> int:
    """The candidate that greedy decoding over the candidates' ids alone would write."""
    alive = list(range(len(targets)))
    for position in range(table.shape[1]):
        alive = [i for i in alive if position < len(targets[i])] or alive[:1]
        best = max(alive, key=lambda i: float(table[i, position]))
        alive = [i for i in alive if targets[i][: position + 1] == targets[best][: position + 1]]
    return alive[0]
