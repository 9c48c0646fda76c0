"""Reading Reddit-Amazon, or the mini world in the same layout: dialogues, catalogue, images.

Nothing is repaired in silence: a row is read as it stands, or `RowError` names file, line, field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from PIL import Image
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic import StringConstraints as Text

from lavic_utils.config import DOMAINS, Profile, UserError, real_data_dir
from lavic_utils.provenance import file_hash, key, world_dir

SPLITS = ("train", "valid", "test")
FORMATS = ("JPEG", "PNG", "GIF", "WEBP")  # not every reader of Pillow: one starts Ghostscript
MIN_SIDE = 16  # pixels
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError)
TURN = re.compile(r"<(submission|comment)>(.*?)</\1>", re.DOTALL)
TAG = re.compile(r"</?(?:submission|comment)>")
SPEAKERS = {"submission": "seeker", "comment": "helper"}  # who wrote a turn of this tag
GET_DATA = "get jeon185/LaViC's files (`python -m lavic_utils data fetch`) and set LAVIC_DATA"


# ------------------------------------------------------------------- strict reading of JSON rows
class Row(BaseModel):
    """What is read from a file: values are never converted, fields of other names are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


AnyRow = TypeVar("AnyRow", bound=Row)


class RowError(UserError):
    """A bad row: `where` (file and line), `field`, `problem`; no text of it."""

    def __init__(self, where: str, field: str, problem: str) -> None:
        super().__init__(f"{where}: field {field}: {problem}; correct or download the file again")


def check_row(kind: type[AnyRow], row: Any, where: str, **extra: Any) -> AnyRow:
    """The JSON object `row` as a `kind`; RowError names the place and the first wrong field."""
    if not isinstance(row, dict):
        raise RowError(where, "(all)", "a JSON object is expected")
    try:
        return kind.model_validate({**row, **extra})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "(all)"
        raise RowError(where, field, first["msg"].removeprefix("Value error, ")) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise KeyError(max(names, key=names.count))
    return dict(pairs)


def _load_json(raw: bytes, where: str, kind: type[Row]) -> Any:
    """The JSON value in `raw`; RowError with the last field of `kind` named before the fault."""
    try:
        # No field is a number: as a float, one of thousands of digits is refused by its field.
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_int=float)
    except UnicodeDecodeError as error:
        problem = f"not valid UTF-8 at byte {error.start + 1}"
        begun = raw[: error.start].decode("utf-8")
    except json.JSONDecodeError as error:
        problem = f"not valid JSON at character {error.pos + 1} ({error.msg})"
        begun = error.doc[: error.pos]
    except KeyError as twice:
        name = ascii(twice.args[0][:40])[1:-1]
        raise RowError(where, name, "it stands twice") from None
    except RecursionError:
        raise RowError(where, "(all)", "not valid JSON: nested too deep") from None
    known = {field.alias or name for name, field in kind.model_fields.items()}
    named = [name for name in re.findall(r'"(\w+)"\s*:', begun) if name in known]
    raise RowError(where, named[-1] if named else "(before the first)", problem)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        zipped = path.with_name(path.name + ".zip")
        todo = f"unzip {zipped.name} there" if zipped.is_file() else GET_DATA
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {todo}") from None


def read_rows(path: Path, kind: type[AnyRow], **extra: Any) -> list[AnyRow]:
    """Each line of a JSONL file as a `kind` (field `line`: its number from 1). The first bad line
    raises RowError.

    Only "\\n" ends a line: texts may hold U+2028 and others that `str.splitlines` takes for line
    ends. A row equal to an earlier one in all that `kind` reads is a bad one: it would count twice.
    """
    names = [name for name in kind.model_fields if name not in ("line", *extra)]
    found: list[AnyRow] = []
    first_line: dict[tuple, int] = {}  # values of a row -> the line where they stood first
    for line, raw in enumerate(_read_bytes(path).removesuffix(b"\n").split(b"\n"), 1):
        where = f"{path}, line {line}"
        row = check_row(kind, _load_json(raw, where, kind), where, **extra, line=line)
        before = first_line.setdefault(tuple(getattr(row, name) for name in names), line)
        if names and before != line:
            raise RowError(where, ", ".join(names), f"all as in line {before}, a duplicate row")
        found.append(row)
    return found


# ------------------------------------------------------------------------ the fields of the files
def _closed(text: str) -> str:
    if TURN.sub("", text).strip() or any(TAG.search(inner) for _, inner in TURN.findall(text)):
        raise ValueError("text outside of a turn, or a turn not closed")
    return text


def _ten(ids: tuple[str, ...]) -> tuple[str, ...]:
    if not len(set(ids)) == len(ids) == 10:
        found = f"{len(set(ids))} different in {len(ids)}"
        raise ValueError(f"10 different candidates are expected, found {found}")
    return ids


