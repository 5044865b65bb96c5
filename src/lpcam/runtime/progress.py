"""Progress with an estimate of the time left: live on a terminal, sparse lines in a log, and the
state of a run in a file for other shells."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lpcam.runtime.errors import ArtefactError
from lpcam.runtime.files import write_json

logger = logging.getLogger(__name__)
LINE_EVERY_SECONDS, WRITE_EVERY_SECONDS = 15.0, 1.0
Advance = Callable[[int, str], None]  #: Called with the number of steps done and a remark.


class Watch:
    """State of a run: what a live view shows, and a JSON file for other shells holds.

    Args:
        path: the file, written at most once a second; None writes none.
        stages: names of the stages in order.
        usual: seconds that stages took in an earlier run.
        command: the command line of the run.
    """

    def __init__(
        self,
        path: Path | None,
        stages: Sequence[str],
        usual: Mapping[str, float],
        command: str = "",
    ) -> None:
        self.path, self._written = path, -math.inf
        self.stages = {name: {"name": name, "usual": usual.get(name)} for name in stages}
        self.state: dict[str, Any] = {"command": command, "current": stages[0]}

    def update(self, stage: str | None = None, **values: Any) -> None:
        """Change what is known of the current stage, after ``stage`` has become it."""
        if stage is not None:
            self.state["current"], values["since"] = stage, time.time()
        self.stages[self.state["current"]].update(values)
        if time.monotonic() - self._written >= WRITE_EVERY_SECONDS:
            self.write()

    def write(self, **values: Any) -> None:
        """Write the state with further values. A file that cannot be written stops no run."""
        self.state |= {**values, "written": time.time(), "stages": [*self.stages.values()]}
        self._written = time.monotonic()
        if self.path is not None:
            with suppress(ArtefactError):
                write_json(self.path, self.state)

    def __rich__(self) -> Text:
        now = {**self.state, "written": time.time()}
        return Text("\n".join(state_lines(now)), no_wrap=True, overflow="ellipsis")


_watch: Watch | None = None


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Show and keep the progress of the block; the file stays only where the block fails."""
    global _watch  # noqa: PLW0603 - progress is told deep inside stages
    with ExitStack() as after:
        watch.update(watch.state["current"])
        if (plain := sys.stderr).isatty():
            view = Live(watch, console=Console(stderr=True), transient=True, redirect_stdout=False)
            after.enter_context(view)
            for handler in logging.getLogger().handlers:  # their lines go above the view
                if isinstance(handler, logging.StreamHandler) and handler.stream is plain:
                    handler.setStream(sys.stderr)
                    after.callback(handler.setStream, plain)
        _watch = watch
        try:
            yield
        except BaseException as error:
            watch.write(error=str(error) or type(error).__name__)
            raise
        finally:
            _watch = None
        if watch.path is not None:
            with suppress(OSError):
                watch.path.unlink()


def state_lines(state: Mapping[str, Any]) -> list[str]:
    """A line for each stage of a run, and the time left as far as it can be known."""
    lines, left = [], 0.0
    for stage in state["stages"]:
        usual = stage["usual"]
        if "seconds" in stage:
            seconds = stage["seconds"]
            text = "up to date" if seconds is None else f"done in {duration(seconds)}"
        elif "since" in stage:
            spent = state["written"] - stage["since"]
            rest = math.nan if usual is None else max(usual - spent, 0)
            text = f"running for {duration(spent)}"
            if "total" in stage:
                done, total = stage["done"], stage["total"]
                bar = f"{'━' * round(20 * done / max(total, 1)):·<20}"
                text += f"  {bar} {stage['label']}: {done} of {total}"
                if stage["left"] is not None:
                    rest = stage["left"]
                    text += f", about {duration(rest)} left"
                text += stage["remark"] and f", {stage['remark']}"
            left += rest
        else:
            text = f"waiting; took {duration(usual)} in an earlier run" if usual else "waiting"
            left += math.nan if usual is None else usual
        lines.append(f"{stage['name']:<16}{text}")
    unknown = "unknown, as no earlier run of this folder did all these stages"
    told = f"time left: {unknown if math.isnan(left) else 'about ' + duration(left)}"
    return lines if len(lines) == 1 else [*lines, told]


def duration(seconds: float) -> str:
    """Seconds as text, such as ``40 s``, ``12 min`` or ``1.5 h``."""
    if seconds < 90:
        return f"{max(1.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def progress(label: str, total: int, *, done: int = 0) -> Iterator[Advance]:
    """Show the progress of ``total`` steps, of which ``done`` were finished by an earlier run."""
    with ExitStack() as after:
        if _watch is None and sys.stderr.isatty():
            after.enter_context(watched(Watch(None, [label], {})))
        watch = _watch
        started = last = time.monotonic()
        finished = done

        def advance(steps: int, remark: str) -> None:
            nonlocal finished, last
            finished += steps
            now, left = time.monotonic(), None
            if finished > done:
                left = (now - started) / (finished - done) * (total - finished)
            if watch is not None:
                watch.update(label=label, done=finished, total=total, left=left, remark=remark)
            if now - last < LINE_EVERY_SECONDS or left is None or sys.stderr.isatty():
                return
            last = now
            note = f", {remark}" if remark else ""
            logger.info("%s: %d of %d, about %.0f s left%s", label, finished, total, left, note)

        advance(0, "")
        yield advance
