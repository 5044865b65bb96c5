"""Objects that the stages of a run share: folder, data, classifier, features and processes."""

from __future__ import annotations

import logging
import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from lpcam.classifiers.classifier import RANDOM, Classifier, build
from lpcam.classifiers.early_layers import early_layers
from lpcam.classifiers.engines import Engine
from lpcam.classifiers.feature_store import FeatureStore
from lpcam.data.dataset import Dataset, DecodedImages, Item
from lpcam.data.image_files import NEGATIVES
from lpcam.data.pixels import key_of, look_at_pixels, refuse_ruin
from lpcam.data.reader import ListName, Opened
from lpcam.data.survey import Finding
from lpcam.data.validation import check_images
from lpcam.evaluation.scoring import why_not_scored
from lpcam.method.settings import METHODS, LpcamSettings, Method
from lpcam.pipeline.cache import LEFTOVERS, Output, Record, Result, Task
from lpcam.pipeline.datasets import LISTS, SEGMENT_LISTS, Given, read_dataset
from lpcam.pipeline.engine import RunEngine, samples
from lpcam.pipeline.recipe import Recipe
from lpcam.pipeline.run_folder import RunFolder
from lpcam.pipeline.sharing import Shared
from lpcam.runtime.distributed import Processes, Sharing
from lpcam.runtime.errors import ArtefactError, ClassifierError, DataError, LpcamError, RecipeError
from lpcam.runtime.files import digest_file, digest_json, read_json, write_bytes, write_json
from lpcam.runtime.progress import progress
from lpcam.runtime.resources import (
    available_memory,
    available_threads,
    choose_device,
    reuse_freed_memory,
    threads_beside,
)
from lpcam.runtime.versions import versions
from lpcam.training.loop import History, TrainingOptions
from lpcam.training.saved_network import SavedNetwork

logger = logging.getLogger(__name__)
GPU_BATCH = 8
MEMORY_SHARE = 0.5
"""Share of the available memory that a run uses where the recipe names no amount."""
FEATURES_SHARE, IMAGES_SHARE = 0.5, 0.1
"""Shares of a run's memory for what several stages need: features, and decoded images. The rest
is for the reservoir."""
USUAL_STRIDE = 32  #: Of a backbone whose recipe names no output stride.
FEWEST_CELLS = 12
"""Cells of the features along an image's shorter side, below which larger scales are taken."""
LARGEST_SCALE = 3  #: Largest factor of the scales.
FILE_SECONDS = 60.0  #: How long a file that another machine has written may take to become visible.
N = TypeVar("N", bound=SavedNetwork)
S = TypeVar("S")
FileOf = Callable[[Path, str], Path]  #: Gives the file of an image's id in a folder.


