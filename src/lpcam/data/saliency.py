"""Saliency maps of other programs as inputs (specification of data sets, section 4).

A map of an image is ``ID.png`` (8 or 16 bits, grey or colours, whose mean counts), ``ID.tif`` or
``ID.npy`` (there also floats from 0 to 1) in one folder. Nothing here says where a map is salient:
the threshold is the method's that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lpcam.data.images import MAXIMUM_PIXELS, load_image
from lpcam.data.items import safe_id
from lpcam.errors import DataError

SUFFIXES = (".png", ".npy", ".tif", ".tiff")
"""Extensions of map files."""
LOOKED_AT = 300
"""Files that `saliency_maximum` opens at most."""
_FULL = {("b", 1): 1.0, ("u", 1): 255.0, ("u", 2): 65535.0}
"""Most salient value of an array's kind and bytes a value; of floats it is 1."""


@dataclass(frozen=True, eq=False)
class Saliency:
    """One map in the size of its image.

    ``values`` float32 (H, W) in [0, 1]. ``levels`` uint8 (H, W): ``values`` in steps of 1/255,
    which are the file's own numbers where it has 8 bits, one channel and the image's size.
    """

    levels: NDArray[np.uint8]
    values: NDArray[np.float32]


def find_saliency(folder: Path, ids: Iterable[str]) -> dict[str, Path]:
    """The map file of each image, before any is read.

    Raises:
        DataError: if the folder is missing, or images have no map or two, with their number and the
            first of them.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder} of saliency maps; give one that holds ID.png")
    found: dict[str, Path] = {}
    missing = []
    for image_id in ids:
        paths = [folder / f"{safe_id(image_id)}{suffix}" for suffix in SUFFIXES]
        present = [path for path in paths if path.is_file()]
        if len(present) > 1:
            raise DataError(
                f"the image {image_id!r} has several saliency maps, "
                f"{' and '.join(path.name for path in present)} in {folder}; keep one"
            )
        if present:
            found[image_id] = present[0]
        else:
            missing.append(image_id)
    if missing:
        raise DataError(
            f"{len(missing)} images have no saliency map in {folder}, the first is {missing[0]!r}; "
            f"there must be a file of that name with {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        )
    return found


def saliency_maximum(paths: Iterable[Path]) -> float | None:
    """What means 1 in the maps of one folder, for `read_saliency` and `read_values`.

    A map of 8 bits whose largest value is 1 may be a mask of 0 and 1, or dark. The other maps of
    its folder tell: at most `LOOKED_AT` of them, spread evenly, are opened until one has other
    values.

    Args:
        paths: of `find_saliency`.

    Returns:
        1 where all have 0 and 1 alone; 255 where they are of 8 bits and some have other values;
        None, each kind's own, where they are of several kinds, of another one, or all 0.

    Raises:
        DataError: if a map that is opened cannot be read (ImageError) or is transparent.
    """
    paths = list(paths)
    kinds = {path.suffix: path for path in paths}.values()
    spread = paths[:: max(1, -(-len(paths) // LOOKED_AT))]
    whole, salient = set(), False
    for number, path in enumerate([*kinds, *spread]):
        plane, full = _plane(path)
        whole.add(full)
        if not np.isin(plane, (0, 1)).all():
            rest = [_plane(other)[1] for other in list(kinds)[number + 1 :]]
            return 255.0 if {*whole, *rest} == {255.0} else None
        salient = salient or bool(plane.any())
    return 1.0 if salient else None


def read_saliency(
    folder: Path, item_id: str, size: tuple[int, int], *, maximum: float | None = None
) -> Saliency:
    """Read the map of one image.

    Colours are averaged over red, green and blue. A map of another size is resized by Pillow's
    bilinear filter, which averages when it shrinks.

    Args:
        folder: holds the map.
        item_id: of the image.
        size: (height, width) of the upright image.
        maximum: the value that means 1. None: 255 of 8 bits, 65535 of 16, and 1 of floats, 1-bit
            images and booleans. An 8-bit map whose largest value is 1 is then refused, because it
            may be one of 0 and 1; `saliency_maximum` tells by its folder.

    Raises:
        DataError: if the map is missing or there are two, cannot be read (ImageError), is
            transparent, has NaN, negative values or values above ``maximum``, or its range is
            unknown.
    """
    values = read_values(find_saliency(folder, [item_id])[item_id], maximum=maximum)
    if values.shape != tuple(size):
        height, width = size
        values = np.array(
            Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)
        )
        values = np.clip(values, 0, 1)
    return Saliency(np.rint(values * 255).astype(np.uint8), values)


def read_values(path: Path, *, maximum: float | None = None) -> NDArray[np.float32]:
    """The map of a file in its own size, float32 (h, w) in [0, 1]; otherwise as `read_saliency`."""
    plane, full = _plane(path)
    top = full if maximum is None else maximum
    lowest, highest = float(plane.min()), float(plane.max())
    # maps that were divided by their maximum overshoot by rounding; of NaN both are false
    if not (lowest >= 0 and highest <= top * (1 + 1e-6)):
        raise DataError(
            f"saliency map {path} has values from {lowest:g} to {highest:g}; expected 0 to {top:g} "
            "(maximum)"
        )
    if maximum is None and full == 255 and highest == 1:
        raise DataError(
            f"saliency map {path} has no value above 1 of 255; if 1 is salient, save it as 255 or "
            "give maximum=1; if it is really so dark, save zeros or give maximum=255"
        )
    values: NDArray[np.float32] = np.clip(plane / np.float32(top), 0, 1)
    return values


def _plane(path: Path) -> tuple[NDArray[np.float32], float]:
    """Values of a file, one channel, and the value that means 1."""
    return _array(path) if path.suffix == ".npy" else _picture(path)


def _picture(path: Path) -> tuple[NDArray[np.float32], float]:
    image = load_image(path, path, MAXIMUM_PIXELS)
    if image.mode in ("F", "1"):
        return np.array(image, dtype=np.float32), 1.0
    if image.mode.startswith("I"):
        return np.array(image, dtype=np.float32), 65535.0
    if image.mode == "L" and not image.has_transparency_data:
        return np.array(image, dtype=np.float32), 255.0
    if image.has_transparency_data and np.array(image.convert("RGBA"))[:, :, 3].min() < 255:
        raise DataError(
            f"saliency map {path} is transparent in places, where its value is unknown; save it "
            "without an alpha channel"
        )
    return np.array(image.convert("RGB"), dtype=np.float32).mean(axis=2), 255.0


def _array(path: Path) -> tuple[NDArray[np.float32], float]:
    try:
        array: Any = np.load(path, allow_pickle=False)
    except Exception as error:  # a damaged file makes numpy raise anything
        raise DataError(
            f"cannot read saliency map {path}: {error}; save a plain array with numpy.save"
        ) from error
    plain = isinstance(array, np.ndarray)
    kind = (array.dtype.kind, array.dtype.itemsize) if plain else ("", 0)
    full = 1.0 if kind[0] == "f" else _FULL.get(kind)
    if full is None or array.ndim != 2 or not array.size:
        what = f"{array.dtype} {array.shape}" if plain else "an archive"
        raise DataError(
            f"saliency map {path} is {what}; expected (H, W) of floats from 0 to 1, or of 8-bit, "
            "16-bit or boolean values"
        )
    return array.astype(np.float32), full
