"""MCTformer: losses, schedule, augmentation, training, maps, LPCAM in PatchCAM's place."""

from __future__ import annotations

import math
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.classifiers.classifier import Preprocessing
from lpcam.data.dataset import ClassTable, Item
from lpcam.data.folder import read_folder
from lpcam.hosts import mctformer
from lpcam.hosts.base import HostData
from lpcam.hosts.mctformer import (
    learning_rate,
    local_features,
    maps_of,
    mctformer_loss,
    token_contrast,
)
from lpcam.hosts.mctformer_network import Mctformer, MctformerSettings, Scores, build_mctformer
from lpcam.method.functional import cosine_activation, normalize
from lpcam.method.prototypes import make_prototypes
from lpcam.method.reservoir import Reservoir, collect
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.errors import ArtefactError, ClassifierError, DataError
from lpcam.training import loop as engine

CLASSES = ("blue", "green", "red")
SETTINGS = MctformerSettings.from_preset(
    "default",
    fusion="product",
    affinity=True,
    crop=48,
    epochs=2,
    batch_size=3,
    warmup_epochs=0,
    learning_rate=1e-3,
)
OFFICIAL = MctformerSettings.from_preset("official")
PLUS = MctformerSettings.from_preset("plus", crop=48)
RAW = Preprocessing((0.5,) * 3, (0.5,) * 3)


def fresh(settings: MctformerSettings = SETTINGS, seed: int = 1) -> Mctformer:
    return build_mctformer(
        "test_vit", CLASSES, settings, arguments={"depth": 3}, weights="random", seed=seed
    )


def photograph(height: int = 53, width: int = 70, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def changed(**changes: Any) -> MctformerSettings:
    return SETTINGS.model_copy(update=changes)


def train_mctformer(
    network: Mctformer, items: list[Item], held_out: list[Item], *options: Any, **more: Any
) -> Any:
    data = HostData(items, held_out, [], ClassTable(CLASSES, (1, 2, 3)))
    return mctformer.HOST.train(network, data, *options, **more)


@pytest.fixture
def items(pictures: Path) -> list[Item]:
    return list(read_folder(pictures).items.values())


def test_loss_adds_the_two_scores() -> None:
    classes, patches = drawn(4, 3), drawn(4, 3, seed=1)
    labels = (drawn(4, 3, seed=2) > 0).float()

    def margin(logits: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels)

    torch.testing.assert_close(mctformer_loss(Scores(classes, None), labels), margin(classes))
    torch.testing.assert_close(
        mctformer_loss(Scores(classes, patches), labels), margin(classes) + margin(patches)
    )


def test_contrast_is_least_where_tokens_point_apart() -> None:
    same = token_contrast(torch.ones(2, 4, 6))
    assert float(same) == pytest.approx(math.log(4))
    apart = token_contrast(torch.eye(4, 6).expand(2, 4, 6) * 9.0)
    assert float(apart) == pytest.approx(-math.log(math.e / (math.e + 3)))
    assert apart < same


def test_learning_rates_of_the_specification() -> None:
    assert learning_rate(0, OFFICIAL) == 1e-6
    assert learning_rate(4, OFFICIAL) == pytest.approx(1e-6 + 0.8 * (6.25e-5 - 1e-6))
    assert learning_rate(30, OFFICIAL) == pytest.approx((6.25e-5 + 1e-5) / 2)
    assert 1e-5 < learning_rate(59, OFFICIAL) < 1.01e-5
    rates = [learning_rate(epoch, OFFICIAL) for epoch in range(5, 60)]
    assert rates == sorted(rates, reverse=True)
    assert OFFICIAL.learning_rate == pytest.approx(5e-4 * OFFICIAL.batch_size / 512)


def augmented(
    items: list[Item], epoch: int = 0, sample: int = 0, seed: int = 7, **changes: Any
) -> Tensor:
    settings = changed(**{"augmentation": "rand-m9-mstd0.5-inc1", "erasing": 0.5, **changes})
    make = mctformer._Augment(items, RAW, settings, seed)
    return make(engine.Place(epoch, sample, 99))[0]


def test_augmentation_depends_on_seed_epoch_and_image_alone(items: list[Item]) -> None:
    first = augmented(items)
    assert first.shape == (3, 48, 48)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    assert torch.equal(augmented(items), first)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.random.get_rng_state(), states[2])
    for other in ({"epoch": 1}, {"sample": 1}, {"seed": 8}):
        assert not torch.equal(augmented(items, **other), first)


