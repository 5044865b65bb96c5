"""Dense CRF: mean field in a fully connected random field, on permutohedral lattices, in torch.

The model is that of Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with
Gaussian Edge Potentials" (2011): a unary energy for every pixel and label, and between every two
pixels a Potts energy, weighted by a Gaussian of their positions and by a bilateral one of their
positions and colours. Mean field repeats

    Q_i(l) proportional to exp(-U_i(l) + sum_m w_m sum_j k_m(f_i, f_j) Q_j(l)),

the sum over j being a Gaussian filter, which runs on the lattice of Adams, Baek and Davis, "Fast
High-Dimensional Filtering Using the Permutohedral Lattice" (2010): splat onto lattice points, blur
along the lattice's directions, slice. Each kernel is normalised symmetrically, D^-1/2 K D^-1/2 with
D the row sums. A pixel counts among its own neighbours, as in the authors' program.

Nothing is compiled and every step is a vectorised operation: lattice points are made unique by
sorting packed integer keys, and splat, blur and slice are sums of weighted rows
(``torch.nn.functional.embedding_bag``), for both kernels at once. The same bytes come out whatever
the number of threads, and whether images come alone or in a batch. Runs on CPUs and CUDA GPUs.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.errors import DataError
from lpcam.presets import CrfSettings
from lpcam.refine.inputs import check_image_and_maps, compute_dtype
from lpcam.resources import available_memory

NORM_EPSILON = 1e-20
"""Added to the row sums of a kernel before their square root is taken."""

SAFE_EXPONENT = 80.0
"""exp of it is finite in float32, as are sums of many labels' exponentials."""

PACKED_BITS = 63
"""Of a non-negative int64: a lattice point's code and a position have to fit in to be sorted as
one number."""

CODE_BITS = 52
"""Of a lattice point's code, which is computed in float64."""

# -- Unary energies ------------------------------------------------------------------------------


def unary_from_labels(labels: Tensor, count: int, gt_prob: float) -> Tensor:
    """Energies of hard labels that are right with a given probability.

    -log gt_prob for a pixel's label, -log((1 - gt_prob) / (count - 1)) for each other one
    (specification of IRN, section 3).

    Args:
        labels: (..., H, W) integers in [0, count).
        count: n, the number of labels, at least 2; the background is a label like any other.
        gt_prob: in (0, 1).

    Returns:
        (..., n, H, W) float32 energies.

    Raises:
        DataError: if labels are not integers or out of range, or if there are fewer than two.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise DataError(f"hard labels are integers, got {labels.dtype}; round or threshold first")
    _check_count(count)
    if not 0.0 < gt_prob < 1.0:
        raise DataError(f"gt_prob must lie between 0 and 1, got {gt_prob}")
    lowest, highest = (int(v) for v in torch.aminmax(labels)) if labels.numel() else (0, 0)
    if lowest < 0 or highest >= count:
        raise DataError(
            f"labels reach from {lowest} to {highest}, expected 0 to {count - 1} for {count} "
            "labels; give pixels to ignore (255) a label first"
        )
    given, other = -math.log(gt_prob), -math.log((1.0 - gt_prob) / (count - 1))
    shape = (*labels.shape[:-2], count, *labels.shape[-2:])
    energy = torch.full(shape, other, dtype=torch.float32, device=labels.device)
    return energy.scatter_(-3, labels.unsqueeze(-3).long(), given)


def unary_from_probabilities(probabilities: Tensor, clip: float) -> Tensor:
    """Energies -log max(p, clip); the scores of a pixel need not sum to one.

    Args:
        probabilities: (..., n, H, W) in [0, 1], n at least 2.
        clip: smallest probability, above 0.

    Returns:
        energies of the same shape and dtype.

    Raises:
        DataError: if values are no numbers or outside [0, 1], or if there are fewer than two
            labels.
    """
    if not probabilities.is_floating_point():
        raise DataError(f"probabilities are floating-point numbers, got {probabilities.dtype}")
    if probabilities.dim() < 3:
        raise DataError(
            f"probabilities have the shape (..., labels, height, width), got "
            f"{tuple(probabilities.shape)}"
        )
    _check_count(probabilities.shape[-3])
    if probabilities.numel():
        lowest, highest = (float(v) for v in torch.aminmax(probabilities))
        if math.isnan(lowest) or math.isnan(highest):
            raise DataError("probabilities hold NaN; find the map that made them")
        if lowest < 0.0 or highest > 1.0:
            raise DataError(
                f"probabilities reach from {lowest:.4g} to {highest:.4g}, expected [0, 1]; "
                "take the softmax of logits, and normalise maps"
            )
    # log in float32 at least: 1e-5 is barely there in half precision
    return -probabilities.to(compute_dtype(probabilities)).clamp(min=clip).log()


def _check_count(count: int) -> None:
    if count < 2:
        raise DataError(
            f"a CRF needs at least two labels, got {count}: without a class there is nothing to "
            "decide, and every pixel is background"
        )


# -- The permutohedral lattice -------------------------------------------------------------------


@dataclass(frozen=True)
class Lattice:
    """Where P points of d dimensions lie in the permutohedral lattice, and how to filter on it.

    Its M lattice points are numbered by the first of the points around them, so that what lies
    together in an image lies together in memory. Row M of a table over them stays zero: it stands
    for neighbours that are not there.
    """

    vertices: Tensor
    """(d + 1, P) int32: the lattice points around each point, one of each remainder."""
    weights: Tensor
    """(d + 1, P): barycentric weights of those, summing to one."""
    offsets: Tensor
    """(M + 1,) int32: where the points around each lattice point begin in ``members``."""
    members: Tensor
    """(P (d + 1),) int32: the points around each lattice point, in ascending order."""
    member_weights: Tensor
    """(P (d + 1),): their weights."""
    blur: Tensor
    """(d + 1, M + 1, 3) int32: each lattice point and the next ones either way along a direction;
    M where there is none."""

    @property
    def size(self) -> int:
        """M, the number of lattice points."""
        return self.offsets.shape[0] - 1

    @property
    def dimensions(self) -> int:
        """d."""
        return self.vertices.shape[0] - 1

    @property
    def scale(self) -> float:
        """What undoes the blur's gain: 1 / (1 + 2^-d)."""
        return 1.0 / (1.0 + 2.0**-self.dimensions)

    def filter(self, values: Tensor) -> Tensor:
        """Approximate sum over j of exp(-|f_i - f_j|^2 / 2) v_j, up to a factor near 1.

        Args:
            values: (P, C) of the lattice's dtype.

        Returns:
            (P, C)
        """
        return join([self]).apply(values)


