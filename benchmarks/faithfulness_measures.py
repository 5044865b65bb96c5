"""Faithfulness metrics: how the score of a classifier reacts to the pixels a map marks.

Insertion and deletion are of Petsiuk et al., RISE (BMVC 2018). ``score`` maps images (B, c, H, W),
as it expects them, to scores (B, N); 0 is the mean colour of normalised images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from lpcam.runtime.errors import DataError

Score = Callable[[Tensor], Tensor]
BLUR_SIZE = 11  #: Window of the Gaussian in pixels, as in RISE.
BLUR_SIGMA = 5.0
STEPS = 50


@dataclass(frozen=True)
class PixelCurve:
    """Scores while pixels are inserted or deleted."""

    fractions: Tensor  #: (S + 1,) fractions of the changed pixels, from 0 to 1
    scores: Tensor  #: (B, S + 1) scores of each image's class

    @property
    def auc(self) -> Tensor:
        """(B,) area under each curve, by trapezoids."""
        return torch.trapezoid(self.scores, self.fractions, dim=1)


def insertion(
    score: Score,
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    *,
    steps: int = STEPS,
    batch: int = 16,
) -> PixelCurve:
    """Scores while pixels are inserted into a blurred image, highest map values first.

    A larger ``auc`` is better.

    Args:
        maps: (B, H, W), in any range: only the order counts; equal values in reading order.
        classes: int64 (B,), the class of each map.
        steps: S; after step k, round(k H W / S) pixels are inserted.
        batch: maximum number of images in a call of ``score``.

    Raises:
        DataError: if shapes do not fit, images are too small for the blur, a map contains NaN, or
            the scores lack a class.

    Example:
        >>> images = torch.ones(1, 1, 8, 8)
        >>> def score(images): return images.mean((2, 3))
        >>> insertion(score, images, images[:, 0], torch.tensor([0]), steps=2).scores.shape
        torch.Size([1, 3])
    """
    if min(images.shape[-2:]) <= BLUR_SIZE // 2:
        raise DataError(
            f"images of {images.shape[-2]} x {images.shape[-1]} pixels are too small for a blur "
            f"of {BLUR_SIZE}; enlarge them"
        )
    blurred: Tensor = gaussian_blur(images, [BLUR_SIZE, BLUR_SIZE], [BLUR_SIGMA, BLUR_SIGMA])
    return _curve(score, blurred, images, maps, classes, steps, batch)


def deletion(
    score: Score,
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    *,
    steps: int = STEPS,
    batch: int = 16,
) -> PixelCurve:
    """Scores while pixels are replaced by 0; a smaller ``auc`` is better. See `insertion`.

    Example:
        >>> image = torch.ones(1, 1, 1, 4)
        >>> def score(images): return images.mean((2, 3))
        >>> deletion(score, image, image[:, 0], torch.tensor([0]), steps=2).scores
        tensor([[1.0000, 0.5000, 0.0000]])
    """
    return _curve(score, images, torch.zeros_like(images), maps, classes, steps, batch)


@torch.no_grad()
def _curve(
    score: Score, start: Tensor, end: Tensor, maps: Tensor, classes: Tensor, steps: int, batch: int
) -> PixelCurve:
    _check(start, maps, classes)
    count, device, pixels = len(start), start.device, maps[0].numel()
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    ranks = order.argsort(dim=1).view_as(maps)[:, None].to(device)
    changed = torch.tensor([round(k * pixels / steps) for k in range(steps + 1)], device=device)
    pairs = torch.cartesian_prod(torch.arange(count), torch.arange(steps + 1)).to(device)
    found = []
    for image, step in (part.T for part in torch.split(pairs, batch)):
        have_changed = ranks[image] < changed[step].view(-1, 1, 1, 1)
        mixed = torch.where(have_changed, end[image], start[image])
        found.append(_of_class(score(mixed), classes.to(device)[image]))
    fractions = changed.to(start.dtype) / pixels
    return PixelCurve(fractions, torch.cat(found).view(count, steps + 1).to(start.dtype))


def _check(images: Tensor, maps: Tensor, classes: Tensor) -> None:
    count = len(images)
    fits = images.ndim == 4 and maps.shape == (count, *images.shape[-2:])
    if not fits or classes.shape != (count,) or not count:
        raise DataError(
            f"images are {tuple(images.shape)}, maps {tuple(maps.shape)} and classes "
            f"{tuple(classes.shape)}; expected (B, c, H, W), (B, H, W) and (B,), B >= 1"
        )
    if not bool(torch.isfinite(maps).all()):
        raise DataError("maps have NaN or infinite values; compute them again")


def _of_class(scores: Tensor, classes: Tensor) -> Tensor:
    """(B,) of the scores (B, N)."""
    if scores.ndim != 2 or len(scores) != len(classes):
        raise DataError(
            f"score gave {tuple(scores.shape)} for {len(classes)} images; expected (B, N)"
        )
    low, high, count = int(classes.min()), int(classes.max()), scores.shape[1]
    if not 0 <= low <= high < count:
        raise DataError(f"classes go from {low} to {high}; score knows 0 to {count - 1}")
    return scores.gather(1, classes[:, None])[:, 0]
