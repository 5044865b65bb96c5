"""Detecting the kind of a data set, and opening it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lpcam.data.coco import CocoFolder
from lpcam.data.coco_files import annotation_files
from lpcam.data.folder import read_folder
from lpcam.data.items import Dataset
from lpcam.data.labels import TABLES
from lpcam.data.truth import with_mask_folder
from lpcam.data.voc import read_voc, voc_lists
from lpcam.errors import DataError

Kind = Literal["voc", "folder", "coco"]
Truth = Mapping[str, Callable[[], tuple[NDArray[np.uint8] | None, tuple[str, ...]]]]
"""By id, a function that makes the true mask (H, W) of an image that has no mask file, or None if
it cannot, and the faults of the image's annotations in words."""


def kind_of(path: Path) -> Kind:
    """The kind of a data set: ``coco``, ``voc`` or ``folder``.

    ``coco`` is a JSON file or a folder with annotations, ``voc`` a folder in VOC's layout. A folder
    with ``labels.csv`` or ``labels.jsonl`` is always a ``folder``, and so is any other folder.

    Raises:
        DataError: if there is nothing at the path, or a file that is not JSON.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     kind_of(Path(folder))
        'folder'
    """
    if path.is_file():
        if path.suffix.lower() == ".json":
            return "coco"
        raise DataError(
            f"{path} is a file of unknown kind; give a folder of images with labels, VOC2012, a "
            "folder with COCO's annotations, or a COCO JSON file"
        )
    if not path.is_dir():
        raise DataError(f"there is no {path}; give a folder of images, or a COCO JSON file")
    if any((path / name).is_file() for name in TABLES):
        return "folder"
    if voc_lists(path):
        return "voc"
    return "coco" if annotation_files(path) else "folder"


def open_dataset(path: Path, kind: Kind | None = None, **options: Any) -> Dataset:
    """Open a data set of any kind: labels are read, images not yet.

    Args:
        path, kind, options: as in `open_with_truth`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Path(folder, "cow").mkdir()
        ...     Path(folder, "cow", "1.jpg").touch()
        ...     open_dataset(Path(folder), labels="folders").classes.names
        ('cow',)
    """
    return open_with_truth(path, kind, **options)[0]


def open_with_truth(
    path: Path,
    kind: Kind | None = None,
    *,
    lists: Sequence[str] | None = None,
    labels: Path | Literal["folders"] | None = None,
    masks: Path | None = None,
    classes: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Dataset, Truth]:
    """Open a data set of any kind, with the true masks that COCO's annotations give.

    Args:
        path: as in `kind_of`.
        kind: None: what `kind_of` returns.
        lists: names of the lists of VOC or COCO to read; None: all. Images of VOC's ``test`` need
            no label.
        labels: for VOC and folders, a table instead of the usual labels; for a folder also
            ``"folders"``: one folder per class.
        masks: a folder of true masks, ``ID.png``, instead of the usual ones.
        classes: names of classes to choose, in label order; None: all.
        progress: called with the bytes of COCO's annotations read so far and of all.

    Raises:
        DataError: if ``lists`` or ``labels`` do not belong to the kind, and as its reader.
    """
    kind = kind or kind_of(path)
    truth: Truth = {}
    if kind == "folder":
        if lists is not None:
            raise DataError(
                f"lists ({', '.join(lists)}) are chosen of the kinds voc and coco; leave them out "
                f"for a folder such as {path}"
            )
        return read_folder(path, classes=classes, labels=labels, masks=masks), truth
    if kind == "voc":
        if isinstance(labels, str):
            raise DataError("labels 'folders' belongs to the kind folder; give a .csv or .jsonl")
        dataset = read_voc(
            path,
            lists=lists or voc_lists(path),
            classes=classes,
            unlabelled=("test",),
            labels=labels,
        )
    else:
        if labels is not None:
            raise DataError("labels belongs to the kinds voc and folder; coco has its annotations")
        coco = CocoFolder(path, lists=lists, classes=classes, progress=progress)
        dataset = coco.dataset
        truth = {
            name: partial(coco.true_mask, name) for name in dataset.items if coco.outlined(name)
        }
    return (dataset, truth) if masks is None else (with_mask_folder(dataset, masks), {})
