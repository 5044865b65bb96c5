"""What labels cannot teach: which classes are named, and where nothing is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpcam.data.dataset import ClassTable, Item
from lpcam.data.survey import label_findings


@pytest.mark.parametrize(
    ("labels", "held_out", "expected"),
    [
        (["c"] * 3, "", {"no negatives": ("cow",)}),
        (["c"], "", {"no negatives": ("cow",)}),
        (["cd"] * 3, "", {"no negatives": ("cow", "dog")}),
        (["c", "cd", "cd"], "", {"no negatives": ("cow",)}),
        (["c", "c", ""], "", {}),
        (["c", "d", ""], "", {}),
        (["cd", "cd", ""], "", {"always together": ("cow = dog",)}),
        (["cdh", "dc", "h"], "", {"always together": ("cow = dog",)}),
        (["c"] * 99 + ["d"], "", {"few negatives": ("cow (1)",)}),
        (["c", "d", ""], "cd", {"validation": ("hen",)}),
        (["c", "d", "h"], "c", {"validation": ("cow", "dog", "hen")}),
        (["", ""], "", {}),
        ([], "", {}),
    ],
)
def test_label_findings(
    labels: list[str], held_out: str, expected: dict[str, tuple[str, ...]]
) -> None:
    table = ClassTable(("cow", "dog", "hen"), (1, 2, 3))

    def items(texts: list[str]) -> list[Item]:
        rows = [tuple("cdh".index(letter) for letter in text) for text in texts]
        return [Item(str(n), Path(f"{n}.jpg"), row) for n, row in enumerate(rows)]

    found = label_findings(table, items(labels), items(list(held_out)))
    assert {one.kind: one.names for one in found} == expected
