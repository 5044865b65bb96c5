"""The procedural demo set: its layout, what its parts promise, and that a seed fixes its bytes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.data import creatures
from lpcam.data.masks import read_index_mask

COUNT = len(creatures.CLASSES)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("creatures")
    creatures.write(folder, images=24, size=64, seed=3)
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_layout_is_that_of_a_users_folder(demo: Path) -> None:
    names = [f"{i:04d}.png" for i in range(24)]
    assert (demo / "classes.txt").read_text().splitlines() == list(creatures.CLASSES)
    assert json.loads((demo / "parts.json").read_text()) == creatures.PARTS
    assert [row["image"] for row in rows(demo)] == names
    assert not (demo / "instances").exists()
    for folder in ("images", "masks", "parts"):
        assert sorted(p.name for p in (demo / folder).iterdir()) == names
    with Image.open(demo / "images" / "0000.png") as image:
        assert (image.mode, image.size) == ("RGB", (64, 64))


def test_masks_hold_exactly_the_labels_and_parts_cover_exactly_the_creatures(demo: Path) -> None:
    filled, found = [], np.zeros(5)
    for row in rows(demo):
        labels = {creatures.CLASSES.index(name) + 1 for name in row["labels"].split(";")}
        mask = read_index_mask(demo / "masks" / row["image"])
        parts = read_index_mask(demo / "parts" / row["image"])
        assert set(np.unique(mask).tolist()) - {0} == labels
        assert len(labels) in (1, 2)
        assert ((mask > 0) == (parts > 0)).all()
        filled.append((mask > 0).mean())
        found += np.bincount(parts.ravel(), minlength=5)
    assert min(filled) > 0.15 and max(filled) < 0.65
    share = found[1:] / found[1:].sum()
    assert share.min() > 0.05
    assert share[0] < 0.4  # heads tell the class and are the smaller part of a creature


def test_a_seed_gives_the_same_bytes_and_another_seed_others(demo: Path, tmp_path: Path) -> None:
    creatures.write(tmp_path / "same", images=3, size=64, seed=3)
    creatures.write(tmp_path / "other", images=1, size=64, seed=4)
    same, whole, other = (contents(f) for f in (tmp_path / "same", demo, tmp_path / "other"))
    # a longer set begins with the shorter one
    assert all(whole[name] == data for name, data in same.items() if name != "labels.csv")
    assert rows(demo)[:3] == rows(tmp_path / "same")
    assert other["images/0000.png"] != same["images/0000.png"]


def test_herds_are_two_or_three_touching_creatures_of_one_class(tmp_path: Path) -> None:
    ndimage = pytest.importorskip("scipy.ndimage", reason="needs SciPy")
    creatures.write(tmp_path, images=12, size=96, seed=5, herds=True)
    counts = []
    for row in rows(tmp_path):
        mask = read_index_mask(tmp_path / "masks" / row["image"])
        numbers = read_index_mask(tmp_path / "instances" / row["image"])
        assert set(np.unique(mask).tolist()) == {0, creatures.CLASSES.index(row["labels"]) + 1}
        assert ((mask > 0) == (numbers > 0)).all()
        pieces = np.sort(np.bincount(ndimage.label(mask, np.ones((3, 3)))[0].ravel())[1:])
        assert pieces[:-1].sum() <= 2  # but for specks of outline
        areas = np.bincount(numbers.ravel())[1:]
        assert areas.min() > 0.25 * areas.max()  # none is hidden
        counts.append(len(areas))
    assert set(counts) == {2, 3}


def draw(label: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """One creature of a class on a plain ground: picture and parts."""
    side = 96 * creatures.OVERSAMPLING
    sheet = creatures._Sheet(Image.new("RGB", (side, side), (128, 128, 128)))
    centre = complex(side / 2, side * 0.55)
    creatures._creature(sheet, label, centre, side * 0.4, np.random.default_rng(seed))
    picture, masks = sheet.finish()
    return np.asarray(picture).astype(float), masks["parts"]


def mean_colour(label: int, part: str) -> np.ndarray:
    drawn = [draw(label, seed) for seed in range(4)]
    value = creatures.PARTS[part]
    return np.mean([picture[parts == value].mean(axis=0) for picture, parts in drawn], axis=0)


@pytest.mark.parametrize("part", ["legs", "tail"])
def test_legs_and_tails_are_the_same_for_all_classes(part: str) -> None:
    means = np.stack([mean_colour(n, part) for n in range(COUNT)])
    assert np.abs(means - means.mean(axis=0)).max() < 3
    # of one seed they cover the same pixels, but for those behind a torso or head
    where = [draw(n)[1] == creatures.PARTS[part] for n in range(COUNT)]
    assert np.logical_and.reduce(where).sum() > 0.9 * np.logical_or.reduce(where).sum()


def test_torsos_are_alike_within_a_group_and_differ_between_groups() -> None:
    means = [mean_colour(n, "torso") for n in range(COUNT)]
    assert min(creatures.GROUPS.count(group) for group in set(creatures.GROUPS)) >= 2
    for a in range(COUNT):
        for b in range(a):
            distance = float(np.abs(means[a] - means[b]).max())
            alike = creatures.GROUPS[a] == creatures.GROUPS[b]
            assert distance < 25 if alike else distance > 40


def test_a_companion_ground_co_occurs_with_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []

    def recorded(name: str, paint: Callable[..., None]) -> Callable[..., None]:
        return lambda *arguments: (drawn.append(name), paint(*arguments))[1]

    grounds = {k: (base, recorded(k, paint)) for k, (base, paint) in creatures.GROUNDS.items()}
    monkeypatch.setattr(creatures, "GROUNDS", grounds)
    creatures.write(tmp_path, images=100, size=32, seed=0)
    with_class, without = [], []
    for row, ground in zip(rows(tmp_path), drawn, strict=True):
        labels = row["labels"].split(";")
        for label, companion in creatures.COMPANIONS.items():
            found = with_class if creatures.CLASSES[label] in labels else without
            found.append(ground == companion)
    assert np.mean(with_class) > 0.4
    assert np.mean(without) < 1 / len(grounds)
