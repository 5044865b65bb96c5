"""Dense CRF: mean field in a fully connected random field (Krähenbühl and Koltun 2011).

Mean field repeats, for a kernel k_1 of positions and a kernel k_2 of positions and colours,

    Q_i(l) proportional to exp(-U_i(l) + sum_m w_m sum_j k_m(f_i, f_j) Q_j(l)).

The sum over j is a filter on :mod:`lpcam.refine.permutohedral` lattices, normalised symmetrically,
D^-1/2 K D^-1/2; a pixel counts among its neighbours, as in the authors' program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lpcam.method.seeds import seeds
from lpcam.refine import base
from lpcam.refine.permutohedral import Filter, Lattice, join, permutohedral_lattice
from lpcam.runtime.errors import DataError
from lpcam.runtime.resources import available_memory
from lpcam.runtime.settings import Fraction, Positive, PresetModel


class CrfSettings(PresetModel):
    """A dense CRF: unary energies, two kernels and mean field (specification of IRN, section 3)."""

    table: ClassVar[str] = "crf"
    preset: str = "irn"

    unary: Literal["labels", "probabilities"]
    """Input that the method gives to its CRF: hard labels or probabilities."""
    gt_prob: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Probability that a hard label is right."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Smallest probability of which the logarithm is taken."""
    gaussian_sxy: Positive
    """Standard deviation of the kernel of positions, in pixels."""
    gaussian_weight: Annotated[float, Field(ge=0.0)]
    """Potts weight of the kernel of positions; 0 leaves it out."""
    bilateral_sxy: Positive
    """Standard deviation of the positions in the kernel of positions and colours, in pixels."""
    bilateral_srgb: Positive
    """Standard deviation of the colours in the same kernel, in levels of [0, 255]."""
    bilateral_weight: Annotated[float, Field(ge=0.0)]
    """Potts weight of the kernel of positions and colours; 0 leaves it out."""
    iterations: Annotated[int, Field(ge=0)]
    """Number of mean-field iterations."""
    keep: Fraction
    """A class of an image keeps its seed if the CRF leaves less than this share of it; 0: never."""


NORM_EPSILON = 1e-20  #: Added to the row sums of a kernel before their square root is taken.
SAFE_EXPONENT = 80.0  #: exp of it is finite in float32, as are sums of many labels' exponentials.
KEPT_SIZES = 4  #: Number of image sizes whose Gaussian kernels are kept.
COLUMNS = 8  #: Columns of marginals that are filtered at once: hardly slower than one.
ROUNDING = 1e-3  #: Excess of maps over 1 that is cut off instead of refused.


def unary_from_labels(labels: Tensor, count: int, gt_prob: float) -> Tensor:
    """Energies (..., n, H, W) float32 of labels (..., H, W) in [0, n), right with ``gt_prob``.

    -log gt_prob for a pixel's label, -log((1 - gt_prob) / (n - 1)) for each of the ``count`` - 1
    others; DataError if labels are not integers or out of range, or there are fewer than two.
    """
    if labels.is_floating_point() or labels.dtype is torch.bool:
        raise DataError(f"hard labels must be integers, got {labels.dtype}; threshold them first")
    _check_count(count)
    lowest, highest = (int(v) for v in torch.aminmax(labels))
    if lowest < 0 or highest >= count:
        raise DataError(
            f"labels reach from {lowest} to {highest}, expected 0 to {count - 1} for {count} "
            "labels; give ignored pixels (255) a label first"
        )
    given, other = -math.log(gt_prob), -math.log((1.0 - gt_prob) / (count - 1))
    shape = (*labels.shape[:-2], count, *labels.shape[-2:])
    energy = torch.full(shape, other, dtype=torch.float32, device=labels.device)
    return energy.scatter_(-3, labels.unsqueeze(-3).long(), given)


def unary_from_probabilities(probabilities: Tensor, clip: float) -> Tensor:
    """Energies -log max(p, clip), float32 or longer, of scores in [0, 1]; else DataError."""
    lowest, highest = (float(v) for v in torch.aminmax(probabilities))
    floats = probabilities.is_floating_point()
    if not (floats and lowest >= 0.0 and highest <= 1.0):  # both are false for NaN
        raise DataError(
            f"probabilities are {probabilities.dtype} from {lowest:.4g} to {highest:.4g}, expected "
            "floating-point numbers in [0, 1]; take the softmax of logits, and normalise maps"
        )
    # in float32 at least, as half precision barely holds 1e-5
    return -probabilities.to(base.compute_dtype(probabilities)).clamp(min=clip).log()


def _check_count(count: int) -> None:
    if count < 2:
        raise DataError(f"a CRF needs at least two labels, got {count}")


