"""The head and model of LPCAM, their exported files, and folders of a model hub."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from explaining import tiny_run
from tiny import BACKBONE, COLOURS
from torch import Tensor, nn

from lpcam import LPCAM
from lpcam.classifiers.classifier import BackboneSpec, Classifier, Preprocessing, build
from lpcam.classifiers.wrapped import WrappedModel, wrap
from lpcam.formats.models import lpcam_model as head
from lpcam.formats.models import onnx
from lpcam.formats.models.lpcam_model import LPCAMModel, export_onnx
from lpcam.formats.models.onnx import ExportParity
from lpcam.method.head import LPCAMHead
from lpcam.method.settings import EarlySettings, LpcamSettings
from lpcam.pipeline.run_folder import RunFolder
from lpcam.runtime.errors import ArtefactError, ClassifierError
from lpcam.runtime.files import read_tensors, write_tensors

SETTINGS = LpcamSettings.from_preset(
    "voc12.official", clusters=2, scales=[1.0], flip=False, mu_f=0.3, context_lower=0.0
)
SIZES = ((1, (97, 131)), (2, (32, 32)), (2, (150, 61)))


def photographs(count: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """(B, H, W, 3) uint8, soft blobs."""
    generator = torch.Generator().manual_seed(seed + sum(size))
    coarse = torch.rand(count, 3, 5, 4, generator=generator)
    fine = nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return (255 * fine.permute(0, 2, 3, 1)).numpy().astype(np.uint8)


def normalised(classifier: Classifier, images: np.ndarray) -> Tensor:
    return torch.stack([classifier.preprocessing(image) for image in images])


def fitted(source: Any, preprocess: Callable[[np.ndarray], Tensor], **options: Any) -> LPCAM:
    images = preprocess(photographs(6, (96, 128)))
    labels = torch.eye(3).repeat(2, 1)
    return LPCAM(source, SETTINGS, **options).fit([(images, labels)])


@pytest.fixture(scope="module")
def lpcam() -> LPCAM:
    classifier = build(BackboneSpec(BACKBONE, {}, 16), tuple(COLOURS), weights="random")
    with torch.no_grad():
        classifier.head.weight.mul_(3)
    return fitted(classifier, lambda images: normalised(classifier, images))


@pytest.fixture
def model(lpcam: LPCAM) -> LPCAMModel:
    return LPCAMModel.from_lpcam(lpcam)


def small_head(**options: Any) -> LPCAMHead:
    weight = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    vectors = torch.tensor([[0.6, 0.8], [-1.0, 0.0]])
    return LPCAMHead(weight, vectors, torch.tensor([0.5, 0.0]), **options)


@pytest.mark.parametrize("with_context", [True, False])
def test_the_model_gives_the_maps_of_lpcam_and_the_logits_of_its_classifier(
    lpcam: LPCAM, with_context: bool
) -> None:
    extractor = copy.copy(lpcam)
    extractor.with_context = with_context
    model = LPCAMModel.from_lpcam(extractor)
    assert model.made_by["method"] == ("LPCAM" if with_context else "LPCAM-F")
    classifier = lpcam.source_
    for count, size in (*SIZES, (1, (17, 200))):
        images = normalised(classifier, photographs(count, size))
        with torch.no_grad():
            logits, maps = model(images)
            torch.testing.assert_close(logits, classifier(images))
        assert maps.shape == (count, 3, *size)
        assert maps.any()
        torch.testing.assert_close(maps, extractor(images), atol=1e-5, rtol=0)


def test_the_model_shares_nothing_with_the_classifier(lpcam: LPCAM, model: LPCAMModel) -> None:
    before = lpcam.source_.fingerprint()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert lpcam.source_.fingerprint() == before


def test_the_model_is_compiled_and_runs_in_half_precision(lpcam: LPCAM, model: LPCAMModel) -> None:
    images = normalised(lpcam.source_, photographs(1, (64, 96)))
    torch.compiler.reset()
    torch.testing.assert_close(
        torch.compile(coarse(), backend="eager")(images), coarse()(images), atol=1e-6, rtol=1e-5
    )
    with torch.no_grad():
        expected = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            automatic = model(images)
        half = copy.deepcopy(model).bfloat16()(images.bfloat16())
    for found in (automatic, half):
        assert float((found[1].float() - expected[1]).abs().mean()) < 0.02


def zero_to_one(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


def foreign(name: str, **options: Any) -> tuple[nn.Module, WrappedModel, LPCAM]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=3).train()
    wrapped = wrap(model, **options)
    return model, wrapped, fitted(wrapped, zero_to_one)


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("test_convnext", {}, (97, 131)),  # a layer norm after the pooling
        ("test_vit", {"pool": "token"}, (96, 128)),  # its head reads the class token
        ("test_vit2", {}, (96, 128)),  # tokens and their mean
    ],
)
def test_models_of_others_keep_their_logits_and_their_state(
    name: str, options: dict[str, Any], size: tuple[int, int]
) -> None:
    theirs, wrapped, lpcam = foreign(name, **options)
    model = LPCAMModel.from_lpcam(lpcam)
    assert theirs.training
    assert not any(module._forward_hooks for module in theirs.modules())
    images = zero_to_one(photographs(2, size))
    for each in (model, copy.deepcopy(model)):
        with torch.no_grad():
            logits, maps = each(images)
        torch.testing.assert_close(logits, wrapped.logits(images), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(maps, lpcam(images), atol=1e-5, rtol=0)


def test_a_map_that_a_function_gives_is_refused() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=3)
    by_function = wrap(model, target_layer=lambda images: 1 * model.forward_features(images))
    with pytest.raises(ClassifierError, match="function"):
        LPCAMModel.from_lpcam(fitted(by_function, zero_to_one))
    by_method = fitted(wrap(model, target_layer=model.forward_features), zero_to_one)
    images = zero_to_one(photographs(1, (64, 64)))
    torch.testing.assert_close(
        LPCAMModel.from_lpcam(by_method)(images)[1], by_method(images), atol=1e-5, rtol=0
    )


@dataclass
class Exported:
    path: Path
    parity: ExportParity

    @cached_property
    def loaded(self) -> Any:
        onnxruntime = importlib.import_module("onnxruntime")
        return onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])

    def run(self, images: Any) -> tuple[Tensor, Tensor]:
        name = self.loaded.get_inputs()[0].name
        logits, maps = map(torch.from_numpy, self.loaded.run(None, {name: images}))
        return logits, maps

    @property
    def described(self) -> dict[str, Any]:
        model = importlib.import_module("onnx").load(self.path)
        values = {e.key: json.loads(e.value) for e in model.metadata_props if e.key != "version"}
        return {"meaning": model.doc_string, **values}


@pytest.fixture(scope="module")
def exporter() -> Iterator[None]:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    with pytest.MonkeyPatch.context() as patch:  # unfolded, it takes a third of the time
        patch.setattr(torch.onnx, "export", partial(torch.onnx.export, optimize=False))
        yield


@pytest.fixture(scope="module")
def exported(exporter: None, lpcam: LPCAM, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    path = tmp_path_factory.mktemp("exported") / "new folder" / "boxes.onnx"
    model = LPCAMModel.from_lpcam(lpcam).train()
    parity = export_onnx(model, path)
    assert model.training, "the model itself was changed"
    return Exported(path, parity)


def test_a_file_gives_the_maps_of_lpcam_at_other_sizes_and_batches(
    exported: Exported, lpcam: LPCAM
) -> None:
    classifier = lpcam.source_
    for count, size in SIZES:
        images = photographs(count, size)
        logits, maps = exported.run(images)
        tensor = normalised(classifier, images)
        assert logits.dtype == maps.dtype == torch.float32
        torch.testing.assert_close(maps, lpcam(tensor), atol=1e-4, rtol=0)
        torch.testing.assert_close(logits, classifier(tensor).detach(), atol=1e-4, rtol=1e-4)
    parity = exported.parity
    assert parity.checked and parity.dynamic and len(set(parity.sizes)) == 2
    assert parity.errors.keys() == {"logits", "maps"} and max(parity.errors.values()) <= 1e-4


def test_a_file_says_what_it_is(exported: Exported, lpcam: LPCAM) -> None:
    described = exported.described
    meaning = "image: uint8 RGB (batch, height, width, 3). logits:"
    assert described["meaning"].startswith(meaning)
    assert described["classes"] == list(COLOURS)
    assert described["preprocessing"]["mean"] == list(lpcam.source_.preprocessing.mean)
    assert described["sides"] == "any, from 32 pixels"
    assert described["made_by"]["fingerprint"] == lpcam.source_.fingerprint()
    assert described["made_by"]["settings"]["clusters"] == 2
    assert "torch" in described["versions"]


def axes_of(path: Path) -> list[list[Any]]:
    """Names or lengths of the axes of the input, the logits and the maps of a file."""
    graph = importlib.import_module("onnx").load(path).graph
    shapes = [value.type.tensor_type.shape.dim for value in (*graph.input, *graph.output)]
    return [[axis.dim_param or axis.dim_value for axis in shape] for shape in shapes]


@pytest.mark.parametrize(
    ("options", "grid", "size"),
    [
        ({}, ["height", "width"], ["height", "width"]),
        ({"enlarge": False}, ["grid_height", "grid_width"], ["height", "width"]),
        ({"multiple": 16}, ["height", "width"], ["height", "width"]),
        ({"fixed_size": (64, 96)}, [64, 96], [64, 96]),
    ],
)
def test_axes_of_any_length_have_names(
    exporter: None, tmp_path: Path, options: dict[str, Any], grid: list[Any], size: list[Any]
) -> None:
    path = tmp_path / "m.onnx"
    export_onnx(LPCAMModel(nn.Conv2d(3, 2, 4, 4), small_head(), **options), path)
    assert axes_of(path) == [["batch", 3, *size], ["batch", 2], ["batch", 2, *grid]]


def test_axes_of_an_image_in_bytes(exported: Exported) -> None:
    batch = "batch"
    assert axes_of(exported.path) == [
        [batch, "height", "width", 3],
        [batch, 3],
        [batch, 3, "height", "width"],
    ]


def test_nothing_of_this_machine_is_in_a_file(exported: Exported) -> None:
    content = exported.path.read_bytes()
    for trace in ("site-packages", "test_head", str(Path.home()) + "/", "Traceback"):
        assert trace.encode() not in content, trace


def test_a_model_of_one_size_gets_a_file_of_one_size(exporter: None, tmp_path: Path) -> None:
    backbone = nn.Conv2d(1, 2, 4, 4)
    model = LPCAMModel(backbone, small_head(), channels=1, fixed_size=(48, 64))
    path = tmp_path / "m.onnx"
    with pytest.raises(ArtefactError, match="48 x 64"):
        export_onnx(model, path, size=(64, 64))
    parity = export_onnx(model, path)
    assert parity.sizes == ((48, 64),) and not parity.dynamic
    images = np.random.default_rng(0).random((3, 1, 48, 64), np.float32)
    _, maps = Exported(path, parity).run(images)
    torch.testing.assert_close(maps, model(torch.from_numpy(images))[1].detach())
    model = LPCAMModel(backbone, small_head(), channels=1, multiple=16)
    with pytest.raises(ArtefactError, match="multiples of 16"):
        export_onnx(model, path, size=(40, 48))
    parity = export_onnx(model, path)
    assert parity.sizes == ((112, 144), (128, 96))
    assert Exported(path, parity).described["sides"] == "multiples of 16, from 32 pixels"
    model.save_pretrained(tmp_path / "card")
    assert "Images are (B, 1, height" in (tmp_path / "card" / "README.md").read_text("utf-8")


def refuse(path: Path, message: str, export: Any, model: LPCAMModel, **options: Any) -> None:
    """An earlier file stays, alone."""
    path.write_bytes(b"earlier")
    with pytest.raises(ArtefactError, match=message):
        export(model, path, **options)
    assert [p.read_bytes() for p in path.parent.iterdir()] == [b"earlier"]


class Coarse(nn.Module):
    """Features at stride 4."""

    def __init__(self, factor: Callable[[Tensor], Any] = lambda images: 1.0) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 2, 4, 4)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters(), start=3):
                generator = torch.Generator().manual_seed(number)
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.convolution(images) * self.factor(images)
        return found


def coarse(factor: Callable[[Tensor], Any] = lambda images: 1.0) -> LPCAMModel:
    return LPCAMModel(Coarse(factor), small_head())


def patch_loaded(monkeypatch: pytest.MonkeyPatch, run: Callable[[Tensor], Any]) -> None:
    """Let exported files give other outputs when they are read back."""
    monkeypatch.setattr(onnx, "_open_file", lambda module, data: run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda maps: maps + 3e-4, r"97 x 131 .* maps by 0.0002\d"),
        (lambda maps: maps / 0.0, "differs"),
        (lambda maps: maps[..., 1:], r"\(1, 2, 97, 130\)"),
        (lambda maps: maps.no_such_method(), "no_such_method"),
    ],
)
def test_a_file_with_other_maps_or_nan_is_refused(
    exporter: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Tensor], Any],
    message: str,
) -> None:
    model = coarse()

    def changed(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, maps = model(images)
        return logits, change(maps)

    patch_loaded(monkeypatch, changed)
    refuse(tmp_path / "m.onnx", message, export_onnx, model)


def test_rounding_of_a_map_that_is_hardly_above_zero_is_no_difference(
    exporter: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Divided by its maximum of 1e-5, a cosine's rounding error of 1e-7 is one of 1e-2."""
    vectors = torch.tensor([[1e-5, 0.0], [0.0, 1.0]])
    model = LPCAMModel(Coarse(), LPCAMHead(torch.eye(2), vectors))

    def loaded(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, maps = model(images)
        return logits, maps * torch.tensor([0.99, 1.0])[:, None, None]

    patch_loaded(monkeypatch, loaded)
    assert export_onnx(model, tmp_path / "m.onnx").checked


def test_networks_that_cannot_be_traced_and_wrong_sizes_are_refused(
    exporter: None, tmp_path: Path
) -> None:
    by_sign = coarse(lambda images: 1.0 if float(images.sum()) > 0 else -1.0)
    refuse(tmp_path / "m", "cannot be exported", export_onnx, by_sign)
    refuse(tmp_path / "m", "31 x 64", export_onnx, coarse(), size=(31, 64))


@pytest.fixture
def saved(model: LPCAMModel, tmp_path: Path) -> Path:
    folder = tmp_path / "boxes"
    model.save_pretrained(folder, licence="cc0-1.0", training_data="Six blobs.")
    return folder


def test_a_folder_gives_the_model_back(saved: Path, model: LPCAMModel) -> None:
    names = sorted(p.name for p in saved.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    found = LPCAMModel.from_pretrained(saved)
    images = torch.randn(1, 3, 70, 90, generator=torch.Generator().manual_seed(0))
    for one, other in zip(found(images), model(images), strict=True):
        assert torch.equal(one, other)
    assert found.classes == tuple(COLOURS) and found.preprocessing == model.preprocessing
    assert found.made_by == json.loads(json.dumps(model.made_by))
    found.save_pretrained(saved.parent / "again")
    for name in ("config.json", "model.safetensors"):
        assert (saved.parent / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_the_card_says_what_it_is(saved: Path) -> None:
    _, header, text = (saved / "README.md").read_text("utf-8").split("---\n", 2)
    values = yaml.safe_load(header)
    assert (values["license"], values["library_name"]) == ("cc0-1.0", "lpcam")
    for part in ("# boxes", "- `blue`\n- `green`", "Six blobs.", "cc0-1.0", '"clusters": 2'):
        assert part in text, part
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_a_model_of_others_needs_its_architecture(tmp_path: Path) -> None:
    _, _, lpcam = foreign("test_convnext")
    model = LPCAMModel.from_lpcam(lpcam, preprocessing=Preprocessing((0.5,) * 3, (0.25,) * 3))
    model.save_pretrained(tmp_path)
    assert "backbone=your_backbone" in (tmp_path / "README.md").read_text("utf-8")
    with pytest.raises(ClassifierError, match="backbone=module"):
        LPCAMModel.from_pretrained(tmp_path)
    images = zero_to_one(photographs(1, (64, 64)))
    new = timm.create_model("test_convnext", num_classes=3)
    before = copy.deepcopy(new.state_dict())
    for given in (new, wrap(new)):
        found = LPCAMModel.from_pretrained(tmp_path, backbone=given)
        assert torch.equal(found(images)[1], model(images)[1])
        assert found.preprocessing == model.preprocessing
    assert all(torch.equal(tensor, before[name]) for name, tensor in new.state_dict().items())
    elsewhere = wrap(new, target_layer="stages.0", classes=model.classes)
    with pytest.raises(ArtefactError, match=r"stages\.0"):
        LPCAMModel.from_pretrained(tmp_path, backbone=elsewhere)
    other = timm.create_model("test_resnet", num_classes=3)
    with pytest.raises(ArtefactError, match="does not fit"):
        LPCAMModel.from_pretrained(tmp_path, backbone=other)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_that_reads_a_class_token_comes_back(tmp_path: Path, device: str) -> None:
    model = LPCAMModel.from_lpcam(foreign("test_vit", pool="token")[2])
    model.save_pretrained(tmp_path)
    images = zero_to_one(photographs(2, (96, 128))).to(device)
    new = timm.create_model("test_vit", num_classes=3).to(device)
    for given in (new, wrap(new, pool="token"), copy.deepcopy(model.backbone).to(device)):
        found = LPCAMModel.from_pretrained(tmp_path, backbone=given)
        assert {tensor.device.type for tensor in found.state_dict().values()} == {device}
        with torch.no_grad():
            for one, other in zip(found(images), model.to(device)(images), strict=True):
                assert torch.equal(one, other)
    on_the_mean = wrap(new, classes=["a", "b", "c"])
    with pytest.raises(ArtefactError, match="token 0 read"):
        LPCAMModel.from_pretrained(tmp_path, backbone=on_the_mean)
    with pytest.raises(ClassifierError, match="does not read a class token"):
        LPCAMModel.from_pretrained(tmp_path, backbone=timm.create_model("test_vit2", num_classes=3))


@pytest.mark.parametrize(  # as many classes as the new head has, or others
    ("name", "own"),
    [("test_vit", 3), ("test_convnext", 7)],  # a token; a norm before the head
)
def test_a_new_head_comes_back(tmp_path: Path, name: str, own: int) -> None:
    first = timm.create_model(name, num_classes=own)
    source: Any = first
    if own == 3:
        weight = torch.randn(3, first.num_features, generator=torch.Generator().manual_seed(0))
        found = wrap(first, pool="token" if name == "test_vit" else None)
        source = found.with_head(weight, torch.tensor([1.0, 2.0, 3.0]))
    lpcam = fitted(source, zero_to_one, **({"classes": ["a", "b", "c"]} if own == 7 else {}))
    model = LPCAMModel.from_lpcam(lpcam)
    model.half().save_pretrained(tmp_path)
    new = timm.create_model(name, num_classes=own).double()
    loaded = LPCAMModel.from_pretrained(tmp_path, backbone=new)
    images = zero_to_one(photographs(2, (96, 128))).half()
    with torch.no_grad():
        for one, other in zip(loaded(images), model(images), strict=True):
            assert one.dtype == torch.float16
            assert torch.equal(one, other)
    torch.testing.assert_close(
        model(images)[0].float(), lpcam.source_.logits(images.float()), atol=0.05, rtol=0.02
    )


class Joined(nn.Module):
    """VGG's form, and a layer whose weights are read without a call of it."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(8, 8)
        self.first = nn.Conv2d(3, 8, 4, 4)
        self.last = nn.Conv2d(8, 8, 1)
        self.classifier = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 5))
        self.never = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        mixed = self.first(images).movedim(1, -1) @ self.read.weight.T
        features = nn.functional.adaptive_avg_pool2d(self.last(mixed.movedim(-1, 1)), 2)
        logits: Tensor = self.classifier(features.flatten(1))
        return logits


def test_weights_that_the_map_does_not_need_do_not_travel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = Joined()
    options: dict[str, Any] = {"classes": ["a", "b", "c"], "target_layer": "last"}
    fit = fitted(theirs, zero_to_one, **options)
    model = LPCAMModel.from_lpcam(fit)
    assert {name.split(".")[1] for name in model.backbone.state_dict()} == {"read", "first", "last"}
    images = zero_to_one(photographs(2, (64, 96)))
    torch.testing.assert_close(model(images)[1], fit(images), atol=1e-5, rtol=0)
    # a folder comes back, and so does one from before, with all weights
    whole = copy.copy(model)
    parts = [f"backbone.model.{name}" for name in theirs.state_dict()]
    whole._modules = {**model._modules, "backbone": head._WrappedFeatures(fit.source_, parts)}
    for each, count in ((model, 4), (whole, 10)):
        each.save_pretrained(tmp_path)
        assert len(each.backbone.state_dict()) == count + 2
        again = LPCAMModel.from_pretrained(tmp_path, backbone=wrap(Joined(), **options))
        torch.testing.assert_close(again(images), model(images))


@pytest.mark.parametrize("part", ["backbone.classifier.backbone.conv1.0.weight", "head.vectors"])
def test_other_weights_or_prototypes_are_refused(saved: Path, part: str) -> None:
    state, description = read_tensors(saved / "model.safetensors")
    state[part] += 1e-3
    write_tensors(saved / "model.safetensors", state, description)
    with pytest.raises(ArtefactError, match=part.partition(".")[0]):
        LPCAMModel.from_pretrained(saved)


def test_damaged_folders_are_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text("utf-8"))
    for change, message in (
        ({"format": 2}, r"LPCAMModel.*2"),
        ({"classes": ["one"]}, "does not fit"),
        ({"kind": "bert"}, "bert"),
    ):
        (saved / "config.json").write_text(json.dumps({**config, **change}), "utf-8")
        with pytest.raises(ArtefactError, match=message):
            LPCAMModel.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ArtefactError, match="cannot read"):
        LPCAMModel.from_pretrained(saved)


def test_a_model_of_the_hub_is_fetched(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert allow_patterns == ["config.json", "model.safetensors"]
        if (repository, revision) != ("me/boxes", "v1"):
            raise OSError("404")
        return str(saved)

    monkeypatch.setattr(head, "snapshot_download", download)
    found = LPCAMModel.from_pretrained("me/boxes", revision="v1")
    assert found.classes == tuple(COLOURS)
    with pytest.raises(ArtefactError, match="404"):
        LPCAMModel.from_pretrained("me/nothing")


def test_a_run_gives_its_model(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    model = RunFolder(run).model()
    explainer = RunFolder(run).explainer(device="cpu")
    explainer.settings = explainer.settings.model_copy(update={"scales": (1.0,), "flip": False})
    image = photographs(1, (64, 80))[0]
    assert model.preprocessing is not None
    with torch.no_grad():
        _, maps = model(model.preprocessing(image)[None])
    expected = explainer(image, labels=list(model.classes)).lpcam
    np.testing.assert_allclose(maps[0], expected, atol=1e-4)
    assert model.made_by["run"] == "tiny"
    model.save_pretrained(tmp_path / "saved")
    assert LPCAMModel.from_pretrained(tmp_path / "saved").classes == model.classes
    with pytest.raises(ArtefactError, match="holds no run"):
        RunFolder(tmp_path).model()


EARLY = [("CAM", "alone"), ("CAM", "none"), ("LPCAM", "fused")]


def with_early(source: Any, base: Any, fusion: Any, **options: Any) -> LPCAM:
    early = EarlySettings(base=base, fusion=fusion, clusters=4, nearest=2)

    def preprocess(images: np.ndarray) -> Tensor:
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1

    return fitted(source, preprocess, early=early, **options)


@pytest.mark.parametrize(("base", "fusion"), EARLY)
def test_a_model_and_its_file_give_the_maps_of_early_layers(
    base: str, fusion: str, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    spec = BackboneSpec(BACKBONE, {}, 16)
    classifier = build(spec, tuple(COLOURS), weights="random", mean=(0.5,) * 3, std=(0.5,) * 3)
    with torch.no_grad():
        classifier.head.weight.mul_(3)
    lpcam = with_early(classifier, base, fusion)
    lpcam.set_params(settings=SETTINGS.fixed(cam_epsilon=0.0))  # a layer has none
    model = LPCAMModel.from_lpcam(lpcam)
    assert model.made_by["method"] == "LPCAM-E"
    export_onnx(model, tmp_path / "m.onnx")
    model.save_pretrained(tmp_path / "saved")
    again = LPCAMModel.from_pretrained(tmp_path / "saved")
    session = onnxruntime.InferenceSession(
        (tmp_path / "m.onnx").read_bytes(), providers=["CPUExecutionProvider"]
    )
    for count, size in SIZES:
        pixels = photographs(count, size)
        images = normalised(classifier, pixels)
        with torch.no_grad():
            logits, maps = model(images)
            twin = copy.deepcopy(model)(images)[1]
        torch.testing.assert_close(maps, lpcam(images), atol=1e-5, rtol=0)
        assert torch.equal(twin, maps)
        assert torch.equal(again(images)[1], maps)
        found = session.run(None, {"image": pixels})
        for one, expected in zip(found, (logits, maps), strict=True):
            np.testing.assert_allclose(one, expected, atol=1e-4)
    assert LPCAMModel.from_lpcam(lpcam, enlarge=False)(images)[1].shape[2:] == (19, 8)
    state = read_tensors(tmp_path / "saved" / "model.safetensors")
    state[0]["head.early_mean_0"] += 1
    write_tensors(tmp_path / "saved" / "model.safetensors", *state)
    with pytest.raises(ArtefactError, match="head"):
        LPCAMModel.from_pretrained(tmp_path / "saved")


def test_a_model_of_others_gives_the_maps_of_early_layers(exporter: None, tmp_path: Path) -> None:
    bare = timm.create_model("test_resnet", num_classes=3, zero_init_last=False).eval()
    lpcam = with_early(bare, "LPCAM", "fused")
    before = [len(module._forward_hooks) for module in bare.modules()]
    model = LPCAMModel.from_lpcam(lpcam)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[1], lpcam(images), atol=1e-5, rtol=0)
    assert [len(module._forward_hooks) for module in bare.modules()] == before
    model.save_pretrained(tmp_path / "saved")
    other = timm.create_model("test_resnet", num_classes=3)
    again = LPCAMModel.from_pretrained(tmp_path / "saved", backbone=other)
    assert torch.equal(again(images)[1], model(images)[1])
    parity = export_onnx(model, tmp_path / "m.onnx")
    assert max(parity.errors.values()) < 1e-5
