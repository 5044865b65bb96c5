"""Shared parts of IRN and PSA: feature maps of a backbone, training on pairs of cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from lpcam.classifiers.classifier import (
    Classifier,
    description,
    feature_maps,
    folded_backbone,
)
from lpcam.data.dataset import Item
from lpcam.refine.base import Accelerate, Labelled
from lpcam.refine.walk import pair_counts
from lpcam.runtime.distributed import Processes
from lpcam.runtime.errors import ClassifierError, DataError
from lpcam.runtime.settings import Positive
from lpcam.training import loop as engine
from lpcam.training.loop import History
from lpcam.training.optim import SgdSettings, parameter_groups
from lpcam.training.saved_network import shallow_copy


class PairSettings(SgdSettings):
    """Settings that IRN and PSA share: the training on pairs and the walk."""

    learning_rate: Positive
    """Learning rate of IRN's boundary branch or PSA's backbone; other parts have a multiple."""
    crop: Annotated[int, Field(ge=16, multiple_of=4)]
    """Side of the square crop, in pixels."""
    radius: Annotated[int, Field(ge=2)]
    """Distance, in cells, below which two cells are a pair; a larger one gives more pairs."""
    beta: Positive
    """Exponent of the affinities in the walk; a larger one spreads maps less."""
    exponent: Annotated[int, Field(ge=0, le=16)]
    """Binary logarithm of the number of steps of the walk."""
    tolerance: Annotated[float, Field(ge=0.0)]
    """Error allowed for leaving out small terms of the walk's power; 0 leaves out none."""
    cell: ClassVar[int]
    """Pixels per cell."""

    @model_validator(mode="after")
    def _check_crop(self) -> Self:
        least = 2 * self.cell * (self.radius - 1)
        if self.crop <= least:
            raise ValueError(
                f"crop {self.crop} has no pair at radius {self.radius}; it must be above {least}"
            )
        return self


SIDE = 128  #: Side, in pixels, of the images on which strides are measured.
Read = Callable[[Item, Path], tuple[NDArray[np.uint8], NDArray[np.uint8]]]
"""Reads the image (H, W, 3) of an item, and labels (..., H, W) from their file."""
Augment = Callable[
    [NDArray[np.uint8], NDArray[np.uint8], np.random.Generator], tuple[Tensor, Tensor]
]
"""Makes an image (3, crop, crop) and labels of its cells (h, w)."""


@dataclass(frozen=True)
class Level:
    """One of the feature maps of a backbone: its position, channels and pixels per cell."""

    index: int
    channels: int
    stride: int


class BackboneMaps(nn.Module):
    """A backbone and those of its feature maps that a method reads, all of them at first.

    ClassifierError that names the method if the backbone gives none.
    """

    def __init__(self, classifier: Classifier, method: str) -> None:
        super().__init__()
        self.backbone = classifier.backbone
        self.preprocessing = classifier.preprocessing
        self.spec = classifier.spec
        self.accelerate: Accelerate = lambda network, _: network
        self.eval()
        if not hasattr(self.backbone, "forward_intermediates"):
            raise ClassifierError(
                f"the backbone {type(self.backbone).__name__} does not give the feature maps "
                f"between its stages; {method} needs a timm model that has forward_intermediates"
            )
        self.levels = [
            Level(number, found.shape[1], SIDE // found.shape[-1])
            for number, found in enumerate(self._maps_of_zeros((SIDE, SIDE)))
        ]
        self.multiple = 1

    def side_multiple(self, size: tuple[int, int]) -> int:
        """Number of which sides must be multiples.

        1 if the maps of ``size`` have ceil(side / stride) cells, else the largest stride: the rest
        is dropped.
        """
        maps = self._maps_of_zeros(size)
        whole = all(
            tuple(maps[level.index].shape[-2:]) == tuple(-(-side // level.stride) for side in size)
            for level in self.levels
        )
        return 1 if whole else max(level.stride for level in self.levels)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Features (B, C, h, w) of each level of (B, 3, H, W) normalised images."""
        found = feature_maps(self.backbone, pad_sides(images, self.multiple))
        return [found[level.index] for level in self.levels]

    def folded(self) -> Self:
        """A copy for inference with a folded backbone, equal up to rounding; cannot be saved."""
        twin, folded = shallow_copy(self), folded_backbone(self.backbone)
        twin.backbone = self.accelerate(folded, partial(feature_maps, folded))
        twin.spec = None
        return twin

    def _description(self) -> dict[str, Any]:
        return description(self.backbone, self.spec, self.preprocessing)

    @torch.no_grad()
    def _maps_of_zeros(self, size: tuple[int, int]) -> list[Tensor]:
        zeros = next(self.backbone.parameters()).new_zeros(1, 3, *size)
        return feature_maps(self.backbone, zeros)


def pad_sides(images: Tensor, multiple: int) -> Tensor:
    """Pad images (..., H, W) with zeros at the right and bottom to multiples of a number."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple))


def _sample(
    read: Read, augment: Augment, labelled: Labelled, seed: int, place: engine.Place
) -> tuple[Tensor, Tensor]:
    item, path = labelled[place.sample]
    image, labels = read(item, path)
    if image.shape[:2] != labels.shape[-2:]:
        raise DataError(
            f"image {item.id!r} has {image.shape[0]} x {image.shape[1]} pixels but its labels "
            f"{path} {labels.shape[-2]} x {labels.shape[-1]}; make the labels again"
        )
    return augment(image, labels, np.random.default_rng([seed, place.epoch, place.sample]))


def train_on_pairs(
    module: nn.Module,
    values: Callable[[str, nn.Parameter], tuple[float, float]],
    read: Read,
    augment: Augment,
    loss: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor],
    labelled: Labelled,
    settings: Any,
    *,
    title: str,
    seed: int,
    processes: Processes | None = None,
    **options: Any,
) -> History:
    """Train a module in place on pairs of cells; a stopped training resumes from its checkpoints.

    ``values`` are the learning rate and weight decay of a parameter. ``read`` and ``augment`` make
    the samples and are picklable. ``loss`` takes the module, images,
    labels and the number of pairs of each kind in the batch. Others as `lpcam.training.loop.run`.
    """
    processes = processes or Processes()

    def batch_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        counts = processes.sum(pair_counts(labels, settings.radius)).to(labels.device)
        return loss(model, images, labels, counts)

    return engine.run(
        module,
        torch.optim.SGD(parameter_groups(module, values), momentum=settings.momentum),
        partial(_sample, read, augment, labelled, seed),
        len(labelled),
        batch_loss,
        engine.Plan.of_epochs(settings, len(labelled)),
        label=f"training {title}",
        section=f"refine.{title.lower()}",
        seed=seed,
        processes=processes,
        **options,
    )
