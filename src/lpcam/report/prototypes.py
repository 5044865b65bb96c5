"""Patches and maps of prototypes, and images in which a classifier confuses two classes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
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
from lpcam.data.images import limit_long_side
from lpcam.data.map_files import map_path, read_maps
from lpcam.data.resize import resize
from lpcam.explain.web import encode_array, encode_picture, encode_unit
from lpcam.method.choices import Choice
from lpcam.method.early import EarlyPrototypes, centred
from lpcam.method.functional import normalize, split
from lpcam.method.multi_scale import cam_maps, lpcam_maps
from lpcam.method.prototypes import Centers, Prototypes
from lpcam.method.reservoir import SIDES, SideName, on_grid, split_maps
from lpcam.method.settings import LpcamSettings
from lpcam.report.images import run_all, small_planes, thumbnail_record
from lpcam.runtime.distributed import Sharing

PATCH = 64  #: Side of a patch in the page, in pixels.
_PATCH_CELLS = 5  # side of a patch in the image, in cells of the feature grid
_MOST_PATCHES = 1600  # in a page (about 2 MB); with many classes fewer prototypes of each are shown
_PREVIEWS = 12  # images of a class whose map follows the choices in the page
_MOST_PREVIEWS = 120  # in a page (about 3 MB)
_PREVIEW = 160  # their long side, in pixels
_EARLY_CENTRES = 3  # shown of each class, side and early layer
_EARLY_IMAGES = 24  # of each class that are searched for the places of early layers
#: An image's name, its features (C, h, w), and where each of M prototypes may lie, bool (M, h, w).
Seen = tuple[str, Tensor, Tensor]
#: A prototype's vector (C,), its side and its card.
Shown = tuple[Tensor, SideName, dict[str, Any]]
#: :meth:`lpcam.classifiers.feature_store.FeatureStore.pairs`.
Pairs = Callable[[Sequence[Item], Sequence[float]], Iterator[FeaturePair]]


class Early(NamedTuple):
    """Prototypes of early layers, and where they read features and maps."""

    prototypes: EarlyPrototypes
    features: Callable[[Sequence[Item]], list[FeaturePair]]  #: Of each layer, as `FeatureStore`.
    maps: Path  #: Folder of the maps LPCAM-E.
    threshold: float  #: Of these maps; places above it are foreground.


class Fitted(NamedTuple):
    """A classifier with its prototypes, and where they read features and maps."""

    classifier: Classifier
    prototypes: Prototypes
    pairs: Pairs
    plain: Pairs  #: The same at scale 1, perhaps without mirror images.
    settings: LpcamSettings
    cams: Path  #: Folder of the CAM maps, which split the images if the settings say so.
    early: Early | None = None

    def features(self, item: Item) -> Tensor:
        """Features (C, h, w) of an image at scale 1."""
        (pair,) = self.plain([item], (1.0,))
        return pair.features[0]


class Place(NamedTuple):
    """A location of an image's feature grid, in shares of the image, and its cosine to a centre."""

    image: str
    row: float
    column: float
    cell: float  #: Height of a cell.
    cosine: float


