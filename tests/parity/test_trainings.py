"""First weights, parameter groups and schedules against the released programs'."""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.golden import load, load_json
from torch import Tensor, nn

from lpcam.classifiers.classifier import BackboneSpec, build
from lpcam.classifiers.finetuning import FinetuneSettings, finetune
from lpcam.data.dataset import Item
from lpcam.hosts.base import HOSTS
from lpcam.hosts.edam import Edam, EdamSettings, groups_of
from lpcam.hosts.mctformer import learning_rate
from lpcam.hosts.mctformer_network import MctformerSettings
from lpcam.segmentation.networks.base import SegmenterSpec
from lpcam.segmentation.networks.registry import NETWORKS
from lpcam.segmentation.settings import SegmenterSettings
from lpcam.segmentation.training import optimizer_of
from lpcam.training import loop as engine
from lpcam.training.optim import freeze

VOC = tuple(f"class {n}" for n in range(20))


NARROW = {"channels": (4, 6, 8, 10, 12, 16, 4096)}
"""The layers of a WideResNet-38, whose first weights would take seconds to draw."""


@cache
def edam() -> Edam:
    settings = EdamSettings.from_preset("official")
    return HOSTS["edam"].build(
        BackboneSpec("wideresnet38", NARROW), VOC, settings, weights="random", seed=0
    )


def check_drawn(tensors: list[Tensor], expected: dict[str, Any]) -> None:
    """Check the spread of drawn weights, within four standard errors, and their bound."""
    values = torch.cat([tensor.detach().flatten() for tensor in tensors]).double()
    if expected["init"] in ("ones", "zeros"):
        assert torch.equal(values, torch.full_like(values, float(expected["init"] == "ones")))
        return
    tolerance = max(0.03, 4 / math.sqrt(2 * len(values)))
    assert float(values.std()) == pytest.approx(expected["std"], rel=tolerance)
    assert abs(float(values.mean())) < 4 * expected["std"] / math.sqrt(len(values))
    if expected["bound"] is not None:
        assert float(values.abs().max()) <= expected["bound"] * (1 + 1e-6)


def test_psa_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    golden = load_json("psa_classifier")
    settings = FinetuneSettings.from_preset("psa")
    named = {
        "epochs": "epochs",
        "batch_size": "batch_size",
        "learning_rate": "learning_rate",
        "weight_decay": "weight_decay",
        "crop": "crop",
        "long_side": "long_side",
        "jitter": "jitter",
        "power": "power",
        "dropout7": "dropout",
    }
    for theirs, ours in named.items():
        found = getattr(settings, ours)
        assert (list(found) if isinstance(found, tuple) else found) == golden[theirs], ours
    assert settings.momentum == golden["sgd"]["momentum"]
    assert settings.head_multiplier == golden["head"]["lr_multiple"]
    network = build(BackboneSpec("wideresnet38", NARROW), VOC, weights="random")

    def trained(*_: Any, **__: Any) -> list[Any]:
        return []

    monkeypatch.setattr(engine, "run", trained)
    items = [Item("one", Path("one.png"), (0,))]
    finetune(network, items, [], settings, seed=0, folder=Path())
    assert network.dropout == golden["dropout7"]
    found = {n.removeprefix("backbone.") for n, p in network.named_parameters() if p.requires_grad}
    expected = {n for n, value in golden["parameters"].items() if value["trained"]}
    assert found == {name.replace("fc8.", "head.") for name in expected}
    check_drawn([network.head.weight], {**golden["head"], "bound": None})


