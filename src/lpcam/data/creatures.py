"""The bundled procedural data set: invented creatures whose heads, and only heads, tell the class.

A torso, shared by a group of classes, is weak evidence; legs and tail are the same for every class;
some grounds co-occur with a class and are false evidence. The same seed gives the same bytes for
the same versions of Pillow and NumPy.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from lpcam.data.images import png_bytes

Colour = tuple[int, int, int]
Points = Sequence[complex]  # x + y j with y down: a product with a complex number turns and scales
Random = np.random.Generator
PARTS = {"head": 1, "torso": 2, "legs": 3, "tail": 4}  #: Values of the part masks.
MASKS = ("masks", "parts", "instances")  #: Folders of the index masks; the last for herds only.
_KINDS: dict[str, dict[str, Any]] = yaml.safe_load(
    resources.files("lpcam.data").joinpath("creatures.yaml").read_text("utf-8")
)
CLASSES = tuple(_KINDS)  #: In mask-id order; the first has mask id 1.
GROUPS = tuple(kind["torso"] for kind in _KINDS.values())  #: Index into `_TORSOS` of each class.
COMPANIONS = {n: k["ground"] for n, k in enumerate(_KINDS.values()) if "ground" in k}
"""Grounds that co-occur with a class, by label index."""
_COMPANION_PROBABILITY = 0.6  # that an image with such a class has its companion ground
OVERSAMPLING = 3  #: Shapes are drawn this much larger and averaged down, for smooth edges.
_INK: Colour = (52, 44, 60)
_CREAM: Colour = (250, 238, 214)
_STOCKING: Colour = (78, 88, 140)
_HOOF: Colour = (48, 46, 66)
_TUFT: Colour = (226, 110, 70)
_OUTLINE = 0.035  # width of the ink outline of a shape, in lengths of a torso


def _ellipse(
    centre: complex, rx: float, ry: float, turn: float = 0.0, count: int = 36
) -> list[complex]:
    angles = np.linspace(0.0, 2.0 * math.pi, count, endpoint=False).tolist()
    turned = complex(math.cos(turn), math.sin(turn))
    return [centre + complex(rx * math.cos(a), ry * math.sin(a)) * turned for a in angles]


def _curve(start: complex, bend: complex, end: complex, count: int = 12) -> list[complex]:
    steps = np.linspace(0.0, 1.0, count).tolist()
    return [(1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t * t * end for t in steps]


def _along(step: complex) -> complex:
    return step / (math.hypot(step.real, step.imag) or 1.0)


def _ribbon(line: Points, first: float, last: float) -> list[complex]:
    """Outline of a line whose width goes from ``first`` to ``last``."""
    end, sides = len(line) - 1, []
    for i in range(len(line)):
        ahead = _along(line[min(i + 1, end)] - line[max(i - 1, 0)])
        sides.append(ahead * (0.5 * (first + (last - first) * i / end)) * 1j)
    pairs = [*zip(line, sides, strict=True)]
    return [p + side for p, side in pairs] + [p - side for p, side in reversed(pairs)]


def _xy(points: Iterable[complex], unit: float) -> list[tuple[float, float]]:
    """Points as Pillow takes them, multiplied by a number of pixels."""
    return [(p.real * unit, p.imag * unit) for p in points]


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    """Colour between ``a`` (share 0) and ``b`` (share 1)."""
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b, strict=True))  # type: ignore[return-value]


def _vary(colour: Colour, rng: Random, amount: float = 12.0) -> Colour:
    """A colour of a random lightness and tint near the given one."""
    light, tint = rng.normal(0.0, amount), rng.normal(0.0, amount / 3.0, 3)
    return tuple(int(np.clip(c + light + t, 0, 255)) for c, t in zip(colour, tint, strict=True))  # type: ignore[return-value]


def _meadow(draw: ImageDraw.ImageDraw, unit: float, rng: Random) -> None:
    for y in np.sort(rng.uniform(0, 104, 330)).tolist():
        x, h, lean = rng.uniform(-2, 102), rng.uniform(5, 10), rng.uniform(-3, 3)
        colour = _mix((108, 150, 92), (196, 212, 140), rng.uniform())
        blade = [complex(x - 1.0, y), complex(x + lean, y - h), complex(x + 1.0, y)]
        draw.polygon(_xy(blade, unit), fill=colour)


def _bricks(draw: ImageDraw.ImageDraw, unit: float, rng: Random) -> None:
    height, width, shift = rng.uniform(9, 11), rng.uniform(20, 24), rng.uniform(0, 20)
    for row, column in itertools.product(range(13), range(-1, 7)):
        x, y = column * width + (row % 2) * width / 2 - shift, row * height - shift / 4
        colour = _mix((190, 138, 120), (222, 176, 152), rng.uniform())
        box = [complex(x, y), complex(x + width - 1.4, y + height - 1.4)]
        draw.rounded_rectangle(_xy(box, unit), radius=1.2 * unit, fill=colour)


def _reeds(draw: ImageDraw.ImageDraw, unit: float, rng: Random) -> None:
    for _ in range(46):
        x, lean, top = rng.uniform(-4, 104), rng.uniform(-7, 7), rng.uniform(-8, 50)
        colour = _mix((120, 140, 96), (184, 186, 118), rng.uniform())
        line = _curve(complex(x, 104.0), complex(x, 50.0), complex(x + lean, top), 8)
        draw.line(_xy(line, unit), fill=colour, width=round(2.0 * unit))
        if rng.uniform() < 0.45:
            tip = _ellipse(complex(x + lean, top), 1.8, 5.5, 0.0, 14)
            draw.polygon(_xy(tip, unit), fill=(140, 104, 78))


def _ripples(draw: ImageDraw.ImageDraw, unit: float, rng: Random) -> None:
    phase, tall = rng.uniform(0, 6), rng.uniform(1.2, 2.2)
    for row in range(-1, 17):
        colour = _mix((146, 186, 214), (204, 226, 238), rng.uniform())
        y, turn = row * 6.4, row * 1.3
        line = [complex(x, y + tall * math.sin(x / 5.5 + phase + turn)) for x in range(-2, 104, 2)]
        draw.line(_xy(line, unit), fill=colour, width=round(2.2 * unit), joint="curve")


def _pebbles(draw: ImageDraw.ImageDraw, unit: float, rng: Random) -> None:
    for _ in range(230):
        x, y, r = rng.uniform(-3, 103), rng.uniform(-3, 103), rng.uniform(2.2, 5.0)
        colour = _mix((150, 148, 150), (214, 208, 200), rng.uniform())
        stone = _ellipse(complex(x, y), r, r * 0.75, rng.uniform(0, 3), 14)
        draw.polygon(_xy(stone, unit), fill=colour, outline=(128, 124, 128))


def _planks(draw: ImageDraw.ImageDraw, unit: float, rng: Random) -> None:
    width, x = rng.uniform(13, 18), -rng.uniform(0, 10)
    while x < 102:
        colour = _mix((196, 172, 140), (222, 202, 170), rng.uniform())
        draw.rectangle(_xy([complex(x, 0), complex(x + width - 1, 101)], unit), fill=colour)
        for _ in range(5):
            a, y, length = x + rng.uniform(2, width - 2), rng.uniform(-20, 100), rng.uniform(12, 40)
            line = [complex(a, y), complex(a + rng.normal(0, 0.5), y + length)]
            grain = _mix(colour, (140, 104, 74), 0.4)
            draw.line(_xy(line, unit), fill=grain, width=max(1, round(0.7 * unit)))
        x += width


def _dunes(draw: ImageDraw.ImageDraw, unit: float, rng: Random) -> None:
    for row in range(9):
        y, phase, tall = row * 12.5 - 4 + rng.normal(0, 1.5), rng.uniform(0, 6), rng.uniform(2, 5)
        share = (row % 2) * 0.6 + float(rng.uniform(0, 0.4))
        ridge = [complex(x, y + tall * math.sin(x / 14 + phase)) for x in range(-4, 106, 4)]
        shape = _xy([*ridge, 100 + 100j, 100j], unit)
        draw.polygon(shape, fill=_mix((240, 222, 182), (214, 184, 142), share))


def _tiles(draw: ImageDraw.ImageDraw, unit: float, rng: Random) -> None:
    side, shift = rng.uniform(12, 16), rng.uniform(0, 10)
    dark, light = _vary((186, 196, 214), rng, 6), _vary((226, 228, 236), rng, 6)
    for row, column in itertools.product(range(-1, 10), range(-1, 10)):
        corner = complex(column * side - shift, row * side - shift)
        box = _xy([corner, corner + complex(side, side)], unit)
        draw.rectangle(box, fill=dark if (row + column) % 2 else light)


def _snow(draw: ImageDraw.ImageDraw, unit: float, rng: Random) -> None:
    for _ in range(90):
        x, y, r = rng.uniform(0, 100), rng.uniform(0, 100), rng.uniform(0.8, 2.4)
        draw.ellipse(_xy([complex(x - r, y - r), complex(x + r, y + r)], unit), (238, 242, 250))


GROUNDS: dict[str, tuple[Colour, Callable[[ImageDraw.ImageDraw, float, Random], None]]] = {
    "meadow": ((150, 184, 116), _meadow),
    "bricks": ((226, 212, 196), _bricks),
    "reeds": ((214, 220, 184), _reeds),
    "ripples": ((176, 208, 228), _ripples),
    "pebbles": ((172, 168, 166), _pebbles),
    "planks": ((164, 136, 106), _planks),
    "dunes": ((244, 230, 196), _dunes),
    "tiles": ((206, 212, 224), _tiles),
    "snow": ((200, 214, 232), _snow),
}


class _Sheet:
    """A picture and its index masks, drawn together at ``OVERSAMPLING`` times the size."""

    def __init__(self, picture: Image.Image) -> None:
        self.picture = picture
        self.creatures = 0  #: Number of creatures so far.
        self.masks = {name: Image.new("L", picture.size) for name in MASKS}

    def finish(self) -> tuple[Image.Image, dict[str, np.ndarray]]:
        """Picture averaged down; masks taken at the pixel centres, so that no ids are blended."""
        inner = slice(OVERSAMPLING // 2, None, OVERSAMPLING)
        masks = {name: np.array(mask)[inner, inner] for name, mask in self.masks.items()}
        return self.picture.reduce(OVERSAMPLING), masks


_Texture = tuple[Colour, list[list[complex]], bool]
"""Colour of patches inside a shape, their outlines, and whether these are lines to draw."""


@dataclass
class _Creature:
    """Draws shapes given in the creature's frame onto a sheet."""

    sheet: _Sheet
    mask_id: int
    centre: complex
    scale: float
    mirrored: bool
    tilt: float
    rng: Random

    def place(self, points: Iterable[complex]) -> list[tuple[float, float]]:
        turn, centre = complex(math.cos(self.tilt), math.sin(self.tilt)), self.centre
        across = -self.scale if self.mirrored else self.scale
        turned = (p * turn for p in points)
        return [(centre.real + across * p.real, centre.imag + self.scale * p.imag) for p in turned]

    def shape(
        self,
        points: Points,
        colour: Colour,
        part: str,
        shade: float = 0.0,
        texture: _Texture = (_INK, [], False),
    ) -> None:
        """One closed shape: fill, texture inside it, a shaded lower rim, an ink outline."""
        placed, ink = self.place(points), max(1, round(_OUTLINE * self.scale))
        picture, pad = self.sheet.picture, max(2, ink)
        xs, ys = zip(*placed, strict=True)
        left, top = max(0, math.floor(min(xs)) - pad), max(0, math.floor(min(ys)) - pad)
        right = min(picture.width, math.ceil(max(xs)) + pad + 1)
        bottom = min(picture.height, math.ceil(max(ys)) + pad + 1)
        if right <= left or bottom <= top:
            return
        size = (right - left, bottom - top)

        def move(some: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
            return [(x - left, y - top) for x, y in some]

        mask, fill = Image.new("L", size), Image.new("RGB", size, colour)
        ImageDraw.Draw(mask).polygon(move(placed), fill=255)
        draw, (dye, patches, are_lines) = ImageDraw.Draw(fill), texture
        for inside in (move(self.place(patch)) for patch in patches):
            if are_lines:
                width = max(2, round(math.dist(inside[0], inside[-1]) * 0.2))
                draw.line(inside, fill=dye, width=width)
            else:
                draw.polygon(inside, fill=dye)
        if shade > 0:
            # what a copy of the shape moved up does not cover is the rim away from the light
            lifted, offset = Image.new("L", size), round(shade * self.scale)
            lifted.paste(mask, (0, -offset))
            rim = ImageChops.subtract(mask, lifted).filter(ImageFilter.BoxBlur(offset / 3))
            fill.paste(_mix(colour, _INK, 0.45), (0, 0), rim.point(lambda v: v * 0.55))
        picture.paste(fill, (left, top), mask)
        ring = placed + placed[:2]
        values = self.mask_id, PARTS[part], self.sheet.creatures
        for mask, value in zip(self.sheet.masks.values(), values, strict=True):
            draw = ImageDraw.Draw(mask)
            draw.polygon(placed, fill=value)
            draw.line(ring, fill=value, width=ink, joint="curve")
        edge = _mix(colour, _INK, 0.8)
        ImageDraw.Draw(picture).line(ring, fill=edge, width=ink, joint="curve")

    def mark(self, points: Points, colour: Colour, width: float = 0.0) -> None:
        """A detail on a shape already drawn: an area (an eye), or a line of a width (a mouth)."""
        draw, placed = ImageDraw.Draw(self.sheet.picture), self.place(points)
        if not width:
            draw.polygon(placed, fill=colour)
            return
        draw.line(placed, fill=colour, width=max(1, round(width * self.scale)), joint="curve")


def _spots(colour: Colour, rng: Random) -> _Texture:
    ranges = (-0.75, 0.85), (-0.6, 0.45), (0.035, 0.085)
    spots = zip(*(rng.uniform(*ends, 44).tolist() for ends in ranges), strict=True)
    return colour, [_ellipse(complex(x, y), r, r * 0.85, count=12) for x, y, r in spots], False


def _stripes(colour: Colour, rng: Random) -> _Texture:
    start, gap, lean = rng.uniform(-0.9, -0.75), rng.uniform(0.15, 0.19), rng.uniform(-0.12, 0.12)
    starts = np.arange(start, 1.1, gap).tolist()
    lines = [(x - 0.75j, x + 0.12 - 0.1j, x + lean + 0.55j) for x in starts]
    return colour, [_ribbon(_curve(*line), 0.085, 0.045) for line in lines], False


def _scales(colour: Colour, rng: Random) -> _Texture:
    size, scales = rng.uniform(0.13, 0.16), []
    for row, column in itertools.product(range(12), range(16)):
        corner = complex(-0.95 + (column + 0.5 * (row % 2)) * size, -0.75 + row * size * 0.8)
        scales.append(_curve(corner, corner + complex(size / 2, size * 1.5), corner + size, 6))
    return colour, scales, True


_TORSOS: tuple[tuple[Colour, Colour, Callable[[Colour, Random], _Texture]], ...] = (
    ((238, 186, 104), (168, 100, 52), _spots),
    ((116, 190, 176), (36, 104, 112), _stripes),
    ((222, 150, 182), (146, 66, 116), _scales),
)


def _bands(line: Points, colour: Colour, count: int) -> _Texture:
    """Stripes across a leg or a tail: the stockings that every creature wears."""
    patches, last = [], len(line) - 1
    for band in range(count):
        at = (band + 0.5) / count * last
        i = min(int(at), last - 1)
        step = line[i + 1] - line[i]
        point, half = line[i] + step * (at - i), _along(step) * 0.028
        side = _along(step) * 1j * 0.2
        right = [point - side - half, point - side + half]
        patches.append([point + side - half, *right, point + side + half])
    return colour, patches, False


def _leg(creature: _Creature, hip: complex, length: float, swing: float, *, far: bool) -> None:
    colour = _mix(_STOCKING, _INK, 0.3) if far else _vary(_STOCKING, creature.rng, 8)
    band = _mix(_CREAM, _INK, 0.3) if far else _CREAM
    foot = hip + complex(swing, length)
    line = _curve(hip, hip + complex(swing * 0.2 + 0.07, length * 0.5), foot)
    creature.shape(_ribbon(line, 0.25, 0.16), colour, "legs", texture=_bands(line, band, 4))
    hoof = [foot + p for p in (-0.1 + 0.07j, -0.08 - 0.05j, 0.08 - 0.05j, 0.17 + 0.07j)]
    creature.shape(hoof, _HOOF, "legs")


def _tail(creature: _Creature) -> None:
    rng = creature.rng
    tip = complex(-0.84 + rng.uniform(-0.08, 0.08), -0.52 + rng.uniform(-0.15, 0.25))
    line = _curve(-0.5 - 0.12j, complex(-0.95, 0.05 + rng.uniform(-0.2, 0.15)), tip, 16)
    colour = _vary(_STOCKING, rng, 8)
    creature.shape(_ribbon(line, 0.22, 0.13), colour, "tail", texture=_bands(line, _CREAM, 6))
    flame = (-0.06 - 0.08j, 0.1 - 0.15j, 0.32 + 0j, 0.1 + 0.15j, -0.06 + 0.08j)
    turn = _along(tip - line[-3])
    creature.shape([tip + p * turn for p in flame], _vary(_TUFT, rng, 8), "tail", shade=0.04)


def _torso(creature: _Creature, group: int, head: complex) -> None:
    rng = creature.rng
    base, second, pattern = _TORSOS[group]
    base, second = _vary(base, rng), _vary(second, rng)
    texture, belly = pattern(second, rng), rng.uniform(0.33, 0.42)
    neck = _ribbon(_curve(0.28 - 0.05j, 0.5 - 0.12j, head), 0.42, 0.26)
    creature.shape(neck, base, "torso", texture=texture)
    # a back that is flatter than the belly reads as an animal, not as an egg
    egg = _ellipse(0j, 0.61, belly, 0.0, 48)
    body = [complex(p.real, p.imag * (0.85 if p.imag < 0 else 1.05)) for p in egg]
    creature.shape(body, base, "torso", texture=texture, shade=0.13)


_OUTLINES: dict[str, Callable[..., list[complex]]] = {
    "polygon": lambda *points: list(points),
    "ellipse": _ellipse,
    "curve": _curve,
    "ribbon": lambda a, b, c, *widths: _ribbon(_curve(a, b, c), *widths),
    "bar": lambda a, b, *widths: _ribbon([a, b], *widths),
    "bill": lambda first, a, b, c, *last: [first, *_curve(a, b, c), *last],
}
_EYE: tuple[tuple[complex, float, float, Colour, int], ...] = (
    (0j, 1.15, 1.25, _INK, 20),
    (0j, 1.0, 1.1, (255, 255, 255), 20),
    (0.3 + 0.1j, 0.6, 0.7, _INK, 20),
    (0.45 - 0.25j, 0.22, 0.22, (255, 255, 255), 10),
)


def _head(creature: _Creature, kind: dict[str, Any], at: complex) -> None:
    rng = creature.rng
    size, nod = rng.uniform(0.235, 0.28), rng.normal(0.0, 0.12)
    frame = complex(math.cos(nod) * size, math.sin(nod) * size)
    named = {"own": _vary(kind["colour"], rng, 8), "ink": _INK, "cream": _CREAM}

    def colour_of(given: Any) -> Colour:
        if isinstance(given, dict):
            a, b, share = given["mix"]
            return _mix(colour_of(a), colour_of(b), share)
        return named[given] if isinstance(given, str) else tuple(given)

    def placed(points: Iterable[complex]) -> list[complex]:
        return [at + p * frame for p in points]

    for verb, *given in kind["head"]:
        if verb == "eye":
            centre, r = complex(given[0]), given[1]
            for offset, rx, ry, colour, count in _EYE:
                points = _ellipse(centre + offset * r, rx * r, ry * r, count=count)
                creature.mark(placed(points), colour)
        elif verb == "petals":
            distance, r, begin, colour = given
            for angle in np.linspace(0.0, 2 * math.pi, 11, endpoint=False).tolist():
                turn = angle + begin
                centre = complex(distance * math.cos(turn), distance * math.sin(turn))
                petal = placed(_ellipse(centre, r, r * 0.62, turn, 16))
                creature.shape(petal, colour_of(colour), "head")
        else:
            ((outline, values),) = given[0].items()
            values = [complex(v) if isinstance(v, str) else v for v in values]
            points = placed(_OUTLINES[outline](*values))
            usual: list[Any] = ["own", 0.05] if verb == "shape" else ["ink", 0.11]
            paint, amount = given[1:] + usual[len(given) - 1 :]
            if verb == "shape":
                creature.shape(points, colour_of(paint), "head", shade=amount)
            else:
                creature.mark(points, colour_of(paint), amount * size * (verb == "line"))


def _creature(sheet: _Sheet, label: int, centre: complex, scale: float, rng: Random) -> None:
    sheet.creatures += 1
    mirrored, tilt = rng.uniform() < 0.5, rng.normal(0.0, 0.07)
    creature = _Creature(sheet, label + 1, centre, scale, mirrored, tilt, rng)
    ((x, y),) = creature.place([0.72j])
    shadow = Image.new("L", sheet.picture.size, 0)
    box = (x - 0.75 * scale, y - 0.1 * scale, x + 0.75 * scale, y + 0.1 * scale)
    ImageDraw.Draw(shadow).ellipse(box, fill=80)
    sheet.picture.paste(_INK, (0, 0), shadow)
    length, stride = rng.uniform(0.52, 0.6), rng.uniform(-0.14, 0.14)
    _tail(creature)
    _leg(creature, -0.24 + 0.12j, length, -stride, far=True)
    _leg(creature, 0.42 + 0.1j, length, stride, far=True)
    at = complex(0.68 + rng.uniform(-0.04, 0.06), -0.44 + rng.uniform(-0.08, 0.1))
    _torso(creature, GROUPS[label], at)
    _leg(creature, -0.38 + 0.16j, length, stride, far=False)
    _leg(creature, 0.27 + 0.16j, length, -stride, far=False)
    _head(creature, _KINDS[CLASSES[label]], at)


def _herd(large: int, label: int, rng: Random) -> list[tuple[float, float, float, int]]:
    """Two or three creatures of one class, each touching the next: y, x, scale and label."""
    count = int(rng.integers(2, 4))
    scale = (rng.uniform(0.27, 0.33) if count == 2 else rng.uniform(0.20, 0.24)) * large
    steps = rng.uniform((0.85, -0.35), (1.2, 0.35), (count - 1, 2))
    places = np.concatenate([np.zeros((1, 2)), steps.cumsum(0)]) * scale
    places += (0.5 + rng.uniform(-0.03, 0.03, 2) + (0, 0.03)) * large - places.mean(0)
    return [(float(y), float(x), scale, label) for x, y in places]


def _draw(size: int, rng: Random, herds: bool) -> tuple[_Sheet, tuple[int, ...]]:
    # one creature in three images of five, else two of different classes
    count = 1 if herds or rng.uniform() < 0.6 else 2
    labels = tuple(int(v) for v in rng.choice(len(CLASSES), size=count, replace=False))
    large = size * OVERSAMPLING
    companions = [COMPANIONS[n] for n in labels if n in COMPANIONS]
    has_companion = companions and rng.uniform() < _COMPANION_PROBABILITY
    grounds = companions if has_companion else [*GROUNDS]
    base, paint = GROUNDS[grounds[int(rng.integers(len(grounds)))]]
    picture = Image.new("RGB", (large, large), _vary(base, rng, 8))
    paint(ImageDraw.Draw(picture), large / 100, rng)
    sheet = _Sheet(picture)
    places: list[tuple[float, float, float, int]] = []
    if herds:
        places = _herd(large, labels[0], rng)
    elif count == 1:
        scale, x = rng.uniform(0.36, 0.52) * large, rng.uniform(0.46, 0.54) * large
        places.append((rng.uniform(0.51, 0.57) * large, x, scale, labels[0]))
    else:
        for label, middle, down in zip(labels, (0.31, 0.69), rng.permutation(2), strict=True):
            scale = rng.uniform(0.27, 0.34) * large
            x = (middle + rng.uniform(-0.05, 0.05)) * large
            y = ((0.72 if down else 0.34) + rng.uniform(-0.05, 0.05)) * large
            places.append((y, x, scale, label))
    # the lower one in the picture is nearer and is drawn last
    for y, x, scale, label in sorted(places):
        _creature(sheet, label, complex(x, y), scale, rng)
    return sheet, labels


def _light(picture: Image.Image, rng: Random) -> np.ndarray:
    """A slope of light over the picture and fine grain, so that no two grounds are the same."""
    width, height = picture.size
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0.0, 0.14)
    y, x = np.mgrid[0:height, 0:width] / max(width, height) - 0.5
    slope = 1.0 + strength * (math.cos(angle) * x + math.sin(angle) * y) + rng.normal(0.0, 0.03)
    grain = rng.normal(0.0, 2.5, (height, width, 1))
    values = np.asarray(picture, dtype=np.float64) * slope[:, :, None] + grain
    return np.asarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def write(folder: Path, *, images: int, size: int, seed: int, herds: bool = False) -> None:
    """Write images of ``size`` pixels as a user's folder; image i depends on seed and i only.

    With ``herds`` every image shows two or three creatures of one class that touch, and
    ``instances`` holds masks in which they have the values 1, 2, ...
    """
    kinds = MASKS if herds else MASKS[:2]
    for name in ("images", *kinds):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_bytes("".join(f"{name}\n" for name in CLASSES).encode())
    (folder / "parts.json").write_bytes((json.dumps(PARTS) + "\n").encode())
    # colours of the index masks, only for looking at them: black, then those of the heads
    palette = bytes((0, 0, 0, *(value for kind in _KINDS.values() for value in kind["colour"])))
    palette = palette.ljust(768, b"\0")
    table = "image,labels\n"
    for i in range(images):
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, i])))
        sheet, labels = _draw(size, rng, herds)
        picture, masks = sheet.finish()
        name = f"{i:04d}.png"
        (folder / "images" / name).write_bytes(png_bytes(_light(picture, rng)))
        for kind in kinds:
            (folder / kind / name).write_bytes(png_bytes(masks[kind], palette))
        table += f"{name},{';'.join(CLASSES[n] for n in sorted(labels))}\n"
    (folder / "labels.csv").write_bytes(table.encode())
