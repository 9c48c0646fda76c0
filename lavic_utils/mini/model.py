"""The mini vision-language model: an ordinary, very small LLaVA-NeXT (CLIP tower, projector, Mistral) and its processor.

Built here, trained by `pretraining`, opened everywhere else with `from_pretrained` like any LLaVA-NeXT checkpoint.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from lavic_utils.mini import words as w

TILE = 48
PATCH = 12
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
CONTEXT_WINDOW = 512  # ten candidates' full tokens (up to 880) overflow it, as 28,850 overflow 4,096 in the paper
PUNCTUATION = ".,:?!;"
PLACEHOLDER = re.compile(r"\{\w+\}")


def world_texts() -> Iterable[str]:
    """Every sentence pattern of the mini world and of the prompts, for collecting words (placeholders removed)."""
    templates = [
        *itertools.chain(*w.OPENINGS.values(), *w.LOOKS.values()),
        *w.ASK_BACK,
        *w.WANDER,
        *w.SEEKER_WANDER,
        *w.ANSWERS,
        w.EXTRA_WORDS,
        "Seeker: Helper: Candidates: Answer: Looks: Title: ID:",
    ]
    yield from (PLACEHOLDER.sub(" ", text) for text in templates)
    for group in (
        w.COLOURS,
        w.PATTERNS,
        w.SHAPES,
        w.ACCENTS,
        w.PARTS,
        w.PARTS.values(),
        *w.FEATURES.values(),
        *w.BRANDS.values(),
    ):
        yield " ".join(group)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; an id is three: "B0" and two 4-character chunks. Unknown words become <unk>."""
    words = sorted(
        {f"▁{word}" for text in world_texts() for word in re.findall(r"[A-Za-z'-]+", text)}
    )
    vocabulary = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "<image>",
        "\n",
        *PUNCTUATION,
        "▁B0",
        *w.ID_CHUNKS,
        *words,
    ]
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(
                Regex(r"▁B0(?=[A-Z0-9]{8})|(?<=[A-Z0-9])[A-Z0-9]{4}|[" + PUNCTUATION + "]"),
                "isolated",
            ),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="right",
        model_max_length=CONTEXT_WINDOW,
    )


def build_processor() -> LlavaNextProcessor:
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_model(processor: LlavaNextProcessor, seed: int = 0) -> LlavaNextForConditionalGeneration:
    """About 2 million parameters, randomly initialised."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        rope_theta=1e6,
        sliding_window=None,
        max_position_embeddings=CONTEXT_WINDOW,
        tie_word_embeddings=True,
        initializer_range=128**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return LlavaNextForConditionalGeneration(config)
