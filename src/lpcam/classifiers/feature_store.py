"""Features of the images of a run: pyramids of images, and a store that stages share."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from lpcam.classifiers.classifier import Classifier
from lpcam.classifiers.early_layers import Tap
from lpcam.classifiers.engines import Precision
from lpcam.classifiers.features import FeaturePair, all_finite, features_of
from lpcam.data.dataset import Item
from lpcam.data.images import limit_long_side, resize_image
from lpcam.data.resize import scaled_size
from lpcam.runtime.errors import PrototypeError
from lpcam.runtime.settings import Section

DTYPES = {"float16": torch.float16, "float32": torch.float32}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FeatureSettings(Section):
    """How the features of images are computed and stored."""

    features: Literal["float16", "float32"] = "float16"
    """Precision in which features are stored. float16 halves the memory."""
    precision: Precision = "float32"
    """Precision of the backbone's passes. The others are faster where the hardware supports them,
    and change maps by more than rounding (docs/performance.md)."""
    maximum_side: Annotated[int, Field(ge=16)] = 1024
    """Maximum long side, in pixels; longer images are shrunk to it and their maps enlarged."""


def image_pyramid(
    classifier: Classifier,
    images: NDArray[np.uint8],
    scales: Sequence[float],
    *,
    flip: bool,
    precision: torch.dtype | None = None,
) -> Iterator[FeaturePair]:
    """Features (B, C, h, w) of RGB images (B, H, W, 3) at each scale, by Pillow's bicubic."""
    height, width = images.shape[1:3]
    for scale in scales:
        size = scaled_size(height, width, scale)
        resized = images if size == (height, width) else [resize_image(i, size) for i in images]
        tensor = torch.stack([classifier.preprocessing(image) for image in resized])
        tensor = tensor.to(classifier.device)
        yield features_of(classifier, tensor, flip=flip, precision=precision)


@contextmanager
def naming(items: Sequence[Item]) -> Iterator[None]:
    """Put the images' names before the message of a PrototypeError."""
    try:
        yield
    except PrototypeError as error:
        names = ", ".join(repr(item.id) for item in items)
        raise PrototypeError(f"image {names}: {error}") from None


class FeatureStore:
    """Features of images at several scales, from memory or the backbone; thread-safe.

    ``early`` are names of early layers, whose maps a pass at scale 1 gives too; ``folded`` gives
    the copy of the classifier that is used, run by an engine perhaps.
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
        precision: Precision = "float32",
        early: Sequence[str] = (),
        folded: Callable[[Classifier], Classifier] = Classifier.folded,
    ) -> None:
        self.classifier = folded(classifier)
        self._tap = Tap(self.classifier.backbone, early) if early else None
        self.flip = flip
        self.maximum_side = maximum_side
        self.dtype = DTYPES[dtype]
        self.budget = budget
        self.keep = frozenset(keep)
        self.precision = PRECISIONS[precision]
        self.used = 0
        self.passes = 0  #: Images that went through the backbone, each with its mirror, at a scale.
        self.pooled: dict[tuple[str, int | None, bool], Tensor] = {}
        """Pooled features (V, C) of an image with a long side, mirrored or not, for another run."""
        self._kept: dict[tuple[str, float | str], Tensor] = {}
        self._lock = threading.Lock()

    def unmirrored(self) -> FeatureStore:
        """This store if it holds features, else one without mirror images, twice as fast."""
        if self.used:
            return self
        twin = copy.copy(self)
        twin.flip, twin._kept, twin._lock = False, {}, threading.Lock()
        return twin

    @torch.inference_mode()
    def pairs(self, items: Sequence[Item], scales: Sequence[float]) -> Iterator[FeaturePair]:
        """Float32 features (B, C, h, w) of B images of equal size and of mirrors at each scale."""
        images = None
        for scale in scales:
            kept = [self._kept.get((item.id, scale)) for item in items]
            stacked = [one for one in kept if one is not None]
            if len(stacked) < len(items):
                images = self._read(items) if images is None else images
                stacked, _ = self._compute(images, scale, items)
                for item, one in zip(items, stacked, strict=True):
                    self._offer(item.id, scale, one)
            yield self._pair(stacked)

    @torch.inference_mode()
    def early(self, items: Sequence[Item]) -> list[FeaturePair]:
        """Float32 features (B, C, h, w) of B images of equal size at scale 1, of each early layer.

        There is one pair for each early layer; none if the store was made without any.
        """
        layers = () if self._tap is None else self._tap.layers
        places = [(item.id, name) for name in layers for item in items]
        found = {place: one for place in places if (one := self._kept.get(place)) is not None}
        if len(found) < len(places):
            _, found = self._compute(self._read(items), 1.0, items)
        return [self._pair([found[item.id, name] for item in items]) for name in layers]

    def _read(self, items: Sequence[Item]) -> NDArray[np.uint8]:
        return np.stack([limit_long_side(item.read(), self.maximum_side) for item in items])

    def _pair(self, stacked: Sequence[Tensor]) -> FeaturePair:
        """Features of a batch from those of each image and its mirror image, (1 or 2, C, h, w)."""
        full = torch.stack([*stacked]).to(self.classifier.device).float()
        return FeaturePair(full[:, 0], full[:, 1] if self.flip else None)

    def fresh(self, images: NDArray[np.uint8], scale: float, *, flip: bool) -> FeaturePair:
        """Features (B, C, h, w) of RGB images (B, H, W, 3) at a scale, by a counted pass."""
        with self._lock:
            self.passes += len(images)
        precision = self.precision
        one = (scale,)
        return next(image_pyramid(self.classifier, images, one, flip=flip, precision=precision))

    def _compute(
        self, images: NDArray[np.uint8], scale: float, items: Sequence[Item]
    ) -> tuple[list[Tensor], dict[tuple[str, str], Tensor]]:
        """Features of images, and those of early layers, which are offered."""
        with naming(items):
            pair = self.fresh(images, scale, flip=self.flip)
            stacked = torch.stack([part.to(self.dtype) for part in pair if part is not None], dim=1)
            finite, found = all_finite(stacked), dict[tuple[str, str], Tensor]()
            tap = self._tap if scale == 1.0 else None
            maps = [] if tap is None else tap.take(images.shape[1:3])
            for name, values in zip(tap.layers if tap else (), maps, strict=True):
                views = values.to(self.dtype).reshape(-1, len(images), *values.shape[1:])
                finite = finite and all_finite(views)
                for item, one in zip(items, views.transpose(0, 1), strict=True):
                    found[item.id, name] = one
                    self._offer(item.id, name, one)
            if not finite:
                raise PrototypeError(
                    "the features are too large for half precision; set maps.features to float32"
                )
        return list(stacked), found

    def _offer(self, name: str, scale: float | str, stacked: Tensor) -> None:
        """Keep features at a scale, or of an early layer, if there is room."""
        size = stacked.numel() * stacked.element_size()
        with self._lock:
            known = (name, scale) in self._kept
            if known or name not in self.keep or self.used + size > self.budget:
                return
            self.used += size
            # On the CPU, because the budget is one of main memory. A copy, because a row of a batch
            # would keep the whole batch.
            self._kept[name, scale] = stacked.to("cpu", copy=True)
