"""Masks drawn over their images, for people to look at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lpcam.data.drawing import overlay_mask
from lpcam.data.images import read_image
from lpcam.formats.masks.base import Format, MaskEntry, Picture
from lpcam.runtime.errors import DataError
from lpcam.runtime.files import write_bytes


class _Overlays(Format):
    """``overlays/ID.jpg``: the image with its mask over it, in VOC colours."""

    ignored = "drawn in the colour of 255"

    def check(self, entry: MaskEntry, ids: frozenset[str]) -> None:
        if entry.image is None:
            raise DataError(f"{entry.id!r} has no image to draw its mask over; give its image")

    def paths(self, entry: MaskEntry) -> Sequence[str]:
        return (f"overlays/{entry.id}.jpg",)

    def write(self, picture: Picture, paths: Sequence[Path]) -> None:
        assert picture.entry.image is not None  # see check
        buffer, image = io.BytesIO(), read_image(picture.entry.image, picture.entry.reading)
        drawn = Image.fromarray(overlay_mask(image, picture.mask))
        drawn.save(buffer, "JPEG", quality=90)
        write_bytes(paths[0], buffer.getvalue())


OVERLAYS = _Overlays()