def nearest_places(
    features: Iterable[tuple[str, Tensor, Tensor]], centers: Tensor, count: int
) -> list[list[Place]]:
    """Nearest locations to each centre (K, C), one in each of the ``count`` nearest images.

    ``features`` has the name of each image, its features (C, h, w), and where each centre is
    searched, bool (K, h, w).
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
    """The square patch around a place, at most PATCH wide, moved inside the image at its border."""
    height, width = picture.shape[:2]
    side = min(height, width, max(8, round(_PATCH_CELLS * place.cell * height)))
    top, left = (
        min(max(0, round(share * length - side / 2)), length - side)
        for share, length in ((place.row, height), (place.column, width))
    )
    patch = picture[top : top + side, left : left + side]
    return limit_long_side(np.ascontiguousarray(patch), PATCH)


def rule_of(
    side: SideName,
    score: float,
    kept: bool,
    settings: LpcamSettings,
    choice: Choice | None = None,
) -> str:
    """Text that says why a centre was kept as a prototype or rejected."""
    if choice is not None and choice.action is not None:
        return f"score {score:.2f}, {choice.told}"
    mu_f, mu_b, lower = settings.mu_f, settings.mu_b, settings.context_lower
    if side == "foreground":
        if not kept:
            return f"score {score:.2f} is not above μ_f {mu_f:g}"
        best = f"best score of the class, {score:.2f}; none is above μ_f {mu_f:g}"
        return f"score {score:.2f} > μ_f {mu_f:g}" if score > mu_f else best
    if kept:
        return f"score {score:.2f} < μ_b {mu_b:g}" + (
            "" if lower is None else f" and above {lower:g}"
        )
    if score >= mu_b:
        return f"score {score:.2f} is not below μ_b {mu_b:g}: it looks like the class"
    return f"score {score:.2g} is not above {lower}: it looks like another class"


def shown_numbers(centers: Centers, index: int, count: int) -> list[int]:
    """Numbers of the centres to show: the largest prototypes, and a third for rejected ones."""
    sizes, keep = centers.sizes[index].tolist(), centers.keep[index].tolist()
    by_size = sorted((k for k, size in enumerate(sizes) if size), key=lambda k: (-sizes[k], k))
    kept, rejected = [k for k in by_size if keep[k]], [k for k in by_size if not keep[k]]
    room = min(len(rejected), max(count // 3, count - len(kept)))
    return kept[: count - room] + rejected[:room]


def prototype_records(
    fitted: Fitted, items: Sequence[Item], sharing: Sharing, *, count: int, patches: int
) -> list[dict[str, Any]]:
    """The prototypes of each class, each with its nearest patches in ``items`` and a map.

    Foreground prototypes are searched in the foreground of their class (equation 2), context
    prototypes in the rest. ``count`` is for each class and side; of many classes fewer are shown.
    """
    classes = fitted.prototypes.classes
    chosen = {one.place: one for one in fitted.prototypes.choices}
    count = max(1, min(count, _MOST_PATCHES // (len(classes) * len(SIDES) * patches)))
    images = max(1, min(_PREVIEWS, _MOST_PREVIEWS // len(classes)))
    both: dict[SideName, Centers] = {side: getattr(fitted.prototypes, side) for side in SIDES}

    @torch.inference_mode()
    def record(index: int) -> dict[str, Any]:
        own = [item for item in items if index in item.labels]
        sides: dict[str, dict[str, Any]] = {}
        shown: list[Shown] = []
        for side, of in both.items():
            total, kept = int((of.sizes[index] > 0).sum()), int(of.keep[index].sum())
            cards: list[dict[str, Any]] = []
            for number in shown_numbers(of, index, count):
                score, keep = of.scores[index, number].item(), bool(of.keep[index, number])
                choice = chosen.get((classes[index], side, number))
                words = [rule_of(side, score, keep, fitted.settings, choice)]
                rule = ", ".join([*words, *filter(None, [of.fire_text(index, number)])])
                size = int(of.sizes[index, number])
                card = {"number": number, "score": score, "size": size, "kept": keep, "rule": rule}
                card["moved"] = choice is not None and choice.action == "context"
                cards.append(card | {"patches": [], "map": None, "range": None})
                shown.append((of.centers[index, number], side, cards[-1]))
            sides[side] = {"total": total, "kept": kept, "prototypes": cards}
        example = None
        if own and shown:
            look = partial(
                _where_to_look, fitted, index=index, sides=[side for _, side, _ in shown]
            )
            item = _add_nearest(look, own, shown, patches)
            example = {"id": item.id, **thumbnail_record(item.read())}
            if fitted.early is not None:
                sides |= _early_sides(fitted.early, own, index, item, patches)
        previews = [_preview(fitted, item, index, shown) for item in own[:images] if shown]
        counts = [len(fitted.prototypes.members(index, side)) for side in SIDES]
        found = {"class": index, "example": example, "sides": sides}
        return {**found, "counts": counts, "previews": previews}

    return run_all(sharing, record, range(len(classes)), "report: prototypes")


def _preview(fitted: Fitted, item: Item, index: int, shown: Sequence[Shown]) -> dict[str, Any]:
    """An image, and what the page makes its map of a class at scale 1 of as choices change.

    These are the mean cosine to the prototypes of each side, and the cosine to each that is shown,
    as shares of the range from -1 to 1.
    """
    features = F.normalize(fitted.features(item).float(), dim=0)
    rows = [fitted.prototypes.rows(index, side)[0] for side in SIDES]
    rows.append(torch.stack([vector for vector, _, _ in shown]))
    units = [F.normalize(one.to(features), dim=1) for one in rows]
    means, cosines = torch.stack([one.sum(0) / max(1, len(one)) for one in units[:2]]), units[2]
    whole = torch.einsum("kc,chw->khw", torch.cat([means, cosines]), features)
    planes = (small_planes(whole.cpu().numpy()).clip(-1, 1) + 1) / 2
    return {
        "id": item.id,
        **thumbnail_record(item.read(), _PREVIEW),
        "means": encode_array(np.rint(65535 * planes[:2]).astype(np.uint16)),
        "cosines": encode_unit(planes[2:]),
    }


def _early_sides(
    early: Early, items: Sequence[Item], index: int, example: Item, patches: int
) -> dict[str, dict[str, Any]]:
    """Prototypes of the early layers of a class by side, those with the most places first."""
    found, items = early.prototypes, items[:: -(-len(items) // _EARLY_IMAGES)]
    shared = len(found.classes) * len(SIDES) * len(found.layers) * patches
    count = min(_EARLY_CENTRES, _MOST_PATCHES // shared)
    # read once, because not all features may be kept
    kept = {
        item.id: [pair.features[0].half().cpu() for pair in early.features([item])]
        for item in (*items, example)
    }

    def look(item: Item, *, layer: int, wanted: Sequence[SideName]) -> Seen:
        features = centred(kept[item.id][layer].float(), found.means[layer])
        stored = read_maps(map_path(early.maps, item.id))
        above = resize(torch.from_numpy(stored.cam), features.shape[-2:]) > early.threshold
        own, rest = above[stored.keys.tolist().index(index)], ~above.any(0)
        where = torch.stack([own if side == "foreground" else rest for side in wanted])
        return item.id, features, where

    sides: dict[str, dict[str, Any]] = {}
    for layer, name in enumerate(found.layers):
        shown: list[Shown] = []
        for side in SIDES:
            part = sides.setdefault(f"early {side}", {"total": 0, "kept": None, "prototypes": []})
            centers = getattr(found, side)[layer][index]
            centers = centers[centers.any(1)]
            part["total"] += len(centers)
            counts = torch.zeros(len(centers))
            for item in items if len(centers) else ():
                _, features, (inside,) = look(item, layer=layer, wanted=[side])
                nearest = (centers @ features[:, inside]).argmax(0)
                counts += torch.bincount(nearest, minlength=len(centers))
            for number in counts.argsort(descending=True, stable=True)[:count].tolist():
                rule = f"nearest to {counts[number] / counts.sum().clamp_min(1):.0%} of the places"
                card = {"number": f"{number} of {name}", "score": None, "kept": True, "rule": rule}
                part["prototypes"].append(card)
                shown.append((centers[number], side, card))
        if shown:
            every = partial(look, layer=layer, wanted=[side for _, side, _ in shown])
            _add_nearest(every, items, shown, patches, example)
    return sides


def _add_nearest(
    look: Callable[[Item], Seen],
    items: Sequence[Item],
    shown: Sequence[Shown],
    patches: int,
    example: Item | None = None,
) -> Item:
    """Add patches and map of each prototype of a class; returns the example image of the maps."""
    vectors, sides, cards = zip(*shown, strict=True)
    centers = torch.stack(vectors)
    places = nearest_places(map(look, items), centers, patches)
    foreground = places[: sides.count("foreground")]
    counts = Counter(place.image for near in foreground for place in near)
    # the image named most often; one with a single label if there is any
    chosen = example or max(items, key=lambda one: (len(one.labels) == 1, counts[one.id]))
    grid = F.normalize(look(chosen)[1].to(centers), dim=0)
    cosines = torch.einsum("kc,chw->khw", F.normalize(centers, dim=1), grid)
    # each map has its own range, because all values are close together
    scaled = small_planes(normalize(cosines, "minmax").cpu().numpy())
    pictures: dict[Place, str] = {}
    for item in items:
        here = [place for near in places for place in near if place.image == item.id]
        if here:
            picture = item.read()
            pictures |= {place: encode_picture(crop(picture, place)) for place in here}
    for row, (near, card) in enumerate(zip(places, cards, strict=True)):
        card["patches"] = [
            {"picture": pictures[p], "image": p.image, "cosine": round(p.cosine, 4)} for p in near
        ]
        card["map"] = encode_unit(scaled[row])
        card["range"] = [round(edge.item(), 4) for edge in cosines[row].aminmax()]
    return chosen


def _where_to_look(fitted: Fitted, item: Item, *, index: int, sides: Sequence[SideName]) -> Seen:
    """What is seen of an image by prototypes of some sides."""
    features, settings = fitted.features(item), fitted.settings
    path, weight = map_path(fitted.cams, item.id), fitted.classifier.weight
    cam = on_grid(split_maps(features, [index], weight, path, settings), features, settings)[0]
    parts = split(cam, settings.tau, inclusive=settings.tau_inclusive)
    by_side = dict(zip(SIDES, parts, strict=True))
    return item.id, features, torch.stack([by_side[side] for side in sides]).cpu()


def confusion_records(
    fitted: Fitted, items: Sequence[Item], sharing: Sharing, count: int
) -> list[dict[str, Any]]:
    """Images in which the classifier scores an absent class high, with maps of both classes.

    One image for each of at most ``count`` pairs of classes, the highest scores first (Figure 1).
    """
    weight, settings = fitted.classifier.weight, fitted.settings
    vectors = fitted.prototypes.vectors().to(weight)

    @torch.inference_mode()
    def scores(item: Item) -> list[float]:
        pooled = fitted.features(item).mean((-2, -1)).to(weight)
        return (weight @ pooled).sigmoid().tolist()

    every = run_all(sharing, scores, items, "report: features")
    best: dict[tuple[int, int], tuple[float, float, Item]] = {}
    for item, own in zip(items, every, strict=True):
        others = [k for k in range(len(weight)) if k not in item.labels]
        if not item.labels or not others:
            continue
        present, absent = (max(of, key=lambda k: (own[k], -k)) for of in (item.labels, others))
        if own[absent] > best.get((present, absent), (0.0, -1.0))[1]:
            best[present, absent] = (own[present], own[absent], item)

    @torch.inference_mode()
    def record(found: tuple[tuple[int, int], tuple[float, float, Item]]) -> dict[str, Any]:
        (present, absent), (*both, item) = found
        picture, rows = item.read(), [present, absent]
        pairs = list(fitted.pairs([item], settings.scales))
        size = picture.shape[0], picture.shape[1]
        maps = {
            "CAM": cam_maps(pairs, weight[rows], size, epsilon=settings.cam_epsilon),
            "LPCAM": lpcam_maps(pairs, vectors[rows], size),
        }
        return {
            "id": item.id,
            **thumbnail_record(picture),
            "present": present,
            "lookalike": absent,
            "scores": [round(score, 4) for score in both],
            "maps": {
                name: encode_unit(small_planes(one.cam[0].cpu().numpy()))
                for name, one in maps.items()
            },
        }

    ranked = sorted(best.items(), key=lambda entry: (-entry[1][1], entry[0]))
    return run_all(sharing, record, ranked[:count], "report: confused classes")
