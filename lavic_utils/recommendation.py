"""Stage 2, recommendation fine-tuning (paper, section 4.2), and inference with three readings.

The vision side stays as stage 1 left it, so every item's visual tokens are constants, computed once
(`store`); LoRA trains the language model to answer a dialogue and ten candidates with one id.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lavic_utils import callbacks, loading, training, vision
from lavic_utils.config import Profile
from lavic_utils.config import Recommendation as Settings
from lavic_utils.data import Dialogue
from lavic_utils.evaluation import parse_answer
from lavic_utils.prompts import Candidate, Encoded, encode, recommend_prompt
from lavic_utils.training import IGNORE, pad_left, target_loss

# Every linear layer of the language model (section 4.2).
LANGUAGE_LINEAR = (
    r"(base_model\.model\.)?(llava\.)?model\.language_model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
)


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
        self.target_ids = functools.cache(self.target_ids)

    def prompt(self, dialogue: Dialogue, candidates: Sequence[str]) -> Encoded:
        items = [Candidate(a, self.titles[a], self.lengths.get(a, 0)) for a in candidates]
        text, turns = self.profile.prompts, dialogue.turns
        return recommend_prompt(self.tokenizer, text, turns, items, self.room, self.refuse)

    def longest(self, dialogues: Sequence[Dialogue], which: str) -> int:
        """Tokens of the longest of their prompts."""
        return max((len(self.prompt(d, getattr(d, which)).ids) for d in dialogues), default=0)

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
    `folder/adapter`. Returns the log: [{"step", "loss"}], and between them, `callbacks.SHARES` of
    the way, the step and what `on_step` measured of `model` as it was then."""
    torch.manual_seed(seed)
    settings = profile.recommendation
    arguments = training.training_arguments(
        folder / "checkpoints",
        settings,
        seed,
        loading.dtype(profile),
        logging_steps=2,
        save_total_limit=1,
        save_strategy="no",  # but by `callbacks.Saves`
        # rows alike in length, where several make a batch
        train_sampling_strategy="group_by_length" if settings.batch_size > 1 else "random",
    )
    trainer = RecommendationTrainer(
        settings.save_minutes,
        model=training.add_adapter(Recommender(model), settings.lora, LANGUAGE_LINEAR),
        processing_class=prompter.tokenizer,
        train_dataset=[prompter.row(example) for example in examples],
        data_collator=prompter.collate,
        args=arguments,
        # rows are ordered by the global random state
        callbacks=[callbacks.Reseeded(), *([callbacks.Watched(model, on_step)] if on_step else [])],
    )
    trainer.fit(folder / "adapter")
    model.eval()
    log = trainer.state.log_history
    measured = ("step", "loss", "recommended", "scored")
    entries = [{name: entry[name] for name in measured if name in entry} for entry in log]
    return [entry for entry in entries if len(entry) > 1]


@torch.inference_mode()
def generate_answers(
    model, prompter: Prompter, dialogues: Sequence[Dialogue], which: str
) -> list[Answer]:
    """Answers in the dialogues' order, read three ways; prompts are batched by length."""
    prompts, answers = [], []
    for dialogue in dialogues:
        ten = getattr(dialogue, which)
        prompts.append(prompter.prompt(dialogue, ten))
        answers.append(Answer("", candidates=ten, refused=prompts[-1].refused))
    asked = [i for i, answer in enumerate(answers) if not answer.refused]
    asked.sort(key=lambda i: len(prompts[i].ids))
    settings = prompter.profile.recommendation
    pace = callbacks.Pace("answers", len(asked))
    for rows in batches([len(prompts[i].ids) for i in asked], settings):
        group = [asked[row] for row in rows]
        _answer_batch(model, prompter, [prompts[i] for i in group], [answers[i] for i in group])
        pace.at(rows.stop)
    return answers


def batches(lengths: Sequence[int], settings: Settings) -> list[range]:
    """Prompts of rising lengths, in batches of as many as fit (`Settings.at_once`)."""
    found, start = [], 0
    for i, tokens in enumerate(lengths):
        if i - start >= settings.at_once(tokens):
            found.append(range(start, i))
            start = i
    return [*found, range(start, len(lengths))] if lengths else []


