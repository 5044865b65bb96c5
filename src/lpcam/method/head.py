"""LPCAM as the last layer of a network: logits and maps in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcam.classifiers.features import FeaturePair, single
from lpcam.classifiers.wrapped import WrappedModel
from lpcam.method.early import EarlyPrototypes, fuse
from lpcam.method.extractors import LPCAM
from lpcam.method.functional import GRID, NORM_EPSILON, strided

Normalize = Literal["max"]


class LPCAMHead(nn.Module):
    """Logits and LPCAM maps of a feature map.

    Args:
        weight, bias: (N, C) and (N,) of the linear layer that reads the mean of the feature map.
        vectors: (N, C), those of :meth:`lpcam.method.prototypes.Prototypes.vectors`, unchanged.
        normalize: ``"max"`` divides each map by its maximum (an all-zero map stays zero); None
            leaves equation 6's differences of cosines, from 0 to 2.
        early: prototypes of early layers, for maps LPCAM-E, which are always normalised.

    Example:
        >>> head = LPCAMHead(torch.eye(2), torch.eye(2))
        >>> logits, maps = head(torch.ones(1, 2, 3, 4), size=(48, 64))
        >>> logits.tolist(), tuple(maps.shape)
        ([[1.0, 1.0]], (1, 2, 48, 64))
    """

    weight: Tensor
    vectors: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        vectors: Tensor,
        bias: Tensor | None = None,
        *,
        normalize: Normalize | None = "max",
        early: EarlyPrototypes | None = None,
    ) -> None:
        super().__init__()
        given = [None if one is None else tuple(one.shape) for one in (weight, vectors, bias)]
        if weight.ndim != 2 or given[1] != given[0] or given[2] not in (None, (len(weight),)):
            raise ValueError(
                f"expected weight and vectors (N, C) and a bias (N,) or None, got {given}"
            )
        if normalize not in ("max", None):
            raise ValueError(f"unknown normalisation {normalize!r}; use 'max' or None")
        if early is not None and normalize is None:
            raise ValueError("maps LPCAM-E of early layers are normalised; use normalize='max'")
        self.normalize = normalize
        self._described = None if early is None else early.described()
        tensors: dict[str, Any] = {"weight": weight, "vectors": vectors, "bias": bias}
        for name, values in {**tensors, **({} if early is None else early.tensors())}.items():
            own = None if values is None else values.detach().clone()
            self.register_buffer(name.replace(".", "_"), own)

    @classmethod
    def from_lpcam(cls, lpcam: LPCAM, *, normalize: Normalize | None = "max") -> Self:
        """The head of a fitted LPCAM; PrototypeError if its weights changed since ``fit``."""
        prototypes, source = lpcam.prototypes_, lpcam.source_
        vectors = prototypes.vectors(with_context=lpcam.with_context).to(source.weight)
        dtype = source.dtype if isinstance(source, WrappedModel) else source.weight.dtype
        bias = source.bias if isinstance(source, WrappedModel) else source.head.bias
        head = cls(source.weight, vectors, bias, normalize=normalize, early=lpcam.early_)
        return head.to(source.weight.device, dtype)

    @property
    def early(self) -> EarlyPrototypes | None:
        """Prototypes of early layers, of this module's tensors; None: the maps are plain LPCAM."""
        if self._described is None:
            return None
        tensors = {name.replace("_", "."): values for name, values in self.named_buffers()}
        return EarlyPrototypes.of_file(tensors, self._described)

    def forward(
        self,
        features: Tensor,
        size: tuple[int, int] | None = None,
        pooled: Tensor | None = None,
        layers: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, N), and non-negative maps (B, N, h, w) or (B, N, H, W).

        Args:
            features: (B, C, h, w), before pooling.
            size: (H, W) to which maps are enlarged before they are normalised; None: not at all.
            pooled: (B, C), input of the linear layer; None: the mean of the features.
            layers: (B, C', h', w') of each early layer, if there are any; without a size the maps
                have that of the first.
        """
        maps, early = self.activation(features, size), self.early
        if early is not None and size is None:
            size = layers[0].shape[-2], layers[0].shape[-1]
            maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
        if self.normalize is not None:
            top = maps.amax((-2, -1), keepdim=True)
            maps = maps / torch.where(top > 0, top, torch.ones_like(top))
        if early is not None and size is not None and early.fusion != "none":
            pairs = [FeaturePair(single(layer), None) for layer in layers]
            found = early.combined(pairs, range(len(self.weight)), size)
            maps = fuse(maps, found.to(maps), early.fusion)
        pooled = features.mean((-2, -1)) if pooled is None else pooled
        return F.linear(pooled, self.weight, self.bias), maps

    def activation(self, features: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Maps of equation 6 (1 for early layers on CAM), not normalised; see :meth:`forward`."""
        if features.ndim != 4 or features.shape[1] != self.vectors.shape[1]:
            raise ValueError(
                f"expected features (B, {self.vectors.shape[1]}, h, w), got {features.shape}"
            )
        # float32: in half precision the squares would overflow
        wide = torch.promote_types(features.dtype, torch.float32)
        norm = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=wide)
        unit, rows = (features / norm.clamp_min(NORM_EPSILON)).to(features.dtype), self.vectors
        if self._described is not None and self._described["base"] == "CAM":
            unit, rows = features, self.weight
        maps = F.conv2d(unit, rows[:, :, None, None]).relu()
        if size is None:
            return maps
        height, width = size
        whole = (strided(height, GRID) * GRID, strided(width, GRID) * GRID)
        maps = F.interpolate(maps, size=whole, mode="bilinear", align_corners=False)
        return maps[..., :height, :width]
