"""Stage 2, recommendation fine-tuning (paper, section 4.2), and inference with three readings of an answer.

The vision side is as stage 1 left it and frozen, so every item's visual tokens are constants computed once
(`vision.encode_items`); LoRA trains the language model to answer a dialogue and ten candidates with one id.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor
from transformers import DynamicCache, PrinterCallback, Trainer

from lavic_utils import vision
from lavic_utils.config import Profile
from lavic_utils.data import Dialogue
from lavic_utils.distillation import IGNORE, forward_loss, lora_config, pad_left, trainable_names, training_arguments
from lavic_utils.prompts import Encoded, encode, recommend_prompt

LANGUAGE_LINEAR = (r"(base_model\.model\.)?model\.language_model\.layers\.\d+\."
                   r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")


@dataclass(frozen=True)
class Example:
    """One training example: a dialogue, its (copied) candidate list with the truth inside, and the truth."""

    dialogue: Dialogue
    candidates: tuple[str, ...]
    target: str


@dataclass
class Answer:
    """What a method said to one dialogue, read three ways. `log_likelihoods` follow the candidates' order."""

    response: str
    constrained: str = ""
    scored: str = ""
    log_likelihoods: list[float] = field(default_factory=list)
    dropped_dialogue_tokens: int = 0
    dropped_images: int = 0


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
    """Dialogues to encoded prompts, with the items' visual tokens (none for a method without images)."""

    def __init__(self, tokenizer, profile: Profile, titles: Mapping[str, str], visual: Mapping[str, Tensor] | None):
        self.tokenizer, self.profile, self.titles, self.visual = tokenizer, profile, titles, visual or {}
        self.lengths = {asin: len(tokens) for asin, tokens in self.visual.items()}
        stage = profile.recommendation
        self.room = stage.max_length - stage.max_new_tokens

    def prompt(self, dialogue: Dialogue, candidates: Sequence[str]) -> Encoded:
        return recommend_prompt(self.tokenizer, self.profile.prompts, dialogue.turns, candidates, self.titles,
                                self.lengths, self.room)

    def answer(self, asin: str) -> list[int]:
        """The target: the id and the end of the sequence."""
        return [*encode(self.tokenizer, self.profile.prompts.answer.format(id=asin)), self.tokenizer.eos_token_id]

    def row(self, example: Example) -> dict:
        """Prompt and target of one training example; the loss sees the target alone."""
        prompt, target = self.prompt(example.dialogue, example.candidates), self.answer(example.target)
        return {"input_ids": prompt.ids + target, "labels": [IGNORE] * len(prompt.ids) + target,
                "visual": prompt.visual}

    def tokens(self, prompts: Sequence[Encoded]) -> list[Tensor]:
        return [self.visual[asin] for prompt in prompts for asin in prompt.visual]


class RecommendationTrainer(Trainer):
    prompter: Prompter

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        loss, out = forward_loss(model, inputs["input_ids"], inputs["labels"], inputs["attention_mask"],
                                 inputs["visual"], self.processing_class.pad_token_id)
        return (loss, out) if return_outputs else loss


def collator(prompter: Prompter):
    def collate(rows: Sequence[dict]) -> dict:
        return {"input_ids": pad_left([row["input_ids"] for row in rows], prompter.tokenizer.pad_token_id),
                "labels": pad_left([row["labels"] for row in rows], IGNORE),
                "attention_mask": pad_left([[1] * len(row["input_ids"]) for row in rows], 0),
                "visual": [prompter.visual[asin] for row in rows for asin in row["visual"]]}
    return collate


def train_recommender(profile: Profile, model, prompter: Prompter, examples: Sequence[Example], folder: Path,
                      seed: int) -> tuple[object, list[dict]]:
    """Fine-tune one domain's adapter, saved as a standard peft folder `folder/adapter`. Returns (model, loss log)."""
    torch.manual_seed(seed)
    stage = profile.recommendation
    tuned = get_peft_model(model, lora_config(stage.lora, LANGUAGE_LINEAR))
    names = trainable_names(tuned)
    if not names or any("language_model.layers" not in name for name in names):
        raise RuntimeError(f"stage 2 must train the language model only, would train {names[:3]}")
    rows = [prompter.row(example) for example in examples]
    saving = {"save_strategy": "steps", "save_steps": stage.save_steps} if stage.save_steps else {"save_strategy": "no"}
    trainer = RecommendationTrainer(
        model=tuned, processing_class=prompter.tokenizer, train_dataset=rows, data_collator=collator(prompter),
        args=training_arguments(folder / "checkpoints", stage, seed, logging_steps=5, save_total_limit=1,
                                train_sampling_strategy="group_by_length", **saving))
    trainer.remove_callback(PrinterCallback)
    last = any((folder / "checkpoints").glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=last or None)
    tuned.save_pretrained(folder / "adapter")
    return tuned.eval(), [{"step": e["step"], "loss": e["loss"]} for e in trainer.state.log_history if "loss" in e]


