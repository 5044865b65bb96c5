"""The demo set's grounds, and the outlines and colours that it is drawn with.

Points are complex numbers, x + y j with y down, so that a product with a complex number turns and
scales them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from PIL import ImageDraw

Colour = tuple[int, int, int]
Points = Sequence[complex]
Random = np.random.Generator


# -- Geometry and colours ------------------------------------------------------------------------


def ellipse(
    centre: complex, rx: float, ry: float, turn: float = 0.0, count: int = 36
) -> list[complex]:
    """Points of an ellipse, turned by an angle in radians."""
    angles = np.linspace(0.0, 2.0 * math.pi, count, endpoint=False).tolist()
    turned = complex(math.cos(turn), math.sin(turn))
    return [centre + complex(rx * math.cos(a), ry * math.sin(a)) * turned for a in angles]


def curve(start: complex, bend: complex, end: complex, count: int = 12) -> list[complex]:
    """Points of a quadratic Bézier curve."""
    steps = np.linspace(0.0, 1.0, count).tolist()
    return [(1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t * t * end for t in steps]


def along(step: complex) -> complex:
    """The direction of a step, of length 1."""
    return step / (math.hypot(step.real, step.imag) or 1.0)


def ribbon(line: Points, first: float, last: float) -> list[complex]:
    """Outline of a line whose width goes from ``first`` to ``last``."""
    end = len(line) - 1
    sides = [
        along(line[min(i + 1, end)] - line[max(i - 1, 0)])
        * (0.5 * (first + (last - first) * i / end))
        * 1j
        for i in range(len(line))
    ]
    left = [point + side for point, side in zip(line, sides, strict=True)]
    right = [point - side for point, side in zip(line, sides, strict=True)]
    return left + right[::-1]


def xy(points: Iterable[complex], unit: float = 1.0) -> list[tuple[float, float]]:
    """Points as Pillow takes them, multiplied by a number of pixels."""
    return [(p.real * unit, p.imag * unit) for p in points]


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Colour between ``a`` (share 0) and ``b`` (share 1)."""
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b, strict=True))  # type: ignore[return-value]


def vary(colour: Colour, rng: Random, amount: float = 12.0) -> Colour:
    """A colour of a random lightness and tint near the given one."""
    light = rng.normal(0.0, amount)
    tint = rng.normal(0.0, amount / 3.0, 3)
    return tuple(int(np.clip(c + light + t, 0, 255)) for c, t in zip(colour, tint, strict=True))  # type: ignore[return-value]


# -- Grounds, in hundredths of the picture's side --------------------------------------------------


def _between(a: Colour, b: Colour, rng: Random) -> Colour:
    return mix(a, b, float(rng.uniform()))


def _meadow(draw: ImageDraw.ImageDraw, unit: float, rng: Random) -> None:
    for y in np.sort(rng.uniform(0, 104, 330)).tolist():
        x, h, lean = rng.uniform(-2, 102), rng.uniform(5, 10), rng.uniform(-3, 3)
        colour = _between((108, 150, 92), (196, 212, 140), rng)
        blade = [complex(x - 1.0, y), complex(x + lean, y - h), complex(x + 1.0, y)]
        draw.polygon(xy(blade, unit), fill=colour)


def _bricks(draw: ImageDraw.ImageDraw, unit: float, rng: Random) -> None:
    height, width = rng.uniform(9, 11), rng.uniform(20, 24)
    shift = rng.uniform(0, 20)
    for row in range(13):
        for column in range(-1, 7):
            x, y = column * width + (row % 2) * width / 2 - shift, row * height - shift / 4
            colour = _between((190, 138, 120), (222, 176, 152), rng)
            box = [complex(x, y), complex(x + width - 1.4, y + height - 1.4)]
            draw.rounded_rectangle(xy(box, unit), radius=1.2 * unit, fill=colour)


