"""From local features to prototypes: split (eq. 2), cluster, score (eqs 3-4), select.

Order of use: :func:`split` sends each location of an image to the foreground or the context of a
class, a :class:`Reservoir` collects the features, :func:`make_prototypes` clusters, scores and
selects them, and :meth:`Prototypes.vectors` gives the rows that map an image.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from lpcam.clustering import Group, cosine_kmeans_groups
from lpcam.errors import ArtefactError, PrototypeError
from lpcam.functional import foreground_minus_context, unit_mean
from lpcam.parallel import one_thread
from lpcam.presets import LpcamSettings
from lpcam.storage import read_tensors, write_tensors

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
SideName = Literal["foreground", "context"]
SIDES: tuple[SideName, SideName] = ("foreground", "context")
BEST_MARGIN = 1e-6
"""Scores this close to the best count as best when no prototype passes mu_f."""


# -- Equation 2: foreground and context --------------------------------------------------------


def split(cam: Tensor, tau: float, *, inclusive: bool) -> tuple[Tensor, Tensor]:
    """Equation 2: which locations of a class are foreground and which context.

    Args:
        cam: (..., h, w) max-normalised CAM of a class, in [0, 1].
        tau: the threshold.
        inclusive: True: foreground is cam >= tau and context the rest, as the paper has it.
            False: cam > tau and cam < tau, so that equality joins neither, as the released program
            has it.

    Returns:
        two boolean tensors of cam's shape.
    """
    if inclusive:
        foreground = cam >= tau
        return foreground, ~foreground
    return cam > tau, cam < tau


# -- Equations 3 and 4: what the classifier thinks of a centre ---------------------------------


def score(centers: Tensor, weight: Tensor, index: int, bias: Tensor | None = None) -> Tensor:
    """Equations 3-4: z_i = softmax over classes of centre . w, read at the class of the centre.

    The centre is *not* normalised: its length acts as a temperature, and the thresholds mu_f and
    mu_b rely on it. Of spherical clusters give the plain means of the raw members.

    Over one class a softmax is always 1. The one row of a binary classifier is therefore scored by
    the sigmoid, which is the softmax of its logit and a zero.

    Args:
        centers: (K, C).
        weight: (N, C) rows of the classifier.
        index: n, the row of the class whose centres these are.
        bias: (N,) where the evaluator has one; the paper's has none.

    Returns:
        (K,) in [0, 1].
    """
    logits = centers @ weight.T
    if bias is not None:
        logits = logits + bias
    if weight.shape[0] == 1:
        return logits[:, 0].sigmoid()
    return logits.softmax(dim=1)[:, index]


def select_foreground(scores: Tensor, mu_f: float) -> Tensor:
    """F' = {F_i : z_i > mu_f}; if none passes, the centre(s) of the best score.

    Args:
        scores: (K,); NaN marks a place without a centre and is never selected.

    Returns:
        (K,) bool.
    """
    keep = scores > mu_f
    if keep.any() or not torch.isfinite(scores).any():
        return keep
    best = scores[torch.isfinite(scores)].max()
    return (scores - best).abs() < BEST_MARGIN


def select_context(scores: Tensor, mu_b: float, lower: float | None) -> Tensor:
    """B' = {B_i : lower < z_i < mu_b}; possibly none. NaN is never selected.

    The paper has no lower bound (None); the released program uses 0.05 on VOC and 0 on COCO, where
    it drops a score that has underflowed to 0.
    """
    below = scores < mu_b
    return below if lower is None else below & (scores > lower)


# -- Collecting local features -----------------------------------------------------------------


def _ordinary(method: Callable[P, R]) -> Callable[P, R]:
    """What a method makes are ordinary tensors, which can be changed in any mode."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run


