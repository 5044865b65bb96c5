"""Localisation metrics of class maps: boxes and pixels.

``update`` counts one pair of a class map (H, W) in [0, 1] and its truth, ``compute`` returns
fractions. The truth is int64 (H, W) of :func:`class_truth`, of which void pixels do not count.

Source: Choe et al., Evaluating Weakly Supervised Object Localization Methods Right (CVPR 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou

from lpcam.data.dataset import IGNORE
from lpcam.method.objects import Plane, components, labelled_boxes
from lpcam.runtime.errors import DataError

MAP_THRESHOLDS = tuple(step / 100 for step in range(100))  #: For boxes; Choe et al. use 1000.
PIXEL_THRESHOLDS = tuple(step / 1000 for step in range(1001))  #: For pixels.
IOU_THRESHOLDS = (0.3, 0.5, 0.7)  #: IoU thresholds of MaxBoxAccV2.
ROUNDING = 1e-5  #: Resized maps may leave [0, 1] by this much; they are clipped.


def class_truth(labels: Tensor, index: int) -> Tensor:
    """Truth of a 0-based class: 1 on it, 0 elsewhere, IGNORE on void pixels of the labels (H, W).

    Example:
        >>> class_truth(torch.tensor([[0, 1, 2, 255]]), 1).tolist()
        [[0, 0, 1, 255]]
    """
    return torch.where(labels == IGNORE, IGNORE, (labels == index + 1).long())


def component_boxes(mask: Plane) -> NDArray[np.int64]:
    """Tightest boxes (K, 4) of the components of a mask, the largest first."""
    labels, count = components(mask)
    places = [(c.start, r.start, c.stop, r.stop) for _, (r, c) in labelled_boxes(labels, count)]
    corners = np.array(places, dtype=np.int64).reshape(-1, 4)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    return np.asarray(corners[np.lexsort((corners[:, 0], corners[:, 1], -areas))])


def truth_boxes(truth: Tensor) -> Tensor:
    """Tightest boxes int64 (M, 4), x0, y0, x1, y1 (end exclusive), of components of a class.

    Objects that touch share a box: prefer boxes of the data set. LpcamError without SciPy.

    Example:
        >>> truth_boxes(torch.tensor([[1, 1, 255, 0]])).tolist()
        [[0, 0, 2, 1]]
    """
    return torch.from_numpy(component_boxes(truth == 1))


class BoxAccuracy:
    """MaxBoxAccV2 (the extended article of Choe et al. 2020).

    A pair is correct at the IoU threshold d if the box of any component of map >= t has an IoU >= d
    with any box of the truth. The score is the maximum over t of the fraction of correct pairs,
    averaged over d. Void pixels stay in the maps.

    Example:
        >>> metric = BoxAccuracy([0.5], [0.5])
        >>> metric.update(torch.tensor([[0.9, 0.8, 0.0]]), torch.tensor([[0, 0, 3, 1]]))
        >>> metric.compute()
        1.0
    """

    def __init__(
        self,
        thresholds: Sequence[float] = MAP_THRESHOLDS,
        iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
    ) -> None:
        self.thresholds = _grid(thresholds)
        self.iou_thresholds = tuple(iou_thresholds)
        shape = (len(self.thresholds), len(self.iou_thresholds))
        self.hits = torch.zeros(shape, dtype=torch.int64)  #: (T, D) correct pairs
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
        ious = torch.zeros(len(self.thresholds), 1, dtype=torch.float64)
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
            ious[row] = box_iou(found.double(), truth.cpu().double()).max()
        self.hits += ious >= torch.tensor(self.iou_thresholds, dtype=torch.float64)
        self.pairs += 1

    def compute(self) -> float:
        """MaxBoxAccV2 of all pairs so far, a fraction; DataError if there was none."""
        if not self.pairs:
            raise DataError("no pair of map and boxes was counted; call update first")
        return float((self.hits.amax(0).double() / self.pairs).mean())


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
