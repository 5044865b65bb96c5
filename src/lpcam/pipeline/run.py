"""A run: the stages of a recipe in order, each skipped when it is up to date."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpcam.data.reader import ListName
from lpcam.pipeline.cache import in_use, locked
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
from lpcam.runtime.progress import Watch, duration, state_lines, watched
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


def status(folder: Path) -> str:
    """What the run of a folder does, or how far it came: stages, time left and warnings, as text.

    Raises:
        ArtefactError: if the folder holds no run.
    """
    run = RunFolder(folder)
    if not run.progress.is_file():
        run.load_recipe()
        use = read_json(run.use) if run.use.is_file() else {}
        took = [f"{n} {duration(use[n]['seconds'])}" for n in stage_names() if n in use]
        return f"finished; no run is working on {folder}\nstages took: {', '.join(took)}"
    state = read_json(run.progress)
    at = f"at {state['current']}, {duration(time.time() - state['written'])} ago"
    lines = [f"running; last change {at}"]
    if not in_use(folder):
        again = shlex.join(["lpcam", "run", str(run.recipe), "--run.folder", str(folder)])
        lines = [f"stopped {at}: {state.get('error', 'the process was killed')}"]
        lines += [f"to resume, run again: {state['command'] or again}"]
    warnings = (f"warning: {text}" for text in state.get("warnings", ()))
    return "\n".join([*lines, *state_lines(state), *warnings])


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
    folder, started = RunFolder(recipe.folder), time.monotonic()
    use = read_json(folder.use) if folder.use.is_file() else {}
    last = max((place for place, name in enumerate(names, 1) if name in use), default=0)
    # a stage without a record before one that has it had nothing to do
    usual = {name: use.get(name, {}).get("seconds", 0.0) for name in names[:last]}
    path = folder.progress if processes.first and only is None else None
    watch = Watch(path, ["data", *names], usual, command)
    with ExitStack() as holds:
        if processes.first:  # for all of them
            holds.enter_context(locked(recipe.folder))
            holds.enter_context(watched(watch))
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
        watch.update(seconds=time.monotonic() - started)
        for stage in stages:
            watch.state["warnings"] = context.warnings
            watch.update(stage.name)
            watch.update(seconds=_work_stage(context, stage))
        processes.wait()
    page = context.folder.report
    made = page if "report" in names and page.is_file() else None
    skipped = skips(context.dataset)
    return RunResult(context.folder.path, context.rows, skipped, made, context.warnings)


def _work_stage(context: Context, stage: Stage) -> float | None:
    """Do the work of a stage; its seconds, or None if it was up to date."""
    started, before = time.monotonic(), context.passes
    reset_peak_memory()
    again = context.only == stage.name
    worked = [context.execute(task, again=again) for task in stage.tasks(context)]
    seconds = time.monotonic() - started if any(worked) else None
    if seconds is not None:
        passes = context.passes - before
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
    return seconds
