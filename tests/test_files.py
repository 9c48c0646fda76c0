"""What a colleague's folder, a shell and another process bring: the right answer, or one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from lavic_utils.__main__ import main
from lavic_utils.audit import answer_files
from lavic_utils.config import UserError
from lavic_utils.experiment import Experiment
from lavic_utils.provenance import save_figure

TEN = [f"B0TEST000{i}" for i in range(10)]
TITLES = {asin: f"a mug of kind {asin[-1]}" for asin in TEN}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Home's one test dialogue, ten items, two pictures; results in a folder of the test's."""
    monkeypatch.setenv("LAVIC_RESULTS", str(tmp_path / "results"))
    for name in ("LAVIC_DATA", "LAVIC_WORLD", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    place = tmp_path / "data"
    (place / "amazon_home").mkdir(parents=True)
    (place / "train_images").mkdir()
    row = {
        "context": "<submission>a red mug please</submission>",
        "context_items": [],
        "gt": "this one",
        "gt_items": [TEN[3]],
        "candidates_st": TEN,
        "candidates_gpt_large": TEN,
    }
    (place / "amazon_home" / "test.jsonl").write_text(json.dumps(row) + "\n")
    write_catalogue(place, TITLES)
    picture(place, 0, "red")
    picture(place, 1, "blue")
    return place


def write_catalogue(place: Path, titles: dict) -> None:
    items = {asin: {"title": title, "images": [{"large": "x"}]} for asin, title in titles.items()}
    (place / "item2meta_train.json").write_text(json.dumps(items))


def picture(place: Path, i: int, colour: str) -> None:
    Image.new("RGB", (32, 32), colour).save(place / "train_images" / f"{TEN[i]}_0.jpg")


def lavic(*words: object) -> int:
    return main([str(word) for word in words])


def asked(place: Path, method: str = "LLaVA-v1.6 (title+image)") -> dict:
    run = Experiment("mini", data_folder=place)
    (row,) = run.answers(method, "home")
    return {**row, "data": run.data_hash}


def test_pictures_added_replaced_or_removed_are_another_input(folder):
    first = asked(folder)
    picture(folder, 2, "green")
    more = asked(folder)
    assert more["prompt_tokens"] > first["prompt_tokens"]
    picture(folder, 2, "black")
    replaced = asked(folder)
    assert replaced["log_likelihoods"] != more["log_likelihoods"]
    (folder / "train_images" / f"{TEN[2]}_0.jpg").unlink()
    assert asked(folder) == first
    assert len({one["data"] for one in (first, more, replaced)}) == 3
    Image.new("RGB", (32, 32)).save(folder / "train_images" / "B0UNLISTED_0.jpg")
    assert asked(folder) == first  # negative control: nobody lists it


@pytest.mark.parametrize("method", ["BM25", "LLaVA-v1.6 (title)", "LLaVA-v1.6 (title+image)"])
def test_a_candidate_that_the_catalogue_lacks_is_one_line(folder, capsys, method):
    with_title, lacking = (TEN[7], "field title"), (f"item {TEN[7]}, which is not in it",)
    without = {asin: TITLES[asin] for asin in TEN if asin != TEN[7]}
    for titles, said in (
        ({**TITLES, TEN[7]: None}, with_title),
        ({**TITLES, TEN[7]: "half a pair \ud800"}, with_title),
        (without, lacking),
    ):
        write_catalogue(folder, titles)
        assert lavic("run", method, "--domain", "home", "--data", folder, "--limit", 1) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(words in error for words in said)


def test_what_is_wrong_with_out_is_said_before_anything_is_answered(folder, tmp_path, capsys):
    words = ["run", "BM25", "--domain", "home", "--data", folder, "--out"]
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("x")
    for out in (folder, tmp_path / "fifo", tmp_path / "file" / "x"):
        assert lavic(*words, out) == 2
        assert str(out.name) in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert (tmp_path / "fifo").is_fifo() and not list(tmp_path.rglob("result.json"))
    assert lavic(*words, tmp_path / "answers.jsonl") == 0  # negative control
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "9" * 20], "less than or equal to 4294967295"),
        (["--split", "train"], "'train' is not one of"),
        (["--profile", "nope"], "profile 'nope' not found"),
    ],
)
def test_a_wrong_option_is_one_line_at_once(words, said):
    code = "import sys; from lavic_utils.__main__ import main; code = main(sys.argv[1:])\n"
    code += "assert 'torch' not in sys.modules; sys.exit(code)"  # what takes seconds
    command = [sys.executable, "-c", code, "run", "BM25", "--domain", "home", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_a_shell_of_ascii_prints_a_table():
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "lavic_utils", "table", "ablation"]
    done = subprocess.run(command, env={**os.environ, **plain}, capture_output=True, check=False)
    assert done.returncode == 0 and b"0.3197 / 0.989" in done.stdout, done.stderr


def test_results_that_cannot_be_written_are_one_line(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAVIC_RESULTS", str(tmp_path / "file"))
    assert lavic("run", "BM25", "--domain", "home", "--data", folder) == 2
    said = capsys.readouterr().err
    assert "Not a directory" in said and said.count("\n") == 1


@pytest.mark.parametrize("left", [0, 2000])
def test_a_full_disk_is_one_line_and_loses_nothing(left, full_disk, folder, tmp_path, capsys):
    words, out = ["run", "BM25", "--domain", "home", "--data", folder, "--out"], tmp_path / "a"
    out.write_text("an older file")
    before = sorted(tmp_path.rglob("*"))
    with full_disk(left):
        assert lavic(*words, out) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and "cannot be written (File too large)" in said
    assert out.read_text() == "an older file"
    new = [p for p in tmp_path.rglob("*") if p.is_file() and p not in before]
    assert not [p for p in new if p.suffix == ".tmp" or p.name == "result.json"]
    assert lavic(*words, out) == 0  # negative control: with room the same command goes on
    made = out.read_text()
    with full_disk(100):  # the answers are kept, only their file cannot be written
        assert lavic(*words, tmp_path / "b") == 2
    assert made == out.read_text() and not (tmp_path / "b").exists()
    assert str(tmp_path / "b") in capsys.readouterr().err


def test_a_figure_or_checkpoint_on_a_full_disk_is_one_line(
    full_disk, folder, tmp_path, monkeypatch, capsys
):
    figure, path = plt.figure(), tmp_path / "out" / "figure.png"
    about = {"tier": "published", "code_hash": "0" * 12}
    save_figure(figure, path, "published", about)
    made = path.read_bytes()
    with full_disk(100), pytest.raises(UserError, match="figure.png: cannot be written"):
        save_figure(figure, path, "published", about)
    assert path.read_bytes() == made and os.listdir(path.parent) == ["figure.png"]

    def train(*_) -> None:
        with full_disk(100):
            torch.save(torch.zeros(10_000), tmp_path / "optimizer.pt")

    monkeypatch.setattr(answer_files, "run_method", train)
    assert lavic("run", "BM25", "--domain", "home", "--data", folder) == 2
    said = capsys.readouterr().err
    assert "a checkpoint cannot be written whole" in said and said.count("\n") == 1


def test_reproduce_on_a_full_disk_is_one_line(full_disk, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LAVIC_RESULTS", str(tmp_path / "results"))
    with full_disk(100):
        assert lavic("reproduce", "--only", "00") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "File too large" in said[0]
