"""The ONNX file: it runs without this package, gives the same masks, and is refused otherwise."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lpcam.classifiers.classifier import Preprocessing
from lpcam.data.dataset import ClassTable
from lpcam.formats.models import onnx as onnx_files
from lpcam.formats.models.onnx import ExportParity
from lpcam.runtime.errors import ArtefactError, LpcamError
from lpcam.runtime.versions import __version__
from lpcam.segmentation.export import export_onnx
from lpcam.segmentation.networks.base import SegmenterSpec
from lpcam.segmentation.segmenter import Segmenter, build_segmenter

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CLASSES = ClassTable(("cow", "bird", "naïve 牛"), (10, 3, 254))
SIZES = ((1, (97, 131)), (2, (32, 32)), (2, (150, 61)))


class Colours(nn.Module):
    """Logits at stride 2, from hand-set weights: the mean first, then red, green and blue."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.cat([torch.full((1, 3), 1 / 3), torch.eye(3)])
        self.convolution = nn.Conv2d(3, 4, 2, 2, padding=1)
        with torch.no_grad():
            self.convolution.weight.copy_(weight[:, :, None, None].expand(4, 3, 2, 2) / 4)
            self.convolution.bias.copy_(torch.tensor([0.3, 0.0, 0.0, 0.0]))  # type: ignore[union-attr]
        self.dropout = nn.Dropout(0.9)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.convolution(self.dropout(images))
        return found


def colours() -> Segmenter:
    return Segmenter(Colours(), CLASSES, Preprocessing((0.5, 0.25, 0.125), (0.5, 0.25, 2.0)))


