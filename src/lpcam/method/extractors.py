"""CAM and LPCAM as extractors: an image and a classifier in, class maps out.

:class:`CAM` and :class:`LPCAM` take tensors and data loaders, and any classifier.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lpcam.classifiers.classifier import Classifier
from lpcam.classifiers.features import FeaturePair, Source, full_precision, single, tensor_pyramid
from lpcam.classifiers.linear import ProbeSettings, fit_head
from lpcam.classifiers.search import Pool
from lpcam.classifiers.wrapped import Head, TargetLayer, WrappedModel, wrap
from lpcam.method.functional import FusedMaps
from lpcam.method.multi_scale import cam_maps, lpcam_maps, single_scale_cam
from lpcam.method.prototypes import Prototypes, make_prototypes
from lpcam.method.reservoir import Reservoir, collect
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.errors import ClassifierError, NotFittedError, PrototypeError
from lpcam.runtime.files import read_tensors

if TYPE_CHECKING:
    from lpcam.method.image_maps import ImageMaps

Batches = Iterable[tuple[Tensor, Tensor]]
"""Images (B, c, H, W) and their labels: multi-hot (B, N), or (B,) class indices."""
PRESET = "voc12.official"
HEAD = "head.weight"  #: Name of the rows of a new head in a file of prototypes.
NO_IMAGE = "the loader gave no image; give one that yields (images, labels)"


@dataclass(eq=False, repr=False)
class CAM:
    """Class activation maps of equation 1, over scales and flip.

    The model is inspected when it is first needed and not changed.

    Args:
        model: a :class:`Classifier`, a :class:`WrappedModel`, or any image classifier.
        settings: an :class:`LpcamSettings` or the name of a preset; None: ``voc12.official``, at
            scale 1 only if the model takes a fixed size of image.
        classes, target_layer, head, pool, example: as for :func:`wrap`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...                       nn.Linear(8, 2))
        >>> CAM(model, example=(32, 32))(torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 2, 32, 32])
    """

    # Stored as given, so that sklearn.base.clone works.
    model: nn.Module | WrappedModel
    settings: LpcamSettings | str | None = None
    _: KW_ONLY
    classes: Sequence[str] | None = None
    target_layer: TargetLayer | None = None
    head: Head | None = None
    pool: Pool | None = None
    example: Tensor | tuple[int, int] | None = None

    _model_options = ("classes", "target_layer", "head", "pool", "example")

    def __post_init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._source: Source | None = None

    def __repr__(self) -> str:
        model: Any = (
            self.model if isinstance(self.model, WrappedModel) else type(self.model).__name__
        )
        return f"{type(self).__name__}({model}, {self.settings!r})"

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Arguments of the constructor as they were given."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def set_params(self, **parameters: Any) -> Self:
        """Change arguments of the constructor; ValueError if there is no such argument.

        ``with_context``, scales and flip apply from the next call on; ``random_state``, ``dtype``
        and other settings from the next ``fit`` on. Any other change discards what was fitted.
        """
        known = self.get_params()
        for name, value in parameters.items():
            if name not in known:
                raise ValueError(f"no parameter {name!r}; there are {', '.join(known)}")
            setattr(self, name, value)
        if not parameters.keys().isdisjoint(("model", *self._model_options)):
            self._reset()
        return self

    @property
    def source_(self) -> Source:
        """Classifier that gives features and class rows, found in the model at first use."""
        if self._source is None:
            self._source = self._find_source()
        return self._source

    @property
    def settings_(self) -> LpcamSettings:
        """Settings in use; raises RecipeError if there is no preset of that name."""
        source = self.source_
        if isinstance(self.settings, LpcamSettings):
            return self.settings
        if self.settings is None and isinstance(source, WrappedModel) and source.fixed_size:
            return LpcamSettings.from_preset(PRESET, scales=(1.0,))
        return LpcamSettings.from_preset(self.settings or PRESET)

    def _find_source(self) -> Source:
        options = {name: getattr(self, name) for name in self._model_options}
        if not isinstance(self.model, (Classifier, WrappedModel)):
            return wrap(self.model, **options)
        given = sorted(name for name, value in options.items() if value is not None)
        if given:
            raise ClassifierError(
                f"{', '.join(given)} cannot be given beside a {type(self.model).__name__}, which "
                "has its own; leave it out, or give the bare model"
            )
        return self.model

    @torch.no_grad()  # not inference mode, whose tensors no loss can use
    def __call__(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Maps of a batch, computed in the model's own precision whatever the caller's autocast.

        Args:
            images: (B, c, H, W), normalised as the model expects.
            labels: (B, N) multi-hot (positive: present), or (B,) int64 class indices. Maps of
                absent classes are zero. None maps every class.

        Returns:
            (B, N, H, W) in [0, 1], on the device of ``images``, float32 (float64 for such a model).

        Raises ValueError if the labels do not fit the batch, ClassifierError if no features or head
        are found or they cannot take the images, and NotFittedError without prototypes.
        """
        if labels is not None:
            labels = _multi_hot(labels, len(images), len(self.source_.classes))
        with full_precision(self.source_.device):
            maps = self._maps(self._pairs(images), _size(images)).high_res
            if labels is not None:
                maps = maps * (labels > 0).to(maps)[:, :, None, None]
        return maps.to(images.device)

    def _pairs(self, images: Tensor) -> Iterator[FeaturePair]:
        source, settings = self.source_, self.settings_
        return tensor_pyramid(source, images.to(source.device), settings.scales, flip=settings.flip)

    def _maps(self, pairs: Iterable[FeaturePair], size: tuple[int, int]) -> FusedMaps:
        weight, epsilon = single(self.source_.weight), self.settings_.cam_epsilon
        return cam_maps(pairs, weight, size, epsilon=epsilon)


