"""The direct way: a plain reference for speed and for equality, after what is known of the released scripts.

Every step opens and prepares its images again and encodes five tiles of each, zero padding included; one prompt at a
time; logits at every position; generation by `generate`. Only the padding's vectors are dropped, so that results equal
the project's. `see` is where visual tokens come from: `look` encodes them anew each time it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from peft import get_peft_model
from PIL import Image
from torch import Tensor

from lavic_utils import data, vision
from lavic_utils.data import Dialogue
from lavic_utils.distillation import IGNORE, VISION_LINEAR, Picture, lora_config, pad_left
from lavic_utils.prompts import describe_prompt, encode
from lavic_utils.recommendation import LANGUAGE_LINEAR, Example
from lavic_utils.runs import Run

See = Callable[[Sequence[str]], dict[str, Tensor]]
BATCH = 4  # images a step in stage 1 (paper, section 5.1)


def autocast(dtype: torch.dtype) -> torch.autocast:
    """The precision that the project's trainers use for a model in `dtype` (`training.training_arguments`)."""
    return torch.autocast("cuda", dtype=dtype, enabled=torch.cuda.is_available() and dtype != torch.float32)


def cls_of_five(model, processor, images: Sequence[Image.Image]) -> list[Tensor]:
    """[CLS] of five tiles an image; those of real tiles are returned: per image (tiles, hidden size)."""
    values, sizes = vision.pixels(processor, images)
    side = model.config.vision_config.image_size
    five = 1 + max((height // side) * (width // side) for height, width in model.config.image_grid_pinpoints)
    padded = F.pad(values, (0,) * 7 + (five - values.shape[1],)).to(model.device, model.dtype)
    last = vision.inner(model).vision_tower(padded.flatten(0, 1)).last_hidden_state[:, 0]
    projected = vision.inner(model).multi_modal_projector(last).unflatten(0, (len(images), five))
    return [tokens[:vision.tile_count(model, size)] for tokens, size in zip(projected, sizes, strict=True)]


def look(run: Run, model) -> See:
    """Opens, prepares and encodes the first images of the items named, each time; unreadable ones are left out."""
    def see(names: Sequence[str]) -> dict[str, Tensor]:
        images = {name: data.open_image(data.image_file(run.root, name)) for name in names}
        images = {name: image for name, image in images.items() if image is not None}
        return dict(zip(images, cls_of_five(model, run.processor, list(images.values())), strict=True)) if images else {}
    return see


def place(model, ids: Tensor, visual: Sequence[Tensor]) -> Tensor:
    """Token ids (batch, length) -> embeddings with the visual tokens in the placeholders, in order."""
    embeds = model.get_input_embeddings()(ids).clone()
    if visual:
        embeds[ids == model.config.image_token_id] = torch.cat(list(visual)).to(embeds)
    return embeds


# ---------------------------------------------------------------- stage 2 and inference
def recommendation_loss(run: Run, model, see: See, example: Example) -> Tensor:
    """The model's own loss, from logits over the whole prompt, of one example."""
    visual = see(example.candidates)
    row = run.prompter(visual).row(example)
    ids, labels = (torch.tensor([row[name]], device=model.device) for name in ("input_ids", "labels"))
    return model(inputs_embeds=place(model, ids, [visual[name] for name in row["visual"]]), labels=labels).loss


def train_recommender(run: Run, model, see: See, examples: Iterable[Example]) -> None:
    tuned = get_peft_model(model, lora_config(run.profile.recommendation.lora, LANGUAGE_LINEAR)).train()
    steps(tuned, run.profile.recommendation, (lambda e=e: recommendation_loss(run, tuned, see, e) for e in examples))


@torch.inference_mode()
def answer(run: Run, model, see: See, dialogue: Dialogue) -> str:
    candidates, tokenizer = getattr(dialogue, run.profile.candidates), run.processor.tokenizer
    visual = see(candidates)
    prompt = run.prompter(visual).prompt(dialogue, candidates)
    ids = torch.tensor([prompt.ids], device=model.device)
    out = model.generate(
        inputs_embeds=place(model, ids, [visual[name] for name in prompt.visual]), attention_mask=torch.ones_like(ids),
        max_new_tokens=run.profile.recommendation.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(out[0], skip_special_tokens=True).strip()


# ---------------------------------------------------------------- stage 1
def description_loss(run: Run, model, rows: Sequence[Picture]) -> Tensor:
    """The model's own loss, from logits over whole rows, of some images opened and prepared here."""
    images = [data.open_image(row.path) for row in rows]
    visual, ids, labels, tokenizer = cls_of_five(model, run.processor, images), [], [], run.processor.tokenizer
    for row, tokens in zip(rows, visual, strict=True):
        prompt = describe_prompt(tokenizer, run.profile.prompts, row.title, len(tokens))
        room = run.profile.distillation.max_length - len(prompt) - 1
        target = encode(tokenizer, " " + row.description)[:room] + [tokenizer.eos_token_id]
        ids.append(prompt + target)
        labels.append([IGNORE] * len(prompt) + target)
    mask = pad_left([[1] * len(row) for row in ids], 0).to(model.device)
    embeds = place(model, pad_left(ids, tokenizer.pad_token_id).to(model.device), visual)
    return model(inputs_embeds=embeds, attention_mask=mask, labels=pad_left(labels, IGNORE).to(model.device)).loss


def train_student(run: Run, model, rows: Sequence[Picture]) -> None:
    student = get_peft_model(model, lora_config(run.profile.distillation.lora, VISION_LINEAR)).train()
    steps(student, run.profile.distillation,
          (lambda g=group: description_loss(run, student, g) for group in vision.batched(rows, BATCH)))


def steps(model, stage, losses: Iterable[Callable[[], Tensor]]) -> None:
    """An update after every loss: AdamW, gradients clipped at 1.0."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=stage.learning_rate, weight_decay=stage.weight_decay)
    for loss in losses:
        with autocast(model.dtype):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
