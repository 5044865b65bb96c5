"""The report's page: one self-contained HTML file made from the report's data.

Tables and charts are part of the HTML, so that they exist without JavaScript and on paper. The
viewer, the prototypes and the look-alike classes are drawn by ``report.js`` from data in the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from markupsafe import Markup

from lpcam.data.drawing import HEAT
from lpcam.explain.web import page_environment, page_file
from lpcam.report import charts, tables
from lpcam.runtime.errors import ArtefactError

_DRAWN = ("methods", "fixed", "classes", "images", "highlights", "prototypes", "confusions")
"""Data that ``report.js`` draws."""


def render(data: Mapping[str, Any]) -> str:
    """Make the page from what :func:`lpcam.report.collect.collect` gathers.

    All text in the data is escaped. The page loads nothing, and its content security policy forbids
    everything else. Equal data give equal text; ArtefactError for what JSON lacks, such as NaN.
    """
    style, script = page_file("page.css"), page_file("shared.js") + page_file("report.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{digest(style)}'; "
        f"script-src '{digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    own_place = partial(tables.place, methods=data["methods"])
    groups = tables.score_groups(data["rows"], data["methods"])
    headline = groups[0] if groups else None
    verdicts = {name: one for name, one in data["verdicts"].items() if name in data["methods"]}
    kinds = {"automatic" if name in verdicts else "fixed" for name in data["methods"]}
    environment = page_environment()
    environment.filters |= {
        "percent": lambda fraction: "–" if fraction is None else f"{100 * fraction:.1f}",
        "points": _points,
        "plain": tables.plain,
        "threshold": charts.threshold_text,
        "seconds": _seconds,
        "memory": _memory,
    }
    page = environment.get_template("report.html.jinja").render(
        data=data,
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        drawn=_json(data),
        groups=groups,
        headline=headline,
        colours={one["name"]: one["color"] for one in data["classes"]},
        protocol=tables.protocol(data, groups),
        charts=charts.threshold_charts(data["curves"], data["fixed"], own_place, verdicts),
        threshold_kind=" or ".join(sorted(kinds)),
        curve_rows=charts.threshold_table(data["curves"], own_place),
        per_class=tables.bars(headline, "per_class"),
        parts=tables.bars(headline, "part_coverage"),
        segmenters=_segmenters(data),
    )
    # file names may hold bytes that are not text, which cannot be written
    return page.encode("utf-8", "replace").decode("utf-8")


def digest(text: str) -> str:
    """A text as its source in a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(data: Mapping[str, Any]) -> Markup:
    """Data of the page's script, as JSON that cannot end its script element."""
    drawn = {name: data[name] for name in _DRAWN} | {"heat": HEAT.astype(int).tolist()}
    try:
        text = json.dumps(drawn, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ArtefactError(f"the report's data cannot be written as JSON: {error}") from error
    # other special characters are outside ASCII and already escaped
    return Markup(text.translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"}))


def _points(difference: float) -> str:
    """A difference of two fractions in percentage points, always with its sign."""
    text = f"{100 * difference:+.1f}"
    return "±0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


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


def _segmenters(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """Content of the section on segmenters; None if the run has none."""
    given = data.get("segmenters")
    if given is None:
        return None
    methods = data["methods"]
    teachers = [{**one, "place": tables.place(one["title"], methods)} for one in given["teachers"]]
    teachers.sort(key=itemgetter("place"))
    groups = tables.segmenter_groups(given["rows"], teachers)
    curves = charts.training_charts(given["history"], teachers)
    truths = [one["truth"] for one in given["images"] if one["truth"]]
    views = [*truths, *(view for one in given["images"] for view in one["masks"].values())]
    shown = {index for view in views for index in view["classes"]}
    return {
        "given": given,
        "teachers": teachers,
        "groups": groups,
        # the last group is the final result: after the CRF, if there is one
        "per_class": tables.bars(groups[-1] if groups else None, "per_class"),
        "settings": tables.setting_lists({"network": given["network"], **given["settings"]}),
        "charts": curves,
        "steps": charts.training_table(given["history"], teachers),
        "scored": any(chart["unit"] for chart in curves),
        "pictures": _picture_groups(given["images"], teachers),
        "swatches": [one for index, one in enumerate(data["classes"]) if index in shown],
        "truth": bool(truths),
        "ignored": any(truth["ignored"] for truth in truths),
    }


def _picture_groups(
    images: Sequence[Mapping[str, Any]], teachers: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Images by why they are shown, each with the difference of LPCAM's segmenter to CAM's."""
    titles = {one["name"]: one["title"] for one in teachers}
    cam, lpcam = titles.get("cam", ""), titles.get("lpcam", "")
    groups: dict[str, list[dict[str, Any]]] = {}
    for image in images:
        own, base = image["miou"].get("lpcam"), image["miou"].get("cam")
        gain = None if own is None or base is None else own - base
        groups.setdefault(image["kind"], []).append({**image, "gain": gain})
    headings = {
        "gain": f"Largest gains of training on {lpcam} over {cam}",
        "loss": f"Largest losses of training on {lpcam} against {cam}",
        "even": "Evenly spaced choice of the other images" if len(groups) > 1 else "The images",
    }
    shown = [kind for kind in headings if kind in groups]
    return [{"kind": kind, "title": headings[kind], "images": groups[kind]} for kind in shown]
