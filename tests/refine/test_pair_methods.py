"""Losses and trainings of IRN and PSA: what both promise, and what each specification says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from lpcam.classifiers.classifier import BackboneSpec, Classifier, build
from lpcam.data.dataset import Item
from lpcam.data.folder import read_folder
from lpcam.refine.base import REFINEMENTS, LearnedRefinement
from lpcam.refine.irn import IrnSettings, irn_loss
from lpcam.refine.irn_network import build_irn
from lpcam.refine.psa import PsaSettings, build_psa, psa_loss, write_scores
from lpcam.refine.walk import pair_counts
from lpcam.runtime.errors import ArtefactError, ClassifierError, DataError
from lpcam.training import loop as engine

Loss = Callable[..., Tensor]
SPEC = BackboneSpec("test_resnet", {}, 16)
IRN = IrnSettings.from_preset(
    "official", epochs=2, batch_size=3, crop=48, radius=4, displacement=False
)
PSA = PsaSettings.from_preset(
    "official", epochs=2, batch_size=3, crop=64, radius=3, freeze=["conv1", "layer1"]
)
LOSSES: dict[str, Loss] = {
    "irn": lambda x, labels, counts=None: irn_loss(x[:, 0], labels, 3, x[:, 1:], counts).total,
    "psa": lambda x, labels, counts=None: psa_loss(x, labels, 3, counts),
}
OFFICIAL = """
irn: {epochs: 3, batch_size: 32, learning_rate: 0.1, displacement_multiplier: 10, momentum: 1.0e-4,
  weight_decay: 1.0e-4, power: 0.9, crop: 512, radius: 10, displacement: true, walk_radius: 5,
  beta: 10, exponent: 8, tolerance: 0, sharpness: 1, walked: maps,
  foreground_threshold: 0.45, scale: [0.5, 1.5],
  background_threshold: 0.25, threshold: 0.35, cam_foreground_threshold: 0.3,
  cam_background_threshold: 0.05, cam_threshold: 0.25}
psa: {low_alpha: 1, high_alpha: 12, epochs: 5, batch_size: 8, learning_rate: 0.01,
  head_multiplier: 10, bias_multiplier: 2, momentum: 5.0e-4, weight_decay: 5.0e-4, power: 0.9,
  freeze: [conv1a, b2, b2_1, b2_2], crop: 448, jitter: [0.3, 0.3, 0.3, 0.1], radius: 5, beta: 8,
  exponent: 6, tolerance: 0, threshold: 0.39}
