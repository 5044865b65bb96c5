"""From maps to pseudo masks: ternary labels; the walks of IRN and PSA, a CRF, PAMR, saliency."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.data.images import limit_long_side, read_image
from lpcam.data.items import IGNORE, Item, Skip
from lpcam.errors import ArtefactError, DataError, LpcamError
from lpcam.ledger import Stage
from lpcam.masks import enlarge_labels, seeds, to_mask, write_mask, write_plane
from lpcam.presets import CrfSettings
from lpcam.progress import progress
from lpcam.recipe import Method, RefineSection
from lpcam.resources import memory_of_an_image
from lpcam.stages.context import Given, Run
from lpcam.storage import MapFile, digest_file, digest_json, map_path, read_maps, write_maps

logger = logging.getLogger(__name__)

IRN = "irn"
PSA = "psa"
PSEUDO = "pseudo"
HOST_MAPS = "host-maps"
BOUNDARIES = "boundaries"
"""IRN's boundary maps, in the folder of the pseudo masks."""
MAPS = "maps"
"""The refined maps, in the folder of the pseudo masks."""


@dataclass(frozen=True)
class Source:
    """Maps that pseudo masks are made from, and the thresholds that fit them."""

    method: str
    folder: Path
    key: str
    """Of the stage that made the maps."""
    seed_threshold: float
    foreground_threshold: float
    background_threshold: float
    threshold: float
    """Of IRN's pseudo masks."""

    @property
    def name(self) -> str:
        """Of the method's folders."""
        return folder_name(self.method)


def folder_name(method: str) -> str:
    """Of a method's folders: ``AMN+LPCAM`` has amn_lpcam."""
    return method.lower().replace("-", "_").replace("+", "_")


def refine_section(run: Run) -> RefineSection:
    """The recipe's section; there is one where a stage of this module has anything to do."""
    assert run.recipe.refine is not None
    return run.recipe.refine


HIGHEST = 1.001
"""Of a map, which is normalised; rounding may exceed 1."""
GIVEN = "given"
"""Name of maps that other programs made, in figures and folders."""


def sources(run: Run) -> list[Source]:
    """The maps that the recipe wants refined, or those of another program that were given."""
    section, found = refine_section(run), []
    if run.given is not None:
        irn = section.irn
        thresholds = (irn.foreground_threshold, irn.background_threshold, irn.threshold)
        seed_threshold = run.recipe.fixed_threshold("LPCAM")
        return [Source(GIVEN, run.given.folder, run.given.key, seed_threshold, *thresholds)]
    host = run.recipe.host
    for method in run.recipe.refined:
        irn = section.irn
        own = (irn.foreground_threshold, irn.background_threshold, irn.threshold)
        if host is not None and method in host.arms:
            stage = run.stages[f"{HOST_MAPS}/{folder_name(method)}"]
            found.append(Source(method, stage.folder, stage.key, host.settings.threshold, *own))
            continue
        if method == "CAM":
            own = (
                irn.cam_foreground_threshold,
                irn.cam_background_threshold,
                irn.cam_threshold,
            )
        base: Method = "CAM" if method == "CAM" else "LPCAM"
        stage = run.stages_of_methods[base]
        fixed = run.recipe.fixed_threshold(base)
        found.append(Source(method, stage.folder, stage.key, fixed, *own))
    return found


