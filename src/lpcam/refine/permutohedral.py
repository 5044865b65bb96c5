"""Gaussian filters of scattered points on permutohedral lattices (Adams, Baek and Davis 2010).

Splat onto lattice points, blur along the lattice's directions, slice: sums of weighted rows
(``embedding_bag``), for several lattices at once. Lattice points have packed integer keys.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.runtime.errors import DataError

CODE_BITS = 52  #: Largest number of bits of a lattice point's code, which is computed in float64.
Filter = Callable[[Tensor], Tensor]  #: Filters values (P, C) of P points.


@dataclass(frozen=True)
class Lattice:
    """P points in a lattice of M points; row M of a table stays zero, for missing neighbours."""

    vertices: Tensor
    """(d + 1, P) int32: the lattice points around each point, one of each remainder."""
    weights: Tensor  #: (d + 1, P): their barycentric weights, summing to one.
    offsets: Tensor
    """(M + 1,) int32: where the points around each lattice point begin in ``members``."""
    members: Tensor
    """(P (d + 1),) int32: the points around each lattice point, in ascending order."""
    member_weights: Tensor  #: (P (d + 1),): their weights.
    blur: Tensor
    """(d + 1, M + 1, 3) int32: each lattice point and its two neighbours along a direction."""

    @property
    def size(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def scale(self) -> float:
        """Factor that undoes the blur's gain: 1 / (1 + 2^-d)."""
        return 1.0 / (1.0 + 2.0 ** (1 - self.vertices.shape[0]))

    def row_sums(self) -> Tensor:
        """The filter of ones (P,); gathering is faster than ``join`` for a single column."""
        ones = self.weights.new_ones(self.vertices.shape[1], 1)
        offsets = torch.cat([self.offsets, self.offsets[-1:]])  # row M stays zero
        table = _sum_rows(ones, self.members, offsets, self.member_weights).view(-1)
        for rows in self.blur:
            either = table.index_select(0, rows[:, 1]) + table.index_select(0, rows[:, 2])
            table = table + 0.5 * either
        sums = torch.zeros_like(self.weights[0])
        for vertices, weights in zip(self.vertices, self.weights, strict=True):
            sums += table.index_select(0, vertices) * weights
        return sums * self.scale


def permutohedral_lattice(positions: Tensor) -> Lattice:
    """Lattice of positions (d, P) over the deviations, for the kernel exp(-|f_i - f_j|^2 / 2)."""
    d, count = positions.shape
    corner, rank, barycentric = _enclosing_simplex(positions)

    # A lattice point has a remainder r in 0..d, and its coordinates are (d + 1) q_i + r with whole
    # q_i; the last follows from the others. Its code holds r and q_1..q_d as digits, with room for
    # the vertices one step below the corner and for the neighbours of those, one step either way.
    lowest, highest = (v.tolist() for v in torch.aminmax(corner[:d], dim=1))
    extents = [int(high - low) + 4 for low, high in zip(lowest, highest, strict=True)]
    strides = [math.prod(extents[i + 1 :]) for i in range(d)]
    turn = math.prod(extents)
    if (turn * (d + 1)).bit_length() > CODE_BITS:
        raise DataError(
            f"the points reach over about {turn:.1g} lattice cells, more than can be numbered; "
            "the kernel's standard deviations are too small for the size of the image"
        )
    base = torch.zeros(count, dtype=torch.float64, device=positions.device)
    for i in range(d):
        base.add_(corner[i] - (lowest[i] - 2), alpha=strides[i])
    # Vertex r is the corner, one step back along the coordinates whose rank is above d - r.
    order = rank[0].to(torch.int32)
    for i in range(1, d):
        order = order.mul_(d + 1).add_(rank[i])
    ranks = torch.cartesian_prod(*[torch.arange(d + 1)] * d).view(-1, d)
    # short codes are sorted in half the time
    dtype = torch.int32 if turn * (d + 1) < 2**31 else torch.int64
    codes = base.to(dtype).repeat(d + 1, 1)
    for r in range(d + 1):
        step = turn * r - (ranks > d - r).long() @ torch.tensor(strides)
        codes[r] += step.to(codes).index_select(0, order)
    del corner, rank, base, order

    # Codes ascend with the remainder: one sort of all is one of each row, and radix sort is for
    # one dimension alone.
    codes, places = torch.sort(codes.view(-1), stable=True)
    first = torch.cat([codes.new_ones(1, dtype=torch.bool), codes[1:] != codes[:-1]])
    begins = first.nonzero().view(-1)
    vertices = torch.empty(count * (d + 1), dtype=torch.int32, device=positions.device)
    vertices[places] = first.cumsum(0, dtype=torch.int32).sub_(1)
    return Lattice(
        vertices=vertices.view(d + 1, count),
        weights=barycentric,
        offsets=torch.cat([begins, begins.new_tensor([len(places)])]).to(torch.int32),
        member_weights=barycentric.view(-1).index_select(0, places),
        members=places.remainder_(count).to(torch.int32),
        blur=_blur_rows(codes.index_select(0, begins), strides, turn),
    )


