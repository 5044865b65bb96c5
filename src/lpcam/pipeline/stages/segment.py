"""Segmenters trained on pseudo masks, and their masks of the list to test."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lpcam.classifiers.classifier import RANDOM
from lpcam.data.dataset import Item
from lpcam.data.images import limit_long_side
from lpcam.data.masks import enlarge_labels, read_index_mask, write_mask
from lpcam.evaluation.scoring import row_of
from lpcam.evaluation.segmentation import confusion, scores, truth_labels
from lpcam.pipeline.cache import Output, Record, Result, Task
from lpcam.pipeline.context import Context, required
from lpcam.pipeline.datasets import Given
from lpcam.pipeline.run_folder import TRAINED_ON, mask_path
from lpcam.pipeline.stages import refine
from lpcam.refine.crf import CrfSettings
from lpcam.runtime.errors import ArtefactError, DataError, RecipeError
from lpcam.runtime.files import digest_file, digest_json, weights_key
from lpcam.runtime.versions import versions
from lpcam.segmentation import inference
from lpcam.segmentation.augmentation import CheckedMasks, check_masks
from lpcam.segmentation.segmenter import Segmenter, build_segmenter, check_segmenter
from lpcam.segmentation.settings import SegmentSection, SegmentTestSettings
from lpcam.segmentation.training import Validation, check_batch, train_segmenter

logger = logging.getLogger(__name__)
TRUTH = "truth"
SEGMENTATION = "segmentation"  #: Stage of the rows of segmenters, which have no threshold.
CRF = "crf"  #: Name of the folder of masks after a dense CRF.
GIVEN_NETWORK = "as given"  #: Title of a segmenter that was trained elsewhere.


@dataclass(frozen=True)
class TrainingMasks:
    """Masks that a segmenter is trained on."""

    title: str  #: Name in the rows of results, such as ``LPCAM + IRN``.
    name: str  #: Name of the folders of the network and its masks.
    pairs: Sequence[tuple[Item, Path]]
    key: str  #: Cache key of the masks.
    threshold: float | None = None
    """Threshold of the refined maps that they were cut at; None for other masks."""


def training_masks(context: Context) -> list[TrainingMasks]:
    """Masks that segmenters are trained on: the recipe's, or another program's."""
    recipe, items, given = context.recipe, context.items("segment"), context.given_masks
    trained = required(recipe.segment).trained
    if trained is not None:
        return [TrainingMasks(GIVEN_NETWORK, refine.GIVEN, [], required(given).key)]
    if given is not None:
        pairs = [(item, mask_path(given.folder, item.id)) for item in items]
        return [TrainingMasks("given masks", refine.GIVEN, pairs, given.key)]
    found = []
    made = {} if recipe.refine is None else {s.method: s for s in refine.sources(context)}
    for wanted in recipe.segmented:
        if wanted == TRUTH:
            pairs = [(item, item.mask) for item in items if item.mask is not None]
            if not pairs:
                raise DataError(
                    f"no image of the list {recipe.data.list_of('segment')!r} has a true mask to "
                    "train on; take 'truth' out of segment.masks, or add masks"
                )
            key = context.digest([item for item, _ in pairs], truth=True)
            found.append(TrainingMasks("true masks", TRUTH, pairs, key))
        else:
            source = made[wanted]
            section = refine.chosen(context, source)
            result = context.results[f"pseudo/{source.name}"]
            pairs = [(item, mask_path(result.folder, item.id)) for item in items]
            title, threshold = section.title(wanted), refine.threshold(context, section, source)
            found.append(TrainingMasks(title, source.name, pairs, result.key, threshold))
    return found


def validate(context: Context) -> None:
    """Validate the segmenter before any stage runs; the network only if none is trained."""
    section, recipe = required(context.recipe.segment), context.recipe
    wanted = [name for name in recipe.segmented if name != TRUTH]
    if wanted and recipe.refine is None and context.given_masks is None:
        raise RecipeError(
            f"the recipe {recipe.name} makes no pseudo masks of {wanted[0]}; add a section refine, "
            "e.g. --refine.method irn, or give masks with 'lpcam segment RECIPE FOLDER'"
        )
    if section.trained is not None:
        _build(context).take(section.trained)
        return
    check_segmenter(section.spec(), section.weights)
    if any(context.folder.segmenter(name).is_file() for name in TRAINED_ON):
        return
    if section.checkpoint == "best" and not _validation_items(context):
        raise DataError(
            f"no image of the list {recipe.data.list_of('test')!r} has a true mask to choose the "
            "best weights on; set segment.checkpoint to last"
        )
    if shared := _tested_on(context):
        logger.warning(
            "%d images of the list to test are also trained on, so their scores say little about "
            "other images; name another list: --data.lists.test",
            shared,
        )
    images = len(context.items("segment"))
    check_batch(_build(context), section.training, images, context.processes)


def import_masks(context: Context, folder: Path) -> None:
    """Train on the index masks (ID.png) of another program instead of the run's own."""
    paths = [mask_path(folder, item.id) for item in context.items("segment")]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} images of the list "
            f"{context.recipe.data.list_of('segment')!r} have no mask, e.g. {missing[0]}; make "
            "them, or name a list of those that have one: --data.lists.segment"
        )
    if unused := {*folder.rglob("*.png")} - {*paths}:
        logger.warning("%d masks below %s are of no image to train on", len(unused), folder)
    context.given_masks = Given(folder, digest_json([digest_file(path) for path in paths]))


