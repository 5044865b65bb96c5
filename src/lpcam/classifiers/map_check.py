"""Check that the output of a layer is a local grid per image, which follows the image's size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcam.classifiers.probing import Probed, attempt
from lpcam.classifiers.tracing import (
    MapLayer,
    Record,
    logits_of,
    misshape,
    replaced,
    tensors_of,
)

LOCAL = 3.0
"""Least ratio of the changes of the cells under a changed corner and in the opposite corner."""
PLACED = 1.5  #: Ratio below which the cells of a layer that is not known to be a map have no place.
ALONG = 0.15
"""Least ratio for each other quadrant, as a power of the ratio for the opposite corner."""
PEAK = 4.0  #: Largest ratio of the largest change and the mean of a layer that mixes its cells.
LEAST_CHANNELS = 4  #: Images and maps of attention have fewer.
CARRIED = 1e-3  #: Largest share of the model's output that may not pass through the map.
VANISHED = 1e-30  #: Changes so small are those of a map whose values vanish.
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
    together: bool = False  #: Whether a pass keeps the outputs of all layers, else of one

    def __post_init__(self) -> None:
        self.record, self.images = self.probed.record, self.probed.record.images
        doubled = F.interpolate(self.images.float(), scale_factor=2.0).to(self.images)
        self._batches = {
            "disturbed": _disturbed(self.images),
            "doubled": [doubled[:1]],
            "doubled, disturbed": _disturbed(doubled),
        }
        self._records: dict[str, list[Record | Exception]] = {}

    @property
    def follows_size(self) -> bool:
        """Whether it is tried that grids follow the size of the image."""
        return self.probed.fixed_size is None

    def figures(self, layer: MapLayer, raw: Tensor) -> Figures:
        """The figures of a layer; ``raw`` is its output for the two images."""
        size = self.record.size
        channels, *grid = layer.map(raw, size).shape[1:]
        if channels < LEAST_CHANNELS:
            return Figures(failure=f"fewer than {LEAST_CHANNELS} channels")
        if math.prod(grid) < 2 or misshape(grid, size) > max(ASPECT, 1.5 / min(grid)):
            return Figures(failure=f"its grid {_x(grid)} has not the shape of images {_x(size)}")
        outputs = [
            one
            for one in self._outputs(layer, "disturbed")
            if one is not None and one.shape == (5, *raw.shape[1:])
        ]
        if len(outputs) < NOISES:
            return Figures(failure="not one map for each image of a batch")
        bound = max(CARRIED, self.record.tolerance) * float(raw.abs().max())
        if float((outputs[0][0] - raw[0]).abs().max()) > bound:
            return Figures(failure="depends on the other images of a batch")
        twice = (2 * size[0], 2 * size[1])
        doubled = self._outputs(layer, "doubled")[0] if self.follows_size else None
        if doubled is not None and not _follows(layer, grid, doubled, twice):
            return Figures(failure="its grid does not follow the size of the image")
        change = max(float((one - one[:1]).abs().max()) for one in outputs)
        if change <= max(1e-7 * float(raw.abs().max()), VANISHED):
            return Figures(failure="it is the same for all images")
        ordered, whole = _locality([layer.map(one, size) for one in outputs])
        if not (ordered and whole >= LOCAL) and doubled is not None:
            larger = self._outputs(layer, "doubled, disturbed")
            again = _locality([layer.map(one, twice) for one in larger if one is not None])
            ordered, whole = max((ordered, whole), again)
        if not ordered:
            return Figures(whole, "its cells are not in the order of the image's rows and columns")
        return Figures(whole)

    def carries(self, layer: MapLayer) -> bool:
        """Whether all that the model's output tells of an image passes through the layer."""
        if not isinstance(layer.layer, nn.Module):
            return True
        calls = count()

        def exchange(_module: nn.Module, _args: Any, output: Any) -> Any:
            if next(calls) == layer.number:
                return replaced(output, layer.part, lambda raw: raw.flip(layer.batch_axis))
            return None

        with layer.layer.register_forward_hook(exchange):
            record = attempt(self.model, self.images)
        if isinstance(record, Exception):  # a model may check what a layer gives in any way
            return False
        found, own = answers(record.output, len(self.images)), self.answers
        return len(found) == len(own) and any(map(_exchanged, found, own))

    @property
    def answers(self) -> list[Tensor]:
        """What the model gave for the images, along the first axis."""
        return answers(self.record.output, len(self.images))

    def _outputs(self, layer: MapLayer, kind: str) -> list[Tensor | None]:
        """Outputs of a layer for batches; None where it cannot take them."""
        batches = self._batches[kind]
        if not self.together or not isinstance(layer.layer, nn.Module):
            return [self._output(layer, images) for images in batches]
        if kind not in self._records:
            self._records[kind] = [attempt(self.model, images) for images in batches]
        return [_recorded(layer, record) for record in self._records[kind]]

    def _output(self, layer: MapLayer, images: Tensor) -> Tensor | None:
        try:
            return layer.raw(self.model, images)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a model or a function may refuse images in any way
            return None


def _recorded(layer: MapLayer, record: Record | Exception) -> Tensor | None:
    for call in record.calls if isinstance(record, Record) else ():
        same = (call.module, call.number, call.part)
        if same == (layer.layer, layer.number, layer.part) and call.after is not None:
            return call.after.float().transpose(0, layer.batch_axis)
    return None


def _disturbed(images: Tensor) -> list[Tensor]:
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


def answers(output: Any, count: int) -> list[Tensor]:
    """The logits of a model for ``count`` images, or all maps and features that it gives.

    The images are moved to the first axis. Tensors without them, such as boxes, are left out.
    """
    logits = logits_of(output)
    if logits is not None and len(logits) == count:
        return [logits]
    if isinstance(output, Mapping) and "out" in output:  # segmentation, beside auxiliary scores
        output = output["out"]
    found = []
    for one in tensors_of(output):
        axes = [axis for axis, length in enumerate(one.shape[:2]) if length == count]
        if axes and one.is_floating_point() and one.numel():
            found.append(one.transpose(0, axes[0]))
    return found


def _exchanged(found: Tensor, own: Tensor) -> bool:
    """Whether outputs for two images are those for the same images in the other order."""
    if found.shape != own.shape:
        return False
    # Two noise images may differ little in the output of a random model.
    change, rounding = (own - own.flip(0)).abs().max(), 4 * torch.finfo(own.dtype).eps
    bound = torch.maximum(CARRIED * change, (rounding * own.abs().max()).minimum(change / 4))
    return bool((found - own.flip(0)).abs().max() <= bound)


def _follows(layer: MapLayer, grid: Sequence[int], doubled: Tensor, size: tuple[int, int]) -> bool:
    """Tell if an image of twice the size has a grid of about twice the rows and columns."""
    if layer.layout == "tokens" and doubled.shape[1] <= layer.prefix:
        return False
    twice = layer.map(doubled, size).shape[2:]
    return all(abs(b - 2 * a) <= 2 and b > a for a, b in zip(grid, twice, strict=True))


def _locality(maps: list[Tensor]) -> tuple[bool, float]:
    """Order of the cells as in the image or not, and the ratio of changes at opposite corners."""
    corners: list[list[Tensor]] = []
    quadrants: list[list[Tensor]] = []
    peaks: list[Tensor] = []
    changes = [(features[1:] - features[:1]).double().norm(dim=1) for features in maps]
    # Some layers leave out what does not fill a patch at the edge: nothing changes there.
    rows, columns = (torch.stack(changes).sum((0, 1, axis)) > 0 for axis in (3, 2))
    for change in (one[:, rows][:, :, columns] for one in changes):
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
