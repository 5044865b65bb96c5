"""Seed masks from maps, mask files, and maps and masks drawn over images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lpcam.data.items import BACKGROUND, IGNORE, ClassTable
from lpcam.errors import DataError
from lpcam.storage import write_bytes

# Colours of the heat map at equal steps from 0 to 1. Lightness increases steadily, so that it can
# be read in grey and by the colour-blind.
HEAT = np.array(
    [
        (16, 8, 48),
        (62, 16, 104),
        (118, 28, 112),
        (174, 46, 92),
        (222, 80, 58),
        (246, 136, 40),
        (252, 196, 76),
        (254, 248, 170),
    ],
    dtype=np.float64,
)


def voc_palette() -> NDArray[np.uint8]:
    """VOC colours, uint8 (256, 3) (specification of data sets, section 1).

    Example:
        >>> voc_palette()[[0, 1, 255]].tolist()
        [[0, 0, 0], [128, 0, 0], [224, 224, 192]]
    """
    palette = np.zeros((256, 3), dtype=np.uint8)
    values = np.arange(256)
    for step in range(8):
        for channel in range(3):
            bit = values >> (3 * step + channel) & 1
            palette[:, channel] |= (bit << (7 - step)).astype(np.uint8)
    return palette


def seeds(maps: Tensor, threshold: float) -> Tensor:
    """Seed mask of an image: the best class where its value is > ``threshold``, else background.

    This is the argmax over a background plane of ``threshold`` and the maps; the first of equal
    planes wins (specification of LPCAM, section 5).

    Args:
        maps: (K, H, W) floating point, maps of the present classes; K may be 0.
        threshold: background score, in the units of the maps. Larger values give smaller objects.

    Returns:
        int64 (H, W), 0 for background and k + 1 for the k-th plane, on the device of the maps.

    Raises:
        DataError: if the maps have another number of dimensions.

    Example:
        >>> seeds(torch.tensor([[[0.1, 0.6, 0.2]], [[0.2, 0.4, 0.9]]]), 0.3).tolist()
        [[0, 1, 2]]
    """
    if maps.ndim != 3:
        raise DataError(f"maps are {tuple(maps.shape)}; expected (K, H, W)")
    if not len(maps):
        return torch.zeros(maps.shape[1:], dtype=torch.int64, device=maps.device)
    best, plane = maps.max(dim=0)
    return torch.where(best > threshold, plane + 1, 0)


def to_mask(
    seed: Tensor,
    keys: Tensor | NDArray[np.int64],
    classes: ClassTable,
    *,
    maps: Tensor | None = None,
    ignore_threshold: float | None = None,
) -> NDArray[np.uint8]:
    """Convert a seed mask to the values of a mask file.

    Args:
        seed: int64 (H, W) from :func:`seeds`, values 0..K.
        keys: int64 (K,), the 0-based class index of each plane.
        classes: their mask ids.
        maps: (K, H, W), the maps that the seed was cut from; required for ``ignore_threshold``.
        ignore_threshold: background pixels whose best map value is above it become 255 (ignored).

    Returns:
        uint8 (H, W): 0, mask ids of ``classes``, and 255 if ``ignore_threshold`` is given.

    Raises:
        DataError: if the seed has values above K, or only one of the last two arguments is given.

    Example:
        >>> table = ClassTable(("cat", "dog"), (8, 12))
        >>> to_mask(torch.tensor([[0, 1, 2]]), torch.tensor([1, 0]), table).tolist()
        [[0, 12, 8]]
    """
    if (maps is None) != (ignore_threshold is None):
        raise DataError("maps and ignore_threshold must be given together; give both or neither")
    ids = [BACKGROUND, *(classes.mask_ids[key] for key in keys.tolist())]
    values = seed.cpu().numpy()
    if values.size and not 0 <= values.min() <= values.max() < len(ids):
        raise DataError(
            f"seed has values from {values.min()} to {values.max()}; with {len(ids) - 1} keys "
            f"expected 0 to {len(ids) - 1}"
        )
    mask: NDArray[np.uint8] = np.array(ids, dtype=np.uint8)[values]
    if maps is not None and ignore_threshold is not None and len(maps):
        unsure = (maps.amax(dim=0) > ignore_threshold).cpu().numpy()
        mask[unsure & (mask == BACKGROUND)] = IGNORE
    return mask


def enlarge_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Resize integer labels (H, W) to ``size`` (height, width) by nearest neighbour.

    Example:
        >>> enlarge_labels(torch.tensor([[1, 2]]), (1, 4)).tolist()
        [[1, 1, 2, 2]]
    """
    if tuple(labels.shape) == tuple(size):
        return labels
    # float32 holds every label exactly
    resized = F.interpolate(labels[None, None].float(), size=tuple(size), mode="nearest-exact")
    return resized[0, 0].to(labels.dtype)


