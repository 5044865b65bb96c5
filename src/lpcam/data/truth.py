"""True masks in a folder of their own, found by the names that data sets give them."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace
from pathlib import Path

from lpcam.data.items import Dataset
from lpcam.errors import DataError

_COCO_NUMBER = re.compile(r"(?:COCO_\w+_)?(\d{12})")


def with_mask_folder(dataset: Dataset, folder: Path) -> Dataset:
    """A copy of a data set with the masks of another folder: ``ID.png``, or ``ID.PNG``.

    Masks of COCO may also be named by the image's number, as LPCAM's program writes them (9.png),
    or by its 12 digits (000000000009.png).

    Raises:
        DataError: if there is no such folder, or no mask of any image in it.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder of masks {folder}; give the folder that holds ID.png")
    files = {
        # ids are in NFC; some systems store names in another Unicode form
        unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix()): path
        for path in sorted(folder.rglob("*"), reverse=True)  # of a.PNG and a.png the first
        if path.suffix.lower() == ".png"
    }
    items = {
        name: replace(item, mask=next((files[n] for n in _names(name) if n in files), None))
        for name, item in dataset.items.items()
    }
    if not any(item.mask for item in items.values()):
        raise DataError(
            f"{folder} has no mask of any of the {len(items)} images; they are called ID.png, "
            f"such as {next(iter(items))}.png"
        )
    return replace(dataset, items=items)


def _names(item_id: str) -> list[str]:
    number = _COCO_NUMBER.fullmatch(item_id.rpartition("/")[2])
    return [item_id] if number is None else [item_id, number[1], str(int(number[1]))]
