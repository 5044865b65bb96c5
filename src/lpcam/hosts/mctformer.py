"""MCTformer: class attention, PatchCAM and patch affinity as maps (specification of MCTformer).

Training is that of section 2, maps are those of section 3, and LPCAM replaces PatchCAM as in
section 6. The network is :mod:`lpcam.hosts.mctformer_network`. Options of MCTformer+ (2023) that
are not published are marked as inferred.

Shapes: B images, N classes, K present classes, C channels of a token, h x w patches of an image of
H x W pixels, P = h w.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import getstate, setstate
from random import seed as seed_python
from typing import Any, Literal, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import get_state, set_state
from numpy.random import seed as seed_numpy
from numpy.typing import NDArray
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from lpcam.classifiers.classifier import BackboneSpec, Preprocessing
from lpcam.classifiers.linear import mean_average_precision
from lpcam.classifiers.probe import multi_hot
from lpcam.data.dataset import Item
from lpcam.data.images import read_image, resize_image, resize_long_side, scaled_size
from lpcam.data.resize import quarter_size, resize
from lpcam.hosts.base import (
    Host,
    HostData,
    HostSection,
    View,
    check_finite,
    check_labels,
)
from lpcam.hosts.mctformer_network import (
    Attended,
    Mctformer,
    MctformerSettings,
    Scores,
    build_mctformer,
)
from lpcam.method.functional import FusedMaps, cosine_activation, normalize, unflip, unit
from lpcam.runtime.distributed import Processes
from lpcam.runtime.errors import ClassifierError, DataError
from lpcam.training import loop as engine

EPSILON = 1e-8
"""Added to the range that a map is divided by (section 3, step 4)."""


def mctformer_loss(scores: Scores, labels: Tensor) -> Tensor:
    """Multi-label soft margin loss of the class scores, in V2 plus that of the patch scores.

    ``labels`` (B, N) are 1 for present classes.

    Example:
        >>> mctformer_loss(Scores(torch.full((1, 2), 999.0), None), torch.ones(1, 2))
        tensor(0.)
    """
    loss = F.multilabel_soft_margin_loss(scores.classes, labels)
    if scores.patches is not None:
        loss = loss + F.multilabel_soft_margin_loss(scores.patches, labels)
    return loss


def token_contrast(tokens: Tensor) -> Tensor:
    """Contrastive loss of MCTformer+ that separates class tokens; its form here is inferred.

    The cross-entropy of the softmax over each row of the cosines of the last block's class tokens
    (B, N, C), whose target is the token itself.

    Example:
        >>> bool(token_contrast(torch.eye(3)[None]) < token_contrast(torch.ones(1, 3, 3)))
        True
    """
    directions = unit(tokens, dim=-1)
    cosines = directions @ directions.transpose(1, 2)
    targets = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens))
    return F.cross_entropy(cosines.flatten(0, 1), targets)


def learning_rate(epoch: int, settings: MctformerSettings) -> float:
    """Learning rate of an epoch: a linear warm-up, then a half cosine (section 2).

    The cosine counts from the first epoch, not from the end of the warm-up.

    Example:
        >>> learning_rate(0, MctformerSettings.from_preset("official"))
        1e-06
    """
    top, low, warmup = settings.learning_rate, settings.warmup_learning_rate, settings.warmup_epochs
    if epoch < warmup:
        return low + (top - low) * epoch / warmup
    floor = settings.floor_learning_rate
    return floor + (top - floor) * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2


def plan_of(settings: MctformerSettings, count: int) -> engine.Plan:
    """Plan of a training on ``count`` images; an incomplete last batch is dropped.

    Example:
        >>> plan_of(MctformerSettings.from_preset("official", epochs=2, batch_size=4), 10).steps
        4
    """
    batch = min(settings.batch_size, count)
    an_epoch = count // batch
    return engine.Plan(
        settings.epochs * an_epoch,
        batch,
        an_epoch,
        lambda step: learning_rate(step // an_epoch, settings) / settings.learning_rate,
    )


_AUGMENTING = threading.Lock()


@contextmanager
def _seeded(seed: Sequence[int]) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch, and restore them afterwards.

    timm's augmentation draws from these and accepts no others.
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


class _Augment:
    """Makes images (3, crop, crop) augmented by timm's ImageNet transform (section 2)."""

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

    def __call__(self, place: engine.Place) -> tuple[Tensor, int]:
        epoch, index, _ = place
        image = Image.fromarray(read_image(self.items[index].image))
        with _seeded([self.seed, epoch, index]):
            return self.transform(image), index


class _Outputs(nn.Module):
    """A network whose forward pass gives its training outputs, for replication."""

    def __init__(self, network: Mctformer) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Scores, Tensor]:
        return self.network.outputs(images)


