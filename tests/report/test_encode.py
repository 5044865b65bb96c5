"""Arrays and pictures as text: what comes back is what went in."""

from __future__ import annotations

import base64
import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image

from lpcam.report.encode import encode_array, encode_picture, encode_unit, fit


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_arrays_come_back(dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 200, (3, 5, 7)).astype(dtype)
    values[0, 0, 0] = np.iinfo(dtype).max
    found = json.loads(json.dumps(encode_array(values)))
    data = zlib.decompress(base64.b64decode(found["data"]))
    little = np.dtype(found["type"]).newbyteorder("<")
    assert np.array_equal(np.frombuffer(data, little).reshape(found["shape"]), values)
    assert found["type"] == np.dtype(dtype).name


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="uint8 and uint16 arrays, not float32"):
        encode_array(np.zeros(3, np.float32))


def test_unit_values_are_rounded_and_clipped() -> None:
    found = encode_unit(np.array([-0.5, 0.0, 0.5, 1.0, 1.5, 0.4999 / 255]))
    data = zlib.decompress(base64.b64decode(found["data"]))
    assert list(data) == [0, 0, 128, 255, 255, 0]


def test_pictures_are_webp_of_the_same_size() -> None:
    picture = np.full((20, 30, 3), (200, 100, 50), np.uint8)
    head, _, data = encode_picture(picture).partition(",")
    assert head == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert (image.format, image.size) == ("WEBP", (30, 20))
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - picture).max() < 8


@pytest.mark.parametrize(
    ("size", "expected"), [((50, 100), (50, 100)), ((200, 100), (100, 50)), ((3, 1000), (1, 100))]
)
def test_fit_shrinks_and_never_enlarges(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fit(np.zeros((*size, 3), np.uint8), 100).shape[:2] == expected
