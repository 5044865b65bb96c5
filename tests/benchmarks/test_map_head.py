"""The forms of the map head agree, and the table is printed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import map_head
from lpcam.method.functional import foreground_minus_context, fuse_scales, lpcam_of_pair

SHAPE = {"channels": 48, "grid": 8, "classes": 3, "clusters": 5, "device": "cpu"}


def test_forms_give_the_same_maps() -> None:
    pairs, prototypes = map_head.inputs(**SHAPE)
    heads = map_head.contenders(pairs, prototypes)
    ours = heads["lpcam"]()
    assert float(ours[0].max()) > 0
    for name, make in heads.items():
        assert map_head.largest_difference(ours, make()) < map_head.TOLERANCE, name


def test_the_loop_is_equations_5_and_6() -> None:
    """By hand, at one location."""
    pairs, prototypes = map_head.inputs(**SHAPE)
    features, mirrored = pairs[0]
    assert mirrored is not None
    found = map_head.loop_of_pair(features, mirrored, prototypes)
    vector = features[:, 2, 3] + mirrored[:, 2, features.shape[2] - 1 - 3]
    sides = [
        sum(float(vector @ p) / float(vector.norm() * p.norm()) for p in side) / len(side)
        for side in prototypes[1]
    ]
    assert float(found[1, 2, 3]) == pytest.approx(max(0.0, sides[0] - sides[1]), abs=1e-6)


def test_fused_forms_give_the_same_maps() -> None:
    pairs, prototypes = map_head.inputs(**SHAPE)
    fused = map_head.fused_contenders(pairs, prototypes, (120, 120))
    ours, loop = fused["lpcam"](), fused["loop"]()
    assert map_head.largest_difference(list(ours), list(loop)) < map_head.TOLERANCE
    vectors = torch.stack([foreground_minus_context(*pair) for pair in prototypes])
    maps = [lpcam_of_pair(p.features, p.mirrored, vectors) for p in pairs]
    assert torch.equal(fuse_scales(maps, (120, 120)).high_res, ours.high_res)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert map_head.main(["--quick", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("## Map head")
    for name in ("lpcam", "loop", "no loop, prototypes not folded"):
        assert f"| 1 | {name} |" in printed
    assert "goal |" in printed
    assert "**" not in printed  # a quick run judges nothing
