"""CAM and LPCAM maps against the released program's, tolerance 1e-5."""

import pytest
import torch
from parity.golden import load

from lpcam.classifiers.features import FeaturePair
from lpcam.method.functional import FusedMaps, foreground_minus_context
from lpcam.method.multi_scale import cam_maps, lpcam_maps
from lpcam.method.settings import LpcamSettings

TOLERANCE = 1e-5
OFFICIAL = LpcamSettings.from_preset("voc12.official")


def pairs_of(golden: dict[str, torch.Tensor]) -> list[FeaturePair]:
    count = len(OFFICIAL.scales)
    return [FeaturePair(*golden[f"feature_{number}"]) for number in range(count)]


def assert_equal(found: FusedMaps, golden: dict[str, torch.Tensor]) -> None:
    for name in ("cam", "high_res"):
        torch.testing.assert_close(getattr(found, name), golden[name], atol=TOLERANCE, rtol=0)


def test_cam() -> None:
    golden = load("cam")
    keys = golden["label"].nonzero().flatten()
    assert torch.equal(keys, golden["keys"])
    height, width = golden["size"].tolist()
    found = cam_maps(
        pairs_of(golden),
        golden["weight"][keys],
        (height, width),
        epsilon=OFFICIAL.cam_epsilon,
    )
    assert_equal(found, golden)


@pytest.mark.parametrize("name", ["lpcam", "lpcam_without_context"])
def test_lpcam(name: str) -> None:
    golden = load(name)
    vectors = torch.stack(
        [
            foreground_minus_context(golden[f"foreground_{n}"], golden[f"context_{n}"])
            for n in golden["keys"].tolist()
        ]
    )
    height, width = golden["size"].tolist()
    assert_equal(lpcam_maps(pairs_of(golden), vectors, (height, width)), golden)
