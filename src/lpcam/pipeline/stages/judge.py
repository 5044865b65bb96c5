"""What the judge says of a run's maps: thresholds without truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpcam.data.dataset import Item
from lpcam.data.map_files import map_path, read_maps
from lpcam.evaluation.judge import AGREEMENT, THRESHOLDS, colour_bins, curves, step_of, verdict
from lpcam.evaluation.segmentation import DEFAULT_THRESHOLDS, ThresholdSweep, best_threshold
from lpcam.method.seeds import seeds
from lpcam.method.settings import METHODS
from lpcam.pipeline.cache import Output, Record, Result, Task
from lpcam.pipeline.context import Context
from lpcam.pipeline.run_folder import RESULTS

IMAGES = 200  #: Images that are judged.


def judged(context: Context, method: str, result: Result) -> Iterator[Task]:
    """A task that judges the maps of a method, where the recipe leaves their threshold to it.

    Once there is LPCAM-E, its masks take the place of the truth: the judge prefers them.
    """
    if not context.recipe.chooses_threshold(method):
        return
    items, preferred = sampled(context, IMAGES), context.results.get(RESULTS["LPCAM-E"])
    parts = {
        "revision": 1,
        "maps": result.key,
        "classifier": classifier_key(context),
        "images": context.digest(items),
    }
    name = f"judge/{result.name}"
    if preferred is not None:
        name, threshold = f"agreement/{result.name}", context.own_threshold("LPCAM-E")
        parts = {k: parts[k] for k in ("revision", "maps", "images")}
        parts |= {"preferred": preferred.key, "threshold": threshold}

    def work(_: Result) -> Output:
        if preferred is not None:
            return _agreement(context, items, preferred, threshold, result)
        found = curves_of(context, items, lambda item: (item.read(), [_maps(result, item, 1)[0]]))
        return verdict(found[:, 0]).as_json()

    task = context.task(name, parts, [], work)
    yield task
    context.judge(method, task.results[0].output)


def classifier_key(context: Context) -> Record | None:
    """Everything that features of early layers depend on, as JSON; None without a classifier."""
    classifier = context.results.get("classifier")
    features = context.features_key
    return None if classifier is None else {**features, "digest": classifier.output["digest"]}


def curves_of(
    context: Context,
    items: Sequence[Item],
    maps_of: Callable[[Item], tuple[NDArray[np.uint8], Sequence[Tensor]]],
    count: int = 1,
) -> Tensor:
    """What the judges say of M maps of each image (``curves``), float64 (images, M, 2, T).

    ``maps_of`` gives an image (H, W, 3) and its M = ``count`` maps (K, H, W). Every process has all
    results.
    """
    store = context.store(context.classifier) if context.early_layers else None

    @torch.inference_mode()
    def judge(place: int) -> tuple[int, Tensor]:
        image, every = maps_of(items[place])
        step, colours = coloured(image)
        early = None if store is None else store.early([items[place]])[0].features[0]
        parts = [maps.cpu()[:, ::step, ::step] for maps in every]
        return place, torch.stack([curves(colours, maps, early) for maps in parts])

    mine = {item.id for item in context.sharing.mine(items)}
    places = [place for place, item in enumerate(items) if item.id in mine]
    found = dict(context.sharing.map(judge, places))
    nothing = torch.zeros(count, 2, len(THRESHOLDS), dtype=torch.float64)
    whole = torch.stack([found.get(place, nothing) for place in range(len(items))])
    return context.processes.sum(whole)


def judge_all(context: Context) -> Iterator[Task]:
    """Tasks that judge the maps of the run's own classifier but for LPCAM-E."""
    for method in METHODS[:-1]:
        if context.lpcam.early is not None or method not in context.verdicts:
            yield from judged(context, method, context.results[RESULTS[method]])


def _agreement(
    context: Context, items: Sequence[Item], preferred: Result, threshold: float, result: Result
) -> Output:
    """The threshold at which masks of maps agree best with those of the preferred maps (mIoU)."""
    names = context.dataset.classes.names
    grid = sorted({*DEFAULT_THRESHOLDS, *THRESHOLDS})

    def count(item: Item) -> Tensor:
        step = step_of(context.sharing.sizes[item.id])
        (best, keys), (maps, own) = (_maps(one, item, step) for one in (preferred, result))
        mask = torch.cat([torch.zeros(1, dtype=torch.int64), keys + 1])[seeds(best, threshold)]
        sweep = ThresholdSweep(len(names), grid)
        sweep.update(mask, maps, own)
        return sweep.histogram

    whole = ThresholdSweep(len(names), grid)
    for one in context.sharing.map(count, context.sharing.mine(items)):
        whole.histogram += one
    whole.histogram = context.processes.sum(whole.histogram)
    chosen, found = best_threshold(whole, names)
    curve = whole.curves(names)["miou"]
    return {
        "threshold": chosen,
        "agreement": found.miou,
        "curve": [curve[grid.index(one)] / found.miou for one in THRESHOLDS],
        "rule": AGREEMENT,
        "disagree": False,
        "images": len(items),
    }


def _maps(result: Result, item: Item, step: int) -> tuple[Tensor, Tensor]:
    """The maps (K, h, w) of an image at every so many pixels, and the indices (K,) of classes."""
    found = read_maps(map_path(result.folder, item.id))
    maps = np.ascontiguousarray(found.high_res[:, ::step, ::step])
    return torch.from_numpy(maps), torch.from_numpy(found.keys)


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


def coloured(image: NDArray[np.uint8]) -> tuple[int, Tensor]:
    """Every how many pixels an image (H, W, 3) is looked at, and their colour bins."""
    step = step_of((image.shape[0], image.shape[1]))
    return step, colour_bins(image[::step, ::step])
