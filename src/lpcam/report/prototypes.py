"""Patches and maps of prototypes, and images in which a classifier confuses two classes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lpcam.classifiers.classifier import Classifier
from lpcam.classifiers.features import FeaturePair
from lpcam.data.dataset import Item
from lpcam.data.images import limit_long_side, read_image
from lpcam.data.map_files import map_path, read_maps
from lpcam.explain.web import encode_picture, encode_unit
from lpcam.method.functional import normalize, split
from lpcam.method.multi_scale import cam_maps, lpcam_maps, single_scale_cam
from lpcam.method.prototypes import Centers, Prototypes
from lpcam.method.reservoir import SIDES, SideName, on_grid
from lpcam.method.settings import LpcamSettings
from lpcam.report.images import small_planes, thumbnail_record

PATCH = 64
"""Side of a patch in the page, in pixels."""
PATCH_CELLS = 5
"""Side of a patch in the image, in cells of the feature grid."""
MOST_PATCHES = 1600
"""Patches in a page (about 2 MB); with many classes fewer prototypes of each are shown."""
Pairs = Callable[[Sequence[Item], Sequence[float]], Iterator[FeaturePair]]
"""Features of images of equal size at each scale:
:meth:`lpcam.classifiers.feature_store.FeatureStore.pairs`."""


class Fitted(NamedTuple):
    """A classifier with its prototypes, and where they read features and maps."""

    classifier: Classifier
    prototypes: Prototypes
    pairs: Pairs
    settings: LpcamSettings
    cams: Path
    """Folder of the CAM maps, which split the images if the settings say so."""

    def features(self, item: Item) -> Tensor:
        """Features (C, h, w) of an image at scale 1."""
        (pair,) = self.pairs([item], (1.0,))
        return pair.features[0]


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
    """For each centre (K, C) the nearest location in each of the ``count`` nearest images.

    Args:
        features: name of each image, features (C, h, w), and locations where each centre is
            searched, bool (K, h, w). An image without such a location is left out.

    Example:
        >>> grid = torch.tensor([[[3.0, 1.0]], [[0.0, 1.0]]])
        >>> anywhere = torch.ones(1, 1, 2, dtype=torch.bool)
        >>> ((place,),) = nearest_places(iter([("a", grid, anywhere)]), torch.eye(2)[:1], 1)
        >>> place.column, place.cosine
        (0.25, 1.0)
    """
    unit = F.normalize(centers, dim=1)
    found: list[list[Place]] = [[] for _ in range(len(centers))]
    for name, grid, where_to_look in features:
        height, width = grid.shape[-2:]
        cosines = unit @ F.normalize(grid.flatten(1).to(unit), dim=0)
        cosines[~where_to_look.flatten(1)] = -torch.inf
        best, where = cosines.max(dim=1)
        for places, cosine, at in zip(found, best.tolist(), where.tolist(), strict=True):
            row, column = (at // width + 0.5) / height, (at % width + 0.5) / width
            if cosine != -math.inf:
                places.append(Place(name, row, column, 1 / height, cosine))
    return [sorted(places, key=lambda p: (-p.cosine, p.image))[:count] for places in found]


def crop(picture: NDArray[np.uint8], place: Place) -> NDArray[np.uint8]:
    """The square patch (PATCH, PATCH, 3) around a place, moved inside the image at its border.

    Example:
        >>> crop(np.zeros((400, 600, 3), np.uint8), Place("a", 0.5, 0.5, 0.1, 1.0)).shape
        (64, 64, 3)
    """
    height, width = picture.shape[:2]
    side = min(height, width, max(8, round(PATCH_CELLS * place.cell * height)))
    top, left = (
        min(max(0, round(share * length - side / 2)), length - side)
        for share, length in ((place.row, height), (place.column, width))
    )
    return limit_long_side(
        np.ascontiguousarray(picture[top : top + side, left : left + side]), PATCH
    )


def rule_of(side: SideName, score: float, kept: bool, settings: LpcamSettings) -> str:
    """Why a centre was kept as a prototype or rejected, in words.

    Example:
        >>> rule_of("foreground", 0.95, True, LpcamSettings.from_preset("small", mu_f=0.9))
        'score 0.95 > μ_f 0.9'
    """
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
    """Numbers of the centres to show: the largest prototypes, and a third for rejected ones.

    Example:
        >>> keep = torch.tensor([[True, False, True]])
        >>> one = Centers(torch.ones(1, 3, 2), torch.ones(1, 3), torch.tensor([[5, 7, 9]]), keep)
        >>> shown_numbers(one, 0, 3)
        [2, 0, 1]
    """
    exists = (centers.sizes[index] > 0).nonzero().flatten().tolist()
    by_size = sorted(exists, key=lambda k: (-int(centers.sizes[index, k]), k))
    kept = [k for k in by_size if centers.keep[index, k]]
    rejected = [k for k in by_size if not centers.keep[index, k]]
    room = min(len(rejected), max(count // 3, count - len(kept)))
    return kept[: count - room] + rejected[:room]


@torch.inference_mode()
def prototype_records(
    fitted: Fitted, items: Sequence[Item], *, count: int, patches: int
) -> list[dict[str, Any]]:
    """The prototypes of each class, each with its nearest patches in ``items`` and a map.

    Foreground prototypes are searched in the foreground of their class (equation 2), context
    prototypes in the rest.

    Args:
        count: prototypes of each class and side, fewer if there are many classes.
        patches: nearest patches of each prototype.
    """
    prototypes = fitted.prototypes
    most = MOST_PATCHES // max(1, len(prototypes.classes) * len(SIDES) * patches)
    count = max(1, min(count, most))
    records = []
    for index in range(len(prototypes.classes)):
        own = [item for item in items if index in item.labels]
        shown = [
            (side, number)
            for side in SIDES
            for number in shown_numbers(getattr(prototypes, side), index, count)
        ]
        found: list[dict[str, Any]] = [{"patches": [], "map": None, "range": None} for _ in shown]
        example = None
        if own and shown:
            example, found = _nearest(fitted, own, index, shown, patches)
        sides = {}
        for side in SIDES:
            of_side: Centers = getattr(prototypes, side)
            sides[side] = {
                "total": int((of_side.sizes[index] > 0).sum()),
                "kept": int(of_side.keep[index].sum()),
                "prototypes": [
                    {**_describe(of_side, side, index, number, fitted.settings), **one}
                    for (own_side, number), one in zip(shown, found, strict=True)
                    if own_side == side
                ],
            }
        records.append({"class": index, "example": example, "sides": sides})
    return records


def _nearest(
    fitted: Fitted,
    items: Sequence[Item],
    index: int,
    shown: Sequence[tuple[SideName, int]],
    patches: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An example image of a class, and patches and map of each of its prototypes that is shown."""
    centers = torch.stack(
        [getattr(fitted.prototypes, side).centers[index][number] for side, number in shown]
    )
    sides = [side for side, _ in shown]
    grids = (_where_to_look(fitted, item, index, sides) for item in items)
    places = nearest_places(grids, centers, patches)
    foreground = places[: sides.count("foreground")]
    counts = Counter(place.image for near in foreground for place in near)
    # the image named most often; one with a single label if there is any
    chosen = max(items, key=lambda item: (len(item.labels) == 1, counts[item.id]))
    grid = F.normalize(fitted.features(chosen).to(centers), dim=0)
    cosines = torch.einsum("kc,chw->khw", F.normalize(centers, dim=1), grid)
    # each map has its own range, because all values are close together
    scaled = normalize(cosines, "minmax").cpu().numpy()
    pictures = _patches(items, places)
    found = [
        {
            "patches": [
                {"picture": pictures[p], "image": p.image, "cosine": round(p.cosine, 4)}
                for p in near
            ],
            "map": encode_unit(scaled[row]),
            "range": [round(edge.item(), 4) for edge in cosines[row].aminmax()],
        }
        for row, near in enumerate(places)
    ]
    return {"id": chosen.id, **thumbnail_record(read_image(chosen.image))}, found


