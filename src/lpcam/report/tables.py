"""Tables and bars of the report: rows with their differences to a baseline, and the conditions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

METRICS = ("miou", "fp", "fn", "precision", "recall")
"""Columns of the tables of scores, by their names in a row."""
SOURCES = {
    "ground truth": "Each method at its own best threshold",
    "fixed": "Each method at its fixed threshold",
}
"""Titles of groups, by how the threshold was chosen."""
JOINT = " + "
"""Between a method and what refined its maps, as in "LPCAM + IRN"."""

_LABELS = {
    "dataset": "Data set",
    "split": "List of scored images",
    "images": "Number of scored images",
    "labels": "Source of the labels",
    "prototypes_list": "List for the prototypes",
    "preset": "Preset",
    "changed_from_preset": "Changed from the preset",
    "thresholds": "Fixed thresholds",
    "scales": "Image scales",
    "flip": "Mirrored image used",
    "crf": "CRF refinement",
    "refine": "Refinement of the maps",
    "void": "Void policy",
    "maps": "Stored maps",
    "features": "Stored features",
    "precision": "Precision of forward passes",
    "maximum_side": "Longest image side",
    "seed": "Random seed",
    "classifier": "Classifier",
    "host": "Host",
    "versions": "Versions",
}
_OTHERS = ("classifier", "host", "versions")
"""Settings that are shown only in groups."""
_ELSEWHERE = ("command", "threshold", "threshold_source", "classes")
"""Settings that the page shows elsewhere."""


def place(method: str, methods: Sequence[str]) -> int:
    """Order and colour of a method; refined maps have those of their method.

    Example:
        >>> place("LPCAM + IRN", ["CAM", "LPCAM"]), place("other", ["CAM", "LPCAM"])
        (1, 2)
    """
    own = method.partition(JOINT)[0]
    return methods.index(own) if own in methods else len(methods)


def _lines(
    rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None, places: Sequence[int]
) -> list[dict[str, Any]]:
    """Rows of a group with their differences to the group's baseline."""
    return [
        {
            "row": row,
            "gains": {}
            if base is None or row is base
            else {name: row[name] - base[name] for name in METRICS},
            "place": place,
        }
        for row, place in zip(rows, places, strict=True)
    ]


