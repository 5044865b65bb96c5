"""Whether a map shows what the classifier looks at: scores as pixels come, go or fade.

Nothing here knows the truth. Insertion and deletion are of Petsiuk et al., RISE (BMVC 2018);
average drop and increase in confidence of Chattopadhay et al., Grad-CAM++ (WACV 2018).

``score`` is any function of images (B, c, H, W) to scores (B, N), such as a classifier followed by
a sigmoid or a softmax; it is called without gradients, in batches. Images are in the space that it
expects, so a value of 0 is the mean colour where images are normalised, and black where they are
not. Everything stays on the device of the images and is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.errors import DataError

Score = Callable[[Tensor], Tensor]
Fill = Literal["zero", "mean", "blur"]
FILLS: tuple[Fill, ...] = ("zero", "mean", "blur")
BLUR_SIZE = 11
"""Side of the Gaussian's window in pixels, as RISE has it."""
BLUR_SIGMA = 5.0
STEPS = 50


def filled(images: Tensor, fill: Fill) -> Tensor:
    """Images (B, c, H, W) without their content, as the ground of insertion and deletion.

    Args:
        fill: "zero": 0 everywhere; "mean": each image's own mean colour; "blur": the image, blurred
            by a Gaussian (window BLUR_SIZE, standard deviation BLUR_SIGMA, reflected borders).

    Raises:
        DataError: if the fill is unknown, or an image too small to blur.
    """
    if fill == "zero":
        return torch.zeros_like(images)
    if fill == "mean":
        return images.mean((-2, -1), keepdim=True).expand_as(images)
    if fill != "blur":
        raise DataError(f"fill is {fill!r}; expected {', '.join(FILLS)}")
    reach = BLUR_SIZE // 2
    if min(images.shape[-2:]) <= reach:
        raise DataError(
            f"images of {images.shape[-2]} x {images.shape[-1]} pixels are too small for a blur "
            f"of {BLUR_SIZE}; take the fill 'mean'"
        )
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-(offsets**2) / (2 * BLUR_SIGMA**2))
    kernel = kernel / kernel.sum()
    planes = F.pad(images.flatten(0, 1)[:, None], (reach, reach, reach, reach), mode="reflect")
    blurred = F.conv2d(F.conv2d(planes, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return blurred.view_as(images)


# -- Insertion and deletion --------------------------------------------------------------------


@dataclass(frozen=True)
class PixelCurve:
    """Scores of each pair as pixels come or go."""

    fractions: Tensor
    """(S + 1,) of the pixels that have come or gone, from 0 to 1."""
    scores: Tensor
    """(B, S + 1) of each image's class."""

    @property
    def auc(self) -> Tensor:
        """(B,) area below each curve, by trapezoids; the mean score along the way."""
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
    """Score as the image's pixels come onto its ground, those of the highest map values first.

    A map is the better the higher the area (``auc``).

    Args:
        score: images (B, c, H, W) to scores (B, N).
        images: (B, c, H, W), as ``score`` expects them.
        maps: (B, H, W), of any range: only their order counts; equal values in reading order.
        classes: int64 (B,), the class that each map is of.
        steps: S; after step k, round(k H W / S) pixels have come.
        fill: the ground, see :func:`filled`.
        batch: how many images ``score`` is given at once.

    Raises:
        DataError: if shapes do not fit, a map holds NaN, or the scores are no (B, N) with these
            classes.
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
    """Score as the image's pixels go from it, those of the highest map values first.

    A map is the better the lower the area (``auc``). Arguments as :func:`insertion`; ``fill`` is
    what stays where a pixel has gone.
    """
    return _curve(score, images, filled(images, fill), maps, classes, steps, batch)


@torch.no_grad()
def _curve(
    score: Score,
    before: Tensor,
    after: Tensor,
    maps: Tensor,
    classes: Tensor,
    steps: int,
    batch: int,
) -> PixelCurve:
    _check(before, maps, classes)
    if steps < 1 or batch < 1:
        raise DataError(f"steps are {steps} and batch is {batch}; expected at least 1")
    count, (height, width) = len(before), before.shape[-2:]
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks.scatter_(1, order, torch.arange(height * width, device=order.device).expand_as(order))
    ranks = ranks.view(count, 1, height, width).to(before.device)
    changed = torch.tensor(
        [round(step * height * width / steps) for step in range(steps + 1)], device=before.device
    )
    pairs = torch.cartesian_prod(torch.arange(count), torch.arange(steps + 1)).to(before.device)
    found = []
    for start in range(0, len(pairs), batch):
        image, step = pairs[start : start + batch].T
        have_changed = ranks[image] < changed[step].view(-1, 1, 1, 1)
        mixed = torch.where(have_changed, after[image], before[image])
        found.append(_of_class(score(mixed), classes.to(before.device)[image]))
    fractions = changed.to(before.dtype) / (height * width)
    return PixelCurve(fractions, torch.cat(found).view(count, steps + 1).to(before.dtype))


# -- Average drop and increase in confidence ---------------------------------------------------


@torch.no_grad()
def confidences(
    score: Score, images: Tensor, maps: Tensor, classes: Tensor, *, batch: int = 16
) -> tuple[Tensor, Tensor]:
    """Score of each class on the image, and on the product of image and map.

    Args:
        score: images (B, c, H, W) to scores (B, N).
        images: (B, c, H, W), as ``score`` expects them: where the map is 0 the product is 0, the
            mean colour of normalised images.
        maps: (B, H, W) in [0, 1].
        classes: int64 (B,), the class that each map is of.
        batch: how many images ``score`` is given at once.

    Returns:
        two tensors (B,), for :func:`average_drop` and :func:`increase_in_confidence`; those of a
        set's batches can be joined.

    Raises:
        DataError: if shapes do not fit, a map is not in [0, 1], or the scores are no (B, N) with
            these classes.
    """
    _check(images, maps, classes)
    if len(maps) and not (maps.min() >= -1e-5 and maps.max() <= 1 + 1e-5):
        raise DataError(
            f"maps have values from {float(maps.min())} to {float(maps.max())}; expected 0 to 1, "
            "normalise them first"
        )
    whole, shown = [], []
    for start in range(0, len(images), batch):
        part = slice(start, start + batch)
        image, plane = images[part], maps[part].to(images)
        index = classes[part].to(images.device)
        whole.append(_of_class(score(image), index))
        shown.append(_of_class(score(image * plane[:, None]), index))
    return torch.cat(whole), torch.cat(shown)


def average_drop(whole: Tensor, shown: Tensor) -> float:
    """Mean of max(0, whole - shown) / whole over pairs, a fraction: the lower the better.

    Args:
        whole, shown: (M,) of :func:`confidences`, probabilities.

    Raises:
        DataError: if there is no pair, or a score of a whole image is not positive.
    """
    _check_pairs(whole, shown)
    if not bool((whole > 0).all()):
        raise DataError(
            f"scores of whole images go down to {float(whole.min())}; a drop is a part of a "
            "positive score: give probabilities (sigmoid or softmax), not logits"
        )
    return float(((whole - shown).clamp(min=0) / whole).mean())


def increase_in_confidence(whole: Tensor, shown: Tensor) -> float:
    """Fraction of pairs whose score is higher on the product than on the image: high is good.

    Args:
        whole, shown: (M,) of :func:`confidences`.

    Raises:
        DataError: if there is no pair.
    """
    _check_pairs(whole, shown)
    return float((shown > whole).double().mean())


# -- Inputs ------------------------------------------------------------------------------------


def _check(images: Tensor, maps: Tensor, classes: Tensor) -> None:
    count = len(images)
    fits = images.ndim == 4 and maps.shape == (count, *images.shape[-2:])
    if not fits or classes.shape != (count,) or not count:
        raise DataError(
            f"images are {tuple(images.shape)}, maps {tuple(maps.shape)} and classes "
            f"{tuple(classes.shape)}; expected (B, c, H, W), (B, H, W) and (B,), B >= 1"
        )
    if not bool(torch.isfinite(maps).all()):
        raise DataError("maps have NaN or infinite values; make them again")


def _of_class(scores: Tensor, classes: Tensor) -> Tensor:
    """(B,) of the scores (B, N)."""
    if scores.ndim != 2 or len(scores) != len(classes):
        raise DataError(
            f"score gave {tuple(scores.shape)} for {len(classes)} images; expected (B, N)"
        )
    if not 0 <= int(classes.min()) <= int(classes.max()) < scores.shape[1]:
        raise DataError(
            f"classes go from {int(classes.min())} to {int(classes.max())}; score knows 0 to "
            f"{scores.shape[1] - 1}"
        )
    return scores.gather(1, classes[:, None])[:, 0]


def _check_pairs(whole: Tensor, shown: Tensor) -> None:
    if whole.ndim != 1 or whole.shape != shown.shape or not len(whole):
        raise DataError(
            f"scores are {tuple(whole.shape)} and {tuple(shown.shape)}; expected (M,) twice, M >= 1"
        )
