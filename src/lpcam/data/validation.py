"""Checking every file of a data set before a run: skips unreadable images, checks mask sizes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lpcam.data.dataset import Dataset, Item, Skip
from lpcam.data.images import has_pages, pages_notice
from lpcam.runtime.errors import DataError, ImageError
from lpcam.runtime.files import digest_file, digest_json
from lpcam.runtime.parallel import ordered_map
from lpcam.runtime.progress import Advance

SAVE_SECONDS = 30.0  #: Seconds between two calls of ``save``.


def check_images(
    dataset: Dataset,
    known: Mapping[str, dict[str, Any]] | None = None,
    *,
    advance: Advance = lambda *_: None,
    workers: int = 1,
    save: Callable[[dict[str, dict[str, Any]]], None] | None = None,
) -> tuple[Dataset, dict[str, dict[str, Any]]]:
    """Decode every image and true mask once; the data set without unreadable ones, and records.

    Files of the same size and time as in ``known`` records are not read again; ``save`` is called
    every `SAVE_SECONDS` with the records so far. DataError if a mask or no image can be used.
    """
    known, records, skipped = known or {}, dict[str, dict[str, Any]](), list[Skip]()
    next_save = time.monotonic() + SAVE_SECONDS

    def check(item: Item) -> dict[str, Any] | ImageError:
        try:
            return _record(item, known.get(item.id))
        except ImageError as error:
            return error

    found = ordered_map(check, dataset.items.values(), workers)
    for name, record in zip(dataset.items, found, strict=True):
        if isinstance(record, ImageError):
            skipped.append(Skip(name, str(record)))
        else:
            records[name] = record
        if save is not None and time.monotonic() > next_save:
            save({**known, **records})
            next_save = time.monotonic() + SAVE_SECONDS
        advance(1, "")
    if not records:
        reason = skipped[0].reason if skipped else "it has no items"
        raise DataError(f"no image of {dataset.name} can be used: {reason}")
    if paged := [name for name, record in records.items() if record.get("pages")]:
        dataset = replace(dataset, notices=(*dataset.notices, pages_notice(paged)))
    return dataset.without(skipped), records


def _record(item: Item, known: dict[str, Any] | None) -> dict[str, Any]:
    files = (item.image, item.mask, item.parts)
    size = [0 if path is None else -1 for path in files]
    changed = [0, 0, 0]
    for place, path in enumerate(files):
        with contextlib.suppress(OSError):  # reading it tells what is wrong
            if path is not None:
                stat = path.stat()
                size[place], changed[place] = stat.st_size, stat.st_mtime_ns
    reading = item.reading.as_json()
    now = {"size": size, "mtime_ns": changed, **({"reading": reading} if reading else {})}
    if known is not None and now == {key: known[key] for key in (*now, "reading") if key in known}:
        return known
    height, width = item.read().shape[:2]
    for what, path in (("mask", item.mask), ("part mask", item.parts)):
        if path is not None:
            try:
                item.read_mask(path, (height, width))
            except DataError as error:
                raise DataError(f"{what} of {item.id!r}: {error}") from error
    digests = [None if path is None else digest_file(path) for path in files]
    of_image = {key: value for key, value in reading.items() if key != "palette"}
    image = digest_json([digests[0], of_image]) if of_image else digests[0]
    both = image if digests[1:] == [None, None] else digest_json(digests)
    return {
        "height": height,
        "width": width,
        **({"pages": True} if has_pages(item.image) else {}),
        "image_digest": image,
        "digest": digest_json([both, reading]) if reading else both,
        **now,
    }
