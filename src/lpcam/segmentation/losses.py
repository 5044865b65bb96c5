"""Losses of segmenters as pure functions (specification of segmentation, sections 1 to 3).

A mean over pixels is a sum and a count here, so that the processes which share a batch can divide
by the count of all of it; their parts then add up to its loss.

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

from lpcam.data.dataset import BACKGROUND, IGNORE
from lpcam.data.resize import resize

Kind = Literal["cross_entropy", "balanced"]
Meeting = Literal["reduced", "full"]


def nearest(length: int, size: int) -> Tensor:
    """Indices of the pixels that Pillow's nearest neighbour takes when resizing an axis.

    The pixel that holds (i + 1/2) length / size. Where that is a whole number, rounding decides;
    so the centres are added up one after the other in float64, as Pillow does.

    Returns:
        (size,) int64, on the CPU.

    Example:
        >>> nearest(4, 2).tolist()
        [1, 3]
    """
    step = length / size
    centres = np.full(size, step)
    centres[0] = step / 2
    return torch.from_numpy(np.add.accumulate(centres).astype(np.int64)).clamp(max=length - 1)


def reduce_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Labels (..., H, W) at ``size`` = (h, w), exactly as Pillow's NEAREST gives them.

    Example:
        >>> reduce_labels(torch.tensor([[0, 1, 2, 3]]), (1, 2)).tolist()
        [[1, 3]]
    """
    rows, columns = (
        nearest(length, int(side)).to(labels.device)
        for length, side in zip(labels.shape[-2:], size, strict=True)
    )
    return labels[..., rows[:, None], columns]


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy, summed over the pixels that count, and their number (int64).

    Without a pixel that counts both are 0, and so is the gradient.

    Args:
        logits: (B, L, h, w); half precision is computed in float32.
        labels: (B, h, w) int64.

    Example:
        >>> total, count = cross_entropy_sum(torch.zeros(1, 2, 1, 2), torch.tensor([[[1, 255]]]))
        >>> round(float(total), 4), int(count)
        (0.6931, 1)
    """
    return _pixel_losses(logits, labels).sum(), (labels != IGNORE).sum()


def balanced_sum(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Like :func:`cross_entropy_sum`, but separately for background and other pixels.

    The balanced loss is the mean over the former plus the mean over the latter (section 1, as in
    DSRG and AdvCAM).

    Returns:
        (2,) sums and (2,) int64 counts, the background's first.
    """
    losses = _pixel_losses(logits, labels)
    background = labels == BACKGROUND
    parts = torch.stack([background, ~background & (labels != IGNORE)])
    return torch.where(parts, losses, 0.0).sum((1, 2, 3)), parts.sum((1, 2, 3))


def _pixel_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, h, w), 0 where the label is 255."""
    # Without reduction, because CUDA adds up the others in any order.
    return F.cross_entropy(_wide(logits), labels, ignore_index=IGNORE, reduction="none")


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def segmentation_loss(
    outputs: Sequence[tuple[Tensor, float]],
    labels: Tensor,
    *,
    kind: Kind,
    meet: Meeting,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Weighted sum, over a network's outputs, of their mean cross-entropies.

    Args:
        outputs: (logits (B, L, h, w), weight of their loss); sizes may differ.
        labels: (B, H, W) int64, of the size of the network's input.
        kind: ``cross_entropy`` is the mean over the pixels that count; ``balanced`` as
            :func:`balanced_sum`.
        meet: ``reduced`` brings the labels to each output's size, ``full`` its logits to theirs.
        total: sums int64 counts over the processes that share the batch, as
            :meth:`lpcam.runtime.distributed.Processes.sum`. It is called once. None: there is one
            process.

    Returns:
        a scalar: this process's part, its sums divided by the counts of all. A mean without a
        pixel counts as 0, with a gradient of 0.

    Example:
        >>> outputs, labels = [(torch.zeros(1, 2, 1, 1), 1.0)], torch.tensor([[[0, 0]]])
        >>> loss = segmentation_loss(outputs, labels, kind="cross_entropy", meet="full")
        >>> round(float(loss), 4)
        0.6931
    """
    summed = cross_entropy_sum if kind == "cross_entropy" else balanced_sum
    sums, counts = [], []
    for logits, weight in outputs:
        if meet == "reduced":
            met = logits, reduce_labels(labels, logits.shape[-2:])
        else:
            met = resize(_wide(logits), labels.shape[-2:]), labels
        found, count = summed(*met)
        sums.append(weight * found)
        counts.append(count)
    every = torch.stack(counts)
    if total is not None:
        every = total(every).to(every.device)
    weighted = torch.stack(sums)
    return (weighted / every.clamp(min=1).to(weighted.dtype)).sum()
