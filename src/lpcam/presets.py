"""Named sets of values (floor 0): the settings of LPCAM and of the classifier's training.

The values themselves are in ``presets.yaml`` beside this file and nowhere else. A settings model
has no defaults of its own: it is filled from a preset, and values given next to the preset's name
replace the preset's.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lpcam.errors import RecipeError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


@cache
def _tables() -> dict[str, dict[str, dict[str, Any]]]:
    text = resources.files("lpcam").joinpath("presets.yaml").read_text(encoding="utf-8")
    tables: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(text)
    return tables


def preset_names(table: str) -> list[str]:
    """Names of the presets of a table (``lpcam`` or ``finetune``)."""
    return list(_tables()[table])


def preset_values(table: str, name: str) -> dict[str, Any]:
    """Values of one preset as a fresh dict.

    Raises:
        RecipeError: if the table has no preset of that name; the message lists those it has.
    """
    presets = _tables()[table]
    if name not in presets:
        raise RecipeError(f"unknown {table} preset {name!r}; there are {', '.join(presets)}")
    return dict(presets[name])


class PresetModel(BaseModel):
    """A settings model that is filled from ``preset`` and then from the values given beside it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    table: ClassVar[str]
    preset: str

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name = given.get("preset", cls.model_fields["preset"].default)
        if not isinstance(name, str) or name not in preset_names(cls.table):
            allowed = ", ".join(preset_names(cls.table))
            raise ValueError(f"unknown preset {name!r}; allowed: {allowed}")
        return {**preset_values(cls.table, name), "preset": name, **given}

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """Settings of a preset with some values changed.

        Raises:
            RecipeError: if there is no such preset.
            pydantic.ValidationError: if a changed value is unknown or out of range.
        """
        preset_values(cls.table, name)
        return cls.model_validate({"preset": name, **changes})

    def changes(self) -> dict[str, Any]:
        """The values that differ from the preset's own: what a protocol must state."""
        own = type(self).from_preset(self.preset).model_dump()
        return {k: v for k, v in self.model_dump().items() if v != own[k]}


class LpcamSettings(PresetModel):
    """How prototypes are made and maps computed (specification of LPCAM, sections 1, 3 and 4)."""

    table: ClassVar[str] = "lpcam"
    preset: str = "voc12.official"

    clusters: Annotated[int, Field(ge=1)]
    """K, the number of clusters of each class and side."""
    restarts: Annotated[int, Field(ge=1)]
    """Clusterings from different first centres; the prototypes of all of them are taken together,
    so that the maps hang less on the luck of one."""
    tau: Fraction
    """Threshold on the CAM that splits foreground from context (eq. 2)."""
    tau_inclusive: bool
    """True: foreground is CAM >= tau (eq. 2). False: > tau, and equality joins neither side."""
    split_maps: Literal["multi_scale", "single_scale"]
    """Which CAM decides the split: the fused one of all scales, or that of the features alone."""
    split_resize: Literal["nearest", "bilinear"]
    """How a multi-scale CAM at image size is brought to the feature grid."""
    mu_f: Fraction
    """Class prototypes are the foreground centres whose score is above it."""
    mu_b: Fraction
    """Context prototypes are the context centres whose score is below it ..."""
    context_lower: Fraction | None
    """... and above this one; null has no lower bound."""
    images_per_class: Annotated[int, Field(ge=1)] | None
    """Images drawn for each class to be clustered; null takes all of the list."""
    images_with_replacement: bool
    """Whether an image may be drawn more than once (its features then count as often)."""
    max_features: Annotated[int, Field(ge=1)] | None
    """Size of the reservoir of local features of each class and side; null keeps all."""
    init: Literal["random", "k-means++"]
    """First centres: K distinct features, or spread ones."""
    centers: Literal["mean", "unit"]
    """``mean``: plain mean of the raw members; ``unit``: mean of the unit members (spherical)."""
    tolerance: Positive
    """When k-means stops."""
    tolerance_kind: Literal["absolute", "relative"]
    """``absolute``: on the squared sum of centre shifts; ``relative``: on the objective's gain."""
    max_iterations: Annotated[int, Field(ge=1)]
    """Bound of k-means; reaching it is warned of."""
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """At which each image is mapped; the maps are summed."""
    flip: bool
    """Whether the mirrored image is mapped too."""
    cam_epsilon: Annotated[float, Field(ge=0.0)]
    """CAM is divided by its maximum plus this; LPCAM by its maximum."""
    threshold: Fraction
    """Fixed threshold of the seeds of LPCAM and LPCAM-F: foreground has a value above it."""
    cam_threshold: Fraction
    """Fixed threshold of the seeds of CAM."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.context_lower is not None and self.context_lower >= self.mu_b:
            raise ValueError(
                f"context_lower {self.context_lower} must be below mu_b {self.mu_b}, "
                "or no context prototype could ever be kept"
            )
        return self


class FinetuneSettings(PresetModel):
    """How a classifier is fine-tuned (specification of IRN, section 1)."""

    table: ClassVar[str] = "finetune"
    preset: str = "momentum"

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    learning_rate: Positive
    """Of the backbone; the head's is ``head_multiplier`` times as large."""
    head_multiplier: Positive
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Of SGD."""
    weight_decay: Annotated[float, Field(ge=0.0)]
    """L2 on every trained weight."""
    power: Annotated[float, Field(ge=0.0)]
    """Of the poly schedule: lr (1 - t/T)^power, renewed every step."""
    long_side: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    """Inclusive range, in pixels, from which each image's long side is drawn."""
    crop: Annotated[int, Field(ge=1)]
    """Side of the square crop, in pixels."""
    freeze: tuple[str, ...]
    """Prefixes of the backbone's parameter names that are not trained."""


