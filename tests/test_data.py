"""Reading files: exact or refused, never repaired in silence. Made-up rows; real files only where LAVIC_DATA is set."""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lavic_utils import data
from lavic_utils.config import DOMAINS, UserError, real_data_dir

NEED_DATA = "set LAVIC_DATA to a folder with the published Reddit-Amazon files (repository jeon185/LaViC)"
real = pytest.mark.skipif(real_data_dir() is None, reason=NEED_DATA)
TEN = [f"B0TEST{i:04d}" for i in range(10)]
ROW = {
    "context": "<submission>a red mug?\u2028please</submission>\n<comment>how\u0085big?</comment>",
    "context_items": [],
    "gt": "this one",
    "gt_items": [TEN[3], "0123456789"],
    "candidates_st": TEN,
    "candidates_gpt_large": TEN[::-1],
}
FIELDS = tuple(ROW)


def write(root: Path, content: bytes, split: str = "test") -> Path:
    path = root / DOMAINS["beauty"] / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def changed(**fields: object) -> dict[str, object]:
    return {**ROW, **fields}


def test_a_row_is_read_as_it_stands(tmp_path: Path) -> None:
    path = write(tmp_path, lines(ROW, ROW, changed(extra=1, gt_items=[TEN[0], TEN[0]])))
    rows = data.read_dialogues(tmp_path, "beauty", "test")
    assert [d.line for d in rows] == [1, 2, 3] and {(d.domain, d.split) for d in rows} == {("beauty", "test")}
    assert {name: list(v) if isinstance(v := getattr(rows[0], name), tuple) else v for name in FIELDS} == ROW
    assert rows[0].turns == [("seeker", "a red mug?\u2028please"), ("helper", "how\u0085big?")]
    assert rows[2].gt_items == (TEN[0], TEN[0])  # a repeated id stays: scoring counts it once
    # negative control: taking every line end of str.splitlines for one tears the rows apart
    assert len(path.read_text(encoding="utf-8").splitlines()) > 3


BAD = {
    "bad JSON": (b'{"context": \n', "JSON"),
    "not UTF-8": (lines(ROW).replace(b"this one", b"this \xff"), "UTF-8"),
    "not an object": (lines([ROW]), "object"),
    "cut short": (lines(ROW)[:-20], "JSON"),
    "a field twice": (lines(ROW).replace(b'"gt":', b'"gt": "x", "gt":'), "'gt'"),
    "blank line": (lines(ROW).replace(b"{", b"\n{", 1), "line 1"),
    "deep": (b"[" * 100_000 + b"\n", "JSON"),
    "huge number": (lines(changed(gt=0)).replace(b'"gt": 0', b'"gt": ' + b"1" * 5000), "JSON"),
    "half a surrogate pair": (json.dumps(changed(gt="\ud800")).encode(), "field gt"),
    "no candidates": (lines({k: v for k, v in ROW.items() if k != "candidates_st"}), "field candidates_st"),
    "nine candidates": (lines(changed(candidates_st=TEN[:9])), "field candidates_st"),
    "a candidate twice": (lines(changed(candidates_gpt_large=TEN[:9] + TEN[:1])), "field candidates_gpt_large"),
    "a path as id": (lines(changed(candidates_st=[*TEN[:9], "../../etc"])), "field candidates_st.9"),
    "ids as text": (lines(changed(gt_items=TEN[0])), "field gt_items"),
    "a number as id": (lines(changed(gt_items=[123456789])), "field gt_items.0"),
    "null": (lines(changed(context=None)), "field context"),
    "no ground truth": (lines(changed(gt_items=[])), "field gt_items"),
    "blank answer": (lines(changed(gt=" ")), "field gt"),
    "unclosed turn": (lines(changed(context="<submission>a mug?")), "field context"),
    "turn in a turn": (lines(changed(context="<submission>a<comment>b</submission>")), "field context"),
    "text outside": (lines(changed(context="hm <submission>a mug?</submission>")), "field context"),
    "empty file": (b"", "line 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, expected = BAD[name]
    path = write(tmp_path, content)
    with pytest.raises(UserError) as caught:
        data.read_dialogues(tmp_path, "beauty", "test")
    text = str(caught.value)
    assert str(path) in text and "line 1" in text and expected in text and len(text.splitlines()) == 1


def test_lenient_leaves_bad_rows_out_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, lines(ROW, changed(gt_items=[]), ROW) + b"{\n")
    with caplog.at_level(logging.WARNING):
        assert [d.line for d in data.read_dialogues(tmp_path, "beauty", "test", lenient=True)] == [1, 3]
    assert "line 2" in caplog.text and "line 4" in caplog.text and "line 3" not in caplog.text
    write(tmp_path, b"{\n")
    with pytest.raises(UserError, match="no row"):  # nothing left is an error even then
        data.read_dialogues(tmp_path, "beauty", "test", lenient=True)


def test_wrong_places_are_named(tmp_path: Path) -> None:
    for domain, split, expected in (("toys", "test", "beauty"), ("home", "dev", "valid"), ("home", "test", "jeon185")):
        with pytest.raises(UserError, match=expected):
            data.read_dialogues(tmp_path, domain, split)
    (tmp_path / "item2meta_train.json.zip").write_bytes(b"")
    with pytest.raises(UserError, match="unzip item2meta_train.json.zip"):
        data.read_catalogue(tmp_path)


JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(TEN),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=12)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """One or two rows; a few changes of fields, list entries and texts, then perhaps of bytes."""
    rows = [copy.deepcopy(ROW) for _ in range(draw(st.integers(1, 2)))]
    for _ in range(draw(st.integers(0, 2))):
        row, name = draw(st.sampled_from(rows)), draw(st.sampled_from(FIELDS))
        how = draw(st.sampled_from(("drop", "replace", "entry", "text", "rename")))
        if how == "drop":
            row.pop(name, None)
        elif how == "rename" and name in row:
            row[draw(st.text(max_size=5))] = row.pop(name)
        elif how == "replace":
            row[name] = draw(JSON_VALUE)
        elif isinstance(value := row.get(name), list) and value:
            at = draw(st.integers(0, len(value) - 1))
            value[at:at + draw(st.integers(0, 2))] = draw(st.lists(JSON_VALUE | st.sampled_from(TEN), max_size=2))
        elif isinstance(value, str):
            row[name] = value.replace("e", draw(st.text(max_size=4)), 1)  # any letters, also U+2028 and "\n"
    content = b"".join(json.dumps(r, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass") + b"\n"
                       for r in rows)
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(max_size=5)) + content[at + draw(st.integers(0, 8)):]
    return content


