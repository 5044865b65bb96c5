"""Export of models to one file: the ONNX exporter, metadata, and the comparison with the model."""

from __future__ import annotations

import abc
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcam.classifiers.classifier import Preprocessing
from lpcam.method.functional import NORM_EPSILON
from lpcam.runtime.errors import ArtefactError, import_extra
from lpcam.runtime.files import write_bytes
from lpcam.runtime.versions import __version__

TRACED_SIZE = (97, 131)
"""Default height and width of the traced image; odd numbers, as photographs may have."""
_OTHER_SIZE = (128, 83)  # of a second image on which a file of dynamic size is compared
_SMALLEST_SIDE = 32
_OPSET = 18  # first version of ONNX's operators whose Resize has every mode used here
_LOGIT_ERROR = 1e-4  # accepted difference, relative to the largest logit
_LARGEST_FILE = 2**31 - 1  # limit of protocol buffers
Outputs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ExportParity:
    """How far an exported file differs from its model.

    ``errors``: of ``logits`` relative to the largest, of ``maps`` absolute, of ``labels`` the share
    of an image's pixels.
    """

    path: Path
    dynamic: bool  #: Whether it takes images of any size.
    checked: bool  #: False if onnxruntime is not installed; the rest is then empty.
    sizes: tuple[tuple[int, int], ...]  #: (height, width) of the compared images.
    errors: Mapping[str, float]


class ExportModule(nn.Module, abc.ABC):
    """Base class of modules that are exported: images to two outputs.

    A file with preprocessing takes ``image``, uint8 RGB (B, H, W, 3), else ``images``, normalised
    float32 (B, c, H, W).
    """

    output: str  #: Name of the output beside ``logits``.
    limit: float  #: Largest accepted error of that output.
    grid = ""  #: What the height and width of outputs are called before these words.
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, preprocessing: Preprocessing | None, channels: int = 3, multiple: int = 1
    ) -> None:
        super().__init__()
        self.takes_pixels = preprocessing is not None
        for name, values in asdict(preprocessing).items() if preprocessing else ():
            # in the file "mean" is also the name of a step
            self.register_buffer(f"pixel_{name}", torch.tensor(values)[:, None, None])
        self.channels, self.multiple = channels, multiple
        self.input = "image" if preprocessing else "images"

    @abc.abstractmethod
    def meaning(self) -> str:
        """Inputs and outputs in words."""

    @abc.abstractmethod
    def metadata(self) -> dict[str, Any]:
        """JSON values that describe the model."""

    @abc.abstractmethod
    def error(self, images: Tensor, expected: Tensor, found: Tensor) -> float:
        """Difference of the second output from what was expected for some images."""

    def normalised(self, images: Tensor) -> Tensor:
        """Normalised float32 (B, c, H, W) of the file's input."""
        if not self.takes_pixels:
            return images
        return (images.permute(0, 3, 1, 2).float() / 255.0 - self.pixel_mean) / self.pixel_std

    def example(self, count: int, size: tuple[int, int]) -> Tensor:
        """An input of ``count`` images of a size, for tracing and comparing."""
        images = _photograph(count, size, self.channels)
        if self.takes_pixels:
            return images
        return (images.permute(0, 3, 1, 2).float() / 127.5 - 1.0).contiguous()

    def dimensions(self, dynamic: bool) -> dict[int, str]:
        """Names of the input's axes that have any length."""
        first = 1 if self.takes_pixels else 2
        return {0: "batch", **({first: "height", first + 1: "width"} if dynamic else {})}

    def described(self, size: tuple[int, int], *, dynamic: bool) -> tuple[str, dict[str, Any]]:
        """The file's text and metadata, with the image sizes it takes."""
        if min(size) < _SMALLEST_SIDE:
            raise ArtefactError(
                f"size {size[0]} x {size[1]} is too small; give sides of at least {_SMALLEST_SIDE}"
            )
        sides = f"{size[0]} x {size[1]} pixels only"
        if dynamic:
            which = "any" if self.multiple == 1 else f"multiples of {self.multiple}"
            sides = f"{which}, from {rounded_up((_SMALLEST_SIDE,) * 2, self.multiple)[0]} pixels"
        text = f"{self.meaning()}. Height and width: {sides}."
        return text, {**self.metadata(), "sides": sides}


