"""The released scripts' loop in our own words: `make bench` compares with it, in speed and result.

As there, each step opens, tiles and encodes the images of its rows anew, a white picture for one
that is missing, and five tiles of each, zero padding included; prompts are tokenized alone and with
their targets; vectors are put in their places one by one; logits come at every position; stage 2
and answers take one dialogue at a time, and `generate` answers. Left out: validation, checkpoints,
the progress bar. What the padding and the white pictures add is dropped: losses and answers equal
the package's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from peft import get_peft_model
from PIL import Image
from torch import Tensor

from lavic_utils import data, loading, vision
from lavic_utils.data import Dialogue
from lavic_utils.distillation import VISION_LINEAR, Picture
from lavic_utils.experiment import Experiment
from lavic_utils.prompts import describe_prompt, encode
from lavic_utils.recommendation import LANGUAGE_LINEAR, Example
from lavic_utils.training import IGNORE, lora_config, pad_left

BATCH = 4  # images a step in stage 1 (paper, section 5.1)
WHITE = Image.new("RGB", (336, 336), "white")


def cls_of_five(model, processor, images: Sequence[Image.Image | None]) -> list[Tensor]:
    """[CLS] of five tiles an image; those of real tiles are returned: per image (tiles, hidden)."""
    batch = processor.image_processor([image or WHITE for image in images], return_tensors="pt")
    values, sizes = batch["pixel_values"], batch["image_sizes"]
    padded = F.pad(values, (0,) * 7 + (5 - values.shape[1],)).to(model.device, model.dtype)
    tower, projector = vision.inner(model).vision_tower, vision.inner(model).multi_modal_projector
    last = tower(padded.flatten(0, 1)).last_hidden_state[:, 0]  # (images * 5, vision's hidden)
    pairs = zip(projector(last).unflatten(0, (-1, 5)), sizes, strict=True)
    return [tokens[: vision.tile_count(model, size)] for tokens, size in pairs]


@torch.no_grad()
def look(run: Experiment, model, names: Sequence[str]) -> dict[str, Tensor]:
    """[CLS] tokens of items' first images; those that cannot be read have none in the prompt."""
    images = [data.open_image(data.image_file(run.root, name)) for name in names]
    found = zip(names, images, cls_of_five(model, run.processor, images), strict=True)
    return {name: tokens for name, image, tokens in found if image is not None}


def place(model, ids: Tensor, visual: Sequence[Tensor]) -> Tensor:
    """Token ids (batch, length) -> embeddings, the visual tokens in the placeholders in order."""
    embeds = model.get_input_embeddings()(ids).clone()
    slots = (ids == model.config.image_token_id).nonzero().tolist()  # (row, column) of each
    vectors = [vector for tokens in visual for vector in tokens]
    for (row, column), vector in zip(slots, vectors, strict=True):
        embeds[row, column] = vector
    return embeds


# ---------------------------------------------------------------- stage 1
def description_loss(run: Experiment, model, rows: Sequence[Picture]) -> Tensor:
    """The model's own loss of some descriptions; their images are opened and prepared here."""
    tokenizer = run.processor.tokenizer
    visual = cls_of_five(model, run.processor, [data.open_image(row.path) for row in rows])
    ids, labels = [], []
    for row, tokens in zip(rows, visual, strict=True):
        prompt = describe_prompt(tokenizer, run.profile.prompts, row.title, len(tokens))
        target = [*encode(tokenizer, " " + row.description), tokenizer.eos_token_id]
        ids.append(describe_prompt(tokenizer, run.profile.prompts, row.title, len(tokens)) + target)
        labels.append([IGNORE] * len(prompt) + target)
    mask = pad_left([[1] * len(row) for row in ids], 0).to(model.device)
    embeds = place(model, pad_left(ids, tokenizer.pad_token_id).to(model.device), visual)
    wanted = pad_left(labels, IGNORE).to(model.device)
    return model(inputs_embeds=embeds, attention_mask=mask, labels=wanted).loss


def distil(run: Experiment, model, rows: Sequence[Picture]) -> None:
    """One epoch of stage 1."""
    stage, steps = run.profile.distillation, vision.batched(rows, BATCH)
    train(run, model, stage, VISION_LINEAR, description_loss, steps)


# ---------------------------------------------------------------- stage 2 and inference
def recommendation_loss(run: Experiment, model, example: Example) -> Tensor:
    """The model's own loss, from logits over the whole prompt, of one example."""
    visual = look(run, model, example.candidates)
    prompter = run.prompter(visual)
    prompter.prompt(example.dialogue, example.candidates)  # tokenized alone, and again with its end
    row = prompter.row(example)
    ids = torch.tensor([row["input_ids"]], device=model.device)
    labels = torch.tensor([row["labels"]], device=model.device)
    embeds = place(model, ids, [visual[name] for name in row["visual"]])
    return model(inputs_embeds=embeds, labels=labels).loss


def fine_tune(run: Experiment, model, examples: Iterable[Example]) -> None:
    """One epoch of stage 2."""
    stage = run.profile.recommendation
    train(run, model, stage, LANGUAGE_LINEAR, recommendation_loss, examples)


@torch.inference_mode()
def answers(run: Experiment, model, dialogues: Iterable[Dialogue]) -> list[str]:
    """The model's greedy answers, one dialogue at a time."""
    tokenizer, texts = run.processor.tokenizer, []
    for dialogue in dialogues:
        candidates = getattr(dialogue, run.profile.candidates)
        visual = look(run, model, candidates)
        prompt = run.prompter(visual).prompt(dialogue, candidates)
        ids = torch.tensor([prompt.ids], device=model.device)
        out = model.generate(
            inputs_embeds=place(model, ids, [visual[name] for name in prompt.visual]),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=run.profile.recommendation.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True).strip())
    return texts


# ---------------------------------------------------------------- what both stages share
def train(
    run: Experiment, model, stage, target: str, loss_of: Callable[..., Tensor], steps: Iterable
) -> None:
    """A fresh adapter, and an update a step: AdamW, gradients clipped at 1.0, in the precision that
    our trainers use."""
    tuned = get_peft_model(model, lora_config(stage.lora, target)).train()
    weights = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=stage.learning_rate, weight_decay=stage.weight_decay)
    for step in steps:
        half = torch.cuda.is_available() and tuned.dtype != torch.float32
        with torch.autocast("cuda", dtype=loading.half(), enabled=half):
            loss = loss_of(run, tuned, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
