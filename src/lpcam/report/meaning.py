"""What prototypes look like, and where a classifier takes one class for another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lpcam.classifier import Classifier
from lpcam.data.images import read_image
from lpcam.data.items import Item
from lpcam.extract import FeaturePair, cam_maps, lpcam_maps, on_grid, single_scale_cam
from lpcam.functional import FusedMaps, normalize, split
from lpcam.presets import LpcamSettings
from lpcam.prototypes import SIDES, Centers, Prototypes, SideName
from lpcam.report.encode import encode_picture, encode_unit, fit
from lpcam.report.images import PICTURE, small_planes
from lpcam.storage import map_path, read_maps

PATCH = 64
"""Side of a patch in the page, in pixels."""
PATCH_CELLS = 5
"""Side of a patch in the image, in cells of the feature grid: what a location sees best."""
MOST_PATCHES = 1600
"""In a page, about 2 MB; with many classes fewer prototypes of each are shown."""

Pairs = Callable[[Sequence[Item], Sequence[float]], Iterator[FeaturePair]]
"""Features of images of equal size at each scale, as :meth:`lpcam.features.FeatureStore.pairs`."""


class Place(NamedTuple):
    """A location of an image's feature grid, and its cosine to a prototype."""

    image: str
    row: float
    """Centre, as a share of the image's height."""
    column: float
    """Centre, as a share of the image's width."""
    cell: float
    """Height of a cell, as a share of the image's height."""
    cosine: float


def nearest_places(
    features: Iterator[tuple[str, Tensor, Tensor]], centers: Tensor, count: int
) -> list[list[Place]]:
    """For each centre the ``count`` images with the nearest location, and that location.

    Args:
        features: of each image its name, features (C, h, w), and where each centre may look, bool
            (K, h, w). An image without such a location is left out.
        centers: (K, C).

    Returns:
        K lists of places in falling cosine, one an image.
    """
    unit = F.normalize(centers, dim=1)
    found: list[list[Place]] = [[] for _ in range(len(centers))]
    for name, grid, where_to_look in features:
        height, width = grid.shape[-2:]
        cosines = unit @ F.normalize(grid.flatten(1).to(unit), dim=0)
        cosines[~where_to_look.flatten(1)] = -torch.inf
        best, where = cosines.max(dim=1)
        for places, cosine, at in zip(found, best.tolist(), where.tolist(), strict=True):
            if cosine == -math.inf:
                continue
            row, column = divmod(at, width)
            places.append(
                Place(name, (row + 0.5) / height, (column + 0.5) / width, 1 / height, cosine)
            )
    return [sorted(places, key=lambda p: (-p.cosine, p.image))[:count] for places in found]


def crop(picture: NDArray[np.uint8], place: Place) -> NDArray[np.uint8]:
    """The square patch (PATCH, PATCH, 3) around a place, moved inside the image at its border."""
    height, width = picture.shape[:2]
    side = min(height, width, max(8, round(PATCH_CELLS * place.cell * height)))
    top, left = (
        min(max(0, round(share * length - side / 2)), length - side)
        for share, length in ((place.row, height), (place.column, width))
    )
    return fit(np.ascontiguousarray(picture[top : top + side, left : left + side]), PATCH)


def rule_of(side: SideName, score: float, kept: bool, settings: LpcamSettings) -> str:
    """Why a centre is a prototype or not, in words."""
    if side == "foreground":
        if kept and score > settings.mu_f:
            return f"score {score:.2f} > μ_f {settings.mu_f:g}"
        if kept:
            return f"best score of the class, {score:.2f}; none is above μ_f {settings.mu_f:g}"
        return f"score {score:.2f} is not above μ_f {settings.mu_f:g}"
    lower = settings.context_lower
    if kept:
        between = f"score {score:.2f} < μ_b {settings.mu_b:g}"
        return between if lower is None else f"{between} and above {lower:g}"
    if score >= settings.mu_b:
        return f"score {score:.2f} is not below μ_b {settings.mu_b:g}: it looks like the class"
    return f"score {score:.2g} is not above {lower}: it looks like another class"


