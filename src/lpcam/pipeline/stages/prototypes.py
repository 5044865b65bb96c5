"""Local features of the images of a list, and the prototypes of each class made from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lpcam.classifiers.feature_store import DTYPES
from lpcam.data.dataset import Item
from lpcam.data.map_files import map_path, read_maps
from lpcam.method.multi_scale import single_scale_cam
from lpcam.method.prototypes import make_prototypes
from lpcam.method.reservoir import SIDES, Reservoir, collect, draw_images
from lpcam.method.settings import LpcamSettings
from lpcam.pipeline.cache import Output, Result, Task
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

    @torch.inference_mode()
    def local(batch: list[Item]) -> list[tuple[Tensor, Tensor]]:
        (pair,) = context.store(context.classifier).pairs(batch, (1.0,))
        found = []
        for item, features in zip(batch, pair.features, strict=True):
            if multi_scale:
                maps = read_maps(map_path(context.folder / "cam", item.id))
                split_map = torch.from_numpy(maps.high_res)
            else:
                weight = context.classifier.weight[list(item.labels)]
                split_map = single_scale_cam(features, weight, epsilon=settings.cam_epsilon)
            found.append((features, split_map))
        return found

    def prepare() -> Tensor:
        weight = context.classifier.weight
        check_memory(context, settings, weight.shape)
        return weight

    def work(weight: Tensor, result: Result) -> Output | None:
        scorer, label = (weight, None), "local features"
        return make(context, result, items, settings, local, scorer, classifier, label)

    yield context.task("prototypes", parts, [context.folder.prototypes()], work, prepare)


def make(
    context: Context,
    result: Result,
    items: Sequence[Item],
    settings: LpcamSettings,
    local: Local,
    scorer: tuple[Tensor, Tensor | None],
    trained: Output,
    label: str,
) -> Output | None:
    """Collect local features and make prototypes of them, in the folder of a result.

    Args:
        items: images whose features are collected.
        settings: how prototypes are fitted.
        local: gives the features of a batch of images and the maps that split them.
        scorer: weight (N, C) of the linear layer that scores centres (eqs. 3 and 4), and its bias
            (N,) where scores use it.
        trained: record of the classifier or network that the features are of.
        label: shown with the progress.
    """
    seed, names = context.recipe.run.seed, context.dataset.classes.names
    drawn = draw_images([(i.id, i.labels) for i in items], len(names), settings, seed=seed)
    used = [item for item in items if item.id in drawn]
    reservoir = _gather(context, used, drawn, result, settings, local, label)
    if not context.processes.first:
        return None
    weight, bias = scorer
    prototypes = make_prototypes(
        reservoir,
        weight,
        names,
        settings,
        seed=seed,
        bias=bias,
        fingerprint=trained["fingerprint"],
        made_by={"stage": result.key, "versions": versions()},
        workers=context.sharing.workers,
    )
    (path,) = result.files
    prototypes.save(path)
    return {"digest": digest_file(path), "events": list(prototypes.events), "images": len(used)}


def _gather(
    context: Context,
    used: Sequence[Item],
    drawn: dict[str, dict[int, int]],
    result: Result,
    settings: LpcamSettings,
    local: Local,
    label: str,
) -> Reservoir:
    """Sample the local features of images; in the first process those of all processes."""
    batches = context.sharing.batches(context.sharing.mine(used))
    count = context.processes.count
    checkpoints = [
        # A checkpoint counts batches, so only the same sharing can resume from it.
        result.folder / f"reservoir-{rank}-of-{count}-by-{context.sharing.batch}.safetensors"
        for rank in range(count)
    ]
    checkpoint = checkpoints[context.processes.rank]

    def empty() -> Reservoir:
        dtype = DTYPES[context.recipe.maps.features]
        return Reservoir(settings.max_features, context.recipe.run.seed, dtype=dtype)

    reservoir = empty()
    done = reservoir.restore(checkpoint) if checkpoint.is_file() else 0
    next_save = time.monotonic() + CHECKPOINT_SECONDS
    todo = batches[done:]
    total, left = (sum(map(len, some)) for some in (batches, todo))
    with progress(label, total, done=total - left) as advance:
        for batch, found in zip(todo, context.sharing.map(local, todo), strict=True):
            for item, (features, split_map) in zip(batch, found, strict=True):
                times = drawn[item.id]
                collect(reservoir, features, item.labels, split_map, settings, item.id, times)
            done += 1
            advance(len(batch), "")
            if settings.max_features is None:
                _check_memory(context, "the sample of all features has reached", reservoir.nbytes)
            if (started := time.monotonic()) > next_save:
                reservoir.checkpoint(checkpoint, done)
                saved = time.monotonic()
                next_save = saved + max(CHECKPOINT_SECONDS, CHECKPOINT_SHARE * (saved - started))
    if count > 1:
        reservoir.checkpoint(checkpoint, len(batches))
        context.processes.wait()
        for part in checkpoints[1:] if context.processes.first else ():
            theirs = empty()
            theirs.restore(part)
            reservoir.merge(theirs)
    return reservoir


def check_memory(context: Context, settings: LpcamSettings, shape: Sequence[int]) -> None:
    """Refuse a sample that would not fit into memory when it is full.

    Args:
        shape: numbers of classes and channels.

    Raises:
        RecipeError: with the memory that is needed and available.
    """
    if (bound := settings.max_features) is not None:
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
