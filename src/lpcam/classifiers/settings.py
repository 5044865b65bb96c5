"""Settings of a backbone and of the classifier on it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from lpcam.classifiers.classifier import RANDOM, BackboneSpec, build
from lpcam.classifiers.finetuning import FinetuneSettings
from lpcam.classifiers.linear import ProbeSettings
from lpcam.runtime.files import weights_key
from lpcam.runtime.settings import TrainedSection, WeightsSection
from lpcam.training.released import RESNET50, RESNET50_COPIES, WIDERESNET38, Released

RELEASED_RESNET50 = BackboneSpec("resnet50.tv_in1k", {}, 16, dilated=False)
"""The ResNet-50 of the released programs (specification of LPCAM, section 2)."""


def _flat(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The head's 1 x 1 convolution as a linear layer."""
    return {name: t.flatten(1) if name == "head.weight" else t for name, t in state.items()}


RELEASED = (
    Released(
        "the ResNet-50 classifier of IRN, ReCAM, AMN and LPCAM",
        "classifier",
        ("resnet50.conv1.weight", "classifier.weight"),
        [(RESNET50, "backbone."), (r"classifier\.", "head.")],
        lambda names: build(RELEASED_RESNET50, names, weights=RANDOM),
        classes=lambda state: len(state["classifier.weight"]),
        left_out=RESNET50_COPIES,
        adapt=_flat,
    ),
    Released(
        "PSA's classifier on WideResNet-38",
        "classifier",
        ("conv1a.weight", "fc8.weight"),
        [(WIDERESNET38, "backbone."), (r"fc8\.", "head.")],
        lambda names: build(BackboneSpec("wideresnet38", {}), names, weights=RANDOM),
        classes=lambda state: len(state["fc8.weight"]),
        adapt=_flat,
    ),
)
"""Files of released programs that hold a classifier."""


class BackboneSection(WeightsSection):
    """A timm backbone, its first weights and its preprocessing."""

    backbone: str | None
    """Name of a timm model."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of timm.create_model."""
    output_stride: Literal[8, 16, 32] | None = None
    """Stride of the feature map; null keeps the model's own. Not all models support others."""
    dilated: bool = True
    """Whether layers are dilated where output_stride removes a stride; false: dilation is 1."""
    weights: str
    """Weights: "pretrained" (timm's), "random", or the path of a safetensors file."""
    mean: tuple[float, float, float] | None = None
    """Mean of RGB in [0, 1]; null takes timm's value for the model."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of RGB in [0, 1]; null takes timm's value for the model."""

    def backbone_key(self) -> dict[str, Any]:
        """Inputs that determine the first weights of a network on it, for a cache key."""
        return {"backbone": self.described(), "weights": weights_key(self.weights)}

    def described(self) -> dict[str, Any]:
        """The backbone without its weights, as JSON."""
        fields = {"backbone", "arguments", "output_stride", "dilated", "mean", "std"}
        return {**self.model_dump(mode="json", include=fields), "dilated": self._dilated()}

    def spec(self) -> BackboneSpec:
        """The backbone, for the functions that build networks."""
        assert self.backbone is not None
        return BackboneSpec(self.backbone, self.arguments, self.output_stride, self._dilated())

    def first_weights(self, seed: int) -> dict[str, Any]:
        """Arguments of the functions that build networks: weights, preprocessing and seed."""
        return {"weights": self.weights, "mean": self.mean, "std": self.std, "seed": seed}

    def _dilated(self) -> bool:
        # Without an output stride no dilation is removed, whatever the section says.
        return self.dilated or self.output_stride is None


class ClassifierSection(BackboneSection, TrainedSection):
    """The classifier: its backbone, and how its head (and backbone) are trained."""

    backbone: str
    """Name of a timm model."""
    method: Literal["auto", "probe", "finetune"] = "auto"
    """Training. ``auto``: fine-tune if there is a GPU, else a linear probe on a frozen backbone."""
    probe: ProbeSettings = ProbeSettings.from_preset("default")
    finetune: FinetuneSettings = FinetuneSettings.from_preset("momentum")
