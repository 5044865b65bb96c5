"""DeepLabV2: four dilated convolutions, summed, on a backbone (specification of segmentation, 1).

Caffe's ResNet-101 has the parameter names of the field's public weights files.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from lpcam.classifiers import classifier as models
from lpcam.data.resize import resize
from lpcam.runtime.errors import ClassifierError
from lpcam.segmentation.networks import base
from lpcam.training.optim import FrozenStatistics, freeze

logger = logging.getLogger(__name__)
CAFFE = "resnet101_caffe"  #: Name of the backbone that timm does not have.
PREPROCESSING = models.Preprocessing(
    mean=(122.675 / 255, 116.669 / 255, 104.008 / 255), std=(1 / 255, 1 / 255, 1 / 255)
)
"""Preprocessing of the Caffe backbone: RGB from 0 to 255 minus the mean colour, unscaled."""
BLOCKS = (3, 4, 23, 3)
WIDTH = 64
STRIDES = (1, 2, 1, 1)
DILATIONS = (1, 1, 2, 4)
OUTPUT_STRIDE = 8
RATES = (6, 12, 18, 24)
_PREFIXES = ("module.", "network.", "base.", "scale.", "backbone.")


class _Unit(nn.Module):
    """Convolution without bias, batch norm, and an optional ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, relu: bool = True, **how: Any
    ) -> None:
        super().__init__()
        padding = how.get("dilation", 1) * (kernel // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False, **how)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = relu

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.bn(self.conv(images))
        return found.relu() if self.relu else found


class _Bottleneck(nn.Module):
    """1 x 1 (with the stride), dilated 3 x 3 and 1 x 1 convolution, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, dilation: int, first: bool) -> None:
        super().__init__()
        middle = outputs // 4
        stride = stride if first else 1
        self.reduce = _Unit(inputs, middle, 1, stride=stride)
        self.conv3x3 = _Unit(middle, middle, 3, dilation=dilation)
        self.increase = _Unit(middle, outputs, 1, relu=False)
        self.shortcut: nn.Module = (
            _Unit(inputs, outputs, 1, stride=stride, relu=False) if first else nn.Identity()
        )

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.increase(self.conv3x3(self.reduce(images))) + self.shortcut(images)
        return found.relu()


class CaffeResNet101(nn.Module):
    """Caffe's ResNet-101 with output stride 8, which differs from torchvision's.

    Its pooling rounds sizes up, the first 1 x 1 convolution of a bottleneck has the stride, and
    every stage's first block has a projection. ``blocks`` are the bottlenecks of each stage, and
    ``width`` the channels of the stem; the output has 32 times as many.
    """

    def __init__(self, blocks: Sequence[int] = BLOCKS, width: int = WIDTH) -> None:
        super().__init__()
        self.layer1 = nn.Sequential()
        self.layer1.add_module("conv1", _Unit(3, width, 7, stride=2))
        self.layer1.add_module("pool", nn.MaxPool2d(3, 2, 1, ceil_mode=True))
        self.channels = width
        for number, count in enumerate(blocks):
            stage = nn.Sequential()
            for block in range(count):
                size = self.channels, width * 4 * 2**number
                one = _Bottleneck(*size, STRIDES[number], DILATIONS[number], first=not block)
                stage.add_module(f"block{block + 1}", one)
                self.channels = size[1]
            self.add_module(f"layer{number + 2}", stage)
        self._draw(sum(blocks))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), RGB as :data:`PREPROCESSING` makes it, to (B, C, h, w)."""
        found = images.flip(1)  # the weights expect BGR
        for stage in self.children():
            found = stage(found)
        return found

    def _draw(self, blocks: int) -> None:
        units = [(name, one) for name, one in self.named_modules() if isinstance(one, _Unit)]
        for name, unit in units:
            weight = unit.conv.weight
            nn.init.kaiming_normal_(weight, nonlinearity="relu" if unit.relu else "linear")
            if name.endswith("increase"):
                # each block would double the variance, which frozen batch norms do not undo
                weight.data /= math.sqrt(blocks)
        stem = self.layer1.get_submodule("conv1.bn")
        # RGB from 0 to 255 has a standard deviation of about 64; He's weights double the variance
        stem.get_buffer("running_var").fill_(2.0 * 64.0**2)


class Aspp(nn.Module):
    """Dilated 3 x 3 convolutions with bias, summed: atrous spatial pyramid pooling."""

    def __init__(self, channels: int, labels: int, rates: Sequence[int] = RATES) -> None:
        super().__init__()
        for number, rate in enumerate(rates):
            branch = nn.Conv2d(channels, labels, 3, padding=rate, dilation=rate)
            nn.init.normal_(branch.weight, 0.0, 0.01)
            nn.init.zeros_(branch.bias)  # type: ignore[arg-type]
            self.add_module(f"c{number}", branch)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) to logits (B, L, h, w)."""
        first, *others = (branch(features) for branch in self.children())
        logits: Tensor = sum(others, first)
        return logits


class DeepLabV2(FrozenStatistics, base.Network):
    """A backbone of ``channels`` features and :class:`Aspp` at scales; batch norms are frozen."""

    def __init__(
        self, backbone: nn.Module, channels: int, labels: int, pyramid: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.aspp = Aspp(channels, labels)
        self.pyramid = tuple(pyramid)
        freeze(self, (), norms=True)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, L, h, w) of normalised RGB (B, 3, H, W): the maximum over the scales."""
        return _largest(self._logits(images))

    def outputs(self, images: Tensor) -> list[tuple[Tensor, float]]:
        """Logits of scale 1, of further scales in their sizes, and, if any, the maximum of all."""
        logits = self._logits(images)
        if self.pyramid:
            logits.append(_largest(logits))
        return [(each, 1.0) for each in logits]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters; ``no_decay``: of the backbone, vectors and what timm excludes."""
        excluded: frozenset[str] = getattr(self.backbone, "no_decay", frozenset())
        vectors = {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}
        return base.grouped(self, vectors | {f"backbone.{name}" for name in excluded})

    def _logits(self, images: Tensor) -> list[Tensor]:
        """Logits of scale 1 and of each further scale, each in its size."""
        logits = [self.aspp(self.backbone(images))]
        for scale in self.pyramid:
            size = [math.floor(side * scale) for side in images.shape[-2:]]
            logits.append(self.aspp(self.backbone(resize(images, size))))
        return logits


def _largest(logits: Sequence[Tensor]) -> Tensor:
    """Element-wise maximum on the grid of the first."""
    if len(logits) == 1:
        return logits[0]
    size = logits[0].shape[-2:]
    return torch.stack([resize(each, size) for each in logits]).max(0).values


class _Features(nn.Module):
    """The features of a classifier before pooling, as a backbone without its head."""

    def __init__(self, classifier: models.Classifier) -> None:
        super().__init__()
        self.channels = classifier.weight.shape[1]
        self.classifier = classifier
        del classifier.head
        names: set[str] = getattr(classifier.backbone, "no_weight_decay", set)()
        self.no_decay = frozenset(f"classifier.backbone.{name}" for name in names)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)


class DeepLabV2Network:
    """DeepLabV2 on ``resnet101_caffe``, whose arguments are ``blocks`` and ``width``, or on timm's.

    Of a file of the field, a classifier is ignored and an ASPP is used if it fits.
    """

    title = "DeepLabV2"
    default_backbone = CAFFE
    options: frozenset[base.Option] = frozenset({"backbone", "output_stride", "pyramid"})
    one_size_export = False

    def check(self, spec: base.SegmenterSpec, weights: str) -> None:
        """Raise ClassifierError if the backbone is unknown or its arguments do not fit."""
        if spec.backbone == CAFFE:
            _check_caffe(spec.arguments, spec.output_stride, weights)
        else:
            models.check_backbone(spec.backbone)

    def build(
        self, spec: base.SegmenterSpec, labels: int, **first: Unpack[base.First]
    ) -> tuple[DeepLabV2, models.Preprocessing]:
        """The network and its preprocessing."""
        weights, seed, caffe = str(first["weights"]), first.get("seed", 0), spec.backbone == CAFFE
        if caffe:
            self.check(spec, weights)
            preprocessing = base.preprocessing_with(
                PREPROCESSING, first.get("mean"), first.get("std")
            )
        else:
            own = models.BackboneSpec(spec.backbone, dict(spec.arguments), spec.output_stride)
            # NO_CLASSES is one class, whose head is removed
            classifier = models.build(own, models.NO_CLASSES, **first)
            preprocessing = classifier.preprocessing
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            features = CaffeResNet101(**spec.arguments) if caffe else _Features(classifier)
            network = DeepLabV2(features, features.channels, labels, spec.pyramid)
        if caffe and weights != models.RANDOM:
            _load(network, Path(weights))
        return network, preprocessing


def convert_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the field's DeepLabV2 with the names used here: ``layer1...``, ``aspp``."""
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = name
        while prefix := next((p for p in _PREFIXES if new.startswith(p)), ""):
            new = new.removeprefix(prefix)
        new = new.replace(".proj.", ".shortcut.").replace("aspp.stages.", "aspp.")
        if new in converted:
            raise ClassifierError(
                f"the weights hold {new!r} twice, once as {name!r}; give a file of one network"
            )
        converted[new] = tensor
    return converted


