"""Line charts of the report: threshold curves and training curves, with a text and a table each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Records = Mapping[str, Sequence[Mapping[str, Any]]]
"""What was recorded of trainings by name: ``step``, ``loss`` and other values."""
WIDTH, HEIGHT = 340.0, 240.0
"""Size of a chart's view box."""
LEFT, RIGHT, TOP, BOTTOM = 38.0, 10.0, 12.0, 34.0
"""Margins around the lines."""
CURVES = {"miou": "mIoU", "precision": "Precision", "recall": "Recall"}
TRAINING_CURVES = (("loss", "Loss", 1.0), ("validation_miou", "mIoU on the test list", 100.0))
"""Curves of a segmenter's training: name of the value, title, and factor."""
IRN_CURVES = (("loss", "Loss of the refinement’s network", 1.0),)
TABLE_ROWS = 20
"""Approximate rows of a training's table, besides those with a validation."""
MARKED = 16
"""Points of a training's line up to which each one is marked."""


class Line(NamedTuple):
    """One line of a chart, in the units of the data."""

    method: str
    place: int
    """Index of the colour."""
    points: Sequence[tuple[float, float]]
    marks: Sequence[tuple[str, float, float]]
    """``best`` or ``fixed``, and where."""


def _chart(
    title: str, axis: str, lines: Sequence[Line], text: str, *, right: float, unit: str = ""
) -> dict[str, Any]:
    """A chart in the units of its view box; its horizontal axis ends at ``right``."""
    rise = tick(max((y for line in lines for _, y in line.points), default=0))
    wide = tick(right)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(LEFT + x / right * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - y / (4 * rise) * (HEIGHT - TOP - BOTTOM), 1),
        )

    drawn = []
    for line in lines:
        points = [place(x, y) for x, y in line.points]
        marks = [(kind, *place(x, y)) for kind, x, y in line.marks]
        drawn.append(
            {
                "method": line.method,
                "place": line.place,
                "points": " ".join(f"{x:g},{y:g}" for x, y in points),
                "marks": [{"kind": kind, "x": x, "y": y} for kind, x, y in marks],
            }
        )
    return {
        "title": title,
        "axis": axis,
        "unit": unit,
        "lines": drawn,
        "rows": [{"y": place(0, n * rise)[1], "label": f"{n * rise:g}"} for n in range(5)],
        "columns": [
            {"x": place(n * wide, 0)[0], "label": f"{n * wide:g}"}
            for n in range(5)
            if n * wide <= right
        ],
        "bottom": place(0, 0)[1],
        "text": text,
    }


def tick(largest: float) -> float:
    """A round step such that four steps reach ``largest``.

    Example:
        >>> tick(80.1), tick(1.78)
        (25.0, 0.5)
    """
    if largest <= 0:
        return 0.25
    power = 10.0 ** math.floor(math.log10(largest / 4))
    return next(n * power for n in (1, 1.5, 2, 2.5, 5, 10) if 4 * n * power >= largest * (1 - 1e-9))


def threshold_text(value: float | None) -> str:
    """A threshold in full: two decimals where it is a multiple of 0.01.

    Example:
        >>> threshold_text(0.3), threshold_text(0.302)
        ('0.30', '0.302')
    """
    if value is None:
        return "–"
    return f"{value:.2f}" if math.isclose(value, round(value, 2)) else f"{value:g}"


def threshold_charts(
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    fixed: Mapping[str, float],
    place: Callable[[str], int],
) -> list[dict[str, Any]]:
    """One chart for each of mIoU, precision and recall against the threshold, in percent.

    Args:
        curves: for each method ``thresholds`` and the values there, fractions.
        fixed: threshold of each method, to be marked.
        place: gives order and colour of a method.

    Example:
        >>> curve = {"thresholds": [0.0, 0.5], **dict.fromkeys(CURVES, [0.1, 0.6])}
        >>> threshold_charts({"CAM": curve}, {}, lambda method: 0)[0]["text"]
        'mIoU against the threshold. CAM is highest at 0.50 with 60.0 percent.'
    """
    charts = []
    for name, title in CURVES.items() if curves else ():
        lines, words = [], []
        for method in sorted(curves, key=place):
            thresholds = curves[method]["thresholds"]
            values = [100 * value for value in curves[method][name]]
            highest = max(range(len(values)), key=values.__getitem__)
            best = max(range(len(values)), key=curves[method]["miou"].__getitem__)
            at, value = threshold_text(thresholds[highest]), values[highest]
            text = f"{method} is highest at {at} with {value:.1f} percent"
            marks = []
            if method in fixed:
                own = fixed[method]
                near = min(range(len(values)), key=lambda i: abs(thresholds[i] - own))
                marks.append(("fixed", own, values[near]))
                text += f" and has {values[near]:.1f} percent at its fixed threshold of "
                text += threshold_text(own)
            marks.append(("best", thresholds[best], values[best]))
            lines.append(
                Line(method, place(method), list(zip(thresholds, values, strict=True)), marks)
            )
            words.append(text)
        text = f"{title} against the threshold. {'; '.join(words)}."
        charts.append(_chart(title, "threshold", lines, text, right=1.0, unit="%"))
    return charts


