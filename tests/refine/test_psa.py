"""PSA: scores of two CRFs, labels, network, affinities, loss, training, files and the walk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lpcam.classifiers.classifier import BackboneSpec, Classifier, Preprocessing, build
from lpcam.data.dataset import Item
from lpcam.data.folder import read_folder
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
    write_scores,
)
from lpcam.refine.walk import pair_counts, pair_offsets
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


@pytest.fixture
def labelled(pictures: Path, tmp_path: Path) -> list[tuple[Item, Path]]:
    """The tiny images with certain scores of their masks, which leave a frame unknown."""
    found = []
    for item in read_folder(pictures).items.values():
        assert item.mask is not None
        mask = torch.from_numpy(np.array(Image.open(item.mask))).long()
        planes = [mask == 0, *(mask == label + 1 for label in item.labels)]
        low = torch.stack(planes).float()
        high = low.clone()
        if item.labels:
            high[:, :9], high[1, :9] = 0, 1  # favours a class where low has the background
        path = tmp_path / "scores" / f"{item.id}.npz"
        write_scores(path, low, high)
        found.append((item, path))
    return found


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


def test_without_a_class_the_background_is_certain() -> None:
    image = torch.from_numpy(picture(9, 7))
    found = crf_scores(CRF, image, torch.zeros(0, 9, 7), [12.0])[0]
    assert torch.equal(found, torch.ones(1, 9, 7))


def test_maps_that_are_no_scores() -> None:
    image = torch.from_numpy(picture(9, 7))
    rounded = drawn(1, 9, 7) * 0 + 1.0004
    cut = crf_scores(CRF, image, rounded, [1.0])
    assert torch.equal(cut, crf_scores(CRF, image, torch.ones(1, 9, 7), [1.0]))
    for bad in (1.01, -0.01):
        with pytest.raises(DataError, match=rf"maps reach from .*{bad}.*; divide each by its max"):
            crf_scores(CRF, image, torch.full((1, 9, 7), bad), [1.0])
    with pytest.raises(DataError, match="image and maps differ in size"):
        crf_scores(CRF, image, drawn(1, 9, 8), [1.0])


def test_scores_come_back_from_their_file(tmp_path: Path) -> None:
    path, again = tmp_path / "a" / "one.npz", tmp_path / "two.npz"
    low, high = drawn(3, 6, 5), drawn(3, 6, 5, seed=1)
    for place in (path, again):
        write_scores(place, low, high)
    assert path.read_bytes() == again.read_bytes()
    for found, scores in zip(read_scores(path), (low, high), strict=True):
        assert found.dtype == np.uint8
        torch.testing.assert_close(torch.from_numpy(found) / 255, scores, atol=1 / 509, rtol=0)


def test_files_that_hold_no_scores(tmp_path: Path) -> None:
    path = tmp_path / "scores.npz"
    with pytest.raises(ArtefactError, match=r"cannot read .*scores.npz"):
        read_scores(path)
    write_scores(path, drawn(3, 6, 5), drawn(3, 6, 5))
    whole = path.read_bytes()
    np.savez(tmp_path / "names.npz", low=np.zeros((1, 2, 2), np.uint8))
    np.savez(tmp_path / "shapes.npz", low=np.zeros((1, 2, 2), np.uint8), high=np.zeros(3, np.uint8))
    np.savez(tmp_path / "floats.npz", low=np.zeros((1, 2, 2)), high=np.zeros((1, 2, 2)))
    np.savez(tmp_path / "objects.npz", low=np.array([{}]), high=np.array([{}]))
    contents = [whole[:40], b"", b"PK"] + [
        (tmp_path / f"{name}.npz").read_bytes() for name in ("names", "shapes", "floats", "objects")
    ]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(
            ArtefactError, match=r"scores.npz does not hold the scores of .* refine-labels again"
        ):
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
    assert [(level.channels, level.stride) for level in network.levels] == [
        (8, 8),
        (16, 8),
        (32, 8),
    ]
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


@pytest.mark.parametrize("size", [(1, 1), (8, 9), (33, 64), (70, 41)])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_resnet", {}),
        ("test_vit", {"dynamic_img_size": True, "dynamic_img_pad": True}),
        ("test_efficientnet", {}),
        ("test_convnext", {}),  # drops what is left over of a side
    ],
)
def test_images_of_any_size(name: str, arguments: dict[str, Any], size: tuple[int, int]) -> None:
    network = build_psa(build(BackboneSpec(name, arguments), ("one",), weights="random"))
    with torch.no_grad():
        found = network(drawn(1, 3, *size))
    assert found.shape == (1, network.channels, -(-size[0] // 8), -(-size[1] // 8))
    assert bool(torch.isfinite(found).all())


def test_backbones_without_fitting_maps(classifier: Classifier) -> None:
    plain = Classifier(torch.nn.Conv2d(3, 8, 3, 8), ("one",), RAW)
    with pytest.raises(ClassifierError, match="Conv2d does not give the feature maps between its"):
        build_psa(plain)
    found = [drawn(1, 4, 32, 32), drawn(1, 4, 64, 64)]
    classifier.backbone.forward_intermediates = lambda *_, **__: found
    with pytest.raises(ClassifierError, match=r"maps at strides \[2, 4\]; PSA needs some at 8, 16"):
        Psa(classifier)


@pytest.mark.parametrize("size", [(6, 7), (1, 9), (8, 1), (2, 3), (1, 1)])
def test_distances_of_all_pairs(size: tuple[int, int]) -> None:
    features = drawn(2, 70, *size)  # in two parts
    found = dict(feature_distances(features, 4))
    expected = [o for o in pair_offsets(4) if o[0] < size[0] and abs(o[1]) < size[1]]
    assert list(found) == expected
    for (dy, dx), distance in found.items():
        corner = max(0, -dx)
        for y in range(size[0] - dy):
            for x in range(size[1] - abs(dx)):
                own, partner = (
                    features[:, :, y, x + corner],
                    features[:, :, y + dy, x + corner + dx],
                )
                wanted = (own - partner).abs().mean(1)
                torch.testing.assert_close(distance[:, y, x], wanted)


def test_distances_of_the_pairs_of_the_loss() -> None:
    features = drawn(2, 5, 9, 11)
    whole = dict(feature_distances(features, 4))
    for (dy, dx), distance in feature_distances(features, 4, sources_only=True):
        left = 3 - max(0, -dx)
        torch.testing.assert_close(distance, whole[dy, dx][:, :6, left : left + 5])
    assert not list(feature_distances(features[..., :6], 4, sources_only=True))


@pytest.mark.parametrize("sources_only", [False, True])
def test_gradient_of_the_distances(sources_only: bool) -> None:
    features = drawn(2, 3, 5, 6).double().requires_grad_()

    def total(f: Tensor) -> Tensor:
        pairs = feature_distances(f, 3, sources_only=sources_only)
        return torch.stack([(d.exp() * (n + 1)).sum() for n, (_, d) in enumerate(pairs)]).sum()

    assert torch.autograd.gradcheck(total, (features,))


def loss_by_pairs(features: Tensor, labels: Tensor, radius: int) -> float:
    """The specification's sums, pair by pair."""
    sums, counts = [0.0] * 3, [0] * 3
    reach = radius - 1
    batch, height, width = labels.shape
    for b in range(batch):
        for y in range(height - reach):
            for x in range(reach, width - reach):
                for dy, dx in pair_offsets(radius):
                    first, second = int(labels[b, y, x]), int(labels[b, y + dy, x + dx])
                    if 255 in (first, second):
                        continue
                    gap = (features[b, :, y, x] - features[b, :, y + dy, x + dx]).abs().mean()
                    affinity = math.exp(-float(gap))
                    kind = 2 if first != second else int(first > 0)
                    likelihood = 1 - affinity if kind == 2 else affinity
                    sums[kind] -= math.log(likelihood + 1e-5)
                    counts[kind] += 1
    means = [total / (count + 1e-5) for total, count in zip(sums, counts, strict=True)]
    return means[0] / 4 + means[1] / 4 + means[2] / 2