def write_mask(path: Path, mask: NDArray[np.uint8]) -> None:
    """Write mask values, uint8 (H, W), atomically as a PNG with the VOC palette.

    Raises:
        DataError: if the mask is not a uint8 (H, W) array.
        ArtefactError: if the file cannot be written.
    """
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise DataError(f"mask is {mask.dtype} {mask.shape}; expected uint8 (H, W)")
    _write_png(path, mask, voc_palette().tobytes())


def write_plane(path: Path, plane: NDArray[np.floating]) -> None:
    """Write values (H, W) in [0, 1] atomically as a grey PNG of 0 to 255.

    Raises:
        DataError: if the plane has another shape or values outside [0, 1].
        ArtefactError: if the file cannot be written.
    """
    # both comparisons are false for NaN
    if plane.ndim != 2 or (plane.size and not (plane.min() >= 0 and plane.max() <= 1)):
        raise DataError(
            f"plane is {plane.shape} with values from {plane.min()} to {plane.max()}; expected "
            "(H, W) in [0, 1]"
        )
    _write_png(path, np.rint(plane * 255).astype(np.uint8), None)


def _write_png(path: Path, values: NDArray[np.uint8], palette: bytes | None) -> None:
    image = Image.fromarray(values)
    if palette is not None:
        image.putpalette(palette)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def overlay(
    image: NDArray[np.uint8], heat: NDArray[np.float32], *, opacity: float = 0.7
) -> NDArray[np.uint8]:
    """Draw a map over its image as a heat map.

    Args:
        image: uint8 (H, W, 3).
        heat: (H, W) in [0, 1].
        opacity: of the colour where the map is 1; a third of it where the map is 0.

    Returns:
        uint8 (H, W, 3).

    Raises:
        DataError: if the sizes differ or a value is outside [0, 1].

    Example:
        >>> image, heat = np.zeros((1, 1, 3), np.uint8), np.ones((1, 1), np.float32)
        >>> overlay(image, heat, opacity=1.0).tolist()
        [[[254, 248, 170]]]
    """
    _check_sizes(image, heat)
    # interpolated maps overshoot by rounding; both comparisons are false for NaN
    if heat.size and not (heat.min() >= -1e-6 and heat.max() <= 1 + 1e-6):
        raise DataError(
            f"map has values from {heat.min()} to {heat.max()}; expected 0 to 1, normalise it first"
        )
    steps = np.linspace(0, 1, len(HEAT))
    value = np.clip(heat, 0, 1)
    colour = np.stack([np.interp(value, steps, HEAT[:, c]) for c in range(3)], axis=2)
    weight = (opacity * (1 + 2 * value) / 3)[:, :, None]
    return np.rint((1 - weight) * image + weight * colour).astype(np.uint8)


def overlay_mask(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], *, opacity: float = 0.6
) -> NDArray[np.uint8]:
    """Draw mask values, uint8 (H, W), in VOC colours over an image, uint8 (H, W, 3).

    Background is not drawn. Raises DataError if the sizes differ.

    Example:
        >>> image, mask = np.zeros((1, 2, 3), np.uint8), np.array([[0, 1]], np.uint8)
        >>> overlay_mask(image, mask, opacity=1.0).tolist()
        [[[0, 0, 0], [128, 0, 0]]]
    """
    _check_sizes(image, mask)
    weight = np.where(mask == BACKGROUND, 0.0, opacity)[:, :, None]
    return np.rint((1 - weight) * image + weight * voc_palette()[mask]).astype(np.uint8)


def _check_sizes(image: NDArray[np.uint8], plane: NDArray[np.float32] | NDArray[np.uint8]) -> None:
    if image.ndim != 3 or image.dtype != np.uint8 or image.shape[:2] != plane.shape:
        raise DataError(
            f"image is {image.dtype} {image.shape} and the plane over it {plane.shape}; expected "
            "uint8 (H, W, 3) and (H, W)"
        )
