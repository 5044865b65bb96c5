"""Maps of new images: choose the classes, compute CAM and LPCAM, score the classes."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import ValidationError
from torch import Tensor, nn

from lpcam.classifiers.classifier import PRETRAINED, Classifier, Preprocessing, timm_classifier
from lpcam.classifiers.engines import Precision
from lpcam.classifiers.feature_store import PRECISIONS, image_pyramid
from lpcam.classifiers.features import FeaturePair, image_of, single, tapped_pyramid, tensor_pyramid
from lpcam.classifiers.wrapped import WrappedModel
from lpcam.data.images import (
    USUAL,
    Reading,
    limit_long_side,
    read_image,
    resize_image,
    resize_long_side,
    to_rgb,
)
from lpcam.data.resize import resize
from lpcam.method.batches import class_indices
from lpcam.method.choices import Choice
from lpcam.method.early import EarlyPrototypes
from lpcam.method.extractors import CAM, EARLY, LPCAM
from lpcam.method.image_maps import MOST_MASK_VALUES, ImageMaps, Scoring, class_scores, descending
from lpcam.method.multi_scale import discriminative_map
from lpcam.method.prototypes import Prototypes
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.errors import (
    ArtefactError,
    DataError,
    ImageError,
    PrototypeError,
)
from lpcam.runtime.files import digest_file, printable, read_tensors
from lpcam.runtime.resources import choose_device
from lpcam.runtime.versions import versions

MINIMUM_SCORE = 0.5  #: A class is predicted if its score is above this value.
ImageSource = Path | str | Image.Image | NDArray[np.uint8]


class Explainer:
    """Computes CAM, LPCAM, scores and masks of new images. Calls from several threads are safe.

    Args:
        model: a fitted :class:`~lpcam.method.extractors.LPCAM`, or the model that ``prototypes``
            belong to: anything that LPCAM accepts. A :class:`Classifier` is copied.
        settings: scales, flip and thresholds, or the name of a preset; None: those of the LPCAM,
            else those stored with the prototypes, else the default preset.
        preprocessing: None: that of timm's ``pretrained_cfg``, or of ImageNet. A Classifier always
            uses its own.
        mask_ids: value of each class in masks, 1 to 254; None: 1, 2, ... in the order of classes.
        scoring: ``"sigmoid"`` scores each class independently, ``"softmax"`` makes the scores sum
            to 1. None: sigmoid for a Classifier or a head that LPCAM fitted, else softmax unless
            the model itself ends with a sigmoid.
        score_side: long side in pixels at which images are scored; None: that of the maps.
        precision: of a Classifier's forward passes.
        maximum_side: long side in pixels; longer images are mapped at this size.
        foreground_only: compute LPCAM-F (without context prototypes) instead of LPCAM.
        early: prototypes of early layers, for maps LPCAM-E instead; None: those of the LPCAM.
        folded: gives the copy of a Classifier that is used, run by an engine perhaps.
        reading: how image files are read, as the data set of the run was; arrays are taken as
            they are.
        made_by: provenance, added to every result.

    Raises:
        PrototypeError: if there are no prototypes or they belong to another classifier.
        ClassifierError: if the model has no map or no linear head that can be found.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        >>> lpcam = LPCAM(nn.Sequential(*layers, nn.Linear(4, 2)), classes=["cat", "dog"])
        >>> explain = Explainer(lpcam.fit([(torch.rand(2, 3, 64, 64), torch.eye(2))]))
        >>> explain(np.zeros((40, 60, 3), np.uint8), labels=["cat"]).mask().shape
        (40, 60)
    """

    def __init__(
        self,
        model: LPCAM | WrappedModel | nn.Module,
        prototypes: Prototypes | None = None,
        settings: LpcamSettings | str | None = None,
        *,
        preprocessing: Preprocessing | None = None,
        mask_ids: Sequence[int] | None = None,
        scoring: Scoring | None = None,
        score_side: int | None = None,
        precision: Precision = "float32",
        maximum_side: int = 1024,
        foreground_only: bool = False,
        early: EarlyPrototypes | None = None,
        folded: Callable[[Classifier], Classifier] = Classifier.folded,
        reading: Reading = USUAL,
        made_by: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(model, LPCAM):
            prototypes = prototypes or model.prototypes_
            settings = settings or model.settings_
            foreground_only = foreground_only or not model.with_context
            early = early or model.early_
            model = model.source_
        if prototypes is None:
            raise PrototypeError("no prototypes given; pass them, or pass a fitted LPCAM")
        extractor = CAM(model, settings or _stored_settings(prototypes))
        source, self.settings = extractor.source_, extractor.settings_
        prototypes.check_source(source, "this explainer")
        self.early = early
        if early is not None:
            early.check_fingerprint(prototypes.fingerprint, "this explainer")
        self.classes = source.classes
        self.classifier = folded(source) if isinstance(source, Classifier) else source
        if isinstance(source, Classifier):
            preprocessing = source.preprocessing
        self.preprocessing = preprocessing or Preprocessing.of_timm(source.core)
        # A wrapped model is read by hooks, which two threads would share.
        self._lock = threading.Lock() if isinstance(source, WrappedModel) else nullcontext()
        self.mask_ids = None if mask_ids is None else tuple(mask_ids)
        if self.mask_ids is not None and not (
            len(self.mask_ids) == len(self.classes)
            and all(1 <= value <= MOST_MASK_VALUES for value in self.mask_ids)
        ):
            raise DataError(
                f"mask_ids is {mask_ids!r:.60}; expected a value from 1 to {MOST_MASK_VALUES} for "
                f"each of the {len(self.classes)} classes"
            )
        own = isinstance(source, Classifier) or source.new_head or source.output == "sigmoid"
        self.scoring: Scoring = scoring or ("sigmoid" if own else "softmax")
        named = ("scoring", self.scoring, get_args(Scoring)), ("precision", precision, PRECISIONS)
        for what, given, known in named:
            if given not in known:
                raise DataError(f"{what} is {given!r}; expected one of {', '.join(known)}")
        self.score_side, self.maximum_side, self.reading = score_side, maximum_side, reading
        self.precision = PRECISIONS[precision]
        self.foreground_only = foreground_only
        self._use(prototypes)
        self.made_by = {
            "fingerprint": prototypes.fingerprint,
            **_described(self.settings),
            "method": "LPCAM-E" if early else "LPCAM-F" if foreground_only else "LPCAM",
            "maximum_side": maximum_side,
            "precision": precision,
            "scoring": self.scoring,
            "score_side": score_side,
            **reading.as_json(),
            "versions": versions(),
            **(made_by or {}),
        }

    @classmethod
    def from_files(
        cls,
        model: str | Path,
        prototypes: str | Path,
        *,
        weights: str | Path = PRETRAINED,
        preset: str | None = None,
        scoring: Scoring | None = None,
        device: str = "auto",
    ) -> Self:
        """Load a classifier, and prototypes that ``LPCAM.save`` wrote.

        ``model`` is a file that ``Classifier.save`` wrote, whose classes are scored by sigmoid
        usually, or the name of a timm model with its own head, scored by softmax. ``weights`` are
        its weights: ``"pretrained"`` or a safetensors file.

        Raises ClassifierError or ArtefactError if the model or a file cannot be loaded, and
        PrototypeError if the prototypes belong to another classifier.
        """
        if from_file := Path(model).suffix == ".safetensors":
            classifier = Classifier.load(Path(model))
        else:
            classifier = timm_classifier(str(model), weights=weights)
        path = Path(prototypes)
        tensors, metadata = read_tensors(path)
        found = Prototypes.of_file(path, tensors, metadata)
        found.check_fingerprint(classifier.fingerprint(), str(path))
        early = EarlyPrototypes.of_file(tensors, metadata[EARLY]) if EARLY in metadata else None
        return cls(
            classifier.to(choose_device(device)),
            found,
            preset,
            scoring=scoring or ("sigmoid" if from_file else "softmax"),
            early=early,
            made_by={"model": Path(model).name, "prototypes": digest_file(path)},
        )

    def _use(self, prototypes: Prototypes) -> None:
        self.prototypes = prototypes
        vectors = prototypes.vectors(with_context=not self.foreground_only)
        self.vectors = vectors.to(single(self.classifier.weight))
        self.parts = prototypes.parts()

    def with_choices(self, choices: Sequence[Choice]) -> Self:
        """A twin whose prototypes have more choices; raises as :meth:`Prototypes.with_choices`."""
        twin = copy.copy(self)
        twin._use(self.prototypes.with_choices(choices))
        return twin

    def fast(self) -> Self:
        """A twin that maps images at scale 1 without their mirror images; the model is shared.

        Its maps are coarser and take a fraction of the time. Scores and thresholds are the same.
        """
        twin = copy.copy(self)
        twin.settings = self.settings.fixed(scales=(1.0,), flip=False)
        twin.made_by = {**self.made_by, **_described(twin.settings)}
        return twin

    def __call__(
        self,
        image: ImageSource,
        *,
        labels: Sequence[str] | None = None,
        minimum_score: float = MINIMUM_SCORE,
        at_least_one: bool = False,
        threshold: float | None = None,
        name: str | None = None,
    ) -> ImageMaps:
        """Map one image.

        Args:
            image: a file, a Pillow image, or uint8 (H, W, 3) RGB.
            labels: classes to map; None: those whose score is above ``minimum_score``.
            at_least_one: if no score is above ``minimum_score``, map the class of the highest.
            threshold: of the LPCAM mask, 0 to 1; None: that of the settings.
            name: of the image in results; None: the file's name without extension.

        Raises ImageError or DataError if the image cannot be used or a label is unknown, and
        PrototypeError if the features hold NaN or Inf.
        """
        wanted = None if labels is None else self.indices(labels)
        how = f"predicted, score above {minimum_score:g}" + " or the highest" * at_least_one

        def choose(scores: NDArray[np.float64]) -> list[int]:
            if wanted is not None:
                return wanted
            order = descending(scores)
            return [n for n in order if scores[n] > minimum_score] or order[: int(at_least_one)]

        maps = self._map(image, choose, threshold, name)
        maps.made_by["labels"] = how if wanted is None else "given"
        if maps.classes:
            return maps
        best, score = maps.ranking[0]
        note = f"no class scores above {minimum_score:g} (the highest: {best} {score:.2f})"
        return replace(maps, notes=(f"{note}, so the mask is all background",))

    def highest(self, image: ImageSource, count: int) -> ImageMaps:
        """Map the ``count`` classes of the highest scores. Raises as :meth:`__call__` does."""
        return self._map(image, lambda scores: descending(scores)[:count])

    @torch.inference_mode()
    def discriminative(self, image: ImageSource, label: str) -> NDArray[np.float32]:
        """Evidence (H, W) of the parts that only a class has, to separate its objects that touch.

        See :func:`lpcam.method.objects.separate`. Raises as :meth:`__call__` does.
        """
        (place,) = self.indices([label])
        whole, _ = _read(image, self.reading)
        mapped, settings = limit_long_side(whole, self.maximum_side), self.settings
        with self._lock:
            pairs, _ = self._pyramid(mapped, settings.scales, flip=settings.flip, early=False)
        prototypes = [self.prototypes.foreground.prototypes(n) for n in range(len(self.classes))]
        weight = single(self.classifier.weight)
        plane = discriminative_map(pairs, weight, prototypes, place, mapped.shape[:2])
        return np.asarray(resize(plane[None], whole.shape[:2])[0].float().cpu())

    def indices(self, labels: Sequence[str]) -> list[int]:
        """Indices of class names, without repetition; DataError for an unknown class."""
        return class_indices(self.classes, labels)

    @torch.inference_mode()
    def _map(
        self,
        source: ImageSource,
        choose: Callable[[NDArray[np.float64]], list[int]],
        threshold: float | None = None,
        name: str | None = None,
    ) -> ImageMaps:
        image, own_name = _read(source, self.reading)
        made_from = {"file": printable(Path(source))} if isinstance(source, str | Path) else {}
        mapped, settings = limit_long_side(image, self.maximum_side), self.settings
        with self._lock:
            pairs, early = self._pyramid(mapped, settings.scales, flip=settings.flip, early=True)
            at_1 = dict(zip(settings.scales, pairs, strict=True)).get(1.0)
            scores = self._scores(mapped, at_1)
        return ImageMaps.of_features(
            pairs,
            (mapped.shape[0], mapped.shape[1]),
            choose(scores),
            single(self.classifier.weight),
            self.vectors,
            self.classes,
            scores,
            settings,
            self.mask_ids,
            self.early,
            early,
            self.parts,
            image=image,
            threshold=settings.threshold if threshold is None else threshold,
            name=own_name if name is None else name,
            made_by={**self.made_by, **made_from},
        )

    def _pyramid(
        self, image: NDArray[np.uint8], scales: Sequence[float], *, flip: bool, early: bool
    ) -> tuple[list[FeaturePair], list[FeaturePair]]:
        """Features (C, h, w) of one image at each scale, and of early layers if they are wanted."""
        source, precision, size = self.classifier, self.precision, image.shape[:2]
        pyramid: Callable[[Sequence[float]], Iterator[FeaturePair]]
        if isinstance(source, Classifier):
            pyramid = partial(image_pyramid, source, image[None], flip=flip, precision=precision)
        else:
            images = self._input(image)
            pyramid = partial(tensor_pyramid, source, images, flip=flip)
            size = images.shape[-2:]
        layers = self.early.layers if early and self.early is not None else ()
        pairs, found = tapped_pyramid(source, pyramid, scales, layers, (size[0], size[1]))
        return [image_of(pair) for pair in pairs], [image_of(pair) for pair in found]

    def _input(self, image: NDArray[np.uint8]) -> Tensor:
        """An image (H, W, 3) as a batch (1, 3, H', W') of a size that the wrapped model takes."""
        model = cast(WrappedModel, self.classifier)
        multiple = model.multiple
        height, width = (max(1, round(side / multiple)) * multiple for side in image.shape[:2])
        size = model.fixed_size or (height, width)
        image = image if size == image.shape[:2] else resize_image(image, size)
        return self.preprocessing(image)[None].to(model.device)

    def _scores(self, image: NDArray[np.uint8], pair: FeaturePair | None) -> NDArray[np.float64]:
        """Scores (N,) in [0, 1]; uses the features at scale 1 where they have the right size."""
        if self.score_side not in (None, max(image.shape[:2])):
            image, pair = resize_long_side(image, self.score_side), None
        if isinstance(self.classifier, WrappedModel):
            logits = self.classifier.logits(self._input(image))[0]
        else:
            if pair is None:
                (pair,), _ = self._pyramid(image, (1.0,), flip=False, early=False)
            logits = self.classifier.head(pair.features.mean((-2, -1)))
        return class_scores(logits, self.scoring)


def _described(settings: LpcamSettings) -> dict[str, Any]:
    """What the provenance of maps tells of their settings."""
    changed = settings.model_dump(mode="json", include=set(settings.changes()))
    return {
        "preset": settings.preset,
        "changed_from_preset": changed,
        "scales": list(settings.scales),
        "flip": settings.flip,
    }


def _stored_settings(prototypes: Prototypes) -> LpcamSettings | None:
    """The settings that ``LPCAM.save`` stored with the prototypes, if any."""
    stored = prototypes.made_by.get("settings")
    try:
        return None if stored is None else LpcamSettings.model_validate(stored)
    except ValidationError as error:
        raise ArtefactError(
            f"the settings stored with the prototypes do not fit this version "
            f"({error.error_count()} differ); name a preset, or fit the prototypes again"
        ) from None


def _read(source: ImageSource, reading: Reading) -> tuple[NDArray[np.uint8], str]:
    """(H, W, 3) upright RGB and a name."""
    if isinstance(source, str | Path):
        return read_image(Path(source), reading), Path(source).stem
    if isinstance(source, Image.Image):
        try:
            upright = source if reading.stored else ImageOps.exif_transpose(source)
            return to_rgb(upright, reading.range), "image"
        except (ValueError, OSError) as error:
            raise ImageError(f"cannot use this Pillow image: {error}") from error
    shape: tuple[int, ...] = getattr(source, "shape", ())
    kind = getattr(source, "dtype", type(source).__name__)
    if len(shape) != 3 or shape[2] != 3 or kind != np.uint8 or not source.size:
        raise DataError(f"image is {kind} {shape}; expected uint8 (H, W, 3) RGB")
    return source, "image"
