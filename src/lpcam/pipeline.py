"""A run: classify, CAM, prototypes, LPCAM, seeds, evaluate, each once and each resumable.

Every stage is skipped when, and only when, its inputs and settings are unchanged; see
:mod:`lpcam.ledger`. Inputs are known by the digests of their contents.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from lpcam.data.check import check_images
from lpcam.data.folder import read_folder
from lpcam.data.images import read_image, read_index_mask, scaled_size
from lpcam.data.items import Dataset, Item
from lpcam.data.voc import read_voc
from lpcam.errors import ArtefactError, DataError, RecipeError
from lpcam.functional import FusedMaps
from lpcam.ledger import Stage, locked
from lpcam.masks import seeds, to_mask, write_mask
from lpcam.parallel import Sharing
from lpcam.processes import Processes, join
from lpcam.progress import progress
from lpcam.recipe import Method, Recipe
from lpcam.resources import available_memory, available_threads, reuse_freed_memory
from lpcam.storage import (
    MapFile,
    digest_file,
    digest_json,
    map_path,
    read_json,
    read_maps,
    write_bytes,
    write_json,
    write_maps,
)
from lpcam.version import versions

logger = logging.getLogger(__name__)

StageName = Literal["classify", "cam", "prototypes", "lpcam", "seeds", "evaluate"]
STAGES: tuple[StageName, ...] = ("classify", "cam", "prototypes", "lpcam", "seeds", "evaluate")
METHODS: tuple[Method, ...] = ("CAM", "LPCAM-F", "LPCAM")
HELD_OUT = 10
"""Every how many-th image is held out for the validation mAP where no list is named."""
FEATURE_KEYS = ("features", "precision", "maximum_side")
"""What of the recipe's maps section changes the features."""
GPU_BATCH = 8
GPU_THREADS = 4
"""On a GPU a few threads read and write while one computes."""
MEMORY_SHARE = 0.5
"""Of the memory that this process may use, where the recipe does not say how much."""
FEATURES_SHARE = 0.5
"""Of a run's memory for features that several stages need; the rest is for the reservoir."""
FILE_SECONDS = 60.0
"""How long a file that another machine has written may take to be seen."""
CHECKPOINT_SECONDS = 60.0
"""Between checkpoints of the reservoir of local features, at least."""
CHECKPOINT_SHARE = 10
"""And at least so many times what the last one took: it may hold all features of a list."""


@dataclass(frozen=True)
class RunResult:
    """What a run made."""

    folder: Path
    rows: list[dict[str, Any]]
    skipped: list[dict[str, str]]


def run(recipe: Recipe, *, until: StageName = "evaluate", command: str = "") -> RunResult:
    """Bring the run folder up to date, up to and including the stage ``until``.

    Sets the number of threads of torch and how the C library treats freed memory, for the whole
    process.

    Args:
        command: how the run was asked for, recorded in every figure's protocol.

    Raises:
        LpcamError: of a kind that says what was wrong with data, recipe, weights or artefacts.
    """
    processes, device = join(recipe.run.device)
    # The first process holds the folder for all of them.
    with locked(recipe.folder) if processes.first else contextlib.nullcontext():
        processes.wait()
        result = _Run(recipe, command, until, processes, device).up_to()
        processes.wait()
    return result


def read_dataset(recipe: Recipe) -> Dataset:
    """The data set of a recipe, labels read, images not yet.

    Raises:
        DataError: if folders, lists or labels do not fit together.
    """
    data = recipe.data
    names = {data.list_of(s) for s in ("classify", "prototypes", "maps", "evaluate")}
    if data.lists.validate_ is not None:
        names.add(data.lists.validate_)
    if data.kind == "voc":
        dataset = read_voc(data.root, lists=sorted(names), classes=data.classes)
    else:
        dataset = read_folder(data.root, classes=data.classes)
    for name in sorted(names):
        dataset.select(name)
    outside = set(dataset.lists[data.list_of("evaluate")]) - set(
        dataset.lists[data.list_of("maps")]
    )
    if outside:
        raise DataError(
            f"{len(outside)} images of the list to evaluate ({data.list_of('evaluate')!r}) are not "
            f"in the list that gets maps ({data.list_of('maps')!r}), e.g. {min(outside)!r}; set "
            "data.lists.maps to a list that holds them"
        )
    return dataset


