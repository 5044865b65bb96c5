"""MCTformer: class attention, PatchCAM and patch affinity as maps (specification of MCTformer).

Training is that of section 2, maps are those of section 3, and LPCAM replaces PatchCAM as in
section 6. The network is :mod:`lpcam.hosts.mctformer_network`.

Shapes: B images, N classes, K present classes, C channels of a token, h x w patches of an image of
H x W pixels, P = h w.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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
from lpcam.classifiers.finetuning import validation_map
from lpcam.classifiers.probe import multi_hot
from lpcam.data.dataset import Item
from lpcam.data.images import resize_image
from lpcam.data.resize import quarter_size, resize, scaled_size
from lpcam.hosts.base import Host, HostData, HostSection, View, check_finite
from lpcam.hosts.mctformer_network import (
    Attended,
    Mctformer,
    MctformerSettings,
    Scores,
    build_mctformer,
)
from lpcam.method.functional import FusedMaps, cosine_activation, normalize, unflip
from lpcam.runtime.distributed import Processes
from lpcam.runtime.errors import ClassifierError
from lpcam.training import loop as engine
from lpcam.training.optim import parameter_groups
from lpcam.training.released import Released

EPSILON = 1e-8  #: Added to the range that a map is divided by (section 3, step 4).


def _loss(scores: Scores, labels: Tensor) -> Tensor:
    """Multi-label soft margin loss of the class scores, in V2 plus that of the patch scores.

    ``labels`` (B, N) are 1 for present classes.
    """
    loss = F.multilabel_soft_margin_loss(scores.classes, labels)
    if scores.patches is not None:
        loss = loss + F.multilabel_soft_margin_loss(scores.patches, labels)
    return loss


def learning_rate(epoch: int, settings: MctformerSettings) -> float:
    """Learning rate of an epoch: a linear warm-up, then a half cosine (section 2).

    The cosine counts from the first epoch, not from the end of the warm-up. The released program
    advances its schedule after each epoch, so an epoch has the rate of the one before it.
    """
    top, low, warmup = settings.learning_rate, settings.warmup_learning_rate, settings.warmup_epochs
    epoch = max(epoch - 1, 0)
    if epoch < warmup:
        return low + (top - low) * epoch / warmup
    floor = settings.floor_learning_rate
    return floor + (top - floor) * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2


_AUGMENTING = threading.Lock()


@contextmanager
def _seeded(seed: Sequence[int]) -> Iterator[None]:
    """Seed the global generators, from which timm's augmentation draws, and restore them."""
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


