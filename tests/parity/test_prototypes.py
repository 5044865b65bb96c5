"""Clustering, scores and selection against the released program's, tolerance 1e-5, sets exact."""

import pytest
import torch
from parity.golden import load

from lpcam.method.clustering import cosine_kmeans
from lpcam.method.functional import score, select_context, select_foreground
from lpcam.method.settings import LpcamSettings


@pytest.mark.parametrize(("suffix", "tolerance"), [("", None), ("_tight", 1e-4)])
def test_kmeans(suffix: str, tolerance: float | None) -> None:
    golden = load("kmeans_cosine")
    official = LpcamSettings.from_preset("voc12.official")
    found = cosine_kmeans(
        golden["x"],
        golden["init"].shape[0],
        init=golden["x"][golden["init"]],
        centers=official.centers,
        tolerance=official.tolerance if tolerance is None else tolerance,
        tolerance_kind=official.tolerance_kind,
        max_iterations=official.max_iterations,
    )
    assert found.converged
    assert torch.equal(found.assignments, golden[f"assignments{suffix}"])
    torch.testing.assert_close(found.centers, golden[f"centers{suffix}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", ["voc", "coco"])
def test_selection(rule: str) -> None:
    golden = load("selection")
    settings = LpcamSettings.from_preset(f"{rule}{'12' if rule == 'voc' else '14'}.official")
    for index in range(golden["weight"].shape[0]):
        foreground = score(golden["foreground"][index], golden["weight"], index)
        context = score(golden["context"][index], golden["weight"], index)
        for found, name in ((foreground, "z_foreground"), (context, "z_context")):
            torch.testing.assert_close(found, golden[name][index], atol=1e-5, rtol=0)
        kept = select_foreground(foreground, settings.mu_f)
        expected = golden[f"keep_foreground_{rule}"][index]
        if rule == "coco" or bool(expected.any()):
            assert torch.equal(kept, expected)
        else:
            # The VOC program stops with an error here; ours keeps the best, as on COCO.
            assert torch.equal(kept, golden["keep_foreground_coco"][index])
        kept = select_context(context, settings.mu_b, settings.context_lower)
        assert torch.equal(kept, golden[f"keep_context_{rule}"][index])
