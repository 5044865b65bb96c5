"""Batches of a data loader: what is accepted, what is refused and with which correction."""

from __future__ import annotations

import difflib
import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpcam.runtime.errors import BatchError, ClassifierError, PrototypeError

Batches = Iterable[Any]
"""A loader: an iterable of batches as :data:`BATCH` says."""
BATCH = (
    "a batch is (images, labels, ...), or a dictionary with 'pixel_values', 'image' or 'images' "
    "and 'labels' or 'label': images (B, c, H, W) in floating point, normalised as the model "
    "expects, and for each image a class index, a class name, a list of them, or a row of 0 and 1 "
    "for all N classes"
)
KEYS = (("pixel_values", "image", "images"), ("labels", "label"))
RAW_RANGE = 30.0  #: No usual normalisation gives whole numbers only, from 0 to more than this.


def read_batches(loader: Batches) -> Iterator[tuple[Any, Any]]:
    """Images and labels of each batch, as they were given; PrototypeError without any."""
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise BatchError(f"expected a loader, got {describe(loader)}; it yields batches: {BATCH}")
    count = 0
    for count, batch in enumerate(loader, start=1):  # noqa: B007
        if isinstance(batch, Mapping):
            given = [[key for key in keys if key in batch] for keys in KEYS]
            if any(len(found) != 1 for found in given):
                raise BatchError(
                    f"the loader gave a dictionary of {', '.join(map(repr, batch))}; {BATCH}"
                )
            yield batch[given[0][0]], batch[given[1][0]]
        elif isinstance(batch, (tuple, list)) and len(batch) > 1:
            yield batch[0], batch[1]
        else:
            raise BatchError(f"the loader gave {describe(batch)}, without labels; {BATCH}")
    if not count:
        raise PrototypeError(
            "the loader gave no image; give one that yields batches each time that it is read"
        )


def check_readable_twice(loader: Batches, what: str) -> None:
    """Refuse an iterator, which can be read once."""
    # iter(loader) would draw from the caller's random numbers
    if isinstance(loader, Iterator):
        raise ClassifierError(
            f"the loader is an iterator, but {what} reads it twice; give a DataLoader or a list of "
            "batches"
        )


def read_images(given: Any, channels: int) -> Tensor:
    """Images (B, c, H, W) of a tensor, an array, or a list of them for each image."""
    if isinstance(given, (list, tuple)) and given:
        parts = [_tensor(one) for one in given]
        if len(shapes := {tuple(part.shape) for part in parts}) > 1:
            raise BatchError(
                f"the images of a batch have the sizes {sorted(shapes)[:3]}; resize them to one "
                "size, or give batches of one image"
            )
        given = torch.stack(parts)
    images = _tensor(given)
    shape = tuple(images.shape)
    if not images.is_floating_point():
        raise BatchError(
            f"the images are {_dtype(images)}; scale and normalise them as the model expects: "
            "images = (images.float() / 255 - mean) / std, with mean and std (c, 1, 1)"
        )
    if len(shape) == 3:
        raise BatchError(f"the images have the shape {shape}; a batch of one is images[None]")
    if len(shape) == 4 and shape[1] != channels and shape[3] == channels:
        raise BatchError(
            f"the images have the shape {shape}, channels last; expected (B, {channels}, H, W): "
            "images = images.permute(0, 3, 1, 2)"
        )
    if len(shape) != 4 or not all(shape):
        raise BatchError(f"the images have the shape {shape}; expected (B, {channels}, H, W)")
    first = images[0]
    if float(first.max()) > RAW_RANGE and float(first.min()) >= 0 and not first.frac().any():
        warnings.warn(
            f"the images are whole numbers up to {float(first.max()):g}; unless the model "
            "normalises them itself, give (images / 255 - mean) / std",
            stacklevel=4,
        )
    return images


