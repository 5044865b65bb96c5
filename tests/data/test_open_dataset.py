"""What kind of data set a path is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import draw_folder

from lpcam.data.images import upright_size
from lpcam.data.open_dataset import kind_of, open_dataset
from lpcam.runtime.errors import DataError


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("labels.csv", "folder"),
        ("cow/1.jpg", "folder"),
        ("ImageSets/Segmentation/train.txt", "voc"),
        ("VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt", "voc"),
        ("annotations/instances_train2014.json", "coco"),
        ("train/_annotations.coco.json", "coco"),
    ],
)
def test_kinds(file: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    assert kind_of(tmp_path) == kind


def test_labels_of_its_own_make_a_folder_whatever_else_it_holds(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_x.json").write_text("{}")
    assert kind_of(tmp_path) == "coco"
    (tmp_path / "labels.jsonl").write_text("")
    assert kind_of(tmp_path) == "folder"


def test_paths_that_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"a\.txt"):
        kind_of(tmp_path / "a.txt")
    with pytest.raises(DataError, match="gone"):
        kind_of(tmp_path / "gone")
    assert kind_of(tmp_path) == "folder"
    (tmp_path / "b.json").write_text("{}")
    assert kind_of(tmp_path / "b.json") == "coco"


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "",
        '{"files": 3, "images": 12, "annotations": 7}',
        '{"images": [], "text": "annotations: ["}',
    ],
)
def test_a_json_of_something_else_does_not_make_a_folder_cocos(
    content: str, tmp_path: Path
) -> None:
    for name in ("meta.json", "annotations.json"):
        (tmp_path / name).write_text(content)
        assert kind_of(tmp_path) == "folder"


@pytest.mark.parametrize(
    "content",
    [
        '{"images": [], "annotations": [], "categories": []}',
        '\ufeff{"info": {"a": ["}"]}, "annotations" :\n [{"id": "{\\""}], "images":[]',
        # what is large may stand in front of the other
        '{"annotations": [' + ", ".join(["1"] * 2**19) + '], "images": []}',
    ],
)
def test_a_json_with_images_and_annotations_makes_a_folder_cocos(
    content: str, tmp_path: Path
) -> None:
    (tmp_path / "meta.json").write_text("{}")
    (tmp_path / "mine.json").write_text(content, "utf-8")
    assert kind_of(tmp_path) == "coco"


def test_the_truth_of_annotations_is_opened_too(tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "boxes", count=3) / "images"
    size = upright_size(images / "i00.png")
    shape = {"size": [*size], "counts": [0, size[0] * size[1]]}
    one = {"id": 1, "image_id": 1, "category_id": 4, "iscrowd": 0, "segmentation": shape}
    content = {
        "images": [{"id": 1, "file_name": "i00.png", "height": size[0], "width": size[1]}],
        "annotations": [one],
        "categories": [{"id": 4, "name": "cow"}],
    }
    (images / "a.json").write_text(json.dumps(content))
    opened = open_dataset(images, "coco")
    dataset, truth = opened.dataset, opened.true_masks
    assert list(dataset.items) == list(truth) == ["i00"]
    mask, faults = truth["i00"]()
    assert mask is not None and mask.shape == size and (mask == 1).all() and faults == ()
    assert not open_dataset(images, "coco", masks=tmp_path / "boxes" / "masks").true_masks
    assert not open_dataset(tmp_path / "boxes").true_masks
    with pytest.raises(DataError, match="val"):
        open_dataset(tmp_path / "boxes", lists=["val"])
