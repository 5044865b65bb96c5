"""Probabilities and labels of one image: scales, mirror images, fusion, dense CRF.

They are those of the specification of segmentation, sections 1 to 3 ("Test"). L labels are 0, the
background, and n + 1 for class n; H x W is the image, h x w the logits of a network.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lpcam.data.dataset import ClassTable
from lpcam.data.resize import resize, scaled_size
from lpcam.method.seeds import to_mask
from lpcam.refine.crf import CrfSettings, DenseCrf
from lpcam.runtime.errors import ClassifierError, DataError
from lpcam.segmentation.segmenter import Segmenter
from lpcam.segmentation.settings import SegmentTestSettings

MINIMUM_SIDE = 32  #: Minimum side of a scaled image, in pixels; a shorter side is enlarged to it.
WRAPPED_MEAN = (104.008, 116.669, 122.675)
"""Mean colour that the original DeepLabV2 program subtracts from images: blue, green, red."""
CHUNK_BYTES = 2**26  #: Size of the planes that are enlarged together; COCO's can be 3.9 GB.


@torch.no_grad()
def probabilities(
    segmenter: Segmenter, image: NDArray[np.uint8], settings: SegmentTestSettings
) -> Tensor:
    """Probabilities of the labels at every pixel of an image.

    Logits are enlarged to the image (bilinear,
    align_corners False). ``mean_logits`` takes the softmax of their mean, ``mean_probabilities``
    and ``max_probabilities`` the mean and the maximum of their softmaxes, which then do not sum to
    one.

    Args:
        segmenter: a segmenter in evaluation mode.
        image: uint8 (H, W, 3) RGB, as it was read.
        settings: scales and their fusion; the CRF is that of :func:`refine`.

    Returns:
        (L, H, W) float32 in [0, 1] on the segmenter's device.

    Raises:
        DataError: if the image is not such an array.
        ClassifierError: if the segmenter is in training mode, or its logits have another number of
            labels or are not finite.

    Example:
        >>> from lpcam.classifiers.classifier import Preprocessing
        >>> preprocessing = Preprocessing((0.5,) * 3, (0.5,) * 3)
        >>> network = torch.nn.Conv2d(3, 2, 1)  # logits of the background and a class
        >>> segmenter = Segmenter(network, ClassTable(("cow",), (1,)), preprocessing)
        >>> settings = SegmentTestSettings.from_preset("deeplabv2.official")
        >>> probabilities(segmenter, np.zeros((48, 64, 3), np.uint8), settings).shape
        torch.Size([2, 48, 64])
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise DataError(f"image is {image.dtype} {image.shape}; expected uint8 (H, W, 3) RGB")
    if segmenter.training:
        raise ClassifierError("the segmenter is in training mode; call eval() first")
    size = (image.shape[0], image.shape[1])
    largest = settings.fusion == "max_probabilities"
    normalised = segmenter.preprocessing(image)[None].to(segmenter.device)
    total = normalised.new_zeros(len(segmenter.classes) + 1, *size)  # probabilities are >= 0, too
    turns = (False, True) if settings.flip else (False,)
    for scale in settings.scales:
        to = sides(size, scale, settings)
        if settings.align_corners and to != size:
            scaled = F.interpolate(normalised, size=to, mode="bilinear", align_corners=True)
        else:
            scaled = resize(normalised, to)
        for mirrored in turns:
            pixels = scaled.flip(-1) if mirrored else scaled
            logits = _logits(segmenter, pixels)
            if mirrored:
                logits = logits.flip(-1)
            if settings.fusion == "mean_logits":
                _add_(total, logits)
            else:
                full = resize(logits, size).softmax(0)
                torch.maximum(total, full, out=total) if largest else total.add_(full)
    if not largest:
        total.div_(len(settings.scales) * len(turns))
    if settings.fusion == "mean_logits":  # the softmax in place, to halve the memory
        total.sub_(total.amax(0)).exp_()
        total.div_(total.sum(0))
    return total


def sides(size: tuple[int, int], scale: float, settings: SegmentTestSettings) -> tuple[int, int]:
    """Size (height, width) at which an image is segmented, at least `MINIMUM_SIDE` each."""
    if settings.resize is not None:
        longest, shortest = settings.resize
        scale *= min(longest / max(size), shortest / min(size))
    cut = int(size[0] * scale), int(size[1] * scale)
    height, width = scaled_size(*size, scale) if settings.sides == "rounded" else cut
    return max(MINIMUM_SIDE, height), max(MINIMUM_SIDE, width)


def _logits(segmenter: Segmenter, images: Tensor) -> Tensor:
    """(L, h, w) float32 of one image (1, 3, H, W)."""
    logits: Tensor = segmenter(images)
    labels = len(segmenter.classes) + 1
    if logits.ndim != 4 or tuple(logits.shape[:2]) != (1, labels):
        raise ClassifierError(
            f"the segmenter made logits of the shape {tuple(logits.shape)} of one image; expected "
            f"(1, {labels}, h, w): the background and {labels - 1} classes"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ClassifierError(
            "the segmenter's logits hold NaN or infinite values; its training may have diverged: "
            "train it again at a lower learning rate"
        )
    return logits[0].float()


def _add_(total: Tensor, maps: Tensor) -> None:
    """Enlarge maps (L, h, w) to the size of ``total`` (L, H, W), and add them to it."""
    size = (total.shape[-2], total.shape[-1])
    step = max(1, CHUNK_BYTES // (total.element_size() * math.prod(size)))
    for start in range(0, len(total), step):
        total[start : start + step].add_(resize(maps[start : start + step], size))


def make_crf(settings: SegmentTestSettings, memory: int | None = None) -> DenseCrf | None:
    """The dense CRF of the settings with the memory for one image, in bytes; None without one."""
    if settings.crf is None:
        return None
    return DenseCrf(CrfSettings.from_preset(settings.crf), memory=memory)


@torch.no_grad()
def refine(
    probabilities: Tensor, image: NDArray[np.uint8], settings: SegmentTestSettings, crf: DenseCrf
) -> Tensor:
    """Marginals (L, H, W) of a dense CRF on probabilities (L, H, W) of an image (H, W, 3) uint8.

    The CRF sees the image, or what the original DeepLabV2 program gives to its CRF: BGR minus
    `WRAPPED_MEAN`, cast to 8 bits, -5 to 251 (specification of segmentation, section 1, "CRF bug").
    """
    seen = _wrapped(image) if settings.crf_image == "wrapped" else image
    colours = torch.from_numpy(np.ascontiguousarray(seen)).to(probabilities.device)
    return crf.refine_probabilities(colours, probabilities)


def _wrapped(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    centred: NDArray[np.float64] = image[:, :, ::-1] - np.array(WRAPPED_MEAN)
    return centred.astype(np.int64).astype(np.uint8)


def labels(probabilities: Tensor) -> Tensor:
    """The most probable label of each pixel, the first of equal ones: (L, H, W) to int64 (H, W)."""
    return probabilities.argmax(0)


def label_mask(labels: Tensor, classes: ClassTable) -> NDArray[np.uint8]:
    """Mask values of labels: int64 (H, W), 0..N, to uint8 (H, W) of 0 and mask ids of the classes.

    Example:
        >>> label_mask(torch.tensor([[0, 2]]), ClassTable(("cow", "dog"), (10, 12)))
        array([[ 0, 12]], dtype=uint8)
    """
    return to_mask(labels, np.arange(len(classes)), classes)
