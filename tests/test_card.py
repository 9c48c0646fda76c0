"""The rehearsal that `tests/card.py` runs on a card: its checkpoint and its data can be read."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from lavic_utils import data, vision
from lavic_utils.config import UserError, load_profile

spec = importlib.util.spec_from_file_location("card", Path(__file__).with_name("card.py"))
card = importlib.util.module_from_spec(spec)
spec.loader.exec_module(card)


def test_the_rehearsals_data_is_of_the_published_form(tmp_path):
    card.data_folder(tmp_path)
    rows = {split: data.read_dialogues(tmp_path, "beauty", split) for split in data.SPLITS}
    assert {split: len(found) for split, found in rows.items()} == {
        "train": 16,
        "valid": 4,
        "test": 12,
    }
    catalogue = data.read_catalogue(tmp_path)
    assert all(asin in catalogue for d in rows["test"] for asin in d.candidates_st)
    missing = [a for a in catalogue if data.open_image(data.image_file(tmp_path, a)) is None]
    assert len(missing) == 1 and len(data.read_stage1_valid(tmp_path)) == 4


def test_the_stand_in_has_the_hubs_layout_and_the_true_tiles(tmp_path):
    card.stand_in(tmp_path / "model")
    profile = load_profile("paper").model_copy(update={"model": str(tmp_path / "model")})
    model, processor = vision.load_model(profile), vision.load_processor(profile)
    assert model.config.vision_config.image_size == 336
    assert [vision.tile_count(model, size) for size in ((500, 500), (250, 500))] == [5, 3]
    assert processor.tokenizer("red").input_ids
    with pytest.raises(UserError):  # negative control: an empty folder is no checkpoint
        vision.load_model(profile.model_copy(update={"model": str(tmp_path)}))
