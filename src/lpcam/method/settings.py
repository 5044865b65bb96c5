"""Settings of LPCAM: how prototypes are fitted, how maps are made, how seeds are cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, model_serializer, model_validator

from lpcam.method.clustering import CLUSTERINGS, CenterKind, Init, ToleranceKind
from lpcam.method.functional import Similarity
from lpcam.runtime.errors import RecipeError
from lpcam.runtime.settings import Fraction, Positive, PresetModel, RecipePath, Section

Method = Literal["CAM", "LPCAM-F", "LPCAM", "LPCAM-E"]
"""The maps that a run makes of its own classifier; LPCAM-E if it looks at early layers."""
Weights = Literal["equal", "size", "score", "top", "ridge"]
"""How the prototypes of a class and side are weighted in its vector."""
METHODS: tuple[Method, ...] = ("CAM", "LPCAM-F", "LPCAM", "LPCAM-E")
AUTO = "auto"
AUTOMATIC = ("tau", "clusters", "mu_f", "mu_b", "scales", "threshold", "cam_threshold")
"""Values of :class:`LpcamSettings` that may be ``auto``."""
FALLBACK = "frozen"  #: Preset whose values hold until a run has measured those that are ``auto``.


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
    weights: Weights
    """Weight of a prototype among those of its class and side: all alike, by the number of its
    local features, by the classifier's certainty (the score, or 1 - score in the context), alike
    for the third (top) of the largest certainty, or learnt to resemble CAM (ridge)."""
    similarity: Similarity
    """What features are compared with prototypes by. Others than cosine are for experiments: only
    the maps and scores of a run take them."""

    def cosine_only(self) -> Self:
        """These settings; RecipeError if their similarity is not cosine."""
        if self.similarity != "cosine":
            raise RecipeError(
                f"lpcam.similarity is {self.similarity!r}, which only the maps and scores of a run "
                "take; everything else needs 'cosine': set it, and run again"
            )
        return self


class SeedSettings(Section):
    """How seed masks are cut from maps."""

    threshold: Fraction
    """Threshold of the LPCAM and LPCAM-F seed masks; a higher one marks fewer pixels."""
    cam_threshold: Fraction
    """Threshold of the CAM seed masks; a higher one marks fewer pixels."""


class EarlySettings(Section):
    """How early layers of the backbone sharpen maps (docs/adaptive.md)."""

    base: Literal["auto", "CAM", "LPCAM"] = "auto"
    """Maps that the early layers start from. Auto: those that the judge prefers."""
    fusion: Literal["auto", "none", "fused", "alone"] = "auto"
    """How they are used: not at all, multiplied with the base, or alone. Auto: the judge's."""
    rounds: Annotated[int, Field(ge=1, le=5)] = 2
    """Number of times that places are split by the sharper map and clustered anew."""
    clusters: Annotated[int, Field(ge=1)] = 36
    """Number of clusters of each class, side and layer."""
    nearest: Annotated[int, Field(ge=1)] = 8
    """Number of nearest centres of a side whose cosines are averaged at a place."""
    foreground: Fraction = 0.6
    """Places above this share of a map's largest cell are foreground."""
    context: Fraction = 0.35
    """Places where the largest map is below this value are context."""
    places: Annotated[int, Field(ge=1)] = 60
    """Maximum number of sampled places of each image, class and side."""
    images: Annotated[int, Field(ge=1)] = 200
    """Number of images that are clustered and judged, or 25 for each class if that is more."""


class NegativeSettings(Section):
    """How images without a class reject its foreground prototypes (docs/adaptive.md)."""

    margin: Fraction = 0.4
    """Prototypes whose margin is below this share of their class's largest one are dropped. The
    margin is the best cosine in an image with the class minus that in one without, in the mean."""
    keep: Fraction = 0.5
    """Share of a class's prototypes, those of the largest margins, that always stay."""
    hardest: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Share of the images of data.negatives, the most similar to each prototype, that count."""
    reject_by: Literal["none", "folder", "all"] = "none"
    """Images that reject: none, those of data.negatives, or also those of the data set without a
    label. The fire rates of the report are measured on both in any case."""


class LpcamSettings(SeedSettings, MappingSettings, FittingSettings, PresetModel):
    """All settings of LPCAM. Functions that need only some take the part that they read.

    A value of `AUTOMATIC` may be given as ``auto``; the field then has the value of `FALLBACK`.
    """

    table: ClassVar[str] = "lpcam"
    preset: str = "voc12.official"
    early: EarlySettings | None
    """Early layers of the backbone, for the maps LPCAM-E; null: none."""
    negatives: NegativeSettings | None
    """Compare prototypes with images without their class; null: do not."""
    choices: RecipePath | None
    """File of choices about the prototypes, such as prototypes.yaml of a report; null: none."""
    _automatic: frozenset[str] = PrivateAttr(default=frozenset())

    @model_validator(mode="wrap")
    @classmethod
    def _take_auto(cls, given: Any, handler: Callable[[Any], Self]) -> Self:
        if not isinstance(given, Mapping):
            return handler(given)
        name = given.get("preset", cls.model_fields["preset"].default)
        own = cls.preset_values(name) if name in cls.preset_names() else {}
        values = {**own, **given}
        automatic = [key for key in AUTOMATIC if values.get(key) == AUTO]
        known = {key: cls.preset_values(FALLBACK)[key] for key in automatic}
        made = handler({**given, **known})
        made._automatic = frozenset(automatic)
        return made

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        unit = self.clustering == "cosine_kmeans" and self.centers == "unit"
        if self.similarity != "cosine" and (unit or self.weights == "ridge"):
            raise ValueError(
                f"similarity {self.similarity} needs the lengths of prototypes, got centers "
                f"{self.centers} and weights {self.weights}; set centers mean, and not ridge"
            )
        return self

    @model_serializer(mode="wrap")
    def _say_auto(self, handler: Callable[[Self], dict[str, Any]]) -> dict[str, Any]:
        return {k: AUTO if k in self._automatic else v for k, v in handler(self).items()}

    @property
    def published(self) -> bool:
        """Whether the preset is that of the paper or its program, whose figures are compared."""
        return self.preset.rpartition(".")[2] in ("paper", "official")

    @property
    def automatic(self) -> frozenset[str]:
        """Names of the values that are ``auto``, which a run chooses."""
        return self._automatic

    @property
    def corrected(self) -> bool:
        """Whether prototypes are used otherwise than they were fitted."""
        return self.choices is not None or self.weights != "equal"

    def fixed(self, **values: Any) -> Self:
        """These settings with values, which are no longer ``auto``."""
        made = self.model_copy(update=values)
        made._automatic = self._automatic - values.keys()
        return made

    @property
    def fitting(self) -> dict[str, Any]:
        """How prototypes are fitted, as JSON, for cache keys."""
        return self.model_dump(mode="json", include=set(FittingSettings.model_fields))
