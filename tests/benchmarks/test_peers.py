"""The adapter of pytorch-grad-cam: known maps, and a model that comes back as it was."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.peers import PEERS, peer_maps
from lpcam.classifiers.classifier import RANDOM, BackboneSpec, build
from lpcam.method.functional import class_activation, normalize
from lpcam.runtime.errors import ClassifierError, LpcamError

HAS_PEER = importlib.util.find_spec("pytorch_grad_cam") is not None
needs_peer = pytest.mark.skipif(not HAS_PEER, reason="pytorch-grad-cam is not installed")


class Small(nn.Module):
    """Two convolutions, an in-place ReLU after the layer, pooling, a head with a bias."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
            self.norm = nn.BatchNorm2d(6)
            self.relu = nn.ReLU(inplace=True)
            self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.relu(self.norm(self.first(images))).mean((-2, -1)))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def corr(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])


@needs_peer
@pytest.mark.parametrize("name", list(PEERS))
def test_every_peer_gives_maps_of_every_class(name: str) -> None:
    model = Small().eval()
    maps = peer_maps(name, model, "relu", draw(2, 3, 24, 32), [2, 0, 3])
    assert maps.shape == (2, 3, 24, 32) and maps.dtype == torch.float32
    assert peer_maps(name, model, "relu", draw(2, 3, 24, 32), []).shape == (2, 0, 24, 32)
    assert maps.min() >= 0 and maps.max() <= 1
    assert (maps.amax((-2, -1)) > 0.5).any()
    again = peer_maps(name, model, model.relu, draw(2, 3, 24, 32), [3])
    torch.testing.assert_close(again[:, 0], maps[:, 2], rtol=0, atol=1e-5)


@needs_peer
def test_grad_cam_before_pooling_is_cam() -> None:
    spec = BackboneSpec("test_resnet", {}, 16)
    classifier = build(spec, ["a", "b", "c"], weights=RANDOM, mean=[0.5] * 3, std=[0.5] * 3)
    images = draw(2, 3, 64, 96)
    with torch.no_grad():
        plain = class_activation(classifier.features(images), classifier.weight).relu()
    expected = nn.functional.interpolate(normalize(plain), size=(64, 96), mode="bilinear")
    for name in ("GradCAM", "HiResCAM"):
        found = peer_maps(name, classifier, None, images, [0, 1, 2])
        for row in range(2):
            for index in range(3):
                if expected[row, index].any():
                    assert corr(found[row, index], expected[row, index]) > 0.99


@needs_peer
def test_a_classifier_needs_no_layer_and_passes_once() -> None:
    model, passes = Small().eval(), []

    @torch.inference_mode()
    def features(images: Tensor) -> Tensor:
        passes.append(images)
        return model.relu(model.norm(model.first(images)))

    source = SimpleNamespace(features=features, weight=model.head.weight, bias=model.head.bias)
    for name in ("GradCAM", "GradCAM++", "LayerCAM"):
        passes.clear()
        found = peer_maps(name, source, None, draw(2, 3, 24, 32), [0, 1, 2])
        assert len(passes) == 1
        direct = peer_maps(name, model, "relu", draw(2, 3, 24, 32), [0, 1, 2])
        torch.testing.assert_close(found, direct, rtol=0, atol=1e-5)


@needs_peer
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(fails: bool) -> None:
    model = Small().train()
    model.norm.eval()
    model.first.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.inference_mode():
        images = draw(1, 3, 24, 32)
        if fails:
            with pytest.raises(ClassifierError, match=r"for classes \[9\].*columns of its logits"):
                peer_maps("GradCAM", model, "norm", images, [9])
        else:  # before an in-place ReLU
            assert peer_maps("GradCAM", model, "norm", images, [1]).shape == (1, 1, 24, 32)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training and model.head.training and not model.norm.training
    assert not model.first.weight.requires_grad and model.head.weight.requires_grad
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert model.head.bias.grad is None
    assert not any(module._forward_hooks for module in model.modules())


@needs_peer
def test_tokens_are_reshaped() -> None:
    class Tokens(Small):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Identity()

        def forward(self, images: Tensor) -> Tensor:
            rows = self.relu(self.first(images)).flatten(2).transpose(1, 2)
            return self.head(self.tokens(rows).mean(1))

    def grid(rows: Tensor) -> Tensor:
        return rows.transpose(1, 2).unflatten(2, (12, 16))

    model = Tokens().eval()
    found = peer_maps("GradCAM", model, "tokens", draw(1, 3, 24, 32), [0, 1], reshape=grid)
    direct = peer_maps("GradCAM", model, "relu", draw(1, 3, 24, 32), [0, 1])
    torch.testing.assert_close(found, direct, rtol=0, atol=1e-5)
    with pytest.raises(ClassifierError, match=r"Identity gives \(1, 192, 6\), not a feature map"):
        peer_maps("LayerCAM", model, "tokens", draw(1, 3, 24, 32), [0])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(LpcamError, match=r"pip install 'lpcam\[peers\]'"):
        peer_maps("GradCAM", Small(), "relu", draw(1, 3, 8, 8), [0])
