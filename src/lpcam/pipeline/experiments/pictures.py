"""Pictures of an experiment, drawn from its first run: figures 1, 3 and 4 of the paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpcam.data.dataset import BACKGROUND, Dataset, Item
from lpcam.data.drawing import SheetRow, grid, overlay, sheet
from lpcam.data.images import limit_long_side
from lpcam.data.map_files import map_path, read_maps
from lpcam.data.masks import read_index_mask
from lpcam.method.functional import (
    class_activation,
    cosine_activation,
    foreground_minus_context,
    mean_cosine,
)
from lpcam.pipeline.datasets import read_dataset
from lpcam.pipeline.run_folder import RESULTS, RunFolder, mask_path
from lpcam.report.experiment import bars
from lpcam.runtime.errors import ArtefactError
from lpcam.runtime.files import read_json

Picture = dict[str, Any]
METHODS = ("CAM", "LPCAM")
CONFUSED = 2  #: Number of wrong classes that are shown.
ROWS = 4  #: Number of images of a sheet.
# The worked example: vectors of the attributes head, tail and sky. The values are chosen such that
# the head and the tail come out as in the paper's Figure 3.
ATTRIBUTES = ("head", "tail", "sky")
FEATURES = {"head": (4.0, 0.0, 0.0), "tail": (0.0, 3.0, 0.25), "sky": (0.0, 0.25, 3.0)}
WEIGHT = (1.0, 0.4, -0.5)  #: The head tells the class from others, the tail hardly does.
FOREGROUND = ((2.0, 0.0, 0.0), (0.0, 2.0, 0.0))  #: Class prototypes: a head and a tail.
CONTEXT = ((0.0, 0.0, 2.0),)  #: Context prototypes: sky.


def _mapped(run: RunFolder) -> tuple[Dataset, list[Item]]:
    """The data set of a run and its scored images that have maps."""
    recipe = run.load_recipe()
    dataset = read_dataset(recipe, ("evaluate",), painted=run.truth)
    items = dataset.select(recipe.data.list_of("evaluate"))
    return dataset, [i for i in items if map_path(run / RESULTS["LPCAM"], i.id).is_file()]


def confusing(run: RunFolder) -> Iterator[Picture]:
    """Figure 1: maps of the true class of an image and of the classes it is confused with.

    It is the image with one label, of the highest score, whose best wrong class has the highest
    score of all; of equal ones the first of the list.

    Raises:
        ArtefactError: if the run has no such image.
    """
    dataset, items = _mapped(run)
    explainer = run.explainer(device=run.load_recipe().run.device)
    fast, found = explainer.fast(), []
    for item in items:
        ranking = fast.highest(item.image, 0).ranking if len(item.labels) == 1 else ()
        if len(ranking) > 1 and ranking[0][0] == dataset.classes.names[item.labels[0]]:
            found.append((ranking[1][1], item))
    if not found:
        raise ArtefactError(
            f"the run {run.path} has maps of {len(items)} images, and of none with one label that "
            "the classifier scores highest; the figure of confusing classes needs one, so train "
            "the classifier longer, or add images of one class to the list to evaluate"
        )
    _, item = max(found, key=lambda one: one[0])
    maps = explainer.highest(item.image, 1 + CONFUSED)
    shown = {"CAM": maps.cam, "LPCAM": maps.lpcam}
    image = limit_long_side(maps.image, explainer.maximum_side)
    titles = [f"{n} {s:.2f}" for n, s in zip(maps.classes, maps.scores, strict=True)]
    alike = {
        name: [round(float(np.corrcoef(own[0].ravel(), one.ravel())[0, 1]), 4) for one in own[1:]]
        for name, own in shown.items()
    }
    told = "; ".join(f"{n}: {', '.join(f'{one:.2f}' for one in own)}" for n, own in alike.items())
    yield {
        "png": grid(
            ["image", *titles],
            [*shown],
            [[image, *(overlay(image, one) for one in own)] for own in shown.values()],
        ),
        "text": f"{item.id}, whose true class is {maps.classes[0]}. Of the {len(found)} images with "
        "one label that the classifier scores highest, it has the highest score of a wrong class. "
        f"Correlation of the map of the true class with those of the others: {told}.",
        "figures": {"image": item.id, "scores": dict(maps.ranking), "correlation": alike},
    }


def worked_example() -> dict[str, dict[str, float]]:
    """The example of Figure 3: values of its three places, by equations 1, 5 and 6.

    Returns:
        For each place the cosine to each prototype, the inner product with the classifier's weights
        (``product``), the difference of equation 6 (``difference``), and CAM and LPCAM: both after
        a ReLU, divided by their maximum.

    Example:
        >>> {name: round(value, 2) for name, value in worked_example()["tail"].items()}
        {'cosine to head': 0.0, 'cosine to tail': 1.0, 'cosine to sky': 0.08, 'product': 1.07, \
'difference': 0.42, 'CAM': 0.27, 'LPCAM': 0.83}
    """
    features = torch.tensor([*FEATURES.values()]).double().T[:, None]  # (3 attributes, 1, 3 places)
    foreground, context = torch.tensor(FOREGROUND).double(), torch.tensor(CONTEXT).double()
    found = {
        f"cosine to {name}": mean_cosine(features, one[None])
        for name, one in zip(ATTRIBUTES, torch.cat([foreground, context]), strict=True)
    }
    found["product"] = class_activation(features, torch.tensor([WEIGHT]).double())[0]
    vector = foreground_minus_context(foreground, context)
    found["difference"] = cosine_activation(features, vector[None])[0]
    for name, signed in zip(METHODS, ("product", "difference"), strict=True):
        found[name] = found[signed].relu() / found[signed].max()
    values: dict[str, Tensor] = {name: one[0] for name, one in found.items()}
    return {
        place: {name: float(own[column]) for name, own in values.items()}
        for column, place in enumerate(FEATURES)
    }


def places(run: RunFolder) -> Iterator[Picture]:
    """Figure 3: CAM and LPCAM of three places, worked out, and of the true parts, if there are."""
    values = worked_example()
    told = "; ".join(
        f"{place} {FEATURES[place]}: "
        + ", ".join(f"{name} {value:.2f}" for name, value in own.items())
        for place, own in values.items()
    )
    yield {
        "name": "example",
        "svg": bars("Three places", {p: [v[m] for m in METHODS] for p, v in values.items()}, METHODS),
        "text": f"A worked example, not measured: features of three places by the attributes "
        f"{', '.join(ATTRIBUTES)}; the classifier's weights {WEIGHT}; class prototypes "
        f"{FOREGROUND[0]} and {FOREGROUND[1]}, context prototype {CONTEXT[0]}. CAM is the inner "
        "product with the weights, which are small where an attribute does not tell the class from "
        "others. LPCAM takes the cosine to each prototype, the mean of the class's minus that of "
        f"the context's. Both are divided by their maximum. {told}.",
        "figures": {"places": values},
    }
    dataset, items = _mapped(run)
    with_parts = [item for item in items if item.parts and item.mask]
    if not with_parts:
        return
    means = {method: _part_means(run, RESULTS[method], dataset, with_parts) for method in METHODS}
    relative = {
        method: {name: value / max(own.values()) for name, value in own.items()}
        for method, own in means.items()
    }
    groups = {name: [relative[method][name] for method in METHODS] for name in means["CAM"]}
    yield {
        "name": "parts",
        "svg": bars("Parts", groups, METHODS),
        "text": f"Measured on {len(with_parts)} images: the mean value of the maps on the pixels of "
        "each true part of their class, and on the background, divided by the largest of a method.",
        "figures": {"means": means, "relative": relative},
    }


def _part_means(
    run: RunFolder, result: str, dataset: Dataset, items: Sequence[Item]
) -> dict[str, float]:
    """Mean value of the maps on each true part of the map's class, and on the background."""
    sums = {name: np.zeros(2) for name in (*dataset.part_names, "ground")}
    for item in items:
        truth, parts = item.read_mask(), item.read_mask(item.parts)
        maps = read_maps(map_path(run / result, item.id))
        for key, plane in zip(maps.keys, maps.high_res, strict=True):
            own = truth == dataset.classes.mask_ids[key]
            where = {name: own & (parts == value) for name, value in dataset.part_names.items()}
            for name, here in {**where, "ground": truth == BACKGROUND}.items():
                sums[name] += plane[here].sum(), here.sum()
    return {name: float(total / count) for name, (total, count) in sums.items() if count}


