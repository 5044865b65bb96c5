"""Any image classifier as a source of feature maps and class rows, found by structure and checked.

:func:`wrap` passes two random images through the model and follows its logits back: to the linear
layer that gives them, to the vector that this layer reads, and to the feature map whose mean (or
whose class token) is that vector. A norm between the two is folded into the rows. Nothing about a
model's family is known here; what is found is accepted because the numbers agree, else refused.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcam.errors import ClassifierError
from lpcam.finder import Finder, Pool, class_names
from lpcam.storage import digest_json, tensor_bytes
from lpcam.structure import (
    Linear,
    Norm,
    Place,
    Record,
    device_of,
    dtype_of,
    grid_of,
    plainly,
    record_pass,
    undisturbed,
    unwrap,
    without_tf32,
)

__all__ = [
    "PROBE_SIZES",
    "FeatureLayer",
    "Head",
    "Pool",
    "WrappedModel",
    "class_names",
    "grid_of",
    "undisturbed",
    "unwrap",
    "wrap",
]

Layer = str | nn.Module
FeatureLayer = Layer | Callable[[Tensor], Any]
Head = Layer | tuple[Tensor, Tensor | None]

PROBE_SIZES = ((97, 131), (104, 136), (112, 144), (98, 126), (96, 160), (224, 448))
"""Tried in turn, none of them square. The common divisor (1, 8, 16, 14, 32, 224) of the first that
the model takes is the multiple that its sides must have."""
FALLBACK_SIDE = 224
"""Of a model that takes no probe size and does not say which it takes."""


# -- The wrapped model -------------------------------------------------------------------------


class WrappedModel:
    """A model of the user's with the place of its feature map and the rows of its head.

    It neither owns nor moves the model, and reads its weights at each call: later changes of them
    count. Made by :func:`wrap`.

    Attributes:
        model: the user's, untouched.
        classes: the N names.
        pool: ``"mean"``: logits are linear in the mean of the map. ``"token"``: they are linear in
            the class token, and the map is that of the patch tokens.
        found: in words, which layer gives the map, which the logits, and what lies between.
        channels_in: of an image.
        fixed_size: (H, W) of the only images that the model takes; None: it takes others too.
        multiple: of which the sides of an image must be multiples.
        output: what the model itself gives: ``"logits"``, ``"sigmoid"``, ``"softmax"`` or ``"log
            softmax"`` of them; ``"features"`` if it gives none.
        core: the model without the wrappers that :func:`unwrap` takes off.
        place: the layer of the map and how its output is read.
        norms: those between the pooled vector and the head, the last one first; their weights are
            in the rows, their divisions in :meth:`divided`.
        probe_size: (H, W) of the random images by which all this was found.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Place,
        head: Linear | None,
        norms: Sequence[Norm],
        classes: Sequence[str],
        *,
        found: str,
        channels_in: int,
        fixed_size: tuple[int, int] | None,
        multiple: int,
        output: str,
        probe_size: tuple[int, int],
    ) -> None:
        self.model = model
        self.classes = tuple(classes)
        self.pool: Pool = "mean" if source.token is None else "token"
        self.found = found
        self.channels_in = channels_in
        self.fixed_size = fixed_size
        self.multiple = multiple
        self.output = output
        self.core = unwrap(model)
        self.probe_size = probe_size
        self.place = source
        self._head = head
        self.norms = tuple(norms)
        self._new_head = False

    def __repr__(self) -> str:
        return (
            f"WrappedModel({type(self.core).__name__}, {len(self.classes)} classes: {self.found})"
        )

    @property
    def needs_head(self) -> bool:
        """Whether the classes have no rows yet, and a linear head is to be fitted."""
        return self._head is None

    @property
    def new_head(self) -> bool:
        """Whether the rows are those of :meth:`with_head`."""
        return self._new_head

    @property
    def weight(self) -> Tensor:
        """(N, C) rows w_n for the map of :meth:`features`, norms folded in; detached.

        Raises:
            ClassifierError: if a head is still to be fitted.
        """
        return self._rows()[0]

    @property
    def bias(self) -> Tensor | None:
        """(N,), or None."""
        return self._rows()[1]

    @property
    def device(self) -> torch.device:
        return device_of(self.core)

    @property
    def dtype(self) -> torch.dtype:
        """Of the images that the model takes."""
        return dtype_of(self.core)

    def _rows(self) -> tuple[Tensor, Tensor | None]:
        if self._head is None:
            raise ClassifierError(
                "this model has no linear head for "
                f"{', '.join(self.classes[:5])}{', ...' if len(self.classes) > 5 else ''} yet; "
                "LPCAM(model, classes=[...]).fit(loader) fits one"
            )
        with plainly(self.device):
            weight, bias = self._head.rows()
            weight = weight.to(self.device)
            bias = None if bias is None else bias.to(self.device)
            for norm in self.norms:
                weight, bias = norm.fold(weight, bias)
            return weight, bias

    def features(self, images: Tensor) -> Tensor:
        """The map whose products with the rows are the CAM of equation 1.

        The model runs in evaluation mode without gradients, in its own precision whatever the
        caller's autocast, and is left as it was.

        Args:
            images: (B, c, H, W), normalised as the model expects; brought to its device and dtype.

        Returns:
            (B, C, h, w) on the model's device, float32 (float64 of such a model). With a norm after
            the pooling it is divided by the size of each image's own pooled vector.

        Raises:
            ClassifierError: if the images do not fit the model.
        """
        raw = self._raw(images)
        with torch.no_grad(), torch.autocast(raw.device.type, enabled=False):
            return self.features_of(raw, (images.shape[-2], images.shape[-1]))

    def features_of(self, raw: Tensor, size: tuple[int, int]) -> Tensor:
        """The map (B, C, h, w) of what the layer of :attr:`place` gave for images (H, W).

        :meth:`features` without the pass: differentiable, and in the caller's grad mode.

        Args:
            raw: the layer's output, float32 or float64.
            size: (H, W) of the images.
        """
        if self.place.token is not None:
            return self.place.map(self.divided(raw), size)
        features = self.place.map(raw, size)
        for norm in self.norms:
            if norm.kind != "affine":
                features = features / norm.divide(features.mean((-2, -1)))[..., None, None]
        return features

    def logits(self, images: Tensor) -> Tensor:
        """Logits (B, N) as the model's own: the head on the mean of the map or the class token.

        Raises:
            ClassifierError: if the images do not fit the model.
        """
        weight, bias = self._rows()
        raw = self._raw(images)
        with torch.no_grad(), torch.autocast(raw.device.type, enabled=False):
            vectors = self.divided(self.place.vector(raw))
            return F.linear(vectors, weight.to(vectors), None if bias is None else bias.to(vectors))

    def with_head(self, weight: Tensor, bias: Tensor | None = None) -> WrappedModel:
        """The same model with a linear head of one's own on the map.

        Args:
            weight: (N, C).
            bias: (N,), or None.

        Raises:
            ValueError: if there is not one row a class.
        """
        if weight.ndim != 2 or weight.shape[0] != len(self.classes):
            raise ValueError(
                f"expected a weight of {len(self.classes)} rows, got {tuple(weight.shape)}"
            )
        source = replace(self.place, token=None)
        with torch.inference_mode(False):
            tensors = weight.detach().clone(), None if bias is None else bias.detach().clone()
        made = WrappedModel(
            self.model,
            source,
            Linear(tensors=tensors),
            (),
            self.classes,
            found=f"map: {source}; pooled by its mean; head: a linear layer of its own",
            channels_in=self.channels_in,
            fixed_size=self.fixed_size,
            multiple=self.multiple,
            output="features",
            probe_size=self.probe_size,
        )
        made._new_head = True
        return made

    def fingerprint(self) -> str:
        """32 hex digits that change with any weight, the classes, or the place of the map.

        Where a callable gives the map, its place is told by what it gives for a fixed image.
        """
        digest = hashlib.blake2b(digest_size=16)
        place = {
            field: getattr(self.place, field)
            for field in ("layout", "prefix", "stride", "relu", "token")
        }
        if isinstance(self.place.layer, nn.Module):
            place |= {"layer": self.place.name, "call": self.place.number}
        else:
            place["signs"] = self._signs()
        head = None if self._head is None or self._head.module is None else self._head.name
        description = {
            "classes": list(self.classes),
            "place": place,
            "norms": [[norm.kind, norm.name, norm.epsilon] for norm in self.norms],
            "head": head,
        }
        digest.update(digest_json(description).encode())
        tensors = dict(self.core.state_dict())
        if self._head is not None and self._head.tensors is not None:
            tensors["head weight"], bias = self._head.tensors
            tensors.update({} if bias is None else {"head bias": bias})
        for name, tensor in sorted(tensors.items()):
            if isinstance(tensor, Tensor):
                digest.update(name.encode())
                digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    def _signs(self) -> str:
        """A map in 64 signs, which other maps do not share and rounding does not change."""
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(1, self.channels_in, *self.probe_size, generator=generator)
        with plainly(self.device):
            features = self.features(image)[0].cpu().double()
        features = (features - features.mean()).flatten()
        signs = ""
        for _ in range(64):
            direction = torch.randn(features.shape, generator=generator, dtype=torch.float64)
            signs += "+" if float(features @ direction) > 0 else "-"
        return f"{signs} {features.numel()}"

    def divided(self, vectors: Tensor) -> Tensor:
        """Vectors (..., C) divided by the size that each norm between map and head gives them."""
        for norm in self.norms:
            vectors = vectors / norm.divide(vectors)
        return vectors

    def _raw(self, images: Tensor) -> Tensor:
        self._check(images)
        try:
            with torch.autocast(self.device.type, enabled=False):
                return self.place.raw(self.core, images.to(self.device, self.dtype))
        except (AssertionError, RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ClassifierError(
                f"the model {type(self.core).__name__} cannot take images of "
                f"{tuple(images.shape)}: {error}"
            ) from error

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != self.channels_in:
            raise ClassifierError(
                f"expected images (B, {self.channels_in}, H, W), got {tuple(images.shape)}"
            )
        size = (images.shape[-2], images.shape[-1])
        if self.fixed_size is not None and size != self.fixed_size:
            raise ClassifierError(
                f"the model {type(self.core).__name__} takes images of {self.fixed_size[0]} x "
                f"{self.fixed_size[1]} pixels alone, got {size[0]} x {size[1]}; resize them, and "
                "map at the one scale with settings=None or scales=(1.0,); some models take any "
                "size with an argument of their maker (timm: dynamic_img_size=True)"
            )


# -- Finding it --------------------------------------------------------------------------------


def wrap(
    model: nn.Module,
    *,
    feature_layer: FeatureLayer | None = None,
    classifier: Head | None = None,
    classes: Sequence[str] | None = None,
    pool: Pool | None = None,
    example: Tensor | tuple[int, int] | None = None,
) -> WrappedModel:
    """Find a model's feature map and its linear head, and check that they give its logits.

    Two random images are passed through the model, which is left as it was. The layer whose output
    is the logits is followed back to the map whose mean it reads, through what may lie between:
    ReLU before the pooling; batch norm (in evaluation), layer norm, RMS norm or L2 normalisation
    after it.

    Args:
        model: an image classifier, or with ``classes`` a backbone; its logits may be a tensor, the
            first of a tuple, or the ``logits`` of an object. DataParallel, DistributedDataParallel
            and torch.compile are looked into.
        feature_layer: the layer of the map where none is to be looked for: its name, the module, or
            a callable from images to the map. (B, C, h, w), channels last, or tokens (B, T, C).
        classifier: the head where none is to be looked for: its name, the module (whose output then
            counts as the logits), or a pair (weight (N, C), bias (N,) or None).
        classes: names. As many as the logits: those of the model's own classes; by default those of
            its configuration, of ImageNet where timm knows the model, else numbers. If the model
            has no such head, a new one is to be fitted (:class:`lpcam.LPCAM` does).
        pool: ``"token"``: the head reads a class token, and its rows are taken on the patch tokens.
        example: images the model takes, or their size (H, W), if none of the common sizes will do.

    Raises:
        ClassifierError: if nothing was found; the message says what was, and what to pass.
    """
    if not isinstance(model, nn.Module):
        raise ClassifierError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if pool not in (None, "mean", "token"):
        raise ClassifierError(f"unknown pool {pool!r}; use 'mean' or 'token'")
    core = unwrap(model)
    layer = _layer(core, feature_layer, "feature_layer")
    given = classifier if isinstance(classifier, tuple) else _layer(core, classifier, "classifier")
    always = [one for one in (layer, given) if isinstance(one, nn.Module)]
    device = device_of(core)
    on_gpu = without_tf32() if device.type == "cuda" else nullcontext()
    with plainly(device), on_gpu:
        record, images, fixed, multiple = _probe(core, example, always)
        finder = Finder(core, record, images, layer, given, pool, classes)
        source, head, norms, names, found, output = finder.find()
    return WrappedModel(
        model,
        source,
        head,
        norms,
        names,
        found=found,
        channels_in=images.shape[1],
        fixed_size=fixed,
        multiple=multiple,
        output=output,
        probe_size=(images.shape[-2], images.shape[-1]),
    )


def _layer(model: nn.Module, given: Any, argument: str) -> Any:
    """A module by its name; what is none is handed on."""
    if isinstance(given, nn.Module):
        given = unwrap(given)
        if all(given is not module for module in model.modules()):
            raise ClassifierError(f"the module given as {argument} is no part of the model")
        return given
    if not isinstance(given, str):
        if given is not None and not callable(given):
            raise ClassifierError(f"{argument} cannot be {type(given).__name__}")
        return given
    modules = dict(model.named_modules())
    if given not in modules:
        near = difflib.get_close_matches(given, [n for n in modules if n], n=5, cutoff=0.3)
        raise ClassifierError(
            f"the model has no layer {given!r} for {argument}; near it are {', '.join(near)}"
            if near
            else f"the model has no layer {given!r} for {argument}"
        )
    return modules[given]


def _channels_in(model: nn.Module) -> int:
    """Channels of an image: those that the first convolution takes."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    config = getattr(model, "config", None)
    return int(getattr(config, "num_channels", 3))


def _pair(value: Any) -> tuple[int, int] | None:
    """A size (H, W) from what a configuration says."""
    if isinstance(value, int) and value > 0:
        return value, value
    if isinstance(value, (list, tuple)) and len(value) >= 2:
        height, width = value[-2:]
        if isinstance(height, int) and isinstance(width, int):
            return height, width
    return None


def _fixed_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Sizes that a model says it takes, the surest first."""
    said = [
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        getattr(getattr(model, "config", None), "image_size", None),
        getattr(model, "image_size", None),
        (getattr(model, "pretrained_cfg", None) or {}).get("input_size"),
        FALLBACK_SIDE,
    ]
    return list(dict.fromkeys(size for value in said if (size := _pair(value)) is not None))


def _probe(
    model: nn.Module, example: Tensor | tuple[int, int] | None, always: Sequence[nn.Module]
) -> tuple[Record, Tensor, tuple[int, int] | None, int]:
    """A recorded pass of two random images, the only size the model takes, and the multiple."""
    channels = _channels_in(model)
    sizes: list[tuple[tuple[int, int], bool]] = [(size, False) for size in PROBE_SIZES]
    sizes += [(size, True) for size in _fixed_sizes(model)]
    if isinstance(example, Tensor):
        if example.ndim not in (3, 4):
            raise ClassifierError(
                f"expected example images (B, c, H, W), got {tuple(example.shape)}"
            )
        channels = example.shape[-3]
        sizes = [((example.shape[-2], example.shape[-1]), True)]
    elif example is not None:
        height, width = example
        sizes = [((height, width), True)]
    device = device_of(model)
    first: Exception | None = None
    for size, only in sizes:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, channels, *size, generator=generator).to(device, dtype_of(model))
        try:
            record = record_pass(model, images, always)
        except Exception as error:  # a model may refuse a size in any way
            if isinstance(error, torch.OutOfMemoryError):
                raise
            first = first or error
            continue
        if not only:
            return record, images, None, math.gcd(*size)
        if example is None:
            return record, images, size, 1
        others = (other for other in PROBE_SIZES if _takes(model, images, other))
        if (other := next(others, None)) is not None:
            return record, images, None, math.gcd(*other)
        if _takes(model, images, (2 * size[0], 2 * size[1])):
            return record, images, None, math.gcd(*size)
        return record, images, size, 1
    tried = ", ".join(f"{h} x {w}" for (h, w), _ in sizes)
    raise ClassifierError(
        f"the model {type(model).__name__} took no image of {channels} channels; tried were {tried}"
        f". The first error was {type(first).__name__}: {' '.join(str(first).split()):.300}. Give "
        "example= images that it takes, or their size (H, W)"
    ) from first


def _takes(model: nn.Module, images: Tensor, size: tuple[int, int]) -> bool:
    """Whether the images pass at another size too."""
    resized = F.interpolate(images.float(), size=size).to(images)
    try:
        with undisturbed(model):
            model(resized)
    except Exception as error:  # a model may refuse a size in any way
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    return True
