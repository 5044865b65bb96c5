"""A user's own folder: images, their labels, and optional classes, lists, masks and parts.

::

    folder/
      labels.csv          image,labels      (or another form of lpcam.data.labels, or labels.jsonl)
      images/             images, in subfolders if wished; without it they lie in the folder itself
      classes.txt         optional: one class a line; the first has the value 1 in masks
      lists/NAME.txt      optional: one image a line
      masks/ID.png        optional: truth for the evaluation
      parts/ID.png        optional: truth of parts, with parts.json {"head": 1, ...}

Without a table of labels the folders of the image folder are the classes: ``images/cow/7.jpg``.

An image's id is its path below the image folder without the extension, in Unicode form NFC.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

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
from lpcam.data.labels import (
    LabelRow,
    LabelTable,
    how_to_write,
    image_name,
    normal_name,
    read_labels,
    read_text,
)
from lpcam.data.truth import no_mask_in
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

_PARTS_OF_DATA = frozenset(["train", "training", "val", "valid", "validation", "test", "testing"])
FOLDERS: Literal["folders"] = "folders"
"""In the place of a table of labels: the first folder of an image's id is its class."""


def read_folder(
    root: Path,
    *,
    classes: Sequence[str] | None = None,
    labels: Path | Literal["folders"] | None = None,
    masks: Path | None = None,
) -> Dataset:
    """Read a user's folder (layout above): every labelled image, and lists with one named ``all``.

    An image may stand in the table of labels with or without its extension and a leading
    ``images/``; an empty labels cell is an image that shows no class. The classes are those of
    ``classes.txt``, else the columns of a multi-hot table, else all names of the table (or of the
    folders), sorted; they have mask ids from 1. ``classes`` picks some of them in label order; they
    keep their mask ids and other labels are dropped, with a notice.

    A row without an image and an image without a row (or, with ``"folders"``, in none of them) are
    left out, with the reason; the labels of repeated rows are united, with a notice.

    Args:
        root: the folder.
        classes: names to choose; all if None.
        labels: a table that `lpcam.data.labels.read_labels` reads, wherever it is; or
            ``"folders"``: the label of ``cow/barn/7`` is ``cow``. None: ``labels.csv`` of the
            folder, else its ``labels.jsonl``, else ``"folders"``, with a notice.
        masks: a folder of ``ID.png``, instead of ``masks`` of the folder.

    Raises:
        DataError: naming the file and line, for a missing or wrong table of labels, no images, an
            unknown class (with the nearest known name), a name that could leave the folder, two
            images with the same id, folders such as ``train`` and ``val`` where those of classes
            should be, ``masks`` that are missing or of no image, or a wrong list, ``classes.txt``
            or ``parts.json``.
    """
    if not root.is_dir():
        raise DataError(
            f"there is no folder {root}; give the folder that holds labels.csv or, in a run, set "
            "data.root in its recipe.yaml"
        )
    if masks is not None and not masks.is_dir():
        raise DataError(f"there is no folder of masks {masks}; give the folder that holds ID.png")
    images_root = root / "images" if (root / "images").is_dir() else root
    named = _table_path(root, labels)
    table = None if named is None else read_labels(named)
    images, skipped, unread = _find_images(images_root, masks)
    if table is None:
        table = _table_of_folders(root, images_root, images, skipped)
    elif not images:
        raise DataError(
            f"there are no images below {images_root}; put files such as cow_1.jpg there "
            f"(extensions {' '.join(sorted(IMAGE_SUFFIXES))}) and name them in {table.path.name}"
        )
    notices = []
    if named is None and labels is None:
        notices.append(
            f"there is no labels.csv or labels.jsonl: the folders below {images_root} are the "
            f"classes, {_some(table.classes or ())}"
        )
    whole = _read_classes(root / "classes.txt", table)
    chosen = choose_classes(whole, None if classes is None else [normal_name(c) for c in classes])

    names_of_images = {image_id: image_id for image_id in images}
    names_of_images |= {image_id + path.suffix: image_id for image_id, path in images.items()}
    if named is None:
        present = {row.image: set(row.labels) for row in table.rows}
    else:
        present = _match(table, names_of_images, images_root, unread, skipped, notices)
    if not present:
        raise DataError(
            f"none of the {len(table.rows)} images of {table.path} is below {images_root}: it "
            f"names {table.rows[0].image!r}, the folder holds {next(iter(images))!r}; "
            f"{how_to_write(table.path)}"
        )
    for image_id in images.keys() - present.keys() - skipped.keys():
        skipped[image_id] = Skip(image_id, f"it has no line in {table.path.name}; add one")
    dropped = Counter(n for of_image in present.values() for n in of_image if n not in chosen.names)
    if dropped:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(dropped.items()))
        were = "label of a class not chosen was"
        if dropped.total() > 1:
            were = "labels of classes not chosen were"
        notices.append(f"{dropped.total()} {were} dropped: {counts}")

    truth = _find_truth(root / "masks" if masks is None else masks, images, notices)
    if masks is not None and truth.keys().isdisjoint(present):
        raise no_mask_in(masks, sorted(present))
    part_names = _read_parts(root / "parts.json")
    parts = _find_truth(root / "parts", images, notices)
    if parts and not part_names:
        notices.append("parts/ is not used: parts.json with the value of each part is missing")
        parts = {}
    items = {
        image_id: Item(
            id=image_id,
            image=images[image_id],
            labels=tuple(n for n, name in enumerate(chosen.names) if name in present[image_id]),
            mask=truth.get(image_id),
            parts=parts.get(image_id),
            file_name=images[image_id].relative_to(images_root).as_posix(),
        )
        for image_id in sorted(present)
    }
    lists = _read_lists(root / "lists", names_of_images, items, skipped)
    return Dataset(
        name=root.resolve().name,
        classes=chosen,
        items=items,
        lists={**lists, "all": tuple(items)},
        label_source="folders of the images" if named is None else named.name,
        skipped=tuple(skipped[i] for i in sorted(skipped)),
        notices=tuple(notices),
        part_names=part_names if parts else {},
    )


