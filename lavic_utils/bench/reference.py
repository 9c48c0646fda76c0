"""The direct way, a plain reference for speed and equality, after what the released scripts do.

Every step opens and prepares its images again and encodes five tiles of each, zero padding
included; one prompt at a time; logits at every position; answers by `generate`. Only the padding's
vectors are dropped, so that losses and answers equal the package's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from peft import get_peft_model
from PIL import Image
from torch import Tensor

from lavic_utils import data, vision
from lavic_utils.config import Lora
from lavic_utils.data import Dialogue
from lavic_utils.distillation import VISION_LINEAR, Picture
from lavic_utils.experiment import Experiment
from lavic_utils.prompts import describe_prompt, encode
from lavic_utils.recommendation import LANGUAGE_LINEAR, Example
from lavic_utils.training import IGNORE, lora_config, pad_left

See = Callable[[Sequence[str]], dict[str, Tensor]]  # item ids -> [CLS] tokens of each
BATCH = 4  # images a step in stage 1 (paper, section 5.1)


def cls_of_five(model, processor, images: Sequence[Image.Image]) -> list[Tensor]:
    """[CLS] of five tiles an image; those of real tiles are returned: per image (tiles, hidden)."""
    values, sizes = vision.pixels(processor, images)
    missing = 5 - values.shape[1]
    padded = F.pad(values, (0, 0, 0, 0, 0, 0, 0, missing)).to(model.device, model.dtype)
    tower, projector = vision.inner(model).vision_tower, vision.inner(model).multi_modal_projector
    last = tower(padded.flatten(0, 1)).last_hidden_state[:, 0]  # (images * 5, vision's hidden)
    projected = projector(last).unflatten(0, (len(images), 5))
    found = []
    for tokens, size in zip(projected, sizes, strict=True):
        found.append(tokens[: vision.tile_count(model, size)])
    return found


def look(run: Experiment, model) -> See:
    """What opens, prepares and encodes items' first images each time; unreadable ones have none."""

    def see(names: Sequence[str]) -> dict[str, Tensor]:
        images = {}
        for name in names:
            image = data.open_image(data.image_file(run.root, name))
            if image is not None:
                images[name] = image
        if not images:
            return {}
        tokens = cls_of_five(model, run.processor, list(images.values()))
        return dict(zip(images, tokens, strict=True))

    return see


def place(model, ids: Tensor, visual: Sequence[Tensor]) -> Tensor:
    """Token ids (batch, length) -> embeddings, the visual tokens in the placeholders in order."""
    embeds = model.get_input_embeddings()(ids).clone()
    if visual:
        embeds[ids == model.config.image_token_id] = torch.cat(list(visual)).to(embeds)
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
        ids.append(prompt + target)
        labels.append([IGNORE] * len(prompt) + target)
    mask = pad_left([[1] * len(row) for row in ids], 0).to(model.device)
    embeds = place(model, pad_left(ids, tokenizer.pad_token_id).to(model.device), visual)
    wanted = pad_left(labels, IGNORE).to(model.device)
    return model(inputs_embeds=embeds, attention_mask=mask, labels=wanted).loss


def distil(run: Experiment, model, rows: Sequence[Picture]) -> None:
    """One epoch of stage 1."""
    tuned = adapted(model, run.profile.distillation.lora, VISION_LINEAR)
    groups = vision.batched(rows, BATCH)
    update(tuned, run.profile.distillation, lambda g: description_loss(run, tuned, g), groups)


# ---------------------------------------------------------------- stage 2 and inference
def recommendation_loss(run: Experiment, model, see: See, example: Example) -> Tensor:
    """The model's own loss, from logits over the whole prompt, of one example."""
    visual = see(example.candidates)
    row = run.prompter(visual).row(example)
    ids = torch.tensor([row["input_ids"]], device=model.device)
    labels = torch.tensor([row["labels"]], device=model.device)
    embeds = place(model, ids, [visual[name] for name in row["visual"]])
    return model(inputs_embeds=embeds, labels=labels).loss


def fine_tune(run: Experiment, model, see: See, examples: Iterable[Example]) -> None:
    """One epoch of stage 2."""
    tuned = adapted(model, run.profile.recommendation.lora, LANGUAGE_LINEAR)
    stage = run.profile.recommendation
    update(tuned, stage, lambda e: recommendation_loss(run, tuned, see, e), examples)


@torch.inference_mode()
def answer(run: Experiment, model, see: See, dialogue: Dialogue) -> str:
    """The model's greedy answer to one dialogue."""
    candidates, tokenizer = getattr(dialogue, run.profile.candidates), run.processor.tokenizer
    visual = see(candidates)
    prompt = run.prompter(visual).prompt(dialogue, candidates)
    ids = torch.tensor([prompt.ids], device=model.device)
    out = model.generate(
        inputs_embeds=place(model, ids, [visual[name] for name in prompt.visual]),
        attention_mask=torch.ones_like(ids),
        max_new_tokens=run.profile.recommendation.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(out[0], skip_special_tokens=True).strip()


# ---------------------------------------------------------------- what both stages share
def adapted(model, lora: Lora, target: str):
    """The model with a fresh adapter, ready to train."""
    return get_peft_model(model, lora_config(lora, target)).train()


def update(tuned, stage, loss_of: Callable[..., Tensor], steps: Iterable) -> None:
    """An update a step: AdamW, gradients clipped at 1.0, in the precision that our trainers use."""
    weights = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=stage.learning_rate, weight_decay=stage.weight_decay)
    for step in steps:
        half = torch.cuda.is_available() and tuned.dtype != torch.float32
        with torch.autocast("cuda", dtype=vision.half(), enabled=half):
            loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
