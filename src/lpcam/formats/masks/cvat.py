"""Masks as CVAT's XML 1.1 "for images", for a task whose images have the same names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from xml.etree import ElementTree

from lpcam.data.dataset import ClassTable
from lpcam.formats.masks.base import MADE, Format, Picture
from lpcam.formats.masks.regions import runs


class Cvat(Format):
    """``annotations.xml`` of exact shapes of the type ``mask``."""

    refers_to_images = True
    document_name = "annotations.xml"

    def record(self, picture: Picture) -> Any:
        """The element of an image, without its id: run lengths along the rows of each box."""
        height, width = picture.size
        image = ElementTree.Element(
            "image", name=picture.name, width=str(width), height=str(height)
        )
        for region in picture.objects:
            ElementTree.SubElement(
                image,
                "mask",
                label=picture.classes.names[region.label],
                source="auto",
                occluded="0",
                rle=", ".join(map(str, runs(region.pixels.ravel()))),
                left=str(region.x0),
                top=str(region.y0),
                width=str(region.width),
                height=str(region.height),
                z_order="0",
            )
        return image

    def document(self, records: Iterable[Any], classes: ClassTable) -> Iterator[bytes]:
        """The file, one image after the other; their ids count from 0."""
        meta = ElementTree.Element("meta")
        task = ElementTree.SubElement(meta, "task")
        ElementTree.SubElement(task, "name").text = MADE
        ElementTree.SubElement(task, "mode").text = "annotation"
        labels = ElementTree.SubElement(task, "labels")
        for class_name in classes.names:
            label = ElementTree.SubElement(labels, "label")
            ElementTree.SubElement(label, "name").text = class_name
            ElementTree.SubElement(label, "type").text = "mask"
            ElementTree.SubElement(label, "attributes")
        yield b'<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n'
        yield _text(meta)
        for number, image in enumerate(records):
            image.set("id", str(number))
            yield _text(image)
        yield b"</annotations>\n"


def _text(element: ElementTree.Element) -> bytes:
    ElementTree.indent(element)
    return (ElementTree.tostring(element, encoding="unicode") + "\n").encode()


CVAT = Cvat()
