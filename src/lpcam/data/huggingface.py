"""Importing a Hugging Face data set as a folder of images and labels (extra ``huggingface``)."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lpcam.data.dataset import ClassTable
from lpcam.data.images import decode_image, png_bytes
from lpcam.data.labels import (
    check_label_names,
    check_storable,
    normal_name,
    split_labels,
    table_bytes,
)
from lpcam.runtime.errors import DataError, LpcamError, import_extra
from lpcam.runtime.files import write_bytes, write_json
from lpcam.runtime.versions import __version__

RECORD = "import.json"
"""File that says where the images are from, and which rows were left out and why."""
_OLDEST = 4  #: First version of the library that executes no program of a data set.
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_LABEL_KEYS = ("category", "categories", "label", "labels", "class", "category_id", "name")
"""Usual names of the label in a column of objects."""
_EXTENSIONS = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}
_EXTENSIONS |= {name: f".{name.lower()}" for name in ("PNG", "WEBP", "BMP", "GIF", "PPM")}
"""File extension by Pillow's name of the format. Other formats are saved as PNG."""


def import_huggingface(
    source: str | Path | Any,
    output: Path,
    *,
    image: str | None = None,
    labels: str | None = None,
    names: Sequence[str] | None = None,
    split: str | None = None,
    separator: str | None = None,
    no_class: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> str:
    """Write the images of a data set, by row, with their labels as a user's folder; what was done.

    Rows without a label (None, or -1 of a ClassLabel) or a readable image are left out; an empty
    list is an image that shows no class.

    Args:
        source: a ``datasets.Dataset`` or DatasetDict, the folder of its ``save_to_disk``, or its
            name on the hub.
        labels: the column of labels, ``objects.category`` for a part of one, or ``cow,dog`` for
            columns of 0 and 1. None: ``label``, or the only one of a ClassLabel.
        names: names of the numbers 0, 1, 2, ... in the column of labels, where it has none.
    """
    library = import_extra("datasets", "huggingface", "data sets of Hugging Face need its library")
    if int(library.__version__.partition(".")[0]) < _OLDEST:
        raise LpcamError(
            f"datasets {library.__version__} can run programs that come with data sets; install "
            f"version {_OLDEST} or newer: pip install 'lpcam[huggingface]'"
        )
    if (output / "labels.csv").exists():
        raise DataError(f"{output} has a labels.csv already; choose another output folder")
    dataset = _open(library, source, split)
    kinds = dataset.features
    images = [n for n, kind in kinds.items() if isinstance(kind, library.Image) or _is_bytes(kind)]
    image = _chosen(dataset, image, "image", images)
    labels = _chosen(dataset, labels, "label", [n for n in kinds if "ClassLabel" in str(kinds[n])])
    if image not in images:
        raise DataError(
            f"there is no column {image!r} of images; the columns are {', '.join(kinds)}, and of "
            f"images {', '.join(images) or 'none: cast one with cast_column(NAME, Image())'}"
        )
    rules = (separator, no_class or (), classes)
    classes, label_sets = _labels(library, dataset, labels, names, *rules)

    stored = dataset.with_format(None).select_columns([image])
    stored = stored.cast_column(image, library.Image(decode=False))
    digits = max(6, len(str(len(dataset) - 1)))
    rows: dict[Any, tuple[str, tuple[str, ...]]] = {}
    united = 0
    left_out: list[dict[str, Any]] = []
    for number, (row, shown) in enumerate(zip(stored, label_sets, strict=True)):
        try:
            if shown is None:
                raise DataError(f"it has no label in the column {labels!r}")
            data, extension = _image_file(row[image], f"of row {number}")
        except DataError as error:
            left_out.append({"row": number, "reason": str(error)})
        else:
            name, path = f"{number:0{digits}d}{extension}", row[image].get("path")
            key = (path, hashlib.sha256(data).digest()) if path and shown else number
            united += key in rows
            first, before = rows.setdefault(key, (name, ()))
            rows[key] = (first, tuple(dict.fromkeys((*before, *shown))))
            if first == name:
                write_bytes(output / "images" / name, data)
    if not rows:
        reason = left_out[0]["reason"] if left_out else "it has no rows"
        raise DataError(f"no row of the data set can be used; the first: {reason}")
    table, names_file = table_bytes(rows.values(), classes)
    write_bytes(output / "classes.txt", names_file)
    record = {
        "source": str(source) if isinstance(source, str | Path) else type(source).__name__,
        "split": None if dataset.split is None else str(dataset.split),
        "columns": {"image": image, "labels": labels},
        "rows": len(dataset),
        "left_out": left_out,
        "united": united,
        "made_by": {"lpcam": __version__, "datasets": library.__version__},
    }
    write_json(output / RECORD, record)
    write_bytes(output / "labels.csv", table)
    lines = [f"wrote {output}, from the columns {image} and {labels}"]
    if united:
        lines.insert(0, f"{united} rows have the file of a row before; labels were united")
    if left_out:
        count = f"{len(left_out)} of {len(dataset)} rows were left out"
        lines.insert(0, "{}, the first: row {row}, {reason}".format(count, **left_out[0]))
    return "\n".join(lines)


def _open(library: Any, source: Any, split: str | None) -> Any:
    found = source
    if isinstance(source, str | Path):
        try:
            if isinstance(source, Path) or Path(source).exists():
                found = _open_path(library, Path(source))
            elif _HUB_NAME.fullmatch(source):
                found, split = library.load_dataset(source, split=split), None
            else:
                raise ValueError("it is neither a folder nor NAME or OWNER/NAME")
        except Exception as error:  # the library raises anything on damaged files and networks
            reason = str(error).partition("\n")[0]
            raise DataError(
                f"cannot open the data set {str(source)!r}: {reason[:300] or type(error).__name__};"
                " give the folder that save_to_disk wrote, a folder of images with metadata.csv or "
                "of parquet files, or a name on the hub"
            ) from error
    if isinstance(found, library.DatasetDict):
        names = sorted(map(str, found))
        if split is None and len(names) == 1:
            split = names[0]
        if split not in names:
            raise DataError(f"unknown split {split!r}; name one of the splits {', '.join(names)}")
        return found[split]
    if not isinstance(found, library.Dataset):
        raise DataError(
            f"{type(found).__name__} cannot be imported; give a datasets.Dataset, not streamed"
        )
    if split is not None and split != str(found.split):
        raise DataError(f"unknown split {split!r}; the data set has only {found.split or 'one'}")
    return found


def _open_path(library: Any, path: Path) -> Any:
    """Open what save_to_disk wrote, or a file or folder as the hub stores data sets."""
    path = path.absolute()  # a relative one might be the name of a loader or be on the hub
    if path.is_file():
        if path.suffix not in (".parquet", ".arrow"):
            raise ValueError("it is a file, but not .parquet or .arrow")
        return library.load_dataset(path.suffix.removeprefix("."), data_files=str(path))
    saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
    load = library.load_from_disk if saved or not path.exists() else library.load_dataset
    return load(str(path))


def _is_bytes(kind: Any) -> bool:
    """Whether a column holds bytes of files, by themselves or with their path."""
    return getattr(kind, "dtype", "") == "binary" or (isinstance(kind, dict) and "bytes" in kind)


def _chosen(dataset: Any, given: str | None, usual: str, fitting: Sequence[str]) -> str:
    """The column that is given, else the usual one, else the only one that fits."""
    if given is not None or usual in dataset.features:
        return given or usual
    if len(fitting) == 1:
        return fitting[0]
    columns = ", ".join(f"{name} ({str(kind)[:60]})" for name, kind in dataset.features.items())
    raise DataError(f"there is no column {usual!r}; say which it is, of: {columns}")


def _cells(library: Any, dataset: Any, labels: str) -> tuple[Any, list[Any]]:
    """The type of the labels (None: columns of 0 and 1), and their value in each row."""
    rows, kinds = dataset.with_format(None), dataset.features
    several = [labels] if labels in kinds else labels.split(",")
    name, _, key = (labels, "", "") if labels in kinds else several[0].partition(".")
    for one in several if len(several) > 1 else (name,):
        if one not in kinds:
            raise DataError(f"there is no column {one!r}; the columns are {', '.join(kinds)}")
    if len(several) > 1:
        return None, [[row[n] for n in several] for row in rows.select_columns(several)]
    kind = kinds[name]
    cells = [row[name] for row in rows.select_columns([name])]
    objects = getattr(kind, "feature", kind)
    if not isinstance(objects, dict):
        return kind, cells
    keys = [one for one in ([key] if key else _LABEL_KEYS) if one in objects]
    if len(keys) != 1:
        raise DataError(f"which part of {name!r} is the label: {name}.X, X of {', '.join(objects)}")
    if objects is kind:
        return kind[keys[0]], [cell and cell[keys[0]] for cell in cells]
    found = [cell and [one[keys[0]] for one in cell] for cell in cells]
    return library.List(objects[keys[0]]), found


def _labels(
    library: Any,
    dataset: Any,
    labels: str,
    given: Sequence[str] | None,
    separator: str | None,
    no_class: Sequence[str],
    chosen: Sequence[str] | None,
) -> tuple[tuple[str, ...], list[tuple[str, ...] | None]]:
    """The classes, and the class names of each row; None for a row without label."""
    kind, cells = _cells(library, dataset, labels)
    one = getattr(kind, "feature", kind)
    dtype = "bool" if kind is None else str(getattr(one, "dtype", ""))
    several, text = one is not kind or kind is None, dtype in ("string", "large_string")
    names = given or getattr(one, "names", labels.split(",") if kind is None else None)
    if not text and (not names or not re.match("u?int|bool|float", dtype)):
        raise DataError(
            f"the column {labels!r} holds {kind}, not a ClassLabel, text or lists of these; if it "
            "is numbers, name 0, 1, 2, ...: --names FILE, or --names cow,dog"
        )
    classes = [] if text else [normal_name(name) for name in names or ()]
    hot = several and not text and not isinstance(one, library.ClassLabel)
    hot = hot and all(len(x) == len(classes) and {*x} <= {0, 1, None} for x in cells if x)
    if kind is None and not hot:
        raise DataError(f"the columns {labels} hold other values than 0 and 1")
    if hot and dtype != "bool" and all(len({*x}) == len(x) for x in cells if x):
        raise DataError(
            f"the column {labels!r} may hold numbers of classes, or 0 and 1 for each class; cast "
            "it to lists of ClassLabel or of bool"
        )

    def names_of(value: Any, row: int) -> tuple[str, ...] | None:
        values = value if several else [value]
        if values is None or any(v is None or (not text and v < 0) for v in values):
            return None
        if text:
            split = (split_labels(v, f"row {row}", separator, no_class) for v in values)
            return tuple(dict.fromkeys(name for names in split for name in names))
        places = [n for n, v in enumerate(values) if v] if hot else values
        if wrong := [v for v in places if v not in range(len(classes))]:
            raise DataError(
                f"row {row} has {wrong[0]} in {labels!r}; named are {len(classes)}, from 0"
            )
        return tuple(dict.fromkeys(classes[int(v)] for v in places))

    found = [names_of(cell, number) for number, cell in enumerate(cells)]
    first: dict[str, str] = {}
    for number, names in enumerate(found):
        for name in names or ():
            first.setdefault(name, f"row {number}")
    if text and separator is None:
        check_label_names(first)
    rules: dict[str, Any] = {"labels": first, "no_class": no_class, "masked": False}
    source = f"the column {labels!r}"
    table = ClassTable.numbered(None if text else classes, source, chosen, **rules)
    check_storable(table.names)
    kept = [n if n is None else tuple(x for x in n if x in table.names) for n in found]
    return table.names, kept


def _image_file(cell: Any, name: str) -> tuple[bytes, str]:
    """The bytes of an image file and its extension; DataError where there is no image."""
    data, path = (cell or {}).get("bytes"), (cell or {}).get("path")
    if data is None and path is not None:
        try:
            data = Path(path).read_bytes()
        except (OSError, ValueError) as error:
            raise DataError(f"its file {path} cannot be read ({error})") from error
    if not data:
        raise DataError("it has no image")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            extension = _EXTENSIONS[opened.format or ""]
    except KeyError:
        return png_bytes(decode_image(data, name)), ".png"
    except Exception as error:  # decoders raise anything on damaged data
        raise DataError(f"its image is damaged or of an unknown format ({error})") from error
    return data, extension
