"""The bundled procedural data set: invented creatures whose heads, and only heads, tell the class.

It rebuilds in miniature what makes class activation maps (CAM) fall short on photographs:

- the *head* is the discriminative part: each of the eight classes has its own;
- the *torso* is shared by the classes of a group (three groups), so it is weak evidence;
- *legs* and *tail* are the same for every class, so a classifier can do without them;
- some *grounds* co-occur with a class (rails with trains, so to speak), so they are false evidence.

Every image comes with a class mask and a part mask, which are for evaluation only. Everything is
drawn with Pillow and NumPy from one seed: the same seed gives the same bytes for the same versions
of the two libraries.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from lpcam.runtime.errors import DataError

CLASSES: tuple[str, ...] = (
    "spirehorn",
    "fanear",
    "crestling",
    "moonface",
    "branchbuck",
    "shovelbill",
    "petalmane",
    "stalkeye",
)
"""Class names in mask-id order; the first has mask id 1."""


PARTS: dict[str, int] = {"head": 1, "torso": 2, "legs": 3, "tail": 4}
"""Values of the part masks; 0 is no part."""


GROUPS: tuple[int, ...] = (0, 1, 2, 0, 1, 2, 0, 1)
"""Torso group of each class: 0 spots, 1 stripes, 2 scales."""


COMPANIONS: dict[int, str] = {0: "bricks", 2: "reeds", 4: "ripples", 7: "pebbles"}
"""Grounds that co-occur with a class (by label index): the rail of the train."""


COMPANION_PROBABILITY = 0.6
"""Chance that an image with such a class stands on its companion ground."""


OVERSAMPLING = 3
"""Shapes are drawn this much larger and averaged down, which makes their edges smooth."""


Colour = tuple[int, int, int]


Point = tuple[float, float]


_INK: Colour = (52, 44, 60)


_CREAM: Colour = (250, 238, 214)


_STOCKING: Colour = (78, 88, 140)


_HOOF: Colour = (48, 46, 66)


_TUFT: Colour = (226, 110, 70)


# --------------------------------------------------------------------------------------------------
# Geometry: lists of points in a creature's own frame (x forward, y down, torso length about 1)
# --------------------------------------------------------------------------------------------------
def _ellipse(
    x: float, y: float, rx: float, ry: float, turn: float = 0.0, count: int = 36
) -> list[Point]:
    angles = np.linspace(0.0, 2.0 * math.pi, count, endpoint=False)
    c, s = math.cos(turn), math.sin(turn)
    return [
        (
            x + rx * math.cos(a) * c - ry * math.sin(a) * s,
            y + rx * math.cos(a) * s + ry * math.sin(a) * c,
        )
        for a in angles
    ]


def _curve(start: Point, bend: Point, end: Point, count: int = 12) -> list[Point]:
    """Points of a quadratic Bézier curve."""
    return [
        (
            (1 - t) ** 2 * start[0] + 2 * t * (1 - t) * bend[0] + t * t * end[0],
            (1 - t) ** 2 * start[1] + 2 * t * (1 - t) * bend[1] + t * t * end[1],
        )
        for t in np.linspace(0.0, 1.0, count).tolist()
    ]


def _ribbon(line: Sequence[Point], first: float, last: float) -> list[Point]:
    """Outline of a line whose width goes from ``first`` to ``last``."""
    left: list[Point] = []
    right: list[Point] = []
    for i, (x, y) in enumerate(line):
        before, after = line[max(i - 1, 0)], line[min(i + 1, len(line) - 1)]
        dx, dy = after[0] - before[0], after[1] - before[1]
        length = math.hypot(dx, dy) or 1.0
        half = 0.5 * (first + (last - first) * i / (len(line) - 1))
        left.append((x - dy / length * half, y + dx / length * half))
        right.append((x + dy / length * half, y - dx / length * half))
    return left + right[::-1]


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    """Colour between ``a`` (share 0) and ``b`` (share 1)."""
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b, strict=True))  # type: ignore[return-value]


def _vary(colour: Colour, rng: np.random.Generator, amount: float = 12.0) -> Colour:
    light = rng.normal(0.0, amount)
    tint = rng.normal(0.0, amount / 3.0, 3)
    return tuple(int(np.clip(c + light + t, 0, 255)) for c, t in zip(colour, tint, strict=True))  # type: ignore[return-value]


# --------------------------------------------------------------------------------------------------
# The sheet that is drawn on
# --------------------------------------------------------------------------------------------------
class _Sheet:
    """A picture and its two index masks, drawn together at ``OVERSAMPLING`` times the size."""

    def __init__(self, picture: Image.Image) -> None:
        self.picture = picture
        self.classes = Image.new("L", picture.size, 0)
        self.parts = Image.new("L", picture.size, 0)

    def finish(self) -> tuple[Image.Image, Image.Image, Image.Image]:
        """Picture averaged down; masks taken at the pixel centres, so that no ids are blended."""
        centre = OVERSAMPLING // 2
        step = OVERSAMPLING
        masks = [
            Image.fromarray(np.ascontiguousarray(np.asarray(m)[centre::step, centre::step]))
            for m in (self.classes, self.parts)
        ]
        return self.picture.reduce(step), masks[0], masks[1]


@dataclass
class _Creature:
    """Draws shapes given in the creature's frame onto a sheet."""

    sheet: _Sheet
    mask_id: int
    centre: Point
    scale: float
    mirrored: bool
    tilt: float
    rng: np.random.Generator

    def place(self, points: Iterable[Point]) -> list[Point]:
        c, s = math.cos(self.tilt), math.sin(self.tilt)
        sign = -1.0 if self.mirrored else 1.0
        return [
            (
                self.centre[0] + sign * self.scale * (x * c - y * s),
                self.centre[1] + self.scale * (x * s + y * c),
            )
            for x, y in points
        ]

    def shape(
        self,
        points: Sequence[Point],
        colour: Colour,
        part: str,
        *,
        outline: float = 0.035,
        shade: float = 0.1,
        texture: Callable[[ImageDraw.ImageDraw, Callable[[Iterable[Point]], list[Point]]], None]
        | None = None,
    ) -> None:
        """One closed shape: fill, texture inside it, a shaded lower rim, an ink outline."""
        placed = self.place(points)
        width, height = self.sheet.picture.size
        pad = max(2, round(outline * self.scale))
        left = max(0, math.floor(min(p[0] for p in placed)) - pad)
        top = max(0, math.floor(min(p[1] for p in placed)) - pad)
        right = min(width, math.ceil(max(p[0] for p in placed)) + pad + 1)
        bottom = min(height, math.ceil(max(p[1] for p in placed)) + pad + 1)
        if right <= left or bottom <= top:
            return
        size = (right - left, bottom - top)

        def move(some: Iterable[Point]) -> list[Point]:
            return [(x - left, y - top) for x, y in some]

        mask = Image.new("L", size, 0)
        ImageDraw.Draw(mask).polygon(move(placed), fill=255)
        fill = Image.new("RGB", size, colour)
        if texture is not None:
            texture(ImageDraw.Draw(fill), lambda some: move(self.place(some)))
        if shade > 0:
            # What a copy of the shape moved up does not cover is the rim away from the light.
            lifted = Image.new("L", size, 0)
            offset = round(shade * self.scale)
            lifted.paste(mask, (0, -offset))
            rim = ImageChops.subtract(mask, lifted).filter(ImageFilter.BoxBlur(offset / 3))
            fill.paste(_mix(colour, _INK, 0.45), (0, 0), rim.point(lambda v: v * 0.55))
        self.sheet.picture.paste(fill, (left, top), mask)
        ink = max(1, round(outline * self.scale)) if outline > 0 else 0
        ring = placed + placed[:2]
        targets: list[tuple[Image.Image, Colour | int]] = [
            (self.sheet.picture, _mix(colour, _INK, 0.8)),
            (self.sheet.classes, self.mask_id),
            (self.sheet.parts, PARTS[part]),
        ]
        for image, value in targets:
            draw = ImageDraw.Draw(image)
            if image is not self.sheet.picture:
                draw.polygon(placed, fill=value)
            if ink:
                draw.line(ring, fill=value, width=ink, joint="curve")

    def mark(self, points: Sequence[Point], colour: Colour) -> None:
        """A flat detail on a shape already drawn (an eye, a nostril)."""
        ImageDraw.Draw(self.sheet.picture).polygon(self.place(points), fill=colour)

    def stroke(self, line: Sequence[Point], colour: Colour, width: float) -> None:
        """A thin line on a shape already drawn (a mouth)."""
        ImageDraw.Draw(self.sheet.picture).line(
            self.place(line), fill=colour, width=max(1, round(width * self.scale)), joint="curve"
        )


