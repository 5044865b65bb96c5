"""Outlines without holes: cases drawn by hand, and that readers find the very pixels again."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lpcam.formats.masks.outlines import outlines


def drawn(*rows: str) -> np.ndarray:
    return np.array([[cell == "#" for cell in row] for row in rows])


def crossings(ring: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Even-odd rule at the centres of pixels, for rings along the edges of pixels."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    inside = np.zeros(shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        assert ax == bx or ay == by
        crosses = (np.minimum(ay, by) < y) & (y < np.maximum(ay, by))
        inside ^= crosses & (x < ax)
    return inside


def some_masks() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = [(1, 1), (1, 9), (8, 1), (9, 13), (20, 20), (17, 30)]
    noise = [rng.random(shape) < share for shape in shapes for share in (0.3, 0.6, 0.85, 0.97)]
    coarse = [np.kron(mask, np.ones((3, 2), dtype=bool)) for mask in noise]
    return [mask for mask in noise + coarse if mask.any()]


def test_an_outline_along_edges_and_through_centres() -> None:
    shape = drawn("....", ".##.", ".#..")
    (edges,) = outlines(shape, "edges")
    assert edges.tolist() == [[1, 1], [3, 1], [3, 2], [2, 2], [2, 3], [1, 3]]
    (centres,) = outlines(shape, "centres")
    assert centres.tolist() == [[1, 1], [2, 1], [2, 1], [1, 1], [1, 2], [1, 2]]
    (centres,) = outlines(drawn("..", ".#"), "centres")
    assert centres.tolist() == [[1, 1]] * 4


def test_a_hole_is_cut_open_straight_up() -> None:
    (edges,) = outlines(drawn("###", "#.#", "###"), "edges")
    cut = [[1, 0], [1, 1], [1, 2], [2, 2], [2, 1], [1, 1], [1, 0]]
    assert edges.tolist() == [[0, 0], *cut, [3, 0], [3, 3], [0, 3]]
    (centres,) = outlines(drawn("###", "#.#", "###"), "centres")
    cut = [[0, 0], [0, 0], [0, 2], [2, 2], [2, 0], [0, 0], [0, 0]]
    assert centres.tolist() == [[0, 0], *cut, [2, 0], [2, 2], [0, 2]]


def test_a_hole_below_a_hole_is_joined_to_it() -> None:
    mask = drawn("###", "#.#", "###", "#.#", "###")
    (edges,) = outlines(mask, "edges")
    assert (crossings(edges, mask.shape) == mask).all()
    assert [1, 2] in edges.tolist()  # the upper hole's lower left corner, where the cut ends


def test_pieces_come_in_reading_order() -> None:
    first, second, third = outlines(drawn("..#", "#..", "..#"), "edges")
    assert [first[0].tolist(), second[0].tolist(), third[0].tolist()] == [[2, 0], [0, 1], [2, 2]]
    assert outlines(np.zeros((3, 4), dtype=bool), "edges") == []


def test_the_area_along_edges_is_the_mask_and_the_line_through_centres_stays_within() -> None:
    for mask in some_masks():
        inside = np.zeros(mask.shape, dtype=int)
        for ring in outlines(mask, "edges"):
            inside += crossings(ring, mask.shape)
        assert (inside == mask).all()
        for ring in outlines(mask, "centres"):
            points = ring.astype(int)
            for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
                assert ax == bx or ay == by
                assert mask[min(ay, by) : max(ay, by) + 1, min(ax, bx) : max(ax, bx) + 1].all()


def test_opencv_and_pillow_find_the_mask() -> None:
    cv2 = pytest.importorskip("cv2")
    for mask in some_masks():
        found = np.zeros(mask.shape, dtype=np.uint8)
        drawing = Image.new("1", mask.shape[::-1])
        for ring in outlines(mask, "centres"):
            assert len(ring) >= 3
            cv2.fillPoly(found, [ring.astype(np.int32)], 1)
            ImageDraw.Draw(drawing).polygon([(x, y) for x, y in ring], fill=1, outline=1)
        assert (found == mask).all()
        assert (np.asarray(drawing) == mask).all()
