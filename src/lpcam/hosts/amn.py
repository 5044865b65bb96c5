"""AMN: a per-pixel classifier that is told which classes an image shows (specification of AMN).

It is taught by ternary labels, and its probabilities become the maps. LPCAM enters in one of two
places (section 5): its maps make the labels that teach (Reading A), or prototypes of AMN's own
features map the image (Reading B).

Shapes: B images of H x W pixels, N classes, L = N + 1 labels with the background first, K present
classes, C channels, h x w the feature grid.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from lpcam import engine
from lpcam.classifier import BackboneSpec, Classifier, Preprocessing, build, described
from lpcam.data.images import read_image, read_index_mask, resize_image, scaled_size
from lpcam.data.items import BACKGROUND, IGNORE, ClassTable, Item
from lpcam.errors import ClassifierError, DataError
from lpcam.extract import FeaturePair, all_finite, image_pyramid
from lpcam.functional import FusedMaps, lpcam_of_pair, normalize, strided, unflip
from lpcam.metrics import truth_labels
from lpcam.network_files import SavedNetwork
from lpcam.networks.deeplabv2 import Aspp
from lpcam.presets import AmnSettings
from lpcam.probe import multi_hot
from lpcam.processes import Processes
from lpcam.refine.walk import STRIDE
from lpcam.segmentation.augment import check_masks
from lpcam.segmentation.losses import reduce_labels
from lpcam.train import freeze

EPSILON = 1e-5
"""Added to the range that probabilities are divided by (section 4)."""


# -- Network -----------------------------------------------------------------------------------


class Amn(SavedNetwork):
    """Backbone, label conditioning and head (section 2).

    A linear layer makes of an image's labels a factor for each channel; dilated convolutions,
    summed, make logits of the features times the factors.

    Args:
        classifier: whose backbone is used, with its classes; its own head is not.
        dilations: of the head's parallel 3 x 3 convolutions.
        dropout: of the features' elements, in training alone.
        seed: of the first weights of conditioning and head.
    """

    kind = "amn"
    title = "AMN"
    stage = "host"
    builder = "lpcam.hosts.amn.build_amn"

    def __init__(
        self,
        classifier: Classifier,
        *,
        dilations: Sequence[int],
        dropout: float,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        classifier.head.requires_grad_(False)
        channels, count = classifier.weight.shape[1], len(classifier.classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conditioning = nn.Linear(count, channels)
            self.head = Aspp(channels, count + 1, dilations)
        self.dropout = nn.Dropout(dropout)
        self.dilations = tuple(dilations)
        self.eval()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.classifier.classes

    @property
    def preprocessing(self) -> Preprocessing:
        return self.classifier.preprocessing

    @property
    def device(self) -> torch.device:
        return self.conditioning.weight.device

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, L, h, w) of normalised images (B, 3, H, W) and their labels.

        Args:
            labels: (B, N) multi-hot.
        """
        return self.logits(self.features(images, labels))

    def features(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, C, h, w) of normalised images (B, 3, H, W).

        Args:
            labels: (B, N) multi-hot, for the features after the conditioning; None: those before.
        """
        features = self.classifier.features(images)
        return features if labels is None else self.condition(features, labels)

    def condition(self, features: Tensor, labels: Tensor) -> Tensor:
        """Features (B, C, h, w) times the factors of labels (B, N) multi-hot; signed."""
        factors: Tensor = self.conditioning(labels.to(features))
        return features * factors[:, :, None, None]

    def logits(self, features: Tensor) -> Tensor:
        """Conditioned features (B, C, h, w) to (B, L, h, w), with dropout in training."""
        found: Tensor = self.head(self.dropout(features))
        return found

    def constant_response(self) -> tuple[Tensor, Tensor]:
        """The head on an input that is the same everywhere: weight (L, C) and bias (L,).

        Far from the border the logits of conditioned features F are weight . F + bias. This scores
        the prototypes of Reading B, whose head is no 1 x 1 convolution (section 5, inferred).
        """
        branches = [b for b in self.head.children() if isinstance(b, nn.Conv2d)]
        weight = torch.stack([b.weight.detach().sum((2, 3)) for b in branches]).sum(0)
        bias = torch.stack([b.bias.detach() for b in branches if b.bias is not None]).sum(0)
        return weight, bias

    def folded(self) -> Amn:
        """The same network for inference, its backbone as :meth:`Classifier.folded`.

        It shares conditioning and head with this one and cannot be saved.
        """
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        twin.classifier = self.classifier.folded()
        twin.dropout = nn.Dropout(self.dropout.p).eval()  # not shared, for its mode is not either
        twin.training = False
        return twin

    def _can_be_described(self) -> bool:
        return self.classifier.spec is not None

    @classmethod
    def _described(cls, metadata: Mapping[str, Any]) -> Amn:
        classifier = described(metadata, metadata["classes"])
        return cls(classifier, dilations=metadata["dilations"], dropout=metadata["dropout"])

    def _description(self) -> dict[str, Any]:
        return {
            **self.classifier._description(),
            "dilations": list(self.dilations),
            "dropout": self.dropout.p,
        }


def build_amn(
    spec: BackboneSpec,
    classes: Sequence[str],
    settings: AmnSettings,
    *,
    weights: str | Path,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> Amn:
    """Build AMN on a timm backbone, with first weights of conditioning and head.

    Args:
        spec, classes, weights, mean, std: as :func:`lpcam.classifier.build`; the weights are
            ImageNet's and not those of the classifier that made the maps (section 2).
        settings: whose ``dilations`` and ``dropout`` the network has.
        seed: of the first weights.

    Raises:
        ClassifierError: as :func:`lpcam.classifier.build`.
    """
    classifier = build(spec, classes, weights=weights, mean=mean, std=std, seed=seed)
    return Amn(classifier, dilations=settings.dilations, dropout=settings.dropout, seed=seed)


# -- Loss --------------------------------------------------------------------------------------


def label_counts(labels: Tensor) -> Tensor:
    """(2,) int64: how many pixels of labels (B, h, w) are background, and how many of a class."""
    return _sides(labels).sum((1, 2, 3))


def _sides(labels: Tensor) -> Tensor:
    """(2, B, h, w) bool: the background, and the pixels of a class."""
    background = labels == BACKGROUND
    return torch.stack([background, ~background & (labels != IGNORE)])


def amn_loss(
    logits: Tensor, labels: Tensor, smoothing: float, counts: Tensor | None = None
) -> Tensor:
    """The balanced cross-entropy with smoothed labels (section 3).

    Half the mean over background pixels and half the mean over those of a class, each over the
    whole batch. A mean without a pixel is 0, and so is its gradient.

    Args:
        logits: (B, L, h, w); half precision is computed in float32.
        labels: (B, h, w) integers: 0 background, 1..N classes, 255 not counted.
        smoothing: part of the target that the L - 1 other labels share evenly.
        counts: of :func:`label_counts` of the whole batch, where this is a part of it.

    Returns:
        a scalar; the parts of a batch add up to its loss.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if logits.ndim != 4 or labels.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"logits {tuple(logits.shape)} must be (B, L, h, w) and labels {tuple(labels.shape)} "
            "their (B, h, w); reduce the labels first"
        )
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    likelihoods = wide.log_softmax(1)
    target = labels.long().masked_fill(labels == IGNORE, BACKGROUND)
    own = likelihoods.gather(1, target[:, None])[:, 0]
    others = likelihoods.sum(1) - own
    losses = -(1 - smoothing) * own - smoothing / (logits.shape[1] - 1) * others
    sums = torch.where(_sides(labels), losses, 0.0).sum((1, 2, 3))
    counts = label_counts(labels) if counts is None else counts.to(losses.device)
    return (sums / counts.clamp(min=1).to(sums.dtype)).sum() / 2


