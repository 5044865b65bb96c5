"""PSA: scores of two CRFs, labels, network, affinities, loss, training, files and the walk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.classifiers.classifier import BackboneSpec, Classifier, Preprocessing, build
from lpcam.refine import psa
from lpcam.refine.crf import CrfSettings, DenseCrf, crf_scores
from lpcam.refine.psa import (
    Psa,
    PsaSettings,
    build_psa,
    feature_distances,
    label_pairs,
    pooled,
    psa_loss,
    read_scores,
    walk_affinities,
    write_scores,
)
from lpcam.refine.walk import affinity_walk, likelihood_means, pair_counts
from lpcam.runtime.errors import ArtefactError, ClassifierError, DataError

RAW = Preprocessing((0.0,) * 3, (1.0,) * 3)
SETTINGS = PsaSettings.from_preset(
    "official", epochs=2, batch_size=3, crop=64, radius=3, freeze=["conv1", "layer1"]
)
WIDE = {"channels": [4, 8, 8, 8, 16, 16, 32], "depths": [1, 1, 1, 1]}
CRF = DenseCrf(CrfSettings.from_preset("psa"))


@pytest.fixture
def fresh(classifier: Classifier) -> Any:
    """Makes equal untrained networks."""
    return lambda seed=0: build_psa(classifier, seed=seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def drawn_labels(*shape: int, values: tuple[int, ...] = (0, 1, 2, 255), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(values), shape, generator=generator)
    return torch.tensor(values, dtype=torch.uint8)[chosen]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_scores_are_the_posteriors_of_the_background_and_the_maps() -> None:
    image, planes = torch.from_numpy(picture(14, 19)), drawn(2, 14, 19)
    both = crf_scores(CRF, image, planes, [1.0, 12.0])
    background = (1 - torch.maximum(planes[0], planes[1])) ** 12
    expected = CRF.refine_probabilities(image, torch.stack([background, planes[0], planes[1]]))
    torch.testing.assert_close(both[1], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both.sum(1), torch.ones(2, 14, 19))
    assert float(both[0, 0].mean()) > float(both[1, 0].mean())  # the lower favours the background


def test_scores_without_a_class_and_out_of_range() -> None:
    image = torch.from_numpy(picture(9, 7))
    found = crf_scores(CRF, image, torch.zeros(0, 9, 7), [12.0])[0]
    assert torch.equal(found, torch.ones(1, 9, 7))
    cut = crf_scores(CRF, image, torch.full((1, 9, 7), 1.0004), [1.0])
    assert torch.equal(cut, crf_scores(CRF, image, torch.ones(1, 9, 7), [1.0]))
    for bad in (1.01, -0.01, math.nan):
        with pytest.raises(DataError, match=rf"maps reach from .*{bad}"):
            crf_scores(CRF, image, torch.full((1, 9, 7), bad), [1.0])
    with pytest.raises(DataError, match="of the image's size"):
        crf_scores(CRF, image, drawn(1, 9, 8), [1.0])


def test_scores_come_back_from_their_file(tmp_path: Path) -> None:
    path, again, scores = tmp_path / "a" / "one.npz", tmp_path / "two.npz", drawn(2, 3, 6, 5)
    for place in (path, again):
        write_scores(place, scores)
    assert path.read_bytes() == again.read_bytes()
    found = read_scores(path)
    assert found.dtype == np.uint8
    torch.testing.assert_close(torch.from_numpy(found) / 255, scores, atol=1 / 509, rtol=0)


def test_files_that_hold_no_scores(tmp_path: Path) -> None:
    path = tmp_path / "scores.npz"
    with pytest.raises(ArtefactError, match=r"cannot read .*scores.npz"):
        read_scores(path)
    write_scores(path, drawn(2, 3, 6, 5))
    contents, plane = [path.read_bytes()[:40], b"", b"PK"], np.zeros((1, 2, 2), np.uint8)
    objects = np.array([{}])
    for low, high in ((plane, plane[0]), (plane / 2, plane / 2), (objects, objects)):
        np.savez(path, low=low, high=high)
        contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ArtefactError, match=r"scores.npz .* refine-labels"):
            read_scores(path)


def test_labels_by_hand() -> None:
    """Sure of a class, of the background, of neither; against each other; beyond the image."""
    low = torch.tensor([[0.1, 0.9, 0.8, 0.2, 0.0], [0.2, 0.1, 0.1, 0.8, 0.0], [0.7, 0, 0.1, 0, 0]])
    high = torch.tensor([[0.0, 0.9, 0.3, 0.6, 0.0], [0.2, 0.1, 0.6, 0.4, 0.0], [0.8, 0, 0.1, 0, 0]])
    found = label_pairs(low[:, None], high[:, None])
    assert found.dtype == torch.uint8
    assert found.tolist() == [[2, 0, 255, 0, 255]]


def test_cells_are_means_of_8_by_8_pixels() -> None:
    scores = drawn(2, 11, 17)
    found = pooled(scores)
    assert found.shape == (2, 2, 3)
    torch.testing.assert_close(found[:, 0, 1], scores[:, :8, 8:16].mean((1, 2)))
    torch.testing.assert_close(found[:, 1, 2], scores[:, 8:, 16:].sum((1, 2)) / 64)


def test_the_backbone_is_a_copy_of_the_classifiers(classifier: Classifier) -> None:
    before = classifier.fingerprint()
    network = build_psa(classifier)
    assert network.preprocessing == classifier.preprocessing
    for name, value in classifier.backbone.state_dict().items():
        assert torch.equal(network.backbone.state_dict()[name], value)
    for parameter in network.parameters():
        parameter.data.add_(1.0)
    assert classifier.fingerprint() == before
    assert classifier.backbone is not network.backbone


def test_features_are_those_of_the_specification(fresh: Any) -> None:
    network = fresh()
    assert [level.stride for level in network.levels] == [8, 16, 16]
    assert network.channels == 448
    images = drawn(2, 3, 61, 83) - 0.5
    maps = network.backbone.forward_intermediates(
        F.pad(images, (0, 5, 0, 3)), intermediates_only=True
    )
    parts = []
    widths, factors = (64, 128, 256), (1, 2, 2)
    for found, layer, width, factor in zip(
        maps[-3:], network.reductions, widths, factors, strict=True
    ):
        assert layer.bias is None
        assert layer.weight.shape[0] == width
        reduced = F.conv2d(found, layer.weight)
        large = F.interpolate(reduced, scale_factor=factor, mode="bilinear")
        parts.append(F.elu(large[..., :8, :11]))
    expected = F.elu(F.conv2d(torch.cat(parts, 1), network.last.weight))
    torch.testing.assert_close(network(images), expected)


def test_wide_resnet_38_is_tapped_where_b5_and_b6_begin_and_at_its_end() -> None:
    classifier = build(BackboneSpec("wideresnet38", WIDE), ("one",), weights="random")
    network = build_psa(classifier)
    levels = [(level.channels, level.stride) for level in network.levels]
    assert levels == [(8, 8), (16, 8), (32, 8)]
    images = drawn(1, 3, 40, 56)
    maps: list[Tensor] = []
    backbone: Any = network.backbone
    hooks = [
        block.bn_branch2a.register_forward_hook(lambda _, __, out: maps.append(out.relu()))
        for block in (backbone.b5, backbone.b6)
    ]
    found = network(images)
    for hook in hooks:
        hook.remove()
    maps.append(backbone.forward_features(images))
    parts = [F.elu(r(m)) for r, m in zip(network.reductions, maps, strict=True)]
    torch.testing.assert_close(found, F.elu(network.last(torch.cat(parts, 1))))
    assert found.shape == (1, 448, 5, 7)


def test_backbones_without_fitting_maps(classifier: Classifier) -> None:
    plain = Classifier(torch.nn.Conv2d(3, 8, 3, 8), ("one",), RAW)
    with pytest.raises(ClassifierError, match="Conv2d does not give the feature maps between its"):
        build_psa(plain)
    found = [drawn(1, 4, 32, 32), drawn(1, 4, 64, 64)]
    classifier.backbone.forward_intermediates = lambda *_, **__: found
    with pytest.raises(ClassifierError, match=r"maps at strides \[2, 4\]; PSA needs some at 8, 16"):
        Psa(classifier)


def test_loss_is_that_of_the_affinities() -> None:
    features, labels = 3 * drawn(2, 6, 8, 9), drawn_labels(2, 8, 9)
    distances = feature_distances(features, 3)
    pairs = [(offset, (-distance).exp()) for offset, distance in distances]
    zero = torch.zeros(())
    means = likelihood_means(pairs, labels, pair_counts(labels, 3), zero, 3)
    expected = (means * torch.tensor([0.25, 0.25, 0.5])).sum()
    torch.testing.assert_close(psa_loss(features, labels, 3), expected)


@pytest.mark.parametrize("size", [(40, 90), (200, 7)])
def test_augmented_labels_stay_on_their_pixels(size: tuple[int, int]) -> None:
    """Light pixels are of the second class, dark ones of the first; black is beyond the image."""
    light = np.zeros(size, bool)
    light[: size[0] // 2, size[1] // 3 :] = True
    image = np.repeat(np.where(light, 200, 100).astype(np.uint8)[:, :, None], 3, axis=2)
    scores = np.stack([np.zeros(size), ~light, light]).astype(np.uint8) * 255
    settings = SETTINGS.model_copy(update={"jitter": (0.0, 0.0, 0.0, 0.0)})
    half = Preprocessing((0.5,) * 3, (0.5,) * 3)
    black = half(np.zeros((1, 1, 3), np.uint8))[0, 0, 0]
    for seed in range(6):
        generator = np.random.default_rng(seed)
        tensor, labels = psa.augment(half, settings, image, np.stack([scores, scores]), generator)
        assert tensor.shape == (3, 64, 64)
        assert labels.shape == (8, 8)
        assert labels.dtype == torch.uint8
        seen = (tensor[0] > 0.5).float(), ((tensor[0] < 0.5) & (tensor[0] > black)).float()
        counts = [8 * 8 * F.avg_pool2d(part[None], 8)[0] for part in seen]
        assert torch.equal(labels == 255, sum(counts) == 0)
        assert bool((labels[counts[0] > counts[1]] == 2).all())
        assert bool((labels[counts[1] > counts[0]] == 1).all())


def test_walk_is_that_of_the_specification(fresh: Any) -> None:
    size = (45, 75)
    network, image, planes = fresh().train(), picture(*size), drawn(2, *size)
    settings = PsaSettings.from_preset("official")
    found = psa.walk(network, image, planes, settings)
    assert found.shape == (3, *size)
    with torch.no_grad():
        features = network.eval()(network.preprocessing(image)[None])[0]
    pairs = walk_affinities(features[None], settings.radius)
    sources = pooled(torch.cat([torch.full((1, *size), 0.39), planes]))[None]
    walked = affinity_walk(sources, pairs, beta=settings.beta, exponent=settings.exponent)
    full = F.interpolate(walked, scale_factor=8, mode="bilinear", align_corners=False)[0]
    expected = full[:, : size[0], : size[1]]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    close = psa.walk(network, image, planes, settings.model_copy(update={"tolerance": 1e-6}))
    torch.testing.assert_close(close, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [(32, 90), (90, 64)])
def test_grids_too_small_for_the_walk_are_left(
    fresh: Any, size: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    planes = drawn(2, *size)
    found = psa.walk(fresh(), picture(*size), planes, PsaSettings.from_preset("official"))
    assert torch.equal(found[1:], planes)
    assert bool((found[0] == torch.tensor(0.39)).all())
    assert f"{size[0]} x {size[1]} pixels is too small" in caplog.text


def test_walk_of_what_is_not_finite(fresh: Any) -> None:
    network, image = fresh(), picture(40, 72)
    with pytest.raises(DataError, match="without NaN"):
        psa.walk(network, image, drawn(1, 40, 72) * math.nan, SETTINGS)
    network.last.weight.data.fill_(math.nan)
    with pytest.raises(DataError, match=r"affinities at the offset .* hold NaN"):
        psa.walk(network, image, drawn(1, 40, 72), SETTINGS)
