"""Progress: every step yielded once, sparse lines in a log, and an honest estimate."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lpcam.runtime import progress as module
from lpcam.runtime.errors import DataError
from lpcam.runtime.progress import Watch, progress, state_lines, watched


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """No terminal, a clock of the test's own, and log lines caught."""
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now, time=lambda: clock.now)
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


class Terminal(io.StringIO):
    """An output that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    caplog.set_level(logging.INFO, logger="lpcam.runtime.progress")
    with progress("numbers", 3) as advance:
        for _ in range(3):
            advance(1, "")
    assert "numbers" in terminal.getvalue()
    assert "numbers: 3 of 3" in terminal.getvalue()
    assert caplog.messages == []


def test_the_state_is_written_at_most_once_a_second_and_goes_with_success(
    clock: Any, tmp_path: Path
) -> None:
    path = tmp_path / "progress.json"
    seen = []
    with watched(Watch(path, ["cam", "seeds"], {})), progress("maps", 10) as advance:
        for _ in range(10):
            clock.now += 0.3
            advance(1, "loss 1")
            seen.append(json.loads(path.read_text())["stages"][0].get("done"))
    assert seen == [None, None, None, 4, 4, 4, 4, 8, 8, 8]  # after 0, 1.2 and 2.4 s
    assert not path.exists()


def test_a_failure_stays_to_be_read(clock: Any, tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    with pytest.raises(DataError), watched(Watch(path, ["cam"], {}, "lpcam run r.yaml")):
        raise DataError("no image")
    found = json.loads(path.read_text())
    assert (found["error"], found["command"]) == ("no image", "lpcam run r.yaml")


def test_a_file_that_cannot_be_written_stops_nothing(clock: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with watched(Watch(tmp_path / "file" / "progress.json", ["cam"], {})):
        clock.now += 5
        with progress("maps", 2) as advance:
            advance(1, "")


def test_lines_of_stages_and_the_time_left() -> None:
    stages = [
        {"name": "data", "usual": None, "seconds": 3.2},
        {"name": "classify", "usual": 9.0, "seconds": None},
        {"name": "cam", "usual": 60.0, "since": 90.0},
        {"name": "seeds", "usual": 120.0},
    ]
    lines = state_lines({"written": 100.0, "stages": stages})
    assert [line.split(maxsplit=1)[1] for line in lines[:4]] == [
        "done in 3 s",
        "up to date",
        "running for 10 s",
        "waiting; took 2 min in an earlier run",
    ]
    assert lines[4] == "time left: about 3 min"  # 50 s of 60 and 120
    # what a rate tells is better than an earlier run
    stages[2] |= {"label": "maps", "done": 5, "total": 20, "left": 600.0, "remark": "loss 1"}
    lines = state_lines({"written": 100.0, "stages": stages})
    assert "maps: 5 of 20, about 10 min left, loss 1" in lines[2]
    assert lines[4] == "time left: about 12 min"
    stages[3]["usual"] = None
    assert "unknown" in state_lines({"written": 100.0, "stages": stages})[4]


def test_log_lines_go_above_the_live_view(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    with watched(Watch(None, ["cam", "seeds"], {})):
        assert handler.stream is sys.stderr is not terminal
        logging.getLogger("lpcam").warning("a line")
    assert handler.stream is sys.stderr is terminal
    assert "a line" in terminal.getvalue()
    assert "seeds" in terminal.getvalue()
