"""Saliency maps: read from files, or computed by the minimum barrier distance."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lpcam.data.dataset import safe_id
from lpcam.data.images import load_values
from lpcam.refine.base import check_image
from lpcam.runtime.errors import DataError

Plane = NDArray[np.float64]
SUFFIXES = (".png", ".npy", ".tif", ".tiff")  #: Extensions of map files.
LOOKED_AT = 300  #: Largest number of files that `saliency_maximum` opens.
_FULL = {("b", 1): 1.0, ("u", 1): 255.0, ("u", 2): 65535.0}
"""Largest value of an array, by its kind and bytes per value; of floats it is 1."""


def find_saliency(folder: Path, ids: Iterable[str]) -> dict[str, Path]:
    """Find the map of each image; DataError if there is no folder, or an image has none or two."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder} of saliency maps; give one that holds ID.png")
    found = {}
    for image_id in ids:
        paths = [folder / f"{safe_id(image_id)}{suffix}" for suffix in SUFFIXES]
        found[image_id] = [path for path in paths if path.is_file()]
        if len(found[image_id]) > 1:
            raise DataError(
                f"the image {image_id!r} has several saliency maps, "
                f"{' and '.join(path.name for path in found[image_id])} in {folder}; keep one"
            )
    if missing := [image_id for image_id, paths in found.items() if not paths]:
        raise DataError(
            f"{len(missing)} images have no saliency map in {folder}, the first is {missing[0]!r}; "
            f"expected a file of that name with one of {', '.join(SUFFIXES)}"
        )
    return {image_id: paths[0] for image_id, paths in found.items()}


def saliency_maximum(paths: Iterable[Path]) -> float | None:
    """The value that means 1 in maps of one folder: 1, 255, or None for each file's own default.

    An 8-bit map whose largest value is 1 may be a mask or dark; other maps of its folder decide. At
    most `LOOKED_AT`, spread evenly, are opened until one has values other than 0 and 1.
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
    """Read the map of one image, uint8 (H, W) in steps of 1/255; colours are averaged.

    A map of another size than ``size`` (height, width) is resized by Pillow's bilinear filter.
    ``maximum`` is the value that means 1. None: 255 for 8 bits, 65535 for 16, else 1; an 8-bit map
    whose largest value is 1 is then refused. DataError if the map is unreadable or out of range.
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
    image, _ = load_values(path, path)
    full = 1.0 if image.mode in ("F", "1") else 65535.0 if image.mode.startswith("I") else 255.0
    if full != 255 or (image.mode == "L" and not image.has_transparency_data):
        return np.array(image, dtype=np.float32), full
    if image.has_transparency_data and np.array(image.convert("RGBA"))[:, :, 3].min() < 255:
        raise DataError(
            f"saliency map {path} is transparent in places, where its value is unknown; save it "
            "without an alpha channel"
        )
    return np.array(image.convert("RGB"), dtype=np.float32).mean(axis=2), full


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


LONG_SIDE = 100  #: Pixels of the shrunk image, whose texture no longer counts as a barrier.
ROUNDS = 3  #: Rounds of sweeps down, up, right and left.
GAIN = 10.0  #: Gain of the sigmoid, for distances in [0, 1].
BINS = 256  #: Bins of the histogram of which Otsu's threshold is computed.
SALIENT = 127  #: Grey level above which a pixel is salient.
TO_XYZ = np.array(
    [
        (0.4124564, 0.3575761, 0.1804375),
        (0.2126729, 0.7151522, 0.0721750),
        (0.0193339, 0.1191920, 0.9503041),
    ]
)
"""CIE XYZ of linear sRGB (IEC 61966-2-1)."""
WHITE = np.array((0.95047, 1.0, 1.08883))  #: CIE XYZ of the white point D65.


def saliency(image: Tensor) -> Tensor:
    """Saliency (H, W) uint8 of a photograph (H, W, 3) uint8 RGB, above `SALIENT` on objects.

    An image of one colour has no salient pixel. DataError if the image has another form or no
    pixels.

    Example:
        >>> image = torch.zeros(40, 40, 3, dtype=torch.uint8)
        >>> image[10:30, 10:30] = 200
        >>> (saliency(image) > SALIENT)[20, [0, 20]].tolist()
        [False, True]
    """
    check_image(image)
    height, width = image.shape[:2]
    scale = min(1.0, LONG_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Pillow's bilinear filter averages when it shrinks.
    shrunk = Image.fromarray(image.cpu().numpy()).resize(size, Image.Resampling.BILINEAR)
    channels = np.moveaxis(lab(np.array(shrunk)), -1, 0)
    distance = np.stack([barrier_distance(channel) for channel in channels]).sum(0)
    top = distance.max()
    if top <= 0.0:
        return torch.zeros_like(image[..., 0])
    scaled = Image.fromarray((distance / top).astype(np.float32))
    large = scaled.resize((width, height), Image.Resampling.BILINEAR)
    values = np.array(large, dtype=np.float64)
    raised = 1.0 / (1.0 + np.exp(-GAIN * (values - otsu_threshold(values))))
    return torch.from_numpy(np.rint(255.0 * raised).astype(np.uint8)).to(image.device)


def lab(image: NDArray[np.uint8]) -> Plane:
    """CIELAB (..., 3), lightness from 0 to 100, of sRGB (..., 3) under D65."""
    levels = image / 255.0
    linear = np.where(levels > 0.04045, ((levels + 0.055) / 1.055) ** 2.4, levels / 12.92)
    relative = linear @ TO_XYZ.T / WHITE
    bend = 6.0 / 29.0
    bent = np.where(relative > bend**3, np.cbrt(relative), relative / (3 * bend**2) + 4.0 / 29.0)
    x, y, z = np.moveaxis(bent, -1, 0)
    return np.stack([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)], axis=-1)


def barrier_distance(values: Plane, rounds: int = ROUNDS) -> Plane:
    """Approximate minimum barrier distance (H, W) from the border, by sweeps; never below it."""
    distance = np.full(values.shape, np.inf)
    distance[[0, -1]] = distance[:, [0, -1]] = 0.0
    # The first sweep, down from the border, reaches every pixel.
    state = (values, distance, values.copy(), values.copy())
    for _ in range(rounds):
        # views, which the sweeps change in place
        for views in (state, [part.T for part in state]):
            _sweep(*views)
            _sweep(*(part[::-1] for part in views))
    return distance


def _sweep(values: Plane, distance: Plane, highest: Plane, lowest: Plane) -> None:
    """Extend paths down the rows, in place."""
    for row in range(1, len(values)):
        top = np.maximum(highest[row - 1], values[row])
        bottom = np.minimum(lowest[row - 1], values[row])
        better = top - bottom < distance[row]
        distance[row, better] = (top - bottom)[better]
        highest[row, better] = top[better]
        lowest[row, better] = bottom[better]


def otsu_threshold(values: Plane) -> float:
    """Threshold with the largest variance between both parts of values in [0, 1] (Otsu 1979)."""
    counts, edges = np.histogram(values, BINS, (0.0, 1.0))
    parts = counts / counts.sum()
    below = parts.cumsum()
    moment = (parts * (edges[1:] + edges[:-1]) / 2).cumsum()
    between = (moment[-1] * below - moment) ** 2 / np.maximum(below * (1 - below), 1e-12)
    return float(edges[1 + int(between.argmax())])
