"""What kind of data set a path is, and all of it opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from lpcam.data.folder import read_folder
from lpcam.data.items import Dataset
from lpcam.data.voc import read_voc, voc_lists
from lpcam.errors import DataError

Kind = Literal["voc", "folder", "coco"]


def kind_of(path: Path) -> Kind:
    """``coco`` of a JSON file or a folder with annotations, ``voc`` of VOC's layout, else a folder.

    A folder with ``labels.csv`` or ``labels.jsonl`` is a user's, whatever else it holds.

    Raises:
        DataError: if there is nothing at the path, or a file that is no JSON.
    """
    from lpcam.data.coco import annotation_files  # noqa: PLC0415

    if path.is_file():
        if path.suffix.lower() == ".json":
            return "coco"
        raise DataError(
            f"{path} is a file of no known kind; give a folder of images with labels, VOC2012, a "
            "folder with COCO's annotations, or a COCO JSON file"
        )
    if not path.is_dir():
        raise DataError(f"there is no {path}; give a folder of images, or a COCO JSON file")
    if any((path / name).is_file() for name in ("labels.csv", "labels.jsonl")):
        return "folder"
    if voc_lists(path):
        return "voc"
    return "coco" if annotation_files(path) else "folder"


def open_dataset(
    path: Path,
    kind: Kind | None = None,
    *,
    lists: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """A data set whole: labels read, images not yet.

    Args:
        path: as `kind_of` takes it.
        kind: None: as `kind_of` finds.
        lists: those to read of VOC and COCO; None: all. Images of VOC's ``test`` need no label.
        progress: of reading COCO's annotations, called with the bytes done and the bytes of all.

    Raises:
        DataError: as the reader of the kind.
    """
    kind = kind or kind_of(path)
    if kind == "folder":
        return read_folder(path)
    if kind == "voc":
        return read_voc(path, lists=lists or voc_lists(path), unlabelled=("test",))
    from lpcam.data.coco import CocoFolder  # noqa: PLC0415

    return CocoFolder(path, lists=lists, progress=progress).dataset
