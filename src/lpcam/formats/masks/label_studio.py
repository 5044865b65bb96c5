"""Masks as predictions of Label Studio tasks: brush strokes or polygons, for people to correct."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args
from urllib.parse import quote
from xml.etree.ElementTree import Element, SubElement

import numpy as np
from numpy.typing import NDArray

from lpcam.data.dataset import ClassTable
from lpcam.data.masks import voc_palette
from lpcam.formats.masks.base import MADE, Format, Picture, Region, runs, xml_text
from lpcam.formats.masks.outlines import outlines

_LOCAL_FILES = "/" + "data/local-files/?d="  # a path below the served folder is added
_CHANNELS = 4
_WORD = 8
_SIZES = (3, 4, 8, 16)


def packed_runs(mask: NDArray[np.bool_]) -> list[int]:
    """A mask (H, W) as the bytes of Label Studio's brush.

    The brush is an image of 4 channels, row by row, all 0 outside and all 255 inside. Its packing
    is that of ``@thi.ng/rle-pack``: 32 bits of the number of values, 5 of their size less 1, 4
    times 4 of the sizes less 1 that a run's length may have; then for each run a bit 1, 2 bits that
    choose a size, the length less 1 in that size, and the value.
    """
    bits = [f"{mask.size * _CHANNELS:032b}{_WORD - 1:05b}", *(f"{s - 1:04b}" for s in _SIZES)]
    longest = 1 << _SIZES[-1]
    for number, pixels in enumerate(runs(mask.ravel())):
        value = str(number % 2) * _WORD
        for start in range(0, pixels * _CHANNELS, longest):
            length = min(pixels * _CHANNELS - start, longest)
            choice = next(n for n, size in enumerate(_SIZES) if length <= 1 << size)
            bits.append(f"1{choice:02b}{length - 1:0{_SIZES[choice]}b}{value}")
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


Kind = Literal["BrushLabels", "PolygonLabels"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Tags(NamedTuple):
    """The tags of a labelling configuration that a region names."""

    image: str = "image"
    regions: str = "mask"
    kind: Kind = "BrushLabels"


def region_results(
    objects: Sequence[Region], classes: ClassTable, size: tuple[int, int], tags: Tags
) -> list[dict[str, Any]]:
    """The objects of an image of a size (height, width) as the results of a prediction.

    A brush is an object, a polygon one of its pieces, with its holes cut open. Both are exact.
    """
    height, width = size
    values: list[dict[str, Any]] = []
    for one in objects:
        name = {tags.kind.lower(): [classes.names[one.label]]}
        if tags.kind == "BrushLabels":
            values.append({"format": "rle", "rle": packed_runs(one.whole(size)), **name})
            continue
        for outline in outlines(one.pixels, "edges"):
            percent = (outline + np.array([one.x0, one.y0])) * 100 / (width, height)
            values.append({"points": percent.tolist(), "closed": True, **name})
    return [
        {
            "id": f"region{number}",
            "type": tags.kind.lower(),
            "from_name": tags.regions,
            "to_name": tags.image,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": value,
        }
        for number, value in enumerate(values, start=1)
    ]


class _LabelStudio(Format):
    """``tasks.json``, a task with one prediction a line, and ``label_config.xml``."""

    refers_to_images = True
    has_image_root = True
    holds_scores = True
    document_name = "tasks.json"

    def __init__(self, tags: Tags) -> None:
        self.tags = tags

    def record(self, picture: Picture) -> Any:
        results = region_results(picture.objects, picture.classes, picture.size, self.tags)
        score = picture.scores.get("quality")
        return {
            "data": {self.tags.image: _LOCAL_FILES + quote(picture.name)},
            "predictions": [{"model_version": MADE, "score": score, "result": results}],
        }

    def beside(self, classes: ClassTable, ids: Sequence[str]) -> Mapping[str, bytes]:
        view, image = Element("View"), self.tags.image
        SubElement(view, "Image", name=image, value=f"${image}", zoom="true")
        labels = SubElement(view, self.tags.kind, name=self.tags.regions, toName=image)
        for name, number in zip(classes.names, classes.mask_ids, strict=True):
            colour = "#" + bytes(voc_palette()[number].tolist()).hex()
            SubElement(labels, "Label", value=name, background=colour)
        return {"label_config.xml": xml_text(view)}


LABEL_STUDIO = _LabelStudio(Tags())
LABEL_STUDIO_POLYGONS = _LabelStudio(Tags(kind="PolygonLabels"))