def permutohedral_lattice(positions: Tensor) -> Lattice:
    """Lattice around points whose kernel is the unit Gaussian exp(-|f_i - f_j|^2 / 2).

    Args:
        positions: (d, P) float32 or float64, divided by the kernel's standard deviations.

    Raises:
        DataError: if there are no points, or if they reach over too many lattice points to be
            numbered.
    """
    d, count = positions.shape
    if not count:
        raise DataError("a lattice needs at least one point, got none")
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
    codes = base.long().repeat(d + 1, 1)
    for r in range(d + 1):
        step = turn * r - (ranks > d - r).long() @ torch.tensor(strides)
        codes[r] += step.to(positions.device).index_select(0, order)
    del corner, rank, base, order

    codes, places = _sort_with_positions(codes, turn * (d + 1))
    codes = codes.view(-1)
    first = torch.ones_like(codes, dtype=torch.bool)
    torch.ne(codes[1:], codes[:-1], out=first[1:])
    begins = first.nonzero().view(-1)
    found = first.cumsum(0, dtype=torch.int32).sub_(1)
    codes = codes.index_select(0, begins)
    del first

    # From the order of codes to that of the first points.
    size = begins.shape[0]
    leaders = places.view(-1).index_select(0, begins)
    order = _sort_with_positions(leaders.unsqueeze(0), count)[1].view(-1)
    number = torch.empty(size, dtype=torch.int32, device=positions.device)
    number[order] = torch.arange(size, dtype=torch.int32, device=positions.device)
    places += torch.arange(0, count * (d + 1), count, device=positions.device).unsqueeze(1)
    places = places.view(-1)
    vertices = torch.empty_like(found)
    vertices[places] = number.index_select(0, found)
    del found
    ends = torch.cat([begins[1:], begins.new_tensor([count * (d + 1)])])
    lengths = (ends - begins).index_select(0, order)
    offsets = torch.zeros(size + 1, dtype=torch.int64, device=positions.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    moved = torch.repeat_interleave(
        begins.index_select(0, order) - offsets[:-1], lengths, output_size=count * (d + 1)
    )
    moved += torch.arange(count * (d + 1), device=positions.device)
    places = places.index_select(0, moved)
    del moved
    return Lattice(
        vertices=vertices.view(d + 1, count),
        weights=barycentric,
        offsets=offsets.to(torch.int32),
        member_weights=barycentric.view(-1).index_select(0, places),
        members=places.remainder_(count).to(torch.int32),
        blur=_blur_rows(codes, number, strides, turn),
    )


def _enclosing_simplex(positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Corner with remainder 0 in units of d + 1, ranks, and barycentric weights: (d + 1, P) each.

    Section 3.1 of Adams et al.; the corner and weights are floating-point, the ranks int8.
    """
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


def _sort_with_positions(codes: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """Rows of codes below ``bound`` in ascending order, and where each was; ties keep their order.

    The given codes are overwritten where that saves memory.
    """
    bits = codes.shape[1].bit_length()
    if bound.bit_length() + bits > PACKED_BITS:
        found = torch.sort(codes, dim=1, stable=True)
        return found.values, found.indices
    packed = codes.bitwise_left_shift_(bits)
    packed |= torch.arange(codes.shape[1], device=codes.device)
    packed = _sort(packed)
    positions = packed & ((1 << bits) - 1)
    return packed.bitwise_right_shift_(bits), positions


def _sort(values: Tensor) -> Tensor:
    """Rows of int64 in ascending order; overwrites them on a CPU."""
    if values.device.type != "cpu":
        return values.sort(dim=-1).values
    # NumPy sorts numbers that need not say where they were several times as fast.
    values.numpy().sort(axis=-1)
    return values


def _blur_rows(codes: Tensor, number: Tensor, strides: Sequence[int], turn: int) -> Tensor:
    """Every lattice point and its neighbours along every direction: see ``Lattice.blur``.

    Args:
        codes: (M,) ascending: r turn + sum of q_i strides_i.
        number: (M,) int32: the lattice point of each code.
        strides: of the digits q_1..q_d.
        turn: of the remainder r.
    """
    d, count = len(strides), codes.shape[0]
    result = torch.full((d + 1, count + 1, 3), count, dtype=torch.int32, device=codes.device)
    result[:, :, 0] = torch.arange(count + 1, dtype=torch.int32, device=codes.device)
    # One way along direction j every coordinate falls by one, but the j-th grows by d. From
    # remainder 0 that leads to remainder d with every q_i one lower. Points of remainder 0 come
    # first and their neighbours last: with them moved to the end, the neighbours ascend too.
    zero = int(torch.searchsorted(codes, turn))
    back = torch.cat([codes[zero:] - turn, codes[:zero] + (d * turn - sum(strides))])
    origin = torch.cat([number[zero:], number[:zero]])
    # Sorted together, a neighbour that exists stands behind the point that it is.
    codes, back = codes * 4, back * 4 + 1
    for j, stride in enumerate([*strides, 0]):
        both = _sort(torch.cat([codes, back + stride * 4]))
        at = (both[1:] - both[:-1] == 1).nonzero().view(-1)
        before = ((both & 1) == 0).cumsum(0, dtype=torch.int32).index_select(0, at)
        target = number.index_select(0, before - 1)
        source = origin.index_select(0, at + 1 - before)
        result[j, source, 1] = target
        result[j, target, 2] = source
    return result


# -- Filters: several lattices in one ------------------------------------------------------------


@dataclass(frozen=True)
class JoinedFilter:
    """A sum of filters over the same points, as sums of weighted rows (splat, blur, slice)."""

    splat: tuple[Tensor, Tensor, Tensor]
    """Rows of each bag, where bags begin (and the last ends), weights of the rows."""
    blur: list[Tensor]
    """Rows of each bag of three, for each pass."""
    blur_offsets: Tensor
    blur_weights: Tensor
    slice: tuple[Tensor, Tensor, Tensor]

    def apply(self, values: Tensor) -> Tensor:
        """(P, C) from (P, C)."""
        values = _sum_rows(values, *self.splat)
        for rows in self.blur:
            values = _sum_rows(values, rows, self.blur_offsets, self.blur_weights)
        return _sum_rows(values, *self.slice)


def join(
    lattices: Sequence[Lattice],
    before: Sequence[Tensor] | None = None,
    after: Sequence[Tensor] | None = None,
) -> JoinedFilter:
    """The filter sum over m of diag(after_m) K_m diag(before_m), in one pass over the points.

    Args:
        lattices: over the same P points.
        before, after: (P,) factors for each lattice; left out, ones.
    """
    points = lattices[0].vertices.shape[1]
    width = sum(lattice.vertices.shape[0] for lattice in lattices)
    vertices = lattices[0].vertices.new_empty(points, width)
    weights = lattices[0].weights.new_empty(points, width)
    offsets, member_weights = [], []
    blur: list[list[Tensor]] = [[] for _ in range(max(x.dimensions for x in lattices) + 1)]
    rows = entries = column = 0
    for number, lattice in enumerate(lattices):
        columns = slice(column, column + lattice.vertices.shape[0])
        vertices[:, columns] = (lattice.vertices + rows if rows else lattice.vertices).t()
        factor = after[number] * lattice.scale if after else lattice.scale
        weights[:, columns] = (lattice.weights * factor).t()
        into = lattice.member_weights
        if before:
            into = into * before[number].index_select(0, lattice.members)
        member_weights.append(into)
        offsets.append(lattice.offsets + entries)
        still = lattice.blur.new_full((lattice.size + 1, 3), lattice.size)
        still[:, 0] = lattice.blur[0, :, 0]
        for direction, bags in enumerate(blur):
            own = lattice.blur[direction] if direction <= lattice.dimensions else still
            bags.append(own + rows if rows else own)
        column = columns.stop
        rows += lattice.size + 1
        entries += lattice.members.shape[0]
    device = vertices.device
    end = torch.tensor([entries], dtype=torch.int32, device=device)
    return JoinedFilter(
        splat=(
            torch.cat([lattice.members for lattice in lattices]),
            torch.cat([*offsets, end]),
            torch.cat(member_weights),
        ),
        blur=[torch.cat(bags).view(-1) for bags in blur],
        blur_offsets=torch.arange(0, 3 * rows + 1, 3, dtype=torch.int32, device=device),
        blur_weights=weights.new_tensor([1.0, 0.5, 0.5]).repeat(rows),
        slice=(
            vertices.view(-1),
            torch.arange(0, points * width + 1, width, dtype=torch.int32, device=device),
            weights.view(-1),
        ),
    )


def _sum_rows(table: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(
        rows, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


# -- Kernels -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """A lattice and the symmetric normalisation of its kernel."""

    lattice: Lattice
    norm: Tensor
    """(P,): 1 / sqrt of the kernel's row sums."""

    @classmethod
    def of(cls, positions: Tensor) -> Kernel:
        """Of positions (d, P) divided by the standard deviations."""
        lattice = permutohedral_lattice(positions)
        return cls(lattice, (_row_sums(lattice) + NORM_EPSILON).rsqrt_())


def _row_sums(lattice: Lattice) -> Tensor:
    """The filter of ones: (P,). One column is quicker gathered than summed by rows."""
    ones = lattice.weights.new_ones(lattice.vertices.shape[1], 1)
    table = _sum_rows(
        ones,
        lattice.members,
        torch.cat([lattice.offsets, lattice.offsets[-1:]]),  # row M stays zero
        lattice.member_weights,
    ).view(-1)
    for rows in lattice.blur:
        either = table.index_select(0, rows[:, 1]) + table.index_select(0, rows[:, 2])
        table = table + 0.5 * either
    sums = torch.zeros_like(lattice.weights[0])
    for vertices, weights in zip(lattice.vertices, lattice.weights, strict=True):
        sums += table.index_select(0, vertices) * weights
    return sums * lattice.scale


def gaussian_kernel(
    size: tuple[int, int], sxy: float, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> Kernel:
    """Kernel of the pixels' positions alone; the same for every image of a size.

    Args:
        size: (H, W).
        sxy: standard deviation in pixels.
    """
    return Kernel.of(_grid(size, device, dtype).div_(sxy))


def bilateral_kernel(
    image: Tensor, sxy: float, srgb: float, *, dtype: torch.dtype = torch.float32
) -> Kernel:
    """Kernel of positions and colours.

    Args:
        image: (H, W, 3) uint8.
        sxy: standard deviation in pixels.
        srgb: standard deviation in levels of [0, 255].
    """
    height, width, _ = image.shape
    colours = image.reshape(-1, 3).t().to(dtype).div_(srgb)
    grid = _grid((height, width), image.device, dtype).div_(sxy)
    return Kernel.of(torch.cat([grid, colours]))


def _grid(size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """x and y of each pixel: (2, H W)."""
    y, x = torch.meshgrid(
        *(torch.arange(length, device=device, dtype=dtype) for length in size), indexing="ij"
    )
    return torch.stack([x, y]).view(2, -1)


# -- Mean field ----------------------------------------------------------------------------------


def mean_field(unary: Tensor, pairwise: JoinedFilter | None, iterations: int) -> Tensor:
    """Marginals Q after so many iterations from Q = softmax(-U); zero iterations give that.

    Args:
        unary: (P, n) energies.
        pairwise: the kernels' sum, none of whose weights is negative; None: there are no kernels.

    Returns:
        (P, n) in [0, 1], rows summing to one.
    """
    # The least energy of a pixel becomes 0, so that one of its exponents is not negative.
    energy = unary - unary.amin(1, keepdim=True)
    marginals = _normalise(energy.neg().exp_())
    if pairwise is None:
        return marginals
    bounded: bool | None = None
    for _ in range(iterations):
        exponents = pairwise.apply(marginals)
        if bounded is None:
            # Marginals sum to one, so these sums are the same in every iteration, and no exponent
            # is above them.
            bounded = bool(exponents.sum(1).max() < SAFE_EXPONENT)
        exponents -= energy
        if not bounded:
            exponents -= exponents.amax(1, keepdim=True)
        marginals = _normalise(exponents.exp_())
    return marginals


def join_kernels(kernels: Sequence[Kernel], weights: Sequence[float]) -> JoinedFilter:
    """The sum over m of w_m times the symmetrically normalised kernel m.

    Args:
        kernels: at least one, over the same points.
        weights: w_m of each kernel's Potts energy, not negative.
    """
    norms = [kernel.norm for kernel in kernels]
    return join(
        [kernel.lattice for kernel in kernels],
        norms,
        [norm * weight for norm, weight in zip(norms, weights, strict=True)],
    )


def _normalise(values: Tensor) -> Tensor:
    return values.div_(values.sum(1, keepdim=True))


class DenseCrf:
    """A dense CRF with the parameters of one method, for images of any sizes.

    The Gaussian kernel depends on the image's size alone; those of the last few sizes are kept.
    May be shared by threads.
    """

    def __init__(
        self, settings: CrfSettings, *, memory: int | None = None, sizes_kept: int = 4
    ) -> None:
        """Make a CRF.

        Args:
            settings: kernels, weights, iterations and the constants of the unary energies.
            memory: bytes that one image may need; more is refused. None: three quarters of the
                memory that the process may use, or that is free on the GPU.
            sizes_kept: how many sizes' Gaussian kernels are kept.
        """
        self.settings = settings
        self.memory = memory
        self.sizes_kept = sizes_kept
        self._gaussians: OrderedDict[tuple[object, ...], Kernel] = OrderedDict()
        self._lock = Lock()

    def refine_labels(self, image: Tensor, labels: Tensor, count: int) -> Tensor:
        """Marginals from hard labels, by ``gt_prob`` of the settings.

        Args:
            image: (..., H, W, 3) RGB, uint8: as it was read, neither normalised nor resized
                otherwise than the labels.
            labels: (..., H, W) integers in [0, count).
            count: n, the number of labels, at least 2.

        Returns:
            (..., n, H, W) float32, summing to one over the labels.

        Raises:
            DataError: as :func:`unary_from_labels` and :meth:`__call__`.
        """
        return self(image, unary_from_labels(labels, count, self.settings.gt_prob))

    def refine_probabilities(self, image: Tensor, probabilities: Tensor) -> Tensor:
        """Marginals from probabilities or scores, cut off at ``clip`` of the settings.

        Args:
            image: (..., H, W, 3) RGB, uint8.
            probabilities: (..., n, H, W) in [0, 1].

        Returns:
            (..., n, H, W) of the probabilities' dtype.

        Raises:
            DataError: as :func:`unary_from_probabilities` and :meth:`__call__`.
        """
        unary = unary_from_probabilities(probabilities, self.settings.clip)
        return self(image, unary).to(probabilities.dtype)

    @torch.no_grad()
    def __call__(self, image: Tensor, unary: Tensor) -> Tensor:
        """Marginals from unary energies.

        Images come one after another. Of one that ``Tensor.expand`` repeats for several
        energies the kernels are made once.

        Args:
            image: (..., H, W, 3) RGB, uint8.
            unary: (..., n, H, W) finite energies on the same device; lower is likelier.

        Returns:
            (..., n, H, W) of the energies' dtype, summing to one over the labels.

        Raises:
            DataError: if shapes, devices or dtypes do not fit, if an energy is not finite, if there
                are fewer than two labels, or if an image needs more memory than allowed.
        """
        check_image_and_maps(image, unary, "unary energies")
        _check_count(unary.shape[-3])
        height, width = unary.shape[-2:]
        count = unary.shape[-3]
        dtype = compute_dtype(unary)
        result = torch.empty_like(unary, memory_format=torch.contiguous_format)
        images = image.reshape(-1, height, width, 3)
        repeated = len(images) > 1 and images.stride(0) == 0
        pairwise: JoinedFilter | None = None
        for number, (energy, into) in enumerate(
            zip(
                unary.reshape(-1, count, height, width),
                result.view(-1, count, height * width),
                strict=True,
            )
        ):
            rows = energy.reshape(count, -1).t().to(dtype).contiguous()
            if number == 0 or not repeated:
                pairwise = self._pairwise(images[number], rows, dtype)
            into.copy_(mean_field(rows, pairwise, self.settings.iterations).t())
        return result

    def _pairwise(self, image: Tensor, unary: Tensor, dtype: torch.dtype) -> JoinedFilter | None:
        """The joined kernels of an image; None where no kernel has a weight."""
        settings = self.settings
        size = (int(image.shape[0]), int(image.shape[1]))
        self._refuse_above_bound(size, unary, 0)
        kernels, weights = [], []
        if settings.gaussian_weight:
            kernels.append(self._gaussian(size, image.device, dtype))
            weights.append(settings.gaussian_weight)
        if settings.bilateral_weight:
            sxy, srgb = settings.bilateral_sxy, settings.bilateral_srgb
            kernels.append(bilateral_kernel(image, sxy, srgb, dtype=dtype))
            weights.append(settings.bilateral_weight)
        self._refuse_above_bound(size, unary, sum(k.lattice.size for k in kernels))
        return join_kernels(kernels, weights) if kernels else None

    def _gaussian(self, size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Kernel:
        key = (*size, device, dtype)
        with self._lock:
            if key in self._gaussians:
                self._gaussians.move_to_end(key)
                return self._gaussians[key]
        kernel = gaussian_kernel(size, self.settings.gaussian_sxy, device=device, dtype=dtype)
        with self._lock:
            self._gaussians[key] = kernel
            while len(self._gaussians) > self.sizes_kept:
                self._gaussians.popitem(last=False)
        return kernel

    def _refuse_above_bound(self, size: tuple[int, int], unary: Tensor, lattice: int) -> None:
        need = required_memory(size, unary.shape[1], lattice, unary.element_size())
        bound = self.memory
        if bound is None:
            cuda = unary.device.type == "cuda"
            free = torch.cuda.mem_get_info(unary.device)[0] if cuda else available_memory()
            bound = free * 3 // 4
        if need > bound:
            raise DataError(
                f"a CRF of {unary.shape[1]} labels on an image of {size[1]} × {size[0]} pixels "
                f"needs about {need / 2**30:.2g} GiB, more than the {bound / 2**30:.2g} GiB "
                "allowed; resize the image and its maps, or allow more (argument memory)"
            )


def required_memory(
    size: tuple[int, int], labels: int, lattice: int = 0, element_size: int = 4
) -> int:
    """Bytes that mean field on one image takes, about, beside its image and energies.

    Args:
        size: (H, W).
        labels: n.
        lattice: number of lattice points of both kernels, which only the image tells; 0 counts
            what is needed without them.
        element_size: bytes of a number: 4 or 8.
    """
    # Four bytes a number: the joined splat and slice, the kept Gaussian kernel, codes and places
    # while the lattice is made; energies, marginals, exponents and the result. A lattice point has
    # its neighbours in six directions, twice while lattices are joined, and rows of values.
    numbers = math.prod(size) * (90 + 5 * labels) + lattice * (110 + 3 * labels)
    return numbers * element_size
