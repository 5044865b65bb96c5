"""Opening a data set of any kind that a reader recognises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lpcam.data.dataset import Dataset
from lpcam.data.reader import READERS, Progress, Request, TrueMask
from lpcam.runtime.errors import DataError
from lpcam.runtime.progress import progress as shown

Truth = Mapping[str, TrueMask]
"""True masks that are not files, by image id."""


def kind_of(path: Path) -> str:
    """The name of the first reader that recognises a path.

    A folder that none recognises is a ``folder``.

    Raises:
        DataError: if there is nothing at the path, or a file that no reader recognises.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     kind_of(Path(folder))
        'folder'
    """
    if not path.exists():
        raise DataError(f"there is no {path}; give a folder of images, or a COCO JSON file")
    for name, reader in READERS.items():
        if reader.recognises(path):
            return name
    if path.is_file():
        raise DataError(
            f"{path} is a file of unknown kind; give a folder of images with labels, VOC2012, a "
            "folder with COCO annotations, or a COCO JSON file"
        )
    return "folder"


def open_dataset(path: Path, kind: str | None = None, **options: Any) -> Dataset:
    """Open a data set of any kind: labels are read, images not yet.

    Args:
        path, kind, options: as in :func:`open_with_truth`.

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
    kind: str | None = None,
    *,
    lists: Sequence[str] | None = None,
    labels: Path | Literal["folders"] | None = None,
    masks: Path | None = None,
    classes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> tuple[Dataset, Truth]:
    """Open a data set of any kind, with the true masks that its annotations give.

    Args:
        path: folder or file of the data set.
        kind: name of a reader; None: what :func:`kind_of` finds.
        lists: names of the lists to read; None: all. Images of a list ``test`` need no label.
        labels: a table instead of the usual labels; for a folder also ``"folders"``: one folder for
            each class.
        masks: a folder of true masks, ``ID.png``, instead of the usual ones.
        classes: names of classes to choose, in label order; None: all.
        progress: called with the bytes of annotations read so far and of all.

    Raises:
        DataError: if ``lists`` or ``labels`` do not belong to the kind, and as its reader.
        RegistryError: if there is no reader of that name.
    """
    name = kind or kind_of(path)
    reader = READERS[name]
    if lists is not None and not reader.chooses_lists:
        raise DataError(
            f"lists ({', '.join(lists)}) cannot be chosen for the kind {name}; leave them out for "
            f"{path}"
        )
    try:
        reader.check_labels(labels)
    except ValueError as error:
        raise DataError(str(error)) from None
    unlabelled = frozenset({"test"})
    request = Request(path, lists, unlabelled, labels, masks, classes, progress=progress)
    opened = reader.open(request)
    return opened.dataset, opened.true_masks


def paint_masks(
    path: Path,
    folder: Path,
    *,
    lists: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    workers: int = 1,
) -> tuple[int, int]:
    """Paint the true masks that the annotations of a data set give, as ``folder/ID.png``.

    Args:
        path, lists: as in :func:`open_with_truth`.
        settings: values of the reader's settings.
        workers: number of masks painted at a time.

    Returns:
        Number of masks, and of images.

    Raises:
        DataError: if the data set has no annotations to paint from, and as its reader.
    """
    reader = READERS[kind_of(path)]
    made = None if reader.settings is None else reader.settings.model_validate(settings or {})
    opened = reader.open(Request(path, lists, settings=made))
    if opened.paint is None:
        raise DataError(
            f"{path} has no annotations to paint masks from; give a folder with COCO annotations, "
            "or a COCO JSON file"
        )
    ids = list(opened.dataset.items)
    with shown("painting masks", len(ids)) as advance:
        painted = opened.paint(folder, ids, workers, lambda _done, _total: advance(1, ""))
    return sum(item.mask is not None for item in painted.items.values()), len(ids)
