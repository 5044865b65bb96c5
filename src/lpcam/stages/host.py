"""Maps of a host, AMN, MCTformer or EDAM: its labels, its network, its prototypes, its maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lpcam.data.images import limit_long_side, read_image, read_index_mask
from lpcam.data.items import Item
from lpcam.errors import ClassifierError, PrototypeError
from lpcam.functional import FusedMaps
from lpcam.ledger import Stage
from lpcam.presets import AmnSettings, CrfSettings, LpcamSettings
from lpcam.recipe import ClassifierSection, HostSection, MapName
from lpcam.stages.classify import validation
from lpcam.stages.context import Run, remove_leftovers
from lpcam.stages.maps import at_size, no_maps
from lpcam.stages.prototypes import check_memory, gather
from lpcam.stages.refine import HOST_MAPS, each, folder_name, label_path, write_ternary
from lpcam.stages.seeds import write_masks_of_maps
from lpcam.stages.training import (
    BACKBONE,
    backbone_parts,
    backbone_spec,
    first_weights,
    train_network,
    training_options,
)
from lpcam.storage import MapFile, digest_file, map_path, write_maps
from lpcam.version import versions

LABELS = "host-labels"
HOST = "host"
PROTOTYPES = "host-prototypes"
MAPS = HOST_MAPS
SEEDS = "host-seeds"
"""Masks of the maps at their fixed threshold; made with the maps, as a stage of their own."""
NETWORK = "network.safetensors"
_OF_MAPS = {"scales", "flip", "gate", "attention_blocks", "fusion", "affinity"}
"""What of a host's settings its maps hang on, and its network does not."""
_OF_PROTOTYPES = {"reading", "conditioned", "split_maps"}
"""What only maps of its own features hang on, beside."""
_OF_LABELS = {
    *("foreground_threshold", "background_threshold"),
    *("cam_foreground_threshold", "cam_background_threshold"),
}
"""What of AMN's settings is in the key of its labels already."""


@dataclass(frozen=True)
class Arm:
    """One kind of maps that the host makes."""

    title: MapName
    base: Literal["CAM", "LPCAM"]
    network: str
    """Name of the network's folder."""
    prototypes: bool
    """Whether its maps are those of prototypes of the network's own features."""

    @property
    def name(self) -> str:
        """Of the folders."""
        return folder_name(self.title)


def host_section(run: Run) -> HostSection:
    """The recipe's section; there is one where a stage of this module has anything to do."""
    assert run.recipe.host is not None
    return run.recipe.host


def arms(run: Run) -> list[Arm]:
    """The maps that the recipe wants of its host; none where it has no host."""
    section = run.recipe.host
    if section is None or not run.makes_maps:
        return []
    found = []
    taught_by_each = section.method == "amn" and section.amn.reading == "teacher"
    for title, base in section.arms.items():
        own = base == "LPCAM" and section.clusters
        network = folder_name(title) if taught_by_each else section.method
        found.append(Arm(title, base, network, own))
    return found


def networks(run: Run) -> dict[str, Literal["CAM", "LPCAM"]]:
    """The networks that are trained, and whose maps teach each of them (of AMN alone)."""
    return {a.network: "CAM" if a.prototypes else a.base for a in arms(run)}


def rehearse_host(run: Run) -> None:
    """Refuse, before the stages that come first, what only the host's training would find.

    Nothing is done where its networks are there: their stages know whether they still hold.

    Raises:
        ClassifierError: if the network or its weights cannot be had, a prefix to freeze matches
            nothing, or a batch cannot be shared out.
        DataError: if EDAM has no pair of images.
    """
    section = host_section(run)
    if all((run.folder / HOST / name / NETWORK).is_file() for name in networks(run)):
        return
    from lpcam.train import names_below  # noqa: PLC0415

    network, count = _build(run), len(_lists(run)[0])
    size = section.edam.pairs
    if section.method == "mctformer":
        from lpcam.hosts.mctformer import check_blocks  # noqa: PLC0415

        size = section.mctformer.batch_size
        check_blocks(network, section.mctformer)
    else:
        prefixes = section.edam.freeze
        if section.method == "amn":
            size, count, prefixes = (
                section.amn.batch_size,
                len(run.items("maps")),
                section.amn.freeze,
            )
        names_below(dict(network.classifier.backbone.named_parameters()), prefixes)
    if section.method == "edam":
        from lpcam.hosts.edam import Partners  # noqa: PLC0415

        count = len(Partners(_lists(run)[0]).firsts)
    if min(size, count) < run.processes.count:
        what = "pairs" if section.method == "edam" else "batch_size"
        raise ClassifierError(
            f"{min(size, count)} images a step cannot be shared out among {run.processes.count} "
            f"processes; start fewer, or raise host.{section.method}.{what}"
        )


