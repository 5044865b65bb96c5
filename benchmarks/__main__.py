"""Run the benchmarks: ``python -m benchmarks [--quick] [--only NAME ...] [--output FILE]``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import MISSING, BenchmarkError, environment, machine, table
from benchmarks.photographs import RECIPE
from lpcam.pipeline.run import stage_names
from lpcam.pipeline.run_folder import RunFolder

ALL = (
    "start_up",
    "map_head",
    "engines",
    "extraction",
    "fit",
    "fit_against_training",
    "reservoir",
    "walk",
    "crf",
    "localisation",
    "objects",
    "coco_index",
    "any_classifier",
)
TAKES = {
    "start_up": ("quick",),
    "map_head": ("quick",),
    "engines": ("quick", "data", "weights"),
    "extraction": ("quick", "data", "weights"),
    "fit": ("quick",),
    "fit_against_training": ("quick", "data", "weights"),
    "reservoir": ("data", "run"),
    "walk": ("quick",),
    "crf": ("quick", "data"),
    "localisation": ("quick", "data", "weights", "run"),
    "objects": ("quick",),
    "coco_index": ("quick",),
    "any_classifier": ("quick",),
}
"""The arguments that are handed on to each."""
HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> int:
    """Run, join the tables below the machine's description, and count the goals.

    Returns:
        0, also where a peer or data are missing or a goal is missed; 1 if a benchmark failed.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small and short: no real figures")
    parser.add_argument("--only", nargs="+", choices=ALL, metavar="NAME", help=", ".join(ALL))
    parser.add_argument("--data", type=Path, help="folder VOC2012 with real photographs")
    parser.add_argument("--weights", type=Path, help="safetensors file of MobileNetV2's weights")
    parser.add_argument(
        "--run", type=Path, help="folder of a finished run on --data; otherwise one is made"
    )
    parser.add_argument("--output", type=Path, help="write the tables to this file too")
    options = parser.parse_args(argv)
    chosen = [n for n in options.only or ALL if (HERE / f"{n}.py").is_file()]
    parts: list[str] = []
    failed = []

    def add(part: str) -> None:
        """Print and write each table when it is there: the next may take long."""
        parts.append(part.strip())
        print(parts[-1], end="\n\n", flush=True)
        if options.output:
            options.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")

    add("# Benchmarks\n\n" + machine())
    with tempfile.TemporaryDirectory() as folder:
        if "reservoir" in chosen and options.data and options.weights and not options.run:
            print("a whole run ...", file=sys.stderr, flush=True)
            options.run = Path(folder, "run")
            add(_whole_run(options))
        for name in chosen:
            print(f"{name} ...", file=sys.stderr, flush=True)
            text, succeeded = _one(name, options)
            add(text)
            if not succeeded:
                failed.append(name)
    add(_summary("\n".join(parts), failed))
    return int(bool(failed))


def _whole_run(options: argparse.Namespace) -> str:
    """Time of each stage of the recipe ``voc_animals``; its folder serves ``reservoir``."""
    threads = str(len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "lpcam", "run", RECIPE, "--threads", threads]
    for key, value in (
        ("data.root", options.data),
        ("classifier.weights", options.weights),
        ("run.folder", options.run),
    ):
        command += [f"--{key}", str(value.resolve())]
    started = time.perf_counter()
    done = subprocess.run(command, env=environment(1), capture_output=True, text=True, check=False)
    whole = time.perf_counter() - started
    if done.returncode:
        raise BenchmarkError(f"the run failed:\n{done.stderr[-2000:]}")
    use = json.loads(RunFolder(options.run).use.read_text("utf-8"))
    rows = [[name, f"{use[name]['seconds']:.1f}"] for name in stage_names() if name in use]
    rows.append(["all, with start and first look at the images", f"{whole:.1f}"])
    return (
        f"## A whole run\n\n`lpcam run {RECIPE}` from nothing, {threads} threads, once.\n\n"
        + table(["stage", "seconds"], rows)
    )


def _one(name: str, options: argparse.Namespace) -> tuple[str, bool]:
    title = f"## {name.replace('_', ' ').capitalize()}"
    if name == "reservoir" and not (options.data and options.run):
        return f"{title}\n\n{MISSING}: needs `--data FOLDER --weights FILE`", True
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    for argument in TAKES[name]:
        value = getattr(options, argument)
        if isinstance(value, Path):
            command += [f"--{argument}", str(value.resolve())]
        elif value:
            command.append(f"--{argument}")
    done = subprocess.run(command, env=environment(1), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        print(done.stderr, file=sys.stderr)
        text = done.stdout.strip() or title
        return f"{text}\n\n**failed**: {lines[-1] if lines else done.returncode}", False
    return done.stdout, True


def _summary(text: str, failed: Sequence[str]) -> str:
    words = [f"{text.count(f'**{word}**')} {word}" for word in ("met", "missed")]
    lines = f"## Goals\n\n{', '.join(words)}, {text.count(MISSING)} {MISSING}"
    return lines + (f"; failed: {', '.join(failed)}" if failed else "")


if __name__ == "__main__":
    sys.exit(main())
