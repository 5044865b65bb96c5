"""Prototypes of early layers: evidence, fusion, rounds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lpcam.classifiers.features import FeaturePair
from lpcam.method.early import (
    EarlyImage,
    EarlyPrototypes,
    candidates,
    centred,
    evidence,
    fit_early,
    fuse,
    mean_features,
)
from lpcam.method.functional import unit
from lpcam.method.settings import EarlySettings
from lpcam.runtime.errors import ArtefactError, PrototypeError
from lpcam.runtime.files import write_tensors

E1, E2 = torch.eye(2)
MISSING = torch.zeros(2)
SETTINGS = EarlySettings(clusters=2, nearest=1, places=200)
SIZE = (24, 32)  #: Of the images of :func:`scene`.


def prototypes(foreground: Tensor, context: Tensor, **values: Any) -> EarlyPrototypes:
    """Of one layer and one class."""
    sides = (foreground[None],), (context[None],)
    made = EarlyPrototypes(("a",), ("x",), (torch.zeros(2),), *sides, nearest=1)
    return replace(made, **values)


def scene(number: int, classes: tuple[int, ...] = (0,)) -> tuple[EarlyImage, Tensor]:
    """A textured square on a ground, with a base map that is blurred; its mask."""
    generator = torch.Generator().manual_seed(number)
    left = 4 + number % 8
    inside = torch.zeros(SIZE, dtype=torch.bool)
    inside[6:18, left : left + 14] = True
    texture = {0: torch.tensor([3.0, 0.0, 0.0]), 1: torch.tensor([0.0, 3.0, 0.0])}[classes[0]]
    fine = torch.where(inside, texture[:, None, None], torch.tensor([0.0, 0.0, 3.0])[:, None, None])
    fine = fine + 0.3 * torch.randn(3, *SIZE, generator=generator)
    coarse = torch.nn.functional.avg_pool2d(fine, 2)
    wide = torch.nn.functional.max_pool2d(inside[None].float(), 7, 1, 3)
    base = torch.nn.functional.avg_pool2d(wide, 7, 1, 3, count_include_pad=False)
    image = EarlyImage(classes, [fine, coarse], {"LPCAM": base, "CAM": base}, torch.empty(0))
    return image, inside


def fitted(
    images: list[EarlyImage], settings: EarlySettings = SETTINGS, **options: Any
) -> list[EarlyPrototypes]:
    return fit_early(images, ("a", "b"), ("x", "y"), settings, seed=0, base="LPCAM", **options)


def test_evidence_by_hand() -> None:
    places = torch.stack([E1, E2], dim=1)[:, None]  # (2, 1, 2)
    oblique = torch.tensor([0.6, 0.8])
    foreground = torch.stack([torch.stack([E1, oblique]), torch.stack([E2, MISSING])])
    context = torch.stack([torch.stack([E2, MISSING]), torch.stack([MISSING, MISSING])])
    one = evidence(places, foreground, context, 1)
    torch.testing.assert_close(one, torch.tensor([[[1.0, 0.8 - 1]], [[0.0, 1.0]]]))
    # the mean of two, of those that there are, and of no more than there are
    expected = torch.tensor([[[0.8, 0.4 - 1]], [[0.0, 1.0]]])
    for nearest in (2, 9):
        torch.testing.assert_close(evidence(places, foreground, context, nearest), expected)
    batch = evidence(torch.stack([places, places]), foreground, context, 1)
    torch.testing.assert_close(batch, torch.stack([one, one]))


def test_a_cosine_below_zero_is_not_missing() -> None:
    away = -E1[None, None]
    assert evidence(E1[:, None, None], away, torch.zeros(1, 1, 2), 1).tolist() == [[[-1.0]]]


def test_fusion_by_hand() -> None:
    base, combined = torch.tensor([[[1.0, 0.5]]]), torch.tensor([[[-2.0, 2.0]]])
    assert torch.equal(fuse(base, combined, "none"), base)
    assert fuse(base, combined, "alone").tolist() == [[[0.0, 1.0]]]
    # a deviation of 2, so the sigmoid is that of -1 and of 1
    low, high = 1 / (1 + math.e), 0.5 / (1 + 1 / math.e)
    torch.testing.assert_close(fuse(base, combined, "fused"), torch.tensor([[[low / high, 1.0]]]))
    assert torch.equal(fuse(base, torch.zeros(1, 1, 2), "fused"), base)  # says nothing
    # a class without positive evidence does not vanish
    both, evidence_of = torch.cat([base, base]), torch.cat([combined, combined - 3])
    low, high = 1 / (1 + math.exp(2.5)), 0.5 / (1 + math.exp(0.5))
    expected = torch.tensor([[[0.0, 1.0]], [[low / high, 1.0]]])
    torch.testing.assert_close(fuse(both, evidence_of, "alone"), expected)


@pytest.mark.parametrize("fusion", ["none", "fused", "alone"])
def test_a_class_without_a_base_has_no_map(fusion: str) -> None:
    combined = torch.tensor([[[-2.0, 2.0]]])
    assert not fuse(torch.zeros(1, 1, 2), combined, fusion).any()


def test_layers_are_standardised_at_the_size_of_the_map_and_mirrors_averaged() -> None:
    own = prototypes(E1[None], E2[None])
    features = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 1.0]]])  # E1, E2, E2
    plain = own.combined([FeaturePair(features, None)], [0], (1, 3))
    z = torch.tensor([[[1.0, -1.0, -1.0]]])
    torch.testing.assert_close(plain, z / z.std(unbiased=False))
    same = own.combined([FeaturePair(features, features.flip(-1))], [0], (1, 3))
    torch.testing.assert_close(same, plain)
    other = own.combined([FeaturePair(features, features)], [0], (1, 3))
    assert other[0, 0, 0] == other[0, 0, 2]  # the mean of the map and of the map turned back
    two = replace(own, **{k: 2 * getattr(own, k) for k in ("means", "foreground", "context")})
    both = two.combined([FeaturePair(features, None), FeaturePair(9 * features, None)], [0], (1, 3))
    torch.testing.assert_close(both, 2 * plain)  # every layer counts alike
    assert own.combined([FeaturePair(features, None)], [0], (5, 7)).shape == (1, 5, 7)


def test_maps_of_no_class_and_without_fusion() -> None:
    own = prototypes(E1[None], E2[None], fusion="fused")
    assert own.maps(torch.zeros(0, 4, 6), [], []).shape == (0, 4, 6)
    base = torch.rand(1, 4, 6)
    assert replace(own, fusion="none").maps(base, [], [0]) is base


def test_the_mean_is_over_all_places_of_all_images() -> None:
    images = [
        EarlyImage((0,), [torch.full((1, 1, 3), 1.0)], {}, torch.empty(0)),
        EarlyImage((), [torch.full((1, 1, 1), 5.0)], {}, torch.empty(0)),
    ]
    assert mean_features(images)[0].tolist() == [2.0]


def test_the_early_layers_have_sharp_edges() -> None:
    """Those of the square, which the base does not have."""
    found = replace(fitted([scene(number)[0] for number in range(6)])[-1], fusion="alone")
    for image, inside in (scene(8), scene(10)):
        base = image.bases["LPCAM"]
        maps = found.maps(base, [FeaturePair(one, None) for one in image.layers], [0])
        assert maps.max() == 1
        for threshold in (0.2, 0.5):
            masks = maps[0] > threshold, base[0] > threshold
            sharp, blurred = (float((m & inside).sum() / (m | inside).sum()) for m in masks)
            assert sharp > 0.95
            assert blurred < 0.85


def test_centres_of_a_class_that_is_nowhere_are_missing() -> None:
    (first, *_) = fitted([scene(0)[0], scene(1)[0]])
    assert [tuple(one.shape) for one in (*first.foreground, *first.context)] == [(2, 2, 3)] * 4
    for side in (*first.foreground, *first.context):
        torch.testing.assert_close(side[0].norm(dim=1), torch.ones(2))
        assert not side[1].any()


def test_fewer_places_than_clusters_leave_centres_missing() -> None:
    many = fitted([scene(0)[0]], SETTINGS.model_copy(update={"clusters": 50, "places": 3}))[0]
    assert many.foreground[0][0].any(1).sum() == 3


def test_sides_follow_the_base() -> None:
    """Foreground is above a share of the largest value, context below a value in every map."""
    image = EarlyImage(
        (0, 1),
        [torch.tensor([[[5.0, 0.0, 0.0, 0.0]], [[0.0, 5.0, 0.0, 0.0]], [[0.0, 0.0, 5.0, 5.0]]])],
        {"LPCAM": torch.tensor([[[0.9, 0.2, 0.1, 0.5]], [[0.1, 0.8, 0.3, 0.0]]])},
        torch.empty(0),
    )
    settings = EarlySettings(clusters=1, nearest=1, foreground=0.6, context=0.35, rounds=1)
    (found,) = fit_early([image], ("a", "b"), ("x",), settings, seed=0, base="LPCAM")
    (mean,) = found.means
    places = centred(image.layers[0], mean)[:, 0].T
    torch.testing.assert_close(found.foreground[0][:, 0], places[:2])
    torch.testing.assert_close(found.context[0][:, 0], unit(places[2:3].expand(2, -1), dim=1))


def test_rounds_continue_each_other() -> None:
    images = [scene(number, (number % 2,))[0] for number in range(6)]
    two, three = (
        fitted(images, SETTINGS.model_copy(update={"rounds": rounds})) for rounds in (2, 3)
    )
    assert [len(two), len(three)] == [2, 3]
    for one, other in zip(two, three, strict=False):
        for name, values in one.tensors().items():
            assert torch.equal(values, other.tensors()[name])
    assert [one.made_by["round"] for one in three] == [1, 2, 3]
    assert not torch.equal(two[0].foreground[0], two[1].foreground[0])


def test_the_number_of_workers_changes_nothing() -> None:
    images = [scene(number, (number % 2,))[0] for number in range(6)]
    one, four = (fitted(images, workers=workers)[-1] for workers in (1, 4))
    for name, values in one.tensors().items():
        assert torch.equal(values, four.tensors()[name])
    other = fit_early(images, ("a", "b"), ("x", "y"), SETTINGS, seed=1, base="LPCAM")[-1]
    assert not torch.equal(one.foreground[0], other.foreground[0])


def test_the_base_may_have_the_size_of_the_layer_already() -> None:
    """Its mean over each cell is what counts."""
    pooled, whole = (scene(0)[0] for _ in range(2))
    big = torch.nn.functional.interpolate(whole.bases["LPCAM"][None], scale_factor=3)[0]
    whole = whole._replace(bases={"LPCAM": big})
    for one, other in zip(
        fitted([pooled])[-1].foreground, fitted([whole])[-1].foreground, strict=True
    ):
        torch.testing.assert_close(one, other)


def test_images_without_labels_have_nothing_to_learn_from() -> None:
    with pytest.raises(PrototypeError, match="label"):
        fitted([scene(0)[0]._replace(classes=())])


def test_ways_come_from_the_simplest() -> None:
    images = [scene(number)[0] for number in range(2)]
    rounds = {
        base: fit_early(images, "a", ("x", "y"), SETTINGS, seed=0, base=base)
        for base in ("LPCAM", "CAM")
    }
    found = candidates(rounds)
    assert [(way.base, way.fusion) for way in found] == [
        ("LPCAM", "none"),
        ("CAM", "none"),
        *((base, how) for base in ("LPCAM", "CAM") for how in ("fused", "alone")),
    ]
    for way in found:
        assert torch.equal(way.foreground[0], rounds[way.base][-1].foreground[0])


def test_a_file_gives_them_back_or_is_refused(tmp_path: Path) -> None:
    own = replace(fitted([scene(0)[0]], fingerprint="f")[-1], fusion="alone")
    path = tmp_path / "early.safetensors"
    own.save(path)
    back = EarlyPrototypes.load(path, fingerprint="f")
    assert back.described() == own.described()
    for name, values in own.tensors().items():
        assert torch.equal(values, back.tensors()[name])
    with pytest.raises(PrototypeError, match="other"):
        EarlyPrototypes.load(path, fingerprint="other")
    write_tensors(path, own.tensors(), {"kind": "prototypes"})
    with pytest.raises(ArtefactError, match=path.name):
        EarlyPrototypes.load(path, fingerprint="f")
