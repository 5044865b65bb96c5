"""Interface of mask formats, and the masks and objects that they export."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from lpcam.data.dataset import BACKGROUND, IGNORE, ClassTable
from lpcam.data.images import USUAL, Reading
from lpcam.method.objects import Plane, components, labelled_boxes, separate
from lpcam.runtime.errors import DataError
from lpcam.runtime.versions import __version__

MADE = f"lpcam {__version__}"  #: What wrote a file.


@dataclass(frozen=True, eq=False)
class Region:
    """One object: a class of an image, or one of its components or separated objects."""

    label: int  #: 0-based class index.
    x0: int  #: First column of the tightest box.
    y0: int  #: First row.
    pixels: NDArray[np.bool_]  #: (h, w): the object inside its box.

    @property
    def height(self) -> int:
        return len(self.pixels)

    @property
    def width(self) -> int:
        return len(self.pixels[0])

    @property
    def area(self) -> int:
        return int(self.pixels.sum())

    def whole(self, size: tuple[int, int]) -> NDArray[np.bool_]:
        """The pixels of the whole image: bool (H, W) of ``size`` = (height, width)."""
        mask = np.zeros(size, dtype=bool)
        mask[self.y0 : self.y0 + self.height, self.x0 : self.x0 + self.width] = self.pixels
        return mask


def regions(
    mask: NDArray[np.uint8],
    classes: ClassTable,
    *,
    instances: bool = False,
    evidence: Callable[[str], Plane] | None = None,
) -> list[Region]:
    """The objects of a mask: its classes in label order, or (``instances``) their components.

    With ``evidence`` of a class they are the objects of :func:`lpcam.method.objects.separate`.
    """
    found = set(np.unique(mask).tolist()) - {BACKGROUND, IGNORE}
    if unknown := sorted(found - set(classes.mask_ids)):
        known = dict(zip(classes.mask_ids, classes.names, strict=True))
        raise DataError(f"it has the values {unknown}, which are of no class; the classes: {known}")
    return [
        region
        for label, number in enumerate(classes.mask_ids)
        if number in found
        for region in _of_class(
            label, mask == number, instances, evidence and evidence(classes.names[label])
        )
    ]


def _of_class(
    label: int, pixels: NDArray[np.bool_], instances: bool, evidence: Plane | None
) -> Iterator[Region]:
    parts, count = components(pixels) if instances else (pixels.astype(np.int32), 1)
    if evidence is not None:
        parts, count = separate(pixels, evidence)
    y, x = np.nonzero(pixels)
    whole = (slice(y.min(), y.max() + 1), slice(x.min(), x.max() + 1))
    for number, box in labelled_boxes(parts, count) if instances else [(1, whole)]:
        yield Region(label, int(box[1].start), int(box[0].start), parts[box] == number)


def runs(values: NDArray[np.bool_]) -> list[int]:
    """Lengths of the runs of equal pixels of a row (N,): False, True, False, ..."""
    edges = np.flatnonzero(np.diff(values, prepend=False, append=~values[-1:]))
    return [int(run) for run in np.diff(edges, prepend=0)]


@dataclass(frozen=True)
class MaskEntry:
    """A mask to export with its image, if there is one; as :class:`lpcam.data.dataset.Item`."""

    id: str
    image: Path | None
    mask: Path
    file_name: str | None = None
    reading: Reading = USUAL

    @property
    def name(self) -> str:
        """The image's name where it is: its path below some folder, with its suffix."""
        return self.file_name or self.name_by_id

    @property
    def name_by_id(self) -> str:
        """The image's name where ids name files."""
        return self.id + (self.image.suffix if self.image is not None else ".jpg")

    @property
    def images_below(self) -> Path | None:
        """The folder below which `name` is the image's path; None if there is no such folder."""
        image = "" if self.image is None else os.path.normpath(self.image.absolute())
        folder = image.removesuffix(f"/{self.name}")
        return None if folder == image else Path(folder or "/")


@dataclass(frozen=True, eq=False)
class Picture:
    """A mask, uint8 (H, W), with its objects, their classes, and the image's name."""

    entry: MaskEntry
    name: str
    mask: NDArray[np.uint8]
    objects: Sequence[Region]
    classes: ClassTable
    heat: NDArray[np.float32] | None = None  #: (H, W) in [0, 1]: the largest class map.
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        return self.mask.shape[0], self.mask.shape[1]


class Format:
    """A way of writing masks, found by its name in :data:`lpcam.formats.registry.FORMATS`.

    Override the parts that it has: files of each image (`paths`, `write`), one document of all
    images (`document_name`, `record`, `document`), and files of the whole data set (`beside`).
    """

    refers_to_images: bool = False  #: Images stay where they are and are named by their data set.
    has_image_root: bool = False  #: A path can be put before the name of each image.
    holds_scores: bool = False  #: It has the scores of a mask, or its heat map.
    document_name: str | None = None  #: Path of the document, None for a format without one.
    frame: tuple[bytes, bytes] = b"[", b"]"  #: Of a document in JSON whose records are a list.
    ignored: str = "of no object: the format has no such pixels, its readers take background"
    """Treatment of ignored pixels (255), for the summary."""

    def check(self, entry: MaskEntry, ids: frozenset[str]) -> None:
        """Raise DataError if the format cannot hold an entry; ``ids`` are those of all entries."""

    def paths(self, entry: MaskEntry) -> Sequence[str]:
        """Paths of the files of one image, below the output folder."""
        return ()

    def write(self, picture: Picture, paths: Sequence[Path]) -> None:
        """Write the files of one image; ``paths`` are those of `paths`, below the output folder."""

    def record(self, picture: Picture) -> Any:
        """The record of one image in the document."""
        return None

    def document(self, records: Iterable[Any], classes: ClassTable) -> Iterator[bytes]:
        """Parts of the document, so that it is never whole in memory."""
        for number, one in enumerate(records):
            yield (b",\n" if number else self.frame[0] + b"\n") + compact_json(one)
        yield b"\n" + self.frame[1] + b"\n"

    def beside(self, classes: ClassTable, ids: Sequence[str]) -> Mapping[str, bytes]:
        """Contents of the files of the whole data set, by path; ``ids`` are the images written."""
        return {}


def compact_json(value: Any) -> bytes:
    """JSON in one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def add_texts(parent: ElementTree.Element, **values: object) -> None:
    """Add an element with a text for each value."""
    for name, value in values.items():
        ElementTree.SubElement(parent, name).text = str(value)


def xml_text(element: ElementTree.Element) -> bytes:
    """An element on several lines, with a line feed at its end."""
    ElementTree.indent(element)
    return (ElementTree.tostring(element, encoding="unicode") + "\n").encode()