def test_augmentation_in_threads_is_that_of_one(items: list[Item]) -> None:
    expected = [augmented(items, epoch) for epoch in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda epoch: augmented(items, epoch), range(12)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_augmentation_is_handed_to_other_processes(items: list[Item]) -> None:
    make = mctformer._Augment(items, RAW, changed(augmentation="rand-m9-inc1"), 0)
    again = pickle.loads(pickle.dumps(make))
    place = engine.Place(0, 0, 0)
    assert torch.equal(make(place)[0], again(place)[0])


def test_what_the_settings_of_the_augmentation_do(items: list[Item]) -> None:
    plain = augmented(items, augmentation=None, erasing=0.0)
    assert -1 <= float(plain.min()) < float(plain.max()) <= 1
    erased = augmented(items, augmentation=None, erasing=1.0)
    changed_pixels = (erased != plain).any(0)
    assert 0.01 < float(changed_pixels.float().mean()) < 0.5
    assert float(erased.max()) > 1  # noise of a normal distribution
    policy = augmented(items, augmentation="rand-m9-n9-p1", erasing=0.0)
    assert float((policy != plain).any(0).float().mean()) > 0.9
    with pytest.raises(ClassifierError, match="does not know the augmentation 'rnd-m9'"):
        augmented(items, augmentation="rnd-m9")


def test_loss_falls(items: list[Item], tmp_path: Path) -> None:
    settings = changed(epochs=12, batch_size=6, learning_rate=2e-3)
    history = train_mctformer(fresh(), items, items, settings, seed=0, folder=tmp_path)
    assert [record["epoch"] for record in history] == list(range(1, 13))
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[-1]["validation_map"] > 0.6


def test_contrast_and_ranked_pooling_train(items: list[Item], tmp_path: Path) -> None:
    settings = PLUS.model_copy(update={"epochs": 1, "batch_size": 6, "warmup_epochs": 0})
    network = fresh(settings)
    history = train_mctformer(network, items, [], settings, seed=0, folder=tmp_path / "plus")
    assert history[0]["validation_map"] is None
    without = settings.model_copy(update={"contrast": 0.0})
    other = train_mctformer(fresh(without), items, [], without, seed=0, folder=tmp_path / "none")
    assert history[0]["loss"] > other[0]["loss"] + 0.5  # log 3 at equal tokens


def test_bad_input(items: list[Item], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image to train MCTformer on"):
        train_mctformer(fresh(), [], [], SETTINGS, seed=0, folder=tmp_path)
    with pytest.raises(ClassifierError, match="version is v1, but the network was built as v2"):
        train_mctformer(fresh(), items, [], changed(version="v1"), seed=0, folder=tmp_path)
    one = changed(epochs=1, batch_size=12)
    train_mctformer(fresh(), items, [], one, seed=0, folder=tmp_path)
    v1 = one.model_copy(update={"version": "v1"})
    with pytest.raises(ArtefactError, match=r"^the checkpoint .* does not fit .*; delete it"):
        train_mctformer(fresh(v1), items, [], v1, seed=0, folder=tmp_path)


@torch.no_grad()
def by_hand(
    network: Mctformer, image: np.ndarray, label: int, size: tuple[int, int], **options: Any
) -> Tensor:
    """One class's map, pass by pass, at scale 1."""
    total = torch.zeros(size)
    for turned in (image, image[:, ::-1]):
        tensor = network.preprocessing(np.ascontiguousarray(turned))[None]
        view = network.attend(tensor, SETTINGS.attention_blocks)
        activation = view.patch_cam[0, label].relu() if view.patch_cam is not None else 1.0
        if "vector" in options:
            unit = F.normalize(view.features[0], dim=0)
            activation = torch.einsum("chw,c->hw", unit, options["vector"]).relu()
            activation = activation / activation.max()
        fused = view.class_attention[0, label] * activation
        refined = fused
        if options.get("affinity", True):
            refined = (view.patch_affinity[0] @ fused.flatten()).reshape(fused.shape)
        large = F.interpolate(refined[None, None], size=size, mode="bilinear")[0, 0]
        total += large if turned is image else large.flip(1)
    return (total - total.min()) / (total.max() - total.min() + 1e-8)


@pytest.mark.parametrize("size", [(53, 70), (32, 48), (7, 90)])
@pytest.mark.parametrize(("version", "affinity"), [("v1", True), ("v2", True), ("v2", False)])
def test_maps_pass_by_pass(size: tuple[int, int], version: str, affinity: bool) -> None:
    settings = changed(version=version, affinity=affinity)
    network, image = fresh(settings), photograph(*size)
    # the affinity of random weights leaves maps nearly flat: rounding is stretched with them
    bound = 5e-4 if affinity else 1e-5
    found = maps_of(network, image, [2, 0], settings)
    assert found.high_res.shape == (2, *size)
    assert found.cam.shape == (2, -(-size[0] // 4), -(-size[1] // 4))
    for plane, label in enumerate([2, 0]):
        expected = by_hand(network, image, label, size, affinity=affinity)
        torch.testing.assert_close(found.high_res[plane], expected, atol=bound, rtol=0)
        quarter = found.cam.shape[1:]
        expected = by_hand(network, image, label, quarter, affinity=affinity)
        torch.testing.assert_close(found.cam[plane], expected, atol=bound, rtol=0)


def test_maps_of_a_mirrored_image_are_mirrored() -> None:
    network, image = fresh(), photograph(48, 64)
    found = maps_of(network, image, [1], SETTINGS).high_res
    mirrored = maps_of(network, image[:, ::-1], [1], SETTINGS).high_res
    torch.testing.assert_close(mirrored.flip(-1), found, atol=1e-4, rtol=0)
    once = changed(flip=False)
    single = maps_of(network, image, [1], once).high_res
    assert not torch.allclose(
        maps_of(network, image[:, ::-1], [1], once).high_res.flip(-1), single, atol=1e-2
    )


def test_scales_are_summed_with_the_fusion_of_mctformer_plus() -> None:
    network, image = fresh(PLUS), photograph(64, 80)
    found = maps_of(network, image, [0, 1], PLUS)
    assert found.high_res.shape == (2, 64, 80)
    assert float(found.high_res.min()) >= 0 and float(found.high_res.max()) <= 1
    views = mctformer._views(network, image, PLUS.scales, PLUS)
    assert [tuple(view.features.shape[-2:]) for view in views] == [(4, 5), (3, 3), (5, 6)]
    product = PLUS.model_copy(update={"fusion": "product"})
    assert not torch.allclose(maps_of(network, image, [0, 1], product).cam, found.cam, atol=1e-2)


def test_no_label_no_map() -> None:
    found = maps_of(fresh(), photograph(), [], SETTINGS)
    assert found.cam.shape == (0, 14, 18) and found.high_res.shape == (0, 53, 70)
    features, split = local_features(fresh(), photograph(), [], SETTINGS)
    assert features.shape == (64, 3, 4) and split.shape == (0, 3, 4)


def test_labels_and_weights_that_make_no_maps() -> None:
    network = fresh()
    with pytest.raises(ValueError, match=r"expected vectors \(3, 64\), got \(2, 64\)"):
        maps_of(network, photograph(), [0], SETTINGS, vectors=drawn(2, 64))
    with pytest.raises(ClassifierError, match="gave NaN or Inf for this image"):
        maps_of(network, photograph(), [0], SETTINGS, vectors=torch.full((3, 64), torch.nan))
    with pytest.raises(ClassifierError, match=r"attention_blocks 9 is more than the \d+ blocks"):
        maps_of(network, photograph(), [0], changed(attention_blocks=9))
    for damaged in (network.cls_token, network.head.weight):
        before = damaged.detach().clone()
        with torch.no_grad():
            damaged.view(-1)[0] = torch.nan
        with pytest.raises(ClassifierError, match="gave NaN or Inf for this image"):
            maps_of(network, photograph(), [0], SETTINGS)
        with torch.no_grad():
            damaged.copy_(before)
    assert float(maps_of(network, photograph(), [0], SETTINGS).cam.max()) > 0


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_lpcam_pass_by_pass(version: str) -> None:
    settings = changed(version=version)
    network, image, vectors = fresh(settings), photograph(), drawn(3, 64)
    found = maps_of(network, image, [2, 1], settings, vectors=vectors)
    for plane, label in enumerate([2, 1]):
        expected = by_hand(network, image, label, (53, 70), vector=vectors[label])
        torch.testing.assert_close(found.high_res[plane], expected, atol=1e-4, rtol=0)
    # a vector's length does not count
    longer = maps_of(network, image, [2, 1], settings, vectors=5 * vectors)
    torch.testing.assert_close(longer.high_res, found.high_res, atol=1e-3, rtol=0)


def test_split_map_is_the_refined_map_on_the_grid() -> None:
    network, image = fresh(), photograph()
    features, split = local_features(network, image, [2, 0], SETTINGS)
    assert features.shape == (64, 3, 4) and bool((features < 0).any())
    with torch.no_grad():
        view = network.attend(network.preprocessing(image)[None], 3)
    torch.testing.assert_close(features, view.features[0], atol=1e-5, rtol=0)
    for plane, label in enumerate([2, 0]):
        expected = by_hand(network, image, label, (3, 4))
        torch.testing.assert_close(split[plane], expected, atol=1e-4, rtol=0)


def test_split_map_of_patch_cam() -> None:
    settings = changed(split_maps="patch", flip=False)
    network, image = fresh(), photograph()
    features, split = local_features(network, image, [1], settings)
    assert network.head is not None
    with torch.no_grad():
        cam = network.head(features[None])[0, 1].relu()
    torch.testing.assert_close(split[0], cam / cam.max(), atol=1e-5, rtol=0)
    v1 = settings.model_copy(update={"version": "v1"})
    with pytest.raises(ClassifierError, match="no PatchCAM that could split"):
        local_features(fresh(v1), image, [1], v1)


def test_features_are_of_scale_1_whatever_the_scales() -> None:
    network, image = fresh(), photograph()
    expected, _ = local_features(network, image, [1], SETTINGS)
    for scales in ((0.5, 2.0), (0.75, 1.0, 1.25)):
        features, split = local_features(network, image, [1], changed(scales=scales))
        torch.testing.assert_close(features, expected)
        assert split.shape == (1, 3, 4) and 0.99 < float(split.max()) <= 1


def test_prototypes_of_signed_features() -> None:
    """Split, clustering, evaluator with bias, selection and equation 6 on features of any sign."""
    network = fresh()
    settings = LpcamSettings.from_preset(
        "voc12.official", clusters=3, tau=0.39, mu_f=0.34, scales=(1.0,)
    )
    reservoir = Reservoir(None, seed=0)
    for seed in range(4):
        image = photograph(64, 80, seed=seed)
        features, split = local_features(network, image, [0, 1, 2], SETTINGS)
        collect(reservoir, features, [0, 1, 2], split, settings, f"image {seed}")
        assert bool((features < 0).any()) and bool((split > 0.39).any())
    weight, bias = network.constant_response()
    made = make_prototypes(
        reservoir, weight, CLASSES, settings, seed=0, bias=bias, fingerprint=network.fingerprint()
    )
    centers = made.foreground.centers[1]
    assert bool((centers < 0).any())
    expected = (centers @ weight.T + bias).softmax(1)[:, 1]
    torch.testing.assert_close(made.foreground.scores[1], expected)
    for vectors in (made.vectors(), made.vectors(with_context=False)):
        activation = cosine_activation(features, vectors)
        assert bool((activation < 0).any())  # hence the ReLU, with an empty context too
        found = maps_of(network, image, [0, 1, 2], SETTINGS, vectors=vectors)
        assert bool(torch.isfinite(found.high_res).all())
        assert float(found.high_res.min()) >= 0 and float(found.high_res.max()) <= 1
    none = normalize(cosine_activation(-features, features.mean((1, 2))[None]).relu(), "max")
    assert bool(torch.isfinite(none).all())