class ProbeSettings(PresetModel):
    """How a linear head is fitted to the pooled features of a frozen backbone."""

    table: ClassVar[str] = "probe"
    preset: str = "default"

    long_side: Annotated[int, Field(ge=16)] | None
    """Long side, in pixels, at which features are pooled; smaller images are enlarged to it. Null
    pools at the image's own size, so that the maps need no second pass at scale 1."""
    mirror: bool
    """Whether the mirrored image is a second sample."""
    weight_decay: Annotated[float, Field(ge=0.0)]
    """L2 penalty: weight_decay / 2 times the squared norm of each row, beside its mean loss."""
    max_iterations: Annotated[int, Field(ge=1)]
    """Of L-BFGS on the whole set at once."""


class IrnSettings(PresetModel):
    """How IRN's boundaries are learnt and maps walked (specification of IRN, sections 3 to 8)."""

    table: ClassVar[str] = "irn"
    preset: str = "default"

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    learning_rate: Positive
    """Of the boundary branch; the displacement branch's is ``displacement_multiplier`` times it."""
    displacement_multiplier: Positive
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Of SGD."""
    weight_decay: Annotated[float, Field(ge=0.0)]
    """L2 on every trained weight."""
    power: Annotated[float, Field(ge=0.0)]
    """Of the poly schedule: lr (1 - t/T)^power, renewed every step."""
    crop: Annotated[int, Field(ge=16, multiple_of=4)]
    """Side of the square crop, in pixels."""
    scale: tuple[Positive, Positive]
    """Range from which each image's scale is drawn."""
    radius: Annotated[int, Field(ge=2)]
    """Pairs of the loss are nearer than it, in cells of 4 pixels."""
    displacement: bool
    """Whether the displacement branch is trained too; the boundaries do not hang on it."""
    walk_radius: Annotated[int, Field(ge=2)]
    """Pairs of the walk are nearer than it, in cells of 4 pixels."""
    beta: Positive
    """Power of the affinities in the walk."""
    exponent: Annotated[int, Field(ge=0, le=16)]
    """The walk has 2^exponent steps."""
    tolerance: Annotated[float, Field(ge=0.0)]
    """Error that terms left out of the walk's power may make; 0 leaves out none."""
    sharpness: Positive
    """Power of the maps before the walk."""
    foreground_threshold: Fraction
    """Labels of LPCAM: the CRF of the seeds at this threshold decides the foreground ..."""
    background_threshold: Fraction
    """... and that of the seeds at this one the background; between them pixels are ignored."""
    threshold: Fraction
    """Pseudo masks of LPCAM: foreground is above this part of the walked maps' joint maximum."""
    cam_foreground_threshold: Fraction
    """The same three for CAM."""
    cam_background_threshold: Fraction
    cam_threshold: Fraction

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale {list(self.scale)} must be a range: the smaller first")
        if self.crop <= 8 * (self.radius - 1):
            raise ValueError(
                f"crop {self.crop} has no pair at radius {self.radius}; it must be above "
                f"{8 * (self.radius - 1)}"
            )
        for high, low in (
            ("foreground_threshold", "background_threshold"),
            ("cam_foreground_threshold", "cam_background_threshold"),
        ):
            if getattr(self, high) < getattr(self, low):
                raise ValueError(f"{high} must not be below {low}")
        return self


class CrfSettings(PresetModel):
    """A dense CRF: unary energies, two kernels and mean field (specification of IRN, section 3)."""

    table: ClassVar[str] = "crf"
    preset: str = "irn"

    unary: Literal["labels", "probabilities"]
    """What the method gives to its CRF."""
    gt_prob: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Probability that a hard label is right."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Smallest probability of which the logarithm is taken."""
    gaussian_sxy: Positive
    """Standard deviation of the kernel of positions, in pixels."""
    gaussian_weight: Annotated[float, Field(ge=0.0)]
    """Potts weight of it; 0 leaves it out."""
    bilateral_sxy: Positive
    """Standard deviation of the positions in the kernel of positions and colours, in pixels."""
    bilateral_srgb: Positive
    """Standard deviation of the colours in it, in levels of [0, 255]."""
    bilateral_weight: Annotated[float, Field(ge=0.0)]
    """Potts weight of it; 0 leaves it out."""
    iterations: Annotated[int, Field(ge=0)]
    """Of mean field."""


