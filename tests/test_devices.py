"""Code that meets a model on another device: the meta device, where values do not matter, and a
pretended card, which has the processor's. All notebooks meet that card in `make rehearsal`."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lavic_utils import methods, report, vision
from lavic_utils.config import load_profile
from lavic_utils.demo.panel import Case, Panel

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


@pytest.fixture
def elsewhere(model):
    """The model in half precision on a device that is not the processor."""
    return model.to(torch.bfloat16).to("meta")


@pytest.mark.parametrize("how", [vision.cls_tokens, vision.full_tokens])
def test_pixels_are_brought_to_the_model(processor, elsewhere, how):
    images = [Image.new("RGB", (96, 96)), Image.new("RGB", (96, 48))]
    values, sizes = vision.pixels(processor, images)
    found = how(elsewhere, values, sizes)
    assert values.device.type == "cpu" and values.dtype == torch.float32  # as the processor's
    assert {(t.device.type, t.dtype, t.shape[1]) for t in found} == {("meta", torch.bfloat16, 128)}
    tiles, counts = vision.real_tiles(elsewhere, values, sizes)
    assert tiles.device.type == "meta" and counts == [5, 3]


def test_ids_are_brought_to_the_embeddings(elsewhere):
    assert elsewhere.get_input_embeddings()(torch.tensor([[7, 8]]).to("meta")).device.type == "meta"
    # beyond the device: what stands where depends on values, which meta has not
    with pytest.raises(NotImplementedError):
        vision.place(elsewhere, torch.tensor([[7, 8]]), [])


@pytest.mark.parametrize("name", ["01_data_inspection", "02_self_distillation"])
def test_cells_that_encode_run_on_such_a_device(processor, elsewhere, name):
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"]]
    both = ("vision.cls_tokens(model", "vision.full_tokens(model")
    source = next(cell for cell in cells if all(words in cell for words in both))
    run = SimpleNamespace(
        model=lambda: elsewhere, processor=processor, profile=load_profile("mini")
    )
    values, sizes = vision.pixels(processor, [Image.new("RGB", (144, 144))])
    before = {"run": run, "model": elsewhere, "values": values, "sizes": sizes}
    before |= {"vision": vision, "report": report, "inspect": inspect, "Image": Image}
    exec(source, before)


def test_the_page_shows_an_items_tiles_where_the_model_is_on_such_a_device(processor, elsewhere):
    image, run = Image.new("RGB", (96, 48), "orange"), SimpleNamespace(processor=processor)
    panel = SimpleNamespace(run=run, model=elsewhere, image=lambda picture: image)
    tiles = Panel.tiles(panel, Case(None, ("A",)), "A")
    assert len(tiles) == 3 and all(tile.size == (48, 48) for tile in tiles)
    shown = tiles[0].getpixel((24, 24))
    assert all(abs(a - b) <= 1 for a, b in zip(shown, (255, 165, 0), strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real card")
@pytest.mark.timeout(900)
def test_the_package_on_a_pretended_card():
    """In a process of its own: what torch is told of a new device, it keeps."""
    here = Path(__file__).resolve().parent
    paths = [str(here.parent), str(here), str(here / "pretend")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--timeout", "0", str(here / "pretend" / "on_card.py")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=here.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.parametrize("why", [None, "it takes 25 GiB"])
def test_what_a_card_has_no_room_for_is_left_out_of_the_ablations(monkeypatch, why):
    notebook = json.loads((NOTEBOOKS / "05_ablations.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"]]
    monkeypatch.setattr(methods.Trained, "reason", lambda *_: why)
    run = SimpleNamespace(profile=load_profile("t4"))
    run.prepare = lambda: run
    known: dict = {"profile": "t4", "seed": 42}
    exec(next(cell for cell in cells if "\nfrom lavic_utils" in cell), known)
    known["Experiment"] = lambda *_: run
    exec(next(cell for cell in cells if "\nOTHERS, rows =" in cell), known)
    assert ("Entire tokens (5x577)" in known["ABLATIONS"]) == (why is None)
    assert known["OTHERS"][:-1] == known["ABLATIONS"][:-1] and len(known["OTHERS"]) in (3, 4)
