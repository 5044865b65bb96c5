"""The maps of a host: its masks to learn from, its networks, its prototypes, its maps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lpcam.classifiers.settings import BackboneSection
from lpcam.data.dataset import Item
from lpcam.data.images import limit_long_side, read_image
from lpcam.data.map_files import map_path
from lpcam.data.masks import read_index_mask
from lpcam.hosts.base import Arm, Base, HostData, HostSection, View
from lpcam.method.prototypes import Prototypes
from lpcam.pipeline.cache import Output, StageCache, Task
from lpcam.pipeline.context import Context
from lpcam.pipeline.run_folder import mask_path
from lpcam.pipeline.stages.classify import validation
from lpcam.pipeline.stages.labels import ternary_task
from lpcam.pipeline.stages.maps import no_maps, write_fused
from lpcam.pipeline.stages.prototypes import check_memory, make
from lpcam.pipeline.stages.seeds import RESULTS, mask_task
from lpcam.pipeline.stages.training import training_options, training_task
from lpcam.refine.crf import CrfSettings
from lpcam.runtime.errors import ClassifierError, PrototypeError
from lpcam.training.loop import History
from lpcam.training.saved_network import SavedNetwork


def section_of(context: Context) -> HostSection:
    """The recipe's section host; the stages of this module exist only with one."""
    assert context.recipe.host is not None
    return context.recipe.host


def arms(context: Context) -> list[Arm]:
    """Maps that the recipe's host makes; empty without a host."""
    section = context.recipe.host
    return [] if section is None or not context.makes_maps else section.arms


def result_name(kind: str, arm: Arm) -> str:
    """Name of an arm's result, such as ``host-maps/amn_lpcam``."""
    return f"{kind}/{arm.folder}"


def networks(context: Context) -> dict[str, Base]:
    """The networks that are trained, and the maps whose masks each learns from."""
    return {a.network: "CAM" if a.prototypes else a.base for a in arms(context)}


def backbone_section(context: Context) -> BackboneSection:
    """The section that names the network's backbone."""
    section = section_of(context)
    return context.recipe.classifier if section.backbone is None else section


def validate(context: Context) -> None:
    """Validate the host's configuration before any stage runs.

    Skipped where the networks exist: their stage knows whether they are up to date.

    Raises:
        ClassifierError: if the network cannot be built, or a step cannot be shared among the
            processes.
        DataError: if the host cannot learn from these images.
    """
    section = section_of(context)
    paths = [context.folder.network(f"host/{name}") for name in networks(context)]
    if all(path.is_file() for path in paths):
        return
    data = _data(context, next(iter(networks(context))))
    images, setting = section.host.images_per_step(_build(context), data, section.settings)
    if images < context.processes.count:
        raise ClassifierError(
            f"{images} images a step cannot be shared among {context.processes.count} processes; "
            f"start fewer, or raise host.{section.method}.{setting}"
        )


def write_masks(context: Context) -> Iterator[Task]:
    """Ternary masks for hosts that learn from masks."""
    section = section_of(context)
    items = context.items("maps")
    if section.clusters:
        items = [*items, *context.items("prototypes")]
    items = list({item.id: item for item in items}.values())
    refine = context.recipe.refine
    crf = CrfSettings.from_preset("irn") if refine is None else refine.label_crf
    for name, base in networks(context).items():
        thresholds = section.host.mask_thresholds(section.settings, base)
        if thresholds is not None:
            source = context.results[RESULTS[base]]
            label = f"masks for {section.host.title} from {base}"
            source_of = (source.folder, source.key)
            yield ternary_task(
                context, f"host-labels/{name}", label, *source_of, thresholds, crf, items
            )


def _masks(context: Context, network: str) -> StageCache | None:
    return context.results.get(f"host-labels/{network}")


def train_networks(context: Context) -> Iterator[Task]:
    """The host's networks."""
    section, host = section_of(context), section_of(context).host
    for name in networks(context):
        masks, data = _masks(context, name), _data(context, name)
        learnt_from = (
            {"training": context.digest(data.images), "validation": context.digest(data.held_out)}
            if masks is None
            else {"labels": masks.key, "images": context.digest(context.items("maps"))}
        )
        parts = {
            "revision": 1,
            "method": section.method,
            **backbone_section(context).backbone_key(),
            "settings": host.network_key(section.settings),
            "classes": list(context.dataset.classes.names),
            "seed": context.recipe.run.seed,
            **learnt_from,
        }

        def train(network: SavedNetwork, folder: Path, data: HostData = data) -> History:
            options = training_options(context, folder)
            return host.train(network, data, section.settings, **options)

        path = context.folder.network(f"host/{name}")
        yield training_task(context, f"host/{name}", parts, path, lambda: _build(context), train)


def _data(context: Context, network: str) -> HostData:
    section = section_of(context)
    images, held_out = (
        validation(context) if section.host.holds_out else (context.items("classify"), [])
    )
    folder, pairs = context.folder / f"host-labels/{network}", []
    if section.host.mask_thresholds(section.settings, networks(context)[network]) is not None:
        pairs = [(item, mask_path(folder, item.id)) for item in context.items("maps")]
    return HostData(images, held_out, pairs, context.dataset.classes)


def _build(context: Context) -> SavedNetwork:
    """The untrained network, on the run's device."""
    section, chosen = section_of(context), backbone_section(context)
    first = chosen.first_weights(context.recipe.run.seed)
    names = context.dataset.classes.names
    network: SavedNetwork = section.host.build(chosen.spec(), names, section.settings, **first)
    return network.to(context.device)


