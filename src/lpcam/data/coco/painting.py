"""Painting the masks of images from annotations (specification of data sets, section 3)."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lpcam.data.coco.files import listing_of
from lpcam.data.coco.index import CocoAnnotation, CocoFile, CocoImage
from lpcam.data.dataset import BACKGROUND, IGNORE
from lpcam.data.images import MAXIMUM_PIXELS, read_header, upright_size
from lpcam.data.masks import write_mask
from lpcam.runtime.errors import ArtefactError, DataError, ImageError, import_extra
from lpcam.runtime.files import digest_json, read_json, write_json
from lpcam.runtime.parallel import progress_map

Order = Literal["file", "area"]
"""Order in which objects are painted: as in the file, or the largest first."""
Crowds = Literal["background", "void", "objects"]
"""Value of crowd pixels that no object covers, 0 or 255; or crowds are read as objects."""
PAINTED = "painted.json"  #: File beside painted masks that says what they were painted from.
_KIND = "masks painted from "


class PlacedImage(NamedTuple):
    """An image of an annotation file, and its own file; None where that is missing."""

    source: CocoFile
    entry: CocoImage
    path: Path | None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its mask: what the annotations say, else the upright image's."""
        assert self.path is not None
        return self.entry.size or upright_size(self.path)


def paint(
    annotations: Sequence[CocoAnnotation],
    size: tuple[int, int],
    values: Mapping[int | str, int],
    *,
    order: Order = "file",
    crowds: Crowds = "background",
) -> NDArray[np.uint8]:
    """Paint the mask of an image of ``size`` (height, width): each object over those before it."""
    height, width = size
    if height * width > MAXIMUM_PIXELS:
        raise DataError(f"a mask of {height} x {width} has more than {MAXIMUM_PIXELS:,} pixels")
    canvas = np.zeros(size, dtype=np.uint8)
    objects = [one for one in annotations if not one.is_crowd]
    if order == "area":
        objects.sort(key=lambda one: -_area(one, size))  # equal ones stay in order
    for one in objects:
        canvas[_region(one, size)] = values[one.category_id]
    for one in annotations if crowds == "void" else ():
        if one.is_crowd:
            canvas[_region(one, size) & (canvas == BACKGROUND)] = IGNORE
    return canvas


def paint_folder(
    folder: Path,
    images: Mapping[str, PlacedImage],
    ids: Sequence[str],
    values: Mapping[int | str, int],
    workers: int = 1,
    *,
    order: Order = "file",
    crowds: Crowds = "background",
) -> tuple[dict[str, Path], dict[str, str]]:
    """Paint masks as ``folder/ID.png`` that do not exist yet: files, and reasons of faults, by id.

    Masks that were painted from something else are removed first.
    """
    pairs = [[number, value] for number, value in values.items()]
    _remove_old(folder, images, {"order": order, "crowds": crowds, "mask_ids": pairs})
    paths = {name: folder / f"{name}.png" for name in ids if images[name].entry.outlined}
    listing = cache(listing_of)
    missing = [name for name, path in paths.items() if path.name not in listing(path.parent)]

    def make(name: str) -> str | None:
        """Paint a mask; returns why there is none."""
        if (fault := _size_fault(images[name])) is not None:
            return fault
        entry = images[name].entry
        try:
            mask = paint(entry.annotations, images[name].size, values, order=order, crowds=crowds)
        except DataError as error:
            return str(error)
        write_mask(paths[name], mask)
        return None

    made = zip(missing, progress_map("painting masks", make, missing, workers), strict=True)
    faults = {name: fault for name, fault in made if fault is not None}
    return {name: path for name, path in paths.items() if name not in faults}, faults


def true_mask(
    image: PlacedImage, values: Mapping[int | str, int]
) -> tuple[NDArray[np.uint8] | None, tuple[str, ...]]:
    """The mask of an image, if it can be painted, and all faults of its annotations, crowds too."""
    entry = image.entry

    def attempt(of: list[CocoAnnotation]) -> tuple[NDArray[np.uint8] | None, list[str]]:
        try:
            return paint(of, image.size, values, crowds="void"), []
        except DataError as error:
            if len(of) < 2:
                return None, [str(error)]
            return None, [fault for one in of for fault in attempt([one])[1]]

    outlined = [one for one in entry.annotations if one.segmentation]
    mask, faults = attempt([one for one in outlined if not one.is_crowd])
    faults += attempt([one for one in outlined if one.is_crowd])[1]
    if (fault := _size_fault(image)) is not None:
        mask, faults = None, [fault, *faults]
    unique = tuple(dict.fromkeys(f"{image.source.path}: {fault}" for fault in faults))
    return mask if entry.outlined else None, unique


