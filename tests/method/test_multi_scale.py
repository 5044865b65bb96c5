"""The map of the parts that only one class has."""

from __future__ import annotations

import pytest
import torch

from lpcam.classifiers.features import FeaturePair
from lpcam.method.multi_scale import discriminative_map

# Channels: head of class 0, head of class 1, a torso that both have.
EYE = torch.eye(3)
WEIGHT = torch.tensor([[1.0, -1.0, 0.5], [-1.0, 1.0, 0.5]])
PROTOTYPES = [EYE[[0, 2]][:1], EYE[[1]]]


def row(*channels: int) -> torch.Tensor:
    """Features (3, 1, w): one channel at each place."""
    return EYE[list(channels)].T[:, None].contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_high_on_the_own_part_alone_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    features = row(0, 2, 1).to(dtype)
    # size 4 x 12: the grid of a quarter has the three places
    for index, place in ((0, 0), (1, 2)):
        found = discriminative_map(
            [FeaturePair(features, None)], WEIGHT, PROTOTYPES, index, (4, 12)
        )
        assert found.shape == (4, 12) and found.dtype == dtype
        assert found[0, 4 * place + 1] > 0 and found[:, 4:8].mean() < found.max() / 2
        assert (found[:, 8 - 8 * (place // 2) :][:, :4] == 0).all()


def test_scales_and_the_mirrored_image_are_summed() -> None:
    pair = FeaturePair(row(0, 2, 1), row(1, 2, 0))
    single = discriminative_map([pair], WEIGHT, PROTOTYPES, 0, (4, 12))
    alone = discriminative_map([FeaturePair(pair.features, None)], WEIGHT, PROTOTYPES, 0, (4, 12))
    # the cosines of the sum of both are those of one; CAM is summed
    torch.testing.assert_close(single, 2 * alone)
    twice = discriminative_map([pair, pair], WEIGHT, PROTOTYPES, 0, (4, 12))
    torch.testing.assert_close(twice, 4 * single)


def test_a_single_class_has_its_own_map_and_one_without_prototypes_does_not_fail() -> None:
    pair = FeaturePair(row(0, 2, 1), None)
    found = discriminative_map([pair], WEIGHT[:1], PROTOTYPES[:1], 0, (4, 12))
    assert found.argmax() % 12 < 4
    none = discriminative_map([pair], WEIGHT, [PROTOTYPES[0], EYE[:0]], 0, (4, 12))
    assert none.argmax() % 12 < 4 and torch.isfinite(none).all()
