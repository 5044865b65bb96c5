"""Settings, inputs and calls that the tests of hosts share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import COLOURS
from torch import Tensor

from lpcam.classifiers.classifier import BackboneSpec
from lpcam.data.dataset import ClassTable
from lpcam.hosts.base import HOSTS, View
from lpcam.method.functional import FusedMaps

SPEC = BackboneSpec("test_resnet", {}, 16)
CLASSES = ClassTable(tuple(COLOURS), (1, 2, 3))
SETTINGS = {
    "amn": HOSTS["amn"].settings.from_preset(
        "official",
        epochs=2,
        batch_size=3,
        crop=64,
        dilations=(1, 2),
        learning_rate=1e-3,
        head_learning_rate=1e-2,
        scales=(1.0, 0.5),
    ),
    "edam": HOSTS["edam"].settings.from_preset(
        "official",
        iterations=8,
        pairs=3,
        crop=48,
        long_side=(40, 64),
        warmup=2,
        width=8,
        hidden=12,
        freeze=["conv1", "bn1"],
        learning_rate=0.02,
        scales=(1.0, 0.5),
    ),
    "mctformer": HOSTS["mctformer"].settings.from_preset(
        "default", crop=48, epochs=2, batch_size=3, warmup_epochs=0, learning_rate=1e-3
    ),
}
FORWARD: dict[str, Callable[[Any, Tensor], Any]] = {
    "amn": lambda network, images: network(images, torch.eye(3)[: len(images)]),
    "edam": lambda network, images: network(images),
    "mctformer": lambda network, images: network(images).classes,
}


def build_host(
    name: str,
    weights: Path | str,
    settings: Any = None,
    seed: int = 0,
    spec: BackboneSpec | None = None,
) -> Any:
    """An untrained network; MCTformer's is random unless a backbone is given."""
    if name == "mctformer" and spec is None:
        spec, weights = BackboneSpec("test_vit", {"depth": 3}), "random"
    first = {"weights": str(weights), "mean": None, "std": None, "seed": seed}
    return HOSTS[name].build(spec or SPEC, CLASSES.names, settings or SETTINGS[name], **first)


def map_image(
    name: str,
    network: Any,
    image: np.ndarray,
    labels: Sequence[int],
    settings: Any = None,
    mask: Tensor | None = None,
    vectors: Tensor | None = None,
) -> FusedMaps:
    """Maps of a host."""
    view = View(image, tuple(labels), mask)
    return HOSTS[name].maps(network, view, settings or SETTINGS[name], vectors)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn_labels(*shape: int, values: tuple[int, ...] = (0, 1, 2, 255), seed: int = 0) -> Tensor:
    """Labels drawn from some values."""
    numbers = torch.randint(0, len(values), shape, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(values)[numbers]


def photograph(height: int = 53, width: int = 70, seed: int = 0) -> np.ndarray:
    """Noise (H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
