"""Helpers that the hosts share: checks of labels and values, sizes of maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lpcam.errors import ClassifierError, DataError
from lpcam.extract import all_finite
from lpcam.functional import strided

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
