"""Interface of refinements, which turn maps into pseudo masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from lpcam.classifiers.classifier import Classifier
from lpcam.classifiers.settings import BackboneSection
from lpcam.data.dataset import ClassTable, Item
from lpcam.data.map_files import MapFile
from lpcam.runtime.distributed import Sharing
from lpcam.runtime.errors import DataError
from lpcam.runtime.registry import Registry
from lpcam.runtime.settings import TrainedSection
from lpcam.training.loop import History
from lpcam.training.released import Released

DECIDED = 0.5  #: Threshold of maps p / (p + p of the background): above it the class is likelier.
Accelerate = Callable[[nn.Module, Callable[[Tensor], Any]], nn.Module]
Labelled = Sequence[tuple[Item, Path]]  #: Images and the files of their labels.


@dataclass(frozen=True)
class Source:
    """Maps that are refined."""

    method: str  #: Name of their rows, such as ``LPCAM`` or ``AMN+LPCAM``.
    name: str  #: Name of their folders.
    folder: Path
    key: str  #: Cache key of the result that holds them.
    seed_threshold: float  #: Threshold of their seeds.
    shift: float = 0.0
    """What an automatic threshold is above the fixed one that the presets of refinements suppose;
    theirs move with it."""


@dataclass(frozen=True)
class Picture:
    """One image that is refined, and its maps."""

    item: Item
    maps: MapFile
    image: Tensor  #: (H, W, 3) uint8 RGB, at the size of refinement.
    planes: Tensor  #: (K, H, W) maps at that size.
    shared: dict[str, Any] = field(default_factory=dict)
    """What refinements compute from the image alone, for all of its kinds of maps."""


@dataclass(frozen=True)
class Tools:
    """Resources of a run that its refinement uses."""

    device: torch.device
    classes: ClassTable
    backbone: BackboneSection  #: The classifier's backbone.
    classifier: Callable[[], Classifier]
    """Returns the trained classifier, or its first weights where maps are another program's."""
    untrained: Callable[[], Classifier]
    """Returns a classifier with random weights, to validate what is built on it."""
    seed: int
    items: Sequence[Item]  #: All images that are refined.
    sharing: Sharing
    memory: int | None  #: Memory that one image may use, in bytes; None: no limit is known.
    saliency: Path | Literal["computed"] | None  #: The recipe's data.saliency.
    accelerate: Accelerate = lambda network, _: network
    """Returns what runs a frozen network, or what a function makes of images with it, by the run's
    engine."""


@dataclass(frozen=True)
class Job:
    """One kind of maps to refine, with the recipe's section and the run's resources."""

    section: RefineSection
    source: Source
    tools: Tools

    @property
    def settings(self) -> Any:
        """Settings of the refinement."""
        return self.section.settings


WriteLabels = Callable[[Sequence[Picture], Sequence[Path]], None]
"""Writes the labels of one image, a file for each kind of maps."""
Refine = Callable[[Picture], Tensor | tuple[Tensor, Tensor]]
"""Returns the refined maps (K, H, W) of a picture, or those at stride 4 (K, h, w) and these."""


class RefineSection(TrainedSection):
    """Refinement of maps to the pseudo masks that segmenters are trained on."""

    method: str = "irn"
    """Name of a refinement."""
    maps: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Which maps are refined. Null: the host's, or CAM and LPCAM without a host."""

    @property
    def settings(self) -> Any:
        """Settings of the chosen refinement; None if it has none."""
        return getattr(self, self.method, None)

    @property
    def refinement(self) -> Refinement:
        """The chosen refinement."""
        return REFINEMENTS[self.method]

    @property
    def label_crf(self) -> Any:
        """Settings of the dense CRF that cleans seeds: those of the method ``crf``."""
        return getattr(self, "crf")  # noqa: B009 - a field that the registry adds

    def title(self, method: str) -> str:
        """Name of the rows of refined maps, such as ``LPCAM + IRN``."""
        return f"{method} + {self.refinement.title}"

    @model_validator(mode="after")
    def _check(self) -> RefineSection:
        if self.method not in REFINEMENTS:
            known = ", ".join(REFINEMENTS)
            raise ValueError(f"there is no refinement {self.method!r}; there are {known}")
        self.refinement.check(self)
        return self


class Refinement(ABC):
    """A method that turns maps into pseudo masks: one object in :data:`REFINEMENTS`."""

    title: ClassVar[str]  #: Name in rows and messages.
    settings: ClassVar[type[BaseModel] | None] = None  #: Class of its settings, if it has any.
    uses_saliency: ClassVar[bool] = False  #: Whether it needs saliency maps (data.saliency).
    crf_place: ClassVar[str | Literal[False]] = False
    """Step that uses a dense CRF, for the protocol of scores; False: none."""
    judged: ClassVar[bool] = False
    """Whether a threshold of its maps has to be chosen, and can be by the judge."""
    every_image: ClassVar[bool] = False
    """Whether images without a class are refined too, because they need further files."""

    def check(self, section: RefineSection) -> None:
        """Raise a ValueError if the section does not fit the refinement."""

    def validate(self, section: RefineSection, tools: Tools) -> None:
        """Raise an LpcamError, before any stage runs, if something is missing or does not fit."""

    def crf_use(self, section: RefineSection) -> str | Literal[False]:
        """Step that uses a dense CRF with these settings, in words; False: none."""
        return self.crf_place

    def threshold(self, section: RefineSection, source: Source) -> float:
        """Threshold of the refined maps: foreground is above it."""
        return DECIDED

    def key(self, job: Job) -> Mapping[str, Any]:
        """Everything beside the maps that the refined maps depend on, as JSON."""
        values = job.section.model_dump(mode="json").get(job.section.method) or {}
        own = {name: value for name, value in values.items() if name != "preset"}
        return {"settings": own, "seed_threshold": job.source.seed_threshold}

    def described(self, section: RefineSection, tools: Tools) -> dict[str, Any]:
        """The refinement and its settings, for the protocol of scores."""
        return section.model_dump(mode="json", include={"method", section.method})

    @abstractmethod
    def refiner(self, job: Job, network: Path, folder: Path) -> Refine:
        """Return a function that refines pictures; it may write further files into the folder."""


