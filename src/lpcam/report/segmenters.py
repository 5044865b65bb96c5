"""What the report shows of segmenters: their figures, and their masks of some images to test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lpcam.data.images import read_image, read_index_mask
from lpcam.data.items import BACKGROUND, IGNORE, ClassTable, Item
from lpcam.masks import overlay_mask
from lpcam.metrics import confusion, truth_labels
from lpcam.parallel import Sharing
from lpcam.progress import progress
from lpcam.report.encode import encode_picture, fit
from lpcam.report.images import choose, highlights

PICTURE = 176
"""Long side of a picture, in pixels."""
SHOWN = 48
"""Images at most: those of largest gain and of largest loss, and an even choice of the others."""
EACH = 6
"""One in so many is of largest gain, and one in so many of largest loss."""
BASELINE, COMPARED = "cam", "lpcam"
"""Teachers whose segmenters are compared image by image, where there are both."""
KINDS = {"most improved": "gain", "most worsened": "loss"}
"""Of images, by the names of :func:`lpcam.report.images.highlights`."""


@dataclass(frozen=True)
class Taught:
    """A segmenter, by the masks that it was trained on."""

    name: str
    """Of the masks, in the names of folders: ``cam``, ``lpcam`` or ``truth``."""
    title: str
    """Of the masks, such as "LPCAM + IRN"."""
    images: int
    """How many masks there were."""
    folder: Path
    """Of what it made of the list to test: ID.png with mask ids."""


@dataclass(frozen=True)
class Trained:
    """The segmenters of a run, and what they were tested on."""

    taught: Sequence[Taught]
    rows: Sequence[Mapping[str, Any]]
    """As in metrics.json, each with ``teacher`` (a name) and ``crf`` (whether there was one) too;
    empty where the images have no masks."""
    items: Sequence[Item]
    """The list to test."""
    history: Mapping[str, Sequence[Mapping[str, Any]]]
    """Of each training by name: ``step``, ``loss`` and, now and then, ``validation_miou``."""
    irn_history: Mapping[str, Sequence[Mapping[str, Any]]]
    """The same of IRN's boundaries; may be empty."""
    about: Mapping[str, Any]
    """``network``, ``split``, ``list``, ``checkpoint``, ``crf`` and ``settings``."""


def image_miou(
    mask: NDArray[np.uint8], truth: NDArray[np.uint8], classes: ClassTable
) -> float | None:
    """Mean IoU of one image, over the background and the classes in its mask or its truth.

    Args:
        mask: (H, W) with the classes' mask ids.
        truth: (H, W) with mask ids; others, and 255, are not counted.

    Returns:
        a fraction, or None if no pixel counts.

    Raises:
        DataError: if the sizes differ or the mask has an id of no class.
    """
    counts = confusion(
        truth_labels(truth, classes), truth_labels(mask, classes), len(classes) + 1
    ).double()
    hit = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hit
    there = union > 0
    return (hit[there] / union[there]).mean().item() if there.any() else None


def choose_images(
    items: Sequence[Item],
    scores: Mapping[str, Mapping[str, float | None]],
    count: int = SHOWN,
) -> list[tuple[str, Item]]:
    """Images to show, at most ``count``, each with why: ``gain``, ``loss`` or ``even``.

    Args:
        scores: mean IoU of images by name of the teacher and id; of images without truth none.

    Returns:
        the largest gains first, then the largest losses, then the others in list order.
    """
    found = {}
    if BASELINE in scores and COMPARED in scores:
        found = highlights({"CAM": scores[BASELINE], "LPCAM": scores[COMPARED]})
    by_id, room = {item.id: item for item in items}, count // EACH
    shown = [
        (kind, by_id[name]) for key, kind in KINDS.items() for name in found.get(key, [])[:room]
    ]
    taken = {item.id for _, item in shown}
    others = [item for item in items if item.id not in taken]
    return [*shown, *(("even", item) for item in choose(others, count - len(shown), ()))]


def segmenter_records(
    trained: Trained, classes: ClassTable, sharing: Sharing, count: int = SHOWN
) -> dict[str, Any]:
    """The data of the page's section on segmenters.

    Args:
        count: images to show, at most.

    Raises:
        LpcamError: if an image or a mask cannot be read.
    """
    shown = choose_images(trained.items, _scores(trained, classes, sharing), count)
    with progress("report: images of segmenters", len(shown)) as advance:
        pictures = []
        for one in sharing.map(lambda pair: _record(*pair, trained, classes), shown):
            pictures.append(one)
            advance(1, "")
    return {
        **trained.about,
        "teachers": [
            {"name": one.name, "title": one.title, "images": one.images} for one in trained.taught
        ],
        "rows": list(trained.rows),
        "history": {name: list(records) for name, records in trained.history.items()},
        "irn_history": {name: list(records) for name, records in trained.irn_history.items()},
        "images": pictures,
        "images_total": len(trained.items),
    }


def _scores(
    trained: Trained, classes: ClassTable, sharing: Sharing
) -> dict[str, dict[str, float | None]]:
    """Each image's mean IoU by the two segmenters that are compared."""
    compared = [one for one in trained.taught if one.name in (BASELINE, COMPARED)]
    scored = [item for item in trained.items if item.mask is not None]
    if len(compared) < 2 or not scored:
        return {}

    def score(item: Item) -> list[float | None]:
        assert item.mask is not None
        truth = read_index_mask(item.mask)
        return [image_miou(_mask(one, item), truth, classes) for one in compared]

    found: dict[str, dict[str, float | None]] = {one.name: {} for one in compared}
    with progress("report: scores of segmenters", len(scored)) as advance:
        for item, values in zip(scored, sharing.map(score, scored), strict=True):
            for one, value in zip(compared, values, strict=True):
                found[one.name][item.id] = value
            advance(1, "")
    return found


def _record(kind: str, item: Item, trained: Trained, classes: ClassTable) -> dict[str, Any]:
    picture = fit(read_image(item.image), PICTURE)
    height, width = picture.shape[:2]
    masks = {one.name: _mask(one, item) for one in trained.taught}
    truth = None if item.mask is None else read_index_mask(item.mask)

    def view(mask: NDArray[np.uint8]) -> dict[str, Any]:
        known = np.isin(mask, [BACKGROUND, *classes.mask_ids])
        small = Image.fromarray(np.where(known, mask, IGNORE).astype(np.uint8))
        values = np.asarray(small.resize((width, height), Image.Resampling.NEAREST))
        # of the whole mask: an object may be too small for the picture
        there = [n for n, value in enumerate(classes.mask_ids) if (mask == value).any()]
        return {
            "picture": encode_picture(overlay_mask(picture, values)),
            "classes": there,
            "ignored": bool((values == IGNORE).any()),
        }

    return {
        "id": item.id,
        "kind": kind,
        "picture": encode_picture(picture),
        "width": width,
        "height": height,
        "truth": None if truth is None else view(truth),
        "masks": {name: view(mask) for name, mask in masks.items()},
        "miou": {}
        if truth is None
        else {name: image_miou(mask, truth, classes) for name, mask in masks.items()},
    }


def _mask(taught: Taught, item: Item) -> NDArray[np.uint8]:
    return read_index_mask(taught.folder / f"{item.id}.png")