@torch.inference_mode()
def validation_map(
    network: Mctformer,
    items: Sequence[Item],
    settings: MctformerSettings,
    processes: Processes | None = None,
) -> float | None:
    """Mean average precision over the classes of the class scores; None without images.

    Whole images are scored, their long side being ``settings.crop``. (The released program averages
    over images instead.)

    Example:
        >>> settings = MctformerSettings.from_preset("default", crop=32)
        >>> network = build_mctformer("test_vit", ("cat",), settings, weights="random")
        >>> validation_map(network, [], settings)
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


def fuse(
    attention: Tensor, activation: Tensor | None, fusion: Literal["product", "square_root"]
) -> Tensor:
    """Class attention times ReLU(activation), or the square root of that (section 3, step 2).

    Both are (..., h, w); an activation of None (V1) returns the attention. ``"square_root"`` is
    MCTformer+'s.

    Example:
        >>> fuse(torch.tensor([[4.0]]), torch.tensor([[9.0]]), "square_root")
        tensor([[6.]])
    """
    if activation is None:
        return attention
    fused = attention * activation.relu()
    return fused.sqrt() if fusion == "square_root" else fused


def refine(maps: Tensor, affinity: Tensor) -> Tensor:
    """Sum of a map over all patches, weighted by the affinity of each patch (section 3, step 3).

    ``maps`` are (..., K, h, w), like the result; ``affinity`` is (..., P, P), and its rows are the
    patches that get a value.

    Example:
        >>> refine(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[1.0, 10.0], [0.5, 0.0]]))
        tensor([[[21.0000,  0.5000]]])
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
        settings: ``attention_blocks``, ``fusion``, ``affinity``, ``scales`` and ``flip`` are used.
        vectors: (N, C) prototypes: LPCAM of the patch tokens replaces PatchCAM. None: PatchCAM in
            V2, the class attention alone in V1.

    Returns:
        ``cam`` (K, ceil(H/4), ceil(W/4)) and ``high_res`` (K, H, W) in [0, 1].

    Raises:
        DataError: if a label is not a class.
        ClassifierError: if the network or the vectors give NaN or Inf.

    Example:
        >>> settings = MctformerSettings.from_preset("default", crop=32)
        >>> network = build_mctformer("test_vit", ("cat", "dog"), settings, weights="random")
        >>> maps_of(network, np.zeros((32, 48, 3), np.uint8), [1], settings).cam.shape
        torch.Size([1, 8, 12])
    """
    size = (image.shape[0], image.shape[1])
    _check(network, labels, settings, vectors)
    views = _views(network, image, settings.scales, settings) if labels else ()
    maps = [_refined(view, labels, settings, vectors) for view in views]
    cam, high_res = (
        normalize(_summed(maps, goal), "minmax", EPSILON)
        if maps
        else torch.zeros(0, *goal, device=network.device)
        for goal in (quarter_size(size), size)
    )
    return FusedMaps(cam, high_res)


@torch.no_grad()
def local_features(
    network: Mctformer,
    image: NDArray[np.uint8],
    labels: Sequence[int],
    settings: MctformerSettings,
) -> tuple[Tensor, Tensor]:
    """Patch tokens of an image for prototypes, and the maps that split them (section 6).

    The split maps, made without LPCAM and summed at the size of the grid, are the refined ones,
    min-max normalised, or, with ``settings.split_maps`` ``patch``, PatchCAM after a ReLU, divided
    by its maximum.

    Args:
        network, image, labels, settings: as for :func:`maps_of`.

    Returns:
        features (C, h, w), signed, at scale 1 without flip, and maps (K, h, w) in [0, 1].

    Example:
        >>> settings = MctformerSettings.from_preset("default", crop=32)
        >>> network = build_mctformer("test_vit", ("cat", "dog"), settings, weights="random")
        >>> local_features(network, np.zeros((32, 48, 3), np.uint8), [1], settings)[1].shape
        torch.Size([1, 2, 3])
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
        check_finite(cam, "MCTformer")
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
    check_labels(labels, count)
    if vectors is not None:
        if tuple(vectors.shape) != (count, width):
            raise ValueError(f"expected vectors {(count, width)}, got {tuple(vectors.shape)}")
        check_finite(vectors, "the prototypes of MCTformer")


def _views(
    network: Mctformer,
    image: NDArray[np.uint8],
    scales: Sequence[float],
    settings: MctformerSettings,
) -> list[Attended]:
    """The network's outputs for an image, and optionally its mirror image, at each scale."""
    network.eval()
    found = []
    for scale in scales:
        size = scaled_size(image.shape[0], image.shape[1], scale)
        resized = image if size == image.shape[:2] else resize_image(image, size)
        tensor = network.preprocessing(resized)[None].to(network.device)
        pair = torch.cat([tensor, tensor.flip(-1)]) if settings.flip else tensor
        view = network.attend(pair, settings.attention_blocks, affinity=settings.affinity)
        check_finite(view.features, "MCTformer")
        found.append(view)
    return found