class Context:
    """One pass over the stages.

    ``only`` is the one stage that may have anything to do; ``lists`` are what the stages need.
    """

    def __init__(
        self,
        recipe: Recipe,
        command: str,
        processes: Processes,
        device: torch.device | None,
        *,
        stages: Sequence[str],
        only: str | None = None,
        lists: Sequence[ListName] | None = None,
        shared: Shared | None = None,
    ) -> None:
        self.recipe = recipe
        self.shared = shared
        self.command = command
        self.processes = processes
        self.device = device or choose_device(recipe.run.device)
        self.stages = stages
        self.only = only
        self.lists = lists or (*LISTS, *(SEGMENT_LISTS if recipe.segment is not None else ()))
        self.folder = RunFolder(recipe.folder)
        self.threads = recipe.run.threads or available_threads(processes.here)
        torch.set_num_threads(self.threads)
        reuse_freed_memory()
        self.dataset, self.records = self._index()
        self.sharing = self._sharing()
        self.results: dict[str, Result] = {}
        self.choices: list[Record] = []
        """What the run chose: ``key``, ``value`` and ``reason``."""
        self.verdicts: dict[str, Record] = {}
        """The judge's verdict on the maps of each method whose threshold it chooses."""
        self.lpcam = self._with_scales(recipe.lpcam)
        self.given_maps: Given | None = None
        self.given_masks: Given | None = None
        self.rows: list[Record] = []
        self.warnings: tuple[str, ...] = ()  #: What makes the results of this run doubtful.
        self._store: FeatureStore | None = None
        self._unscored: dict[str, str | None] = {}
        """For each list, the reason why its true masks cannot be scored, or None."""
        if processes.first and only is None:
            self._write_recipe()

    def task(
        self,
        name: str,
        parts: Record,
        files: Sequence[Path],
        work: Callable[..., Output | None],
        prepare: Callable[[], Any] | None = None,
    ) -> Task:
        """A task with one result, in the folder of its name."""
        return Task([Result(name, self.folder / name, parts, files)], work, prepare)

    def image_task(
        self,
        parts: Mapping[str, Record],
        label: str,
        items: Sequence[Item],
        files: Sequence[FileOf],
        start: Callable[..., Callable[[Item], None]],
        source: Result | None = None,
    ) -> Task:
        """A task that makes files of each image, unless all of them are there.

        It has a result for each name in ``parts``. ``start``, called with those to be made,
        returns what makes their files of an image. They change by class as those of
        ``source`` do, from which they are made.
        """

        def work(*results: Result) -> None:
            make = start(*results)

            @torch.inference_mode()
            def unless_made(item: Item) -> None:
                if all(f(one.folder, item.id).is_file() for one in results for f in files):
                    return
                try:
                    make(item)
                except LpcamError as error:
                    raise type(error)(
                        f"{label}, image {item.id!r}: {error}; if memory is short, lower "
                        "maps.maximum_side or run.threads, else repair the image or its map, or "
                        "leave it out of the list"
                    ) from error

            mine = self.sharing.mine(items)
            with progress(label, len(mine)) as advance:
                for _ in self.sharing.map(unless_made, mine):
                    advance(1, "")

        images = self.digest(items)
        results = []
        for name, own in parts.items():
            made = [file(self.folder / name, item.id) for file in files for item in items]
            result = Result(name, self.folder / name, {"images": images, **own}, made)
            if source is not None:
                result.by_class = source.by_class
                result.labels = self.labels(name, items, files)
            results.append(result)
        return Task(results, work, apart=True)

    def labels(
        self, name: str, items: Sequence[Item], files: Sequence[FileOf]
    ) -> dict[Path, list[str]]:
        """Names of the classes of each file of a result."""
        names = self.dataset.classes.names
        return {
            file(self.folder / name, item.id): [names[index] for index in item.labels]
            for file in files
            for item in items
        }

    def training_task(
        self,
        name: str,
        parts: Record,
        path: Path,
        build: Callable[[], N],
        train: Callable[[N, Path], History],
    ) -> Task:
        """A task that trains a network, built before anything is removed, and writes its file."""

        def work(network: N, result: Result) -> Output | None:
            history = train(network, result.folder)
            if not self.processes.first:
                return None
            network.save(path, {"stage": result.key, "versions": versions()})
            digest, fingerprint = digest_file(path), network.fingerprint()
            return {"history": history, "digest": digest, "fingerprint": fingerprint}

        return self.task(name, parts, [path], work, build)

    def given_task(
        self, name: str, network: Record, path: Path, build: Callable[[], N], trained: Path
    ) -> Task:
        """A task that takes a trained network from a file; ``network`` is what the recipe names."""

        def take(built: N, _: Path) -> History:
            built.take(trained)
            return []

        parts = {"revision": 1, "trained": digest_file(trained), **network}
        return self.training_task(name, parts, path, build, take)

    def training_options(self, folder: Path) -> TrainingOptions:
        """Arguments of every training; ``folder`` is for checkpoints."""
        return {
            "seed": self.recipe.run.seed,
            "folder": folder,
            "workers": self.threads if self.device.type == "cuda" else 0,
            "processes": self.processes,
        }

    def execute(self, task: Task, *, again: bool = False) -> bool:
        """Make the results of a task unless they are up to date; tell whether they were made."""
        results, first = task.results, self.processes.first
        self.results |= {result.name: result for result in results}
        others = () if self.shared is None else self.shared.folders
        stale = [one for one in results if not (one.done() or any(map(one.take, others)))]
        wanted = stale if task.apart and not again else results if again or stale else []
        if wanted:
            if self.only is not None and not again:
                raise ArtefactError(
                    f"{stale[0].folder} is missing, unfinished or not of the present data, weights "
                    "and recipe; bring the run up to date first: lpcam run "
                    f"{shlex.quote(str(self.folder.recipe))} --run.folder "
                    f"{shlex.quote(str(self.folder.path))}"
                )
            prepared = () if task.prepare is None else (task.prepare(),)
            self.processes.wait()
            if first:
                for result in wanted:
                    result.begin()
            self.processes.wait()
            output = task.work(*prepared, *wanted) or {}
            self.processes.wait()
            if first:
                for result in wanted:
                    result.finish(output)
            self.processes.wait()
            for result in results:
                # Processes that did not write the record read its output here; some file systems
                # show a new file to other machines only after a moment.
                deadline = time.monotonic() + FILE_SECONDS
                while not result.done() and time.monotonic() < deadline:
                    time.sleep(0.1)
        if first:  # also those of a run that was stopped at its very end
            for folder in (result.folder for result in results):
                for path in (path for pattern in LEFTOVERS for path in folder.glob(pattern)):
                    path.unlink()
        return bool(wanted)

    def _index(self) -> tuple[Dataset, dict[str, Record]]:
        """The data set without unreadable images, and a record of each image's files."""
        path, recipe = self.folder.index, self.folder.recipe
        before = read_json(path) if path.is_file() else {"records": {}}
        ours = isinstance(before, dict) and isinstance(before.get("records"), dict)
        if not ours or (recipe.is_file() and not path.is_file()):
            raise ArtefactError(
                f"{recipe if ours else path} was not written by a run, so it may be yours; choose "
                "another run folder with --run.folder"
            )
        if not self.processes.first:
            self.processes.wait()  # the first checks the images, the others read what it found
            before = read_json(path)
        dataset = read_dataset(
            self.recipe,
            self.lists,
            painted=self.folder.truth,
            workers=self.threads,
            check=lambda opened: self._measured(opened, before),
        )
        found = (Finding(**one) for one in before["pixels"]["findings"])
        told = (str(one) for one in found if one.attention)
        dataset = replace(dataset, notices=(*dataset.notices, *told))
        dataset = dataset.keeping(DecodedImages(int(self.memory() * IMAGES_SHARE)))
        with progress("checking images", len(dataset.items)) as advance:
            dataset, records = check_images(
                dataset,
                before["records"],
                advance=advance,
                workers=self.threads,
                save=lambda records: write_json(path, {**before, "records": records}),
            )
        if self.processes.first:
            for notice in dataset.notices:
                logger.info("data: %s", notice)
            notices = list(dataset.notices)
            index = {**before, "records": records, "skipped": skips(dataset), "notices": notices}
            if before != index:
                write_json(path, index)
            self.processes.wait()
        return dataset, records

    def _measured(self, opened: Opened, before: Record) -> Dataset:
        """The data set with its range, once its pixels were looked at; kept in the index."""
        dataset, key, seen = opened.dataset, key_of(opened.dataset), before.get("pixels", {})
        given = dataset.reading.as_json().get("range")
        # the recipe of a run has the range that was measured
        if seen.get("key") != key or given not in (seen["given"], seen["range"]):
            looked, findings = look_at_pixels(dataset, opened.true_masks, self.threads)
            seen = {"key": key, "given": given, "range": looked.reading.as_json().get("range")}
            before["pixels"] = seen = {**seen, "findings": [asdict(one) for one in findings]}
            write_json(self.folder.index, before)
            for finding in findings:
                if not finding.attention:  # the others are notices of the data
                    logger.info("pixels: %s", finding)
        refuse_ruin((Finding(**one) for one in seen["findings"]), anyway=self.recipe.data.anyway)
        span = seen["range"] and tuple(seen["range"])
        data = self.recipe.data.model_copy(update={"range": span})
        self.recipe = self.recipe.model_copy(update={"data": data})
        return dataset.read_with(replace(dataset.reading, range=span))

    def items(self, stage: ListName) -> list[Item]:
        """The usable images of the list that a stage works on; DataError if there is none."""
        name = self.recipe.data.list_of(stage)
        items = self.dataset.select(name)
        if not items:
            raise DataError(f"the list {name!r} ({stage}) has no usable image")
        return [*items, *self.negatives] if stage == "classify" else items

    @property
    def negatives(self) -> list[Item]:
        """The usable images of the folder of negatives; none without one."""
        return [] if self.recipe.data.negatives is None else self.dataset.select(NEGATIVES)

    def truth(self, stage: ListName) -> list[Item]:
        """The images of a list with a true mask; none, with a notice, if no mask shows a class."""
        name = self.recipe.data.list_of(stage)
        items = [item for item in self.items(stage) if item.mask is not None]
        if items and name not in self._unscored:
            why = self._unscored[name] = why_not_scored(items, self.dataset.classes)
            if why is not None:
                notice = f"the list {name!r} is not scored: {why}"
                if self.processes.first:
                    logger.warning("%s", notice)
                self.dataset = replace(self.dataset, notices=(*self.dataset.notices, notice))
        return [] if self._unscored.get(name) else items

    def digest(self, items: Sequence[Item], *, truth: bool = False) -> str:
        """Digest of ids, labels and file contents: of the images, or also of their masks."""
        field = "digest" if truth else "image_digest"
        return digest_json([[i.id, list(i.labels), self.records[i.id][field]] for i in items])

    def _with_scales(self, settings: LpcamSettings) -> LpcamSettings:
        """The settings with scales that fit the images, where they are ``auto``."""
        if "scales" not in settings.automatic or not self.records:
            return settings
        limit = self.recipe.maps.maximum_side
        sizes = [sorted((r["height"], r["width"])) for r in self.records.values()]
        side = float(np.median([short * min(1, limit / long) for short, long in sizes]))
        stride = self.recipe.classifier.output_stride or USUAL_STRIDE
        factor = max(1, min(LARGEST_SCALE, math.ceil(FEWEST_CELLS * stride / side)))
        scales = tuple(factor * scale for scale in settings.scales)
        reason = f"the shorter side has {side:.0f} pixels, {side / stride:.1f} cells, in the median"
        self.chose("lpcam.scales", ", ".join(f"{scale:g}" for scale in scales), reason)
        return settings.fixed(scales=scales)

    def chose(self, key: str, value: str, reason: str) -> None:
        """Note and tell what the run chose itself, and why; a later choice replaces an earlier."""
        choice = {"key": key, "value": value, "reason": reason}
        if choice in self.choices:
            return
        others = [one for one in self.choices if one["key"] != key]
        # in an order that does not depend on which results are up to date
        self.choices = sorted([*others, choice], key=lambda one: one["key"])
        if self.processes.first:
            logger.info("chosen: %s = %s (%s)", key, value, reason)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The maps that the run makes of its own classifier."""
        return METHODS if self.recipe.lpcam.early is not None else METHODS[:-1]

    def threshold(self, method: str, stated: S) -> float | S:
        """Threshold of a method's maps: the judge's, else the stated one."""
        if method in self.verdicts:
            return float(self.verdicts[method]["threshold"])
        return stated

    def judge(self, method: str, verdict: Record) -> None:
        """Take and tell a verdict on the maps of a method, instead of an earlier one."""
        self.verdicts[method] = verdict
        if "agreement" in verdict:
            reason = f"agrees best with LPCAM-E, mIoU {100 * verdict['agreement']:.1f}"
        else:
            reason = f"colours say {verdict['by_colours']:.2f}"
            if verdict["by_features"] is not None:
                reason += f", features {verdict['by_features']:.2f}"
            else:
                self.chose("early layers", "none", "none are found in the backbone")
        self.chose(f"threshold of {method}", f"{verdict['threshold']:.2f}", reason)
        doubt = f"the threshold of {method} is doubtful: "
        self.warnings = tuple(one for one in self.warnings if not one.startswith(doubt))
        if verdict["disagree"]:
            self.warnings += (f"{doubt}{reason}; look at its masks, or set seeds.threshold",)

    def own_threshold(self, method: str) -> float:
        """Threshold of the maps of the run's own classifier."""
        return self.threshold(method, self.recipe.fixed_threshold(method))

    @cached_property
    def early_layers(self) -> tuple[str, ...]:
        """Early layers of the backbone that the run looks at; none where nothing is chosen."""
        return self._early_layers(self.classifier) if self.makes_maps else ()

    def _early_layers(self, classifier: Classifier) -> tuple[str, ...]:
        if not self._looks_early:
            return ()
        try:
            return early_layers(classifier.backbone)
        except ClassifierError:
            return ()

    @property
    def _looks_early(self) -> bool:
        chooses = any(self.recipe.chooses_threshold(method) for method in self.methods)
        return chooses or self.recipe.lpcam.early is not None

    @property
    def makes_maps(self) -> bool:
        """Whether the run makes maps of its own, not from another program's maps or masks."""
        return self.given_maps is None and self.given_masks is None

    @cached_property
    def training_method(self) -> str:
        """How the classifier is trained: ``probe`` or ``finetune``."""
        if self.recipe.classifier.method != "auto":
            return self.recipe.classifier.method
        return "finetune" if self.device.type == "cuda" else "probe"

    @cached_property
    def classifier(self) -> Classifier:
        """The trained classifier, loaded when a stage first needs it."""
        return Classifier.load(self.folder.classifier).to(self.device)

    def store(self, classifier: Classifier) -> FeatureStore:
        """The features of the classifier's backbone that the stages share."""
        if self._store is not None:
            return self._store
        layers = self._early_layers(classifier)
        section, probe = self.recipe.maps, self.recipe.classifier.probe
        mirror = self.training_method == "probe" and probe.long_side is None and probe.mirror
        flip, kept = (
            self.recipe.lpcam.flip or mirror,
            (*self.items("maps"), *self.items("prototypes")),
        )
        key = digest_json([self._weights_key(), self.features_key, flip, layers, self.digest(kept)])
        make = partial(
            FeatureStore,
            classifier,
            flip=flip,
            maximum_side=section.maximum_side,
            dtype=section.features,
            precision=section.precision,
            budget=int(self.memory() * FEATURES_SHARE),
            keep=(item.id for item in kept),
            early=layers,
            folded=partial(self._run_engine.classifier, engine=self.engine, layers=layers),
        )
        self._store = make() if self.shared is None else self.shared.features(key, make)
        self._passes_before = self._store.passes
        return self._store

    def _weights_key(self) -> Any:
        """What determines the weights of the backbone, as JSON."""
        section, seed = self.recipe.classifier, self.recipe.run.seed
        if self.training_method == "probe" and section.trained is None:
            return [section.backbone_key(), seed if section.weights == RANDOM else None]
        return self.results["classifier"].output.get("digest", str(self.folder.path))

    @cached_property
    def _run_engine(self) -> RunEngine:
        def images() -> list[Tensor]:
            items, limit = list(self.dataset.items.values()), self.recipe.maps.maximum_side
            sizes = [self.sharing.sizes[item.id] for item in items]
            return samples(items, sizes, self.lpcam.scales, limit)

        return RunEngine(self.recipe, self.folder, self.device, self.processes, images)

    @cached_property
    def engine(self) -> Engine:
        """What runs the passes of frozen networks; decided once for the weights of a run folder."""
        made = self.results["classifier"].output if "classifier" in self.results else {}
        weights = made.get("fingerprint")
        if weights is None and self.makes_maps:  # else its weights need not be there
            weights = self.recipe.classifier.backbone_key()

        def given() -> tuple[Classifier, Sequence[str]]:
            classifier = self.classifier if made else self.untrained()
            return classifier, self._early_layers(classifier)

        parts = [weights, self._looks_early, self.makes_maps]
        record = self._run_engine.decide(parts, given if self.makes_maps else None)
        if record["engine"] != "torch" or self.recipe.run.engine != "torch":
            self.chose("run.engine", record["engine"], record["reason"])
        found: Engine = record["engine"]
        return found

    @property
    def engine_key(self) -> Record:
        """The engine, for a cache key; nothing for torch."""
        return {} if self.engine == "torch" else {"engine": self.engine}

    @property
    def features_key(self) -> Record:
        """What changes the features, for a cache key."""
        return {**self.recipe.maps.features_key(), **self.engine_key}

    def accelerate(
        self, network: nn.Module, call: Callable[[Tensor], Any] | None = None
    ) -> nn.Module:
        """A frozen network, or what ``call`` makes of images with it, as the run's engine runs it.

        It stays as it is, which is told, where the engine cannot run it.
        """
        return self._run_engine.network(network, self.engine, call)

    def untrained(self, weights: str | Path | None = None) -> Classifier:
        """A classifier with its first weights, the recipe's or others, on the run's device."""
        section, names = self.recipe.classifier, self.dataset.classes.names
        first = section.first_weights(self.recipe.run.seed)
        first["weights"] = weights or first["weights"]
        return build(section.spec(), names, **first).to(self.device)

    @property
    def passes(self) -> int:
        """Images that went through the backbone so far, each with its mirror, at a scale."""
        return 0 if self._store is None else self._store.passes - self._passes_before

    def memory(self) -> float:
        """Memory that this process may use for features, in bytes."""
        if self.recipe.run.memory is not None:
            return self.recipe.run.memory * 2**30
        return available_memory() * MEMORY_SHARE / self.processes.here

    def _sharing(self) -> Sharing:
        count = self.processes.count
        owner: dict[str, int] = {}
        if count > 1:
            # The lists whose features serve most often come first, so that each is shared evenly.
            order: tuple[ListName, ...] = ("maps", "prototypes", "evaluate", "test", "classify")
            lists = [self.items(s) for s in order if s in self.lists]
            if (name := self.recipe.data.lists.validate_) is not None and "classify" in self.lists:
                lists.append(self.dataset.select(name))
            ids = dict.fromkeys(item.id for items in lists for item in items)
            owner = {image_id: place % count for place, image_id in enumerate(ids)}
        return Sharing(
            self.processes,
            threads_beside(self.device, self.threads),
            self.recipe.run.batch or (1 if self.device.type == "cpu" else GPU_BATCH),
            {name: (r["height"], r["width"]) for name, r in self.records.items()},
            owner,
        )

    def _write_recipe(self) -> None:
        """Keep the recipe with the run, with what ``auto`` resolved to on this machine."""
        values = self.recipe.model_dump(mode="json", by_alias=True)
        values["classifier"]["method"] = self.training_method
        resolved = yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()
        path = self.folder.recipe
        if not path.is_file() or path.read_bytes() != resolved:
            write_bytes(path, resolved)


def one_network(section: str, names: Sequence[str]) -> None:
    """Raise a RecipeError if one trained network is given where several are needed."""
    if len(names) > 1:
        raise RecipeError(
            f"{section}.trained is one network, but {', '.join(names)} need one each; choose one: "
            f"--{section}.{'masks' if section == 'segment' else 'maps'} '[{names[-1]}]'"
        )


def required(section: S | None) -> S:
    """A section of the recipe, in stages that exist only with it."""
    assert section is not None
    return section


def skips(dataset: Dataset) -> list[Record]:
    """The images that were left out, with the reason, as JSON."""
    return [asdict(skip) for skip in dataset.skipped]
