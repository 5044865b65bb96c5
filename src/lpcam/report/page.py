"""The report's page: one self-contained HTML file from the report's data.

The tables and charts are made here, so that they are there without JavaScript and on paper; the
viewer, the prototypes and the confusing classes are drawn by `page.js` from the data in the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from lpcam.errors import ArtefactError
from lpcam.masks import HEAT

METRICS = ("miou", "fp", "fn", "precision", "recall")
"""Columns of the headline table, as they stand in a row."""

_DRAWN = ("methods", "fixed", "classes", "images", "highlights", "prototypes", "confusions")
"""What `page.js` needs of the data; the rest is in the page as tables."""

_PROTOCOL_LABELS = {
    "dataset": "Data set",
    "split": "Images scored: list",
    "images": "Images scored: number",
    "labels": "Source of the labels",
    "prototypes_list": "Prototypes made from list",
    "preset": "Preset",
    "changed_from_preset": "Changed from the preset",
    "thresholds": "Fixed thresholds",
    "scales": "Scales of an image",
    "flip": "Mirror image too",
    "crf": "CRF refinement",
    "refine": "Refinement of the maps",
    "void": "Void policy",
    "maps": "Maps stored as",
    "features": "Features stored as",
    "precision": "Precision of the passes",
    "maximum_side": "Longest side of an image",
    "seed": "Seed of random numbers",
}
_PROTOCOL_WIDE = {
    "classifier": "Classifier",
    "host": "Host",
    "refine": _PROTOCOL_LABELS["refine"],
    "versions": "Versions",
}
_PROTOCOL_ELSEWHERE = {"command", "threshold", "threshold_source", "classes"}

_SOURCES = {
    "ground truth": "Each method at its own best threshold",
    "fixed": "Each method at its fixed threshold",
}


def render(data: Mapping[str, Any]) -> str:
    """Make the page.

    Every text in the data is taken as text, whatever it holds, and the page loads nothing: styles,
    script and pictures are in it, and its content security policy forbids all else.

    Args:
        data: the report's data, format 1, as :mod:`lpcam.report.collect` makes it.

    Returns:
        one HTML document; equal data give equal text.

    Raises:
        ArtefactError: if the data hold what JSON does not have, such as NaN.
    """
    segmenters = _segmenters(data)
    style, script = _part("page.css"), _part("page.js")
    if segmenters is not None:
        style += _part("page.segmenters.css")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    groups = _groups(data["rows"], data["methods"])
    page = _template().render(
        data=data,
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        drawn=_json(data),
        groups=groups,
        headline=groups[0] if groups else None,
        protocol=_protocol(data, groups),
        panels=_panels(data["curves"], data["fixed"], data["methods"]),
        curve_rows=_curve_rows(data["curves"], data["methods"]),
        per_class=_per_class(groups, data),
        parts=_parts(groups),
        segmenters=segmenters,
        stages=_stages(data["stages"]),
    )
    # file names may hold bytes that no text has; they would not be written
    return page.encode("utf-8", "replace").decode("utf-8")


def _part(name: str) -> str:
    return resources.files("lpcam.report").joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(data: Mapping[str, Any]) -> Markup:
    """What the script draws, as JSON that cannot end its script element."""
    drawn = {name: data[name] for name in _DRAWN} | {"heat": HEAT.astype(int).tolist()}
    try:
        text = json.dumps(drawn, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ArtefactError(
            f"the report's data are no JSON: {error}; give finite numbers, text, lists and "
            "dictionaries only"
        ) from error
    for sign in "<>&":  # all else that could matter is outside ASCII and already escaped
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_part),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=_percent,
        points=_points,
        plain=_plain,
        threshold=_threshold,
        seconds=_seconds,
        memory=_memory,
    )
    return environment.get_template("page.html.jinja")


# -- Figures in words --------------------------------------------------------------------------


def _percent(fraction: float | None) -> str:
    """A fraction in percent with one decimal, without the sign."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def _points(difference: float) -> str:
    """A difference of two fractions in percentage points, always with its sign."""
    text = f"{100 * difference:+.1f}"
    return "±0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def _threshold(value: float | None) -> str:
    """A threshold in full: two decimals where it is a multiple of 0.01."""
    if value is None:
        return "–"
    return f"{value:.2f}" if math.isclose(value, round(value, 2)) else f"{value:g}"


