"""Tables and bars of the report: rows with their differences to a baseline, and the conditions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]

_METRICS = ("miou", "fp", "fn", "precision", "recall")  # columns of the tables of scores
_SOURCES = {  # titles of groups, by how the threshold was chosen
    "ground truth": "Each method at its own best threshold",
    "automatic": "Each method at its automatic threshold, chosen without true masks",
    "fixed": "Each method at its fixed threshold",
}
_JOINT = " + "  # between a method and what refined its maps, as in "LPCAM + IRN"
_LABELS = {
    "dataset": "Data set",
    "split": "List of scored images",
    "images": "Number of scored images",
    "labels": "Source of the labels",
    "prototypes_list": "List for the prototypes",
    "selected": "Images that are clustered",
    "preset": "Preset",
    "changed_from_preset": "Changed from the preset",
    "thresholds": "Thresholds",
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
_ELSEWHERE = ("command", "threshold", "threshold_source", "classes", "chosen")  # shown elsewhere


def place(method: str, methods: Sequence[str]) -> int:
    """Order and colour of a method; refined maps ("CAM + IRN") have those of their method."""
    own = method.partition(_JOINT)[0]
    return methods.index(own) if own in methods else len(methods)


def _group(
    rows: Rows, places: Sequence[int], base: Mapping[str, Any] | None, last: int, **about: Any
) -> dict[str, Any]:
    """Rows that may be compared, with their differences to a baseline; one of them is stressed."""
    compared = [() if base is None or row is base else _METRICS for row in rows]
    lines = [
        {"row": row, "gains": {n: row[n] - (base or {})[n] for n in names}, "place": own}
        for row, names, own in zip(rows, compared, places, strict=True)
    ]
    return {**about, "lines": lines, "base": base, "last": lines[last]}


def score_groups(rows: Rows, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Groups of rows of one stage and one way to choose the threshold; the baseline is CAM."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["stage"], row["threshold_source"]), []).append(row)
    order = [*_SOURCES, *sorted({source for _, source in found} - _SOURCES.keys())]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    groups = []
    for stage, source in sorted(found, key=lambda key: (stages.index(key[0]), order.index(key[1]))):
        members = sorted(found[stage, source], key=lambda row: place(row["method"], methods))
        places = [place(row["method"], methods) for row in members]
        own = [number for number, at in enumerate(places) if at < len(methods)]
        rules = [row.get("protocol", {}).get("threshold_source", "") for row in members]
        about = {
            "stage": _stage_title(stage, members) if len(stages) > 1 else "",
            "source": source,
            "title": _SOURCES.get(source, f"Threshold: {source}"),
            "how": "; ".join(dict.fromkeys(rules)),
        }
        base = members[0] if places[0] == 0 else None
        groups.append(_group(members, places, base, own[-1] if own else -1, **about))
    return groups


def _stage_title(stage: str, rows: Rows) -> str:
    if stage == "seed":
        return "Seeds: masks of the maps without refinement"
    if stage != "pseudo":
        return stage
    ways = sorted({way for row in rows if (way := row["method"].partition(_JOINT)[2])})
    return "Pseudo masks: masks of the refined maps" + (f" ({', '.join(ways)})" if ways else "")


def segmenter_groups(rows: Rows, teachers: Rows) -> list[dict[str, Any]]:
    """Rows of segmenters without a CRF, then with one; the baseline is the one trained on CAM."""
    groups = []
    for crf, title in ((False, "The network alone"), (True, "After a dense CRF")):
        found = {row["teacher"]: row for row in rows if row["crf"] == crf}
        shown = [one for one in teachers if one["name"] in found]
        if not shown:
            continue
        own = [{**found[t["name"]], "method": t["title"], "masks": t["images"]} for t in shown]
        names = [one["name"] for one in shown]
        base = own[names.index("cam")] if "cam" in names else None
        last = names.index("lpcam") if "lpcam" in names else -1
        places, images = [one["place"] for one in shown], own[0]["images"]
        groups.append(_group(own, places, base, last, title=title, crf=crf, images=images))
    return groups


def bars(group: Mapping[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """One set of bars for each name in ``per_class`` (IoU, FP, FN) or ``part_coverage`` (a share).

    A line that has the name has a bar. ``gain`` is the IoU of the group's last line minus its
    baseline's; None where a line lacks the name. Classes have the largest gain first.
    """
    if group is None:
        return []
    lines, base, found = group["lines"], group["base"], []
    for name in dict.fromkeys(name for line in lines for name in line["row"].get(key, {})):
        drawn: dict[str, dict[str, Any]] = {}
        for line in lines:
            value, method = line["row"].get(key, {}).get(name), line["row"]["method"]
            if value is not None:
                values = value if isinstance(value, Mapping) else {"iou": value}
                drawn[method] = {"method": method, "place": line["place"], **values}
        gain = None
        if base is not None and len(drawn) == len(lines) > 1:
            gain = drawn[group["last"]["row"]["method"]]["iou"] - drawn[base["method"]]["iou"]
        found.append({"name": name, "bars": list(drawn.values()), "gain": gain})
    if key == "per_class":
        found.sort(key=lambda one: -1e9 if one["gain"] is None else one["gain"], reverse=True)
    return found


def protocol(data: Mapping[str, Any], groups: Rows) -> dict[str, Any]:
    """The conditions of a run: single settings, and settings in groups."""
    given: dict[str, Any] = dict(data["protocol"])
    row = groups[0]["lines"][0]["row"] if groups else {}
    given.setdefault("images", row.get("images", data["images_total"]))
    given["thresholds"] = {f"{name}:": value for name, value in data["fixed"].items()}
    known = [name for name in _LABELS if name in given]
    ordered = {name: given[name] for name in [*known, *given] if name not in _ELSEWHERE}
    return setting_lists(ordered, ("changed_from_preset", "thresholds"))


def setting_lists(settings: Mapping[str, Any], whole: Sequence[str] = ()) -> dict[str, Any]:
    """Labelled settings: single ones (``short``), and groups (``wide``) that are not ``whole``."""
    short, wide = [], []
    for name, value in settings.items():
        label = _LABELS.get(name, _words(name).capitalize())
        if isinstance(value, Mapping) and value and name not in whole:
            wide.append((label, list(_flat(value))))
        else:
            short.append((label, value))
    return {"short": short, "wide": wide}


def plain(value: Any) -> str:
    """A setting's value in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{_words(k)} {plain(v)}" for k, v in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(plain(one) for one in value) or "none"
    return "none" if value is None else str(value)


def _flat(values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Settings and those of their groups, one by one."""
    several = sum(isinstance(value, Mapping) for value in values.values()) > 1
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            prefix = f"{_words(name)}: " if several else ""
            yield from ((prefix + _words(inner), one) for inner, one in value.items())
        else:
            yield _words(name), value


def _words(name: object) -> str:
    return str(name).replace("_", " ")
