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
    native_bfloat16,
    peak_memory,
    processor_quotas,
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
    monkeypatch.setattr(resources, "processor_quotas", list)
    assert available_threads(processes) == expected
    assert available_threads() == processors


def control_groups(folder: Path, lines: str, files: dict[str, str]) -> tuple[Path, Path]:
    """The file of a process's groups, and the folder of all groups."""
    membership = folder / "cgroup"
    membership.write_text(lines, "utf-8")
    for name, text in files.items():
        path = folder / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return membership, folder / "groups"


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
    assert set(container_limits(*control_groups(tmp_path, lines, files))) == expected


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, {1.5}),
        ("0::/\n", {"cpu.max": "max 100000\n"}, set()),
        ("0::/a/b\n", {"cpu.max": "400000 100000\n", "a/b/cpu.max": "50000 100000\n"}, {4, 0.5}),
        ("0::/docker/123\n", {"cpu.max": "200000 100000\n"}, {2}),
        (
            "4:memory:/x\n3:cpu,cpuacct:/x\n",
            {"cpu/x/cpu.cfs_quota_us": "300000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
            {3},
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "1\n"}, set()),
        ("0::/\n", {}, set()),
    ],
)
def test_quotas_of_control_groups(
    tmp_path: Path, lines: str, files: dict[str, str], expected: set[float]
) -> None:
    assert set(processor_quotas(*control_groups(tmp_path, lines, files))) == expected


@pytest.mark.parametrize(
    ("quotas", "processes", "expected"),
    [([], 1, 8), ([2.0], 1, 2), ([1.5], 1, 2), ([0.5], 1, 1), ([64.0, 4.0], 2, 2), ([0.2], 3, 1)],
)
def test_a_quota_of_processor_time_bounds_the_threads(
    monkeypatch: pytest.MonkeyPatch, quotas: list[float], processes: int, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(resources, "processor_quotas", lambda: quotas)
    assert available_threads(processes) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags : fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags : fpu avx512f\n", False),
        (None, False),
    ],
)
def test_bfloat16_is_read_from_the_processors_flags(
    tmp_path: Path, text: str | None, expected: bool
) -> None:
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text, "utf-8")
    assert native_bfloat16(path) is expected


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
