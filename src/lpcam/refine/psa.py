"""PSA: affinities of neighbouring cells, learnt from two CRFs (specification of MCTformer, 4).

Two dense CRFs of an image's maps, one that favours the background and one that does not, agree on
the labels of some cells of 8 x 8 pixels. A network is trained to give neighbours of one label
features that are near to one another, a_ij = exp(-mean |f_i - f_j|), and those of different labels
features that are not. The maps and a constant background then walk by these affinities, the walk
being IRN's (:mod:`lpcam.refine.walk`).

Shapes: B images of H x W pixels, h = ceil(H / 8), w = ceil(W / 8); K classes of an image, so that
its scores have K + 1 planes, the background first; C channels of the affinity's features.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.data import Dataset

from lpcam import engine
from lpcam.classifier import (
    Classifier,
    Preprocessing,
    described,
    description,
    feature_maps,
    folded_backbone,
)
from lpcam.data.images import limit_long_side, read_image
from lpcam.data.items import BACKGROUND, IGNORE, Item
from lpcam.data.jitter import jitter_colours
from lpcam.errors import ArtefactError, ClassifierError, DataError
from lpcam.network_files import SavedNetwork
from lpcam.presets import PsaSettings
from lpcam.processes import Processes
from lpcam.refine.crf import DenseCrf
from lpcam.refine.inputs import check_image_and_maps, compute_dtype
from lpcam.refine.walk import (
    EPSILON,
    Offset,
    affinity_walk,
    likelihood_sums,
    pair_counts,
    pair_kinds,
    pair_offsets,
    source_window,
)
from lpcam.storage import (
    read_bytes,
    write_bytes,
)
from lpcam.train import freeze

STRIDE = 8
"""Pixels a cell of the grid on which features, labels and walks live."""
WIDTHS = (64, 128, 256)
"""Channels to which the last three feature maps of a backbone are brought."""
PADDING = 1e-5
"""A cell all of whose scores are below it lies beyond the image."""
ROUNDING = 1e-3
"""By which maps may exceed 1, and are cut off."""
CHANNELS_A_TIME = 64
"""Of which differences are taken at a time: all of a large image would fill the memory."""
HEADS = ("reductions.", "last.")
"""The new convolutions, which have a higher learning rate."""


# -- Scores of the CRFs ------------------------------------------------------------------------


def crf_scores(crf: DenseCrf, image: Tensor, planes: Tensor, alpha: float) -> Tensor:
    """Posteriors of the classes and of a background whose score is (1 - the highest map)^alpha.

    Args:
        crf: with the parameters of the preset ``psa``.
        image: (H, W, 3) uint8 RGB.
        planes: (K, H, W) in [0, 1], each divided by its maximum, on the image's device.
        alpha: the larger, the less is background.

    Returns:
        (K + 1, H, W), summing to one, the background first. Without a class it is certain.

    Raises:
        DataError: if image and maps do not fit, or a map is outside [0, 1]; and as
            :class:`lpcam.refine.crf.DenseCrf`.
    """
    return crf_score_stacks(crf, image, planes, [alpha])[0]


def crf_score_stacks(
    crf: DenseCrf, image: Tensor, planes: Tensor, alphas: Sequence[float]
) -> Tensor:
    """:func:`crf_scores` of several alphas, (A, K + 1, H, W): the kernels are made once."""
    check_image_and_maps(image, planes, "maps")
    scores = planes.to(compute_dtype(planes))
    if not len(scores):
        return scores.new_ones(len(alphas), 1, *scores.shape[-2:])
    lowest, highest = (float(value) for value in torch.aminmax(scores))
    if lowest < 0 or highest > 1 + ROUNDING:
        raise DataError(
            f"maps reach from {lowest:.4g} to {highest:.4g}, expected [0, 1]; divide each by its "
            "maximum"
        )
    scores = scores.clamp(max=1)
    free = 1 - scores.amax(0, keepdim=True)
    stacks = torch.stack([torch.cat([free**alpha, scores]) for alpha in alphas])
    return crf.refine_probabilities(image.expand(len(alphas), *image.shape), stacks)


def write_scores(path: Path, low: Tensor, high: Tensor) -> None:
    """Write an image's scores in steps of 1 / 255, as a compressed npz without pickle.

    Args:
        path: ends in ``.npz``.
        low: (K + 1, H, W) in [0, 1], of the lower alpha.
        high: those of the higher one.

    Raises:
        ArtefactError: as :func:`lpcam.storage.write_bytes`.
    """
    first, second = ((s * 255).round().to(torch.uint8).cpu().numpy() for s in (low, high))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, low=first, high=second)
    write_bytes(path, buffer.getvalue())


def read_scores(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read what :func:`write_scores` wrote: (K + 1, H, W) uint8 of low and high, 255 for 1.

    Raises:
        ArtefactError: naming the file, if it is missing, damaged, or has other contents.
    """
    data = read_bytes(path)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            low, high = (archive[name] for name in ("low", "high"))
    except Exception as error:  # a damaged archive makes zipfile, zlib and numpy raise anything
        raise _damaged(path, str(error) or type(error).__name__) from error
    if low.ndim != 3 or not low.size or low.shape != high.shape or {low.dtype, high.dtype} != _BYTE:
        raise _damaged(
            path,
            f"it has {low.dtype} {low.shape} and {high.dtype} {high.shape}, not two equal "
            "stacks of bytes",
        )
    return low, high


