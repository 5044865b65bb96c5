"""What a host is: a method with a network of its own, whose maps build on CAM or on LPCAM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from lpcam.classifiers.classifier import BackboneSpec
from lpcam.classifiers.features import all_finite
from lpcam.classifiers.settings import BackboneSection
from lpcam.data.dataset import ClassTable, Item
from lpcam.method.functional import FusedMaps, strided
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.errors import ClassifierError, DataError
from lpcam.runtime.registry import Registry
from lpcam.runtime.settings import PresetModel

Base = Literal["CAM", "LPCAM"]
History = list[dict[str, Any]]


def folder_name(method: str) -> str:
    """Name of a method's folders.

    Example:
        >>> folder_name("AMN+LPCAM")
        'amn_lpcam'
    """
    return method.lower().replace("-", "_").replace("+", "_")


@dataclass(frozen=True)
class Arm:
    """One kind of maps that a host makes."""

    title: str
    """Name of its rows, such as ``AMN+LPCAM``."""
    base: Base
    """What it builds on."""
    network: str
    """Name of the network that makes it; arms may share one."""
    prototypes: bool = False
    """Whether its maps come from prototypes of the network's own features."""

    @property
    def folder(self) -> str:
        """Name of its folders: ``amn_lpcam`` for ``AMN+LPCAM``."""
        return folder_name(self.title)


@dataclass(frozen=True)
class HostData:
    """What a host's network learns from."""

    images: Sequence[Item]
    """Images that train it."""
    held_out: Sequence[Item]
    """Images on which it is measured meanwhile."""
    masks: Sequence[tuple[Item, Path]]
    """Ternary masks of the images, for hosts that learn from masks."""
    classes: ClassTable


@dataclass(frozen=True)
class View:
    """One image as a host maps it."""

    image: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    labels: tuple[int, ...]
    """Class indices of its K image-level labels."""
    mask: Tensor | None
    """(H, W) int64 ternary mask that the network learnt from; None for hosts without masks."""


class HostSettings(PresetModel):
    """Settings of a host."""

    threshold: float
    """Fixed threshold of the seeds of its maps."""


class HostSection(BackboneSection):
    """A method with a network of its own that makes better maps."""

    method: str
    """Name of a host."""
    maps: Annotated[tuple[Base, ...], Field(min_length=1)] | None = None
    """What the host builds on: CAM, or LPCAM in its place; each makes its own maps. Null: both."""
    backbone: str | None = None
    """Name of a timm model; null takes the classifier's backbone, weights and preprocessing."""
    weights: str = "pretrained"
    """"pretrained" (timm's), "random", or the path of a safetensors file."""
    lpcam: LpcamSettings | None = None
    """How the host's own features are clustered; required where they are."""

    @property
    def settings(self) -> Any:
        """Settings of the chosen host."""
        return getattr(self, self.method)

    @property
    def host(self) -> Host:
        """The chosen host."""
        return HOSTS[self.method]

    @property
    def arms(self) -> list[Arm]:
        """The maps that the recipe wants of the host."""
        return self.host.arms(self)

    @property
    def clusters(self) -> bool:
        """Whether prototypes are made of the host's own features."""
        return any(arm.prototypes for arm in self.arms)

    @model_validator(mode="after")
    def _check(self) -> HostSection:
        if self.method not in HOSTS:
            raise ValueError(f"there is no host {self.method!r}; there are {', '.join(HOSTS)}")
        if self.maps is not None and len(set(self.maps)) != len(self.maps):
            raise ValueError(f"host.maps {list(self.maps)} repeats an entry")
        if self.backbone is None:
            given = self.model_fields_set & {
                "arguments",
                "output_stride",
                "dilated",
                "weights",
                "mean",
                "std",
            }
            usual = type(self).model_construct(method=self.method)
            given = {name for name in given if getattr(self, name) != getattr(usual, name)}
            if given:
                raise ValueError(
                    f"host.{min(given)} belongs to host.backbone, which is not given; without one "
                    "the host has the classifier's backbone, weights and preprocessing"
                )
        self.host.check(self)
        if self.clusters and self.lpcam is None:
            raise ValueError(
                "host.lpcam must say how the host's own features are clustered; give it a preset, "
                "e.g. mctformer.voc12 or amn.voc12"
            )
        return self


