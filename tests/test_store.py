"""The visual store: equal to encoding in place, made once, kept through kills and damage, by any
number of processes."""

from __future__ import annotations

import inspect
import os
import shutil
import signal
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import LlavaNextConfig
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from lavic_utils import data, provenance, recommendation, report, store, training, vision
from lavic_utils.bench import memory
from lavic_utils.bench import reference as direct
from lavic_utils.config import PACKAGE, UserError
from lavic_utils.distillation import VISION_LINEAR
from lavic_utils.experiment import Experiment
from lavic_utils.mini import beyond
from lavic_utils.mini import model as minimodel
from lavic_utils.recommendation import LANGUAGE_LINEAR

DOMAIN = "fashion"


# ------------------------------------------- equality with the direct path, on the mini model
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The mini model on a very small world, with a random adapter in stage 1's place."""
    folder, patch = tmp_path_factory.mktemp("store"), pytest.MonkeyPatch()
    settings = yaml.safe_load((PACKAGE / "profiles" / "mini.yaml").read_text(encoding="utf-8"))
    settings["world"] |= {
        "train_shards": 1,
        "shard_items": 64,
        "stage1_valid_items": 10,
        "train_dialogues": 12,
        "valid_dialogues": 3,
        "test_dialogues": 12,
    }
    (folder / "small.yaml").write_text(
        yaml.safe_dump(settings | {"name": "small"}), encoding="utf-8"
    )
    patch.setenv("LAVIC_RESULTS", str(folder / "results"))
    patch.setenv("LAVIC_WORLD", str(folder / "data"))
    patch.setattr(Experiment, "distil", lambda self, kind="cls": {})
    made = Experiment(str(folder / "small.yaml")).prepare()
    torch.manual_seed(0)
    tuned = training.add_adapter(made.model(), made.profile.distillation.lora, VISION_LINEAR)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    training.save_adapter(tuned, made.folder / "stage1" / "adapter")
    yield made
    patch.undo()


def seeing(run, tokens):
    """The model that `tokens` come from, which encodes with every forward."""
    return (
        training.load_adapter(run.model(), run.folder / "stage1" / "adapter")
        if tokens == "distilled"
        else run.model()
    )


@pytest.mark.parametrize("tokens", ["distilled", "base"])
def test_stored_vectors_and_answers_equal_the_direct_path(run, tokens):
    stored, seen = run.visual(tokens, ("train", "test")), seeing(run, tokens)
    fresh = direct.look(run, seen, list(stored))
    assert len(stored) > 50 and all((stored[a] - fresh[a]).abs().max() <= 1e-5 for a in stored)
    model, rows = run.model(), run.dialogues(DOMAIN, "test")[:4]
    ours = recommendation.generate_answers(
        model, run.prompter(stored), rows, run.profile.candidates
    )
    assert [a.response for a in ours] == direct.answers(run, seen, rows)
    again = recommendation.generate_answers(
        model, run.prompter(fresh), rows, run.profile.candidates
    )
    assert [a.log_likelihoods for a in ours] == [
        pytest.approx(a.log_likelihoods, abs=5e-5) for a in again
    ]


def test_kinds_are_kept_apart_and_only_those_asked_for_are_made(run):
    distilled, base = run.visual("distilled", ("test",)), run.visual("base", ("test",))
    assert (
        list(distilled) == list(base)
        and (distilled[next(iter(base))] - base[next(iter(base))]).abs().max() > 1e-3
    )
    before = set((run.folder.parent / "tokens").iterdir())
    full = run.visual("full", ("valid",))
    assert len(set((run.folder.parent / "tokens").iterdir()) - before) == 1
    name = next(iter(full))
    values = vision.pixels(run.processor, [data.open_image(data.image_file(run.root, name))])
    with torch.inference_mode():
        alone = vision.full_tokens(run.model(), *values)[0]
    assert (full[name] - alone).abs().max() <= 1e-5 and vision.lengths(full)[name] == len(
        alone
    ) > len(base[next(iter(base))])


def test_items_without_a_readable_image_have_no_vectors_and_are_counted(run):
    found = run.visual("base", ("train", "test"))
    asked = {*run.items["train"], *run.items["test"]}
    files = {a: data.image_file(run.root, a) for a in asked}
    missing = {a for a in asked if not files[a].is_file()}
    corrupt = {a for a in asked - missing if data.open_image(files[a]) is None}
    assert missing and corrupt and set(found.missing) == missing and set(found.corrupt) == corrupt
    assert set(found) == asked - missing - corrupt
    assert found.counted == {
        "items": len(asked),
        "encoded": len(found),
        "missing": len(missing),
        "corrupt": len(corrupt),
    }
    for name in (*missing, *corrupt):
        with pytest.raises(KeyError):
            found[name]


