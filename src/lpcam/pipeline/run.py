"""A run: the stages of a recipe in order, each skipped when it is up to date."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpcam.data.reader import ListName
from lpcam.pipeline.cache import locked
from lpcam.pipeline.context import Context
from lpcam.pipeline.datasets import SEGMENT_LISTS
from lpcam.pipeline.recipe import Recipe, load_recipe
from lpcam.pipeline.run_folder import RunFolder
from lpcam.pipeline.stage import Stage
from lpcam.pipeline.stages import STAGES
from lpcam.pipeline.stages.refine import import_maps
from lpcam.pipeline.stages.segment import import_masks
from lpcam.runtime.distributed import join
from lpcam.runtime.errors import ArtefactError, RecipeError
from lpcam.runtime.resources import peak_memory, reset_peak_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """Results of a run."""

    folder: Path
    rows: list[dict[str, Any]]
    """Its figures, one for each method, with their protocol."""
    skipped: list[dict[str, str]]
    """Images that were left out, with the reason."""
    report: Path | None = None
    """The HTML report, if the run got that far and its recipe has one."""


def stage_names() -> list[str]:
    """Names of all stages, in order."""
    return [stage.name for stage in STAGES]


def run(
    recipe: Recipe | str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    until: str = "report",
    command: str = "",
) -> RunResult:
    """Bring a run folder up to date, up to and including one stage.

    Sets the number of threads of torch and how the C library treats freed memory, for the whole
    process.

    Args:
        recipe: a recipe, the path of a recipe file or the name of a bundled one.
        changes: values of the recipe to replace, such as ``{"lpcam.tau": 0.25}``.
        until: name of the last stage.
        command: the command line, recorded in every figure's protocol.

    Raises:
        RecipeError: if the recipe is invalid or has no stage of that name.
        LpcamError: if data, weights or artefacts do not fit; the message says why.
    """
    recipe = as_recipe(recipe, changes)
    names = stage_names()
    if until not in names:
        raise RecipeError(f"there is no stage {until!r}; there are {', '.join(names)}")
    stages = STAGES[: names.index(until) + 1]
    last = stages[-1]
    if not last.present(recipe):
        raise RecipeError(
            f"the recipe {recipe.name} has no stage {until!r}; to have it, add {last.remedy}"
        )
    with _context(recipe, command, until=until) as context:
        return _work(context, stages)


def as_recipe(recipe: Recipe | str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a recipe, a file or a bundled name, with some values replaced.

    Raises:
        RecipeError: as :func:`lpcam.pipeline.recipe.load_recipe`.
    """
    if isinstance(recipe, Recipe):
        return recipe.changed(changes or {})
    return load_recipe(recipe, changes or {})


def refine(recipe: Recipe, maps: Path, *, command: str = "") -> RunResult:
    """Make pseudo masks from maps of another program, and score them where masks exist.

    Args:
        recipe: its data, classifier (the backbone of IRN), refine and run sections are used.
        maps: a folder of map files (:func:`lpcam.pipeline.stages.refine.import_maps`).
        command: the command line, for the protocol.

    Raises:
        RecipeError: if the recipe has no section refine.
        LpcamError: as :func:`run`.
    """
    if recipe.refine is None:
        raise RecipeError(
            f"the recipe {recipe.name} does not say how to refine maps; add a section refine, "
            "e.g. --refine.method irn"
        )
    with _context(recipe, command, until="evaluate", lists=("maps", "evaluate")) as context:
        import_maps(context, maps)
        return _work(context, _of_section("refine"))


def segment(recipe: Recipe, masks: Path, *, command: str = "") -> RunResult:
    """Train a segmenter on masks of another program, and score it where masks exist.

    Args:
        recipe: its data, segment and run sections are used.
        masks: a folder of index masks (:func:`lpcam.pipeline.stages.segment.import_masks`).
        command: the command line, for the protocol.

    Raises:
        RecipeError: if the recipe has no section segment.
        LpcamError: as :func:`run`.
    """
    if recipe.segment is None:
        raise RecipeError(
            f"the recipe {recipe.name} names no segmenter; add a section segment, e.g. "
            "--segment.network deeplabv2"
        )
    with _context(recipe, command, until="evaluate", lists=SEGMENT_LISTS) as context:
        import_masks(context, masks)
        return _work(context, _of_section("segment"))


def report(folder: Path, device: str | None = None) -> Path:
    """Make the report of a finished run again, from what is in its folder; returns its path.

    Args:
        folder: folder of the run.
        device: for the backbone's passes over the images that are searched for patches; None takes
            the recipe's.

    Raises:
        ArtefactError: if the folder holds no run, or one that is not up to date.
        LpcamError: as :func:`run`.
    """
    changes: dict[str, Any] = {"run.folder": str(folder)}
    if device is not None:
        changes["run.device"] = device
    recipe = load_recipe(RunFolder(folder).require_recipe(), changes)
    if not recipe.report.images:
        raise ArtefactError(
            f"the recipe of {folder} has no report (report.images is 0); run it with "
            "--report.images 500"
        )
    with _context(recipe, "", until="report", only="report") as context:
        result = _work(context, STAGES)
    assert result.report is not None
    return result.report


@contextmanager
def _context(
    recipe: Recipe,
    command: str,
    *,
    until: str,
    only: str | None = None,
    lists: Sequence[ListName] | None = None,
) -> Iterator[Context]:
    """The context of a run whose folder is locked."""
    processes, device = join(recipe.run.device)
    # The first process holds the folder for all of them.
    with locked(recipe.folder) if processes.first else contextlib.nullcontext():
        processes.wait()
        yield Context(recipe, command, processes, device, until=until, only=only, lists=lists)
        processes.wait()


def _of_section(section: str) -> list[Stage]:
    return [stage for stage in STAGES if stage.section == section or stage.name == "evaluate"]


def _work(context: Context, stages: Sequence[Stage]) -> RunResult:
    present = [stage for stage in stages if stage.present(context.recipe)]
    context.stages = [stage.name for stage in present]
    if context.only is None:
        for stage in present:
            stage.validate(context)
    for stage in present:
        started = time.monotonic()
        reset_peak_memory()
        again = context.only == stage.name
        worked = [context.execute(task, again=again) for task in stage.tasks(context)]
        if not worked:  # a host or refinement that has no use for this stage
            continue
        if any(worked):
            seconds = time.monotonic() - started
            logger.info("%s: done in %.1f s", stage.name, seconds)
            context.note_use(stage.name, seconds, peak_memory())
        else:
            logger.info("%s: up to date", stage.name)
    skipped = [{"id": s.id, "reason": s.reason} for s in context.dataset.skipped]
    page = context.folder.report
    has_report = context.until == "report" and page.is_file()
    return RunResult(context.folder.path, context.rows, skipped, page if has_report else None)
