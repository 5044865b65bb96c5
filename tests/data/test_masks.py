"""Seeds, mask values, palette PNGs, pictures, and masks of a folder."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lpcam.data.dataset import ClassTable, Dataset, Item, with_mask_folder
from lpcam.data.drawing import overlay, overlay_mask
from lpcam.data.masks import read_index_mask, voc_palette, write_mask
from lpcam.method.seeds import seeds, to_mask
from lpcam.runtime.errors import DataError

CLASSES = ClassTable(("cat", "cow", "dog"), (8, 10, 12))


def test_palette_is_that_of_voc() -> None:
    palette = voc_palette()
    assert palette.shape == (256, 3) and palette.dtype == np.uint8
    assert palette[[0, 1, 2, 7]].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128] * 3]
    assert palette[[8, 15, 16]].tolist() == [[64, 0, 0], [192, 128, 128], [0, 64, 0]]
    assert palette[[20, 255]].tolist() == [[0, 64, 128], [224, 224, 192]]
    assert len({tuple(colour) for colour in palette.tolist()}) == 256


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_seeds_by_hand(dtype: torch.dtype) -> None:
    # columns: below, equal to the threshold, first plane, second plane, tie of the planes
    maps = torch.tensor([[[0.1, 0.3, 0.6, 0.2, 0.7]], [[0.2, 0.1, 0.4, 0.9, 0.7]]], dtype=dtype)
    assert torch.equal(seeds(maps, 0.3), torch.tensor([[0, 0, 1, 2, 1]]))


def test_seeds_without_a_class_and_of_a_wrong_shape() -> None:
    assert seeds(torch.zeros(0, 2, 3), 0.3).tolist() == [[0, 0, 0], [0, 0, 0]]
    with pytest.raises(DataError, match=r"\(2, 3\)"):
        seeds(torch.zeros(2, 3), 0.3)


def test_to_mask_gives_mask_ids() -> None:
    mask = to_mask(torch.tensor([[0, 1, 2]]), torch.tensor([2, 0]), CLASSES)
    assert mask.dtype == np.uint8 and mask.tolist() == [[0, 12, 8]]
    assert to_mask(torch.tensor([[0]]), np.zeros(0, np.int64), CLASSES).tolist() == [[0]]


def test_ignore_lies_between_the_two_thresholds() -> None:
    maps = torch.tensor([[[0.05, 0.1, 0.2, 0.3, 0.31]], [[0.01, 0.1, 0.0, 0.2, 0.2]]])
    keys = torch.tensor([1, 2])
    mask = to_mask(seeds(maps, 0.3), keys, CLASSES, maps=maps, ignore_threshold=0.1)
    assert mask.tolist() == [[0, 0, 255, 255, 10]]
    nothing = torch.zeros(0, 1, 2)
    seed = seeds(nothing, 0.3)
    mask = to_mask(seed, keys[:0], CLASSES, maps=nothing, ignore_threshold=0.1)
    assert mask.tolist() == [[0, 0]]


def test_written_mask_is_a_palette_png_of_the_same_values(tmp_path: Path) -> None:
    mask = np.arange(256, dtype=np.uint8).reshape(8, 32)
    for values in (mask, np.zeros((1, 1), np.uint8), mask[:1, :2]):
        path = tmp_path / "new" / "mask.png"
        write_mask(path, values)
        np.testing.assert_array_equal(read_index_mask(path), values)
        with Image.open(path) as image:
            assert image.mode == "P"
            rgb = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(rgb, voc_palette()[values])


def test_overlay_is_warm_and_light_where_the_map_is_high() -> None:
    image = np.full((1, 11, 3), 128, dtype=np.uint8)
    heat = np.linspace(0, 1, 11, dtype=np.float32)[None]
    drawn = overlay(image, heat, opacity=1.0)
    assert drawn.dtype == np.uint8 and drawn.shape == image.shape
    lightness = drawn[0].astype(float) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness[3:]) > 0).all()
    assert (np.diff(drawn[0, :, 0].astype(int)) >= 0)[3:].all()
    np.testing.assert_array_equal(overlay(image, heat, opacity=0.0), image)


def test_overlay_mask_by_hand() -> None:
    image = np.full((1, 3, 3), 100, dtype=np.uint8)
    drawn = overlay_mask(image, np.array([[0, 1, 255]], dtype=np.uint8), opacity=0.5)
    assert drawn.tolist() == [[[100, 100, 100], [114, 50, 50], [162, 162, 146]]]


def dataset(*ids: str) -> Dataset:
    items = {name: Item(name, Path(f"{name}.jpg"), (0,), Path("old.png")) for name in ids}
    return Dataset("d", ClassTable(("cow",), (1,)), items, {"all": ids}, "labels")


def test_masks_are_found_by_id_and_by_the_numbers_of_coco(tmp_path: Path) -> None:
    names = ["barn/cow 7", "COCO_train2014_000000000009", "COCO_train2014_000000000010", "other"]
    for name in ("barn/cow 7", "9", "000000000010"):
        write_mask(tmp_path / f"{name}.png", np.zeros((2, 2), np.uint8))
    found = with_mask_folder(dataset(*names), tmp_path)
    masks = [found.items[name].mask for name in names]
    expected = [tmp_path / f"{name}.png" for name in ("barn/cow 7", "9", "000000000010")]
    assert masks == [*expected, None]  # an image of another has none, not the old one


def test_endings_in_capitals_and_decomposed_names_are_read(tmp_path: Path) -> None:
    names = ["Kühe/Kälbchen 1", "cow.2"]
    mask = np.zeros((2, 2), np.uint8)
    files = [tmp_path / f"{unicodedata.normalize('NFD', names[0])}.png", tmp_path / "cow.2.PNG"]
    for path in files:
        write_mask(path.with_suffix(".png"), mask)
        path.with_suffix(".png").rename(path)
    found = with_mask_folder(dataset(*names), tmp_path)
    assert [found.items[name].mask for name in names] == files


def test_a_folder_without_masks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing"):
        with_mask_folder(dataset("a"), tmp_path / "missing")
    write_mask(tmp_path / "b.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(DataError, match=r"a\.png"):
        with_mask_folder(dataset("a"), tmp_path)
