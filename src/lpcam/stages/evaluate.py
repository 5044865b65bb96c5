"""Scores of the maps where there are masks, each with its protocol, and a sheet of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpcam.data.images import read_image, read_index_mask
from lpcam.data.items import Item
from lpcam.ledger import Stage
from lpcam.stages.context import Run
from lpcam.stages.host import HOST, PROTOTYPES, arms, built, host_section
from lpcam.stages.refine import (
    GIVEN,
    HOST_MAPS,
    IRN,
    MAPS,
    PSA,
    pseudo_threshold,
    refine_section,
    refined,
)
from lpcam.stages.seeds import seed_path
from lpcam.stages.segment import (
    SEGMENT,
    SEGMENTATION,
    TEST,
    TRUTH,
    figures,
    segment_section,
    segmented,
    segmenter_protocol,
)
from lpcam.storage import map_path, read_json, read_maps, write_bytes, write_json
from lpcam.version import versions

if TYPE_CHECKING:
    from lpcam.evaluation import Evaluation

REPORT = "report.html"
"""Of a run, in its folder; stale as soon as the figures change."""
IMAGE_SCORES = "images.json"
"""Each image's mean IoU by method, in the stage's folder."""


@dataclass(frozen=True)
class Scored:
    """Maps that are scored."""

    stage: str
    """``seed`` or ``pseudo``."""
    folder: Path
    key: str
    """Of the stage that made them."""
    threshold: float
    """Fixed by the preset or the recipe."""
    hosted: bool = False
    """Whether a host made the maps, or those they were refined from."""


def scored(run: Run) -> dict[str, Scored]:
    """What this run scores, by the name of the method."""
    found = {}
    if run.given_masks is not None:
        return {}
    if run.given is not None:
        threshold = run.recipe.fixed_threshold("LPCAM")
        found[GIVEN] = Scored("seed", run.given.folder, run.given.key, threshold)
    else:
        for method, stage in run.stages_of_methods.items():
            fixed = run.recipe.fixed_threshold(method)
            found[method] = Scored("seed", stage.folder, stage.key, fixed)
    for arm in arms(run):
        stage, fixed = run.stages[f"{HOST_MAPS}/{arm.name}"], host_section(run).settings.threshold
        found[arm.title] = Scored("seed", stage.folder, stage.key, fixed, hosted=True)
    for name, (source, stage) in refined(run).items():
        fixed = pseudo_threshold(refine_section(run), source)
        hosted = source.method in {arm.title for arm in arms(run)}
        found[name] = Scored("pseudo", stage.folder / MAPS, stage.key, fixed, hosted)
    return found


def evaluate(run: Run) -> bool:
    """Score the maps and draw the sheet; whether there was anything to do."""
    methods = scored(run)
    items = run.truth("evaluate") if methods else []
    if segmented(run):
        run.truth("test")  # so that a pass with nothing to do tells it too, if it is not scored
    draws = bool(run.recipe.sheet.images) and run.makes_maps
    run.stages["evaluate"] = Stage(
        run.folder / "evaluation",
        {
            "revision": 2,
            "maps": {name: [one.key, one.threshold] for name, one in methods.items()},
            "seeds": run.stages["seeds"].key if run.makes_maps else None,
            **({"segmenters": _segmenter_keys(run)} if segmented(run) else {}),
            "truth": run.digest(items, truth=True),
            "part_names": dict(run.dataset.part_names),
            "skipped": [skip.id for skip in run.dataset.skipped],
            "sheet": run.recipe.sheet.model_dump(mode="json"),
            # A figure keeps the versions that made it; others do not make it worthless.
            "protocol": {k: v for k, v in protocol(run).items() if k != "versions"},
        },
    )
    metrics, sheet = run.folder / "metrics.json", run.folder / "sheet.png"
    image_scores = run.folder / "evaluation" / IMAGE_SCORES
    outputs = [metrics, *([image_scores] if items else []), *([sheet] if draws else [])]
    if run.stages["evaluate"].done(outputs):
        run.rows = read_json(metrics)["rows"]
        return False
    run.begin(run.stages["evaluate"])
    found = _score(run, methods, items) if items else None
    run.rows = [_with_protocol(run, methods[r["method"]], r) for r in found.rows] if found else []
    run.rows += [_of_segmenter(run, row) for row in figures(run)]
    if run.processes.first:
        if found:
            write_json(image_scores, {"ids": [item.id for item in items], **found.image_scores})
        outcome = {name: stage.output for name, stage in run.stages.items()}
        write_json(
            metrics,
            {
                "rows": run.rows,
                "curves": found.curves if found else {},
                "skipped": [{"id": s.id, "reason": s.reason} for s in run.dataset.skipped],
                "prototype_events": [
                    *outcome.get("prototypes", {}).get("events", []),
                    *(
                        f"{arm.title}: {event}"
                        for arm in arms(run)
                        for event in outcome.get(f"{PROTOTYPES}/{arm.name}", {}).get("events", [])
                    ),
                ],
                "classifier_history": outcome.get("classify", {}).get("history", []),
                "host_history": {
                    name.removeprefix(f"{HOST}/"): output["history"]
                    for name, output in outcome.items()
                    if name.startswith(f"{HOST}/")
                },
                "irn_history": {
                    name.removeprefix(f"{IRN}/"): output["history"]
                    for name, output in outcome.items()
                    if name.startswith(f"{IRN}/")
                },
                "psa_history": {
                    name.removeprefix(f"{PSA}/"): output["history"]
                    for name, output in outcome.items()
                    if name.startswith(f"{PSA}/")
                },
                "segmenter_history": {
                    name.removeprefix(f"{SEGMENT}/"): output["history"]
                    for name, output in outcome.items()
                    if name.startswith(f"{SEGMENT}/")
                },
                "protocol": protocol(run),
                "command": run.command,
            },
        )
        for page in (sheet, run.folder / REPORT):
            page.unlink(missing_ok=True)  # they show what was
        if draws:
            _write_sheet(run, sheet)
    run.finish(run.stages["evaluate"])
    return True


def _score(run: Run, methods: Mapping[str, Scored], items: Sequence[Item]) -> Evaluation:
    from lpcam.evaluation import score_maps  # noqa: PLC0415

    folders = {name: one.folder for name, one in methods.items()}
    fixed = {name: one.threshold for name, one in methods.items()}
    return score_maps(items, run.dataset, folders, fixed, run.sharing)


def _with_protocol(run: Run, method: Scored, row: dict[str, Any]) -> dict[str, Any]:
    shared = protocol(run)
    if method.stage == "seed":
        shared["refine"] = None
    if not method.hosted:
        shared.pop("host", None)
    return {
        "stage": method.stage,
        "dataset": dataset_name(run),
        "split": run.recipe.data.list_of("evaluate"),
        **row,
        "protocol": {
            **shared,
            "crf": _crf_in(run, method),
            "threshold": row["threshold"],
            "threshold_source": (
                "best mIoU on this split's truth, by a sweep of 0.00, 0.01, ... 0.99"
                if row["threshold_source"] == "ground truth"
                else "fixed by the preset or the recipe"
            ),
            "command": run.command,
        },
    }


def _segmenter_keys(run: Run) -> dict[str, Any]:
    keys = {name: stage.key for name, stage in run.stages.items() if name.startswith(f"{TEST}/")}
    return {"tests": keys, "protocol": segmenter_protocol(run)}


def _of_segmenter(run: Run, row: dict[str, Any]) -> dict[str, Any]:
    """A row of a segmenter, with how it was trained and tested."""
    figure = {k: v for k, v in row.items() if k not in ("crf", "teacher", "mask_threshold")}
    training = run.stages[f"{SEGMENT}/{row['teacher']}"].output
    shared = protocol(run)
    if row["teacher"] == TRUTH:  # on which neither maps nor their refinement have any bearing
        of_maps = _protocol_of_source(run)
        shared = {k: v for k, v in shared.items() if k not in (*of_maps, "host")}
        shared |= {"refine": None, "labels": "true masks"}
    split = run.recipe.data.list_of("test")
    return {
        "stage": SEGMENTATION,
        "dataset": dataset_name(run),
        "split": split,
        **figure,
        "protocol": {
            **shared,
            "split": split,
            "segmenter": {
                **segmenter_protocol(run),
                "images": training["images"],
                "mask_threshold": row["mask_threshold"],
            },
            "crf": segment_section(run).test.crf if row["crf"] else False,
            "threshold": None,
            "threshold_source": "none: the most probable label",
            "command": run.command,
        },
    }


def _crf_in(run: Run, method: Scored) -> bool | str:
    """Where a dense CRF had a hand in a figure."""
    if method.stage == "seed":
        return False  # what teaches AMN is in the protocol's host
    section = refine_section(run)
    places: dict[str, bool | str] = {
        "pamr": False,
        "crf": "on the seeds",
        "irn": "on the labels that IRN learns from",
        "psa": "on the labels that PSA learns from",
        "saliency": "on the maps" if section.saliency.crf else False,
    }
    return places[section.method]


def protocol(run: Run) -> dict[str, Any]:
    """What every figure of this run must be read with, apart from its threshold."""
    lists = run.recipe.data
    return {
        "dataset": dataset_name(run),
        "split": lists.list_of("evaluate"),
        "labels": run.dataset.label_source,
        "classes": list(run.dataset.classes.names),
        **_protocol_of_source(run),
        **_hosting(run),
        "refine": _refinement(run),
        "void": "255 and mask ids outside the classes are not counted",
        "seed": run.recipe.run.seed,
        "versions": versions(),
    }


def _protocol_of_source(run: Run) -> dict[str, Any]:
    if run.given is not None:
        return {"given_maps": run.given.key}
    if run.given_masks is not None:
        return {"given_masks": run.given_masks.key}
    return _protocol_of_maps(run)


def _protocol_of_maps(run: Run) -> dict[str, Any]:
    lists, section = run.recipe.data, run.recipe.classifier
    settings = section.probe if run.training_method == "probe" else section.finetune
    return {
        "classifier": {
            "backbone": section.backbone,
            "output_stride": section.output_stride,
            "trained_by": run.training_method,
            "settings": settings.model_dump(mode="json"),
            "list": lists.list_of("classify"),
            "validation_list": lists.lists.validate_ or "a seeded tenth of the list",
            "weights": Path(section.weights).name,
            "fingerprint": run.stages["classify"].output["fingerprint"],
        },
        "prototypes_list": lists.list_of("prototypes"),
        "preset": run.recipe.lpcam.preset,
        "changed_from_preset": run.recipe.lpcam.model_dump(
            mode="json", include=set(run.recipe.lpcam.changes())
        ),
        "scales": list(run.recipe.lpcam.scales),
        "flip": run.recipe.lpcam.flip,
        "maximum_side": run.recipe.maps.maximum_side,
        "features": run.recipe.maps.features,
        "precision": run.recipe.maps.precision,
        "maps": run.recipe.maps.dtype,
    }


def _write_sheet(run: Run, path: Path) -> None:
    from lpcam.sheet import SheetRow, choose_rows, sheet  # noqa: PLC0415

    rows = []
    items = run.items("maps")
    for item, index in choose_rows(items, run.recipe.sheet.images):
        place = item.labels.index(index)
        cam, lpcam = (
            read_maps(map_path(stage.folder, item.id)).high_res[place]
            for stage in (run.stages["cam"], run.stages["lpcam"])
        )
        rows.append(
            SheetRow(
                read_image(item.image),
                run.dataset.classes.names[index],
                cam,
                lpcam,
                read_index_mask(seed_path(run, item)),
                None if item.mask is None else read_index_mask(item.mask),
            )
        )
    write_bytes(path, sheet(rows))


def dataset_name(run: Run) -> str:
    """What the data set is called in every figure's protocol."""
    return run.recipe.data.name or run.dataset.name


def _refinement(run: Run) -> dict[str, Any] | None:
    """How pseudo masks are made; without the settings of methods that are not used."""
    section = run.recipe.refine
    if section is None or run.given_masks is not None:
        return None
    used = {"method", section.method, *({"crf"} if section.method == "irn" else ())}
    found = section.model_dump(mode="json", include=used)
    if section.method == "saliency":
        source = run.recipe.data.saliency
        found["saliency_maps"] = source.name if isinstance(source, Path) else source
    return found


def _hosting(run: Run) -> dict[str, Any]:
    """The host and its settings, where the run has one."""
    section = run.recipe.host
    if section is None or not run.makes_maps:
        return {}
    found = section.model_dump(mode="json", include={"method", section.method, "lpcam"})
    if section.method == "amn":  # of the labels that teach it
        crf = "irn" if run.recipe.refine is None else run.recipe.refine.crf.preset
        found["labels_crf"] = crf
    return {"host": {**found, **built(run)}}