def choose_images(scores: Mapping[str, float], count: int, seed: int) -> dict[str, list[str]]:
    """Images of the best, median and worst score and random ones, at most ``count`` of each.

    Images of equal score are in the order of their names; random ones depend on the seed alone.

    Example:
        >>> choose_images({"a": 0.1, "b": 0.9, "c": 0.5}, 1, seed=0)
        {'best': ['b'], 'median': ['c'], 'worst': ['a'], 'random': ['c']}
    """
    ranked = sorted(scores, key=lambda name: (-scores[name], name))
    middle = max(0, (len(ranked) - count) // 2)
    order = np.random.default_rng(seed).permutation(len(ranked))
    return {
        "best": ranked[:count],
        "median": ranked[middle : middle + count],
        "worst": ranked[::-1][:count],
        "random": [ranked[place] for place in order[:count]],
    }


def sheets(run: RunFolder) -> Iterator[Picture]:
    """Figure 4: image, CAM, LPCAM, seed mask and truth of images chosen by the mIoU of LPCAM.

    Raises:
        ArtefactError: if the run has no score of LPCAM for single images.
    """
    dataset, items = _mapped(run)
    by_image = read_json(run.image_scores) if run.image_scores.is_file() else {}
    known = zip(by_image.get("ids", ()), by_image.get("LPCAM", ()), strict=False)
    by_id = {item.id: item for item in items if item.mask}
    scores = {name: value for name, value in known if value is not None and name in by_id}
    if not scores:
        raise ArtefactError(
            f"the run {run.path} has no mIoU of LPCAM for any of its {len(items)} images; sheets "
            "are chosen by it, so give the data true masks (data.masks) and bring the run up to "
            f"date with 'lpcam run {run.recipe} --until evaluate'"
        )
    seed = run.load_recipe().run.seed
    rules = {"random": f"drawn at random with seed {seed}"}
    for name, ids in choose_images(scores, ROWS, seed).items():
        rows = []
        for one in ids:
            item = by_id[one]
            cam, lpcam = (
                read_maps(map_path(run / RESULTS[method], one)).high_res.max(0)
                for method in METHODS
            )
            mask = read_index_mask(mask_path(run / "seeds", one))
            label = f"{one} {100 * scores[one]:.1f}"
            rows.append(SheetRow(item.read(), label, cam, lpcam, mask, item.read_mask()))
        rule = rules.get(name, f"of {name} mIoU")
        yield {
            "name": name,
            "png": sheet(rows, mask_title="seed mask"),
            "text": f"{len(rows)} of {len(scores)} images, {rule}; the number is the image's mIoU of "
            "LPCAM at its fixed threshold, in percent. Maps are the maximum over the image's "
            "classes.",
            "figures": {"images": {one: scores[one] for one in ids}},
        }


PICTURES: dict[str, Callable[[RunFolder], Iterator[Picture]]] = {
    "confusing": confusing,
    "places": places,
    "sheet": sheets,
}
"""What draws each kind of picture, from the folder of a run."""