def test_swapped_images_move_the_scores_with_the_item(run, tmp_path):
    model, row = run.model(), run.dialogues(DOMAIN, "test")[0]
    files = {a: data.image_file(run.root, a) for a in row.candidates_st}
    stored = run.visual("base", ("test",))
    one, other = next(
        (a, b)
        for a, b in combinations([a for a in files if a in stored], 2)
        if len(stored[a]) == len(stored[b]) and not torch.allclose(stored[a], stored[b], atol=0.1)
    )

    def scores(visual) -> list[float]:
        return recommendation.generate_answers(model, run.prompter(visual), [row], "candidates_st")[
            0
        ].log_likelihoods

    swapped = store.open_store(
        tmp_path,
        files | {one: files[other], other: files[one]},
        lambda: vision.file_encoder(model, run.processor),
    )
    by_hand = dict(stored) | {one: stored[other], other: stored[one]}
    assert scores(swapped) == pytest.approx(scores(by_hand), abs=2e-5)
    assert max(abs(a - b) for a, b in zip(scores(swapped), scores(stored), strict=True)) > 1e-3


def test_what_training_prompts_lost_is_in_the_result_of_stage_two(run, monkeypatch):
    def train(profile, model, prompter, examples, folder, seed, on_step):
        rows = [prompter.row(e)["input_ids"] for e in examples]
        looked = [{"step": 1, **on_step()}] if on_step else []
        return [*looked, *({"step": i, "loss": len(row)} for i, row in enumerate(rows))]

    monkeypatch.setattr(recommendation, "fine_tune", train)
    visual = run.visual("distilled", ("train",))
    examples = recommendation.training_examples(
        run.dialogues(DOMAIN, "train"), run.profile.candidates, run.seed
    )
    whole = sorted(len(run.prompter(visual).prompt(e.dialogue, e.candidates).ids) for e in examples)
    assert run.tune("LaViC", DOMAIN)["cut"] == {"prompts": 0, "dialogue_tokens": 0, "images": 0}
    stage = run.profile.recommendation
    tight = stage.model_copy(update={"max_length": whole[-1] - 1 + stage.max_new_tokens})
    tight = Experiment(run.profile.model_copy(update={"recommendation": tight}))
    found = tight.tune("LaViC", DOMAIN)
    assert found["cut"]["prompts"] == whole.count(whole[-1]) < len(whole) == found["examples"]
    assert (
        found["cut"]["dialogue_tokens"] >= found["cut"]["prompts"]
        and max(e["loss"] for e in found["log"]) <= whole[-1] + stage.max_new_tokens
    )
    assert (
        found["images"] == visual.counted
        and tight.tune("LaViC w/o images", DOMAIN)["images"] is None
    )


def test_before_stage_two_is_the_same_student_and_prompts_and_is_looked_at_on_the_way(
    run, monkeypatch, tmp_path
):
    """Three readings of the untuned model, and a training that changes nothing is no better."""

    def train(profile, model, prompter, examples, folder, seed, on_step):
        folder = folder / "adapter"
        tuned = training.add_adapter(model, profile.recommendation.lora, LANGUAGE_LINEAR)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=scale)
        training.save_adapter(tuned, folder)
        return [{"step": 1, "loss": 1.0}, {"step": 1, **on_step()}]

    student = run.folder / "stage1"
    monkeypatch.setattr(recommendation, "fine_tune", train)
    monkeypatch.setenv("LAVIC_RESULTS", str(tmp_path))
    shutil.copytree(student, tmp_path / "small" / "seed42" / "stage1")
    found = {}
    for scale in (1e-9, 0.1):
        fresh = Experiment(run.profile)
        rows = report.scored_rows(fresh, ["LaViC before stage 2", "LaViC"], [DOMAIN])
        before, after = ([one[name] for name in report.SCORED[:2]] for one in rows)
        assert rows[0]["steps"] == rows[0]["examples"] == 0 < rows[1]["steps"]
        assert all(0 <= value <= 1 for value in before + after)
        found[scale] = before == after, fresh.answers("LaViC before stage 2", DOMAIN)
        valid = [fresh.score("LaViC", DOMAIN, r, split="valid") for r in ("recommended", "scored")]
        (look,) = fresh.tune("LaViC", DOMAIN)["curve"]
        assert [look["recommended"], look["scored"]] == [s.hit_ratio_conversations for s in valid]
        assert not fresh.tuned_folder("LaViC before stage 2", DOMAIN).exists()
        shutil.rmtree(tmp_path / "small" / "seed42" / "stage2")
    assert found[1e-9][0] and found[1e-9][1] == found[0.1][1]


