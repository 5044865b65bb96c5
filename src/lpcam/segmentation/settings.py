"""Settings of the training and the test of a segmenter."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lpcam.runtime.settings import Fraction, Positive, PresetModel, TrainedSection, WeightsSection
from lpcam.segmentation.networks.base import SegmenterSpec
from lpcam.segmentation.networks.registry import NETWORKS


class SegmenterSettings(PresetModel):
    """How a segmenter is trained on pseudo masks (specification of segmentation)."""

    table: ClassVar[str] = "segmenter"
    preset: str = "deeplabv2.voc12.official"

    iterations: Annotated[int, Field(ge=1)] | None
    """Number of optimiser steps; null if ``epochs`` is given."""
    epochs: Annotated[int, Field(ge=1)] | None
    """Passes over the list; null if ``iterations`` is given."""
    batch_size: Annotated[int, Field(ge=1)]
    """Images per step, over all processes and sub-batches."""
    accumulation: Annotated[int, Field(ge=1)]
    """Sub-batches per step; more need less memory. Their mean losses are averaged."""
    optimizer: Literal["sgd", "adamw"]
    """Optimiser of all weights."""
    learning_rate: Positive
    """Learning rate of the backbone."""
    head_multiplier: Positive
    """Factor of the learning rate of the weights of new layers."""
    head_bias_multiplier: Positive
    """Factor of the learning rate of the biases of new layers."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Momentum of SGD; the first beta of AdamW."""
    weight_decay: Annotated[float, Field(ge=0.0)]
    """Decay of trained weights, except those that a network exempts."""
    head_bias_weight_decay: Annotated[float, Field(ge=0.0)]
    """Decay of the biases of new layers."""
    power: Annotated[float, Field(ge=0.0)]
    """Power p of the poly schedule lr (1 - t/T)^p; a larger one lowers the rate sooner."""
    refresh: Annotated[int, Field(ge=1)]
    """Steps between two updates of the learning rate by the schedule."""
    warmup: Annotated[int, Field(ge=0)]
    """Number of first steps in which the learning rate rises linearly; 0 turns it off."""
    warmup_factor: Fraction
    """Factor of the learning rate at the first step of the warm-up."""
    freeze: tuple[str, ...]
    """Name prefixes of backbone parameters that are not trained."""
    pyramid: tuple[Positive, ...]
    """Further scales of each training image in DeepLabV2, which takes the largest logits; each
    scale also has its own loss. Empty for other networks."""
    loss: Literal["cross_entropy", "balanced"]
    """Loss. ``balanced`` adds the mean over background pixels to the mean over the others."""
    labels: Literal["reduced", "full"]
    """``reduced``: labels are resized to the size of the logits (PIL nearest). ``full``: logits are
    resized to the size of the labels (bilinear)."""
    resize: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None
    """Maximum long and short side, in pixels; images are first shrunk or enlarged to fit."""
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Random scales to choose from, or the two ends of a range."""
    scale_drawn: Literal["choice", "range"]
    """How ``scales`` is used: as a choice or as a range."""
    scale_of: Literal["image", "batch"]
    """Whether each image or each batch has its own random scale."""
    crop: Annotated[int, Field(ge=16)]
    """Side of the square crop, in pixels."""
    class_limit: Fraction | None
    """A crop is drawn again, at most ten times, if a class covers more than this fraction of it."""
    padding_label: Literal[0, 255]
    """Label of the padding where an image is smaller than the crop."""
    distortion: bool
    """Whether brightness, contrast, saturation and hue change at random."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.iterations is None) == (self.epochs is None):
            raise ValueError(
                f"iterations {self.iterations} and epochs {self.epochs}: give one and set the "
                "other to null"
            )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of accumulation {self.accumulation}"
            )
        if self.scale_drawn == "range" and (
            len(self.scales) != 2 or self.scales[0] > self.scales[1]
        ):
            raise ValueError(f"scales {list(self.scales)} must be a range: two, the smaller first")
        return self


class SegmentTestSettings(PresetModel):
    """How a segmenter is tested and used (specification of segmentation)."""

    table: ClassVar[str] = "segment_test"
    preset: str = "deeplabv2.official"

    resize: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None
    """Maximum long and short side, in pixels; images are first shrunk or enlarged to fit."""
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Scales at which each image is segmented; more take more time."""
    sides: Literal["rounded", "truncated"]
    """How the side lengths of a scaled image become integers."""
    align_corners: bool
    """Whether images are scaled with aligned corners (bilinear)."""
    flip: bool
    """Whether the mirrored image is segmented too."""
    fusion: Literal["mean_logits", "mean_probabilities", "max_probabilities"]
    """How the outputs of scales and mirror images are combined, at the size of the image."""
    crf: Literal["deeplab", "wideresnet38"] | None
    """Preset of the dense CRF on the probabilities; null applies none."""
    crf_image: Literal["image", "wrapped"]
    """Image of the CRF. ``wrapped`` imitates the original program, where the image minus the mean
    colour (BGR) overflows; it explains small differences to published figures."""


class SegmentSection(WeightsSection, TrainedSection):
    """A network that is trained on the pseudo masks and segments images without labels."""

    network: str = "deeplabv2"
    """Name of a segmentation network."""
    backbone: str | None = None
    """Backbone. deeplabv2: ``resnet101_caffe`` or a timm model (null: the former). upernet: the
    Swin's size, ``tiny``, ``small`` or ``base`` (null: tiny). wideresnet38: null."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the backbone."""
    output_stride: Literal[8, 16, 32] | None = None
    """Output stride of a timm backbone; null keeps the model's own."""
    weights: str = "pretrained"
    """Weights of the backbone: "pretrained", "random", or the path of a safetensors file."""
    mean: tuple[float, float, float] | None = None
    """Mean of RGB in [0, 1]; null takes the network's own."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of RGB in [0, 1]; null takes the network's own."""
    masks: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Maps whose pseudo masks train a segmenter each; ``truth`` trains one on the true masks, as an
    upper bound. Null: all maps that are refined."""
    training: SegmenterSettings = SegmenterSettings.from_preset("deeplabv2.voc12.official")
    test: SegmentTestSettings = SegmentTestSettings.from_preset("deeplabv2.official")
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network's passes in training; weights and loss are in float32."""
    validations: Annotated[int, Field(ge=0)] = 5
    """Number of mIoU measurements during training, on the test list if it has masks, at scale 1
    without a CRF; 0 turns them off."""
    checkpoint: Literal["last", "best"] = "last"
    """Weights that are tested and used: ``best`` has the highest measured mIoU on the test list."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.network not in NETWORKS:
            raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {self.network!r}")
        given = {
            "backbone": self.backbone,
            "output_stride": self.output_stride,
            "pyramid": self.training.pyramid,
        }
        for name, value in given.items():
            if value and name not in NETWORKS[self.network].options:
                field = "training.pyramid" if name == "pyramid" else name
                raise ValueError(f"{field} does not apply to {self.network}, got {value!r}")
        if self.checkpoint == "best" and not self.validations:
            raise ValueError("checkpoint 'best' needs validations above 0")
        return self

    @property
    def title(self) -> str:
        """Name of the network in tables of results."""
        return NETWORKS[self.network].title

    @property
    def backbone_name(self) -> str:
        """The backbone, where none is given the network's usual one."""
        return self.backbone or NETWORKS[self.network].default_backbone

    def spec(self) -> SegmenterSpec:
        """The architecture."""
        backbone, pyramid = self.backbone_name, self.training.pyramid
        return SegmenterSpec(self.network, backbone, self.arguments, self.output_stride, pyramid)
