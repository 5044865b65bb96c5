"""The mask and map formats by name; a new format is one file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lpcam.runtime.registry import Registry

if TYPE_CHECKING:
    from lpcam.formats.map_formats import MapFormat
    from lpcam.formats.masks.base import Format

FORMATS: Registry[Format] = Registry(
    "mask format",
    "lpcam.formats",
    {
        "voc": "lpcam.formats.masks.voc:VOC",
        "coco": "lpcam.formats.masks.coco:COCO",
        "coco-polygons": "lpcam.formats.masks.coco:COCO_POLYGONS",
        "yolo": "lpcam.formats.masks.yolo:YOLO",
        "label-studio": "lpcam.formats.masks.label_studio:LABEL_STUDIO",
        "label-studio-polygons": "lpcam.formats.masks.label_studio:LABEL_STUDIO_POLYGONS",
        "cvat": "lpcam.formats.masks.cvat:CVAT",
        "fiftyone": "lpcam.formats.masks.fiftyone:FIFTYONE",
        "overlays": "lpcam.formats.masks.overlays:OVERLAYS",
    },
)
"""Mask formats that ``lpcam export masks`` writes."""
MAP_FORMATS: Registry[MapFormat] = Registry(
    "map format",
    "lpcam.map_formats",
    {
        "irn": "lpcam.formats.map_formats:IRN",
        "amn": "lpcam.formats.map_formats:AMN",
        "psa": "lpcam.formats.map_formats:PSA",
        "psa-crf": "lpcam.formats.map_formats:PSA_CRF",
    },
)
"""Map formats that ``lpcam import maps`` reads and ``lpcam export maps`` writes."""
