"""Segment image files and whole folders, onto disk, and pack masks for the VOC test server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lpcam.data.dataset import ClassTable
from lpcam.data.drawing import overlay_mask
from lpcam.data.images import USUAL, Reading, limit_long_side, png_bytes, read_image
from lpcam.data.map_files import write_arrays
from lpcam.data.masks import enlarge_labels, write_mask
from lpcam.data.output_folders import ImageResults, OutputKind, find_images, process_images
from lpcam.runtime.errors import DataError
from lpcam.runtime.files import printable, write_bytes, write_json
from lpcam.runtime.resources import memory_of_an_image
from lpcam.runtime.versions import versions
from lpcam.segmentation import inference as predict
from lpcam.segmentation.segmenter import Segmenter
from lpcam.segmentation.settings import SegmentTestSettings

KIND = "lpcam predict"
INDEX = "predicted.json"
MAXIMUM_SIDE = 1024  #: Maximum side, in pixels, at which an image is segmented, as a run maps it.


_PREDICTED = OutputKind(
    KIND,
    INDEX,
    (
        re.compile(r"found/(?P<name>.+)\.json"),
        re.compile(r"(masks|overlays)/(?P<name>.+)\.png"),
        re.compile(r"probabilities/(?P<name>.+)\.npz"),
    ),
    describe=lambda found: (
        ", ".join(f"{c['name']} ({100 * c['area']:.0f} %)" for c in found["classes"])
        or "background alone"
    ),
    pictures="overlays",
)


def segment_files(
    segmenter: Segmenter,
    sources: Iterable[Path],
    output: Path,
    settings: SegmentTestSettings,
    *,
    probabilities: bool = False,
    maximum_side: int = MAXIMUM_SIDE,
    workers: int = 1,
    command: str = "",
    reading: Reading = USUAL,
    made_by: Mapping[str, Any] | None = None,
) -> ImageResults:
    """Segment image files and the images of folders; a broken one is left out, with the reason.

    Below ``output``, by the names of :func:`lpcam.data.output_folders.find_images`:
    ``masks/NAME.png`` at the image's size, with the VOC palette and the classes' mask ids;
    ``overlays/NAME.png``; ``found/NAME.json``, the classes and their share of the image; and
    ``predicted.json``, which names the images, what was left out, and what made the masks. A later
    call replaces the files of the same names that an earlier one wrote, and no others.

    Args:
        segmenter: a segmenter in evaluation mode; with ``workers`` above 1 it is shared by threads.
        probabilities: whether to write ``probabilities/NAME.npz`` too.
        maximum_side: longest side in pixels at which an image is segmented. The mask of a longer
            one is enlarged to the nearest pixel, its overlay and probabilities stay smaller.
        workers: images worked on at a time; they share the memory of the CRF.
        reading: how the images are read, as those that the segmenter learnt from.
        command, made_by: provenance, recorded.

    Raises:
        LpcamError: if there is no image, the segmenter is in training mode or its logits are not
            finite, or a file that is not an earlier call's would be replaced.
    """
    files = find_images(sources, output)
    classes = segmenter.classes
    made = {
        "classes": dict(zip(classes.names, classes.mask_ids, strict=True)),
        "settings": settings.model_dump(mode="json"),
        "changed_from_preset": sorted(settings.changes()),
        "maximum_side": maximum_side,
        **reading.as_json(),
        "versions": versions(),
        **(made_by or {}),
    }
    crf = predict.make_crf(settings, memory_of_an_image(segmenter.device, workers))

    def make(name: str, path: Path) -> dict[str, Any]:
        image = read_image(path, reading)
        seen = limit_long_side(image, maximum_side)
        scores = predict.probabilities(segmenter, seen, settings)
        if crf is not None:
            try:
                scores = predict.refine(scores, seen, settings, crf)
            except DataError as error:
                raise DataError(
                    f"cannot segment image {path}: {error}; or lower the longest side of images"
                ) from error
        labels = predict.labels(scores).cpu()
        small = predict.label_mask(labels, classes)
        mask = predict.label_mask(enlarge_labels(labels, image.shape[:2]), classes)
        files = {"mask": f"masks/{name}.png", "overlay": f"overlays/{name}.png"}
        write_mask(output / files["mask"], mask)
        write_bytes(output / files["overlay"], png_bytes(overlay_mask(seen, small)))
        if probabilities:
            files["probabilities"] = f"probabilities/{name}.npz"
            _write_probabilities(output / files["probabilities"], scores, classes, made)
        found = {
            "format": 1,
            "kind": KIND,
            "image": name,
            "width": image.shape[1],
            "height": image.shape[0],
            "segmented_width": seen.shape[1],
            "segmented_height": seen.shape[0],
            "classes": _areas(mask, classes),
            "files": files,
            "made_by": {**made, "file": printable(path)},
        }
        # last: it says that the rest is there
        write_json(output / "found" / f"{name}.json", found)
        return found

    how: Any = {"made_by": made, "command": command, "workers": workers, "title": "segmenting"}
    return process_images(files, output, make, _PREDICTED, **how)


def _areas(mask: NDArray[np.uint8], classes: ClassTable) -> list[dict[str, Any]]:
    """The classes in a mask, the largest first, with their share of the pixels."""
    counts = np.bincount(mask.reshape(-1), minlength=256) / mask.size
    found = [
        {"name": name, "mask_value": value, "area": round(float(counts[value]), 6)}
        for name, value in zip(classes.names, classes.mask_ids, strict=True)
        if counts[value]
    ]
    return sorted(found, key=lambda one: -float(one["area"]))


def _write_probabilities(
    path: Path, probabilities: Tensor, classes: ClassTable, made_by: Mapping[str, Any]
) -> None:
    """Write probabilities (L, H, W) in [0, 1] as a compressed npz without pickle.

    ``probabilities`` uint8 (L, H, W), round(255 p); ``names`` and ``mask_ids`` (L,), background
    first; ``made_by``, JSON as UTF-8 bytes.
    """
    values = np.empty(tuple(probabilities.shape), np.uint8)
    for into, plane in zip(values, probabilities, strict=True):  # one at a time, to save memory
        into[:] = (plane * 255.0).round().cpu().numpy()
    members = {
        "probabilities": values,
        "names": np.array(["background", *classes.names]),
        "mask_ids": np.array([0, *classes.mask_ids], np.uint8),
        "made_by": np.frombuffer(json.dumps(dict(made_by), sort_keys=True).encode(), np.uint8),
    }
    write_arrays(path, members)
