"""Nearest patches, rules in words, and look-alike classes, by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lpcam.classifiers.features import FeaturePair
from lpcam.data.dataset import Item
from lpcam.data.map_files import MapFile, map_path, write_maps
from lpcam.method.early import EarlyPrototypes
from lpcam.method.prototypes import Centers, Prototypes
from lpcam.method.settings import LpcamSettings
from lpcam.report import prototypes as made
from lpcam.report.prototypes import Early, Fitted, Place, crop, prototype_records
from lpcam.runtime.distributed import Sharing

SETTINGS = LpcamSettings.from_preset("frozen", scales=(1.0,), flip=False, split_maps="single_scale")
SHOWN = {"count": 4, "patches": 3}
SHARING = Sharing(workers=2)


class Head:
    """A classifier of two classes, as far as a report needs one."""

    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])


def test_nearest_places_by_hand() -> None:
    anywhere = torch.ones(2, 1, 2, dtype=torch.bool)
    first = torch.tensor([[[3.0, 1.0]], [[0.0, 1.0]]])  # locations (3, 0) and (1, 1)
    second = torch.tensor([[[0.0, 0.0]], [[0.1, 7.0]]])  # locations (0, 0.1) and (0, 7)
    centers = torch.tensor([[5.0, 0.0], [0.0, 0.5]])
    grids = [("a", first, anywhere), ("b", second, anywhere)]
    found = made.nearest_places(iter(grids), centers, 2)
    half = 0.5**0.5
    assert [[p.image for p in places] for places in found] == [["a", "b"], ["b", "a"]]
    assert [p.cosine for p in found[0]] == pytest.approx([1.0, 0.0])
    assert [p.cosine for p in found[1]] == pytest.approx([1.0, half])
    assert found[0][0][1:4] == pytest.approx((0.5, 0.25, 1.0))
    assert found[1][0].column == pytest.approx(0.25)  # of equal ones the first
    assert [len(places) for places in made.nearest_places(iter(grids), centers, 1)] == [1, 1]

    only_right = torch.tensor([[[False, True]], [[False, False]]])
    places = made.nearest_places(iter([("a", first, only_right)]), centers, 2)
    assert places[0][0].cosine == pytest.approx(half)
    assert places[1] == []


def test_crop_is_square_and_stays_inside() -> None:
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, 50:] = 255
    patch = crop(picture, Place("a", 0.0, 1.0, 0.1, 1.0))  # 5 cells of 4 pixels at a corner
    assert patch.shape == (20, 20, 3)
    assert patch[:, :10].max() == 0 and patch[:, 10:].min() == 255
    assert crop(picture, Place("a", 0.5, 0.5, 1.0, 1.0)).shape == (40, 40, 3)
    large = np.zeros((400, 600, 3), np.uint8)
    assert crop(large, Place("a", 0.5, 0.5, 0.1, 1.0)).shape == (made.PATCH, made.PATCH, 3)


@pytest.mark.parametrize(
    ("side", "score", "kept", "words"),
    [
        ("foreground", 0.95, True, "score 0.95 > μ_f 0.9"),
        ("foreground", 0.31, True, "best score of the class, 0.31; none is above μ_f 0.9"),
        ("context", 0.2, True, "score 0.20 < μ_b 0.5 and above 0.05"),
        ("context", 0.01, False, "score 0.01 is not above 0.05: it looks like another class"),
    ],
)
def test_rules_in_words(side: str, score: float, kept: bool, words: str) -> None:
    settings = LpcamSettings.from_preset("frozen", mu_f=0.9, mu_b=0.5, context_lower=0.05)
    assert made.rule_of(side, score, kept, settings) == words


def centers(sizes: Sequence[int], keep: Sequence[bool]) -> Centers:
    count = len(sizes)
    angles = torch.linspace(0, 1.5, count)
    return Centers(
        torch.stack([angles.cos(), angles.sin()], 1).expand(2, count, 2).clone(),
        torch.linspace(0, 1, count).expand(2, count).clone(),
        torch.tensor([sizes, sizes]),
        torch.tensor([keep, keep]),
    )


def test_which_prototypes_are_shown() -> None:
    some = centers([5, 0, 9, 7, 1, 8], [True, False, True, False, True, False])
    # prototypes by size, then rejected ones
    assert made.shown_numbers(some, 0, 6) == [2, 0, 4, 5, 3]
    assert made.shown_numbers(some, 0, 3) == [2, 0, 5]
    assert made.shown_numbers(centers([3, 2], [True, True]), 0, 3) == [0, 1]
    assert made.shown_numbers(centers([3, 2, 4], [False] * 3), 0, 2) == [2, 0]


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    """Two images of 40 x 40 pixels, the left half of which is brighter."""
    found = []
    for number, labels in enumerate([(0,), (0, 1)]):
        picture = np.full((40, 40, 3), 40 * (number + 1), np.uint8)
        picture[:, :20] += 100
        path = tmp_path / f"{number}.png"
        Image.fromarray(picture).save(path)
        found.append(Item(f"i{number}", path, labels))
    return found


FEATURES = {
    "i0": torch.tensor([[[9.0, 0.0], [9.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]]),
    "i1": torch.tensor([[[2.0, 0.0], [2.0, 0.0]], [[1.0, 3.0], [1.0, 3.0]]]),
}


def pairs(items: Sequence[Item], scales: Sequence[float]) -> Iterator[FeaturePair]:
    for _ in scales:
        yield FeaturePair(torch.stack([FEATURES[item.id] for item in items]), None)


def fitted(**others: Any) -> Fitted:
    found = centers([5, 4], [True, False])
    prototypes = Prototypes(("cow", "dog"), found, found, "f", {})
    return Fitted(Head(), prototypes, pairs, pairs, SETTINGS, Path("cam"))._replace(**others)


def test_prototype_records(items: list[Item]) -> None:
    cow, dog = prototype_records(fitted(), items, SHARING, **SHOWN)
    assert [cow, dog] == prototype_records(fitted(), items, Sharing(), **SHOWN)
    assert [cow["class"], dog["class"]] == [0, 1]
    assert cow["example"]["id"] == "i0"  # of this class alone
    assert dog["example"]["id"] == "i1"
    front, context = cow["sides"]["foreground"], cow["sides"]["context"]
    assert (front["total"], front["kept"]) == (2, 1)
    assert [p["number"] for p in front["prototypes"]] == [0, 1]
    assert [p["kept"] for p in front["prototypes"]] == [True, False]
    # centre 0 is (1, 0): i0's left half is that very direction, and CAM of cow is bright there
    assert [p["image"] for p in front["prototypes"][0]["patches"]] == ["i0", "i1"]
    assert front["prototypes"][0]["patches"][0]["cosine"] == 1.0
    # where CAM of cow is dark lies (0, 1) in both images
    assert [p["cosine"] for p in context["prototypes"][0]["patches"]] == [0.0, 0.0]
    assert front["prototypes"][0]["map"]["shape"] == [2, 2]
    assert front["prototypes"][0]["range"] == [0.0, 1.0]
    assert [p["image"] for p in dog["sides"]["foreground"]["prototypes"][0]["patches"]] == ["i1"]


def test_the_split_is_that_of_the_run(items: list[Item], tmp_path: Path) -> None:
    """With multi_scale the maps on disk say where the foreground is; here it is the right half."""
    settings = SETTINGS.model_copy(update={"split_maps": "multi_scale"})
    for item in items:
        high = np.zeros((len(item.labels), 40, 40), np.float32)
        high[:, :, 20:] = 1
        keys = np.array(item.labels, np.int64)
        write_maps(
            map_path(tmp_path, item.id), MapFile(keys, high[:, ::4, ::4], high), dtype="uint8"
        )
    cow, _ = prototype_records(fitted(settings=settings, cams=tmp_path), items, SHARING, **SHOWN)
    first = cow["sides"]["foreground"]["prototypes"][0]  # direction (1, 0): not on the right
    assert [p["cosine"] for p in first["patches"]] == [0.0, 0.0]
    first = cow["sides"]["context"]["prototypes"][0]
    assert first["patches"][0]["cosine"] == 1.0


def test_a_class_without_images(items: list[Item]) -> None:
    _, dog = prototype_records(fitted(), items[:1], SHARING, **SHOWN)
    assert dog["example"] is None
    first = dog["sides"]["foreground"]["prototypes"][0]
    assert (first["patches"], first["map"]) == ([], None)


def test_a_class_without_prototypes(items: list[Item]) -> None:
    empty = Centers(
        torch.zeros(2, 2, 2),
        torch.full((2, 2), torch.nan),
        torch.zeros(2, 2).long(),
        torch.zeros(2, 2, dtype=torch.bool),
    )
    none = Prototypes(("cow", "dog"), empty, empty, "f", {})
    cow, _ = prototype_records(fitted(prototypes=none), items, SHARING, **SHOWN)
    assert cow["example"] is None
    assert cow["sides"]["foreground"] == {"total": 0, "kept": 0, "prototypes": []}


def early(folder: Path, items: Sequence[Item], threshold: float = 0.5) -> Early:
    """One early layer; the maps LPCAM-E of all classes are 1 in the left half, 0 in the right."""
    for item in items:
        high = np.zeros((len(item.labels), 40, 40), np.float32)
        high[:, :, :20] = 1
        keys = np.array(item.labels, np.int64)
        maps = MapFile(keys, high[:, ::4, ::4], high)
        write_maps(map_path(folder, item.id), maps, dtype="uint8")
    right, down = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    none = torch.zeros(2)
    found = EarlyPrototypes(
        classes=("cow", "dog"),
        layers=("layer",),
        means=(torch.tensor([1.0, 0.0]),),  # FEATURES of the left less this: (8, 0) and (1, 1)
        foreground=(torch.stack([torch.stack([down, right, none])] * 2),),
        context=(torch.stack([torch.stack([-right, none, none])] * 2),),
        nearest=1,
    )

    def features(items: Sequence[Item]) -> list[FeaturePair]:
        return list(pairs(items, (1.0,)))

    return Early(found, features, folder, threshold)


def test_prototypes_of_early_layers(items: list[Item], tmp_path: Path) -> None:
    cow, _ = prototype_records(fitted(early=early(tmp_path, items)), items, SHARING, **SHOWN)
    front, context = cow["sides"]["early foreground"], cow["sides"]["early context"]
    assert (front["total"], context["total"]) == (2, 1)  # zeros are missing
    # on the left i0 has (8, 0) twice, i1 (1, 1) twice; of equal ones the first is nearest
    numbers = [(one["number"], one["rule"]) for one in front["prototypes"]]
    half = "nearest to 50% of the places"
    assert numbers == [("0 of layer", half), ("1 of layer", half)]
    near = front["prototypes"][1]["patches"]
    assert [one["image"] for one in near] == ["i0", "i1"]
    assert [one["cosine"] for one in near] == pytest.approx([1.0, 0.5**0.5], abs=1e-3)
    # on the right lie (-1, 1) in i0 and (-1, 3) in i1
    (only,) = context["prototypes"]
    assert only["rule"] == "nearest to 100% of the places"
    cosines = [one["cosine"] for one in only["patches"]]
    assert cosines == pytest.approx([0.5**0.5, 0.1**0.5], abs=1e-3)
    assert only["map"]["shape"] == [2, 2] and only["score"] is None
    assert list(fitted().early or ()) == []


def test_early_layers_of_a_map_without_foreground(items: list[Item], tmp_path: Path) -> None:
    found = early(tmp_path, items, threshold=1.0)
    cow, _ = prototype_records(fitted(early=found), items, SHARING, **SHOWN)
    first = cow["sides"]["early foreground"]["prototypes"][0]
    assert (first["rule"], first["patches"]) == ("nearest to 0% of the places", [])


def test_many_classes_show_no_early_layers(items: list[Item], tmp_path: Path) -> None:
    """The page stays below its size: 2 classes, 2 sides and 1 layer of 3 patches are 12."""
    found = early(tmp_path, items)
    for most, shown in ((24, 2), (12, 1), (11, 0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(made, "_MOST_PATCHES", most)
            cow, _ = prototype_records(fitted(early=found), items, SHARING, **SHOWN)
        assert len(cow["sides"]["early foreground"]["prototypes"]) == shown


def test_confusion_records(items: list[Item]) -> None:
    (one,) = made.confusion_records(fitted(), items, SHARING, 5)
    # i1 has both classes, so none of them is absent; i0's pooled features are (4.5, 0.5)
    assert (one["id"], one["present"], one["lookalike"]) == ("i0", 0, 1)
    expected = torch.tensor([4.5, 0.5]).sigmoid().tolist()
    assert one["scores"] == pytest.approx(expected, abs=1e-4)
    assert [one["maps"][name]["shape"] for name in ("CAM", "LPCAM")] == [[2, 10, 10]] * 2
    assert made.confusion_records(fitted(), items, SHARING, 0) == []
