"""The methods are compared on the same images, and the tables are printed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import localisation
from lpcam.data.dataset import Item

pytest.importorskip("scipy", reason="SciPy is not installed: pip install 'lpcam[objects]'")


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert localisation.main(["--quick", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("## Localisation")
    assert "drawn images (no figures)" in printed
    for name in ("CAM", "LPCAM", "LPCAM, scales 1, 0.5 and flip"):
        assert printed.count(f"| {name} |") == 2
    for name in localisation.PEERS:
        assert (printed.count(f"| {name} |") == 2) == localisation.has_peer()
    assert ("pip install" in printed) == (not localisation.has_peer())


@pytest.mark.skipif(not localisation.has_peer(), reason="pytorch-grad-cam is not installed")
def test_grad_cam_agrees_with_cam() -> None:
    with localisation.subject(None, None, None, 3, "cpu") as given:
        item = given.items[0]
        image = localisation.tensor(given.classifier, item)
        maps = localisation.all_maps(given, item, image)
        assert {tuple(each.shape) for each in maps.values()} == {
            (len(item.labels), *image.shape[-2:])
        }
        both = torch.stack([maps["CAM"].flatten(), maps["GradCAM"].flatten()])
        assert float(torch.corrcoef(both)[0, 1]) > 0.98
        calls = localisation.timed_calls(given, [item])
        assert list(calls) == list(maps)


def test_items_are_evenly_spread() -> None:
    items = [Item(str(n), None, ()) for n in range(10)]  # type: ignore[arg-type]
    assert [i.id for i in localisation.spread(items, 3)] == ["0", "3", "6"]
    assert localisation.spread(items, None) == localisation.spread(items, 99) == items
