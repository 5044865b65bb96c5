"""Masks as CVAT's XML 1.1 "for images": shapes of the type ``mask``, exact.

They are taken by a task whose images have the same names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from xml.etree import ElementTree

from lpcam.data.items import ClassTable
from lpcam.formats.regions import Region, runs


def image_element(
    name: str, size: tuple[int, int], regions: Sequence[Region], classes: ClassTable
) -> ElementTree.Element:
    """An image and its masks: run lengths along the rows of each mask's box, outside first.

    Args:
        size: (height, width) of the image.

    Returns:
        the element without its ``id``, which :func:`document` gives.
    """
    height, width = size
    image = ElementTree.Element("image", name=name, width=str(width), height=str(height))
    for region in regions:
        ElementTree.SubElement(
            image,
            "mask",
            label=classes.names[region.label],
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


def document(
    images: Iterable[ElementTree.Element], classes: ClassTable, name: str
) -> Iterator[bytes]:
    """The parts of the file, an image after the other; their ids count from 0.

    Args:
        name: of the task.
    """
    meta = ElementTree.Element("meta")
    task = ElementTree.SubElement(meta, "task")
    ElementTree.SubElement(task, "name").text = name
    ElementTree.SubElement(task, "mode").text = "annotation"
    labels = ElementTree.SubElement(task, "labels")
    for class_name in classes.names:
        label = ElementTree.SubElement(labels, "label")
        ElementTree.SubElement(label, "name").text = class_name
        ElementTree.SubElement(label, "type").text = "mask"
        ElementTree.SubElement(label, "attributes")
    yield b'<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n'
    yield _text(meta)
    for number, image in enumerate(images):
        image.set("id", str(number))
        yield _text(image)
    yield b"</annotations>\n"


def _text(element: ElementTree.Element) -> bytes:
    ElementTree.indent(element)
    return (ElementTree.tostring(element, encoding="unicode") + "\n").encode()