_BYTE = {np.dtype(np.uint8)}


def _damaged(path: Path, reason: str) -> ArtefactError:
    return ArtefactError(
        f"{path} does not hold the scores of two CRFs ({reason}); delete it and run the stage "
        "psa-labels again"
    )


# -- Labels ------------------------------------------------------------------------------------


def pooled(scores: Tensor) -> Tensor:
    """Means (..., n, h, w) of cells of 8 x 8 pixels of (..., n, H, W), zeros beyond the image."""
    height, width = scores.shape[-2:]
    padded = F.pad(scores, (0, -width % STRIDE, 0, -height % STRIDE))
    return F.avg_pool2d(padded, STRIDE)


def label_pairs(low: Tensor, high: Tensor) -> Tensor:
    """Labels of cells, from which pairs are taken to be alike or different.

    A cell has the class that is best where the background is favoured; it is background where that
    is best though it is not favoured, whatever the other says; else, and beyond the image, unknown.

    Args:
        low: (K + 1, h, w) scores of the lower alpha, in which the background is favoured.
        high: those of the higher alpha.

    Returns:
        uint8 (h, w): 0 background, k + 1 the image's k-th class, 255 unknown.
    """
    foreground, background = low.argmax(0), high.argmax(0) == 0
    labels = torch.where(foreground > 0, foreground, IGNORE).masked_fill(background, BACKGROUND)
    beyond = torch.maximum(low, high).amax(0) < PADDING
    return labels.masked_fill(beyond, IGNORE).to(torch.uint8)


# -- The network -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tap:
    """One of a backbone's feature maps that the affinities are made of."""

    index: int
    """Among all that the backbone gives."""
    channels: int
    stride: int
    """Pixels a cell, a multiple of 8."""