def _plain(value: Any) -> str:
    """A value of the protocol in words."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{_words(k)} {_plain(v)}" for k, v in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_plain(one) for one in value) or "none"
    return str(value)


def _words(name: object) -> str:
    return str(name).replace("_", " ")


def _seconds(value: float) -> str:
    if value < 100:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _memory(count: int | None) -> str:
    if count is None:
        return "–"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


# -- The headline table and its protocol -------------------------------------------------------


def _groups(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Rows that may be compared: of one stage and one way to choose the threshold.

    The difference of a row is to the baseline of its group: the first of the run's methods, or what
    came of its maps ("CAM + IRN").
    """
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["stage"], row["threshold_source"]), []).append(row)
    order = {source: place for place, source in enumerate(_SOURCES)}
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    groups = []
    for stage, source in sorted(
        found, key=lambda key: (stages.index(key[0]), order.get(key[1], len(order)), key[1])
    ):
        members = sorted(found[stage, source], key=lambda row: _place(row["method"], methods))
        base = next((row for row in members if _seed_method(row["method"]) == methods[0]), None)
        lines: list[dict[str, Any]] = []
        for row in members:
            gains = {}
            if base is not None and row is not base:
                gains = {name: row[name] - base[name] for name in METRICS}
            lines.append({"row": row, "gains": gains, "place": _place(row["method"], methods)})
        ranked = [line for line in lines if line["place"] < len(methods)]
        groups.append(
            {
                "stage": _stage_title(stage, members) if len(stages) > 1 else "",
                "source": source,
                "title": _SOURCES.get(source, f"Threshold: {source}"),
                "how": members[0].get("protocol", {}).get("threshold_source", ""),
                "lines": lines,
                "base": base,
                "last": ranked[-1] if ranked else lines[-1],
            }
        )
    return groups


