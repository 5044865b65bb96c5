"""The engine of a run: decided once for its folder, and the networks that it runs."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lpcam.classifiers.classifier import Classifier, Preprocessing
from lpcam.classifiers.engines import (
    Engine,
    accelerated,
    accelerated_network,
    choose_engine,
    file_name,
)
from lpcam.data.dataset import Item
from lpcam.data.images import limit_long_side, resize_image
from lpcam.data.resize import scaled_size
from lpcam.pipeline.cache import Record
from lpcam.pipeline.recipe import Recipe
from lpcam.pipeline.run_folder import RunFolder
from lpcam.runtime.distributed import Processes
from lpcam.runtime.errors import ClassifierError
from lpcam.runtime.files import digest_json, read_json, write_json

logger = logging.getLogger(__name__)


class RunEngine:
    """Decides on the engine of a run, and keeps networks as it runs them in the run folder.

    ``samples`` gives normalised images on which an engine is compared with torch.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        device: torch.device,
        processes: Processes,
        samples: Callable[[], Sequence[Tensor]],
    ) -> None:
        self.asked, self.precision = recipe.run.engine, recipe.maps.precision
        if self.asked == "auto" and recipe.lpcam.published:
            self.asked = "torch"
        self.folder, self.device, self.processes = folder, device, processes
        self.samples = samples

    def decide(
        self, weights: Any, given: Callable[[], tuple[Classifier, Sequence[str]]] | None
    ) -> Record:
        """The record of the engine for some weights, made if it is of others.

        Args:
            weights: what determines the weights, as JSON.
            given: gives the classifier and its early layers, on which an engine is tried; None
                where the run has no pass of its own.

        Raises:
            LpcamError: if the engine is not installed, or cannot be used here.
        """
        if self.asked == "torch":
            engine = choose_engine("torch", self.device, self.precision)
            return {"engine": engine, "reason": "figures of this preset are compared with others'"}
        path = self.folder.engine_record
        key = digest_json([self.asked, self.precision, weights])
        if self.processes.first and (not path.is_file() or read_json(path).get("key") != key):
            engine = choose_engine(self.asked, self.device, self.precision)
            reason = "as the recipe says"
            if self.asked == "auto" and engine != "torch":
                reason = "on a CPU, where it is installed"
            elif self.asked == "auto":
                usual = self.device.type == "cpu" and self.precision == "float32"
                missing = "pip install 'lpcam[onnx]' would make passes faster"
                reason = missing if usual else f"{self.device.type}, {self.precision}"
            shutil.rmtree(self.folder.engine, ignore_errors=True)
            layers: Sequence[str] = ()
            if engine != "torch" and given is not None:
                classifier, layers = given()
                try:
                    self.classifier(classifier, engine=engine, layers=layers)
                except ClassifierError as error:
                    engine, reason = "torch", f"{engine} is not used: {error}"
            record = {"key": key, "engine": engine, "reason": reason, "layers": list(layers)}
            write_json(path, record)
        self.processes.wait()
        found: Record = read_json(path)
        choose_engine(found["engine"], self.device, self.precision)  # it may be missing here
        return found

    def classifier(
        self, classifier: Classifier, *, engine: Engine, layers: Sequence[str]
    ) -> Classifier:
        """A classifier as an engine runs it, with early layers."""
        if engine == "torch":
            return classifier.folded()
        file = self._file(classifier.backbone, layers)
        how: dict[str, Any] = {"layers": layers, "precision": self.precision}
        return accelerated(classifier, engine, file, self.samples, **how)

    def network(
        self, network: nn.Module, engine: Engine, call: Callable[[Tensor], Any] | None
    ) -> nn.Module:
        """A frozen network as an engine runs it; as it is, which is told, where it cannot."""
        if engine == "torch":
            return network
        try:
            return accelerated_network(network, engine, self._file(network), self.samples, call)
        except ClassifierError as error:
            if self.processes.first:
                name = type(network).__name__
                logger.warning("torch runs %s, not %s: %s", name, engine, error)
            return network

    def _file(self, network: nn.Module, layers: Sequence[str] = ()) -> Path | None:
        """File of a network for an engine, which only the first process writes."""
        file = self.folder.engine / file_name(network, layers)
        return file if self.processes.first or file.is_file() else None


def samples(
    items: Sequence[Item], sizes: Sequence[tuple[int, int]], scales: Sequence[float], limit: int
) -> list[Tensor]:
    """Three images (1, 3, H, W) in [-1, 1]: the smallest at the largest scale, and the reverse.

    The third is of middle size at scale 1. Longer sides than ``limit`` are shrunk to it.
    """
    order = sorted(range(len(items)), key=lambda place: math.prod(sizes[place]))
    found = []
    wanted = max(scales), 1.0, min(scales)
    for place, scale in zip((order[0], order[len(order) // 2], order[-1]), wanted, strict=True):
        image = limit_long_side(items[place].read(), limit)
        image = resize_image(image, scaled_size(image.shape[0], image.shape[1], scale))
        found.append(Preprocessing((0.5,) * 3, (0.5,) * 3)(image)[None])
    return found
