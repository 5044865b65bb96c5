"""The objects of a mask, as every format of annotations takes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lpcam.data.dataset import BACKGROUND, IGNORE, ClassTable
from lpcam.method.objects import components
from lpcam.runtime.errors import DataError


@dataclass(frozen=True, eq=False)
class Region:
    """One object: a class of an image, or one connected component of it."""

    label: int
    """0-based class index."""
    x0: int
    """First column of the tightest box."""
    y0: int
    """First row."""
    pixels: NDArray[np.bool_]
    """(h, w), of the tightest box alone."""

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
    name: str = "the mask",
) -> list[Region]:
    """The objects of a mask: in label order, the components of a class in reading order.

    Args:
        mask: uint8 (H, W), values as in mask files. 255 (ignored) belongs to no object.
        instances: one object a connected component (8 neighbours) instead of one a class. Objects
            of one class that touch are then still one.
        name: name of the mask, for the message.

    Raises:
        DataError: if the mask has a value that no class has.
        LpcamError: for ``instances``, if SciPy is not installed.
    """
    found = set(np.unique(mask).tolist()) - {BACKGROUND, IGNORE}
    unknown = sorted(found - set(classes.mask_ids))
    if unknown:
        known = ", ".join(
            f"{number} {name}" for name, number in zip(classes.names, classes.mask_ids, strict=True)
        )
        raise DataError(
            f"{name} is refused: it has the values {', '.join(map(str, unknown))}, which are of no "
            f"class; the classes are {known}"
        )
    return [
        region
        for label, number in enumerate(classes.mask_ids)
        if number in found
        for region in _of_class(label, mask == number, instances)
    ]


def _of_class(label: int, pixels: NDArray[np.bool_], instances: bool) -> list[Region]:
    y, x = np.nonzero(pixels)
    if not instances:
        return [_boxed(label, y, x)]
    parts, count = components(pixels)
    number = parts[y, x]
    order = np.argsort(number, kind="stable")
    ends = np.cumsum(np.bincount(number, minlength=count + 1))[1:-1]
    pieces = zip(np.split(y[order], ends), np.split(x[order], ends), strict=True)
    return [_boxed(label, rows, columns) for rows, columns in pieces]


def _boxed(label: int, y: NDArray[np.intp], x: NDArray[np.intp]) -> Region:
    y0, x0 = int(y.min()), int(x.min())
    pixels = np.zeros((int(y.max()) - y0 + 1, int(x.max()) - x0 + 1), dtype=bool)
    pixels[y - y0, x - x0] = True
    return Region(label, x0, y0, pixels)


def runs(values: NDArray[np.bool_]) -> list[int]:
    """Lengths of the runs of equal pixels of a row (N,), the first being of pixels that are not.

    Their sum is N; the first is 0 where the row begins inside.
    """
    edges = np.flatnonzero(np.diff(values, prepend=False, append=~values[-1:]))
    return [int(run) for run in np.diff(edges, prepend=0)]
