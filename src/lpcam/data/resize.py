"""Sizes of images and maps, and the one bilinear resize of maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """(height, width) at ``scale``, rounded half to even as released programs do, at least 1."""
    return max(1, round(height * scale)), max(1, round(width * scale))


def quarter_size(size: Sequence[int]) -> tuple[int, int]:
    """Size (ceil(H / 4), ceil(W / 4)) of the stride-4 maps of an image."""
    height, width = size
    return -(-height // 4), -(-width // 4)


def resize(planes: Tensor, size: Sequence[int]) -> Tensor:
    """Resize planes ([B,] C, h, w), C may be 0, to ``size`` (H, W) bilinearly, at pixel centres."""
    if tuple(planes.shape[-2:]) == tuple(size):
        return planes
    if not planes.numel():
        return planes.new_zeros(*planes.shape[:-2], *size)
    batch = planes if planes.ndim == 4 else planes[None]
    resized = F.interpolate(batch, size=tuple(size), mode="bilinear", align_corners=False)
    return resized if planes.ndim == 4 else resized[0]
