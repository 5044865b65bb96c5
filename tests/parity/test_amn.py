"""Loss and maps of AMN against the released program's."""

import torch
from parity.golden import load

from lpcam.hosts.amn import amn_loss, export_maps


def test_loss() -> None:
    golden = load("amn_loss")
    found = amn_loss(golden["logits"], golden["seed"], float(golden["smoothing"]))
    torch.testing.assert_close(found, golden["loss"], atol=1e-5, rtol=0)


def test_maps() -> None:
    golden = load("amn_maps")
    keys = golden["label"].nonzero()[:, 0]
    assert torch.equal(keys, golden["keys"])
    height, width = golden["size"].tolist()
    logits = [golden[f"logits_{scale}"] for scale in range(4)]
    found = export_maps(logits, keys.tolist(), golden["seed"], (height, width))
    torch.testing.assert_close(found.cam, golden["cam"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.high_res, golden["high_res"], atol=1e-5, rtol=0)
