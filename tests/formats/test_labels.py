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
    path = tmp_path / "new" / "labels.csv"
    done = import_labels(source, path, classes=CLASSES)
    assert rows(path) == [
        ["image", "labels"],
        ["2008_000001", "zebra;cow;two, words"],
        ["2007_000032", "cow"],
        ["2007_000033", ""],
    ]
    assert done == f"labels of 3 images in {path}, 1 of them without a label"
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
    for ids, message in (
        (["a"], "has 2 rows"),
        (None, "has 2 rows"),
        (["a", "/b"], "^the list of ids"),
        (["a", "a.jpg"], "^the list of ids"),
    ):
        with pytest.raises(DataError, match=message):
            import_labels(source, tmp_path / "labels.csv", classes=CLASSES, ids=ids)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({1: vector(0)}, "the number 1"),
        ({"a": vector(0)[:2]}, r"\(2,\) for 'a'"),
        ({"a": vector(0)[None]}, r"\(1, 3\) for 'a'"),
        ({"a": [1, 0, 0]}, "list for 'a'"),
        ({"a": vector(0) * np.nan}, "NaN or infinity for 'a'"),
        ({"a.jpg": vector(0), "a": vector(0)}, "'a' twice"),
        ({"../a": vector(0)}, "could leave its folder"),
        ({"a\nb": vector(0)}, r"'a\\nb'"),
        ({"\ud800": vector(0)}, r"'\\ud800'"),
        *((content, "neither") for content in ({}, [vector(0)], "text", np.ones(3))),
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


@pytest.mark.parametrize("classes", [["a;b"], [" a"], [""], ["a\nb"]])
def test_classes_that_a_table_cannot_hold_are_refused(tmp_path: Path, classes: list[str]) -> None:
    with pytest.raises(DataError, match="class"):
        import_labels(tmp_path / "l.npy", tmp_path / "labels.csv", classes=classes)


@pytest.mark.parametrize(
    ("source", "target"),
    [("l.CSV", "new.csv"), ("l.jsonl", "new.csv"), ("missing.npy", "l.txt")],
)
def test_tables_are_not_imported_and_nothing_but_csv_is_written(
    tmp_path: Path, source: str, target: str
) -> None:
    with pytest.raises(DataError, match=rf"{source}|{target}"):
        import_labels(tmp_path / source, tmp_path / target, classes=CLASSES)
