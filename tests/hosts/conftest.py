"""Images and masks that the tests of hosts share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.data.dataset import Item
from lpcam.data.folder import read_folder


@pytest.fixture
def items(pictures: Path) -> list[Item]:
    """The tiny images; one has no label."""
    return list(read_folder(pictures).items.values())


@pytest.fixture
def labelled(items: list[Item], tmp_path: Path) -> list[tuple[Item, Path]]:
    """The tiny images with their masks as ternary labels, a frame of each ignored."""
    folder = tmp_path / "labels"
    folder.mkdir()
    for item in items:
        assert item.mask is not None
        label = np.array(Image.open(item.mask))
        label[:, :3] = 255
        Image.fromarray(label).save(folder / f"{item.id}.png")
    return [(item, folder / f"{item.id}.png") for item in items]
