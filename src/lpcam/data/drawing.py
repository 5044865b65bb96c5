"""Pictures of maps and masks: overlays and contact sheets."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lpcam.data.dataset import BACKGROUND, Item
from lpcam.data.masks import voc_palette
from lpcam.data.resize import scaled_size
from lpcam.runtime.errors import DataError

# Red, green and blue of the heat map at equal steps from 0 to 1. Lightness increases steadily, so
# that it can be read in grey and by the colour-blind.
_RED = (16, 62, 118, 174, 222, 246, 252, 254)
_GREEN = (8, 16, 28, 46, 80, 136, 196, 248)
_BLUE = (48, 104, 112, 92, 58, 40, 76, 170)
HEAT = np.stack([_RED, _GREEN, _BLUE], axis=1).astype(np.float64)


def overlay(
    image: NDArray[np.uint8], heat: NDArray[np.float32], *, opacity: float = 0.7
) -> NDArray[np.uint8]:
    """Draw a map (H, W) over its image (H, W, 3) as a heat map.

    Args:
        opacity: opacity of the colour where the map is 1; a third of it where the map is 0.

    Raises:
        DataError: if the sizes differ or a value of the map is outside [0, 1].

    Example:
        >>> image, heat = np.zeros((1, 1, 3), np.uint8), np.ones((1, 1), np.float32)
        >>> overlay(image, heat, opacity=1.0).tolist()
        [[[254, 248, 170]]]
    """
    # interpolated maps overshoot by rounding; both comparisons are false for NaN
    if heat.size and not (heat.min() >= -1e-6 and heat.max() <= 1 + 1e-6):
        raise DataError(
            f"map has values from {heat.min()} to {heat.max()}; expected 0 to 1, normalise it first"
        )
    steps = np.linspace(0, 1, len(HEAT))
    value = np.clip(heat, 0, 1)
    colour = np.stack([np.interp(value, steps, channel) for channel in HEAT.T], axis=2)
    weight = (opacity * (1 + 2 * value) / 3)[:, :, None]
    return _blended(image, colour, weight)


def overlay_mask(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], *, opacity: float = 0.6
) -> NDArray[np.uint8]:
    """Draw mask values (H, W) in VOC colours over an image (H, W, 3), but for the background."""
    weight = np.where(mask == BACKGROUND, 0.0, opacity)[:, :, None]
    return _blended(image, voc_palette()[mask], weight)


def _blended(
    image: NDArray[np.uint8], over: NDArray[Any], weight: NDArray[Any]
) -> NDArray[np.uint8]:
    if image.ndim != 3 or image.dtype != np.uint8 or image.shape[:2] != weight.shape[:2]:
        raise DataError(
            f"image is {image.dtype} {image.shape} and the plane over it {weight.shape[:2]}; "
            "expected uint8 (H, W, 3) and (H, W)"
        )
    return np.asarray(np.rint((1 - weight) * image + weight * over), np.uint8)


CELL = 200  #: Side of a picture's cell, in pixels.
GAP = 8
TITLE = 30


@dataclass(frozen=True)
class SheetRow:
    """One image and one of its classes."""

    image: NDArray[np.uint8]  #: (H, W, 3) RGB
    name: str
    cam: NDArray[np.float32]  #: (H, W) in [0, 1], of the class
    lpcam: NDArray[np.float32]  #: (H, W) in [0, 1], of the class, by LPCAM or LPCAM-E
    seed: NDArray[np.uint8]  #: (H, W) mask ids, all classes of the image
    truth: NDArray[np.uint8] | None  #: (H, W) mask ids, or None where there is no mask


def choose_rows(items: Sequence[Item], count: int) -> list[tuple[Item, int]]:
    """Up to ``count`` (image, class) pairs: classes in turn, each class's images in list order."""
    queues = {
        index: iter([item for item in items if index in item.labels])
        for index in sorted({index for item in items for index in item.labels})
    }
    chosen: dict[str, tuple[Item, int]] = {}
    while queues and len(chosen) < count:
        for index, queue in list(queues.items()):
            item = next((item for item in queue if item.id not in chosen), None)
            if item is None:
                del queues[index]
            else:
                chosen[item.id] = (item, index)
    return list(chosen.values())[:count]


def sheet(rows: Sequence[SheetRow], *, map_title: str = "LPCAM", mask_title: str = "seed") -> bytes:
    """Draw the rows as one PNG: image, CAM, the other map, mask and, if any row has it, truth."""
    titles = ["image", "CAM", map_title, mask_title]
    titles += ["truth"] * any(row.truth is not None for row in rows)
    sheet_size = (len(titles) * (CELL + GAP) + GAP, TITLE + len(rows) * (CELL + GAP) + GAP)
    canvas = Image.new("RGB", sheet_size, "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(16)
    for column, title in enumerate(titles):
        centre = (GAP + column * (CELL + GAP) + CELL // 2, TITLE // 2 + 2)
        draw.text(centre, title, fill="black", font=font, anchor="mm")
    for number, row in enumerate(rows):
        top = TITLE + number * (CELL + GAP)
        pictures = [
            row.image,
            *(overlay(row.image, heat) for heat in (row.cam, row.lpcam)),
            *(overlay_mask(row.image, m) for m in (row.seed, row.truth) if m is not None),
        ]
        for column, picture in enumerate(pictures):
            height, width = picture.shape[:2]
            height, width = scaled_size(height, width, CELL / max(height, width))
            thumbnail = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
            left = GAP + column * (CELL + GAP) + (CELL - width) // 2
            canvas.paste(thumbnail, (left, top + (CELL - height) // 2))
        box = draw.textbbox((GAP + 5, top + 4), row.name, font=font)
        draw.rectangle((box[0] - 4, box[1] - 3, box[2] + 4, box[3] + 3), fill="white")
        draw.text((GAP + 5, top + 4), row.name, fill="black", font=font)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