def _enclosing_simplex(positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Corner in units of d + 1, int8 ranks, barycentric weights: (d + 1, P) each (section 3.1)."""
    d, count = positions.shape
    # Scaled so that the blur has the standard deviation 1. The rounding of this one factor decides
    # on which side of a face a few points lie, and so which lattice points there are: it is rounded
    # to the positions' precision, as the authors' program does.
    spread = float(positions.new_tensor(math.sqrt(2.0 / 3.0) * (d + 1)))
    elevated = positions.new_empty(d + 1, count)
    total = positions.new_zeros(count)
    for j in range(d, 0, -1):
        scaled = positions[j - 1] * (spread / math.sqrt(j * (j + 1)))
        torch.sub(total, scaled * j, out=elevated[j])
        total += scaled
    elevated[0] = total

    corner = (elevated / (d + 1)).round_()
    excess = corner.sum(0).to(torch.int8)
    residual = elevated.sub_(corner, alpha=d + 1).div_(d + 1)
    # How many residuals are larger; of equal ones the earlier comes first.
    rank = torch.arange(d + 1, dtype=torch.int8, device=positions.device)
    rank = rank.unsqueeze(1).repeat(1, count)
    for i, j in itertools.combinations(range(d + 1), 2):
        less = residual[i] < residual[j]
        rank[i] += less
        rank[j] -= less.to(torch.int8)
    # The corner's coordinates must sum to zero: move those that were rounded furthest.
    rank += excess
    shift = (rank < 0).to(torch.int8) - (rank > d).to(torch.int8)
    rank += shift * (d + 1)
    corner += shift
    residual -= shift

    ordered = list(residual.unbind(0))  # falling, by odd-even transposition
    for turn in range(d + 1):
        for i in range(turn % 2, d, 2):
            a, b = ordered[i], ordered[i + 1]
            ordered[i], ordered[i + 1] = torch.maximum(a, b), torch.minimum(a, b)
    barycentric = torch.empty_like(corner)
    torch.sub(ordered[d], ordered[0], out=barycentric[0]).add_(1.0)
    for r in range(1, d + 1):
        torch.sub(ordered[d - r], ordered[d - r + 1], out=barycentric[r])
    return corner, rank, barycentric


def _blur_rows(codes: Tensor, strides: Sequence[int], turn: int) -> Tensor:
    """``Lattice.blur`` from the ascending codes (M,) r turn + sum of q_i strides_i."""
    d, count = len(strides), codes.shape[0]
    result = torch.full((d + 1, count + 1, 3), count, dtype=torch.int32, device=codes.device)
    result[:, :, 0] = torch.arange(count + 1, dtype=torch.int32, device=codes.device)
    # One way along direction j every coordinate falls by one, but the j-th grows by d. From
    # remainder 0 that leads to remainder d with every q_i one lower.
    zero = int(torch.searchsorted(codes, turn))
    back = torch.cat([codes[:zero] + (d * turn - sum(strides)), codes[zero:] - turn])
    for j, stride in enumerate([*strides, 0]):
        neighbours = back + stride
        at = torch.searchsorted(codes, neighbours, out_int32=True).clamp_(max=count - 1)
        source = (codes.index_select(0, at) == neighbours).nonzero().view(-1)
        target = at.index_select(0, source)
        result[j, source, 1] = target
        result[j, target, 2] = source.to(torch.int32)
    return result


def join(parts: Sequence[tuple[Lattice, Tensor, Tensor]]) -> Filter:
    """The filter sum over m of diag(after_m) K_m diag(before_m), in one pass over the points.

    A part is a lattice over the same P points and its factors (P,) before and after.
    """
    directions = max(len(lattice.blur) for lattice, *_ in parts)
    members, begins, splat_weights, vertices, weights = [], [], [], [], []
    blur: list[list[Tensor]] = [[] for _ in range(directions)]
    rows = entries = 0
    for lattice, before, after in parts:
        members.append(lattice.members)
        begins.append(lattice.offsets + entries)
        splat_weights.append(lattice.member_weights * before.index_select(0, lattice.members))
        vertices.append((lattice.vertices + rows).t())
        weights.append((lattice.weights * (after * lattice.scale)).t())
        still = lattice.blur.new_full((lattice.size + 1, 3), lattice.size)
        still[:, 0] = lattice.blur[0, :, 0]
        for direction, bags in enumerate(blur):
            own = lattice.blur[direction] if direction < len(lattice.blur) else still
            bags.append(own + rows)
        rows += lattice.size + 1
        entries += len(lattice.members)
    slices, slice_weights = torch.cat(vertices, 1), torch.cat(weights, 1)
    points, width = slices.shape

    def bounds(stop: int, step: int) -> Tensor:
        return torch.arange(0, stop + 1, step, dtype=torch.int32, device=slices.device)

    into = torch.cat(members), torch.cat([*begins, begins[0].new_tensor([entries])])
    into_weights = torch.cat(splat_weights)
    passes = [torch.cat(bags).view(-1) for bags in blur]
    triples, blur_weights = bounds(3 * rows, 3), weights[0].new_tensor([1.0, 0.5, 0.5]).repeat(rows)
    out = slices.view(-1), bounds(points * width, width), slice_weights.view(-1)

    def apply(values: Tensor) -> Tensor:
        values = _sum_rows(values, *into, into_weights)
        for bags in passes:
            values = _sum_rows(values, bags, triples, blur_weights)
        return _sum_rows(values, *out)

    return apply


def _sum_rows(table: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(
        rows, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
