"""Explain image files and whole folders, and write the results below an output folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lpcam.data.drawing import CELL, SheetRow, sheet
from lpcam.data.output_folders import (
    SHEET,
    SHEET_ROWS,
    ImageResults,
    OutputKind,
    find_images,
    process_images,
)
from lpcam.explain.explainer import Explainer
from lpcam.method.image_maps import KIND
from lpcam.runtime.files import write_bytes

INDEX = "explained.json"


def _describe(found: Mapping[str, Any]) -> str:
    """The findings of one image in words."""
    classes = ", ".join(
        f"{c['name']} {c['score']:.2f} ({100 * c['area']:.0f} % of the image{_parts(c)})"
        for c in found["classes"]
    )
    return "; ".join([*filter(None, [classes]), *found["notes"]])


def _parts(found: Mapping[str, Any]) -> str:
    """The named parts that carried the map of a class, in words."""
    shares = sorted(found.get("parts", {}).items(), key=lambda one: -one[1])
    return ": " * bool(shares) + ", ".join(f"{100 * share:.0f} % {part}" for part, share in shares)


_EXPLAINED = OutputKind(
    KIND,
    INDEX,
    (
        re.compile(r"found/(?P<name>.+)\.json"),
        re.compile(r"masks/(?P<name>.+)\.png"),
        re.compile(r"overlays/(?P<name>.+)\.mask\.png"),
        re.compile(r"parts/(?P<name>.+)\.[^./]+\.png"),
        re.compile(r"(heatmaps|overlays)/(?P<name>.+)\.[^./]+\.l?p?cam\.png"),
    ),
    describe=_describe,
    pictures=SHEET,
    others=(SHEET,),
)


def explain_files(
    explainer: Explainer,
    sources: Iterable[Path],
    output: Path,
    *,
    labels: Sequence[str] | None = None,
    workers: int = 1,
    command: str = "",
    **options: Any,
) -> ImageResults:
    """Explain image files and the images of folders, as :func:`process_images` does.

    Writes below ``output`` what :meth:`ImageMaps.save` writes for each image, ``sheet.png`` (a
    contact sheet of the first images) and the index ``explained.json``. ``labels`` and ``options``
    are arguments of :meth:`Explainer.__call__`.
    """
    if labels is not None:
        explainer.indices(labels)
    files = find_images(sources, output)
    rows: dict[str, list[SheetRow]] = {name: [] for name, _ in files.images[:SHEET_ROWS]}

    def make(name: str, path: Path) -> dict[str, Any]:
        maps = explainer(path, labels=labels, name=name, **options)
        if name in rows:
            rows[name] = maps.sheet_rows(long_side=2 * CELL)
        return maps.save(output)

    result = process_images(
        files,
        output,
        make,
        _EXPLAINED,
        made_by=explainer.made_by,
        command=command,
        workers=workers,
        title="explaining",
    )
    drawn = [row for own in rows.values() for row in own]
    if drawn:
        write_bytes(output / SHEET, sheet(drawn[:SHEET_ROWS], mask_title="mask"))
    else:
        (output / SHEET).unlink(missing_ok=True)
    return result