Texture = Callable[[ImageDraw.ImageDraw, Callable[[Iterable[Point]], list[Point]]], None]


# --------------------------------------------------------------------------------------------------
# Parts that classes share
# --------------------------------------------------------------------------------------------------
def _spots(colour: Colour, rng: np.random.Generator) -> Texture:
    blobs = [
        _ellipse(x, y, r, r * 0.85, count=12)
        for x, y, r in zip(
            rng.uniform(-0.75, 0.85, 44),
            rng.uniform(-0.6, 0.45, 44),
            rng.uniform(0.035, 0.085, 44),
            strict=True,
        )
    ]

    def texture(draw: ImageDraw.ImageDraw, place: Callable[[Iterable[Point]], list[Point]]) -> None:
        for blob in blobs:
            draw.polygon(place(blob), fill=colour)

    return texture


def _stripes(colour: Colour, rng: np.random.Generator) -> Texture:
    start, gap, lean = rng.uniform(-0.9, -0.75), rng.uniform(0.15, 0.19), rng.uniform(-0.12, 0.12)
    bands = [
        _ribbon(_curve((x, -0.75), (x + 0.12, -0.1), (x + lean, 0.55)), 0.085, 0.045)
        for x in np.arange(start, 1.1, gap).tolist()
    ]

    def texture(draw: ImageDraw.ImageDraw, place: Callable[[Iterable[Point]], list[Point]]) -> None:
        for band in bands:
            draw.polygon(place(band), fill=colour)

    return texture


