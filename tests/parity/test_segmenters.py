"""The test of WideResNet-38 against the released program's."""

from __future__ import annotations

import pytest
import torch
from parity.golden import load
from torch import Tensor

from lpcam.classifiers.classifier import Preprocessing
from lpcam.data.dataset import ClassTable
from lpcam.segmentation.inference import probabilities
from lpcam.segmentation.settings import SegmentTestSettings


class Recorded:
    """A segmenter that gives the recorded logits of each size of input."""

    training = False
    device = torch.device("cpu")
    preprocessing = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def __init__(self, logits: dict[tuple[int, int], Tensor]) -> None:
        self.logits = logits
        labels = len(next(iter(logits.values())))
        self.classes = ClassTable.numbered([f"class {n}" for n in range(labels - 1)], "test")

    def __call__(self, images: Tensor) -> Tensor:
        return self.logits[images.shape[-2], images.shape[-1]][None]


@pytest.mark.parametrize("number", [0, 1])
def test_wideresnet38(number: int) -> None:
    golden = load("wr38_test")
    settings = SegmentTestSettings.from_preset("wideresnet38.official", crf=None)
    assert list(settings.scales) == golden["scales"].tolist()
    sizes = [(int(h), int(w)) for h, w in golden[f"input_sizes_{number}"]]
    segmenter = Recorded({to: golden[f"logits_{number}_{n}"] for n, to in enumerate(sizes)})
    height, width = golden[f"size_{number}"].tolist()
    image = torch.zeros(height, width, 3, dtype=torch.uint8).numpy()
    found = probabilities(segmenter, image, settings)
    torch.testing.assert_close(found, golden[f"probabilities_{number}"], atol=1e-5, rtol=0)
    assert torch.equal(found.argmax(0).to(torch.uint8), golden[f"labels_{number}"])
