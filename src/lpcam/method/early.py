"""LPCAM-E: maps sharpened by prototypes of the backbone's early layers, in rounds.

An early layer is sharp and local, but knows nothing of classes. A map of the last layer tells it
where to look: its places are split by that map and clustered; how much nearer a place is to a
class's foreground centres than to its context centres is the layer's own, sharper map, by which the
next round splits. See docs/adaptive.md. Shapes: K classes of an image, C channels, h x w the grid
of a layer, H x W the size of the maps, M centres.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.classifiers.features import FeaturePair
from lpcam.data.resize import resize
from lpcam.method.clustering import CosineKMeans
from lpcam.method.functional import normalize, unflip, unit
from lpcam.method.reservoir import SIDES, drawn
from lpcam.method.settings import EarlySettings
from lpcam.runtime.errors import ArtefactError, PrototypeError
from lpcam.runtime.files import read_tensors, write_tensors
from lpcam.runtime.parallel import ordered_map

Base = Literal["CAM", "LPCAM"]
Fusion = Literal["none", "fused", "alone"]
IMAGES_PER_CLASS = 25  #: Least number of images of each class that are fitted, if there are.
ITERATIONS = 12  #: Of k-means; more change nothing.
MEMORY = 2**31  #: Bytes of features that are kept of the images of a loader.
NONE = -2.0  #: Cosine of a missing centre, below every other.
SMALLEST = 1e-6  #: Lower bound of a standard deviation that a map is divided by.


def evidence(features: Tensor, foreground: Tensor, context: Tensor, nearest: int) -> Tensor:
    """How much nearer each place is to a class's foreground centres than to its context centres.

    Args:
        features: (..., C, h, w), of unit length (:func:`centred`).
        foreground, context: (K, M, C), of unit length; rows of zeros are missing centres.
        nearest: number of largest cosines that are averaged on each side.

    Returns:
        (..., K, h, w) in [-2, 2]: the mean of the largest cosines to foreground centres, minus
        that of context centres, which is 0 for a class without any.

    Example:
        >>> places = torch.eye(2)[:, None, :]
        >>> evidence(places, torch.eye(2)[None, :1], torch.eye(2)[None, 1:], 1).tolist()
        [[[1.0, -1.0]]]
    """
    flat, sides = features.flatten(-2), []
    for centers in (foreground, context):
        cosines = centers.flatten(0, 1) @ flat
        cosines = cosines.reshape(*flat.shape[:-2], *centers.shape[:2], flat.shape[-1])
        there = centers.square().sum(-1)[..., None] > 0
        top = _largest(torch.where(there, cosines, NONE), min(nearest, centers.shape[1]))
        counts = top > (NONE - 1) / 2
        mean = torch.where(counts, top, 0).sum(-2) / counts.sum(-2).clamp_min(1)
        sides.append(mean)
    found: Tensor = sides[0] - sides[1]
    return found.reshape(*found.shape[:-1], *features.shape[-2:])


def _largest(values: Tensor, count: int) -> Tensor:
    """The ``count`` largest of values (..., M, P) over M, in any order."""
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    exported = torch.compiler.is_compiling() or traced or values.requires_grad
    if exported or values.device.type != "cpu" or values.dtype.itemsize < torch.float32.itemsize:
        return values.topk(count, dim=-2).values
    # NumPy selects five times faster on a CPU
    return torch.from_numpy(np.partition(values.numpy(), -count, axis=-2)[..., -count:, :])


def centred(features: Tensor, mean: Tensor) -> Tensor:
    """Features (..., C, h, w) minus a mean (C,), of unit length over C."""
    return unit(features - mean[:, None, None].to(features), dim=-3)


def standardised(maps: Tensor) -> Tensor:
    """Maps (..., h, w), each divided by its standard deviation over the places."""
    deviation = maps.std((-2, -1), keepdim=True, unbiased=False)
    return maps / deviation.clamp_min(SMALLEST)


def fuse(base: Tensor, combined: Tensor, fusion: Fusion) -> Tensor:
    """Maps (K, H, W) in [0, 1] of a base in [0, 1] and the combined evidence of all layers.

    ``fused``: base times sigmoid of the standardised evidence; ``alone``: ReLU of the evidence;
    ``none``: the base. Each map is divided by its maximum. A class without a base has no map; one
    without positive evidence anywhere is fused, so that no class vanishes from its image.

    Example:
        >>> combined = torch.tensor([[[-1.0, 1.0]]])
        >>> fuse(torch.ones(1, 1, 2), combined, "alone").tolist()
        [[[0.0, 1.0]]]
    """
    if fusion == "none":
        return base
    fused = normalize(base * standardised(combined).sigmoid())
    if fusion == "fused":
        return fused
    there = (base.amax((-2, -1), keepdim=True) > 0) & (combined.amax((-2, -1), keepdim=True) > 0)
    return torch.where(there, normalize(combined.relu()), fused)


class EarlyImage(NamedTuple):
    """What is kept of an image to fit and to judge."""

    classes: Sequence[int]
    layers: Sequence[Tensor]  #: (C, h, w) features of each early layer at scale 1.
    bases: Mapping[Base, Tensor]  #: (K, H, W) maps in [0, 1]; their size may be a fraction.
    colours: Tensor  #: (H, W) int64, the colour bin of each pixel; empty if nothing is judged.


@dataclass(frozen=True)
class EarlyPrototypes:
    """Centres of early layers of every class, and how maps are made from them."""

    classes: tuple[str, ...]
    layers: tuple[str, ...]  #: Names of the layers in the backbone.
    means: tuple[Tensor, ...]  #: (C,) of each layer.
    foreground: tuple[Tensor, ...]  #: (N, M, C) unit centres of each layer; zeros are missing.
    context: tuple[Tensor, ...]  #: (N, M, C), as ``foreground``.
    nearest: int
    base: Base = "LPCAM"
    fusion: Fusion = "fused"
    fingerprint: str = ""  #: Fingerprint of the classifier.
    made_by: Mapping[str, Any] | None = None

    def combined(
        self, layers: Sequence[FeaturePair], classes: Sequence[int], size: tuple[int, int]
    ) -> Tensor:
        """Evidence (K, H, W) of all layers: each is standardised at the size (H, W), then summed.

        ``layers`` are the features (C, h, w) of one image and of its mirror image in each layer.
        """
        rows, found = list(classes), []
        for (features, mirrored), mean, foreground, context in zip(
            layers, self.means, self.foreground, self.context, strict=True
        ):
            views = [features] if mirrored is None else [features, mirrored]
            sides = foreground[rows].to(features), context[rows].to(features)
            z = [evidence(centred(view, mean), *sides, self.nearest) for view in views]
            of_image = z[0] if mirrored is None else (z[0] + unflip(z[1])) / 2
            found.append(standardised(resize(of_image, size)))
        return sum(found[1:], found[0])

    def maps(self, base: Tensor, layers: Sequence[FeaturePair], classes: Sequence[int]) -> Tensor:
        """Maps (K, H, W) in [0, 1] of one image from base maps of its K classes."""
        if self.fusion == "none" or not len(base):
            return base
        size = base.shape[-2], base.shape[-1]
        return fuse(base, self.combined(layers, classes, size).to(base), self.fusion)

    def tensors(self) -> dict[str, Tensor]:
        """The centres by name, for a file."""
        parts = {"mean": self.means, "foreground": self.foreground, "context": self.context}
        return {f"early.{k}.{i}": t for k, own in parts.items() for i, t in enumerate(own)}

    def described(self) -> dict[str, Any]:
        """Everything but the centres, as JSON."""
        names = ("classes", "layers", "nearest", "base", "fusion", "fingerprint", "made_by")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def of_file(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        """What :meth:`tensors` and :meth:`described` gave."""
        places = range(len(metadata["layers"]))
        parts = [tuple(tensors[f"early.{k}.{i}"] for i in places) for k in ("mean", *SIDES)]
        values = {**metadata, "classes": tuple(metadata["classes"])}
        means, foreground, context = parts
        values |= {"layers": tuple(metadata["layers"])}
        return cls(means=means, foreground=foreground, context=context, **values)

    def save(self, path: Path) -> None:
        """Write a safetensors file atomically."""
        write_tensors(path, self.tensors(), {"kind": "early prototypes", **self.described()})

    @classmethod
    def load(cls, path: Path, *, fingerprint: str) -> Self:
        """Read what :meth:`save` wrote; ArtefactError, or PrototypeError of another classifier."""
        tensors, metadata = read_tensors(path)
        if metadata.pop("kind", None) != "early prototypes":
            raise ArtefactError(f"{path} holds no early prototypes; run the stage 'early' again")
        found = cls.of_file(tensors, metadata)
        found.check_fingerprint(fingerprint, str(path))
        return found

    def check_fingerprint(self, fingerprint: str, where: str) -> None:
        """Raise PrototypeError if they are of another classifier than that of a place."""
        if self.fingerprint != fingerprint:
            raise PrototypeError(
                f"the early prototypes of {where} are of the classifier {self.fingerprint}, but "
                f"this one is {fingerprint}; fit them again, or load the other classifier"
            )


def early_images(
    batches: Iterable[tuple[Tensor, list[list[int]]]],
    see: Callable[[Tensor, list[list[int]]], tuple[list[Tensor], list[FeaturePair]]],
    counts: Mapping[int, int],
    settings: EarlySettings,
    seed: int,
    base: Base,
    dtype: torch.dtype,
) -> list[EarlyImage]:
    """Some images of batches of images and labels, drawn so that each class has as many.

    ``see`` gives base maps of images and features of early layers; ``counts`` says how many images
    have each class. Rather fewer are kept than would take more than `MEMORY`.
    """
    share = max(settings.images / max(1, len(counts)), IMAGES_PER_CLASS)
    kept: list[EarlyImage] = []
    number, room, most = 0, MEMORY, torch.finfo(dtype).max
    for images, labels in batches:
        taken = []
        for place, own in enumerate(labels, start=number):
            rarest = min((counts.get(index, 0) for index in own), default=math.inf)
            if float(torch.rand((), generator=drawn(f"{seed}/{place}"))) * rarest < share:
                taken.append(place - number)
        number += len(labels)
        if not taken or room < 0:
            continue
        chosen = [labels[place] for place in taken]
        maps, layers = see(images[taken], chosen)
        for place, (classes, of_image) in enumerate(zip(chosen, maps, strict=True)):
            features = [p.features[place].clamp(-most, most).to(dtype).cpu() for p in layers]
            # pooled as it will be; nothing is judged, so colours are not kept
            grid = features[0].shape[-2], features[0].shape[-1]
            small = F.adaptive_avg_pool2d(of_image.float(), grid).cpu()
            kept.append(EarlyImage(classes, features, {base: small}, torch.empty(0)))
            room -= sum(one.nbytes for one in (*features, small))
    return kept


def mean_features(images: Iterable[EarlyImage]) -> tuple[Tensor, ...]:
    """Mean (C,) of each layer over all places of all images, float32."""
    sums: list[Tensor] = []
    count: list[int] = []
    for image in images:
        for place, features in enumerate(image.layers):
            total = features.double().sum((-2, -1))
            if place == len(sums):
                sums.append(torch.zeros_like(total))
                count.append(0)
            sums[place] += total
            count[place] += features[0].numel()
    return tuple((s / n).float() for s, n in zip(sums, count, strict=True))


def fit_early(
    images: Sequence[EarlyImage],
    classes: Sequence[str],
    layers: Sequence[str],
    settings: EarlySettings,
    *,
    seed: int,
    base: Base,
    fingerprint: str = "",
    workers: int = 1,
) -> list[EarlyPrototypes]:
    """The prototypes of each round, the first split by the base maps (docs/adaptive.md).

    The result does not depend on the number of ``workers``. Raises PrototypeError if no image has
    a map.
    """
    if not any(len(image.classes) for image in images):
        raise PrototypeError("no image has a label, so early layers have nothing to learn from")
    means = mean_features(images)
    rounds: list[EarlyPrototypes] = []
    for number in range(1, settings.rounds + 1):
        before = rounds[-1] if rounds else None

        def sample(pair: tuple[int, EarlyImage], before: Any = before, number: int = number) -> Any:
            key = f"{seed}/{number}/{pair[0]}"
            return _sample(pair[1], before, means, settings, base, key)

        found = list(ordered_map(sample, list(enumerate(images)), workers))
        rows: dict[tuple[int, int, int], list[Tensor]] = {}
        for one in found:
            for place, values in one:
                rows.setdefault(place, []).append(values)
        clustered = _cluster(rows, settings, seed + number, workers)
        shape = len(classes), settings.clusters
        centers = [[torch.zeros(*shape, len(mean)) for mean in means] for _ in SIDES]
        for (index, side, layer), part in clustered.items():
            centers[side][layer][index, : len(part)] = part
        rounds.append(
            EarlyPrototypes(
                tuple(classes),
                tuple(layers),
                means,
                foreground=tuple(centers[0]),
                context=tuple(centers[1]),
                nearest=settings.nearest,
                base=base,
                fingerprint=fingerprint,
                made_by={"settings": settings.model_dump(mode="json"), "round": number},
            )
        )
    return rounds


def _sample(
    image: EarlyImage,
    before: EarlyPrototypes | None,
    means: Sequence[Tensor],
    settings: EarlySettings,
    base: Base,
    key: str,
) -> list[tuple[tuple[int, int, int], Tensor]]:
    """Rows (n, C) of each class, side and layer that one image gives to a round."""
    if not len(image.classes) or not image.layers:
        return []
    layers = [FeaturePair(one.float(), None) for one in image.layers]
    grid = layers[0].features.shape[-2], layers[0].features.shape[-1]
    guide = F.adaptive_avg_pool2d(image.bases[base].float(), grid)
    if before is not None:
        combined = standardised(before.combined(layers, image.classes, grid))
        guide = normalize(guide * combined.sigmoid().sqrt())
    flat = guide.flatten(1)
    order = torch.randperm(flat.shape[1], generator=drawn(key))
    outside = flat.amax(0)[order] < settings.context
    found = []
    unit_features = [
        resize(centred(one.features, mean), grid).flatten(1)
        for one, mean in zip(layers, means, strict=True)
    ]
    for row, index in enumerate(image.classes):
        top = flat[row].max()
        inside = (flat[row][order] > settings.foreground * top) & (top > 0)
        for side, where in enumerate((inside, outside)):
            places = order[where][: settings.places]
            for layer, values in enumerate(unit_features):
                if len(places):
                    found.append(((index, side, layer), values[:, places].T.contiguous()))
    return found


def _cluster(
    rows: Mapping[tuple[int, int, int], Sequence[Tensor]],
    settings: EarlySettings,
    seed: int,
    workers: int,
) -> dict[tuple[int, int, int], Tensor]:
    """Unit centres (M, C) of each class, side and layer."""
    method = CosineKMeans(centers="unit", max_iterations=ITERATIONS, tolerance=1e-4)
    order = sorted(rows, key=lambda place: -sum(map(len, rows[place])))

    def fit(place: tuple[int, int, int]) -> Tensor:
        points = torch.cat(list(rows[place]))
        number = seed * 1_000_003 + place[0] * 10 + place[1] * 5 + place[2]
        generator = torch.Generator().manual_seed(number)
        (found,) = method.fit(points, min(settings.clusters, len(points)), [generator])
        return unit(found.centers, dim=1)

    return dict(zip(order, ordered_map(fit, order, workers), strict=True))


def candidates(rounds: Mapping[Base, Sequence[EarlyPrototypes]]) -> list[EarlyPrototypes]:
    """The ways of making maps from the last rounds, the simplest first: bases, fused, alone."""
    found = [replace(own[-1], fusion="none") for own in rounds.values()]
    for own in rounds.values():
        found += [replace(own[-1], fusion=how) for how in ("fused", "alone")]
    return found
