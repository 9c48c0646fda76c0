"""Visual tokens: from an image to tiles, to full tokens (LLaVA's) and to [CLS] tokens (LaViC's).

An image becomes n tiles, itself and a grid of crops: 5 for a square one, 3 for a wide or tall one.
Full tokens: every patch of the last layer but one, projected, with row ends. [CLS] tokens: position
0 of the last layer of every tile, projected: n vectors an image (paper, section 4.1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.models import llava_next

from lavic_utils.data import open_image

# Images encoded at once on a card: 64 of the 7B model's take 9.4 GiB, and are no faster (H200).
ON_CARD = 16


def inner(model):
    """The LlavaNextModel inside a LlavaNextForConditionalGeneration, peft-wrapped or not."""
    return model.get_base_model().model if hasattr(model, "get_base_model") else model.model


def pixels(processor, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """Pixel values (n, most tiles, 3, side, side), zero-padded, and sizes (n, 2): height, width."""
    own, to = processor.image_processor, ("image_mean", "image_std")
    once = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale"), False)  # tiles have a size
    scaled = {name: [value / own.rescale_factor for value in getattr(own, name)] for name in to}
    batch = own(list(images), return_tensors="pt", **once, **scaled)
    return batch["pixel_values"], batch["image_sizes"]


def tile_count(model, size: Sequence[int] | Tensor) -> int:
    """Tiles of an image of (height, width), never assumed to be five: for LLaVA-v1.6 1 + 2 (wide,
    tall or small), 1 + 3 (very) or 1 + 4."""
    size = torch.as_tensor(size).tolist()
    grids, side = model.config.image_grid_pinpoints, model.config.vision_config.image_size
    return llava_next.modeling_llava_next.image_size_to_num_patches(size, grids, side)


def real_tiles(model, pixel_values: Tensor, sizes: Tensor) -> tuple[Tensor, list[int]]:
    """Drop the zero padding: (all tiles, 3, side, side) and the number of tiles of each image."""
    counts = [tile_count(model, size) for size in sizes]
    tiles = [image[:count] for image, count in zip(pixel_values, counts, strict=True)]
    return torch.cat(tiles).to(model.device, model.dtype), counts


def full_tokens(model, pixel_values: Tensor, sizes: Tensor) -> list[Tensor]:
    """What LLaVA-NeXT itself feeds its language model: per image (tokens, hidden size)."""
    tiles = pixel_values.to(model.device, model.dtype)
    how = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    return list(inner(model).get_image_features(tiles, sizes, **how).pooler_output)


def last_cls(tower, tiles: Tensor) -> Tensor:
    """CLIP's last hidden state at [CLS]: (tiles, vision size). Nothing reads the last layer's
    patches, so it is computed for that one position."""
    *layers, last = tower.encoder.layers
    hidden = tower.pre_layrnorm(tower.embeddings(tiles))  # (tiles, 1 + patches, vision size)
    for layer in layers:
        hidden = layer(hidden, None)
    own, normed, cls = last.self_attn, last.layer_norm1(hidden), hidden[:, :1]
    parts = own.q_proj(normed[:, :1]), own.k_proj(normed), own.v_proj(normed)
    q, k, v = (part.unflatten(-1, (own.num_heads, -1)).transpose(1, 2) for part in parts)
    cls = cls + own.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return (cls + last.mlp(last.layer_norm2(cls)))[:, 0]


def cls_tokens(model, pixel_values: Tensor, sizes: Tensor) -> list[Tensor]:
    """LaViC's visual tokens, the [CLS] of every tile: per image (tiles, hidden size), with
    gradients for stage 1 (paper, section 4.1)."""
    tiles, counts = real_tiles(model, pixel_values, sizes)
    cls = last_cls(inner(model).vision_tower, tiles)  # (all tiles, vision size)
    projected = inner(model).multi_modal_projector(cls)  # section 4.1: one vector v a tile
    return list(projected.split(counts))


def patch_tokens(model, pixel_values: Tensor, sizes: Tensor, side: int = 1) -> list[Tensor]:
    """Beyond the paper: the patches of every tile, projected as in full tokens, then averaged over
    a grid of `side` x `side`: per image (tiles * side * side, hidden size)."""
    tiles, counts = real_tiles(model, pixel_values, sizes)
    seen = inner(model).vision_tower(tiles, output_hidden_states=True).hidden_states[-2]
    projected = inner(model).multi_modal_projector(seen[:, 1:])  # (all tiles, patches, hidden size)
    rows = round(projected.shape[1] ** 0.5)
    grid = projected.transpose(1, 2).unflatten(2, (rows, rows))
    pooled = F.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2)
    return [tokens.flatten(0, 1) for tokens in pooled.split(counts)]


TOKENS: dict[str, Callable] = {  # kind of visual tokens -> what makes them
    "cls": cls_tokens,
    "full": full_tokens,
    "mean": patch_tokens,
    "pooled": functools.partial(patch_tokens, side=2),
}


@torch.inference_mode()
def encode(model, names: Sequence, pixel_values: Tensor, sizes: Tensor, how=cls_tokens) -> dict:
    """Visual tokens of some items, in float32 on the CPU: {name: (tokens, hidden size)}. Constants
    in stage 2, where the vision side is frozen: made once an item, never once a dialogue."""
    tokens = how(model, pixel_values, sizes)
    return {name: t.float().cpu().clone() for name, t in zip(names, tokens, strict=True)}


def file_encoder(model, processor, how=cls_tokens) -> Callable:
    """A function: image files -> visual tokens of each, None for one that cannot be decoded."""

    def encode_files(files: Sequence[Path]) -> list[Tensor | None]:
        found: dict[Path, Tensor] = {}
        for group in batched(files, ON_CARD if model.device.type == "cuda" else len(files)):
            opened = {path: open_image(path) for path in group}
            images = {path: image for path, image in opened.items() if image is not None}
            if images:
                values, sizes = pixels(processor, list(images.values()))
                found |= encode(model, list(images), values, sizes, how)
        return [found.get(path) for path in files]

    return encode_files


def place(model, ids: Tensor, visual: Sequence[Tensor], pad: int = 0) -> Tensor:
    """Token ids (batch, length), on any device -> input embeddings (batch, length, hidden size),
    the rows of `visual` where the image token stands. An item's placeholders stand together:
    ValueError unless each such run is as long as its item has visual tokens, so none is lost."""
    table, image_token = model.get_input_embeddings(), getattr(model.config, "image_token_id", None)
    ids = ids.to(table.weight.device)
    slots = ids == (-1 if image_token is None else image_token)  # (batch, length)
    runs = []  # lengths of the runs of placeholders; the end of a row ends a run
    for row in slots.tolist():
        runs += [len(list(run)) for is_slot, run in groupby(row) if is_slot]
    rows = [len(tokens) for tokens in visual]
    if runs != rows:
        raise ValueError(f"by item, {runs} image placeholders stand for {rows} visual tokens")
    embeds = table(ids.masked_fill(slots, pad))  # `pad`: any id, its rows are replaced
    if not rows:
        return embeds
    stacked = torch.cat(list(visual)).to(embeds.device, embeds.dtype)
    return embeds.masked_scatter(slots.unsqueeze(-1), stacked)


def batched(items: Sequence, size: int) -> Iterable[Sequence]:
    return (items[i : i + size] for i in range(0, len(items), size))


class Lazy(Mapping[str, Tensor]):
    """Visual tokens encoded when they are asked for, the last few kept: a 7B model's full ones take
    47 MB an item. `sizes`: how many each item has."""

    def __init__(self, sizes: Mapping[str, int], encode_one: Callable[[str], Tensor]) -> None:
        self.sizes = sizes
        self._get = functools.lru_cache(maxsize=32)(encode_one)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.sizes:
            raise KeyError(name)
        return self._get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


def lazy_full_tokens(model: Callable, processor, paths: Mapping[str, Path]) -> Lazy:
    """Full tokens of readable images (item id -> file), encoded by the LLaVA-NeXT or LLaVA 1.5 that
    `model()` returns."""
    sizes = {}
    for name, path in paths.items():
        with Image.open(path) as image:  # no more than its head
            counts = processor._get_num_multimodal_tokens([(image.height, image.width)])
        sizes[name] = counts.num_image_tokens[0]

    @torch.inference_mode()
    def encode_one(name: str) -> Tensor:
        looks = model()
        batch = processor.image_processor(open_image(paths[name]), return_tensors="pt")
        batch = batch.to(looks.device, looks.dtype)  # the pixels alone are of floats
        return inner(looks).get_image_features(**batch).pooler_output[0].float().cpu()

    return Lazy(sizes, encode_one)


def lengths(visual: Mapping[str, Tensor]) -> dict[str, int]:
    """Visual tokens of each item, counted without encoding any."""
    return getattr(visual, "sizes", None) or {name: len(tokens) for name, tokens in visual.items()}
