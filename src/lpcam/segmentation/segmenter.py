"""A segmenter: a network with its classes and preprocessing, saved in one file.

Labels are 0 for the background and n + 1 for the class with index n; there are L = N + 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from lpcam.classifiers.classifier import PRETRAINED, RANDOM, Preprocessing
from lpcam.data.dataset import ClassTable
from lpcam.runtime.errors import ArtefactError, ClassifierError
from lpcam.segmentation.networks.base import First, SegmenterSpec
from lpcam.segmentation.networks.registry import NETWORKS
from lpcam.training.released import WIDERESNET38, Released
from lpcam.training.saved_network import SavedNetwork


class Segmenter(SavedNetwork):
    """A network, the classes of its labels, and its preprocessing.

    Args:
        network: a :class:`~lpcam.segmentation.networks.base.Network`: normalised images
            (B, 3, H, W) to logits (B, L, h, w).
        classes: class names and their values in masks.
        spec: how to build the network again; None for a custom network, which cannot be saved.
    """

    kind = "segmenter"

    def __init__(
        self,
        network: nn.Module,
        classes: ClassTable,
        preprocessing: Preprocessing,
        spec: SegmenterSpec | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.classes = classes
        self.preprocessing = preprocessing
        self.spec = spec
        self.eval()

    @property
    def device(self) -> torch.device:
        return next(self.parameters(), torch.zeros(())).device

    @property
    def stored(self) -> nn.Module:
        return self.network

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, L, h, w) of normalised images (B, 3, H, W)."""
        logits: Tensor = self.network(images)
        return logits

    def _description(self) -> dict[str, Any]:
        if self.spec is None:
            raise ArtefactError(
                "this segmenter wraps a network that was passed in, so a file cannot describe it; "
                "build it with lpcam.segmentation.segmenter.build_segmenter to save it"
            )
        return {
            "spec": asdict(self.spec),
            "classes": list(self.classes.names),
            "mask_ids": list(self.classes.mask_ids),
            "preprocessing": asdict(self.preprocessing),
        }

    @classmethod
    def _described(cls, metadata: Mapping[str, Any]) -> Segmenter:
        values = metadata["spec"]
        spec = SegmenterSpec(**{**values, "pyramid": tuple(values["pyramid"])})
        classes = ClassTable(tuple(metadata["classes"]), tuple(metadata["mask_ids"]))
        return build_segmenter(spec, classes, weights=RANDOM, **metadata["preprocessing"])


def check_segmenter(spec: SegmenterSpec, weights: str) -> None:
    """Raise the ClassifierError of :func:`build_segmenter` that can be found without building."""
    if weights not in (PRETRAINED, RANDOM) and not Path(weights).is_file():
        raise ClassifierError(
            f"segment.weights: there is no file {weights!r}; give the path of a safetensors file, "
            f"{PRETRAINED!r} or {RANDOM!r} (lpcam convert makes one of a .pth file)"
        )
    NETWORKS[spec.network].check(spec, weights)


def build_segmenter(spec: SegmenterSpec, classes: ClassTable, **first: Unpack[First]) -> Segmenter:
    """Build a segmenter with a random head.

    The further arguments are those of :class:`~lpcam.segmentation.networks.base.First`.
    ClassifierError if the backbone is unknown, or the weights are missing or do not fit.

    Example:
        >>> spec = SegmenterSpec("deeplabv2", "test_resnet", {})
        >>> segmenter = build_segmenter(spec, ClassTable(("cow",), (1,)), weights="random")
        >>> tuple(segmenter(torch.zeros(1, 3, 64, 64)).shape[:2])
        (1, 2)
    """
    network, preprocessing = NETWORKS[spec.network].build(spec, len(classes) + 1, **first)
    return Segmenter(network, classes, preprocessing, spec)


RELEASED = (
    Released(
        "MCTformer's WideResNet-38 segmenter",
        "segment",
        ("fc8_seg_conv2.weight",),
        [(WIDERESNET38, "network.backbone."), (r"fc8_seg_conv", "network.fc")],
        lambda names: build_segmenter(
            SegmenterSpec("wideresnet38", "wideresnet38", {}),
            ClassTable.numbered(names, "segmenter"),
            weights=RANDOM,
        ),
        classes=lambda state: len(state["fc8_seg_conv2.weight"]) - 1,
    ),
)
"""Files of released programs that hold a segmenter."""
