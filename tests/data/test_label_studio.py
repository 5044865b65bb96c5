"""Label Studio's exports through the command line: right labels and masks, or what is wrong."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lpcam.cli.main import main
from lpcam.data.dataset import ClassTable
from lpcam.data.masks import read_index_mask, write_mask
from lpcam.data.open_dataset import kind_of, open_dataset
from lpcam.formats.masks.base import MaskEntry
from lpcam.formats.masks.export import export_masks
from lpcam.formats.masks.label_studio import packed_runs
from lpcam.pipeline.datasets import read_dataset
from lpcam.pipeline.recipe import load_recipe

SIZE = (48, 64)
HALF = np.zeros(SIZE, bool)
HALF[12:36, 16:48] = True
ROW, COLUMN = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
RECTANGLE = {"x": 25, "y": 25, "width": 50, "height": 50, "rotation": 10}
POLYGON = {"points": [[25, 25], [75, 25], [75, 75], [25, 75]], "closed": True}
ELLIPSE = {"x": 50, "y": 50, "radiusX": 25, "radiusY": 12.5}
DISC = ((ROW - 24) / 6) ** 2 + ((COLUMN - 32) / 16) ** 2 <= 1
TALL = ((ROW - 24) / 16) ** 2 + ((COLUMN - 32) / 6) ** 2 <= 1


def brush(mask: np.ndarray) -> dict[str, Any]:
    return {"format": "rle", "rle": packed_runs(mask)}


def png(mask: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(np.dstack([np.zeros((*SIZE, 3)), mask * 255]).astype(np.uint8)).save(
        buffer, "PNG"
    )
    return {"imageDataURL": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"}


def result(kind: str, value: dict[str, Any], *names: Any, tag: str = "tag", **more: Any) -> Any:
    size = {"original_width": SIZE[1], "original_height": SIZE[0], "image_rotation": 0}
    value = {**value, kind: [*names]}
    return {"from_name": tag, "to_name": "image", "type": kind, "value": value, **size, **more}


def task(*results: Any, image: str = "/data/upload/3/1a2b3c4d-a.jpg", **more: Any) -> Any:
    made = [{"id": 7, "result": [*results], "was_cancelled": False, "ground_truth": False}]
    return {"id": 1, "data": {"image": image}, "annotations": made, "predictions": [], **more}


COW, DOG = result("choices", {}, "cow"), result("choices", {}, "dog")


def write(root: Path, tasks: Any, *images: str) -> Path:
    for number, name in enumerate(images or ("images/a.jpg",)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / name)
    path = root / "project-1-at-2024.json"
    path.write_text(json.dumps(tasks), "utf-8")
    return path


def painted(root: Path, output: Path) -> dict[str, np.ndarray]:
    assert main(["data", "masks", str(root), str(output)]) == 0
    files = {p.relative_to(output).with_suffix("").as_posix(): p for p in output.rglob("*.png")}
    return {name: read_index_mask(path) for name, path in files.items()}


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    return float(((mask == truth) & (mask > 0)).sum() / ((mask > 0) | (truth > 0)).sum())


REGIONS: dict[str, tuple[Any, np.ndarray | None]] = {
    "brush": (result("brushlabels", brush(HALF), "cow"), HALF),
    "polygon": (result("polygonlabels", POLYGON, "cow"), HALF),
    "ellipse": (result("ellipselabels", ELLIPSE, "cow"), DISC),
    "turned": (result("ellipselabels", {**ELLIPSE, "radiusX": 25, "radiusY": 12.5}, "cow"), DISC),
    "quarter turn": (
        result(
            "ellipselabels",
            {**ELLIPSE, "radiusX": 25, "radiusY": 12.5, "rotation": 90},
            "cow",
        ),
        TALL,
    ),
    "bit mask": (result("bitmasklabels", png(HALF), "cow"), HALF),
    "labels": (result("labels", POLYGON, "cow"), HALF),
    "rectangle": (result("rectanglelabels", RECTANGLE, "cow"), None),
    "key point": (result("keypointlabels", {"x": 1, "y": 1, "width": 1}, "cow"), None),
    "open line": (result("polygonlabels", {**POLYGON, "closed": False}, "cow"), None),
    "choice": (COW, None),
    "taxonomy": (result("taxonomy", {}, ["animal", "cow"]), None),
}


@pytest.mark.parametrize("name", REGIONS)
def test_regions_and_choices(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, truth = REGIONS[name]
    tasks = [task(one), task(DOG, id=2, image="b.jpg"), task(id=3, image="c.jpg")]
    path = write(tmp_path / "farm", tasks, *(f"images/{n}.jpg" for n in "abcd"))
    assert main(["init", str(path), "--weights", "random"]) == 0
    main(["data", "check", str(path.parent), "--no-estimate"])
    assert "3 images" in capsys.readouterr().out
    opened = open_dataset(path)
    shown = {i.id: i.labels for i in opened.dataset.items.values()}
    assert shown == {"a": (0,), "b": (1,), "c": ()}
    assert opened.dataset.classes.names == ("cow", "dog")
    assert set(opened.true_masks) == ({"a", "c"} if truth is not None else set())
    if truth is not None:
        assert iou(painted(path, tmp_path / "masks")["a"], truth.astype(np.uint8)) > 0.97


@pytest.mark.parametrize(
    ("address", "stored"),
    [
        ("/data/upload/3/1a2b3c4d-cow.jpg", "images/cow.jpg"),
        ("/data/upload/3/1a2b3c4d-cow.jpg", "upload/1a2b3c4d-cow.jpg"),
        ("/data/upload/3/1a2b3c4d-my_cow.jpg", "my cow.jpg"),
        ("/data/local-files/?d=sub%2Fcow.jpg", "other/sub/cow.jpg"),
        ("https://host.org/x/my%20cow.JPG?sig=a%2Fb", "my cow.JPG"),
        ("s3://bucket/sub/cow.jpg", "sub/cow.jpg"),
        ("/tasks/1/resolve/?fileuri=czM6Ly9idWNrZXQvc3ViL2Nvdy5qcGc=", "cow.jpg"),
        ("C:\\farm\\cow.jpg", "cow.jpg"),
        ("cow #1.jpg", "cow #1.jpg"),
    ],
)
def test_images_are_found(address: str, stored: str, tmp_path: Path) -> None:
    path = write(tmp_path, [task(COW, image=address)], stored, "images/b/other.jpg", "x/cow.jpg")
    if stored.endswith("/cow.jpg") or stored == "cow.jpg":  # another of that name, in other folders
        (tmp_path / "x/cow.jpg").unlink()
    (item,) = open_dataset(path).dataset.items.values()
    assert item.image == tmp_path / stored


def two(one: Any, other: Any, **more: Any) -> Any:
    both = task(one)
    both["annotations"] += [{**task(other)["annotations"][0], **more}]
    return both


SKIPPED: dict[str, tuple[str, Any]] = {
    "two images": ("may be any", {**task(COW), "data": {"left": "a.jpg", "right": "b.jpg"}}),
    "gone": ("no file", task(COW, image="gone.jpg")),
    "no annotation": ("no annotation", task(annotations=[], drafts=[{"result": [COW]}])),
    "cancelled": ("cancelled", two(COW, COW) | {"annotations": [{"was_cancelled": True}]}),
    "nothing": ("no image", {**task(COW), "data": {"text": "a cow"}}),
    "completion": ("cancelled", {"data": {"image": "a.jpg"}, "completions": [{"skipped": True}]}),
    "several files": ("may be any", task(COW, image="twice.jpg")),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_tasks_without_a_label_are_listed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phrase, other = SKIPPED[name]
    names = ("images/a.jpg", "b.jpg", "x/twice.jpg", "y/twice.jpg")
    path = write(tmp_path, [other, task(DOG, image="b.jpg", id=9)], *names)
    assert main(["init", str(path), "--weights", "random"]) == 0
    out = capsys.readouterr().out
    assert phrase in out and "1 images" in out
    assert [*open_dataset(path).dataset.items] == ["b"]


@pytest.mark.parametrize(
    ("more", "several", "labels"),
    [
        ({}, ["--several", "last"], (1,)),
        ({}, ["--several", "union"], (0, 1)),
        ({"ground_truth": True}, [], (1,)),
        ({}, [], None),
    ],
)
def test_annotations_that_differ(
    more: dict[str, Any],
    several: list[str],
    labels: tuple[int, ...] | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = [two(COW, DOG, **more), task(COW, image="b.jpg")]
    path = write(tmp_path, tasks, "a.jpg", "b.jpg")
    done = main(["init", str(path), "--weights", "random", *several])
    if labels is None:
        assert done != 0 and "--several union" in capsys.readouterr().err
    else:
        assert done == 0
        assert read_dataset(load_recipe(tmp_path / "recipe.yaml")).items["a"].labels == labels


REFUSED: dict[str, tuple[str, Any]] = {
    "turned image": ("90", [task(result("brushlabels", brush(HALF), "cow", image_rotation=90))]),
    "two tags": ("--classes", [task(COW, result("choices", {}, "blurred", tag="quality"))]),
    "broken": ("task 1", [task(result("polygonlabels", {"points": [[1, "a"]] * 3}, "cow"))]),
    "no image": ("gone.jpg", [task(COW, image="gone.jpg")]),
    "one task": ("a task of Label Studio", task(COW)),
    "no result": ("task 1", [task(annotations=[{"result": ["cow"]}])]),
    "JSON-MIN": ("JSON-MIN", [{"image": "a.jpg", "id": 1, "tag": "cow", "annotation_id": 1}]),
    "no name": ("task 1", [task(result("choices", {}, 5))]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phrase, tasks = REFUSED[name]
    path = write(tmp_path, tasks)
    for command in (["init", "--weights", "random"], ["data", "check", "--no-estimate"]):
        assert main([*command, str(path)]) != 0
        assert phrase in capsys.readouterr().err
    if name == "two tags":
        assert main(["init", str(path), "--weights", "random", "--classes", "cow"]) == 0


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda rle: rle[: len(rle) // 2], "cannot be painted"),
        (lambda rle: [0, 0, 0, 1, *rle[4:]], "1 values"),
        (lambda rle: [300, *rle], "cannot be painted"),
    ],
)
def test_damaged_brushes_are_faults_of_their_image(
    change: Callable[[list[int]], list[int]], fault: str, tmp_path: Path
) -> None:
    value = {"format": "rle", "rle": change(packed_runs(HALF))}
    path = write(tmp_path, [task(result("brushlabels", value, "cow"))])
    mask, faults = open_dataset(path).true_masks["a"]()
    assert mask is None and fault in faults[0]


def test_exported_brush_masks_alone_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mask(tmp_path / "task-12-annotation-3-by-1-tag-cow-0.png", HALF.astype(np.uint8))
    assert main(["init", str(tmp_path), "--weights", "random"]) != 0
    assert "JSON" in capsys.readouterr().err


def test_other_lists_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("[]", '[{"image": "a.jpg", "annotations": []}]', '{"data": {}}', '[{"x": 1}]'):
        path.write_text(text)
        assert kind_of(path) == "coco"
    (tmp_path / "b.json").write_text(json.dumps([task(COW)]))
    (tmp_path / "labels.csv").write_text("image,labels\n")
    assert (kind_of(tmp_path / "b.json"), kind_of(tmp_path)) == ("label_studio", "folder")


def test_masks_that_were_exported_come_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries, truth = [], {}
    write(tmp_path, [], "images/a.png", "images/barn/b.png")
    for number, name in enumerate(("a", "barn/b")):
        coarse = np.random.default_rng(number).choice([0, 1, 2], size=(12, 16))
        truth[name] = np.kron(coarse, np.ones((4, 4))).astype(np.uint8)
        entry = MaskEntry(name, tmp_path / f"images/{name}.png", tmp_path / f"in/{name}.png")
        write_mask(entry.mask, truth[name])
        entries.append(entry)
    export_masks(entries, ClassTable(("cow", "dog"), (1, 2)), tmp_path / "out", "label-studio")
    path = (tmp_path / "out/tasks.json").rename(tmp_path / "images/tasks.json")
    assert main(["init", str(path), "--weights", "random"]) == 0
    assert "predictions" in capsys.readouterr().out
    masks = painted(path, tmp_path / "masks")
    assert all(iou(masks[name], truth[name]) == 1 for name in truth)


def test_brushes_of_the_converter_of_label_studio(tmp_path: Path) -> None:
    """As its ``mask2rle`` packs them: single values are no runs, and values may be 1."""
    bits = [f"{HALF.size * 4:032b}{7:05b}", *(f"{size - 1:04b}" for size in (3, 4, 8, 16))]
    values = np.repeat(HALF.ravel().astype(int), 4)
    for part in np.split(values, np.flatnonzero(np.diff(values)) + 1):
        bits.append(f"111{len(part) - 2:016b}{part[0]:08b}" + f"000000{part[0]:08b}")
    text = "".join(bits)
    text += "0" * (8 - len(text) % 8)
    rle = [int(text[n : n + 8], 2) for n in range(0, len(text), 8)]
    path = write(tmp_path, [task(result("brushlabels", {"format": "rle", "rle": rle}, "cow"))])
    assert iou(painted(path, tmp_path / "masks")["a"], HALF.astype(np.uint8)) == 1


def test_regions_without_a_label_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"id": "p", "from_name": "shape", "type": "polygon", "value": POLYGON}
    labelled = task(shape, result("labels", POLYGON, "cow", id="p"))
    bare = task({**shape, "id": "q"}, image="b.jpg", id=2)
    path = write(tmp_path, [labelled, bare], "a.jpg", "b.jpg")
    assert main(["init", str(path), "--weights", "random"]) == 0
    assert "without a label, which give none: 1 (task 2)" in capsys.readouterr().out
