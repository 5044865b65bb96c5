"""Random walk of IRN and PSA as a stencil, and the affinities of pixel pairs it uses.

Specifications: IRN, sections 5, 6 and 8; MCTformer, section 4. IRN's affinity of two cells is
a_ij = 1 - max over the path between them of the boundary e; PSA's (:mod:`lpcam.refine.psa`) comes
from features. Only pairs nearer than a radius count, so x T^256 is computed without storing T.

Shapes: K classes, h x w the grid (of stride 4 for IRN and 8 for PSA); leading axes are images of
one size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lpcam.data.dataset import BACKGROUND, IGNORE
from lpcam.refine.base import compute_dtype
from lpcam.runtime.errors import DataError

Offset = tuple[int, int]  #: (dy, dx) in grid cells.
Pairs = Iterable[tuple[Offset, Tensor]]  #: Values of all pairs at each offset.
Window = tuple[slice, slice]  #: Rows and columns of the grid.
STRIDE = 4  #: Pixels per cell of IRN's grid.
EPSILON = 1e-5
"""Added to each logarithm's argument and each mean's denominator of a loss over pairs."""


@cache
def pair_offsets(radius: int) -> tuple[Offset, ...]:
    """Offsets (dy, dx) from a cell to the partners of its pairs, each unordered pair once.

    Partners are right of it or below, nearer than ``radius``, by length of path (section 5).
    """
    right = [(0, dx) for dx in range(1, radius)]
    below = [
        (dy, dx)
        for dy in range(1, radius)
        for dx in range(1 - radius, radius)
        if dy * dy + dx * dx < radius * radius
    ]
    return tuple(sorted(right + below, key=lambda offset: len(path(offset))))


@cache
def path(offset: Offset) -> tuple[Offset, ...]:
    """Cells nearer than 1 to the line from a cell (0, 0) to its partner, in their bounding box."""
    dy, dx = offset
    return tuple(
        (y, x)
        for y in range(dy + 1)
        for x in range(min(0, dx), max(0, dx) + 1)
        if (dy * x - dx * y) ** 2 < dy * dy + dx * dx
    )


def source_window(height: int, width: int, radius: int) -> Window:
    """Rows and columns of the cells all of whose partners lie on the grid; may be empty."""
    reach = radius - 1
    return slice(0, max(0, height - reach)), slice(reach, max(reach, width - reach))


def partner_window(window: Window, offset: Offset) -> Window:
    """Rows and columns of the partners at an offset from the cells of a window."""
    (rows, columns), (dy, dx) = window, offset
    return slice(rows.start + dy, rows.stop + dy), slice(columns.start + dx, columns.stop + dx)


@cache
def _plan(radius: int) -> tuple[tuple[Offset, tuple[tuple[Offset, Offset], ...]], ...]:
    """For each offset, shorter ones and their shifts whose paths cover its path: saves work."""
    cells: dict[Offset, frozenset[Offset]] = {(0, 0): frozenset([(0, 0)])}
    plan = []
    for offset in pair_offsets(radius):
        whole = frozenset((y, x - min(0, offset[1])) for y, x in path(offset))
        inside = {
            (piece, (down, right)): moved
            for piece, its_cells in cells.items()
            for down in range(offset[0] - piece[0] + 1)
            for right in range(abs(offset[1]) - abs(piece[1]) + 1)
            if (moved := frozenset((y + down, x + right) for y, x in its_cells)) <= whole
        }
        cells[offset] = whole
        plan.append((offset, _cover(whole, inside)))
    return tuple(plan)


def _cover(
    whole: frozenset[Offset], pieces: dict[tuple[Offset, Offset], frozenset[Offset]]
) -> tuple[tuple[Offset, Offset], ...]:
    """A few pieces whose union is the whole, chosen greedily, the largest first."""
    largest = sorted(pieces, key=lambda piece: (-len(pieces[piece]), piece))
    chosen, left = [], whole
    while left:
        chosen.append(max(largest, key=lambda piece: len(pieces[piece] & left)))
        left -= pieces[chosen[-1]]
    return tuple(chosen)


def path_maxima(edge: Tensor, radius: int) -> Iterator[tuple[Offset, Tensor]]:
    """Yield the largest of the boundaries (..., h, w) along the path of every pair, by offset.

    Maxima (..., h - dy, w - abs(dx)) are indexed by the upper left corner of the pair's box. A
    first-order gradient flows to one of several equal boundaries.
    """
    if offsets := [offset for offset, _ in _plan_of(edge, radius)]:
        yield from zip(offsets, _Maxima.apply(edge, radius), strict=True)


def _plan_of(edge: Tensor, radius: int) -> Iterator[tuple[Offset, list[tuple[Offset, Window]]]]:
    """The plan's offsets on a grid, each with its pieces and their windows in these' maxima."""
    height, width = edge.shape[-2:]
    for offset, parts in _plan(radius):
        rows, columns = height - offset[0], width - abs(offset[1])
        if rows > 0 and columns > 0:
            windows = [
                (piece, (slice(top, top + rows), slice(left, left + columns)))
                for piece, (top, left) in parts
            ]
            yield offset, windows


class _Maxima(torch.autograd.Function):
    """All maxima at once, with a backward pass three times as fast as that of torch.maximum."""

    @staticmethod
    def forward(ctx: Any, edge: Tensor, radius: int) -> tuple[Tensor, ...]:
        found: dict[Offset, Tensor] = {(0, 0): edge}
        for offset, parts in _plan_of(edge, radius):
            windows = [found[piece][..., rows, columns] for piece, (rows, columns) in parts]
            # a path that equals a shifted shorter one must not be a view of it
            found[offset] = reduce(torch.maximum, windows) if windows[1:] else windows[0].clone()
        ctx.plan = radius, list(found)
        ctx.save_for_backward(*found.values())
        return tuple(found.values())[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        radius, offsets = ctx.plan
        found = dict(zip(offsets, ctx.saved_tensors, strict=True))
        starts = torch.zeros_like(found[0, 0]), *(g.clone() for g in gradients)
        totals = dict(zip(offsets, starts, strict=True))
        for offset, parts in reversed(list(_plan_of(found[0, 0], radius))):
            rest = totals.pop(offset)
            for piece, (rows, columns) in parts[:-1]:
                attains = found[piece][..., rows, columns] == found[offset]
                share = rest * attains
                totals[piece][..., rows, columns] += share
                rest = rest - share
            piece, (rows, columns) = parts[-1]
            totals[piece][..., rows, columns] += rest
        return totals[0, 0], None


def affinities(edge: Tensor, radius: int) -> Iterator[tuple[Offset, Tensor]]:
    """Yield affinities 1 - max over the path (..., rows, columns) of pairs of the source window."""
    rows, columns = source_window(edge.shape[-2], edge.shape[-1], radius)
    for offset, maximum in path_maxima(edge, radius) if edge[..., rows, columns].numel() else ():
        corner = min(0, offset[1])
        yield offset, 1 - maximum[..., rows, columns.start + corner : columns.stop + corner]


def pair_kinds(labels: Tensor, radius: int) -> Iterator[tuple[Offset, Tensor]]:
    """Yield which pairs of a window are background, of one class, or different, by offset.

    Bool (3, B, rows, columns) from labels (B, h, w) uint8; pairs with a label 255 are of no kind.
    """
    window = source_window(labels.shape[-2], labels.shape[-1], radius)
    own = labels[:, *window]
    known = own != IGNORE
    background = known & (own == BACKGROUND)
    foreground = known & ~background
    for offset in pair_offsets(radius) if own.numel() else ():
        partner = labels[:, *partner_window(window, offset)]
        same = own == partner
        different = known & ~same & (partner != IGNORE)
        yield offset, torch.stack([background & same, foreground & same, different])


def pair_counts(labels: Tensor, radius: int) -> Tensor:
    """Number of pairs of each kind of :func:`pair_kinds`: (3,) float32."""
    counts = [kinds.sum((1, 2, 3)).float() for _, kinds in pair_kinds(labels, radius)]
    return torch.stack(counts).sum(0) if counts else torch.zeros(3, device=labels.device)


def likelihood_means(
    pairs: Pairs, labels: Tensor, counts: Tensor, zero: Tensor, radius: int
) -> Tensor:
    """Means (3,) of -log a over background pairs and pairs of a class, of -log(1 - a) over others.

    ``pairs`` are affinities in the order of :func:`pair_kinds`, ``counts`` those of the whole
    batch, ``zero`` a scalar 0 with a gradient.
    """
    sums = [zero.expand(3)]
    for (_, affinity), (_, kinds) in zip(pairs, pair_kinds(labels, radius), strict=True):
        likelihood = torch.where(kinds[2], 1 - affinity, affinity) + EPSILON
        sums.append(kinds.flatten(1).to(affinity.dtype) @ -likelihood.log().flatten())
    return torch.stack(sums).sum(0) / (counts.to(zero) + EPSILON)


def random_walk(
    maps: Tensor, edge: Tensor, *, radius: int, beta: float, exponent: int, tolerance: float = 0.0
) -> Tensor:
    """:func:`affinity_walk` with IRN's affinities from boundaries e (..., h, w) in [0, 1]."""
    maxima = path_maxima(edge.detach().to(compute_dtype(maps)), radius)
    pairs = ((offset, 1 - maximum) for offset, maximum in maxima)
    return affinity_walk(maps, pairs, beta=beta, exponent=exponent, tolerance=tolerance)


