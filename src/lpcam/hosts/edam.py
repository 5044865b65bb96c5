"""EDAM: fusion of maps with saliency, and a network that learns class masks from pairs of images.

Specification of EDAM. The fusion (section 4) takes any maps and is what LPCAM's rows of EDAM use;
the network (sections 1 to 3) is EDAM's own baseline. Its backbone's features f give

    M = |g / |g||,  g = a 3 x 3 convolution of f to N + 1 channels,

a mask for each of the N classes and, last, one of an implicit background that nothing supervises.
Each class's masked features of *both* images of a pair that share a class go through a transformer
block of its own, which sees the tokens of both, and must tell whether each image shows the class.

Shapes: B images of H x W pixels, of which each two that follow each other are a pair; C channels of
the backbone on a grid of h x w cells; D the width of a token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from lpcam import engine, train
from lpcam.classifier import (
    NO_CLASSES,
    BackboneSpec,
    Classifier,
    Preprocessing,
    build,
    described,
    description,
)
from lpcam.data.images import read_image
from lpcam.data.items import Item
from lpcam.data.jitter import jitter_colours
from lpcam.errors import ClassifierError, DataError
from lpcam.extract import all_finite, image_pyramid
from lpcam.functional import FusedMaps, fuse_scales, unflip
from lpcam.network_files import SavedNetwork
from lpcam.presets import EdamSettings, SaliencySettings
from lpcam.probe import multi_hot
from lpcam.processes import Processes
from lpcam.refine.crf import DenseCrf
from lpcam.refine.inputs import compute_dtype
from lpcam.refine.psa import crf_scores

NEVER, ALWAYS = -2.0, 2.0
"""Scores below and above the indicator of the background, which is 0 or 1 (section 4, step 4)."""
BACKGROUND_POWER = 1.0
"""Of 1 - the highest map, the background's score before a CRF (section 4, step 1)."""
PAIR = 2
"""Images that a class is learnt from at a time."""
WAVELENGTHS = 10000.0
"""Ratio of the longest wavelength of the positions' code to the shortest."""
NORM_EPSILON = 1e-6
"""Added to the standard deviation in the transformers' layer norms."""
HEADS = ("activation.", "reduction.", "logits.")
"""The new convolutions, which have a higher learning rate."""
WIDE_RESNET = "wideresnet38"
"""EDAM's own backbone."""
RECORDS = 25
"""Of the history over a whole training, about one an epoch of the released list (section 2)."""


# -- Fusion with saliency ----------------------------------------------------------------------


def fuse_saliency(
    maps: Tensor,
    saliency: Tensor,
    settings: SaliencySettings,
    *,
    crf: tuple[Tensor, DenseCrf] | None = None,
) -> Tensor:
    """Labels of maps whose background is what is not salient (section 4).

    Args:
        maps: (K, H, W) in [0, 1] of the image's own classes, each divided by its maximum, in
            ascending order of the classes, for the first of equal scores wins.
        saliency: (H, W) uint8, grey levels of a saliency map of the image.
        settings: whose ``crf`` says whether there is one; its alpha and beta must fit.
        crf: the image, (H, W, 3) uint8 RGB, and the CRF whose posteriors take the maps' place.

    Returns:
        int64 (H, W): 0 for background, k + 1 for the k-th map. Without a class all are background.

    Raises:
        DataError: if a CRF is given that the settings do not want, or the other way round, or as
            :func:`lpcam.refine.psa.crf_scores` and :func:`saliency_labels`.
    """
    if settings.crf != (crf is not None):
        raise DataError(
            f"saliency.crf is {settings.crf}, but {'a' if crf else 'no'} CRF was given; alpha and "
            "beta fit one case alone: give "
            + ("the image and a CRF" if settings.crf else "none, or take the preset edam.crf")
        )
    _check_maps(maps, saliency)
    scores = maps
    if crf is not None:
        scores = crf_scores(crf[1], crf[0], maps, BACKGROUND_POWER)[1:]
    return saliency_labels(
        scores, saliency, theta=settings.theta, alpha=settings.alpha, beta=settings.beta
    )


