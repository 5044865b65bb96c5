"""The benchmark of engines runs on seeded images."""

from __future__ import annotations

import pytest

from benchmarks import engines


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert engines.main(["--quick", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {line.split(" | ")[0].strip("| ") for line in lines if line.startswith("| ")}
    assert {f"{engine}, {precision}" for engine, precision in engines.CONTENDERS} <= names
