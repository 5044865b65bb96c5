"""CAM and LPCAM: an image and a classifier in, class maps out.

The functions work on the features of one image at several scales and are what a run uses; the
classes :class:`CAM` and :class:`LPCAM` wrap them for tensors and data loaders, with any classifier.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lpcam.classifier import Classifier
from lpcam.data.images import resize_image, scaled_size
from lpcam.errors import ClassifierError, NotFittedError, PrototypeError
from lpcam.finder import Pool
from lpcam.functional import (
    FusedMaps,
    cam_of_pair,
    class_activation,
    fuse_scales,
    lpcam_of_pair,
    normalize,
)
from lpcam.linear import fit_head
from lpcam.presets import LpcamSettings, ProbeSettings
from lpcam.prototypes import Prototypes, Reservoir, make_prototypes, split
from lpcam.storage import read_tensors
from lpcam.wrap import Head, TargetLayer, WrappedModel, wrap

logger = logging.getLogger(__name__)
Source = Classifier | WrappedModel
"""What gives a feature map and the rows of its classes."""
Batches = Iterable[tuple[Tensor, Tensor]]
"""Images (B, c, H, W) and their labels: multi-hot (B, N), or (B,) class indices."""
PRESET = "voc12.official"


class FeaturePair(NamedTuple):
    """Features of one scale: of the image, and of the mirrored image if flip is used."""

    features: Tensor
    """(..., C, h, w)"""
    mirrored: Tensor | None


# -- One image at several scales ---------------------------------------------------------------


def image_pyramid(
    classifier: Classifier,
    images: NDArray[np.uint8],
    scales: Sequence[float],
    *,
    flip: bool,
    precision: torch.dtype | None = None,
) -> Iterator[FeaturePair]:
    """Features of images at each scale, with PIL bicubic resizing of the uint8 images.

    Args:
        images: (B, H, W, 3) uint8 RGB.
        precision: float16 or bfloat16 passes the backbone under autocast; None as it is.

    Yields:
        one pair of (B, C, h, w) a scale, float32, in the order of ``scales``.

    Raises:
        PrototypeError: if the features hold NaN or Inf.
    """
    height, width = images.shape[1:3]
    for scale in scales:
        size = scaled_size(height, width, scale)
        resized = images if size == (height, width) else [resize_image(i, size) for i in images]
        tensor = torch.stack([classifier.preprocessing(image) for image in resized])
        yield _pair(classifier, tensor.to(classifier.device), flip=flip, precision=precision)


def tensor_pyramid(
    source: Source, images: Tensor, scales: Sequence[float], *, flip: bool
) -> Iterator[FeaturePair]:
    """The same for a batch of normalised images (B, c, H, W), resized by antialiased bicubic.

    Sides that are resized become the nearest multiples of what the model takes, if it is choosy.
    """
    height, width = images.shape[-2:]
    multiple = source.multiple if isinstance(source, WrappedModel) else 1
    for scale in scales:
        size = scaled_size(height, width, scale)
        if multiple > 1 and size != (height, width):
            size = (_nearest_multiple(size[0], multiple), _nearest_multiple(size[1], multiple))
        resized = images
        if size != (height, width):
            resized = F.interpolate(
                single(images), size=size, mode="bicubic", align_corners=False, antialias=True
            ).to(images.dtype)
        yield _pair(source, resized, flip=flip, precision=None)


def _nearest_multiple(side: int, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple


def _pair(
    source: Source, images: Tensor, *, flip: bool, precision: torch.dtype | None
) -> FeaturePair:
    stacked = torch.cat([images, images.flip(-1)]) if flip else images
    if isinstance(source, Classifier):
        # The same numbers in a layout in which convolutions are a tenth faster on a CPU.
        stacked = stacked.to(source.weight.dtype, memory_format=torch.channels_last)
    else:
        stacked = stacked.contiguous()  # a model of the user's may take views
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
    """Half precision as float32; float32 and float64 as they are."""
    return values.float() if values.dtype.itemsize < torch.float32.itemsize else values


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or Inf, in one cheap pass where that is so."""
    # A NaN or Inf makes the sum NaN or Inf; a sum that has overflowed is looked at more closely.
    total = values.sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(values).all())


# -- Maps --------------------------------------------------------------------------------------


