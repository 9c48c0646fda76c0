"""Memory of a profile's stages from shapes alone: the real architecture on the meta device.

`accelerate estimate-memory` knows weights and optimizer, not the activations of these stages, which
decide here. Tested against the tensors of the same step counted at the true size without weights,
and against the mini model's real peak.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

import torch
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from lavic_utils.config import PACKAGE, Lora, Profile
from lavic_utils.distillation import VISION_LINEAR
from lavic_utils.loading import UNQUANTISED
from lavic_utils.methods import ENTIRE, LONG
from lavic_utils.recommendation import LANGUAGE_LINEAR

GIB = 2**30
RESERVE = 1.0  # GiB for the CUDA context and the allocator's gaps
TITLE = 128  # tokens of a description's prompt: the instruction and the longest title seen (103)
SCORED = 10 * 11  # positions that score ten candidates' ids
STAGES = ("teacher", "distillation", "recommendation", "inference")  # of LaViC
CONFIGS = {  # shapes, so that no network is needed
    "llava-hf/llava-v1.6-mistral-7b-hf": PACKAGE / "llava_v1_6_mistral_7b.json"
}


class Count(NamedTuple):
    """Parameters: all; of the vision side's linear layers; of the language model's, which are
    those that 4 bits would hold."""

    all: int
    vision: int
    quantisable: int


@cache
def skeleton(model: str) -> LlavaNextForConditionalGeneration:
    """The model of that id or folder without weights (meta device)."""
    if model in CONFIGS:
        config = LlavaNextConfig.from_json_file(CONFIGS[model])
    else:
        config = LlavaNextConfig.from_pretrained(model)
    with torch.device("meta"):
        return LlavaNextForConditionalGeneration(config).requires_grad_(False)


def count(model) -> Count:
    """Parameters of a LLaVA-NeXT."""
    vision = language = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            vision += module.weight.numel() * name.startswith(UNQUANTISED[:2])
            language += module.weight.numel() * (not name.startswith(UNQUANTISED))
    return Count(sum(p.numel() for p in model.parameters()), vision, language)


def trainable(model: str, lora: Lora, target: str) -> int:
    """Parameters of a stage's adapter: A and B of every linear layer that `target` names."""
    found = 0
    for name, layer in skeleton(model).named_modules():
        if re.fullmatch(target, name):
            found += lora.r * (layer.in_features + layer.out_features)
    return found


def trainables(profile: Profile) -> dict[str, int]:
    """Parameters that each training stage trains."""
    model, one, two = profile.model_path, profile.distillation, profile.recommendation
    return {
        "distillation": trainable(model, one.lora, VISION_LINEAR),
        "recommendation": trainable(model, two.lora, LANGUAGE_LINEAR),
    }


def number_bytes(profile: Profile) -> int:
    """Bytes of a number in the profile's precision (4 bits apart)."""
    return 2 if profile.dtype == "half" else 4


def full_tokens(config) -> int:
    """Visual tokens of a square image: the whole, a 2 x 2 grid, and an end for each of its rows."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side**2 + 2 * side * (2 * side + 1)


def patches(config) -> int:
    """Positions that CLIP reads of an image of five tiles, [CLS] included."""
    return 5 * ((config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1)


def cache_bytes(text, half: int, tokens: float) -> float:
    """Keys and values of so many tokens, `half` bytes a number."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return tokens * text.num_hidden_layers * 2 * text.num_key_value_heads * head * half


def saved_bytes(side, half: int, lora: Lora | None, mask: int) -> int:
    """What autograd keeps of one token in one layer; `half`: bytes of a number in its products.

    Both norms keep their input in float32; attention q, k, v and its output; a gated MLP the gate's
    input and output and the other factor, CLIP's input and sigmoid. Each adapted linear layer keeps
    its input too: its own copy after dropout (with a mask, `mask` bytes a number) or after a cast,
    otherwise shared by q, k, v and by the MLP's two. Frozen linear layers keep nothing.
    """
    h, m = side.hidden_size, side.intermediate_size
    gated = side.model_type == "mistral"
    kept = 2 * 4 * h + half * 4 * h + half * (3 if gated else 2) * m
    if lora is None:
        return kept
    own = lora.dropout > 0 or half < 4
    inputs = ((6 if gated else 5) if own else 3) * h + m
    return kept + inputs * (half + (mask if lora.dropout else 0))


