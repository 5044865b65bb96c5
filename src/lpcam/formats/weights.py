"""Conversion of foreign weights (``.pth``, ``.pt``, ``.pkl`` of torch.save) to safetensors files.

A pickle is a program. ``torch.load(weights_only=True)`` runs the few of its instructions that build
tensors and plain containers and refuses every name outside its own list; what other packages have
added to that list is removed while a file is read. Crafted files got past it in torch before 2.6
(CVE-2025-32434) and before 2.10 (CVE-2026-24747); this package requires a newer one. Such a parser
may have further flaws: convert files of unknown origin where nothing can be lost.

Neither the unpacked archive nor all tensors together may be larger than four times the file.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from lpcam.classifiers.classifier import Classifier
from lpcam.data.coco.dataset import COCO_CATEGORIES
from lpcam.data.voc import CLASSES
from lpcam.formats.pickled_arrays import NUMPY_STAND_INS, ArrayStandIn
from lpcam.runtime.errors import ArtefactError, shortened
from lpcam.runtime.files import digest_bytes, read_bytes, write_tensors
from lpcam.runtime.versions import __version__
from lpcam.training.released import Released, recognised, without_prefixes

WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
"""Keys under which training programs keep the weights, in the order in which they are tried."""
KNOWN_CLASSES = {20: CLASSES, 80: tuple(name for _, name in COCO_CATEGORIES)}
"""Classes of the released files, by their number: PASCAL VOC's and MS COCO's."""
# Tied weights are once in a file and twice in its dictionary; torch does not compress.
_GROWTH = 4
_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def convert_weights(
    source: Path,
    target: Path,
    *,
    prefix: str = "",
    kinds: Sequence[Released] = (),
    classes: Sequence[str] | None = None,
    onto: Path | None = None,
) -> str:
    """Convert a pickled state dict to safetensors, without running code; what was done, in lines.

    Args:
        source: written by torch.save, in its present or older layout: names and tensors, or a
            dictionary with those under one of `WRAPPERS`; or safetensors.
        target: the ``.safetensors`` file, written after everything succeeded.
        prefix: convert only tensors whose names start with it, and remove it, with or without the
            ``"module."`` and ``"_orig_mod."`` of wrappers, which are removed from all names.
        kinds: released files to recognise; their network is written, for a recipe's ``trained``.
        classes: names of the classes of a recognised network (default: by `KNOWN_CLASSES`).
        onto: converted classifier whose head a file of ReCAM's second classifier replaces.

    Raises:
        ArtefactError: if the source is damaged, asks for anything but tensors and plain containers,
            claims more than four times its size, holds no state dict or no finite values, or does
            not fit its network; if the target is not another ``.safetensors`` file.
    """
    if not source.is_file():
        raise ArtefactError(f"{source} is not a file; expected a file written by torch.save")
    if target.suffix != ".safetensors" or target.resolve() == source.resolve():
        raise ArtefactError(f"cannot write weights to {target}; give another .safetensors file")
    data = read_bytes(source)
    try:
        taken_from, entries = _unwrap(_load(data))
        tensors, left_out = _tensors(len(data), entries)
        taken, stripped = _below(tensors, prefix)
        for name, tensor in taken.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ArtefactError(f"the tensor {name!r} holds NaN or infinity; fetch it again")
        network, told = _network(taken, kinds, classes, onto)
    except ArtefactError as error:
        raise ArtefactError(f"{source} is refused: {error}") from error
    left_out += [name for name in tensors if not name.startswith(stripped)]
    record = {
        "kind": "weights",
        "source": source.name,
        "source_digest": digest_bytes(data),
        "taken_from": taken_from,
        "stripped": stripped,
        "left_out": left_out,
        "made_by": {"lpcam": __version__},
    }
    if network is None:
        write_tensors(target, taken, record)
    else:
        network.save(target, {**record, "released": told})
        taken = network.state_dict()
    values = sum(tensor.numel() for tensor in taken.values())
    lines = [] if told is None else [told]
    lines.append(f"{len(taken)} tensors with {values:,} values written to {target}")
    if taken_from:
        lines.append(f"taken from {' / '.join(map(repr, taken_from))} of the file")
    if stripped:
        lines.append(f"prefix {stripped!r} removed from the names")
    if left_out:
        lines.append(f"{len(left_out)} entries left out (not weights): {_some(left_out)}")
    return "\n".join(lines)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], str]:
    """The tensors below a prefix, without it and those of wrappers, and what was removed."""
    bare, removed = without_prefixes(tensors)
    for names, before in ((tensors, ""), (bare, removed)):
        below = {n.removeprefix(prefix): t for n, t in names.items() if n.startswith(prefix)}
        if below and "" not in below:
            taken, more = without_prefixes(below)
            return taken, before + prefix + more
    raise ArtefactError(
        f"the prefix {prefix!r} begins no name or is one; they are {_some(tensors)}"
    )


def _network(
    state: Mapping[str, Tensor],
    kinds: Sequence[Released],
    classes: Sequence[str] | None,
    onto: Path | None,
) -> tuple[Any, str | None]:
    """The network of a released file, and what it is; None for other weights."""
    if kinds and list(state) == ["classifier.weight"]:
        return _second_classifier(state["classifier.weight"], onto)
    kind = recognised(state, kinds)
    if kind is None:
        return None, None
    count = 0 if kind.classes is None else kind.classes(state)
    names = tuple(classes or KNOWN_CLASSES.get(count, ()))
    if kind.classes is not None and len(names) != count:
        raise ArtefactError(
            f"it is {kind.title} of {count} classes, and {len(names) if classes else 'no'} "
            "names are given; give as many: --classes FILE"
        )
    network = kind.build(names)
    kind.load(network, state)
    of_classes = f" of {count} classes, from {names[0]} to {names[-1]}" if count else ""
    return network, f"{kind.title}{of_classes}; a recipe takes it as {kind.section}.trained"


def _second_classifier(weight: Tensor, onto: Path | None) -> tuple[Any, str]:
    """ReCAM's second classifier: a head, on the backbone of the first."""
    if onto is None:
        raise ArtefactError(
            "it holds a head alone, as ReCAM's second classifier; convert the first one, "
            "res50_cam.pth, and give that file: --onto FILE"
        )
    network = Classifier.load(onto)
    rows = weight.flatten(1)
    if rows.shape != network.weight.shape:
        raise ArtefactError(
            f"its head is {tuple(weight.shape)}, that of {onto.name} {tuple(network.weight.shape)}"
        )
    network.head.weight.data = rows
    told = f"ReCAM's second classifier, on the backbone of {onto.name}"
    return network, f"{told}; a recipe takes it as classifier.trained"


