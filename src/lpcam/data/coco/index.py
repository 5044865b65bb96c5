"""An index of an annotation file laid out like COCO's ``instances_*.json``, streamed once.

The index holds everything except the outlines. Their byte offsets are kept, and they are read
again, image by image, when masks are painted.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lpcam.data.coco.json_stream import Member, stream_arrays
from lpcam.data.dataset import check_unique
from lpcam.runtime.errors import DataError

_HOW = (
    "an annotation file has 'images' with id, file_name, height and width, 'annotations' with id, "
    "image_id, category_id, iscrowd and segmentation, and 'categories' with id and name"
)
T = TypeVar("T")
_COLUMNS = 7
"""Integers that are kept of each annotation, see :func:`_annotation`."""


@dataclass(frozen=True, eq=False)
class CocoAnnotations:
    """The index of one annotation file.

    Images are rows in ascending order of their ids. The annotations of image row ``i`` are the
    entries ``starts[i]`` to ``starts[i + 1]`` of the arrays of length A, in the order of the file.
    """

    path: Path
    image_ids: NDArray[np.int64]
    """(I,) ascending."""
    file_names: tuple[str, ...]
    """(I,) as in the file."""
    sizes: tuple[tuple[int, int], ...]
    """(I,) height and width in pixels."""
    starts: NDArray[np.int64]
    """(I + 1,)."""
    annotation_ids: NDArray[np.int64]
    """(A,)."""
    category_rows: NDArray[np.int64]
    """(A,) index into ``categories``."""
    crowds: NDArray[np.bool_]
    """(A,) whether the annotation is a crowd (a group of objects)."""
    outlined: NDArray[np.bool_]
    """(A,) whether there is an outline; some files have boxes only."""
    places: NDArray[np.int64]
    """(A, 2) offset and length of the annotation in the file, in bytes."""
    categories: tuple[tuple[int, str], ...]
    """Ids and names, ascending by id."""
    state: tuple[int, int]
    """:func:`file_state` when the file was read."""

    @classmethod
    def read(
        cls, path: Path, *, progress: Callable[[int, int], None] | None = None
    ) -> CocoAnnotations:
        """Stream an annotation file once.

        Args:
            progress: called with the bytes read so far and the size of the file.

        Raises:
            DataError: naming the file and place, if it is not JSON, lacks one of the three arrays,
                an entry has a missing or wrong field, an id occurs twice, or an annotation belongs
                to an unknown image or category.
        """
        state = file_state(path)
        images: list[tuple[int, str, tuple[int, int]]] = []
        categories: list[tuple[int, str]] = []
        values = array("q")
        missing = ["images", "annotations", "categories"]
        for key, members in stream_arrays(path, tuple(missing), progress=progress):
            missing.remove(key)
            if key == "images":
                images = sorted(_parsed(path, "image", members, _image))
            elif key == "categories":
                categories = sorted(_parsed(path, "category", members, _category))
            else:
                for entry in _parsed(path, "annotation", members, _annotation):
                    values.extend(entry)
        for key in missing:
            raise DataError(f"{path} has no {key!r}; {_HOW}")
        if not images or not categories:
            raise DataError(f"{path} has an empty {'categories' if images else 'images'!r}; {_HOW}")

        table = np.frombuffer(values, np.int64).reshape(-1, _COLUMNS)
        image_ids = np.array([number for number, *_ in images])
        category_ids = np.array([number for number, _ in categories])
        check_unique(image_ids.tolist(), f"{path}, image ids,")
        check_unique(category_ids.tolist(), f"{path}, category ids,")
        check_unique(table[:, 0].tolist(), f"{path}, annotation ids,")
        owners = _rows(path, table, 1, image_ids, "image")
        rows = _rows(path, table, 2, category_ids, "category")
        order = np.argsort(owners, kind="stable")
        table = table[order]
        return cls(
            path=path,
            image_ids=image_ids,
            file_names=tuple(name for _, name, _ in images),
            sizes=tuple(size for _, _, size in images),
            starts=np.searchsorted(owners[order], np.arange(len(images) + 1)),
            annotation_ids=table[:, 0],
            category_rows=rows[order],
            crowds=table[:, 3].astype(np.bool_),
            outlined=table[:, 4].astype(np.bool_),
            places=table[:, 5:],
            categories=tuple(categories),
            state=state,
        )

    def annotations(self, image_row: int) -> list[dict[str, Any]]:
        """The annotations of an image, read again from the file, in the order of the file.

        Raises:
            DataError: if the file cannot be read or has changed since it was indexed.
        """
        rows = slice(self.starts[image_row], self.starts[image_row + 1])
        found = []
        try:
            with open(self.path, "rb") as file:
                for offset, length in self.places[rows].tolist():
                    file.seek(offset)
                    found.append(json.loads(file.read(length)))
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror or error}") from error
        except ValueError as error:
            raise self.changed() from error
        ids = [one.get("id") if isinstance(one, dict) else None for one in found]
        if ids != self.annotation_ids[rows].tolist():
            raise self.changed()
        return found

    def changed(self) -> DataError:
        """The error to raise where the file is no longer the one that was indexed."""
        return DataError(f"{self.path} has changed since its index was read; read it again")

    def paintable(self) -> NDArray[np.bool_]:
        """Bool (I,): whether every object of an image has an outline, as masks need."""
        bare = self._owners()[~self.crowds & ~self.outlined]
        return np.asarray(np.bincount(bare, minlength=len(self.image_ids)) == 0)

    def labels(self, *, crowds: bool = True) -> list[tuple[int, ...]]:
        """The ascending category rows of the annotations of each image.

        Args:
            crowds: whether crowds count.
        """
        count = len(self.categories)
        pairs = self._owners() * count + self.category_rows
        pairs = np.unique(pairs if crowds else pairs[~self.crowds])
        rows = (pairs % count).tolist()
        ends = np.searchsorted(pairs, np.arange(len(self.image_ids) + 1) * count).tolist()
        return [tuple(rows[a:b]) for a, b in itertools.pairwise(ends)]

    def _owners(self) -> NDArray[np.int64]:
        """The image row (A,) of each annotation."""
        return np.repeat(np.arange(len(self.image_ids)), np.diff(self.starts))


def file_state(path: Path) -> tuple[int, int]:
    """Size in bytes and time of change in nanoseconds, by which a changed file is noticed.

    Raises:
        DataError: if there is no file.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return stat.st_size, stat.st_mtime_ns


