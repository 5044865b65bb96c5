"""Index masks on disk: reading, writing and resizing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lpcam.data.images import USUAL, Reading, load_values, png_bytes
from lpcam.runtime.errors import DataError
from lpcam.runtime.files import write_bytes

_COLOUR_FILES = ("labelmap.txt", "class_dict.csv", "label_colors.txt")  # name colours of masks


def voc_palette() -> NDArray[np.uint8]:
    """VOC colours, uint8 (256, 3) (specification of data sets, section 1)."""
    steps = np.arange(8)[:, None]
    bits = np.arange(256)[:, None, None] >> (3 * steps + np.arange(3)) & 1
    return np.asarray((bits << (7 - steps)).sum(axis=1), np.uint8)


def enlarge_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Resize integer labels (H, W) to ``size`` (height, width) by nearest neighbour."""
    if tuple(labels.shape) == tuple(size):
        return labels
    # float32 holds every label exactly
    resized = F.interpolate(labels[None, None].float(), size=tuple(size), mode="nearest-exact")
    return resized[0, 0].to(labels.dtype)


def write_mask(path: Path, mask: NDArray[np.uint8]) -> None:
    """Write mask values, uint8 (H, W), atomically as a PNG with the VOC palette."""
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise DataError(f"mask is {mask.dtype} {mask.shape}; expected uint8 (H, W)")
    write_bytes(path, png_bytes(mask, voc_palette().tobytes()))


def write_plane(path: Path, plane: NDArray[np.floating]) -> None:
    """Write values (H, W) in [0, 1] atomically as a grey PNG of 0 to 255."""
    write_bytes(path, png_bytes(np.rint(plane * 255).astype(np.uint8)))


def read_index_mask(
    path: Path, *, size: tuple[int, int] | None = None, reading: Reading = USUAL
) -> NDArray[np.uint8]:
    """Read the values stored in a mask, uint8 (H, W): palette indices or grey; 1 bit gives 0 and 1.

    Args:
        size: (height, width) of the image as it is read, which the mask must have; None: any.
        reading: with a palette, the value of a pixel is that of its colour.

    Raises:
        DataError: if the file cannot be read (ImageError), holds colours (or one that the palette
            lacks), is lossy (JPEG), has values above 255 or another size.

    Example:
        >>> path = getfixture("tmp_path") / "a.png"
        >>> Image.fromarray(np.array([[0, 7]], np.uint8)).save(path)
        >>> read_index_mask(path).tolist()
        [[0, 7]]
    """
    image = load_values(path, path, reading=reading)[0]
    problem = None
    if image.format == "JPEG":
        problem = "it is a JPEG, whose values are not exact"
    elif reading.palette:
        values = _by_colour(image, path, reading)
    elif image.mode not in ("P", "L", "1") and not image.mode.startswith("I"):
        near = (folder / name for folder in [*path.parents][:3] for name in _COLOUR_FILES)
        problem = (
            f"it holds colours (mode {image.mode}), not class indices, unless --palette "
            f"{next((one for one in near if one.is_file()), 'FILE')} names the colours"
        )
    else:
        values = np.array(image)
        if values.size and (values.min() < 0 or values.max() > 255):
            problem = f"it has values from {values.min()} to {values.max()}"
    if problem is not None:
        raise DataError(
            f"mask {path} is refused: {problem}; save it as an 8-bit grey or palette PNG whose "
            "pixel values are 0 (background), the class's number, or 255 (ignored)"
        )
    if size is not None and values.shape != tuple(size):
        # of a data set whose orientation is ignored, the stored image is upright
        height, width = values.shape
        raise DataError(
            f"mask {path} is {height} x {width} (height x width), the upright image {size[0]} x "
            f"{size[1]}; save the mask in the size of the image"
        )
    return values.astype(np.uint8)


def _by_colour(image: Image.Image, path: Path, reading: Reading) -> NDArray[np.uint8]:
    rgb = np.array(image.convert("RGB"), np.uint32)
    colours = (rgb[:, :, 0] << 16) | (rgb[:, :, 1] << 8) | rgb[:, :, 2]
    known, values = np.array(reading.palette, np.uint32).T
    places = np.minimum(np.searchsorted(known, colours), len(known) - 1)
    strange = colours[known[places] != colours]
    if strange.size:
        found, counts = np.unique(strange, return_counts=True)
        red, green, blue = int(found[counts.argmax()]).to_bytes(3, "big")
        raise DataError(
            f"mask {path} is refused: {counts.max():,} of its pixels have the colour {red}, "
            f"{green}, {blue}, which the palette does not name; add the colour to the palette, or "
            "correct the mask"
        )
    return np.asarray(values[places], np.uint8)
