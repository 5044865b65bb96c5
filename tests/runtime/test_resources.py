"""Processors and memory: what a container or batch system leaves of the machine."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from pathlib import Path
from unittest.mock import Mock, call

import pytest

from lpcam.runtime import resources
from lpcam.runtime.resources import (
    available_memory,
    available_threads,
    container_limits,
    peak_memory,
    reset_peak_memory,
    reuse_freed_memory,
)


@pytest.mark.parametrize(
    ("processors", "processes", "expected"),
    [(8, 1, 8), (8, 2, 4), (8, 3, 2), (2, 4, 1), (1, 1, 1)],
)
def test_processes_share_the_processors(
    monkeypatch: pytest.MonkeyPatch, processors: int, processes: int, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
    assert available_threads(processes) == expected
    assert available_threads() == processors


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/\n", {"memory.max": "4096\n"}, {4096}),
        ("0::/\n", {"memory.max": "max\n"}, set()),
        # a group above may be the narrower one
        ("0::/a/b\n", {"a/memory.max": "50\n", "a/b/memory.max": "70\n"}, {50, 70}),
        # inside a container, the path is that of the host and only the root is seen
        ("0::/docker/123\n", {"memory.max": "80\n"}, {80}),
        (
            "5:cpu,cpuacct:/x\n4:memory:/x\n0::/\n",
            {"memory/x/memory.limit_in_bytes": "90\n", "cpu/x/memory.limit_in_bytes": "1\n"},
            {90},
        ),
        ("0::/\n", {}, set()),
    ],
)
def test_limits_of_control_groups(
    tmp_path: Path, lines: str, files: dict[str, str], expected: set[int]
) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text(lines, "utf-8")
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    assert set(container_limits(membership, tmp_path / "groups")) == expected


def test_memory_is_the_machines_or_the_narrowest_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limits, expected in (
        ([], machine),
        ([4000, 8000], 4000),
        ([2**63 - 4096], machine),  # version 1 without a limit
    ):
        monkeypatch.setattr(resources, "container_limits", lambda found=limits: found)
        assert available_memory() == expected


def test_reuse_of_freed_memory_asks_for_all_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reuse_freed_memory() is (platform.libc_ver()[0] == "glibc")
    library = Mock()
    library.mallopt.side_effect = [1, 1, 1, 1, 0, 1]
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    assert reuse_freed_memory() is True
    # M_MMAP_MAX, M_TRIM_THRESHOLD and M_ARENA_MAX of the GNU library's malloc.h
    assert library.mallopt.mock_calls == [call(-4, 0), call(-1, 2**31 - 1), call(-8, 1)]
    assert reuse_freed_memory() is False


@pytest.mark.skipif(
    not os.access(Path("/proc", "self", "clear_refs"), os.W_OK), reason="it cannot be reset here"
)
def test_peak_memory_counts_from_its_reset() -> None:
    size = 64 * 2**20
    reset_peak_memory()
    before = peak_memory() or 0
    with mmap.mmap(-1, size) as block:  # of the system: freed memory may be used again
        block[:: mmap.PAGESIZE] = b"1" * (size // mmap.PAGESIZE)
        held = peak_memory() or 0
    reset_peak_memory()
    assert held - before > size * 0.9
    assert held - (peak_memory() or 0) > size * 0.8
