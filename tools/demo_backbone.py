"""Makes the small backbone of the demo: a network pre-trained on many shapes and textures.

The demo needs what ImageNet gives to a real backbone: features of its own for things that the
classes do not ask for (a leg, a tail). A network trained from scratch on the creatures alone has
features for heads only, and no map can show what the features do not hold. So the backbone is
pre-trained on *another* procedural task (:func:`render`): images with one or two objects, each a
textured and coloured shape with or without limbs, on a textured ground. The network names shape,
texture, colour and limbs of the objects and the texture of the ground, from pooled features and
labels of whole images alone: it never sees a mask, and no creature is drawn here.

The shipped file is made by ``lpcam pretrain OUTPUT`` with the default arguments, in about a quarter
of an hour on one core; its header states the seed, the steps, the versions and the score reached.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lpcam.runtime.errors import ArtefactError, ClassifierError
from lpcam.runtime.files import write_tensors

BACKBONE = "resnet18"
"""Name of the backbone in timm."""


ARGUMENTS: dict[str, Any] = {
    "layers": [1, 1, 1, 1],
    "channels": [32, 64, 96, 160],
    "stem_type": "deep",
    "stem_width": 16,
}
"""Arguments of ``timm.create_model`` beside ``num_classes=0``: one block a stage, narrow."""


OUTPUT_STRIDE = 8
"""Of the features that the demo maps. Pre-training runs at ``PRETRAINING_STRIDE``, which is faster:
the weights are the same, a stride that is left out is made good by dilation."""


PRETRAINING_STRIDE = 16


MEAN = (0.5, 0.5, 0.5)


STANDARD_DEVIATION = (0.5, 0.5, 0.5)
"""Preprocessing: RGB in [0, 1] minus MEAN, divided by STANDARD_DEVIATION."""


SIZE = 96
"""Side of the pre-training images in pixels."""


SEED = 0


STEPS = 6000


THREADS = 1


_OVERSAMPLING = 2


_BATCH = 64


_POOL = 24_000


_VALIDATION = 1_000


_LEARNING_RATE = 3e-3


_WEIGHT_DECAY = 0.02


Colour = tuple[int, int, int]


# --------------------------------------------------------------------------------------------------
# Shapes: outlines within the unit disc
# --------------------------------------------------------------------------------------------------
def _polar(radius: Callable[[np.ndarray], np.ndarray], count: int = 48) -> np.ndarray:
    a = np.linspace(0.0, 2 * math.pi, count, endpoint=False)
    r = radius(a)
    return np.stack([r * np.cos(a), r * np.sin(a)], axis=1)


def _regular(corners: int, inner: float | None = None) -> np.ndarray:
    count = corners if inner is None else 2 * corners
    a = np.linspace(0.0, 2 * math.pi, count, endpoint=False)
    r = np.ones(count)
    if inner is not None:
        r[1::2] = inner
    return np.stack([r * np.cos(a), r * np.sin(a)], axis=1)


def _band(line: np.ndarray, width: float) -> np.ndarray:
    """Outline of a line of constant width."""
    step = np.gradient(line, axis=0)
    normal = np.stack([-step[:, 1], step[:, 0]], axis=1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    return np.concatenate([line + normal * width / 2, (line - normal * width / 2)[::-1]])


def _arc(start: float, end: float, radius: float, count: int = 20) -> np.ndarray:
    a = np.linspace(start, end, count)
    return np.stack([radius * np.cos(a), radius * np.sin(a)], axis=1)


def _shapes() -> dict[str, np.ndarray]:
    t = np.linspace(-1.0, 1.0, 24)
    moon = np.concatenate(
        [_arc(0.6, 2 * math.pi - 0.6, 1.0), 0.75 * _arc(-5.4, -0.9, 1.0) + [0.3, 0]]
    )
    a = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    heart_y = -(13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)) / 17
    heart = np.stack([16 * np.sin(a) ** 3 / 17, heart_y], axis=1)
    drop = np.stack([np.cos(a), np.sin(a) * np.sin(a / 2) ** 1.5 * 0.8], axis=1)
    zigzag = np.stack([t, 0.35 * np.sign(np.sin(t * 9.0)) * np.abs(np.sin(t * 9.0)) ** 0.5], axis=1)
    return {
        "disc": _polar(lambda a: np.full_like(a, 0.8)),
        "oval": _polar(lambda a: np.full_like(a, 1.0)) * [1.0, 0.55],
        "square": _regular(4) * 0.95,
        "bar": np.array([(-1, -0.22), (1, -0.22), (1, 0.22), (-1, 0.22)]),
        "triangle": _regular(3),
        "hexagon": _regular(6) * 0.9,
        "star": _regular(5, 0.42),
        "burst": _regular(11, 0.7),
        "cross": np.array(
            [
                *[(0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3), (0.3, 0.95)],
                *[
                    (-0.3, 0.95),
                    (-0.3, 0.3),
                    (-0.95, 0.3),
                    (-0.95, -0.3),
                    (-0.3, -0.3),
                    (-0.3, -0.95),
                ],
            ]
        ),
        "flower": _polar(lambda a: 0.72 + 0.26 * np.cos(5 * a)),
        "moon": moon,
        "heart": heart,
        "drop": drop,
        "hook": _band(
            np.concatenate([_arc(math.pi, 2 * math.pi, 0.55), [[0.55, 0.4], [0.55, 0.9]]]), 0.36
        ),
        "wave": _band(np.stack([t, 0.4 * np.sin(t * 4.5)], axis=1), 0.34),
        "zigzag": _band(zigzag, 0.26),
        "wedge": np.array([(-1.0, 0.0), (0.9, -0.32), (0.9, 0.32)]),
        "fan": np.concatenate([[(0.0, 0.75)], _arc(-2.5, -0.64, 1.0) * [1.0, 0.9]]),
    }


SHAPES = _shapes()
"""Outlines by name, points x 2, within about the unit disc."""


# --------------------------------------------------------------------------------------------------
# Textures: grey tiles between two levels, coloured when they are used
# --------------------------------------------------------------------------------------------------
def _grid(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Turned and shifted pixel coordinates."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    a = rng.uniform(0, math.pi)
    c, s = math.cos(a), math.sin(a)
    return x * c - y * s + rng.uniform(0, 50), x * s + y * c + rng.uniform(0, 50)


def _tile(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """One texture as size x size uint8 grey values."""
    x, y = _grid(size, rng)
    p = float(rng.uniform(13, 30)) * size / 384
    tau = 2 * math.pi
    value: np.ndarray
    if name == "plain":
        value = np.full((size, size), rng.uniform(0, 0.3), dtype=np.float32)
    elif name == "stripes":
        value = (np.sin(tau * x / p) > rng.uniform(-0.4, 0.4)).astype(np.float32)
    elif name == "waves":
        value = (np.sin(tau * (x + 0.35 * p * np.sin(tau * y / (2.2 * p))) / p) > 0).astype(
            np.float32
        )
    elif name == "dots":
        row = np.floor(y / p)
        fx, fy = (x / p + 0.5 * (row % 2)) % 1 - 0.5, (y / p) % 1 - 0.5
        value = (fx**2 + fy**2 < rng.uniform(0.06, 0.14)).astype(np.float32)
    elif name == "rings":
        fx, fy = (x / p / 1.4) % 1 - 0.5, (y / p / 1.4) % 1 - 0.5
        r = np.sqrt(fx**2 + fy**2)
        value = ((r > 0.22) & (r < 0.4)).astype(np.float32)
    elif name == "checks":
        value = ((np.floor(x / p) + np.floor(y / p)) % 2).astype(np.float32)
    elif name == "lattice":
        value = ((x % p < 0.22 * p) | (y % p < 0.22 * p)).astype(np.float32)
    elif name == "bricks":
        row = np.floor(y / p)
        value = ((y % p < 0.2 * p) | ((x + p * (row % 2)) % (2 * p) < 0.2 * p)).astype(np.float32)
    elif name == "arcs":
        row = np.floor(y / p)
        fx, fy = (x / p + 0.5 * (row % 2)) % 1 - 0.5, (y / p) % 1
        value = (np.abs(np.sqrt(fx**2 + fy**2) - 0.5) < 0.13).astype(np.float32)
    elif name == "blotches":
        small = rng.normal(size=(max(4, round(size / p)),) * 2).astype(np.float32)
        rough = Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)
        value = (np.asarray(rough) > 0.3).astype(np.float32)
    elif name == "speckle":
        small = rng.uniform(size=(size // 3 + 1,) * 2).astype(np.float32)
        fine = Image.fromarray(small).resize((size, size), Image.Resampling.BILINEAR)
        value = np.clip(np.asarray(fine), 0, 1)
    elif name == "streaks":
        small = rng.uniform(size=(size // 24 + 2, size // 3 + 2)).astype(np.float32)
        long = Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)
        value = np.clip(np.asarray(long), 0, 1)
        value = value if rng.uniform() < 0.5 else value.T
    else:
        raise ClassifierError(f"unknown texture {name!r}; the textures are {', '.join(TEXTURES)}")
    tile: np.ndarray = np.rint(255 * value).astype(np.uint8)
    return tile


TEXTURES: tuple[str, ...] = (
    "plain",
    "stripes",
    "waves",
    "dots",
    "rings",
    "checks",
    "lattice",
    "bricks",
    "arcs",
    "blotches",
    "speckle",
    "streaks",
)


HUES: tuple[str, ...] = (
    "red",
    "orange",
    "yellow",
    "green",
    "cyan",
    "blue",
    "purple",
    "pink",
    "grey",
)


LIMBS: tuple[str, ...] = ("none", "bar", "wave", "zigzag", "wedge", "hook")
"""Shapes that an object may have several of around it, as a body has limbs."""


_HUE_DEGREES = (0, 27, 52, 115, 178, 218, 272, 325)


LABELS: tuple[str, ...] = (
    *SHAPES,
    *TEXTURES,
    *(f"ground {name}" for name in TEXTURES),
    *HUES,
    *(f"limbs {name}" for name in LIMBS),
)
"""What an image is asked for, in the order of the columns of :func:`render`'s labels."""


