"""Hosts: methods with a network of their own, whose maps build on CAM or on LPCAM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar, Unpack, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from lpcam.classifiers.classifier import RANDOM, BackboneSpec, Classifier, Preprocessing
from lpcam.classifiers.features import all_finite
from lpcam.classifiers.settings import BackboneSection
from lpcam.data.dataset import ClassTable, Item
from lpcam.method.functional import FusedMaps
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.errors import ClassifierError
from lpcam.runtime.registry import Registry
from lpcam.runtime.settings import Fraction, Positive, PresetModel, TrainedSection
from lpcam.training.loop import History, TrainingOptions
from lpcam.training.released import Released
from lpcam.training.saved_network import SavedNetwork, shallow_copy

Base = Literal["CAM", "LPCAM"]


def folder_name(method: str) -> str:
    """Name of a method's folders: ``amn_lpcam`` for ``AMN+LPCAM``."""
    return method.lower().replace("-", "_").replace("+", "_")


@dataclass(frozen=True)
class Arm:
    """A kind of maps that a host makes."""

    title: str  #: Name of its rows, such as ``AMN+LPCAM``.
    base: Base  #: What it builds on.
    network: str  #: Name of the network that makes it; arms may share one.
    prototypes: bool = False
    """Whether its maps come from prototypes of the network's own features."""

    @property
    def folder(self) -> str:
        return folder_name(self.title)


@dataclass(frozen=True)
class HostData:
    """Training data of a host's network."""

    images: Sequence[Item]  #: Images that train it.
    held_out: Sequence[Item]  #: Images on which it is measured during training.
    masks: Sequence[tuple[Item, Path]]
    """Ternary masks of the images, for hosts that learn from masks."""
    classes: ClassTable


@dataclass(frozen=True)
class View:
    """One image as a host maps it."""

    image: NDArray[np.uint8]  #: (H, W, 3) RGB.
    labels: tuple[int, ...]  #: Class indices of its K image-level labels.
    mask: Tensor | None
    """(H, W) int64 ternary mask that the network learnt from; None for hosts without masks."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        height, width = self.image.shape[:2]
        return height, width


class HostSettings(PresetModel):
    """Settings of a host."""

    threshold: float
    """Threshold of the seed masks; a higher one marks fewer pixels as foreground."""


class ScaledSettings(HostSettings):
    """Settings of a host that maps an image at several scales."""

    scales: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Scales at which each image is mapped; their results are joined. More take more time."""
    flip: bool
    """Whether the mirrored image is mapped too."""
    threshold: Fraction
    """Threshold of the seed masks; a higher one marks fewer pixels as foreground."""


class HostSection(BackboneSection, TrainedSection):
    """Host: a method with its own network that improves the maps."""

    method: str
    """Name of a host."""
    maps: Annotated[tuple[Base, ...], Field(min_length=1)] | None = None
    """Which maps the host builds on; it makes its own maps from each. Null: both."""
    backbone: str | None = None
    """Name of a timm model; null takes the classifier's backbone, weights and preprocessing."""
    weights: str = "pretrained"
    """Weights: "pretrained" (timm's), "random", or the path of a safetensors file."""
    lpcam: LpcamSettings | None = None
    """Clustering of the host's own features; required if the host clusters them."""

    @property
    def settings(self) -> Any:
        return getattr(self, self.method)

    @property
    def host(self) -> Host[Any, Any]:
        return HOSTS[self.method]

    @property
    def arms(self) -> list[Arm]:
        return self.host.arms(self)

    @property
    def clusters(self) -> bool:
        return any(arm.prototypes for arm in self.arms)

    @model_validator(mode="after")
    def _check(self) -> HostSection:
        if self.method not in HOSTS:
            raise ValueError(f"there is no host {self.method!r}; there are {', '.join(HOSTS)}")
        if self.maps is not None and len(set(self.maps)) != len(self.maps):
            raise ValueError(f"host.maps {list(self.maps)} repeats an entry")
        if self.backbone is None:
            fields = type(self).model_fields
            for name in ("arguments", "output_stride", "dilated", "weights", "mean", "std"):
                if getattr(self, name) != fields[name].get_default(call_default_factory=True):
                    raise ValueError(
                        f"host.{name} belongs to host.backbone, which is not given; without one "
                        "the host has the classifier's backbone, weights and preprocessing"
                    )
        self.host.check(self)
        if self.clusters and self.lpcam is None:
            raise ValueError(
                "host.lpcam must say how the host's own features are clustered; give it a preset, "
                "e.g. mctformer.voc12 or amn.voc12"
            )
        return self


S = TypeVar("S", bound=HostSettings)
N = TypeVar("N", bound=SavedNetwork)