# -- What AMN learns from ----------------------------------------------------------------------


def write_host_labels(run: Run) -> bool:
    """Ternary labels that teach AMN (specification of AMN, section 1); whether any were made."""
    section, worked = host_section(run), False
    if section.method != "amn":
        return False
    items, settings = _labelled(run), section.amn
    crf = CrfSettings.from_preset("irn") if run.recipe.refine is None else run.recipe.refine.crf
    for name, base in networks(run).items():
        source = run.stages_of_methods[base]
        thresholds = (
            (settings.cam_foreground_threshold, settings.cam_background_threshold)
            if base == "CAM"
            else (settings.foreground_threshold, settings.background_threshold)
        )
        worked |= write_ternary(
            run,
            f"{LABELS}/{name}",
            f"labels of AMN from {base}",
            source.folder,
            source.key,
            thresholds,
            crf,
            items,
        )
    return worked


def _labelled(run: Run) -> list[Item]:
    """Images with labels of AMN: those that get maps, and those whose features are clustered."""
    items = run.items("maps")
    if host_section(run).clusters:
        items = [*items, *run.items("prototypes")]
    return list({item.id: item for item in items}.values())


# -- The networks ------------------------------------------------------------------------------


def train_host(run: Run) -> bool:
    """The host's networks; whether there was anything to do."""
    section, worked = host_section(run), False
    training, held_out = _lists(run)
    for name in networks(run):
        labels = run.stages.get(f"{LABELS}/{name}")
        stage = run.stages[f"{HOST}/{name}"] = Stage(
            run.folder / HOST / name,
            {
                "revision": 1,
                "method": section.method,
                **backbone_parts(_backbone_section(run)),
                "settings": section.settings.model_dump(
                    mode="json",
                    exclude={"preset", "threshold", *_OF_MAPS, *_OF_PROTOTYPES, *_OF_LABELS},
                ),
                "classes": list(run.dataset.classes.names),
                "seed": run.recipe.run.seed,
                **(
                    {"training": run.digest(training), "validation": run.digest(held_out)}
                    if labels is None
                    else {"labels": labels.key, "images": run.digest(run.items("maps"))}
                ),
            },
        )
        build = partial(_build, run)
        train = partial(_train, run, stage, labels, training, held_out)
        worked |= train_network(run, stage, stage.folder / NETWORK, build, train)
    return worked


def _lists(run: Run) -> tuple[list[Item], list[Item]]:
    """Images that train MCTformer or EDAM, and those on which MCTformer is measured meanwhile."""
    if host_section(run).method == "edam":
        return run.items("classify"), []  # nothing of it is measured, so it learns from all
    return validation(run)


def _backbone_section(run: Run) -> HostSection | ClassifierSection:
    """The section that names the network's backbone."""
    section = host_section(run)
    return run.recipe.classifier if section.backbone is None else section


def built(run: Run) -> dict[str, Any]:
    """What the network is built of, for the protocol."""
    chosen = _backbone_section(run)
    return {
        **chosen.model_dump(mode="json", include=BACKBONE),
        "weights": Path(chosen.weights).name,
    }


def _build(run: Run) -> Any:
    """The untrained network, on the run's device."""
    section, chosen = host_section(run), _backbone_section(run)
    names, spec, first = (
        run.dataset.classes.names,
        backbone_spec(chosen),
        first_weights(run, chosen),
    )
    network: Any
    if section.method == "mctformer":
        from lpcam.hosts.mctformer import build_mctformer  # noqa: PLC0415

        network = build_mctformer(
            spec.name, names, section.mctformer, arguments=spec.arguments, **first
        )
    elif section.method == "amn":
        from lpcam.hosts.amn import build_amn  # noqa: PLC0415

        network = build_amn(spec, names, section.amn, **first)
    else:
        from lpcam.hosts.edam import build_edam  # noqa: PLC0415

        network = build_edam(spec, names, section.edam, **first)
    return network.to(run.device)


def _train(
    run: Run,
    stage: Stage,
    labels: Stage | None,
    training: list[Item],
    held_out: list[Item],
    network: Any,
) -> list[dict[str, Any]]:
    section, shared = host_section(run), training_options(run, stage)
    if section.method == "amn":
        from lpcam.hosts.amn import train_amn  # noqa: PLC0415

        assert labels is not None
        labelled = [(item, label_path(labels.folder, item)) for item in run.items("maps")]
        return train_amn(network, labelled, run.dataset.classes, section.amn, **shared)
    if section.method == "mctformer":
        from lpcam.hosts.mctformer import train_mctformer  # noqa: PLC0415

        return train_mctformer(network, training, held_out, section.mctformer, **shared)
    from lpcam.hosts.edam import train_edam  # noqa: PLC0415

    return train_edam(network, training, section.edam, **shared)


