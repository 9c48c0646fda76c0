"""`make mini-model`: trains the mini model by its recipe, saves it, and measures what it can do."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lavic_utils import vision
from lavic_utils.config import PACKAGE, ROOT
from lavic_utils.mini import recipe, words
from lavic_utils.mini.accuracy import attribute_accuracy
from lavic_utils.provenance import write_json, write_text

TASKS = (("text", 10), ("title", 10), ("picture", 3), ("picture", 5))  # and numbers of candidates


def write(learner: recipe.Learner, rows: list[recipe.Row], visual: list[Tensor]) -> list[str]:
    """Greedy answers to the rows' prompts, whose placeholders stand for `visual` tokens."""
    pad = learner.tokenizer.pad_token_id
    prompts = []
    for row in rows:
        learnt = torch.tensor(row.labels) != recipe.IGNORE
        prompts.append(torch.tensor(row.ids)[~learnt])
    ids = pad_sequence(prompts, True, pad, padding_side="left")
    out = learner.model.generate(
        inputs_embeds=vision.place(learner.model, ids, visual, pad),
        attention_mask=(ids != pad).long(),
        max_new_tokens=16,
        do_sample=False,
        pad_token_id=pad,
    )
    return [text.strip() for text in learner.tokenizer.batch_decode(out, skip_special_tokens=True)]


def described(learner: recipe.Learner, rng: Random, how) -> dict[str, float]:
    """Attribute accuracy over the pool's pictures, seen as `how` makes visual tokens of them."""
    pool, texts = learner.pool, []
    for numbers in vision.batched(range(len(pool.facts)), 50):
        visual = how(learner.model, pool.pixels[numbers].float(), pool.sizes[numbers])
        rows = []
        for number, tokens in zip(numbers, visual, strict=True):
            item = recipe.random_item(rng, pool, number)
            rows.append(recipe.caption_row(learner, item, len(tokens)))
        texts += write(learner, rows, visual)
    return attribute_accuracy(texts, pool.facts)


def chosen(learner: recipe.Learner, rng: Random, task: str, size: int) -> dict[str, float]:
    """Shares of requests, as many as the pool's pictures, answered with a candidate that fits
    ("right") or with any ("valid"); what a blind choice would get ("chance")."""
    right = valid = chance = 0
    count = len(learner.pool.facts)
    for some in vision.batched(range(count), 50):
        rows = [recipe.choice_row(learner, rng, task, size) for _ in some]
        pictures = [picture for row in rows for picture in row.pictures]
        visual = recipe.picture_tokens(learner, pictures, 0, rng)
        for row, text in zip(rows, write(learner, rows, visual), strict=True):
            valid += text in row.names
            right += text in row.names and row.fits[row.names.index(text)]
            chance += sum(row.fits) / size
    return {"right": right / count, "valid": valid / count, "chance": chance / count}


@torch.inference_mode()
def abilities(learner: recipe.Learner, count: int = 510) -> dict[str, dict[str, float]]:
    """What it can do on `count` pictures and requests a task that it never saw."""
    learner.pool, rng = recipe.Pool(learner.processor, count, 999), Random("abilities")
    found = {
        "describe from full tokens": described(learner, rng, vision.full_tokens),
        "describe from raw [CLS]": described(learner, rng, vision.cls_tokens),
    }
    for task, size in TASKS:
        found[f"choose by {task} among {size}"] = chosen(learner, rng, task, size)
    return found


def card(found: dict[str, dict[str, float]]) -> str:
    phases = ", ".join(f"{phase.name} {phase.steps}" for phase in recipe.PHASES)
    text = "# mini LLaVA-NeXT of the LaViC companion\n\n"
    text += f"Made by `make mini-model` (phases and steps: {phases}).\n\n"
    for name, shares in found.items():
        text += f"- {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in shares.items()) + "\n"
    text += f"\nIt knows {len(words.PARTS)} kinds of drawn products: a teaching device. Nothing\n"
    return text + "it scores is a figure of the paper. Licence: Apache-2.0.\n"


def main(folder: Path = ROOT / ".cache" / "mini_model", target: Path = PACKAGE / "mini_model"):
    """Train, or go on training, and save an ordinary checkpoint with its measured abilities."""
    learner = recipe.train(folder)
    learner.model.save_pretrained(target)
    learner.processor.save_pretrained(target)
    found = abilities(learner)
    write_json(target / "abilities.json", found)
    write_text(target / "README.md", card(found))
