"""LPCAM behind the call of pytorch-grad-cam, so that a script changes one import and fits once.

The guide "Migrate from pytorch-grad-cam" lists what differs.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lpcam.classifiers.features import FeaturePair, full_precision, with_scale_one
from lpcam.classifiers.tracing import logits_of
from lpcam.classifiers.wrapped import TargetLayer, WrappedModel, wrap
from lpcam.method import extractors as extract
from lpcam.method.batches import read_images
from lpcam.method.functional import cosine_activation, fuse_scales, normalize, unflip, unit
from lpcam.method.prototypes import Prototypes
from lpcam.method.settings import LpcamSettings
from lpcam.method.vit import PositionFree, attended_pyramid, spread_by_attention
from lpcam.runtime.errors import ClassifierError, PrototypeError

Targets = Sequence[Any] | None  #: Class indices, objects with ``category``, FinerWeightedTargets.
Maps = NDArray[np.float32]


class View(NamedTuple):
    """A view of an image for ``aug_smooth``: times a factor, mirrored or not."""

    by: float
    flip: bool

    def augment_image(self, images: Tensor) -> Tensor:
        """The view of images (B, c, H, W)."""
        return (unflip(images) if self.flip else images) * self.by

    def deaugment_mask(self, maps: Tensor) -> Tensor:
        """Maps (B, 1, H, W) of the images from maps of the view."""
        return unflip(maps) if self.flip else maps


VIEWS = tuple(View(by, flip) for flip in (False, True) for by in (1.0, 0.9, 1.1))
"""The views that pytorch-grad-cam uses by default; the first one is the image itself."""


class Activations:
    """Feature maps of the last pass, under the names that pytorch-grad-cam gives them.

    A call passes images through the model and returns the logits (B, N). ``activations`` then has
    the feature map (B, C, h, w) of scale 1. There are no gradients, and no hooks between calls.
    """

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        self.run = run
        self.release()

    def __call__(self, images: Tensor) -> Tensor:
        self.size = images.shape[-2], images.shape[-1]
        return self.run(images)

    def release(self) -> None:
        """Forget the feature maps."""
        self.pairs: list[FeaturePair] = []
        self.activations: list[Tensor] = []
        self.gradients: list[Tensor] = []


class LPCAM(extract.LPCAM):
    """:class:`lpcam.LPCAM`, called as pytorch-grad-cam's methods are.

    Args:
        target_layers: modules of the model. The one whose pooled map the classifier reads is used;
            if there is none, that map is found, with a warning.
        reshape_transform: function from the output of a target layer to (B, C, h, w).
        compute_input_gradient, uses_gradients, detach: without effect, as LPCAM has no gradients;
            any other value than pytorch-grad-cam's default gives a warning.
        tta_transforms: views of ``aug_smooth``; None: mirrored or not, times 1, 0.9 and 1.1.
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
        compute_input_gradient: bool = False,
        uses_gradients: bool = True,
        tta_transforms: Iterable[Any] | None = None,
        detach: bool = True,
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
        given = ("compute_input_gradient", "uses_gradients", "detach")
        changed = (compute_input_gradient, not uses_gradients, not detach)
        if unused := ", ".join(n for n, differs in zip(given, changed, strict=True) if differs):
            warnings.warn(f"LPCAM has no gradients; {unused} has no effect", stacklevel=2)
        # what code around the methods of pytorch-grad-cam reads
        self.compute_input_gradient, self.uses_gradients, self.detach = False, False, True
        if isinstance(target_layers, nn.Module):
            target_layers = [target_layers]
        self.target_layers = list(target_layers or ())
        self.reshape_transform = reshape_transform
        self.tta_transforms: Iterable[Any] = VIEWS if tta_transforms is None else tta_transforms
        self.self_fit = self_fit
        self.outputs: Any = None
        self.activations_and_grads = Activations(self._pass)
        of_model = {name: options[name] for name in self._model_options if name in options}
        found = _source(model, self.target_layers, reshape_transform, of_model)
        self.source = PositionFree.of(found) if self.remove_position_bias else found
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

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.source.device

    def _find_source(self, classes: Sequence[str] | None = None) -> WrappedModel:
        return self.source

    def __call__(  # type: ignore[override]
        self,
        input_tensor: Tensor,
        targets: Targets = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> Maps:
        """The map of one class of each image, (B, H, W) float32 in [0, 1].

        Args:
            input_tensor: (B, c, H, W), normalised as the model expects.
            targets: for each image an object with ``category`` or a class index, which is counted
                from the last class if it is negative; None: the class of the largest logit.
            aug_smooth: the mean over the views of ``tta_transforms``.
            eigen_smooth: the first principal component instead of the sum over channels.

        Raises ValueError if images or targets are not of this form, and NotFittedError or
        PrototypeError if there are no prototypes of a target's class.
        """
        if aug_smooth:
            return self.forward_augmentation_smoothing(input_tensor, targets, eigen_smooth)
        return self.forward(input_tensor, targets, eigen_smooth)

    def forward(
        self, input_tensor: Tensor, targets: Targets = None, eigen_smooth: bool = False
    ) -> Maps:
        """A call without ``aug_smooth``; each image passes the model once at each scale."""
        self.get_target_width_height(input_tensor)
        if not self.self_fit:
            _ = self.prototypes_
        outputs = self.activations_and_grads(input_tensor)
        if targets is None:
            targets = outputs.argmax(1).tolist()
        maps = self.compute_cam_per_layer(input_tensor, targets, eigen_smooth)
        return self.aggregate_multi_layers(maps)

    def forward_augmentation_smoothing(
        self, input_tensor: Tensor, targets: Targets = None, eigen_smooth: bool = False
    ) -> Maps:
        """A call with ``aug_smooth``; the first view gives ``outputs`` and the usual targets."""
        outputs, maps = list[Tensor](), list[Tensor]()
        for view in self.tta_transforms:
            found = self.forward(view.augment_image(input_tensor), targets, eigen_smooth)
            maps.append(view.deaugment_mask(torch.from_numpy(found)[:, None])[:, 0])
            outputs.append(self.outputs)
            targets = outputs[0].argmax(1).tolist() if targets is None else targets
        self.outputs = outputs[0]
        return torch.stack(maps).mean(0).numpy()

    def get_target_width_height(self, input_tensor: Tensor) -> tuple[int, int]:
        """(W, H) of images (B, c, H, W); ValueError for anything else."""
        shape = tuple(input_tensor.shape) if isinstance(input_tensor, Tensor) else ()
        if len(shape) != 4 or not shape[0]:
            raise ValueError(f"expected input_tensor of shape (B, c, H, W), got {shape or 'none'}")
        return shape[3], shape[2]

    def compute_cam_per_layer(
        self, input_tensor: Tensor, targets: Targets, eigen_smooth: bool = False
    ) -> list[Maps]:
        """Maps (B, 1, H, W) from the last pass, a list of one, as one layer is read."""
        width, height = self.get_target_width_height(input_tensor)
        layer, maps = next(iter(self.target_layers[::-1]), None), []
        for features, mirrored, spread in self.activations_and_grads.pairs[
            : len(self.settings.scales)
        ]:
            both = features if mirrored is None else features + unflip(mirrored)
            found = self.get_cam_image(input_tensor, layer, targets, both, None, eigen_smooth)
            own = torch.from_numpy(found)[:, None].relu()
            maps.append(own if spread is None else spread_by_attention(own, spread.cpu()))
        return [fuse_scales(maps, (height, width)).high_res.float().numpy()]

    def aggregate_multi_layers(self, cam_per_target_layer: Sequence[Maps]) -> Maps:
        """The mean (B, H, W) of maps (B, 1, H, W), divided by the maximum of each image."""
        maps = torch.from_numpy(np.concatenate(cam_per_target_layer, axis=1)).relu()
        return normalize(maps.mean(1)).numpy()

    @torch.no_grad()
    def get_cam_image(
        self,
        input_tensor: Tensor,
        target_layer: nn.Module | None,
        targets: Targets,
        activations: Any,
        grads: Any = None,
        eigen_smooth: bool = False,
    ) -> Maps:
        """Maps (B, h, w) of feature maps (B, C, h, w) before the ReLU; ``grads`` is not used."""
        weights = self.get_cam_weights(input_tensor, target_layer, targets, activations, grads)
        features = torch.as_tensor(activations)
        vectors = torch.from_numpy(weights).to(features)
        with full_precision(features.device):
            if eigen_smooth:
                return principal_component(features, vectors).cpu().numpy()
            maps = [cosine_activation(f, v[None]) for f, v in zip(features, vectors, strict=True)]
        return torch.cat(maps).cpu().numpy()

    @torch.no_grad()
    def get_cam_weights(
        self,
        input_tensor: Tensor,
        target_layer: nn.Module | None,
        targets: Targets,
        activations: Any,
        grads: Any = None,
    ) -> Maps:
        """The vector v_n of equation 6 of each image's class, (B, C)."""
        if self.self_fit and not self.activations_and_grads.pairs:
            self.activations_and_grads(input_tensor)
        weights = self._class_weights(targets, len(activations))
        with full_precision(self.device):
            own = self._source is None and self.self_fit
            rows = self._own_rows(weights != 0) if own else self._rows(weights != 0)
            return (weights.to(rows) @ rows).cpu().numpy()

    @torch.no_grad()
    def _pass(self, images: Tensor) -> Tensor:
        """Logits (B, N); features of each scale, and of scale 1 in any case, are kept."""
        source = self._source if isinstance(self._source, WrappedModel) else self.source
        scales, flip = with_scale_one(self.settings.scales), self.settings.flip
        images = read_images(images, source.channels_in).to(source.device, source.dtype)
        own = scales.index(1.0)
        blocks, state, outputs = self.attention_blocks, self.activations_and_grads, list[Any]()
        hook = source.core.register_forward_hook(lambda *given: outputs.append(given[-1]))
        with hook, full_precision(source.device):
            state.pairs = list(attended_pyramid(source, images, scales, flip=flip, blocks=blocks))
            features = state.pairs[own].features
            if source.new_head:
                logits = F.linear(features.mean((-2, -1)), source.weight, source.bias)
            elif len(outputs) == len(scales):
                logits = cast(Tensor, logits_of(outputs[own]))[: len(images)].detach()
            else:  # a function gives the map without a pass of the whole model
                logits = source.logits(images)
        self.outputs, state.activations = logits, [features.cpu()]
        return logits

    def _class_weights(self, targets: Targets, count: int) -> Tensor:
        """Weights (B, N) by which the vectors of the classes are summed for each image."""
        classes = len(self.source.classes)
        each: list[Any] = list(targets) if targets is not None and np.iterable(targets) else []
        if len(each) != count:
            raise ValueError(f"expected a list of {count} targets, got {targets!r:.80}")
        weights = torch.zeros(count, classes, device=self.device)
        for image, target in enumerate(each):
            others = getattr(target, "comparison_categories", ())
            main = target.main_category if others else target
            weights[image, _category(main, classes)] += 1
            if others:  # a FinerWeightedTarget: minus classes that are weighted by their scores
                indices = [_category(other, classes) for other in others]
                shares = self.outputs[image].float().softmax(0)[indices]
                for index, share in zip(indices, shares / shares.sum(), strict=True):
                    weights[image, index] -= target.alpha * share
        return weights

    def _rows(self, used: Tensor) -> Tensor:
        """The vector v_n of each class, (N, C); a PrototypeError for those used without any."""
        has = self.prototypes_.foreground.keep.any(1)
        if lacking := [i for i in used.any(0).nonzero().flatten().tolist() if not has[i]]:
            names = ", ".join(f"{self.source.classes[i]!r} ({i})" for i in lacking[:5])
            raise PrototypeError(
                f"there are no prototypes of {names}; {int(has.sum())} classes have some. Fit with "
                "images of these classes, or name other targets"
            )
        return self._vectors()

    def _own_rows(self, used: Tensor) -> Tensor:
        """The vectors (N, C) from prototypes of the last pass, whose labels (B, N) are given."""
        lpcam = extract.LPCAM(self.source, self.settings, random_state=self.random_state)
        lpcam._source, pairs = self.source, self.activations_and_grads.pairs
        scales, size = with_scale_one(self.settings.scales), self.activations_and_grads.size
        lpcam._collect(pairs, scales, [row.nonzero().flatten().tolist() for row in used], size)
        try:
            return lpcam.prototypes_.vectors(with_context=self.with_context)
        except PrototypeError:  # no CAM is positive anywhere, so every map is empty
            return torch.zeros_like(self.source.weight)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.activations_and_grads.release()


def principal_component(features: Tensor, vectors: Tensor) -> Tensor:
    """Principal component (B, h, w) of what LPCAM sums over channels; correlates with the sum."""
    products = (unit(features.float(), dim=1) * vectors.float()[:, :, None, None]).flatten(2)
    centred = products - products.mean(2, keepdim=True)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    component = values[:, :1] * directions[:, 0]
    agreement = (component * centred.sum(1)).sum(1, keepdim=True)
    component = torch.where(agreement < 0, -component, component)
    return component.reshape(len(features), *features.shape[-2:])


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