def _kernel(positions: Tensor) -> tuple[Lattice, Tensor]:
    """Lattice of positions (d, P) over the deviations, and 1 / sqrt of the row sums (P,)."""
    lattice = permutohedral_lattice(positions)
    return lattice, (lattice.row_sums() + NORM_EPSILON).rsqrt_()


def _grid(size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """x and y of each pixel: (2, H W)."""
    y, x = torch.meshgrid(
        *(torch.arange(length, device=device, dtype=dtype) for length in size), indexing="ij"
    )
    return torch.stack([x, y]).view(2, -1)


def _mean_field(unary: Tensor, pairwise: Filter | None, iterations: int) -> Tensor:
    """Marginals Q (A, n, P) after some iterations from Q = softmax(-U) of A energies (A, n, P).

    Marginals sum to one, so those of the first label are not filtered: what it would get is the
    filter of ones without what the others get.
    """
    energy = (unary[:, 1:] - unary[:, :1]).permute(2, 0, 1).contiguous()  # relative to the first
    first, others = _softmax(energy.neg(), bounded=False)
    if pairwise is not None:
        whole = pairwise(energy.new_ones(len(energy), 1))[:, None]
        bounded = bool(whole.max() - energy.min() < SAFE_EXPONENT)
        for _ in range(iterations):
            exponents = pairwise(others.flatten(1)).view_as(energy)
            exponents += exponents.sum(2, keepdim=True) - whole
            first, others = _softmax(exponents.sub_(energy), bounded=bounded)
    return torch.cat([first.permute(1, 2, 0), others.permute(1, 2, 0)], 1)


def _softmax(exponents: Tensor, *, bounded: bool) -> tuple[Tensor, Tensor]:
    """Marginals of the first label, with exponent 0, and of others (P, A, n - 1), in place."""
    first = exponents.new_zeros(1, 1, 1)
    if not bounded:
        first = -exponents.amax(2, keepdim=True).clamp_(min=0)
        exponents += first
    exponents.exp_()
    first = first.exp()
    scale = (exponents.sum(2, keepdim=True) + first).reciprocal_()
    return first * scale, exponents.mul_(scale)


class DenseCrf:
    """A dense CRF with the parameters of one method, for images of any sizes; threads may share it.

    Args:
        memory: bytes that one image may need; an image that needs more is refused. None: three
            quarters of the memory that the process may use, or that is free on the GPU.

    Example:
        >>> crf, image = DenseCrf(CrfSettings.from_preset("irn")), torch.zeros(4, 4, 3).byte()
        >>> crf.refine_labels(image, torch.ones(4, 4, dtype=torch.int64), 2).argmax(0).unique()
        tensor([1])
    """

    def __init__(self, settings: CrfSettings, *, memory: int | None = None) -> None:
        self.settings = settings
        self.memory = memory
        self._gaussian = lru_cache(KEPT_SIZES)(
            lambda *grid: _kernel(_grid(*grid).div_(settings.gaussian_sxy))
        )

    def refine_labels(self, image: Tensor, labels: Tensor, count: int) -> Tensor:
        """Marginals (..., n, H, W) from hard labels, as :func:`unary_from_labels` takes them."""
        return self(image, unary_from_labels(labels, count, self.settings.gt_prob))

    def refine_probabilities(self, image: Tensor, probabilities: Tensor) -> Tensor:
        """Marginals (..., n, H, W) from probabilities or scores of that shape, in [0, 1]."""
        unary = unary_from_probabilities(probabilities, self.settings.clip)
        return self(image, unary).to(probabilities.dtype)

    @torch.no_grad()
    def __call__(self, image: Tensor, unary: Tensor) -> Tensor:
        """Marginals of finite energies (..., n, H, W), lower is likelier; of a pixel they sum to 1.

        Takes an image (H, W, 3) uint8 RGB, the same for all leading axes. DataError if inputs do
        not fit, there are fewer than two labels, or the image needs more memory than allowed.
        """
        base.check_image_and_maps(image, unary, "unary energies")
        count, height, width = unary.shape[-3:]
        _check_count(count)
        dtype = base.compute_dtype(unary)
        rows = unary.to(dtype).reshape(-1, count, height * width)
        together = min(len(rows), max(1, COLUMNS // (count - 1)))
        pairwise = self._pairwise(image, max(count, together * (count - 1)), dtype)
        marginals = [
            _mean_field(part, pairwise, self.settings.iterations)
            for part in torch.split(rows, together)
        ]
        return torch.cat(marginals).to(unary.dtype).reshape(unary.shape)

    def _pairwise(self, image: Tensor, labels: int, dtype: torch.dtype) -> Filter | None:
        """The joined kernels of an image, each times its weight; None where no kernel has one."""
        settings, size = self.settings, (int(image.shape[0]), int(image.shape[1]))
        self._check_memory(image, labels, dtype, 0)
        parts = []
        if settings.gaussian_weight:
            lattice, norm = self._gaussian(size, image.device, dtype)
            parts.append((lattice, norm, norm * settings.gaussian_weight))
        if settings.bilateral_weight:
            places = _grid(size, image.device, dtype).div_(settings.bilateral_sxy)
            colours = image.reshape(-1, 3).t().to(dtype).div_(settings.bilateral_srgb)
            lattice, norm = _kernel(torch.cat([places, colours]))
            parts.append((lattice, norm, norm * settings.bilateral_weight))
        self._check_memory(image, labels, dtype, sum(lattice.size for lattice, *_ in parts))
        return join(parts) if parts else None

    def _check_memory(self, image: Tensor, labels: int, dtype: torch.dtype, lattice: int) -> None:
        """Refuse an image that needs too much; ``lattice`` is the number of lattice points."""
        # Per pixel: the joined splat and slice, the kept Gaussian kernel, codes and places while
        # the lattice is made; energies, marginals, exponents and the result. Per lattice point:
        # neighbours in six directions, twice while lattices are joined, and rows of values.
        height, width = image.shape[:2]
        numbers = height * width * (90 + 5 * labels) + lattice * (110 + 3 * labels)
        need, bound = numbers * dtype.itemsize, self.memory
        if bound is None:
            cuda = image.device.type == "cuda"
            free = torch.cuda.mem_get_info(image.device)[0] if cuda else available_memory()
            bound = free * 3 // 4
        if need > bound:
            raise DataError(
                f"a CRF of {labels} labels on an image of {width} × {height} pixels needs about "
                f"{need / 2**30:.2g} GiB, more than the {bound / 2**30:.2g} GiB allowed; resize "
                "the image and its maps, or allow more (argument memory)"
            )


def crf_scores(crf: DenseCrf, image: Tensor, planes: Tensor, alphas: Sequence[float]) -> Tensor:
    """Posteriors (A, K + 1, H, W) of a background (1 - the highest map)^alpha and the classes.

    Takes an image (H, W, 3) uint8 RGB, maps (K, H, W) in [0, 1] and A powers; a larger one favours
    classes. Without a class the background is 1. DataError if they do not fit or are out of range.
    """
    scores = planes.to(base.compute_dtype(planes))
    if not len(scores):
        return scores.new_ones(len(alphas), 1, *scores.shape[-2:])
    lowest, highest = (float(value) for value in torch.aminmax(scores))
    if not (lowest >= 0 and highest <= 1 + ROUNDING):
        raise DataError(
            f"maps reach from {lowest:.4g} to {highest:.4g}, expected [0, 1]; divide each by its "
            "maximum"
        )
    scores = scores.clamp(max=1)
    free = 1 - scores.amax(0, keepdim=True)
    stacks = torch.stack([torch.cat([free**alpha, scores]) for alpha in alphas])
    return crf.refine_probabilities(image, stacks)


def keep_seeds(maps: Tensor, seed: Tensor, share: float) -> Tensor:
    """Maps (K, H, W) above `DECIDED` within a class, where classes that vanish keep their seed.

    ``seed`` (H, W) has 0 for background and k + 1 for the k-th plane. A class vanishes if less than
    ``share`` of its seed is left to it.

    Example:
        >>> seed = torch.tensor([[1, 1, 0]])
        >>> keep_seeds(torch.zeros(1, 1, 3), seed, 0.05).tolist()
        [[[1.0, 1.0, 0.0]]]
    """
    for place, plane in enumerate(maps if share else ()):
        own = seed == place + 1
        if bool(own.any()) and float((plane[own] > base.DECIDED).float().mean()) < share:
            planes = torch.arange(len(maps), device=maps.device)[:, None, None]
            maps = torch.where(own, (planes == place).to(maps), maps)
    return maps


class CrfRefinement(base.Refinement):
    """A dense CRF on the seeds."""

    title = "CRF"
    settings = CrfSettings
    crf_place = "on the seeds"

    def check(self, section: base.RefineSection) -> None:
        """Raise a ValueError if the CRF does not take hard labels."""
        base.check_label_crf(section)

    def refiner(self, job: base.Job, network: Path, folder: Path) -> base.Refine:
        """Cleans the seeds; classes that vanish may keep theirs (:func:`keep_seeds`)."""
        crf = DenseCrf(job.settings, memory=job.tools.memory)

        def refine(picture: base.Picture) -> Tensor:
            hard = seeds(picture.planes, job.source.seed_threshold)
            scores = crf.refine_labels(picture.image, hard, len(picture.planes) + 1)
            return keep_seeds(base.decided(scores), hard, crf.settings.keep)

        return refine


REFINEMENT = CrfRefinement()
