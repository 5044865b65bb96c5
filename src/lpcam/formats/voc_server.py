"""Archives for PASCAL VOC's evaluation server."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from lpcam.data.dataset import ClassTable, check_unique
from lpcam.data.masks import read_index_mask, write_mask
from lpcam.data.voc import CLASSES as VOC_CLASSES
from lpcam.runtime.errors import ArtefactError, DataError
from lpcam.runtime.files import read_bytes, write_bytes

Competition = Literal["comp5", "comp6"]
"""Of the VOC test server: trained on VOC's own data alone, or on any."""


ARCHIVE = "{}_test_cls.tar.gz"


_VOC_ID = re.compile(r"\d{4}_\d{6}")


_MOST_NAMED = 5
"""Ids that a message names."""


# -- The VOC test server -----------------------------------------------------------------------


def write_voc_server(
    masks: Mapping[str, Path] | Path,
    ids: Sequence[str],
    classes: ClassTable,
    output: Path,
    *,
    competition: Competition = "comp6",
) -> Path:
    """Pack masks as the PASCAL VOC test server takes them.

    Below ``output``: ``results/VOC2012/Segmentation/COMPETITION_test_cls/ID.png``, palette PNGs of
    the values 0..20, and the same in ``COMPETITION_test_cls.tar.gz``, whose bytes depend on the
    masks alone. Everything is checked before anything is written.

    Args:
        masks: the mask of each id, or a folder of ``ID.png``.
        ids: of the list ``test``, as YYYY_NNNNNN, each once.
        classes: of the masks; names of VOC with VOC's mask ids, perhaps not all.
        output: a folder.
        competition: ``comp5`` for what was trained on VOC's own data alone, else ``comp6``.

    Returns:
        the archive.

    Raises:
        DataError: if there is no id, one is no VOC id or stands twice, a mask is missing, damaged
            or has a value outside 0..20, the classes are not VOC's, or the competition is unknown.
        ArtefactError: if there are other masks in the folder already, or a file cannot be written.
    """
    if competition not in get_args(Competition):
        allowed = ", ".join(get_args(Competition))
        raise DataError(f"unknown competition {competition!r}; the server has {allowed}")
    _check_voc_classes(classes)
    if not ids:
        raise DataError("no id was given; give those of the list 'test'")
    wrong = [name for name in ids if _VOC_ID.fullmatch(name) is None]
    if wrong:
        raise DataError(f"{_named(wrong)} is no id of VOC, as 2008_000006 is; give VOC's own list")
    check_unique(ids, "the list for the server")
    paths = {
        name: masks / f"{name}.png" if isinstance(masks, Path) else masks.get(name)
        for name in sorted(ids)
    }
    present = {name: path for name, path in paths.items() if path is not None and path.is_file()}
    missing = [name for name in paths if name not in present]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} masks are missing: {_named(missing)}; segment these "
            "images first, for the server wants every image of its list"
        )
    for path in present.values():
        values = np.unique(read_index_mask(path))
        outside = values[values > len(VOC_CLASSES)].tolist()
        if outside:
            raise DataError(
                f"mask {path} has the value {outside[0]}; the server takes 0 to "
                f"{len(VOC_CLASSES)}, and 255 (ignored) is no answer"
            )
    inner = Path("results", "VOC2012", "Segmentation", f"{competition}_test_cls")
    written = [output / inner / f"{name}.png" for name in present]
    others = sorted(set((output / inner).glob("*")) - set(written))
    if others:
        raise ArtefactError(
            f"{others[0]} is there already and not of this list; choose another folder"
        )
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for path, into in zip(present.values(), written, strict=True):
            write_mask(into, read_index_mask(path))
            data = read_bytes(into)
            member = tarfile.TarInfo((inner / into.name).as_posix())  # no date and no owner
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    target = output / ARCHIVE.format(competition)
    write_bytes(target, buffer.getvalue())
    return target


def _check_voc_classes(classes: ClassTable) -> None:
    for name, value in zip(classes.names, classes.mask_ids, strict=True):
        if not value <= len(VOC_CLASSES) or VOC_CLASSES[value - 1] != name:
            raise DataError(
                f"class {name!r} with the mask id {value} is not one of VOC; the server takes the "
                f"{len(VOC_CLASSES)} classes of VOC with the ids 1 to {len(VOC_CLASSES)}"
            )


def _named(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _MOST_NAMED} more" if len(ids) > _MOST_NAMED else ""
    return ", ".join(repr(name) for name in ids[:_MOST_NAMED]) + more
