"""Masks, boxes, heat maps and scores as a data set that FiftyOne opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lpcam.data.dataset import ClassTable
from lpcam.data.images import png_bytes
from lpcam.data.masks import write_plane
from lpcam.formats.masks.base import MADE, Format, MaskEntry, Picture, compact_json
from lpcam.runtime.errors import DataError
from lpcam.runtime.files import write_bytes


class _FiftyOne(Format):
    """``samples.json``, ``metadata.json`` and the pictures of two fields.

    It is FiftyOne's format without its version, which names no type of a database. Images stay.
    """

    refers_to_images = True
    holds_scores = True
    document_name = "samples.json"
    frame = b'{"samples": [', b"]}"
    ignored = "kept as 255"

    def check(self, entry: MaskEntry, ids: frozenset[str]) -> None:
        if entry.image is None:
            raise DataError(f"{entry.id!r} has no image, which a sample needs; give its image")

    def paths(self, entry: MaskEntry) -> Sequence[str]:
        # FiftyOne looks below fields/ for the fields whose files have relative paths
        return f"fields/masks/{entry.id}.png", f"fields/heat/{entry.id}.png"

    def write(self, picture: Picture, paths: Sequence[Path]) -> None:
        write_bytes(paths[0], png_bytes(picture.mask))  # grey: it reads a palette as colours
        if picture.heat is not None:
            write_plane(paths[1], picture.heat)

    def record(self, picture: Picture) -> Any:
        boxes, sides = [], np.tile(picture.size[::-1], 2)
        for one in picture.objects:
            box = np.array([one.x0, one.y0, one.width, one.height]) / sides
            found = {"label": picture.classes.names[one.label], "bounding_box": box.tolist()}
            boxes.append({"_cls": "Detection", **found})
        mask, heat = self.paths(picture.entry)
        shown = {"_cls": "Heatmap", "map_path": heat}
        return {
            "filepath": str(picture.entry.image and picture.entry.image.absolute()),
            "masks": {"_cls": "Segmentation", "mask_path": mask},
            "objects": {"_cls": "Detections", "detections": boxes},
            "heat": None if picture.heat is None else shown,
            **picture.scores,
        }

    def beside(self, classes: ClassTable, ids: Sequence[str]) -> Mapping[str, bytes]:
        targets = {str(n): name for name, n in zip(classes.names, classes.mask_ids, strict=True)}
        info = {"description": f"masks written by {MADE}", "default_mask_targets": targets}
        return {"metadata.json": compact_json({"info": info})}


FIFTYONE = _FiftyOne()
