"""Painting the mask of an image from COCO annotations.

Objects are painted one over the other, crowds are not (specification of data sets, section 3).
Polygons are filled by pycocotools (extra ``coco``); run-length codes are decoded here.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lpcam.data.images import MAXIMUM_PIXELS
from lpcam.data.items import BACKGROUND, IGNORE
from lpcam.errors import DataError, LpcamError

Order = Literal["file", "area"]
"""In which annotations are painted: as they stand in the file, or the largest first."""
Crowds = Literal["background", "void"]
"""What the pixels of crowds are that no object covers: 0 or 255."""


def paint(
    annotations: Sequence[Mapping[str, Any]],
    size: tuple[int, int],
    values: Mapping[int, int],
    *,
    order: Order = "file",
    crowds: Crowds = "background",
) -> NDArray[np.uint8]:
    """Paint the mask of an image: each object over those before it, crowds not (section 3).

    Args:
        annotations: of the image, as they stand in the file. A segmentation is a list of polygons
            ``[x, y, x, y, ...]`` or a run-length code (``counts`` as numbers or compressed text).
        size: (height, width).
        values: mask value of each category id, 0..255.
        order: "area" paints the largest ``area`` first (that of the pixels where the file says
            none), so that small objects stay visible.
        crowds: "void" makes the pixels of crowds 255 where no object covers them.

    Returns:
        uint8 (height, width), 0 where nothing is painted.

    Raises:
        DataError: naming the annotation, for a category without value, a polygon of fewer than 3
            points, with an odd number of coordinates, NaN or far outlying ones, a run-length code
            of another size or with wrong counts, a crowd with polygons, or no segmentation.
        LpcamError: if pycocotools is missing (for polygons).
    """
    check_options(order, crowds)
    height, width = size
    if height < 1 or width < 1 or height * width > MAXIMUM_PIXELS:
        raise DataError(
            f"a mask of {height} x {width} pixels is refused; at most {MAXIMUM_PIXELS:,} are "
            "painted, and at least 1"
        )
    canvas = np.zeros(size, dtype=np.uint8)
    void = np.zeros(size, dtype=np.bool_)
    objects = []
    for one in annotations:
        if one.get("category_id") not in values:
            raise _unpaintable(one, f"its category {one.get('category_id')} has no mask value")
        if not one.get("iscrowd"):
            objects.append(one)
        elif not isinstance(one.get("segmentation"), Mapping):
            raise _unpaintable(one, "it is a crowd, whose segmentation is a run-length code")
        elif crowds == "void":
            void |= _region(one, size)
    if order == "area":
        objects.sort(key=lambda one: -_area(one, size))  # equal ones stay in order
    for one in objects:
        canvas[_region(one, size)] = values[one["category_id"]]
    canvas[void & (canvas == BACKGROUND)] = IGNORE
    return canvas


def check_options(order: Order, crowds: Crowds) -> None:
    """Refuse words that :func:`paint` does not know; DataError lists those it knows."""
    if order not in get_args(Order) or crowds not in get_args(Crowds):
        raise DataError(
            f"order {order!r} or crowds {crowds!r} is unknown; choose 'file' or 'area', and "
            "'background' or 'void'"
        )


def _area(annotation: Mapping[str, Any], size: tuple[int, int]) -> float:
    area = annotation.get("area")
    if isinstance(area, int | float) and math.isfinite(area):
        return float(area)
    return float(_region(annotation, size).sum())


def _region(annotation: Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    try:
        return _decode(annotation.get("segmentation"), size)
    except ValueError as error:
        raise _unpaintable(annotation, str(error)) from error


def _unpaintable(annotation: Mapping[str, Any], reason: str) -> DataError:
    return DataError(
        f"annotation {annotation.get('id')} cannot be painted: {reason}; correct it or leave it out"
    )


def _decode(shape: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels of a segmentation, bool (H, W); ValueError says what is wrong with it."""
    if isinstance(shape, Mapping):
        return _decode_runs(shape, size)
    if not isinstance(shape, list) or not shape:
        raise ValueError(
            "it has no segmentation, perhaps a box alone; masks need polygons or run-length codes"
        )
    height, width = size
    for polygon in shape:
        # booleans are numbers in Python
        if not isinstance(polygon, list) or not all(type(v) in (int, float) for v in polygon):
            raise ValueError("a polygon is a list of numbers x, y, x, y, ...")
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                f"a polygon has {len(polygon)} coordinates; 3 points or more have 6 or more, an "
                "even number"
            )
        if any(type(v) is float and math.isnan(v) for v in polygon):
            raise ValueError("a polygon has a coordinate that is no number (NaN)")
        # Filling a polygon takes memory in proportion to its outline.
        reach = max(size)
        if not all(-reach <= v <= 2 * reach for v in polygon):
            raise ValueError(
                f"a polygon is further outside its image of {height} x {width} pixels (height x "
                "width) than the image is long"
            )
    coder = _pycocotools()
    runs = coder.merge(coder.frPyObjects(shape, height, width))
    pixels: NDArray[np.bool_] = coder.decode(runs).astype(np.bool_)
    return pixels


def _decode_runs(shape: Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels of a run-length code: lengths of runs of 0, 1, 0, ... down the columns.

    It is decoded here and not by pycocotools, which trusts that the runs fit the size.
    """
    counts = shape.get("counts")
    if shape.get("size") != [*size]:
        raise ValueError(
            f"its run-length code is of size {shape.get('size')}, the image of {[*size]} (height, "
            "width)"
        )
    if isinstance(counts, str):
        counts = _uncompress(counts)
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        raise ValueError("the counts of its run-length code are no whole numbers from 0 on")
    if sum(counts) != size[0] * size[1]:
        raise ValueError(
            f"its run-length code has {sum(counts):,} pixels, the image {size[0] * size[1]:,}"
        )
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return np.ascontiguousarray(flat.reshape(size[::-1]).T)


def _uncompress(text: str) -> list[int]:
    """The counts of compressed text: characters from '0' on hold five bits of a number each, the
    lowest first, and a sixth that another follows; from the fourth number on they are differences
    to the number two before."""
    counts: list[int] = []
    number, shift = 0, 0
    for character in text:
        bits = ord(character) - ord("0")
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"its run-length code has the character {character!r} where none fits")
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:  # the sign
                number -= 1 << shift
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number, shift = 0, 0
    if shift:
        raise ValueError("its run-length code is cut off")
    return counts


@cache
def _pycocotools() -> Any:
    try:
        return importlib.import_module("pycocotools.mask")
    except ImportError as error:
        raise LpcamError(
            f"masks from polygons need pycocotools ({error}): pip install 'lpcam[coco]'"
        ) from error
