"""An index of a file laid out like COCO's ``instances_*.json``, streamed once.

It holds all but the outlines, whose places in the file are kept: they are read again, image by
image, when masks are painted.
"""

from __future__ import annotations

import itertools
import json
import math
import unicodedata
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpcam.data.json_stream import Member, stream_arrays
from lpcam.errors import DataError

_HOW = (
    "an annotation file has 'images' with id, file_name, height and width, 'annotations' with id, "
    "image_id, category_id, iscrowd and segmentation, and 'categories' with id and name"
)


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
        state = file_state(path)
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
            raise changed(self.path) from error
        ids = self.annotation_ids[self.starts[image_row] : self.starts[image_row + 1]].tolist()
        if [one["id"] if isinstance(one, dict) else None for one in found] != ids:
            raise changed(self.path)
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


def file_state(path: Path) -> tuple[int, int]:
    """Size in bytes and time of change in nanoseconds, by which a file is known again.

    Raises:
        DataError: if there is no file.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return stat.st_size, stat.st_mtime_ns


def changed(path: Path) -> DataError:
    """What to raise where a file's state is no longer that of its index."""
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
                f"({counted(len(wrong), 'annotation is', 'annotations are')} like that); add it "
                "there or leave them out"
            )
        return rows

    def check_unique(self, path: Path) -> None:
        ids = np.sort(_array(self.ids, np.int64))
        repeated = ids[1:][ids[1:] == ids[:-1]]
        if len(repeated):
            raise DataError(
                f"{path}: annotation id {repeated[0]} stands twice "
                f"({counted(len(repeated), 'id is', 'ids are')} like that); give each annotation "
                "an id of its own"
            )


def _wrong(path: Path, what: str, value: Any, offset: int, error: Exception) -> DataError:
    number = value.get("id") if isinstance(value, dict) else None
    reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    if not isinstance(value, dict):
        reason = f"it is {json.dumps(value):.40}, not an object"
    return DataError(f"{path}: {what} (id {number}, byte {offset:,}) is wrong: {reason}; {_HOW}")


def _checked_id(value: Any) -> int:
    number = value["id"]
    if type(number) is not int or not -(2**63) <= number < 2**63:
        raise TypeError("id is a whole number of 64 bits")
    return number


def _twice(path: Path, what: str, number: int, offset: int) -> DataError:
    return DataError(
        f"{path}: {what} id {number} stands twice (byte {offset:,}); give each {what} an id of its "
        "own"
    )


def _read_images(
    path: Path, members: Iterator[Member], images: dict[int, tuple[str, int, int]]
) -> None:
    for value, offset, _ in members:
        try:
            number, name = _checked_id(value), value["file_name"]
            height, width = value["height"], value["width"]
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
            raise _twice(path, "image", number, offset)
        images[number] = name, height, width


def _read_categories(path: Path, members: Iterator[Member], categories: dict[int, str]) -> None:
    for value, offset, _ in members:
        try:
            number, name = _checked_id(value), value["name"]
            if not isinstance(name, str) or not name.strip():
                raise TypeError("name is text")
        except (KeyError, TypeError) as error:
            raise _wrong(path, "a category", value, offset, error) from error
        if number in categories:
            raise _twice(path, "category", number, offset)
        categories[number] = unicodedata.normalize("NFC", name.strip())


def counted(number: int, one: str, several: str) -> str:
    """The number and the words for one or for several."""
    return f"{number} {one if number == 1 else several}"
