"""Labels that networks learn from, made of maps: tasks of hosts and refinements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lpcam.data.dataset import Item
from lpcam.data.images import limit_long_side, read_image
from lpcam.data.map_files import map_path, read_maps
from lpcam.data.masks import write_mask
from lpcam.data.resize import resize
from lpcam.pipeline.cache import StageCache, Task
from lpcam.pipeline.context import Context
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
    parts: Mapping[str, Any],
    path: Callable[[Path, str], Path],
    labeller: Callable[[], Callable[[Picture, Path], None]],
    items: Sequence[Item],
) -> Task:
    """A task that writes a file of labels for every image from its maps.

    Args:
        name: name of the result.
        label: shown with the progress.
        maps: folder of the maps.
        key: key of the result that holds them.
        parts: what else the labels depend on, as JSON.
        path: gives the file of an image's id in a folder.
        labeller: makes a function that writes the labels of a picture to a file.
        items: images to label.
    """
    parts = {
        "revision": 1,
        "maps": key,
        **parts,
        "maximum_side": context.recipe.maps.maximum_side,
        "images": context.digest(items),
    }

    def work(cache: StageCache) -> None:
        write = labeller()

        @torch.inference_mode()
        def make(item: Item) -> None:
            file = path(cache.folder, item.id)
            if not file.is_file():
                write(picture(context, item, maps), file)

        context.each(label, items, make)

    outputs = [path(context.folder / name, item.id) for item in items]
    return Task([context.result(name, parts, outputs)], work)


def ternary_task(
    context: Context,
    name: str,
    label: str,
    maps: Path,
    key: str,
    thresholds: tuple[float, float],
    settings: CrfSettings,
    items: Sequence[Item],
) -> Task:
    """A task that writes ternary masks of one kind of maps, as :func:`label_task` does.

    Args:
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

    return label_task(context, name, label, maps, key, parts, mask_path, labeller, items)
