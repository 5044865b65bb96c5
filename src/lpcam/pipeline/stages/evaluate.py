"""Scores of the maps where there are masks, each with its protocol, and a contact sheet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lpcam.data.dataset import Item
from lpcam.data.drawing import SheetRow, choose_rows, sheet
from lpcam.data.images import read_image
from lpcam.data.map_files import map_path, read_maps
from lpcam.data.masks import read_index_mask
from lpcam.evaluation.scoring import score_maps
from lpcam.method.settings import METHODS
from lpcam.pipeline.cache import Record, StageCache, Task
from lpcam.pipeline.context import Context
from lpcam.pipeline.run_folder import mask_path
from lpcam.pipeline.stages import host, refine, segment
from lpcam.pipeline.stages.seeds import RESULTS
from lpcam.runtime.files import read_json, write_bytes, write_json
from lpcam.runtime.versions import versions


@dataclass(frozen=True)
class Scored:
    """Maps that are scored."""

    stage: str
    """``seed`` or ``pseudo``."""
    folder: Path
    key: str
    """Cache key of the result that holds them."""
    threshold: float
    """Fixed threshold of the preset or the recipe."""
    hosted: bool = False
    """Whether a host made the maps, or those they were refined from."""


def scored(context: Context) -> dict[str, Scored]:
    """Maps that this run scores, by the name of the method."""
    if context.given_masks is not None:
        return {}
    recipe, found, given = context.recipe, {}, context.given_maps
    if given is not None:
        fixed = recipe.fixed_threshold("LPCAM")
        found[refine.GIVEN] = Scored("seed", given.folder, given.key, fixed)
    else:
        for method in METHODS:
            result, fixed = context.results[RESULTS[method]], recipe.fixed_threshold(method)
            found[method] = Scored("seed", result.folder, result.key, fixed)
    arms = host.arms(context)
    for arm in arms:
        result = context.results[host.result_name("host-maps", arm)]
        fixed = host.section_of(context).settings.threshold
        found[arm.title] = Scored("seed", result.folder, result.key, fixed, hosted=True)
    for name, (source, result) in refine.refined(context).items():
        section = refine.section_of(context)
        fixed = section.refinement.threshold(section, source)
        hosted = source.method in {arm.title for arm in arms}
        maps = context.folder.refined_maps(source.name)
        found[name] = Scored("pseudo", maps, result.key, fixed, hosted)
    return found


def evaluate(context: Context) -> Iterator[Task]:
    """Score the maps and draw the contact sheet."""
    recipe, folder = context.recipe, context.folder
    methods = scored(context)
    items = context.truth("evaluate") if methods else []
    segmenters = segment.segmented(context)
    if segmenters:
        context.truth("test")  # so that a run with nothing to do says why it is not scored
    draws = bool(recipe.sheet.images) and context.makes_maps
    parts = {
        "revision": 3,
        "maps": {name: [one.key, one.threshold] for name, one in methods.items()},
        "seeds": context.results["seeds"].key if context.makes_maps else None,
        "segmenters": _segmenter_keys(context) if segmenters else None,
        "truth": context.digest(items, truth=True),
        "part_names": dict(context.dataset.part_names),
        "skipped": [skip.id for skip in context.dataset.skipped],
        "sheet": recipe.sheet.model_dump(mode="json"),
        # A figure keeps the versions that made it; newer ones do not invalidate it.
        "protocol": {k: v for k, v in protocol(context).items() if k != "versions"},
    }
    outputs = [folder.metrics]
    outputs += [folder.image_scores] if items else []
    outputs += [folder.sheet] if draws else []

    def work(_: StageCache) -> None:
        _evaluate(context, methods, items)
        if context.processes.first:
            for page in (folder.sheet, folder.report):
                page.unlink(missing_ok=True)  # they show the old figures
            if draws:
                _write_sheet(context)

    yield Task([context.result("evaluation", parts, outputs)], work)
    context.rows = read_json(folder.metrics)["rows"]


def _evaluate(context: Context, methods: Mapping[str, Scored], items: Sequence[Item]) -> None:
    """Write the figures."""
    rows: list[Record] = []
    found = None
    if items:
        folders = {name: one.folder for name, one in methods.items()}
        fixed = {name: one.threshold for name, one in methods.items()}
        found = score_maps(items, context.dataset, folders, fixed, context.sharing)
        rows = [_with_protocol(context, methods[row["method"]], row) for row in found.rows]
    rows += [_segmenter_row(context, row) for row in segment.figures(context)]
    if not context.processes.first:
        return
    if found is not None:
        ids = [item.id for item in items]
        write_json(context.folder.image_scores, {"ids": ids, **found.image_scores})
    outputs = {name: result.output for name, result in context.results.items()}
    events = list(outputs.get("prototypes", {}).get("events", []))
    for arm in host.arms(context):
        own = outputs.get(host.result_name("host-prototypes", arm), {}).get("events", [])
        events += [f"{arm.title}: {event}" for event in own]
    write_json(
        context.folder.metrics,
        {
            "rows": rows,
            "curves": {} if found is None else found.curves,
            "skipped": [{"id": s.id, "reason": s.reason} for s in context.dataset.skipped],
            "prototype_events": events,
            "classifier_history": outputs.get("classifier", {}).get("history", []),
            "host_history": _histories(context, "host"),
            "refine_history": _histories(context, "refine-network"),
            "segmenter_history": _histories(context, "segment"),
            "protocol": protocol(context),
            "command": context.command,
        },
    )


def _histories(context: Context, kind: str) -> Record:
    """Training histories of the networks of a kind of results, by name."""
    prefix = f"{kind}/"
    return {
        name.removeprefix(prefix): result.output["history"]
        for name, result in context.results.items()
        if name.startswith(prefix)
    }


def _with_protocol(context: Context, method: Scored, row: Record) -> Record:
    """A row of maps with its protocol."""
    shared = protocol(context)
    if method.stage == "seed":
        shared["refine"] = None
    if not method.hosted:
        shared.pop("host", None)
    by_truth = row["threshold_source"] == "ground truth"
    return {
        "stage": method.stage,
        "dataset": dataset_name(context),
        "split": context.recipe.data.list_of("evaluate"),
        **row,
        "protocol": {
            **shared,
            "crf": _crf_use(context, method),
            "threshold": row["threshold"],
            "threshold_source": (
                "best mIoU on this split's truth, by a sweep of 0.00, 0.01, ... 0.99"
                if by_truth
                else "fixed by the preset or the recipe"
            ),
            "command": context.command,
        },
    }


def _segmenter_keys(context: Context) -> Record:
    tests = {name: r.key for name, r in context.results.items() if name.startswith("test/")}
    return {"tests": tests, "protocol": segment.protocol(context)}


def _segmenter_row(context: Context, row: Record) -> Record:
    """A row of a segmenter with its protocol of training and test."""
    figure = {k: v for k, v in row.items() if k not in ("crf", "teacher", "mask_threshold")}
    training = context.results[f"segment/{row['teacher']}"].output
    shared = protocol(context)
    if row["teacher"] == segment.TRUTH:  # neither maps nor their refinement matter
        of_maps = _source_protocol(context)
        shared = {k: v for k, v in shared.items() if k not in (*of_maps, "host")}
        shared |= {"refine": None, "labels": "true masks"}
    split = context.recipe.data.list_of("test")
    return {
        "stage": segment.SEGMENTATION,
        "dataset": dataset_name(context),
        "split": split,
        **figure,
        "protocol": {
            **shared,
            "split": split,
            "segmenter": {
                **segment.protocol(context),
                "images": training["images"],
                "mask_threshold": row["mask_threshold"],
            },
            "crf": segment.section_of(context).test.crf if row["crf"] else False,
            "threshold": None,
            "threshold_source": "none: the most probable label",
            "command": context.command,
        },
    }


def _crf_use(context: Context, method: Scored) -> bool | str:
    """The steps in which a dense CRF contributed to a figure."""
    if method.stage == "seed":
        return False  # the masks that a host learns from are in the protocol's host
    section = refine.section_of(context)
    return section.refinement.crf_use(section)


def protocol(context: Context) -> Record:
    """Conditions of every figure of this run, apart from its threshold."""
    lists = context.recipe.data
    hosted = bool(host.arms(context))
    return {
        "dataset": dataset_name(context),
        "split": lists.list_of("evaluate"),
        "labels": context.dataset.label_source,
        "classes": list(context.dataset.classes.names),
        **_source_protocol(context),
        **({"host": host.described(context)} if hosted else {}),
        "refine": refine.described(context),
        "void": "255 and mask ids outside the classes are not counted",
        "seed": context.recipe.run.seed,
        "versions": versions(),
    }


def _source_protocol(context: Context) -> Record:
    if context.given_maps is not None:
        return {"given_maps": context.given_maps.key}
    if context.given_masks is not None:
        return {"given_masks": context.given_masks.key}
    recipe = context.recipe
    lists, section = recipe.data, recipe.classifier
    settings = section.probe if context.training_method == "probe" else section.finetune
    return {
        "classifier": {
            "backbone": section.backbone,
            "output_stride": section.output_stride,
            "trained_by": context.training_method,
            "settings": settings.model_dump(mode="json"),
            "list": lists.list_of("classify"),
            "validation_list": lists.lists.validate_ or "a seeded tenth of the list",
            "weights": Path(section.weights).name,
            "fingerprint": context.results["classifier"].output["fingerprint"],
        },
        "prototypes_list": lists.list_of("prototypes"),
        "preset": recipe.lpcam.preset,
        "changed_from_preset": recipe.lpcam.model_dump(
            mode="json", include=set(recipe.lpcam.changes())
        ),
        "scales": list(recipe.lpcam.scales),
        "flip": recipe.lpcam.flip,
        "maximum_side": recipe.maps.maximum_side,
        "features": recipe.maps.features,
        "precision": recipe.maps.precision,
        "maps": recipe.maps.dtype,
    }


def _write_sheet(context: Context) -> None:
    rows = []
    for item, index in choose_rows(context.items("maps"), context.recipe.sheet.images):
        place = item.labels.index(index)
        cam, lpcam = (
            read_maps(map_path(context.results[name].folder, item.id)).high_res[place]
            for name in ("cam", "lpcam")
        )
        rows.append(
            SheetRow(
                read_image(item.image),
                context.dataset.classes.names[index],
                cam,
                lpcam,
                read_index_mask(mask_path(context.results["seeds"].folder, item.id)),
                None if item.mask is None else read_index_mask(item.mask),
            )
        )
    write_bytes(context.folder.sheet, sheet(rows))


def dataset_name(context: Context) -> str:
    """Name of the data set in the protocol of all figures."""
    return context.recipe.data.name or context.dataset.name
