"""A segmenter's file holds all that makes it, and refuses what it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lpcam.classifiers.classifier import Preprocessing
from lpcam.data.dataset import ClassTable
from lpcam.runtime.errors import ArtefactError
from lpcam.runtime.files import read_tensors, write_tensors
from lpcam.segmentation.networks.base import SegmenterSpec
from lpcam.segmentation.segmenter import Segmenter, build_segmenter

CLASSES = ClassTable(("cow", "sheep"), (10, 17))
SPEC = SegmenterSpec("deeplabv2", "test_resnet", {}, None, (0.5,))


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return build_segmenter(SPEC, CLASSES, weights="random", mean=(0.1, 0.2, 0.3), seed=3)


def test_a_file_gives_the_segmenter_again(segmenter: Segmenter, tmp_path: Path) -> None:
    path = tmp_path / "segmenter.safetensors"
    segmenter.save(path, {"stage": "abc"})
    again = Segmenter.load(path)
    image = torch.rand(1, 3, 70, 90, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(again(image), segmenter(image), rtol=0, atol=0)
    assert again(image).shape[1] == 3
    assert (again.classes, again.spec) == (CLASSES, SPEC)
    assert again.preprocessing == segmenter.preprocessing
    assert again.preprocessing.mean == (0.1, 0.2, 0.3)
    assert read_tensors(path)[1]["made_by"] == {"stage": "abc"}
    assert not again.training


def test_a_seed_gives_the_same_weights() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        built = build_segmenter(SPEC, CLASSES, weights="random", seed=seed)
        return list(built.state_dict().values())

    before = torch.random.get_rng_state()
    one, same, other = weights(0), weights(0), weights(1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_files_that_are_none(segmenter: Segmenter, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with pytest.raises(ArtefactError, match=r"file\.safetensors"):
        Segmenter.load(path)
    write_tensors(path, {"a": torch.zeros(1)}, {"kind": "classifier"})
    with pytest.raises(ArtefactError, match=r"holds 'classifier', .* 'segmenter'; give the file"):
        Segmenter.load(path)
    segmenter.save(path)
    tensors, metadata = read_tensors(path)
    tensors.pop(sorted(tensors)[0])
    write_tensors(path, tensors, metadata)
    with pytest.raises(ArtefactError, match="does not fit its own description"):
        Segmenter.load(path)


def test_a_network_of_ones_own_cannot_be_saved(tmp_path: Path) -> None:
    own = Segmenter(nn.Conv2d(3, 3, 1), CLASSES, Preprocessing((0.5,) * 3, (0.5,) * 3))
    assert own(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)
    with pytest.raises(ArtefactError, match="wraps a network that was passed in"):
        own.save(tmp_path / "own.safetensors")
