"""A linear probe: a linear head fitted to the pooled features of a frozen backbone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.classifiers.classifier import Classifier
from lpcam.classifiers.feature_store import FeatureStore, naming
from lpcam.classifiers.linear import ProbeSettings, fit_head, mean_average_precision
from lpcam.data.dataset import Item
from lpcam.data.images import resize_long_side
from lpcam.data.resize import scaled_size
from lpcam.runtime.distributed import Sharing
from lpcam.runtime.files import read_tensors, write_tensors
from lpcam.runtime.parallel import one_thread
from lpcam.runtime.progress import progress

logger = logging.getLogger(__name__)
SHARD = 128  #: Images whose pooled features share a file; a resumed run skips complete files.


@one_thread()
def fit_probe(
    classifier: Classifier,
    training: Sequence[Item],
    validation: Sequence[Item],
    settings: ProbeSettings,
    *,
    pooled: Tensor,
    refit: bool,
) -> list[dict[str, Any]]:
    """Fit the classifier's head in place, and return one record with its loss and its mAP."""
    labels = multi_hot([*training, *validation], len(classifier.classes))
    count = len(training)
    weight = fit_head(pooled[:count], labels[:count], settings, classifier.classes)
    validation_map = mean_average_precision(pooled[count:, 0] @ weight.T, labels[count:])
    loss = float(F.multilabel_soft_margin_loss(pooled[:count, 0] @ weight.T, labels[:count]))
    shown = "unknown" if validation_map is None else f"{validation_map:.3f}"
    logger.info("linear probe: loss %.4f, validation mAP %s", loss, shown)
    if refit and validation:
        weight = fit_head(pooled, labels, settings, classifier.classes)
    with torch.no_grad():
        classifier.head.weight.copy_(weight)
    return [{"epoch": 1, "loss": loss, "validation_map": validation_map}]


def multi_hot(items: Sequence[Item], classes: int) -> Tensor:
    """Image-level labels (len(items), classes) float32, 1 for present classes."""
    labels = torch.zeros(len(items), classes)
    for row, item in enumerate(items):
        labels[row, list(item.labels)] = 1.0
    return labels


def _same_scales(
    size: tuple[int, int] | None, side: int, scales: Sequence[float], most: int
) -> list[float]:
    """The scales at which an image (H, W) has the long ``side``, none if it is shrunk to most."""
    if size is None or max(size) > most:
        return []
    wanted = scaled_size(*size, side / max(size))
    return [scale for scale in scales if scaled_size(*size, scale) == wanted]


def pooled_features(
    items: Sequence[Item],
    settings: ProbeSettings,
    store: FeatureStore,
    folder: Path,
    sharing: Sharing,
    scales: Sequence[float] = (),
) -> Tensor | None:
    """Pooled features (len(items), V, C) of views of images; complete shards are read again.

    An image pooled at the size of one of the maps' ``scales`` needs no pass of its own.
    """
    mine, processes = sharing.mine(items), sharing.processes
    shards = f"of-{processes.count}-by-{sharing.batch}"  # shards of other shares do not fit

    def key(item: Item) -> tuple[str, int | None, bool]:
        return item.id, settings.long_side, settings.mirror

    @torch.inference_mode()
    def pool(batch: list[Item]) -> Tensor:
        if all(key(item) in store.pooled for item in batch):
            return torch.stack([store.pooled[key(item)] for item in batch])
        side, known = settings.long_side, sharing.sizes.get(batch[0].id)
        shared = [1.0] if side is None else _same_scales(known, side, scales, store.maximum_side)
        if shared and (store.flip or not settings.mirror):
            (pair,) = store.pairs(batch, shared[:1])
        else:
            images = [i.read() for i in batch]
            if side is not None:
                images = [resize_long_side(image, side) for image in images]
            with naming(batch):
                pair = store.fresh(np.stack(images), 1.0, flip=settings.mirror)
        views = [view for view in pair[: 1 + settings.mirror] if view is not None]
        return torch.stack([view.mean((-2, -1)) for view in views], dim=1).cpu()

    with progress("pooled features", len(mine)) as advance:
        for start in range(0, len(mine), SHARD):
            part = mine[start : start + SHARD]
            path = folder / f"pooled-{processes.rank}-{shards}-{start:07d}.safetensors"
            if path.is_file():
                advance(len(part), "")
                continue
            rows: dict[str, Tensor] = {}
            batches = sharing.batches(part)
            for batch, pooled in zip(batches, sharing.map(pool, batches), strict=True):
                # a bare id may be a reserved name
                names = (f"image {item.id}" for item in batch)
                store.pooled |= dict(zip(map(key, batch), pooled, strict=True))
                rows |= dict(zip(names, pooled, strict=True))
                advance(len(batch), "")
            write_tensors(path, rows, {"kind": "pooled features"})
    processes.wait()
    if not processes.first:
        return None
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"pooled-*-{shards}-*.safetensors")):
        found.update(read_tensors(path)[0])
    return torch.stack([found[f"image {item.id}"] for item in items])