def _scales(colour: Colour, rng: np.random.Generator) -> Texture:
    size = rng.uniform(0.13, 0.16)
    rows: list[list[Point]] = []
    for row in range(12):
        for column in range(16):
            x = -0.95 + (column + 0.5 * (row % 2)) * size
            y = -0.75 + row * size * 0.8
            rows.append(_curve((x, y), (x + size / 2, y + size * 1.5), (x + size, y), 6))

    def texture(draw: ImageDraw.ImageDraw, place: Callable[[Iterable[Point]], list[Point]]) -> None:
        for line in rows:
            placed = place(line)
            span = math.dist(placed[0], placed[-1])
            draw.line(placed, fill=colour, width=max(2, round(span * 0.2)))

    return texture


_TORSOS: tuple[tuple[Colour, Colour, Callable[[Colour, np.random.Generator], Texture]], ...] = (
    ((238, 186, 104), (168, 100, 52), _spots),
    ((116, 190, 176), (36, 104, 112), _stripes),
    ((222, 150, 182), (146, 66, 116), _scales),
)


def _bands(line: Sequence[Point], colour: Colour, width: float, count: int) -> Texture:
    """Stripes across a leg or a tail: the stockings that every creature wears."""

    def texture(draw: ImageDraw.ImageDraw, place: Callable[[Iterable[Point]], list[Point]]) -> None:
        last = len(line) - 1
        for band in range(count):
            at = (band + 0.5) / count * last
            i = min(int(at), last - 1)
            (x0, y0), (x1, y1) = line[i], line[i + 1]
            share = at - i
            x, y = x0 + (x1 - x0) * share, y0 + (y1 - y0) * share
            length = math.hypot(x1 - x0, y1 - y0) or 1.0
            nx, ny = -(y1 - y0) / length * width, (x1 - x0) / length * width
            tx, ty = (x1 - x0) / length * 0.028, (y1 - y0) / length * 0.028
            draw.polygon(
                place(
                    [
                        (x + nx - tx, y + ny - ty),
                        (x - nx - tx, y - ny - ty),
                        (x - nx + tx, y - ny + ty),
                        (x + nx + tx, y + ny + ty),
                    ]
                ),
                fill=colour,
            )

    return texture


def _leg(creature: _Creature, hip: Point, length: float, swing: float, *, far: bool) -> None:
    colour = _mix(_STOCKING, _INK, 0.3) if far else _vary(_STOCKING, creature.rng, 8)
    band = _mix(_CREAM, _INK, 0.3) if far else _CREAM
    foot = (hip[0] + swing, hip[1] + length)
    knee = (hip[0] + swing * 0.2 + 0.07, hip[1] + length * 0.5)
    line = _curve(hip, knee, foot)
    creature.shape(
        _ribbon(line, 0.25, 0.16), colour, "legs", texture=_bands(line, band, 0.2, 4), shade=0.0
    )
    hoof = [
        (foot[0] - 0.1, foot[1] + 0.07),
        (foot[0] - 0.08, foot[1] - 0.05),
        (foot[0] + 0.08, foot[1] - 0.05),
        (foot[0] + 0.17, foot[1] + 0.07),
    ]
    creature.shape(hoof, _HOOF, "legs", shade=0.0)


def _tail(creature: _Creature) -> None:
    rng = creature.rng
    root = (-0.5, -0.12)
    tip = (-0.84 + rng.uniform(-0.08, 0.08), -0.52 + rng.uniform(-0.15, 0.25))
    line = _curve(root, (-0.95, 0.05 + rng.uniform(-0.2, 0.15)), tip, 16)
    colour = _vary(_STOCKING, rng, 8)
    creature.shape(
        _ribbon(line, 0.22, 0.13), colour, "tail", texture=_bands(line, _CREAM, 0.2, 6), shade=0.0
    )
    turn = math.atan2(tip[1] - line[-3][1], tip[0] - line[-3][0])
    c, s = math.cos(turn), math.sin(turn)
    flame = [(-0.06, -0.08), (0.1, -0.15), (0.32, 0.0), (0.1, 0.15), (-0.06, 0.08)]
    creature.shape(
        [(tip[0] + x * c - y * s, tip[1] + x * s + y * c) for x, y in flame],
        _vary(_TUFT, rng, 8),
        "tail",
        shade=0.04,
    )


