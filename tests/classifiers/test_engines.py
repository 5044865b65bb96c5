"""Engines: the choice of one, and networks that they run."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lpcam.classifiers import engines
from lpcam.classifiers.classifier import (
    BackboneSpec,
    Classifier,
    Preprocessing,
    SameConvolution,
    build,
    feature_maps,
    folded_backbone,
)
from lpcam.classifiers.early_layers import Tap, early_layers
from lpcam.classifiers.engines import Engine, accelerated, accelerated_network, choose_engine
from lpcam.classifiers.features import features_of
from lpcam.runtime.errors import ClassifierError, LpcamError

CPU = torch.device("cpu")
PLAIN = Preprocessing((0.5,) * 3, (0.5,) * 3)
SPECS = {
    "residual": BackboneSpec("test_resnet", {}, 16),
    "same": BackboneSpec("test_efficientnet", {"pad_type": "same"}, 16),
    "channels last": BackboneSpec("test_convnext2", {}),
}


def runtime(name: str) -> Any:
    missing = importlib.util.find_spec(name) is None or importlib.util.find_spec("onnx") is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"needs {name} and onnx"))


RUNTIMES = [runtime("onnxruntime"), runtime("openvino")]


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n + 1, 3, *size, generator=generator) for n, size in enumerate(sizes)]


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


def made(name: str) -> Classifier:
    torch.manual_seed(0)
    classifier = build(SPECS[name], ["cow", "dog"], weights="random")
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):  # as a trained one, so that folding has an effect
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return classifier


# -- the choice --------------------------------------------------------------------------------


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in names else found(n))
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("absent", ["onnxruntime", "onnx"])
def test_auto_is_torch_where_a_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    without(monkeypatch, absent)
    assert choose_engine("auto", CPU) == "torch"


@pytest.mark.parametrize("wanted", RUNTIMES[:1])
def test_auto_is_the_runtime_on_a_cpu_in_full_precision(
    monkeypatch: pytest.MonkeyPatch, wanted: Engine
) -> None:
    monkeypatch.setattr(engines, "native_bfloat16", lambda: True)
    assert choose_engine("auto", CPU) == wanted
    assert choose_engine("auto", torch.device("cuda")) == "torch"
    assert choose_engine("auto", CPU, "bfloat16") == "torch"


@pytest.mark.parametrize(
    ("wanted", "absent", "extra"),
    [
        ("onnxruntime", "onnxruntime", "onnx"),
        ("onnxruntime", "onnx", "onnx"),
        ("openvino", "openvino", "openvino"),
    ],
)
def test_a_missing_engine_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, wanted: Engine, absent: str, extra: str
) -> None:
    if absent != "openvino" and wanted == "openvino":
        pytest.importorskip("openvino")
    without(monkeypatch, absent)
    with pytest.raises(LpcamError, match=rf"{absent}[\s\S]*lpcam\[{extra}\]"):
        choose_engine(wanted, CPU)


@pytest.mark.parametrize("wanted", RUNTIMES)
def test_a_runtime_of_the_cpu_is_refused_on_a_gpu(wanted: Engine) -> None:
    with pytest.raises(ClassifierError, match="cuda"):
        choose_engine(wanted, torch.device("cuda"))


@pytest.mark.parametrize("wanted", RUNTIMES)
def test_a_precision_that_a_runtime_lacks_is_refused(wanted: Engine) -> None:
    with pytest.raises(ClassifierError, match="float16"):
        choose_engine(wanted, CPU, "float16")


@pytest.mark.parametrize("wanted", ["auto", "torch"])
def test_bfloat16_is_refused_where_the_processor_has_none(
    monkeypatch: pytest.MonkeyPatch, wanted: Any
) -> None:
    monkeypatch.setattr(engines, "native_bfloat16", lambda: False)
    with pytest.raises(ClassifierError, match="bfloat16"):
        choose_engine(wanted, CPU, "bfloat16")
    assert choose_engine("torch", torch.device("cuda"), "bfloat16") == "torch"


# -- networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", RUNTIMES)
@pytest.mark.parametrize("name", SPECS)
def test_features_are_those_of_torch_at_every_size_and_number(name: str, engine: Engine) -> None:
    classifier = made(name)
    twin = accelerated(classifier, engine)
    for batch in images((64, 64), (97, 131), (50, 77), (128, 40)):
        expected = features_of(classifier, batch, flip=True)
        found = features_of(twin, batch, flip=True)
        assert close(found.features, expected.features)
        assert expected.mirrored is not None and found.mirrored is not None
        assert close(found.mirrored, expected.mirrored)


def test_a_network_compiled_by_torch_gives_the_same() -> None:
    classifier = made("residual")
    twin = accelerated(classifier, "compile")
    for batch in images((64, 64), (50, 77)):
        expected = features_of(classifier, batch, flip=False)
        assert close(features_of(twin, batch, flip=False).features, expected.features)


@pytest.mark.parametrize("engine", [*RUNTIMES, "compile"])
def test_early_layers_are_seen_by_hooks(engine: Engine) -> None:
    classifier = made("residual")
    layers = early_layers(classifier.backbone)
    twin = accelerated(classifier, engine, layers=layers)
    taps = [Tap(one.backbone, layers) for one in (classifier, twin)]
    (batch,) = images((64, 96))
    with torch.no_grad():
        for one in (classifier, twin):
            one.features(batch)
    for expected, found in zip(*(tap.take((64, 96)) for tap in taps), strict=True):
        assert close(found, expected)


@pytest.mark.parametrize("engine", RUNTIMES)
def test_bytes_do_not_depend_on_threads_or_the_batch(engine: Engine) -> None:
    twin = accelerated(made("same"), engine)
    _, batch = images((40, 40), (97, 131))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(twin.features(batch))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    with ThreadPoolExecutor(3, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        assert all(torch.equal(one, found[0]) for one in pool.map(twin.features, [batch] * 6))
    assert torch.equal(twin.features(batch[:1])[0], found[0][0])


@pytest.mark.parametrize("engine", RUNTIMES)
def test_a_file_is_written_once_and_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    classifier, path = made("residual"), tmp_path / "network.onnx"
    (batch,) = images((64, 96))
    first = accelerated(classifier, engine, path, lambda: [batch]).features(batch)
    data = path.read_bytes()
    monkeypatch.setattr(engines, "_exported", lambda _: pytest.fail("exported again"))
    again = accelerated(classifier, engine, path, lambda: pytest.fail("compared again"))
    assert torch.equal(again.features(batch), first) and path.read_bytes() == data


@pytest.mark.parametrize("engine", RUNTIMES)
def test_a_damaged_file_is_refused_by_its_name(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / "network.onnx"
    path.write_bytes(b"no network")
    with pytest.raises(ClassifierError, match=r"network\.onnx"):
        accelerated(made("residual"), engine, path)


class OfTheTrace(nn.Module):
    """Its outputs depend on a number that a trace takes for a constant."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.change = nn.Conv2d(3, 4, 3, 2), change

    def forward(self, batch: Tensor) -> Tensor:
        return self.change(self.layer(batch))


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "a number of the size": lambda maps: maps * float(maps.shape[-1]),
    "a number of the values": lambda maps: maps * float(maps.abs().max()),
    "a size": lambda maps: maps[..., : int(maps.shape[-1]) - 40 or None],
    "not finite": lambda maps: maps / torch.zeros(()),
    "no operator of ONNX": torch.special.i0e,
}


@pytest.mark.parametrize("change", WRONG)
def test_a_network_that_an_engine_gets_wrong_is_refused(tmp_path: Path, change: str) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    network, path = OfTheTrace(WRONG[change]).eval(), tmp_path / "network.onnx"
    with pytest.raises(ClassifierError):
        accelerated_network(network, "onnxruntime", path, lambda: images((64, 64), (80, 70)))
    assert not path.exists()


def test_all_maps_of_a_backbone_are_given() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    folded = folded_backbone(made("same").backbone)
    before = sum(isinstance(module, SameConvolution) for module in folded.modules())
    fast = accelerated_network(folded, "onnxruntime", call=lambda x: feature_maps(folded, x))
    (batch,) = images((64, 96))
    with torch.no_grad():
        for expected, found in zip(
            feature_maps(folded, batch), feature_maps(fast, batch), strict=True
        ):
            assert close(found, expected)
    # what stands for layers while a network is exported is not left in it
    assert before == sum(isinstance(module, SameConvolution) for module in folded.modules()) > 0


def test_torch_keeps_a_network_as_it_is() -> None:
    network = nn.Conv2d(3, 4, 3)
    assert accelerated_network(network, "torch") is network
