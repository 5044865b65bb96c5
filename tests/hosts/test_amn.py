"""AMN: conditioning, head, loss, optimiser, maps of both readings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hosts.common import (
    CLASSES,
    SETTINGS,
    build_host,
    drawn,
    drawn_labels,
    map_image,
    photograph,
)
from PIL import Image
from torch import Tensor

from lpcam.data.dataset import ClassTable, Item
from lpcam.hosts.amn import HOST, Amn, AmnSettings, amn_loss, export_maps
from lpcam.hosts.base import HostData, View
from lpcam.method.functional import FusedMaps
from lpcam.runtime.errors import ClassifierError, DataError
from lpcam.segmentation.losses import sums_by_side
from lpcam.training import loop as engine


def ungated(**changes: Any) -> AmnSettings:
    return SETTINGS["amn"].model_copy(update={"gate": False, **changes})


def mapped(network: Amn, image: np.ndarray, labels: list[int], *rest: Any) -> FusedMaps:
    return map_image("amn", network, image, labels, *rest)


@pytest.fixture
def network(weights: Path) -> Amn:
    """With a head whose logits differ, as after training."""
    network: Amn = build_host("amn", weights)
    with torch.no_grad():
        for branch in network.head.children():
            assert isinstance(branch, torch.nn.Conv2d)
            branch.weight.mul_(8)
            assert branch.bias is not None
            branch.bias.copy_(drawn(4, seed=7))
    return network


def test_network_is_that_of_the_specification(network: Amn) -> None:
    images, labels = drawn(2, 3, 61, 83), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    plain = network.classifier.backbone.forward_features(images)
    layer = network.conditioning
    conditioned = network.condition(plain, labels)
    for row, present in enumerate(([0, 2], [1])):
        factors = layer.weight[:, present].sum(1) + layer.bias
        torch.testing.assert_close(conditioned[row], plain[row] * factors[:, None, None])
    expected = sum(
        F.conv2d(conditioned, b.weight, b.bias, padding=rate, dilation=rate)
        for rate, b in zip((1, 2), network.head.children(), strict=True)
    )
    found = network(images, labels)
    assert found.shape == (2, 4, 4, 6)
    torch.testing.assert_close(found, expected)


def test_prototypes_are_scored_as_a_constant_input(network: Amn) -> None:
    weight, bias = HOST.scorer(network)
    values = drawn(weight.shape[1])
    field = values[None, :, None, None].expand(1, -1, 9, 9)
    torch.testing.assert_close(network.logits(field)[0, :, 4, 4], weight @ values + bias)


def test_dropout_is_in_training_alone(network: Amn) -> None:
    images, labels = drawn(1, 3, 64, 64), torch.ones(1, 3)
    assert torch.equal(network(images, labels), network(images, labels))
    network.train()
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)
    assert not torch.equal(network(images, labels), network(images, labels))


def test_loss_pixel_by_pixel() -> None:
    """L = 4, smoothing 0.4: 0.6 for the label and 0.4 / 3 for each other."""
    logits, labels = 2 * drawn(2, 4, 5, 6), drawn_labels(2, 5, 6, values=(0, 1, 3, 255))
    likelihoods = logits.double().log_softmax(1)
    sides: tuple[list[float], list[float]] = ([], [])
    for b, y, x in np.ndindex(2, 5, 6):
        label = int(labels[b, y, x])
        if label == 255:
            continue
        target = torch.full((4,), 0.4 / 3).double()
        target[label] = 0.6
        sides[label > 0].append(-float(target @ likelihoods[b, :, y, x]))
    expected = (np.mean(sides[0]) + np.mean(sides[1])) / 2
    assert float(amn_loss(logits, labels, 0.4)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("values", [(0, 255), (1, 2, 255), (255,)])
def test_one_sided_batches(values: tuple[int, ...]) -> None:
    logits = drawn(2, 3, 5, 6).requires_grad_()
    labels = drawn_labels(2, 5, 6, values=values)
    loss = amn_loss(logits, labels, 0.4)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert bool(torch.isfinite(gradient).all())
    assert bool(gradient.any()) == bool((loss > 0).any()) == (values != (255,))
    known = labels != 255
    assert not gradient.movedim(1, -1)[~known].any()
    if bool(known.any()):
        own = -logits.detach().log_softmax(1).movedim(1, -1)[known]
        target = torch.full_like(own, 0.2).scatter(1, labels[known][:, None], 0.6)
        torch.testing.assert_close(loss.detach(), (target * own).sum(1).mean() / 2)


def test_parts_of_a_batch_add_up() -> None:
    logits, labels = drawn(3, 4, 5, 6), drawn_labels(3, 5, 6)
    _, counts = sums_by_side(labels.float(), labels)
    parts = [
        amn_loss(logits[p], labels[p], 0.4, lambda _: counts) for p in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), amn_loss(logits, labels, 0.4))


def test_optimiser_of_the_specification(
    network: Amn, labelled: list[tuple[Item, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(
        _: Any, optimizer: Any, samples: Any, count: int, loss: Any, plan: Any, **__: Any
    ) -> Any:
        assert (plan.steps, plan.batch, plan.record) == (4, 5, 2)  # two whole batches of 12 images
        return optimizer.param_groups

    monkeypatch.setattr(engine, "run", run)
    settings = AmnSettings.from_preset("official", epochs=2, batch_size=5)
    data = HostData([], [], labelled, CLASSES)
    backbone, head = HOST.train(network, data, settings, seed=0, folder=Path())
    assert (backbone["lr"], head["lr"]) == (5e-6, 1e-4)
    for group in (backbone, head):
        assert (group["weight_decay"], group["betas"]) == (1e-4, (0.9, 0.999))
    assert len(head["params"]) == 2 + 2 * 2
    names = {id(p) for p in backbone["params"]}
    assert not any(id(p) in names for p in network.classifier.backbone.conv1.parameters())


def test_bad_input(network: Amn, labelled: list[tuple[Item, Path]], tmp_path: Path) -> None:
    two = HostData([], [], labelled, ClassTable(CLASSES.names[:2], (1, 2)))
    with pytest.raises(DataError, match=r"has the values \[3\]"):
        HOST.train(network, two, SETTINGS["amn"], seed=0, folder=tmp_path / "run")
    settings = SETTINGS["amn"].model_copy(update={"freeze": ("no",)})
    with pytest.raises(ClassifierError, match=r"freeze: .* 'no'"):
        HOST.images_per_step(network, HostData([], [], labelled, CLASSES), settings)


def test_exported_maps_pixel_by_pixel() -> None:
    """At the size of the logits nothing is resized: softmax, range, gate."""
    logits = drawn(4, 8, 12)
    seed = drawn_labels(8, 12)
    found = export_maps([logits], [2, 0], seed, (8, 12)).high_res
    probabilities = logits.softmax(0)
    for plane, label in zip(found, (0, 3, 1), strict=True):
        own = probabilities[label]
        stretched = (own - own.min()) / (own.max() - own.min() + 1e-5)
        torch.testing.assert_close(plane[seed == 0], own[seed == 0])
        torch.testing.assert_close(plane[seed != 0], stretched[seed != 0])
    ungated = export_maps([logits], [2, 0], None, (8, 12)).high_res
    assert float(ungated[1:].amin()) == 0
    assert float(ungated.amax()) > 0.999


def test_scales_are_averaged_before_the_softmax() -> None:
    first, second = drawn(3, 4, 4), 3 * drawn(3, 4, 4, seed=1)
    found = export_maps([first, second], [1], torch.zeros(4, 4), (4, 4)).high_res
    torch.testing.assert_close(found, ((first + second) / 2).softmax(0)[[0, 2]])


def test_flat_maps_are_zero_where_they_are_stretched() -> None:
    # of four planes, so that no softmax is rounded
    found = export_maps([torch.zeros(4, 2, 2)], [0], torch.tensor([[0, 1], [255, 2]]), (2, 2))
    expected = torch.tensor([[1 / 4, 0], [0, 0]])
    torch.testing.assert_close(found.high_res, expected.expand(2, 2, 2))


def test_maps_of_an_image(network: Amn) -> None:
    """Scales and mirror images, by hand; the background is left out."""
    image, seed = photograph(61, 83), drawn_labels(61, 83)
    found = mapped(network.train(), image, [2, 1], None, seed)
    assert not network.training
    shown = torch.tensor([[0.0, 1, 1]])
    logits = []
    with torch.no_grad():
        for size in ((61, 83), (30, 42)):
            resized = np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
            tensor = network.preprocessing(resized)[None]
            mirrored = network(tensor.flip(-1), shown).flip(-1)
            logits.append((network(tensor, shown) + mirrored)[0] / 2)
    expected = export_maps(logits, [2, 1], seed, (61, 83))
    torch.testing.assert_close(found.cam, expected.cam[1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.high_res, expected.high_res[1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reading", ["a", "b"])
def test_gate(network: Amn, reading: str) -> None:
    """Sure background is never raised; the rest is what it is without a gate."""
    image, seed, official = photograph(48, 64), drawn_labels(48, 64), SETTINGS["amn"]
    vectors = drawn(3, network.conditioning.out_features) / 16 if reading == "b" else None

    def given(seed: Tensor | None, settings: AmnSettings) -> FusedMaps:
        return mapped(network, image, [0, 2], settings, seed, vectors)

    gated, free = given(seed, official), given(None, ungated())
    for each, plain, step in ((gated.high_res, free.high_res, 1), (gated.cam, free.cam, 4)):
        sure = seed[step // 2 :: step, step // 2 :: step] == 0
        assert torch.equal(each[:, ~sure], plain[:, ~sure])
        assert not torch.allclose(each[:, sure], plain[:, sure], atol=1e-2)
        assert 0 <= float(each.min()) <= float(each.max()) <= 1
    assert torch.equal(given(seed, ungated()).high_res, free.high_res)
    with pytest.raises(DataError, match="the image has no labels"):
        given(None, official)


@pytest.mark.parametrize("conditioned", [True, False])
def test_local_features_and_their_lpcam(network: Amn, conditioned: bool) -> None:
    image = photograph(61, 83)
    settings = ungated(conditioned=conditioned, scales=(1.0,), flip=False)
    found, split = HOST.local_features(network, View(image, (1,), None), settings)
    expected = network.classifier.features(network.preprocessing(image)[None])
    if conditioned:
        expected = network.condition(expected, torch.tensor([[0.0, 1, 0]]))
    torch.testing.assert_close(found, expected[0], atol=1e-5, rtol=1e-4)
    assert (float(found.min()) < 0) == conditioned
    assert torch.equal(split, mapped(network, image, [1], settings).high_res)
    vectors = drawn(3, network.conditioning.out_features)
    maps = mapped(network, image, [1], settings, None, vectors)
    cosine = torch.einsum("chw,c->hw", found / found.norm(dim=0), vectors[1]).relu()
    for each, size in ((maps.high_res, (61, 83)), (maps.cam, (16, 21))):
        plane = F.interpolate(cosine[None, None], size=size, mode="bilinear")[0]
        torch.testing.assert_close(each, plane / plane.max(), atol=1e-5, rtol=1e-4)
