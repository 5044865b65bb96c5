"""What the report's viewer shows of each image: a thumbnail, small maps, masks, and its IoU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from lpcam.data.images import read_image, read_index_mask
from lpcam.data.items import Dataset, Item
from lpcam.metrics import DEFAULT_THRESHOLDS, ThresholdSweep, truth_labels
from lpcam.parallel import Sharing
from lpcam.progress import progress
from lpcam.recipe import Method
from lpcam.report.encode import encode_array, encode_picture, encode_unit, fit
from lpcam.storage import map_path, read_maps

PICTURE = 256
"""Long side of a thumbnail, in pixels."""
PLANE = 64
"""Long side of a map in the page; the maps come from a feature grid that is coarser still."""
UNDEFINED = 65535
"""Of an IoU whose class is neither in the truth nor in the seed."""
IOU_STEPS = 10_000
HIGHLIGHTS = 12
"""Images of each kind that the report points at."""
SHOWN_METHODS: tuple[Method, ...] = ("CAM", "LPCAM")

Scores = Mapping[Method, Mapping[str, float | None]]
"""For each method the mean IoU of each image by id."""


@dataclass(frozen=True)
class Further:
    """What stages after the seeds made of each image: folders of ID.png by the name to show."""

    masks: Mapping[str, Path] = field(default_factory=dict)
    planes: Mapping[str, Path] = field(default_factory=dict)
    """Grey pictures, 0 to 255."""


def highlights(scores: Scores) -> dict[str, list[str]]:
    """Ids of the most improved and worsened images (LPCAM against CAM), the best and the worst."""
    cam, lpcam = ({k: v for k, v in scores[m].items() if v is not None} for m in SHOWN_METHODS)
    gains = {name: lpcam[name] - cam[name] for name in lpcam if name in cam}
    by_gain = sorted(gains, key=lambda name: (-gains[name], name))
    by_score = sorted(lpcam, key=lambda name: (-lpcam[name], name))
    return {
        "most improved": [name for name in by_gain[:HIGHLIGHTS] if gains[name] > 0],
        "most worsened": [name for name in by_gain[: -HIGHLIGHTS - 1 : -1] if gains[name] < 0],
        "best": by_score[:HIGHLIGHTS],
        "worst": by_score[: -HIGHLIGHTS - 1 : -1],
    }


def choose(items: Sequence[Item], count: int, wanted: Sequence[str]) -> list[Item]:
    """At most ``count`` images in list order: those wanted first, then an even choice."""
    picked = set(list(dict.fromkeys(wanted))[:count])
    others = [item.id for item in items if item.id not in picked]
    room = max(0, min(count - len(picked), len(others)))
    picked |= {others[place * len(others) // room] for place in range(room)}
    return [item for item in items if item.id in picked]


def in_turn(lists: Iterable[Sequence[str]]) -> list[str]:
    """The first of each list, then the second of each, and so on."""
    return [name for turn in zip_longest(*lists) for name in turn if name is not None]


def image_records(
    items: Sequence[Item],
    dataset: Dataset,
    folders: Mapping[Method, Path],
    scores: Scores,
    sharing: Sharing,
    further: Further | None = None,
) -> list[dict[str, Any]]:
    """One record an image, as the page wants them.

    Args:
        folders: of the maps of each method.
        scores: of each image where there is truth.
        further: masks and planes that later stages made.
    """
    further = further or Further()

    def record(item: Item) -> dict[str, Any]:
        picture = fit(read_image(item.image), PICTURE)
        height, width = picture.shape[:2]
        maps = {method: read_maps(map_path(folders[method], item.id)) for method in SHOWN_METHODS}
        found: dict[str, Any] = {
            "id": item.id,
            "picture": encode_picture(picture),
            "width": width,
            "height": height,
            "labels": list(item.labels),
            "planes": {method: encode_unit(small_planes(one.cam)) for method, one in maps.items()},
            "masks": {},
            "extra": {},
            "iou": {},
            "score": {},
        }
        if item.mask is not None:
            truth = truth_labels(read_index_mask(item.mask), dataset.classes)
            found["masks"]["truth"] = encode_array(_thumbnail(truth.numpy(), (height, width)))
            for method, one in maps.items():
                sweep = ThresholdSweep(len(dataset.classes), DEFAULT_THRESHOLDS)
                planes, keys = torch.from_numpy(one.high_res), torch.from_numpy(one.keys)
                sweep.update(truth, planes, keys)
                found["iou"][method] = encode_array(_steps(sweep.ious(list(item.labels)).numpy()))
                found["score"][method] = scores[method].get(item.id)
        for name, folder in further.masks.items():
            mask = truth_labels(read_index_mask(folder / f"{item.id}.png"), dataset.classes)
            found["masks"][name] = encode_array(_thumbnail(mask.numpy(), (height, width)))
        for name, folder in further.planes.items():
            plane = read_index_mask(folder / f"{item.id}.png").astype(np.float32) / np.float32(255)
            found["extra"][name] = encode_unit(small_planes(plane[None])[0])
        return found

    records = []
    with progress("report: images", len(items)) as advance:
        for one in sharing.map(record, items):
            records.append(one)
            advance(1, "")
    return records


def small_planes(planes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Maps (K, h, w) with their long side at most PLANE (bilinear, antialiased)."""
    height, width = planes.shape[1:]
    if max(height, width) <= PLANE or not len(planes):
        return planes
    scale = PLANE / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    small = F.interpolate(
        torch.from_numpy(planes)[None], size, mode="bilinear", antialias=True, align_corners=False
    )
    return small[0].numpy()


def _thumbnail(mask: NDArray[Any], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A mask of values below 256 at another size (nearest)."""
    small = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(small.resize((size[1], size[0]), Image.Resampling.NEAREST))


def _steps(ious: NDArray[np.float64]) -> NDArray[np.uint16]:
    steps = np.rint(np.nan_to_num(ious) * IOU_STEPS).astype(np.uint16)
    return np.where(np.isnan(ious), np.uint16(UNDEFINED), steps)
