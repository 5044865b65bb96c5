"""Progress with an estimate of the time left: a bar on a terminal, sparse lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console

logger = logging.getLogger(__name__)
LINE_EVERY_SECONDS = 15.0
Advance = Callable[[int, str], None]  #: Called with the number of steps done and a remark.


@contextmanager
def progress(label: str, total: int, *, done: int = 0) -> Iterator[Advance]:
    """Show the progress of ``total`` steps, of which ``done`` were finished by an earlier run."""
    if sys.stderr.isatty():
        usual = bars.Progress.get_default_columns()
        remark = bars.TextColumn("{task.fields[remark]}")
        with bars.Progress(
            *usual, bars.MofNCompleteColumn(), remark, console=Console(stderr=True)
        ) as bar:
            task = bar.add_task(label, total=total, completed=done, remark="")
            yield lambda steps, remark: bar.update(task, advance=steps, remark=remark)
        return

    started = last = time.monotonic()
    finished = done

    def advance(steps: int, remark: str) -> None:
        nonlocal finished, last
        finished += steps
        now = time.monotonic()
        if now - last < LINE_EVERY_SECONDS or finished == done:
            return
        last = now
        left = (now - started) / (finished - done) * (total - finished)
        note = f", {remark}" if remark else ""
        logger.info("%s: %d of %d, about %.0f s left%s", label, finished, total, left, note)

    yield advance
