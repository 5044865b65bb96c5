"""The objects of a mask."""

from __future__ import annotations

import numpy as np
import pytest

from lpcam.data.dataset import ClassTable
from lpcam.formats.masks.base import regions, runs
from lpcam.runtime.errors import DataError

TABLE = ClassTable(("dog", "cow"), (7, 3))
MASK = np.array(
    [
        [0, 7, 0, 255, 3],
        [3, 0, 7, 255, 3],
        [0, 0, 0, 0, 0],
        [0, 7, 7, 0, 0],
    ],
    dtype=np.uint8,
)


def test_one_object_a_class_in_label_order() -> None:
    dog, cow = regions(MASK, TABLE)
    assert (dog.label, dog.x0, dog.y0, dog.width, dog.height, dog.area) == (0, 1, 0, 2, 4, 4)
    assert dog.pixels.tolist() == [[True, False], [False, True], [False, False], [True, True]]
    assert (cow.label, cow.x0, cow.y0, cow.width, cow.height, cow.area) == (1, 0, 0, 5, 2, 3)
    assert (dog.whole((4, 5)) == (MASK == 7)).all()


def test_one_object_a_component_with_its_corner_neighbours() -> None:
    found = regions(MASK, TABLE, instances=True)
    places = [(one.label, one.x0, one.y0, one.area) for one in found]
    assert places == [(0, 1, 0, 2), (0, 1, 3, 2), (1, 4, 0, 2), (1, 0, 1, 1)]
    whole = np.zeros(MASK.shape, dtype=int)
    for one in found:
        whole += one.whole((4, 5)) * TABLE.mask_ids[one.label]
    assert (whole == np.where(MASK == 255, 0, MASK)).all()


def test_evidence_of_the_class_separates_objects_that_touch() -> None:
    mask = np.full((6, 20), 7, dtype=np.uint8)
    mask[:, 16:] = 3
    asked = []

    def evidence(name: str) -> np.ndarray:
        asked.append(name)
        x = np.arange(20)
        return np.tile(np.maximum(np.exp(-((x - 4) ** 2)), np.exp(-((x - 12) ** 2))), (6, 1))

    found = regions(mask, TABLE, instances=True, evidence=evidence)
    assert asked == ["dog", "cow"]
    assert [one.label for one in found] == [0, 0, 1]
    assert (found[0].x0, found[1].x0 + found[1].width, found[2].x0) == (0, 16, 16)
    assert found[0].area + found[1].area == 6 * 16 and abs(found[0].area - found[1].area) <= 12


def test_a_mask_of_nothing_has_no_object() -> None:
    for value in (0, 255):
        mask = np.full((3, 4), value, dtype=np.uint8)
        assert regions(mask, TABLE) == regions(mask, TABLE, instances=True) == []


def test_a_value_of_no_class_is_refused() -> None:
    with pytest.raises(DataError, match=r"\[1, 4\], .*7: 'dog', 3: 'cow'"):
        regions(np.array([[4, 7, 1, 255]], dtype=np.uint8), TABLE)


def test_runs_begin_outside_and_add_up() -> None:
    assert runs(np.array([0, 0, 1, 1, 1, 0], dtype=bool)) == [2, 3, 1]
    assert runs(np.array([1, 1, 0, 1], dtype=bool)) == [0, 2, 1, 1]
    assert runs(np.array([0, 0], dtype=bool)) == [2]
    assert runs(np.array([1], dtype=bool)) == [0, 1]
    assert runs(np.array([], dtype=bool)) == []
