"""Masks as CVAT's XML 1.1 "for images", for a task whose images have the same names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from xml.etree.ElementTree import Element, SubElement

from lpcam.data.dataset import ClassTable
from lpcam.formats.masks.base import MADE, Format, Picture, add_texts, runs, xml_text


class _Cvat(Format):
    """``annotations.xml`` of shapes ``mask``: run lengths along the rows of each box."""

    refers_to_images = True
    document_name = "annotations.xml"

    def record(self, picture: Picture) -> Any:
        height, width = picture.size
        image = Element("image", name=picture.name, width=str(width), height=str(height))
        for one in picture.objects:
            box = {"left": one.x0, "top": one.y0, "width": one.width, "height": one.height}
            shape = SubElement(image, "mask", {name: str(value) for name, value in box.items()})
            shape.set("label", picture.classes.names[one.label])
            shape.set("rle", ", ".join(map(str, runs(one.pixels.ravel()))))
            shape.attrib |= {"source": "auto", "occluded": "0", "z_order": "0"}
        return image

    def document(self, records: Iterable[Any], classes: ClassTable) -> Iterator[bytes]:
        meta = Element("meta")
        task = SubElement(meta, "task")
        add_texts(task, name=MADE, mode="annotation")
        labels = SubElement(task, "labels")
        for class_name in classes.names:
            add_texts(SubElement(labels, "label"), name=class_name, type="mask", attributes="")
        yield b'<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n'
        yield xml_text(meta)
        for number, image in enumerate(records):
            image.set("id", str(number))
            yield xml_text(image)
        yield b"</annotations>\n"


CVAT = _Cvat()
