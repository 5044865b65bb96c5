"""What a run takes and tells of the judge."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from lpcam.method.settings import LpcamSettings
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
    assert [(key, value) for key, value, _ in context.told] == [
        ("early layers", "none"),
        ("threshold of CAM", "0.44"),
    ]
    assert context.told[1][2] == "colours say 0.41"


def scales_of(
    settings: LpcamSettings, *sizes: tuple[int, int], stride: int | None = 16, limit: int = 1000
) -> tuple[LpcamSettings, list[tuple[str, ...]]]:
    """The settings of a run on images of (height, width), and what it told."""
    told: list[Any] = []
    records = {str(n): {"height": h, "width": w} for n, (h, w) in enumerate(sizes)}
    recipe = SimpleNamespace(
        maps=SimpleNamespace(maximum_side=limit), classifier=SimpleNamespace(output_stride=stride)
    )
    run: Any = SimpleNamespace(records=records, recipe=recipe, chose=lambda *one: told.append(one))
    return Context._with_scales(run, settings), told


ADAPTIVE = LpcamSettings.from_preset("adaptive")


@pytest.mark.parametrize(
    ("side", "stride", "factor"),
    [
        *((64, 16, 3), (100, 16, 2), (200, 16, 1), (500, 16, 1)),
        *((64, 32, 3), (100, 32, 3), (200, 32, 2), (500, 32, 1)),
        (200, None, 2),  # 32 is the usual stride
    ],
)
def test_small_images_are_mapped_at_larger_scales(
    side: int, stride: int | None, factor: int
) -> None:
    """12 cells along the shorter side, by a factor of at most 3."""
    found, ((key, value, reason),) = scales_of(ADAPTIVE, (side, 2 * side), stride=stride)
    assert found.scales == tuple(factor * scale for scale in (1.0, 0.5, 1.5))
    assert "scales" not in found.automatic and "tau" in found.automatic
    assert key == "lpcam.scales"
    assert value == ", ".join(f"{scale:g}" for scale in found.scales)
    assert f"{side} pixels, {side / (stride or 32):.1f} cells" in reason


def test_the_median_of_what_is_mapped_decides_the_scales() -> None:
    found, told = scales_of(ADAPTIVE, (64, 64), (100, 300), (400, 100), (500, 500), (90, 90))
    assert found.scales == (2.0, 1.0, 3.0)
    # images of 4,000 x 1,000 pixels are mapped at 400 x 100
    found, told = scales_of(ADAPTIVE, (1000, 4000), limit=400)
    assert found.scales == (2.0, 1.0, 3.0) and "100 pixels" in told[0][2]


def test_scales_by_hand_stay() -> None:
    own = ADAPTIVE.fixed(scales=(1.0,))
    assert scales_of(own, (64, 64)) == (own, [])


def test_what_a_run_chose(caplog: pytest.LogCaptureFixture) -> None:
    """The last choice of each key, in the order of keys; the first process tells it once."""
    run: Any = SimpleNamespace(choices=[], processes=SimpleNamespace(first=True))
    with caplog.at_level(logging.INFO, "lpcam"):
        Context.chose(run, "threshold of CAM", "0.44", "colours say 0.41")
        Context.chose(run, "lpcam.tau", "0.25", "CAM's threshold, at most 0.25")
        Context.chose(run, "lpcam.tau", "0.25", "CAM's threshold, at most 0.25")
        Context.chose(run, "threshold of CAM", "0.50", "agrees best")
        run.processes.first = False
        Context.chose(run, "lpcam.scales", "1", "large images")
    assert [(one["key"], one["value"], one["reason"]) for one in run.choices] == [
        ("lpcam.scales", "1", "large images"),
        ("lpcam.tau", "0.25", "CAM's threshold, at most 0.25"),
        ("threshold of CAM", "0.50", "agrees best"),
    ]
    assert caplog.messages == [
        "chosen: threshold of CAM = 0.44 (colours say 0.41)",
        "chosen: lpcam.tau = 0.25 (CAM's threshold, at most 0.25)",
        "chosen: threshold of CAM = 0.50 (agrees best)",
    ]
