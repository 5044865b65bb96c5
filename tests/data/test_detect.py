"""What kind of data set a path is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import draw_folder

from lpcam.data.detect import kind_of, open_dataset
from lpcam.errors import DataError


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
    with pytest.raises(DataError, match=r"a\.txt is a file of no known kind; give a folder"):
        kind_of(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"there is no .*gone; give a folder of images, or a COCO"):
        kind_of(tmp_path / "gone")
    assert kind_of(tmp_path) == "folder"
    (tmp_path / "b.json").write_text("{}")
    assert kind_of(tmp_path / "b.json") == "coco"


def test_all_of_a_data_set_is_opened(tmp_path: Path) -> None:
    folder = open_dataset(draw_folder(tmp_path / "boxes", count=3))
    assert list(folder.items) == ["i00", "i01", "i02"]
    image = {"id": 1, "file_name": "i00.png", "height": 60, "width": 60}
    other = {"id": 2, "file_name": "i01.png", "height": 60, "width": 60}
    cow = [{"id": 4, "name": "cow"}]
    for name, images in (("a", [image]), ("b", [other])):
        (tmp_path / "boxes" / "images" / f"{name}.json").write_text(
            json.dumps({"images": images, "annotations": [], "categories": cow})
        )
    whole = open_dataset(tmp_path / "boxes" / "images", "coco")
    assert {name: len(ids) for name, ids in whole.lists.items()} == {
        **{"a": 1, "b": 1, "all": 2},
        **{"a.labelled": 0, "b.labelled": 0, "all.labelled": 0},
    }
    assert list(open_dataset(tmp_path / "boxes" / "images", "coco", lists=["b"]).items) == ["i01"]
