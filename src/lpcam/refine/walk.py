"""The random walk of IRN and PSA as a stencil, and masks from IRN's walked maps.

Specifications: of IRN, sections 5, 6 and 8; of MCTformer, section 4. IRN takes two pixels to be as
alike as the weakest boundary between them is: a_ij = 1 - max over the path of e. PSA
(:mod:`lpcam.refine.psa`) takes its affinities from features. Only pairs nearer than a radius count,
so the transition matrix has a few dozen entries a row, and x T^256 needs no matrix. Squared as a
dense matrix, as the released program has it, one VOC image takes 26 TFLOP and half a gigabyte a
matrix; here it takes some hundredths of a second.

Shapes: K classes, h x w the grid (of stride 4 for IRN and 8 for PSA), n = h w; leading axes are
images of one size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lpcam.data.items import BACKGROUND, IGNORE
from lpcam.errors import DataError
from lpcam.masks import seeds
from lpcam.presets import IrnSettings
from lpcam.refine.inputs import compute_dtype

Offset = tuple[int, int]
"""(dy, dx) in grid cells."""
STRIDE = 4
"""Pixels a cell of the grid on which IRN's boundaries and walks live."""
EPSILON = 1e-5
"""Added to each logarithm's argument of a loss over pairs, and to each mean's denominator."""
PIECES_TRIED = 30
"""Longest pieces of a path of which all pairs are tried."""


# -- Geometry of the pairs ---------------------------------------------------------------------


@cache
def pair_offsets(radius: int) -> tuple[Offset, ...]:
    """Offsets (dy, dx) from a cell to the partners of its pairs, each unordered pair once.

    Right of the cell and below it, nearer than ``radius``; ordered by the length of their paths,
    34 at radius 5 and 152 at radius 10 (specification of IRN, section 5).

    Raises:
        ValueError: if the radius is less than 2: there would be no pair.
    """
    if radius < 2:
        raise ValueError(f"radius must be at least 2 cells, got {radius}")
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
    """Cells between a cell (0, 0) and its partner at ``offset``, both included.

    Those of their bounding box whose distance from the line through both is less than 1.
    """
    dy, dx = offset
    return tuple(
        (y, x)
        for y in range(dy + 1)
        for x in range(min(0, dx), max(0, dx) + 1)
        if (dy * x - dx * y) ** 2 < dy * dy + dx * dx
    )


def source_window(height: int, width: int, radius: int) -> tuple[slice, slice]:
    """Rows and columns of the cells whose every partner lies on the grid: the pairs of the loss.

    Empty where the grid is too small for the radius.
    """
    reach = radius - 1
    return slice(0, max(0, height - reach)), slice(reach, max(reach, width - reach))


@cache
def _plan(radius: int) -> tuple[tuple[Offset, tuple[tuple[Offset, Offset], ...]], ...]:
    """How the maximum along each path is made from the maxima along shorter ones.

    Nearly every path is the union of two shorter ones, moved, so that nine tenths of the
    comparisons are saved. Cells and moves are counted from the corner of the bounding box.

    Returns:
        for each offset the shorter offsets, with (0, 0) a cell itself, and their moves.
    """
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
    """Few pieces whose union is the whole: one or two if they can be found, else greedily."""
    largest = sorted(pieces, key=lambda piece: (-len(pieces[piece]), piece))
    if pieces[largest[0]] == whole:
        return (largest[0],)
    for pair in combinations(largest[:PIECES_TRIED], 2):
        if pieces[pair[0]] | pieces[pair[1]] == whole:
            return pair
    chosen, left = [], whole
    while left:
        chosen.append(max(largest, key=lambda piece: len(pieces[piece] & left)))
        left -= pieces[chosen[-1]]
    return tuple(chosen)


def path_maxima(edge: Tensor, radius: int) -> Iterator[tuple[Offset, Tensor]]:
    """The strongest boundary along the path of every pair on the grid, offset by offset.

    Args:
        edge: (..., h, w) boundaries.
        radius: pairs are nearer than it, in cells.

    Yields:
        the offset and (..., h - dy, w - abs(dx)) maxima, by the upper left corner of the pair's
        bounding box; offsets that no pair of the grid has are left out. With a gradient, of first
        order, which goes to one of equal boundaries.
    """
    if not (edge.requires_grad and torch.is_grad_enabled()):
        return _maxima(edge, radius)
    offsets = [offset for offset, _ in _plan_of(edge, radius)]
    return zip(offsets, _Maxima.apply(edge, radius), strict=True)


