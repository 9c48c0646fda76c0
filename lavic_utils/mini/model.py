"""The mini model's architecture: a genuine, very small LLaVA-NeXT (CLIP, projector, Mistral).

Built here with random weights, trained by `recipe`, opened everywhere else with `from_pretrained`.
"""

from __future__ import annotations

import re

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

from lavic_utils.mini import words

WIDTH = 128  # hidden size of tower and language model
TILE, PATCH = 48, 12  # pixels of a side
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
# Ten candidates' full tokens (up to 880) overflow it, as 28,850 overflow 4,096 in the paper.
CONTEXT_WINDOW = 512
PUNCTUATION = ".,:?!;"


def known_words() -> list[str]:
    """Every word of the mini world and of the prompts, in alphabetical order."""
    texts = [*words.ASK_BACK, *words.WANDER, *words.SEEKER_WANDER, *words.ANSWERS]
    texts += [words.EXTRA_WORDS, "Seeker: Helper: Candidates: Answer: Looks: Title: ID:"]
    for wordings in (words.OPENINGS, words.LOOKS):
        texts += [text for style in wordings.values() for text in style]
    for names in (words.ATTRIBUTES, words.FEATURES, words.BRANDS):
        texts += [" ".join(some) for some in names.values()]
    texts += [*words.PARTS, *words.PARTS.values()]
    found: set[str] = set()
    for text in texts:
        found |= set(re.findall(r"[A-Za-z'-]+", re.sub(r"\{\w+\}", " ", text)))
    return sorted(found)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; an id is three: "B0" and two chunks. Unknown words become <unk>."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "\n", *PUNCTUATION, "▁B0"]
    vocabulary += [*words.ID_CHUNKS, *(f"▁{word}" for word in known_words())]
    numbers = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    ids = r"▁B0(?=[A-Z0-9]{8})|(?<=[A-Z0-9])[A-Z0-9]{4}"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(f"{ids}|[{PUNCTUATION}]"), "isolated"),
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
    """The image processor (tiles of TILE pixels) and the tokenizer."""
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": TILE},
            crop_size={"height": TILE, "width": TILE},
            image_grid_pinpoints=PINPOINTS,
        ),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_model(processor: LlavaNextProcessor, seed: int = 0) -> LlavaNextForConditionalGeneration:
    """About 2 million parameters, drawn at random."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=320,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        rope_theta=1e6,
        sliding_window=None,
        max_position_embeddings=CONTEXT_WINDOW,
        tie_word_embeddings=True,
        initializer_range=WIDTH**-0.5,
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
