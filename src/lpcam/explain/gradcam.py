"""LPCAM behind the call of pytorch-grad-cam, so that an existing script changes one import.

The guide "Migrate from pytorch-grad-cam" lists what differs.
"""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lpcam.classifiers.features import FeaturePair, full_precision, tensor_pyramid
from lpcam.classifiers.tracing import evaluation_mode, logits_of
from lpcam.classifiers.wrapped import TargetLayer, WrappedModel, wrap
from lpcam.method import extractors as extract
from lpcam.method.functional import fuse_scales, lpcam_of_pair, unflip, unit
from lpcam.method.prototypes import Prototypes
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.errors import ClassifierError, PrototypeError

BRIGHTNESS = (0.9, 1.0, 1.1)
"""Factors by which ``aug_smooth`` multiplies images, as pytorch-grad-cam does."""


class LPCAM(extract.LPCAM):
    """:class:`lpcam.LPCAM`, called as pytorch-grad-cam's methods are.

    Args:
        target_layers: modules of the model. The one whose pooled map the classifier reads is used;
            if there is none, that map is found, with a warning.
        reshape_transform: function from the output of a target layer to (B, C, h, w).
        tta_transforms: views of ``aug_smooth``; None: mirrored or not, times 0.9, 1 and 1.1.
        prototypes: result of an earlier ``fit``, or the file that ``save`` wrote.
        self_fit: without other prototypes, take them at each call from its images, with their
            targets as labels. The map of an image then depends on the others of the call.
        settings: settings or the name of a preset; None: ``voc12.official`` at scale 1, unflipped.
        random_state, with_context, options: as for :class:`lpcam.LPCAM`.

    ``outputs`` are the logits (B, N) of the last call, ``batch_size`` is the most images that pass
    the model together. Raises ClassifierError if the classifier does not read a pooled map
    linearly, and PrototypeError if ``prototypes`` are of another model.

    Example:
        >>> layers = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> with LPCAM(nn.Sequential(*layers), self_fit=True) as cam:
        ...     cam(torch.rand(1, 3, 64, 48), targets=[1]).shape
        (1, 64, 48)
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None = None,
        reshape_transform: Callable[[Any], Tensor] | None = None,
        *,
        tta_transforms: Iterable[Any] | None = None,
        prototypes: Prototypes | str | Path | None = None,
        self_fit: bool = False,
        settings: LpcamSettings | str | None = None,
        random_state: int = 0,
        with_context: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, random_state=random_state, with_context=with_context, **options)
        self.target_layers, self.reshape_transform = list(target_layers or ()), reshape_transform
        self.tta_transforms, self.self_fit, self.batch_size = tta_transforms, self_fit, 32
        self.outputs: Tensor | None = None
        self.source = _source(model, self.target_layers, reshape_transform, options)
        if self.source.needs_head:
            raise ClassifierError(
                f"this model gives no logits of the {len(self.source.classes)} classes; "
                "lpcam.LPCAM(model, classes=[...]).fit(loader) fits a head and maps with it"
            )
        usual = {"scales": [1.0], "flip": False, "split_maps": "single_scale"}
        settings = settings or LpcamSettings.from_preset(extract.PRESET, **usual)
        self.settings = extract.CAM(self.source, settings).settings_
        if isinstance(prototypes, Prototypes):
            prototypes.check_fingerprint(self.source.fingerprint(), "this LPCAM")
            self._source, self._prototypes = self.source, prototypes
        elif prototypes is not None:
            self.load(prototypes)

    @property
    def device(self) -> torch.device:
        return self.source.device

    def _find_source(self) -> WrappedModel:
        return self.source

    def __call__(  # type: ignore[override]
        self,
        input_tensor: Tensor,
        targets: Sequence[Any] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> NDArray[np.float32]:
        """The map of one class of each image, (B, H, W) float32 in [0, 1].

        Args:
            input_tensor: (B, c, H, W), normalised as the model expects.
            targets: for each image an object with ``category`` or a class index; None: the class
                of the largest logit.
            aug_smooth: the mean over the views of ``tta_transforms``.
            eigen_smooth: the first principal component instead of the sum over channels.

        Raises ValueError if images or targets are not of this form, and NotFittedError or
        PrototypeError if there are no prototypes of a target's class.
        """
        shape = tuple(input_tensor.shape) if isinstance(input_tensor, Tensor) else ()
        if len(shape) != 4 or not shape[0]:
            raise ValueError(f"expected input_tensor of shape (B, c, H, W), got {shape or 'none'}")
        if not self.self_fit:
            _ = self.prototypes_
        source, count = self.source, len(self.source.classes)
        views = self._views() if aug_smooth else [(_same, _same)]
        with torch.no_grad():
            images = input_tensor.to(source.device, source.dtype)
            with evaluation_mode(source.model):
                outputs = [source.model(part) for part in self._parts(images)]
            self.outputs = torch.cat([_logits(output, count) for output in outputs])
            indices = self.outputs.argmax(1)
            if targets is not None:
                indices = _indices(targets, len(images), count).to(source.device)
            with full_precision(source.device):
                own = self._source is None
                rows = self._own_rows(images, indices) if own else self._rows(indices)
                vectors = rows.to(source.weight)[indices]
                maps = [
                    undo(self._of_view(make(images), vectors, eigen=eigen_smooth)[:, None].cpu())
                    for make, undo in views
                ]
        return np.asarray(torch.stack(maps).mean(0)[:, 0].float())

    def _rows(self, indices: Tensor) -> Tensor:
        """The vector v_n of each class, (N, C); a PrototypeError for those without prototypes."""
        has = self.prototypes_.foreground.keep.any(1)
        if lacking := sorted({i for i in indices.tolist() if not has[i]}):
            names = ", ".join(f"{self.source.classes[i]!r} ({i})" for i in lacking[:5])
            raise PrototypeError(
                f"there are no prototypes of {names}; {int(has.sum())} classes have some. Fit with "
                "images of these classes, or name other targets"
            )
        return self._vectors()

    def _own_rows(self, images: Tensor, indices: Tensor) -> Tensor:
        """The vectors (N, C) from prototypes of these very images."""
        lpcam = extract.LPCAM(self.source, self.settings, random_state=self.random_state)
        labels = F.one_hot(indices, len(self.source.classes))
        for part, rows in zip(self._parts(images), self._parts(labels), strict=True):
            lpcam.partial_fit(part, rows)
        starts = tuple(f"{self.source.classes[index]}: " for index in indices.tolist())

        def of_present(record: logging.LogRecord) -> bool:  # other classes have no prototypes
            return record.getMessage().startswith(starts)

        logger = logging.getLogger(Prototypes.__module__)
        logger.addFilter(of_present)
        try:
            return lpcam.prototypes_.vectors(with_context=self.with_context)
        except PrototypeError:  # no CAM is positive anywhere, so every map is empty
            return torch.zeros_like(self.source.weight)
        finally:
            logger.removeFilter(of_present)

    def _of_view(self, images: Tensor, vectors: Tensor, *, eigen: bool) -> Tensor:
        """Maps (B, H, W) of images (B, c, H, W) by the vector of each image (B, C)."""
        assert isinstance(self.settings, LpcamSettings)
        scales, flip = self.settings.scales, self.settings.flip
        of_pair, found = principal_component if eigen else _lpcam_of_each, []
        for part, rows in zip(self._parts(images), self._parts(vectors), strict=True):
            pairs = tensor_pyramid(self.source, part, scales, flip=flip)
            maps = [of_pair(pair, rows)[:, None] for pair in pairs]
            found.append(fuse_scales(maps, (part.shape[-2], part.shape[-1])).high_res[:, 0])
        return torch.cat(found)

    def _parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return torch.split(tensor, self.batch_size)

    def _views(self) -> list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
        """How images become a view, and how maps (B, 1, H, W) of it become maps of the images."""
        if self.tta_transforms is not None:
            return [(t.augment_image, t.deaugment_mask) for t in self.tta_transforms]
        return [(partial(_view, by=by, flip=f), f) for f in (_same, unflip) for by in BRIGHTNESS]

    @property
    def activations_and_grads(self) -> Self:
        """Replaces the object of this name in scripts that call its ``release()``."""
        return self

    def __enter__(self) -> Self:
        return self

    def release(self, *_exception: object) -> None:
        """Does nothing: between calls there are no hooks, activations or gradients."""

    __exit__ = release


def _lpcam_of_each(pair: FeaturePair, vectors: Tensor) -> Tensor:
    """Equation 6 of each image by its own vector (B, C): (B, h, w), non-negative."""
    classes, places = torch.unique(vectors, dim=0, return_inverse=True)
    maps = lpcam_of_pair(pair.features, pair.mirrored, classes)
    return maps[torch.arange(len(maps), device=maps.device), places]


def principal_component(pair: FeaturePair, vectors: Tensor) -> Tensor:
    """ReLU (B, h, w) of the first principal component of the products of features and vectors.

    LPCAM sums these products over the channels; the sign is that of the correlation with it.
    """
    features = pair.features
    if pair.mirrored is not None:
        features = features + unflip(pair.mirrored)
    products = (unit(features.float(), dim=1) * vectors.float()[:, :, None, None]).flatten(2)
    centred = products - products.mean(2, keepdim=True)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    component = values[:, :1] * directions[:, 0]
    agreement = (component * centred.sum(1)).sum(1, keepdim=True)
    component = torch.where(agreement < 0, -component, component)
    return component.relu().reshape(len(features), *features.shape[-2:])


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _view(images: Tensor, *, by: float, flip: Callable[[Tensor], Tensor]) -> Tensor:
    return flip(images) * by


def _source(
    model: nn.Module,
    layers: Sequence[nn.Module],
    reshape: Callable[[Any], Tensor] | None,
    options: Mapping[str, Any],
) -> WrappedModel:
    """The model with the target layer that its classifier reads, or with what is found instead."""
    names = {id(module): repr(name) for name, module in model.named_modules()}
    outside = [type(layer).__name__ for layer in layers if id(layer) not in names]
    if outside:
        raise ClassifierError(
            f"the target layers {', '.join(outside)} are not modules of the model that was passed"
        )
    for layer in reversed(layers):  # the deepest one is commonly the last
        target: TargetLayer = layer if reshape is None else partial(_read, model, layer, reshape)
        with suppress(ClassifierError):
            source = wrap(model, target_layer=target, **options)
            if others := [names[id(other)] for other in layers if other is not layer]:
                warnings.warn(
                    f"the classifier reads the map of {names[id(layer)]}; LPCAM maps that one "
                    f"alone, without {', '.join(others)}",
                    stacklevel=3,
                )
            with suppress(ClassifierError):  # prototypes name the layer, so it has one name
                found = wrap(model, **options)
                return found if _same_map(source, found) else source
            return source
    try:
        source = wrap(model, **options)
    except ClassifierError as error:
        try:  # a class token, whose rows are used on the patches, comes last
            source = wrap(model, **{"pool": "token", **options})
        except ClassifierError:
            raise error from None
    if layers:
        warnings.warn(
            f"the classifier does not read the pooled map of "
            f"{', '.join(names[id(layer)] for layer in layers)}, so LPCAM maps what it does read: "
            f"{source.found}",
            stacklevel=3,
        )
    return source


def _same_map(one: WrappedModel, other: WrappedModel) -> bool:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, one.channels_in, *one.probe_size, generator=generator)
    given, found = one.features(image), other.features(image)
    if given.shape != found.shape or not torch.equal(one.weight, other.weight):
        return False
    return torch.allclose(given, found, rtol=0.0, atol=1e-6 * float(given.abs().max()))


def _read(
    model: nn.Module, layer: nn.Module, reshape: Callable[[Any], Tensor], images: Tensor
) -> Tensor:
    """The reshaped output of a layer."""
    seen: list[Any] = []
    try:
        with layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output)):
            model(images)
        return reshape(seen[-1])
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise ClassifierError(
            f"reshape_transform cannot take the output of {type(layer).__name__} for images of "
            f"{images.shape[-2]} x {images.shape[-1]}: {error}"
        ) from error


def _logits(output: Any, classes: int) -> Tensor:
    logits = logits_of(output)
    if logits is None or logits.shape[1] != classes:
        given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ClassifierError(f"the model gives {given}; expected logits (B, {classes})")
    return logits.detach()


def _indices(targets: Sequence[Any], count: int, classes: int) -> Tensor:
    """Class index of each image, (B,)."""
    if not isinstance(targets, Iterable) or len(each := list(targets)) != count:
        raise ValueError(f"expected a list of {count} targets, got {targets!r:.80}")
    return torch.tensor([_category(target, classes) for target in each])


def _category(target: Any, classes: int) -> int:
    try:  # a target of segmentation, which has a mask, sums pixels of a category
        own = target if hasattr(target, "mask") else getattr(target, "category", target)
        index = operator.index(own)
    except TypeError:
        raise ValueError(
            f"the target {target!r:.80} names no class; give an object with category, or an index"
        ) from None
    if classes == 1 and callable(target):  # as BinaryClassifierOutputTarget, whose 1 is the logit
        index = 0 if float(target(torch.ones(1))) >= 0 else -1
    if not 0 <= index < classes:
        raise ValueError(
            f"the target class {index} is none of the classifier's 0 to {classes - 1}"
            + "; the negative side of a single logit has no prototypes" * (classes == 1)
        )
    return index
