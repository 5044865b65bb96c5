"""``lpcam demo``: draw the bundled data set, then run its recipe."""

from __future__ import annotations

from pathlib import Path

from lpcam.pipeline import RunResult, run
from lpcam.recipe import load_recipe
from lpcam.storage import read_json, write_json

IMAGES = 400
SIZE = 160
SEED = 0


def demo(
    folder: Path, threads: int | None, command: str, *, images: int = IMAGES, size: int = SIZE
) -> RunResult:
    """Draw ``images`` creatures of ``size`` pixels into ``folder/data`` and run the demo recipe.

    A second call with the same numbers draws nothing and runs what is not up to date.
    """
    data = folder / "data"
    drawing = {"images": images, "size": size, "seed": SEED, "revision": 1}
    marker = data / "drawing.json"
    if not marker.is_file() or read_json(marker) != drawing:
        from lpcam.data.creatures import write  # noqa: PLC0415

        write(data, images=images, size=size, seed=SEED)
        write_json(marker, drawing)
    overrides = [("data.root", str(data)), ("run.folder", str(folder))]
    if threads is not None:
        overrides.append(("run.threads", str(threads)))
    return run(load_recipe("demo", overrides), command=command)
