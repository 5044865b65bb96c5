"""Any image classifier as a source of feature maps and class rows, found and checked in a pass."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lpcam.classifiers.linear import checked_names
from lpcam.classifiers.map_check import Figures, MapCheck
from lpcam.classifiers.probing import probe, quantised, refuse_compiled_form
from lpcam.classifiers.search import Finder, Pool
from lpcam.classifiers.tracing import (
    Linear,
    Reading,
    device_of,
    dtype_of,
    unwrap,
    without_grad_and_autocast,
    without_tf32,
)
from lpcam.runtime.errors import ClassifierError
from lpcam.runtime.files import digest_tensors

Layer = str | nn.Module
TargetLayer = Layer | Callable[[Tensor], Any]
Head = Layer | tuple[Tensor, Tensor | None]


@dataclass(eq=False, repr=False)
class WrappedModel(Reading):
    """A reference to a model, with its map layer and head; weights are read at every call."""

    model: nn.Module
    classes: tuple[str, ...]
    output: str
    """What the model gives: ``"logits"``, their ``"sigmoid"``, ``"softmax"`` or ``"log softmax"``;
    ``"features"`` if none of these."""
    channels_in: int  #: Channels of an image.
    fixed_size: tuple[int, int] | None
    """(H, W) of the only images that the model takes; None if it takes other sizes."""
    multiple: int  #: Number that the sides of an image must be multiples of.
    probe_size: tuple[int, int]  #: (H, W) of the random images of the search.
    figures: Figures  #: Of the check that the map is local.
    new_head: bool = False  #: Whether the head comes from :meth:`with_head`.

    def __repr__(self) -> str:
        name = type(self.core).__name__
        return f"WrappedModel({name}, {len(self.classes)} classes: {self.found})"

    @property
    def found(self) -> str:
        """Description of the layers that give the map and the logits, and of what lies between."""
        if self.head is None:
            return f"map: {self.map_layer}; {self.figures}; no head for the given classes yet"
        token = self.map_layer.token
        read = "pooled by its mean" if token is None else f"token {token} of it read"
        between = "".join(f", then {norm}" for norm in reversed(self.norms))
        parts = [f"map: {self.map_layer}", str(self.figures), read + between]
        parts.append(f"head: {'a new linear layer' if self.new_head else self.head}")
        if self.output not in ("logits", "features"):
            parts.append(f"the model gives the {self.output} of its logits")
        return "; ".join(parts)

    @property
    def core(self) -> nn.Module:
        """The model without the wrappers that :func:`unwrap` removes."""
        return unwrap(self.model)

    @property
    def pool(self) -> Pool:
        """``"token"`` if logits are linear in the class token, ``"mean"`` if in the map's mean."""
        return "mean" if self.map_layer.token is None else "token"

    @property
    def needs_head(self) -> bool:
        """Whether a linear head for the classes is still to be fitted."""
        return self.head is None

    @property
    def weight(self) -> Tensor:
        """(N, C) rows w_n for the map of :meth:`features`, norms folded in; detached."""
        return self._rows()[0]

    @property
    def bias(self) -> Tensor | None:
        return self._rows()[1]

    @property
    def device(self) -> torch.device:
        return device_of(self.core)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the images that the model takes."""
        return dtype_of(self.core)

    def _rows(self) -> tuple[Tensor, Tensor | None]:
        if self.head is None:
            raise ClassifierError(
                f"this model has no linear head for {', '.join(self.classes):.100} yet; "
                "LPCAM(model, classes=[...]).fit(loader) fits one"
            )
        with without_grad_and_autocast(self.device):
            return self.rows(self.device)

    def features(self, images: Tensor) -> Tensor:
        """The map (B, C, h, w) of images (B, c, H, W), whose products with the rows are the CAM."""
        raw = self._raw(images)
        with torch.no_grad(), torch.autocast(raw.device.type, enabled=False):
            return self.features_of(raw, _size(images))

    def features_of(self, raw: Tensor, size: tuple[int, int]) -> Tensor:
        """The map (B, C, h, w) of images (H, W) from the map layer's output; differentiable."""
        if self.map_layer.token is not None:
            return self.map_layer.map(self.divided(raw), size)
        features = self.map_layer.map(raw, size)
        for norm in self.norms:
            if norm.kind != "affine":
                features = features / norm.divide(features.mean((-2, -1)))[..., None, None]
        return features

    def logits(self, images: Tensor) -> Tensor:
        """The model's logits (B, N): the head on the mean of the map or on the class token."""
        self._rows()
        raw = self._raw(images)
        with torch.no_grad(), torch.autocast(raw.device.type, enabled=False):
            return self.logits_of(raw)

    def with_head(self, weight: Tensor, bias: Tensor | None = None) -> WrappedModel:
        """The same model with a copy of (N, C) rows and (N,) bias as head on the map's mean."""
        count = len(self.classes)
        if weight.ndim != 2 or weight.shape[0] != count:
            raise ValueError(f"expected a weight of {count} rows, got {tuple(weight.shape)}")
        with torch.inference_mode(False):
            tensors = weight.detach().clone(), None if bias is None else bias.detach().clone()
        return replace(
            self,
            map_layer=replace(self.map_layer, token=None),
            head=Linear(tensors=tensors),
            norms=(),
            output="features",
            new_head=True,
        )

    def fingerprint(self, classes: Sequence[str] | None = None) -> str:
        """32 hex digits that change with any weight or the map's layer; ``classes`` as in 0.1.0."""
        layer, head = self.map_layer, self.head
        fields = ("layout", "prefix", "stride", "relu", "token")
        place: dict[str, Any] = {field: getattr(layer, field) for field in fields}
        place |= {n: v for n in ("part", "batch_axis") if (v := getattr(layer, n))}
        if isinstance(layer.layer, nn.Module):
            place |= {"layer": layer.name, "call": layer.number}
        else:
            place["signs"] = self._signs()
        description = {
            **({} if classes is None else {"classes": list(classes)}),
            "place": place,
            "norms": [[norm.kind, norm.name, norm.epsilon] for norm in self.norms],
            "head": None if head is None or head.module is None else head.name,
        }
        tensors: dict[str, Any] = dict(self.core.state_dict())
        if head is not None and head.tensors is not None:
            tensors["head weight"], tensors["head bias"] = head.tensors
        tensors = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
        return digest_tensors(tensors, description)

    def _signs(self) -> str:
        """The map that a callable gives as 64 signs, which do not change by rounding."""
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(1, self.channels_in, *self.probe_size, generator=generator)
        with without_grad_and_autocast(self.device):
            features = self.features(image)[0].cpu().double()
        features = (features - features.mean()).flatten()
        signs = ""
        for _ in range(64):
            draw = torch.randn(features.shape, generator=generator, dtype=torch.float64)
            signs += "+" if float(features @ draw) > 0 else "-"
        return f"{signs} {features.numel()}"

    def _raw(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.channels_in:
            raise ClassifierError(
                f"expected images (B, {self.channels_in}, H, W), got {tuple(images.shape)}"
            )
        name, (height, width) = type(self.core).__name__, _size(images)
        if self.fixed_size not in (None, (height, width)):
            own = " x ".join(map(str, self.fixed_size or ()))
            raise ClassifierError(
                f"the model {name} takes only images of {own} pixels, got {height} x {width}; "
                "resize them, and map at one scale with settings=None or scales=(1.0,); some take "
                "any size with an argument of their constructor (timm: dynamic_img_size=True)"
            )
        try:
            with torch.autocast(self.device.type, enabled=False):
                return self.map_layer.raw(self.core, images.to(self.device, self.dtype))
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ClassifierError(
                f"the model {name} cannot take images of {tuple(images.shape)}: {error}"
            ) from error


def wrap(
    model: nn.Module,
    *,
    target_layer: TargetLayer | None = None,
    head: Head | None = None,
    classes: Sequence[str] | None = None,
    pool: Pool | None = None,
    example: Tensor | tuple[int, int] | None = None,
) -> WrappedModel:
    """Find a model's feature map and its linear head, and check that they give its logits.

    The model's state is restored. What may lie between the map and the head, and what a model may
    give, is in docs/models.md.

    Args:
        model: an image classifier, or with ``classes`` a backbone.
        target_layer: the layer of the map: its name, the module, or a callable from images to the
            map, as (B, C, h, w), channels last, or tokens (B, T, C). None searches for it.
        head: the linear head: its name, the module (whose output then counts as the logits), or a
            pair (weight (N, C), bias (N,) or None). None searches for it.
        classes: names of the model's classes; of a new head if their number is not that of the
            logits. None: names of its configuration, of ImageNet if timm knows it, else numbers.
        pool: ``"token"``: the head reads a class token, and its rows are used on the patch tokens.
        example: images that the model takes, or their size (H, W), if it takes no common size.

    Raises:
        ClassifierError: if nothing fits; the message says what was found and what to pass.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> layers = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
        >>> wrapped = wrap(nn.Sequential(*layers), classes=["cat", "dog"])
        >>> wrapped.found
        'map: 0; locality over 1000; pooled by its mean; head: 3 (Linear)'
        >>> wrapped.features(torch.rand(1, 3, 12, 16)).shape
        torch.Size([1, 8, 10, 14])
    """
    refuse_compiled_form(model)
    if pool not in (None, "mean", "token"):
        raise ClassifierError(f"pool must be 'mean' or 'token', got {pool!r}")
    classes = None if classes is None else checked_names(classes)
    core = unwrap(model)
    refuse_compiled_form(core)
    layer = _layer(core, target_layer, "target_layer")
    given = head if isinstance(head, tuple) else _layer(core, head, "head")
    always = [one for one in (layer, given) if isinstance(one, nn.Module)]
    device = device_of(core)
    on_gpu = without_tf32() if device.type == "cuda" else nullcontext()
    with without_grad_and_autocast(device), on_gpu:
        probed = probe(core, example, always)
        images, check = probed.record.images, MapCheck(core, probed)
        finder = Finder(core, probed.record, layer, given, pool == "token", classes, check)
        try:
            found = finder.find()
        except ClassifierError as error:
            if why := quantised(core):
                raise ClassifierError(f"{error}. {why}") from None
            raise
    return WrappedModel(
        **vars(found.reading),
        model=model,
        classes=tuple(found.classes),
        output=found.output,
        figures=found.figures,
        channels_in=images.shape[1],
        fixed_size=probed.fixed_size,
        multiple=probed.multiple,
        probe_size=_size(images),
    )


def _layer(model: nn.Module, given: Any, argument: str) -> Any:
    """The module of a name; modules of the model, callables and None are returned as given."""
    if isinstance(given, nn.Module):
        given = unwrap(given)
        if given not in set(model.modules()):
            raise ClassifierError(f"the module given as {argument} is not a part of the model")
    elif not isinstance(given, str) and not callable(given) and given is not None:
        raise ClassifierError(f"{argument} cannot be {type(given).__name__}")
    if not isinstance(given, str):
        return given
    modules = dict(model.named_modules())
    if given not in modules:
        near = difflib.get_close_matches(given, [n for n in modules if n], n=5, cutoff=0.3)
        hint = f"; similar names are {', '.join(near)}" if near else ""
        raise ClassifierError(f"the model has no layer {given!r} for {argument}{hint}")
    return modules[given]


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]