def threshold_table(
    curves: Mapping[str, Mapping[str, Sequence[float]]], place: Callable[[str], int]
) -> list[dict[str, Any]]:
    """The curves at every multiple of 0.05 of the threshold.

    Example:
        >>> curve = {"thresholds": [0.05, 0.06], **dict.fromkeys(CURVES, [0.1, 0.6])}
        >>> [row["threshold"] for row in threshold_table({"CAM": curve}, lambda method: 0)]
        [0.05]
    """
    names = sorted(curves, key=place)
    rows: dict[float, list[dict[str, float]]] = {}
    for column, method in enumerate(names):
        for n, threshold in enumerate(curves[method]["thresholds"]):
            # a fixed threshold such as 0.302 is in the curves too
            if math.isclose(20 * threshold, round(20 * threshold), abs_tol=1e-6):
                row = rows.setdefault(round(threshold, 2), [{} for _ in names])
                row[column] = {name: curves[method][name][n] for name in CURVES}
    return [{"threshold": threshold, "values": rows[threshold]} for threshold in sorted(rows)]


def training_charts(
    history: Records,
    teachers: Sequence[Mapping[str, Any]],
    curves: Sequence[tuple[str, str, float]],
) -> list[dict[str, Any]]:
    """One chart for each recorded curve against the training step.

    Args:
        teachers: ``name`` in the history, ``title`` and ``place`` of each training.
        curves: name of the value, title, and factor.

    Example:
        >>> history = {"cam": [{"step": 1, "loss": 2.0}, {"step": 9, "loss": 0.5}]}
        >>> teachers = [{"name": "cam", "title": "CAM", "place": 0}]
        >>> training_charts(history, teachers, IRN_CURVES)[0]["text"].split(". ")[1]
        'CAM goes from 2 at step 1 to 0.5 at step 9.'
    """
    last = max((r["step"] for one in teachers for r in history.get(one["name"], ())), default=0)
    charts = []
    for name, title, factor in curves:
        lines, words = [], []
        for one in teachers:
            records = history.get(one["name"], ())
            points = [(r["step"], factor * r[name]) for r in records if r.get(name) is not None]
            if not points:
                continue
            marks = [("best", *point) for point in points] if len(points) <= MARKED else []
            lines.append(Line(one["title"], one["place"], points, marks))
            (first, start), (end, value) = points[0], points[-1]
            words.append(
                f"{one['title']} goes from {start:.3g} at step {first} to {value:.3g} at step {end}"
            )
        if lines:
            text = f"{title} against the training step. {'; '.join(words)}."
            unit = "%" if factor != 1 else ""
            charts.append(_chart(title, "step", lines, text, right=last, unit=unit))
    return charts


def training_table(
    title: str, history: Records, teachers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Losses at about `TABLE_ROWS` evenly spaced steps, and every validation.

    Example:
        >>> history = {"cam": [{"step": 1, "loss": 2.0}, {"step": 9, "loss": 0.5}]}
        >>> table = training_table("IRN", history, [{"name": "cam", "title": "CAM"}])
        >>> [row["step"] for row in table["rows"]]
        [1, 9]
    """
    at = {one["name"]: {r["step"]: r for r in history.get(one["name"], ())} for one in teachers}
    records = [record for own in at.values() for record in own.values()]
    steps = sorted({record["step"] for record in records})
    every = max(1, len(steps) // TABLE_ROWS)
    tested = {r["step"] for r in records if r.get("validation_miou") is not None}
    chosen = [s for n, s in enumerate(steps) if n % every == 0 or s == steps[-1] or s in tested]
    return {
        "title": title,
        "scored": bool(tested),
        "names": [one["title"] for one in teachers],
        "rows": [
            {"step": step, "values": [at[one["name"]].get(step, {}) for one in teachers]}
            for step in chosen
        ],
    }
