"""The equations of CAM and LPCAM as pure functions on tensors.

Equation 1 is :func:`class_activation` (with ReLU and :func:`normalize`), equation 5 is
:func:`mean_cosine`, equation 6 is :func:`foreground_minus_context`. Equations 2 to 4 (split, score,
selection) make prototypes and are in :mod:`lpcam.prototypes`.

Shapes: B images, C channels, N classes, K prototypes, h x w the feature grid, H x W the image.
Every function keeps the device and dtype of its tensors. Nothing here applies a ReLU, a resize or a
normalisation that its name or first line does not say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPSILON = 1e-8
"""Smallest norm a vector is divided by, so that the cosine with a zero vector is zero."""

CHUNK_BYTES = 2**19
"""Of features that a CPU handles together: they stay in a core's cache."""

Normalization = Literal["max", "minmax"]


# -- Equation 1: the class activation map ------------------------------------------------------


def class_activation(features: Tensor, weight: Tensor) -> Tensor:
    """Equation 1 before its ReLU: A_n = w_n . f(x) at every location.

    Args:
        features: (..., C, h, w), the feature block before global average pooling.
        weight: (N, C), rows w_n of the bias-free classifier.

    Returns:
        (..., N, h, w), signed.

    Raises:
        ValueError: if the channel numbers differ.
    """
    _check_channels(features, weight)
    flat = features.flatten(-2)
    return (weight @ flat).reshape(*flat.shape[:-2], weight.shape[0], *features.shape[-2:])


# -- Equation 5: mean cosine to the prototypes -------------------------------------------------


def unit(vectors: Tensor, dim: int) -> Tensor:
    """L2-normalise along ``dim``; a zero vector stays zero."""
    normalised: Tensor = F.normalize(vectors, dim=dim, eps=NORM_EPSILON)
    return normalised


def unit_mean(prototypes: Tensor) -> Tensor:
    """Mean of the unit-normalised prototypes, itself *not* normalised again.

    This one vector carries all that equation 5 needs of K prototypes, because
    mean_i cos(f, F_i) = f/|f| . mean_i F_i/|F_i|. (Averaging raw centres first and normalising the
    mean would give another, wrong map.)

    Args:
        prototypes: (K, C), K >= 1.

    Returns:
        (C,).

    Raises:
        ValueError: if there is no prototype.
    """
    if prototypes.ndim != 2 or prototypes.shape[0] == 0:
        raise ValueError(
            f"expected prototypes of shape (K, C) with K >= 1, got {tuple(prototypes.shape)}"
        )
    return unit(prototypes, dim=1).mean(0)


def mean_cosine(features: Tensor, prototypes: Tensor) -> Tensor:
    """Equation 5: the mean over prototypes of cos(f(x), prototype) at every location.

    FG_n for the class prototypes F'_n, BG_n for the context prototypes B'_n.

    Args:
        features: (..., C, h, w).
        prototypes: (K, C), K >= 1.

    Returns:
        (..., h, w) in [-1, 1].

    Raises:
        ValueError: if the channel numbers differ or there is no prototype.
    """
    return cosine_activation(features, unit_mean(prototypes)[None])[..., 0, :, :]


# -- Equation 6: foreground minus context ------------------------------------------------------


def foreground_minus_context(foreground: Tensor, context: Tensor | None) -> Tensor:
    """Equation 6 before its ReLU, as one vector a class: v_n = mean(F^') - mean(B^').

    A_n = FG_n - BG_n is linear in f/|f|, so the difference of the two maps is the map of the
    difference; :func:`cosine_activation` with these vectors gives A_n for all classes at once.

    Args:
        foreground: (K, C) class prototypes F'_n.
        context: (K', C) context prototypes B'_n; None or K' = 0 leaves the subtraction out, as the
            released program does.

    Returns:
        (C,).
    """
    vector = unit_mean(foreground)
    if context is None or context.shape[0] == 0:
        return vector
    return vector - unit_mean(context)


def cosine_activation(features: Tensor, vectors: Tensor) -> Tensor:
    """Dot products of the unit features with the vectors: equations 5 and 6 for every class.

    Args:
        features: (..., C, h, w); normalised here over C.
        vectors: (N, C), e.g. of :func:`unit_mean` or :func:`foreground_minus_context`; used as
            they are.

    Returns:
        (..., N, h, w), signed. Equation 6 is its ReLU, then :func:`normalize` with "max".
    """
    return _cosine_activation(features, None, vectors)


# -- Flip and scales ---------------------------------------------------------------------------


def unflip(maps: Tensor) -> Tensor:
    """Mirror maps or features of a mirrored image back (last axis)."""
    return maps.flip(-1)


def cam_of_pair(features: Tensor, mirrored: Tensor | None, weight: Tensor) -> Tensor:
    """CAM of one scale: ReLU(A(f)) + unflip(ReLU(A(f_mirror))).

    Args:
        features: (..., C, h, w) of the image.
        mirrored: the same of the mirrored image, or None without flip.
        weight: (N, C).

    Returns:
        (..., N, h, w), non-negative, not normalised.
    """
    maps = class_activation(features, weight).relu()
    if mirrored is not None:
        maps = maps + unflip(class_activation(mirrored, weight).relu())
    return maps


