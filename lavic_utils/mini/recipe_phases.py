"""`make mini-model`: the three phases in order, resumable, then the measured abilities and the model card."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from torch import nn

from lavic_utils import distillation, vision
from lavic_utils.config import PACKAGE, ROOT, load_profile
from lavic_utils.evaluation import parse_answer, wilson
from lavic_utils.mini import model as minimodel
from lavic_utils.mini import recipe as p
from lavic_utils.mini import recipe_images as images
from lavic_utils.mini import words as w
from lavic_utils.provenance import write_json, write_text

STEPS = {"tower": 2200, "language": 1600, "joint": 3750, "late": 750, "last": 600, "sharpen": 3500}
PEAK = {
    "tower": 1e-3,
    "language": 2e-3,
    "joint": 1.5e-3,
    "late": 4e-4,
    "last": 2e-3,
    "sharpen": 8e-4,
}


def train(folder: Path) -> tuple[object, object]:
    """All phases from the last stored step on; (model, processor)."""
    folder.mkdir(parents=True, exist_ok=True)
    processor = minimodel.build_processor()
    tokenizer = processor.tokenizer
    encode = p.Encoder(tokenizer).encode
    model = minimodel.build_model(processor, seed=0)
    pool = images.ImagePool(processor, 6000, 0, folder / "pool.safetensors")
    heads, helpers = images.TowerHeads(128), p.Helpers(128)
    inside = model.model
    p.train_phase(
        "tower",
        folder,
        nn.ModuleDict({"tower": inside.vision_tower, "h": heads}),
        STEPS["tower"],
        PEAK["tower"],
        lambda rng, done: images.tower_loss(model, heads, pool, rng, 192),
    )
    p.train_phase(
        "language",
        folder,
        nn.ModuleDict({"lm": inside.language_model, "h": helpers}),
        STEPS["language"],
        PEAK["language"],
        lambda rng, done: p.language_loss(
            model, helpers, p.collate(p.language_rows(rng, done, encode, tokenizer, 3000), 0)
        ),
    )
    pool.freeze(model)
    parts = {
        "lm": inside.language_model,
        "h": helpers,
        "proj": inside.multi_modal_projector,
        "nl": nn.ParameterList([inside.image_newline]),
    }
    memo: dict = {}
    p.train_phase(
        "joint",
        folder,
        nn.ModuleDict(parts),
        STEPS["joint"],
        PEAK["joint"],
        lambda rng, done: images.joint_loss(
            model, helpers, pool, rng, done, encode, tokenizer, memo
        ),
    )
    fresh, last = (
        images.ImagePool(processor, 9000, 1, folder / "pool_late.safetensors"),
        inside.vision_tower.encoder.layers[-1],
    )
    last.requires_grad_(False)
    p.train_phase(
        "late",
        folder,
        nn.ModuleDict({**parts, "heads": heads, "tower": inside.vision_tower}),
        STEPS["late"],
        PEAK["late"],
        lambda rng, done: images.late_loss(
            model, helpers, heads, fresh, rng, encode, tokenizer, memo
        ),
    )
    model.requires_grad_(False)
    last.requires_grad_(True)
    words = images.anchors()
    p.train_phase(
        "last",
        folder,
        nn.ModuleDict({"last": last}),
        STEPS["last"],
        PEAK["last"],
        lambda rng, done: images.last_layer_loss(model, fresh, words, rng),
    )
    last.requires_grad_(False)
    for part in (inside.language_model, inside.multi_modal_projector):
        part.requires_grad_(True)
    inside.image_newline.requires_grad_(True)
    pool.freeze(model)  # the tower has moved since
    parts.pop("h")
    chunks = torch.tensor(tokenizer.convert_tokens_to_ids(list(w.ID_CHUNKS)))
    p.train_phase(
        "sharpen",
        folder,
        nn.ModuleDict(parts),
        STEPS["sharpen"],
        PEAK["sharpen"],
        lambda rng, done: images.joint_loss(
            model, None, pool, rng, 0.5, encode, tokenizer, memo, chunks=chunks
        ),
    )
    return model.eval().requires_grad_(False), processor


@torch.inference_mode()
def abilities(model, processor, count: int = 510) -> dict:
    """What the base model can do on made-up items it has never seen (another pool, another seed), n = `count` each."""
    tokenizer, profile = processor.tokenizer, load_profile("mini")
    encode, rng = p.Encoder(tokenizer).encode, random.Random("abilities")
    pool = images.ImagePool(processor, count, seed=999)
    pictures = [
        (pool.pixels[i : i + 1, : vision.tile_count(model, s)].float(), s[None])
        for i, s in enumerate(pool.sizes)
    ]
    titles = [w.title("Velora", "modern", f["kind"]) for f in pool.facts]
    found: dict = {"n": count}
    for name, how in (
        ("describe from full tokens", vision.full_tokens),
        ("describe from raw [CLS]", vision.cls_tokens),
    ):
        texts = distillation.describe(model, processor, profile, titles, pictures, how)
        found[name] = distillation.attribute_accuracy(texts, [f["looks"] for f in pool.facts])
    for style, size in (("text", 10), ("title", 10), ("image", 3), ("image", 5)):
        problems = [p.sample_problem(rng, size, style, pool) for _ in range(count)]
        hits = valid = 0
        chance = sum(sum(q.matches) / size for q in problems) / count
        for group in vision.batched(problems, 50):
            for problem, asin in zip(
                group, _choose(model, tokenizer, encode, group, pictures, rng), strict=True
            ):
                names = [t.asin for t in problem.candidates]
                valid += asin in names
                hits += asin in names and problem.matches[names.index(asin)]
        found[f"choose by {style} among {size}"] = {
            "right": hits / count,
            "ci95": wilson(hits, count),
            "valid": valid / count,
            "chance": chance,
        }
    return found


def _choose(model, tokenizer, encode, problems, pictures, rng) -> list[str | None]:
    asked = [t.image for q in problems for t in q.candidates if t.image is not None]
    values = {i: vision.full_tokens(model, *pictures[i])[0] for i in set(asked)}
    rows = [
        p.problem_row(
            q,
            encode,
            [len(values[t.image]) if t.image is not None else 0 for t in q.candidates],
            rng,
            tokenizer,
        )
        for q in problems
    ]
    prompts = [
        [i for i, label in zip(r.ids, r.labels, strict=True) if label == p.IGNORE] for r in rows
    ]
    ids = training.pad_left(prompts, tokenizer.pad_token_id)
    mask = training.pad_left([[1] * len(x) for x in prompts], 0)
    embeds = vision.place(model, ids, [values[i] for i in asked], tokenizer.pad_token_id)
    out = model.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    return [parse_answer(text) for text in tokenizer.batch_decode(out, skip_special_tokens=True)]


CARD = """---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
---
# mini LLaVA-NeXT of the LaViC companion

