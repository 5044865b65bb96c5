"""Gathers everything that a report shows of a run, as plain data for the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from lpcam.classifiers.classifier import Classifier
from lpcam.data.dataset import Dataset, Item
from lpcam.data.drawing import choose_rows
from lpcam.data.masks import voc_palette
from lpcam.method.prototypes import Prototypes
from lpcam.method.settings import LpcamSettings, Method
from lpcam.report.images import (
    NO_OUTPUTS,
    LaterOutputs,
    Scores,
    choose,
    highlights,
    image_records,
    in_turn,
    run_all,
)
from lpcam.report.prototypes import Pairs, confusion_records, prototype_records
from lpcam.report.segmenters import SHOWN, SegmenterResults, segmenter_records
from lpcam.runtime.distributed import Sharing
from lpcam.runtime.settings import Section
from lpcam.runtime.versions import __version__


class ReportSection(Section):
    """The report at the end of a run: one HTML file, report.html."""

    images: Annotated[int, Field(ge=0, le=2000)] = 500
    """In the viewer, at most; 500 take about 10 MB. 0 makes no report."""
    searched: Annotated[int, Field(ge=1)] = 160
    """Images, of those in the viewer, that are searched for the nearest patches of prototypes and
    for confusing classes."""
    prototypes: Annotated[int, Field(ge=1)] = 12
    """Of each class and side that are shown, at most; fewer where there are many classes."""
    patches: Annotated[int, Field(ge=1, le=12)] = 4
    """Nearest patches of each prototype."""
    confusions: Annotated[int, Field(ge=0, le=50)] = 6
    """Pairs of classes that the classifier takes for each other."""


FORMAT = 1
"""Version of the data that a page is made from."""
MOST_BYTES = 12_000_000
"""Size of the images in a page, which with the rest stays below 15 MB."""


@dataclass(frozen=True)
class Figures:
    """The scores of a run; empty if its images have no true masks."""

    rows: Sequence[Mapping[str, Any]] = ()
    curves: Mapping[Method, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    scores: Scores = field(default_factory=dict)


def _size(record: Mapping[str, Any]) -> int:
    """Bytes of a record in the page."""
    return len(json.dumps(record))


def collect(
    title: str,
    items: Sequence[Item],
    dataset: Dataset,
    folders: Mapping[Method, Path],
    figures: Figures,
    fixed: Mapping[Method, float],
    classifier: Classifier,
    prototypes: Prototypes,
    pairs: Pairs,
    settings: LpcamSettings,
    section: ReportSection,
    sharing: Sharing,
    about: Mapping[str, Any],
    later: LaterOutputs = NO_OUTPUTS,
    trained: SegmenterResults | None = None,
) -> dict[str, Any]:
    """Gather the data of a report.

    Args:
        items: the images that may be shown.
        folders: of each method's maps.
        fixed: threshold of each method.
        pairs: gives features of images (``FeatureStore.pairs``).
        about: protocol, skipped, notices, events, history, networks, stages and command.
        later: masks and planes of later stages.
        trained: the segmenters of the run, if any.

    Raises:
        LpcamError: if an image or its maps cannot be read.
    """
    found = highlights(figures.scores) if figures.scores else {}
    wanted = in_turn(found.values())
    shown = choose(items, section.images, wanted)
    palette = voc_palette()
    searched = [item for item, _ in choose_rows(shown, section.searched)]
    # The store keeps these features; below they are read one by one, on one thread.
    run_all(sharing, lambda item: list(pairs([item], (1.0,))), searched, "report: features")
    tested, most_bytes = {}, MOST_BYTES
    if trained is not None:
        most = min(SHOWN, section.images)
        tested = {"segmenters": segmenter_records(trained, dataset.classes, sharing, most)}
        most_bytes -= _size(tested)
    records = image_records(shown, dataset, folders, figures.scores, sharing, later)
    size = sum(map(_size, records))
    if size > most_bytes:
        fewer = max(1, int(len(records) * most_bytes / size))
        kept = {item.id for item in choose(shown, fewer, wanted)}
        records = [record for record in records if record["id"] in kept]
    ids = {record["id"] for record in records}
    return {
        "format": FORMAT,
        "title": title,
        "lpcam_version": __version__,
        "methods": list(folders),
        "fixed": dict(fixed),
        "classes": [
            {"name": name, "color": "#{:02x}{:02x}{:02x}".format(*palette[value].tolist())}
            for name, value in zip(dataset.classes.names, dataset.classes.mask_ids, strict=True)
        ],
        "rows": list(figures.rows),
        "curves": {m: dict(curve) for m, curve in figures.curves.items() if m in folders},
        "images": records,
        "limited": size > most_bytes,
        "searched": len(searched),
        "images_total": len(items),
        "highlights": {kind: [n for n in names if n in ids] for kind, names in found.items()},
        "prototypes": {
            "rule": {
                "k": settings.clusters,
                "restarts": settings.restarts,
                "tau": settings.tau,
                "mu_f": settings.mu_f,
                "mu_b": settings.mu_b,
                "mu_b_lower": settings.context_lower,
            },
            "classes": prototype_records(
                classifier,
                prototypes,
                searched,
                pairs,
                settings,
                folders["CAM"],
                count=section.prototypes,
                patches=section.patches,
            ),
        },
        "confusions": confusion_records(
            classifier, prototypes, searched, pairs, settings, section.confusions
        ),
        **tested,
        **about,
    }