def take_maps(run: Run, folder: Path) -> None:
    """Take the maps of another program instead of those of the run's own stages.

    Images whose map file is missing, damaged, of another size, made with other classes (where it
    records their names, as imported files do) or of classes that the image is not labelled with are
    left out with the reason.

    Args:
        folder: with one map file (:func:`lpcam.storage.write_maps`) an image of the list for maps,
            named by the image's id.

    Raises:
        DataError: if no image has maps.
    """
    names, kept, skipped, digests = run.dataset.classes.names, [], [], {}
    count, unlabelled = len(names), 0
    for item in run.items("maps"):
        path, record = map_path(folder, item.id), run.records[item.id]
        try:
            maps = read_maps(path)
        except ArtefactError as error:
            skipped.append(Skip(item.id, str(error)))
            continue
        size = (record["height"], record["width"])
        if maps.high_res.shape[1:] != size:
            found = " x ".join(str(side) for side in maps.high_res.shape[1:])
            problem = f"has {found} pixels, but the image {size[0]} x {size[1]}; resize it"
        elif (own := maps.made_by.get("classes")) is not None and list(own) != list(names):
            problem = (
                f"is of the classes {', '.join(own)}, not of {', '.join(names)}; import it for the "
                "recipe's: lpcam import maps --data PATH --classes NAMES"
            )
        elif maps.keys.size and maps.keys.max() >= count:
            problem = f"has the class index {maps.keys.max()}; there are {count} classes"
        elif others := [names[key] for key in maps.keys.tolist() if key not in item.labels]:
            problem = f"has classes that the image is not labelled with: {', '.join(others)}"
            unlabelled += 1
        elif maps.high_res.size and maps.high_res.max() > HIGHEST:
            problem = f"has values up to {maps.high_res.max():.4g}; divide each map by its maximum"
        else:
            kept.append(item.id)
            digests[item.id] = digest_file(path)
            continue
        skipped.append(Skip(item.id, f"the map {path} {problem}"))
    if not kept:
        reason = skipped[0].reason
        if not map_path(folder, skipped[0].id).is_file() and any(folder.rglob("*.npy")):
            reason = (
                f"{folder} holds .npy files of another program; import them first: lpcam import "
                f"maps {shlex.quote(str(folder))} FOLDER --data PATH"
            )
        raise DataError(
            f"no image of the list {run.recipe.data.list_of('maps')!r} can be refined: {reason}"
        )
    if unlabelled:
        logger.info(
            "%d images are left out: their maps are of classes that they are not labelled with",
            unlabelled,
        )
    run.dataset = run.dataset.without(skipped)
    run.given = Given(folder, digest_json(digests))


# -- Ternary labels ----------------------------------------------------------------------------


def write_ternary(
    run: Run,
    name: str,
    title: str,
    maps: Path,
    key: str,
    thresholds: tuple[float, float],
    settings: CrfSettings,
    items: Sequence[Item],
) -> bool:
    """Ternary labels of one kind of maps, as the stage ``name``; whether any were to be made."""
    stage = run.stages[name] = Stage(
        run.folder / name,
        {
            "revision": 1,
            "maps": key,
            "thresholds": list(thresholds),
            "crf": settings.model_dump(mode="json", exclude={"preset"}),
            "mask_ids": list(run.dataset.classes.mask_ids),
            "maximum_side": run.recipe.maps.maximum_side,
            "images": run.digest(items),
        },
    )
    if stage.done([label_path(stage.folder, item) for item in items]):
        return False
    run.begin(stage)
    _label(run, title, maps, thresholds, settings, stage, items)
    run.finish(stage)
    return True


def label_path(folder: Path, item: Item) -> Path:
    """Where a stage keeps the mask of an image."""
    return folder / f"{item.id}.png"


def _label(
    run: Run,
    title: str,
    folder: Path,
    thresholds: tuple[float, float],
    settings: CrfSettings,
    stage: Stage,
    items: Sequence[Item],
) -> None:
    from lpcam.refine.crf import DenseCrf  # noqa: PLC0415
    from lpcam.refine.ternary import crf_labels, ternary  # noqa: PLC0415

    crf = DenseCrf(settings, memory=crf_memory(run))

    @torch.inference_mode()
    def make(item: Item) -> None:
        path = label_path(stage.folder, item)
        if path.is_file():
            return
        maps = read_maps(map_path(folder, item.id))
        image, planes = refined_at(run, item, maps)
        labels = ternary(*crf_labels(crf, image, planes, thresholds)).cpu()
        labels = enlarge_labels(labels, maps.high_res.shape[-2:])
        unsure = labels == IGNORE
        mask = to_mask(labels.masked_fill(unsure, 0), maps.keys, run.dataset.classes)
        mask[unsure.numpy()] = IGNORE
        write_mask(path, mask)

    each(run, title, items, make)


