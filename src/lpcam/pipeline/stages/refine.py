"""Pseudo masks from maps, by the refinement that the recipe names."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lpcam.classifiers.classifier import RANDOM
from lpcam.data.dataset import Item, Skip
from lpcam.data.images import limit_long_side
from lpcam.data.map_files import MapFile, map_path, read_maps, write_maps
from lpcam.data.masks import write_mask
from lpcam.data.resize import resize
from lpcam.evaluation.judge import SHARE, THRESHOLDS
from lpcam.hosts.base import folder_name
from lpcam.method.seeds import seeds, to_mask
from lpcam.pipeline.cache import Output, Record, Result, Task
from lpcam.pipeline.context import Context, FileOf, one_network, required
from lpcam.pipeline.datasets import Given
from lpcam.pipeline.run_folder import RESULTS, mask_path, refined_map_path
from lpcam.pipeline.stages.judge import classifier_key, curves_of, sampled
from lpcam.refine.base import (
    DECIDED,
    Job,
    Labelled,
    LearnedRefinement,
    Picture,
    RefineSection,
    Source,
    Tools,
    WriteLabels,
)
from lpcam.runtime.errors import ArtefactError, DataError, RecipeError
from lpcam.runtime.files import digest_file, digest_json
from lpcam.runtime.resources import memory_of_an_image
from lpcam.training.loop import History

HIGHEST = 1.001  #: Largest value of a normalised map; rounding may exceed 1.
AUTO = "auto"
GATE_IMAGES = 60  #: Images on which a refinement is judged before it is used.
GAIN = 1.05  #: A CRF must raise the judges' product by this factor to be chosen.
KEEP = 0.05  #: ``crf.keep`` where the run chooses.
GIVEN = "given"  #: Name of maps that another program made, in figures and folders.


def _pictures(context: Context, item: Item, sources: Iterable[Source | Result]) -> list[Picture]:
    """An image and its maps of each source, at the size of refinement, on the run's device."""
    # a dense CRF of an image of 4,000 pixels a side would take 7 GB
    image = torch.from_numpy(limit_long_side(item.read(), context.recipe.maps.maximum_side))
    device, shared, pictures = context.device, dict[str, Any](), []
    image = image.to(device)
    for source in sources:
        found = read_maps(map_path(source.folder, item.id))
        planes = resize(torch.from_numpy(found.high_res), image.shape[:2]).to(device)
        pictures.append(Picture(item, found, image, planes, shared))
    return pictures


def image_memory(context: Context) -> int | None:
    """Memory that the CRF of one image may use, in bytes: its thread's part."""
    return memory_of_an_image(context.device, context.sharing.workers * context.processes.here)


def label_task(
    context: Context,
    wanted: Mapping[str, tuple[Source | Result, Record, Any]],
    label: str,
    path: FileOf,
    labeller: Callable[[list[Any]], WriteLabels],
    items: Sequence[Item],
) -> Task:
    """A task that writes a file of labels for every image and source of maps.

    ``wanted`` has each result's source, its parts, and what ``labeller`` needs to know of it.
    """

    def start(*results: Result) -> Callable[[Item], None]:
        write = labeller([wanted[result.name][2] for result in results])
        from_maps = [wanted[result.name][0] for result in results]
        return lambda item: write(
            _pictures(context, item, from_maps), [path(one.folder, item.id) for one in results]
        )

    side = context.recipe.maps.maximum_side
    parts = {
        name: {"revision": 1, "maps": source.key, **own, "maximum_side": side}
        for name, (source, own, _) in wanted.items()
    }
    return context.image_task(parts, label, items, [path], start)


def sources(context: Context) -> list[Source]:
    """Maps that are refined: those the recipe names, or those of another program."""
    recipe, given, host = context.recipe, context.given_maps, context.recipe.host
    if given is not None:
        fixed = recipe.fixed_threshold("LPCAM")
        return [Source(GIVEN, GIVEN, given.folder, given.key, fixed)]
    found = []
    for method in recipe.refined:
        name = folder_name(method)
        if host is not None and method in {arm.title for arm in host.arms}:
            result, stated = context.results[f"host-maps/{name}"], host.settings.threshold
        else:
            result, stated = context.results[RESULTS[method]], recipe.fixed_threshold(method)
        threshold = context.threshold(method, stated)
        own = (threshold, threshold - stated if method in context.verdicts else 0.0)
        found.append(Source(method, name, result.folder, result.key, *own))
    return found


def tools(context: Context) -> Tools:
    """Resources of the run that the refinement uses."""
    return Tools(
        device=context.device,
        classes=context.dataset.classes,
        backbone=context.recipe.classifier,
        classifier=lambda: (
            context.classifier if "classifier" in context.results else context.untrained()
        ),
        untrained=lambda: context.untrained(RANDOM),
        seed=context.recipe.run.seed,
        items=context.items("maps"),
        sharing=context.sharing,
        memory=image_memory(context),
        saliency=context.recipe.data.saliency,
        accelerate=context.accelerate,
    )


