"""Tables of image-level labels, as people write them: three forms of one table.

::

    labels.csv                 multi_hot.csv              labels.jsonl
    image,labels               image,cow,dog              {"image": "a.jpg", "labels": ["cow"]}
    a.jpg,cow                  a.jpg,1,0                  {"image": "b.jpg", "labels": []}
    b.jpg,                     b.jpg,0,0
    c.jpg,cow;dog              c.jpg,1,1

A name that may be several (`split_labels`) is refused unless a separator says what it is.
"""

from __future__ import annotations

import ast
import codecs
import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from lpcam.data.dataset import safe_id, shows_nothing, without_suffix
from lpcam.runtime.errors import DataError, shortened

TABLES = ("labels.csv", "labels.jsonl")
"""File names of a folder's own table; the first that exists is read."""
HOW = (
    "a table of labels is UTF-8 text whose first line is 'image,labels' and then has one line an "
    "image, several labels separated by ';' (cow_1.jpg,cow;grass), or, as .jsonl, one JSON object "
    'a line: {"image": "cow_1.jpg", "labels": ["cow", "grass"]}'
)
"""What such tables look like, for errors."""
_IMAGE = re.compile("(image|img)s?(id|name|path|file|index)?|files?(name|path)?|path|id")
_LABELS = re.compile("(finding)?labels?|class(es)?|(class|label)name|categor(y|ies)|(tag|target)s?")
"""Names of the columns of images and of labels, without case, blanks, ``_`` and ``-``."""
_SEVERAL = re.compile(r"[,|/&\x00-\x1f，、；｜／＆]|^[\[({'\"].*[\])}'\"]$", re.DOTALL)
_JOINED = re.compile(r"[\W_]*\band\b[\W_]*|[\W_]+")
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

    @property
    def places(self) -> dict[str, str]:
        """The file and line where each label is first found."""
        found = dict.fromkeys(self.classes or (), str(self.path))
        for row in self.rows:
            where = f"{self.path} {f'line {row.line}' if row.line else row.image}"
            found |= {name: where for name in row.labels if name not in found}
        return found


class _Entry(BaseModel):
    image: str
    labels: list[str]


Split = Callable[[str, str], tuple[str, ...]]
"""Gives the labels in a text; the second argument is where it is, for errors."""


def read_labels(path: Path, split: Split | None = None) -> LabelTable:
    """Read a table of labels in one of the forms above; an empty cell shows none of the classes.

    The first column may also be called ``filename``, ``path``, ``image_id`` ..., that of the labels
    ``label``, ``class`` ...; columns may be separated by ``;`` or tabs. The cells of a multi-hot
    table are 0 or 1 (``1.0`` and ``true`` count as 1). Further keys of ``.jsonl`` are ignored.

    Args:
        split: `split_labels` with other values than its usual ones, for cells and columns.

    Raises:
        DataError: naming the file and line, if the table is not one or a label is doubtful.

    Example:
        >>> path = getfixture("tmp_path") / "labels.csv"
        >>> _ = path.write_text("image,cow,dog\\na.jpg,1,0\\n")
        >>> read_labels(path).rows
        (LabelRow(line=2, image='a.jpg', labels=('cow',)),)
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".jsonl"):
        raise DataError(f"{path} is not a table of labels; give a .csv, .tsv or .jsonl file")
    read = _read_jsonl if suffix == ".jsonl" else _read_csv
    table = read(path, read_text(path, HOW), split or split_labels)
    if not table.rows:
        raise DataError(f"{path} names no image; {HOW}")
    return table


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


def split_labels(
    text: str, where: str, separator: str | None = None, known: Collection[str] = ()
) -> tuple[str, ...]:
    """The labels of a text; DataError if a label may be several, and begins with ``where`` it is.

    Args:
        separator: None: ``;``, and a label with ``,`` ``|`` ``/`` ``&``, a line end or in brackets
            is refused. A text, such as ``|``: labels are taken literally between it. ``list``: the
            text is a list of JSON or Python.
        known: labels that are not refused.
    """
    if separator == "list":
        return _listed(text, where)
    found = text.split((separator or ";").replace("\\t", "\t").replace("\\n", "\n"))
    labels = tuple(filter(None, map(normal_name, found)))
    for label in labels:
        doubtful = ";" in label if separator else _SEVERAL.search(label)
        if doubtful and label not in known and not shows_nothing(label):
            sign = doubtful[0][:1] if isinstance(doubtful, re.Match) else ";"
            sign = "list" if sign in "[({'\"" else sign.replace("\t", "\\t").replace("\n", "\\n")
            raise several_labels(label, where, sign)
    return labels


def _listed(text: str, where: str) -> tuple[str, ...]:
    """The texts of a list in JSON or Python, or of none."""
    found: Any = None if text.strip() else []
    for read in (json.loads, ast.literal_eval):
        # of texts without a comma between them, as NumPy prints them, Python makes one
        if found is None and not re.search(r"""['"]\s+['"]""", text):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                found = read(text.strip())
    if not isinstance(found, list | tuple) or not all(isinstance(one, str) for one in found):
        raise DataError(
            f"{where} reads {text.strip()!r:.80}, which is no list of texts; write "
            '["cow", "dog"], or another --separator'
        )
    return tuple(filter(None, map(normal_name, found)))