def cam_maps(
    pairs: Iterable[FeaturePair],
    weight: Tensor,
    size: tuple[int, int],
    *,
    epsilon: float,
) -> FusedMaps:
    """CAM of equation 1 over scales and flip (specification of LPCAM, section 3b).

    Args:
        pairs: features of each scale.
        weight: (N, C) the rows w_n of the classes wanted.
        size: (H, W) of the image.
        epsilon: added to the maximum before the division.
    """
    maps = [cam_of_pair(pair.features, pair.mirrored, weight) for pair in pairs]
    return fuse_scales(maps, size, epsilon=epsilon)


def lpcam_maps(pairs: Iterable[FeaturePair], vectors: Tensor, size: tuple[int, int]) -> FusedMaps:
    """LPCAM of equations 5-6 over scales and flip (specification of LPCAM, section 3i).

    Args:
        pairs: features of each scale.
        vectors: (N, C) of :meth:`lpcam.prototypes.Prototypes.vectors`, the classes wanted.
        size: (H, W) of the image.
    """
    maps = [lpcam_of_pair(pair.features, pair.mirrored, vectors) for pair in pairs]
    return fuse_scales(maps, size)


def collect(
    reservoir: Reservoir,
    features: Tensor,
    classes: Sequence[int],
    split_map: Tensor,
    settings: LpcamSettings,
    name: str,
    times: Mapping[int, int] | None = None,
) -> None:
    """Split one image's features by its CAM (eq. 2) and offer them to the reservoir.

    Args:
        features: (C, h, w) at scale 1, without flip.
        classes: the K present classes.
        split_map: (K, H', W') max-normalised CAM of those classes at any size; brought to the
            feature grid by ``settings.split_resize``.
        name: of the image.
        times: how often the image serves each class; None: once each. A class that is not in it is
            not served.
    """
    if not classes:
        return
    split_map = on_grid(split_map, features, settings)
    rows = features.flatten(1).T
    for row, index in enumerate(classes):
        foreground, context = split(
            split_map[row].flatten(), settings.tau, inclusive=settings.tau_inclusive
        )
        for turn in range(1 if times is None else times.get(index, 0)):
            turn_name = f"{name}#{turn}" if turn else name
            reservoir.add(index, "foreground", rows, turn_name, where=foreground)
            reservoir.add(index, "context", rows, turn_name, where=context)


def on_grid(split_map: Tensor, features: Tensor, settings: LpcamSettings) -> Tensor:
    """Maps (K, H, W) that split features (C, h, w), brought to their grid as the settings say."""
    grid = features.shape[-2:]
    if split_map.shape[-2:] == grid:
        return split_map
    options = {} if settings.split_resize == "nearest" else {"align_corners": False}
    return F.interpolate(split_map[None], size=grid, mode=settings.split_resize, **options)[0]


