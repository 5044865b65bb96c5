"""True masks of a folder, found by the names that data sets give them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from lpcam.data.items import Dataset
from lpcam.errors import DataError

_COCO_NUMBER = re.compile(r"(?:COCO_\w+_)?(\d{12})")


def with_mask_folder(dataset: Dataset, folder: Path) -> Dataset:
    """The same with the masks of another folder: ID.png, whatever the case of the ending.

    Masks of COCO may also be called by the image's number, as LPCAM's program writes them (9.png)
    or with its 12 digits (000000000009.png).

    Raises:
        DataError: if there is no such folder, or no mask of any image in it.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder} of masks; give one that holds ID.png")
    files = {
        # ids are in this form; some systems store names in another
        unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix()): path
        for path in sorted(folder.rglob("*"), reverse=True)  # of a.PNG and a.png the first
        if path.suffix.lower() == ".png"
    }
    items, found = {}, 0
    for name, item in dataset.items.items():
        path = next((files[n] for n in _names(name) if n in files), None)
        found += path is not None
        items[name] = replace(item, mask=path)
    if not found:
        raise no_mask_in(folder, items)
    return replace(dataset, items=items)


def no_mask_in(folder: Path, ids: Collection[str]) -> DataError:
    """The error that a folder has no mask of any of these images."""
    return DataError(
        f"{folder} has no mask of any of the {len(ids)} images; they are called ID.png, such as "
        f"{next(iter(ids))}.png"
    )


def _names(item_id: str) -> list[str]:
    number = _COCO_NUMBER.fullmatch(item_id.rpartition("/")[2])
    return [item_id] if number is None else [item_id, number[1], str(int(number[1]))]
