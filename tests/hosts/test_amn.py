"""AMN: conditioning, head, loss, training, going on after a stop, files, maps of both readings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import COLOURS
from torch import Tensor

from lpcam.classifiers.classifier import BackboneSpec
from lpcam.data.dataset import ClassTable, Item
from lpcam.data.folder import read_folder
from lpcam.hosts import amn
from lpcam.hosts.amn import (
    Amn,
    AmnSettings,
    amn_loss,
    export_maps,
    label_counts,
    maps_of,
)
from lpcam.hosts.base import HostData
from lpcam.method.functional import FusedMaps
from lpcam.runtime.errors import ClassifierError, DataError

build_amn = amn.HOST.build
SPEC = BackboneSpec("test_resnet", {}, 16)
CLASSES = ClassTable(tuple(COLOURS), (1, 2, 3))
SETTINGS = AmnSettings.from_preset(
    "official",
    epochs=2,
    batch_size=3,
    crop=64,
    dilations=(1, 2),
    learning_rate=1e-3,
    head_learning_rate=1e-2,
    scales=(1.0, 0.5),
)


def train_amn(
    network: Amn,
    labelled: list[tuple[Item, Path]],
    classes: ClassTable,
    settings: AmnSettings,
    **options: Any,
) -> list[dict[str, Any]]:
    return amn.HOST.train(network, HostData([], [], labelled, classes), settings, **options)


@pytest.fixture
def fresh(weights: Path) -> Any:
    """Makes equal untrained networks."""
    return lambda seed=0, settings=SETTINGS: build_amn(
        SPEC, CLASSES.names, settings, weights=weights, seed=seed
    )


@pytest.fixture
def labelled(pictures: Path, tmp_path: Path) -> list[tuple[Item, Path]]:
    """The tiny images with their masks as ternary labels, a frame of each ignored."""
    found = []
    for item in read_folder(pictures).items.values():
        assert item.mask is not None
        label = np.array(Image.open(item.mask))
        label[:, :3] = 255
        path = tmp_path / "labels" / f"{item.id}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(label).save(path)
        found.append((item, path))
    return found


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn_labels(*shape: int, values: tuple[int, ...] = (0, 1, 2, 255), seed: int = 0) -> Tensor:
    numbers = torch.randint(0, len(values), shape, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(values)[numbers]


def drawn_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def sharpened(network: Amn) -> Amn:
    """With a head whose logits differ, as after training."""
    with torch.no_grad():
        for branch in network.head.children():
            assert isinstance(branch, torch.nn.Conv2d)
            branch.weight.mul_(8)
            assert branch.bias is not None
            branch.bias.copy_(drawn(4, seed=7))
    return network


def test_network_is_that_of_the_specification(fresh: Any) -> None:
    network = sharpened(fresh())
    images, labels = drawn(2, 3, 61, 83), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    plain = network.classifier.backbone.forward_features(images)
    torch.testing.assert_close(network.classifier.features(images), plain)
    layer = network.conditioning
    for row, present in enumerate(([0, 2], [1])):
        factors = layer.weight[:, present].sum(1) + layer.bias
        found = network.condition(plain, labels)[row]
        torch.testing.assert_close(found, plain[row] * factors[:, None, None])
    conditioned = network.condition(plain, labels)
    expected = sum(
        F.conv2d(conditioned, b.weight, b.bias, padding=rate, dilation=rate)
        for rate, b in zip((1, 2), network.head.children(), strict=True)
    )
    found = network(images, labels)
    assert found.shape == (2, 4, 4, 6)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
@pytest.mark.parametrize("size", [(64, 64), (61, 83), (33, 47)])
def test_any_backbone_and_size(name: str, size: tuple[int, int]) -> None:
    arguments = {"dynamic_img_size": True, "dynamic_img_pad": True} if name == "test_vit" else {}
    settings = AmnSettings.from_preset("default", scales=(1.0, 1.5))
    network = build_amn(BackboneSpec(name, arguments), ("a", "b"), settings, weights="random")
    logits = network(drawn(2, 3, *size), torch.eye(2))
    assert logits.shape[:2] == (2, 3)
    assert bool(torch.isfinite(logits).all())
    found = maps_of(network, drawn_image(*size), [1], settings, seed=torch.ones(size))
    assert found.cam.shape == (1, -(-size[0] // 4), -(-size[1] // 4))
    assert found.high_res.shape == (1, *size)


def test_constant_response_is_that_of_a_constant_input(fresh: Any) -> None:
    network = sharpened(fresh())
    weight, bias = network.constant_response()
    values = drawn(weight.shape[1])
    field = values[None, :, None, None].expand(1, -1, 9, 9)
    torch.testing.assert_close(network.logits(field)[0, :, 4, 4], weight @ values + bias)
    assert not weight.requires_grad


def test_dropout_is_in_training_alone(fresh: Any) -> None:
    network = fresh()
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
    plain = F.cross_entropy(logits, labels.masked_fill(labels == 0, 255), ignore_index=255)
    plain = plain + F.cross_entropy(logits, labels.masked_fill(labels > 0, 255), ignore_index=255)
    torch.testing.assert_close(amn_loss(logits, labels, 0.0), plain / 2)


@pytest.mark.parametrize("values", [(0,), (0, 255), (2,), (1, 2, 255), (255,)])
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
    counts = label_counts(labels)
    assert counts.tolist() == [int((labels == 0).sum()), int(((labels > 0) & (labels < 9)).sum())]
    parts = [amn_loss(logits[p], labels[p], 0.4, counts) for p in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(sum(parts), amn_loss(logits, labels, 0.4))


def test_gradient_of_the_loss() -> None:
    logits = drawn(1, 3, 3, 4).double().requires_grad_()
    labels = drawn_labels(1, 3, 4)
    assert torch.autograd.gradcheck(lambda x: amn_loss(x, labels, 0.4), (logits,))


def test_loss_falls(fresh: Any, labelled: list[tuple[Item, Path]], tmp_path: Path) -> None:
    """And the labels that are told decide between the classes."""
    network = fresh()
    settings = SETTINGS.model_copy(update={"epochs": 12, "scale": (0.9, 1.1), "smoothing": 0.1})
    before = {k: v.clone() for k, v in network.state_dict().items()}
    history = train_amn(network, labelled, CLASSES, settings, seed=0, folder=tmp_path)
    assert [record["epoch"] for record in history] == list(range(1, 13))
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert not network.training
    frozen = ("conv1.", "bn1.", "head.", "running_", "num_batches")
    for name, value in network.state_dict().items():
        part = name.removeprefix("classifier.").removeprefix("backbone.")
        stays = name.startswith("classifier.") and (
            part.startswith(frozen) or part.rpartition(".")[2].startswith(frozen)
        )
        assert torch.equal(value, before[name]) == stays, name


def test_optimiser_of_the_specification(
    fresh: Any,
    labelled: list[tuple[Item, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[dict[str, Any]]] = []
    step = torch.optim.Adam.step

    def record(self: torch.optim.Adam, *arguments: Any) -> Any:
        seen.append([dict(group) for group in self.param_groups])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", record)
    settings = AmnSettings.from_preset(
        "official", epochs=2, batch_size=5, crop=48, dilations=(1, 2)
    )
    network = fresh()
    history = train_amn(network, labelled, CLASSES, settings, seed=0, folder=tmp_path)
    assert len(seen) == 4  # of 12 images, two batches of 5 an epoch
    assert [record["step"] for record in history] == [2, 4]
    for backbone, head in seen:
        assert (backbone["lr"], head["lr"]) == (5e-6, 1e-4)
        for group in (backbone, head):
            assert (group["weight_decay"], group["betas"]) == (1e-4, (0.9, 0.999))
        assert len(head["params"]) == 2 + 2 * 2
        names = {id(p) for p in backbone["params"]}
        stem = network.classifier.backbone.conv1
        assert not any(id(p) in names for p in stem.parameters())


def test_bad_input(fresh: Any, labelled: list[tuple[Item, Path]], tmp_path: Path) -> None:
    def train(
        given: list[tuple[Item, Path]],
        settings: AmnSettings = SETTINGS,
        classes: ClassTable = CLASSES,
    ) -> None:
        train_amn(fresh(), given, classes, settings, seed=0, folder=tmp_path / "run")

    lost = [*labelled[:-1], (labelled[-1][0], tmp_path / "none.png")]
    with pytest.raises(DataError, match=r"1 of 12 images have no mask: i11 \(.*none.png\)"):
        train(lost)
    with pytest.raises(DataError, match="0 of 0 images have no mask"):
        train([])
    small = tmp_path / "small.png"
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(small)
    with pytest.raises(DataError, match=r"small.png of 'i00' is 9 x 9 .* but the upright image is"):
        train([(labelled[0][0], small)])
    with pytest.raises(DataError, match=r"has the values \[3\], which are of no class"):
        train_amn(
            build_amn(SPEC, CLASSES.names[:2], SETTINGS, weights="random"),
            labelled,
            ClassTable(CLASSES.names[:2], (1, 2)),
            SETTINGS,
            seed=0,
            folder=tmp_path / "run",
        )
    with pytest.raises(ClassifierError, match="blue, green, red"):
        train(labelled, classes=ClassTable(CLASSES.names[::-1], (1, 2, 3)))
    with pytest.raises(ClassifierError, match="freeze: no parameter of the backbone is below 'no'"):
        train(labelled, SETTINGS.model_copy(update={"freeze": ("no",)}))
    with pytest.raises(
        ClassifierError, match=r"the loss is nan at step \d of 8; lower host.amn.learn"
    ):
        train(labelled, SETTINGS.model_copy(update={"head_learning_rate": 1e30}))


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


def test_maps_of_an_image(fresh: Any) -> None:
    """Scales and mirror images, by hand; the background is left out."""
    network = sharpened(fresh()).train()
    image = drawn_image(61, 83)
    seed = drawn_labels(61, 83)
    settings = SETTINGS.model_copy(update={"dropout": 0.9})
    found = maps_of(network, image, [2, 1], settings, seed=seed)
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
    mirror = maps_of(network, image[:, ::-1].copy(), [2, 1], ungated())
    plain = maps_of(network, image, [2, 1], ungated())
    # at 83 pixels a column the grid is not its own mirror; halves agree roughly, the mean well
    assert float(mirror.high_res.mean()) == pytest.approx(float(plain.high_res.mean()), abs=0.02)


def ungated(**changes: Any) -> AmnSettings:
    return SETTINGS.model_copy(update={"gate": False, **changes})


@pytest.mark.parametrize("reading", ["a", "b"])
def test_gate(fresh: Any, reading: str) -> None:
    """Sure background is never raised; the rest is what it is without a gate."""
    network, image = sharpened(fresh()), drawn_image(48, 64)
    seed = drawn_labels(48, 64)
    vectors = drawn(3, network.conditioning.out_features) / 16 if reading == "b" else None

    def mapped(seed: Tensor | None, settings: AmnSettings) -> FusedMaps:
        return maps_of(network, image, [0, 2], settings, seed=seed, vectors=vectors)

    gated, free = mapped(seed, SETTINGS), mapped(None, ungated())
    for each, plain, step in ((gated.high_res, free.high_res, 1), (gated.cam, free.cam, 4)):
        sure = seed[step // 2 :: step, step // 2 :: step] == 0
        assert torch.equal(each[:, ~sure], plain[:, ~sure])
        assert not torch.allclose(each[:, sure], plain[:, sure], atol=1e-2)
        assert 0 <= float(each.min()) <= float(each.max()) <= 1
    assert torch.equal(mapped(seed, ungated()).high_res, free.high_res)
    with pytest.raises(DataError, match="the image has no labels, which say where its maps are"):
        mapped(None, SETTINGS)
    with pytest.raises(DataError, match=r"have \(48, 63\) pixels but the image \(48, 64\)"):
        mapped(seed[:, 1:], SETTINGS)


@pytest.mark.parametrize("conditioned", [True, False])
def test_local_features(fresh: Any, conditioned: bool) -> None:
    network, image = fresh(), drawn_image(61, 83)
    settings = ungated(conditioned=conditioned)
    found, split = amn.local_features(network, image, [1], settings)
    tensor = network.preprocessing(image)[None]
    expected = network.classifier.features(tensor)
    if conditioned:
        expected = network.condition(expected, torch.tensor([[0.0, 1, 0]]))
    torch.testing.assert_close(found, expected[0], atol=1e-5, rtol=1e-4)
    assert (float(found.min()) < 0) == conditioned
    assert torch.equal(split, maps_of(network, image, [1], settings).high_res)


def test_reading_b_is_the_cosine_with_the_vectors(fresh: Any) -> None:
    network, image = fresh(), drawn_image(64, 64)
    vectors = drawn(3, network.conditioning.out_features)
    settings = ungated(scales=(1.0,), flip=False)
    found = maps_of(network, image, [2], settings, vectors=vectors)
    features, _ = amn.local_features(network, image, [2], settings)
    cosine = torch.einsum("chw,c->hw", features / features.norm(dim=0), vectors[2]).relu()
    fine = F.interpolate(cosine[None, None], size=(64, 64), mode="bilinear")[0]
    torch.testing.assert_close(found.high_res, fine / fine.max(), atol=1e-5, rtol=1e-4)
    coarse = F.interpolate(cosine[None, None], size=(16, 16), mode="bilinear")[0]
    torch.testing.assert_close(found.cam, coarse / coarse.max(), atol=1e-5, rtol=1e-4)


def test_official_settings_are_those_of_the_specification() -> None:
    """Written down again from sections 1, 3, 4 and 5."""
    found = AmnSettings.from_preset("official").model_dump()
    expected = {
        "epochs": 5,
        "batch_size": 16,
        "learning_rate": 5e-6,
        "head_learning_rate": 1e-4,
        "weight_decay": 1e-4,
        "freeze": ("conv1", "bn1"),
        "scale": (0.5, 1.5),
        "crop": 512,
        "smoothing": 0.4,
        "dropout": 0.1,
        "dilations": (6, 12, 18, 24),
        "foreground_threshold": 0.45,
        "background_threshold": 0.25,
        "cam_foreground_threshold": 0.30,
        "cam_background_threshold": 0.05,
        "scales": (1.0, 0.5, 1.5, 2.0),
        "flip": True,
        "gate": True,
        "reading": "teacher",
        "threshold": 0.25,
    }
    assert {name: found[name] for name in expected} == expected
