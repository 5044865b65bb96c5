"""First weights, parameter groups and schedules against the released programs'."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from parity.golden import load, load_json
from torch import Tensor, nn

from lpcam.hosts.mctformer import learning_rate
from lpcam.hosts.mctformer_network import MctformerSettings
from lpcam.segmentation.networks.base import SegmenterSpec
from lpcam.segmentation.networks.registry import NETWORKS
from lpcam.segmentation.settings import SegmenterSettings
from lpcam.segmentation.training import optimizer_of

VOC = tuple(f"class {n}" for n in range(20))


def check_drawn(tensors: list[Tensor], expected: dict[str, Any]) -> None:
    """Check the spread of drawn weights, within four standard errors, and their bound."""
    values = torch.cat([tensor.flatten() for tensor in tensors]).double()
    if expected["init"] in ("ones", "zeros"):
        assert torch.equal(values, torch.full_like(values, float(expected["init"] == "ones")))
        return
    tolerance = max(0.03, 4 / math.sqrt(2 * len(values)))
    assert float(values.std()) == pytest.approx(expected["std"], rel=tolerance)
    assert abs(float(values.mean())) < 4 * expected["std"] / math.sqrt(len(values))
    if expected["bound"] is not None:
        assert float(values.abs().max()) <= expected["bound"] * (1 + 1e-6)


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
        SegmenterSpec("wideresnet38", "wideresnet38", {}), golden["labels"], weights="random"
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
