"""Helpers that the refinements share: checks of images and maps, dtypes, copies of networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lpcam.data.items import Item
from lpcam.engine import Place
from lpcam.errors import DataError

Module = TypeVar("Module", bound=nn.Module)
Sample = TypeVar("Sample")


def check_image_and_maps(image: Tensor, maps: Tensor, name: str) -> None:
    """Check that an image and maps belong together.

    Args:
        image: expected to be (..., H, W, 3) uint8.
        maps: expected to be (..., n, H, W), floating-point and finite, on the same device.
        name: plural noun for the maps, used in the messages.

    Raises:
        DataError: if a shape, dtype or device does not fit or a map is not finite.

    Example:
        >>> check_image_and_maps(
        ...     torch.zeros(4, 5, 3, dtype=torch.uint8), torch.zeros(2, 4, 5), "maps"
        ... )
    """
    if image.dtype is not torch.uint8 or image.dim() < 3 or image.shape[-1] != 3:
        raise DataError(
            f"the image is {image.dtype} {tuple(image.shape)}; expected RGB, uint8 of the shape "
            "(..., height, width, 3), not normalised"
        )
    if not maps.is_floating_point() or maps.dim() < 3:
        raise DataError(
            f"the {name} are {maps.dtype} {tuple(maps.shape)}; expected floating-point numbers of "
            "the shape (..., labels, height, width)"
        )
    expected = (*maps.shape[:-3], *maps.shape[-2:], 3)
    if tuple(image.shape) != expected:
        raise DataError(
            f"image and {name} differ in size: the image is {tuple(image.shape)}, expected "
            f"{expected} for {name} {tuple(maps.shape)}; resize one to the other"
        )
    if not image.numel():
        raise DataError(f"the image has no pixels: {tuple(image.shape)}")
    if image.device != maps.device:
        raise DataError(f"the image is on {image.device}, but the {name} are on {maps.device}")
    if not bool(torch.isfinite(maps).all()):
        raise DataError(f"{name} hold NaN or infinite values; recompute them")


def check_label_files(labelled: Sequence[tuple[Item, Path]], name: str) -> None:
    """Check that every image has its file of labels.

    Args:
        labelled: images and their files.
        name: plural noun for the contents of the files, used in the message.

    Raises:
        DataError: if there is no image or a file is missing.

    Example:
        >>> check_label_files([(Item("a", Path("a.png"), ()), Path(__file__))], "labels")
    """
    missing = [f"{item.id} ({path})" for item, path in labelled if not path.is_file()]
    if missing or not labelled:
        raise DataError(
            f"{len(missing)} of {len(labelled)} images have no {name}: {', '.join(missing[:3])}; "
            "give images whose files exist"
        )


class Samples(Dataset[Sample]):
    """Training samples made on demand by a function of their place, picklable if it is."""

    def __init__(self, make: Callable[[Place], Sample]) -> None:
        self.make = make

    def __getitem__(self, place: Place) -> Sample:
        return self.make(place)


def compute_dtype(values: Tensor) -> torch.dtype:
    """Return float64 for float64 values and float32 for every shorter type.

    Example:
        >>> compute_dtype(torch.zeros(1, dtype=torch.float16))
        torch.float32
    """
    return torch.float64 if values.dtype is torch.float64 else torch.float32


def shallow_copy(module: Module) -> Module:
    """Return a copy of a module that shares its submodules and parameters.

    Submodules can be replaced in the copy without changing the original.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 2))
        >>> twin = shallow_copy(layer)
        >>> twin[0] is layer[0], twin._modules is layer._modules
        (True, False)
    """
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
