"""Segmentation metrics from the confusion matrix of a data set (specification, section 5).

Labels are 0 for the background, 1..N for the classes of a ``ClassTable``, and ``IGNORE`` in the
truth for pixels that do not count. Rows of a confusion matrix are truth, columns are prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpcam.data.dataset import BACKGROUND, IGNORE, ClassTable
from lpcam.runtime.errors import DataError

DEFAULT_THRESHOLDS = tuple(step / 100 for step in range(100))  #: Of a sweep.


def truth_labels(mask: NDArray[np.uint8] | Tensor, classes: ClassTable) -> Tensor:
    """Convert mask values to labels, int64 (H, W): 0, 1..N, and IGNORE for other values.

    Example:
        >>> mask = np.array([[0, 8, 12, 255]], np.uint8)
        >>> truth_labels(mask, ClassTable(("dog",), (12,))).tolist()
        [[0, 255, 1, 255]]
    """
    table = torch.full((256,), IGNORE, dtype=torch.int64)
    table[BACKGROUND] = 0
    for label, mask_id in enumerate(classes.mask_ids, start=1):
        table[mask_id] = label
    values = torch.as_tensor(mask)
    return table.to(values.device).take(values.long())


def confusion(truth: Tensor, prediction: Tensor, num_labels: int) -> Tensor:
    """Confusion matrix, int64 (L, L), of two maps of labels 0..L-1; no IGNORE of the truth.

    DataError if the shapes differ or a label is out of range.
    """
    if truth.shape != prediction.shape:
        raise DataError(
            f"truth is {tuple(truth.shape)} but the prediction is {tuple(prediction.shape)}; "
            "they must have the size of the same image"
        )
    counted = truth != IGNORE
    truth, prediction = truth[counted].long(), prediction[counted].long()
    _check_range("truth", truth, num_labels)
    _check_range("prediction", prediction, num_labels)
    flat = torch.bincount(truth * num_labels + prediction, minlength=num_labels**2)
    return flat.view(num_labels, num_labels)


def _check_range(what: str, labels: Tensor, count: int) -> None:
    low, high = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
    if low < 0 or high >= count:
        raise DataError(f"{what} has labels from {low} to {high}; expected 0 to {count - 1}")


class ThresholdSweep:
    """Exact confusion matrices at every threshold of a grid, from one pass over the data set.

    Labels at a threshold are those of :func:`lpcam.method.seeds.seeds`.

    Example:
        >>> sweep = ThresholdSweep(1, [0.25, 0.5])
        >>> sweep.update(torch.tensor([[0, 1]]), torch.tensor([[[0.375, 0.75]]]), torch.tensor([0]))
        >>> sweep.confusions().tolist()
        [[[0, 1], [0, 1]], [[1, 0], [0, 1]]]
    """

    def __init__(self, num_classes: int, thresholds: Sequence[float] = DEFAULT_THRESHOLDS) -> None:
        self.num_classes = num_classes
        self.thresholds = tuple(thresholds)
        shape = (num_classes + 1, num_classes, len(thresholds) + 1)
        self.histogram = torch.zeros(shape, dtype=torch.int64)
        """(N+1, N, T+1) pixels by truth, best class and grid cell of the best value"""

    def update(self, truth: Tensor, maps: Tensor, keys: Tensor) -> None:
        """Count truth int64 (H, W), maps (K, H, W) and their 0-based keys (K,) of an image."""
        if maps.ndim != 3 or maps.shape[1:] != truth.shape or keys.shape != maps.shape[:1]:
            raise DataError(
                f"maps are {tuple(maps.shape)}, keys {tuple(keys.shape)} and truth "
                f"{tuple(truth.shape)}; expected (K, H, W), (K,) and (H, W)"
            )
        _check_range("keys", keys, self.num_classes)
        counted = truth != IGNORE
        _check_range("truth", truth.where(counted, 0), self.num_classes + 1)
        # Pixels that do not count get a last row, which is dropped: faster than to gather the rest.
        labels = truth.int().where(counted, self.num_classes + 1)
        bins = len(self.thresholds) + 1
        index = labels * (self.num_classes * bins)  # background at every threshold
        if len(keys):
            best, plane = maps.max(dim=0)
            if not torch.isfinite(best).all():
                raise DataError("maps have NaN or infinite values; make them again")
            # in the dtype of the maps, in which a map is compared with one number too
            grid = torch.tensor(self.thresholds, dtype=maps.dtype, device=maps.device)
            # number of thresholds < the value
            index += torch.searchsorted(grid, best, out_int32=True)
            index += (keys * bins).int().take(plane)
        row = self.histogram[0].numel()
        counts = torch.bincount(index.flatten(), minlength=self.histogram.numel() + row)
        self.histogram += counts[:-row].view_as(self.histogram).to(self.histogram.device)

    def confusions(self) -> Tensor:
        """Confusion matrices int64 (T, N+1, N+1), one for each threshold of the grid."""
        above = _above(self.histogram)
        background = self.histogram.sum((1, 2)).unsqueeze(1) - above.sum(1)
        return torch.cat([background.unsqueeze(1), above], dim=1).permute(2, 0, 1)

    def confusion(self, threshold: float) -> Tensor:
        """Confusion matrix, int64 (N+1, N+1), at one threshold of the grid."""
        return self.confusions()[self.thresholds.index(threshold)]

    def ious(self, classes: Sequence[int]) -> Tensor:
        """IoU of 0-based classes at every threshold, float64 (K, T); NaN if a class is nowhere."""
        above = _above(self.histogram[:, list(classes)])
        truth = [c + 1 for c in classes]
        hits = above[truth, range(len(truth))]
        union = self.histogram.sum((1, 2))[truth].unsqueeze(1) + above.sum(0) - hits
        return hits.double() / union

    def curves(self, names: Sequence[str]) -> dict[str, list[float]]:
        """Lists ``miou``, ``precision`` and ``recall`` over ``thresholds`` (paper, Figure 5(d))."""
        found = [scores(confusion, names) for confusion in self.confusions()]
        curves = {k: [getattr(one, k) for one in found] for k in ("miou", "precision", "recall")}
        return {"thresholds": list(self.thresholds), **curves}


def _above(histogram: Tensor) -> Tensor:
    """Pixels above each threshold, int64 (..., T), from those in each cell, (..., T+1)."""
    return histogram.flip(-1).cumsum(-1).flip(-1)[..., 1:]


@dataclass(frozen=True)
class Scores:
    """Scores as fractions, each a mean over classes: ``miou`` with background, others without.

    ``fp`` and ``fn`` are false positives and negatives over the union. ``left_out`` are classes
    without a pixel in truth and prediction, which no mean counts.
    """

    miou: float
    fp: float
    fn: float
    precision: float
    recall: float
    precision_with_background: float
    recall_with_background: float
    per_class: dict[str, dict[str, float]]
    left_out: tuple[str, ...]

    def summary(self) -> str:
        """A table in percent: the background, each class, and the means."""
        columns = ("iou", "fp", "fn", "precision", "recall")
        rows = {name: [values[c] for c in columns] for name, values in self.per_class.items()}
        rows["mean"] = [self.miou, self.fp, self.fn, self.precision, self.recall]
        width = max(map(len, rows))
        lines = [" " * width + "".join(f"{name:>11}" for name in columns)]
        for name, values in rows.items():
            lines.append(f"{name:<{width}}" + "".join(f"{100 * value:11.1f}" for value in values))
        if self.left_out:
            lines.append(f"in no mask, and not counted: {', '.join(self.left_out)}")
        return "\n".join(lines)


def scores(confusion: Tensor, names: Sequence[str]) -> Scores:
    """Scores of a confusion matrix (N+1, N+1) whose classes 1..N are ``names``.

    Precision and recall are 0 for 0 / 0 (specification, section 5).

    Raises:
        DataError: if the shape does not fit the names, or the truth has no pixel of any class.

    Example:
        >>> scores(torch.tensor([[6, 2], [0, 2]]), ["cow"]).per_class["cow"]["iou"]
        0.5
    """
    labels = ("background", *names)
    if tuple(confusion.shape) != (len(labels), len(labels)) or len(set(labels)) != len(labels):
        raise DataError(
            f"confusion matrix {tuple(confusion.shape)} does not fit the labels "
            f"{', '.join(labels)}; expected a row and a column for each, all different"
        )
    if confusion[1:].sum() == 0:
        raise DataError(
            "the truth has no pixel of any class; check that the masks hold the classes' mask ids "
            "(0 is background, 255 is ignored) and that the list has images with masks and labels; "
            "COCO's crowds are no truth: they are background, or ignored"
        )
    truth, predicted = confusion.sum(1).double(), confusion.sum(0).double()
    hit = confusion.diagonal().double()
    union = truth + predicted - hit
    table = {
        "iou": hit / union,
        "fp": (predicted - hit) / union,
        "fn": (truth - hit) / union,
        "precision": hit / predicted.clamp(min=1),
        "recall": hit / truth.clamp(min=1),
    }
    counts = union > 0
    means = {name: values[counts].mean().item() for name, values in table.items()}
    without = {name: values[1:][counts[1:]].mean().item() for name, values in table.items()}
    return Scores(
        miou=means.pop("iou"),
        **{name: without[name] for name in ("fp", "fn", "precision", "recall")},
        precision_with_background=means["precision"],
        recall_with_background=means["recall"],
        per_class={
            label: {name: values[row].item() for name, values in table.items()}
            for row, label in enumerate(labels)
            if counts[row]
        },
        left_out=tuple(label for row, label in enumerate(labels) if not counts[row]),
    )


def best_threshold(sweep: ThresholdSweep, names: Sequence[str]) -> tuple[float, Scores]:
    """Threshold with the highest mIoU, the lowest of equal ones, by the truth; and its scores."""
    every = [scores(matrix, names) for matrix in sweep.confusions()]
    best = int(np.argmax([one.miou for one in every]))
    return sweep.thresholds[best], every[best]
