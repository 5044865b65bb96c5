"""Export of models to one file: the ONNX exporter, metadata, and the comparison with the model.

Metadata are JSON texts; a file holds nothing of the machine that wrote it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lpcam.classifiers.classifier import Preprocessing
from lpcam.method.functional import NORM_EPSILON
from lpcam.runtime.errors import ArtefactError
from lpcam.runtime.files import write_bytes
from lpcam.runtime.versions import __version__

OPSET = 18
"""First version of ONNX's operators whose Resize has every mode used here."""
SMALLEST_SIDE = 32
"""Shortest side, in pixels, of an image that exported networks take."""
TRACED_SIZE = (97, 131)
"""Default height and width of the traced image; odd numbers, as photographs may have."""
OTHER_SIZE = (128, 83)
"""Height and width of a second image on which a file of dynamic size is compared."""
LOGIT_ERROR = 1e-4
"""Largest accepted difference of logits, relative to the largest logit."""
_LARGEST_FILE = 2**31 - 1  # limit of protocol buffers
Outputs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ExportParity:
    """How far an exported file differs from its model.

    Attributes:
        dynamic: whether it takes images of any size.
        checked: False if onnxruntime is not installed; ``sizes`` and ``errors`` are then empty.
        sizes: (height, width) of the images that were compared.
        errors: largest difference of each output: ``logits`` relative to the largest logit,
            ``maps`` absolute, ``labels`` the share of an image's pixels with another label.
    """

    path: Path
    dynamic: bool
    checked: bool
    sizes: tuple[tuple[int, int], ...]
    errors: Mapping[str, float]


class ExportModule(nn.Module):
    """Base class of modules that are exported: uint8 or normalised images to two outputs.

    Args:
        preprocessing: normalisation inside the file, which then takes ``image``, uint8 RGB
            (B, H, W, 3); None: the file takes ``images``, normalised float32 (B, c, H, W).
        channels: c.
        multiple: number that both sides of an image must be multiples of.
    """

    output: str
    """Name of the output beside ``logits``."""
    limit: float
    """Largest accepted error of that output."""

    def __init__(
        self, preprocessing: Preprocessing | None, channels: int = 3, multiple: int = 1
    ) -> None:
        super().__init__()
        self.pixels = _FromPixels(preprocessing) if preprocessing else None
        self.channels = channels
        self.multiple = multiple
        self.input = "image" if preprocessing else "images"

    def meaning(self) -> str:
        """Inputs and outputs in words."""
        raise NotImplementedError

    def metadata(self) -> dict[str, Any]:
        """JSON values that describe the model."""
        raise NotImplementedError

    def error(self, images: Tensor, expected: Tensor, found: Tensor) -> float:
        """Difference of the second output from what was expected for some images."""
        raise NotImplementedError

    def normalised(self, images: Tensor) -> Tensor:
        """Normalised float32 (B, c, H, W) of the file's input."""
        found: Tensor = images if self.pixels is None else self.pixels(images)
        return found

    def example(self, count: int, size: tuple[int, int]) -> Tensor:
        """An input of ``count`` images of a size, for tracing and comparing."""
        images = torch.from_numpy(_photograph(count, size, self.channels))
        if self.pixels is not None:
            return images
        return (images.permute(0, 3, 1, 2).float() / 127.5 - 1.0).contiguous()

    def dimensions(self, dynamic: bool) -> dict[int, str]:
        """Names of the input's axes that have any length."""
        first = 1 if self.pixels is not None else 2
        return {0: "batch", **({first: "height", first + 1: "width"} if dynamic else {})}

    def described(self, size: tuple[int, int], *, dynamic: bool) -> tuple[str, dict[str, Any]]:
        """Text and metadata of the file, with the sizes of images it takes."""
        taken = sides(size, dynamic=dynamic, multiple=self.multiple)
        text = f"{self.meaning()}. Height and width: {taken}."
        return text, {**self.metadata(), "sides": taken}


