"""All benchmarks together: tables joined, missing data told, failures shown."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import benchmarks.__main__ as every
from benchmarks import start_up


def test_tables_are_joined_below_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tables.md"
    done = SimpleNamespace(returncode=0, stdout="## Map head\n\n| form |\n", stderr="")
    monkeypatch.setattr(every.subprocess, "run", lambda *_, **__: done)
    given = ["--quick", "--only", "map_head", "reservoir", "--output", str(path)]
    assert every.main(given) == 0
    written = path.read_text("utf-8")
    assert written.strip() == capsys.readouterr().out.strip()
    assert written.startswith("# Benchmarks\n\n- CPU: ")
    assert written.index("## Map head") < written.index("## Goals")
    if "reservoir" in written.lower():
        assert "not measured: needs `--data FOLDER --weights FILE`" in written


def test_a_benchmark_that_fails_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nValueError: no rows")

    monkeypatch.setattr(every.subprocess, "run", broken)
    assert every.main(["--quick", "--only", "map_head"]) == 1
    assert "**failed**: ValueError: no rows" in capsys.readouterr().out


def test_goals_are_counted() -> None:
    assert "2 met, 1 missed, 1 not measured" in every._summary(
        "**met** **met** **missed** not measured", []
    )


def test_start_up_prints_every_ratio(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = dict(zip(start_up.COMMANDS, (0.1, 2.0, 4.0, 0.5, 4.0, 4.8), strict=True))
    monkeypatch.setattr(start_up, "start", seconds.__getitem__)
    assert start_up.main([]) == 0
    printed = capsys.readouterr().out
    assert "| 0.25 (0.25–0.25) | ≤ 0.5: **met** |" in printed
    assert "| 1 (1–1) | ≤ 1.1: **met** |" in printed
    assert "| 1.2 (1.2–1.2) | ≤ 1.1: **missed** |" in printed
