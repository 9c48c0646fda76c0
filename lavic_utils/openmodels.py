"""Open models of the hub other than the profile's own: loaded as they come, asked in their own chat form.

A language model (Vicuna) reads titles; a LLaVA reads titles, or titles and its own full image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from lavic_utils import vision
from lavic_utils.config import Profile
from lavic_utils.data import Dialogue, image_file, open_image


def with_chat(profile: Profile, chat: str) -> Profile:
    """The profile with another model's chat form around the same message."""
    return profile.model_copy(update={"prompts": profile.prompts.model_copy(update={"chat": chat})})


def load(profile: Profile, source: str, revision: str | None):
    """(model, processor) of a LLaVA 1.5, (model, tokenizer) of a language model; `source` a folder or a hub id."""
    config = AutoConfig.from_pretrained(source, revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if not hasattr(config, "vision_config"):
        return vision.load(AutoModelForCausalLM, profile, source, revision), tokenizer
    images = LlavaImageProcessorPil.from_pretrained(source, revision=revision)
    processor = LlavaProcessor(images, tokenizer, patch_size=config.vision_config.patch_size, num_additional_image_tokens=1,
                               vision_feature_select_strategy=config.vision_feature_select_strategy)
    return vision.load(AutoModelForImageTextToText, profile, source, revision), processor


def full_tokens(model, processor, root: Path, dialogues: Sequence[Dialogue], which: str) -> vision.Lazy:
    """Each candidate's full tokens, encoded when a prompt that fits asks for them; items without a readable image have none."""
    images = {a: image_file(root, a) for d in dialogues for a in getattr(d, which)}
    side, patch = model.config.vision_config.image_size, model.config.vision_config.patch_size

    def encode_one(asin: str) -> Tensor:
        values = processor.image_processor(open_image(images[asin]), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            found = vision.inner(model).get_image_features(pixel_values=values.to(model.device, model.dtype))
        return found.pooler_output[0].float().cpu()

    return vision.Lazy([a for a, path in images.items() if open_image(path) is not None], encode_one,
                       lambda _: (side // patch) ** 2)
