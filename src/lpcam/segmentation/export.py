"""A segmenter as one ONNX file, which runs with nothing of this package installed.

``image`` is uint8 RGB (B, H, W, 3), as image readers give it; normalisation is inside. ``logits``
are float32 (B, L, H, W), enlarged to the image (bilinear); ``labels`` are uint8 (B, H, W) with the
values of mask files: 0 the background, and each class's mask id. It is the segmenter at one scale:
the other scales, mirror images, windows and CRF of a test preset are not in it. The metadata of the
file name the classes. With onnxruntime alone::

    session = onnxruntime.InferenceSession("segmenter.onnx")
    image = numpy.asarray(PIL.Image.open("cow.jpg").convert("RGB"))
    logits, labels = session.run(None, {"image": image[None]})
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lpcam.classifier import Preprocessing
from lpcam.data.items import BACKGROUND, ClassTable
from lpcam.errors import ArtefactError
from lpcam.storage import write_bytes
from lpcam.version import __version__, versions

OPSET = 18
"""The first whose Resize has every mode used here; older runtimes read it too."""
SMALLEST_SIDE = 32
"""In pixels, of an image that the networks take."""
TRACED_SIZE = (97, 131)
"""Height and width of the image that is traced: multiples of nothing, as those of photographs."""
OTHER_SIZE = (128, 83)
"""Height and width of another image on which a file of dynamic size is tried."""
LABEL_AGREEMENT = 0.999
LOGIT_ERROR = 1e-4
# A protocol buffer cannot be larger.
_LARGEST_FILE = 2**31 - 1


class Exportable(Protocol):
    """What the export needs of a segmenter, beside being a module."""

    @property
    def classes(self) -> ClassTable: ...
    @property
    def preprocessing(self) -> Preprocessing: ...


@dataclass(frozen=True)
class Parity:
    """How an exported file compares with its segmenter.

    ``checked`` is False where onnxruntime is not installed; the numbers are then None.
    ``label_agreement`` is the smallest part of the pixels of an image with the same label, and
    ``logit_error`` the largest difference of logits over the largest logit, of ``sizes`` (height,
    width).
    """

    path: Path
    dynamic: bool
    checked: bool
    sizes: tuple[tuple[int, int], ...]
    label_agreement: float | None
    logit_error: float | None


def export_onnx(
    segmenter: nn.Module,
    path: Path,
    *,
    opset: int = OPSET,
    dynamic: bool = True,
    size: tuple[int, int] = TRACED_SIZE,
    made_by: Mapping[str, Any] | None = None,
) -> Parity:
    """Write a segmenter as ONNX and compare the file with it, in onnxruntime where that is there.

    The segmenter itself is left as it is; a copy on the CPU, in evaluation mode, is exported.

    Args:
        segmenter: with ``classes`` and ``preprocessing``, an
            :class:`~lpcam.segmentation.segmenter.Segmenter`.
        path: of the file, which holds the weights too; replaced only when the check has passed.
        opset: version of ONNX's operators, 18 or newer.
        dynamic: whether the file takes images of any size from 32 pixels a side; otherwise of
            ``size`` alone. The batch is of any size in both. UperNet on Swin needs False: torch
            2.15 exports its pooling, and more, for the traced size, and the check refuses that.
        size: height and width, in pixels, of the traced image.
        made_by: provenance, JSON, for the metadata.

    Raises:
        ArtefactError: if onnx or onnxscript is not installed, the network cannot be exported so,
            the file differs (labels of less than 99.9 % of the pixels equal, or logits off by more
            than 1e-4 of the largest), would be larger than 2 GiB, or cannot be written. No file is
            left, and an earlier one stays.
    """
    if opset < OPSET:
        raise ArtefactError(f"opset {opset} is too old for the export; give {OPSET} or a newer one")
    if min(size) < SMALLEST_SIDE:
        raise ArtefactError(
            f"size {size[0]} x {size[1]} is too small; give sides of at least {SMALLEST_SIDE}"
        )
    _need("onnx", "onnxscript")
    whole = _WithImages(segmenter).eval()
    model = _export(whole, opset=opset, dynamic=dynamic, size=size)
    _describe(model, whole, dynamic=dynamic, size=size, made_by=made_by)
    if model.ByteSize() > _LARGEST_FILE:
        raise ArtefactError(
            f"the ONNX file would have {model.ByteSize():,} bytes, and its format ends at "
            f"{_LARGEST_FILE:,}; export a smaller network"
        )
    data: bytes = model.SerializeToString()
    parity = _compare(whole, data, path, dynamic=dynamic, size=size)
    write_bytes(path, data)
    return parity


class _WithImages(nn.Module):
    """The segmenter from uint8 images to mask ids, as the file has it."""

    mean: Tensor
    std: Tensor
    mask_ids: Tensor

    def __init__(self, segmenter: Any) -> None:
        super().__init__()
        self.segmenter = copy.deepcopy(segmenter).cpu().float()
        self.classes: ClassTable = segmenter.classes
        self.preprocessing: Preprocessing = segmenter.preprocessing
        channels = {"mean": self.preprocessing.mean, "std": self.preprocessing.std}
        for name, values in channels.items():
            self.register_buffer(name, torch.tensor(values)[:, None, None])
        ids = torch.tensor((BACKGROUND, *self.classes.mask_ids), dtype=torch.uint8)
        self.register_buffer("mask_ids", ids)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, 3) uint8 to logits (B, L, H, W) and mask ids (B, H, W)."""
        pixels = image.permute(0, 3, 1, 2).float() / 255.0
        logits = self.segmenter((pixels - self.mean) / self.std)
        logits = F.interpolate(
            logits, size=tuple(image.shape[1:3]), mode="bilinear", align_corners=False
        )
        return logits, self.mask_ids[logits.argmax(1)]


