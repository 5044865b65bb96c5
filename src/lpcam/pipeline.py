"""A run: classify, CAM, prototypes, LPCAM, seeds, evaluate, each once and each resumable.

Every stage is skipped when, and only when, its inputs and settings are unchanged; see
:mod:`lpcam.ledger`. Inputs are known by the digests of their contents.
"""

from __future__ import annotations

import logging
import os
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
from lpcam.metrics import (
    DEFAULT_THRESHOLDS,
    Scores,
    ThresholdSweep,
    best_threshold,
    part_counts,
    part_coverage,
    scores,
    truth_labels,
)
from lpcam.progress import progress, track
from lpcam.recipe import Method, Recipe
from lpcam.storage import (
    MapFile,
    digest_file,
    digest_json,
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

    Args:
        command: how the run was asked for, recorded in every figure's protocol.

    Raises:
        LpcamError: of a kind that says what was wrong with data, recipe, weights or artefacts.
    """
    torch.set_num_threads(_threads(recipe))
    with locked(recipe.folder):
        return _Run(recipe, command).up_to(until)


def _threads(recipe: Recipe) -> int:
    return recipe.run.threads or len(os.sched_getaffinity(0))


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

    def __init__(self, recipe: Recipe, command: str) -> None:
        self.recipe = recipe
        self.command = command
        self.folder = recipe.folder
        self.seconds: dict[str, float] = {}
        path = self.folder / "recipe.yaml"
        if path.is_file() and not (self.folder / "index.json").is_file():
            raise ArtefactError(
                f"{path} was not written by a run, so it may be yours; choose another run folder "
                "with --run.folder"
            )
        self.dataset, self.records = self._index()
        self.rows: list[dict[str, Any]] = []
        resolved = yaml.safe_dump(
            recipe.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True
        ).encode()
        if not path.is_file() or path.read_bytes() != resolved:
            write_bytes(path, resolved)

    def up_to(self, until: StageName) -> RunResult:
        for name in STAGES[: STAGES.index(until) + 1]:
            started = time.monotonic()
            worked = getattr(self, f"_{name}")()
            self.seconds[name] = time.monotonic() - started
            if worked:
                logger.info("%s: done in %.1f s", name, self.seconds[name])
                self._note_seconds(name)
            else:
                logger.info("%s: up to date", name)
        skipped = [{"id": s.id, "reason": s.reason} for s in self.dataset.skipped]
        return RunResult(self.folder, self.rows, skipped)

    def _note_seconds(self, name: str) -> None:
        path = self.folder / "seconds.json"
        seconds = read_json(path) if path.is_file() else {}
        write_json(path, {**seconds, name: round(self.seconds[name], 2)})

    # -- the data, looked at once -------------------------------------------------------------

    def _index(self) -> tuple[Dataset, dict[str, dict[str, Any]]]:
        path = self.folder / "index.json"
        before = read_json(path) if path.is_file() else {"records": {}}
        if not isinstance(before, dict) or not isinstance(before.get("records"), dict):
            raise ArtefactError(
                f"{path} was not written by a run, so it may be yours; choose another run folder "
                "with --run.folder"
            )
        known = before["records"]
        dataset = read_dataset(self.recipe)
        with progress("looking at the images", len(dataset.items)) as advance:
            dataset, records = check_images(
                dataset, known, progress=lambda _done, _total: advance(1, "")
            )
        for notice in dataset.notices:
            logger.info("data: %s", notice)
        index = {
            "records": records,
            "skipped": [{"id": s.id, "reason": s.reason} for s in dataset.skipped],
            "notices": list(dataset.notices),
        }
        if before != index:
            write_json(path, index)
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
        return "finetune" if self._device().type == "cuda" else "probe"

    def _device(self) -> torch.device:
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
                "revision": 2,
                "classes": list(self.dataset.classes.names),
                "backbone": section.model_dump(
                    mode="json", exclude={"weights", "method", "probe", "finetune"}
                ),
                "weights": weights,
                "method": self.method,
                "settings": settings.model_dump(mode="json", exclude={"preset"}),
                "maps": self.recipe.maps.model_dump(include={"features", "maximum_side"}),
                "seed": self.recipe.run.seed,
                "training": self._digest(training),
                "validation": self._digest(validation),
            },
        )
        path = self.stage_classify.folder / "classifier.safetensors"
        if self.stage_classify.done([path]):
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
        ).to(self._device())
        self.stage_classify.begin()
        history = self._train(classifier, training, validation)
        classifier.save(path, {"stage": self.stage_classify.key, "versions": versions()})
        self.stage_classify.finish(
            fingerprint=classifier.fingerprint(), digest=digest_file(path), history=history
        )
        self.__dict__["classifier"] = classifier
        return True

    def _train(
        self, classifier: Any, training: list[Item], validation: list[Item]
    ) -> list[dict[str, Any]]:
        folder = self.stage_classify.folder
        seed = self.recipe.run.seed
        if self.method == "finetune":
            from lpcam.train import finetune  # noqa: PLC0415

            return finetune(
                classifier,
                training,
                validation,
                self.recipe.classifier.finetune,
                seed=seed,
                folder=folder,
                workers=_threads(self.recipe) if self._device().type == "cuda" else 0,
            )
        from lpcam.probe import fit_probe  # noqa: PLC0415

        return fit_probe(
            classifier,
            training,
            validation,
            self.recipe.classifier.probe,
            folder=folder,
            store=self._store(classifier),
            refit=self.recipe.data.lists.validate_ is None,
        )

    @cached_property
    def classifier(self) -> Any:
        """The trained classifier, loaded when a stage first needs it."""
        from lpcam.classifier import Classifier  # noqa: PLC0415

        path = self.stage_classify.folder / "classifier.safetensors"
        return Classifier.load(path).to(self._device())

    def _store(self, classifier: Any) -> Any:
        """The features that the stages share, of the classifier's backbone."""
        if "feature_store" not in self.__dict__:
            from lpcam.features import FeatureStore, default_budget  # noqa: PLC0415

            section, given = self.recipe.maps, self.recipe.run.feature_memory
            shared = [*self._items("maps"), *self._items("prototypes")]
            self.__dict__["feature_store"] = FeatureStore(
                classifier,
                flip=self.recipe.lpcam.flip or self.recipe.classifier.probe.mirror,
                maximum_side=section.maximum_side,
                dtype=section.features,
                budget=default_budget() if given is None else int(given * 2**30),
                keep=(item.id for item in shared),
            )
        store = self.__dict__["feature_store"]
        store.classifier = classifier
        return store

    # -- maps ---------------------------------------------------------------------------------

    def _map_parts(self, items: Sequence[Item]) -> dict[str, Any]:
        settings = self.recipe.lpcam
        return {
            "revision": 1,
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
        paths = [_map_path(self.stage_cam.folder, item) for item in items]
        if self.stage_cam.done(paths):
            return False
        from lpcam.extract import cam_maps  # noqa: PLC0415

        self.stage_cam.begin()

        def maps_of(item: Item, pairs: Any, size: tuple[int, int]) -> dict[str, FusedMaps]:
            weight = self.classifier.weight[list(item.labels)]
            epsilon = self.recipe.lpcam.cam_epsilon
            return {"cam": cam_maps(pairs, weight, size, epsilon=epsilon)}

        self._write_maps("CAM", items, {"cam": self.stage_cam}, maps_of)
        self.stage_cam.finish()
        return True

    @torch.inference_mode()
    def _write_maps(
        self, label: str, items: Sequence[Item], stages: dict[str, Stage], maps_of: Any
    ) -> None:
        """Maps of every image that has none yet, from one pyramid of features an image."""
        from lpcam.extract import FeaturePair  # noqa: PLC0415

        settings = self.recipe.lpcam
        store = self._store(self.classifier)
        todo = [
            item
            for item in items
            if not all(_map_path(stage.folder, item).is_file() for stage in stages.values())
        ]
        with progress(label, len(items), done=len(items) - len(todo)) as advance:
            for item in todo:
                record = self.records[item.id]
                size = (record["height"], record["width"])
                maps: dict[str, FusedMaps] = {}
                if item.labels:
                    pairs = (
                        pair if settings.flip else FeaturePair(pair.features, None)
                        for pair in store.pairs(item, settings.scales)
                    )
                    maps = maps_of(item, pairs, self._mapped_size(size))
                for name, stage in stages.items():
                    fused = _at_size(maps[name], size) if maps else _no_maps(size)
                    made_by = {"stage": stage.key}
                    write_maps(
                        _map_path(stage.folder, item),
                        MapFile(
                            np.array(item.labels, dtype=np.int64),
                            fused.cam.float().cpu().numpy(),
                            fused.high_res.float().cpu().numpy(),
                            made_by,
                        ),
                        dtype=self.recipe.maps.dtype,
                    )
                advance(1, "")

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
            stage.done([_map_path(stage.folder, item) for item in items])
            for stage in stages.values()
        ]
        if all(done):
            return False
        from lpcam.extract import lpcam_maps  # noqa: PLC0415
        from lpcam.prototypes import Prototypes  # noqa: PLC0415

        for stage in stages.values():
            stage.begin()
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
        for stage in stages.values():
            stage.finish()
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
                "revision": 2,
                "classifier": self.stage_classify.output["digest"],
                "settings": settings.model_dump(
                    mode="json", exclude={"preset", "scales", "flip", "threshold", "cam_threshold"}
                ),
                "split_maps": self.stage_cam.key if multi_scale else None,
                "features": self.recipe.maps.features,
                "maximum_side": self.recipe.maps.maximum_side,
                "seed": self.recipe.run.seed,
                "images": self._digest(items),
            },
        )
        path = self._prototypes_path
        checkpoint = self.stage_prototypes.folder / "reservoir.safetensors"
        if self.stage_prototypes.done([path]):
            checkpoint.unlink(missing_ok=True)  # of a run that was stopped at its very end
            return False
        from lpcam.prototypes import Reservoir, draw_images, make_prototypes  # noqa: PLC0415

        self.stage_prototypes.begin()
        drawn = draw_images(
            [(item.id, item.labels) for item in items],
            len(self.dataset.classes),
            settings,
            seed=self.recipe.run.seed,
        )
        reservoir = Reservoir(settings.max_features, self.recipe.run.seed)
        first = reservoir.restore(checkpoint) if checkpoint.is_file() else 0
        next_save = time.monotonic() + CHECKPOINT_SECONDS
        used = [item for item in items if item.id in drawn]
        with progress("local features", len(used), done=first) as advance:
            for number, item in enumerate(used[first:], start=first + 1):
                self._collect(reservoir, item, drawn[item.id])
                advance(1, "")
                if (started := time.monotonic()) > next_save:
                    reservoir.checkpoint(checkpoint, number)
                    took = time.monotonic() - started
                    pause = max(CHECKPOINT_SECONDS, CHECKPOINT_SHARE * took)
                    next_save = time.monotonic() + pause
        prototypes = make_prototypes(
            reservoir,
            self.classifier.weight.cpu(),
            self.dataset.classes.names,
            settings,
            seed=self.recipe.run.seed,
            fingerprint=self.stage_classify.output["fingerprint"],
            made_by={"stage": self.stage_prototypes.key, "versions": versions()},
        )
        prototypes.save(path)
        self.stage_prototypes.finish(
            digest=digest_file(path), events=list(prototypes.events), images=len(used)
        )
        checkpoint.unlink(missing_ok=True)  # last: a stop before the end goes on from it
        return True

    @torch.inference_mode()
    def _collect(self, reservoir: Any, item: Item, drawn: dict[int, int]) -> None:
        from lpcam.extract import collect, single_scale_cam  # noqa: PLC0415

        (pair,) = self._store(self.classifier).pairs(item, (1.0,))
        features = pair.features
        settings = self.recipe.lpcam
        if settings.split_maps == "multi_scale":
            maps = read_maps(_map_path(self.stage_cam.folder, item))
            split_map = torch.from_numpy(maps.high_res)
        else:
            split_map = single_scale_cam(
                features,
                self.classifier.weight[list(item.labels)],
                epsilon=settings.cam_epsilon,
            )
        collect(reservoir, features, item.labels, split_map, settings, item.id, drawn)

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
        self.stage_seeds.begin()
        for item in track(items, "seeds", len(items)):
            if paths[item.id].is_file():
                continue
            maps = read_maps(_map_path(source.folder, item))
            planes = torch.from_numpy(maps.high_res)
            mask = to_mask(
                seeds(planes, threshold),
                maps.keys,
                self.dataset.classes,
                maps=planes if section.ignore_threshold is not None else None,
                ignore_threshold=section.ignore_threshold,
            )
            write_mask(paths[item.id], mask)
        self.stage_seeds.finish()
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
        self.stage_evaluate.begin()
        self.rows = self._score(items) if items else []
        write_json(
            metrics,
            {
                "rows": self.rows,
                "skipped": [{"id": s.id, "reason": s.reason} for s in self.dataset.skipped],
                "prototype_events": self.stage_prototypes.output["events"],
                "classifier_history": self.stage_classify.output["history"],
            },
        )
        if self.recipe.sheet.images:
            self._write_sheet(sheet)
        self.stage_evaluate.finish()
        return True

    def _score(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        names = self.dataset.classes.names
        fixed = {method: self.recipe.fixed_threshold(method) for method in METHODS}
        grid = sorted({*DEFAULT_THRESHOLDS, *fixed.values()})
        sweeps = {method: ThresholdSweep(len(names), grid) for method in METHODS}
        for item in track(items, "scoring", len(items)):
            truth = self._truth(item)
            for method, stage in self._stages_of_methods.items():
                maps = read_maps(_map_path(stage.folder, item))
                sweeps[method].update(
                    truth, torch.from_numpy(maps.high_res), torch.from_numpy(maps.keys)
                )
        rows = []
        for method, sweep in sweeps.items():
            best, best_scores = best_threshold(sweep, names)
            for threshold, source, found in (
                (best, "ground truth", best_scores),
                (fixed[method], "fixed", scores(sweep.confusion(fixed[method]), names)),
            ):
                row = self._row(method, items, threshold, source, found)
                if self.dataset.part_names:
                    row["part_coverage"] = self._coverage(method, items, threshold)
                rows.append(row)
        return rows

    def _truth(self, item: Item) -> Tensor:
        assert item.mask is not None
        return truth_labels(read_index_mask(item.mask), self.dataset.classes)

    def _row(
        self, method: Method, items: Sequence[Item], threshold: float, source: str, found: Scores
    ) -> dict[str, Any]:
        return {
            "stage": "seed",
            "method": method,
            "dataset": self._dataset_name,
            "split": self.recipe.data.list_of("evaluate"),
            "images": len(items),
            "miou": found.miou,
            "fp": found.fp,
            "fn": found.fn,
            "precision": found.precision,
            "recall": found.recall,
            "precision_with_background": found.precision_with_background,
            "recall_with_background": found.recall_with_background,
            "threshold": threshold,
            "threshold_source": source,
            "per_class": found.per_class,
            "left_out": list(found.left_out),
            "protocol": {
                **self._protocol(),
                "threshold": threshold,
                "threshold_source": (
                    "best mIoU on this split's truth, by a sweep of 0.00, 0.01, ... 0.99"
                    if source == "ground truth"
                    else "fixed by the preset or the recipe"
                ),
                "command": self.command,
            },
        }

    def _coverage(
        self, method: Method, items: Sequence[Item], threshold: float
    ) -> dict[str, float]:
        names = self.dataset.part_names
        counts = torch.zeros(len(names), 2, dtype=torch.int64)
        for item in items:
            if item.parts is None:
                continue
            maps = read_maps(_map_path(self._stages_of_methods[method].folder, item))
            seed = seeds(torch.from_numpy(maps.high_res), threshold)
            labels = torch.tensor([0, *(int(k) + 1 for k in maps.keys)])[seed]
            parts = torch.from_numpy(read_index_mask(item.parts))
            counts += part_counts(self._truth(item), labels, parts, names)
        return part_coverage(counts, names)

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
                read_maps(_map_path(stage.folder, item)).high_res[place]
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


def _map_path(folder: Path, item: Item) -> Path:
    return folder / f"{item.id}.npz"


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
