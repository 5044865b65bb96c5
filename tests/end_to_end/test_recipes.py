"""The bundled recipes of published methods on a tiny VOC-shaped folder, with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import draw_image

from lpcam.cli import main
from lpcam.data.images import read_index_mask
from lpcam.masks import write_mask
from lpcam.pipeline import run
from lpcam.recipe import ListName, Recipe, bundled_recipes, load_recipe
from lpcam.stages.context import read_dataset

OBJECTS = {"red": "cow", "green": "dog", "blue": "sheep"}
WIDE = "{channels: [4, 6, 8, 10, 12, 16, 20], depths: [1, 1, 1, 1], hidden: 8}"
SWIN = (
    "{embed_dim: 12, depths: [1, 1, 1, 1], num_heads: [1, 1, 2, 2], channels: 16, "
    "auxiliary_channels: 8}"
)
IDS = {"cow": 10, "dog": 12, "sheep": 17}


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images: eight in train_aug, of which six with masks in train, and two in val."""
    root = tmp_path_factory.mktemp("voc") / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"2007_{number:06d}" for number in range(10)]
    for number, name in enumerate(names):
        colour = list(OBJECTS)[number % 3]
        image, mask = draw_image([colour], (56 + 2 * number, 80), rng)
        Image.fromarray(image).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
        label = OBJECTS[colour]
        if number not in (6, 7):
            own = np.where(mask > 0, IDS[label], 0).astype(np.uint8)
            write_mask(root / "SegmentationClass" / f"{name}.png", own)
        text = f"<annotation><object><name>{label}</name></object></annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(text)
    lists = {"train": names[:6], "train_aug": names[:8], "val": names[8:]}
    for key, members in lists.items():
        path = root / "ImageSets" / "Segmentation" / f"{key}.txt"
        path.write_text("\n".join(members) + "\n")
    return root


