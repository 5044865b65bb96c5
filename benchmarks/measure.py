"""How the benchmarks measure: the contract that all tables made with this module share.

- Contenders of one table run in one process with a stated number of threads, set both in the
  environment of that process (OpenMP, MKL, OpenBLAS) and by ``torch.set_num_threads``.
- Their repetitions are interleaved, so that drift of a busy machine hits all of them equally; each
  is called before anything is timed (warm-up).
- Figures are the median and the quartiles. A ratio is the median of the ratios of neighbouring
  repetitions, with its quartiles.
- On a GPU the device is synchronised inside the timed region.
- Memory is the peak of a process of its own for each contender.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
EXTRA = "pip install 'lpcam[benchmarks]'"
MISSING = "not measured"


# -- Time ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high, len(values))


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    *,
    repetitions: int,
    warm_up: int = 1,
    device: str = "cpu",
    at_least: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of each repetition of each contender, the contenders in turn.

    Args:
        contenders: calls without arguments; inputs are made before.
        warm_up: untimed repetitions of each.
        device: other than "cpu", it is synchronised before and inside the timed region.
        at_least: seconds that a repetition lasts: a contender that is quicker is called several
            times in it, and its mean is taken.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    gc.freeze()  # what is there already is not looked through again before every call
    for turn in range(-warm_up, repetitions):
        # Every second round goes backwards, so that no one always comes after the same neighbour.
        names = list(contenders)[:: 1 if turn % 2 else -1]
        for name in names:
            gc.collect()
            synchronise(device)
            calls, elapsed = 0, 0.0
            started = time.perf_counter()
            while not calls or elapsed < at_least:
                contenders[name]()
                synchronise(device)
                calls += 1
                elapsed = time.perf_counter() - started
            if turn >= 0:
                seconds[name].append(elapsed / calls)
    gc.unfreeze()
    return seconds


def synchronise(device: str) -> None:
    """Wait for what was given to a GPU; nothing on a CPU."""
    if device.startswith("cuda"):
        import torch  # noqa: PLC0415 - start_up measures without it

        torch.cuda.synchronize(device)


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Spread of the quotients of measurements that were taken one after the other."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


# -- Memory --------------------------------------------------------------------------------------


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    # Not ru_maxrss where it can be helped: it survives exec, so that a child of a large process
    # would report the size of its parent.
    with contextlib.suppress(OSError):
        for line in Path("/proc", "self", "status").read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # noqa: PLC0415 - Unix alone has it

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> None:
    """Make :func:`peak_memory` begin anew at what is resident now, where the system can (Linux).

    Elsewhere the peak of making the inputs stays, and what is added to it may look smaller.
    """
    with contextlib.suppress(OSError):
        Path("/proc", "self", "clear_refs").write_text("5", "utf-8")


# -- Processes -----------------------------------------------------------------------------------


class BenchmarkError(RuntimeError):
    """A contender's process failed; the message ends with what it wrote."""


def environment(threads: int) -> dict[str, str]:
    """The environment of a contender: this one's, with the number of threads and our packages."""
    own = dict(os.environ)
    own.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    path = [str(ROOT), str(ROOT / "src"), own.get("PYTHONPATH", "")]
    own["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    return own


def in_process(target: str, threads: int, *, here: bool = False, **arguments: Any) -> Any:
    """Result of a function in a fresh process with so many threads.

    Args:
        target: ``module:function``; it takes ``arguments`` and gives what JSON can hold.
        threads: of OpenMP, MKL and torch.
        here: call it in this process as it is: for a quick run, whose figures mean nothing.

    Raises:
        BenchmarkError: if the process fails.
    """
    if here:
        module, name = target.split(":")
        return getattr(importlib.import_module(module), name)(**arguments)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        order = {
            "target": target,
            "threads": threads,
            "arguments": arguments,
            "answer": str(answer),
        }
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(order)],
            env=environment(threads),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not answer.is_file():
            raise BenchmarkError(f"{target} failed with {done.returncode}:\n{done.stderr[-2000:]}")
        return json.loads(answer.read_text("utf-8"))


# -- Goals and tables ----------------------------------------------------------------------------


def verdict(value: float, *, at_least: float | None = None, at_most: float | None = None) -> str:
    """The goal and whether a ratio meets it, for a table's last column."""
    if at_least is not None:
        return f"≥ {at_least:g}: **{'met' if value >= at_least else 'missed'}**"
    if at_most is not None:
        return f"≤ {at_most:g}: **{'met' if value <= at_most else 'missed'}**"
    return ""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [" | ".join(headings), " | ".join("---" for _ in headings)]
    lines += [" | ".join(row) for row in cells]
    return "\n".join(f"| {line} |" for line in lines)


def show_seconds(spread: Spread) -> str:
    """``1.23 ms (1.20–1.30)``: median and quartiles in a fitting unit."""
    factor, unit = next(
        (f, u)
        for f, u in ((1e6, "µs"), (1e3, "ms"), (1.0, "s"))
        if spread.median * f < 1e3 or f < 2
    )
    low, middle, high = (f"{v * factor:.3g}" for v in (spread.low, spread.median, spread.high))
    if spread.count == 1:
        return f"{middle} {unit}"
    return f"{middle} {unit} ({low}–{high})"


def show_ratio(spread: Spread) -> str:
    """``2.1 (2.0–2.2)``: median and quartiles."""
    low, middle, high = (show_number(v) for v in (spread.low, spread.median, spread.high))
    return middle if spread.count == 1 else f"{middle} ({low}–{high})"


def show_number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def show_bytes(count: float) -> str:
    """In MiB."""
    return f"{count / 2**20:.0f} MiB"


# -- The machine ---------------------------------------------------------------------------------


def machine() -> str:
    """The machine in markdown, without its name or any path."""
    import torch  # noqa: PLC0415 - start_up measures without it

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [
        f"CPU: {_cpu_model()}, {cores} cores used at most, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        f"memory: {_memory():.0f} GiB",
        f"system: {platform.system()} {platform.machine()}, Python {platform.python_version()}",
        f"torch {torch.__version__.split('+')[0]}, BLAS: {_blas(torch.__config__.show())}",
        f"GPU: {torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'none'}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc", "cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory() -> float:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, OSError, ValueError):
        return float("nan")


def _blas(configuration: str) -> str:
    known = {"BLAS_INFO=mkl": "MKL", "BLAS_INFO=open": "OpenBLAS", "BLAS_INFO=accelerate": "vecLib"}
    return next((name for key, name in known.items() if key in configuration), "unknown")


# -- Arguments -----------------------------------------------------------------------------------


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark understands."""
    result = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=(description or "").split("\n\n")[0]
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    result.add_argument("--quick", action="store_true", help="small and short: for tests")
    result.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2] if cores > 1 else [1], metavar="N"
    )
    result.add_argument("--repetitions", type=int, help="timed calls of each contender")
    result.add_argument("--device", default="cpu", help="cpu or cuda")
    result.add_argument("--data", type=Path, help="folder VOC2012 with real photographs")
    result.add_argument("--weights", type=Path, help="safetensors file of the backbone's weights")
    return result
