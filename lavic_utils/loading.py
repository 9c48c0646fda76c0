"""The profile's model: where it comes from, in which precision, on which device."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig
from transformers.models import llava_next
from transformers.utils import is_bitsandbytes_available, logging

from lavic_utils.config import Profile, UserError
from lavic_utils.hub import HubModel

logging.disable_progress_bar()  # loading bars would stand in every notebook's output
# Kept out of the 4 bits; the names replace transformers' default list, and are whole prefixes.
UNQUANTISED = ("model.vision_tower", "model.multi_modal_projector", "lm_head")


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
    here = {"revision": revision, "local_files_only": True}
    images = llava_next.LlavaNextImageProcessorPil.from_pretrained(path, **here)
    tokenizer = AutoTokenizer.from_pretrained(path, **here)
    patch = load_config(profile).vision_config.patch_size
    options = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return llava_next.LlavaNextProcessor(images, tokenizer, patch, **options)


def load_config(profile: Profile):
    """The configuration of the profile's model."""
    path, revision = source(profile)
    return AutoConfig.from_pretrained(path, revision=revision, local_files_only=True)


def load_model(profile: Profile) -> llava_next.LlavaNextForConditionalGeneration:
    """The base model, in eval mode and without gradients. UserError where it cannot be had."""
    if profile.quantize_4bit:
        four_bits(profile)  # says what is missing before anything is looked for
    return load(llava_next.LlavaNextForConditionalGeneration, profile, *source(profile))


def load(kind, profile: Profile, path: str, revision: str | None):
    """A checkpoint (folder or hub id) of the class `kind` as the profile wants it (dtype, 4 bits),
    in eval mode and without gradients. UserError where files are missing."""
    free()
    options: dict = {"dtype": dtype(profile), "attn_implementation": "sdpa"}
    if profile.quantize_4bit:
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}
        options["quantization_config"] = four_bits(profile)
    try:  # from its folder: a hub id would be asked for, and a broken download completed
        if not Path(folder := path).is_dir():
            folder = snapshot_download(path, revision=revision, local_files_only=True)
        model = kind.from_pretrained(folder, **options)
    except OSError as error:
        why = str(error).splitlines()[0]
        raise UserError(f"model {path!r} cannot be loaded ({why}); download it whole") from None
    model.name_or_path = model.config.name_or_path = path  # what adapters name as their base
    if not profile.quantize_4bit:  # those are on the card already
        model = model.to(device())
    return model.eval().requires_grad_(False)


def four_bits(profile: Profile):
    """NF4 for the language model, not the vision side; UserError without card or bitsandbytes."""
    if not torch.cuda.is_available() or not is_bitsandbytes_available():
        raise UserError(
            f"profile {profile.name} holds its weights in 4 bits, which needs a CUDA card and "
            "bitsandbytes: pip install bitsandbytes (in a checkout with --no-deps -r "
            "requirements-gpu.lock), or use another profile"
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
