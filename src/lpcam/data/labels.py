"""Tables of image-level labels, as people write them: three forms of one table.

::

    labels.csv                 multi_hot.csv              labels.jsonl
    image,labels               image,cow,dog              {"image": "a.jpg", "labels": ["cow"]}
    a.jpg,cow                  a.jpg,1,0                  {"image": "b.jpg", "labels": []}
    b.jpg,                     b.jpg,0,0
    c.jpg,cow;dog              c.jpg,1,1

Names get Unicode form NFC, without blanks at their ends; in image names backslashes become slashes.
"""

from __future__ import annotations

import csv
import io
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ValidationError

from lpcam.data.dataset import safe_id
from lpcam.runtime.errors import DataError

TABLES = ("labels.csv", "labels.jsonl")
"""File names of a folder's own table; the first that exists is read."""
_TRUE_FALSE = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


class LabelRow(NamedTuple):
    """A line of a table: its number from 1, the image as it is named there, its class names."""

    line: int
    image: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class LabelTable:
    """The contents of a table of labels; an image may occur in several rows."""

    path: Path
    rows: tuple[LabelRow, ...]
    classes: tuple[str, ...] | None = None
    """The columns of a multi-hot table, in order; None where only the rows name classes."""


class _Entry(BaseModel):
    image: str
    labels: list[str]


def read_labels(path: Path) -> LabelTable:
    """Read a table of labels in one of the forms above; an empty cell shows none of the classes.

    A multi-hot table begins with ``image`` or ``filename``; its cells are 0 or 1 (``1.0`` and
    ``true`` count as 1). Further keys of ``.jsonl`` are ignored.

    Raises:
        DataError: naming the file and line, if the table is missing, not UTF-8, of another form or
            names no image, or an image's name could leave its folder.

    Example:
        >>> path = getfixture("tmp_path") / "labels.csv"
        >>> _ = path.write_text("image,cow,dog\\na.jpg,1,0\\n")
        >>> read_labels(path).rows
        (LabelRow(line=2, image='a.jpg', labels=('cow',)),)
    """
    how, suffix = how_to_write(path), path.suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise DataError(f"{path} is not a table of labels; give a .csv or a .jsonl file. {how}")
    text = read_text(path, how)
    table = _read_csv(path, text, how) if suffix == ".csv" else _read_jsonl(path, text, how)
    if not table.rows:
        raise DataError(f"{path} names no image; {how}")
    return table


def how_to_write(path: Path) -> str:
    """Error text that describes the form of a table of labels, by its extension."""
    if path.suffix.lower() == ".jsonl":
        return (
            f"{path.name} must be UTF-8 text with one JSON object a line, for example: "
            '{"image": "cow_1.jpg", "labels": ["cow", "grass"]}'
        )
    return (
        f"{path.name} must be UTF-8 text whose first line is 'image,labels' and then has one line "
        "an image, several labels separated by ';', for example: cow_1.jpg,cow;grass"
    )


def normal_name(text: str) -> str:
    """A name without blanks at its ends, in Unicode form NFC."""
    return unicodedata.normalize("NFC", text.strip())


def relative_name(text: str) -> str:
    """A path with forward slashes and without a leading ``./``."""
    return text.replace("\\", "/").removeprefix("./")


def image_name(text: str, where: str) -> str:
    """The name of an image in a table or list as an id; DataError begins with ``where`` it is."""
    try:
        return safe_id(relative_name(normal_name(text)))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def read_text(path: Path, how: str) -> str:
    """A UTF-8 file as text, without a byte order mark; a DataError ends with the advice ``how``."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; save it as UTF-8. {how}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. {how}") from error


def read_names(path: Path) -> tuple[str, ...]:
    """The class names of a file, one per line; DataError if it cannot be read."""
    lines = read_text(path, "Write one class name per line.").splitlines()
    return tuple(normal_name(line) for line in lines if line.strip())


def read_lines(path: Path) -> list[tuple[str, str]]:
    """The image names of a list, one per line, each after its file and line for errors."""
    lines = enumerate(read_text(path, "Write one image per line.").splitlines(), start=1)
    numbered = [(f"{path} line {number}", line) for number, line in lines if line.strip()]
    return [(where, image_name(line, where)) for where, line in numbered]


def _read_csv(path: Path, text: str, how: str) -> LabelTable:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[LabelRow] = []
    classes: tuple[str, ...] | None = None
    width = 0
    try:
        for cells in reader:
            where = f"{path} line {reader.line_num}"
            if not width:
                width = len(cells)
                classes = _columns(cells, where, how)
            elif any(cell.strip() for cell in cells):
                if len(cells) != width:
                    raise DataError(f"{where} has {len(cells)} columns, expected {width}; {how}")
                if classes is None:
                    labels = tuple(filter(None, map(normal_name, cells[1].split(";"))))
                else:
                    labels = _hot(cells[1:], classes, where, how)
                rows.append(LabelRow(reader.line_num, image_name(cells[0], where), labels))
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}; {how}") from error
    return LabelTable(path, tuple(rows), classes)


def _columns(cells: list[str], where: str, how: str) -> tuple[str, ...] | None:
    """The classes of a multi-hot header; None for ``image,labels``."""
    names = [normal_name(cell) for cell in cells]
    folded = [name.casefold() for name in names]
    if folded == ["image", "labels"]:
        return None
    if len(cells) < 2 or folded[0] not in ("image", "filename") or "labels" in folded:
        raise DataError(f"{where} is {','.join(cells)!r}; {how}")
    repeated = sorted({name for name in names[1:] if names[1:].count(name) > 1})
    if "" in names or repeated:
        raise DataError(
            f"{where}: a column has no name, or repeats ({', '.join(repeated)}); a table of 0 and "
            "1 has one column a class"
        )
    return tuple(names[1:])


def _hot(cells: list[str], classes: tuple[str, ...], where: str, how: str) -> tuple[str, ...]:
    """The classes whose cells are 1."""
    values = [_TRUE_FALSE.get(cell.strip().casefold()) for cell in cells]
    if None in values:
        column = values.index(None)
        raise DataError(
            f"{where} has {cells[column].strip()!r} in the column {classes[column]!r}, expected 0 "
            "or 1; if the column holds names of classes, call it 'labels'; otherwise "
            f"{how}"
        )
    return tuple(name for name, value in zip(classes, values, strict=True) if value)


def _read_jsonl(path: Path, text: str, how: str) -> LabelTable:
    rows = []
    # not splitlines: JSON text may contain other line ends, such as U+2028
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            entry = _Entry.model_validate_json(line)
        except ValidationError as error:
            raise DataError(
                f"{where} is not JSON with a text 'image' and a list of texts 'labels' "
                f"({error.errors()[0]['msg']}): {line.strip()[:120]!r}; {how}"
            ) from error
        names = tuple(filter(None, map(normal_name, entry.labels)))
        rows.append(LabelRow(number, image_name(entry.image, where), names))
    return LabelTable(path, tuple(rows))
