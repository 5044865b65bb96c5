"""Pairs, loss and walk of IRN against the released program's."""

import pytest
import torch
from parity.golden import load

from lpcam.refine.irn import IrnSettings, irn_loss
from lpcam.refine.walk import affinities, pair_offsets, random_walk, source_window

OFFICIAL = IrnSettings.from_preset("official")


@pytest.mark.parametrize(
    ("name", "radius"), [("pairs", OFFICIAL.walk_radius), ("pairs_radius10", OFFICIAL.radius)]
)
def test_pairs(name: str, radius: int) -> None:
    golden = load(name)
    assert int(golden["radius"]) == radius
    offsets = pair_offsets(radius)
    assert [tuple(offset) for offset in golden["offsets"].tolist()] == list(offsets)
    edge = golden["edge"][0]
    height, width = edge.shape
    cells = torch.arange(height * width).reshape(height, width)
    sources = cells[source_window(height, width, radius)].flatten()
    assert torch.equal(sources, golden["source_indices"])
    shifts = torch.tensor([dy * width + dx for dy, dx in offsets])
    assert torch.equal(sources + shifts[:, None], golden["destination_indices"])
    found = dict(affinities(edge, radius))
    assert tuple(found) == offsets
    stacked = torch.stack([affinity.flatten() for affinity in found.values()])
    torch.testing.assert_close(stacked, golden["affinity"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
def test_walk(tolerance: float) -> None:
    golden = load("walk")
    found = random_walk(
        golden["cam"] * (1 - golden["edge"]),
        golden["edge"][0],
        radius=int(golden["radius"]),
        beta=float(golden["beta"]),
        exponent=int(golden["exp_times"]),
        tolerance=tolerance,
    )
    torch.testing.assert_close(found, golden["walked"], atol=2e-4, rtol=0)


def test_loss() -> None:
    golden = load("irn_loss")
    found = irn_loss(
        golden["edge_logit"][:, 0],
        golden["label"],
        int(golden["radius"]),
        golden["displacement"],
    )
    for name in ("positive", "negative", "displacement_foreground", "displacement_background"):
        torch.testing.assert_close(getattr(found, name), golden[name], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.total, golden["total"], atol=1e-5, rtol=0)
