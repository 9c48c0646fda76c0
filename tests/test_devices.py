"""Code that meets a model on a device that is not the processor: here the meta device, where values do not matter."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lavic_utils import figures, vision
from lavic_utils.config import load_profile

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


@pytest.fixture
def elsewhere(model):
    """The model in half precision on a device that is not the processor."""
    return model.to(torch.bfloat16).to("meta")


@pytest.mark.parametrize("how", [vision.cls_tokens, vision.full_tokens])
def test_pixels_are_brought_to_the_model(processor, elsewhere, how):
    values, sizes = vision.pixels(processor, [Image.new("RGB", (96, 96)), Image.new("RGB", (96, 48))])
    found = how(elsewhere, values, sizes)
    assert values.device.type == "cpu" and values.dtype == torch.float32  # as the processor gives them
    assert {(t.device.type, t.dtype, t.shape[1]) for t in found} == {("meta", torch.bfloat16, 128)}
    tiles, counts = vision.real_tiles(elsewhere, values, sizes)
    assert tiles.device.type == "meta" and counts == [5, 3]


def test_ids_are_brought_to_the_embeddings(elsewhere):
    assert elsewhere.get_input_embeddings()(torch.tensor([[7, 8]]).to("meta")).device.type == "meta"
    with pytest.raises(NotImplementedError):  # beyond the device: what stands where depends on values, which meta has not
        vision.place(elsewhere, torch.tensor([[7, 8]]), [])


@pytest.mark.parametrize(("name", "cell"), [("01_data_inspection", 43), ("02_self_distillation", 8)])
def test_cells_that_encode_run_on_such_a_device(processor, elsewhere, monkeypatch, name, cell):
    source = "".join(json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"][cell - 1]["source"])
    assert "vision.cls_tokens(model" in source and "vision.full_tokens(model" in source
    monkeypatch.setattr(figures, "keep", lambda *_, **__: None)
    monkeypatch.setattr(figures, "token_budget", lambda *_: None)
    run = SimpleNamespace(model=lambda: elsewhere, processor=processor, profile=load_profile("mini"))
    values, sizes = vision.pixels(processor, [Image.new("RGB", (144, 144))])
    import inspect

    exec(source, {"run": run, "model": elsewhere, "vision": vision, "figures": figures, "inspect": inspect,  # noqa: S102
                  "values": values, "sizes": sizes})
