"""Cosine k-means by matrix products: chunked, seeded, bounded (step 3 of the method)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lpcam.functional import NORM_EPSILON, unit

logger = logging.getLogger(__name__)


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
    converged: bool
    objective: float
    """Mean cosine of the rows to their centres, in [-1, 1], at the last assignment."""


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
    chunk_bytes: int = 64 * 2**20,
) -> KMeansResult:
    """K-means with cosine assignment.

    A row joins the centre of greatest cosine. A centre becomes the plain mean of its raw members
    (``centers="mean"``: long rows weigh more, as in the released program) or the unit-normalised
    mean of its unit members (``"unit"``: spherical k-means). An empty cluster takes the row that is
    worst served by its own centre. Zero rows have cosine 0 to every centre.

    Args:
        rows: (M, C) floating point, M >= clusters.
        clusters: K.
        init: K distinct random rows, k-means++ on cosine distance, or a (K, C) tensor of centres.
        tolerance: with "absolute", stop when (sum_k |shift of centre k|)^2 is below it (the
            released program's rule, whose value is 5); with "relative", when the objective gains
            less than tolerance * (1 - objective).
        generator: of the random choices, on the CPU; the default is seeded with 0.
        chunk_bytes: bound of the rows x K similarity block held at once.

    Raises:
        ValueError: for a wrong shape, fewer rows than clusters, or NaN or Inf in the rows.
    """
    _check_rows(rows, clusters)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    if isinstance(init, Tensor):
        if init.shape != (clusters, rows.shape[1]):
            raise ValueError(
                f"expected first centres of shape {(clusters, rows.shape[1])}, "
                f"got {tuple(init.shape)}"
            )
        current = init.to(rows)
    elif init == "k-means++":
        current = rows[_plus_plus(rows, clusters, generator)]
    elif init == "random":
        order = torch.randperm(rows.shape[0], generator=generator)[:clusters]
        current = rows[order.to(rows.device)]
    else:
        raise ValueError(f"unknown init {init!r}; use 'random', 'k-means++' or first centres")

    inverse_norm = 1.0 / rows.norm(dim=1).clamp_min(NORM_EPSILON)
    objective = float("-inf")
    converged = False
    iteration = 0
    assignments, similarity = _assign(rows, inverse_norm, current, chunk_bytes)
    while iteration < max_iterations:
        iteration += 1
        sizes = torch.bincount(assignments, minlength=clusters)
        _repair_empty(assignments, similarity, sizes)
        membership = _membership(assignments, clusters, rows.dtype)
        means = membership @ rows / sizes.to(rows.dtype)[:, None]
        if centers == "mean":
            updated = means
        elif centers == "unit":
            updated = unit((membership * inverse_norm) @ rows, dim=1)
        else:
            raise ValueError(f"unknown centers {centers!r}; use 'mean' or 'unit'")
        shift = float((updated - current).norm(dim=1).sum() ** 2)
        current = updated
        reached = float(similarity.mean())
        gain, objective = reached - objective, reached
        if tolerance_kind == "absolute":
            converged = shift < tolerance
        else:
            converged = gain < tolerance * max(1.0 - objective, NORM_EPSILON)
        if converged or iteration == max_iterations:
            break
        assignments, similarity = _assign(rows, inverse_norm, current, chunk_bytes)
    if not converged:
        logger.warning(
            "k-means stopped at max_iterations=%d before its tolerance (%s %g) was reached; "
            "raise max_iterations or the tolerance",
            max_iterations,
            tolerance_kind,
            tolerance,
        )
    return KMeansResult(current, means, assignments, sizes, iteration, converged, objective)


def _check_rows(rows: Tensor, clusters: int) -> None:
    if rows.ndim != 2 or not rows.is_floating_point():
        raise ValueError(
            f"expected floating-point rows (M, C), got {rows.dtype} of shape {tuple(rows.shape)}"
        )
    if clusters < 1 or rows.shape[0] < clusters:
        raise ValueError(
            f"expected at least as many rows as clusters, got {rows.shape[0]} rows for {clusters}"
        )
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("the rows hold NaN or Inf; check the features that were collected")


def _assign(
    rows: Tensor, inverse_norm: Tensor, centers: Tensor, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    """Nearest centre by cosine of every row, and that cosine."""
    directions = unit(centers, dim=1).T.contiguous()
    chunk = max(1, chunk_bytes // max(1, directions.shape[1] * rows.element_size()))
    best = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
    similarity = torch.empty(rows.shape[0], dtype=rows.dtype, device=rows.device)
    for start in range(0, rows.shape[0], chunk):
        part = slice(start, start + chunk)
        top = (rows[part] @ directions).max(dim=1)
        best[part] = top.indices
        similarity[part] = top.values * inverse_norm[part]
    return best, similarity


def _repair_empty(assignments: Tensor, similarity: Tensor, sizes: Tensor) -> None:
    """Give each empty cluster the worst-served row of a cluster that keeps one (in place)."""
    empty = torch.nonzero(sizes == 0).flatten().tolist()
    if not empty:
        return
    for row in torch.argsort(similarity, stable=True).tolist():
        if not empty:
            break
        owner = int(assignments[row])
        if sizes[owner] > 1:
            sizes[owner] -= 1
            assignments[row] = empty.pop(0)
            sizes[assignments[row]] += 1


def _membership(assignments: Tensor, clusters: int, dtype: torch.dtype) -> Tensor:
    """(K, M), 1 where a row belongs to a cluster: a sum over members is one skinny product."""
    numbers = torch.arange(clusters, device=assignments.device)[:, None]
    return (assignments[None, :] == numbers).to(dtype)


def _plus_plus(rows: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Row numbers of k-means++ centres: each drawn with weight 1 - cosine to the nearest so far.

    1 - cosine is half the squared distance of the unit vectors, the weight of k-means++.
    """
    count = rows.shape[0]
    chosen = [int(torch.randint(count, (1,), generator=generator))]
    distance = torch.full((count,), float("inf"), dtype=torch.float64)
    directions = unit(rows, dim=1)
    for _ in range(clusters - 1):
        to_last = 1.0 - (directions @ directions[chosen[-1]]).double().cpu()
        distance = torch.minimum(distance, to_last.clamp_min(0.0))
        distance[chosen] = 0.0
        if float(distance.sum()) <= 0.0:  # all remaining rows repeat a chosen one
            distance = torch.ones(count, dtype=torch.float64)
            distance[chosen] = 0.0
        cumulative = distance.cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
        chosen.append(min(int(torch.searchsorted(cumulative, draw, right=True)), count - 1))
    return torch.tensor(chosen, device=rows.device)
