"""EDAM: network, pairs, training, maps."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import COLOURS
from torch import Tensor

from lpcam.classifiers.classifier import BackboneSpec, Preprocessing
from lpcam.data.dataset import ClassTable, Item
from lpcam.data.folder import read_folder
from lpcam.data.images import read_image, resize_image
from lpcam.hosts import edam
from lpcam.hosts.base import HostData
from lpcam.hosts.edam import (
    EdamSettings,
    Encoder,
    Pair,
    Partners,
    class_masks,
    maps_of,
    pairs_of,
    sinusoidal_positions,
)
from lpcam.runtime.errors import DataError
from lpcam.training import loop
from lpcam.training.optim import freeze

build_edam = edam.HOST.build
SPEC = BackboneSpec("test_resnet", {}, 16)
CLASSES = tuple(COLOURS)
SETTINGS = EdamSettings.from_preset(
    "official",
    iterations=6,
    pairs=2,
    crop=48,
    long_side=(40, 64),
    warmup=2,
    width=8,
    hidden=12,
    freeze=["conv1", "bn1"],
    scales=[1.0, 0.5],
)
RAW = Preprocessing((0.5,) * 3, (0.5,) * 3)


def train_edam(network: edam.Edam, items: list[Item], *options: Any, **more: Any) -> Any:
    data = HostData(items, [], [], ClassTable(CLASSES, (1, 2, 3)))
    return edam.HOST.train(network, data, *options, **more)


@pytest.fixture
def fresh(weights: Path) -> Any:
    """Makes equal untrained networks."""
    return lambda settings=SETTINGS, seed=0: build_edam(
        SPEC, CLASSES, settings, weights=weights, seed=seed
    )


@pytest.fixture
def items(pictures: Path) -> list[Item]:
    """The tiny images; one has no label."""
    return list(read_folder(pictures).items.values())


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labelled(*labels: tuple[int, ...]) -> list[Item]:
    return [Item(f"i{number}", Path(f"i{number}.png"), each) for number, each in enumerate(labels)]


def test_masks_share_each_pixel() -> None:
    scores = torch.tensor([3.0, -4.0, 0.0])[None, :, None, None].repeat(1, 1, 2, 1)
    scores[0, :, 1] = 0
    found = class_masks(scores)
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([0.6, 0.8, 0.0]))
    assert not found[0, :, 1].any()
    squares = class_masks(drawn(2, 4, 5, 6)).square().sum(1)
    torch.testing.assert_close(squares, torch.ones(2, 5, 6))


def test_positions() -> None:
    code = sinusoidal_positions(7, 6)
    for place in (0, 1, 6):
        for i in range(3):
            angle = place / 10000 ** (2 * i / 6)
            assert float(code[place, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(code[place, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-6)
    assert torch.equal(sinusoidal_positions(7, 5), sinusoidal_positions(7, 5)[:, :5])
    assert sinusoidal_positions(3, 5).shape == (3, 5)


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


def test_network_is_that_of_the_specification(fresh: Any) -> None:
    network = fresh()
    images = drawn(4, 3, 49, 65)
    features = network.classifier.features(images)
    grid = features.shape[-2:]
    assert grid == (4, 5)
    scores = F.conv2d(features, network.activation.weight, padding=1)
    masks = network.masks(features)
    torch.testing.assert_close(masks, (scores / scores.norm(dim=1, keepdim=True)).abs())
    assert masks.shape == (4, len(CLASSES) + 1, *grid)
    reduced = F.conv2d(features, network.reduction.weight)
    code = sinusoidal_positions(20, 8)
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
                torch.testing.assert_close(network(images)[2 * pair + n, row], logit)


def test_images_of_a_pair_see_each_other_and_no_other(fresh: Any) -> None:
    network = fresh()
    images = drawn(4, 3, 48, 48)
    before = network(images)
    images[1] = drawn(3, 48, 48, seed=9)
    after = network(images)
    assert not torch.allclose(after[0], before[0])
    torch.testing.assert_close(after[2:], before[2:])


def test_a_class_without_attention_still_has_a_gradient(fresh: Any) -> None:
    """Every class is evaluated for every pair, and its encoder learns."""
    network = fresh().train()
    freeze(network.classifier.backbone, ["conv1"], norms=True)
    network(drawn(2, 3, 48, 48)).sum().backward()
    trained = {name for name, p in network.named_parameters() if p.grad is not None}
    assert {f"encoders.{row}.query.weight" for row in range(3)} <= trained
    assert {"activation.weight", "reduction.weight", "segments.weight", "logits.weight"} <= trained
    assert not any(name.startswith("classifier.backbone.conv1") for name in trained)
    assert float(network.activation.weight.grad[-1].abs().max()) > 0  # through the normalisation


def test_wideresnet38_keeps_signed_features() -> None:
    arguments = {"channels": [4, 4, 8, 8, 8, 8, 16], "depths": [1, 1, 1, 1]}
    network = build_edam(
        BackboneSpec("wideresnet38", arguments), CLASSES, SETTINGS, weights="random"
    )
    features = network.classifier.features(drawn(1, 3, 61, 83))
    assert features.shape == (1, 16, 8, 11)
    assert float(features.min()) < 0
    cut = build_edam(
        BackboneSpec("wideresnet38", {**arguments, "final_relu": True}),
        CLASSES,
        SETTINGS,
        weights="random",
    )
    assert float(cut.classifier.features(drawn(1, 3, 61, 83)).min()) >= 0


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext", "test_vit"])
@pytest.mark.parametrize("size", [(64, 64), (61, 83)])
def test_any_backbone_and_size(name: str, size: tuple[int, int]) -> None:
    arguments = {"dynamic_img_size": True, "dynamic_img_pad": True} if name == "test_vit" else {}
    network = build_edam(BackboneSpec(name, arguments), CLASSES, SETTINGS, weights="random")
    logits = network(drawn(2, 3, *size))
    assert logits.shape == (2, 3)
    assert bool(torch.isfinite(logits).all())


def test_first_weights_depend_on_the_seed_alone(fresh: Any) -> None:
    first, again, other = fresh(), fresh(), fresh(seed=1)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    bound = math.sqrt(6 / (9 * (first.classifier.head.in_features + 4)))  # Xavier's
    weight = first.activation.weight.detach()
    assert 0.99 * bound < float(weight.abs().max()) <= bound


def test_pairs_share_a_class() -> None:
    found = labelled((0,), (0, 1), (1,), (2,), (), (0, 1), (1,))
    pairs = pairs_of(found, 30, 2, 0)
    assert len(pairs) == 60
    for pair in pairs:
        assert pair.first != pair.second
        assert pair.label in found[pair.first].labels
        assert pair.label in found[pair.second].labels
    assert {pair.first for pair in pairs} == {0, 1, 2, 5, 6}


def test_every_image_comes_first_once_an_epoch() -> None:
    items = labelled(*[(k % 2,) for k in range(6)])
    pairs = pairs_of(items, 9, 2, 3)  # three epochs of three steps
    epochs = [pairs[start : start + 6] for start in (0, 6, 12)]
    for epoch in epochs:
        assert sorted(pair.first for pair in epoch) == list(range(6))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert pairs == pairs_of(items, 9, 2, 3) != pairs_of(items, 9, 2, 4)


def test_partners_are_drawn_evenly() -> None:
    items = labelled((0, 1), (0,), (0,), (1,), (2,))
    partners = Partners(items)
    generator = np.random.default_rng(0)
    counts = Counter(partners.draw(0, generator) for _ in range(4000))
    assert set(counts) == {Pair(0, 1, 0), Pair(0, 2, 0), Pair(0, 3, 1)}
    assert counts[Pair(0, 3, 1)] / 4000 == pytest.approx(1 / 2, abs=0.04)
    assert counts[Pair(0, 1, 0)] / 4000 == pytest.approx(1 / 4, abs=0.04)


@pytest.mark.parametrize("labels", [(), ((0,), (1,), ()), ((0, 1),)])
def test_no_two_images_of_a_class(labels: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(DataError, match=f"of {len(labels)} images"):
        pairs_of(labelled(*labels), 3, 1, 0)


def test_loss_falls(fresh: Any, items: list[Item], tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(
        update={"iterations": 120, "learning_rate": 0.05, "jitter": (0.0,) * 4, "dropout": 0.0}
    )
    network = fresh(settings)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    history = train_edam(network, items, settings, seed=0, folder=tmp_path)
    assert [record["step"] for record in history] == list(range(4, 121, 4))
    losses = [record["loss"] for record in history]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert not network.training
    modules = network.named_modules()
    norms = {name for name, module in modules if isinstance(module, torch.nn.BatchNorm2d)}
    for name, value in network.state_dict().items():
        inner = name.removeprefix("classifier.backbone.")
        fixed = name.rpartition(".")[0] in norms or name == "classifier.head.weight"
        frozen = fixed or inner.startswith("conv1.")
        if not name.endswith("key.bias"):  # which no softmax feels
            assert torch.equal(value, before[name]) == frozen, name


def test_optimiser_of_the_specification(
    fresh: Any, items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[dict[str, Any]]] = []
    step = torch.optim.SGD.step

    def record(self: torch.optim.SGD, *arguments: Any) -> Any:
        seen.append([dict(group) for group in self.param_groups])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", record)
    network = fresh()
    train_edam(network, items, SETTINGS, seed=0, folder=tmp_path)
    factors = [0.1, 0.55, 1.0, 0.75**0.9, 0.5**0.9, 0.25**0.9]
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    held = set()
    for groups, factor in zip(seen, factors, strict=True):
        for group in groups:
            assert group["momentum"] == 0.9
            for parameter in group["params"]:
                name = names[id(parameter)]
                held.add(name)
                head = name in ("activation.weight", "reduction.weight", "logits.weight")
                bias = name.endswith("bias")
                rate = 1e-3 * (10 if head else 1) * (2 if bias else 1)
                assert group["lr"] == pytest.approx(rate * factor), name
                assert group["weight_decay"] == (0 if bias else 5e-4), name
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert held == trained
    assert any(name.startswith("classifier.backbone.layer4") for name in trained)


def test_warm_up_longer_than_the_training() -> None:
    settings = SETTINGS.model_copy(update={"warmup": 10})
    factors = [edam.learning_rate_factor(step, settings) for step in range(6)]
    assert factors == pytest.approx([0.1, 0.19, 0.28, 0.37, 0.46, 0.55])
    none = SETTINGS.model_copy(update={"warmup": 0})
    assert edam.learning_rate_factor(0, none) == 1.0


def test_labels_of_no_class(fresh: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\[7\]"):
        train_edam(fresh(), labelled((7,), (7,), (1,)), SETTINGS, seed=0, folder=tmp_path)


def test_colours_are_those_of_the_resized_image(tmp_path: Path) -> None:
    """Section 2: a change that clips does not commute with the filter that resizes."""
    image = np.zeros((60, 60, 3), np.uint8)
    image[:, ::2] = 250
    Image.fromarray(image).save(tmp_path / "i.png")
    settings = SETTINGS.model_copy(
        update={"jitter": (1.0, 0.0, 0.0, 0.0), "long_side": (30, 30), "crop": 30}
    )
    pair = [Item(str(number), tmp_path / "i.png", (0,)) for number in range(2)]
    levels = []
    for seed in range(20):
        images, numbers = edam._sample(
            pair, Partners(pair), RAW, settings, seed, loop.Place(0, 0, 0)
        )
        assert sorted(numbers.tolist()) == [0, 1]
        levels += [float(found.median()) * 127.5 + 127.5 for found in images]
    assert max(levels) > 200  # of a grey of 125; of black and white, first clipped, it were 127


def test_maps_are_those_of_the_specification(fresh: Any, items: list[Item]) -> None:
    """As released: each scale and mirror image is enlarged to the image, and all are summed."""
    network, image = fresh(), read_image(items[0].image)
    size = image.shape[:2]
    total = torch.zeros(3, *size)
    for scale in SETTINGS.scales:
        part = resize_image(image, (round(size[0] * scale), round(size[1] * scale)))
        tensor = network.preprocessing(part)[None]
        for flipped in (False, True):
            given = tensor.flip(-1) if flipped else tensor
            masks = network.masks(network.classifier.features(given))[:, :3].detach()
            large = F.interpolate(masks, size, mode="bilinear", align_corners=False)[0]
            total += large.flip(-1) if flipped else large
    found = maps_of(network, image, [0, 2], SETTINGS)
    expected = total[[0, 2]] / total[[0, 2]].amax((1, 2), keepdim=True)
    torch.testing.assert_close(found.high_res, expected, atol=1e-5, rtol=1e-5)
    assert found.cam.shape == (2, -(-size[0] // 4), -(-size[1] // 4))
    for maps in found:
        assert float(maps.min()) >= 0
        torch.testing.assert_close(maps.amax((1, 2)), torch.ones(2))
        assert not maps.requires_grad
    tiny = np.random.default_rng(0).integers(0, 256, (17, 5, 3)).astype(np.uint8)
    once = SETTINGS.model_copy(update={"flip": False})
    assert maps_of(network, tiny, [1], once).high_res.shape == (1, 17, 5)
    assert maps_of(network, tiny, [], once).cam.shape == (0, 5, 2)
