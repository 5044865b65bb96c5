"""The bundled recipes of published methods on a tiny VOC-shaped folder, with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import draw_image

from lpcam.data.images import read_index_mask
from lpcam.masks import write_mask
from lpcam.pipeline import run
from lpcam.recipe import load_recipe

OBJECTS = {"red": "cow", "green": "dog", "blue": "sheep"}
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


def test_voc12_resnet50_irn_official(voc: Path, tmp_path: Path) -> None:
    """Every stage of the official recipe; only sizes and lengths are cut."""
    small = {
        "data.root": str(voc),
        "run.folder": str(tmp_path / "run"),
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
    recipe = load_recipe("voc12-resnet50-irn.official", list(small.items()))
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
