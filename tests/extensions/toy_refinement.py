"""A refinement of another distribution: the maps are blurred."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lpcam.refine.base import Job, Picture, Refine, Refinement, RefineSection, Source
from lpcam.runtime.settings import Section


class ToySettings(Section):
    """How maps are blurred."""

    radius: Annotated[int, Field(ge=0)] = 2
    """Each pixel becomes the mean of those at most this far away, in pixels."""


class Toy(Refinement):
    """Maps blurred by a box."""

    title = "blur"
    settings = ToySettings

    def threshold(self, section: RefineSection, source: Source) -> float:
        """The threshold of the seeds: maps keep their meaning."""
        return source.seed_threshold

    def refiner(self, job: Job, network: Path, folder: Path) -> Refine:
        """Blurs the maps."""
        radius = job.settings.radius

        def refine(picture: Picture) -> Tensor:
            side = 2 * radius + 1
            return F.avg_pool2d(picture.planes, side, 1, radius, count_include_pad=False)

        return refine


TOY = Toy()
