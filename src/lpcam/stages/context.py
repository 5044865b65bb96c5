"""What the stages of a run share: its folder, data, classifier, features and processes."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml

from lpcam.data.check import check_images
from lpcam.data.folder import read_folder
from lpcam.data.items import Dataset, Item
from lpcam.data.truth import with_mask_folder
from lpcam.data.voc import read_voc
from lpcam.errors import ArtefactError, DataError
from lpcam.ledger import Stage
from lpcam.parallel import Sharing
from lpcam.processes import Processes
from lpcam.progress import progress
from lpcam.recipe import ListName, Method, Recipe
from lpcam.resources import (
    available_memory,
    available_threads,
    choose_device,
    reuse_freed_memory,
)
from lpcam.storage import digest_file, digest_json, read_json, write_bytes, write_json

logger = logging.getLogger(__name__)

StageName = Literal[
    "classify",
    "cam",
    "prototypes",
    "lpcam",
    "seeds",
    "host-labels",
    "host",
    "host-prototypes",
    "host-maps",
    "ir-labels",
    "irn",
    "psa-labels",
    "psa",
    "pseudo",
    "segment",
    "test",
    "evaluate",
    "report",
]
STAGES: tuple[StageName, ...] = get_args(StageName)
LISTS: tuple[ListName, ...] = ("classify", "prototypes", "maps", "evaluate")
"""Those that every run needs."""
SEGMENT_LISTS: tuple[ListName, ...] = ("segment", "test")
"""Those of recipes with a section segment."""
HOSTING: tuple[StageName, ...] = ("host-labels", "host", "host-prototypes", "host-maps")
"""Stages of recipes with a section host alone."""
REFINING: tuple[StageName, ...] = ("ir-labels", "irn", "psa-labels", "psa", "pseudo")
"""Stages of recipes with a section refine alone."""
SEGMENTING: tuple[StageName, ...] = ("segment", "test")
"""Stages of recipes with a section segment alone."""
METHODS: tuple[Method, ...] = ("CAM", "LPCAM-F", "LPCAM")
FEATURE_KEYS = ("features", "precision", "maximum_side")
"""What of the recipe's maps section changes the features."""
GPU_BATCH = 8
GPU_THREADS = 4
"""On a GPU a few threads read and write while one computes."""
MEMORY_SHARE = 0.5
"""Of the memory that this process may use, where the recipe does not say how much."""
FEATURES_SHARE = 0.5
"""Of a run's memory for features that several stages need; the rest is for the reservoir."""
TRUTH = "truth"
"""Masks painted from annotations, in the run's folder."""
FILE_SECONDS = 60.0
"""How long a file that another machine has written may take to be seen."""


def left_out_stages(recipe: Recipe) -> tuple[StageName, ...]:
    """Stages that a recipe does not have."""
    host, refine = recipe.host, recipe.refine
    method = None if refine is None else refine.method
    there: dict[StageName, bool] = {
        "host-labels": host is not None and host.method == "amn",
        "host": host is not None,
        "host-prototypes": host is not None and host.clusters,
        "host-maps": host is not None,
        **dict.fromkeys(("ir-labels", "irn"), method == "irn"),
        **dict.fromkeys(("psa-labels", "psa"), method == "psa"),
        "pseudo": method is not None,
        **dict.fromkeys(SEGMENTING, recipe.segment is not None),
    }
    return tuple(name for name, present in there.items() if not present)


def read_dataset(
    recipe: Recipe,
    lists: Sequence[ListName] = LISTS,
    *,
    painted: Path | None = None,
    workers: int = 1,
) -> Dataset:
    """The data set of a recipe, labels read, images not yet.

    Args:
        lists: those that are needed.
        painted: folder for masks that must be painted (kind coco); None: they are left out.
        workers: masks painted at a time.

    Raises:
        DataError: if folders, lists or labels do not fit together.
    """
    data = recipe.data
    names = {data.list_of(s) for s in lists}
    if data.lists.validate_ is not None and "classify" in lists:
        names.add(data.lists.validate_)
    if data.kind == "voc":
        free = {data.list_of(s) for s in lists if s in SEGMENT_LISTS}
        free -= {data.list_of(s) for s in lists if s in LISTS}
        dataset = read_voc(
            data.root,
            lists=sorted(names),
            classes=data.classes,
            unlabelled=sorted(free),
            labels=_label_file(recipe),
        )
    elif data.kind == "folder":
        dataset = read_folder(data.root, classes=data.classes, labels=data.labels, masks=data.masks)
    else:
        painted = None if data.masks is not None else painted
        dataset = _read_coco(recipe, lists, sorted(names), painted, workers)
    if data.masks is not None and data.kind != "folder":
        dataset = with_mask_folder(dataset, data.masks)
    for name in sorted(names):
        dataset.select(name)
    within: tuple[tuple[ListName, str], ...] = (("evaluate", "evaluate"), ("segment", "segment"))
    for stage, verb in within:
        if stage not in lists or "maps" not in lists:
            continue
        outside = set(dataset.lists[data.list_of(stage)]) - set(dataset.lists[data.list_of("maps")])
        if outside:
            raise DataError(
                f"{len(outside)} images of the list to {verb} ({data.list_of(stage)!r}) are not "
                f"in the list that gets maps ({data.list_of('maps')!r}), e.g. {min(outside)!r}; "
                "set data.lists.maps to a list that holds them"
            )
    return dataset


