"""Painting the masks of images from COCO annotations.

Objects are painted one over the other, crowds are not (specification of data sets, section 3).
Polygons are filled by pycocotools (extra ``coco``); run-length codes are decoded here.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lpcam.data.coco.files import listing_of
from lpcam.data.coco.index import CocoAnnotations, file_state
from lpcam.data.dataset import BACKGROUND, IGNORE
from lpcam.data.images import MAXIMUM_PIXELS, upright_size
from lpcam.data.masks import write_mask
from lpcam.runtime.errors import ArtefactError, DataError, ImageError, LpcamError
from lpcam.runtime.files import digest_file, read_json, write_json
from lpcam.runtime.parallel import ordered_map

Order = Literal["file", "area"]
"""Order in which objects are painted: as in the file, or the largest first."""
Crowds = Literal["background", "void"]
"""Value of crowd pixels that no object covers: 0 or 255."""
PAINTED = "painted.json"
"""File in a folder of painted masks that says what they were painted from."""
_KIND = "masks painted from COCO annotations"


class CocoImage(NamedTuple):
    """An image of an annotation file."""

    annotations: CocoAnnotations
    row: int
    """Its row in them."""
    record: str
    """Name of the annotation file in :data:`PAINTED`."""
    outlined: bool
    """Whether every object has an outline, so that the image can have a true mask."""
    path: Path | None
    """The image file; None where it is missing."""


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
        annotations: annotations of the image, as in the file. A segmentation is a list of polygons
            ``[x, y, x, y, ...]`` or a run-length code (``counts`` as numbers or compressed text).
        size: (height, width) in pixels.
        values: mask value of each category id, 0..255.
        order: "area" paints the largest ``area`` first (the number of pixels where the file has no
            area), so that small objects stay visible.
        crowds: "void" sets the pixels of crowds to 255 where no object covers them.

    Returns:
        uint8 (height, width), 0 where nothing is painted.

    Raises:
        DataError: naming the annotation that cannot be painted, and why.
        LpcamError: if pycocotools is missing (for polygons).

    Example:
        >>> runs = {"size": [2, 3], "counts": [2, 3, 1]}  # down the columns: 2 x 0, 3 x 1, 1 x 0
        >>> paint([{"category_id": 7, "segmentation": runs}], (2, 3), {7: 4}).tolist()
        [[0, 4, 4], [0, 4, 0]]
    """
    height, width = size
    if not 0 < height * width <= MAXIMUM_PIXELS:
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
            raise _unpaintable(one, "it is a crowd, whose segmentation must be a run-length code")
        elif crowds == "void":
            void |= _region(one, size)
    if order == "area":
        objects.sort(key=lambda one: -_area(one, size))  # equal ones stay in order
    for one in objects:
        canvas[_region(one, size)] = values[one["category_id"]]
    canvas[void & (canvas == BACKGROUND)] = IGNORE
    return canvas


def paint_folder(
    folder: Path,
    images: Mapping[str, CocoImage],
    ids: Sequence[str],
    values: Mapping[int, int],
    *,
    order: Order = "file",
    crowds: Crowds = "background",
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Path], dict[str, str]]:
    """Paint the masks of images as ``folder/ID.png`` where they do not exist yet.

    ``folder/painted.json`` has the digest of each annotation file, ``order``, ``crowds`` and the
    mask values. Where these have changed, the old masks of that file's images are removed first. A
    call that was stopped can be repeated to resume.

    Args:
        images: all images of the annotation files that are read, by id.
        ids: ids of the images to paint.
        values, order, crowds: see :func:`paint`.
        workers: number of images painted at a time.
        progress: called after each mask with the number of finished masks and of all.

    Returns:
        The mask file of each painted image by id, and the reason of each image whose mask cannot be
        painted. Images with an object without outline are in neither.

    Raises:
        DataError: if an annotation file has changed since it was read.
        ArtefactError: if a mask exists that was not painted here, or a file cannot be written.
        LpcamError: if pycocotools is missing (for polygons).
    """
    pairs = [[number, value] for number, value in values.items()]
    _prepare(folder, images, {"order": order, "crowds": crowds, "mask_ids": pairs})
    paths = {name: folder / f"{name}.png" for name in ids if images[name].outlined}
    listing = cache(listing_of)
    missing = [n for n, path in paths.items() if path.name not in listing(path.parent)]

    def make(name: str) -> str | None:
        """Paint a mask; returns why there is none."""
        image = images[name]
        if (fault := _size_fault(image)) is not None:
            return fault
        annotations = image.annotations.annotations(image.row)
        if crowds == "background":
            annotations = [one for one in annotations if not one.get("iscrowd")]
        size = image.annotations.sizes[image.row]
        try:
            write_mask(paths[name], paint(annotations, size, values, order=order, crowds=crowds))
        except DataError as error:
            return str(error)
        return None

    existing = [("", None)] * (len(paths) - len(missing))
    painted = zip(missing, ordered_map(make, missing, workers), strict=True)
    faults = {}
    for count, (name, fault) in enumerate(itertools.chain(existing, painted), start=1):
        if fault is not None:
            faults[name] = fault
        if progress is not None:
            progress(count, len(paths))
    return {name: path for name, path in paths.items() if name not in faults}, faults