def _transform(preprocessing: Preprocessing, settings: MctformerSettings) -> Any:
    """timm's ImageNet transform (section 2)."""
    try:
        return create_transform(
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


def _sample(
    items: Sequence[Item], transform: Any, seed: int, place: engine.Place
) -> tuple[Tensor, int]:
    """An augmented image (3, crop, crop) and its number."""
    image = Image.fromarray(items[place.sample].read())
    with _seeded([seed, place.epoch, place.sample]):
        return transform(image), place.sample


def fuse(
    attention: Tensor, activation: Tensor | None, fusion: Literal["product", "square_root"]
) -> Tensor:
    """Class attention times ReLU(activation), or the square root of that (section 3, step 2).

    Both are (..., h, w); an activation of None (V1) returns the attention.
    """
    if activation is None:
        return attention
    fused = attention * activation.relu()
    return fused.sqrt() if fusion == "square_root" else fused


def refine(maps: Tensor, affinity: Tensor) -> Tensor:
    """Sum of maps (..., K, h, w) over all patches, weighted by affinity (section 3, step 3).

    The rows of ``affinity`` (..., P, P) are the patches that get a value.
    """
    flat = maps.flatten(-2).transpose(-2, -1)
    return (affinity @ flat).transpose(-2, -1).reshape(maps.shape)


def _views(
    network: Mctformer, image: NDArray[np.uint8], scales: Sequence[float], own: MctformerSettings
) -> list[Attended]:
    """The network's outputs for an image, and optionally its mirror image, at each scale."""
    _check_blocks(network, own)
    network.eval()
    found = []
    for scale in scales:
        size = scaled_size(image.shape[0], image.shape[1], scale)
        resized = image if size == image.shape[:2] else resize_image(image, size)
        tensor = network.preprocessing(resized)[None].to(network.device)
        pair = torch.cat([tensor, tensor.flip(-1)]) if own.flip else tensor
        view = network.attend(pair, own.attention_blocks, affinity=own.affinity)
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


def _check_blocks(network: Mctformer, settings: MctformerSettings) -> None:
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


class _MctformerHost(Host[MctformerSettings, Mctformer]):
    """A vision transformer with a token for each class; its base CAM is its own PatchCAM."""

    title = "MCTformer"
    settings = MctformerSettings
    network = Mctformer
    holds_out = True
    map_fields = frozenset({"scales", "flip", "attention_blocks", "fusion", "affinity"})
    prototype_fields = frozenset({"split_maps"})
    build = staticmethod(build_mctformer)

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

    def released(self) -> Sequence[Released]:
        """The files of V1, whose linear head is unused, and of V2."""

        def made(version: str, dimensions: int) -> Released:
            return Released(
                f"MCTformer {version.upper()}'s network",
                "host",
                ("cls_token", "pos_embed", "blocks.11.attn.qkv.weight", "head.weight"),
                [],
                self.official(BackboneSpec("deit_small_patch16_224", {}), version=version),
                classes=lambda state: state["cls_token"].shape[1],
                dimensions={"head.weight": dimensions},
                left_out=r"head\." if version == "v1" else None,
            )

        return [made("v1", 2), made("v2", 4)]

    def images_per_step(
        self, network: Mctformer, data: HostData, settings: MctformerSettings
    ) -> tuple[int, str]:
        _check_blocks(network, settings)
        return min(settings.batch_size, len(data.images)), "batch_size"

    def train(
        self,
        network: Mctformer,
        data: HostData,
        settings: MctformerSettings,
        **options: Unpack[engine.TrainingOptions],
    ) -> engine.History:
        """AdamW (section 2); the record of an epoch has ``validation_map`` too."""
        processes = options.get("processes") or Processes()
        labels = multi_hot(data.images, len(network.classes)).to(network.device)
        batch = min(settings.batch_size, len(data.images))
        an_epoch = len(data.images) // batch  # an incomplete last batch is dropped
        rate = settings.learning_rate

        def values(name: str, parameter: nn.Parameter) -> tuple[float, float]:
            special = name in ("cls_token", "pos_embed") or parameter.ndim < 2
            return rate, 0.0 if special else settings.weight_decay

        def loss(model: nn.Module, sample: tuple[Tensor, Tensor]) -> Tensor:
            images, indices = sample
            mean = _loss(model(images), labels[indices])
            return mean * (len(indices) / batch)  # this process's share of the batch

        def measured(_: int) -> dict[str, Any]:
            precision = validation_map(
                network, data.held_out, settings.crop, processes, lambda found: found.classes
            )
            return {"validation_map": precision}

        transform = _transform(network.preprocessing, settings)
        return engine.run(
            network,
            # reversed: checkpoints have the tokens last
            torch.optim.AdamW(parameter_groups(network, values)[::-1]),
            partial(_sample, data.images, transform, options["seed"]),
            len(data.images),
            loss,
            engine.Plan.of_epochs(
                settings,
                len(data.images),
                lambda step: learning_rate(step // an_epoch, settings) / rate,
            ),
            label="training MCTformer",
            section="host.mctformer",
            at_record=measured,
            **options,
        )

    @torch.no_grad()
    def local_features(
        self, network: Mctformer, view: View, settings: MctformerSettings
    ) -> tuple[Tensor, Tensor]:
        """Patch tokens (C, h, w) at scale 1 and the maps (K, h, w) that split them (section 6).

        The split maps, made without LPCAM and summed at the size of the grid, are the refined ones,
        min-max normalised, or, with ``split_maps`` ``patch``, PatchCAM after a ReLU, divided by its
        maximum.
        """
        scales = settings.scales if 1.0 in settings.scales else (*settings.scales, 1.0)
        views = _views(network, view.image, scales, settings)
        features = views[scales.index(1.0)].features[0]
        grid = (features.shape[1], features.shape[2])
        used = views[: len(settings.scales)]
        if settings.split_maps == "refined":
            maps = [_refined(each, view.labels, settings, None) for each in used]
            return features, normalize(_summed(maps, grid), "minmax", EPSILON)
        cams = [each.patch_cam for each in used if each.patch_cam is not None]
        for cam in cams:
            check_finite(cam, "MCTformer")
        positive = [cam[:, list(view.labels)].relu() for cam in cams]
        return features, normalize(_summed(positive, grid), "max")

    def scorer(self, network: Mctformer) -> tuple[Tensor, Tensor]:
        """PatchCAM where neighbours are all equal (section 6)."""
        if network.head is None or network.head.bias is None:
            raise ClassifierError(
                "MCTformer V1 has no PatchCAM that could score prototypes; train V2 "
                "(mctformer.version: v2)"
            )
        return network.head.weight.detach().sum((-2, -1)), network.head.bias.detach()

    @torch.no_grad()
    def maps(
        self, network: Mctformer, view: View, settings: MctformerSettings, vectors: Tensor | None
    ) -> FusedMaps:
        """Maps summed over scales and mirror images, min-max normalised (section 3).

        With vectors LPCAM of the patch tokens replaces PatchCAM; V1 has neither.
        """
        views = _views(network, view.image, settings.scales, settings)
        maps = [_refined(each, view.labels, settings, vectors) for each in views]
        sizes = (quarter_size(view.size), view.size)
        return FusedMaps(*(normalize(_summed(maps, goal), "minmax", EPSILON) for goal in sizes))


HOST = _MctformerHost()
