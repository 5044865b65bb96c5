"""Foreign weights in a pickle, made into a safetensors file: the one place that reads a pickle.

A pickle is a program. torch runs the few of its instructions that build tensors and plain
containers (``weights_only=True``) and refuses every name outside its own list; this module empties
what other packages have added to that list. Two known flaws let crafted files past it:
CVE-2025-32434 (torch before 2.6: code runs) and CVE-2026-24747 (before 2.10: memory is
overwritten). torch 2.10 is therefore the floor, and this package asks for a newer one. A parser of
this size may have further flaws: convert files of unknown origin where nothing is to be lost.

NumPy's arrays and scalars, which training programs keep beside the weights, are rebuilt by the
stand-ins of :mod:`lpcam.arrays`, never by NumPy, whose own reconstruction trusts the file (a forged
dtype makes bytes into pointers).

What a file can claim is bounded by its own size: neither the unpacked archive nor all tensors
together may be larger than four times the file.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lpcam.arrays import NUMPY_STAND_INS, ArrayStandIn
from lpcam.errors import ArtefactError
from lpcam.storage import digest_bytes, read_bytes, write_tensors
from lpcam.version import __version__

WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
"""Keys under which training programs keep the weights, in the order in which they are tried."""
_PARALLEL_PREFIX = "module."
# A tensor may stand in a file once and in the dictionary twice (tied weights); archives of
# torch are not compressed.
_GROWTH = 4
_ZIP_START = b"PK\x03\x04"
_TAR_MARK = slice(257, 262)
_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_PLAIN = (type(None), bool, int, float, str, bytes)


@dataclass(frozen=True)
class Conversion:
    """What `convert_weights` did.

    ``tensors`` and ``values`` count what was written; ``taken_from`` names the keys of the
    dictionary that held the weights, outermost first (none: the file was the dictionary);
    ``stripped`` is what every name lost at its start; ``left_out`` names entries not written.
    """

    source: Path
    target: Path
    tensors: int
    values: int
    taken_from: tuple[str, ...]
    stripped: str
    left_out: tuple[str, ...]

    def summary(self) -> str:
        """What was done, a line for each fact."""
        lines = [f"{self.tensors} tensors with {self.values:,} values written to {self.target}"]
        if self.taken_from:
            lines.append(f"taken from {' / '.join(map(repr, self.taken_from))} of the file")
        if self.stripped:
            lines.append(f"names without their common start {self.stripped!r}")
        if self.left_out:
            lines.append(
                f"{len(self.left_out)} left out (no tensors of the weights): {_some(self.left_out)}"
            )
        return "\n".join(lines)


def convert_weights(source: Path, target: Path, *, prefix: str = "") -> Conversion:
    """Convert a pickled state dict (.pth, .pt, .pkl of torch.save) to a safetensors file.

    The file holds names and tensors, or a dictionary with those under one of `WRAPPERS`. Values and
    dtypes are kept; nothing of the file is run.

    Args:
        source: written by torch.save, as an archive or in the older layout of torch 0.4 to 1.5.
        target: the .safetensors file; one that exists is replaced, and only when all is well.
        prefix: take only the tensors whose names start so, and drop it, e.g. ``"backbone."``. A
            common ``"module."`` of parallel training is dropped before.

    Raises:
        ArtefactError: if the source is missing, damaged, no file of torch.save, asks for anything
            but tensors and plain containers, unpacks to more than four times its size, holds no
            state dict, or a tensor with NaN, infinity or an unusual layout or dtype; if the target
            is no other .safetensors file or cannot be written.
    """
    if target.suffix != ".safetensors":
        raise ArtefactError(f"weights are written as .safetensors, got {target.name!r}; rename it")
    if not source.is_file():
        what = "is a folder" if source.is_dir() else "is no file"
        raise ArtefactError(f"{source} {what}; give a file that torch.save wrote")
    if target.exists() and target.samefile(source):
        raise ArtefactError(f"{target} is the source too; give another file to write")

    data = read_bytes(source)
    taken_from, entries = _unwrap(source, _load(source, data))
    tensors, left_out = _split(source, len(data), entries)
    parallel = all(name.startswith(_PARALLEL_PREFIX) for name in tensors)
    stripped = (_PARALLEL_PREFIX if parallel else "") + prefix
    taken = {n.removeprefix(stripped): t for n, t in tensors.items() if n.startswith(stripped)}
    if not taken or "" in taken:
        raise ArtefactError(
            f"{source} has {'no' if not taken else 'a'} tensor named {stripped!r}"
            f"{' and more' if not taken else ' and no more'}; its names are {_some(list(tensors))}"
        )
    left_out += [name for name in tensors if not name.startswith(stripped)]
    tensors = taken
    _check(source, len(data), tensors)
    record = {
        "kind": "weights",
        "source": source.name,
        "source_digest": digest_bytes(data),
        "taken_from": list(taken_from),
        "stripped": stripped,
        "left_out": left_out,
        "made_by": {"lpcam": __version__},
    }
    write_tensors(target, tensors, record)
    values = sum(tensor.numel() for tensor in tensors.values())
    return Conversion(source, target, len(tensors), values, taken_from, stripped, tuple(left_out))


def _load(source: Path, data: bytes) -> Any:
    if data.startswith(_ZIP_START):
        _check_archive(source, data)
    if data[_TAR_MARK] == b"ustar":
        raise ArtefactError(
            f"{source} is refused: it is a tar archive, as torch before 0.4 wrote them, and no "
            "restricted reader of it exists; load and save it again with torch 1.x in a sandbox"
        )
    try:
        with _only_our_globals(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle's protocol
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # a crafted or damaged file makes torch raise anything
        raise ArtefactError(f"{source} is refused: {_reason(error)}") from error


def _check_archive(source: Path, data: bytes) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise ArtefactError(
            f"{source} is refused: it is a damaged archive ({error}); fetch it again"
        ) from error
    unpacked = sum(member.file_size for member in members)
    if unpacked > _GROWTH * len(data):
        raise ArtefactError(
            f"{source} is refused: its {len(data):,} bytes unpack to {unpacked:,}, more than "
            f"{_GROWTH} times as many; torch.save does not compress"
        )


def _reason(error: Exception) -> str:
    """Words of our own: those of torch advise to switch its safety off."""
    text = str(error)
    asked = re.search(r"GLOBAL (\w\S+)|reduce for unrecognized function (.+)", text)
    if asked:
        return (
            f"it asks for {asked[1] or asked[2]}, which is neither a tensor nor a plain "
            "container, and nothing was run; save the state dict alone where the file comes from: "
            "torch.save(model.state_dict(), FILE)"
        )
    if "TorchScript" in text:
        return "it holds a TorchScript program; save its state_dict() with torch.save"
    if "nvalid magic number" in text:
        return (
            "it is a pickle, but not one of torch.save (arrays in a plain pickle are not read); "
            "save a dictionary of tensors with torch.save where the file comes from"
        )
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    # the unpickler's own words stand between advice that is not ours
    text = text.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    if "Unsupported operand" in text:
        return (
            f"it has an instruction that torch.save does not write ({text}): it is damaged, no "
            "plain state dict, or was saved with another pickle_protocol than torch.save's own"
        )
    first = " ".join(text.split())
    return (
        "it is damaged or no file of torch.save "
        f"({type(error).__name__}{': ' if first else ''}{first:.120}); fetch it again"
    )


def _unwrap(source: Path, loaded: Any) -> tuple[tuple[str, ...], Mapping[Any, Any]]:
    """The keys that led to the state dict, and the state dict."""
    path: list[str] = []
    while isinstance(loaded, dict):
        found = [key for key in WRAPPERS if isinstance(loaded.get(key), dict)]
        if not found and any(isinstance(value, Tensor | ArrayStandIn) for value in loaded.values()):
            return tuple(path), loaded
        if not found or len(path) == len(WRAPPERS):  # a dictionary may hold itself
            break
        path.append(found[0])
        loaded = loaded[found[0]]
    holds = f"the keys {_some(list(loaded))}" if isinstance(loaded, dict) else type(loaded).__name__
    raise ArtefactError(
        f"{source} holds no state dict: expected names with tensors, at the top or under "
        f"{', '.join(map(repr, WRAPPERS))}; found {holds}"
    )


def _split(
    source: Path, size: int, entries: Mapping[Any, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors, and the names of the plain values beside them."""
    tensors: dict[str, Tensor] = {}
    left_out = []
    # before anything is copied: arrays may share their bytes
    _check_claim(source, size, [v.claimed for v in entries.values() if type(v) is ArrayStandIn])
    for name, value in entries.items():
        if not isinstance(name, str):
            raise ArtefactError(f"{source} has the key {name!r:.80}; names of weights are text")
        if type(value) is ArrayStandIn:
            tensors[name] = torch.from_numpy(np.array(value.numpy(), order="C"))
        elif type(value) in (Tensor, nn.Parameter):
            tensors[name] = value.detach()
        elif type(value) in _PLAIN:
            left_out.append(name)
        else:
            raise ArtefactError(
                f"{source} has a {type(value).__name__} under {name!r}; a state dict holds tensors "
                "(numbers and text are left out). Save it without that entry"
            )
    return tensors, left_out


