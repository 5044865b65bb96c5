"""Boxes, points, candidate instances and outlines of one map or mask.

Pixel (y, x) is the square from (x, y) to (x + 1, y + 1), from 0 at the top left, so a box
``x0, y0, x1, y1`` contains the pixels x0 <= x < x1 and y0 <= y < y1. A pixel is foreground if its
value is > the threshold, as in seed masks. A map that is not (H, W), or with NaN or Inf, raises
DataError. Components and peaks require SciPy (extra ``objects``).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lpcam.runtime.errors import DataError, import_extra

Connectivity = Literal[4, 8]  #: 8: pixels that touch at a corner are connected. 4: they are not.
ScoreKind = Literal["max", "mean"]
Plane = NDArray[Any] | Tensor  #: A map or mask (H, W).
SHARE = 0.1  #: Least size of a marker, relative to its group.
PEAK = 0.5  #: Least peak of a marker, relative to the highest of its group.
SMOOTHING = 0.05  #: Standard deviation of the smoothing, in square roots of a group's pixels.
GAP = 0.06  #: Widest gap inside a group, in square roots of the image's pixels.
LEVELS = 16  #: Number of thresholds at which a marker may fall apart.


@dataclass(frozen=True)
class Box:
    """Tightest box around a connected component."""

    x0: int
    y0: int
    x1: int  #: One past the last column.
    y1: int  #: One past the last row.
    score: float  #: Maximum or mean of the map in the component.
    area: int  #: Number of pixels of the component, not of the box.

    as_dict = asdict


@dataclass(frozen=True)
class Point:
    """Pixel and value of a peak."""

    x: int
    y: int
    score: float

    as_dict = asdict


@dataclass(frozen=True)
class Instance:
    """Candidate for one object of a class."""

    box: Box
    peak: Point
    mask: NDArray[np.bool_] = field(repr=False, compare=False)  #: (H, W), of the whole image.

    def as_dict(self) -> dict[str, Any]:
        """Fields of the box, and ``peak``. :func:`polygons` describes the mask."""
        return {**asdict(self.box), "peak": asdict(self.peak)}


def components(mask: Plane, *, connectivity: Connectivity = 8) -> tuple[NDArray[np.int32], int]:
    """Labels (H, W) of the connected components of a mask, whose foreground is not 0, and their K.

    Labels are 0 outside and 1..K inside, numbered by their first pixel in reading order.
    """
    values = _plane(mask) != 0
    if connectivity not in (4, 8):
        raise DataError(f"connectivity is {connectivity}; expected 4 or 8")
    ndimage = _ndimage()
    labels = np.empty(values.shape, dtype=np.int32)
    structure = ndimage.generate_binary_structure(2, 2 if connectivity == 8 else 1)
    return labels, int(ndimage.label(values, structure, output=labels))


def separate(mask: Plane, evidence: Plane) -> tuple[NDArray[np.int32], int]:
    """Labels (H, W) of the objects of a class that may touch, as :func:`components` has them.

    Pieces of the mask closer than ``GAP`` are a group. While a threshold of the smoothed evidence
    rises, a group falls into parts; large ones (``SHARE``) with a high peak (``PEAK``) are markers
    of objects. Each pixel belongs to the nearest marker of its group; a group without two markers
    is one object. The constants were chosen on drawings (``benchmarks.objects``).

    Args:
        mask: (H, W), not 0 on the class.
        evidence: (H, W) >= 0, such as :func:`lpcam.method.multi_scale.discriminative_map`.

    Example:
        >>> separate(np.ones((1, 7)), np.array([[0, 9, 0, 0, 0, 8, 0]]))[0].tolist()
        [[1, 1, 1, 1, 2, 2, 2]]
    """
    inside, plane = _plane(mask) != 0, _finite(evidence)
    if plane.shape != inside.shape:
        raise DataError(f"evidence is {plane.shape} but the mask {inside.shape}; resize it first")
    ndimage = _ndimage()
    away = ndimage.distance_transform_edt(~inside) if inside.any() else np.ones(inside.shape)
    groups, count = components(away <= GAP / 2 * inside.size**0.5)
    labels, found = np.zeros_like(groups), 0
    for group, place in labelled_boxes(groups, count):
        mine = inside[place] & (groups[place] == group)
        deviation = SMOOTHING * mine.sum() ** 0.5
        weight = ndimage.gaussian_filter(mine.astype(np.float64), deviation)
        smooth = ndimage.gaussian_filter(np.where(mine, plane[place], 0), deviation)
        smooth /= np.maximum(weight, np.finfo(np.float64).tiny)  # a mean over the group alone
        markers = _markers(smooth, mine, SHARE * mine.sum(), PEAK * smooth[mine].max())
        distances = [ndimage.distance_transform_edt(~marker) for marker in markers]
        labels[place][mine] = found + 1 + np.argmin(distances, axis=0)[mine]
        found += len(markers)
    return labels, found


def _markers(
    values: NDArray[np.float64], inside: NDArray[np.bool_], size: float, peak: float
) -> list[NDArray[np.bool_]]:
    """Parts of at least a size and a peak into which a map falls while a threshold rises."""
    low, high = values[inside].min(), values[inside].max()
    for threshold in np.linspace(low, high, LEVELS, endpoint=False)[1:]:
        labels, count = components(inside & (values > threshold))
        sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        peaks = _ndimage().maximum(values, labels, np.arange(1, count + 1))
        parts = [labels == n + 1 for n in np.flatnonzero((sizes >= size) & (peaks >= peak))]
        if not parts:
            break
        if len(parts) > 1:
            return [one for part in parts for one in _markers(values, part, size, peak)]
    return [inside]


def labelled_boxes(labels: NDArray[np.int32], count: int) -> list[tuple[int, tuple[slice, slice]]]:
    """Labels that have pixels, with the rows and columns of their boxes."""
    found = _ndimage().find_objects(labels, count) if count else []
    return [(label, place) for label, place in enumerate(found, start=1) if place is not None]


def boxes(
    values: Plane,
    threshold: float = 0.0,
    *,
    score: ScoreKind = "max",
    minimum_area: int = 1,
    connectivity: Connectivity = 8,
) -> list[Box]:
    """Tightest boxes of the connected components of a map, the largest component first.

    Boxes of equal area are ordered from top to bottom and left to right. ``score`` is the maximum
    or mean of the map in a component; components below ``minimum_area`` pixels are dropped.

    Example:
        >>> boxes(np.array([[0.9, 0.0, 0.4], [0.0, 0.0, 0.8]]), 0.3)[0]
        Box(x0=2, y0=0, x1=3, y1=2, score=0.8, area=2)
    """
    plane = _finite(values)
    found = components(plane > threshold, connectivity=connectivity)
    return [box for box, _ in _boxes(plane, *found, score, minimum_area)]


def _boxes(
    plane: NDArray[np.float64],
    labels: NDArray[np.int32],
    count: int,
    score: ScoreKind,
    minimum_area: int,
) -> list[tuple[Box, int]]:
    """Boxes in the order of :func:`boxes`, each with its label."""
    if score not in ("max", "mean"):
        raise DataError(f"score is {score!r}; expected 'max' or 'mean'")
    found = []
    for label, (rows, columns) in labelled_boxes(labels, count):
        inside = plane[rows, columns][labels[rows, columns] == label]
        if len(inside) >= minimum_area:
            value = float(inside.max() if score == "max" else inside.mean())
            x0, y0, x1, y1 = columns.start, rows.start, columns.stop, rows.stop
            found.append((Box(x0, y0, x1, y1, value, len(inside)), label))
    return sorted(found, key=lambda one: (-one[0].area, one[0].y0, one[0].x0))


def points(
    values: Plane, threshold: float = 0.0, *, distance: float = 16.0, most: int | None = None
) -> list[Point]:
    """Peaks of a map, the highest first; at most ``most``.

    A peak is a plateau of equal pixels (often one) whose 8-neighbours are all lower; its point is
    the pixel of the plateau nearest to its centre. Points are selected by decreasing value, equal
    ones in reading order; a point closer than ``distance`` pixels to a selected one is dropped.

    Example:
        >>> points(np.array([[0.1, 0.9, 0.1, 0.0, 0.5]]), distance=3)
        [Point(x=1, y=0, score=0.9), Point(x=4, y=0, score=0.5)]
    """
    kept: list[Point] = []
    for peak in _peaks(_finite(values), threshold):
        if all((peak.x - o.x) ** 2 + (peak.y - o.y) ** 2 >= distance**2 for o in kept):
            kept.append(peak)
    return kept[:most]


def _peaks(plane: NDArray[np.float64], threshold: float) -> list[Point]:
    """Local maxima above the threshold by decreasing value, then in reading order."""
    if not plane.size:
        return []
    ndimage = _ndimage()
    outside = {"size": 3, "mode": "constant", "cval": -np.inf}
    highest = (plane == ndimage.maximum_filter(plane, **outside)) & (plane > threshold)
    labels, count = components(highest)
    # On a flat part of a slope, a pixel has an equal neighbour that has a higher neighbour.
    slope = ndimage.maximum_filter(np.where(highest, -np.inf, plane), **outside) == plane
    labels[np.isin(labels, labels[highest & slope])] = 0
    found = []
    for label, place in labelled_boxes(labels, count):
        y, x = np.nonzero(labels[place] == label)
        middle = int(np.argmin((y - y.mean()) ** 2 + (x - x.mean()) ** 2))
        row, column = int(y[middle]) + place[0].start, int(x[middle]) + place[1].start
        found.append(Point(column, row, float(plane[row, column])))
    return sorted(found, key=lambda one: (-one.score, one.y, one.x))


def instances(
    values: Plane,
    threshold: float,
    *,
    evidence: Plane | None = None,
    score: ScoreKind = "max",
    minimum_area: int = 1,
) -> list[Instance]:
    """Candidates for the objects of one class, which may touch: those of :func:`separate`.

    Without ``evidence`` (H, W) the map itself is taken for it, which separates less well. A peak is
    the highest of the evidence. Other arguments and the order are those of :func:`boxes`.

    Example:
        >>> found = instances(np.array([[0.9, 0.5, 0.4, 0.8, 0.6]]), 0.3)
        >>> [(one.box.x0, one.box.x1) for one in found]
        [(0, 3), (3, 5)]
    """
    plane = _finite(values)
    known = plane if evidence is None else _finite(evidence)
    labels, count = separate(plane > threshold, known)
    found = []
    for box, label in _boxes(plane, labels, count, score, minimum_area):
        mask = labels == label
        peak = _peaks(np.where(mask, known, -np.inf), -np.inf)[0]
        found.append(Instance(box, peak, mask))
    return found


def polygons(mask: Plane) -> list[NDArray[np.float64]]:
    """Exact outlines of a mask, whose foreground is not 0, along the edges of its pixels.

    A ring (K, 2) lists x and y of the corners at which a closed line turns; the first is not
    repeated. Rings around foreground have a positive shoelace area (clockwise on the screen), those
    around holes a negative one. Pixels that only touch at a corner are in different rings.

    Example:
        >>> polygons(np.array([[0, 1, 1]]))[0].tolist()
        [[1.0, 0.0], [3.0, 0.0], [3.0, 1.0], [1.0, 1.0]]
    """
    # Contours at a level, as libraries compute them, cut the corners of pixels.
    inside = np.pad(_plane(mask) != 0, 1)
    # Edges between pixels inside and outside, from corner to corner, with the inside on the right:
    # top edges go right (direction 0), right edges down (1), and so on.
    here = inside[1:-1, 1:-1]
    starts = ((0, 0), (1, 0), (1, 1), (0, 1))  # corner of the pixel where that edge begins
    beyond = (inside[:-2, 1:-1], inside[1:-1, 2:], inside[2:, 1:-1], inside[1:-1, :-2])
    leaving: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for direction, ((dx, dy), outside) in enumerate(zip(starts, beyond, strict=True)):
        y, x = np.nonzero(here & ~outside)
        for corner in zip((x + dx).tolist(), (y + dy).tolist(), strict=True):
            leaving[corner].append(direction)
    rings = []
    for first in sorted(leaving, key=lambda corner: (corner[1], corner[0])):
        while leaving[first]:
            rings.append(_ring(first, leaving))
    return rings


def _ring(first: tuple[int, int], leaving: dict[tuple[int, int], list[int]]) -> NDArray[np.float64]:
    """Follow edges from a corner back to it, removing them from ``leaving``."""
    corners = []
    corner, beginning = first, leaving[first].pop()
    direction = beginning
    while True:
        dx, dy = ((1, 0), (0, 1), (-1, 0), (0, -1))[direction]
        corner = (corner[0] + dx, corner[1] + dy)
        if corner == first:
            break
        # If two pixels touch at this corner, two edges leave it: turning right stays with ours.
        onward = leaving[corner]
        right = (direction + 1) % 4
        turn = right if right in onward else onward[0]
        onward.remove(turn)
        if turn != direction:
            corners.append(corner)
        direction = turn
    if direction != beginning:
        corners.insert(0, first)
    return np.array(corners, dtype=np.float64).reshape(-1, 2)


def _plane(values: Plane) -> NDArray[Any]:
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if array.ndim != 2:
        raise DataError(f"map is {array.shape}; expected (H, W), one class of one image")
    return array


def _finite(values: Plane) -> NDArray[np.float64]:
    array = _plane(values).astype(np.float64)
    if not np.isfinite(array).all():
        raise DataError("map has NaN or infinite values; compute it again")
    return array


def _ndimage() -> Any:
    return import_extra("scipy.ndimage", "objects", "components and peaks need SciPy")
