"""A user's own folder: images, their labels, and optional classes, lists, masks and parts.

::

    folder/
      labels.csv          image,labels      (or another form of lpcam.data.labels, or labels.jsonl)
      images/             images, in subfolders if wanted; without it they are in the folder itself
      classes.txt         optional: one class per line; the first has the value 1 in masks
      lists/NAME.txt      optional: one image per line
      masks/ID.png        optional: true masks for the evaluation
      parts/ID.png        optional: true masks of parts, with parts.json {"head": 1, ...}

With ``labels="folders"`` the folders of the image folder are the classes: ``images/cow/7.jpg``. An
image's id is its path below the image folder without the extension, in Unicode form NFC.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lpcam.data import labels as tables
from lpcam.data.dataset import (
    IGNORE,
    NAMES,
    ClassTable,
    Dataset,
    Item,
    Skip,
    check_unique,
    safe_id,
    skip_lines,
    with_mask_folder,
    without_suffix,
)
from lpcam.data.image_files import list_images, other_format
from lpcam.data.images import IMAGE_SUFFIXES
from lpcam.data.reader import Opened, Reader, Request
from lpcam.runtime.errors import DataError, shortened

_OWN = frozenset([*tables.TABLES, "classes.txt", "parts.json", "recipe.yaml", "import.json"])
_NO_CLASS = re.compile("|".join(NAMES["folders"]))
"""Names of folders, in lower case, that mean something else than a class."""
_TRUTH = frozenset(["mask", "masks", "label", "labels", "annotations", "ground_truth", "gt"])


def read_folder(root: Path, **options: Any) -> Dataset:
    """Read a user's folder (layout above): every labelled image, and lists with one named ``all``.

    The table may name an image with or without its extension and a leading ``images/``. Classes are
    those of ``classes.txt``, else of the table or the folders, sorted, with mask ids from 1. A row
    without an image and an image without a row are left out, with the reason.

    Args:
        options: values of :class:`lpcam.data.reader.Request`. Its ``labels`` are a table in any
            folder; or ``"folders"``: the label of ``cow/barn/7`` is ``cow``; or None:
            ``labels.csv`` or ``labels.jsonl`` of the folder.

    Raises:
        DataError: naming the file and line that is wrong, doubtful or missing.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> _ = (folder / "labels.csv").write_text("image,labels\\na.jpg,cow;dog\\n")
        >>> (folder / "a.jpg").touch()
        >>> read_folder(folder).items["a"].labels
        (0, 1)
    """
    request = Request(root, **options)
    labels, masks = request.labels, request.masks
    if not root.is_dir():
        raise DataError(
            f"there is no folder {root}; give the folder that holds labels.csv or, in a run, set "
            "data.root in its recipe.yaml"
        )
    images_root = root / "images" if (root / "images").is_dir() else root
    path = labels if isinstance(labels, Path) else None
    if labels is None:
        path = next((root / name for name in tables.TABLES if (root / name).is_file()), None)
    # names that lpcam import wrote are one each
    separator = request.separator or (";" if (root / "import.json").is_file() else None)
    listed = root / "classes.txt"
    own = tables.read_names(listed, separator) if listed.is_file() else None
    split = partial(
        tables.split_labels, separator=separator, known={*request.no_class, *(own or ())}
    )
    table = None if path is None else tables.read_labels(path, split)
    images, skipped, notices = _find_images(root, images_root, masks, path)
    if path is None and labels is None and (found := other_format(root)):
        raise DataError(f"{root} has no table of labels, but {found}")
    if not images and skipped:
        lines = skip_lines([*skipped.values()], "files cannot be used")
        raise DataError("\n".join([f"there is no image below {images_root}", *lines]))
    if table is None:
        notices += [f"{name} is not used" for name in tables.TABLES if (root / name).is_file()]
        of = _class_folders(root, images_root, images, skipped, own or (), asked=labels is None)
        rows = tuple(tables.LabelRow(0, i, split(name, i)) for i, name in of.items())
        table = tables.LabelTable(images_root, rows)
    elif not images:
        raise DataError(
            f"there are no images below {images_root}; put files such as cow_1.jpg there "
            f"(extensions {' '.join(sorted(IMAGE_SUFFIXES))}) and name them in {table.path.name}"
        )
    names, first = own or table.classes, table.places
    chosen = request.classes and [*map(tables.normal_name, request.classes)]
    if names is None and separator is None:
        tables.check_label_names(first, numbers=path is None or {*first} <= {*(chosen or ())})
    classes = ClassTable.numbered(
        names,
        listed if own else table.path,
        chosen,
        labels=first,
        no_class=[*map(tables.normal_name, request.no_class)],
        own=own is not None,
        masked=masks is not None or (root / "masks").is_dir(),
    )

    present = _labels_by_image(table, images, images_root, skipped, notices)
    for image_id in images.keys() - present.keys() - skipped.keys():
        skipped[image_id] = Skip(image_id, f"it has no line in {table.path.name}; add one")
    dropped = Counter(
        n for of_image in present.values() for n in of_image if n not in classes.names
    )
    if dropped:
        counts = shortened([f"{name} {count}" for name, count in sorted(dropped.items())], 20)
        notices.append(f"dropped labels that are no class or were not chosen: {counts}")

    truth = {} if masks is not None else _find_masks(root / "masks", images, notices)
    part_names = _read_parts(root / "parts.json")
    parts = _find_masks(root / "parts", images, notices)
    if parts and not part_names:
        notices.append("parts/ is not used: parts.json with the value of each part is missing")
    items = {}
    for i in sorted(present):
        shown = tuple(n for n, name in enumerate(classes.names) if name in present[i])
        file_name = images[i].relative_to(images_root).as_posix()
        part = parts.get(i) if part_names else None
        items[i] = Item(i, images[i], shown, truth.get(i), part, file_name)
    lists = _read_lists(root / "lists", images, items, skipped)
    dataset = Dataset(
        name=root.resolve().name,
        classes=classes,
        items=items,
        lists={**lists, "all": tuple(items)},
        label_source="folders of the images" if path is None else path.name,
        skipped=tuple(skipped[i] for i in sorted(skipped)),
        notices=tuple(notices),
        part_names=part_names if parts else {},
    )
    return dataset if masks is None else with_mask_folder(dataset, masks)


def _class_folders(
    root: Path,
    images_root: Path,
    images: Iterable[str],
    skipped: dict[str, Skip],
    own: Collection[str],
    *,
    asked: bool,
) -> dict[str, str]:
    """The folder of each image as its label; DataError if it means something else or is asked."""
    reason = "it is in no folder of a class and no table of labels is used; move it into one"
    skipped |= {image_id: Skip(image_id, reason) for image_id in images if "/" not in image_id}
    inside = [image_id.split("/") for image_id in images if "/" in image_id]
    counts = Counter(parts[0] for parts in inside)
    shown = shortened([f"{name} ({number} images)" for name, number in sorted(counts.items())], 12)
    these = f"the folders of {images_root} are {shown}"
    found = [p for p in sorted(root.iterdir()) if p.suffix.lower() in (".csv", ".tsv", ".jsonl")]
    table = f"; if {found[0].name} is the table: --labels {found[0]}" if found and asked else ""
    if not inside:
        path = root / "labels.csv"
        raise DataError(
            f"there is no {path}; {tables.HOW}. Without it images lie in one folder "
            f"a class, such as {images_root / 'cow' / '1.jpg'}{table}"
        )
    if truth := next((p for p in inside if _TRUTH & {n.casefold() for n in p[1:-1]}), None):
        raise DataError(
            f"{images_root / '/'.join(truth)} seems to be no image but a mask, by its folder "
            f"{truth[-2]!r}; move masks to {root / 'masks'}, one ID.png an image"
        )
    wrong = [n for n in sorted(counts) if _NO_CLASS.fullmatch(n.casefold()) and n not in own]
    nested = sorted({parts[0] for parts in inside if len(parts) > 2})
    if nested and (len(wrong) == len(counts) or ([*counts] == nested[:1] and not own)):
        one = next((name for name in nested if "train" in name.casefold()), nested[0])
        raise DataError(
            f"{these}, which hold the folders of the classes; give one of them with --labels "
            f"folders: {images_root / one}"
        )
    if wrong:
        raise DataError(
            f"{these}, of which {', '.join(wrong)} mean something else than a class; write a "
            "labels.csv, move them away or, if they are classes, list all classes in "
            f"classes.txt{table}"
        )
    inner = Counter(name for _, name in {(p[0], p[1]) for p in inside if len(p) > 2})
    own_names = not any(n > 1 or _NO_CLASS.fullmatch(m.casefold()) for m, n in inner.items())
    if own_names and not own and all(len(parts) > 2 for parts in inside):
        raise DataError(
            f"{these}, and each holds folders of other names ({shortened(sorted(inner))}); give "
            f"one of them, {images_root / nested[0]}, or, if the outer folders are the classes, "
            "list them in classes.txt"
        )
    if asked:
        raise DataError(
            f"{root} has no labels.csv or labels.jsonl; its folders are {shown}. If each is a "
            f"class, give --labels folders (in a recipe data.labels: folders){table}"
        )
    return {"/".join(parts): parts[0] for parts in inside}


def _labels_by_image(
    table: tables.LabelTable,
    images: Collection[str],
    images_root: Path,
    skipped: dict[str, Skip],
    notices: list[str],
) -> dict[str, set[str]]:
    """Class names by image id, of all rows that name an image."""
    unread = {key: s for s in skipped.values() for key in (s.id, s.id.rpartition(".")[0])}
    for row in (row for row in table.rows if _image_id(row.image, images) is None):
        where = f"{table.path.name} line {row.line}"
        name = row.image.removeprefix("images/")
        if skip := unread.get(name) or unread.get(without_suffix(name)):
            skipped[skip.id] = Skip(skip.id, f"{where}: {skip.reason}")
        else:
            reason = f"{where} has no image below {images_root}"
            skipped.setdefault(row.image, Skip(row.image, reason))
    present, repeated = tables.labels_by_image(table, lambda name: _image_id(name, images))
    if not present:
        name = table.rows[0].image
        ending = f"/{without_suffix(name)}"
        near = next((one for one in images if one.endswith(ending)), next(iter(images)))
        raise DataError(
            f"none of the {len(table.rows)} images of {table.path} is below {images_root}: it "
            f"names {name!r}, the folder holds {near!r}; {tables.HOW}"
        )
    notices += repeated
    return present


def _find_images(
    root: Path, folder: Path, masks: Path | None, table: Path | None
) -> tuple[dict[str, Path], dict[str, Skip], list[str]]:
    """Images by id below a folder; files that are not read, with reasons; what else is there."""
    ignored = [place / name for place in (root, folder) for name in ("masks", "parts", "lists")]
    ignored += [masks] if masks else []
    found = list_images(folder, ignored, {*_OWN, table.name if table else ""})
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
    if folder == root:
        return images, skipped, [*found.notices]
    beside = list_images(root, [*ignored, folder])
    names = [name for name, _ in beside.images] + [skip.id for skip in beside.unread]
    text = f"images outside {folder}, which are not read: {len(names)} ({shortened(names)})"
    return images, skipped, [*found.notices, *(text,) * bool(names)]


def _image_id(text: str, images: Collection[str]) -> str | None:
    """The id of an image named with or without its extension and a leading ``images/``."""
    short = text.removeprefix("images/")
    names = (text, without_suffix(text), short, without_suffix(short))
    return next((name for name in names if name in images), None)


def _find_masks(folder: Path, images: Collection[str], notices: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    files = list_images(folder)
    notices += [f"{folder.name}/: {notice}" for notice in files.notices]
    for name, path in files.images:
        image_id = name.removesuffix(path.suffix)
        if path.suffix.lower() == ".png" and image_id in images:
            found.setdefault(image_id, path)
    used = {*found.values()}
    unused = [name for name, path in files.images if path not in used]
    if unknown := [skip.id for skip in files.unread] + unused:
        how = "belong to no image; they are called ID.png, as the image without its extension"
        text = f"{len(unknown)} files ({shortened(unknown)}) {how}"
        if not found:
            raise DataError(f"{folder}: none of its masks is used: {text}")
        notices.append(f"{folder.name}/: {text}")
    return found


def _read_parts(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    how = 'Write {"NAME": VALUE, ...} with different values from 1 to 254.'
    try:
        parts = json.loads(tables.read_text(path, how))
        values = {value for value in parts.values() if type(value) is int}
        if not values or len(values) < len(parts) or not values <= {*range(1, IGNORE)}:
            raise ValueError("wrong values")
    except (AttributeError, ValueError) as error:
        raise DataError(f"{path} is wrong ({error}). {how}") from error
    return {tables.normal_name(name): value for name, value in parts.items()}


def _read_lists(
    folder: Path, images: Collection[str], items: Mapping[str, Item], skipped: dict[str, Skip]
) -> dict[str, tuple[str, ...]]:
    lists = {}
    for path in sorted(folder.glob("*.txt")):
        if path.stem == "all":
            raise DataError(f"{path} is refused: 'all' is the list of every image; rename it")
        lines = {}
        for where, name in tables.read_lines(path):
            if image_id := _image_id(name, images):
                lines[where.rpartition(" ")[2]] = image_id
            else:
                skipped.setdefault(name, Skip(name, f"{where} has no image of that name"))
        check_unique(lines.values(), str(path), lines)
        lists[path.stem] = tuple(image_id for image_id in lines.values() if image_id in items)
    return lists


class FolderReader(Reader):
    """Images with a table of labels, or in a folder for each class."""

    means = "images and their labels; masks/ID.png, where there are any, serve scoring"
    chooses_lists = False
    takes = ("labels", "folders", "separator", "no_class")
    how_to_label = "label some in labels.csv, or see that --no-class names no class"

    def recognises(self, path: Path) -> bool:
        """Whether it is a folder with a table of labels, whatever else it holds."""
        return any((path / name).is_file() for name in tables.TABLES)

    def open(self, request: Request) -> Opened:
        """Read labels from a table or from the names of folders."""
        return Opened(read_folder(**vars(request)))


READER = FolderReader()
