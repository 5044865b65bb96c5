"""Kill runs at random moments, let them go on, and compare every byte with an undisturbed run.

    OMP_NUM_THREADS=1 python tests/faults/fault_test.py [--kills 50] [--process-kills 10] [--seed 0]
        [--keep FOLDER]

Two recipes on the tiny data set of the tests, a linear probe and a fine-tuning run. One to three
kills (SIGKILL) follow each other before the run may finish. Then every file of the run folder, but
its lock and the note of how long it took, must equal the undisturbed run's, and no temporary file
may be left. The folder has the same path in all runs.

Part 1, one process. This script imports all that a run needs once and forks itself for each run; it
starts no threads and computes nothing before, as a forked process may not use threads that its
parent had. The undisturbed run is a real command, so the two ways are compared as well. Half of the
series are killed at a moment of an undisturbed run's time; in the other half the child kills itself
at a random file, while it lies there half-written or just after it has been moved into place.

Part 2, two processes, as real commands of torchrun: one worker of a random rank is killed, or
launcher and workers at once. The command must end by itself with an error and leave no worker
behind; the same command then goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCE, TESTS = ROOT / "src", ROOT / "tests"
sys.path[:0] = [str(SOURCE), str(TESTS)]

PATIENCE = 300.0
"""Seconds within which a command must end when one of its workers has been killed."""
START_SECONDS = 6.0
"""That two workers take to import, meet and import the rest, about."""
LONGEST_SERIES = 3
LIMIT = 900.0
"""Seconds after which an undisturbed run counts as hung."""
FINETUNE = {"epochs": 2, "batch_size": 4, "long_side": [60, 64], "crop": 64, "learning_rate": 0.05}


class FaultError(Exception):
    """What a run did that it should not have done."""


@dataclass(frozen=True)
class Moment:
    """When a run is killed: after some seconds, or at the nth file that it writes."""

    seconds: float = LIMIT
    write: int = 0
    moved: bool = False
    """Just after the file was moved into place, instead of just before."""
    files: int = 0
    """Count the seconds from when so many files lie in the folder."""
    early: bool = False
    """Count the seconds from the workers' start, before they meet and work."""

    def __str__(self) -> str:
        if self.write:
            return f"{'after' if self.moved else 'in'} write {self.write}"
        if self.files:
            return f"at file {self.files}"
        return f"{'start+' if self.early else ''}{self.seconds:.2f} s"


@dataclass
class Bench:
    """A folder with the data, the recipes, the run under test and the digests to be met."""

    folder: Path
    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    """Digest of each file of an undisturbed run, by recipe (and number of processes)."""
    seconds: dict[str, float] = field(default_factory=dict)
    """That an undisturbed run takes, after the start of Python."""
    writes: dict[str, int] = field(default_factory=dict)
    """How many files it writes, some of them more than once."""

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def log(self) -> Path:
        """What the latest command printed."""
        return self.folder / "log.txt"

    def clear(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)

    def keep(self, number: int) -> None:
        """Put the run's folder aside, for whoever looks for the reason of a failure."""
        if self.run.exists():
            shutil.move(self.run, self.folder / f"failed-{number:02d}")
        if self.log.exists():
            shutil.copy(self.log, self.folder / f"failed-{number:02d}.txt")

    def last_words(self) -> str:
        """The message of the latest command that failed."""
        lines = self.log.read_text("utf-8", errors="replace").splitlines()
        told = [line for line in lines if line.startswith("lpcam: ")]
        return (told or [line for line in lines if line.strip()] or ["it printed nothing"])[-1]

    def compare(self, what: str) -> None:
        """Raise FaultError if the run's folder differs from that of the undisturbed run."""
        from tiny import digests  # noqa: PLC0415

        found, expected = digests(self.run), self.expected[what]
        problems = {
            "missing": expected.keys() - found.keys(),
            "left behind": found.keys() - expected.keys(),
            "other bytes": {n for n in found.keys() & expected.keys() if found[n] != expected[n]},
        }
        told = [
            f"{kind}: {', '.join(sorted(names)[:4])}{' ...' if len(names) > 4 else ''}"
            for kind, names in problems.items()
            if names
        ]
        if told:
            raise FaultError("; ".join(told))


