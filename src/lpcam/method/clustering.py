"""Cosine k-means, and the protocol of a clustering method (section 3 of the paper).

:class:`Clustering` is what :func:`make_prototypes` asks of a method, and
:data:`CLUSTERINGS` lists the methods by name.

:func:`cosine_kmeans` and :class:`CosineKMeans` differ in how they are called only. The algorithm is
``_iterate``; ``_Points`` reads the points chunk by chunk, so that half-precision points are never
held in single precision as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.method.functional import NORM_EPSILON, unit
from lpcam.runtime.registry import Registry

Init = Literal["random", "k-means++"]
CenterKind = Literal["mean", "unit"]
ToleranceKind = Literal["absolute", "relative"]
CPU_CHUNK_BYTES = 16 * 2**20
"""Size of a chunk on a CPU: a share of the processor's cache."""
DEVICE_CHUNK_BYTES = 256 * 2**20
"""Size of a chunk on another device."""
FRESH_SUMS = 8
"""All sums are recomputed after this many iterations, to limit the rounding error of updates."""


@dataclass(frozen=True)
class Clusters:
    """Result of clustering M points with C channels into K clusters."""

    centers: Tensor
    """(K, C), floating point: the centres that equation 5 compares features with."""
    means: Tensor
    """(K, C), floating point: plain means of the members, which equations 3 and 4 score."""
    assignments: Tensor
    """(M,) int64 in 0..K-1, the cluster of each point."""
    sizes: Tensor
    """(K,) int64, number of members of each cluster."""
    iterations: int
    converged: bool
    """False if the method stopped at its maximum number of iterations."""
    objective: float
    """Mean cosine of the points to their centres at the last assignment, in [-1, 1]."""


class Clustering(Protocol):
    """A clustering method."""

    def fit(self, points: Tensor, k: int, generators: Sequence[torch.Generator]) -> list[Clusters]:
        """Cluster the points once for each generator.

        Args:
            points: (M, C) floating point, M >= ``k``, on any device.
            k: number of clusters.
            generators: on the CPU, one for each restart; the only source of randomness.

        Returns:
            One result for each generator, on the device of the points.
        """
        ...


@dataclass(frozen=True)
class CosineKMeans:
    """K-means with cosine assignment, as a :class:`Clustering`.

    Each point is assigned to the centre with the largest cosine; a zero point has cosine 0 to every
    centre. An empty cluster takes the point that has the smallest cosine to its centre.

    Args:
        init: first centres: "random" draws K distinct points, "k-means++" draws points far from
            each other by cosine distance.
        centers: "mean": a centre is the plain mean of its members, so that longer points count more
            (the released program). "unit": the normalised mean of the normalised members (spherical
            k-means).
        max_iterations: upper bound of the iterations.
        tolerance: the iterations stop when the change is below it.
        tolerance_kind: how change is measured. "absolute": squared sum of the shifts of the centres
            (the released program, with tolerance 5). "relative": gain of the objective divided by
            1 - objective.
        chunk_bytes: size of the single-precision chunks; None chooses by the device.

    Example:
        >>> points = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 3.0]])
        >>> first, second = (torch.Generator().manual_seed(seed) for seed in (0, 1))
        >>> [found.objective for found in CosineKMeans().fit(points, 2, [first, second])]
        [1.0, 1.0]
    """

    init: Init = "random"
    centers: CenterKind = "mean"
    max_iterations: int = 100
    tolerance: float = 1e-4
    tolerance_kind: ToleranceKind = "relative"
    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        kinds = {"init": Init, "centers": CenterKind, "tolerance_kind": ToleranceKind}
        for name, kind in kinds.items():
            value, known = getattr(self, name), get_args(kind)
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {known}")
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations is {self.max_iterations}; expected at least 1")

    @classmethod
    def of_settings(cls, settings: Any) -> Self:
        """The method with the values of a :class:`FittingSettings`."""
        names = ("init", "centers", "max_iterations", "tolerance", "tolerance_kind")
        return cls(**{name: getattr(settings, name) for name in names})

    @torch.no_grad()
    def fit(self, points: Tensor, k: int, generators: Sequence[torch.Generator]) -> list[Clusters]:
        """As :meth:`Clustering.fit`; the centres of half-precision points are single precision.

        Raises:
            ValueError: if there are fewer points than clusters, or they contain NaN or Inf.
        """
        source = _Points(points, k, self.chunk_bytes)
        pick = source.spread_rows if self.init == "k-means++" else source.random_rows
        return _iterate(source, torch.stack([points[pick(k, one)] for one in generators]), self)


