"""Shared parts of IRN and PSA: feature maps of a backbone, training on pairs of cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

from lpcam.classifiers.classifier import feature_maps
from lpcam.data.dataset import Item
from lpcam.refine.base import Labelled
from lpcam.refine.walk import pair_counts
from lpcam.runtime.distributed import Processes
from lpcam.runtime.errors import ClassifierError, DataError
from lpcam.runtime.settings import Positive
from lpcam.training import loop as engine
from lpcam.training.loop import History
from lpcam.training.optim import SgdSettings, parameter_groups


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


def feature_levels(backbone: nn.Module, method: str) -> list[Level]:
    """All feature maps of a backbone, in order; a method's ClassifierError if it gives none."""
    if not hasattr(backbone, "forward_intermediates"):
        raise ClassifierError(
            f"the backbone {type(backbone).__name__} does not give the feature maps between its "
            f"stages; {method} needs a timm model that has forward_intermediates"
        )
    return [
        Level(number, found.shape[1], SIDE // found.shape[-1])
        for number, found in enumerate(_maps_of_zeros(backbone, (SIDE, SIDE)))
    ]


def side_multiple(backbone: nn.Module, levels: Sequence[Level], size: tuple[int, int]) -> int:
    """Number of which sides must be multiples, for :func:`pad_sides`.

    1 if feature maps have ceil(side / stride) cells, else the largest stride: the rest is dropped.
    """
    maps = _maps_of_zeros(backbone, size)
    whole = all(
        tuple(maps[level.index].shape[-2:]) == tuple(-(-side // level.stride) for side in size)
        for level in levels
    )
    return 1 if whole else max(level.stride for level in levels)


def pad_sides(images: Tensor, multiple: int) -> Tensor:
    """Pad images (..., H, W) with zeros at the right and bottom to multiples of a number."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple))


@torch.no_grad()
def _maps_of_zeros(backbone: nn.Module, size: tuple[int, int]) -> list[Tensor]:
    return feature_maps(backbone, next(backbone.parameters()).new_zeros(1, 3, *size))


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
