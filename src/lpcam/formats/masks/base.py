"""Interface of mask formats, and the masks that they export."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from lpcam.data.dataset import ClassTable
from lpcam.data.images import USUAL, Reading
from lpcam.formats.masks.regions import Region
from lpcam.runtime.versions import __version__

MADE = f"lpcam {__version__}"  #: What wrote a file.


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
    document_name: str | None = None  #: Path of the document, None for a format without one.
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
        yield from ()

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
