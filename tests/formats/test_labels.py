"""Label files of other programs, as the table that this package reads."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lpcam.formats.labels import import_labels
from lpcam.runtime.errors import DataError

CLASSES = ["zebra", "cow", "two, words"]


def saved(path: Path, value: Any) -> Path:
    whole = np.empty((), dtype=object)
    whole[()] = value
    np.save(path, value if isinstance(value, np.ndarray) else whole, allow_pickle=True)
    return path


def rows(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def vector(*labels: int) -> np.ndarray[Any, Any]:
    return np.isin(np.arange(3), labels).astype(np.float32)


def test_a_dictionary_of_numbers_becomes_a_table_in_label_order(tmp_path: Path) -> None:
    labels = {2008000001: vector(0, 1, 2), 2007000032: vector(1), 2007000033: vector()}
    source = saved(tmp_path / "cls_labels.npy", labels)
    done = import_labels(source, tmp_path / "new" / "labels.csv", classes=CLASSES)
    assert rows(done.path) == [
        ["image", "labels"],
        ["2008_000001", "zebra;cow;two, words"],
        ["2007_000032", "cow"],
        ["2007_000033", ""],
    ]
    assert (done.images, done.without_label, done.counts) == (3, 1, (1, 2, 1))
    assert done.summary() == f"labels of 3 images in {done.path}\n1 of them have none"
    # sorted by name, zebra would not have the first mask value
    assert (tmp_path / "new" / "classes.txt").read_text() == "zebra\ncow\ntwo, words\n"


@pytest.mark.parametrize(
    ("key", "split", "name"),
    [
        ("2007_000032", None, "2007_000032"),
        ("2007000032", None, "2007_000032"),
        ("COCO_train2014_000000000009.jpg", None, "COCO_train2014_000000000009"),
        ("COCO_train2014_000000000009", None, "COCO_train2014_000000000009"),
        (9, "train2014", "COCO_train2014_000000000009"),
        (np.int64(581929), "val2014", "COCO_val2014_000000581929"),
        ("barn/Kühe.PNG", None, "barn/Kühe"),
    ],
)
def test_images_are_named_as_the_data_sets_name_them(
    tmp_path: Path, key: Any, split: str | None, name: str
) -> None:
    source = saved(tmp_path / "l.npy", {key: torch.tensor([0.0, 1.0, 0.0])})
    import_labels(source, tmp_path / "labels.csv", classes=CLASSES, coco_split=split)
    assert rows(tmp_path / "labels.csv")[1:] == [[name, "cow"]]


@pytest.mark.parametrize("dtype", ["f4", "u1", "?", "i8"])
def test_an_array_takes_its_names_from_a_list(tmp_path: Path, dtype: str) -> None:
    source = saved(tmp_path / "train_labels.npy", np.array([vector(2), vector(0)]).astype(dtype))
    import_labels(source, tmp_path / "labels.csv", classes=CLASSES, ids=["b", "a"])
    assert rows(tmp_path / "labels.csv")[1:] == [["b", "two, words"], ["a", "zebra"]]
    for ids, given in ((["a"], "1 were given"), (None, "none were given")):
        with pytest.raises(DataError, match=rf"has 2 rows; give as many ids \({given}\)"):
            import_labels(source, tmp_path / "labels.csv", classes=CLASSES, ids=ids)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({1: vector(0)}, "by the number 1, which is not of VOC"),
        ({"a": vector(0)[:2]}, r"has \(2,\) for 'a'; expected one value for each of the 3 classes"),
        ({"a": vector(0)[None]}, r"has \(1, 3\) for 'a'"),
        ({"a": [1, 0, 0]}, "has a list for 'a'"),
        ({"a": vector(0) * np.nan}, "has NaN or infinity for 'a'"),
        ({"a.jpg": vector(0), "a": vector(0)}, "'a' more than once"),
        ({"../a": vector(0)}, "could leave its folder"),
        ({"a\nb": vector(0)}, r"has the name 'a\\nb'; names are printable text"),
        ({"\ud800": vector(0)}, r"has the name '\\ud800'; names are printable text"),
        ({}, "names no image"),
        ([vector(0)], "holds list; expected a dictionary"),
        ("text", "holds str; expected a dictionary"),
        (np.ones(3), r"holds \(3,\); expected a dictionary"),
    ],
)
def test_wrong_contents_are_refused_by_name(tmp_path: Path, content: Any, message: str) -> None:
    source = saved(tmp_path / "l.npy", content)
    with pytest.raises(DataError, match=message):
        import_labels(source, tmp_path / "labels.csv", classes=CLASSES, ids=None)
    assert list(tmp_path.iterdir()) == [source]


def test_other_files_are_not_replaced(tmp_path: Path) -> None:
    source = saved(tmp_path / "l.npy", {"a": vector(1)})
    target = tmp_path / "labels.csv"
    import_labels(source, target, classes=CLASSES)
    import_labels(source, target, classes=CLASSES)  # the same once more
    for name in ("labels.csv", "classes.txt"):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text("mine")
        with pytest.raises(DataError, match=f"{name} is there already with other contents"):
            import_labels(source, target, classes=CLASSES)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).write_bytes(before)


@pytest.mark.parametrize("classes", [[], ["a", "a"], ["a;b"], [" a"], [""], ["a\nb"]])
def test_classes_that_a_table_cannot_hold_are_refused(tmp_path: Path, classes: list[str]) -> None:
    with pytest.raises(DataError, match="class"):
        import_labels(tmp_path / "l.npy", tmp_path / "labels.csv", classes=classes)


def test_the_names_of_a_list_are_not_blamed_on_the_array(tmp_path: Path) -> None:
    source = saved(tmp_path / "l.npy", np.ones((2, 3)))
    for ids, message in (
        (["a", "/b"], r"^the list of ids: image name '/b' is refused"),
        (["a", "a.jpg"], r"^the list of ids .*'a' more than once"),
    ):
        with pytest.raises(DataError, match=message):
            import_labels(source, tmp_path / "labels.csv", classes=CLASSES, ids=ids)


@pytest.mark.parametrize("name", ["labels.CSV", "labels.jsonl"])
def test_a_table_of_text_is_not_imported(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("image,labels\na,cow\n")
    message = rf"{name} is a table of labels already and needs no import; name it in data\.labels"
    with pytest.raises(DataError, match=message):
        import_labels(tmp_path / name, tmp_path / "new.csv", classes=CLASSES)


def test_a_table_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels\.txt"):
        import_labels(tmp_path / "missing.npy", tmp_path / "labels.txt", classes=CLASSES)
