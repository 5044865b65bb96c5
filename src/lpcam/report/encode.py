"""Pictures and arrays as text that a page can hold."""

from __future__ import annotations

import base64
import io
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

QUALITY = 60
"""Of WebP, 0 to 100: a thumbnail of 256 pixels takes about 8 kB."""


def encode_array(values: NDArray[Any]) -> dict[str, Any]:
    """A uint8 or uint16 array as shape, type and deflated base64 of its little-endian bytes."""
    if values.dtype not in (np.uint8, np.uint16):
        raise TypeError(f"a page holds uint8 and uint16 arrays, not {values.dtype}")
    data = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes()
    return {
        "shape": list(values.shape),
        "type": values.dtype.name,
        "data": base64.b64encode(zlib.compress(data, 9)).decode(),
    }


def encode_unit(values: NDArray[np.floating[Any]]) -> dict[str, Any]:
    """An array of values in [0, 1] in 255 steps; what lies outside is clipped."""
    return encode_array(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8))


def encode_picture(picture: NDArray[np.uint8]) -> str:
    """An RGB image (H, W, 3) as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def fit(picture: NDArray[np.uint8], long_side: int) -> NDArray[np.uint8]:
    """An image (H, W, 3) with its long side at most ``long_side`` pixels (Lanczos)."""
    height, width = picture.shape[:2]
    if max(height, width) <= long_side:
        return picture
    scale = long_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