def shown_numbers(centers: Centers, index: int, count: int) -> list[int]:
    """Numbers of the centres to show: the largest prototypes, and a third for rejected ones."""
    exists = (centers.sizes[index] > 0).nonzero().flatten().tolist()
    by_size = sorted(exists, key=lambda k: (-int(centers.sizes[index, k]), k))
    kept = [k for k in by_size if centers.keep[index, k]]
    rejected = [k for k in by_size if not centers.keep[index, k]]
    room = min(len(rejected), max(count // 3, count - len(kept)))
    return kept[: count - room] + rejected[:room]


@dataclass(frozen=True)
class Shown:
    """How much of the prototypes a page shows."""

    prototypes: int
    """Of each class and side."""
    patches: int
    """Of each prototype."""

    def within_bounds(self, classes: int) -> Shown:
        """The same, or fewer prototypes where there are many classes."""
        most = MOST_PATCHES // max(1, classes * len(SIDES) * self.patches)
        return Shown(max(1, min(self.prototypes, most)), self.patches)


@torch.inference_mode()
def prototype_records(
    classifier: Classifier,
    prototypes: Prototypes,
    items: Sequence[Item],
    pairs: Pairs,
    settings: LpcamSettings,
    shown: Shown,
    cams: Path,
) -> list[dict[str, Any]]:
    """For each class its prototypes, with the nearest patches of ``items`` and a map of each.

    Foreground prototypes look at the foreground of their class (equation 2), context at the rest.

    Args:
        cams: folder of the CAM maps, which split the images where the settings say so.
    """
    shown = shown.within_bounds(len(prototypes.classes))
    records = []
    for index in range(len(prototypes.classes)):
        own = [item for item in items if index in item.labels]
        numbers = {
            side: shown_numbers(getattr(prototypes, side), index, shown.prototypes)
            for side in SIDES
        }
        centers = torch.cat(
            [getattr(prototypes, side).centers[index][numbers[side]] for side in SIDES]
        )
        places: list[list[Place]] = [[] for _ in range(len(centers))]
        maps: list[Any] = [None] * len(centers)
        ranges: list[Any] = [None] * len(centers)
        example = None
        if own and len(centers):
            weight = classifier.weight[[index]]
            sides_of = [side for side in SIDES for _ in numbers[side]]

            def look(
                item: Item, weight: Tensor = weight, index: int = index, sides: Any = sides_of
            ) -> tuple[str, Tensor, Tensor]:
                features = _features(pairs, item)
                if settings.split_maps == "multi_scale":
                    found = read_maps(map_path(cams, item.id))
                    plane = found.high_res[found.keys.tolist().index(index)]
                    cam = on_grid(torch.from_numpy(plane)[None], features, settings)[0]
                else:
                    cam = single_scale_cam(features, weight, epsilon=settings.cam_epsilon)[0]
                parts = split(cam, settings.tau, inclusive=settings.tau_inclusive)
                own_side = dict(zip(SIDES, parts, strict=True))
                return item.id, features, torch.stack([own_side[side] for side in sides]).cpu()

            grids = (look(item) for item in own)
            places = nearest_places(grids, centers, shown.patches)
            chosen = _example(own, places, len(numbers["foreground"]))
            picture = fit(read_image(chosen.image), PICTURE)
            example = {
                "id": chosen.id,
                "picture": encode_picture(picture),
                "width": picture.shape[1],
                "height": picture.shape[0],
            }
            grid = F.normalize(_features(pairs, chosen).to(centers), dim=0)
            cosines = torch.einsum("kc,chw->khw", F.normalize(centers, dim=1), grid)
            low, high = (edge.tolist() for edge in cosines.flatten(1).aminmax(dim=1))
            ranges = [[round(a, 4), round(b, 4)] for a, b in zip(low, high, strict=True)]
            # Of the range of each, for between the least and the largest lies little.
            maps = [encode_unit(one.cpu().numpy()) for one in normalize(cosines, "minmax")]
        pictures = _patches(own, places)
        sides = {}
        start = 0
        for side in SIDES:
            found: Centers = getattr(prototypes, side)
            rows = []
            for offset, number in enumerate(numbers[side]):
                score, kept = float(found.scores[index, number]), bool(found.keep[index, number])
                row = start + offset
                rows.append(
                    {
                        "number": number,
                        "score": score,
                        "size": int(found.sizes[index, number]),
                        "kept": kept,
                        "rule": rule_of(side, score, kept, settings),
                        "patches": [
                            {
                                "picture": pictures[place],
                                "image": place.image,
                                "cosine": round(place.cosine, 4),
                            }
                            for place in places[row]
                        ],
                        "map": maps[row],
                        "range": ranges[row],
                    }
                )
            start += len(rows)
            sides[side] = {
                "total": int((found.sizes[index] > 0).sum()),
                "kept": int(found.keep[index].sum()),
                "prototypes": rows,
            }
        records.append({"class": index, "example": example, "sides": sides})
    return records


def _features(pairs: Pairs, item: Item) -> Tensor:
    (pair,) = pairs([item], (1.0,))
    return pair.features[0]


def _example(items: Sequence[Item], places: Sequence[Sequence[Place]], foreground: int) -> Item:
    """The image that is nearest to most foreground prototypes; of one class where there is one."""
    counts = dict.fromkeys((item.id for item in items), 0)
    for own in places[:foreground]:
        for place in own:
            counts[place.image] += 1
    return max(items, key=lambda item: (len(item.labels) == 1, counts[item.id]))


def _patches(items: Sequence[Item], places: Sequence[Sequence[Place]]) -> dict[Place, str]:
    """The picture of each place; every image is read once."""
    wanted: dict[str, set[Place]] = {}
    for own in places:
        for place in own:
            wanted.setdefault(place.image, set()).add(place)
    pictures: dict[Place, str] = {}
    for item in items:
        if item.id in wanted:
            picture = read_image(item.image)
            pictures |= {
                place: encode_picture(crop(picture, place)) for place in sorted(wanted[item.id])
            }
    return pictures


# -- Confusing classes -------------------------------------------------------------------------


@torch.inference_mode()
def confusion_records(
    classifier: Classifier,
    prototypes: Prototypes,
    items: Sequence[Item],
    pairs: Pairs,
    settings: LpcamSettings,
    count: int,
) -> list[dict[str, Any]]:
    """Images in which the classifier scores an absent class high, with the maps of both classes.

    One image for each pair of classes, the highest scores of absent classes first (the paper's
    Figure 1).
    """
    best: dict[tuple[int, int], tuple[float, float, Item]] = {}
    for item in items:
        if not item.labels or len(item.labels) == len(prototypes.classes):
            continue
        pooled = _features(pairs, item).mean((-2, -1)).to(classifier.weight)
        scores = (classifier.weight @ pooled).sigmoid().tolist()
        absent = max(
            (k for k in range(len(scores)) if k not in item.labels), key=lambda k: (scores[k], -k)
        )
        present = max(item.labels, key=lambda k: (scores[k], -k))
        key = (present, absent)
        if key not in best or scores[absent] > best[key][1]:
            best[key] = (scores[present], scores[absent], item)
    ordered = sorted(best.items(), key=lambda entry: (-entry[1][1], entry[0]))[:count]
    vectors = prototypes.vectors().to(classifier.weight)
    records = []
    for (present, absent), (score, false_score, item) in ordered:
        picture = read_image(item.image)
        size = picture.shape[0], picture.shape[1]
        both = [present, absent]
        scales = [
            FeaturePair(
                pair.features[0],
                pair.mirrored[0] if settings.flip and pair.mirrored is not None else None,
            )
            for pair in pairs([item], settings.scales)
        ]
        cam = cam_maps(scales, classifier.weight[both], size, epsilon=settings.cam_epsilon)
        lpcam = lpcam_maps(scales, vectors[both], size)
        small = fit(picture, PICTURE)
        records.append(
            {
                "id": item.id,
                "picture": encode_picture(small),
                "width": small.shape[1],
                "height": small.shape[0],
                "present": present,
                "lookalike": absent,
                "scores": [round(score, 4), round(false_score, 4)],
                "maps": {"CAM": _plane(cam), "LPCAM": _plane(lpcam)},
            }
        )
    return records


def _plane(maps: FusedMaps) -> dict[str, Any]:
    return encode_unit(small_planes(maps.cam.cpu().numpy()))