class Reservoir:
    """A bounded uniform sample of the local features of each class and side.

    Every feature draws a random key from a generator that depends on the seed, the image, the
    class and the side alone; the ``max_features`` smallest keys stay. So the sample does not
    depend on the order of the images or on how they are shared among processes.

    The sample lies in the machine's memory, and of a class and side never more than twice
    ``max_features`` rows. Keys are drawn before any row is looked at, so a full reservoir copies
    only the few rows that take another's place.

    Args:
        max_features: bound of each class and side; None keeps everything.
        seed: of the keys.
        dtype: in which rows are kept.
    """

    def __init__(
        self, max_features: int | None, seed: int, dtype: torch.dtype = torch.float16
    ) -> None:
        if max_features is not None and max_features < 1:
            raise ValueError(f"max_features must be at least 1 or None, got {max_features}")
        self.max_features = max_features
        self.seed = seed
        self.dtype = dtype
        self.seen: dict[tuple[int, SideName], int] = {}
        self._samples: dict[tuple[int, SideName], _Sample] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all rows that are kept."""
        # Not part by part: a sample of everything has one for each image, and is asked as often.
        return sum(
            sample.count * sample.rows[0].shape[1] * self.dtype.itemsize
            for sample in self._samples.values()
            if sample.rows
        )

    @_ordinary
    def add(
        self,
        index: int,
        side: SideName,
        rows: Tensor,
        name: str,
        where: Tensor | None = None,
    ) -> None:
        """Offer rows (M, C) of class ``index`` and one side, from the image called ``name``.

        Args:
            where: (M,) bool, which of the rows are offered; None: all.

        Raises:
            PrototypeError: if a row that would stay holds NaN or Inf, or a value too large for
                ``dtype``.
        """
        place = (index, side)
        offered = None if where is None else torch.nonzero(where).flatten()
        count = rows.shape[0] if offered is None else len(offered)
        self.seen[place] = self.seen.get(place, 0) + count
        if count == 0:
            return
        digest = hashlib.blake2b(
            f"{self.seed}/{index}/{side}/{name}".encode(), digest_size=7
        ).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        keys = torch.rand(count, generator=generator, dtype=torch.float64)
        sample = self._samples.setdefault(place, _Sample(self.max_features))
        chosen = sample.candidates(keys)
        if len(chosen) == 0:
            return
        numbers = chosen if offered is None else offered[chosen.to(offered.device)]
        taken = rows[numbers.to(rows.device)]
        kept = taken.to(self.dtype)
        if not bool(torch.isfinite(kept).all()):
            raise _not_finite(taken, self.dtype, name)
        sample.take(keys[chosen], kept.cpu())

    @_ordinary
    def merge(self, other: Reservoir) -> None:
        """Take in the sample of other images: the result is that of one reservoir for them all.

        Raises:
            ValueError: if the two differ in ``max_features``, ``seed`` or ``dtype``.
        """
        mine = (self.max_features, self.seed, self.dtype)
        others = (other.max_features, other.seed, other.dtype)
        if mine != others:
            raise ValueError(
                f"reservoirs of (max_features, seed, dtype) {mine} and {others} cannot be merged; "
                "make them alike"
            )
        for place, count in other.seen.items():
            self.seen[place] = self.seen.get(place, 0) + count
        for place, offered in other._samples.items():
            sample = self._samples.setdefault(place, _Sample(self.max_features))
            for keys, rows in zip(offered.keys, offered.rows, strict=True):
                chosen = sample.candidates(keys)
                if len(chosen):
                    sample.take(keys[chosen], rows[chosen])

    @_ordinary
    def checkpoint(self, path: Path, images: int) -> None:
        """Write the sample and how many images it has seen, to go on from after a stop."""
        tensors = {}
        for (index, side), sample in self._samples.items():
            keys, rows = sample.whole()
            tensors[f"{index}.{side}.rows"], tensors[f"{index}.{side}.keys"] = rows, keys
        seen = [[index, side, count] for (index, side), count in self.seen.items()]
        write_tensors(path, tensors, {"kind": "reservoir", "images": images, "seen": seen})

    @_ordinary
    def restore(self, path: Path) -> int:
        """Take the sample of a checkpoint and return how many images it has seen."""
        tensors, metadata = read_tensors(path)
        for index, side, count in metadata["seen"]:
            self.seen[index, side] = count
            if f"{index}.{side}.rows" in tensors:
                sample = self._samples[index, side] = _Sample(self.max_features)
                sample.take(
                    tensors[f"{index}.{side}.keys"], tensors[f"{index}.{side}.rows"].to(self.dtype)
                )
        return int(metadata["images"])

    @_ordinary
    def features(self, index: int, side: SideName) -> Tensor | None:
        """The sample (M, C) of a class and side in an order that is its own, or None."""
        sample = self._samples.get((index, side))
        return None if sample is None else sample.whole()[1]


class _Sample:
    """The rows of the smallest keys: in parts until there are ``bound``, then in one block."""

    def __init__(self, bound: int | None) -> None:
        self.bound = bound
        self.keys: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.count = 0
        self._largest = float("inf")  # of the keys once the sample is full
        self._sorted = False

    def candidates(self, keys: Tensor) -> Tensor:
        """Places (int64) of the keys that can still stay."""
        chosen = torch.nonzero(keys < self._largest).flatten()
        if self.bound is not None and len(chosen) > self.bound:
            chosen = chosen[keys[chosen].argsort()[: self.bound]]
        return chosen

    def take(self, keys: Tensor, rows: Tensor) -> None:
        """Keep rows, in the machine's memory, that :meth:`candidates` chose."""
        self._sorted = False
        if self._largest == float("inf"):
            self.keys.append(keys)
            self.rows.append(rows)
            self.count += len(rows)
            if self.bound is None or sum(map(len, self.keys)) < self.bound:
                return
            self.whole()
        else:
            # The new rows take the places of those whose keys are now too large.
            (held,), (block,), bound = self.keys, self.rows, len(self.keys[0])
            stays = torch.zeros(bound + len(keys), dtype=torch.bool)
            stays[torch.cat([held, keys]).argsort()[:bound]] = True
            leaving, coming = ~stays[:bound], stays[bound:]
            held[leaving], block[leaving] = keys[coming], rows[coming]
        self._largest = float(self.keys[0].max())

    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys in rising order and their rows, at most ``bound``; one block from now on."""
        if not self._sorted:
            keys = torch.cat(self.keys)
            order = keys.argsort()[: self.bound]
            places = torch.full((len(keys),), -1)
            places[order] = torch.arange(len(order))
            block = self.rows[0].new_empty(len(order), self.rows[0].shape[1])
            # Part by part, so that there are never three copies.
            targets = torch.split(places, [len(part) for part in self.rows])
            for part, to in zip(self.rows, targets, strict=True):
                block[to[to >= 0]] = part[to >= 0]
            self.keys, self.rows, self._sorted = [keys[order]], [block], True
            self.count = len(block)
        return self.keys[0], self.rows[0]


def _not_finite(rows: Tensor, dtype: torch.dtype, name: str) -> PrototypeError:
    if not bool(torch.isfinite(rows).all()):
        return PrototypeError(
            f"the features of image {name!r} hold NaN or Inf; check the weights and the "
            "preprocessing of the classifier"
        )
    return PrototypeError(
        f"the features of image {name!r} reach {float(rows.abs().max()):.3g}, more than "
        f"{str(dtype).removeprefix('torch.')} can hold; keep them in float32 (maps.features: "
        "float32 in a recipe, dtype=torch.float32 of LPCAM)"
    )


def draw_images(
    labels: Sequence[tuple[str, Sequence[int]]],
    classes: int,
    settings: LpcamSettings,
    *,
    seed: int,
) -> dict[str, dict[int, int]]:
    """Which images serve which classes, and how often (specification of LPCAM, section 4).

    Args:
        labels: name and class indices of each image.
        classes: N.
        settings: ``images_per_class`` (None: every image with the class, once) and
            ``images_with_replacement``.
        seed: of the draw; each class has a generator of its own.

    Returns:
        for each image that serves at all, how often it serves each class.
    """
    drawn: dict[str, dict[int, int]] = {}
    for index in range(classes):
        names = [name for name, present in labels if index in present]
        wanted = settings.images_per_class
        if wanted is not None and names:
            generator = np.random.default_rng([seed, index])
            replace = settings.images_with_replacement
            count = wanted if replace else min(wanted, len(names))
            names = generator.choice(np.array(names, dtype=object), count, replace).tolist()
        for name in names:
            times = drawn.setdefault(name, {})
            times[index] = times.get(index, 0) + 1
    return drawn


# -- Prototypes --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Centers:
    """All cluster centres of every class for one side, and which of them are prototypes.

    K is ``clusters`` times ``restarts`` of the settings: the centres of every clustering. A class
    with fewer features than K has fewer centres; the rest of its rows are zero with score NaN, size
    0 and keep False.
    """

    centers: Tensor
    """(N, K, C)"""
    scores: Tensor
    """(N, K), z of eqs 3-4"""
    sizes: Tensor
    """(N, K) int64, local features in the cluster"""
    keep: Tensor
    """(N, K) bool, True for prototypes"""

    def prototypes(self, index: int) -> Tensor:
        """The selected centres (K', C) of a class; K' may be 0."""
        return self.centers[index][self.keep[index]]


@dataclass(frozen=True)
class Prototypes:
    """Class and context prototypes of every class, and what made them.

    ``fingerprint`` is that of the classifier whose features were clustered; ``events`` tells, in
    words, of every class where the ordinary rule could not be followed.
    """

    classes: tuple[str, ...]
    foreground: Centers
    context: Centers
    fingerprint: str
    made_by: dict[str, Any]
    events: tuple[str, ...] = ()

    def vectors(self, *, with_context: bool = True) -> Tensor:
        """One vector a class: v_n of equation 6 (LPCAM), or of equation 5 alone (LPCAM-F).

        A class without any prototype has a zero vector, hence an empty map.

        Returns:
            (N, C).
        """
        rows = []
        for index in range(len(self.classes)):
            selected = self.foreground.prototypes(index)
            if selected.shape[0] == 0:
                rows.append(torch.zeros_like(self.foreground.centers[index, 0]))
            elif with_context:
                rows.append(foreground_minus_context(selected, self.context.prototypes(index)))
            else:
                rows.append(unit_mean(selected))
        return torch.stack(rows)

    def save(self, path: Path, beside: Mapping[str, Tensor] | None = None) -> None:
        """Write to one safetensors file, atomically, with tensors to be kept beside."""
        tensors = {
            f"{side}.{part}": getattr(getattr(self, side), part).cpu().contiguous()
            for side in SIDES
            for part in ("centers", "scores", "sizes", "keep")
        }
        metadata = {
            "kind": "prototypes",
            "classes": list(self.classes),
            "fingerprint": self.fingerprint,
            "made_by": self.made_by,
            "events": list(self.events),
        }
        tensors.update({name: t.cpu().contiguous() for name, t in (beside or {}).items()})
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path, *, fingerprint: str | None = None) -> Prototypes:
        """Read a file of :meth:`save`.

        Args:
            fingerprint: of the classifier that shall use them; None skips the check.

        Raises:
            ArtefactError: if the file is missing, damaged or holds something else.
            PrototypeError: if the prototypes belong to another classifier.
        """
        tensors, metadata = read_tensors(path)
        try:
            if metadata["kind"] != "prototypes":
                raise ArtefactError(
                    f"{path} holds {metadata['kind']!r}, not prototypes; give the file that "
                    "LPCAM.save or the prototypes stage wrote"
                )
            sides = {
                side: Centers(
                    *(tensors[f"{side}.{part}"] for part in ("centers", "scores", "sizes", "keep"))
                )
                for side in SIDES
            }
            prototypes = cls(
                tuple(metadata["classes"]),
                sides["foreground"],
                sides["context"],
                metadata["fingerprint"],
                metadata["made_by"],
                tuple(metadata["events"]),
            )
        except KeyError as missing:
            raise ArtefactError(
                f"{path} lacks {missing}; it is no prototypes file of this version, fit again"
            ) from None
        prototypes.check_fingerprint(fingerprint, str(path))
        return prototypes

    def check_fingerprint(self, fingerprint: str | None, where: str) -> None:
        """Refuse to serve a classifier other than the one whose features were clustered."""
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise PrototypeError(
                f"the prototypes of {where} were made from the features of classifier "
                f"{self.fingerprint}, but this classifier is {fingerprint}; fit prototypes for it, "
                "or load the classifier that they belong to"
            )


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
    """Cluster the collected features of every class and side, score the centres and select.

    Args:
        reservoir: filled with local features.
        weight: (N, C) rows of the classifier; or (N + 1, C), the background's before them.
        classes: the N names.
        bias: of those rows, where the evaluator has one.
        seed: of the clustering; each class and side has a generator of its own.
        device: where to cluster; None: where the weight is.
        workers: threads on a CPU, each with a class and side; the result does not depend on it.

    Raises:
        PrototypeError: if the channel numbers of features and classifier differ, or no class has
            any foreground feature.
    """
    groups: dict[tuple[SideName, int], Group] = {}
    for side in SIDES:
        for index in range(len(classes)):
            rows = reservoir.features(index, side)
            if rows is None:
                continue
            if rows.shape[1] != weight.shape[1]:
                raise PrototypeError(
                    f"the features have {rows.shape[1]} channels but the classifier "
                    f"{weight.shape[1]}; collect them with the classifier's own backbone"
                )
            starts = tuple(
                torch.Generator().manual_seed(
                    ((restart * 1_009 + seed) * len(SIDES) + SIDES.index(side)) * 1_000_003 + index
                )
                for restart in range(settings.restarts)
            )
            groups[side, index] = Group(rows, min(settings.clusters, rows.shape[0]), starts)
    found = cosine_kmeans_groups(
        list(groups.values()),
        init=settings.init,
        centers=settings.centers,
        max_iterations=settings.max_iterations,
        tolerance=settings.tolerance,
        tolerance_kind=settings.tolerance_kind,
        device=weight.device if device is None else device,
        workers=workers,
    )
    clustered = dict(zip(groups, found, strict=True))

    events: list[str] = []
    sides = {}
    for side in SIDES:
        shape = (len(classes), settings.clusters * settings.restarts)
        centers = torch.zeros(*shape, weight.shape[1])
        scores = torch.full(shape, float("nan"))
        sizes = torch.zeros(shape, dtype=torch.int64)
        keep = torch.zeros(shape, dtype=torch.bool)
        for index, name in enumerate(classes):
            if (side, index) not in clustered:
                events.append(_no_features(name, side))
                continue
            results = clustered[side, index]
            count = groups[side, index].clusters
            if count < settings.clusters:
                events.append(
                    f"{name}: only {count} {side} features, fewer than K={settings.clusters}; "
                    f"{count} clusters were made"
                )
            # A unit centre has lost the length that the score relies on; the plain mean of its
            # members has it, and its logit is the mean logit of the members.
            means = torch.cat([result.means for result in results])
            with one_thread():
                row = index + weight.shape[0] - len(classes)  # after the background's, if any
                z = score(means, weight.to(means), row, None if bias is None else bias.to(means))
            made = means.shape[0]
            centers[index, :made] = torch.cat([result.centers for result in results]).cpu()
            scores[index, :made] = z.cpu()
            sizes[index, :made] = torch.cat([result.sizes for result in results]).cpu()
            if side == "foreground":
                keep[index] = select_foreground(scores[index], settings.mu_f)
                if not bool((z > settings.mu_f).any()):
                    events.append(
                        f"{name}: no foreground centre scores above mu_f={settings.mu_f:g}; the "
                        f"best one ({float(z.max()):.3f}) is kept"
                    )
            else:
                keep[index] = select_context(scores[index], settings.mu_b, settings.context_lower)
                if not bool(keep[index].any()):
                    events.append(
                        f"{name}: no context centre scores between {settings.context_lower or 0:g} "
                        f"and mu_b={settings.mu_b:g}; its map is the foreground term alone"
                    )
        sides[side] = Centers(centers, scores, sizes, keep)
    if not bool(sides["foreground"].keep.any()):
        raise PrototypeError(
            "no class has any foreground feature: either the list to be clustered holds no image "
            f"with a label of {', '.join(classes)}, or the CAM of every one of them is flat or "
            f"below tau={settings.tau:g}; look at the maps of the cam stage and at the "
            "classifier's validation mAP"
        )
    for event in events:
        logger.warning("%s", event)
    return Prototypes(
        tuple(classes),
        sides["foreground"],
        sides["context"],
        fingerprint,
        made_by or {},
        tuple(events),
    )


def _no_features(name: str, side: SideName) -> str:
    if side == "foreground":
        return f"{name}: no foreground feature was collected; its map is empty"
    return f"{name}: no context feature was collected; its map is the foreground term alone"
