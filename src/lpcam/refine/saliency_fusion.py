"""Fusion of maps with saliency maps (EDAM, section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lpcam.refine.base import Job, Picture, Refine, Refinement, RefineSection, Tools, compute_dtype
from lpcam.refine.crf import CrfSettings, DenseCrf, crf_scores
from lpcam.refine.saliency_maps import (
    find_saliency,
    read_saliency,
    read_values,
    saliency,
    saliency_maximum,
)
from lpcam.runtime.files import digest_file, digest_json
from lpcam.runtime.settings import PresetModel


class SaliencySettings(PresetModel):
    """Fusion of maps with a saliency map (specification of EDAM, section 4)."""

    table: ClassVar[str] = "saliency"
    preset: str = "edam"

    theta: Annotated[float, Field(ge=0.0, le=2.55)]
    """Pixels with a grey level above 100 theta (of 255) are salient."""
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)]
    """A pixel never gets a class whose score is below this."""
    beta: Annotated[float, Field(gt=0.0, lt=1.0)]
    """A pixel gets a class whose score is above this even where it is not salient."""
    crf: bool
    """Whether a dense CRF is applied first; alpha and beta depend on it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.alpha >= self.beta:
            raise ValueError(f"alpha {self.alpha} must be below beta {self.beta}")
        return self


NEVER, ALWAYS = -2.0, 2.0
"""Scores below and above the indicator of the background, which is 0 or 1 (step 4)."""
BACKGROUND_POWER = 1.0
"""Power of 1 - the highest map, the background's score before a CRF (step 1)."""
REVISION = 1  #: Revision of the saliency that is computed, for cache keys.


def saliency_labels(scores: Tensor, saliency: Tensor, settings: SaliencySettings) -> Tensor:
    """The best class of each pixel, k + 1, or the background, 0 (steps 2 to 5), as int64 (H, W).

    Takes maps or posteriors (K, H, W) in [0, 1] and saliency (H, W) uint8. A pixel that is not
    salient is background unless a class has more than ``beta``. A salient pixel has the best class
    unless all have less than ``alpha``. The first of equal classes wins.
    """
    # alpha and beta of posteriors are nearer to 0 and 1 than half precision can represent
    wide = scores.to(compute_dtype(scores))
    below = torch.where(wide < settings.alpha, NEVER, wide)
    decided = torch.where(wide > settings.beta, ALWAYS, below)
    # in float32, in which 100 times 0.29 is the grey level 29
    background = (saliency.float() <= 100 * settings.theta).to(wide.dtype)
    return torch.cat([background[None], decided]).argmax(0)


class _SaliencyRefinement(Refinement):
    """The maps fused with a saliency map (EDAM)."""

    title = "saliency"
    settings = SaliencySettings
    uses_saliency = True

    def validate(self, section: RefineSection, tools: Tools) -> None:
        if isinstance(tools.saliency, Path):
            paths, top = _saliency_files(tools, tools.saliency)
            for _ in tools.sharing.map(lambda path: read_values(path, maximum=top), paths):
                pass

    def crf_use(self, section: RefineSection) -> str | Literal[False]:
        return "on the maps" if section.settings.crf else False

    def key(self, job: Job) -> Mapping[str, Any]:
        found = {"settings": job.settings.model_dump(mode="json", exclude={"preset"})}
        if job.settings.crf:
            found["crf"] = CrfSettings.from_preset("edam").model_dump(mode="json")
        if not isinstance(job.tools.saliency, Path):
            return {**found, "saliency": {"computed": REVISION}}
        paths = find_saliency(job.tools.saliency, (item.id for item in job.tools.items)).values()
        return {**found, "saliency": digest_json([digest_file(path) for path in paths])}

    def described(self, section: RefineSection, tools: Tools) -> dict[str, Any]:
        maps = tools.saliency.name if isinstance(tools.saliency, Path) else tools.saliency
        return {**super().described(section, tools), "saliency_maps": maps}

    def refiner(self, job: Job, network: Path, folder: Path) -> Refine:
        maps = job.tools.saliency
        top = _saliency_files(job.tools, maps)[1] if isinstance(maps, Path) else None
        settings = CrfSettings.from_preset("edam")
        crf = DenseCrf(settings, memory=job.tools.memory) if job.settings.crf else None

        def refine(picture: Picture) -> Tensor:
            image, planes = picture.image, picture.planes
            if isinstance(maps, Path):
                size = (image.shape[0], image.shape[1])
                levels = torch.from_numpy(read_saliency(maps, picture.item.id, size, maximum=top))
            else:
                levels = saliency(image.cpu())
            if crf is not None:
                planes = crf_scores(crf, image, planes, [BACKGROUND_POWER])[0, 1:]
            fused = saliency_labels(planes, levels.to(image.device), job.settings)
            numbers = torch.arange(1, len(planes) + 1, device=fused.device)
            return (fused == numbers[:, None, None]).to(planes)

        return refine


def _saliency_files(tools: Tools, folder: Path) -> tuple[list[Path], float | None]:
    """The saliency maps of all images, and the value that means 1 in them."""
    paths = list(find_saliency(folder, (item.id for item in tools.items)).values())
    return paths, saliency_maximum(paths)


REFINEMENT = _SaliencyRefinement()