class _FromPixels(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """(B, H, W, C) uint8 to (B, C, H, W) float32, normalised."""
        return (images.permute(0, 3, 1, 2).float() / 255.0 - self.mean) / self.std


def check_size(size: tuple[int, int]) -> None:
    """Raise ArtefactError if a side of the traced image is below 32 pixels."""
    if min(size) < SMALLEST_SIDE:
        raise ArtefactError(
            f"size {size[0]} x {size[1]} is too small; give sides of at least {SMALLEST_SIDE}"
        )


def _check_opset(opset: int) -> None:
    if opset < OPSET:
        raise ArtefactError(f"opset {opset} is too old for the export; give {OPSET} or a newer one")
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ArtefactError(
                f"the export to ONNX needs {name}: pip install 'lpcam[onnx]'"
            ) from error


def sides(size: tuple[int, int], *, dynamic: bool, multiple: int = 1) -> str:
    """The image sizes a file takes, in words.

    Example:
        >>> sides((64, 64), dynamic=True, multiple=14)
        'multiples of 14, from 42 pixels'
    """
    if not dynamic:
        return f"{size[0]} x {size[1]} pixels only"
    which = "any" if multiple == 1 else f"multiples of {multiple}"
    return f"{which}, from {-(-SMALLEST_SIDE // multiple) * multiple} pixels"


def rounded_up(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Height and width, each the next multiple of a number.

    Example:
        >>> rounded_up((97, 128), 32)
        (128, 128)
    """
    height, width = (-(-side // multiple) * multiple for side in size)
    return height, width


def refusal(error: Exception, size: tuple[int, int], *, dynamic: bool) -> ArtefactError:
    """The error to raise when one of torch's exporters fails on a network."""
    what = "with images of any size" if dynamic else f"at {size[0]} x {size[1]} pixels"
    advice = "; dynamic=False with the size of your images may do" if dynamic else ""
    cause = " ".join(str(error.__cause__ or error).split())
    return ArtefactError(
        f"the network cannot be exported {what}: {type(error).__name__} ({cause:.300}){advice}"
    )


def write_onnx(
    module: ExportModule,
    path: Path,
    *,
    opset: int,
    dynamic: bool,
    size: tuple[int, int],
    made_by: Mapping[str, Any] | None,
) -> ExportParity:
    """Write a module as ONNX if the file agrees with it in onnxruntime.

    The module is on the CPU and in evaluation mode. Arguments and errors are those of
    :func:`lpcam.formats.models.exporters.export_onnx`.
    """
    check_size(size)
    _check_opset(opset)
    text, values = module.described(size, dynamic=dynamic)
    texts = json_texts(values, made_by, "ONNX")
    try:
        model = _exported(module, opset, dynamic, size)
    except ArtefactError:
        raise
    except Exception as error:  # the exporter raises whatever one of its passes meets
        raise refusal(error, size, dynamic=dynamic) from error
    _describe(model, text, texts)
    if model.ByteSize() > _LARGEST_FILE:
        raise ArtefactError(
            f"the ONNX file would have {model.ByteSize():,} bytes, and its format ends at "
            f"{_LARGEST_FILE:,}; export a smaller network"
        )
    data: bytes = model.SerializeToString()

    def open_file() -> Callable[[Tensor], Outputs] | None:
        session = _session(data)
        if session is None:
            return None

        def run(images: Tensor) -> Outputs:
            first, second = session.run(None, {module.input: images.numpy()})
            return torch.from_numpy(first), torch.from_numpy(second)

        return run

    return compare_and_write(module, data, open_file, path, size, dynamic=dynamic)


def compare_and_write(
    module: ExportModule,
    data: bytes,
    open_file: Callable[[], Callable[[Tensor], Outputs] | None],
    path: Path,
    size: tuple[int, int],
    *,
    dynamic: bool,
) -> ExportParity:
    """Write a file if its outputs agree with those of its module on images of one or two sizes.

    Args:
        data: content of the file.
        open_file: gives the function that runs the file, or None if there is no runtime.

    Raises:
        ArtefactError: if the file cannot be run, differs or cannot be written.
    """
    advice = "give dynamic=False and the size of your images" if dynamic else "try another export"
    other = OTHER_SIZE if size != OTHER_SIZE else TRACED_SIZE
    sizes = tuple(
        rounded_up(each, module.multiple) for each in ((size, other) if dynamic else (size,))
    )
    errors = {"logits": 0.0, module.output: 0.0}
    try:
        run = open_file()
        if run is None:
            sizes, errors = (), {}
        for count, tried in enumerate(sizes, start=1):
            assert run is not None
            images = module.example(count, tried)
            with torch.no_grad():
                expected, found = module(images), run(images)
            shapes, wanted = ([tuple(each.shape) for each in one] for one in (found, expected))
            if shapes != wanted:
                raise ArtefactError(
                    f"the file gives {shapes[0]} and {shapes[1]} for {tuple(images.shape)}, the "
                    f"model {wanted[0]} and {wanted[1]}; {path} is not written; {advice}"
                )
            scale = expected[0].abs().max().clamp_min(NORM_EPSILON)
            logits = float((found[0] - expected[0]).abs().max() / scale)
            second = module.error(images, expected[1], found[1])
            if not (logits <= LOGIT_ERROR and second <= module.limit):  # also if one is NaN
                raise ArtefactError(
                    f"the file differs from the model at {tried[0]} x {tried[1]} pixels: logits by "
                    f"{logits:.2g} of the largest, {module.output} by {second:.2g} (at most "
                    f"{LOGIT_ERROR} and {module.limit} accepted); {path} is not written; {advice}"
                )
            errors["logits"] = max(errors["logits"], logits)
            errors[module.output] = max(errors[module.output], second)
    except ArtefactError:
        raise
    except Exception as error:  # the runtimes' errors have no common base class
        raise ArtefactError(
            f"the exported model cannot be run ({' '.join(str(error).split()):.300}); {path} is "
            f"not written; {advice}"
        ) from error
    write_bytes(path, data)
    return ExportParity(path, dynamic, run is not None, sizes, errors)


def _exported(module: ExportModule, opset: int, dynamic: bool, size: tuple[int, int]) -> Any:
    """The ONNX model (a protocol buffer)."""
    # A batch of two: the exporter takes a batch of one for a constant. Axes are given by name,
    # without a range: it refuses a range one pixel wider than it can prove.
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            (module.example(2, size),),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=(module.dimensions(dynamic),),
            input_names=[module.input],
            output_names=["logits", module.output],
            verbose=False,
        )
        assert program is not None
        model = program.model_proto
    found = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if found != [opset]:
        raise ArtefactError(f"the exporter wrote opset {found}, not {opset}; ask for that one")
    return model


def json_texts(
    values: Mapping[str, Any], made_by: Mapping[str, Any] | None, kind: str
) -> dict[str, str]:
    """Metadata of a file, each value as JSON; ``made_by`` is merged into that of the values."""
    texts = {}
    for key, value in {**values, "made_by": {**values["made_by"], **(made_by or {})}}.items():
        try:
            texts[key] = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ArtefactError(f"{key} of the {kind} file is not JSON: {error}") from error
    return texts


def _describe(model: Any, text: str, texts: Mapping[str, str]) -> None:
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
    for key, value in texts.items():
        model.metadata_props.add(key=key, value=value)


def _session(data: bytes) -> Any:
    """An onnxruntime session on the CPU, or None if onnxruntime is not installed."""
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _photograph(count: int, size: tuple[int, int], channels: int) -> NDArray[np.uint8]:
    """Images (B, H, W, C) of soft colour blobs with some noise, similar to photographs."""
    generator = np.random.default_rng(0)
    coarse = torch.from_numpy(generator.random((count, channels, 6, 6), dtype=np.float32))
    blobs = F.interpolate(coarse, size=size, mode="bicubic").permute(0, 2, 3, 1).numpy()
    noise = generator.normal(0.0, 8.0, blobs.shape)
    return np.clip(255.0 * blobs + noise, 0, 255).astype(np.uint8)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the messages that exporters log about their passes."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
