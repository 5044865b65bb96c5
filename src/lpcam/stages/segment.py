"""Segmenters trained on pseudo masks, and their masks of the list to test."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lpcam.data.images import limit_long_side, read_image, read_index_mask
from lpcam.data.items import Item
from lpcam.errors import ArtefactError, DataError, RecipeError
from lpcam.ledger import Stage
from lpcam.masks import enlarge_labels, write_mask
from lpcam.metrics import confusion, scores, truth_labels
from lpcam.networks.base import SegmenterSpec
from lpcam.networks.registry import NETWORKS
from lpcam.presets import CrfSettings, SegmentTestSettings
from lpcam.recipe import Recipe, SegmentSection, load_recipe
from lpcam.stages.context import Given, Run, remove_leftovers, weights_key
from lpcam.stages.refine import (
    GIVEN,
    PSEUDO,
    crf_memory,
    each,
    label_path,
    pseudo_threshold,
    refine_section,
    refined_title,
    sources,
)
from lpcam.stages.training import training_options
from lpcam.storage import digest_file, digest_json
from lpcam.version import versions

if TYPE_CHECKING:
    from lpcam.segmentation.augment import CheckedMasks
    from lpcam.segmentation.segmenter import Segmenter
    from lpcam.segmentation.train import Validation

logger = logging.getLogger(__name__)
SEGMENT = "segment"
TEST = "test"
TRUTH = "truth"
SEGMENTATION = "segmentation"
"""Stage of the rows of segmenters, which have no threshold."""
LAST, BEST = "segmenter.safetensors", "best.safetensors"
CRF = "crf"
"""Folder of the masks after a dense CRF, in that of the masks before it."""
NAMES = ("lpcam", "cam", GIVEN, TRUTH)
"""Of what segmenters are trained on, in the order in which one is taken."""


@dataclass(frozen=True)
class Teacher:
    """Masks that a segmenter is trained on."""

    title: str
    """In the names of rows, such as "LPCAM + IRN"."""
    name: str
    """Of the folders."""
    pairs: Sequence[tuple[Item, Path]]
    key: str
    """Of what made the masks."""

    @property
    def strict(self) -> bool:
        """Whether a mask id of no class is an error; true masks may hold other classes."""
        return self.name != TRUTH


def segment_section(run: Run) -> SegmentSection:
    """The recipe's section; there is one where a stage of this module has anything to do."""
    assert run.recipe.segment is not None
    return run.recipe.segment


def teachers(run: Run) -> list[Teacher]:
    """The masks that the recipe wants segmenters trained on, or those that were given.

    Raises:
        DataError: if true masks are wanted and there are none.
    """
    items, found = run.items("segment"), []
    if run.given_masks is not None:
        given = run.given_masks
        pairs = [(item, label_path(given.folder, item)) for item in items]
        return [Teacher("given masks", GIVEN, pairs, given.key)]
    made = {} if run.recipe.refine is None else {s.method: s for s in sources(run)}
    for wanted in run.recipe.segmented:
        if wanted == TRUTH:
            pairs = [(item, item.mask) for item in items if item.mask is not None]
            if not pairs:
                raise DataError(
                    f"no image of the list {run.recipe.data.list_of('segment')!r} has a true mask "
                    "to train on; take 'truth' out of segment.masks, or add masks"
                )
            key = run.digest([item for item, _ in pairs], truth=True)
            found.append(Teacher("true masks", TRUTH, pairs, key))
            continue
        assert run.recipe.refine is not None
        stage = run.stages[f"{PSEUDO}/{made[wanted].name}"]
        pairs = [(item, label_path(stage.folder, item)) for item in items]
        title = refined_title(run.recipe.refine, wanted)
        found.append(Teacher(title, made[wanted].name, pairs, stage.key))
    return found