def saliency_labels(
    scores: Tensor, saliency: Tensor, *, theta: float, alpha: float, beta: float
) -> Tensor:
    """The best class of each pixel, or the background (steps 2 to 5).

    What is not salient is background unless a class has more than ``beta``; what is salient has the
    best class unless all have less than ``alpha``. The first of equal classes wins.

    Args:
        scores: (K, H, W) maps or posteriors in [0, 1].
        saliency: (H, W) uint8; a pixel is salient above the grey level 100 ``theta``.
        alpha: above 0, so that the classes that have no map never win.
        beta: below 1.

    Returns:
        int64 (H, W): 0 for background, k + 1 for the k-th class.

    Raises:
        DataError: if the shapes or dtypes are others, sizes or devices differ, or a score is not
            finite.
    """
    _check_maps(scores, saliency)
    # alpha and beta of posteriors are nearer to 0 and 1 than half precision can tell
    wide = scores.to(compute_dtype(scores))
    decided = torch.where(wide > beta, ALWAYS, torch.where(wide < alpha, NEVER, wide))
    # in float32, in which 100 times 0.29 is the grey level 29
    background = (saliency.float() <= 100 * theta).to(wide.dtype)
    return torch.cat([background[None], decided]).argmax(0)


def _check_maps(maps: Tensor, saliency: Tensor) -> None:
    if maps.ndim != 3 or not maps.is_floating_point() or not bool(torch.isfinite(maps).all()):
        raise DataError(
            f"maps are {maps.dtype} {tuple(maps.shape)}; expected finite floating-point numbers of "
            "the shape (classes, height, width)"
        )
    if saliency.dtype != torch.uint8 or saliency.ndim != 2:
        raise DataError(
            f"the saliency map is {saliency.dtype} {tuple(saliency.shape)}; expected grey levels, "
            "uint8 of the shape (height, width): multiply a map in [0, 1] by 255"
        )
    if saliency.shape != maps.shape[1:] or saliency.device != maps.device:
        raise DataError(
            f"the saliency map {tuple(saliency.shape)} on {saliency.device} and the maps "
            f"{tuple(maps.shape)} on {maps.device} differ in size or device; read it with "
            "lpcam.data.saliency.read_saliency at the size of the image"
        )


# -- The network -------------------------------------------------------------------------------


def class_masks(scores: Tensor) -> Tensor:
    """M, the absolute values of scores divided by their length over the channels (section 1).

    Args:
        scores: (B, N + 1, h, w).

    Returns:
        the same shape, in [0, 1]; the squares of a pixel's channels add up to 1.
    """
    return F.normalize(scores, dim=1).abs()