# -- Training ----------------------------------------------------------------------------------


def augment(
    image: NDArray[np.uint8],
    labels: Tensor,
    preprocessing: Preprocessing,
    settings: AmnSettings,
    generator: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Random scale, mirror image and square crop of an image and its labels (section 3).

    The image is resized by Pillow's bicubic filter and the labels by its nearest neighbour; a crop
    that reaches beyond the image is the mean colour there and ignored.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) int64.

    Returns:
        (3, crop, crop) float32 and (crop, crop) int64.
    """
    size = scaled_size(image.shape[0], image.shape[1], float(generator.uniform(*settings.scale)))
    tensor, resized = preprocessing(resize_image(image, size)), reduce_labels(labels, size)
    planes = [(tensor, 0), (resized, IGNORE)]
    canvas, target = engine.mirror_and_crop(planes, settings.crop, generator)
    return canvas, target


class _Labelled(Dataset[tuple[Tensor, Tensor, int]]):
    """Augmented images, their labels and their numbers by place."""

    def __init__(
        self,
        pairs: Sequence[tuple[Item, Path]],
        classes: ClassTable,
        preprocessing: Preprocessing,
        settings: AmnSettings,
        seed: int,
    ) -> None:
        self.pairs = pairs
        self.classes = classes
        self.preprocessing = preprocessing
        self.settings = settings
        self.seed = seed

    def __getitem__(self, place: engine.Place) -> tuple[Tensor, Tensor, int]:
        epoch, index, _ = place
        item, path = self.pairs[index]
        image, labels = augment(
            read_image(item.image),
            truth_labels(read_index_mask(path), self.classes),
            self.preprocessing,
            self.settings,
            np.random.default_rng([self.seed, epoch, index]),
        )
        return image, labels, index


def train_amn(
    network: Amn,
    labelled: Sequence[tuple[Item, Path]],
    classes: ClassTable,
    settings: AmnSettings,
    *,
    seed: int,
    folder: Path,
    workers: int = 0,
    processes: Processes | None = None,
) -> list[dict[str, Any]]:
    """Train in place, with checkpoints in ``folder`` from which a stopped run goes on (section 3).

    Adam without a schedule, its rates for the backbone and for conditioning and head; batch-norm
    statistics frozen. The labels are read at the centre of each cell of the logits' grid.

    Args:
        labelled: images and the PNGs of their ternary labels (0 background, mask ids, 255 ignored).
            Those without a pixel that counts are left out.
        classes: of the network, with their mask ids.
        workers: processes that read and augment images.
        processes: those that share each batch; the step is that of the whole batch, whatever their
            number, but for rounding.

    Returns:
        one record an epoch: ``epoch``, ``step`` and mean ``loss``.

    Raises:
        DataError: as :func:`lpcam.segmentation.augment.check_masks`, before any training.
        ClassifierError: if the classes are not the network's, ``freeze`` matches nothing, or as
            :func:`lpcam.engine.run`.
        ArtefactError: if a checkpoint is damaged or of another network.
    """
    processes = processes or Processes()
    if classes.names != network.classes:
        raise ClassifierError(
            f"the network has the classes {', '.join(network.classes)}, but the labels are of "
            f"{', '.join(classes.names)}; build it with the same classes in the same order"
        )
    pairs = check_masks(labelled, classes, strict=True).pairs
    freeze(network.classifier.backbone, settings.freeze)
    backbone = [p for p in network.classifier.backbone.parameters() if p.requires_grad]
    rest = [*network.conditioning.parameters(), *network.head.parameters()]
    groups = [
        {"params": backbone, "lr": settings.learning_rate},
        {"params": rest, "lr": settings.head_learning_rate},
    ]
    shown = multi_hot([item for item, _ in pairs], len(classes))
    batch = min(settings.batch_size, len(pairs))
    an_epoch = len(pairs) // batch
    model = processes.replicate(network)

    def loss(sample: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        images, labels, indices = sample
        network.train()
        # In this layout convolutions take half the time on a CPU; the numbers are the same.
        images = images.to(network.device, memory_format=torch.channels_last)
        logits = model(images, shown[indices].to(network.device))
        labels = reduce_labels(labels, logits.shape[-2:])
        counts = processes.sum(label_counts(labels))
        return amn_loss(logits, labels.to(network.device), settings.smoothing, counts)

    history = engine.run(
        network,
        torch.optim.Adam([g for g in groups if g["params"]], weight_decay=settings.weight_decay),
        _Labelled(pairs, classes, network.preprocessing, settings, seed),
        len(pairs),
        loss,
        engine.Plan(settings.epochs * an_epoch, batch, an_epoch, lambda _: 1.0),
        label="training AMN",
        section="host.amn",
        seed=seed,
        folder=folder,
        workers=workers,
        processes=processes,
    )
    network.eval()
    return history


# -- Maps --------------------------------------------------------------------------------------


def export_maps(
    logits: Sequence[Tensor],
    labels: Sequence[int],
    seed: Tensor | None,
    size: tuple[int, int],
) -> FusedMaps:
    """Probabilities of an image's labels, stretched to [0, 1] (section 4).

    The logits of the scales are enlarged, bilinearly and straight to each size, and averaged; of
    the softmax over all L labels the background's plane and those of the present classes are kept.
    Each plane is stretched by its minimum and maximum, but where the seed says background.

    Args:
        logits: (L, h, w) of each scale, the mean of the image's and its mirror image's.
        labels: the K present classes, from 0.
        seed: (H, W) the labels that taught the network, of which 0 matters; None stretches every
            pixel. They are brought to each size by Pillow's nearest neighbour.
        size: (H, W) of the image.

    Returns:
        ``cam`` (K + 1, ceil(H/4), ceil(W/4)) and ``high_res`` (K + 1, H, W), background first.

    Raises:
        DataError: if there is no scale, the seed has another size, or the logits lack a label.
    """
    if not logits:
        raise DataError("there are no logits; give those of at least one scale")
    _check_labels(labels, logits[0].shape[0] - 1)
    kept = [0, *(index + 1 for index in labels)]

    def planes(target: tuple[int, int]) -> Tensor:
        found = _mean_at(logits, target).softmax(0)[kept]
        return _gated(found, normalize(found, "minmax", EPSILON), seed, size)

    return FusedMaps(planes(_quarter(size)), planes(size))


@torch.no_grad()
def maps_of(
    network: Amn,
    image: NDArray[np.uint8],
    labels: Sequence[int],
    seed: Tensor | None,
    settings: AmnSettings,
) -> FusedMaps:
    """AMN's maps of one image over scales and mirror images, in evaluation mode without dropout.

    (In the released program dropout stays on; that is noise, section 3.) Give the network's
    :meth:`Amn.folded` twin, which is faster.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: the K present classes, from 0.
        seed: (H, W) integers, the labels that taught the network; None where ``settings.gate`` is
            off.

    Returns:
        the K foreground planes: ``cam`` (K, ceil(H/4), ceil(W/4)) and ``high_res`` (K, H, W), in
        [0, 1], on the network's device. Without a class they are empty.

    Raises:
        DataError: if the seed is missing or has another size, or a label is no class.
        ClassifierError: if the logits hold NaN or Inf.
        PrototypeError: if the features do.
    """
    seed = _checked_seed(seed, image, settings)
    if not labels:
        return _no_maps(network, image)
    logits = []
    for pair in _pairs(network, image, labels, settings.scales, settings, conditioned=True):
        found = network.logits(pair.features)[0]
        if pair.mirrored is not None:
            found = (found + unflip(network.logits(pair.mirrored)[0])) / 2
        if not all_finite(found):
            raise ClassifierError(
                "AMN's conditioning or head gave NaN or Inf for this image; its weights are "
                "damaged: train it again"
            )
        logits.append(found)
    cam, high_res = export_maps(logits, labels, seed, _size(image))
    return FusedMaps(cam[1:], high_res[1:])


# -- Reading B: LPCAM on AMN's features --------------------------------------------------------


@torch.no_grad()
def features_of(
    network: Amn, image: NDArray[np.uint8], labels: Sequence[int], settings: AmnSettings
) -> Tensor:
    """Local features (C, h, w) of an image at scale 1, for :func:`lpcam.extract.collect`.

    After the conditioning, then signed, or before it, as ``settings.conditioned`` says.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: the K present classes, from 0.

    Raises:
        DataError: if a label is no class.
        PrototypeError: if the features hold NaN or Inf.
    """
    settings = settings.model_copy(update={"flip": False})
    (pair,) = _pairs(network, image, labels, (1.0,), settings, conditioned=settings.conditioned)
    return pair.features[0]


@torch.no_grad()
def reading_b_maps(
    network: Amn,
    vectors: Tensor,
    image: NDArray[np.uint8],
    labels: Sequence[int],
    seed: Tensor | None,
    settings: AmnSettings,
) -> FusedMaps:
    """LPCAM (equations 5 and 6) on AMN's features, in the place of :func:`maps_of` (section 5).

    Scales and sizes as there; each plane is divided by its maximum. With ``settings.gate`` that
    division raises nothing where the seed says background.

    Args:
        vectors: (N, C) of :meth:`lpcam.prototypes.Prototypes.vectors`, of :func:`features_of`.
        image, labels, seed: as :func:`maps_of`.

    Returns:
        as :func:`maps_of`.

    Raises:
        DataError, PrototypeError: as :func:`maps_of`.
    """
    seed = _checked_seed(seed, image, settings)
    if not labels:
        return _no_maps(network, image)
    _check_labels(labels, len(vectors))
    size, rows = _size(image), vectors[list(labels)].to(network.device)
    maps = [
        lpcam_of_pair(pair.features[0], None if pair.mirrored is None else pair.mirrored[0], rows)
        for pair in _pairs(
            network, image, labels, settings.scales, settings, conditioned=settings.conditioned
        )
    ]

    def planes(target: tuple[int, int]) -> Tensor:
        found = _mean_at(maps, target)
        stretched = normalize(found, "max")
        # A cosine difference reaches 2; the plane is then divided by more than 1 everywhere.
        return _gated(torch.minimum(found, stretched), stretched, seed, size)

    return FusedMaps(planes(_quarter(size)), planes(size))


# -- What both share ---------------------------------------------------------------------------


def _pairs(
    network: Amn,
    image: NDArray[np.uint8],
    labels: Sequence[int],
    scales: Sequence[float],
    settings: AmnSettings,
    *,
    conditioned: bool,
) -> Iterator[FeaturePair]:
    """Features (1, C, h, w) of each scale in evaluation mode, conditioned on the labels if said."""
    _check_labels(labels, len(network.classes))
    network.eval()
    shown = torch.zeros(1, len(network.classes), device=network.device)
    shown[0, list(labels)] = 1.0
    for pair in image_pyramid(network.classifier, image[None], scales, flip=settings.flip):
        if not conditioned:
            yield pair
            continue
        mirrored = None if pair.mirrored is None else network.condition(pair.mirrored, shown)
        yield FeaturePair(network.condition(pair.features, shown), mirrored)


def _check_labels(labels: Sequence[int], count: int) -> None:
    if any(not 0 <= index < count for index in labels):
        raise DataError(
            f"labels {list(labels)} are not all of the network's classes, 0 to {count - 1}; give "
            "indices of its classes"
        )


def _mean_at(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Mean of maps (P, h, w) at a size: bilinear, align_corners False."""
    total = maps[0].new_zeros(maps[0].shape[0], *size)
    for each in maps:
        total += F.interpolate(each[None], size=size, mode="bilinear", align_corners=False)[0]
    return total / len(maps)