class Psa(SavedNetwork):
    """A backbone, 1 x 1 convolutions of its last three feature maps, and one of them together.

    Each is without bias and followed by an ELU; maps of a larger stride than 8 are enlarged
    (bilinear). Of WideResNet-38 the maps are what enters b5 and b6, and its features.

    Args:
        classifier: whose backbone is used, and trained; its head is not.
        seed: of the convolutions' first weights.

    Raises:
        ClassifierError: if the backbone does not give feature maps at stride 8, 16, ...
    """

    kind = "psa"
    title = "PSA"
    stage = "psa"
    builder = "lpcam.refine.psa.build_psa, from a classifier of lpcam.classifier.build,"

    def __init__(self, classifier: Classifier, *, seed: int = 0) -> None:
        super().__init__()
        self.backbone = classifier.backbone
        self.preprocessing = classifier.preprocessing
        self.spec = classifier.spec
        self.eval()
        self.taps = self._found()
        widths = WIDTHS[-len(self.taps) :]
        self.channels = sum(widths)
        """C."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.reductions = nn.ModuleList(
                nn.Conv2d(tap.channels, width, 1, bias=False)
                for tap, width in zip(self.taps, widths, strict=True)
            )
            self.last = nn.Conv2d(self.channels, self.channels, 1, bias=False)
            for weight in self.reductions.parameters():
                nn.init.kaiming_normal_(weight)
            nn.init.xavier_uniform_(self.last.weight)
        self.multiple = STRIDE
        self.multiple = self._multiple()
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.last.weight.device

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images to features f (B, C, h, w).

        Zeros (the mean colour) are laid to the right and below up to a multiple of 8 pixels, or of
        the largest stride where the backbone drops what is left over of a side.
        """
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.multiple, 0, -height % self.multiple))
        maps = feature_maps(self.backbone, images)
        rows, columns = -(-height // STRIDE), -(-width // STRIDE)
        parts = []
        for tap, reduction in zip(self.taps, self.reductions, strict=True):
            found = reduction(maps[tap.index])
            if tap.stride > STRIDE:
                factor = tap.stride // STRIDE
                found = F.interpolate(
                    found, scale_factor=factor, mode="bilinear", align_corners=False
                )
            parts.append(F.elu(found[..., :rows, :columns]))
        return F.elu(self.last(torch.cat(parts, 1)))

    def train(self, mode: bool = True) -> Psa:
        """Training mode with the statistics of every batch norm frozen."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def folded(self) -> Psa:
        """The same network for inference, as :meth:`lpcam.classifier.Classifier.folded`.

        It shares the new convolutions with this one and cannot be saved.
        """
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        twin.backbone = folded_backbone(self.backbone)
        twin.spec = None
        return twin

    def _can_be_described(self) -> bool:
        return self.spec is not None

    @classmethod
    def _described(cls, metadata: Mapping[str, Any]) -> Psa:
        return cls(described(metadata))

    def _description(self) -> dict[str, Any]:
        return description(self.backbone, self.spec, self.preprocessing)

    def _zeros(self, height: int, width: int) -> Tensor:
        return next(self.backbone.parameters()).new_zeros(1, 3, height, width)

    @torch.no_grad()
    def _found(self) -> list[Tap]:
        """The last three of the backbone's maps at strides that are multiples of 8."""
        name, side = type(self.backbone).__name__, 128
        if not hasattr(self.backbone, "forward_intermediates"):
            raise ClassifierError(
                f"the backbone {name} does not give the feature maps between its stages; PSA needs "
                "a timm model that has forward_intermediates"
            )
        maps = feature_maps(self.backbone, self._zeros(side, side))
        strides = [side // found.shape[-1] for found in maps]
        taps = [
            Tap(number, found.shape[1], stride)
            for number, (found, stride) in enumerate(zip(maps, strides, strict=True))
            if stride % STRIDE == 0
        ]
        if not taps:
            raise ClassifierError(
                f"the backbone {name} gives feature maps at strides {sorted(set(strides))}; PSA "
                "needs some at 8, 16 or 32: choose another backbone, or another output stride"
            )
        return taps[-len(WIDTHS) :]

    @torch.no_grad()
    def _multiple(self) -> int:
        """What the sides of images must be multiples of: 8 where strides round up."""
        size = (13 * STRIDE, 17 * STRIDE)
        maps = feature_maps(self.backbone, self._zeros(*size))
        for tap in self.taps:
            if tuple(maps[tap.index].shape[-2:]) != tuple(-(-side // tap.stride) for side in size):
                return max(tap.stride for tap in self.taps)
        return STRIDE


def build_psa(classifier: Classifier, *, seed: int = 0) -> Psa:
    """PSA's network on a copy of a trained classifier's backbone, with its preprocessing.

    Raises:
        ClassifierError: as :class:`Psa`.
    """
    twin = copy.copy(classifier)
    twin._modules = dict(classifier._modules)
    twin.backbone = copy.deepcopy(classifier.backbone)
    return Psa(twin, seed=seed).to(classifier.device)


# -- Affinities --------------------------------------------------------------------------------


def feature_distances(
    features: Tensor, radius: int, *, sources_only: bool = False
) -> Iterator[tuple[Offset, Tensor]]:
    """Mean absolute difference over the channels of every pair on the grid, offset by offset.

    Args:
        features: (B, C, h, w).
        radius: pairs are nearer than it, in cells.
        sources_only: whether only the pairs of :func:`lpcam.refine.walk.source_window` are wanted,
            those of the loss.

    Yields:
        the offset (dy, dx) and (B, h - dy, w - abs(dx)) distances, by the upper left corner of the
        pair's bounding box, without the offsets that no pair of the grid has; or (B, rows, columns)
        distances of the window's cells, nothing where that is empty. With a gradient, of first
        order.
    """
    windows = _windows(features.shape[-2:], radius, sources_only=sources_only)
    if features.requires_grad and torch.is_grad_enabled():
        return zip(windows, _Distances.apply(features, windows), strict=True)
    return ((offset, _distance(features, *sides)) for offset, sides in windows.items())


Side = tuple[slice, slice]
"""Rows and columns of one cell of each pair."""


def _windows(
    size: Sequence[int], radius: int, *, sources_only: bool
) -> dict[Offset, tuple[Side, Side]]:
    """The first and the second cells of the pairs at each offset."""
    height, width = size
    found = {}
    for dy, dx in pair_offsets(radius):
        if sources_only:
            rows, columns = source_window(height, width, radius)
        else:
            rows = slice(0, max(0, height - dy))
            columns = slice(max(0, -dx), max(0, -dx, min(width, width - dx)))
        if rows.stop > rows.start and columns.stop > columns.start:
            partner = (
                slice(rows.start + dy, rows.stop + dy),
                slice(columns.start + dx, columns.stop + dx),
            )
            found[dy, dx] = ((rows, columns), partner)
    return found


def _distance(features: Tensor, own: Side, partner: Side) -> Tensor:
    total: Tensor | None = None
    for part in torch.split(features, CHANNELS_A_TIME, 1):
        found = (part[:, :, *partner] - part[:, :, *own]).abs_().sum(1)
        total = found if total is None else total.add_(found)
    assert total is not None
    return total.div_(features.shape[1])


class _Distances(torch.autograd.Function):
    """All distances at once, with a gradient that makes the differences anew, not keeps them."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, windows: dict[Offset, tuple[Side, Side]]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(features)
        ctx.windows = windows
        return tuple(_distance(features, *sides) for sides in windows.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (features,) = ctx.saved_tensors
        total = torch.zeros_like(features)
        shares = [(gradient / features.shape[1])[:, None] for gradient in gradients]
        parts, changes = (torch.split(x, CHANNELS_A_TIME, 1) for x in (features, total))
        for part, into in zip(parts, changes, strict=True):
            for (own, partner), share in zip(ctx.windows.values(), shares, strict=True):
                change = (part[:, :, *partner] - part[:, :, *own]).sign_().mul_(share)
                into[:, :, *partner] += change
                into[:, :, *own] -= change
        return total, None


def psa_loss(features: Tensor, labels: Tensor, radius: int, counts: Tensor | None = None) -> Tensor:
    """Quarter the mean -log a of background pairs and of pairs of a class, half -log(1 - a) of the
    others. A kind of pairs that does not occur adds zero.

    Args:
        features: (B, C, h, w).
        labels: (B, h, w) uint8, 0 background, 255 unknown, all else classes of the image.
        radius: pairs are nearer than it, in cells.
        counts: of :func:`lpcam.refine.walk.pair_counts` of the whole batch, where this is a part of
            it.
    """
    if counts is None:
        counts = pair_counts(labels, radius)
    # so that there is a gradient, of zero, also without a pair
    sums: list[Tensor] = [features[:0].sum().expand(3)]
    distances = feature_distances(features, radius, sources_only=True)
    for (_, distance), (_, kinds) in zip(distances, pair_kinds(labels, radius), strict=True):
        sums.append(likelihood_sums((-distance).exp(), kinds))
    background, foreground, different = torch.stack(sums).sum(0) / (counts.to(features) + EPSILON)
    loss: Tensor = (background + foreground) / 4 + different / 2
    return loss


# -- Training ----------------------------------------------------------------------------------


def augment(
    image: NDArray[np.uint8],
    low: NDArray[np.uint8],
    high: NDArray[np.uint8],
    preprocessing: Preprocessing,
    settings: PsaSettings,
    generator: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Random colours, mirror image and square crop of an image and its scores, black beyond it.

    Args:
        image: (H, W, 3) uint8 RGB.
        low, high: (K + 1, H, W) uint8, of :func:`read_scores`.

    Returns:
        (3, crop, crop) float32, normalised, and labels (crop / 8, crop / 8) uint8.
    """
    colours = torch.from_numpy(jitter_colours(image, settings.jitter, generator)).permute(2, 0, 1)
    planes = (colours, torch.from_numpy(low), torch.from_numpy(high))
    canvas, *scores = engine.mirror_and_crop([(p, 0) for p in planes], settings.crop, generator)
    cells = [pooled(stack / 255) for stack in scores]
    return preprocessing(canvas.permute(1, 2, 0).numpy()), label_pairs(cells[0], cells[1])


class _Labelled(Dataset[tuple[Tensor, Tensor]]):
    """Augmented images and labels by their place."""

    def __init__(
        self,
        labelled: Sequence[tuple[Item, Path]],
        preprocessing: Preprocessing,
        settings: PsaSettings,
        seed: int,
    ) -> None:
        self.labelled = labelled
        self.preprocessing = preprocessing
        self.settings = settings
        self.seed = seed

    def __getitem__(self, place: engine.Place) -> tuple[Tensor, Tensor]:
        generator = np.random.default_rng([self.seed, place.epoch, place.sample])
        item, path = self.labelled[place.sample]
        low, high = read_scores(path)
        # An image that was shrunk to be refined has scores of that size.
        image = limit_long_side(read_image(item.image), max(low.shape[1:]))
        if image.shape[:2] != low.shape[1:]:
            raise DataError(
                f"image {item.id!r} has {image.shape[0]} x {image.shape[1]} pixels but its scores "
                f"{path} {low.shape[1]} x {low.shape[2]}; make the scores again"
            )
        return augment(image, low, high, self.preprocessing, self.settings, generator)


def train_psa(
    network: Psa,
    labelled: Sequence[tuple[Item, Path]],
    settings: PsaSettings,
    *,
    seed: int,
    folder: Path,
    workers: int = 0,
    processes: Processes | None = None,
) -> list[dict[str, Any]]:
    """Train in place, with checkpoints in ``folder`` from which a stopped training goes on.

    Args:
        labelled: images and the files of their scores (:func:`write_scores`), of the image's size
            or of the smaller one at which it was refined.
        workers: processes that read and augment images.
        processes: those that share each batch; the step is that of the whole batch, whatever their
            number, but for rounding.

    Returns:
        one record an epoch: ``epoch``, ``step`` and mean ``loss``.

    Raises:
        DataError: if there is no image, a file of scores is missing or has another shape.
        ClassifierError: if ``freeze`` matches nothing, and as :func:`lpcam.engine.run`.
        ArtefactError: if a file of scores is damaged, or a checkpoint damaged or of another
            network.
    """
    processes = processes or Processes()
    missing = [f"{item.id} ({path})" for item, path in labelled if not path.is_file()]
    if missing or not labelled:
        raise DataError(
            f"{len(missing)} of {len(labelled)} images have no scores: {', '.join(missing[:3])}; "
            "give images whose score files exist"
        )
    freeze(network.backbone, settings.freeze, norms=True)
    model = processes.replicate(network)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = (part.to(network.device) for part in batch)
        network.train()
        counts = pair_counts(labels, settings.radius)
        if processes.count > 1:
            counts = processes.sum(counts.cpu()).to(network.device)
        return psa_loss(model(images), labels, settings.radius, counts)

    history = engine.run(
        network,
        engine.sgd(engine.parameter_groups(network, HEADS, settings), settings),
        _Labelled(labelled, network.preprocessing, settings, seed),
        len(labelled),
        loss,
        engine.Plan.of_epochs(settings, len(labelled)),
        label="training PSA",
        section="refine.psa",
        seed=seed,
        folder=folder,
        workers=workers,
        processes=processes,
    )
    network.eval()
    return history


# -- The walk ----------------------------------------------------------------------------------


@torch.no_grad()
def walk(network: Psa, image: NDArray[np.uint8], planes: Tensor, settings: PsaSettings) -> Tensor:
    """Scores of an image after the walk of its maps and of a constant background.

    All pairs of the grid walk, those at its edges too. Give the network's :meth:`Psa.folded` twin,
    which takes less time.

    Args:
        image: (H, W, 3) uint8 RGB.
        planes: (K, H, W) maps in [0, 1].
        settings: of the walk: radius, beta, exponent, tolerance, and the background's threshold.

    Returns:
        (K + 1, H, W), the background first, on the network's device; the pseudo mask is the highest
        of them.

    Raises:
        DataError: if image and maps do not fit, or maps or features are not finite.
    """
    network.eval()
    # on the CPU, where the image is
    check_image_and_maps(torch.from_numpy(np.ascontiguousarray(image)), planes.cpu(), "maps")
    height, width = image.shape[:2]
    scores = planes.to(network.device, compute_dtype(planes))
    scores = torch.cat([scores.new_full((1, height, width), settings.threshold), scores])
    features = network(network.preprocessing(image)[None].to(network.device))
    walked = affinity_walk(
        pooled(scores)[None],
        ((offset, (-d).exp()) for offset, d in feature_distances(features, settings.radius)),
        beta=settings.beta,
        exponent=settings.exponent,
        tolerance=settings.tolerance,
    )
    full = F.interpolate(walked, scale_factor=STRIDE, mode="bilinear", align_corners=False)
    return full[0, :, :height, :width]
