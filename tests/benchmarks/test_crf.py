"""The benchmark of the CRF runs with and without its peer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import crf


def test_table_without_the_peer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(crf, "peer", lambda: None)
    assert crf.main(["--quick", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("## Crf")
    assert "| 1 | 3 | lpcam |" in printed
    assert "pydensecrf not measured: it is not installed." in printed


def test_a_peer_is_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def by_peer(image: Tensor, unary: Tensor) -> Tensor:
        return crf.DenseCrf(crf.SETTINGS)(image, unary) + 0.01

    monkeypatch.setattr(crf, "peer", object)
    monkeypatch.setattr(crf, "by_peer", by_peer)
    assert crf.main(["--quick", "--threads", "1"]) == 1
    printed = capsys.readouterr().out
    assert "| 1 | 3 | pydensecrf |" in printed
    assert "the same label on 100.0000% of pixels" in printed
    assert "**missed**" in printed


def test_contenders_share_their_input() -> None:
    image, labels = crf.problem(None, 3, True)
    assert image.shape == (*labels.shape, 3)
    assert sorted(labels.unique().tolist()) == [0, 1, 2]
    calls: dict[str, Callable[[], Any]] = crf.contenders(image, labels, 3)
    kept, fresh = calls["lpcam"](), calls["lpcam, first image of a size"]()
    assert torch.equal(kept, fresh)
