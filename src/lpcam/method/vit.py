"""Options for plain vision transformers: maps spread by attention, features without position bias.

Self-attention is recomputed from the queries and keys of a pass, so any model works that calls
torch's attention or softmax over the patches of its map: those of timm, Hugging Face, torchvision.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lpcam.classifiers.features import FeaturePair, Source, tensor_pyramid
from lpcam.classifiers.wrapped import WrappedModel
from lpcam.method.objects import component_boxes
from lpcam.runtime.errors import ClassifierError
from lpcam.runtime.files import digest_tensors

NOISE_IMAGES = 8  #: Number of noise images whose mean response is the position bias.
BALANCING = 10  #: Number of divisions by the row sums and by the column sums.
KEPT_SIZES = 8  #: Number of image sizes whose position bias is kept.


def spread_by_attention(
    maps: Tensor, attention: Tensor, *, power: int = 2, threshold: float = 0.4
) -> Tensor:
    """Spread maps to places that attend to each other, inside boxes around their high values.

    The attention is divided by its row and column sums in turn, averaged with its transpose and
    divided by its row sums, so that a constant map stays (after CLIP-ES, section 3.3). Boxes
    enclose the connected places from a share of a map's maximum on; the map ends there.

    ``maps`` (..., N, h, w) are not negative, ``attention`` is (..., P, P) between P = h * w places,
    applied ``power`` times. A larger ``threshold``, that share, gives smaller boxes.
    """
    affinity = attention.float()
    for _ in range(BALANCING):
        affinity = affinity / affinity.sum(-1, keepdim=True)
        affinity = affinity / affinity.sum(-2, keepdim=True)
    affinity = affinity + affinity.mT
    affinity = affinity / affinity.sum(-1, keepdim=True)
    top = maps.amax((-2, -1), keepdim=True)
    high = ((maps >= threshold * top) & (top > 0)).flatten(0, -3).cpu().numpy()
    inside = torch.zeros(high.shape)
    for plane, mask in zip(inside, high, strict=True):
        for left, upper, right, lower in component_boxes(mask).tolist():
            plane[upper:lower, left:right] = 1
    inside = inside.reshape(maps.shape).to(maps)
    spread = (maps * inside).float().flatten(-2)
    for _ in range(power):
        spread = spread @ affinity.mT
    return spread.reshape(maps.shape).to(maps.dtype) * inside


def without_position_bias(features: Tensor, noise: Tensor) -> Tensor:
    """Features (..., C, h, w) minus what their place alone adds to them.

    The bias is the mean of the features (M, C, h, w) of noise images, minus its mean over places,
    so the mean of the features, which the classifier reads, stays (after INSID3).
    """
    bias = noise.mean(0)
    return features - (bias - bias.mean((-2, -1), keepdim=True))


@dataclass(eq=False, repr=False)
class PositionFree(WrappedModel):
    """A wrapped model whose features have no position bias, which is measured once for a size."""

    _noise: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, source: Source) -> PositionFree:
        """The same model; ClassifierError if it is a classifier of this package."""
        if not isinstance(source, WrappedModel):
            raise ClassifierError("remove_position_bias needs the bare model or wrap(model)")
        return source if isinstance(source, cls) else cls(**vars(source))

    def features(self, images: Tensor) -> Tensor:
        """The map (B, C, h, w) without its position bias."""
        size = tuple(images.shape[-2:])
        if size not in self._noise:  # before the images, whose attention is what is seen last
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(NOISE_IMAGES, self.channels_in, *size, generator=generator)
            if len(self._noise) >= KEPT_SIZES:
                self._noise.clear()
            self._noise[size] = super().features(noise).mean(0, keepdim=True)
        return without_position_bias(super().features(images), self._noise[size])

    def fingerprint(self, classes: Sequence[str] | None = None) -> str:
        """32 hex digits, others than those of the model with its position bias."""
        return digest_tensors({}, {"of": super().fingerprint(classes), "noise": NOISE_IMAGES})


def attended_pyramid(
    source: Source, images: Tensor, scales: Sequence[float], *, flip: bool, blocks: int
) -> Iterator[FeaturePair]:
    """As :func:`tensor_pyramid`, with the mean attention of the last ``blocks`` blocks; 0: none."""
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 0:
        raise ValueError(f"attention_blocks must be an integer of at least 0, got {blocks!r:.60}")
    pyramid, recorder = tensor_pyramid(source, images, scales, flip=flip), _Recorder(blocks)
    for _ in scales:
        if not blocks:
            yield from pyramid
            return
        recorder.seen.clear()
        with recorder:
            pair = next(pyramid)
        yield pair._replace(attention=recorder.attention(source, pair))


class _Recorder(TorchFunctionMode):
    """Self-attention of a pass: how to compute the last weights (B, T, T) for each T."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.seen: dict[int, deque[Callable[[], Tensor]]] = defaultdict(partial(deque, (), blocks))

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, whole = kwargs or {}, func is F.multi_head_attention_forward
        if whole:
            kwargs = {**kwargs, "need_weights": True, "average_attn_weights": False}
        found: Any = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.seen[found.shape[-2]].append(partial(_weights, *args, **kwargs))
        elif whole or (getattr(func, "__name__", "") == "softmax" and found.ndim == 4):
            weights = found[1] if whole else found
            self.seen[weights.shape[-2]].append(partial(torch.mean, weights, 1))
        return found

    def attention(self, source: Source, pair: FeaturePair) -> Tensor:
        """The mean (B, P, P) over the kept calls, between the P places of the map."""
        height, width = pair.features.shape[-2:]
        count = len(pair.features) * (1 if pair.mirrored is None else 2)
        prefix = source.map_layer.prefix if isinstance(source, WrappedModel) else 0
        tokens = height * width + prefix
        calls = self.seen.get(tokens, ())
        found = [weights for call in calls if (weights := call()).shape == (count, tokens, tokens)]
        if len(found) < self.blocks:
            raise ClassifierError(
                f"attention_blocks={self.blocks} needs that many blocks that attend over the whole "
                f"map ({height} x {width} places, {prefix} prefix tokens); {len(found)} were seen. "
                "Give a smaller number, or 0 for models of windows or convolutions"
            )
        mean = torch.stack(found).float().mean(0)[:, prefix:, prefix:]
        if pair.mirrored is None:
            return mean
        own, other = mean.reshape(-1, *(height, width) * 2).chunk(2)
        return ((own + other.flip(2, 4)) / 2).flatten(3).flatten(1, 2)


def _weights(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **more: Any
) -> Tensor:
    """Attention (B, T, T), averaged over heads, from the arguments of torch's function."""
    scale, mask = more.get("scale"), attn_mask
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)  # heads may share keys
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(scores).masked_fill(~mask, -torch.inf)
    weights: Tensor = (scores if mask is None else scores + mask).float().softmax(-1).mean(1)
    return weights
