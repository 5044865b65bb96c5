"""LPCAM behind the call of pytorch-grad-cam, so that an existing script changes one import.

Nothing of that library is imported: its targets, its transforms for test-time augmentation and its
``reshape_transform`` are used as they come. Where LPCAM cannot mean the same, this module says so:

========================  ========================================================================
of pytorch-grad-cam       here
========================  ========================================================================
``target_layers``         LPCAM needs the map whose pooled values the classifier reads. The given
                          layer that is it is used; if none is, that map is found, with a warning.
                          A classifier reads one map, so the mean over several layers has one term.
                          Of a transformer with a class token it is the map of the patch tokens.
``reshape_transform``     makes the map of a target layer. Mostly not needed: tokens are brought to
                          their grid without it.
``targets``               objects with ``category``, class indices, or None for the best class.
``aug_smooth=True``       the same six views (mirrored or not, times 0.9, 1 and 1.1) and their mean.
                          Best class and prototypes are those of the image as given.
``eigen_smooth=True``     first principal component of the products whose sum is LPCAM's map; its
                          sign, which is arbitrary there, is the one that agrees with this map.
``outputs``               the logits of the images as given, without a gradient graph.
range of the maps         [0, 1]; each is divided by its maximum. The minimum is not subtracted.
model                     training flags, gradients and hooks stay as they were; there, the model
                          is left in evaluation mode and its gradients are cleared.
end of a ``with`` block   every exception leaves it; there, an IndexError is printed and swallowed.
========================  ========================================================================

What no gradient can replace are prototypes: :meth:`LPCAM.fit` takes them from a few labelled
images, once.
"""

from __future__ import annotations

import logging
import math
import operator
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lpcam.classifiers.features import FeaturePair, full_precision, tensor_pyramid
from lpcam.classifiers.search import Pool
from lpcam.classifiers.tracing import evaluation_mode, logits_of
from lpcam.classifiers.wrapped import PROBE_SIZES, Head, TargetLayer, WrappedModel, wrap
from lpcam.method import extractors as extract
from lpcam.method.extractors import Batches
from lpcam.method.functional import fuse_scales, lpcam_of_pair, unflip, unit
from lpcam.method.prototypes import Prototypes
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.errors import ClassifierError, NotFittedError, PrototypeError

BRIGHTNESS = (0.9, 1.0, 1.1)
"""By which ``aug_smooth`` multiplies the normalised images, as pytorch-grad-cam does."""


View = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""How images become a view, and how maps (B, 1, H, W) of the view become maps of the images."""


class LPCAM:
    """LPCAM, called as pytorch-grad-cam's methods are.

    Prototypes come from :meth:`fit` or from a file of :meth:`save`; or, if ``self_fit`` says so,
    from the images to be explained themselves. A call without any raises.

    Args:
        model: a classifier; never moved, and left as it was.
        target_layers: modules of the model (see the table above); None finds the map.
        reshape_transform: from the output of a target layer to (B, C, h, w).
        tta_transforms: views of ``aug_smooth``, each with ``augment_image`` and ``deaugment_mask``;
            None: the six of the table.
        prototypes: of an earlier :meth:`fit`, or the file that :meth:`save` wrote.
        self_fit: without other prototypes, take them anew at each call from the images of that
            call, whose targets (or best classes) serve as their labels. The map of an image then
            depends on the others of the call, and nothing that was measured of LPCAM holds of it.
        settings: an :class:`~lpcam.method.settings.LpcamSettings` or the name of a preset; None:
        those of
            ``voc12.official`` with one pass an image, at scale 1 and without its mirror image.
        classes: the N class names; None: as :func:`lpcam.classifiers.wrapped.wrap` finds them.
        head, pool, example: of :func:`lpcam.classifiers.wrapped.wrap`, for models that it cannot
        read.
        random_state: seed of the reservoir and the clustering.
        with_context: False gives LPCAM-F, the foreground term alone.

    Attributes:
        outputs: logits (B, N) of the last call; None before.
        batch_size: most images that pass the model together (:meth:`fit` takes its loader's).
        source: the :class:`~lpcam.classifiers.wrapped.WrappedModel`; ``source.found`` says what is
        mapped.

    Raises:
        ClassifierError: if the classifier does not read a pooled map linearly, or has no logits of
            ``classes``.
        PrototypeError, ArtefactError: if ``prototypes`` are of another model, or damaged.
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
        classes: Sequence[str] | None = None,
        head: Head | None = None,
        pool: Pool | None = None,
        example: Tensor | tuple[int, int] | None = None,
        random_state: int = 0,
        with_context: bool = True,
    ) -> None:
        self.model = model
        self.target_layers = list(target_layers or ())
        self.reshape_transform = reshape_transform
        self.tta_transforms = tta_transforms
        self.self_fit = self_fit
        self.random_state = random_state
        self.with_context = with_context
        self.batch_size = 32
        self.outputs: Tensor | None = None
        options = {"classes": classes, "head": head, "pool": pool, "example": example}
        self.source = _source(model, self.target_layers, reshape_transform, options)
        if self.source.needs_head:
            raise ClassifierError(
                f"this model gives no logits of the {len(self.source.classes)} classes, and "
                "targets name logits; lpcam.LPCAM(model, classes=[...]).fit(loader) fits a linear "
                "head of its own and maps with it"
            )
        if settings is None:
            settings = LpcamSettings.from_preset(
                "voc12.official", scales=[1.0], flip=False, split_maps="single_scale"
            )
        self.settings = extract.CAM(self.source, settings).settings_
        self._lpcam = self._new()
        self._given: Prototypes | None = None
        self._vectors: tuple[Prototypes, Tensor] | None = None
        if isinstance(prototypes, Prototypes):
            prototypes.check_fingerprint(self.source.fingerprint(), "this LPCAM")
            self._given = prototypes
        elif prototypes is not None:
            self.load(prototypes)

    @property
    def device(self) -> torch.device:
        return self.source.device

    # -- Prototypes ----------------------------------------------------------------------------

    def fit(self, loader: Batches) -> Self:
        """Take prototypes from labelled images (eqs 2-4).

        Args:
            loader: yields normalised images (B, c, H, W) and their labels: class indices (B,)
                int64, or multi-hot (B, N). Only classes that occur in it can be mapped.

        Raises:
            ValueError: if the labels do not fit a batch.
            PrototypeError: if no class has any foreground feature.
        """
        self._lpcam.fit(loader)
        self._given = None
        return self

    def save(self, path: str | Path) -> None:
        """Write the prototypes to a file for ``prototypes=``.

        Raises:
            NotFittedError: if there are none.
        """
        self._prototypes().save(Path(path))

    def load(self, path: str | Path) -> Self:
        """Read prototypes that :meth:`save` wrote.

        Raises:
            ArtefactError: if the file is missing or damaged.
            PrototypeError: if they belong to another model.
        """
        self._given = Prototypes.load(Path(path), fingerprint=self.source.fingerprint())
        return self

    def _new(self) -> extract.LPCAM:
        return extract.LPCAM(
            self.source,
            self.settings,
            random_state=self.random_state,
            with_context=self.with_context,
        )

    def _prototypes(self) -> Prototypes:
        if self._given is not None:
            return self._given
        try:
            return self._lpcam.prototypes_
        except NotFittedError:
            raise NotFittedError(
                "LPCAM maps an image with prototypes, and this one has none: call "
                "cam.fit(loader) once, with images and labels of the classes to be explained, or "
                "pass prototypes=FILE, a file of cam.save(FILE). Without any labelled image, "
                "self_fit=True takes them from the very images that are explained"
            ) from None

    # -- Maps ----------------------------------------------------------------------------------

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Any] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> NDArray[np.float32]:
        """The map of one class of each image.

        Args:
            input_tensor: (B, c, H, W), normalised as the model expects.
            targets: of each image an object with ``category`` (such as ``ClassifierOutputTarget``)
                or a class index; None: the class of the largest logit.
            aug_smooth: the mean over six views, or over ``tta_transforms``.
            eigen_smooth: the first principal component instead of the sum over channels.

        Returns:
            (B, H, W) float32 in [0, 1].

        Raises:
            ValueError: if images or targets are not of the form above.
            NotFittedError: if there are no prototypes.
            PrototypeError: if the prototypes are of other classes.
            ClassifierError: if the model's output holds no logits.
        """
        if not isinstance(input_tensor, Tensor) or input_tensor.ndim != 4 or not len(input_tensor):
            given = tuple(input_tensor.shape) if isinstance(input_tensor, Tensor) else "no tensor"
            raise ValueError(
                f"expected input_tensor of shape (B, c, H, W), got {given}; LPCAM maps batches "
                "of images"
            )
        if not self.self_fit:
            self._prototypes()
        with torch.no_grad():
            images = input_tensor.to(self.device, self.source.dtype)
            self.outputs = torch.cat([_logits(self.model, part) for part in self._parts(images)])
            indices = self._indices(targets, self.outputs)
            with full_precision(self.device):
                vectors = self._rows(images, indices)
                maps = [
                    undo(self._maps(make(images), vectors, eigen=eigen_smooth)[:, None].cpu())
                    for make, undo in (self._views() if aug_smooth else [(_same, _same)])
                ]
            mean = torch.stack(maps).mean(0)[:, 0]
        found: NDArray[np.float32] = mean.float().numpy()
        return found

    def forward(
        self,
        input_tensor: Tensor,
        targets: Sequence[Any] | None = None,
        eigen_smooth: bool = False,
    ) -> NDArray[np.float32]:
        """A call without ``aug_smooth``."""
        return self(input_tensor, targets, eigen_smooth=eigen_smooth)

    def _indices(self, targets: Sequence[Any] | None, outputs: Tensor) -> Tensor:
        """Class index of each image, (B,) on the device."""
        count, classes = len(outputs), len(self.source.classes)
        if tuple(outputs.shape) != (count, classes):
            raise ClassifierError(
                f"the model gives outputs of shape {tuple(outputs.shape)}, but its head has "
                f"{classes} classes; LPCAM explains one logit of each image"
            )
        if targets is None:
            return outputs.argmax(1)
        each = list(targets) if isinstance(targets, Iterable) else None
        if each is None or len(each) != count:
            raise ValueError(
                f"expected a list of one target an image, {count} of them, got {targets!r:.80}"
            )
        return torch.tensor([_category(t, classes) for t in each], device=outputs.device)

    def _rows(self, images: Tensor, indices: Tensor) -> Tensor:
        """The vector v_n of the class of each image, (B, C)."""
        try:
            prototypes = self._prototypes()
        except NotFittedError:  # then self_fit is asked for
            return self._own_rows(images, indices)
        if self._vectors is None or self._vectors[0] is not prototypes:
            self._vectors = prototypes, prototypes.vectors(with_context=self.with_context)
        vectors = self._vectors[1]
        has = prototypes.foreground.keep.any(1)
        lacking = sorted({i for i in indices.tolist() if not has[i]})
        if lacking:
            names = ", ".join(f"{self.source.classes[i]!r} ({i})" for i in lacking[:5])
            raise PrototypeError(
                f"there are no prototypes of {names}; the ones at hand are of "
                f"{int(has.sum())} classes. Fit with images of what is to be explained (on which "
                "its CAM is positive somewhere), or name other targets"
            )
        return vectors.to(self.source.weight)[indices]

    def _own_rows(self, images: Tensor, indices: Tensor) -> Tensor:
        """The same from prototypes of these very images."""
        lpcam = self._new()
        labels = F.one_hot(indices, len(self.source.classes))
        for part, rows in zip(self._parts(images), self._parts(labels), strict=True):
            lpcam.partial_fit(part, rows)
        try:
            with _warnings_of({self.source.classes[index] for index in indices.tolist()}):
                vectors = lpcam.prototypes_.vectors(with_context=self.with_context)
        except PrototypeError:  # no CAM is positive anywhere, so no map has anything to show
            vectors = torch.zeros_like(self.source.weight)
        return vectors.to(self.source.weight)[indices]

    def _maps(self, images: Tensor, vectors: Tensor, *, eigen: bool) -> Tensor:
        """Maps (B, H, W) of images (B, c, H, W) by the vector of each image (B, C)."""
        found = []
        for part, rows in zip(self._parts(images), self._parts(vectors), strict=True):
            pairs = tensor_pyramid(self.source, part, self.settings.scales, flip=self.settings.flip)
            of_pair = principal_component if eigen else _lpcam_of_each
            maps = [of_pair(pair, rows)[:, None] for pair in pairs]
            size = (part.shape[-2], part.shape[-1])
            found.append(fuse_scales(maps, size).high_res[:, 0])
        return torch.cat(found)

    def _parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return torch.split(tensor, self.batch_size)

    def _views(self) -> list[View]:
        if self.tta_transforms is not None:
            return [(t.augment_image, t.deaugment_mask) for t in self.tta_transforms]
        return [(partial(_view, by=by, flip=f), f) for f in (_same, unflip) for by in BRIGHTNESS]

    # -- The rest of pytorch-grad-cam's object -------------------------------------------------

    @property
    def activations_and_grads(self) -> Self:
        """Stands in for that of pytorch-grad-cam in scripts that call its ``release()``."""
        return self

    def release(self) -> None:
        """Does nothing: between calls there are no hooks, activations or gradients."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _lpcam_of_each(pair: FeaturePair, vectors: Tensor) -> Tensor:
    """Equation 6 of each image by its own vector (B, C): (B, h, w), non-negative."""
    classes, places = torch.unique(vectors, dim=0, return_inverse=True)
    maps = lpcam_of_pair(pair.features, pair.mirrored, classes)
    return maps[torch.arange(len(maps), device=maps.device), places]


def principal_component(pair: FeaturePair, vectors: Tensor) -> Tensor:
    """ReLU of the first principal component of what LPCAM sums over the channels.

    The products of vector and unit feature, channel by channel, are centred over the locations and
    projected on the direction in which they vary most. Of its two signs the one counts that
    correlates with the sum.

    Args:
        pair: (B, C, h, w) each; the mirrored features are turned and added, as in LPCAM.
        vectors: (B, C), that of each image.

    Returns:
        (B, h, w), non-negative, not normalised.
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