def lpcam_of_pair(features: Tensor, mirrored: Tensor | None, vectors: Tensor) -> Tensor:
    """LPCAM of one scale: the cosine is taken on f + unflip(f_mirror), then ReLU.

    Args and returns as :func:`cam_of_pair`, with ``vectors`` (N, C) in the place of the weight.
    """
    return _cosine_activation(features, mirrored, vectors).relu()


def _cosine_activation(features: Tensor, mirrored: Tensor | None, vectors: Tensor) -> Tensor:
    """:func:`cosine_activation` of features + unflip(mirrored), the sum never made as a whole.

    The products and the squares of the norm are added up over chunks of channels, each while it is
    in the cache. Dividing the N products by the norm costs N instead of C divisions a location.
    """
    _check_channels(features, vectors)
    chunks = _chunks(features)
    products, squares = [], []
    for start, step in chunks:
        part = features.narrow(-3, start, step)
        if mirrored is not None:
            part = part + unflip(mirrored.narrow(-3, start, step))
        flat = part.flatten(-2)
        products.append(vectors[:, start : start + step] @ flat)
        if len(chunks) > 1:  # on a CPU several times as fast as the norm over planes that lie apart
            wide = flat if flat.dtype == torch.float64 else flat.float()  # half would overflow
            squares.append(wide.square().sum(-2, keepdim=True))
    norm = (
        sum(squares[1:], squares[0]).sqrt().to(features.dtype)
        if squares
        else torch.linalg.vector_norm(flat, dim=-2, keepdim=True)
    )
    maps = sum(products[1:], products[0]) / norm.clamp_min(NORM_EPSILON)
    return maps.reshape(*maps.shape[:-1], *features.shape[-2:])


def _chunks(features: Tensor) -> list[tuple[int, int]]:
    """First channel and number of channels of each chunk: several on a CPU, if planes lie apart."""
    channels = features.shape[-3]
    step = channels
    if features.device.type == "cpu" and features.stride(-3) != 1:
        plane = features.narrow(-3, 0, 1).numel() * features.element_size()
        step = max(1, min(channels, CHUNK_BYTES // max(1, plane)))
    return [(start, min(step, channels - start)) for start in range(0, channels, step)]


class FusedMaps(NamedTuple):
    """Maps of one image, fused over scales and normalised."""

    cam: Tensor
    """(..., N, ceil(H/4), ceil(W/4))"""
    high_res: Tensor
    """(..., N, H, W)"""


def strided(length: int, stride: int) -> int:
    """ceil(length / stride): the number of grid cells of ``stride`` pixels over ``length``."""
    return (length - 1) // stride + 1


def fuse_scales(
    maps: Sequence[Tensor], size: tuple[int, int], *, stride: int = 16, epsilon: float = 0.0
) -> FusedMaps:
    """Bilinear resize of each scale's maps, sum over scales, and max-normalisation.

    The resize is ``align_corners=False``; ``high_res`` goes to the next multiple of ``stride`` and
    is cropped, as the maps of a strided network cover such a multiple (specification of LPCAM,
    section 3, b and i).

    Args:
        maps: one (..., N, h, w) a scale.
        size: (H, W) of the image in pixels.
        stride: of the ``high_res`` target grid.
        epsilon: added to each class's maximum before the division.

    Raises:
        ValueError: if there is no scale or the size is not positive.
    """
    height, width = size
    if not maps or height < 1 or width < 1:
        raise ValueError(f"expected maps of at least one scale and a positive size, got {size}")
    quarter = (strided(height, 4), strided(width, 4))
    full = (strided(height, stride) * stride, strided(width, stride) * stride)
    cam = torch.stack([_bilinear(m, quarter) for m in maps]).sum(0)
    high_res = torch.stack([_bilinear(m, full) for m in maps]).sum(0)[..., :height, :width]
    return FusedMaps(normalize(cam, "max", epsilon), normalize(high_res, "max", epsilon))


def normalize(maps: Tensor, mode: Normalization = "max", epsilon: float = 0.0) -> Tensor:
    """Scale each class map by its spatial maximum ("max") or range ("minmax").

    A map without a positive maximum (or range) becomes zeros, never NaN.

    Args:
        maps: (..., N, h, w).
        mode: "max": m / (max + epsilon), equations 1 and 6. "minmax": (m - min)/(max - min +
            epsilon).
    """
    if mode == "minmax":
        maps = maps - maps.amin((-2, -1), keepdim=True)
    elif mode != "max":
        raise ValueError(f"unknown normalisation {mode!r}; use 'max' or 'minmax'")
    top = maps.amax((-2, -1), keepdim=True)
    return torch.where(top > 0, maps / torch.where(top > 0, top + epsilon, 1.0), 0.0)


def _bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    lead = maps.shape[:-2]
    flat = maps.reshape(1, math.prod(lead), *maps.shape[-2:])
    if flat.shape[1] == 0:
        return maps.new_zeros(*lead, *size)
    resized = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    return resized.reshape(*lead, *size)


def _check_channels(features: Tensor, rows: Tensor) -> None:
    if features.ndim < 3 or rows.ndim != 2 or features.shape[-3] != rows.shape[1]:
        raise ValueError(
            f"expected features (..., C, h, w) and rows (N, C) with the same C, got "
            f"{tuple(features.shape)} and {tuple(rows.shape)}"
        )