def give_segmenter(context: Context, file: Path) -> None:
    """Take a trained segmenter instead of masks to train one on."""
    context.given_masks = Given(file.parent, digest_file(file))


def train_segmenters(context: Context) -> Iterator[Task]:
    """A segmenter on each kind of masks."""
    section = required(context.recipe.segment)
    task = _training_task if section.trained is None else _given_task
    for masks in training_masks(context):
        yield task(context, section, masks)


def _given_task(context: Context, section: SegmentSection, masks: TrainingMasks) -> Task:
    """A task that takes a trained segmenter from its file."""
    path, trained = context.folder.segmenter(masks.name), required(section.trained)
    network, build = _network(context, section), partial(_build, context)
    return context.given_task(f"segment/{masks.name}", network, path, build, trained)


def _network(context: Context, section: SegmentSection) -> Record:
    """The architecture and the classes, for a cache key."""
    classes = context.dataset.classes
    fields = {"network", "arguments", "output_stride", "mean", "std"}
    return {
        "classes": list(classes.names),
        "mask_ids": list(classes.mask_ids),
        "network": section.model_dump(mode="json", include=fields),
        "backbone": section.backbone_name,
    }


def _training_task(context: Context, section: SegmentSection, masks: TrainingMasks) -> Task:
    classes, truth = context.dataset.classes, _validation_items(context)
    parts = {
        "revision": 1,
        "masks": masks.key,
        "images": context.digest([item for item, _ in masks.pairs]),
        **_network(context, section),
        "weights": weights_key(section.weights),
        "training": section.training.model_dump(mode="json", exclude={"preset"}),
        "precision": section.precision,
        "validations": section.validations,
        "seed": context.recipe.run.seed,
    }
    last, best = (context.folder.segmenter(masks.name, best=best) for best in (False, True))
    validation = None
    if truth:
        at_one_scale, side = _validation_settings(section), context.recipe.maps.maximum_side
        validation = Validation(truth, at_one_scale, section.validations, best, side)

    def prepare() -> tuple[CheckedMasks, Segmenter]:
        return _check_masks(context, masks), _build(context)

    def work(prepared: tuple[CheckedMasks, Segmenter], result: Result) -> Output | None:
        checked, segmenter = prepared
        history = train_segmenter(
            segmenter,
            checked.pairs,
            section.training,
            precision=section.precision,
            validation=validation,
            **context.training_options(result.folder),
        )
        if not context.processes.first:
            return None
        segmenter.save(last, {"stage": result.key, "versions": versions()})
        labels = ("background", *classes.names)
        pixels = {**dict(zip(labels, checked.pixels, strict=True)), "ignored": checked.ignored}
        return {
            "history": history,
            "images": len(checked.pairs),
            "dropped": [asdict(skip) for skip in checked.dropped],
            "pixels": pixels,
            "digest": digest_file(last),
            "validation": _validation_key(context, truth),
        }

    files = [last, best] if truth else [last]
    return context.task(f"segment/{masks.name}", parts, files, work, prepare)


