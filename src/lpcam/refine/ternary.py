"""Ternary labels for IRN: sure foreground, sure background, ignored pixels between (section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpcam.data.dataset import IGNORE, ClassTable
from lpcam.data.masks import enlarge_labels
from lpcam.method.seeds import seeds, to_mask
from lpcam.refine.base import Picture
from lpcam.refine.crf import DenseCrf


def crf_labels(
    crf: DenseCrf, image: Tensor, maps: Tensor, thresholds: Sequence[float]
) -> list[Tensor]:
    """Seeds of maps (K, H, W) at each threshold, as hard labels cleaned by a CRF: int64 (H, W)."""
    hard = [seeds(maps, threshold) for threshold in thresholds]
    if not len(maps):
        return hard
    return list(crf.refine_labels(image, torch.stack(hard), len(maps) + 1).argmax(1))


def ternary(foreground: Tensor, background: Tensor) -> Tensor:
    """Join labels (H, W) of a high and a low threshold; where only the low has a class, 255."""
    return foreground.masked_fill((foreground == 0) & (background != 0), IGNORE)


def ternary_mask(
    crf: DenseCrf, picture: Picture, thresholds: Sequence[float], classes: ClassTable
) -> NDArray[np.uint8]:
    """The ternary mask (H, W) of an image, at the size of its maps: 0, mask ids, 255 undecided."""
    labels = ternary(*crf_labels(crf, picture.image, picture.planes, thresholds)).cpu()
    labels = enlarge_labels(labels, picture.maps.high_res.shape[-2:])
    unsure = labels == IGNORE
    mask = to_mask(labels.masked_fill(unsure, 0), picture.maps.keys, classes)
    mask[unsure.numpy()] = IGNORE
    return mask