def _describe(
    centers: Centers, side: SideName, index: int, number: int, settings: LpcamSettings
) -> dict[str, Any]:
    score, kept = float(centers.scores[index, number]), bool(centers.keep[index, number])
    return {
        "number": number,
        "score": score,
        "size": int(centers.sizes[index, number]),
        "kept": kept,
        "rule": rule_of(side, score, kept, settings),
    }


def _where_to_look(
    fitted: Fitted, item: Item, index: int, sides: Sequence[SideName]
) -> tuple[str, Tensor, Tensor]:
    """An image's name, its features (C, h, w), and where a prototype of each side may lie."""
    features, settings = fitted.features(item), fitted.settings
    if settings.split_maps == "multi_scale":
        stored = read_maps(map_path(fitted.cams, item.id))
        plane = stored.high_res[stored.keys.tolist().index(index)]
        cam = on_grid(torch.from_numpy(plane)[None], features, settings)[0]
    else:
        weight = fitted.classifier.weight[[index]]
        cam = single_scale_cam(features, weight, epsilon=settings.cam_epsilon)[0]
    parts = split(cam, settings.tau, inclusive=settings.tau_inclusive)
    by_side = dict(zip(SIDES, parts, strict=True))
    return item.id, features, torch.stack([by_side[side] for side in sides]).cpu()