def check(recipe: Recipe, *, given: bool = False) -> None:
    """Refuse, before any work, a recipe whose segmenter could not be trained.

    Args:
        given: whether masks of another program take the place of the run's own.

    Raises:
        RecipeError: if pseudo masks are wanted that the recipe does not make.
        ClassifierError: if the network or its weights cannot be had.
    """
    from lpcam.segmentation.segmenter import check_segmenter  # noqa: PLC0415

    section = recipe.segment
    if section is None:
        return
    wanted = [name for name in recipe.segmented if name != TRUTH]
    if wanted and recipe.refine is None and not given:
        raise RecipeError(
            f"the recipe {recipe.name} makes no pseudo masks of {wanted[0]}; add a section "
            "refine, such as --refine.method irn, or give masks by lpcam segment --masks FOLDER"
        )
    check_segmenter(spec_of(section), section.weights)


def rehearse(run: Run) -> None:
    """Refuse, before the stages that come first, what only a training would find.

    Nothing is done where a training has finished: its stage knows whether it still holds.

    Raises:
        ClassifierError: if the network cannot be built, or a batch cannot be shared out.
        DataError: if the best weights are wanted and no image to test has a true mask.
    """
    section = segment_section(run)
    if any((run.folder / SEGMENT / name / LAST).is_file() for name in NAMES):
        return
    if section.checkpoint == "best" and not _validation_items(run):
        raise DataError(
            f"no image of the list {run.recipe.data.list_of('test')!r} has a true mask to choose "
            "the best weights on; set segment.checkpoint to last"
        )
    shared = _tested_on(run)
    if shared:
        logger.warning(
            "%d images of the list to test are trained on too, so their scores say little of "
            "other images; name another list: --data.lists.test",
            len(shared),
        )
    from lpcam.segmentation.train import check_batch  # noqa: PLC0415

    check_batch(build(run), section.training, len(run.items("segment")), run.processes)


def take_masks(run: Run, folder: Path) -> None:
    """Train on the masks of another program instead of the run's own.

    Args:
        folder: with one index mask (PNG) an image of the list to segment, named by its id.

    Raises:
        DataError: if masks are missing.
    """
    paths = [label_path(folder, item) for item in run.items("segment")]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} images of the list "
            f"{run.recipe.data.list_of('segment')!r} have no mask, e.g. {missing[0]}; make them, "
            "or name a list of those that have one: --data.lists.segment"
        )
    run.given_masks = Given(folder, digest_json([digest_file(path) for path in paths]))


# -- Training ----------------------------------------------------------------------------------


def train(run: Run) -> bool:
    """A segmenter on each teacher's masks; whether there was anything to do."""
    worked = False
    section = segment_section(run)
    truth = _validation_items(run)
    for teacher in teachers(run):
        stage = run.stages[f"{SEGMENT}/{teacher.name}"] = Stage(
            run.folder / SEGMENT / teacher.name,
            {
                "revision": 1,
                "masks": teacher.key,
                "images": run.digest([item for item, _ in teacher.pairs]),
                "classes": list(run.dataset.classes.names),
                "mask_ids": list(run.dataset.classes.mask_ids),
                "network": section.model_dump(
                    mode="json",
                    include={"network", "arguments", "output_stride", "mean", "std"},
                ),
                "backbone": section.backbone_name,
                "weights": weights_key(section.weights),
                "training": section.training.model_dump(mode="json", exclude={"preset"}),
                "precision": section.precision,
                "validations": section.validations,
                "seed": run.recipe.run.seed,
            },
        )
        path = stage.folder / LAST
        if stage.done([path, *([stage.folder / BEST] if truth else [])]):
            if run.processes.first:
                remove_leftovers(stage.folder)  # of a run that was stopped at its very end
            continue
        worked = True
        run.refuse(stage)
        masks, segmenter = _check_masks(run, teacher), build(run)  # before anything is removed
        run.begin(stage)
        output = _train(run, masks, segmenter, stage, truth)
        if run.processes.first:
            output["digest"] = digest_file(path)
            output["validation"] = _validation_key(run, truth)
        run.finish(stage, **output)
        if run.processes.first:
            remove_leftovers(stage.folder)
    return worked


