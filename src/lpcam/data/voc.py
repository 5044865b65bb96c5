"""PASCAL VOC 2012 and folders laid out like it.

Image-level labels come from ``Annotations`` only, never from masks: all ``<object>`` names,
difficult objects included, person parts not (specification of data sets, section 1).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar
from xml.etree import ElementTree

from lpcam.data import labels as tables
from lpcam.data.dataset import (
    ClassTable,
    Dataset,
    Item,
    Skip,
    check_known,
    check_unique,
    files_by_id,
    safe_id,
    with_mask_folder,
    without_suffix,
)
from lpcam.data.image_files import unnamed
from lpcam.data.images import IMAGE_SUFFIXES
from lpcam.data.reader import ListName, Opened, Reader, Request
from lpcam.runtime.errors import DataError, nearest_name, shortened

_NAMES = """aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike
person pottedplant sheep sofa train tvmonitor"""
CLASSES = tuple(_NAMES.split())
"""The 20 classes in label order; class ``n`` has the value ``n + 1`` in masks."""
CLASS_NAMES = "class_names.txt"
"""File of a folder laid out like VOC with other classes: one per line, from mask value 1 on."""
LISTS = PurePosixPath("ImageSets/Segmentation")  #: Folder of the lists.
_MAIN = PurePosixPath("ImageSets/Main")  # that of detection, where there is no other
_PERSON_PARTS = ("head", "hand", "foot")
"""Names that VOC's person layout has beside objects; they are not classes."""
_INTEGER_ID = re.compile(r"\d{10}")


def read_voc(root: Path, **options: Any) -> Dataset:
    """Read lists of a VOC folder: ids, image-level labels and the mask paths that exist.

    An image whose file or annotation is missing or damaged is left out, with the reason. A notice
    counts objects of unknown names, which give no label.

    Args:
        root: the folder ``VOC2012``, the ``VOCdevkit`` that holds it, or the parent of that.
        options: values of :class:`lpcam.data.reader.Request`. Its ``lists`` are names of
            ``ImageSets/Segmentation/NAME.txt``. A line is an id (``2007_000063`` or
            ``2007000063``), paths of an image and its mask, or a pair of images and a class.

    Raises:
        DataError: if the folder, a list or a class is wrong or missing or doubtful, or no image is
            left.
    """
    root, request = find_root(root), Request(root, **options)
    labels, masks, no_class = request.labels, request.masks, request.no_class
    lists, own = request.lists or _list_names(root), root / CLASS_NAMES
    names = tables.read_names(own, request.separator) if own.is_file() else CLASSES
    images = files_by_id(root / "JPEGImages", IMAGE_SUFFIXES)
    drawn = {} if masks else files_by_id(root / "SegmentationClass", (".png",))
    wanted = {name: read_list(root, name, images) for name in lists}
    labelled = {i for name, ids in wanted.items() if name not in request.unlabelled for i in ids}
    given: Mapping[str, set[str]] | None = None
    first, repeated = dict.fromkeys(no_class, ""), tuple[str, ...]()
    if isinstance(labels, Path):
        split = partial(tables.split_labels, separator=request.separator, known={*no_class, *names})
        found = tables.read_labels(labels, split)
        short = re.compile("^JPEGImages/")
        given, repeated = tables.labels_by_image(found, lambda i: without_suffix(short.sub("", i)))
        first = found.places
    rules: dict[str, Any] = {"own": own.is_file(), "masked": masks is not None or bool(drawn)}
    rules |= {"labels": first, "no_class": no_class}
    table = ClassTable.numbered(names, own, request.classes, **rules)
    items: dict[str, Item] = {}
    skipped: dict[str, Skip] = {}
    counted: Counter[str] = Counter()
    for image_id in dict.fromkeys(i for ids in wanted.values() for i in ids):
        try:
            if image_id not in images:
                raise DataError(f"there is no image {root / 'JPEGImages' / image_id}.jpg")
            present = _present(root, image_id, image_id in labelled, given)
        except DataError as error:
            skipped[image_id] = Skip(image_id, str(error))
            continue
        counted.update(present)
        shown = tuple(n for n, name in enumerate(table.names) if name in present)
        items[image_id] = Item(image_id, images[image_id], shown, drawn.get(image_id))
    if not items:
        reason = next(iter(skipped.values())).reason if skipped else "no list was named"
        raise DataError(
            f"no image of the lists {', '.join(lists)} can be used: {reason}; a table gives labels "
            "too: --labels FILE.csv"
        )
    for name in no_class:
        check_known(name, (*names, *counted, *first), "no class: ")
    known = {*names, *_PERSON_PARTS, *no_class}
    counts = [
        f"{name!r} in {count}{nearest_name(name, names)}"
        for name, count in sorted(counted.items(), key=lambda one: (-one[1], one[0]))
        if name not in known
    ]
    notice = (
        f"objects of unknown classes give no label, by the number of images: {shortened(counts)}; "
        f"list other classes in {own}, one per line"
    )
    if counts and not ({*names} & {*counted} and (own.is_file() or request.classes or labels)):
        raise DataError(f"there are the classes {shortened(names, 20)}; {notice}, all of them")
    dataset = Dataset(
        name="voc12" if names == CLASSES else root.resolve().name,
        classes=table,
        items=items,
        lists={name: tuple(i for i in ids if i in items) for name, ids in wanted.items()},
        label_source=labels.name if isinstance(labels, Path) else "Annotations (XML)",
        skipped=tuple(skipped.values()),
        notices=(
            *repeated,
            *(notice,) * bool(counts),
            *unnamed((item.image for item in items.values()), "no list that was read"),
        ),
    )
    return dataset if masks is None else with_mask_folder(dataset, masks)


