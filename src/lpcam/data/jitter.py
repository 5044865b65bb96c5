"""Random changes of colours, as the field's programs for classifiers draw them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
"""Blend an image with black, with its mean grey level, and with its grey version."""


def jitter_colours(
    image: NDArray[np.uint8], jitter: Sequence[float], generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Change brightness, contrast, saturation and hue at random, in random order, in 8 bits.

    Each of the first three is multiplied by a factor uniform in [1 - j, 1 + j], and the hue is
    turned by a part of its circle uniform in [-j, j]. A quantity whose j is 0 stays.

    Args:
        image: (H, W, 3) uint8 RGB.
        jitter: j of brightness, contrast and saturation, in [0, 1], and of hue, in [0, 0.5].

    Returns:
        (H, W, 3) uint8.
    """
    *factors, turn = (float(generator.uniform(-j, j)) for j in jitter)
    picture = Image.fromarray(image)
    for number in generator.permutation(len(ENHANCERS) + 1):
        if not jitter[number]:
            continue
        if number < len(ENHANCERS):
            picture = ENHANCERS[number](picture).enhance(1.0 + factors[number])
        else:
            picture = turn_hue(picture, turn)
    return np.array(picture)


def turn_hue(picture: Image.Image, turn: float) -> Image.Image:
    """An RGB image with the hue of HSV turned by a part of its circle, in steps of 1 / 256."""
    hue, saturation, value = picture.convert("HSV").split()
    steps = round(turn * 256) % 256
    turned = hue.point([(level + steps) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