def training(config, profile: Profile, stage: str, half: int, cuda: bool) -> dict[str, float]:
    """Bytes beside weights and adapter at the peak of a training step, longest prompts.

    activations: `saved_bytes` for every token and layer, and half a layer of the language model at
      work; with checkpointing one layer's input each and half as much again as one whole layer,
      which is computed anew and carries gradients.
    logits: for the target's positions only: half precision, float32, log-softmax, gradient.
    """
    text, sight, own = config.text_config, config.vision_config, getattr(profile, stage)
    mask = 1 if cuda else 4
    if stage == "distillation":
        tokens = own.batch_size * min(own.max_length, TITLE + own.max_new_tokens)
        seen = own.batch_size * patches(config)
        sides = [
            (text, tokens, saved_bytes(text, half, None, mask)),
            (sight, seen, saved_bytes(sight, half, own.lora, mask)),
        ]
    else:
        tokens = own.batch_size * own.max_length
        sides = [(text, tokens, saved_bytes(text, half, own.lora, mask))]
    held = 0.0
    for side, tokens, kept in sides:
        of_a_token = half * side.hidden_size if own.gradient_checkpointing else kept
        held += side.num_hidden_layers * tokens * of_a_token
    if own.gradient_checkpointing:
        held += 1.5 * max(tokens * kept for _, tokens, kept in sides)
    else:
        held += 0.5 * sides[0][1] * sides[0][2]
    positions = own.batch_size * (own.max_new_tokens + 1)
    return {"activations": held, "logits": positions * text.vocab_size * (half + 12)}


def reading(
    config, profile: Profile, stage: str, half: int, longest: int | None = None
) -> dict[str, float]:
    """Bytes beside weights and adapter at the peak of a batch of descriptions or answers; these to
    prompts of at most `longest` tokens (None: the profile's `max_length`).

    cache: keys and values. mask: who sees whom, as answers need it (additive, padded once more, and
    as booleans). work: one layer's largest intermediates (and CLIP's hidden states, all
    of which the library keeps while the teacher looks). Adapters in float32 beside weights in half
    precision read a copy of their input in float32.
    """
    text, sight = config.text_config, config.vision_config
    one, two = profile.distillation, profile.recommendation
    if stage == "teacher":
        rows, logits = one.teacher_batch_size, 1
        length = full_tokens(config) + min(one.max_length, TITLE + one.max_new_tokens)
        layers = sight.hidden_size * (sight.num_hidden_layers + 1) + 2 * sight.intermediate_size
        seen = rows * patches(config) * half * layers
    else:
        longest = longest or two.max_length
        rows, logits, seen = two.at_once(longest), SCORED, 0
        length = longest + SCORED
    layer = half * (3 * text.intermediate_size + 6 * text.hidden_size)
    if stage == "inference" and half < 4:
        layer += 4 * text.intermediate_size
    return {
        "cache": cache_bytes(text, half, rows * length),
        "work": max(seen, rows * length * layer),
        "mask": rows * length**2 * (2 * half + 1) * (stage == "inference"),
        "logits": rows * logits * text.vocab_size * (half + 8),
    }


def memory(
    config,
    counted: Count,
    adapter: int,
    profile: Profile,
    stage: str,
    cuda: bool = True,
    longest: int | None = None,
) -> dict[str, float]:
    """Bytes by component at a stage's peak (one of STAGES), of one process.

    weights: 2 or 4 bytes each; in 4 bits half a byte and a float32 scale for 64, with one layer's
      weights unpacked at a time, the rest in half precision.
    adapter, gradients, optimizer: 4, 4 and 8 bytes (float32, AdamW).
    """
    half, text = number_bytes(profile), config.text_config
    weights = counted.all * half
    if profile.quantize_4bit:
        largest = text.hidden_size * text.intermediate_size
        weights += counted.quantisable * (0.5 + 4 / 64 - half) + largest * half
    if stage in ("distillation", "recommendation"):
        rest = training(config, profile, stage, half, cuda)
        return {"weights": weights, "adapter, gradients, optimizer": 16 * adapter, **rest}
    rest = reading(config, profile, stage, half, longest)
    return {"weights": weights, "adapter, gradients, optimizer": 4 * adapter, **rest}


def memories(
    profile: Profile, cuda: bool = True, longest: int | None = None
) -> dict[str, dict[str, float]]:
    """GiB by stage and component, and the total: STAGES (no teacher where the data brings
    descriptions) and LONG. `longest`: as in `reading`."""
    bare, sizes, found = skeleton(profile.model_path), trainables(profile), {}
    adapters = {"teacher": 0, "inference": sum(sizes.values())} | sizes
    entire = profile.arm(ENTIRE)
    stages = {name: (name, profile) for name in STAGES}
    stages |= {LONG[0]: ("recommendation", entire), LONG[1]: ("inference", entire)}
    if profile.distillation.descriptions == "published":
        del stages["teacher"]
    for name, (stage, settings) in stages.items():
        given = bare.config, count(bare), adapters[stage], settings, stage, cuda, longest
        parts = memory(*given)
        parts["total"] = sum(parts.values())
        found[name] = {part: round(value / GIB, 3) for part, value in parts.items()}
    return found