@contextmanager
def _warnings_of(classes: Iterable[str]) -> Iterator[None]:
    """Of what is logged of prototypes, what concerns these classes; the others are absent."""
    starts = tuple(f"{name}: " for name in classes)
    thread = threading.get_ident()
    logger = logging.getLogger(Prototypes.__module__)

    def concerns(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.getMessage().startswith(starts)

    logger.addFilter(concerns)
    try:
        yield
    finally:
        logger.removeFilter(concerns)


# -- The model ---------------------------------------------------------------------------------


def _source(
    model: nn.Module,
    layers: Sequence[nn.Module],
    reshape: Callable[[Any], Tensor] | None,
    options: Mapping[str, Any],
) -> WrappedModel:
    """The model with the target layer that its classifier reads, or with what is found instead."""
    names = {id(module): name for name, module in model.named_modules()}
    outside = [type(layer).__name__ for layer in layers if id(layer) not in names]
    if outside:
        raise ClassifierError(
            f"the target layers {', '.join(outside)} are not modules of this model; take them "
            "from the very object that is passed as model"
        )
    for layer in reversed(layers):  # the deepest one is commonly the last
        target_layer: TargetLayer = layer
        if reshape is not None:
            target_layer = _reader(model, layer, reshape)
        try:
            source = wrap(model, target_layer=target_layer, **options)
        except ClassifierError:
            continue
        others = [repr(names[id(other)]) for other in layers if other is not layer]
        if others:
            warnings.warn(
                f"the classifier reads the map of {names[id(layer)]!r}, and LPCAM maps that one "
                f"alone, without {', '.join(others)}",
                stacklevel=3,
            )
        return _one_name(source, model, options)
    source = _found(model, options)
    if layers:
        given = ", ".join(repr(names[id(layer)]) for layer in layers)
        warnings.warn(
            f"the classifier does not read the pooled map of {given}, so LPCAM maps what it does "
            f"read: {source.found}",
            stacklevel=3,
        )
    return source


def _one_name(source: WrappedModel, model: nn.Module, options: Mapping[str, Any]) -> WrappedModel:
    """What is found without the target layer, if its map is the same, else what is given.

    The fingerprint of prototypes names the layer, and a map has several names (``layer4`` and
    ``layer4.1``): so prototypes serve whichever is given.
    """
    example = options["example"]
    if isinstance(example, Tensor):
        example = (example.shape[-2], example.shape[-1])
    sizes = [size for size in PROBE_SIZES if math.gcd(*size) == source.multiple]
    size = source.fixed_size or example or sizes[0]
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, source.channels_in, *size, generator=generator)
    try:
        found = wrap(model, **options)
        given, other = source.features(image), found.features(image)
    except ClassifierError:
        return source
    same = (
        given.shape == other.shape
        and torch.allclose(given, other, rtol=0.0, atol=1e-6 * float(given.abs().max()))
        and torch.equal(source.weight, found.weight)
    )
    return found if same else source


