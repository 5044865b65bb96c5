"""Opening a data set of any kind that a reader recognises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from lpcam.data.image_files import other_format
from lpcam.data.pixels import given_reading
from lpcam.data.reader import READERS, Opened, Request, TrueMask
from lpcam.runtime.errors import DataError

Truth = Mapping[str, TrueMask]  #: True masks that are not files, by image id.


def kind_of(path: Path) -> str:
    """Name of the first reader that recognises a path; ``folder`` for any other folder.

    DataError if there is nothing, an unknown file, or a data set in a folder of the path alone.
    """
    if not path.exists():
        raise DataError(f"there is no {path}; give a folder of images, or a COCO JSON file")
    name = next((name for name, reader in READERS.items() if reader.recognises(path)), None)
    if name is None and path.is_file():
        raise DataError(
            f"{other_format(path) or f'{path} is a file of unknown kind'}; give a folder of images "
            "with labels, VOC2012, a folder with COCO annotations, or a COCO JSON file"
        )
    for inner in sorted(path.iterdir())[:20] if name is None else ():
        for kind, reader in READERS.items():
            if inner.is_dir() and reader.recognises(inner):
                raise DataError(
                    f"{path} holds the data set {inner} of the kind {kind}; give that folder, or "
                    "--kind folder if it is not meant"
                )
    return name or "folder"


def open_dataset(
    path: Path,
    kind: str | None = None,
    *,
    lists: Sequence[str] | None = None,
    labels: Path | Literal["folders"] | None = None,
    masks: Path | None = None,
    classes: Sequence[str] | None = None,
    separator: str | None = None,
    no_class: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    **pixels: Any,
) -> Opened:
    """Open a data set of any kind: labels are read, images not yet.

    Args:
        kind: name of a reader; None: what :func:`kind_of` finds.
        lists: names of the lists to read; None: all. Images of a list ``test`` need no label.
        labels: a table instead of the usual labels; ``"folders"``: each class has a folder.
        masks: a folder of true masks, ``ID.png``, instead of the usual ones.
        classes: names of classes to choose, in label order, which keep their mask ids; None: all.
        separator: text between the labels of an image; ``list``: they are a list. None: ``;``.
        no_class: labels that mean that an image shows no class.
        settings: values of the reader's settings.
        pixels: ``range``, ``orientation`` and ``palette`` of its images and masks.

    Raises:
        DataError: if an option does not belong to the kind, or its reader raises it.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> (folder / "cow").mkdir()
        >>> (folder / "cow" / "1.jpg").touch()
        >>> open_dataset(folder, labels="folders").dataset.classes.names
        ('cow',)
    """
    name = kind or kind_of(path)
    reader = READERS[name]
    if lists is not None and not reader.chooses_lists:
        given = ", ".join(lists)
        raise DataError(f"lists ({given}) cannot be chosen for the kind {name}; leave them out")
    try:
        reader.check_options(name, labels, separator, no_class or ())
        made = None if reader.settings is None else reader.settings.model_validate(settings or {})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = " ".join(map(str, first["loc"]))
        raise DataError(f"{key} for the kind {name}: {first['msg']}") from error
    except ValueError as error:
        raise DataError(str(error)) from None
    if settings and made is None:
        raise DataError(f"{', '.join(settings)} does not belong to the kind {name}; leave it out")
    unlabelled, no_class = frozenset({"test"}), no_class or ()
    opened = reader.open(
        Request(path, lists, unlabelled, labels, separator, no_class, masks, classes, made)
    )
    return replace(opened, dataset=given_reading(opened.dataset, **pixels))


def paint_masks(
    path: Path,
    folder: Path,
    *,
    lists: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    workers: int = 1,
) -> tuple[int, int]:
    """Paint true masks of annotations as ``folder/ID.png``; the number of masks, and of images."""
    opened = open_dataset(path, lists=lists, settings=settings)
    if opened.paint is None:
        raise DataError(
            f"{path} has no annotations to paint masks from; give a folder with COCO annotations, "
            "or a COCO JSON file"
        )
    items = opened.paint(folder, opened.dataset.items, workers).items.values()
    return sum(item.mask is not None for item in items), len(items)
