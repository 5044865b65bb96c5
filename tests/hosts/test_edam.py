"""EDAM: network, pairs, optimiser, maps."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hosts.common import CLASSES, SETTINGS, build_host, drawn, map_image
from PIL import Image
from torch import Tensor

from lpcam.classifiers.classifier import BackboneSpec, Preprocessing
from lpcam.data.dataset import Item
from lpcam.data.images import read_image, resize_image
from lpcam.hosts import edam
from lpcam.hosts.base import HostData
from lpcam.hosts.edam import Edam, EdamSettings, Encoder, Partners
from lpcam.runtime.errors import DataError
from lpcam.training import loop as engine
from lpcam.training.optim import freeze

RAW = Preprocessing((0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def network(weights: Path) -> Edam:
    network: Edam = build_host("edam", weights)
    return network


def labelled(*labels: tuple[int, ...]) -> list[Item]:
    return [Item(f"i{number}", Path(f"i{number}.png"), each) for number, each in enumerate(labels)]


@pytest.mark.parametrize("width", [6, 5])
def test_positions(width: int) -> None:
    code = edam._positions(7, width)
    assert code.shape == (7, width)
    for place in (0, 1, 6):
        for column in range(width):
            angle = place / 10000 ** ((column - column % 2) / width)
            wave = math.cos if column % 2 else math.sin
            assert float(code[place, column]) == pytest.approx(wave(angle), abs=1e-6)


def test_encoder_is_that_of_the_specification() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = Encoder(8, 2, 12, 0.1).eval()
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    tokens = drawn(3, 5, 8)

    def norm(x: Tensor, layer: Any) -> Tensor:
        deviation = (x - x.mean(-1, keepdim=True)).square().sum(-1, keepdim=True).div(7).sqrt()
        return layer.weight * (x - x.mean(-1, keepdim=True)) / (deviation + 1e-6) + layer.bias

    first = norm(tokens, encoder.norms[0])
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        q, k, v = (layer(first)[..., part] for layer in (encoder.query, encoder.key, encoder.value))
        heads.append((q @ k.transpose(1, 2) / 2).softmax(-1) @ v)
    middle = tokens + encoder.joined(torch.cat(heads, -1))
    x = encoder.inner(norm(middle, encoder.norms[1]))
    gelu = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(encoder(tokens), middle + encoder.outer(gelu))


def test_network_is_that_of_the_specification(network: Edam) -> None:
    images = drawn(4, 3, 49, 65)
    features = network.classifier.features(images)
    grid = features.shape[-2:]
    assert grid == (4, 5)
    scores = F.conv2d(features, network.activation.weight, padding=1)
    masks = network.masks(features)
    torch.testing.assert_close(masks, (scores / scores.norm(dim=1, keepdim=True)).abs())
    assert masks.shape == (4, len(CLASSES) + 1, *grid)
    reduced = F.conv2d(features, network.reduction.weight)
    code = edam._positions(20, 8)
    logits = network(images)
    for pair in range(2):
        for row in range(3):
            tokens = torch.cat(
                [
                    (reduced[2 * pair + n] * masks[2 * pair + n, row]).flatten(1).T
                    + code
                    + network.segments.weight[n]
                    for n in range(2)
                ]
            )
            seen = network.encoders[row](tokens[None])[0]
            for n in range(2):
                logit = seen[20 * n : 20 * n + 20].mean(0) @ network.logits.weight[row]
                torch.testing.assert_close(logits[2 * pair + n, row], logit)


def test_images_of_a_pair_see_each_other_and_no_other(network: Edam) -> None:
    images = drawn(4, 3, 48, 48)
    before = network(images)
    images[1] = drawn(3, 48, 48, seed=9)
    after = network(images)
    assert not torch.allclose(after[0], before[0])
    torch.testing.assert_close(after[2:], before[2:])


def test_every_class_has_a_gradient(network: Edam) -> None:
    """Every class is evaluated for every pair, and its encoder learns."""
    network.train()
    freeze(network.classifier.backbone, ["conv1"], norms=True)
    network(drawn(2, 3, 48, 48)).sum().backward()
    trained = {name for name, p in network.named_parameters() if p.grad is not None}
    assert {f"encoders.{row}.query.weight" for row in range(3)} <= trained
    assert {"activation.weight", "reduction.weight", "segments.weight", "logits.weight"} <= trained
    assert not any(name.startswith("classifier.backbone.conv1") for name in trained)
    assert float(network.activation.weight.grad[-1].abs().max()) > 0  # through the normalisation


@pytest.mark.parametrize("given", [{}, {"final_relu": True}])
def test_wideresnet38_keeps_signed_features(given: dict[str, Any]) -> None:
    arguments = {"channels": [4, 4, 8, 8, 8, 8, 16], "depths": [1, 1, 1, 1], **given}
    network = build_host("edam", "random", spec=BackboneSpec("wideresnet38", arguments))
    features = network.classifier.features(drawn(1, 3, 61, 83))
    assert features.shape == (1, 16, 8, 11)
    assert (float(features.min()) >= 0) == bool(given)


def test_first_weights(network: Edam) -> None:
    bound = math.sqrt(6 / (9 * (network.classifier.head.in_features + 4)))  # Xavier's
    assert 0.99 * bound < float(network.activation.weight.detach().abs().max()) <= bound


def test_partners_share_a_class_and_are_drawn_evenly() -> None:
    partners = Partners(labelled((0, 1), (0,), (0,), (1,), (2,), ()))
    assert partners.firsts == [0, 1, 2, 3]
    generator = np.random.default_rng(0)
    counts = Counter(partners.draw(0, generator) for _ in range(4000))
    assert set(counts) == {1, 2, 3}
    assert counts[3] / 4000 == pytest.approx(1 / 2, abs=0.04)  # the only other one of its class
    assert counts[1] / 4000 == pytest.approx(1 / 4, abs=0.04)


@pytest.mark.parametrize("labels", [(), ((0,), (1,), ()), ((0, 1),)])
def test_no_two_images_of_a_class(labels: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(DataError, match=f"of {len(labels)} images"):
        Partners(labelled(*labels))


def test_optimiser_of_the_specification(
    network: Edam, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(
        _: Any, optimizer: Any, samples: Any, count: int, loss: Any, plan: Any, **__: Any
    ) -> Any:
        factors = [0.1, 0.55, 1.0, 0.75**0.9, 0.5**0.9, 0.25**0.9]
        assert (plan.steps, plan.batch) == (6, 4)
        assert [plan.rate(step) for step in range(6)] == pytest.approx(factors)
        return optimizer.param_groups

    monkeypatch.setattr(engine, "run", run)
    settings = EdamSettings.from_preset("official", iterations=6, warmup=2, freeze=["conv1"])
    data = HostData(items, [], [], CLASSES)
    groups = edam.HOST.train(network, data, settings, seed=0, folder=Path())
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    held = set()
    for group in groups:
        assert group["momentum"] == 0.9
        for parameter in group["params"]:
            name = names[id(parameter)]
            held.add(name)
            head = name in ("activation.weight", "reduction.weight", "logits.weight")
            assert group["lr"] == pytest.approx(1e-3 * (10 if head else 1)), name
            assert group["weight_decay"] == 5e-4, name
    assert held == {name for name, p in network.named_parameters() if p.requires_grad}
    assert any(name.startswith("classifier.backbone.layer4") for name in held)


def test_warm_up_longer_than_the_training() -> None:
    settings = SETTINGS["edam"].model_copy(update={"warmup": 10})
    factors = [edam._rate(step, settings) for step in range(6)]
    assert factors == pytest.approx([0.1, 0.19, 0.28, 0.37, 0.46, 0.55])


def test_colours_are_those_of_the_resized_image(tmp_path: Path) -> None:
    """Section 2: a change that clips does not commute with the filter that resizes."""
    image = np.zeros((60, 60, 3), np.uint8)
    image[:, ::2] = 250
    Image.fromarray(image).save(tmp_path / "i.png")
    settings = SETTINGS["edam"].model_copy(
        update={"jitter": (1.0, 0.0, 0.0, 0.0), "long_side": (30, 30), "crop": 30}
    )
    pair = [Item(str(number), tmp_path / "i.png", (0,)) for number in range(2)]
    levels = []
    for seed in range(20):
        images, numbers = edam._sample(
            pair, Partners(pair), RAW, settings, seed, engine.Place(0, 0, 0)
        )
        assert sorted(numbers.tolist()) == [0, 1]
        levels += [float(found.median()) * 127.5 + 127.5 for found in images]
    assert max(levels) > 200  # of a grey of 125; of black and white, first clipped, it were 127


def test_maps_are_those_of_the_specification(network: Edam, items: list[Item]) -> None:
    """As released: each scale and mirror image is enlarged to the image, and all are summed."""
    image = read_image(items[0].image)
    size = image.shape[:2]
    total = torch.zeros(3, *size)
    for scale in SETTINGS["edam"].scales:
        part = resize_image(image, (round(size[0] * scale), round(size[1] * scale)))
        tensor = network.preprocessing(part)[None]
        for flipped in (False, True):
            given = tensor.flip(-1) if flipped else tensor
            masks = network.masks(network.classifier.features(given))[:, :3].detach()
            large = F.interpolate(masks, size, mode="bilinear", align_corners=False)[0]
            total += large.flip(-1) if flipped else large
    found = map_image("edam", network, image, [0, 2])
    expected = total[[0, 2]] / total[[0, 2]].amax((1, 2), keepdim=True)
    torch.testing.assert_close(found.high_res, expected, atol=1e-5, rtol=1e-5)
    for maps in found:
        torch.testing.assert_close(maps.amax((1, 2)), torch.ones(2))
    tiny = np.random.default_rng(0).integers(0, 256, (17, 5, 3)).astype(np.uint8)
    once = SETTINGS["edam"].model_copy(update={"flip": False})
    assert map_image("edam", network, tiny, [1], once).high_res.shape == (1, 17, 5)