def _check(source: Path, size: int, tensors: Mapping[str, Tensor]) -> None:
    def refuse(name: str, problem: str) -> ArtefactError:
        return ArtefactError(f"{source} is refused: the tensor {name!r} {problem}")

    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            raise refuse(name, "is sparse, quantised or nested; save dense floats or integers")
        if tensor.device.type != "cpu":
            raise refuse(name, f"has no values (device {tensor.device}); save it with its values")
        if tensor.dtype not in _DTYPES:
            raise refuse(name, f"has the dtype {tensor.dtype}; save real floats or integers")
    # before anything is copied: a view may claim any size
    _check_claim(source, size, [t.numel() * t.element_size() for t in tensors.values()])
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise refuse(name, "holds NaN or infinity; fetch the file again or train anew")


def _check_claim(source: Path, size: int, claims: list[int]) -> None:
    if sum(claims) > _GROWTH * size:
        raise ArtefactError(
            f"{source} is refused: its {size:,} bytes claim tensors of {sum(claims):,}, more than "
            f"{_GROWTH} times as many"
        )


def _some(names: list[str] | tuple[str, ...], count: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:count])
    return f"{shown} and {len(names) - count} more" if len(names) > count else shown or "none"


_STAND_INS: list[Any] = [(stand_in, name) for name, stand_in in NUMPY_STAND_INS.items()]


@contextmanager
def _only_our_globals() -> Iterator[None]:
    """torch's own list and our stand-ins alone: what else a process has added is put aside."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            yield
    finally:
        torch.serialization.add_safe_globals(others)
