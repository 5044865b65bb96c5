"""MCTformer: class attention, PatchCAM and patch affinity as maps (specification of MCTformer).

Training is that of section 2, maps are those of section 3, and LPCAM takes PatchCAM's place as in
section 6. The network is :mod:`lpcam.networks.mctformer`. Options of MCTformer+ (2023) that are not
established are marked as inferred.

Shapes: B images, N classes, K present classes, C channels of a token, h x w patches of an image of
H x W pixels, P = h w.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import getstate, setstate
from random import seed as seed_python
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import get_state, set_state
from numpy.random import seed as seed_numpy
from numpy.typing import NDArray
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.utils.data import Dataset

from lpcam import engine
from lpcam.classifier import Preprocessing
from lpcam.data.images import read_image, resize_image, resize_long_side, scaled_size
from lpcam.data.items import Item
from lpcam.errors import ClassifierError, DataError
from lpcam.extract import all_finite
from lpcam.functional import FusedMaps, cosine_activation, normalize, strided, unflip, unit
from lpcam.metrics import mean_average_precision
from lpcam.networks.mctformer import Attended, Mctformer, Scores, build_mctformer
from lpcam.presets import MctformerSettings
from lpcam.probe import multi_hot
from lpcam.processes import Processes

__all__ = [
    "Mctformer",
    "build_mctformer",
    "fuse",
    "learning_rate",
    "local_features",
    "maps_of",
    "mctformer_loss",
    "refine",
    "token_contrast",
    "train_mctformer",
    "validation_map",
]

EPSILON = 1e-8
"""Added to the range that a map is divided by (section 3, step 4)."""


# -- Losses and schedule -----------------------------------------------------------------------


def mctformer_loss(scores: Scores, labels: Tensor) -> Tensor:
    """Multi-label soft margin loss of the class scores, in V2 plus that of the patch scores.

    Args:
        scores: logits (B, N).
        labels: (B, N), 1 for present classes.
    """
    loss = F.multilabel_soft_margin_loss(scores.classes, labels)
    if scores.patches is not None:
        loss = loss + F.multilabel_soft_margin_loss(scores.patches, labels)
    return loss


def token_contrast(tokens: Tensor) -> Tensor:
    """What keeps class tokens apart: MCTformer+'s contrast, whose form here is inferred.

    The cross-entropy of the softmax over each row of the tokens' cosines, whose target is the token
    itself.

    Args:
        tokens: (B, N, C), class tokens of the last block.
    """
    directions = unit(tokens, dim=-1)
    cosines = directions @ directions.transpose(1, 2)
    targets = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens))
    return F.cross_entropy(cosines.flatten(0, 1), targets)


def learning_rate(epoch: int, settings: MctformerSettings) -> float:
    """The rate of an epoch: a linear warm-up, then a half cosine, renewed every epoch (section 2).

    The cosine counts from the first epoch of all, not from the end of the warm-up.
    """
    top, low, warmup = settings.learning_rate, settings.warmup_learning_rate, settings.warmup_epochs
    if epoch < warmup:
        return low + (top - low) * epoch / warmup
    floor = settings.floor_learning_rate
    return floor + (top - floor) * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2


def plan_of(settings: MctformerSettings, count: int) -> engine.Plan:
    """The epochs of a list of ``count`` images; an incomplete last batch is dropped."""
    batch = min(settings.batch_size, count)
    an_epoch = count // batch
    return engine.Plan(
        settings.epochs * an_epoch,
        batch,
        an_epoch,
        lambda step: learning_rate(step // an_epoch, settings) / settings.learning_rate,
    )


# -- Augmentation ------------------------------------------------------------------------------

_AUGMENTING = threading.Lock()


@contextmanager
def _seeded(seed: Sequence[int]) -> Iterator[None]:
    """Global random numbers that depend on the seed alone, and are afterwards as they were.

    timm's augmentation draws from the global generators of Python, NumPy and torch, and takes no
    others.
    """
    numbers = np.random.SeedSequence(seed).generate_state(3).tolist()
    with _AUGMENTING, torch.random.fork_rng(devices=[]):
        before = getstate(), get_state()
        try:
            seed_python(numbers[0])
            seed_numpy(numbers[1])
            torch.manual_seed(numbers[2])
            yield
        finally:
            setstate(before[0])
            set_state(before[1])


class _Augmented(Dataset[tuple[Tensor, int]]):
    """Images (3, crop, crop), augmented by timm's ImageNet transform, by their place (section 2).

    A random part of random aspect is resized by PIL bicubic, mirrored in half of the cases, changed
    by RandAugment, normalised, and in some cases a rectangle is filled with noise.
    """

    def __init__(
        self,
        items: Sequence[Item],
        preprocessing: Preprocessing,
        settings: MctformerSettings,
        seed: int,
    ) -> None:
        self.items = items
        self.seed = seed
        try:
            self.transform = create_transform(
                settings.crop,
                is_training=True,
                color_jitter=0.0,
                auto_augment=settings.augmentation,
                interpolation="bicubic",
                mean=preprocessing.mean,
                std=preprocessing.std,
                re_prob=settings.erasing,
                re_mode="pixel",
            )
        except Exception as error:  # whatever timm raises of a policy it does not know
            raise ClassifierError(
                f"timm does not know the augmentation {settings.augmentation!r} ({error!r}); "
                "give a policy as rand-m9-mstd0.5-inc1, or null for none"
            ) from error

    def __getitem__(self, place: engine.Place) -> tuple[Tensor, int]:
        epoch, index, _ = place
        image = Image.fromarray(read_image(self.items[index].image))
        with _seeded([self.seed, epoch, index]):
            return self.transform(image), index


# -- Training ----------------------------------------------------------------------------------


class _Outputs(nn.Module):
    """A network's training outputs as a forward pass, which is what processes replicate."""

    def __init__(self, network: Mctformer) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Scores, Tensor]:
        """As :meth:`lpcam.networks.mctformer.Mctformer.outputs`."""
        return self.network.outputs(images)