class PamrSettings(PresetModel):
    """Pixel-adaptive mask refinement (Araslanov and Roth 2020)."""

    table: ClassVar[str] = "pamr"
    preset: str = "default"

    dilations: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    """Of the 3 x 3 neighbourhoods, in pixels."""
    width: Positive
    """Of the affinity kernel, in local standard deviations of the image."""
    iterations: Annotated[int, Field(ge=0)]
    """How often every pixel becomes the weighted mean of its neighbours."""


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


class AmnSettings(PresetModel):
    """AMN: a per-pixel classifier told the image's labels (specification of AMN)."""

    table: ClassVar[str] = "amn"
    preset: str = "default"

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    learning_rate: Positive
    """Of the backbone, by Adam, without a schedule ..."""
    head_learning_rate: Positive
    """... and of the head and the label conditioning."""
    weight_decay: Annotated[float, Field(ge=0.0)]
    """L2, within Adam."""
    freeze: tuple[str, ...]
    """Prefixes of the backbone's parameter names that are not trained."""
    scale: tuple[Positive, Positive]
    """Range from which each image's scale is drawn."""
    crop: Annotated[int, Field(ge=16)]
    """Side of the square crop, in pixels."""
    smoothing: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Part of the target that is shared among the other labels (section 3, epsilon)."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Of the features' elements, in training alone."""
    dilations: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    """Of the head's parallel 3 x 3 convolutions."""
    foreground_threshold: Fraction
    """The teacher's labels, of LPCAM: as those of IRN's labels ..."""
    background_threshold: Fraction
    """... and of the background."""
    cam_foreground_threshold: Fraction
    """The same two for CAM."""
    cam_background_threshold: Fraction
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """At which each image is mapped; the logits are averaged."""
    flip: bool
    """Whether the mirrored image is mapped too."""
    gate: bool
    """Where the teacher says background, probabilities are not stretched to [0, 1] (section 4)."""
    reading: Literal["teacher", "features"]
    """Where LPCAM enters (section 5). ``teacher``: its labels train AMN (Reading A). ``features``:
    prototypes of AMN's own features map the image, AMN being taught by CAM (Reading B)."""
    conditioned: bool
    """Reading B: whether its features are those after the label conditioning."""
    threshold: Fraction
    """Fixed threshold of the seeds of its maps."""


class MctformerSettings(PresetModel):
    """MCTformer: a vision transformer with a token for each class (specification of MCTformer)."""

    table: ClassVar[str] = "mctformer"
    preset: str = "default"

    version: Literal["v1", "v2"]
    """``v1``: class tokens alone. ``v2``: and PatchCAM, a convolution on the patch tokens."""
    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    learning_rate: Positive
    """Of AdamW after the warm-up."""
    warmup_epochs: Annotated[int, Field(ge=0)]
    warmup_learning_rate: Annotated[float, Field(ge=0.0)]
    """From which the rate rises ..."""
    floor_learning_rate: Annotated[float, Field(ge=0.0)]
    """... and to which it falls by a half cosine."""
    weight_decay: Annotated[float, Field(ge=0.0)]
    """Of weights with two dimensions or more; not of tokens, positions, biases and norms."""
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Stochastic depth of the last block; it rises linearly from 0."""
    crop: Annotated[int, Field(ge=16)]
    """Side, in pixels, of the image in training."""
    augmentation: str | None
    """timm's policy of RandAugment; null has none."""
    erasing: Fraction
    """Probability that a random rectangle is erased."""
    pooling: Literal["mean", "ranked"]
    """How PatchCAM becomes a score; ``ranked`` weighs sorted values by ``ranking_decay`` to the
    power of their rank (MCTformer+)."""
    ranking_decay: Annotated[float, Field(gt=0.0, le=1.0)]
    contrast: Annotated[float, Field(ge=0.0)]
    """Weight of the loss that keeps class tokens apart (MCTformer+); 0 leaves it out."""
    attention_blocks: Annotated[int, Field(ge=1)]
    """The last so many blocks give the attention of classes to patches."""
    fusion: Literal["product", "square_root"]
    """Of that attention and PatchCAM; ``square_root`` is MCTformer+'s."""
    affinity: bool
    """Whether the fused map is refined by the attention of patches to patches; of a transformer
    that has learnt little it says nothing."""
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """At which each image is mapped; the maps are summed."""
    flip: bool
    """Whether the mirrored image is mapped too."""
    split_maps: Literal["refined", "patch"]
    """Which map splits foreground from context for the prototypes: the refined one, or PatchCAM."""
    threshold: Fraction
    """Fixed threshold of the seeds of its maps."""


