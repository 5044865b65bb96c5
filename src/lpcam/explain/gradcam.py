"""LPCAM behind the call of pytorch-grad-cam, so that a script changes one import and fits once.

The guide "Migrate from pytorch-grad-cam" lists what differs.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lpcam.classifiers.features import FeaturePair, full_precision, tensor_pyramid, with_scale_one
from lpcam.classifiers.tracing import logits_of
from lpcam.classifiers.wrapped import TargetLayer, WrappedModel, wrap
from lpcam.method import extractors as extract
from lpcam.method.batches import read_images
from lpcam.method.functional import lpcam_of_pair, unflip, unit
from lpcam.method.multi_scale import present_maps
from lpcam.method.prototypes import Prototypes
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.errors import ClassifierError, PrototypeError

Targets = Sequence[Any] | None  #: Class indices, or objects with ``category``.
VIEWS = tuple((by, flip) for flip in (False, True) for by in (1.0, 0.9, 1.1))
"""The views of ``aug_smooth``, as in pytorch-grad-cam: times a factor, and mirrored or not."""


class LPCAM(extract.LPCAM):
    """:class:`lpcam.LPCAM`, called as pytorch-grad-cam's methods are.

    Args:
        target_layers: modules of the model. The one whose pooled map the classifier reads is used;
            if there is none, that map is found, with a warning.
        reshape_transform: function from the output of a target layer to (B, C, h, w).
        prototypes: result of an earlier ``fit``, or the file that ``save`` wrote.
        self_fit: without other prototypes, take them at each call from its images, with their
            targets as labels. The map of an image then depends on the others of the call.
        settings: settings or the name of a preset; None: ``voc12.official`` at scale 1, unflipped.
        random_state, with_context, options: as for :class:`lpcam.LPCAM`.

    ``outputs`` are the logits (B, N) of the last call. With ``classes=`` of a model without a
    linear head for them, ``fit`` fits one, and targets are indices of these classes. Raises
    ClassifierError if the classifier does not read a pooled map linearly, and PrototypeError if
    ``prototypes`` are of another model.

    Example:
        >>> layers = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> with LPCAM(nn.Sequential(*layers), self_fit=True) as cam:
        ...     cam(torch.rand(1, 3, 64, 48), targets=[1]).shape
        (1, 64, 48)
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | nn.Module | None = None,
        reshape_transform: Callable[[Any], Tensor] | None = None,
        *,
        prototypes: Prototypes | str | Path | None = None,
        self_fit: bool = False,
        settings: LpcamSettings | str | None = None,
        random_state: int = 0,
        with_context: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, random_state=random_state, with_context=with_context, **options)
        if self.early:
            raise ValueError("early layers are not used here; give them to lpcam.LPCAM")
        if isinstance(target_layers, nn.Module):
            target_layers = [target_layers]
        self.target_layers = list(target_layers or ())
        self.reshape_transform = reshape_transform
        self.self_fit = self_fit
        self.outputs: Any = None
        of_model = {name: options[name] for name in self._model_options if name in options}
        self.source = _source(model, self.target_layers, reshape_transform, of_model)
        if self.source.needs_head and self_fit:
            raise ClassifierError(
                f"this model gives no logits of the {len(self.source.classes)} classes, and "
                "self_fit has no labels for a head; leave it out and call fit(loader)"
            )
        usual = {"scales": [1.0], "flip": False, "split_maps": "single_scale"}
        settings = settings or LpcamSettings.from_preset(extract.PRESET, **usual)
        self.settings: LpcamSettings = extract.CAM(self.source, settings).settings_
        if isinstance(prototypes, Prototypes):
            prototypes.check_source(self.source, "this LPCAM")
            self._take(self.source, prototypes)
        elif prototypes is not None:
            self.load(prototypes)

    def _find_source(self, classes: Sequence[str] | None = None) -> WrappedModel:
        return self.source

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        input_tensor: Tensor,
        targets: Targets = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> NDArray[np.float32]:
        """The map of one class of each image, (B, H, W) float32 in [0, 1].

        Each image passes the model once at each scale.

        Args:
            input_tensor: (B, c, H, W), normalised as the model expects.
            targets: for each image an object with ``category`` or a class index, which is counted
                from the last class if it is negative; None: the class of the largest logit.
            aug_smooth: the mean over six views: mirrored or not, times 1, 0.9 and 1.1. The first
                one, the image itself, gives ``outputs`` and the usual targets.
            eigen_smooth: the first principal component instead of the sum over channels.

        Raises ValueError if images or targets are not of this form, and NotFittedError or
        PrototypeError if there are no prototypes of a target's class.
        """
        shape = tuple(input_tensor.shape) if isinstance(input_tensor, Tensor) else ()
        if len(shape) != 4 or not shape[0]:
            raise ValueError(f"expected input_tensor of shape (B, c, H, W), got {shape or 'none'}")
        if not self.self_fit:
            _ = self.prototypes_  # raises before any work
        images = read_images(input_tensor, self.source.channels_in)
        of_pair = principal_component if eigen_smooth else lpcam_of_pair
        every, size = list[Tensor](), (shape[2], shape[3])
        for by, flip in VIEWS[: len(VIEWS) if aug_smooth else 1]:
            logits, pairs = self._pass((unflip(images) if flip else images) * by)
            if not every:
                self.outputs = logits
                chosen = self._classes(logits.argmax(1).tolist() if targets is None else targets)
            with full_precision(self.source.device):
                own = self._source is None and self.self_fit
                rows = self._own_rows(pairs, chosen, size) if own else self._rows(chosen)
                used = pairs[: len(self.settings.scales)]
                maps = torch.cat(present_maps(of_pair, used, rows, chosen, size)).cpu()
            every.append(unflip(maps) if flip else maps)
        return torch.stack(every).mean(0).float().numpy()

    def _pass(self, images: Tensor) -> tuple[Tensor, list[FeaturePair]]:
        """Logits (B, N), and features of each scale, and of scale 1 in any case."""
        source = self._source if isinstance(self._source, WrappedModel) else self.source
        scales, flip = with_scale_one(self.settings.scales), self.settings.flip
        images = images.to(source.device, source.dtype)
        own, outputs = scales.index(1.0), list[Any]()
        hook = source.core.register_forward_hook(lambda *given: outputs.append(given[-1]))
        with hook, full_precision(source.device):
            pairs = list(tensor_pyramid(source, images, scales, flip=flip))
            if source.new_head:
                pooled = pairs[own].features.mean((-2, -1))
                return F.linear(pooled, source.weight, source.bias), pairs
            if len(outputs) == len(scales):
                return cast(Tensor, logits_of(outputs[own]))[: len(images)].detach(), pairs
            # a function gives the map without a pass of the whole model
            return source.logits(images), pairs

    def _classes(self, targets: Targets) -> list[list[int]]:
        """The class of each image, as a list of one."""
        given: list[Any] = list(targets) if targets is not None and np.iterable(targets) else []
        if len(given) != len(self.outputs):
            raise ValueError(f"expected a list of {len(self.outputs)} targets, got {targets!r:.80}")
        return [[_category(target, len(self.source.classes))] for target in given]

    def _rows(self, chosen: Sequence[list[int]]) -> Tensor:
        """The vector v_n of each class, (N, C); a PrototypeError for those used without any."""
        has = self.prototypes_.foreground.keep.any(1)
        if lacking := [i for i in sorted(set().union(*chosen)) if not has[i]]:
            names = ", ".join(f"{self.source.classes[i]!r} ({i})" for i in lacking[:5])
            raise PrototypeError(
                f"there are no prototypes of {names}; {int(has.sum())} classes have some. Fit with "
                "images of these classes, or name other targets"
            )
        return self._vectors()

    def _own_rows(
        self, pairs: list[FeaturePair], chosen: list[list[int]], size: tuple[int, int]
    ) -> Tensor:
        """The vectors (N, C) of prototypes of these very images."""
        lpcam = extract.LPCAM(self.source, self.settings, random_state=self.random_state)
        lpcam._source = self.source
        lpcam._collect(pairs, with_scale_one(self.settings.scales), chosen, size)
        try:
            return lpcam.prototypes_.vectors(with_context=self.with_context).to(self.source.weight)
        except PrototypeError:  # no CAM is positive anywhere, so every map is empty
            return torch.zeros_like(self.source.weight)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is kept between calls."""


def principal_component(features: Tensor, mirrored: Tensor | None, vectors: Tensor) -> Tensor:
    """ReLU of the principal component (N, h, w) of what LPCAM sums over channels, for each vector.

    Its sign is chosen so that it correlates with the sum. Features are (C, h, w), vectors (N, C).
    """
    both = (features if mirrored is None else features + unflip(mirrored)).float()
    products = unit(both, dim=0).flatten(1) * vectors.float()[:, :, None]
    centred = products - products.mean(2, keepdim=True)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    component = values[:, :1] * directions[:, 0]
    agreement = (component * centred.sum(1)).sum(1, keepdim=True)
    component = torch.where(agreement < 0, -component, component)
    return component.reshape(-1, *features.shape[-2:]).relu()


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


def _category(target: Any, classes: int) -> int:
    try:  # a target of segmentation, which has a mask, sums pixels of a category
        own: Any = target if hasattr(target, "mask") else getattr(target, "category", target)
        index = operator.index(own)
        # BinaryClassifierOutputTarget has categories 1 and 0 of a single logit
        sign = float(target(torch.ones(1))) if classes == 1 and callable(target) else 0.0
    except (IndexError, TypeError):
        raise ValueError(
            f"the target {target!r:.80} names no class; give an object with category, or an index"
        ) from None
    if sign < 0:
        raise ValueError("the negative side of a single logit has no prototypes; map the logit")
    index = 0 if sign > 0 else index
    if not -classes <= index < classes:
        raise ValueError(f"the target class {index} is none of the classifier's 0 to {classes - 1}")
    return index % classes
