"""Labels from class maps and a saliency map, as EDAM fuses them (specification of EDAM, 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from lpcam.errors import DataError
from lpcam.presets import SaliencySettings
from lpcam.refine.base import compute_dtype
from lpcam.refine.crf import DenseCrf
from lpcam.refine.psa import crf_scores

NEVER, ALWAYS = -2.0, 2.0
"""Scores below and above the indicator of the background, which is 0 or 1 (step 4)."""
BACKGROUND_POWER = 1.0
"""Power of 1 - the highest map, the background's score before a CRF (step 1)."""


def fuse_saliency(
    maps: Tensor,
    saliency: Tensor,
    settings: SaliencySettings,
    *,
    crf: tuple[Tensor, DenseCrf] | None = None,
) -> Tensor:
    """Labels of maps, with the background where an image is not salient.

    Args:
        maps: (K, H, W) in [0, 1] of the image's classes, each divided by its maximum, in ascending
            order of the classes (the first of equal scores wins).
        saliency: (H, W) uint8, grey levels of a saliency map of the image.
        settings: ``crf`` says whether a CRF comes first; ``alpha`` and ``beta`` must fit.
        crf: the image, (H, W, 3) uint8 RGB, and the CRF whose posteriors replace the maps.

    Returns:
        int64 (H, W): 0 for background, k + 1 for the k-th map. Without a class all are background.

    Raises:
        DataError: if a CRF is given although the settings want none or is missing, or as
            :func:`lpcam.refine.psa.crf_scores` and :func:`saliency_labels`.

    Example:
        >>> maps, saliency = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[0, 255]]).byte()
        >>> fuse_saliency(maps, saliency, SaliencySettings.from_preset("edam")).tolist()
        [[0, 1]]
    """
    if settings.crf != (crf is not None):
        raise DataError(
            f"saliency.crf is {settings.crf}, but {'a' if crf else 'no'} CRF was given; alpha and "
            "beta fit one case only: give "
            + ("the image and a CRF" if settings.crf else "none, or use the preset edam.crf")
        )
    _check_maps(maps, saliency)
    scores = maps
    if crf is not None:
        scores = crf_scores(crf[1], crf[0], maps, [BACKGROUND_POWER])[0, 1:]
    return saliency_labels(
        scores, saliency, theta=settings.theta, alpha=settings.alpha, beta=settings.beta
    )


def saliency_labels(
    scores: Tensor, saliency: Tensor, *, theta: float, alpha: float, beta: float
) -> Tensor:
    """The best class of each pixel, or the background (steps 2 to 5).

    A pixel that is not salient is background unless a class has more than ``beta``. A salient pixel
    has the best class unless all have less than ``alpha``. The first of equal classes wins.

    Args:
        scores: (K, H, W) maps or posteriors in [0, 1].
        saliency: (H, W) uint8; a pixel is salient above the grey level 100 ``theta``.
        theta, alpha, beta: alpha is above 0 and beta below 1.

    Returns:
        int64 (H, W): 0 for background, k + 1 for the k-th class.

    Raises:
        DataError: if shapes, dtypes or devices do not fit, or a score is not finite.

    Example:
        >>> scores, saliency = torch.tensor([[[0.9, 0.1]]]), torch.tensor([[0, 255]]).byte()
        >>> saliency_labels(scores, saliency, theta=0.2, alpha=0.25, beta=0.8).tolist()
        [[1, 0]]
    """
    _check_maps(scores, saliency)
    # alpha and beta of posteriors are nearer to 0 and 1 than half precision can represent
    wide = scores.to(compute_dtype(scores))
    decided = torch.where(wide > beta, ALWAYS, torch.where(wide < alpha, NEVER, wide))
    # in float32, in which 100 times 0.29 is the grey level 29
    background = (saliency.float() <= 100 * theta).to(wide.dtype)
    return torch.cat([background[None], decided]).argmax(0)


def _check_maps(maps: Tensor, saliency: Tensor) -> None:
    if maps.ndim != 3 or not maps.is_floating_point() or not bool(torch.isfinite(maps).all()):
        raise DataError(
            f"maps are {maps.dtype} {tuple(maps.shape)}; expected finite floating-point numbers of "
            "the shape (classes, height, width)"
        )
    if saliency.dtype != torch.uint8 or saliency.ndim != 2:
        raise DataError(
            f"the saliency map is {saliency.dtype} {tuple(saliency.shape)}; expected grey levels, "
            "uint8 of the shape (height, width): multiply a map in [0, 1] by 255"
        )
    if saliency.shape != maps.shape[1:] or saliency.device != maps.device:
        raise DataError(
            f"the saliency map {tuple(saliency.shape)} on {saliency.device} and the maps "
            f"{tuple(maps.shape)} on {maps.device} differ in size or device; read it with "
            "lpcam.data.saliency.read_saliency at the size of the image"
        )
