"""Feature pyramids of images, and a store that shares them between stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.classifiers.classifier import Classifier
from lpcam.classifiers.wrapped import WrappedModel
from lpcam.data.images import scaled_size
from lpcam.runtime.errors import PrototypeError

Source = Classifier | WrappedModel
"""A classifier that gives a feature map and the rows of its classes."""


class FeaturePair(NamedTuple):
    """Features of one scale, of the image and of the mirrored image."""

    features: Tensor
    """(..., C, h, w)"""
    mirrored: Tensor | None
    """(..., C, h, w), or None without flip"""


# -- One image at several scales ---------------------------------------------------------------


def tensor_pyramid(
    source: Source, images: Tensor, scales: Sequence[float], *, flip: bool
) -> Iterator[FeaturePair]:
    """Features of normalised images (B, c, H, W) at each scale, resized by antialiased bicubic.

    Resized sides are rounded to multiples of ``source.multiple``, if the model requires them.
    """
    height, width = images.shape[-2:]
    multiple = source.multiple if isinstance(source, WrappedModel) else 1
    for scale in scales:
        size = scaled_size(height, width, scale)
        resized = images
        if size != (height, width):
            size = (_nearest_multiple(size[0], multiple), _nearest_multiple(size[1], multiple))
        if size != (height, width):
            resized = F.interpolate(
                single(images), size=size, mode="bicubic", align_corners=False, antialias=True
            ).to(images.dtype)
        yield _pair(source, resized, flip=flip, precision=None)


def _nearest_multiple(side: int, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple


def _pair(
    source: Source, images: Tensor, *, flip: bool, precision: torch.dtype | None
) -> FeaturePair:
    stacked = torch.cat([images, images.flip(-1)]) if flip else images
    if isinstance(source, Classifier):
        # Convolutions on a CPU are a tenth faster in this layout, with the same results.
        stacked = stacked.to(source.weight.dtype, memory_format=torch.channels_last)
    else:
        stacked = stacked.contiguous()  # the model may call view
    with torch.autocast(images.device.type, precision, enabled=precision is not None):
        features = single(source.features(stacked))
    if not all_finite(features):
        raise PrototypeError(
            "the backbone gave NaN or Inf features for this image; check its weights and the "
            "preprocessing (mean and std)"
        )
    count = images.shape[0]
    return FeaturePair(features[:count], features[count:] if flip else None)


def single(values: Tensor) -> Tensor:
    """Convert half precision to float32; keep float32 and float64.

    Example:
        >>> single(torch.ones(1, dtype=torch.float16)).dtype
        torch.float32
    """
    return values.float() if values.dtype.itemsize < torch.float32.itemsize else values


def all_finite(values: Tensor) -> bool:
    """Check that no value is NaN or Inf.

    Example:
        >>> all_finite(torch.tensor([1.0, float("nan")]))
        False
    """
    # A NaN or Inf makes the sum NaN or Inf; so does an overflow, which needs a second look.
    total = values.sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(values).all())


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Context without the caller's autocast."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    context: AbstractContextManager[None] = torch.autocast(device.type, enabled=False)
    return context
