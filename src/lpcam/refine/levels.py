"""Feature maps of a backbone between its stages, which IRN and PSA build on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcam.classifiers.classifier import feature_maps
from lpcam.runtime.errors import ClassifierError

SIDE = 128
"""Side, in pixels, of the images on which strides are measured."""


@dataclass(frozen=True)
class Level:
    """One of the feature maps of a backbone."""

    index: int
    """Position among all feature maps of the backbone."""
    channels: int
    stride: int
    """Pixels per cell."""


def feature_levels(backbone: nn.Module, method: str) -> list[Level]:
    """All feature maps of a backbone, in its order.

    Args:
        backbone: with ``forward_intermediates``, as timm's models have.
        method: name of the method that needs them, for the message.

    Raises:
        ClassifierError: if the backbone does not give feature maps.

    Example:
        >>> import timm
        >>> levels = feature_levels(timm.create_model("test_resnet"), "IRN")
        >>> [level.stride for level in levels]
        [2, 4, 8, 16, 32]
    """
    if not hasattr(backbone, "forward_intermediates"):
        raise ClassifierError(
            f"the backbone {type(backbone).__name__} does not give the feature maps between its "
            f"stages; {method} needs a timm model that has forward_intermediates"
        )
    return [
        Level(number, found.shape[1], SIDE // found.shape[-1])
        for number, found in enumerate(_maps_of_zeros(backbone, (SIDE, SIDE)))
    ]


def rounds_up(backbone: nn.Module, levels: Sequence[Level], size: tuple[int, int]) -> bool:
    """Return True if the feature maps of images of any size have ceil(side / stride) cells.

    False means that the backbone drops the rest of a side that is no multiple of its stride.

    Args:
        levels: those of the backbone that are used.
        size: (H, W) to try, no multiple of the strides.

    Example:
        >>> import timm
        >>> backbone = timm.create_model("test_convnext")
        >>> rounds_up(backbone, feature_levels(backbone, "IRN"), (97, 131))
        False
    """
    maps = _maps_of_zeros(backbone, size)
    return all(
        tuple(maps[level.index].shape[-2:]) == tuple(-(-side // level.stride) for side in size)
        for level in levels
    )


def pad_sides(images: Tensor, multiple: int) -> Tensor:
    """Pad images (..., H, W) with zeros at the right and bottom to multiples of a number.

    Example:
        >>> pad_sides(torch.ones(1, 3, 5, 8), 4).shape
        torch.Size([1, 3, 8, 8])
    """
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple))


@torch.no_grad()
def _maps_of_zeros(backbone: nn.Module, size: tuple[int, int]) -> list[Tensor]:
    return feature_maps(backbone, next(backbone.parameters()).new_zeros(1, 3, *size))
