"""Open models of the hub other than the profile's own: loaded as they come, asked in their own chat form.

A language model (Vicuna) reads titles; a LLaVA reads titles, or titles and its own full image tokens.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from lavic_utils import vision
from lavic_utils.config import Profile


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
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        num_additional_image_tokens=1,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )
    return vision.load(AutoModelForImageTextToText, profile, source, revision), processor