def _stage_title(stage: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """What the rows of a stage score, in plain words."""
    if stage == "seed":
        return "Seeds: the maps as they are, without refinement"
    if stage != "pseudo":
        return stage
    ways = sorted({way for row in rows if (way := row["method"].partition(_JOINT)[2])})
    return "Pseudo masks: the maps after refinement" + (f" ({', '.join(ways)})" if ways else "")


_JOINT = " + "
"""Between a method and what refined its maps, as in "LPCAM + IRN"."""


def _seed_method(name: str) -> str:
    return name.partition(_JOINT)[0]


def _place(method: str, methods: Sequence[str]) -> int:
    """Of a method among those of the run; refined maps stand where their method does."""
    own = _seed_method(method)
    return methods.index(own) if own in methods else len(methods)


def _protocol(data: Mapping[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    given: dict[str, Any] = dict(data["protocol"])
    if groups and "images" in groups[0]["lines"][0]["row"]:
        given.setdefault("images", groups[0]["lines"][0]["row"]["images"])
    else:
        given.setdefault("images", data["images_total"])
    if data["fixed"]:
        given["thresholds"] = {f"{name}:": value for name, value in data["fixed"].items()}
    known = [name for name in _PROTOCOL_LABELS if name in given]
    known = [n for n in known if n not in _PROTOCOL_WIDE or not isinstance(given[n], Mapping)]
    used = {*known, *_PROTOCOL_WIDE, *_PROTOCOL_ELSEWHERE}
    short = [(_PROTOCOL_LABELS[name], given[name]) for name in known]
    short += [(_words(name).capitalize(), given[name]) for name in given if name not in used]
    wide = [
        (label, list(_flat(given[name])))
        for name, label in _PROTOCOL_WIDE.items()
        if isinstance(given.get(name), Mapping)
    ]
    return {"short": short, "wide": wide}


def _flat(values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    several = sum(isinstance(value, Mapping) for value in values.values()) > 1
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            whose = f"{_words(name)}: " if several else ""
            yield from ((whose + _words(inner), one) for inner, one in value.items())
        else:
            yield _words(name), value


# -- Threshold curves --------------------------------------------------------------------------

_WIDTH, _HEIGHT = 340.0, 240.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 38.0, 10.0, 12.0, 34.0


def _panels(
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    fixed: Mapping[str, float],
    methods: Sequence[str],
) -> list[dict[str, Any]]:
    """One chart a metric: lines, marks and grid in the units of the chart's view box."""
    if not curves:
        return []
    panels = []
    for name, title in (("miou", "mIoU"), ("precision", "Precision"), ("recall", "Recall")):
        largest = max(max(curve[name], default=0.0) for curve in curves.values())
        top = next(limit for limit in (0.2, 0.4, 0.6, 0.8, 1.0) if largest <= limit or limit == 1)

        def x(threshold: float) -> float:
            return round(_LEFT + threshold * (_WIDTH - _LEFT - _RIGHT), 1)

        def y(value: float, top: float = top) -> float:
            return round(_HEIGHT - _BOTTOM - value / top * (_HEIGHT - _TOP - _BOTTOM), 1)

        lines = []
        for method in sorted(curves, key=lambda one: _place(one, methods)):
            thresholds, values = curves[method]["thresholds"], curves[method][name]
            points = list(zip(thresholds, values, strict=True))
            marks = []
            if method in fixed and points:
                near = min(points, key=lambda point: abs(point[0] - fixed[method]))
                marks.append({"kind": "fixed", "x": x(fixed[method]), "y": y(near[1])})
            if points:
                best = max(range(len(points)), key=lambda i: curves[method]["miou"][i])
                marks.append({"kind": "best", "x": x(points[best][0]), "y": y(points[best][1])})
            lines.append(
                {
                    "method": method,
                    "place": _place(method, methods),
                    "points": " ".join(f"{x(a):g},{y(b):g}" for a, b in points),
                    "marks": marks,
                }
            )
        panels.append(
            {
                "title": title,
                "lines": lines,
                "rows": [
                    {"y": y(top * step / 4), "label": f"{100 * top * step / 4:.0f}"}
                    for step in range(5)
                ],
                "columns": [{"x": x(step / 4), "label": f"{step / 4:g}"} for step in range(5)],
                "bottom": y(0),
                "text": _curve_text(title, name, curves, fixed, methods),
            }
        )
    return panels


def _curve_text(
    title: str,
    name: str,
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    fixed: Mapping[str, float],
    methods: Sequence[str],
) -> str:
    """The chart in words."""
    told = []
    for method in sorted(curves, key=lambda one: _place(one, methods)):
        thresholds, values = curves[method]["thresholds"], curves[method][name]
        if not thresholds:
            continue
        at = max(range(len(values)), key=values.__getitem__)
        best = _percent(values[at])
        text = f"{method} is highest at {_threshold(thresholds[at])} with {best} percent"
        if method in fixed:
            near = min(range(len(values)), key=lambda i: abs(thresholds[i] - fixed[method]))
            text += f" and has {_percent(values[near])} percent at its fixed threshold of "
            text += _threshold(fixed[method])
        told.append(text)
    return f"{title} against the threshold. {'; '.join(told)}."


def _curve_rows(
    curves: Mapping[str, Mapping[str, Sequence[float]]], methods: Sequence[str]
) -> list[dict[str, Any]]:
    """The curves as a table: every twentieth of the axis."""
    names = sorted(curves, key=lambda one: _place(one, methods))
    rows: dict[float, dict[str, dict[str, float]]] = {}
    for method in names:
        curve = curves[method]
        for place, threshold in enumerate(curve["thresholds"]):
            # a fixed threshold such as 0.302 is in the curves as well
            if math.isclose(20 * threshold, round(20 * threshold), abs_tol=1e-6):
                at = rows.setdefault(round(threshold, 2), {})
                at[method] = {k: curve[k][place] for k in ("miou", "precision", "recall")}
    return [
        {"threshold": threshold, "values": [rows[threshold].get(name, {}) for name in names]}
        for threshold in sorted(rows)
    ]


# -- Bars --------------------------------------------------------------------------------------


def _per_class(groups: list[dict[str, Any]], data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """IoU, FP and FN of each class and method of the first group, largest gain first."""
    if not groups:
        return []
    lines = groups[0]["lines"]
    colours = {one["name"]: one["color"] for one in data["classes"]}
    names = list(dict.fromkeys(name for line in lines for name in line["row"]["per_class"]))
    found = []
    for name in names:
        bars = [
            {
                "method": line["row"]["method"],
                "place": line["place"],
                **{k: line["row"]["per_class"][name][k] for k in ("iou", "fp", "fn")},
            }
            for line in lines
            if name in line["row"]["per_class"]
        ]
        gain = None
        if groups[0]["base"] is not None and len(bars) == len(lines) > 1:
            own = groups[0]["last"]["row"]["per_class"][name]["iou"]
            gain = own - groups[0]["base"]["per_class"][name]["iou"]
        found.append({"name": name, "color": colours.get(name), "bars": bars, "gain": gain})
    found.sort(key=lambda one: -1e9 if one["gain"] is None else one["gain"], reverse=True)
    return found


def _parts(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Coverage of each part and method of the first group; empty where there are no parts."""
    if not groups:
        return []
    lines: list[dict[str, Any]] = groups[0]["lines"]
    names = dict.fromkeys(name for line in lines for name in line["row"].get("part_coverage", {}))
    found = []
    for name in names:
        bars = [
            {
                "method": line["row"]["method"],
                "place": line["place"],
                "value": line["row"]["part_coverage"][name],
            }
            for line in lines
            if name in line["row"].get("part_coverage", {})
        ]
        gain = None
        if groups[0]["base"] is not None and len(bars) == len(lines) > 1:
            own = groups[0]["last"]["row"]["part_coverage"][name]
            gain = own - groups[0]["base"]["part_coverage"][name]
        found.append({"name": name, "bars": bars, "gain": gain})
    return found


# -- Segmenters --------------------------------------------------------------------------------

_TABLE_ROWS = 20
"""Of a training's table, about; beside those with a validation."""
_MARKED = 16
"""Points of a line, at most, that are marked one by one."""
_CURVES = (("loss", "Loss", 1.0), ("validation_miou", "mIoU on the list to test", 100.0))
"""What is drawn of a training: its name in the history, a title, and the factor of its unit."""
_IRN_CURVES = (("loss", "Loss of IRN’s boundaries", 1.0),)


def _segmenters(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the section on segmenters shows; None where the run has none."""
    given = data.get("segmenters")
    if given is None:
        return None
    methods = data["methods"]
    teachers = sorted(
        ({**one, "place": _place(one["title"], methods)} for one in given["teachers"]),
        key=lambda one: one["place"],
    )
    groups = _segmenter_groups(given["rows"], teachers)
    irn = [one for one in teachers if given["irn_history"].get(one["name"])]
    histories = [_history_table("Training of the segmenters", given["history"], teachers)]
    if irn:
        histories.append(_history_table("Training of IRN", given["irn_history"], irn))
    settings = given["settings"]
    return {
        "given": given,
        "teachers": teachers,
        "groups": groups,
        # the last group is what comes out in the end: after the CRF, where there is one
        "per_class": _per_class(groups[-1:], data),
        "facts": [(_words(k).capitalize(), v) for k, v in settings.items() if not _is_group(v)],
        "wide": [
            (_words(k).capitalize(), list(_flat(v))) for k, v in settings.items() if _is_group(v)
        ],
        "charts": [
            *_learning(given["history"], teachers, _CURVES),
            *_learning(given["irn_history"], irn, _IRN_CURVES),
        ],
        "histories": histories,
        "scored": histories[0]["scored"],
        "pictures": _picture_groups(given["images"], teachers),
        "swatches": _swatches(given["images"], data["classes"]),
        "truth": any(one["truth"] for one in given["images"]),
        "ignored": any(one["truth"] and one["truth"]["ignored"] for one in given["images"]),
    }


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _segmenter_groups(
    rows: Sequence[Mapping[str, Any]], teachers: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rows without a CRF, then those with one; differences are to the first teacher, CAM's.

    Of the others that of LPCAM stands for its group.
    """
    by_name = {one["name"]: one for one in teachers}
    groups = []
    for crf in (False, True):
        found = {row["teacher"]: row for row in rows if row["crf"] == crf}
        own = [found[name] for name in by_name if name in found]
        if not own:
            continue
        lines: list[dict[str, Any]] = []
        own = [{**row, "method": by_name[row["teacher"]]["title"]} for row in own]
        base = next((row for row in own if row["teacher"] == "cam"), None)
        for row in own:
            gains = {}
            if base is not None and row is not base:
                gains = {name: row[name] - base[name] for name in METRICS}
            teacher = by_name[row["teacher"]]
            lines.append(
                {
                    "row": row,
                    "gains": gains,
                    "place": teacher["place"],
                    "masks": teacher["images"],
                }
            )
        lpcam = (line for line in lines if line["row"]["teacher"] == "lpcam")
        groups.append(
            {
                "title": "After a dense CRF" if crf else "The network alone",
                "images": own[0]["images"],
                "lines": lines,
                "base": base,
                "last": next(lpcam, lines[-1]),
            }
        )
    return groups


def _learning(
    history: Mapping[str, Sequence[Mapping[str, Any]]],
    teachers: Sequence[Mapping[str, Any]],
    curves: Sequence[tuple[str, str, float]],
) -> list[dict[str, Any]]:
    """One chart a curve that was recorded, against the step of training: as :func:`_panels`."""
    records = {one["name"]: history.get(one["name"], ()) for one in teachers}
    last = max((record["step"] for own in records.values() for record in own), default=0)
    if not last:
        return []
    charts = []
    for name, title, unit in curves:
        points = {
            key: [(r["step"], unit * r[name]) for r in own if r.get(name) is not None]
            for key, own in records.items()
        }
        largest = max((value for own in points.values() for _, value in own), default=None)
        if largest is None:
            continue
        rise, wide = _tick(largest), _tick(last)
        top = 4 * rise

        def x(step: float) -> float:
            return round(_LEFT + step / last * (_WIDTH - _LEFT - _RIGHT), 1)

        def y(value: float, top: float = top) -> float:
            return round(_HEIGHT - _BOTTOM - value / top * (_HEIGHT - _TOP - _BOTTOM), 1)

        lines, told = [], []
        for teacher in teachers:
            own = points[teacher["name"]]
            if not own:
                continue
            drawn = [(x(step), y(value)) for step, value in own]
            lines.append(
                {
                    "method": teacher["title"],
                    "place": teacher["place"],
                    "points": " ".join(f"{a:g},{b:g}" for a, b in drawn),
                    "marks": drawn if len(drawn) <= _MARKED else [],
                }
            )
            (first, start), (end, value) = own[0], own[-1]
            told.append(
                f"{teacher['title']} goes from {start:.3g} at step {first} to {value:.3g} at {end}"
            )
        charts.append(
            {
                "title": title,
                "unit": "%" if unit != 1 else "",
                "lines": lines,
                "rows": [{"y": y(n * rise), "label": f"{n * rise:g}"} for n in range(5)],
                "columns": [
                    {"x": x(n * wide), "label": f"{n * wide:g}"}
                    for n in range(5)
                    if n * wide <= last
                ],
                "bottom": y(0),
                "text": f"{title} against the step of training. {'; '.join(told)}.",
            }
        )
    return charts


def _tick(largest: float) -> float:
    """A round number whose fourfold is at least ``largest``."""
    if largest <= 0:
        return 0.25
    power = 10.0 ** math.floor(math.log10(largest / 4))
    return next(n * power for n in (1, 2, 2.5, 5, 10) if 4 * n * power >= largest * (1 - 1e-9))


def _history_table(
    title: str,
    history: Mapping[str, Sequence[Mapping[str, Any]]],
    teachers: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Losses and validations of a training by step: a choice of them, evenly spaced."""
    at = {one["name"]: {r["step"]: r for r in history.get(one["name"], ())} for one in teachers}
    steps = sorted({step for own in at.values() for step in own})
    every = max(1, len(steps) // _TABLE_ROWS)
    tested = {
        step
        for own in at.values()
        for step, record in own.items()
        if record.get("validation_miou") is not None
    }
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


def _picture_groups(
    images: Sequence[Mapping[str, Any]], teachers: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Images by why they are shown, each with the difference of LPCAM's segmenter to CAM's."""
    titles = {one["name"]: one["title"] for one in teachers}
    cam, lpcam = titles.get("cam", ""), titles.get("lpcam", "")
    headings = {
        "gain": f"Where training on {lpcam} gains most over {cam}",
        "loss": f"Where training on {lpcam} loses most against {cam}",
        "even": "An even choice of the others",
    }
    groups = []
    for kind, heading in headings.items():
        shown = []
        for image in images:
            if image["kind"] == kind:
                own, base = image["miou"].get("lpcam"), image["miou"].get("cam")
                known = own is not None and base is not None
                shown.append({**image, "gain": own - base if known else None})
        if shown:
            groups.append({"kind": kind, "title": heading, "images": shown})
    if len(groups) == 1 and groups[0]["kind"] == "even":
        groups[0]["title"] = "The images"
    return groups


def _swatches(
    images: Sequence[Mapping[str, Any]], classes: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The classes of the masks that are shown, in their order."""
    views = [
        view
        for image in images
        for view in (image["truth"], *image["masks"].values())
        if view is not None
    ]
    there = {index for view in views for index in view["classes"]}
    return [one for index, one in enumerate(classes) if index in there]


# -- Stages ------------------------------------------------------------------------------------


def _stages(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    total = sum(stage["seconds"] for stage in stages)
    longest = max((stage["seconds"] for stage in stages), default=0.0)
    rows = [
        {**stage, "share": 100 * stage["seconds"] / longest if longest else 0.0} for stage in stages
    ]
    return {
        "rows": rows,
        "total": total,
        "memory": any(stage.get("peak_memory") is not None for stage in stages),
    }
