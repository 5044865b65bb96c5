"""CAM and LPCAM: an image and a classifier in, class maps out.

The functions work on the features of one image at several scales and are what a run uses; the
classes :class:`CAM` and :class:`LPCAM` wrap them for tensors and data loaders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lpcam.classifier import Classifier
from lpcam.data.images import resize_image, scaled_size
from lpcam.errors import NotFittedError, PrototypeError
from lpcam.functional import (
    FusedMaps,
    cam_of_pair,
    class_activation,
    fuse_scales,
    lpcam_of_pair,
    normalize,
)
from lpcam.presets import LpcamSettings
from lpcam.prototypes import Prototypes, Reservoir, make_prototypes, split


class FeaturePair(NamedTuple):
    """Features of one scale: of the image, and of the mirrored image if flip is used."""

    features: Tensor
    """(..., C, h, w)"""
    mirrored: Tensor | None


# -- One image at several scales ---------------------------------------------------------------


def image_pyramid(
    classifier: Classifier, image: NDArray[np.uint8], scales: Sequence[float], *, flip: bool
) -> Iterator[FeaturePair]:
    """Features of one image at each scale, with PIL bicubic resizing of the uint8 image.

    Args:
        image: (H, W, 3) uint8 RGB.

    Yields:
        one pair of (C, h, w) a scale, in the order of ``scales``.

    Raises:
        PrototypeError: if the features hold NaN or Inf.
    """
    height, width = image.shape[:2]
    for scale in scales:
        size = scaled_size(height, width, scale)
        resized = image if size == (height, width) else resize_image(image, size)
        tensor = classifier.preprocessing(resized).to(classifier.device)
        yield _pair(classifier, tensor[None], flip=flip, squeeze=True)


def tensor_pyramid(
    classifier: Classifier, images: Tensor, scales: Sequence[float], *, flip: bool
) -> Iterator[FeaturePair]:
    """The same for a batch of normalised images (B, 3, H, W), resized by antialiased bicubic."""
    height, width = images.shape[-2:]
    for scale in scales:
        size = scaled_size(height, width, scale)
        resized = images
        if size != (height, width):
            resized = F.interpolate(
                images, size=size, mode="bicubic", align_corners=False, antialias=True
            )
        yield _pair(classifier, resized, flip=flip, squeeze=False)


def _pair(classifier: Classifier, images: Tensor, *, flip: bool, squeeze: bool) -> FeaturePair:
    stacked = torch.cat([images, images.flip(-1)]) if flip else images
    # The same numbers in a layout in which convolutions are a tenth faster on a CPU.
    features = classifier.features(stacked.contiguous(memory_format=torch.channels_last))
    if not bool(torch.isfinite(features).all()):
        raise PrototypeError(
            "the backbone gave NaN or Inf features for this image; check its weights and the "
            "preprocessing (mean and std)"
        )
    count = images.shape[0]
    first, second = features[:count], features[count:] if flip else None
    if squeeze:
        return FeaturePair(first[0], None if second is None else second[0])
    return FeaturePair(first, second)


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
    grid = features.shape[-2:]
    if split_map.shape[-2:] != grid:
        options = {} if settings.split_resize == "nearest" else {"align_corners": False}
        split_map = F.interpolate(
            split_map[None], size=grid, mode=settings.split_resize, **options
        )[0]
    rows = features.flatten(1).T
    for row, index in enumerate(classes):
        foreground, context = split(
            split_map[row].flatten(), settings.tau, inclusive=settings.tau_inclusive
        )
        for turn in range(1 if times is None else times.get(index, 0)):
            turn_name = f"{name}#{turn}" if turn else name
            reservoir.add(index, "foreground", rows[foreground.to(rows.device)], turn_name)
            reservoir.add(index, "context", rows[context.to(rows.device)], turn_name)


def single_scale_cam(features: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    """Equation 1 on the feature grid, one scale, no flip: (C, h, w) to (K, h, w) in [0, 1]."""
    return normalize(class_activation(features, weight).relu(), "max", epsilon)


# -- Extractors --------------------------------------------------------------------------------


class CAM:
    """Class activation maps of equation 1, over scales and flip.

    Args:
        classifier: backbone and linear head.
        settings: an :class:`~lpcam.presets.LpcamSettings` or the name of a preset.
    """

    def __init__(
        self, classifier: Classifier, settings: LpcamSettings | str = "voc12.official"
    ) -> None:
        self.classifier = classifier
        self.settings = (
            LpcamSettings.from_preset(settings) if isinstance(settings, str) else settings
        )

    @torch.inference_mode()
    def __call__(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Maps of a batch.

        Args:
            images: (B, 3, H, W), normalised as the classifier expects.
            labels: (B, N) multi-hot; maps of absent classes are zero. None maps every class.

        Returns:
            (B, N, H, W) in [0, 1], on the device of ``images``.

        Raises:
            ValueError: if the labels do not fit the batch.
        """
        pairs = self._pairs(images)
        maps = cam_maps(
            pairs,
            self.classifier.weight,
            _size(images),
            epsilon=self.settings.cam_epsilon,
        ).high_res
        return _only_present(maps, labels).to(images.device)

    def _pairs(self, images: Tensor) -> Iterator[FeaturePair]:
        return tensor_pyramid(
            self.classifier,
            images.to(self.classifier.device),
            self.settings.scales,
            flip=self.settings.flip,
        )


