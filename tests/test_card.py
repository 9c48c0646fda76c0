"""What rehearsals run on: stand-ins in the hub's form, and data in the published one."""

from __future__ import annotations

import pytest
from stand_ins import COUNTS, SENTENCEPIECE, data_folder, llava_15, llava_next, vicuna

from lavic_utils import data, experiment, loading, methods, vision
from lavic_utils.config import DOMAINS, UserError, load_profile

TEXT = "ID: B00HO5EE9W\nTitle: a red lamp"


def test_the_rehearsals_data_is_of_the_published_form_and_as_odd(tmp_path):
    data_folder(tmp_path)
    catalogue, odd = data.read_catalogue(tmp_path), set()
    for domain in DOMAINS:
        rows = {split: data.read_dialogues(tmp_path, domain, split) for split in data.SPLITS}
        assert {split: len(found) for split, found in rows.items()} == COUNTS
        named = {s: {a for d in found for a in d.candidates_st} for s, found in rows.items()}
        assert named["train"] & named["valid"] & named["test"]  # the published splits share items
        every = [d for found in rows.values() for d in found]
        assert {a for d in every for a in (*d.candidates_st, *d.gt_items)} <= set(catalogue)
        odd |= {"long" for d in rows["train"] if len(d.context.split()) > 1500}
        odd |= {"twice" for d in every if len(d.gt_items) > len(set(d.gt_items))}
        odd |= {"not listed" for d in every if not set(d.gt_items) & set(d.candidates_st)}
        odd |= {"ISBN" for d in every for a in d.candidates_st if a.isdecimal()}
    assert odd == {"long", "twice", "not listed", "ISBN"}
    images = [data.image_file(tmp_path, a) for a in catalogue]
    there = [data.open_image(path) is not None for path in images if path.is_file()]
    assert 0 < there.count(False) < there.count(True) < len(images) / 2
    assert len(data.read_stage1_valid(tmp_path)) == 6


def test_the_stand_in_has_the_hubs_layout_and_the_true_tiles(tmp_path, results):
    llava_next(tmp_path / "model")
    profile = load_profile("paper").model_copy(update={"model": str(tmp_path / "model")})
    model, processor = loading.load_model(profile), loading.load_processor(profile)
    assert model.config.vision_config.image_size == 336
    assert [vision.tile_count(model, size) for size in ((500, 500), (250, 500))] == [5, 3]
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == 32000
    run = experiment.Experiment(profile)
    assert run.profile.tier == "rehearsal"
    # negative controls: a model of this size, and an empty folder
    small = profile.model_copy(update={"download_gb": 0.01})
    assert experiment.Experiment(small).profile.tier == "full run"
    with pytest.raises(UserError):
        loading.load_model(profile.model_copy(update={"model": str(tmp_path)}))


def test_vicunas_slow_tokenizer_opens(tmp_path):
    """It comes as tokenizer.model alone, which is read with protobuf: part of the environment."""
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    vicuna(tmp_path / "model")
    assert not (tmp_path / "model" / "tokenizer.json").exists()
    model, tokenizer = methods.load_open(load_profile("paper"), str(tmp_path / "model"), None)
    true = SentencePieceTokenizer(str(SENTENCEPIECE)).encode(TEXT, bos=True, eos=False)
    assert tokenizer(TEXT).input_ids == true and tokenizer.pad_token
    assert model.config.model_type == "llama"


def test_the_other_llava_opens_with_its_tiles(tmp_path):
    llava_15(tmp_path / "model")
    model, processor = methods.load_open(load_profile("paper"), str(tmp_path / "model"), None)
    assert model.config.vision_config.image_size == 336 and hasattr(processor, "image_processor")