_SIZES = {
    "shape": len(SHAPES),
    "texture": len(TEXTURES),
    "ground": len(TEXTURES),
    "colour": len(HUES),
    "limbs": len(LIMBS),
}


QUESTIONS: dict[str, slice] = {
    name: slice(sum(list(_SIZES.values())[:i]), sum(list(_SIZES.values())[: i + 1]))
    for i, name in enumerate(_SIZES)
}
"""The five questions about an image and their columns of the labels."""


def _colour(hue: int, rng: np.random.Generator) -> Colour:
    if HUES[hue] == "grey":
        level = rng.uniform(40, 250)
        return tuple(int(np.clip(level + rng.normal(0, 5), 0, 255)) for _ in range(3))  # type: ignore[return-value]
    degree = (_HUE_DEGREES[hue] + rng.uniform(-9, 9)) % 360 / 60
    light, strength = rng.uniform(0.35, 0.8), rng.uniform(0.5, 1.0)
    chroma = (1 - abs(2 * light - 1)) * strength
    second = chroma * (1 - abs(degree % 2 - 1))
    order = (
        (chroma, second, 0.0),
        (second, chroma, 0.0),
        (0.0, chroma, second),
        (0.0, second, chroma),
        (second, 0.0, chroma),
        (chroma, 0.0, second),
    )[int(degree) % 6]
    return tuple(round(255 * (v + light - chroma / 2)) for v in order)  # type: ignore[return-value]


