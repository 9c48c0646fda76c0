"""Counts of the published files, on hand-made rows and, where they are, on the files themselves."""

import json
import os
from pathlib import Path

import pytest

from lavic_utils.audit import inspection
from lavic_utils.config import UserError, load_profile

PROMPTS = load_profile("paper").prompts
TEN = [f"B00000000{i}" for i in range(10)]
REAL = os.environ.get("LAVIC_DATA")
needs_data = pytest.mark.skipif(
    not REAL,
    reason="set LAVIC_DATA to a folder with the published Reddit-Amazon files",
)


def write(root: Path, rows: list[dict], split: str = "test") -> None:
    (root / "all_beauty").mkdir(parents=True, exist_ok=True)
    (root / "all_beauty" / f"{split}.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    title = {
        "title": "red hat",
        "image_name": "B0000000X0_0.jpg",
        "image": "",
        "image_description_llava_cleaned": "",
    }
    (root / "item2meta_valid.jsonl").write_text(json.dumps(title) + "\n", encoding="utf-8")


def row(**changes) -> dict:
    return {
        "context": "<submission>one two</submission>",
        "context_items": [],
        "gt": "x",
        "gt_items": [TEN[0]],
        "candidates_st": TEN,
        "candidates_gpt_large": TEN,
        **changes,
    }


def test_each_fact_is_counted_where_it_is_true_and_only_there(tmp_path):
    others = [f"B11111111{i}" for i in range(10)]
    write(
        tmp_path,
        [
            row(),
            row(context_items=[TEN[0]]),
            row(gt_items=[TEN[0], TEN[0]], context="<submission>a</submission>"),
            row(
                gt_items=[others[0], others[1]],
                candidates_gpt_large=others,
                context="<comment>b</comment>",
            ),
        ],
    )
    table = inspection.dialogue_table(tmp_path, PROMPTS)
    assert table["repeats_context"].tolist() == [False, True, False, False]
    assert table["names_truth"].tolist() == [False, True, False, False]
    assert table["repeats_truth"].tolist() == [False, False, True, False]
    assert table["st"].tolist() == [True, True, True, False] and table["gpt"].all()
    assert table["shared"].tolist() == [10, 10, 10, 0] and table["truths"].tolist() == [1, 1, 1, 2]


def test_prompts_grow_by_their_visual_tokens(tmp_path):
    write(tmp_path, [row(), row(context=f"<submission>{'word ' * 3000}</submission>")])
    lengths = inspection.prompt_lengths(
        tmp_path, inspection.dialogue_table(tmp_path, PROMPTS), PROMPTS
    )
    assert (lengths["5 [CLS] an item"] - lengths["titles only"] == 50).all()
    assert (lengths["2,885 tokens an item"] - lengths["titles only"] == 28_850).all()


def test_prompt_length_is_that_of_the_written_prompt(tmp_path):
    write(tmp_path, [row()])
    found = inspection.prompt_lengths(
        tmp_path, inspection.dialogue_table(tmp_path, PROMPTS), PROMPTS
    )["titles only"][0]
    lines = "".join(
        PROMPTS.candidate_without_image.format(title="red hat", id="B000000000") for _ in range(10)
    )
    text = PROMPTS.recommend.format(
        dialogue=PROMPTS.seeker.format(text="one two"), candidates=lines
    )
    assert (
        abs(found - 1 - inspection.mistral_tokens([text])[0]) <= 25
    )  # pieces counted apart, two spaces a line


def test_no_file_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no dialogue file"):
        inspection.dialogue_table(tmp_path, PROMPTS)


@needs_data
def test_the_published_files_hold_what_is_said_of_them():
    table = inspection.dialogue_table(REAL, PROMPTS)
    assert table.query("split == 'test'").groupby("domain").size().to_dict() == {
        "beauty": 772,
        "fashion": 826,
        "home": 372,
    }


@needs_data
def test_real_data_summary():
    rows = {(r["domain"], r["split"]): r for r in inspection.real_data_summary(REAL)}
    expected = {
        "beauty": (772, 859, 0.2319, 0.4249),
        "fashion": (826, 961, 0.2288, 0.4201),
        "home": (372, 397, 0.5403, 0.7366),
    }
    for domain, figures in expected.items():
        row = rows[domain, "test"]
        assert (row["conversations"], row["pairs"]) == figures[:2]
        assert (row["recall_st"], row["recall_gpt_large"]) == pytest.approx(figures[2:], abs=5e-5)
    assert (
        rows["beauty", "test"]["repeated_gt_rows"] == 27
        and rows["home", "test"]["odd_id_share"] == 0
    )
