"""`make mini-model`: trains the mini model by its recipe, saves it, and measures what it can do."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lavic_utils import vision
from lavic_utils.config import PACKAGE, ROOT
from lavic_utils.mini import recipe
from lavic_utils.mini.accuracy import attribute_accuracy
from lavic_utils.mini.model import CONTEXT_WINDOW
from lavic_utils.provenance import file_hash, write_json, write_text
from lavic_utils.training import IGNORE

CARD = Path(__file__).with_name("card.md")
COUNT = 510  # pictures, and requests a task
TASKS = (("text", 10), ("title", 10), ("picture", 3), ("picture", 5))  # and numbers of candidates


def write(learner: recipe.Learner, rows: list[recipe.Row], visual: list[Tensor]) -> list[str]:
    """Greedy answers to the rows' prompts, whose placeholders stand for `visual` tokens."""
    pad = learner.tokenizer.pad_token_id
    prompts = [torch.tensor(row.ids)[torch.tensor(row.labels) == IGNORE] for row in rows]
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
        visual = recipe.picture_tokens(learner, pictures, 0)
        for row, text in zip(rows, write(learner, rows, visual), strict=True):
            valid += text in row.names
            right += text in row.names and row.fits[row.names.index(text)]
            chance += sum(row.fits) / size
    return {"right": right / count, "valid": valid / count, "chance": chance / count}


@torch.inference_mode()
def abilities(learner: recipe.Learner) -> dict[str, dict[str, float]]:
    """What it can do on COUNT unseen pictures, of looks it never saw, and requests a task."""
    learner.pool = recipe.Pool(learner.processor, COUNT, 999, held_out=True)
    rng = Random("abilities")
    found = {
        "describe from full tokens": described(learner, rng, vision.full_tokens),
        "describe from raw [CLS]": described(learner, rng, vision.cls_tokens),
    }
    for task, size in TASKS:
        found[f"choose by {task} among {size}"] = chosen(learner, rng, task, size)
    return found


def card(learner: recipe.Learner, found: dict, digest: str) -> str:
    """The model card (card.md), from what was trained and measured."""
    rows = {"describe": "", "choose": ""}
    for name, shares in found.items():
        verb, what = name.split(" ", 1)
        cells = [what, *(f"{share:.3f}" for share in shares.values())]
        rows[verb] += f"| {' | '.join(cells)} |\n"
    cuda = learner.model.device.type == "cuda"
    return CARD.read_text(encoding="utf-8").format(
        parameters=learner.model.num_parameters(),
        words=len(learner.tokenizer),
        minutes=learner.seconds / 60,
        machine=torch.cuda.get_device_name() if cuda else "two CPU cores",
        phases=",\n".join(f"*{phase.name}* ({phase.steps:,} steps)" for phase in recipe.PHASES),
        digest=digest[:12],
        count=COUNT,
        described=rows["describe"].rstrip(),
        chosen=rows["choose"].rstrip(),
        window=CONTEXT_WINDOW,
    )


def main(folder: Path = ROOT / ".cache" / "mini_model", target: Path = PACKAGE / "mini_model"):
    """Train, or go on training, and save an ordinary checkpoint with its measured abilities."""
    learner = recipe.train(folder).eval()
    learner.model.save_pretrained(target)
    learner.processor.save_pretrained(target)
    found = abilities(learner)
    write_json(target / "abilities.json", found)
    digest = file_hash(target / "model.safetensors")
    write_text(target / "README.md", card(learner, found, digest))
    print(f"{target}: {digest[:12]}, {learner.seconds / 60:.0f} minutes")
