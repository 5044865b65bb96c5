"""Minimum barrier saliency: distances by hand, invariances, colours, thresholds, bad input."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lpcam.refine.saliency_maps import SALIENT, barrier_distance, lab, otsu_threshold, saliency
from lpcam.runtime.errors import DataError


def levels(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = saliency(torch.from_numpy(image)).numpy()
    return found


def scene(height: int = 60, width: int = 90, noise: int = 12) -> tuple[NDArray[Any], NDArray[Any]]:
    """An orange disc on noisy green, and where it is."""
    rows, columns = np.mgrid[:height, :width]
    disc = (rows - height * 0.55) ** 2 + (columns - width * 0.45) ** 2 < (height * 0.25) ** 2
    colours = np.where(disc[:, :, None], (220, 120, 30), (60, 130, 60))
    noisy = colours + np.random.default_rng(0).integers(-noise, noise + 1, colours.shape)
    return noisy.clip(0, 255).astype(np.uint8), disc


def exact(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distance by trying every span: the least one within which a path stays."""
    found = np.full(values.shape, np.inf)
    border = np.zeros(values.shape, dtype=bool)
    border[[0, -1]] = border[:, [0, -1]] = True
    levels = np.unique(values)
    for low, high in itertools.combinations_with_replacement(levels, 2):
        allowed = (values >= low) & (values <= high)
        reached = border & allowed
        while True:
            grown = reached.copy()
            grown[1:] |= reached[:-1]
            grown[:-1] |= reached[1:]
            grown[:, 1:] |= reached[:, :-1]
            grown[:, :-1] |= reached[:, 1:]
            grown &= allowed
            if np.array_equal(grown, reached):
                break
            reached = grown
        found[reached] = np.minimum(found[reached], high - low)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_distance_is_nearly_the_least_over_all_paths(seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 9, (10, 12)).astype(np.float64)
    expected, found = exact(values), barrier_distance(values, rounds=20)
    assert (found >= expected).all()
    assert (found == expected).mean() > 0.8
    assert (barrier_distance(values) >= found).all()


def test_colours() -> None:
    """Against the values that tables of sRGB and CIELAB under D65 give."""
    given = np.array([(255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 0, 255), (119, 119, 119)])
    expected = [
        (100.0, 0.0, 0.0),
        (0.0, 0.0, 0.0),
        (53.24, 80.09, 67.20),
        (32.30, 79.19, -107.86),
        (50.03, 0.0, 0.0),
    ]
    np.testing.assert_allclose(lab(given.astype(np.uint8)), expected, atol=0.02)


def test_otsu_is_the_best_threshold() -> None:
    values = np.random.default_rng(1).beta(1, 4, (20, 30))

    def between(threshold: float) -> float:
        upper, lower = values[values > threshold], values[values <= threshold]
        return float(len(upper) * len(lower) * (upper.mean() - lower.mean()) ** 2)

    best = max(between(level / 256) for level in range(1, 256) if (values > level / 256).any())
    assert between(otsu_threshold(values)) >= 0.999 * best


@pytest.mark.parametrize("size", [(60, 90), (301, 225), (40, 40)])
def test_a_disc_is_salient(size: tuple[int, int]) -> None:
    image, disc = scene(*size)
    found = levels(image)
    assert found.dtype == np.uint8
    assert found.shape == size
    salient = found > SALIENT
    assert (salient & disc).sum() / (salient | disc).sum() > 0.9
    assert found[disc].mean() > 240
    assert found[0].max() < 60


def test_what_touches_the_border_is_not_salient() -> None:
    image = np.full((50, 70, 3), 30, np.uint8)
    image[:, 20:40] = 220
    assert not levels(image).any()


@pytest.mark.parametrize("shape", [(40, 60, 3), (1, 1, 3), (2, 300, 3)])
def test_an_image_of_one_colour(shape: tuple[int, ...]) -> None:
    found = levels(np.full(shape, 77, np.uint8))
    assert found.shape == shape[:2]
    assert not found.any()


@pytest.mark.parametrize(
    "image", [np.zeros((4, 5), np.uint8), np.zeros((4, 5, 3)), np.zeros((0, 5, 3), np.uint8)]
)
def test_not_an_image(image: NDArray[Any]) -> None:
    with pytest.raises(DataError, match="expected RGB, uint8 of the shape"):
        levels(image)
