"""Commands that start and look at runs: demo, init, run, report, evaluate, refine, segment,
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
from lpcam.cli.command import RUN, THREADS, Invocation, argument, command, positive_number
from lpcam.cli.data import READING, class_table, reading

if TYPE_CHECKING:
    from lpcam.pipeline.run import RunResult

RECIPE = argument("recipe", help="A recipe file, or the name of a bundled recipe.")
SCORES = ("mIoU", "FP", "FN", "precision", "recall")
MEMORY = argument(
    "--memory",
    type=positive_number,
    metavar="GIB",
    help="Memory each process may use for cached features, in GiB.",
)


@command(
    "demo",
    "start",
    argument("--folder", type=Path, default=Path("runs/demo"), help="Folder of the run."),
    THREADS,
)
def demo(call: Invocation) -> int:
    """Draw the bundled data set and run LPCAM on it."""
    from lpcam.pipeline.demo import demo as run_demo  # noqa: PLC0415

    _print_result(run_demo(call.options.folder, call.options.threads, call.line))
    return 0


@command(
    "init",
    "start",
    argument(
        "folder",
        type=Path,
        help="Images with labels.csv (image,labels), labels.jsonl or a folder for each class; a "
        "VOC2012 folder; COCO annotations, or one JSON file of them.",
    ),
    *READING,
    argument("--backbone", default="mobilenetv2_100", help="Name of a timm model."),
    argument("--weights", default="pretrained", help="'pretrained' or a safetensors file."),
)
def init(call: Invocation) -> int:
    """Check a folder of images and write a recipe for it."""
    from lpcam.pipeline.new_recipe import write_recipe  # noqa: PLC0415

    options = call.options
    path, summary = write_recipe(
        options.folder, options.backbone, options.weights, **reading(options)
    )
    print(f"{summary}\n\nwrote {path}\nnext: lpcam run {shlex.quote(str(path))}")
    return 0


@command(
    "run",
    "start",
    RECIPE,
    argument(
        "--until", metavar="STAGE", default="report", help="Last stage to run (default: report)."
    ),
    THREADS,
    MEMORY,
    recipe_values=True,
)
def run(call: Invocation) -> int:
    """Run a recipe, from labels to scored masks and their report."""
    recipe = lpcam.load_recipe(call.options.recipe, _with_options(call))
    return _in_processes(lambda: lpcam.run(recipe, until=call.options.until, command=call.line))


def _with_options(call: Invocation) -> dict[str, Any]:
    """The recipe's values with those of ``--threads`` and ``--memory``."""
    own = {"run.threads": call.options.threads, "run.memory": call.options.memory}
    return {**call.changes, **{key: value for key, value in own.items() if value is not None}}


def _in_processes(work: Callable[[], RunResult]) -> int:
    """Run in one of several processes; the first prints the result."""
    from lpcam.runtime.distributed import is_first, leave  # noqa: PLC0415

    if not is_first():
        logging.getLogger().setLevel(logging.WARNING)
    result = work()
    if is_first():
        _print_result(result)
    leave()
    return 0


@command("report", "look", RUN, argument("--device", help="Device used to search for patches."))
def report(call: Invocation) -> int:
    """Write the report of a finished run again."""
    from lpcam.pipeline.run import report as write_report  # noqa: PLC0415

    print(f"report in {write_report(call.options.run, device=call.options.device)}")
    return 0


@command(
    "evaluate",
    "use",
    argument("predictions", type=Path, help="Folder of predicted masks, ID.png."),
    argument("truth", type=Path, help="Folder of true masks, ID.png."),
    argument(
        "--classes",
        help="voc12, coco14, or a file with one class name a line, background excluded (default: "
        "every value in the true masks is a class).",
    ),
    argument("--json", type=Path, metavar="FILE", help="Write the scores to this file too."),
    THREADS,
)
def evaluate(call: Invocation) -> int:
    """Score a folder of masks against a folder of true masks."""
    from lpcam.runtime.files import write_json  # noqa: PLC0415

    options = call.options
    classes = None if options.classes is None else class_table(options.classes)
    found = lpcam.evaluate_masks(options.predictions, options.truth, classes, workers=call.threads)
    print(found.summary())
    if options.json is not None:
        write_json(options.json, {**asdict(found), "command": call.line})
    return 0


