"""The cache of a run: each result has a key, and is made only when the key has changed.

A result is a folder of files with a ``stage.json``: a key (a digest of everything that the result
depends on), the readable parts of the key, and whether the result is finished. A task whose results
are finished with the same key is skipped; with the same key and unfinished it resumes; with another
key its files are removed first.
"""

from __future__ import annotations

import fcntl
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpcam.runtime.errors import ArtefactError
from lpcam.runtime.files import digest_json, read_json, write_json
from lpcam.runtime.versions import versions

logger = logging.getLogger(__name__)
RECORD = "stage.json"
DIGEST = re.compile(r"[0-9a-f]{32}")
LEFTOVERS = ("pooled-*.safetensors", "reservoir-*.safetensors", "checkpoint.safetensors")
"""Files that only an interrupted task needs."""
Record = dict[str, Any]
"""A JSON object: a row of figures, the entry of a history, a protocol."""
Parts = Mapping[str, Any]
"""Everything that a result depends on, as JSON."""
Output = Mapping[str, Any]
"""What a task records of its results for later stages, as JSON."""


class StageCache:
    """The folder and the record of one result.

    Args:
        folder: belongs to this result alone.
        parts: everything that the result depends on, as JSON.
    """

    def __init__(self, folder: Path, parts: Parts) -> None:
        self.folder = folder
        self.parts = dict(parts)
        self.key = digest_json(self.parts)
        self.output: Record = {}

    def done(self, outputs: Iterable[Path] = ()) -> bool:
        """Tell whether the result is finished for this key and all its files exist."""
        record = self._record()
        if record is None or record["key"] != self.key or not record["done"]:
            return False
        if not all(path.is_file() for path in outputs):
            return False
        self.output = record["output"]
        return True

    def begin(self) -> None:
        """Prepare the folder: keep files of the same key, remove those of another.

        Raises:
            ArtefactError: if the folder holds files but no record.
        """
        for path in self.folder.rglob(".*.tmp"):  # half-written when a run was killed
            path.unlink()
        record = self._record()
        if record is not None and record["key"] == self.key:
            logger.info("%s: resuming", self.folder.name)
            return
        if record is not None:
            logger.info("%s: recomputing: %s", self.folder.name, self._changed(record["parts"]))
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ArtefactError(
                f"{self.folder} holds files but no readable {RECORD}, so they may be yours; move "
                "them away, or choose another run folder with --run.folder"
            )
        # The record is replaced last, so that an interruption between the two is noticed.
        if self.folder.exists():
            for path in sorted(self.folder.iterdir()):
                if path.name != RECORD:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._write(done=False)

    def finish(self, output: Output) -> None:
        """Record that the result is finished, with what later stages need to know of it."""
        self.output = dict(output)
        self._write(done=True)

    def remove_leftovers(self) -> None:
        """Remove the files of a finished result that only an interrupted one needs."""
        for pattern in LEFTOVERS:
            for path in self.folder.glob(pattern):
                path.unlink()

    def _record(self) -> Record | None:
        path = self.folder / RECORD
        if not path.is_file():
            return None
        record = read_json(path)
        expected = {"key", "parts", "done", "output"}
        if not isinstance(record, dict) or not expected <= record.keys():
            raise ArtefactError(f"{path} is not a stage record; delete {self.folder} and run again")
        return record

    def _write(self, *, done: bool) -> None:
        record = {"key": self.key, "parts": self.parts, "done": done, "output": self.output}
        write_json(self.folder / RECORD, {**record, "versions": versions()})

    def _changed(self, old: Parts) -> str:
        was, now = dict(_leaves(old)), dict(_leaves(self.parts))
        changed = sorted(k for k in was.keys() | now.keys() if was.get(k) != now.get(k))
        shown = [
            k
            if DIGEST.search(f"{was.get(k)!r} {now.get(k)!r}")  # meaningless to a reader
            else f"{k} {was.get(k)!r:.40} -> {now.get(k)!r:.40}"
            for k in changed[:4]
        ]
        return "; ".join(shown) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


@dataclass(frozen=True)
class Result:
    """One result of a task: a folder of files with a cache key."""

    name: str
    """Under which later stages find it, such as ``irn/lpcam``."""
    folder: Path
    parts: Parts
    outputs: Sequence[Path]
    """The files that it consists of."""


@dataclass(frozen=True)
class Task:
    """Results that one piece of work makes together.

    ``work`` gets the caches of the results in their order. It runs in every process of a run and
    returns what the first process records of the results.
    """

    results: Sequence[Result]
    work: Callable[..., Output | None]
    prepare: Callable[[], Any] | None = None
    """Called before files of another key are removed. What it returns is the first argument of
    ``work``."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process until the block ends or the process dies.

    Raises:
        ArtefactError: if another process holds it, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("a")
    except OSError as error:
        raise ArtefactError(
            f"cannot use the run folder {folder}: {error.strerror}; choose another with "
            "--run.folder"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ArtefactError(
                f"another run uses {folder}; wait for it, or choose another folder with "
                "--run.folder"
            ) from error
        for path in folder.glob(".*.tmp"):  # half-written when a run was killed
            path.unlink()
        yield
