"""What images without a class say of its prototypes: fire rates, margins and rejections.

A prototype of a class should find a more similar place in images of the class than in others. One
that does not shows what comes with the class, such as the wall behind it. See docs/adaptive.md.
Shapes: N classes, K centres of a class, C channels, A images without and B images with the class.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from lpcam.classifiers.features import Source, full_precision, tensor_pyramid
from lpcam.method.batches import Batches, read_all, read_negatives
from lpcam.method.choices import Choice
from lpcam.method.functional import unit
from lpcam.method.prototypes import Prototypes
from lpcam.method.settings import LpcamSettings, NegativeSettings

Origin = Literal["data", "folder"]  #: Images of the data set, or of a folder of negatives.
Seen = tuple[Collection[int] | None, Mapping[int, Tensor]]
"""The labels of an image, None for one of a folder of negatives, and what :func:`best_cosines`
found for each class that it is compared with."""


def best_cosines(features: Tensor, centers: Tensor) -> Tensor:
    """The cosine (..., K) of each centre (..., K, C) to its most similar place of (C, h, w).

    Example:
        >>> best_cosines(torch.eye(2)[:, None], torch.tensor([[2.0, 0.0], [1.0, 1.0]])).tolist()
        [1.0, 0.7071067690849304]
    """
    cosines = unit(centers, dim=-1) @ unit(features.flatten(1), dim=0).to(centers)
    return cosines.amax(-1)


def fire_rates(without: Tensor, with_label: Tensor) -> Tensor:
    """How often a centre finds a more similar place in an image without its class than with it.

    Args:
        without: (A, K) best cosines in images without the class, A >= 1.
        with_label: (B, K) best cosines in images with it, B >= 1.

    Returns:
        (K,) float32 in [0, 1], the share of the A x B pairs of images; equal cosines count half.

    Example:
        >>> fire_rates(torch.tensor([[0.2], [0.8]]), torch.tensor([[0.5], [0.9]])).tolist()
        [0.25]
    """
    ordered, values = with_label.sort(0).values.T.contiguous(), without.T.contiguous()
    below = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    return below.double().mean(1).div(2 * len(with_label)).float()


def margins(without: Tensor, with_label: Tensor, hardest: float) -> Tensor:
    """How much more similar the best place is with the class than without it, (K,) in [-2, 2].

    The mean of ``with_label`` (B, K) minus that of the share ``hardest`` of ``without`` (A, K) with
    the largest cosines, one at least.

    Example:
        >>> margins(torch.tensor([[0.2], [0.8]]), torch.tensor([[0.9]]), 0.5).tolist()
        [0.09999996423721313]
    """
    count = max(1, round(hardest * len(without)))
    return with_label.mean(0) - without.topk(count, dim=0).values.mean(0)


def compare(prototypes: Prototypes, seen: Iterable[Seen], settings: NegativeSettings) -> Prototypes:
    """Prototypes with fire rates, and with choices that drop foreground prototypes by negatives.

    A prototype is dropped if its margin is below ``settings.margin`` times the largest margin of
    its class, for the sources of negatives that ``settings.reject_by`` names, and if it
    is not among the share ``settings.keep`` of them with the largest margins. A class of whose
    prototypes none has a positive margin is left as it is, with an event. The fire rate is the
    higher one of the two sources.
    """
    having: dict[int, list[Tensor]] = {}
    lacking: dict[tuple[int, Origin], list[Tensor]] = {}
    for labels, found in seen:
        source: Origin = "folder" if labels is None else "data"
        for index, best in found.items():
            if labels is not None and index in labels:
                having.setdefault(index, []).append(best)
            else:
                lacking.setdefault((index, source), []).append(best)
    foreground, events, choices = prototypes.foreground, list(prototypes.events), list[Choice]()
    fire = torch.full_like(foreground.scores, float("nan"))
    hardest: dict[Origin, float] = {"folder": settings.hardest, "data": 1.0}
    used = {"none": (), "folder": ("folder",), "all": ("data", "folder")}[settings.reject_by]
    for index, rows in sorted(having.items()):
        name, kept, there = prototypes.classes[index], foreground.keep[index], torch.stack(rows)
        share = torch.full_like(foreground.scores[index], float("inf"))
        for source in ("data", "folder"):
            if (index, source) not in lacking:
                continue
            without = torch.stack(lacking[index, source])
            rates = fire_rates(without, there)
            fire[index] = torch.fmax(fire[index], rates)
            if source not in used or not bool(kept.any()):
                continue
            margin = margins(without, there, hardest[source])
            largest = float(margin[kept].max())
            if largest <= 0:
                where = "of the data set without it" if source == "data" else "of data.negatives"
                events.append(f"{name}: no prototype is nearer to its images than to those {where}")
                continue
            share = torch.minimum(share, margin / largest)
        fire[index, foreground.sizes[index] == 0] = float("nan")
        rejected = kept & (share < settings.margin)
        best = torch.where(kept, share, -torch.inf).argsort(descending=True, stable=True)
        rejected[best[: max(1, math.ceil(settings.keep * int(kept.sum())))]] = False
        for number in torch.nonzero(rejected).flatten().tolist():
            reason = f"{share[number]:.2f} of the best margin of its class"
            own = Choice(name, "foreground", number, "drop", by="negatives", reason=reason)
            choices.append(own)
    made = replace(prototypes, foreground=replace(foreground, fire=fire), events=tuple(events))
    return made.with_choices(choices)


@torch.no_grad()
def compare_loaders(
    prototypes: Prototypes,
    source: Source,
    loader: Batches,
    negatives: Batches,
    settings: LpcamSettings,
) -> Prototypes:
    """As :func:`compare`, with the images of a loader, and those of another without any class.

    These reject prototypes unless ``settings.negatives`` says otherwise.
    """
    channels, centers = source.channels_in, prototypes.foreground.centers
    own = settings.negatives or NegativeSettings(reject_by="folder")
    batches: list[Iterable[tuple[Tensor, Sequence[list[int] | None]]]] = [
        read_all(loader, channels, source.classes),
        ((images, [None] * len(images)) for images in read_negatives(negatives, channels)),
    ]
    seen: list[Seen] = []
    for images, chosen in chain.from_iterable(batches):
        with full_precision(source.device):
            (pair,) = tensor_pyramid(source, images.to(source.device), (1.0,), flip=False)
        for features, labels in zip(pair.features.cpu(), chosen, strict=True):
            rows = [*range(len(centers))] if labels is None or own.reject_by == "all" else labels
            best = best_cosines(features, centers[rows])
            seen.append((labels, dict(zip(rows, best, strict=True))))
    return compare(prototypes, seen, own)
