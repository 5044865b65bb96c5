"""Outlines without holes, which give every pixel back, for formats whose polygons have none."""

from __future__ import annotations

from bisect import bisect_right
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lpcam.method.objects import polygons


def outlines(
    mask: NDArray[np.bool_], along: Literal["edges", "centres"]
) -> list[NDArray[np.float64]]:
    """One closed outline (K, 2) of x, y for each piece of a mask; cuts connect the holes to it.

    It runs along the outer ``edges`` of its outermost pixels, as an area has it, or through their
    ``centres`` (pixel (y, x) is the point (x, y)), as a line that is drawn over pixels has it. All
    lines are level or upright. The even-odd area, with the pixels of a line of ``centres``, is the
    mask. Pixels that touch at a corner alone are two pieces.
    """
    rings = polygons(mask)
    # Horizontal edges that go right have the mask below them: it is these that a cut upwards meets.
    upper: dict[float, list[tuple[float, int, int]]] = {}
    for number, ring in enumerate(rings):
        for edge in np.flatnonzero(np.roll(ring[:, 0], -1) > ring[:, 0]).tolist():
            x, y = ring[edge].tolist()
            upper.setdefault(y, []).append((x, number, edge))
    for edges in upper.values():
        edges.sort()
    cuts: list[list[tuple[int, float, NDArray[np.float64]]]] = [[] for _ in rings]
    found = []
    # From below: the holes that are joined to a ring come before it.
    for number in reversed(range(len(rings))):
        ring = rings[number]
        # Each corner (x, y), and the pixel inside that it belongs to, within both of its edges.
        corners = np.hstack([ring, ring + _inward(ring) - 0.5])
        pieces, last = [], 0
        for edge, _, points in sorted(cuts[number], key=lambda cut: cut[:2]):
            pieces += [corners[last : edge + 1], points]
            last = edge + 1
        whole = np.concatenate([*pieces, corners[last:]])
        if _area(ring) > 0:
            found.append(whole)
            continue
        x, y = (int(value) for value in ring[0])  # of its corners the topmost, left
        above = np.flatnonzero(~mask[:y, x - 1])
        top = float(above[-1] + 1) if len(above) else 0.0
        edges = upper[top]
        _, other, edge = edges[bisect_right(edges, (x - 0.5, len(rings), 0)) - 1]
        gate = np.array([[x, top, x - 1, top]])
        # There, around the hole to where that began, and back.
        cuts[other].append((edge, float(x), np.concatenate([gate, whole, whole[:1], gate])))
    columns = slice(0, 2) if along == "edges" else slice(2, 4)
    return [whole[:, columns] for whole in reversed(found)]


def _inward(ring: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K, 2): from each corner half a pixel to the right of both its edges, into the mask."""
    ahead = np.sign(np.roll(ring, -1, axis=0) - ring)
    right = np.stack([-ahead[:, 1], ahead[:, 0]], axis=1) / 2
    inward: NDArray[np.float64] = right + np.roll(right, 1, axis=0)
    return inward


def _area(ring: NDArray[np.float64]) -> float:
    x, y = ring.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)
