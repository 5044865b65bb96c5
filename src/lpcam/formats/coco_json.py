"""Masks as one COCO annotations file, as run lengths or as polygons.

A category's id is the value of its class in mask files. ``file_name`` is relative to the folder of
the images. An annotation's order means nothing: no two of an image overlap.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from lpcam.data.items import ClassTable
from lpcam.formats.outlines import outlines
from lpcam.formats.regions import Region, runs


def annotation(
    region: Region, size: tuple[int, int], classes: ClassTable, *, polygons: bool
) -> dict[str, Any]:
    """An object as COCO has it, without the ids of the annotation and of its image.

    Args:
        size: (height, width) of the image.
        polygons: outlines along the edges of the pixels, one a piece, with holes cut open (COCO has
            no holes, and what several polygons cover counts), instead of run lengths. Both are
            exact for pycocotools; readers that draw the outline's own pixels add a row below and a
            column to the right.
    """
    segmentation: Any
    if polygons:
        offset = (region.x0, region.y0)
        segmentation = [
            (outline + offset).astype(int).ravel().tolist()
            for outline in outlines(region.pixels, "edges")
        ]
    else:
        # Down the columns, uncompressed: the form of COCO's own crowds, which every reader takes.
        segmentation = {"size": list(size), "counts": runs(region.whole(size).ravel(order="F"))}
    return {
        "category_id": classes.mask_ids[region.label],
        "segmentation": segmentation,
        "area": region.area,
        "bbox": [region.x0, region.y0, region.width, region.height],
        "iscrowd": 0,
    }


def document(
    images: Iterable[tuple[str, tuple[int, int], list[dict[str, Any]]]],
    classes: ClassTable,
    description: str,
) -> Iterator[bytes]:
    """The parts of the file, an annotation a line; ids of images and annotations count from 1.

    Args:
        images: file name, (height, width) and what :func:`annotation` gave, of each.
        description: of the whole, in ``info``.
    """
    categories = [
        {"id": number, "name": name, "supercategory": ""}
        for name, number in zip(classes.names, classes.mask_ids, strict=True)
    ]
    head = f'{{"info": {_text({"description": description})},\n"categories": {_text(categories)},\n'
    yield (head + '"annotations": [').encode()
    entries = []
    number = 0
    for image_id, (name, (height, width), objects) in enumerate(images, start=1):
        entries.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for one in objects:
            number += 1
            line = _text({"id": number, "image_id": image_id, **one})
            yield f"{',' if number > 1 else ''}\n{line}".encode()
    lines = ",\n".join(map(_text, entries))
    yield f'\n],\n"images": [\n{lines}\n]}}\n'.encode()


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
