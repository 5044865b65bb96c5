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
from lpcam.method.prototypes import Prototypes
from lpcam.pipeline.cache import Parts, Record, StageCache, Task
from lpcam.pipeline.context import Context
from lpcam.runtime.progress import progress

Size = tuple[int, int]
MapsOf = Callable[[Item, Sequence[FeaturePair], Size], Mapping[str, FusedMaps]]


def map_cam(context: Context) -> Iterator[Task]:
    """CAM (eq. 1)."""
    settings, wanted = context.recipe.lpcam, context.items("maps")
    if settings.split_maps == "multi_scale":
        wanted = [*wanted, *context.items("prototypes")]
    items = list({item.id: item for item in wanted}.values())

    def maps_of(item: Item, pairs: Sequence[FeaturePair], size: Size) -> dict[str, FusedMaps]:
        weight = context.classifier.weight[list(item.labels)]
        return {"cam": cam_maps(pairs, weight, size, epsilon=settings.cam_epsilon)}

    parts = {**_map_parts(context, items), "cam_epsilon": settings.cam_epsilon}
    yield _map_task(context, "CAM", items, {"cam": parts}, maps_of)


def map_lpcam(context: Context) -> Iterator[Task]:
    """LPCAM and LPCAM-F (eqs. 5 and 6)."""
    items = context.items("maps")
    made = {"prototypes": context.results["prototypes"].output["digest"]}
    parts = {**_map_parts(context, items), **made}
    rows: list[torch.Tensor] = []

    def load() -> None:
        fingerprint = context.results["classifier"].output["fingerprint"]
        found = Prototypes.load(context.folder.prototypes(), fingerprint=fingerprint)
        both = [found.vectors(with_context=True), found.vectors(with_context=False)]
        rows.append(torch.stack(both).to(context.classifier.weight))

    def maps_of(item: Item, pairs: Sequence[FeaturePair], size: Size) -> dict[str, FusedMaps]:
        # One convolution serves both methods: their rows are stacked.
        count = len(item.labels)
        both = lpcam_maps(pairs, rows[0][:, list(item.labels)].flatten(0, 1), size)
        return {
            "lpcam": FusedMaps(both.cam[:count], both.high_res[:count]),
            "lpcam_f": FusedMaps(both.cam[count:], both.high_res[count:]),
        }

    keys = {"lpcam": {**parts, "context": True}, "lpcam_f": {**parts, "context": False}}
    yield _map_task(context, "LPCAM", items, keys, maps_of, load)


def _map_parts(context: Context, items: Sequence[Item]) -> Record:
    settings = context.recipe.lpcam
    return {
        "revision": 2,
        "classifier": context.results["classifier"].output["digest"],
        "scales": list(settings.scales),
        "flip": settings.flip,
        "maps": context.recipe.maps.model_dump(mode="json"),
        "images": context.digest(items),
    }


def _map_task(
    context: Context,
    label: str,
    items: Sequence[Item],
    parts: Mapping[str, Parts],
    maps_of: MapsOf,
    load: Callable[[], None] = lambda: None,
) -> Task:
    """A task for the maps of several results, from one feature pyramid per image."""
    folder = context.folder
    results = [
        context.result(name, key, [map_path(folder / name, item.id) for item in items])
        for name, key in parts.items()
    ]

    def work(*caches: StageCache) -> None:
        load()
        _map_images(context, label, items, dict(zip(parts, caches, strict=True)), maps_of)

    return Task(results, work)


def _map_images(
    context: Context,
    label: str,
    items: Sequence[Item],
    caches: Mapping[str, StageCache],
    maps_of: MapsOf,
) -> None:
    """Maps of every image that has none yet."""
    store = context.store(context.classifier)
    scales = context.recipe.lpcam.scales

    def missing(item: Item) -> bool:
        paths = [map_path(cache.folder, item.id) for cache in caches.values()]
        return not all(path.is_file() for path in paths)

    @torch.inference_mode()
    def make(batch: list[Item]) -> None:
        # An image without a label has no map, and needs no features.
        pairs = list(store.pairs(batch, scales)) if any(item.labels for item in batch) else []
        for row, item in enumerate(batch):
            if not missing(item):
                continue
            size = context.sharing.sizes[item.id]
            own = [_of_image(context, pair, row) for pair in pairs]
            maps = maps_of(item, own, _mapped_size(context, size)) if item.labels else {}
            for name, cache in caches.items():
                write_fused(context, cache, item, maps[name] if maps else no_maps(size))

    mine = context.sharing.mine(items)
    # Batches are formed before it is known what is missing, so a resumed run has the same.
    todo = [b for b in context.sharing.batches(mine) if any(missing(item) for item in b)]
    left = sum(len(batch) for batch in todo)
    with progress(label, len(mine), done=len(mine) - left) as advance:
        for batch, _ in zip(todo, context.sharing.map(make, todo), strict=True):
            advance(len(batch), "")


def write_fused(context: Context, cache: StageCache, item: Item, maps: FusedMaps) -> None:
    """Write the maps of an image at its size, in the recipe's dtype."""
    fused = at_size(maps, context.sharing.sizes[item.id])
    write_maps(
        map_path(cache.folder, item.id),
        MapFile(
            np.array(item.labels, dtype=np.int64),
            fused.cam.float().cpu().numpy(),
            fused.high_res.float().cpu().numpy(),
            {"stage": cache.key},
        ),
        dtype=context.recipe.maps.dtype,
    )


def _of_image(context: Context, pair: FeaturePair, row: int) -> FeaturePair:
    """One image's features of a batch, with mirrored ones only where the maps use them."""
    mirrored = pair.mirrored if context.recipe.lpcam.flip else None
    return FeaturePair(pair.features[row], None if mirrored is None else mirrored[row])


def _mapped_size(context: Context, size: Size) -> Size:
    """Size at which an image is mapped: its own, or smaller by ``maps.maximum_side``."""
    limit = context.recipe.maps.maximum_side
    return size if max(size) <= limit else scaled_size(*size, limit / max(size))


def no_maps(size: Size) -> FusedMaps:
    """The maps of an image without a label."""
    return FusedMaps(torch.zeros(0, *quarter_size(size)), torch.zeros(0, *size))


def at_size(maps: FusedMaps, size: Size) -> FusedMaps:
    """Enlarge the maps of an image that was mapped at a smaller size (bilinear)."""
    if tuple(maps.high_res.shape[-2:]) == size:
        return maps
    return FusedMaps(resize(maps.cam, quarter_size(size)), resize(maps.high_res, size))
