"""IRN: class boundaries learnt from ternary labels, and masks from maps that walk between them.

Specification of IRN, sections 4 to 8. A frozen backbone gives a pyramid of features; a branch of
1 x 1 convolutions predicts a boundary map from them, and another, which masks do not need, a
displacement field that points to the centre of each instance. The branches share no trained layer.

Shapes: B images of H x W pixels, K classes, h = ceil(H / 4), w = ceil(W / 4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn

from lpcam.classifiers.classifier import (
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
from lpcam.data.dataset import IGNORE, Item
from lpcam.data.images import read_image, resize_image, scaled_size
from lpcam.data.masks import read_index_mask, write_mask, write_plane
from lpcam.data.resize import resize
from lpcam.method.functional import strided, unflip
from lpcam.refine.base import (
    History,
    LearnedRefinement,
    Picture,
    Refine,
    RefineSection,
    Samples,
    Source,
    Tools,
    check_label_crf,
    check_label_files,
    shallow_copy,
)
from lpcam.refine.crf import DenseCrf
from lpcam.refine.levels import Level, feature_levels, pad_sides, rounds_up
from lpcam.refine.ternary import ternary_mask
from lpcam.refine.walk import (
    EPSILON,
    STRIDE,
    Offset,
    Window,
    affinities,
    likelihood_means,
    pair_counts,
    pair_kinds,
    partner_window,
    random_walk,
    source_window,
)
from lpcam.runtime.distributed import Processes
from lpcam.runtime.errors import ClassifierError, DataError
from lpcam.runtime.settings import Fraction, Positive, PresetModel
from lpcam.training import loop as engine
from lpcam.training.augmentation import mirror_and_crop
from lpcam.training.optim import sgd
from lpcam.training.saved_network import SavedNetwork


class IrnSettings(PresetModel):
    """How IRN's boundaries are learnt and maps walked (specification of IRN, sections 3 to 8)."""

    table: ClassVar[str] = "irn"
    preset: str = "default"

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    learning_rate: Positive
    """Of the boundary branch; the displacement branch's is ``displacement_multiplier`` times it."""
    displacement_multiplier: Positive
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Of SGD."""
    weight_decay: Annotated[float, Field(ge=0.0)]
    """L2 on every trained weight."""
    power: Annotated[float, Field(ge=0.0)]
    """Of the poly schedule: lr (1 - t/T)^power, renewed every step."""
    crop: Annotated[int, Field(ge=16, multiple_of=4)]
    """Side of the square crop, in pixels."""
    scale: tuple[Positive, Positive]
    """Range from which each image's scale is drawn."""
    radius: Annotated[int, Field(ge=2)]
    """Pairs of the loss are nearer than it, in cells of 4 pixels."""
    displacement: bool
    """Whether the displacement branch is trained too; the boundaries do not hang on it."""
    walk_radius: Annotated[int, Field(ge=2)]
    """Pairs of the walk are nearer than it, in cells of 4 pixels."""
    beta: Positive
    """Power of the affinities in the walk."""
    exponent: Annotated[int, Field(ge=0, le=16)]
    """The walk has 2^exponent steps."""
    tolerance: Annotated[float, Field(ge=0.0)]
    """Error that terms left out of the walk's power may make; 0 leaves out none."""
    sharpness: Positive
    """Power of the maps before the walk."""
    foreground_threshold: Fraction
    """Labels of LPCAM: the CRF of the seeds at this threshold decides the foreground ..."""
    background_threshold: Fraction
    """... and that of the seeds at this one the background; between them pixels are ignored."""
    threshold: Fraction
    """Pseudo masks of LPCAM: foreground is above this part of the walked maps' joint maximum."""
    cam_foreground_threshold: Fraction
    """The same three for CAM."""
    cam_background_threshold: Fraction
    cam_threshold: Fraction

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale {list(self.scale)} must be a range: the smaller first")
        if self.crop <= 8 * (self.radius - 1):
            raise ValueError(
                f"crop {self.crop} has no pair at radius {self.radius}; it must be above "
                f"{8 * (self.radius - 1)}"
            )
        for high, low in (
            ("foreground_threshold", "background_threshold"),
            ("cam_foreground_threshold", "cam_background_threshold"),
        ):
            if getattr(self, high) < getattr(self, low):
                raise ValueError(f"{high} must not be below {low}")
        return self


