"""Labels that networks learn from, made of maps: tasks of hosts and refinements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lpcam.data.dataset import Item
from lpcam.data.images import limit_long_side, read_image
from lpcam.data.map_files import map_path, read_maps
from lpcam.data.masks import write_mask
from lpcam.data.resize import resize
from lpcam.pipeline.cache import Record, Result, Task
from lpcam.pipeline.context import Context, FileOf
from lpcam.pipeline.run_folder import mask_path
from lpcam.refine.base import Picture
from lpcam.refine.crf import CrfSettings, DenseCrf
from lpcam.refine.ternary import ternary_mask
from lpcam.runtime.resources import memory_of_an_image


def picture(context: Context, item: Item, maps: Path) -> Picture:
    """An image and its maps at the size of refinement, on the run's device.

    That is the image's own size, or that at which it was mapped where ``maps.maximum_side`` is
    smaller: a dense CRF of an image of 4,000 pixels a side would take 7 GB.
    """
    found = read_maps(map_path(maps, item.id))
    image = limit_long_side(read_image(item.image), context.recipe.maps.maximum_side)
    planes = resize(torch.from_numpy(found.high_res), image.shape[:2])
    device = context.device
    return Picture(item, found, torch.from_numpy(image).to(device), planes.to(device))


def image_memory(context: Context) -> int | None:
    """Memory that the CRF of one image may use, in bytes: its thread's part."""
    return memory_of_an_image(context.device, context.sharing.workers * context.processes.here)


def label_task(
    context: Context,
    name: str,
    label: str,
    maps: Path,
    key: str,
    parts: Record,
    path: FileOf,
    labeller: Callable[[], Callable[[Picture, Path], None]],
    items: Sequence[Item],
) -> Task:
    """A task that writes a file of labels for every image from its maps.

    Args:
        maps: folder of the maps.
        key: key of the result that holds them.
        parts: what else the labels depend on.
        path: gives the file of an image's id in a folder.
        labeller: makes a function that writes the labels of a picture to a file.
        items: images to label.
    """

    def start(result: Result) -> Callable[[Item], None]:
        write = labeller()
        return lambda item: write(picture(context, item, maps), path(result.folder, item.id))

    maximum_side = context.recipe.maps.maximum_side
    parts = {"revision": 1, "maps": key, **parts, "maximum_side": maximum_side}
    return context.image_task(name, label, parts, items, [path], start)


def ternary_task(
    context: Context,
    name: str,
    label: str,
    source: Result,
    thresholds: tuple[float, float],
    settings: CrfSettings,
    items: Sequence[Item],
) -> Task:
    """A task that writes ternary masks of one kind of maps, as :func:`label_task` does.

    Args:
        source: the result that holds the maps.
        thresholds: thresholds of the sure foreground and of the sure background.
        settings: settings of the dense CRF.
    """
    classes = context.dataset.classes
    parts = {
        "thresholds": list(thresholds),
        "crf": settings.model_dump(mode="json", exclude={"preset"}),
        "mask_ids": list(classes.mask_ids),
    }

    def labeller() -> Callable[[Picture, Path], None]:
        crf = DenseCrf(settings, memory=image_memory(context))
        return lambda found, path: write_mask(path, ternary_mask(crf, found, thresholds, classes))

    where = source.folder, source.key
    return label_task(context, name, label, *where, parts, mask_path, labeller, items)
