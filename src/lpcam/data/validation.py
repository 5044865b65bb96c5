"""Checking every file of a data set before a run: skips unreadable images, checks mask sizes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lpcam.data.dataset import Dataset, Item, Skip
from lpcam.data.images import read_image
from lpcam.data.masks import read_index_mask
from lpcam.runtime.errors import DataError, ImageError
from lpcam.runtime.files import digest_file, digest_json
from lpcam.runtime.parallel import ordered_map

SAVE_SECONDS = 30.0
"""Seconds between two calls of ``save``."""


def check_images(
    dataset: Dataset,
    known: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
    save: Callable[[dict[str, dict[str, Any]]], None] | None = None,
) -> tuple[Dataset, dict[str, dict[str, Any]]]:
    """Decode every image and true mask of a data set once.

    Args:
        dataset: a data set that a reader returned.
        known: the records of an earlier call. Files whose size and time of change are those
            recorded are not read again.
        progress: called after each item with the number done and the number of all.
        workers: number of images read at a time.
        save: called every `SAVE_SECONDS` with the records so far.

    Returns:
        The data set without its unreadable images, and a record of each by id: ``height`` and
        ``width`` of the upright image, ``image_digest`` of its file, ``digest`` of image and true
        masks together, ``size`` and ``mtime_ns`` of image, mask and parts.

    Raises:
        DataError: naming the item, if a mask cannot be read, is not an index mask or has another
            size than its image, or if no image is left.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> from lpcam.data.folder import read_folder
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "labels.csv").write_text("image,labels\\na,cow\\n")
        ...     Image.new("RGB", (3, 2)).save(Path(folder, "a.png"))
        ...     _, records = check_images(read_folder(Path(folder)))
        >>> records["a"]["height"], records["a"]["width"]
        (2, 3)
    """
    known = known or {}
    records: dict[str, dict[str, Any]] = {}
    skipped: list[Skip] = []
    next_save = time.monotonic() + SAVE_SECONDS
    items = list(dataset.items.values())

    def check(item: Item) -> dict[str, Any] | ImageError:
        try:
            return _record(item, known.get(item.id))
        except ImageError as error:
            return error

    found = zip(items, ordered_map(check, items, workers), strict=True)
    for number, (item, record) in enumerate(found, start=1):
        if isinstance(record, ImageError):
            skipped.append(Skip(item.id, str(record)))
        else:
            records[item.id] = record
        if save is not None and time.monotonic() > next_save:
            save({**{name: dict(one) for name, one in known.items()}, **records})
            next_save = time.monotonic() + SAVE_SECONDS
        if progress is not None:
            progress(number, len(items))
    if not records:
        reason = skipped[0].reason if skipped else "it has no items"
        raise DataError(f"no image of {dataset.name} can be used: {reason}")
    return dataset.without(skipped), records


def _record(item: Item, known: Mapping[str, Any] | None) -> dict[str, Any]:
    files = (item.image, item.mask, item.parts)
    stats = [None if path is None else _stat(item, path) for path in files]
    size = [stat.st_size if stat else 0 for stat in stats]
    changed = [stat.st_mtime_ns if stat else 0 for stat in stats]
    if known is not None and (known["size"], known["mtime_ns"]) == (size, changed):
        return dict(known)
    height, width = read_image(item.image).shape[:2]
    for what, path in (("mask", item.mask), ("part mask", item.parts)):
        if path is not None:
            _check_mask(item, what, path, (height, width))
    digests = [None if path is None else digest_file(path) for path in files]
    return {
        "height": height,
        "width": width,
        "image_digest": digests[0],
        "digest": digests[0] if digests[1:] == [None, None] else digest_json(digests),
        "size": size,
        "mtime_ns": changed,
    }


def _stat(item: Item, path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        kind = ImageError if path == item.image else DataError
        raise kind(f"cannot read {path} of {item.id!r}: {error.strerror}") from error


def _check_mask(item: Item, what: str, path: Path, size: tuple[int, int]) -> None:
    try:
        shape = read_index_mask(path).shape
    except DataError as error:
        raise DataError(f"{what} of {item.id!r}: {error}") from error
    if shape != size:
        raise DataError(
            f"{what} of {item.id!r}, {path}, is {shape[0]} x {shape[1]} (height x width) but the "
            f"upright image is {size[0]} x {size[1]}; save the mask in the size of the image"
        )
