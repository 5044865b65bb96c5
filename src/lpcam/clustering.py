"""Cosine k-means of many groups of rows at once: one sweep over the rows an iteration, bounded.

A sweep takes the rows chunk by chunk. While a chunk is in the processor's cache its rows are
brought to single precision, measured, given to the nearest centre of every restart by one product
with the centres of all restarts, and added to the sums of their clusters: after the first sweep,
only those that changed their cluster. So half-precision rows are never held in single precision as
a whole, and nothing of rows x clusters x channels is made.

On a CPU each group is a batch of its own, and several batches may be on several threads. On another
device groups of equal kind are padded into batches of bounded size, so that few launches serve many
groups; rows of padding belong to no cluster. Both run the same lines.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.functional import NORM_EPSILON, unit
from lpcam.parallel import ordered_map

logger = logging.getLogger(__name__)

CPU_CHUNK_BYTES = 16 * 2**20
"""Rows of a chunk on a CPU: small enough for a share of the cache, large enough for its threads."""
DEVICE_CHUNK_BYTES = 256 * 2**20
"""Rows of a chunk elsewhere: enough to fill the device."""
FRESH_SUMS = 8
"""The sums of all rows are made afresh after so many sweeps, lest rounding errors pile up."""
SAMPLE_ITERATIONS = 100
"""Bound of the sweeps over each sample of a warm start."""
BATCH_BYTES = 2**30
"""Padded rows of a batch; a larger group goes alone, unpadded."""


@dataclass(frozen=True)
class KMeansResult:
    """What :func:`cosine_kmeans` found."""

    centers: Tensor
    """(K, C), in the scale of the data for ``centers="mean"``, unit rows for ``"unit"``."""
    means: Tensor
    """(K, C), plain means of the raw members; the centres themselves for ``centers="mean"``."""
    assignments: Tensor
    """(M,) int64 in 0..K-1: the nearest of the centres before their last update."""
    sizes: Tensor
    """(K,) int64, members of each cluster by ``assignments``."""
    iterations: int
    """Sweeps over all rows; those of a warm start over its sample do not count."""
    converged: bool
    objective: float
    """Mean cosine of the rows to their centres, in [-1, 1], at the last assignment."""


@dataclass(frozen=True)
class Group:
    """Rows to be clustered, and the first centres of each restart."""

    rows: Tensor
    """(M, C), M >= clusters, floating point; half precision stays so."""
    clusters: int
    """K."""
    starts: tuple[torch.Generator | Tensor, ...]
    """One entry a restart: a generator on the CPU that draws the first centres, or (K, C)."""


@dataclass(frozen=True)
class _Choices:
    """The arguments of :func:`cosine_kmeans` that hold for every group."""

    init: Literal["random", "k-means++"]
    centers: Literal["mean", "unit"]
    max_iterations: int
    tolerance: float
    tolerance_kind: Literal["absolute", "relative"]
    warm_start: int | None
    chunk_bytes: int | None


def cosine_kmeans(
    rows: Tensor,
    clusters: int,
    *,
    init: Literal["random", "k-means++"] | Tensor = "random",
    centers: Literal["mean", "unit"] = "mean",
    max_iterations: int = 100,
    tolerance: float = 1e-4,
    tolerance_kind: Literal["absolute", "relative"] = "relative",
    generator: torch.Generator | None = None,
    warm_start: int | None = None,
    chunk_bytes: int | None = None,
) -> KMeansResult:
    """K-means with cosine assignment.

    A row joins the centre of greatest cosine. A centre becomes the plain mean of its raw members
    (``centers="mean"``: long rows weigh more, as in the released program) or the unit-normalised
    mean of its unit members (``"unit"``: spherical k-means). An empty cluster takes the row that is
    worst served by its own centre. Zero rows have cosine 0 to every centre.

    Args:
        rows: (M, C) floating point, M >= clusters. Half precision is summed in single precision,
            and the centres are then in single precision.
        clusters: K.
        init: K distinct random rows, k-means++ on cosine distance, or a (K, C) tensor of centres.
        tolerance: with "absolute", stop when (sum_k |shift of centre k|)^2 is below it (the
            released program's rule, whose value is 5); with "relative", when the objective gains
            less than tolerance * (1 - objective).
        generator: of the random choices, on the CPU; the default is seeded with 0.
        warm_start: with more rows than this, so many of them, drawn at random, are clustered first,
            from the same first centres and to the same tolerance, and all rows go on from there; a
            quarter of them goes ahead in the same way. Fewer sweeps over all rows then reach
            the same objective: a fifth of the rows is a good choice where they are many. The
            samples' sweeps are not bounded by max_iterations. None: all rows from the start.
        chunk_bytes: bound of the single-precision rows held at once; None chooses by the device.

    Raises:
        ValueError: for a wrong shape, fewer rows than clusters, or NaN or Inf in the rows.
    """
    start: torch.Generator | Tensor
    if isinstance(init, Tensor):
        start, init = init, "random"
    else:
        start = torch.Generator().manual_seed(0) if generator is None else generator
    choices = _Choices(
        init, centers, max_iterations, tolerance, tolerance_kind, warm_start, chunk_bytes
    )
    group = Group(rows, clusters, (start,))
    _check(choices)
    _check_group(group)
    ((result,),) = _cluster([group], choices, rows.device)
    _warn([result], choices)
    return result


def cosine_kmeans_groups(
    groups: Sequence[Group],
    *,
    init: Literal["random", "k-means++"] = "random",
    centers: Literal["mean", "unit"] = "mean",
    max_iterations: int = 100,
    tolerance: float = 1e-4,
    tolerance_kind: Literal["absolute", "relative"] = "relative",
    warm_start: int | None = None,
    device: torch.device | None = None,
    workers: int = 1,
    chunk_bytes: int | None = None,
    batch_bytes: int = BATCH_BYTES,
) -> list[tuple[KMeansResult, ...]]:
    """:func:`cosine_kmeans` of many groups and restarts at once, each as if it were alone.

    (But for rounding, where groups are padded into batches.)

    The restarts of a group share each reading of its rows. The rows are moved to the device batch
    by batch, so that they may wait in the machine's memory.

    Args:
        groups: all with the same number of channels.
        device: where to compute; None: where the first group's rows are.
        workers: threads, a group each, on a CPU. Every group is computed by one thread, so the
            result does not depend on their number.
        batch_bytes: bound of the padded rows of several groups together, not on a CPU.

    Returns:
        for each group, one result a restart, on ``device``.

    Raises:
        ValueError: as :func:`cosine_kmeans`.
    """
    choices = _Choices(
        init, centers, max_iterations, tolerance, tolerance_kind, warm_start, chunk_bytes
    )
    _check(choices)
    for group in groups:
        _check_group(group)
    if not groups:
        return []
    device = groups[0].rows.device if device is None else torch.device(device)
    found: list[tuple[KMeansResult, ...]] = [()] * len(groups)
    # Large groups first, so that no thread is left alone with one at the end.
    order = sorted(range(len(groups)), key=lambda number: -groups[number].rows.shape[0])
    if device.type == "cpu":
        batches = [[number] for number in order]
        cluster = partial(_cluster_numbers, groups, choices, device)
        results = ordered_map(cluster, batches, workers)
    else:
        batches = _alike(groups, order, batch_bytes)
        results = (_cluster_numbers(groups, choices, device, batch) for batch in batches)
    for batch, outcome in zip(batches, results, strict=True):
        for number, result in zip(batch, outcome, strict=True):
            found[number] = result
    _warn([result for restarts in found for result in restarts], choices)
    return found


def _check(choices: _Choices) -> None:
    if choices.init not in ("random", "k-means++"):
        raise ValueError(
            f"unknown init {choices.init!r}; use 'random', 'k-means++' or first centres"
        )
    if choices.centers not in ("mean", "unit"):
        raise ValueError(f"unknown centers {choices.centers!r}; use 'mean' or 'unit'")
    if choices.tolerance_kind not in ("absolute", "relative"):
        raise ValueError(
            f"unknown tolerance_kind {choices.tolerance_kind!r}; use 'absolute' or 'relative'"
        )
    if choices.max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {choices.max_iterations}")


def _check_group(group: Group) -> None:
    rows, clusters = group.rows, group.clusters
    if rows.ndim != 2 or not rows.is_floating_point():
        raise ValueError(
            f"expected floating-point rows (M, C), got {rows.dtype} of shape {tuple(rows.shape)}"
        )
    if clusters < 1 or rows.shape[0] < clusters:
        raise ValueError(
            f"expected at least as many rows as clusters, got {rows.shape[0]} rows for {clusters}"
        )
    for start in group.starts:
        if isinstance(start, Tensor) and start.shape != (clusters, rows.shape[1]):
            raise ValueError(
                f"expected first centres of shape {(clusters, rows.shape[1])}, "
                f"got {tuple(start.shape)}"
            )


def _warn(results: Sequence[KMeansResult], choices: _Choices) -> None:
    stopped = sum(not result.converged for result in results)
    if stopped:
        logger.warning(
            "%d of %d clusterings stopped at max_iterations=%d before their tolerance (%s %g) was "
            "reached; raise max_iterations or the tolerance",
            stopped,
            len(results),
            choices.max_iterations,
            choices.tolerance_kind,
            choices.tolerance,
        )


# -- Batches -----------------------------------------------------------------------------------


def _alike(groups: Sequence[Group], order: Sequence[int], batch_bytes: int) -> list[list[int]]:
    """Numbers of groups that may share a batch: of one kind, of like length, bounded in bytes."""
    kinds: dict[object, list[int]] = {}
    for number in order:
        group = groups[number]
        kind = (group.clusters, len(group.starts), group.rows.dtype, group.rows.shape[1])
        kinds.setdefault(kind, []).append(number)
    batches: list[list[int]] = []
    for numbers in kinds.values():
        batch: list[int] = []
        for number in numbers:
            longest = groups[batch[0] if batch else number].rows
            size = longest.numel() * longest.element_size()
            if batch and (len(batch) + 1) * size > batch_bytes:
                batches.append(batch)
                batch = []
            batch.append(number)
        batches.append(batch)
    return batches


def _cluster_numbers(
    groups: Sequence[Group], choices: _Choices, device: torch.device, numbers: Sequence[int]
) -> list[tuple[KMeansResult, ...]]:
    return _cluster([groups[number] for number in numbers], choices, device)


class _Batch:
    """Groups of one kind beside each other: (G, M, C), the shorter ones padded with zero rows."""

    def __init__(self, rows: Tensor, counts: Tensor, chunk_bytes: int | None) -> None:
        half = rows.dtype in (torch.float16, torch.bfloat16)
        self.rows = rows
        self.counts = counts
        self.dtype = torch.float32 if half else rows.dtype
        self.chunk_bytes = chunk_bytes
        if chunk_bytes is None:
            chunk_bytes = CPU_CHUNK_BYTES if rows.device.type == "cpu" else DEVICE_CHUNK_BYTES
        row_bytes = rows.shape[0] * rows.shape[2] * self.dtype.itemsize
        self.chunk = min(rows.shape[1], max(1, chunk_bytes // row_bytes))
        self.inverse_norm = rows.new_empty(rows.shape[:2], dtype=self.dtype)
        """(G, M), known after :meth:`measure` or the first sweep."""
        self.measured = False
        self._buffer = (
            rows.new_empty(rows.shape[0], self.chunk, rows.shape[2], dtype=self.dtype)
            if half
            else None
        )

    @classmethod
    def of(cls, groups: Sequence[Group], device: torch.device, chunk_bytes: int | None) -> _Batch:
        lengths = [group.rows.shape[0] for group in groups]
        counts = torch.tensor(lengths, device=device)
        first = groups[0].rows
        if len(groups) == 1:
            return cls(first.to(device)[None], counts, chunk_bytes)
        rows = torch.zeros(
            len(groups), max(lengths), first.shape[1], dtype=first.dtype, device=device
        )
        for place, group in zip(rows, groups, strict=True):
            place[: group.rows.shape[0]] = group.rows
        return cls(rows, counts, chunk_bytes)

    def part(self, keep: Sequence[int]) -> _Batch:
        """Some of the groups."""
        taken = torch.tensor(keep, device=self.rows.device)
        counts = self.counts[taken]
        longest = int(counts.max())  # a group that is left alone must have no padding
        batch = _Batch(self.rows[taken, :longest], counts, self.chunk_bytes)
        batch.inverse_norm = self.inverse_norm[taken, :longest]
        batch.measured = self.measured
        return batch

    def chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        """First and last number of each chunk and its rows (G, n, C) in the type of the sums."""
        for start in range(0, self.rows.shape[1], self.chunk):
            end = min(start + self.chunk, self.rows.shape[1])
            part = self.rows[:, start:end]
            if self._buffer is None:
                yield start, end, part
            else:
                yield start, end, self._buffer[:, : end - start].copy_(part)

    def measure(self, start: int, end: int, part: Tensor) -> None:
        """Note the norms of a chunk."""
        norm = torch.linalg.vector_norm(part, dim=2).clamp_min_(NORM_EPSILON)
        self.inverse_norm[:, start:end] = norm.reciprocal_()

    def sweep(
        self,
        directions: Tensor,
        *,
        members: Literal["mean", "unit"],
        previous: _Assigned | None = None,
    ) -> _Assigned:
        """Assign every row and sum the members of every cluster, reading the rows once.

        Args:
            directions: (G, R, K, C) unit centres.
            members: "unit" sums the unit rows, "mean" the raw ones.
            previous: what an earlier sweep over the same rows found; only the rows that have
                changed their cluster since are then added and taken away.
        """
        count, restarts, clusters, channels = directions.shape
        shape = (count, restarts, self.rows.shape[1])
        found = _Assigned(
            torch.empty(shape, dtype=torch.int64, device=self.rows.device),
            self.rows.new_empty(shape, dtype=self.dtype),
            self.rows.new_zeros(count, restarts, clusters, dtype=torch.int64),
            self.rows.new_zeros(count, restarts, clusters, channels, dtype=self.dtype),
            self.rows.new_zeros(count, restarts, clusters, dtype=torch.int64),
        )
        if previous is not None:
            found.sizes += previous.sizes
            found.sums += previous.sums
            found.summed = previous.summed
        columns = directions.flatten(1, 2).transpose(1, 2).contiguous()
        for start, end, part in self.chunks():
            if not self.measured:
                self.measure(start, end, part)
            products = (part @ columns).view(count, -1, restarts, clusters)
            top = products.max(dim=3)
            inverse_norm = self.inverse_norm[:, start:end]
            labels = top.indices.transpose(1, 2)
            found.labels[:, :, start:end] = labels
            torch.mul(
                top.values.transpose(1, 2),
                inverse_norm[:, None],
                out=found.similarity[:, :, start:end],
            )
            weights = inverse_norm if members == "unit" else None
            before = None if previous is None else previous.labels[:, :, start:end]
            self._add(found, labels, start, part, weights, before)
        if not self.measured:
            # A row with NaN or Inf has no finite norm, and every finite row a positive inverse.
            finite = torch.isfinite(self.inverse_norm) & (self.inverse_norm > 0)
            if not bool(finite.all()):
                raise ValueError("the rows hold NaN or Inf; check the features that were collected")
            self.measured = True
        if previous is None:
            found.summed = found.sizes.clone()
        elif bool((2 * found.sizes < found.summed).any()):
            # What is left of a much larger sum has lost digits.
            found.sums = self.sums(found.labels, clusters, members=members)
            found.summed = found.sizes.clone()
        return found

    def sums(self, labels: Tensor, clusters: int, *, members: Literal["mean", "unit"]) -> Tensor:
        """(G, R, K, C): sums of the members by labels (G, R, M)."""
        shape = (*labels.shape[:2], clusters)
        found = _Assigned(
            labels,
            self.inverse_norm,
            self.rows.new_zeros(shape, dtype=torch.int64),
            self.rows.new_zeros(*shape, self.rows.shape[2], dtype=self.dtype),
            self.rows.new_zeros(shape, dtype=torch.int64),
        )
        for start, end, part in self.chunks():
            weights = self.inverse_norm[:, start:end] if members == "unit" else None
            self._add(found, labels[:, :, start:end], start, part, weights)
        return found.sums

    def _add(
        self,
        found: _Assigned,
        labels: Tensor,
        start: int,
        part: Tensor,
        weights: Tensor | None,
        before: Tensor | None = None,
    ) -> None:
        """Add the rows (G, n, C) of a chunk to the sums and sizes of their clusters.

        With the labels ``before``, rows are moved from there, and the others left alone. The rows
        of a cluster are added up where they lie, in their order, whatever the device.
        """
        count, restarts, clusters, channels = found.sums.shape
        length = part.shape[1]
        bins = count * restarts * clusters
        numbers = self._bins(labels, start, clusters)
        if before is None:
            entries = torch.arange(len(numbers), device=numbers.device)
            gained, sizes = entries, torch.bincount(numbers, minlength=bins + 1)[:bins]
            found.sizes += sizes.view_as(found.sizes)
        else:
            old = self._bins(before, start, clusters)
            gained = torch.nonzero(numbers != old).squeeze(1)
            if len(gained) == 0:
                return
            numbers, old = numbers[gained], old[gained]
            more, less = (torch.bincount(n, minlength=bins) for n in (numbers, old))
            found.sizes += (more - less).view_as(found.sizes)
            sizes = more + less
            numbers, entries = torch.cat([numbers, old]), torch.cat([gained, gained])
        ends = sizes.cumsum(0)
        order = torch.argsort(numbers, stable=True)
        if count > 1:
            order = order[: int(ends[-1])]
        entries = entries[order]
        members = entries % length
        if count > 1:
            members += entries // (restarts * length) * length
        factors = None if weights is None else weights.flatten()[members]
        if before is not None:
            signs = torch.where(order < len(gained), 1.0, -1.0).to(part.dtype)
            factors = signs if factors is None else signs * factors
        if len(members):
            found.sums += F.embedding_bag(
                members,
                part.reshape(-1, channels),
                ends - sizes,
                mode="sum",
                per_sample_weights=factors,
            ).view_as(found.sums)

    def _bins(self, labels: Tensor, start: int, clusters: int) -> Tensor:
        """The clusters (G, R, n) of a chunk numbered over groups and restarts; padding last."""
        count, restarts, length = labels.shape
        bins = count * restarts * clusters
        device = labels.device
        numbers = labels + torch.arange(0, bins, clusters, device=device).view(count, restarts, 1)
        if count > 1:  # a group alone has no padding
            beyond = torch.arange(start, start + length, device=device) >= self.counts[:, None]
            numbers = numbers.masked_fill(beyond[:, None], bins)
        return numbers.flatten()


@dataclass
class _Assigned:
    """What a sweep finds for G groups and R restarts."""

    labels: Tensor
    """(G, R, M) int64; of padding without meaning"""
    similarity: Tensor
    """(G, R, M) cosine of each row to its centre; 0 of padding"""
    sizes: Tensor
    """(G, R, K) int64"""
    sums: Tensor
    """(G, R, K, C)"""
    summed: Tensor
    """(G, R, K) int64, the sizes when the sums were last made of all rows"""


# -- Iterations --------------------------------------------------------------------------------


def _cluster(
    groups: Sequence[Group], choices: _Choices, device: torch.device
) -> list[tuple[KMeansResult, ...]]:
    """Results of groups of one kind, in one batch."""
    with torch.no_grad():
        groups = [_with_first_centers(group, choices) for group in groups]
        if choices.warm_start is not None:
            groups = _warmed(groups, choices, choices.warm_start, device)
        return _iterate(groups, choices, device)


def _with_first_centers(group: Group, choices: _Choices) -> Group:
    starts = []
    for start in group.starts:
        if isinstance(start, Tensor):
            starts.append(start)
        elif choices.init == "k-means++":
            starts.append(group.rows[_plus_plus(group.rows, group.clusters, start)])
        else:
            order = torch.randperm(group.rows.shape[0], generator=start)[: group.clusters]
            starts.append(group.rows[order.to(group.rows.device)])
    return replace(group, starts=tuple(starts))


def _warmed(
    groups: Sequence[Group], choices: _Choices, sample: int, device: torch.device
) -> list[Group]:
    """The groups with the centres that a random sample of their rows converges to.

    A quarter of the sample goes first, to a looser tolerance: most of the way is cheap there.
    """
    results = []
    for group in groups:
        size = max(sample, group.clusters)
        if group.rows.shape[0] <= size:
            results.append(group)
            continue
        generator = torch.Generator().manual_seed(size)
        # With replacement: to draw without costs a shuffle of all row numbers for no gain.
        drawn = torch.randint(group.rows.shape[0], (size,), generator=generator)
        rows = group.rows[drawn.to(group.rows.device)].to(device)
        starts = group.starts
        for count, looser in ((max(size // 4, group.clusters), 10), (size, 1)):
            loose = replace(
                choices,
                max_iterations=SAMPLE_ITERATIONS,
                tolerance=looser * choices.tolerance,
            )
            (found,) = _iterate([replace(group, rows=rows[:count], starts=starts)], loose, device)
            starts = tuple(result.centers for result in found)
        results.append(replace(group, starts=starts))
    return results


def _iterate(
    groups: Sequence[Group], choices: _Choices, device: torch.device
) -> list[tuple[KMeansResult, ...]]:
    whole = batch = _Batch.of(groups, device, choices.chunk_bytes)
    clusters, members = groups[0].clusters, choices.centers
    current = torch.stack(
        [
            torch.stack([torch.as_tensor(start).to(device, whole.dtype) for start in group.starts])
            for group in groups
        ]
    )
    results: dict[tuple[int, int], KMeansResult] = {}
    # Numbers of the groups and restarts that are still in the batch.
    here = list(range(len(groups)))
    restarts = list(range(len(groups[0].starts)))
    before = torch.full(current.shape[:2], float("-inf"), dtype=torch.float64)
    found: _Assigned | None = None
    for iteration in range(1, choices.max_iterations + 1):
        if iteration % FRESH_SUMS == 1:
            found = None
        found = batch.sweep(unit(current, dim=3), members=members, previous=found)
        _repair(batch, found, members)
        updated = (
            unit(found.sums, dim=3) if members == "unit" else found.sums / found.sizes[..., None]
        )
        shift = (updated - current).norm(dim=3).sum(2).square().double()
        reached = found.similarity.sum(2, dtype=torch.float64) / batch.counts[:, None]
        shift, reached = torch.stack([shift, reached]).cpu()
        if choices.tolerance_kind == "absolute":
            converged = shift < choices.tolerance
        else:
            gain = reached - before
            converged = gain < choices.tolerance * (1.0 - reached).clamp_min(NORM_EPSILON)
        for row, group in enumerate(here):
            for column, restart in enumerate(restarts):
                done = bool(converged[row, column])
                if (group, restart) in results or not (done or iteration == choices.max_iterations):
                    continue
                centers = updated[row, column].clone()
                results[group, restart] = KMeansResult(
                    centers,
                    centers,
                    found.labels[row, column, : groups[group].rows.shape[0]].clone(),
                    found.sizes[row, column].clone(),
                    iteration,
                    done,
                    float(reached[row, column]),
                )
        if len(results) == len(groups) * len(groups[0].starts):
            break
        # What is done leaves: a restart as soon as it is done in every group, groups when they are
        # at least half, for that copies the rows of the others.
        columns = [c for c, r in enumerate(restarts) if any((g, r) not in results for g in here)]
        rows = [n for n, g in enumerate(here) if any((g, r) not in results for r in restarts)]
        if 2 * len(rows) > len(here):
            rows = list(range(len(here)))
        else:
            batch = batch.part(rows)
        current, before = updated[rows][:, columns], reached[rows][:, columns]
        if len(rows) < len(here) or len(columns) < len(restarts):
            found = None
        here, restarts = [here[n] for n in rows], [restarts[c] for c in columns]
    if members == "unit":
        _fill_means(whole, results, clusters)
    return [
        tuple(results[number, restart] for restart in range(len(group.starts)))
        for number, group in enumerate(groups)
    ]


def _fill_means(batch: _Batch, results: dict[tuple[int, int], KMeansResult], clusters: int) -> None:
    """Put the plain means of the members into the results of spherical clusters."""
    count, restarts = (max(numbers) + 1 for numbers in zip(*results, strict=True))
    labels = batch.rows.new_zeros(count, restarts, batch.rows.shape[1], dtype=torch.int64)
    for (group, restart), result in results.items():
        labels[group, restart, : len(result.assignments)] = result.assignments
    sums = batch.sums(labels, clusters, members="mean")
    for (group, restart), result in results.items():
        means = sums[group, restart] / result.sizes[:, None]
        results[group, restart] = replace(result, means=means)


def _repair(batch: _Batch, found: _Assigned, members: Literal["mean", "unit"]) -> None:
    """Give each empty cluster the worst-served row of a cluster that keeps one (in place)."""
    if bool((found.sizes > 0).all()):
        return
    lengths = batch.counts.tolist()
    for row, column in torch.nonzero((found.sizes == 0).any(2)).tolist():
        labels = found.labels[row, column, : lengths[row]]
        sizes = found.sizes[row, column].tolist()
        empty = [cluster for cluster, size in enumerate(sizes) if size == 0]
        similarity = found.similarity[row, column, : lengths[row]]
        for worst in torch.argsort(similarity, stable=True).tolist():
            if not empty:
                break
            owner = int(labels[worst])
            if sizes[owner] > 1:
                sizes[owner] -= 1
                labels[worst] = empty[0]
                sizes[empty.pop(0)] = 1
        found.sizes[row, column] = torch.tensor(sizes, device=labels.device)
    # Seldom, so the sums are made afresh rather than mended.
    found.sums = batch.sums(found.labels, found.sizes.shape[2], members=members)


# -- First centres -----------------------------------------------------------------------------


def _plus_plus(rows: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Row numbers of k-means++ centres: each drawn with weight 1 - cosine to the nearest so far.

    1 - cosine is half the squared distance of the unit vectors, the weight of k-means++.
    """
    count = rows.shape[0]
    batch = _Batch.of([Group(rows, clusters, ())], rows.device, None)
    for start, end, part in batch.chunks():
        batch.measure(start, end, part)
    inverse_norm = batch.inverse_norm[0]
    chosen = [int(torch.randint(count, (1,), generator=generator))]
    distance = torch.full((count,), float("inf"), dtype=torch.float64)
    for _ in range(clusters - 1):
        last = chosen[-1]
        direction = rows[last].to(batch.dtype) * inverse_norm[last]
        products = torch.cat([part[0] @ direction for _, _, part in batch.chunks()])
        to_last = 1.0 - (products * inverse_norm).double().cpu()
        distance = torch.minimum(distance, to_last.clamp_min(0.0))
        distance[chosen] = 0.0
        if float(distance.sum()) <= 0.0:  # all remaining rows repeat a chosen one
            distance = torch.ones(count, dtype=torch.float64)
            distance[chosen] = 0.0
        cumulative = distance.cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
        chosen.append(min(int(torch.searchsorted(cumulative, draw, right=True)), count - 1))
    return torch.tensor(chosen, device=rows.device)
