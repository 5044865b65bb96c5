"""A user's own folder: images, ``labels.csv``, and optional classes, lists, masks and parts.

::

    folder/
      labels.csv          image,labels      (several labels separated by ';', UTF-8)
      images/             images, in subfolders if wished; without it they lie in the folder itself
      classes.txt         optional: one class a line; the first has the value 1 in masks
      lists/NAME.txt      optional: one image a line
      masks/ID.png        optional: truth for the evaluation
      parts/ID.png        optional: truth of parts, with parts.json {"head": 1, ...}

An image's id is its path below the image folder without the extension, in Unicode form NFC.
"""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lpcam.data.classes import choose_classes, unknown_name
from lpcam.data.items import (
    BACKGROUND,
    IGNORE,
    ClassTable,
    Dataset,
    Item,
    Skip,
    check_unique,
    safe_id,
)
from lpcam.errors import DataError

IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".tif",
        ".tiff",
        ".webp",
        ".gif",
        ".ppm",
        ".pgm",
        ".pnm",
    ]
)
"""Extensions of image files, in any case."""

_HOW = (
    "labels.csv must be UTF-8 text whose first line is 'image,labels' and then has one line an "
    "image, several labels separated by ';', for example: cow_1.jpg,cow;grass"
)


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    name: str
    labels: tuple[str, ...]


