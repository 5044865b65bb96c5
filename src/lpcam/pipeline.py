"""A run: classify, CAM, prototypes, LPCAM, seeds, evaluate, each once and each resumable.

Every stage is skipped when, and only when, its inputs and settings are unchanged; see
:mod:`lpcam.ledger`. Inputs are known by the digests of their contents. The stages themselves are in
:mod:`lpcam.stages`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpcam.ledger import locked
from lpcam.processes import join
from lpcam.recipe import Recipe
from lpcam.resources import peak_memory, reset_peak_memory
from lpcam.stages.classify import classify
from lpcam.stages.context import STAGES, Run, StageName
from lpcam.stages.evaluate import evaluate
from lpcam.stages.maps import map_cam, map_lpcam
from lpcam.stages.prototypes import cluster
from lpcam.stages.seeds import write_seeds

logger = logging.getLogger(__name__)

WORK: Mapping[StageName, Callable[[Run], bool]] = {
    "classify": classify,
    "cam": map_cam,
    "prototypes": cluster,
    "lpcam": map_lpcam,
    "seeds": write_seeds,
    "evaluate": evaluate,
}
"""What each stage does, in their order; it tells whether there was anything to do."""


@dataclass(frozen=True)
class RunResult:
    """What a run made."""

    folder: Path
    rows: list[dict[str, Any]]
    skipped: list[dict[str, str]]


def run(recipe: Recipe, *, until: StageName = "evaluate", command: str = "") -> RunResult:
    """Bring the run folder up to date, up to and including the stage ``until``.

    Sets the number of threads of torch and how the C library treats freed memory, for the whole
    process.

    Args:
        command: how the run was asked for, recorded in every figure's protocol.

    Raises:
        LpcamError: of a kind that says what was wrong with data, recipe, weights or artefacts.
    """
    processes, device = join(recipe.run.device)
    # The first process holds the folder for all of them.
    with locked(recipe.folder) if processes.first else contextlib.nullcontext():
        processes.wait()
        result = _up_to(Run(recipe, command, until, processes, device))
        processes.wait()
    return result


def _up_to(run: Run) -> RunResult:
    for name in STAGES[: STAGES.index(run.until) + 1]:
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
    return RunResult(run.folder, run.rows, skipped)
