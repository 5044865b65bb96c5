"""Random changes of colours against hand-computed ones."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from PIL import Image

from lpcam.training.augmentation import change_hsv, jitter_colours

GENERATOR = np.random.default_rng(0)
IMAGE = GENERATOR.integers(40, 200, (9, 12, 3)).astype(np.uint8)


def factors(column: int, *, count: int = 200) -> list[np.ndarray]:
    """Many images of which one quantity is changed."""
    jitter = [0.0] * 4
    jitter[column] = 0.2
    return [jitter_colours(IMAGE, jitter, np.random.default_rng(seed)) for seed in range(count)]


def test_equal_generators_change_equally() -> None:
    before = IMAGE.copy()
    first, again, other = (
        jitter_colours(IMAGE, (0.3, 0.3, 0.3, 0.1), np.random.default_rng(seed))
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.dtype == np.uint8
    assert np.array_equal(jitter_colours(IMAGE, (0,) * 4, np.random.default_rng(0)), before)
    assert np.array_equal(IMAGE, before)


@pytest.mark.parametrize("column", [0, 1])
def test_brightness_and_contrast_move_away_from_black_and_from_the_mean_grey(column: int) -> None:
    grey = column * float(round(np.array(Image.fromarray(IMAGE).convert("L")).mean()))
    away, ratios = IMAGE - grey, []
    for found in factors(column):
        ratio = float(((found - grey) * away).sum() / (away**2).sum())
        assert np.abs(found - (grey + away * ratio)).max() < 1.5
        ratios.append(ratio)
    assert 0.78 < min(ratios) < 0.84
    assert 1.16 < max(ratios) < 1.22


def test_saturation_moves_away_from_grey() -> None:
    grey = np.array(Image.fromarray(IMAGE).convert("L")).astype(float)[:, :, None]
    spreads = [
        float(np.abs(found - grey).sum() / np.abs(IMAGE - grey).sum()) for found in factors(2)
    ]
    assert 0.78 < min(spreads) < 0.84
    assert 1.16 < max(spreads) < 1.22
    ashen = np.full((4, 4, 3), 90, np.uint8)
    assert np.array_equal(jitter_colours(ashen, (0, 0, 0.9, 0), np.random.default_rng(0)), ashen)


@pytest.mark.parametrize("factor", [1.0, 0.5, 1.3])
@pytest.mark.parametrize("turn", [-0.3, 0.0, 0.1, 0.5, 0.99])
def test_hue_is_turned_and_saturation_scaled(turn: float, factor: float) -> None:
    found = np.array(change_hsv(Image.fromarray(IMAGE), turn, factor))
    for before, after in zip(IMAGE.reshape(-1, 3), found.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255.0))
        saturation = min(1.0, saturation * factor)
        expected = np.array(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)) * 255
        assert np.abs(after - expected).max() < 8  # HSV of 8 bits


def test_order_is_random() -> None:
    """Bright and then of more contrast is not the same as the other way round."""
    orders = set()
    for seed in range(40):
        found = jitter_colours(IMAGE, (0.3, 0.3, 0.0, 0.0), np.random.default_rng(seed))
        generator = np.random.default_rng(seed)
        bright, contrast, _, _ = (float(generator.uniform(-j, j)) for j in (0.3, 0.3, 0.0, 0.0))
        lit = np.clip(IMAGE * (1 + bright), 0, 255)
        mean = np.array(Image.fromarray(IMAGE).convert("L")).mean()
        first = lit + contrast * (lit - mean * (1 + bright))
        last = (IMAGE + contrast * (IMAGE - mean)) * (1 + bright)
        errors = [np.abs(found - np.clip(each, 0, 255)).mean() for each in (first, last)]
        orders.add(int(np.argmin(errors)))
        assert min(errors) < 2
    assert orders == {0, 1}
