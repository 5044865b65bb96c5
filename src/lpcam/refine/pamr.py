"""Pixel-adaptive mask refinement (PAMR): every pixel becomes the weighted mean of its neighbours.

Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels" (CVPR 2020), section on
PAMR. The neighbours of a pixel are the 8 others of a 3 x 3 window, at several dilations. Their
weights are a softmax over all of them of

    k(i, j) = - mean over channels of |x_i - x_j| / (width * sigma_i),

with sigma_i the standard deviation of the channel in the neighbourhood of i. They depend on the
image alone; the masks are averaged with them again and again. Local where the dense CRF is global,
and much the quicker of the two on a GPU.

Written from the paper's description. Where it leaves room: the denominator is sigma_i itself, not
its square, times a constant ``width`` of 0.1, so that the weights do not change with the contrast
of the image; sigma_i counts the window's centre once for each dilation and divides by the number
less one; windows reach over the image's border onto its edge pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.presets import PamrSettings
from lpcam.refine.inputs import check_image_and_maps, compute_dtype

EPSILON = 1e-8
"""Added to width * sigma: where all neighbours are equal, all weights are."""

STRIP_BYTES = 2**19
"""Of masks that a CPU handles together: they stay in a core's cache."""


def pamr(image: Tensor, masks: Tensor, settings: PamrSettings) -> Tensor:
    """Refine soft masks by local affinities of the image.

    Args:
        image: (..., H, W, 3) RGB, uint8.
        masks: (..., K, H, W) floating-point, finite; any range. Each result is a weighted mean of
            a mask's own values, so its range is kept and classes that sum to one still do.
        settings: dilations, width and iterations.

    Returns:
        (..., K, H, W) of the masks' dtype.

    Raises:
        DataError: if shapes, devices or dtypes do not fit, or if a mask holds NaN.
    """
    check_image_and_maps(image, masks, "masks")
    weights = affinities(image, settings.dilations, settings.width, dtype=compute_dtype(masks))
    return propagate(masks, weights, settings.dilations, settings.iterations)


def affinities(
    image: Tensor,
    dilations: tuple[int, ...],
    width: float,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights of each pixel's neighbours: (..., 8 D, H, W), summing to one.

    Args:
        image: (..., H, W, 3) uint8.
        dilations: D of them, in pixels; the neighbours come dilation by dilation, row by row.
        width: of the kernel, in standard deviations.
    """
    pixels = image.movedim(-1, -3).to(dtype) / 255.0
    size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
    padded = _pad(pixels, max(dilations))
    offsets = _offsets(dilations)
    samples = 9 * len(dilations)
    # Differences from the pixel itself, which the centres do not add to: no cancellation.
    total, squares = torch.zeros_like(pixels), torch.zeros_like(pixels)
    for offset in offsets:
        difference = _shift(padded, offset, size) - pixels
        total += difference
        squares.addcmul_(difference, difference)
    variance = (squares - total.square() / samples).clamp_(min=0.0) / (samples - 1)
    scale = variance.sqrt_().mul_(width).add_(EPSILON).reciprocal_()
    kernel = [
        (_shift(padded, offset, size) - pixels).abs_().mul_(scale).mean(-3).neg_()
        for offset in offsets
    ]
    return torch.stack(kernel, -3).softmax(-3)


def propagate(
    masks: Tensor, weights: Tensor, dilations: tuple[int, ...], iterations: int
) -> Tensor:
    """Replace every mask by the weighted means of its neighbours, so many times.

    Args:
        masks: (..., K, H, W).
        weights: (..., 8 D, H, W) of :func:`affinities` with the same dilations.
    """
    height, width = int(masks.shape[-2]), int(masks.shape[-1])
    offsets = _offsets(dilations)
    current = masks.to(weights.dtype)
    rows = height
    if masks.device.type == "cpu":
        row_bytes = current.element_size() * max(1, current.numel() // max(1, height))
        rows = max(1, min(height, STRIP_BYTES // row_bytes))
    for _ in range(iterations):
        padded = _pad(current, max(dilations))
        current = torch.zeros_like(current)
        for top in range(0, height, rows):
            strip = slice(top, min(top + rows, height))
            into = current[..., strip, :]
            for number, offset in enumerate(offsets):
                neighbour = _shift(padded, offset, (height, width))[..., strip, :]
                into.addcmul_(weights[..., number, None, strip, :], neighbour)
    return current.to(masks.dtype)


def _offsets(dilations: tuple[int, ...]) -> list[tuple[int, int]]:
    """Down and right to each neighbour, counted from the corner of the padding."""
    border = max(dilations)
    return [
        (border + dilation * down, border + dilation * right)
        for dilation in dilations
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
        if down or right
    ]


def _pad(values: Tensor, border: int) -> Tensor:
    """Repeat the edge on all sides."""
    flat = values.reshape(-1, 1, *values.shape[-2:])
    padded = F.pad(flat, (border,) * 4, mode="replicate")
    return padded.reshape(*values.shape[:-2], *padded.shape[-2:])


def _shift(padded: Tensor, offset: tuple[int, int], size: tuple[int, int]) -> Tensor:
    down, right = offset
    return padded[..., down : down + size[0], right : right + size[1]]
