"""Localisation metrics: cases worked out by hand, against plain recounts, and void pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from benchmarks.localisation_measures import (
    BoxAccuracy,
    PixelAveragePrecision,
    component_boxes,
    truth_boxes,
)
from lpcam.data.dataset import IGNORE
from lpcam.method.objects import boxes
from lpcam.runtime.errors import DataError


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def smooth_map(height: int, width: int) -> torch.Tensor:
    coarse = torch.rand(1, 1, 5, 6) ** 2
    plane = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0, 0]
    return plane / plane.max()


def test_boxes_of_a_truth_leave_void_out() -> None:
    truth = torch.tensor([[1, 1, IGNORE, 0, 1], [0, 1, IGNORE, 0, 0]])
    assert truth_boxes(truth).tolist() == [[0, 0, 2, 2], [4, 0, 5, 1]]
    assert truth_boxes(torch.zeros(2, 3)).shape == (0, 4)


def test_boxes_alone_are_those_of_the_records() -> None:
    rng = np.random.default_rng(2)
    for share in (0.0, 0.2, 0.4, 0.6):
        mask = rng.random((15, 18)) < share
        expected = [[b.x0, b.y0, b.x1, b.y1] for b in boxes(mask)]
        assert component_boxes(torch.from_numpy(mask)).tolist() == expected


def test_max_box_accuracy_by_hand() -> None:
    """A large component beside the object, which itself is found from 0.5 on alone."""
    plane = torch.zeros(10, 10)
    plane[0:5, 0:4] = 0.1  # 20 pixels off the object; a value at the threshold counts
    plane[6:8, 6:10] = 0.8  # the lower half of the object
    truth = torch.tensor([[6, 5, 10, 8]])
    metric = BoxAccuracy([0.1, 0.5, 0.9], [0.3, 8 / 12, 0.7])
    metric.update(plane, truth)
    # at 0.1 and 0.5 the IoU is 8 / 12, whatever lies beside it; at 0.9 there is nothing
    assert metric.hits.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    metric.update(torch.zeros(10, 10), truth)
    assert metric.compute() == pytest.approx(1 / 3)
    assert metric.pairs == 2


def test_leaving_pixels_behind_changes_no_box() -> None:
    thresholds = [step / 20 for step in range(20)]
    for _ in range(10):
        plane = smooth_map(30, 37)
        truth = torch.tensor([[3, 4, 20, 25], [22, 2, 36, 12]])
        metric = BoxAccuracy(thresholds)
        metric.update(plane, truth)
        for row, threshold in enumerate(thresholds):
            found = boxes(plane >= threshold)
            corners = torch.tensor([[b.x0, b.y0, b.x1, b.y1] for b in found])
            ious = box_iou(corners.double(), truth.double()).amax(1)
            for column, least in enumerate(metric.iou_thresholds):
                assert metric.hits[row, column] == (ious.max() >= least)


def test_pixel_average_precision_by_hand() -> None:
    metric = PixelAveragePrecision([0.0, 0.25, 0.5, 0.75])
    plane = torch.tensor([[0.9, 0.8, 0.6], [0.5, 0.3, 0.0]])
    truth = torch.tensor([[1, 0, 1], [1, IGNORE, 0]])
    for row in (slice(0, 1), slice(1, 2)):  # the pixels of all pairs are pooled
        metric.update(plane[row], truth[row])
    # >= 0.75: 1 of 2 right, recall 1/3; >= 0.5: 3 of 4, recall 1; then no more recall
    assert metric.compute() == pytest.approx(0.5 / 3 + 0.75 * 2 / 3)


def test_a_perfect_map_scores_1_everywhere() -> None:
    truth = torch.zeros(20, 30, dtype=torch.int64)
    truth[4:15, 6:20] = 1
    truth[15, 6:20] = IGNORE
    plane = (truth == 1).float() * (1 + 1e-6) - 1e-7  # the rounding of resized maps is forgiven
    box, pixels = BoxAccuracy(), PixelAveragePrecision()
    box.update(plane, truth_boxes(truth))
    pixels.update(plane, truth)
    assert box.compute() == 1
    assert pixels.compute() == 1


TRUTH = torch.tensor([[1, 0]])


def test_wrong_input_is_refused() -> None:
    box, pixels = BoxAccuracy(), PixelAveragePrecision()
    one_box = torch.tensor([[0, 0, 1, 1]])
    refused = [
        (lambda: pixels.update(torch.tensor([[0.0, 7.0]]), TRUTH), "from 0.0 to 7.0"),
        (lambda: box.update(torch.tensor([[0.0, float("nan")]]), one_box), "nan"),
        (lambda: pixels.update(TRUTH, TRUTH), "torch.int64"),
        (lambda: pixels.update(torch.zeros(1, 3), TRUTH), r"\(1, 3\)"),
        (lambda: pixels.update(torch.zeros(1, 2), torch.tensor([[1, 2]])), "0, 1 and 255"),
        (lambda: box.update(torch.zeros(1, 2), torch.zeros(0, 4)), r"\[\]"),
        (lambda: box.update(torch.zeros(1, 2), torch.tensor([[0, 0, 0, 1]])), r"\[0, 0, 0, 1\]"),
        (lambda: BoxAccuracy([0.5, 0.5]), "increasing"),
        (lambda: PixelAveragePrecision([0.1, 0.5]), "0.1"),
        *((metric.compute, "was counted") for metric in (box, pixels)),
    ]
    for call, message in refused:
        with pytest.raises(DataError, match=message):
            call()