def _validation_items(context: Context) -> list[Item]:
    return context.truth("test") if required(context.recipe.segment).validations else []


def _validation_settings(section: SegmentSection) -> SegmentTestSettings:
    """Settings of the test at scale 1, so that other ways to test need no new training."""
    once: dict[str, Any] = {"scales": (1.0,), "flip": False, "crf": None}
    return section.test.model_copy(update={**once, "fusion": "mean_logits"})


def _validation_key(context: Context, truth: Sequence[Item]) -> str:
    """Digest of what the choice of the best weights depends on, apart from the training."""
    settings = _validation_settings(required(context.recipe.segment))
    used = settings.model_dump(mode="json", exclude={"preset", "crf_image"})
    side = context.recipe.maps.maximum_side
    return digest_json([context.digest(truth, truth=True), used, side])


def _build(context: Context) -> Segmenter:
    """The untrained segmenter, on the run's device."""
    section = required(context.recipe.segment)
    return build_segmenter(
        section.spec(),
        context.dataset.classes,
        weights=RANDOM if section.trained else section.weights,
        mean=section.mean,
        std=section.std,
        seed=context.recipe.run.seed,
    ).to(context.device)


def _check_masks(context: Context, masks: TrainingMasks) -> CheckedMasks:
    # A mask id of no class is an error, but true masks may hold other classes.
    strict, classes = masks.name != TRUTH, context.dataset.classes
    found = check_masks(masks.pairs, classes, strict=strict, workers=context.threads)
    for skip in found.dropped:
        logger.info("%s is not trained on: %s", skip.id, skip.reason)
    if found.unknown:
        ids = ", ".join(str(value) for value in found.unknown)
        logger.info("mask values of no class are not trained on: %s", ids)
    logger.info("training on %d of %s", len(found.pairs), masks.title)
    return found


def test(context: Context) -> Iterator[Task]:
    """Masks of the list to test by every segmenter."""
    for masks in training_masks(context):
        yield _test_task(context, required(context.recipe.segment), masks)


def _test_task(context: Context, section: SegmentSection, masks: TrainingMasks) -> Task:
    trained, items = context.results[f"segment/{masks.name}"], context.items("test")
    best = section.checkpoint == "best" and section.trained is None
    weights = context.folder.segmenter(masks.name, best=best)
    truth = _validation_items(context)
    if best and trained.output["validation"] != _validation_key(context, truth):
        raise ArtefactError(
            f"{weights} was chosen on other true masks or at another size than the recipe says "
            f"now; delete {trained.folder} to train again, or set segment.checkpoint to last"
        )
    parts = {
        "revision": 1,
        "segmenter": digest_file(weights),
        **context.engine_key,
        "test": section.test.model_dump(mode="json", exclude={"preset"}),
        "crf": _crf_settings(section),
        "maximum_side": context.recipe.maps.maximum_side,
        "images": context.digest(items, truth=True),
    }

    def start(result: Result) -> Callable[[Item], None]:
        segmenter = Segmenter.load(weights).to(context.device)
        segmenter.network = context.accelerate(segmenter.network)
        crf = inference.make_crf(section.test, refine.image_memory(context))

        def make(item: Item) -> None:
            whole = item.read()
            image = limit_long_side(whole, context.recipe.maps.maximum_side)

            def write(path: Path, probabilities: torch.Tensor) -> None:
                labels = enlarge_labels(inference.labels(probabilities).cpu(), whole.shape[:2])
                write_mask(path, inference.label_mask(labels, segmenter.classes))

            found = inference.probabilities(segmenter, image, section.test)
            write(mask_path(result.folder, item.id), found)
            if crf is not None:
                refined = inference.refine(found, image, section.test, crf)
                write(_after_crf(result.folder, item.id), refined)

        return make

    files = [mask_path, _after_crf] if section.test.crf else [mask_path]
    name, label = f"test/{masks.name}", f"masks of the segmenter trained on {masks.title}"
    task = context.image_task({name: parts}, label, items, files, start)

    def work(result: Result) -> Output:
        task.work(result)
        context.processes.wait()
        folders = [context.folder.tested(masks.name, crf=crf) for crf in (False, True)]
        scored = [item for item in items if item.mask is not None]
        return {
            "confusions": {
                folder.name: _count(context, folder, scored)
                for folder in (folders[: len(files)] if scored else ())
            }
        }

    return replace(task, work=work)


