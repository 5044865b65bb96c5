"""Saliency maps of other programs as inputs (specification of data sets, section 4).

The map of an image is ``ID.png`` (8 or 16 bits, grey or colours, which are averaged), ``ID.tif`` or
``ID.npy`` (also floats from 0 to 1) in one folder. The method that reads a map thresholds it.
"""

from __future__ import annotations

from collections.abc import Iterable
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
"""Largest number of files that `saliency_maximum` opens."""
_FULL = {("b", 1): 1.0, ("u", 1): 255.0, ("u", 2): 65535.0}
"""Largest value of an array, by its kind and bytes per value; of floats it is 1."""


def find_saliency(folder: Path, ids: Iterable[str]) -> dict[str, Path]:
    """Find the map file of each image.

    Raises:
        DataError: if the folder is missing, or an image has no map or two.

    Example:
        >>> find_saliency(Path("."), ids=[])
        {}
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
            f"expected a file of that name with one of {', '.join(SUFFIXES)}"
        )
    return found


def saliency_maximum(paths: Iterable[Path]) -> float | None:
    """Find the value that means 1 in the maps of one folder, for `read_saliency`.

    An 8-bit map whose largest value is 1 may be a mask of 0 and 1, or a dark map. This is decided
    by the other maps of its folder: at most `LOOKED_AT`, spread evenly, are opened until one has
    other values.

    Args:
        paths: of `find_saliency`.

    Returns:
        1 if all maps have only 0 and 1; 255 if they have 8 bits and some have other values;
        otherwise None, the default of each kind of file.

    Raises:
        DataError: if a map that is opened cannot be read (ImageError) or is transparent.

    Example:
        >>> saliency_maximum([]) is None
        True
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
) -> NDArray[np.uint8]:
    """Read the map of one image, uint8 (H, W) in steps of 1/255.

    Colours are averaged. A map of another size is resized by Pillow's bilinear filter, which
    averages when it shrinks. An 8-bit map of the image's size keeps its values.

    Args:
        size: (height, width) of the upright image.
        maximum: the value that means 1. None: 255 for 8 bits, 65535 for 16, and 1 for floats, 1-bit
            images and booleans. An 8-bit map whose largest value is 1 is then refused, because it
            may be a mask of 0 and 1; `saliency_maximum` decides this.

    Raises:
        DataError: if the map is missing or there are two, cannot be read (ImageError), is
            transparent, has NaN, negative values or values above ``maximum``, or its range is
            unknown.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     np.save(Path(folder, "a.npy"), np.array([[0, 1.0]]))
        ...     read_saliency(Path(folder), "a", (1, 2)).tolist()
        [[0, 255]]
    """
    values = read_values(find_saliency(folder, [item_id])[item_id], maximum=maximum)
    if values.shape != tuple(size):
        resized = Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR)
        values = np.clip(np.array(resized), 0, 1)
    return np.rint(values * 255).astype(np.uint8)


def read_values(path: Path, *, maximum: float | None = None) -> NDArray[np.float32]:
    """Read the map of a file in its own size, float32 (h, w) in [0, 1]; see `read_saliency`."""
    plane, full = _plane(path)
    top = full if maximum is None else maximum
    lowest, highest = float(plane.min()), float(plane.max())
    # maps that were divided by their maximum overshoot by rounding; NaN fails both comparisons
    if not (lowest >= 0 and highest <= top * (1 + 1e-6)):
        raise DataError(
            f"saliency map {path} has values from {lowest:g} to {highest:g}; expected 0 to {top:g} "
            "(maximum)"
        )
    if maximum is None and full == 255 and highest == 1:
        raise DataError(
            f"saliency map {path} has no value above 1 of 255; if 1 means salient, save it as 255 "
            "or give maximum=1; if the map is dark, save zeros or give maximum=255"
        )
    values: NDArray[np.float32] = np.clip(plane / np.float32(top), 0, 1)
    return values


def _plane(path: Path) -> tuple[NDArray[np.float32], float]:
    """Values of a file, one channel, and the value that means 1."""
    if path.suffix == ".npy":
        return _array(path)
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
