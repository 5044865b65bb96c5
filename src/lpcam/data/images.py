"""Reading image files safely: upright 8-bit RGB (height, width, 3), index masks, sizes."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lpcam.data.resize import scaled_size
from lpcam.runtime.errors import ImageError, shortened

IMAGE_FORMATS = {
    **{"JPEG": ".jpg .jpeg .jpe .jfif", "PNG": ".png .apng", "MPO": ".mpo", "TIFF": ".tif .tiff"},
    **{"WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif", "PPM": ".ppm .pgm .pbm .pnm"},
    **{"AVIF": ".avif .avifs", "JPEG2000": ".jp2 .j2k .jpx .jpf .jpc .j2c", "DIB": ".dib"},
    **{"QOI": ".qoi", "SGI": ".sgi .rgb .rgba .bw", "SUN": ".ras", "PCX": ".pcx", "DDS": ".dds"},
    **{"ICO": ".ico", "ICNS": ".icns", "XBM": ".xbm", "XPM": ".xpm", "IM": ".im", "MSP": ".msp"},
    "TGA": ".tga .icb .vda .vst",  # last: it is recognised by little
}
"""Formats that are read, by Pillow's names, with the extensions of their files."""
IMAGE_SUFFIXES = frozenset(" ".join(IMAGE_FORMATS.values()).split())  #: In lower case.
MAXIMUM_PIXELS = 100_000_000  #: Size of the largest image that is read; 300 MB as RGB.
FEW_LEVELS = 32  #: An image of fewer, whose file has more than twice as many values, is squeezed.
FULL_RANGE = (0.0, 65535.0)  #: Range of values with 16 bits where none is given.
_PIXELS_COUNTED = 500_000  # of an image whose distinct values are counted
_TURNED_BACK = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 2, 6, 4)), strict=True))
"""What gives the stored image of an upright one, by its EXIF orientation."""

Values = NDArray[Any]
Span = tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Reading:
    """What the files of a data set do not say themselves; it is part of every score's protocol."""

    range: Span = None
    """Values of more than 8 bits that become 0 and 255; others are clipped. None: full scale."""
    orientation: Literal["upright", "stored"] | None = None
    """``stored`` ignores the EXIF orientation; ``upright`` and None follow it."""
    palette: tuple[tuple[int, int], ...] = ()
    """Colours of true masks, 0xRRGGBB in ascending order, and their mask values; empty: masks hold
    the values themselves."""

    @property
    def stored(self) -> bool:
        """Whether the EXIF orientation is ignored."""
        return self.orientation == "stored"

    def as_json(self) -> dict[str, Any]:
        """What differs from the usual reading, as JSON."""
        span, palette = self.range and list(self.range), [list(one) for one in self.palette]
        found = {"range": span, "orientation": self.stored and self.orientation, "palette": palette}
        return {key: value for key, value in found.items() if value}

    @classmethod
    def of_images(cls, values: Mapping[str, Any]) -> Reading:
        """The reading of images, not masks, that :meth:`as_json` or a recipe gives."""
        span = values.get("range")
        return cls(None if span is None else tuple(span), values.get("orientation"))


USUAL = Reading()


def read_image(path: Path, reading: Reading = USUAL) -> NDArray[np.uint8]:
    """Read an image file as upright RGB, uint8 (H, W, 3).

    Values of more than 8 bits are scaled by the range of ``reading``, else so that 65535 becomes
    255; grey, palette, 1-bit and CMYK are converted, and transparent pixels are blended with white.
    Of several pages or an animation the first is read. Images of a data set are read by
    :meth:`lpcam.data.dataset.Item.read`, which has their reading.

    Raises:
        ImageError: naming the file, if it cannot be read, is larger than `MAXIMUM_PIXELS`, or full
            scale does not suit its values.

    Example:
        >>> path = getfixture("tmp_path") / "a.png"
        >>> Image.new("RGB", (1, 2), "red").save(path)
        >>> read_image(path).tolist()
        [[[255, 0, 0]], [[255, 0, 0]]]
    """
    return decode_image(path, str(path), reading=reading)


