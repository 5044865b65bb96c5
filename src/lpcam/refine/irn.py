"""IRNet: class boundaries learnt from ternary labels (specification of IRN, sections 4 to 8.1).

A frozen backbone gives a pyramid of features; one branch of 1 x 1 convolutions makes a boundary map
of them, another a displacement field that points to the centre of each instance. Neither changes
the other, for nothing behind them is shared and trained, so masks can do without the second.

Shapes: B images of H x W pixels, h = ceil(H / 4), w = ceil(W / 4).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from lpcam import engine
from lpcam.classifier import (
    NO_CLASSES,
    PROBE_SIZE,
    BackboneSpec,
    Classifier,
    Preprocessing,
    build,
    described,
    description,
    feature_maps,
    folded_backbone,
)
from lpcam.data.images import read_image, read_index_mask, resize_image, scaled_size
from lpcam.data.items import IGNORE, Item
from lpcam.errors import ClassifierError, DataError
from lpcam.functional import unflip
from lpcam.network_files import SavedNetwork
from lpcam.presets import IrnSettings
from lpcam.processes import Processes
from lpcam.refine.walk import (
    EPSILON,
    STRIDE,
    Offset,
    affinities,
    likelihood_sums,
    pair_counts,
    pair_kinds,
    source_window,
)

BOUNDARY = (32, 4)
"""Channels and groups of each level in the boundary branch."""
POOLED, SHALLOW, DEEP = (64, 8), (128, 16), (256, 16)
"""Those in the displacement branch: of a level that was pooled, at stride 4, and beyond."""


# -- The pyramid -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """One of the feature maps of a backbone."""

    index: int
    """Among all that the backbone gives."""
    channels: int
    stride: int
    """Pixels a cell, after the pooling."""
    pooled: bool
    """Whether it comes at stride 2 and is brought to 4, as the first stage of a ResNet is."""


class Pyramid(nn.Module):
    """A frozen backbone's feature maps from stride 4 on, for images of any size.

    Args:
        classifier: whose backbone is used; its head is not.

    Raises:
        ClassifierError: if the backbone gives no feature maps at strides 4 and 8.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.backbone = classifier.backbone
        self.preprocessing = classifier.preprocessing
        self.spec = classifier.spec
        self.requires_grad_(False)
        self.eval()
        side = 128
        if not hasattr(self.backbone, "forward_intermediates"):
            raise ClassifierError(
                f"the backbone {type(self.backbone).__name__} does not give the feature maps "
                "between its stages; IRN needs a timm model that has forward_intermediates"
            )
        found = feature_maps(self.backbone, self._zeros(side, side))
        strides, channels = [side // f.shape[-1] for f in found], [f.shape[1] for f in found]
        finest = [n for n, stride in enumerate(strides) if stride == STRIDE // 2][-1:]
        self.levels = [
            Level(n, channels[n], max(stride, STRIDE), stride < STRIDE)
            for n, stride in enumerate(strides)
            if stride >= STRIDE or n in finest
        ]
        if not {STRIDE, 2 * STRIDE} <= set(strides):
            raise ClassifierError(
                f"the backbone {type(self.backbone).__name__} gives feature maps at strides "
                f"{sorted(set(strides))}; IRN needs 4 and 8 among them: choose a convolutional "
                "one or a hierarchical transformer"
            )
        self.multiple = 1
        self.multiple = self._multiple()

    def train(self, mode: bool = True) -> Pyramid:
        """Always in evaluation mode: frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised images to a (B, C, h, w) a level, without a gradient.

        Where the backbone drops what is left over of a side, zeros (the mean colour) are laid to
        the right and below the images first.
        """
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.multiple, 0, -height % self.multiple))
        found = feature_maps(self.backbone, images)
        return [
            F.max_pool2d(found[level.index], 3, 2, 1) if level.pooled else found[level.index]
            for level in self.levels
        ]

    def folded(self) -> Pyramid:
        """A copy with the batch norms folded into the convolutions, as :meth:`Classifier.folded`.

        Its features are the same but for rounding.
        """
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        twin.backbone = folded_backbone(self.backbone)
        return twin.requires_grad_(False)

    @torch.no_grad()
    def _zeros(self, height: int, width: int) -> Tensor:
        return next(self.backbone.parameters()).new_zeros(1, 3, height, width)

    def _multiple(self) -> int:
        """What the sides of images must be multiples of: 1 where strides round up."""
        shapes = [tuple(f.shape[-2:]) for f in self(self._zeros(*PROBE_SIZE))]
        for level, shape in zip(self.levels, shapes, strict=True):
            if shape != tuple(-(-side // level.stride) for side in PROBE_SIZE):
                return max(level.stride for level in self.levels)
        return 1


# -- The branches ------------------------------------------------------------------------------


class _Unit(nn.Module):
    """1 x 1 convolution, group norm, bilinear enlargement, crop, ReLU."""

    def __init__(self, channels: int, features: int, groups: int, factor: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, features, 1, bias=False)
        self.norm = nn.GroupNorm(groups, features)
        self.factor = factor

    def forward(self, images: Tensor, size: Sequence[int]) -> Tensor:
        found = self.norm(self.convolution(images))
        if self.factor > 1:
            found = F.interpolate(
                found, scale_factor=self.factor, mode="bilinear", align_corners=False
            )
        cropped: Tensor = found[..., : size[0], : size[1]]
        return cropped.relu()


class Boundary(nn.Module):
    """Boundary logits (B, h, w) of a pyramid."""

    def __init__(self, levels: Sequence[Level]) -> None:
        super().__init__()
        self.units = nn.ModuleList(
            _Unit(level.channels, *BOUNDARY, level.stride // STRIDE) for level in levels
        )
        self.last = nn.Conv2d(BOUNDARY[0] * len(levels), 1, 1)

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Of the levels' features, at the size (h, w) of stride 4."""
        found = [unit(f, size) for unit, f in zip(self.units, features, strict=True)]
        logits: Tensor = self.last(torch.cat(found, 1))[:, 0]
        return logits


class Displacement(nn.Module):
    """Displacement (B, 2, h, w) of a pyramid, in cells of stride 4, first down and then right.

    In evaluation mode ``shift``, their mean over a list of images, is subtracted.
    """

    shift: Tensor

    def __init__(self, levels: Sequence[Level]) -> None:
        super().__init__()
        self.deep = [level.stride > STRIDE for level in levels]
        self.units = nn.ModuleList(
            _Unit(level.channels, *POOLED)
            if level.pooled
            else _Unit(level.channels, *SHALLOW)
            if level.stride == STRIDE
            else _Unit(level.channels, *DEEP, level.stride // (2 * STRIDE))
            for level in levels
        )
        shallow = sum(
            POOLED[0] if level.pooled else SHALLOW[0] for level in levels if level.stride == STRIDE
        )
        self.middle = _Unit(DEEP[0] * sum(self.deep), *DEEP, 2)
        self.late = _Unit(shallow + DEEP[0], *DEEP)
        self.last = nn.Conv2d(DEEP[0], 2, 1, bias=False)
        self.register_buffer("shift", torch.zeros(2))

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Of the levels' features, at the size (h, w) of stride 4."""
        half = features[self.deep.index(True)].shape[-2:]
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for unit, deep, feature in zip(self.units, self.deep, features, strict=True):
            parts[deep].append(unit(feature, half if deep else size))
        middle = self.middle(torch.cat(parts[1], 1), size)
        field: Tensor = self.last(self.late(torch.cat([*parts[0], middle], 1), size))
        return field if self.training else field - self.shift[:, None, None]


class Branches(nn.Module):
    """What is trained: the boundary branch and, if wanted, the displacement branch.

    Args:
        levels: of the pyramid.
        displacement: whether there is a displacement branch.
        seed: of the first weights; those of the boundary branch are the same with and without the
            other.
    """

    def __init__(self, levels: Sequence[Level], *, displacement: bool, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.boundary = Boundary(levels)
            self.displacement = Displacement(levels) if displacement else None

    def forward(
        self, features: Sequence[Tensor], size: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, h, w) and displacement (B, 2, h, w) or None."""
        field = None if self.displacement is None else self.displacement(features, size)
        return self.boundary(features, size), field


class Irn(SavedNetwork):
    """The network: a frozen pyramid and the branches.

    Args:
        pyramid: of an ImageNet backbone.
        displacement: whether there is a displacement branch.
        seed: of the branches' first weights.
    """

    kind = "irn"
    title = "IRN"
    stage = "irn"
    builder = "lpcam.refine.irn.build_irn"

    def __init__(self, pyramid: Pyramid, *, displacement: bool = True, seed: int = 0) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.branches = Branches(pyramid.levels, displacement=displacement, seed=seed)
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.branches.boundary.last.weight.device

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) normalised images to logits (B, h, w) and displacement (B, 2, h, w)."""
        features = self.pyramid(images)
        found: tuple[Tensor, Tensor | None] = self.branches(features, grid(images.shape[-2:]))
        return found

    def folded(self) -> Irn:
        """The same network for inference, its backbone as :meth:`Pyramid.folded`.

        It shares the branches with this one and cannot be saved.
        """
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        twin.pyramid = self.pyramid.folded()
        twin.pyramid.spec = None
        return twin

    def _can_be_described(self) -> bool:
        return self.pyramid.spec is not None

    @classmethod
    def _described(cls, metadata: Mapping[str, Any]) -> Irn:
        return cls(Pyramid(described(metadata)), displacement=metadata["displacement"])

    def _description(self) -> dict[str, Any]:
        pyramid = self.pyramid
        return {
            **description(pyramid.backbone, pyramid.spec, pyramid.preprocessing),
            "displacement": self.branches.displacement is not None,
        }


def build_irn(
    spec: BackboneSpec,
    *,
    weights: str | Path,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    displacement: bool = True,
    seed: int = 0,
) -> Irn:
    """Build IRNet on a timm backbone, with first weights of the branches.

    Args:
        spec, weights, mean, std: as :func:`lpcam.classifier.build`; the weights are ImageNet's and
            not those of the classifier that made the maps (specification of IRN, section 4).
        displacement: whether there is a displacement branch.
        seed: of the branches' first weights.

    Raises:
        ClassifierError: as :func:`lpcam.classifier.build`, or if the backbone gives no feature maps
            at strides 4 and 8.
    """
    classifier = build(spec, NO_CLASSES, weights=weights, mean=mean, std=std, seed=seed)
    return Irn(Pyramid(classifier), displacement=displacement, seed=seed)


def grid(size: Sequence[int]) -> tuple[int, int]:
    """(h, w) of an image of (H, W) pixels."""
    return -(-size[0] // STRIDE), -(-size[1] // STRIDE)


# -- The loss ----------------------------------------------------------------------------------


class IrnLoss(NamedTuple):
    """The four losses; those of a displacement that is not there are zero."""

    positive: Tensor
    negative: Tensor
    displacement_foreground: Tensor
    displacement_background: Tensor

    @property
    def total(self) -> Tensor:
        """(L_pos + L_neg) / 2 + (L_dfg + L_dbg) / 2."""
        boundary = self.positive + self.negative
        return boundary / 2 + (self.displacement_foreground + self.displacement_background) / 2


def reduce_labels(labels: Tensor) -> Tensor:
    """Labels (H, W), sides multiples of 4, at stride 4: the pixel (4 i + 2, 4 j + 2) of each cell.

    This is what Pillow's nearest neighbour takes; other programs' takes the corner.
    """
    return labels[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]


def irn_loss(
    logits: Tensor,
    labels: Tensor,
    radius: int,
    displacement: Tensor | None = None,
    counts: Tensor | None = None,
) -> IrnLoss:
    """The losses of section 6 of the specification.

    Pairs are taken offset by offset, so that nothing is as large as all pairs but what the gradient
    needs. A kind of pairs that does not occur adds zero.

    Args:
        logits: (B, h, w), boundaries before their sigmoid.
        labels: (B, h, w) uint8, 0 background, 255 ignored, all else classes.
        radius: pairs are nearer than it, in cells.
        displacement: (B, 2, h, w), or None.
        counts: of :func:`lpcam.refine.walk.pair_counts` of the whole batch, where this is a part of
            it.
    """
    if counts is None:
        counts = pair_counts(labels, radius)
    rows, columns = source_window(labels.shape[-2], labels.shape[-1], radius)
    nothing = logits[:0].sum()  # so that there is a gradient, of zero, also without a pair
    sums, moves = [nothing.expand(3)], [nothing.expand(2)]
    for (offset, affinity), (_, kinds) in zip(
        affinities(logits.sigmoid(), radius), pair_kinds(labels, radius), strict=True
    ):
        sums.append(likelihood_sums(affinity, kinds))
        if displacement is not None:
            flat = kinds.flatten(1).to(affinity.dtype)
            moves.append(_displacement_sums(displacement, offset, (rows, columns), flat))
    alike = counts.to(logits.dtype) + EPSILON
    background, foreground, negative = torch.stack(sums).sum(0) / alike
    # over both channels
    still, moved = torch.stack(moves).sum(0) / (2 * counts[:2].to(logits.dtype) + EPSILON)
    return IrnLoss((background + foreground) / 2, negative, moved, still)


def _displacement_sums(
    displacement: Tensor, offset: Offset, window: tuple[slice, slice], kinds: Tensor
) -> Tensor:
    """|delta|_1 summed over background pairs, |delta - offset|_1 over pairs of a class."""
    (dy, dx), (rows, columns) = offset, window
    partner = displacement[
        :, :, rows.start + dy : rows.stop + dy, columns.start + dx : columns.stop + dx
    ]
    delta = displacement[:, :, rows, columns] - partner
    target = delta.new_tensor(offset)[:, None, None]
    return torch.stack(
        [
            kinds[0] @ delta.abs().sum(1).flatten(),
            kinds[1] @ (delta - target).abs().sum(1).flatten(),
        ]
    )


# -- Training ----------------------------------------------------------------------------------


def augment(
    image: NDArray[np.uint8],
    label: NDArray[np.uint8],
    preprocessing: Preprocessing,
    settings: IrnSettings,
    generator: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Random scale, mirror image and square crop of an image and its labels (section 7).

    The image is resized by PIL bicubic and the labels by nearest neighbour; a crop that reaches
    beyond the image is the mean colour there and ignored.

    Args:
        image: (H, W, 3) uint8 RGB.
        label: (H, W) uint8.

    Returns:
        (3, crop, crop) float32 and (crop / 4, crop / 4) uint8.
    """
    size = scaled_size(image.shape[0], image.shape[1], float(generator.uniform(*settings.scale)))
    tensor = preprocessing(resize_image(image, size))
    resized = np.array(Image.fromarray(label).resize(size[::-1], Image.Resampling.NEAREST))
    planes = [(tensor, 0), (torch.from_numpy(resized), IGNORE)]
    canvas, labels = engine.mirror_and_crop(planes, settings.crop, generator)
    return canvas, reduce_labels(labels)


class _Labelled(Dataset[tuple[Tensor, Tensor]]):
    """Augmented images and labels by (epoch, index)."""

    def __init__(
        self,
        pairs: Sequence[tuple[Item, Path]],
        preprocessing: Preprocessing,
        settings: IrnSettings,
        seed: int,
    ) -> None:
        self.pairs = pairs
        self.preprocessing = preprocessing
        self.settings = settings
        self.seed = seed

    def __getitem__(self, place: engine.Place) -> tuple[Tensor, Tensor]:
        epoch, index, _ = place
        generator = np.random.default_rng([self.seed, epoch, index])
        item, path = self.pairs[index]
        image, label = read_image(item.image), read_index_mask(path)
        if image.shape[:2] != label.shape:
            raise DataError(
                f"image {item.id!r} has {image.shape[0]} x {image.shape[1]} pixels but its labels "
                f"{path} {label.shape[0]} x {label.shape[1]}; make the labels again"
            )
        return augment(image, label, self.preprocessing, self.settings, generator)


def train_irn(
    network: Irn,
    pairs: Sequence[tuple[Item, Path]],
    settings: IrnSettings,
    *,
    seed: int,
    folder: Path,
    workers: int = 0,
    processes: Processes | None = None,
) -> list[dict[str, Any]]:
    """Train the branches in place, with checkpoints in ``folder`` to go on from after a stop.

    With a displacement branch, its mean shift over the same images is set at the end.

    Args:
        pairs: images and the PNGs of their ternary labels (0 background, mask ids, 255 ignored).
        settings: whose ``displacement`` must be that of the network.
        workers: processes that read and augment images.
        processes: those that share each batch; the step is that of the whole batch, whatever their
            number, but for rounding.

    Returns:
        one record an epoch: ``epoch`` and mean ``loss``.

    Raises:
        DataError: if there is no image, a file of labels is missing or has another size.
        ClassifierError: as :func:`lpcam.engine.run`, or if settings and network disagree.
        ArtefactError: if a checkpoint is damaged or of another network.
    """
    processes = processes or Processes()
    missing = [f"{item.id} ({path})" for item, path in pairs if not path.is_file()]
    if missing or not pairs:
        raise DataError(
            f"{len(missing)} of {len(pairs)} images have no labels: {', '.join(missing[:3])}; "
            "give images whose label files exist"
        )
    branches = network.branches
    if settings.displacement != (branches.displacement is not None):
        raise ClassifierError(
            f"irn.displacement is {settings.displacement}, but the network was built otherwise; "
            "build it with the same setting"
        )
    groups = [{"params": list(branches.boundary.parameters()), "lr": settings.learning_rate}]
    if branches.displacement is not None:
        rate = settings.learning_rate * settings.displacement_multiplier
        groups.append({"params": list(branches.displacement.parameters()), "lr": rate})
    pyramid = network.pyramid.folded()
    model = processes.replicate(branches)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = (part.to(network.device) for part in batch)
        branches.train()
        counts = pair_counts(labels, settings.radius)
        if processes.count > 1:
            counts = processes.sum(counts.cpu()).to(network.device)
        logits, displacement = model(pyramid(images), labels.shape[-2:])
        return irn_loss(logits, labels, settings.radius, displacement, counts).total

    history = engine.run(
        branches,
        engine.sgd(groups, settings),
        _Labelled(pairs, pyramid.preprocessing, settings, seed),
        len(pairs),
        loss,
        engine.Plan.of_epochs(settings, len(pairs)),
        label="training IRN",
        section="refine.irn",
        seed=seed,
        folder=folder,
        workers=workers,
        processes=processes,
    )
    network.eval()
    if branches.displacement is not None:
        items = [item for item, _ in pairs]
        branches.displacement.shift.copy_(mean_displacement(network, items, settings, processes))
    return history


@torch.no_grad()
def mean_displacement(
    network: Irn, items: Sequence[Item], settings: IrnSettings, processes: Processes | None = None
) -> Tensor:
    """Mean (2,) of the displacement over images, without the stored shift (section 7).

    Of each image the upper left crop of ``settings.crop`` pixels, the mean colour beyond it; of the
    list as many as fill batches.
    """
    processes = processes or Processes()
    branch = network.branches.displacement
    if branch is None:
        raise ClassifierError("this network has no displacement branch; build it with one")
    crop = settings.crop
    count = len(items) - len(items) % min(settings.batch_size, len(items))
    total = torch.zeros(2, dtype=torch.float64)
    pyramid = network.pyramid.folded()
    for item in items[processes.rank : count : processes.count]:
        part = pyramid.preprocessing(read_image(item.image)[:crop, :crop])
        image = F.pad(part, (0, crop - part.shape[2], 0, crop - part.shape[1]))[None]
        field = branch(pyramid(image.to(network.device)), grid((crop, crop)))
        own = branch.shift if not branch.training else 0
        total += (field.mean((0, 2, 3)) + own).double().cpu()
    return (processes.sum(total) / count).float()


# -- Boundaries --------------------------------------------------------------------------------


@torch.no_grad()
def boundary_maps(network: Irn, images: NDArray[np.uint8]) -> Tensor:
    """Boundaries e = sigmoid of the mean logit of images and their mirror images (section 8.1).

    At the images' own scale and without padding. Give the network's :meth:`Irn.folded` twin, which
    takes two thirds of the time.

    Args:
        images: (B, H, W, 3) uint8 RGB.

    Returns:
        (B, h, w) float32 in [0, 1], on the network's device.
    """
    network.eval()
    preprocessing = network.pyramid.preprocessing
    tensor = torch.stack([preprocessing(image) for image in images]).to(network.device)
    size = grid(tensor.shape[-2:])
    boundary = network.branches.boundary
    logits: Tensor = boundary(network.pyramid(tensor), size)
    mirrored: Tensor = boundary(network.pyramid(tensor.flip(-1)), size)
    return ((logits + unflip(mirrored)) / 2).sigmoid()
