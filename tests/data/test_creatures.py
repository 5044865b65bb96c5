"""The procedural demo set: its layout, what its parts promise, and that a seed fixes its bytes."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.data import creatures
from lpcam.runtime.errors import DataError


def _digests(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("creatures")
    creatures.write(folder, images=24, size=64, seed=3)
    return folder


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _index(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.asarray(image)


def test_the_layout_is_that_of_a_users_folder(demo: Path) -> None:
    assert sorted(p.name for p in demo.iterdir()) == [
        "classes.txt",
        "images",
        "labels.csv",
        "masks",
        "parts",
        "parts.json",
    ]
    assert (demo / "classes.txt").read_text().splitlines() == list(creatures.CLASSES)
    assert json.loads((demo / "parts.json").read_text()) == creatures.PARTS
    rows = _rows(demo)
    assert [r["image"] for r in rows] == [f"{i:04d}.png" for i in range(24)]
    for folder in ("images", "masks", "parts"):
        assert sorted(p.name for p in (demo / folder).iterdir()) == [r["image"] for r in rows]
    with Image.open(demo / "images" / "0000.png") as image:
        assert (image.mode, image.size) == ("RGB", (64, 64))


def test_masks_hold_exactly_the_labels_and_parts_cover_exactly_the_creatures(demo: Path) -> None:
    for row in _rows(demo):
        labels = {creatures.CLASSES.index(name) + 1 for name in row["labels"].split(";")}
        mask = _index(demo / "masks" / row["image"])
        parts = _index(demo / "parts" / row["image"])
        assert set(np.unique(mask).tolist()) - {0} == labels
        assert len(labels) in (1, 2)
        assert ((mask > 0) == (parts > 0)).all()
        assert set(np.unique(parts).tolist()) <= {0, *creatures.PARTS.values()}


def test_creatures_fill_about_a_fifth_to_three_fifths(demo: Path) -> None:
    filled = [float((_index(p) > 0).mean()) for p in (demo / "masks").iterdir()]
    assert min(filled) > 0.15
    assert max(filled) < 0.65


def test_every_part_is_there_to_be_found(demo: Path) -> None:
    values = np.concatenate([_index(p).ravel() for p in (demo / "parts").iterdir()])
    share = np.bincount(values, minlength=5)[1:] / (values > 0).sum()
    assert share.min() > 0.05
    assert share[0] < 0.4  # heads tell the class and are the smaller part of a creature


def test_a_seed_gives_the_same_bytes_and_another_seed_others(demo: Path, tmp_path: Path) -> None:
    creatures.write(tmp_path / "same", images=24, size=64, seed=3)
    creatures.write(tmp_path / "other", images=2, size=64, seed=4)
    assert _digests(tmp_path / "same") == _digests(demo)
    other = _digests(tmp_path / "other")
    assert other["images/0000.png"] != _digests(demo)["images/0000.png"]


def test_a_longer_set_begins_with_the_shorter_one(demo: Path, tmp_path: Path) -> None:
    creatures.write(tmp_path, images=3, size=64, seed=3)
    short, long = _digests(tmp_path), _digests(demo)
    for name, digest in short.items():
        if name != "labels.csv":
            assert long[name] == digest
    assert _rows(demo)[:3] == _rows(tmp_path)


def _draw(label: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """One creature of a class on a plain ground: picture and parts."""
    rng = np.random.default_rng(seed)
    side = 96 * creatures.OVERSAMPLING
    sheet = creatures._Sheet(Image.new("RGB", (side, side), (128, 128, 128)))
    creatures._creature(sheet, label, (side / 2, side * 0.55), side * 0.4, rng)
    picture, _, parts = sheet.finish()
    return np.asarray(picture).astype(float), np.asarray(parts)


def _mean_colour(label: int, part: str) -> np.ndarray:
    colours = []
    for seed in range(4):
        picture, parts = _draw(label, seed)
        colours.append(picture[parts == creatures.PARTS[part]].mean(axis=0))
    return np.mean(colours, axis=0)


@pytest.mark.parametrize("part", ["legs", "tail"])
def test_legs_and_tails_are_the_same_for_all_classes(part: str) -> None:
    means = np.stack([_mean_colour(n, part) for n in range(len(creatures.CLASSES))])
    assert np.abs(means - means.mean(axis=0)).max() < 3
    # of one seed they cover the same pixels, but for those behind a torso or head
    where = [_draw(n)[1] == creatures.PARTS[part] for n in range(len(creatures.CLASSES))]
    assert np.logical_and.reduce(where).sum() > 0.9 * np.logical_or.reduce(where).sum()


def test_torsos_are_alike_within_a_group_and_differ_between_groups() -> None:
    means = [_mean_colour(n, "torso") for n in range(len(creatures.CLASSES))]
    for a in range(len(means)):
        for b in range(a):
            distance = float(np.abs(means[a] - means[b]).max())
            if creatures.GROUPS[a] == creatures.GROUPS[b]:
                assert distance < 25
            else:
                assert distance > 40


def test_every_group_holds_more_than_one_class() -> None:
    assert len(creatures.GROUPS) == len(creatures.CLASSES)
    assert min(creatures.GROUPS.count(g) for g in set(creatures.GROUPS)) >= 2


def test_a_companion_ground_co_occurs_with_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []

    def recorded(name: str, paint: Callable[..., None]) -> Callable[..., None]:
        return lambda *arguments: (drawn.append(name), paint(*arguments))[1]

    grounds = {k: (base, recorded(k, paint)) for k, (base, paint) in creatures._GROUNDS.items()}
    monkeypatch.setattr(creatures, "_GROUNDS", grounds)
    creatures.write(tmp_path, images=100, size=32, seed=0)
    with_class, without = [], []
    for row, ground in zip(_rows(tmp_path), drawn, strict=True):
        labels = row["labels"].split(";")
        for label, companion in creatures.COMPANIONS.items():
            found = with_class if creatures.CLASSES[label] in labels else without
            found.append(ground == companion)
    assert np.mean(with_class) > 0.4
    assert np.mean(without) < 1 / len(grounds)


@pytest.mark.parametrize(
    ("images", "size", "seed", "message"),
    [
        (0, 64, 0, "images is 0; the demo set needs at least 1 image"),
        (1, 31, 0, "size is 31 px; creatures need at least 32 px"),
        (1, 64, -1, "seed is -1; use a seed of 0 or more"),
    ],
)
def test_bad_arguments_are_named(
    tmp_path: Path, images: int, size: int, seed: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        creatures.write(tmp_path / "never", images=images, size=size, seed=seed)
    assert not (tmp_path / "never").exists()