A genuine `LlavaNextForConditionalGeneration`, {millions:.1f} million parameters ({size:.1f} MB), that plays the part of
LLaVA-v1.6-Mistral-7B in the `mini` profile: CLIP tower (128 wide, 4 layers, {tile}-pixel tiles, {patch}-pixel patches),
two-layer projector, Mistral (128 wide, 6 layers), a word-level tokenizer of {words} tokens.

**Data.** All made up and rendered by `lavic_utils.pretraining*` from seeds of their own: no item and no dialogue of a
mini world. 15,000 pictures; requests are keywords among random filler words, never a world's wording. English words of
the mini world only: anything else is `<unk>`.

**Recipe** (`make mini-model`; seed 0, AdamW, warm-up and cosine, batches of 3,000 tokens, 2 CPU cores).
1. *Tower*, {tower} steps: name kind and looks from [CLS] (last layer) and, apart, from the mean patch (last layer but one).
2. *Language*, {language} steps: choose an id among 3 to 10 candidates by words; copy. Auxiliary heads (is this token asked
   for, does this candidate match, which token came before) are thrown away.
3. *Joint*, {joint} steps, tower frozen: describe from full patch tokens; choose by pictures; replay of text.
4. *Late*, {late} steps: the same with the tower (but for its last layer) learning too, on 9,000 fresh pictures.
5. *Last layer*, {last} steps, all else frozen: [CLS] of the last layer meets frozen random word embeddings, as CLIP's meets
   its text tower. The layer before, which LLaVA reads, does not change, and the projector never sees a [CLS]: so raw
   [CLS] vectors mean nothing to the language model, for the same reason as in the real one.
