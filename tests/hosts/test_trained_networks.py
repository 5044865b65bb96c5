"""What every trained network of a host or refinement must do: files, resume, folding, processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import COLOURS, together
from torch import Tensor

from lpcam.classifiers.classifier import BackboneSpec, Classifier, build
from lpcam.data.dataset import ClassTable, Item
from lpcam.data.folder import read_folder
from lpcam.hosts.base import HOSTS, Arm, HostData, View
from lpcam.hosts.mctformer import validation_map
from lpcam.refine.irn import IrnSettings, train_irn
from lpcam.refine.irn_network import build_irn
from lpcam.refine.psa import PsaSettings, build_psa, train_psa, write_scores
from lpcam.runtime.distributed import Processes
from lpcam.runtime.errors import ArtefactError, ClassifierError, DataError
from lpcam.runtime.files import read_tensors, write_tensors
from lpcam.training import loop as engine
from lpcam.training.optim import freeze

SPEC = BackboneSpec("test_resnet", {}, 16)
CLASSES = ClassTable(tuple(COLOURS), (1, 2, 3))
IRN = IrnSettings.from_preset(
    "official", epochs=2, batch_size=3, crop=48, radius=4, learning_rate=0.05
)
PSA = PsaSettings.from_preset(
    "official",
    epochs=2,
    batch_size=3,
    crop=64,
    radius=3,
    learning_rate=0.02,
    freeze=["conv1", "layer1"],
)
AMN = HOSTS["amn"].settings.from_preset(
    "official",
    epochs=2,
    batch_size=3,
    crop=64,
    dilations=(1, 2),
    learning_rate=1e-3,
    head_learning_rate=1e-2,
)
EDAM = HOSTS["edam"].settings.from_preset(
    "official",
    iterations=8,
    pairs=3,
    crop=48,
    long_side=(40, 64),
    warmup=2,
    width=8,
    hidden=12,
    freeze=["conv1", "bn1"],
    learning_rate=0.02,
)
MCTFORMER = HOSTS["mctformer"].settings.from_preset(
    "default", crop=48, epochs=2, batch_size=3, warmup_epochs=0, learning_rate=1e-3
)


HOST_SETTINGS = {"amn": AMN, "edam": EDAM, "mctformer": MCTFORMER}
FORWARD: dict[str, Callable[[Any, Tensor], Any]] = {
    "irn": lambda network, images: torch.cat([part.flatten() for part in network(images)]),
    "psa": lambda network, images: network(images),
    "amn": lambda network, images: network(images, torch.eye(3)[: len(images)]),
    "edam": lambda network, images: network(images),
    "mctformer": lambda network, images: network(images).classes,
}
WITHOUT_NOISE: dict[str, dict[str, Any]] = {
    "irn": {},
    "psa": {},
    "amn": {"dropout": 0.0, "epochs": 1},
    "edam": {"dropout": 0.0},
    # erasing draws from torch's generator, which threads share
    "mctformer": {"erasing": 0.0, "epochs": 1},
}
TOLERANCES = {"irn": 5e-4, "psa": 1e-4, "amn": 2e-3, "edam": 1e-4, "mctformer": 1e-2}


@dataclass
class Case:
    """One kind of network: how it is built, trained and applied."""

    name: str
    settings: Any
    build: Callable[..., Any]
    train: Callable[..., list[dict[str, Any]]]
    items: Sequence[Item] = ()
    """Images that a host is measured on."""

    def apply(self, network: Any, images: Tensor) -> Any:
        return FORWARD[self.name](network, images)


def build_host(name: str, weights: Path, settings: Any, seed: int = 0) -> Any:
    spec, first = SPEC, {"weights": str(weights), "mean": None, "std": None, "seed": seed}
    if name == "mctformer":
        spec, first["weights"] = BackboneSpec("test_vit", {"depth": 3}), "random"
    return HOSTS[name].build(spec, CLASSES.names, settings, **first)


@pytest.fixture(params=["irn", "psa", *HOST_SETTINGS])
def case(request: pytest.FixtureRequest, weights: Path, pictures: Path, tmp_path: Path) -> Case:
    name = request.param
    items = list(read_folder(pictures).items.values())
    labelled, scored = [], []
    for item in items:
        assert item.mask is not None
        label = np.array(Image.open(item.mask))
        planes = [label == 0, *(label == own + 1 for own in item.labels)]
        low = torch.from_numpy(np.stack(planes)).float()
        scored.append((item, tmp_path / f"{item.id}.npz"))
        write_scores(scored[-1][1], torch.stack([low, low]))
        label[:, :3] = 255
        labelled.append((item, tmp_path / f"{item.id}.png"))
        Image.fromarray(label).save(labelled[-1][1])

    def psa(settings: PsaSettings, seed: int = 0) -> Any:
        network = build_psa(build(SPEC, CLASSES.names, weights=weights), seed=seed)
        freeze(network.backbone, settings.freeze, norms=True)
        return network

    if name == "irn":
        return Case(
            name,
            IRN,
            lambda settings, seed=0: build_irn(SPEC, weights=weights, seed=seed),
            lambda network, settings, **k: train_irn(network, labelled, settings, **k),
        )
    if name == "psa":
        return Case(name, PSA, psa, lambda network, own, **k: train_psa(network, scored, own, **k))
    data = HostData(items, items, labelled, CLASSES)
    return Case(
        name,
        HOST_SETTINGS[name],
        lambda settings, seed=0: build_host(name, weights, settings, seed),
        lambda network, settings, **k: HOSTS[name].train(network, data, settings, **k),
        items,
    )


def test_every_host_keeps_the_contract() -> None:
    assert set(HOST_SETTINGS) == set(HOSTS)


def images() -> Tensor:
    return torch.randn(2, 3, 61, 83, generator=torch.Generator().manual_seed(0))


def test_saved_network_is_read_again(case: Case, tmp_path: Path) -> None:
    network, path = case.build(case.settings, seed=3), tmp_path / "network.safetensors"
    network.save(path, {"seed": 3})
    state = torch.random.get_rng_state()
    again = type(network).load(path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again.fingerprint() == network.fingerprint()
    assert again.fingerprint() != case.build(case.settings, seed=4).fingerprint()
    assert not again.training
    assert torch.equal(case.apply(again, images()), case.apply(network, images()))


def test_files_that_do_not_fit(case: Case, classifier: Classifier, tmp_path: Path) -> None:
    network, path = case.build(case.settings), tmp_path / "network.safetensors"
    classifier.save(path)
    with pytest.raises(ArtefactError, match="'classifier'"):
        type(network).load(path)
    network.save(path)
    state, metadata = read_tensors(path)
    name = list(state)[-1]
    write_tensors(path, {**state, name: torch.zeros(1, 3, 1, 7, 1)}, metadata)
    with pytest.raises(ArtefactError, match="description"):
        type(network).load(path)


def test_folded_copy(case: Case, tmp_path: Path) -> None:
    network = case.build(case.settings)
    if network.folded() is network:
        pytest.skip("has no batch norms to fold")
    state = torch.random.get_rng_state()
    twin = network.folded()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(list(twin.parameters())) < len(list(network.parameters()))
    expected = case.apply(network, images())
    torch.testing.assert_close(case.apply(twin, images()), expected, atol=1e-4, rtol=1e-3)
    with pytest.raises(ClassifierError, match="cannot describe"):
        twin.save(tmp_path / "network.safetensors")
    network.save(tmp_path / "network.safetensors")  # as before


class Stopping(Processes):
    """One process, stopped at a number of sums, of which every step has at least one."""

    def __init__(self, sums: int) -> None:
        super().__init__()
        self.sums = sums

    def sum(self, tensor: Tensor) -> Tensor:
        self.sums -= 1
        if self.sums < 0:
            raise KeyboardInterrupt
        return tensor


@pytest.mark.parametrize("sums", [2, 5])
def test_resumed_training_gives_the_same_bytes(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sums: int
) -> None:
    monkeypatch.setattr(engine, "CHECKPOINT_STEPS", 1)
    whole, resumed = case.build(case.settings), case.build(case.settings)
    options = {"seed": 5, "folder": tmp_path / "whole"}
    expected = case.train(whole, case.settings, **options)
    options["folder"] = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        case.train(case.build(case.settings), case.settings, **options, processes=Stopping(sums))
    assert case.train(resumed, case.settings, **options) == expected
    assert resumed.fingerprint() == whole.fingerprint()
    files = [(tmp_path / name / engine.CHECKPOINT).read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]


def test_a_checkpoint_of_another_network(case: Case, tmp_path: Path) -> None:
    path = tmp_path / engine.CHECKPOINT
    write_tensors(path, {"model.other": torch.zeros(1)}, {"kind": "checkpoint", "format": 2})
    with pytest.raises(ArtefactError, match="checkpoint"):
        case.train(case.build(case.settings), case.settings, seed=0, folder=tmp_path)


def test_processes_take_the_steps_of_one(case: Case, tmp_path: Path) -> None:
    """Batches of 3 shared by 2: means are over the whole batch."""
    settings = case.settings.model_copy(update=WITHOUT_NOISE[case.name])
    whole = case.build(settings)
    expected = case.train(whole, settings, seed=5, folder=tmp_path / "one")
    untrained = case.build(settings).state_dict()
    own = [case.build(settings), case.build(settings)]  # here, as threads share the generator

    def work(processes: Processes) -> list[dict[str, Any]]:
        folder = tmp_path / str(processes.rank)
        network = own[processes.rank]
        return case.train(network, settings, seed=5, folder=folder, processes=processes)

    histories = together(2, work)
    for network, history in zip(own, histories, strict=True):
        # A precision jumps where rounding turns the order of two scores: that of the same weights
        # is compared instead of that of another training.
        measured = [one.pop("validation_map", None) for one in history]
        if measured[-1] is not None:
            again = validation_map(network, case.items, settings)
            assert measured[-1] == pytest.approx(again, abs=1e-9)
        for found, wanted in zip(history, expected, strict=True):
            continuous = {k: v for k, v in wanted.items() if k != "validation_map"}
            assert found == pytest.approx(continuous, abs=3e-3)
        for name, value in network.state_dict().items():
            reference = whole.state_dict()[name]
            # Adam makes a whole step of the smallest gradient, whose sign rounding may turn
            close = torch.isclose(value, reference, atol=TOLERANCES[case.name], rtol=1e-2)
            assert float(close.float().mean()) > 0.97, name
    moved = [(whole.state_dict()[k] - v).abs().max() for k, v in untrained.items() if v.ndim]
    assert max(moved) > 1e-3


# -- Maps of hosts -------------------------------------------------------------------------------


def view_of(*labels: int) -> View:
    image = np.random.default_rng(0).integers(0, 256, (61, 83, 3)).astype(np.uint8)
    return View(image, labels, torch.ones(61, 83, dtype=torch.int64))


@pytest.mark.parametrize("name", HOST_SETTINGS)
def test_maps_of_an_image(name: str, weights: Path, tmp_path: Path) -> None:
    """Sizes and range; a class's map does not depend on the order of the labels."""
    host, settings = HOSTS[name], HOST_SETTINGS[name]
    build_host(name, weights, settings).save(tmp_path / "network.safetensors")
    network = host.load(tmp_path / "network.safetensors", torch.device("cpu"))
    found = host.maps(network, view_of(2, 0), settings, None)
    assert found.cam.shape == (2, 16, 21)
    assert found.high_res.shape == (2, 61, 83)
    assert 0 <= float(found.high_res.min()) <= float(found.high_res.max()) <= 1
    other = host.maps(network, view_of(0, 2), settings, None)
    torch.testing.assert_close(other.high_res.flip(0), found.high_res)
    for label in (3, -1):
        with pytest.raises(DataError, match=rf"\[{label}\].* 0 to 2"):
            host.maps(network, view_of(0, label), settings, None)


