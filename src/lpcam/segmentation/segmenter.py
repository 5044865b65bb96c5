"""A segmentation network with its classes and preprocessing: what training makes and a file holds.

Labels are 0 for the background and n + 1 for the class with index n; L = N + 1 of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from lpcam.classifier import PRETRAINED, RANDOM, Preprocessing, check_backbone
from lpcam.data.items import ClassTable
from lpcam.errors import ArtefactError, ClassifierError
from lpcam.network_files import load_weights
from lpcam.networks.deeplabv2 import CAFFE
from lpcam.storage import read_tensors, write_tensors

NetworkName = Literal["deeplabv2", "wideresnet38", "upernet"]


class Network(Protocol):
    """What training and testing need of a segmentation network, beside being a module."""

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, L, h, w) of normalised RGB images (B, 3, H, W), as they are used at test."""
        ...

    def outputs(self, images: Tensor) -> list[tuple[Tensor, float]]:
        """For training: logits and the weight of their loss, of each output."""
        ...

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters: ``backbone``, ``head``, ``head_bias`` and ``no_decay``."""
        ...


@dataclass(frozen=True)
class SegmenterSpec:
    """What makes a network, apart from its weights and the number of its labels."""

    network: NetworkName
    backbone: str
    """``resnet101_caffe`` or a timm name; ``wideresnet38``; a Swin's size."""
    arguments: Mapping[str, Any]
    output_stride: int | None = None
    """Of a timm backbone; None leaves its own."""
    pyramid: tuple[float, ...] = ()
    """Further scales of DeepLabV2."""


class Segmenter(nn.Module):
    """A network, the classes of its labels, and what it expects of RGB.

    Args:
        network: images (B, 3, H, W) to logits (B, L, h, w), a :class:`Network`.
        classes: with the values that their pixels have in masks.
        preprocessing: of RGB in [0, 1].
        spec: how to build the network again; None for one of the caller's own, which can then not
            be saved.
    """

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
    def trained(self) -> Network:
        """The network, as training sees it."""
        return cast(Network, self.network)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, L, h, w) of normalised images (B, 3, H, W)."""
        logits: Tensor = self.network(images)
        return logits

    def save(self, path: Path, made_by: Mapping[str, Any] | None = None) -> None:
        """Write weights, architecture, classes and provenance to one safetensors file.

        Raises:
            ArtefactError: for a network of the caller's own, which no file can describe.
        """
        if self.spec is None:
            raise ArtefactError(
                "this segmenter wraps a network that was passed in, so a file cannot describe it; "
                "build it with lpcam.segmentation.segmenter.build_segmenter to save it"
            )
        state = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
        metadata = {
            "kind": "segmenter",
            "spec": asdict(self.spec),
            "classes": list(self.classes.names),
            "mask_ids": list(self.classes.mask_ids),
            "preprocessing": asdict(self.preprocessing),
            "made_by": dict(made_by or {}),
        }
        write_tensors(path, state, metadata)

    @classmethod
    def load(cls, path: Path) -> Segmenter:
        """Read a file of :meth:`save`; needs no network connection.

        Raises:
            ArtefactError: if the file is missing, damaged, or not a segmenter.
        """
        state, metadata = read_tensors(path)
        if metadata.get("kind") != "segmenter":
            raise ArtefactError(
                f"{path} holds {metadata.get('kind')!r}, not a segmenter; give the file that the "
                "segment stage wrote"
            )
        values = metadata["spec"]
        spec = SegmenterSpec(**{**values, "pyramid": tuple(values["pyramid"])})
        classes = ClassTable(tuple(metadata["classes"]), tuple(metadata["mask_ids"]))
        preprocessing = metadata["preprocessing"]
        segmenter = build_segmenter(
            spec,
            classes,
            weights=RANDOM,
            mean=preprocessing["mean"],
            std=preprocessing["std"],
        )
        load_weights(segmenter.network, state, path)
        return segmenter


def check_segmenter(spec: SegmenterSpec, weights: str) -> None:
    """Refuse what :func:`build_segmenter` would, as far as it can be told at no cost.

    Raises:
        ClassifierError: if the backbone is unknown, there is no weights file, no weights to fetch,
            or an extra is missing.
    """
    if weights not in (PRETRAINED, RANDOM) and not Path(weights).is_file():
        raise ClassifierError(
            f"segment.weights: there is no file {weights!r}; give the path of a safetensors file, "
            f"{PRETRAINED!r} or {RANDOM!r} (lpcam convert makes one of a .pth file)"
        )
    fixed = spec.network == "wideresnet38" or spec.backbone == CAFFE
    if fixed and weights == PRETRAINED:
        raise ClassifierError(
            f"segment.weights: {spec.backbone} has no weights to fetch; convert the field's file "
            "(lpcam convert FILE.pth FILE.safetensors) and give that, or 'random'"
        )
    if spec.network == "upernet":
        from lpcam.networks.upernet import SIZES  # noqa: PLC0415

        if spec.backbone not in SIZES:
            raise ClassifierError(
                f"segment.backbone: there is no Swin {spec.backbone!r}; there are "
                f"{', '.join(SIZES)}"
            )
        if find_spec("transformers") is None:
            raise ClassifierError(
                "UperNet needs transformers; install it with pip install 'lpcam[upernet]'"
            )
    elif not fixed:
        check_backbone(spec.backbone)


def build_segmenter(
    spec: SegmenterSpec,
    classes: ClassTable,
    *,
    weights: str | Path,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> Segmenter:
    """Build a segmenter whose head is drawn at random.

    Args:
        weights: of the backbone: ``"pretrained"``, ``"random"``, or a safetensors file.
        mean, std: of RGB in [0, 1]; default: the network's own.
        seed: of everything random.

    Raises:
        ClassifierError: if the backbone is unknown, or the weights cannot be had or do not fit.
    """
    labels = len(classes) + 1
    options: dict[str, Any] = {"weights": weights, "mean": mean, "std": std, "seed": seed}
    network: nn.Module
    if spec.network == "deeplabv2":
        from lpcam.networks.deeplabv2 import build_deeplabv2  # noqa: PLC0415

        network, preprocessing = build_deeplabv2(
            spec.backbone,
            labels,
            arguments=spec.arguments,
            output_stride=spec.output_stride,
            pyramid=spec.pyramid,
            **options,
        )
    elif spec.network == "wideresnet38":
        from lpcam.networks.wideresnet38 import build_wideresnet38  # noqa: PLC0415

        network, preprocessing = build_wideresnet38(labels, arguments=spec.arguments, **options)
    else:
        from lpcam.networks.upernet import build_upernet  # noqa: PLC0415

        network, preprocessing = build_upernet(
            spec.backbone, labels, arguments=spec.arguments, **options
        )
    return Segmenter(network, classes, preprocessing, spec)
