"""Memory of a profile's stages, from shapes alone. The architecture is real, without weights (the meta device).

`memory` is the model; it is tested against the tensors of the same step counted at the true size without weights, and
against the mini model's real peak.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from peft import get_peft_model
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from .config import PACKAGE, Lora, Profile
from .distillation import VISION_LINEAR
from .recommendation import LANGUAGE_LINEAR
from .training import lora_config
from .vision import UNQUANTISED

GIB = 2**30
RESERVE = 1.0  # GiB for the CUDA context and the allocator's gaps
TITLE = 128  # tokens of a description's prompt: the instruction and the longest title seen (103)
SCORED = 10 * 11  # positions that score ten candidates' ids
STAGES = ("teacher", "distillation", "recommendation", "inference")
CONFIGS = {"llava-hf/llava-v1.6-mistral-7b-hf": PACKAGE / "llava_v1_6_mistral_7b.json"}  # shapes, so that no network is needed


@cache
def skeleton(model: str) -> LlavaNextForConditionalGeneration:
    """The model of that id or folder without weights (meta device)."""
    file = CONFIGS.get(model)
    config = LlavaNextConfig.from_json_file(file) if file else LlavaNextConfig.from_pretrained(model)
    with torch.device("meta"):
        return LlavaNextForConditionalGeneration(config).requires_grad_(False)


class Count(NamedTuple):
    """Parameters: all; those that 4 bits would hold (linear layers of the language model); linear ones by side."""

    all: int
    quantisable: int
    vision: int
    language: int
    head: int


def count(model) -> Count:
    linear = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    layers = sum(n for name, n in linear.items() if not name.startswith(UNQUANTISED))
    return Count(sum(p.numel() for p in model.parameters()), layers,
                 sum(n for name, n in linear.items() if name.startswith(UNQUANTISED[:2])), layers, linear["lm_head"])


@cache
def trainable(model: str, lora: Lora, target: str) -> int:
    """Parameters of a stage's adapter, by peft itself on the model without weights."""
    with torch.device("meta"):
        bare = LlavaNextForConditionalGeneration(skeleton(model).config).requires_grad_(False)
        return get_peft_model(bare, lora_config(lora, target)).num_parameters(only_trainable=True)


def full_tokens(config) -> int:
    """Visual tokens of a square image: the whole and a 2 x 2 grid of tiles, a row end after each row of the grid."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side**2 + 2 * side * (2 * side + 1)


def patches(config) -> int:
    """Positions that CLIP reads of an image of five tiles, [CLS] included."""
    return 5 * ((config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1)


def cache_bytes(text, half: int, tokens: float) -> float:
    """Keys and values of so many tokens."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return tokens * text.num_hidden_layers * 2 * text.num_key_value_heads * head * half


def saved_bytes(side, half: int, lora: Lora | None, mask: int) -> int:
    """What autograd keeps of one token in one layer. `half`: bytes of a number in the layer's matrix products.

    Both norms keep their input in float32; attention q, k, v and its output; a gated MLP the gate's input and output and
    the other factor, CLIP's input and sigmoid. Each adapted linear layer also keeps its input: its own copy after dropout
    (with dropout's mask, `mask` bytes a number) or after a cast, otherwise shared by q, k, v and by the MLP's two.
    Frozen linear layers keep nothing.
    """
    h, m = side.hidden_size, side.intermediate_size
    gated = side.model_type == "mistral"
    kept = 2 * 4 * h + half * 4 * h + half * (3 if gated else 2) * m
    if lora is None:
        return kept
    own = lora.dropout > 0 or half < 4
    inputs = ((6 if gated else 5) if own else 3) * h + m
    return kept + inputs * (half + (mask if lora.dropout else 0))


