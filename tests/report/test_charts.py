"""Charts in the units of their view box, by hand."""

from __future__ import annotations

from lpcam.evaluation.judge import THRESHOLDS
from lpcam.report.charts import threshold_charts


def test_the_judge_is_drawn_beside_the_miou() -> None:
    thresholds = [0.0, 0.5, 1.0]
    values = {"miou": [0.0, 0.4, 0.2], "precision": [0.1] * 3, "recall": [0.1] * 3}
    curves = {"CAM": {"thresholds": thresholds, **values}}
    curve = [1.0 if threshold <= 0.5 else 0.5 for threshold in THRESHOLDS]
    verdicts = {"CAM": {"curve": curve}}
    charts = threshold_charts(curves, {"CAM": 0.5}, lambda _: 0, verdicts)
    assert [one["title"] for one in charts] == ["mIoU", "Judge", "Precision", "Recall"]
    (line,) = charts[1]["lines"]
    points = [tuple(map(float, point.split(","))) for point in line["points"].split()]
    # the axis from 0 to 1 is 292 wide from 38; from 0 to 100 % it is 194 high from 206 up
    assert points[0] == (43.8, 12.0) and points[-1] == (324.2, 109.0)
    assert line["marks"] == [{"kind": "fixed", "x": 184.0, "y": 12.0}]
    assert charts[1]["text"].endswith("CAM is highest at 0.02; its automatic threshold is 0.50.")
    alone = threshold_charts({}, {"CAM": 0.5}, lambda _: 0, verdicts)
    assert alone == [charts[1]]
    assert threshold_charts({}, {"CAM": 0.5}, lambda _: 0, {}) == []