@torch.no_grad()
def cosine_kmeans(
    points: Tensor,
    k: int,
    *,
    init: Init | Tensor = "random",
    centers: CenterKind = "mean",
    max_iterations: int = 100,
    tolerance: float = 1e-4,
    tolerance_kind: ToleranceKind = "relative",
    generator: torch.Generator | None = None,
    chunk_bytes: int | None = None,
) -> Clusters:
    """K-means with cosine assignment (section 3 of the paper).

    Args:
        points: (M, C) floating point, M >= ``k``.
        k: number of clusters.
        init: as for :class:`CosineKMeans`, or the first centres (``k``, C).
        centers, max_iterations, tolerance, tolerance_kind, chunk_bytes: as for
            :class:`CosineKMeans`.
        generator: on the CPU, draws the first centres; None: seeded with 0.

    Raises:
        ValueError: as :meth:`CosineKMeans.fit`, or if a shape is wrong.

    Example:
        >>> points = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 3.0]])
        >>> found = cosine_kmeans(points, 2, init=points[1:])
        >>> found.centers.tolist(), found.assignments.tolist()
        ([[3.0, 0.0], [0.0, 3.0]], [0, 0, 1])
    """
    name: Init = "random" if isinstance(init, Tensor) else init
    method = CosineKMeans(name, centers, max_iterations, tolerance, tolerance_kind, chunk_bytes)
    if not isinstance(init, Tensor):
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        return method.fit(points, k, [generator])[0]
    source = _Points(points, k, chunk_bytes)
    if init.shape != (k, points.shape[1]):
        raise ValueError(
            f"init has shape {tuple(init.shape)}; expected {(k, points.shape[1])}, one centre a row"
        )
    return _iterate(source, init[None], method)[0]


# -- The algorithm -----------------------------------------------------------------------------


def _iterate(points: _Points, current: Tensor, method: CosineKMeans) -> list[Clusters]:
    """Assign and update from the first centres (R, K, C) of R restarts until each converges."""
    current = current.to(points.rows.device, points.dtype)
    found: dict[int, Clusters] = {}
    running = list(range(len(current)))
    objective = current.new_full((len(current),), float("-inf"), dtype=torch.float64)
    state: _Assignment | None = None
    for iteration in range(1, method.max_iterations + 1):
        if iteration % FRESH_SUMS == 1:
            state = None
        state = points.assign(unit(current, dim=2), method.centers, state)
        _fill_empty(points, state, method.centers)
        to_unit = method.centers == "unit"
        updated = unit(state.sums, dim=2) if to_unit else state.sums / state.sizes[..., None]
        before, objective = objective, state.cosine.sum(1, dtype=torch.float64) / len(points.rows)
        if method.tolerance_kind == "absolute":
            shift = (updated - current).norm(dim=2).sum(1).square().double()
            converged = shift < method.tolerance
        else:
            distance = (1.0 - objective).clamp_min(NORM_EPSILON)
            converged = objective - before < method.tolerance * distance
        stops = [bool(done) or iteration == method.max_iterations for done in converged]
        for row, restart in enumerate(running):
            if stops[row]:
                found[restart] = Clusters(
                    updated[row].clone(),
                    updated[row].clone(),
                    state.labels[row].clone(),
                    state.sizes[row].clone(),
                    iteration,
                    bool(converged[row]),
                    float(objective[row]),
                )
        if all(stops):
            break
        if any(stops):
            state = None
        rows = [row for row, stop in enumerate(stops) if not stop]
        running, current, objective = [running[r] for r in rows], updated[rows], objective[rows]
    results = [found[restart] for restart in range(len(found))]
    if method.centers == "mean":
        return results
    sums = points.sums(torch.stack([one.assignments for one in results]), updated.shape[1], "mean")
    return [
        replace(one, means=total / one.sizes[:, None])
        for one, total in zip(results, sums, strict=True)
    ]


