"""AMN: a per-pixel classifier that is given the classes of an image (specification of AMN).

It is trained on ternary labels, and its probabilities are the maps. LPCAM is used in one of two
ways (section 5): its maps make the labels (Reading A), or prototypes of AMN's own features map the
image (Reading B).

Shapes: B images of H x W pixels, N classes, L = N + 1 labels with the background first, K present
classes, C channels, h x w the feature grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from lpcam.classifiers.classifier import BackboneSpec, Classifier, Preprocessing, build, described
from lpcam.classifiers.feature_store import image_pyramid
from lpcam.classifiers.features import FeaturePair
from lpcam.classifiers.probe import multi_hot
from lpcam.data.dataset import BACKGROUND, IGNORE, ClassTable, Item
from lpcam.data.images import read_image
from lpcam.data.masks import read_index_mask
from lpcam.data.resize import quarter_size, resize
from lpcam.evaluation.segmentation import truth_labels
from lpcam.hosts.base import (
    Arm,
    Base,
    Host,
    HostData,
    HostNetwork,
    HostSection,
    HostSettings,
    View,
    check_finite,
    check_labels,
)
from lpcam.method.functional import FusedMaps, lpcam_of_pair, normalize, unflip
from lpcam.runtime.distributed import Processes
from lpcam.runtime.errors import ClassifierError, DataError
from lpcam.runtime.settings import Fraction, Positive
from lpcam.segmentation.augmentation import check_masks
from lpcam.segmentation.losses import reduce_labels
from lpcam.segmentation.networks.deeplabv2 import Aspp
from lpcam.training import loop as engine
from lpcam.training.augmentation import scale_mirror_crop
from lpcam.training.optim import freeze, names_below


class AmnSettings(HostSettings):
    """AMN: a per-pixel classifier with the image's labels as input (specification of AMN)."""

    table: ClassVar[str] = "amn"
    preset: str = "default"

    epochs: Annotated[int, Field(ge=1)]
    """Passes over the list; more train longer."""
    batch_size: Annotated[int, Field(ge=1)]
    """Images per training step."""
    learning_rate: Positive
    """Adam's learning rate of the backbone; it is constant."""
    head_learning_rate: Positive
    """Adam's learning rate of the head and the label conditioning; it is constant."""
    weight_decay: Annotated[float, Field(ge=0.0)]
    """L2 penalty, as Adam applies it."""
    freeze: tuple[str, ...]
    """Prefixes of the backbone's parameter names that are not trained."""
    scale: tuple[Positive, Positive]
    """Range from which each image's scale is drawn."""
    crop: Annotated[int, Field(ge=16)]
    """Side of the square crop, in pixels."""
    smoothing: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Part of the target shared among the other labels (epsilon in section 3)."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Probability that a feature element is set to zero in training."""
    dilations: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    """Dilations of the head's parallel 3 x 3 convolutions; larger ones see more context."""
    foreground_threshold: Fraction
    """LPCAM seeds above this are sure foreground in the teacher's masks, after a CRF."""
    background_threshold: Fraction
    """LPCAM seeds below this are sure background; pixels between are ignored."""
    cam_foreground_threshold: Fraction
    """``foreground_threshold`` for CAM."""
    cam_background_threshold: Fraction
    """``background_threshold`` for CAM."""
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Scales at which each image is mapped; the logits are averaged. More take more time."""
    flip: bool
    """Whether the mirrored image is mapped too."""
    gate: bool
    """Whether probabilities stay unstretched where the teacher says background (section 4)."""
    reading: Literal["teacher", "features"]
    """Use of LPCAM (section 5). ``teacher``: its masks train AMN (Reading A). ``features``: CAM
    masks train AMN, and prototypes of its features map the image (Reading B)."""
    conditioned: bool
    """Whether Reading B uses the features after the label conditioning."""
    threshold: Fraction
    """Threshold of the seed masks; a higher one marks fewer pixels as foreground."""


EPSILON = 1e-5
"""Added to the range that probabilities are divided by (section 4)."""


class Amn(HostNetwork):
    """Backbone, label conditioning and head (section 2).

    A linear layer turns an image's labels into a factor for each channel; summed dilated
    convolutions turn the features times the factors into logits.

    Args:
        classifier: its backbone and classes are used; its head is not.
        dilations: dilations of the head's parallel 3 x 3 convolutions.
        dropout: probability of dropping a feature, in training only.
        seed: random seed of the first weights of conditioning and head.
    """

    kind = "amn"
    title = "AMN"
    builder = "lpcam.hosts.amn.HOST.build"

    def __init__(
        self, classifier: Classifier, *, dilations: Sequence[int], dropout: float, seed: int = 0
    ) -> None:
        super().__init__()
        self.classifier = classifier
        classifier.head.requires_grad_(False)
        channels, count = classifier.weight.shape[1], len(classifier.classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conditioning = nn.Linear(count, channels)
            self.head = Aspp(channels, count + 1, dilations)
        self.dropout = dropout
        self.dilations = tuple(dilations)
        self.eval()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.classifier.classes

    @property
    def device(self) -> torch.device:
        return self.conditioning.weight.device

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, L, h, w) of normalised images (B, 3, H, W) with labels (B, N) multi-hot."""
        return self.logits(self.condition(self.classifier.features(images), labels))

    def condition(self, features: Tensor, labels: Tensor) -> Tensor:
        """Features (B, C, h, w) times the factors of labels (B, N) multi-hot; signed."""
        factors: Tensor = self.conditioning(labels.to(features))
        return features * factors[:, :, None, None]

    def logits(self, features: Tensor) -> Tensor:
        """Conditioned features (B, C, h, w) to (B, L, h, w), with dropout in training."""
        found: Tensor = self.head(F.dropout(features, self.dropout, self.training))
        return found

    def constant_response(self) -> tuple[Tensor, Tensor]:
        """Weight (L, C) and bias (L,) of the head on an input that is the same everywhere.

        They score the prototypes of Reading B, whose head is no 1 x 1 convolution (section 5,
        inferred).
        """
        branches = [b for b in self.head.children() if isinstance(b, nn.Conv2d)]
        weight = torch.stack([b.weight.detach().sum((2, 3)) for b in branches]).sum(0)
        bias = torch.stack([b.bias.detach() for b in branches if b.bias is not None]).sum(0)
        return weight, bias

    @classmethod
    def _described(cls, metadata: Mapping[str, Any]) -> Amn:
        classifier = described(metadata, metadata["classes"])
        return cls(classifier, dilations=metadata["dilations"], dropout=metadata["dropout"])

    def _description(self) -> dict[str, Any]:
        own = {"dilations": list(self.dilations), "dropout": self.dropout}
        return {**self.classifier._description(), **own}


