"""Masks as one COCO annotations file, as run lengths or as polygons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lpcam.data.dataset import ClassTable
from lpcam.formats.masks.base import MADE, Format, Picture, Region, compact_json, runs
from lpcam.formats.masks.outlines import outlines


class _Coco(Format):
    """``annotations.json``, one annotation per line; ids count from 1, categories have mask values.

    Both forms are exact for pycocotools; readers that draw the outline's own pixels add a row below
    and a column to the right.
    """

    refers_to_images = True
    document_name = "annotations.json"

    def __init__(self, *, polygons: bool) -> None:
        self.polygons = polygons

    def record(self, picture: Picture) -> Any:
        annotations = [
            {
                "category_id": picture.classes.mask_ids[one.label],
                "segmentation": self._segmentation(one, picture),
                "area": one.area,
                "bbox": [one.x0, one.y0, one.width, one.height],
                "iscrowd": 0,
            }
            for one in picture.objects
        ]
        return picture.name, picture.size, annotations

    def _segmentation(self, region: Region, picture: Picture) -> Any:
        if self.polygons:
            offset = (region.x0, region.y0)
            rings = outlines(region.pixels, "edges")
            return [(ring + offset).astype(int).ravel().tolist() for ring in rings]
        # Down the columns, uncompressed, as COCO writes crowds: every reader takes this form.
        pixels = region.whole(picture.size).ravel(order="F")
        return {"size": list(picture.size), "counts": runs(pixels)}

    def document(self, records: Iterable[Any], classes: ClassTable) -> Iterator[bytes]:
        categories = [
            {"id": number, "name": name, "supercategory": ""}
            for name, number in zip(classes.names, classes.mask_ids, strict=True)
        ]
        info = compact_json({"description": f"masks written by {MADE}"})
        head = b'{"info": %b,\n"categories": %b,\n"annotations": ['
        yield head % (info, compact_json(categories))
        images = []
        number = 0
        for image_id, (name, (height, width), objects) in enumerate(records, start=1):
            images.append({"id": image_id, "file_name": name, "height": height, "width": width})
            for one in objects:
                yield b",\n" if number else b"\n"
                number += 1
                yield compact_json({"id": number, "image_id": image_id, **one})
        yield b'\n],\n"images": [\n%b\n]}\n' % b",\n".join(map(compact_json, images))


COCO, COCO_POLYGONS = _Coco(polygons=False), _Coco(polygons=True)