def _table_path(root: Path, labels: Path | Literal["folders"] | None) -> Path | None:
    """The table of labels; None where the folders are the classes."""
    if labels == FOLDERS:
        return None
    if isinstance(labels, Path):
        return labels
    if labels is not None:
        raise DataError(f"labels are {labels!r}; give the path of a table, or {FOLDERS!r}")
    for name in ("labels.csv", "labels.jsonl"):
        if (root / name).is_file():
            return root / name
    return None


def _table_of_folders(
    root: Path, images_root: Path, images: Mapping[str, Path], skipped: dict[str, Skip]
) -> LabelTable:
    """Every image in a folder, as if a table named it; the others are skipped."""
    rows = []
    _refuse_parts_of_data(images_root, images)
    for image_id in images:
        folder, between, _ = image_id.partition("/")
        if between:
            rows.append(LabelRow(0, image_id, (normal_name(folder),)))
        else:
            skipped[image_id] = Skip(
                image_id,
                "it is in no folder of a class and no table of labels is used; move it into one",
            )
    if not rows:
        path = root / "labels.csv"
        raise DataError(
            f"there is no {path}; {how_to_write(path)}. Without it images lie in one folder a "
            f"class, such as {images_root / 'cow' / '1.jpg'}"
        )
    classes = tuple(sorted({name for row in rows for name in row.labels}))
    return LabelTable(images_root, tuple(rows), classes)


def _refuse_parts_of_data(images_root: Path, images: Iterable[str]) -> None:
    """Folders of a train and a val set hold the folders of the classes."""
    deep = [image_id.split("/") for image_id in images if "/" in image_id]
    tops = sorted({parts[0] for parts in deep})
    nested = sorted({parts[0] for parts in deep if len(parts) > 2})
    if nested and all(top.casefold() in _PARTS_OF_DATA for top in tops):
        first = "train" if "train" in nested else nested[0]
        raise DataError(
            f"the folders of {images_root} are {', '.join(tops)} and hold the folders of the "
            f"classes; give one of them, {images_root / first}"
        )


def _match(
    table: LabelTable,
    names: Mapping[str, str],
    images_root: Path,
    unread: Mapping[str, str],
    skipped: dict[str, Skip],
    notices: list[str],
) -> dict[str, set[str]]:
    """Class names by image id, of all rows that name an image.

    Args:
        unread: as of :func:`_find_images`.
    """
    file = table.path.name
    present: dict[str, set[str]] = {}
    lines: dict[str, list[int]] = {}
    for row in table.rows:
        image_id = _resolve(row.image, names)
        if image_id is None:
            reason = f"{file} line {row.line} has no image below {images_root}"
            if ending := unread.get(row.image) or unread.get(row.image.removeprefix("images/")):
                reason = (
                    f"{file} line {row.line}: images that end in {ending} are not read; save it "
                    f"as one of {' '.join(sorted(IMAGE_SUFFIXES))}"
                )
            skipped.setdefault(row.image, Skip(row.image, reason))
            continue
        present.setdefault(image_id, set()).update(row.labels)
        lines.setdefault(image_id, []).append(row.line)
    repeated = [f"{i} (lines {', '.join(map(str, n))})" for i, n in lines.items() if len(n) > 1]
    if repeated:
        notices.append(
            f"{file}: {_some(repeated)} stand in more than one line; their labels were united"
        )
    return present


