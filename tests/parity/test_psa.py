"""PSA's pairs, walk and first weights against the released program's."""

import math

import pytest
import torch
import torch.nn.functional as F
from parity.golden import load, load_json

from lpcam.classifiers.classifier import BackboneSpec, build
from lpcam.refine.psa import PsaSettings, build_psa, feature_distances, pooled, walk_affinities
from lpcam.refine.walk import affinity_walk

OFFICIAL = PsaSettings.from_preset("official")


@pytest.mark.parametrize("grid", [0, 1])
def test_walk(grid: int) -> None:
    golden = load("psa_walk")
    assert (OFFICIAL.beta, OFFICIAL.exponent) == (float(golden["beta"]), int(golden["logt"]))
    assert pytest.approx(float(golden["background"])) == OFFICIAL.threshold
    features, size = golden[f"features_{grid}"][None], golden[f"size_{grid}"].tolist()
    found = dict(feature_distances(features, OFFICIAL.radius))
    offsets = [tuple(offset) for offset in golden["offsets"].tolist()]
    assert set(found) == set(offsets)
    stacked = torch.stack([(-found[offset]).exp().flatten() for offset in offsets])
    torch.testing.assert_close(stacked, golden[f"affinity_{grid}"], atol=1e-6, rtol=0)

    background = torch.full((1, *size), OFFICIAL.threshold)
    maps = pooled(torch.cat([background, golden[f"cam_{grid}"]]))
    torch.testing.assert_close(maps, golden[f"maps_{grid}"], atol=1e-6, rtol=0)
    for kind, exponent in (("", OFFICIAL.exponent), ("psa_", int(golden["logt_psa"]))):
        sources = golden[f"maps_{kind}{grid}"]
        pairs = walk_affinities(features, OFFICIAL.radius)
        walked = affinity_walk(sources[None], pairs, beta=OFFICIAL.beta, exponent=exponent)
        expected = golden[f"walked_{kind}{grid}"]
        torch.testing.assert_close(walked[0], expected, atol=2e-4, rtol=0)
        isolated = golden[f"isolated_{grid}"]
        still = walked[0].flatten(1)[:, isolated]
        torch.testing.assert_close(still, sources.flatten(1)[:, isolated], atol=1e-5, rtol=0)
        full = F.interpolate(walked, scale_factor=8, mode="bilinear", align_corners=False)[0]
        labels = full[:, : size[0], : size[1]].argmax(0)
        assert float((labels != golden[f"labels_{kind}{grid}"]).float().mean()) < 0.002


def test_first_weights() -> None:
    tensors = load_json("psa_init")["tensors"]
    network = build_psa(build(BackboneSpec("test_resnet", {}), ("one",), weights="random"))
    for layer, name in zip(network.reductions, ("f8_3", "f8_4", "f8_5"), strict=True):
        assert isinstance(layer, torch.nn.Conv2d)
        inputs = layer.weight.shape[1]
        std = tensors[f"{name}.weight"]["gain"] / math.sqrt(inputs)
        within = max(0.03, 4 / math.sqrt(2 * layer.weight.numel()))
        assert float(layer.weight.detach().std()) == pytest.approx(std, rel=within)
    last = tensors["f9.weight"]
    assert list(network.last.weight.shape) == last["shape"]
    assert float(network.last.weight.detach().std()) == pytest.approx(last["std"], rel=0.03)
    assert float(network.last.weight.detach().abs().max()) == pytest.approx(last["bound"], rel=1e-3)
