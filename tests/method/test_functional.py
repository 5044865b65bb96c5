"""Equations 1 to 6 by hand, by the loop form, and by their properties."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from lpcam.method import functional as lf


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_equation_2_by_hand() -> None:
    cam = torch.tensor([[0.0, 0.1, 0.2]])
    for inclusive, expected in ((True, [False, True, True]), (False, [False, False, True])):
        foreground, context = lf.split(cam, 0.1, inclusive=inclusive)
        assert foreground.tolist() == [expected]
        assert context.tolist() == [[True, False, False]]


def test_equations_3_and_4_by_hand() -> None:
    """Softmax over classes of the raw centre's logits (2, 1) and (0, 3)."""
    centers = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    found = lf.score(centers, torch.eye(2), 0)
    assert found.tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(3))])


def test_score_of_one_class_is_the_sigmoid() -> None:
    """A softmax over one class would be 1 for every centre."""
    centers = torch.tensor([[2.0], [0.0], [-3.0]])
    found = lf.score(centers, torch.tensor([[1.0]]), 0)
    torch.testing.assert_close(found, lf.score(centers, torch.tensor([[1.0], [0.0]]), 0))
    assert found.tolist() == pytest.approx([1 / (1 + math.exp(-z)) for z in (2.0, 0.0, -3.0)])


def test_selection_by_hand() -> None:
    nan = float("nan")
    scores = torch.tensor([0.9, 0.91, 0.05, 0.06, 0.0, nan])  # 0: the softmax has underflowed
    assert lf.select_foreground(scores, 0.9).nonzero().flatten().tolist() == [1]
    for lower, expected in ((0.05, [3]), (0.0, [2, 3]), (None, [2, 3, 4])):
        assert lf.select_context(scores, 0.9, lower).nonzero().flatten().tolist() == expected
    # the best is kept if none passes, and nothing where there is no centre
    close = torch.tensor([0.2, 0.5, nan, 0.5 - 5e-7])
    assert lf.select_foreground(close, 0.9).tolist() == [False, True, False, True]
    assert not lf.select_foreground(torch.full((3,), nan), 0.1).any()


def test_equation_5_by_hand() -> None:
    """f = (3, 4); prototypes (10, 0) and (0, 0.1) have cosines 0.6 and 0.8."""
    block = torch.tensor([3.0, 4.0])[:, None, None]
    prototypes = torch.tensor([[10.0, 0.0], [0.0, 0.1]])
    assert lf.mean_cosine(block, prototypes).item() == pytest.approx(0.7)


def test_equation_6_by_hand() -> None:
    """The same foreground (0.7) minus one context prototype of cosine 0.8."""
    block = torch.tensor([3.0, 4.0])[:, None, None]
    vector = lf.foreground_minus_context(
        torch.tensor([[10.0, 0.0], [0.0, 0.1]]), torch.tensor([[0.0, 5.0]])
    )
    assert lf.cosine_activation(block, vector[None]).item() == pytest.approx(-0.1)


def test_one_vector_equals_the_loop_over_prototypes() -> None:
    block = features(16, 5, 7)
    foreground, context = features(9, 16, seed=1), features(4, 16, seed=2)

    def loop(prototypes: torch.Tensor) -> torch.Tensor:
        cosines = [
            torch.cosine_similarity(block, p[:, None, None].expand_as(block), dim=0)
            for p in prototypes
        ]
        return torch.stack(cosines).mean(0)

    vector = lf.foreground_minus_context(foreground, context)
    found = lf.cosine_activation(block, vector[None])[0]
    torch.testing.assert_close(found, loop(foreground) - loop(context), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        lf.mean_cosine(block, foreground), loop(foreground), atol=1e-6, rtol=0
    )


def test_no_context_leaves_the_subtraction_out() -> None:
    foreground = features(3, 8)
    for context in (None, torch.zeros(0, 8)):
        found = lf.foreground_minus_context(foreground, context)
        assert torch.equal(found, lf.unit_mean(foreground))


def test_zero_features_give_zero_not_nan() -> None:
    maps = lf.cosine_activation(torch.zeros(4, 2, 2), torch.ones(1, 4))
    assert torch.equal(maps, torch.zeros(1, 2, 2))


@pytest.mark.parametrize("function", [lf.class_activation, lf.cosine_activation])
def test_batch_equals_single(function: Callable[..., torch.Tensor]) -> None:
    batch, rows = features(3, 8, 5, 6), features(4, 8, seed=5) - 0.5
    together = function(batch, rows)
    assert together.shape == (3, 4, 5, 6)
    for number in range(3):
        torch.testing.assert_close(together[number], function(batch[number], rows))


@pytest.mark.parametrize("function", [lf.cam_of_pair, lf.lpcam_of_pair])
def test_mirrored_image_gives_mirrored_maps(function: Callable[..., torch.Tensor]) -> None:
    image, mirror, rows = features(8, 4, 6), features(8, 4, 6, seed=1), features(2, 8, seed=2) - 0.5
    torch.testing.assert_close(
        function(image, mirror, rows), lf.unflip(function(mirror, image, rows))
    )