def read_folder(root: Path, *, classes: Sequence[str] | None = None) -> Dataset:
    """Read a user's folder (layout above): every labelled image, and lists with one named ``all``.

    An image may stand in ``labels.csv`` with or without its extension and a leading ``images/``;
    an empty labels cell is an image that shows no class. Without ``classes.txt`` the classes are
    all names of ``labels.csv``, sorted, with mask ids from 1. ``classes`` picks some of them in
    label order; they keep their mask ids and other labels are dropped, with a notice.

    A row without an image and an image without a row are left out, with the reason; the labels of
    repeated rows are united, with a notice.

    Raises:
        DataError: naming the file and line, for a missing or wrong ``labels.csv``, no images, an
            unknown class (with the nearest known name), a name that could leave the folder, two
            images with the same id, or a wrong list, ``classes.txt`` or ``parts.json``.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; give the folder that holds labels.csv")
    rows = _read_rows(root / "labels.csv")
    whole = _read_classes(root / "classes.txt", rows)
    table = choose_classes(whole, None if classes is None else [_normal(c) for c in classes])

    images_root = root / "images" if (root / "images").is_dir() else root
    images, skipped = _find_images(images_root)
    names = {image_id: image_id for image_id in images}
    names |= {image_id + path.suffix: image_id for image_id, path in images.items()}

    notices = []
    labels: dict[str, set[str]] = {}
    lines: dict[str, list[int]] = {}
    for row in rows:
        image_id = _resolve(row.name, names)
        if image_id is None:
            skipped.setdefault(
                row.name,
                Skip(row.name, f"labels.csv line {row.line} has no image below {images_root}"),
            )
            continue
        labels.setdefault(image_id, set()).update(row.labels)
        lines.setdefault(image_id, []).append(row.line)
    if not labels:
        raise DataError(
            f"none of the {len(rows)} images of {root / 'labels.csv'} is below {images_root}: it "
            f"names {rows[0].name!r}, the folder holds {next(iter(images))!r}; {_HOW}"
        )
    for image_id in images.keys() - labels.keys():
        skipped[image_id] = Skip(image_id, "it has no line in labels.csv; add one")
    repeated = [f"{i} (lines {', '.join(map(str, n))})" for i, n in lines.items() if len(n) > 1]
    if repeated:
        notices.append(
            f"labels.csv: {_some(repeated)} stand in more than one line; their labels were united"
        )
    dropped = Counter(n for of_image in labels.values() for n in of_image if n not in table.names)
    if dropped:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(dropped.items()))
        notices.append(f"{dropped.total()} labels of classes not chosen were dropped: {counts}")

    masks = _find_truth(root / "masks", images, notices)
    part_names = _read_parts(root / "parts.json")
    parts = _find_truth(root / "parts", images, notices)
    if parts and not part_names:
        notices.append("parts/ is not used: parts.json with the value of each part is missing")
        parts = {}
    items = {
        image_id: Item(
            id=image_id,
            image=images[image_id],
            labels=tuple(n for n, name in enumerate(table.names) if name in labels[image_id]),
            mask=masks.get(image_id),
            parts=parts.get(image_id),
        )
        for image_id in sorted(labels)
    }
    lists = _read_lists(root / "lists", names, items, skipped)
    return Dataset(
        name=root.resolve().name,
        classes=table,
        items=items,
        lists={**lists, "all": tuple(items)},
        label_source="labels.csv",
        skipped=tuple(skipped[i] for i in sorted(skipped)),
        notices=tuple(notices),
        part_names=part_names if parts else {},
    )


def _normal(text: str) -> str:
    """Unicode form NFC: file systems and editors write the same name in different forms."""
    return unicodedata.normalize("NFC", text.strip())


def _some(entries: Sequence[str]) -> str:
    more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
    return ", ".join(entries[:5]) + more


def _read_text(path: Path, how: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text; save it as UTF-8. {how}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. {how}") from error


def _read_rows(path: Path) -> list[_Row]:
    if not path.is_file():
        raise DataError(f"there is no {path}; {_HOW}")
    reader = csv.reader(io.StringIO(_read_text(path, _HOW), newline=""), strict=True)
    rows: list[_Row] = []
    header = True
    try:
        for cells in reader:
            where = f"{path} line {reader.line_num}"
            if header:
                header = False
                if [cell.strip().casefold() for cell in cells] != ["image", "labels"]:
                    raise DataError(f"{where} is {','.join(cells)!r}; {_HOW}")
            elif any(cell.strip() for cell in cells):
                if len(cells) != 2:
                    raise DataError(f"{where} has {len(cells)} columns, expected 2; {_HOW}")
                labels = [_normal(label) for label in cells[1].split(";")]
                rows.append(
                    _Row(reader.line_num, _safe(cells[0], where), tuple(n for n in labels if n))
                )
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}; {_HOW}") from error
    if not rows:
        raise DataError(f"{path} names no image; {_HOW}")
    return rows


def _safe(text: str, where: str) -> str:
    try:
        return safe_id(_normal(text))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _read_classes(path: Path, rows: Iterable[_Row]) -> ClassTable:
    if path.is_file():
        lines = _read_text(path, "Write one class name a line.").splitlines()
        names = [_normal(line) for line in lines if line.strip()]
        if "background" in (name.casefold() for name in names):
            raise DataError(f"{path} names the background; leave it out, its mask value is 0")
    else:
        names = sorted({label for row in rows for label in row.labels})
    try:
        table = ClassTable(tuple(names), tuple(range(1, len(names) + 1)))
    except DataError as error:
        raise DataError(
            f"{path if path.is_file() else path.parent / 'labels.csv'}: {error}"
        ) from error
    for row in rows:
        for label in row.labels:
            if label not in names:
                raise DataError(
                    f"{path.parent / 'labels.csv'} line {row.line}: unknown class "
                    f"{unknown_name(label, names)} (classes.txt)"
                )
    return table


def _walk(folder: Path, ignored: Iterable[str] = ()) -> list[tuple[str, Path]]:
    """Visible files below a folder: relative POSIX path in NFC, and the path on disk; sorted."""
    found = []
    for place, folders, files in os.walk(folder):
        kept = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        # what a run wrote below the images is not the user's
        kept = [name for name in kept if not _is_run(Path(place, name))]
        folders[:] = [n for n in kept if Path(place) != folder or n not in ignored]
        for name in files:
            if not name.startswith("."):
                path = Path(place, name)
                text = path.relative_to(folder).as_posix()
                # a name that is no Unicode is spelt out, so that reports can hold it
                text = text.encode("utf-8", "backslashreplace").decode()
                found.append((unicodedata.normalize("NFC", text), path))
    return sorted(found)


def _is_run(folder: Path) -> bool:
    return (folder / ".lock").is_file() and (folder / "index.json").is_file()


def _find_images(folder: Path) -> tuple[dict[str, Path], dict[str, Skip]]:
    images: dict[str, Path] = {}
    skipped: dict[str, Skip] = {}
    for name, path in _walk(folder, ignored=("masks", "parts", "lists")):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        image_id = name.removesuffix(path.suffix)
        try:
            safe_id(image_id)
        except DataError as error:
            skipped[image_id] = Skip(image_id, str(error))
            continue
        if image_id in images:
            raise DataError(
                f"{images[image_id]} and {path} have the same id {image_id!r}; rename one of them"
            )
        images[image_id] = path
    if not images:
        raise DataError(
            f"there are no images below {folder}; put files such as cow_1.jpg there "
            f"(extensions {' '.join(sorted(IMAGE_SUFFIXES))}) and name them in labels.csv"
        )
    return images, skipped


def _resolve(text: str, names: dict[str, str]) -> str | None:
    """The id of an image named with or without its extension and a leading ``images/``."""
    for name in (text, text.removeprefix("images/")):
        path = PurePosixPath(name)
        stem = name.removesuffix(path.suffix) if path.suffix.lower() in IMAGE_SUFFIXES else name
        for candidate in (name, stem):
            if candidate in names:
                return names[candidate]
    return None


def _find_truth(folder: Path, images: dict[str, Path], notices: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    strange = []
    for name, path in _walk(folder):
        image_id = name.removesuffix(path.suffix)
        if path.suffix.lower() == ".png" and image_id in images and image_id not in found:
            found[image_id] = path
        else:
            strange.append(name)
    if strange:
        notices.append(
            f"{folder.name}/: {_some(strange)} belong to no image; they are called ID.png, as the "
            "image without its extension"
        )
    return found


def _read_parts(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    how = 'Write {"NAME": VALUE, ...} with different values from 1 to 254.'
    try:
        parts = json.loads(_read_text(path, how))
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}). {how}") from error
    values = list(parts.values()) if isinstance(parts, dict) else []
    right = all(type(value) is int and BACKGROUND < value < IGNORE for value in values)
    if not values or not right or len(set(values)) != len(values):
        raise DataError(f"{path} is wrong. {how}")
    return {_normal(name): value for name, value in parts.items()}


def _read_lists(
    folder: Path, names: dict[str, str], items: dict[str, Item], skipped: dict[str, Skip]
) -> dict[str, tuple[str, ...]]:
    lists = {}
    for path in sorted(folder.glob("*.txt")):
        if path.stem == "all":
            raise DataError(f"{path} is refused: 'all' is the list of every image; rename it")
        ids = []
        for number, line in enumerate(_read_text(path, "Write one image a line.").splitlines(), 1):
            if not line.strip():
                continue
            where = f"lists/{path.name} line {number}"
            name = _safe(line, where)
            image_id = _resolve(name, names)
            if image_id is not None:
                ids.append(image_id)
            else:
                skipped.setdefault(name, Skip(name, f"{where} has no image of that name"))
        check_unique(ids, str(path))
        lists[path.stem] = tuple(image_id for image_id in ids if image_id in items)
    return lists