def set_up(folder: Path) -> None:
    """Draw the data set, make the weights and write both recipes."""
    import yaml  # noqa: PLC0415
    from tiny import draw_folder, recipe_values, write_weights  # noqa: PLC0415

    data = draw_folder(folder / "boxes")
    weights = write_weights(folder / "tiny.safetensors")
    for method in ("probe", "finetune"):
        values: dict[str, Any] = recipe_values(data, folder / "run", weights)
        values["classifier"] |= {"method": method, "finetune": FINETUNE}
        values["run"]["threads"] = 2  # files are written by several threads at a time
        (folder / f"{method}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")


def environment() -> dict[str, str]:
    """Of a command: this source tree, and one thread of numerics in each thread."""
    path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def command(recipe: str, processes: int) -> list[str]:
    """The command of a run."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = several if processes > 1 else []
    return [sys.executable, *start, "-m", "lpcam", "run", f"{recipe}.yaml"]


def files_there(run: Path) -> int:
    """How many finished files lie in a run folder."""
    return sum(1 for path in run.rglob("[!.]*") if path.suffix)


def import_everything() -> None:
    """All modules that a run uses, so that a fork need not import them; none is used here."""
    import timm  # noqa: F401, PLC0415
    import torch._dynamo  # noqa: F401, PLC0415 - by the optimisers
    from rich import console, table  # noqa: F401, PLC0415


def fork(work: Callable[[], int], log: Path) -> int:
    """Start some work in a copy of this process that prints to a file; returns its number."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"this process has {threads} threads, so a fork may hang"
    sys.stdout.flush()
    number = os.fork()
    if number:
        return number
    status = 70
    try:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = work()
    except BaseException:  # a traceback in the log, and never back into the parent's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def draw(folder: Path) -> None:
    """:func:`set_up` in a process of its own, for this one must not compute."""
    number = fork(lambda: set_up(folder) or 0, folder / "log.txt")
    if ended(number, LIMIT) != 0:
        raise FaultError((folder / "log.txt").read_text("utf-8"))


def start_alone(bench: Bench, recipe: str, moment: Moment) -> int:
    """Start a run of one process; returns its number."""

    def work() -> int:
        os.chdir(bench.folder)
        import torch  # noqa: PLC0415

        from lpcam.cli.main import main  # noqa: PLC0415
        from lpcam.pipeline.stages import prototypes  # noqa: PLC0415
        from lpcam.training import loop as engine  # noqa: PLC0415

        torch.set_num_threads(1)
        engine.CHECKPOINT_STEPS = 1
        prototypes.CHECKPOINT_SECONDS, prototypes.CHECKPOINT_SHARE = 0.0, 0
        count = count_writes(moment)
        status = main(["run", f"{recipe}.yaml"])
        print(f"{count()} writes")
        return status

    return fork(work, bench.log)


def count_writes(moment: Moment) -> Callable[[], int]:
    """From here on, count the files that this process writes, and kill it at the one wanted."""
    numbers = itertools.count(1)
    replace = os.replace
    last = 0

    def counted(source: Any, target: Any) -> None:
        nonlocal last
        last = number = next(numbers)
        if number == moment.write and not moment.moved:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if number == moment.write:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted
    return lambda: last


