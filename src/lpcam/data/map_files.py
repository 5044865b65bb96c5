"""Map files: the class activation maps of one image, compressed, without pickle."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lpcam.data.resize import quarter_size
from lpcam.runtime.errors import ArtefactError
from lpcam.runtime.files import _damaged, _json_text, read_bytes, write_bytes


@dataclass(frozen=True, eq=False)
class MapFile:
    """The maps of one image: planes of its K present classes, without background."""

    keys: NDArray[np.int64]  #: (K,) 0-based class indices.
    cam: NDArray[np.float32]  #: (K, ceil(H/4), ceil(W/4)), finite and non-negative.
    high_res: NDArray[np.float32]  #: (K, H, W), finite and non-negative.
    made_by: dict[str, Any] = field(default_factory=dict)  #: Provenance, as JSON values.


def map_path(folder: Path, item_id: str) -> Path:
    """Path of the map file of an image."""
    return folder / f"{item_id}.npz"


def write_maps(path: Path, maps: MapFile, *, dtype: Literal["uint8", "float16"]) -> None:
    """Write one image's maps as a compressed npz without pickle; ArtefactError if they do not fit.

    Each class plane is divided by its maximum; the largest error is 1/510 (uint8) or 1/4096
    (float16) of it.
    """
    _check_maps(path, maps)
    members: dict[str, NDArray[Any]] = {"format": np.array("fg"), "keys": maps.keys}
    for name, values in (("cam", maps.cam), ("high_res", maps.high_res)):
        scale = values.max(axis=(1, 2), initial=0)
        unit = values / np.where(scale > 0, scale, 1)[:, None, None]
        members[name] = (np.rint(unit * 255) if dtype == "uint8" else unit).astype(dtype)
        members[f"{name}_scale"] = scale
    made_by = _json_text(maps.made_by, f"made_by of {path}", indent=None)
    members["made_by"] = np.frombuffer(made_by.encode(), dtype=np.uint8)
    write_arrays(path, members)


def write_arrays(path: Path, members: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays by name as a compressed npz without pickle; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    # level 1 is more than twice as fast as zlib's default 6; the files grow by a fifth
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in members.items():
            with archive.open(f"{name}.npy", "w") as member:  # opened by name: carries no date
                np.lib.format.write_array(member, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def read_maps(path: Path) -> MapFile:
    """Read what `write_maps` wrote, as float32; ArtefactError names a damaged or foreign file.

    Example:
        >>> path = getfixture("tmp_path") / "a.npz"
        >>> planes = np.ones((1, 4, 4), np.float32)
        >>> write_maps(path, MapFile(np.array([2]), planes[:, :1, :1], planes), dtype="uint8")
        >>> read_maps(path).keys.tolist()
        [2]
    """
    data = read_bytes(path)
    try:
        archive = np.load(io.BytesIO(data), allow_pickle=False)
        keys = archive["keys"]
        planes = []
        for name in ("cam", "high_res"):
            values, scale = archive[name], archive[f"{name}_scale"]
            unit = values.astype(np.float32) / np.float32(255 if values.dtype == np.uint8 else 1)
            planes.append(unit * scale[:, None, None])
        made_by, kind = json.loads(archive["made_by"].tobytes()), str(archive["format"])
    except Exception as error:  # a damaged archive makes zipfile, zlib and numpy raise anything
        raise _damaged(path, str(error)) from error
    if kind != "fg":
        raise _damaged(path, f"its format is {kind!r}, not 'fg'")
    maps = MapFile(keys, planes[0], planes[1], made_by)
    _check_maps(path, maps)
    return maps


def _check_maps(path: Path, maps: MapFile) -> None:
    def require(holds: bool, problem: str) -> None:
        if not holds:
            raise ArtefactError(f"maps of {path} are refused: {problem}")

    keys, size = maps.keys, maps.high_res.shape[1:]
    wrong = f"keys are {keys.dtype} {keys.shape}; expected int64 (K,)"
    require(keys.ndim == 1 and keys.dtype == np.int64, wrong)
    wrong = f"keys {keys.tolist()} repeat or are negative; give each class once"
    require(len({*keys.tolist()}) == len(keys) and keys.min(initial=0) >= 0, wrong)
    require(len(size) == 2, f"high_res has shape {maps.high_res.shape}; expected (K, H, W)")
    for name, own in (("cam", quarter_size(size)), ("high_res", size)):
        values, shape = getattr(maps, name), (len(keys), *own)
        wrong = f"{name} is {values.dtype} {values.shape}; expected float32 {shape}"
        require(values.shape == shape and values.dtype == np.float32, wrong)
        wrong = f"{name} has negative, NaN or infinite values; maps are finite and >= 0"
        # of NaN both comparisons are false
        require(not values.size or (values.min() >= 0 and values.max() < np.inf), wrong)
