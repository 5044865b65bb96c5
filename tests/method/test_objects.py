"""Boxes, points, instances and outlines: cases drawn by hand, and what must hold of any mask."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest
import torch

from lpcam.method.objects import Box, Point, boxes, component_boxes, instances, points, polygons
from lpcam.runtime.errors import DataError, LpcamError

TWO = np.array(
    [
        [0.9, 0.2, 0.0, 0.0, 0.0],
        [0.4, 0.0, 0.0, 0.7, 0.6],
        [0.0, 0.0, 0.0, 0.8, 0.6],
        [0.0, 0.0, 0.5, 0.0, 0.0],
    ]
)


def drawn(*rows: str) -> np.ndarray:
    return np.array([[cell == "#" for cell in row] for row in rows])


def filled(rings: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Even-odd rule at the centres of pixels, by counting crossings of a ray to the right."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    inside = np.zeros(shape, dtype=bool)
    for ring in rings:
        for (ax, ay), (bx, by) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            crosses = (np.minimum(ay, by) < y) & (y < np.maximum(ay, by))
            inside ^= crosses & (x < np.where(ay == by, ax, (ax + bx) / 2))
    return inside


def area(ring: np.ndarray) -> float:
    x, y = ring.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def test_boxes_by_hand() -> None:
    assert boxes(TWO, 0.3) == [Box(2, 1, 5, 4, 0.8, 5), Box(0, 0, 1, 2, 0.9, 2)]
    largest, other = boxes(TWO, 0.3, score="mean")
    assert largest.score == pytest.approx((0.7 + 0.6 + 0.8 + 0.6 + 0.5) / 5)
    assert other.score == pytest.approx(0.65)
    assert boxes(TWO, 0.3, connectivity=4)[-1] == Box(2, 3, 3, 4, 0.5, 1)
    assert boxes(TWO, 0.3, minimum_area=3) == [Box(2, 1, 5, 4, 0.8, 5)]


def test_the_threshold_itself_is_background() -> None:
    assert boxes(TWO, 0.9) == []
    assert boxes(TWO, 0.8) == [Box(0, 0, 1, 1, 0.9, 1)]


def test_boxes_alone_are_those_of_the_records() -> None:
    rng = np.random.default_rng(2)
    for share in (0.0, 0.2, 0.4, 0.6):
        mask = rng.random((15, 18)) < share
        expected = [[b.x0, b.y0, b.x1, b.y1] for b in boxes(mask)]
        assert component_boxes(torch.from_numpy(mask)).tolist() == expected


def test_tensors_arrays_and_masks_serve_alike() -> None:
    assert boxes(torch.from_numpy(TWO).requires_grad_(), 0.3) == boxes(TWO, 0.3)
    assert boxes(TWO > 0.3) == [Box(2, 1, 5, 4, 1.0, 5), Box(0, 0, 1, 2, 1.0, 2)]
    assert boxes(np.zeros((0, 4))) == points(np.zeros((0, 4))) == []


def test_records_are_written_as_plain_numbers() -> None:
    found = instances(TWO.astype(np.float32), 0.3)[0].as_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["area"] == 5 and found["peak"] == {"x": 3, "y": 2, "score": pytest.approx(0.8)}


def test_points_by_hand() -> None:
    assert points(TWO, 0.3, distance=1) == [Point(0, 0, 0.9), Point(3, 2, 0.8)]
    assert points(TWO, 0.85, distance=1) == [Point(0, 0, 0.9)]
    assert points(TWO, 0.3, distance=1, most=1) == [Point(0, 0, 0.9)]
    assert points(TWO, 0.3, distance=13**0.5) == [Point(0, 0, 0.9), Point(3, 2, 0.8)]
    assert points(TWO, 0.3, distance=13**0.5 + 0.01) == [Point(0, 0, 0.9)]


def test_a_plateau_has_one_point_and_a_step_of_a_slope_none() -> None:
    plateau = np.zeros((5, 9))
    plateau[1:4, 1:6] = 1.0
    assert points(plateau, distance=1) == [Point(3, 2, 1.0)]
    stairs = np.repeat(np.array([[0.2, 0.5, 0.9]]), 4, axis=1)
    assert points(stairs, distance=1) == [Point(9, 0, 0.9)]
    assert points(np.ones((3, 5)), distance=1) == [Point(2, 1, 1.0)]
    assert points(np.zeros((3, 5)), distance=1) == []


def test_instances_split_a_component_at_its_peaks() -> None:
    x = np.arange(41)
    row = np.maximum(1.0 - np.abs(x - 10) / 20, 0.9 - np.abs(x - 30) / 20)
    plane = np.repeat(row[None], 5, axis=0)
    assert len(boxes(plane, 0.3)) == 1
    first, second = instances(plane, 0.3, distance=5)
    assert (first.peak.x, second.peak.x) == (10, 30)
    # x = 20 is as near to both: it goes to the higher peak
    assert (first.box.x0, first.box.x1) == (0, 21)
    assert (second.box.x0, second.box.x1) == (21, 41)
    assert ((first.mask.astype(int) + second.mask) == (plane > 0.3)).all()
    assert len(instances(plane, 0.3, distance=30)) == 1


def test_near_peaks_of_two_components_stay_apart() -> None:
    plane = np.array([[0.9, 0.8, 0.0, 0.7, 0.5]])
    found = instances(plane, 0.3, distance=10)
    assert [(one.box.x0, one.peak.x) for one in found] == [(0, 0), (3, 3)]


@pytest.mark.parametrize("connectivity", [4, 8])
def test_instances_of_any_map_cover_its_foreground_once(connectivity: Any) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        plane = rng.integers(0, 6, (12, 17)) / 5  # with plateaus
        found = instances(plane, 0.35, distance=2, connectivity=connectivity)
        assert (sum(one.mask.astype(int) for one in found) == (plane > 0.35)).all()
        for one in found:
            assert one.mask[one.peak.y, one.peak.x] and one.box.area == one.mask.sum()
            assert one.box.score == plane[one.mask].max()


def test_outline_of_a_square_with_a_hole() -> None:
    outer, hole = polygons(drawn("....", ".###", ".#.#", ".###"))
    assert outer.tolist() == [[1, 1], [4, 1], [4, 4], [1, 4]]
    assert area(outer) == 9 and area(hole) == -1
    assert sorted(hole.tolist()) == [[2, 2], [2, 3], [3, 2], [3, 3]]


def test_pixels_that_touch_at_a_corner_have_rings_of_their_own() -> None:
    rings = polygons(drawn("#.", ".#"))
    assert [area(ring) for ring in rings] == [1, 1]
    assert rings[1].tolist() == [[1, 1], [2, 1], [2, 2], [1, 2]]


def test_filled_outlines_are_the_mask() -> None:
    rng = np.random.default_rng(1)
    for shape in [(1, 1), (1, 7), (6, 1), (9, 13), (20, 20)]:
        for share in (0.2, 0.5, 0.8, 1.0):
            mask = rng.random(shape) < share
            rings = polygons(torch.from_numpy(mask))
            assert (filled(rings, shape) == mask).all()
            assert sum(area(ring) for ring in rings) == mask.sum()
            for ring in rings:  # no point lies on a straight line between its neighbours
                step = np.roll(ring, -1, axis=0) - ring
                assert ((step == 0).sum(1) == 1).all()
                assert ((step * np.roll(step, 1, axis=0)).sum(1) == 0).all()
    assert polygons(np.zeros((3, 4))) == []


@pytest.mark.parametrize("call", [boxes, points, lambda m: instances(m, 0.5)])
def test_wrong_maps_are_refused(call: Any) -> None:
    with pytest.raises(DataError, match=r"\(2, 3, 4\)"):
        call(np.zeros((2, 3, 4)))
    with pytest.raises(DataError, match="NaN"):
        call(np.array([[0.1, np.nan]]))


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(DataError, match="connectivity is 6"):
        boxes(TWO, 0.3, connectivity=6)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="score is 'sum'"):
        boxes(TWO, 0.3, score="sum")  # type: ignore[arg-type]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    with pytest.raises(LpcamError, match=r"pip install 'lpcam\[objects\]'"):
        boxes(TWO, 0.3)
    assert len(polygons(TWO > 0.3)) > 0
