"""Export of a classifier with LPCAM to ONNX and torch.export."""

from __future__ import annotations

import copy
import io
import json
import math
import operator
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpcam.formats.models.lpcam_model import LPCAMModel
from lpcam.formats.models.onnx import (
    TRACED_SIZE,
    ExportModule,
    ExportParity,
    Outputs,
    compare_and_write,
    exporting,
    rounded_up,
    write_onnx,
)
from lpcam.runtime.errors import ArtefactError
from lpcam.runtime.versions import versions

_MAP_ERROR = 1e-4  # accepted difference of maps, whose values are at most 1
_COSINE_ERROR = 1e-5  # accepted rounding error, which a division by a tiny maximum magnifies
_METADATA = "lpcam.json"


def export_onnx(
    model: LPCAMModel,
    path: Path | str,
    *,
    dynamic: bool = True,
    size: tuple[int, int] | None = None,
) -> ExportParity:
    """Write a model as ONNX, after comparing the file with it in onnxruntime if installed.

    The input is ``image``, uint8 RGB (B, H, W, 3), if the model has a preprocessing, which is then
    part of the file; else ``images``, normalised float32 (B, c, H, W). The outputs are ``logits``
    (B, N) and ``maps`` (B, N, H, W), float32. An earlier file is replaced only if the comparison
    succeeds.

    Args:
        dynamic: whether the file takes images of any size from 32 pixels a side; otherwise only of
            ``size``. The batch has any size in both cases. Ignored for a model of one image size.
        size: height and width of the traced image, in pixels; None chooses one.

    Raises LpcamError without onnx or onnxscript, and ArtefactError if the network cannot be
    exported, or the file differs by more than 1e-4, is larger than 2 GiB, or cannot be written.
    """
    size, dynamic = _size(model, size, dynamic)
    return write_onnx(_LPCAMFile(model), path, dynamic=dynamic, size=size)


def export_program(
    model: LPCAMModel,
    path: Path | str,
    *,
    dynamic: bool = True,
    size: tuple[int, int] | None = None,
) -> ExportParity:
    """Write a model as a torch.export program (.pt2) without pickles, as :func:`export_onnx`.

    The metadata are its extra file ``lpcam.json``.
    """
    size, dynamic = _size(model, size, dynamic)
    module = _LPCAMFile(model)
    text, values = module.described(size, dynamic=dynamic)
    metadata = json.dumps({"meaning": text, **values}, sort_keys=True, ensure_ascii=False)
    shapes = dict.fromkeys(module.dimensions(dynamic), torch.export.Dim.AUTO)
    with exporting(size, dynamic=dynamic):
        program = torch.export.export(
            module, (module.example(2, size),), dynamic_shapes=(shapes,), strict=False
        )
        program._example_inputs = None
        _without_ceil(program.graph)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # holds local paths
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={_METADATA: metadata})
    (given,) = program.graph_signature.user_inputs
    shape = next(n.meta["val"].shape for n in program.graph.nodes if n.name == given)
    data = _with_names(buffer.getvalue(), shape, module.dimensions(dynamic))
    _refuse_pickles(data, path)

    return compare_and_write(
        module,
        data,
        lambda: torch.export.load(io.BytesIO(data)).module(),
        path,
        size,
        dynamic=dynamic,
    )


def _size(
    model: LPCAMModel, size: tuple[int, int] | None, dynamic: bool
) -> tuple[tuple[int, int], bool]:
    """Size of the traced image, and whether the file takes other sizes."""
    fixed = model.fixed_size
    if size is None:
        size = fixed or rounded_up(TRACED_SIZE, model.multiple)
    if (fixed is not None and size != fixed) or size != rounded_up(size, model.multiple):
        wanted = f"multiples of {model.multiple}" if fixed is None else f"{fixed[0]} x {fixed[1]}"
        raise ArtefactError(f"size {size[0]} x {size[1]} does not fit: the model takes {wanted}")
    return size, dynamic and fixed is None


def _without_ceil(graph: torch.fx.Graph) -> None:
    # ceil(a / b) of sizes, as in timm's "same" padding: torch 2.15 can only save -(-a // b)
    for node in list(graph.nodes):
        quotient = node.args[0] if node.target is math.ceil else None
        if not isinstance(quotient, torch.fx.Node) or quotient.target is not operator.truediv:
            continue
        found: Any = quotient.args[0]
        with graph.inserting_before(node):
            for function in (operator.neg, operator.floordiv, operator.neg):
                others = quotient.args[1:] if function is operator.floordiv else ()
                values = [getattr(each, "meta", {}).get("val", each) for each in (found, *others)]
                found = graph.call_function(function, (found, *others))
                found.meta["val"] = function(*values)
        node.replace_all_uses_with(found)
        graph.erase_node(node)
        if not quotient.users:
            graph.erase_node(quotient)


def _with_names(data: bytes, shape: Sequence[Any], axes: Mapping[int, str]) -> bytes:
    """A program with names for the symbols of its input; torch's compilers need an s first."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(written, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            for place, name in axes.items() if entry.filename.endswith("/model.json") else ():
                for start, end in (("Symbol('", "'"), ('"', '":')):
                    symbol = f"{start}{shape[place]}{end}".encode()
                    content = content.replace(symbol, f"{start}size_{name}{end}".encode())
            new.writestr(entry, content)
    return written.getvalue()


def _refuse_pickles(data: bytes, path: Path | str) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            pickled = name.endswith((".pkl", ".pt")) and bool(content)
            if name.endswith("_config.json"):
                entries = json.loads(content).get("config", {}).values()
                pickled = any(entry.get("use_pickle") for entry in entries)
            if pickled:
                raise ArtefactError(
                    f"torch would pickle a part of this model ({name}), which this package does "
                    f"not write; {path} is not written; export to ONNX instead"
                )


class _LPCAMFile(ExportModule):
    output = "maps"
    limit = _MAP_ERROR

    def __init__(self, model: LPCAMModel) -> None:
        super().__init__(model.preprocessing, model.channels, model.multiple)
        self.grid = "" if model.enlarge else "grid_"
        self.model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Outputs:
        found: Outputs = self.model(self.normalised(images))
        return found

    def error(self, images: Tensor, expected: Tensor, found: Tensor) -> float:
        # Rounding of a map that is hardly above zero before its normalisation counts less.
        difference = (found - expected).abs()
        if self.model.head.normalize is not None:
            images = self.normalised(images)
            size = (images.shape[-2], images.shape[-1]) if self.model.enlarge else None
            with torch.no_grad():
                features, *_ = self.model.features(images)
                top = self.model.head.activation(features, size).amax((-2, -1), keepdim=True)
            difference = difference * (top / (top + _COSINE_ERROR / _MAP_ERROR))
        return float(difference.max())

    def meaning(self) -> str:
        taken = "image: uint8 RGB (batch, height, width, 3)"
        if self.pixels is None:
            taken = f"images: float32, normalised (batch, {self.channels}, height, width)"
        grid = "height, width" if self.model.enlarge else "feature grid"
        return (
            f"{taken}. logits: float32 (batch, classes). maps: float32 (batch, classes, {grid}), "
            f"{'from 0 to 1' if self.model.head.normalize else 'at least 0'}"
        )

    def metadata(self) -> dict[str, Any]:
        preprocessing = self.model.preprocessing
        return {
            "classes": list(self.model.classes),
            "preprocessing": asdict(preprocessing) if preprocessing else None,
            "normalize": self.model.head.normalize,
            "versions": versions(),
            "made_by": self.model.made_by,
        }
