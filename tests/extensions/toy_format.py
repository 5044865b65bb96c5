"""A mask format of another distribution: one table of all objects."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from typing import Any

from lpcam.data.dataset import ClassTable
from lpcam.formats.masks.base import Format, Picture


class Areas(Format):
    """``areas.csv``: a line for each object, with its area in pixels."""

    refers_to_images = True
    document_name = "areas.csv"

    def record(self, picture: Picture) -> list[tuple[str, str, int]]:
        """The lines of one image."""
        names = picture.classes.names
        return [(picture.name, names[one.label], one.area) for one in picture.objects]

    def document(self, records: Iterable[Any], classes: ClassTable) -> Iterator[bytes]:
        """The table, one image after the other."""
        yield b"image,class,area\n"
        for lines in records:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(lines)
            yield text.getvalue().encode()


AREAS = Areas()