def _load(data: bytes) -> Any:
    try:
        if data[8:9] == b"{":  # the header of a safetensors file, after its length
            return safetensors.torch.load(data)
        if data.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                _check_claim(len(data), sum(member.file_size for member in archive.infolist()))
        with _only_our_globals(), warnings.catch_warnings(action="ignore"):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True, mmap=False)
    except ArtefactError:
        raise
    except Exception as error:  # a crafted or damaged file makes torch raise anything
        raise ArtefactError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """The cause in our own words: torch's message explains how to switch its safety off."""
    text = str(error)
    if asked := re.search(r"GLOBAL (\w\S+)|reduce for unrecognized function (.+)", text):
        return (
            f"it asks for {asked[1] or asked[2]}, which is neither a tensor nor a plain container; "
            "nothing was run. Save the state dict alone: torch.save(model.state_dict(), FILE)"
        )
    if "TorchScript" in text:
        return "it is a TorchScript program; save its state_dict() with torch.save"
    cause = text.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    return (
        f"it is damaged or not written by torch.save ({type(error).__name__} {cause:.120}); fetch "
        "it again, or save a dictionary of tensors with torch.save"
    )


def _unwrap(loaded: Any) -> tuple[list[str], Mapping[Any, Any]]:
    """The keys that led to the state dict, and it."""
    path: list[str] = []
    while isinstance(loaded, dict):
        found = [key for key in WRAPPERS if isinstance(loaded.get(key), dict)]
        if not found and any(isinstance(value, Tensor | ArrayStandIn) for value in loaded.values()):
            return path, loaded
        if not found or len(path) == len(WRAPPERS):  # a dictionary may hold itself
            break
        path.append(found[0])
        loaded = loaded[found[0]]
    holds = f"the keys {_some(loaded)}" if isinstance(loaded, dict) else type(loaded).__name__
    raise ArtefactError(
        "it holds no state dict: expected names with tensors, at the top or under "
        f"{', '.join(map(repr, WRAPPERS))}; found {holds}"
    )


def _tensors(size: int, entries: Mapping[Any, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors, and the names of the plain values beside them."""
    tensors: dict[str, Tensor] = {}
    left_out = []
    found = {k: v.value if type(v) is ArrayStandIn else v for k, v in entries.items()}
    # before anything is copied: a view may claim any size, and arrays may share their bytes
    arrays = [v for v in found.values() if isinstance(v, np.ndarray | Tensor)]
    _check_claim(size, sum(math.prod(array.shape) * array.itemsize for array in arrays))
    for name, value in found.items():
        if not isinstance(name, str):
            raise ArtefactError(f"it has the key {name!r:.80}; expected names of weights")
        if isinstance(value, np.ndarray):
            native = np.array(value, value.dtype.newbyteorder("="), order="C")
            value = torch.from_numpy(native)  # noqa: PLW2901
        if type(value) in (type(None), bool, int, float, str, bytes):
            left_out.append(name)
        elif type(value) not in (Tensor, nn.Parameter):
            raise ArtefactError(
                f"it has a {type(value).__name__} under {name!r}; expected tensors (numbers and "
                "text are left out). Save it without this entry"
            )
        elif value.dtype not in _DTYPES or (value.layout, value.device.type, value.is_nested) != (
            *(torch.strided, "cpu", False),
        ):
            raise ArtefactError(
                f"the tensor {name!r} is of {value.dtype} and {value.layout} on {value.device}; "
                "save dense real numbers"
            )
        else:
            tensors[name] = value.detach()
    return tensors, left_out


def _check_claim(size: int, claimed: int) -> None:
    if claimed > _GROWTH * size:
        raise ArtefactError(
            f"its {size:,} bytes claim {claimed:,} bytes of tensors, more than {_GROWTH} for each"
        )


def _some(names: Iterable[Any]) -> str:
    return shortened([f"{name!r:.80}" for name in names]) or "none"


@contextmanager
def _only_our_globals() -> Iterator[None]:
    """Limit torch's list to its own names and our stand-ins, without what a process has added."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    stand_ins: list[Any] = [(stand_in, name) for name, stand_in in NUMPY_STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(stand_ins):
            yield
    finally:
        torch.serialization.add_safe_globals(others)
