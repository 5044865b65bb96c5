"""Files that a run leaves behind: atomic writes, JSON, tensors, map files and digests.

Every write goes to a temporary file in the same folder and is moved into place when it is whole,
so that a stopped run never leaves half a file under its final name. Nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import uuid
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpcam.errors import ArtefactError

_TENSOR_FORMAT = 1
_TENSOR_KEY = "lpcam"
_MAP_MEMBERS = ("keys", "cam", "cam_scale", "high_res", "high_res_scale", "made_by", "format")
# Level 1 writes maps more than twice as fast as zlib's default 6; the files grow by a fifth.
_ZLIB_LEVEL = 1


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` whole or not at all; missing parent folders are made.

    Raises:
        ArtefactError: if the disk is full, the folder may not be written or the path is no file's;
            an earlier file at ``path`` is then untouched and no temporary file stays.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "free some space there and run the same command again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "choose an output folder that you may write to"
        else:
            advice = "check the output folder"
        raise ArtefactError(f"cannot write {path}: {error.strerror or error}; {advice}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_bytes(path: Path) -> bytes:
    """The bytes of ``path``; ArtefactError names the file and the reason if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtefactError(
            f"cannot read {path}: {error.strerror or error}; run the step that makes it again"
        ) from error


def _json_text(value: Any, what: str, indent: int | None) -> str:
    separators = None if indent else (",", ":")
    try:
        text = json.dumps(
            value,
            sort_keys=True,
            ensure_ascii=False,
            allow_nan=False,
            indent=indent,
            separators=separators,
        )
        text.encode()
    except (TypeError, ValueError) as error:
        raise ArtefactError(
            f"cannot write {what} as JSON: {error}; give finite numbers, text, lists and "
            "dictionaries only"
        ) from error
    return text


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as UTF-8 JSON with sorted keys, so that equal values give equal bytes.

    Raises:
        ArtefactError: for NaN, infinity or a value that JSON does not have, and as `write_bytes`.
    """
    write_bytes(path, (_json_text(value, str(path), indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; ArtefactError names the file if it is missing or damaged."""
    data = read_bytes(path)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors (moved to the CPU) and JSON metadata as one safetensors file.

    The metadata and the format's number are one JSON string under the key ``lpcam``: safetensors
    orders several keys at random, and equal contents are to give equal bytes.

    Raises:
        ArtefactError: if the metadata is no JSON, and as `write_bytes`.
    """
    header = {"format": _TENSOR_FORMAT, "metadata": dict(metadata)}
    plain, owners = {}, set()
    for name, tensor in sorted(tensors.items()):
        whole = tensor.detach().cpu().contiguous()
        memory = whole.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory, as tied weights and views do
        plain[name] = whole.clone() if memory in owners else whole
        owners.add(memory)
    data = safetensors.torch.save(plain, {_TENSOR_KEY: _json_text(header, str(path), indent=None)})
    write_bytes(path, data)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote: tensors on the CPU, and the metadata.

    Raises:
        ArtefactError: if the file is missing, damaged, of a newer format or not written by this
            package.
    """
    data = read_bytes(path)
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        text = json.loads(data[8 : 8 + length]).get("__metadata__", {}).get(_TENSOR_KEY)
        header = None if text is None else json.loads(text)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(header, dict) or not isinstance(header.get("metadata"), dict):
        raise ArtefactError(
            f"{path} was not written by this package (no {_TENSOR_KEY!r} entry in its metadata); "
            "give a file that one of its steps wrote"
        )
    if header.get("format") != _TENSOR_FORMAT:
        raise ArtefactError(
            f"{path} has format {header.get('format')!r}, this version reads {_TENSOR_FORMAT}; "
            "install the version that wrote it or make the file again"
        )
    return tensors, header["metadata"]


def digest_bytes(data: bytes) -> str:
    """BLAKE2b digest of 16 bytes as 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_file(path: Path) -> str:
    """`digest_bytes` of a file's contents, read in blocks; ArtefactError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror or error}") from error


def digest_json(value: Any) -> str:
    """Digest of a value's canonical JSON: the order of keys does not count, tuples are lists."""
    return digest_bytes(_json_text(value, "a value to digest", indent=None).encode())


