"""Reading image files safely: upright 8-bit RGB (height, width, 3), index masks, sizes."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lpcam.data.dataset import IMAGE_FORMATS
from lpcam.data.resize import scaled_size
from lpcam.runtime.errors import ImageError, shortened

MAXIMUM_PIXELS = 100_000_000  #: Size of the largest image that is read; 300 MB as RGB.


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image file as upright RGB, uint8 (H, W, 3).

    16-bit values are scaled (65535 becomes 255), grey, palette, 1-bit and CMYK are converted, and
    transparent pixels are blended with white. Of several pages or an animation the first is read.

    Raises:
        ImageError: naming the file and the reason, if it cannot be read, is larger than
            `MAXIMUM_PIXELS` or has 32-bit values whose range is unknown.

    Example:
        >>> path = getfixture("tmp_path") / "a.png"
        >>> Image.new("RGB", (1, 2), "red").save(path)
        >>> read_image(path).tolist()
        [[[255, 0, 0]], [[255, 0, 0]]]
    """
    return decode_image(path, str(path))


def decode_image(
    source: Path | bytes, name: str, *, formats: tuple[str, ...] | None = None
) -> NDArray[np.uint8]:
    """Decode a file or its bytes as `read_image` does; ``formats`` are Pillow's, None: all."""
    image = load_image(source, name, formats)
    try:
        return to_rgb(image)
    except (ValueError, OSError) as error:
        raise _unreadable(name, error) from error


@cache
def _formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read and that this Pillow can read."""
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def is_image(path: Path) -> bool:
    """Whether a file is an image by its header, in a format that its first bytes identify."""
    known = [name for name in _formats() if name not in ("ICO", "PCX", "MSP", "TGA")]
    with contextlib.suppress(Exception), Image.open(path, formats=known):
        return True
    return False


def has_pages(path: Path) -> bool:
    """Whether a file has several pages or frames; the second picture of MPO photographs is none."""
    with contextlib.suppress(Exception), Image.open(path, formats=_formats()) as image:
        return image.format != "MPO" and getattr(image, "is_animated", False)
    return False


def pages_notice(names: Sequence[str]) -> str:
    """A notice that names the images of several pages or frames."""
    of_all = f"{len(names)} ({shortened(names)})"
    return f"images of several pages or frames, of which the first is read: {of_all}"


def upright_size(path: Path) -> tuple[int, int]:
    """(height, width) of an upright image, from its file's header; ImageError if unreadable."""
    try:
        with Image.open(path, formats=_formats()) as image:
            width, height = image.size
            turn = 1
            with contextlib.suppress(Exception):  # damaged EXIF
                turn = image.getexif().get(ExifTags.Base.Orientation, 1)
            # Pillow gives the upright size of a TIFF, and the stored size of other files.
            turned = image.format != "TIFF" and turn in (5, 6, 7, 8)
    except Exception as error:  # decoders raise anything on damaged data
        raise _unreadable(path, error) from error
    return (width, height) if turned else (height, width)


def resize_image(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize a uint8 image (H, W, 3) to ``size`` = (height, width) by Pillow's bicubic filter."""
    height, width = size
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def limit_long_side(image: NDArray[np.uint8], maximum: int) -> NDArray[np.uint8]:
    """Shrink an image (H, W, 3) whose longer side exceeds ``maximum`` pixels to that length."""
    return image if max(image.shape[:2]) <= maximum else resize_long_side(image, maximum)


def resize_long_side(image: NDArray[np.uint8], long_side: int) -> NDArray[np.uint8]:
    """Enlarge or shrink an image (H, W, 3) so that its longer side is ``long_side`` pixels."""
    height, width = image.shape[:2]
    return resize_image(image, scaled_size(height, width, long_side / max(height, width)))


def _unreadable(name: Path | str, error: Exception) -> ImageError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        reason = "it is damaged or not an image"
    return ImageError(f"cannot read image {name}: {reason}; replace the file or leave it out")


def load_image(
    source: Path | bytes, name: Path | str, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Decode a file or its bytes and turn it upright; ImageError if that fails."""
    try:
        if (len(source) if isinstance(source, bytes) else source.stat().st_size) == 0:
            raise ValueError("the file is empty")
        with warnings.catch_warnings():
            # MAXIMUM_PIXELS decides, not Pillow's lower limit
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            opened = Image.open(file, formats=formats or _formats())
        with opened as image:
            width, height = image.size
            if not 0 < width * height <= MAXIMUM_PIXELS:
                raise ValueError(
                    f"{width} x {height} pixels are none or more than {MAXIMUM_PIXELS:,} allowed"
                )
            image.load()
            with contextlib.suppress(Exception):  # its EXIF is damaged, its pixels may be intact
                ImageOps.exif_transpose(image, in_place=True)
            return image
    except Exception as error:  # decoders raise anything on damaged data
        raise _unreadable(name, error) from error


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Convert a decoded image to RGB as `read_image` does; ValueError if its range is unknown."""
    if image.mode == "F":
        raise ValueError("it has 32-bit float values of unknown range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("it has 32-bit values of unknown range; save it with 8 or 16 bits")
        grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return np.array(image.convert("RGB"))


def png_bytes(values: NDArray[np.uint8], palette: bytes | None = None) -> bytes:
    """A PNG file of values (H, W) or (H, W, 3), with a palette of 256 RGB colours if given."""
    image = Image.fromarray(values)
    if palette is not None:
        image.putpalette(palette)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
