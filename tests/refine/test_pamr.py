"""PAMR: a case by hand, what it must keep, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lpcam.refine.pamr import PamrSettings, affinities, pamr, propagate

SMALL = PamrSettings.from_preset("default", dilations=[1, 2], iterations=3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (*shape, 3), generator=generator(seed)).to(torch.uint8)


def test_by_hand() -> None:
    """The middle of a 3 x 3 image with one window: weights and one step from the definition."""
    image = picture(3, 3)
    masks = torch.rand((2, 3, 3), generator=generator(1))
    values = image.reshape(9, 3).double()
    middle = values[4]
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    logits = []
    for n in others:
        terms = [
            float((values[n, c] - middle[c]).abs() / (0.1 * values[:, c].std() + 1e-8))
            for c in range(3)
        ]
        logits.append(-sum(terms) / 3)
    largest = max(logits)
    total = sum(math.exp(v - largest) for v in logits)
    expected = [math.exp(v - largest) / total for v in logits]
    weights = affinities(image, (1,), 0.1, dtype=torch.float64)
    assert weights[:, 1, 1].tolist() == pytest.approx(expected)
    once = PamrSettings.from_preset("default", dilations=[1], iterations=1)
    found = pamr(image, masks, once)
    for k in range(2):
        mean = sum(w * float(masks[k].flatten()[n]) for w, n in zip(expected, others, strict=True))
        assert float(found[k, 1, 1]) == pytest.approx(mean, abs=1e-6)


def test_neighbours_at_the_border_repeat_the_edge() -> None:
    """A row of two: of the eight neighbours of the left one, five are itself."""
    image = torch.tensor([[[0, 0, 0], [90, 90, 90]]], dtype=torch.uint8)
    weights = affinities(image, (1,), 0.1)
    equal = weights[:, 0, 0]
    assert (equal > equal.max() * 0.99).sum() == 5
    found = propagate(torch.tensor([[[1.0, 0.0]]]), weights, (1,), 1)
    assert float(found[0, 0, 0]) == pytest.approx(float(equal[equal > equal.max() * 0.99].sum()))


def test_masks_spread_within_a_region_and_not_across_its_edge() -> None:
    image = torch.zeros(16, 16, 3, dtype=torch.uint8)
    image[:, 8:] = 220
    masks = torch.zeros(1, 16, 16)
    masks[0, 6:10, 2:6] = 1.0
    found = pamr(image, masks, SMALL)[0]
    assert float(found[4:12, :7].mean()) > 0.2
    assert float(found[:, 9:].max()) < 0.01