def _second_colour(first: Colour, contrast: float, rng: np.random.Generator) -> Colour:
    """A darker, lighter or unrelated partner of a colour for the other level of a texture."""
    kind = rng.uniform()
    other: Colour = (20, 20, 30) if kind < 0.45 else (250, 248, 240)
    if kind > 0.8:
        red, green, blue = rng.integers(0, 256, 3).tolist()
        other = (red, green, blue)
    share = contrast * rng.uniform(0.4, 0.9)
    return tuple(round(a + (b - a) * share) for a, b in zip(first, other, strict=True))  # type: ignore[return-value]


class _Tiles:
    """A bank of grey texture tiles, drawn once."""

    def __init__(self, size: int, rng: np.random.Generator, each: int = 24) -> None:
        self.tiles = [
            [Image.fromarray(_tile(name, 2 * size, rng)) for _ in range(each)] for name in TEXTURES
        ]

    def patch(
        self,
        texture: int,
        size: tuple[int, int],
        first: Colour,
        contrast: float,
        rng: np.random.Generator,
    ) -> Image.Image:
        """A coloured patch of a random tile of the texture."""
        bank = self.tiles[texture]
        tile = bank[int(rng.integers(len(bank)))]
        left = int(rng.integers(tile.width - size[0] + 1))
        top = int(rng.integers(tile.height - size[1] + 1))
        grey = tile.crop((left, top, left + size[0], top + size[1]))
        second = _second_colour(first, contrast, rng)
        ramp = np.linspace(0.0, 1.0, 256)
        tables = [
            np.rint(a + (b - a) * ramp).astype(int).tolist()
            for a, b in zip(first, second, strict=True)
        ]
        return Image.merge("RGB", [grey.point(table) for table in tables])


