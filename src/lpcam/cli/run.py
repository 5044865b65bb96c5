"""Commands that start and look at runs: demo, init, run, status, report, evaluate, refine, segment,
recipe."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lpcam
from lpcam.cli.command import (
    RUN,
    THREADS,
    Argument,
    Invocation,
    Lazy,
    command,
    positive_number,
    recipes,
)
from lpcam.cli.data import READING, class_table

if TYPE_CHECKING:
    from lpcam.pipeline.run import RunResult

datasets = Lazy("lpcam.data.dataset")
demonstration = Lazy("lpcam.pipeline.demo")
new_recipe = Lazy("lpcam.pipeline.new_recipe")
pipeline = Lazy("lpcam.pipeline.run")
stages = Lazy("lpcam.pipeline.stages")
distributed = Lazy("lpcam.runtime.distributed")
files = Lazy("lpcam.runtime.files")
console = Lazy("rich.console")
tables = Lazy("rich.table")

RECIPE = Argument("recipe", help="A recipe file, or the name of a bundled recipe.")
ANYWAY = Argument(
    "--anyway", action="store_true", help="Go on although the pixels would make a run useless."
)
SCORES = ("mIoU", "FP", "FN", "precision", "recall")
MEMORY = Argument(
    "--memory",
    type=positive_number,
    metavar="GIB",
    help="Memory each process may use for cached features, in GiB.",
)


@command(
    "demo",
    Argument("--folder", type=Path, default=Path("runs/demo"), help="Folder of the run."),
    THREADS,
    group="start",
)
def demo(call: Invocation, folder: Path) -> int:
    """Draw the bundled data set and run LPCAM on it."""
    _print_result(demonstration.demo(folder, call.given_threads, call.line))
    return 0


@command(
    "init",
    Argument(
        "folder",
        type=Path,
        help="Images with labels.csv (image,labels), labels.jsonl or a folder for each class; a "
        "VOC2012 folder; COCO annotations, or one JSON file of them; YOLO; Label Studio's JSON.",
    ),
    *READING,
    ANYWAY,
    Argument("--backbone", default="mobilenetv2_100", help="A timm model, or 'bundled' (a try)."),
    Argument("--weights", default="pretrained", help="'pretrained' or a safetensors file."),
    group="start",
)
def init(call: Invocation, folder: Path, backbone: str, weights: str, **reading: Any) -> int:
    """Check a folder of images and write a recipe for it."""
    path, summary = new_recipe.write_recipe(folder, backbone, weights, **reading)
    print(f"{summary}\n\nwrote {path}\nnext: lpcam run {shlex.quote(str(path))}")
    return 0


@command(
    "run",
    RECIPE,
    Argument(
        "--until", metavar="STAGE", default="report", help="Last stage to run (default: report)."
    ),
    ANYWAY,
    THREADS,
    MEMORY,
    group="start",
    recipe_values=True,
)
def run(call: Invocation, recipe: str, until: str, memory: float | None, anyway: bool) -> int:
    """Run a recipe, from labels to scored masks and their report."""
    changes = {"data.anyway": True} if anyway else {}
    loaded = lpcam.load_recipe(recipe, _with_options(call, memory) | changes)
    return _in_processes(lambda: lpcam.run(loaded, until=until, command=call.line))


def _with_options(call: Invocation, memory: float | None) -> dict[str, Any]:
    """The recipe's values with those of ``--threads`` and ``--memory``."""
    own = {"run.threads": call.given_threads, "run.memory": memory}
    return {**call.changes, **{key: value for key, value in own.items() if value is not None}}


def _in_processes(work: Callable[[], RunResult]) -> int:
    """Run in one of several processes; the first prints the result."""
    first = distributed.is_first()
    if not first:
        logging.getLogger().setLevel(logging.WARNING)
    result = work()
    if first:
        _print_result(result)
    distributed.leave()
    return 0


@command("status", RUN, group="look")
def status(call: Invocation, run: Path) -> int:
    """Tell what a run does, from another shell: stages, time left, how to resume."""
    print(pipeline.status(run))
    return 0


@command(
    "report", RUN, Argument("--device", help="Device used to search for patches."), group="look"
)
def report(call: Invocation, run: Path, device: str | None) -> int:
    """Write the report of a finished run again."""
    print(f"report in {pipeline.report(run, device=device)}")
    return 0