def label_counts(labels: Tensor) -> Tensor:
    """Number of pixels (2,) int64 of labels (B, h, w) that are background, and of a class.

    Example:
        >>> label_counts(torch.tensor([[[0, 0, 0, 5, 255]]])).tolist()
        [3, 1]
    """
    return _sides(labels).sum((1, 2, 3))


def _sides(labels: Tensor) -> Tensor:
    """(2, B, h, w) bool: the background, and the pixels of a class."""
    background = labels == BACKGROUND
    return torch.stack([background, ~background & (labels != IGNORE)])


def amn_loss(
    logits: Tensor, labels: Tensor, smoothing: float, counts: Tensor | None = None
) -> Tensor:
    """Balanced cross-entropy with smoothed labels (section 3).

    Half the mean over background pixels and half the mean over those of a class, each over the
    whole batch. A mean without a pixel is 0, and so is its gradient.

    Args:
        logits: (B, L, h, w); half precision is computed in float32.
        labels: (B, h, w) integers: 0 background, 1..N classes, 255 not counted.
        smoothing: part of the target that the L - 1 other labels share evenly.
        counts: of :func:`label_counts` of the whole batch, where this is a part of it.

    Returns:
        a scalar; the parts of a batch add up to its loss.

    Example:
        >>> amn_loss(torch.zeros(1, 2, 1, 1), torch.full((1, 1, 1), 255), 0.4)
        tensor(0.)
    """
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    likelihoods = wide.log_softmax(1)
    target = labels.long().masked_fill(labels == IGNORE, BACKGROUND)
    own = likelihoods.gather(1, target[:, None])[:, 0]
    others = likelihoods.sum(1) - own
    losses = -(1 - smoothing) * own - smoothing / (logits.shape[1] - 1) * others
    sums = torch.where(_sides(labels), losses, 0.0).sum((1, 2, 3))
    counts = label_counts(labels) if counts is None else counts.to(losses.device)
    return (sums / counts.clamp(min=1).to(sums.dtype)).sum() / 2


