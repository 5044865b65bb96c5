"""Masks as VOC has them: palette PNGs, boxes of the objects and lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from lpcam.data.dataset import ClassTable
from lpcam.data.masks import write_mask
from lpcam.data.voc import CLASS_NAMES, CLASSES
from lpcam.formats.masks.base import Format, MaskEntry, Picture
from lpcam.runtime.files import write_bytes


class Voc(Format):
    """``SegmentationClass/ID.png``, ``Annotations/ID.xml``, ``class_names.txt`` and a list."""

    ignored = "kept as 255"

    def paths(self, entry: MaskEntry) -> Sequence[str]:
        """The mask and the annotation."""
        return f"SegmentationClass/{entry.id}.png", f"Annotations/{entry.id}.xml"

    def write(self, picture: Picture, paths: Sequence[Path]) -> None:
        """Write the mask and the annotation of one image."""
        write_mask(paths[0], picture.mask)
        height, width = picture.size
        annotation = ElementTree.Element("annotation")
        ElementTree.SubElement(annotation, "filename").text = picture.entry.name_by_id
        size = ElementTree.SubElement(annotation, "size")
        for name, value in (("width", width), ("height", height), ("depth", 3)):
            ElementTree.SubElement(size, name).text = str(value)
        ElementTree.SubElement(annotation, "segmented").text = "1"
        for one in picture.objects:
            entry = ElementTree.SubElement(annotation, "object")
            ElementTree.SubElement(entry, "name").text = picture.classes.names[one.label]
            box = ElementTree.SubElement(entry, "bndbox")
            # VOC counts pixels from 1 and names the last one
            corners = (one.x0 + 1, one.y0 + 1, one.x0 + one.width, one.y0 + one.height)
            for name, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
                ElementTree.SubElement(box, name).text = str(value)
        ElementTree.indent(annotation)
        write_bytes(paths[1], ElementTree.tostring(annotation, encoding="utf-8"))

    def beside(self, classes: ClassTable, ids: Sequence[str]) -> Mapping[str, bytes]:
        """A class name for each mask value from 1 on, and the list of the images."""
        return {
            CLASS_NAMES: _lines(_names_by_value(classes)),
            "ImageSets/Segmentation/all.txt": _lines(ids),
        }


def _names_by_value(classes: ClassTable) -> list[str]:
    by_value = dict(zip(classes.mask_ids, classes.names, strict=True))
    voc = dict(enumerate(CLASSES, start=1))
    if by_value.items() <= voc.items():
        return list(CLASSES)
    return [by_value.get(value, f"unused_{value}") for value in range(1, max(by_value) + 1)]


def _lines(texts: Iterable[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


VOC = Voc()
