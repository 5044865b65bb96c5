"""Seeds from maps, mask values, palette PNGs, and pictures of maps and masks laid over images."""

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

# Control points of the heat map's colours at equal steps from 0 to 1: lightness rises steadily from
# dark violet over red and orange to pale yellow, so that it also reads in grey and to the
# colour-blind.
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
    """The VOC colours, uint8 (256, 3): bits 0, 1, 2 of a value go to red, green, blue from the top.

    Value 0 is black, 1 (128, 0, 0), 255 (224, 224, 192) (specification of data sets, section 1).
    """
    palette = np.zeros((256, 3), dtype=np.uint8)
    values = np.arange(256)
    for step in range(8):
        for channel in range(3):
            bit = values >> (3 * step + channel) & 1
            palette[:, channel] |= (bit << (7 - step)).astype(np.uint8)
    return palette


def seeds(maps: Tensor, threshold: float) -> Tensor:
    """Seed of an image: the best class where its value is > ``threshold``, else 0 (background).

    This is the argmax over a constant background plane of ``threshold`` in front of the maps, where
    the first of equal planes wins (specification LPCAM, section 5).

    Args:
        maps: float (K, H, W), the maps of the present classes; K may be 0.
        threshold: background score, in the units of the maps.

    Returns:
        int64 (H, W), 0 for background and k + 1 for the k-th plane, on the device of the maps.
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
    """Turn a seed into mask values.

    Args:
        seed: int64 (H, W) of `seeds`, values 0..K.
        keys: int64 (K,), the 0-based class index of each plane.
        classes: their mask ids.
        maps: (K, H, W), the maps that the seed was made from; needed for ``ignore_threshold``.
        ignore_threshold: background pixels whose best map value is above it become 255 (ignored).

    Returns:
        uint8 (H, W): 0, mask ids of ``classes``, and 255 if ``ignore_threshold`` is given.
    """
    if (maps is None) != (ignore_threshold is None):
        raise DataError("maps and ignore_threshold belong together; give both or neither")
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
    """Integer labels (H, W) at another size (height, width), to the nearest pixel."""
    if tuple(labels.shape) == tuple(size):
        return labels
    # float32 holds every label exactly
    resized = F.interpolate(labels[None, None].float(), size=tuple(size), mode="nearest-exact")
    return resized[0, 0].to(labels.dtype)


def write_mask(path: Path, mask: NDArray[np.uint8]) -> None:
    """Write mask values, uint8 (H, W), as a PNG with the VOC palette, whole or not at all.

    Raises:
        DataError: if the mask is no uint8 (H, W) array.
        ArtefactError: if the file cannot be written.
    """
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise DataError(f"mask is {mask.dtype} {mask.shape}; expected uint8 (H, W)")
    _write_png(path, mask, voc_palette().tobytes())


def write_plane(path: Path, plane: NDArray[np.floating]) -> None:
    """Write values in [0, 1], (H, W), as a grey PNG of 0 to 255, whole or not at all.

    Raises:
        DataError: if the plane has another shape or values outside [0, 1].
        ArtefactError: if the file cannot be written.
    """
    # of NaN both comparisons are false
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
    """Lay one map over its image as a heat map, for the eye.

    The colour and its opacity both grow with the value, so that the image stays visible where the
    map is low.

    Args:
        image: uint8 (H, W, 3).
        heat: (H, W) in [0, 1].
        opacity: of the colour where the map is 1; a third of it where the map is 0.

    Raises:
        DataError: if the sizes differ or a value is outside [0, 1].
    """
    _check_sizes(image, heat)
    # interpolated maps overshoot by rounding; of NaN both comparisons are false
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
    """Lay mask values, uint8 (H, W), in VOC colours over an image, uint8 (H, W, 3), for the eye.

    Background stays as it is. DataError if the sizes differ.
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
