"""IRN's network: a frozen pyramid of features and branches of 1 x 1 convolutions (sections 4, 5).

One branch predicts boundaries; another, which masks do not need, a displacement to the centre of
each instance. B images of H x W pixels, h = ceil(H / 4), w = ceil(W / 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcam.classifiers import classifier as models
from lpcam.data.resize import quarter_size
from lpcam.refine.pair_network import BackboneMaps, Level
from lpcam.refine.walk import STRIDE
from lpcam.runtime.errors import ClassifierError
from lpcam.training.saved_network import SavedNetwork, shallow_copy

BOUNDARY = (32, 4)  #: Channels and groups of each level in the boundary branch.
POOLED, SHALLOW, DEEP = (64, 8), (128, 16), (256, 16)
"""Channels and groups in the displacement branch: level pooled to stride 4, at it, beyond."""


class Pyramid(BackboneMaps):
    """Frozen feature maps of a backbone from stride 4 on, the last of stride 2 pooled to it."""

    def __init__(self, classifier: models.Classifier) -> None:
        super().__init__(classifier, "IRN")
        self.requires_grad_(False)
        strides = {level.stride for level in self.levels}
        if not {STRIDE, 2 * STRIDE} <= strides:
            raise ClassifierError(
                f"the backbone {type(self.backbone).__name__} gives feature maps at strides "
                f"{sorted(strides)}; IRN needs 4 and 8 among them: choose a convolutional one or "
                "a hierarchical transformer"
            )
        finest = [level for level in self.levels if level.stride == STRIDE // 2][-1:]
        self.levels = finest + [level for level in self.levels if level.stride >= STRIDE]
        self.multiple = self.side_multiple(models.PROBE_SIZE)

    def train(self, mode: bool = True) -> Pyramid:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Features (B, C, h, w) of each level of (B, 3, H, W) normalised images."""
        return [
            F.max_pool2d(found, 3, 2, 1) if level.stride < STRIDE else found
            for level, found in zip(self.levels, self.maps(images), strict=True)
        ]

    def folded(self) -> Pyramid:
        """A frozen copy with folded batch norms, equal up to rounding; cannot be saved."""
        return super().folded().requires_grad_(False)


class _Unit(nn.Module):
    """1 x 1 convolution, group norm, bilinear enlargement, crop, ReLU."""

    def __init__(self, channels: int, features: int, groups: int, factor: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, features, 1, bias=False)
        self.norm = nn.GroupNorm(groups, features)
        self.factor = factor

    def forward(self, images: Tensor, size: Sequence[int]) -> Tensor:
        found = self.norm(self.convolution(images))
        if self.factor > 1:
            found = F.interpolate(found, scale_factor=self.factor, mode="bilinear")
        cropped: Tensor = found[..., : size[0], : size[1]]
        return cropped.relu()


class Boundary(nn.Module):
    """Boundary logits (B, h, w) of a pyramid."""

    def __init__(self, levels: Sequence[Level]) -> None:
        super().__init__()
        self.units = nn.ModuleList(
            _Unit(level.channels, *BOUNDARY, max(1, level.stride // STRIDE)) for level in levels
        )
        self.last = nn.Conv2d(BOUNDARY[0] * len(levels), 1, 1)

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Logits from the levels' features, at the size (h, w) of stride 4."""
        found = [unit(f, size) for unit, f in zip(self.units, features, strict=True)]
        logits: Tensor = self.last(torch.cat(found, 1))[:, 0]
        return logits


class Displacement(nn.Module):
    """Displacement (B, 2, h, w) of a pyramid, in cells of stride 4, first down and then right."""

    shift: Tensor
    """Mean over images that the released program subtracts in evaluation; zero if trained here."""

    def __init__(self, levels: Sequence[Level]) -> None:
        super().__init__()
        self.deep = [level.stride > STRIDE for level in levels]
        widths = [
            DEEP if deep else SHALLOW if level.stride == STRIDE else POOLED
            for level, deep in zip(levels, self.deep, strict=True)
        ]
        self.units = nn.ModuleList(
            _Unit(level.channels, *width, max(1, level.stride // (2 * STRIDE)))
            for level, width in zip(levels, widths, strict=True)
        )
        shallow = sum(width[0] for width in widths if width is not DEEP)
        self.middle = _Unit(DEEP[0] * sum(self.deep), *DEEP, 2)
        self.late = _Unit(shallow + DEEP[0], *DEEP)
        self.last = nn.Conv2d(DEEP[0], 2, 1, bias=False)
        self.register_buffer("shift", torch.zeros(2))

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Displacement from the levels' features, at the size (h, w) of stride 4."""
        half = features[self.deep.index(True)].shape[-2:]
        shallow: list[Tensor] = []
        deep: list[Tensor] = []
        for unit, is_deep, feature in zip(self.units, self.deep, features, strict=True):
            (deep if is_deep else shallow).append(unit(feature, half if is_deep else size))
        middle = self.middle(torch.cat(deep, 1), size)
        field: Tensor = self.last(self.late(torch.cat([*shallow, middle], 1), size))
        return field if self.training else field - self.shift[:, None, None]


class Branches(nn.Module):
    """The trained part; the boundary branch starts alike with and without the other."""

    def __init__(self, levels: Sequence[Level], *, displacement: bool, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.boundary = Boundary(levels)
            self.displacement = Displacement(levels) if displacement else None

    def forward(
        self, features: Sequence[Tensor], size: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, h, w) and displacement (B, 2, h, w) or None."""
        field = None if self.displacement is None else self.displacement(features, size)
        return self.boundary(features, size), field


class Irn(SavedNetwork):
    """A frozen pyramid of features of an ImageNet backbone, and the trained branches."""

    kind = "irn"

    def __init__(self, pyramid: Pyramid, *, displacement: bool = True, seed: int = 0) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.branches = Branches(pyramid.levels, displacement=displacement, seed=seed)
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.branches.boundary.last.weight.device

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (B, h, w) and displacement (B, 2, h, w) of (B, 3, H, W) normalised images."""
        size = quarter_size(images.shape[-2:])
        found: tuple[Tensor, Tensor | None] = self.branches(self.pyramid(images), size)
        return found

    def folded(self) -> Irn:
        """A copy for inference with a folded backbone; shares the branches, cannot be saved."""
        twin = shallow_copy(self)
        twin.pyramid = self.pyramid.folded()
        return twin

    @classmethod
    def _described(cls, metadata: Mapping[str, Any]) -> Irn:
        return cls(Pyramid(models.described(metadata)), displacement=metadata["displacement"])

    def _description(self) -> dict[str, Any]:
        own = {"displacement": self.branches.displacement is not None}
        return {**self.pyramid._description(), **own}


def build_irn(
    spec: models.BackboneSpec, *, displacement: bool = True, seed: int = 0, **first: Any
) -> Irn:
    """Build IRN's network on a timm backbone, with untrained branches.

    ``first`` are ``weights``, ``mean`` and ``std`` of :func:`lpcam.classifiers.classifier.build`:
    ImageNet's, not those of the classifier that made the maps (section 4).
    """
    classifier = models.build(spec, models.NO_CLASSES, seed=seed, **first)
    return Irn(Pyramid(classifier), displacement=displacement, seed=seed)
