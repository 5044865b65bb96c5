"""The linear probe: the one optimum, every view counted, and nothing computed twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import together
from torch import Tensor

from lpcam.classifiers import probe
from lpcam.classifiers.classifier import Classifier
from lpcam.classifiers.feature_store import FeatureStore
from lpcam.classifiers.linear import ProbeSettings, mean_average_precision
from lpcam.data import dataset
from lpcam.data.dataset import Item
from lpcam.data.folder import read_folder
from lpcam.data.images import Reading, read_image, resize_image
from lpcam.runtime.distributed import Processes, Sharing
from lpcam.runtime.errors import ClassifierError, PrototypeError

SETTINGS = ProbeSettings.from_preset("default", long_side=64)
NAMES = ("blue", "green", "red")


@pytest.fixture
def items(pictures: Path) -> list[Item]:
    return list(read_folder(pictures).items.values())


def data(images: int = 20, views: int = 2, channels: int = 6) -> tuple[Tensor, Tensor]:
    """Random pooled features and labels that depend on them."""
    generator = torch.Generator().manual_seed(0)
    pooled = torch.rand(images, views, channels, generator=generator)
    noise = 0.3 * torch.randn(images, 3, generator=generator)
    labels = (pooled.mean(1)[:, :3] + noise > 0.5).float()
    assert labels.sum(0).min() > 0 and labels.sum(0).max() < images
    return pooled, labels


def gradient(weight: Tensor, pooled: Tensor, labels: Tensor, weight_decay: float) -> Tensor:
    """Of each class's mean cross-entropy and the penalty, written out: X'(sigmoid(XW') - Y)."""
    total = torch.zeros_like(weight, dtype=torch.float64)
    samples = pooled.shape[0] * pooled.shape[1]
    for image in range(pooled.shape[0]):
        for view in range(pooled.shape[1]):
            x = pooled[image, view].double()
            error = torch.sigmoid(weight.double() @ x) - labels[image].double()
            total += error[:, None] * x[None] / samples
    return total + weight_decay * weight.double()


@pytest.mark.parametrize("weight_decay", [0.003, 0.1])
def test_fit_head_is_the_optimum(weight_decay: float) -> None:
    pooled, labels = data()
    settings = ProbeSettings.from_preset("default", weight_decay=weight_decay)
    weight = probe.fit_head(pooled, labels, settings, NAMES)
    assert weight.shape == (3, 6)
    assert weight.dtype == torch.float32
    assert gradient(weight, pooled, labels, weight_decay).abs().max() < 5e-6
    assert gradient(0.9 * weight, pooled, labels, weight_decay).abs().max() > 1e-4


def test_fit_head_does_not_depend_on_the_threads() -> None:
    """At a size at which the matrix library shares out a product."""
    generator = torch.Generator().manual_seed(0)
    pooled = torch.rand(300, 2, 256, generator=generator)
    labels = (torch.rand(300, 20, generator=generator) < 0.2).float()
    names = [str(number) for number in range(20)]
    weights = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        weights.append(probe.fit_head(pooled, labels, SETTINGS, names))
        assert torch.get_num_threads() == threads
    assert torch.equal(weights[0], weights[1])


def test_fit_head_names_classes_without_images() -> None:
    pooled, labels = data()
    labels[:, 1:] = 0
    with pytest.raises(ClassifierError, match="green, red"):
        probe.fit_head(pooled, labels, SETTINGS, NAMES)


def store(classifier: Classifier, *, flip: bool = True, **options: Any) -> FeatureStore:
    """A store that keeps nothing."""
    chosen = {"maximum_side": 1000, "dtype": "float32", "budget": 0, "keep": [], **options}
    return FeatureStore(classifier, flip=flip, **chosen)


def pooled_features(
    items: list[Item],
    settings: ProbeSettings,
    folder: Path,
    features: FeatureStore,
    sharing: Sharing | None = None,
) -> Tensor:
    """Features of one process."""
    found = probe.pooled_features(items, settings, features, folder, sharing or Sharing())
    assert found is not None
    return found


@pytest.mark.parametrize("long_side", [64, None])
@pytest.mark.parametrize("mirror", [True, False])
def test_pooled_features_of_image_and_mirror(
    classifier: Classifier, items: list[Item], tmp_path: Path, mirror: bool, long_side: int | None
) -> None:
    """Without a long side the features come from the store that the maps use as well."""
    settings = SETTINGS.model_copy(update={"mirror": mirror, "long_side": long_side})
    odd = replace(items[1], id="__metadata__")  # a name that safetensors reserves
    shared = store(classifier, budget=10**9, keep=[items[0].id])
    found = pooled_features([items[0], odd], settings, tmp_path, shared)
    image = read_image(items[1].image)
    if long_side is not None:
        height, width = image.shape[:2]
        side = max(height, width)
        image = resize_image(image, (round(height * 64 / side), round(width * 64 / side)))
    views = (image, image[:, ::-1]) if mirror else (image,)
    assert found.shape[:2] == (2, len(views))
    with torch.no_grad():
        for view, pixels in enumerate(views):
            features = classifier.features(classifier.preprocessing(pixels)[None])
            assert torch.allclose(found[1, view], features[0].mean((1, 2)), atol=1e-5)
    assert (shared.used > 0) == (long_side is None)


def test_pooled_features_go_on_after_a_stop(
    classifier: Classifier, items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "SHARD", 4)

    def pooled(name: str) -> Tensor:
        return pooled_features(items[:10], SETTINGS, tmp_path / name, store(classifier))

    whole = pooled("whole")
    assert len(list((tmp_path / "whole").iterdir())) == 3
    read: list[str] = []

    def stops_at_the_seventh(path: Path, reading: Reading) -> object:
        read.append(path.stem)
        if len(read) == 7:
            raise KeyboardInterrupt
        return read_image(path, reading)

    folder = tmp_path / "stopped"
    monkeypatch.setattr(dataset, "read_image", stops_at_the_seventh)
    with pytest.raises(KeyboardInterrupt):
        pooled("stopped")
    assert len(list(folder.iterdir())) == 1
    assert torch.equal(pooled("stopped"), whole)
    assert read[7:] == [item.id for item in items[4:10]]

    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()


def test_pooled_features_of_threads_and_processes(
    classifier: Classifier, items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "SHARD", 3)
    settings, features = SETTINGS, store(classifier)
    one = pooled_features(items, settings, tmp_path / "one", features)
    many = pooled_features(items, settings, tmp_path / "many", features, Sharing(workers=3))
    assert torch.equal(many, one)
    owner = {item.id: number % 3 for number, item in enumerate(items)}

    def work(processes: Processes) -> Tensor | None:
        sharing = Sharing(processes, owner=owner)
        return probe.pooled_features(items, settings, features, tmp_path / "three", sharing)

    first, *others = together(3, work)
    assert others == [None, None]
    assert first is not None and torch.equal(first, one)
    assert len(list((tmp_path / "three").iterdir())) == 6


def test_pooled_features_that_are_not_finite(
    classifier: Classifier, items: list[Item], tmp_path: Path
) -> None:
    classifier.preprocessing = replace(classifier.preprocessing, std=(0.0, 0.0, 0.0))
    with pytest.raises(PrototypeError, match=r"'i00'.*NaN"):
        pooled_features(items, SETTINGS, tmp_path, store(classifier))


@pytest.mark.parametrize("refit", [False, True])
def test_fit_probe(
    classifier: Classifier, items: list[Item], tmp_path: Path, *, refit: bool
) -> None:
    pooled = pooled_features(items, SETTINGS, tmp_path, store(classifier))
    training, validation = items[:9], items[9:]
    backbone = {k: v.clone() for k, v in classifier.backbone.state_dict().items()}
    history = probe.fit_probe(
        classifier, training, validation, SETTINGS, pooled=pooled, refit=refit
    )
    assert all(torch.equal(v, backbone[k]) for k, v in classifier.backbone.state_dict().items())

    labels = probe.multi_hot(items, 3)
    measured = probe.fit_head(pooled[:9], labels[:9], SETTINGS, NAMES)
    kept = probe.fit_head(pooled, labels, SETTINGS, NAMES) if refit else measured
    assert torch.equal(classifier.weight, kept)
    # the validation images are never in the head that they measure
    [record] = history
    logits = pooled[9:, 0] @ measured.T
    assert record["epoch"] == 1
    assert record["validation_map"] == mean_average_precision(logits, labels[9:])
    z = pooled[:9, 0].double() @ measured.double().T
    loss = -(labels[:9] * torch.log(z.sigmoid()) + (1 - labels[:9]) * torch.log((-z).sigmoid()))
    assert record["loss"] == pytest.approx(loss.mean().item(), abs=1e-6)
    [record] = probe.fit_probe(classifier, items, [], SETTINGS, pooled=pooled, refit=True)
    assert record["validation_map"] is None