def _load(run: Run, name: str) -> Any:
    """A trained network, in evaluation mode on the run's device; one for all stages."""
    loaded: dict[str, Any] = run.__dict__.setdefault("host_networks", {})
    if name not in loaded:
        path = run.stages[f"{HOST}/{name}"].folder / NETWORK
        method = host_section(run).method
        name_of_class = {"amn": "Amn", "mctformer": "Mctformer", "edam": "Edam"}[method]
        Network = getattr(import_module(f"lpcam.hosts.{method}"), name_of_class)  # noqa: N806
        loaded.clear()  # one at a time is used
        network = Network.load(path).to(run.device).eval()
        loaded[name] = network if method == "mctformer" else network.folded()
    return loaded[name]


# -- Prototypes of the host's own features -----------------------------------------------------


def cluster_host(run: Run) -> bool:
    """Prototypes of the host's own features, where LPCAM enters there; whether any were made."""
    worked = False
    items = run.items("prototypes")
    for arm in arms(run):
        if not arm.prototypes:
            continue
        network = run.stages[f"{HOST}/{arm.network}"]
        settings = _lpcam(run)
        stage = run.stages[f"{PROTOTYPES}/{arm.name}"] = Stage(
            run.folder / PROTOTYPES / arm.name,
            {
                "revision": 1,
                "network": network.output["digest"],
                "labels": _label_key(run, arm),
                "settings": settings.model_dump(
                    mode="json", exclude={"preset", "scales", "flip", "threshold", "cam_threshold"}
                ),
                "host": _map_settings(run, arm),
                "features": run.recipe.maps.features,
                "seed": run.recipe.run.seed,
                "maximum_side": run.recipe.maps.maximum_side,
                "images": run.digest(items),
            },
        )
        path = prototypes_path(stage)
        if stage.done([path]):
            continue
        worked = True
        loaded = _load(run, arm.network)
        weight, bias = loaded.constant_response()
        check_memory(run, settings, (len(run.dataset.classes), weight.shape[1]))
        run.begin(stage)
        reservoir, _ = gather(
            run,
            items,
            stage.folder,
            settings,
            partial(_local, run, arm, loaded),
            f"local features of {arm.title}",
        )
        output: dict[str, Any] = {}
        if run.processes.first:
            prototypes = _cluster(run, arm, stage, reservoir, settings, network, weight, bias)
            prototypes.save(path)
            output = {"digest": digest_file(path), "events": list(prototypes.events)}
        run.finish(stage, **output)
        if run.processes.first:
            remove_leftovers(stage.folder)
    return worked


def prototypes_path(stage: Stage) -> Path:
    """Where an arm's prototypes are."""
    return stage.folder / "prototypes.safetensors"


def _lpcam(run: Run) -> LpcamSettings:
    settings = host_section(run).lpcam
    assert settings is not None  # the recipe says so where there are prototypes
    return settings


def _map_settings(run: Run, arm: Arm) -> dict[str, Any]:
    used = _OF_MAPS | (_OF_PROTOTYPES if arm.prototypes else set())
    return host_section(run).settings.model_dump(mode="json", include=used)


def _label_key(run: Run, arm: Arm) -> str | None:
    labels = run.stages.get(f"{LABELS}/{arm.network}")
    return None if labels is None else labels.key