class Host(ABC, Generic[S, N]):
    """A method with a network of its own; S is the type of its settings, N of its network.

    The stages of a run call it in this order: ``arms``, ``build``, ``images_per_step``, ``train``,
    ``load``, ``scorer`` and ``local_features`` (where an arm has prototypes), and ``maps``.
    """

    title: str  #: Name in rows and messages.
    settings: type[S]
    network: type[N]
    holds_out: bool = False  #: Whether it is measured on held-out images while it trains.
    states_threshold: bool = True
    """Whether a source states a fixed threshold of its seeds, at which they are scored."""
    map_fields: frozenset[str] = frozenset()  #: Settings that change its maps and not its network.
    prototype_fields: frozenset[str] = frozenset()
    """Settings that change only maps from prototypes of its own features."""
    mask_fields: frozenset[str] = frozenset()
    """Settings that change only the masks that it learns from."""

    def check(self, section: HostSection) -> None:
        """Raise a ValueError that names the key, if a section does not fit the host."""

    def arms(self, section: HostSection) -> list[Arm]:
        """The maps that a section asks for; by default one network serves CAM and LPCAM."""
        titles = {"CAM": self.title, "LPCAM": f"{self.title}+LPCAM"}
        return [
            Arm(titles[base], base, section.method, prototypes=base == "LPCAM")
            for base in section.maps or ("CAM", "LPCAM")
        ]

    def mask_thresholds(self, settings: S, base: Base) -> tuple[float, float] | None:
        """Thresholds (foreground, background) of the masks to learn from; None: it uses none."""
        return None

    @abstractmethod
    def build(self, backbone: BackboneSpec, names: Sequence[str], settings: S, **first: Any) -> N:
        """The untrained network; ``first`` are ``weights``, ``mean``, ``std`` and ``seed``."""

    def released(self) -> Sequence[Released]:
        """The files of released programs that hold this network."""
        return ()

    def official(self, backbone: BackboneSpec, **changes: Any) -> Callable[[Sequence[str]], N]:
        """A function from class names to the official preset's network with random weights."""
        settings = self.settings.from_preset("official", **changes)
        return lambda names: self.build(backbone, names, settings, weights=RANDOM)

    @abstractmethod
    def images_per_step(self, network: N, data: HostData, settings: S) -> tuple[int, str]:
        """Least images, or pairs, in a step and the setting for it; refuses unfit settings."""

    @abstractmethod
    def train(
        self, network: N, data: HostData, settings: S, **options: Unpack[TrainingOptions]
    ) -> History:
        """Train the network in place and return its history."""

    def load(self, path: Path, device: torch.device) -> N:
        """A trained network from its file, for inference."""
        return cast(N, self.network.load(path).to(device).eval().folded())

    def local_features(self, network: N, view: View, settings: S) -> tuple[Tensor, Tensor]:
        """Features (C, h, w) of an image, and the maps (K, H, W) that split them (eq. 2)."""
        raise ClassifierError(f"{self.title} has no prototypes of its own features")

    def scorer(self, network: N) -> tuple[Tensor, Tensor]:
        """Weight (N, C) and bias (N,) of the layer that scores the prototypes (eqs. 3 and 4)."""
        raise ClassifierError(f"{self.title} has no prototypes of its own features")

    @abstractmethod
    def maps(self, network: N, view: View, settings: S, vectors: Tensor | None) -> FusedMaps:
        """Maps of an image: ``cam`` (K, ceil(H/4), ceil(W/4)) and ``high_res`` (K, H, W).

        ``vectors`` (N, C) are prototypes of the host's own features; None for arms without.
        """

    def network_key(self, settings: S) -> Mapping[str, Any]:
        """The settings that change the network, as JSON, for its cache key."""
        other = {"preset", "threshold"} | self.map_fields | self.prototype_fields | self.mask_fields
        return settings.model_dump(mode="json", exclude=other)

    def maps_key(self, settings: S, arm: Arm) -> Mapping[str, Any]:
        """The settings that change the maps of an arm, as JSON, for their cache key."""
        used = self.map_fields | (self.prototype_fields if arm.prototypes else frozenset())
        return settings.model_dump(mode="json", include=set(used))


HOSTS: Registry[Host[Any, Any]] = Registry(
    "host",
    "lpcam.hosts",
    {
        "amn": "lpcam.hosts.amn:HOST",
        "mctformer": "lpcam.hosts.mctformer:HOST",
        "edam": "lpcam.hosts.edam:HOST",
    },
)


class HostNetwork(SavedNetwork):
    """A network on the backbone of a classifier, which is its attribute ``classifier``."""

    classifier: Classifier

    @property
    def preprocessing(self) -> Preprocessing:
        return self.classifier.preprocessing

    @property
    def device(self) -> torch.device:
        return self.classifier.device

    def folded(self) -> Self:
        """A copy for inference with a folded backbone; shares the rest, cannot be saved."""
        twin = shallow_copy(self)
        twin.classifier = self.classifier.folded()
        return twin


def check_finite(values: Tensor, source: str) -> None:
    """Raise a ClassifierError if a part of a network gave NaN or Inf for an image."""
    if not all_finite(values):
        raise ClassifierError(
            f"{source} gave NaN or Inf for this image; check the weights, the prototypes and the "
            "preprocessing, or train the network again"
        )
