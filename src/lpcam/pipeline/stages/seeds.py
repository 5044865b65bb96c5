"""Seed masks from the maps of one method."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lpcam.data.dataset import Item
from lpcam.data.map_files import map_path, read_maps
from lpcam.data.masks import write_mask
from lpcam.method.seeds import seeds, to_mask
from lpcam.pipeline.cache import Result, Task
from lpcam.pipeline.context import Context
from lpcam.pipeline.run_folder import RESULTS, mask_path


def write_seeds(context: Context) -> Iterator[Task]:
    """Threshold the maps of the recipe's method."""
    section = context.recipe.seeds
    source = context.results[RESULTS[context.recipe.seed_method]]
    threshold = context.own_threshold(context.recipe.seed_method)
    yield mask_task(context, "seeds", "seeds", source, threshold, section.ignore_threshold)


def mask_task(
    context: Context,
    name: str,
    label: str,
    source: Result,
    threshold: float,
    ignore_threshold: float | None = None,
) -> Task:
    """A task that cuts masks from the maps of a result; between the thresholds they are 255."""
    items, classes = context.items("maps"), context.dataset.classes
    parts = {
        "revision": 1,
        "maps": source.key_of(()),
        "threshold": threshold,
        "ignore_threshold": ignore_threshold,
        "mask_ids": list(classes.mask_ids),
        "images": [item.id for item in items],
    }

    def start(result: Result) -> Callable[[Item], None]:
        def make(item: Item) -> None:
            maps = read_maps(map_path(source.folder, item.id))
            planes = torch.from_numpy(maps.high_res)
            found, own = seeds(planes, threshold), {"ignore_threshold": ignore_threshold}
            mask = to_mask(found, maps.keys, classes, maps=planes, **own)
            write_mask(mask_path(result.folder, item.id), mask)

        return make

    return context.image_task({name: parts}, label, items, [mask_path], start, source)
