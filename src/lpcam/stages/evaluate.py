"""Scores of the maps where there are masks, each with its protocol, and a sheet of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpcam.data.images import read_image, read_index_mask
from lpcam.data.items import Item
from lpcam.ledger import Stage
from lpcam.stages.context import METHODS, Run
from lpcam.stages.seeds import seed_path
from lpcam.storage import map_path, read_json, read_maps, write_bytes, write_json
from lpcam.version import versions

if TYPE_CHECKING:
    from lpcam.evaluation import Evaluation

IMAGE_SCORES = "images.json"
"""Each image's mean IoU by method, in the stage's folder."""


def evaluate(run: Run) -> bool:
    """Score the maps and draw the sheet; whether there was anything to do."""
    items = [item for item in run.items("evaluate") if item.mask is not None]
    fixed = {method: run.recipe.fixed_threshold(method) for method in METHODS}
    run.stages["evaluate"] = Stage(
        run.folder / "evaluation",
        {
            "revision": 2,
            "maps": {method: s.key for method, s in run.stages_of_methods.items()},
            "seeds": run.stages["seeds"].key,
            "truth": run.digest(items, truth=True),
            "part_names": dict(run.dataset.part_names),
            "skipped": [skip.id for skip in run.dataset.skipped],
            "thresholds": fixed,
            "sheet": run.recipe.sheet.model_dump(mode="json"),
            "protocol": protocol(run),
        },
    )
    metrics, sheet = run.folder / "metrics.json", run.folder / "sheet.png"
    image_scores = run.folder / "evaluation" / IMAGE_SCORES
    outputs = [metrics]
    outputs += [image_scores] if items else []
    outputs += [sheet] if run.recipe.sheet.images else []
    if run.stages["evaluate"].done(outputs):
        run.rows = read_json(metrics)["rows"]
        return False
    run.begin(run.stages["evaluate"])
    found = _score(run, items) if items else None
    run.rows = _with_protocol(run, found.rows) if found else []
    if run.processes.first:
        if found:
            write_json(image_scores, {"ids": [item.id for item in items], **found.image_scores})
        write_json(
            metrics,
            {
                "rows": run.rows,
                "curves": found.curves if found else {},
                "skipped": [{"id": s.id, "reason": s.reason} for s in run.dataset.skipped],
                "prototype_events": run.stages["prototypes"].output["events"],
                "classifier_history": run.stages["classify"].output["history"],
                "command": run.command,
            },
        )
        sheet.unlink(missing_ok=True)
        if run.recipe.sheet.images:
            _write_sheet(run, sheet)
    run.finish(run.stages["evaluate"])
    return True


def _score(run: Run, items: Sequence[Item]) -> Evaluation:
    from lpcam.evaluation import score_maps  # noqa: PLC0415

    folders = {method: stage.folder for method, stage in run.stages_of_methods.items()}
    fixed = {method: run.recipe.fixed_threshold(method) for method in METHODS}
    return score_maps(items, run.dataset, folders, fixed, run.sharing)


def _with_protocol(run: Run, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "stage": "seed",
            "dataset": dataset_name(run),
            "split": run.recipe.data.list_of("evaluate"),
            **row,
            "protocol": {
                **protocol(run),
                "threshold": row["threshold"],
                "threshold_source": (
                    "best mIoU on this split's truth, by a sweep of 0.00, 0.01, ... 0.99"
                    if row["threshold_source"] == "ground truth"
                    else "fixed by the preset or the recipe"
                ),
                "command": run.command,
            },
        }
        for row in rows
    ]


def protocol(run: Run) -> dict[str, Any]:
    """What every figure of this run must be read with, apart from its threshold."""
    lists = run.recipe.data
    section = run.recipe.classifier
    settings = section.probe if run.training_method == "probe" else section.finetune
    return {
        "dataset": dataset_name(run),
        "split": lists.list_of("evaluate"),
        "labels": run.dataset.label_source,
        "classes": list(run.dataset.classes.names),
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
        "crf": False,
        "void": "255 and mask ids outside the classes are not counted",
        "seed": run.recipe.run.seed,
        "versions": versions(),
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