def decode_image(
    source: Path | bytes,
    name: str,
    *,
    formats: tuple[str, ...] | None = None,
    reading: Reading = USUAL,
) -> NDArray[np.uint8]:
    """Decode a file or its bytes as `read_image` does; ``formats`` are Pillow's, None: all."""
    image, values = load_values(source, name, formats, reading)
    try:
        return to_rgb(image, reading.range, values)
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
    what = "images of several pages or frames, of which the first is read"
    return f"{what}: {len(names)} ({shortened(names)})"


class Header(NamedTuple):
    """What the header of an image file says."""

    size: tuple[int, int]  #: (height, width) as stored.
    turn: int  #: EXIF orientation, 1 to 8; 1 is upright.
    deep: bool  #: Whether its values have more than 8 bits.
    palette: bytes | None  #: RGB colours of its indices, if it is a palette image.

    @property
    def upright(self) -> tuple[int, int]:
        """(height, width) of the upright image."""
        return self.size if self.turn < 5 else self.size[::-1]


def read_header(path: Path) -> Header:
    """Read the header of an image file; ImageError if it cannot be read."""
    try:
        with Image.open(path, formats=_formats()) as image:
            width, height = image.size
            deep = _is_deep(image)
            # to look for EXIF data, Pillow decodes a PNG
            plain = image.format == "PNG" and b"exif" not in path.read_bytes().lower()
            turn = 1 if plain else _turn(image)
            palette = bytes(image.palette.palette) if image.mode == "P" and image.palette else None
            # Pillow gives the upright size of a TIFF, and the stored size of other files.
            turned = image.format == "TIFF" and turn > 4
            size = (width, height) if turned else (height, width)
            return Header(size, turn, deep, palette)
    except Exception as error:  # decoders raise anything on damaged data
        raise _unreadable(path, error) from error


def upright_size(path: Path, reading: Reading = USUAL) -> tuple[int, int]:
    """(height, width) of an image as it is read, from its header; ImageError if unreadable."""
    header = read_header(path)
    return header.size if reading.stored else header.upright


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


def _turn(image: Image.Image) -> int:
    with contextlib.suppress(Exception):  # its EXIF is damaged, its pixels may be intact
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
        return turn if turn in _TURNED_BACK else 1
    return 1


def _is_deep(image: Image.Image) -> bool:
    """Tell if an image has more than 8 bits a channel, from its header."""
    tiles: Any = getattr(image, "tile", ())  # of a file that is opened
    return image.mode[0] in "FI" or any(";16" in str(tile[3]) for tile in tiles)


def load_values(
    source: Path | bytes,
    name: Path | str,
    formats: tuple[str, ...] | None = None,
    reading: Reading = USUAL,
) -> tuple[Image.Image, NDArray[Any] | None]:
    """Decode and turn a file or its bytes; with its values (H, W) or (H, W, C) if it is deep.

    Deep means more than 8 bits. Pillow decodes 16-bit colours to their upper 8 bits; torchvision
    decodes those of PNG files.
    """
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
            deep, tiff = _is_deep(image), image.format == "TIFF"
            turn = _turn(image) if tiff else 1
            vars(image)["filename"] = ""  # Pillow 13 maps a turned TIFF wrongly into memory
            image.load()  # which turns a TIFF upright
            values: NDArray[Any] | None = None
            if deep and image.mode[0] not in "FI":
                values = _colour_values(image, source, reading)
            if not reading.stored:
                with contextlib.suppress(Exception):
                    ImageOps.exif_transpose(image, in_place=True)
            found = image.transpose(_TURNED_BACK[turn]) if reading.stored and turn > 1 else image
            return found, np.asarray(found) if found.mode[0] in "FI" else values
    except Exception as error:  # decoders raise anything on damaged data
        raise _unreadable(name, error) from error