def _need(*names: str) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ArtefactError(
                f"the export to ONNX needs {name}: pip install 'lpcam[onnx]'"
            ) from error


def _export(whole: _WithImages, *, opset: int, dynamic: bool, size: tuple[int, int]) -> Any:
    """The ONNX model (a protocol buffer)."""
    # By name, without a range: the exporter refuses a range one pixel wider than it can prove, and
    # what it proves is not what the file can do.
    dimensions = {0: "batch", 1: "height", 2: "width"} if dynamic else {0: "batch"}
    # a batch of one would be taken for a constant
    image = torch.from_numpy(_image(2, size))
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                whole,
                (image,),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=(dimensions,),
                input_names=["image"],
                output_names=["logits", "labels"],
                verbose=False,
            )
            assert program is not None
            model = program.model_proto
    except Exception as error:  # the exporter raises what any of its passes meets
        what = "with images of any size" if dynamic else f"at {size[0]} x {size[1]} pixels"
        advice = "; dynamic=False with the size of your images may do" if dynamic else ""
        cause = " ".join(str(error.__cause__ or error).split())
        raise ArtefactError(
            f"the network cannot be exported {what}: {type(error).__name__} ({cause:.300}){advice}"
        ) from error
    found = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if found != [opset]:
        raise ArtefactError(f"the exporter wrote opset {found}, not {opset}; ask for that one")
    return model


def _describe(
    model: Any,
    whole: _WithImages,
    *,
    dynamic: bool,
    size: tuple[int, int],
    made_by: Mapping[str, Any] | None,
) -> None:
    """Metadata in; the exporter's notes, which hold source code and paths of this machine, out."""
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        graph.doc_string = ""
        del graph.metadata_props[:]
        for part in (*graph.node, *graph.value_info):
            part.doc_string = ""
            del part.metadata_props[:]
    for part in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    sides = f"any, from {SMALLEST_SIDE} pixels" if dynamic else f"{size[0]} x {size[1]} pixels only"
    model.doc_string = (
        "image: uint8 RGB (batch, height, width, 3). logits: float32 (batch, 1 + classes, height, "
        "width), background first. labels: uint8 (batch, height, width), 0 background, otherwise "
        f"the mask id of a class. Height and width: {sides}."
    )
    model.producer_name, model.producer_version = "lpcam", __version__
    spec = getattr(whole.segmenter, "spec", None)
    described = {
        "classes": list(whole.classes.names),
        "mask_ids": list(whole.classes.mask_ids),
        "background": BACKGROUND,
        "preprocessing": asdict(whole.preprocessing),
        "sides": sides,
        "spec": asdict(spec) if is_dataclass(spec) and not isinstance(spec, type) else None,
        "versions": versions(),
        "made_by": dict(made_by or {}),
    }
    del model.metadata_props[:]
    model.metadata_props.add(key="version", value=__version__)
    for key, value in described.items():
        try:
            text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ArtefactError(f"{key} of the ONNX file is no JSON: {error}") from error
        model.metadata_props.add(key=key, value=text)


def _compare(
    whole: _WithImages, data: bytes, path: Path, *, dynamic: bool, size: tuple[int, int]
) -> Parity:
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError:
        return Parity(path, dynamic, False, (), None, None)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    sizes = (size, OTHER_SIZE if size != OTHER_SIZE else TRACED_SIZE) if dynamic else (size,)
    advice = "give dynamic=False and the size of your images" if dynamic else "try another opset"
    agreements, errors = [], []
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        for count, tried in enumerate(sizes, start=1):
            image = _image(count, tried)
            with torch.no_grad():
                expected, labels = whole(torch.from_numpy(image))
            logits, found = session.run(None, {"image": image})
            if found.shape != tuple(labels.shape) or logits.shape != tuple(expected.shape):
                raise ArtefactError(
                    f"the ONNX file gives {logits.shape} and {found.shape} for {image.shape}, the "
                    f"network {tuple(expected.shape)} and {tuple(labels.shape)}; {path} is not "
                    "written"
                )
            agreement = float((found == labels.numpy()).mean((1, 2)).min())
            largest = np.abs(expected.numpy()).max()
            error = float(np.abs(logits - expected.numpy()).max() / largest)
            # of NaN every comparison is false
            if not (agreement >= LABEL_AGREEMENT and error <= LOGIT_ERROR):
                raise ArtefactError(
                    f"the ONNX file differs from the network at {tried[0]} x {tried[1]} pixels: "
                    f"{100 * agreement:.2f} % of the labels are equal (at least "
                    f"{100 * LABEL_AGREEMENT} % wanted) and logits differ by {error:.2g} of the "
                    f"largest (at most {LOGIT_ERROR} wanted); {path} is not written; {advice}"
                )
            agreements.append(agreement)
            errors.append(error)
    except ArtefactError:
        raise
    except Exception as error:  # onnxruntime's errors have no base class of their own
        raise ArtefactError(
            f"onnxruntime cannot run the exported network ({' '.join(str(error).split()):.300}); "
            f"{path} is not written; {advice}"
        ) from error
    return Parity(path, dynamic, True, sizes, min(agreements), max(errors))


def _image(count: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """(B, H, W, 3): soft blobs of colour with some noise, which is nearer to photographs."""
    generator = np.random.default_rng(0)
    coarse = torch.from_numpy(generator.random((count, 3, 6, 6), dtype=np.float32))
    blobs = F.interpolate(coarse, size=size, mode="bicubic").permute(0, 2, 3, 1).numpy()
    noise = generator.normal(0.0, 8.0, blobs.shape)
    return np.clip(255.0 * blobs + noise, 0, 255).astype(np.uint8)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's talk of its passes; what matters of it is raised."""
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