def validate(context: Context) -> None:
    """Validate the refinement's configuration before any stage runs."""
    section = required(context.recipe.refine)
    lent = tools(context)
    section.refinement.validate(section, lent)
    if section.trained is not None:
        if not isinstance(section.refinement, LearnedRefinement):
            raise RecipeError(f"refine.trained: {section.method} has no network; leave it out")
        one_network("refine", [GIVEN] if context.given_maps else context.recipe.refined)
        _untrained(section, lent).take(section.trained)


def _untrained(section: RefineSection, lent: Tools) -> Any:
    """A network with random weights, for those of a file."""
    backbone = lent.backbone.model_copy(update={"weights": RANDOM})
    given = replace(lent, backbone=backbone, classifier=lent.untrained)
    assert isinstance(section.refinement, LearnedRefinement)
    return section.refinement.build(section, given)


def import_maps(context: Context, folder: Path) -> None:
    """Take the map files of another program instead of the run's own, without unusable ones."""
    skipped, digests = [], {}
    for item in context.items("maps"):
        path, record = map_path(folder, item.id), context.records[item.id]
        try:
            maps = read_maps(path)
        except ArtefactError as error:
            skipped.append(Skip(item.id, str(error)))
            continue
        size = (record["height"], record["width"])
        problem = _problem(maps, item, size, context.dataset.classes.names)
        if problem is None:
            digests[item.id] = digest_file(path)
        else:
            skipped.append(Skip(item.id, f"the map {path} {problem}"))
    if not digests:
        reason = skipped[0].reason
        if not map_path(folder, skipped[0].id).is_file() and any(folder.rglob("*.npy")):
            reason = (
                f"{folder} holds .npy files of another program; import them first: lpcam import "
                f"maps {shlex.quote(str(folder))} FOLDER --data PATH"
            )
        raise DataError(
            f"no image of the list {context.recipe.data.list_of('maps')!r} can be refined: {reason}"
        )
    context.dataset = context.dataset.without(skipped)
    context.given_maps = Given(folder, digest_json(digests))


def _problem(maps: MapFile, item: Item, size: tuple[int, int], names: Sequence[str]) -> str | None:
    """Why the maps of another program cannot be used for an image; None if they can."""
    if maps.high_res.shape[1:] != size:
        found = " x ".join(str(side) for side in maps.high_res.shape[1:])
        return f"has {found} pixels, but the image {size[0]} x {size[1]}; resize it"
    own = maps.made_by.get("classes")
    if own is not None and list(own) != list(names):
        return (
            f"has the classes {', '.join(own)}, not {', '.join(names)}; import it for the recipe's "
            "classes: lpcam import maps --data PATH --classes NAMES"
        )
    if maps.keys.size and maps.keys.max() >= len(names):
        return f"has the class index {maps.keys.max()}; there are {len(names)} classes"
    if others := [names[key] for key in maps.keys.tolist() if key not in item.labels]:
        return f"has classes that the image is not labelled with: {', '.join(others)}"
    if maps.high_res.size and maps.high_res.max() > HIGHEST:
        return f"has values up to {maps.high_res.max():.4g}; divide each map by its maximum"
    return None


def _jobs(context: Context) -> list[Job]:
    """One job for each kind of maps that is refined."""
    lent = tools(context)
    return [Job(required(context.recipe.refine), source, lent) for source in sources(context)]


def write_labels(context: Context) -> Iterator[Task]:
    """The labels that a refinement with a network learns from."""
    method = required(context.recipe.refine).refinement
    if not isinstance(method, LearnedRefinement) or required(context.recipe.refine).trained:
        return
    wanted, names = {}, []
    for job in _jobs(context):
        parts = {"method": job.section.method, **method.label_key(job)}
        wanted[f"refine-labels/{job.source.name}"] = (job.source, parts, job)
        names.append(job.source.method)
    label = f"{method.title} labels of {' and '.join(names)}"
    items = context.items("maps")
    yield label_task(context, wanted, label, method.label_path, method.labeller, items)


