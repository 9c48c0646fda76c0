"""Stage 1, visual knowledge self-distillation (paper, section 4.1).

Teacher: the base model, which describes an item from its title and the full visual tokens. Student:
the same model given the title and only the [CLS] of each tile. Cross-entropy on the description;
LoRA on the vision tower and the projector; the language model stays frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from lavic_utils import callbacks, loading, training, vision
from lavic_utils.config import Profile, UserError
from lavic_utils.data import open_image
from lavic_utils.prompts import describe_prompt, encode, plain
from lavic_utils.training import IGNORE, pad_left, target_loss

# Every linear layer of tower and projector (section 4.1); "model." keeps the language model's out.
VISION_LINEAR = (
    r"(base_model\.model\.)?(llava\.)?model\."
    r"(vision_tower\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)|"
    r"multi_modal_projector\.linear_[12])"
)


@dataclass(frozen=True)
class Picture:
    """One training image: what the student is told, and (once the teacher has spoken) must say."""

    asin: str
    title: str
    path: Path
    description: str = ""


class Student(training.Stage):
    """The loss of the teacher's description, given the title and each tile's [CLS] (or what else
    `how` makes one token of)."""

    def __init__(self, llava, how: Callable = vision.cls_tokens) -> None:
        super().__init__(llava)
        self.how = how

    def forward(self, input_ids, labels, attention_mask, pixel_values, image_sizes) -> dict:
        """Tensors of `StudentCollator`: ids, labels and mask (batch, length), pixels (batch, tiles,
        3, side, side), sizes (batch, 2)."""
        # v = projector([CLS] of each tile): per image (tiles, hidden size)
        visual = self.how(self.llava, pixel_values, image_sizes)
        embeds = vision.place(self.llava, input_ids, visual)  # (batch, length, hidden size)
        # -log p(description | title, v), mean over its tokens
        return {"loss": target_loss(self.llava, embeds, attention_mask, labels)}


class Pictures:
    """Image files to (pixel values, size), as `vision.pixels` gives them; `keep`: in memory."""

    def __init__(self, processor, keep: bool) -> None:
        self.processor, self.keep, self.memory = processor, keep, {}

    def __call__(self, path: Path) -> tuple[Tensor, Tensor]:
        found = self.memory.get(path) or vision.pixels(self.processor, [open_image(path)])
        if self.keep:
            self.memory[path] = found
        return found


def stack_pixels(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Images of different tile counts in one batch, zero-padded to (images, most tiles, 3, side,
    side); `vision.real_tiles` drops the padding again."""
    most = max(values.shape[1] for values, _ in parts)
    padded = [F.pad(values, (0,) * 7 + (most - values.shape[1],)) for values, _ in parts]
    return torch.cat(padded), torch.cat([size for _, size in parts])


