"""Masks as YOLO segmentation labels: a text file an image, a line an outline.

A line has the class index and the outline's points over the width and height of the image. Readers
draw the outline with the pixels that it runs through, so the points are those of pixels, not of
their outer edges.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import yaml

from lpcam.data.items import ClassTable
from lpcam.formats.outlines import outlines
from lpcam.formats.regions import Region

WITHIN_PIXEL = 0.45
"""Where in a pixel its point lies. The middle is 0.5; a little less, and readers that round find
the same pixel as those that cut the fraction off."""


def below_images(image_id: str) -> str:
    """An id without a leading ``images/``, as the folder of the copies has that name itself."""
    return image_id.removeprefix("images/")


def label_lines(regions: Sequence[Region], size: tuple[int, int]) -> str:
    """The label file of an image: a line for each piece of each object.

    YOLO has one outline a line and no holes, so an object in several pieces (also those that touch
    at a corner alone) is several lines, and holes are cut open.

    Args:
        size: (height, width) of the image.
    """
    height, width = size
    lines = []
    for region in regions:
        for outline in outlines(region.pixels, "centres"):
            points = outline + np.array((region.x0, region.y0)) + WITHIN_PIXEL
            # 6 decimals are 0.05 pixels in an image of 50,000
            places = " ".join(f"{value:.6f}" for value in (points / (width, height)).ravel())
            lines.append(f"{region.label} {places}\n")
    return "".join(lines)


def data_file(classes: ClassTable) -> str:
    """``data.yaml``: names by class index; training and validation are the folder ``images``.

    It holds no path of the folder itself: Ultralytics then takes the folder of the file.
    """
    data = {"train": "images", "val": "images", "names": dict(enumerate(classes.names))}
    text: str = yaml.safe_dump(data, allow_unicode=True, sort_keys=False)
    return text
