"""Inputs of the benchmarks that read images: real photographs, or seeded images of their sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from lpcam.classifiers.classifier import RANDOM, BackboneSpec, Classifier, build
from lpcam.data.dataset import Item
from lpcam.data.images import IMAGE_SUFFIXES, read_image
from lpcam.data.voc import read_voc
from lpcam.pipeline.recipe import load_recipe

RECIPE = "voc_animals"
SIZES = ((375, 500), (375, 500), (500, 375), (333, 500), (375, 500), (500, 333), (400, 500))
"""Height and width of VOC's photographs: the commonest, about as often as they come."""


@dataclass(frozen=True)
class Photographs:
    """Items, the names of their classes, and whether they are real."""

    items: list[Item]
    classes: tuple[str, ...]
    real: bool

    def describe(self) -> str:
        """In words, for the line above a table."""
        if self.real:
            return f"{len(self.items)} images of the given folder"
        return f"{len(self.items)} seeded images of VOC's sizes (no `--data` was given)"


@contextmanager
def photographs(
    data: str | None, name: str, count: int | None, side: int = 500
) -> Iterator[Photographs]:
    """Images of a list of a VOC folder, or seeded ones in a temporary folder.

    Args:
        data: the folder VOC2012, or any folder of images, which then have no labels that mean
            anything; None draws images.
        name: of the list.
        count: how many, evenly spread over the list; None takes all (64 seeded ones).
        side: long side of the seeded images.
    """
    if data is not None and not (Path(data) / "ImageSets").is_dir():
        paths = sorted(p for p in Path(data).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        step = max(1, len(paths) // (count or len(paths) or 1))
        items = [Item(path.stem, path, (0,)) for path in paths[::step][:count]]
        yield Photographs(items, ("any",), real=True)
        return
    if data is not None:
        dataset = read_voc(Path(data), lists=[name], classes=load_recipe(RECIPE).data.classes)
        items = [item for item in dataset.select(name) if item.labels]
        if count is not None and count < len(items):
            items = [items[place * len(items) // count] for place in range(count)]
        yield Photographs(items, dataset.classes.names, real=True)
        return
    classes = tuple(load_recipe(RECIPE).data.classes or ())
    with TemporaryDirectory() as folder:
        yield Photographs(_draw(Path(folder), count or 64, len(classes), side), classes, real=False)


def _draw(folder: Path, count: int, classes: int, side: int) -> list[Item]:
    generator = np.random.default_rng(0)
    items = []
    for number in range(count):
        height, width = (length * side // 500 for length in SIZES[number % len(SIZES)])
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        )
        noise = generator.integers(-12, 13, smooth.shape)
        path = folder / f"{number:04d}.jpg"
        image = np.clip(smooth + noise, 0, 255).astype(np.uint8)
        Image.fromarray(image).save(path, quality=92)
        chosen = generator.choice(classes, size=1 + number % 2, replace=False)
        items.append(Item(path.stem, path, tuple(sorted(chosen.tolist()))))
    return items


def classifier(weights: str | None, classes: tuple[str, ...], *, quick: bool = False) -> Classifier:
    """The classifier of the recipe ``voc_animals``, with a seeded head.

    Args:
        weights: safetensors file of the backbone; None: seeded random weights.
        quick: timm's smallest backbone instead.
    """
    section = load_recipe(RECIPE).classifier
    spec = BackboneSpec(section.backbone, section.arguments, section.output_stride, section.dilated)
    if quick:
        spec = BackboneSpec("test_resnet", {}, 16)
        weights = None
    return build(spec, classes, weights=weights or RANDOM, mean=section.mean, std=section.std)


def equal_size(items: list[Item], classifier_: Classifier, size: tuple[int, int]) -> np.ndarray:
    """The items' images resized to one size, normalised: (B, 3, H, W) float32."""
    height, width = size
    images = []
    for item in items:
        resized = Image.fromarray(read_image(item.image)).resize((width, height))
        images.append(classifier_.preprocessing(np.array(resized)).numpy())
    return np.stack(images)