@command(
    "refine",
    "use",
    RECIPE,
    argument("maps", type=Path, help="Folder of npz map files, one for each image."),
    THREADS,
    MEMORY,
    recipe_values=True,
)
def refine(call: Invocation) -> int:
    """Make pseudo masks from maps of another program."""
    return _on_files(call, call.options.maps, "refined")


@command(
    "segment",
    "use",
    RECIPE,
    argument("masks", type=Path, help="Folder of masks, ID.png."),
    THREADS,
    MEMORY,
    recipe_values=True,
)
def segment(call: Invocation) -> int:
    """Train a segmenter on masks of another program."""
    return _on_files(call, call.options.masks, "segmented")


def _on_files(call: Invocation, folder: Path, suffix: str) -> int:
    """Process the maps or masks of another program in a new run folder."""
    from lpcam.pipeline import run as pipeline  # noqa: PLC0415

    work = pipeline.refine if suffix == "refined" else pipeline.segment
    changes = _with_options(call)
    recipe = lpcam.load_recipe(call.options.recipe, changes)
    if "run.folder" not in changes:  # the recipe's own folder holds its own maps
        recipe = recipe.changed({"run.folder": f"runs/{recipe.name}-{suffix}"})
    return _in_processes(lambda: work(recipe, folder, command=call.line))


@command(
    "recipe",
    "about",
    argument("name", nargs="?", help="Name of a bundled recipe; without one, lists them."),
    argument("--fields", action="store_true", help="List every key and what it means."),
    argument("--stages", action="store_true", help="List the stages of a run."),
)
def recipe(call: Invocation) -> int:
    """Print a bundled recipe, or list recipes, keys or stages."""
    from lpcam.pipeline import recipe as recipes  # noqa: PLC0415

    if call.options.fields:
        for key, kind, meaning in recipes.describe_fields():
            print(f"{key}  ({kind})\n    {meaning}" if meaning else f"{key}  ({kind})")
    elif call.options.stages:
        from lpcam.pipeline.stages import STAGES  # noqa: PLC0415

        for stage in STAGES:
            print(f"{stage.name:<16}{stage.help}")
    elif call.options.name is None:
        print("\n".join(recipes.bundled_recipes()))
    else:
        print(recipes.bundled_text(call.options.name))
    return 0


def _print_result(result: RunResult) -> None:
    """Print the figures, what was skipped, and where the results are."""
    for rows, has_threshold in (
        ([row for row in result.rows if row["stage"] != "segmentation"], True),
        ([row for row in result.rows if row["stage"] == "segmentation"], False),
    ):
        if rows:
            _print_rows(rows, has_threshold=has_threshold)
    if result.skipped:
        print(f"{len(result.skipped)} skipped:")
        for skip in result.skipped:
            print(f"  {skip['id']}: {skip['reason']}")
    print(f"results in {result.folder}")
    if result.report is not None:
        print(f"report in {result.report}")


def _print_rows(rows: list[dict[str, Any]], *, has_threshold: bool) -> None:
    import rich.table  # noqa: PLC0415

    first = rows[0]
    parts = sorted(first.get("part_coverage", {}))
    title = f"{first['dataset']} {first['split']}, {first['images']} images, percent"
    table = rich.table.Table(title=title)
    table.add_column("method")
    if has_threshold:
        table.add_column("threshold", justify="right")
        table.add_column("chosen by")
    for name in (*SCORES, *parts):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = [row[name.lower()] for name in SCORES]
        numbers += [row["part_coverage"].get(name, float("nan")) for name in parts]
        chosen = [f"{row['threshold']:.2f}", row["threshold_source"]] if has_threshold else []
        table.add_row(row["method"], *chosen, *(f"{100 * number:.1f}" for number in numbers))
    rich.console.Console(width=None if sys.stdout.isatty() else 120).print(table)
