"""Reading any image file safely: upright 8-bit RGB, index masks, sizes.

Arrays are (height, width[, 3]) uint8. Nothing here changes Pillow's global settings.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from lpcam.errors import DataError, ImageError

MAXIMUM_PIXELS = 100_000_000
"""Largest image that is read by default: 100 million pixels, 300 MB as RGB."""

_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: Path, *, maximum_pixels: int = MAXIMUM_PIXELS) -> NDArray[np.uint8]:
    """Read an image file as upright RGB, uint8 (H, W, 3).

    EXIF orientation is applied, 16-bit values are scaled (65535 becomes 255), grey, palette, 1-bit
    and CMYK are converted, and transparent pixels are laid over white. Of an animation or a file of
    several pages the first is read.

    Raises:
        ImageError: naming the file and the reason, if it is missing, empty, truncated, damaged, no
            image, larger than ``maximum_pixels`` or of 32-bit values whose range is unknown.
    """
    return _read_rgb(path, path, maximum_pixels)


def decode_image(
    data: bytes,
    name: str,
    *,
    maximum_pixels: int = MAXIMUM_PIXELS,
    formats: tuple[str, ...] | None = None,
) -> NDArray[np.uint8]:
    """The same of an image file's bytes.

    Args:
        name: of the image in messages.
        formats: names of Pillow's readers that may look at them; None: all.
    """
    return _read_rgb(name, data, maximum_pixels, formats)


def _read_rgb(
    name: Path | str,
    source: Path | bytes,
    maximum_pixels: int,
    formats: tuple[str, ...] | None = None,
) -> NDArray[np.uint8]:
    image = load_image(name, source, maximum_pixels, formats)
    try:
        return to_rgb(image)
    except (ValueError, OSError) as error:
        raise _unreadable(name, str(error)) from error


def read_index_mask(path: Path, *, maximum_pixels: int = MAXIMUM_PIXELS) -> NDArray[np.uint8]:
    """Read a mask as the values stored in it, uint8 (H, W): palette indices or grey values.

    A 1-bit mask gives 0 and 1. The colours of a palette never count (data sets, section 1).

    Raises:
        DataError: if the file cannot be read (ImageError), holds colours, is lossy (JPEG) or has
            values above 255; the message says what to save instead.
    """
    image = load_image(path, path, maximum_pixels)
    problem = None
    if image.format == "JPEG":
        problem = "it is a JPEG, whose values are not exact"
    elif image.mode not in ("P", "L", "1") and not image.mode.startswith("I"):
        problem = f"it holds colours (mode {image.mode}), not class indices"
    values = np.array(image)
    if problem is None and values.size and (values.min() < 0 or values.max() > 255):
        problem = f"it has values from {values.min()} to {values.max()}"
    if problem is not None:
        raise DataError(
            f"mask {path} is refused: {problem}; save it as an 8-bit grey or palette PNG whose "
            "pixel values are 0 (background), the class's number, or 255 (ignored)"
        )
    return values.astype(np.uint8)


def upright_size(path: Path) -> tuple[int, int]:
    """(height, width) of an upright image, by the file's head alone; ImageError if it has none."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            # Pillow gives the upright size of a TIFF, and that of other files as it is stored.
            turned = image.format != "TIFF" and _orientation(image) in _SIDEWAYS
    except Exception as error:  # decoders raise anything on damaged data
        raise _unreadable(path, str(error) or type(error).__name__) from error
    return (width, height) if turned else (height, width)


def resize_image(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize a uint8 image (H, W, 3) to ``size`` = (height, width) by Pillow's bicubic filter."""
    height, width = size
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Size (height, width) of an image at ``scale``: each side rounded, a half to even, and >= 1.

    The rounding is that of the released CAM programs (specification IRN, section 2).
    """
    return max(1, round(height * scale)), max(1, round(width * scale))


def limit_long_side(image: NDArray[np.uint8], maximum: int) -> NDArray[np.uint8]:
    """Shrink an image (H, W, 3) so that its longer side is ``maximum``; smaller ones stay as is."""
    return image if max(image.shape[:2]) <= maximum else resize_long_side(image, maximum)


def resize_long_side(image: NDArray[np.uint8], long_side: int) -> NDArray[np.uint8]:
    """Resize an image (H, W, 3) so that its longer side is ``long_side``, up or down."""
    height, width = image.shape[:2]
    return resize_image(image, scaled_size(height, width, long_side / max(height, width)))


def _unreadable(name: Path | str, reason: str) -> ImageError:
    return ImageError(f"cannot read image {name}: {reason}; replace the file or leave it out")


def load_image(
    name: Path | str,
    source: Path | bytes,
    maximum_pixels: int,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """Decode a file fully and turn it upright; ImageError for everything that can go wrong."""
    try:
        if (len(source) if isinstance(source, bytes) else source.stat().st_size) == 0:
            raise _unreadable(name, "the file is empty")
        with warnings.catch_warnings():
            # maximum_pixels decides, not Pillow's lower bound
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            opened = Image.open(file, formats=formats)
        with opened as image:
            width, height = image.size
            if width < 1 or height < 1:
                raise _unreadable(name, f"its size is {width} x {height} pixels")
            if width * height > maximum_pixels:
                raise _unreadable(
                    name, f"{width} x {height} pixels are more than {maximum_pixels:,} allowed"
                )
            image.load()
            turn = _UPRIGHT.get(_orientation(image))
            if turn is None:
                return image
            turned = image.transpose(turn)
            turned.format = image.format
            return turned
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise _unreadable(name, "it is damaged or not an image") from error
    except OSError as error:
        raise _unreadable(name, error.strerror or str(error)) from error
    except Exception as error:  # decoders raise anything on damaged data
        raise _unreadable(name, str(error) or type(error).__name__) from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing about the pixels, which are whole
        return 1


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Convert a decoded image to RGB; ValueError where the range of its values is unknown."""
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
