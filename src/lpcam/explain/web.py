"""Shared parts of the report and server pages: templates, styles, and arrays as text."""

from __future__ import annotations

import base64
import io
import zlib
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

QUALITY = 60
"""WebP quality, 0 to 100; a picture of 256 pixels takes about 8 kB. Files grow with it."""
EFFORT = 2
"""WebP method, 0 to 6. 4 takes twice as long for files that are 4 % smaller (0.3 dB better)."""


def page_file(name: str) -> str:
    """The text of a template, style sheet or script of the pages."""
    return resources.files("lpcam.explain").joinpath("pages", name).read_text("utf-8")


def page_environment() -> jinja2.Environment:
    """Jinja environment of the page templates; it escapes every value."""
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(page_file),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def encode_array(values: NDArray[Any], *, level: int = 6) -> dict[str, Any]:
    """A uint8 or uint16 array as shape, type and deflated base64 of its little-endian bytes."""
    data = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes()
    return {
        "shape": list(values.shape),
        "type": values.dtype.name,
        "data": base64.b64encode(zlib.compress(data, level)).decode(),
    }


def encode_unit(values: NDArray[np.floating[Any]], *, level: int = 6) -> dict[str, Any]:
    """Values in [0, 1] as uint8, round(255 * value); values outside are clipped."""
    return encode_array(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8), level=level)


def encode_picture(picture: NDArray[np.uint8], *, quality: int = QUALITY) -> str:
    """An RGB image (H, W, 3) as the data URI of a WebP file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=quality, method=EFFORT)
    return data_uri(buffer.getvalue(), "webp")


def data_uri(data: bytes, kind: str) -> str:
    """The bytes of a picture file, such as "png", as an address that holds them."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
