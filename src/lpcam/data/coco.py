"""MS COCO and files laid out like its ``instances_*.json``: labels, lists, and masks painted.

Image-level labels are the categories of all annotations of an image, crowds included; masks are
painted from those that are no crowds (specification of data sets, sections 2 and 3). The annotation
file is streamed once and only an index of it is kept: outlines are read again, image by image, when
masks are painted. Outlines need pycocotools (extra ``coco``), labels do not.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import unicodedata
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpcam.data.classes import choose_classes
from lpcam.data.coco_masks import Crowds, Order, check_options, paint
from lpcam.data.folder import IMAGE_SUFFIXES
from lpcam.data.images import upright_size
from lpcam.data.items import BACKGROUND, IGNORE, ClassTable, Dataset, Item, Skip, safe_id
from lpcam.data.json_stream import Member, stream_arrays
from lpcam.data.labels import relative_name
from lpcam.errors import ArtefactError, DataError, ImageError
from lpcam.masks import write_mask
from lpcam.parallel import ordered_map
from lpcam.storage import digest_file, read_json, write_json

logger = logging.getLogger(__name__)

ALL = "all"
LABELLED = ".labelled"
"""Ending of the list of those images that show at least one class."""
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
_ROBOFLOW = "_annotations.coco.json"
_INSTANCES = "instances_"
_COCO_LIST = re.compile(r"(train|val)2014")
_ANY_JSON = ("annotations.json", "*.json")
_HEAD = 2**20
_JSON_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:(?=\s*\[))?|[\[\]{}]', re.DOTALL)
_PLAIN = re.compile(r"(\w+)(\.\w+)", re.ASCII)
_HOW = (
    "an annotation file has 'images' with id, file_name, height and width, 'annotations' with id, "
    "image_id, category_id, iscrowd and segmentation, and 'categories' with id and name"
)


# -- The index of an annotation file -------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CocoAnnotations:
    """An index of one annotation file: everything but its outlines, whose places are kept.

    Images are rows in ascending order of their ids. The annotations of image row ``i`` are the
    entries ``starts[i]`` to ``starts[i + 1]`` of the arrays per annotation, in the order of the
    file.
    """

    path: Path
    image_ids: NDArray[np.int64]
    """(I,) ascending."""
    file_names: tuple[str, ...]
    """(I,) as they stand in the file."""
    heights: NDArray[np.int32]
    """(I,) pixels."""
    widths: NDArray[np.int32]
    """(I,) pixels."""
    starts: NDArray[np.int64]
    """(I + 1,)."""
    annotation_ids: NDArray[np.int64]
    """(A,)."""
    category_rows: NDArray[np.int32]
    """(A,) places in ``categories``."""
    crowds: NDArray[np.bool_]
    """(A,) whether the outline is of a group of objects."""
    outlined: NDArray[np.bool_]
    """(A,) whether there is an outline; some files have boxes alone."""
    areas: NDArray[np.float64]
    """(A,) pixels, as the file says; NaN where it says nothing."""
    offsets: NDArray[np.int64]
    """(A,) of the annotation in the file, in bytes."""
    lengths: NDArray[np.int64]
    """(A,) bytes."""
    categories: tuple[tuple[int, str], ...]
    """Ids and names, ascending by id."""
    state: tuple[int, int]
    """Size and time of change of the file when it was read, to know it again."""

    @classmethod
    def read(
        cls, path: Path, *, progress: Callable[[int, int], None] | None = None
    ) -> CocoAnnotations:
        """Stream an annotation file once.

        Args:
            progress: called with the bytes read so far and those of the file.

        Raises:
            DataError: naming the file and place, if it is no JSON, lacks one of the three arrays,
                or an entry of them lacks a field or has a wrong one: an id that stands twice, a
                size that is not positive, an annotation of an image or a category that the file
                does not have.
        """
        state = _state(path)
        images: dict[int, tuple[str, int, int]] = {}
        categories: dict[int, str] = {}
        columns = _Columns()
        seen = set()
        readers: dict[str, Callable[[Iterator[Member]], None]] = {
            "images": lambda members: _read_images(path, members, images),
            "annotations": lambda members: columns.read(path, members),
            "categories": lambda members: _read_categories(path, members, categories),
        }
        for key, members in stream_arrays(path, readers, progress=progress):
            seen.add(key)
            readers[key](members)
        for key in readers:
            if key not in seen:
                raise DataError(f"{path} has no {key!r}; {_HOW}")
        if not images or not categories:
            empty = "categories" if images else "images"
            raise DataError(f"{path} has an empty {empty!r}; {_HOW}")

        image_ids = np.array(sorted(images), dtype=np.int64)
        category_ids = np.array(sorted(categories), dtype=np.int64)
        owners = columns.rows(path, columns.images, image_ids, "image_id", "images")
        rows = columns.rows(path, columns.categories, category_ids, "category_id", "categories")
        columns.check_unique(path)
        order = np.argsort(owners, kind="stable")
        places = np.arange(len(image_ids) + 1)
        return cls(
            path=path,
            image_ids=image_ids,
            file_names=tuple(images[i][0] for i in image_ids.tolist()),
            heights=np.array([images[i][1] for i in image_ids.tolist()], dtype=np.int32),
            widths=np.array([images[i][2] for i in image_ids.tolist()], dtype=np.int32),
            starts=np.searchsorted(owners[order], places),
            annotation_ids=_array(columns.ids, np.int64)[order],
            category_rows=rows[order].astype(np.int32),
            crowds=_array(columns.crowds, np.int8)[order].astype(np.bool_),
            outlined=_array(columns.outlined, np.int8)[order].astype(np.bool_),
            areas=_array(columns.areas, np.float64)[order],
            offsets=_array(columns.offsets, np.int64)[order],
            lengths=_array(columns.lengths, np.int64)[order],
            categories=tuple((i, categories[i]) for i in category_ids.tolist()),
            state=state,
        )

    def annotations(self, image_row: int) -> list[dict[str, Any]]:
        """The annotations of an image, read again from the file, in the order of the file.

        Raises:
            DataError: if the file cannot be read or has changed since it was indexed.
        """
        found = []
        try:
            with open(self.path, "rb") as file:
                for row in range(self.starts[image_row], self.starts[image_row + 1]):
                    file.seek(int(self.offsets[row]))
                    found.append(json.loads(file.read(int(self.lengths[row]))))
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror or error}") from error
        except ValueError as error:
            raise _changed(self.path) from error
        ids = self.annotation_ids[self.starts[image_row] : self.starts[image_row + 1]].tolist()
        if [one["id"] if isinstance(one, dict) else None for one in found] != ids:
            raise _changed(self.path)
        return found

    def paintable(self) -> NDArray[np.bool_]:
        """(I,) whether every object of an image has an outline, so that it can have a mask."""
        owners = np.repeat(np.arange(len(self.image_ids)), np.diff(self.starts))
        bare = np.bincount(owners[~self.crowds & ~self.outlined], minlength=len(self.image_ids))
        paintable: NDArray[np.bool_] = bare == 0
        return paintable

    def labels(self, *, crowds: bool = True) -> list[tuple[int, ...]]:
        """Of each image row, the ascending rows of ``categories`` that its annotations have.

        Args:
            crowds: whether those of crowds count.
        """
        count = len(self.categories)
        owners = np.repeat(np.arange(len(self.image_ids)), np.diff(self.starts))
        pairs = owners * count + self.category_rows
        pairs = np.unique(pairs if crowds else pairs[~self.crowds])
        rows = (pairs % count).tolist()
        ends = np.searchsorted(pairs, np.arange(len(self.image_ids) + 1) * count).tolist()
        return [tuple(rows[a:b]) for a, b in itertools.pairwise(ends)]


def _state(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return stat.st_size, stat.st_mtime_ns


def _changed(path: Path) -> DataError:
    return DataError(f"{path} has changed since its index was read; read it again")


def _array(values: array[Any], dtype: type[np.generic]) -> NDArray[Any]:
    return np.frombuffer(values, dtype=dtype)


class _Columns:
    """What is kept of annotations, in the order of the file: a few numbers each."""

    def __init__(self) -> None:
        self.ids = array("q")
        self.images = array("q")
        self.categories = array("q")
        self.crowds = array("b")
        self.outlined = array("b")
        self.areas = array("d")
        self.offsets = array("q")
        self.lengths = array("q")

    def read(self, path: Path, members: Iterator[Member]) -> None:
        for value, offset, length in members:
            try:
                number, image, category = value["id"], value["image_id"], value["category_id"]
                crowd, area = value.get("iscrowd"), value.get("area")
                if not (type(number) is int and type(image) is int and type(category) is int):
                    raise TypeError("id, image_id and category_id are whole numbers")
                if crowd not in (0, 1, None):
                    raise TypeError("iscrowd is 0 or 1")
                # an array refuses a number that it cannot hold
                self.ids.append(number)
                self.images.append(image)
                self.categories.append(category)
                self.crowds.append(1 if crowd else 0)
                self.outlined.append(1 if value.get("segmentation") else 0)
                self.areas.append(math.nan if area is None else area)
                self.offsets.append(offset)
                self.lengths.append(length)
            except (KeyError, TypeError, AttributeError, OverflowError) as error:
                raise _wrong(path, "an annotation", value, offset, error) from error

    def rows(
        self,
        path: Path,
        values: array[int],
        known: NDArray[np.int64],
        field: str,
        table: str,
    ) -> NDArray[np.int64]:
        """Places of the ids in the ascending ids that are known."""
        ids = _array(values, np.int64)
        rows = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        wrong = np.flatnonzero(known[rows] != ids)
        if len(wrong):
            raise DataError(
                f"{path}: annotation {self.ids[wrong[0]]} (byte {self.offsets[wrong[0]]:,}) has "
                f"{field} {ids[wrong[0]]}, which is not in {table!r} "
                f"({_count(len(wrong), 'annotation is', 'annotations are')} like that); add it "
                "there or leave them out"
            )
        return rows

    def check_unique(self, path: Path) -> None:
        ids = np.sort(_array(self.ids, np.int64))
        repeated = ids[1:][ids[1:] == ids[:-1]]
        if len(repeated):
            raise DataError(
                f"{path}: annotation id {repeated[0]} stands twice "
                f"({_count(len(repeated), 'id is', 'ids are')} like that); give each annotation an "
                "id of its own"
            )


def _wrong(path: Path, what: str, value: Any, offset: int, error: Exception) -> DataError:
    number = value.get("id") if isinstance(value, dict) else None
    reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    if not isinstance(value, dict):
        reason = f"it is {json.dumps(value):.40}, not an object"
    return DataError(f"{path}: {what} (id {number}, byte {offset:,}) is wrong: {reason}; {_HOW}")


def _read_images(
    path: Path, members: Iterator[Member], images: dict[int, tuple[str, int, int]]
) -> None:
    for value, offset, _ in members:
        try:
            number, name = value["id"], value["file_name"]
            height, width = value["height"], value["width"]
            if type(number) is not int or not -(2**63) <= number < 2**63:
                raise TypeError("id is a whole number of 64 bits")
            if not isinstance(name, str):
                raise TypeError("file_name is text")
            for size in (height, width):
                if type(size) is not int or not 0 < size < 2**31:
                    raise TypeError(
                        f"height {height!r} and width {width!r} are pixels, whole numbers from 1 on"
                    )
        except (KeyError, TypeError) as error:
            raise _wrong(path, "an image", value, offset, error) from error
        if number in images:
            raise DataError(
                f"{path}: image id {number} stands twice (byte {offset:,}); give each image an id "
                "of its own"
            )
        images[number] = name, height, width


def _read_categories(path: Path, members: Iterator[Member], categories: dict[int, str]) -> None:
    for value, offset, _ in members:
        try:
            number, name = value["id"], value["name"]
            if type(number) is not int or not -(2**63) <= number < 2**63:
                raise TypeError("id is a whole number of 64 bits")
            if not isinstance(name, str) or not name.strip():
                raise TypeError("name is text")
        except (KeyError, TypeError) as error:
            raise _wrong(path, "a category", value, offset, error) from error
        if number in categories:
            raise DataError(
                f"{path}: category id {number} stands twice (byte {offset:,}); give each category "
                "an id of its own"
            )
        categories[number] = unicodedata.normalize("NFC", name.strip())


# -- A data set ----------------------------------------------------------------------------------


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
        folder, files, found = _find_files(root, lists)
        total = sum(_state(path)[0] for path in files.values())
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
        listing = cache(_listing)
        for (name, path), index, of in zip(files.items(), self.annotations, ids, strict=True):
            places = _image_folders(folder, name, path)
            missing = Skip("", f"its image is not in {' or '.join(map(str, places))}")
            named[name] = []
            for image_id, file_name, rows in zip(of, index.file_names, index.labels(), strict=True):
                image = _find_image(places, file_name, listing)
                if image is None:
                    skipped.append(replace(missing, id=image_id))
                else:
                    items[image_id] = Item(image_id, image, labels_of(rows))
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
        wanted = [
            name for name in wanted if self._paintable[self._places[name][0]][self._places[name][1]]
        ]
        known = {n: why for of in self._names for n, why in files[of]["unpaintable"].items()}
        faults = {name: known[name] for name in wanted if name in known}
        wanted = [name for name in wanted if name not in faults]
        paths = {name: folder / f"{name}.png" for name in wanted}
        listing = cache(_listing)
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
                f"{_count(len(faults), 'image has', 'images have')} no true mask, the first for "
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
        listing = cache(_listing)
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
    if _state(index.path) != index.state:
        raise _changed(index.path)
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


def _find_files(
    root: Path, lists: Sequence[str] | None
) -> tuple[Path, dict[str, Path], dict[str, Path]]:
    """The data set's folder, and by list the annotation files to be read, and all it has."""
    if root.is_file():
        name = _list_name(root)
        wrong = [n for n in lists or () if n.removesuffix(LABELLED) not in (name, ALL)]
        if wrong:
            raise DataError(
                f"{root} has no list {wrong[0]!r}; it has {name}, {ALL} and, of images with a "
                f"label, {name}{LABELLED} and {ALL}{LABELLED}"
            )
        folder = root.parent.parent if root.parent.name == "annotations" else root.parent
        return folder, {name: root}, {name: root}
    if not root.is_dir():
        raise DataError(f"there is no {root}; give an annotation file or a folder that holds one")
    found = annotation_files(root)
    wanted: dict[str, Path] = {}
    for given in lists if lists is not None else (ALL,):
        name = safe_id(given.removesuffix(LABELLED))
        path = next((p for p in _places(root, name) if p.is_file()), found.get(name))
        if path is not None:
            wanted[name] = path
        elif name == ALL and found:
            wanted |= found
        else:
            known = f"the lists are {', '.join([*found, ALL])}" if found else "there is none at all"
            raise DataError(
                f"list {given!r} is missing: there is no "
                f"{' or '.join(p.relative_to(root).as_posix() for p in _places(root, name))} in "
                f"{root}; {known}"
            )
    if not wanted:
        raise DataError(f"no list of {root} was named; the lists are {', '.join([*found, ALL])}")
    return root, wanted, found