def sinusoidal_positions(count: int, width: int) -> Tensor:
    """The code (count, width) float32 of positions 0, 1, ...: sines in even columns, then cosines.

    Column 2 i and the next have the wavelength 2 pi 10000^(2 i / width) (Vaswani et al. 2017).
    """
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(WAVELENGTHS) / width))
    angles = torch.arange(count)[:, None] * rates
    code = torch.empty(count, width)
    code[:, 0::2] = angles.sin()
    code[:, 1::2] = angles.cos()[:, : width // 2]
    return code


class _Norm(nn.Module):
    """Layer norm with the unbiased standard deviation, a constant added to it (section 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: Tensor) -> Tensor:
        centred = tokens - tokens.mean(-1, keepdim=True)
        return self.weight * centred / (tokens.std(-1, keepdim=True) + NORM_EPSILON) + self.bias


class Encoder(nn.Module):
    """A transformer's encoder block that normalises first: attention, then a feed-forward part.

    Args:
        width: D, a multiple of ``heads``.
        hidden: width of the feed-forward part, with a GELU by its tanh approximation.
        dropout: of attention, of both parts' outputs, of the hidden layer, and of the result.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norms = nn.ModuleList(_Norm(width) for _ in range(2))
        self.query, self.key, self.value, self.joined = (nn.Linear(width, width) for _ in range(4))
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(P, T, D) to the same shape; the T tokens of each row attend to one another."""
        tokens = tokens + self._drop(self._attend(self.norms[0](tokens)))
        hidden = F.gelu(self.inner(self.norms[1](tokens)), approximate="tanh")
        tokens = tokens + self._drop(self.outer(self._drop(hidden)))
        return self._drop(tokens)

    def _attend(self, tokens: Tensor) -> Tensor:
        parts = [
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        dropout = self.dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], dropout_p=dropout)
        joined: Tensor = self.joined(found.transpose(1, 2).flatten(-2))
        return joined

    def _drop(self, tokens: Tensor) -> Tensor:
        return F.dropout(tokens, self.dropout, self.training)


class Edam(SavedNetwork):
    """A backbone, the discriminative activation layer and collaborative multi-attention.

    Args:
        classifier: whose backbone is used; its head is not.
        classes: the N class names, in label order.
        width: D, of the tokens.
        heads: of the attention.
        hidden: width of the transformers' feed-forward part.
        dropout: of tokens and transformers.
        seed: of the first weights of all but the backbone.

    Raises:
        ClassifierError: if the width is no multiple of the heads.
    """

    kind = "edam"
    title = "EDAM"
    stage = "host"
    builder = "lpcam.hosts.edam.build_edam"

    def __init__(
        self,
        classifier: Classifier,
        classes: Sequence[str],
        *,
        width: int,
        heads: int,
        hidden: int,
        dropout: float,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ClassifierError(
                f"edam.width {width} is not a multiple of edam.heads {heads}; every head has an "
                "equal part of a token"
            )
        self.classifier = classifier
        self.classifier.requires_grad_(False)
        self.classes = tuple(classes)
        self.dropout = dropout
        self.sizes = {"width": width, "heads": heads, "hidden": hidden, "dropout": dropout}
        channels, count = classifier.head.in_features, len(self.classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.activation = nn.Conv2d(channels, count + 1, 3, padding=1, bias=False)
            nn.init.xavier_uniform_(self.activation.weight)
            self.reduction = nn.Conv2d(channels, width, 1, bias=False)
            self.segments = nn.Embedding(PAIR, width)
            self.encoders = nn.ModuleList(
                Encoder(width, heads, hidden, dropout) for _ in self.classes
            )
            # the row of a class is its convolution of 1 x 1 to one channel
            self.logits = nn.Linear(width, count, bias=False)
        self.eval()

    @property
    def preprocessing(self) -> Preprocessing:
        return self.classifier.preprocessing

    @property
    def device(self) -> torch.device:
        return self.logits.weight.device

    def masks(self, features: Tensor) -> Tensor:
        """M: (B, C, h, w) to (B, N + 1, h, w) in [0, 1], the implicit background last."""
        return class_masks(self.activation(features))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, N) of (B, 3, H, W) normalised images, each two of which are a pair.

        Raises:
            ValueError: if the number of images is odd.
        """
        if len(images) % PAIR:
            raise ValueError(f"{len(images)} images are no pairs; give an even number of them")
        features = self.classifier.features(images)
        masks = self.masks(features)[:, :-1]
        reduced = self.reduction(features)
        cells = reduced.shape[-2] * reduced.shape[-1]
        code = sinusoidal_positions(cells, reduced.shape[1]).to(reduced)
        places = self.segments.weight[:, None] + code  # of an image of a pair, and in it
        pooled = []
        for row, encoder in enumerate(self.encoders):
            masked = (reduced * masks[:, row : row + 1]).flatten(2).transpose(1, 2)
            tokens = masked.unflatten(0, (-1, PAIR)) + places
            tokens = F.dropout(tokens, self.dropout, self.training)
            seen = encoder(tokens.flatten(1, 2))  # all cells of both images of a pair
            pooled.append(seen.unflatten(1, (PAIR, cells)).mean(2).flatten(0, 1))
        return (torch.stack(pooled, 1) * self.logits.weight).sum(-1)

    def train(self, mode: bool = True) -> Edam:
        """Training mode with every batch norm in evaluation mode."""
        super().train(mode)
        self.classifier.train(mode)
        return self

    def folded(self) -> Edam:
        """The same network for inference, its backbone as :meth:`Classifier.folded`.

        It shares the other layers with this one and cannot be saved.
        """
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        twin.classifier = self.classifier.folded()
        return twin

    def _can_be_described(self) -> bool:
        return self.classifier.spec is not None

    @classmethod
    def _described(cls, metadata: Mapping[str, Any]) -> Edam:
        return cls(described(metadata), metadata["classes"], **metadata["sizes"])

    def _description(self) -> dict[str, Any]:
        classifier = self.classifier
        return {
            **description(classifier.backbone, classifier.spec, classifier.preprocessing),
            "classes": list(self.classes),
            "sizes": self.sizes,
        }


def build_edam(
    spec: BackboneSpec,
    classes: Sequence[str],
    settings: EdamSettings,
    *,
    weights: str | Path,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> Edam:
    """Build EDAM's network on a timm backbone.

    Args:
        spec: of the backbone; WideResNet-38 loses its last ReLU (section 1) unless the arguments
            say otherwise.
        classes: N class names.
        settings: whose width, heads, hidden and dropout are used.
        weights, mean, std, seed: as :func:`lpcam.classifier.build`; the weights are ImageNet's.

    Raises:
        ClassifierError: as :func:`lpcam.classifier.build` and :class:`Edam`.
    """
    if spec.name == WIDE_RESNET:
        spec = replace(spec, arguments={"final_relu": False, **spec.arguments})
    classifier = build(spec, NO_CLASSES, weights=weights, mean=mean, std=std, seed=seed)
    return Edam(
        classifier,
        classes,
        width=settings.width,
        heads=settings.heads,
        hidden=settings.hidden,
        dropout=settings.dropout,
        seed=seed,
    )


# -- Pairs -------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two different images that show one class."""

    first: int
    """Its number among the images."""
    second: int
    label: int
    """A class of both."""


class Partners:
    """Draws for an image another one that shares a class with it.

    Args:
        items: images with their labels.

    Raises:
        DataError: if no two images share a class.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        of_class: dict[int, list[int]] = {}
        for number, item in enumerate(items):
            for label in item.labels:
                of_class.setdefault(label, []).append(number)
        self.of_class = {label: found for label, found in of_class.items() if len(found) > 1}
        self.labels = [[k for k in item.labels if k in self.of_class] for item in items]
        self.firsts = [number for number, labels in enumerate(self.labels) if labels]
        """Images that have a partner."""
        if not self.firsts:
            raise DataError(
                f"among {len(items)} images no two share a class, so there are no pairs to train "
                "EDAM on; give two labelled images of a class at least"
            )

    def draw(self, first: int, generator: np.random.Generator) -> Pair:
        """A class of the image and another image of that class, both uniformly.

        Args:
            first: one of ``firsts``.
        """
        label = self.labels[first][int(generator.integers(len(self.labels[first])))]
        others = self.of_class[label]
        # a step of 1 to all but one round the list never comes back to the image itself
        step = int(generator.integers(1, len(others)))
        return Pair(first, others[(others.index(first) + step) % len(others)], label)


def pairs_of(items: Sequence[Item], steps: int, pairs: int, seed: int) -> list[Pair]:
    """The pairs that a training of so many steps sees, in their order (section 2).

    In an epoch each image that has a partner comes first once, in random order; an epoch's partners
    are drawn anew. (The released list is fixed and not public.)

    Args:
        pairs: a step; if there are fewer images than that, all of them.

    Returns:
        ``steps`` times as many pairs as a step has.

    Raises:
        DataError: if no two images share a class.
    """
    partners = Partners(items)
    plan = engine.Plan(steps, pairs, steps, lambda _: 1.0)
    order = engine.Order(len(partners.firsts), plan, seed, 0, Processes())
    return [
        partners.draw(partners.firsts[place.sample], _generator(seed, place))
        for step in order
        for place in step
    ]


def _generator(seed: int, place: engine.Place) -> np.random.Generator:
    return np.random.default_rng([seed, place.epoch, place.sample])


# -- Training ----------------------------------------------------------------------------------


class _Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Augmented images (2, 3, crop, crop) of a pair and their numbers (2,), by their place."""

    def __init__(
        self,
        items: Sequence[Item],
        partners: Partners,
        preprocessing: Preprocessing,
        settings: EdamSettings,
        seed: int,
    ) -> None:
        self.items = items
        self.partners = partners
        self.preprocessing = preprocessing
        self.settings = settings
        self.seed = seed

    def __getitem__(self, place: engine.Place) -> tuple[Tensor, Tensor]:
        generator = _generator(self.seed, place)
        pair = self.partners.draw(self.partners.firsts[place.sample], generator)
        images = [
            augment(
                read_image(self.items[number].image), self.preprocessing, self.settings, generator
            )
            for number in (pair.first, pair.second)
        ]
        return torch.stack(images), torch.tensor([pair.first, pair.second])


def augment(
    image: NDArray[np.uint8],
    preprocessing: Preprocessing,
    settings: EdamSettings,
    generator: np.random.Generator,
) -> Tensor:
    """What :func:`lpcam.train.augment` does, with random colours of the resized image (section 2).

    Args:
        image: (H, W, 3) uint8 RGB.

    Returns:
        (3, crop, crop) float32.
    """
    return train.augment(
        image,
        preprocessing,
        settings,
        generator,
        change=lambda resized: jitter_colours(resized, settings.jitter, generator),
    )


def learning_rate_factor(step: int, settings: EdamSettings) -> float:
    """Factor of the learning rates at a step: a linear warm-up, and then the poly schedule."""
    if step < settings.warmup:
        low = settings.warmup_factor
        return low + (1.0 - low) * step / settings.warmup
    return engine.poly(
        step - settings.warmup, settings.iterations - settings.warmup, settings.power
    )


def train_edam(
    network: Edam,
    items: Sequence[Item],
    settings: EdamSettings,
    *,
    seed: int,
    folder: Path,
    workers: int = 0,
    processes: Processes | None = None,
) -> list[dict[str, Any]]:
    """Train in place, with checkpoints in ``folder`` from which a stopped training goes on.

    SGD on the binary cross-entropy of every class and image of the pairs of :func:`pairs_of`.

    Args:
        items: images with their labels; one that shares a class with no other is left out.
        settings: whose sizes must be those of the network.
        workers: processes that read and augment images.
        processes: those that share each step's pairs; the step is that of all pairs, whatever their
            number, but for rounding.

    Returns:
        some records: ``epoch``, ``step`` and mean ``loss``.

    Raises:
        DataError: if no two images share a class, or a label is of no class of the network.
        ClassifierError: if ``freeze`` matches nothing, the loss is no longer finite, or a step has
            fewer pairs than there are processes.
        ArtefactError: if a checkpoint is damaged or of another network.
    """
    processes = processes or Processes()
    partners = Partners(items)
    count = len(network.classes)
    wrong = [item.id for item in items if any(not 0 <= label < count for label in item.labels)]
    if wrong:
        raise DataError(
            f"{len(wrong)} images have labels that are none of the network's {count} classes: "
            f"{', '.join(wrong[:3])}; build the network for the classes of the data set"
        )
    train.freeze(network.classifier.backbone, settings.freeze, norms=True)
    labels = multi_hot(items, count)
    size = min(settings.pairs, len(partners.firsts))
    steps = settings.iterations
    model = processes.replicate(network)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        images, numbers = batch
        network.train()
        logits = model(images.flatten(0, 1).to(network.device))
        target = labels[numbers.flatten()].to(network.device)
        mean = F.binary_cross_entropy_with_logits(logits, target)
        return mean * (len(numbers) / size)  # this process's share of the pairs

    history = engine.run(
        network,
        torch.optim.SGD(
            engine.parameter_groups(network, HEADS, settings),
            lr=settings.learning_rate,
            momentum=settings.momentum,
        ),
        _Pairs(items, partners, network.preprocessing, settings, seed),
        len(partners.firsts),
        loss,
        engine.Plan(
            steps,
            settings.pairs,
            max(1, steps // RECORDS),
            lambda step: learning_rate_factor(step, settings),
        ),
        label="training EDAM",
        section="host.edam",
        seed=seed,
        folder=folder,
        workers=workers,
        processes=processes,
    )
    network.eval()
    return history


# -- Maps --------------------------------------------------------------------------------------


@torch.no_grad()
def maps_of(
    network: Edam, image: NDArray[np.uint8], labels: Sequence[int], settings: EdamSettings
) -> FusedMaps:
    """The masks M of an image's classes, summed over scales and mirror images (section 3).

    Each sum is divided by its maximum. Give the network's :meth:`Edam.folded` twin, which takes
    two thirds of the time.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: the K present classes.

    Returns:
        ``cam`` (K, ceil(H / 4), ceil(W / 4)) and ``high_res`` (K, H, W) in [0, 1], float32, on the
        network's device.

    Raises:
        DataError: if a label is of no class of the network.
        ClassifierError: if the masks hold NaN or Inf.
        PrototypeError: if the backbone's features do.
    """
    if any(not 0 <= label < len(network.classes) for label in labels):
        raise DataError(
            f"labels {list(labels)} are not all among the network's {len(network.classes)} classes"
        )
    network.eval()
    chosen = list(labels)
    maps = []
    for pair in image_pyramid(network.classifier, image[None], settings.scales, flip=settings.flip):
        found = network.masks(pair.features)[0, chosen]
        if pair.mirrored is not None:
            found = found + unflip(network.masks(pair.mirrored)[0, chosen])
        if not all_finite(found):
            raise ClassifierError(
                "EDAM's activation layer gave NaN or Inf for this image; its weights are damaged: "
                "train it again"
            )
        maps.append(found)
    # At stride 1 the sizes are the image's own, which the released program resizes to.
    return fuse_scales(maps, (image.shape[0], image.shape[1]), stride=1)
