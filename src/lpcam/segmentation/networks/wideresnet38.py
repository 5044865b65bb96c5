"""WideResNet-38 with a large field of view (specification of segmentation, section 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn

from lpcam.classifiers import classifier as models
from lpcam.classifiers.wideresnet38 import WideResNet38
from lpcam.runtime.errors import ClassifierError
from lpcam.segmentation.networks import base
from lpcam.training.optim import FrozenStatistics, freeze

BACKBONE = "wideresnet38"
HIDDEN = 512  #: Channels between the two convolutions of the head.
DILATION = 12  #: Dilation of both convolutions.


class WideResNet38LargeFov(FrozenStatistics, base.Network):
    """Two dilated 3 x 3 convolutions on WideResNet-38, whose first one and norms are frozen."""

    def __init__(self, backbone: WideResNet38, labels: int, *, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc1 = nn.Conv2d(backbone.num_features, hidden, 3, padding=DILATION, dilation=DILATION)
        self.fc2 = nn.Conv2d(hidden, labels, 3, padding=DILATION, dilation=DILATION)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
        freeze(self, (), norms=True)
        self.backbone.conv1a.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised RGB to logits (B, L, ceil(H / 8), ceil(W / 8))."""
        logits: Tensor = self.fc2(self.fc1(self.backbone.forward_features(images)).relu())
        return logits


class WideResNet38Network:
    """Arguments are those of :class:`lpcam.classifiers.wideresnet38.WideResNet38`, and ``hidden``.

    A file of weights holds the backbone or a classifier of this package. If it holds fc1 and fc2,
    they become the head; a classification head fc8 is ignored.
    """

    title = "WideResNet-38"
    default_backbone = BACKBONE
    options: frozenset[base.Option] = frozenset()
    one_size_export = False

    def check(self, spec: base.SegmenterSpec, weights: str) -> None:
        """Raise ClassifierError for pretrained weights, which do not exist."""
        base.refuse_pretrained(BACKBONE, weights)

    def build(
        self, spec: base.SegmenterSpec, labels: int, **first: Unpack[base.First]
    ) -> tuple[WideResNet38LargeFov, models.Preprocessing]:
        """The network and its preprocessing."""
        weights, seed = str(first["weights"]), first.get("seed", 0)
        self.check(spec, weights)
        arguments = dict(spec.arguments)
        hidden = arguments.pop("hidden", HIDDEN)
        if not isinstance(hidden, int) or hidden < 1:
            raise ClassifierError(f"hidden is {hidden!r}; give a positive number of channels")
        own, path = models.BackboneSpec(BACKBONE, arguments), Path(weights)
        state = {} if weights == models.RANDOM else models.read_weights(path)
        if {"backbone.conv1a.weight", "head.weight"} <= state.keys():
            classifier = _load_classifier(path, own)
        else:
            classifier = models.build(own, models.NO_CLASSES, weights=weights, seed=seed)
        backbone = classifier.backbone
        assert isinstance(backbone, WideResNet38)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = WideResNet38LargeFov(backbone, labels, hidden=hidden)
        if head := {k: v for k, v in state.items() if k.startswith(("fc1.", "fc2."))}:
            advice = (
                "the file is of other labels or of another network: take fc1 and fc2 out of it to "
                "train a new head"
            )
            layers = nn.ModuleDict({"fc1": network.fc1, "fc2": network.fc2})
            base.load_fitting(layers, head, path.name, "fc1 and fc2 of this head", advice)
        return network, base.preprocessing_with(
            classifier.preprocessing, first.get("mean"), first.get("std")
        )


def _load_classifier(path: Path, spec: models.BackboneSpec) -> models.Classifier:
    classifier = models.Classifier.load(path)
    found = classifier.spec
    # files hold lists, a caller may give tuples
    asked = {key: list(v) if isinstance(v, tuple) else v for key, v in spec.arguments.items()}
    if found is None or found.name != spec.name or dict(found.arguments) != asked:
        raise ClassifierError(
            f"{path.name!r} holds a classifier on {found and found.name!r} with arguments "
            f"{dict(found.arguments) if found else {}}, not on {spec.name!r} with {asked}; give "
            "the same arguments"
        )
    return classifier


NETWORK = WideResNet38Network()