def read_labels(labels: Any, count: int, classes: Sequence[str]) -> list[list[int]]:
    """Indices of the classes of each of ``count`` images, in increasing order.

    Raises BatchError if they have another form, a value that is none, or more than one reading.
    """
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "OU":
        labels = labels.tolist()
    elif isinstance(labels, np.ndarray):
        labels = torch.tensor(np.ascontiguousarray(labels))
    if isinstance(labels, Tensor):
        return _of_tensor(labels.detach().cpu(), count, len(classes))
    if not isinstance(labels, Sequence) or isinstance(labels, (str, bytes)):
        raise BatchError(f"the labels are {describe(labels)}; {BATCH}")
    sizes = {tuple(one.shape) for one in labels if isinstance(one, (Tensor, np.ndarray))}
    across = len(labels) != count or count > 1
    if sizes == {(count,)} and across and all(hasattr(one, "shape") for one in labels):
        raise BatchError(
            f"the labels are {len(labels)} tensors of {count} values, which may be one for each "
            "class, as the default collate function gives; torch.stack(labels, 1) if so, "
            "torch.stack(labels) if one is for each image"
        )
    if len(labels) != count:
        raise BatchError(f"there are {len(labels)} labels for {count} images")
    rows: list[Any] = [one.tolist() if hasattr(one, "tolist") else one for one in labels]
    lists = [row for row in rows if isinstance(row, (list, tuple))]
    values = [value for row in lists for value in row]
    if len(lists) == count and all(len(row) == len(classes) for row in lists):
        if any(isinstance(value, (bool, float)) for value in values):
            return _of_tensor(torch.tensor(rows, dtype=torch.float64), count, len(classes))
        if all(isinstance(value, int) and value in (0, 1) for value in values):
            if len(classes) < 3 and any(len(set(row)) == len(row) for row in lists):
                raise BatchError(
                    f"the labels {labels!r:.60} may be class indices or rows of 0 and 1; give "
                    "torch.tensor(labels) for rows of 0 and 1"
                )
            return _of_tensor(torch.tensor(rows), count, len(classes))
    return [
        sorted(_index(one, classes) for one in _distinct(row))
        if isinstance(row, (list, tuple, set, frozenset))
        else [_index(row, classes)]
        for row in rows
    ]


def class_indices(classes: Sequence[str], labels: Sequence[str]) -> list[int]:
    """Indices of class names in the order given, without repetition; BatchError for others."""
    if isinstance(labels, str):
        raise BatchError(f"expected a list of class names, got {labels!r}; give [{labels!r}]")
    return list(dict.fromkeys(_index(label, classes) for label in labels))


def describe(value: Any) -> str:
    """Type of a value, with the shape of tensors and the length of lists."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} {tuple(value.shape)} of {_dtype(value)}"
    length = f" of {len(value)}" if isinstance(value, (list, tuple)) else ""
    return f"{type(value).__name__}{length} ({value!r:.40})"


def _dtype(values: Any) -> str:
    return str(values.dtype).removeprefix("torch.")


def _tensor(images: Any) -> Tensor:
    if isinstance(images, np.ndarray) and images.dtype.kind in "fiub":
        return torch.tensor(np.ascontiguousarray(images))
    if isinstance(images, Tensor):
        return images
    raise BatchError(f"the images are {describe(images)}, not a tensor or an array; {BATCH}")


def _of_tensor(labels: Tensor, count: int, classes: int) -> list[list[int]]:
    """Classes of class indices (B,) or (B, 1), or of a row of 0 and 1 for each image (B, N)."""
    boolean = labels.dtype == torch.bool
    integer = not (boolean or labels.is_floating_point() or labels.is_complex())
    shape = tuple(labels.shape)
    if (shape == (count,) and boolean and classes == 1) or (shape == () and count == 1):
        labels = labels.reshape(-1, 1) if boolean else labels[None]
    if tuple(labels.shape) == (count, classes):
        wrong = labels[(labels != 0) & (labels != 1)]  # NaN is one of them
        if len(wrong):
            raise BatchError(
                f"the labels hold {wrong[0].item():g}; a row for all {classes} classes holds 0 "
                "and 1 alone: labels > 0 or labels > 0.5 if these are scores, counts or signs"
            )
        return [row.nonzero().flatten().tolist() for row in labels]
    if integer and classes > 1 and tuple(labels.shape) in ((count,), (count, 1)):
        return [[_in_range(index, classes)] for index in labels.flatten().tolist()]
    raise BatchError(
        f"expected integer class indices of shape {(count,)}, or rows of 0 and 1 of shape "
        f"{(count, classes)}, got {shape} of {_dtype(labels)}"
        + "; indices must be integers: labels.long()" * (labels.is_floating_point())
        + "; give labels[:, None]" * (classes == 1 and shape == (count,))
    )


def _distinct(row: Iterable[Any]) -> Iterable[Any]:
    values = list(row)
    if len(set(values)) < len(values):
        raise BatchError(f"the labels of an image, {values!r:.60}, repeat a class; list it once")
    return values


def _index(label: Any, classes: Sequence[str]) -> int:
    """Index of a class that is given by its name or index."""
    if isinstance(label, str):
        if (uses := classes.count(label)) == 1:
            return classes.index(label)
        near = difflib.get_close_matches(label, classes, n=5, cutoff=0.5)
        raise BatchError(
            f"{'several classes have the name' if uses else 'unknown class'} {label!r}; some of "
            f"the {len(classes)} classes are {', '.join(near or [*classes[:8], '...'])}"
        )
    try:
        if isinstance(label, bool):
            raise TypeError
        return _in_range(operator.index(label), len(classes))
    except TypeError:
        raise BatchError(f"the label {label!r:.60} is not a class index or name; {BATCH}") from None


def _in_range(index: int, classes: int) -> int:
    if not 0 <= index < classes:
        raise BatchError(f"expected class indices from 0 to {classes - 1}, got {index}")
    return index
