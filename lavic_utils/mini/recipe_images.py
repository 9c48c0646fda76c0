"""The image half of the mini model's recipe: a pool of made-up pictures, the vision tower, and the joining."""

from __future__ import annotations

import io
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lavic_utils import vision
from lavic_utils.mini import model as minimodel
from lavic_utils.mini import recipe as p
from lavic_utils.mini import words as w
from lavic_utils.mini.drawing import draw_product

SIDE = 144
PATCHES = (minimodel.TILE // minimodel.PATCH) ** 2  # of one tile
SIZES = ((1, 1), (1, 1), (1, 1), (1, 0.5), (0.5, 1), (1, 0.75))
KIND_NAMES = tuple(w.PARTS)
WORDS = {"kind": KIND_NAMES, **w.ATTRIBUTES}


class ImagePool:
    """Pictures of made-up items: tiles as the processor makes them, and the words that are true of each."""

    def __init__(self, processor, count: int, seed: int, cache: Path | None = None) -> None:
        rng = random.Random(f"pool-{seed}")
        self.facts = [
            {"kind": rng.choice(KIND_NAMES), "looks": p.random_looks(rng)} for _ in range(count)
        ]
        self.by_kind = {
            k: [i for i, f in enumerate(self.facts) if f["kind"] == k] for k in KIND_NAMES
        }
        if cache and cache.is_file():
            state = load_file(cache)
            self.pixels, self.sizes = state["pixels"], state["sizes"]
        else:
            parts = [
                vision.pixels(processor, [self._picture(rng, f) for f in group])
                for group in vision.batched(self.facts, 200)
            ]
            self.pixels = torch.cat(
                [F.pad(v, (0,) * 7 + (5 - v.shape[1],)) for v, _ in parts]
            ).half()
            self.sizes = torch.cat([s for _, s in parts])
            if cache:
                save_file({"pixels": self.pixels, "sizes": self.sizes}, cache)
        self.labels = torch.tensor(
            [
                [WORDS[n].index(({**f["looks"], "kind": f["kind"]})[n]) for n in WORDS]
                for f in self.facts
            ]
        )
        self.patches: list[Tensor] = []  # layer -2 patch tokens, once the tower is frozen

    @staticmethod
    def _picture(rng: random.Random, facts: dict) -> Image.Image:
        wide, high = rng.choice(SIZES)
        picture = draw_product(
            facts["kind"],
            **{n: facts["looks"][n] for n in ("shape", "colour", "pattern", "accent")},
            size=(round(SIDE * wide), round(SIDE * high)),
            rng=rng,
        )
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=88)
        return Image.open(stream).convert("RGB")

    def draw(self, rng: random.Random, domain: str, kind: str | None = None) -> tuple[int, dict]:
        row = rng.choice(self.by_kind[kind or rng.choice(list(w.KINDS[domain]))])
        return row, self.facts[row]

    def freeze(self, model) -> None:
        """Patch tokens of every image (tiles, patches, width), before the projector."""
        self.patches = []
        with torch.inference_mode():
            for i in range(0, len(self.facts), 100):
                tiles, counts = vision.real_tiles(
                    model, self.pixels[i : i + 100].float(), self.sizes[i : i + 100]
                )
                hidden = model.model.vision_tower(tiles, output_hidden_states=True).hidden_states[
                    -2
                ][:, 1:]
                self.patches += [t.half().clone() for t in hidden.split(counts)]
        self.patches = [t.clone() for t in self.patches]


