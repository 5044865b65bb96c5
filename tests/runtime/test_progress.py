"""Progress: every step yielded once, sparse lines in a log, and an honest estimate."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from lpcam.runtime import progress as module
from lpcam.runtime.progress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """No terminal, a clock of the test's own, and log lines caught."""
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO, logger="lpcam.runtime.progress"):
        yield clock


def test_a_line_now_and_then_with_the_time_left(
    clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with progress("maps", 10) as advance:
        for step in range(10):
            clock.now += 8.0
            advance(1, f"loss {step}")
    # 15 s apart at least: after 16, 32, 48, 64 and 80 s of 8 s a step
    assert caplog.messages == [
        "maps: 2 of 10, about 64 s left, loss 1",
        "maps: 4 of 10, about 48 s left, loss 3",
        "maps: 6 of 10, about 32 s left, loss 5",
        "maps: 8 of 10, about 16 s left, loss 7",
        "maps: 10 of 10, about 0 s left, loss 9",
    ]


def test_steps_of_an_earlier_run_do_not_shorten_the_estimate(
    clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with progress("maps", 100, done=90) as advance:
        clock.now += 20.0
        advance(0, "")  # nothing done yet: nothing to estimate from
        advance(2, "")
    assert caplog.messages == ["maps: 92 of 100, about 80 s left"]


def test_a_terminal_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    caplog.set_level(logging.INFO, logger="lpcam.runtime.progress")
    with progress("numbers", 3) as advance:
        for _ in range(3):
            advance(1, "")
    assert "numbers" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
    assert caplog.messages == []
