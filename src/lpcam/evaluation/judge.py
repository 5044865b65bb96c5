"""A judge of maps that needs no truth: how much a map says about colours and about features.

Both judges look at F = [m > t], where m is the largest of an image's class maps at a pixel:

- colours: the mutual information of F and the pixel's colour, as a share of the colours' entropy;
- features: the share of the variance of an early layer's features that lies between the places
  inside and outside F. It does not look at colour.

The right mask tells most about both. The threshold of a data set is the largest one at which the
product of both, a mean over images, is nearly at its maximum. A choice between maps weighs the
features less (docs/adaptive.md says what was tried, and how well it does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lpcam.classifiers.features import FeaturePair
from lpcam.data.dataset import BACKGROUND, IGNORE
from lpcam.method.early import EarlyImage, EarlyPrototypes, fuse
from lpcam.runtime.parallel import ordered_map

THRESHOLDS = tuple(round(0.02 + 0.03 * step, 2) for step in range(33))  #: 0.02, 0.05, ..., 0.98.
LEVELS = 6  #: Bins of each colour channel.
STEP = 3  #: Every so many pixels each way are looked at, fewer in small images.
RARE = 0.002  #: A mask of less than this share of the pixels, or of all but this, says nothing.
PLATEAU = 0.95  #: Share of its maximum at which a curve counts as nearly at it.
FEATURES = 1 / 3
"""Power of the variance explained where maps are compared: 0 is misled by shading, 1 prefers the
early layers' own maps, as it looks at their features."""
TIE = 0.05  #: Maps whose information differs by less are alike; the simpler are taken.
DISAGREEMENT = 0.15  #: Difference of the judges' thresholds that is worth a warning.


