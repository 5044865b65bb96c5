"""Files in folders of images: every ending that is read is decoded, the others are listed."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpcam.data.image_files import how_to_convert, list_images, unnamed
from lpcam.data.images import IMAGE_FORMATS, IMAGE_SUFFIXES, has_pages, read_image
from lpcam.runtime.errors import ImageError

LOSSLESS = np.zeros((24, 32, 3), np.uint8)
LOSSLESS[:, :16, 0] = LOSSLESS[:12, 16:, 1] = 255  # red, green, black
MODES = {".pgm": "L", ".pbm": "1", ".xbm": "1", ".msp": "1", ".bw": "L"}
UNSAVED = {"SUN", "XPM"}  # Pillow reads them, and writes none


def save(path: Path, ending: str) -> bool:
    """Write a picture as Pillow does for this ending; False where it cannot."""
    image = Image.fromarray(LOSSLESS).convert(MODES.get(ending, "RGB"))
    name = next(name for name, endings in IMAGE_FORMATS.items() if ending in endings.split())
    if ending in (".ico", ".icns"):
        image = image.resize((32, 32))
    with contextlib.suppress(KeyError):  # the format has no writer
        image.save(path, name)
        return True
    return False


@pytest.mark.parametrize("ending", sorted(IMAGE_SUFFIXES))
def test_every_ending_that_pillow_writes_is_read(tmp_path: Path, ending: str) -> None:
    Image.init()
    name = next(name for name, endings in IMAGE_FORMATS.items() if ending in endings.split())
    assert Image.registered_extensions().get(ending, name) in (name, "JPEG", "PPM", "PNG")
    path = tmp_path / f"a{ending.upper()}"
    if not save(path, ending):
        assert name in UNSAVED
        return
    assert [found for found, _ in list_images(tmp_path).images] == [path.name]
    pixels = read_image(path).astype(int)
    assert (pixels[4, 4] > 70).any() and (pixels[-2, -2] < 60).all()
    if ending not in MODES:
        assert np.argmax(pixels[4, 4]) == 0 and np.argmax(pixels[4, -4]) == 1


def test_no_extension_of_pillow_is_overlooked() -> None:
    Image.init()
    known = {e for e, name in Image.registered_extensions().items() if name in Image.OPEN}
    rare = "blp bufr cur dcx fli flc ftc ftu gbr grib iim pcd pxr"
    unread = {ending for ending in known if how_to_convert(f"a{ending}")}
    assert known - IMAGE_SUFFIXES - unread <= {f".{name}" for name in rare.split()}
    assert not unread & IMAGE_SUFFIXES


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.HEIC", "JPEG"),
        ("b/a.dcm", "16 bits"),
        ("a.nii.gz", r"\.nii\.gz .*16 bits"),
        ("a.NPY", "PNG"),
        ("a.CR2", "TIFF"),
        ("a.psd", "PNG"),
        ("a.svs", "tiles"),
        ("a.mp4", "frames"),
        ("a.zip", "unpack"),
        ("a.parquet", "to files"),
        ("a.eps", "PNG"),
    ],
)
def test_what_is_not_read_is_listed_with_what_makes_an_image_of_it(
    tmp_path: Path, name: str, remedy: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    save(tmp_path / name, ".png")  # whatever the content: the ending says what a user means
    found = list_images(tmp_path)
    assert not found.images and not found.notices
    (skip,) = found.unread
    assert skip.id == name
    with pytest.raises(AssertionError, match=remedy):
        raise AssertionError(skip.reason)


def test_content_decides_where_the_ending_says_nothing(tmp_path: Path) -> None:
    for name in ("9f3a", "photo.jpg_large", "cow.7", "cow.8"):
        save(tmp_path / name, ".jpg")
    for name in ("README", "Thumbs.db", "desktop.ini", "notes.txt", "empty"):
        (tmp_path / name).write_bytes(b"" if name == "empty" else b"\x0a\x05\x01 no image")
    found = list_images(tmp_path)
    assert [name for name, _ in found.images] == ["9f3a", "cow.7", "cow.8", "photo.jpg_large"]
    by_content, others = found.notices
    assert "4 (9f3a, cow.7, cow.8" in by_content
    for text in ("5 (", "README 1", ".db 1", ".ini 1", ".txt 1", "empty 1"):
        assert text in others


def test_hidden_files_and_folders_are_counted(tmp_path: Path) -> None:
    for name in ("._a.jpg", "__MACOSX/a.jpg", ".git/a.png", "b/.DS_Store", "b/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / name, ".jpg")
    found = list_images(tmp_path)
    assert [name for name, _ in found.images] == ["b/c.jpg"]
    (notice,) = found.notices
    assert "4 (._a.jpg, .git, __MACOSX, b/.DS_Store)" in notice


def test_images_that_nothing_names(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.png", "c.heic", ".d.jpg", "e.txt"):
        save(tmp_path / name, ".jpg")
    (notice,) = unnamed([tmp_path / "a.jpg"], "no annotation")
    assert "no annotation names: 2 (b.png, c.heic)" in notice
    assert unnamed(tmp_path.iterdir(), "no annotation") == ()


def test_a_file_called_image_is_not_given_to_another_program(tmp_path: Path) -> None:
    """Pillow reads EPS by running Ghostscript, whatever the file is called."""
    path = tmp_path / "a.jpg"
    Image.fromarray(LOSSLESS).save(path, "EPS")
    with pytest.raises(ImageError, match=r"a\.jpg"):
        read_image(path)
    (tmp_path / "b.jpg").write_text("<!DOCTYPE html><title>404</title>")
    with pytest.raises(ImageError, match=r"b\.jpg"):
        read_image(tmp_path / "b.jpg")


@pytest.mark.parametrize(("ending", "several"), [(".gif", True), (".tif", True), (".png", True)])
def test_pages_and_frames_are_told(tmp_path: Path, ending: str, several: bool) -> None:
    frames = [Image.fromarray(LOSSLESS), Image.fromarray(LOSSLESS[::-1])]
    frames[0].save(tmp_path / f"a{ending}", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / f"b{ending}")
    assert has_pages(tmp_path / f"a{ending}") is several
    assert has_pages(tmp_path / f"b{ending}") is False
