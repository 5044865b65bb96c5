"""Scoring the maps of a run against the truth, wherever there are masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpcam.data.images import read_index_mask
from lpcam.data.items import BACKGROUND, IGNORE, ClassTable, Dataset, Item
from lpcam.masks import seeds
from lpcam.metrics import (
    DEFAULT_THRESHOLDS,
    Scores,
    ThresholdSweep,
    best_threshold,
    part_counts,
    part_coverage,
    scores,
    truth_labels,
)
from lpcam.parallel import Sharing
from lpcam.progress import progress
from lpcam.storage import map_path, read_maps

MOST_VALUES = 8
"""Values of masks that a message lists."""


@dataclass(frozen=True)
class Evaluation:
    """What the maps of a run are worth; the same in every process."""

    rows: list[dict[str, Any]]
    """Two a method: of ``method``, ``threshold``, ``threshold_source`` ("ground truth" or "fixed"),
    ``images``, the fields of :class:`lpcam.metrics.Scores`, and ``part_coverage`` where the data
    set has parts."""
    curves: dict[str, dict[str, list[float]]]
    """Of :meth:`lpcam.metrics.ThresholdSweep.curves`."""
    image_scores: dict[str, list[float | None]]
    """For each image the mean IoU of its labels at the method's fixed threshold; None where none of
    them is in the truth or the seed."""


def why_not_scored(items: Sequence[Item], classes: ClassTable) -> str | None:
    """What is wrong with true masks none of which shows a class, in words; None where one does.

    Masks are read up to the first that shows a class.

    Args:
        items: the images, each with a mask.
    """
    held: set[int] = set()
    for item in items:
        assert item.mask is not None
        held |= set(np.unique(read_index_mask(item.mask)).tolist())
        if not held.isdisjoint(classes.mask_ids):
            return None
    text = (
        f"none of its true masks ({len(items)}) shows a class: the values in them are "
        f"{_listed(held)} (0 is background, 255 is not counted)"
    )
    strange = held - {BACKGROUND, IGNORE}
    if strange:
        text += (
            f". Values of no class here: {_listed(strange)}; write the classes' numbers instead, "
            f"such as {classes.mask_ids[0]} for {classes.names[0]}"
        )
    return text


def _listed(values: set[int]) -> str:
    shown = [str(value) for value in sorted(values)[:MOST_VALUES]]
    return ", ".join([*shown, "..."] if len(values) > MOST_VALUES else shown)


def score_maps(
    items: Sequence[Item],
    dataset: Dataset,
    folders: Mapping[str, Path],
    fixed: Mapping[str, float],
    sharing: Sharing,
) -> Evaluation:
    """Score each method at its own best threshold by the truth, and at the fixed one.

    Args:
        items: the images, each with a mask.
        folders: of each method's maps.
        fixed: threshold of each method.
    """
    names = dataset.classes.names
    grid = sorted({*DEFAULT_THRESHOLDS, *fixed.values()})
    sweeps = {method: ThresholdSweep(len(names), grid) for method in folders}

    places = {item.id: place for place, item in enumerate(items)}
    image_scores = torch.zeros(len(folders), len(items), dtype=torch.float64)

    def count(item: Item) -> dict[str, Tensor]:
        truth = _truth(item, dataset)
        counts = {}
        for row, (method, folder) in enumerate(folders.items()):
            maps = read_maps(map_path(folder, item.id))
            one = ThresholdSweep(len(names), grid)
            one.update(truth, torch.from_numpy(maps.high_res), torch.from_numpy(maps.keys))
            counts[method] = one.histogram
            ious = one.ious(maps.keys.tolist())[:, grid.index(fixed[method])]
            image_scores[row, places[item.id]] = ious.nanmean()
        return counts

    mine = sharing.mine(items)
    with progress("scoring", len(mine)) as advance:
        for counts in sharing.map(count, mine):
            for method, histogram in counts.items():
                sweeps[method].histogram += histogram
            advance(1, "")
    for sweep in sweeps.values():
        sweep.histogram = sharing.processes.sum(sweep.histogram)
    image_scores = sharing.processes.sum(image_scores)

    rows = []
    for method, sweep in sweeps.items():
        best, best_scores = best_threshold(sweep, names)
        for threshold, source, found in (
            (best, "ground truth", best_scores),
            (fixed[method], "fixed", scores(sweep.confusion(fixed[method]), names)),
        ):
            row = row_of(method, len(items), threshold, source, found)
            if dataset.part_names:
                row["part_coverage"] = _coverage(mine, dataset, folders[method], threshold, sharing)
            rows.append(row)
    return Evaluation(
        rows,
        {method: sweep.curves(names) for method, sweep in sweeps.items()},
        {
            method: [None if math.isnan(value) else value for value in one]
            for method, one in zip(folders, image_scores.tolist(), strict=True)
        },
    )


def _truth(item: Item, dataset: Dataset) -> Tensor:
    assert item.mask is not None
    return truth_labels(read_index_mask(item.mask), dataset.classes)


def row_of(
    method: str, images: int, threshold: float | None, source: str | None, found: Scores
) -> dict[str, Any]:
    """A row of figures; masks that no threshold has made have neither one nor its source."""
    return {
        "method": method,
        "images": images,
        "miou": found.miou,
        "fp": found.fp,
        "fn": found.fn,
        "precision": found.precision,
        "recall": found.recall,
        "precision_with_background": found.precision_with_background,
        "recall_with_background": found.recall_with_background,
        "threshold": threshold,
        "threshold_source": source,
        "per_class": found.per_class,
        "left_out": list(found.left_out),
    }


def _coverage(
    mine: Sequence[Item], dataset: Dataset, folder: Path, threshold: float, sharing: Sharing
) -> dict[str, float]:
    names = dataset.part_names

    def count(item: Item) -> Tensor:
        assert item.parts is not None
        maps = read_maps(map_path(folder, item.id))
        seed = seeds(torch.from_numpy(maps.high_res), threshold)
        labels = torch.tensor([0, *(int(k) + 1 for k in maps.keys)])[seed]
        parts = torch.from_numpy(read_index_mask(item.parts))
        return part_counts(_truth(item, dataset), labels, parts, names)

    counts = torch.zeros(len(names), 2, dtype=torch.int64)
    for one in sharing.map(count, [item for item in mine if item.parts is not None]):
        counts += one
    return part_coverage(sharing.processes.sum(counts), names)