def _sample(
    pairs: Sequence[tuple[Item, Path]],
    classes: ClassTable,
    preprocessing: Preprocessing,
    settings: AmnSettings,
    seed: int,
    place: engine.Place,
) -> tuple[Tensor, Tensor, int]:
    item, path = pairs[place.sample]
    labels = truth_labels(read_index_mask(path), classes).to(torch.uint8).numpy()
    generator = np.random.default_rng([seed, place.epoch, place.sample])
    image, cropped = scale_mirror_crop(
        read_image(item.image), labels, preprocessing, settings.scale, settings.crop, generator
    )
    return image, cropped, place.sample


def export_maps(
    logits: Sequence[Tensor], labels: Sequence[int], seed: Tensor | None, size: tuple[int, int]
) -> FusedMaps:
    """Probabilities of an image's labels, stretched to [0, 1] (section 4).

    The logits of the scales are enlarged to each size and averaged; after the softmax over all L
    labels the planes of the background and the present classes are kept. Each plane is stretched by
    its minimum and maximum, except where the seed mask says background.

    Args:
        logits: (L, h, w) of each scale, the mean of the image's and its mirror image's.
        labels: the K present classes, from 0.
        seed: (H, W) labels that the network was trained on, of which only 0 matters; None stretches
            every pixel.
        size: (H, W) of the image.

    Returns:
        ``cam`` (K + 1, ceil(H/4), ceil(W/4)) and ``high_res`` (K + 1, H, W), background first.

    Raises:
        DataError: if the seed has another size, or a label is not a class.

    Example:
        >>> export_maps([torch.zeros(3, 2, 2)], [1], None, (8, 12)).high_res.shape
        torch.Size([2, 8, 12])
    """
    check_labels(labels, logits[0].shape[0] - 1)
    kept = [0, *(index + 1 for index in labels)]

    def planes(target: tuple[int, int]) -> Tensor:
        found = _mean_at(logits, target).softmax(0)[kept]
        return _gated(found, normalize(found, "minmax", EPSILON), seed, size)

    return FusedMaps(planes(quarter_size(size)), planes(size))


@torch.no_grad()
def maps_of(
    network: Amn,
    image: NDArray[np.uint8],
    labels: Sequence[int],
    settings: AmnSettings,
    *,
    seed: Tensor | None = None,
    vectors: Tensor | None = None,
) -> FusedMaps:
    """Maps of one image over scales and mirror images, without dropout.

    Without vectors they are AMN's probabilities. (The released program leaves dropout on, section
    3.) With vectors (Reading B, section 5) they are LPCAM (equations 5 and 6) on AMN's features,
    each plane divided by its maximum. ``network.folded()`` is faster.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: the K present classes, from 0.
        settings: ``scales``, ``flip``, ``gate`` and, with vectors, ``conditioned`` are used.
        seed: (H, W) integers, the labels that the network was trained on. With ``gate`` no plane is
            stretched or raised where they are background.
        vectors: (N, C) prototypes of the features of :func:`local_features`.

    Returns:
        ``cam`` (K, ceil(H/4), ceil(W/4)) and ``high_res`` (K, H, W), in [0, 1].

    Raises:
        DataError: if the seed is missing or has another size, or a label is not a class.
        ClassifierError, PrototypeError: if the logits or the features hold NaN or Inf.

    Example:
        >>> settings = AmnSettings.from_preset("default", gate=False)
        >>> spec, image = BackboneSpec("test_resnet", {}, 16), np.zeros((32, 48, 3), np.uint8)
        >>> network = HOST.build(spec, ("cat", "dog"), settings, weights="random")
        >>> maps_of(network, image, [1], settings).cam.shape
        torch.Size([1, 8, 12])
    """
    size = (image.shape[0], image.shape[1])
    check_labels(labels, len(network.classes))
    if not settings.gate:
        seed = None
    elif seed is None:
        raise DataError(
            "the image has no labels, which say where its maps are not stretched; make them, or "
            "set amn.gate to false"
        )
    conditioned = vectors is None or settings.conditioned
    pairs = _pairs(network, image, labels, settings.scales, settings.flip, conditioned)
    if vectors is not None:
        return _lpcam_maps(pairs, vectors[list(labels)].to(network.device), seed, size)
    logits = []
    for pair in pairs:
        found = network.logits(pair.features)[0]
        if pair.mirrored is not None:
            found = (found + unflip(network.logits(pair.mirrored)[0])) / 2
        check_finite(found, "AMN's conditioning or head")
        logits.append(found)
    cam, high_res = export_maps(logits, labels, seed, size)
    return FusedMaps(cam[1:], high_res[1:])


