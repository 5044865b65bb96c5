"""AMN: a per-pixel classifier that is given the classes of an image (specification of AMN).

It is trained on ternary labels, and its probabilities are the maps. LPCAM is used in one of two
ways (section 5): its maps make the labels (Reading A), or prototypes of AMN's own features map the
image (Reading B).

Shapes: B images of H x W pixels, N classes, L = N + 1 labels with the background first, K present
classes, C channels, h x w the feature grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lpcam.classifiers import classifier as models
from lpcam.classifiers.feature_store import image_pyramid
from lpcam.classifiers.features import FeaturePair
from lpcam.classifiers.probe import multi_hot
from lpcam.classifiers.settings import RELEASED_RESNET50
from lpcam.data.dataset import BACKGROUND, IGNORE, ClassTable, Item
from lpcam.data.masks import read_index_mask
from lpcam.data.resize import quarter_size, resize
from lpcam.evaluation.segmentation import truth_labels
from lpcam.hosts import base as hosts
from lpcam.method.functional import FusedMaps, lpcam_of_pair, normalize, unflip
from lpcam.refine.ternary import TernarySettings
from lpcam.runtime.distributed import Processes
from lpcam.runtime.errors import DataError
from lpcam.runtime.settings import Positive
from lpcam.segmentation.augmentation import check_masks
from lpcam.segmentation.losses import reduce_labels, sums_by_side
from lpcam.segmentation.networks.deeplabv2 import Aspp
from lpcam.training import loop as engine
from lpcam.training.augmentation import scale_mirror_crop
from lpcam.training.optim import EpochSettings, freeze, names_below, parameter_groups
from lpcam.training.released import RESNET50, RESNET50_COPIES, Released

EPSILON = 1e-5  #: Added to the range that probabilities are divided by (section 4).


class AmnSettings(EpochSettings, hosts.ScaledSettings, TernarySettings):
    """AMN: a per-pixel classifier with the image's labels as input (specification of AMN)."""

    table: ClassVar[str] = "amn"
    preset: str = "default"

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
    gate: bool
    """Whether probabilities are not stretched on the teacher's background (section 4)."""
    reading: Literal["teacher", "features"]
    """Use of LPCAM (section 5). ``teacher``: its masks train AMN (Reading A). ``features``: CAM
    masks train AMN, and prototypes of its features map the image (Reading B)."""
    conditioned: bool
    """Whether Reading B uses the features after the label conditioning."""