def images(count: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    coarse = torch.rand(count, 3, 4, 5, generator=torch.Generator().manual_seed(sum(size)))
    fine = F.interpolate(coarse, size=size, mode="bilinear").permute(0, 2, 3, 1)
    return (255 * fine).numpy().astype(np.uint8)


def run(path: Path, image: NDArray[np.uint8]) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: list[NDArray[Any]] = session.run(None, {"image": image})
    return found


def expected(segmenter: Segmenter, image: NDArray[np.uint8]) -> tuple[Tensor, NDArray[np.uint8]]:
    """By the package's own steps: `Preprocessing`, the network, enlargement, mask ids."""
    with torch.no_grad():
        logits = segmenter(torch.stack([segmenter.preprocessing(each) for each in image]))
    logits = F.interpolate(logits, size=image.shape[1:3], mode="bilinear", align_corners=False)
    ids = np.array([0, *segmenter.classes.mask_ids], np.uint8)
    return logits, ids[logits.argmax(1).numpy()]


def check(segmenter: Segmenter, path: Path, sizes: Any = SIZES) -> None:
    for count, size in sizes:
        image = images(count, size)
        logits, labels = run(path, image)
        torch_logits, torch_labels = expected(segmenter, image)
        assert logits.shape == (count, 4, *size) and logits.dtype == np.float32
        assert labels.shape == (count, *size) and labels.dtype == np.uint8
        scale = float(torch_logits.abs().max())
        assert np.abs(logits - torch_logits.numpy()).max() <= 1e-4 * scale
        assert (labels == torch_labels).mean() >= 0.999


@dataclass
class Exported:
    segmenter: Segmenter
    path: Path
    parity: ExportParity


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    path = tmp_path_factory.mktemp("onnx") / "new folder" / "colours.onnx"
    segmenter = colours().train()  # of which the file must have nothing
    parity = export_onnx(segmenter, path, made_by={"run": "voc"})
    assert segmenter.training, "the segmenter itself was changed"
    return Exported(segmenter.eval(), path, parity)


@pytest.fixture(scope="module")
def model(exported: Exported) -> Iterator[Any]:
    return onnx.load(exported.path)


def test_the_file_does_as_torch_does_on_other_sizes_and_batches(exported: Exported) -> None:
    check(exported.segmenter, exported.path)
    assert exported.parity.checked and exported.parity.dynamic
    assert len(set(exported.parity.sizes)) == 2
    errors = exported.parity.errors
    assert errors["labels"] <= 1e-3 and errors["logits"] <= 1e-4


def test_pure_colours_have_the_mask_ids_of_their_classes(exported: Exported) -> None:
    """By hand: (value / 255 - mean) / std of each channel, against their mean + 0.3."""
    image = np.zeros((4, 40, 40, 3), np.uint8)
    image[1, ..., 0] = image[2, ..., 1] = 255  # red, green
    image[3] = (0, 0, 255)  # blue: -1, -1, 0.4375
    logits, labels = run(exported.path, image)
    middle = np.s_[:, 10:30, 10:30]
    inner = labels[middle].reshape(4, -1)
    assert (inner == inner[:, :1]).all()
    # black: -1, -1, -1/16: blue; red: 1, -1, -1/16; green: -1, 3, -1/16; blue: 0.4375
    assert inner[:, 0].tolist() == [254, 10, 3, 254]
    assert logits[2, :, 20, 20] == pytest.approx(
        [(-1 + 3 - 1 / 16) / 3 + 0.3, -1, 3, -1 / 16], abs=1e-5
    )


def test_the_file_is_valid_and_says_what_it_is(model: Any) -> None:
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [18]
    assert (model.producer_name, model.producer_version) == ("lpcam", __version__)
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert found.pop("version") == __version__
    described = {key: json.loads(value) for key, value in found.items()}
    assert described["classes"] == ["cow", "bird", "naïve 牛"]
    assert described["mask_ids"] == [10, 3, 254] and described["background"] == 0
    assert described["made_by"] == {"run": "voc"} and "torch" in described["versions"]
    assert described["preprocessing"]["mean"] == [0.5, 0.25, 0.125]
    assert described["sides"] == "any, from 32 pixels" and described["spec"] is None
    assert "uint8 RGB (batch, height, width, 3)" in model.doc_string


@pytest.fixture
def unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants stay unfolded, which takes a third of the time and changes no number."""
    monkeypatch.setattr(torch.onnx, "export", partial(torch.onnx.export, optimize=False))


TINY = {
    "deeplabv2": SegmenterSpec(
        "deeplabv2", "resnet101_caffe", {"blocks": (1, 1, 1, 1), "width": 2}
    ),
    "wideresnet38": SegmenterSpec(
        "wideresnet38",
        "wideresnet38",
        {"channels": (4, 4, 4, 4, 4, 8, 8), "depths": (1, 1, 1, 1), "hidden": 4},
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_networks_are_exported_for_any_size(tmp_path: Path, name: str, unfolded: None) -> None:
    segmenter = build_segmenter(TINY[name], CLASSES, weights="random")
    export_onnx(segmenter, tmp_path / "s.onnx")
    check(segmenter, tmp_path / "s.onnx")
    metadata = {e.key: e.value for e in onnx.load(tmp_path / "s.onnx").metadata_props}
    assert json.loads(metadata["spec"])["network"] == name


def test_swin_is_exported_for_one_size(tmp_path: Path, unfolded: None) -> None:
    """For others the exporter makes a file that differs, which the check refuses."""
    pytest.importorskip("transformers")
    arguments = {
        "embed_dim": 4,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 1, 1),
        "channels": 4,
        "auxiliary_channels": 4,
    }
    spec = SegmenterSpec("upernet", "tiny", arguments)
    segmenter = build_segmenter(spec, CLASSES, weights="random")
    path = tmp_path / "s.onnx"
    parity = export_onnx(segmenter, path, dynamic=False, size=(32, 45))
    assert parity.sizes == ((32, 45),)
    check(segmenter, path, [(1, (32, 45)), (3, (32, 45))])
    metadata = {e.key: e.value for e in onnx.load(path).metadata_props}
    assert json.loads(metadata["sides"]) == "32 x 45 pixels only"
    with pytest.raises(Exception, match="Got invalid dimensions"):
        run(path, images(1, (64, 64)))


@pytest.fixture
def ready(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter gives the model at no cost; the tests are about what follows."""

    def again(*_: object, **__: object) -> Any:
        copied = onnx.ModelProto()
        copied.CopyFrom(model)
        return SimpleNamespace(model_proto=copied)

    monkeypatch.setattr(torch.onnx, "export", again)


def refuse(path: Path, message: str, segmenter: Any = None, **options: Any) -> None:
    """An earlier file stays, alone."""
    path.write_bytes(b"earlier")
    with pytest.raises(ArtefactError, match=message):
        export_onnx(segmenter or colours(), path, **options)
    assert [p.read_bytes() for p in path.parent.iterdir()] == [b"earlier"]


@pytest.mark.parametrize(
    ("factor", "ids", "message"),
    [
        (1.001, (10, 3, 254), "97 x 131 pixels: logits by 0.00"),
        (1.0, (11, 3, 254), "labels by"),
        (float("nan"), (10, 3, 254), "logits by nan"),
    ],
)
def test_a_file_that_differs_is_refused(
    ready: None, tmp_path: Path, factor: float, ids: tuple[int, ...], message: str
) -> None:
    other = colours()
    other.classes = ClassTable(CLASSES.names, ids)
    with torch.no_grad():
        next(other.parameters()).mul_(factor)
    refuse(tmp_path / "s.onnx", message, other)


def test_a_file_that_fits_the_traced_size_alone_is_refused(ready: None, tmp_path: Path) -> None:
    class Taller(Colours):
        def forward(self, images: Tensor) -> Tensor:
            factor = 1.0 if images.shape[-2:] == onnx_files.TRACED_SIZE else 1.01
            return super().forward(images) * factor

    other = colours()
    other.network = Taller()
    refuse(tmp_path / "s.onnx", "at 128 x 83 pixels: .* dynamic=False", other)


def test_without_onnxruntime_the_file_is_written_unchecked(
    ready: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    parity = export_onnx(colours(), tmp_path / "s.onnx")
    assert not parity.checked and parity.sizes == () and not parity.errors
    assert (tmp_path / "s.onnx").is_file()


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(LpcamError, match=missing):
        export_onnx(colours(), tmp_path / "s.onnx")
    assert not any(tmp_path.iterdir())