def train_networks(context: Context) -> Iterator[Task]:
    """The network of a refinement with one, for each kind of maps."""
    section, recipe = required(context.recipe.refine), context.recipe
    method = section.refinement
    if not isinstance(method, LearnedRefinement):
        return
    start = recipe.classifier.backbone_key()
    if method.starts_from == "classifier" and "classifier" in context.results:
        start = {"classifier": context.results["classifier"].output["digest"]}
    settings = section.settings.model_dump(mode="json", include=method.network_settings)
    for job in _jobs(context):
        name = f"refine-network/{job.source.name}"
        path = context.folder.network(name)
        if section.trained is not None:
            build = partial(_untrained, section, job.tools)
            network = {
                "method": section.method,
                "backbone": recipe.classifier.described(),
                "settings": settings,
            }
            yield context.given_task(name, network, path, build, section.trained)
            continue
        labels = context.results[f"refine-labels/{job.source.name}"]
        parts = {
            "revision": method.revision,
            "labels": labels.key,
            **start,
            **context.engine_key,
            "settings": settings,
            "seed": recipe.run.seed,
        }
        labelled = [(i, method.label_path(labels.folder, i.id)) for i in context.items("maps")]

        def train(network: Any, folder: Path, labelled: Labelled = labelled) -> History:
            return method.train(network, labelled, section, **context.training_options(folder))

        build = partial(method.build, section, job.tools)
        yield context.training_task(name, parts, path, build, train)


def chosen(context: Context, source: Source) -> RefineSection:
    """The recipe's section, with the method that the run chose for maps where it is ``auto``."""
    section = required(context.recipe.refine)
    if section.method != AUTO:
        return section
    method = context.results[f"refine-choice/{source.name}"].output["method"]
    crf = section.label_crf.model_copy(update={"keep": KEEP})
    return section.model_copy(update={"method": method, "crf": crf})


def threshold(context: Context, section: RefineSection, source: Source) -> float:
    """Threshold of refined maps: the judge's, or that of the refinement."""
    stated = section.refinement.threshold(section, source)
    return context.threshold(section.title(source.method), stated)


def _choose(context: Context, source: Source) -> Iterator[Task]:
    """A task that finds out whether a CRF improves masks, by the judges on some images."""
    job = _with_crf(Job(required(context.recipe.refine), source, tools(context)))
    items = sampled(context, GATE_IMAGES)
    places = {item.id: place for place, item in enumerate(items)}
    parts = {
        "revision": 1,
        "maps": source.key,
        "images": context.digest(items),
        "classifier": classifier_key(context),
        **job.section.refinement.key(job),
    }

    def work(result: Result) -> Output:
        refine = job.section.refinement.refiner(job, Path(), result.folder)

        def masks(item: Item) -> tuple[NDArray[np.uint8], list[torch.Tensor]]:
            (found,) = _pictures(context, item, [source])
            after = refine(found)
            assert isinstance(after, torch.Tensor)
            seed = (found.planes.amax(0, keepdim=True) > source.seed_threshold).float()
            refined = (after.amax(0, keepdim=True) > DECIDED).float()
            shares[places[item.id]] = torch.stack([seed.mean(), refined.mean()]).cpu()
            return found.image.cpu().numpy(), [seed, refined]

        shares = torch.zeros(len(items), 2)
        # all thresholds give the same masks
        found = curves_of(context, items, masks, 2)[..., 0].mean(0)
        before, after = (float(colours * features.sqrt()) for colours, features in found)
        gain, share = after / max(before, 1e-12), context.processes.sum(shares).mean(0).tolist()
        method = "crf" if gain >= GAIN and share[1] <= share[0] else "none"
        return {"method": method, "gain": gain, "share": share}

    yield context.task(f"refine-choice/{source.name}", parts, [], work)
    found = context.results[f"refine-choice/{source.name}"].output
    context.chose(
        f"refinement of {source.method}",
        found["method"],
        f"information x sqrt(variance explained) is {found['gain']:.2f} times that of the seeds, "
        "the foreground {:.1%} of the pixels instead of {:.1%}".format(*reversed(found["share"])),
    )


def _cut(context: Context, job: Job) -> Iterator[Task]:
    """A task that chooses the threshold of refined maps, where that of the seeds was chosen.

    Their masks get as much foreground as the seeds have after a CRF, in the mean of some images.
    """
    source, method, title = job.source, job.section.refinement, job.section.title(job.source.method)
    if source.method not in context.verdicts or not method.judged:
        return
    items, cleaning = sampled(context, GATE_IMAGES), _with_crf(job)
    parts = {
        **_parts(context, job),
        "images": context.digest(items),
        "crf": cleaning.section.refinement.key(cleaning),
    }
    network = context.folder.network(f"refine-network/{source.name}")

    def work(result: Result) -> Output:
        refine = method.refiner(job, network, result.folder)
        clean = cleaning.section.refinement.refiner(cleaning, network, result.folder)
        places = {item.id: place for place, item in enumerate(items)}
        shares = torch.zeros(len(items), len(THRESHOLDS) + 1, dtype=torch.float64)

        @torch.inference_mode()
        def measure(item: Item) -> None:
            (found,) = _pictures(context, item, [source])
            output, cleaned = refine(found), clean(found)
            assert isinstance(cleaned, torch.Tensor)
            best = (output[1] if isinstance(output, tuple) else output).amax(0).cpu()
            own = [float((best > t).double().mean()) for t in THRESHOLDS]
            wanted = float((cleaned.amax(0) > DECIDED).double().mean())
            shares[places[item.id]] = torch.tensor([*own, wanted], dtype=torch.float64)

        for _ in context.sharing.map(measure, context.sharing.mine(items)):
            pass
        shutil.rmtree(result.folder / "boundaries", ignore_errors=True)  # of these images alone
        *own, wanted = context.processes.sum(shares).mean(0).tolist()
        nearest = min(range(len(own)), key=lambda place: abs(own[place] - wanted))
        return {"threshold": THRESHOLDS[nearest], "share": wanted, "rule": SHARE}

    yield context.task(f"judge/pseudo/{source.name}", parts, [], work)
    found = context.results[f"judge/pseudo/{source.name}"].output
    context.verdicts[title] = found
    reason = f"{found['share']:.1%} of the pixels are foreground, as after a CRF on the seeds"
    context.chose(f"threshold of {title}", f"{found['threshold']:.2f}", reason)


