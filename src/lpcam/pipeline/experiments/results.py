"""The result of an experiment: rows over seeds with their protocol, curves and times."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lpcam.pipeline.experiments.definition import Arm, Experiment, PlannedRun
from lpcam.pipeline.run_folder import RunFolder
from lpcam.runtime.files import read_json
from lpcam.runtime.versions import versions

Record = dict[str, Any]
WITHIN = 0.01  #: Loss of mIoU, as a fraction, within which a range of thresholds is stated.


def gather(
    experiment: Experiment,
    planned: Sequence[PlannedRun],
    state: Mapping[str, Mapping[str, Any]],
    about: Mapping[str, Any],
) -> Record:
    """The result of an experiment as JSON.

    Args:
        state: how each run ended, as :func:`lpcam.pipeline.experiments.running.run_all` returns it.
        about: further entries: name (``experiment``), ``size`` and ``command``.

    Returns:
        ``rows`` (for each arm and method mean, sample standard deviation and number of seeds of
        each score, as fractions; the difference to what they are compared with, paired by seed; the
        paper's figure; the protocol of the first seed), ``failed``, ``curves`` against the
        threshold, ``widths`` of the range within 1 point of the best, and ``times``.
    """
    arms = {one.arm.name: one.arm for one in planned}
    scored = {name: {} for name in arms}  # type: dict[str, dict[int, Record]]
    failed, times = [], []
    for one in planned:
        ended = state.get(one.folder.name, {"status": "failed", "reason": "was not run"})
        if ended["status"] != "done":
            failed.append({"arm": one.arm.name, "seed": one.seed, "reason": ended["reason"]})
            continue
        folder = RunFolder(one.folder)
        scored[one.arm.name][one.seed] = read_json(folder.metrics)
        use = read_json(folder.use) if folder.use.is_file() else {}
        seconds = {stage: own["seconds"] for stage, own in use.items()}
        times.append({"arm": one.arm.name, "seed": one.seed, "run": one.folder.name, **seconds})
    rows, curves = [], {}
    for name, arm in arms.items():
        found = [(seed, row) for seed, run in scored[name].items() for row in run["rows"]]
        shown = [(seed, row) for seed, row in found if _shown(experiment, arm, row)]
        for key in dict.fromkeys((row["stage"], row["method"]) for _, row in shown):
            own = {seed: row for seed, row in shown if (row["stage"], row["method"]) == key}
            rows.append(_row(experiment, name, own, scored))
            rows[-1]["runs"] = [one.folder.name for one in planned if one.arm.name == name]
        wanted = {row["method"] for _, row in shown}
        for method in sorted(wanted):
            own_curves = [
                c[method] for run in scored[name].values() if method in (c := run["curves"])
            ]
            if own_curves:
                curves[f"{name} / {method}"] = _mean_curve(own_curves)
    return {
        "format": 1,
        **about,
        "title": experiment.title,
        "source": experiment.source,
        "about": " ".join(experiment.about.split()),
        "columns": list(experiment.columns),
        "arms": [{"name": arm.name, "changes": arm.changes} for arm in arms.values()],
        "rows": rows,
        "failed": failed,
        "curves": curves,
        "widths": {name: _width(curve) for name, curve in curves.items()},
        "times": times,
        "clustering_over_training": _clustering_share(times),
        "versions": versions(),
    }


def _shown(experiment: Experiment, arm: Arm, row: Mapping[str, Any]) -> bool:
    methods = arm.methods or experiment.methods
    source = row["threshold_source"]
    by_truth = source == "ground truth"
    wanted = source is None or by_truth == (experiment.thresholds == "ground truth")
    return wanted and (methods is None or row["method"] in methods)


def _row(
    experiment: Experiment,
    arm: str,
    own: Mapping[int, Record],
    scored: Mapping[str, Mapping[int, Record]],
) -> Record:
    """One line of the table: an arm and a method over all seeds."""
    first = next(iter(own.values()))
    method, columns = first["method"], experiment.columns
    other_arm = experiment.against_arm or arm
    other = experiment.against.get(method, None if experiment.against_arm is None else method)
    base = {
        seed: row
        for seed in own
        for row in scored[other_arm].get(seed, {"rows": ()})["rows"]
        if row["method"] == other
        and row["stage"] == first["stage"]
        and row["threshold_source"] == first["threshold_source"]
    }
    if (other_arm, other) == (arm, method):
        base = {}
    pairs = [(own[seed], base[seed]) for seed in own if seed in base]
    thresholds = [row["threshold"] for row in own.values() if row["threshold"] is not None]
    published = experiment.published.get(f"{arm} / {method}", {})
    return {
        "arm": arm,
        "method": method,
        "stage": first["stage"],
        "images": first["images"],
        "threshold": _over_seeds(thresholds),
        "threshold_source": first["threshold_source"],
        "seeds": list(own),
        "values": {c: _over_seeds([row[c] for row in own.values()]) for c in columns},
        "against": f"{other_arm} / {other}" if pairs else None,
        "difference": {c: _over_seeds([a[c] - b[c] for a, b in pairs]) for c in columns},
        "published": {c: published[c] / 100 for c in columns if c in published},
        "protocol": first["protocol"],
    }


def _over_seeds(values: Iterable[float]) -> Record | None:
    """Mean, sample standard deviation (None for one value) and number; None without values."""
    known = list(values)
    if not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "sd": deviation, "n": len(known)}


def _mean_curve(curves: Sequence[Mapping[str, Sequence[float]]]) -> Record:
    """The mIoU against the threshold over seeds, at the thresholds that all curves have."""
    at = [dict(zip(one["thresholds"], one["miou"], strict=True)) for one in curves]
    common = sorted(set(at[0]).intersection(*at[1:]))
    over = [_over_seeds([one[threshold] for one in at]) or {} for threshold in common]
    return {
        "thresholds": common,
        "mean": [one["mean"] for one in over],
        "sd": [one["sd"] for one in over],
    }


def _width(curve: Mapping[str, Sequence[float]]) -> Record:
    """The range of thresholds around the best one whose mIoU is within `WITHIN` of it."""
    values = curve["mean"]
    best = max(range(len(values)), key=values.__getitem__)
    low = high = best
    while low > 0 and values[low - 1] >= values[best] - WITHIN:
        low -= 1
    while high + 1 < len(values) and values[high + 1] >= values[best] - WITHIN:
        high += 1
    start, end = curve["thresholds"][low], curve["thresholds"][high]
    return {"best": values[best], "from": start, "to": end, "width": round(end - start, 4)}


def _clustering_share(times: Sequence[Mapping[str, Any]]) -> float | None:
    """Time of clustering over that of training, in the run whose training took longest."""
    whole = [one for one in times if one.get("classify") and one.get("prototypes")]
    if not whole:
        return None
    longest = max(whole, key=lambda one: one["classify"])
    return round(float(longest["prototypes"] / longest["classify"]), 3)
