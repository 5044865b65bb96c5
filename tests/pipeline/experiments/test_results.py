"""Rows over seeds, their differences and the width of curves, computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lpcam.pipeline.experiments.definition import Experiment, PlannedRun, plan
from lpcam.pipeline.experiments.results import gather
from lpcam.runtime.files import write_json

THRESHOLDS = [0.1, 0.2, 0.3, 0.4, 0.5]
CURVES = {"CAM": [0.2, 0.4, 0.3, 0.2, 0.1], "LPCAM": [0.3, 0.495, 0.5, 0.492, 0.3]}


def row(method: str, miou: float, source: str | None = "ground truth") -> dict[str, Any]:
    own = {"miou": miou, "fp": 0.25, "fn": 0.5, "precision": 0.75, "recall": 0.5}
    about = {"stage": "seed", "method": method, "images": 5, "threshold": 0.25}
    return {**about, "threshold_source": source, **own, "protocol": {"split": "all"}}


@pytest.fixture
def planned(tmp_path: Path) -> list[PlannedRun]:
    experiment = made()
    found = plan(experiment, "tiny", tmp_path)
    for one in found:
        gain = 0.02 * (one.arm.name == "b") + 0.01 * one.seed
        rows = [row("CAM", 0.3), row("LPCAM", 0.4 + gain), row("LPCAM", 0.1, "fixed")]
        curves = {name: {"thresholds": THRESHOLDS, "miou": own} for name, own in CURVES.items()}
        write_json(one.folder / "metrics.json", {"rows": rows, "curves": curves})
        seconds = {"classify": 10.0 + one.seed, "prototypes": 5.0}
        write_json(one.folder / "use.json", {k: {"seconds": v} for k, v in seconds.items()})
    return found


def made(**values: object) -> Experiment:
    given = {
        "title": "t",
        "about": "a",
        "sizes": {"tiny": {"recipe": "demo", "seeds": [0, 1]}},
        "arms": [{"name": "a"}, {"name": "b", "changes": {"lpcam.tau": 0.2}}],
        "columns": ["miou"],
        "published": {"a / LPCAM": {"miou": 41.0}},
    }
    return Experiment.model_validate({**given, **values})


def done(planned: list[PlannedRun]) -> dict[str, Any]:
    return {one.folder.name: {"status": "done"} for one in planned}


ABOUT = {"experiment": "own", "size": "tiny", "command": "lpcam"}


def test_a_row_has_mean_deviation_and_paired_difference(planned: list[PlannedRun]) -> None:
    experiment = made(against={"LPCAM": "CAM"})
    results = gather(experiment, planned, done(planned), ABOUT)
    cam, lpcam, _, other = results["rows"]
    assert (cam["arm"], cam["method"], cam["against"]) == ("a", "CAM", None)
    assert lpcam["values"]["miou"] == pytest.approx({"mean": 0.405, "sd": 0.005 * 2**0.5, "n": 2})
    assert lpcam["difference"]["miou"]["mean"] == pytest.approx(0.105)
    assert lpcam["published"] == {"miou": 0.41}
    assert lpcam["against"] == "a / CAM"
    assert (lpcam["seeds"], lpcam["runs"]) == ([0, 1], ["a-seed0", "a-seed1"])
    assert other["values"]["miou"]["mean"] == pytest.approx(0.425)
    assert other["published"] == {}
    assert lpcam["protocol"] == {"split": "all"}


def test_arms_are_compared_by_seed(planned: list[PlannedRun]) -> None:
    experiment = made(against_arm="a", methods=["LPCAM"])
    first, second = gather(experiment, planned, done(planned), ABOUT)["rows"]
    assert first["difference"]["miou"] is None
    assert second["difference"]["miou"] == pytest.approx({"mean": 0.02, "sd": 0.0, "n": 2})


def test_the_own_threshold_is_that_of_the_recipe(planned: list[PlannedRun]) -> None:
    experiment = made(thresholds="own")
    rows = gather(experiment, planned, done(planned), ABOUT)["rows"]
    assert [(one["arm"], one["method"]) for one in rows] == [("a", "LPCAM"), ("b", "LPCAM")]
    assert rows[0]["values"]["miou"]["mean"] == pytest.approx(0.1)


def test_a_width_is_the_range_within_a_point_of_the_best(planned: list[PlannedRun]) -> None:
    results = gather(made(), planned, done(planned), ABOUT)
    assert results["widths"]["a / LPCAM"] == pytest.approx(
        {"best": 0.5, "from": 0.2, "to": 0.4, "width": 0.2}
    )
    assert results["widths"]["a / CAM"]["width"] == 0
    assert results["curves"]["a / CAM"]["mean"] == pytest.approx(CURVES["CAM"])


def test_clustering_is_compared_with_the_longest_training(planned: list[PlannedRun]) -> None:
    results = gather(made(), planned, done(planned), ABOUT)
    assert results["clustering_over_training"] == pytest.approx(5 / 11, abs=1e-3)


def test_a_failed_arm_is_named_and_the_others_stay(planned: list[PlannedRun]) -> None:
    state = done(planned)
    for seed in (0, 1):
        state[f"b-seed{seed}"] = {"status": "failed", "reason": "no space"}
    results = gather(made(against_arm="b"), planned, state, ABOUT)
    assert results["failed"] == [{"arm": "b", "seed": s, "reason": "no space"} for s in (0, 1)]
    assert {one["arm"] for one in results["rows"]} == {"a"}
    assert results["rows"][0]["against"] is None
