"""Fusion of maps with saliency: both decisions, thresholds, the CRF, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lpcam.refine.crf import CrfSettings, DenseCrf
from lpcam.refine.saliency_fusion import SaliencySettings, fuse_saliency, saliency_labels
from lpcam.runtime.errors import DataError

PLAIN = SaliencySettings.from_preset("edam")
WITH_CRF = SaliencySettings.from_preset("edam.crf")
CRF = DenseCrf(CrfSettings.from_preset("edam"))


def fused(values: list[list[float]], level: int, settings: SaliencySettings = PLAIN) -> list[int]:
    """Labels of pixels of one saliency, each with a value a class."""
    maps = torch.tensor(values).T[:, None]
    saliency = torch.full((1, len(values)), level, dtype=torch.uint8)
    return fuse_saliency(maps, saliency, settings)[0].tolist()


def test_background_where_not_salient_and_low_maps_where_salient() -> None:
    values = [[0.3, 0.9], [0.951, 0.1], [0.2, 1.0], [0.96, 0.97], [0.0, 0.95], [0.0, 0.0]]
    assert fused(values, 20) == [0, 1, 2, 1, 0, 0]
    values = [[0.3, 0.9], [0.25, 0.1], [0.249, 0.24], [0.5, 0.5], [0.96, 0.97], [0.0, 0.0]]
    assert fused(values, 21) == [2, 1, 0, 1, 1, 0]


@pytest.mark.parametrize(("theta", "level"), [(0.2, 20), (0.29, 29), (1.27, 127), (0.0, 0)])
def test_grey_level_of_theta(theta: float, level: int) -> None:
    """Also where 100 times theta is rounded down, as 100 x 0.29 is."""
    settings = PLAIN.model_copy(update={"theta": theta})
    assert fused([[0.5]], level, settings) == [0]
    assert fused([[0.5]], level + 1, settings) == [1]


def test_fusion_is_that_of_twenty_one_channels() -> None:
    """The released way, with a channel for every class of VOC."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 20, 30, generator=generator)
    maps[:, :4] = torch.tensor([0.97, 0.1, 0.99])[:, None, None]
    saliency = torch.randint(0, 60, (20, 30), generator=generator, dtype=torch.uint8)
    keys = [2, 7, 14]
    table = torch.zeros(21, 20, 30)
    table[[key + 1 for key in keys]] = maps
    table[table < 0.25] = -2
    table[table > 0.95] = 2
    table[0] = (saliency <= 20).float()
    found = torch.tensor([0, *(key + 1 for key in keys)])[fuse_saliency(maps, saliency, PLAIN)]
    assert torch.equal(found, table.argmax(0))
    assert set(found.unique().tolist()) == {0, 3, 8, 15}


@pytest.mark.parametrize("settings", [PLAIN, WITH_CRF])
def test_an_image_without_classes_is_background(settings: SaliencySettings) -> None:
    crf = (torch.zeros(4, 6, 3, dtype=torch.uint8), CRF) if settings.crf else None
    saliency = torch.full((4, 6), 255, dtype=torch.uint8)
    found = fuse_saliency(torch.zeros(0, 4, 6), saliency, settings, crf=crf)
    assert found.shape == (4, 6)
    assert not found.any()


def test_fusion_after_a_crf() -> None:
    """The CRF fills a gap in its object; saliency removes the other; maps may exceed 1 a little."""
    image = torch.full((24, 32, 3), 30, dtype=torch.uint8)
    image[6:18, 4:14] = 200
    image[6:18, 18:28] = 200
    maps = torch.zeros(2, 24, 32)
    maps[0, 6:18, 4:14] = 0.7
    maps[0, 10:14, 7:11] = 1.0
    maps[0, 7, 5] = 0.2
    maps[1, 6:18, 18:28] = 0.6
    background = 1 - maps.amax(0, keepdim=True)
    posteriors = CRF.refine_probabilities(image, torch.cat([background, maps]))[1:]
    saliency = torch.zeros(24, 32, dtype=torch.uint8)
    saliency[:, :16] = 255
    maps[0, 10:14, 7:11] += 1e-6
    found = fuse_saliency(maps, saliency, WITH_CRF, crf=(image, CRF))
    assert (found[6:18, 4:14] == 1).all()
    expected = saliency_labels(
        posteriors, saliency, theta=0.2, alpha=WITH_CRF.alpha, beta=WITH_CRF.beta
    )
    assert torch.equal(found, expected)
    assert fuse_saliency(maps, saliency, PLAIN)[7, 5] == 0


@pytest.mark.parametrize(
    ("maps", "saliency", "match"),
    [
        (torch.zeros(2, 4, 5), torch.zeros(4, 6, dtype=torch.uint8), r"\(4, 6\)"),
        (torch.zeros(2, 4, 5), torch.zeros(4, 5), "float32"),
        (torch.zeros(2, 4, 5), torch.zeros(4, 5, 3, dtype=torch.uint8), r"\(4, 5, 3\)"),
        (torch.zeros(4, 5), torch.zeros(4, 5, dtype=torch.uint8), r"\(4, 5\)"),
        (torch.full((1, 4, 5), math.nan), torch.zeros(4, 5, dtype=torch.uint8), "finite"),
        (torch.zeros(1, 4, 5).byte(), torch.zeros(4, 5, dtype=torch.uint8), "uint8"),
    ],
)
def test_maps_and_saliency_that_do_not_fit(maps: Tensor, saliency: Tensor, match: str) -> None:
    with pytest.raises(DataError, match=match):
        fuse_saliency(maps, saliency, PLAIN)


def test_a_crf_is_given_if_and_only_if_the_settings_say_so() -> None:
    maps, saliency = torch.zeros(1, 4, 5), torch.zeros(4, 5, dtype=torch.uint8)
    with pytest.raises(DataError, match="is True"):
        fuse_saliency(maps, saliency, WITH_CRF)
    with pytest.raises(DataError, match="is False"):
        fuse_saliency(maps, saliency, PLAIN, crf=(torch.zeros(4, 5, 3).byte(), CRF))