def _lpcam_maps(
    pairs: Iterator[FeaturePair], vectors: Tensor, seed: Tensor | None, size: tuple[int, int]
) -> FusedMaps:
    """LPCAM of vectors (K, C) on the features of all scales."""
    maps = [
        lpcam_of_pair(
            pair.features[0], None if pair.mirrored is None else pair.mirrored[0], vectors
        )
        for pair in pairs
    ]

    def planes(target: tuple[int, int]) -> Tensor:
        found = _mean_at(maps, target)
        stretched = normalize(found, "max")
        # A cosine difference reaches 2; the plane is then divided by more than 1 everywhere.
        return _gated(torch.minimum(found, stretched), stretched, seed, size)

    return FusedMaps(planes(quarter_size(size)), planes(size))


@torch.no_grad()
def local_features(
    network: Amn,
    image: NDArray[np.uint8],
    labels: Sequence[int],
    settings: AmnSettings,
    *,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Features of an image for prototypes, and the maps that split them (section 5).

    Args:
        network, image, labels, seed: as for :func:`maps_of`.
        settings: with ``conditioned`` the features are those after the conditioning, and signed.

    Returns:
        features (C, h, w) at scale 1, and maps (K, H, W) of :func:`maps_of` without vectors.

    Example:
        >>> settings = AmnSettings.from_preset("default", gate=False)
        >>> spec, image = BackboneSpec("test_resnet", {}, 16), np.zeros((32, 48, 3), np.uint8)
        >>> network = HOST.build(spec, ("cat", "dog"), settings, weights="random")
        >>> [part.shape[1:] for part in local_features(network, image, [1], settings)]
        [torch.Size([2, 3]), torch.Size([32, 48])]
    """
    check_labels(labels, len(network.classes))
    (pair,) = _pairs(network, image, labels, (1.0,), False, settings.conditioned)
    return pair.features[0], maps_of(network, image, labels, settings, seed=seed).high_res


def _pairs(
    network: Amn,
    image: NDArray[np.uint8],
    labels: Sequence[int],
    scales: Sequence[float],
    flip: bool,
    conditioned: bool,
) -> Iterator[FeaturePair]:
    """Features (1, C, h, w) of each scale in evaluation mode, optionally conditioned."""
    network.eval()
    shown = torch.zeros(1, len(network.classes), device=network.device)
    shown[0, list(labels)] = 1.0
    for pair in image_pyramid(network.classifier, image[None], scales, flip=flip):
        if not conditioned:
            yield pair
            continue
        mirrored = None if pair.mirrored is None else network.condition(pair.mirrored, shown)
        yield FeaturePair(network.condition(pair.features, shown), mirrored)


def _mean_at(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Mean of maps (P, h, w) at a size."""
    total = maps[0].new_zeros(maps[0].shape[0], *size)
    for each in maps:
        total += resize(each, size)
    return total / len(maps)


def _gated(planes: Tensor, stretched: Tensor, seed: Tensor | None, size: tuple[int, int]) -> Tensor:
    """The stretched planes, but the plain ones where a seed of the image's size is background."""
    if seed is None:
        return stretched
    if tuple(seed.shape) != size:
        raise DataError(
            f"the labels that gate the maps have {tuple(seed.shape)} pixels but the image {size}; "
            "make the labels again"
        )
    sure = reduce_labels(seed, planes.shape[-2:]).to(planes.device) == BACKGROUND
    return torch.where(sure, planes, stretched)


# -- The host ----------------------------------------------------------------------------------


class _AmnHost(Host[AmnSettings, Amn]):
    """A per-pixel classifier that learns from ternary masks of the run's maps."""

    title = "AMN"
    settings = AmnSettings
    network = Amn
    map_fields = frozenset({"scales", "flip", "gate"})
    prototype_fields = frozenset({"reading", "conditioned"})
    mask_fields = frozenset(
        {
            *("foreground_threshold", "background_threshold"),
            *("cam_foreground_threshold", "cam_background_threshold"),
        }
    )

    def arms(self, section: HostSection) -> list[Arm]:
        """Maps of a network for each base; in Reading B one network, with prototypes for LPCAM."""
        if section.settings.reading == "features":
            return super().arms(section)
        return [Arm(a.title, a.base, a.folder) for a in super().arms(section)]

    def mask_thresholds(self, settings: AmnSettings, base: Base) -> tuple[float, float]:
        if base == "CAM":
            return settings.cam_foreground_threshold, settings.cam_background_threshold
        return settings.foreground_threshold, settings.background_threshold

    def build(
        self, backbone: BackboneSpec, names: Sequence[str], settings: AmnSettings, **first: Any
    ) -> Amn:
        """ImageNet's weights, not those of the classifier that made the maps (section 2)."""
        classifier = build(backbone, names, **first)
        sizes = settings.model_dump(include={"dilations", "dropout"})
        return Amn(classifier, **sizes, seed=first.get("seed", 0))

    def images_per_step(
        self, network: Amn, data: HostData, settings: AmnSettings
    ) -> tuple[int, str]:
        names_below(dict(network.classifier.backbone.named_parameters()), settings.freeze)
        return min(settings.batch_size, len(data.masks)), "batch_size"

    def train(
        self,
        network: Amn,
        data: HostData,
        settings: AmnSettings,
        **options: Unpack[engine.TrainingOptions],
    ) -> engine.History:
        """Adam without a schedule; batch-norm statistics are frozen (section 3).

        A cell of the logits' grid is compared with the label at its centre. Images whose mask has
        no pixel that counts are left out.
        """
        processes = options.get("processes") or Processes()
        if data.classes.names != network.classes:
            raise ClassifierError(
                f"the network has the classes {', '.join(network.classes)}, but the labels are of "
                f"{', '.join(data.classes.names)}; build it with the same classes in the same order"
            )
        pairs = check_masks(data.masks, data.classes, strict=True).pairs
        freeze(network.classifier.backbone, settings.freeze)
        backbone = [p for p in network.classifier.backbone.parameters() if p.requires_grad]
        rest = [*network.conditioning.parameters(), *network.head.parameters()]
        groups = [
            {"params": backbone, "lr": settings.learning_rate},
            {"params": rest, "lr": settings.head_learning_rate},
        ]
        shown = multi_hot([item for item, _ in pairs], len(data.classes))
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

        return engine.run(
            network,
            torch.optim.Adam(
                [g for g in groups if g["params"]], weight_decay=settings.weight_decay
            ),
            partial(_sample, pairs, data.classes, network.preprocessing, settings, options["seed"]),
            len(pairs),
            loss,
            engine.Plan(settings.epochs * an_epoch, batch, an_epoch, lambda _: 1.0),
            label="training AMN",
            section="host.amn",
            **options,
        )

    def local_features(
        self, network: Amn, view: View, settings: AmnSettings
    ) -> tuple[Tensor, Tensor]:
        return local_features(network, view.image, view.labels, settings, seed=view.mask)

    def scorer(self, network: Amn) -> tuple[Tensor, Tensor]:
        return network.constant_response()

    def maps(
        self, network: Amn, view: View, settings: AmnSettings, vectors: Tensor | None
    ) -> FusedMaps:
        return maps_of(network, view.image, view.labels, settings, seed=view.mask, vectors=vectors)


HOST = _AmnHost()
