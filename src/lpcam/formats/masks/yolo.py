"""Masks as YOLO segmentation labels: one text file per image, one line per outline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from lpcam.data.dataset import ClassTable
from lpcam.data.yolo import WITHIN_PIXEL
from lpcam.formats.masks.base import Format, MaskEntry, Picture
from lpcam.formats.masks.outlines import outlines
from lpcam.runtime.errors import DataError
from lpcam.runtime.files import read_bytes, write_bytes


class _Yolo(Format):
    """``images/`` (copies, as YOLO looks for labels beside them), ``labels/ID.txt``, ``data.yaml``.

    Each piece of an object is a line, with its holes cut open. Readers draw the pixels that an
    outline runs through, so points lie inside pixels.
    """

    def check(self, entry: MaskEntry, ids: frozenset[str]) -> None:
        short = _below_images(entry.id)
        if "images" in short.split("/")[:-1] or (short != entry.id and short in ids):
            raise DataError(f"{entry.id!r} has a folder 'images', which YOLO pairs; rename it")

    def paths(self, entry: MaskEntry) -> Sequence[str]:
        label = f"labels/{_below_images(entry.id)}.txt"
        if entry.image is None:
            return (label,)
        return label, f"images/{_below_images(entry.name_by_id)}"

    def write(self, picture: Picture, paths: Sequence[Path]) -> None:
        height, width = picture.size
        lines = []
        for region in picture.objects:
            corner = (region.x0, region.y0)
            for outline in outlines(region.pixels, "centres"):
                points = (outline + corner + WITHIN_PIXEL) / (width, height)
                # 6 decimals are 0.05 pixels in an image of 50,000
                places = " ".join(f"{value:.6f}" for value in points.ravel())
                lines.append(f"{region.label} {places}\n")
        write_bytes(paths[0], "".join(lines).encode())
        if picture.entry.image is not None:
            write_bytes(paths[1], read_bytes(picture.entry.image))

    def beside(self, classes: ClassTable, ids: Sequence[str]) -> Mapping[str, bytes]:
        data = {"train": "images", "val": "images", "names": dict(enumerate(classes.names))}
        text: str = yaml.safe_dump(data, allow_unicode=True, sort_keys=False)
        return {"data.yaml": text.encode()}


def _below_images(name: str) -> str:
    """A name without a leading ``images/``, as the folder of the copies has that name itself."""
    return name.removeprefix("images/")


YOLO = _Yolo()
