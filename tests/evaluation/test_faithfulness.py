"""Insertion and deletion on a linear model, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lpcam.evaluation.faithfulness import deletion, filled, insertion
from lpcam.runtime.errors import DataError

WEIGHTS = torch.tensor([[[4.0, 1.0], [3.0, 2.0]], [[0.0, 0.0], [0.0, 1.0]]])
"""(N, H, W): the score of a class is the weighted sum of an image's pixels."""
IMAGE = torch.ones(1, 1, 2, 2)
CLASS = torch.tensor([0])


def linear(images: Tensor) -> Tensor:
    return torch.einsum("bchw,nhw->bn", images, WEIGHTS)


def test_deletion_takes_the_highest_pixels_first() -> None:
    curve = deletion(linear, IMAGE, WEIGHTS[:1], CLASS, steps=4)
    assert curve.scores.tolist() == [[10, 6, 3, 1, 0]]
    assert curve.fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert curve.auc.tolist() == [(5 + 6 + 3 + 1 + 0) / 4]


def test_insertion_brings_the_highest_pixels_first() -> None:
    curve = insertion(linear, IMAGE, WEIGHTS[:1], CLASS, steps=4, fill="zero")
    assert curve.scores.tolist() == [[0, 4, 7, 9, 10]]
    assert curve.auc.tolist() == [(0 + 4 + 7 + 9 + 5) / 4]


def test_equal_values_go_in_reading_order() -> None:
    curve = deletion(linear, IMAGE, torch.zeros(1, 2, 2), CLASS, steps=4)
    assert curve.scores.tolist() == [[10, 6, 5, 2, 0]]


def test_steps_share_the_pixels_out() -> None:
    curve = deletion(linear, IMAGE, WEIGHTS[:1], CLASS, steps=3)
    assert curve.fractions.tolist() == [0, 0.25, 0.75, 1]  # 4/3 and 8/3 pixels, rounded
    assert curve.scores.tolist() == [[10, 6, 1, 0]]
    assert curve.auc.item() == pytest.approx(8 * 0.25 + 3.5 * 0.5 + 0.5 * 0.25)


def test_a_batch_gives_what_each_image_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 2, 2, 2, generator=generator)
    maps = torch.rand(3, 2, 2, generator=generator)
    classes = torch.tensor([1, 0, 1])
    for call in (insertion, deletion):
        sizes = []

        def score(given: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(len(given))
            return linear(given)

        whole = call(score, images, maps, classes, steps=4, fill="mean", batch=4)
        assert sizes == [4, 4, 4, 3]
        for row in range(3):
            own = slice(row, row + 1)
            one = call(linear, images[own], maps[own], classes[own], steps=4, fill="mean")
            torch.testing.assert_close(one.scores, whole.scores[own])


def test_the_grounds() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 16, 20, generator=generator)
    assert not filled(images, "zero").any()
    means = filled(images, "mean")
    assert means.shape == images.shape
    torch.testing.assert_close(means[1, 2, 3, 4], images[1, 2].mean())
    dot = torch.zeros(1, 2, 31, 31)
    dot[0, 1, 15, 15] = 1
    blurred = filled(dot, "blur")
    assert not blurred[0, 0].any()
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-5)
    assert (blurred[0, 1] > 0).sum() == 11 * 11
    ratio = float(blurred[0, 1, 15, 18] / blurred[0, 1, 15, 15])
    assert ratio == pytest.approx(2.718281828 ** (-9 / 50), rel=1e-5)
    flat = torch.full((1, 1, 12, 12), 0.3)
    torch.testing.assert_close(filled(flat, "blur"), flat)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": torch.zeros(2, 2, 2)}, r"maps \(2, 2, 2\) and classes \(1,\); expected"),
        ({"maps": torch.full((1, 2, 2), float("nan"))}, "NaN"),
        ({"classes": torch.tensor([2])}, "classes go from 2 to 2; score knows 0 to 1"),
        ({"score": lambda x: x.sum((1, 2, 3))}, r"score gave \(\d+,\) for \d+ images"),
        ({"fill": "black"}, "fill is 'black'"),
        ({"fill": "blur"}, "2 x 2 pixels are too small for a blur of 11"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, Any], message: str) -> None:
    given = {"score": linear, "images": IMAGE, "maps": WEIGHTS[:1], "classes": CLASS}
    with pytest.raises(DataError, match=message):
        deletion(**{**given, **change})