@torch.no_grad()
def affinity_walk(
    maps: Tensor, pairs: Pairs, *, beta: float, exponent: int, tolerance: float = 0.0
) -> Tensor:
    """x T^(2^exponent), with T the affinities to the power of ``beta``, columns summing to 1.

    Sources x are (..., K, h, w), pairs affinities as :func:`path_maxima` has them. T has a unit
    diagonal before it is normalised. The power is a series of Chebyshev polynomials of T whose
    weights fall like a Gaussian's: 98 terms reach 1e-6 of 256 steps on a VOC image; omitted terms
    err by ``tolerance`` of the largest source. DataError if values or shapes do not fit.
    """
    if maps.ndim < 3 or not maps.isfinite().all():
        raise DataError(f"maps are {tuple(maps.shape)}; expected (..., K, h, w) without NaN or Inf")
    height, width = maps.shape[-2:]
    count = height * width
    zeros = maps.new_zeros((*maps.shape[:-3], height, width), dtype=compute_dtype(maps))
    shifts, weights, degree = _pair_weights(zeros, pairs, beta)
    # P is similar to a symmetric matrix with eigenvalues in [-1, 1], where no polynomial exceeds 1;
    # the similarity costs the root of the degrees' sum at most. Scaling the rest up costs a 2.
    tail = tolerance / (2 * math.sqrt(count * (2 * len(shifts) + 1)))
    factors = _series(2**exponent, tail)

    current = maps.to(zeros.dtype).flatten(-2).clone()
    low, high = current.amin(-1, keepdim=True), current.amax(-1, keepdim=True)
    change, between = torch.empty_like(current), torch.empty_like(current)
    # Each pair's difference serves both its cells. The views are made once: making them takes
    # longer than the arithmetic.
    views = [
        (
            current[..., shift:],
            current[..., : count - shift],
            between[..., : count - shift],
            weight[..., : count - shift],
            change[..., : count - shift],
            change[..., shift:],
        )
        for shift, weight in zip(shifts, weights, strict=True)
    ]
    total = factors[0] * current
    once, twice = 1 / degree, 2 / degree
    difference = torch.zeros_like(current)
    for number, factor in enumerate(factors[1:], start=1):
        # T_k+1(P) = 2 P T_k - T_k-1, written in differences of neighbours: hundreds of steps then
        # round by less than 1e-5, where products lose as much as 1e-3.
        change.zero_()
        for partner, own, gap, weight, to_own, to_partner in views:
            torch.sub(partner, own, out=gap)
            to_own.addcmul_(weight, gap)
            to_partner.addcmul_(weight, gap, value=-1)
        difference.addcmul_(change, once if number == 1 else twice)
        current += difference
        if factor:
            total.add_(current, alpha=factor)
    return total.clamp_(low, high).reshape(maps.shape).to(maps.dtype)


