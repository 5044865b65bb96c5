"""A reader of another distribution: images whose names begin with their class."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from lpcam.data.dataset import ClassTable, Dataset, Item
from lpcam.data.reader import Opened, Reader, Request
from lpcam.runtime.errors import DataError
from lpcam.runtime.settings import Section


class NamedSection(Section):
    """Settings of the reader."""

    separator: str = Field(default="_", min_length=1)
    """What ends the class in a file name."""


class NamedReader(Reader):
    """``cow_1.png``, ``sheep_7.png``, ... in one folder."""

    means = "images whose names begin with their class"
    settings = NamedSection
    chooses_lists = False

    def recognises(self, path: Path) -> bool:
        """A folder with a file that says so."""
        return (path / "named.txt").is_file()

    def open(self, request: Request) -> Opened:
        """Read the labels from the names."""
        separator = (request.settings or NamedSection()).separator
        labels = {
            path: path.name.partition(separator)[0] for path in sorted(request.root.glob("*.png"))
        }
        if not labels:
            raise DataError(f"{request.root} has no .png image; give a folder that has some")
        classes = ClassTable.numbered(sorted(set(labels.values())), str(request.root))
        items = {
            path.stem: Item(path.stem, path, (classes.names.index(label),))
            for path, label in labels.items()
        }
        name = request.root.name
        return Opened(Dataset(name, classes, items, {"all": tuple(items)}, "names of the files"))


READER = NamedReader()
