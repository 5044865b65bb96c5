"""``lpcam demo``: draw the bundled data set, then run its recipe."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lpcam.data import creatures
from lpcam.pipeline.cache import locked
from lpcam.pipeline.recipe import load_recipe
from lpcam.pipeline.run import RunResult, run
from lpcam.runtime.errors import DataError
from lpcam.runtime.files import read_json, write_json

IMAGES = 400
SIZE = 128
SEED = 0


def demo(
    folder: Path, threads: int | None, command: str, *, images: int = IMAGES, size: int = SIZE
) -> RunResult:
    """Draw ``images`` creatures into ``folder/data``, unless they are there; run the recipe."""
    data = folder / "data"
    with locked(folder):
        draw(data, {"images": images, "size": size, "seed": SEED, "revision": 1})
    changes: dict[str, Any] = {"data.root": str(data), "run.folder": str(folder)}
    if threads is not None:
        changes["run.threads"] = threads
    return run(load_recipe("demo", changes), command=command)


def draw(data: Path, drawing: dict[str, int]) -> None:
    """Draw ``images`` of a ``size`` with a ``seed`` into a folder, unless they are there."""
    marker = data / "drawing.json"
    if marker.is_file():
        if read_json(marker) == drawing:
            return
        for path in data.iterdir():  # of other numbers, or stopped half-way
            if path != marker:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif data.exists() and any(data.iterdir()):
        raise DataError(
            f"{data} holds files that the demo did not draw, so they may be yours; choose another "
            "folder with --folder"
        )

    write_json(marker, {"unfinished": drawing})
    creatures.write(data, images=drawing["images"], size=drawing["size"], seed=drawing["seed"])
    write_json(marker, drawing)
