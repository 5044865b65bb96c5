"""The report: one HTML file with the scores and pictures of a run."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lpcam.classifiers.feature_store import FeatureStore
from lpcam.data.dataset import Item
from lpcam.method.early import EarlyPrototypes
from lpcam.method.reservoir import SIDES
from lpcam.pipeline.cache import Record, Result, Task
from lpcam.pipeline.context import Context, required
from lpcam.pipeline.run_folder import RESULTS
from lpcam.pipeline.stages import host, refine, segment
from lpcam.pipeline.stages.evaluate import dataset_name
from lpcam.pipeline.stages.prototypes import load_prototypes
from lpcam.report.collect import Inputs, collect
from lpcam.report.images import Sources
from lpcam.report.page import render
from lpcam.report.prototypes import Early, Fitted
from lpcam.report.segmenters import SegmenterResults, TrainedSegmenter
from lpcam.runtime.files import digest_file, read_json, write_bytes
from lpcam.runtime.versions import versions


def write_report(context: Context) -> Iterator[Task]:
    """Write the report, unless the recipe disables it."""
    section, path = context.recipe.report, context.folder.report
    if not section.images:
        if context.processes.first:
            path.unlink(missing_ok=True)
        return
    parts = {
        "revision": 1,
        "evaluation": context.results["evaluation"].key,
        "prototypes": digest_file(context.folder.used_prototypes(context.recipe)),
        "classifier": context.results["classifier"].output["digest"],
        "settings": context.recipe.lpcam.model_dump(mode="json"),
        "section": section.model_dump(mode="json"),
        "notices": [*context.warnings, *context.dataset.notices],
        "versions": versions(),
    }

    def work(_: Result) -> None:
        if context.processes.first:
            write_bytes(path, _page(context).encode())

    yield context.task("report", parts, [path], work)


def _page(context: Context) -> str:
    recipe, folder = context.recipe, context.folder
    metrics = read_json(folder.metrics)
    scored = context.truth("evaluate")
    shown: Record = {}
    scores = {}
    if scored:
        by_image = read_json(folder.image_scores)
        scores = {m: dict(zip(by_image["ids"], by_image[m], strict=True)) for m in context.methods}
        shown["rows"] = [r for r in metrics["rows"] if r["stage"] != segment.SEGMENTATION]
        shown["curves"] = metrics["curves"]
    use: Record = read_json(folder.use) if folder.use.is_file() else {}
    folders = {method: folder / RESULTS[method] for method in context.methods}
    # the report reads mirror images of the few confused images alone
    plain = context.store(context.classifier).unmirrored()
    inputs = Inputs(
        dataset_name(context),
        scored or _without_masks([item for item in context.items("maps") if item.labels]),
        Sources(context.dataset, folders, scores, *_later_outputs(context)),
        Fitted(
            context.classifier,
            load_prototypes(context),
            context.store(context.classifier).pairs,
            plain.pairs,
            context.lpcam,
            folders["CAM"],
            _early(context, plain),
        ),
        recipe.report,
        context.sharing,
        {method: context.own_threshold(method) for method in context.methods},
        {
            "protocol": {"crf": False, **metrics["protocol"]},
            "skipped": metrics["skipped"],
            "warnings": context.warnings,
            "notices": list(context.dataset.notices),
            "events": metrics["prototype_events"],
            "history": metrics["classifier_history"],
            "networks": _networks(context, metrics),
            "stages": [{"name": name, **use[name]} for name in context.stages if name in use],
            "command": metrics["command"],
            "choices": metrics["choices"],
            "verdicts": metrics["verdicts"],
            "ways": context.results["early"].output["ways"] if "early" in context.results else [],
        },
        trained=_segmenters(context, metrics),
        **shown,
    )
    data = collect(inputs)
    for one in data["prototypes"]["classes"]:
        for side in SIDES:
            for card in one["sides"][side]["prototypes"]:
                for patch in card["patches"][:1]:
                    picture = base64.b64decode(patch["picture"].partition(",")[2])
                    write_bytes(folder.patch(one["class"], side, card["number"]), picture)
    return render(data)


def _early(context: Context, store: FeatureStore) -> Early | None:
    """Prototypes of early layers, if the maps LPCAM-E use them."""
    if "early" not in context.results:
        return None
    fingerprint = context.results["classifier"].output["fingerprint"]
    found = EarlyPrototypes.load(context.folder.early, fingerprint=fingerprint)
    if found.fusion == "none":
        return None
    maps = context.folder / RESULTS["LPCAM-E"]
    return Early(found, store.early, maps, context.own_threshold("LPCAM-E"))


def _networks(context: Context, metrics: Record) -> list[Record]:
    """Training histories of the networks of a host and of a refinement."""
    arms: dict[str, list[str]] = {}
    for arm in host.arms(context):  # one network may serve several
        arms.setdefault(arm.network, []).append(arm.title)
    found = {f"the network of {' and '.join(t)}": ("host", name) for name, t in arms.items()}
    for source, _ in refine.refined(context).values():
        title = required(context.recipe.refine).refinement.title
        found[f"{title}'s network on {source.method}"] = ("refine", source.name)
    return [
        {"title": title, "history": metrics[f"{kind}_history"][name]}
        for title, (kind, name) in found.items()
        if name in metrics[f"{kind}_history"]
    ]


def _later_outputs(context: Context) -> tuple[dict[str, Path], dict[str, Path]]:
    """Folders of masks and of grey pictures of later stages, by the name to show."""
    masks, planes = {}, {}
    for arm in host.arms(context):
        masks[f"seed of {arm.title}"] = context.folder / f"host-seeds/{arm.folder}"
    for source, result in refine.refined(context).values():
        masks[f"pseudo mask of {source.method}"] = result.folder
        if (boundaries := result.folder / "boundaries").is_dir():
            planes[f"boundaries learned from {source.method}"] = boundaries
    return masks, planes


def _segmenters(context: Context, metrics: Record) -> SegmenterResults | None:
    found = segment.segmented(context)
    if not found:
        return None
    section, lists = required(context.recipe.segment), context.recipe.data
    # after the CRF if there is one, as users of the masks get them
    trained = [
        TrainedSegmenter(
            masks.name,
            masks.title,
            context.results[f"segment/{masks.name}"].output.get("images", 0),
            folder,
        )
        for masks, folder in found.values()
        if (folder.name == segment.CRF) == (section.test.crf is not None)
    ]
    rows = []
    for row in metrics["rows"]:
        if row["stage"] == segment.SEGMENTATION:
            masks, folder = found[row["method"]]
            rows.append({**row, "teacher": masks.name, "crf": folder.name == segment.CRF})
    shown_already = ("network", "checkpoint", "list")
    protocol = {k: v for k, v in segment.protocol(context).items() if k not in shown_already}
    return SegmenterResults(
        trained,
        rows,
        context.items("test") if context.truth("test") else _without_masks(context.items("test")),
        metrics["segmenter_history"],
        {
            "network": section.title,
            "split": lists.list_of("test"),
            "list": lists.list_of("segment"),
            "checkpoint": section.checkpoint,
            "crf": section.test.crf,
            "settings": protocol,
        },
    )


def _without_masks(items: list[Item]) -> list[Item]:
    """The items of a list that is not scored."""
    return [replace(item, mask=None) for item in items]