def refined_at(run: Run, item: Item, maps: MapFile) -> tuple[Tensor, Tensor]:
    """Image (H, W, 3) and maps (K, H, W) at the size of refinement, on the run's device.

    That is the image's own, or that at which it was mapped where ``maps.maximum_side`` says so: a
    dense CRF of an image of 4,000 pixels a side would take 7 GB.
    """
    image = limit_long_side(read_image(item.image), run.recipe.maps.maximum_side)
    planes = _resized(torch.from_numpy(maps.high_res), image.shape[:2])
    return torch.from_numpy(image).to(run.device), planes.to(run.device)


def _resized(planes: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (K, H, W) at another size (bilinear)."""
    if tuple(planes.shape[-2:]) == tuple(size) or not len(planes):
        return planes if len(planes) else planes.new_zeros(0, *size)
    return F.interpolate(planes[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def crf_memory(run: Run) -> int | None:
    """Bytes that the CRF of one image may need: its thread's part; on a GPU what is free."""
    return memory_of_an_image(run.device, run.sharing.workers * run.processes.here)


def each(run: Run, label: str, items: Sequence[Item], make: Callable[[Item], None]) -> None:
    """Make what this process has to make of some images, with progress and named errors."""

    def named(item: Item) -> None:
        try:
            make(item)
        except LpcamError as error:
            raise type(error)(
                f"{label}, image {item.id!r}: {error}; where memory is short lower "
                "maps.maximum_side or run.threads, else mend the image or its map, or leave it out "
                "of the list"
            ) from error

    mine = run.sharing.mine(items)
    with progress(label, len(mine)) as advance:
        for _ in run.sharing.map(named, mine):
            advance(1, "")


def network_path(stage: Stage) -> Path:
    """Where the trained network of a source is, IRN's or PSA's."""
    return stage.folder / f"{stage.folder.parent.name}.safetensors"


# -- Pseudo masks ------------------------------------------------------------------------------


def write_pseudo_masks(run: Run) -> bool:
    """Refined maps and pseudo masks of every image, for the whole list that has maps."""
    items, worked = run.items("maps"), False
    for source in sources(run):
        stage = run.stages[f"{PSEUDO}/{source.name}"] = Stage(
            run.folder / PSEUDO / source.name, _pseudo_parts(run, source, items)
        )
        outputs = [label_path(stage.folder, item) for item in items]
        outputs += [map_path(stage.folder / MAPS, item.id) for item in items]
        if not stage.done(outputs):
            worked = True
            run.begin(stage)
            _refine(run, source, stage, items)
            run.finish(stage)
    return worked


def _pseudo_parts(run: Run, source: Source, items: Sequence[Item]) -> dict[str, Any]:
    section = refine_section(run)
    parts: dict[str, Any] = {
        "revision": 2,
        "method": section.method,
        "maps": source.key,
        "threshold": pseudo_threshold(section, source),
        "mask_ids": list(run.dataset.classes.mask_ids),
        "maximum_side": run.recipe.maps.maximum_side,
        "dtype": run.recipe.maps.dtype,
        "images": run.digest(items),
    }
    if section.method == "irn":
        parts["network"] = run.stages[f"{IRN}/{source.name}"].output["digest"]
        settings = section.irn.model_dump(mode="json")
        walk = ("walk_radius", "beta", "exponent", "tolerance", "sharpness")
        return parts | {name: settings[name] for name in walk}
    if section.method == "psa":
        parts["network"] = run.stages[f"{PSA}/{source.name}"].output["digest"]
        settings = section.psa.model_dump(mode="json")
        walk = ("radius", "beta", "exponent", "tolerance", "threshold")
        return parts | {name: settings[name] for name in walk}
    own = {"crf": section.crf, "pamr": section.pamr, "saliency": section.saliency}[section.method]
    parts["settings"] = own.model_dump(mode="json", exclude={"preset"})
    if section.method == "saliency":
        if section.saliency.crf:
            parts["crf"] = CrfSettings.from_preset("edam").model_dump(mode="json")
        return parts | {"saliency": _saliency_key(run, items)}
    return parts | {"seed_threshold": source.seed_threshold}


def pseudo_threshold(section: RefineSection, source: Source) -> float:
    """Of the refined maps: above it is foreground."""
    if section.method == "irn":
        return source.threshold
    return source.seed_threshold if section.method == "pamr" else DECIDED


DECIDED = 0.5
"""Where a class is likelier than the background: p / (p + p of the background) above it."""


def _refine(run: Run, source: Source, stage: Stage, items: Sequence[Item]) -> None:
    section = refine_section(run)
    makers = {"irn": _walker, "crf": _crf, "pamr": _pamr, "psa": _psa, "saliency": _fusion}
    refine = makers[section.method](run, source, stage)
    threshold = pseudo_threshold(section, source)

    @torch.inference_mode()
    def make(item: Item) -> None:
        path, refined = label_path(stage.folder, item), map_path(stage.folder / MAPS, item.id)
        if path.is_file() and refined.is_file():
            return
        maps = read_maps(map_path(source.folder, item.id))
        quarter, full = refine(item, maps)
        write_maps(
            refined,
            MapFile(
                maps.keys,
                _resized(quarter, maps.cam.shape[-2:]).float().cpu().numpy(),
                _resized(full, maps.high_res.shape[-2:]).float().cpu().numpy(),
                {"stage": stage.key},
            ),
            dtype=run.recipe.maps.dtype,
        )
        # From the file's own rounded values, so that masks and scores of the maps agree.
        planes = torch.from_numpy(read_maps(refined).high_res)
        write_mask(path, to_mask(seeds(planes, threshold), maps.keys, run.dataset.classes))

    each(run, f"pseudo masks of {source.method}", items, make)


def _walker(run: Run, source: Source, stage: Stage) -> Any:
    from lpcam.refine.irn import (  # noqa: PLC0415
        Irn,
        boundary_maps,
        propagate,
        pseudo_maps,
    )

    settings = refine_section(run).irn
    network = Irn.load(network_path(run.stages[f"{IRN}/{source.name}"])).to(run.device).folded()

    def refine(item: Item, maps: MapFile) -> tuple[Tensor, Tensor]:
        image = limit_long_side(read_image(item.image), run.recipe.maps.maximum_side)
        boundary = boundary_maps(network, image[None])[0]
        write_plane(boundary_path(stage, item), boundary.cpu().numpy())
        sources = _resized(torch.from_numpy(maps.cam), boundary.shape).to(run.device)
        walked = propagate(sources, boundary, settings)
        full = pseudo_maps(walked, (image.shape[0], image.shape[1]))
        top = walked.max() if walked.numel() else walked.new_ones(())
        return walked / top if float(top) > 0 else walked, full

    return refine


def boundary_path(stage: Stage, item: Item) -> Path:
    """Where IRN's boundaries of an image are, 0 to 255, at a quarter of its size."""
    return stage.folder / BOUNDARIES / f"{item.id}.png"


def _crf(run: Run, source: Source, stage: Stage) -> Any:
    from lpcam.refine.crf import DenseCrf  # noqa: PLC0415

    crf = DenseCrf(refine_section(run).crf, memory=crf_memory(run))

    def refine(item: Item, maps: MapFile) -> tuple[Tensor, Tensor]:
        image, planes = refined_at(run, item, maps)
        if not len(planes):
            return planes, planes
        hard = seeds(planes, source.seed_threshold)
        marginals = crf.refine_labels(image, hard, len(planes) + 1)
        full = decided(marginals)
        return full, full

    return refine


def decided(scores: Tensor) -> Tensor:
    """Maps (K, H, W) above `DECIDED` where a class has the highest of scores (K + 1, H, W).

    The background's scores come first. A map is p / (p + p of the background); only the likeliest
    class of a pixel has one, for near 1 the others would be told apart by rounding.
    """
    classes, background = scores[1:], scores[:1]
    tiny = torch.finfo(scores.dtype).tiny
    full = classes / (classes + background).clamp_min(tiny)
    return torch.where(classes == classes.amax(0), full, 0)


def _psa(run: Run, source: Source, _: Stage) -> Any:
    from lpcam.refine.psa import Psa, walk  # noqa: PLC0415

    settings = refine_section(run).psa
    network = Psa.load(network_path(run.stages[f"{PSA}/{source.name}"])).to(run.device).folded()

    def refine(item: Item, maps: MapFile) -> tuple[Tensor, Tensor]:
        image, planes = refined_at(run, item, maps)
        if not len(planes):
            return planes, planes
        full = decided(walk(network, image.cpu().numpy(), planes, settings))
        return full, full

    return refine


SALIENCY_REVISION = 1
"""Of the saliency that is computed."""


def check_saliency(run: Run) -> None:
    """Refuse, before any work, saliency maps that are missing.

    Raises:
        DataError: naming the folder and the first image without one.
    """
    section, source = run.recipe.refine, run.recipe.data.saliency
    if section is not None and section.method == "saliency" and isinstance(source, Path):
        from lpcam.data.saliency import (  # noqa: PLC0415
            find_saliency,
            read_values,
            saliency_maximum,
        )

        paths = find_saliency(source, (item.id for item in run.items("maps"))).values()
        top = saliency_maximum(paths)
        for _ in run.sharing.map(lambda path: read_values(path, maximum=top), list(paths)):
            pass


def _saliency_key(run: Run, items: Sequence[Item]) -> Any:
    source = run.recipe.data.saliency
    if not isinstance(source, Path):
        return {"computed": SALIENCY_REVISION}
    from lpcam.data.saliency import find_saliency  # noqa: PLC0415

    paths = find_saliency(source, (item.id for item in items))
    return digest_json([digest_file(path) for path in paths.values()])


def _fusion(run: Run, _: Source, __: Stage) -> Any:
    from lpcam.data.saliency import (  # noqa: PLC0415
        find_saliency,
        read_saliency,
        saliency_maximum,
    )
    from lpcam.refine.crf import DenseCrf  # noqa: PLC0415
    from lpcam.refine.saliency_fusion import fuse_saliency  # noqa: PLC0415
    from lpcam.refine.saliency_maps import saliency  # noqa: PLC0415

    settings, folder = refine_section(run).saliency, run.recipe.data.saliency
    crf = top = None
    if isinstance(folder, Path):
        paths = find_saliency(folder, (item.id for item in run.items("maps")))
        top = saliency_maximum(paths.values())
    if settings.crf:
        crf = DenseCrf(CrfSettings.from_preset("edam"), memory=crf_memory(run))

    def refine(item: Item, maps: MapFile) -> tuple[Tensor, Tensor]:
        image, planes = refined_at(run, item, maps)
        if not len(planes):
            return planes, planes
        size = (image.shape[0], image.shape[1])
        if isinstance(folder, Path):
            levels = torch.from_numpy(read_saliency(folder, item.id, size, maximum=top))
        else:
            levels = saliency(image.cpu())
        fused = fuse_saliency(
            planes, levels.to(run.device), settings, crf=None if crf is None else (image, crf)
        )
        numbers = torch.arange(1, len(planes) + 1, device=fused.device)
        full = (fused == numbers[:, None, None]).to(planes)
        return full, full

    return refine


def _pamr(run: Run, source: Source, stage: Stage) -> Any:
    from lpcam.refine.pamr import pamr  # noqa: PLC0415

    settings = refine_section(run).pamr

    def refine(item: Item, maps: MapFile) -> tuple[Tensor, Tensor]:
        image, planes = refined_at(run, item, maps)
        if not len(planes):
            return planes, planes
        full = pamr(image, planes, settings)
        return full, full

    return refine


def refined(run: Run) -> Mapping[str, tuple[Source, Stage]]:
    """The refined maps by the name of their method, such as "LPCAM + IRN"."""
    if run.recipe.refine is None or run.given_masks is not None:
        return {}
    return {
        refined_title(run.recipe.refine, source.method): (
            source,
            run.stages[f"{PSEUDO}/{source.name}"],
        )
        for source in sources(run)
    }


def refined_title(section: RefineSection, method: str) -> str:
    """Of a row: ``LPCAM + IRN``, ``LPCAM + saliency``."""
    acronym = section.method in ("irn", "crf", "pamr", "psa")
    return f"{method} + {section.method.upper() if acronym else section.method}"
