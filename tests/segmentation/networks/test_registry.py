"""Contract of every segmentation network: seeds, preprocessing, groups, training, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from lpcam.classifiers.classifier import PRETRAINED, RANDOM, Preprocessing
from lpcam.runtime.errors import ClassifierError
from lpcam.segmentation.networks.base import SegmenterSpec
from lpcam.segmentation.networks.registry import NETWORKS

SPECS = {
    "deeplabv2": SegmenterSpec(
        "deeplabv2", "resnet101_caffe", {"blocks": [1, 1, 1, 1], "width": 2}
    ),
    "timm": SegmenterSpec("deeplabv2", "test_resnet", {"zero_init_last": False}, 16),
    "wideresnet38": SegmenterSpec(
        "wideresnet38",
        "wideresnet38",
        {"channels": [4, 4, 4, 4, 4, 8, 8], "depths": [1, 1, 1, 1], "hidden": 4},
    ),
    "upernet": SegmenterSpec(
        "upernet",
        "tiny",
        {
            "embed_dim": 4,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 1, 1],
            "channels": 4,
            "auxiliary_channels": 4,
        },
    ),
}


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> SegmenterSpec:
    if request.param == "upernet":
        pytest.importorskip("transformers")
    return SPECS[request.param]


def test_every_network_keeps_the_contract() -> None:
    assert {spec.network for spec in SPECS.values()} == set(NETWORKS)


def build(spec: SegmenterSpec, **options: Any) -> tuple[Any, Preprocessing]:
    return NETWORKS[spec.network].build(spec, 3, **{"weights": RANDOM, **options})


def test_random_weights_follow_the_seed_and_leave_the_global_state(spec: SegmenterSpec) -> None:
    state = torch.random.get_rng_state()
    one, same, other = (build(spec, seed=seed)[0].state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = [n for n in one if one[n].ndim == 4]
    assert not any(torch.equal(one[name], other[name]) for name in drawn)


def test_mean_and_std_of_the_caller(spec: SegmenterSpec) -> None:
    default = build(spec)[1]
    assert build(spec, mean=[0, 0, 0])[1] == Preprocessing((0, 0, 0), default.std)
    assert build(spec, std=[1, 1, 1])[1] == Preprocessing(default.mean, (1, 1, 1))


def test_outputs_and_parameter_groups(spec: SegmenterSpec) -> None:
    network = build(spec)[0]
    assert not network.training
    images = torch.rand(2, 3, 33, 47, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = network(images)
        assert logits.shape[:2] == (2, 3)
        assert torch.equal(network.outputs(images)[0][0], logits)
        for row, image in enumerate(images):
            torch.testing.assert_close(network(image[None])[0], logits[row], atol=1e-5, rtol=1e-4)
    groups = network.parameter_groups()
    assert groups.keys() <= {"backbone", "head", "head_bias", "no_decay"}
    trained = [id(p) for group in groups.values() for p in group]
    assert len(trained) == len(set(trained))
    assert set(trained) == {id(p) for p in network.parameters() if p.requires_grad}


def test_frozen_batch_norms_stay_in_evaluation_mode(spec: SegmenterSpec) -> None:
    network = build(spec)[0].train()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert norm.training == norm.weight.requires_grad


def test_pretrained_weights_that_do_not_exist_are_refused_early() -> None:
    for name in ("deeplabv2", "wideresnet38"):
        with pytest.raises(ClassifierError, match="no pretrained"):
            NETWORKS[name].check(SPECS[name], PRETRAINED)
        with pytest.raises(ClassifierError, match="no pretrained"):
            build(SPECS[name], weights=PRETRAINED)


def test_steps_lower_the_loss_and_change_what_is_trained(spec: SegmenterSpec) -> None:
    torch.manual_seed(0)  # of dropout
    network, preprocessing = build(spec)
    labels = torch.zeros(4, 48, 48, dtype=torch.int64)
    labels[:2, :, :24] = labels[2:, 24:] = 1
    noise = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0)) / 4
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    images = (noise + 0.6 * labels[:, None] - mean) / std
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    groups = [p for group in network.parameter_groups().values() for p in group]
    optimiser = torch.optim.Adam(groups, lr=1e-2)
    losses = []
    network.train()
    for _ in range(20):
        parts = [
            weight * cross_entropy(interpolate(logits, (48, 48), mode="bilinear"), labels)
            for logits, weight in network.outputs(images)
        ]
        optimiser.zero_grad()
        loss = torch.stack(parts).sum()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in frozen), name


def file_of(network: Any) -> dict[str, Tensor]:
    """The backbone's tensors under the names that weights files have."""
    names = dict(network.backbone.named_modules())
    backbone = names.get("swin") or names.get("classifier.backbone") or network.backbone
    return {k: v.contiguous() for k, v in backbone.state_dict().items()}


def test_files_that_do_not_fit_are_refused(spec: SegmenterSpec, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = file_of(build(spec)[0])
    save_file(state, path)
    loaded = file_of(build(spec, weights=path, seed=1)[0])
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in state.items())
    key = [name for name, tensor in state.items() if tensor.ndim > 1][-1]
    for change, message in (
        ({key: None}, key),
        ({key: torch.zeros(3)}, key),
        ({"gate": torch.zeros(3)}, "gate"),
        ({key: torch.full_like(state[key], torch.nan)}, f"NaN or Inf in '{key}'"),
    ):
        changed: dict[str, Any] = {**state, **change}
        save_file({k: v for k, v in changed.items() if v is not None}, path)
        with pytest.raises(ClassifierError, match=message):
            build(spec, weights=path)
    path.write_bytes(b"torn")
    (tmp_path / "w.pth").write_bytes(b"pickle")
    for name in ("w.safetensors", "none.safetensors", "w.pth"):
        with pytest.raises(ClassifierError, match=name):
            build(spec, weights=tmp_path / name)