class LearnedRefinement(Refinement):
    """A refinement with a network that learns from labels made of the maps."""

    starts_from: ClassVar[Literal["backbone", "classifier"]] = "backbone"
    """Initial weights of the network: the backbone's first ones, or the classifier's."""
    revision: ClassVar[int] = 2  #: Version of the training, for the network's cache key.
    network_settings: ClassVar[Set[str]]
    """Names of the settings that the network depends on, beside its labels."""
    map_settings: ClassVar[Set[str]]
    """Names of the settings that the refined maps depend on, beside the network."""

    def key(self, job: Job) -> Mapping[str, Any]:
        """Everything beside maps and network that the refined maps depend on, as JSON."""
        return {"settings": job.settings.model_dump(mode="json", include=self.map_settings)}

    def label_path(self, folder: Path, image_id: str) -> Path:
        """The file of an image's labels."""
        return folder / f"{image_id}.png"

    @abstractmethod
    def label_key(self, job: Job) -> Mapping[str, Any]:
        """Everything beside the maps that the labels depend on, as JSON."""

    @abstractmethod
    def labeller(self, jobs: Sequence[Job]) -> WriteLabels:
        """Return a function that writes the labels of an image for the maps of each job."""

    def released(self) -> Sequence[Released]:
        """The files of released programs that hold this network."""
        return ()

    @abstractmethod
    def build(self, section: RefineSection, tools: Tools) -> Any:
        """Return the untrained network, on the run's device."""

    @abstractmethod
    def train(
        self, network: Any, labelled: Labelled, section: RefineSection, **options: Any
    ) -> History:
        """Train the network in place on labels; ``options`` as ``TrainingOptions``."""


def shifted(threshold: float, shift: float) -> float:
    """A threshold that moves with that of the seeds, within [0.01, 0.99]."""
    return round(min(0.99, max(0.01, threshold + shift)), 6) if shift else threshold


def decided(scores: Tensor) -> Tensor:
    """Turn scores (K + 1, H, W), background first, into maps p / (p + p of it), cut at `DECIDED`.

    Only the most probable class of a pixel has a value: near 1, rounding would choose one.
    """
    classes, background = scores[1:], scores[:1]
    full = classes / (classes + background).clamp_min(torch.finfo(scores.dtype).tiny)
    return torch.where(classes == classes.amax(0), full, 0)


def check_label_crf(section: RefineSection) -> None:
    """Raise a ValueError if the section's CRF does not take the hard labels of seeds."""
    crf = section.label_crf
    if crf.unary != "labels":
        raise ValueError(
            f"crf.unary is {crf.unary!r} (preset {crf.preset!r}), but the CRF gets the hard labels "
            "of seeds here; use the preset 'irn', or set crf.unary to labels"
        )


REFINEMENTS: Registry[Refinement] = Registry(
    "refinement",
    "lpcam.refinements",
    {
        "auto": "lpcam.refine.auto:AUTO",
        "irn": "lpcam.refine.irn:REFINEMENT",
        "crf": "lpcam.refine.crf:REFINEMENT",
        "psa": "lpcam.refine.psa:REFINEMENT",
        "saliency": "lpcam.refine.saliency_fusion:REFINEMENT",
        "none": "lpcam.refine.auto:NONE",
    },
)


def check_image(image: Tensor) -> None:
    """Raise a DataError if an image is not (H, W, 3) uint8, or has no pixels."""
    if image.dtype is not torch.uint8 or image.shape[2:] != (3,) or not image.numel():
        raise DataError(
            f"the image is {image.dtype} {tuple(image.shape)}; expected RGB, uint8 of the shape "
            "(height, width, 3), not normalised"
        )


def check_image_and_maps(image: Tensor, maps: Tensor, name: str) -> None:
    """Raise a DataError naming the maps if they are no finite floats (..., n, H, W) of an image."""
    check_image(image)
    fit = maps.dim() >= 3 and image.shape == (*maps.shape[-2:], 3)
    if not (fit and maps.is_floating_point() and maps.isfinite().all()):
        raise DataError(
            f"the {name} are {maps.dtype} {tuple(maps.shape)} and the image {tuple(image.shape)}; "
            "expected floating-point numbers (..., labels, height, width) of the image's size, "
            "without NaN or Inf"
        )


def compute_dtype(values: Tensor) -> torch.dtype:
    """Return float64 for float64 values and float32 for every shorter type."""
    return torch.float64 if values.dtype is torch.float64 else torch.float32
