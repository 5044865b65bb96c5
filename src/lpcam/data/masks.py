"""Index masks on disk: reading, writing and resizing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lpcam.data.dataset import Dataset
from lpcam.data.images import load_image, png_bytes
from lpcam.runtime.errors import DataError
from lpcam.runtime.files import write_bytes

_COCO_NUMBER = re.compile(r"(?:COCO_\w+_)?(\d{12})")


def with_mask_folder(dataset: Dataset, folder: Path) -> Dataset:
    """A copy of a data set with the masks ``ID.png`` (of COCO also ``9.png``) of another folder."""
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


def voc_palette() -> NDArray[np.uint8]:
    """VOC colours, uint8 (256, 3) (specification of data sets, section 1)."""
    steps = np.arange(8)[:, None]
    bits = np.arange(256)[:, None, None] >> (3 * steps + np.arange(3)) & 1
    return np.asarray((bits << (7 - steps)).sum(axis=1), np.uint8)


def enlarge_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Resize integer labels (H, W) to ``size`` (height, width) by nearest neighbour."""
    if tuple(labels.shape) == tuple(size):
        return labels
    # float32 holds every label exactly
    resized = F.interpolate(labels[None, None].float(), size=tuple(size), mode="nearest-exact")
    return resized[0, 0].to(labels.dtype)


def write_mask(path: Path, mask: NDArray[np.uint8]) -> None:
    """Write mask values, uint8 (H, W), atomically as a PNG with the VOC palette."""
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise DataError(f"mask is {mask.dtype} {mask.shape}; expected uint8 (H, W)")
    write_bytes(path, png_bytes(mask, voc_palette().tobytes()))


def write_plane(path: Path, plane: NDArray[np.floating]) -> None:
    """Write values (H, W) in [0, 1] atomically as a grey PNG of 0 to 255."""
    write_bytes(path, png_bytes(np.rint(plane * 255).astype(np.uint8)))


def read_index_mask(path: Path, *, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Read the values stored in a mask, uint8 (H, W): palette indices or grey; 1 bit gives 0 and 1.

    Args:
        size: (height, width) of the upright image, which the mask must have; None: any.

    Raises:
        DataError: if the file cannot be read (ImageError), holds colours, is lossy (JPEG), has
            values above 255 or another size.

    Example:
        >>> path = getfixture("tmp_path") / "a.png"
        >>> write_mask(path, np.array([[0, 7]], np.uint8))
        >>> read_index_mask(path).tolist()
        [[0, 7]]
    """
    image = load_image(path, path)
    problem = None
    if image.format == "JPEG":
        problem = "it is a JPEG, whose values are not exact"
    elif image.mode not in ("P", "L", "1") and not image.mode.startswith("I"):
        problem = f"it holds colours (mode {image.mode}), not class indices"
    values = np.array(image)
    if problem is None and values.size and (values.min() < 0 or values.max() > 255):
        problem = f"it has values from {values.min()} to {values.max()}"
    if problem is not None:
        raise DataError(
            f"mask {path} is refused: {problem}; save it as an 8-bit grey or palette PNG whose "
            "pixel values are 0 (background), the class's number, or 255 (ignored)"
        )
    if size is not None and values.shape != tuple(size):
        height, width = values.shape
        raise DataError(
            f"mask {path} is {height} x {width} (height x width), the upright image {size[0]} x "
            f"{size[1]}; save the mask in the size of the image"
        )
    return values.astype(np.uint8)
