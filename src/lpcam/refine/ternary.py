"""Ternary labels for IRN: sure foreground, sure background, ignored pixels between (section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import model_validator
from torch import Tensor

from lpcam.data.dataset import IGNORE, ClassTable
from lpcam.data.masks import enlarge_labels, write_mask
from lpcam.method.seeds import seeds, to_mask
from lpcam.refine.base import Picture, WriteLabels, shifted
from lpcam.refine.crf import CrfSettings, DenseCrf
from lpcam.runtime.settings import Fraction, PresetModel


class TernarySettings(PresetModel):
    """Thresholds of the ternary labels that a network learns from."""

    foreground_threshold: Fraction
    """Seed threshold of the sure foreground in the labels; a CRF cleans the seeds."""
    background_threshold: Fraction
    """Seed threshold of the sure background; pixels between the two are ignored."""
    cam_foreground_threshold: Fraction
    """``foreground_threshold`` for CAM."""
    cam_background_threshold: Fraction
    """``background_threshold`` for CAM."""

    @model_validator(mode="after")
    def _check_thresholds(self) -> Self:
        for method, kind in (("", ""), ("CAM", "cam_")):
            high, low = self.ternary_thresholds(method)
            if high < low:
                both = f"{kind}foreground_threshold {high}", f"{kind}background_threshold {low}"
                raise ValueError(" must not be below ".join(both))
        return self

    def ternary_thresholds(self, method: str, shift: float = 0.0) -> tuple[float, float]:
        """Thresholds (foreground, background) of a method's maps, such as those of ``CAM``."""
        high, low = self.foreground_threshold, self.background_threshold
        if method == "CAM":
            high, low = self.cam_foreground_threshold, self.cam_background_threshold
        return shifted(high, shift), shifted(low, shift)


def crf_labels(
    crf: DenseCrf, image: Tensor, maps: Tensor, thresholds: Sequence[float]
) -> list[Tensor]:
    """Seeds of maps (K, H, W) at each threshold, as hard labels cleaned by a CRF: int64 (H, W)."""
    return _cleaned(crf, image, [seeds(maps, threshold) for threshold in thresholds], len(maps))


def _cleaned(crf: DenseCrf, image: Tensor, hard: list[Tensor], classes: int) -> list[Tensor]:
    """Hard labels (H, W) of one image, cleaned by one CRF."""
    if not classes:
        return hard
    # argmax, which gives the same, takes eight times as long
    return list(crf.refine_labels(image, torch.stack(hard), classes + 1).max(1).indices)


def ternary(foreground: Tensor, background: Tensor) -> Tensor:
    """Join labels (H, W) of a high and a low threshold; where only the low has a class, 255."""
    return foreground.masked_fill((foreground == 0) & (background != 0), IGNORE)


def ternary_key(
    settings: CrfSettings, thresholds: Sequence[float], classes: ClassTable
) -> dict[str, Any]:
    """Everything beside the maps that ternary masks depend on, as JSON."""
    return {
        "thresholds": list(thresholds),
        "crf": settings.model_dump(mode="json", exclude={"preset"}),
        "mask_ids": list(classes.mask_ids),
    }


def ternary_labeller(
    settings: CrfSettings,
    memory: int | None,
    classes: ClassTable,
    thresholds: Sequence[Sequence[float]],
) -> WriteLabels:
    """Writes ternary masks of an image, at its maps' size: 0, mask ids, 255 undecided.

    ``thresholds`` has two for each kind of maps, which show the same classes.
    """
    crf = DenseCrf(settings, memory=memory)

    def write(pictures: Sequence[Picture], paths: Sequence[Path]) -> None:
        hard = [
            seeds(picture.planes, threshold)
            for picture, both in zip(pictures, thresholds, strict=True)
            for threshold in both
        ]
        cleaned = iter(_cleaned(crf, pictures[0].image, hard, len(pictures[0].planes)))
        for picture, path in zip(pictures, paths, strict=True):
            labels = ternary(next(cleaned), next(cleaned)).cpu()
            labels = enlarge_labels(labels, picture.maps.high_res.shape[-2:])
            unsure = labels == IGNORE
            mask = to_mask(labels.masked_fill(unsure, 0), picture.maps.keys, classes)
            mask[unsure.numpy()] = IGNORE
            write_mask(path, mask)

    return write