class EdamSettings(PresetModel):
    """EDAM's network: class masks, and attention over pairs of images (specification of EDAM)."""

    table: ClassVar[str] = "edam"
    preset: str = "default"

    iterations: Annotated[int, Field(ge=1)]
    """Steps of SGD."""
    pairs: Annotated[int, Field(ge=1)]
    """Pairs of images with a common class, a step."""
    learning_rate: Positive
    """Of the backbone and the transformers."""
    head_multiplier: Positive
    """Of the new convolutions."""
    bias_multiplier: Positive
    """Of biases, on top of it; they have no weight decay."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)]
    weight_decay: Annotated[float, Field(ge=0.0)]
    power: Annotated[float, Field(ge=0.0)]
    """Of the poly schedule: lr (1 - t/T)^power."""
    warmup: Annotated[int, Field(ge=0)]
    """Steps over which the rate rises linearly, from ``warmup_factor`` of it."""
    warmup_factor: Fraction
    freeze: tuple[str, ...]
    """Prefixes of the backbone's parameter names that are not trained."""
    long_side: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    """Inclusive range, in pixels, from which each image's long side is drawn."""
    crop: Annotated[int, Field(ge=16)]
    """Side of the square crop, in pixels; it fixes the table of positions."""
    jitter: tuple[Fraction, Fraction, Fraction, Annotated[float, Field(ge=0.0, le=0.5)]]
    """Brightness, contrast, saturation and hue."""
    width: Annotated[int, Field(ge=2)]
    """Of the tokens; their norm needs two values."""
    heads: Annotated[int, Field(ge=1)]
    hidden: Annotated[int, Field(ge=1)]
    """Of the transformers' feed-forward part."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """At which each image is mapped; the maps are summed."""
    flip: bool
    """Whether the mirrored image is mapped too."""
    threshold: Fraction
    """Fixed threshold of the seeds of its maps."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.long_side[0] > self.long_side[1]:
            raise ValueError(f"long_side {list(self.long_side)} must be a range: the smaller first")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self


class SaliencySettings(PresetModel):
    """Fusion of maps with a saliency map (specification of EDAM, section 4)."""

    table: ClassVar[str] = "saliency"
    preset: str = "edam"

    theta: Annotated[float, Field(ge=0.0, le=2.55)]
    """A pixel is salient above the grey level 100 theta of 255."""
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)]
    """A class below it never wins ..."""
    beta: Annotated[float, Field(gt=0.0, lt=1.0)]
    """... and one above it wins even where nothing is salient."""
    crf: bool
    """Whether a dense CRF comes first; alpha and beta must fit."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.alpha >= self.beta:
            raise ValueError(f"alpha {self.alpha} must be below beta {self.beta}")
        return self


class PsaSettings(PresetModel):
    """PSA's affinities and random walk (specification of MCTformer, section 4)."""

    table: ClassVar[str] = "psa"
    preset: str = "default"

    low_alpha: Positive
    """Power of the background's score (1 - the highest map) for the sure foreground ..."""
    high_alpha: Positive
    """... and for the sure background."""
    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    learning_rate: Positive
    """Of the backbone; new layers have ``head_multiplier`` times it."""
    head_multiplier: Positive
    bias_multiplier: Positive
    """Of biases, on top of it; they have no weight decay."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)]
    weight_decay: Annotated[float, Field(ge=0.0)]
    power: Annotated[float, Field(ge=0.0)]
    """Of the poly schedule: lr (1 - t/T)^power."""
    freeze: tuple[str, ...]
    """Prefixes of the backbone's parameter names that are not trained."""
    crop: Annotated[int, Field(ge=16, multiple_of=8)]
    """Side of the square crop, in pixels."""
    jitter: tuple[Fraction, Fraction, Fraction, Annotated[float, Field(ge=0.0, le=0.5)]]
    """Brightness, contrast, saturation and hue."""
    radius: Annotated[int, Field(ge=2)]
    """Pairs of the loss and the walk are nearer than it, in cells of 8 pixels."""
    beta: Positive
    """Power of the affinities in the walk."""
    exponent: Annotated[int, Field(ge=0, le=16)]
    """The walk has 2^exponent steps."""
    tolerance: Annotated[float, Field(ge=0.0)]
    """Error that terms left out of the walk's power may make; 0 leaves out none."""
    threshold: Fraction
    """The background's constant score, which walks too."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.crop <= 16 * (self.radius - 1):
            raise ValueError(
                f"crop {self.crop} has no pair at radius {self.radius}; it must be above "
                f"{16 * (self.radius - 1)}"
            )
        return self
