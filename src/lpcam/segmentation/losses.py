"""Losses of segmenters as pure functions (specification of segmentation, sections 1 to 3).

Shapes: B images of H x W pixels, L labels with the background, logits at h x w. Labels are int64:
0 the background, 1..L-1 the classes, 255 not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.classifiers.features import single
from lpcam.data.dataset import BACKGROUND, IGNORE
from lpcam.data.resize import resize


def nearest(length: int, size: int) -> Tensor:
    """Indices (size,) of the pixels that Pillow's nearest neighbour takes when resizing an axis."""
    # the centres are added up as Pillow does: where one is a whole number, rounding decides
    step = length / size
    centres = np.full(size, step)
    centres[0] = step / 2
    return torch.from_numpy(np.add.accumulate(centres).astype(np.int64)).clamp(max=length - 1)


def reduce_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Labels (..., H, W) at ``size`` = (h, w), exactly as Pillow's NEAREST gives them."""
    rows, columns = (
        nearest(length, int(side)).to(labels.device)
        for length, side in zip(labels.shape[-2:], size, strict=True)
    )
    return labels[..., rows[:, None], columns]


def sums_by_side(losses: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (2,) of losses (B, h, w) over background and over class pixels, and their numbers."""
    background = labels == BACKGROUND
    sides = torch.stack([background, ~background & (labels != IGNORE)])
    return torch.where(sides, losses, 0.0).sum((1, 2, 3)), sides.sum((1, 2, 3))


def segmentation_loss(
    outputs: Sequence[tuple[Tensor, float]],
    labels: Tensor,
    *,
    kind: Literal["cross_entropy", "balanced"],
    meet: Literal["reduced", "full"],
    total: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Tensor:
    """Weighted sum, over a network's outputs, of their mean cross-entropies.

    Args:
        outputs: (logits (B, L, h, w), weight of their loss); sizes may differ.
        labels: (B, H, W) int64, of the size of the network's input.
        kind: ``cross_entropy`` is the mean over the pixels that count; ``balanced`` the mean over
            those of the background plus the mean over those of a class (section 1).
        meet: ``reduced`` brings the labels to each output's size, ``full`` the logits to theirs.
        total: sums int64 counts over the processes that share the batch; called once.

    Returns:
        this process's part, its sums divided by the counts of all; a mean of no pixel is 0.
    """
    sums, counts = [], []
    for logits, weight in outputs:
        wide, met = single(logits), labels
        if meet == "reduced":
            met = reduce_labels(labels, logits.shape[-2:])
        else:
            wide = resize(wide, labels.shape[-2:])
        # Without reduction, because CUDA adds up the others in any order.
        losses = F.cross_entropy(wide, met, ignore_index=IGNORE, reduction="none")
        if kind == "balanced":
            found, count = sums_by_side(losses, met)
        else:
            found, count = losses.sum(), (met != IGNORE).sum()
        sums.append(weight * found)
        counts.append(count)
    weighted = torch.stack(sums)
    return (weighted / total(torch.stack(counts)).clamp(min=1).to(weighted)).sum()
