"""What every trained network of a host or refinement must do: files, resume, folding, processes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hosts.common import CLASSES, FORWARD, SETTINGS, SPEC, build_host, drawn, map_image, photograph
from PIL import Image
from tiny import together
from torch import Tensor

from lpcam.classifiers.classifier import BackboneSpec, build
from lpcam.classifiers.finetuning import FinetuneSettings, finetune, validation_map
from lpcam.data.dataset import Item
from lpcam.hosts.base import HOSTS, Arm, HostData
from lpcam.refine.base import REFINEMENTS, LearnedRefinement
from lpcam.refine.irn import IrnSettings
from lpcam.refine.irn_network import build_irn
from lpcam.refine.psa import PsaSettings, build_psa, write_scores
from lpcam.runtime.distributed import Processes
from lpcam.runtime.errors import ArtefactError, ClassifierError
from lpcam.runtime.files import read_tensors, write_tensors
from lpcam.training import loop as engine
from lpcam.training.optim import freeze

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
CLASSIFIER = FinetuneSettings.from_preset(
    "momentum", epochs=2, batch_size=3, long_side=[40, 64], crop=48
)
APPLY: dict[str, Callable[[Any, Tensor], Any]] = {
    "classifier": lambda network, images: network(images),
    "irn": lambda network, images: torch.cat([part.flatten() for part in network(images)]),
    "psa": lambda network, images: network(images),
    **FORWARD,
}
WITHOUT_NOISE: dict[str, dict[str, Any]] = {
    "classifier": {},
    "irn": {},
    "psa": {},
    "amn": {"dropout": 0.0, "epochs": 1},
    "edam": {"dropout": 0.0},
    # erasing draws from torch's generator, which threads share
    "mctformer": {"erasing": 0.0, "epochs": 1},
}
TOLERANCES = {"classifier": 1e-5}
TOLERANCES |= {"irn": 5e-4, "psa": 1e-4, "amn": 2e-3, "edam": 1e-4, "mctformer": 1e-2}


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
        return APPLY[self.name](network, images)


@pytest.fixture(params=["classifier", "irn", "psa", *SETTINGS])
def case(
    request: pytest.FixtureRequest,
    weights: Path,
    items: list[Item],
    labelled: list[tuple[Item, Path]],
    tmp_path: Path,
) -> Case:
    name, scored = request.param, []
    for item in items if name == "psa" else ():
        assert item.mask is not None
        label = np.array(Image.open(item.mask))
        planes = [label == 0, *(label == own + 1 for own in item.labels)]
        low = torch.from_numpy(np.stack(planes)).float()
        scored.append((item, tmp_path / f"{item.id}.npz"))
        write_scores(scored[-1][1], torch.stack([low, low]))

    def psa(settings: PsaSettings, seed: int = 0) -> Any:
        network = build_psa(build(SPEC, CLASSES.names, weights=weights), seed=seed)
        freeze(network.backbone, settings.freeze, norms=True)
        return network

    if name == "classifier":
        return Case(
            name,
            CLASSIFIER,
            lambda settings, seed=0: build(SPEC, CLASSES.names, weights=weights, seed=seed),
            lambda network, settings, **k: finetune(network, items, [], settings, **k),
        )

    def refine(network: Any, settings: Any, **options: Any) -> Any:
        method, section = REFINEMENTS[name], SimpleNamespace(settings=settings)
        assert isinstance(method, LearnedRefinement)
        files = labelled if name == "irn" else scored
        return method.train(network, files, section, **options)  # type: ignore[arg-type]

    if name == "irn":
        irn = partial(build_irn, SPEC, weights=weights)
        return Case(name, IRN, lambda settings, seed=0: irn(seed=seed), refine)
    if name == "psa":
        return Case(name, PSA, psa, refine)
    data = HostData(items, items, labelled, CLASSES)
    return Case(
        name,
        SETTINGS[name],
        lambda settings, seed=0: build_host(name, weights, settings, seed),
        lambda network, settings, **k: HOSTS[name].train(network, data, settings, **k),
        items,
    )


def test_every_host_keeps_the_contract() -> None:
    assert set(SETTINGS) == set(HOSTS)


def images() -> Tensor:
    return drawn(2, 3, 61, 83)


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


def test_files_that_do_not_fit(case: Case, tmp_path: Path) -> None:
    network, path = case.build(case.settings), tmp_path / "network.safetensors"
    write_tensors(path, {}, {"kind": "prototypes"})
    with pytest.raises(ArtefactError, match="'prototypes'"):
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


def test_resumed_training_gives_the_same_bytes(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHECKPOINT_STEPS", 1)
    whole, resumed = case.build(case.settings), case.build(case.settings)
    options = {"seed": 5, "folder": tmp_path / "whole"}
    expected = case.train(whole, case.settings, **options)
    options["folder"] = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        case.train(case.build(case.settings), case.settings, **options, processes=Stopping(5))
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
            score = lambda found: found.classes  # noqa: E731
            again = validation_map(network, case.items, settings.crop, Processes(), score)
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


# -- Hosts -------------------------------------------------------------------------------------

LEARNING: dict[str, tuple[dict[str, Any], float, str]] = {
    "amn": (
        {"epochs": 10, "scale": (0.9, 1.1), "smoothing": 0.1},
        0.8,
        r"classifier\.(head|backbone\.(conv1|bn1))\.|running_|num_batches",
    ),
    "edam": (
        {"iterations": 100, "learning_rate": 0.05, "jitter": (0.0,) * 4, "dropout": 0.0},
        0.75,
        r"classifier\.(head|backbone\.conv1)\.|bn\d|downsample\.2|key\.bias",
    ),
    "mctformer": ({"epochs": 10, "batch_size": 6, "learning_rate": 2e-3}, 0.8, r"^norm\."),
}
"""Changes of the settings, largest fall of the loss, names of what does not change."""


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_falls(
    name: str, weights: Path, items: list[Item], labelled: list[tuple[Item, Path]], tmp_path: Path
) -> None:
    changes, fall, frozen = LEARNING[name]
    settings = SETTINGS[name].model_copy(update=changes)
    network = build_host(name, weights, settings)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    data = HostData(items, items, labelled, CLASSES)
    history = HOSTS[name].train(network, data, settings, seed=0, folder=tmp_path)
    losses = [record["loss"] for record in history]
    some = len(losses) // 5
    assert np.mean(losses[-some:]) < fall * np.mean(losses[:some])
    assert not network.training
    for key, value in network.state_dict().items():
        if not key.endswith("key.bias"):  # which no softmax feels
            assert torch.equal(value, before[key]) == bool(re.search(frozen, key)), key
    if HOSTS[name].holds_out:
        assert history[-1]["validation_map"] > 0.6


@pytest.mark.parametrize("name", ["amn", "edam"])
@pytest.mark.parametrize(
    ("backbone", "size"),
    [("test_efficientnet", (64, 64)), ("test_convnext", (64, 99)), ("test_vit", (33, 47))],
)
def test_any_backbone_and_size(name: str, backbone: str, size: tuple[int, int]) -> None:
    arguments = {"dynamic_img_size": True, "dynamic_img_pad": True} if "vit" in backbone else {}
    network = build_host(name, "random", spec=BackboneSpec(backbone, arguments))
    with torch.no_grad():
        assert bool(torch.isfinite(FORWARD[name](network, drawn(2, 3, *size))).all())
    found = map_image(name, network, photograph(*size), [1], mask=torch.ones(size))
    assert found.cam.shape == (1, -(-size[0] // 4), -(-size[1] // 4))
    assert found.high_res.shape == (1, *size)


def map_labels(name: str, network: Any, *labels: int) -> Any:
    mask = torch.ones(61, 83, dtype=torch.int64)
    return map_image(name, network, photograph(61, 83), labels, mask=mask)


@pytest.mark.parametrize("name", SETTINGS)
def test_maps_of_an_image(name: str, weights: Path, tmp_path: Path) -> None:
    """Sizes and range; a class's map does not depend on the order of the labels."""
    build_host(name, weights).save(tmp_path / "network.safetensors")
    network = HOSTS[name].load(tmp_path / "network.safetensors", torch.device("cpu"))
    found = map_labels(name, network, 2, 0)
    assert found.cam.shape == (2, 16, 21)
    assert found.high_res.shape == (2, 61, 83)
    assert 0 <= float(found.high_res.min()) <= float(found.high_res.max()) <= 1
    other = map_labels(name, network, 0, 2)
    torch.testing.assert_close(other.high_res.flip(0), found.high_res)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("amn", "conditioning.weight"),
        ("edam", "activation.weight"),
        ("mctformer", "head.weight"),
        ("mctformer", "cls_token"),
    ],
)
def test_no_maps_of_damaged_weights(name: str, part: str, weights: Path) -> None:
    network = build_host(name, weights)
    with torch.no_grad():
        network.get_parameter(part).fill_(torch.nan)
    with pytest.raises(ClassifierError, match="NaN"):
        map_labels(name, network, 0)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_gives_what_its_images_give(name: str, weights: Path) -> None:
    network = build_host(name, weights)
    size = 2 if name == "edam" else 1  # images of a pair see each other
    batch = drawn(4, 3, 61, 83)[: 4 if name == "edam" else 3]
    with torch.no_grad():
        whole = FORWARD[name](network, batch)
        for first in range(0, len(batch), size):
            part = batch[first : first + size]
            if name == "amn":
                found = network(part, torch.eye(3)[first : first + 1])
            else:
                found = FORWARD[name](network, part)
            torch.testing.assert_close(found, whole[first : first + size], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_keys_exist(name: str) -> None:
    """A key of the network leaves out what a key of masks, prototypes or maps has."""
    host, settings = HOSTS[name], SETTINGS[name]
    left_out = host.map_fields | host.prototype_fields | host.mask_fields
    assert left_out <= set(type(settings).model_fields)
    assert not left_out & set(host.network_key(settings))
    assert "threshold" not in host.network_key(settings)
    assert set(host.maps_key(settings, Arm("x", "CAM", "x"))) == host.map_fields