def _plan_of(
    edge: Tensor, radius: int
) -> Iterator[tuple[Offset, list[tuple[Offset, tuple[slice, slice]]]]]:
    """The plan's offsets on a grid, each with its pieces and their windows in these' maxima."""
    height, width = edge.shape[-2:]
    for offset, parts in _plan(radius):
        rows, columns = height - offset[0], width - abs(offset[1])
        if rows > 0 and columns > 0:
            yield (
                offset,
                [
                    (piece, (slice(top, top + rows), slice(left, left + columns)))
                    for piece, (top, left) in parts
                ],
            )


def _maxima(edge: Tensor, radius: int) -> Iterator[tuple[Offset, Tensor]]:
    found: dict[Offset, Tensor] = {(0, 0): edge}
    for offset, parts in _plan_of(edge, radius):
        windows = [found[piece][..., rows, columns] for piece, (rows, columns) in parts]
        maximum = windows[0]
        for window in windows[1:]:
            maximum = torch.maximum(maximum, window)
        found[offset] = maximum
        yield offset, maximum


class _Maxima(torch.autograd.Function):
    """All maxima at once, with a gradient that takes a third of the time of a maximum's own."""

    @staticmethod
    def forward(ctx: Any, edge: Tensor, radius: int) -> tuple[Tensor, ...]:
        # A path that equals a shorter one's, moved, would else be a view of it.
        found = tuple(m.clone() if m._is_view() else m for _, m in _maxima(edge, radius))
        ctx.radius = radius
        ctx.save_for_backward(edge, *found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        edge, *maxima = ctx.saved_tensors
        plan = list(_plan_of(edge, ctx.radius))
        offsets = [(0, 0), *(offset for offset, _ in plan)]
        found = dict(zip(offsets, (edge, *maxima), strict=True))
        totals = dict(
            zip(offsets, (torch.zeros_like(edge), *(g.clone() for g in gradients)), strict=True)
        )
        for offset, parts in reversed(plan):
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
    """Affinity 1 - max over the path of the pairs of :func:`source_window`.

    Args:
        edge: (..., h, w) boundaries e in [0, 1].

    Yields:
        the offset (dy, dx) and (..., rows, columns) affinities of the window's cells with their
        partners at that offset, in the order of :func:`pair_offsets`; nothing where the window is
        empty. With a gradient.
    """
    rows, columns = source_window(edge.shape[-2], edge.shape[-1], radius)
    if rows.stop <= rows.start or columns.stop <= columns.start:
        return
    for offset, maximum in path_maxima(edge, radius):
        corner = min(0, offset[1])
        yield (
            offset,
            1 - maximum[..., rows, columns.start + corner : columns.stop + corner],
        )


# -- Pairs of labels: what affinities are learnt from --------------------------------------------


def pair_kinds(labels: Tensor, radius: int) -> Iterator[tuple[Offset, Tensor]]:
    """For each offset bool (3, B, rows, columns): pairs of background, of a class, and different.

    Of the pairs of :func:`source_window`; nothing where that is empty.

    Args:
        labels: (B, h, w) uint8; pairs with a label 255 are of no kind.
    """
    rows, columns = source_window(labels.shape[-2], labels.shape[-1], radius)
    own = labels[:, rows, columns]
    if not own.numel():
        return
    known = own != IGNORE
    background = known & (own == BACKGROUND)
    foreground = known & ~background
    for dy, dx in pair_offsets(radius):
        partner = labels[
            :, rows.start + dy : rows.stop + dy, columns.start + dx : columns.stop + dx
        ]
        same = own == partner
        different = known & ~same & (partner != IGNORE)
        yield (dy, dx), torch.stack([background & same, foreground & same, different])


def pair_counts(labels: Tensor, radius: int) -> Tensor:
    """How many pairs there are of each of :func:`pair_kinds`: three float32 numbers.

    Args:
        labels: (B, h, w) uint8; pairs with a label 255 do not count.
    """
    counts = [kinds.sum((1, 2, 3)).float() for _, kinds in pair_kinds(labels, radius)]
    return torch.stack(counts).sum(0) if counts else torch.zeros(3, device=labels.device)


def likelihood_sums(affinity: Tensor, kinds: Tensor) -> Tensor:
    """Sums (3,) of -log a over the alike pairs of one offset and of -log(1 - a) over the others.

    Args:
        affinity: (B, rows, columns) in [0, 1].
        kinds: (3, B, rows, columns), of :func:`pair_kinds`.
    """
    likelihood = torch.where(kinds[2], 1 - affinity, affinity) + EPSILON
    return kinds.flatten(1).to(affinity.dtype) @ -likelihood.log().flatten()


# -- The walk ----------------------------------------------------------------------------------


@torch.no_grad()
def random_walk(
    maps: Tensor,
    edge: Tensor,
    *,
    radius: int,
    beta: float,
    exponent: int,
    tolerance: float = 0.0,
) -> Tensor:
    """The walk of :func:`affinity_walk` with the affinities that boundaries leave.

    With boundaries of 1 everywhere nothing moves. (The released program pads the boundaries with 1;
    a path leaves no bounding box, so that changes no pair of the image.)

    Args:
        maps: (..., K, h, w) sources x, finite.
        edge: (..., h, w) boundaries e in [0, 1] of the same images.
        radius: pairs are nearer than it, in cells.
        beta, exponent, tolerance: as :func:`affinity_walk`.

    Returns:
        (..., K, h, w) in the dtype of the maps (half precision is computed in float32).

    Raises:
        DataError: if shapes do not fit, a boundary is outside [0, 1], or a value is NaN or Inf.
        ValueError: if beta, exponent, radius or tolerance is out of range.
    """
    _check_power(beta, exponent, tolerance)
    _check(maps, edge)
    maxima = path_maxima(edge.to(compute_dtype(maps)), radius)
    pairs = ((offset, 1 - maximum) for offset, maximum in maxima)
    return _walk(maps, pairs, beta, exponent, tolerance)


@torch.no_grad()
def affinity_walk(
    maps: Tensor,
    pairs: Iterable[tuple[Offset, Tensor]],
    *,
    beta: float,
    exponent: int,
    tolerance: float = 0.0,
) -> Tensor:
    """x T^(2^exponent), with T the affinities to the power of ``beta``, columns summing to 1.

    T has a unit diagonal before it is normalised. As the affinities are symmetric, every output
    is a weighted mean of the sources around it: constants stay, and nothing leaves the range of
    the sources. With affinities of 0 everywhere nothing moves.

    The power is summed as a series of Chebyshev polynomials of T, which is exact with 2^exponent
    terms; their weights fall like a Gaussian's, so that 98 steps for 256 give a tolerance of
    1e-6 on a VOC image.

    Time and memory grow with the grid: at radius 5 at most (68 + 5 K) h w numbers, 0.3 GB
    for one class of an image of 4,000 x 4,000 pixels in float32.

    Args:
        maps: (..., K, h, w) sources x, finite.
        pairs: offsets (dy, dx) to the right and below, each once, and the affinities a_ij in [0, 1]
            of all pairs of the grid at that offset, (..., h - dy, w - abs(dx)) by the upper left
            corner of the pair's bounding box. Taken one after the other.
        beta: power of the affinities, > 0.
        exponent: log2 of the number of steps.
        tolerance: largest error, as a part of the largest absolute source, that the terms left out
            may make; 0 leaves out none. Rounding is not counted.

    Returns:
        (..., K, h, w) in the dtype of the maps (half precision is computed in float32).

    Raises:
        DataError: if shapes do not fit, an offset comes twice or points backwards, an affinity is
            outside [0, 1], or a value is NaN or Inf.
        ValueError: if beta, exponent or tolerance is out of range.
    """
    _check_power(beta, exponent, tolerance)
    if maps.ndim < 3 or not maps.shape[-1] * maps.shape[-2]:
        raise DataError(f"maps are {tuple(maps.shape)}; expected (..., K, h, w)")
    _check_finite(maps)
    return _walk(maps, _checked(maps, pairs), beta, exponent, tolerance)


def _walk(
    maps: Tensor,
    pairs: Iterable[tuple[Offset, Tensor]],
    beta: float,
    exponent: int,
    tolerance: float,
) -> Tensor:
    """:func:`affinity_walk` of what was checked."""
    dtype = compute_dtype(maps)
    height, width = maps.shape[-2:]
    plane = torch.zeros((*maps.shape[:-3], height, width), dtype=dtype, device=maps.device)
    shifts, weights, degree = _pair_weights(plane, pairs, beta)
    factors = _series(2**exponent, _tail(tolerance, height * width, len(shifts)))

    current = maps.to(dtype).flatten(-2).clone()
    low, high = current.amin(-1, keepdim=True), current.amax(-1, keepdim=True)
    change = torch.empty_like(current)
    step = _Step(shifts, weights, current, change)
    total = factors[0] * current
    once, twice = 1 / degree, 2 / degree
    difference = torch.zeros_like(current)
    for number, factor in enumerate(factors[1:], start=1):
        # T_k+1(P) = 2 P T_k - T_k-1 in differences: where the map is even, nothing is rounded.
        step()
        difference.addcmul_(change, once if number == 1 else twice)
        current += difference
        if factor:
            total.add_(current, alpha=factor)
    return total.clamp_(low, high).reshape(maps.shape).to(maps.dtype)


class _Step:
    """``change`` = sum over partners of weight times (partner - self), from ``current``.

    Differences instead of products keep the rounding of hundreds of steps below 1e-5; products lose
    as much as 1e-3. Each pair's difference serves both its cells, so that the weights of one half
    plane, which fit a processor's cache, are enough. The views are made once: making them takes
    longer than the arithmetic.
    """

    def __init__(
        self, shifts: list[int], weights: list[Tensor], current: Tensor, change: Tensor
    ) -> None:
        count = current.shape[-1]
        between = torch.empty_like(current)
        self.change = change
        self.views = [
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

    def __call__(self) -> None:
        self.change.zero_()
        for partner, own, between, weight, to_own, to_partner in self.views:
            torch.sub(partner, own, out=between)
            to_own.addcmul_(weight, between)
            to_partner.addcmul_(weight, between, value=-1)


def _pair_weights(
    zeros: Tensor, pairs: Iterable[tuple[Offset, Tensor]], beta: float
) -> tuple[list[int], list[Tensor], Tensor]:
    """Of each offset the distance of a pair in the flat grid and (..., 1, n) weights a^beta.

    Zero where a cell has no partner at the offset. The third is the (..., 1, n) sum of each cell's
    weights with both its partners, and of 1 for itself: the columns' sums.

    Args:
        zeros: (..., h, w), for the shape, dtype and device.
    """
    height, width = zeros.shape[-2:]
    shifts, weights = [], []
    degree = torch.ones_like(zeros).flatten(-2)
    for (dy, dx), affinity in pairs:
        plane = torch.zeros_like(zeros)
        first = max(0, -dx)
        window = plane[..., : height - dy, first : first + width - abs(dx)]
        torch.pow(affinity, beta, out=window)
        weight, shift = plane.flatten(-2), dy * width + dx
        degree += weight
        degree[..., shift:] += weight[..., : weight.shape[-1] - shift]
        shifts.append(shift)
        weights.append(weight[..., None, :])
    return shifts, weights, degree[..., None, :]


def _tail(tolerance: float, count: int, offsets: int) -> float:
    """Weight of the terms that may be left out for an error of ``tolerance`` in any cell.

    P is similar to a symmetric matrix with eigenvalues in [-1, 1], where no polynomial exceeds 1;
    the similarity costs the root of the degrees' sum at most. Scaling the rest up costs a factor 2.
    """
    return tolerance / (2 * math.sqrt(count * (2 * offsets + 1)))


@cache
def _series(steps: int, tail: float) -> tuple[float, ...]:
    """Factors of T_0, T_1, ... in x^steps, to the first that leave ``tail`` or less, of sum 1.

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


def _check_power(beta: float, exponent: int, tolerance: float) -> None:
    if not beta > 0 or exponent < 0 or not tolerance >= 0:
        raise ValueError(
            f"expected beta > 0, exponent >= 0 and tolerance >= 0, got {beta}, {exponent} and "
            f"{tolerance}"
        )


def _check_finite(maps: Tensor) -> None:
    if not bool(torch.isfinite(maps).all()):
        raise DataError("the maps hold NaN or Inf; make them again")


def _checked(
    maps: Tensor, pairs: Iterable[tuple[Offset, Tensor]]
) -> Iterator[tuple[Offset, Tensor]]:
    """The pairs, each refused if it does not fit the maps; in the dtype of the computation."""
    height, width = maps.shape[-2:]
    seen: set[Offset] = set()
    for offset, affinity in pairs:
        dy, dx = offset
        if offset in seen or offset <= (0, 0) or dy >= height or abs(dx) >= width:
            raise DataError(
                f"the offset {offset} comes twice, points backwards or leaves the grid of "
                f"{height} x {width} cells; give each pair of cells once"
            )
        seen.add(offset)
        expected = (*maps.shape[:-3], height - dy, width - abs(dx))
        if tuple(affinity.shape) != expected:
            raise DataError(
                f"affinities at the offset {offset} are {tuple(affinity.shape)}; expected "
                f"{expected} for maps {tuple(maps.shape)}"
            )
        # of NaN both comparisons are false
        if not bool(((affinity >= 0) & (affinity <= 1)).all()):
            raise DataError(
                f"affinities at the offset {offset} hold NaN or values outside [0, 1]; find what "
                "made them"
            )
        yield offset, affinity.to(compute_dtype(maps))


def _check(maps: Tensor, edge: Tensor) -> None:
    lead = edge.shape[:-2]
    if (
        edge.ndim < 2
        or maps.ndim != edge.ndim + 1
        or maps.shape[:-3] != lead
        or maps.shape[-2:] != edge.shape[-2:]
        or edge.numel() == 0
    ):
        raise DataError(
            f"maps {tuple(maps.shape)} and boundaries {tuple(edge.shape)} do not fit; expected "
            "(..., K, h, w) and (..., h, w) of the same images"
        )
    _check_finite(maps)
    # of NaN both comparisons are false
    if not bool(((edge >= 0) & (edge <= 1)).all()):
        raise DataError(
            "the boundaries hold NaN or values outside [0, 1]; give the sigmoid of the logits"
        )


# -- Masks -------------------------------------------------------------------------------------


def propagate(maps: Tensor, edge: Tensor, settings: IrnSettings) -> Tensor:
    """Walk the maps from where there is no boundary (specification of IRN, 8.2 to 8.4).

    Args:
        maps: (..., K, h, w), ``cam`` at stride 4, non-negative.
        edge: (..., h, w) boundaries e in [0, 1].

    Returns:
        (..., K, h, w): the maps to the power of ``settings.sharpness``, times 1 - e, after the
        walk; not normalised.

    Raises:
        DataError: as :func:`random_walk`.
    """
    _check(maps, edge)
    sources = maps if settings.sharpness == 1 else maps.pow(settings.sharpness)
    return random_walk(
        sources * (1 - edge[..., None, :, :]).to(maps.dtype),
        edge,
        radius=settings.walk_radius,
        beta=settings.beta,
        exponent=settings.exponent,
        tolerance=settings.tolerance,
    )


def pseudo_maps(walked: Tensor, size: tuple[int, int]) -> Tensor:
    """Walked maps at the image's size, divided by the maximum over all classes jointly.

    Args:
        walked: (K, h, w) at stride 4.
        size: (H, W) of the image in pixels, with h = ceil(H / 4) and w = ceil(W / 4).

    Returns:
        (K, H, W) in [0, 1]; zeros where nothing is above zero.

    Raises:
        DataError: if the size does not fit the grid.
    """
    height, width = size
    grid = (-(-height // STRIDE), -(-width // STRIDE))
    if walked.ndim != 3 or tuple(walked.shape[-2:]) != grid:
        raise DataError(
            f"walked maps {tuple(walked.shape)} are not those of an image of {height} x {width} "
            f"pixels; expected (K, {grid[0]}, {grid[1]})"
        )
    if not len(walked):
        return walked.new_zeros(0, height, width)
    full = F.interpolate(walked[None], scale_factor=STRIDE, mode="bilinear", align_corners=False)
    cut = full[0, :, :height, :width]
    top = cut.max()
    return cut / top if float(top) > 0 else torch.zeros_like(cut)


def pseudo_mask(walked: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """The best class of each pixel where its share of the joint maximum is above ``threshold``.

    Args:
        walked, size: as :func:`pseudo_maps`.

    Returns:
        int64 (H, W): 0 for background, k + 1 for the k-th class; to be given to
        :func:`lpcam.masks.to_mask`.
    """
    return seeds(pseudo_maps(walked, size), threshold)
