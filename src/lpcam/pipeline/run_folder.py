"""The folder of a run: every path in it, and what a finished run can be used for."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lpcam.classifiers.classifier import Classifier
from lpcam.classifiers.engines import Precision, accelerated, choose_engine, file_name
from lpcam.data.dataset import ClassTable, Dataset, Skip
from lpcam.data.images import IMAGE_SUFFIXES, Reading, read_image
from lpcam.data.map_files import map_path, read_maps
from lpcam.data.reader import ListName
from lpcam.evaluation.judge import quality
from lpcam.explain.explainer import Explainer
from lpcam.formats.masks.base import MaskEntry
from lpcam.formats.masks.export import Judge
from lpcam.formats.models.lpcam_model import LPCAMModel
from lpcam.method.choices import Choice, format_choices
from lpcam.method.early import EarlyPrototypes
from lpcam.method.prototypes import Prototypes
from lpcam.method.seeds import seeds, to_mask
from lpcam.method.settings import Method
from lpcam.pipeline.datasets import read_dataset
from lpcam.pipeline.recipe import Recipe, load_recipe
from lpcam.runtime.errors import ArtefactError, DataError, LpcamError
from lpcam.runtime.files import digest_file, read_json, write_bytes
from lpcam.runtime.resources import choose_device
from lpcam.segmentation.folders import INDEX as PREDICTED
from lpcam.segmentation.segmenter import Segmenter
from lpcam.segmentation.settings import SegmentSection

logger = logging.getLogger(__name__)
RESULTS = {"CAM": "cam", "LPCAM-F": "lpcam_f", "LPCAM": "lpcam", "LPCAM-E": "lpcam_e"}
"""Name of the result that holds the maps of each method."""
TRAINED_ON = ("lpcam_e", "lpcam", "cam", "given", "truth")
"""Masks that segmenters are trained on, in the order in which one is chosen."""


def mask_path(folder: Path, image_id: str) -> Path:
    """The file of an image's mask in a folder of masks."""
    return folder / f"{image_id}.png"


def refined_map_path(folder: Path, image_id: str) -> Path:
    """The file of an image's refined maps in the folder of its pseudo mask."""
    return map_path(folder / "maps", image_id)


@dataclass(frozen=True)
class TrainedSegmenter:
    """A trained segmenter of a run."""

    name: str  #: Name of the masks that it was trained on: lpcam, cam, truth or given.
    path: Path
    recipe: Recipe
    section: SegmentSection
    run: RunFolder

    def load(self) -> Segmenter:
        """The network with its classes and preprocessing."""
        return Segmenter.load(self.path)

    def tested(self, *, crf: bool) -> Path:
        """Folder of its masks of the test list, after the dense CRF if one was used."""
        return self.run.tested(self.name, crf=crf and self.section.test.crf is not None)

    @property
    def made_by(self) -> dict[str, Any]:
        """Provenance of the segmenter, for files that it writes."""
        digest = digest_file(self.path)
        return {"run": self.recipe.name, "trained_on": self.name, "segmenter": digest}


@dataclass(frozen=True)
class Masks:
    """Masks of one folder, and what they show."""

    name: str  #: Folder of the masks below the run folder, such as ``pseudo/lpcam``.
    entries: tuple[MaskEntry | Skip, ...]
    """Masks in the order of the list; a `Skip` where the mask or the image is missing."""
    classes: ClassTable
    made_by: Mapping[str, Any]


@dataclass(frozen=True)
class Maps:
    """Map files of one folder."""

    name: str
    folder: Path
    ids: tuple[str, ...]
    missing: tuple[str, ...]  #: Images of the list that have no map.
    classes: ClassTable
    made_by: Mapping[str, Any]


