"""What every ONNX file of this package has in common: export, metadata, size, and how it is tried.

The file runs in onnxruntime with nothing of this package installed. Its metadata are JSON texts,
and it holds nothing of the machine that wrote it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lpcam.classifier import Preprocessing
from lpcam.errors import ArtefactError
from lpcam.version import __version__

OPSET = 18
"""The first whose Resize has every mode used here; older runtimes read it too."""
SMALLEST_SIDE = 32
"""In pixels, of an image that the networks take."""
TRACED_SIZE = (97, 131)
"""Height and width of the image that is traced: multiples of nothing, as those of photographs."""
OTHER_SIZE = (128, 83)
"""Height and width of another image on which a file of dynamic size is tried."""
# A protocol buffer cannot be larger.
_LARGEST_FILE = 2**31 - 1


class FromPixels(nn.Module):
    """Normalisation of a file's images, as :class:`~lpcam.classifier.Preprocessing` has it."""

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
    """Refuse the size of a traced image that is too small.

    Raises:
        ArtefactError: if a side is below 32 pixels.
    """
    if min(size) < SMALLEST_SIDE:
        raise ArtefactError(
            f"size {size[0]} x {size[1]} is too small; give sides of at least {SMALLEST_SIDE}"
        )


def check_opset(opset: int) -> None:
    """Refuse an old version of ONNX's operators, or an export without what it needs.

    Raises:
        ArtefactError: if ``opset`` is below 18, or onnx or onnxscript is not installed.
    """
    if opset < OPSET:
        raise ArtefactError(f"opset {opset} is too old for the export; give {OPSET} or a newer one")
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ArtefactError(
                f"the export to ONNX needs {name}: pip install 'lpcam[onnx]'"
            ) from error


def tried_sizes(size: tuple[int, int], *, dynamic: bool) -> tuple[tuple[int, int], ...]:
    """Sizes of images on which a file is compared with its network: the traced one, and another."""
    return (size, OTHER_SIZE if size != OTHER_SIZE else TRACED_SIZE) if dynamic else (size,)


def sides(size: tuple[int, int], *, dynamic: bool, multiple: int = 1) -> str:
    """In words, which images a file takes; of ``multiple`` their sides must be multiples."""
    if not dynamic:
        return f"{size[0]} x {size[1]} pixels only"
    which = "any" if multiple == 1 else f"multiples of {multiple}"
    return f"{which}, from {-(-SMALLEST_SIDE // multiple) * multiple} pixels"


def refusal(error: Exception, size: tuple[int, int], *, dynamic: bool) -> ArtefactError:
    """Of a network that an exporter of torch has met an error in."""
    what = "with images of any size" if dynamic else f"at {size[0]} x {size[1]} pixels"
    advice = "; dynamic=False with the size of your images may do" if dynamic else ""
    cause = " ".join(str(error.__cause__ or error).split())
    return ArtefactError(
        f"the network cannot be exported {what}: {type(error).__name__} ({cause:.300}){advice}"
    )


def export_model(
    module: nn.Module,
    images: Tensor,
    dimensions: Mapping[int, str],
    *,
    input_name: str,
    output_names: Sequence[str],
    opset: int,
) -> Any:
    """The ONNX model (a protocol buffer) of a module of one input.

    Args:
        images: an input of the traced size, of a batch of two or more: one of one would be taken
            for a constant.
        dimensions: name of each axis of the input that is of any length.

    Raises:
        ArtefactError: if the exporter gives another opset.
        Exception: whatever one of the exporter's passes meets; see :func:`refusal`.
    """
    with quiet(), torch.no_grad():
        # By name, without a range: the exporter refuses a range one pixel wider than it can prove,
        # and what it proves is not what the file can do.
        program = torch.onnx.export(
            module,
            (images,),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=(dict(dimensions),),
            input_names=[input_name],
            output_names=list(output_names),
            verbose=False,
        )
        assert program is not None
        model = program.model_proto
    found = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if found != [opset]:
        raise ArtefactError(f"the exporter wrote opset {found}, not {opset}; ask for that one")
    return model


def json_texts(described: Mapping[str, Any], what: str) -> dict[str, str]:
    """Each value as JSON, for the metadata of a file.

    Raises:
        ArtefactError: if a value is none, naming its key and ``what`` file it is.
    """
    texts = {}
    for key, value in described.items():
        try:
            texts[key] = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ArtefactError(f"{key} of the {what} file is no JSON: {error}") from error
    return texts


def describe_model(model: Any, text: str, described: Mapping[str, Any]) -> None:
    """Metadata in; the exporter's notes, which hold source code and paths of this machine, out."""
    texts = json_texts(described, "ONNX")
    for graph in (model.graph, *model.functions):
        graph.doc_string = ""
        del graph.metadata_props[:]
        for part in (*graph.node, *graph.value_info):
            part.doc_string = ""
            del part.metadata_props[:]
    for part in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    model.doc_string = text
    model.producer_name, model.producer_version = "lpcam", __version__
    del model.metadata_props[:]
    model.metadata_props.add(key="version", value=__version__)
    for key, value in texts.items():
        model.metadata_props.add(key=key, value=value)


def model_bytes(model: Any) -> bytes:
    """The file.

    Raises:
        ArtefactError: if it would be larger than 2 GiB.
    """
    if model.ByteSize() > _LARGEST_FILE:
        raise ArtefactError(
            f"the ONNX file would have {model.ByteSize():,} bytes, and its format ends at "
            f"{_LARGEST_FILE:,}; export a smaller network"
        )
    data: bytes = model.SerializeToString()
    return data


def open_session(data: bytes) -> Any:
    """An onnxruntime session on the CPU, or None where onnxruntime is not installed."""
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def photograph(count: int, size: tuple[int, int], channels: int = 3) -> NDArray[np.uint8]:
    """(B, H, W, C): soft blobs of colour with some noise, which is nearer to photographs."""
    generator = np.random.default_rng(0)
    coarse = torch.from_numpy(generator.random((count, channels, 6, 6), dtype=np.float32))
    blobs = F.interpolate(coarse, size=size, mode="bicubic").permute(0, 2, 3, 1).numpy()
    noise = generator.normal(0.0, 8.0, blobs.shape)
    return np.clip(255.0 * blobs + noise, 0, 255).astype(np.uint8)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' talk of their passes; what matters of it is raised."""
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
