"""Start-up: what ``lpcam --help`` and ``import lpcam`` cost beside torch and timm.

Every call is a fresh interpreter, the contenders in turn, with the files in the system's cache. An
empty interpreter is in the table too, and is not taken off the others.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.measure import (
    Spread,
    environment,
    parser,
    ratios,
    show_ratio,
    show_seconds,
    table,
    verdict,
)

HELP_GOAL = 0.5
IMPORT_GOAL = 1.10
TORCH = "import torch"
TORCH_TIMM = "import torch; import timm"
EVERYTHING = "from lpcam import CAM, LPCAM, Classifier, Prototypes, functional"
COMMANDS: dict[str, list[str]] = {
    "an empty interpreter": ["-c", ""],
    TORCH: ["-c", TORCH],
    TORCH_TIMM: ["-c", TORCH_TIMM],
    "lpcam --help": ["-m", "lpcam", "--help"],
    "import lpcam": ["-c", "import lpcam"],
    EVERYTHING: ["-c", EVERYTHING],
}
COMPARED = (
    ("lpcam --help", TORCH, HELP_GOAL),
    ("import lpcam", TORCH_TIMM, IMPORT_GOAL),
    (EVERYTHING, TORCH_TIMM, IMPORT_GOAL),
)


def start(name: str) -> float:
    """Seconds that a command takes in a fresh interpreter.

    Raises:
        subprocess.CalledProcessError: if the command fails.
    """
    command = [sys.executable, *COMMANDS[name]]
    started = time.perf_counter()
    subprocess.run(command, env=environment(1), capture_output=True, check=True)
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    options = parser("start_up", __doc__).parse_args(argv)
    repetitions = options.repetitions or (1 if options.quick else 9)
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(0 if options.quick else -2, repetitions):  # the first fill the cache
        for name in COMMANDS:
            elapsed = start(name)
            if turn >= 0:
                seconds[name].append(elapsed)
    print("## Start-up\n")
    print(f"One thread, {repetitions} fresh interpreters each, files in the system's cache.\n")
    print(table(["command", "time"], [[f"`{n or ' '}`", _show(s)] for n, s in seconds.items()]))
    rows = []
    for above, below, goal in COMPARED:
        ratio = ratios(seconds[above], seconds[below])
        word = "" if options.quick else verdict(ratio.median, at_most=goal)
        rows.append([f"`{above}` ÷ `{below}`", show_ratio(ratio), word])
    print()
    print(table(["ratio", "", "goal"], rows))
    return 0


def _show(seconds: Sequence[float]) -> str:
    return show_seconds(Spread.of(seconds))


if __name__ == "__main__":
    sys.exit(main())