def step_of(size: tuple[int, int]) -> int:
    """Every how many pixels an image (H, W) is looked at, from 1 to `STEP`."""
    return max(1, min(STEP, min(size) // 32))


def colour_bins(image: NDArray[np.uint8]) -> Tensor:
    """Colour bin of each pixel, int64 (H, W) in [0, 216), of an image (H, W, 3) uint8 RGB.

    Example:
        >>> colour_bins(np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)).tolist()
        [[0, 215]]
    """
    level = torch.from_numpy(np.ascontiguousarray(image)).long() * LEVELS // 256
    return (level[..., 0] * LEVELS + level[..., 1]) * LEVELS + level[..., 2]


def colour_information(colours: Tensor, best: Tensor) -> Tensor:
    """I(F; B) / H(B) at each of `THRESHOLDS`, float64 (T,) in [0, 1].

    Args:
        colours: int64 (H, W), colour bin B of each pixel (:func:`colour_bins`).
        best: (H, W) in [0, 1], largest of the class maps at each pixel.

    Example:
        >>> colours = torch.tensor([[0, 0, 1, 1]])
        >>> colour_information(colours, torch.tensor([[0.1, 0.1, 0.9, 0.9]]))[10].item()
        1.0
    """
    bins = LEVELS**3
    cells = _cells(best).flatten() + (len(THRESHOLDS) + 1) * colours.flatten()
    counts = torch.bincount(cells, minlength=bins * (len(THRESHOLDS) + 1)).view(bins, -1).double()
    inside = counts.flip(1).cumsum(1).flip(1)[:, 1:] / counts.sum()
    total = counts.sum(1, keepdim=True) / counts.sum()
    joint = torch.stack([inside, (total - inside).clamp_min(0)])
    share = joint.sum(1, keepdim=True)
    information = (
        _entropy(total[:, 0])
        + _entropy(share.flatten(1).T)
        - _entropy(joint.movedim(2, 0).flatten(1))
    )
    entropy = float(_entropy(total[:, 0]))
    rare = share.amin(0).flatten() < RARE
    return torch.where(rare, 0, information / entropy) if entropy else torch.zeros_like(information)


def feature_information(features: Tensor, best: Tensor) -> Tensor:
    """Share of the variance of features (C, h, w) between inside and outside F, float64 (T,).

    ``best`` (h, w) in [0, 1] is the largest of the class maps in each cell.
    """
    rows = features.flatten(1).T.double()
    rows = rows - rows.mean(0)
    cells = _cells(best).flatten()
    counts = torch.bincount(cells, minlength=len(THRESHOLDS) + 1).double()
    sums = rows.new_zeros(len(THRESHOLDS) + 1, rows.shape[1]).index_add_(0, cells, rows)
    inside, moved = (one.flip(0).cumsum(0).flip(0)[1:] for one in (counts, sums))
    # both groups' means are known from one of them, as the sum of all rows is zero
    between = moved.square().sum(1) * (
        1 / inside.clamp_min(1) + 1 / (len(rows) - inside).clamp_min(1)
    )
    share = inside / len(rows)
    rare = torch.minimum(share, 1 - share) < RARE
    explained: Tensor = between / rows.square().sum().clamp_min(1e-12)
    return torch.where(rare, 0, explained)


def _cells(best: Tensor) -> Tensor:
    """Number of thresholds below each value."""
    grid = torch.tensor(THRESHOLDS, dtype=torch.float32, device=best.device)
    return torch.searchsorted(grid, best.float().contiguous())


def _entropy(shares: Tensor) -> Tensor:
    """Entropy over the last axis, in nats."""
    entropy: Tensor = torch.special.entr(shares).sum(-1)
    return entropy


def quality(image: NDArray[np.uint8], mask: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """How far a mask (H, W) of an image (H, W, 3) can be trusted, in [0, 1], without truth.

    Its colour information times its mean IoU with the mask of another method; 1 if neither shows a
    class. It orders the masks of a run.

    Example:
        >>> image = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
        >>> quality(image, np.array([[0, 1]], np.uint8), np.array([[0, 1]], np.uint8))
        1.0
    """
    shown = {*np.unique(mask).tolist(), *np.unique(other).tolist()} - {BACKGROUND, IGNORE}
    if not shown:
        return 1.0
    pairs = [(mask == value, other == value) for value in shown]
    agreement = np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs])
    foreground = torch.from_numpy(np.isin(mask, [*shown]).astype(np.float32))
    step = step_of((mask.shape[0], mask.shape[1]))
    # of a mask of 0 and 1 every threshold says the same
    colours = colour_bins(image[::step, ::step])
    return float(agreement * colour_information(colours, foreground[::step, ::step])[0])


@dataclass(frozen=True)
class Verdict:
    """What the judges say of the maps of some images."""

    threshold: float  #: By both judges.
    by_colours: float  #: Threshold by colours alone.
    by_features: float | None  #: Threshold by features alone; None: there were none.
    information: float
    """Largest colour information times variance explained to the power `FEATURES`, of means over
    the images. Maps of the same images can be compared by it."""
    curve: tuple[float, ...]  #: What decides, at each of `THRESHOLDS`, as a share of its maximum.
    images: int

    @property
    def disagree(self) -> bool:
        """Whether the judges' thresholds are more than `DISAGREEMENT` apart."""
        other = self.by_features
        return other is not None and abs(self.by_colours - other) > DISAGREEMENT

    def as_json(self) -> dict[str, Any]:
        """The verdict with the rule, for records and protocols."""
        return {**asdict(self), "curve": [*self.curve], "rule": RULE, "disagree": self.disagree}


RULE = "automatic (colour information x variance of features explained; last within 5 %)"
SHARE = "automatic (as much foreground as a CRF leaves of the seeds)"
AGREEMENT = "automatic (best agreement with the masks of LPCAM-E)"


def curves(colours: Tensor, maps: Tensor, features: Tensor | None) -> Tensor:
    """What both judges say of the class maps (K, H, W) of one image, float64 (2, T).

    Colours are (H, W), features (C, h, w) at any grid; without features the second row is ones.
    """
    best = maps.float().amax(0) if len(maps) else torch.zeros(colours.shape)
    found = torch.ones(2, len(THRESHOLDS), dtype=torch.float64)
    found[0] = colour_information(colours, best)
    if features is not None:
        grid = features.shape[-2], features.shape[-1]
        cells = F.adaptive_avg_pool2d(best[None], grid)[0]
        found[1] = feature_information(features.cpu(), cells)
    return found


def verdict(found: Tensor) -> Verdict:
    """The verdict on maps of :func:`curves` (images, 2, T) of at least one image."""
    both = found.prod(1).mean(0)
    colours, features = found.mean(0)
    known = bool((features != 1).any())
    top = float(both.max())
    return Verdict(
        threshold=last_of_plateau(both),
        by_colours=last_of_plateau(colours),
        by_features=last_of_plateau(features) if known else None,
        information=float((colours * features**FEATURES).max()),
        curve=tuple((both / top).tolist()) if top else (0.0,) * len(THRESHOLDS),
        images=len(found),
    )


def last_of_plateau(curve: Tensor) -> float:
    """The largest threshold at which a curve has `PLATEAU` of its maximum; 0.5 if it is zero."""
    if not bool(curve.max() > 0):
        return 0.5
    return THRESHOLDS[int(torch.nonzero(curve >= PLATEAU * curve.max()).max())]


def choose(
    images: Sequence[EarlyImage], ways: Sequence[EarlyPrototypes], *, workers: int = 1
) -> tuple[int, list[Verdict]]:
    """The way of making maps that has most information, and the verdict on each.

    Of ways whose information differs by less than `TIE` from the best the first is taken, so
    ``ways`` come simplest first (:func:`lpcam.method.early.candidates`).
    """

    def judge(image: EarlyImage) -> Tensor:
        layers = [FeaturePair(one.float(), None) for one in image.layers]
        found, known = [], {}
        for way in ways:
            base = image.bases[way.base].float()
            maps, key = base, id(way.foreground)
            if way.fusion != "none":
                if key not in known:
                    size = base.shape[-2], base.shape[-1]
                    known[key] = way.combined(layers, image.classes, size)
                maps = fuse(base, known[key], way.fusion)
            features = layers[0].features if layers else None
            found.append(curves(image.colours, maps, features))
        return torch.stack(found)

    used = [image for image in images if len(image.classes)]
    every = torch.stack(list(ordered_map(judge, used, workers)))
    verdicts = [verdict(every[:, place]) for place in range(len(ways))]
    best = max(one.information for one in verdicts)
    chosen = next(n for n, v in enumerate(verdicts) if v.information >= (1 - TIE) * best)
    return chosen, verdicts
