"""Choosing classes: order, mask ids, and the nearest known name in the error."""

from __future__ import annotations

import pytest

from lpcam.data.dataset import ClassTable, choose_classes
from lpcam.runtime.errors import DataError

TABLE = ClassTable(("cat", "cow", "dog"), (8, 10, 12))


def test_chosen_classes_keep_order_and_mask_ids() -> None:
    assert choose_classes(TABLE, ["dog", "cat"]) == ClassTable(("dog", "cat"), (12, 8))
    assert choose_classes(TABLE, None) is TABLE


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["COW"], "'COW' .*'cow'.*cat, cow, dog"),
        (["zebra"], "'zebra'; .*cat, cow, dog"),
        (["cow", "cow"], "class names repeat: cow"),
        ([], "no classes"),
    ],
)
def test_wrong_names(names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        choose_classes(TABLE, names)
