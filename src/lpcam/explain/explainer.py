"""From an image to its maps, with labels of the classifier's own."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import ValidationError
from torch import Tensor

from lpcam.classifier import PRETRAINED, Classifier
from lpcam.data.folder import read_folder
from lpcam.data.images import limit_long_side, read_image, resize_long_side, to_rgb
from lpcam.data.voc import CLASSES as VOC_CLASSES
from lpcam.errors import ArtefactError, DataError, ImageError
from lpcam.explain.maps import METHOD_NAMES, ImageMaps
from lpcam.extract import FeaturePair, cam_maps, image_pyramid, lpcam_maps
from lpcam.features import PRECISIONS
from lpcam.presets import LpcamSettings
from lpcam.prototypes import Prototypes
from lpcam.recipe import MapsSection, Recipe, load_recipe
from lpcam.resources import choose_device
from lpcam.storage import digest_file, read_json
from lpcam.version import versions

logger = logging.getLogger(__name__)

Scoring = Literal["sigmoid", "softmax"]
MINIMUM_SCORE = 0.5
"""A class is predicted if its score is above it: more likely there than not."""
MOST_MASK_VALUES = 254
"""Between background (0) and ignored (255)."""
CLASSES_TOGETHER = 4
"""Whose maps are fused together: all of many classes at once would need gigabytes."""

ImageSource = Path | str | Image.Image | NDArray[np.uint8]


class Explainer:
    """Maps new images with a classifier and its prototypes; may be called from several threads.

    Args:
        classifier: as :class:`~lpcam.classifier.Classifier`; later changes do not reach the maps.
        prototypes: made from the features of that classifier.
        settings: scales, flip and thresholds; an :class:`~lpcam.presets.LpcamSettings` or the name
            of a preset.
        mask_ids: the value of each class in masks; None: 1, 2, ... in the order of the classes.
        scoring: how logits become scores: ``"sigmoid"``, each class apart, or ``"softmax"``.
        score_side: long side, in pixels, at which images are scored; None: as they are mapped.
        maps: precision, and the long side above which an image is mapped smaller.
        foreground_only: maps LPCAM-F, the foreground term alone, in the place of LPCAM.
        made_by: provenance that goes into every result.

    Raises:
        PrototypeError: if the prototypes belong to another classifier.
    """

    def __init__(
        self,
        classifier: Classifier,
        prototypes: Prototypes,
        settings: LpcamSettings | str = "voc12.official",
        *,
        mask_ids: Sequence[int] | None = None,
        scoring: Scoring = "sigmoid",
        score_side: int | None = None,
        maps: MapsSection | None = None,
        foreground_only: bool = False,
        made_by: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(settings, str):
            settings = LpcamSettings.from_preset(settings)
        maps = maps or MapsSection()
        fingerprint = classifier.fingerprint()
        prototypes.check_fingerprint(fingerprint, "this explainer")
        self.classes = classifier.classes
        self.classifier = classifier.folded()
        self.settings = settings
        self.mask_ids = None if mask_ids is None else tuple(mask_ids)
        self.scoring: Scoring = scoring
        self.score_side = score_side
        self.maximum_side = maps.maximum_side
        self.precision = PRECISIONS[maps.precision]
        self.vectors = prototypes.vectors(with_context=not foreground_only).to(classifier.weight)
        self.made_by = {
            "fingerprint": fingerprint,
            "preset": settings.preset,
            "changed_from_preset": settings.model_dump(
                mode="json", include=set(settings.changes())
            ),
            "method": "LPCAM-F" if foreground_only else "LPCAM",
            "scales": list(settings.scales),
            "flip": settings.flip,
            "maximum_side": maps.maximum_side,
            "precision": maps.precision,
            "scoring": scoring,
            "score_side": score_side,
            "versions": versions(),
            **(made_by or {}),
        }

    @classmethod
    def from_run(cls, folder: Path | str, *, device: str = "auto") -> Self:
        """The classifier, prototypes and settings of a run, which must have reached prototypes.

        Raises:
            ArtefactError: if something is missing or damaged; the message says what to run.
            PrototypeError: if the prototypes belong to another classifier.
        """
        folder = Path(folder)
        if not (folder / "recipe.yaml").is_file():
            raise ArtefactError(
                f"{folder} is no run folder: it holds no recipe.yaml; give the folder that "
                "'lpcam run' wrote"
            )
        recipe = load_recipe(folder / "recipe.yaml")
        paths = {
            "classifier": folder / "classifier" / "classifier.safetensors",
            "prototypes": folder / "prototypes" / "prototypes.safetensors",
        }
        for what, path in paths.items():
            if not path.is_file():
                raise ArtefactError(
                    f"the run {folder} has no {what} yet ({path} is missing); run 'lpcam "
                    f"prototypes {folder / 'recipe.yaml'}' first"
                )
        classifier = Classifier.load(paths["classifier"])
        record = folder / "classifier" / "stage.json"
        parts = read_json(record).get("parts", {}) if record.is_file() else {}
        method = parts.get("method", recipe.classifier.method)
        foreground_only = recipe.seeds.method == "LPCAM-F"
        return cls(
            classifier.to(choose_device(device)),
            Prototypes.load(paths["prototypes"], fingerprint=classifier.fingerprint()),
            recipe.lpcam.model_copy(
                update={
                    "threshold": recipe.fixed_threshold("LPCAM-F" if foreground_only else "LPCAM"),
                    "cam_threshold": recipe.fixed_threshold("CAM"),
                }
            ),
            mask_ids=_mask_ids(folder, recipe, len(classifier.classes)),
            # whole images at the middle training size, as the classifier is validated
            score_side=(
                sum(recipe.classifier.finetune.long_side) // 2
                if method == "finetune"
                else recipe.classifier.probe.long_side
            ),
            maps=recipe.maps,
            foreground_only=foreground_only,
            made_by={
                "run": recipe.name,
                "backbone": recipe.classifier.backbone,
                "prototypes": digest_file(paths["prototypes"]),
            },
        )

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
        """A classifier by file or timm name, and prototypes of :meth:`lpcam.extract.LPCAM.save`.

        Args:
            model: a file of :meth:`~lpcam.classifier.Classifier.save`, or the name of a timm model
                that is used with the head that it was trained with.
            weights: of a timm model: ``"pretrained"`` or a safetensors file.
            preset: scales, flip and thresholds; None: the settings that made the prototypes, where
                the file has them, else the default preset.
            scoring: None: softmax for a timm model, sigmoid for a file.

        Raises:
            ClassifierError: if the model cannot be had or its head is not linear.
            ArtefactError: if a file is missing or damaged.
            PrototypeError: if the prototypes belong to another classifier.
        """
        if Path(model).suffix == ".safetensors":
            classifier = Classifier.load(Path(model))
            usual: Scoring = "sigmoid"
        else:
            from lpcam.models import timm_classifier  # noqa: PLC0415 - timm's lists of names

            classifier = timm_classifier(str(model), weights=weights)
            usual = "softmax"
        loaded = Prototypes.load(Path(prototypes), fingerprint=classifier.fingerprint())
        kept = loaded.made_by.get("settings")
        if preset is None and isinstance(kept, Mapping):
            try:
                settings = LpcamSettings.model_validate(dict(kept))
            except ValidationError as error:
                raise ArtefactError(
                    f"the settings in {prototypes} are not those of this version "
                    f"({error.error_count()} differ); name a preset, or fit the prototypes again"
                ) from None
        else:
            settings = LpcamSettings.from_preset(preset or "voc12.official")
        return cls(
            classifier.to(choose_device(device)),
            loaded,
            settings,
            scoring=scoring or usual,
            made_by={
                "model": Path(model).name,
                "prototypes": digest_file(Path(prototypes)),
            },
        )

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
            labels: the classes to map; None: those whose score is above ``minimum_score``.
            at_least_one: take the class of the highest score where none is above.
            threshold: of the LPCAM mask; None: that of the settings.
            name: None: the file's name without extension.

        Raises:
            ImageError: if the image cannot be read.
            DataError: if a label is unknown or the array is no RGB image.
            PrototypeError: if the features hold NaN or Inf.
        """
        wanted = None if labels is None else self.indices(labels)

        def choose(scores: NDArray[np.float64]) -> list[int]:
            if wanted is not None:
                return wanted
            order = np.argsort(-scores, kind="stable")
            above = [int(n) for n in order if scores[n] > minimum_score]
            return above or ([int(order[0])] if at_least_one else [])

        maps = self._map(image, choose, threshold, name)
        asked = "given" if wanted is not None else f"predicted, score above {minimum_score:g}"
        if wanted is None and at_least_one:
            asked += " or the highest"
        maps.made_by["labels"] = asked
        if not maps.classes:
            return _with_note(
                maps,
                f"no class scores above {minimum_score:g} (the highest: {maps.ranking[0][0]} "
                f"{maps.ranking[0][1]:.2f}), so the mask is all background",
            )
        return maps

    def highest(self, image: ImageSource, count: int, *, name: str | None = None) -> ImageMaps:
        """Map the ``count`` classes of the highest scores; raises as a call does."""
        return self._map(
            image, lambda scores: np.argsort(-scores, kind="stable")[:count].tolist(), None, name
        )

    def indices(self, labels: Sequence[str]) -> list[int]:
        """Indices of class names, each once, in the order given.

        Raises:
            DataError: naming an unknown class and what is near it.
        """
        for label in labels:
            if label not in self.classes:
                near = difflib.get_close_matches(label, self.classes, n=5, cutoff=0.5)
                near = near or list(self.classes[:8])
                more = ", ..." if len(self.classes) > len(near) else ""
                raise DataError(
                    f"unknown class {label!r}; the classifier's {len(self.classes)} classes are "
                    f"{', '.join(near)}{more}"
                )
        return [self.classes.index(label) for label in dict.fromkeys(labels)]

    @torch.inference_mode()
    def _map(
        self,
        source: ImageSource,
        choose: Callable[[NDArray[np.float64]], list[int]],
        threshold: float | None,
        name: str | None,
    ) -> ImageMaps:
        image, own_name = _read(source)
        made_from = {"file": printable(Path(source))} if isinstance(source, str | Path) else {}
        mapped = limit_long_side(image, self.maximum_side)
        size = (mapped.shape[0], mapped.shape[1])
        settings = self.settings
        features = self._pyramid(mapped, settings.scales)
        pairs = dict(zip(settings.scales, features, strict=True))
        scores = self._scores(mapped, pairs.get(1.0))
        chosen = choose(scores)
        # A result may be used outside inference mode, so it is NumPy's.
        cam, lpcam = (np.zeros((len(chosen), *size), np.float32) for _ in METHOD_NAMES)
        weight = self.classifier.weight
        for start in range(0, len(chosen), CLASSES_TOGETHER):
            part = chosen[start : start + CLASSES_TOGETHER]
            to = slice(start, start + len(part))
            cams = cam_maps(features, weight[part], size, epsilon=settings.cam_epsilon)
            cam[to] = _array(cams.high_res)
            lpcam[to] = _array(lpcam_maps(features, self.vectors[part], size).high_res)
        empty = [self.classes[n] for n in chosen if not bool(self.vectors[n].any())]
        order = np.argsort(-scores, kind="stable")
        return ImageMaps(
            image=image,
            classes=tuple(self.classes[n] for n in chosen),
            mask_ids=self._values(chosen),
            scores=tuple(float(scores[n]) for n in chosen),
            cam=cam,
            lpcam=lpcam,
            threshold=settings.threshold if threshold is None else threshold,
            cam_threshold=settings.cam_threshold,
            ranking=tuple((self.classes[n], float(scores[n])) for n in order),
            notes=tuple(f"{c} has no prototypes, so its LPCAM is empty" for c in empty),
            name=own_name if name is None else name,
            made_by={**self.made_by, **made_from},
        )

    def _pyramid(
        self, image: NDArray[np.uint8], scales: Sequence[float], *, flip: bool | None = None
    ) -> list[FeaturePair]:
        """Features (C, h, w) of one image at each scale."""
        pairs = image_pyramid(
            self.classifier,
            image[None],
            scales,
            flip=self.settings.flip if flip is None else flip,
            precision=self.precision,
        )
        return [
            FeaturePair(p.features[0], None if p.mirrored is None else p.mirrored[0]) for p in pairs
        ]

    def _scores(self, image: NDArray[np.uint8], pair: FeaturePair | None) -> NDArray[np.float64]:
        """(N,) in [0, 1]; from the features at scale 1 where they are of the right size."""
        if self.score_side not in (None, max(image.shape[:2])):
            image, pair = resize_long_side(image, self.score_side), None
        if pair is None:
            (pair,) = self._pyramid(image, (1.0,), flip=False)
        logits = self.classifier.head(pair.features.mean((-2, -1))).double().cpu()
        scores = logits.sigmoid() if self.scoring == "sigmoid" else logits.softmax(0)
        return cast(NDArray[np.float64], scores.numpy())

    def _values(self, chosen: Sequence[int]) -> tuple[int, ...]:
        """Mask values of classes; of more classes than a mask can hold, of the chosen ones."""
        if self.mask_ids is not None:
            return tuple(self.mask_ids[n] for n in chosen)
        if len(self.classes) <= MOST_MASK_VALUES:
            return tuple(n + 1 for n in chosen)
        if len(chosen) > MOST_MASK_VALUES:
            raise DataError(
                f"{len(chosen)} classes are asked for, more than the {MOST_MASK_VALUES} that a "
                "mask can hold; raise the score or name fewer labels"
            )
        return tuple(range(1, len(chosen) + 1))


