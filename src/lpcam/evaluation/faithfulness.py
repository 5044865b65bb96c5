"""Faithfulness metrics: how the score of a classifier reacts to the pixels a map marks.

Insertion and deletion are of Petsiuk et al., RISE (BMVC 2018); average drop and increase in
confidence of Chattopadhay et al., Grad-CAM++ (WACV 2018). ``score`` maps images (B, c, H, W), as it
expects them, to scores (B, N), without gradients; 0 is the mean colour of normalised images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from lpcam.runtime.errors import DataError

Score = Callable[[Tensor], Tensor]
Fill = Literal["zero", "mean", "blur"]
BLUR_SIZE = 11  #: Window of the Gaussian in pixels, as in RISE.
BLUR_SIGMA = 5.0
STEPS = 50


def filled(images: Tensor, fill: Fill) -> Tensor:
    """Images (B, c, H, W) without content: 0, each one's mean colour, or blurred if large enough.

    Example:
        >>> filled(torch.tensor([[[[0.0, 1.0]]]]), "mean").tolist()
        [[[[0.5, 0.5]]]]
    """
    if fill == "zero":
        return torch.zeros_like(images)
    if fill == "mean":
        return images.mean((-2, -1), keepdim=True).expand_as(images)
    if fill != "blur":
        raise DataError(f"fill is {fill!r}; expected zero, mean or blur")
    if min(images.shape[-2:]) <= BLUR_SIZE // 2:
        raise DataError(
            f"images of {images.shape[-2]} x {images.shape[-1]} pixels are too small for a blur "
            f"of {BLUR_SIZE}; use the fill 'mean'"
        )
    blurred: Tensor = gaussian_blur(images, [BLUR_SIZE, BLUR_SIZE], [BLUR_SIGMA, BLUR_SIGMA])
    return blurred


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
    fill: Fill = "blur",
    batch: int = 16,
) -> PixelCurve:
    """Scores while pixels are inserted, highest map values first; a larger ``auc`` is better.

    Args:
        maps: (B, H, W), in any range: only the order counts; equal values in reading order.
        classes: int64 (B,), the class of each map.
        steps: S; after step k, round(k H W / S) pixels are inserted.
        fill: initial images, see :func:`filled`.
        batch: maximum number of images in a call of ``score``.

    Raises:
        DataError: if shapes do not fit, a map contains NaN, or the scores lack a class.

    Example:
        >>> image = torch.ones(1, 1, 1, 4)
        >>> def score(images): return images.mean((2, 3))
        >>> insertion(score, image, image[:, 0], torch.tensor([0]), steps=2, fill="zero").scores
        tensor([[0.0000, 0.5000, 1.0000]])
    """
    return _curve(score, filled(images, fill), images, maps, classes, steps, batch)


def deletion(
    score: Score,
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    *,
    steps: int = STEPS,
    fill: Fill = "zero",
    batch: int = 16,
) -> PixelCurve:
    """Scores while pixels are replaced by ``fill``; a smaller ``auc`` is better. See `insertion`.

    Example:
        >>> image = torch.ones(1, 1, 1, 4)
        >>> def score(images): return images.mean((2, 3))
        >>> deletion(score, image, image[:, 0], torch.tensor([0]), steps=2).scores
        tensor([[1.0000, 0.5000, 0.0000]])
    """
    return _curve(score, images, filled(images, fill), maps, classes, steps, batch)


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


@torch.no_grad()
def confidences(
    score: Score, images: Tensor, maps: Tensor, classes: Tensor, *, batch: int = 16
) -> tuple[Tensor, Tensor]:
    """Scores (B,) of the classes on the images, and on the products of image and map.

    Maps are (B, H, W) in [0, 1], else a DataError; other arguments as for :func:`insertion`.

    Example:
        >>> image = torch.ones(1, 1, 1, 4)
        >>> def score(images): return images.mean((2, 3))
        >>> confidences(score, image, image[:, 0] / 2, torch.tensor([0]))
        (tensor([1.]), tensor([0.5000]))
    """
    _check(images, maps, classes)
    if not (maps.min() >= -1e-5 and maps.max() <= 1 + 1e-5):
        raise DataError(
            f"maps have values from {float(maps.min())} to {float(maps.max())}; expected 0 to 1, "
            "normalise them first"
        )
    whole, shown = [], []
    parts = (torch.split(one, batch) for one in (images, maps, classes.to(images.device)))
    for image, plane, index in zip(*parts, strict=True):
        whole.append(_of_class(score(image), index))
        shown.append(_of_class(score(image * plane.to(images)[:, None]), index))
    return torch.cat(whole), torch.cat(shown)


def average_drop(whole: Tensor, shown: Tensor) -> float:
    """Mean of max(0, whole - shown) / whole of :func:`confidences` (M,); smaller is better.

    DataError if there is no pair, or a score of a whole image is not positive.

    Example:
        >>> average_drop(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75]))
        0.25
    """
    _check_pairs(whole, shown)
    if not bool((whole > 0).all()):
        raise DataError(
            f"scores of whole images go down to {float(whole.min())}; expected positive ones: give "
            "probabilities (sigmoid or softmax), not logits"
        )
    return float(((whole - shown).clamp(min=0) / whole).mean())


def increase_in_confidence(whole: Tensor, shown: Tensor) -> float:
    """Fraction of pairs with a higher score on the product than on the image; larger is better.

    Example:
        >>> increase_in_confidence(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75]))
        0.5
    """
    _check_pairs(whole, shown)
    return float((shown > whole).double().mean())


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


def _check_pairs(whole: Tensor, shown: Tensor) -> None:
    if whole.ndim != 1 or whole.shape != shown.shape or not len(whole):
        raise DataError(
            f"scores are {tuple(whole.shape)} and {tuple(shown.shape)}; expected (M,) twice, M >= 1"
        )
