"""Masks as one COCO annotations file, as run lengths or as polygons.

A category's id is the value of its class in mask files. Objects of an image never overlap.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from lpcam.data.dataset import ClassTable
from lpcam.formats.masks.base import MADE, Format, Picture
from lpcam.formats.masks.outlines import outlines
from lpcam.formats.masks.regions import Region, runs


class Coco(Format):
    """``annotations.json``.

    Args:
        polygons: write outlines along the edges of the pixels, one a piece, with holes cut open
            (COCO has no holes), instead of run lengths. Both are exact for pycocotools; readers
            that draw the outline's own pixels add a row below and a column to the right.
    """

    refers_to_images = True
    document_name = "annotations.json"

    def __init__(self, *, polygons: bool) -> None:
        self.polygons = polygons

    def record(self, picture: Picture) -> Any:
        """File name, (height, width) and the annotations without their ids."""
        annotations = [self._annotation(one, picture) for one in picture.objects]
        return picture.name, picture.size, annotations

    def _annotation(self, region: Region, picture: Picture) -> dict[str, Any]:
        segmentation: Any
        if self.polygons:
            offset = (region.x0, region.y0)
            segmentation = [
                (outline + offset).astype(int).ravel().tolist()
                for outline in outlines(region.pixels, "edges")
            ]
        else:
            # Down the columns, uncompressed, as COCO writes crowds: every reader takes this form.
            pixels = region.whole(picture.size).ravel(order="F")
            segmentation = {"size": list(picture.size), "counts": runs(pixels)}
        return {
            "category_id": picture.classes.mask_ids[region.label],
            "segmentation": segmentation,
            "area": region.area,
            "bbox": [region.x0, region.y0, region.width, region.height],
            "iscrowd": 0,
        }

    def document(self, records: Iterable[Any], classes: ClassTable) -> Iterator[bytes]:
        """The file, one annotation a line; ids of images and annotations count from 1."""
        categories = [
            {"id": number, "name": name, "supercategory": ""}
            for name, number in zip(classes.names, classes.mask_ids, strict=True)
        ]
        info = _text({"description": f"masks written by {MADE}"})
        head = f'{{"info": {info},\n"categories": {_text(categories)},\n"annotations": ['
        yield head.encode()
        images = []
        number = 0
        for image_id, (name, (height, width), objects) in enumerate(records, start=1):
            images.append({"id": image_id, "file_name": name, "height": height, "width": width})
            for one in objects:
                number += 1
                line = _text({"id": number, "image_id": image_id, **one})
                yield f"{',' if number > 1 else ''}\n{line}".encode()
        lines = ",\n".join(map(_text, images))
        yield f'\n],\n"images": [\n{lines}\n]}}\n'.encode()


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


COCO, COCO_POLYGONS = Coco(polygons=False), Coco(polygons=True)