EDAM_NAMES = [
    ("activation.weight", "mask_layer.weight"),
    ("reduction.weight", "d_d.weight"),
    ("segments.weight", "embedding.segment.weight"),
    *(
        (rf"encoders.\d+.{ours}.{part}", f"trans_list.*.0.{theirs}.{part}")
        for ours, theirs in {
            "query": "attention.linear_layers.0",
            "key": "attention.linear_layers.1",
            "value": "attention.linear_layers.2",
            "joined": "attention.output_linear",
            "inner": "feed_forward.w_1",
            "outer": "feed_forward.w_2",
        }.items()
        for part in ("weight", "bias")
    ),
    (r"encoders.\d+.norms.0.weight", "trans_list.*.0.input_sublayer.norm.a_2"),
    (r"encoders.\d+.norms.0.bias", "trans_list.*.0.input_sublayer.norm.b_2"),
    (r"encoders.\d+.norms.1.weight", "trans_list.*.0.output_sublayer.norm.a_2"),
    (r"encoders.\d+.norms.1.bias", "trans_list.*.0.output_sublayer.norm.b_2"),
    ("logits.weight", "fc_list.*.weight"),
]


@pytest.mark.parametrize(("ours", "theirs"), EDAM_NAMES, ids=[ours for ours, _ in EDAM_NAMES])
def test_edam_first_weights(ours: str, theirs: str) -> None:
    expected = load_json("edam_init")["tensors"][theirs]
    check_drawn(
        [t for name, t in edam().state_dict().items() if re.fullmatch(ours, name)], expected
    )


def test_edam_groups() -> None:
    golden = load_json("edam_groups")
    settings, network = EdamSettings.from_preset("official"), edam()
    freeze(network.classifier.backbone, settings.freeze, norms=True)
    found: dict[tuple[float, float], int] = {}
    for group in groups_of(network, settings):
        key = (round(group["lr"] / golden["base_lr"], 9), settings.weight_decay)
        found[key] = found.get(key, 0) + len(group["params"])
    # the twenty logits are one tensor here
    assert found == {(1.0, 5e-4): 356, (10.0, 5e-4): 3}
    trained = [v for v in golden["parameters"].values() if v["trained"]]
    assert len(trained) == 356 + 22
    assert {(v["lr_multiple"], v["weight_decay"]) for v in trained} == {(1, 5e-4), (10, 5e-4)}


def test_mctformer_schedule() -> None:
    golden = load("mctformer_schedule")
    settings = MctformerSettings.from_preset("official")
    found = [learning_rate(epoch, settings) for epoch in range(settings.epochs)]
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64), golden["rate"], atol=0, rtol=1e-12
    )


def test_wideresnet38_first_weights() -> None:
    golden = load_json("wr38_init")
    network, _ = NETWORKS["wideresnet38"].build(
        SegmenterSpec("wideresnet38", "wideresnet38", NARROW), golden["labels"], weights="random"
    )
    for number in (1, 2):
        for part in ("weight", "bias"):
            found = network.get_parameter(f"fc{number}.{part}")
            check_drawn([found], golden["tensors"][f"fc8_seg_conv{number}.{part}"])


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_upernet_groups(size: str) -> None:
    pytest.importorskip("transformers")
    golden = load_json("upernet_groups")[size]
    network, _ = NETWORKS["upernet"].build(SegmenterSpec("upernet", size, {}), 21, weights="random")
    settings = SegmenterSettings.from_preset("upernet.voc12.paper")
    groups = optimizer_of(network.parameter_groups(), settings).param_groups
    kinds: dict[str, dict[str, int]] = {}
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, module in network.named_modules():
        if name.endswith((".k_proj", ".v_proj")):  # with the query one layer in the release
            continue
        for own, parameter in module.named_parameters(recurse=False):
            part, kind = name.partition(".")[0], type(module)
            words = [part, *(["Conv2d"] if issubclass(kind, nn.Conv2d) else [kind.__name__]), own]
            if own == "relative_position_bias_table":
                words = [part, own]
            count = kinds.setdefault("/".join(words), {})
            value = str(decay[id(parameter)])
            count[value] = count.get(value, 0) + 1
    assert kinds == golden["by kind (count at each decay)"]
    assert {group["lr"] for group in groups} == {golden["lr"]}