def _check_caffe(arguments: Mapping[str, Any], stride: int | None, weights: str | Path) -> None:
    if unknown := sorted(set(arguments) - {"blocks", "width"}):
        raise ClassifierError(f"{CAFFE} has no argument {unknown[0]!r}; it has blocks and width")
    blocks, width = arguments.get("blocks", BLOCKS), arguments.get("width", WIDTH)
    numbers = [*blocks, width] if isinstance(blocks, Sequence) else []
    if len(numbers) != len(BLOCKS) + 1 or not all(isinstance(n, int) and n > 0 for n in numbers):
        raise ClassifierError(
            f"{CAFFE} has blocks {blocks!r} and width {width!r}; expected {len(BLOCKS)} positive "
            "integers and one"
        )
    if stride not in (None, OUTPUT_STRIDE):
        raise ClassifierError(
            f"{CAFFE} has output stride {OUTPUT_STRIDE}, got {stride}; set it to null, or take "
            "timm's resnet101"
        )
    base.refuse_pretrained(CAFFE, weights)


def _load(network: DeepLabV2, path: Path) -> None:
    """Load the Caffe backbone from a file, and the ASPP where the file has one that fits."""
    state = convert_names(models.read_weights(path))
    head = {k.removeprefix("aspp."): v for k, v in state.items() if k.startswith("aspp.")}
    backbone = {k: v for k, v in state.items() if not k.startswith(("fc.", "aspp."))}
    advice = (
        "it takes files of the Caffe ResNet-101 with the names layer1.conv1.conv.weight and so on; "
        "for torchvision's or timm's weights the backbone is resnet101"
    )
    base.load_fitting(network.backbone, backbone, path.name, repr(CAFFE), advice)
    if head and not models.misfit(network.aspp.state_dict(), head):
        base.load_fitting(network.aspp, head, path.name, "the ASPP", advice)
    elif head:
        logger.info("the ASPP in %s is of other labels or rates and is left out", path.name)


NETWORK = DeepLabV2Network()
