"""A run: classify, CAM, prototypes, LPCAM, seeds, evaluate, report, each once and resumable.

Every stage is skipped when, and only when, its inputs and settings are unchanged; see
:mod:`lpcam.ledger`. Inputs are known by the digests of their contents. The stages themselves are in
:mod:`lpcam.stages`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpcam.errors import ArtefactError, RecipeError
from lpcam.ledger import locked
from lpcam.processes import join
from lpcam.recipe import ListName, Recipe, load_recipe
from lpcam.resources import peak_memory, reset_peak_memory
from lpcam.stages.classify import classify
from lpcam.stages.context import (
    HOSTING,
    REFINING,
    SEGMENT_LISTS,
    SEGMENTING,
    STAGES,
    Run,
    StageName,
    left_out_stages,
)
from lpcam.stages.evaluate import evaluate
from lpcam.stages.host import cluster_host, map_host, rehearse_host, train_host, write_host_labels
from lpcam.stages.irn import train_boundaries, write_ir_labels
from lpcam.stages.maps import map_cam, map_lpcam
from lpcam.stages.prototypes import cluster
from lpcam.stages.psa import rehearse_psa, train_affinities, write_psa_labels
from lpcam.stages.refine import check_saliency, take_maps, write_pseudo_masks
from lpcam.stages.report import report_path, write_report
from lpcam.stages.seeds import write_seeds
from lpcam.stages.segment import check, rehearse, take_masks, test, train

logger = logging.getLogger(__name__)

WORK: Mapping[StageName, Callable[[Run], bool]] = {
    "classify": classify,
    "cam": map_cam,
    "prototypes": cluster,
    "lpcam": map_lpcam,
    "seeds": write_seeds,
    "host-labels": write_host_labels,
    "host": train_host,
    "host-prototypes": cluster_host,
    "host-maps": map_host,
    "ir-labels": write_ir_labels,
    "irn": train_boundaries,
    "psa-labels": write_psa_labels,
    "psa": train_affinities,
    "pseudo": write_pseudo_masks,
    "segment": train,
    "test": test,
    "evaluate": evaluate,
    "report": write_report,
}
"""What each stage does, in their order; it tells whether there was anything to do."""


@dataclass(frozen=True)
class RunResult:
    """What a run made."""

    folder: Path
    rows: list[dict[str, Any]]
    skipped: list[dict[str, str]]
    report: Path | None = None
    """The page to look at, where the run went so far and its recipe wants one."""


def run(recipe: Recipe, *, until: StageName = "report", command: str = "") -> RunResult:
    """Bring the run folder up to date, up to and including the stage ``until``.

    Sets the number of threads of torch and how the C library treats freed memory, for the whole
    process.

    Args:
        command: how the run was asked for, recorded in every figure's protocol.

    Raises:
        LpcamError: of a kind that says what was wrong with data, recipe, weights or artefacts.
    """
    if until in SEGMENTING and recipe.segment is None:
        raise RecipeError(
            f"the recipe {recipe.name} has no stage {until!r}: it belongs to a section segment; "
            "add --segment.network deeplabv2 (or wideresnet38, or upernet)"
        )
    if until in HOSTING and recipe.host is None:
        raise RecipeError(
            f"the recipe {recipe.name} has no stage {until!r}: it belongs to a section host; add "
            "--host.method amn (or mctformer, or edam)"
        )
    if until in left_out_stages(recipe):
        method = "psa" if until.startswith("psa") else "irn"
        raise RecipeError(
            f"the recipe {recipe.name} has no stage {until!r}: it belongs to a section refine with "
            f"method {method} (pseudo: or any other); add --refine.method {method}"
        )
    if STAGES.index(until) >= STAGES.index("segment"):
        check(recipe)
    processes, device = join(recipe.run.device)
    # The first process holds the folder for all of them.
    with locked(recipe.folder) if processes.first else contextlib.nullcontext():
        processes.wait()
        result = _up_to(Run(recipe, command, until, processes, device))
        processes.wait()
    return result


def refine(recipe: Recipe, maps: Path, *, command: str = "") -> RunResult:
    """Make pseudo masks of maps that another program made, and score them where masks exist.

    Args:
        recipe: its data, classifier's backbone (of IRN), refine and run sections serve.
        maps: a folder of map files, as :func:`lpcam.stages.refine.take_maps` takes them.
        command: how it was asked for.

    Raises:
        RecipeError: if the recipe has no section refine.
        LpcamError: as :func:`run`.
    """
    if recipe.refine is None:
        raise RecipeError(
            f"the recipe {recipe.name} does not say how to refine maps; add a section, or "
            "--refine.method irn (or crf, or pamr)"
        )
    processes, device = join(recipe.run.device)
    with locked(recipe.folder) if processes.first else contextlib.nullcontext():
        processes.wait()
        lists: tuple[ListName, ...] = ("maps", "evaluate")
        run = Run(recipe, command, "evaluate", processes, device, lists=lists)
        take_maps(run, maps)
        result = _work(run, (*REFINING, "evaluate"))
        processes.wait()
    return result


def segment(recipe: Recipe, masks: Path, *, command: str = "") -> RunResult:
    """Train a segmenter on the masks of another program, and score it where masks exist.

    Args:
        recipe: its data, segment and run sections serve.
        masks: a folder of index masks, as :func:`lpcam.stages.segment.take_masks` takes them.
        command: how it was asked for.

    Raises:
        RecipeError: if the recipe has no section segment.
        LpcamError: as :func:`run`.
    """
    if recipe.segment is None:
        raise RecipeError(
            f"the recipe {recipe.name} names no segmenter; add a section, or --segment.network "
            "deeplabv2 (or wideresnet38, or upernet)"
        )
    check(recipe, given=True)
    processes, device = join(recipe.run.device)
    with locked(recipe.folder) if processes.first else contextlib.nullcontext():
        processes.wait()
        run = Run(recipe, command, "evaluate", processes, device, lists=SEGMENT_LISTS)
        take_masks(run, masks)
        result = _work(run, (*SEGMENTING, "evaluate"))
        processes.wait()
    return result


def report(folder: Path, device: str | None = None) -> Path:
    """Make the report of a finished run again, from what is in its folder; returns its path.

    Args:
        device: instead of the recipe's, for the backbone's passes over the images that are searched
            for patches.

    Raises:
        ArtefactError: if the folder holds no run, or one that is not up to date.
        LpcamError: as :func:`run`.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise ArtefactError(
            f"{folder} holds no run: there is no {path.name} in it; give the folder that 'lpcam "
            "run' wrote"
        )
    changes = [("run.folder", str(folder))]
    recipe = load_recipe(path, changes + ([] if device is None else [("run.device", device)]))
    processes, own_device = join(recipe.run.device)
    with locked(recipe.folder):
        result = _up_to(Run(recipe, "", "report", processes, own_device, only="report"))
    if result.report is None:
        raise ArtefactError(
            f"the recipe of {folder} wants no report (report.images is 0); run it with "
            "--report.images 500"
        )
    return result.report


def _up_to(run: Run) -> RunResult:
    return _work(run, STAGES[: STAGES.index(run.until) + 1])


def _work(run: Run, stages: Sequence[StageName]) -> RunResult:
    left_out = left_out_stages(run.recipe)
    if "segment" in stages and "segment" not in left_out and run.only is None:
        rehearse(run)
    if run.only is None and "host" in stages and "host" not in left_out:
        rehearse_host(run)
    if run.only is None and "pseudo" in stages:
        check_saliency(run)
    if run.only is None and "psa" in stages:
        rehearse_psa(run)
    for name in stages:
        if name in left_out:
            continue
        started = time.monotonic()
        reset_peak_memory()
        worked = WORK[name](run)
        seconds = time.monotonic() - started
        if worked:
            logger.info("%s: done in %.1f s", name, seconds)
            run.note_use(name, seconds, peak_memory())
        else:
            logger.info("%s: up to date", name)
    skipped = [{"id": s.id, "reason": s.reason} for s in run.dataset.skipped]
    page = report_path(run.folder)
    has_report = run.until == "report" and page.is_file()
    return RunResult(run.folder, run.rows, skipped, page if has_report else None)