class Host(ABC):
    """A method with a network of its own.

    A host is one object in :data:`HOSTS`. The stages of a run call it in this order: ``arms``,
    ``build``, ``images_per_step``, ``train``, ``load``, ``local_features`` (where an arm has
    prototypes) and ``maps``.
    """

    title: ClassVar[str]
    """Name in rows and messages."""
    settings: ClassVar[type[HostSettings]]
    """Class of its settings."""
    holds_out: ClassVar[bool] = False
    """Whether it is measured on held-out images while it trains."""
    map_fields: ClassVar[frozenset[str]] = frozenset()
    """Settings that change its maps and not its network."""
    prototype_fields: ClassVar[frozenset[str]] = frozenset()
    """Settings that change only maps from prototypes of its own features."""
    mask_fields: ClassVar[frozenset[str]] = frozenset()
    """Settings that change only the masks that it learns from."""

    def check(self, section: HostSection) -> None:
        """Refuse a section that does not fit the host.

        Raises:
            ValueError: saying which key is wrong.
        """

    def arms(self, section: HostSection) -> list[Arm]:
        """The maps that a section asks for; by default one network serves CAM and LPCAM."""
        titles = {"CAM": self.title, "LPCAM": f"{self.title}+LPCAM"}
        return [
            Arm(titles[base], base, section.method, prototypes=base == "LPCAM")
            for base in section.maps or ("CAM", "LPCAM")
        ]

    def mask_thresholds(self, settings: Any, base: Base) -> tuple[float, float] | None:
        """Thresholds (foreground, background) of the ternary masks that the network learns from.

        None for hosts that learn from image-level labels alone.
        """
        return None

    @abstractmethod
    def build(
        self, backbone: BackboneSpec, names: Sequence[str], settings: Any, **first: Any
    ) -> Any:
        """The untrained network, on the CPU.

        Args:
            backbone: the backbone it builds on.
            names: names of the classes.
            settings: an instance of :attr:`settings`.
            first: ``weights``, ``mean``, ``std`` and ``seed``.
        """

    @abstractmethod
    def images_per_step(self, network: Any, data: HostData, settings: Any) -> tuple[int, str]:
        """Least number of images, or pairs of images, in a step, and the setting that says so.

        Called before any stage runs, so it also refuses settings that do not fit the network.
        """

    @abstractmethod
    def train(self, network: Any, data: HostData, settings: Any, **options: Any) -> History:
        """Train the network in place and return its history.

        Args:
            network: as :meth:`build` made it.
            data: what it learns from.
            settings: an instance of :attr:`settings`.
            options: ``seed``, ``folder`` (for checkpoints), ``workers`` and ``processes``.
        """

    @abstractmethod
    def load(self, path: Path, device: Any) -> Any:
        """A trained network from its file, in evaluation mode."""

    def local_features(self, network: Any, view: View, settings: Any) -> tuple[Tensor, Tensor]:
        """Features (C, h, w) of an image, and the maps (K, H, W) that split them (eq. 2)."""
        raise ClassifierError(f"{self.title} has no prototypes of its own features")

    @abstractmethod
    def maps(self, network: Any, view: View, settings: Any, vectors: Tensor | None) -> FusedMaps:
        """Maps of an image: ``cam`` (K, ceil(H/4), ceil(W/4)) and ``high_res`` (K, H, W).

        Args:
            network: as :meth:`load` gave it.
            view: the image.
            settings: an instance of :attr:`settings`.
            vectors: (N, C) prototypes of the host's own features; None for arms without.
        """

    def network_key(self, settings: Any) -> Mapping[str, Any]:
        """The settings that change the network, as JSON, for its cache key."""
        other = {"preset", "threshold"} | self.map_fields | self.prototype_fields | self.mask_fields
        found: Mapping[str, Any] = settings.model_dump(mode="json", exclude=other)
        return found

    def maps_key(self, settings: Any, arm: Arm) -> Mapping[str, Any]:
        """The settings that change the maps of an arm, as JSON, for their cache key."""
        used = self.map_fields | (self.prototype_fields if arm.prototypes else frozenset())
        found: Mapping[str, Any] = settings.model_dump(mode="json", include=set(used))
        return found


HOSTS: Registry[Host] = Registry(
    "host",
    "lpcam.hosts",
    {
        "amn": "lpcam.hosts.amn:HOST",
        "mctformer": "lpcam.hosts.mctformer:HOST",
        "edam": "lpcam.hosts.edam:HOST",
    },
)


# -- Shared by the methods --------------------------------------------------------------------


MAP_STRIDE = 4
"""Pixels per cell of the small maps (``cam``) of an image."""


def check_labels(labels: Sequence[int], count: int) -> None:
    """Check that labels are classes of a network.

    Raises:
        DataError: if a label is not from 0 to ``count`` - 1.

    Example:
        >>> check_labels([0, 2], 3)
    """
    if wrong := [label for label in labels if not 0 <= label < count]:
        raise DataError(
            f"labels {wrong} are not classes of the network; expected indices from 0 to {count - 1}"
        )


def check_finite(values: Tensor, source: str) -> None:
    """Check what a part of a network gave for an image.

    Raises:
        ClassifierError: naming the source, if a value is NaN or Inf.

    Example:
        >>> import torch
        >>> check_finite(torch.ones(3), "the head")
    """
    if not all_finite(values):
        raise ClassifierError(
            f"{source} gave NaN or Inf for this image; check the weights, the prototypes and the "
            "preprocessing, or train the network again"
        )


def quarter(size: Sequence[int]) -> tuple[int, int]:
    """Size (ceil(H / 4), ceil(W / 4)) of the small maps of an image of (H, W) pixels.

    Example:
        >>> quarter((61, 80))
        (16, 20)
    """
    return strided(size[0], MAP_STRIDE), strided(size[1], MAP_STRIDE)
