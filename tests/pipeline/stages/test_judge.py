"""What a run takes and tells of a verdict."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lpcam.pipeline.stages.judge import take_verdict


@pytest.mark.parametrize("disagree", [False, True])
def test_a_verdict_is_told_and_doubts_are_warnings(disagree: bool) -> None:
    told: list[Any] = []
    context = SimpleNamespace(
        verdicts={}, warnings=("before",), chose=lambda *one: told.append(one)
    )
    found = {"threshold": 0.44, "by_colours": 0.41, "by_features": 0.62, "disagree": disagree}
    take_verdict(context, "LPCAM-E", found)  # type: ignore[arg-type]
    assert context.verdicts == {"LPCAM-E": found}
    ((key, value, reason),) = told
    assert (key, value) == ("threshold of LPCAM-E", "0.44")
    assert "0.41" in reason and "0.62" in reason
    first, *warned = context.warnings
    assert first == "before" and len(warned) == disagree
    for text in warned:
        assert all(part in text for part in ("LPCAM-E", "0.44", "0.41", "0.62"))


def test_a_verdict_without_features() -> None:
    told: list[Any] = []
    context = SimpleNamespace(verdicts={}, warnings=(), chose=lambda *one: told.append(one))
    found = {"threshold": 0.44, "by_colours": 0.41, "by_features": None, "disagree": False}
    take_verdict(context, "CAM", found)  # type: ignore[arg-type]
    assert told[0][2] == "colours say 0.41" and context.warnings == ()
