"""Equations 1, 5 and 6 by hand, by the loop form, and by their properties."""

import pytest
import torch

from lpcam import functional as lf


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_class_activation_by_hand() -> None:
    block = torch.tensor([[[1.0, 2.0]], [[3.0, -1.0]]])  # C=2, h=1, w=2
    weight = torch.tensor([[1.0, 1.0], [2.0, -1.0]])
    expected = torch.tensor([[[4.0, 1.0]], [[-1.0, 5.0]]])
    assert torch.equal(lf.class_activation(block, weight), expected)


def test_mean_cosine_by_hand() -> None:
    """Eq. 5: f = (3, 4); prototypes (10, 0) and (0, 0.1) have cosines 0.6 and 0.8."""
    block = torch.tensor([3.0, 4.0])[:, None, None]
    prototypes = torch.tensor([[10.0, 0.0], [0.0, 0.1]])
    assert lf.mean_cosine(block, prototypes).item() == pytest.approx(0.7)


def test_contrast_by_hand() -> None:
    """Eq. 6: the same foreground (0.7) minus one context prototype of cosine 0.8."""
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


def test_unit_mean_is_not_the_unit_of_the_mean() -> None:
    prototypes = torch.tensor([[100.0, 0.0], [0.0, 1.0]])
    assert torch.allclose(lf.unit_mean(prototypes), torch.tensor([0.5, 0.5]))


def test_no_context_leaves_the_subtraction_out() -> None:
    foreground = features(3, 8)
    expected = lf.unit_mean(foreground)
    for context in (None, torch.zeros(0, 8)):
        assert torch.equal(lf.foreground_minus_context(foreground, context), expected)


def test_prototype_order_and_length_do_not_matter() -> None:
    prototypes = features(6, 8)
    lengths = torch.tensor([0.1, 1.0, 7.0, 3.0, 0.5, 20.0])[:, None]
    changed = (prototypes * lengths)[torch.tensor([3, 1, 5, 0, 2, 4])]
    torch.testing.assert_close(lf.unit_mean(changed), lf.unit_mean(prototypes))


def test_feature_scale_does_not_matter() -> None:
    block, vectors = features(8, 4, 4), features(3, 8, seed=3) - 0.5
    torch.testing.assert_close(
        lf.cosine_activation(1000 * block, vectors), lf.cosine_activation(block, vectors)
    )


def test_zero_features_give_zero_not_nan() -> None:
    assert torch.equal(
        lf.cosine_activation(torch.zeros(4, 2, 2), torch.ones(1, 4)), torch.zeros(1, 2, 2)
    )


@pytest.mark.parametrize("function", [lf.class_activation, lf.cosine_activation])
def test_batch_equals_single(function) -> None:  # type: ignore[no-untyped-def]
    batch, rows = features(3, 8, 5, 6), features(4, 8, seed=5) - 0.5
    together = function(batch, rows)
    assert together.shape == (3, 4, 5, 6)
    for number in range(3):
        torch.testing.assert_close(together[number], function(batch[number], rows))


@pytest.mark.parametrize("function", [lf.cam_of_pair, lf.lpcam_of_pair])
def test_mirrored_image_gives_mirrored_maps(function) -> None:  # type: ignore[no-untyped-def]
    image, mirror, rows = features(8, 4, 6), features(8, 4, 6, seed=1), features(2, 8, seed=2) - 0.5
    forth, back = function(image, mirror, rows), function(mirror, image, rows)
    torch.testing.assert_close(forth, lf.unflip(back))


def test_lpcam_takes_the_cosine_of_the_sum_of_features() -> None:
    """Not the mean of two cosine maps: a long feature outweighs a short one."""
    image = torch.tensor([10.0, 0.0])[:, None, None]
    mirror = torch.tensor([0.0, 1.0])[:, None, None]
    found = lf.lpcam_of_pair(image, mirror, torch.tensor([[1.0, 0.0]]))
    assert found.item() == pytest.approx(10 / 101**0.5)


def test_cam_applies_the_relu_to_each_of_the_pair() -> None:
    image = torch.tensor([2.0])[:, None, None]
    mirror = torch.tensor([-5.0])[:, None, None]
    assert lf.cam_of_pair(image, mirror, torch.tensor([[1.0]])).item() == 2.0


def test_fused_sizes_and_maximum() -> None:
    maps = [features(2, 3, 4), features(2, 6, 8, seed=1)]
    fused = lf.fuse_scales(maps, (45, 61))
    assert fused.cam.shape == (2, 12, 16)
    assert fused.high_res.shape == (2, 45, 61)
    for planes in fused:
        torch.testing.assert_close(planes.amax((-2, -1)), torch.ones(2))
        assert planes.min() >= 0


def test_fuse_scales_keeps_a_constant_map_constant_through_crop_and_resize() -> None:
    fused = lf.fuse_scales([torch.full((1, 2, 3), 0.25)], (17, 40))
    torch.testing.assert_close(fused.high_res, torch.ones(1, 17, 40))


def test_fuse_scales_without_classes() -> None:
    fused = lf.fuse_scales([torch.zeros(0, 2, 2)], (20, 20))
    assert fused.cam.shape == (0, 5, 5)
    assert fused.high_res.shape == (0, 20, 20)


def test_one_pixel_image() -> None:
    fused = lf.fuse_scales([torch.full((1, 1, 1), 2.0)], (1, 1))
    assert fused.high_res.tolist() == [[[1.0]]]


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


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"same C, got \(8, 4, 4\) and \(2, 9\)"):
        lf.class_activation(torch.zeros(8, 4, 4), torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"same C, got \(4, 4\)"):
        lf.cosine_activation(torch.zeros(4, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"shape \(K, C\) with K >= 1, got \(0, 4\)"):
        lf.unit_mean(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="at least one scale"):
        lf.fuse_scales([], (4, 4))
    with pytest.raises(ValueError, match="unknown normalisation 'sum'"):
        lf.normalize(torch.ones(1, 2, 2), "sum")  # type: ignore[arg-type]
