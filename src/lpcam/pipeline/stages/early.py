"""LPCAM-E: what a run learns from early layers, which way it chooses, and the maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from lpcam.classifiers.features import image_of
from lpcam.data.dataset import Item
from lpcam.data.map_files import map_path, read_maps
from lpcam.data.resize import quarter_size, resize
from lpcam.evaluation.judge import choose
from lpcam.method.early import (
    IMAGES_PER_CLASS,
    Base,
    EarlyImage,
    EarlyPrototypes,
    candidates,
    fit_early,
)
from lpcam.method.functional import FusedMaps
from lpcam.method.settings import EarlySettings
from lpcam.pipeline.cache import Output, Result, Task
from lpcam.pipeline.context import FEATURES_SHARE, Context
from lpcam.pipeline.run_folder import RESULTS
from lpcam.pipeline.stages.judge import coloured, judge_all, sampled
from lpcam.pipeline.stages.maps import write_fused
from lpcam.runtime.files import digest_file
from lpcam.runtime.parallel import ordered_map
from lpcam.runtime.progress import progress

BASES: tuple[Base, Base] = ("LPCAM", "CAM")  #: The simpler to prefer first.


def sharpen(context: Context) -> Iterator[Task]:
    """Prototypes of early layers, the choice of how to use them, and the maps LPCAM-E."""
    settings = context.lpcam.early
    if settings is None:
        return
    bases = BASES if settings.base == "auto" else (settings.base,)
    classifier = context.results["classifier"].output
    parts = {
        "revision": 1,
        "classifier": classifier["digest"],
        "maps": {base: context.results[RESULTS[base]].key for base in bases},
        "features": context.features_key,
        "settings": settings.model_dump(mode="json"),
        "seed": context.recipe.run.seed,
        "images": context.digest(context.items("maps")),
    }

    def work(result: Result) -> Output | None:
        if not context.processes.first:
            return None
        found, ways = _fit(context, settings, bases, classifier["fingerprint"])
        (path,) = result.files
        found.save(path)
        chosen = next(one for one in ways if one["chosen"])
        return {"digest": digest_file(path), "ways": ways, "verdict": chosen["verdict"]}

    yield context.task("early", parts, [context.folder.early], work)
    output = context.results["early"].output
    if context.recipe.chooses_threshold("LPCAM-E"):
        context.judge("LPCAM-E", output["verdict"])
    way = next(one for one in output["ways"] if one["chosen"])
    told = [one["information"] for one in output["ways"]]
    if len(told) > 1:
        context.chose(
            "lpcam.early",
            f"{way['base']}, {way['fusion']}"
            + f" after round {way['round']}" * (way["fusion"] != "none"),
            f"information {way['information']:.4f}, the least {min(told):.4f}",
        )
    yield _map_task(context)
    yield from judge_all(context)


def _fit(
    context: Context, settings: EarlySettings, bases: Sequence[Base], fingerprint: str
) -> tuple[EarlyPrototypes, list[dict[str, object]]]:
    """The chosen prototypes, and every way that was judged."""
    names = context.dataset.classes.names
    count = max(settings.images, IMAGES_PER_CLASS * len(names))
    items = sampled(context, count)
    workers, store = context.sharing.workers, context.store(context.classifier)

    @torch.inference_mode()
    def read(item: Item) -> EarlyImage:
        step, colours = coloured(item.read())
        maps = {
            base: torch.from_numpy(
                read_maps(map_path(context.folder / RESULTS[base], item.id))
                .high_res[:, ::step, ::step]
                .astype(np.float16)
            )
            for base in bases
        }
        layers = [pair.features[0].half().cpu() for pair in store.early([item])]
        return EarlyImage(item.labels, layers, maps, colours)

    room = context.memory() * (1 - FEATURES_SHARE)
    images: list[EarlyImage] = []
    with progress("early layers", len(items)) as advance:
        for image in ordered_map(read, items, workers):
            room -= sum(one.nbytes for one in (*image.layers, *image.bases.values(), image.colours))
            if images and room < 0:
                break
            images.append(image)
            advance(1, "")
    rounds = {
        base: fit_early(
            images,
            names,
            context.early_layers,
            settings,
            seed=context.recipe.run.seed,
            base=base,
            fingerprint=fingerprint,
            workers=workers,
        )
        for base in bases
    }
    ways = candidates(rounds) if context.early_layers else candidates(rounds)[: len(bases)]
    if settings.fusion != "auto" and context.early_layers:
        ways = [one for one in ways if one.fusion == settings.fusion]
    place, verdicts = choose(images, ways, workers=workers)
    told = [
        {
            "base": way.base,
            "fusion": way.fusion,
            "round": None if way.fusion == "none" else (way.made_by or {})["round"],
            "information": verdict.information,
            "threshold": verdict.threshold,
            "chosen": number == place,
            "verdict": verdict.as_json(),
        }
        for number, (way, verdict) in enumerate(zip(ways, verdicts, strict=True))
    ]
    return ways[place], told


def _map_task(context: Context) -> Task:
    made = context.results["early"].output["digest"]

    def start(result: Result) -> Callable[[Item], None]:
        fingerprint = context.results["classifier"].output["fingerprint"]
        found = EarlyPrototypes.load(context.folder.early, fingerprint=fingerprint)
        store = context.store(context.classifier)

        def make(item: Item) -> None:
            maps = None
            if item.labels:
                stored = read_maps(map_path(context.folder / RESULTS[found.base], item.id))
                base = torch.from_numpy(stored.high_res).float().to(context.device)
                pairs = store.early([item]) if found.fusion != "none" else ()
                high_res = found.maps(base, [image_of(pair) for pair in pairs], item.labels)
                maps = FusedMaps(resize(high_res, quarter_size(base.shape[-2:])), high_res)
            write_fused(context, result, item, maps)

        return make

    parts = {"revision": 1, "early": made, "dtype": context.recipe.maps.dtype}
    own = {RESULTS["LPCAM-E"]: parts}
    return context.image_task(own, "LPCAM-E", context.items("maps"), [map_path], start)
