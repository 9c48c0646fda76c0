"""Visual tokens: from an image to tiles, to full tokens (what LLaVA reads) and to [CLS] tokens (what LaViC reads).

A LLaVA-NeXT image becomes n tiles: the whole image and a grid of crops whose number follows the aspect ratio (5 tiles
for a square image, 3 for a wide or tall one). Full tokens: every patch of the last layer but one, projected, with
row ends. [CLS] tokens: position 0 of the last layer of every tile, projected: n vectors an image (paper, section 4.1).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.utils import is_flash_attn_2_available, logging

from lavic_utils.config import Profile, UserError
from lavic_utils.data import open_image
from lavic_utils.hub import HubModel

logging.disable_progress_bar()  # loading bars would stand in every notebook's output
UNQUANTISED = ("model.vision_tower", "model.multi_modal_projector", "lm_head")  # in v5 this list replaces the default


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def half() -> torch.dtype:
    """Half precision here: bfloat16, but float16 on a card below compute capability 8, which only emulates bfloat16."""
    old = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8
    return torch.float16 if old else torch.bfloat16


def dtype(profile: Profile) -> torch.dtype:
    return half() if profile.dtype == "half" else torch.float32


def attention(dtype: torch.dtype) -> str:
    """Kernel for training: FlashAttention 2 where it is installed and the card and dtype allow it, else torch's own.
    Inference stays with torch's: `recommendation.Read` masks candidates from each other, which the other cannot."""
    able = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8 and dtype != torch.float32
    return "flash_attention_2" if able and is_flash_attn_2_available() else "sdpa"


def source(profile: Profile) -> tuple[str, str | None]:
    """(folder or hub id, revision) of the profile's model; UserError in one line where it cannot be had."""
    path = profile.model_path
    return HubModel(profile.model, profile.revision, profile.download_gb).source(path if Path(path).is_dir() else None)


def load_processor(profile: Profile) -> LlavaNextProcessor:
    """The PIL image processor by name (the plain name needs torchvision) and the checkpoint's own tokenizer."""
    path, revision = source(profile)
    where = {"revision": revision} if revision else {}
    tokenizer = AutoTokenizer.from_pretrained(path, **where)
    image_processor = LlavaNextImageProcessorPil.from_pretrained(path, **where)
    patch = AutoConfig.from_pretrained(path, **where).vision_config.patch_size
    return LlavaNextProcessor(image_processor=image_processor, tokenizer=tokenizer, num_additional_image_tokens=1,
                              vision_feature_select_strategy="default", patch_size=patch)


def load_model(profile: Profile) -> LlavaNextForConditionalGeneration:
    """The base model, in eval mode and without gradients. Raises UserError where it cannot be had."""
    if profile.quantize_4bit:
        _four_bits(profile)  # says what is missing before anything is looked for or downloaded
    return load(LlavaNextForConditionalGeneration, profile, *source(profile))


def load(kind, profile: Profile, path: str, revision: str | None):
    """A checkpoint (folder or hub id) as the profile wants it (dtype, 4 bits), in eval mode and without gradients."""
    options: dict = {"dtype": dtype(profile), "attn_implementation": "sdpa",
                     "revision": revision}
    if profile.quantize_4bit:
        options |= {"device_map": {"": int(os.environ.get("LOCAL_RANK", 0))}, "quantization_config": _four_bits(profile)}
    try:
        model = kind.from_pretrained(path, **options)
    except OSError as error:
        line = str(error).split("\n")[0]
        raise UserError(f"model {path!r} cannot be loaded ({line}); download it whole, or name a local folder in the "
                        f"profile {profile.name}") from None
    model = model if profile.quantize_4bit else model.to(device())
    return model.eval().requires_grad_(False)


def context_window(model) -> int:
    """Tokens the language model was made for."""
    return model.config.get_text_config().max_position_embeddings


def _four_bits(profile: Profile):
    """The language model's layers in NF4; the vision side, whose [CLS] vectors are the method, and the head are not."""
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not torch.cuda.is_available() or not is_bitsandbytes_available():
        lacking = "bitsandbytes is not installed" if torch.cuda.is_available() else "none is here"
        raise UserError(f"profile {profile.name} holds its weights in 4 bits, which needs a CUDA card and bitsandbytes "
                        f"({lacking}): pip install 'lavic-companion[gpu]', or use another profile")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=half(),
                              llm_int8_skip_modules=list(UNQUANTISED))


