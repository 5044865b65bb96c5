"""Seed masks from the maps of one method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lpcam.data.dataset import Item
from lpcam.data.map_files import map_path, read_maps
from lpcam.data.masks import write_mask
from lpcam.method.seeds import seeds, to_mask
from lpcam.pipeline.cache import StageCache, Task
from lpcam.pipeline.context import Context
from lpcam.pipeline.run_folder import mask_path

RESULTS = {"CAM": "cam", "LPCAM-F": "lpcam_f", "LPCAM": "lpcam"}
"""Name of the result that holds the maps of each method."""


def write_seeds(context: Context) -> Iterator[Task]:
    """Threshold the maps of the recipe's method."""
    section = context.recipe.seeds
    yield mask_task(
        context,
        "seeds",
        "seeds",
        context.results[RESULTS[section.method]],
        context.recipe.fixed_threshold(section.method),
        context.items("maps"),
        section.ignore_threshold,
    )


def mask_task(
    context: Context,
    name: str,
    label: str,
    source: StageCache,
    threshold: float,
    items: Sequence[Item],
    ignore_threshold: float | None = None,
) -> Task:
    """A task that cuts masks from the maps of a result.

    Args:
        context: context of the run.
        name: name of the new result.
        label: shown with the progress.
        source: the result that holds the maps.
        threshold: foreground is above it.
        items: images to cut.
        ignore_threshold: pixels between it and ``threshold`` become 255; None: none do.
    """
    parts = {
        "revision": 1,
        "maps": source.key,
        "threshold": threshold,
        "ignore_threshold": ignore_threshold,
        "mask_ids": list(context.dataset.classes.mask_ids),
        "images": [item.id for item in items],
    }

    def work(cache: StageCache) -> None:
        def make(item: Item) -> None:
            path = mask_path(cache.folder, item.id)
            if path.is_file():
                return
            maps = read_maps(map_path(source.folder, item.id))
            planes = torch.from_numpy(maps.high_res)
            mask = to_mask(
                seeds(planes, threshold),
                maps.keys,
                context.dataset.classes,
                maps=planes if ignore_threshold is not None else None,
                ignore_threshold=ignore_threshold,
            )
            write_mask(path, mask)

        context.each(label, items, make)

    paths = [mask_path(context.folder / name, item.id) for item in items]
    return Task([context.result(name, parts, paths)], work)
