"""Pictures of an experiment, drawn from its first run: figures 1, 3 and 4 of the paper."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from lpcam.data.dataset import BACKGROUND, Dataset, Item
from lpcam.data.drawing import CELL, SheetRow, sheet
from lpcam.data.map_files import map_path, read_maps
from lpcam.method import functional
from lpcam.pipeline.datasets import read_dataset
from lpcam.pipeline.run_folder import RESULTS, RunFolder, mask_path
from lpcam.report.experiment import bars
from lpcam.runtime.errors import ArtefactError
from lpcam.runtime.files import read_json

METHODS = ("CAM", "LPCAM")
ROWS = 4  #: Number of images of a sheet.
# Worked example of Figure 3: vectors of the attributes head, tail and sky. The values are chosen
# such that head and tail come out as in the paper. The tail hardly tells the class from others.
PLACES = {"head": (4.0, 0.0, 0.0), "tail": (0.0, 3.0, 0.25), "sky": (0.0, 0.25, 3.0)}
WEIGHT = (1.0, 0.4, -0.5)
PROTOTYPES = {"head": (2.0, 0.0, 0.0), "tail": (0.0, 2.0, 0.0), "sky": (0.0, 0.0, 2.0)}


def _mapped(run: RunFolder) -> tuple[Dataset, list[Item]]:
    """The data set of a run and its images to score that have maps."""
    recipe = run.load_recipe()
    dataset = read_dataset(recipe, ("evaluate",), painted=run.truth)
    items = dataset.select(recipe.data.list_of("evaluate"))
    return dataset, [i for i in items if map_path(run / RESULTS["LPCAM"], i.id).is_file()]


def confusing(run: RunFolder) -> Iterator[dict[str, Any]]:
    """Figure 1: maps of the true and two wrong classes of an image; ArtefactError if none fits."""
    dataset, items = _mapped(run)
    explainer, found = run.explainer(device=run.load_recipe().run.device), []
    fast = explainer.fast()  # of the same scores
    for item in items:
        ranking = fast.highest(item.image, 0).ranking if len(item.labels) == 1 else ()
        if len(ranking) > 1 and ranking[0][0] == dataset.classes.names[item.labels[0]]:
            found.append((ranking[1][1], item))
    if not found:
        raise ArtefactError(
            f"the run {run.path} has maps of {len(items)} images, none with one label that is "
            "scored highest of several, which this figure needs; train the classifier longer, or "
            "add such images to the list to evaluate"
        )
    item = max(found, key=lambda one: one[0])[1]
    maps = explainer.highest(item.image, 3)
    yield {
        "png": sheet(maps.sheet_rows(long_side=2 * CELL), mask_title="mask of all"),
        "text": f"{item.id}, true class {maps.classes[0]}: of {len(found)} images with one label "
        "that the classifier scores highest, it has the highest score of a wrong class.",
        "figures": {"image": item.id, "scores": dict(maps.ranking)},
    }


def worked_example() -> dict[str, list[float]]:
    """Values of the three places of the example, by equations 1, 5 and 6.

    Example:
        >>> [round(value, 2) for value in worked_example()["LPCAM"]]
        [1.0, 0.83, 0.0]
    """
    given = ([*PLACES.values()], [*PROTOTYPES.values()], [WEIGHT])
    values, prototypes, weight = (torch.tensor(one, dtype=torch.float64) for one in given)
    features = values.T[:, None]  # (3 attributes, 1, 3 places)
    found = {
        f"cosine to the {name}'s prototype": functional.mean_cosine(features, one[None])[None]
        for name, one in zip(PROTOTYPES, prototypes, strict=True)
    }
    vector = functional.foreground_minus_context(prototypes[:2], prototypes[2:])
    found["inner product"] = cam = functional.class_activation(features, weight)
    found["class minus context"] = lpcam = functional.cosine_activation(features, vector[None])
    found |= {m: functional.normalize(x.relu()) for m, x in zip(METHODS, (cam, lpcam), strict=True)}
    return {name: one[0, 0].tolist() for name, one in found.items()}


def places(run: RunFolder) -> Iterator[dict[str, Any]]:
    """Figure 3: CAM and LPCAM of three places, worked out, and of true parts if there are any."""
    values = worked_example()
    told = [
        "; ".join(f"{n} {', '.join(f'{v:.2f}' for v in own)}" for n, own in one.items())
        for one in (PLACES, PROTOTYPES, values)
    ]
    yield {
        "name": "example",
        "svg": bars("Three places", [*PLACES], {method: values[method] for method in METHODS}),
        "text": f"Worked out, not measured. Features: {told[0]}. Classifier's weights: {WEIGHT}. "
        f"Prototypes, the sky's is context: {told[1]}. Values: {told[2]}.",
        "figures": {"places": values},
    }
    dataset, items = _mapped(run)
    items = [item for item in items if item.parts and item.mask]
    sums: Any = defaultdict(lambda: np.zeros(2))
    for item, method in itertools.product(items, METHODS):
        maps, truth = read_maps(map_path(run / RESULTS[method], item.id)), item.read_mask()
        for key, plane in zip(maps.keys, maps.high_res, strict=True):
            own = (truth == dataset.classes.mask_ids[key]) * item.read_mask(item.parts)
            where = {name: own == value for name, value in dataset.part_names.items()}
            for name, here in {**where, "ground": truth == BACKGROUND}.items():
                sums[method, name] += plane[here].sum(), here.sum()
    means = {
        m: {n: float(s / c) for (k, n), (s, c) in sums.items() if k == m and c} for m in METHODS
    }
    relative = {
        m: [one / (max(own.values()) or 1) for one in own.values()] for m, own in means.items()
    }
    if items:
        yield {
            "name": "parts",
            "svg": bars("Parts", [*means["CAM"]], relative),
            "text": f"Measured on {len(items)} images: the mean of the maps on each true part of "
            "their class and on the ground, divided by the largest mean of the method.",
            "figures": {"means": means},
        }


def choose_images(scores: Mapping[str, float], seed: int) -> dict[str, list[str]]:
    """Images of the best, median and worst score, of equal ones by name, and random ones."""
    ranked = sorted(scores, key=lambda name: (-scores[name], name))
    middle = max(0, (len(ranked) - ROWS) // 2)
    order = np.random.default_rng(seed).permutation(len(ranked))[:ROWS]
    found = {"best": ranked[:ROWS], "median": ranked[middle : middle + ROWS]}
    return {**found, "worst": ranked[::-1][:ROWS], "random": [ranked[place] for place in order]}


def sheets(run: RunFolder) -> Iterator[dict[str, Any]]:
    """Figure 4: sheets of images by their mIoU of LPCAM; ArtefactError if there is none."""
    by_id = {item.id: item for item in _mapped(run)[1] if item.mask}
    found = read_json(run.image_scores) if run.image_scores.is_file() else {}
    scores = dict(zip(found.get("ids", ()), found.get("LPCAM", ()), strict=False))
    scores = {name: scores[name] for name in by_id if scores.get(name) is not None}
    if not scores:
        raise ArtefactError(
            f"the run {run.path} has no mIoU of LPCAM for any image; sheets are chosen by it, so "
            "give the data true masks (data.masks) and bring the run up to date with 'lpcam run "
            f"{run.recipe} --until evaluate'"
        )
    seed = run.load_recipe().run.seed
    for name, ids in choose_images(scores, seed).items():
        rows = []
        for item in map(by_id.__getitem__, ids):
            paths = (map_path(run / RESULTS[method], item.id) for method in METHODS)
            cam, lpcam = (read_maps(path).high_res.max(0) for path in paths)
            masks = item.read_mask(mask_path(run / "seeds", item.id)), item.read_mask()
            label = f"{item.id} {100 * scores[item.id]:.1f}"
            rows.append(SheetRow(item.read(), label, cam, lpcam, *masks))
        rule = f"drawn with seed {seed}" if name == "random" else f"of the {name} mIoU"
        yield {
            "name": name,
            "png": sheet(rows, mask_title="seed mask"),
            "text": f"{len(rows)} of {len(scores)} images, {rule}; the number is the mIoU of LPCAM "
            "at its fixed threshold, in percent. Maps are the maximum over the image's classes.",
            "figures": {"images": {one: scores[one] for one in ids}},
        }


Kind = Callable[[RunFolder], Iterator[dict[str, Any]]]
PICTURES: dict[str, Kind] = {"confusing": confusing, "places": places, "sheet": sheets}
