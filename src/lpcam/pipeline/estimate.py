"""Estimate the time and disk space of a run by timing some images on this machine."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from lpcam.classifiers.classifier import build
from lpcam.classifiers.feature_store import FeatureStore
from lpcam.data.dataset import Dataset, Item
from lpcam.data.inspection import survey
from lpcam.data.map_files import MapFile, map_path, write_maps
from lpcam.data.masks import write_mask
from lpcam.data.open_dataset import open_dataset
from lpcam.data.resize import scaled_size
from lpcam.data.survey import Estimate, Survey
from lpcam.method.functional import FusedMaps
from lpcam.method.multi_scale import cam_maps, lpcam_maps
from lpcam.method.seeds import seeds, to_mask
from lpcam.pipeline.recipe import Recipe, load_recipe, parse_recipe
from lpcam.pipeline.stages.maps import of_image
from lpcam.runtime.parallel import ordered_map
from lpcam.runtime.resources import available_memory, choose_device

R = TypeVar("R")
TIMED_IMAGES = 12  #: Passed through the backbone, after one for each worker that is not counted.
TIMED_SECONDS = 10.0  #: After which no further image is timed.


def usual_recipe(backbone: str = "mobilenetv2_100", output_stride: int | None = 16) -> Recipe:
    """The recipe of ``lpcam init``, used for an estimate if the user has none."""
    classifier = {"backbone": backbone, "output_stride": output_stride, "weights": "random"}
    return parse_recipe(
        {
            "name": "check",
            "data": {"kind": "folder", "root": "."},
            "classifier": {**classifier, "method": "probe"},
            "lpcam": {"preset": "frozen"},
        },
        where="the recipe of an estimate",
    )


def inspect_dataset(
    path: Path,
    *,
    recipe: str | Path | None = None,
    estimated: bool = True,
    workers: int = 1,
    **reading: Any,
) -> Survey:
    """Inspect every file of a data set, opened with ``reading``, and estimate the cost of a run."""
    estimate = None
    if estimated:
        chosen = usual_recipe() if recipe is None else load_recipe(recipe)
        estimate = partial(estimate_run, recipe=chosen, workers=workers)
    opened = open_dataset(path, **reading)
    return survey(opened.dataset, truth=opened.true_masks, estimate=estimate, workers=workers)


def estimate_run(
    dataset: Dataset,
    sizes: Mapping[str, tuple[int, int]],
    recipe: Recipe,
    *,
    workers: int = 1,
    memory: int | None = None,
) -> Estimate:
    """Time some labelled images through what takes most of a run, and extrapolate.

    Timed are reading, the backbone's passes at all scales, the maps of CAM, LPCAM and LPCAM-F, and
    writing them and a seed, with random weights. Not counted: the start, the fit of the classifier,
    clustering, evaluation, report, refinement and segmentation. Where the features of a list are
    more than ``memory``, its passes are counted again for each stage.
    """
    section, scales, limit = recipe.classifier, recipe.lpcam.scales, recipe.maps.maximum_side
    device = choose_device(recipe.run.device)
    classifier = build(section.spec(), dataset.classes.names, weights="random").to(device)
    warm, store = (
        FeatureStore(
            classifier,
            flip=recipe.lpcam.flip,
            maximum_side=limit,
            dtype=recipe.maps.features,
            budget=available_memory(),
            keep=keep,
            precision=recipe.maps.precision,
        )
        for keep in ((), dataset.items)
    )

    def passed(items: Sequence[Item]) -> int:
        """Pixels that pass the backbone at scale 1."""
        labelled = [sizes[item.id] for item in items if item.labels]
        return sum(
            math.prod(s if max(s) <= limit else scaled_size(*s, limit / max(s))) for s in labelled
        )

    def mapped(items: Sequence[Item]) -> int:
        """Pixels of the maps of one method."""
        return sum(math.prod(sizes[item.id]) * len(item.labels) for item in items)

    chosen = _spread(dataset, sizes, TIMED_IMAGES + workers)
    lists = {name: dataset.select(name) for name in dataset.lists}
    seconds, disk = dict.fromkeys(lists, 0.0), dict.fromkeys(lists, 0)
    timed: list[Item] = []
    repeated: list[str] = []
    if chosen:
        _timed(lambda item: list(warm.pairs([item], scales)), chosen[:workers], workers)
        rest = chosen[workers:] or chosen
        timed, passing, _ = _timed(lambda item: list(store.pairs([item], scales)), rest, workers)
        with tempfile.TemporaryDirectory() as folder:
            places = {item.id: Path(folder, str(place)) for place, item in enumerate(timed)}

            @torch.inference_mode()
            def write(item: Item) -> int:
                """Make and write maps and seed of an image as a run does; bytes of the files."""
                found = store.pairs([item], scales)
                pairs = [of_image(pair, 0, mirrored=recipe.lpcam.flip) for pair in found]
                size, place = sizes[item.id], places[item.id]
                rows = classifier.weight[list(item.labels)]
                keys = np.array(item.labels, dtype=np.int64)
                # LPCAM and LPCAM-F are made together
                both = lpcam_maps(pairs, torch.cat([rows, rows]), size)
                lpcam, lpcam_f = map(FusedMaps, both.cam.chunk(2), both.high_res.chunk(2))
                cam = cam_maps(pairs, rows, size, epsilon=recipe.lpcam.cam_epsilon)
                for name, maps in (("cam", cam), ("lpcam", lpcam), ("lpcam_f", lpcam_f)):
                    low, high = (one.float().cpu().numpy() for one in (maps.cam, maps.high_res))
                    file = MapFile(keys, low, high)
                    write_maps(map_path(place, name), file, dtype=recipe.maps.dtype)
                seed = seeds(lpcam.high_res, recipe.lpcam.threshold)
                write_mask(place / "seed.png", to_mask(seed, keys, dataset.classes))
                return sum(path.stat().st_size for path in place.iterdir())

            of_maps, making, written = _timed(write, timed, workers)
        budget = available_memory() // 2 if memory is None else memory
        # classify passes scale 1 alone, CAM and LPCAM all scales
        stages = 2 + 1 / sum(scale**2 for scale in scales)
        for name, items in lists.items():
            passes, maps = passed(items) / passed(timed), mapped(items) / mapped(of_maps)
            if store.used * passes > budget:
                repeated.append(name)
            times = stages if name in repeated else 1
            seconds[name] = round(passing * passes * times + making * maps, 3)
            disk[name] = round(sum(written) * maps)
    return Estimate(
        backbone=section.backbone,
        scales=tuple(scales),
        flip=recipe.lpcam.flip,
        device=str(device),
        workers=workers,
        timed=len(timed),
        seconds=seconds,
        disk=disk,
        repeated=tuple(repeated),
    )


def _spread(dataset: Dataset, sizes: Mapping[str, tuple[int, int]], count: int) -> list[Item]:
    """Labelled images from the smallest to the largest, in an order that is not theirs."""
    labelled = [item for item in dataset.items.values() if item.labels]
    labelled.sort(key=lambda item: (math.prod(sizes[item.id]), item.id))
    places = np.linspace(0, len(labelled) - 1, min(len(labelled), count)).round().astype(int)
    # the first images serve as a warm-up, and the last ones may find no time
    return [labelled[place] for place in np.random.default_rng(0).permutation(places).tolist()]


def _timed(
    function: Callable[[Item], R], items: Sequence[Item], workers: int
) -> tuple[list[Item], float, list[R]]:
    """The items done within `TIMED_SECONDS`, at least one a worker; seconds; and the results."""
    started = time.perf_counter()
    begun: list[Item] = []

    def source() -> Iterator[Item]:
        for item in items:
            if len(begun) >= workers and time.perf_counter() - started > TIMED_SECONDS:
                return
            begun.append(item)
            yield item

    results = list(ordered_map(function, source(), workers))
    return begun, time.perf_counter() - started, results
