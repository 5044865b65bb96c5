"""Fusion of maps and saliency against the released program's."""

import pytest
import torch
from parity.golden import load

from lpcam.refine.saliency_fusion import SaliencySettings, saliency_labels


@pytest.mark.parametrize(("preset", "name"), [("edam", "plain"), ("edam.crf", "posterior")])
def test_labels(preset: str, name: str) -> None:
    golden = load("edam_saliency")
    settings = SaliencySettings.from_preset(preset)
    assert settings.theta == float(golden["theta"])
    found = saliency_labels(golden["maps"], golden["saliency"], settings)
    ids = torch.cat([torch.zeros(1, dtype=torch.int64), golden["keys"] + 1])
    assert torch.equal(ids[found], golden[f"labels_{name}"].long())
    assert len(found.unique()) == len(ids)