def _places(root: Path, name: str) -> list[Path]:
    """Where the annotation file of a list may be."""
    return [
        root / "annotations" / f"{_INSTANCES}{name}.json",
        root / "annotations" / f"{name}.json",
        root / name / _ROBOFLOW,
        root / f"{name}.json",
    ]


def annotation_files(root: Path) -> dict[str, Path]:
    """The annotation files of a folder, by list, of the first place that has any.

    COCO's own ``annotations`` has captions and key points too, which are none. Of files that may
    be anything by their names those count that have arrays of images and annotations.
    """
    for pattern in (
        f"annotations/{_INSTANCES}*.json",
        "annotations/*.json",
        f"*/{_ROBOFLOW}",
        _ROBOFLOW,
        "annotations.json",
        "*.json",
    ):
        found = {
            _list_name(path): path
            for path in sorted(root.glob(pattern))
            if path.is_file() and (pattern not in _ANY_JSON or _has_annotations(path))
        }
        if found:
            return found
    return {}


def _has_annotations(path: Path) -> bool:
    """Whether the object of a JSON file has arrays of images and annotations.

    Only the head is read: where it is not all, one of them is enough, as an array may be large.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD + 1)
    except OSError:
        return False
    depth, found = 0, set()
    for token in _JSON_TOKEN.finditer(head[:_HEAD].decode("utf-8-sig", "replace")):
        if token[0] in "{[":
            depth += 1
        elif token[0] in "}]":
            depth -= 1
        elif depth == 1 and token[1] in ("images", "annotations") and token[2]:
            found.add(token[1])
    return len(found) == 2 or (bool(found) and len(head) > _HEAD)


def _list_name(path: Path) -> str:
    if path.name == _ROBOFLOW:
        return path.resolve().parent.name or ALL
    if path.name == "annotations.json":
        return ALL
    return safe_id(path.stem.removeprefix(_INSTANCES))


def _image_folders(root: Path, name: str, path: Path) -> tuple[Path, ...]:
    places = (root / name, root / "images" / name, root / "images", root, path.parent)
    return tuple(dict.fromkeys(places))


def _listing(folder: Path) -> dict[str, str]:
    """The names of a folder's files, by their form NFC; none where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {unicodedata.normalize("NFC", e.name): e.name for e in entries if e.is_file()}
    except OSError:
        return {}


def _find_image(
    places: Sequence[Path], file_name: str, listing: Callable[[Path], Mapping[str, str]]
) -> Path | None:
    parent, _, name = unicodedata.normalize("NFC", relative_name(file_name)).rpartition("/")
    for place in places:
        folder = place / parent if parent else place
        stored = listing(folder).get(name)
        if stored is not None:
            return folder / stored
    return None


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
        of_crowds = _count(
            sum(crowds),
            "annotation is of a crowd: it counts as a label and is not painted",
            "annotations are of crowds: they count as labels and are not painted",
        )
        from_crowds = _count(
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
            _count(
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
            f"{_count(boxes, 'annotation has', 'annotations have')} no outline, perhaps a box "
            f"alone: {_count(images, 'image has', 'images have')} labels, but no true masks"
        )
    unlabelled = sum(not item.labels for item in items.values())
    if unlabelled:
        have = "has" if unlabelled == 1 else "have"
        notices.append(f"{unlabelled} of {len(items)} images {have} no label")
    return tuple(notices)


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"
