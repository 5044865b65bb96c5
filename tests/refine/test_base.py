"""What refinements share."""

from __future__ import annotations

import pytest

from lpcam.refine.base import shifted


@pytest.mark.parametrize(
    ("threshold", "shift", "expected"),
    [
        (0.3, 0.15, 0.45),
        (0.3, -0.1, 0.2),
        (0.9, 0.3, 0.99),
        (0.2, -0.4, 0.01),
        (1 / 3, 0.0, 1 / 3),  # as it was, though it would be rounded
        (0.0, 0.0, 0.0),
    ],
)
def test_a_threshold_that_moves_with_that_of_the_seeds(
    threshold: float, shift: float, expected: float
) -> None:
    assert shifted(threshold, shift) == expected