def test_mutated_rows_are_exact_or_refused() -> None:
    seen = {"read": 0, "refused": 0}

    @settings(max_examples=400, deadline=None, derandomize=True, database=None,
              suppress_health_check=[HealthCheck.too_slow])
    @given(mutated())
    def check(content: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = write(Path(folder), content)
            try:
                rows = data.read_dialogues(folder, "beauty", "test")
            except UserError as error:
                seen["refused"] += 1
                assert str(path) in str(error) and len(str(error).splitlines()) == 1
                return
        seen["read"] += 1
        truth = [json.loads(raw) for raw in content.removesuffix(b"\n").split(b"\n")]
        assert len(rows) == len(truth)
        for dialogue, row in zip(rows, truth, strict=True):
            for name in FIELDS:
                value = getattr(dialogue, name)
                assert (list(value) if isinstance(value, tuple) else value) == row[name]
            assert len(set(dialogue.candidates_st)) == 10 and dialogue.gt_items and dialogue.turns

    logging.disable(logging.WARNING)
    try:
        check()
    finally:
        logging.disable(logging.NOTSET)
    assert min(seen.values()) >= 50, seen  # else the test looked at one side only


def catalogue(root: Path, items: object) -> Path:
    (root / "item2meta_train.json").write_text(json.dumps(items), encoding="utf-8")
    return root


def test_catalogue_and_stage1_rows(tmp_path: Path) -> None:
    item = {"title": "mug", "categories": ["home"], "features": None, "description": "one text",
            "images": [{"large": "l0"}, {"large": None, "thumb": "t1"}, {}], "price": 3,
            "image_descriptions_llava_cleaned": {f"{TEN[0]}_1.jpg": "blue", f"{TEN[0]}_0.jpg": "red"}}
    found = data.read_catalogue(catalogue(tmp_path, {TEN[0]: item, TEN[1]: {"title": ""}}))
    mug = found[TEN[0]]
    assert (mug.asin, mug.title, mug.features, mug.description) == (TEN[0], "mug", (), ("one text",))
    assert mug.images == ("l0", "t1", "") and found[TEN[1]].descriptions == {}
    rows = data.stage1_rows(found.values())
    assert [(r.asin, r.k, r.image_name, r.link, r.description) for r in rows] == [
        (TEN[0], 1, f"{TEN[0]}_1.jpg", "t1", "blue"), (TEN[0], 0, f"{TEN[0]}_0.jpg", "l0", "red")]
    for wrong, expected in (({TEN[0]: {}}, "field title"), ({TEN[0]: []}, "object"), ({"a/b": item}, "field asin"),
                            ({}, "expected"), ([], "expected"), ({TEN[0]: {**item, "images": ["l0"]}}, "field images"),
                            ({TEN[0]: {**item, "images": "l0"}}, "field images"),
                            ({TEN[0]: {**item, "features": [1]}}, "field features")):
        with pytest.raises(UserError, match=expected):
            data.read_catalogue(catalogue(tmp_path, wrong))
    bad = mug.model_copy(update={"descriptions": {"../x.jpg": "red"}})
    with pytest.raises(UserError, match="field image_name"):
        data.stage1_rows([bad])


def images(root: Path) -> list[str]:
    """Three images: red in train, blue in valid, one cut short; a fourth name has no file."""
    names = [f"{asin}_0.jpg" for asin in TEN[:4]]
    for folder in ("train_images", "valid_images"):
        (root / folder).mkdir()
    Image.new("RGB", (64, 48), "red").save(root / "train_images" / names[0])
    Image.new("L", (64, 48), 90).save(root / "valid_images" / names[1])
    Image.effect_noise((64, 48), 90).save(root / "train_images" / names[2])
    cut = root / "train_images" / names[2]
    cut.write_bytes(cut.read_bytes()[:700])
    return names


def test_images_are_whole_or_none(tmp_path: Path) -> None:
    names = images(tmp_path)
    assert data.image_file(tmp_path, TEN[1]) == tmp_path / "valid_images" / names[1]
    assert data.image_file(tmp_path, TEN[3], k=2) == tmp_path / "train_images" / f"{TEN[3]}_2.jpg"
    opened = [data.open_image(data.image_file(tmp_path, asin)) for asin in TEN[:4]]
    assert [image is None for image in opened] == [False, False, True, True]
    assert opened[0] is not None and opened[1] is not None and opened[1].mode == "RGB" and opened[0].size == (64, 48)
    # negative control: the header of the cut file is fine, so opening without decoding would pass it
    assert Image.open(tmp_path / "train_images" / names[2]).size == (64, 48)
    assert data.image_report(tmp_path, names) == {"present": 2, "missing": 1, "corrupt": 1, "missing_names": [names[3]],
                                                  "corrupt_names": [names[2]]}


def test_image_dataset_and_stage1_valid(tmp_path: Path) -> None:
    names = images(tmp_path)
    raw = [{"title": "t", "image_name": name, "image": "link", "image_description_llava_cleaned": name[:-4]}
           for name in names]
    (tmp_path / "item2meta_valid.jsonl").write_bytes(lines(*raw))
    rows = data.read_stage1_valid(tmp_path)
    assert [(r.asin, r.k, r.link) for r in rows] == [(asin, 0, "link") for asin in TEN[:4]]
    dataset = data.image_dataset(tmp_path, rows)
    assert set(dataset.column_names) == {"asin", "title", "image", "description"} and list(dataset["asin"]) == TEN[:2]
    assert dataset[0]["image"].getpixel((5, 5))[0] > 200 and dataset[1]["image"].mode == "RGB"
    unchecked = data.image_dataset(tmp_path, rows, check=False)  # nothing is decoded until it is read
    assert len(unchecked) == 4
    with pytest.raises(OSError):
        unchecked[2]["image"].load()
    (tmp_path / "item2meta_valid.jsonl").write_bytes(lines({**raw[0], "image_name": "x.png"}))
    with pytest.raises(UserError, match="line 1: field image_name"):
        data.read_stage1_valid(tmp_path)


def test_data_hash_follows_names_and_contents(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        data.data_hash(tmp_path)
    path = write(tmp_path, lines(ROW))
    first = data.data_hash(tmp_path)
    assert len(first) == 12 and first == data.data_hash(str(tmp_path))
    (tmp_path / "notes.txt").write_text("not data")
    assert data.data_hash(tmp_path) == first
    path.rename(path.with_name("valid.jsonl"))
    renamed = data.data_hash(tmp_path)
    write(tmp_path, lines(ROW)[:-2] + b" }\n", "valid")
    assert len({first, renamed, data.data_hash(tmp_path)}) == 3


@real
def test_real_files_are_read_unchanged_in_strict_mode() -> None:
    root = real_data_dir()
    assert root is not None
    for domain, folder in DOMAINS.items():
        for split in ("valid", "test"):
            truth = [json.loads(raw) for raw in (root / folder / f"{split}.jsonl").read_bytes().split(b"\n") if raw]
            rows = data.read_dialogues(root, domain, split)
            assert [[d.context, list(d.gt_items), list(d.candidates_st)] for d in rows] == [
                [row["context"], row["gt_items"], row["candidates_st"]] for row in truth]
            assert all(d.turns[0][0] == "seeker" for d in rows)
    assert len(data.read_stage1_valid(root)) == 512