def _fill_empty(points: _Points, state: _Assignment, centers: CenterKind) -> None:
    """Move the point with the smallest cosine into each empty cluster (in place)."""
    restarts = torch.nonzero((state.sizes == 0).any(1)).flatten().tolist()
    for row in restarts:
        labels, sizes = state.labels[row], state.sizes[row].tolist()
        empty = [cluster for cluster, size in enumerate(sizes) if size == 0]
        for worst in torch.argsort(state.cosine[row], stable=True).tolist():
            if not empty:
                break
            owner = int(labels[worst])
            if sizes[owner] > 1:
                sizes[owner] -= 1
                labels[worst] = empty[0]
                sizes[empty.pop(0)] = 1
        state.sizes[row] = torch.tensor(sizes, device=labels.device)
    if restarts:
        state.sums = points.sums(state.labels, state.sizes.shape[1], centers)


@dataclass
class _Assignment:
    """Assignment of M points in R restarts, and the sums that give the next centres."""

    labels: Tensor
    """(R, M) int64"""
    cosine: Tensor
    """(R, M) cosine of each point to its centre"""
    sizes: Tensor
    """(R, K) int64"""
    sums: Tensor
    """(R, K, C) sums of the members"""
    summed: Tensor
    """(R, K) int64, the sizes when the sums were last computed from all points"""


# -- Reading the points ------------------------------------------------------------------------


