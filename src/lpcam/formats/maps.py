"""Map files of other programs (IRN, AMN, PSA), read and written.

All are ``.npy`` files of a pickled dictionary (specification of data sets, section 5):

==========  ==================================================================================
style       contents
==========  ==================================================================================
irn         ``keys`` int64 (K,), ``cam`` float32 (K, ceil(H/4), ceil(W/4)), ``high_res`` float32
            (K, H, W); of IRN, LPCAM, ReCAM and AdvCAM
amn         the same with a plane of the background before the others: K + 1 planes, K keys
psa         {class: float32 (H, W)}; of PSA, SEAM, MCTformer and EDAM
psa-crf     {0: background, class + 1: float32 (H, W)}, as PSA keeps maps after the CRF
==========  ==================================================================================

A key k is the class of the value k + 1 in masks, also in runs of some classes, whose label indices
differ. Files are read by :mod:`lpcam.formats.pickled_arrays` without running code of them; what is
written can be
read without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lpcam.data.dataset import ClassTable
from lpcam.data.images import MAXIMUM_PIXELS
from lpcam.data.map_files import MapFile
from lpcam.formats.pickled_arrays import dictionary_file, read_pickled_arrays
from lpcam.method.functional import strided
from lpcam.runtime.errors import ArtefactError, DataError
from lpcam.runtime.files import digest_bytes, read_bytes, write_bytes
from lpcam.runtime.versions import __version__

MapStyle = Literal["irn", "amn", "psa", "psa-crf"]


Background = float | NDArray[np.float32]
"""Background score of the whole image, or a plane (H, W)."""


WITH_BACKGROUND = ("amn", "psa-crf")
"""Styles with a background plane."""


_STRIDE = 4


@dataclass(frozen=True, eq=False)
class ForeignMaps:
    """Contents of a foreign map file.

    ``background`` is the background plane, float32 (H, W), where the style has one; it is not part
    of ``maps``.
    """

    maps: MapFile
    style: MapStyle
    background: NDArray[np.float32] | None


# -- Reading -----------------------------------------------------------------------------------


def read_foreign_maps(
    path: Path,
    *,
    size: tuple[int, int] | None = None,
    style: MapStyle | Literal["auto"] = "auto",
    classes: ClassTable | None = None,
) -> ForeignMaps:
    """Read the maps of one image, with their values unchanged (no ReLU, no normalisation).

    Where the file has no map of stride 4 (psa), ``maps.cam`` is the full one resized, bilinear
    without aligned corners. The file of an image without a class may lack arrays, hold an empty
    dictionary, or have arrays of no planes.

    Args:
        path: the ``.npy`` file.
        size: (H, W) of the image; a file of another size is refused. Required where the file of an
            image without a class has no size.
        style: "auto" finds the style from the contents, except "psa-crf", which looks like "psa".
        classes: a key k becomes the label index of the class with mask value k + 1; any other key
            is refused. None: keys are not changed.

    Returns:
        The maps, with ``made_by`` {"imported": {"file", "digest", "style"}, "lpcam": version}, and
        "classes", the names in label order, if classes are given.

    Raises:
        ArtefactError: if the file is missing, damaged, tries to run code, does not fit the style,
            classes or size, has negative or infinite values, or could be either psa style.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp()) / "a.npy"
        >>> one = np.ones((1, 8, 12), np.float32)
        >>> write_foreign_maps(path, MapFile(np.array([3]), one[:, ::4, ::4], one), "irn")
        >>> read_foreign_maps(path).style
        'irn'
    """
    if style not in ("auto", *get_args(MapStyle)):
        raise DataError(f"map style {style!r} is unknown; choose 'auto', {_STYLES}")
    data = read_bytes(path)
    found = read_pickled_arrays(data, what=f"map file {path}")
    try:
        maps, kind, background = _recognised(found, size, None if style == "auto" else style)
    except _WrongMapsError as error:
        raise ArtefactError(f"map file {path} is refused: {error}") from error
    keys = maps.keys.tolist()
    if len(set(keys)) != len(keys) or (keys and min(keys) < 0):
        raise ArtefactError(f"map file {path} is refused: its classes {keys[:9]} repeat or are < 0")
    made_by: dict[str, Any] = {
        "imported": {"file": path.name, "digest": digest_bytes(data), "style": kind},
        "lpcam": __version__,
    }
    labels = maps.keys
    if classes is not None:
        unknown = [key for key in keys if key + 1 not in classes.mask_ids]
        if unknown:
            raise ArtefactError(
                f"map file {path} is refused: it has the key {unknown[0]}, and no class has the "
                f"mask value {unknown[0] + 1}; give the classes that the maps were made with"
            )
        labels = np.array([classes.mask_ids.index(key + 1) for key in keys], dtype=np.int64)
        made_by["classes"] = list(classes.names)
    return ForeignMaps(MapFile(labels, maps.cam, maps.high_res, made_by), kind, background)


_STYLES = ", ".join(map(repr, get_args(MapStyle)))


class _WrongMapsError(Exception):
    """The reason why a file is refused, without its name."""


_Maps = tuple[MapFile, MapStyle, NDArray[np.float32] | None]


def _recognised(found: Any, size: tuple[int, int] | None, style: MapStyle | None) -> _Maps:
    if not isinstance(found, dict):
        raise _WrongMapsError(
            f"it holds {_kind(found)}; expected a dictionary with 'keys' and 'high_res', or of maps"
            " by class"
        )
    by_class = all(type(key) is int for key in found)
    if "keys" in found and style in (None, "irn", "amn"):
        return _of_keys(found, size, style)
    if by_class and style in (None, "psa", "psa-crf"):
        return _by_class(found, size, style)
    names = ", ".join(f"{key!r:.20}" for key in list(found)[:5])
    raise _WrongMapsError(
        f"its dictionary has the keys {names or 'none'}; expected "
        + ("0-based classes" if style in ("psa", "psa-crf") else "'keys' and 'high_res'")
        + (f" of the style {style!r}" if style else ", or 0-based classes")
    )


def _of_keys(
    found: Mapping[str, Any], size: tuple[int, int] | None, style: MapStyle | None
) -> _Maps:
    keys = found["keys"]
    if isinstance(keys, list | tuple):
        keys = np.array(keys or np.zeros(0, np.int64))
    if (
        not isinstance(keys, np.ndarray)
        or keys.ndim != 1
        or (keys.size and keys.dtype.kind not in "iu")
    ):
        raise _WrongMapsError(f"'keys' are {_kind(keys)}; expected integers (K,)")
    keys = keys.astype(np.int64)
    planes = {}
    for name in ("cam", "high_res"):
        if found.get(name) is not None:
            planes[name] = _planes(found[name], f"{name!r}", 3)
    if "high_res" not in planes:
        if len(keys):
            raise _WrongMapsError(f"it has {len(keys)} classes, but no 'high_res'")
        return maps_without_class(size), style or "irn", None
    full = planes["high_res"]
    if not len(full):  # the sides of no planes mean little
        return maps_without_class(size or (full.shape[1], full.shape[2])), style or "irn", None
    _check_size(full.shape[1:], size)
    extra = len(full) - len(keys)
    if extra not in (0, 1) or style == ("irn" if extra else "amn"):
        expected = {"irn": len(keys), "amn": len(keys) + 1}
        counts = expected[style] if style in expected else f"{len(keys)} (irn) or one more (amn)"
        raise _WrongMapsError(
            f"'high_res' has {len(full)} planes and 'keys' {len(keys)} classes; expected {counts}"
        )
    quarter = _quarter(full.shape[1:])
    if "cam" in planes and planes["cam"].shape != (len(full), *quarter):
        raise _WrongMapsError(
            f"'cam' is {planes['cam'].shape} and 'high_res' {full.shape}; expected 'cam' of "
            f"{(len(full), *quarter)}"
        )
    cam = planes["cam"] if "cam" in planes else _resized(full, quarter)
    if extra:
        return MapFile(keys, cam[1:], full[1:]), "amn", full[0]
    return MapFile(keys, cam, full), "irn", None


def _by_class(
    found: Mapping[int, Any], size: tuple[int, int] | None, style: MapStyle | None
) -> _Maps:
    if any(not 0 <= key < 2**31 for key in found):
        raise _WrongMapsError("it has a class outside 0..2^31; expected 0-based classes")
    found = {key: _planes(value, f"class {key}", 2) for key, value in sorted(found.items())}
    shapes = {plane.shape for plane in found.values()}
    if len(shapes) > 1:
        raise _WrongMapsError(f"its maps have different sizes {sorted(shapes)}")
    if not found:
        return maps_without_class(size), style or "psa", None
    full = np.stack(list(found.values()))
    _check_size(full.shape[1:], size)
    partition = np.allclose(full.sum(axis=0), 1, atol=1e-3)
    if style is None and 0 in found and len(found) > 1 and partition:
        raise _WrongMapsError(
            "its maps add up to 1 at every pixel, as those with a background after a CRF do; name "
            "the style: 'psa-crf' if 0 is the background, 'psa' if it is the first class"
        )
    keys = np.array(list(found), dtype=np.int64)
    background = None
    if style == "psa-crf":
        if keys[0] != 0:
            raise _WrongMapsError("it has no plane 0, the background; its style is not 'psa-crf'")
        background, full, keys = full[0], full[1:], keys[1:] - 1
    maps = MapFile(keys, _resized(full, _quarter(full.shape[1:])), full)
    return maps, style or "psa", background


def _planes(value: Any, name: str, axes: int) -> NDArray[np.float32]:
    if not isinstance(value, np.ndarray) or value.ndim != axes or value.dtype.kind != "f":
        shape = "(K, H, W)" if axes == 3 else "(H, W)"
        raise _WrongMapsError(f"{name} is {_kind(value)}; expected floats {shape}")
    height, width = value.shape[-2:]
    if height * width > MAXIMUM_PIXELS or (min(height, width) < 1 and (axes == 2 or len(value))):
        raise _WrongMapsError(
            f"{name} is {value.shape}; expected at most {MAXIMUM_PIXELS:,} pixels and no empty side"
        )
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        planes = np.array(value, dtype=np.float32)
    # of NaN both comparisons are false
    if planes.size and not (planes.min() >= 0 and planes.max() < np.inf):
        raise _WrongMapsError(f"{name} has negative, NaN or infinite values; maps are >= 0")
    return planes


def _kind(value: Any) -> str:
    """Type and shape for messages: the value itself could be too long."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return "None" if value is None else f"a {type(value).__name__}"