def _answer_batch(model, prompter: Prompter, prompts: list, answers: list) -> None:
    """Fill in the answers to one batch of prompts."""
    tokenizer, most = prompter.tokenizer, prompter.profile.recommendation.max_new_tokens
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = pad_left([p.ids for p in prompts], pad).to(model.device)
    mask = pad_left([[1] * len(p.ids) for p in prompts], 0).to(model.device)
    embeds = vision.place(model, ids, prompter.tokens(prompts), pad)
    targets = [[prompter.target_ids(a) for a in answer.candidates] for answer in answers]
    tables, written = read(model, embeds, mask, targets), []
    for answer, ten, (table, likeliest) in zip(answers, targets, tables, strict=True):
        totals = table.sum(1)
        means = totals / torch.tensor([len(target) for target in ten])
        answer.log_likelihoods = [round(value, 5) for value in means.tolist()]
        answer.probabilities = [round(value, 5) for value in totals.softmax(0).tolist()]
        answer.scored = answer.candidates[int(means.argmax())]
        answer.constrained = answer.candidates[constrained_choice(table, ten)]
        written.append(greedy_choice(likeliest, ten, most))
    if other := [i for i, tokens in enumerate(written) if not tokens]:  # it writes something else
        how = {"max_new_tokens": most, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
        out = model.generate(inputs_embeds=embeds[other], attention_mask=mask[other], **how)
        for i, tokens in zip(other, out.tolist(), strict=True):
            written[i] = tokens
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    for answer, text, prompt, tokens in zip(answers, texts, prompts, written, strict=True):
        answer.response = text.strip()
        answer.recommended = parse_answer(text, answer.candidates)
        answer.prompt_tokens, answer.new_tokens = len(prompt.ids), sum(t != end for t in tokens)
        answer.dropped_dialogue_tokens = prompt.dropped_dialogue_tokens
        answer.dropped_images = prompt.dropped_images


def read(model, embeds: Tensor, mask: Tensor, targets: list) -> list[tuple[Tensor, Tensor]]:
    """Prompts and the ids that may answer them, in one forward: a prompt's ids stand side by side
    after it, and each sees the prompt and itself.

    `embeds` (rows, length, hidden size), `mask` (rows, length), padded on the left; `targets`: a
    prompt's ids in tokens. Per prompt two tables (ids, tokens): the log-likelihood of each token, 0
    after an id's end, and the likeliest token in its place. ValueError: padded on the right."""
    if not mask[:, -1].all():
        raise ValueError("an answer follows the last column: prompts must be padded on the left")
    length, width = mask.shape[1], max(len(group) for group in targets)
    longest = max(len(target) for group in targets for target in group)
    table = mask.new_full((len(mask), width, longest), IGNORE)
    for i, group in enumerate(targets):
        for j, target in enumerate(group):
            table[i, j, : len(target)] = mask.new_tensor(target)
    inputs = table[:, :, :-1].clamp(min=0).flatten(1)  # an id's last token is predicted only
    later = model.get_input_embeddings()(inputs).to(embeds.dtype)
    place = torch.arange(width * (longest - 1), device=mask.device)
    part = F.pad(place // (longest - 1), (length, 0), value=-1)  # -1: the prompt; else which id
    seen = ((part == -1) | (part == part[:, None])).tril()  # (queries, keys)
    seen = seen & F.pad(mask.bool(), (0, len(place)), value=True)[:, None]  # (rows, queries, keys)
    seen.diagonal(dim1=1, dim2=2).fill_(True)  # of padding itself: a softmax needs something
    hide = embeds.new_full(seen.shape, torch.finfo(embeds.dtype).min).masked_fill_(seen, 0)
    after = mask.sum(1, keepdim=True) + place % (longest - 1)
    positions = torch.cat([(mask.cumsum(1) - 1).clamp(min=0), after], 1)
    out = model(
        inputs_embeds=torch.cat([embeds, later], 1),
        attention_mask=hide[:, None],  # four dimensions: added as it is
        position_ids=positions,
        use_cache=False,
        logits_to_keep=len(place) + 1,  # from the prompt's last token on
    )
    scores = out.logits.float().log_softmax(-1)
    first = scores[:, :1].expand(-1, width, -1)[:, :, None]  # after the prompt's last token
    scores = torch.cat([first, scores[:, 1:].unflatten(1, (width, longest - 1))], 2)
    found = scores.gather(-1, table.clamp(min=0)[..., None])[..., 0].masked_fill(table == IGNORE, 0)
    best = scores.argmax(-1)  # (rows, width, longest), as `found`
    return [(found[i, :n].cpu(), best[i, :n].cpu()) for i, n in enumerate(map(len, targets))]


def greedy_choice(likeliest: Tensor, targets: Sequence[list[int]], most: int) -> list[int]:
    """What greedy decoding writes in at most so many tokens, if it is an id: the one whose every
    token is the likeliest in its place. Empty where it writes something else."""
    pairs = zip(targets, likeliest.tolist(), strict=True)
    agree = (t[:most] for t, best in pairs if t[:most] == best[: len(t)][:most])
    return next(agree, [])


def constrained_choice(table: Tensor, targets: Sequence[Sequence[int]]) -> int:
    """The candidate that greedy decoding over the candidates' ids alone would write."""
    alive = list(range(len(targets)))
    for position in range(table.shape[1]):
        alive = [i for i in alive if position < len(targets[i])] or alive[:1]
        best = max(alive, key=lambda i: float(table[i, position]))
        alive = [i for i in alive if targets[i][: position + 1] == targets[best][: position + 1]]
    return alive[0]