@torch.inference_mode()
def describe(
    model,
    processor,
    profile: Profile,
    titles: Sequence[str],
    pictures: Sequence[tuple[Tensor, Tensor]],
    how: Callable = vision.full_tokens,
) -> list[str]:
    """Greedy descriptions of items from their full tokens (the teacher) or, with
    `how=vision.cls_tokens`, from their [CLS] (the student)."""
    tokenizer, pad, texts = processor.tokenizer, processor.tokenizer.pad_token_id, []
    for rows in vision.batched(range(len(titles)), profile.distillation.teacher_batch_size):
        visual = how(model, *stack_pixels([pictures[i] for i in rows]))
        prompts = []
        for i, tokens in zip(rows, visual, strict=True):
            prompts.append(describe_prompt(tokenizer, profile.prompts, titles[i], len(tokens)))
        ids = pad_left(prompts, pad).to(model.device)
        out = model.generate(
            inputs_embeds=vision.place(model, ids, visual, pad),
            attention_mask=pad_left([[1] * len(p) for p in prompts], 0).to(model.device),
            max_new_tokens=profile.distillation.max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
        texts += [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]
    return texts


class StudentCollator:
    """Title and [CLS] placeholders, then the teacher's description, which alone is scored. What is
    longer than `max_length` is never shortened: UserError."""

    def __init__(self, model, processor, profile: Profile, pictures: Pictures) -> None:
        self.sizes = SimpleNamespace(config=model.config)  # a worker process needs no weights
        self.tokenizer, self.profile, self.pictures = processor.tokenizer, profile, pictures

    def check(self, rows: Sequence[Picture]) -> None:
        """UserError for the first row that is too long, before any image is decoded."""
        grids = self.sizes.config.image_grid_pinpoints
        most = max(vision.tile_count(self.sizes, size) for size in grids)
        for row in rows:
            self.tokens(row, most)

    def tokens(self, row: Picture, tiles: int) -> tuple[list[int], list[int]]:
        """(prompt, target) of an image of so many tiles."""
        prompt = describe_prompt(self.tokenizer, self.profile.prompts, row.title, tiles)
        # spelled as the model would write it: the tokenizer puts the space before a text itself
        text = plain(self.tokenizer, row.description)
        target = [*encode(self.tokenizer, text), self.tokenizer.eos_token_id]
        found, most = len(prompt) + len(target), self.profile.distillation.max_length
        if found > most:
            raise UserError(
                f"{row.path.name}: title, [CLS] and description take {found} tokens, more than "
                f"max_length {most} of stage 1; raise it in the profile"
            )
        return prompt, target

    def __call__(self, rows: Sequence[Picture]) -> dict[str, Tensor]:
        values, sizes = stack_pixels([self.pictures(row.path) for row in rows])
        ids, labels = [], []
        for row, size in zip(rows, sizes, strict=True):
            prompt, target = self.tokens(row, vision.tile_count(self.sizes, size))
            ids.append(prompt + target)
            labels.append([IGNORE] * len(prompt) + target)
        return {
            "input_ids": pad_left(ids, self.tokenizer.pad_token_id),
            "labels": pad_left(labels, IGNORE),
            "attention_mask": pad_left([[1] * len(i) for i in ids], 0),
            "pixel_values": values,
            "image_sizes": sizes,
        }


def distil(
    profile: Profile,
    model,
    processor,
    train: Sequence[Picture],
    valid: Sequence[Picture],
    folder: Path,
    seed: int,
    on_epoch: Callable | None = None,
    how: Callable = vision.cls_tokens,
) -> list[dict]:
    """Train the student and leave the best epoch's adapter in `folder/adapter`; a killed run goes
    on. Returns one record an epoch, to which `on_epoch(model) -> dict` adds measurements. `how`:
    another way to one token a tile, from the last layer but one, whose follower is not trained."""
    torch.manual_seed(seed)
    settings, target = profile.distillation, VISION_LINEAR
    if how is not vision.cls_tokens:
        last = model.config.vision_config.num_hidden_layers - 1
        target = target.replace(r"vision_tower\.", rf"vision_tower\.(?!.*\.layers\.{last}\.)")
    collate = StudentCollator(model, processor, profile, Pictures(processor, settings.keep_pixels))
    collate.check([*train, *valid])
    arguments = training.training_arguments(
        folder / "checkpoints",
        settings,
        seed,
        loading.dtype(profile),
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=10,
        per_device_eval_batch_size=settings.eval_batch_size,
        dataloader_num_workers=settings.workers,
        dataloader_persistent_workers=settings.workers > 0,
    )
    trainer = training.StageTrainer(
        settings.save_minutes,
        model=training.add_adapter(Student(model, how), settings.lora, target),
        processing_class=processor.tokenizer,
        train_dataset=list(train),
        eval_dataset=list(valid),
        data_collator=collate,
        args=arguments,
        callbacks=[callbacks.EachEpoch(on_epoch, model)] if on_epoch else None,
    )
    trainer.fit(folder / "adapter")
    return epoch_history(trainer.state.log_history)


def epoch_history(log: Sequence[dict]) -> list[dict]:
    """One record an epoch: mean training loss, validation loss and perplexity, and what `on_epoch`
    added."""
    history, losses, step = [], [], 0
    for entry in log:
        if "loss" in entry:  # the mean over the steps since the last
            losses += [entry["loss"]] * (entry["step"] - step)
            step = entry["step"]
        if "eval_loss" in entry:
            train, valid = sum(losses) / len(losses), entry["eval_loss"]
            record = {"epoch": round(entry["epoch"]), "train_loss": train, "valid_loss": valid}
            record["valid_perplexity"] = math.exp(valid)
            record |= {k: v for k, v in entry.items() if k.startswith("accuracy")}
            history.append(record)
            losses = []
    return history


def load_student(model, folder: Path):
    """The base model with the stage-1 adapter of `folder/adapter`, merged where that is exact."""
    return training.merged(training.load_adapter(model, folder / "adapter"))