def digest_tensors(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> str:
    """Digest of tensors by name, bit by bit, and of JSON that describes them."""
    digest = hashlib.blake2b(digest_json(description).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's numbers as they lie in memory, of types too that NumPy has not (bfloat16)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True, eq=False)
class MapFile:
    """The maps of one image, for its K present classes only, foreground planes without background.

    ``keys`` int64 (K,): 0-based class indices. ``cam`` float32 (K, ceil(H/4), ceil(W/4)) and
    ``high_res`` float32 (K, H, W): finite, non-negative (specification of map files: data sets,
    section 5). ``made_by`` is JSON: what the maps were made from.
    """

    keys: NDArray[np.int64]
    cam: NDArray[np.float32]
    high_res: NDArray[np.float32]
    made_by: dict[str, Any] = field(default_factory=dict)


def map_path(folder: Path, item_id: str) -> Path:
    """Where a stage keeps the maps of an image."""
    return folder / f"{item_id}.npz"


def write_maps(path: Path, maps: MapFile, *, dtype: Literal["uint8", "float16"]) -> None:
    """Write one image's maps as a compressed npz without pickle.

    Each class plane is divided by its own maximum and stored as ``round(255 v)`` in uint8 or as
    float16; the maxima are stored beside it as float32 (``cam_scale``, ``high_res_scale``), so the
    largest error of a plane is 1/510 (uint8) or 1/4096 (float16) of its maximum.

    Raises:
        ArtefactError: if shapes do not fit, a key repeats, a value is negative, NaN or infinite,
            or ``dtype`` is unknown; and as `write_bytes`.
    """
    if dtype not in ("uint8", "float16"):
        raise ArtefactError(f"map type {dtype!r} is unknown; choose 'uint8' or 'float16'")
    _check_maps(path, maps)
    members: dict[str, NDArray[Any]] = {"format": np.array("fg"), "keys": maps.keys}
    for name, values in (("cam", maps.cam), ("high_res", maps.high_res)):
        scale = values.max(axis=(1, 2), initial=0)
        unit = values / np.where(scale > 0, scale, 1)[:, None, None]
        members[name] = np.rint(unit * 255).astype(np.uint8) if dtype == "uint8" else unit
        members[name] = members[name].astype(dtype)
        members[f"{name}_scale"] = scale
    made_by = _json_text(maps.made_by, f"made_by of {path}", indent=None)
    members["made_by"] = np.frombuffer(made_by.encode(), dtype=np.uint8)

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=_ZLIB_LEVEL) as archive:
        for name, array in members.items():
            # a member opened by name carries no date: equal maps give equal bytes
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def read_maps(path: Path) -> MapFile:
    """Read what `write_maps` wrote, as float32.

    Raises:
        ArtefactError: naming the file, if it is missing, damaged, or has other contents.
    """
    data = read_bytes(path)
    try:
        archive = np.load(io.BytesIO(data), allow_pickle=False)
        members = {name: archive[name] for name in _MAP_MEMBERS}
        made_by = json.loads(members["made_by"].tobytes())
        kind = str(members["format"])
        planes = {
            name: _restore(members[name], members[f"{name}_scale"]) for name in ("cam", "high_res")
        }
    except Exception as error:  # a damaged archive makes zipfile, zlib and numpy raise anything
        raise _damaged(path, str(error)) from error
    if kind != "fg":
        raise _damaged(path, f"its format is {kind!r}, not 'fg'")
    maps = MapFile(members["keys"], planes["cam"], planes["high_res"], made_by)
    _check_maps(path, maps)
    return maps


def _restore(values: NDArray[Any], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    unit = values.astype(np.float32)
    if values.dtype == np.uint8:
        unit /= 255
    unit *= scale[:, None, None]
    return unit


def _check_maps(path: Path, maps: MapFile) -> None:
    def refuse(problem: str) -> ArtefactError:
        return ArtefactError(f"maps of {path} are refused: {problem}")

    if maps.keys.ndim != 1 or maps.keys.dtype != np.int64:
        raise refuse(f"keys are {maps.keys.dtype} {maps.keys.shape}; expected int64 (K,)")
    count = len(maps.keys)
    if len(set(maps.keys.tolist())) != count or (count and maps.keys.min() < 0):
        raise refuse(f"keys {maps.keys.tolist()} repeat or are negative; give each class once")
    if maps.high_res.ndim != 3:
        raise refuse(f"high_res has shape {maps.high_res.shape}; expected (K, H, W)")
    height, width = maps.high_res.shape[1:]
    shapes = {"high_res": (count, height, width)}
    shapes["cam"] = (count, -(-height // 4), -(-width // 4))
    for name, values in (("cam", maps.cam), ("high_res", maps.high_res)):
        if values.shape != shapes[name] or values.dtype != np.float32:
            raise refuse(
                f"{name} is {values.dtype} {values.shape}; expected float32 {shapes[name]}"
            )
        # of NaN both comparisons are false
        if values.size and not (values.min() >= 0 and values.max() < np.inf):
            raise refuse(f"{name} has negative, NaN or infinite values; maps are finite and >= 0")


def _damaged(path: Path, reason: str) -> ArtefactError:
    return ArtefactError(
        f"{path} is damaged or of another kind ({reason or 'unreadable'}); delete it and run the "
        "step that makes it again"
    )
