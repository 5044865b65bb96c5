"""A host of another distribution: maps of the pixels that have the mean colour of a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lpcam.classifiers.classifier import BackboneSpec
from lpcam.data.resize import quarter_size, resize
from lpcam.hosts.base import Arm, Host, HostData, HostSection, HostSettings, View
from lpcam.method.functional import FusedMaps, normalize
from lpcam.training.loop import History
from lpcam.training.saved_network import SavedNetwork


class ColourSettings(HostSettings):
    """Settings: fields without defaults, whose values are in presets."""

    table: ClassVar[str] = "colours"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"plain": {"threshold": 0.5, "decay": 4.0}}
    preset: str = "plain"
    decay: float
    """How fast a map falls with the distance of colours; larger values make narrower maps."""


class Colours(SavedNetwork):
    """A mean colour for each class."""

    kind = "colours"

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.zeros(classes, 3))

    def _description(self) -> dict[str, Any]:
        return {"classes": len(self.means)}

    @classmethod
    def _described(cls, metadata: Mapping[str, Any]) -> Self:
        return cls(metadata["classes"])


class ColourHost(Host[ColourSettings, Colours]):
    """The network learns colours from image-level labels; its maps are distances to them."""

    title = "Colours"
    settings = ColourSettings
    network = Colours
    map_fields = frozenset({"decay"})

    def arms(self, section: HostSection) -> list[Arm]:
        return [Arm(self.title, "CAM", section.method)]

    def build(
        self, backbone: BackboneSpec, names: Sequence[str], settings: ColourSettings, **first: Any
    ) -> Colours:
        return Colours(len(names))

    def images_per_step(
        self, network: Colours, data: HostData, settings: ColourSettings
    ) -> tuple[int, str]:
        return len(data.images), "images"

    def train(
        self, network: Colours, data: HostData, settings: ColourSettings, **options: Any
    ) -> History:
        for label, mean in enumerate(network.means.data):
            shown = [item.read() for item in data.images if label in item.labels]
            pixels = [torch.from_numpy(image).double().mean((0, 1)) for image in shown]
            mean[:] = torch.stack(pixels).mean(0)
        return [{"epoch": 1, "step": 1, "loss": 0.0}]

    def maps(
        self, network: Colours, view: View, settings: ColourSettings, vectors: Tensor | None
    ) -> FusedMaps:
        image = torch.from_numpy(view.image).to(network.means).movedim(-1, 0)
        colours = network.means[list(view.labels), :, None, None]
        distance = (image - colours).norm(dim=1) / 255
        full = normalize((-settings.decay * distance).exp())
        return FusedMaps(resize(full, quarter_size(full.shape[-2:])), full)


HOST = ColourHost()
