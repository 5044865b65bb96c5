"""Images of every kind come out as upright RGB; masks as the values stored in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from lpcam.data.images import limit_long_side, read_image
from lpcam.data.masks import read_index_mask
from lpcam.runtime.errors import DataError, ImageError

EXIF_ORIENTATION = 0x0112


def picture(height: int = 6, width: int = 8) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def test_rgb_is_exact_and_writable(tmp_path: Path) -> None:
    read = read_image(save(tmp_path / "a b 牛.png", Image.fromarray(picture())))
    np.testing.assert_array_equal(read, picture())
    assert read.dtype == np.uint8 and read.flags.writeable and read.flags.c_contiguous


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = picture()
    # what a camera stores so that the orientation's turn gives the upright picture
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    path = save(tmp_path / "turned.png", image, exif=exif)
    np.testing.assert_array_equal(read_image(path), upright)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257], [1000, 32768, 65406, 65535]], dtype=np.uint16)
    expected = np.array([[0, 0, 1, 1], [4, 128, 254, 255]], dtype=np.uint8)
    for suffix in ("png", "tif"):
        read = read_image(save(tmp_path / f"grey.{suffix}", Image.fromarray(values)))
        for channel in range(3):
            np.testing.assert_array_equal(read[:, :, channel], expected)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.full((4, 5, 3), 255, dtype=np.uint8)).convert(mode)
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    read = read_image(save(tmp_path / f"image.{suffix}", image))
    assert read.shape == (4, 5, 3) and read.min() >= 250


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_pixels_lie_over_white(tmp_path: Path, mode: str) -> None:
    values = np.zeros((1, 3, 4), dtype=np.uint8)
    values[0, :, 3] = (0, 128, 255)
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8))
        image.putpalette([0] * 9)
        path = save(tmp_path / "image.png", image, transparency=bytes([0, 128, 255]))
    elif mode == "PA":
        path = save(tmp_path / "image.tif", Image.fromarray(values).convert("LA"))
    else:
        path = save(tmp_path / "image.png", Image.fromarray(values).convert(mode))
    assert read_image(path)[0, :, 0].tolist() == [255, 127, 0]


def test_no_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="Is a directory"):
        read_image(tmp_path)
    path = tmp_path / "image.jpg"
    for data, reason in (
        (None, "No such file"),
        (b"", "the file is empty"),
        (b"not an image at all", "damaged or not an image"),
        (b"GIF89a\x00\x00\x00\x00\x00\x00\x00", "."),
    ):
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ImageError, match=rf"cannot read image .*image\.jpg: .*{reason}"):
            read_image(path)


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "bmp"])
def test_truncated_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    whole = save(tmp_path / f"whole.{suffix}", Image.fromarray(picture(40, 50))).read_bytes()
    path = tmp_path / f"short.{suffix}"
    for part in (0.02, 0.1, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(ImageError, match=f"short.{suffix}"):
            read_image(path)


def test_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "large.png", Image.new("1", (300, 200)))
    monkeypatch.setattr("lpcam.data.images.MAXIMUM_PIXELS", 59_999)
    with pytest.raises(ImageError, match=r"300 x 200 .*59,999"):
        read_image(path)
    monkeypatch.setattr("lpcam.data.images.MAXIMUM_PIXELS", 60_000)
    assert read_image(path).shape == (200, 300, 3)


@pytest.mark.parametrize("values", [np.zeros((2, 2), np.float32), np.full((2, 2), 70000, np.int32)])
def test_values_of_unknown_range_are_refused(tmp_path: Path, values: NDArray[np.generic]) -> None:
    path = save(tmp_path / "values.tif", Image.fromarray(values))
    with pytest.raises(ImageError, match="unknown range"):
        read_image(path)


def test_mask_gives_palette_indices(tmp_path: Path) -> None:
    values = np.array([[0, 1, 20], [254, 255, 7]], dtype=np.uint8)
    image = Image.fromarray(values)
    grey = save(tmp_path / "grey.png", image)
    image.putpalette([i for colour in range(255, -1, -1) for i in (colour, 0, 9)])
    palette = save(tmp_path / "palette.png", image)
    for path in (grey, palette):
        read = read_index_mask(path)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize("values", [np.array([[True, False]]), np.array([[3, 255]], np.uint16)])
def test_mask_of_1_and_16_bits(tmp_path: Path, values: NDArray[Any]) -> None:
    path = save(tmp_path / "mask.png", Image.fromarray(values))
    assert read_index_mask(path).tolist() == values.astype(int).tolist()


@pytest.mark.parametrize(
    ("image", "suffix", "message"),
    [
        (Image.new("RGB", (2, 2)), "png", r"holds colours \(mode RGB\)"),
        (Image.new("RGBA", (2, 2)), "png", r"holds colours \(mode RGBA\)"),
        (Image.new("L", (2, 2)), "jpg", "JPEG, whose values are not exact"),
        (Image.fromarray(np.array([[1, 256]], dtype=np.uint16)), "png", "values from 1 to 256"),
    ],
)
def test_wrong_masks_say_what_to_save(
    tmp_path: Path, image: Image.Image, suffix: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_index_mask(save(tmp_path / f"mask.{suffix}", image))


def test_long_side_is_limited_and_never_enlarged() -> None:
    assert limit_long_side(picture(40, 80), 20).shape == (10, 20, 3)
    assert limit_long_side(picture(80, 30), 20).shape == (20, 8, 3)
    assert limit_long_side(picture(1, 80), 20).shape == (1, 20, 3)
    image = picture(20, 10)
    assert limit_long_side(image, 20) is image