6. *Sharpen*, {sharpen} steps of phase 3 for valid ids, without the heads: many requests that several candidates fit (by title
   alone, or by pictures of 5 patches), a loss for a first id chunk that is no candidate's, and one for overlap between
   the embeddings of id chunks. In doubt, a small model writes about the mean of several ids, and that is nobody's.

The committed weights come from these functions run once, with differences in the schedule: the head for the token before
joined the language phase half-way (800 steps without it, 800 with it), after copying had not appeared without it; the
joint phase was stopped at step 3,000 of a longer cosine and finished by 750 steps from a peak of 5e-4; the late phase
ran as 450 and then 300 steps with a warm-up each (peaks 4e-4 and 3e-4); and sharpening ran three times with a warm-up each:
350 steps with the heads and the first of its two losses only, 1,200 (peak 5e-4) without pictures of 5 patches, 2,000 as
above. Some 110 minutes on 2 shared cores in all. The recipe has not been run from its start as one command.

**Measured abilities** (unseen items, n = {n} each; `abilities.json`)

| describe | colour | pattern | shape | accent | all |
| --- | --- | --- | --- | --- | --- |
{describe}

| choose | right [95 %] | chance | valid ids |
| --- | --- | --- | --- |
{choose}

**Limits.** A teaching device. It knows twelve kinds of drawn products and some {words} tokens; its window is {window}
tokens; nothing it scores is a figure of the paper.
"""


def write_card(model, processor, found: dict, folder: Path) -> None:
    describe = "\n".join(
        f"| {name.removeprefix('describe ')} | "
        + " | ".join(f"{v[n]:.3f}" for n in (*w.ATTRIBUTES, "all"))
        + " |"
        for name, v in found.items()
        if name.startswith("describe")
    )
    choose = "\n".join(
        f"| {name.removeprefix('choose ')} | {v['right']:.3f} [{v['ci95'][0]:.3f}, {v['ci95'][1]:.3f}] "
        f"| {v['chance']:.3f} | {v['valid']:.3f} |"
        for name, v in found.items()
        if name.startswith("choose")
    )
    size = (folder / "model.safetensors").stat().st_size / 1e6
    write_text(
        folder / "README.md",
        CARD.format(
            millions=sum(x.numel() for x in model.parameters()) / 1e6,
            size=size,
            tile=minimodel.TILE,
            patch=minimodel.PATCH,
            words=len(processor.tokenizer),
            n=found["n"],
            describe=describe,
            choose=choose,
            window=minimodel.CONTEXT_WINDOW,
            **STEPS,
        ),
    )


def main(
    folder: Path = ROOT / ".cache" / "mini_model", target: Path = PACKAGE / "mini_model"
) -> None:
    """Train (or go on training), then save an ordinary checkpoint with its measured abilities and card."""
    model, processor = train(folder)
    save(model, processor, target)


def save(model, processor, target: Path) -> None:
    model.save_pretrained(target)
    processor.save_pretrained(target)
    found = abilities(model, processor)
    write_json(target / "abilities.json", found)
    write_card(model, processor, found, target)
    print(json.dumps(found, indent=1))
