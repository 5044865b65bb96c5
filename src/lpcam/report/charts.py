"""Line charts of the report: threshold curves and training curves, with a text and a table each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from lpcam.evaluation.judge import THRESHOLDS

#: For each method, ``thresholds`` and the scores at them by name, as fractions.
Curves = Mapping[str, Mapping[str, Sequence[float]]]
#: Records of each training by name: ``step``, ``loss`` and other values.
Records = Mapping[str, Sequence[Mapping[str, Any]]]
_WIDTH, _HEIGHT = 340.0, 240.0  # of a chart's view box
_LEFT, _RIGHT, _TOP, _BOTTOM = 38.0, 10.0, 12.0, 34.0  # margins around the lines
_CURVES = {"miou": "mIoU", "precision": "Precision", "recall": "Recall"}
_TRAINING_CURVES = {"loss": ("Loss", 1.0), "validation_miou": ("mIoU on the test list", 100.0)}
_TABLE_ROWS = 20  # about so many of a training's table, besides those with a validation
_MARKED = 16  # points of a training's line up to which each one is marked
# method, index of its colour, points in the units of the data, and marks: best or fixed, and where
_Line = tuple[str, int, Sequence[tuple[float, float]], Sequence[tuple[str, float, float]]]


def _chart(
    title: str, axis: str, lines: Sequence[_Line], text: str, *, right: float, unit: str
) -> dict[str, Any]:
    """A chart in the units of its view box; its horizontal axis ends at ``right``."""
    rise = _tick(max((y for _, _, points, _ in lines for _, y in points), default=0))
    wide = _tick(right)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(_LEFT + x / right * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - y / (4 * rise) * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    drawn = []
    for method, colour, points, marks in lines:
        path = " ".join("{:g},{:g}".format(*place(*point)) for point in points)
        placed = [(kind, *place(x, y)) for kind, x, y in marks]
        named = [{"kind": kind, "x": x, "y": y} for kind, x, y in placed]
        drawn.append({"method": method, "place": colour, "points": path, "marks": named})
    columns = [n * wide for n in range(5) if n * wide <= right]
    return {
        "title": title,
        "axis": axis,
        "unit": unit,
        "lines": drawn,
        "rows": [{"y": place(0, n * rise)[1], "label": f"{n * rise:g}"} for n in range(5)],
        "columns": [{"x": place(x, 0)[0], "label": f"{x:g}"} for x in columns],
        "bottom": place(0, 0)[1],
        "text": text,
    }


def _tick(largest: float) -> float:
    """A round step such that four steps reach ``largest``: 25 for 80.1, 0.5 for 1.78."""
    if largest <= 0:
        return 0.25
    power = 10.0 ** math.floor(math.log10(largest / 4))
    return next(n * power for n in (1, 1.5, 2, 2.5, 5, 10) if 4 * n * power >= largest * (1 - 1e-9))


def threshold_text(value: float | None) -> str:
    """A threshold in full: two decimals where it is a multiple of 0.01."""
    if value is None:
        return "–"
    return f"{value:.2f}" if math.isclose(value, round(value, 2)) else f"{value:g}"


def threshold_charts(
    curves: Curves,
    fixed: Mapping[str, float],
    place: Callable[[str], int],
    verdicts: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """One chart for each of mIoU, precision and recall against the threshold, in percent.

    ``fixed`` has the threshold of each method, to be marked; ``place`` gives its order and colour.
    ``verdicts`` are on methods whose threshold the judge chose; its curves have a chart beside that
    of the mIoU, or alone.
    """
    charts = []
    for name, title in _CURVES.items() if curves else ():
        lines, words = [], []
        for method in sorted(curves, key=place):
            thresholds, own = curves[method]["thresholds"], fixed[method]
            values = [100 * value for value in curves[method][name]]
            highest = max(range(len(values)), key=values.__getitem__)
            best = max(range(len(values)), key=curves[method]["miou"].__getitem__)
            near, how = _nearest(thresholds, own), "automatic" if method in verdicts else "fixed"
            marks = [("fixed", own, values[near]), ("best", thresholds[best], values[best])]
            points = list(zip(thresholds, values, strict=True))
            lines.append((method, place(method), points, marks))
            words.append(
                f"{method} is highest at {threshold_text(thresholds[highest])} with "
                f"{values[highest]:.1f} percent and has {values[near]:.1f} percent at its {how} "
                f"threshold of {threshold_text(own)}"
            )
        text = f"{title} against the threshold. {'; '.join(words)}."
        charts.append(_chart(title, "threshold", lines, text, right=1.0, unit="%"))
    lines, words = [], []
    for method in sorted(verdicts, key=place):
        own, values = fixed[method], [100 * value for value in verdicts[method]["curve"]]
        marks = [("fixed", own, values[_nearest(THRESHOLDS, own)])]
        points = list(zip(THRESHOLDS, values, strict=True))
        lines.append((method, place(method), points, marks))
        peak, _ = max(points, key=itemgetter(1))
        chosen = threshold_text(own)
        words.append(f"{method} is highest at {peak:.2f}; its automatic threshold is {chosen}")
    if lines:
        text, unit = f"The judge against the threshold. {'; '.join(words)}.", "% of its maximum"
        charts.insert(1, _chart("Judge", "threshold", lines, text, right=1.0, unit=unit))
    return charts


def _nearest(thresholds: Sequence[float], own: float) -> int:
    return min(range(len(thresholds)), key=lambda place: abs(thresholds[place] - own))


def threshold_table(curves: Curves, place: Callable[[str], int]) -> list[dict[str, Any]]:
    """The curves at every multiple of 0.05 of the threshold."""
    columns = [
        {
            round(threshold, 2): {name: curves[method][name][n] for name in _CURVES}
            for n, threshold in enumerate(curves[method]["thresholds"])
            # a fixed threshold such as 0.302 is in the curves too
            if math.isclose(20 * threshold, round(20 * threshold), abs_tol=1e-6)
        }
        for method in sorted(curves, key=place)
    ]
    thresholds = sorted({threshold for column in columns for threshold in column})
    return [{"threshold": t, "values": [own.get(t, {}) for own in columns]} for t in thresholds]


def training_charts(
    history: Records, teachers: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One chart for each recorded curve against the training step.

    ``teachers`` have the ``name`` in the history, ``title`` and ``place`` of each training.
    """
    last = max((r["step"] for one in teachers for r in history.get(one["name"], ())), default=0)
    charts = []
    for name, (title, factor) in _TRAINING_CURVES.items():
        lines, words = [], []
        for one in teachers:
            records = history.get(one["name"], ())
            points = [(r["step"], factor * r[name]) for r in records if r.get(name) is not None]
            if not points:
                continue
            marks = [("best", *point) for point in points] if len(points) <= _MARKED else []
            lines.append((one["title"], one["place"], points, marks))
            (first, start), (end, value) = points[0], points[-1]
            words.append(
                f"{one['title']} goes from {start:.3g} at step {first} to {value:.3g} at step {end}"
            )
        if lines:
            text = f"{title} against the training step. {'; '.join(words)}."
            unit = "%" if factor > 1 else ""
            charts.append(_chart(title, "step", lines, text, right=last, unit=unit))
    return charts


def training_table(history: Records, teachers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records of each training at about `_TABLE_ROWS` even steps, and at every validation."""
    at = [{r["step"]: r for r in history.get(one["name"], ())} for one in teachers]
    steps = sorted({step for own in at for step in own})
    every = max(1, len(steps) // _TABLE_ROWS)
    tested = {s for own in at for s, r in own.items() if r.get("validation_miou") is not None}
    chosen = {*steps[::every], *steps[-1:], *tested}
    return [{"step": s, "values": [own.get(s, {}) for own in at]} for s in sorted(chosen)]