@pytest.mark.parametrize("values", [(0, 1, 2, 255), (0, 0, 255), (3, 3, 255), (0, 7), (255, 255)])
def test_loss_pair_by_pair(values: tuple[int, ...]) -> None:
    """With kinds of pairs that do not occur, too."""
    features, labels = 3 * drawn(2, 6, 8, 9), drawn_labels(2, 8, 9, values=values)
    found = psa_loss(features, labels, 3)
    assert float(found) == pytest.approx(loss_by_pairs(features, labels, 3), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("size", [(2, 20), (20, 4), (1, 1)])
def test_grids_too_small_for_a_pair(size: tuple[int, int]) -> None:
    features = drawn(2, 6, *size).requires_grad_()
    found = psa_loss(features, drawn_labels(2, *size), 3)
    assert float(found.detach()) == 0
    assert not torch.autograd.grad(found, features)[0].any()


def test_equal_features_have_a_finite_gradient() -> None:
    features = torch.zeros(1, 6, 8, 8).requires_grad_()
    loss = psa_loss(features, drawn_labels(1, 8, 8), 3)
    (gradient,) = torch.autograd.grad(loss, features)
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(gradient).all())


def test_parts_of_a_batch_add_up() -> None:
    features, labels = 3 * drawn(3, 6, 8, 9), drawn_labels(3, 8, 9)
    counts = pair_counts(labels, 3)
    parts = [psa_loss(features[p], labels[p], 3, counts) for p in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(sum(parts), psa_loss(features, labels, 3))


@pytest.mark.parametrize("size", [(40, 90), (100, 30), (5, 9), (200, 7)])
def test_augmented_labels_stay_on_their_pixels(size: tuple[int, int]) -> None:
    """Light pixels are of the second class, dark ones of the first; black is beyond the image."""
    light = np.zeros(size, bool)
    light[: size[0] // 2, size[1] // 3 :] = True
    image = np.repeat(np.where(light, 200, 100).astype(np.uint8)[:, :, None], 3, axis=2)
    scores = np.stack([np.zeros(size), ~light, light]).astype(np.uint8) * 255
    settings = SETTINGS.model_copy(update={"jitter": (0.0, 0.0, 0.0, 0.0)})
    black = Preprocessing((0.5,) * 3, (0.5,) * 3)(np.zeros((1, 1, 3), np.uint8))[0, 0, 0]
    mirrored = set()
    for seed in range(30):
        tensor, labels = psa.augment(
            image,
            scores,
            scores,
            Preprocessing((0.5,) * 3, (0.5,) * 3),
            settings,
            np.random.default_rng(seed),
        )
        assert tensor.shape == (3, 64, 64)
        assert labels.shape == (8, 8)
        assert labels.dtype == torch.uint8
        seen = (tensor[0] > 0.5).float(), ((tensor[0] < 0.5) & (tensor[0] > black)).float()
        counts = [8 * 8 * F.avg_pool2d(part[None], 8)[0] for part in seen]
        assert torch.equal(labels == 255, sum(counts) == 0)
        assert bool((labels[counts[0] > counts[1]] == 2).all())
        assert bool((labels[counts[1] > counts[0]] == 1).all())
        columns = (tensor[0] > 0.5).nonzero()
        if len(columns) and size[1] < 64:
            inside = (tensor[0] > black).nonzero()[:, 1]
            mirrored.add(bool(columns[:, 1].min() == inside.min()))
    assert mirrored == ({True, False} if 3 <= size[1] < 64 else set())


def test_colours_change_and_labels_do_not() -> None:
    image = np.full((64, 64, 3), 120, np.uint8)
    scores = np.full((1, 64, 64), 255, np.uint8)
    values = set()
    for seed in range(10):
        tensor, labels = psa.augment(
            image, scores, scores, RAW, SETTINGS, np.random.default_rng(seed)
        )
        assert not labels.any()
        values.add(round(float(tensor[0, 0, 0]), 4))
    assert len(values) > 5
    assert all(0.3 * 120 / 255 < value < 2 * 120 / 255 for value in values)


def test_loss_falls(fresh: Any, labelled: list[tuple[Item, Path]], tmp_path: Path) -> None:
    network = fresh()
    settings = SETTINGS.model_copy(
        update={"epochs": 6, "momentum": 0.9, "learning_rate": 0.02, "batch_size": 4}
    )
    before = {k: v.clone() for k, v in network.state_dict().items()}
    history = psa.train_psa(network, labelled, settings, seed=0, folder=tmp_path)
    assert [record["epoch"] for record in history] == list(range(1, 7))
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert not network.training
    moved = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert {"last.weight", "reductions.0.weight", "backbone.layer2.0.conv1.weight"} <= moved
    frozen = ("backbone.conv1", "backbone.layer1.", "backbone.bn1")
    assert not [k for k in moved if k.startswith(frozen) or ".bn" in k]


def test_optimiser_of_the_specification(
    labelled: list[tuple[Item, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The momentum is 5e-4; biases have twice the rate and no decay."""
    seen: list[list[dict[str, Any]]] = []
    step = torch.optim.SGD.step

    def record(self: torch.optim.SGD, *arguments: Any) -> Any:
        seen.append([dict(group) for group in self.param_groups])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", record)
    spec = BackboneSpec("test_convnext", {})
    network = build_psa(build(spec, ("one",), weights="random"))
    settings = PsaSettings.from_preset("official", epochs=1, batch_size=6, crop=72, freeze=[])
    psa.train_psa(network, labelled, settings, seed=0, folder=tmp_path)
    assert len(seen) == 2
    for number, groups in enumerate(seen):
        rate = 0.01 * (1 - number / 2) ** 0.9
        found = {round(g["lr"] / rate, 4): g for g in groups}
        assert set(found) == {1.0, 2.0, 10.0}
        assert all(g["momentum"] == 5e-4 for g in groups)
        decays = {key: g["weight_decay"] for key, g in found.items()}
        assert decays == {1.0: 5e-4, 2.0: 0.0, 10.0: 5e-4}
        assert len(found[10.0]["params"]) == 1 + len(network.levels)


def test_bad_input(fresh: Any, labelled: list[tuple[Item, Path]], tmp_path: Path) -> None:
    def train(given: list[tuple[Item, Path]], settings: PsaSettings = SETTINGS) -> None:
        psa.train_psa(fresh(), given, settings, seed=0, folder=tmp_path / "run")

    lost = [*labelled[:-1], (labelled[-1][0], tmp_path / "none.npz")]
    with pytest.raises(ArtefactError, match=r"none.npz"):
        train(lost)
    other = tmp_path / "other.npz"
    write_scores(other, drawn(2, 30, 9), drawn(2, 30, 9))
    with pytest.raises(DataError, match=r"other.npz 30 x 9"):
        train([(labelled[0][0], other)])
    with pytest.raises(ClassifierError, match="no parameter of the backbone is below 'stem'"):
        train(labelled, SETTINGS.model_copy(update={"freeze": ("stem",)}))
    with pytest.raises(
        ClassifierError, match=r"the loss is .* at step \d of 8; lower refine.psa.learn"
    ):
        train(labelled, SETTINGS.model_copy(update={"learning_rate": 1e30}))


def walked_by_the_dense_matrix(features: Tensor, scores: Tensor, settings: PsaSettings) -> Tensor:
    """The specification: affinities of all pairs, diagonal 1, to the power, columns, squarings."""
    height, width = features.shape[1:]
    cells = [(y, x) for y in range(height) for x in range(width)]
    matrix = torch.eye(len(cells), dtype=torch.float64)
    offsets = set(pair_offsets(settings.radius))
    for i, (y, x) in enumerate(cells):
        for j, (v, u) in enumerate(cells):
            if (v - y, u - x) in offsets:
                gap = (features[:, y, x] - features[:, v, u]).abs().mean()
                matrix[i, j] = matrix[j, i] = math.exp(-float(gap))
    transition = matrix**settings.beta
    transition = transition / transition.sum(0, keepdim=True)
    for _ in range(settings.exponent):
        transition = transition @ transition
    return (scores.double().flatten(1) @ transition).reshape(scores.shape)


@pytest.mark.parametrize("size", [(40, 56), (37, 50), (5, 70)])
def test_walk_is_that_of_the_specification(fresh: Any, size: tuple[int, int]) -> None:
    network, image, planes = fresh().train(), picture(*size), drawn(2, *size)
    settings = PsaSettings.from_preset("official")
    found = psa.walk(network, image, planes, settings)
    assert found.shape == (3, *size)
    with torch.no_grad():
        features = network.eval()(network.preprocessing(image)[None])[0]
    down, right = -size[0] % 8, -size[1] % 8
    constant = torch.full((1, *size), 0.39)
    sources = F.avg_pool2d(F.pad(torch.cat([constant, planes]), (0, right, 0, down)), 8)
    walked = walked_by_the_dense_matrix(features, sources, settings)
    full = F.interpolate(walked[None], scale_factor=8, mode="bilinear", align_corners=False)[0]
    expected = full[:, : size[0], : size[1]].float()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    close = psa.walk(network, image, planes, settings.model_copy(update={"tolerance": 1e-6}))
    torch.testing.assert_close(close, expected, atol=2e-5, rtol=0)


def test_walk_drops_nothing() -> None:
    network = build_psa(build(BackboneSpec("wideresnet38", WIDE), ("one",), weights="random"))
    image, planes = picture(32, 24), drawn(1, 32, 24)
    found = [psa.walk(network.train(mode), image, planes, SETTINGS) for mode in (True, False)]
    assert torch.equal(found[0], found[1])


def test_walk_without_a_class(fresh: Any) -> None:
    found = psa.walk(fresh(), picture(16, 24), torch.zeros(0, 16, 24), SETTINGS)
    torch.testing.assert_close(found, torch.full((1, 16, 24), 0.39))


def test_walk_of_what_does_not_fit(fresh: Any) -> None:
    network, image = fresh(), picture(16, 24)
    with pytest.raises(DataError, match="image and maps differ in size"):
        psa.walk(network, image, drawn(1, 16, 23), SETTINGS)
    with pytest.raises(DataError, match="maps hold NaN"):
        psa.walk(network, image, drawn(1, 16, 24) * math.nan, SETTINGS)
    network.last.weight.data.fill_(math.nan)
    with pytest.raises(DataError, match=r"affinities at the offset .* hold NaN"):
        psa.walk(network, image, drawn(1, 16, 24), SETTINGS)


def test_official_settings_are_those_of_the_specification() -> None:
    """Written down again from section 4."""
    expected = {
        "low_alpha": 1,
        "high_alpha": 12,
        "epochs": 5,
        "batch_size": 8,
        "learning_rate": 0.01,
        "head_multiplier": 10,
        "bias_multiplier": 2,
        "momentum": 5e-4,
        "weight_decay": 5e-4,
        "power": 0.9,
        "freeze": ("conv1a", "b2", "b2_1", "b2_2"),
        "crop": 448,
        "jitter": (0.3, 0.3, 0.3, 0.1),
        "radius": 5,
        "beta": 8,
        "exponent": 6,
        "tolerance": 0,
        "threshold": 0.39,
    }
    found = PsaSettings.from_preset("official").model_dump()
    assert found == {"preset": "official", **expected}
