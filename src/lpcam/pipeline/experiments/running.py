"""Runs of an experiment: each when it is not up to date, with what others have made already."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from lpcam.method.choices import format_choices
from lpcam.method.prototypes import Prototypes, worst
from lpcam.pipeline.cache import locked
from lpcam.pipeline.datasets import LISTS, SEGMENT_LISTS, read_dataset
from lpcam.pipeline.demo import draw
from lpcam.pipeline.experiments.definition import Experiment, PlannedRun, SizeName
from lpcam.pipeline.recipe import Recipe, parse_recipe
from lpcam.pipeline.run import run
from lpcam.pipeline.run_folder import RunFolder
from lpcam.pipeline.sharing import Shared
from lpcam.runtime.errors import ArtefactError, LpcamError
from lpcam.runtime.files import digest_json, read_json, write_bytes, write_json
from lpcam.runtime.resources import available_threads

logger = logging.getLogger(__name__)
MARKER = "experiment.json"


class ExperimentFolder:
    """The folder of an experiment: every path in it."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.marker = self.path / MARKER  #: Which experiment the folder belongs to.
        self.state = self.path / "runs.json"  #: Which runs are up to date, and which failed.
        self.results = self.path / "results.json"  #: Every row with its protocol.
        self.markdown = self.path / "table.md"
        self.latex = self.path / "table.tex"
        self.report = self.path / "report.html"
        self.drawings = self.path / "drawings"  #: The data, where an experiment draws it.

    def plot(self, number: int, suffix: str) -> Path:
        """File of a plot or picture, by its place in the experiment."""
        return self.path / f"plots/{number}{suffix}"

    def choices(self, run: str) -> Path:
        """Choices about the prototypes of a run."""
        return self.path / f"choices/{run}.yaml"


def run_all(
    planned: Sequence[PlannedRun],
    folder: ExperimentFolder,
    *,
    name: str,
    size: SizeName,
    experiment: Experiment,
    processes: int = 1,
    command: str = "",
) -> dict[str, dict[str, Any]]:
    """Bring the runs of an experiment up to date; a run that fails does not stop the others.

    The first run works alone, with all threads. Later ones take over its finished results and, in
    the same process, its features; with several processes they run beside each other.

    Returns:
        For the name of each run's folder ``status`` ("done" or "failed"), ``seconds`` and, of a
        failed one, ``reason``.

    Raises:
        ArtefactError: if the folder belongs to another experiment, or is in use.
        DataError: if a data set cannot be read; no run was started.
    """
    with locked(folder.path):
        _claim(folder, name, size)
        drawing = experiment.sizes[size].drawing
        if drawing is not None:
            draw(folder.drawings, {**drawing.model_dump(), "seed": 0, "revision": 1})
        stamps = _stamps(planned)
        known = read_json(folder.state) if folder.state.is_file() else {}
        jobs = {one.folder.name: one for one in planned}  # equal runs have one folder
        state = {name: known[name] for name in jobs if name in known}
        order = sorted(jobs.values(), key=lambda one: one.arm.drop is not None)
        for independent in (True, False):  # those that drop prototypes need the runs before
            todo = []
            for one in order:
                if (one.arm.drop is None) != independent:
                    continue
                job = _with_choices(one, planned, folder, state)
                key = digest_json(
                    [job.recipe.model_dump(mode="json", by_alias=True), stamps[one.folder]]
                )
                found = state.get(one.folder.name, {})
                if found.get("key") != key or found["status"] != "done":
                    todo.append((job, key))
            for job, key, record in _worked(todo, experiment.until, processes, command):
                state[job.folder.name] = {"key": key, **record}
                write_json(folder.state, state)
        if state != known:
            write_json(folder.state, state)
    _SHARED.forget()
    return state


def _claim(folder: ExperimentFolder, name: str, size: SizeName) -> None:
    own = {"experiment": name, "size": size}
    if folder.marker.is_file():
        if (found := read_json(folder.marker)) != own:
            raise ArtefactError(
                f"{folder.path} belongs to the experiment {found.get('experiment')} of size "
                f"{found.get('size')}; choose another folder for {name} with --folder"
            )
        return
    if any(path.name != ".lock" for path in folder.path.iterdir()):
        raise ArtefactError(
            f"{folder.path} holds files but no experiment, so they may be yours; choose another "
            "folder with --folder"
        )
    write_json(folder.marker, own)