def _check_size(found: tuple[int, ...], size: tuple[int, int] | None) -> None:
    if size is not None and found != tuple(size):
        raise _WrongMapsError(
            f"its maps are {found[0]} x {found[1]} pixels, the image {size[0]} x {size[1]}"
        )


def _quarter(size: tuple[int, ...]) -> tuple[int, int]:
    height, width = size
    return strided(height, _STRIDE), strided(width, _STRIDE)


def maps_without_class(size: tuple[int, int] | None) -> MapFile:
    """Maps of an image of ``size`` (H, W) without a class: arrays of no planes."""
    if size is None or min(size) < 1:
        raise _WrongMapsError("it has no class and no map, so the size of its image must be given")
    none = np.zeros(0, np.int64)
    return MapFile(
        none, np.zeros((0, *_quarter(size)), np.float32), np.zeros((0, *size), np.float32)
    )


def _resized(planes: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Planes (K, h, w) at another size, bilinear without aligned corners."""
    if not len(planes):
        return np.zeros((0, *size), np.float32)
    found = F.interpolate(
        torch.from_numpy(planes)[None], size=size, mode="bilinear", align_corners=False
    )
    resized: NDArray[np.float32] = found[0].numpy()
    return resized


# -- Writing -----------------------------------------------------------------------------------


def write_foreign_maps(
    path: Path,
    maps: MapFile,
    style: MapStyle,
    *,
    background: Background | None = None,
    classes: ClassTable | None = None,
) -> None:
    """Write the maps of one image for other programs, atomically.

    They read it with ``np.load(path, allow_pickle=True).item()``, without torch. Values are float32
    and not changed. The file of an image without a class has arrays of no planes (irn), only
    ``keys`` (amn), an empty dictionary (psa), or only the background (psa-crf).

    Args:
        path: the ``.npy`` file.
        maps: foreground planes.
        style: one of `MapStyle`.
        background: background score for the styles that have one (amn, psa-crf), such as the
            threshold of the seeds; a plane is resized for ``cam``, bilinear.
        classes: classes whose label indices are the keys of the maps; each becomes its mask value
            minus 1. None: keys are not changed.

    Raises:
        DataError: if the style is unknown, a background is missing or superfluous, the background
            has another size, or a key is not a label index.
        ArtefactError: if the file cannot be written.
    """
    if classes is not None:
        if maps.keys.size and maps.keys.max() >= len(classes):
            raise DataError(
                f"maps of {path.stem!r} have the class index {maps.keys.max()}; there are "
                f"{len(classes)} classes"
            )
        keys = np.array([classes.mask_ids[n] - 1 for n in maps.keys.tolist()], dtype=np.int64)
        maps = replace(maps, keys=keys)
    write_bytes(path, dictionary_file(_dictionary(maps, style, background)))


def _dictionary(maps: MapFile, style: MapStyle, background: Background | None) -> dict[Any, Any]:
    if style not in get_args(MapStyle):
        raise DataError(f"map style {style!r} is unknown; choose {_STYLES}")
    if (style in WITH_BACKGROUND) != (background is not None):
        raise DataError(
            f"files of the style {style!r} have "
            + ("a plane of the background; give its score" if background is None else "none of it")
        )
    full = maps.high_res
    if background is not None:
        plane = np.asarray(background, np.float32)
        if plane.shape not in ((), full.shape[1:]):
            raise DataError(f"the background is {plane.shape}, the maps are {full.shape[1:]}")
        plane = np.broadcast_to(plane, full.shape[1:])[None]
    if style == "psa":
        return dict(zip(maps.keys.tolist(), full, strict=True))
    if style == "psa-crf":
        shifted = (key + 1 for key in maps.keys.tolist())
        return {0: plane[0], **dict(zip(shifted, full, strict=True))}
    if style == "irn":
        return {"keys": maps.keys, "cam": maps.cam, "high_res": full}
    if not len(maps.keys):
        return {"keys": maps.keys}
    quarter = _resized(plane.copy(), _quarter(full.shape[1:]))
    return {
        "keys": maps.keys,
        "cam": np.concatenate([quarter, maps.cam]),
        "high_res": np.concatenate([plane, full]),
    }