def score_groups(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Rows that may be compared: of one stage and one way to choose the threshold.

    The baseline of a group is the first of the methods, or its refined maps ("CAM + IRN").

    Example:
        >>> row = {"stage": "seed", "threshold_source": "fixed", **dict.fromkeys(METRICS, 0.5)}
        >>> rows = [{**row, "method": "CAM"}, {**row, "method": "LPCAM", "miou": 0.75}]
        >>> score_groups(rows, ["CAM", "LPCAM"])[0]["last"]["gains"]["miou"]
        0.25
    """
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["stage"], row["threshold_source"]), []).append(row)
    order = [*SOURCES, *sorted({source for _, source in found} - SOURCES.keys())]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    groups = []
    for stage, source in sorted(found, key=lambda key: (stages.index(key[0]), order.index(key[1]))):
        members = sorted(found[stage, source], key=lambda row: place(row["method"], methods))
        places = [place(row["method"], methods) for row in members]
        base = members[0] if places[0] == 0 else None
        lines = _lines(members, base, places)
        groups.append(
            {
                "stage": _stage_title(stage, members) if len(stages) > 1 else "",
                "source": source,
                "title": SOURCES.get(source, f"Threshold: {source}"),
                "how": members[0].get("protocol", {}).get("threshold_source", ""),
                "lines": lines,
                "base": base,
                "last": [line for line in lines if line["place"] < len(methods)][-1:] or lines[-1:],
            }
        )
        groups[-1]["last"] = groups[-1]["last"][0]
    return groups


def _stage_title(stage: str, rows: Sequence[Mapping[str, Any]]) -> str:
    if stage == "seed":
        return "Seeds: masks of the maps without refinement"
    if stage != "pseudo":
        return stage
    ways = sorted({way for row in rows if (way := row["method"].partition(JOINT)[2])})
    return "Pseudo masks: masks of the refined maps" + (f" ({', '.join(ways)})" if ways else "")


def segmenter_groups(
    rows: Sequence[Mapping[str, Any]], teachers: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of segmenters without a CRF, then with one; the baseline is the one trained on CAM.

    Example:
        >>> row = {"teacher": "cam", "crf": False, "images": 3, **dict.fromkeys(METRICS, 0.5)}
        >>> teachers = [{"name": "cam", "title": "CAM", "images": 9, "place": 0}]
        >>> [group["title"] for group in segmenter_groups([row], teachers)]
        ['The network alone']
    """
    by_name = {one["name"]: one for one in teachers}
    groups = []
    for crf in (False, True):
        found = {row["teacher"]: row for row in rows if row["crf"] == crf}
        own = [
            {**found[name], "method": one["title"], "masks": one["images"]}
            for name, one in by_name.items()
            if name in found
        ]
        if not own:
            continue
        base = next((row for row in own if row["teacher"] == "cam"), None)
        lines = _lines(own, base, [by_name[row["teacher"]]["place"] for row in own])
        lpcam = (line for line in lines if line["row"]["teacher"] == "lpcam")
        groups.append(
            {
                "title": "After a dense CRF" if crf else "The network alone",
                "crf": crf,
                "images": own[0]["images"],
                "lines": lines,
                "base": base,
                "last": next(lpcam, lines[-1]),
            }
        )
    return groups


def bars(
    group: Mapping[str, Any], values: Sequence[Mapping[str, Mapping[str, float]]]
) -> list[dict[str, Any]]:
    """One set of bars for each name, a bar for each line of a group that has the name.

    Args:
        values: for each line of the group, by name, ``iou`` and perhaps ``fp`` and ``fn``.

    Returns:
        for each name its bars and ``gain``: the IoU of the group's last line minus its baseline's;
        None where a line lacks it.

    Example:
        >>> row = {"stage": "seed", "threshold_source": "fixed", **dict.fromkeys(METRICS, 0.5)}
        >>> rows = [{**row, "method": "CAM"}, {**row, "method": "LPCAM"}]
        >>> (group,) = score_groups(rows, ["CAM", "LPCAM"])
        >>> bars(group, [{"cat": {"iou": 0.25}}, {"cat": {"iou": 0.75}}])[0]["gain"]
        0.5
    """
    lines = group["lines"]
    rows = [line["row"] for line in lines]
    found = []
    for name in dict.fromkeys(name for own in values for name in own):
        own = [
            {"method": line["row"]["method"], "place": line["place"], **value[name]}
            for line, value in zip(lines, values, strict=True)
            if name in value
        ]
        gain = None
        if group["base"] is not None and len(own) == len(lines) > 1:
            last, base = (
                next(n for n, row in enumerate(rows) if row is wanted)
                for wanted in (group["last"]["row"], group["base"])
            )
            gain = values[last][name]["iou"] - values[base][name]["iou"]
        found.append({"name": name, "bars": own, "gain": gain})
    return found


def class_bars(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    """IoU, FP and FN of each class, those with the largest gain first.

    Example:
        >>> class_bars({"lines": [], "base": None, "last": None})
        []
    """
    found = bars(group, [line["row"]["per_class"] for line in group["lines"]])
    return sorted(found, key=lambda one: -1e9 if one["gain"] is None else one["gain"], reverse=True)


def part_bars(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Share of each object part that has the right class in the mask; empty without parts.

    Example:
        >>> part_bars({"lines": [], "base": None, "last": None})
        []
    """
    coverage = [line["row"].get("part_coverage", {}) for line in group["lines"]]
    return bars(group, [{name: {"iou": v} for name, v in own.items()} for own in coverage])


def protocol(data: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The conditions of a run: single settings, and settings in groups.

    Example:
        >>> data = {"protocol": {"flip": True}, "images_total": 4, "fixed": {}}
        >>> protocol(data, [])["short"]
        [('Number of scored images', 4), ('Mirrored image used', True)]
    """
    given: dict[str, Any] = dict(data["protocol"])
    row = groups[0]["lines"][0]["row"] if groups else {}
    given.setdefault("images", row.get("images", data["images_total"]))
    if data["fixed"]:
        given["thresholds"] = {f"{name}:": value for name, value in data["fixed"].items()}
    wide = [
        name for name in ("classifier", "host", "refine", "versions") if is_group(given.get(name))
    ]
    hidden = {*wide, *_OTHERS, *_ELSEWHERE}
    short = [name for name in _LABELS if name in given and name not in hidden]
    short += [name for name in given if name not in hidden and name not in _LABELS]
    return {
        "short": [(_LABELS.get(name, words(name).capitalize()), given[name]) for name in short],
        "wide": [(_LABELS[name], list(flat(given[name]))) for name in wide],
    }


def flat(values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Settings and those of their groups, one by one.

    Example:
        >>> list(flat({"amn": {"epochs": 3}, "method": "amn"}))
        [('epochs', 3), ('method', 'amn')]
    """
    several = sum(isinstance(value, Mapping) for value in values.values()) > 1
    for name, value in values.items():
        if is_group(value):
            prefix = f"{words(name)}: " if several else ""
            yield from ((prefix + words(inner), one) for inner, one in value.items())
        else:
            yield words(name), value


def is_group(value: Any) -> bool:
    """Whether a setting holds further settings.

    Example:
        >>> is_group({"epochs": 3}), is_group({}), is_group(3)
        (True, False, False)
    """
    return isinstance(value, Mapping) and bool(value)


def words(name: object) -> str:
    """A setting's name with spaces.

    Example:
        >>> words("batch_size")
        'batch size'
    """
    return str(name).replace("_", " ")
