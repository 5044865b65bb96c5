"""What the report shows of segmenters: which images, their scores and their pictures."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.data.dataset import ClassTable, Item
from lpcam.data.masks import write_mask
from lpcam.report.segmenters import (
    PICTURE,
    SegmenterResults,
    TrainedSegmenter,
    choose_images,
    image_miou,
    segmenter_records,
)
from lpcam.runtime.distributed import Sharing
from lpcam.runtime.errors import DataError

CLASSES = ClassTable(("cat", "dog"), (3, 7))


def item(name: str, mask: Path | None = None) -> Item:
    return Item(name, Path(name), (), mask)


def mask(*values: int) -> np.ndarray:
    return np.array([values], np.uint8)


def test_the_miou_of_an_image_by_hand() -> None:
    # background 1 of 3, cat 1 of 2, dog 0 of 1: marked, but not there
    truth, found = mask(0, 0, 3, 255, 9, 3), mask(0, 7, 3, 3, 7, 0)
    assert image_miou(found, truth, CLASSES) == pytest.approx((1 / 3 + 1 / 2 + 0) / 3)
    assert image_miou(truth[:, :3], truth[:, :3], CLASSES) == 1
    # without an object background alone counts
    assert image_miou(mask(0, 0), mask(0, 255), CLASSES) == 1
    assert image_miou(mask(0, 3), mask(255, 9), CLASSES) is None


def test_gains_and_losses_come_first() -> None:
    items = [item(f"{number:02d}") for number in range(40)]
    scores = {
        "cam": {f"{n:02d}": 0.5 for n in range(20)} | {"19": None},
        "lpcam": {f"{n:02d}": 0.5 + 0.01 * (n - 10) for n in range(20)},
    }
    found = choose_images(items, scores, 12)
    first = [f"{kind} {one.id}" for kind, one in found[:4]]
    assert first == ["gain 18", "gain 17", "loss 00", "loss 01"]
    even = [one.id for kind, one in found if kind == "even"]
    # every 4.5th of the 36 others, in list order: images without truth are among them
    assert even == ["02", "06", "11", "15", "22", "26", "31", "35"]


@pytest.fixture
def trained(tmp_path: Path) -> SegmenterResults:
    """Of a, all is right on LPCAM's masks; b has no truth. An image has two halves."""
    items = []
    for name, size in (("a", (300, 400)), ("b", (40, 30))):
        image, true = tmp_path / f"{name}.png", tmp_path / f"{name} mask.png"
        Image.new("RGB", size[::-1], (100, 100, 100)).save(image)
        halves = np.zeros(size, np.uint8)
        halves[:, size[1] // 2 :] = 3
        with_others = halves.copy()
        with_others[:9] = 9
        write_mask(true, with_others)
        items.append(Item(name, image, (0,), true if name == "a" else None))
        write_mask(tmp_path / "cam" / f"{name}.png", np.zeros(size, np.uint8))
        write_mask(tmp_path / "lpcam" / f"{name}.png", halves)
    made = [
        TrainedSegmenter(name, f"{name.upper()} + IRN", 10, tmp_path / name)
        for name in ("cam", "lpcam")
    ]
    history = {"cam": [{"step": 1, "loss": 0.5}]}
    return SegmenterResults(made, [], items, history, {"network": "DeepLabV2"})


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


def test_records_have_masks_in_their_colours(trained: SegmenterResults) -> None:
    found = segmenter_records(trained, CLASSES, Sharing())
    assert found["teachers"][1] == {"name": "lpcam", "title": "LPCAM + IRN", "images": 10}
    assert found["network"] == "DeepLabV2" and found["images_total"] == 2
    assert found["history"] == trained.history
    first, second = found["images"]
    assert [one["kind"] for one in found["images"]] == ["gain", "even"]
    assert (first["width"], first["height"]) == (PICTURE, PICTURE * 3 // 4)
    # half of the image is background, of which CAM's finds all, and nothing else
    assert first["miou"] == {"cam": pytest.approx(0.25), "lpcam": 1}
    assert first["masks"]["cam"]["classes"] == [] and first["masks"]["lpcam"]["classes"] == [0]
    assert first["truth"]["ignored"] and not first["masks"]["lpcam"]["ignored"]
    drawn = pixels(first["masks"]["lpcam"]["picture"])
    assert drawn.shape == (PICTURE * 3 // 4, PICTURE, 3)
    # 0.4 grey and 0.6 of colour 3 of the VOC palette, (128, 128, 0)
    assert np.abs(drawn[60, 150].astype(int) - (117, 117, 40)).max() < 12
    assert np.abs(drawn[60, 20].astype(int) - 100).max() < 12
    assert np.ptp(pixels(first["masks"]["cam"]["picture"])[:, :, 0]) < 12

    assert second["truth"] is None and second["miou"] == {}
    assert second["masks"]["lpcam"]["classes"] == [0]


def test_a_missing_mask_is_named(trained: SegmenterResults) -> None:
    path = trained.segmenters[0].folder / "b.png"
    path.unlink()
    with pytest.raises(DataError, match=path.name):
        segmenter_records(trained, CLASSES, Sharing())
