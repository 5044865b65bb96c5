"""A user's own folder: images, their labels, and optional classes, lists, masks and parts.

::

    folder/
      labels.csv          image,labels      (or another form of lpcam.data.labels, or labels.jsonl)
      images/             images, in subfolders if wanted; without it they are in the folder itself
      classes.txt         optional: one class per line; the first has the value 1 in masks
      lists/NAME.txt      optional: one image per line
      masks/ID.png        optional: true masks for the evaluation
      parts/ID.png        optional: true masks of parts, with parts.json {"head": 1, ...}

Without a table of labels the folders of the image folder are the classes: ``images/cow/7.jpg``.

An image's id is its path below the image folder without the extension, in Unicode form NFC.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from lpcam.data.dataset import (
    IGNORE,
    ClassTable,
    Dataset,
    Item,
    Skip,
    check_known,
    check_unique,
    choose_classes,
    safe_id,
    skip_lines,
    with_mask_folder,
    without_suffix,
)
from lpcam.data.image_files import list_images
from lpcam.data.images import IMAGE_SUFFIXES
from lpcam.data.labels import (
    TABLES,
    LabelRow,
    LabelTable,
    how_to_write,
    normal_name,
    read_labels,
    read_lines,
    read_names,
    read_text,
)
from lpcam.data.reader import Opened, Reader, Request
from lpcam.runtime.errors import DataError, shortened

_OWN = frozenset([*TABLES, "classes.txt", "parts.json", "recipe.yaml", "import.json"])
_SPLITS = frozenset(["train", "training", "val", "valid", "validation", "test", "testing"])


def read_folder(
    root: Path,
    *,
    classes: Sequence[str] | None = None,
    labels: Path | Literal["folders"] | None = None,
    masks: Path | None = None,
) -> Dataset:
    """Read a user's folder (layout above): every labelled image, and lists with one named ``all``.

    The table may name an image with or without its extension and a leading ``images/``; an empty
    labels cell is an image that shows no class. Classes are those of ``classes.txt``, else of the
    table or the folders, sorted, with mask ids from 1. A row without an image and an image without
    a row are left out, with the reason; the labels of repeated rows are united.

    Args:
        classes: names to choose, in label order; all if None. They keep their mask ids.
        labels: a table in any folder; or ``"folders"``: the label of ``cow/barn/7`` is ``cow``.
            None: ``labels.csv`` or ``labels.jsonl`` of the folder, else ``"folders"``.
        masks: a folder of ``ID.png`` to use instead of ``masks`` of the folder.

    Raises:
        DataError: naming the file and line that is wrong or missing.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> _ = (folder / "labels.csv").write_text("image,labels\\na.jpg,cow;dog\\n")
        >>> (folder / "a.jpg").touch()
        >>> read_folder(folder).items["a"].labels
        (0, 1)
    """
    if not root.is_dir():
        raise DataError(
            f"there is no folder {root}; give the folder that holds labels.csv or, in a run, set "
            "data.root in its recipe.yaml"
        )
    images_root = root / "images" if (root / "images").is_dir() else root
    path = labels if isinstance(labels, Path) else None
    if labels is None:
        path = next((root / name for name in TABLES if (root / name).is_file()), None)
    table = None if path is None else read_labels(path)
    own = {*_OWN, *((path.name,) if path else ())}
    images, skipped, others = _find_images(images_root, masks, own)
    notices = [*others]
    if not images and skipped:
        lines = skip_lines([*skipped.values()], "files cannot be used")
        raise DataError(f"there is no image below {images_root}; {'; '.join(lines)}")
    if table is None:
        table = _table_of_folders(root, images_root, images, skipped)
        if labels is None:
            notices.append(
                f"there is no labels.csv or labels.jsonl: the folders below {images_root} are the "
                f"classes, {shortened(table.classes or ())}"
            )
    elif not images:
        raise DataError(
            f"there are no images below {images_root}; put files such as cow_1.jpg there "
            f"(extensions {' '.join(sorted(IMAGE_SUFFIXES))}) and name them in {table.path.name}"
        )
    whole = _read_classes(root / "classes.txt", table)
    chosen = choose_classes(whole, None if classes is None else [normal_name(c) for c in classes])

    present = _labels_by_image(table, images, images_root, skipped, notices)
    for image_id in images.keys() - present.keys() - skipped.keys():
        skipped[image_id] = Skip(image_id, f"it has no line in {table.path.name}; add one")
    dropped = Counter(n for of_image in present.values() for n in of_image if n not in chosen.names)
    if dropped:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(dropped.items()))
        notices.append(f"dropped labels of classes that were not chosen: {counts}")

    truth = {} if masks is not None else _find_masks(root / "masks", images, notices)
    part_names = _read_parts(root / "parts.json")
    parts = _find_masks(root / "parts", images, notices)
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
    lists = _read_lists(root / "lists", images, items, skipped)
    dataset = Dataset(
        name=root.resolve().name,
        classes=chosen,
        items=items,
        lists={**lists, "all": tuple(items)},
        label_source="folders of the images" if path is None else path.name,
        skipped=tuple(skipped[i] for i in sorted(skipped)),
        notices=tuple(notices),
        part_names=part_names if parts else {},
    )
    return dataset if masks is None else with_mask_folder(dataset, masks)


def _table_of_folders(
    root: Path, images_root: Path, images: Iterable[str], skipped: dict[str, Skip]
) -> LabelTable:
    """The table in which each image has its folder as the label; images in none are skipped."""
    reason = "it is in no folder of a class and no table of labels is used; move it into one"
    skipped |= {image_id: Skip(image_id, reason) for image_id in images if "/" not in image_id}
    inside = [image_id.split("/") for image_id in images if "/" in image_id]
    if not inside:
        path = root / "labels.csv"
        raise DataError(
            f"there is no {path}; {how_to_write(path)}. Without it images lie in one folder a "
            f"class, such as {images_root / 'cow' / '1.jpg'}"
        )
    tops = sorted({parts[0] for parts in inside})
    nested = sorted({parts[0] for parts in inside if len(parts) > 2})
    if nested and all(top.casefold() in _SPLITS for top in tops):
        one = "train" if "train" in nested else nested[0]
        raise DataError(
            f"the folders of {images_root} are {', '.join(tops)} and hold the folders of the "
            f"classes; give one of them, {images_root / one}"
        )
    rows = [LabelRow(0, "/".join(parts), (normal_name(parts[0]),)) for parts in inside]
    return LabelTable(images_root, tuple(rows), tuple(sorted({*map(normal_name, tops)})))


def _read_classes(path: Path, table: LabelTable) -> ClassTable:
    """The classes of classes.txt, else of the table."""
    names: Sequence[str] = table.classes or sorted({n for row in table.rows for n in row.labels})
    names, source = (read_names(path), path) if path.is_file() else (names, table.path)
    classes = ClassTable.numbered(names, source)
    for name in table.classes or ():
        check_known(name, classes.names, f"{table.path}: ")
    for row in table.rows:
        for name in row.labels:
            check_known(name, classes.names, f"{table.path} line {row.line}: ")
    return classes


def _labels_by_image(
    table: LabelTable,
    images: Collection[str],
    images_root: Path,
    skipped: dict[str, Skip],
    notices: list[str],
) -> dict[str, set[str]]:
    """Class names by image id, of all rows that name an image."""
    unread = {key: s for s in skipped.values() for key in (s.id, s.id.rpartition(".")[0])}
    present: dict[str, set[str]] = {}
    lines: dict[str, list[str]] = {}
    for row in table.rows:
        image_id = _image_id(row.image, images)
        if image_id is not None:
            present.setdefault(image_id, set()).update(row.labels)
            lines.setdefault(image_id, []).append(str(row.line))
            continue
        where = f"{table.path.name} line {row.line}"
        if skip := unread.get(row.image) or unread.get(row.image.removeprefix("images/")):
            skipped[skip.id] = Skip(skip.id, f"{where}: {skip.reason}")
        else:
            reason = f"{where} has no image below {images_root}"
            skipped.setdefault(row.image, Skip(row.image, reason))
    if not present:
        raise DataError(
            f"none of the {len(table.rows)} images of {table.path} is below {images_root}: it "
            f"names {table.rows[0].image!r}, the folder holds {next(iter(images))!r}; "
            f"{how_to_write(table.path)}"
        )
    repeated = [f"{i} (lines {', '.join(n)})" for i, n in lines.items() if len(n) > 1]
    if repeated:
        notices.append(
            f"{table.path.name} has several lines of {shortened(repeated)}; their labels were "
            "united"
        )
    return present


def _find_images(
    folder: Path, masks: Path | None, own: Collection[str]
) -> tuple[dict[str, Path], dict[str, Skip], tuple[str, ...]]:
    """Images by id below a folder; files that are not read, with reasons; what else is there."""
    ignored = [folder / "masks", folder / "parts", folder / "lists", *([masks] if masks else [])]
    found = list_images(folder, ignored, own)
    images: dict[str, Path] = {}
    skipped = {skip.id: skip for skip in found.unread}
    for name, path in found.images:
        image_id = without_suffix(name)
        if image_id in images:
            raise DataError(
                f"{images[image_id]} and {path} have the same id {image_id!r}; rename one of them"
            )
        try:
            images[safe_id(image_id)] = path
        except DataError as error:
            skipped[image_id] = Skip(image_id, str(error))
    return images, skipped, found.notices


def _image_id(text: str, images: Collection[str]) -> str | None:
    """The id of an image named with or without its extension and a leading ``images/``."""
    short = text.removeprefix("images/")
    names = (text, without_suffix(text), short, without_suffix(short))
    return next((name for name in names if name in images), None)


def _find_masks(folder: Path, images: Collection[str], notices: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    files = list_images(folder)
    unknown = [skip.id for skip in files.unread]
    notices += [f"{folder.name}/: {notice}" for notice in files.notices]
    for name, path in files.images:
        image_id = name.removesuffix(path.suffix)
        if path.suffix.lower() == ".png" and image_id in images and image_id not in found:
            found[image_id] = path
        else:
            unknown.append(name)
    if unknown:
        notices.append(
            f"{folder.name}/: {shortened(unknown)} belong to no image; they are called ID.png, as "
            "the image without its extension"
        )
    return found


def _read_parts(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    how = 'Write {"NAME": VALUE, ...} with different values from 1 to 254.'
    try:
        parts = json.loads(read_text(path, how))
        values = {value for value in parts.values() if type(value) is int}
        if not values or len(values) < len(parts) or not values <= {*range(1, IGNORE)}:
            raise ValueError("wrong values")
    except (AttributeError, ValueError) as error:
        raise DataError(f"{path} is wrong ({error}). {how}") from error
    return {normal_name(name): value for name, value in parts.items()}


def _read_lists(
    folder: Path, images: Collection[str], items: Mapping[str, Item], skipped: dict[str, Skip]
) -> dict[str, tuple[str, ...]]:
    lists = {}
    for path in sorted(folder.glob("*.txt")):
        if path.stem == "all":
            raise DataError(f"{path} is refused: 'all' is the list of every image; rename it")
        found = [(where, name, _image_id(name, images)) for where, name in read_lines(path)]
        for where, name, image_id in found:
            if image_id is None:
                skipped.setdefault(name, Skip(name, f"{where} has no image of that name"))
        ids = [image_id for _, _, image_id in found if image_id is not None]
        check_unique(ids, str(path))
        lists[path.stem] = tuple(image_id for image_id in ids if image_id in items)
    return lists


class FolderReader(Reader):
    """Images with a table of labels, or in a folder for each class."""

    means = "images and their labels; masks/ID.png, where there are any, serve scoring"
    chooses_lists = False

    def recognises(self, path: Path) -> bool:
        """Whether it is a folder with a table of labels, whatever else it holds."""
        return any((path / name).is_file() for name in TABLES)

    def open(self, request: Request) -> Opened:
        """Read labels from a table or from the names of folders."""
        chosen = {name: getattr(request, name) for name in ("classes", "labels", "masks")}
        return Opened(read_folder(request.root, **chosen))


READER = FolderReader()
