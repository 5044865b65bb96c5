"""Training data of a segmenter: checked masks, random scale, crop, mirror image and colours.

What happens to an image depends on the seed, the epoch and the image alone; a scale of a whole
batch on the seed and the step (specification of segmentation, sections 1 to 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lpcam.classifiers.classifier import Preprocessing
from lpcam.data.dataset import BACKGROUND, IGNORE, ClassTable, Item, Skip
from lpcam.data.resize import resize, scaled_size
from lpcam.evaluation.segmentation import truth_labels
from lpcam.runtime.errors import DataError
from lpcam.runtime.parallel import ordered_map
from lpcam.segmentation.losses import reduce_labels
from lpcam.segmentation.settings import SegmenterSettings
from lpcam.training.augmentation import change_hsv
from lpcam.training.loop import Place

REDRAWS = 10  #: Maximum number of further draws of a crop for ``class_limit`` (section 3).
BRIGHTNESS = 32.0
"""Largest change of 8-bit values by the photometric distortion (section 3, as what follows)."""
CONTRAST = SATURATION = (0.5, 1.5)  #: Ranges of the factors of RGB and of the saturation.
HUE = 36.0  #: Largest turn in degrees: 18 on OpenCV's hue circle, which has 180 units.


def _draw_scale(settings: SegmenterSettings, generator: np.random.Generator) -> float:
    """A random scale: one of ``settings.scales``, or one uniform between the two."""
    if settings.scale_drawn == "choice":
        return settings.scales[int(generator.integers(len(settings.scales)))]
    low, high = settings.scales
    return float(generator.uniform(low, high))


def _batch_scale(settings: SegmenterSettings, seed: int, step: int) -> float:
    """The random scale that all images of a step share (section 2)."""
    # A spawned sequence is no image's, whose generators are made of the seed and two numbers.
    sequence = np.random.SeedSequence(seed, spawn_key=(step,))
    return _draw_scale(settings, np.random.default_rng(sequence))


def _augmented_size(
    size: tuple[int, int], box: tuple[int, int] | None, scale: float
) -> tuple[int, int]:
    """Size before the crop: ``scale`` times, or as fits in so many boxes, sides truncated."""
    if box is None:
        return scaled_size(*size, scale)
    longest, shortest = (max(1, int(side * scale)) for side in box)
    return scaled_size(*size, min(longest / max(size), shortest / min(size)))


def _draw_crop(
    labels: NDArray[Any], crop: int, class_limit: float | None, generator: np.random.Generator
) -> tuple[slice, slice]:
    """A random window of labels (H, W), drawn again for a class above the limit or no label."""
    for _ in range(1 + REDRAWS):
        top, left = (int(generator.integers(max(0, side - crop) + 1)) for side in labels.shape)
        window = slice(top, top + crop), slice(left, left + crop)
        taken = labels[window]
        counts = np.bincount(taken[taken != IGNORE], minlength=1)
        if class_limit is None or 0 < counts.max() <= class_limit * counts.sum():
            break
    return window


def _distort(image: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
    """Photometric distortion of an RGB image (H, W, 3), as mmsegmentation describes it (section 3).

    Brightness, contrast, saturation and hue (HSV), each in half of the cases; in half of the cases
    the contrast comes last. Values are clipped after each change, and HSV has 8 bits, as there.
    """
    brightness, contrast_first, contrast, saturation, hue = generator.random(5) < 0.5
    levels = image.astype(np.float32)
    if brightness:
        levels = np.clip(levels + generator.uniform(-BRIGHTNESS, BRIGHTNESS), 0.0, 255.0)
    factor = generator.uniform(*CONTRAST) if contrast else 1.0
    if contrast_first:
        levels = np.clip(levels * factor, 0.0, 255.0)
    if saturation or hue:
        picture = Image.fromarray(np.rint(levels).astype(np.uint8))
        scale = generator.uniform(*SATURATION) if saturation else 1.0
        turn = generator.uniform(-HUE, HUE) if hue else 0.0
        levels = np.array(change_hsv(picture, turn / 360, scale), np.float32)
    if not contrast_first:
        levels = np.clip(levels * factor, 0.0, 255.0)
    return np.rint(levels).astype(np.uint8)


def augment(
    image: NDArray[np.uint8],
    labels: NDArray[np.uint8] | NDArray[np.int64],
    preprocessing: Preprocessing,
    settings: SegmenterSettings,
    generator: np.random.Generator,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Random scale, square crop, mirror image and colours of an image and its labels.

    Image (H, W, 3) and labels (H, W) become (3, crop, crop) float32 and (crop, crop) int64. The
    padding, to the right and below before the mirror image, has the mean colour, 0, which the
    distortion does not change. ``scale`` is that of the batch; None draws it.
    """
    if scale is None:
        scale = _draw_scale(settings, generator)
    size = _augmented_size((labels.shape[0], labels.shape[1]), settings.resize, scale)
    resized = reduce_labels(torch.from_numpy(labels.astype(np.int64)), size)
    window = _draw_crop(resized.numpy(), settings.crop, settings.class_limit, generator)
    # without averaging, as OpenCV does, which the recipes' programs use
    planes = resize(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float(), size)
    taken = planes.round().to(torch.uint8).permute(1, 2, 0).numpy()[window]
    mirrored = generator.random() < 0.5
    if settings.distortion:
        taken = _distort(taken, generator)
    height, width = taken.shape[:2]
    canvas = torch.zeros(3, settings.crop, settings.crop)
    canvas[:, :height, :width] = preprocessing(taken)
    padded = torch.full((settings.crop, settings.crop), settings.padding_label)
    padded[:height, :width] = resized[window]
    return (canvas.flip(-1), padded.flip(-1)) if mirrored else (canvas, padded)


