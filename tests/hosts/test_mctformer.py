"""MCTformer: losses, schedule, augmentation, maps, LPCAM in PatchCAM's place."""

from __future__ import annotations

import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hosts.common import CLASSES, build_host, drawn, map_image, photograph
from torch import Tensor

from lpcam.classifiers.classifier import Preprocessing
from lpcam.data.dataset import Item
from lpcam.hosts import mctformer
from lpcam.hosts.base import HostData, View
from lpcam.hosts.mctformer import HOST, learning_rate
from lpcam.hosts.mctformer_network import Mctformer, MctformerSettings, Scores
from lpcam.method.functional import cosine_activation
from lpcam.method.prototypes import make_prototypes
from lpcam.method.reservoir import Reservoir, collect
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.errors import ClassifierError
from lpcam.training import loop as engine

SETTINGS = MctformerSettings.from_preset("default", fusion="product", affinity=True, crop=48)
OFFICIAL = MctformerSettings.from_preset("official")
RAW = Preprocessing((0.5,) * 3, (0.5,) * 3)


def fresh(settings: MctformerSettings = SETTINGS) -> Mctformer:
    network: Mctformer = build_host("mctformer", "random", settings, seed=1)
    return network


maps_of = partial(map_image, "mctformer")


def local_features(
    network: Mctformer, image: np.ndarray, labels: list[int], settings: MctformerSettings
) -> tuple[Tensor, Tensor]:
    return HOST.local_features(network, View(image, tuple(labels), None), settings)


def changed(**changes: Any) -> MctformerSettings:
    return SETTINGS.model_copy(update=changes)


def test_loss_adds_both_scores() -> None:
    classes, patches = drawn(4, 3), drawn(4, 3, seed=1)
    labels = (drawn(4, 3, seed=2) > 0).float()
    margins = [F.binary_cross_entropy_with_logits(one, labels) for one in (classes, patches)]
    torch.testing.assert_close(mctformer._loss(Scores(classes, None), labels), margins[0])
    torch.testing.assert_close(mctformer._loss(Scores(classes, patches), labels), sum(margins))


def test_learning_rates_of_the_specification() -> None:
    first = [1e-6, 1e-6, 1.33e-5, 2.56e-5, 3.79e-5, 5.02e-5, 6.160555e-5, 6.121523e-5]
    assert [learning_rate(n, OFFICIAL) for n in range(8)] == pytest.approx(first, rel=1e-6)
    assert learning_rate(59, OFFICIAL) == pytest.approx(1.014380e-5, rel=1e-6)
    assert OFFICIAL.learning_rate == pytest.approx(5e-4 * OFFICIAL.batch_size / 512)


def augmented(
    items: list[Item], epoch: int = 0, sample: int = 0, seed: int = 7, **changes: Any
) -> Tensor:
    settings = changed(**{"augmentation": "rand-m9-mstd0.5-inc1", "erasing": 0.5, **changes})
    transform = mctformer._transform(RAW, settings)
    return mctformer._sample(items, transform, seed, engine.Place(epoch, sample, 99))[0]


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
    transform = mctformer._transform(RAW, changed(augmentation="rand-m9-inc1"))
    make = partial(mctformer._sample, items, transform, 0)
    place = engine.Place(0, 0, 0)
    assert torch.equal(make(place)[0], pickle.loads(pickle.dumps(make))(place)[0])


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


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (3, 3)])
def test_optimiser_of_the_specification(
    items: list[Item], count: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(
        _: Any, optimizer: Any, samples: Any, count: int, loss: Any, plan: Any, **__: Any
    ) -> Any:
        assert (plan.batch, plan.record, plan.steps) == (
            batch,
            count // batch,
            6 * (count // batch),
        )
        assert plan.rate(2 * plan.record - 1) == plan.rate(0) != plan.rate(2 * plan.record)
        return optimizer.param_groups

    monkeypatch.setattr(engine, "run", run)
    data, settings = HostData(items[:count], [], [], CLASSES), changed(batch_size=4)
    network = fresh()
    groups = HOST.train(network, data, settings, seed=0, folder=Path())
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert all(group["betas"] == (0.9, 0.999) for group in groups)
    names = {id(p): name for name, p in network.named_parameters()}
    decay, none = ({names[id(p)] for p in group["params"]} for group in groups)
    assert {"head.weight", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= decay
    assert {"cls_token", "pos_embed", "head.bias", "blocks.2.norm1.weight"} <= none
    assert set(names.values()) - decay - none == {"norm.weight", "norm.bias"}


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


@pytest.mark.parametrize(
    ("size", "version", "affinity"),
    [((53, 70), "v2", True), ((32, 48), "v1", True), ((7, 90), "v2", False)],
)
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


def test_scales_are_summed_with_either_fusion() -> None:
    settings = changed(fusion="square_root", scales=(1.0, 0.75, 1.25))
    network, image = fresh(), photograph(64, 80)
    found = maps_of(network, image, [0, 1], settings)
    assert found.high_res.shape == (2, 64, 80)
    assert float(found.high_res.min()) >= 0 and float(found.high_res.max()) <= 1
    views = mctformer._views(network, image, settings.scales, settings)
    assert [tuple(view.features.shape[-2:]) for view in views] == [(4, 5), (3, 3), (5, 6)]
    product = settings.model_copy(update={"fusion": "product"})
    assert not torch.allclose(maps_of(network, image, [0, 1], product).cam, found.cam, atol=1e-2)


def test_an_image_without_a_label_has_features_and_no_maps() -> None:
    found = maps_of(fresh(), photograph(), [], SETTINGS)
    assert found.cam.shape == (0, 14, 18) and found.high_res.shape == (0, 53, 70)
    features, split = local_features(fresh(), photograph(), [], SETTINGS)
    assert features.shape == (64, 3, 4) and split.shape == (0, 3, 4)


def test_more_blocks_than_there_are() -> None:
    settings = changed(attention_blocks=9)
    with pytest.raises(ClassifierError, match="attention_blocks 9"):
        maps_of(fresh(), photograph(), [0], settings)
    with pytest.raises(ClassifierError, match="attention_blocks 9"):
        HOST.images_per_step(fresh(), HostData([], [], [], CLASSES), settings)


def test_lpcam_pass_by_pass() -> None:
    network, image, vectors = fresh(), photograph(), drawn(3, 64)
    found = maps_of(network, image, [2, 1], SETTINGS, vectors=vectors)
    for plane, label in enumerate([2, 1]):
        expected = by_hand(network, image, label, (53, 70), vector=vectors[label])
        torch.testing.assert_close(found.high_res[plane], expected, atol=1e-4, rtol=0)
    # a vector's length does not count
    longer = maps_of(network, image, [2, 1], SETTINGS, vectors=5 * vectors)
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
    weight, bias = HOST.scorer(network)
    made = make_prototypes(
        reservoir,
        weight,
        CLASSES.names,
        settings,
        seed=0,
        bias=bias,
        fingerprint=network.fingerprint(),
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
