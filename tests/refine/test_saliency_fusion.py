"""Fusion of maps with saliency: both decisions, thresholds, the CRF, and bad input."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lpcam.data.dataset import Item
from lpcam.refine.saliency_fusion import REFINEMENT, SaliencySettings, saliency_labels

PLAIN = SaliencySettings.from_preset("edam")
WITH_CRF = SaliencySettings.from_preset("edam.crf")


def fused(values: list[list[float]], level: int, settings: SaliencySettings = PLAIN) -> list[int]:
    """Labels of pixels of one saliency, each with a value a class."""
    maps = torch.tensor(values).T[:, None]
    saliency = torch.full((1, len(values)), level, dtype=torch.uint8)
    return saliency_labels(maps, saliency, settings)[0].tolist()


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


@pytest.mark.parametrize("settings", [PLAIN, WITH_CRF])
def test_fusion_of_an_image(settings: SaliencySettings, tmp_path: Path) -> None:
    """A CRF fills a gap in its object; saliency removes the other; maps may exceed 1 a little."""
    image = torch.full((24, 32, 3), 30, dtype=torch.uint8)
    image[6:18, 4:14] = 200
    image[6:18, 18:28] = 200
    maps = torch.zeros(2, 24, 32)
    maps[0, 6:18, 4:14] = 0.7
    maps[0, 10:14, 7:11] = 1 + 1e-6
    maps[0, 7, 5] = 0.2
    maps[1, 6:18, 18:28] = 0.6
    saliency = np.zeros((24, 32), np.uint8)
    saliency[:, :16] = 255
    Image.fromarray(saliency).save(tmp_path / "a.png")
    item = Item("a", tmp_path / "a.jpg", (0, 1))
    tools: Any = SimpleNamespace(memory=None, saliency=tmp_path, items=[item])
    job: Any = SimpleNamespace(settings=settings, tools=tools)
    refine = REFINEMENT.refiner(job, tmp_path, tmp_path)
    planes: Any = SimpleNamespace(item=item, image=image, planes=maps)
    found: Any = refine(planes)
    expected = (torch.from_numpy(saliency) > 0) & (image[..., 0] == 200)
    if not settings.crf:
        expected[7, 5] = False
    assert torch.equal(found[0] == 1, expected)
    assert not found[1].any()
    planes.planes = maps[:0]
    assert refine(planes).shape == (0, 24, 32)  # type: ignore[union-attr]