def _colour_values(image: Image.Image, source: Path | bytes, reading: Reading) -> Values | None:
    """Colours of 16 bits (H, W, C); None where their upper 8 bits are all that matters."""
    if image.format == "PNG":
        # torchvision takes 160 MB of memory, and few images need it
        from torchvision.io import decode_png  # noqa: PLC0415

        content = bytearray(source if isinstance(source, bytes) else source.read_bytes())
        data = torch.frombuffer(content, dtype=torch.uint8)
        tensor = decode_png(data, apply_exif_orientation=not reading.stored)
        return np.asarray(tensor.numpy().transpose(1, 2, 0))
    upper = np.asarray(image.convert("RGB"))
    dark = upper.max() < 128 and distinct(upper) < FEW_LEVELS
    if dark or reading.range not in (None, FULL_RANGE):
        raise ValueError(
            "8 of the 16 bits of its colours are read, too few for its values; save the "
            f"{image.format} file as a PNG with 16 bits"
        )
    return None


def to_rgb(
    image: Image.Image, span: Span = None, values: Values | None = None
) -> NDArray[np.uint8]:
    """Convert a decoded image to RGB as `read_image` does; ValueError if its range is unknown."""
    if values is None and image.mode[0] in "FI":
        values = np.asarray(image)
    if values is not None:
        grey = scale_values(values, span)
        if grey.ndim == 2 or grey.shape[2] < 3:
            grey = np.concatenate([grey.reshape(*grey.shape[:2], -1)[:, :, :1]] * 3, axis=2)
        if values.ndim == 2 or values.shape[2] % 2:  # without an alpha channel
            return grey
        alpha = image.getchannel("A")
        image = Image.fromarray(grey[:, :, :3])
        image.putalpha(alpha)
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return np.array(image.convert("RGB"))


def scale_values(values: Values, span: Span = None) -> NDArray[np.uint8]:
    """Values of any shape as 0 to 255 for those from ``span[0]`` to ``span[1]``, which are clipped.

    NaN becomes 0. Without ``span`` 65535 becomes 255, and ValueError says why that is wrong.
    """
    low, high = span or FULL_RANGE
    kind = values.dtype.kind
    if kind == "f" and not np.isfinite(values).any():
        raise ValueError("all its values are NaN or infinite")
    if span is None and (kind == "f" or values.min() < low or values.max() > high):
        name = "32-bit float" if kind == "f" else "32-bit"
        raise ValueError(f"it has {name} values of unknown range; give it, or save 8 or 16 bits")
    small = kind == "u" and values.dtype.itemsize == 2
    wanted = np.arange(65536) if small else values
    scaled = np.clip((wanted.astype(np.float64) - low) * (255 / (high - low)), 0, 255)
    levels = np.rint(np.nan_to_num(scaled)).astype(np.uint8)
    levels = levels[values] if small else levels
    if span is None and is_squeezed(values, levels):
        raise ValueError(
            f"its values ({values.min()} to {values.max()}) take up {distinct(levels)} grey levels "
            "of a scale from 0 to 65535; give their range, or save it with 8 bits"
        )
    return levels


def is_squeezed(values: NDArray[Any], levels: NDArray[np.uint8]) -> bool:
    """Whether a conversion of values to 8 bits has left few of the differences between them."""
    left = distinct(levels)
    return left < FEW_LEVELS and distinct(values) > 2 * left


def distinct(values: NDArray[Any]) -> int:
    """Number of different values, of at most about half a million pixels."""
    flat = values.ravel()
    return int(np.unique(flat[:: 1 + flat.size // _PIXELS_COUNTED]).size)


def png_bytes(values: NDArray[np.uint8], palette: bytes | None = None) -> bytes:
    """A PNG file of values (H, W) or (H, W, 3), with a palette of 256 RGB colours if given."""
    image = Image.fromarray(values)
    if palette is not None:
        image.putpalette(palette)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
