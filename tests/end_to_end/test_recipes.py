"""The bundled recipes of published methods on a tiny VOC-shaped folder, with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import small_run

from lpcam.cli.main import main
from lpcam.data.dataset import Dataset
from lpcam.data.map_files import map_path, read_maps
from lpcam.data.masks import read_index_mask
from lpcam.pipeline.datasets import read_dataset
from lpcam.pipeline.recipe import Recipe, bundled_recipes, load_recipe
from lpcam.pipeline.run import RunResult, run

WIDE = {"channels": [4, 6, 8, 10, 12, 16, 20], "depths": [1, 1, 1, 1], "hidden": 8}
SWIN = {
    "embed_dim": 12,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "channels": 16,
    "auxiliary_channels": 8,
}
TINY = {"classifier.backbone": "test_resnet", "segment.validations": 1}
"""The whole ResNet-50 runs in a test of its own."""
IDS = {"cow": 10, "dog": 12, "sheep": 17}


SEGMENTERS = {
    "deeplabv2-resnet101.official": {
        "segment.weights": "random",
        "segment.arguments": {"blocks": [1, 1, 2, 1], "width": 8},
        "segment.training.iterations": 2,
        "segment.training.crop": 65,
    },
    "wideresnet38.official": {
        "segment.weights": "random",
        "segment.arguments": WIDE,
        "segment.training.epochs": 1,
        "segment.training.crop": 65,
    },
    "upernet-swin-SIZE.paper": {
        "segment.weights": "random",
        "segment.arguments": SWIN,
        "segment.training.iterations": 2,
        "segment.training.batch_size": 2,
        "segment.training.resize": [128, 64],
        "segment.training.crop": 64,
        "segment.test.resize": [128, 64],
    },
}
"""What else is cut of each recipe; the networks have their own layers, but narrow ones."""


@pytest.mark.parametrize(("data", "swin"), [("voc12", "base"), ("coco14", "tiny")])
def test_segmenters(data: str, swin: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Every stage of each network; the stages before the segmenter are the same, and run once."""
    root: Path = request.getfixturevalue("voc" if data == "voc12" else "coco")
    for name, changes in SEGMENTERS.items():
        full = f"{data}-{name.replace('SIZE', swin)}"
        assert full in bundled_recipes()
        values = {**small_run(root, tmp_path / "run"), **TINY, **changes}
        recipe = load_recipe(full, values)
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
            assert rows[0]["protocol"]["segmenter"]["backbone"] == swin
        masks = tmp_path / "run" / "test" / "lpcam"
        tested = recipe_dataset(recipe).select(recipe.data.list_of("test"))
        for item, height in zip(tested, (72, 74) if data == "voc12" else (56, 58), strict=True):
            mask = read_index_mask(masks / f"{item.id}.png")
            assert mask.shape == (height, 80)
            assert mask.max() <= (20 if data == "voc12" else 80)
    # What a finished run's segmenter is for.
    out = tmp_path / "predicted"
    image = str(item.image)
    assert main(["predict", image, "--run", str(tmp_path / "run"), "--output", str(out)]) == 0
    found = read_index_mask(out / "masks" / f"{item.id}.png")
    assert np.array_equal(found, read_index_mask(masks / f"{item.id}.png"))
    if data == "coco14":
        check_coco(recipe, result)
    if data == "voc12":
        server = tmp_path / "server"
        assert main(["export", "voc-server", str(tmp_path / "run"), str(server)]) == 0
        packed = server / "results" / "VOC2012" / "Segmentation" / "comp6_test_cls"
        assert sorted(p.name for p in packed.iterdir()) == ["2007_000008.png", "2007_000009.png"]


def check_coco(recipe: Recipe, result: RunResult) -> None:
    """What COCO has and VOC has not: images without a label, crowds, truth that is painted."""
    folder = result.folder
    ids = [f"COCO_train2014_{number:012d}" for number in range(2, 10)]
    dataset = recipe_dataset(recipe)
    assert list(dataset.lists["train2014"]) == ids  # ascending, whatever the file's order
    assert list(dataset.lists["train2014.labelled"]) == ids[1:]
    assert [dataset.items[name].labels for name in ids[:3]] == [(), (19,), (16,)]
    # dog, cow and sheep are 17, 20 and 19 in masks; the crowd is background
    values = {name: np.unique(read_index_mask(folder / "truth" / f"{name}.png")) for name in ids}
    assert [values[name].tolist() for name in ids[:5]] == [[0], [0], [0, 17], [0, 19], [0, 20]]
    # no label: an empty map, a mask of background, in every stage to the end
    none = ids[0]
    assert read_maps(map_path(folder / "lpcam", none)).keys.tolist() == []
    for stage in ("seeds", "refine-labels/lpcam", "pseudo/lpcam"):
        assert not read_index_mask(folder / stage / f"{none}.png").any()
    seeds = [row for row in result.rows if row["stage"] != "segmentation"]
    assert {row["images"] for row in seeds} == {8}
    assert {row["split"] for row in seeds} == {"train2014"}
    assert "instances_train2014.json" in seeds[0]["protocol"]["labels"]


def recipe_dataset(recipe: Recipe) -> Dataset:
    """With all of its lists; labels of images that are tested alone are not asked for."""
    return read_dataset(recipe, ("maps", "segment", "test"))


def recipe_items(recipe: Recipe) -> tuple[str, ...]:
    """Ids of the list that trains the segmenter."""
    return recipe_dataset(recipe).lists[recipe.data.list_of("segment")]


def test_voc12_resnet50_irn_official(voc: Path, tmp_path: Path) -> None:
    """Every stage of the official recipe; only sizes and lengths are cut."""
    recipe = load_recipe("voc12-resnet50-irn.official", small_run(voc, tmp_path / "run"))
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