@torch.inference_mode()
def answer(model, prompter: Prompter, dialogues: Sequence[Dialogue], which: str, scored: bool = True) -> list[Answer]:
    """Greedy answers in the dialogues' order; prompts are batched by length. With `scored`, also the log-likelihood
    of each candidate's id, the id a constrained greedy decoder would write, and the most likely id."""
    prompts = [prompter.prompt(d, getattr(d, which)) for d in dialogues]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    answers: dict[int, Answer] = {}
    for group in vision.batched(order, prompter.profile.recommendation.eval_batch_size):
        candidates = [getattr(dialogues[i], which) for i in group]
        for i, found in zip(group, _answer_batch(model, prompter, [prompts[i] for i in group], candidates, scored),
                            strict=True):
            answers[i] = found
    return [answers[i] for i in range(len(prompts))]


def _answer_batch(model, prompter: Prompter, prompts: list[Encoded], candidates: list[Sequence[str]],
                  scored: bool) -> list[Answer]:
    tokenizer, pad = prompter.tokenizer, prompter.tokenizer.pad_token_id
    ids = pad_left([p.ids for p in prompts], pad).to(model.device)
    mask = pad_left([[1] * len(p.ids) for p in prompts], 0).to(model.device)
    embeds = vision.place(model, ids, prompter.tokens(prompts), pad)
    out = model.generate(inputs_embeds=embeds, attention_mask=mask, do_sample=False, pad_token_id=pad,
                         max_new_tokens=prompter.profile.recommendation.max_new_tokens)
    answers = [Answer(response=text.strip(), dropped_dialogue_tokens=p.dropped_dialogue_tokens,
                      dropped_images=p.dropped_images)
               for text, p in zip(tokenizer.batch_decode(out, skip_special_tokens=True), prompts, strict=True)]
    if scored:
        for found, names, table in zip(answers, candidates, score_ids(model, prompter, embeds, mask, candidates),
                                       strict=True):
            found.log_likelihoods = [round(float(row.sum()), 4) for row in table]
            found.scored = names[max(range(len(names)), key=lambda i: found.log_likelihoods[i])]
            found.constrained = names[constrained_choice(table, [prompter.answer(n) for n in names])]
    return answers


def score_ids(model, prompter: Prompter, embeds: Tensor, mask: Tensor, candidates: list[Sequence[str]]) -> list[Tensor]:
    """Per prompt a (candidates, id tokens) table of token log-likelihoods. The prompt is read once; its cache, all but
    its last token, is shared by the candidates (a fully cached prefix goes silently wrong in some versions)."""
    rows, width = len(candidates), max(len(names) for names in candidates)
    targets = [prompter.answer(name) for names in candidates for name in names + names[:1] * (width - len(names))]
    longest = max(len(t) for t in targets)
    table = torch.tensor([t + [IGNORE] * (longest - len(t)) for t in targets], device=embeds.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    cache = DynamicCache()
    core.model.language_model(inputs_embeds=embeds[:, :-1], attention_mask=mask[:, :-1],
                              position_ids=positions[:, :-1], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(width)
    known = table[:, :-1].masked_fill(table[:, :-1] == IGNORE, prompter.tokenizer.pad_token_id)
    last = embeds[:, -1:].repeat_interleave(width, 0)
    step = torch.cat([last, core.get_input_embeddings()(known).to(last.dtype)], 1)
    grown = torch.cat([mask.repeat_interleave(width, 0), torch.ones_like(known)], 1)
    where = positions[:, -1:].repeat_interleave(width, 0) + torch.arange(step.shape[1], device=embeds.device)
    hidden = core.model.language_model(inputs_embeds=step, attention_mask=grown, position_ids=where,
                                       past_key_values=cache).last_hidden_state
    scores = F.log_softmax(core.lm_head(hidden).float(), -1).gather(-1, table.clamp(min=0).unsqueeze(-1))[..., 0]
    scores = scores.masked_fill(table == IGNORE, 0.0).view(rows, width, longest).cpu()
    return [scores[i, :len(names)] for i, names in enumerate(candidates)]


def constrained_choice(table: Tensor, targets: Sequence[Sequence[int]]) -> int:
    """The candidate that greedy decoding over the candidates' ids alone would write, token by token."""
    alive = list(range(len(targets)))
    for position in range(table.shape[1]):
        alive = [i for i in alive if position < len(targets[i])] or alive[:1]
        best = max(alive, key=lambda i: float(table[i, position]))
        alive = [i for i in alive if targets[i][:position + 1] == targets[best][:position + 1]]
    return alive[0]
