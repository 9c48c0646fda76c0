"""Visual tokens: from an image to tiles, to full tokens (LLaVA's) and to [CLS] tokens (LaViC's).

An image becomes n tiles, itself and a grid of crops: 5 for a square one, 3 for a wide or tall one.
Full tokens: every patch of the last layer but one, projected, with row ends. [CLS] tokens: position
0 of the last layer of every tile, projected: n vectors an image (paper, section 4.1).
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig
from transformers.models import llava_next
from transformers.utils import is_bitsandbytes_available, logging

from lavic_utils.config import Profile, UserError
from lavic_utils.data import open_image
from lavic_utils.hub import HubModel

logging.disable_progress_bar()  # loading bars would stand in every notebook's output
# Kept out of the 4 bits; the names replace transformers' default list, and are whole prefixes.
UNQUANTISED = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
# Images encoded at once on a card: 64 of the 7B model's take 9.4 GiB, and are no faster (H200).
ON_CARD = 16


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free() -> None:
    """Give back what nobody uses of a card's memory, where there is a card."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def half() -> torch.dtype:
    """bfloat16, but float16 on a card below compute capability 8, which only emulates bfloat16."""
    old = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8
    return torch.float16 if old else torch.bfloat16


def dtype(profile: Profile) -> torch.dtype:
    return half() if profile.dtype == "half" else torch.float32


def hub(profile: Profile) -> HubModel:
    """The profile's model on the hub."""
    return HubModel(profile.model, profile.revision, profile.download_gb)


def source(profile: Profile) -> tuple[str, str | None]:
    """(folder or hub id, revision) of the profile's model; UserError where it cannot be had."""
    folder = profile.model_path if Path(profile.model_path).is_dir() else None
    return hub(profile).source(folder)


def stand_in(profile: Profile) -> bool:
    """Is what is here a narrow stand-in of the profile's model (`HubModel.stand_in`)?"""
    return hub(profile).stand_in(profile.model_path)


def load_processor(profile: Profile) -> llava_next.LlavaNextProcessor:
    """The PIL image processor (the plain one needs torchvision) and the checkpoint's tokenizer."""
    path, revision = source(profile)
    images = llava_next.LlavaNextImageProcessorPil.from_pretrained(path, revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    patch = load_config(profile).vision_config.patch_size
    options = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return llava_next.LlavaNextProcessor(images, tokenizer, patch, **options)


def load_config(profile: Profile):
    """The configuration of the profile's model."""
    path, revision = source(profile)
    return AutoConfig.from_pretrained(path, revision=revision)


def load_model(profile: Profile) -> llava_next.LlavaNextForConditionalGeneration:
    """The base model, in eval mode and without gradients. UserError where it cannot be had."""
    if profile.quantize_4bit:
        four_bits(profile)  # says what is missing before anything is looked for
    return load(llava_next.LlavaNextForConditionalGeneration, profile, *source(profile))


def load(kind, profile: Profile, path: str, revision: str | None):
    """A checkpoint (folder or hub id) of the class `kind` as the profile wants it (dtype, 4 bits),
    in eval mode and without gradients. UserError where files are missing."""
    free()
    options: dict = {"dtype": dtype(profile), "attn_implementation": "sdpa", "revision": revision}
    if profile.quantize_4bit:
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}
        options["quantization_config"] = four_bits(profile)
    try:
        model = kind.from_pretrained(path, **options)
    except OSError as error:
        why = str(error).splitlines()[0]
        raise UserError(f"model {path!r} cannot be loaded ({why}); download it whole") from None
    if not profile.quantize_4bit:  # those are on the card already
        model = model.to(device())
    return model.eval().requires_grad_(False)


def four_bits(profile: Profile):
    """NF4 for the language model, not the vision side; UserError without card or bitsandbytes."""
    if not torch.cuda.is_available() or not is_bitsandbytes_available():
        raise UserError(
            f"profile {profile.name} holds its weights in 4 bits, which needs a CUDA card and "
            "bitsandbytes: pip install -r requirements-gpu.lock, or use another profile"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=half(),
        llm_int8_skip_modules=list(UNQUANTISED),
    )


def context_window(config) -> int:
    """Tokens the language model was made for."""
    return config.get_text_config().max_position_embeddings


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
