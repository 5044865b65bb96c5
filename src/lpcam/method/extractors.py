"""CAM and LPCAM as extractors: an image and any classifier in, class maps out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn

from lpcam.classifiers.classifier import Classifier
from lpcam.classifiers.features import (
    FeaturePair,
    Source,
    early_layers_of,
    full_precision,
    image_of,
    single,
    tapped_pyramid,
    tensor_pyramid,
    weights_state,
    with_scale_one,
)
from lpcam.classifiers.search import Pool
from lpcam.classifiers.wrapped import Head, TargetLayer, WrappedModel, wrap
from lpcam.method.batches import (
    Batches,
    check_readable_twice,
    read_all,
    read_batches,
    read_images,
    read_labels,
    with_new_head,
)
from lpcam.method.early import Base, EarlyPrototypes, early_images, fit_early
from lpcam.method.functional import cam_of_pair, fuse_scales, lpcam_of_pair, zeros_on_demand
from lpcam.method.multi_scale import OfPair, present_maps, single_scale_cam
from lpcam.method.negatives import compare_loaders
from lpcam.method.prototypes import Prototypes, make_prototypes
from lpcam.method.reservoir import RandomState, Reservoir, collect, drawn_seed
from lpcam.method.settings import EarlySettings, LpcamSettings
from lpcam.runtime.errors import BatchError, ClassifierError, NotFittedError, PrototypeError
from lpcam.runtime.files import read_tensors

PresentMaps = list[tuple[Tensor, Tensor]]
"""For each image the indices (K,) of its K classes, in increasing order, and maps (K, H, W)."""
PRESET = "voc12.official"
HEAD = "head.weight"  #: Name of the rows of a new head in a file of prototypes.
SAMPLE = "reservoir."  #: Start of the names of local features in a file of prototypes.
EARLY = "early"  #: Start of the names of early prototypes in a file, and of their description.


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
        self.early_: EarlyPrototypes | None = None  #: For maps LPCAM-E; None: plain maps.

    def __repr__(self) -> str:
        model = self.model if isinstance(self.model, WrappedModel) else type(self.model).__name__
        given = [(getattr(self, one.name), one) for one in fields(self)[1:]]
        changed = [f"{f.name}={value!r:.60}" for value, f in given if value is not f.default]
        return f"{type(self).__name__}({', '.join([str(model), *changed])})"

    def __sklearn_tags__(self) -> Any:
        """Tags for scikit-learn: only LPCAM has to be fitted, with labels."""
        utils, fits = import_module("sklearn.utils"), isinstance(self, LPCAM)
        return utils.Tags(None, utils.TargetTags(required=fits), requires_fit=fits)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Arguments of the constructor as they were given."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def set_params(self, **parameters: Any) -> Self:
        """Change arguments of the constructor; ValueError if there is no such argument.

        ``with_context``, scales and flip apply from the next call on; ``random_state``, ``dtype``
        and other settings from the next ``fit`` on. Any other change discards what was fitted.
        """
        known = self.get_params()
        if unknown := sorted(parameters.keys() - known):
            raise ValueError(f"no parameter {unknown[0]!r}; there are {', '.join(known)}")
        for name, value in parameters.items():
            setattr(self, name, value)
        if parameters.keys() & {"model", EARLY, *self._model_options}:
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
            return self.settings.cosine_only()
        if self.settings is None and isinstance(source, WrappedModel) and source.fixed_size:
            return LpcamSettings.from_preset(PRESET, scales=(1.0,))
        return LpcamSettings.from_preset(self.settings or PRESET)

    def _find_source(self, classes: Sequence[str] | None = None) -> Source:
        """The model's source; ``classes`` are the names of a new head if none were given."""
        options = {name: getattr(self, name) for name in self._model_options}
        if not isinstance(self.model, (Classifier, WrappedModel)):
            options["classes"] = classes if self.classes is None else self.classes
            return wrap(self.model, **options)
        if given := [name for name, value in options.items() if value is not None]:
            raise ClassifierError(
                f"{', '.join(given)} cannot be given beside a {type(self.model).__name__}, which "
                "has its own; leave it out, or give the bare model"
            )
        return self.model

    @overload
    def __call__(
        self, images: Any, labels: Any = None, *, present: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def __call__(self, images: Any, labels: Any, *, present: Literal[True]) -> PresentMaps: ...

    @torch.no_grad()  # not inference mode, whose tensors no loss can use
    def __call__(
        self, images: Any, labels: Any = None, *, present: bool = False
    ) -> Tensor | PresentMaps:
        """Maps of a batch, computed in the model's own precision whatever the caller's autocast.

        Args:
            images: (B, c, H, W), normalised as the model expects.
            labels: for each image a class index, a name, a list of them, or a row of 0 and 1 for
                all N classes. Only maps of these classes are computed. None maps every class.
            present: return the maps of these classes alone.

        Returns:
            (B, N, H, W) in [0, 1], zeros for absent classes. With ``present``, for each image a
            pair: the indices (K,) of its K classes in increasing order, and maps (K, H, W). On the
            device of ``images``, float32 (float64 for such a model).

        Raises BatchError, a ValueError, if images or labels are not of this form, ClassifierError
        if no features or head are found or they cannot take the images, NotFittedError without
        prototypes, and PrototypeError if the weights changed since ``fit``.
        """
        source = self.source_
        images = read_images(images, source.channels_in)
        count, size = len(source.classes), _size(images)
        if labels is None and present:
            raise BatchError("present=True gives the maps of the labels, so it needs labels")
        chosen = None if labels is None else read_labels(labels, len(images), source.classes)
        with full_precision(source.device):
            of_pair, rows, epsilon = self._rule(None if chosen is None else set().union(*chosen))
            pairs, early = self._pairs(images)
            if chosen is None and self.early_ is None:
                fused = [of_pair(*pair, rows) for pair in pairs]
                return fuse_scales(fused, size, epsilon=epsilon).high_res.to(images.device)
            chosen = [list(range(count))] * len(images) if chosen is None else chosen
            found = present_maps(of_pair, pairs, rows, chosen, size, epsilon=epsilon)
            if self.early_ is not None:
                for place, classes in enumerate(chosen):
                    layers = [image_of(pair, place) for pair in early]
                    found[place] = self.early_.maps(found[place], layers, classes)
        found = [maps.to(images.device) for maps in found]
        if present:
            indices = [torch.tensor(c, dtype=torch.int64, device=images.device) for c in chosen]
            return list(zip(indices, found, strict=True))
        whole = zeros_on_demand(len(images), count, *size, like=found[0])
        for of_image, classes, maps in zip(whole, chosen, found, strict=True):
            of_image[classes] = maps
        return whole

    def _pairs(
        self, images: Tensor, layers: Sequence[str] = ()
    ) -> tuple[Iterable[FeaturePair], list[FeaturePair]]:
        """Features at each scale, and of early layers (those fitted, or these) at scale 1."""
        source, own = self.source_, self.settings_
        layers = layers if self.early_ is None else self.early_.layers
        pyramid = partial(tensor_pyramid, source, images.to(source.device), flip=own.flip)
        return tapped_pyramid(source, pyramid, own.scales, layers, _size(images))

    def _rule(self, classes: Collection[int] | None) -> tuple[OfPair, Tensor, float]:
        """What maps a scale, the rows (N, C) that it takes (of ``classes`` at least), epsilon."""
        return cam_of_pair, single(self.source_.weight), self.settings_.cam_epsilon


@dataclass(eq=False, repr=False, kw_only=True)
class LPCAM(CAM):
    """LPCAM of equations 2 to 6: fit prototypes on a labelled loader, then map images.

    With ``classes`` and a model without a linear head for them, ``fit`` first fits a head on the
    pooled features of the frozen model (as the linear probe of a run).

    Args:
        model, settings, classes, target_layer, head, pool, example: as for :class:`CAM`.
        random_state: random seed of the reservoir and the clustering: an integer, or a NumPy
            RandomState or Generator that each fit draws one from; None: another one at each fit.
        dtype: precision in which local features are kept; the largest float16 is 65504.
        with_context: False leaves the context out (LPCAM-F).
        early: sharpen the maps by early layers of the model (LPCAM-E, docs/adaptive.md); True: as
            ``settings.early``, or :class:`EarlySettings` as they are. ``fit`` then reads the loader
            once more. An ``auto`` of theirs is the base LPCAM, fused, without a judge, which a run
            has: :func:`lpcam.evaluation.judge.choose`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...                       nn.Linear(8, 2))
        >>> images, labels = torch.rand(4, 3, 32, 32), torch.ones(4, 2)
        >>> lpcam = LPCAM(model, example=(32, 32)).fit([(images, labels)])
        >>> lpcam(images, labels).shape
        torch.Size([4, 2, 32, 32])
    """

    random_state: RandomState = 0
    dtype: torch.dtype = torch.float16
    with_context: bool = True
    early: bool | EarlySettings = False

    def _reset(self) -> None:
        super()._reset()
        self._counts = Counter[int]()
        self._images, self._fingerprint = 0, ""
        self._reservoir: Reservoir | None = None
        self._prototypes: Prototypes | None = None
        self._loaded: dict[str, Any] = {}
        self._state: tuple[Any, ...] = ()

    def __sklearn_is_fitted__(self) -> bool:
        return self._prototypes is not None or self._reservoir is not None

    def _take(self, source: Source, prototypes: Prototypes | None = None) -> None:
        """Begin anew with a source, and with prototypes that were checked to be of it."""
        self._reset()
        self._source, self._prototypes = source, prototypes
        self._state, self._fingerprint = weights_state(source), source.fingerprint()

    def _check_weights(self) -> None:
        """Raise PrototypeError if the model has other weights than when its features were taken."""
        state = weights_state(self.source_)
        if state != self._state:
            if self.source_.fingerprint() != self._fingerprint:
                raise PrototypeError(
                    "the weights of the model changed since fit, so its prototypes no longer "
                    "belong to it; call fit(loader) again, or restore the weights"
                )
            self._state = state  # it was only moved

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
        if self._prototypes is None and self._reservoir is None:
            self._reset()  # a first partial_fit has failed
        source = self.source_
        self._check_weights()
        if self._prototypes is None:
            assert self._reservoir is not None
            settings, seed = self.settings_, self._reservoir.seed
            given = self._reservoir, single(source.weight), source.classes, settings
            kept = settings.model_dump(mode="json", exclude={"choices"})
            made_by = {"settings": kept, "random_state": seed, "images": self._images}
            own: dict[str, Any] = {"fingerprint": self._fingerprint, "made_by": made_by}
            with full_precision(source.device):
                made = make_prototypes(*given, seed=seed, **own)
            self._prototypes = made.chosen(settings.choices, settings.weights, given[1])
        return self._prototypes

    def fit(self, loader: Batches, negatives: Batches | None = None) -> Self:
        """Collect local features, cluster, score and select prototypes (equations 2 to 4).

        Args:
            loader: yields batches; a batch is (images, labels, ...), or a dictionary with
                'pixel_values', 'image' or 'images' and 'labels' or 'label': images (B, c, H, W) in
                floating point, normalised as the model expects, and for each image a class index,
                a class name, a list of them, or a row of 0 and 1 for all N classes. It is read
                again for a new head, early layers and negatives, so it cannot be an iterator then.
                Every image is used for all its classes; ``images_per_class`` applies to runs only.
            negatives: yields batches of images without any of the classes; labels are not read.
                They train a new head, and drop prototypes as ``settings.negatives`` says.

        Raises BatchError, a ValueError, for a batch of another form, ClassifierError if no feature
        map or head is found or fitted, PrototypeError if no class has a foreground feature.
        """
        self._reset()
        try:
            self._source = source = self._find_source()
            settings = self.settings_  # an unknown preset raises before the loader is read
            if self.early or negatives is not None:
                check_readable_twice(loader, "fitting early layers or with negatives")
            layers = early_layers_of(source) if self.early else ()
            if isinstance(source, WrappedModel) and source.needs_head:
                self._source = with_new_head(source, loader, negatives)
            for images, labels in read_batches(loader):
                self._add(images, labels)
            found = self.prototypes_
            if negatives is not None:
                self._prototypes = compare_loaders(found, self.source_, loader, negatives, settings)
            if self.early:
                self.early_ = self._fit_early(loader, layers)
        except BaseException:
            # A later partial_fit must not add to a part of this loader.
            self._reset()
            raise
        return self

    def fit_maps(self, loader: Batches) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Fit on a loader at once, then map its images lazily: (images, labels, maps).

        The loader must not be an iterator: it is read again for the maps, in its order then.
        """
        check_readable_twice(loader, "fit_maps")
        self.fit(loader)
        return ((images, labels, self(images, labels)) for images, labels in read_batches(loader))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _fit_early(self, loader: Batches, layers: Sequence[str]) -> EarlyPrototypes:
        """Prototypes of early layers from some images of a loader, of each class as many."""
        source, seed = self.source_, self.prototypes_.made_by["random_state"]
        own = self.early if isinstance(self.early, EarlySettings) else self.settings_.early
        settings = own or EarlySettings()
        base: Base = "CAM" if settings.base == "CAM" else "LPCAM"
        of_pair, rows, epsilon = CAM._rule(self, None) if base == "CAM" else self._rule(None)

        def see(images: Tensor, chosen: list[list[int]]) -> tuple[list[Tensor], list[FeaturePair]]:
            with full_precision(source.device):
                pairs, early = self._pairs(images, layers)
                how = rows, chosen, _size(images)
                return present_maps(of_pair, pairs, *how, epsilon=epsilon), early

        batches = read_all(loader, source.channels_in, source.classes)
        kept = early_images(batches, see, self._counts, settings, seed, base, self.dtype)
        own_key: dict[str, Any] = {"base": base, "fingerprint": self._fingerprint}
        *_, found = fit_early(kept, source.classes, layers, settings, seed=seed, **own_key)
        return replace(found, fusion="fused" if settings.fusion == "auto" else settings.fusion)

    def partial_fit(self, images: Any, labels: Any) -> Self:
        """Collect the local features of one more batch (equation 2); clustering waits until needed.

        Parts in the same order give the prototypes of one ``fit``. Arguments as for a call. After
        ``load`` it goes on from a file saved with ``reservoir=True``; else PrototypeError, as for
        early layers, which need all images at once.
        """
        if self.early or self.early_ is not None:
            raise PrototypeError("partial_fit cannot fit early layers, which fit(loader) does")
        return self._add(images, labels)

    @torch.no_grad()
    def _add(self, images: Any, labels: Any) -> Self:
        """Collect the local features of one more batch."""
        if self._source is None:
            self._source = self._find_source()
        source, settings = self.source_, self.settings_
        images = read_images(images, source.channels_in)
        chosen = read_labels(labels, len(images), source.classes)
        self._begin()
        multi_scale = settings.split_maps == "multi_scale"
        scales = with_scale_one(settings.scales if multi_scale else ())
        with full_precision(source.device):
            flip = settings.flip and multi_scale
            pairs = list(tensor_pyramid(source, images.to(source.device), scales, flip=flip))
            self._collect(pairs, scales, chosen, _size(images))
        return self

    def _begin(self) -> None:
        """Make an empty reservoir if there is none; refuse to mix features of two models."""
        source, settings = self.source_, self.settings_
        if self._reservoir is None:
            if self._prototypes is not None:
                raise PrototypeError(
                    "prototypes that were loaded without their local features cannot go on; save "
                    "them with reservoir=True, or call fit(loader)"
                )
            self._take(source)
            seed = drawn_seed(self.random_state)
            self._reservoir = Reservoir(settings.max_features, seed, self.dtype)
        if self._prototypes is not None and self._prototypes.choices:
            raise PrototypeError(
                "more features are clustered anew, so the choices about these prototypes would be "
                "lost; fit all features first, then correct the prototypes"
            )
        self._check_weights()
        if not self._loaded:
            return
        own = settings.model_dump(mode="json", exclude={"preset", "threshold", "cam_threshold"})
        if changed := [name for name, one in own.items() if self._loaded.get(name, one) != one]:
            raise PrototypeError(
                f"the loaded features were taken with other {', '.join(changed)}; give the "
                "settings in prototypes_.made_by, or call fit(loader)"
            )

    def _collect(
        self,
        pairs: Sequence[FeaturePair],
        scales: Sequence[float],
        chosen: Sequence[list[int]],
        size: tuple[int, int],
    ) -> None:
        """Collect the features of scale 1 of a batch, for the class indices of each image."""
        if self._reservoir is None:
            self._begin()
        assert self._reservoir is not None
        source, settings = self.source_, self.settings_
        weight, epsilon = single(source.weight), settings.cam_epsilon
        features = pairs[scales.index(1.0)].features
        if settings.split_maps == "multi_scale":
            used = pairs[: len(settings.scales)]
            maps = present_maps(cam_of_pair, used, weight, chosen, size, epsilon=epsilon)
        else:
            maps = [
                single_scale_cam(one, weight[classes], epsilon=epsilon)
                for one, classes in zip(features, chosen, strict=True)
            ]
        self._prototypes = None
        for one, classes, split_map in zip(features, chosen, maps, strict=True):
            name = f"image {self._images}"
            collect(self._reservoir, one, classes, split_map, settings, name)
            self._counts.update(classes)
            self._images += 1

    def _rule(self, classes: Collection[int] | None) -> tuple[OfPair, Tensor, float]:
        vectors = self._vectors(classes)
        if self.early_ is not None and self.early_.base == "CAM":
            return super()._rule(classes)
        return lpcam_of_pair, vectors, 0.0

    def _vectors(self, classes: Collection[int] | None = None) -> Tensor:
        vectors = self.prototypes_.vectors(with_context=self.with_context, classes=classes)
        return vectors.to(single(self.source_.weight))

    def save(self, path: str | Path, *, reservoir: bool = False) -> None:
        """Write prototypes, class names, and the head if ``fit`` made one, to a safetensors file.

        With ``reservoir`` also the sampled features, so that :meth:`partial_fit` can go on.
        """
        prototypes, source = self.prototypes_, self.source_
        new = isinstance(source, WrappedModel) and source.new_head
        extra, metadata = {HEAD: source.weight} if new else {}, dict[str, Any]()
        if self.early_ is not None:
            extra |= self.early_.tensors()
            metadata[EARLY] = self.early_.described()
        if reservoir:
            if self._reservoir is None:
                raise PrototypeError("these prototypes were loaded without their local features")
            kept, seen = self._reservoir.contents()
            extra |= {f"{SAMPLE}{name}": tensor for name, tensor in kept.items()}
            metadata["reservoir"] = {"seen": seen, "max_features": self._reservoir.max_features}
        prototypes.save(Path(path), extra, **metadata)

    def load(self, path: str | Path) -> Self:
        """Read what :meth:`save` wrote, with its head, and its class names if none are given.

        Its early prototypes are used if it has some. Raises PrototypeError if it is of other
        weights or class names, or lacks early prototypes that are asked for.
        """
        tensors, metadata = read_tensors(Path(path))
        prototypes = Prototypes.of_file(Path(path), tensors, metadata)
        head = tensors.get(HEAD)
        source = self._find_source(None if head is None else prototypes.classes)
        if isinstance(source, WrappedModel):
            if head is not None and source.needs_head:
                if len(head) != len(source.classes):
                    raise PrototypeError(
                        f"the head in {path} has {len(head)} classes, but {len(source.classes)} "
                        "names were given; leave classes out to use the names of the file"
                    )
                source = source.with_head(head.to(source.device))
            own = self.classes is None and source is not self.model  # these names serve no one
            if own and len(source.classes) == len(prototypes.classes):
                source = replace(source, classes=prototypes.classes)
        prototypes.check_source(source, str(path))
        if self.early and EARLY not in metadata:
            raise PrototypeError(f"{path} has no early prototypes; give early=False, or fit again")
        self._take(source, prototypes)
        if EARLY in metadata:
            self.early_ = EarlyPrototypes.of_file(tensors, metadata[EARLY])
        if kept := metadata.get("reservoir"):
            sample = {n.removeprefix(SAMPLE): t for n, t in tensors.items() if n.startswith(SAMPLE)}
            dtype = next((t.dtype for n, t in sample.items() if n.endswith("rows")), self.dtype)
            made_by = prototypes.made_by
            self._images, self._loaded = made_by["images"], made_by["settings"]
            self._reservoir = Reservoir(kept["max_features"], made_by["random_state"], dtype)
            self._reservoir.fill(sample, kept["seen"])
        return self


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]
