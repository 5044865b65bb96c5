"""Tiny folders laid out like PASCAL VOC and MS COCO."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import draw_image

from lpcam.data.coco.dataset import COCO_CATEGORIES
from lpcam.data.masks import write_mask

OBJECTS = {"red": "cow", "green": "dog", "blue": "sheep"}
IDS = {"cow": 10, "dog": 12, "sheep": 17}
CATEGORIES = {"cow": 21, "dog": 18, "sheep": 20}
"""COCO's own numbers of the same classes, which are 20, 17 and 19 in masks."""


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same numbers of images as COCO has them: one has no label, one shows a crowd alone."""
    masks = pytest.importorskip("pycocotools.mask")
    root = tmp_path_factory.mktemp("coco") / "MSCOCO"
    rng = np.random.default_rng(0)
    for split, numbers in {"train2014": range(9, 1, -1), "val2014": (20, 21)}.items():
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for number in numbers:  # not in the order of their ids
            colour = list(OBJECTS)[number % 3]
            size = (56 + 2 * (number % 10), 80)
            image, mask = draw_image([colour], size, rng)
            name = f"COCO_{split}_{number:012d}.jpg"
            Image.fromarray(image).save(root / split / name, quality=95)
            images.append({"id": number, "file_name": name, "height": size[0], "width": size[1]})
            if number == 2:
                continue
            crowd = number == 3
            packed = masks.encode(np.asfortranarray((mask > 0).astype(np.uint8)))
            runs: list[int] = []
            flat = np.concatenate([[0], (mask > 0).flatten(order="F"), [2]])
            edges = np.flatnonzero(np.diff(flat))
            runs = np.diff(np.concatenate([[0], edges])).tolist()
            annotations.append(
                {
                    "id": 1000 - number,
                    "image_id": number,
                    "category_id": CATEGORIES[OBJECTS[colour]],
                    "iscrowd": int(crowd),
                    "area": int((mask > 0).sum()),
                    "bbox": masks.toBbox(packed).tolist(),
                    "segmentation": {"size": list(size), "counts": runs},
                }
            )
        text = json.dumps(
            {
                "images": images,
                "annotations": annotations,
                "categories": [{"id": i, "name": name} for i, name in COCO_CATEGORIES],
            }
        )
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(text)
    return root