class _Points:
    """Points (M, C), read in chunks of bounded size, and their norms."""

    def __init__(self, points: Tensor, k: int, chunk_bytes: int | None) -> None:
        if points.ndim != 2 or not points.is_floating_point():
            raise ValueError(
                f"points are {points.dtype} of shape {tuple(points.shape)}; expected floating "
                "point (M, C)"
            )
        if not 1 <= k <= len(points):
            raise ValueError(f"k is {k} for {len(points)} points; expected 1 to {len(points)}")
        half = points.dtype in (torch.float16, torch.bfloat16)
        self.rows = points
        self.dtype = torch.float32 if half else points.dtype
        if chunk_bytes is None:
            chunk_bytes = CPU_CHUNK_BYTES if points.device.type == "cpu" else DEVICE_CHUNK_BYTES
        row_bytes = max(1, points.shape[1] * self.dtype.itemsize)
        self.chunk = min(len(points), max(1, chunk_bytes // row_bytes))
        self._buffer = points.new_empty(self.chunk, points.shape[1], dtype=self.dtype)
        norms = [torch.linalg.vector_norm(part, dim=1) for _, part in self.chunks()]
        self.inverse_norm = torch.cat(norms).clamp_min_(NORM_EPSILON).reciprocal_()
        # The norm of a point with NaN or Inf is NaN or Inf, its inverse NaN or 0.
        if not bool((torch.isfinite(self.inverse_norm) & (self.inverse_norm > 0)).all()):
            raise ValueError("points contain NaN or Inf; check the features that were collected")

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of each chunk and its points (n, C) in the dtype of the sums."""
        for start in range(0, len(self.rows), self.chunk):
            place = slice(start, min(start + self.chunk, len(self.rows)))
            part = self.rows[place]
            if part.dtype != self.dtype:
                part = self._buffer[: len(part)].copy_(part)
            yield place, part

    def random_rows(self, k: int, generator: torch.Generator) -> Tensor:
        """(k,) int64, distinct random rows."""
        return torch.randperm(len(self.rows), generator=generator)[:k].to(self.rows.device)

    def spread_rows(self, k: int, generator: torch.Generator) -> Tensor:
        """(k,) int64, rows drawn one by one with weight 1 - cosine to the nearest so far.

        1 - cosine is half the squared distance of the unit vectors, the weight of k-means++.
        """
        count = len(self.rows)
        chosen = [int(torch.randint(count, (1,), generator=generator))]
        distance = torch.full((count,), float("inf"), dtype=torch.float64)
        for _ in range(k - 1):
            direction = self.rows[chosen[-1]].to(self.dtype) * self.inverse_norm[chosen[-1]]
            products = torch.cat([part @ direction for _, part in self.chunks()])
            to_last = 1.0 - (products * self.inverse_norm).double().cpu()
            distance = torch.minimum(distance, to_last.clamp_min(0.0))
            distance[chosen] = 0.0
            if float(distance.sum()) <= 0.0:  # all other points repeat a chosen one
                distance = torch.ones(count, dtype=torch.float64)
                distance[chosen] = 0.0
            cumulative = distance.cumsum(0)
            draw = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
            chosen.append(min(int(torch.searchsorted(cumulative, draw, right=True)), count - 1))
        return torch.tensor(chosen, device=self.rows.device)

    def assign(
        self, directions: Tensor, centers: CenterKind, previous: _Assignment | None = None
    ) -> _Assignment:
        """Assign every point to its nearest centre and sum the members, in one pass.

        Args:
            directions: (R, K, C) unit centres.
            centers: "unit" sums the normalised points, "mean" the raw ones.
            previous: the last assignment; its sums are updated by the points that changed cluster.
        """
        restarts, k, channels = directions.shape
        rows = self.rows
        sizes = rows.new_zeros(restarts, k, dtype=torch.int64)
        state = _Assignment(
            rows.new_empty(restarts, len(rows), dtype=torch.int64),
            rows.new_empty(restarts, len(rows), dtype=self.dtype),
            sizes if previous is None else previous.sizes.clone(),
            rows.new_zeros(restarts, k, channels, dtype=self.dtype),
            sizes if previous is None else previous.summed,
        )
        if previous is not None:
            state.sums += previous.sums
        columns = directions.flatten(0, 1).T.contiguous()
        for place, part in self.chunks():
            top = (part @ columns).view(-1, restarts, k).max(dim=2)
            state.labels[:, place] = top.indices.T
            torch.mul(top.values.T, self.inverse_norm[place], out=state.cosine[:, place])
            before = None if previous is None else previous.labels[:, place]
            self._add(state, place, part, centers, before)
        if previous is None:
            state.summed = state.sizes.clone()
        elif bool((2 * state.sizes < state.summed).any()):
            # The rest of a much larger sum has lost digits.
            state.sums = self.sums(state.labels, k, centers)
            state.summed = state.sizes.clone()
        return state

    def sums(self, labels: Tensor, k: int, centers: CenterKind) -> Tensor:
        """(R, K, C): sums of the members by labels (R, M)."""
        sizes = labels.new_zeros(len(labels), k)
        sums = self.rows.new_zeros(*sizes.shape, self.rows.shape[1], dtype=self.dtype)
        state = _Assignment(labels, self.inverse_norm, sizes, sums, sizes)
        for place, part in self.chunks():
            self._add(state, place, part, centers)
        return sums

    def _add(
        self,
        state: _Assignment,
        place: slice,
        part: Tensor,
        centers: CenterKind,
        before: Tensor | None = None,
    ) -> None:
        """Add a chunk's points (n, C) to the sums and sizes of their clusters (in place).

        With the labels ``before`` (R, n), only points that changed cluster are added and
        subtracted. The members of a cluster are summed in their order, whatever the device.
        """
        restarts, k, _ = state.sums.shape
        offsets = torch.arange(0, restarts * k, k, device=part.device)[:, None]
        clusters = (state.labels[:, place] + offsets).flatten()
        entries = torch.arange(len(clusters), device=part.device)
        factors: Tensor | None = None
        if before is None:
            sizes = torch.bincount(clusters, minlength=restarts * k)
            state.sizes += sizes.view_as(state.sizes)
        else:
            left = (before + offsets).flatten()
            moved = torch.nonzero(clusters != left).squeeze(1)
            gained, lost = (
                torch.bincount(one[moved], minlength=restarts * k) for one in (clusters, left)
            )
            state.sizes += (gained - lost).view_as(state.sizes)
            sizes = gained + lost
            clusters, entries = torch.cat([clusters[moved], left[moved]]), torch.cat([moved, moved])
        if not len(entries):
            return
        order = torch.argsort(clusters, stable=True)
        members = entries[order] % len(part)
        if centers == "unit":
            factors = self.inverse_norm[place][members]
        if before is not None:
            signs = torch.where(order < len(entries) // 2, 1.0, -1.0).to(part.dtype)
            factors = signs if factors is None else signs * factors
        state.sums += F.embedding_bag(
            members, part, sizes.cumsum(0) - sizes, mode="sum", per_sample_weights=factors
        ).view_as(state.sums)


CLUSTERINGS: Registry[Callable[[Any], Clustering]] = Registry(
    "clustering",
    "lpcam.clusterings",
    {"cosine_kmeans": "lpcam.method.clustering:from_settings"},
)
"""Clustering methods by name: each makes a :class:`Clustering` from settings of the fit."""
from_settings = CosineKMeans.of_settings
