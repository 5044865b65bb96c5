"""CAM and LPCAM: an image and a classifier in, class maps out.

The functions work on the features of one image at several scales and are what a run uses; the
classes :class:`CAM` and :class:`LPCAM` wrap them for tensors and data loaders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

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
        yield _pair(classifier, resized, flip=flip, precision=None)


def _pair(
    classifier: Classifier, images: Tensor, *, flip: bool, precision: torch.dtype | None
) -> FeaturePair:
    stacked = torch.cat([images, images.flip(-1)]) if flip else images
    with torch.autocast(images.device.type, precision, enabled=precision is not None):
        # The same numbers in a layout in which convolutions are a tenth faster on a CPU.
        features = classifier.features(stacked.contiguous(memory_format=torch.channels_last))
    if precision is not None:
        features = features.float()
    if not all_finite(features):
        raise PrototypeError(
            "the backbone gave NaN or Inf features for this image; check its weights and the "
            "preprocessing (mean and std)"
        )
    count = images.shape[0]
    return FeaturePair(features[:count], features[count:] if flip else None)


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
        dtype: in which the sample of local features is kept; half precision ends at 65504.
        with_context: False gives LPCAM-F, the foreground term alone.

    Attributes:
        prototypes_: :class:`~lpcam.prototypes.Prototypes`, after ``fit``, ``partial_fit`` or
            ``load``.
    """

    def __init__(
        self,
        classifier: Classifier,
        settings: LpcamSettings | str = "voc12.official",
        *,
        random_state: int = 0,
        dtype: torch.dtype = torch.float16,
        with_context: bool = True,
    ) -> None:
        super().__init__(classifier, settings)
        self.random_state = random_state
        self.dtype = dtype
        self.with_context = with_context
        self._reset()

    def _reset(self) -> None:
        self._reservoir = Reservoir(self.settings.max_features, self.random_state, self.dtype)
        self._images = 0
        self._prototypes: Prototypes | None = None

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
        self._reset()
        for images, labels in loader:
            self.partial_fit(images, labels)
        self._cluster()
        return self

    @torch.no_grad()
    def partial_fit(self, images: Tensor, labels: Tensor) -> Self:
        """Collect the local features of one more batch (eq. 2), for data that arrives in parts.

        The clustering waits until ``prototypes_`` is first needed. Parts that are fitted in the
        same order give the prototypes of one ``fit`` over them all.

        Args:
            images: (B, 3, H, W), normalised as the classifier expects.
            labels: (B, N) multi-hot.

        Raises:
            ValueError: if the labels do not fit the batch.
        """
        settings, weight = self.settings, self.classifier.weight
        _check_labels(labels, images.shape[0], len(self.classifier.classes))
        multi_scale = settings.split_maps == "multi_scale"
        scales = settings.scales if multi_scale else (1.0,)
        if 1.0 not in scales:
            scales = (*scales, 1.0)
        pairs = list(
            tensor_pyramid(
                self.classifier,
                images.to(self.classifier.device),
                scales,
                flip=settings.flip and multi_scale,
            )
        )
        features = pairs[scales.index(1.0)].features
        maps = None
        if multi_scale:
            used = pairs[: len(settings.scales)]
            maps = cam_maps(used, weight, _size(images), epsilon=settings.cam_epsilon).high_res
        self._prototypes = None
        for row in range(images.shape[0]):
            present = labels[row].nonzero().flatten().tolist()
            split_map = (
                maps[row, present]
                if maps is not None
                else single_scale_cam(features[row], weight[present], epsilon=settings.cam_epsilon)
            )
            name = f"image {self._images}"
            collect(self._reservoir, features[row], present, split_map, settings, name)
            self._images += 1
        return self

    @torch.inference_mode(False)  # first needed in a call, they are to serve outside it too
    @torch.no_grad()
    def _cluster(self) -> Prototypes:
        self._prototypes = make_prototypes(
            self._reservoir,
            self.classifier.weight,
            self.classifier.classes,
            self.settings,
            seed=self.random_state,
            fingerprint=self.classifier.fingerprint(),
            made_by={
                "settings": self.settings.model_dump(mode="json"),
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
            raise NotFittedError(
                "this LPCAM has no prototypes yet; call fit(loader) with labelled images, or "
                "load(path) a file that save wrote"
            )
        return self._cluster()

    @torch.inference_mode()
    def __call__(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Maps of a batch, as :meth:`CAM.__call__`.

        Raises:
            NotFittedError: before ``fit`` or ``load``.
        """
        vectors = self.prototypes_.vectors(with_context=self.with_context)
        maps = lpcam_maps(
            self._pairs(images), vectors.to(self.classifier.weight), _size(images)
        ).high_res
        return _only_present(maps, labels).to(images.device)

    def save(self, path: str | Path) -> None:
        """Write the prototypes to a safetensors file.

        Raises:
            NotFittedError: before ``fit`` or ``load``.
        """
        self.prototypes_.save(Path(path))

    def load(self, path: str | Path) -> Self:
        """Read prototypes that :meth:`save` wrote.

        Raises:
            ArtefactError: if the file is missing or damaged.
            PrototypeError: if they belong to another classifier.
        """
        prototypes = Prototypes.load(Path(path), fingerprint=self.classifier.fingerprint())
        self._reset()
        self._prototypes = prototypes
        return self


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