def _found(model: nn.Module, options: Mapping[str, Any]) -> WrappedModel:
    """The map that is found; of a class token, whose rows are applied to the patches, at last."""
    try:
        return wrap(model, **options)
    except ClassifierError:
        if options["pool"] is None:
            with suppress(ClassifierError):
                return wrap(model, **{**options, "pool": "token"})
        raise


def _reader(
    model: nn.Module, layer: nn.Module, reshape: Callable[[Any], Tensor]
) -> Callable[[Tensor], Tensor]:
    """A function from images to the reshaped output of a layer."""

    def read(images: Tensor) -> Tensor:
        seen: list[Any] = []
        handle = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        try:
            model(images)
        finally:
            handle.remove()
        if not seen:
            raise ClassifierError(
                f"the target layer {type(layer).__name__} is not used when the model is called"
            )
        try:
            return reshape(seen[-1])
        except (AttributeError, IndexError, RuntimeError, TypeError) as error:
            raise ClassifierError(
                f"reshape_transform cannot take the output of {type(layer).__name__} for images "
                f"of {images.shape[-2]} x {images.shape[-1]}: {error}"
            ) from error

    return read


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """The logits (B, N) that the model gives in evaluation mode, float32."""
    with evaluation_mode(model):
        output = model(images)
    logits = logits_of(output)
    if logits is None:
        given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ClassifierError(
            f"the model gives {given}, in which there are no logits (B, N); pass a model that "
            "gives them as a tensor, or an object with logits"
        )
    return logits.detach()


# -- Targets -----------------------------------------------------------------------------------


def _category(target: Any, classes: int) -> int:
    try:
        if hasattr(target, "mask"):  # a target of segmentation: sums pixels of a category
            raise TypeError
        index = operator.index(getattr(target, "category", target))
    except TypeError:
        raise ValueError(
            f"the target {target!r:.80} names no class; LPCAM maps a class of the classifier: give "
            "ClassifierOutputTarget(index), another object with category, or the index itself"
        ) from None
    if classes == 1 and callable(target):  # as BinaryClassifierOutputTarget, whose 1 is the logit
        if float(target(torch.ones(1))) < 0:
            raise ValueError(
                "the target is the negative side of a single logit, which has no prototypes; map "
                "the positive side, or use a classifier of two classes"
            )
        return 0
    if not 0 <= index < classes:
        raise ValueError(f"the target class {index} is none of the classifier's 0 to {classes - 1}")
    return index