def _cluster(
    run: Run,
    arm: Arm,
    stage: Stage,
    reservoir: Any,
    settings: LpcamSettings,
    made: Stage,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> Any:
    from lpcam.prototypes import make_prototypes  # noqa: PLC0415

    try:
        return make_prototypes(
            reservoir,
            weight,
            run.dataset.classes.names,
            settings,
            seed=run.recipe.run.seed,
            bias=bias,
            fingerprint=made.output["fingerprint"],
            made_by={"stage": stage.key, "versions": versions()},
            workers=run.sharing.workers,
        )
    except PrototypeError as error:
        raise PrototypeError(
            f"{arm.title}: {error}. Here the features and maps are the host's own: train it longer "
            "(host.*.epochs), lower host.lpcam.tau, or set host.maps to [CAM]"
        ) from error


@torch.inference_mode()
def _local(
    run: Run, arm: Arm, network: Any, batch: list[Item]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [_local_features(run, arm, network, item, _image(run, item)) for item in batch]


def _local_features(
    run: Run, arm: Arm, network: Any, item: Item, image: NDArray[np.uint8]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (C, h, w) of one image and the maps (K, H, W) that split them."""
    section = host_section(run)
    if section.method == "mctformer":
        from lpcam.hosts.mctformer import local_features  # noqa: PLC0415

        return local_features(network, image, item.labels, section.mctformer)
    from lpcam.hosts import amn  # noqa: PLC0415

    seed = _seed(run, arm, item, image)
    return amn.local_features(network, image, item.labels, section.amn, seed=seed)


# -- Maps --------------------------------------------------------------------------------------


def map_host(run: Run) -> bool:
    """The host's maps of every image, and seeds of them; whether there was anything to do."""
    items, worked = run.items("maps"), False
    for arm in arms(run):
        made = run.stages.get(f"{PROTOTYPES}/{arm.name}")
        stage = run.stages[f"{MAPS}/{arm.name}"] = Stage(
            run.folder / MAPS / arm.name,
            {
                "revision": 1,
                "network": run.stages[f"{HOST}/{arm.network}"].output["digest"],
                "labels": _label_key(run, arm),
                "prototypes": None if made is None else made.output["digest"],
                "settings": _map_settings(run, arm),
                "dtype": run.recipe.maps.dtype,
                "maximum_side": run.recipe.maps.maximum_side,
                "images": run.digest(items),
            },
        )
        if not stage.done([map_path(stage.folder, item.id) for item in items]):
            worked = True
            run.begin(stage)
            _map(run, arm, stage, items)
            run.finish(stage)
        worked |= write_masks_of_maps(
            run,
            f"{SEEDS}/{arm.name}",
            f"seeds of {arm.title}",
            stage,
            host_section(run).settings.threshold,
            items,
        )
    return worked


def _map(run: Run, arm: Arm, stage: Stage, items: Sequence[Item]) -> None:
    maps_of = _mapper(run, arm)

    @torch.inference_mode()
    def make(item: Item) -> None:
        path = map_path(stage.folder, item.id)
        if path.is_file():
            return
        size = run.sharing.sizes[item.id]
        maps = maps_of(item, _image(run, item)) if item.labels else no_maps(size)
        fused = at_size(maps, size)
        write_maps(
            path,
            MapFile(
                np.array(item.labels, dtype=np.int64),
                fused.cam.float().cpu().numpy(),
                fused.high_res.float().cpu().numpy(),
                {"stage": stage.key},
            ),
            dtype=run.recipe.maps.dtype,
        )

    each(run, f"maps of {arm.title}", items, make)


def _mapper(run: Run, arm: Arm) -> Callable[[Item, NDArray[np.uint8]], FusedMaps]:
    section, network = host_section(run), _load(run, arm.network)
    vectors = None
    if arm.prototypes:
        from lpcam.prototypes import Prototypes  # noqa: PLC0415

        fingerprint = run.stages[f"{HOST}/{arm.network}"].output["fingerprint"]
        path = prototypes_path(run.stages[f"{PROTOTYPES}/{arm.name}"])
        vectors = Prototypes.load(path, fingerprint=fingerprint).vectors().to(run.device)
    if section.method == "mctformer":
        from lpcam.hosts import mctformer  # noqa: PLC0415

        return lambda item, image: mctformer.maps_of(
            network, image, item.labels, section.mctformer, vectors=vectors
        )
    if section.method == "edam":
        from lpcam.hosts import edam  # noqa: PLC0415

        return lambda item, image: edam.maps_of(network, image, item.labels, section.edam)
    from lpcam.hosts import amn  # noqa: PLC0415

    settings: AmnSettings = section.amn

    def of_amn(item: Item, image: NDArray[np.uint8]) -> FusedMaps:
        seed = _seed(run, arm, item, image)
        return amn.maps_of(network, image, item.labels, settings, seed=seed, vectors=vectors)

    return of_amn


def _image(run: Run, item: Item) -> NDArray[np.uint8]:
    """At the size at which images are mapped."""
    return limit_long_side(read_image(item.image), run.recipe.maps.maximum_side)


def _seed(run: Run, arm: Arm, item: Item, image: NDArray[np.uint8]) -> torch.Tensor | None:
    """The label that taught AMN, at the image's size (PIL nearest); None where it has no gate."""
    if not host_section(run).amn.gate:
        return None
    folder = run.stages[f"{LABELS}/{arm.network}"].folder
    mask = read_index_mask(label_path(folder, item))
    if mask.shape != image.shape[:2]:
        size = (image.shape[1], image.shape[0])
        mask = np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    return torch.from_numpy(mask.astype(np.int64)).to(run.device)
