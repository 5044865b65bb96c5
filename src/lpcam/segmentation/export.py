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

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcam.classifier import Preprocessing
from lpcam.data.items import BACKGROUND, ClassTable
from lpcam.errors import ArtefactError
from lpcam.onnx_files import (
    OPSET,
    TRACED_SIZE,
    FromPixels,
    check_opset,
    check_size,
    describe_model,
    export_model,
    model_bytes,
    open_session,
    photograph,
    refusal,
    sides,
    tried_sizes,
)
from lpcam.storage import write_bytes
from lpcam.version import versions

LABEL_AGREEMENT = 0.999
LOGIT_ERROR = 1e-4


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
    check_size(size)
    check_opset(opset)
    whole = _WithImages(segmenter).eval()
    model = _export(whole, opset=opset, dynamic=dynamic, size=size)
    _describe(model, whole, dynamic=dynamic, size=size, made_by=made_by)
    data = model_bytes(model)
    parity = _compare(whole, data, path, dynamic=dynamic, size=size)
    write_bytes(path, data)
    return parity


class _WithImages(nn.Module):
    """The segmenter from uint8 images to mask ids, as the file has it."""

    mask_ids: Tensor

    def __init__(self, segmenter: Any) -> None:
        super().__init__()
        self.segmenter = copy.deepcopy(segmenter).cpu().float()
        self.classes: ClassTable = segmenter.classes
        self.preprocessing: Preprocessing = segmenter.preprocessing
        self.pixels = FromPixels(self.preprocessing)
        ids = torch.tensor((BACKGROUND, *self.classes.mask_ids), dtype=torch.uint8)
        self.register_buffer("mask_ids", ids)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, 3) uint8 to logits (B, L, H, W) and mask ids (B, H, W)."""
        logits = self.segmenter(self.pixels(image))
        logits = F.interpolate(
            logits, size=tuple(image.shape[1:3]), mode="bilinear", align_corners=False
        )
        return logits, self.mask_ids[logits.argmax(1)]


def _export(whole: _WithImages, *, opset: int, dynamic: bool, size: tuple[int, int]) -> Any:
    """The ONNX model (a protocol buffer)."""
    dimensions = {0: "batch", 1: "height", 2: "width"} if dynamic else {0: "batch"}
    try:
        return export_model(
            whole,
            torch.from_numpy(photograph(2, size)),
            dimensions,
            input_name="image",
            output_names=["logits", "labels"],
            opset=opset,
        )
    except ArtefactError:
        raise
    except Exception as error:  # the exporter raises what any of its passes meets
        raise refusal(error, size, dynamic=dynamic) from error


def _describe(
    model: Any,
    whole: _WithImages,
    *,
    dynamic: bool,
    size: tuple[int, int],
    made_by: Mapping[str, Any] | None,
) -> None:
    taken = sides(size, dynamic=dynamic)
    spec = getattr(whole.segmenter, "spec", None)
    describe_model(
        model,
        "image: uint8 RGB (batch, height, width, 3). logits: float32 (batch, 1 + classes, height, "
        "width), background first. labels: uint8 (batch, height, width), 0 background, otherwise "
        f"the mask id of a class. Height and width: {taken}.",
        {
            "classes": list(whole.classes.names),
            "mask_ids": list(whole.classes.mask_ids),
            "background": BACKGROUND,
            "preprocessing": asdict(whole.preprocessing),
            "sides": taken,
            "spec": asdict(spec) if is_dataclass(spec) and not isinstance(spec, type) else None,
            "versions": versions(),
            "made_by": dict(made_by or {}),
        },
    )


def _compare(
    whole: _WithImages, data: bytes, path: Path, *, dynamic: bool, size: tuple[int, int]
) -> Parity:
    advice = "give dynamic=False and the size of your images" if dynamic else "try another opset"
    sizes = tried_sizes(size, dynamic=dynamic)
    agreements, errors = [], []
    try:
        session = open_session(data)
        if session is None:
            return Parity(path, dynamic, False, (), None, None)
        for count, tried in enumerate(sizes, start=1):
            image = photograph(count, tried)
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
