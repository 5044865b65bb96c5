"""Interface and shared parts of the segmentation networks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Required, TypedDict, Unpack

from torch import Tensor, nn

from lpcam.classifiers.classifier import PRETRAINED, Preprocessing, misfit, refuse_not_finite
from lpcam.runtime.errors import ClassifierError
from lpcam.training.released import COUNTER

Option = Literal["backbone", "output_stride", "pyramid"]


@dataclass(frozen=True)
class SegmenterSpec:
    """Architecture of a segmenter, without its weights and the number of labels."""

    network: str  #: Name of a network in ``NETWORKS``.
    backbone: str  #: ``resnet101_caffe`` or a timm name; ``wideresnet38``; a size of Swin.
    arguments: Mapping[str, Any]  #: Further arguments of the backbone.
    output_stride: int | None = None  #: Of a timm backbone; None keeps the model's own.
    pyramid: tuple[float, ...] = ()  #: Further scales of DeepLabV2.


class First(TypedDict, total=False):
    """Arguments for the initial weights of a network."""

    weights: Required[str | Path]  #: ``"pretrained"``, ``"random"``, or a safetensors file.
    mean: Sequence[float] | None  #: Mean of RGB in [0, 1]; None: the network's own.
    std: Sequence[float] | None  #: Standard deviation of RGB in [0, 1]; None: the network's own.
    seed: int  #: Random seed of the head and of random weights.


class Network(nn.Module):
    """A segmentation network: normalised RGB images (B, 3, H, W) to logits (B, L, h, w)."""

    def outputs(self, images: Tensor) -> list[tuple[Tensor, float]]:
        """Logits of each output and the weight of its loss, for training."""
        return [(self(images), 1.0)]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trained parameters, once in ``backbone``, ``head``, ``head_bias`` or ``no_decay``."""
        return grouped(self)


class SegmentationNetwork(Protocol):
    """A kind of segmentation network; ``lpcam.segmentation.networks.registry`` lists them.

    Attributes:
        title: name in tables of results.
        default_backbone: backbone if a recipe names none.
        options: fields of a recipe's ``segment`` section that apply to it.
        one_size_export: whether its ONNX file can only take images of one size.
    """

    title: str
    default_backbone: str
    options: frozenset[Option]
    one_size_export: bool

    def check(self, spec: SegmenterSpec, weights: str) -> None:
        """Raise the ClassifierError of :meth:`build` that can be found without building."""

    def build(
        self, spec: SegmenterSpec, labels: int, **first: Unpack[First]
    ) -> tuple[nn.Module, Preprocessing]:
        """A :class:`Network` of L labels in evaluation mode, and its preprocessing.

        ClassifierError if an argument or the weights are not accepted.
        """


def grouped(network: nn.Module, undecayed: Collection[str] = ()) -> dict[str, list[nn.Parameter]]:
    """The trained parameters of ``backbone`` and of the rest, and names that have no decay."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if name.startswith("backbone."):
            group = "no_decay" if name in undecayed else "backbone"
        else:
            group = "head_bias" if name.endswith("bias") else "head"
        if parameter.requires_grad:
            groups.setdefault(group, []).append(parameter)
    return groups


def refuse_pretrained(backbone: str, weights: str | Path) -> None:
    """Raise a ClassifierError for pretrained weights of a backbone that has none to download."""
    if str(weights) == PRETRAINED:
        raise ClassifierError(
            f"segment.weights: {backbone} has no pretrained weights to download; convert the "
            "field's file (lpcam convert FILE.pth FILE.safetensors) and give that, or 'random'"
        )


def load_fitting(
    module: nn.Module, state: Mapping[str, Tensor], name: str, what: str, advice: str
) -> None:
    """Load a file's finite weights into a module, ``what``; ClassifierError if they do not fit.

    Counters of batches, which files of old programs lack and nothing reads, may be missing.
    """
    own = module.state_dict()
    state = {k: v for k, v in own.items() if k.endswith(COUNTER)} | {**state}
    if difference := misfit(own, state):
        raise ClassifierError(f"the weights {name!r} do not fit {what}: {difference}; {advice}")
    refuse_not_finite(state, name)
    module.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()})


def preprocessing_with(
    own: Preprocessing, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Preprocessing:
    """A preprocessing with mean and std replaced where they are given."""
    return Preprocessing(
        own.mean if mean is None else tuple(mean), own.std if std is None else tuple(std)
    )