def _gated(planes: Tensor, stretched: Tensor, seed: Tensor | None, size: tuple[int, int]) -> Tensor:
    """The stretched planes, but the plain ones where a seed of the image's size is background."""
    if seed is None:
        return stretched
    _check_seed_size(seed, size)
    sure = reduce_labels(seed, planes.shape[-2:]).to(planes.device) == BACKGROUND
    return torch.where(sure, planes, stretched)


def _check_seed_size(seed: Tensor, size: tuple[int, int]) -> None:
    if tuple(seed.shape) != size:
        raise DataError(
            f"the labels that gate the maps have {tuple(seed.shape)} pixels but the image {size}; "
            "make the labels again"
        )


def _checked_seed(
    seed: Tensor | None, image: NDArray[np.uint8], settings: AmnSettings
) -> Tensor | None:
    """The seed where it is needed, else None."""
    if not settings.gate:
        return None
    if seed is None:
        raise DataError(
            "the image has no labels, which say where its maps are not stretched; make them, or "
            "set amn.gate to false"
        )
    _check_seed_size(seed, _size(image))
    return seed


def _size(image: NDArray[np.uint8]) -> tuple[int, int]:
    return image.shape[0], image.shape[1]


def _quarter(size: tuple[int, int]) -> tuple[int, int]:
    return strided(size[0], STRIDE), strided(size[1], STRIDE)


def _no_maps(network: Amn, image: NDArray[np.uint8]) -> FusedMaps:
    size, nothing = _size(image), torch.zeros(0, device=network.device)
    return FusedMaps(nothing.new_zeros(0, *_quarter(size)), nothing.new_zeros(0, *size))
