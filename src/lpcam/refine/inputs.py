"""What every refinement asks of its images and maps."""

from __future__ import annotations

import torch
from torch import Tensor

from lpcam.errors import DataError


def check_image_and_maps(image: Tensor, maps: Tensor, name: str) -> None:
    """Refuse an image and maps that do not belong together.

    Args:
        image: should be (..., H, W, 3) uint8.
        maps: should be (..., n, H, W), floating-point and finite, on the same device.
        name: of the maps, in the plural, for the messages.

    Raises:
        DataError: saying what was given and what was expected.
    """
    if image.dtype is not torch.uint8 or image.dim() < 3 or image.shape[-1] != 3:
        raise DataError(
            f"the image must be RGB, uint8 of the shape (..., height, width, 3), got {image.dtype} "
            f"{tuple(image.shape)}; give it as it was read, not normalised"
        )
    if not maps.is_floating_point() or maps.dim() < 3:
        raise DataError(
            f"{name} are floating-point numbers of the shape (..., labels, height, width), got "
            f"{maps.dtype} {tuple(maps.shape)}"
        )
    expected = (*maps.shape[:-3], *maps.shape[-2:], 3)
    if tuple(image.shape) != expected:
        raise DataError(
            f"image and {name} differ in size: the image is {tuple(image.shape)}, the {name} "
            f"{tuple(maps.shape)} want {expected}; resize one to the other"
        )
    if not image.numel():
        raise DataError(f"the image has no pixels: {tuple(image.shape)}")
    if image.device != maps.device:
        raise DataError(f"the image is on {image.device}, the {name} are on {maps.device}")
    if not bool(torch.isfinite(maps).all()):
        raise DataError(f"{name} hold NaN or infinite values; find what made them")


def compute_dtype(values: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything shorter."""
    return torch.float64 if values.dtype is torch.float64 else torch.float32