def ended(number: int, seconds: float) -> int | None:
    """Exit status of a child that ends within some seconds, else None."""
    limit = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(number, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= limit:
            return None
        time.sleep(min(0.001, max(0.0, limit - time.monotonic())))


def run_alone(bench: Bench, recipe: str, moment: Moment | None = None) -> bool:
    """A run of one process, to its end or until it is killed.

    Returns:
        whether it was killed; False if it ended well before that.

    Raises:
        FaultError: if it ended with an error, or hangs.
    """
    number = start_alone(bench, recipe, moment or Moment())
    status = ended(number, LIMIT if moment is None else moment.seconds)
    if status is None:
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        if moment is None or moment.write:
            raise FaultError(f"no end after {LIMIT:.0f} s")
        return True
    if status == -signal.SIGKILL and moment is not None and moment.write:
        return True
    if status:
        raise FaultError(f"it did not go on (status {status}): {bench.last_words()}")
    return False


@dataclass
class Command:
    """A command of torchrun and the workers it has started."""

    launcher: subprocess.Popen[bytes]
    workers: dict[int, int] = field(default_factory=dict)
    """Number of the process of each rank."""

    def look(self) -> dict[int, int]:
        """The workers there are by now."""
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                # the name may hold blanks and brackets; the parent is the second field after it
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent != self.launcher.pid:
                    continue
                variables = (folder / "environ").read_bytes().split(b"\0")
            except (OSError, IndexError, ValueError):  # it has just ended
                continue
            ranks = [v.partition(b"=")[2] for v in variables if v.startswith(b"RANK=")]
            if ranks:
                self.workers[int(ranks[0])] = int(folder.name)
        return self.workers

    def alive(self) -> list[int]:
        """Processes of workers that still run."""
        found = []
        for number in self.workers.values():
            try:
                state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if state not in "ZX":
                found.append(number)
        return found

    def stop(self) -> None:
        """Kill whatever is left of it."""
        self.look()
        for number in [*self.alive(), *([self.launcher.pid] if self.running() else [])]:
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.launcher.wait()
        wait_until(lambda: not self.alive(), PATIENCE)

    def running(self) -> bool:
        return self.launcher.poll() is None


def wait_until(happened: Callable[[], Any], seconds: float) -> bool:
    """Whether something happens within some seconds."""
    limit = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > limit:
            return False
        time.sleep(0.005)
    return True


def start_two(bench: Bench, recipe: str) -> Command:
    """Start a command of two processes."""
    (bench.run / ".lock").unlink(missing_ok=True)  # its return shows that the work begins
    with bench.log.open("wb") as log:
        return Command(
            subprocess.Popen(
                command(recipe, 2),
                cwd=bench.folder,
                env=environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        )


def finish_two(bench: Bench, recipe: str) -> None:
    """Run to the end in two processes."""
    running = start_two(bench, recipe)
    try:
        status = running.launcher.wait(LIMIT)
    except subprocess.TimeoutExpired:
        raise FaultError(f"two processes: no end after {LIMIT:.0f} s") from None
    finally:
        running.stop()
    if status:
        raise FaultError(f"two processes did not go on (status {status}): {bench.last_words()}")


def kill_two(bench: Bench, recipe: str, victim: int | None, moment: Moment) -> float | None:
    """Start two processes and kill one of them (None: both and their launcher) at a moment.

    Returns:
        seconds until the whole command had ended, or None if it ended before the kill.

    Raises:
        FaultError: if it hangs, ends without an error, or leaves a worker behind.
    """
    running = start_two(bench, recipe)
    lock = bench.run / ".lock"

    def begun() -> bool:
        if moment.early:
            return len(running.look()) == 2
        return lock.exists() and files_there(bench.run) >= moment.files

    try:
        if not wait_until(lambda: begun() or not running.running(), PATIENCE):
            raise FaultError(f"two processes: no work at {moment} after {PATIENCE:.0f} s")
        wait_until(lambda: not running.running(), moment.seconds)
        running.look()
        if not running.running() or len(running.alive()) < 2:
            status = running.launcher.wait(PATIENCE)
            if status:
                raise FaultError(
                    f"two processes did not go on (status {status}): {bench.last_words()}"
                )
            return None
        killed = time.monotonic()
        if victim is None:
            for number in (running.launcher.pid, *running.alive()):
                os.kill(number, signal.SIGKILL)
        else:
            os.kill(running.workers[victim], signal.SIGKILL)
        if not wait_until(lambda: not running.running(), PATIENCE):
            raise FaultError(
                f"rank {victim} was killed, and the command had no end in {PATIENCE:.0f} s"
            )
        took = time.monotonic() - killed
        status = running.launcher.wait()
        if not status:
            raise FaultError(f"rank {victim} was killed, and the command ended with status 0")
        if not wait_until(lambda: not running.alive(), PATIENCE):
            raise FaultError(f"the command had ended, but its worker {running.alive()} still ran")
        return took
    finally:
        running.stop()


@dataclass
class Report:
    """Rows of the table, printed as they come."""

    kills: int = 0
    failures: int = 0
    slowest: float = 0.0

    def row(self, what: str, moment: Moment, outcome: str) -> None:
        number = "" if outcome == "finished first" else str(self.kills)
        print(f"{number:>4}  {what:<24} {moment!s:>14}  {outcome}", flush=True)

    def fail(self, bench: Bench, what: str, reason: str) -> None:
        self.failures += 1
        bench.keep(self.failures)
        print(f"FAILED {self.failures:>2}  {what}: {reason}", flush=True)


def moments(count: int, rng: random.Random) -> Iterator[float]:
    """Random parts of a run's time, one from each of ``count`` equal shares of it, shuffled."""
    while True:
        yield from rng.sample([(place + rng.random()) / count for place in range(count)], count)


def series_alone(
    bench: Bench, recipes: Sequence[str], kills: int, rng: random.Random, report: Report
) -> None:
    """Kills of one process."""
    by_seconds, by_writes = (moments(max(kills // 2, 1), rng) for _ in range(2))
    number, target = 0, report.kills + kills
    while report.kills < target and number < 4 * kills:
        recipe, writes = recipes[number % len(recipes)], number % 2 == 1 or len(recipes) == 1
        number += 1
        bench.clear()
        length = min(rng.randint(1, LONGEST_SERIES), target - report.kills)
        left = 1.0
        try:
            for link in range(length):
                share = left * rng.random()
                if link == 0:
                    share = next(by_writes if writes else by_seconds)
                moment = Moment(seconds=share * bench.seconds[recipe])
                if writes:
                    write = 1 + int(share * bench.writes[recipe])
                    moment = Moment(write=write, moved=rng.random() < 0.3)
                if not run_alone(bench, recipe, moment):
                    report.row(recipe, moment, "finished first")
                    break
                left = max(0.2, left - share)
                report.kills += 1
                report.row(recipe, moment, "killed")
            run_alone(bench, recipe)
            bench.compare(recipe)
        except FaultError as fault:
            report.fail(bench, recipe, str(fault))


def series_two(
    bench: Bench, recipes: Sequence[str], kills: int, rng: random.Random, report: Report
) -> None:
    """Kills of one of two processes, or of both and their launcher."""
    shares = moments(max(kills, 1), rng)
    number, target = 0, report.kills + kills
    while report.kills < target and number < 4 * kills:
        recipe = recipes[number % len(recipes)]
        what = f"{recipe}, two processes"
        number += 1
        bench.clear()
        length = min(rng.randint(1, LONGEST_SERIES), target - report.kills)
        try:
            for link in range(length):
                victim = rng.choice([0, 1, 0, 1, None])
                share = next(shares) if link == 0 else rng.random()
                moment = moment_of_two(bench, what, share, rng)
                took = kill_two(bench, recipe, victim, moment)
                if took is None:
                    report.row(what, moment, "finished first")
                    break
                report.kills += 1
                if victim is not None:
                    report.slowest = max(report.slowest, took)
                whom = "all" if victim is None else f"rank {victim}"
                outcome = f"killed {whom}, command ended in {took:.1f} s"
                report.row(what, moment, outcome)
            finish_two(bench, recipe)
            bench.compare(what)
        except FaultError as fault:
            report.fail(bench, what, str(fault))


def moment_of_two(bench: Bench, what: str, share: float, rng: random.Random) -> Moment:
    """A moment of a command: mostly by the files that are there, for its start is most of it."""
    if rng.random() < 0.25:
        return Moment(seconds=share * START_SECONDS, early=True)
    there, whole = files_there(bench.run), len(bench.expected[what])
    files = there + 1 + int(share * (whole - there - 1))
    return Moment(seconds=rng.uniform(0, 0.02), files=files)


def undisturbed(bench: Bench, recipes: Sequence[str], *, quick: bool, two: bool) -> None:
    """Make the runs that the others are compared with, and note how long they take."""
    from tiny import digests  # noqa: PLC0415

    for recipe in recipes:
        if not quick:
            bench.clear()
            subprocess.run(
                command(recipe, 1),
                cwd=bench.folder,
                env=environment(),
                check=True,
                capture_output=True,
                timeout=LIMIT,
            )
            bench.expected[recipe] = digests(bench.run)
        bench.clear()
        started = time.monotonic()
        run_alone(bench, recipe)
        bench.seconds[recipe] = time.monotonic() - started
        bench.writes[recipe] = int(bench.log.read_text("utf-8").split()[-2])
        bench.expected.setdefault(recipe, digests(bench.run))
        bench.compare(recipe)
    # Two processes probe to the same bytes as one; gradients they add up in another order.
    bench.expected["probe, two processes"] = bench.expected["probe"]
    if two and "finetune" in recipes:
        bench.clear()
        finish_two(bench, "finetune")
        bench.expected["finetune, two processes"] = digests(bench.run)


def main() -> int:
    """Entry point; returns 1 if any run differed, hung or failed to go on."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of one process")
    parser.add_argument("--process-kills", type=int, default=10, help="of two processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--keep", type=Path, help="work in this empty folder and leave it there")
    parser.add_argument(
        "--quick", action="store_true", help="the probe alone, killed at writes: for the suite"
    )
    options = parser.parse_args()
    if options.process_kills and importlib.util.find_spec("accelerate") is None:
        parser.error("two processes need accelerate; install it, or give --process-kills 0")
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        if any(options.keep.iterdir()):
            parser.error(f"{options.keep} is not empty")
        return fault_test(options.keep.resolve(), options)
    with tempfile.TemporaryDirectory(prefix="lpcam-faults-") as folder:
        return fault_test(Path(folder).resolve(), options)


def fault_test(folder: Path, options: argparse.Namespace) -> int:
    """The whole test in an empty folder."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is imported
    started = time.monotonic()
    bench, report = Bench(folder), Report()
    recipes = ("probe",) if options.quick else ("probe", "probe", "finetune")
    import_everything()
    try:
        draw(folder)
        kinds = sorted({*recipes}, reverse=True)
        undisturbed(bench, kinds, quick=options.quick, two=options.process_kills > 0)
    except (FaultError, subprocess.SubprocessError) as fault:
        print(f"an undisturbed run failed: {fault}")
        return 1
    for what, seconds in bench.seconds.items():
        print(f"undisturbed: {what}, {seconds:.2f} s, {bench.writes[what]} files written")
    print(f"\n{'kill':>4}  {'run':<24} {'moment':>14}  outcome", flush=True)
    rng = random.Random(options.seed)
    series_alone(bench, recipes, options.kills, rng, report)
    series_two(bench, kinds, options.process_kills, rng, report)
    print(f"\n{time.monotonic() - started:.0f} s")
    if report.slowest:
        print(f"slowest end of a command with a dead worker: {report.slowest:.1f} s")
    wanted = options.kills + options.process_kills
    if report.kills < wanted:
        report.failures += 1
        print(f"only {report.kills} of {wanted} kills met a run at work")
    if report.failures:
        hint = "" if options.keep else " (--keep FOLDER keeps them, as failed-NN)"
        print(f"FAILED: {report.failures} of the runs above differed{hint}")
        return 1
    print(f"passed: {report.kills} kills, and every byte equal to that of an undisturbed run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