def render(count: int, *, seed: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Images of the pre-training task and their labels.

    Args:
        count: number of images.
        seed: at least 0; the same seed gives the same images.
        size: side of the images in pixels.

    Returns:
        Images, count x size x size x 3, uint8 RGB; labels, count x ``len(LABELS)``, float32, 1
        where the shape, texture or colour belongs to an object of the image (never the ground).
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, size])))
    large = size * _OVERSAMPLING
    tiles = _Tiles(large, rng)
    names = list(SHAPES)
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    labels = np.zeros((count, len(LABELS)), dtype=np.float32)
    for i in range(count):
        ground = int(rng.integers(len(TEXTURES)))
        # Grounds are faint beside objects; otherwise nothing but a shape's outline would tell which
        # of two textures is the object's, and the network would be long in finding either.
        picture = tiles.patch(
            ground,
            (large, large),
            _colour(int(rng.integers(len(HUES))), rng),
            rng.uniform(0.1, 0.5),
            rng,
        )
        labels[i, len(names) + len(TEXTURES) + ground] = 1
        for _ in range(1 if rng.uniform() < 0.75 else 2):
            shape, texture = int(rng.integers(len(names))), int(rng.integers(len(TEXTURES)))
            hue = int(rng.integers(len(HUES)))
            limb = int(rng.integers(1, len(LIMBS))) if rng.uniform() < 0.65 else 0
            _place(
                picture,
                SHAPES[names[shape]],
                LIMBS[limb] if limb else None,
                tiles,
                texture,
                _colour(hue, rng),
                rng,
            )
            labels[i, shape] = 1
            labels[i, len(names) + texture] = 1
            labels[i, len(names) + 2 * len(TEXTURES) + hue] = 1
            labels[i, len(names) + 2 * len(TEXTURES) + len(HUES) + limb] = 1
        values = np.asarray(picture.reduce(_OVERSAMPLING), dtype=np.float64)
        values = values * rng.uniform(0.85, 1.12) + rng.normal(0, 4, values.shape)
        images[i] = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return images, labels


def _turned(outline: np.ndarray, turn: float, scale: float, centre: np.ndarray) -> np.ndarray:
    c, s = math.cos(turn), math.sin(turn)
    placed: np.ndarray = outline @ np.array([[c, s], [-s, c]]) * scale + centre
    return placed


def _place(
    picture: Image.Image,
    outline: np.ndarray,
    limb: str | None,
    tiles: _Tiles,
    texture: int,
    colour: Colour,
    rng: np.random.Generator,
) -> None:
    """Draw one object at a random place, size, turn and stretch, its limbs first.

    Limbs have a texture and a colour of their own, which are not asked for.
    """
    large = picture.width
    radius = large * rng.uniform(0.22, 0.45) * (1.0 if limb is None else 0.68)
    centre = rng.uniform(0.3, 0.7, 2) * large
    turn = rng.uniform(0, 2 * math.pi)
    ink = rng.uniform(0.01, 0.025) if rng.uniform() < 0.6 else 0.0
    if limb is not None:
        count = int(rng.integers(2, 6))
        limb_texture = int(rng.integers(len(TEXTURES)))
        limb_colour = _colour(int(rng.integers(len(HUES))), rng)
        size = radius * rng.uniform(0.55, 0.85)
        for k in range(count):
            angle = turn + 2 * math.pi * k / count + rng.normal(0, 0.25)
            away = np.array([math.cos(angle), math.sin(angle)]) * (0.6 * radius + 0.75 * size)
            points = _turned(SHAPES[limb], angle, size, centre + away)
            _paste(picture, points, tiles, limb_texture, limb_colour, ink, rng)
    stretched = outline * [1.0, rng.uniform(0.7, 1.15)]
    _paste(picture, _turned(stretched, turn, radius, centre), tiles, texture, colour, ink, rng)