def check_label_names(labels: Mapping[str, str], *, numbers: bool = False) -> None:
    """Refuse labels (with their places) that seem to be several others joined, or numbers."""
    known = {label.casefold(): label for label in reversed([*labels])}
    for label, where in labels.items():
        if not numbers and re.fullmatch(r"[-+]?\d+(\.\d+)?", label):
            way = (
                "write the name of the class, or list the numbers in classes.txt if they are names"
            )
            raise DataError(f"{where}: the label {label!r} is a number; {way}")
        parts = {*filter(None, _JOINED.split(label.casefold()))}
        if len(parts) > 1 and parts <= known.keys():
            signs = [found[0] for found in _JOINED.finditer(label) if found.start() > 0]
            raise several_labels(label, where, signs[0])
        if (other := known[label.casefold()]) != label:
            raise DataError(
                f"{where}: {label!r} differs from {other!r} in capitals alone; write one of them, "
                "or list both in classes.txt if they are two classes"
            )


def several_labels(text: str, where: str, separator: str) -> DataError:
    """The error for a name that may be several."""
    return DataError(
        f"{where}: {text!r} may be several labels; give --separator '{separator}' (in a recipe "
        "data.separator) if it is, or --separator ';' if it is one name"
    )


def labels_by_image(
    table: LabelTable, name_of: Callable[[str], str | None]
) -> tuple[dict[str, set[str]], tuple[str, ...]]:
    """The labels of each image, united over its rows, and a notice of images in several rows.

    Rows for which ``name_of`` gives no id are left out. DataError if rows contradict each other:
    one has no label, or columns differ.
    """
    rows: dict[str, list[LabelRow]] = {}
    for row in table.rows:
        if (image_id := name_of(row.image)) is not None:
            rows.setdefault(image_id, []).append(row)
    several = {image_id: found for image_id, found in rows.items() if len(found) > 1}
    for image_id, first, row in ((i, of[0], row) for i, of in several.items() for row in of):
        may_differ = table.classes is None and row.labels and first.labels
        if {*row.labels} != {*first.labels} and not may_differ:
            raise DataError(
                f"{table.path} lists {image_id!r} twice (lines {first.line} and {row.line}) with "
                "labels that contradict each other; keep one of them"
            )
    repeated = [f"{i} (lines {', '.join(str(r.line) for r in f)})" for i, f in several.items()]
    lines = f"{table.path.name} has several lines of {shortened(repeated)}"
    notices = (f"{lines}; their labels were united",) * bool(several)
    return {i: {n for r in of for n in r.labels} for i, of in rows.items()}, notices


def read_text(path: Path, how: str) -> str:
    """A file in UTF-8, or UTF-16 with its mark, as text; a DataError ends with ``how``."""
    try:
        data = path.read_bytes()
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; save it as UTF-8. {how}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. {how}") from error


