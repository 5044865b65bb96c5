"""Batches of a data loader: what is accepted, what is refused and with which correction."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpcam.classifiers.features import full_precision, tensor_pyramid
from lpcam.classifiers.linear import ProbeSettings, fit_head
from lpcam.classifiers.wrapped import WrappedModel
from lpcam.runtime.errors import (
    BatchError,
    ClassifierError,
    PrototypeError,
    nearest_name,
    shortened,
)

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
        raise BatchError(f"expected a loader, got {_text(loader)}; it yields batches: {BATCH}")
    count = 0
    for count, batch in enumerate(loader, start=1):  # noqa: B007
        if isinstance(batch, Mapping):
            found = [[key for key in keys if key in batch] for keys in KEYS]
            if any(len(keys) != 1 for keys in found):
                names = ", ".join(map(repr, batch))
                raise BatchError(f"the loader gave a dictionary of {names}; {BATCH}")
            yield batch[found[0][0]], batch[found[1][0]]
        elif isinstance(batch, (tuple, list)) and len(batch) > 1:
            yield batch[0], batch[1]
        else:
            raise BatchError(f"the loader gave {_text(batch)}, without labels; {BATCH}")
    if not count:
        raise PrototypeError(
            "the loader gave no image; give one that yields batches each time that it is read"
        )


def read_all(
    loader: Batches, channels: int, classes: Sequence[str]
) -> Iterator[tuple[Tensor, list[list[int]]]]:
    """Images (B, c, H, W) and the class indices of each of them, of each batch."""
    for given, labels in read_batches(loader):
        images = read_images(given, channels)
        yield images, read_labels(labels, len(images), classes)


def read_negatives(loader: Batches, channels: int) -> Iterator[Tensor]:
    """Images (B, c, H, W) of each batch, which may be the images alone; labels are not read."""
    check_readable_twice(loader, "comparing with negatives")
    for batch in loader:
        images = batch if isinstance(batch, Tensor) else next(read_batches([batch]))[0]
        yield read_images(images, channels)


def with_new_head(
    source: WrappedModel, loader: Batches, negatives: Batches | None = None
) -> WrappedModel:
    """A source with a linear head, fitted to the pooled features of images, some of no class."""
    check_readable_twice(loader, "fitting a new head")
    settings = ProbeSettings.from_preset("default")
    pooled, labels = [], []
    channels = source.channels_in
    batches = [read_all(loader, channels, source.classes)]
    if negatives is not None:
        plain = read_negatives(negatives, channels)
        batches.append((images, [[]] * len(images)) for images in plain)
    for images, chosen in chain.from_iterable(batches):
        for classes in chosen:
            labels.append(torch.zeros(len(source.classes)))
            labels[-1][classes] = 1
        with torch.no_grad(), full_precision(source.device):
            (pair,) = tensor_pyramid(source, images.to(source.device), (1.0,), flip=settings.mirror)
            views = [view.mean((-2, -1)) for view in pair if view is not None]
            pooled.append(torch.stack(views, dim=1).float().cpu())
    with torch.inference_mode(False), full_precision(torch.device("cpu")):
        rows = torch.cat(pooled).clone()
        weight = fit_head(rows, torch.stack(labels), settings, source.classes)
    return source.with_head(weight.to(source.device))


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
                f"the images of a batch have the shapes {sorted(shapes)[:3]}; resize them to one "
                "size, or give batches of one image"
            )
        given = torch.stack(parts)
    images, advice = _tensor(given), f"expected (B, {channels}, H, W)"
    shape = tuple(images.shape)
    if not images.is_floating_point():
        advice = "scale and normalise: images = (images.float() / 255 - mean) / std"
    elif len(shape) == 3:
        advice += "; a batch of one image is images[None]; for a data set, give DataLoader(dataset)"
    elif len(shape) == 4 and shape[1] != channels and shape[3] == channels:
        advice += ": images = images.permute(0, 3, 1, 2)"
    elif len(shape) == 4 and all(shape):
        top = float(images[0].max())
        if top > RAW_RANGE and float(images[0].min()) >= 0 and not images[0].frac().any():
            warnings.warn(
                f"the images are whole numbers up to {top:g}; unless the model normalises them "
                "itself, give (images / 255 - mean) / std",
                stacklevel=4,
            )
        return images
    raise BatchError(f"the images are {_text(images)}; {advice}")


def read_labels(labels: Any, count: int, classes: Sequence[str]) -> list[list[int]]:
    """Indices of the classes of each of ``count`` images, in increasing order."""
    number = len(classes)
    if isinstance(labels, np.ndarray):
        labels = labels.tolist() if labels.dtype.kind in "OU" else _tensor(labels)
    if isinstance(labels, (list, tuple)):
        shapes = {getattr(one, "shape", None) for one in labels}
        if shapes == {(count,)} and count + len(labels) > 2:
            raise BatchError(
                f"the labels are {len(labels)} tensors of {count} values, which may be one for "
                "each class, as the default collate function gives; torch.stack(labels, 1) if so, "
                "torch.stack(labels) if one is for each image"
            )
        if len(labels) != count:
            raise BatchError(f"there are {len(labels)} labels for {count} images")
        rows: list[Any] = [one.tolist() if hasattr(one, "tolist") else one for one in labels]
        if not _are_rows(rows, number):
            return [_indices(row, classes) for row in rows]
        labels = torch.tensor(rows, dtype=torch.float64)
    if not isinstance(labels, Tensor):
        raise BatchError(f"the labels are {_text(labels)}; {BATCH}")
    values, boolean = labels.detach().to_dense().cpu(), labels.dtype == torch.bool
    if values.numel() == count and ((boolean and number == 1) or values.ndim == 0):
        values = values.reshape(count, -1) if boolean else values[None]
    if tuple(values.shape) == (count, number):
        wrong = values[(values != 0) & (values != 1)]  # NaN is one of them
        if len(wrong):
            raise BatchError(
                f"the labels hold {wrong[0].item():g}, but a row for all {number} classes holds 0 "
                "and 1 alone: labels > 0 or labels > 0.5 if these are scores, counts or signs"
            )
        return [row.nonzero().flatten().tolist() for row in values]
    integer = not (boolean or values.is_floating_point() or values.is_complex())
    if integer and number > 1 and tuple(values.shape) in ((count,), (count, 1)):
        return [_indices(index, classes) for index in values.flatten().tolist()]
    raise BatchError(
        f"expected integer class indices of shape {(count,)}, or rows of 0 and 1 of shape "
        f"{(count, number)}, got {tuple(values.shape)} of {values.dtype}"
        + "; indices must be integers: labels.long()" * values.is_floating_point()
        + "; give labels[:, None]" * (number == 1)
    )


def class_indices(classes: Sequence[str], labels: Sequence[str]) -> list[int]:
    """Indices of class names in the order given, without repetition; BatchError for others."""
    if isinstance(labels, str):
        raise BatchError(f"expected a list of class names, got {labels!r}; give [{labels!r}]")
    return list(dict.fromkeys(_index(label, classes) for label in labels))


def _are_rows(rows: Sequence[Any], classes: int) -> bool:
    """Check for lists of 0 and 1 for all classes; BatchError if they may be indices too."""
    if not all(isinstance(row, (list, tuple)) and len(row) == classes for row in rows):
        return False
    integers = all(type(value) is int for row in rows for value in row)
    if integers and classes < 3 and any(sorted(row) == [*range(classes)] for row in rows):
        raise BatchError(
            f"the labels {rows!r:.60} may be class indices or rows of 0 and 1; give "
            "torch.tensor(labels) for rows of 0 and 1"
        )
    return all(isinstance(value, float) or value in (0, 1) for row in rows for value in row)


def _indices(row: Any, classes: Sequence[str]) -> list[int]:
    """The classes of one image, from one class or a list of distinct ones."""
    several = isinstance(row, (list, tuple, set, frozenset))
    found = sorted(_index(label, classes) for label in (row if several else [row]))
    if len(set(found)) < len(found):
        raise BatchError(f"the labels of an image, {row!r:.60}, repeat a class; list it once")
    return found


def _index(label: Any, classes: Sequence[str]) -> int:
    """Index of a class that is given by its name or index."""
    if isinstance(label, str):
        if (uses := list(classes).count(label)) == 1:
            return classes.index(label)
        if uses:
            raise BatchError(f"several classes have the name {label!r}; give the class index")
        raise BatchError(
            f"unknown class {label!r}{nearest_name(label, classes)}; the {len(classes)} classes "
            f"are {shortened(classes)}"
        )
    if isinstance(label, bool) or not hasattr(label, "__index__"):
        raise BatchError(f"the label {label!r:.60} is not a class index or name; {BATCH}")
    if not 0 <= (index := operator.index(label)) < len(classes):
        raise BatchError(f"expected class indices from 0 to {len(classes) - 1}, got {index}")
    return index


def _tensor(given: Any) -> Tensor:
    if isinstance(given, np.ndarray) and given.dtype.kind in "fiub":
        return torch.tensor(np.ascontiguousarray(given, given.dtype.newbyteorder("=")))
    if isinstance(given, Tensor):
        return given
    raise BatchError(f"expected a tensor or an array, got {_text(given)}; {BATCH}")


def _text(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} {tuple(value.shape)} of {value.dtype}"
    return f"{type(value).__name__} {value!r:.40}"