def _torso(creature: _Creature, group: int, head: Point) -> None:
    rng = creature.rng
    base, second, pattern = _TORSOS[group]
    base, second = _vary(base, rng), _vary(second, rng)
    texture = pattern(second, rng)
    belly = rng.uniform(0.33, 0.42)
    neck = _ribbon(_curve((0.28, -0.05), (0.5, -0.12), head), 0.42, 0.26)
    creature.shape(neck, base, "torso", texture=texture, shade=0.0)
    body = _ellipse(0.0, 0.0, 0.61, belly, 0.0, 48)
    # A back that is flatter than the belly reads as an animal, not as an egg.
    body = [(x, y * (0.85 if y < 0 else 1.05)) for x, y in body]
    creature.shape(body, base, "torso", texture=texture, shade=0.13)


# --------------------------------------------------------------------------------------------------
# Heads: what tells the class. Each draws around (0, 0) with radius about 1, facing +x.
# --------------------------------------------------------------------------------------------------
class _Head:
    """Draws in the head's frame; the frame sits at ``at`` in the creature's."""

    def __init__(self, creature: _Creature, at: Point, size: float, nod: float) -> None:
        self.creature, self.at, self.size, self.nod = creature, at, size, nod

    def place(self, points: Iterable[Point]) -> list[Point]:
        c, s = math.cos(self.nod) * self.size, math.sin(self.nod) * self.size
        return [(self.at[0] + x * c - y * s, self.at[1] + x * s + y * c) for x, y in points]

    def shape(self, points: Sequence[Point], colour: Colour, *, shade: float = 0.05) -> None:
        self.creature.shape(self.place(points), colour, "head", shade=shade)

    def mark(self, points: Sequence[Point], colour: Colour) -> None:
        self.creature.mark(self.place(points), colour)

    def stroke(self, line: Sequence[Point], colour: Colour, width: float = 0.11) -> None:
        self.creature.stroke(self.place(line), colour, width * self.size)

    def eye(self, x: float, y: float, r: float = 0.24) -> None:
        self.mark(_ellipse(x, y, r * 1.15, r * 1.25, count=20), _INK)
        self.mark(_ellipse(x, y, r, r * 1.1, count=20), (255, 255, 255))
        self.mark(_ellipse(x + r * 0.3, y + r * 0.1, r * 0.6, r * 0.7, count=20), _INK)
        self.mark(_ellipse(x + r * 0.45, y - r * 0.25, r * 0.22, r * 0.22, count=10), (255,) * 3)


def _spirehorn(head: _Head, colour: Colour) -> None:
    horn = [(0.15, -0.75), (0.75, -2.3), (0.65, -0.55)]
    head.shape(horn, (255, 216, 92), shade=0.0)
    for t in (0.25, 0.5, 0.75):
        left = (0.15 + 0.6 * t, -0.75 - 1.55 * t)
        right = (0.65 + 0.1 * t, -0.55 - 1.75 * t)
        head.stroke([left, (right[0], right[1] + 0.18)], (186, 120, 40), 0.12)
    head.shape([(-0.75, -0.5), (-0.75, -1.45), (-0.1, -0.8)], colour, shade=0.0)
    head.shape(_ellipse(0.0, 0.0, 0.98, 0.92), colour)
    head.shape(_ellipse(0.85, 0.35, 0.62, 0.5, 0.3), _mix(colour, _CREAM, 0.6))
    head.mark(_ellipse(1.1, 0.28, 0.09, 0.12, count=10), _INK)
    head.stroke(_curve((0.65, 0.6), (0.95, 0.75), (1.25, 0.55), 6), _INK)
    head.eye(0.25, -0.25)


def _fanear(head: _Head, colour: Colour) -> None:
    inner = _mix(colour, (255, 205, 190), 0.75)
    for x, y, turn in ((0.75, -1.05, 0.5), (-0.85, -0.7, -0.5)):
        head.shape(_ellipse(x, y, 0.85, 1.05, turn), colour)
        head.mark(_ellipse(x, y, 0.55, 0.72, turn, 24), inner)
    head.shape(_ellipse(0.0, 0.0, 0.95, 0.92), colour)
    trunk = _curve((0.6, 0.2), (1.3, 0.5), (1.15, 1.35))
    head.shape(_ribbon(trunk, 0.62, 0.36), colour)
    for x, y in trunk[3:-1:2]:
        head.stroke([(x - 0.18, y + 0.05), (x + 0.14, y - 0.08)], _mix(colour, _INK, 0.5), 0.07)
    head.eye(0.25, -0.2)


