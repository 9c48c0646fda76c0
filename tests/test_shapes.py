"""LLaVA-v1.6-mistral-7B's true shapes without its weights (meta device): what each stage trains,
what 4 bits would hold, how many tokens an image is. Expected figures are worked out by hand from
the published shapes."""

from __future__ import annotations

import re

import pytest
import torch
from peft import get_peft_model
from stand_ins import trainable_names
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.quantizers.quantizers_utils import should_convert_module

from lavic_utils import loading, training, vision
from lavic_utils.bench import memory
from lavic_utils.config import Lora, load_profile
from lavic_utils.distillation import VISION_LINEAR
from lavic_utils.recommendation import LANGUAGE_LINEAR

ID = "llava-hf/llava-v1.6-mistral-7b-hf"
LORA = Lora(r=8, alpha=32, dropout=0.1)
# CLIP ViT-L/14-336: 24 layers of q, k, v, out (1024 -> 1024), fc1, fc2 (1024 <-> 4096);
# projector 1024 -> 4096 -> 4096.
VISION_LAYERS = 24 * 6 + 2
VISION_TRAINED = 8 * (24 * (4 * (1024 + 1024) + 2 * (1024 + 4096)) + (1024 + 4096) + (4096 + 4096))
# Mistral-7B: 32 layers of q, o (4096 -> 4096), k, v (4096 -> 8 heads of 128), gate, up, down
# (4096 <-> 14336).
LANGUAGE_LAYERS = 32 * 7
LANGUAGE_TRAINED = 8 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))


def bare() -> LlavaNextForConditionalGeneration:
    with torch.device("meta"):
        return LlavaNextForConditionalGeneration(
            LlavaNextConfig.from_json_file(memory.CONFIGS[ID])
        ).requires_grad_(False)


def adapted(target: str):
    with torch.device("meta"):
        return training.add_adapter(bare(), LORA, target)


def test_parameters_of_the_true_model():
    clip = (
        577 * 1024
        + 3 * 14 * 14 * 1024
        + 1024  # positions, patches, [CLS]
        + 24 * (4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024)
        + 4 * 1024
    )  # layers, outer norms
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    mistral = (
        32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096)
        + 4096  # layers, last norm
        + 2 * 32064 * 4096
    )  # token embeddings and head
    found = memory.count(memory.skeleton(ID))
    assert found.all == clip + projector + mistral + 4096 == 7_566_747_648  # and the row end
    assert (
        found.quantisable
        == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
        == 6_979_321_856
    )
    assert load_profile("paper").download_gb == round(found.all * 2 / 1e9, 1)


@pytest.mark.parametrize(
    ("target", "layers", "trained", "inside"),
    [
        (VISION_LINEAR, VISION_LAYERS, VISION_TRAINED, ("vision_tower", "multi_modal_projector")),
        (LANGUAGE_LINEAR, LANGUAGE_LAYERS, LANGUAGE_TRAINED, ("language_model",)),
    ],
)
def test_each_pattern_hits_every_linear_layer_of_its_side_and_none_of_the_other(
    target, layers, trained, inside
):
    tuned = adapted(target)
    names = trainable_names(tuned)
    linear = {
        name
        for name, m in bare().named_modules()
        if isinstance(m, torch.nn.Linear) and name.split(".")[1:2] in [[side] for side in inside]
    }  # lm_head is outside, as in peft's "all-linear"
    hit = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in names}
    assert hit == linear and len(hit) == layers and len(names) == 2 * layers
    assert tuned.num_parameters(only_trainable=True) == trained
    assert memory.trainable(ID, LORA, target) == trained


def test_expected_counts_are_written_down():
    assert (VISION_LAYERS, VISION_TRAINED) == (146, 3_645_440)
    assert (LANGUAGE_LAYERS, LANGUAGE_TRAINED) == (224, 20_971_520)


def test_unanchored_patterns_hit_the_other_side():
    with torch.device("meta"):
        loose = get_peft_model(bare(), training.lora_config(LORA, r".*\.(q_proj|k_proj|v_proj)"))
    sides = {name.split(".")[3] for name in trainable_names(loose)}
    assert sides == {"vision_tower", "language_model"}


def test_four_bits_hold_the_language_models_layers_and_nothing_else():
    linear = [name for name, m in bare().named_modules() if isinstance(m, torch.nn.Linear)]
    quantised = {name for name in linear if should_convert_module(name, list(loading.UNQUANTISED))}
    assert quantised == {
        name for name in linear if re.match(r"model\.language_model\.layers\.", name)
    }
    assert len(quantised) == 224 and len(linear) == 224 + 146 + 1
    # Names without "model." are anchored at the start in transformers 5 and keep nothing out.
    assert "model.vision_tower.encoder.layers.0.mlp.fc1" in linear
    assert should_convert_module(
        "model.vision_tower.encoder.layers.0.mlp.fc1", ["vision_tower", "lm_head"]
    )


@pytest.mark.parametrize(
    ("size", "tiles", "full"),
    [
        ((1000, 1000), 5, 576 + 48 * 49),
        ((700, 350), 3, None),
        ((350, 700), 3, None),
        ((1200, 300), 4, None),
    ],
)
def test_an_image_is_2928_tokens_or_5(size, tiles, full):
    model = bare()  # on the meta device; the pixels, from the CPU, are brought to it
    pixels, sizes = torch.zeros(1, 5, 3, 336, 336, dtype=torch.float64), torch.tensor([size])
    short, long = vision.cls_tokens(model, pixels, sizes), vision.full_tokens(model, pixels, sizes)
    assert [tuple(v.shape) for v in short] == [(tiles, 4096)] and long[0].shape[1] == 4096
    assert {(v.device.type, v.dtype) for v in (*short, *long)} == {("meta", model.dtype)}
    assert 576 < len(long[0]) <= 2928
    if full:
        assert len(long[0]) == full == memory.full_tokens(model.config) == 2928


def test_the_whole_forward_on_true_shapes():
    model, ids = bare(), torch.full((2, 700), 5, device="meta")
    out = model(inputs_embeds=model.get_input_embeddings()(ids), logits_to_keep=12)
    assert out.logits.shape == (2, 12, 32064)
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in out.past_key_values.layers)
    assert kept * 2 == memory.cache_bytes(model.config.text_config, 2, 2 * 700)
