"""Equations 1 to 6 of the paper as pure functions on tensors.

Shapes: B images, C channels, N classes, K prototypes, h x w the feature grid, H x W the image.
Every function keeps the device and dtype of its tensors. None applies a ReLU, a resize or a
normalisation that its name or first line does not state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.data.resize import quarter_size, resize

NORM_EPSILON = 1e-8
"""Lower bound of the norm that a vector is divided by: a zero vector has cosine 0."""
CHUNK_BYTES = 2**19  #: Features that a CPU processes together, as they fit in a core's cache.
BEST_MARGIN = 1e-6  #: Scores that differ from the best by less count as best.
GRID = 16  #: Usual stride of a network, in pixels: maps are enlarged to a multiple, then cropped.
RIDGE = 0.01
"""Penalty of :func:`ridge_vector`, times the number of prototypes."""
Normalization = Literal["max", "minmax"]
Similarity = Literal["cosine", "dot", "euclidean"]
"""What a feature is compared with prototypes by; euclidean: minus the squared distance."""


def class_activation(features: Tensor, weight: Tensor) -> Tensor:
    """Equation 1 before its ReLU: A_n = w_n . f(x) at every location.

    Features are (..., C, h, w), before global average pooling, and rows w_n (N, C); signed maps
    (..., N, h, w).

    Example:
        >>> features = torch.tensor([[[1.0, 2.0]], [[3.0, -1.0]]])
        >>> class_activation(features, torch.tensor([[1.0, 1.0]])).tolist()
        [[[4.0, 1.0]]]
    """
    _check_channels(features, weight)
    maps = weight @ features.flatten(-2)
    return maps.reshape(*maps.shape[:-1], *features.shape[-2:])


def split(cam: Tensor, tau: float, *, inclusive: bool) -> tuple[Tensor, Tensor]:
    """Equation 2: locations of the foreground and of the context of a class, as boolean tensors.

    Args:
        cam: (..., h, w), max-normalised CAM of a class, in [0, 1].
        tau: threshold in [0, 1]. Larger values move locations from the foreground to the context.
        inclusive: True: foreground is cam >= tau (the paper). False: cam > tau; locations equal to
            tau belong to neither (the released program).

    Example:
        >>> foreground, context = split(torch.tensor([0.0, 0.1, 0.5]), 0.1, inclusive=True)
        >>> foreground.tolist(), context.tolist()
        ([False, True, True], [True, False, False])
    """
    return (cam >= tau if inclusive else cam > tau), cam < tau


def score(centers: Tensor, weight: Tensor, index: int, bias: Tensor | None = None) -> Tensor:
    """Equations 3 and 4: z_i (K,) = softmax over classes of (centre . w), read at one class.

    The centre is *not* normalised: its length acts as a temperature, and the thresholds mu_f and
    mu_b depend on it. For spherical clusters give the plain means of the members. The only row of
    a binary classifier is scored by the sigmoid, the softmax of its logit and zero.

    Args:
        centers: (K, C).
        weight, bias: (N, C) and (N,) of the classifier. That of the paper has no bias.
        index: row of the class that the centres belong to.

    Example:
        >>> score(torch.tensor([[1.0, 1.0]]), torch.eye(2), 0).tolist()
        [0.5]
    """
    logits = centers @ weight.T
    if bias is not None:
        logits = logits + bias
    return logits[:, 0].sigmoid() if len(weight) == 1 else logits.softmax(dim=1)[:, index]


def select_foreground(scores: Tensor, mu_f: float) -> Tensor:
    """Class prototypes F' = {F_i : z_i > mu_f}, or the centres of the best score if none passes.

    Scores are (K,); NaN marks a missing centre and is never selected.

    Example:
        >>> select_foreground(torch.tensor([0.95, 0.5]), 0.9).tolist()
        [True, False]
    """
    keep = scores > mu_f
    if keep.any() or not torch.isfinite(scores).any():
        return keep
    best = scores[torch.isfinite(scores)].max()
    return (scores - best).abs() < BEST_MARGIN


def select_context(scores: Tensor, mu_b: float, lower: float | None) -> Tensor:
    """Context prototypes B' = {B_i : lower < z_i < mu_b}; possibly none.

    Scores are as for :func:`select_foreground`. The paper has no lower bound; the released program
    uses 0.05 on VOC and 0 on COCO, where it drops scores that underflow to 0.

    Example:
        >>> select_context(torch.tensor([0.01, 0.5, 0.95]), 0.9, 0.05).tolist()
        [False, True, False]
    """
    below = scores < mu_b
    return below if lower is None else below & (scores > lower)


def mean_cosine(features: Tensor, prototypes: Tensor) -> Tensor:
    """Equation 5: mean over the prototypes of cos(f(x), prototype) at every location.

    This is FG_n for the class prototypes F'_n and BG_n for the context prototypes B'_n, (K, C).
    Features are (..., C, h, w); the result is (..., h, w) in [-1, 1].

    Example:
        >>> features = torch.tensor([0.0, 4.0])[:, None, None]
        >>> mean_cosine(features, torch.tensor([[9.0, 0.0], [0.0, 0.5]])).tolist()
        [[0.5]]
    """
    return cosine_activation(features, unit_mean(prototypes)[None])[..., 0, :, :]


def unit(vectors: Tensor, dim: int) -> Tensor:
    """L2-normalise along ``dim``; a zero vector stays zero."""
    normalised: Tensor = F.normalize(vectors, dim=dim, eps=NORM_EPSILON)
    return normalised


def unit_mean(prototypes: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean (C,) of the unit-normalised prototypes (K, C), K >= 1; *not* normalised again.

    With ``weights`` (K,) >= 0, of any positive sum, it is the weighted mean.

    Equation 5 needs this one vector only: mean_i cos(f, F_i) = f/|f| . mean_i F_i/|F_i|.
    Normalising the mean of the raw centres would give a different, wrong map.

    Example:
        >>> unit_mean(torch.tensor([[100.0, 0.0], [0.0, 1.0]])).tolist()
        [0.5, 0.5]
    """
    if prototypes.ndim != 2 or not len(prototypes):
        raise ValueError(f"expected prototypes (K, C) with K >= 1, got {tuple(prototypes.shape)}")
    rows = unit(prototypes, dim=1)
    return rows.mean(0) if weights is None else weights / weights.sum() @ rows