def _validation_items(run: Run) -> list[Item]:
    if not segment_section(run).validations:
        return []
    return run.truth("test")


def _validation_settings(section: SegmentSection) -> SegmentTestSettings:
    """Those of the test at scale 1 alone, so that other ways to test need no other training."""
    once: dict[str, Any] = {"scales": (1.0,), "flip": False, "window": None, "crf": None}
    return section.test.model_copy(update={**once, "fusion": "mean_logits"})


def _validation_key(run: Run, truth: Sequence[Item]) -> str:
    """Digest of what the choice of the best weights hangs on, beside the training."""
    settings = _validation_settings(segment_section(run))
    return digest_json(
        [
            run.digest(truth, truth=True),
            settings.model_dump(mode="json", exclude={"preset", "overlap", "crf_image"}),
            run.recipe.maps.maximum_side,
        ]
    )


def spec_of(section: SegmentSection) -> SegmenterSpec:
    """The network that a section describes."""
    return SegmenterSpec(
        section.network,
        section.backbone_name,
        section.arguments,
        section.output_stride,
        section.training.pyramid,
    )


def build(run: Run) -> Segmenter:
    """The untrained segmenter, on the run's device."""
    from lpcam.segmentation.segmenter import build_segmenter  # noqa: PLC0415

    section = segment_section(run)
    return build_segmenter(
        spec_of(section),
        run.dataset.classes,
        weights=section.weights,
        mean=section.mean,
        std=section.std,
        seed=run.recipe.run.seed,
    ).to(run.device)


def _check_masks(run: Run, teacher: Teacher) -> CheckedMasks:
    from lpcam.segmentation.augment import check_masks  # noqa: PLC0415

    classes = run.dataset.classes
    masks = check_masks(teacher.pairs, classes, strict=teacher.strict, workers=run.threads)
    for skip in masks.dropped:
        logger.info("%s is not trained on: %s", skip.id, skip.reason)
    if masks.unknown:
        ids = ", ".join(str(value) for value in masks.unknown)
        logger.info("mask values of no class are not trained on: %s", ids)
    logger.info("training on %d of %s", len(masks.pairs), teacher.title)
    return masks


def _train(
    run: Run, masks: CheckedMasks, segmenter: Segmenter, stage: Stage, truth: Sequence[Item]
) -> dict[str, Any]:
    from lpcam.segmentation.train import Validation, train_segmenter  # noqa: PLC0415

    section = segment_section(run)
    validation: Validation | None = None
    if truth:
        validation = Validation(
            truth,
            _validation_settings(section),
            section.validations,
            stage.folder / BEST,
            run.recipe.maps.maximum_side,
        )
    history = train_segmenter(
        segmenter,
        masks.pairs,
        section.training,
        precision=section.precision,
        validation=validation,
        **training_options(run, stage),
    )
    if run.processes.first:
        segmenter.save(stage.folder / LAST, {"stage": stage.key, "versions": versions()})
    labels = ("background", *run.dataset.classes.names)
    return {
        "history": history,
        "images": len(masks.pairs),
        "dropped": [{"id": skip.id, "reason": skip.reason} for skip in masks.dropped],
        "pixels": {**dict(zip(labels, masks.pixels, strict=True)), "ignored": masks.ignored},
    }


# -- Testing -----------------------------------------------------------------------------------


