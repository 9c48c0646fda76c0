"""Stage 1, visual knowledge self-distillation (paper, section 4.1).

Teacher: the base model, which describes an item from its title and the full visual tokens. Student: the same model
given the title and only the [CLS] of each tile. Cross-entropy on the description; LoRA on the vision tower and the
projector; the language model stays frozen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback

from lavic_utils import vision
from lavic_utils import wording as w
from lavic_utils.config import Profile, UserError
from lavic_utils.prompts import describe_prompt, encode
from lavic_utils.training import Stage, StageTrainer, add_adapter, load_adapter, merged, training_arguments
from lavic_utils.training import lora_config as lora_config  # stage 2 takes these two from here
from lavic_utils.training import trainable_names as trainable_names

IGNORE = -100
# Anchored: "model." keeps the language model's layers, whose names end alike, out.
VISION_LINEAR = (r"(base_model\.model\.)?(llava\.)?model\.(vision_tower\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
                 r"|multi_modal_projector\.linear_[12])")


@dataclass(frozen=True)
class Picture:
    """One training image: what the student is told, and (once the teacher has spoken) what it must say."""

    asin: str
    title: str
    path: Path
    description: str = ""


def pad_left(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Left padding: targets end together, and generation continues from the last column."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[value] * (longest - len(row)) + list(row) for row in rows])


def mean_row_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over rows of each row's mean token cross-entropy, so that a batch equals the mean of its single rows.

    logits (batch, kept, vocabulary) of the last `kept` positions; labels (batch, kept - 1), IGNORE where not scored.
    """
    token = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE,
                            reduction="none").view(labels.shape)
    counts = (labels != IGNORE).sum(1)
    if (counts == 0).any():
        raise ValueError("a row has no target token left; its prompt was cut wrongly")
    return (token.sum(1) / counts).mean()


def target_loss(llava, embeds: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """The language model on placed embeddings (batch, length, hidden size), rows padded on either side: `mean_row_loss` of the
    targets. Logits are kept from the batch's first target position on only."""
    labels, mask = labels.to(embeds.device), mask.to(embeds.device)
    first = max(1, int((labels != IGNORE).any(0).int().argmax()))
    out = llava(inputs_embeds=embeds, attention_mask=mask, use_cache=False, logits_to_keep=labels.shape[1] - first + 1)
    return mean_row_loss(out.logits, labels[:, first:])


class Student(Stage):
    """Stage 1 (paper, section 4.1): the loss of the teacher's description, given the title and each tile's [CLS]."""

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, pixel_values: Tensor,
                image_sizes: Tensor) -> dict[str, Tensor]:
        """A batch of `StudentCollator`: ids, labels and mask (batch, length), pixels (batch, tiles, 3, side, side)."""
        visual = vision.cls_tokens(self.llava, pixel_values, image_sizes)  # v = projector([CLS] of each tile)
        embeds = vision.place(self.llava, input_ids, visual)
        return {"loss": target_loss(self.llava, embeds, attention_mask, labels)}  # -log p(description | title, v), by token


class Pictures:
    """Images to pixel tensors; kept in memory where the profile says so (the mini model's are small)."""

    def __init__(self, processor, keep: bool) -> None:
        self.processor, self.keep, self.memory = processor, keep, {}

    def __call__(self, path: Path) -> tuple[Tensor, Tensor]:
        if path in self.memory:
            return self.memory[path]
        with Image.open(path) as image:
            values, size = vision.pixels(self.processor, [image.convert("RGB")])
        if self.keep:
            self.memory[path] = (values, size)
        return values, size