@dataclass(eq=False, repr=False, kw_only=True)
class LPCAM(CAM):
    """LPCAM of equations 2 to 6: fit prototypes on a labelled loader, then map images.

    With ``classes`` and a model without a linear head for them, ``fit`` first fits a head on the
    pooled features of the frozen model (as the linear probe of a run).

    Args:
        model, settings, classes, target_layer, head, pool, example: as for :class:`CAM`.
        random_state: random seed of the reservoir and the clustering.
        dtype: precision in which local features are kept; the largest float16 is 65504.
        with_context: False leaves the context out (LPCAM-F).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...                       nn.Linear(8, 2))
        >>> images, labels = torch.rand(4, 3, 32, 32), torch.ones(4, 2)
        >>> lpcam = LPCAM(model, example=(32, 32)).fit([(images, labels)])
        >>> lpcam(images, labels).shape
        torch.Size([4, 2, 32, 32])
    """

    random_state: int = 0
    dtype: torch.dtype = torch.float16
    with_context: bool = True

    def _reset(self) -> None:
        super()._reset()
        self._reservoir: Reservoir | None = None
        self._images = 0
        self._prototypes: Prototypes | None = None

    @property
    def source_(self) -> Source:
        """Classifier that the prototypes belong to; NotFittedError if there are none."""
        if self._source is None:
            raise NotFittedError(
                "this LPCAM has no prototypes yet; call fit(loader) with labelled images, or "
                "load(path) with a file that save wrote"
            )
        return self._source

    @property
    def prototypes_(self) -> Prototypes:
        """Prototypes, clustered now if :meth:`partial_fit` has collected features since.

        NotFittedError without features, PrototypeError if no class has a foreground feature.
        """
        source = self.source_
        if self._prototypes is None:
            assert self._reservoir is not None
            settings = self.settings_
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

    def fit(self, loader: Batches) -> Self:
        """Collect local features, cluster, score and select prototypes (equations 2 to 4).

        Args:
            loader: yields images and labels as for :meth:`CAM.__call__`. It is read twice if a new
                head is fitted, so it cannot be an iterator then. Every image is used for all its
                classes; ``images_per_class`` applies to runs only.

        Raises ClassifierError if no feature map or linear head is found, or none can be fitted, and
        PrototypeError if no class has a foreground feature.
        """
        self._reset()
        try:
            self._source = source = self._find_source()
            _ = self.settings_  # an unknown preset raises before the loader is read
            if isinstance(source, WrappedModel) and source.needs_head:
                self._source = self._with_new_head(source, loader)
            for images, labels in loader:
                self.partial_fit(images, labels)
            if self._images == 0:
                raise PrototypeError(NO_IMAGE)
            _ = self.prototypes_
        except BaseException:
            # A later partial_fit must not add to a part of this loader.
            self._reset()
            raise
        return self

    def fit_maps(self, loader: Batches) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Fit on a loader at once, then map its images lazily: (images, labels, maps).

        The loader must not be an iterator: it is read again for the maps, in its order then.
        """
        _check_readable_twice(loader, "fit_maps")
        self.fit(loader)
        return ((images, labels, self(images, labels)) for images, labels in loader)

    def _with_new_head(self, source: WrappedModel, loader: Batches) -> WrappedModel:
        """Fit a linear head to the pooled features of a loader's images."""
        _check_readable_twice(loader, "fitting a new head")
        settings = ProbeSettings.from_preset("default")
        pooled, labels = [], []
        for images, given in loader:
            labels.append((_multi_hot(given, len(images), len(source.classes)) > 0).cpu())
            with torch.no_grad(), full_precision(source.device):
                (pair,) = tensor_pyramid(
                    source, images.to(source.device), (1.0,), flip=settings.mirror
                )
                views = [view.mean((-2, -1)) for view in pair if view is not None]
                pooled.append(torch.stack(views, dim=1).float().cpu())
        if not pooled:
            raise PrototypeError(NO_IMAGE)
        with torch.inference_mode(False), full_precision(torch.device("cpu")):
            weight = fit_head(
                torch.cat(pooled).clone(), torch.cat(labels).float(), settings, source.classes
            )
        return source.with_head(weight.to(source.device))

    @torch.no_grad()
    def partial_fit(self, images: Tensor, labels: Tensor) -> Self:
        """Collect the local features of one more batch (equation 2); clustering waits until needed.

        Parts in the same order give the prototypes of one ``fit``. Arguments as for a call.
        """
        if self._source is None:
            self._source = self._find_source()
        source, settings = self.source_, self.settings_
        labels = _multi_hot(labels, len(images), len(source.classes))
        multi_scale = settings.split_maps == "multi_scale"
        scales = with_scale_one(settings.scales if multi_scale else ())
        with full_precision(source.device):
            images, flip = images.to(source.device), settings.flip and multi_scale
            pairs = list(tensor_pyramid(source, images, scales, flip=flip))
            self._collect(pairs, scales, labels, _size(images))
        return self

    def _collect(
        self,
        pairs: Sequence[FeaturePair],
        scales: Sequence[float],
        labels: Tensor,
        size: tuple[int, int],
    ) -> None:
        """Collect the features of scale 1 of a batch with multi-hot labels (B, N)."""
        source, settings = self.source_, self.settings_
        weight, epsilon = single(source.weight), settings.cam_epsilon
        if self._reservoir is None:
            self._reservoir = Reservoir(settings.max_features, self.random_state, self.dtype)
        features, maps = pairs[scales.index(1.0)].features, None
        if settings.split_maps == "multi_scale":
            count = len(settings.scales)
            maps = cam_maps(pairs[:count], weight, size, epsilon=epsilon).high_res
        self._prototypes = None
        for row, one in enumerate(features):
            present = (labels[row] > 0).nonzero().flatten().tolist()
            if maps is None:
                split_map = single_scale_cam(one, weight[present], epsilon=epsilon)
            else:
                split_map = maps[row, present]
            collect(self._reservoir, one, present, split_map, settings, f"image {self._images}")
            self._images += 1

    def _maps(self, pairs: Iterable[FeaturePair], size: tuple[int, int]) -> FusedMaps:
        return lpcam_maps(pairs, self._vectors(), size)

    def _vectors(self) -> Tensor:
        vectors = self.prototypes_.vectors(with_context=self.with_context)
        return vectors.to(single(self.source_.weight))

    @torch.no_grad()
    def image_maps(
        self,
        image: Tensor,
        picture: NDArray[np.uint8],
        classes: Sequence[str] | None = None,
        *,
        scoring: Literal["sigmoid", "softmax"] = "sigmoid",
        name: str = "image",
    ) -> ImageMaps:
        """CAM and LPCAM of one image as :class:`ImageMaps`, to draw and save.

        Args:
            image: (c, H, W), normalised as the model expects.
            picture: (H', W', 3) uint8 RGB of the same image, at any size; maps are drawn over it.
            classes: names of at most 254 classes to map; None: the class with the highest score.
            scoring: "softmax" if exactly one class is present.
            name: of the image, for file names.
        """
        from lpcam.method import image_maps as drawn  # noqa: PLC0415 - imports what draws

        vectors, source, settings = self._vectors(), self.source_, self.settings_
        images = image[None].to(source.device)
        with full_precision(source.device):
            logits = source(images) if isinstance(source, Classifier) else source.logits(images)
            scores = drawn.class_scores(logits[0], scoring)
            best = drawn.descending(scores)[:1]
            return drawn.ImageMaps.of_features(
                list(self._pairs(images)),
                _size(images),
                best if classes is None else drawn.class_indices(source.classes, classes),
                single(source.weight),
                vectors,
                source.classes,
                scores,
                settings,
                image=picture,
                name=name,
                made_by={"fingerprint": source.fingerprint(), "preset": settings.preset},
            )

    def save(self, path: str | Path) -> None:
        """Write the prototypes, and the head if ``fit`` made one, to a safetensors file."""
        prototypes, source = self.prototypes_, self.source_
        new = isinstance(source, WrappedModel) and source.new_head
        prototypes.save(Path(path), {HEAD: source.weight} if new else None)

    def load(self, path: str | Path) -> Self:
        """Read prototypes that :meth:`save` wrote; PrototypeError if they are of another model."""
        tensors, metadata = read_tensors(Path(path))
        source = self._find_source()
        if HEAD in tensors and isinstance(source, WrappedModel) and source.needs_head:
            head = tensors[HEAD]
            if len(head) != len(source.classes):
                names = ", ".join(map(str, metadata.get("classes", ())))
                raise PrototypeError(
                    f"the head in {path} has {len(head)} classes, but {len(source.classes)} names "
                    f"were given; give those of the file: classes=[...] with {names}"
                )
            source = source.with_head(head.to(source.device))
        prototypes = Prototypes.load(Path(path), fingerprint=source.fingerprint())
        self._reset()
        self._source, self._prototypes = source, prototypes
        return self


