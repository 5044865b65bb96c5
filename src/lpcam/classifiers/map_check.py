"""Check that the output of a layer behaves like a feature map.

It must have one grid per image, which follows the size of the image in both axes and depends on
this image alone, and its cells must be local: a changed corner of the image shows there most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcam.classifiers.probing import Probed, attempt
from lpcam.classifiers.tracing import (
    MapLayer,
    Record,
    evaluation_mode,
    logits_of,
    misshape,
    replaced,
    tensors_of,
)
from lpcam.runtime.errors import ClassifierError

LOCAL = 3.0
"""Least ratio of the changes of the cells under a changed corner and in the opposite corner."""
PLACED = 1.5
"""Ratio below which the cells of a layer that is not known to be a map have no place."""
ALONG = 0.15
"""Least ratio for each other quadrant, as a power of the ratio for the opposite corner."""
PEAK = 4.0  #: Largest ratio of the largest change and the mean of a layer that mixes its cells.
LEAST_CHANNELS = 4  #: Images and maps of attention have fewer.
CARRIED = 1e-3
"""Largest share of the model's output that may not pass through the map."""
NOISES = 3
ASPECT = 0.5  #: Largest difference of the aspect ratios of a grid and its image, as a logarithm.


class Figures(NamedTuple):
    """Result of the check of a layer."""

    locality: float = math.nan  #: Ratio of the changes under a changed corner and opposite to it
    failure: str = ""  #: Why the layer gives no map; empty if it does

    @property
    def is_local(self) -> bool:
        return self.locality >= LOCAL

    def __str__(self) -> str:
        if self.failure:
            return self.failure
        figure = f"{self.locality:.1f}" if self.locality < 1000 else "over 1000"
        mixed = "" if self.is_local else f" (below {LOCAL:g}: its cells mix the whole image)"
        return f"locality {figure}{mixed}"


@dataclass
class MapCheck:
    """Checks layers of a model, from its recorded pass of two images."""

    model: nn.Module
    probed: Probed

    def __post_init__(self) -> None:
        self.record, self.images = self.probed.record, self.probed.record.images

    @cached_property
    def _doubled(self) -> Record | None:
        """A pass of one image of twice the height and width, if the model takes it."""
        if self.probed.fixed_size is not None:
            return None
        found = attempt(self.model, _doubled(self.images[:1]))
        return found if isinstance(found, Record) else None

    @cached_property
    def _disturbed(self) -> list[Record]:
        """A pass for each noise image: it, and it with each of its corners changed."""
        return [Record.of(self.model, batch) for batch in self._batches(self.images)]

    @cached_property
    def _disturbed_doubled(self) -> list[Record]:
        """The same of images of twice the size."""
        batches = self._batches(_doubled(self.images))
        return [Record.of(self.model, batch) for batch in batches]

    def figures(self, layer: MapLayer, raw: Tensor) -> Figures:
        """The figures of a layer; ``raw`` is its output for the two images."""
        size = self.record.size
        grid = layer.map(raw, size).shape[2:]
        if layer.map(raw, size).shape[1] < LEAST_CHANNELS:
            return Figures(failure=f"fewer than {LEAST_CHANNELS} channels")
        if grid.numel() < 2 or misshape(grid, size) > max(ASPECT, 1.5 / min(grid)):
            return Figures(failure=f"its grid {_x(grid)} has not the shape of images {_x(size)}")
        outputs = [self._output(layer, record) for record in self._disturbed]
        first = outputs[0]
        if first is None or first.shape != (5, *raw.shape[1:]):
            return Figures(failure="not one map for each image of a batch")
        bound = max(CARRIED, self.record.tolerance) * float(raw.abs().max())
        if float((first[0] - raw[0]).abs().max()) > bound:
            return Figures(failure="depends on the other images of a batch")
        doubled = None
        if self._doubled is not None:
            doubled = self._output(layer, self._doubled)
            told = doubled is not None or isinstance(layer.layer, nn.Module)
            if told and not _follows(layer, grid, doubled, self._doubled.size):
                return Figures(failure="its grid does not follow the size of the image")
        if not any(float((o - o[:1]).abs().max()) for o in outputs if o is not None):
            return Figures(failure="it is the same for all images")
        ordered, whole = _locality([layer.map(o, size) for o in outputs if o is not None])
        if not (ordered and whole >= LOCAL) and doubled is not None:
            size = self._disturbed_doubled[0].size
            outputs = [self._output(layer, record) for record in self._disturbed_doubled]
            again = _locality([layer.map(o, size) for o in outputs if o is not None])
            ordered, whole = max((ordered, whole), again)
        if not ordered:
            return Figures(whole, "its cells are not in the order of the image's rows and columns")
        return Figures(whole)

    def carries(self, layer: MapLayer) -> bool:
        """Whether all that the model's output tells of an image passes through the layer.

        The outputs of the layer for two images are exchanged. Then the model's are, too.
        """
        if not isinstance(layer.layer, nn.Module):
            return True
        count = 0

        def exchange(_module: nn.Module, _args: Any, output: Any) -> Any:
            nonlocal count
            count += 1
            if count - 1 == layer.number:
                return replaced(output, layer.part, lambda raw: raw.flip(layer.batch_axis))
            return None

        with evaluation_mode(self.model), layer.layer.register_forward_hook(exchange):
            try:
                found = answers(self.model(self.images))
            except torch.OutOfMemoryError:
                raise
            except Exception:  # a model may check what a layer gives in any way
                return False
        own = answers(self.record.output)
        if len(found) != len(own):
            return False
        return any(self._exchanged(a, b) for a, b in zip(found, own, strict=True))

    def _exchanged(self, found: Tensor, own: Tensor) -> bool:
        if found.shape != own.shape or own.shape[:1] != self.images.shape[:1]:
            return False
        # Two noise images may differ little in the output of a random model.
        change, rounding = own - own.flip(0), 4 * torch.finfo(own.dtype).eps * own.abs().max()
        bound = torch.maximum(
            CARRIED * change.abs().max(), rounding.minimum(change.abs().max() / 4)
        )
        return bool((found - own.flip(0)).abs().max() <= bound)

    def _output(self, layer: MapLayer, record: Record) -> Tensor | None:
        if not isinstance(layer.layer, nn.Module):
            try:
                return layer.raw(self.model, record.images)
            except (ClassifierError, RuntimeError, ValueError):  # of one size or batch
                return None
        for call in record.calls:
            same = (call.module, call.number, call.part)
            if same == (layer.layer, layer.number, layer.part) and call.after is not None:
                after = call.after.float()
                return after.transpose(0, 1) if layer.batch_axis else after
        return None

    def _batches(self, images: Tensor) -> list[Tensor]:
        """For each noise image a batch of it and of copies with one corner changed each."""
        generator = torch.Generator().manual_seed(1)
        height, width = images.shape[-2] // 4, images.shape[-1] // 4
        batches = []
        for number in range(NOISES):
            noise, other = torch.randn(2, *images.shape[1:], generator=generator).to(images)
            batch = (images[0] if number == 0 else noise).expand(5, *images.shape[1:]).clone()
            for corner in range(4):
                rows = slice(height) if corner < 2 else slice(-height, None)
                columns = slice(width) if corner % 2 == 0 else slice(-width, None)
                batch[corner + 1, :, rows, columns] = other[:, rows, columns]
            batches.append(batch)
        return batches