def _texts(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(value, str) else value


def _links(images: Any) -> Any:
    images = images or []
    if not isinstance(images, list) or not all(isinstance(one, dict) for one in images):
        raise ValueError("a list of objects with the link `large` is expected")
    return tuple(one.get("large") or one.get("hi_res") or one.get("thumb") or "" for one in images)


Id = Annotated[str, Text(pattern=r"^[A-Za-z0-9]{1,32}$")]  # so that an id can name a file, too
Ids = tuple[Id, ...]
Filled = Annotated[str, Text(pattern=r"\S")]
ImageName = Annotated[str, Text(pattern=r"^[A-Za-z0-9]{1,32}_[0-9]{1,6}\.jpg$")]  # ASIN_k.jpg
Ten = Annotated[Ids, AfterValidator(_ten)]
Plain = Annotated[str, Text(pattern="")]  # looked at, so that half a surrogate pair is refused
Texts = Annotated[tuple[Plain, ...], BeforeValidator(_texts)]  # a text, a list of texts or null
Links = Annotated[tuple[str, ...], BeforeValidator(_links)]
ByImage = Annotated[dict[str, Plain], BeforeValidator(lambda one: {} if one is None else one)]


class Dialogue(Row):
    """One row of a dialogue file. `line` counts from 1; ids stand as in the file (some twice)."""

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
        """(speaker, text), edges stripped: "seeker" wrote the submission, "helper" any comment."""
        return [(SPEAKERS[tag], text.strip()) for tag, text in TURN.findall(self.context)]


class Item(Row):
    """One product. `images[k]`: the link of ASIN_k.jpg ("" where there is none); `descriptions`:
    what LLaVA wrote about the looks of an image, by file name."""

    asin: Id
    title: Plain
    categories: Texts = ()
    features: Texts = ()
    description: Texts = ()
    images: Links = ()
    descriptions: ByImage = Field(default={}, alias="image_descriptions_llava_cleaned")


class ValidImage(Row):
    """An image with its description ("" where no teacher has written yet): a stage-1 example."""

    title: Plain
    image_name: ImageName
    link: str = Field(alias="image")
    description: Plain = Field(alias="image_description_llava_cleaned")
    asin = property(lambda self: self.image_name.split("_")[0])
    k = property(lambda self: int(self.image_name[:-4].split("_")[1]))


# -------------------------------------------------------------------------------------- the files
def dialogue_file(root: Path | str, domain: str, split: str) -> Path:
    """Path of one dialogue file; UserError for a domain or split that does not exist."""
    if domain not in DOMAINS or split not in SPLITS:
        known = f"{', '.join(DOMAINS)} and of {', '.join(SPLITS)}"
        raise UserError(f"no dialogues {domain}/{split}; use one of {known}")
    return Path(root) / DOMAINS[domain] / f"{split}.jsonl"


def read_dialogues(root: Path | str, domain: str, split: str) -> list[Dialogue]:
    """All dialogues of a split in file order; RowError as in `read_rows`."""
    return read_rows(dialogue_file(root, domain, split), Dialogue, domain=domain, split=split)


def read_catalogue(root: Path | str) -> dict[str, Item]:
    """Item id -> Item, from item2meta_train.json. Raises UserError naming file, item and field."""
    path = Path(root) / "item2meta_train.json"
    rows = _load_json(_read_bytes(path), str(path), Item)
    if not isinstance(rows, dict) or not rows:
        raise UserError(f"{path}: an object of items by id is expected; {GET_DATA}")
    return {a: check_row(Item, row, f"{path}, item {a!a}", asin=a) for a, row in rows.items()}


def read_stage1_valid(root: Path | str) -> list[ValidImage]:
    """The stage-1 validation images, of item2meta_valid.jsonl, in file order."""
    return read_rows(Path(root) / "item2meta_valid.jsonl", ValidImage)


def stage1_rows(items: Iterable[Item]) -> list[ValidImage]:
    """Stage-1 training examples: every description of every item, in the order given."""
    rows = []
    for item in items:
        links = {f"{item.asin}_{k}.jpg": link for k, link in enumerate(item.images)}
        for name, text in item.descriptions.items():
            row = {"title": item.title, "image_name": name, "link": links.get(name, "")}
            where = f"item {item.asin}, {name!a}"
            rows.append(check_row(ValidImage, {**row, "description": text}, where))
    return rows


def image_file(root: Path | str, asin: str, k: int = 0) -> Path:
    """Where image k of an item is: train_images, else valid_images; the first where neither is."""
    name = f"{asin}_{k}.jpg"
    train, valid = Path(root) / "train_images" / name, Path(root) / "valid_images" / name
    return valid if valid.is_file() and not train.is_file() else train


def as_rgb(image: Image.Image) -> Image.Image:
    """The image decoded, in RGB: what is transparent becomes white, 16 bits of grey become 8."""
    if image.mode.startswith("I"):
        grey = np.asarray(image.convert("I"))
        grey = np.where(grey == image.info.get("transparency", -1), 2**16 - 1, grey) // 256
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def open_image(path: Path | str) -> Image.Image | None:
    """The whole image as `as_rgb` has it; None (never a stand-in) where it is missing, corrupt, or
    a shop's placeholder with a side under MIN_SIDE pixels."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return as_rgb(image) if min(image.size) >= MIN_SIDE else None
    except BROKEN:
        return None


def is_placeholder(path: Path | str) -> bool:
    """Has the image a side under MIN_SIDE pixels, as what shops show in place of a picture?"""
    with suppress(*BROKEN), Image.open(path, formats=FORMATS) as image:
        return min(image.size) < MIN_SIDE
    return False


def data_hash(root: Path | str) -> str:
    """12 hex digits over names and contents of a data folder's .json and .jsonl files."""
    folders = [Path(root, name) for name in ("", *DOMAINS.values())]
    files = [path for folder in folders for path in folder.glob("*.json*")]
    files = [path for path in files if path.suffix in (".json", ".jsonl")]
    if not files:
        raise UserError(f"{root}: no .json or .jsonl file; {GET_DATA}")
    return key(files={path.relative_to(root).as_posix(): file_hash(path) for path in files})[:12]


def profile_data_hash(profile: Profile, seed: int) -> str:
    """`data_hash` of the data of a profile's seed; 'none' while their folder does not exist."""
    root = world_dir(profile, seed) if profile.world else real_data_dir()
    return data_hash(root) if root is not None and root.is_dir() else "none"
