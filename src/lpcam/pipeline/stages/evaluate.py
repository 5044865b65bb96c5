"""Scores of the maps where there are masks, each with its protocol, and a contact sheet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lpcam.data.dataset import Item
from lpcam.data.drawing import SheetRow, choose_rows, sheet
from lpcam.data.map_files import map_path, read_maps
from lpcam.data.masks import read_index_mask
from lpcam.data.reader import ListName
from lpcam.evaluation.scoring import score_maps
from lpcam.pipeline.cache import Record, Result, Task
from lpcam.pipeline.context import Context, required, skips
from lpcam.pipeline.run_folder import RESULTS, mask_path
from lpcam.pipeline.stages import host, refine, segment
from lpcam.runtime.files import digest_file, read_json, write_bytes, write_json
from lpcam.runtime.versions import versions

FIXED = "fixed by the preset or the recipe"


@dataclass(frozen=True)
class Scored:
    """Maps that are scored."""

    stage: str  #: ``seed`` or ``pseudo``.
    folder: Path
    key: str  #: Cache key of the result that holds them.
    threshold: float | None
    """Fixed threshold of the preset or the recipe; None: no program states one."""
    source: str  #: Name of the maps, or of those they were refined from.
    hosted: bool = False  #: Whether a host made the maps, or those they were refined from.
    crf: str | bool = False  #: Step that used a dense CRF; False: none.


def _scored(context: Context) -> dict[str, Scored]:
    """Maps that this run scores, by the name of the method."""
    recipe, found, given = context.recipe, {}, context.given_maps
    if context.given_masks is not None:
        return {}
    if given is not None:
        fixed = recipe.fixed_threshold("LPCAM")
        found[refine.GIVEN] = Scored("seed", given.folder, given.key, fixed, refine.GIVEN)
    else:
        for method in context.methods:
            result, fixed = context.results[RESULTS[method]], context.own_threshold(method)
            found[method] = Scored("seed", result.folder, result.key, fixed, method)
    arms = host.arms(context)
    for arm in arms:
        result = context.results[f"host-maps/{arm.folder}"]
        section = required(recipe.host)
        stated = section.settings.threshold if section.host.states_threshold else None
        stated = context.threshold(arm.title, stated)
        own = (result.folder, result.key, stated, arm.title)
        found[arm.title] = Scored("seed", *own, hosted=True)
    for name, (source, result) in refine.refined(context).items():
        refine_section = refine.chosen(context, source)
        fixed = refine.threshold(context, refine_section, source)
        crf = refine_section.refinement.crf_use(refine_section)
        hosted = source.method in {arm.title for arm in arms}
        folder = result.folder / "maps"
        found[name] = Scored("pseudo", folder, result.key, fixed, source.method, hosted, crf)
    return found


def evaluate(context: Context) -> Iterator[Task]:
    """Score the maps and draw the contact sheet."""
    recipe, folder = context.recipe, context.folder
    methods = _scored(context)
    items = context.truth("evaluate") if methods else []
    tests = None
    if segment.segmented(context):
        context.truth("test")  # so that a run with nothing to do says why it is not scored
        keys = {name: r.key for name, r in context.results.items() if name.startswith("test/")}
        tests = {"tests": keys, "protocol": segment.protocol(context)}
    draws = bool(recipe.sheet.images) and context.makes_maps
    parts = {
        "revision": 3,
        "maps": {name: [one.key, one.threshold] for name, one in methods.items()},
        "seeds": context.results["seeds"].key if context.makes_maps else None,
        "segmenters": tests,
        "truth": context.digest(items, truth=True),
        "part_names": dict(context.dataset.part_names),
        "skipped": [skip.id for skip in context.dataset.skipped],
        "sheet": recipe.sheet.model_dump(mode="json"),
        # A figure keeps the versions that made it; newer ones do not invalidate it.
        "protocol": {k: v for k, v in _protocol(context).items() if k != "versions"},
    }
    files = [folder.metrics]
    files += [folder.image_scores] if items else []
    files += [folder.sheet] if draws else []

    def work(_: Result) -> None:
        _write_figures(context, methods, items)
        if context.processes.first:
            for page in (folder.sheet, folder.report):
                page.unlink(missing_ok=True)  # they show the old figures
            if draws:
                _write_sheet(context)

    yield context.task("evaluation", parts, files, work)
    context.rows = read_json(folder.metrics)["rows"]


def _write_figures(context: Context, methods: Mapping[str, Scored], items: Sequence[Item]) -> None:
    rows: list[Record] = []
    found = None
    if items:
        folders = {name: one.folder for name, one in methods.items()}
        fixed = {n: one.threshold for n, one in methods.items() if one.threshold is not None}
        chosen = {n for n, one in methods.items() if one.source in context.verdicts}
        found = score_maps(items, context.dataset, folders, fixed, context.sharing, chosen)
        rows = [_with_protocol(context, methods[row["method"]], row) for row in found.rows]
    rows += [_segmenter_row(context, *figure) for figure in segment.figures(context)]
    if not context.processes.first:
        return
    if found is not None:
        ids = [item.id for item in items]
        write_json(context.folder.image_scores, {"ids": ids, **found.image_scores})
    outputs = {name: result.output for name, result in context.results.items()}
    events = list(outputs.get("prototypes", {}).get("events", []))
    for arm in host.arms(context):
        own = outputs.get(f"host-prototypes/{arm.folder}", {}).get("events", [])
        events += [f"{arm.title}: {event}" for event in own]

    def histories(kind: str) -> Record:
        """Training histories of the networks of a kind of results, by name."""
        prefix = f"{kind}/"
        names = [name for name in outputs if name.startswith(prefix)]
        return {name.removeprefix(prefix): outputs[name]["history"] for name in names}

    write_json(
        context.folder.metrics,
        {
            "rows": rows,
            "curves": {} if found is None else found.curves,
            "skipped": skips(context.dataset),
            "prototype_events": events,
            "classifier_history": outputs.get("classifier", {}).get("history", []),
            "host_history": histories("host"),
            "refine_history": histories("refine-network"),
            "segmenter_history": histories("segment"),
            "protocol": _protocol(context),
            "command": context.command,
            "choices": context.choices,
            "verdicts": context.verdicts,
        },
    )


def _with_protocol(context: Context, method: Scored, row: Record) -> Record:
    """A row of maps with its protocol."""
    shared = _protocol(context)
    if method.stage == "seed":
        shared["refine"] = None
    if not method.hosted:
        shared.pop("host", None)
    by_truth = row["threshold_source"] == "ground truth"
    verdict = context.verdicts.get(row["method"]) or context.verdicts.get(method.source, {})
    own = {
        "crf": method.crf,  # the masks that a host learns from are in the protocol's host
        "threshold": row["threshold"],
        "threshold_source": (
            "best mIoU on this split's truth, by a sweep of 0.00, 0.01, ... 0.99"
            if by_truth
            else verdict.get("rule", FIXED)
        ),
    }
    return _row(context, method.stage, "evaluate", row, shared | own)


def _segmenter_row(
    context: Context, masks: segment.TrainingMasks, crf: bool, row: Record
) -> Record:
    """A row of a segmenter with its protocol of training and test."""
    shared = _protocol(context)
    if masks.name == segment.TRUTH:  # neither maps nor their refinement matter
        of_maps = (*_source_protocol(context), "host")
        shared = {k: v for k, v in shared.items() if k not in of_maps}
        shared |= {"refine": None, "labels": "true masks"}
    own = {
        "split": context.recipe.data.list_of("test"),
        "segmenter": {
            **segment.protocol(context),
            "images": context.results[f"segment/{masks.name}"].output.get("images", 0),
            "mask_threshold": masks.threshold,
        },
        "crf": required(context.recipe.segment).test.crf if crf else False,
        "threshold": None,
        "threshold_source": "none: the most probable label",
    }
    return _row(context, segment.SEGMENTATION, "test", row, shared | own)


def _row(context: Context, stage: str, split: ListName, row: Record, protocol: Record) -> Record:
    return {
        "stage": stage,
        "dataset": dataset_name(context),
        "split": context.recipe.data.list_of(split),
        **row,
        "protocol": {**protocol, "command": context.command},
    }


def _protocol(context: Context) -> Record:
    """Conditions of every score of this run, apart from its threshold."""
    return {
        "dataset": dataset_name(context),
        "split": context.recipe.data.list_of("evaluate"),
        "labels": context.dataset.label_source,
        **({"reading": reading} if (reading := context.dataset.reading.as_json()) else {}),
        "classes": list(context.dataset.classes.names),
        **_source_protocol(context),
        **({"host": host.described(context)} if host.arms(context) else {}),
        "refine": refine.described(context),
        "void": "255 and mask ids outside the classes are not counted",
        "seed": context.recipe.run.seed,
        "versions": versions(),
    }


def _source_protocol(context: Context) -> Record:
    if context.given_maps is not None:
        return {"given_maps": context.given_maps.key}
    segmenter = context.recipe.segment
    if segmenter is not None and segmenter.trained is not None:
        return {"trained": segmenter.trained.name}
    if context.given_masks is not None:
        return {"given_masks": context.given_masks.key}
    recipe = context.recipe
    lists, section = recipe.data, recipe.classifier
    settings = section.probe if context.training_method == "probe" else section.finetune
    given = section.trained
    changed = set(recipe.lpcam.changes()) - {"choices"}
    chosen = context.results.get("chosen")
    return {
        "classifier": {
            "backbone": section.backbone,
            "output_stride": section.output_stride,
            "trained_by": context.training_method if given is None else given.name,
            "settings": None if given else settings.model_dump(mode="json"),
            "list": lists.list_of("classify"),
            "validation_list": lists.lists.validate_ or "a seeded tenth of the list",
            "weights": Path(section.weights).name,
            "fingerprint": context.results["classifier"].output["fingerprint"],
        },
        "prototypes_list": lists.list_of("prototypes"),
        **_selection(context),
        "preset": recipe.lpcam.preset,
        **({"chosen": context.choices} if context.choices else {}),
        **({} if chosen is None else {"prototype_choices": chosen.output["choices"]}),
        "changed_from_preset": recipe.lpcam.model_dump(mode="json", include=changed),
        "scales": list(context.lpcam.scales),
        "flip": recipe.lpcam.flip,
        "maximum_side": recipe.maps.maximum_side,
        "features": recipe.maps.features,
        "precision": recipe.maps.precision,
        "maps": recipe.maps.dtype,
    }


def _selection(context: Context) -> Record:
    """Who chose the images that are clustered, where not all of the list are."""
    path, count = context.recipe.data.selected, context.recipe.lpcam.images_per_class
    if path is not None:
        return {"selected": {"table": path.name, "digest": digest_file(path)}}
    return {} if count is None else {"selected": f"{count} a class, drawn by lpcam"}


def _write_sheet(context: Context) -> None:
    rows = []
    for item, index in choose_rows(context.items("maps"), context.recipe.sheet.images):
        place = item.labels.index(index)
        cam, lpcam = (
            read_maps(map_path(context.folder / name, item.id)).high_res[place]
            for name in ("cam", RESULTS[context.methods[-1]])
        )
        rows.append(
            SheetRow(
                item.read(),
                context.dataset.classes.names[index],
                cam,
                lpcam,
                read_index_mask(mask_path(context.folder / "seeds", item.id)),
                None if item.mask is None else item.read_mask(),
            )
        )
    write_bytes(context.folder.sheet, sheet(rows, map_title=context.methods[-1]))


def dataset_name(context: Context) -> str:
    """Name of the data set in the protocol of all scores."""
    return context.recipe.data.name or context.dataset.name
