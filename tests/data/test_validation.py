"""Checking a data set: unreadable images go, masks must fit, nothing is read twice."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.data.dataset import Item
from lpcam.data.folder import read_folder
from lpcam.data.images import read_image
from lpcam.data.validation import check_images
from lpcam.runtime.errors import DataError
from lpcam.runtime.files import digest_file


def mask_of(shape: tuple[int, int], value: int = 1) -> Image.Image:
    return Image.fromarray(np.full(shape, value, dtype=np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("images", "masks", "parts", "lists"):
        (tmp_path / folder).mkdir()
    for number, name in enumerate("abc"):
        Image.new("RGB", (6, 4 + number), "red").save(tmp_path / "images" / f"{name}.png")
    mask_of((4, 6)).save(tmp_path / "masks" / "a.png")
    mask_of((4, 6)).save(tmp_path / "parts" / "a.png")
    (tmp_path / "parts.json").write_text('{"head": 1}')
    (tmp_path / "labels.csv").write_text("image,labels\na,cow\nb,cow\nc,cow\n")
    (tmp_path / "lists" / "train.txt").write_text("c\nb\n")
    return tmp_path


def test_records(root: Path) -> None:
    dataset = read_folder(root)
    calls: list[tuple[int, str]] = []
    checked, records = check_images(dataset, advance=lambda *done: calls.append(done))
    assert checked == dataset
    assert calls == [(1, "")] * 3
    assert [(r["height"], r["width"]) for r in records.values()] == [(4, 6), (5, 6), (6, 6)]
    for name, record in records.items():
        assert record["image_digest"] == digest_file(root / "images" / f"{name}.png")
        assert (record["digest"] == record["image_digest"]) == (name != "a")


def test_unchanged_files_are_not_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = read_folder(root)
    _, records = check_images(dataset)
    read: list[Path] = []
    monkeypatch.setattr(
        Item, "read", lambda item: read.append(item.image) or read_image(item.image)
    )
    assert check_images(dataset, records)[1] == records
    assert read == []
    # another mask, another time of change of an image, a mask where there was none
    mask_of((4, 6), value=2).save(root / "masks" / "a.png")
    os.utime(root / "masks" / "a.png", ns=(1, 1))
    os.utime(root / "images" / "b.png", ns=(1, 1))
    mask_of((6, 6)).save(root / "masks" / "c.png")
    again = check_images(read_folder(root), records)[1]
    assert read == [root / "images" / f"{name}.png" for name in "abc"]
    assert [again[i]["digest"] == records[i]["digest"] for i in "abc"] == [False, True, False]
    assert again["a"]["image_digest"] == records["a"]["image_digest"]


def test_unreadable_image_leaves_items_and_lists(root: Path) -> None:
    path = root / "images" / "b.png"
    path.write_bytes(path.read_bytes()[:45])
    (root / "images" / "a.png").unlink()
    (root / "images" / "a.jpg").symlink_to(root / "nowhere.jpg")
    checked, records = check_images(read_folder(root))
    assert list(checked.items) == list(records) == ["c"]
    assert checked.lists == {"train": ("c",), "all": ("c",)}
    reasons = {skip.id: skip.reason for skip in checked.skipped}
    assert len(reasons) == 2 and "No such file" in reasons["a"] and "b.png" in reasons["b"]


@pytest.mark.parametrize("folder", ["masks", "parts"])
def test_wrong_mask_names_item_and_sizes(root: Path, folder: str) -> None:
    path = root / folder / "a.png"
    what = {"masks": "mask", "parts": "part mask"}[folder]
    mask_of((6, 4)).save(path)
    with pytest.raises(DataError, match=rf"^{what} of 'a': .*a\.png is 6 x 4 .* 4 x 6"):
        check_images(read_folder(root))
    path.write_bytes(b"text")
    with pytest.raises(DataError, match=f"^{what} of 'a': .*not an image"):
        check_images(read_folder(root))
    dataset = read_folder(root)
    path.unlink()
    with pytest.raises(DataError, match=f"^{what} of 'a': .*No such file"):
        check_images(dataset)


def test_several_readers_find_the_same_in_the_same_order(root: Path) -> None:
    for number in range(12):
        path = root / "images" / f"d{number:02d}.png"
        Image.new("RGB", (5 + number, 4)).save(path)
        if number % 3 == 0:
            path.write_bytes(path.read_bytes()[:40])
        with (root / "labels.csv").open("a") as file:
            file.write(f"d{number:02d},cow\n")
    dataset = read_folder(root)
    checked, records = check_images(dataset, workers=3)
    assert [skip.id for skip in checked.skipped] == ["d00", "d03", "d06", "d09"]
    assert list(records) == list(checked.items) == [i for i in dataset.items if i in records]
    assert records["d07"]["width"] == 12
    for name in ("a", "d05"):  # the first error in order, whichever thread is the first
        mask_of((9, 9)).save(root / "masks" / f"{name}.png")
    with pytest.raises(DataError, match=r"^mask of 'a': "):
        check_images(read_folder(root), workers=3)
