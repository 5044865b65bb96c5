"""The dense CRF against brute force, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lpcam.refine.crf import (
    CrfSettings,
    DenseCrf,
    keep_seeds,
    unary_from_labels,
    unary_from_probabilities,
)
from lpcam.refine.permutohedral import join, permutohedral_lattice
from lpcam.runtime.errors import DataError

IRN = CrfSettings.from_preset("irn")
PSA = CrfSettings.from_preset("psa")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """A smooth image with noise: (H, W, 3) uint8."""
    coarse = torch.rand((1, 3, 3, 4), generator=generator(seed)) * 255
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    noise = torch.randn((3, height, width), generator=generator(seed + 1)) * 6
    return (smooth + noise).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()


def scores(count: int, height: int, width: int, seed: int = 2) -> Tensor:
    drawn = torch.rand((count, height, width), generator=generator(seed))
    return (drawn * 4).softmax(0)


def test_join_is_the_weighted_sum_of_filters() -> None:
    values = torch.rand((99, 4), generator=generator(5))
    parts = [
        (permutohedral_lattice(torch.rand((d, 99), generator=generator(d)) * 5), *factors)
        for d, factors in zip((2, 5), torch.rand((2, 2, 99), generator=generator(6)), strict=True)
    ]
    expected = sum(join([part])(values) for part in parts)
    for ordered in (parts, parts[::-1]):
        torch.testing.assert_close(join(ordered)(values), expected, atol=1e-5, rtol=1e-5)


def test_against_brute_force() -> None:
    """The fully connected sums themselves; the lattice approximates them."""
    height, width = 14, 16
    image, unary = picture(height, width), unary_from_probabilities(scores(3, height, width), 1e-5)
    settings = CrfSettings.from_preset("irn", bilateral_sxy=8.0, bilateral_srgb=40.0)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([x, y], -1).reshape(-1, 2).double()
    colour = image.reshape(-1, 3).double()
    total = torch.zeros(len(place), len(place)).double()
    for features, weight in (
        (place / settings.gaussian_sxy, settings.gaussian_weight),
        (
            torch.cat([place / settings.bilateral_sxy, colour / settings.bilateral_srgb], 1),
            settings.bilateral_weight,
        ),
    ):
        kernel = torch.exp(-0.5 * torch.cdist(features, features) ** 2)
        norm = kernel.sum(1).rsqrt()
        total += weight * norm[:, None] * kernel * norm
    energy = unary.reshape(3, -1).t().double()
    marginals = (-energy).softmax(1)
    for _ in range(settings.iterations):
        marginals = (total @ marginals - energy).softmax(1)
    found = DenseCrf(settings)(image, unary).reshape(3, -1).t()
    assert float((found.argmax(1) == marginals.argmax(1)).double().mean()) > 0.97
    assert float((found - marginals).abs().mean()) < 0.03


@pytest.mark.parametrize("count", [2, 4, 12])
def test_problems_of_one_image_do_not_mix(count: int) -> None:
    """Also where there are more columns than are filtered at once."""
    image = picture(15, 18)
    given = torch.stack([scores(count, 15, 18, seed) for seed in range(6)]).view(
        2, 3, count, 15, 18
    )
    crf = DenseCrf(PSA)
    found = crf.refine_probabilities(image, given)
    for one, expected in zip(given.flatten(0, 1), found.flatten(0, 1), strict=True):
        torch.testing.assert_close(crf.refine_probabilities(image, one), expected)


def test_marginals_sum_to_one_and_move_towards_the_neighbours() -> None:
    image = torch.zeros(20, 20, 3, dtype=torch.uint8)
    image[:, 10:] = 200
    labels = (image[..., 0] > 0).long()
    labels[5, 5] = 1  # a speck that nothing in the image backs
    labels[12, 15] = 0
    found = DenseCrf(IRN).refine_labels(image, labels, 2)
    torch.testing.assert_close(found.sum(0), torch.ones(20, 20))
    assert torch.equal(found.argmax(0), (image[..., 0] > 0).long())


def test_no_kernel_and_no_iteration_give_the_softmax() -> None:
    image, given = picture(6, 7), scores(3, 6, 7)
    for change in (
        {"iterations": 0},
        {"gaussian_weight": 0.0, "bilateral_weight": 0.0},
    ):
        crf = DenseCrf(CrfSettings.from_preset("psa", **change))
        torch.testing.assert_close(crf.refine_probabilities(image, given), given)


def test_large_weights_do_not_overflow() -> None:
    image, given = picture(12, 12), scores(2, 12, 12)
    settings = CrfSettings.from_preset("psa", bilateral_weight=5000.0)
    found = DenseCrf(settings).refine_probabilities(image, given)
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found.sum(0), torch.ones(12, 12))


def test_energies() -> None:
    found = unary_from_labels(torch.tensor([[0, 2]]), 3, 0.7)
    right, wrong = -math.log(0.7), -math.log(0.15)
    expected = torch.tensor([[[right, wrong]], [[wrong, wrong]], [[wrong, right]]])
    torch.testing.assert_close(found, expected)
    given = torch.tensor([0.0, 1e-7, 0.25, 1.0]).view(4, 1, 1)
    clipped = unary_from_probabilities(given, 1e-5).flatten().tolist()
    assert clipped == pytest.approx([-math.log(1e-5), -math.log(1e-5), -math.log(0.25), 0.0])


@pytest.mark.parametrize(
    ("labels", "count", "message"),
    [
        (torch.zeros(2, 2), 2, "float32"),
        (torch.zeros(2, 2).long(), 1, "got 1"),
        (torch.full((2, 2), 255), 3, "from 255 to 255, expected 0 to 2"),
    ],
)
def test_bad_labels(labels: Tensor, count: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        unary_from_labels(labels, count, 0.7)


@pytest.mark.parametrize("value", [1, math.nan, 1.5, -0.1])
def test_bad_probabilities(value: float) -> None:
    with pytest.raises(DataError, match=f"from {value} to {value}"):
        unary_from_probabilities(torch.full((2, 2, 2), value), 1e-5)


def test_bad_energies() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(DataError, match=r"unary energies .* NaN"):
            DenseCrf(IRN)(picture(4, 5), torch.full((2, 4, 5), bad))
    with pytest.raises(DataError, match="at least two labels, got 1"):
        DenseCrf(IRN)(picture(4, 5), torch.zeros(1, 4, 5))


def test_memory_counts_the_lattice_once_it_is_known() -> None:
    noise = torch.randint(0, 256, (30, 40, 3), generator=generator(8)).to(torch.uint8)
    crf, given = DenseCrf(PSA, memory=2**20), scores(3, 30, 40)
    crf.refine_probabilities(torch.full_like(noise, 90), given)
    for image, planes in ((noise, given), (torch.full_like(noise, 90), given.double())):
        with pytest.raises(DataError, match=r"3 labels .* 40 × 30 pixels needs about .* GiB"):
            crf.refine_probabilities(image, planes)


def test_tiny_standard_deviations_are_refused() -> None:
    settings = CrfSettings.from_preset("irn", bilateral_srgb=1e-4)
    with pytest.raises(DataError, match="standard deviations are too small for the size"):
        DenseCrf(settings).refine_labels(picture(20, 20), torch.zeros(20, 20).long(), 2)


def test_classes_that_vanish_keep_their_seed() -> None:
    seed = torch.tensor([[1, 1, 1, 1, 2, 2, 0, 0]])
    first = torch.tensor([[0.9, 0.4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.7]])  # a quarter of its seed
    second = torch.tensor([[0.0, 0.0, 0.6, 0.3, 0.0, 0.5, 0.0, 0.0]])  # nothing: 0.5 is not above
    maps = torch.stack([first, second])
    assert keep_seeds(maps, seed, 0.0) is maps
    found = keep_seeds(maps, seed, 0.25)
    assert torch.equal(found[0, 0, [0, 1, 2, 3, 6, 7]], first[0, [0, 1, 2, 3, 6, 7]])
    assert found[:, 0, 4:6].tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert torch.equal(found[1, 0, :4], second[0, :4])
    found = keep_seeds(maps, seed, 0.3)  # more than a quarter is wanted now
    expected = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0.7], [0, 0, 0, 0, 1, 1, 0, 0]])
    assert torch.equal(found[:, 0], expected)
    nothing = torch.zeros(1, 8, dtype=torch.int64)  # a class without a seed has none to keep
    assert torch.equal(keep_seeds(maps, nothing, 0.3), maps)
    assert keep_seeds(torch.zeros(0, 1, 8), nothing, 0.3).shape == (0, 1, 8)
