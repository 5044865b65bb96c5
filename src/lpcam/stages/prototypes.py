"""Local features of the images of a list, and the prototypes of each class made of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpcam.data.items import Item
from lpcam.errors import RecipeError
from lpcam.ledger import Stage
from lpcam.presets import LpcamSettings
from lpcam.progress import progress
from lpcam.stages.context import FEATURE_KEYS, Run, remove_leftovers
from lpcam.storage import digest_file, map_path, read_maps
from lpcam.version import versions

CHECKPOINT_SECONDS = 60.0
"""Between checkpoints of the reservoir of local features, at least."""
CHECKPOINT_SHARE = 10
"""And at least so many times what the last one took: it may hold all features of a list."""


def cluster(run: Run) -> bool:
    """Collect, cluster, score and select (equations 2-4); whether there was anything to do."""
    items = run.items("prototypes")
    settings = run.recipe.lpcam
    multi_scale = settings.split_maps == "multi_scale"
    run.stages["prototypes"] = Stage(
        run.folder / "prototypes",
        {
            "revision": 3,
            "classifier": run.stages["classify"].output["digest"],
            "settings": settings.model_dump(
                mode="json", exclude={"preset", "scales", "flip", "threshold", "cam_threshold"}
            ),
            "split_maps": run.stages["cam"].key if multi_scale else None,
            "maps": run.recipe.maps.model_dump(include=set(FEATURE_KEYS)),
            "seed": run.recipe.run.seed,
            "images": run.digest(items),
        },
    )
    path = run.prototypes_path
    folder = run.stages["prototypes"].folder
    if run.stages["prototypes"].done([path]):
        if run.processes.first:
            remove_leftovers(folder)
        return False
    from lpcam.prototypes import make_prototypes  # noqa: PLC0415

    run.begin(run.stages["prototypes"])
    check_memory(run, settings, run.classifier.weight.shape)
    local = partial(_local, run)
    reservoir, images = gather(run, items, folder, settings, local, "local features")
    output: dict[str, Any] = {}
    if run.processes.first:
        prototypes = make_prototypes(
            reservoir,
            run.classifier.weight,
            run.dataset.classes.names,
            settings,
            seed=run.recipe.run.seed,
            fingerprint=run.stages["classify"].output["fingerprint"],
            made_by={"stage": run.stages["prototypes"].key, "versions": versions()},
            workers=run.sharing.workers,
        )
        prototypes.save(path)
        output = {
            "digest": digest_file(path),
            "events": list(prototypes.events),
            "images": images,
        }
    run.finish(run.stages["prototypes"], **output)
    if run.processes.first:
        remove_leftovers(folder)  # last: a stop before the end goes on from them
    return True


Local = Callable[[list[Item]], Sequence[tuple[Tensor, Tensor]]]
"""Of a batch of images the features (C, h, w) of each, and the maps (K, H, W) that split them."""


def gather(
    run: Run, items: Sequence[Item], folder: Path, settings: LpcamSettings, local: Local, label: str
) -> tuple[Any, int]:
    """The sample of all processes' local features (in the first), and of how many images."""
    from lpcam.extract import collect  # noqa: PLC0415
    from lpcam.prototypes import draw_images  # noqa: PLC0415

    drawn = draw_images(
        [(item.id, item.labels) for item in items],
        len(run.dataset.classes),
        settings,
        seed=run.recipe.run.seed,
    )
    used = [item for item in items if item.id in drawn]
    batches = run.sharing.batches(run.sharing.mine(used))
    count = run.processes.count
    parts = [
        # A checkpoint counts batches, so it is of use to the same sharing alone.
        folder / f"reservoir-{rank}-of-{count}-by-{run.sharing.batch}.safetensors"
        for rank in range(count)
    ]
    checkpoint = parts[run.processes.rank]
    reservoir = _new_reservoir(run, settings)
    done = reservoir.restore(checkpoint) if checkpoint.is_file() else 0
    next_save = time.monotonic() + CHECKPOINT_SECONDS
    todo = batches[done:]
    total = sum(len(batch) for batch in batches)
    left = sum(len(batch) for batch in todo)
    with progress(label, total, done=total - left) as advance:
        for batch, found in zip(todo, run.sharing.map(local, todo), strict=True):
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
                _check_memory(run, "the sample of all features has reached", reservoir.nbytes)
            if (started := time.monotonic()) > next_save:
                reservoir.checkpoint(checkpoint, done)
                took = time.monotonic() - started
                pause = max(CHECKPOINT_SECONDS, CHECKPOINT_SHARE * took)
                next_save = time.monotonic() + pause
    if count > 1:
        reservoir.checkpoint(checkpoint, len(batches))
        run.processes.wait()
        if run.processes.first:
            for part in parts[1:]:
                theirs = _new_reservoir(run, settings)
                theirs.restore(part)
                reservoir.merge(theirs)
    return reservoir, len(used)


def _new_reservoir(run: Run, settings: LpcamSettings) -> Any:
    from lpcam.features import DTYPES  # noqa: PLC0415
    from lpcam.prototypes import Reservoir  # noqa: PLC0415

    dtype = DTYPES[run.recipe.maps.features]
    return Reservoir(settings.max_features, run.recipe.run.seed, dtype=dtype)


def check_memory(run: Run, settings: LpcamSettings, shape: Sequence[int]) -> None:
    """Refuse a sample that could not be held in memory when it is full.

    Args:
        shape: classes and channels.
    """
    from lpcam.features import DTYPES  # noqa: PLC0415
    from lpcam.prototypes import SIDES  # noqa: PLC0415

    bound = settings.max_features
    if bound is None:
        return
    classes, channels = shape
    # Twice the bound: a reservoir is cut back when it holds so many.
    rows = 2 * bound * len(SIDES) * classes
    needed = rows * channels * DTYPES[run.recipe.maps.features].itemsize
    _check_memory(run, f"lpcam.max_features {bound} of {classes} classes needs", needed)


def _check_memory(run: Run, what: str, needed: int) -> None:
    allowed = run.sample_memory
    if needed > allowed:
        raise RecipeError(
            f"{what} {needed / 2**30:.3g} GiB, but {allowed / 2**30:.3g} GiB are for it; lower "
            "lpcam.max_features, or raise run.memory (--memory) if the machine has more"
        )


@torch.inference_mode()
def _local(run: Run, batch: list[Item]) -> list[tuple[Tensor, Tensor]]:
    """Features (C, h, w) at scale 1 and the CAM that splits them, of each image of a batch."""
    from lpcam.extract import single_scale_cam  # noqa: PLC0415

    settings = run.recipe.lpcam
    (pair,) = run.store(run.classifier).pairs(batch, (1.0,))
    found = []
    for item, features in zip(batch, pair.features, strict=True):
        if settings.split_maps == "multi_scale":
            maps = read_maps(map_path(run.stages["cam"].folder, item.id))
            split_map = torch.from_numpy(maps.high_res)
        else:
            weight = run.classifier.weight[list(item.labels)]
            split_map = single_scale_cam(features, weight, epsilon=settings.cam_epsilon)
        found.append((features, split_map))
    return found