def read_names(
    path: Path,
    separator: str | None = None,
    way: str = "give --separator ';' (in a recipe data.separator)",
) -> tuple[str, ...]:
    """The class names of a file, one per line; DataError if one may be several, with a way on."""
    lines = read_text(path, "Write one class name per line.").splitlines()
    names = [normal_name(line) for line in lines if line.strip()]
    for name in names if separator is None else ():
        if re.search(r"[,;|\t，、；｜]|^[#\[({'\"]", name):
            raise DataError(
                f"{path}: {name!r} may be several names, or none; write one class name per line, "
                f"or {way} if it is one name"
            )
    if not names:
        raise DataError(f"{path} is empty; write one class name per line")
    if all(re.match(r"\d+\s*[:.)\s]\s*\S", name) for name in names):
        raise DataError(
            f"{path} numbers its lines ({names[0]!r}); write class names alone, in the order of "
            "their values in masks, 1, 2, ..."
        )
    return tuple(names)


def read_lines(path: Path) -> list[tuple[str, str]]:
    """The image names of a list, one per line, each after its file and line for errors."""
    lines = enumerate(read_text(path, "Write one image per line.").splitlines(), start=1)
    numbered = ((f"{path} line {number}", line) for number, line in lines if line.strip())
    return [(where, image_name(line, where)) for where, line in numbered]


def _key(cell: str) -> str:
    return re.sub(r"[\s_-]", "", cell.strip(" \"'")).casefold()


def _read_csv(path: Path, text: str, split: Split) -> LabelTable:
    head = text.lstrip().partition("\n")[0]
    likely = (d for d in ",;\t|" if d in head and _IMAGE.fullmatch(_key(head.split(d)[0])))
    delimiter = next(likely, ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[LabelRow] = []
    classes: tuple[str, ...] | None = None
    width = 0
    try:
        for cells in (cells for cells in reader if any(map(str.strip, cells))):
            where = f"{path} line {reader.line_num}"
            if not width:
                width, classes = len(cells), _columns(cells, where, split)
                continue
            if len(cells) != width:
                raise DataError(f"{where} has {len(cells)} columns, expected {width}; {HOW}")
            hot = classes and _hot(cells[1:], classes, where)
            labels = split(cells[1], where) if hot is None else hot
            rows.append(LabelRow(reader.line_num, image_name(cells[0], where), labels))
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}; {HOW}") from error
    return LabelTable(path, tuple(rows), classes)


def _columns(cells: list[str], where: str, split: Split) -> tuple[str, ...] | None:
    """The classes of a multi-hot header; None for ``image,labels``."""
    _, *names = map(normal_name, cells)
    if not names or not _IMAGE.fullmatch(_key(cells[0])):
        header = "no header" if without_suffix(cells[0]) != cells[0] else ",".join(cells)
        raise DataError(f"{where} is {header!r}; {HOW}")
    if any(_LABELS.fullmatch(_key(name)) for name in names):
        if len(names) == 1:
            return None
        columns = ", ".join([cells[0], *names])
        raise DataError(f"{where} has the columns {columns}; keep those of images and of labels")
    if "" in names or len({*names}) < len(names):
        repeated = ", ".join({name for name in names if names.count(name) > 1})
        raise DataError(
            f"{where}: a column has no name, or repeats ({repeated}); a table of 0 and 1 has one "
            "column a class"
        )
    for name in names:
        split(name, f"{where}, a column")
    return tuple(names)


def _hot(cells: list[str], classes: tuple[str, ...], where: str) -> tuple[str, ...]:
    values = [_TRUE_FALSE.get(cell.strip().casefold()) for cell in cells]
    if None in values:
        column = values.index(None)
        raise DataError(
            f"{where} has {cells[column].strip()!r} in the column {classes[column]!r}, expected 0 "
            f"or 1; if the column holds names of classes, call it 'labels'; otherwise {HOW}"
        )
    return tuple(name for name, value in zip(classes, values, strict=True) if value)


def _read_jsonl(path: Path, text: str, split: Split) -> LabelTable:
    rows = []
    # not splitlines: JSON text may contain other line ends, such as U+2028
    lines = enumerate(io.StringIO(text, newline=None), start=1)
    for number, line in ((number, line) for number, line in lines if line.strip()):
        where = f"{path} line {number}"
        try:
            entry = _Entry.model_validate_json(line)
        except ValidationError as error:
            raise DataError(
                f"{where} is not JSON with a text 'image' and a list of texts 'labels' "
                f"({error.errors()[0]['msg']}): {line.strip()[:120]!r}; {HOW}"
            ) from error
        names = tuple(name for label in entry.labels for name in split(label, where))
        rows.append(LabelRow(number, image_name(entry.image, where), names))
    return LabelTable(path, tuple(rows))
