"""Seed masks from the maps of one method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lpcam.data.items import Item
from lpcam.ledger import Stage
from lpcam.masks import seeds, to_mask, write_mask
from lpcam.progress import progress
from lpcam.stages.context import Run
from lpcam.storage import map_path, read_maps


def write_seeds(run: Run) -> bool:
    """Threshold the maps of the recipe's method; whether there was anything to do."""
    section = run.recipe.seeds
    return write_masks_of_maps(
        run,
        "seeds",
        "seeds",
        run.stages_of_methods[section.method],
        run.recipe.fixed_threshold(section.method),
        run.items("maps"),
        section.ignore_threshold,
    )


def write_masks_of_maps(
    run: Run,
    name: str,
    title: str,
    source: Stage,
    threshold: float,
    items: Sequence[Item],
    ignore_threshold: float | None = None,
) -> bool:
    """Masks of one kind of maps, as the stage ``name``; whether any were to be made."""
    stage = run.stages[name] = Stage(
        run.folder / name,
        {
            "revision": 1,
            "maps": source.key,
            "threshold": threshold,
            "ignore_threshold": ignore_threshold,
            "mask_ids": list(run.dataset.classes.mask_ids),
            "images": [item.id for item in items],
        },
    )
    paths = {item.id: stage.folder / f"{item.id}.png" for item in items}
    if stage.done(paths.values()):
        return False
    run.begin(stage)

    def make(item: Item) -> None:
        if paths[item.id].is_file():
            return
        maps = read_maps(map_path(source.folder, item.id))
        planes = torch.from_numpy(maps.high_res)
        mask = to_mask(
            seeds(planes, threshold),
            maps.keys,
            run.dataset.classes,
            maps=planes if ignore_threshold is not None else None,
            ignore_threshold=ignore_threshold,
        )
        write_mask(paths[item.id], mask)

    mine = run.sharing.mine(items)
    with progress(title, len(mine)) as advance:
        for _ in run.sharing.map(make, mine):
            advance(1, "")
    run.finish(stage)
    return True


def seed_path(run: Run, item: Item) -> Path:
    """Where the seed mask of an image is."""
    return run.folder / "seeds" / f"{item.id}.png"