def _parsed(
    path: Path, what: str, members: Iterable[Member], parse: Callable[[Member], T]
) -> Iterator[T]:
    """Parse each entry of an array; DataError names the first that is wrong."""
    for member in members:
        try:
            yield parse(member)
        except (KeyError, TypeError) as error:
            value, offset, _ = member
            number = value.get("id") if isinstance(value, dict) else None
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            if not isinstance(value, dict):
                reason = f"it is {json.dumps(value):.40}, not an object"
            raise DataError(
                f"{path}: {what} (id {number}, byte {offset:,}) is wrong: {reason}; {_HOW}"
            ) from error


def _integer(value: Any, field: str) -> int:
    number = value[field]
    if type(number) is not int or not -(2**63) <= number < 2**63:
        raise TypeError(f"{field} must be an integer of 64 bits, got {number!r}")
    return number


def _image(member: Member) -> tuple[int, str, tuple[int, int]]:
    value = member.value
    number, name = _integer(value, "id"), value["file_name"]
    height, width = value["height"], value["width"]
    if not isinstance(name, str):
        raise TypeError(f"file_name must be text, got {name!r}")
    for size in (height, width):
        if type(size) is not int or not 0 < size < 2**31:
            raise TypeError(f"height and width must be positive integers, got {size!r}")
    return number, name, (height, width)


def _category(member: Member) -> tuple[int, str]:
    number, name = _integer(member.value, "id"), member.value["name"]
    if not isinstance(name, str) or not name.strip():
        raise TypeError(f"name must be text, got {name!r}")
    return number, unicodedata.normalize("NFC", name.strip())


def _annotation(member: Member) -> tuple[int, int, int, int, bool, int, int]:
    """Ids of the annotation, image and category; is a crowd, has an outline; offset, length."""
    value, offset, length = member
    number, image = _integer(value, "id"), _integer(value, "image_id")
    category, crowd = _integer(value, "category_id"), value.get("iscrowd") or 0
    if crowd not in (0, 1):
        raise TypeError(f"iscrowd must be 0 or 1, got {crowd!r}")
    return number, image, category, int(crowd), bool(value.get("segmentation")), offset, length


def _rows(
    path: Path, table: NDArray[np.int64], column: int, known: NDArray[np.int64], what: str
) -> NDArray[np.int64]:
    """Index of each id of a column in the ascending ids that are known."""
    ids = table[:, column]
    rows = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    wrong = np.flatnonzero(known[rows] != ids)
    if len(wrong):
        raise DataError(
            f"{path}: annotation {table[wrong[0], 0]} (byte {table[wrong[0], 5]:,}) has the "
            f"unknown {what}_id {ids[wrong[0]]} ({len(wrong)} in all have an unknown one); add the "
            f"{what} or leave the annotations out"
        )
    return rows
