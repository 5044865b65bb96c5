"""The sheet of pictures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.data.dataset import Item
from lpcam.data.drawing import CELL, GAP, TITLE, SheetRow, choose_rows, overlay_mask, sheet


def item(name: str, *labels: int) -> Item:
    return Item(name, Path(), labels)


def test_choose_rows_takes_classes_in_turn_and_an_image_once() -> None:
    items = [item("a", 0, 2), item("b", 0), item("c"), item("d", 0), item("e", 2), item("f", 1)]
    rows = [(chosen.id, index) for chosen, index in choose_rows(items, 9)]
    assert rows == [("a", 0), ("f", 1), ("e", 2), ("b", 0), ("d", 0)]
    assert [(i.id, n) for i, n in choose_rows(items, 2)] == [("a", 0), ("f", 1)]
    assert choose_rows(items, 0) == []
    assert choose_rows([item("c")], 3) == []


def row(*, truth: bool, size: tuple[int, int] = (100, 200)) -> SheetRow:
    rng = np.random.default_rng(0)
    image = np.full((*size, 3), 40, np.uint8)
    seed = np.zeros(size, np.uint8)
    seed[:50] = 1
    cam = np.zeros(size, np.float32)
    lpcam = rng.random(size).round().astype(np.float32)
    return SheetRow(image, "cow", cam, lpcam, seed, seed if truth else None)


@pytest.mark.parametrize("truth", [False, True])
def test_sheet_has_a_column_for_each_picture(*, truth: bool) -> None:
    picture = Image.open(io.BytesIO(sheet([row(truth=truth), row(truth=False, size=(200, 20))])))
    columns = 5 if truth else 4
    assert picture.size == (columns * (CELL + GAP) + GAP, TITLE + 2 * (CELL + GAP) + GAP)
    assert picture.mode == "RGB"
    pixels = np.array(picture)

    def at(number: int, column: int, y: int, x: int) -> list[int]:
        top, left = TITLE + number * (CELL + GAP), GAP + column * (CELL + GAP)
        found: list[int] = pixels[top + y, left + x].tolist()
        return found

    # the wide image of 100 x 200 fills the width and is centred in height
    assert at(0, 0, 100, 180) == [40, 40, 40]
    assert at(0, 0, 20, 180) == at(0, 0, 180, 180) == [255, 255, 255]
    seed = overlay_mask(np.full((1, 1, 3), 40, np.uint8), np.ones((1, 1), np.uint8))
    for column in (3, 4)[: columns - 3]:
        assert at(0, column, 80, 180) == seed[0, 0].tolist()
        assert at(0, column, 120, 180) == [40, 40, 40]
    # the second row has no truth and is centred in width
    assert at(1, 0, 100, 100) == [40, 40, 40]
    if truth:
        assert at(1, 4, 100, 100) == [255, 255, 255]


def test_the_map_of_a_sheet_has_the_title_of_its_method() -> None:
    one, other = (
        np.array(Image.open(io.BytesIO(sheet([row(truth=True)], **title))))
        for title in ({}, {"map_title": "LPCAM-E"})
    )
    y, x = np.nonzero((one != other).any(axis=2))
    assert y.max() < TITLE
    assert 2 <= x.min() / (CELL + GAP) < x.max() / (CELL + GAP) < 3
