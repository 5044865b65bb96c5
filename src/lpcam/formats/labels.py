"""Image-level labels of other programs (``cls_labels.npy``), imported as ``labels.csv``."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lpcam.data.dataset import ClassTable, check_unique, without_suffix
from lpcam.data.labels import image_name, read_text
from lpcam.formats.pickled_arrays import read_pickled_arrays
from lpcam.runtime.errors import DataError
from lpcam.runtime.files import read_bytes, write_bytes

CLASSES_FILE = "classes.txt"  #: Class names beside ``labels.csv``.
_VOC_NUMBER = re.compile(r"((?:19|20)\d{2})(\d{6})")


def import_labels(
    source: Path,
    output: Path,
    *,
    classes: Sequence[str],
    ids: Sequence[str] | None = None,
    coco_split: str | None = None,
) -> str:
    """Import label vectors as a table ``image,labels``, with ``classes.txt``; what was done.

    ``source`` is a ``.npy`` file (or plain pickle) of a dictionary {number or name: vector (N,)} or
    an array (n, N) of ``ids``; a value above 0 is a label. 10 digits become a VOC id (2007000032:
    ``2007_000032``), other numbers those of ``coco_split``.
    """
    for name in classes:
        if not name or name != name.strip() or ";" in name or len(name.splitlines()) != 1:
            raise DataError(
                f"the class name {name!r} is empty, or has blanks at its ends, a ';' or a line "
                "break, which a table of labels cannot hold; rename the class"
            )
    if output.suffix.lower() != ".csv":
        raise DataError(f"{output} is not the name of a table; give one that ends in .csv")
    if source.suffix.lower() in (".csv", ".jsonl"):
        raise DataError(f"{source} is a table already: lpcam init FOLDER --labels {source}")
    where = f"label file {source}"
    found = read_pickled_arrays(read_bytes(source), what=where)
    if isinstance(found, np.ndarray) and found.ndim == 2:
        if ids is None or len(ids) != len(found):
            raise DataError(f"{where} has {len(found)} rows; give as many ids (--ids)")
        keys, rows, listed = list(ids), list(found), "the list of ids"
    elif isinstance(found, dict) and found:
        if ids is not None:
            raise DataError(f"{where} names its images itself; leave the ids out")
        keys, rows, listed = list(found), list(found.values()), where
    else:
        raise DataError(f"{where} holds neither a dictionary of vectors nor an array (n, N)")
    names = [_image_name(key, coco_split, listed) for key in keys]
    check_unique(names, listed)
    for name, row in zip(names, rows, strict=True):
        if not isinstance(row, np.ndarray) or row.shape != (len(classes),):
            shape = getattr(row, "shape", type(row).__name__)
            raise DataError(
                f"{where} has {shape} for {name!r}, not {len(classes)} values, as classes"
            )
        if not np.isfinite(row).all():
            raise DataError(f"{where} has NaN or infinity for {name!r}; labels are 0 or 1")
    present = np.stack(rows) > 0
    labels = (";".join(classes[n] for n in np.flatnonzero(row).tolist()) for row in present)
    table = io.StringIO(newline="")
    lines = [("image", "labels"), *zip(names, labels, strict=True)]
    csv.writer(table, lineterminator="\n").writerows(lines)
    listed_names = "".join(f"{name}\n" for name in classes)
    contents = {output: table.getvalue(), output.with_name(CLASSES_FILE): listed_names}
    write_unchanged({path: text.encode() for path, text in contents.items()})
    without = int((~present.any(axis=1)).sum())
    return f"labels of {len(names):,} images in {output}, {without:,} of them without a label"


def write_unchanged(contents: Mapping[Path, bytes]) -> None:
    """Write files; DataError, before any is written, if one exists with other contents."""
    for path, data in contents.items():
        if path.exists() and (not path.is_file() or path.read_bytes() != data):
            raise DataError(f"{path} is there already with other contents; choose another output")
    for path, data in contents.items():
        write_bytes(path, data)


def _image_name(key: Any, coco_split: str | None, where: str) -> str:
    name = str(key)
    if match := _VOC_NUMBER.fullmatch(name):
        return f"{match[1]}_{match[2]}"
    if isinstance(key, int):
        if coco_split is None or not 0 <= key < 10**12:
            raise DataError(f"{where} names an image by the number {key}; of COCO: --coco-split")
        return f"COCO_{coco_split}_{key:012d}"
    if not name.isprintable():  # a file may hold text that no other file can
        raise DataError(f"{where} has the name {name!r:.80}; names are printable text")
    return without_suffix(image_name(name, where))


def read_classes(path: Path) -> ClassTable:
    """Read class names, one per line; mask values are 1, 2, ... or given after a tab."""
    names: list[str] = []
    values: list[int] = []
    lines = read_text(path, "Write one name per line.").splitlines()
    for number, line in enumerate(map(str.strip, lines), start=1):
        name, tab, value = line.partition("\t")
        if tab and not value.isdecimal():
            raise DataError(f"{path} line {number}: {value!r} after the tab is no mask value")
        if line:
            names.append(name.strip())
            values.append(int(value) if tab else len(names))
    try:
        return ClassTable(tuple(names), tuple(values))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