def _some(entries: Sequence[str]) -> str:
    more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
    return ", ".join(entries[:5]) + more


def _read_classes(path: Path, table: LabelTable) -> ClassTable:
    """Those of classes.txt, else of the table."""
    listed = path.is_file()
    if listed:
        lines = read_text(path, "Write one class name a line.").splitlines()
        names = [normal_name(line) for line in lines if line.strip()]
    elif table.classes is not None:
        names = list(table.classes)
    else:
        names = sorted({label for row in table.rows for label in row.labels})
    source = path if listed else table.path
    folders = not listed and table.path.is_dir()
    for name in names if folders else ():
        if name.casefold() == "background":
            raise DataError(
                f"the folder {table.path / name} names the background; images that show no class "
                f"have empty labels in a table: {how_to_write(Path('labels.csv'))}"
            )
    if (listed or table.classes) and "background" in (name.casefold() for name in names):
        raise DataError(f"{source} names the background; leave it out, its mask value is 0")
    try:
        classes = ClassTable(tuple(names), tuple(range(1, len(names) + 1)))
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    if table.classes is not None:
        where = f"folders of {table.path}" if table.path.is_dir() else f"{table.path} line 1"
        used = [(where, name) for name in table.classes]
    else:
        used = [
            (f"{table.path} line {row.line}", name) for row in table.rows for name in row.labels
        ]
    for where, name in used:
        if name not in classes.names:
            raise DataError(f"{where}: unknown class {unknown_name(name, names)} (classes.txt)")
    return classes


def _walk(folder: Path, ignored: Collection[Path] = ()) -> list[tuple[str, Path]]:
    """Visible files below a folder: relative POSIX path in NFC, and the path on disk; sorted.

    Links to folders are followed, but not to one that the link lies in.
    """
    found = []
    apart = {os.path.realpath(path) for path in ignored}
    top = folder.resolve()
    above = {folder: frozenset(map(str, (top, *top.parents)))}
    for place, folders, files in os.walk(folder, followlinks=True):
        real = {name: os.path.realpath(Path(place, name)) for name in folders}
        kept = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        # what a run wrote below the images is not the user's
        kept = [name for name in kept if not _is_run(Path(place, name))]
        around = above.pop(Path(place))
        folders[:] = [name for name in kept if real[name] not in apart and real[name] not in around]
        above |= {Path(place, name): around | {real[name]} for name in folders}
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


def _find_images(
    folder: Path, masks: Path | None
) -> tuple[dict[str, Path], dict[str, Skip], dict[str, str]]:
    """Images by id below a folder, but not its truth; and those of names that are refused.

    The third are the endings of all other files, by their name and by that without its ending.
    """
    apart = [folder / name for name in ("masks", "parts", "lists")]
    if masks is not None and masks.resolve().is_relative_to(folder.resolve()):
        apart.append(folder / masks.resolve().relative_to(folder.resolve()))
    images: dict[str, Path] = {}
    skipped: dict[str, Skip] = {}
    unread: dict[str, str] = {}
    for name, path in _walk(folder, apart):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            if path.suffix:
                unread |= dict.fromkeys((name, name.removesuffix(path.suffix)), path.suffix)
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
    return images, skipped, unread


def _resolve(text: str, names: Mapping[str, str]) -> str | None:
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
        parts = json.loads(read_text(path, how))
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}). {how}") from error
    values = list(parts.values()) if isinstance(parts, dict) else []
    right = all(type(value) is int and BACKGROUND < value < IGNORE for value in values)
    if not values or not right or len(set(values)) != len(values):
        raise DataError(f"{path} is wrong. {how}")
    return {normal_name(name): value for name, value in parts.items()}


def _read_lists(
    folder: Path, names: Mapping[str, str], items: Mapping[str, Item], skipped: dict[str, Skip]
) -> dict[str, tuple[str, ...]]:
    lists = {}
    for path in sorted(folder.glob("*.txt")):
        if path.stem == "all":
            raise DataError(f"{path} is refused: 'all' is the list of every image; rename it")
        ids = []
        for number, line in enumerate(read_text(path, "Write one image a line.").splitlines(), 1):
            if not line.strip():
                continue
            where = f"lists/{path.name} line {number}"
            name = image_name(line, where)
            image_id = _resolve(name, names)
            if image_id is not None:
                ids.append(image_id)
            else:
                skipped.setdefault(name, Skip(name, f"{where} has no image of that name"))
        check_unique(ids, str(path))
        lists[path.stem] = tuple(image_id for image_id in ids if image_id in items)
    return lists
