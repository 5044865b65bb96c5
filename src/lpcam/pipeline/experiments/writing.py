"""An experiment from its file to its report: run what is not up to date, gather, write."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lpcam.explain.web import data_uri
from lpcam.pipeline.experiments.definition import Experiment, Plot, SizeName, load_experiment, plan
from lpcam.pipeline.experiments.pictures import PICTURES
from lpcam.pipeline.experiments.results import Record, gather
from lpcam.pipeline.experiments.running import ExperimentFolder, run_all
from lpcam.pipeline.run_folder import RunFolder
from lpcam.report import experiment as report
from lpcam.runtime.errors import LpcamError, RecipeError
from lpcam.runtime.files import write_bytes, write_json


def run_experiment(
    source: str | Path,
    size: SizeName,
    folder: Path,
    *,
    recipe: str | None = None,
    changes: Mapping[str, Any] | None = None,
    seeds: Sequence[int] | None = None,
    processes: int = 1,
    command: str = "",
    most: int | None = None,
) -> Record:
    """Run an experiment, write its results and its report, and return the results.

    Args:
        source: an experiment's file, or the name of a bundled one.
        size: what it runs on: "official", "light" or "tiny".
        folder: folder of the experiment, which holds a run folder for each arm and seed.
        recipe: a recipe instead of the one of the size.
        changes: values to replace in every recipe, such as ``{"data.root": "VOC2012"}``.
        seeds: random seeds; None: those of the size.
        processes: number of runs beside each other.
        command: the command line, recorded with the results.
        most: number of runs above which none is started; None: any number.

    Raises:
        RecipeError: if an arm cannot be built, or there are too many; none was started.
        ArtefactError: if the folder belongs to another experiment.
        LpcamError: if a data set cannot be read; no arm was started.
    """
    experiment, place = load_experiment(source), ExperimentFolder(folder)
    planned = plan(experiment, size, folder, recipe=recipe, changes=changes, seeds=seeds)
    count = len({one.folder for one in planned})
    if most is not None and count > most:
        raise RecipeError(
            f"the experiment {source} has {count} runs, more than {most}; look at --dry-run, then "
            "repeat the command with --yes"
        )
    name = Path(source).stem
    how: dict[str, Any] = {
        "name": name,
        "size": size,
        "experiment": experiment,
        "processes": processes,
    }
    state = run_all(planned, place, command=command, **how)
    results = gather(
        experiment, planned, state, {"experiment": name, "size": size, "command": command}
    )
    done = [one for one in planned if state[one.folder.name]["status"] == "done"]
    plots, files = [], []
    for number, plot in enumerate(experiment.plots, start=1):
        try:
            found = [*_drawn(experiment, plot, results, [one.folder for one in done])]
        except LpcamError as error:  # one picture must not lose the table
            plots.append({"title": plot.title, "text": f"Not drawn: {error}"})
            continue
        for drawn in found:
            is_svg, part = "svg" in drawn, drawn.get("name")  # of one of several pictures
            data = drawn["svg"].encode() if is_svg else drawn["png"]
            path = place.plot(number, (f"-{part}" if part else "") + (".svg" if is_svg else ".png"))
            title = f"{plot.title}: {part}" if part else plot.title
            write_bytes(path, data)
            shown = {"svg": drawn["svg"]} if is_svg else {"picture": data_uri(data, "png")}
            plots.append({"title": title, "text": drawn.get("text", ""), **shown})
            file = {"title": title, "file": path.relative_to(folder).as_posix()}
            files.append({**file, **drawn.get("figures", {})})
    results["plots"] = files
    write_json(place.results, results)
    write_bytes(place.markdown, report.markdown(results).encode())
    write_bytes(place.latex, report.latex(results).encode())
    pages = {one.folder.name: RunFolder(one.folder).report for one in done}
    links = {run: os.path.relpath(path, folder) for run, path in pages.items() if path.is_file()}
    write_bytes(place.report, report.page(results, plots, links).encode())
    return results


def _drawn(
    experiment: Experiment, plot: Plot, results: Record, runs: Sequence[Path]
) -> Iterator[dict[str, Any]]:
    """What a plot shows; nothing where no run has what it needs."""
    methods = plot.methods or experiment.methods
    if plot.kind == "sweep":
        lines = _sweep(results, plot.x or "", methods)
        if lines:
            yield {"svg": report.svg(plot.title, plot.x or "", lines)}
    elif plot.kind == "threshold":
        lines = []
        for name, curve in results["curves"].items():
            arm, _, method = name.rpartition(" / ")
            if arm == results["arms"][0]["name"] and (methods is None or method in methods):
                points = zip(curve["thresholds"], curve["mean"], curve["sd"], strict=True)
                lines.append(
                    (method, [(t, 100 * m, 100 * (s or 0)) for t, m, s in points if m > 0])
                )
        if lines:
            yield {"svg": report.svg(plot.title, "threshold", lines)}
    elif runs:
        yield from PICTURES[plot.kind](RunFolder(runs[0]))


def _sweep(results: Record, key: str, methods: Sequence[str] | None) -> list[report.Line]:
    """A line for each method: its mIoU at every value of a swept key."""
    values = {
        arm["name"]: arm["changes"][key]
        for arm in results["arms"]
        if [*arm["changes"]] == [key] and isinstance(arm["changes"][key], (int, float))
    }
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in results["rows"]:
        if row["arm"] in values and (methods is None or row["method"] in methods):
            own = row["values"]["miou"]
            point = (float(values[row["arm"]]), 100 * own["mean"], 100 * (own["sd"] or 0))
            lines.setdefault(row["method"], []).append(point)
    return [(method, sorted(points)) for method, points in lines.items()]
