"""Strict reading of JSON rows: a row is read exactly as it stands, or `RowError` names file, line and field."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from lavic_utils.config import UserError

GET_DATA = (
    "get the published files (repository jeon185/LaViC; `python -m lavic_utils data fetch`) and give their folder, "
    "e.g. in LAVIC_DATA"
)


class Row(BaseModel):
    """What is read from a file: values are never converted, fields of other names are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class RowError(UserError):
    """A bad row: `where` (file and line), `field`, `kind` of fault and `problem`; no text of the row but its fields' names."""

    def __init__(self, where: str, field: str, kind: str, problem: str) -> None:
        super().__init__(f"{where}: field {field}: {problem}; correct or download the file again")
        self.field, self.kind, self.problem = field, kind, problem


class _TwiceError(ValueError):
    """A JSON object names a field, the message, twice."""


AnyRow = TypeVar("AnyRow", bound=Row)


def check_row(kind: type[AnyRow], row: Any, where: str, **extra: Any) -> AnyRow:
    """The JSON object `row` as an object of `kind`; RowError naming the place and the first wrong field."""
    if not isinstance(row, dict):
        raise RowError(
            where,
            "(all)",
            "not an object",
            f"a JSON object is expected, found {type(row).__name__}",
        )
    try:
        return kind.model_validate({**row, **extra})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        problem = first["msg"].removeprefix("Value error, ")
        raise RowError(
            where, name, "missing" if first["type"] == "missing" else "bad value", problem
        ) from None


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        zipped = path.with_name(path.name + ".zip")
        todo = f"unzip {zipped.name} there" if zipped.is_file() else GET_DATA
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {todo}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise _TwiceError(max(names, key=names.count))
    return dict(pairs)


def _near(begun: str, kind: type[Row]) -> str:
    """The last field of `kind` that a broken row names before its fault."""
    known = {field.alias or name for name, field in kind.model_fields.items()}
    return next(
        (name for name in reversed(re.findall(r'"(\w+)"\s*:', begun)) if name in known),
        "(before the first)",
    )


def load_json(raw: bytes, where: str, kind: type[Row]) -> Any:
    """The JSON value in `raw`, integers as floats; RowError with the last field of `kind` named before the fault."""
    try:  # no field read is a number: as float, one of thousands of digits is refused where it stands, by its field
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_int=float)
    except UnicodeDecodeError as error:
        field = _near(raw[: error.start].decode("utf-8"), kind)
        raise RowError(
            where, field, "bad UTF-8", f"not valid UTF-8 at byte {error.start + 1}"
        ) from None
    except json.JSONDecodeError as error:
        field = _near(error.doc[: error.pos], kind)
        raise RowError(
            where, field, "bad JSON", f"not valid JSON at character {error.pos + 1} ({error.msg})"
        ) from None
    except _TwiceError as error:
        raise RowError(
            where, ascii(str(error)[:40])[1:-1], "field twice", "it stands twice"
        ) from None
    except RecursionError:
        raise RowError(where, "(all)", "bad JSON", "not valid JSON: nested too deep") from None


def read_rows(
    path: Path, kind: type[AnyRow], set_aside: list[dict[str, Any]] | None = None, **extra: Any
) -> list[AnyRow]:
    """Each line of a JSONL file as `kind` (field `line`: its number from 1). The first bad line raises RowError, or, where
    a list `set_aside` is given, bad lines are left out and described there (`file`, `line`, `field`, `kind`, `problem`).

    Only "\\n" ends a line: texts may hold U+2028, U+0085 and others that `str.splitlines` takes for line ends.
    A duplicate row, equal to an earlier one of the file in every field that `kind` reads, is a bad one: it would count
    twice. A dialogue that comes again with its candidates in another order is none, since the prompt is another one (five
    rows of the published valid and test files), nor is a context with another answer.
    """
    found, seen = [], {}
    names = [name for name in kind.model_fields if name not in ("line", *extra)]
    for line, raw in enumerate(read_bytes(path).removesuffix(b"\n").split(b"\n"), 1):
        where = f"{path}, line {line}"
        try:
            row = check_row(kind, load_json(raw, where, kind), where, **extra, line=line)
            if (
                names
                and (before := seen.setdefault(tuple(getattr(row, name) for name in names), line))
                != line
            ):
                raise RowError(
                    where,
                    ", ".join(names),
                    "duplicate row",
                    f"all as in line {before}, a duplicate row",
                )
            found.append(row)
        except RowError as error:
            if set_aside is None:
                raise
            set_aside.append(
                {
                    "file": f"{path.parent.name}/{path.name}",
                    "line": line,
                    "field": error.field,
                    "kind": error.kind,
                    "problem": error.problem,
                }
            )
    return found


def set_aside_report(bad: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows that `read_rows` set aside, JSON-able: how many, `counts` by file, kind of fault and field, and `found`."""
    counts = Counter((one["file"], one["kind"], one["field"].split(".")[0]) for one in bad)
    named = [
        dict(zip(("file", "kind", "field"), key, strict=True)) | {"rows": rows}
        for key, rows in counts.items()
    ]
    return {"rows": len(bad), "counts": named, "found": list(bad)}
