"""What kind of data set a path is, and all of it opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lpcam.data.folder import read_folder
from lpcam.data.items import Dataset
from lpcam.data.truth import with_mask_folder
from lpcam.data.voc import read_voc, voc_lists
from lpcam.errors import DataError

Kind = Literal["voc", "folder", "coco"]
Truth = Mapping[str, Callable[[], tuple[NDArray[np.uint8] | None, tuple[str, ...]]]]
"""By id, a call that makes the true mask (H, W) of an image that has no file of one: None where it
cannot be made, and beside it what is wrong with the image's annotations, in words."""


def kind_of(path: Path) -> Kind:
    """``coco`` of a JSON file or a folder with annotations, ``voc`` of VOC's layout, else a folder.

    A folder with ``labels.csv`` or ``labels.jsonl`` is a user's, whatever else it holds.

    Raises:
        DataError: if there is nothing at the path, or a file that is no JSON.
    """
    from lpcam.data.coco_files import annotation_files  # noqa: PLC0415

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
    labels: Path | Literal["folders"] | None = None,
    masks: Path | None = None,
    classes: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """A data set whole: labels read, images not yet.

    Args:
        path: as `kind_of` takes it.
        kind: None: as `kind_of` finds.
        lists: those to read of VOC and COCO; None: all. Images of VOC's ``test`` need no label.
        labels: of VOC and folders: a table instead of the usual labels; of a folder also
            ``"folders"``, where each class has one.
        masks: a folder of true masks, ``ID.png``, instead of the usual ones.
        classes: names of those to choose; None: all.
        progress: of reading COCO's annotations, called with the bytes done and the bytes of all.

    Raises:
        DataError: if ``lists`` or ``labels`` do not belong to the kind, and as its reader.
    """
    dataset, _ = open_with_truth(
        path, kind, lists=lists, labels=labels, masks=masks, classes=classes, progress=progress
    )
    return dataset


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
    """A data set as `open_dataset` gives it, and the true masks that annotations (COCO's) give."""
    kind = kind or kind_of(path)
    if kind == "folder":
        if lists is not None:
            raise DataError(
                f"lists ({', '.join(lists)}) are chosen of the kinds voc and coco; a folder such "
                f"as {path} is read whole, so leave them out"
            )
        return read_folder(path, classes=classes, labels=labels, masks=masks), {}
    truth: Truth = {}
    if kind == "voc":
        if isinstance(labels, str):
            raise DataError("labels 'folders' belongs to the kind folder; name a .csv or .jsonl")
        dataset = read_voc(
            path,
            lists=lists or voc_lists(path),
            classes=classes,
            unlabelled=("test",),
            labels=labels,
        )
    else:
        from lpcam.data.coco import CocoFolder  # noqa: PLC0415

        if labels is not None:
            raise DataError("labels belongs to the kinds voc and folder; coco has its annotations")
        folder = CocoFolder(path, lists=lists, classes=classes, progress=progress)
        dataset = folder.dataset
        outlined = filter(folder.outlined, dataset.items)
        truth = {name: partial(folder.true_mask, name) for name in outlined}
    return (dataset, truth) if masks is None else (with_mask_folder(dataset, masks), {})
