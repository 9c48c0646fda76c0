"""Reading files: exact or refused, never repaired in silence. Made-up rows; real files only where
LAVIC_DATA is set."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lavic_utils import data
from lavic_utils.config import DOMAINS, UserError, real_data_dir

real = pytest.mark.skipif(real_data_dir() is None, reason=data.GET_DATA)
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
    path = write(tmp_path, lines(ROW, changed(gt="b"), changed(extra=1, gt_items=[TEN[0], TEN[0]])))
    read = data.read_dialogues(tmp_path, "beauty", "test")
    assert [d.line for d in read] == [1, 2, 3] and {(d.domain, d.split) for d in read} == {
        ("beauty", "test")
    }
    assert {
        name: list(v) if isinstance(v := getattr(read[0], name), tuple) else v for name in FIELDS
    } == ROW
    assert read[0].turns == [("seeker", "a red mug?\u2028please"), ("helper", "how\u0085big?")]
    assert read[2].gt_items == (TEN[0], TEN[0])  # a repeated id stays: scoring counts it once
    # negative control: taking every line end of str.splitlines for one tears the rows apart
    assert len(path.read_text(encoding="utf-8").splitlines()) > 3


BAD = {
    "bad JSON": (b'{"context": \n', "JSON"),
    "not UTF-8": (lines(ROW).replace(b"this one", b"this \xff"), "UTF-8"),
    "not an object": (lines([ROW]), "object"),
    "cut short": (lines(ROW)[:-20], "JSON"),
    "a field twice": (lines(ROW).replace(b'"gt":', b'"gt": "x", "gt":'), "field gt"),
    "blank line": (lines(ROW).replace(b"{", b"\n{", 1), "line 1"),
    "deep": (b"[" * 100_000 + b"\n", "JSON"),
    "huge number": (lines(changed(gt=0)).replace(b'"gt": 0', b'"gt": ' + b"1" * 5000), "field gt"),
    "NaN": (lines(changed(gt_items=[float("nan")])), "field gt_items.0"),
    "half a surrogate pair": (json.dumps(changed(gt="\ud800")).encode(), "field gt"),
    "no candidates": (
        lines({k: v for k, v in ROW.items() if k != "candidates_st"}),
        "field candidates_st",
    ),
    "nine candidates": (lines(changed(candidates_st=TEN[:9])), "field candidates_st"),
    "a candidate twice": (
        lines(changed(candidates_gpt_large=TEN[:9] + TEN[:1])),
        "field candidates_gpt_large",
    ),
    "a path as id": (
        lines(changed(candidates_st=[*TEN[:9], "../../etc"])),
        "field candidates_st.9",
    ),
    "ids as text": (lines(changed(gt_items=TEN[0])), "field gt_items"),
    "a number as id": (lines(changed(gt_items=[123456789])), "field gt_items.0"),
    "null": (lines(changed(context=None)), "field context"),
    "no ground truth": (lines(changed(gt_items=[])), "field gt_items"),
    "blank answer": (lines(changed(gt=" ")), "field gt"),
    "unclosed turn": (lines(changed(context="<submission>a mug?")), "field context"),
    "turn in a turn": (
        lines(changed(context="<submission>a<comment>b</submission>")),
        "field context",
    ),
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
    assert (
        str(path) in text and "line 1" in text and expected in text and len(text.splitlines()) == 1
    )


def test_a_duplicate_is_a_row_that_says_nothing_new(tmp_path: Path) -> None:
    other = [changed(gt="b"), changed(gt_items=TEN[:1]), changed(candidates_st=TEN[::-1])]
    write(
        tmp_path, lines(ROW, *other)
    )  # the same context with another answer, or other candidates, is no duplicate
    assert len(data.read_dialogues(tmp_path, "beauty", "test")) == 4
    write(
        tmp_path, lines(ROW, *other, changed(price=3))
    )  # a field that is not read makes no difference
    with pytest.raises(
        UserError,
        match="line 5: field context, .*candidates_gpt_large: all as in line 1, a duplicate row",
    ):
        data.read_dialogues(tmp_path, "beauty", "test")


def test_wrong_places_are_named(tmp_path: Path) -> None:
    for domain, split, expected in (
        ("toys", "test", "beauty"),
        ("home", "dev", "valid"),
        ("home", "test", "jeon185"),
    ):
        with pytest.raises(UserError, match=expected):
            data.read_dialogues(tmp_path, domain, split)
    (tmp_path / "item2meta_train.json.zip").write_bytes(b"")
    with pytest.raises(UserError, match="unzip item2meta_train.json.zip"):
        data.read_catalogue(tmp_path)


NOT_TEXT = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.lists(st.text(max_size=4), max_size=2)
)
NOT_IDS = (
    st.none()
    | st.integers()
    | st.text(max_size=9)
    | st.just({})
    | st.lists(st.none() | st.integers(), min_size=1)
)
JSON_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(TEN),
    lambda inner: (
        st.lists(inner, max_size=12) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=12,
)
ANY, READ, TEXTS = (
    "any",
    "read",
    ("context", "gt"),
)  # ANY: read exactly or refused; READ: must be read
LISTS = ("candidates_st", "candidates_gpt_large")


def dumped(row: object) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def fault(draw: st.DrawFn, how: str, row: dict[str, object]) -> tuple[bytes, str]:
    """A line with a fault, and the field its error must name."""
    name = draw(st.sampled_from(FIELDS))
    at = dumped(row).index(b'"%s": ' % name.encode()) + len(name) + 4
    if how == "drop":
        return dumped({k: v for k, v in row.items() if k != name}), name
    if how == "mistype":
        return dumped({**row, name: draw(NOT_TEXT if name in TEXTS else NOT_IDS)}), name
    if how == "count":
        name = draw(st.sampled_from(LISTS))
        return dumped(
            {
                **row,
                name: draw(st.sampled_from(([], TEN[:9], [*TEN, "B0ELEVEN11"], TEN[:9] + TEN[:1]))),
            }
        ), name
    if how == "no truth":
        return dumped({**row, "gt_items": []}), "gt_items"
    if how == "bad id":
        name = draw(st.sampled_from((*LISTS, "gt_items", "context_items")))
        bad = draw(
            st.text(max_size=40).filter(lambda text: not re.fullmatch(r"[A-Za-z0-9]{1,32}", text))
        )
        return dumped({**row, name: [*TEN[:9], bad]}), name
    if how == "turns":
        text = draw(
            st.sampled_from(
                (
                    "a",
                    "<submission>a",
                    "a</comment>",
                    "<submission>a</comment>",
                    "<comment>a</comment>b",
                    "<submission><comment>a</comment></submission>",
                    "<comment>a</comment><comment>",
                )
            )
        )
        return dumped({**row, "context": text}), "context"
    if how == "UTF-8":
        return dumped(row)[:at] + draw(
            st.sampled_from((b"\xff", b"\xc3", b"\xe2\x80", b"\xed\xa0\x80"))
        ) + dumped(row)[at:], name
    if how == "JSON":
        rest = draw(st.sampled_from((b"", dumped(row)[at:])))
        return dumped(row)[:at] + draw(st.sampled_from((b"'", b",", b"}", b"tru"))) + rest, name
    if how == "twice":
        return b'{"%s": null, ' % name.encode() + dumped(row)[1:], name
    value = rb'("%s": )("[^"]*"|\[[^]]*\])' % name.encode()
    return re.sub(
        value, rb"\g<1>" + how.encode(), dumped(row), count=1
    ), name  # a number: NaN, -Infinity, one too long


def anything(draw: st.DrawFn, row: dict[str, object]) -> bytes:
    """A line with a value, an entry or a name changed for anything, and then perhaps some bytes."""
    name = draw(st.sampled_from(FIELDS))
    if (how := draw(st.sampled_from(("value", "entry", "name", "letters")))) == "name":
        row[draw(st.text(max_size=5))] = row.pop(name)
    elif how == "value":
        row[name] = draw(JSON_VALUE)
    elif isinstance(value := row[name], list) and value:
        at = draw(st.integers(0, len(value) - 1))
        value[at : at + draw(st.integers(0, 2))] = draw(
            st.lists(JSON_VALUE | st.sampled_from(TEN), max_size=2)
        )
    elif isinstance(value, str):
        row[name] = value.replace("e", draw(st.text(max_size=4)), 1)
    content = dumped(row)
    if draw(st.integers(0, 2)) == 0:
        at = draw(st.integers(0, len(content)))
        content = (
            content[:at] + draw(st.binary(max_size=5)) + content[at + draw(st.integers(0, 8)) :]
        )
    return content


PLAIN = {dumped({**ROW, "gt": f"number {number}"}) for number in range(6)}
FAULTS = (
    "drop",
    "mistype",
    "count",
    "no truth",
    "bad id",
    "turns",
    "UTF-8",
    "JSON",
    "twice",
    "NaN",
    "-Infinity",
    "1" * 5000,
)


@st.composite
def mutated(draw: st.DrawFn) -> list[tuple[bytes, str]]:
    """Six lines, each with what must become of it: READ, ANY, or the field its error must name."""
    made: list[tuple[bytes, str]] = []
    for number in range(6):
        row = copy.deepcopy({**ROW, "gt": f"number {number}"})
        how = draw(st.sampled_from((*FAULTS, *("anything", "ends", "again") * 3)))
        if how == "anything":
            made += [(part, ANY) for part in anything(draw, row).split(b"\n")]
        elif how == "ends":  # what looks like the end of a line to others stays in the text
            text = "".join(
                draw(
                    st.lists(
                        st.sampled_from("a\u2028\u2029\u0085\r\x0b\x0c\x1c\0\ufeff"), max_size=9
                    )
                )
            )
            row |= {
                "gt": f" {number} {text}",
                "context": f"\n <comment>{text}</comment>\u2028",
                "price": draw(JSON_VALUE),
            }
            made.append((json.dumps(row, ensure_ascii=draw(st.booleans())).encode(), READ))
        elif how == "again":
            made += [
                (dumped(row), READ),
                (b" " + dumped(dict(reversed(row.items()))), "context, context_items, gt"),
            ]
        else:
            made.append(fault(draw, how, row))
    return made


def test_mutated_rows_are_exact_or_refused() -> None:
    seen = {"mutated": 0, "read": 0, "refused": 0}

    @settings(
        max_examples=500,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutated(), st.booleans())
    def check(made: list[tuple[bytes, str]], ended: bool) -> None:
        left, refused = list(enumerate(made, 1)), {}
        while True:  # reading stops at the first bad line: each is named, then taken out
            with tempfile.TemporaryDirectory() as folder:
                path = write(Path(folder), b"\n".join(raw for _, (raw, _) in left) + b"\n" * ended)
                try:
                    found = data.read_dialogues(folder, "beauty", "test") if left else []
                    break
                except UserError as error:
                    said = str(error).removeprefix(f"{path}, line ")
                    number, field = re.match(r"(\d+): field (.+?): .+$", said).groups()
                    line, _ = left.pop(int(number) - 1)
                    refused[line] = field
        rows = {left[d.line - 1][0]: d for d in found}
        assert sorted([*rows, *refused]) == list(
            range(1, len(made) + 1 - (not ended and not made[-1][0]))
        )
        for line, (raw, expected) in enumerate(made, 1):
            if line in rows:
                assert expected in (READ, ANY), raw
                assert {
                    k: list(v) if isinstance(v := getattr(rows[line], k), tuple) else v
                    for k in FIELDS
                } == {k: json.loads(raw)[k] for k in FIELDS}
            elif line in refused:
                named = expected == ANY or refused[line].startswith(expected)
                assert expected != READ and named, refused[line]
        for name, some in (
            ("mutated", [raw for raw, _ in made if raw not in PLAIN]),
            ("read", rows),
            ("refused", refused),
        ):
            seen[name] += len(some)

    check()
    assert seen["mutated"] >= 2000 and min(seen.values()) >= 500, (
        seen
    )  # else it looked at one side only


def catalogue(root: Path, items: object) -> Path:
    (root / "item2meta_train.json").write_text(json.dumps(items), encoding="utf-8")
    return root


def test_catalogue_and_stage1_rows(tmp_path: Path) -> None:
    item = {
        "title": "mug",
        "categories": ["home"],
        "features": None,
        "description": "one text",
        "images": [{"large": "l0"}, {"large": None, "thumb": "t1"}, {}],
        "price": 3,
        "image_descriptions_llava_cleaned": {f"{TEN[0]}_1.jpg": "blue", f"{TEN[0]}_0.jpg": "red"},
    }
    found = data.read_catalogue(catalogue(tmp_path, {TEN[0]: item, TEN[1]: {"title": ""}}))
    mug = found[TEN[0]]
    assert (mug.asin, mug.title, mug.features, mug.description) == (
        TEN[0],
        "mug",
        (),
        ("one text",),
    )
    assert mug.images == ("l0", "t1", "") and found[TEN[1]].descriptions == {}
    rows = data.stage1_rows(found.values())
    assert [(r.asin, r.k, r.image_name, r.link, r.description) for r in rows] == [
        (TEN[0], 1, f"{TEN[0]}_1.jpg", "t1", "blue"),
        (TEN[0], 0, f"{TEN[0]}_0.jpg", "l0", "red"),
    ]
    for wrong, expected in (
        ({TEN[0]: {}}, "field title"),
        ({TEN[0]: []}, "object"),
        ({"a/b": item}, "field asin"),
        ({}, "expected"),
        ([], "expected"),
        ({TEN[0]: {**item, "images": ["l0"]}}, "field images"),
        ({TEN[0]: {**item, "images": "l0"}}, "field images"),
        ({TEN[0]: {**item, "features": [1]}}, "field features"),
        ({TEN[0]: {**item, "features": ["half a pair \ud800"]}}, "field features"),
        ({TEN[0]: {**item, "title": "half a pair \ud800"}}, "field title"),
    ):
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
    assert (
        opened[0] is not None
        and opened[1] is not None
        and opened[1].mode == "RGB"
        and opened[0].size == (64, 48)
    )
    # negative control: the header of the cut file is fine, opening without decoding would pass it
    assert Image.open(tmp_path / "train_images" / names[2]).size == (64, 48)


def test_pictures_are_what_a_shop_shows(tmp_path: Path) -> None:
    cutout = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    cutout.paste((220, 30, 30, 255), (16, 16, 48, 48))
    palette = cutout.quantize(8)
    ramp = Image.frombytes(
        "I;16", (64, 64), b"".join(bytes([0, x * 4]) * 1 for x in range(64)) * 64
    )
    clear = Image.fromarray(np.arange(0, 2**16, 16, dtype=np.uint16).reshape(64, 64))
    clear.save(tmp_path / "clear.jpg", "PNG", transparency=0)
    kinds = {"rgba": cutout, "la": cutout.convert("LA"), "palette": palette, "ramp": ramp}
    for name, image in kinds.items():
        image.save(tmp_path / f"{name}.jpg", "PNG")
    cutout.save(tmp_path / "webp.jpg", "WEBP", lossless=True)
    cutout.convert("RGB").convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.new("P", (1, 1)).save(tmp_path / "pixel.jpg", "GIF")
    opened = {path.stem: data.open_image(path) for path in tmp_path.glob("*.jpg")}
    assert opened.pop("pixel") is None  # a shop's placeholder is no picture
    assert [
        data.is_placeholder(tmp_path / f"{name}.jpg") for name in ("pixel", "ramp", "none")
    ] == [
        True,
        False,
        False,
    ]
    column = np.asarray(opened["clear"])[..., 0].ravel().tolist()
    assert column[0] == 255 and column[1:] == sorted(column[1:]) and len(set(column)) == 256
    greys = [opened["ramp"].getpixel((x, 0)) for x in range(64)]
    assert greys == sorted(greys) and len(set(greys)) == 64  # the order of greys is kept
    for name in ("rgba", "la", "palette", "webp"):
        assert opened[name].getpixel((0, 0)) == (255, 255, 255), name
    for name in ("rgba", "palette", "webp", "cmyk"):
        assert np.allclose(opened[name].getpixel((32, 32)), (220, 30, 30), atol=3), name
    assert opened["cmyk"].getpixel((0, 0)) == (0, 0, 0)  # negative control: black that is black


def test_stage1_validation_images_are_read_and_their_names_checked(tmp_path: Path) -> None:
    raw = [
        {
            "title": "t",
            "image_name": f"{asin}_0.jpg",
            "image": "link",
            "image_description_llava_cleaned": asin,
        }
        for asin in TEN[:4]
    ]
    (tmp_path / "item2meta_valid.jsonl").write_bytes(lines(*raw))
    rows = data.read_stage1_valid(tmp_path)
    assert [(r.asin, r.k, r.link, r.description) for r in rows] == [
        (asin, 0, "link", asin) for asin in TEN[:4]
    ]
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
            truth = [
                json.loads(raw)
                for raw in (root / folder / f"{split}.jsonl").read_bytes().split(b"\n")
                if raw
            ]
            rows = data.read_dialogues(root, domain, split)
            assert [
                {k: list(v) if isinstance(v := getattr(d, k), tuple) else v for k in FIELDS}
                for d in rows
            ] == truth
            assert all(d.turns[0][0] == "seeker" for d in rows)
    assert len(data.read_stage1_valid(root)) == 512
