"""Processors and memory that a process may use."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from lpcam.runtime.errors import RecipeError

_MALLOPT_TRIM_THRESHOLD, _MALLOPT_MMAP_MAX, _MALLOPT_ARENA_MAX = -1, -4, -8
IMAGE_SHARE = 0.75  #: Share of the available memory for what images need while they are processed.


def choose_device(wanted: str) -> torch.device:
    """Device of that name, refused if it cannot be used; "auto" takes a GPU if there is one."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"the device {wanted!r} cannot be used here ({error}); use 'auto' or 'cpu'"
        ) from None
    return device


def available_threads(processes_here: int = 1) -> int:
    """Number of processors for this process: its share if a run has several on this machine.

    They are those that it may run on, or fewer where a container has a quota of processor time.
    """
    quotas = [math.ceil(quota) for quota in processor_quotas()]
    return max(1, min([len(os.sched_getaffinity(0)), *quotas]) // processes_here)


def native_bfloat16(information: Path = Path("/proc", "cpuinfo")) -> bool:
    """Whether the processor computes in bfloat16; False where the system does not say."""
    try:
        flags = set(information.read_text("utf-8").split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"})


def threads_beside(device: torch.device, threads: int) -> int:
    """Threads that read and write beside a device: on a GPU a few are enough."""
    return threads if device.type == "cpu" else min(threads, 4)


def available_memory() -> int:
    """Memory that this process may use, in bytes: the machine's, or a container's lower limit."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *container_limits()])


def memory_of_an_image(device: torch.device, workers: int) -> int | None:
    """Memory that one of ``workers`` images at a time may use, in bytes; None on a GPU."""
    return int(available_memory() * IMAGE_SHARE / workers) if device.type == "cpu" else None


MEMBERSHIP, GROUPS = Path("/proc", "self", "cgroup"), Path("/sys", "fs", "cgroup")


def container_limits(membership: Path = MEMBERSHIP, root: Path = GROUPS) -> list[int]:
    """Memory limits in bytes of the process's Linux control groups, version 2 or 1."""
    files = {2: ("memory.max",), 1: ("memory.limit_in_bytes",)}
    found = _control_groups("memory", files, membership, root)
    return [int(limit) for (limit,) in found if limit != "max"]


def processor_quotas(membership: Path = MEMBERSHIP, root: Path = GROUPS) -> list[float]:
    """Processors that the process's Linux control groups allow, version 2 or 1; maybe fractions."""
    files = {2: ("cpu.max",), 1: ("cpu.cfs_quota_us", "cpu.cfs_period_us")}
    found = _control_groups("cpu", files, membership, root)
    return [int(quota) / int(period) for quota, period in found if quota not in ("max", "-1")]


def _control_groups(
    controller: str, files: Mapping[int, Sequence[str]], membership: Path, root: Path
) -> Iterator[list[str]]:
    """Words in the files, by version, of every control group that limits the process."""
    try:
        lines = membership.read_text("utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        version = 1 if controllers else 2
        if version == 1 and controller not in controllers.split(","):
            continue
        top = root / controller if version == 1 else root
        # A limit of any group above holds too. Inside a container the path may be that of the
        # host, which is not there, and the container's own group is the root.
        inner = top / group.lstrip("/")
        for folder in (inner, *inner.parents):
            with contextlib.suppress(OSError):  # no such file
                yield " ".join((folder / n).read_text("utf-8") for n in files[version]).split()
            if folder == top:
                break


def reuse_freed_memory() -> bool:
    """Let GNU's C library keep freed memory; backbones run a third faster. False elsewhere."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # One arena for all threads: those beside the first cannot hold large blocks.
    wanted = {
        _MALLOPT_MMAP_MAX: 0,
        _MALLOPT_TRIM_THRESHOLD: 2**31 - 1,  # the largest value it takes
        _MALLOPT_ARENA_MAX: 1,
    }
    taken = [mallopt(option, value) for option, value in wanted.items()]
    return all(taken)


def reset_peak_memory() -> None:
    """Let :func:`peak_memory` count from now on, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc", "self", "clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Peak memory of this process in bytes; None if the system does not report it."""
    try:
        text = Path("/proc", "self", "status").read_text("utf-8")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
