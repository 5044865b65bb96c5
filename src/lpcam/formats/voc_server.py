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
_MOST_NAMED = 5


def write_voc_server(
    masks: Mapping[str, Path] | Path,
    ids: Sequence[str],
    classes: ClassTable,
    output: Path,
    *,
    competition: Competition = "comp6",
) -> Path:
    """Pack masks as the PASCAL VOC test server takes them.

    Writes ``results/VOC2012/Segmentation/COMPETITION_test_cls/ID.png``, palette PNGs of the values
    0..20, and an archive of them, whose bytes depend on the masks alone. Everything is checked
    before anything is written.

    Args:
        masks: the mask of each id, or a folder of ``ID.png``.
        ids: ids of the list ``test``, as YYYY_NNNNNN, each once.
        classes: classes of the masks: names of VOC with VOC's mask ids.
        output: a folder.
        competition: ``comp5`` for what was trained on VOC's own data alone, else ``comp6``.

    Returns:
        the archive, ``COMPETITION_test_cls.tar.gz``.

    Raises:
        DataError: if an id is no VOC id or repeats, a mask is missing, damaged or has a value
            outside 0..20, the classes are not VOC's, or the competition is unknown.
        ArtefactError: if there are other masks in the folder already, or a file cannot be written.
    """
    if competition not in get_args(Competition):
        allowed = ", ".join(get_args(Competition))
        raise DataError(f"unknown competition {competition!r}; the server has {allowed}")
    present = _check(masks, ids, classes)
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
    target = output / f"{competition}_test_cls.tar.gz"
    write_bytes(target, buffer.getvalue())
    return target


def _check(
    masks: Mapping[str, Path] | Path, ids: Sequence[str], classes: ClassTable
) -> dict[str, Path]:
    """The mask of each id, in the order of the archive."""
    for name, value in zip(classes.names, classes.mask_ids, strict=True):
        if dict(enumerate(VOC_CLASSES, start=1)).get(value) != name:
            raise DataError(
                f"class {name!r} with the mask id {value} is not one of VOC; the server takes the "
                f"{len(VOC_CLASSES)} classes of VOC with the ids 1 to {len(VOC_CLASSES)}"
            )
    if not ids:
        raise DataError("no id was given; give those of the list 'test'")
    wrong = [name for name in ids if re.fullmatch(r"\d{4}_\d{6}", name) is None]
    if wrong:
        raise DataError(
            f"{_named(wrong)} is not an id of VOC, as 2008_000006 is; give VOC's own list"
        )
    check_unique(ids, "the list for the server")
    if isinstance(masks, Path):
        masks = {name: masks / f"{name}.png" for name in ids}
    found = {name: masks[name] for name in sorted(ids) if name in masks and masks[name].is_file()}
    missing = sorted({*ids} - {*found})
    if missing:
        raise DataError(
            f"{len(missing)} of {len(ids)} masks are missing: {_named(missing)}; segment these "
            "images first, because the server requires every image of its list"
        )
    for path in found.values():
        outside = (values := np.unique(read_index_mask(path)))[values > len(VOC_CLASSES)].tolist()
        if outside:
            raise DataError(
                f"mask {path} has the value {outside[0]}; the server takes 0 to "
                f"{len(VOC_CLASSES)}, and not 255 (ignored)"
            )
    return found


def _named(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _MOST_NAMED} more" if len(ids) > _MOST_NAMED else ""
    return ", ".join(repr(name) for name in ids[:_MOST_NAMED]) + more