def _crestling(head: _Head, colour: Colour) -> None:
    crest = [(-1.15, 0.1)]
    for i, a in enumerate(np.linspace(math.pi * 1.02, math.pi * 1.68, 9).tolist()):
        r = 1.85 if i % 2 else 1.05
        crest.append((r * math.cos(a), r * math.sin(a)))
    crest.append((0.3, -0.5))
    head.shape(crest, (224, 58, 52))
    head.shape([(0.6, -0.35), (1.7, 0.15), (0.6, 0.55)], (250, 178, 52), shade=0.0)
    head.shape(_ellipse(0.0, 0.0, 0.98, 0.95), colour)
    head.mark(_ellipse(0.1, 0.5, 0.3, 0.18, count=16), (244, 124, 92))
    head.eye(0.4, -0.15, 0.28)


def _moonface(head: _Head, colour: Colour) -> None:
    for x in (-0.75, 0.75):
        head.shape(_ellipse(x, -0.85, 0.42, 0.42), _mix(_INK, colour, 0.1), shade=0.0)
    head.shape(_ellipse(0.05, 0.0, 1.2, 1.08), colour)
    for x, turn in ((-0.42, -0.5), (0.55, 0.5)):
        head.mark(_ellipse(x, -0.12, 0.36, 0.46, turn, 24), (66, 60, 92))
        head.eye(x + 0.03, -0.15, 0.2)
    head.mark(_ellipse(0.08, 0.35, 0.17, 0.12, count=14), _INK)
    head.stroke(_curve((-0.25, 0.55), (0.08, 0.85), (0.41, 0.55), 8), _INK)


def _branchbuck(head: _Head, colour: Colour) -> None:
    horn = (120, 80, 58)
    for base, lean in ((0.35, 0.55), (-0.35, -0.45)):
        stem = _curve((base, -0.6), (base + lean * 0.3, -1.4), (base + lean, -2.15))
        for i, out in ((6, 0.62), (8, -0.52)):
            x, y = stem[i]
            head.shape(_ribbon([(x, y), (x + out, y - 0.45)], 0.22, 0.14), horn, shade=0.0)
        head.shape(_ribbon(stem, 0.28, 0.16), horn, shade=0.0)
    head.shape(_ellipse(-0.9, -0.3, 0.5, 0.24, 0.4), colour, shade=0.0)
    head.shape(_ellipse(0.0, 0.0, 0.9, 0.92), colour)
    head.shape(_ellipse(0.7, 0.42, 0.66, 0.5, 0.25), _mix(colour, _CREAM, 0.65))
    head.mark(_ellipse(1.22, 0.3, 0.25, 0.22, count=20), (214, 48, 56))
    head.mark(_ellipse(1.28, 0.22, 0.08, 0.06, count=10), (255, 190, 180))
    head.eye(0.25, -0.25)


def _shovelbill(head: _Head, colour: Colour) -> None:
    bill = (250, 140, 44)
    tuft = [(-0.35, -0.75), (-0.55, -1.5), (-0.1, -1.15), (0.1, -1.65), (0.25, -0.75)]
    head.shape(tuft, colour, shade=0.0)
    lower = [(0.5, 0.25), *_curve((0.6, 0.75), (1.6, 1.0), (2.1, 0.55)), (0.9, 0.1)]
    head.shape(lower, _mix(bill, _INK, 0.25), shade=0.0)
    head.shape(_ellipse(0.0, 0.0, 0.98, 0.95), colour)
    upper = [(0.55, -0.25), *_curve((0.6, -0.35), (1.3, -0.1), (2.3, 0.15)), (2.3, 0.5), (0.6, 0.5)]
    head.shape(upper, bill)
    head.mark(_ellipse(1.05, 0.02, 0.1, 0.07, count=10), _mix(bill, _INK, 0.6))
    head.eye(0.3, -0.35, 0.27)


def _petalmane(head: _Head, colour: Colour) -> None:
    petal = (198, 54, 84)
    for ring, (distance, r) in enumerate(((1.05, 0.5), (0.85, 0.42))):
        shade = petal if ring == 0 else _mix(petal, (255, 170, 120), 0.4)
        for a in np.linspace(0.0, 2 * math.pi, 11, endpoint=False).tolist():
            b = a + 0.28 * ring
            x, y = distance * math.cos(b), distance * math.sin(b)
            head.shape(_ellipse(x, y, r, r * 0.62, b, 16), shade, shade=0.0)
    head.shape(_ellipse(0.0, 0.0, 0.86, 0.84), colour)
    head.mark(_ellipse(0.3, 0.3, 0.4, 0.32, count=20), _mix(colour, _CREAM, 0.7))
    head.mark(_ellipse(0.36, 0.14, 0.16, 0.12, count=14), _INK)
    head.stroke(_curve((0.1, 0.4), (0.36, 0.6), (0.62, 0.4), 6), _INK)
    head.eye(-0.14, -0.2, 0.2)
    head.eye(0.52, -0.2, 0.2)


