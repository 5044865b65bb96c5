"""Metrics: cases worked out by hand, against a plain recount, and under permutations."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from lpcam.data.dataset import IGNORE, ClassTable
from lpcam.evaluation.segmentation import (
    DEFAULT_THRESHOLDS,
    ThresholdSweep,
    best_threshold,
    confusion,
    scores,
    truth_labels,
)
from lpcam.method.seeds import seeds
from lpcam.runtime.errors import DataError

CLASSES = ClassTable(("cow", "dog"), (10, 12))

# rows truth, columns prediction: background, cow, dog
BY_HAND = torch.tensor([[50, 10, 0], [5, 20, 5], [0, 0, 10]])


def test_truth_labels_ignore_other_classes() -> None:
    mask = np.array([[0, 10, 12, 255, 8, 254, 1]], dtype=np.uint8)
    expected = [[0, 1, 2, IGNORE, IGNORE, IGNORE, IGNORE]]
    assert truth_labels(mask, CLASSES).tolist() == expected
    assert truth_labels(torch.from_numpy(mask), CLASSES).tolist() == expected
    assert truth_labels(mask, CLASSES).dtype == torch.int64
    turned = ClassTable(("dog", "cow"), (12, 10))
    assert truth_labels(mask, turned)[0, :3].tolist() == [0, 2, 1]


def test_confusion_by_hand() -> None:
    truth = torch.tensor([[0, 0, 1, 2, IGNORE, 1]])
    prediction = torch.tensor([[0, 1, 1, 0, 2, 2]])
    matrix = confusion(truth, prediction, 3)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 1], [1, 0, 0]]
    nothing = torch.full((1, 6), IGNORE)
    assert confusion(nothing, prediction, 3).tolist() == [[0] * 3] * 3


@pytest.mark.parametrize(
    ("truth", "prediction", "message"),
    [
        ([[0, 1]], [[0]], r"truth is \(1, 2\) but the prediction is \(1, 1\)"),
        ([[0, 3]], [[0, 0]], "truth has labels from 0 to 3; expected 0 to 2"),
        ([[0, 0]], [[0, 255]], "prediction has labels from 0 to 255; expected 0 to 2"),
        ([[0, 0]], [[-1, 0]], "prediction has labels from -1 to 0"),
    ],
)
def test_confusion_refuses(
    truth: list[list[int]], prediction: list[list[int]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        confusion(torch.tensor(truth), torch.tensor(prediction), 3)


def test_scores_by_hand() -> None:
    found = scores(BY_HAND, ["cow", "dog"])
    # background: TP 50, truth 60, predicted 55, union 65; cow: 20, 30, 30, 40; dog: 10, 10, 15, 15
    assert found.miou == pytest.approx((50 / 65 + 20 / 40 + 10 / 15) / 3)
    assert found.fp == pytest.approx((10 / 40 + 5 / 15) / 2)
    assert found.fn == pytest.approx((10 / 40 + 0) / 2)
    assert found.precision == pytest.approx((20 / 30 + 10 / 15) / 2)
    assert found.recall == pytest.approx((20 / 30 + 1) / 2)
    assert found.precision_with_background == pytest.approx((50 / 55 + 20 / 30 + 10 / 15) / 3)
    assert found.recall_with_background == pytest.approx((50 / 60 + 20 / 30 + 1) / 3)
    assert list(found.per_class) == ["background", "cow", "dog"]
    assert found.per_class["cow"] == pytest.approx(
        {"iou": 0.5, "fp": 0.25, "fn": 0.25, "precision": 2 / 3, "recall": 2 / 3}
    )
    for one in found.per_class.values():
        assert one["iou"] + one["fp"] + one["fn"] == pytest.approx(1)
    assert found.left_out == ()


def test_classes_without_a_pixel_are_left_out_and_named() -> None:
    matrix = torch.zeros(5, 5, dtype=torch.int64)
    matrix[:3, :3] = BY_HAND
    padded = scores(matrix, ["cow", "dog", "cat", "hen"])
    plain = scores(BY_HAND, ["cow", "dog"])
    assert padded.left_out == ("cat", "hen")
    assert dataclasses.replace(padded, left_out=()) == plain


def test_a_class_only_predicted_or_never_predicted_counts_with_0() -> None:
    matrix = torch.tensor([[10, 0, 5], [10, 0, 0], [0, 0, 0]])
    found = scores(matrix, ["cow", "dog"])
    assert found.miou == pytest.approx(10 / 25 / 3)
    assert (found.fp, found.fn) == (0.5, 0.5)
    assert (found.precision, found.recall) == (0, 0)
    assert found.per_class["cow"] == {"iou": 0, "fp": 0, "fn": 1, "precision": 0, "recall": 0}
    assert found.per_class["dog"] == {"iou": 0, "fp": 1, "fn": 0, "precision": 0, "recall": 0}


def test_scores_refuse() -> None:
    with pytest.raises(DataError, match=r"\(3, 3\)"):
        scores(BY_HAND, ["cow"])
    with pytest.raises(DataError, match="all different"):
        scores(BY_HAND, ["cow", "background"])
    with pytest.raises(DataError, match="no pixel of any class"):
        scores(torch.tensor([[10, 5], [0, 0]]), ["cow"])


Images = list[tuple[Tensor, Tensor, Tensor]]


def images(num_classes: int = 4, dtype: torch.dtype = torch.float32) -> Images:
    """Truth, maps and keys of random images with 0 to 3 classes; many values lie on the grid."""
    generator = torch.Generator().manual_seed(0)
    found: Images = []
    for number in range(6):
        size = (7 + number, 9)
        truth = torch.randint(0, num_classes + 1, size, generator=generator)
        truth[torch.rand(size, generator=generator) < 0.1] = IGNORE
        keys = torch.randperm(num_classes, generator=generator)[: number % 4]
        maps = torch.randint(0, 101, (len(keys), *size), generator=generator) / 100
        found.append((truth, maps.to(dtype), keys))
    return found


def run_sweep(images: Images, num_classes: int = 4) -> ThresholdSweep:
    sweep = ThresholdSweep(num_classes)
    for truth, maps, keys in images:
        sweep.update(truth, maps, keys)
    return sweep


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_sweep_equals_a_recount_of_the_seeds_at_every_threshold(dtype: torch.dtype) -> None:
    data = images(dtype=dtype)
    matrices = run_sweep(data).confusions()
    assert matrices.shape == (100, 5, 5) and matrices.dtype == torch.int64
    for threshold, matrix in zip(DEFAULT_THRESHOLDS, matrices, strict=True):
        expected = torch.zeros(5, 5, dtype=torch.int64)
        for truth, maps, keys in data:
            labels = torch.cat([torch.tensor([0]), keys + 1])[seeds(maps, threshold)]
            for row in range(5):
                for column in range(5):
                    expected[row, column] += ((truth == row) & (labels == column)).sum()
        assert torch.equal(matrix, expected), threshold


def test_best_threshold_by_hand() -> None:
    sweep = ThresholdSweep(1, thresholds=(0.1, 0.2, 0.3, 0.4, 0.5))
    truth = torch.tensor([[0, 0, 1, 1, IGNORE]])
    maps = torch.tensor([[[0.15, 0.25, 0.45, 0.9, 0.9]]])
    sweep.update(truth, maps, torch.tensor([0]))
    threshold, found = best_threshold(sweep, ["cow"])
    assert threshold == 0.3  # 0.4 is as good: the lowest of equal ones
    assert found.miou == 1
    assert sweep.confusion(0.5).tolist() == [[2, 0], [1, 1]]
    assert sweep.confusion(0.1).tolist() == [[0, 2], [0, 2]]


def test_sweep_refuses_an_image_and_keeps_its_counts() -> None:
    sweep = ThresholdSweep(2)
    truth, maps, keys = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(1, 2, 3), torch.ones(1)
    keys = keys.long()
    for wrong, message in (
        ((truth[:1], maps, keys), r"maps are \(1, 2, 3\), keys \(1,\) and truth \(1, 3\)"),
        ((truth, maps, keys[:0]), r"keys \(0,\)"),
        ((truth, maps, keys + 1), "keys has labels from 2 to 2; expected 0 to 1"),
        ((truth + 3, maps, keys), "truth has labels from 3 to 3; expected 0 to 2"),
        ((truth, maps * torch.nan, keys), "NaN or infinite"),
    ):
        with pytest.raises(DataError, match=message):
            sweep.update(*wrong)
    assert sweep.histogram.sum() == 0
