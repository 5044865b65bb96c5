"""Settings of the training and the test of a segmenter."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lpcam.runtime.settings import Fraction, Positive, PresetModel, WeightsSection
from lpcam.segmentation.networks.base import SegmenterSpec
from lpcam.segmentation.networks.registry import NETWORKS


class SegmenterSettings(PresetModel):
    """How a segmenter is trained on pseudo masks (specification of segmentation)."""

    table: ClassVar[str] = "segmenter"
    preset: str = "deeplabv2.voc12.official"

    iterations: Annotated[int, Field(ge=1)] | None
    """Steps of the optimiser; null counts in epochs."""
    epochs: Annotated[int, Field(ge=1)] | None
    """Passes over the list; null counts in iterations."""
    batch_size: Annotated[int, Field(ge=1)]
    """Images a step, over all processes and sub-batches."""
    accumulation: Annotated[int, Field(ge=1)]
    """Sub-batches a step, one forward pass each; their mean losses are averaged."""
    optimizer: Literal["sgd", "adamw"]
    learning_rate: Positive
    """Of the backbone."""
    head_multiplier: Positive
    """Of the weights of new layers ..."""
    head_bias_multiplier: Positive
    """... and of their biases."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Of SGD; the first beta of AdamW."""
    weight_decay: Annotated[float, Field(ge=0.0)]
    """Of every trained weight but those that a network names as without decay, and ..."""
    head_bias_weight_decay: Annotated[float, Field(ge=0.0)]
    """... of the biases of new layers."""
    power: Annotated[float, Field(ge=0.0)]
    """Of the poly schedule: lr (1 - t/T)^power."""
    refresh: Annotated[int, Field(ge=1)]
    """The rate is renewed every so many steps."""
    warmup: Annotated[int, Field(ge=0)]
    """Steps over which the rate rises linearly to its schedule, from ``warmup_factor`` of it."""
    warmup_factor: Fraction
    freeze: tuple[str, ...]
    """Prefixes of the backbone's parameter names that are not trained, beside those that a network
    never trains."""
    pyramid: tuple[Positive, ...]
    """Further scales at which DeepLabV2 sees each image; the largest logits count, and each scale
    has its own loss. Empty for others."""
    loss: Literal["cross_entropy", "balanced"]
    """``balanced``: the mean over background pixels and that over the others are added."""
    labels: Literal["reduced", "full"]
    """``reduced``: labels are brought to the size of the logits (PIL nearest). ``full``: logits are
    enlarged to that of the labels (bilinear)."""
    resize: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None
    """Longest and shortest side, in pixels, that an image is resized to fit, before its scale."""
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Of which one is drawn, or the two ends of a range."""
    scale_drawn: Literal["choice", "range"]
    scale_of: Literal["image", "batch"]
    """What has a scale of its own."""
    crop: Annotated[int, Field(ge=16)]
    """Side of the square crop, in pixels."""
    class_limit: Fraction | None
    """A crop is drawn again (ten times at most) while one class has more than this part of it."""
    padding_label: Literal[0, 255]
    """Of what a crop has beyond a smaller image, to its right and below."""
    distortion: bool
    """Random brightness, contrast, saturation and hue."""

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
    """Longest and shortest side, in pixels, that an image is resized to fit before its scales."""
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """At which each image is segmented."""
    sides: Literal["rounded", "truncated"]
    """How the sides of a scaled image become whole pixels."""
    align_corners: bool
    """Of the bilinear resize of the normalised image to a scale."""
    flip: bool
    """Whether the mirrored image is segmented too."""
    fusion: Literal["mean_logits", "mean_probabilities", "max_probabilities"]
    """How scales and mirror images become one, at the size of the image."""
    window: Annotated[int, Field(ge=16)] | None
    """Side, in pixels, of sliding windows over a scaled image; null segments it whole."""
    overlap: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Part of a window that its neighbour shares, at least; means are taken there."""
    crf: Literal["deeplab", "wideresnet38"] | None
    """Preset of the dense CRF on the probabilities; null has none."""
    crf_image: Literal["image", "wrapped"]
    """``wrapped``: the image minus the mean colour in BGR, its negative values wrapped around as
    the stock program does, only to explain small differences to published figures."""


class SegmentSection(WeightsSection):
    """A network that is trained on the pseudo masks and segments images without any label."""

    network: str = "deeplabv2"
    """Name of a segmentation network."""
    backbone: str | None = None
    """deeplabv2: ``resnet101_caffe`` or a timm model (null: the former). upernet: the Swin's size,
    ``tiny``, ``small`` or ``base`` (null: tiny). wideresnet38: null."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """More arguments of the backbone."""
    output_stride: Literal[8, 16, 32] | None = None
    """Output stride of a timm backbone; null keeps the model's own."""
    weights: str = "pretrained"
    """Weights of the backbone: "pretrained", "random", or the path of a safetensors file."""
    mean: tuple[float, float, float] | None = None
    """Mean of RGB in [0, 1]; null takes the network's own."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of RGB in [0, 1]; null takes the network's own."""
    masks: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """A segmenter is trained on the pseudo masks of each of these maps; ``truth``: on the true
    masks, an upper bound of what masks can give. Null: of all that are refined."""
    training: SegmenterSettings = SegmenterSettings.from_preset("deeplabv2.voc12.official")
    test: SegmentTestSettings = SegmentTestSettings.from_preset("deeplabv2.official")
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network's passes in training; weights and loss are in float32."""
    validations: Annotated[int, Field(ge=0)] = 5
    """How often the mIoU is measured during training, on the list to test where it has masks: at
    scale 1, without a CRF."""
    checkpoint: Literal["last", "best"] = "last"
    """Which weights are tested and used; ``best`` is chosen on the truth of the list to test."""

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
        return SegmenterSpec(
            self.network,
            self.backbone_name,
            self.arguments,
            self.output_stride,
            self.training.pyramid,
        )
