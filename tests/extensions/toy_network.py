"""A segmentation network of another distribution: one convolution of the means of cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcam.classifiers.classifier import Preprocessing
from lpcam.runtime.errors import ClassifierError
from lpcam.segmentation.networks.base import Option, SegmenterSpec, preprocessing_with


class Cells(nn.Module):
    """Logits of cells of 8 x 8 pixels."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, labels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised RGB to logits (B, L, ceil(H / 8), ceil(W / 8))."""
        logits: Tensor = self.head(F.avg_pool2d(images, 8, ceil_mode=True))
        return logits

    def outputs(self, images: Tensor) -> list[tuple[Tensor, float]]:
        """One output, whose loss has the weight 1."""
        return [(self(images), 1.0)]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters are those of new layers."""
        return {"head": list(self.parameters())}


class CellNetwork:
    """The network as the registry holds it."""

    title = "Cells"
    default_backbone = "means"
    options: frozenset[Option] = frozenset()
    one_size_export = False

    def check(self, spec: SegmenterSpec, weights: str) -> None:
        """There is no backbone, so only random weights make sense."""
        if weights != "random":
            raise ClassifierError(f"segment.weights must be 'random', got {weights!r}")

    def build(
        self,
        spec: SegmenterSpec,
        labels: int,
        *,
        weights: str | Path,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
    ) -> tuple[nn.Module, Preprocessing]:
        """The network with random weights of the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = Cells(labels).eval()
        return network, preprocessing_with(Preprocessing((0.5,) * 3, (0.25,) * 3), mean, std)


NETWORK: Any = CellNetwork()