def stack_pixels(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Images of different tile counts in one batch, zero-padded (`vision.real_tiles` drops the padding again)."""
    most = max(values.shape[1] for values, _ in parts)
    padded = [F.pad(values, (0,) * 7 + (most - values.shape[1],)) for values, _ in parts]
    return torch.cat(padded), torch.cat([size for _, size in parts])


def describe(model, processor, profile: Profile, titles: Sequence[str], pictures: Sequence[tuple[Tensor, Tensor]],
             how=vision.full_tokens) -> list[str]:
    """Greedy descriptions from full tokens (`how=vision.full_tokens`, the teacher) or [CLS] (`vision.cls_tokens`)."""
    tokenizer, texts = processor.tokenizer, []
    for rows in vision.batched(range(len(titles)), profile.distillation.teacher_batch_size):
        values, sizes = stack_pixels([pictures[i] for i in rows])
        with torch.inference_mode():
            visual = how(model, values, sizes)
            prompts = [describe_prompt(tokenizer, profile.prompts, titles[i], len(v))
                       for i, v in zip(rows, visual, strict=True)]
            ids = pad_left(prompts, tokenizer.pad_token_id).to(model.device)
            mask = pad_left([[1] * len(p) for p in prompts], 0).to(model.device)
            out = model.generate(
                inputs_embeds=vision.place(model, ids, visual, tokenizer.pad_token_id), attention_mask=mask,
                max_new_tokens=profile.distillation.max_new_tokens, do_sample=False,
                pad_token_id=tokenizer.pad_token_id)
        texts += [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]
    return texts


class StudentCollator:
    """Title and [CLS] placeholders in, the teacher's description out; nothing is ever shortened: what is longer than
    `max_length` raises UserError."""

    def __init__(self, model, processor, profile: Profile, pictures: Pictures) -> None:
        self.model, self.tokenizer, self.profile, self.pictures = model, processor.tokenizer, profile, pictures

    def __call__(self, rows: Sequence[Picture]) -> dict[str, Tensor]:
        values, sizes = stack_pixels([self.pictures(row.path) for row in rows])
        ids, labels = [], []
        for row, size in zip(rows, sizes, strict=True):
            prompt = describe_prompt(self.tokenizer, self.profile.prompts, row.title,
                                     vision.tile_count(self.model, size))
            target = encode(self.tokenizer, " " + row.description) + [self.tokenizer.eos_token_id]
            if (length := len(prompt) + len(target)) > self.profile.distillation.max_length:
                raise UserError(f"{row.path.name}: title, [CLS] and description take {length} tokens, more than max_length "
                                f"{self.profile.distillation.max_length} of stage 1; raise it in the profile")
            ids.append(prompt + target)
            labels.append([IGNORE] * len(prompt) + target)
        return {"input_ids": pad_left(ids, self.tokenizer.pad_token_id), "labels": pad_left(labels, IGNORE),
                "attention_mask": pad_left([[1] * len(i) for i in ids], 0), "pixel_values": values,
                "image_sizes": sizes}


def train_student(profile: Profile, model, processor, train: Sequence[Picture], valid: Sequence[Picture],
                  folder: Path, seed: int, on_epoch=None) -> list[dict]:
    """Train the student and leave the best epoch's adapter in `folder/adapter`. Returns one record an epoch.

    `on_epoch(model) -> dict` adds measurements (attribute accuracy, say) to each epoch's record. A killed run
    continues from the last finished epoch.
    """
    torch.manual_seed(seed)
    stage = profile.distillation
    student = add_adapter(Student(model), stage.lora, VISION_LINEAR)
    pictures = Pictures(processor, stage.keep_pixels)
    trainer = StageTrainer(
        model=student, processing_class=processor.tokenizer, train_dataset=list(train), eval_dataset=list(valid),
        data_collator=StudentCollator(model, processor, profile, pictures),
        args=training_arguments(folder / "checkpoints", stage, seed, vision.dtype(profile), eval_strategy="epoch",
                                save_strategy="epoch", save_total_limit=2, load_best_model_at_end=True,
                                metric_for_best_model="eval_loss", greater_is_better=False, logging_steps=10,
                                per_device_eval_batch_size=stage.eval_batch_size))
    if on_epoch:
        trainer.add_callback(_EachEpoch(on_epoch, model))
    trainer.fit(folder / "adapter")
    return epoch_history(trainer.state.log_history)


class _EachEpoch(TrainerCallback):
    def __init__(self, measure, model) -> None:
        self.measure, self.model = measure, model

    def on_evaluate(self, args, state, control, **_):
        self.model.eval()
        state.log_history[-1].update(self.measure(self.model))
        self.model.train()


def epoch_history(log: Sequence[dict]) -> list[dict]:
    """One record an epoch: mean training loss, validation loss, validation perplexity, and what `on_epoch` added."""
    history, losses = [], []
    for entry in log:
        if "loss" in entry:
            losses.append(entry["loss"])
        if "eval_loss" in entry:
            more = {k: v for k, v in entry.items() if k.startswith("accuracy")}
            history.append({"epoch": round(entry["epoch"]), "train_loss": sum(losses) / max(1, len(losses)),
                            "valid_loss": entry["eval_loss"], "valid_perplexity": math.exp(entry["eval_loss"]), **more})
            losses = []
    return history


def load_student(profile: Profile, model, folder: Path):
    """The base model with a stage-1 adapter, merged into its vision side where the weights are float32."""
    return merged(load_adapter(model, folder / "adapter")).eval().requires_grad_(False)


def attribute_accuracy(texts: Sequence[str], facts: Sequence[dict]) -> dict[str, float]:
    """Share of descriptions that name the right word, by kind of attribute (mini world: the truth is known)."""
    found = {}
    for name, words in w.ATTRIBUTES.items():
        said = [[t for t in re.findall(r"\w+", text) if t in words] for text in texts]
        found[name] = sum(s[:1] == [f[name]] for s, f in zip(said, facts, strict=True)) / len(facts)
    found["all"] = sum(all(re.search(rf"\b{f[n]}\b", t) for n in w.ATTRIBUTES)
                       for t, f in zip(texts, facts, strict=True)) / len(facts)
    return found