@command(
    "evaluate",
    Argument("predictions", type=Path, help="Folder of predicted masks, ID.png."),
    Argument("truth", type=Path, help="Folder of true masks, ID.png."),
    Argument(
        "--classes",
        help="voc12, coco14, or a file with one class name per line, background excluded (default: "
        "every value in the true masks is a class).",
    ),
    Argument("--json", type=Path, metavar="FILE", help="Write the scores to this file too."),
    THREADS,
    group="use",
)
def evaluate(
    call: Invocation, predictions: Path, truth: Path, classes: str | None, json: Path | None
) -> int:
    """Score a folder of masks against a folder of true masks."""
    table = None if classes is None else class_table(classes)
    found = lpcam.evaluate_masks(predictions, truth, table, workers=call.threads)
    print(found.summary())
    if json is not None:
        files.write_json(json, {**asdict(found), "command": call.line})
    return 0


def _declare_on_files(name: str, files: Argument, text: str) -> None:
    """Declare a command on the maps or masks of another program, with a run folder of its own."""

    def work(call: Invocation, recipe: str, memory: float | None, **given: Path) -> int:
        changes = _with_options(call, memory)
        loaded = lpcam.load_recipe(recipe, changes)
        if "run.folder" not in changes:  # the recipe's own folder holds its own maps
            own = f"runs/{loaded.name}-{name.removesuffix('e')}ed"
            loaded = loaded.changed({"run.folder": own})
        run_on = getattr(pipeline, name)
        return _in_processes(lambda: run_on(loaded, *given.values(), command=call.line))

    work.__doc__ = text
    command(name, RECIPE, files, THREADS, MEMORY, group="use", recipe_values=True)(work)


_declare_on_files(
    "refine",
    Argument("maps", type=Path, help="Folder of npz map files, one for each image."),
    "Make pseudo masks from maps of another program.",
)
_declare_on_files(
    "segment",
    Argument("masks", type=Path, help="Folder of masks, ID.png."),
    "Train a segmenter on masks of another program.",
)


@command(
    "recipe",
    Argument("name", nargs="?", help="Name of a bundled recipe; without one, lists them."),
    Argument("--fields", action="store_true", help="List every key and what it means."),
    Argument("--stages", action="store_true", help="List the stages of a run.", dest="list_stages"),
    group="about",
)
def recipe(call: Invocation, name: str | None, fields: bool, list_stages: bool) -> int:
    """Print a bundled recipe, or list recipes, keys or stages."""
    if fields:
        for key, kind, meaning in recipes.describe_fields():
            print(f"{key}  ({kind})\n    {meaning}" if meaning else f"{key}  ({kind})")
    elif list_stages:
        print("\n".join(f"{stage.name:<16}{stage.help}" for stage in stages.STAGES))
    elif name is None:
        print("\n".join(recipes.bundled_recipes()))
    else:
        print(recipes.bundled_text(name))
    return 0


def _print_result(result: RunResult) -> None:
    """Print the scores, what was skipped, and where the results are."""
    for has_threshold in (True, False):
        rows = [row for row in result.rows if (row["stage"] != "segmentation") == has_threshold]
        if rows:
            _print_rows(rows, has_threshold=has_threshold)
    for text in result.warnings:
        print(f"warning: {text}")
    for line in datasets.skip_lines([datasets.Skip(**skip) for skip in result.skipped]):
        print(line)
    print(f"results in {result.folder}")
    if result.report is not None:
        print(f"report in {result.report}")


def _print_rows(rows: list[dict[str, Any]], *, has_threshold: bool) -> None:
    first = rows[0]
    parts = sorted(first.get("part_coverage", {}))
    title = f"{first['dataset']} {first['split']}, {first['images']} images, percent"
    table = tables.Table(title=title)
    for name in ("method", *(("threshold", "chosen by") if has_threshold else ()), *SCORES, *parts):
        table.add_column(name, justify="left" if name in ("method", "chosen by") else "right")
    for row in rows:
        numbers = [row[name.lower()] for name in SCORES]
        numbers += [row["part_coverage"].get(name, float("nan")) for name in parts]
        chosen = [f"{row['threshold']:.2f}", row["threshold_source"]] if has_threshold else []
        table.add_row(row["method"], *chosen, *(f"{100 * number:.1f}" for number in numbers))
    console.Console(width=None if sys.stdout.isatty() else 120).print(table)