def _paste(
    picture: Image.Image,
    points: np.ndarray,
    tiles: _Tiles,
    texture: int,
    colour: Colour,
    ink: float,
    rng: np.random.Generator,
) -> None:
    """Draw one textured outline, with a dark line of ``ink`` times the picture's side, or none."""
    large = picture.width
    low = np.maximum(np.floor(points.min(axis=0)).astype(int) - 2, 0)
    high = np.minimum(np.ceil(points.max(axis=0)).astype(int) + 2, large)
    if (high - low < 2).any():
        return  # a limb outside the picture
    corners = [(float(x), float(y)) for x, y in points - low]
    box = (int(high[0] - low[0]), int(high[1] - low[1]))
    mask = Image.new("L", box, 0)
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    patch = tiles.patch(texture, box, colour, 1.0, rng)
    if ink > 0:
        dark = tuple(round(v * rng.uniform(0.15, 0.5)) for v in colour)
        width = max(2, round(large * ink))
        ImageDraw.Draw(patch).line([*corners, corners[0], corners[1]], fill=dark, width=width)
    picture.paste(patch, (int(low[0]), int(low[1])), mask)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
def build(output_stride: int = OUTPUT_STRIDE) -> nn.Module:
    """The backbone without weights, as timm makes it from ``BACKBONE`` and ``ARGUMENTS``."""
    model: nn.Module = timm.create_model(
        BACKBONE,
        pretrained=False,
        num_classes=0,
        output_stride=output_stride,
        zero_init_last=False,  # blocks that start as identities cost this short a training dearly
        **ARGUMENTS,
    )
    return model


def normalise(images: Tensor) -> Tensor:
    """B x H x W x 3 uint8 to B x 3 x H x W float32 with MEAN and STANDARD_DEVIATION."""
    values = images.permute(0, 3, 1, 2).to(torch.float32) / 255
    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    deviation = torch.tensor(STANDARD_DEVIATION).view(1, 3, 1, 1)
    return ((values - mean) / deviation).contiguous(memory_format=torch.channels_last)


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over columns of the average precision of scores (images x labels); NaN-free.

    Columns without a positive are left out.
    """
    values = []
    for score, label in zip(scores.T, labels.T, strict=True):
        if label.sum() == 0:
            continue
        hits = label[np.argsort(-score, kind="stable")]
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        values.append(float((precision * hits).sum() / hits.sum()))
    return float(np.mean(values))


def _seed_of_validation(seed: int) -> int:
    """Another stream than the training images, which use ``seed`` itself."""
    return seed + 1_000_003


def pretrain(
    output: Path,
    *,
    seed: int = SEED,
    steps: int = STEPS,
    threads: int = THREADS,
    report: Callable[[str], None] | None = None,
    pool: int = _POOL,
    validation: int = _VALIDATION,
) -> None:
    """Pre-train the demo's backbone from scratch and write it as float16 safetensors.

    AdamW with a one-cycle schedule on a pool of rendered images, each seen turned and mirrored at
    random. The header of the file holds the task, seed, steps, threads, versions, timm name and
    arguments, preprocessing and the mean average precision on held-out images.

    Args:
        output: file to write; its folder is made if it is missing. Replaced only when complete.
        seed: at least 0. The same seed, steps, threads and versions give the same weights on the
            same kind of processor.
        steps: optimiser steps of 64 images, at least 1.
        threads: threads of torch, at least 1; put back afterwards.
        report: called with a line of progress now and then.
        pool: number of rendered training images, at least 64.
        validation: number of held-out images, at least 1.

    Raises:
        ClassifierError: if an argument is out of range or the training diverges.
        ArtefactError: if the file cannot be written.
    """
    if seed < 0 or steps < 1 or threads < 1 or pool < _BATCH or validation < 1:
        raise ClassifierError(
            f"seed {seed}, steps {steps}, threads {threads}, pool {pool}, validation {validation}: "
            "seed must be at least 0, steps, threads and validation at least 1, "
            f"pool at least {_BATCH}"
        )
    try:  # before minutes of work, not after
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtefactError(
            f"cannot write {output}: {error.strerror or error}; choose another output folder"
        ) from error
    say = report if report is not None else (lambda line: None)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # timm draws the first weights from the global generator
            backbone = build(PRETRAINING_STRIDE)
            head = nn.Linear(int(backbone.num_features), len(LABELS))  # type: ignore[arg-type]
        scores = _train(backbone, head, seed, steps, pool, validation, say)
    finally:
        torch.set_num_threads(threads_before)
    tensors = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in backbone.state_dict().items()
    }
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ClassifierError(f"{name} does not fit float16; use another seed")
    metadata = {
        "kind": "backbone",
        "task": f"names the {len(SHAPES)} shapes, {len(TEXTURES)} textures, {len(HUES)} colours "
        f"and {len(LIMBS) - 1} kinds of limbs of objects, and the grounds they lie on",
        "made_by": "lpcam pretrain",
        "seed": seed,
        "steps": steps,
        "threads": threads,
        "batch_size": _BATCH,
        "pool": pool,
        "image_size": SIZE,
        "timm_name": BACKBONE,
        "timm_arguments": ARGUMENTS,
        "mean": MEAN,
        "std": STANDARD_DEVIATION,
        "mean_average_precision": {name: round(value, 4) for name, value in scores.items()},
        "validation_images": validation,
        "versions": {name: version(name) for name in ("torch", "timm", "numpy", "pillow")},
        "licence": "Apache-2.0",
    }
    write_tensors(output, tensors, metadata)
    reached = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
    say(f"mean average precision on {validation} held-out images: {reached}; wrote {output}")


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the questions of the cross-entropy; two right answers share the target evenly."""
    losses = [
        cross_entropy(logits[:, c], labels[:, c] / labels[:, c].sum(1, keepdim=True))
        for c in QUESTIONS.values()
    ]
    return torch.stack(losses).sum()