class LPCAM(CAM):
    """LPCAM of equations 2-6: fit prototypes on a labelled loader, then map images.

    Args:
        classifier: backbone and linear head.
        settings: an :class:`~lpcam.presets.LpcamSettings` or the name of a preset.
        random_state: seed of the reservoir and the clustering.
        with_context: False gives LPCAM-F, the foreground term alone.

    Attributes:
        prototypes_: :class:`~lpcam.prototypes.Prototypes`, after ``fit`` or ``load``.
    """

    prototypes_: Prototypes

    def __init__(
        self,
        classifier: Classifier,
        settings: LpcamSettings | str = "voc12.official",
        *,
        random_state: int = 0,
        with_context: bool = True,
    ) -> None:
        super().__init__(classifier, settings)
        self.random_state = random_state
        self.with_context = with_context

    @torch.inference_mode()
    def fit(self, loader: Iterable[tuple[Tensor, Tensor]]) -> Self:
        """Collect local features, cluster, score and select (eqs 2-4).

        Args:
            loader: yields normalised images (B, 3, H, W) and multi-hot labels (B, N). Every image
                serves all its classes: ``images_per_class`` of the settings is for a run, which
                draws from a list (:func:`lpcam.prototypes.draw_images`).

        Raises:
            ValueError: if the labels do not fit a batch.
            PrototypeError: if no class has any foreground feature.
        """
        reservoir = Reservoir(self.settings.max_features, self.random_state)
        weight = self.classifier.weight
        multi_scale = self.settings.split_maps == "multi_scale"
        seen = 0
        for images, labels in loader:
            _check_labels(labels, images.shape[0], len(self.classifier.classes))
            on_device = images.to(self.classifier.device)
            features = self.classifier.features(on_device)
            maps = super().__call__(on_device) if multi_scale else None
            for row in range(images.shape[0]):
                present = labels[row].nonzero().flatten().tolist()
                split_map = (
                    maps[row, present]
                    if maps is not None
                    else single_scale_cam(
                        features[row], weight[present], epsilon=self.settings.cam_epsilon
                    )
                )
                collect(
                    reservoir, features[row], present, split_map, self.settings, f"image {seen}"
                )
                seen += 1
        self.prototypes_ = make_prototypes(
            reservoir,
            weight.cpu(),
            self.classifier.classes,
            self.settings,
            seed=self.random_state,
            fingerprint=self.classifier.fingerprint(),
            made_by=self._made_by(seen),
        )
        return self

    @torch.inference_mode()
    def __call__(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Maps of a batch, as :meth:`CAM.__call__`.

        Raises:
            NotFittedError: before ``fit`` or ``load``.
        """
        vectors = self._fitted().vectors(with_context=self.with_context)
        maps = lpcam_maps(
            self._pairs(images), vectors.to(self.classifier.weight), _size(images)
        ).high_res
        return _only_present(maps, labels).to(images.device)

    def save(self, path: str | Path) -> None:
        """Write the prototypes to a safetensors file.

        Raises:
            NotFittedError: before ``fit`` or ``load``.
        """
        self._fitted().save(Path(path))

    def load(self, path: str | Path) -> Self:
        """Read prototypes that :meth:`save` wrote.

        Raises:
            ArtefactError: if the file is missing or damaged.
            PrototypeError: if they belong to another classifier.
        """
        self.prototypes_ = Prototypes.load(Path(path), fingerprint=self.classifier.fingerprint())
        return self

    def _fitted(self) -> Prototypes:
        prototypes: Prototypes | None = getattr(self, "prototypes_", None)
        if prototypes is None:
            raise NotFittedError(
                "this LPCAM has no prototypes yet; call fit(loader) with labelled images, or "
                "load(path) a file that save wrote"
            )
        return prototypes

    def _made_by(self, images: int) -> dict[str, Any]:
        return {
            "settings": self.settings.model_dump(mode="json"),
            "random_state": self.random_state,
            "images": images,
        }


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


def _check_labels(labels: Tensor, batch: int, classes: int) -> None:
    if tuple(labels.shape) != (batch, classes):
        raise ValueError(
            f"expected multi-hot labels of shape {(batch, classes)}, got {tuple(labels.shape)}"
        )


def _only_present(maps: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        return maps
    _check_labels(labels, maps.shape[0], maps.shape[1])
    return maps * (labels > 0).to(maps)[:, :, None, None]
