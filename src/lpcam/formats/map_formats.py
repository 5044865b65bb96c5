"""The map formats of IRN, AMN and PSA: what the dictionary in a ``.npy`` file holds.

IRN's is also of LPCAM, ReCAM and AdvCAM, PSA's of SEAM, MCTformer and EDAM (specification of data
sets, section 5). Their ``cam`` is float32 (K, ceil(H/4), ceil(W/4)), keys are int64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lpcam.data.images import MAXIMUM_PIXELS
from lpcam.data.map_files import MapFile
from lpcam.data.resize import quarter_size, resize
from lpcam.runtime.errors import DataError

Planes = NDArray[np.float32]
Size = tuple[int, int]


@dataclass(frozen=True)
class MapFormat(ABC):
    """A way of keeping the maps of one image in a dictionary."""

    layout: str  #: Description of what the dictionary holds.
    has_background: bool = False  #: Whether it has a plane of the background.

    @abstractmethod
    def fits(self, content: Mapping[Any, Any]) -> bool:
        """Whether a dictionary may be of this format; one without a class may be of any."""

    @abstractmethod
    def read(self, content: Mapping[Any, Any], size: Size | None) -> MapFile:
        """The maps of the classes in an unchecked dictionary, for an image (H, W), or DataError."""

    @abstractmethod
    def write(self, maps: MapFile, background: Planes | None) -> dict[Any, Any]:
        """The dictionary of maps, with a background plane (H, W) if the format has one."""


class _KeyedMaps(MapFormat):
    """A dictionary of ``keys``, ``cam`` and ``high_res``."""

    def fits(self, content: Mapping[Any, Any]) -> bool:
        try:
            extra = len(content["high_res"]) == len(content["keys"]) + 1
        except (KeyError, TypeError):
            extra = False
        return "keys" in content and extra == self.has_background

    def read(self, content: Mapping[Any, Any], size: Size | None) -> MapFile:
        if "keys" not in content:
            raise DataError(f"it holds {names_in(content)}; expected {self.layout}")
        keys = content["keys"]
        integers = isinstance(keys, np.ndarray) and (not keys.size or keys.dtype.kind in "iu")
        if not integers or keys.ndim != 1:
            raise DataError(f"'keys' are {kind_of(keys)}; expected integers (K,)")
        cam, full = (
            None if content.get(name) is None else _planes(content[name], f"{name!r}", 3)
            for name in ("cam", "high_res")
        )
        if full is None and len(keys):
            raise DataError(f"it has {len(keys)} classes, but no 'high_res'")
        if full is None or not len(full):  # the sides of no planes mean little
            return maps_without_class(size or (None if full is None else full.shape[1:]))
        if len(full) != len(keys) + self.has_background:
            raise DataError(
                f"'high_res' has {len(full)} planes and 'keys' {len(keys)} classes; expected "
                f"{self.layout}"
            )
        size = quarter_size(full.shape[1:])
        cam = _resized(full, size) if cam is None else cam
        if cam.shape != (len(full), *size):
            raise DataError(
                f"'cam' is {cam.shape} and 'high_res' {full.shape}; expected 'cam' of "
                f"{(len(full), *size)}"
            )
        first = int(self.has_background)
        return MapFile(keys.astype(np.int64), cam[first:], full[first:])

    def write(self, maps: MapFile, background: Planes | None) -> dict[Any, Any]:
        if background is None:
            return {"keys": maps.keys, "cam": maps.cam, "high_res": maps.high_res}
        if not len(maps.keys):
            return {"keys": maps.keys}
        plane = background[None]
        cam = np.concatenate([_resized(plane, quarter_size(plane.shape[1:])), maps.cam])
        return {"keys": maps.keys, "cam": cam, "high_res": np.concatenate([plane, maps.high_res])}


class _MapsByClass(MapFormat):
    """A dictionary of one plane (H, W) for each class."""

    def fits(self, content: Mapping[Any, Any]) -> bool:
        if not self.has_background or not all(type(key) is int for key in content):
            return all(type(key) is int for key in content)
        try:
            total = np.sum(list(content.values()), axis=0)
            return 0 in content and len(content) > 1 and bool(np.allclose(total, 1, atol=1e-3))
        except (TypeError, ValueError):
            return False

    def read(self, content: Mapping[Any, Any], size: Size | None) -> MapFile:
        if not all(type(key) is int and 0 <= key < 2**31 for key in content):
            raise DataError(f"it holds {names_in(content)}; expected {self.layout}")
        found = {key: _planes(value, f"class {key}", 2) for key, value in sorted(content.items())}
        shapes = {plane.shape for plane in found.values()}
        if len(shapes) > 1:
            raise DataError(f"its maps have different sizes {sorted(shapes)}")
        if not found:
            return maps_without_class(size)
        full, keys = np.stack(list(found.values())), np.array(list(found), dtype=np.int64)
        if self.has_background:
            if keys[0] != 0:
                raise DataError(f"it has no plane 0, the background; expected {self.layout}")
            full, keys = full[1:], keys[1:] - 1
        return MapFile(keys, _resized(full, quarter_size(full.shape[1:])), full)

    def write(self, maps: MapFile, background: Planes | None) -> dict[Any, Any]:
        first = int(background is not None)
        planes = zip((maps.keys + first).tolist(), maps.high_res, strict=True)
        return dict(planes if background is None else [(0, background), *planes])


IRN = _KeyedMaps("'keys' (K,) and 'high_res' (K, H, W)")
AMN = _KeyedMaps("'keys' (K,) and 'high_res' (K + 1, H, W)", has_background=True)
PSA = _MapsByClass("planes (H, W) by class, counted from 0")
PSA_CRF = _MapsByClass(
    "planes (H, W) by class, counted from 1, with 0 for the background", has_background=True
)


def maps_without_class(size: Any) -> MapFile:
    """Maps of an image of ``size`` (H, W) without a class; DataError if the size is not known."""
    if size is None or min(size) < 1:
        raise DataError("it has no class and no map, so the size of its image must be given")
    cam, full = (np.zeros((0, *sides), np.float32) for sides in (quarter_size(size), size))
    return MapFile(np.zeros(0, np.int64), cam, full)


def kind_of(value: Any) -> str:
    """Type and shape for messages."""
    array = isinstance(value, np.ndarray)
    return f"{value.dtype} {value.shape}" if array else type(value).__name__


def names_in(content: Mapping[Any, Any]) -> str:
    """The first keys of a dictionary, for messages."""
    return f"the keys {', '.join(f'{key!r:.20}' for key in list(content)[:5]) or 'none'}"


def _planes(value: Any, name: str, axes: int) -> Planes:
    if not isinstance(value, np.ndarray) or value.ndim != axes or value.dtype.kind != "f":
        shape = "(K, H, W)" if axes == 3 else "(H, W)"
        raise DataError(f"{name} is {kind_of(value)}; expected floats {shape}")
    height, width = value.shape[-2:]
    if height * width > MAXIMUM_PIXELS or (min(height, width) < 1 and (axes == 2 or len(value))):
        raise DataError(
            f"{name} is {value.shape}; expected at most {MAXIMUM_PIXELS:,} pixels and no empty side"
        )
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        planes = np.array(value, dtype=np.float32)
    # of NaN both comparisons are false
    if planes.size and not (planes.min() >= 0 and planes.max() < np.inf):
        raise DataError(f"{name} has negative, NaN or infinite values; maps are >= 0")
    return planes


def _resized(planes: Planes, size: Size) -> Planes:
    return np.asarray(resize(torch.from_numpy(planes), size))
