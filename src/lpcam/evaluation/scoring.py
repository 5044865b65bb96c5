"""Scores of masks and of the maps of a run against true masks."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpcam.data.dataset import BACKGROUND, IGNORE, ClassTable, Dataset, Item
from lpcam.data.map_files import map_path, read_maps
from lpcam.data.masks import read_index_mask
from lpcam.evaluation.segmentation import (
    DEFAULT_THRESHOLDS,
    Scores,
    ThresholdSweep,
    best_threshold,
    confusion,
    scores,
    truth_labels,
)
from lpcam.runtime.distributed import Sharing
from lpcam.runtime.errors import DataError, shortened
from lpcam.runtime.parallel import ordered_map
from lpcam.runtime.progress import progress

logger = logging.getLogger(__name__)


def evaluate_masks(
    predictions: str | Path,
    truth: str | Path,
    classes: ClassTable | None = None,
    *,
    workers: int = 1,
) -> Scores:
    """Score a folder of predicted masks against a folder of true masks, by equal relative paths.

    Both are PNGs of grey values or palette indices: 0 is background; 255 in the truth is not
    counted, in a prediction it counts as background.

    Args:
        classes: names and mask values of the classes; other values in the truth do not count.
            None: every value in the true masks is a class, named after the value.
        workers: images read at a time.

    Raises:
        DataError: if a mask is missing or does not fit the other, or the truth shows no class.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> from lpcam.data.masks import write_mask
        >>> write_mask(folder / "a.png", np.array([[0, 0, 1, 1]], np.uint8))
        >>> evaluate_masks(folder, folder).per_class["1"]["iou"]
        1.0
    """
    predictions, truth = Path(predictions), Path(truth)
    names = sorted(path.relative_to(truth) for path in truth.rglob("*.png"))
    if not names:
        raise DataError(f"{truth} contains no PNG; give the folder of the true masks")
    if missing := [str(name) for name in names if not (predictions / name).is_file()]:
        raise DataError(
            f"{predictions} lacks {len(missing)} of {len(names)} masks: {shortened(missing)}; "
            "predict every image of the truth, or give a folder with fewer true masks"
        )
    unscored = {path.relative_to(predictions) for path in predictions.rglob("*.png")} - {*names}
    if unscored:
        some = shortened(sorted(map(str, unscored)))
        logger.warning("%d masks without a true mask are not scored: %s", len(unscored), some)
    if classes is None:
        values = set().union(*(np.unique(read_index_mask(truth / n)).tolist() for n in names))
        ids = tuple(sorted(values - {BACKGROUND, IGNORE}))
        classes = ClassTable(tuple(str(value) for value in ids), ids)

    def count(name: Path) -> Tensor:
        found = read_index_mask(predictions / name)
        found = np.where(found == IGNORE, BACKGROUND, found)
        if unknown := set(np.unique(found).tolist()) - {BACKGROUND, *classes.mask_ids}:
            raise DataError(
                f"{predictions / name} has values of no class: {_listed(unknown)}; the values of "
                f"the classes are {_listed(classes.mask_ids)}"
            )
        true = truth_labels(read_index_mask(truth / name), classes)
        try:
            return confusion(true, truth_labels(found, classes), len(classes) + 1)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error

    matrices = ordered_map(count, names, workers)
    return scores(sum(matrices, torch.zeros((), dtype=torch.int64)), classes.names)


@dataclass(frozen=True)
class Evaluation:
    """Scores of the maps of a run."""

    rows: list[dict[str, Any]]
    """Two for each method, one without a fixed threshold: ``method``, ``threshold``, its source,
    ``images``, the fields of :class:`lpcam.evaluation.segmentation.Scores`, ``part_coverage``."""
    curves: dict[str, dict[str, list[float]]]
    """:meth:`lpcam.evaluation.segmentation.ThresholdSweep.curves` of each method."""
    image_scores: dict[str, list[float | None]]
    """Mean IoU of each image's labels at the method's fixed threshold; None if none is there."""


def why_not_scored(items: Sequence[Item], classes: ClassTable) -> str | None:
    """Explain why no true mask shows a class; None if one does, at which reading stops."""
    held: set[int] = set()
    for item in items:
        assert item.mask is not None
        held |= set(np.unique(item.read_mask()).tolist())
        if not held.isdisjoint(classes.mask_ids):
            return None
    text = (
        f"none of its true masks ({len(items)}) shows a class: the values in them are "
        f"{_listed(held)} (0 is background, 255 is not counted)"
    )
    if held <= {BACKGROUND, IGNORE}:
        return text
    return (
        f"{text}. Values of no class here: {_listed(held - {BACKGROUND, IGNORE})}; write the "
        f"classes' numbers instead, such as {classes.mask_ids[0]} for {classes.names[0]}"
    )


def _listed(values: Iterable[int]) -> str:
    return shortened([str(value) for value in sorted(values)], most=8)


def score_maps(
    items: Sequence[Item],
    dataset: Dataset,
    folders: Mapping[str, Path],
    fixed: Mapping[str, float],
    sharing: Sharing,
    automatic: Collection[str] = (),
) -> Evaluation:
    """Score maps of each method (``folders``) at its best threshold, and at its ``fixed`` one.

    ``part_coverage`` is the share of a part's pixels that have the right class; only pixels of a
    class count.

    The source of the second is ``fixed``, or ``automatic`` for methods of this name.
    """
    names = dataset.classes.names
    grid = sorted({*DEFAULT_THRESHOLDS, *fixed.values()})
    of_parts = {(method, part) for method in folders for part in dataset.part_names}
    sweeps = {key: ThresholdSweep(len(names), grid) for key in (*folders, *sorted(of_parts))}

    places = {item.id: place for place, item in enumerate(items)}
    image_scores = torch.zeros(len(folders), len(items), dtype=torch.float64)

    def count(item: Item) -> dict[str | tuple[str, str], Tensor]:
        assert item.mask is not None
        truth = truth_labels(item.read_mask(), dataset.classes)
        parts = torch.from_numpy(item.read_mask(item.parts)) if item.parts else truth
        counts: dict[str | tuple[str, str], Tensor] = {}
        for row, (method, folder) in enumerate(folders.items()):
            maps = read_maps(map_path(folder, item.id))
            planes, keys = torch.from_numpy(maps.high_res), torch.from_numpy(maps.keys)
            one = ThresholdSweep(len(names), grid)
            one.update(truth, planes, keys)
            counts[method] = one.histogram
            for part, value in dataset.part_names.items() if item.parts else ():
                here = ThresholdSweep(len(names), grid)
                here.update(truth.where(parts == value, IGNORE), planes, keys)
                counts[method, part] = here.histogram
            image_scores[row, places[item.id]] = math.nan
            if method in fixed:
                ious = one.ious(maps.keys.tolist())[:, grid.index(fixed[method])]
                image_scores[row, places[item.id]] = ious.nanmean()
        return counts

    mine = sharing.mine(items)
    with progress("scoring", len(mine)) as advance:
        for counts in sharing.map(count, mine):
            for key, histogram in counts.items():
                sweeps[key].histogram += histogram
            advance(1, "")
    for sweep in sweeps.values():
        sweep.histogram = sharing.processes.sum(sweep.histogram)
    image_scores = sharing.processes.sum(image_scores)

    rows = []
    for method in folders:
        sweep = sweeps[method]
        kinds = [(*best_threshold(sweep, names), "ground truth")]
        if (own := fixed.get(method)) is not None:
            source = "automatic" if method in automatic else "fixed"
            kinds.append((own, scores(sweep.confusion(own), names), source))
        for threshold, found, source in kinds:
            row = row_of(method, len(items), threshold, source, found)
            if dataset.part_names:
                row["part_coverage"] = {
                    part: int(hits[grid.index(threshold)]) / total
                    for part in dataset.part_names
                    for hits, total in [sweeps[method, part].covered()]
                    if total
                }
            rows.append(row)
    curves = {method: sweeps[method].curves(names) for method in folders}
    known = [[None if math.isnan(v) else v for v in one] for one in image_scores.tolist()]
    return Evaluation(rows, curves, dict(zip(folders, known, strict=True)))


def row_of(
    method: str, images: int, threshold: float | None, source: str | None, found: Scores
) -> dict[str, Any]:
    """One row of :attr:`Evaluation.rows`; masks that were not cut from maps have no threshold."""
    return {
        "method": method,
        "images": images,
        "threshold": threshold,
        "threshold_source": source,
        **asdict(found),
        "left_out": list(found.left_out),
    }
