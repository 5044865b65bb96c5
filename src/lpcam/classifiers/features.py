"""Feature maps of normalised images at several scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcam.classifiers.classifier import Classifier
from lpcam.classifiers.early_layers import SIDE, Tap, early_layers
from lpcam.classifiers.wrapped import WrappedModel
from lpcam.data.resize import scaled_size
from lpcam.runtime.errors import ClassifierError, PrototypeError

Source = Classifier | WrappedModel
"""A classifier that gives a feature map and the rows of its classes."""
SAMPLED = 8  #: Values of each weight that :func:`weights_state` reads.


class FeaturePair(NamedTuple):
    """Features of one scale, of the image and of the mirrored image."""

    features: Tensor  #: (..., C, h, w)
    mirrored: Tensor | None  #: (..., C, h, w), or None without flip


def image_of(pair: FeaturePair, place: int = 0) -> FeaturePair:
    """The features (C, h, w) of one image of a batch."""
    return FeaturePair._make(None if part is None else part[place] for part in pair)


def tensor_pyramid(
    source: Source, images: Tensor, scales: Sequence[float], *, flip: bool
) -> Iterator[FeaturePair]:
    """Features at each scale; resized sides become multiples of what the model requires."""
    multiple = source.multiple if isinstance(source, WrappedModel) else 1
    own = tuple(images.shape[-2:])
    for scale in scales:
        resized, size = images, scaled_size(own[0], own[1], scale)
        if size != own:
            height, width = (max(1, round(side / multiple)) * multiple for side in size)
            size = height, width
        if size != own:
            resized = F.interpolate(
                single(images), size=size, mode="bicubic", align_corners=False, antialias=True
            ).to(images.dtype)
        try:
            yield features_of(source, resized, flip=flip)
        except ClassifierError as error:
            if size == own:
                raise
            raise ClassifierError(
                f"at scale {scale:g} ({size[0]} x {size[1]}): {error}; leave the scale out of "
                "settings.scales"
            ) from error


def layered(source: Source) -> nn.Module:
    """The module whose layers are named: a classifier's backbone, or a wrapped model."""
    return source.backbone if isinstance(source, Classifier) else source.core


def early_layers_of(source: Source) -> tuple[str, ...]:
    """Names of the early layers of a source, as ``early_layers`` finds them."""
    size = source.probe_size if isinstance(source, WrappedModel) else (SIDE, SIDE)
    return early_layers(layered(source), size, source.channels_in)


def tapped_pyramid(
    source: Source,
    pyramid: Callable[[Sequence[float]], Iterator[FeaturePair]],
    scales: Sequence[float],
    layers: Sequence[str],
    size: tuple[int, int],
) -> tuple[Iterable[FeaturePair], list[FeaturePair]]:
    """Features at each scale, and those of early layers at scale 1, of a batch of images (H, W).

    ``pyramid`` gives the features at some scales, each by one pass, which gives the early layers
    too. Scale 1 is added for them where it is missing. Hooks are removed afterwards.
    """
    if not layers:
        return pyramid(scales), []  # one at a time
    pairs, early, wanted = [], list[FeaturePair](), with_scale_one(scales)
    with closing(Tap(layered(source), layers)) as tap:
        for scale, pair in zip(wanted, pyramid(wanted), strict=True):
            pairs.append(pair)
            if scale == 1.0:
                count = len(pair.features)
                views = [v.reshape(-1, count, *v.shape[1:]) for v in map(single, tap.take(size))]
                early = [FeaturePair._make((*view, None)[:2]) for view in views]
    return pairs[: len(scales)], early


def with_scale_one(scales: Sequence[float]) -> tuple[float, ...]:
    """The scales, and scale 1 after them if it is not among them."""
    return (*scales,) if 1.0 in scales else (*scales, 1.0)


def weights_state(source: Source) -> tuple[Any, ...]:
    """Values that change when a weight is written to or replaced, in about a millisecond."""
    model = source if isinstance(source, Classifier) else source.core
    places: list[Any] = []
    sampled: list[Tensor] = []
    for tensor in chain(model.parameters(), model.buffers()):
        version = 0 if tensor.is_inference() else tensor._version
        places.append((tensor.data_ptr(), version))
        # A few values too, since writes to ``weight.data`` count no version.
        if tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last):
            count = tensor.numel()
            step = max(1, count // SAMPLED)
            few = tensor.detach().as_strided((min(count, SAMPLED),), (step,))
            sampled.append(few.cpu().float())
    return *places, torch.cat(sampled or [torch.empty(0)]).numpy().tobytes()


def features_of(
    source: Source, images: Tensor, *, flip: bool, precision: torch.dtype | None = None
) -> FeaturePair:
    """Features of images (B, c, H, W), under autocast to ``precision`` if it is given."""
    stacked = torch.cat([images, images.flip(-1)]) if flip else images
    if isinstance(source, Classifier):
        # Convolutions on a CPU are a tenth faster in this layout, with the same results.
        layout = getattr(source.backbone, "layout", torch.channels_last)
        stacked = stacked.to(source.weight.dtype, memory_format=layout)
    else:
        stacked = stacked.contiguous()  # the model may call view
    with torch.autocast(images.device.type, precision, enabled=precision is not None):
        features = single(source.features(stacked))
    if not all_finite(features):
        raise PrototypeError(
            "the backbone gave NaN or Inf features for this image; check its weights and the "
            "preprocessing (mean and std)"
        )
    count = images.shape[0]
    return FeaturePair(features[:count], features[count:] if flip else None)


def single(values: Tensor) -> Tensor:
    """Convert half precision to float32; keep float32 and float64."""
    return values.float() if values.dtype.itemsize < torch.float32.itemsize else values


def all_finite(values: Tensor) -> bool:
    """Check that no value is NaN or Inf."""
    # A NaN or Inf makes the sum NaN or Inf; so does an overflow, which needs a second look.
    total = values.sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(values).all())


def full_precision(device: torch.device) -> torch.autocast:
    """Context without the caller's autocast."""
    return torch.autocast(device.type, enabled=False)
