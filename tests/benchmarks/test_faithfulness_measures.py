"""Insertion and deletion on a linear model, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.faithfulness_measures import deletion, insertion
from lpcam.runtime.errors import DataError

WEIGHTS = torch.tensor([[[4.0, 1.0], [3.0, 2.0]], [[0.0, 0.0], [0.0, 1.0]]])
"""(N, H, W): the score of a class is the weighted sum of an image's pixels."""
IMAGE = torch.ones(1, 1, 2, 2)
CLASS = torch.tensor([0])


def linear(images: Tensor) -> Tensor:
    return torch.einsum("bchw,nhw->bn", images, WEIGHTS)


def halves(images: Tensor) -> Tensor:
    """Scores (B, 2): the means of the upper and of the lower half."""
    return torch.stack([half.mean((1, 2, 3)) for half in images.chunk(2, dim=2)], dim=1)


def test_deletion_takes_the_highest_pixels_first() -> None:
    curve = deletion(linear, IMAGE, WEIGHTS[:1], CLASS, steps=4)
    assert curve.scores.tolist() == [[10, 6, 3, 1, 0]]
    assert curve.fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert curve.auc.tolist() == [(5 + 6 + 3 + 1 + 0) / 4]


def test_insertion_brings_the_highest_pixels_first_into_a_blurred_image() -> None:
    """One pixel of 1: the blur of it is a Gaussian of a window of 11 pixels."""
    image = torch.zeros(1, 1, 31, 31)
    image[..., 15, 15] = 1

    def whole(images: Tensor) -> Tensor:
        return images[..., 15:16, 15:16].flatten(1) + images.square().sum((1, 2, 3))[:, None]

    order = image[:, 0].clone()
    curve = insertion(whole, image, order, CLASS, steps=961)
    offsets = torch.arange(-5, 6).double()
    row = torch.exp(-(offsets**2) / 50)
    row = row / row.sum()
    first = float(row[5] ** 2 + (row**2).sum() ** 2)
    assert float(curve.scores[0, 0]) == pytest.approx(first, rel=1e-4)
    # the pixel itself, then the rest of the ground
    second = 2 + (float((row**2).sum() ** 2) - float(row[5] ** 4))
    assert float(curve.scores[0, 1]) == pytest.approx(second, rel=1e-4)
    assert float(curve.scores[0, -1]) == 2


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
    images = torch.rand(3, 2, 8, 8, generator=generator)
    maps = torch.rand(3, 8, 8, generator=generator)
    classes = torch.tensor([1, 0, 1])
    for call in (insertion, deletion):
        sizes = []

        def score(given: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(len(given))
            return halves(given)

        whole = call(score, images, maps, classes, steps=4, batch=4)
        assert sizes == [4, 4, 4, 3]
        for row in range(3):
            own = slice(row, row + 1)
            one = call(halves, images[own], maps[own], classes[own], steps=4)
            torch.testing.assert_close(one.scores, whole.scores[own])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": torch.zeros(2, 2, 2)}, r"maps \(2, 2, 2\) and classes \(1,\); expected"),
        ({"maps": torch.full((1, 2, 2), float("nan"))}, "NaN"),
        ({"classes": torch.tensor([2])}, "classes go from 2 to 2; score knows 0 to 1"),
        ({"score": lambda x: x.sum((1, 2, 3))}, r"score gave \(\d+,\) for \d+ images"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, Any], message: str) -> None:
    given = {"score": linear, "images": IMAGE, "maps": WEIGHTS[:1], "classes": CLASS}
    with pytest.raises(DataError, match=message):
        deletion(**{**given, **change})
    with pytest.raises(DataError, match="2 x 2 pixels are too small for a blur of 11"):
        insertion(linear, IMAGE, WEIGHTS[:1], CLASS)
