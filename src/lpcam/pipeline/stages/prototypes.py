"""Local features of the images of a list, and the prototypes of each class made from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lpcam.classifiers.feature_store import DTYPES
from lpcam.data.dataset import Item
from lpcam.data.map_files import map_path, read_maps
from lpcam.method.multi_scale import single_scale_cam
from lpcam.method.prototypes import make_prototypes
from lpcam.method.reservoir import SIDES, Reservoir, collect, draw_images
from lpcam.method.settings import LpcamSettings
from lpcam.pipeline.cache import Output, StageCache, Task
from lpcam.pipeline.context import Context
from lpcam.runtime.errors import RecipeError
from lpcam.runtime.files import digest_file
from lpcam.runtime.progress import progress
from lpcam.runtime.versions import versions

CHECKPOINT_SECONDS = 60.0
"""Minimum time between checkpoints of the reservoir of local features."""
CHECKPOINT_SHARE = 10
"""Minimum ratio of that time to the duration of the last checkpoint, which may be large."""
Local = Callable[[list[Item]], Sequence[tuple[Tensor, Tensor]]]
"""Gives the features (C, h, w) of each image of a batch, and the maps (K, H, W) that split them."""


def cluster(context: Context) -> Iterator[Task]:
    """Collect, cluster, score and select (eqs. 2 to 4)."""
    recipe, items = context.recipe, context.items("prototypes")
    settings = recipe.lpcam
    multi_scale = settings.split_maps == "multi_scale"
    classifier = context.results["classifier"].output
    parts = {
        "revision": 3,
        "classifier": classifier["digest"],
        "settings": settings.fitting.model_dump(mode="json"),
        "cam_epsilon": settings.cam_epsilon,
        "split_maps": context.results["cam"].key if multi_scale else None,
        "maps": recipe.maps.features_key(),
        "seed": recipe.run.seed,
        "images": context.digest(items),
    }

    def local(batch: list[Item]) -> list[tuple[Tensor, Tensor]]:
        return _local(context, batch)

    def prepare() -> Tensor:
        weight = context.classifier.weight
        check_memory(context, settings, weight.shape)
        return weight

    def work(weight: Tensor, cache: StageCache) -> Output | None:
        return make(
            context,
            cache,
            items,
            settings,
            local,
            weight,
            classifier["fingerprint"],
            label="local features",
        )

    path = context.folder.prototypes()
    yield Task([context.result("prototypes", parts, [path])], work, prepare)


def make(
    context: Context,
    cache: StageCache,
    items: Sequence[Item],
    settings: LpcamSettings,
    local: Local,
    weight: Tensor,
    fingerprint: str,
    *,
    label: str,
    bias: Tensor | None = None,
) -> Output | None:
    """Collect local features and make prototypes of them, in the folder of a result.

    Args:
        context: context of the run.
        cache: cache of the result.
        items: images whose features are collected.
        settings: how prototypes are fitted.
        local: gives the features of a batch of images and the maps that split them.
        weight: (N, C) of the linear layer that scores centres (eqs. 3 and 4).
        fingerprint: fingerprint of the classifier or network that the features are of.
        label: shown with the progress.
        bias: (N,) of that layer, where scores use it.
    """
    reservoir, images = gather(context, items, cache.folder, settings, local, label)
    if not context.processes.first:
        return None
    prototypes = make_prototypes(
        reservoir,
        weight,
        context.dataset.classes.names,
        settings,
        seed=context.recipe.run.seed,
        bias=bias,
        fingerprint=fingerprint,
        made_by={"stage": cache.key, "versions": versions()},
        workers=context.sharing.workers,
    )
    path = cache.folder / "prototypes.safetensors"
    prototypes.save(path)
    return {"digest": digest_file(path), "events": list(prototypes.events), "images": images}


def gather(
    context: Context,
    items: Sequence[Item],
    folder: Path,
    settings: LpcamSettings,
    local: Local,
    label: str,
) -> tuple[Reservoir, int]:
    """Sample the local features of a list.

    Returns:
        The sample, in the first process that of all processes, and the number of images used.
    """
    drawn = draw_images(
        [(item.id, item.labels) for item in items],
        len(context.dataset.classes),
        settings,
        seed=context.recipe.run.seed,
    )
    used = [item for item in items if item.id in drawn]
    batches = context.sharing.batches(context.sharing.mine(used))
    count = context.processes.count
    parts = [
        # A checkpoint counts batches, so only the same sharing can resume from it.
        folder / f"reservoir-{rank}-of-{count}-by-{context.sharing.batch}.safetensors"
        for rank in range(count)
    ]
    checkpoint = parts[context.processes.rank]
    reservoir = _new_reservoir(context, settings)
    done = reservoir.restore(checkpoint) if checkpoint.is_file() else 0
    next_save = time.monotonic() + CHECKPOINT_SECONDS
    todo = batches[done:]
    total = sum(len(batch) for batch in batches)
    left = sum(len(batch) for batch in todo)
    with progress(label, total, done=total - left) as advance:
        for batch, found in zip(todo, context.sharing.map(local, todo), strict=True):
            for item, (features, split_map) in zip(batch, found, strict=True):
                collect(
                    reservoir,
                    features,
                    item.labels,
                    split_map,
                    settings,
                    item.id,
                    drawn[item.id],
                )
            done += 1
            advance(len(batch), "")
            if settings.max_features is None:
                _check_memory(context, "the sample of all features has reached", reservoir.nbytes)
            if (started := time.monotonic()) > next_save:
                reservoir.checkpoint(checkpoint, done)
                took = time.monotonic() - started
                pause = max(CHECKPOINT_SECONDS, CHECKPOINT_SHARE * took)
                next_save = time.monotonic() + pause
    if count > 1:
        reservoir.checkpoint(checkpoint, len(batches))
        context.processes.wait()
        if context.processes.first:
            for part in parts[1:]:
                theirs = _new_reservoir(context, settings)
                theirs.restore(part)
                reservoir.merge(theirs)
    return reservoir, len(used)


def _new_reservoir(context: Context, settings: LpcamSettings) -> Reservoir:
    dtype = DTYPES[context.recipe.maps.features]
    return Reservoir(settings.max_features, context.recipe.run.seed, dtype=dtype)


def check_memory(context: Context, settings: LpcamSettings, shape: Sequence[int]) -> None:
    """Refuse a sample that would not fit into memory when it is full.

    Args:
        context: context of the run.
        settings: settings with the size of the sample.
        shape: numbers of classes and channels.

    Raises:
        RecipeError: with the memory that is needed and available.
    """
    bound = settings.max_features
    if bound is None:
        return
    classes, channels = shape
    # Twice the bound: a reservoir is cut back when it holds so many.
    rows = 2 * bound * len(SIDES) * classes
    needed = rows * channels * DTYPES[context.recipe.maps.features].itemsize
    _check_memory(context, f"lpcam.max_features {bound} of {classes} classes needs", needed)


def _check_memory(context: Context, what: str, needed: int) -> None:
    allowed = context.sample_memory
    if needed > allowed:
        raise RecipeError(
            f"{what} {needed / 2**30:.3g} GiB, but {allowed / 2**30:.3g} GiB are available; lower "
            "lpcam.max_features, or raise run.memory (--memory) if the machine has more"
        )


@torch.inference_mode()
def _local(context: Context, batch: list[Item]) -> list[tuple[Tensor, Tensor]]:
    """Features (C, h, w) at scale 1 and the CAM that splits them, of each image of a batch."""
    settings = context.recipe.lpcam
    (pair,) = context.store(context.classifier).pairs(batch, (1.0,))
    found = []
    for item, features in zip(batch, pair.features, strict=True):
        if settings.split_maps == "multi_scale":
            maps = read_maps(map_path(context.folder / "cam", item.id))
            split_map = torch.from_numpy(maps.high_res)
        else:
            weight = context.classifier.weight[list(item.labels)]
            split_map = single_scale_cam(features, weight, epsilon=settings.cam_epsilon)
        found.append((features, split_map))
    return found