class RunFolder:
    """The folder of a run, which need not exist yet: its paths, and what a finished run gives."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"  #: The recipe as it was run.
        self.index = self.path / "index.json"  #: Every image's files, and what was skipped.
        self.metrics = self.path / "metrics.json"  #: The scores with their protocol.
        self.image_scores = self.path / "evaluation/images.json"  #: Each image's mIoU by method.
        self.use = self.path / "use.json"  #: Time and peak memory of each stage.
        self.progress = self.path / "progress.json"  #: What an unfinished run does, or did last.
        self.sheet = self.path / "sheet.png"  #: The contact sheet.
        self.report = self.path / "report.html"
        self.truth = self.path / "truth"  #: Masks painted from annotations.
        self.classifier = self.path / "classifier/classifier.safetensors"
        self.engine = self.path / "engine"  #: Networks as an engine runs them.
        self.engine_record = self.engine / "engine.json"  #: Which engine runs them, and why.
        self.corrected = self.path / "label-studio"  #: True masks that people drew there.
        self.choices = self.path / "prototypes.yaml"  #: A person's choices about prototypes.
        self.early = self.path / "early/early.safetensors"  #: Prototypes of early layers.

    def __truediv__(self, name: str) -> Path:
        """The folder of a result, such as ``pseudo/lpcam``."""
        return self.path / name

    def prototypes(self, result: str = "prototypes") -> Path:
        """The prototypes of a result: the run's own, or those of a host."""
        return self / result / "prototypes.safetensors"

    def used_prototypes(self, recipe: Recipe) -> Path:
        """The prototypes that maps are made of: as fitted, or with the recipe's choices."""
        return self.prototypes("chosen" if recipe.lpcam.corrected else "prototypes")

    def patch(self, index: int, side: str, number: int) -> Path:
        """Picture of the nearest patch of a prototype of a class, which the report writes."""
        return self / "report" / f"patches/{index}-{side}-{number}.webp"

    def network(self, result: str) -> Path:
        """The trained network of a host or a refinement, such as ``host/amn``."""
        return self / result / "network.safetensors"

    def segmenter(self, name: str, *, best: bool = False) -> Path:
        """File of the segmenter trained on the masks ``name``, its last or its best weights."""
        return self / f"segment/{name}" / ("best.safetensors" if best else "segmenter.safetensors")

    def tested(self, name: str, *, crf: bool = False) -> Path:
        """Folder of a segmenter's masks of the list to test, before or after a dense CRF."""
        return self / f"test/{name}/crf" if crf else self / f"test/{name}"

    def load_recipe(self, changes: Mapping[str, Any] | None = None) -> Recipe:
        """The recipe of the run, with some values replaced; ArtefactError if there is no run."""
        if not self.recipe.is_file():
            raise ArtefactError(
                f"{self.path} holds no run: there is no {self.recipe.name} in it; give the folder "
                "that 'lpcam run' wrote"
            )
        return load_recipe(self.recipe, changes)

    def _finished(self, path: Path, stage: str) -> Path:
        if not path.is_file():
            raise ArtefactError(
                f"the run {self.path} has no {path.name} yet; run 'lpcam run {self.recipe} "
                f"--until {stage}' first"
            )
        return path

    def explainer(self, *, device: str = "auto") -> Explainer:
        """The classifier and the prototypes of the run, for maps of new images.

        Args:
            device: "auto", "cpu", "cuda", ...

        Raises:
            ArtefactError: if the run has not reached its prototypes.
            PrototypeError: if the prototypes belong to another classifier.
        """
        recipe = self.load_recipe()
        classifier = Classifier.load(self._finished(self.classifier, "classify"))
        path = self._finished(self.used_prototypes(recipe), "prototypes")
        method: Method = "LPCAM" if recipe.seed_method == "CAM" else recipe.seed_method
        fingerprint, early = classifier.fingerprint(), None
        if method == "LPCAM-E":
            early = EarlyPrototypes.load(
                self._finished(self.early, "early"), fingerprint=fingerprint
            )
        values: dict[str, Any] = {
            "threshold": self._threshold(recipe, method),
            "cam_threshold": self._threshold(recipe, "CAM"),
            "choices": None,  # the prototypes have them
        }
        if "scales" in recipe.lpcam.automatic and (made := self._parts("cam")):
            values["scales"] = tuple(made["scales"])
        trained = self._parts("classifier").get("method", recipe.classifier.method)
        probe, long_side = recipe.classifier.probe, recipe.classifier.finetune.long_side
        return Explainer(
            classifier.to(choose_device(device)),
            Prototypes.load(path, fingerprint=fingerprint),
            recipe.lpcam.fixed(**values),
            mask_ids=self._mask_ids(recipe, len(classifier.classes)),
            # whole images at the middle training size, as the classifier is validated
            score_side=sum(long_side) // 2 if trained == "finetune" else probe.long_side,
            precision=recipe.maps.precision,
            maximum_side=recipe.maps.maximum_side,
            foreground_only=method == "LPCAM-F",
            early=early,
            folded=lambda own: self._accelerated(own, recipe.maps.precision),
            reading=recipe.data.reading_of_images,
            made_by={
                "run": recipe.name,
                "backbone": recipe.classifier.backbone,
                "prototypes": digest_file(path),
            },
        )

    def _accelerated(self, classifier: Classifier, precision: Precision) -> Classifier:
        """The classifier as the run's engine runs it, where its file and the engine are there."""
        record = read_json(self.engine_record) if self.engine_record.is_file() else {}
        engine, layers = record.get("engine", "torch"), record.get("layers", ())
        if engine == "torch":
            return classifier.folded()
        file = self.engine / file_name(classifier.backbone, layers)
        try:
            engine = choose_engine(engine if file.is_file() else "torch", classifier.device)
        except LpcamError as error:
            logger.warning("torch is used: %s", error)
            engine = "torch"
        return accelerated(classifier, engine, file, layers=layers, precision=precision)

    def choose(self, choices: Sequence[Choice] = ()) -> Prototypes:
        """The fitted prototypes with the choices in the run's file, and with more of them.

        New choices are written to the file, ``prototypes.yaml``. The maps of the run follow once it
        is run with ``lpcam.choices``.

        Raises:
            ArtefactError: if the run has not reached its prototypes.
            PrototypeError: if a choice does not fit the prototypes.
        """
        fitted = Prototypes.load(self._finished(self.prototypes(), "prototypes"))
        path = self.choices if self.choices.is_file() else self.load_recipe().lpcam.choices
        made = fitted.chosen(path, "equal").with_choices(choices)
        if choices:
            write_bytes(self.choices, format_choices(made.choices, made.digest).encode())
        return made

    def _parts(self, name: str, part: str = "parts") -> Mapping[str, Any]:
        """The readable key of a result, or its output; empty if there is none."""
        record = self / name / "stage.json"
        found: Mapping[str, Any] = read_json(record).get(part, {}) if record.is_file() else {}
        return found

    def _threshold(self, recipe: Recipe, method: Method) -> float:
        """Threshold of the maps of a method: the judge's where the recipe leaves it to it."""
        names = [f"{kind}/{RESULTS[method]}" for kind in ("agreement", "judge")]  # the last first
        names = ["early"] if method == "LPCAM-E" else names
        found = next(filter(None, (self._parts(name, "output") for name in names)), None)
        if not recipe.chooses_threshold(method) or found is None:
            return recipe.fixed_threshold(method)
        return float(found.get("verdict", found)["threshold"])

    def _mask_ids(self, recipe: Recipe, count: int) -> tuple[int, ...] | None:
        """Mask values of the classes, even if the data set no longer exists."""
        ids = tuple(int(value) for value in self._parts("seeds").get("mask_ids", ()))
        if len(ids) == count:
            return ids
        try:
            ids = read_dataset(recipe, ("maps",)).classes.mask_ids
        except DataError as error:
            logger.warning("mask values are 1, 2, ... in the order of the classes: %s", error)
            return None
        return ids if len(ids) == count else None

    def model(self) -> LPCAMModel:
        """The classifier with LPCAM as its last layer, on the CPU, for export.

        Raises:
            ArtefactError: if the run has not reached its prototypes.
            PrototypeError: if the prototypes belong to another classifier.
        """
        explainer = self.explainer(device="cpu")
        return LPCAMModel.of_explainer(explainer, Classifier.load(self.classifier))

    def segmenters(self, name: str | None = None) -> TrainedSegmenter:
        """A trained segmenter of the run.

        Args:
            name: name of the masks that it was trained on; None takes the first there is of
                `TRAINED_ON`.

        Raises:
            ArtefactError: if the folder holds no run, or no such segmenter.
        """
        recipe = self.load_recipe()
        section = recipe.segment
        if section is None:
            raise ArtefactError(
                f"the run {self.path} trained no segmenter; run it with --segment.network deeplabv2"
            )
        best = section.checkpoint == "best"
        paths = {one: self.segmenter(one, best=best) for one in TRAINED_ON}
        found = [one for one, path in paths.items() if path.is_file()]
        if not found or (name is not None and name not in found):
            asked = "" if name is None else f" on {name}"
            raise ArtefactError(
                f"the run {self.path} has no segmenter trained{asked}; there are: "
                f"{', '.join(found) or 'none, bring the run up to date'}"
            )
        chosen = name or found[0]
        return TrainedSegmenter(chosen, paths[chosen], recipe, section, self)

    def masks(self, name: str | None = None) -> Masks:
        """The masks of the run, or of what ``lpcam predict`` wrote.

        Images of the list without a mask, those that the run skipped, and masks of images that are
        no longer in the list come with the reason. Images are named by their paths below the folder
        of the data set, or, where it has several, below the one that holds them all.

        Args:
            name: name of the masks: ``seeds``, ``pseudo/lpcam``, ``test/lpcam``, ... None:
                pseudo masks if there are any (LPCAM's first), else seeds.

        Raises:
            ArtefactError: if the folder has no such masks; the message lists those it has.
        """
        if (self / PREDICTED).is_file():
            return _predicted(self.path, name)
        recipe = self.load_recipe()
        patterns = ("pseudo/*", "seeds", "host-seeds/*", "test/*/crf", "test/*")
        chosen = self._chosen(name, "masks", patterns, ".png")
        stage: ListName = "test" if chosen.startswith("test/") else "maps"
        dataset, list_name = read_dataset(recipe, (stage,)), recipe.data.list_of(stage)
        entries = _below_one_folder(
            MaskEntry(i.id, i.image, mask_path(self / chosen, i.id), i.file_name, i.reading)
            for i in dataset.select(list_name)
        )
        remedy = "bring the run up to date first"
        if not any(entry.mask.is_file() for entry in entries):
            raise ArtefactError(
                f"{self / chosen} has no mask of any image of the list {list_name!r}; {remedy}"
            )
        left_out = (*dataset.skipped, *self._without_image(chosen, list_name, dataset))
        made_by = {"run": recipe.name, "masks": chosen}
        present = _present(entries, remedy, self._skipped())
        return Masks(chosen, (*present, *left_out), dataset.classes, made_by)

    def maps(self, name: str | None = None) -> Maps:
        """The map files of the run.

        Args:
            name: ``lpcam``, ``cam``, ``lpcam_f``, ``host-maps/amn_lpcam``, ``pseudo/lpcam/maps``,
                ...; None: ``lpcam``.

        Raises:
            ArtefactError: if the folder has no such maps; the message lists those it has.
        """
        recipe = self.load_recipe()
        patterns = ("lpcam_e", "lpcam", "cam", "lpcam_f", "host-maps/*", "pseudo/*/maps")
        chosen = self._chosen(name, "maps", patterns, ".npz")
        dataset = read_dataset(recipe, ("maps",))
        list_name, folder = recipe.data.list_of("maps"), self / chosen
        there = {one: map_path(folder, one).is_file() for one in dataset.lists[list_name]}
        if not any(there.values()):
            raise ArtefactError(
                f"{folder} has no maps of any image of the list {list_name!r}; bring the run up to "
                "date first"
            )
        present, missing = (tuple(one for one in there if there[one] is x) for x in (True, False))
        made_by = {"run": recipe.name, "maps": chosen}
        return Maps(chosen, folder, present, missing, dataset.classes, made_by)

    def judge(self) -> Judge:
        """What the run has about a mask of its list: heat map, ``quality`` and ``miou_METHOD``.

        The quality (:func:`lpcam.evaluation.judge.quality`) compares with the mask of CAM, mIoU
        with the truth.
        """
        recipe = self.load_recipe()
        classes, threshold = read_dataset(recipe, ("maps",)).classes, self._threshold(recipe, "CAM")
        known = read_json(self.image_scores) if self.image_scores.is_file() else {}
        places = {image_id: place for place, image_id in enumerate(known.pop("ids", ()))}
        names = [name for name in ("lpcam_e", "lpcam") if (self / name).is_dir()]

        def judge(entry: MaskEntry, mask: NDArray[np.uint8]) -> tuple[Any, dict[str, float]]:
            place = places.get(entry.id)
            scores = {f"miou_{RESULTS[k]}": v[place] for k, v in known.items() if place is not None}
            paths = [map_path(self / name, entry.id) for name in (*names[:1], "cam")]
            if entry.image is None or not all(path.is_file() for path in paths):
                return None, scores
            cam = read_maps(paths[-1])
            other = to_mask(seeds(torch.from_numpy(cam.high_res), threshold), cam.keys, classes)
            scores["quality"] = quality(read_image(entry.image, entry.reading), mask, other)
            return read_maps(paths[0]).high_res.max(axis=0, initial=0), scores

        return judge

    def _chosen(self, name: str | None, what: str, patterns: tuple[str, ...], suffix: str) -> str:
        """The named result, or the first that there is; of several, LPCAM's."""
        known = [
            path.relative_to(self.path).as_posix()
            for pattern in patterns
            for path in sorted(
                self.path.glob(pattern), key=lambda p: (not p.name.endswith("lpcam"), p.name)
            )
            if path.is_dir() and any(path.rglob(f"*{suffix}"))
        ]
        if not known:
            raise ArtefactError(f"{self.path} has no {what} yet; bring the run up to date first")
        if name not in (None, *known):
            raise ArtefactError(f"{self.path} has no {what} {name!r}; it has {', '.join(known)}")
        return name or known[0]

    def _skipped(self) -> dict[str, str]:
        """Why the run skipped images."""
        records = [read_json(p) for p in (self.metrics, self.index) if p.is_file()]
        return {one["id"]: one["reason"] for record in records for one in record.get("skipped", ())}

    def _without_image(self, chosen: str, list_name: str, dataset: Dataset) -> Iterator[Skip]:
        """Masks of images that were in the list when the masks were made."""
        known = {*dataset.lists[list_name]}
        for skip in dataset.skipped:
            known |= {skip.id, *(skip.id.removesuffix(ending) for ending in IMAGE_SUFFIXES)}
        # folders inside that of the masks
        inside = {"pseudo": "boundaries", "test": "crf"}.get(chosen.partition("/")[0])
        folder = self / chosen
        for path in sorted(folder.rglob("*.png")):
            image_id = path.relative_to(folder).as_posix().removesuffix(".png")
            if image_id not in known and image_id.partition("/")[0] != inside:
                yield Skip(
                    image_id,
                    f"the run made a mask of it, but the list {list_name!r} has no such image now; "
                    "put image and label back, or bring the run up to date",
                )