def test_maps_of_a_pair_by_hand() -> None:
    """LPCAM takes the cosine of the sum of features, CAM the sum of the two ReLUs."""
    image, mirror = torch.tensor([[10.0, 0.0], [0.0, 1.0]])[:, :, None, None]
    found = lf.lpcam_of_pair(image, mirror, torch.tensor([[1.0, 0.0]]))
    assert found.item() == pytest.approx(10 / 101**0.5)
    image, mirror = torch.tensor([2.0, -5.0])[:, None, None, None]
    assert lf.cam_of_pair(image, mirror, torch.tensor([[1.0]])).item() == 2.0


def test_other_similarities_equal_the_loop_over_prototypes() -> None:
    block, mirror = features(6, 5, 7), features(6, 5, 7, seed=4)
    mean = (block + lf.unflip(mirror)) / 2
    foreground, context = features(3, 6, seed=1), features(2, 6, seed=2) - 0.7

    def loop(similarity: str, prototypes: torch.Tensor) -> torch.Tensor:
        found = []
        for one in prototypes[:, :, None, None]:
            dot, distance = (mean * one).sum(0), (mean - one).square().sum(0)
            found.append(dot if similarity == "dot" else -distance)
        return torch.stack(found).mean(0)

    for similarity in ("dot", "euclidean"):
        row = lf.affine_row(similarity, foreground, context)  # type: ignore[arg-type]
        expected = (loop(similarity, foreground) - loop(similarity, context)).relu()
        found = lf.affine_of_pair(block, mirror, row[None])[0]
        assert expected.max() > 0
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        # without context it is compared with the zero vector
        row = lf.affine_row(similarity, foreground, None)  # type: ignore[arg-type]
        zero = loop(similarity, torch.zeros(1, 6))
        expected = (loop(similarity, foreground) - zero).relu()
        torch.testing.assert_close(lf.affine_of_pair(mean, None, row[None])[0], expected)


def test_ridge_weights_solve_the_normal_equations() -> None:
    foreground, context = features(3, 6, seed=1), features(2, 6, seed=2)
    target, rows = features(6, seed=3), lf.unit(torch.cat([foreground, context]), 1)
    weights = torch.zeros(5, requires_grad=True)
    loss = (lf.unit(target, 0) - weights @ rows).square().sum() + 0.05 * weights.square().sum()
    hessian = 2 * (rows @ rows.T + 0.05 * torch.eye(5))
    best = -torch.linalg.solve(hessian, torch.autograd.grad(loss, weights)[0])  # of a parabola
    torch.testing.assert_close(lf.ridge_vector(target, foreground, context), best @ rows)


def test_fused_sizes_and_maximum() -> None:
    fused = lf.fuse_scales([features(2, 3, 4), features(2, 6, 8, seed=1)], (45, 61))
    assert fused.cam.shape == (2, 12, 16)
    assert fused.high_res.shape == (2, 45, 61)
    for planes in fused:
        torch.testing.assert_close(planes.amax((-2, -1)), torch.ones(2))
        assert planes.min() >= 0
    constant = lf.fuse_scales([torch.full((1, 2, 3), 0.25)], (17, 40))
    torch.testing.assert_close(constant.high_res, torch.ones(1, 17, 40))
    empty = lf.fuse_scales([torch.zeros(0, 2, 2)], (20, 20))
    assert (empty.cam.shape, empty.high_res.shape) == ((0, 5, 5), (0, 20, 20))
    assert lf.fuse_scales([torch.full((1, 1, 1), 2.0)], (1, 1)).high_res.tolist() == [[[1.0]]]


def test_normalize_by_hand() -> None:
    maps = torch.tensor([[[1.0, 4.0]], [[0.0, 0.0]], [[-3.0, -1.0]]])
    assert lf.normalize(maps).tolist() == [[[0.25, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]]
    assert lf.normalize(maps, "minmax").tolist() == [[[0.0, 1.0]], [[0.0, 0.0]], [[0.0, 1.0]]]
    assert lf.normalize(maps[:1], "max", 4.0).tolist() == [[[0.125, 0.5]]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    block, rows = features(8, 4, 4).to(dtype), features(2, 8).to(dtype)
    maps = lf.lpcam_of_pair(block, block, rows)
    assert maps.dtype == dtype
    assert lf.fuse_scales([maps], (64, 64)).high_res.dtype == dtype


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(8, 4, 4\).*\(2, 9\)"):
        lf.class_activation(torch.zeros(8, 4, 4), torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        lf.cosine_activation(torch.zeros(4, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\(0, 4\)"):
        lf.unit_mean(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="0 scales"):
        lf.fuse_scales([], (4, 4))
    with pytest.raises(ValueError, match="'sum'"):
        lf.normalize(torch.ones(1, 2, 2), "sum")  # type: ignore[arg-type]
