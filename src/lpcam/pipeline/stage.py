"""Stages of a run as values: each names one step and yields the tasks that it consists of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from lpcam.pipeline.cache import Task
from lpcam.pipeline.context import Context
from lpcam.pipeline.recipe import Recipe

REMEDIES = {
    "host": "a section host, e.g. --host.method amn",
    "refine": "a section refine, e.g. --refine.method irn",
    "segment": "a section segment, e.g. --segment.network deeplabv2",
}


def nothing(_: Context) -> None:
    """Validate nothing."""


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    All stages are in :data:`lpcam.pipeline.stages.STAGES` once; the order of a run, ``--until``,
    the help and the documentation read that list.
    """

    name: str
    help: str
    """What it does, a plain sentence."""
    tasks: Callable[[Context], Iterable[Task]]
    """Its tasks in order. A task may use the results of those before it."""
    section: Literal["host", "refine", "segment"] | None = None
    """The section that a recipe must have for it."""
    validate: Callable[[Context], None] = nothing
    """Refuse, before any stage runs, what this one could not work with."""

    def present(self, recipe: Recipe) -> bool:
        """Tell whether a recipe has this stage."""
        return self.section is None or getattr(recipe, self.section) is not None

    @property
    def remedy(self) -> str:
        """Option that adds this stage to a recipe."""
        return "" if self.section is None else REMEDIES[self.section]
