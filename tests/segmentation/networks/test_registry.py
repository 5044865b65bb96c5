"""What every segmentation network keeps to: seeds, preprocessing and parameter groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lpcam.classifiers.classifier import PRETRAINED, RANDOM, Preprocessing
from lpcam.runtime.errors import ClassifierError
from lpcam.segmentation.networks.base import SegmenterSpec
from lpcam.segmentation.networks.registry import NETWORKS

SPECS = {
    "deeplabv2": SegmenterSpec(
        "deeplabv2", "resnet101_caffe", {"blocks": [1, 1, 1, 1], "width": 2}
    ),
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


@pytest.fixture(params=NETWORKS)
def spec(request: pytest.FixtureRequest) -> SegmenterSpec:
    if request.param == "upernet":
        pytest.importorskip("transformers")
    return SPECS[request.param]


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
