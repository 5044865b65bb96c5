"""AP50 by hand, and the table."""

from __future__ import annotations

import pytest

from benchmarks import objects
from lpcam.method.objects import Box

pytest.importorskip("scipy", reason="SciPy is not installed: pip install 'lpcam[objects]'")


def box(x0: int, x1: int, area: int = 10) -> Box:
    return Box(x0, 0, x1, 1, 1.0, area)


def test_average_precision_by_hand() -> None:
    two = [box(0, 10), box(20, 30)]
    assert objects.average_precision([(two, two)]) == 1.0
    assert objects.average_precision([([box(0, 30)], two)]) == 0.0
    # the second box of the same object is wrong, and so is one of an IoU below 0.5
    assert objects.average_precision([([box(0, 10, 9), box(0, 9, 8)], two)]) == 0.5
    assert objects.average_precision([([box(0, 6)], [box(0, 10)])]) == 1.0
    assert objects.average_precision([([box(0, 4)], [box(0, 10)])]) == 0.0
    # wrong, right, right: precision 0, 1/2, 2/3; the envelope is 2/3
    ranked = [box(40, 50, 9), box(0, 10, 8), box(20, 30, 7)]
    assert objects.average_precision([(ranked, two)]) == pytest.approx(2 / 3)
    # of equal areas the order must not matter
    for one in ([box(40, 50), box(0, 10)], [box(0, 10), box(40, 50)]):
        assert objects.average_precision([(one, [box(0, 10)])]) == 0.5
    assert objects.average_precision([([], two)]) == 0.0


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert objects.main(["--quick", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("## Objects")
    for name in objects.METHODS:
        assert printed.count(f"| {name} |") == 1
    assert "herds, seed 0" in printed and "ordinary, one creature, seed 0" in printed