def _refined(
    view: Attended, labels: Sequence[int], settings: MctformerSettings, vectors: Tensor | None
) -> Tensor:
    """Fused maps (B, K, h, w) of the present classes, optionally refined, not normalised."""
    present = list(labels)
    activation = None if view.patch_cam is None else view.patch_cam[:, present]
    if vectors is not None:
        rows = vectors[present].to(view.features)
        activation = normalize(cosine_activation(view.features, rows).relu(), "max")
    fused = fuse(view.class_attention[:, present], activation, settings.fusion)
    found = fused if view.patch_affinity is None else refine(fused, view.patch_affinity)
    check_finite(found, "MCTformer")
    return found


def check_blocks(network: Mctformer, settings: MctformerSettings) -> None:
    """Check that a network has at least ``settings.attention_blocks`` blocks.

    Example:
        >>> settings = MctformerSettings.from_preset("default", crop=32)
        >>> network = build_mctformer("test_vit", ("cat",), settings, weights="random")
        >>> check_blocks(network, settings)
    """
    if settings.attention_blocks > len(network.blocks):
        raise ClassifierError(
            f"mctformer.attention_blocks {settings.attention_blocks} is more than the "
            f"{len(network.blocks)} blocks of the network; lower it"
        )


def _summed(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Sum at a size (bilinear) over scales, images and mirror images, which are mirrored back."""
    total = []
    for pair in maps:
        resized = resize(pair, size)
        total.append(resized[0])
        if len(pair) > 1:
            total.append(unflip(resized[1]))
    return torch.stack(total).sum(0)


# -- The host ----------------------------------------------------------------------------------


class _MctformerHost(Host[MctformerSettings, Mctformer]):
    """A vision transformer with a token for each class; its base CAM is its own PatchCAM."""

    title = "MCTformer"
    settings = MctformerSettings
    network = Mctformer
    holds_out = True
    map_fields = frozenset({"scales", "flip", "attention_blocks", "fusion", "affinity"})
    prototype_fields = frozenset({"split_maps"})

    def check(self, section: HostSection) -> None:
        if section.backbone is None:
            raise ValueError("mctformer needs host.backbone, such as deit_small_patch16_224")
        if section.settings.version == "v1":
            if any(arm.base == "LPCAM" for arm in self.arms(section)):
                raise ValueError(
                    "mctformer.version v1 has no PatchCAM whose place LPCAM could take; set "
                    "host.maps to [CAM]"
                )
            if section.settings.split_maps == "patch":
                raise ValueError("mctformer.split_maps patch needs version v2")

    def build(
        self,
        backbone: BackboneSpec,
        names: Sequence[str],
        settings: MctformerSettings,
        **first: Any,
    ) -> Mctformer:
        arguments = backbone.arguments
        return build_mctformer(backbone.name, names, settings, arguments=arguments, **first)

    def images_per_step(
        self, network: Mctformer, data: HostData, settings: MctformerSettings
    ) -> tuple[int, str]:
        check_blocks(network, settings)
        return min(settings.batch_size, len(data.images)), "batch_size"

    def train(
        self,
        network: Mctformer,
        data: HostData,
        settings: MctformerSettings,
        **options: Unpack[engine.TrainingOptions],
    ) -> engine.History:
        """AdamW (section 2); a record an epoch has ``validation_map`` too."""
        processes = options.get("processes") or Processes()
        if not data.images:
            raise DataError("there is no image to train MCTformer on; give images with labels")
        own = "v1" if network.head is None else "v2"
        if settings.version != own:
            raise ClassifierError(
                f"mctformer.version is {settings.version}, but the network was built as {own}; "
                "build it with the same setting"
            )
        labels = multi_hot(data.images, len(network.classes))
        plan = plan_of(settings, len(data.images))
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

        return engine.run(
            network,
            optimizer,
            _Augment(data.images, network.preprocessing, settings, options["seed"]),
            len(data.images),
            loss,
            plan,
            label="training MCTformer",
            section="host.mctformer",
            **options,
            at_record=lambda _: {
                "validation_map": validation_map(network, data.held_out, settings, processes)
            },
        )

    def local_features(
        self, network: Mctformer, view: View, settings: MctformerSettings
    ) -> tuple[Tensor, Tensor]:
        return local_features(network, view.image, view.labels, settings)

    def scorer(self, network: Mctformer) -> tuple[Tensor, Tensor]:
        return network.constant_response()

    def maps(
        self, network: Mctformer, view: View, settings: MctformerSettings, vectors: Tensor | None
    ) -> FusedMaps:
        return maps_of(network, view.image, view.labels, settings, vectors=vectors)


HOST = _MctformerHost()