class TowerHeads(nn.Module):
    """Word predictors for [CLS] (last layer) and for the mean patch (last layer but one); thrown away afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cls = nn.ModuleList(nn.Linear(width, len(v)) for v in WORDS.values())
        self.patch = nn.ModuleList(nn.Linear(width, len(v)) for v in WORDS.values())


def tower_loss(
    model, heads: TowerHeads, pool: ImagePool, rng: random.Random, batch: int
) -> dict[str, Tensor]:
    """Cross-entropy of each attribute's word, from whole images or from the mean over an image's crops."""
    crops = rng.random() < 0.3
    rows = torch.tensor(rng.sample(range(len(pool.facts)), batch // 4 if crops else batch))
    tiles = pool.pixels[rows, 1:].float() if crops else pool.pixels[rows, :1].float()
    real = (tiles.flatten(2).abs().amax(-1) > 0).float()  # zero tiles are padding
    out = model.model.vision_tower(tiles.flatten(0, 1), output_hidden_states=True)
    views = {"cls": out.last_hidden_state[:, 0], "patch": out.hidden_states[-2][:, 1:].mean(1)}
    loss: dict[str, Tensor] = {}
    for name, hidden in views.items():
        hidden = hidden.unflatten(0, real.shape)
        hidden = (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        for i, (word, head) in enumerate(zip(WORDS, getattr(heads, name), strict=True)):
            logits = head(hidden)
            loss[f"{name}.{word}"] = F.cross_entropy(logits, pool.labels[rows, i])
            if not crops:
                loss[f"{name}.{word}.right"] = (
                    (logits.argmax(-1) == pool.labels[rows, i]).float().mean().detach()
                )
    loss["total"] = sum(v for k, v in loss.items() if not k.endswith("right"))
    return loss


def image_embeds(model, pool: ImagePool, rows: list[int], single_tile: bool) -> list[Tensor]:
    """Projected patch tokens: the whole-image tile alone, or all tiles packed as LLaVA does. From the stored patches of
    a frozen tower, or, where none are stored, from the tower itself (which then learns too)."""
    if pool.patches:
        patches = [
            pool.patches[r][:1].float() if single_tile else pool.patches[r].float() for r in rows
        ]
    else:
        tiles = [
            pool.pixels[r, : 1 if single_tile else vision.tile_count(model, pool.sizes[r])].float()
            for r in rows
        ]
        hidden = model.model.vision_tower(
            torch.cat(tiles), output_hidden_states=True
        ).hidden_states[-2][:, 1:]
        patches = list(hidden.split([len(t) for t in tiles]))
    projected = model.model.multi_modal_projector(torch.cat(patches)).split(
        [len(t) for t in patches]
    )
    if single_tile:
        return [t[0] for t in projected]
    return model.model.pack_image_features(
        projected, pool.sizes[rows], "default", model.model.image_newline
    )[0]


def full_length(model, pool: ImagePool, row: int, memo: dict) -> int:
    key = tuple(pool.sizes[row].tolist())
    if key not in memo:
        with torch.no_grad():
            memo[key] = len(image_embeds(model, pool, [row], False)[0])
    return memo[key]


def joint_rows(
    model,
    pool: ImagePool,
    rng: random.Random,
    done: float,
    encode,
    tokenizer,
    memo: dict,
    tokens: int,
    sharpen: bool = False,
) -> tuple[list[p.Row], int | None]:
    """One batch: captions from full tokens, choices by pictures, or replay of text; and how many patches of its first
    tile an item shows (None: full tokens). `sharpen` adds doubt: more choices by title, and pictures of 5 patches."""
    draw, rows, used = rng.random(), [], 0
    captions = 0.2 if 0.1 < done < 0.85 else 0.45
    if draw > 0.65:
        return p.language_rows(rng, 1.0, encode, tokenizer, tokens, 0.5 if sharpen else 0.2), None
    shown = (
        None
        if draw < captions or draw >= 0.57
        else 5
        if sharpen and rng.random() < 0.6
        else PATCHES
    )
    while used < tokens:
        if draw < captions:
            row = rng.randrange(len(pool.facts))
            facts = pool.facts[row]
            domain = next(d for d, kinds in w.KINDS.items() if facts["kind"] in kinds)
            thing = p.random_thing(rng, domain, image=(row, facts))
            rows.append(
                p.caption_row(thing, encode, full_length(model, pool, row, memo), tokenizer)
            )
        else:
            count = (
                10
                if shown == 5
                else 3
                if not shown or done < 0.25
                else 5
                if done < 0.4
                else rng.choice((3, 5, 10))
            )
            problem = p.sample_problem(rng, count, "image", pool)
            lengths = [shown or full_length(model, pool, t.image, memo) for t in problem.candidates]
            rows.append(p.problem_row(problem, encode, lengths, rng, tokenizer))
        used += len(rows[-1].ids)
    return rows, shown


def joint_loss(
    model, helpers, pool, rng, done, encode, tokenizer, memo, tokens=3000, chunks=None
) -> dict[str, Tensor]:
    """`chunks` (tokens of id chunks): the sharpening phase."""
    rows, shown = joint_rows(
        model, pool, rng, done, encode, tokenizer, memo, tokens, sharpen=chunks is not None
    )
    batch = p.collate(rows, tokenizer.pad_token_id)
    images = [i for r in rows for i in r.images]
    visual = image_embeds(model, pool, images, bool(shown)) if images else []
    if shown and shown < PATCHES:
        visual = [tokens[sorted(rng.sample(range(PATCHES), shown))] for tokens in visual]
    loss = p.language_loss(
        model,
        helpers,
        batch,
        vision.place(model, batch["ids"], visual, tokenizer.pad_token_id),
        chunks,
    )
    name = (
        "text"
        if not images
        else "caption"
        if not rows[0].matches
        else f"choice{len(rows[0].matches)}.{shown}"
    )
    loss[f"{name}.exact"] = loss["exact"]
    return loss


def late_loss(
    model, helpers, heads: TowerHeads, pool: ImagePool, rng, encode, tokenizer, memo
) -> dict[str, Tensor]:
    """Everything but the tower's last layer together, on fresh pictures: what makes shapes hold on unseen items."""
    loss = joint_loss(model, helpers, pool, rng, 0.9, encode, tokenizer, memo, tokens=2000)
    tower = tower_loss(model, heads, pool, rng, 48)
    words = {k: v for k, v in tower.items() if k.startswith("patch")}
    loss["total"] = loss["total"] + 0.2 * sum(
        v for k, v in words.items() if not k.endswith("right")
    )
    return loss | {k: v for k, v in words.items() if "shape" in k or "accent" in k}


def anchors(width: int = 128, scale: float = 4.0) -> dict[str, Tensor]:
    """Frozen word embeddings, random directions: the text side that the last layer's [CLS] learns to meet."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: F.normalize(torch.randn(len(v), width, generator=generator), dim=-1) * scale
        for name, v in WORDS.items()
    }


def last_layer_loss(
    model, pool: ImagePool, words: dict[str, Tensor], rng, batch: int = 256
) -> dict[str, Tensor]:
    """CLIP's task for the last layer alone: an image's [CLS] meets the sum of its words' embeddings. LLaVA reads the
    layer before, so nothing it can do changes; and [CLS] now lies in a space its projector has never seen."""
    rows = torch.tensor(rng.sample(range(len(pool.facts)), batch))
    tile = torch.tensor([rng.randrange(3) if rng.random() < 0.5 else 0 for _ in range(batch)])
    cls = model.model.vision_tower(pool.pixels[rows, tile].float()).last_hidden_state[:, 0]
    target = sum(words[name][pool.labels[rows, i]] for i, name in enumerate(WORDS))
    loss = {"total": (cls - target).square().sum(-1).mean()}
    shape = list(WORDS).index("shape")
    rest = cls - (target - words["shape"][pool.labels[rows, shape]])
    loss["shape.right"] = (
        ((rest @ words["shape"].T).argmax(-1) == pool.labels[rows, shape]).float().mean().detach()
    )
    return loss