class _Run:
    """One pass over the stages; each method is one stage."""

    def __init__(
        self,
        recipe: Recipe,
        command: str,
        until: StageName,
        processes: Processes,
        device: torch.device | None,
    ) -> None:
        self.recipe = recipe
        self.command = command
        self.until = until
        self.folder = recipe.folder
        self.processes = processes
        self.device = device or self._chosen_device()
        self.threads = recipe.run.threads or available_threads(processes.here)
        torch.set_num_threads(self.threads)
        reuse_freed_memory()
        self.seconds: dict[str, float] = {}
        path = self.folder / "recipe.yaml"
        if path.is_file() and not (self.folder / "index.json").is_file():
            raise ArtefactError(
                f"{path} was not written by a run, so it may be yours; choose another run folder "
                "with --run.folder"
            )
        self.dataset, self.records = self._index()
        self.sharing = self._sharing()
        self.rows: list[dict[str, Any]] = []
        resolved = yaml.safe_dump(
            recipe.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True
        ).encode()
        if processes.first and (not path.is_file() or path.read_bytes() != resolved):
            write_bytes(path, resolved)

    def up_to(self) -> RunResult:
        for name in STAGES[: STAGES.index(self.until) + 1]:
            started = time.monotonic()
            worked = getattr(self, f"_{name}")()
            self.seconds[name] = time.monotonic() - started
            if worked:
                logger.info("%s: done in %.1f s", name, self.seconds[name])
                if self.processes.first:
                    self._note_seconds(name)
            else:
                logger.info("%s: up to date", name)
        skipped = [{"id": s.id, "reason": s.reason} for s in self.dataset.skipped]
        return RunResult(self.folder, self.rows, skipped)

    def _note_seconds(self, name: str) -> None:
        path = self.folder / "seconds.json"
        seconds = read_json(path) if path.is_file() else {}
        write_json(path, {**seconds, name: round(self.seconds[name], 2)})

    def _begin(self, *stages: Stage) -> None:
        """Make stages' folders ready, when every process has seen that they are not done."""
        self.processes.wait()
        if self.processes.first:
            for stage in stages:
                stage.begin()
        self.processes.wait()

    def _finish(self, *stages: Stage, **output: Any) -> None:
        """Record the end of stages, when every process has done its share."""
        self.processes.wait()
        if self.processes.first:
            for stage in stages:
                stage.finish(**output)
        self.processes.wait()
        for stage in stages:
            # The output, for the processes that did not write it; some file systems show a new
            # file to other machines after a moment only.
            deadline = time.monotonic() + FILE_SECONDS
            while not stage.done(()) and time.monotonic() < deadline:
                time.sleep(0.1)

    def _sharing(self) -> Sharing:
        count = self.processes.count
        batch = self.recipe.run.batch or (1 if self.device.type == "cpu" else GPU_BATCH)
        owner: dict[str, int] = {}
        if count > 1:
            # By the lists whose features serve most often first, so that each is shared out evenly.
            lists = [self._items(s) for s in ("maps", "prototypes", "evaluate", "classify")]
            if (name := self.recipe.data.lists.validate_) is not None:
                lists.append(self.dataset.select(name))
            for items in lists:
                for item in items:
                    owner.setdefault(item.id, len(owner) % count)
        return Sharing(
            self.processes,
            self.threads if self.device.type == "cpu" else min(self.threads, GPU_THREADS),
            batch,
            {name: (r["height"], r["width"]) for name, r in self.records.items()},
            owner,
        )

    # -- the data, looked at once -------------------------------------------------------------

    def _index(self) -> tuple[Dataset, dict[str, dict[str, Any]]]:
        path = self.folder / "index.json"
        before = read_json(path) if path.is_file() else {"records": {}}
        if not isinstance(before, dict) or not isinstance(before.get("records"), dict):
            raise ArtefactError(
                f"{path} was not written by a run, so it may be yours; choose another run folder "
                "with --run.folder"
            )
        dataset = read_dataset(self.recipe)
        if not self.processes.first:
            self.processes.wait()  # the first looks at the images, the others read what it found
            before = read_json(path)
        with progress("looking at the images", len(dataset.items)) as advance:
            dataset, records = check_images(
                dataset,
                before["records"],
                progress=lambda _done, _total: advance(1, ""),
                workers=self.threads,
                save=lambda records: write_json(path, {**before, "records": records}),
            )
        if not self.processes.first:
            return dataset, records
        for notice in dataset.notices:
            logger.info("data: %s", notice)
        index = {
            "records": records,
            "skipped": [{"id": s.id, "reason": s.reason} for s in dataset.skipped],
            "notices": list(dataset.notices),
        }
        if before != index:
            write_json(path, index)
        self.processes.wait()
        return dataset, records

    def _items(self, stage: Literal["classify", "prototypes", "maps", "evaluate"]) -> list[Item]:
        name = self.recipe.data.list_of(stage)
        items = self.dataset.select(name)
        if not items:
            raise DataError(f"the list {name!r} ({stage}) has no usable image")
        return items

    def _digest(self, items: Sequence[Item], *, truth: bool = False) -> str:
        """Digest of ids, labels and file contents (images alone, or with their masks)."""
        field = "digest" if truth else "image_digest"
        return digest_json(
            [[item.id, list(item.labels), self.records[item.id][field]] for item in items]
        )

    # -- classify -----------------------------------------------------------------------------

    @cached_property
    def method(self) -> str:
        """How the classifier is trained: ``probe`` or ``finetune``."""
        wanted = self.recipe.classifier.method
        if wanted != "auto":
            return wanted
        return "finetune" if self.device.type == "cuda" else "probe"

    def _chosen_device(self) -> torch.device:
        wanted = self.recipe.run.device
        if wanted == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(wanted)
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise RecipeError(
                f"run.device {wanted!r} cannot be used here ({error}); use 'auto' or 'cpu'"
            ) from None
        return device

    def _validation(self) -> tuple[list[Item], list[Item]]:
        """Training and validation items of the classifier."""
        items = self._items("classify")
        name = self.recipe.data.lists.validate_
        if name is not None:
            return items, self.dataset.select(name)
        order = np.random.default_rng([self.recipe.run.seed, HELD_OUT]).permutation(len(items))
        left = Counter(label for item in items for label in item.labels)
        held = set()
        for place in order[: len(items) // HELD_OUT].tolist():
            labels = items[place].labels
            if all(left[label] > 1 for label in labels):  # the last image of a class trains it
                left.subtract(labels)
                held.add(place)
        return (
            [item for place, item in enumerate(items) if place not in held],
            [items[place] for place in sorted(held)],
        )

    def _classify(self) -> bool:
        section = self.recipe.classifier
        settings = section.probe if self.method == "probe" else section.finetune
        training, validation = self._validation()
        weights = section.weights
        if weights.endswith(".safetensors") and Path(weights).is_file():
            weights = digest_file(Path(weights))
        self.stage_classify = Stage(
            self.folder / "classifier",
            {
                "revision": 3,
                "classes": list(self.dataset.classes.names),
                "backbone": section.model_dump(
                    mode="json", exclude={"weights", "method", "probe", "finetune"}
                ),
                "weights": weights,
                "method": self.method,
                "settings": settings.model_dump(mode="json", exclude={"preset"}),
                "maps": self.recipe.maps.model_dump(include=set(FEATURE_KEYS)),
                "seed": self.recipe.run.seed,
                "training": self._digest(training),
                "validation": self._digest(validation),
            },
        )
        path = self.stage_classify.folder / "classifier.safetensors"
        if self.stage_classify.done([path]):
            if self.processes.first:
                remove_leftovers(path.parent)  # of a run that was stopped at its very end
            return False
        from lpcam.classifier import BackboneSpec, build  # noqa: PLC0415 - timm is slow to import

        classifier = build(
            BackboneSpec(
                section.backbone, section.arguments, section.output_stride, section.dilated
            ),
            self.dataset.classes.names,
            weights=section.weights,
            mean=section.mean,
            std=section.std,
            seed=self.recipe.run.seed,
        ).to(self.device)
        if STAGES.index(self.until) >= STAGES.index("prototypes"):
            self._check_reservoir(classifier)
        self._begin(self.stage_classify)
        history = self._train(classifier, training, validation)
        output: dict[str, Any] = {}
        if self.processes.first:
            classifier.save(path, {"stage": self.stage_classify.key, "versions": versions()})
            output = {
                "fingerprint": classifier.fingerprint(),
                "digest": digest_file(path),
                "history": history,
            }
        self._finish(self.stage_classify, **output)
        if self.processes.first:
            self.__dict__["classifier"] = classifier
            remove_leftovers(path.parent)
        return True

    def _train(
        self, classifier: Any, training: list[Item], validation: list[Item]
    ) -> list[dict[str, Any]]:
        folder = self.stage_classify.folder
        if self.method == "finetune":
            from lpcam.train import finetune  # noqa: PLC0415

            return finetune(
                classifier,
                training,
                validation,
                self.recipe.classifier.finetune,
                seed=self.recipe.run.seed,
                folder=folder,
                workers=self.threads if self.device.type == "cuda" else 0,
                processes=self.processes,
            )
        from lpcam.probe import fit_probe, pooled_features  # noqa: PLC0415

        settings = self.recipe.classifier.probe
        pooled = pooled_features(
            [*training, *validation], settings, self._store(classifier), folder, self.sharing
        )
        if pooled is None:
            return []  # the first process fits the head, the others read it
        refit = self.recipe.data.lists.validate_ is None
        return fit_probe(classifier, training, validation, settings, pooled=pooled, refit=refit)

    @cached_property
    def classifier(self) -> Any:
        """The trained classifier, loaded when a stage first needs it."""
        from lpcam.classifier import Classifier  # noqa: PLC0415

        path = self.stage_classify.folder / "classifier.safetensors"
        return Classifier.load(path).to(self.device)

    def _store(self, classifier: Any) -> Any:
        """The features that the stages share, of the classifier's backbone."""
        if "feature_store" not in self.__dict__:
            from lpcam.features import FeatureStore  # noqa: PLC0415

            section, probe = self.recipe.maps, self.recipe.classifier.probe
            mirror = self.method == "probe" and probe.long_side is None and probe.mirror
            shared = [*self._items("maps"), *self._items("prototypes")]
            self.__dict__["feature_store"] = FeatureStore(
                classifier,
                flip=self.recipe.lpcam.flip or mirror,
                maximum_side=section.maximum_side,
                dtype=section.features,
                precision=section.precision,
                budget=int(self._memory() * FEATURES_SHARE),
                keep=(item.id for item in shared),
            )
        return self.__dict__["feature_store"]

    def _memory(self) -> float:
        """Bytes that this process may keep."""
        given = self.recipe.run.memory
        if given is not None:
            return given * 2**30
        return available_memory() * MEMORY_SHARE / self.processes.here

    # -- maps ---------------------------------------------------------------------------------

    def _map_parts(self, items: Sequence[Item]) -> dict[str, Any]:
        settings = self.recipe.lpcam
        return {
            "revision": 2,
            "classifier": self.stage_classify.output["digest"],
            "scales": list(settings.scales),
            "flip": settings.flip,
            "maps": self.recipe.maps.model_dump(mode="json"),
            "images": self._digest(items),
        }

    def _cam(self) -> bool:
        wanted = self._items("maps")
        if self.recipe.lpcam.split_maps == "multi_scale":
            wanted = [*wanted, *self._items("prototypes")]
        items = list({item.id: item for item in wanted}.values())
        self.stage_cam = Stage(
            self.folder / "cam",
            {**self._map_parts(items), "cam_epsilon": self.recipe.lpcam.cam_epsilon},
        )
        paths = [map_path(self.stage_cam.folder, item.id) for item in items]
        if self.stage_cam.done(paths):
            return False
        from lpcam.extract import cam_maps  # noqa: PLC0415

        self._begin(self.stage_cam)

        def maps_of(item: Item, pairs: Any, size: tuple[int, int]) -> dict[str, FusedMaps]:
            weight = self.classifier.weight[list(item.labels)]
            epsilon = self.recipe.lpcam.cam_epsilon
            return {"cam": cam_maps(pairs, weight, size, epsilon=epsilon)}

        self._write_maps("CAM", items, {"cam": self.stage_cam}, maps_of)
        self._finish(self.stage_cam)
        return True

    def _write_maps(
        self, label: str, items: Sequence[Item], stages: dict[str, Stage], maps_of: Any
    ) -> None:
        """Maps of every image that has none yet, from one pyramid of features an image."""
        store = self._store(self.classifier)
        scales = self.recipe.lpcam.scales

        def missing(item: Item) -> bool:
            paths = [map_path(stage.folder, item.id) for stage in stages.values()]
            return not all(path.is_file() for path in paths)

        @torch.inference_mode()
        def make(batch: list[Item]) -> None:
            # An image without a label has no map, and needs no features.
            pairs = list(store.pairs(batch, scales)) if any(item.labels for item in batch) else []
            for row, item in enumerate(batch):
                if not missing(item):
                    continue
                size = self.sharing.sizes[item.id]
                own = [self._of_image(pair, row) for pair in pairs]
                maps = maps_of(item, own, self._mapped_size(size)) if item.labels else {}
                for name, stage in stages.items():
                    fused = _at_size(maps[name], size) if maps else _no_maps(size)
                    write_maps(
                        map_path(stage.folder, item.id),
                        MapFile(
                            np.array(item.labels, dtype=np.int64),
                            fused.cam.float().cpu().numpy(),
                            fused.high_res.float().cpu().numpy(),
                            {"stage": stage.key},
                        ),
                        dtype=self.recipe.maps.dtype,
                    )

        mine = self.sharing.mine(items)
        # Batches are made before it is known what is missing: they are the same after a stop.
        todo = [b for b in self.sharing.batches(mine) if any(missing(item) for item in b)]
        left = sum(len(batch) for batch in todo)
        with progress(label, len(mine), done=len(mine) - left) as advance:
            for batch, _ in zip(todo, self.sharing.map(make, todo), strict=True):
                advance(len(batch), "")

    def _of_image(self, pair: Any, row: int) -> Any:
        """One image's features of a batch, mirrored ones only where the maps use them."""
        from lpcam.extract import FeaturePair  # noqa: PLC0415

        flip = self.recipe.lpcam.flip
        return FeaturePair(pair.features[row], pair.mirrored[row] if flip else None)

    def _mapped_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size at which an image is mapped: its own, or smaller by ``maps.maximum_side``."""
        limit = self.recipe.maps.maximum_side
        return size if max(size) <= limit else scaled_size(*size, limit / max(size))

    def _lpcam(self) -> bool:
        items = self._items("maps")
        parts = {
            **self._map_parts(items),
            "prototypes": self.stage_prototypes.output["digest"],
        }
        self.stage_lpcam = Stage(self.folder / "lpcam", {**parts, "context": True})
        self.stage_lpcam_f = Stage(self.folder / "lpcam_f", {**parts, "context": False})
        stages = {"lpcam": self.stage_lpcam, "lpcam_f": self.stage_lpcam_f}
        done = [
            stage.done([map_path(stage.folder, item.id) for item in items])
            for stage in stages.values()
        ]
        if all(done):
            return False
        from lpcam.extract import lpcam_maps  # noqa: PLC0415
        from lpcam.prototypes import Prototypes  # noqa: PLC0415

        self._begin(*stages.values())
        prototypes = Prototypes.load(
            self._prototypes_path, fingerprint=self.stage_classify.output["fingerprint"]
        )
        vectors = torch.stack(
            [prototypes.vectors(with_context=True), prototypes.vectors(with_context=False)]
        ).to(self.classifier.weight)

        def maps_of(item: Item, pairs: Any, size: tuple[int, int]) -> dict[str, FusedMaps]:
            # One convolution serves both methods: their rows stand below each other.
            rows = vectors[:, list(item.labels)].flatten(0, 1)
            both = lpcam_maps(pairs, rows, size)
            count = len(item.labels)
            return {
                "lpcam": FusedMaps(both.cam[:count], both.high_res[:count]),
                "lpcam_f": FusedMaps(both.cam[count:], both.high_res[count:]),
            }

        self._write_maps("LPCAM", items, stages, maps_of)
        self._finish(*stages.values())
        return True

    # -- prototypes ---------------------------------------------------------------------------

    @property
    def _prototypes_path(self) -> Path:
        return self.folder / "prototypes" / "prototypes.safetensors"

    def _prototypes(self) -> bool:
        items = self._items("prototypes")
        settings = self.recipe.lpcam
        multi_scale = settings.split_maps == "multi_scale"
        self.stage_prototypes = Stage(
            self.folder / "prototypes",
            {
                "revision": 3,
                "classifier": self.stage_classify.output["digest"],
                "settings": settings.model_dump(
                    mode="json", exclude={"preset", "scales", "flip", "threshold", "cam_threshold"}
                ),
                "split_maps": self.stage_cam.key if multi_scale else None,
                "maps": self.recipe.maps.model_dump(include=set(FEATURE_KEYS)),
                "seed": self.recipe.run.seed,
                "images": self._digest(items),
            },
        )
        path = self._prototypes_path
        folder = self.stage_prototypes.folder
        if self.stage_prototypes.done([path]):
            if self.processes.first:
                remove_leftovers(folder)
            return False
        from lpcam.prototypes import make_prototypes  # noqa: PLC0415

        self._begin(self.stage_prototypes)
        reservoir, images = self._reservoir(items, folder)
        output: dict[str, Any] = {}
        if self.processes.first:
            prototypes = make_prototypes(
                reservoir,
                self.classifier.weight,
                self.dataset.classes.names,
                settings,
                seed=self.recipe.run.seed,
                fingerprint=self.stage_classify.output["fingerprint"],
                made_by={"stage": self.stage_prototypes.key, "versions": versions()},
                workers=self.sharing.workers,
            )
            prototypes.save(path)
            output = {
                "digest": digest_file(path),
                "events": list(prototypes.events),
                "images": images,
            }
        self._finish(self.stage_prototypes, **output)
        if self.processes.first:
            remove_leftovers(folder)  # last: a stop before the end goes on from them
        return True

    def _reservoir(self, items: Sequence[Item], folder: Path) -> tuple[Any, int]:
        """The sample of all processes' local features (in the first), and of how many images."""
        from lpcam.extract import collect  # noqa: PLC0415
        from lpcam.prototypes import draw_images  # noqa: PLC0415

        settings = self.recipe.lpcam
        drawn = draw_images(
            [(item.id, item.labels) for item in items],
            len(self.dataset.classes),
            settings,
            seed=self.recipe.run.seed,
        )
        used = [item for item in items if item.id in drawn]
        batches = self.sharing.batches(self.sharing.mine(used))
        count = self.processes.count
        parts = [
            # A checkpoint counts batches, so it is of use to the same sharing alone.
            folder / f"reservoir-{rank}-of-{count}-by-{self.sharing.batch}.safetensors"
            for rank in range(count)
        ]
        checkpoint = parts[self.processes.rank]
        reservoir = self._new_reservoir()
        done = reservoir.restore(checkpoint) if checkpoint.is_file() else 0
        next_save = time.monotonic() + CHECKPOINT_SECONDS
        todo = batches[done:]
        total = sum(len(batch) for batch in batches)
        left = sum(len(batch) for batch in todo)
        with progress("local features", total, done=total - left) as advance:
            for batch, found in zip(todo, self.sharing.map(self._local, todo), strict=True):
                for item, (features, split_map) in zip(batch, found, strict=True):
                    collect(
                        reservoir,
                        features,
                        item.labels,
                        split_map,
                        settings,
                        item.id,
                        drawn[item.id],
                    )
                done += 1
                advance(len(batch), "")
                if settings.max_features is None:
                    self._check_memory("the sample of all features has reached", reservoir.nbytes)
                if (started := time.monotonic()) > next_save:
                    reservoir.checkpoint(checkpoint, done)
                    took = time.monotonic() - started
                    pause = max(CHECKPOINT_SECONDS, CHECKPOINT_SHARE * took)
                    next_save = time.monotonic() + pause
        if count > 1:
            reservoir.checkpoint(checkpoint, len(batches))
            self.processes.wait()
            if self.processes.first:
                for part in parts[1:]:
                    theirs = self._new_reservoir()
                    theirs.restore(part)
                    reservoir.merge(theirs)
        return reservoir, len(used)

    def _new_reservoir(self) -> Any:
        from lpcam.features import DTYPES  # noqa: PLC0415
        from lpcam.prototypes import Reservoir  # noqa: PLC0415

        self._check_reservoir(self.classifier)
        dtype = DTYPES[self.recipe.maps.features]
        return Reservoir(self.recipe.lpcam.max_features, self.recipe.run.seed, dtype=dtype)

    def _check_reservoir(self, classifier: Any) -> None:
        """Refuse a sample that could not be held in memory when it is full."""
        from lpcam.features import DTYPES  # noqa: PLC0415
        from lpcam.prototypes import SIDES  # noqa: PLC0415

        bound = self.recipe.lpcam.max_features
        if bound is None:
            return
        classes, channels = classifier.weight.shape
        # Twice the bound: a reservoir is cut back when it holds so many.
        rows = 2 * bound * len(SIDES) * classes
        needed = rows * channels * DTYPES[self.recipe.maps.features].itemsize
        self._check_memory(f"lpcam.max_features {bound} of {classes} classes needs", needed)

    def _check_memory(self, what: str, needed: int) -> None:
        allowed = self._memory() * (1 - FEATURES_SHARE)
        if needed > allowed:
            raise RecipeError(
                f"{what} {needed / 2**30:.3g} GiB, but {allowed / 2**30:.3g} GiB are for it; lower "
                "lpcam.max_features, or raise run.memory (--memory) if the machine has more"
            )

    @torch.inference_mode()
    def _local(self, batch: list[Item]) -> list[tuple[Tensor, Tensor]]:
        """Features (C, h, w) at scale 1 and the CAM that splits them, of each image of a batch."""
        from lpcam.extract import single_scale_cam  # noqa: PLC0415

        settings = self.recipe.lpcam
        (pair,) = self._store(self.classifier).pairs(batch, (1.0,))
        found = []
        for item, features in zip(batch, pair.features, strict=True):
            if settings.split_maps == "multi_scale":
                maps = read_maps(map_path(self.stage_cam.folder, item.id))
                split_map = torch.from_numpy(maps.high_res)
            else:
                weight = self.classifier.weight[list(item.labels)]
                split_map = single_scale_cam(features, weight, epsilon=settings.cam_epsilon)
            found.append((features, split_map))
        return found

    # -- seeds --------------------------------------------------------------------------------

    @property
    def _stages_of_methods(self) -> dict[Method, Stage]:
        return {
            "CAM": self.stage_cam,
            "LPCAM-F": self.stage_lpcam_f,
            "LPCAM": self.stage_lpcam,
        }

    def _seeds(self) -> bool:
        items = self._items("maps")
        section = self.recipe.seeds
        source = self._stages_of_methods[section.method]
        threshold = self.recipe.fixed_threshold(section.method)
        self.stage_seeds = Stage(
            self.folder / "seeds",
            {
                "revision": 1,
                "maps": source.key,
                "threshold": threshold,
                "ignore_threshold": section.ignore_threshold,
                "mask_ids": list(self.dataset.classes.mask_ids),
                "images": [item.id for item in items],
            },
        )
        paths = {item.id: self._seed_path(item) for item in items}
        if self.stage_seeds.done(paths.values()):
            return False
        self._begin(self.stage_seeds)

        def make(item: Item) -> None:
            if paths[item.id].is_file():
                return
            maps = read_maps(map_path(source.folder, item.id))
            planes = torch.from_numpy(maps.high_res)
            mask = to_mask(
                seeds(planes, threshold),
                maps.keys,
                self.dataset.classes,
                maps=planes if section.ignore_threshold is not None else None,
                ignore_threshold=section.ignore_threshold,
            )
            write_mask(paths[item.id], mask)

        mine = self.sharing.mine(items)
        with progress("seeds", len(mine)) as advance:
            for _ in self.sharing.map(make, mine):
                advance(1, "")
        self._finish(self.stage_seeds)
        return True

    def _seed_path(self, item: Item) -> Path:
        return self.folder / "seeds" / f"{item.id}.png"

    # -- evaluate -----------------------------------------------------------------------------

    def _evaluate(self) -> bool:
        items = [item for item in self._items("evaluate") if item.mask is not None]
        fixed = {method: self.recipe.fixed_threshold(method) for method in METHODS}
        self.stage_evaluate = Stage(
            self.folder / "evaluation",
            {
                "revision": 1,
                "maps": {method: s.key for method, s in self._stages_of_methods.items()},
                "seeds": self.stage_seeds.key,
                "truth": self._digest(items, truth=True),
                "part_names": dict(self.dataset.part_names),
                "skipped": [skip.id for skip in self.dataset.skipped],
                "thresholds": fixed,
                "sheet": self.recipe.sheet.model_dump(mode="json"),
                "protocol": self._protocol(),
            },
        )
        metrics, sheet = self.folder / "metrics.json", self.folder / "sheet.png"
        outputs = [metrics, sheet] if self.recipe.sheet.images else [metrics]
        if self.stage_evaluate.done(outputs):
            self.rows = read_json(metrics)["rows"]
            return False
        self._begin(self.stage_evaluate)
        self.rows = self._score(items) if items else []
        if self.processes.first:
            write_json(
                metrics,
                {
                    "rows": self.rows,
                    "skipped": [{"id": s.id, "reason": s.reason} for s in self.dataset.skipped],
                    "prototype_events": self.stage_prototypes.output["events"],
                    "classifier_history": self.stage_classify.output["history"],
                },
            )
            sheet.unlink(missing_ok=True)
            if self.recipe.sheet.images:
                self._write_sheet(sheet)
        self._finish(self.stage_evaluate)
        return True

    def _score(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        from lpcam.evaluation import score_maps  # noqa: PLC0415

        folders = {method: stage.folder for method, stage in self._stages_of_methods.items()}
        fixed = {method: self.recipe.fixed_threshold(method) for method in METHODS}
        return [
            {
                "stage": "seed",
                "dataset": self._dataset_name,
                "split": self.recipe.data.list_of("evaluate"),
                **row,
                "protocol": {
                    **self._protocol(),
                    "threshold": row["threshold"],
                    "threshold_source": (
                        "best mIoU on this split's truth, by a sweep of 0.00, 0.01, ... 0.99"
                        if row["threshold_source"] == "ground truth"
                        else "fixed by the preset or the recipe"
                    ),
                    "command": self.command,
                },
            }
            for row in score_maps(items, self.dataset, folders, fixed, self.sharing)
        ]

    @property
    def _dataset_name(self) -> str:
        return self.recipe.data.name or self.dataset.name

    def _protocol(self) -> dict[str, Any]:
        """What every figure of this run must be read with, apart from its threshold."""
        lists = self.recipe.data
        section = self.recipe.classifier
        settings = section.probe if self.method == "probe" else section.finetune
        return {
            "dataset": self._dataset_name,
            "split": lists.list_of("evaluate"),
            "labels": self.dataset.label_source,
            "classes": list(self.dataset.classes.names),
            "classifier": {
                "backbone": section.backbone,
                "output_stride": section.output_stride,
                "trained_by": self.method,
                "settings": settings.model_dump(mode="json"),
                "list": lists.list_of("classify"),
                "validation_list": lists.lists.validate_ or "a seeded tenth of the list",
                "weights": Path(section.weights).name,
                "fingerprint": self.stage_classify.output["fingerprint"],
            },
            "prototypes_list": lists.list_of("prototypes"),
            "preset": self.recipe.lpcam.preset,
            "changed_from_preset": self.recipe.lpcam.model_dump(
                mode="json", include=set(self.recipe.lpcam.changes())
            ),
            "scales": list(self.recipe.lpcam.scales),
            "flip": self.recipe.lpcam.flip,
            "maximum_side": self.recipe.maps.maximum_side,
            "features": self.recipe.maps.features,
            "precision": self.recipe.maps.precision,
            "maps": self.recipe.maps.dtype,
            "crf": False,
            "void": "255 and mask ids outside the classes are not counted",
            "seed": self.recipe.run.seed,
            "versions": versions(),
        }

    def _write_sheet(self, path: Path) -> None:
        from lpcam.sheet import SheetRow, choose_rows, sheet  # noqa: PLC0415

        rows = []
        items = self._items("maps")
        for item, index in choose_rows(items, self.recipe.sheet.images):
            place = item.labels.index(index)
            cam, lpcam = (
                read_maps(map_path(stage.folder, item.id)).high_res[place]
                for stage in (self.stage_cam, self.stage_lpcam)
            )
            rows.append(
                SheetRow(
                    read_image(item.image),
                    self.dataset.classes.names[index],
                    cam,
                    lpcam,
                    read_index_mask(self._seed_path(item)),
                    None if item.mask is None else read_index_mask(item.mask),
                )
            )
        write_bytes(path, sheet(rows))


def _no_maps(size: tuple[int, int]) -> FusedMaps:
    height, width = size
    return FusedMaps(torch.zeros(0, -(-height // 4), -(-width // 4)), torch.zeros(0, height, width))


def _at_size(maps: FusedMaps, size: tuple[int, int]) -> FusedMaps:
    """Enlarge the maps of an image that was mapped at a smaller size (bilinear)."""
    if maps.high_res.shape[-2:] == size:
        return maps
    quarter = (-(-size[0] // 4), -(-size[1] // 4))
    cam, high_res = (
        F.interpolate(m[None], size=s, mode="bilinear", align_corners=False)[0]
        for m, s in ((maps.cam, quarter), (maps.high_res, size))
    )
    return FusedMaps(cam, high_res)


def remove_leftovers(folder: Path) -> None:
    """Remove from a finished stage's folder what only a stopped one would go on from."""
    for pattern in ("pooled-*.safetensors", "reservoir-*.safetensors", "checkpoint.safetensors"):
        for path in folder.glob(pattern):
            path.unlink()
