"""Seed masks: maps cut at a threshold."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpcam.data.dataset import BACKGROUND, IGNORE, ClassTable
from lpcam.runtime.errors import DataError


def seeds(maps: Tensor, threshold: float) -> Tensor:
    """Seed mask of an image: the best class where its value is > ``threshold``, else background.

    This is the argmax over a background plane of ``threshold`` and the maps; the first of equal
    planes wins (specification of LPCAM, section 5).

    Args:
        maps: (K, H, W) floating point, maps of the present classes; K may be 0.
        threshold: background score, in the units of the maps. Larger values give smaller objects.

    Returns:
        int64 (H, W), 0 for background and k + 1 for the k-th plane, on the device of the maps.

    Example:
        >>> seeds(torch.tensor([[[0.1, 0.6, 0.2]], [[0.2, 0.4, 0.9]]]), 0.3).tolist()
        [[0, 1, 2]]
    """
    if maps.ndim != 3:
        raise DataError(f"maps are {tuple(maps.shape)}; expected (K, H, W)")
    if not len(maps):
        return torch.zeros(maps.shape[1:], dtype=torch.int64, device=maps.device)
    best, plane = maps.max(dim=0)
    return torch.where(best > threshold, plane + 1, 0)


def to_mask(
    seed: Tensor,
    keys: Tensor | NDArray[np.int64],
    classes: ClassTable,
    *,
    maps: Tensor | None = None,
    ignore_threshold: float | None = None,
) -> NDArray[np.uint8]:
    """Convert a seed mask to the values of a mask file, uint8 (H, W).

    The seed (H, W) is from :func:`seeds`; ``keys`` (K,) are the class indices of its planes.
    Background pixels whose best value in ``maps`` (K, H, W) is above ``ignore_threshold`` become
    255 (ignored).
    """
    ids = [BACKGROUND, *(classes.mask_ids[key] for key in keys.tolist())]
    mask: NDArray[np.uint8] = np.array(ids, dtype=np.uint8)[seed.cpu().numpy()]
    if maps is not None and ignore_threshold is not None and len(maps):
        unsure = (maps.amax(dim=0) > ignore_threshold).cpu().numpy()
        mask[unsure & (mask == BACKGROUND)] = IGNORE
    return mask