def _with_crf(job: Job) -> Job:
    """The same maps, refined by the CRF that a run chooses from."""
    crf = job.section.label_crf.model_copy(update={"keep": KEEP})
    return replace(job, section=job.section.model_copy(update={"method": "crf", "crf": crf}))


def _parts(context: Context, job: Job) -> Record:
    """Everything that refined maps depend on, as JSON."""
    trained = context.results.get(f"refine-network/{job.source.name}")
    return {
        "revision": 2,
        "method": job.section.method,
        "maps": job.source.key,
        "network": None if trained is None else trained.output["digest"],
        **({} if trained is None else context.engine_key),
        "mask_ids": list(context.dataset.classes.mask_ids),
        "maximum_side": context.recipe.maps.maximum_side,
        "dtype": context.recipe.maps.dtype,
        **job.section.refinement.key(job),
    }


def write_pseudo_masks(context: Context) -> Iterator[Task]:
    """Refined maps and pseudo masks of every image of the list that has maps."""
    jobs, parts = {}, {}
    for source in sources(context):
        if required(context.recipe.refine).method == AUTO:
            yield from _choose(context, source)
        job = Job(chosen(context, source), source, tools(context))
        yield from _cut(context, job)
        name, cut = f"pseudo/{source.name}", threshold(context, job.section, source)
        jobs[name], parts[name] = job, {**_parts(context, job), "threshold": cut}
    label = f"pseudo masks of {' and '.join(job.source.method for job in jobs.values())}"
    files = [mask_path, refined_map_path]
    start = partial(_refiner, context, jobs)
    yield context.image_task(parts, label, context.items("maps"), files, start)


def _refiner(context: Context, jobs: Mapping[str, Job], *results: Result) -> Callable[[Item], None]:
    from_maps = [jobs[result.name].source for result in results]
    makers = [_maker(context, jobs[result.name], result) for result in results]

    def make(item: Item) -> None:
        for one, picture in zip(makers, _pictures(context, item, from_maps), strict=True):
            one(item, picture)

    return make


def _maker(context: Context, job: Job, result: Result) -> Callable[[Item, Picture], None]:
    source, method = job.source, job.section.refinement
    network = context.folder.network(f"refine-network/{source.name}")
    refine = method.refiner(job, network, result.folder)
    cut, classes = threshold(context, job.section, source), context.dataset.classes

    def make(item: Item, found: Picture) -> None:
        refined = refined_map_path(result.folder, item.id)
        maps, planes = found.maps, found.planes
        output = refine(found) if len(planes) or method.every_image else planes
        quarter, full = output if isinstance(output, tuple) else (output, output)
        cam = resize(quarter, maps.cam.shape[-2:]).float().cpu().numpy()
        high_res = resize(full, maps.high_res.shape[-2:]).float().cpu().numpy()
        file = MapFile(maps.keys, cam, high_res, {"stage": result.key})
        write_maps(refined, file, dtype=context.recipe.maps.dtype)
        # From the file's own rounded values, so that masks and scores of the maps agree.
        seed = seeds(torch.from_numpy(read_maps(refined).high_res), cut)
        write_mask(mask_path(result.folder, item.id), to_mask(seed, maps.keys, classes))

    return make


def refined(context: Context) -> Mapping[str, tuple[Source, Result]]:
    """The refined maps by the name of their rows, such as ``LPCAM + IRN``."""
    section = context.recipe.refine
    if section is None or context.given_masks is not None:
        return {}
    return {
        chosen(context, source).title(source.method): (
            source,
            context.results[f"pseudo/{source.name}"],
        )
        for source in sources(context)
    }


def described(context: Context) -> dict[str, Any] | None:
    """The refinement and its settings, for the protocol; None without one."""
    section = context.recipe.refine
    if section is None or context.given_masks is not None:
        return None
    return section.refinement.described(section, tools(context))