def _stalkeye(head: _Head, colour: Colour) -> None:
    for x, lean in ((-0.3, -0.55), (0.45, 0.6)):
        stem = _curve((x, -0.5), (x, -1.1), (x + lean, -1.5))
        head.shape(_ribbon(stem, 0.34, 0.26), colour, shade=0.0)
        head.shape(_ellipse(x + lean, -1.6, 0.46, 0.46), _mix(colour, _CREAM, 0.35), shade=0.0)
        head.eye(x + lean, -1.6, 0.32)
    head.shape(_ellipse(0.1, 0.05, 1.1, 0.8), colour)
    head.stroke(_curve((0.1, 0.3), (0.65, 0.55), (1.0, 0.05), 8), _INK, 0.12)
    for x, y in ((-0.5, -0.05), (-0.3, 0.3), (-0.72, 0.22)):
        head.mark(_ellipse(x, y, 0.11, 0.11, count=12), _mix(colour, (255, 244, 120), 0.7))


_HEADS: tuple[tuple[Callable[[_Head, Colour], None], Colour], ...] = (
    (_spirehorn, (170, 142, 226)),
    (_fanear, (240, 128, 116)),
    (_crestling, (132, 196, 76)),
    (_moonface, (250, 244, 230)),
    (_branchbuck, (196, 124, 66)),
    (_shovelbill, (252, 214, 74)),
    (_petalmane, (255, 196, 92)),
    (_stalkeye, (64, 150, 216)),
)


# --------------------------------------------------------------------------------------------------
# Grounds
# --------------------------------------------------------------------------------------------------
def _ground_meadow(draw: ImageDraw.ImageDraw, size: int, rng: np.random.Generator) -> None:
    unit = size / 100
    for y in np.sort(rng.uniform(0, 104, 330)).tolist():
        x, h, lean = rng.uniform(-2, 102), rng.uniform(5, 10), rng.uniform(-3, 3)
        colour = _mix((108, 150, 92), (196, 212, 140), float(rng.uniform()))
        blade = [(x - 1.0, y), (x + lean, y - h), (x + 1.0, y)]
        draw.polygon([(a * unit, b * unit) for a, b in blade], fill=colour)


def _ground_bricks(draw: ImageDraw.ImageDraw, size: int, rng: np.random.Generator) -> None:
    unit = size / 100
    height, width = rng.uniform(9, 11), rng.uniform(20, 24)
    shift = rng.uniform(0, 20)
    for row in range(13):
        for column in range(-1, 7):
            x = column * width + (row % 2) * width / 2 - shift
            y = row * height - shift / 4
            colour = _mix((190, 138, 120), (222, 176, 152), float(rng.uniform()))
            box = (x * unit, y * unit, (x + width - 1.4) * unit, (y + height - 1.4) * unit)
            draw.rounded_rectangle(box, radius=1.2 * unit, fill=colour)


def _ground_reeds(draw: ImageDraw.ImageDraw, size: int, rng: np.random.Generator) -> None:
    unit = size / 100
    for _ in range(46):
        x, lean = rng.uniform(-4, 104), rng.uniform(-7, 7)
        top = rng.uniform(-8, 50)
        colour = _mix((120, 140, 96), (184, 186, 118), float(rng.uniform()))
        line = _curve((x, 104.0), (x, 50.0), (x + lean, top), 8)
        draw.line([(a * unit, b * unit) for a, b in line], fill=colour, width=round(2.0 * unit))
        if rng.uniform() < 0.45:
            tip = _ellipse(x + lean, top, 1.8, 5.5, 0.0, 14)
            draw.polygon([(a * unit, b * unit) for a, b in tip], fill=(140, 104, 78))


def _ground_ripples(draw: ImageDraw.ImageDraw, size: int, rng: np.random.Generator) -> None:
    unit = size / 100
    phase, tall = rng.uniform(0, 6), rng.uniform(1.2, 2.2)
    for row in range(-1, 17):
        colour = _mix((146, 186, 214), (204, 226, 238), float(rng.uniform()))
        line = [
            (x * unit, (row * 6.4 + tall * math.sin(x / 5.5 + phase + row * 1.3)) * unit)
            for x in range(-2, 104, 2)
        ]
        draw.line(line, fill=colour, width=round(2.2 * unit), joint="curve")


def _ground_pebbles(draw: ImageDraw.ImageDraw, size: int, rng: np.random.Generator) -> None:
    unit = size / 100
    for _ in range(230):
        x, y, r = rng.uniform(-3, 103), rng.uniform(-3, 103), rng.uniform(2.2, 5.0)
        colour = _mix((150, 148, 150), (214, 208, 200), float(rng.uniform()))
        stone = _ellipse(x, y, r, r * 0.75, rng.uniform(0, 3), 14)
        draw.polygon([(a * unit, b * unit) for a, b in stone], fill=colour, outline=(128, 124, 128))


