"""MS COCO and files laid out like its ``instances_*.json``: labels, lists, and masks painted.

Image-level labels are the categories of all annotations of an image, crowds included; masks are
painted from those that are no crowds (specification of data sets, sections 2 and 3). The annotation
file is streamed once and only an index of it is kept: outlines are read again, image by image, when
masks are painted. Outlines need pycocotools (extra ``coco``), labels do not.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpcam.data.classes import choose_classes
from lpcam.data.coco_files import (
    ALL,
    LABELLED,
    find_files,
    find_image,
    image_folders,
    listing_of,
)
from lpcam.data.coco_index import CocoAnnotations, changed, counted, file_state
from lpcam.data.coco_masks import Crowds, Order, check_options, paint
from lpcam.data.folder import IMAGE_SUFFIXES
from lpcam.data.images import upright_size
from lpcam.data.items import BACKGROUND, IGNORE, ClassTable, Dataset, Item, Skip, safe_id
from lpcam.data.labels import relative_name
from lpcam.errors import ArtefactError, DataError, ImageError
from lpcam.masks import write_mask
from lpcam.parallel import ordered_map
from lpcam.storage import digest_file, read_json, write_json

logger = logging.getLogger(__name__)

PAINTED = "painted.json"

COCO_CATEGORIES = (
    (1, "person"),
    (2, "bicycle"),
    (3, "car"),
    (4, "motorcycle"),
    (5, "airplane"),
    (6, "bus"),
    (7, "train"),
    (8, "truck"),
    (9, "boat"),
    (10, "traffic light"),
    (11, "fire hydrant"),
    (13, "stop sign"),
    (14, "parking meter"),
    (15, "bench"),
    (16, "bird"),
    (17, "cat"),
    (18, "dog"),
    (19, "horse"),
    (20, "sheep"),
    (21, "cow"),
    (22, "elephant"),
    (23, "bear"),
    (24, "zebra"),
    (25, "giraffe"),
    (27, "backpack"),
    (28, "umbrella"),
    (31, "handbag"),
    (32, "tie"),
    (33, "suitcase"),
    (34, "frisbee"),
    (35, "skis"),
    (36, "snowboard"),
    (37, "sports ball"),
    (38, "kite"),
    (39, "baseball bat"),
    (40, "baseball glove"),
    (41, "skateboard"),
    (42, "surfboard"),
    (43, "tennis racket"),
    (44, "bottle"),
    (46, "wine glass"),
    (47, "cup"),
    (48, "fork"),
    (49, "knife"),
    (50, "spoon"),
    (51, "bowl"),
    (52, "banana"),
    (53, "apple"),
    (54, "sandwich"),
    (55, "orange"),
    (56, "broccoli"),
    (57, "carrot"),
    (58, "hot dog"),
    (59, "pizza"),
    (60, "donut"),
    (61, "cake"),
    (62, "chair"),
    (63, "couch"),
    (64, "potted plant"),
    (65, "bed"),
    (67, "dining table"),
    (70, "toilet"),
    (72, "tv"),
    (73, "laptop"),
    (74, "mouse"),
    (75, "remote"),
    (76, "keyboard"),
    (77, "cell phone"),
    (78, "microwave"),
    (79, "oven"),
    (80, "toaster"),
    (81, "sink"),
    (82, "refrigerator"),
    (84, "book"),
    (85, "clock"),
    (86, "vase"),
    (87, "scissors"),
    (88, "teddy bear"),
    (89, "hair drier"),
    (90, "toothbrush"),
)
"""Ids and names of the 80 categories of COCO 2014; class ``n`` has the value ``n + 1`` in masks."""

_MOST_CLASSES = IGNORE - BACKGROUND - 1
_KIND = "masks painted from COCO annotations"
_COCO_LIST = re.compile(r"(train|val)2014")
_PLAIN = re.compile(r"(\w+)(\.\w+)", re.ASCII)


class CocoFolder:
    """The data set of one or several annotation files and their images.

    ``root`` is an annotation file or a folder. In a folder the annotation file of a list NAME is
    the first that exists of ``annotations/instances_NAME.json``, ``annotations/NAME.json``,
    ``NAME/_annotations.coco.json`` and ``NAME.json``; a single ``annotations.json`` or
    ``_annotations.coco.json`` will do too. Its images are looked for in ``NAME``, ``images/NAME``,
    ``images``, the folder itself, and beside the annotation file.

    Each file gives the lists NAME, all its images in ascending order of their ids, and
    ``NAME.labelled``, those of them with a label; ``all`` and ``all.labelled`` unite the files that
    were read. An item's id is its file name without extension, after ``NAME/``. Without it are the
    ids of a file whose images all have COCO's own names (``COCO_NAME_000000000009``), of one that
    is the only one of its folder, and of one that is itself the root. So an image has the same id
    whichever lists are read. Classes are the categories in ascending order of their ids, with mask
    values from 1 on.
    """

    dataset: Dataset
    """Without masks. ``skipped`` holds the images whose file is not there."""
    annotations: tuple[CocoAnnotations, ...]
    """The index of each file that was read."""

    def __init__(
        self,
        root: Path,
        *,
        lists: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Read the annotation files, and find their images.

        Args:
            lists: names of those that are wanted; only the files that they need are read. None, as
                ``all``, reads every file of the first of the places above that has any.
            classes: names of categories in label order; all if None. Others are not labelled, and
                masks keep all mask values.
            progress: called with the bytes read so far and those of all annotation files.

        Raises:
            DataError: if there is no such file or list, no image of a wanted list is there, two
                files have different categories, there are more than 254, a class is unknown, two
                images have the same id or a file name leaves the folder, and as
                :meth:`CocoAnnotations.read`.
        """
        folder, files, found = find_files(root, lists)
        total = sum(file_state(path)[0] for path in files.values())
        done = 0

        def advance(read: int, _: int) -> None:
            if progress is not None:
                progress(done + read, total)

        indices = []
        for path in files.values():
            indices.append(CocoAnnotations.read(path, progress=advance))
            done += indices[-1].state[0]
        self.annotations = tuple(indices)
        whole = _table(self.annotations)
        self._values = {
            number: value
            for (number, _), value in zip(
                self.annotations[0].categories, whole.mask_ids, strict=True
            )
        }
        self._paintable = [index.paintable() for index in indices]
        table = choose_classes(whole, classes)
        begins = [
            "" if [index.path] == [*found.values()] or _is_own(name, index) else f"{name}/"
            for name, index in zip(files, self.annotations, strict=True)
        ]
        ids = _item_ids(self.annotations, begins)
        # of files in painted.json: as the only one of its folder a file has other ids
        self._names = [begin or name for name, begin in zip(files, begins, strict=True)]
        self._places = {
            name: (number, row) for number, of in enumerate(ids) for row, name in enumerate(of)
        }

        chosen = {whole.names.index(name): n for n, name in enumerate(table.names)}

        @cache
        def labels_of(rows: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(sorted(chosen[row] for row in rows if row in chosen))

        asked = {name.removesuffix(LABELLED) for name in lists or ()}
        items: dict[str, Item] = {}
        skipped: list[Skip] = []
        named: dict[str, list[str]] = {}
        listing = cache(listing_of)
        for (name, path), index, of in zip(files.items(), self.annotations, ids, strict=True):
            places = image_folders(folder, name, path)
            missing = Skip("", f"its image is not in {' or '.join(map(str, places))}")
            named[name] = []
            for image_id, file_name, rows in zip(of, index.file_names, index.labels(), strict=True):
                image = find_image(places, file_name, listing)
                if image is None:
                    skipped.append(replace(missing, id=image_id))
                else:
                    items[image_id] = Item(
                        image_id, image, labels_of(rows), file_name=_on_disk(image, file_name)
                    )
                    named[name].append(image_id)
            if not named[name] and (name in asked or (not items and path == [*files.values()][-1])):
                raise DataError(
                    f"none of the {len(of)} images of {path} is there: {index.file_names[0]!r} is "
                    f"in none of {', '.join(map(str, places))}; put the images there"
                )
        named[ALL] = list(items)
        self.dataset = Dataset(
            name=_name(folder, files, self.annotations[0]),
            classes=table,
            items=items,
            lists={
                key + ending: tuple(i for i in of if not ending or items[i].labels)
                for key, of in named.items()
                for ending in ("", LABELLED)
            },
            label_source=f"annotations ({_file_names(files.values())}), crowds included",
            skipped=tuple(skipped),
            notices=_notices(self.annotations, chosen, items),
        )

    def with_masks(
        self,
        folder: Path,
        ids: Iterable[str],
        *,
        order: Order = "file",
        crowds: Crowds = "background",
        workers: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> Dataset:
        """Paint the masks of images as ``folder/ID.png`` where they are not there yet.

        ``folder/painted.json`` says what the masks were painted from: of each annotation file the
        digest, ``order``, ``crowds`` and the mask values. Where that is no longer so, the old masks
        of that file's images in the folder are removed first; those of files that are not read now
        stay, with what is said of them. A stopped call is taken up again by the next one. The files
        are the same for any number of workers.

        An image has no mask where an object of it has no outline or one that cannot be painted, and
        where its file has another size than the annotations say. A notice and a warning tell how
        many there are and the first reason. Outlines of crowds count with ``crowds="void"`` alone.

        Args:
            ids: of items.
            order, crowds: as of :func:`paint`.
            workers: images painted at a time.
            progress: called after each mask with the number of those that are there and that of
                all.

        Returns:
            The data set with ``mask`` set for these items.

        Raises:
            DataError: for an unknown id, ``order`` or ``crowds``, and where the annotation file has
                changed since it was read.
            ArtefactError: if a file that would be written is there and was not painted here, or
                one cannot be written.
            LpcamError: if pycocotools is missing (for polygons).
        """
        check_options(order, crowds)
        wanted = list(dict.fromkeys(ids))
        unknown = [name for name in wanted if name not in self.dataset.items]
        if unknown:
            raise DataError(f"{unknown[0]!r} is no image of {self.dataset.name}")
        options = {
            "order": order,
            "crowds": crowds,
            "mask_ids": [[number, value] for number, value in self._values.items()],
        }
        files = self._prepare(folder, options)
        wanted = [name for name in wanted if self.outlined(name)]
        known = {n: why for of in self._names for n, why in files[of]["unpaintable"].items()}
        faults = {name: known[name] for name in wanted if name in known}
        wanted = [name for name in wanted if name not in faults]
        paths = {name: folder / f"{name}.png" for name in wanted}
        listing = cache(listing_of)
        missing = [n for n, path in paths.items() if path.name not in listing(path.parent)]

        def make(name: str) -> tuple[str, bool] | None:
            """What is wrong, and whether it is so until the annotation file changes."""
            if (other := self._other_size(name)) is not None:
                return other, False
            number, row = self._places[name]
            index = self.annotations[number]
            annotations = index.annotations(row)
            if crowds == "background":
                annotations = [one for one in annotations if not one.get("iscrowd")]
            size = int(index.heights[row]), int(index.widths[row])
            try:
                mask = paint(annotations, size, self._values, order=order, crowds=crowds)
            except DataError as error:
                return str(error), True
            write_mask(paths[name], mask)
            return None

        there = [("", None)] * (len(wanted) - len(missing))
        painted = zip(missing, ordered_map(make, missing, workers), strict=True)
        lasting = False
        for count, (name, fault) in enumerate(itertools.chain(there, painted), start=1):
            if fault is not None:
                faults[name], lasts = fault
                if lasts:
                    files[self._names[self._places[name][0]]]["unpaintable"][name] = faults[name]
                lasting |= lasts
            if progress is not None:
                progress(count, len(wanted))
        if lasting:
            _write_record(folder, files)
        items = {
            name: replace(item, mask=paths[name]) if name in paths and name not in faults else item
            for name, item in self.dataset.items.items()
        }
        notices = self.dataset.notices
        if faults:
            first = next(name for name in self._places if name in faults)
            number, row = self._places[first]
            index = self.annotations[number]
            notice = (
                f"{counted(len(faults), 'image has', 'images have')} no true mask, the first for "
                f"this reason: {index.path}, image {index.file_names[row]}: {faults[first]}"
            )
            logger.warning("%s", notice)
            notices = (*notices, notice)
        return replace(self.dataset, items=items, notices=notices)

    def true_mask(self, name: str) -> tuple[NDArray[np.uint8] | None, tuple[str, ...]]:
        """The mask of an image as :meth:`with_masks` paints it, and all that is wrong with it.

        Nothing is written. The mask, uint8 (H, W), is None where the image has none. Broken
        outlines of crowds are told, though they spoil no mask; that an annotation has a box alone
        is not, see ``dataset.notices``.

        Raises:
            DataError: if the annotation file has changed since it was read.
            LpcamError: if pycocotools is missing (for polygons).
        """
        number, row = self._places[name]
        index = self.annotations[number]
        size = int(index.heights[row]), int(index.widths[row])
        outlined = [one for one in index.annotations(row) if one.get("segmentation")]

        def attempt(of: list[dict[str, Any]]) -> tuple[NDArray[np.uint8] | None, list[str]]:
            try:
                return paint(of, size, self._values, crowds="void"), []
            except DataError as error:
                if len(of) < 2:
                    return None, [str(error)]
                return None, [fault for one in of for fault in attempt([one])[1]]

        mask, faults = attempt([one for one in outlined if not one.get("iscrowd")])
        faults += attempt([one for one in outlined if one.get("iscrowd")])[1]
        if (other := self._other_size(name)) is not None:
            mask, faults = None, [other, *faults]
        told = tuple(dict.fromkeys(f"{index.path}: {fault}" for fault in faults))
        return mask if self._paintable[number][row] else None, told

    def outlined(self, name: str) -> bool:
        """Whether every object of an image has an outline, so that it can have a true mask."""
        number, row = self._places[name]
        return bool(self._paintable[number][row])

    def _other_size(self, name: str) -> str | None:
        """Words for an image whose file has another size than the annotations say."""
        number, row = self._places[name]
        index = self.annotations[number]
        try:
            height, width = upright_size(self.dataset.items[name].image)
        except ImageError:  # told where images are looked at
            return None
        told = int(index.heights[row]), int(index.widths[row])
        if told == (height, width):
            return None
        turned = told == (width, height)
        return (
            f"the file says {told[0]} x {told[1]} (height x width), the upright image is "
            f"{height} x {width}; "
            + (
                "if it was outlined without its EXIF rotation, remove that from the image"
                if turned
                else "give the image that was outlined"
            )
        )

    def _prepare(self, folder: Path, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Make the folder one in which every mask of this data set is what ``options`` ask for.

        Returns what is recorded of each annotation file, by its name in the record.
        """
        path = folder / PAINTED
        before = read_json(path) if path.exists() else None
        if before is not None and (not isinstance(before, dict) or before.get("kind") != _KIND):
            raise ArtefactError(f"{path} is another's, so it may be yours; choose another folder")
        known: dict[str, dict[str, Any]] = before.get("files", {}) if before else {}
        ids: list[list[str]] = [[] for _ in self.annotations]
        for image_id, (number, _) in self._places.items():
            ids[number].append(image_id)
        files = {
            name: {
                "digest": _digest(index),
                "options": options,
                "ids_begin": os.path.commonprefix(of),  # noqa: RUF071 - of characters
                "unpaintable": {},
            }
            for name, index, of in zip(self._names, self.annotations, ids, strict=True)
        }
        same = {
            name
            for name, of in files.items()
            if all(known.get(name, {}).get(key) == of[key] for key in ("digest", "options"))
        }
        if len(same) == len(files):
            return known
        stale = [name not in same for name in self._names]
        listing = cache(listing_of)
        masks = [folder / f"{i}.png" for i, (number, _) in self._places.items() if stale[number]]
        old = [mask for mask in masks if mask.name in listing(mask.parent)]
        if old and before is None:
            raise ArtefactError(
                f"{old[0]} is there already and was not painted here (there is no {PAINTED}), so "
                "it may be yours; choose another folder"
            )
        # A stop before the record is written leaves only masks that the old one is right about.
        for mask in old:
            mask.unlink(missing_ok=True)
        removed = [mask.relative_to(folder).as_posix() for mask in old]
        known = {
            name: of
            for name, of in known.items()
            # a file that is not read now may have had some of them
            if name in same or not any(mask.startswith(of["ids_begin"]) for mask in removed)
        }
        files = {**known, **{name: of for name, of in files.items() if name not in same}}
        _write_record(folder, files)
        return files


def _write_record(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    write_json(folder / PAINTED, {"format": 2, "kind": _KIND, "files": files})


def _digest(index: CocoAnnotations) -> str:
    digest = digest_file(index.path)
    if file_state(index.path) != index.state:
        raise changed(index.path)
    return digest


def _file_names(paths: Collection[Path]) -> str:
    """Names of the files, with their folders' where they have the same."""
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.parent.name}/{path.name}" for path in paths]
    return ", ".join(names)


def _name(folder: Path, files: Iterable[str], index: CocoAnnotations) -> str:
    if index.categories == COCO_CATEGORIES and all(map(_COCO_LIST.fullmatch, files)):
        return "coco14"
    return folder.resolve().name


def _table(indices: Sequence[CocoAnnotations]) -> ClassTable:
    first = indices[0]
    for other in indices[1:]:
        if other.categories != first.categories:
            different = sorted({*first.categories} ^ {*other.categories})
            raise DataError(
                f"{first.path} and {other.path} have different categories, first "
                f"{different[0][0]} ({different[0][1]}); read them one at a time"
            )
    if len(first.categories) > _MOST_CLASSES:
        raise DataError(
            f"{first.path} has {len(first.categories)} categories; a mask of 8 bits has room for "
            f"{_MOST_CLASSES}: leave categories out of the file"
        )
    names = tuple(name for _, name in first.categories)
    if "background" in (name.casefold() for name in names):
        raise DataError(
            f"{first.path}, categories, names the background; leave it out, its mask value is 0"
        )
    try:
        return ClassTable(names, tuple(range(1, len(names) + 1)))
    except DataError as error:
        raise DataError(f"{first.path}, categories: {error}") from error


def _is_own(name: str, index: CocoAnnotations) -> bool:
    """Whether all images of a list have the names that COCO gives them, which no other list has."""
    own = re.compile(rf"COCO_{re.escape(name)}_\d{{12}}\.\w+", re.ASCII)
    return all(map(own.fullmatch, index.file_names))


def _item_ids(indices: Sequence[CocoAnnotations], begins: Sequence[str]) -> list[list[str]]:
    """Ids of the items of each file, each with its beginning."""
    ids = []
    owners: dict[str, CocoAnnotations] = {}
    for index, begin in zip(indices, begins, strict=True):
        of: dict[str, str] = {}
        for file_name in index.file_names:
            image_id = begin + _item_id(index.path, file_name)
            if image_id in of:
                raise DataError(
                    f"{index.path}: images {of[image_id]!r} and {file_name!r} have the same id "
                    f"{image_id!r}; rename one of them"
                )
            of[image_id] = file_name
        ids.append(list(of))
        for image_id in owners.keys() & of.keys():
            raise DataError(
                f"{owners[image_id].path} and {index.path} both have an image of the id "
                f"{image_id!r}; rename one of them"
            )
        owners |= dict.fromkeys(of, index)
    return ids


def _item_id(path: Path, file_name: str) -> str:
    plain = _PLAIN.fullmatch(file_name)
    if plain and plain[2].lower() in IMAGE_SUFFIXES:  # as all of COCO: much quicker
        return plain[1]
    try:
        name = safe_id(unicodedata.normalize("NFC", relative_name(file_name)))
        name.encode()
    except DataError as error:
        raise DataError(f"{path}, file_name: {error}") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{path}: file_name {file_name!r} is no Unicode; rename it") from error
    suffix = PurePosixPath(name).suffix
    return safe_id(name.removesuffix(suffix)) if suffix.lower() in IMAGE_SUFFIXES else name


def _on_disk(image: Path, file_name: str) -> str:
    """A file name as it is spelt on disk, in whatever Unicode form and with whatever slashes."""
    return "/".join(image.parts[-1 - relative_name(file_name).count("/") :])


def _notices(
    indices: Sequence[CocoAnnotations],
    labelled: Mapping[int, int],
    items: Mapping[str, Item],
) -> tuple[str, ...]:
    """What is worth knowing of labels and masks.

    Args:
        labelled: label index by category row.
    """
    names = [name for _, name in indices[0].categories]
    everything = np.concatenate([index.category_rows for index in indices])
    of_crowd = np.concatenate([index.crowds for index in indices])
    crowds = np.bincount(everything[of_crowd], minlength=len(names)).tolist()
    objects = np.bincount(everything[~of_crowd], minlength=len(names)).tolist()
    notices = []
    if any(crowds):
        alone = sum(
            len({*whole} - {*seen})
            for index in indices
            for whole, seen in zip(index.labels(), index.labels(crowds=False), strict=True)
        )
        of_crowds = counted(
            sum(crowds),
            "annotation is of a crowd: it counts as a label and is not painted",
            "annotations are of crowds: they count as labels and are not painted",
        )
        from_crowds = counted(
            alone,
            "label of an image comes from a crowd alone, and has no pixels in masks",
            "labels of images come from crowds alone, and have no pixels in masks",
        )
        notices.append(f"{of_crowds}; {from_crowds}")
    only_crowds = [names[row] for row in labelled if crowds[row] and not objects[row]]
    if only_crowds:
        notices.append(
            f"of {', '.join(only_crowds)} there are only crowds: labels, but no pixels in masks"
        )
    dropped = {
        name: objects[row] + crowds[row]
        for row, name in enumerate(names)
        if row not in labelled and objects[row] + crowds[row]
    }
    if dropped:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(dropped.items()))
        notices.append(
            counted(
                sum(dropped.values()),
                "annotation of a class not chosen gives no label",
                "annotations of classes not chosen give no label",
            )
            + f": {counts}"
        )
    boxes = sum(int((~index.outlined & ~index.crowds).sum()) for index in indices)
    if boxes:
        images = sum(int((~index.paintable()).sum()) for index in indices)
        notices.append(
            f"{counted(boxes, 'annotation has', 'annotations have')} no outline, perhaps a box "
            f"alone: {counted(images, 'image has', 'images have')} labels, but no true masks"
        )
    unlabelled = sum(not item.labels for item in items.values())
    if unlabelled:
        have = "has" if unlabelled == 1 else "have"
        notices.append(f"{unlabelled} of {len(items)} images {have} no label")
    return tuple(notices)
