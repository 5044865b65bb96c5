"""Pixel-adaptive mask refinement (PAMR): every pixel becomes the weighted mean of its neighbours.

Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels" (CVPR 2020). Neighbours
are the 8 others of 3 x 3 windows at several dilations, and weights a softmax over all of them of

    k(i, j) = - mean over channels of |x_i - x_j| / (width * sigma_i).

Where the paper is not explicit: sigma_i is the standard deviation, not its square, times ``width``
= 0.1; it counts the centre once for each dilation and divides by the number less one; windows
repeat the image's edge pixels.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lpcam.refine import base
from lpcam.runtime.settings import Positive, PresetModel


class PamrSettings(PresetModel):
    """Pixel-adaptive mask refinement (Araslanov and Roth 2020)."""

    table: ClassVar[str] = "pamr"
    preset: str = "default"

    dilations: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    """Dilations of the 3 x 3 neighbourhoods, in pixels."""
    width: Positive
    """Width of the affinity kernel, in local standard deviations of the image."""
    iterations: Annotated[int, Field(ge=0)]
    """Number of times that every pixel is replaced by the weighted mean of its neighbours."""


EPSILON = 1e-8  #: Added to width * sigma, so that equal neighbours have equal weights.


@torch.no_grad()
def pamr(image: Tensor, masks: Tensor, settings: PamrSettings) -> Tensor:
    """Refine soft masks (..., H, W), finite, by local affinities of an image (H, W, 3) uint8.

    DataError if shapes or dtypes do not fit, or a mask holds NaN.

    Example:
        >>> image, masks = torch.zeros(4, 5, 3, dtype=torch.uint8), torch.ones(2, 4, 5)
        >>> pamr(image, masks, PamrSettings.from_preset("default")).shape
        torch.Size([2, 4, 5])
    """
    base.check_image_and_maps(image, masks, "masks")
    weights = affinities(image, settings.dilations, settings.width, dtype=base.compute_dtype(masks))
    return propagate(masks, weights, settings.dilations, settings.iterations)


def affinities(
    image: Tensor, dilations: tuple[int, ...], width: float, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights of each pixel's neighbours at D dilations, by dilation, then by row: (8 D, H, W)."""
    height, length = int(image.shape[0]), int(image.shape[1])
    levels = image.movedim(-1, 0)
    # the mean over the channels and the sign of the exponent are included
    factor = (-1.0 / 3.0) / (_deviations(levels, dilations).to(dtype) * width + EPSILON)
    border, offsets = max(dilations), _offsets(dilations)
    values = _pad(levels.to(dtype), border)
    weights = factor.new_zeros(len(offsets), height, length)
    for into, (down, right) in zip(weights, offsets, strict=True):
        difference = (values[:, down : down + height, right : right + length] - levels).abs_()
        for channel in range(3):
            into.addcmul_(difference[channel], factor[channel])
    # A softmax whose bytes do not depend on the number of threads.
    weights.sub_(weights.amax(0)).exp_()
    total = weights[0].clone()
    for each in weights[1:]:
        total += each
    return weights.div_(total)


def _deviations(levels: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """Deviations (3, H, W) over all windows in integers, as n sum x^2 - (sum x)^2 cancels."""
    samples, border = 9 * len(dilations), max(dilations)
    exact = torch.int32 if (samples * 255) ** 2 < 2**31 else torch.int64
    height, width = levels.shape[-2:]
    values = _pad(levels.float(), border).to(exact)
    total, squares = (torch.zeros_like(levels, dtype=exact) for _ in range(2))
    for dilation in dilations:
        for y, x in itertools.product((border - dilation, border, border + dilation), repeat=2):
            window = values[:, y : y + height, x : x + width]
            total += window
            squares += window * window
    numerator = squares * samples - total * total
    return (numerator.double() / (samples * (samples - 1))).sqrt_()


def propagate(
    masks: Tensor, weights: Tensor, dilations: tuple[int, ...], iterations: int
) -> Tensor:
    """Replace pixels of masks by means of neighbours with :func:`affinities`, repeatedly."""
    height, width = (int(length) for length in masks.shape[-2:])
    device = masks.device
    offsets = torch.tensor(_offsets(dilations), device=device) - max(dilations)
    y = torch.arange(height, device=device).unsqueeze(1) + offsets[:, 0]
    x = torch.arange(width, device=device).unsqueeze(1) + offsets[:, 1]
    y = y.clamp_(0, height - 1).mul_(width).to(torch.int32)
    x = x.clamp_(0, width - 1).to(torch.int32)
    neighbours = (y.unsqueeze(1) + x).view(-1)
    begins = torch.arange(0, len(neighbours) + 1, len(offsets), dtype=torch.int32, device=device)
    rows = weights.flatten(1).t().contiguous().view(-1)
    current = masks.reshape(-1, height * width).t().to(weights.dtype).contiguous()
    for _ in range(iterations):
        current = F.embedding_bag(
            *(neighbours, current, begins),
            mode="sum",
            per_sample_weights=rows,
            include_last_offset=True,
        )
    return current.t().to(masks.dtype).reshape(masks.shape)


def _offsets(dilations: tuple[int, ...]) -> list[tuple[int, int]]:
    """Rows and columns of each neighbour, counted from the corner of the padding."""
    border = max(dilations)
    around = [step for step in itertools.product((-1, 0, 1), repeat=2) if any(step)]
    return [(border + d * down, border + d * right) for d in dilations for down, right in around]


def _pad(values: Tensor, border: int) -> Tensor:
    """Repeat the edge on all sides of (3, H, W)."""
    return F.pad(values, (border,) * 4, mode="replicate")


class _PamrRefinement(base.Refinement):
    """The maps averaged over neighbours of similar colour."""

    title = "PAMR"
    judged = True
    settings = PamrSettings

    def threshold(self, section: base.RefineSection, source: base.Source) -> float:
        return source.seed_threshold

    def refiner(self, job: base.Job, network: Path, folder: Path) -> base.Refine:
        return lambda picture: pamr(picture.image, picture.planes, job.settings)


REFINEMENT = _PamrRefinement()