def true_mask(
    image: CocoImage, values: Mapping[int, int]
) -> tuple[NDArray[np.uint8] | None, tuple[str, ...]]:
    """The mask of an image in memory, and everything that is wrong with its annotations.

    Returns:
        uint8 (H, W), or None where the image has no mask; and the faults in words, also those of
        crowds, which are not painted.

    Raises:
        DataError: if the annotation file has changed since it was read.
        LpcamError: if pycocotools is missing (for polygons).
    """
    size = image.annotations.sizes[image.row]
    outlined = [one for one in image.annotations.annotations(image.row) if one.get("segmentation")]

    def attempt(of: list[dict[str, Any]]) -> tuple[NDArray[np.uint8] | None, list[str]]:
        try:
            return paint(of, size, values, crowds="void"), []
        except DataError as error:
            if len(of) < 2:
                return None, [str(error)]
            return None, [fault for one in of for fault in attempt([one])[1]]

    mask, faults = attempt([one for one in outlined if not one.get("iscrowd")])
    faults += attempt([one for one in outlined if one.get("iscrowd")])[1]
    if (fault := _size_fault(image)) is not None:
        mask, faults = None, [fault, *faults]
    unique = tuple(dict.fromkeys(f"{image.annotations.path}: {fault}" for fault in faults))
    return mask if image.outlined else None, unique


def _size_fault(image: CocoImage) -> str | None:
    """Message for an image file whose size differs from the annotations."""
    assert image.path is not None
    try:
        height, width = upright_size(image.path)
    except ImageError:  # reported when all images are checked
        return None
    expected = image.annotations.sizes[image.row]
    if expected == (height, width):
        return None
    advice = "use the image that was annotated"
    if expected == (width, height):
        advice = "if it was annotated without its EXIF rotation, remove that from the image"
    return (
        f"the file says {expected[0]} x {expected[1]} (height x width), the upright image is "
        f"{height} x {width}; {advice}"
    )


def _prepare(folder: Path, images: Mapping[str, CocoImage], options: Mapping[str, Any]) -> None:
    """Remove masks that were painted from other annotations or with other options."""
    path = folder / PAINTED
    before = read_json(path) if path.exists() else None
    if before is not None and (not isinstance(before, dict) or before.get("kind") != _KIND):
        raise ArtefactError(
            f"{path} was not written by lpcam, so it may be yours; choose another folder"
        )
    known: dict[str, dict[str, Any]] = before.get("files", {}) if before else {}
    ids = defaultdict(list)
    for name, image in images.items():
        ids[image.record].append(name)
    files = {
        record: {
            "digest": _digest(images[names[0]].annotations),
            "options": options,
            "ids_begin": os.path.commonprefix(names),  # noqa: RUF071 - of characters
        }
        for record, names in ids.items()
    }
    stale = [
        record
        for record, of in files.items()
        if any(known.get(record, {}).get(key) != of[key] for key in ("digest", "options"))
    ]
    if not stale:
        return
    listing = cache(listing_of)
    masks = [folder / f"{name}.png" for record in sorted(stale) for name in ids[record]]
    old = [mask for mask in masks if mask.name in listing(mask.parent)]
    if old and before is None:
        raise ArtefactError(
            f"{old[0]} exists and was not painted by lpcam (there is no {PAINTED}), so it may be "
            "yours; choose another folder"
        )
    # If this is stopped before the record is written, the remaining masks still fit the old record.
    for mask in old:
        mask.unlink(missing_ok=True)
    # some of the removed masks may belong to a file that is not read now
    removed = [mask.relative_to(folder).as_posix() for mask in old]
    kept = {
        record: of
        for record, of in known.items()
        if record not in files and not any(mask.startswith(of["ids_begin"]) for mask in removed)
    }
    write_json(path, {"format": 2, "kind": _KIND, "files": {**kept, **files}})


def _digest(index: CocoAnnotations) -> str:
    digest = digest_file(index.path)
    if file_state(index.path) != index.state:
        raise index.changed()
    return digest


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
        raise ValueError("it has no segmentation; masks need polygons or run-length codes")
    height, width = size
    for polygon in shape:
        # booleans are numbers in Python
        if not isinstance(polygon, list) or not all(type(v) in (int, float) for v in polygon):
            raise ValueError("a polygon must be a list of numbers x, y, x, y, ...")
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                f"a polygon has {len(polygon)} coordinates; expected an even number, at least 6"
            )
        # Filling a polygon takes memory in proportion to its outline. NaN fails the comparison.
        if not all(-max(size) <= v <= 2 * max(size) for v in polygon):
            raise ValueError(
                f"a polygon has coordinates that are NaN or far outside its image of {height} x "
                f"{width} pixels (height x width)"
            )
    coder = _pycocotools()
    runs = coder.merge(coder.frPyObjects(shape, height, width))
    pixels: NDArray[np.bool_] = coder.decode(runs).astype(np.bool_)
    return pixels


def _decode_runs(shape: Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels of a run-length code: lengths of runs of 0, 1, 0, ... down the columns.

    pycocotools is not used, because it does not check that the runs fit the size.
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
        raise ValueError("the counts of its run-length code must be integers from 0 on")
    if sum(counts) != size[0] * size[1]:
        raise ValueError(
            f"its run-length code has {sum(counts):,} pixels, the image {size[0] * size[1]:,}"
        )
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return np.ascontiguousarray(flat.reshape(size[::-1]).T)


def _uncompress(text: str) -> list[int]:
    """The counts of compressed text.

    Characters from '0' on hold five bits of a number each, the lowest first, and a sixth bit that
    says whether another follows; from the fourth number on they are differences to the second last.
    """
    counts: list[int] = []
    number, shift = 0, 0
    for character in text:
        bits = ord(character) - ord("0")
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"its run-length code has the unexpected character {character!r}")
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:  # the sign
                number -= 1 << shift
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number, shift = 0, 0
    if shift:
        raise ValueError("its run-length code is truncated")
    return counts


def _pycocotools() -> Any:
    try:
        return importlib.import_module("pycocotools.mask")
    except ImportError as error:
        raise LpcamError(
            f"masks from polygons need pycocotools ({error}): pip install 'lpcam[coco]'"
        ) from error
