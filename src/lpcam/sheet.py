"""A sheet of pictures: what went in, what lit up, what came out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lpcam.data.images import scaled_size
from lpcam.data.items import Item
from lpcam.masks import overlay, overlay_mask

CELL = 200
"""Side of a picture's cell, in pixels."""
GAP = 8
TITLE = 30


@dataclass(frozen=True)
class SheetRow:
    """One image and one of its classes."""

    image: NDArray[np.uint8]
    """(H, W, 3) RGB"""
    name: str
    cam: NDArray[np.float32]
    """(H, W) in [0, 1], of the class"""
    lpcam: NDArray[np.float32]
    """(H, W) in [0, 1], of the class"""
    seed: NDArray[np.uint8]
    """(H, W) mask ids, all classes of the image"""
    truth: NDArray[np.uint8] | None
    """(H, W) mask ids, or None where there is no mask"""


def choose_rows(items: Sequence[Item], count: int) -> list[tuple[Item, int]]:
    """Up to ``count`` (image, class) pairs: classes in turn, each class's images in list order."""
    queues: dict[int, list[Item]] = {}
    for item in items:
        for index in item.labels:
            queues.setdefault(index, []).append(item)
    chosen: list[tuple[Item, int]] = []
    used: set[str] = set()
    while len(chosen) < count and any(queues.values()):
        for index in sorted(queues):
            while queues[index] and queues[index][0].id in used:
                queues[index].pop(0)
            if queues[index] and len(chosen) < count:
                item = queues[index].pop(0)
                used.add(item.id)
                chosen.append((item, index))
    return chosen


def sheet(rows: Sequence[SheetRow], *, mask_title: str = "seed") -> bytes:
    """Draw the rows as one PNG: image, CAM, LPCAM, seed and, if any row has it, truth.

    Args:
        mask_title: over the column of seeds.
    """
    titles = ["image", "CAM", "LPCAM", mask_title]
    if any(row.truth is not None for row in rows):
        titles.append("truth")
    sheet_size = (len(titles) * (CELL + GAP) + GAP, TITLE + len(rows) * (CELL + GAP) + GAP)
    canvas = Image.new("RGB", sheet_size, "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(16)
    for column, title in enumerate(titles):
        centre = GAP + column * (CELL + GAP) + CELL // 2
        draw.text((centre, TITLE // 2 + 2), title, fill="black", font=font, anchor="mm")
    for number, row in enumerate(rows):
        top = TITLE + number * (CELL + GAP)
        pictures = [
            row.image,
            overlay(row.image, row.cam),
            overlay(row.image, row.lpcam),
            overlay_mask(row.image, row.seed),
        ]
        if row.truth is not None:
            pictures.append(overlay_mask(row.image, row.truth))
        for column, picture in enumerate(pictures):
            height, width = picture.shape[:2]
            height, width = scaled_size(height, width, CELL / max(height, width))
            thumbnail = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
            left = GAP + column * (CELL + GAP) + (CELL - thumbnail.width) // 2
            canvas.paste(thumbnail, (left, top + (CELL - thumbnail.height) // 2))
        box = draw.textbbox((GAP + 5, top + 4), row.name, font=font)
        draw.rectangle((box[0] - 4, box[1] - 3, box[2] + 4, box[3] + 3), fill="white")
        draw.text((GAP + 5, top + 4), row.name, fill="black", font=font)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