def memory(config, counted: Count, adapter: int, profile: Profile, stage: str, cuda: bool = True) -> dict[str, float]:
    """Bytes by component at the peak of one step, longest prompts. `stage`: teacher, distillation, recommendation, inference.

    weights: 2 or 4 bytes each; in 4 bits half a byte and a float32 scale for 64, with one layer's weights unpacked at a
      time, the rest in half precision.
    adapter, gradients, optimizer: 4, 4 and 8 bytes (float32, AdamW).
    activations: `saved_bytes` for every token and layer, and half a layer of the language model at work; with
      checkpointing one layer's input each and half as much again
      as one whole layer, which is computed anew and carries gradients.
    logits: for the target's positions only: half precision, float32, log-softmax, gradient.
    cache: keys and values, for inference. work: one layer's largest intermediates (and CLIP's hidden states, all of
      which the library keeps while the teacher looks). Adapters in float32 beside weights in half precision read a copy of
      their input in float32.
    """
    text, sight = config.text_config, config.vision_config
    half, mask = (2 if profile.dtype == "half" else 4), (1 if cuda else 4)
    one, two = profile.distillation, profile.recommendation
    weights = counted.all * half
    if profile.quantize_4bit:
        largest = text.hidden_size * text.intermediate_size
        weights += counted.quantisable * (0.5 + 4 / 64 - half) + largest * half
    described = min(one.max_length, TITLE + one.max_new_tokens)
    found = {"weights": weights, "adapter, gradients, optimizer": 16 * adapter}
    if stage in ("distillation", "recommendation"):
        own = one if stage == "distillation" else two
        rows, length = own.batch_size, described if stage == "distillation" else own.max_length
        sides = [(text, rows * length, saved_bytes(text, half, own.lora if stage == "recommendation" else None, mask))]
        if stage == "distillation":
            sides.append((sight, rows * patches(config), saved_bytes(sight, half, own.lora, mask)))
        if own.gradient_checkpointing:
            held = sum(side.num_hidden_layers * tokens * half * side.hidden_size for side, tokens, _ in sides)
            held += 1.5 * max(tokens * kept for _, tokens, kept in sides)
        else:
            held = sum(side.num_hidden_layers * tokens * kept for side, tokens, kept in sides)
            held += 0.5 * sides[0][1] * sides[0][2]
        kept_positions = own.max_new_tokens + 1
        return found | {"activations": held, "logits": rows * kept_positions * text.vocab_size * (half + 12)}
    found["adapter, gradients, optimizer"] = 4 * adapter
    if stage == "teacher":
        rows, length, logits = one.teacher_batch_size, full_tokens(config) + described, 1
        seen = rows * patches(config) * half * (sight.hidden_size * (sight.num_hidden_layers + 1) + 2 * sight.intermediate_size)
    else:
        rows, length, logits = two.eval_batch_size, two.max_length + SCORED, SCORED
        seen = 0
    copied = 4 * text.intermediate_size if stage == "inference" and half < 4 else 0
    work = max(seen, rows * length * (half * (3 * text.intermediate_size + 6 * text.hidden_size) + copied))
    return found | {"cache": cache_bytes(text, half, rows * length), "work": work,
                    "logits": rows * logits * text.vocab_size * (half + 8)}


def memories(profile: Profile, cuda: bool = True) -> dict[str, dict[str, float]]:
    """Memory in GiB by stage and component, with the total. Where descriptions come with the data, no teacher runs."""
    model = profile.model_path
    bare, found = skeleton(model), {}
    sizes = trainables(profile)
    for stage in STAGES[profile.distillation.descriptions == "published":]:
        adapter = {"teacher": 0, "inference": sum(sizes.values())}.get(stage, sizes.get(stage, 0))
        parts = memory(bare.config, count(bare), adapter, profile, stage, cuda)
        found[stage] = {name: round(value / GIB, 3) for name, value in parts.items()}
        found[stage]["total"] = round(sum(parts.values()) / GIB, 3)
    return found


def trainables(profile: Profile) -> dict[str, int]:
    return {"distillation": trainable(profile.model_path, profile.distillation.lora, VISION_LINEAR),
            "recommendation": trainable(profile.model_path, profile.recommendation.lora, LANGUAGE_LINEAR)}
