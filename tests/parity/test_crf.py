"""Dense CRF against pydensecrf: its reference figures, and itself where it is installed."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from parity.golden import DEFAULT, load, load_words
from PIL import Image
from torch import Tensor

from lpcam.refine.crf import CrfSettings, DenseCrf, unary_from_labels, unary_from_probabilities

TOLERANCE = 1e-3
SAME_LABELS = 0.9999
PHOTOGRAPHS = DEFAULT.parent / "data" / "voc_animals" / "VOCdevkit" / "VOC2012"


@pytest.mark.parametrize("name", CrfSettings.preset_names())
def test_reference_figures(name: str) -> None:
    golden, words = load("crf"), load_words("crf")
    settings = CrfSettings.from_preset(name)
    expected = dict(zip(words["columns"], golden[f"{name}_parameters"].tolist(), strict=True))
    assert {key: getattr(settings, key) for key in expected} == pytest.approx(expected)
    kind = {"labels": "labels", "prob": "probabilities"}[words[f"{name}_unary"][0]]
    assert settings.unary == kind
    crf = DenseCrf(settings)
    if kind == "labels":
        assert settings.gt_prob == float(golden["gt_prob"])
        found = crf.refine_labels(golden["image"], golden["labels"], 4)
    else:
        found = crf.refine_probabilities(golden["image"], golden["probabilities"])
    marginals = golden[f"{name}_marginals"]
    torch.testing.assert_close(found, marginals, atol=TOLERANCE, rtol=0)
    assert torch.equal(found.argmax(0), marginals.argmax(0))


def peer() -> ModuleType:
    """The compiled program, of either of its names."""
    return pytest.importorskip(
        "pydensecrf.densecrf",
        reason="pydensecrf is not installed; pydensecrf2 builds with a compiler and Cython",
    )


def photographs(count: int) -> list[Tensor]:
    """Some photographs of the data set, whole: (H, W, 3) uint8."""
    folder = Path(os.environ.get("LPCAM_PHOTOGRAPHS", PHOTOGRAPHS)) / "JPEGImages"
    paths = sorted(folder.glob("*.jpg"))
    if len(paths) < count:
        pytest.skip(f"no photographs at {folder}; set LPCAM_PHOTOGRAPHS to a folder VOC2012")
    chosen = [paths[place * len(paths) // count] for place in range(count)]
    return [torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in chosen]


def inferred_by_peer(image: Tensor, unary: Tensor, settings: CrfSettings) -> Tensor:
    count, height, width = unary.shape
    field = peer().DenseCRF2D(width, height, count)
    field.setUnaryEnergy(np.ascontiguousarray(unary.reshape(count, -1).numpy()))
    field.addPairwiseGaussian(sxy=settings.gaussian_sxy, compat=settings.gaussian_weight)
    field.addPairwiseBilateral(
        sxy=settings.bilateral_sxy,
        srgb=settings.bilateral_srgb,
        rgbim=image.numpy(),
        compat=settings.bilateral_weight,
    )
    found = np.array(field.inference(settings.iterations), dtype=np.float32)
    return torch.from_numpy(found).view(count, height, width)


@pytest.mark.parametrize("labels", [3, 21])
@pytest.mark.parametrize("name", CrfSettings.preset_names())
def test_photographs_as_the_compiled_program(name: str, labels: int) -> None:
    peer()
    settings = CrfSettings.from_preset(name)
    crf = DenseCrf(settings)
    generator = torch.Generator().manual_seed(labels)
    for image in photographs(4):
        size = (image.shape[0], image.shape[1])
        coarse = torch.rand((1, labels, 6, 8), generator=generator) * 4
        maps = torch.nn.functional.interpolate(coarse, size, mode="bilinear")[0].softmax(0)
        if settings.unary == "labels":
            unary = unary_from_labels(maps.argmax(0), labels, settings.gt_prob)
        else:
            unary = unary_from_probabilities(maps, settings.clip)
        found, expected = crf(image, unary), inferred_by_peer(image, unary, settings)
        same = (found.argmax(0) == expected.argmax(0)).double().mean()
        print(name, labels, size, f"{same:.6f} {(found - expected).abs().max():.1e}")
        assert same >= SAME_LABELS
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