def _ground_planks(draw: ImageDraw.ImageDraw, size: int, rng: np.random.Generator) -> None:
    unit = size / 100
    width = rng.uniform(13, 18)
    x = -rng.uniform(0, 10)
    while x < 102:
        colour = _mix((196, 172, 140), (222, 202, 170), float(rng.uniform()))
        draw.rectangle((x * unit, 0, (x + width - 1) * unit, size), fill=colour)
        for _ in range(5):
            a, y, length = x + rng.uniform(2, width - 2), rng.uniform(-20, 100), rng.uniform(12, 40)
            line = [(a * unit, y * unit), ((a + rng.normal(0, 0.5)) * unit, (y + length) * unit)]
            draw.line(line, fill=_mix(colour, (140, 104, 74), 0.4), width=max(1, round(0.7 * unit)))
        x += width


def _ground_dunes(draw: ImageDraw.ImageDraw, size: int, rng: np.random.Generator) -> None:
    unit = size / 100
    for row in range(9):
        y, phase, tall = row * 12.5 - 4 + rng.normal(0, 1.5), rng.uniform(0, 6), rng.uniform(2, 5)
        colour = _mix(
            (240, 222, 182), (214, 184, 142), (row % 2) * 0.6 + float(rng.uniform(0, 0.4))
        )
        ridge = [
            (x * unit, (y + tall * math.sin(x / 14 + phase)) * unit) for x in range(-4, 106, 4)
        ]
        draw.polygon([*ridge, (size, size), (0, size)], fill=colour)


def _ground_tiles(draw: ImageDraw.ImageDraw, size: int, rng: np.random.Generator) -> None:
    unit = size / 100
    side = rng.uniform(12, 16)
    shift = rng.uniform(0, 10)
    dark, light = _vary((186, 196, 214), rng, 6), _vary((226, 228, 236), rng, 6)
    for row in range(-1, 10):
        for column in range(-1, 10):
            x, y = column * side - shift, row * side - shift
            box = (x * unit, y * unit, (x + side) * unit, (y + side) * unit)
            draw.rectangle(box, fill=dark if (row + column) % 2 else light)


def _ground_snow(draw: ImageDraw.ImageDraw, size: int, rng: np.random.Generator) -> None:
    unit = size / 100
    for _ in range(90):
        x, y, r = rng.uniform(0, 100), rng.uniform(0, 100), rng.uniform(0.8, 2.4)
        draw.ellipse(
            [(x - r) * unit, (y - r) * unit, (x + r) * unit, (y + r) * unit], (238, 242, 250)
        )


_GROUNDS: dict[
    str, tuple[Colour, Callable[[ImageDraw.ImageDraw, int, np.random.Generator], None]]
] = {
    "meadow": ((150, 184, 116), _ground_meadow),
    "bricks": ((226, 212, 196), _ground_bricks),
    "reeds": ((214, 220, 184), _ground_reeds),
    "ripples": ((176, 208, 228), _ground_ripples),
    "pebbles": ((172, 168, 166), _ground_pebbles),
    "planks": ((164, 136, 106), _ground_planks),
    "dunes": ((244, 230, 196), _ground_dunes),
    "tiles": ((206, 212, 224), _ground_tiles),
    "snow": ((200, 214, 232), _ground_snow),
}


# --------------------------------------------------------------------------------------------------
# One image, and the set
# --------------------------------------------------------------------------------------------------
def _creature(
    sheet: _Sheet, label: int, centre: Point, scale: float, rng: np.random.Generator
) -> None:
    creature = _Creature(
        sheet,
        label + 1,
        centre,
        scale,
        bool(rng.uniform() < 0.5),
        float(rng.normal(0.0, 0.07)),
        rng,
    )
    foot = creature.place([(0.0, 0.72)])[0]
    shadow = Image.new("L", sheet.picture.size, 0)
    ImageDraw.Draw(shadow).ellipse(
        (
            foot[0] - 0.75 * scale,
            foot[1] - 0.1 * scale,
            foot[0] + 0.75 * scale,
            foot[1] + 0.1 * scale,
        ),
        fill=80,
    )
    sheet.picture.paste(_INK, (0, 0), shadow)
    length = rng.uniform(0.52, 0.6)
    stride = rng.uniform(-0.14, 0.14)
    _tail(creature)
    _leg(creature, (-0.24, 0.12), length, -stride, far=True)
    _leg(creature, (0.42, 0.1), length, stride, far=True)
    at = (0.68 + rng.uniform(-0.04, 0.06), -0.44 + rng.uniform(-0.08, 0.1))
    _torso(creature, GROUPS[label], at)
    _leg(creature, (-0.38, 0.16), length, stride, far=False)
    _leg(creature, (0.27, 0.16), length, -stride, far=False)
    draw, colour = _HEADS[label]
    head = _Head(creature, at, float(rng.uniform(0.235, 0.28)), float(rng.normal(0.0, 0.12)))
    draw(head, _vary(colour, rng, 8))


