"""A run: the stages of a recipe in order, each skipped when it is up to date."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpcam.data.reader import ListName
from lpcam.pipeline.cache import locked
from lpcam.pipeline.context import Context, skips
from lpcam.pipeline.datasets import SEGMENT_LISTS
from lpcam.pipeline.recipe import Recipe, load_recipe
from lpcam.pipeline.run_folder import RunFolder
from lpcam.pipeline.sharing import Shared
from lpcam.pipeline.stages import REMEDIES, STAGES, Stage
from lpcam.pipeline.stages.classify import check_labels
from lpcam.pipeline.stages.refine import import_maps
from lpcam.pipeline.stages.segment import give_segmenter, import_masks
from lpcam.runtime.distributed import join
from lpcam.runtime.errors import ArtefactError, RecipeError
from lpcam.runtime.files import read_json, write_json
from lpcam.runtime.resources import peak_memory, reset_peak_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """Results of a run."""

    folder: Path
    rows: list[dict[str, Any]]  #: Its scores, one row for each method, with their protocol.
    skipped: list[dict[str, str]]  #: Images that were left out, with the reason.
    report: Path | None = None  #: The HTML report, if the run got that far and its recipe has one.
    warnings: tuple[str, ...] = ()  #: What makes the results doubtful, such as missing negatives.


def stage_names() -> list[str]:
    """Names of all stages, in order."""
    return [stage.name for stage in STAGES]


def run(
    recipe: Recipe | str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    until: str = "report",
    command: str = "",
    shared: Shared | None = None,
) -> RunResult:
    """Bring a run folder up to date, up to and including one stage.

    Sets the number of threads of torch and how the C library treats freed memory, for the whole
    process.

    Args:
        recipe: a recipe, the path of a recipe file or the name of a bundled one.
        changes: values of the recipe to replace, such as ``{"lpcam.tau": 0.25}``.
        until: name of the last stage.
        command: the command line, recorded in the protocol of every score.
        shared: what it shares with runs before it in this process; None: nothing.

    Raises:
        RecipeError: if the recipe is invalid or has no stage of that name.
        LpcamError: if data, weights or artefacts do not fit; the message says why.
    """
    if isinstance(recipe, Recipe):
        recipe = recipe.changed(changes or {})
    else:
        recipe = load_recipe(recipe, changes)
    if recipe.segment is not None and recipe.segment.trained is not None:
        trained = recipe.segment.trained
        return _work_on(recipe, command, "segment", SEGMENT_LISTS, give_segmenter, trained)
    names = stage_names()
    if until not in names:
        raise RecipeError(f"there is no stage {until!r}; there are {', '.join(names)}")
    stages = STAGES[: names.index(until) + 1]
    if not stages[-1].present(recipe):
        raise RecipeError(
            f"the recipe {recipe.name} has no stage {until!r}; to have it, add "
            f"{REMEDIES[stages[-1].section]}"
        )
    return _work(recipe, command, stages, shared=shared)


def refine(recipe: Recipe, maps: Path, *, command: str = "") -> RunResult:
    """Make pseudo masks from map files of another program, and score them where masks exist."""
    if recipe.refine is None:
        raise RecipeError(
            f"the recipe {recipe.name} does not say how to refine maps; add {REMEDIES['refine']}"
        )
    return _work_on(recipe, command, "refine", ("maps", "evaluate"), import_maps, maps)


def segment(recipe: Recipe, masks: Path, *, command: str = "") -> RunResult:
    """Train a segmenter on index masks of another program, and score it where masks exist."""
    if recipe.segment is None:
        raise RecipeError(f"the recipe {recipe.name} names no segmenter; add {REMEDIES['segment']}")
    return _work_on(recipe, command, "segment", SEGMENT_LISTS, import_masks, masks)


def report(folder: Path, device: str | None = None) -> Path:
    """Make the report of a finished run again, from what is in its folder; returns its path."""
    changes = {"run.folder": str(folder), **({} if device is None else {"run.device": device})}
    recipe = RunFolder(folder).load_recipe(changes)
    if not recipe.report.images:
        raise ArtefactError(
            f"the recipe of {folder} has no report (report.images is 0); run it with "
            "--report.images 500"
        )
    result = _work(recipe, "", STAGES, only="report")
    assert result.report is not None
    return result.report


def _work_on(
    recipe: Recipe,
    command: str,
    section: str,
    lists: Sequence[ListName],
    take: Callable[[Context, Path], None],
    folder: Path,
) -> RunResult:
    """Run the stages of a section on maps or masks of another program."""
    stages = [stage for stage in STAGES if stage.section == section or stage.name == "evaluate"]
    return _work(recipe, command, stages, lists=lists, take=lambda context: take(context, folder))


def _work(
    recipe: Recipe,
    command: str,
    stages: Sequence[Stage],
    *,
    only: str | None = None,
    lists: Sequence[ListName] | None = None,
    take: Callable[[Context], None] | None = None,
    shared: Shared | None = None,
) -> RunResult:
    """Run the stages that the recipe has, in a folder that is locked."""
    stages = [stage for stage in stages if stage.present(recipe)]
    names = [stage.name for stage in stages]
    processes, device = join(recipe.run.device)
    # The first process holds the folder for all of them.
    with locked(recipe.folder) if processes.first else contextlib.nullcontext():
        processes.wait()
        how: dict[str, Any] = {"stages": names, "only": only, "lists": lists, "shared": shared}
        context = Context(recipe, command, processes, device, **how)
        if take is not None:
            take(context)
        elif recipe.classifier.trained is None:
            check_labels(context)
        for stage in stages:
            if stage.validate is not None and only is None:
                stage.validate(context)
        for stage in stages:
            _work_stage(context, stage)
        processes.wait()
    page = context.folder.report
    made = page if "report" in names and page.is_file() else None
    skipped = skips(context.dataset)
    return RunResult(context.folder.path, context.rows, skipped, made, context.warnings)


def _work_stage(context: Context, stage: Stage) -> None:
    started, before = time.monotonic(), context.passes
    reset_peak_memory()
    again = context.only == stage.name
    worked = [context.execute(task, again=again) for task in stage.tasks(context)]
    if any(worked):
        seconds, passes = time.monotonic() - started, context.passes - before
        told = f", {passes:,} passes" if passes else ""
        logger.info("%s: done in %.1f s%s", stage.name, seconds, told)
        if context.processes.first:
            path = context.folder.use
            use = read_json(path) if path.is_file() else {}
            use[stage.name] = {
                "seconds": round(seconds, 2),
                "peak_memory": peak_memory(),
                "passes": passes,
            }
            write_json(path, use)
    elif worked:  # else a host or refinement that has no use for this stage
        logger.info("%s: up to date", stage.name)
