"""Helpers of the stages that train a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lpcam.pipeline.cache import Output, Record, Result, Task
from lpcam.pipeline.context import Context
from lpcam.runtime.files import digest_file
from lpcam.runtime.versions import versions
from lpcam.training.loop import History, TrainingOptions
from lpcam.training.saved_network import SavedNetwork

N = TypeVar("N", bound=SavedNetwork)


def training_options(context: Context, folder: Path) -> TrainingOptions:
    """Arguments of every training; ``folder`` is for checkpoints."""
    return {
        "seed": context.recipe.run.seed,
        "folder": folder,
        "workers": context.threads if context.device.type == "cuda" else 0,
        "processes": context.processes,
    }


def training_task(
    context: Context,
    name: str,
    parts: Record,
    path: Path,
    build: Callable[[], N],
    train: Callable[[N, Path], History],
) -> Task:
    """A task that trains a network and writes its file.

    Args:
        path: the file of the trained network.
        build: makes the untrained network, before anything is removed.
        train: trains it in place and returns the history; its second argument is the folder for
            checkpoints.
    """

    def work(network: N, result: Result) -> Output | None:
        history = train(network, result.folder)
        if not context.processes.first:
            return None
        network.save(path, {"stage": result.key, "versions": versions()})
        digest, fingerprint = digest_file(path), network.fingerprint()
        return {"history": history, "digest": digest, "fingerprint": fingerprint}

    return context.task(name, parts, [path], work, build)
