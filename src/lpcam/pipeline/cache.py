"""The cache of a run: each result has a key, and is made only when the key has changed.

A result is a folder of files with a ``stage.json``: a key (a digest of everything that the result
depends on), the readable parts of the key, and whether the result is finished. A task whose results
are finished with the same key is skipped; with the same key and unfinished it resumes; with another
key its files are removed first, but for those of images whose classes the change does not concern.
"""

from __future__ import annotations

import fcntl
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lpcam.runtime.errors import ArtefactError
from lpcam.runtime.files import digest_json, link, read_json, write_json
from lpcam.runtime.versions import versions

logger = logging.getLogger(__name__)
RECORD = "stage.json"
DIGEST = re.compile(r"[0-9a-f]{32}")
LEFTOVERS = ("pooled-*.safetensors", "reservoir-*.safetensors", "checkpoint.safetensors")
"""Files that only an interrupted task needs."""
Record = dict[str, Any]  #: A JSON object: a row of scores, the entry of a history, a protocol.
Output = Mapping[str, Any]  #: Record of a task's results for later stages, as JSON.


@dataclass
class Result:
    """One result of a run: a folder of its own, with a record of how it was made."""

    name: str  #: Name by which later stages find it, such as ``irn/lpcam``.
    folder: Path
    parts: Mapping[str, Any]  #: Everything that it depends on, as JSON.
    files: Sequence[Path] = ()  #: The files that it consists of.
    output: Record = field(default_factory=dict)  #: Record of its task, once it is finished.
    by_class: Mapping[str, str] = field(default_factory=dict)
    """Digest, for each class, of what only the files of that class depend on."""
    labels: Mapping[Path, Collection[str]] = field(default_factory=dict)
    """The classes of each file, where there is a ``by_class``."""

    @cached_property
    def key(self) -> str:
        """Digest of everything that the result depends on."""
        return self.key_of(self.by_class)

    def key_of(self, classes: Iterable[str]) -> str:
        """Digest of everything that a file of some classes depends on."""
        return digest_json(self._parts({k: self.by_class[k] for k in classes if self.by_class}))

    def _parts(self, by_class: Mapping[str, str]) -> Record:
        return {**self.parts, **({"by_class": by_class} if self.by_class else {})}

    def done(self) -> bool:
        """Tell whether the result is finished for this key and all its files exist."""
        record = self._record()
        if record is None or record["key"] != self.key or not record["done"]:
            return False
        self.output = record["output"]
        return all(path.is_file() for path in self.files)

    def begin(self) -> None:
        """Prepare the folder: keep files of the same key, remove those of another."""
        for path in self.folder.rglob(".*.tmp"):
            path.unlink()  # it was being written when a run was killed
        record = self._record()
        found = list(self.folder.iterdir()) if self.folder.exists() else []
        if record is not None and record["key"] == self.key:
            logger.info("%s: resuming", self.folder.name)
            return
        if record is not None:
            logger.info("%s: recomputing: %s", self.folder.name, self._changed(record["parts"]))
        elif found:
            raise ArtefactError(
                f"{self.folder} holds files but no readable {RECORD}, so they may be yours; move "
                "them away, or choose another run folder with --run.folder"
            )
        # The record is replaced last, so that an interruption between the two is noticed.
        kept = {self.folder / RECORD, *self._unchanged({} if record is None else record["parts"])}
        for path in sorted(self.folder.rglob("*"), reverse=True):  # files before their folders
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path not in kept:
                path.unlink()
        self._write(done=False)

    def _unchanged(self, old: Mapping[str, Any]) -> Iterator[Path]:
        """Files that are the same for other parts: no class of theirs has changed."""
        was = {name: value for name, value in old.items() if name != "by_class"}
        if not self.by_class or digest_json(was) != digest_json(self.parts):
            return
        before = old.get("by_class", {})
        same = {name for name, digest in self.by_class.items() if before.get(name) == digest}
        yield from (path for path, classes in self.labels.items() if same.issuperset(classes))

    def finish(self, output: Output) -> None:
        """Record that the result is finished, with what later stages need to know of it."""
        self.output = dict(output)
        self._write(done=True)

    def take(self, run: Path) -> bool:
        """Take the files over from the folder of another run that has finished the same result."""
        if not all(path.is_relative_to(self.folder) for path in self.files):
            return False
        source = run / self.name
        files = [source / path.relative_to(self.folder) for path in self.files]
        if not replace(self, folder=source, files=files).done():
            return False
        self.begin()
        link(source, self.folder, last=RECORD)
        return self.done()

    def _record(self) -> Record | None:
        path = self.folder / RECORD
        if not path.is_file():
            return None
        record: Record = read_json(path)
        if not isinstance(record, dict) or not {"key", "parts", "done", "output"} <= record.keys():
            raise ArtefactError(f"{path} is not a stage record; delete {self.folder} and run again")
        return record

    def _write(self, *, done: bool) -> None:
        parts = self._parts(self.by_class)
        record = {"key": self.key, "parts": parts, "done": done, "output": self.output}
        write_json(self.folder / RECORD, {**record, "versions": versions()})

    def _changed(self, old: Mapping[str, Any]) -> str:
        was, now = dict(_leaves(old)), dict(_leaves(self._parts(self.by_class)))
        changed = sorted(k for k in was.keys() | now.keys() if was.get(k) != now.get(k))
        shown = []
        for key in changed[:4]:
            values = f" {was.get(key)!r:.40} -> {now.get(key)!r:.40}"
            shown.append(key if DIGEST.search(values) else key + values)  # says nothing to a reader
        return "; ".join(shown) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{name}.{key}" if name else str(key))


@dataclass(frozen=True)
class Task:
    """Results that one piece of work, run in every process, makes together."""

    results: Sequence[Result]
    work: Callable[..., Output | None]
    """Gets the results to be made in their order; what it returns in the first process is recorded
    of them."""
    prepare: Callable[[], Any] | None = None
    """Called before files of another key are removed. What it returns is the first argument of
    ``work``."""
    apart: bool = False  #: Whether only the results that are not up to date are made again.


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run folder until the block ends; ArtefactError if another process holds it."""
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
        for path in folder.glob(".*.tmp"):
            path.unlink()
        yield


def in_use(folder: Path) -> bool:
    """Tell whether a process holds the lock of a run folder."""
    try:
        with (folder / ".lock").open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, FileNotFoundError)
    return False