def _label_file(recipe: Recipe) -> Path | None:
    labels = recipe.data.labels
    return None if labels is None or isinstance(labels, str) else labels


def _read_coco(
    recipe: Recipe,
    lists: Sequence[ListName],
    names: Sequence[str],
    painted: Path | None,
    workers: int,
) -> Dataset:
    """COCO's annotations; masks for the lists that are scored, or trained on."""
    from lpcam.data.coco import CocoFolder  # noqa: PLC0415

    data = recipe.data
    with progress("reading the annotations", 1) as advance:
        folder = CocoFolder(data.root, lists=names, classes=data.classes)
        advance(1, "")
    if painted is None:
        return folder.dataset
    scored: list[ListName] = [s for s in ("evaluate", "test") if s in lists]
    if "segment" in lists and "truth" in recipe.segmented:
        scored.append("segment")
    ids = [item.id for s in scored for item in folder.dataset.select(data.list_of(s))]
    with progress("painting masks", len(set(ids))) as advance:
        return folder.with_masks(
            painted,
            dict.fromkeys(ids),
            order=data.coco.order,
            crowds=data.coco.crowds,
            workers=workers,
            progress=lambda _done, _total: advance(1, ""),
        )


@dataclass(frozen=True)
class Given:
    """Maps or masks that another program made."""

    folder: Path
    key: str
    """Digest of their contents."""