def _stamps(planned: Sequence[PlannedRun]) -> dict[Path, str]:
    """Digest of what each run reads: its labels, and times and sizes of all its files."""
    found: dict[str, list[Any]] = {}
    stamps = {}
    for one in planned:
        lists = (*LISTS, *(SEGMENT_LISTS if one.recipe.segment is not None else ()))
        key = one.recipe.data.model_dump_json(by_alias=True) + str(lists)
        if key not in found:
            dataset = read_dataset(one.recipe, lists)
            rows = [[*map(_state, (i.image, i.mask)), *i.labels] for i in dataset.items.values()]
            found[key] = [rows, {name: list(ids) for name, ids in dataset.lists.items()}]
        named = [_state(Path(text)) for text in _texts(one.recipe.model_dump(mode="json"))]
        stamps[one.folder] = digest_json([found[key], named])
    return stamps


def _state(path: Path | None) -> list[Any]:
    """Name, time and size of a file; nothing of a folder, or where there is none."""
    if path is None or not path.is_file():
        return []
    state = path.stat()
    return [str(path), state.st_mtime_ns, state.st_size]


def _texts(values: Any) -> Iterator[str]:
    """All texts in nested values, which may be the paths of weights."""
    inner = values.values() if isinstance(values, Mapping) else values
    if isinstance(values, str):
        yield values
    elif isinstance(inner, Iterable):
        for one in inner:
            yield from _texts(one)


def _with_choices(
    one: PlannedRun,
    planned: Sequence[PlannedRun],
    folder: ExperimentFolder,
    state: Mapping[str, Mapping[str, Any]],
) -> PlannedRun:
    """The run with a file of choices, where its arm drops prototypes of another arm."""
    drop = one.arm.drop
    if drop is None:
        return one
    other = next(p for p in planned if p.arm.name == drop.arm and p.seed == one.seed)
    path = folder.choices(one.folder.name)
    if state[other.folder.name]["status"] == "done":
        prototypes = Prototypes.load(RunFolder(other.folder).prototypes())
        found = worst(prototypes, drop.by, drop.share)
        write_bytes(path, format_choices(found, prototypes.digest).encode())
    settings = one.recipe.lpcam.model_copy(update={"choices": path})
    return replace(one, recipe=one.recipe.model_copy(update={"lpcam": settings}))


def _worked(
    todo: Sequence[tuple[PlannedRun, str]], until: str, processes: int, command: str
) -> Iterator[tuple[PlannedRun, str, dict[str, Any]]]:
    """Run what is to be done, and give the record of each run when it has ended."""
    beside = processes > 1 and len(todo) > 2
    for job, key in todo[:1] if beside else todo:
        yield job, key, _work(job.recipe, until, command)
    if not beside:
        return
    threads = max(1, available_threads() // processes)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn) as pool:
        jobs = {}
        for job, key in todo[1:]:
            own = job.recipe.run.model_copy(update={"threads": job.recipe.run.threads or threads})
            values = job.recipe.model_copy(update={"run": own}).model_dump(
                mode="json", by_alias=True
            )
            jobs[pool.submit(_work_from, values, until, command)] = (job, key)
        for done in as_completed(jobs):
            yield *jobs[done], done.result()


def _work_from(values: Mapping[str, Any], until: str, command: str) -> dict[str, Any]:
    """Run a recipe's values, in a process of its own."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return _work(parse_recipe(values, where=str(values["name"])), until, command)


def _others(folder: Path) -> list[Path]:
    """Folders of all runs of this experiment, and of those beside it."""
    markers = folder.parents[2].glob(f"*/{MARKER}")
    return [run for marker in sorted(markers) for run in sorted((marker.parent / "runs").glob("*"))]


_SHARED = Shared()  # of a process that runs several arms after each other


def _work(recipe: Recipe, until: str, command: str) -> dict[str, Any]:
    """Run a recipe; the record of how it ended."""
    shared, folder, started = _SHARED, recipe.folder, time.monotonic()
    shared.folders = [one for one in _others(folder) if one != folder]
    logger.info("%s", folder.name)
    try:
        shared.begin(folder)
        run(recipe, until=until, command=command, shared=shared)
    except Exception as error:  # one arm that fails must not lose the others
        if not isinstance(error, LpcamError):
            logger.exception("%s failed", folder.name)
        reason = str(error) if isinstance(error, LpcamError) else f"{type(error).__name__}: {error}"
        logger.warning("%s failed: %s", folder.name, reason)
        return {"status": "failed", "reason": reason}
    finally:
        gc.collect()  # a run's objects refer to each other, and hold its decoded images
    return {"status": "done", "seconds": round(time.monotonic() - started, 1)}