BOUNDARY = (32, 4)
"""Channels and groups of each level in the boundary branch."""


POOLED, SHALLOW, DEEP = (64, 8), (128, 16), (256, 16)
"""The same in the displacement branch, for a level pooled to stride 4, at stride 4, and beyond."""


class Pyramid(nn.Module):
    """A frozen backbone's feature maps from stride 4 on, for images of any size.

    The last map of stride 2, such as the first stage of a ResNet, is pooled to stride 4.

    Args:
        classifier: its backbone is used; its head is not.

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
        found = feature_levels(self.backbone, "IRN")
        strides = [level.stride for level in found]
        if not {STRIDE, 2 * STRIDE} <= set(strides):
            raise ClassifierError(
                f"the backbone {type(self.backbone).__name__} gives feature maps at strides "
                f"{sorted(set(strides))}; IRN needs 4 and 8 among them: choose a convolutional "
                "one or a hierarchical transformer"
            )
        finest = [level for level in found if level.stride == STRIDE // 2][-1:]
        self.levels = finest + [level for level in found if level.stride >= STRIDE]
        whole = rounds_up(self.backbone, self.levels, PROBE_SIZE)
        self.multiple = 1 if whole else max(STRIDE, *strides)

    def train(self, mode: bool = True) -> Pyramid:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Features (B, C, h, w) of each level of (B, 3, H, W) normalised images.

        Where the backbone drops the rest of a side, the images are padded with zeros (the mean
        colour) at the right and bottom first.
        """
        found = feature_maps(self.backbone, pad_sides(images, self.multiple))
        return [
            F.max_pool2d(found[level.index], 3, 2, 1)
            if level.stride < STRIDE
            else found[level.index]
            for level in self.levels
        ]

    def folded(self) -> Pyramid:
        """A copy with the batch norms folded into the convolutions; equal up to rounding."""
        twin = shallow_copy(self)
        twin.backbone = folded_backbone(self.backbone)
        return twin.requires_grad_(False)


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
            _Unit(level.channels, *BOUNDARY, max(1, level.stride // STRIDE)) for level in levels
        )
        self.last = nn.Conv2d(BOUNDARY[0] * len(levels), 1, 1)

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Logits from the levels' features, at the size (h, w) of stride 4."""
        found = [unit(f, size) for unit, f in zip(self.units, features, strict=True)]
        logits: Tensor = self.last(torch.cat(found, 1))[:, 0]
        return logits


class Displacement(nn.Module):
    """Displacement (B, 2, h, w) of a pyramid, in cells of stride 4, first down and then right.

    In evaluation mode ``shift``, the mean over a list of images, is subtracted.
    """

    shift: Tensor

    def __init__(self, levels: Sequence[Level]) -> None:
        super().__init__()
        self.deep = [level.stride > STRIDE for level in levels]
        widths = [
            DEEP if deep else SHALLOW if level.stride == STRIDE else POOLED
            for level, deep in zip(levels, self.deep, strict=True)
        ]
        self.units = nn.ModuleList(
            _Unit(level.channels, *width, max(1, level.stride // (2 * STRIDE)))
            for level, width in zip(levels, widths, strict=True)
        )
        shallow = sum(width[0] for width in widths if width is not DEEP)
        self.middle = _Unit(DEEP[0] * sum(self.deep), *DEEP, 2)
        self.late = _Unit(shallow + DEEP[0], *DEEP)
        self.last = nn.Conv2d(DEEP[0], 2, 1, bias=False)
        self.register_buffer("shift", torch.zeros(2))

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Displacement from the levels' features, at the size (h, w) of stride 4."""
        half = features[self.deep.index(True)].shape[-2:]
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for unit, deep, feature in zip(self.units, self.deep, features, strict=True):
            parts[deep].append(unit(feature, half if deep else size))
        middle = self.middle(torch.cat(parts[1], 1), size)
        field: Tensor = self.last(self.late(torch.cat([*parts[0], middle], 1), size))
        return field if self.training else field - self.shift[:, None, None]


class Branches(nn.Module):
    """The trained part: the boundary branch and, optionally, the displacement branch.

    The first weights of the boundary branch are the same with and without the other.
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
    """A frozen pyramid of features and the trained branches.

    Args:
        pyramid: of an ImageNet backbone.
        displacement: True adds a displacement branch.
        seed: random seed of the branches' first weights.
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
        """Logits (B, h, w) and displacement (B, 2, h, w) of (B, 3, H, W) normalised images."""
        features = self.pyramid(images)
        found: tuple[Tensor, Tensor | None] = self.branches(features, _grid(images.shape[-2:]))
        return found

    def folded(self) -> Irn:
        """A copy for inference with a folded backbone; shares the branches, cannot be saved."""
        twin = shallow_copy(self)
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
    """Build IRN's network on a timm backbone, with untrained branches.

    Args:
        spec, weights, mean, std: as for :func:`lpcam.classifiers.classifier.build`; the weights
        are ImageNet's,
            not those of the classifier that made the maps (specification of IRN, section 4).
        displacement: True adds a displacement branch.
        seed: random seed of the branches' first weights.

    Raises:
        ClassifierError: as :func:`lpcam.classifiers.classifier.build`, or if the backbone gives no
        feature maps
            at strides 4 and 8.

    Example:
        >>> network = build_irn(BackboneSpec("test_resnet", {}), weights="random")
        >>> network(torch.zeros(1, 3, 64, 96))[0].shape
        torch.Size([1, 16, 24])
    """
    classifier = build(spec, NO_CLASSES, weights=weights, mean=mean, std=std, seed=seed)
    return Irn(Pyramid(classifier), displacement=displacement, seed=seed)


def _grid(size: Sequence[int]) -> tuple[int, int]:
    """(h, w) of an image of (H, W) pixels."""
    return strided(size[0], STRIDE), strided(size[1], STRIDE)


class IrnLoss(NamedTuple):
    """The four losses; those of the displacement are zero where there is none."""

    positive: Tensor
    negative: Tensor
    displacement_foreground: Tensor
    displacement_background: Tensor

    @property
    def total(self) -> Tensor:
        """(L_pos + L_neg) / 2 + (L_dfg + L_dbg) / 2."""
        boundary = self.positive + self.negative
        return boundary / 2 + (self.displacement_foreground + self.displacement_background) / 2


def irn_loss(
    logits: Tensor,
    labels: Tensor,
    radius: int,
    displacement: Tensor | None = None,
    counts: Tensor | None = None,
) -> IrnLoss:
    """IRN's losses (specification, section 6). A kind of pairs that does not occur adds zero.

    Args:
        logits: (B, h, w), boundaries before their sigmoid.
        labels: (B, h, w) uint8, 0 background, 255 ignored, otherwise classes.
        radius: pairs are nearer than this, in cells.
        displacement: (B, 2, h, w), or None.
        counts: (3,) of :func:`lpcam.refine.walk.pair_counts` of the whole batch, where this is a
            part of it.

    Example:
        >>> labels = torch.full((1, 8, 8), 255, dtype=torch.uint8)
        >>> irn_loss(torch.zeros(1, 8, 8), labels, 3).total
        tensor(0.)
    """
    if counts is None:
        counts = pair_counts(labels, radius)
    zero = logits[:0].sum()  # so that there is a gradient, of zero, also without a pair
    pairs = affinities(logits.sigmoid(), radius)
    background, foreground, negative = likelihood_means(pairs, labels, counts, zero, radius)
    moves = [zero.expand(2)]
    if displacement is not None:
        window = source_window(labels.shape[-2], labels.shape[-1], radius)
        for offset, kinds in pair_kinds(labels, radius):
            flat = kinds.flatten(1).to(logits.dtype)
            moves.append(_displacement_sums(displacement, offset, window, flat))
    # over both channels
    still, moved = torch.stack(moves).sum(0) / (2 * counts[:2].to(logits.dtype) + EPSILON)
    return IrnLoss((background + foreground) / 2, negative, moved, still)


def _displacement_sums(
    displacement: Tensor, offset: Offset, window: Window, kinds: Tensor
) -> Tensor:
    """|delta|_1 summed over background pairs, |delta - offset|_1 over pairs of a class."""
    partner = displacement[:, :, *partner_window(window, offset)]
    delta = displacement[:, :, *window] - partner
    target = delta.new_tensor(offset)[:, None, None]
    return torch.stack(
        [
            kinds[0] @ delta.abs().sum(1).flatten(),
            kinds[1] @ (delta - target).abs().sum(1).flatten(),
        ]
    )


def augment(
    image: NDArray[np.uint8],
    label: NDArray[np.uint8],
    preprocessing: Preprocessing,
    settings: IrnSettings,
    generator: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Scale, mirror and crop an image and its labels at random (section 7).

    A crop that reaches beyond the image has the mean colour and ignored labels there. The label of
    a cell is that of its pixel (2, 2), as Pillow's nearest neighbour takes it.

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
    canvas, labels = mirror_and_crop(planes, settings.crop, generator)
    return canvas, labels[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]


def _sample(
    pairs: Sequence[tuple[Item, Path]],
    preprocessing: Preprocessing,
    settings: IrnSettings,
    seed: int,
    place: engine.Place,
) -> tuple[Tensor, Tensor]:
    item, path = pairs[place.sample]
    image, label = read_image(item.image), read_index_mask(path)
    if image.shape[:2] != label.shape:
        raise DataError(
            f"image {item.id!r} has {image.shape[0]} x {image.shape[1]} pixels but its labels "
            f"{path} {label.shape[0]} x {label.shape[1]}; make the labels again"
        )
    generator = np.random.default_rng([seed, place.epoch, place.sample])
    return augment(image, label, preprocessing, settings, generator)


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
    """Train the branches in place; a stopped training resumes from the checkpoints in ``folder``.

    The mean shift of a displacement branch over the same images is set at the end.

    Args:
        network, seed, folder, workers, processes: as for :func:`lpcam.training.loop.run`.
        pairs: images and the PNGs of their ternary labels (0 background, mask ids, 255 ignored).
        settings: ``displacement`` must be that of the network.

    Returns:
        one record an epoch: ``epoch``, ``step`` and mean ``loss``.

    Raises:
        DataError: if there is no image, or a file of labels is missing or has another size.
        ClassifierError: as :func:`lpcam.training.loop.run`, or if settings and network disagree.
        ArtefactError: if a checkpoint is damaged or of another network.
    """
    processes = processes or Processes()
    check_label_files(pairs, "labels")
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
        sgd(groups, settings),
        Samples(partial(_sample, pairs, pyramid.preprocessing, settings, seed)),
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
        branches.displacement.shift.copy_(_mean_displacement(network, items, settings, processes))
    return history


@torch.no_grad()
def _mean_displacement(
    network: Irn, items: Sequence[Item], settings: IrnSettings, processes: Processes
) -> Tensor:
    """Mean (2,) of the displacement over as many images as fill batches, without ``shift``.

    Uses the upper left crop of each image, padded with the mean colour (section 7).
    """
    branch = network.branches.displacement
    assert branch is not None
    crop = settings.crop
    count = len(items) - len(items) % min(settings.batch_size, len(items))
    total = torch.zeros(2, dtype=torch.float64)
    pyramid = network.pyramid.folded()
    for item in items[processes.rank : count : processes.count]:
        part = pyramid.preprocessing(read_image(item.image)[:crop, :crop])
        image = F.pad(part, (0, crop - part.shape[2], 0, crop - part.shape[1]))[None]
        field = branch(pyramid(image.to(network.device)), _grid((crop, crop)))
        own = branch.shift if not branch.training else 0
        total += (field.mean((0, 2, 3)) + own).double().cpu()
    return (processes.sum(total) / count).float()


@torch.no_grad()
def boundary_maps(network: Irn, images: NDArray[np.uint8]) -> Tensor:
    """Boundaries e: sigmoid of the mean logit of images and their mirror images (section 8.1).

    The images keep their size. :meth:`Irn.folded` of the network takes two thirds of the time.

    Args:
        images: (B, H, W, 3) uint8 RGB.

    Returns:
        (B, h, w) float32 in [0, 1], on the network's device.

    Example:
        >>> network = build_irn(BackboneSpec("test_resnet", {}), weights="random")
        >>> boundary_maps(network, np.zeros((1, 30, 50, 3), np.uint8)).shape
        torch.Size([1, 8, 13])
    """
    network.eval()
    preprocessing = network.pyramid.preprocessing
    tensor = torch.stack([preprocessing(image) for image in images]).to(network.device)
    size = _grid(tensor.shape[-2:])
    boundary = network.branches.boundary
    logits: Tensor = boundary(network.pyramid(tensor), size)
    mirrored: Tensor = boundary(network.pyramid(tensor.flip(-1)), size)
    return ((logits + unflip(mirrored)) / 2).sigmoid()


def propagate(maps: Tensor, edge: Tensor, settings: IrnSettings) -> Tensor:
    """Walk the maps from where there is no boundary (sections 8.2 to 8.4).

    Args:
        maps: (..., K, h, w) non-negative maps at stride 4.
        edge: (..., h, w) boundaries e in [0, 1].
        settings: the settings of the walk are used.

    Returns:
        (..., K, h, w): the maps to the power of ``settings.sharpness``, times 1 - e, after the
        walk; not normalised.

    Raises:
        DataError: as :func:`lpcam.refine.walk.random_walk`.

    Example:
        >>> settings = IrnSettings.from_preset("official")
        >>> bool(propagate(torch.ones(1, 4, 4), torch.ones(4, 4), settings).any())
        False
    """
    sources = maps if settings.sharpness == 1 else maps.pow(settings.sharpness)
    return random_walk(
        sources * (1 - edge[..., None, :, :]).to(maps.dtype),
        edge,
        radius=settings.walk_radius,
        beta=settings.beta,
        exponent=settings.exponent,
        tolerance=settings.tolerance,
    )


def pseudo_maps(walked: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize walked maps to the image and divide them by the maximum over all classes jointly.

    Args:
        walked: (K, h, w) at stride 4.
        size: (H, W) of the image in pixels.

    Returns:
        (K, H, W) in [0, 1]; zeros where nothing is above zero.

    Raises:
        DataError: if the size does not fit the grid.

    Example:
        >>> pseudo_maps(torch.ones(1, 2, 3), (7, 10)).shape
        torch.Size([1, 7, 10])
    """
    height, width = size
    if walked.ndim != 3 or tuple(walked.shape[-2:]) != _grid(size):
        raise DataError(
            f"walked maps {tuple(walked.shape)} are not those of an image of {height} x {width} "
            f"pixels; expected (K, {', '.join(map(str, _grid(size)))})"
        )
    if not len(walked):
        return walked.new_zeros(0, height, width)
    full = F.interpolate(walked[None], scale_factor=STRIDE, mode="bilinear", align_corners=False)
    cut = full[0, :, :height, :width]
    top = cut.max()
    return cut / top if float(top) > 0 else torch.zeros_like(cut)


# -- The refinement ----------------------------------------------------------------------------


class IrnRefinement(LearnedRefinement):
    """Class boundaries learned from the maps, and a random walk within them."""

    title = "IRN"
    settings = IrnSettings

    def check(self, section: RefineSection) -> None:
        """Refuse a CRF that does not take the hard labels of seeds."""
        check_label_crf(section)

    def crf_use(self, section: RefineSection) -> str:
        """Where a dense CRF takes part."""
        return "on the labels that IRN learns from"

    def threshold(self, section: RefineSection, source: Source) -> float:
        """Threshold of the walked maps."""
        return _thresholds(section, source)[2]

    def key(self, section: RefineSection, source: Source, tools: Tools) -> Mapping[str, Any]:
        """The settings of the walk."""
        walk = {"walk_radius", "beta", "exponent", "tolerance", "sharpness"}
        found: Mapping[str, Any] = section.settings.model_dump(mode="json", include=walk)
        return found

    def described(self, section: RefineSection, tools: Tools) -> dict[str, Any]:
        """IRN's settings and those of the CRF of its labels."""
        return section.model_dump(mode="json", include={"method", "irn", "crf"})

    def label_path(self, folder: Path, image_id: str) -> Path:
        """A ternary mask."""
        return folder / f"{image_id}.png"

    def label_key(self, section: RefineSection, source: Source, tools: Tools) -> Mapping[str, Any]:
        """Thresholds, CRF and mask ids."""
        return {
            "thresholds": list(_thresholds(section, source)[:2]),
            "crf": section.label_crf.model_dump(mode="json", exclude={"preset"}),
            "mask_ids": list(tools.classes.mask_ids),
        }

    def labeller(
        self, section: RefineSection, source: Source, tools: Tools
    ) -> Callable[[Picture, Path], None]:
        """Writes ternary masks."""
        crf = DenseCrf(section.label_crf, memory=tools.memory)
        thresholds = _thresholds(section, source)[:2]

        def label(picture: Picture, path: Path) -> None:
            write_mask(path, ternary_mask(crf, picture, thresholds, tools.classes))

        return label

    def network_key(self, section: RefineSection) -> Mapping[str, Any]:
        """The settings of the training."""
        training = {
            *("epochs", "batch_size", "learning_rate", "displacement_multiplier", "momentum"),
            *("weight_decay", "power", "crop", "scale", "radius", "displacement"),
        }
        found: Mapping[str, Any] = section.settings.model_dump(mode="json", include=training)
        return found

    def build(self, section: RefineSection, tools: Tools) -> Irn:
        """The untrained network on the classifier's backbone, with the backbone's first weights."""
        first = tools.backbone.first_weights(tools.seed)
        displacement = section.settings.displacement
        network = build_irn(tools.backbone.spec(), displacement=displacement, **first)
        return network.to(tools.device)

    def train(
        self,
        network: Any,
        labelled: Sequence[tuple[Item, Path]],
        section: RefineSection,
        **options: Any,
    ) -> History:
        """Train the branches."""
        return train_irn(network, labelled, section.settings, **options)

    def refiner(
        self, section: RefineSection, source: Source, tools: Tools, network: Path, folder: Path
    ) -> Refine:
        """Walks the maps; writes the boundaries beside the pseudo masks."""
        loaded = Irn.load(network).to(tools.device).folded()

        def refine(picture: Picture) -> tuple[Tensor, Tensor]:
            image = picture.image.cpu().numpy()
            boundary = boundary_maps(loaded, image[None])[0]
            write_plane(folder / "boundaries" / f"{picture.item.id}.png", boundary.cpu().numpy())
            quarter = resize(torch.from_numpy(picture.maps.cam), boundary.shape).to(tools.device)
            walked = propagate(quarter, boundary, section.settings)
            full = pseudo_maps(walked, (image.shape[0], image.shape[1]))
            top = walked.max() if walked.numel() else walked.new_ones(())
            return walked / top if float(top) > 0 else walked, full

        return refine


def _thresholds(section: RefineSection, source: Source) -> tuple[float, float, float]:
    """Thresholds for maps of one kind: sure foreground, sure background, pseudo masks."""
    irn = section.settings
    if source.method == "CAM":
        return irn.cam_foreground_threshold, irn.cam_background_threshold, irn.cam_threshold
    return irn.foreground_threshold, irn.background_threshold, irn.threshold


REFINEMENT = IrnRefinement()
