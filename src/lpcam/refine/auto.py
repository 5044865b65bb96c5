"""No refinement, and the one that a run chooses for its data: a dense CRF, or none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lpcam.refine import base
from lpcam.refine.crf import CrfRefinement


class _NoRefinement(base.Refinement):
    """The maps as they are; the pseudo masks are the seeds."""

    title = "nothing"

    def threshold(self, section: base.RefineSection, source: base.Source) -> float:
        return source.seed_threshold

    def key(self, job: base.Job) -> Mapping[str, Any]:
        return {}

    def refiner(self, job: base.Job, network: Path, folder: Path) -> base.Refine:
        return lambda picture: picture.planes


class _ChosenRefinement(CrfRefinement):
    """The CRF where it helps by the judges, else none: a run names one of both before it refines.

    Classes of an image of which the CRF would leave next to nothing keep their seed.
    """

    settings = None  # type: ignore[assignment]  # the CRF has those of ``refine.crf``

    def described(self, section: base.RefineSection, tools: base.Tools) -> dict[str, Any]:
        return section.model_dump(mode="json", include={"method", "crf"})


NONE = _NoRefinement()
AUTO = _ChosenRefinement()
