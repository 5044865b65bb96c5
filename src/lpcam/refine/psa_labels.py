"""Labels that PSA learns from: files with the scores of two CRFs, and labels of cells from them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lpcam.data.dataset import BACKGROUND, IGNORE
from lpcam.refine.pair_network import pad_sides
from lpcam.runtime.errors import ArtefactError
from lpcam.runtime.files import read_bytes, write_bytes

STRIDE = 8
"""Pixels per cell of the grid of features, labels and walks."""
PADDING = 1e-5
"""A cell all of whose scores are below this lies beyond the image."""


def write_scores(path: Path, low: Tensor, high: Tensor) -> None:
    """Write scores (K + 1, H, W) in [0, 1] of both alphas in steps of 1 / 255, as an npz file."""
    first, second = ((s * 255).round().to(torch.uint8).cpu().numpy() for s in (low, high))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, low=first, high=second)
    write_bytes(path, buffer.getvalue())


def read_scores(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read a file of :func:`write_scores`: low and high, (K + 1, H, W) uint8 each, 255 for 1.

    Raises:
        ArtefactError: if the file is missing, damaged, or has other contents.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "scores.npz"
        ...     write_scores(path, torch.ones(1, 2, 2), torch.zeros(1, 2, 2))
        ...     read_scores(path)[0].tolist()
        [[[255, 255], [255, 255]]]
    """
    data = read_bytes(path)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            low, high = (archive[name] for name in ("low", "high"))
        if low.ndim != 3 or not low.size or low.shape != high.shape:
            raise ValueError(f"its arrays are {low.shape} and {high.shape}")
        if low.dtype != np.uint8 or high.dtype != np.uint8:
            raise ValueError(f"its arrays are {low.dtype} and {high.dtype}")
    except Exception as error:  # a damaged archive makes zipfile, zlib and numpy raise anything
        raise ArtefactError(
            f"{path} does not hold the scores of two CRFs ({str(error) or type(error).__name__}); "
            "delete it and run the stage refine-labels again"
        ) from error
    return low, high


def pooled(scores: Tensor) -> Tensor:
    """Means (..., n, h, w) of cells of 8 x 8 pixels of (..., n, H, W), zeros beyond the image.

    Example:
        >>> pooled(torch.ones(1, 8, 12)).tolist()
        [[[1.0, 0.5]]]
    """
    return F.avg_pool2d(pad_sides(scores, STRIDE), STRIDE)


def label_pairs(low: Tensor, high: Tensor) -> Tensor:
    """Labels of cells from the scores of two CRFs.

    A cell has the class that is best where the background is favoured: ``low`` (K + 1, h, w). It is
    background where that is best although it is not favoured: ``high``. Otherwise it is unknown.

    Returns:
        (h, w) uint8: 0 background, k + 1 the image's k-th class, 255 unknown or beyond the image.

    Example:
        >>> low, high = torch.tensor([[0.1, 0.9, 0.6]]), torch.tensor([[0.1, 0.9, 0.3]])
        >>> label_pairs(torch.stack([low, 1 - low]), torch.stack([high, 1 - high])).tolist()
        [[1, 0, 255]]
    """
    foreground, background = low.argmax(0), high.argmax(0) == 0
    labels = torch.where(foreground > 0, foreground, IGNORE).masked_fill(background, BACKGROUND)
    beyond = torch.maximum(low, high).amax(0) < PADDING
    return labels.masked_fill(beyond, IGNORE).to(torch.uint8)
