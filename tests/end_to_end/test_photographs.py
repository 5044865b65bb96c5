"""A run on a few real photographs in the VOC layout, where they are at hand."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from lpcam.data.voc import CLASSES
from lpcam.pipeline.recipe import Recipe, load_recipe
from lpcam.pipeline.run import RunResult, run

ANIMALS = ("cat", "cow", "dog", "horse", "sheep")
MAPPED = 3
"""Images of each class that get maps."""
TRAINED = 8
"""Images of each class that train the probe."""


@pytest.fixture(scope="module")
def voc(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short lists beside links to the photographs; the first images of each class in list order."""
    source = shared / "data" / "voc_animals" / "VOCdevkit" / "VOC2012"
    root = tmp_path_factory.mktemp("voc") / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name in ("JPEGImages", "Annotations", "SegmentationClass"):
        (root / name).symlink_to(source / name, target_is_directory=True)
    found: dict[str, list[str]] = {name: [] for name in ANIMALS}
    for image in (source / "ImageSets" / "Segmentation" / "train.txt").read_text().split():
        objects = ElementTree.parse(source / "Annotations" / f"{image}.xml").findall("object/name")
        names = {element.text for element in objects} & set(ANIMALS)
        if len(names) == 1:
            found[names.pop()].append(image)
    for name, count in (("train", MAPPED), ("train_aug", TRAINED)):
        ids = sorted(image for images in found.values() for image in images[:count])
        (lists / f"{name}.txt").write_text("\n".join(ids) + "\n")
    return root


@pytest.fixture(scope="module")
def finished(
    voc: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, RunResult]:
    weights = shared / "weights" / "mobilenetv2_100_imagenet.safetensors"
    if not weights.is_file():
        pytest.skip(f"no {weights}")
    recipe = load_recipe(
        "voc_animals",
        {
            "data.root": voc,
            "data.classes": ANIMALS,
            "data.lists.validate": None,
            "classifier.weights": weights,
            "classifier.probe.long_side": 224,
            "lpcam.preset": "voc12.official",
            "lpcam.cam_threshold": 0.3,  # the same for both
            "lpcam.scales": [0.5],
            "run.folder": tmp_path_factory.mktemp("runs") / "animals",
            "run.threads": 1,
            "run.device": "cpu",
        },
    )
    return recipe, run(recipe)


def test_rows(finished: tuple[Recipe, RunResult]) -> None:
    _, result = finished
    assert result.skipped == []
    assert [(row["method"], row["threshold_source"]) for row in result.rows] == [
        (method, source)
        for method in ("CAM", "LPCAM-F", "LPCAM")
        for source in ("ground truth", "fixed")
    ]
    for row in result.rows:
        assert row["images"] == MAPPED * len(ANIMALS)
        assert row["dataset"] == "voc_animals"
        assert row["split"] == "train"
        assert row["protocol"]["labels"] == "Annotations (XML)"
        assert row["protocol"]["scales"] == [0.5]
        assert row["left_out"] == []


def test_lpcam_covers_more_of_the_objects(finished: tuple[Recipe, RunResult]) -> None:
    _, result = finished
    best = {r["method"]: r for r in result.rows if r["threshold_source"] == "ground truth"}
    fixed = {r["method"]: r for r in result.rows if r["threshold_source"] == "fixed"}
    assert fixed["CAM"]["threshold"] == fixed["LPCAM"]["threshold"] == 0.3
    assert fixed["LPCAM"]["recall"] > fixed["CAM"]["recall"]
    assert best["LPCAM"]["recall"] > best["CAM"]["recall"] + 0.05
    assert best["CAM"]["miou"] > 0.3  # the classifier knows the animals


def test_seeds_are_voc_masks(finished: tuple[Recipe, RunResult], voc: Path) -> None:
    recipe, result = finished
    ids = (voc / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    assert sorted(p.stem for p in (result.folder / "seeds").glob("*.png")) == ids
    used: set[int] = set()
    for image in ids:
        with (
            Image.open(result.folder / "seeds" / f"{image}.png") as seed,
            Image.open(voc / "JPEGImages" / f"{image}.jpg") as photograph,
            Image.open(voc / "SegmentationClass" / f"{image}.png") as truth,
        ):
            assert seed.mode == truth.mode == "P"
            assert seed.size == photograph.size
            assert seed.getpalette() == truth.getpalette()
            used |= set(np.unique(np.array(seed)).tolist())
    assert recipe.seeds.ignore_threshold is None
    assert used == {0, *(CLASSES.index(name) + 1 for name in ANIMALS)}
