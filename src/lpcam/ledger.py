"""What a run remembers of its stages: which inputs and settings made the files that are there.

Each stage owns a folder with a ``stage.json``: a key (a digest of everything that its results
depend on), the readable parts of that key, and whether it is finished. A stage with the same key
and ``done`` is skipped; with the same key and not done it goes on; with another key its files are
removed first.
"""

from __future__ import annotations

import fcntl
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lpcam.errors import ArtefactError
from lpcam.storage import digest_json, read_json, write_json
from lpcam.version import versions

logger = logging.getLogger(__name__)
RECORD = "stage.json"
DIGEST = re.compile(r"[0-9a-f]{32}")


class Stage:
    """One stage's folder and record.

    Args:
        folder: the stage's own.
        parts: everything that the stage's results depend on, as JSON.
    """

    def __init__(self, folder: Path, parts: Mapping[str, Any]) -> None:
        self.folder = folder
        self.parts = dict(parts)
        self.key = digest_json(self.parts)
        self.output: dict[str, Any] = {}

    def done(self, outputs: Iterable[Path]) -> bool:
        """Whether the stage is finished for this key and all its files are there."""
        record = self._record()
        if record is None or record["key"] != self.key or not record["done"]:
            return False
        if not all(path.is_file() for path in outputs):
            return False
        self.output = record["output"]
        return True

    def begin(self) -> None:
        """Make the folder ready: keep the files of the same key, remove those of another."""
        for path in self.folder.rglob(".*.tmp"):  # half-written when the run was killed
            path.unlink()
        record = self._record()
        if record is not None and record["key"] == self.key:
            logger.info("%s: goes on where it stopped", self.folder.name)
            return
        if record is not None:
            logger.info("%s: made anew, for %s", self.folder.name, self._changed(record["parts"]))
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ArtefactError(
                f"{self.folder} holds files but no readable {RECORD}, so they may be yours; move "
                "them away, or choose another run folder with --run.folder"
            )
        # The record goes last, so that a stop between the two is noticed as another key.
        if self.folder.exists():
            for path in sorted(self.folder.iterdir()):
                if path.name != RECORD:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._write(done=False)

    def finish(self, **output: Any) -> None:
        """Record the end, and what later stages need to know of it."""
        self.output = output
        self._write(done=True)

    def _record(self) -> dict[str, Any] | None:
        path = self.folder / RECORD
        if not path.is_file():
            return None
        record = read_json(path)
        expected = {"key", "parts", "done", "output"}
        if not isinstance(record, dict) or not expected <= record.keys():
            raise ArtefactError(f"{path} is no stage record; delete {self.folder} and run again")
        return record

    def _write(self, *, done: bool) -> None:
        write_json(
            self.folder / RECORD,
            {
                "key": self.key,
                "parts": self.parts,
                "done": done,
                "output": self.output,
                "versions": versions(),
            },
        )

    def _changed(self, old: Mapping[str, Any]) -> str:
        was, now = dict(_leaves(old)), dict(_leaves(self.parts))
        changed = sorted(k for k in was.keys() | now.keys() if was.get(k) != now.get(k))
        shown = [
            k
            if DIGEST.search(f"{was.get(k)!r} {now.get(k)!r}")  # which says nothing to a reader
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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process; the system lets go of it if the process dies.

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
                f"another run is working in {folder}; wait for it, or choose another folder with "
                "--run.folder"
            ) from error
        for path in folder.glob(".*.tmp"):  # half-written when a run was killed
            path.unlink()
        yield
