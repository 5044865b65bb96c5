"""Prototypes from local features: cluster, score and select (equations 3 and 4)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpcam.method.clustering import CLUSTERINGS, Clusters
from lpcam.method.functional import (
    foreground_minus_context,
    score,
    select_context,
    select_foreground,
)
from lpcam.method.reservoir import SIDES, Reservoir, SideName
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.errors import ArtefactError, PrototypeError
from lpcam.runtime.files import read_tensors, write_tensors
from lpcam.runtime.parallel import one_thread, ordered_map

logger = logging.getLogger(__name__)
PARTS = ("centers", "scores", "sizes", "keep")
"""Fields of :class:`Centers`, which are tensors in a file of prototypes."""


@dataclass(frozen=True)
class Centers:
    """Cluster centres of every class on one side (foreground or context); some are prototypes.

    A class with fewer features than K has fewer centres; its other rows are zero, with score NaN.
    """

    centers: Tensor  #: (N, K, C)
    scores: Tensor  #: (N, K), z of equations 3 and 4, in [0, 1]
    sizes: Tensor  #: (N, K) int64, local features in the cluster
    keep: Tensor  #: (N, K) bool, True for prototypes

    def prototypes(self, index: int) -> Tensor:
        """Selected centres (K', C) of a class; K' may be 0."""
        return self.centers[index][self.keep[index]]


@dataclass(frozen=True)
class Prototypes:
    """Class and context prototypes of every class.

    Example:
        >>> reservoir = Reservoir(None, seed=0)
        >>> reservoir.add(0, "foreground", 9 * torch.eye(2)[[0, 0, 0]], "image")
        >>> settings = LpcamSettings.from_preset("voc12.official", clusters=2)
        >>> prototypes = make_prototypes(reservoir, torch.eye(2), ("cat", "dog"), settings, seed=0)
        >>> prototypes.vectors().tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """

    classes: tuple[str, ...]
    foreground: Centers
    context: Centers
    fingerprint: str  #: Fingerprint of the classifier whose features were clustered.
    made_by: dict[str, Any]  #: Settings and seeds, as plain values.
    events: tuple[str, ...] = ()
    """A sentence for each class where the ordinary rule of selection could not be followed."""

    def vectors(self, *, with_context: bool = True) -> Tensor:
        """One vector (N, C) for each class: v_n of equation 6; zero if it has no prototype.

        Without context it is that of LPCAM-F (equation 5).
        """
        vectors = torch.zeros_like(self.foreground.centers[:, 0])
        for index in torch.nonzero(self.foreground.keep.any(1)).flatten().tolist():
            context = self.context.prototypes(index) if with_context else None
            vectors[index] = foreground_minus_context(self.foreground.prototypes(index), context)
        return vectors

    def save(self, path: Path, extra: Mapping[str, Tensor] | None = None) -> None:
        """Write a safetensors file atomically, with ``extra`` tensors if given."""
        tensors = {f"{s}.{part}": getattr(getattr(self, s), part) for s in SIDES for part in PARTS}
        names = ("classes", "fingerprint", "made_by", "events")
        metadata = {"kind": "prototypes", **{name: getattr(self, name) for name in names}}
        write_tensors(path, {**tensors, **(extra or {})}, metadata)

    @classmethod
    def load(cls, path: Path, *, fingerprint: str | None = None) -> Prototypes:
        """Read a file that :meth:`save` wrote, which an ArtefactError refuses if it is damaged.

        A PrototypeError if they belong to a classifier of another fingerprint, if one is given.
        """
        tensors, metadata = read_tensors(path)
        try:
            if metadata["kind"] != "prototypes":
                raise ArtefactError(
                    f"{path} contains {metadata['kind']!r}; expected prototypes, as LPCAM.save or "
                    "the prototypes stage writes them"
                )
            foreground, context = (
                Centers(*(tensors[f"{side}.{part}"] for part in PARTS)) for side in SIDES
            )
            prototypes = cls(
                tuple(metadata["classes"]),
                foreground,
                context,
                metadata["fingerprint"],
                metadata["made_by"],
                tuple(metadata["events"]),
            )
        except KeyError as missing:
            raise ArtefactError(
                f"{path} has no {missing}; it was written by another version, fit again"
            ) from None
        prototypes.check_fingerprint(fingerprint, str(path))
        return prototypes

    def check_fingerprint(self, fingerprint: str | None, where: str) -> None:
        """Raise PrototypeError if the prototypes belong to another classifier."""
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise PrototypeError(
                f"the prototypes of {where} were made from the features of classifier "
                f"{self.fingerprint}, but this classifier is {fingerprint}; fit prototypes for it, "
                "or load the other classifier"
            )


@torch.inference_mode(False)  # the prototypes can be used in any mode
@torch.no_grad()
def make_prototypes(
    reservoir: Reservoir,
    weight: Tensor,
    classes: Sequence[str],
    settings: LpcamSettings,
    *,
    seed: int,
    bias: Tensor | None = None,
    fingerprint: str = "",
    made_by: dict[str, Any] | None = None,
    device: torch.device | None = None,
    workers: int = 1,
) -> Prototypes:
    """Cluster the features of every class and side, score the centres and select prototypes.

    Raises PrototypeError if no class has a foreground feature.

    Args:
        weight: (N, C), rows of the classifier; or (N + 1, C) with the background's row first.
        seed: random seed of the clustering; each class and side has its own generator.
        bias: (N,), or (N + 1,) as ``weight``; or None.
        device: used for clustering; None: the device of ``weight``.
        workers: CPU threads, each with one class and side; the result does not depend on them.
    """
    clustered = _cluster(reservoir, settings, seed, device or weight.device, workers)
    events: list[str] = []
    shape = (len(classes), settings.clusters * settings.restarts)
    foreground, context = (
        Centers(
            torch.zeros(*shape, weight.shape[1]),
            torch.full(shape, float("nan")),
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.bool),
        )
        for _ in SIDES
    )
    for side, found in zip(SIDES, (foreground, context), strict=True):
        for index, name in enumerate(classes):
            if (index, side) not in clustered:
                effect = "empty" if side == "foreground" else "the foreground term alone"
                events.append(f"{name}: no {side} feature was collected; its map is {effect}")
                continue
            results = clustered[index, side]
            count = len(results[0].sizes)
            if count < settings.clusters:
                events.append(
                    f"{name}: only {count} {side} features, fewer than K={settings.clusters}; "
                    f"{count} clusters were made"
                )
            # A unit centre has lost the length that the score depends on; the plain mean has it.
            means = torch.cat([one.means for one in results])
            with one_thread():
                row = index + len(weight) - len(classes)  # after a row of the background
                z = score(means, weight.to(means), row, None if bias is None else bias.to(means))
            found.centers[index, : len(z)] = torch.cat([one.centers for one in results]).cpu()
            found.scores[index, : len(z)] = z.cpu()
            found.sizes[index, : len(z)] = torch.cat([one.sizes for one in results]).cpu()
            scores, lower = found.scores[index], settings.context_lower
            if side == "context":
                found.keep[index] = select_context(scores, settings.mu_b, lower)
                if not bool(found.keep[index].any()):
                    events.append(
                        f"{name}: no context centre scores between {lower or 0:g} and "
                        f"mu_b={settings.mu_b:g}; its map is the foreground term alone"
                    )
                continue
            found.keep[index] = select_foreground(scores, settings.mu_f)
            if not bool((scores > settings.mu_f).any()):
                events.append(
                    f"{name}: no foreground centre scores above mu_f={settings.mu_f:g}; the "
                    f"best one ({float(z.max()):.3f}) is kept"
                )
    if not bool(foreground.keep.any()):
        raise PrototypeError(
            "no class has any foreground feature: either no image to cluster has a label of "
            f"{', '.join(classes)}, or their CAMs are flat or below tau={settings.tau:g}; check "
            "the maps of the cam stage and the classifier's validation mAP"
        )
    for event in events:
        logger.warning("%s", event)
    return Prototypes(
        tuple(classes), foreground, context, fingerprint, made_by or {}, tuple(events)
    )


def _cluster(
    reservoir: Reservoir, settings: LpcamSettings, seed: int, device: torch.device, workers: int
) -> dict[tuple[int, SideName], list[Clusters]]:
    """Cluster the features of each class and side, one result for each restart."""
    method = CLUSTERINGS[settings.clustering](settings)
    features = {
        place: rows for place in reservoir.seen if (rows := reservoir.features(*place)) is not None
    }

    def fit(place: tuple[int, SideName]) -> list[Clusters]:
        (index, side), rows = place, features[place].to(device)
        generators = [
            torch.Generator().manual_seed(
                ((restart * 1_009 + seed) * len(SIDES) + SIDES.index(side)) * 1_000_003 + index
            )
            for restart in range(settings.restarts)
        ]
        return method.fit(rows, min(settings.clusters, len(rows)), generators)

    # The largest first, so that no thread works alone at the end.
    order = sorted(features, key=lambda place: -len(features[place]))
    found = ordered_map(fit, order, workers if device.type == "cpu" else 1)
    clustered = dict(zip(order, found, strict=True))
    results = [one for restarts in clustered.values() for one in restarts]
    if stopped := sum(not one.converged for one in results):
        logger.warning(
            f"{stopped} of {len(results)} clusterings stopped at "
            f"max_iterations={settings.max_iterations} before they converged; raise it or the "
            "tolerance"
        )
    return clustered
