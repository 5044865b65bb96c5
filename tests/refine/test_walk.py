"""Pairs, the walk against a dense matrix, and masks of walked maps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.refine.irn import IrnSettings, propagate, pseudo_maps
from lpcam.refine.walk import (
    affinities,
    pair_offsets,
    path,
    path_maxima,
    random_walk,
    source_window,
)
from lpcam.runtime.errors import DataError

OFFICIAL = IrnSettings.from_preset("official")
SIZE = (13, 17)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(maps: Tensor, edge: Tensor, *, radius: int, beta: float, exponent: int) -> Tensor:
    """The specification, pair by pair: pad with 1, affinities, columns to 1, squarings."""
    reach = radius
    height, width = edge.shape[0] + reach, edge.shape[1] + 2 * reach
    padded = torch.ones(height, width, dtype=edge.dtype)
    padded[: edge.shape[0], reach : reach + edge.shape[1]] = edge
    affinity = torch.eye(height * width, dtype=edge.dtype)
    for y in range(height):
        for x in range(width):
            for dy, dx in pair_offsets(radius):
                if y + dy < height and 0 <= x + dx < width:
                    worst = max(padded[y + a, x + b] for a, b in path((dy, dx)))
                    first, second = y * width + x, (y + dy) * width + x + dx
                    affinity[first, second] = affinity[second, first] = 1 - worst
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[: edge.shape[0], reach : reach + edge.shape[1]] = True
    keep = inside.flatten().nonzero()[:, 0]
    transition = affinity[keep][:, keep] ** beta
    transition = transition / transition.sum(0, keepdim=True)
    for _ in range(exponent):
        transition = transition @ transition
    return (maps.flatten(1) @ transition).reshape(maps.shape)


@pytest.mark.parametrize(("radius", "count"), [(2, 4), (3, 12), (5, 34), (10, 152)])
def test_each_pair_of_the_disc_once(radius: int, count: int) -> None:
    offsets = set(pair_offsets(radius))
    assert len(pair_offsets(radius)) == len(offsets)
    both = offsets | {(-dy, -dx) for dy, dx in offsets}
    assert len(both) == 2 * len(offsets)
    reach = range(-radius, radius + 1)
    # the strict disc, and on the axes every whole distance below the radius
    assert both == {(y, x) for y in reach for x in reach if 0 < y * y + x * x < radius**2}
    if radius > 2:
        assert len(offsets) == count


def test_paths_by_hand() -> None:
    assert path((0, 3)) == ((0, 0), (0, 1), (0, 2), (0, 3))
    assert path((2, 0)) == ((0, 0), (1, 0), (2, 0))
    assert set(path((1, 1))) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    # the corners of a 2 x 3 box are sqrt(4 / 5) from its diagonal, those of 3 x 3 sqrt(2)
    assert len(path((1, 2))) == 6
    assert set(path((2, -2))) == {(0, 0), (0, -1), (1, 0), (1, -1), (1, -2), (2, -1), (2, -2)}


@pytest.mark.parametrize("radius", [2, 5, 10])
@pytest.mark.parametrize("size", [SIZE, (1, 9), (6, 1), (3, 4)])
def test_path_maxima(radius: int, size: tuple[int, int]) -> None:
    edge = drawn(*size)
    height, width = size
    found = dict(path_maxima(edge, radius))
    expected = [o for o in pair_offsets(radius) if o[0] < height and abs(o[1]) < width]
    assert list(found) == expected
    for (dy, dx), maximum in found.items():
        corner = min(0, dx)
        cells = [
            edge[y : y + height - dy, x - corner : x - corner + width - abs(dx)]
            for y, x in path((dy, dx))
        ]
        assert torch.equal(maximum, torch.stack(cells).amax(0)), (dy, dx)


def test_affinities_are_those_of_the_window() -> None:
    edge = drawn(2, *SIZE)
    window = source_window(*SIZE, 4)
    assert window == (slice(0, 10), slice(3, 14))
    for (dy, dx), affinity in affinities(edge, 4):
        assert affinity.shape == (2, 10, 11)
        worst = edge[:, 5, 6]
        for y, x in path((dy, dx)):
            worst = torch.maximum(worst, edge[:, 5 + y, 6 + x])
        assert torch.equal(affinity[:, 5, 3], 1 - worst)
    assert list(affinities(edge[:, :3], 4)) == list(affinities(edge[:, :, :6], 4)) == []


def test_affinities_have_a_gradient() -> None:
    edge = drawn(8, 9).requires_grad_()

    def total(e: Tensor) -> Tensor:
        return torch.stack([(a * n).sum() for n, (_, a) in enumerate(affinities(e, 3))]).sum()

    assert torch.autograd.gradcheck(total, (edge,))


@pytest.mark.parametrize("size", [(9, 12), (1, 14), (11, 1), (1, 1)])
@pytest.mark.parametrize("exponent", [0, 1, 8])
def test_walk_is_the_power_of_the_dense_matrix(size: tuple[int, int], exponent: int) -> None:
    maps, edge = drawn(2, *size), drawn(*size, seed=1) ** 3
    arguments = {"radius": 5, "beta": 2.5, "exponent": exponent}
    expected = dense(maps, edge, **arguments)
    found = random_walk(maps, edge, **arguments)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    rounded = random_walk(maps.float(), edge.float(), **arguments)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("power", [0, 3, 12])
def test_tolerance_bounds_the_error(tolerance: float, power: int) -> None:
    maps, edge = 5 * drawn(3, 20, 23), drawn(20, 23, seed=2) ** power
    arguments = {"radius": 5, "beta": 10.0, "exponent": 8}
    exact = random_walk(maps, edge, **arguments)
    found = random_walk(maps, edge, **arguments, tolerance=tolerance)
    error = float((found - exact).abs().max())
    assert 0 < error <= tolerance * 5


def test_outputs_are_convex_combinations() -> None:
    edge = drawn(*SIZE, dtype=torch.float32)
    arguments = {"radius": 5, "beta": 10.0, "exponent": 8, "tolerance": 1e-6}
    ones = torch.full((1, *SIZE), 0.7)
    assert torch.equal(random_walk(ones, edge, **arguments), ones)
    # from every cell in turn: the weights of all sources are not negative and sum to one
    sources = torch.eye(SIZE[0] * SIZE[1]).reshape(-1, *SIZE)
    weights = random_walk(sources, edge, **arguments)
    assert float(weights.min()) >= 0
    torch.testing.assert_close(weights.sum(0), torch.ones(SIZE), atol=1e-4, rtol=0)


def test_batches_and_classes_are_independent() -> None:
    maps, edge = drawn(3, 4, *SIZE), drawn(3, *SIZE, seed=5)
    arguments = {"radius": 5, "beta": 10.0, "exponent": 8, "tolerance": 1e-6}
    whole = random_walk(maps, edge, **arguments)
    for number in range(3):
        alone = random_walk(maps[number], edge[number], **arguments)
        torch.testing.assert_close(whole[number], alone, atol=1e-14, rtol=0)
    order = torch.tensor([2, 0, 3, 1])
    permuted = random_walk(maps[:, order], edge, **arguments)
    assert torch.equal(permuted, whole[:, order])
    assert random_walk(maps[:, :0], edge, **arguments).shape == (3, 0, *SIZE)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.1])
def test_values_out_of_range(bad: float) -> None:
    maps, edge = drawn(2, *SIZE), drawn(*SIZE)
    edge[2, 2] = bad
    with pytest.raises(DataError, match=r"values outside \[0, 1\]"):
        random_walk(maps, edge, radius=5, beta=10.0, exponent=8)
    if not math.isfinite(bad):
        with pytest.raises(DataError, match="NaN"):
            random_walk(maps * bad, drawn(*SIZE), radius=5, beta=10.0, exponent=8)


@pytest.mark.parametrize(
    ("maps", "edge"), [((2, 5, 6), (5, 7)), ((5, 6), (5, 6)), ((3, 2, 5, 6), (2, 5, 6))]
)
def test_shapes_that_do_not_fit(maps: tuple[int, ...], edge: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="expected"):
        random_walk(drawn(*maps), drawn(*edge), radius=5, beta=10.0, exponent=8)


def test_propagate_starts_where_there_is_no_boundary() -> None:
    maps, edge = drawn(2, *SIZE), drawn(*SIZE, seed=3)
    for power in (1.0, 1.5):
        settings = OFFICIAL.model_copy(update={"sharpness": power})
        expected = random_walk(maps**power * (1 - edge), edge, radius=5, beta=10.0, exponent=8)
        assert torch.equal(propagate(maps, edge, settings), expected)


@pytest.mark.parametrize("size", [(52, 68), (49, 65)])
def test_pseudo_maps(size: tuple[int, int]) -> None:
    walked = 3 * drawn(2, *SIZE)
    walked[1] *= 0.5
    found = pseudo_maps(walked, size)
    full = F.interpolate(walked[None], (52, 68), mode="bilinear", align_corners=False)[0]
    full = full[:, : size[0], : size[1]]
    torch.testing.assert_close(found, full / full.max())
    assert float(found.max()) == 1.0
    assert float(found[1].max()) < 0.7  # jointly, not each class
    assert not pseudo_maps(0 * walked, size).any()
    assert pseudo_maps(walked[:0], size).shape == (0, *size)