class Run:
    """One pass over the stages; each stage is a function of it, in a module beside this one.

    Args:
        command: how the run was asked for.
        until: its last stage.
        only: the one stage that may have anything to do; None: any.
        lists: of the data that its stages need; None: what the recipe's need.
    """

    def __init__(
        self,
        recipe: Recipe,
        command: str,
        until: StageName,
        processes: Processes,
        device: torch.device | None,
        *,
        only: StageName | None = None,
        lists: Sequence[ListName] | None = None,
    ) -> None:
        self.recipe = recipe
        self.only = only
        self.lists = lists or (*LISTS, *(SEGMENT_LISTS if recipe.segment is not None else ()))
        self.command = command
        self.until = until
        self.folder = recipe.folder
        self.processes = processes
        self.device = device or choose_device(recipe.run.device)
        self.threads = recipe.run.threads or available_threads(processes.here)
        torch.set_num_threads(self.threads)
        reuse_freed_memory()
        path = self.folder / "recipe.yaml"
        if path.is_file() and not (self.folder / "index.json").is_file():
            raise ArtefactError(
                f"{path} was not written by a run, so it may be yours; choose another run folder "
                "with --run.folder"
            )
        self.dataset, self.records = self._index()
        self.sharing = self._sharing()
        self.stages: dict[str, Stage] = {}
        self.given: Given | None = None
        """Maps instead of the run's own."""
        self.given_masks: Given | None = None
        """Masks instead of the run's own."""
        self.rows: list[dict[str, Any]] = []
        self._unscored: dict[str, str | None] = {}
        """By list, why its true masks are of no use; None where they are."""
        values = recipe.model_dump(mode="json", by_alias=True)
        # What "auto" has come to: on another machine it may be something else.
        values["classifier"]["method"] = self.training_method
        resolved = yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()
        unchanged = path.is_file() and path.read_bytes() == resolved
        if processes.first and only is None and not unchanged:
            write_bytes(path, resolved)

    def note_use(self, stage: StageName, seconds: float, memory: int | None) -> None:
        """Record what a stage took of time and, at its peak, of this process's memory in bytes."""
        if not self.processes.first:
            return
        path = self.folder / "use.json"
        use = read_json(path) if path.is_file() else {}
        write_json(path, {**use, stage: {"seconds": round(seconds, 2), "peak_memory": memory}})

    def begin(self, *stages: Stage) -> None:
        """Make stages' folders ready, when every process has seen that they are not done.

        Raises:
            ArtefactError: if only another stage may have anything to do.
        """
        self.refuse(*stages)
        self.processes.wait()
        if self.processes.first:
            for stage in stages:
                stage.begin()
        self.processes.wait()

    def refuse(self, *stages: Stage) -> None:
        """Stop where a stage has something to do and only another may.

        Raises:
            ArtefactError: saying how to bring the run up to date.
        """
        for stage in stages:
            if self.only is not None and stage is not self.stages.get(self.only):
                raise ArtefactError(
                    f"{stage.folder} is missing, unfinished or not of the present data, weights "
                    "and recipe; bring the run up to date first: lpcam run "
                    f"{shlex.quote(str(self.folder / 'recipe.yaml'))} --run.folder "
                    f"{shlex.quote(str(self.folder))}"
                )

    def finish(self, *stages: Stage, **output: Any) -> None:
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
            order: tuple[ListName, ...] = ("maps", "prototypes", "evaluate", "test", "classify")
            lists = [self.items(s) for s in order if s in self.lists]
            if (name := self.recipe.data.lists.validate_) is not None and "classify" in self.lists:
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

    def _index(self) -> tuple[Dataset, dict[str, dict[str, Any]]]:
        path = self.folder / "index.json"
        before = read_json(path) if path.is_file() else {"records": {}}
        if not isinstance(before, dict) or not isinstance(before.get("records"), dict):
            raise ArtefactError(
                f"{path} was not written by a run, so it may be yours; choose another run folder "
                "with --run.folder"
            )
        if not self.processes.first:
            self.processes.wait()  # the first looks at the images, the others read what it found
            before = read_json(path)
        dataset = read_dataset(
            self.recipe, self.lists, painted=self.folder / TRUTH, workers=self.threads
        )
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

    def items(self, stage: ListName) -> list[Item]:
        """The usable images of the list that a stage works on.

        Raises:
            DataError: if there is none.
        """
        name = self.recipe.data.list_of(stage)
        items = self.dataset.select(name)
        if not items:
            raise DataError(f"the list {name!r} ({stage}) has no usable image")
        return items

    def truth(self, stage: ListName) -> list[Item]:
        """The images of a list that have a true mask; none where no mask shows a class.

        Such a list is not scored, as one without masks, and a notice tells why.

        Raises:
            ImageError: if a mask cannot be read.
        """
        from lpcam.evaluation import why_not_scored  # noqa: PLC0415

        name = self.recipe.data.list_of(stage)
        items = [item for item in self.items(stage) if item.mask is not None]
        if items and name not in self._unscored:
            why = self._unscored[name] = why_not_scored(items, self.dataset.classes)
            if why is not None:
                notice = f"the list {name!r} is not scored: {why}"
                if self.processes.first:
                    logger.warning("%s", notice)
                notices = (*self.dataset.notices, notice)
                self.dataset = replace(self.dataset, notices=notices)
        return [] if self._unscored.get(name) else items

    @property
    def makes_maps(self) -> bool:
        """Whether the maps are the run's own, not those (or the masks) of another program."""
        return self.given is None and self.given_masks is None

    def digest(self, items: Sequence[Item], *, truth: bool = False) -> str:
        """Digest of ids, labels and file contents (images alone, or with their masks)."""
        field = "digest" if truth else "image_digest"
        return digest_json(
            [[item.id, list(item.labels), self.records[item.id][field]] for item in items]
        )

    @cached_property
    def training_method(self) -> str:
        """How the classifier is trained: ``probe`` or ``finetune``."""
        wanted = self.recipe.classifier.method
        if wanted != "auto":
            return wanted
        return "finetune" if self.device.type == "cuda" else "probe"

    @cached_property
    def classifier(self) -> Any:
        """The trained classifier, loaded when a stage first needs it."""
        from lpcam.classifier import Classifier  # noqa: PLC0415

        path = self.stages["classify"].folder / "classifier.safetensors"
        return Classifier.load(path).to(self.device)

    def store(self, classifier: Any) -> Any:
        """The features that the stages share, of the classifier's backbone."""
        if "feature_store" not in self.__dict__:
            from lpcam.features import FeatureStore  # noqa: PLC0415

            section, probe = self.recipe.maps, self.recipe.classifier.probe
            mirror = self.training_method == "probe" and probe.long_side is None and probe.mirror
            shared = [*self.items("maps"), *self.items("prototypes")]
            self.__dict__["feature_store"] = FeatureStore(
                classifier,
                flip=self.recipe.lpcam.flip or mirror,
                maximum_side=section.maximum_side,
                dtype=section.features,
                precision=section.precision,
                budget=int(self.memory() * FEATURES_SHARE),
                keep=(item.id for item in shared),
            )
        return self.__dict__["feature_store"]

    def memory(self) -> float:
        """Bytes that this process may keep."""
        given = self.recipe.run.memory
        if given is not None:
            return given * 2**30
        return available_memory() * MEMORY_SHARE / self.processes.here

    @property
    def sample_memory(self) -> float:
        """Bytes of it for the sample of local features."""
        return self.memory() * (1 - FEATURES_SHARE)

    @property
    def prototypes_path(self) -> Path:
        return self.folder / "prototypes" / "prototypes.safetensors"

    @property
    def stages_of_methods(self) -> dict[Method, Stage]:
        return {
            "CAM": self.stages["cam"],
            "LPCAM-F": self.stages["lpcam_f"],
            "LPCAM": self.stages["lpcam"],
        }


def weights_key(weights: str) -> str:
    """What weights are: a word, or the digest of a file's contents."""
    is_file = weights.endswith(".safetensors") and Path(weights).is_file()
    return digest_file(Path(weights)) if is_file else weights


def remove_leftovers(folder: Path) -> None:
    """Remove from a finished stage's folder what only a stopped one would go on from."""
    for pattern in ("pooled-*.safetensors", "reservoir-*.safetensors", "checkpoint.safetensors"):
        for path in folder.glob(pattern):
            path.unlink()
