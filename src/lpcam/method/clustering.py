"""Cosine k-means, and the protocol of a clustering method (section 3 of the paper)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, Protocol

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.method.functional import NORM_EPSILON, unit
from lpcam.runtime.registry import Registry

Init = Literal["random", "k-means++"]
CenterKind = Literal["mean", "unit"]
ToleranceKind = Literal["absolute", "relative"]
CPU_CHUNK_BYTES = 16 * 2**20  #: Size of a chunk on a CPU: a share of the processor's cache.
DEVICE_CHUNK_BYTES = 256 * 2**20  #: Size of a chunk on another device.
FRESH_SUMS = 8
"""All sums are recomputed after this many iterations, to limit the rounding error of updates."""


@dataclass(frozen=True)
class Clusters:
    """Result of clustering points (M, C) into K clusters."""

    centers: Tensor  #: (K, C), floating point: the centres that equation 5 compares features with.
    means: Tensor
    """(K, C), floating point: plain means of the members, which equations 3 and 4 score."""
    assignments: Tensor  #: (M,) int64 in 0..K-1, the cluster of each point.
    sizes: Tensor  #: (K,) int64, number of members of each cluster.
    iterations: int
    converged: bool  #: False if the method stopped at its maximum number of iterations.
    objective: float
    """Mean cosine of the points to their centres at the last assignment, in [-1, 1]."""


class Clustering(Protocol):
    """A clustering method."""

    def fit(self, points: Tensor, k: int, generators: Sequence[torch.Generator]) -> list[Clusters]:
        """Cluster points (M, C), M >= ``k``, once for each generator, on the points' device.

        There may be fewer clusters than ``k``, but none is empty. The generators are on the CPU and
        the only source of randomness.
        """
        ...


@pydantic.dataclasses.dataclass(frozen=True)
class CosineKMeans:
    """K-means with cosine assignment, as a :class:`Clustering`.

    Each point is assigned to the centre with the largest cosine; a zero point has cosine 0 to every
    centre. An empty cluster takes the point that has the smallest cosine to its centre.

    Args:
        init: "random" draws K distinct points as first centres, "k-means++" points far from each
            other by cosine distance.
        centers: "mean": the plain mean of the members, so that longer points count more (the
            released program). "unit": the normalised mean of the normalised members.
        tolerance: the iterations stop when the change is below it.
        tolerance_kind: "absolute": squared sum of the shifts of the centres (the released program,
            with tolerance 5). "relative": gain of the objective divided by 1 - objective.
    """

    init: Init = "random"
    centers: CenterKind = "mean"
    max_iterations: Annotated[int, pydantic.Field(ge=1)] = 100
    tolerance: float = 1e-4
    tolerance_kind: ToleranceKind = "relative"

    @torch.no_grad()
    def fit(self, points: Tensor, k: int, generators: Sequence[torch.Generator]) -> list[Clusters]:
        """See :meth:`Clustering.fit`; ValueError for points that are too few, NaN or Inf."""
        source = _Points(points, k)
        pick = source.spread_rows if self.init == "k-means++" else source.random_rows
        return _iterate(source, torch.stack([points[pick(k, one)] for one in generators]), self)


def from_settings(settings: Any) -> CosineKMeans:
    """The method with values of settings."""
    return CosineKMeans(**{one.name: getattr(settings, one.name) for one in fields(CosineKMeans)})


CLUSTERINGS: Registry[Callable[[Any], Clustering]] = Registry(
    "clustering",
    "lpcam.clusterings",
    {
        "cosine_kmeans": "lpcam.method.clustering:from_settings",
        "kmeans": "lpcam.method.sklearn_clustering:kmeans",
        "kmeans_silhouette": "lpcam.method.sklearn_clustering:kmeans_silhouette",
        "agglomerative": "lpcam.method.sklearn_clustering:agglomerative",
        "nmf": "lpcam.method.sklearn_clustering:nmf",
        "spherical_mixture": "lpcam.method.sklearn_clustering:spherical_mixture",
    },
)
"""Clustering methods by name: each makes a :class:`Clustering` from settings of the fit."""


@torch.no_grad()
def cosine_kmeans(
    points: Tensor,
    k: int,
    *,
    init: Init | Tensor = "random",
    generator: torch.Generator | None = None,
    **options: Any,
) -> Clusters:
    """K-means with cosine assignment (section 3 of the paper), once; raises as CosineKMeans does.

    Args:
        points: (M, C) floating point, M >= ``k``.
        init: as for :class:`CosineKMeans`, or the first centres (``k``, C).
        generator: CPU generator that draws the first centres; None: one seeded with 0.
        options: the other fields of :class:`CosineKMeans`.

    Example:
        >>> points = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 3.0]])
        >>> found = cosine_kmeans(points, 2, init=points[1:])
        >>> found.centers.tolist(), found.assignments.tolist()
        ([[3.0, 0.0], [0.0, 3.0]], [0, 0, 1])
    """
    if not isinstance(init, Tensor):
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        return CosineKMeans(init=init, **options).fit(points, k, [generator])[0]
    source = _Points(points, k)
    if init.shape != (k, points.shape[1]):
        raise ValueError(
            f"init has shape {tuple(init.shape)}; expected {(k, points.shape[1])}, one centre a row"
        )
    return _iterate(source, init[None], CosineKMeans(**options))[0]


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
            converged = (shift < method.tolerance).tolist()
        else:
            distance = (1.0 - objective).clamp_min(NORM_EPSILON)
            converged = (objective - before < method.tolerance * distance).tolist()
        going = []
        for row, done in enumerate(converged):
            if not done and iteration < method.max_iterations:
                going.append(row)
                continue
            centers, labels, sizes = (
                one[row].clone() for one in (updated, state.labels, state.sizes)
            )
            found[running[row]] = Clusters(
                centers, centers, labels, sizes, iteration, done, float(objective[row])
            )
        if not going:
            break
        if len(going) < len(running):
            state = None
        running = [running[row] for row in going]
        current, objective = updated[going], objective[going]
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
        worst = iter(torch.argsort(state.cosine[row], stable=True).tolist())
        for empty in [cluster for cluster, size in enumerate(sizes) if size == 0]:
            point = next(point for point in worst if sizes[int(labels[point])] > 1)
            sizes[int(labels[point])] -= 1
            sizes[empty] = 1
            labels[point] = empty
        state.sizes[row] = torch.tensor(sizes, device=labels.device)
    if restarts:
        state.sums = points.sums(state.labels, state.sizes.shape[1], centers)


@dataclass
class _Assignment:
    """Assignment of M points in R restarts, and the sums that give the next centres."""

    labels: Tensor  # (R, M) int64
    cosine: Tensor  # (R, M) cosine of each point to its centre
    sizes: Tensor  # (R, K) int64
    sums: Tensor  # (R, K, C) sums of the members
    summed: Tensor  # (R, K) the sizes when the sums were last computed from all points


class _Points:
    """Points (M, C), read in chunks of bounded size, and their norms."""

    def __init__(self, points: Tensor, k: int) -> None:
        if points.ndim != 2 or not points.is_floating_point() or not 1 <= k <= len(points):
            raise ValueError(
                f"points are {points.dtype} of shape {tuple(points.shape)} and k is {k}; expected "
                "floating point (M, C), and k from 1 to M"
            )
        self.rows = points
        self.dtype = torch.promote_types(points.dtype, torch.float32)
        row_bytes = max(1, points.shape[1] * self.dtype.itemsize)
        chunk_bytes = CPU_CHUNK_BYTES if points.device.type == "cpu" else DEVICE_CHUNK_BYTES
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
            part = self.rows[start : start + self.chunk]
            place = slice(start, start + len(part))
            yield place, part if part.dtype == self.dtype else self._buffer[: len(part)].copy_(part)

    def random_rows(self, k: int, generator: torch.Generator) -> Tensor:
        """(k,) int64, distinct random rows."""
        return torch.randperm(len(self.rows), generator=generator)[:k].to(self.rows.device)

    def spread_rows(self, k: int, generator: torch.Generator) -> Tensor:
        """(k,) int64, rows drawn one by one with weight 1 - cosine to the nearest so far."""
        # That is half the squared distance of the unit vectors, the weight of k-means++.
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
                distance.fill_(1.0)[chosen] = 0.0
            cumulative = distance.cumsum(0)
            draw = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
            chosen.append(min(int(torch.searchsorted(cumulative, draw, right=True)), count - 1))
        return torch.tensor(chosen, device=self.rows.device)

    def assign(
        self, directions: Tensor, centers: CenterKind, previous: _Assignment | None = None
    ) -> _Assignment:
        """Assign every point to its nearest unit centre (R, K, C) and sum its members."""
        restarts, k, _ = directions.shape
        state = self._empty(self.rows.new_empty(restarts, len(self.rows), dtype=torch.int64), k)
        if previous is not None:
            state.sizes += previous.sizes
            state.sums += previous.sums
            state.summed = previous.summed
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
        state = self._empty(labels, k)
        for place, part in self.chunks():
            self._add(state, place, part, centers)
        return state.sums

    def _empty(self, labels: Tensor, k: int) -> _Assignment:
        sizes = labels.new_zeros(len(labels), k)
        sums = self.rows.new_zeros(*sizes.shape, self.rows.shape[1], dtype=self.dtype)
        return _Assignment(labels, torch.empty_like(labels, dtype=self.dtype), sizes, sums, sizes)

    def _add(
        self,
        state: _Assignment,
        place: slice,
        part: Tensor,
        centers: CenterKind,
        before: Tensor | None = None,
    ) -> None:
        """Add a chunk's points (n, C), or those that moved, to sums and sizes."""
        restarts, k, _ = state.sums.shape
        offsets = torch.arange(0, restarts * k, k, device=part.device)[:, None]
        clusters = (state.labels[:, place] + offsets).flatten()
        entries, added = torch.arange(len(clusters), device=part.device), len(clusters)
        if before is not None:
            left = (before + offsets).flatten()
            moved = torch.nonzero(clusters != left).squeeze(1)
            clusters = torch.cat([clusters[moved], left[moved]])
            entries, added = torch.cat([moved, moved]), len(moved)
        if not len(entries):
            return
        gained, lost = (
            torch.bincount(one, minlength=restarts * k)
            for one in (clusters[:added], clusters[added:])
        )
        state.sizes += (gained - lost).view_as(state.sizes)
        order = torch.argsort(clusters, stable=True)
        members = entries[order] % len(part)
        factors = self.inverse_norm[place][members] if centers == "unit" else None
        if before is not None:
            signs = torch.where(order < added, 1.0, -1.0).to(part.dtype)
            factors = signs if factors is None else signs * factors
        starts = (gained + lost).cumsum(0) - (gained + lost)
        state.sums += F.embedding_bag(
            members, part, starts, mode="sum", per_sample_weights=factors
        ).view_as(state.sums)