"""
"""Written down again from the specifications."""


@pytest.mark.parametrize("settings", [IrnSettings, PsaSettings])
def test_official_settings(settings: type[IrnSettings | PsaSettings]) -> None:
    expected = {"preset": "official", **yaml.safe_load(OFFICIAL)[settings.table]}
    assert settings.from_preset("official").model_dump(mode="json") == expected


@pytest.fixture
def labelled(pictures: Path, tmp_path: Path) -> dict[str, list[tuple[Item, Path]]]:
    """The tiny images with their masks as labels of both methods, a frame of each unknown."""
    found: dict[str, list[tuple[Item, Path]]] = {"irn": [], "psa": []}
    for item in read_folder(pictures).items.values():
        assert item.mask is not None
        mask = np.array(Image.open(item.mask))
        low = torch.stack([torch.from_numpy(mask == k) for k in (0, *(n + 1 for n in item.labels))])
        high = low.float()
        if item.labels:
            high[:, :9], high[1, :9] = 0, 1  # favours a class where low has the background
        scores, png = tmp_path / f"{item.id}.npz", tmp_path / f"{item.id}.png"
        write_scores(scores, torch.stack([low.float(), high]))
        mask[:, :3] = 255
        Image.fromarray(mask).save(png)
        found["irn"].append((item, png))
        found["psa"].append((item, scores))
    return found


def train(name: str, network: Any, pairs: Any, settings: Any, **options: Any) -> Any:
    method, section = REFINEMENTS[name], SimpleNamespace(settings=settings)
    assert isinstance(method, LearnedRefinement)
    return method.train(network, pairs, section, **options)  # type: ignore[arg-type]


def drawn(*shape: int) -> Tensor:
    return 3 * torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def drawn_labels(*shape: int) -> Tensor:
    numbers = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(0))
    return torch.tensor([0, 1, 2, 255], dtype=torch.uint8)[numbers]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [(2, 20), (20, 4), (1, 1)])
def test_grids_too_small_for_a_pair(name: str, size: tuple[int, int]) -> None:
    given = drawn(2, 3, *size).requires_grad_()
    loss = LOSSES[name](given, drawn_labels(2, *size))
    assert float(loss.detach()) == 0
    assert not torch.autograd.grad(loss, given)[0].any()


@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_a_batch_add_up(name: str) -> None:
    given, labels = drawn(3, 3, 9, 10), drawn_labels(3, 9, 10)
    counts = pair_counts(labels, 3)
    parts = [LOSSES[name](given[p], labels[p], counts) for p in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(parts[0] + parts[1], LOSSES[name](given, labels))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [-200.0, 200.0])
def test_saturated_values_have_a_finite_gradient(name: str, value: float) -> None:
    given = torch.full((1, 3, 8, 8), value)
    given[..., ::2] = 0
    given.requires_grad_()
    for labels in (drawn_labels(1, 8, 8), torch.full((1, 8, 8), 255, dtype=torch.uint8)):
        loss = LOSSES[name](given, labels)
        assert bool(torch.isfinite(loss))
        assert bool(torch.isfinite(torch.autograd.grad(loss, given)[0]).all())


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_of_the_loss(name: str) -> None:
    given, labels = drawn(1, 3, 4, 5).double().requires_grad_(), drawn_labels(1, 4, 5)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, labels), (given,))


@pytest.mark.parametrize("size", [(64, 64), (9, 83)])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
def test_any_backbone_and_size(name: str, size: tuple[int, int]) -> None:
    """test_convnext drops the rest of a side; test_vit has no features fine enough for IRN."""
    arguments = {"dynamic_img_size": True, "dynamic_img_pad": True} if name == "test_vit" else {}
    spec, images = BackboneSpec(name, arguments), drawn(2, 3, *size)
    network = build_psa(build(spec, ("one",), weights="random"))
    with torch.no_grad():
        found = {8: network(images)}
        if name != "test_vit":
            logits, displacement = build_irn(spec, weights="random")(images)
            found[4] = torch.cat([logits[:, None], displacement], 1)
            assert found[4].shape[1] == 3
    for stride, values in found.items():
        assert values.shape[2:] == tuple(-(-side // stride) for side in size)
        assert bool(torch.isfinite(values).all())


def test_displacement_does_not_change_the_boundaries(
    labelled: dict[str, Any], weights: Path, tmp_path: Path
) -> None:
    states = []
    for wanted in (True, False):
        network = build_irn(SPEC, weights=weights, displacement=wanted)
        settings = IRN.model_copy(update={"displacement": wanted, "epochs": 1})
        train("irn", network, labelled["irn"], settings, seed=0, folder=tmp_path / str(wanted))
        states.append(network.state_dict())
    for name, value in states[1].items():
        assert torch.equal(value, states[0][name]), name


@pytest.fixture
def networks(classifier: Classifier, weights: Path) -> dict[str, Any]:
    """Untrained networks and their settings."""
    return {
        "irn": (build_irn(SPEC, weights=weights, displacement=False), IRN),
        "psa": (build_psa(classifier), PSA),
    }


@pytest.mark.parametrize(
    ("name", "changes", "moves"),
    [
        ("irn", {"scale": (0.9, 1.1), "learning_rate": 0.05}, ("branches.",)),
        (
            "psa",
            {"learning_rate": 0.02, "batch_size": 4},
            ("last.", "reductions.", "backbone.layer2.", "backbone.layer3.", "backbone.layer4."),
        ),
    ],
)
def test_loss_falls(
    networks: dict[str, Any],
    labelled: dict[str, list[tuple[Item, Path]]],
    tmp_path: Path,
    name: str,
    changes: dict[str, Any],
    moves: tuple[str, ...],
) -> None:
    network, settings = networks[name]
    settings = settings.model_copy(update={"epochs": 5, "momentum": 0.9, **changes})
    before = {k: v.clone() for k, v in network.state_dict().items()}
    history = train(name, network, labelled[name], settings, seed=0, folder=tmp_path)
    assert [record["epoch"] for record in history] == [1, 2, 3, 4, 5]
    assert history[-1]["loss"] < 0.95 * history[0]["loss"]
    assert not any(module.training for module in network.modules())
    moved = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    still = {k for k in before if not k.startswith(moves) or ".bn" in k}
    assert moved and not moved & still


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    """Parameter groups of each step of SGD."""
    seen: list[list[dict[str, Any]]] = []
    step = torch.optim.SGD.step

    def record(self: torch.optim.SGD, *arguments: Any) -> Any:
        seen.append([dict(group) for group in self.param_groups])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", record)
    return seen


def test_optimiser_of_irn(
    steps: list[Any], labelled: dict[str, Any], weights: Path, tmp_path: Path
) -> None:
    settings = IrnSettings.from_preset("official", epochs=1, batch_size=3, crop=48, radius=4)
    network = build_irn(SPEC, weights=weights)
    train("irn", network, labelled["irn"], settings, seed=0, folder=tmp_path)
    assert len(steps) == 4
    for number, (boundary, displacement) in enumerate(steps):
        assert boundary["lr"] == pytest.approx(0.1 * (1 - number / 4) ** 0.9)
        assert displacement["lr"] == pytest.approx(10 * boundary["lr"])
        for group in (boundary, displacement):
            assert (group["momentum"], group["weight_decay"]) == (1e-4, 1e-4)


def test_optimiser_of_psa(steps: list[Any], labelled: dict[str, Any], tmp_path: Path) -> None:
    """The momentum is 5e-4; biases have twice the rate and no decay."""
    network = build_psa(build(BackboneSpec("test_convnext", {}), ("one",), weights="random"))
    settings = PsaSettings.from_preset("official", epochs=1, batch_size=6, crop=72, freeze=[])
    train("psa", network, labelled["psa"], settings, seed=0, folder=tmp_path)
    assert len(steps) == 2
    for number, groups in enumerate(steps):
        rate = 0.01 * (1 - number / 2) ** 0.9
        found = {round(g["lr"] / rate, 4): g for g in groups}
        assert {k: g["weight_decay"] for k, g in found.items()} == {1: 5e-4, 2: 0, 10: 5e-4}
        assert all(g["momentum"] == 5e-4 for g in groups)
        assert len(found[10.0]["params"]) == 1 + len(network.levels)


@pytest.mark.parametrize("name", LOSSES)
def test_bad_input(
    networks: dict[str, Any], labelled: dict[str, Any], tmp_path: Path, name: str
) -> None:
    network, settings = networks[name]
    item, path = labelled[name][0]

    def refused(match: str, pairs: list[tuple[Item, Path]], **changes: Any) -> None:
        own = settings.model_copy(update=changes)
        with pytest.raises((DataError, ArtefactError, ClassifierError), match=match):
            train(name, network, pairs, own, seed=0, folder=tmp_path / "run")

    refused("none", [(item, path.with_stem("none"))])
    small = path.with_stem("small")
    if name == "irn":
        Image.fromarray(np.zeros((9, 12), np.uint8)).save(small)
    else:
        write_scores(small, drawn(2, 2, 9, 12) / 3)
    refused(r"small.* 9 x 12", [(item, small)])
    if name == "psa":
        refused("'stem'", labelled[name], freeze=("stem",))
    refused(rf"refine\.{name}\.learning_rate", labelled[name], learning_rate=1e30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": 32, "radius": 5}, "crop 32 has no pair at radius 5; it must be above 32"),
        ({"crop": 130}, "multiple of 4"),
        ({"scale": (1.5, 0.5)}, r"scale \[1.5, 0.5\]"),
        ({"background_threshold": 0.9}, "foreground_threshold"),
        ({"exponent": 17}, "exponent"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IrnSettings.from_preset("default", **changes)


def test_psa_biases_have_a_higher_rate_and_no_decay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: dict[tuple[float, float], set[bool]] = {}

    def run(module: Any, optimizer: Any, *_: Any, **__: Any) -> None:
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for group in optimizer.param_groups:
            biases = {names[id(parameter)].endswith("bias") for parameter in group["params"]}
            found[round(group["lr"], 9), group["weight_decay"]] = biases

    monkeypatch.setattr(engine, "run", run)
    network = build_psa(build(BackboneSpec("test_convnext", {}), ("one",), weights="random"))
    settings = PSA.model_copy(update={"freeze": ()})
    train("psa", network, [(None, tmp_path)], settings, seed=0, folder=tmp_path)
    assert found == {(0.01, 5e-4): {False}, (0.02, 0.0): {True}, (0.1, 5e-4): {False}}
