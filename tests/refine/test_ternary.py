"""Labels for IRN by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lpcam.refine.crf import CrfSettings, DenseCrf
from lpcam.refine.irn import IrnSettings
from lpcam.refine.ternary import crf_labels, ternary
from lpcam.runtime.errors import DataError

IRN = DenseCrf(CrfSettings.from_preset("irn"))


def test_ternary_by_hand() -> None:
    foreground = torch.tensor([[0, 1, 2, 0, 1]])
    background = torch.tensor([[0, 1, 1, 2, 0]])
    # where the high threshold has a class it stays, whatever the low one says
    assert ternary(foreground, background).tolist() == [[0, 1, 2, 255, 1]]


def test_without_a_class_all_is_background() -> None:
    image = torch.zeros(5, 6, 3, dtype=torch.uint8)
    high, low = crf_labels(IRN, image, torch.zeros(0, 5, 6), (0.5, 0.2))
    assert high.shape == low.shape == (5, 6)
    assert not ternary(high, low).any()


def test_labels_follow_the_image() -> None:
    """Seeds that stop 2 pixels short of a colour's border are pulled to it."""
    image = np.zeros((24, 32, 3), np.uint8)
    image[:, 16:] = (200, 40, 40)
    maps = torch.zeros(1, 24, 32)
    maps[0, :, 18:] = 0.8
    (found,) = crf_labels(IRN, torch.from_numpy(image), maps, (0.5,))
    expected = torch.zeros(24, 32, dtype=torch.int64)
    expected[:, 16:] = 1
    assert torch.equal(found, expected)


def test_thresholds_come_before_the_crf() -> None:
    """Of a map the CRF sees only which pixels are above."""
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 255, (20, 20, 3), np.uint8))
    maps = torch.from_numpy(rng.random((2, 20, 20), np.float32))
    scaled = torch.where(maps > 0.5, maps / 2 + 0.5, maps / 2)
    first = crf_labels(IRN, image, maps, (0.5,))[0]
    assert torch.equal(first, crf_labels(IRN, image, scaled, (0.5,))[0])
    both = crf_labels(IRN, image, maps, (0.5, 0.2))
    assert torch.equal(both[0], first)
    assert torch.equal(both[1], crf_labels(IRN, image, maps, (0.2,))[0])


def test_maps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"5, 7\)"):
        crf_labels(IRN, torch.zeros(5, 6, 3, dtype=torch.uint8), torch.zeros(1, 5, 7), (0.5,))


def test_thresholds_move_with_those_of_the_seeds() -> None:
    settings = IrnSettings.from_preset("official")
    assert settings.ternary_thresholds("LPCAM") == (0.45, 0.25)
    assert settings.ternary_thresholds("LPCAM", 0.2) == (0.65, 0.45)
    assert settings.ternary_thresholds("LPCAM-E", -0.3) == (0.15, 0.01)  # of at least 0.01
    assert settings.ternary_thresholds("CAM", 0.1) == (0.4, 0.15)
