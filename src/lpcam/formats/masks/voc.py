"""Masks as VOC has them: palette PNGs, boxes of the objects and lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from lpcam.data.dataset import ClassTable
from lpcam.data.masks import write_mask
from lpcam.data.voc import CLASS_NAMES, CLASSES
from lpcam.formats.masks.base import Format, MaskEntry, Picture, add_texts
from lpcam.runtime.files import write_bytes


class _Voc(Format):
    """``SegmentationClass/ID.png``, ``Annotations/ID.xml``, a list, and ``class_names.txt`` with a
    name for each mask value from 1 on."""

    ignored = "kept as 255"

    def paths(self, entry: MaskEntry) -> Sequence[str]:
        return f"SegmentationClass/{entry.id}.png", f"Annotations/{entry.id}.xml"

    def write(self, picture: Picture, paths: Sequence[Path]) -> None:
        write_mask(paths[0], picture.mask)
        height, width = picture.size
        annotation = Element("annotation")
        add_texts(annotation, filename=picture.entry.name_by_id)
        add_texts(SubElement(annotation, "size"), width=width, height=height, depth=3)
        add_texts(annotation, segmented=1)
        for one in picture.objects:
            entry = SubElement(annotation, "object")
            add_texts(entry, name=picture.classes.names[one.label])
            # VOC counts pixels from 1 and names the last one
            right, bottom = one.x0 + one.width, one.y0 + one.height
            box = SubElement(entry, "bndbox")
            add_texts(box, xmin=one.x0 + 1, ymin=one.y0 + 1, xmax=right, ymax=bottom)
        ElementTree.indent(annotation)
        write_bytes(paths[1], ElementTree.tostring(annotation, encoding="utf-8"))

    def beside(self, classes: ClassTable, ids: Sequence[str]) -> Mapping[str, bytes]:
        by_value = dict(zip(classes.mask_ids, classes.names, strict=True))
        names = [by_value.get(value, f"unused_{value}") for value in range(1, max(by_value) + 1)]
        if by_value.items() <= dict(enumerate(CLASSES, start=1)).items():
            names = list(CLASSES)
        return {CLASS_NAMES: _lines(names), "ImageSets/Segmentation/all.txt": _lines(ids)}


def _lines(texts: Iterable[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


VOC = _Voc()