def _labels(rng: np.random.Generator) -> tuple[int, ...]:
    """One creature (three images of five) or two; two are of different classes."""
    count = 1 if rng.uniform() < 0.6 else 2
    return tuple(int(v) for v in rng.choice(len(CLASSES), size=count, replace=False))


def _draw(size: int, rng: np.random.Generator) -> tuple[_Sheet, tuple[int, ...]]:
    labels = _labels(rng)
    large = size * OVERSAMPLING
    companions = [COMPANIONS[n] for n in labels if n in COMPANIONS]
    if companions and rng.uniform() < COMPANION_PROBABILITY:
        ground = companions[int(rng.integers(len(companions)))]
    else:
        ground = list(_GROUNDS)[int(rng.integers(len(_GROUNDS)))]
    base, paint = _GROUNDS[ground]
    picture = Image.new("RGB", (large, large), _vary(base, rng, 8))
    paint(ImageDraw.Draw(picture), large, rng)
    sheet = _Sheet(picture)
    if len(labels) == 1:
        scale = rng.uniform(0.36, 0.52) * large
        places = [(rng.uniform(0.46, 0.54) * large, rng.uniform(0.51, 0.57) * large, scale)]
    else:
        places = []
        down = rng.permutation(2)
        for i in range(2):
            scale = rng.uniform(0.27, 0.34) * large
            across = (0.31 if i == 0 else 0.69) + rng.uniform(-0.05, 0.05)
            along = (0.34 if down[i] == 0 else 0.72) + rng.uniform(-0.05, 0.05)
            places.append((across * large, along * large, scale))
    # The one that stands lower in the picture is nearer and is drawn last.
    for i in sorted(range(len(labels)), key=lambda k: places[k][1]):
        x, y, scale = places[i]
        _creature(sheet, labels[i], (x, y), scale, rng)
    return sheet, labels


def _light(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A slope of light over the picture and fine grain, so that no two grounds are the same."""
    width, height = picture.size
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0.0, 0.14)
    y, x = np.mgrid[0:height, 0:width] / max(width, height) - 0.5
    slope = 1.0 + strength * (math.cos(angle) * x + math.sin(angle) * y) + rng.normal(0.0, 0.03)
    grain = rng.normal(0.0, 2.5, (height, width, 1))
    values = np.asarray(picture, dtype=np.float64) * slope[:, :, None] + grain
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _palette() -> list[int]:
    """Colours of the index masks, only for looking at them: black, then the head colours."""
    colours: list[int] = [0, 0, 0]
    for _, colour in _HEADS:
        colours += list(colour)
    return colours + [0] * (768 - len(colours))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def _index_png(mask: Image.Image) -> bytes:
    indexed = mask.copy()
    indexed.putpalette(_palette())
    return _png(indexed)


def write(folder: Path, *, images: int, size: int, seed: int) -> None:
    """Write the demo set in the layout of a user's own folder.

    The folder gets ``images/NAME.png`` (RGB), ``labels.csv`` (``image,labels``; several labels
    joined by ``;``), ``classes.txt`` (a class a line in mask-id order, ids from 1),
    ``masks/NAME.png`` (palette index: 0 background, else the class id), ``parts/NAME.png`` (palette
    index, see :data:`PARTS`) and ``parts.json``. ``labels.csv`` is written last, so a folder that
    has it is complete. Image ``i`` depends on ``seed`` and ``i`` only: a longer set begins with the
    shorter one.

    Args:
        folder: where to write; made if it is missing. Files of the same names are overwritten.
        images: number of images, at least 1.
        size: side of the square images in pixels, at least 32.
        seed: at least 0; the same seed gives the same bytes.

    Raises:
        DataError: if ``images``, ``size`` or ``seed`` is out of range.
    """
    if images < 1:
        raise DataError(f"images is {images}; the demo set needs at least 1 image")
    if size < 32:
        raise DataError(f"size is {size} px; creatures need at least 32 px to be seen")
    if seed < 0:
        raise DataError(f"seed is {seed}; use a seed of 0 or more")
    for name in ("images", "masks", "parts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_bytes("".join(f"{name}\n" for name in CLASSES).encode())
    (folder / "parts.json").write_bytes((json.dumps(PARTS) + "\n").encode())
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("image", "labels"))
    for i in range(images):
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, i])))
        sheet, labels = _draw(size, rng)
        picture, classes, parts = sheet.finish()
        name = f"{i:04d}.png"
        (folder / "images" / name).write_bytes(_png(_light(picture, rng)))
        (folder / "masks" / name).write_bytes(_index_png(classes))
        (folder / "parts" / name).write_bytes(_index_png(parts))
        rows.writerow((name, ";".join(CLASSES[n] for n in sorted(labels))))
    (folder / "labels.csv").write_bytes(table.getvalue().encode())
