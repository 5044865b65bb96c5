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
from lpcam.data.images import limit_long_side
from lpcam.data.masks import read_index_mask
from lpcam.evaluation.segmentation import confusion, truth_labels
from lpcam.explain.web import encode_picture
from lpcam.method.image_maps import resize_mask
from lpcam.report.images import choose, highlights, run_all, thumbnail_record
from lpcam.runtime.distributed import Sharing

PICTURE = 176  #: Long side of a picture, in pixels.
SHOWN = 48  #: Images shown at most.
_EACH = 6  # one in so many images has one of the largest gains, and one of the largest losses


@dataclass(frozen=True)
class TrainedSegmenter:
    """A segmenter, named by the masks that it was trained on."""

    name: str  #: ``cam``, ``lpcam`` or ``truth``.
    title: str  #: The masks in words, such as "LPCAM + IRN".
    images: int  #: Number of training masks.
    folder: Path  #: Predicted masks of the test list: ID.png with mask ids.


@dataclass(frozen=True)
class SegmenterResults:
    """The segmenters of a run and their tests."""

    segmenters: Sequence[TrainedSegmenter]
    rows: Sequence[Mapping[str, Any]]  #: Rows of metrics.json that have ``teacher`` and ``crf``.
    items: Sequence[Item]  #: The test list.
    history: Mapping[str, Sequence[Mapping[str, Any]]]
    """``step``, ``loss`` and sometimes ``validation_miou`` of each training by name."""
    about: Mapping[str, Any]
    """``network``, ``split``, ``list``, ``checkpoint``, ``crf`` and ``settings``."""


def image_miou(
    mask: NDArray[np.uint8], truth: NDArray[np.uint8], classes: ClassTable
) -> float | None:
    """Mean IoU of one image, over the background and the classes in its mask or its truth.

    Masks (H, W) hold mask ids; in the truth other values are not counted. None: no pixel counts.
    """
    labels = truth_labels(truth, classes), truth_labels(mask, classes)
    counts = confusion(*labels, len(classes) + 1).double()
    hit = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hit
    there = union > 0
    return (hit[there] / union[there]).mean().item() if there.any() else None


def choose_images(
    items: Sequence[Item], scores: Mapping[str, Mapping[str, float | None]], count: int
) -> list[tuple[str, Item]]:
    """At most ``count`` images to show: the largest gains, the largest losses, an even choice.

    ``scores`` are mean IoU by training masks, ``cam`` and ``lpcam``, and image id; or empty.
    """
    found = highlights({"CAM": scores["cam"], "LPCAM": scores["lpcam"]}) if scores else {}
    by_id = {item.id: item for item in items}
    shown = [
        (kind, by_id[name])
        for kind, key in (("gain", "most improved"), ("loss", "most worsened"))
        for name in found.get(key, [])[: count // _EACH]
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
    return {
        **trained.about,
        "teachers": [
            {"name": t.name, "title": t.title, "images": t.images} for t in trained.segmenters
        ],
        "rows": list(trained.rows),
        "history": dict(trained.history),
        "images": run_all(sharing, lambda pair: _record(*pair, trained, classes), shown, title),
        "images_total": len(trained.items),
    }


def _scores(
    trained: SegmenterResults, classes: ClassTable, sharing: Sharing
) -> dict[str, dict[str, float | None]]:
    """Each image's mean IoU by the segmenters of CAM and LPCAM, if both exist."""
    compared = [one for one in trained.segmenters if one.name in ("cam", "lpcam")]
    truths = {item.id: item for item in trained.items if item.mask is not None}
    if len(compared) < 2 or not truths:
        return {}

    def score(name: str) -> list[float | None]:
        truth = truths[name].read_mask()
        masks = (read_index_mask(one.folder / f"{name}.png") for one in compared)
        return [image_miou(mask, truth, classes) for mask in masks]

    rows = run_all(sharing, score, list(truths), "report: scores of segmenters")
    return {
        one.name: {name: row[n] for name, row in zip(truths, rows, strict=True)}
        for n, one in enumerate(compared)
    }


def _record(
    kind: str, item: Item, trained: SegmenterResults, classes: ClassTable
) -> dict[str, Any]:
    picture = limit_long_side(item.read(), PICTURE)
    folders = {one.name: one.folder for one in trained.segmenters}
    masks = {name: read_index_mask(path / f"{item.id}.png") for name, path in folders.items()}
    truth = None if item.mask is None else item.read_mask()

    def view(mask: NDArray[np.uint8]) -> dict[str, Any]:
        known = np.isin(mask, [BACKGROUND, *classes.mask_ids])
        values = resize_mask(np.where(known, mask, IGNORE), picture.shape[:2])
        return {
            "picture": encode_picture(overlay_mask(picture, values)),
            # from the whole mask: an object may be too small for the picture
            "classes": [n for n, value in enumerate(classes.mask_ids) if (mask == value).any()],
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
