"""Reading Reddit-Amazon (or the mini world, same layout): dialogues, catalogue, stage-1 descriptions and images.

Nothing is repaired in silence: a row is read exactly as it stands, or `RowError` (`rows.py`) names file, line and field.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from PIL import Image
from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from lavic_utils.config import DOMAINS, UserError
from lavic_utils.rows import GET_DATA, Row, check_row, load_json, read_bytes, read_rows

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "valid", "test")
FORMATS = ("JPEG", "PNG", "GIF", "WEBP")  # not every reader of Pillow: one starts Ghostscript
TURN = re.compile(r"<(submission|comment)>(.*?)</\1>", re.DOTALL)
TAG = re.compile(r"</?(?:submission|comment)>")
SPEAKERS = {"submission": "seeker", "comment": "helper"}
log = logging.getLogger(__name__)


def _closed(text: str) -> str:
    if TURN.sub("", text).strip() or any(TAG.search(inner) for _, inner in TURN.findall(text)):
        raise ValueError("text outside of a turn, or a turn not closed")
    return text


def _ten(ids: tuple[str, ...]) -> tuple[str, ...]:
    if len(ids) != 10 or len(set(ids)) != 10:
        raise ValueError(
            f"10 different candidates are expected, found {len(set(ids))} different in {len(ids)}"
        )
    return ids


def _texts(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(value, str) else value


def _links(images: Any) -> Any:
    if not isinstance(images or [], list) or not all(isinstance(one, dict) for one in images or ()):
        raise ValueError("a list of objects with the link `large` is expected")
    return tuple(
        next((one[key] for key in ("large", "hi_res", "thumb") if one.get(key)), "")
        for one in images or ()
    )


Id = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9]{1,32}$")
]  # also keeps ids usable as file names
Ids = tuple[Id, ...]
Filled = Annotated[str, StringConstraints(pattern=r"\S")]
ImageName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9]{1,32}_[0-9]{1,6}\.jpg$")
]  # ASIN_k.jpg
Ten = Annotated[Ids, AfterValidator(_ten)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]  # a text, a list of texts or null


class Dialogue(Row):
    """One row of a dialogue file. `line` counts from 1; the ids stand as in the file (`gt_items` may repeat one)."""

    domain: str
    split: str
    line: int
    context: Annotated[Filled, AfterValidator(_closed)]
    context_items: Ids
    gt: Filled
    gt_items: Annotated[Ids, Field(min_length=1)]
    candidates_st: Ten
    candidates_gpt_large: Ten

    @property
    def turns(self) -> list[tuple[str, str]]:
        """(speaker, text) in order: "seeker" wrote the submission, "helper" any comment; edges stripped."""
        return [(SPEAKERS[tag], text.strip()) for tag, text in TURN.findall(self.context)]


class Item(Row):
    """One product. `images[k]` is the link of ASIN_k.jpg ("" where none is given)."""

    asin: Id
    title: str
    categories: Texts = ()
    features: Texts = ()
    description: Texts = ()
    images: Annotated[tuple[str, ...], BeforeValidator(_links)] = ()
    # image file name -> what LLaVA wrote about its looks
    descriptions: Annotated[
        dict[str, str], BeforeValidator(lambda value: {} if value is None else value)
    ] = Field(default={}, alias="image_descriptions_llava_cleaned")


class ValidImage(Row):
    """One image with its description: a stage-1 example. `asin` and `k` are read from `image_name`, ASIN_k.jpg."""

    title: str
    image_name: ImageName
    link: str = Field(alias="image")
    description: str = Field(
        alias="image_description_llava_cleaned"
    )  # "" where no teacher has written yet
    asin = property(lambda self: self.image_name.split("_")[0])
    k = property(lambda self: int(self.image_name[:-4].split("_")[1]))


def dialogue_file(root: Path | str, domain: str, split: str) -> Path:
    """Path of one dialogue file; UserError for a domain or split that does not exist."""
    if domain not in DOMAINS or split not in SPLITS:
        raise UserError(
            f"no dialogues {domain}/{split}; use one of {', '.join(DOMAINS)} and of {', '.join(SPLITS)}"
        )
    return Path(root) / DOMAINS[domain] / f"{split}.jsonl"


def read_dialogues(
    root: Path | str, domain: str, split: str, set_aside: list[dict[str, Any]] | None = None
) -> list[Dialogue]:
    """All dialogues of one split in file order. A list `set_aside` takes the bad rows; without it RowError."""
    return read_rows(
        dialogue_file(root, domain, split), Dialogue, set_aside, domain=domain, split=split
    )


def read_catalogue(root: Path | str) -> dict[str, Item]:
    """Item id -> Item, from item2meta_train.json. Raises UserError naming file, item and field."""
    path = Path(root) / "item2meta_train.json"
    rows = load_json(read_bytes(path), str(path), Item)
    if not isinstance(rows, dict) or not rows:
        raise UserError(f"{path}: an object of items by id is expected; {GET_DATA}")
    return {
        asin: check_row(Item, row, f"{path}, item {asin!a}", asin=asin)
        for asin, row in rows.items()
    }


def read_stage1_valid(root: Path | str) -> list[ValidImage]:
    """The stage-1 validation images, from item2meta_valid.jsonl, in file order."""
    return read_rows(Path(root) / "item2meta_valid.jsonl", ValidImage)


def stage1_rows(items: Iterable[Item]) -> list[ValidImage]:
    """Stage-1 training examples: every description of every item, in the order given."""
    rows = []
    for item in items:
        links = {f"{item.asin}_{k}.jpg": link for k, link in enumerate(item.images)}
        rows += [
            check_row(
                ValidImage,
                {
                    "title": item.title,
                    "image_name": name,
                    "image": links.get(name, ""),
                    "image_description_llava_cleaned": text,
                },
                f"item {item.asin}, {name!a}",
            )
            for name, text in item.descriptions.items()
        ]
    return rows


def _image_path(root: Path | str, name: str) -> Path:
    train, valid = Path(root) / "train_images" / name, Path(root) / "valid_images" / name
    return valid if valid.is_file() and not train.is_file() else train


def image_file(root: Path | str, asin: str, k: int = 0) -> Path:
    """Where image k of an item is: train_images, else valid_images; the train path where neither holds it."""
    return _image_path(root, f"{asin}_{k}.jpg")


def open_image(path: Path | str) -> Image.Image | None:
    """The whole image decoded, RGB; None where the file is missing or corrupt (never a blank stand-in)."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError):
        return None


