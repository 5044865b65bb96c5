"""Gathers everything that a report shows of a run, as plain data for the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Annotated, Any

from pydantic import Field

from lpcam.data.dataset import Item
from lpcam.data.drawing import choose_rows
from lpcam.data.masks import voc_palette
from lpcam.method.settings import Method
from lpcam.report.images import Sources, choose, highlights, image_records
from lpcam.report.prototypes import Fitted, confusion_records, prototype_records
from lpcam.report.segmenters import SHOWN, SegmenterResults, segmenter_records
from lpcam.runtime.distributed import Sharing
from lpcam.runtime.settings import Section
from lpcam.runtime.versions import __version__


class ReportSection(Section):
    """The report at the end of a run: one HTML file, report.html."""

    images: Annotated[int, Field(ge=0, le=2000)] = 500
    """Maximum number of images in the viewer; 500 take about 10 MB. 0 makes no report."""
    searched: Annotated[int, Field(ge=1)] = 160
    """Number of images in the viewer that are searched for the nearest patches of prototypes and
    for confused classes; more take more time."""
    prototypes: Annotated[int, Field(ge=1)] = 12
    """Maximum number of prototypes shown of each class and side."""
    patches: Annotated[int, Field(ge=1, le=12)] = 4
    """Number of nearest patches shown of each prototype."""
    confusions: Annotated[int, Field(ge=0, le=50)] = 6
    """Number of shown pairs of classes that the classifier confuses."""


MOST_BYTES = 12_000_000  #: Limit for the images in a page, which stays below 15 MB.


@dataclass(frozen=True)
class Inputs:
    """Inputs of a report."""

    title: str
    items: Sequence[Item]  #: The images that may be shown.
    sources: Sources
    fitted: Fitted
    section: ReportSection
    sharing: Sharing
    fixed: Mapping[Method, float]  #: Threshold of each method.
    about: Mapping[str, Any]
    """What else the page reads of metrics.json; warnings, notices, networks, stages and ways."""
    rows: Sequence[Mapping[str, Any]] = ()  #: Rows of metrics.json; empty without true masks.
    curves: Mapping[Method, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    trained: SegmenterResults | None = None  #: The segmenters of the run, if any.


def collect(inputs: Inputs) -> dict[str, Any]:
    """Gather the data of a report; LpcamError if an image or its maps cannot be read."""
    sources, fitted, section = inputs.sources, inputs.fitted, inputs.section
    classes, settings, sharing = sources.dataset.classes, fitted.settings, inputs.sharing
    found = highlights(sources.scores) if sources.scores else {}
    # the first of each list, then the second of each, and so on
    wanted = [name for turn in zip_longest(*found.values()) for name in turn if name is not None]
    shown = choose(inputs.items, section.images, wanted)
    searched = [item for item, _ in choose_rows(shown, section.searched)]
    # These first: they read the features of each image once, which the store keeps for the rest.
    confusions = confusion_records(fitted, searched, sharing, section.confusions)
    tested = {}
    if inputs.trained is not None:
        most = min(SHOWN, section.images)
        tested = {"segmenters": segmenter_records(inputs.trained, classes, sharing, most)}
    most_bytes = MOST_BYTES - len(json.dumps(tested))
    records = image_records(shown, sources, sharing)
    size = sum(len(json.dumps(record)) for record in records)
    if size > most_bytes:
        fewer = max(1, int(len(records) * most_bytes / size))
        kept = {item.id for item in choose(shown, fewer, wanted)}
        records = [record for record in records if record["id"] in kept]
    ids = {record["id"] for record in records}
    return {
        "format": 1,
        "title": inputs.title,
        "lpcam_version": __version__,
        "methods": list(sources.folders),
        "fixed": dict(inputs.fixed),
        "classes": [
            {"name": name, "color": f"#{bytes(voc_palette()[value]).hex()}"}
            for name, value in zip(classes.names, classes.mask_ids, strict=True)
        ],
        "rows": list(inputs.rows),
        "curves": {m: dict(curve) for m, curve in inputs.curves.items() if m in sources.folders},
        "images": records,
        "limited": size > most_bytes,
        "searched": len(searched),
        "images_total": len(inputs.items),
        "highlights": {kind: [n for n in names if n in ids] for kind, names in found.items()},
        "prototypes": {
            "rule": {
                "k": settings.clusters,
                "mu_b_lower": settings.context_lower,
                **{name: getattr(settings, name) for name in ("restarts", "tau", "mu_f", "mu_b")},
            },
            "digest": fitted.prototypes.digest,
            "choices": [one.as_json() for one in fitted.prototypes.choices],
            "early": [] if fitted.early is None else list(fitted.early.prototypes.layers),
            "classes": prototype_records(
                fitted, searched, sharing, count=section.prototypes, patches=section.patches
            ),
        },
        "confusions": confusions,
        **tested,
        **inputs.about,
    }