def test_other_visual_tokens_are_means_of_projected_patches(run):
    """Beyond the paper: one or four vectors a tile, and longer lists of the same pool."""
    one, four, full = (run.visual(kind, ("test",)) for kind in ("mean", "pooled", "full"))
    name = next(iter(one))
    values, sizes = vision.pixels(run.processor, [data.open_image(data.image_file(run.root, name))])
    tiles = vision.tile_count(run.model(), sizes[0])
    assert len(one[name]) == tiles and len(four[name]) == 4 * tiles < len(full[name])
    assert torch.allclose(four[name].unflatten(0, (tiles, 4)).mean(1), one[name], atol=1e-5)
    tower = run.model().config.vision_config
    whole = full[name][: (tower.image_size // tower.patch_size) ** 2]
    assert torch.allclose(whole.mean(0), one[name][0], atol=1e-4)  # the first tile: all of it
    rows = run.dialogues(DOMAIN, "test")
    longer = beyond.lists(run, DOMAIN, "test", rows, 20)
    pool = {asin for row in rows for asin in row.candidates_st}
    for short, long in zip(rows, longer, strict=True):
        names = long.candidates_st
        assert set(short.candidates_st) <= set(names) <= pool and len(set(names)) == len(names)
        assert len(names) == min(20, len(pool))


# ------------------------------------------- the store itself, on made-up vectors
COUNT = 2 * store.CHUNK + 10  # three chunks


def vectors(files):
    """Made-up tokens that the content of a file decides; none for a file of `bad`."""
    return [
        None
        if b"bad" in (text := file.read_bytes())
        else torch.full((3 + len(text) % 3, 8), float(int.from_bytes(text, "little") % 997))
        for file in files
    ]


@pytest.fixture
def paths(tmp_path) -> dict[str, Path]:
    found = {f"item{i}": tmp_path / f"{i}.jpg" for i in range(COUNT)}
    for i, path in enumerate(found.values()):
        path.write_bytes(b"bad %d" % i if i == 5 else b"image %d" % i)
    return found


def refuse():
    raise AssertionError("nothing is to be encoded here")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.safetensors"))


def test_an_image_is_encoded_once_whatever_items_and_calls_ask_for_it(paths, tmp_path):
    seen = []

    def counting():
        return lambda files: [seen.extend(files), vectors(files)][1]

    twin = tmp_path / "twin.jpg"
    twin.write_bytes(paths["item0"].read_bytes())
    asked = dict(list(paths.items())[:20]) | {"twin": twin, "gone": tmp_path / "none.jpg"}
    found = store.open_store(tmp_path / "s", asked, counting)
    assert (
        len(seen) == 20
        and torch.equal(found["twin"], found["item0"])
        and not torch.equal(found["item1"], found["item0"])
    )
    assert list(found) == [a for a in asked if a not in ("gone", "item5")]
    more = store.open_store(tmp_path / "s", paths, counting)
    assert (
        len(seen) == COUNT
        and len(set(seen)) >= COUNT - 1
        and found.corrupt == more.corrupt == ["item5"]
    )
    again = store.open_store(tmp_path / "s", paths, refuse)
    assert all(
        torch.equal(again[a], v)
        for a, v in zip(more, vectors([paths[a] for a in more]), strict=True)
    )
    paths["item1"].write_bytes(b"another")  # negative control: another image is another key
    assert torch.equal(
        store.open_store(tmp_path / "s", paths, counting)["item1"], vectors([paths["item1"]])[0]
    )
    assert len(seen) == COUNT + 1


def test_a_killed_process_keeps_its_finished_chunks(paths, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    store.open_store(whole, paths, lambda: vectors)

    def deadly(files):
        if paths["item300"] in files:  # in the second chunk
            os.kill(os.getpid(), signal.SIGKILL)
        return vectors(files)

    if not (child := os.fork()):
        store.open_store(killed, paths, lambda: deadly)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len(names(killed)) == 1
    seen = []
    store.open_store(killed, paths, lambda: lambda files: [seen.extend(files), vectors(files)][1])
    # names are the content's sha256
    assert len(seen) == COUNT - store.CHUNK and names(killed) == names(whole)


def test_a_chunk_appears_whole_or_not_at_all(paths, tmp_path, monkeypatch):
    def full(self, content):
        self.touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="no space"):
        store.open_store(tmp_path / "s", paths, lambda: vectors)
    assert list((tmp_path / "s").iterdir()) == []  # nothing half-written is left either
    monkeypatch.undo()
    assert len(store.open_store(tmp_path / "s", paths, lambda: vectors)) == COUNT - 1


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def chunk_of(folder: Path, path: Path) -> Path:
    """The chunk that holds an image."""
    return store.read_shards(folder)[provenance.file_hash(path)][0]


@pytest.mark.parametrize("damage", [flip, lambda p: p.write_bytes(b"")])
def test_a_damaged_chunk_is_made_again_and_said_in_one_line(paths, tmp_path, caplog, damage):
    before = store.open_store(tmp_path / "s", paths, lambda: vectors)
    file, seen = chunk_of(tmp_path / "s", paths["item0"]), []
    expected, kept = {a: v.clone() for a, v in before.items()}, names(tmp_path / "s")
    damage(file)
    found = store.open_store(
        tmp_path / "s", paths, lambda: lambda files: [seen.extend(files), vectors(files)][1]
    )
    assert len(seen) == store.CHUNK and names(tmp_path / "s") == kept
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert said == [f"{file}: damaged; made again"]
    assert all(torch.equal(found[a], v) for a, v in expected.items())
    store.open_store(tmp_path / "s", paths, refuse)
    file.unlink()  # one that is gone is made again, too
    assert len(store.open_store(tmp_path / "s", paths, lambda: vectors)) == COUNT - 1


def test_a_chunk_made_again_by_another_request_replaces_the_damaged_one(paths, tmp_path, caplog):
    store.open_store(tmp_path / "s", paths, lambda: vectors)
    damaged = chunk_of(tmp_path / "s", paths["item0"])
    flip(damaged)
    few = dict(list(paths.items())[:7])
    assert len(store.open_store(tmp_path / "s", few, lambda: vectors)) == 6
    assert len(caplog.records) == 1 and not damaged.exists()
    seen = []
    found = store.open_store(
        tmp_path / "s", paths, lambda: lambda files: [seen.extend(files), vectors(files)][1]
    )
    assert len(seen) == store.CHUNK - 7 and len(found) == COUNT - 1 and len(caplog.records) == 1
    assert all(
        torch.equal(found[a], v)
        for a, v in zip(found, vectors([paths[a] for a in found]), strict=True)
    )


def test_the_key_holds_all_that_changes_vectors(tmp_path, monkeypatch):
    adapter, processor = tmp_path / "adapter", minimodel.build_processor()
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"1")
    plain = {
        "model": "hub/id",
        "revision": "a",
        "adapter": adapter,
        "processor": processor,
        "kind": "cls",
        "dtype": torch.float32,
    }
    found = [store.key_of(**plain)]
    assert store.key_of(**plain) == found[0]
    for change in (
        {"model": "hub/other"},
        {"revision": "b"},
        {"adapter": None},
        {"dtype": torch.float16},
        {"kind": "full"},
        {"model": str(PACKAGE / "mini_model")},
    ):
        found.append(store.key_of(**plain | change))
    processor.image_processor.resample = 0
    found.append(store.key_of(**plain))
    (adapter / "adapter_model.safetensors").write_bytes(b"22")
    found.append(store.key_of(**plain))
    source = inspect.getsource
    makers = (data.open_image, vision.pixels, vision.last_cls, vision.cls_tokens)
    makers += (vision.full_tokens, vision.encode)
    for edited in makers:
        monkeypatch.setattr(inspect, "getsource", lambda f, e=edited: source(f) + "x\n" * (f is e))
        found.append(store.key_of(**plain))
    monkeypatch.setattr(inspect, "getsource", source)
    monkeypatch.setattr(
        provenance.metadata, "version", lambda name: "0.1"
    )  # another Pillow resizes otherwise
    found.append(store.key_of(**plain))
    assert len(set(found)) == len(found)


def test_a_comment_in_the_code_throws_no_vectors_away(monkeypatch):
    plain = ["hub/id", "a", None, minimodel.build_processor(), torch.float32, "cls"]
    before, source = store.key_of(*plain), inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda f: source(f) + "    # a comment\n")
    assert store.key_of(*plain) == before


