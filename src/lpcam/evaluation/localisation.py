"""Localisation metrics of class maps: boxes, peaks and pixels.

``update`` counts one pair of a class map (H, W) in [0, 1] and its truth, ``compute`` returns
fractions. The truth is int64 (H, W) of :func:`class_truth`, of which void pixels do not count.

Sources: Choe et al., Evaluating Weakly Supervised Object Localization Methods Right (CVPR 2020).
Zhang et al., Top-Down Neural Attention by Excitation Backprop (IJCV 2018): the pointing game.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from lpcam.data.dataset import IGNORE
from lpcam.method.objects import component_boxes
from lpcam.runtime.errors import DataError

MAP_THRESHOLDS = tuple(step / 100 for step in range(100))  #: For boxes; Choe et al. use 1000.
PIXEL_THRESHOLDS = tuple(step / 1000 for step in range(1001))  #: For pixels.
IOU_THRESHOLDS = (0.3, 0.5, 0.7)  #: IoU thresholds of MaxBoxAccV2.
TOLERANCE = 15.0  #: Tolerance of the pointing game, in pixels.
ROUNDING = 1e-5  #: Resized maps may leave [0, 1] by this much; they are clipped.


def class_truth(labels: Tensor, index: int) -> Tensor:
    """Truth of a 0-based class: 1 on it, 0 elsewhere, IGNORE on void pixels of the labels (H, W).

    Example:
        >>> class_truth(torch.tensor([[0, 1, 2, 255]]), 1).tolist()
        [[0, 0, 1, 255]]
    """
    return torch.where(labels == IGNORE, IGNORE, (labels == index + 1).long())


def truth_boxes(truth: Tensor) -> Tensor:
    """Tightest boxes int64 (M, 4), x0, y0, x1, y1 (end exclusive), of components of a class.

    Objects that touch share a box: prefer boxes of the data set. LpcamError without SciPy.

    Example:
        >>> truth_boxes(torch.tensor([[1, 1, 255, 0]])).tolist()
        [[0, 0, 2, 1]]
    """
    return torch.from_numpy(component_boxes(truth == 1))


@dataclass(frozen=True)
class BoxScores:
    """Fractions of pairs, each at its best threshold of the maps."""

    max_box_acc: dict[float, float]  #: Fraction of correct pairs by IoU threshold.
    max_box_acc_v2: float  #: Its mean if the box of any component counts.
    pairs: int


class BoxAccuracy:
    """MaxBoxAcc and MaxBoxAccV2 (Choe et al. 2020, the latter in their extended article).

    A pair is correct at the IoU threshold d for MaxBoxAcc if the box of the largest component of
    map >= t has an IoU >= d with any box of the truth; for MaxBoxAccV2 if that of any component
    has. Both are the maximum over t of the fraction of correct pairs; MaxBoxAccV2 is averaged over
    d. Void pixels stay in the maps.

    Example:
        >>> metric = BoxAccuracy([0.5], [0.5])
        >>> metric.update(torch.tensor([[0.9, 0.8, 0.0]]), torch.tensor([[0, 0, 3, 1]]))
        >>> metric.compute().max_box_acc
        {0.5: 1.0}
    """

    def __init__(
        self,
        thresholds: Sequence[float] = MAP_THRESHOLDS,
        iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
    ) -> None:
        self.thresholds = _grid(thresholds)
        self.iou_thresholds = tuple(iou_thresholds)
        shape = (2, len(self.thresholds), len(self.iou_thresholds))
        self.hits = torch.zeros(shape, dtype=torch.int64)
        """(2, T, D) correct pairs for MaxBoxAcc and for MaxBoxAccV2"""
        self.pairs = 0

    def update(self, values: Tensor, truth: Tensor) -> None:
        """Count a map and its true boxes (M, 4) of `truth_boxes`; DataError if they do not fit."""
        fits = truth.ndim == 2 and truth.shape[1:] == (4,) and len(truth) > 0
        if not fits or bool((truth[:, 2:] <= truth[:, :2]).any()):
            raise DataError(
                f"boxes of the truth are {truth.tolist()}; expected (M, 4) with M >= 1, x0 < x1 "
                "and y0 < y1: skip classes that the truth does not show"
            )
        plane = _checked(values).cpu().numpy()
        ious = torch.zeros(2, len(self.thresholds), 1, dtype=torch.float64)
        left, top = 0, 0
        for row, threshold in enumerate(self.thresholds):
            # The foreground only shrinks as the threshold increases: continue in its box.
            inside = plane >= threshold
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            if not len(rows):
                break
            place = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            plane, top, left = plane[place], top + int(rows[0]), left + int(columns[0])
            corner = np.array([left, top, left, top])
            found = torch.from_numpy(component_boxes(inside[place]) + corner)
            best = box_iou(found.double(), truth.cpu().double()).amax(1)
            ious[0, row], ious[1, row] = best[0], best.max()
        self.hits += ious >= torch.tensor(self.iou_thresholds, dtype=torch.float64)
        self.pairs += 1

    def compute(self) -> BoxScores:
        """The scores of all pairs so far; DataError if there was none."""
        if not self.pairs:
            raise DataError("no pair of map and boxes was counted; call update first")
        largest, every = (self.hits.amax(1).double() / self.pairs).tolist()
        by_iou = dict(zip(self.iou_thresholds, largest, strict=True))
        return BoxScores(by_iou, sum(every) / len(every), self.pairs)


@dataclass(frozen=True)
class PointingScores:
    """Fractions of hits, means over the classes that have pairs."""

    tolerant: float  #: Fraction of hits within ``tolerance`` pixels.
    exact: float  #: Fraction of hits on the object itself.
    pairs: int


class PointingGame:
    """The pointing game (Zhang et al. 2018): is the map's highest pixel on the object?

    A hit is at most ``tolerance`` pixels from the class, an exact hit on it; the first of equal
    pixels in reading order counts, a constant map is a miss. The score is the mean over classes.

    Example:
        >>> game = PointingGame(1, tolerance=1)
        >>> game.update(torch.tensor([[0.1, 0.9, 0.2]]), torch.tensor([[1, 0, 0]]), 0)
        >>> game.compute().tolerant, game.compute().exact
        (1.0, 0.0)
    """

    def __init__(self, num_classes: int, tolerance: float = TOLERANCE) -> None:
        self.tolerance = tolerance
        self.counts = torch.zeros(num_classes, 3, dtype=torch.int64)
        """(N, 3) pairs, hits within the tolerance, exact hits"""

    def update(self, values: Tensor, truth: Tensor, index: int) -> None:
        """Count a map and the truth of a 0-based class; DataError if that is not shown."""
        plane = _checked(values)
        counted = _fits(plane, truth)
        on = (truth == 1).nonzero()
        if not len(on):
            raise DataError("the truth does not show the class; skip the pair")
        shown = plane[counted]
        self.counts[index, 0] += 1
        if shown.min() == shown.max():
            return
        # argmax of a tensor gives any of equal pixels
        peak = ((plane == shown.max()) & counted).nonzero()[0]
        away = int((on - peak).square().sum(1).min())
        self.counts[index, 1] += away <= self.tolerance**2
        self.counts[index, 2] += away == 0

    def compute(self) -> PointingScores:
        """The scores of all pairs so far; DataError if there was none."""
        rows = [row for row in self.counts.tolist() if row[0]]
        if not rows:
            raise DataError("no pair of map and truth was counted; call update first")
        tolerant, exact = (sum(row[n] / row[0] for row in rows) / len(rows) for n in (1, 2))
        return PointingScores(tolerant, exact, sum(row[0] for row in rows))


class PixelAveragePrecision:
    """PxAP (Choe et al. 2020): area under the precision-recall curve of the pixels of all pairs.

    With foreground map >= t for thresholds t_1 > t_2 > ..., precision is 1 without foreground and
    PxAP = sum_l PxPrec(t_l) (PxRec(t_l) - PxRec(t_(l-1))). The lowest threshold must be 0.

    Example:
        >>> metric = PixelAveragePrecision([0.0, 0.5])
        >>> metric.update(torch.tensor([[0.9, 0.8, 0.1]]), torch.tensor([[1, 0, 0]]))
        >>> metric.compute()
        0.5
    """

    def __init__(self, thresholds: Sequence[float] = PIXEL_THRESHOLDS) -> None:
        self.thresholds = _grid(thresholds)
        if self.thresholds[0] != 0:
            raise DataError(f"the first threshold is {self.thresholds[0]}; expected 0")
        self.histogram = torch.zeros(2, len(self.thresholds), dtype=torch.int64)
        """(2, T) pixels off and on the class, by the highest threshold <= their value"""

    def update(self, values: Tensor, truth: Tensor) -> None:
        """Count a map (H, W) in [0, 1] and its truth; DataError if they do not fit."""
        plane = _checked(values)
        counted = _fits(plane, truth)
        # in the dtype of the maps, in which a map is compared with one number too
        grid = torch.tensor(self.thresholds, dtype=plane.dtype, device=plane.device)
        cells = torch.searchsorted(grid, plane[counted], right=True) - 1
        index = truth[counted].long() * len(self.thresholds) + cells
        counts = torch.bincount(index, minlength=self.histogram.numel())
        self.histogram += counts.view_as(self.histogram).to(self.histogram.device)

    def compute(self) -> float:
        """PxAP of all pairs so far, a fraction; DataError without a pixel of any class."""
        off, on = self.histogram.flip(1).cumsum(1).double()
        if not on[-1]:
            raise DataError("no pixel of a class was counted; call update with truth that has some")
        precision = torch.where(on + off > 0, on / (on + off).clamp(min=1), 1.0).tolist()
        recall = pairwise([0.0, *(on / on[-1]).tolist()])
        gains = (p * (now - before) for p, (before, now) in zip(precision, recall, strict=True))
        return float(sum(gains))


def _grid(thresholds: Sequence[float]) -> tuple[float, ...]:
    if not thresholds or any(a >= b for a, b in pairwise(thresholds)):
        raise DataError(f"thresholds are {list(thresholds)}; expected strictly increasing ones")
    return tuple(thresholds)


def _checked(values: Tensor) -> Tensor:
    plane = values.detach()
    if plane.ndim != 2 or not plane.is_floating_point() or not plane.numel():
        raise DataError(f"map is {plane.dtype} {tuple(plane.shape)}; expected float (H, W)")
    # both comparisons are false for NaN
    if not (plane.min() >= -ROUNDING and plane.max() <= 1 + ROUNDING):
        raise DataError(
            f"map has values from {float(plane.min())} to {float(plane.max())}; expected 0 to 1, "
            "normalise it first"
        )
    return plane.clamp(0, 1)


def _fits(plane: Tensor, truth: Tensor) -> Tensor:
    """Pixels that are counted, (H, W) bool."""
    if truth.shape != plane.shape:
        raise DataError(
            f"map is {tuple(plane.shape)} but the truth {tuple(truth.shape)}; they must have the "
            "size of the same image"
        )
    counted = truth != IGNORE
    if bool(((truth != 0) & (truth != 1) & counted).any()):
        raise DataError("truth has values other than 0, 1 and 255; use class_truth")
    return counted
