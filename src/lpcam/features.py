"""Features of the images of a run, computed once and kept as long as they fit a budget.

The probe, the prototypes and the maps all need the features of the same images, and on a CPU the
backbone's passes are nearly all of a run's time. The store rounds every feature to half precision
whether it is kept or not, so that the budget changes the time of a run and never its bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpcam.classifier import Classifier
from lpcam.data.images import limit_long_side, read_image
from lpcam.data.items import Item
from lpcam.errors import PrototypeError
from lpcam.extract import FeaturePair, image_pyramid

DTYPES = {"float16": torch.float16, "float32": torch.float32}


class FeatureStore:
    """Features of images at several scales, from memory or from the backbone.

    Args:
        classifier: whose backbone is used.
        flip: whether the mirrored image is wanted too.
        maximum_side: a longer image is shrunk to this long side first, in pixels.
        dtype: of what is kept; results are handed out as float32.
        budget: bytes that may be kept in memory.
        keep: ids of the images that will be asked for again; others are never kept.
    """

    def __init__(
        self,
        classifier: Classifier,
        *,
        flip: bool,
        maximum_side: int,
        dtype: Literal["float16", "float32"],
        budget: int,
        keep: Iterable[str],
    ) -> None:
        self.classifier = classifier
        self.flip = flip
        self.maximum_side = maximum_side
        self.dtype = DTYPES[dtype]
        self.budget = budget
        self.keep = frozenset(keep)
        self.used = 0
        self._kept: dict[tuple[str, float], Tensor] = {}

    @torch.inference_mode()
    def pairs(self, item: Item, scales: Sequence[float]) -> Iterator[FeaturePair]:
        """Features (C, h, w) of an image and its mirror at each scale, float32.

        Raises:
            ImageError: if the image cannot be read.
            PrototypeError: if features hold NaN or Inf, or are too large for half precision.
        """
        image = None
        for scale in scales:
            stacked = self._kept.get((item.id, scale))
            if stacked is None:
                if image is None:
                    image = limit_long_side(read_image(item.image), self.maximum_side)
                stacked = self._compute(item, image, scale)
                self._offer(item.id, scale, stacked)
            full = stacked.to(self.classifier.device).float()
            yield FeaturePair(full[0], full[1] if self.flip else None)

    def _compute(self, item: Item, image: NDArray[np.uint8], scale: float) -> Tensor:
        try:
            (pair,) = image_pyramid(self.classifier, image, (scale,), flip=self.flip)
        except PrototypeError as error:
            raise PrototypeError(f"image {item.id!r}: {error}") from None
        parts = [part for part in pair if part is not None]
        stacked = torch.stack(parts).to(self.dtype)
        if not bool(torch.isfinite(stacked).all()):
            raise PrototypeError(
                f"the features of image {item.id!r} are too large for half precision; set "
                "maps.features to float32"
            )
        return stacked

    def _offer(self, name: str, scale: float, stacked: Tensor) -> None:
        size = stacked.numel() * stacked.element_size()
        if name not in self.keep or self.used + size > self.budget:
            return
        # In the machine's memory: a quarter of that may be more than a GPU has.
        self._kept[name, scale] = stacked.cpu()
        self.used += size


def default_budget() -> int:
    """A quarter of the memory that this process may use, in bytes.

    That is the machine's, or less where a container or a batch system has set a limit.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *container_limits()]) // 4


def container_limits(
    membership: Path = Path("/proc", "self", "cgroup"), root: Path = Path("/sys", "fs", "cgroup")
) -> list[int]:
    """Memory limits, in bytes, of the Linux control groups that this process is in; may be empty.

    Args:
        membership: names the groups, a line ``number:controllers:path`` each.
        root: of the groups' files: ``memory.max`` (version 2), or
            ``memory/.../memory.limit_in_bytes`` (version 1).
    """
    try:
        lines = membership.read_text("utf-8").splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        # A limit of any group above holds too. Inside a container the path may be that of the
        # host, which is not there, and the container's own group is the root.
        inner = top / group.lstrip("/")
        for folder in (inner, *inner.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                limits.append(int((folder / name).read_text("utf-8")))
            if folder == top:
                break
    return limits