def _multi_hot(labels: Tensor, batch: int, classes: int) -> Tensor:
    """Labels (B, N) as they are, or multi-hot (B, N) of class indices (B,)."""
    if tuple(labels.shape) == (batch, classes):
        return labels
    integers = labels.dtype in (torch.uint8, torch.int16, torch.int32, torch.int64)
    if tuple(labels.shape) != (batch,) or not integers or classes == 1:
        raise ValueError(
            f"expected multi-hot labels of shape {(batch, classes)}, got {tuple(labels.shape)}"
        )
    low, high = labels.aminmax() if batch else (0, 0)
    if not 0 <= int(low) <= int(high) < classes:
        raise ValueError(
            f"expected class indices from 0 to {classes - 1}, got {int(low)} to {int(high)}"
        )
    return F.one_hot(labels.long(), classes)


def _check_readable_twice(loader: Batches, what: str) -> None:
    # iter(loader) would draw from the caller's random numbers
    if isinstance(loader, Iterator):
        raise ClassifierError(
            f"the loader is an iterator, but {what} reads it twice; give a DataLoader or a list of "
            "(images, labels)"
        )


def with_scale_one(scales: Sequence[float]) -> tuple[float, ...]:
    """The scales, and scale 1 after them if it is not among them."""
    return (*scales,) if 1.0 in scales else (*scales, 1.0)


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]
