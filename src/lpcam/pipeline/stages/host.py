"""The maps of a host: its masks to learn from, its networks, its prototypes, its maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lpcam.classifiers.classifier import RANDOM
from lpcam.classifiers.settings import BackboneSection
from lpcam.data.dataset import Item
from lpcam.data.images import limit_long_side
from lpcam.data.map_files import map_path
from lpcam.data.masks import read_index_mask
from lpcam.hosts.base import Arm, Base, HostData, HostSection, View
from lpcam.method.prototypes import Prototypes
from lpcam.pipeline.cache import Output, Record, Result, Task
from lpcam.pipeline.context import Context, one_network, required
from lpcam.pipeline.run_folder import RESULTS, mask_path
from lpcam.pipeline.stages.classify import validation
from lpcam.pipeline.stages.judge import judged
from lpcam.pipeline.stages.maps import write_fused
from lpcam.pipeline.stages.prototypes import BLANK, check_memory, make, selected_key
from lpcam.pipeline.stages.refine import image_memory, label_task
from lpcam.pipeline.stages.seeds import mask_task
from lpcam.refine.base import shifted
from lpcam.refine.crf import CrfSettings
from lpcam.refine.ternary import ternary_key, ternary_labeller
from lpcam.runtime.errors import ClassifierError, PrototypeError
from lpcam.training.loop import History
from lpcam.training.saved_network import SavedNetwork


def arms(context: Context) -> list[Arm]:
    """Maps that the recipe's host makes; empty without a host."""
    section = context.recipe.host
    return [] if section is None or not context.makes_maps else section.arms


def _networks(context: Context) -> dict[str, Base]:
    """The networks that are trained, and the maps whose masks each learns from."""
    return {a.network: "CAM" if a.prototypes else a.base for a in arms(context)}


def _backbone(context: Context) -> BackboneSection:
    """The section that names the network's backbone."""
    section = required(context.recipe.host)
    return context.recipe.classifier if section.backbone is None else section


def validate(context: Context) -> None:
    """Validate the host before any stage runs, unless its networks exist."""
    section, networks = required(context.recipe.host), _networks(context)
    if all(context.folder.network(f"host/{name}").is_file() for name in networks):
        return
    network = _build(context)
    if section.trained is not None:
        one_network("host", list(networks))
        network.take(section.trained)
    else:
        data = _data(context, next(iter(networks)))
        images, setting = section.host.images_per_step(network, data, section.settings)
        if images < context.processes.count:
            raise ClassifierError(
                f"{images} images a step cannot be shared among {context.processes.count} "
                f"processes; start fewer, or raise host.{section.method}.{setting}"
            )
    if section.clusters:
        _check_memory(context, network.eval())


def write_masks(context: Context) -> Iterator[Task]:
    """Ternary masks for hosts that learn from masks."""
    section, refine = required(context.recipe.host), context.recipe.refine
    wanted = context.items("maps")
    if section.clusters:
        wanted = [*wanted, *context.items("prototypes")]
    items = list({item.id: item for item in wanted}.values())
    crf = CrfSettings.from_preset("irn") if refine is None else refine.label_crf
    for name, base in _networks(context).items():
        thresholds = section.host.mask_thresholds(section.settings, base)
        if thresholds is not None:
            shift = context.own_threshold(base) - context.recipe.fixed_threshold(base)
            how = ([shifted(one, shift) for one in thresholds], context.dataset.classes)
            source = context.results[RESULTS[base]]
            yield label_task(
                context,
                {f"host-labels/{name}": (source, ternary_key(crf, *how), how[0])},
                f"masks for {section.host.title} from {base}",
                mask_path,
                partial(ternary_labeller, crf, image_memory(context), how[1]),
                items,
            )


def _masks(context: Context, network: str) -> Result | None:
    return context.results.get(f"host-labels/{network}")


def train_networks(context: Context) -> Iterator[Task]:
    """The host's networks."""
    section = required(context.recipe.host)
    host = section.host
    network = {
        "method": section.method,
        "backbone": _backbone(context).described(),
        "settings": host.network_key(section.settings),
        "classes": list(context.dataset.classes.names),
    }
    build = partial(_build, context)
    for name in _networks(context):
        path = context.folder.network(f"host/{name}")
        if section.trained is not None:
            yield context.given_task(f"host/{name}", network, path, build, section.trained)
            continue
        masks, data = _masks(context, name), _data(context, name)
        parts = {
            "revision": 1,
            **network,
            **_backbone(context).backbone_key(),
            "seed": context.recipe.run.seed,
        }
        if masks is None:
            parts["training"] = context.digest(data.images)
            parts["validation"] = context.digest(data.held_out)
        else:
            parts |= {"labels": masks.key, "images": context.digest(context.items("maps"))}

        def train(network: SavedNetwork, folder: Path, data: HostData = data) -> History:
            options = context.training_options(folder)
            return host.train(network, data, section.settings, **options)

        yield context.training_task(f"host/{name}", parts, path, build, train)


def _data(context: Context, network: str) -> HostData:
    section = required(context.recipe.host)
    images, held_out = (
        validation(context) if section.host.holds_out else (context.items("classify"), [])
    )
    folder, pairs = context.folder / f"host-labels/{network}", []
    if section.host.mask_thresholds(section.settings, _networks(context)[network]) is not None:
        pairs = [(item, mask_path(folder, item.id)) for item in context.items("maps")]
    return HostData(images, held_out, pairs, context.dataset.classes)


