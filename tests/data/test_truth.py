"""Masks of a folder."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from lpcam.data.dataset import ClassTable, Dataset, Item
from lpcam.data.masks import with_mask_folder, write_mask
from lpcam.runtime.errors import DataError


def dataset(*ids: str) -> Dataset:
    items = {name: Item(name, Path(f"{name}.jpg"), (0,), Path("old.png")) for name in ids}
    return Dataset("d", ClassTable(("cow",), (1,)), items, {"all": ids}, "labels")


def test_masks_are_found_by_id_and_by_the_numbers_of_coco(tmp_path: Path) -> None:
    names = ["barn/cow 7", "COCO_train2014_000000000009", "COCO_train2014_000000000010", "other"]
    for name in ("barn/cow 7", "9", "000000000010"):
        write_mask(tmp_path / f"{name}.png", np.zeros((2, 2), np.uint8))
    found = with_mask_folder(dataset(*names), tmp_path)
    masks = [found.items[name].mask for name in names]
    expected = [tmp_path / f"{name}.png" for name in ("barn/cow 7", "9", "000000000010")]
    assert masks == [*expected, None]  # an image of another has none, not the old one


def test_endings_in_capitals_and_decomposed_names_are_read(tmp_path: Path) -> None:
    names = ["Kühe/Kälbchen 1", "cow.2"]
    mask = np.zeros((2, 2), np.uint8)
    files = [tmp_path / f"{unicodedata.normalize('NFD', names[0])}.png", tmp_path / "cow.2.PNG"]
    for path in files:
        write_mask(path.with_suffix(".png"), mask)
        path.with_suffix(".png").rename(path)
    found = with_mask_folder(dataset(*names), tmp_path)
    assert [found.items[name].mask for name in names] == files


def test_a_folder_without_masks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing"):
        with_mask_folder(dataset("a"), tmp_path / "missing")
    write_mask(tmp_path / "b.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(DataError, match=r"a\.png"):
        with_mask_folder(dataset("a"), tmp_path)
