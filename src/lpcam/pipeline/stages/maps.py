"""CAM, LPCAM-F and LPCAM maps of every image of a list."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from lpcam.classifiers.features import FeaturePair
from lpcam.data.dataset import Item
from lpcam.data.map_files import MapFile, map_path, write_maps
from lpcam.data.resize import quarter_size, resize, scaled_size
from lpcam.method.functional import FusedMaps
from lpcam.method.multi_scale import cam_maps, lpcam_maps
from lpcam.pipeline.cache import Record, Result, Task
from lpcam.pipeline.context import Context
from lpcam.pipeline.stages.judge import judge_all, judged
from lpcam.pipeline.stages.prototypes import load_prototypes
from lpcam.runtime.files import digest_bytes, tensor_bytes
from lpcam.runtime.progress import progress

LARGEST_TAU = 0.25
"""Largest automatic tau: above it LPCAM loses (docs/adaptive.md)."""
MapsOf = Callable[[Item, Sequence[FeaturePair], tuple[int, int]], Sequence[FusedMaps]]
"""Maps of an image for each result, from its features and the size at which it is mapped."""


def map_cam(context: Context) -> Iterator[Task]:
    """CAM (eq. 1)."""
    settings, wanted = context.lpcam, context.items("maps")
    if settings.split_maps == "multi_scale":
        wanted = [*wanted, *context.items("prototypes")]
    items = list({item.id: item for item in wanted}.values())

    def maps_of(item: Item, pairs: Sequence[FeaturePair], size: tuple[int, int]) -> list[FusedMaps]:
        weight = context.classifier.weight[list(item.labels)]
        return [cam_maps(pairs, weight, size, epsilon=settings.cam_epsilon)]

    own = {"cam": {"cam_epsilon": settings.cam_epsilon}}
    yield _map_task(context, "CAM", items, own, lambda: maps_of)
    yield from judged(context, "CAM", context.results["cam"])
    if "tau" in settings.automatic:
        tau = min(context.own_threshold("CAM"), LARGEST_TAU)
        context.lpcam = context.lpcam.fixed(tau=tau)
        reason = f"the judge's threshold of CAM, at most {LARGEST_TAU:g}"
        context.chose("lpcam.tau", f"{tau:.2f}", reason)


def map_lpcam(context: Context) -> Iterator[Task]:
    """LPCAM and LPCAM-F (eqs. 5 and 6)."""
    names = context.dataset.classes.names
    found = load_prototypes(context)
    similarity = context.lpcam.similarity
    both = [found.vectors(with_context=one, similarity=similarity) for one in (True, False)]

    def start() -> MapsOf:
        rows = torch.stack(both).to(context.classifier.weight)

        def maps_of(
            item: Item, pairs: Sequence[FeaturePair], size: tuple[int, int]
        ) -> list[FusedMaps]:
            # One convolution serves both methods: their rows are stacked.
            own = rows[:, list(item.labels)].flatten(0, 1)
            stacked = lpcam_maps(pairs, own, size, similarity)
            halves = stacked.cam.chunk(2), stacked.high_res.chunk(2)
            return [FusedMaps(cam, high_res) for cam, high_res in zip(*halves, strict=True)]

        return maps_of

    other = {} if similarity == "cosine" else {"similarity": similarity}
    own = {"lpcam": {"context": True, **other}, "lpcam_f": {"context": False, **other}}
    items = context.items("maps")
    task = _map_task(context, "LPCAM", items, own, start)
    for result, vectors in zip(task.results, both, strict=True):
        digests = [digest_bytes(tensor_bytes(row)) for row in vectors]
        result.by_class = dict(zip(names, digests, strict=True))
        result.labels = context.labels(result.name, items, [map_path])
    yield task
    if context.lpcam.early is None:  # else LPCAM-E says more
        yield from judge_all(context)


def _map_task(
    context: Context,
    label: str,
    items: Sequence[Item],
    own: Mapping[str, Record],
    start: Callable[[], MapsOf],
) -> Task:
    """A task for the maps of several results, each with ``own`` parts, from one feature pyramid."""
    settings, section = context.lpcam, context.recipe.maps
    parts = {
        "revision": 3,
        "classifier": context.results["classifier"].output["digest"],
        "scales": list(settings.scales),
        "flip": settings.flip,
        "maps": {**section.model_dump(mode="json"), **context.features_key},
        "images": context.digest(items),
    }

    def work(*results: Result) -> None:
        maps_of, store = start(), context.store(context.classifier)

        def missing(item: Item) -> bool:
            return not all(map_path(one.folder, item.id).is_file() for one in results)

        @torch.inference_mode()
        def make(batch: list[Item]) -> None:
            # An image without a label has no map, and needs no features.
            labelled = any(item.labels for item in batch)
            pairs = list(store.pairs(batch, settings.scales)) if labelled else []
            for row, item in enumerate(batch):
                if not missing(item):
                    continue
                maps: Sequence[FusedMaps | None] = [None] * len(results)
                if item.labels:
                    mine = [of_image(pair, row, mirrored=settings.flip) for pair in pairs]
                    size = context.sharing.sizes[item.id]
                    if max(size) > section.maximum_side:
                        size = scaled_size(*size, section.maximum_side / max(size))
                    maps = maps_of(item, mine, size)
                for result, one in zip(results, maps, strict=True):
                    if not map_path(result.folder, item.id).is_file():
                        write_fused(context, result, item, one)

        # Batches are formed before it is known what is missing, so a resumed run has the same.
        batches = context.sharing.batches(context.sharing.mine(items))
        todo = [batch for batch in batches if any(missing(item) for item in batch)]
        total, left = (sum(map(len, some)) for some in (batches, todo))
        with progress(label, total, done=total - left) as advance:
            for batch, _ in zip(todo, context.sharing.map(make, todo), strict=True):
                advance(len(batch), "")

    def result(name: str) -> Result:
        folder = context.folder / name
        return Result(name, folder, parts | own[name], [map_path(folder, i.id) for i in items])

    return Task([result(name) for name in own], work)


def write_fused(context: Context, result: Result, item: Item, maps: FusedMaps | None) -> None:
    """Write maps of an image, enlarged (bilinear) to its size; without a label it has none."""
    size, names = context.sharing.sizes[item.id], context.dataset.classes.names
    if maps is None:
        maps = FusedMaps(torch.zeros(0, *quarter_size(size)), torch.zeros(0, *size))
    elif tuple(maps.high_res.shape[-2:]) != size:
        maps = FusedMaps(resize(maps.cam, quarter_size(size)), resize(maps.high_res, size))
    write_maps(
        map_path(result.folder, item.id),
        MapFile(
            np.array(item.labels, dtype=np.int64),
            maps.cam.float().cpu().numpy(),
            maps.high_res.float().cpu().numpy(),
            {"stage": result.key_of(names[index] for index in item.labels)},
        ),
        dtype=context.recipe.maps.dtype,
    )


def of_image(pair: FeaturePair, row: int, *, mirrored: bool) -> FeaturePair:
    """One image's features of a batch, with mirrored ones only where the maps use them."""
    other = pair.mirrored if mirrored else None
    return FeaturePair(pair.features[row], None if other is None else other[row])
