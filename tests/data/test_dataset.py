"""Class tables, data sets and ids: what they accept and the words with which they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpcam.data.dataset import ClassTable, Dataset, Item, safe_id
from lpcam.runtime.errors import DataError


@pytest.mark.parametrize(
    ("names", "ids", "message"),
    [
        ((), (), "no classes"),
        (("cow", "dog"), (1,), "2 class names but 1 mask ids"),
        (("cow", "cow"), (1, 2), "classes lists 'cow' twice"),
        (("cow", "dog"), (3, 3), "mask ids lists 3 twice"),
        (("cow", "dog"), (0, 255), r"mask ids 0, 255 are outside 1..254"),
    ],
)
def test_class_table_refuses(names: tuple[str, ...], ids: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ClassTable(names, ids)


def test_select_keeps_the_order_of_the_list_and_names_the_lists() -> None:
    items = {name: Item(name, Path(f"{name}.jpg"), (0,)) for name in ("a", "b")}
    dataset = Dataset("d", ClassTable(("cow",), (1,)), items, {"train": ("b", "a")}, "labels.csv")
    assert [item.id for item in dataset.select("train")] == ["b", "a"]
    with pytest.raises(DataError, match=r"'val'.* train"):
        dataset.select("val")


@pytest.mark.parametrize("text", ["2007_000063", "barn/cow 7", "牛", "a..b", "..a", "naïve.v2"])
def test_safe_id_accepts(text: str) -> None:
    assert safe_id(text) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (" cow", "blanks"),
        ("/etc/cow", "absolute"),
        ("barn\\cow", "backslash"),
        ("cow\n7", "control character"),
        ("../cow", "folder"),
        ("barn//cow", "folder"),
        ("./cow", "folder"),
    ],
)
def test_safe_id_refuses(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        safe_id(text)