SCRIPT = """
import sys
from pathlib import Path
from accelerate import PartialState
import torch
from lavic_utils import store

VECTORS
folder = Path(sys.argv[1])
paths = {f"item{i}": folder.parent / f"{i}.jpg" for i in range(int(sys.argv[2]))}
rank, seen = PartialState(cpu=True).process_index, []
encode = lambda files: [seen.extend(files), vectors(files)][1]
found = store.open_store(folder, paths, lambda: encode)
said = f"{PartialState().num_processes} {len(seen)} {len(found)}"
(folder.parent / f"rank{rank}").write_text(said)
"""


def test_of_two_processes_the_first_encodes_and_both_read(paths, tmp_path):
    (tmp_path / "share.py").write_text(SCRIPT.replace("VECTORS", inspect.getsource(vectors)))
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(tmp_path / "share.py"),
            str(tmp_path / "two"),
            str(COUNT),
        ],
        check=True,
        env=env,
        timeout=120,
    )
    said = [(tmp_path / f"rank{i}").read_text() for i in range(2)]
    assert said == [f"2 {COUNT} {COUNT - 1}", f"2 0 {COUNT - 1}"]
    store.open_store(tmp_path / "one", paths, lambda: vectors)
    assert names(tmp_path / "two") == names(tmp_path / "one")