def find_root(path: Path) -> Path:
    """The folder ``VOC2012``, or of another year, at or below a path; DataError if none is."""
    years = ("VOC2012", "VOC20[01][0-9]")
    below = (one for y in years for up in ("", "VOCdevkit/") for one in sorted(path.glob(up + y)))
    for folder in (path, *below):
        if (folder / LISTS).is_dir() or (folder / _MAIN).is_dir():
            return folder
    raise DataError(
        f"{path} is not a VOC folder; expected VOC2012 (or a folder that holds VOC2012 or "
        f"VOCdevkit/VOC2012) with {LISTS}, JPEGImages and Annotations"
    )


def read_list(root: Path, name: str, images: Collection[str] = ()) -> tuple[str, ...]:
    """Ids of a list in the forms of `read_voc`; those of ``images`` may have blanks."""
    path = _lists(root) / f"{safe_id(name)}.txt"
    if not path.is_file():
        known = ", ".join(_list_names(root)) or "none"
        raise DataError(f"list {name!r} is missing: there is no {path}; the lists are {known}")
    lines = tables.read_text(path, "Write one image id per line.").splitlines()
    found = {n: _line_ids(images, line, f"{path} line {n}") for n, line in enumerate(lines, 1)}
    ids = [image_id for one in found.values() for image_id in one]
    if not ids:
        raise DataError(f"list {path} is empty; write one image id per line")
    if all(len(one) < 2 for one in found.values()):
        check_unique(ids, f"list {path}", [n for n, one in found.items() if one])
    return tuple(dict.fromkeys(ids))


def _list_names(root: Path) -> list[str]:
    """The lists, without those of detection that are of one class (``cow_train``)."""
    folder = _lists(root)
    names = sorted(path.stem for path in folder.glob("*.txt"))
    of_class = {n for n in names if "_" in n and n.rpartition("_")[2] in names}
    return [name for name in names if folder == root / LISTS or name not in of_class]


def _lists(root: Path) -> Path:
    """The folder of lists: that of segmentation, or of detection if it alone has some."""
    found = (root / place for place in (LISTS, _MAIN) if any((root / place).glob("*.txt")))
    return next(found, root / LISTS)


def _line_ids(stored: Collection[str], line: str, where: str) -> list[str]:
    """The ids of a line, several for a pair of images."""
    names, whole = line.split(), line.strip()
    images = [PurePosixPath(word).stem for word in names if without_suffix(word) != word]
    if len(names) > 1 and (whole in stored or without_suffix(whole) in stored):
        names = [whole if whole in stored else without_suffix(whole)]
    elif images:  # of an image and a mask often one name
        names = [*dict.fromkeys(images)]
    elif len(names) > 1:
        raise DataError(
            f"{where} reads {line!r}; expected an id (an id with blanks needs the image "
            f"JPEGImages/{whole}.jpg), or the paths of an image and a mask"
        )
    # lists of integers drop the underscore of YYYY_NNNNNN
    names = [f"{n[:4]}_{n[4:]}" if _INTEGER_ID.fullmatch(n) else n for n in names]
    try:
        return [safe_id(name) for name in names]
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _present(
    root: Path, image_id: str, labelled: bool, given: Mapping[str, set[str]] | None
) -> set[str]:
    if given is not None:
        if labelled and image_id not in given:
            raise DataError(f"the file of labels has no line of {image_id}; add one")
        return given.get(image_id, set())
    path = root / "Annotations" / f"{image_id}.xml"
    if not path.is_file():
        if labelled:
            raise DataError(f"there is no annotation {path}")
        return set()
    try:
        text = path.read_text("utf-8-sig")
        # entities can expand without limit or name other files
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise DataError(f"annotation {path} has a DOCTYPE or ENTITY, which is not read")
        document = ElementTree.fromstring(text)
    except (OSError, UnicodeDecodeError, ElementTree.ParseError) as error:
        raise DataError(f"annotation {path} cannot be read: {error}") from error
    return {tables.normal_name(name.text or "") for name in document.findall("object/name")}


class VocReader(Reader):
    """The layout of PASCAL VOC 2012."""

    means = "the layout of PASCAL VOC 2012"
    usual_lists: ClassVar[Mapping[ListName, str]] = {
        **dict.fromkeys(("prototypes", "maps", "evaluate"), "train"),
        "classify": "train_aug",
        "test": "val",
    }

    takes = ("labels", "separator", "no_class")
    how_to_label = f"name objects in Annotations as the classes, or list others in {CLASS_NAMES}"

    def recognises(self, path: Path) -> bool:
        """Whether it is a folder with VOC's lists."""
        with suppress(DataError):
            return bool(_list_names(find_root(path)))
        return False

    def open(self, request: Request) -> Opened:
        """Read labels from annotations, or from a table."""
        return Opened(read_voc(**vars(request)))


READER = VocReader()