def single_scale_cam(features: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    """Equation 1 on the feature grid, one scale, no flip: (C, h, w) to (K, h, w) in [0, 1]."""
    return normalize(class_activation(features, weight).relu(), "max", epsilon)


# -- Extractors --------------------------------------------------------------------------------


class CAM:
    """Class activation maps of equation 1, over scales and flip.

    The model is looked at when it is first needed, and left as it was: see
    :func:`lpcam.wrap.wrap`, whose arguments these are.

    Args:
        model: a :class:`~lpcam.classifier.Classifier`, a :class:`~lpcam.wrap.WrappedModel`, or any
            image classifier.
        settings: an :class:`~lpcam.presets.LpcamSettings` or the name of a preset; None:
            ``voc12.official``, at scale 1 alone if the model takes one size of image only.
        classes: names of the classes.
        target_layer: name, module or callable that gives the map before the pooling.
        head: name, module or (weight, bias) of the linear head.
        pool: ``"token"`` for a head that reads a class token.
        example: images the model takes, or their size (H, W).

    Attributes:
        source_: the :class:`~lpcam.classifier.Classifier` or :class:`~lpcam.wrap.WrappedModel` that
            maps are made with.
        settings_: the :class:`~lpcam.presets.LpcamSettings` in use.
    """

    def __init__(
        self,
        model: nn.Module | WrappedModel,
        settings: LpcamSettings | str | None = None,
        *,
        classes: Sequence[str] | None = None,
        target_layer: TargetLayer | None = None,
        head: Head | None = None,
        pool: Pool | None = None,
        example: Tensor | tuple[int, int] | None = None,
    ) -> None:
        # As they are, for clones; what they mean is found when it is needed.
        self.model = model
        self.settings = settings
        self.classes = classes
        self.target_layer = target_layer
        self.head = head
        self.pool = pool
        self.example = example
        self._source: Source | None = None
        self._settings: LpcamSettings | None = None

    _parameters: tuple[str, ...] = (
        "model",
        "settings",
        "classes",
        "target_layer",
        "head",
        "pool",
        "example",
    )
    _of_source = frozenset(_parameters) - {"settings"}

    def __repr__(self) -> str:
        model = (
            repr(self.model) if isinstance(self.model, WrappedModel) else type(self.model).__name__
        )
        return f"{type(self).__name__}({model}, {self.settings!r})"

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor, as they were given."""
        return {name: getattr(self, name) for name in self._parameters}

    def set_params(self, **parameters: Any) -> Self:
        """Change arguments of the constructor; what was made with others is forgotten.

        Raises:
            ValueError: if there is no such argument.
        """
        for name, value in parameters.items():
            if name not in self._parameters:
                raise ValueError(
                    f"{type(self).__name__} has no parameter {name!r}; it has "
                    f"{', '.join(self._parameters)}"
                )
            setattr(self, name, value)
        if self._of_source & parameters.keys():
            self._source = self._settings = None
        if "settings" in parameters:
            self._settings = None
        return self

    @property
    def source_(self) -> Source:
        """What gives features and rows; found now if it has not been needed yet.

        Raises:
            ClassifierError: if the model has no map or no head that can be found.
        """
        if self._source is None:
            self._source = self._find_source()
        return self._source

    @property
    def settings_(self) -> LpcamSettings:
        """The settings in use, those of a preset by its name.

        Raises:
            RecipeError: if there is no such preset.
            ClassifierError: as ``source_``.
        """
        if self._settings is None:
            self._settings = self._find_settings()
        return self._settings

    def _find_source(self) -> Source:
        options = {name: getattr(self, name) for name in self._of_source if name != "model"}
        model = self.model
        if not isinstance(model, (Classifier, WrappedModel)):
            return wrap(model, **options)
        given = sorted(name for name, value in options.items() if value is not None)
        if given:
            raise ClassifierError(
                f"{', '.join(given)} cannot be given beside a {type(model).__name__}, which "
                "has its own; leave it out, or give the bare model"
            )
        return model

    def _find_settings(self) -> LpcamSettings:
        if isinstance(self.settings, LpcamSettings):
            return self.settings
        if isinstance(self.settings, str):
            return LpcamSettings.from_preset(self.settings)
        source = self.source_
        if isinstance(source, WrappedModel) and source.fixed_size is not None:
            logger.info("%s takes one size of image alone: maps are made at scale 1", source)
            return LpcamSettings.from_preset(PRESET, scales=(1.0,))
        return LpcamSettings.from_preset(PRESET)

    @torch.no_grad()  # not inference mode, whose tensors no loss can use
    def __call__(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Maps of a batch, computed in the model's own precision whatever the caller's autocast.

        Args:
            images: (B, c, H, W), normalised as the model expects.
            labels: (B, N) multi-hot (what is not above 0 is absent), or (B,) int64 class indices;
                maps of absent classes are zero. None maps every class.

        Returns:
            (B, N, H, W) in [0, 1], on the device of ``images``, float32 (float64 of such a model).

        Raises:
            ValueError: if the labels do not fit the batch.
            ClassifierError: if the model has no map or no head that can be found, or cannot take
                the images.
        """
        source, settings = self.source_, self.settings_
        return self._maps(images, labels, single(source.weight), settings.cam_epsilon)

    def _maps(
        self, images: Tensor, labels: Tensor | None, rows: Tensor, cam_epsilon: float | None
    ) -> Tensor:
        """CAM with the rows of the classifier, or LPCAM with vectors if there is no epsilon."""
        present = None
        if labels is not None:
            present = multi_hot_labels(labels, images.shape[0], len(self.source_.classes))
        device = self.source_.device
        with full_precision(device):
            pairs = self._pairs(images)
            if cam_epsilon is None:
                fused = lpcam_maps(pairs, rows, _size(images))
            else:
                fused = cam_maps(pairs, rows, _size(images), epsilon=cam_epsilon)
            maps = fused.high_res
            if present is not None:
                maps = maps * (present > 0).to(maps)[:, :, None, None]
        return maps.to(images.device)

    def _pairs(self, images: Tensor) -> Iterator[FeaturePair]:
        settings = self.settings_
        return tensor_pyramid(
            self.source_, _on(images, self.source_), settings.scales, flip=settings.flip
        )


class LPCAM(CAM):
    """LPCAM of equations 2-6: fit prototypes on a labelled loader, then map images.

    >>> lpcam = LPCAM(model).fit(loader)  # doctest: +SKIP
    >>> maps = lpcam(images, labels)  # doctest: +SKIP

    With ``classes`` and a model that has no linear head for them, ``fit`` fits one first, on the
    pooled features of the frozen model (as the linear probe of a run), and then the prototypes.

    Args:
        model, settings, classes, target_layer, head, pool, example: as of :class:`CAM`.
        random_state: seed of the reservoir and the clustering.
        dtype: in which the sample of local features is kept; half precision ends at 65504.
        with_context: False gives LPCAM-F, the foreground term alone.

    Attributes:
        prototypes_: :class:`~lpcam.prototypes.Prototypes`, after ``fit``, ``partial_fit`` or
            ``load``.
        source_: the :class:`~lpcam.classifier.Classifier` or :class:`~lpcam.wrap.WrappedModel` they
            belong to.
        settings_: the :class:`~lpcam.presets.LpcamSettings` in use.
    """

    def __init__(
        self,
        model: nn.Module | WrappedModel,
        settings: LpcamSettings | str | None = None,
        *,
        classes: Sequence[str] | None = None,
        target_layer: TargetLayer | None = None,
        head: Head | None = None,
        pool: Pool | None = None,
        example: Tensor | tuple[int, int] | None = None,
        random_state: int = 0,
        dtype: torch.dtype = torch.float16,
        with_context: bool = True,
    ) -> None:
        super().__init__(
            model,
            settings,
            classes=classes,
            target_layer=target_layer,
            head=head,
            pool=pool,
            example=example,
        )
        self.random_state = random_state
        self.dtype = dtype
        self.with_context = with_context
        self._forget()

    _parameters = (*CAM._parameters, "random_state", "dtype", "with_context")

    def set_params(self, **parameters: Any) -> Self:
        """Change arguments of the constructor.

        A change of ``with_context`` serves the next call and one of ``settings`` too (scales and
        flip; prototypes stay as they are until the next ``fit``). ``random_state`` and ``dtype``
        serve the next ``fit``. Any other forgets the prototypes.

        Raises:
            ValueError: if there is no such argument.
        """
        super().set_params(**parameters)
        if self._of_source & parameters.keys():
            self._forget()
        return self

    def _forget(self) -> None:
        self._reservoir: Reservoir | None = None
        self._images = 0
        self._prototypes: Prototypes | None = None

    def _not_fitted(self) -> NotFittedError:
        return NotFittedError(
            "this LPCAM has no prototypes yet; call fit(loader) with labelled images, or "
            "load(path) a file that save wrote"
        )

    @property
    def source_(self) -> Source:
        """What gives features and rows.

        Raises:
            NotFittedError: before ``fit``, ``partial_fit`` or ``load``.
        """
        if self._source is None:
            raise self._not_fitted()
        return self._source

    @property
    def settings_(self) -> LpcamSettings:
        """The settings in use.

        Raises:
            NotFittedError: before ``fit``, ``partial_fit`` or ``load``.
        """
        if self._settings is None:
            if self._source is None:
                raise self._not_fitted()
            self._settings = self._find_settings()
        return self._settings

    def _resolve(self) -> None:
        """Look at the model and the settings, before anything is asked of a loader."""
        source = self._find_source()
        self._source, self._settings = source, None
        try:
            self._settings = self._find_settings()
        except BaseException:
            self._source = None
            raise

    def fit(self, loader: Batches) -> Self:
        """Collect local features, cluster, score and select (eqs 2-4).

        Args:
            loader: yields normalised images (B, c, H, W) and labels: multi-hot (B, N), or (B,)
                int64 class indices. Every image serves all its classes: ``images_per_class`` of the
                settings is for a run, which draws from a list
                (:func:`lpcam.prototypes.draw_images`). It is gone through twice where a new head is
                fitted first. After an error nothing is kept of it.

        Raises:
            ValueError: if the labels do not fit a batch.
            ClassifierError: if the model has no map or no head that can be found; for a new head,
                if the loader is an iterator, which cannot be gone through twice, or a class has no
                image.
            PrototypeError: if no class has any foreground feature.
        """
        self._forget()
        self._resolve()
        try:
            if isinstance(self.source_, WrappedModel) and self.source_.needs_head:
                self._source = self._with_new_head(self.source_, loader)
            for images, labels in loader:
                self.partial_fit(images, labels)
            if self._images == 0:
                raise PrototypeError(
                    "the loader gave no image; give one that yields (images, labels)"
                )
            self._cluster()
        except BaseException:
            # Part of a loader is not what was asked for, and nothing may be added to it.
            self._forget()
            self._source = self._settings = None
            raise
        return self

    def fit_maps(self, loader: Batches) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Fit on a loader, then map its images: ``fit`` at once, the maps as they are asked for.

        Args:
            loader: as of :meth:`fit`; gone through again for the maps, in whatever order it has
                then, so each batch comes with its images and labels.

        Returns:
            an iterator of (images, labels, maps (B, N, H, W)).

        Raises:
            ClassifierError: if the loader is an iterator, which cannot be gone through twice.
            ValueError, PrototypeError: as :meth:`fit`.
        """
        _check_again(loader, "fit_maps goes through it twice")
        self.fit(loader)
        return ((images, labels, self(images, labels)) for images, labels in loader)

    def _with_new_head(self, source: WrappedModel, loader: Batches) -> WrappedModel:
        """The model with a linear head, fitted to the pooled features of a loader's images."""
        _check_again(loader, "a new head is fitted in a pass of its own")
        settings = ProbeSettings.from_preset("default")
        pooled, labels = [], []
        for images, given in loader:
            multi_hot = multi_hot_labels(given, images.shape[0], len(source.classes))
            labels.append((multi_hot > 0).cpu())
            with torch.no_grad(), full_precision(source.device):
                (pair,) = tensor_pyramid(source, _on(images, source), (1.0,), flip=settings.mirror)
                views = [view.mean((-2, -1)) for view in pair if view is not None]
                pooled.append(torch.stack(views, dim=1).float().cpu())
        if not pooled:
            raise PrototypeError("the loader gave no image; give one that yields (images, labels)")
        counts = torch.cat(labels).sum(0).tolist()
        absent = [n for n, count in zip(source.classes, counts, strict=True) if count == 0]
        if absent:
            raise ClassifierError(
                f"no image of the loader is labelled {', '.join(absent)}, so no head can be fitted "
                "for it; label some, or leave it out of classes"
            )
        with torch.inference_mode(False), full_precision(torch.device("cpu")):
            weight = fit_head(
                torch.cat(pooled).clone(), torch.cat(labels).float(), settings, source.classes
            )
        return source.with_head(weight.to(source.device))

    @torch.no_grad()
    def partial_fit(self, images: Tensor, labels: Tensor) -> Self:
        """Collect the local features of one more batch (eq. 2), for data that arrives in parts.

        The clustering waits until ``prototypes_`` is first needed. Parts that are fitted in the
        same order give the prototypes of one ``fit`` over them all.

        Args:
            images: (B, c, H, W), normalised as the model expects.
            labels: (B, N) multi-hot (what is not above 0 is absent), or (B,) int64 class indices.

        Raises:
            ValueError: if the labels do not fit the batch.
            ClassifierError: if the model has no map or no head that can be found.
        """
        if self._source is None:
            self._resolve()
        source, settings = self.source_, self.settings_
        labels = multi_hot_labels(labels, images.shape[0], len(source.classes))
        weight = single(source.weight)
        if self._reservoir is None:
            self._reservoir = Reservoir(settings.max_features, self.random_state, self.dtype)
        multi_scale = settings.split_maps == "multi_scale"
        scales = settings.scales if multi_scale else (1.0,)
        if 1.0 not in scales:
            scales = (*scales, 1.0)
        with full_precision(source.device):
            pairs = list(
                tensor_pyramid(
                    source, _on(images, source), scales, flip=settings.flip and multi_scale
                )
            )
            features = pairs[scales.index(1.0)].features
            maps = None
            if multi_scale:
                used = pairs[: len(settings.scales)]
                maps = cam_maps(used, weight, _size(images), epsilon=settings.cam_epsilon).high_res
            self._prototypes = None
            for row in range(images.shape[0]):
                present = (labels[row] > 0).nonzero().flatten().tolist()
                split_map = (
                    maps[row, present]
                    if maps is not None
                    else single_scale_cam(
                        features[row], weight[present], epsilon=settings.cam_epsilon
                    )
                )
                name = f"image {self._images}"
                collect(self._reservoir, features[row], present, split_map, settings, name)
                self._images += 1
        return self

    @torch.inference_mode(False)  # first needed in a call, they are to serve outside it too
    @torch.no_grad()
    def _cluster(self) -> Prototypes:
        source, settings = self.source_, self.settings_
        assert self._reservoir is not None
        with full_precision(source.device):
            self._prototypes = make_prototypes(
                self._reservoir,
                single(source.weight),
                source.classes,
                settings,
                seed=self.random_state,
                fingerprint=source.fingerprint(),
                made_by={
                    "settings": settings.model_dump(mode="json"),
                    "random_state": self.random_state,
                    "images": self._images,
                },
            )
        return self._prototypes

    @property
    def prototypes_(self) -> Prototypes:
        """The prototypes; clusters first what :meth:`partial_fit` has collected since.

        Raises:
            NotFittedError: before ``fit``, ``partial_fit`` or ``load``.
            PrototypeError: if no class has any foreground feature.
        """
        if self._prototypes is not None:
            return self._prototypes
        if self._images == 0:
            raise self._not_fitted()
        return self._cluster()

    @torch.no_grad()  # not inference mode, whose tensors no loss can use
    def __call__(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Maps of a batch, as :meth:`CAM.__call__`.

        Raises:
            NotFittedError: before ``fit``, ``partial_fit`` or ``load``.
        """
        vectors = self.prototypes_.vectors(with_context=self.with_context)
        return self._maps(images, labels, vectors.to(single(self.source_.weight)), None)

    def save(self, path: str | Path) -> None:
        """Write the prototypes to a safetensors file, with the head if ``fit`` made one.

        Raises:
            NotFittedError: before ``fit``, ``partial_fit`` or ``load``.
        """
        prototypes, source = self.prototypes_, self.source_
        new = isinstance(source, WrappedModel) and source.new_head
        prototypes.save(Path(path), {HEAD: source.weight} if new else None)

    def load(self, path: str | Path) -> Self:
        """Read prototypes that :meth:`save` wrote.

        Raises:
            ArtefactError: if the file is missing or damaged.
            PrototypeError: if they belong to another classifier.
        """
        tensors, metadata = read_tensors(Path(path))
        source = self._find_source()
        if HEAD in tensors and isinstance(source, WrappedModel) and source.needs_head:
            head = tensors[HEAD]
            if head.shape[0] != len(source.classes):
                names = ", ".join(map(str, metadata.get("classes", ())))
                raise PrototypeError(
                    f"the head in {path} has {head.shape[0]} classes, but {len(source.classes)} "
                    f"names were given; give those of the file: classes=[...] with {names}"
                )
            source = source.with_head(head.to(source.device))
        prototypes = Prototypes.load(Path(path), fingerprint=source.fingerprint())
        self._forget()
        self._source, self._settings, self._prototypes = source, None, prototypes
        return self


HEAD = "head.weight"
"""Name of a new head's rows in a file of prototypes."""


# -- Labels and images of a caller -------------------------------------------------------------


def multi_hot_labels(labels: Tensor, batch: int, classes: int) -> Tensor:
    """Image-level labels as (B, N) multi-hot.

    Args:
        labels: (B, N) multi-hot, as they are; or (B,) of an integer type, the index of each
            image's one class (not for a single class: give (B, 1), 1 where it is present).

    Raises:
        ValueError: if they do not fit.
    """
    if tuple(labels.shape) == (batch, classes):
        return labels
    whole = (
        not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
    )
    if tuple(labels.shape) == (batch,) and whole and classes > 1:
        if batch and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(
                f"expected class indices from 0 to {classes - 1}, got {int(labels.min())} to "
                f"{int(labels.max())}"
            )
        return F.one_hot(labels.long(), classes)
    raise ValueError(
        f"expected multi-hot labels of shape {(batch, classes)}, got {tuple(labels.shape)}"
    )


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Without the caller's autocast, if there is one."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    context: AbstractContextManager[None] = torch.autocast(device.type, enabled=False)
    return context


def _check_again(loader: Batches, why: str) -> None:
    # iter(loader) would draw from the caller's random numbers
    if isinstance(loader, Iterator):
        raise ClassifierError(
            f"the loader is an iterator, which is empty after one pass, but {why}; give a "
            "DataLoader or a list of (images, labels)"
        )


def _on(images: Tensor, source: Source) -> Tensor:
    return images.to(source.device)


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]