def make_sample(
    pairs: Sequence[tuple[Item, Path]],
    classes: ClassTable,
    preprocessing: Preprocessing,
    settings: SegmenterSettings,
    seed: int,
    place: Place,
) -> tuple[Tensor, Tensor]:
    """An augmented image (3, crop, crop) and its labels (crop, crop); DataError if sizes differ."""
    item, path = pairs[place.sample]
    image, mask = item.read(), item.read_mask(path)
    _check_size(item, path, image.shape[:2], mask)
    scale = _batch_scale(settings, seed, place.step) if settings.scale_of == "batch" else None
    labels = truth_labels(mask, classes).numpy()
    generator = np.random.default_rng([seed, place.epoch, place.sample])
    return augment(image, labels, preprocessing, settings, generator, scale=scale)


@dataclass(frozen=True)
class CheckedMasks:
    """Masks that can be trained on, and what they hold."""

    pairs: tuple[tuple[Item, Path], ...]  #: Images and masks that are used, in list order.
    dropped: tuple[Skip, ...]  #: Images whose masks have no pixel to learn from.
    pixels: tuple[int, ...]  #: Number of pixels of each label 0..N in the masks that are used.
    ignored: int  #: Number of ignored pixels in those masks.
    unknown: tuple[int, ...]  #: Mask ids of no class, in any mask; their pixels are ignored.


def check_masks(
    pairs: Sequence[tuple[Item, Path]], classes: ClassTable, *, strict: bool, workers: int = 1
) -> CheckedMasks:
    """Read every mask once before a training, and leave out those with nothing to learn from.

    A mask id of no class is a DataError if ``strict``; else it counts as ignored. ``workers`` masks
    are read at a time. DataError without a mask that is there, fits its image and can be used.
    """
    missing = [f"{item.id} ({path})" for item, path in pairs if not path.is_file()]
    if missing or not pairs:
        raise DataError(
            f"{len(missing)} of {len(pairs)} images have no mask: {', '.join(missing[:3])}; give "
            "images whose mask files exist"
        )
    known = (BACKGROUND, *classes.mask_ids)
    counts, unknown = np.zeros(256, np.int64), set[int]()
    used: list[tuple[Item, Path]] = []
    dropped: list[Skip] = []

    def look(pair: tuple[Item, Path]) -> tuple[NDArray[np.int64], list[int]]:
        item, path = pair
        try:
            mask = item.read_mask(path)
        except DataError as error:
            raise DataError(f"mask of {item.id!r}: {error}") from error
        _check_size(item, path, item.size(), mask)
        found = np.bincount(mask.ravel(), minlength=256)
        other = sorted(set(np.flatnonzero(found).tolist()) - {*known, IGNORE})
        if other and strict:
            raise DataError(
                f"mask {path} of {item.id!r} has the values {other}, which are of no class; "
                f"expected 0, {IGNORE} and the mask ids {list(classes.mask_ids)}: make the mask "
                "again, or name the classes it was made for"
            )
        return found, other

    for (item, path), (found, other) in zip(pairs, ordered_map(look, pairs, workers), strict=True):
        unknown.update(other)
        if found[list(known)].any():
            used.append((item, path))
            counts += found
        else:
            reason = f"mask {path} has no pixel that counts: all are ignored ({IGNORE})"
            dropped.append(Skip(item.id, reason + (f" or of no class ({other})" if other else "")))
    if not used:
        raise DataError(
            f"none of {len(pairs)} masks can be trained on: {dropped[0].reason}; make the masks "
            "again"
        )
    pixels = tuple(counts[list(known)].tolist())
    ignored = int(counts.sum()) - sum(pixels)
    return CheckedMasks(tuple(used), tuple(dropped), pixels, ignored, tuple(sorted(unknown)))


def _check_size(item: Item, path: Path, size: tuple[int, ...], mask: NDArray[np.uint8]) -> None:
    if mask.shape != size:
        raise DataError(
            f"mask {path} of {item.id!r} is {mask.shape[0]} x {mask.shape[1]} (height x width) but "
            f"the upright image is {size[0]} x {size[1]}; make the mask again in its size"
        )
