"""What a process may use of its machine: processors and memory, set and not inherited."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from pathlib import Path

import torch

from lpcam.runtime.errors import RecipeError

_MALLOPT_TRIM_THRESHOLD = -1


_MALLOPT_MMAP_MAX = -4


_MALLOPT_ARENA_MAX = -8


KEPT_WHEN_FREED = 2**31 - 1
"""Bytes at the end of the heap that the allocator may keep, the most that it can be told."""


def choose_device(wanted: str) -> torch.device:
    """The device of a name; of "auto" a GPU where there is one.

    Raises:
        RecipeError: if it cannot be used here.
    """
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
    """Processors that this process may use, shared fairly with others on this machine.

    Args:
        processes_here: processes of the same run on this machine.
    """
    return max(1, len(os.sched_getaffinity(0)) // processes_here)


def threads_beside(device: torch.device, threads: int) -> int:
    """Threads that read and write beside a device: on a GPU a few are enough.

    Example:
        >>> threads_beside(torch.device("cpu"), 16), threads_beside(torch.device("cuda"), 16)
        (16, 4)
    """
    return threads if device.type == "cpu" else min(threads, 4)


def available_memory() -> int:
    """Memory that this process may use, in bytes.

    That is the machine's, or less where a container or a batch system has set a limit.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *container_limits()])


IMAGE_SHARE = 0.75
"""Of the memory that may be used, for what images need while they are worked on."""


def memory_of_an_image(device: torch.device, workers: int) -> int | None:
    """Bytes that one image may need while ``workers`` are worked on at a time.

    None on a GPU, where what is free when it comes to it decides.
    """
    return int(available_memory() * IMAGE_SHARE / workers) if device.type == "cpu" else None


def container_limits(
    membership: Path = Path("/proc", "self", "cgroup"), root: Path = Path("/sys", "fs", "cgroup")
) -> list[int]:
    """Memory limits, in bytes, of the Linux control groups that this process is in; may be empty.

    Args:
        membership: names the groups, a line ``number:controllers:path`` each.
        root: of the groups' files: ``memory.max`` (version 2), or
            ``memory/.../memory.limit_in_bytes`` (version 1).
    """
    try:
        lines = membership.read_text("utf-8").splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        # A limit of any group above holds too. Inside a container the path may be that of the
        # host, which is not there, and the container's own group is the root.
        inner = top / group.lstrip("/")
        for folder in (inner, *inner.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                limits.append(int((folder / name).read_text("utf-8")))
            if folder == top:
                break
    return limits


def reuse_freed_memory() -> bool:
    """Let the C library keep the memory of freed tensors for the next ones.

    As it comes, the GNU library hands every block above 32 MB back to the system, which must clear
    its pages when the next image asks for them: a third of the time of a backbone on a CPU. For the
    whole process.

    Returns:
        whether the C library took the settings; others than GNU's have none.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # One arena for all threads: those beside the first cannot hold large blocks.
    wanted = (
        (_MALLOPT_MMAP_MAX, 0),
        (_MALLOPT_TRIM_THRESHOLD, KEPT_WHEN_FREED),
        (_MALLOPT_ARENA_MAX, 1),
    )
    taken = [mallopt(option, value) for option, value in wanted]
    return all(taken)


def reset_peak_memory() -> bool:
    """Let :func:`peak_memory` count from now on; whether the system can do so (Linux can)."""
    try:
        Path("/proc", "self", "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int | None:
    """Most memory that this process has held since :func:`reset_peak_memory`, in bytes.

    None where the system does not tell.
    """
    try:
        text = Path("/proc", "self", "status").read_text("utf-8")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