def _build(context: Context) -> SavedNetwork:
    """The untrained network, on the run's device."""
    section, chosen = required(context.recipe.host), _backbone(context)
    first = chosen.first_weights(context.recipe.run.seed)
    if section.trained is not None:
        first["weights"] = RANDOM
    names = context.dataset.classes.names
    network: SavedNetwork = section.host.build(chosen.spec(), names, section.settings, **first)
    return network.to(context.device)


def _load(context: Context, arm: Arm) -> SavedNetwork:
    path = context.folder.network(f"host/{arm.network}")
    network: SavedNetwork = required(context.recipe.host).host.load(path, context.device)
    return network


def _parts(context: Context, arm: Arm) -> Record:
    """Cache-key parts of everything that is made with an arm's network."""
    masks = _masks(context, arm.network)
    return {
        "revision": 1,
        "network": context.results[f"host/{arm.network}"].output["digest"],
        "labels": None if masks is None else masks.key,
        "maximum_side": context.recipe.maps.maximum_side,
    }


def cluster(context: Context) -> Iterator[Task]:
    """Prototypes of the host's own features, for arms that have them."""
    for arm in arms(context):
        if arm.prototypes:
            yield _cluster_task(context, required(context.recipe.host), arm)


@torch.inference_mode()
def _check_memory(context: Context, network: SavedNetwork) -> None:
    section = required(context.recipe.host)
    mask = torch.zeros(BLANK, BLANK, dtype=torch.int64, device=context.device)
    view = View(np.zeros((BLANK, BLANK, 3), np.uint8), (0,), mask)
    features, _ = section.host.local_features(network, view, section.settings)
    check_memory(context, required(section.lpcam), features)


def _cluster_task(context: Context, section: HostSection, arm: Arm) -> Task:
    settings, name = required(section.lpcam), f"host-prototypes/{arm.folder}"
    items, host = context.items("prototypes"), section.host
    parts = {
        **_parts(context, arm),
        "settings": settings.fitting,
        "host": host.maps_key(section.settings, arm),
        "features": context.recipe.maps.features,
        "seed": context.recipe.run.seed,
        "images": context.digest(items),
        **selected_key(context),
    }

    def prepare() -> SavedNetwork:
        network = _load(context, arm)
        _check_memory(context, network)
        return network

    def work(network: SavedNetwork, result: Result) -> Output | None:
        @torch.inference_mode()
        def local(batch: list[Item]) -> list[tuple[Tensor, Tensor]]:
            views = [_view(context, arm, item) for item in batch]
            return [host.local_features(network, view, section.settings) for view in views]

        scorer, label = host.scorer(network), f"local features of {arm.title}"
        trained = context.results[f"host/{arm.network}"].output
        try:
            return make(context, result, items, settings, local, scorer, trained, label)
        except PrototypeError as error:
            raise PrototypeError(
                f"{arm.title}: {error}. Here the features and maps are the host's own: train it "
                "longer, lower host.lpcam.tau, or set host.maps to [CAM]"
            ) from error

    return context.task(name, parts, [context.folder.prototypes(name)], work, prepare)


def write_maps(context: Context) -> Iterator[Task]:
    """The host's maps of every image, and seed masks of them."""
    section = required(context.recipe.host)
    for arm in arms(context):
        yield _map_task(context, section, arm)
        source, label = context.results[f"host-maps/{arm.folder}"], f"seeds of {arm.title}"
        yield from judged(context, arm.title, source)
        threshold = context.threshold(arm.title, section.settings.threshold)
        yield mask_task(context, f"host-seeds/{arm.folder}", label, source, threshold)


def _map_task(context: Context, section: HostSection, arm: Arm) -> Task:
    made = context.results.get(f"host-prototypes/{arm.folder}")
    parts = {
        **_parts(context, arm),
        "prototypes": None if made is None else made.output["digest"],
        "settings": section.host.maps_key(section.settings, arm),
        "dtype": context.recipe.maps.dtype,
    }

    def start(result: Result) -> Callable[[Item], None]:
        network, vectors = _load(context, arm), None
        if made is not None:
            fingerprint = context.results[f"host/{arm.network}"].output["fingerprint"]
            (path,) = made.files
            found = Prototypes.load(path, fingerprint=fingerprint)
            vectors = found.vectors().to(context.device)

        def make_maps(item: Item) -> None:
            maps = None
            if item.labels:
                view = _view(context, arm, item)
                maps = section.host.maps(network, view, section.settings, vectors)
            write_fused(context, result, item, maps)

        return make_maps

    name, label = f"host-maps/{arm.folder}", f"maps of {arm.title}"
    return context.image_task({name: parts}, label, context.items("maps"), [map_path], start)


def _view(context: Context, arm: Arm, item: Item) -> View:
    """An image at the size at which it is mapped, with its ternary mask (PIL nearest)."""
    image = limit_long_side(item.read(), context.recipe.maps.maximum_side)
    masks = _masks(context, arm.network)
    if masks is None:
        return View(image, item.labels, None)
    mask = read_index_mask(mask_path(masks.folder, item.id))
    if mask.shape != image.shape[:2]:
        size = (image.shape[1], image.shape[0])
        mask = np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    return View(image, item.labels, torch.from_numpy(mask.astype(np.int64)).to(context.device))


def described(context: Context) -> dict[str, object]:
    """The host, its settings and its backbone, for the protocol of scores."""
    section = required(context.recipe.host)
    found = section.model_dump(mode="json", include={"method", section.method, "lpcam"})
    if section.host.mask_thresholds(section.settings, "LPCAM") is not None:
        refine = context.recipe.refine
        found["labels_crf"] = "irn" if refine is None else refine.label_crf.preset
    chosen = _backbone(context)
    return {**found, **chosen.described(), "weights": Path(chosen.weights).name}