@pytest.mark.parametrize("name", HOST_SETTINGS)
def test_no_maps_of_damaged_weights(name: str, weights: Path) -> None:
    host, settings = HOSTS[name], HOST_SETTINGS[name]
    network = build_host(name, weights, settings)
    parts = {"amn": "conditioning.weight", "edam": "activation.weight", "mctformer": "head.weight"}
    with torch.no_grad():
        network.get_parameter(parts[name]).fill_(torch.nan)
    with pytest.raises(ClassifierError, match="NaN"):
        host.maps(network, view_of(0), settings, None)


@pytest.mark.parametrize("name", HOST_SETTINGS)
def test_a_batch_gives_what_its_images_give(name: str, weights: Path) -> None:
    network = build_host(name, weights, HOST_SETTINGS[name])
    size = 2 if name == "edam" else 1  # images of a pair see each other
    batch = torch.cat([images(), images().flip(-1)])[: 4 if name == "edam" else 3]
    with torch.no_grad():
        whole = FORWARD[name](network, batch)
        for first in range(0, len(batch), size):
            part = batch[first : first + size]
            if name == "amn":
                found = network(part, torch.eye(3)[first : first + 1])
            else:
                found = FORWARD[name](network, part)
            torch.testing.assert_close(found, whole[first : first + size], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", HOST_SETTINGS)
def test_settings_of_the_keys_exist(name: str) -> None:
    """A key of the network leaves out what a key of masks, prototypes or maps has."""
    host, settings = HOSTS[name], HOST_SETTINGS[name]
    left_out = host.map_fields | host.prototype_fields | host.mask_fields
    assert left_out <= set(type(settings).model_fields)
    assert not left_out & set(host.network_key(settings))
    assert "threshold" not in host.network_key(settings)
    assert set(host.maps_key(settings, Arm("x", "CAM", "x"))) == host.map_fields
