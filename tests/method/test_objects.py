"""Boxes, points, instances and outlines: cases drawn by hand, and what must hold of any mask."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest
import torch

from lpcam.method.objects import (
    Box,
    Point,
    boxes,
    components,
    instances,
    points,
    polygons,
    separate,
)
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


def bumps(*places: tuple[float, float], size: tuple[int, int] = (40, 80)) -> np.ndarray:
    """Evidence with a round peak of height 1 at each place (y, x)."""
    y, x = np.mgrid[: size[0], : size[1]]
    return sum(np.exp(-((y - v) ** 2 + (x - u) ** 2) / 40) for v, u in places)  # type: ignore[return-value]


def ellipses(*places: tuple[float, float, float, float]) -> np.ndarray:
    y, x = np.mgrid[:40, :80]
    inside = [((y - v) / ry) ** 2 + ((x - u) / rx) ** 2 <= 1 for v, u, ry, rx in places]
    return np.logical_or.reduce(inside)


TOUCHING = ellipses((20, 22, 14, 19), (20, 58, 14, 19))


def test_touching_objects_with_a_peak_each_are_separated_between_the_peaks() -> None:
    assert components(TOUCHING)[1] == 1
    labels, count = separate(TOUCHING, bumps((20, 22), (20, 58)))
    assert count == 2 and ((labels > 0) == TOUCHING).all()
    assert set(labels[:, :40][TOUCHING[:, :40]].tolist()) == {1}
    assert set(labels[:, 41:][TOUCHING[:, 41:]].tolist()) == {2}


@pytest.mark.parametrize("evidence", [bumps((20, 10)), np.zeros((40, 80)), np.ones((40, 80))])
def test_one_object_of_any_length_with_one_peak_or_none_stays_whole(evidence: np.ndarray) -> None:
    long = ellipses((20, 40, 8, 38))
    labels, count = separate(long, evidence)
    assert count == 1 and ((labels == 1) == long).all()


def test_low_and_small_peaks_make_no_object() -> None:
    assert separate(TOUCHING, bumps((20, 22)) + 0.3 * bumps((20, 58)))[1] == 1
    assert separate(TOUCHING, bumps((20, 22)) + 0.8 * bumps((20, 58)))[1] == 2
    speck = np.zeros((40, 80))
    speck[20, 58] = 1.0
    assert separate(TOUCHING, bumps((20, 22)) + speck)[1] == 1


def test_three_in_a_row_are_separated_at_different_heights() -> None:
    three = ellipses((20, 14, 12, 14), (20, 40, 12, 14), (20, 66, 12, 14))
    # between the first two the evidence falls less than between the last two
    evidence = bumps((20, 14), (20, 40), (20, 66)) + 0.4 * (np.arange(80) < 45)
    labels, count = separate(three, evidence)
    assert count == 3 and [int(labels[20, x]) for x in (14, 40, 66)] == [1, 2, 3]


def test_a_near_piece_without_a_peak_belongs_to_the_object_and_a_far_one_does_not() -> None:
    near, far = (
        ellipses((20, 20, 10, 16), (20, 40, 3, 2)),
        ellipses((20, 20, 10, 16), (20, 70, 3, 2)),
    )
    assert components(near)[1] == components(far)[1] == 2
    assert separate(near, bumps((20, 20)))[1] == 1
    assert separate(far, bumps((20, 20)))[1] == 2


def test_the_scale_of_the_evidence_and_its_kind_have_no_effect() -> None:
    evidence = bumps((20, 22), (20, 58))
    expected, _ = separate(TOUCHING, evidence)
    tensor = torch.from_numpy(evidence).requires_grad_()
    for one in (7 * evidence, tensor, tensor.float()):
        labels, count = separate(torch.from_numpy(TOUCHING), one)
        assert count == 2 and labels.dtype == np.int32 and (labels == expected).all()


def test_evidence_of_another_size_is_refused() -> None:
    with pytest.raises(DataError, match=r"\(20, 40\)"):
        separate(TOUCHING, np.zeros((20, 40)))


def test_instances_are_the_separated_objects_by_area() -> None:
    mask = ellipses((20, 22, 12, 19), (20, 58, 14, 19))
    evidence = bumps((20, 24), (20, 60))
    small, large = sorted(instances(0.8 * mask, 0.5, evidence=evidence), key=lambda i: i.box.area)
    assert instances(0.8 * mask, 0.5, evidence=evidence)[0].box == large.box
    assert (small.peak.x, small.peak.y, large.peak.x) == (24, 20, 60)
    assert small.peak.score == pytest.approx(evidence[20, 24]) and small.box.score == 0.8
    assert (small.mask ^ large.mask == mask).all()
    # of a map of one value alone nothing can be separated
    assert len(instances(0.8 * mask, 0.5)) == 1
    assert len(instances(mask * evidence, 0.01)) == 2


def test_instances_of_any_map_cover_its_foreground_once() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        plane = rng.integers(0, 6, (12, 17)) / 5  # with plateaus
        found = instances(plane, 0.35)
        assert (sum(one.mask.astype(int) for one in found) == (plane > 0.35)).all()
        for one in found:
            assert one.mask[one.peak.y, one.peak.x] and one.box.area == one.mask.sum()
            assert one.box.score == one.peak.score == plane[one.mask].max()


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
