"""The extractors that are compared give the same maps, and a missing peer is told."""

from __future__ import annotations

import pytest
import torch

from benchmarks import extraction, photographs
from benchmarks.measure import EXTRA
from lpcam.method.settings import LpcamSettings


def test_seeded_photographs_are_the_same_each_time() -> None:
    with photographs.photographs(None, "train", 3, 100) as found:
        first = [item.image.read_bytes() for item in found.items]
        assert not found.real
        assert "no `--data`" in found.describe()
    with photographs.photographs(None, "train", 3, 100) as found:
        assert [item.image.read_bytes() for item in found.items] == first


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("method", extraction.COMPARABLE)
def test_peer_gives_our_cam(method: str, frozen: bool) -> None:
    pytest.importorskip(extraction.PEER, reason=f"the peer is not installed: {EXTRA}")
    with photographs.photographs(None, "train", 2, 120) as found:
        model = photographs.classifier(None, found.classes, quick=True)
        settings = LpcamSettings.from_preset("frozen").model_copy(
            update={"scales": (1.0,), "flip": False}
        )
        images = torch.from_numpy(photographs.equal_size(found.items, model, (96, 128)))
        classes = [item.labels[0] for item in found.items]
        ours = extraction.our_maps(extraction.CAM(model, settings), images, classes)()
        theirs = extraction.peer_maps(method, model, images, classes, frozen=frozen)()
    assert ours.shape == theirs.shape
    assert extraction.correlation(ours, theirs) > 0.99


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert extraction.main(["--quick", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "| 1 | `CAM`, `LPCAM` |" in printed
    assert "| 1 | a run's functions, from file |" in printed
    assert "| 1 | LPCAM, this package |" in printed
    assert "| 1 | `serve, torch, fast` |" in printed
    assert ("| 1 | GradCAM |" in printed) == extraction.has_peer()
    assert (EXTRA in printed) == (not extraction.has_peer())


def test_a_missing_peer_has_a_row() -> None:
    ours = {"CAM, this package": [1.0], "LPCAM, this package": [1.0]}
    rows = extraction._peer_rows({"seconds": ours, "agreement": {}}, 1, 8, quick=False)
    assert any(EXTRA in cell for cell in rows[-1])