def foreground_minus_context(
    foreground: Tensor,
    context: Tensor | None,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """Equation 6 before its ReLU, as one vector v_n (C,) of a class; ``weights`` of each side.

    A_n = FG_n - BG_n is linear in f/|f|, so it is the map of the vector
    v_n = unit_mean(F') - unit_mean(B'). :func:`cosine_activation` maps it. Nothing is subtracted
    without context prototypes, as in the released program.

    Example:
        >>> foreground_minus_context(torch.eye(2)[:1], torch.eye(2)[1:]).tolist()
        [1.0, -1.0]
    """
    vector = unit_mean(foreground, weights[0])
    if context is None or not len(context):
        return vector
    return vector - unit_mean(context, weights[1])


def ridge_vector(
    target: Tensor,
    foreground: Tensor,
    context: Tensor | None,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """The vector sum_i a_i p_i (C,) of unit prototypes p_i of both sides that is nearest to CAM's.

    The a_i, of any sign, minimise |w/|w| - sum_i a_i p_i|^2 + RIDGE K |a|^2 for the classifier's
    row w, the ``target`` (C,), and K prototypes. A prototype of weight g is penalised by 1/g.

    Example:
        >>> ridge_vector(torch.tensor([0.0, 5.0]), torch.eye(2)[:1], torch.eye(2)[1:]).tolist()
        [0.0, 0.9803921580314636]
    """
    sides = [foreground] if context is None else [foreground, context]
    rows = [
        unit(own, dim=1) * (1.0 if factors is None else factors.sqrt()[:, None])
        for own, factors in zip(sides, weights, strict=False)
    ]
    matrix = torch.cat(rows).double()
    gram = matrix @ matrix.T + RIDGE * len(matrix) * torch.eye(len(matrix)).to(matrix)
    solved = torch.linalg.solve(gram, matrix @ unit(target.to(matrix), dim=0))
    vector: Tensor = (solved @ matrix).to(foreground.dtype)
    return vector


def affine_row(
    similarity: Similarity,
    foreground: Tensor,
    context: Tensor | None,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """Vector and bias (C + 1,) of the map of a class by "dot" or "euclidean", on raw features.

    The weighted means of f.F_i and f.B_i, or of -|f - F_i|^2 and -|f - B_i|^2, are subtracted as in
    equation 6: the difference is affine in f. Without context prototypes the context is the zero
    vector, which has cosine 0 to everything.

    Example:
        >>> affine_row("euclidean", torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 0.0]])).tolist()
        [4.0, 2.0, -9.0]
    """
    row = foreground.new_zeros(foreground.shape[1] + 1)
    for sign, own, factors in zip((1.0, -1.0), (foreground, context), weights, strict=True):
        if own is not None and len(own):
            shares = own.new_ones(len(own)) if factors is None else factors
            bias = -own.square().sum(1, keepdim=True) * (similarity == "euclidean")
            rows = torch.cat([own if similarity == "dot" else 2 * own, bias], 1)
            row += sign / shares.sum() * shares @ rows
    return row


def cosine_activation(features: Tensor, vectors: Tensor, mirrored: Tensor | None = None) -> Tensor:
    """Dot products of unit features with vectors: equations 5 and 6 for all classes at once.

    Equation 6 is the ReLU of it, then :func:`normalize` with "max".

    Args:
        features: (..., C, h, w); normalised here over C.
        vectors: (N, C), from :func:`unit_mean` or :func:`foreground_minus_context`; not normalised.
        mirrored: features of the mirrored image, for the maps of features + unflip(mirrored).

    Returns:
        (..., N, h, w), signed.

    Example:
        >>> features = torch.tensor([0.0, 4.0])[:, None, None]
        >>> cosine_activation(features, torch.tensor([[0.5, -0.5]])).tolist()
        [[[-0.5]]]
    """
    # The products are divided by the norm: N instead of C divisions a location. They and the
    # squares of the norm are summed over chunks of channels, each while it is in the cache.
    _check_channels(features, vectors)
    channels = step = features.shape[-3]
    if features.device.type == "cpu" and features.stride(-3) != 1:  # else C is the last in memory
        plane = features.narrow(-3, 0, 1).numel() * features.element_size()
        step = max(1, min(channels, CHUNK_BYTES // max(1, plane)))
    products, squares = [], []
    for start in range(0, channels, step):
        size = min(step, channels - start)
        part = features.narrow(-3, start, size)
        if mirrored is not None:
            part = part + unflip(mirrored.narrow(-3, start, size))
        flat = part.flatten(-2)
        products.append(vectors[:, start : start + size] @ flat)
        if step < channels:
            wide = flat if flat.dtype == torch.float64 else flat.float()  # half would overflow
            squares.append(wide.square().sum(-2, keepdim=True))
    norm = (
        sum(squares[1:], squares[0]).sqrt().to(features.dtype)
        if squares
        else torch.linalg.vector_norm(flat, dim=-2, keepdim=True)
    )
    maps = sum(products[1:], products[0]) / norm.clamp_min(NORM_EPSILON)
    return maps.reshape(*maps.shape[:-1], *features.shape[-2:])


def zeros_on_demand(*shape: int, like: Tensor) -> Tensor:
    """Zeros of the dtype and device of a tensor; on a CPU they take memory once written to."""
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
        return like.new_zeros(shape)
    # NumPy leaves the zeros to the system, torch writes them
    return torch.from_numpy(np.zeros(shape, str(like.dtype).removeprefix("torch.")))


def unflip(maps: Tensor) -> Tensor:
    """Mirror maps or features of a mirrored image back (last axis)."""
    return maps.flip(-1)


def cam_of_pair(features: Tensor, mirrored: Tensor | None, weight: Tensor) -> Tensor:
    """CAM of one scale: ReLU(A(f)) + unflip(ReLU(A(f_mirror))), (..., N, h, w), not normalised."""
    maps = class_activation(features, weight).relu()
    return maps if mirrored is None else maps + unflip(class_activation(mirrored, weight).relu())


def lpcam_of_pair(features: Tensor, mirrored: Tensor | None, vectors: Tensor) -> Tensor:
    """LPCAM of one scale: ReLU of :func:`cosine_activation`."""
    return cosine_activation(features, vectors, mirrored).relu()


def affine_of_pair(features: Tensor, mirrored: Tensor | None, rows: Tensor) -> Tensor:
    """The map of one scale by rows (N, C + 1) of :func:`affine_row`, after a ReLU.

    Features are not normalised; those of the image and its mirror image are averaged.
    """
    if mirrored is not None:
        features = (features + unflip(mirrored)) / 2
    return (class_activation(features, rows[:, :-1]) + rows[:, -1:, None]).relu()


class FusedMaps(NamedTuple):
    """Maps of one image, summed over scales and normalised to [0, 1]."""

    cam: Tensor  #: (..., N, ceil(H/4), ceil(W/4))
    high_res: Tensor  #: (..., N, H, W)


def strided(length: int, stride: int) -> int:
    """Number of grid cells of ``stride`` pixels that cover ``length`` pixels, rounded up."""
    return (length - 1) // stride + 1  # ONNX rounds the quotient of a negative number up


def fuse_scales(
    maps: Sequence[Tensor], size: tuple[int, int], *, stride: int = GRID, epsilon: float = 0.0
) -> FusedMaps:
    """Resize each scale's maps bilinearly, sum them over scales, divide by the maximum.

    ``high_res`` is resized to the next multiple of ``stride``, which the maps of a strided network
    cover, and cropped (specification of LPCAM, section 3, b and i).

    Args:
        maps: (..., N, h, w) for each scale.
        size: (H, W) of the image in pixels.
        epsilon: added to the maximum of each class before the division.

    Example:
        >>> fused = fuse_scales([torch.ones(1, 2, 3), torch.ones(1, 4, 6)], (30, 48))
        >>> fused.cam.shape, fused.high_res.shape
        (torch.Size([1, 8, 12]), torch.Size([1, 30, 48]))
    """
    height, width = size
    if not maps or height < 1 or width < 1:
        raise ValueError(f"got {len(maps)} scales and size {size}; expected both positive")
    full = (strided(height, stride) * stride, strided(width, stride) * stride)
    cam, high_res = (
        torch.stack([resize(m.flatten(0, -3), to).reshape(*m.shape[:-2], *to) for m in maps]).sum(0)
        for to in (quarter_size(size), full)
    )
    high_res = high_res[..., :height, :width]
    return FusedMaps(normalize(cam, "max", epsilon), normalize(high_res, "max", epsilon))


def normalize(maps: Tensor, mode: Normalization = "max", epsilon: float = 0.0) -> Tensor:
    """Scale each class map by its spatial maximum ("max") or range ("minmax").

    A map without a positive maximum (or range) becomes zeros, never NaN. "max" is m / (max +
    epsilon), equations 1 and 6; "minmax" is (m - min) / (max - min + epsilon).

    Example:
        >>> normalize(torch.tensor([[[1.0, 4.0]], [[0.0, 0.0]]])).tolist()
        [[[0.25, 1.0]], [[0.0, 0.0]]]
    """
    if mode == "minmax":
        maps = maps - maps.amin((-2, -1), keepdim=True)
    elif mode != "max":
        raise ValueError(f"mode is {mode!r}; expected 'max' or 'minmax'")
    top = maps.amax((-2, -1), keepdim=True)
    return torch.where(top > 0, maps / torch.where(top > 0, top + epsilon, 1.0), 0.0)


def _check_channels(features: Tensor, rows: Tensor) -> None:
    if features.ndim < 3 or rows.ndim != 2 or features.shape[-3] != rows.shape[1]:
        raise ValueError(
            f"features have shape {tuple(features.shape)} and the class rows {tuple(rows.shape)}; "
            "expected (..., C, h, w) and (N, C) with the same C"
        )