def test(run: Run) -> bool:
    """Masks of the list to test by every segmenter; whether there was anything to do."""
    section, items, worked = segment_section(run), run.items("test"), False
    for teacher in teachers(run):
        trained = run.stages[f"{SEGMENT}/{teacher.name}"]
        weights = segmenter_path(trained.folder, section)
        truth = _validation_items(run)
        if section.checkpoint == "best" and trained.output["validation"] != _validation_key(
            run, truth
        ):
            raise ArtefactError(
                f"{weights} was chosen on other true masks or at another size than the recipe "
                f"says now; delete {trained.folder} to train again, or set segment.checkpoint to "
                "last"
            )
        stage = run.stages[f"{TEST}/{teacher.name}"] = Stage(
            run.folder / TEST / teacher.name,
            {
                "revision": 1,
                "segmenter": digest_file(weights),
                "test": section.test.model_dump(mode="json", exclude={"preset"}),
                "crf": _crf_settings(section),
                "maximum_side": run.recipe.maps.maximum_side,
                "images": run.digest(items, truth=True),
            },
        )
        folders = [stage.folder, *([stage.folder / CRF] if section.test.crf else [])]
        outputs = [label_path(folder, item) for folder in folders for item in items]
        if stage.done(outputs):
            continue
        worked = True
        run.begin(stage)
        _segment(run, teacher, weights, stage, items)
        run.processes.wait()
        counts = {folder.name: _count(run, folder, items) for folder in folders}
        run.finish(stage, confusions={k: v for k, v in counts.items() if v is not None})
    return worked


def segmenter_path(folder: Path, section: SegmentSection) -> Path:
    """The weights that are used, in the folder of a training."""
    return folder / (BEST if section.checkpoint == "best" else LAST)


def _crf_settings(section: SegmentSection) -> dict[str, Any] | None:
    preset = section.test.crf
    return None if preset is None else CrfSettings.from_preset(preset).model_dump(mode="json")


def _segment(
    run: Run, teacher: Teacher, weights: Path, stage: Stage, items: Sequence[Item]
) -> None:
    from lpcam.segmentation import predict  # noqa: PLC0415
    from lpcam.segmentation.segmenter import Segmenter  # noqa: PLC0415

    settings = segment_section(run).test
    segmenter: Segmenter = Segmenter.load(weights).to(run.device)
    crf = predict.make_crf(settings, crf_memory(run))

    @torch.inference_mode()
    def make(item: Item) -> None:
        path, refined = label_path(stage.folder, item), label_path(stage.folder / CRF, item)
        if path.is_file() and (crf is None or refined.is_file()):
            return
        whole = read_image(item.image)
        image = limit_long_side(whole, run.recipe.maps.maximum_side)

        def write(path: Path, probabilities: torch.Tensor) -> None:
            labels = enlarge_labels(predict.labels(probabilities).cpu(), whole.shape[:2])
            write_mask(path, predict.label_mask(labels, segmenter.classes))

        found = predict.probabilities(segmenter, image, settings)
        write(path, found)
        if crf is not None:
            write(refined, predict.refine(found, image, settings, crf))

    each(run, f"masks of the segmenter trained on {teacher.title}", items, make)


def _count(run: Run, folder: Path, items: Sequence[Item]) -> list[list[int]] | None:
    """Confusion matrix of a folder's masks; None where there is no truth."""
    scored = [item for item in items if item.mask is not None]
    if not scored:
        return None
    classes = run.dataset.classes
    labels = len(classes) + 1

    def one(item: Item) -> torch.Tensor:
        assert item.mask is not None
        truth = truth_labels(read_index_mask(item.mask), classes)
        found = truth_labels(read_index_mask(label_path(folder, item)), classes)
        return confusion(truth, found, labels)

    total = torch.zeros(labels, labels, dtype=torch.int64)
    for counts in run.sharing.map(one, run.sharing.mine(scored)):
        total += counts
    summed: list[list[int]] = run.processes.sum(total).tolist()
    return summed


# -- Figures -----------------------------------------------------------------------------------


def segmented(run: Run) -> Mapping[str, tuple[Teacher, Path]]:
    """Folders of masks of the list to test by the name of the method, and who taught it."""
    section = run.recipe.segment
    if section is None or run.given is not None:
        return {}
    found = {}
    for teacher in teachers(run):
        folder = run.stages[f"{TEST}/{teacher.name}"].folder
        title = f"{NETWORKS[section.network].title} on {teacher.title}"
        found[title] = (teacher, folder)
        if section.test.crf:
            found[f"{title}, CRF"] = (teacher, folder / CRF)
    return found


