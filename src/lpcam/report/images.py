"""Data of the report's image viewer: thumbnails, small maps, masks, and IoU of each image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lpcam.data.dataset import Dataset, Item
from lpcam.data.images import limit_long_side
from lpcam.data.map_files import map_path, read_maps
from lpcam.data.masks import read_index_mask
from lpcam.data.resize import scaled_size
from lpcam.evaluation.segmentation import ThresholdSweep, truth_labels
from lpcam.explain.web import encode_array, encode_picture, encode_unit
from lpcam.method.image_maps import resize_maps, resize_mask
from lpcam.method.settings import Method
from lpcam.runtime.distributed import Sharing
from lpcam.runtime.progress import progress

_PICTURE = 256  # long side of a thumbnail, in pixels
_PLANE = 64  # long side of a map in the page; feature grids are coarser
_UNDEFINED = 65535  # stored for an IoU whose class is neither in the truth nor in the seed
_IOU_STEPS = 10_000  # steps in which an IoU from 0 to 1 is stored
_HIGHLIGHTS = 12  # images in each list of highlights
T = TypeVar("T")
R = TypeVar("R")
Scores = Mapping[Method, Mapping[str, float | None]]  #: Mean IoU by method and image id.


@dataclass(frozen=True)
class Sources:
    """Maps and masks that are shown with the images."""

    dataset: Dataset
    folders: Mapping[Method, Path]  #: Maps of each method.
    scores: Scores = field(default_factory=dict)  #: Empty if the images have no true masks.
    #: Folders of masks ID.png of later stages, by the name to show.
    masks: Mapping[str, Path] = field(default_factory=dict)
    planes: Mapping[str, Path] = field(default_factory=dict)  #: Folders of grey PNGs, by name.


def highlights(scores: Scores) -> dict[str, list[str]]:
    """Ids of the most improved and worsened images (last method against CAM), best and worst."""
    known = {m: {k: v for k, v in own.items() if v is not None} for m, own in scores.items()}
    cam, last = known["CAM"], known[list(known)[-1]]
    gains = {name: last[name] - cam[name] for name in last if name in cam}
    by_gain = sorted(gains, key=lambda name: (-gains[name], name))
    by_score = sorted(last, key=lambda name: (-last[name], name))
    return {
        "most improved": [name for name in by_gain[:_HIGHLIGHTS] if gains[name] > 0],
        "most worsened": [name for name in by_gain[::-1][:_HIGHLIGHTS] if gains[name] < 0],
        "best": by_score[:_HIGHLIGHTS],
        "worst": by_score[::-1][:_HIGHLIGHTS],
    }


def choose(items: Sequence[Item], count: int, wanted: Sequence[str]) -> list[Item]:
    """At most ``count`` images in list order: the wanted ids first, then an even choice."""
    picked = set(list(dict.fromkeys(wanted))[:count])
    others = [item.id for item in items if item.id not in picked]
    more = max(0, min(count - len(picked), len(others)))
    picked |= {others[place * len(others) // more] for place in range(more)}
    return [item for item in items if item.id in picked]


def image_records(
    items: Sequence[Item], sources: Sources, sharing: Sharing
) -> list[dict[str, Any]]:
    """One record for each image, as the page reads it."""
    classes = sources.dataset.classes

    def record(item: Item) -> dict[str, Any]:
        picture = thumbnail_record(item.read())
        size = picture["height"], picture["width"]
        folders = {m: path for m, path in sources.folders.items() if m != "LPCAM-F"}
        maps = {m: read_maps(map_path(path, item.id)) for m, path in folders.items()}
        masks, extra, ious, scores = {}, {}, {}, {}
        if item.mask is not None:
            truth = truth_labels(item.read_mask(), classes)
            masks["truth"] = encode_array(resize_mask(truth.numpy(), size))
            for method, one in maps.items():
                sweep = ThresholdSweep(len(classes))
                sweep.update(truth, torch.from_numpy(one.high_res), torch.from_numpy(one.keys))
                steps = (sweep.ious(list(item.labels)) * _IOU_STEPS).round().nan_to_num(_UNDEFINED)
                ious[method] = encode_array(steps.numpy().astype(np.uint16))
                scores[method] = sources.scores[method].get(item.id)
        for name, folder in sources.masks.items():
            mask = truth_labels(read_index_mask(folder / f"{item.id}.png"), classes)
            masks[name] = encode_array(resize_mask(mask.numpy(), size))
        for name, folder in sources.planes.items():
            plane = read_index_mask(folder / f"{item.id}.png").astype(np.float32) / np.float32(255)
            extra[name] = encode_unit(small_planes(plane[None])[0])
        return {
            "id": item.id,
            **picture,
            "labels": list(item.labels),
            "planes": {method: encode_unit(small_planes(one.cam)) for method, one in maps.items()},
            "masks": masks,
            "extra": extra,
            "iou": ious,
            "score": scores,
        }

    return run_all(sharing, record, items, "report: images")


def run_all(sharing: Sharing, work: Callable[[T], R], items: Sequence[T], title: str) -> list[R]:
    """The results of ``work`` on all items, in order, with a progress bar."""
    results = []
    with progress(title, len(items)) as advance:
        for result in sharing.map(work, items):
            results.append(result)
            advance(1, "")
    return results


def thumbnail_record(image: NDArray[np.uint8], long_side: int = _PICTURE) -> dict[str, Any]:
    """A reduced picture of an image (H, W, 3), its width and height."""
    small = limit_long_side(image, long_side)
    return {"picture": encode_picture(small), "width": small.shape[1], "height": small.shape[0]}


def small_planes(planes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Maps (K, h, w) reduced to a long side of at most 64 pixels (bilinear, antialiased)."""
    height, width = planes.shape[1:]
    size = scaled_size(height, width, min(1.0, _PLANE / max(height, width)))
    return resize_maps(planes, size, antialias=True)
