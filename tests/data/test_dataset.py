"""Class tables, data sets and ids: what they accept and the words with which they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.data import dataset as dataset_module
from lpcam.data.dataset import ClassTable, Dataset, DecodedImages, Item, safe_id
from lpcam.data.images import Reading
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


def test_images_are_decoded_once_while_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = {}
    for number in range(3):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.full((4, 5, 3), number, np.uint8)).save(path)
        items[path.stem] = Item(path.stem, path, ())
    dataset = Dataset("d", ClassTable(("cow",), (1,)), items, {}, "t")
    kept = list(dataset.keeping(DecodedImages(2 * 4 * 5 * 3)).items.values())
    assert kept == list(items.values())  # where an image is kept says nothing about it
    for item in kept:
        first = item.read()
        first[:] = 200  # a caller may write to what it got
    seen = []
    read = dataset_module.read_image
    monkeypatch.setattr(dataset_module, "read_image", lambda *a: seen.append(a[0]) or read(*a))
    assert [int(item.read().max()) for item in kept] == [0, 1, 2]
    assert seen == [kept[2].image]
    other = dataset.keeping(DecodedImages(2**20)).read_with(Reading(orientation="stored"))
    assert int(next(iter(other.items.values())).read().max()) == 0