def _patches(items: Sequence[Item], places: Sequence[Sequence[Place]]) -> dict[Place, str]:
    """The picture of each place; every image is read once."""
    wanted = {place for own in places for place in own}
    pictures: dict[Place, str] = {}
    for item in items:
        here = [place for place in wanted if place.image == item.id]
        if here:
            picture = read_image(item.image)
            pictures |= {place: encode_picture(crop(picture, place)) for place in here}
    return pictures


@torch.inference_mode()
def confusion_records(fitted: Fitted, items: Sequence[Item], count: int) -> list[dict[str, Any]]:
    """Images in which the classifier scores an absent class high, with maps of both classes.

    One image for each of at most ``count`` pairs of classes, the highest scores first (Figure 1).
    """
    weight, settings = fitted.classifier.weight, fitted.settings
    best: dict[tuple[int, int], tuple[float, float, Item]] = {}
    for item in items:
        if not item.labels or len(item.labels) == len(fitted.prototypes.classes):
            continue
        pooled = fitted.features(item).mean((-2, -1)).to(weight)
        scores = (weight @ pooled).sigmoid().tolist()
        absent = max(
            (k for k in range(len(scores)) if k not in item.labels), key=lambda k: (scores[k], -k)
        )
        present = max(item.labels, key=lambda k: (scores[k], -k))
        key = (present, absent)
        if key not in best or scores[absent] > best[key][1]:
            best[key] = (scores[present], scores[absent], item)
    ordered = sorted(best.items(), key=lambda entry: (-entry[1][1], entry[0]))[:count]
    vectors = fitted.prototypes.vectors().to(weight)
    records = []
    for both, (score, false_score, item) in ordered:
        picture = read_image(item.image)
        size = picture.shape[0], picture.shape[1]
        scales = [
            FeaturePair(
                p.features[0], p.mirrored[0] if settings.flip and p.mirrored is not None else None
            )
            for p in fitted.pairs([item], settings.scales)
        ]
        cam = cam_maps(scales, weight[list(both)], size, epsilon=settings.cam_epsilon)
        lpcam = lpcam_maps(scales, vectors[list(both)], size)
        records.append(
            {
                "id": item.id,
                **thumbnail_record(picture),
                "present": both[0],
                "lookalike": both[1],
                "scores": [round(score, 4), round(false_score, 4)],
                "maps": {
                    name: encode_unit(small_planes(maps.cam.cpu().numpy()))
                    for name, maps in (("CAM", cam), ("LPCAM", lpcam))
                },
            }
        )
    return records
