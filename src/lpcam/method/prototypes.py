"""Prototypes from local features: cluster, score and select (equations 3 and 4)."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from lpcam.classifiers.features import Source
from lpcam.method.choices import Choice, read_choices, settled
from lpcam.method.clustering import CLUSTERINGS, Clusters
from lpcam.method.functional import (
    Similarity,
    affine_row,
    foreground_minus_context,
    ridge_vector,
    score,
    select_context,
    select_foreground,
    unit,
    zeros_on_demand,
)
from lpcam.method.reservoir import SIDES, Reservoir, SideName
from lpcam.method.settings import LpcamSettings, Weights
from lpcam.runtime.errors import ArtefactError, PrototypeError, shortened
from lpcam.runtime.files import digest_tensors, read_tensors, write_tensors
from lpcam.runtime.parallel import one_thread, ordered_map

logger = logging.getLogger(__name__)
PARTS = ("centers", "scores", "sizes", "keep")
"""Fields of :class:`Centers`, which are tensors in a file of prototypes."""
TOP_SHARE = 1 / 3
"""Share of the prototypes of a class and side that count with the weights ``top``, at least one."""
Quality = Literal["score", "size", "fire_rate", "purity"]
NEAREST = 25  #: Clusters whose local features :func:`purities` counts.
UNNAMED = "other"  #: Part of the prototypes without a name, in a class that has names.
MEMBERS = 25  #: Features of a cluster, in the mean, where their number is automatic.
FEWEST_CLUSTERS = 4  #: Smallest automatic number of clusters.
MOST_TOLD = 5  #: Events that are logged; all are in :attr:`Prototypes.events`.


@dataclass(frozen=True)
class Centers:
    """Cluster centres of every class on one side; missing ones are zero, with score NaN."""

    centers: Tensor  #: (N, K, C)
    scores: Tensor  #: (N, K), z of equations 3 and 4, in [0, 1]
    sizes: Tensor  #: (N, K) int64, local features in the cluster
    keep: Tensor  #: (N, K) bool, True for prototypes
    fire: Tensor | None = None
    """(N, K), fire rates in [0, 1] (:mod:`lpcam.method.negatives`); None: not measured."""

    @classmethod
    def empty(cls, classes: int, clusters: int, channels: int) -> Centers:
        """No centre of any class."""
        shape = (classes, clusters)
        return cls(
            zeros_on_demand(*shape, channels, like=torch.empty(0)),
            torch.full(shape, float("nan")),
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.bool),
        )

    def spread(self, classes: int, fitted: Sequence[int]) -> Centers:
        """These rows as those of the ``fitted`` of more classes."""
        whole = Centers.empty(classes, *self.centers.shape[1:])
        for part in PARTS:
            getattr(whole, part)[list(fitted)] = getattr(self, part)
        if self.fire is None:
            return whole
        rates = torch.full_like(whole.scores, float("nan"))
        rates[list(fitted)] = self.fire
        return replace(whole, fire=rates)

    def fire_text(self, index: int, number: int) -> str:
        """The fire rate of a centre in words; empty if none was measured."""
        rate = math.nan if self.fire is None else float(self.fire[index, number])
        return "" if math.isnan(rate) else f"fire rate {rate:.2f}"

    def prototypes(self, index: int) -> Tensor:
        """Selected centres (K', C) of a class; K' may be 0."""
        return self.centers[index][self.keep[index]]


@dataclass
class Prototypes:
    """Class and context prototypes of every class.

    A person's corrections (:meth:`drop`, :meth:`move`, :meth:`keep`, :meth:`name`) change them in
    place, so that the LPCAM that holds them follows; :meth:`with_choices` makes other prototypes.
    """

    classes: tuple[str, ...]
    foreground: Centers
    context: Centers
    fingerprint: str  #: Fingerprint of the classifier whose features were clustered.
    made_by: dict[str, Any]  #: Settings and seeds, as plain values.
    events: tuple[str, ...] = ()
    """A sentence for each class where the ordinary rule of selection could not be followed."""
    choices: tuple[Choice, ...] = ()  #: Choices that were applied, one for each centre.
    weights: Weights = "equal"  #: How :meth:`vectors` weights them, before weights in choices.
    target: Tensor | None = None  #: (N, C), the classifier's rows, from which ``ridge`` learns.

    def vectors(
        self,
        *,
        with_context: bool = True,
        classes: Collection[int] | None = None,
        similarity: Similarity = "cosine",
    ) -> Tensor:
        """One vector (N, C) for each class: v_n of equation 6; zero if it has no prototype.

        Without context it is that of LPCAM-F. With ``classes`` the other rows are zero. Those of
        another similarity than cosine are (N, C + 1), as :func:`affine_row` makes them.
        """
        centers = self.foreground.centers
        width = centers.shape[2] + (similarity != "cosine")
        vectors = zeros_on_demand(len(centers), width, like=centers)
        fitted = torch.nonzero(self.foreground.keep.any(1)).flatten().tolist()
        for index in fitted if classes is None else set(fitted).intersection(classes):
            (foreground, wf), (context, wb) = (self.rows(index, side) for side in SIDES)
            own = foreground, (context if with_context else None), (wf, wb)
            if similarity != "cosine":
                vectors[index] = affine_row(similarity, *own)
            elif self.weights == "ridge":
                assert self.target is not None  # as chosen() leaves it
                vectors[index] = ridge_vector(self.target[index], *own)
            else:
                vectors[index] = foreground_minus_context(*own)
        return vectors

    def members(self, index: int, side: SideName) -> list[tuple[SideName, int]]:
        """Prototypes that count on a side of a class: the side they were fitted on, their number.

        Those of the context end with the foreground centres that a choice moved there.
        """
        kept = torch.nonzero(getattr(self, side).keep[index]).flatten().tolist()
        name, moved = self.classes[index], self.choices if side == "context" else ()
        return [(side, number) for number in kept] + [
            (one.side, one.index)
            for one in moved
            if one.action == "context" and one.class_name == name
        ]

    def rows(self, index: int, side: SideName) -> tuple[Tensor, Tensor | None]:
        """The prototypes (K', C) of a side of a class and their weights (K',); None: all alike."""
        members = self.members(index, side)
        given = {one.place: one.weight for one in self.choices if one.weight is not None}
        rows = [getattr(self, own).centers[index, number] for own, number in members]
        centers = torch.stack(rows) if rows else self.foreground.centers[index, :0]
        if self.weights == "equal" and not given:
            return centers, None
        weights = centers.new_ones(len(members))
        for place, (own, number) in enumerate(members):
            z = getattr(self, own).scores[index, number]
            if self.weights == "size":
                weights[place] = getattr(self, own).sizes[index, number]
            elif self.weights in ("score", "top"):
                weights[place] = z if own == "foreground" else 1 - z
        if self.weights == "top":
            best = weights.argsort(descending=True, stable=True)
            best = best[: max(1, round(TOP_SHARE * len(best)))]
            weights = torch.zeros_like(weights).index_fill(0, best, 1.0)
        factors = [given.get((self.classes[index], *member), 1.0) for member in members]
        return centers, weights * weights.new_tensor(factors)

    def with_choices(self, choices: Iterable[Choice]) -> Prototypes:
        """Prototypes with more choices than these, which stay as they are.

        Dropped ones lose ``keep``; so do moved ones, which count in the context of their class.
        ``keep`` makes a prototype of any centre. Choices are settled as :func:`settled` says.

        Raises PrototypeError if there is no such class or centre, if a context centre is moved, and
        if a class that has foreground prototypes would lose the last one.
        """
        every = settled([*self.choices, *choices])
        keep = {side: getattr(self, side).keep.clone() for side in SIDES}
        for one in every:
            known = one.class_name in self.classes
            row = self.classes.index(one.class_name) if known else 0
            sizes = getattr(self, one.side).sizes[row].tolist() if known else []
            if one.index >= len(sizes) or not sizes[one.index]:
                raise PrototypeError(
                    f"there is no {one.side} prototype {one.index} of {one.class_name!r}; 'lpcam "
                    "prototypes RUN' lists them"
                )
            if one.action == "context" and one.side == "context":
                raise PrototypeError(
                    f"prototype {one.index} of {one.class_name} is a context prototype already, so "
                    "it cannot be moved; keep or drop it"
                )
            if one.action is not None:
                keep[one.side][row, one.index] = one.action == "keep"
        lost = self.foreground.keep.any(1) & ~keep["foreground"].any(1)
        if lost.any():
            names = [name for name, gone in zip(self.classes, lost.tolist(), strict=True) if gone]
            raise PrototypeError(
                f"no foreground prototype of {shortened(names)} would be left, so there would be "
                "no map of it; keep one of them, or take the class out of the labels"
            )
        sides = {side: replace(getattr(self, side), keep=keep[side]) for side in SIDES}
        return replace(self, **sides, choices=every)

    def drop(self, class_name: str, numbers: Sequence[int], side: SideName = "foreground") -> Self:
        """Leave prototypes of a class out, in place; raises as :meth:`with_choices`."""
        return self._choose(class_name, numbers, side, action="drop")

    def move(self, class_name: str, numbers: Sequence[int]) -> Self:
        """Count foreground prototypes of a class as its context, in place; raises as above."""
        return self._choose(class_name, numbers, "foreground", action="context")

    def keep(self, class_name: str, numbers: Sequence[int], side: SideName = "foreground") -> Self:
        """Use centres of a class as prototypes, in place, whatever rejected them."""
        return self._choose(class_name, numbers, side, action="keep")

    def name(self, class_name: str, numbers: Sequence[int], name: str) -> Self:
        """Name the part that foreground prototypes show, in place; "" takes the name away."""
        return self._choose(class_name, numbers, "foreground", name=name)

    def _choose(
        self, class_name: str, numbers: Sequence[int], side: SideName, **values: Any
    ) -> Self:
        made = self.with_choices(Choice(class_name, side, number, **values) for number in numbers)
        self.foreground, self.context, self.choices = made.foreground, made.context, made.choices
        return self

    def chosen(
        self, choices: Path | None, weights: Weights, target: Tensor | None = None
    ) -> Prototypes:
        """These prototypes with the choices of a file and with weights.

        Ridge weights need the ``target`` (N, C), the classifier's rows. Raises PrototypeError if
        the file is damaged or about other prototypes.
        """
        rows = () if choices is None else read_choices(choices, self.digest)
        if target is not None:
            target = target.detach().float().cpu() if weights == "ridge" else None
        return replace(self.with_choices(rows), weights=weights, target=target)

    @property
    def names(self) -> dict[str, dict[int, str]]:
        """Names of foreground prototypes by class and number, where there are any."""
        found: dict[str, dict[int, str]] = {}
        for one in self.choices:
            if one.name and one.side == "foreground":
                found.setdefault(one.class_name, {})[one.index] = one.name
        return found

    def parts(self) -> dict[int, dict[str, Tensor]]:
        """Unit foreground prototypes (K, C) by name, for each class that has names.

        Those without a name are `UNNAMED`.
        """
        found: dict[int, dict[str, list[Tensor]]] = {}
        for name, names in self.names.items():
            index = self.classes.index(name)
            for _, number in self.members(index, "foreground"):
                rows = found.setdefault(index, {}).setdefault(names.get(number, UNNAMED), [])
                rows.append(unit(self.foreground.centers[index, number], dim=0))
        return {n: {k: torch.stack(v) for k, v in one.items()} for n, one in found.items()}

    @property
    def digest(self) -> str:
        """Digest of the classes and centres, which choices do not change."""
        fitted = self._fitted()
        tensors = {str(side): getattr(self, side).centers[fitted] for side in SIDES}
        return digest_tensors(tensors, {"classes": self.classes, "fitted": fitted.tolist()})

    def _fitted(self) -> Tensor:
        """Indices of the classes that have centres."""
        return torch.nonzero(self.foreground.sizes.any(1) | self.context.sizes.any(1)).flatten()

    def save(self, path: Path, extra: Mapping[str, Tensor] | None = None, **metadata: Any) -> None:
        """Write a safetensors file atomically, with ``extra`` tensors and metadata if given."""
        tensors = {f"{s}.{part}": getattr(getattr(self, s), part) for s in SIDES for part in PARTS}
        if self.foreground.fire is not None:
            tensors["foreground.fire"] = self.foreground.fire
        fitted = self._fitted()
        if len(fitted) < len(self.classes):  # those of a thousand classes that have centres
            tensors = {name: values[fitted] for name, values in tensors.items()}
            metadata["fitted"] = fitted.tolist()
        names = ("classes", "fingerprint", "made_by", "events")
        metadata |= {"kind": "prototypes", **{name: getattr(self, name) for name in names}}
        if self.choices:
            metadata["choices"] = [one.as_json() for one in self.choices]
        if self.weights != "equal":
            metadata["weights"] = self.weights
        if self.target is not None:
            tensors["target"] = self.target
        write_tensors(path, {**tensors, **(extra or {})}, metadata)

    @classmethod
    def load(cls, path: Path, *, fingerprint: str | None = None) -> Prototypes:
        """Read a file that :meth:`save` wrote, which an ArtefactError refuses if it is damaged.

        A PrototypeError if they belong to a classifier of another fingerprint, if one is given.
        """
        prototypes = cls.of_file(path, *read_tensors(path))
        prototypes.check_fingerprint(fingerprint, str(path))
        return prototypes

    @classmethod
    def of_file(
        cls, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> Prototypes:
        """Prototypes of what was read from a file."""
        try:
            if metadata["kind"] != "prototypes":
                raise ArtefactError(
                    f"{path} contains {metadata['kind']!r}; expected prototypes, as LPCAM.save or "
                    "a run writes them"
                )
            classes, events = tuple(metadata["classes"]), tuple(metadata["events"])
            sides = [Centers(*(tensors[f"{side}.{part}"] for part in PARTS)) for side in SIDES]
            sides[0] = replace(sides[0], fire=tensors.get("foreground.fire"))
            if "fitted" in metadata:
                sides = [one.spread(len(classes), metadata["fitted"]) for one in sides]
            foreground, context = sides
            own = metadata["fingerprint"], metadata["made_by"], events
            choices = tuple(Choice.of_json(one) for one in metadata.get("choices", ()))
            weights = metadata.get("weights", "equal"), tensors.get("target")
            return cls(classes, foreground, context, *own, choices, *weights)
        except KeyError as missing:
            raise ArtefactError(
                f"{path} has no {missing}; it was written by another version, fit again"
            ) from None

    def check_source(self, source: Source, where: str) -> None:
        """Raise PrototypeError if a source has other weights, or other names of its classes."""
        own = source.fingerprint()
        if self.fingerprint not in (own, source.fingerprint(self.classes)):
            self.check_fingerprint(own, where)
        for index, (name, given) in enumerate(zip(self.classes, source.classes, strict=True)):
            if name != given:
                raise PrototypeError(
                    f"the prototypes of {where} are of these weights, but class {index} is "
                    f"{name!r} there and {given!r} here; give their class names in their order"
                )

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

    Raises PrototypeError if no class has a foreground feature. ``weight`` (N, C) and ``bias`` are
    the classifier's, or (N + 1, C) and (N + 1,) with the background first. Each class and side has
    its own generator, so the result does not depend on the number of CPU threads, ``workers``.
    """
    clustered = _cluster(reservoir, settings, seed, device or weight.device, workers)
    events: list[str] = []
    most = settings.clusters * settings.restarts
    foreground, context = (Centers.empty(len(classes), most, weight.shape[1]) for _ in SIDES)
    labelled = sorted({index for index, _ in reservoir.seen})
    for side, found in zip(SIDES, (foreground, context), strict=True):
        for index in labelled:
            name = classes[index]
            if (index, side) not in clustered:
                effect = "empty" if side == "foreground" else "the foreground term alone"
                events.append(f"{name}: no {side} feature was collected; its map is {effect}")
                continue
            results = clustered[index, side]
            count = len(results[0].assignments)
            if count < settings.clusters and "clusters" not in settings.automatic:
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
                mu_b = _relative(settings, "mu_b", foreground.scores[index])
                found.keep[index] = select_context(scores, mu_b, lower)
                if not bool(found.keep[index].any()):
                    events.append(
                        f"{name}: no context centre scores between {lower or 0:g} and "
                        f"mu_b={mu_b:g}; its map is the foreground term alone"
                    )
                continue
            mu_f = _relative(settings, "mu_f", scores)
            found.keep[index] = select_foreground(scores, mu_f)
            if not bool((scores > mu_f).any()):
                events.append(
                    f"{name}: no foreground centre scores above mu_f={mu_f:g}; the "
                    f"best one ({float(z.max()):.3f}) is kept"
                )
    if not bool(foreground.keep.any()):
        raise PrototypeError(
            "no class has any foreground feature: either no image has a label of "
            f"{shortened(classes)}, or their CAMs are flat or below tau={settings.tau:g}; look at "
            "the CAMs of some images, and check that the classifier recognises them"
        )
    count = int(foreground.keep.any(1).sum())
    told = [f"prototypes of {count:,} of {len(classes):,} classes", *events[:MOST_TOLD]]
    if len(events) > MOST_TOLD:
        told.append(f"{len(events) - MOST_TOLD} more")
    if events or count < len(classes):
        logger.log(logging.WARNING if events else logging.INFO, "%s", ". ".join(told))
    if absent := [name for index, name in enumerate(classes) if index not in labelled]:
        events.append(f"{shortened(absent)}: no image has this label, so there is no map of it")
    return Prototypes(
        tuple(classes), foreground, context, fingerprint, made_by or {}, tuple(events)
    )


def _relative(settings: LpcamSettings, name: str, scores: Tensor) -> float:
    """A threshold of scores; an automatic one is relative to the best foreground score (K,)."""
    value: float = getattr(settings, name)
    return value * float(scores.nan_to_num().max()) if name in settings.automatic else value


def _clusters(settings: LpcamSettings, rows: int) -> int:
    """K for some rows; an automatic one leaves each cluster `MEMBERS` of them in the mean."""
    wanted = settings.clusters
    if "clusters" in settings.automatic:
        wanted = min(wanted, max(FEWEST_CLUSTERS, rows // MEMBERS))
    return min(wanted, rows)


def _cluster(
    reservoir: Reservoir, settings: LpcamSettings, seed: int, device: torch.device, workers: int
) -> dict[tuple[int, SideName], list[Clusters]]:
    """Cluster the features of each class and side, one result for each restart."""
    method = CLUSTERINGS[settings.clustering](settings)
    features = {p: rows for p in reservoir.seen if (rows := reservoir.features(*p)) is not None}

    def fit(place: tuple[int, SideName]) -> list[Clusters]:
        (index, side), rows = place, features[place].to(device)
        generators = [
            torch.Generator().manual_seed(
                ((restart * 1_009 + seed) * len(SIDES) + SIDES.index(side)) * 1_000_003 + index
            )
            for restart in range(settings.restarts)
        ]
        return method.fit(rows, _clusters(settings, len(rows)), generators)

    # The largest first, so that no thread works alone at the end.
    order = sorted(features, key=lambda place: -len(features[place]))
    found = ordered_map(fit, order, workers if device.type == "cpu" else 1)
    clustered = dict(zip(order, found, strict=True))
    results = [one for restarts in clustered.values() for one in restarts]
    if stopped := sum(not one.converged for one in results):
        logger.warning(
            f"{stopped} of {len(results)} clusterings stopped at max_iterations="
            f"{settings.max_iterations} before they converged; raise it or the tolerance"
        )
    return clustered


def purities(prototypes: Prototypes, index: int) -> Tensor:
    """How much of what resembles each foreground centre (K,) of a class is from its images.

    The share, in [0, 1], of the local features of the `NEAREST` most similar clusters, of all
    classes and both sides, that were collected for the class. It needs no truth and no image.
    """
    sides = [prototypes.foreground, prototypes.context]
    every, sizes = (
        torch.cat([getattr(s, part) for s in sides], 1) for part in ("centers", "sizes")
    )
    owners, _ = found = torch.nonzero(sizes).unbind(1)
    cosines = unit(prototypes.foreground.centers[index], dim=1) @ unit(every[found], dim=1).T
    near = cosines.topk(min(NEAREST, len(owners)), dim=1).indices
    counts = sizes[found][near]
    return (counts * (owners[near] == index)).sum(1) / counts.sum(1)


def worst(prototypes: Prototypes, by: Quality, share: float) -> list[Choice]:
    """Choices that drop the worst foreground prototypes of each class.

    Args:
        by: the worst have the lowest score (equation 3), the fewest local features (size), the
            highest fire rate (:mod:`lpcam.method.negatives`) or the lowest of :func:`purities`.
        share: of the prototypes of a class that are dropped, in [0, 1], rounded; one stays.

    Raises PrototypeError if fire rates are asked for that were not measured.
    """
    side, choices = prototypes.foreground, list[Choice]()
    if by == "fire_rate" and side.fire is None:
        raise PrototypeError(
            "the prototypes have no fire rates; fit them with lpcam.negatives {}, or choose the "
            "worst by score, size or purity"
        )
    values = {"score": side.scores, "size": side.sizes, "fire_rate": side.fire}.get(by)
    for index in torch.nonzero(side.keep.any(1)).flatten().tolist():
        own = purities(prototypes, index) if values is None else values[index]
        kept = torch.nonzero(side.keep[index]).flatten()
        # NaN, where there was nothing to compare with, comes last
        order = kept[(-own if by == "fire_rate" else own)[kept].argsort(stable=True)].tolist()
        reason = f"{by} among the worst {100 * share:g} % of its class"
        for number in order[: min(round(share * len(kept)), len(kept) - 1)]:
            name = prototypes.classes[index]
            choices.append(Choice(name, "foreground", number, "drop", reason=reason))
    return choices