def _load(context: Context, arm: Arm) -> SavedNetwork:
    path = context.folder.network(f"host/{arm.network}")
    if context.loaded_network is None or context.loaded_network[0] != path:
        network = section_of(context).host.load(path, context.device)
        context.loaded_network = (path, network)  # one at a time is used
    found: SavedNetwork = context.loaded_network[1]
    return found


def cluster(context: Context) -> Iterator[Task]:
    """Prototypes of the host's own features, for arms that have them."""
    section = section_of(context)
    for arm in arms(context):
        if arm.prototypes:
            yield _cluster_task(context, section, arm)


def _cluster_task(context: Context, section: HostSection, arm: Arm) -> Task:
    settings, name = section.lpcam, result_name("host-prototypes", arm)
    assert settings is not None  # the recipe says so where an arm has prototypes
    items = context.items("prototypes")
    trained, masks = context.results[f"host/{arm.network}"], _masks(context, arm.network)
    parts = {
        "revision": 1,
        "network": trained.output["digest"],
        "labels": None if masks is None else masks.key,
        "settings": settings.fitting.model_dump(mode="json"),
        "host": section.host.maps_key(section.settings, arm),
        "features": context.recipe.maps.features,
        "seed": context.recipe.run.seed,
        "maximum_side": context.recipe.maps.maximum_side,
        "images": context.digest(items),
    }

    def prepare() -> SavedNetwork:
        network = _load(context, arm)
        channels = section.host.scorer(network)[0].shape[1]
        check_memory(context, settings, (len(context.dataset.classes), channels))
        return network

    def work(network: SavedNetwork, cache: StageCache) -> Output | None:
        @torch.inference_mode()
        def local(batch: list[Item]) -> list[tuple[Tensor, Tensor]]:
            views = [_view(context, arm, item) for item in batch]
            return [section.host.local_features(network, v, section.settings) for v in views]

        weight, bias = section.host.scorer(network)
        fingerprint, label = trained.output["fingerprint"], f"local features of {arm.title}"
        try:
            return make(
                *(context, cache, items, settings, local, weight, fingerprint),
                label=label,
                bias=bias,
            )
        except PrototypeError as error:
            raise PrototypeError(
                f"{arm.title}: {error}. Here the features and maps are the host's own: train it "
                "longer, lower host.lpcam.tau, or set host.maps to [CAM]"
            ) from error

    return Task([context.result(name, parts, [context.folder.prototypes(name)])], work, prepare)


def write_maps(context: Context) -> Iterator[Task]:
    """The host's maps of every image, and seed masks of them."""
    section, items = section_of(context), context.items("maps")
    for arm in arms(context):
        yield _map_task(context, section, arm, items)
        source = context.results[result_name("host-maps", arm)]
        yield mask_task(
            context,
            result_name("host-seeds", arm),
            f"seeds of {arm.title}",
            source,
            section.settings.threshold,
            items,
        )


def _map_task(context: Context, section: HostSection, arm: Arm, items: list[Item]) -> Task:
    name = result_name("host-maps", arm)
    made = context.results.get(result_name("host-prototypes", arm))
    masks = _masks(context, arm.network)
    parts = {
        "revision": 1,
        "network": context.results[f"host/{arm.network}"].output["digest"],
        "labels": None if masks is None else masks.key,
        "prototypes": None if made is None else made.output["digest"],
        "settings": section.host.maps_key(section.settings, arm),
        "dtype": context.recipe.maps.dtype,
        "maximum_side": context.recipe.maps.maximum_side,
        "images": context.digest(items),
    }

    def work(cache: StageCache) -> None:
        network, vectors = _load(context, arm), _vectors(context, arm)

        @torch.inference_mode()
        def map_one(item: Item) -> None:
            if map_path(cache.folder, item.id).is_file():
                return
            maps = no_maps(context.sharing.sizes[item.id])
            if item.labels:
                view = _view(context, arm, item)
                maps = section.host.maps(network, view, section.settings, vectors)
            write_fused(context, cache, item, maps)

        context.each(f"maps of {arm.title}", items, map_one)

    paths = [map_path(context.folder / name, item.id) for item in items]
    return Task([context.result(name, parts, paths)], work)


def _vectors(context: Context, arm: Arm) -> Tensor | None:
    if not arm.prototypes:
        return None
    fingerprint = context.results[f"host/{arm.network}"].output["fingerprint"]
    path = context.folder.prototypes(result_name("host-prototypes", arm))
    return Prototypes.load(path, fingerprint=fingerprint).vectors().to(context.device)


def _view(context: Context, arm: Arm, item: Item) -> View:
    """An image at the size at which it is mapped, with its ternary mask (PIL nearest)."""
    image = limit_long_side(read_image(item.image), context.recipe.maps.maximum_side)
    masks = _masks(context, arm.network)
    if masks is None:
        return View(image, item.labels, None)
    mask = read_index_mask(mask_path(masks.folder, item.id))
    if mask.shape != image.shape[:2]:
        size = (image.shape[1], image.shape[0])
        mask = np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    return View(image, item.labels, torch.from_numpy(mask.astype(np.int64)).to(context.device))


def described(context: Context) -> dict[str, object]:
    """The host, its settings and its backbone, for the protocol of figures."""
    section = section_of(context)
    found = section.model_dump(mode="json", include={"method", section.method, "lpcam"})
    if section.host.mask_thresholds(section.settings, "LPCAM") is not None:
        refine = context.recipe.refine
        found["labels_crf"] = "irn" if refine is None else refine.label_crf.preset
    chosen = backbone_section(context)
    return {**found, **chosen.described(), "weights": Path(chosen.weights).name}
