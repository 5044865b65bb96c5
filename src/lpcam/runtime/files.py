"""Files that a run writes, atomically and never pickled: bytes, JSON, tensors, and digests.

A file that cannot be read or written raises an ArtefactError that names it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lpcam.runtime.errors import ArtefactError

_TENSOR_FORMAT, _TENSOR_KEY = 1, "lpcam"


def write_bytes(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a whole file, from bytes or parts of them, or nothing; missing folders are made."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
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


def link(source: Path, folder: Path, *, last: str = "") -> None:
    """Give the files below a folder a place in another too, without a copy where that is possible.

    They may be replaced in one without a change in the other, but not written to. The file ``last``
    of the folder comes last.
    """
    found = [path for path in source.rglob("*") if path.is_file() and path.name[0] != "."]
    for path in sorted(found, key=lambda path: (path == source / last, path)):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            os.link(path, temporary)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(path, temporary)
        os.replace(temporary, target)


def read_bytes(path: Path) -> bytes:
    """The contents of a file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtefactError(
            f"cannot read {path}: {error.strerror or error}; run the step that makes it again"
        ) from error


def _json_text(value: Any, what: str, indent: int | None = None) -> str:
    """JSON with sorted keys; the message for NaN and for other types names ``what``."""
    try:
        text = json.dumps(
            value,
            sort_keys=True,
            ensure_ascii=False,
            allow_nan=False,
            indent=indent,
            separators=None if indent else (",", ":"),
        )
        text.encode()
    except (TypeError, ValueError) as error:
        raise ArtefactError(
            f"cannot write {what} as JSON: {error}; give finite numbers, text, lists and "
            "dictionaries only"
        ) from error
    return text


def write_json(path: Path, value: Any) -> None:
    """Write a value as UTF-8 JSON with sorted keys, so that equal values give equal bytes."""
    write_bytes(path, (_json_text(value, str(path), indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    data = read_bytes(path)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata as safetensors; one key, as those are ordered at random."""
    header = {"format": _TENSOR_FORMAT, "metadata": dict(metadata)}
    plain, owners = {}, set()
    for name, tensor in sorted(tensors.items()):
        whole = tensor.detach().cpu().contiguous()
        memory = whole.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory, as tied weights and views do
        plain[name] = whole.clone() if memory in owners else whole
        owners.add(memory)
    write_bytes(path, safetensors.torch.save(plain, {_TENSOR_KEY: _json_text(header, str(path))}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote: tensors on the CPU, and the metadata."""
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
    """`digest_bytes` of a file's contents."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror or error}") from error


def digest_json(value: Any) -> str:
    """Digest of a value as JSON; the order of keys does not matter, and tuples are lists."""
    return digest_bytes(_json_text(value, "a value to digest").encode())


def digest_tensors(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> str:
    """Digest of tensors by name, bit by bit, and of JSON that describes them."""
    digest = hashlib.blake2b(digest_json(description).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor's numbers, also of types that NumPy does not have (bfloat16)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _damaged(path: Path, reason: str) -> ArtefactError:
    return ArtefactError(
        f"{path} is damaged or of another kind ({reason or 'unreadable'}); delete it and run the "
        "step that makes it again"
    )


def printable(path: Path) -> str:
    """A path as text that can be written as UTF-8; bytes that are not UTF-8 become U+FFFD."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def weights_key(weights: str) -> str:
    """Identification of weights in a cache key: a word, or the digest of a file's contents."""
    is_file = weights.endswith(".safetensors") and Path(weights).is_file()
    return digest_file(Path(weights)) if is_file else weights