def _train(
    backbone: nn.Module,
    head: nn.Linear,
    seed: int,
    steps: int,
    pool: int,
    validation: int,
    say: Callable[[str], None],
) -> dict[str, float]:
    started = time.monotonic()
    images, labels = (torch.from_numpy(v) for v in render(pool, seed=seed))
    say(f"rendered {pool} images in {time.monotonic() - started:.0f} s")
    generator = torch.Generator().manual_seed(seed)
    backbone.to(memory_format=torch.channels_last)
    backbone.train()
    # Weight decay is for the weights of convolutions only, not for gains and biases.
    parameters = [*backbone.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": _WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=_LEARNING_RATE,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=_LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    order = torch.randperm(pool, generator=generator)
    at = 0
    for step in range(steps):
        if at + _BATCH > pool:
            order, at = torch.randperm(pool, generator=generator), 0
        rows = order[at : at + _BATCH]
        at += _BATCH
        batch = images[rows]
        turn, mirror = torch.randint(0, 4, (2,), generator=generator).tolist()
        batch = torch.rot90(batch, turn, (1, 2))
        if mirror % 2:
            batch = batch.flip(2)
        with torch.autocast("cpu", torch.bfloat16):
            pooled = backbone(normalise(batch))
        loss = _loss(head(pooled.float()), labels[rows])
        if not bool(torch.isfinite(loss)):
            raise ClassifierError(f"the loss is {loss.item()} at step {step}; use another seed")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            left = (time.monotonic() - started) / (step + 1) * (steps - step - 1)
            say(f"step {step + 1} of {steps}, loss {loss.item():.4f}, about {left:.0f} s left")
    backbone.eval()
    held_out, truth = render(validation, seed=_seed_of_validation(seed))
    scores = []
    with torch.no_grad():
        for first in range(0, validation, 2 * _BATCH):
            some = torch.from_numpy(held_out[first : first + 2 * _BATCH])
            scores.append(head(backbone(normalise(some))).numpy())
    found = np.concatenate(scores)
    return {name: average_precision(found[:, c], truth[:, c]) for name, c in QUESTIONS.items()}


def main(arguments: list[str] | None = None) -> None:
    """Command line: ``python -m tools.demo_backbone OUTPUT [--seed --steps --threads]``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("output", type=Path, help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=THREADS)
    options = parser.parse_args(arguments)
    pretrain(
        options.output,
        seed=options.seed,
        steps=options.steps,
        threads=options.threads,
        report=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    main()