def _after_crf(folder: Path, image_id: str) -> Path:
    return mask_path(folder / CRF, image_id)


def _crf_settings(section: SegmentSection) -> Record | None:
    preset = section.test.crf
    return None if preset is None else CrfSettings.from_preset(preset).model_dump(mode="json")


def _count(context: Context, folder: Path, scored: Sequence[Item]) -> list[list[int]]:
    """Confusion matrix of a folder's masks."""
    classes = context.dataset.classes
    labels = len(classes) + 1

    def one(item: Item) -> torch.Tensor:
        assert item.mask is not None
        truth = truth_labels(item.read_mask(), classes)
        found = truth_labels(read_index_mask(mask_path(folder, item.id)), classes)
        return confusion(truth, found, labels)

    total = torch.zeros(labels, labels, dtype=torch.int64)
    for counts in context.sharing.map(one, context.sharing.mine(scored)):
        total += counts
    summed: list[list[int]] = context.processes.sum(total).tolist()
    return summed


def segmented(context: Context) -> Mapping[str, tuple[TrainingMasks, Path]]:
    """Folders of masks of the list to test by the name of their rows, and what was trained on."""
    section = context.recipe.segment
    if section is None or context.given_maps is not None:
        return {}
    found, on = {}, "" if section.trained else "on "
    for masks in training_masks(context):
        title = f"{section.title} {on}{masks.title}"
        found[title] = (masks, context.folder.tested(masks.name))
        if section.test.crf:
            found[f"{title}, CRF"] = (masks, context.folder.tested(masks.name, crf=True))
    return found


def protocol(context: Context) -> Record:
    """How the segmenters of a run are made and used, for the protocol of their scores."""
    section, lists = required(context.recipe.segment), context.recipe.data
    split = lists.list_of("test")
    chosen = f"best mIoU on the truth of {split}" if section.checkpoint == "best" else "last step"
    return {
        **section.model_dump(mode="json", exclude={"masks", "backbone", "weights"}),
        "backbone": section.backbone_name,
        "weights": Path(section.weights).name,
        "checkpoint": chosen,
        "crf": _crf_settings(section),
        "list": lists.list_of("segment"),
        "tested_on_training_images": _tested_on(context),
        "maximum_side": context.recipe.maps.maximum_side,
    }


def _tested_on(context: Context) -> int:
    """Number of images that the segmenters are both trained and tested on."""
    return len({i.id for i in context.items("segment")} & {i.id for i in context.items("test")})


def figures(context: Context) -> Iterator[tuple[TrainingMasks, bool, Record]]:
    """Score of every segmenter: its masks, whether a CRF refined its output, and its row."""
    names, found = context.dataset.classes.names, segmented(context)
    images = len(context.truth("test")) if found else 0
    for title, (masks, folder) in found.items() if images else ():
        counts = context.results[f"test/{masks.name}"].output["confusions"][folder.name]
        row = row_of(title, images, None, None, scores(torch.tensor(counts), names))
        yield masks, folder.name == CRF, row