class Amn(hosts.HostNetwork):
    """Backbone, label conditioning and head (section 2).

    A linear layer turns an image's labels into a factor for each channel; summed dilated
    convolutions turn the features times the factors into logits. Of the classifier, the backbone
    and the classes are used; ``dropout`` is the probability of dropping a feature in training.
    """

    kind = "amn"

    def __init__(
        self,
        classifier: models.Classifier,
        *,
        dilations: Sequence[int],
        dropout: float,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        classifier.head.requires_grad_(False)
        self.classes = classifier.classes
        channels, count = classifier.weight.shape[1], len(self.classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conditioning = nn.Linear(count, channels)
            self.head = Aspp(channels, count + 1, dilations)
        self.dropout = dropout
        self.dilations = tuple(dilations)
        self.eval()

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

    @classmethod
    def _described(cls, metadata: Mapping[str, Any]) -> Amn:
        classifier = models.described(metadata, metadata["classes"])
        return cls(classifier, dilations=metadata["dilations"], dropout=metadata["dropout"])

    def _description(self) -> dict[str, Any]:
        own = {"dilations": list(self.dilations), "dropout": self.dropout}
        return {**self.classifier._description(), **own}


def amn_loss(
    logits: Tensor,
    labels: Tensor,
    smoothing: float,
    total: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Tensor:
    """Balanced cross-entropy of logits (B, L, h, w) with smoothed labels (B, h, w) (section 3).

    Half the mean over background pixels and half the mean over those of a class; a mean without a
    pixel is 0. ``smoothing`` is the part of the target that the L - 1 other labels share evenly.
    ``total`` sums the numbers of pixels over the processes that share the batch.
    """
    likelihoods = logits.log_softmax(1)
    target = labels.long().masked_fill(labels == IGNORE, BACKGROUND)
    own = likelihoods.gather(1, target[:, None])[:, 0]
    others = likelihoods.sum(1) - own
    losses = -(1 - smoothing) * own - smoothing / (logits.shape[1] - 1) * others
    sums, counts = sums_by_side(losses, labels)
    return (sums / total(counts).to(sums).clamp(min=1)).sum() / 2


def _sample(
    pairs: Sequence[tuple[Item, Path]],
    classes: ClassTable,
    preprocessing: models.Preprocessing,
    settings: AmnSettings,
    seed: int,
    place: engine.Place,
) -> tuple[Tensor, Tensor, int]:
    item, path = pairs[place.sample]
    labels = truth_labels(read_index_mask(path), classes).to(torch.uint8).numpy()
    generator = np.random.default_rng([seed, place.epoch, place.sample])
    image, cropped = scale_mirror_crop(
        item.read(), labels, preprocessing, settings.scale, settings.crop, generator
    )
    return image, cropped, place.sample


def export_maps(
    logits: Sequence[Tensor], labels: Sequence[int], seed: Tensor | None, size: tuple[int, int]
) -> FusedMaps:
    """Probabilities of an image's labels, stretched to [0, 1] (section 4), background first.

    The logits (L, h, w) of the scales are enlarged to each size and averaged; after the softmax
    over all L labels the planes of the background and the present classes are kept. Each plane is
    stretched by its minimum and maximum, except where the seed mask (H, W) says background.
    """
    kept = [0, *(index + 1 for index in labels)]

    def planes(target: tuple[int, int]) -> Tensor:
        found = _mean_at(logits, target).softmax(0)[kept]
        return _gated(found, normalize(found, "minmax", EPSILON), seed)

    return FusedMaps(planes(quarter_size(size)), planes(size))


def _lpcam_maps(
    pairs: Iterator[FeaturePair], vectors: Tensor, seed: Tensor | None, size: tuple[int, int]
) -> FusedMaps:
    """LPCAM (equations 5 and 6) of vectors (K, C), each plane divided by its maximum."""
    maps = [
        lpcam_of_pair(features[0], None if mirrored is None else mirrored[0], vectors)
        for features, mirrored in pairs
    ]

    def planes(target: tuple[int, int]) -> Tensor:
        found = _mean_at(maps, target)
        stretched = normalize(found, "max")
        # A cosine difference reaches 2; the plane is then divided by more than 1 everywhere.
        return _gated(torch.minimum(found, stretched), stretched, seed)

    return FusedMaps(planes(quarter_size(size)), planes(size))


def _pairs(
    network: Amn, view: hosts.View, scales: Sequence[float], flip: bool, conditioned: bool
) -> Iterator[FeaturePair]:
    """Features (1, C, h, w) of each scale in evaluation mode, optionally conditioned."""
    network.eval()
    shown = torch.zeros(1, len(network.classes), device=network.device)
    shown[0, list(view.labels)] = 1.0
    for pair in image_pyramid(network.classifier, view.image[None], scales, flip=flip):
        if conditioned:
            mirrored = None if pair.mirrored is None else network.condition(pair.mirrored, shown)
            yield FeaturePair(network.condition(pair.features, shown), mirrored)
        else:
            yield pair


def _mean_at(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Mean of maps (P, h, w) at a size."""
    total = maps[0].new_zeros(maps[0].shape[0], *size)
    for each in maps:
        total += resize(each, size)
    return total / len(maps)


def _gated(planes: Tensor, stretched: Tensor, seed: Tensor | None) -> Tensor:
    """The stretched planes, but the plain ones where the seed mask is background."""
    if seed is None:
        return stretched
    sure = reduce_labels(seed, planes.shape[-2:]).to(planes.device) == BACKGROUND
    return torch.where(sure, planes, stretched)


class _AmnHost(hosts.Host[AmnSettings, Amn]):
    """A per-pixel classifier that learns from ternary masks of the run's maps."""

    title = "AMN"
    settings = AmnSettings
    network = Amn
    map_fields = frozenset({"scales", "flip", "gate"})
    prototype_fields = frozenset({"reading", "conditioned"})
    mask_fields = frozenset(TernarySettings.model_fields) - {"preset"}

    def arms(self, section: hosts.HostSection) -> list[hosts.Arm]:
        """Maps of a network for each base; in Reading B one network, with prototypes for LPCAM."""
        if section.settings.reading == "features":
            return super().arms(section)
        return [hosts.Arm(a.title, a.base, a.folder) for a in super().arms(section)]

    def mask_thresholds(self, settings: AmnSettings, base: hosts.Base) -> tuple[float, float]:
        return settings.ternary_thresholds(base)

    def build(
        self,
        backbone: models.BackboneSpec,
        names: Sequence[str],
        settings: AmnSettings,
        **first: Any,
    ) -> Amn:
        """ImageNet's weights, not those of the classifier that made the maps (section 2)."""
        classifier = models.build(backbone, names, **first)
        sizes = settings.model_dump(include={"dilations", "dropout"})
        return Amn(classifier, **sizes, seed=first.get("seed", 0))

    def released(self) -> Sequence[Released]:
        """The file ``res50_amn.pth``."""
        return [
            Released(
                "AMN's network",
                "host",
                ("label_enc.weight",),
                [
                    (RESNET50, "classifier.backbone."),
                    (r"label_enc\.", "conditioning."),
                    (r"classifier\.1\.", "head."),
                ],
                self.official(RELEASED_RESNET50),
                classes=lambda state: state["label_enc.weight"].shape[1],
                left_out=RESNET50_COPIES,
                ours=("classifier.head.",),
            )
        ]

    def images_per_step(
        self, network: Amn, data: hosts.HostData, settings: AmnSettings
    ) -> tuple[int, str]:
        names_below(dict(network.classifier.backbone.named_parameters()), settings.freeze)
        return min(settings.batch_size, len(data.masks)), "batch_size"

    def train(
        self,
        network: Amn,
        data: hosts.HostData,
        settings: AmnSettings,
        **options: Unpack[engine.TrainingOptions],
    ) -> engine.History:
        """Adam without a schedule; frozen statistics, labels of cells at centres (section 3)."""
        processes = options.get("processes") or Processes()
        pairs = check_masks(data.masks, data.classes, strict=True).pairs
        freeze(network.classifier.backbone, settings.freeze)
        shown = multi_hot([item for item, _ in pairs], len(data.classes)).to(network.device)

        def values(name: str, _: nn.Parameter) -> tuple[float, float]:
            old = name.startswith("classifier.")
            rate = settings.learning_rate if old else settings.head_learning_rate
            return rate, settings.weight_decay

        def loss(model: nn.Module, sample: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            images, labels, indices = sample
            # In this layout convolutions take half the time on a CPU; the numbers are the same.
            logits = model(images.to(memory_format=torch.channels_last), shown[indices])
            labels = reduce_labels(labels, logits.shape[-2:])
            return amn_loss(logits, labels, settings.smoothing, processes.sum)

        return engine.run(
            network,
            torch.optim.Adam(parameter_groups(network, values)),
            partial(_sample, pairs, data.classes, network.preprocessing, settings, options["seed"]),
            len(pairs),
            loss,
            engine.Plan.of_epochs(settings, len(pairs), lambda _: 1.0),
            label="training AMN",
            section="host.amn",
            **options,
        )

    @torch.no_grad()
    def local_features(
        self, network: Amn, view: hosts.View, settings: AmnSettings
    ) -> tuple[Tensor, Tensor]:
        """Features at scale 1, signed if ``conditioned``; AMN's own maps split them (section 5)."""
        (pair,) = _pairs(network, view, (1.0,), False, settings.conditioned)
        return pair.features[0], self.maps(network, view, settings, None).high_res

    def scorer(self, network: Amn) -> tuple[Tensor, Tensor]:
        """The head on an input that is the same everywhere (section 5, inferred)."""
        branches = [b for b in network.head.children() if isinstance(b, nn.Conv2d)]
        weight = torch.stack([b.weight.detach().sum((2, 3)) for b in branches]).sum(0)
        bias = torch.stack([b.bias.detach() for b in branches if b.bias is not None]).sum(0)
        return weight, bias

    @torch.no_grad()
    def maps(
        self, network: Amn, view: hosts.View, settings: AmnSettings, vectors: Tensor | None
    ) -> FusedMaps:
        """AMN's probabilities, or with vectors LPCAM of its features (Reading B, section 5).

        Dropout is off; the released program leaves it on (section 3).
        """
        if settings.gate and view.mask is None:
            raise DataError(
                "the image has no labels, which say where its maps are not stretched; make them, "
                "or set amn.gate to false"
            )
        seed, size = view.mask if settings.gate else None, view.size
        conditioned = vectors is None or settings.conditioned
        pairs = _pairs(network, view, settings.scales, settings.flip, conditioned)
        if vectors is not None:
            return _lpcam_maps(pairs, vectors[list(view.labels)].to(network.device), seed, size)
        logits = []
        for pair in pairs:
            found = network.logits(pair.features)[0]
            if pair.mirrored is not None:
                found = (found + unflip(network.logits(pair.mirrored)[0])) / 2
            hosts.check_finite(found, "AMN's conditioning or head")
            logits.append(found)
        cam, high_res = export_maps(logits, view.labels, seed, size)
        return FusedMaps(cam[1:], high_res[1:])


HOST = _AmnHost()
