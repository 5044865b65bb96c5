"""Dry run of an experiment: builds every network, and estimates time, memory and disk space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from math import inf, prod
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lpcam.classifiers.classifier import RANDOM, build
from lpcam.classifiers.feature_store import DTYPES
from lpcam.data.dataset import ClassTable
from lpcam.pipeline.datasets import LISTS, SEGMENT_LISTS, read_dataset
from lpcam.pipeline.experiments.definition import PlannedRun
from lpcam.pipeline.recipe import Recipe
from lpcam.refine.base import LearnedRefinement
from lpcam.runtime.errors import LpcamError, RecipeError
from lpcam.segmentation.segmenter import build_segmenter

SIZE, GIB = (384, 512), 2**30  #: (H, W) of the image whose pass is counted; bytes.
SUPPOSED = yaml.safe_load(resources.files("lpcam.pipeline").joinpath("costs.yaml").read_text())


def describe(planned: Sequence[PlannedRun]) -> str:
    """Table of the runs of an experiment with their estimated cost; needs no data and no weights.

    Every network is built with random weights. The last line counts results once that runs share.

    Raises:
        RecipeError: naming every arm that cannot be built, with the reason.
    """
    known, problems, rows = dict[str, Any](), dict[str, str](), []
    for one in reversed({run.folder: run for run in reversed(planned)}.values()):
        try:
            rows.append((one.arm.name, str(one.seed), *_costs(one.recipe, known)))
        except LpcamError as error:
            problems[one.arm.name] = str(error)
    if problems:
        found = "\n  ".join(f"{name}: {reason}" for name, reason in problems.items())
        raise RecipeError(f"{len(problems)} arms cannot be built:\n  {found}")
    total = {key: cost for _, _, costs, _ in rows for key, cost in costs.items()}
    rows.append(("all, shared results once", "", total, max(memory for *_, memory in rows)))
    lines = [f"{'arm':<44}{'seed':>6}{'hours':>10}{'memory':>10}{'disk':>10}"]
    for name, seed, costs, memory in rows:
        flops, disk = map(sum, zip(*costs.values(), strict=True))
        amounts = (flops / SUPPOSED["flops"] / 3600, memory / GIB, disk / GIB)
        lines.append(f"{name:<44.43}{seed:>6}" + "".join(f"{one:>10,.2f}" for one in amounts))
    return "\n".join([*lines, SUPPOSED["assumptions"]])


def _data(recipe: Recipe) -> dict[str, Any]:
    """Images of each stage, labels of an image, size and classes, real or supposed."""
    data, stages = recipe.data, (*LISTS, *(SEGMENT_LISTS if recipe.segment else ()))
    found = {**SUPPOSED["data"].get(data.kind, SUPPOSED["data"]["folder"])}
    classes = data.classes or [f"class {n}" for n in range(found["classes"])]
    found["classes"] = ClassTable(tuple(classes), tuple(range(1, len(classes) + 1)))
    if data.root.is_dir():
        read = read_dataset(recipe, stages)
        found |= {"lists": {k: len(v) for k, v in read.lists.items()}, "classes": read.classes}
        found["labels"] = sum(len(i.labels) for i in read.items.values()) / len(read.items)
    for unknown in {*map(data.list_of, stages)} - found["lists"].keys():
        raise RecipeError(f"the list {unknown!r} is of unknown length; give --data.root FOLDER")
    return found | {stage: found["lists"][data.list_of(stage)] for stage in stages}


def _once(known: dict[str, Any], key: object, make: Callable[[], Any]) -> Any:
    """What `make` gives; of a network FLOPs and cells for each pixel, channels, and bytes."""
    if str(key) not in known:
        made = make()
        if isinstance(made, nn.Module):
            size = sum(p.numel() * p.element_size() for p in made.parameters())
            body = getattr(made, "classifier", made).to("meta")  # of a host its backbone
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                found = getattr(body, "features", body)(torch.zeros(1, 3, *SIZE, device="meta"))
            _, channels, *cells = getattr(found, "shape", (1, 0))
            made = counter.get_total_flops() / prod(SIZE), prod(cells) / prod(SIZE), channels, size
        known[str(key)] = made
    return known[str(key)]


def _trained(part: Any, settings: Any, images: int) -> float:
    """Pixels of all crops of a training, three times each; by its iterations or epochs."""
    if steps := getattr(settings, "iterations", None):
        images = getattr(settings, "batch_size", 0) or 2 * settings.pairs
    pixels = 3.0 * (steps or settings.epochs) * images * settings.crop**2
    return 0.0 if part.trained else float(pixels)


def _passes(settings: Any) -> float:
    return float(sum(scale**2 for scale in settings.scales)) * (2 if settings.flip else 1)


def _costs(recipe: Recipe, known: dict[str, Any]) -> tuple[dict[str, tuple[float, float]], float]:
    """FLOPs and bytes on disk of a run's results by what they depend on, and bytes of memory."""
    section, lpcam, host, segment = recipe.classifier, recipe.lpcam, recipe.host, recipe.segment
    data = _once(known, (recipe.data, segment is None), lambda: _data(recipe))
    classes, area, item = data["classes"], prod(data["size"]), DTYPES[recipe.maps.features].itemsize
    mapped = data["maps"] * area
    make: Callable[[], Any] = partial(build, section.spec(), classes.names, weights=RANDOM)
    flops, cells, channels, size = _once(known, section, make)
    kept = mapped * _passes(lpcam) * cells * channels * item
    kept *= kept < (recipe.run.memory or SUPPOSED["memory"]) * GIB / 2
    drawn = min(data["prototypes"] * data["labels"], (lpcam.images_per_class or inf) * len(classes))
    sampled = min(drawn * area * cells, 4 * (lpcam.max_features or inf) * len(classes))
    fitted = _trained(section, section.finetune, data["classify"])
    if section.method == "probe":
        fitted = 2.0 * data["classify"] * area
    # What a result depends on beside those before it, its FLOPs, and its kinds of maps and masks.
    results: list[tuple[object, float, int, int]] = [
        ((recipe.data.root, recipe.run.seed, section), fitted * flops, 0, 0),
        ((recipe.maps, lpcam.scales, lpcam.flip), mapped * _passes(lpcam) * flops, 1, 0),
        (lpcam, 0.0 if kept else mapped * _passes(lpcam) * flops, 2, 1),
    ]
    sizes = [size]
    if host is not None:
        body, arms = section if host.backbone is None else host, len(host.arms)
        make = partial(host.host.build, body.spec(), classes.names, host.settings, weights=RANDOM)
        of_pixel, *_, size = _once(known, (host, body), make)
        pixels = len({a.network for a in host.arms}) * _trained(host, host.settings, data["maps"])
        pixels += arms * mapped * _passes(host.settings)
        results.append((host, of_pixel * pixels, arms, arms))
        sizes.append(size)
    if (refine := recipe.refine) is not None:
        count, pixels = len(recipe.refined), 0.0
        if isinstance(refine.refinement, LearnedRefinement):
            pixels = count * (_trained(refine, refine.settings, data["maps"]) + 2 * mapped)
        results.append((refine, flops * pixels, count, count))
    if segment is not None:
        make = partial(build_segmenter, segment.spec(), classes, weights=RANDOM)
        of_pixel, *_, size = _once(known, (segment, len(classes)), make)
        pixels = _trained(segment, segment.training, data["segment"])
        pixels += data["test"] * area * (segment.validations + _passes(segment.test))
        results.append((segment, of_pixel * pixels * len(recipe.segmented), 0, 0))
        sizes.append(size)
    found, key = dict[str, tuple[float, float]](), ""
    of_map = data["labels"] * area * (1 if recipe.maps.dtype == "uint8" else 2) * 17 / 16
    for depends, work, maps, masks in results:
        key += f" {depends}"
        found[key] = work, data["maps"] * (maps * of_map + masks * SUPPOSED["mask"])
    return found, kept + sampled * channels * item + 4 * max(sizes)
