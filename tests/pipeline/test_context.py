"""What a run takes and tells of the judge."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lpcam.pipeline.context import Context

JUDGED = {"threshold": 0.44, "by_colours": 0.41, "by_features": 0.62, "disagree": False}


@pytest.fixture
def context() -> Any:
    told: list[Any] = []
    return SimpleNamespace(
        verdicts={}, warnings=("before",), told=told, chose=lambda *one: told.append(one)
    )


@pytest.mark.parametrize("disagree", [False, True])
def test_a_verdict_is_told_and_doubts_are_warnings(context: Any, disagree: bool) -> None:
    Context.judge(context, "LPCAM", {**JUDGED, "disagree": disagree})
    assert context.verdicts["LPCAM"]["threshold"] == 0.44
    assert context.told == [("threshold of LPCAM", "0.44", "colours say 0.41, features 0.62")]
    first, *warned = context.warnings
    assert first == "before" and len(warned) == disagree
    for text in warned:
        assert all(part in text for part in ("LPCAM ", "0.41", "0.62"))


def test_a_later_verdict_takes_the_doubt_away(context: Any) -> None:
    for method in ("CAM", "LPCAM", "LPCAM-F"):
        Context.judge(context, method, {**JUDGED, "disagree": True})
    agreement = {"threshold": 0.7, "agreement": 0.5, "disagree": False}
    Context.judge(context, "LPCAM", agreement)
    assert context.verdicts["LPCAM"] == agreement
    assert [text.split(" is ")[0] for text in context.warnings] == [
        *("before", "the threshold of CAM", "the threshold of LPCAM-F")
    ]


def test_a_verdict_without_features(context: Any) -> None:
    Context.judge(context, "CAM", {**JUDGED, "by_features": None})
    assert context.told[0][2] == "colours say 0.41"