def _reeds(draw: ImageDraw.ImageDraw, unit: float, rng: Random) -> None:
    for _ in range(46):
        x, lean, top = rng.uniform(-4, 104), rng.uniform(-7, 7), rng.uniform(-8, 50)
        colour = _between((120, 140, 96), (184, 186, 118), rng)
        line = curve(complex(x, 104.0), complex(x, 50.0), complex(x + lean, top), 8)
        draw.line(xy(line, unit), fill=colour, width=round(2.0 * unit))
        if rng.uniform() < 0.45:
            tip = ellipse(complex(x + lean, top), 1.8, 5.5, 0.0, 14)
            draw.polygon(xy(tip, unit), fill=(140, 104, 78))


def _ripples(draw: ImageDraw.ImageDraw, unit: float, rng: Random) -> None:
    phase, tall = rng.uniform(0, 6), rng.uniform(1.2, 2.2)
    for row in range(-1, 17):
        colour = _between((146, 186, 214), (204, 226, 238), rng)
        line = [
            complex(x, row * 6.4 + tall * math.sin(x / 5.5 + phase + row * 1.3))
            for x in range(-2, 104, 2)
        ]
        draw.line(xy(line, unit), fill=colour, width=round(2.2 * unit), joint="curve")


def _pebbles(draw: ImageDraw.ImageDraw, unit: float, rng: Random) -> None:
    for _ in range(230):
        x, y, r = rng.uniform(-3, 103), rng.uniform(-3, 103), rng.uniform(2.2, 5.0)
        colour = _between((150, 148, 150), (214, 208, 200), rng)
        stone = ellipse(complex(x, y), r, r * 0.75, rng.uniform(0, 3), 14)
        draw.polygon(xy(stone, unit), fill=colour, outline=(128, 124, 128))


def _planks(draw: ImageDraw.ImageDraw, unit: float, rng: Random) -> None:
    width, x = rng.uniform(13, 18), -rng.uniform(0, 10)
    while x < 102:
        colour = _between((196, 172, 140), (222, 202, 170), rng)
        draw.rectangle(xy([complex(x, 0), complex(x + width - 1, 101)], unit), fill=colour)
        for _ in range(5):
            a, y, length = x + rng.uniform(2, width - 2), rng.uniform(-20, 100), rng.uniform(12, 40)
            line = [complex(a, y), complex(a + rng.normal(0, 0.5), y + length)]
            grain = mix(colour, (140, 104, 74), 0.4)
            draw.line(xy(line, unit), fill=grain, width=max(1, round(0.7 * unit)))
        x += width


def _dunes(draw: ImageDraw.ImageDraw, unit: float, rng: Random) -> None:
    for row in range(9):
        y, phase, tall = row * 12.5 - 4 + rng.normal(0, 1.5), rng.uniform(0, 6), rng.uniform(2, 5)
        share = (row % 2) * 0.6 + float(rng.uniform(0, 0.4))
        ridge = [complex(x, y + tall * math.sin(x / 14 + phase)) for x in range(-4, 106, 4)]
        shape = xy([*ridge, 100 + 100j, 100j], unit)
        draw.polygon(shape, fill=mix((240, 222, 182), (214, 184, 142), share))


def _tiles(draw: ImageDraw.ImageDraw, unit: float, rng: Random) -> None:
    side, shift = rng.uniform(12, 16), rng.uniform(0, 10)
    dark, light = vary((186, 196, 214), rng, 6), vary((226, 228, 236), rng, 6)
    for row in range(-1, 10):
        for column in range(-1, 10):
            corner = complex(column * side - shift, row * side - shift)
            box = xy([corner, corner + complex(side, side)], unit)
            draw.rectangle(box, fill=dark if (row + column) % 2 else light)


def _snow(draw: ImageDraw.ImageDraw, unit: float, rng: Random) -> None:
    for _ in range(90):
        x, y, r = rng.uniform(0, 100), rng.uniform(0, 100), rng.uniform(0.8, 2.4)
        draw.ellipse(xy([complex(x - r, y - r), complex(x + r, y + r)], unit), (238, 242, 250))


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
