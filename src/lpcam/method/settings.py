"""Settings of LPCAM: how prototypes are fitted, how maps are made, how seeds are cut."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lpcam.method.clustering import CLUSTERINGS, CenterKind, Init, ToleranceKind
from lpcam.runtime.settings import Fraction, Positive, PresetModel, Section

Method = Literal["CAM", "LPCAM-F", "LPCAM"]  #: The maps that a run makes of its own classifier.
METHODS: tuple[Method, ...] = ("CAM", "LPCAM-F", "LPCAM")


class FittingSettings(Section):
    """How prototypes are fitted (specification of LPCAM, sections 1 and 3)."""

    clustering: str
    """Name of a clustering method."""
    clusters: Annotated[int, Field(ge=1)]
    """K, the number of clusters of each class and side. More clusters follow rarer features."""
    restarts: Annotated[int, Field(ge=1)]
    """Number of clusterings from different starts whose prototypes are used together."""
    tau: Fraction
    """CAM threshold of foreground against context (eq. 2); a higher one gives less foreground."""
    tau_inclusive: bool
    """True: foreground is CAM >= tau (eq. 2). False: CAM > tau, and CAM = tau is left out."""
    split_maps: Literal["multi_scale", "single_scale"]
    """CAM that decides the split: summed over all scales, or of scale 1 only."""
    split_resize: Literal["nearest", "bilinear"]
    """How a multi-scale CAM at image size is resized to the feature grid."""
    mu_f: Fraction
    """Foreground centres with a score above this become class prototypes (eq. 3)."""
    mu_b: Fraction
    """Context centres with a score below this become context prototypes (eq. 4)."""
    context_lower: Fraction | None
    """Lower bound of the score of context prototypes; null: none."""
    images_per_class: Annotated[int, Field(ge=1)] | None
    """Number of images drawn for clustering in each class; null takes the whole list."""
    images_with_replacement: bool
    """Whether an image may be drawn more than once; its features then count as often."""
    max_features: Annotated[int, Field(ge=1)] | None
    """Maximum number of sampled features of each class and side; null keeps all."""
    init: Init
    """First centres: K distinct random features, or spread ones (k-means++)."""
    centers: CenterKind
    """Centre of a cluster. ``mean``: mean of its members; ``unit``: of its normalised members."""
    tolerance: Positive
    """Change below which k-means stops; a larger one stops earlier."""
    tolerance_kind: ToleranceKind
    """Change: squared sum of centre shifts (``absolute``) or objective gain (``relative``)."""
    max_iterations: Annotated[int, Field(ge=1)]
    """Maximum number of k-means iterations; reaching it gives a warning."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.clustering not in CLUSTERINGS:
            known = ", ".join(CLUSTERINGS)
            raise ValueError(f"there is no clustering {self.clustering!r}; there are {known}")
        if self.context_lower is not None and self.context_lower >= self.mu_b:
            raise ValueError(
                f"context_lower {self.context_lower} must be below mu_b {self.mu_b}, "
                "or no context prototype could be kept"
            )
        return self


class MappingSettings(Section):
    """How maps are made (specification of LPCAM, section 4)."""

    scales: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Scales at which each image is mapped; the maps are summed. More scales take more time."""
    flip: bool
    """Whether the mirrored image is mapped too."""
    cam_epsilon: Annotated[float, Field(ge=0.0)]
    """Constant added to the maximum by which a CAM is divided."""


class SeedSettings(Section):
    """How seed masks are cut from maps."""

    threshold: Fraction
    """Threshold of the LPCAM and LPCAM-F seed masks; a higher one marks fewer pixels."""
    cam_threshold: Fraction
    """Threshold of the CAM seed masks; a higher one marks fewer pixels."""


class LpcamSettings(SeedSettings, MappingSettings, FittingSettings, PresetModel):
    """All settings of LPCAM. Functions that need only some take the part that they read."""

    table: ClassVar[str] = "lpcam"
    preset: str = "voc12.official"

    @property
    def fitting(self) -> FittingSettings:
        """How prototypes are fitted."""
        return FittingSettings(**self.model_dump(include=set(FittingSettings.model_fields)))
