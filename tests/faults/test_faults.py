"""A few kills of the fault test; ``make fault-test`` makes many more."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from faults.fault_test import environment

SCRIPT = Path(__file__).with_name("fault_test.py")


def kill(*arguments: str) -> str:
    """What the script printed; it runs apart, for it forks itself and this process has computed."""
    found = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_one_process_is_killed() -> None:
    output = kill("--kills", "3", "--process-kills", "0", "--seed", "6")
    assert "passed: 3 kills, and every byte equal" in output


@pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="several processes need accelerate"
)
def test_one_of_two_processes_is_killed() -> None:
    output = kill("--kills", "0", "--process-kills", "1", "--seed", "0")
    assert "passed: 1 kills, and every byte equal" in output
