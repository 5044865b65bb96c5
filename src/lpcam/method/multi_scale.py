"""CAM and LPCAM maps of one image from its features at several scales, with and without flip."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lpcam.classifiers.features import FeaturePair, image_of
from lpcam.data.resize import quarter_size, resize
from lpcam.method.functional import (
    FusedMaps,
    Similarity,
    affine_of_pair,
    cam_of_pair,
    class_activation,
    cosine_activation,
    fuse_scales,
    lpcam_of_pair,
    normalize,
    unflip,
    unit,
)

NEAREST = 8  #: Prototypes of a class whose cosines :func:`discriminative_map` averages.
OfPair = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""``cam_of_pair`` or ``lpcam_of_pair``: maps of one scale from features and the rows of classes."""


def cam_maps(
    pairs: Iterable[FeaturePair], weight: Tensor, size: tuple[int, int], *, epsilon: float
) -> FusedMaps:
    """CAM of equation 1 with rows (N, C) over scales and flip, for an image of a size (H, W)."""
    maps = [cam_of_pair(*pair, weight) for pair in pairs]
    return fuse_scales(maps, size, epsilon=epsilon)


def lpcam_maps(
    pairs: Iterable[FeaturePair],
    vectors: Tensor,
    size: tuple[int, int],
    similarity: Similarity = "cosine",
) -> FusedMaps:
    """As :func:`cam_maps`, LPCAM of equations 5 and 6 with rows of ``Prototypes.vectors``."""
    of_pair = lpcam_of_pair if similarity == "cosine" else affine_of_pair
    return fuse_scales([of_pair(*pair, vectors) for pair in pairs], size)


def present_maps(
    of_pair: OfPair,
    pairs: Iterable[FeaturePair],
    rows: Tensor,
    present: Sequence[Sequence[int]],
    size: tuple[int, int],
    *,
    epsilon: float = 0.0,
) -> list[Tensor]:
    """Maps (K, H, W) of the K classes that each image of a batch has, from rows of all classes."""
    chosen = [rows[list(classes)] for classes in present]
    scales: list[list[Tensor]] = [[] for _ in present]
    for pair in pairs:
        for place, of_image in enumerate(chosen):
            if len(of_image):
                scales[place].append(of_pair(*image_of(pair, place), of_image))
    return [
        fuse_scales(maps, size, epsilon=epsilon).high_res if maps else rows.new_zeros(0, *size)
        for maps in scales
    ]


def discriminative_map(
    pairs: Iterable[FeaturePair],
    weight: Tensor,
    prototypes: Sequence[Tensor],
    index: int,
    size: Sequence[int],
) -> Tensor:
    """A map (H, W) >= 0 that is high on the parts that only the class ``index`` has.

    The product of two contrasts, each the amount by which a class exceeds all others (0 if there
    is none), or 0: of equation 1 before its ReLU, and of the mean of the ``NEAREST`` largest
    cosines to class prototypes, both summed over scales and flip.

    Args:
        pairs: features (C, h, w) of one image for each scale.
        weight: (N, C), rows of all classes.
        prototypes: class prototypes (M, C) for each of the N classes; M may be 0.
        index: 0-based class index.
        size: (H, W) of the image in pixels.
    """
    # A class without prototypes has zeros, which are nearest to nothing.
    rows = [unit(each if len(each) else each.new_zeros(1, each.shape[1]), 1) for each in prototypes]
    found = []
    for features, mirrored in pairs:
        cams = class_activation(features, weight.to(features))
        if mirrored is not None:
            cams = cams + unflip(class_activation(mirrored, weight.to(features)))
        cosines = cosine_activation(features, torch.cat(rows).to(features), mirrored)
        parts = cosines.split_with_sizes([*map(len, rows)])
        nearest = [part.topk(min(NEAREST, len(part)), dim=0).values.mean(0) for part in parts]
        found.append(resize(torch.stack([cams, torch.stack(nearest)]), quarter_size(size)))
    sums = torch.stack(found).sum(0)
    own, others = sums[:, index], sums[:, [n for n in range(len(weight)) if n != index]]
    highest = others.amax(1) if len(weight) > 1 else torch.zeros_like(own)
    return resize((own - highest).relu().prod(0, keepdim=True), size)[0]


def single_scale_cam(features: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    """Equation 1 on the feature grid, one scale, no flip: (C, h, w) to (K, h, w) in [0, 1]."""
    return normalize(class_activation(features, weight).relu(), "max", epsilon)