def segmenter_protocol(run: Run) -> dict[str, Any]:
    """How the segmenters of a run are made and used, for every figure of theirs."""
    section, lists = segment_section(run), run.recipe.data
    split = lists.list_of("test")
    chosen = f"best mIoU on the truth of {split}" if section.checkpoint == "best" else "last step"
    return {
        **section.model_dump(mode="json", exclude={"masks", "backbone", "weights"}),
        "backbone": section.backbone_name,
        "weights": Path(section.weights).name,
        "checkpoint": chosen,
        "crf": _crf_settings(section),
        "list": lists.list_of("segment"),
        "tested_on_training_images": len(_tested_on(run)),
        "maximum_side": run.recipe.maps.maximum_side,
    }


def _tested_on(run: Run) -> set[str]:
    """Images that the segmenters are trained on and tested on."""
    return {item.id for item in run.items("segment")} & {item.id for item in run.items("test")}


def figures(run: Run) -> list[dict[str, Any]]:
    """Scores of every segmenter, as :func:`lpcam.stages.evaluate.evaluate` records them."""
    from lpcam.evaluation import row_of  # noqa: PLC0415

    rows = []
    names = run.dataset.classes.names
    images = len(run.truth("test")) if segmented(run) else 0
    if not images:
        return []
    for title, (teacher, folder) in segmented(run).items():
        stage = run.stages[f"{TEST}/{teacher.name}"]
        counts = stage.output["confusions"].get(folder.name)
        if counts is None:
            continue
        rows.append(
            {
                **row_of(title, images, None, None, scores(torch.tensor(counts), names)),
                "crf": folder.name == CRF,
                "teacher": teacher.name,
                "mask_threshold": mask_threshold(run, teacher),
            }
        )
    return rows


def mask_threshold(run: Run, teacher: Teacher) -> float | None:
    """Threshold of the refined maps that pseudo masks were cut at; None of other masks."""
    for source in [] if run.given_masks is not None or teacher.name == TRUTH else sources(run):
        if source.name == teacher.name:
            return pseudo_threshold(refine_section(run), source)
    return None


# -- Of a finished run -------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A trained segmenter of a run folder."""

    name: str
    """Of the masks that it was trained on: lpcam, cam, truth or given."""
    path: Path
    recipe: Recipe
    section: SegmentSection
    folder: Path
    """Of the run."""

    @property
    def tested(self) -> Path:
        """Where its masks of the list to test are, those after a CRF in `CRF` below it."""
        return self.folder / TEST / self.name


def find_segmenter(folder: Path, name: str | None = None) -> Finished:
    """A trained segmenter of a run.

    Args:
        name: of the masks that it was trained on; None takes the first there is of `NAMES`.

    Raises:
        ArtefactError: if the folder holds no run, or none whose segmenter is trained.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise ArtefactError(
            f"{folder} holds no run: there is no {path.name} in it; give the folder that 'lpcam "
            "run' wrote"
        )
    recipe = load_recipe(path)
    if recipe.segment is None:
        raise ArtefactError(
            f"the run {folder} trained no segmenter; run it with --segment.network deeplabv2 (or "
            "wideresnet38, or upernet)"
        )
    paths = {one: segmenter_path(folder / SEGMENT / one, recipe.segment) for one in NAMES}
    found = [one for one, path in paths.items() if path.is_file()]
    if not found or (name is not None and name not in found):
        asked = "" if name is None else f" on {name}"
        raise ArtefactError(
            f"the run {folder} has no segmenter trained{asked}; there are: "
            f"{', '.join(found) or 'none, bring the run up to date'}"
        )
    chosen = name or found[0]
    return Finished(chosen, paths[chosen], recipe, recipe.segment, folder)