def _doubled(images: Tensor) -> Tensor:
    return F.interpolate(images.float(), scale_factor=2.0).to(images)


def answers(output: Any) -> list[Tensor]:
    """The logits of a model's output, or all its tensors if it gives maps or features."""
    if (logits := logits_of(output)) is not None:
        return [logits]
    if isinstance(output, Mapping) and "out" in output:  # segmentation, beside auxiliary scores
        output = output["out"]
    return [one for one in tensors_of(output) if one.numel() and one.is_floating_point()]


def _follows(
    layer: MapLayer, grid: torch.Size, doubled: Tensor | None, size: tuple[int, int]
) -> bool:
    """Whether a grid has about twice the rows and columns for an image of twice the size."""
    if doubled is None:
        return False
    if layer.layout == "tokens":
        count = doubled.shape[1] - layer.prefix
        rows, columns = layer.map(doubled, size).shape[2:] if count > 0 else (0, 0)
    else:
        rows, columns = layer.map(doubled, size).shape[2:]
    return all(abs(b - 2 * a) <= 2 and b > a for a, b in zip(grid, (rows, columns), strict=True))


def _locality(maps: list[Tensor]) -> tuple[bool, float]:
    """Whether cells stand where they change, and the ratio of a changed and the opposite corner.

    All are medians. Quadrants are compared with each other one: an axis of channels, and cells in
    another order, show there. Where the corners do not differ, no cell should.
    """
    corners: list[list[Tensor]] = []
    quadrants: list[list[Tensor]] = []
    peaks: list[Tensor] = []
    for features in maps:
        change = (features[1:] - features[:1]).double().norm(dim=1)
        peaks.append((change.amax((1, 2)) / change.mean((1, 2))).nan_to_num(0.0))
        for part, found in ((4, corners), (2, quadrants)):
            height, width = (max(1, side // part) for side in change.shape[1:])
            sides = ((slice(height), slice(-height, None)), (slice(width), slice(-width, None)))
            for corner in range(4):
                cells = [change[corner, r, c].mean() for r in sides[0] for c in sides[1]]
                # nothing changed anywhere: 0; nowhere else: infinite
                found.append([cells[corner] / cells[corner ^ k] for k in (3, 2, 1)])
    ratios = [torch.tensor(r).nan_to_num(0.0).median(0).values for r in (corners, quadrants)]
    whole, along = float(ratios[0][0]), float(ratios[1].min())
    if whole >= LOCAL:
        return along >= min(whole**ALONG, 2.0), whole
    return whole >= 1 / PLACED and float(torch.cat(peaks).median()) <= PEAK, whole


def _x(size: Any) -> str:
    return " x ".join(map(str, size))