def _pair_weights(
    zeros: Tensor, pairs: Pairs, beta: float
) -> tuple[list[int], list[Tensor], Tensor]:
    """Shifts in the flat grid, weights a^beta (zero without a partner), column sums (..., 1, n)."""
    height, width = zeros.shape[-2:]
    shifts, weights = [], []
    degree = torch.ones_like(zeros).flatten(-2)
    for (dy, dx), affinity in pairs:
        plane = torch.zeros_like(zeros)
        first = max(0, -dx)
        window = plane[..., : height - dy, first : first + width - abs(dx)]
        if affinity.shape != window.shape or not ((affinity >= 0) & (affinity <= 1)).all():
            raise DataError(
                f"affinities at the offset {(dy, dx)} are {tuple(affinity.shape)} or hold NaN or "
                f"values outside [0, 1]; expected {tuple(window.shape)} for the maps"
            )
        torch.pow(affinity.to(zeros.dtype), beta, out=window)
        weight, shift = plane.flatten(-2), dy * width + dx
        degree += weight
        degree[..., shift:] += weight[..., : weight.shape[-1] - shift]
        shifts.append(shift)
        weights.append(weight[..., None, :])
    return shifts, weights, degree[..., None, :]


@cache
def _series(steps: int, tail: float) -> tuple[float, ...]:
    """Factors of T_0, T_1, ... in x^steps, cut where ``tail`` or less is left, scaled to sum 1.

    x^n = 2^(1-n) sum over k of C(n, (n - k) / 2) T_k(x), k = n, n - 2, ..., the term of T_0 halved.
    """
    whole = 2**steps
    kept, factors = 0, []
    for degree in range(steps + 1):
        factor = 0 if (steps - degree) % 2 else math.comb(steps, (steps - degree) // 2)
        factors.append(factor if degree == 0 else 2 * factor)
        kept += factors[-1]
        if (whole - kept) / whole <= tail:
            break
    return tuple(factor / kept for factor in factors)
