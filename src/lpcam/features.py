"""Features of the images of a run, computed once and kept within a memory budget.

Every feature is rounded whether it is kept or not, so the budget changes the time of a run and
never its bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpcam.classifier import Classifier
from lpcam.data.images import limit_long_side, read_image
from lpcam.data.items import Item
from lpcam.errors import PrototypeError
from lpcam.extract import FeaturePair, all_finite, image_pyramid

DTYPES = {"float16": torch.float16, "float32": torch.float32}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FeatureStore:
    """Features of images at several scales, from memory or from the backbone; thread-safe.

    The backbone's batch norms are folded into its convolutions when the store is made; later
    changes of the classifier's weights have no effect.

    Args:
        classifier: gives the backbone.
        flip: give features of the mirrored image too.
        maximum_side: longest side in pixels; larger images are resized to it first.
        dtype: precision in which features are kept; results are float32.
        budget: bytes that may be kept in memory.
        keep: ids of the images that will be requested again; others are never kept.
        precision: precision of the backbone's passes; other than float32 they run under autocast.
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
        precision: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        self.classifier = classifier.folded()
        self.flip = flip
        self.maximum_side = maximum_side
        self.dtype = DTYPES[dtype]
        self.budget = budget
        self.keep = frozenset(keep)
        self.precision = PRECISIONS[precision]
        self.used = 0
        self._kept: dict[tuple[str, float], Tensor] = {}
        self._lock = threading.Lock()

    @torch.inference_mode()
    def pairs(self, items: Sequence[Item], scales: Sequence[float]) -> Iterator[FeaturePair]:
        """Features (B, C, h, w) of images and their mirrors at each scale, float32.

        Args:
            items: B images of equal size.

        Raises:
            ImageError: if an image cannot be read.
            PrototypeError: if features hold NaN or Inf, or are too large for half precision.
        """
        images = None
        for scale in scales:
            kept = [self._kept.get((item.id, scale)) for item in items]
            stacked = [one for one in kept if one is not None]
            if len(stacked) < len(items):
                if images is None:
                    images = np.stack(
                        [limit_long_side(read_image(i.image), self.maximum_side) for i in items]
                    )
                stacked = self._compute(items, images, scale)
                for item, one in zip(items, stacked, strict=True):
                    self._offer(item.id, scale, one)
            full = torch.stack(stacked).to(self.classifier.device).float()
            yield FeaturePair(full[:, 0], full[:, 1] if self.flip else None)

    def _compute(
        self, items: Sequence[Item], images: NDArray[np.uint8], scale: float
    ) -> list[Tensor]:
        names = ", ".join(repr(item.id) for item in items)
        try:
            (pair,) = image_pyramid(
                self.classifier, images, (scale,), flip=self.flip, precision=self.precision
            )
        except PrototypeError as error:
            raise PrototypeError(f"image {names}: {error}") from None
        parts = [part.to(self.dtype) for part in pair if part is not None]
        stacked = torch.stack(parts, dim=1)
        if not all_finite(stacked):
            raise PrototypeError(
                f"the features of image {names} are too large for half precision; set "
                "maps.features to float32"
            )
        return list(stacked)

    def _offer(self, name: str, scale: float, stacked: Tensor) -> None:
        size = stacked.numel() * stacked.element_size()
        with self._lock:
            known = (name, scale) in self._kept
            if known or name not in self.keep or self.used + size > self.budget:
                return
            self.used += size
            # On the CPU, because the budget is one of main memory. A copy, because a row of a batch
            # would keep the whole batch.
            self._kept[name, scale] = stacked.to("cpu", copy=True)