def _predicted(folder: Path, name: str | None) -> Masks:
    """The masks that ``lpcam predict`` wrote."""
    if name not in (None, "masks"):
        raise ArtefactError(f"{folder} has no masks {name!r}; it has masks")
    index = read_json(folder / PREDICTED)
    try:
        table = index["made_by"]["classes"]
        names = sorted(table, key=table.__getitem__)  # the file's own order is alphabetical
        classes = ClassTable(tuple(names), tuple(table[name] for name in names))
        images = {str(key): Path(value) for key, value in index["images"].items()}
        reading = Reading.of_images(index["made_by"])
        made_by = {"run": index["made_by"].get("run"), "masks": "masks"}
        skipped = [Skip(str(one["image"]), str(one["reason"])) for one in index["skipped"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(
            f"{folder / PREDICTED} is damaged ({error}); write it again with 'lpcam predict'"
        ) from error
    entries = _below_one_folder(
        # a key holds the folders of its image, and may have an ending
        MaskEntry(
            key,
            image,
            mask_path(folder / "masks", key),
            "/".join(image.parts[-1 - key.count("/") :]),
            reading,
        )
        for key, image in images.items()
    )
    if not any(entry.mask.is_file() for entry in entries):
        raise ArtefactError(f"{folder} has no masks; run 'lpcam predict' first")
    there = [e if e.image and e.image.is_file() else replace(e, image=None) for e in entries]
    present = _present(there, "run 'lpcam predict' again", {})
    return Masks("masks", (*present, *skipped), classes, made_by)


def _below_one_folder(found: Iterable[MaskEntry]) -> list[MaskEntry]:
    """Name images by their paths below one folder: two folders may each have an image 0.jpg."""
    entries = list(found)
    folders = [entry.images_below for entry in entries]
    if len({*folders} - {None}) < 2:
        return entries
    above = os.path.commonpath([folder for folder in folders if folder is not None])
    return [
        entry
        if folder is None
        else replace(entry, file_name=(folder / entry.name).relative_to(above).as_posix())
        for entry, folder in zip(entries, folders, strict=True)
    ]


def _present(
    entries: Iterable[MaskEntry], remedy: str, reasons: Mapping[str, str]
) -> Iterator[MaskEntry | Skip]:
    """The entries, with the reason instead of those whose mask is missing."""
    for entry in entries:
        if entry.mask.is_file():
            yield entry
        elif entry.id in reasons:
            yield Skip(entry.id, f"the run skipped it: {reasons[entry.id]}")
        else:
            yield Skip(entry.id, f"there is no mask {entry.mask}; {remedy}")