def _array(maps: Tensor) -> NDArray[np.float32]:
    return cast(NDArray[np.float32], maps.float().cpu().numpy())


def _with_note(maps: ImageMaps, note: str) -> ImageMaps:
    return ImageMaps(**{**vars(maps), "notes": (*maps.notes, note)})


def _read(source: ImageSource) -> tuple[NDArray[np.uint8], str]:
    """(H, W, 3) upright RGB and a name."""
    if isinstance(source, str | Path):
        return read_image(Path(source)), Path(source).stem
    if isinstance(source, Image.Image):
        try:
            return to_rgb(ImageOps.exif_transpose(source)), "image"
        except (ValueError, OSError) as error:
            raise ImageError(f"cannot use this Pillow image: {error}") from error
    if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8 or not source.size:
        raise DataError(f"image is {source.dtype} {source.shape}; expected uint8 (H, W, 3) RGB")
    return source, "image"


def _mask_ids(folder: Path, recipe: Recipe, count: int) -> tuple[int, ...] | None:
    """The mask values of a run's classes, also where its data are no longer there."""
    if recipe.data.kind == "voc":
        names = recipe.data.classes or VOC_CLASSES
        return tuple(VOC_CLASSES.index(name) + 1 for name in names)
    record = folder / "seeds" / "stage.json"
    if record.is_file():
        ids = read_json(record).get("parts", {}).get("mask_ids", ())
        if len(ids) == count:
            return tuple(int(value) for value in ids)
    try:
        ids = read_folder(recipe.data.root, classes=recipe.data.classes).classes.mask_ids
    except DataError as error:
        logger.warning("mask values are 1, 2, ... in the order of the classes: %s", error)
        return None
    return ids if len(ids) == count else None


def printable(path: Path) -> str:
    """A path as text that UTF-8 can write, whatever bytes its file name has."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
