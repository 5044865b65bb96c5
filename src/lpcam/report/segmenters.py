"""Data of the report on segmenters: their scores, and their masks of some test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpcam.data.dataset import BACKGROUND, IGNORE, ClassTable, Item
from lpcam.data.drawing import overlay_mask
from lpcam.data.images import limit_long_side, read_image
from lpcam.data.masks import read_index_mask
from lpcam.evaluation.segmentation import confusion, truth_labels
from lpcam.explain.web import encode_picture
from lpcam.report.images import choose, highlights, nearest, run_all, thumbnail_record
from lpcam.runtime.distributed import Sharing

PICTURE = 176
"""Long side of a picture, in pixels."""
SHOWN = 48
"""Images shown at most."""
EACH = 6
"""One in EACH images has one of the largest gains, and one in EACH one of the largest losses."""
BASELINE, COMPARED = "cam", "lpcam"
"""Training masks whose segmenters are compared image by image."""
KINDS = {"most improved": "gain", "most worsened": "loss"}
"""Kinds of images by their names in :func:`lpcam.report.images.highlights`."""


@dataclass(frozen=True)
class TrainedSegmenter:
    """A segmenter, named by the masks that it was trained on."""

    name: str
    """``cam``, ``lpcam`` or ``truth``."""
    title: str
    """The masks in words, such as "LPCAM + IRN"."""
    images: int
    """Number of training masks."""
    folder: Path
    """Its predictions for the test list: ID.png with mask ids."""


@dataclass(frozen=True)
class SegmenterResults:
    """The segmenters of a run and their tests."""

    segmenters: Sequence[TrainedSegmenter]
    rows: Sequence[Mapping[str, Any]]
    """Rows of metrics.json, each with ``teacher`` (a name) and ``crf`` (bool); empty without true
    masks."""
    items: Sequence[Item]
    """The test list."""
    history: Mapping[str, Sequence[Mapping[str, Any]]]
    """``step``, ``loss`` and sometimes ``validation_miou`` of each training by name."""
    irn_history: Mapping[str, Sequence[Mapping[str, Any]]]
    """Training history of the refinement's network; may be empty."""
    about: Mapping[str, Any]
    """``network``, ``split``, ``list``, ``checkpoint``, ``crf`` and ``settings``."""


def image_miou(
    mask: NDArray[np.uint8], truth: NDArray[np.uint8], classes: ClassTable
) -> float | None:
    """Mean IoU of one image, over the background and the classes in its mask or its truth.

    Masks (H, W) hold mask ids; in the truth other values are not counted. None: no pixel counts.

    Example:
        >>> mask, truth = np.array([[0, 3, 3, 0]], np.uint8), np.array([[0, 3, 0, 0]], np.uint8)
        >>> round(image_miou(mask, truth, ClassTable(("cat",), (3,))), 3)
        0.583
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
    """Images to show, at most ``count``: the largest gains, the largest losses, an even choice.

    Args:
        scores: mean IoU by training masks and image id, of images with true masks.

    Example:
        >>> [kind for kind, _ in choose_images([Item("a", Path("a"), ())], {})]
        ['even']
    """
    found = {}
    if BASELINE in scores and COMPARED in scores:
        found = highlights({"CAM": scores[BASELINE], "LPCAM": scores[COMPARED]})
    by_id, most = {item.id: item for item in items}, count // EACH
    shown = [
        (kind, by_id[name]) for key, kind in KINDS.items() for name in found.get(key, [])[:most]
    ]
    taken = {item.id for _, item in shown}
    others = [item for item in items if item.id not in taken]
    return [*shown, *(("even", item) for item in choose(others, count - len(shown), ()))]


def segmenter_records(
    trained: SegmenterResults, classes: ClassTable, sharing: Sharing, count: int = SHOWN
) -> dict[str, Any]:
    """The data of the page's section on segmenters, with at most ``count`` images."""
    shown = choose_images(trained.items, _scores(trained, classes, sharing), count)
    title = "report: images of segmenters"
    pictures = run_all(sharing, lambda pair: _record(*pair, trained, classes), shown, title)
    return {
        **trained.about,
        "teachers": [
            {"name": t.name, "title": t.title, "images": t.images} for t in trained.segmenters
        ],
        "rows": list(trained.rows),
        "history": dict(trained.history),
        "irn_history": dict(trained.irn_history),
        "images": pictures,
        "images_total": len(trained.items),
    }


def _scores(
    trained: SegmenterResults, classes: ClassTable, sharing: Sharing
) -> dict[str, dict[str, float | None]]:
    """Each image's mean IoU by the two segmenters that are compared."""
    compared = [one for one in trained.segmenters if one.name in (BASELINE, COMPARED)]
    scored = [item for item in trained.items if item.mask is not None]
    if len(compared) < 2 or not scored:
        return {}

    def score(item: Item) -> list[float | None]:
        assert item.mask is not None
        truth = read_index_mask(item.mask)
        return [image_miou(_mask(one, item), truth, classes) for one in compared]

    rows = run_all(sharing, score, scored, "report: scores of segmenters")
    return {
        one.name: {item.id: row[n] for item, row in zip(scored, rows, strict=True)}
        for n, one in enumerate(compared)
    }


def _record(
    kind: str, item: Item, trained: SegmenterResults, classes: ClassTable
) -> dict[str, Any]:
    picture = limit_long_side(read_image(item.image), PICTURE)
    masks = {one.name: _mask(one, item) for one in trained.segmenters}
    truth = None if item.mask is None else read_index_mask(item.mask)

    def view(mask: NDArray[np.uint8]) -> dict[str, Any]:
        known = np.isin(mask, [BACKGROUND, *classes.mask_ids])
        values = nearest(np.where(known, mask, IGNORE), picture.shape[:2])
        # from the whole mask: an object may be too small for the picture
        there = [n for n, value in enumerate(classes.mask_ids) if (mask == value).any()]
        return {
            "picture": encode_picture(overlay_mask(picture, values)),
            "classes": there,
            "ignored": bool((values == IGNORE).any()),
        }

    return {
        "id": item.id,
        "kind": kind,
        **thumbnail_record(picture, PICTURE),
        "truth": None if truth is None else view(truth),
        "masks": {name: view(mask) for name, mask in masks.items()},
        "miou": {n: image_miou(m, truth, classes) for n, m in masks.items() if truth is not None},
    }


def _mask(segmenter: TrainedSegmenter, item: Item) -> NDArray[np.uint8]:
    return read_index_mask(segmenter.folder / f"{item.id}.png")
