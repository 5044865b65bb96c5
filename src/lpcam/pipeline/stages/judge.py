"""What the judge says of a run's maps: thresholds without truth."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lpcam.data.dataset import Item
from lpcam.data.map_files import map_path, read_maps
from lpcam.evaluation.judge import RULE, colour_bins, curves, step_of, verdict
from lpcam.pipeline.cache import Output, Result, Task
from lpcam.pipeline.context import Context

IMAGES = 200  #: Images that are judged.


def judged(context: Context, method: str, result: Result) -> Iterator[Task]:
    """A task that judges the maps of a method, where the recipe leaves their threshold to it."""
    if method in context.verdicts or not context.recipe.chooses_threshold(method):
        return
    items = sampled(context, IMAGES)
    layers = list(context.early_layers)
    parts = {
        "revision": 1,
        "maps": result.key,
        "layers": layers,
        "features": context.recipe.maps.features_key() if layers else None,
        "images": context.digest(items),
    }

    def work(_: Result) -> Output:
        store = context.store(context.classifier) if layers else None

        @torch.inference_mode()
        def judge(place: int) -> tuple[int, Tensor]:
            step, colours = coloured(items[place])
            maps = read_maps(map_path(result.folder, items[place].id)).high_res[:, ::step, ::step]
            early = None if store is None else store.early([items[place]])[0].features[0]
            return place, curves(colours, torch.from_numpy(np.ascontiguousarray(maps)), early)

        mine = {item.id for item in context.sharing.mine(items)}
        found = torch.zeros(
            len(items), *curves(torch.zeros(1, 1).long(), torch.zeros(0), None).shape
        )
        places = [place for place, item in enumerate(items) if item.id in mine]
        for place, one in context.sharing.map(judge, places):
            found[place] = one
        return verdict(context.processes.sum(found.double())).as_json()

    task = context.task(f"judge/{result.name}", parts, [], work)
    yield task
    found = task.results[0].output
    context.verdicts[method] = found
    reason = f"colours say {found['by_colours']:.2f}"
    if found["by_features"] is not None:
        reason += f", features {found['by_features']:.2f}"
    context.chose(f"threshold of {method}", f"{found['threshold']:.2f}", reason)


def sampled(context: Context, count: int) -> list[Item]:
    """At most ``count`` labelled images of the list that is mapped, of each class as many."""
    items = [item for item in context.items("maps") if item.labels]
    if len(items) <= count:
        return items
    order = np.random.default_rng([context.recipe.run.seed, count]).permutation(len(items))
    share = -(-count // len({index for item in items for index in item.labels}))
    left = dict.fromkeys({index for item in items for index in item.labels}, share)
    chosen: list[int] = []
    for place in order.tolist():  # first those of classes that have too few
        if any(left[index] > 0 for index in items[place].labels) and len(chosen) < count:
            chosen.append(place)
            for index in items[place].labels:
                left[index] -= 1
    return [items[place] for place in sorted(chosen)]


def coloured(item: Item) -> tuple[int, Tensor]:
    """Every how many pixels an image is looked at, and their colour bins (H, W)."""
    image = item.read()
    step = step_of((image.shape[0], image.shape[1]))
    return step, colour_bins(image[::step, ::step])


def told(context: Context, method: str) -> str:
    """How a threshold was chosen, for protocols."""
    return RULE if method in context.verdicts else "fixed by the preset or the recipe"
