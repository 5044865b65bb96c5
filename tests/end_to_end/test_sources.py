"""One run on the same images from every kind of source: the same maps, masks and scores."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import COLOURS, draw_folder, recipe_values, write_weights

from lpcam.data.masks import read_index_mask
from lpcam.pipeline.recipe import parse_recipe
from lpcam.pipeline.run import run

NAMES = list(COLOURS)


def rows(folder: Path) -> list[tuple[str, list[str]]]:
    with (folder / "labels.csv").open(newline="") as file:
        return [(row["image"], row["labels"].split(";")) for row in csv.DictReader(file)]


def copy_of(folder: Path, root: Path) -> Path:
    shutil.copytree(folder, root)
    (root / "labels.csv").unlink()
    (root / "classes.txt").write_text("\n".join(NAMES))
    return root


def multi_hot(folder: Path, root: Path) -> dict[str, Any]:
    lines = [",".join(["image", *NAMES])]
    for image, names in rows(folder):
        lines.append(",".join([image, *(str(int(name in names)) for name in NAMES)]))
    copy_of(folder, root)
    path = root.with_suffix(".csv")
    path.write_text("\n".join(lines))
    return {"kind": "folder", "root": str(root), "labels": str(path)}


def masks_elsewhere(folder: Path, root: Path) -> dict[str, Any]:
    shutil.copytree(folder, root)
    truth = root.with_suffix(".truth")
    (root / "masks").rename(truth)
    return {"kind": "folder", "root": str(root), "masks": str(truth)}


def voc(folder: Path, root: Path) -> dict[str, Any]:
    for name in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    (root / "class_names.txt").write_text("\n".join(NAMES))
    ids = []
    for image, names in rows(folder):
        stem = Path(image).stem
        ids.append(stem)
        # the name that VOC wants; what a file holds is told by its contents
        shutil.copy(folder / "images" / image, root / "JPEGImages" / f"{stem}.jpg")
        shutil.copy(folder / "masks" / image, root / "SegmentationClass" / f"{stem}.png")
        objects = "".join(f"<object><name>{name}</name></object>" for name in names if name)
        (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{objects}</annotation>")
    (root / "ImageSets" / "Segmentation" / "mine.txt").write_text("\n".join(ids))
    stages = dict.fromkeys(("classify", "prototypes", "maps", "evaluate"), "mine")
    return {"kind": "voc", "root": str(root), "lists": stages}


def voc_with_a_table(folder: Path, root: Path) -> dict[str, Any]:
    data = voc(folder, root)
    shutil.rmtree(root / "Annotations")
    return {**data, "labels": str(folder / "labels.csv")}


def annotations(folder: Path) -> dict[str, Any]:
    """COCO's annotations of the masks, as runs; category ids with a gap, in no order."""
    numbers = {"red": 90, "blue": 3, "green": 7}  # ascending: the order of the classes
    images, found = [], []
    for number, (image, names) in enumerate(rows(folder), start=1):
        mask = read_index_mask(folder / "masks" / image)
        size = list(mask.shape)
        images.append({"id": number, "file_name": image, "height": size[0], "width": size[1]})
        for name in names:
            if not name:
                continue
            inside = (mask == NAMES.index(name) + 1).flatten(order="F")
            edges = np.flatnonzero(np.diff(np.concatenate([[False], inside])))
            runs = np.diff(np.concatenate([[0], edges, [inside.size]])).tolist()
            found.append(
                {
                    "id": len(found) + 1,
                    "image_id": number,
                    "category_id": numbers[name],
                    "iscrowd": 0,
                    "area": int(inside.sum()),
                    "segmentation": {"size": size, "counts": runs},
                }
            )
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    return {"images": images[::-1], "annotations": found, "categories": categories}


def coco(folder: Path, root: Path) -> dict[str, Any]:
    shutil.copytree(folder / "images", root / "train2014")
    (root / "annotations").mkdir()
    path = root / "annotations" / "instances_train2014.json"
    path.write_text(json.dumps(annotations(folder)))
    return {"kind": "coco", "root": str(root)}


Source = Callable[[Path, Path], dict[str, Any]]
SOURCES: list[Source] = [
    multi_hot,
    masks_elsewhere,
    voc,
    voc_with_a_table,
    coco,
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """The folder with labels.csv, the weights, and the recipe of a run on it."""
    base = tmp_path_factory.mktemp("sources")
    folder, weights = draw_folder(base / "boxes"), write_weights(base / "weights.safetensors")
    values = recipe_values(folder, base / "run", weights)
    run(parse_recipe(values, where="tiny"), until="evaluate")
    return folder, weights, values


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_a_source_of_the_same_images_gives_the_same_run(
    source: Source, reference: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, weights, values = reference
    data = source(folder, tmp_path / "data")
    changed = {**recipe_values(folder, tmp_path / "run", weights), "data": data}
    result = run(parse_recipe(changed, where="tiny"), until="evaluate")
    own, theirs = tmp_path / "run", Path(values["run"]["folder"])
    names = sorted(path.stem for path in (theirs / "seeds").glob("*.png"))
    assert len(names) == 12
    for name in names:
        for file in (f"seeds/{name}.png", f"cam/{name}.npz", f"lpcam/{name}.npz"):
            # maps name the stage that made them, which knows where labels come from
            if file.endswith("png"):
                assert (own / file).read_bytes() == (theirs / file).read_bytes(), file
            else:
                with np.load(own / file) as one, np.load(theirs / file) as other:
                    assert one["high_res"].tobytes() == other["high_res"].tobytes(), file
    rows_of = [
        [{k: v for k, v in row.items() if k not in ("protocol", "dataset", "split")} for row in r]
        for r in (result.rows, json.loads((theirs / "metrics.json").read_text())["rows"])
    ]
    assert rows_of[0] == rows_of[1]
    assert result.rows[0]["protocol"]["labels"] != ""


def test_truth_painted_from_annotations_is_made_again_where_it_must_be(
    reference: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Other rules of painting, or other annotations, make other truth; the rest stays."""
    folder, weights, _ = reference
    data = coco(folder, tmp_path / "data")
    values = {**recipe_values(folder, tmp_path / "run", weights), "data": data}
    run(parse_recipe(values, where="tiny"), until="evaluate")
    truth = tmp_path / "run" / "truth" / "i00.png"
    before, cam = read_index_mask(truth), (tmp_path / "run/cam/i00.npz").stat().st_mtime_ns
    path = tmp_path / "data" / "annotations" / "instances_train2014.json"
    text = json.loads(path.read_text())
    text["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(text))
    values["data"]["coco"] = {"crowds": "background"}
    run(parse_recipe(values, where="tiny"), until="evaluate")
    crowd = read_index_mask(truth)
    assert (crowd == 0).sum() > (before == 0).sum()
    values["data"]["coco"] = {"crowds": "void"}
    run(parse_recipe(values, where="tiny"), until="evaluate")
    assert np.array_equal(read_index_mask(truth) == 255, (crowd == 0) & (before > 0))
    assert (tmp_path / "run/cam/i00.npz").stat().st_mtime_ns == cam  # labels are the same
    Image.open(truth).verify()
