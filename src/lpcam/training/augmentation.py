"""Random crops, mirrors and colour jitter for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor

from lpcam.data.dataset import IGNORE
from lpcam.data.images import resize_image
from lpcam.data.resize import scaled_size

ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
"""Blend an image with black, with its mean grey level, and with its grey version."""


def jitter_colours(
    image: NDArray[np.uint8], jitter: Sequence[float], generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Change brightness, contrast, saturation and hue by factors in [-j, j], in random order."""
    *factors, turn = (float(generator.uniform(-j, j)) for j in jitter)
    picture = Image.fromarray(image)
    for number in generator.permutation(len(ENHANCERS) + 1):
        if not jitter[number]:
            continue
        if number < len(ENHANCERS):
            picture = ENHANCERS[number](picture).enhance(1.0 + factors[number])
        else:
            picture = change_hsv(picture, turn)
    return np.array(picture)


def change_hsv(picture: Image.Image, turn: float, factor: float = 1.0) -> Image.Image:
    """Turn the hue of an RGB image by a fraction of its circle and scale its saturation, 8 bits."""
    hue, saturation, value = picture.convert("HSV").split()
    steps = round(turn * 256) % 256
    turned = hue.point([(level + steps) % 256 for level in range(256)])
    scaled = saturation.point([min(255, round(level * factor)) for level in range(256)])
    return Image.merge("HSV", (turned, scaled, value)).convert("RGB")


def random_window(length: int, crop: int, generator: np.random.Generator) -> tuple[slice, slice]:
    """Parts of an image's and a crop's axis of equal length, at a random place."""
    offset = int(generator.integers(0, abs(length - crop) + 1))
    taken = min(length, crop)
    moved, first = slice(offset, offset + taken), slice(0, taken)
    return (moved, first) if length > crop else (first, moved)


def mirror_and_crop(
    planes: Sequence[tuple[Tensor, int]], crop: int, generator: np.random.Generator
) -> list[Tensor]:
    """Mirror tensors (..., H, W) at random and crop them alike; each has its padding value."""
    mirrored = generator.random() < 0.5
    rows, columns = (random_window(n, crop, generator) for n in planes[0][0].shape[-2:])
    found = []
    for tensor, beyond in planes:
        canvas = tensor.new_full((*tensor.shape[:-2], crop, crop), beyond)
        source = tensor.flip(-1) if mirrored else tensor
        canvas[..., rows[1], columns[1]] = source[..., rows[0], columns[0]]
        found.append(canvas)
    return found


def scale_mirror_crop(
    image: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    normalise: Callable[[NDArray[np.uint8]], Tensor],
    scale: tuple[float, float],
    crop: int,
    generator: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Scale, mirror and crop an image (H, W, 3) and its mask (H, W) at random.

    Masks are resized by Pillow's nearest neighbour; beyond the image are the mean colour and 255.
    """
    size = scaled_size(image.shape[0], image.shape[1], float(generator.uniform(*scale)))
    resized = np.array(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))
    planes = [(normalise(resize_image(image, size)), 0), (torch.from_numpy(resized), IGNORE)]
    canvas, labels = mirror_and_crop(planes, crop, generator)
    return canvas, labels
