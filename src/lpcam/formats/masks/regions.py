"""The objects of a mask, as every format of annotations takes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lpcam.data.dataset import BACKGROUND, IGNORE, ClassTable
from lpcam.method.objects import components, labelled_boxes
from lpcam.runtime.errors import DataError


@dataclass(frozen=True, eq=False)
class Region:
    """One object: a class of an image, or one connected component of it."""

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
    mask: NDArray[np.uint8], classes: ClassTable, *, instances: bool = False
) -> list[Region]:
    """The objects of a mask: in label order, the components of a class in reading order.

    255 (ignored) belongs to no object. With ``instances`` an object is a connected component (8
    neighbours) instead of a class. DataError if the mask has a value that no class has.
    """
    found = set(np.unique(mask).tolist()) - {BACKGROUND, IGNORE}
    if unknown := sorted(found - set(classes.mask_ids)):
        known = dict(zip(classes.mask_ids, classes.names, strict=True))
        raise DataError(f"it has the values {unknown}, which are of no class; the classes: {known}")
    return [
        region
        for label, number in enumerate(classes.mask_ids)
        if number in found
        for region in _of_class(label, mask == number, instances)
    ]


def _of_class(label: int, pixels: NDArray[np.bool_], instances: bool) -> Iterator[Region]:
    y, x = np.nonzero(pixels)
    parts, boxes = pixels, [(1, (slice(y.min(), y.max() + 1), slice(x.min(), x.max() + 1)))]
    if instances:
        parts, count = components(pixels)
        boxes = labelled_boxes(parts, count)
    for number, box in boxes:
        yield Region(label, int(box[1].start), int(box[0].start), parts[box] == number)


def runs(values: NDArray[np.bool_]) -> list[int]:
    """Lengths of the runs of equal pixels of a row (N,): False, True, False, ..."""
    edges = np.flatnonzero(np.diff(values, prepend=False, append=~values[-1:]))
    return [int(run) for run in np.diff(edges, prepend=0)]