# ---------------------------------------------------------------- tiles and slots
SHAPES = [
    (a, b)
    for side in (40, 97, 700)
    for ratio in (1, 1.1, 1.3, 1.49, 1.7, 2, 2.6, 3, 3.5, 5, 9)
    for a, b in ((side, round(side * ratio)), (round(side * ratio), side))
]


class Configured:
    def __init__(self, config) -> None:
        self.config = config


def tiles_of(processor, size) -> int:
    """Tiles that the image processor really makes of a picture without a black pixel."""
    values = processor(Image.new("RGB", size[::-1], (250, 3, 99)), return_tensors="pt")[
        "pixel_values"
    ][0]
    return sum(bool((tile != 0).any()) for tile in torch.as_tensor(values))


def test_tiles_of_every_aspect_ratio_on_the_mini_model():
    processor = minimodel.build_processor()
    model = minimodel.build_model(processor, seed=1)
    counts = {size: vision.tile_count(model, size) for size in SHAPES}
    assert counts == {size: tiles_of(processor.image_processor, size) for size in SHAPES}
    assert set(counts.values()) == {3, 5}


def test_tiles_of_every_aspect_ratio_on_the_true_model():
    config = LlavaNextConfig.from_json_file(memory.CONFIGS["llava-hf/llava-v1.6-mistral-7b-hf"])
    assert config.image_grid_pinpoints == [
        [336, 672],
        [672, 336],
        [672, 672],
        [1008, 336],
        [336, 1008],
    ]
    processor = LlavaNextImageProcessorPil(
        crop_size={"height": 336, "width": 336},
        size={"shortest_edge": 336},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    counts = {size: vision.tile_count(Configured(config), size) for size in SHAPES}
    assert counts == {size: tiles_of(processor, size) for size in SHAPES}
    assert set(counts.values()) == {3, 4, 5}
    known = {
        (336, 336): 3,
        (672, 672): 5,
        (1500, 1500): 5,
        (336, 672): 3,
        (1500, 500): 4,
        (500, 1500): 4,
        (1500, 750): 3,
    }
    assert {size: vision.tile_count(Configured(config), size) for size in known} == known


def test_vectors_are_placed_by_item_never_by_the_total_alone():
    model = minimodel.build_model(minimodel.build_processor(), seed=1)
    slot, five, three = model.config.image_token_id, torch.randn(5, 128), torch.randn(3, 128)
    ids = torch.tensor(
        [[7, *[slot] * 5, 8, *[slot] * 3], [0, 0, 7, 9, *[slot] * 3, 8, 8, 9]]
    )  # a row ends with an image
    placed = vision.place(model, ids, [five, three, three + 1], 0)
    assert (
        torch.equal(placed[0, 1:6], five)
        and torch.equal(placed[0, 7:], three)
        and torch.equal(placed[1, 4:7], three + 1)
    )
    assert torch.equal(placed[0, 0], model.get_input_embeddings()(torch.tensor(7)))
    for wrong in (
        [three, five, three],
        [five, three, three[:2], three[:1]],
        [five, three],
        [torch.randn(11, 128)],
    ):
        with pytest.raises(ValueError, match="placeholders"):
            vision.place(model, ids, wrong, 0)
