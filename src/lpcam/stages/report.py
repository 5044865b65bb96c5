"""Stage ``report``: one HTML file of the results of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lpcam.data.items import Item
from lpcam.ledger import Stage
from lpcam.networks.registry import NETWORKS
from lpcam.prototypes import Prototypes
from lpcam.report.collect import Figures, collect
from lpcam.report.images import LaterOutputs
from lpcam.report.page import render
from lpcam.report.segmenters import SegmenterResults, TrainedSegmenter
from lpcam.stages.context import METHODS, STAGES, Run, left_out_stages
from lpcam.stages.evaluate import IMAGE_SCORES, REPORT, dataset_name
from lpcam.stages.host import SEEDS, arms
from lpcam.stages.refine import BOUNDARIES, refine_section, refined
from lpcam.stages.segment import (
    CRF,
    SEGMENT,
    SEGMENTATION,
    segment_section,
    segmented,
    segmenter_protocol,
)
from lpcam.storage import read_json, write_bytes
from lpcam.version import versions


def report_path(folder: Path) -> Path:
    """The file of a run's report.

    Example:
        >>> report_path(Path("runs/demo")).as_posix()
        'runs/demo/report.html'
    """
    return folder / REPORT


def write_report(run: Run) -> bool:
    """Write the page with the figures and pictures of a run.

    Returns:
        True if it was written, False if it was up to date or the recipe asks for none.
    """
    section, path = run.recipe.report, report_path(run.folder)
    if not section.images:
        if run.processes.first:
            path.unlink(missing_ok=True)
        return False
    run.stages["report"] = Stage(
        run.folder / "report",
        {
            "revision": 1,
            "evaluation": run.stages["evaluate"].key,
            "prototypes": run.stages["prototypes"].output["digest"],
            "classifier": run.stages["classify"].output["digest"],
            "settings": run.recipe.lpcam.model_dump(mode="json"),
            "section": section.model_dump(mode="json"),
            "notices": list(run.dataset.notices),
            "versions": versions(),
        },
    )
    # a report that was asked for by name is always written again
    if run.stages["report"].done([path]) and run.only != "report":
        return False
    run.begin(run.stages["report"])
    if run.processes.first:
        write_bytes(path, _page(run).encode())
    run.finish(run.stages["report"])
    return True


def _page(run: Run) -> str:
    metrics = read_json(run.folder / "metrics.json")
    scored = run.truth("evaluate")
    figures = Figures()
    if scored:
        scores = read_json(run.stages["evaluate"].folder / IMAGE_SCORES)
        figures = Figures(
            [row for row in metrics["rows"] if row["stage"] != SEGMENTATION],
            metrics["curves"],
            {m: dict(zip(scores["ids"], scores[m], strict=True)) for m in METHODS},
        )
    left_out = left_out_stages(run.recipe)
    use_path = run.folder / "use.json"
    use: dict[str, Any] = read_json(use_path) if use_path.is_file() else {}
    return render(
        collect(
            dataset_name(run),
            scored or _without_masks([item for item in run.items("maps") if item.labels]),
            run.dataset,
            {method: stage.folder for method, stage in run.stages_of_methods.items()},
            figures,
            {method: run.recipe.fixed_threshold(method) for method in METHODS},
            run.classifier,
            Prototypes.load(
                run.prototypes_path, fingerprint=run.stages["classify"].output["fingerprint"]
            ),
            run.store(run.classifier).pairs,
            run.recipe.lpcam,
            run.recipe.report,
            run.sharing,
            {
                "protocol": {"crf": False, **metrics["protocol"]},
                "skipped": metrics["skipped"],
                "notices": list(run.dataset.notices),
                "events": metrics["prototype_events"],
                "history": metrics["classifier_history"],
                "networks": _networks(run, metrics),
                "stages": [
                    {"name": name, **use[name]}
                    for name in STAGES
                    if name in use and name not in left_out
                ],
                "command": metrics["command"],
            },
            _later_outputs(run),
            _segmenters(run, metrics),
        )
    )


def _networks(run: Run, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Training histories of the networks of a host and of PSA."""
    titles: dict[str, str] = {}
    for arm in arms(run):  # one network may serve several
        titles[arm.network] = " and ".join(filter(None, [titles.get(arm.network), arm.title]))
    found = [
        {"title": f"the network of {title}", "history": metrics["host_history"][name]}
        for name, title in titles.items()
    ]
    names = {source.name: source.method for source, _ in refined(run).values()}
    return found + [
        {"title": f"PSA's network on {names[name]}", "history": history}
        for name, history in metrics["psa_history"].items()
    ]


def _later_outputs(run: Run) -> LaterOutputs:
    masks, planes = {}, {}
    for arm in arms(run):
        masks[f"seed of {arm.title}"] = run.stages[f"{SEEDS}/{arm.name}"].folder
    for source, stage in refined(run).values():
        masks[f"pseudo mask of {source.method}"] = stage.folder
        if refine_section(run).method == "irn":
            planes[f"boundaries learned from {source.method}"] = stage.folder / BOUNDARIES
    return LaterOutputs(masks, planes)


def _segmenters(run: Run, metrics: Mapping[str, Any]) -> SegmenterResults | None:
    found = segmented(run)
    if not found:
        return None
    section, lists = segment_section(run), run.recipe.data
    refined_by_crf = section.test.crf is not None
    # after the CRF if there is one, as users of the masks get them
    trained = [
        TrainedSegmenter(
            teacher.name,
            teacher.title,
            run.stages[f"{SEGMENT}/{teacher.name}"].output["images"],
            folder,
        )
        for teacher, folder in found.values()
        if (folder.name == CRF) == refined_by_crf
    ]
    rows = []
    for row in metrics["rows"]:
        if row["stage"] == SEGMENTATION:
            teacher, folder = found[row["method"]]
            rows.append({**row, "teacher": teacher.name, "crf": folder.name == CRF})
    return SegmenterResults(
        trained,
        rows,
        run.items("test") if run.truth("test") else _without_masks(run.items("test")),
        metrics["segmenter_history"],
        metrics["irn_history"],
        {
            "network": NETWORKS[section.network].title,
            "split": lists.list_of("test"),
            "list": lists.list_of("segment"),
            "checkpoint": section.checkpoint,
            "crf": section.test.crf,
            "settings": {
                name: value
                for name, value in segmenter_protocol(run).items()
                if name not in ("network", "checkpoint", "list")
            },
        },
    )


def _without_masks(items: list[Item]) -> list[Item]:
    """Items of a list that is not scored."""
    return [replace(item, mask=None) for item in items]
