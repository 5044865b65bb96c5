"""WideResNet-38 with a large field of view (specification of segmentation, section 2).

The backbone is :class:`lpcam.backbones.WideResNet38`, which serves classifiers as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from lpcam.backbones import IMAGENET_MEAN, IMAGENET_STD, WideResNet38
from lpcam.classifier import (
    NO_CLASSES,
    PRETRAINED,
    RANDOM,
    BackboneSpec,
    Classifier,
    Preprocessing,
    build,
    refuse_not_finite,
)
from lpcam.errors import ClassifierError

BACKBONE = "wideresnet38"
PREPROCESSING = Preprocessing(IMAGENET_MEAN, IMAGENET_STD)
HIDDEN = 512
"""Channels between the two convolutions of the head."""
DILATION = 12
"""Of both."""


class WideResNet38LargeFov(nn.Module):
    """Logits at stride 8: two dilated 3 x 3 convolutions on WideResNet-38.

    Frozen are all batch norms, statistics and affine weights, and the first convolution.

    Args:
        backbone: with or without its last ReLU; the published segmenter has it.
        labels: L, the background among them.
        hidden: channels between the two convolutions.
    """

    def __init__(self, backbone: WideResNet38, labels: int, *, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc1 = nn.Conv2d(backbone.num_features, hidden, 3, padding=DILATION, dilation=DILATION)
        self.fc2 = nn.Conv2d(hidden, labels, 3, padding=DILATION, dilation=DILATION)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        self.backbone.conv1a.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised RGB to logits (B, L, ceil(H / 8), ceil(W / 8))."""
        found = self.fc1(self.backbone.forward_features(images)).relu()
        logits: Tensor = self.fc2(found)
        return logits

    def outputs(self, images: Tensor) -> list[tuple[Tensor, float]]:
        """The logits of :meth:`forward` and the weight 1 of their loss."""
        return [(self(images), 1.0)]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What is trained: "backbone", "head" (weights) and "head_bias"."""
        head = [*self.fc1.named_parameters(), *self.fc2.named_parameters()]
        return {
            "backbone": [p for p in self.backbone.parameters() if p.requires_grad],
            "head": [p for name, p in head if name == "weight"],
            "head_bias": [p for name, p in head if name == "bias"],
        }

    def train(self, mode: bool = True) -> WideResNet38LargeFov:
        """Training mode with every batch norm in evaluation mode; dropout is on."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def build_wideresnet38(
    labels: int,
    *,
    arguments: Mapping[str, Any] | None = None,
    weights: str | Path,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> tuple[WideResNet38LargeFov, Preprocessing]:
    """Build the segmenter.

    Args:
        labels: L, the background among them.
        arguments: of :class:`lpcam.backbones.WideResNet38`, and ``hidden`` of the head.
        weights: ``"random"``, or a safetensors file of the backbone, whether of ImageNet or, as the
            published segmenter has it, of a classifier on the same images; one that
            :meth:`lpcam.classifier.Classifier.save` wrote will do. A file that holds fc1 and fc2
            as well gives the head too; a classification head fc8 is left out.
        mean, std: of RGB in [0, 1]; default: ImageNet's, or those of the classifier.
        seed: of random weights and of the head.

    Raises:
        ClassifierError: if ``"pretrained"`` is asked for, an argument is refused, or the file is
            missing, is damaged or does not fit; the message names a tensor.
        ArtefactError: if the file of a classifier is damaged.
    """
    if str(weights) == PRETRAINED:
        raise ClassifierError(
            "WideResNet-38 has no pre-trained weights to download: convert the field's file by "
            "lpcam convert FILE FILE.safetensors and give its path as weights"
        )
    chosen = dict(arguments or {})
    hidden = chosen.pop("hidden", HIDDEN)
    if not isinstance(hidden, int) or hidden < 1:
        raise ClassifierError(f"hidden is {hidden!r}; give a positive whole number of channels")
    spec = BackboneSpec(BACKBONE, chosen)
    if str(weights) != RANDOM and _is_classifier(Path(weights)):
        classifier = _load_classifier(Path(weights), spec)
    else:
        classifier = build(spec, NO_CLASSES, weights=weights, seed=seed)
    backbone = classifier.backbone
    assert isinstance(backbone, WideResNet38)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = WideResNet38LargeFov(backbone, labels, hidden=hidden)
    if str(weights) != RANDOM:
        _load_head(network, Path(weights))
    own = classifier.preprocessing
    return network, Preprocessing(
        own.mean if mean is None else tuple(mean), own.std if std is None else tuple(std)
    )


def _is_classifier(path: Path) -> bool:
    """Whether a file has the names that a classifier of this package gives; not if unreadable."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {"backbone.conv1a.weight", "head.weight"} <= set(file.keys())
    except (safetensors.SafetensorError, OSError):
        return False


def _load_classifier(path: Path, spec: BackboneSpec) -> Classifier:
    classifier = Classifier.load(path)
    found = classifier.spec
    # Lists of a recipe come back from a file as lists, but a caller may give tuples.
    asked = {key: list(v) if isinstance(v, tuple) else v for key, v in spec.arguments.items()}
    if found is None or found.name != spec.name or dict(found.arguments) != asked:
        raise ClassifierError(
            f"{path.name!r} holds a classifier on {found and found.name!r} with arguments "
            f"{dict(found.arguments) if found else {}}, not on {spec.name!r} with {asked}; give "
            "the same arguments"
        )
    return classifier


def _load_head(network: WideResNet38LargeFov, path: Path) -> None:
    """Take fc1 and fc2 from a file that has them; the backbone was read from it before."""
    own = {k: v for k, v in network.state_dict().items() if k.startswith(("fc1.", "fc2."))}
    with safetensors.safe_open(path, framework="pt") as file:
        names = set(file.keys())
        state = {name: file.get_tensor(name) for name in sorted(own.keys() & names)}
    if not state:
        return
    for name, tensor in own.items():
        if name not in state:
            raise ClassifierError(
                f"the weights {path.name!r} hold {sorted(state)} of the head but not {name!r}; "
                "give a file with the whole head, or take those tensors out"
            )
        if state[name].shape != tensor.shape:
            raise ClassifierError(
                f"{name!r} of the weights {path.name!r} has the shape {tuple(state[name].shape)}, "
                f"not {tuple(tensor.shape)}; the file is of other labels or of another network: "
                "check it, or take fc1 and fc2 out of it to train a new head"
            )
    refuse_not_finite(state, path)
    network.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()}, strict=False)