def rounded_up(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Height and width, each the next multiple of a number."""
    height, width = (-(-side // multiple) * multiple for side in size)
    return height, width


def _export(module: ExportModule, *, dynamic: bool, size: tuple[int, int]) -> Any:
    """The ONNX model of a module; ArtefactError if torch's exporter fails on it."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # The exporter takes a batch of one for a constant, and refuses ranges it cannot prove.
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            program: Any = torch.onnx.export(
                module,
                (module.example(2, size),),
                dynamo=True,
                opset_version=_OPSET,
                dynamic_shapes=(module.dimensions(dynamic),),
                input_names=[module.input],
                output_names=["logits", module.output],
                verbose=False,
            )
            return program.model_proto
    except Exception as error:  # the exporter raises whatever one of its passes meets
        what = "with images of any size" if dynamic else f"at {size[0]} x {size[1]} pixels"
        advice = "; dynamic=False with the size of your images may do" if dynamic else ""
        cause = " ".join(str(error.__cause__ or error).split())
        raise ArtefactError(
            f"the network cannot be exported {what}: {type(error).__name__} ({cause:.300}){advice}"
        ) from error
    finally:
        logging.disable(level)


def write_onnx(
    module: ExportModule, path: Path | str, *, dynamic: bool, size: tuple[int, int]
) -> ExportParity:
    """Write a module on the CPU as ONNX, as :func:`.lpcam_model.export_onnx` describes."""
    path, (text, values) = Path(path), module.described(size, dynamic=dynamic)
    for name in ("onnx", "onnxscript"):
        import_extra(name, "onnx", f"the export to ONNX needs {name}")
    model = _export(module, dynamic=dynamic, size=size)
    _name_axes(model.graph, module.dimensions(dynamic), module.grid)
    _describe(model, text, values)
    if model.ByteSize() > _LARGEST_FILE:
        raise ArtefactError(
            f"the ONNX file would have {model.ByteSize():,} bytes, and its format ends at "
            f"{_LARGEST_FILE:,}; export a smaller network"
        )
    data: bytes = model.SerializeToString()
    other = _OTHER_SIZE if size != _OTHER_SIZE else TRACED_SIZE
    sizes = (size, rounded_up(other, module.multiple))[: 2 if dynamic else 1]
    sizes = sizes if importlib.util.find_spec("onnxruntime") else ()
    errors = _compare(module, data, path, sizes, dynamic=dynamic)
    write_bytes(path, data)
    return ExportParity(path, dynamic, bool(sizes), sizes, errors)


def _compare(
    module: ExportModule,
    data: bytes,
    path: Path,
    sizes: Sequence[tuple[int, int]],
    *,
    dynamic: bool,
) -> dict[str, float]:
    """The largest differences of a file from its module; ArtefactError if they are too large."""
    advice = "give dynamic=False and the size of your images" if dynamic else "try another export"
    names = ("logits", module.output)
    try:
        run = _open_file(module, data) if sizes else None
        found = [_errors(module, run, count, tried) for count, tried in enumerate(sizes, start=1)]
    except Exception as error:  # the runtime's errors have no common base class
        raise ArtefactError(
            f"the exported model cannot be run ({' '.join(str(error).split()):.300}); {path} is "
            f"not written; {advice}"
        ) from error
    for tried, (logits, second) in zip(sizes, found, strict=True):
        if not (logits <= _LOGIT_ERROR and second <= module.limit):  # also if one is NaN
            raise ArtefactError(
                f"the file differs from the model at {tried[0]} x {tried[1]} pixels: logits by "
                f"{logits:.2g} of the largest, {module.output} by {second:.2g} (at most "
                f"{_LOGIT_ERROR} and {module.limit} accepted); {path} is not written; {advice}"
            )
    return dict(zip(names, map(max, zip(*found, strict=True)), strict=False))


def _open_file(module: ExportModule, data: bytes) -> Callable[[Tensor], Outputs]:
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Outputs:
        first, second = session.run(None, {module.input: images.numpy()})
        return torch.from_numpy(first), torch.from_numpy(second)

    return run


def _errors(
    module: ExportModule, run: Any, count: int, size: tuple[int, int]
) -> tuple[float, float]:
    """Differences of a file's two outputs from those of its module."""
    images = module.example(count, size)
    with torch.no_grad():
        expected, found = module(images), run(images)
    shapes, wanted = ([tuple(each.shape) for each in one] for one in (found, expected))
    if shapes != wanted:
        raise ValueError(f"it gives {shapes} for {tuple(images.shape)}, the model {wanted}")
    scale = expected[0].abs().max().clamp_min(NORM_EPSILON)
    logits = float((found[0] - expected[0]).abs().max() / scale)
    return logits, module.error(images, expected[1], found[1])


def _name_axes(graph: Any, given: Mapping[int, str], grid: str) -> None:
    """Name the axes of inputs and outputs that have any length, which may be expressions."""
    for value in (*graph.input, *graph.output):
        axes = value.type.tensor_type.shape.dim
        last = {len(axes) - 2: f"{grid}height", len(axes) - 1: f"{grid}width", 0: "batch"}
        for place, axis in enumerate(axes):
            if axis.dim_param:
                axis.dim_param = given[place] if value in graph.input else last[place]


def _describe(model: Any, text: str, values: Mapping[str, Any]) -> None:
    """Add metadata; remove the exporter's notes, which hold source code and local paths."""
    whole = model.graph
    parts = [model, *whole.input, *whole.output, *whole.initializer]
    for graph in (whole, *model.functions):
        parts += [graph, *graph.node, *graph.value_info]
    for part in parts:
        part.doc_string = ""
        del part.metadata_props[:]
    model.doc_string = text
    model.producer_name, model.producer_version = "lpcam", __version__
    model.metadata_props.add(key="version", value=__version__)
    for key, value in values.items():
        text = json.dumps(value, sort_keys=True, ensure_ascii=False)
        model.metadata_props.add(key=key, value=text)


def _photograph(count: int, size: tuple[int, int], channels: int) -> Tensor:
    """Images (B, H, W, C) of soft colour blobs, similar to photographs."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 6, 6, generator=generator)
    blobs = F.interpolate(coarse, size=size, mode="bicubic").permute(0, 2, 3, 1)
    return (255.0 * blobs).clamp(0, 255).byte().contiguous()