def train_mctformer(
    network: Mctformer,
    items: Sequence[Item],
    validation: Sequence[Item],
    settings: MctformerSettings,
    *,
    seed: int,
    folder: Path,
    workers: int = 0,
    processes: Processes | None = None,
) -> list[dict[str, Any]]:
    """Train in place by AdamW, with checkpoints in ``folder`` to go on from after a stop.

    The weights of the last epoch are those that maps are made with (section 2).

    Args:
        items: images and their image-level labels.
        validation: images whose mAP is measured after each epoch.
        settings: whose ``version`` must be that of the network.
        workers: processes that read and augment images.
        processes: those that share each batch; the step is that of the whole batch, whatever their
            number, but for rounding.

    Returns:
        one record an epoch: ``epoch``, ``step``, mean ``loss`` and ``validation_map``.

    Raises:
        DataError: if there is no image.
        ClassifierError: if settings and network disagree or timm does not know the augmentation,
            and as :func:`lpcam.engine.run`.
        ArtefactError: if a checkpoint is damaged or of another network.
    """
    processes = processes or Processes()
    if not items:
        raise DataError("there is no image to train MCTformer on; give images with labels")
    own = "v1" if network.head is None else "v2"
    if settings.version != own:
        raise ClassifierError(
            f"mctformer.version is {settings.version}, but the network was built as {own}; build "
            "it with the same setting"
        )
    labels = multi_hot(items, len(network.classes))
    plan = plan_of(settings, len(items))
    decay, none = network.parameter_groups()
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": settings.weight_decay},
        {"params": none, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    model = processes.replicate(_Outputs(network))

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        images, indices = batch
        network.train()
        scores, tokens = model(images.to(network.device))
        mean = mctformer_loss(scores, labels[indices].to(network.device))
        if settings.contrast > 0:
            mean = mean + settings.contrast * token_contrast(tokens)
        return mean * (len(indices) / plan.batch)  # this process's share of the batch

    history = engine.run(
        network,
        optimizer,
        _Augmented(items, network.preprocessing, settings, seed),
        len(items),
        loss,
        plan,
        label="training MCTformer",
        section="host.mctformer",
        seed=seed,
        folder=folder,
        workers=workers,
        processes=processes,
        at_record=lambda _: {
            "validation_map": validation_map(network, validation, settings, processes)
        },
    )
    network.eval()
    return history


@torch.inference_mode()
def validation_map(
    network: Mctformer,
    items: Sequence[Item],
    settings: MctformerSettings,
    processes: Processes | None = None,
) -> float | None:
    """Mean over classes of the average precision of the class scores; None without images.

    Of whole images whose long side is ``settings.crop``. (The released program takes the mean over
    images of each one's average precision over the classes, another figure.)
    """
    processes = processes or Processes()
    network.eval()
    if not items:
        return None
    logits = torch.zeros(len(items), len(network.classes))
    for row in range(processes.rank, len(items), processes.count):
        image = resize_long_side(read_image(items[row].image), settings.crop)
        tensor = network.preprocessing(image)[None].to(network.device)
        logits[row] = network(tensor).classes[0].float().cpu()
    return mean_average_precision(processes.sum(logits), multi_hot(items, len(network.classes)))


# -- Maps --------------------------------------------------------------------------------------


def fuse(
    attention: Tensor, activation: Tensor | None, fusion: Literal["product", "square_root"]
) -> Tensor:
    """Class attention times ReLU(activation), or the square root of that (section 3, step 2).

    Args:
        attention: (..., h, w), non-negative.
        activation: PatchCAM or LPCAM, of the same shape; None (V1) gives the attention alone.
        fusion: ``"square_root"`` is MCTformer+'s.
    """
    if activation is None:
        return attention
    fused = attention * activation.relu()
    return fused.sqrt() if fusion == "square_root" else fused


def refine(maps: Tensor, affinity: Tensor) -> Tensor:
    """Each patch's sum of a map over all patches, weighted by its affinity (section 3, step 3).

    Args:
        maps: (..., K, h, w).
        affinity: (..., P, P), whose rows are the patches that get a value.

    Returns:
        (..., K, h, w).
    """
    flat = maps.flatten(-2).transpose(-2, -1)
    return (affinity @ flat).transpose(-2, -1).reshape(maps.shape)


@torch.no_grad()
def maps_of(
    network: Mctformer,
    image: NDArray[np.uint8],
    labels: Sequence[int],
    settings: MctformerSettings,
    *,
    vectors: Tensor | None = None,
) -> FusedMaps:
    """MCTformer's maps of one image, summed over scales and mirror images, min-max normalised.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: the K present classes, from 0.
        settings: ``attention_blocks``, ``fusion``, ``scales`` and ``flip``.
        vectors: (N, C) of :meth:`lpcam.prototypes.Prototypes.vectors`: LPCAM of the patch tokens
            takes PatchCAM's place. None: PatchCAM in V2, the class attention alone in V1.

    Returns:
        ``cam`` (K, ceil(H/4), ceil(W/4)) and ``high_res`` (K, H, W) in [0, 1], on the network's
        device. Without a class they are empty.

    Raises:
        DataError: if a label is no class.
        ClassifierError: if the network or the vectors give NaN or Inf, or the network has fewer
            blocks than ``attention_blocks``.
        ValueError: if the vectors do not fit the network.
    """
    size = (image.shape[0], image.shape[1])
    _check(network, labels, settings, vectors)
    views = _views(network, image, settings.scales, settings) if labels else ()
    maps = [_refined(view, labels, settings, vectors) for view in views]
    quarter = (strided(size[0], 4), strided(size[1], 4))
    cam, high_res = (
        normalize(_summed(maps, goal), "minmax", EPSILON)
        if maps
        else torch.zeros(0, *goal, device=network.device)
        for goal in (quarter, size)
    )
    return FusedMaps(cam, high_res)


@torch.no_grad()
def local_features(
    network: Mctformer,
    image: NDArray[np.uint8],
    labels: Sequence[int],
    settings: MctformerSettings,
) -> tuple[Tensor, Tensor]:
    """What prototypes are made of: patch tokens, and the maps that split them (section 6).

    The features are signed. The split map, made without LPCAM, is the refined one, min-max
    normalised, or, with ``settings.split_maps`` ``patch``, PatchCAM after a ReLU, divided by its
    maximum; either summed over scales and mirror images at the size of the grid.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: the K present classes, from 0.

    Returns:
        (C, h, w) at scale 1 without flip, and (K, h, w) in [0, 1].

    Raises:
        DataError: if a label is no class.
        ClassifierError: if the network gives NaN or Inf, has fewer blocks than
            ``attention_blocks``, or PatchCAM is wanted of V1.
    """
    _check(network, labels, settings, None)
    scales = settings.scales if 1.0 in settings.scales else (*settings.scales, 1.0)
    views = _views(network, image, scales, settings)
    features = views[scales.index(1.0)].features[0]
    grid = (features.shape[1], features.shape[2])
    if not labels:
        return features, features.new_zeros(0, *grid)
    used = views[: len(settings.scales)]
    if settings.split_maps == "refined":
        maps = [_refined(view, labels, settings, None) for view in used]
        return features, normalize(_summed(maps, grid), "minmax", EPSILON)
    cams = [view.patch_cam for view in used if view.patch_cam is not None]
    for cam in cams:
        _check_finite(cam)
    if not cams:
        raise ClassifierError(
            "MCTformer V1 has no PatchCAM that could split its features; set "
            "mctformer.split_maps to refined, or train V2"
        )
    return features, normalize(_summed([cam[:, list(labels)].relu() for cam in cams], grid), "max")


def _check(
    network: Mctformer,
    labels: Sequence[int],
    settings: MctformerSettings,
    vectors: Tensor | None,
) -> None:
    check_blocks(network, settings)
    count, width = network.cls_token.shape[1:]
    if wrong := [label for label in labels if not 0 <= label < count]:
        raise DataError(f"labels {wrong} are no classes of this network; expected 0 to {count - 1}")
    if vectors is not None and tuple(vectors.shape) != (count, width):
        raise ValueError(f"expected vectors {(count, width)}, got {tuple(vectors.shape)}")
    if vectors is not None:
        _check_finite(vectors)


def _views(
    network: Mctformer,
    image: NDArray[np.uint8],
    scales: Sequence[float],
    settings: MctformerSettings,
) -> list[Attended]:
    """The network's view of an image at each scale, and of the mirrored image beside it."""
    network.eval()
    found = []
    for scale in scales:
        size = scaled_size(image.shape[0], image.shape[1], scale)
        resized = image if size == image.shape[:2] else resize_image(image, size)
        tensor = network.preprocessing(resized)[None].to(network.device)
        pair = torch.cat([tensor, tensor.flip(-1)]) if settings.flip else tensor
        view = network.attend(pair, settings.attention_blocks, affinity=settings.affinity)
        _check_finite(view.features)
        found.append(view)
    return found


def _refined(
    view: Attended, labels: Sequence[int], settings: MctformerSettings, vectors: Tensor | None
) -> Tensor:
    """Fused maps (B, K, h, w) of the present classes, refined where wanted, not normalised."""
    present = list(labels)
    if vectors is not None:
        rows = vectors[present].to(view.features)
        activation = normalize(cosine_activation(view.features, rows).relu(), "max")
    elif view.patch_cam is not None:
        activation = view.patch_cam[:, present]
    else:
        activation = None
    fused = fuse(view.class_attention[:, present], activation, settings.fusion)
    found = fused if view.patch_affinity is None else refine(fused, view.patch_affinity)
    _check_finite(found)
    return found


def _check_finite(values: Tensor) -> None:
    if not all_finite(values):
        raise ClassifierError(
            "MCTformer gave NaN or Inf for this image; check its weights, its prototypes and the "
            "preprocessing (mean and std)"
        )


def check_blocks(network: Mctformer, settings: MctformerSettings) -> None:
    """Refuse attention of more blocks than there are.

    Raises:
        ClassifierError: with both numbers.
    """
    if settings.attention_blocks > len(network.blocks):
        raise ClassifierError(
            f"mctformer.attention_blocks {settings.attention_blocks} is more than the "
            f"{len(network.blocks)} blocks of the network; lower it"
        )


def _summed(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Sum at a size (bilinear) over scales, and over images and mirror images, turned back."""
    total = []
    for pair in maps:
        resized = F.interpolate(pair, size=size, mode="bilinear", align_corners=False)
        total.append(resized[0])
        if len(pair) > 1:
            total.append(unflip(resized[1]))
    return torch.stack(total).sum(0)
