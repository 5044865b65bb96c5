"""Archives for PASCAL VOC's evaluation server."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

from lpcam.data.dataset import ClassTable
from lpcam.data.masks import read_index_mask, write_mask
from lpcam.data.voc import CLASSES as VOC_CLASSES
from lpcam.runtime.errors import ArtefactError, DataError, shortened
from lpcam.runtime.files import read_bytes, write_bytes

_NAME = "comp6_test_cls"


def write_voc_server(masks: Path, ids: Sequence[str], classes: ClassTable, output: Path) -> Path:
    """Pack masks as the PASCAL VOC test server takes them, in bytes that depend on them alone.

    Writes ``results/VOC2012/Segmentation/comp6_test_cls/ID.png`` and the archive
    ``comp6_test_cls.tar.gz``, which is returned. DataError, before anything is written, if ids or
    classes are not VOC's; ArtefactError if the folder has other masks.
    """
    known = dict(enumerate(VOC_CLASSES, start=1)).items()
    if not dict(zip(classes.mask_ids, classes.names, strict=True)).items() <= known:
        raise DataError(
            f"the classes {shortened(classes.names)} are not VOC's with VOC's mask ids; the server "
            "takes no others"
        )
    for name in ids:
        if re.fullmatch(r"\d{4}_\d{6}", name) is None:
            raise DataError(f"{name!r} is not an id of VOC, as 2008_000006 is; give VOC's own list")
    paths = {f"{name}.png": masks / f"{name}.png" for name in sorted(ids)}
    for path in paths.values():
        if (largest := read_index_mask(path).max()) > len(VOC_CLASSES):
            raise DataError(
                f"mask {path} has the value {largest}; the server takes 0 to {len(VOC_CLASSES)}, "
                "and not 255 (ignored)"
            )
    inner = Path("results", "VOC2012", "Segmentation", _NAME)
    written = {name: output / inner / name for name in paths}
    others = sorted({*(output / inner).glob("*")} - {*written.values()})
    if others:
        raise ArtefactError(
            f"{others[0]} is there already and not of this list; choose another folder"
        )
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for name, path in written.items():
            write_mask(path, read_index_mask(paths[name]))
            data = read_bytes(path)
            member = tarfile.TarInfo((inner / path.name).as_posix())  # no date and no owner
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    target = output / f"{_NAME}.tar.gz"
    write_bytes(target, buffer.getvalue())
    return target
