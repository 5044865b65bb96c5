"""CAM, LPCAM-F and LPCAM maps of every image of a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lpcam.data.images import scaled_size
from lpcam.data.items import Item
from lpcam.functional import FusedMaps
from lpcam.ledger import Stage
from lpcam.progress import progress
from lpcam.stages.context import Run
from lpcam.storage import MapFile, map_path, write_maps


def map_cam(run: Run) -> bool:
    """CAM of equation 1; whether there was anything to do."""
    wanted = run.items("maps")
    if run.recipe.lpcam.split_maps == "multi_scale":
        wanted = [*wanted, *run.items("prototypes")]
    items = list({item.id: item for item in wanted}.values())
    run.stages["cam"] = Stage(
        run.folder / "cam",
        {**_map_parts(run, items), "cam_epsilon": run.recipe.lpcam.cam_epsilon},
    )
    paths = [map_path(run.stages["cam"].folder, item.id) for item in items]
    if run.stages["cam"].done(paths):
        return False
    from lpcam.extract import cam_maps  # noqa: PLC0415

    run.begin(run.stages["cam"])

    def maps_of(item: Item, pairs: Any, size: tuple[int, int]) -> dict[str, FusedMaps]:
        weight = run.classifier.weight[list(item.labels)]
        epsilon = run.recipe.lpcam.cam_epsilon
        return {"cam": cam_maps(pairs, weight, size, epsilon=epsilon)}

    _map_images(run, "CAM", items, {"cam": run.stages["cam"]}, maps_of)
    run.finish(run.stages["cam"])
    return True


def map_lpcam(run: Run) -> bool:
    """LPCAM and LPCAM-F of equations 5-6; whether there was anything to do."""
    items = run.items("maps")
    parts = {
        **_map_parts(run, items),
        "prototypes": run.stages["prototypes"].output["digest"],
    }
    run.stages["lpcam"] = Stage(run.folder / "lpcam", {**parts, "context": True})
    run.stages["lpcam_f"] = Stage(run.folder / "lpcam_f", {**parts, "context": False})
    stages = {"lpcam": run.stages["lpcam"], "lpcam_f": run.stages["lpcam_f"]}
    done = [
        stage.done([map_path(stage.folder, item.id) for item in items]) for stage in stages.values()
    ]
    if all(done):
        return False
    from lpcam.extract import lpcam_maps  # noqa: PLC0415
    from lpcam.prototypes import Prototypes  # noqa: PLC0415

    run.begin(*stages.values())
    prototypes = Prototypes.load(
        run.prototypes_path, fingerprint=run.stages["classify"].output["fingerprint"]
    )
    vectors = torch.stack(
        [prototypes.vectors(with_context=True), prototypes.vectors(with_context=False)]
    ).to(run.classifier.weight)

    def maps_of(item: Item, pairs: Any, size: tuple[int, int]) -> dict[str, FusedMaps]:
        # One convolution serves both methods: their rows stand below each other.
        rows = vectors[:, list(item.labels)].flatten(0, 1)
        both = lpcam_maps(pairs, rows, size)
        count = len(item.labels)
        return {
            "lpcam": FusedMaps(both.cam[:count], both.high_res[:count]),
            "lpcam_f": FusedMaps(both.cam[count:], both.high_res[count:]),
        }

    _map_images(run, "LPCAM", items, stages, maps_of)
    run.finish(*stages.values())
    return True


def _map_parts(run: Run, items: Sequence[Item]) -> dict[str, Any]:
    settings = run.recipe.lpcam
    return {
        "revision": 2,
        "classifier": run.stages["classify"].output["digest"],
        "scales": list(settings.scales),
        "flip": settings.flip,
        "maps": run.recipe.maps.model_dump(mode="json"),
        "images": run.digest(items),
    }


def _map_images(
    run: Run, label: str, items: Sequence[Item], stages: dict[str, Stage], maps_of: Any
) -> None:
    """Maps of every image that has none yet, from one pyramid of features an image."""
    store = run.store(run.classifier)
    scales = run.recipe.lpcam.scales

    def missing(item: Item) -> bool:
        paths = [map_path(stage.folder, item.id) for stage in stages.values()]
        return not all(path.is_file() for path in paths)

    @torch.inference_mode()
    def make(batch: list[Item]) -> None:
        # An image without a label has no map, and needs no features.
        pairs = list(store.pairs(batch, scales)) if any(item.labels for item in batch) else []
        for row, item in enumerate(batch):
            if not missing(item):
                continue
            size = run.sharing.sizes[item.id]
            own = [_of_image(run, pair, row) for pair in pairs]
            maps = maps_of(item, own, _mapped_size(run, size)) if item.labels else {}
            for name, stage in stages.items():
                fused = at_size(maps[name], size) if maps else no_maps(size)
                write_maps(
                    map_path(stage.folder, item.id),
                    MapFile(
                        np.array(item.labels, dtype=np.int64),
                        fused.cam.float().cpu().numpy(),
                        fused.high_res.float().cpu().numpy(),
                        {"stage": stage.key},
                    ),
                    dtype=run.recipe.maps.dtype,
                )

    mine = run.sharing.mine(items)
    # Batches are made before it is known what is missing: they are the same after a stop.
    todo = [b for b in run.sharing.batches(mine) if any(missing(item) for item in b)]
    left = sum(len(batch) for batch in todo)
    with progress(label, len(mine), done=len(mine) - left) as advance:
        for batch, _ in zip(todo, run.sharing.map(make, todo), strict=True):
            advance(len(batch), "")


def _of_image(run: Run, pair: Any, row: int) -> Any:
    """One image's features of a batch, mirrored ones only where the maps use them."""
    from lpcam.extract import FeaturePair  # noqa: PLC0415

    flip = run.recipe.lpcam.flip
    return FeaturePair(pair.features[row], pair.mirrored[row] if flip else None)


def _mapped_size(run: Run, size: tuple[int, int]) -> tuple[int, int]:
    """Size at which an image is mapped: its own, or smaller by ``maps.maximum_side``."""
    limit = run.recipe.maps.maximum_side
    return size if max(size) <= limit else scaled_size(*size, limit / max(size))


def no_maps(size: tuple[int, int]) -> FusedMaps:
    """Of an image without a label."""
    height, width = size
    return FusedMaps(torch.zeros(0, -(-height // 4), -(-width // 4)), torch.zeros(0, height, width))


def at_size(maps: FusedMaps, size: tuple[int, int]) -> FusedMaps:
    """Enlarge the maps of an image that was mapped at a smaller size (bilinear)."""
    if maps.high_res.shape[-2:] == size:
        return maps
    quarter = (-(-size[0] // 4), -(-size[1] // 4))
    cam, high_res = (
        F.interpolate(m[None], size=s, mode="bilinear", align_corners=False)[0]
        for m, s in ((maps.cam, quarter), (maps.high_res, size))
    )
    return FusedMaps(cam, high_res)
