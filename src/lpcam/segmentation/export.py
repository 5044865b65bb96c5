"""A segmenter as one ONNX file, which runs without this package.

The file segments uint8 RGB images (B, H, W, 3) at one scale, without a test preset's mirror images
and CRF, to logits (B, L, H, W) and the values of mask files (B, H, W).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.data.dataset import BACKGROUND
from lpcam.formats.models.onnx import (
    TRACED_SIZE,
    ExportModule,
    ExportParity,
    Outputs,
    write_onnx,
)
from lpcam.runtime.versions import versions
from lpcam.segmentation.segmenter import Segmenter

LABEL_ERROR = 1e-3  #: Largest accepted share of an image's pixels whose label differs.


def export_onnx(
    segmenter: Segmenter,
    path: Path,
    *,
    dynamic: bool = True,
    size: tuple[int, int] = TRACED_SIZE,
    made_by: Mapping[str, Any] | None = None,
) -> ExportParity:
    """Write a segmenter as ONNX, compared with it, as :func:`lpcam.formats.models.onnx.write_onnx`.

    Networks with ``one_size_export`` need ``dynamic=False``. ArtefactError as there, or if another
    label is found for more than 0.1 % of the pixels.
    """
    module = _SegmenterFile(segmenter, made_by or {}).eval()
    return write_onnx(module, path, dynamic=dynamic, size=size)


class _SegmenterFile(ExportModule):
    """A segmenter with the input and outputs of its exported file."""

    output = "labels"
    limit = LABEL_ERROR
    mask_ids: Tensor

    def __init__(self, segmenter: Segmenter, made_by: Mapping[str, Any]) -> None:
        super().__init__(segmenter.preprocessing)
        self.made_by = dict(made_by)
        self.segmenter = copy.deepcopy(segmenter).cpu().float()
        ids = torch.tensor((BACKGROUND, *segmenter.classes.mask_ids), dtype=torch.uint8)
        self.register_buffer("mask_ids", ids)

    def forward(self, image: Tensor) -> Outputs:
        """(B, H, W, 3) uint8 to logits (B, L, H, W) and mask ids (B, H, W)."""
        logits, size = self.segmenter(self.normalised(image)), tuple(image.shape[1:3])
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits, self.mask_ids[logits.argmax(1)]

    def error(self, images: Tensor, expected: Tensor, found: Tensor) -> float:
        """Largest share of an image's pixels whose label differs."""
        return float((found != expected).float().mean((1, 2)).max())

    def meaning(self) -> str:
        return (
            "image: uint8 RGB (batch, height, width, 3). logits: float32 (batch, 1 + classes, "
            "height, width), background first. labels: uint8 (batch, height, width), 0 background, "
            "otherwise the mask id of a class"
        )

    def metadata(self) -> dict[str, Any]:
        spec, classes = self.segmenter.spec, self.segmenter.classes
        return {
            "classes": list(classes.names),
            "mask_ids": list(classes.mask_ids),
            "background": BACKGROUND,
            "preprocessing": asdict(self.segmenter.preprocessing),
            "spec": None if spec is None else asdict(spec),
            "versions": versions(),
            "made_by": self.made_by,
        }