def pixels(processor: LlavaNextProcessor, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """Images -> pixel values (n, most tiles, 3, side, side), zero-padded, and sizes (n, 2) as (height, width)."""
    batch = processor.image_processor(list(images), return_tensors="pt")
    return batch["pixel_values"], batch["image_sizes"]


def tile_count(model, size: Sequence[int] | Tensor) -> int:
    """How many tiles an image of (height, width) has; never assume five. The policy is LLaVA-NeXT's own, native resolutions:
    the whole image once, and the crops of that grid among the checkpoint's pinpoints which shows most of it with least waste;
    for LLaVA-v1.6 1 + 2 (wide or tall, or small), 1 + 3 (very), or 1 + 4: 3 to 5 tiles. All of the project asks here."""
    size = torch.as_tensor(size).tolist()
    return image_size_to_num_patches(size, model.config.image_grid_pinpoints, model.config.vision_config.image_size)


def real_tiles(model, pixel_values: Tensor, sizes: Tensor) -> tuple[Tensor, list[int]]:
    """Drop the zero padding: (all tiles, 3, side, side), where and in the dtype that the model is, and the number of tiles
    of each image."""
    counts = [tile_count(model, size) for size in sizes]
    tiles = torch.cat([p[:n] for p, n in zip(pixel_values, counts, strict=True)])
    return tiles.to(model.device, model.dtype), counts


def full_tokens(model, pixel_values: Tensor, sizes: Tensor) -> list[Tensor]:
    """What LLaVA-NeXT itself feeds its language model: per image (tokens, hidden size). Pixels may lie on any device."""
    parts = inner(model).get_image_features(
        pixel_values=pixel_values.to(model.device, model.dtype), image_sizes=sizes, vision_feature_layer=-2,
        vision_feature_select_strategy="default")
    return list(parts.pooler_output)


def cls_tokens(model, pixel_values: Tensor, sizes: Tensor) -> list[Tensor]:
    """The [CLS] of every tile through the projector: per image (tiles, hidden size). Differentiable: stage 1. Pixels may lie
    on any device."""
    tiles, counts = real_tiles(model, pixel_values, sizes)
    last = inner(model).vision_tower(tiles).last_hidden_state[:, 0]
    return list(inner(model).multi_modal_projector(last).split(counts))


def inner(model):
    """The LlavaNextModel inside a LlavaNextForConditionalGeneration, peft-wrapped or not."""
    return model.get_base_model().model if hasattr(model, "get_base_model") else model.model


def place(model, ids: Tensor, visual: Sequence[Tensor], pad: int = 0) -> Tensor:
    """Token ids (batch, length), on any device -> input embeddings with `visual` rows where the image token stands, in order
    (`pad`: any id, whose embedding those rows replace).

    An item's placeholders stand together, other tokens between items. Raises ValueError unless every such run is as long as
    its item's visual tokens are: nothing is ever dropped silently, and no item's vectors reach into another's slot.
    """
    table, image_token = model.get_input_embeddings(), getattr(model.config, "image_token_id", None)
    ids = ids.to(table.weight.device)
    slots = ids == (-1 if image_token is None else image_token)
    filled, counts = torch.unique_consecutive(F.pad(slots, (0, 1)), return_counts=True)  # a gap ends every row
    runs, rows = counts[filled].tolist(), [len(v) for v in visual]
    if runs != rows:
        raise ValueError(f"{sum(runs)} image placeholders in the prompts for {sum(rows)} visual tokens; "
                         f"by item {runs} for {rows}")
    embeds = table(ids.masked_fill(slots, pad))
    if rows:
        stacked = torch.cat(list(visual)).to(embeds.device, embeds.dtype)
        embeds = embeds.masked_scatter(slots.unsqueeze(-1), stacked)
    return embeds


def batched(items: Sequence, size: int) -> Iterable[Sequence]:
    return (items[i:i + size] for i in range(0, len(items), size))


@torch.inference_mode()
def encode(model, names: Sequence, pixel_values: Tensor, sizes: Tensor, how=cls_tokens) -> dict:
    """Visual tokens of some items, in float32 on the CPU: {asin: (tokens, hidden size)}.

    The vision side is frozen in stage 2, so these are constants: encode each item once, never once a dialogue.
    """
    tokens = how(model, pixel_values, sizes)
    return {name: t.float().cpu().clone() for name, t in zip(names, tokens, strict=True)}


# Images encoded at once on a card: 64 take 9.4 GiB beside the weights, too much for a T4, and are no faster (H200).
ON_CARD = 16


def file_encoder(model, processor, how=cls_tokens) -> Callable[[Sequence[Path]], list[Tensor | None]]:
    """Image files -> visual tokens of each, None for one that cannot be decoded."""
    def encode_files(files: Sequence[Path]) -> list[Tensor | None]:
        found = {}
        for group in batched(files, ON_CARD if model.device.type == "cuda" else len(files)):
            images = {path: image for path in group if (image := open_image(path)) is not None}
            found |= encode(model, list(images), *pixels(processor, list(images.values())), how) if images else {}
        return [found.get(path) for path in files]
    return encode_files


class Lazy(Mapping[str, Tensor]):
    """Visual tokens encoded when they are asked for, of images too many and too large to keep (a 7B model's full tokens take
    47 MB an item). `size_of(asin)` says how many there will be without encoding; the last few items are kept."""

    def __init__(self, names: Sequence[str], encode_one: Callable[[str], Tensor], size_of: Callable[[str], int]) -> None:
        self.sizes = {name: size_of(name) for name in names}
        self._get = functools.lru_cache(maxsize=32)(encode_one)

    def __getitem__(self, name: str) -> Tensor:
        return self._get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


def lazy_full_tokens(model, processor, paths: Mapping[str, Path]) -> Lazy:
    """Full tokens of each readable image (item id -> file), by the model's own forward; LLaVA-NeXT or LLaVA 1.5."""
    images = {name: image.size for name, path in paths.items() if (image := open_image(path)) is not None}

    @torch.inference_mode()
    def encode_one(name: str) -> Tensor:
        batch = processor.image_processor(open_image(paths[name]), return_tensors="pt").to(model.device)
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
        return inner(model).get_image_features(**batch).pooler_output[0].float().cpu()

    def size_of(name: str) -> int:
        width, height = images[name]
        return processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens[0]

    return Lazy(list(images), encode_one, size_of)


def lengths(visual: Mapping[str, Tensor]) -> dict[str, int]:
    """Visual tokens of each item, counted without encoding any."""
    return getattr(visual, "sizes", None) or {name: len(tokens) for name, tokens in visual.items()}