def image_report(root: Path | str, names: Iterable[str]) -> dict[str, Any]:
    """Decode every image named, once: counts `present`, `missing`, `corrupt`, and `missing_names`, `corrupt_names`."""
    every = list(dict.fromkeys(names))
    missing = [name for name in every if not _image_path(root, name).is_file()]
    corrupt = [
        name
        for name in sorted(set(every) - set(missing))
        if open_image(_image_path(root, name)) is None
    ]
    return {
        "present": len(every) - len(missing) - len(corrupt),
        "missing": len(missing),
        "corrupt": len(corrupt),
        "missing_names": missing,
        "corrupt_names": corrupt,
    }


def _dataset(columns: dict[str, list[Any]], lists: Iterable[str] = ()) -> datasets.Dataset:
    """Columns of texts, `lists` of lists of texts; `line` a number; `image`: paths, decoded to RGB when read."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    text = Value("string")
    kinds = dict.fromkeys(lists, List(text)) | {
        "line": Value("int64"),
        "image": ImageFeature(mode="RGB"),
    }
    return Dataset.from_dict(
        columns, features=Features({name: kinds.get(name, text) for name in columns})
    )


def dialogue_dataset(dialogues: Sequence[Dialogue]) -> datasets.Dataset:
    """One row a dialogue, with the fields of `Dialogue` as columns."""
    return _dataset(
        {name: [getattr(d, name) for d in dialogues] for name in Dialogue.model_fields},
        ("context_items", "gt_items", "candidates_st", "candidates_gpt_large"),
    )


def item_dataset(root: Path | str, items: Iterable[Item]) -> datasets.Dataset:
    """Columns asin, title, categories, features, description, and image: the first, RGB, decoded when read; None where it
    is missing or corrupt."""
    items = list(items)
    names = [f"{item.asin}_0.jpg" for item in items]
    report = image_report(root, names)
    bad = {*report["missing_names"], *report["corrupt_names"]}
    lists = ("categories", "features", "description")
    columns = {name: [getattr(item, name) for item in items] for name in ("asin", "title", *lists)}
    return _dataset(
        {
            **columns,
            "image": [None if name in bad else str(_image_path(root, name)) for name in names],
        },
        lists,
    )


def image_dataset(
    root: Path | str, rows: Sequence[ValidImage], check: bool = True
) -> datasets.Dataset:
    """Columns asin, title, image (RGB, decoded when read), description. `check` leaves out, logged, unreadable ones."""
    report = image_report(root, [row.image_name for row in rows] if check else ())
    if bad := {*report["missing_names"], *report["corrupt_names"]}:
        log.warning(
            "left out: %d missing and %d corrupt images", report["missing"], report["corrupt"]
        )
    kept = [row for row in rows if row.image_name not in bad]
    columns = {
        name: [getattr(row, name) for row in kept] for name in ("asin", "title", "description")
    }
    return _dataset({**columns, "image": [str(_image_path(root, row.image_name)) for row in kept]})


def data_hash(root: Path | str) -> str:
    """12 hex digits of SHA-256 over names and contents of the .json and .jsonl files of a data folder."""
    base = Path(root)
    folders = (base, *(base / name for name in DOMAINS.values()))
    found = [
        path for folder in folders for end in ("json", "jsonl") for path in folder.glob(f"*.{end}")
    ]
    files = {path.relative_to(base).as_posix(): path for path in found}
    if not files:
        raise UserError(f"{base}: no .json or .jsonl file; {GET_DATA}")
    lines = [
        f"{name}\0{hashlib.sha256(read_bytes(files[name])).hexdigest()}\n" for name in sorted(files)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]