def _size_fault(image: PlacedImage) -> str | None:
    """Message for an image file whose size differs from the annotations."""
    assert image.path is not None
    try:
        header = read_header(image.path)
    except ImageError:  # reported when all images are checked
        return None
    expected, (height, width) = image.size, header.upright
    # lpcam.data.pixels says which of the two it is
    if expected in (header.size, header.upright):
        return None
    stated = f"the file says {expected[0]} x {expected[1]} (height x width)"
    return f"{stated}, the image is {height} x {width}; use the image that was annotated"


def _remove_old(
    folder: Path, images: Mapping[str, PlacedImage], options: Mapping[str, Any]
) -> None:
    """Remove masks that were painted from something else, and record what is painted from now."""
    path = folder / PAINTED
    before = read_json(path) if path.exists() else None
    kind = before.get("kind") if isinstance(before, dict) else None
    if path.exists() and not str(kind).startswith(_KIND):
        raise ArtefactError(f"{path} was not written by lpcam; choose another folder")
    sources: dict[str, dict[str, Any]] = (before or {}).get("sources", {})
    known = {name: key for key, source in sources.items() for name in source["images"]}
    key_of = cache(lambda digest: digest_json([digest, options]))
    new = {name: key_of(image.source.digest) for name, image in images.items()}
    stale = [name for name, key in new.items() if known.get(name) != key]
    if not stale:
        return
    listing = cache(listing_of)
    old = [mask for n in stale if (mask := folder / f"{n}.png").name in listing(mask.parent)]
    if old and before is None:
        raise ArtefactError(f"{old[0]} was not painted by lpcam; choose another folder")
    # If this is stopped before the record is written, the remaining masks still fit the old record.
    for mask in old:
        mask.unlink(missing_ok=True)
    for image in images.values():
        digest = image.source.digest
        sources.setdefault(key_of(digest), {"digest": digest, **options})
    for key, source in sources.items():
        source["images"] = [name for name, of in (known | new).items() if of == key]
    write_json(path, {"format": 3, "kind": f"{_KIND}annotations", "sources": sources})


def _area(annotation: CocoAnnotation, size: tuple[int, int]) -> float:
    stated = annotation.area
    known = isinstance(stated, int | float) and math.isfinite(stated)
    return float(stated if known else _region(annotation, size).sum())


def _region(annotation: CocoAnnotation, size: tuple[int, int]) -> NDArray[np.bool_]:
    shape = annotation.segmentation
    try:
        if callable(shape):
            found: NDArray[np.bool_] = shape(size)
            return found
        if isinstance(shape, dict):
            return _decode_runs(shape, size)
        if annotation.is_crowd:
            raise ValueError("it is a crowd without run lengths (an object: --crowds objects)")
        pixels = fill(shape, size)
        if max(map(max, shape)) <= 1 < min(size):
            raise ValueError("its coordinates are from 0 to 1; expected pixels")
        return pixels
    except (ValueError, OverflowError) as error:
        raise DataError(
            f"annotation {annotation.id} cannot be painted: {error}; correct it or leave it out"
        ) from error


def fill(polygons: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels in any of some polygons; ValueError says what is wrong with them."""
    if not isinstance(polygons, list) or not polygons:
        raise ValueError("it has no segmentation; masks need polygons or run-length codes")
    for polygon in polygons:
        if not isinstance(polygon, array):
            raise ValueError("a polygon must be a list of numbers x, y, x, y, ...")
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon has {len(polygon)} coordinates; expected 6, 8, 10, ...")
        # Filling a polygon takes memory in proportion to its outline. NaN fails the comparison.
        if not all(-max(size) <= v <= 2 * max(size) for v in polygon):
            raise ValueError(
                f"a polygon has coordinates that are NaN or far outside of {size[0]} x {size[1]}"
            )
    coder = import_extra("pycocotools.mask", "coco", "masks from polygons need pycocotools")
    runs = coder.merge(coder.frPyObjects([polygon.tolist() for polygon in polygons], *size))
    pixels: NDArray[np.bool_] = coder.decode(runs) > 0
    return pixels


def _decode_runs(shape: Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels of lengths of runs of 0, 1, 0, ... down the columns; pycocotools checks no size."""
    counts = shape.get("counts")
    if shape.get("size") != [*size]:
        stated = shape.get("size")
        raise ValueError(f"its run lengths are of size {stated}, the image of {[*size]}")
    if isinstance(counts, str):
        if counts.startswith("b'") and counts.endswith("'"):  # Python's bytes, written by str()
            counts = counts[2:-1].replace("\\\\", "\\")
        counts = _uncompress(counts)
    if not isinstance(counts, array) or min(counts, default=0) < 0:
        raise ValueError("the counts of its run lengths must be integers from 0 on")
    if sum(counts) != size[0] * size[1]:
        raise ValueError(f"its run lengths have {sum(counts):,} pixels, not {size[0] * size[1]:,}")
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return np.ascontiguousarray(flat.reshape(size[::-1]).T)


def _uncompress(text: str) -> array[int]:
    """The counts of compressed text: characters hold five bits each, and if another follows.

    From the fourth number on they are differences to the second last.
    """
    counts = array("q")
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