@pytest.fixture(scope="module")
def coco(voc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images under COCO's lists, with 80 classes of which three occur."""
    root = tmp_path_factory.mktemp("coco") / "COCO2014"
    shutil.copytree(voc, root)
    lists = root / "ImageSets" / "Segmentation"
    (lists / "train.txt").rename(lists / "train2014.txt")
    (lists / "val.txt").rename(lists / "val2014.txt")
    names = [f"class {number}" for number in range(1, 81)]
    for name, number in IDS.items():
        names[number - 1] = name
    (root / "class_names.txt").write_text("\n".join(names) + "\n")
    return root


def small(root: Path, folder: Path) -> dict[str, str]:
    """What is cut of the stages before the segmenter: sizes and lengths only."""
    return {
        "data.root": str(root),
        "run.folder": str(folder),
        "run.threads": "1",
        "run.device": "cpu",
        "classifier.weights": "random",
        "classifier.finetune.epochs": "1",
        "classifier.finetune.batch_size": "4",
        "classifier.finetune.crop": "64",
        "classifier.finetune.long_side": "[48, 64]",
        "lpcam.max_features": "40",
        "refine.irn.epochs": "1",
        "refine.irn.batch_size": "4",
        "refine.irn.crop": "80",
        "report.images": "4",
    }


SEGMENTERS = {
    "deeplabv2-resnet101.official": {
        "segment.weights": "random",
        "segment.arguments": "{blocks: [1, 1, 2, 1], width: 8}",
        "segment.training.iterations": "2",
        "segment.training.crop": "65",
    },
    "wideresnet38.official": {
        "segment.weights": "random",
        "segment.arguments": WIDE,
        "segment.training.epochs": "1",
        "segment.training.crop": "65",
    },
    **{
        f"upernet-swin-{size}.paper": {
            "segment.weights": "random",
            "segment.arguments": SWIN,
            "segment.training.iterations": "2",
            "segment.training.batch_size": "2",
            "segment.training.resize": "[128, 64]",
            "segment.training.crop": "64",
            "segment.test.resize": "[128, 64]",
        }
        for size in ("tiny", "small", "base")
    },
}
"""What else is cut of each recipe; the networks have their own layers, but narrow ones."""


@pytest.mark.parametrize("data", ["voc12", "coco14"])
def test_segmenters(
    data: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every stage of every recipe; the stages before the segmenter are the same, and run once."""
    root: Path = request.getfixturevalue("voc" if data == "voc12" else "coco")
    for name, changes in SEGMENTERS.items():
        full = f"{data}-{name}"
        assert full in bundled_recipes()
        values = {**small(root, tmp_path / "run"), **changes, "segment.validations": "1"}
        recipe = load_recipe(full, list(values.items()))
        assert recipe.segment is not None
        result = run(recipe, command=f"lpcam run {full}")
        rows = [row for row in result.rows if row["stage"] == "segmentation"]
        network = {"d": "DeepLabV2", "w": "WideResNet-38", "u": "UperNet"}[name[0]]
        crf = [False, recipe.segment.test.crf] if recipe.segment.test.crf else [False]
        assert [(row["method"], row["protocol"]["crf"]) for row in rows] == [
            (f"{network} on {maps} + IRN" + (", CRF" if used else ""), used)
            for maps in ("CAM", "LPCAM")
            for used in crf
        ]
        for row in rows:
            assert row["split"] == row["protocol"]["split"] == recipe.data.list_of("test")
            assert (row["images"], row["threshold"]) == (2, None)
            assert row["protocol"]["segmenter"]["images"] == len(recipe_items(recipe))
        if name.startswith("upernet"):
            assert rows[0]["protocol"]["segmenter"]["backbone"] == name.split("-")[2].split(".")[0]
        masks = tmp_path / "run" / "test" / "lpcam"
        for number in (8, 9):
            mask = read_index_mask(masks / f"2007_{number:06d}.png")
            assert mask.shape == (56 + 2 * number, 80)
            assert mask.max() <= (20 if data == "voc12" else 80)
    # What a finished run's segmenter is for.
    image = root / "JPEGImages" / "2007_000009.jpg"
    out = tmp_path / "predicted"
    assert main(["predict", str(image), "--run", str(tmp_path / "run"), "--output", str(out)]) == 0
    found = read_index_mask(out / "masks" / "2007_000009.png")
    assert np.array_equal(found, read_index_mask(masks / "2007_000009.png"))
    if data == "voc12":
        server = tmp_path / "server"
        assert main(["voc-server", str(tmp_path / "run"), str(server)]) == 0
        packed = server / "results" / "VOC2012" / "Segmentation" / "comp6_test_cls"
        assert sorted(p.name for p in packed.iterdir()) == ["2007_000008.png", "2007_000009.png"]


def recipe_items(recipe: Recipe) -> tuple[str, ...]:
    """Ids of the list that trains the segmenter."""
    lists: tuple[ListName, ...] = ("maps", "segment")
    return read_dataset(recipe, lists).lists[recipe.data.list_of("segment")]


def test_voc12_resnet50_irn_official(voc: Path, tmp_path: Path) -> None:
    """Every stage of the official recipe; only sizes and lengths are cut."""
    recipe = load_recipe("voc12-resnet50-irn.official", list(small(voc, tmp_path / "run").items()))
    assert recipe.refine is not None
    assert (recipe.refine.irn.preset, recipe.refine.irn.displacement) == ("official", True)
    result = run(recipe, command="lpcam run voc12-resnet50-irn.official")
    assert [(row["stage"], row["method"]) for row in result.rows[::2]] == [
        ("seed", "CAM"),
        ("seed", "LPCAM-F"),
        ("seed", "LPCAM"),
        ("pseudo", "CAM + IRN"),
        ("pseudo", "LPCAM + IRN"),
    ]
    fixed = {row["method"]: row["threshold"] for row in result.rows[1::2]}
    assert fixed["LPCAM + IRN"] == 0.35
    assert all(row["images"] == 6 for row in result.rows)
    for number in range(8):  # the whole training list, not only what is scored
        name = f"2007_{number:06d}"
        mask = read_index_mask(tmp_path / "run" / "pseudo" / "lpcam" / f"{name}.png")
        assert set(np.unique(mask).tolist()) <= {0, *IDS.values()}
    assert result.report is not None
